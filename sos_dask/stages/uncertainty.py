"""Stage uncertainty: errors of corrected labels, calibrated on held-out pairs, and what they hold.

A task reads the pairs (`stages.evidence`: a million at most), two look where they are sparse and
compare three surveys, and each label is fitted by one. None is left to the process that asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask import corrections as models
from sos_dask.columns import floats, floats_or_nan, key_numbers, matrix32
from sos_dask.evidence.error_tables import Grid
from sos_dask.evidence.intervals import (
    DENSE,
    SPARSE,
    Coverage,
    HeldOut,
    LabelErrors,
    Sparseness,
    coverages,
    error_model,
    fit_label,
)
from sos_dask.evidence.three_cornered_hat import three_cornered_hat
from sos_dask.problem import TEFF_UNIT_K, features
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import LABELS
from sos_dask.stages.common import common_stars
from sos_dask.stages.evidence import DIFFERENCES, evidence, require_evidence, single_observations
from sos_dask.stages.parts import records, run_parts, unless_complete
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stars.folds import fold_of, smallest_of_joined
from sos_dask.stars.repeats import GIANT_LOGG, normalisation
from sos_dask.storage.artifact import Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, partition_errors, write_parquet

VERSION = 4
CALIBRATION = "calibration.parquet"
_MIN_COMMON = 30
# Measured with boosted trees, 160 MiB more than with a polynomial, and a tenth more.
_PROCESS_BYTES, _BYTES_A_PAIR = 450 << 20, 250
_TABLES = {"cells": ("values", "reference"), "steps": ("profile", "reference_profile")}
_ERRORS = tuple(f"{label}_err_ref" for label in LABELS)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class UncertaintySettings:
    """Settings of the stage.

    Parameters
    ----------
    reference_error : {"included", "removed"}
        Whether the errors that are written hold the error of the reference.
    sparse_fraction : float
        Share of the training stars that count as sparse.
    min_single : int
        Errors are those of one observation, because observations are corrected: only held-out
        stars with one observation count where there are as many, else all.
    n_parts : int
        Parts of the held-out stars that are left out in turn.
    seed : int
    """

    reference_error: str = "included"
    sparse_fraction: float = 0.05
    min_single: int = 1000
    n_parts: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Surveys:
    """Where errors of the surveys are known from.

    Parameters
    ----------
    target : str
        Name of the target survey.
    target_stars : Catalog, optional
        Its stars: they say how far its stated errors are wrong.
    reference : Catalog, optional
        Output of reference.
    stars : mapping of str to Catalog
        The catalogs it was made from, by survey.
    """

    target: str = "target"
    target_stars: Catalog | None = None
    reference: Catalog | None = None
    stars: Mapping[str, Catalog] = field(default_factory=dict)

    def error_factors(self) -> dict[str, list[dict[str, Any]]]:
        """Factors of stated errors by survey; none where a survey has no repeats."""
        catalogs = {self.target: self.target_stars, **self.stars}
        return {
            name: list(catalog.manifest.summary.get("error_factors", []))
            for name, catalog in catalogs.items()
            if catalog is not None and catalog.manifest is not None
        }


def uncertainty_recipe(
    model: str, pairs: str, settings: UncertaintySettings, surveys: Mapping[str, str] | None = None
) -> Recipe:
    """Recipe of `uncertainty` for inputs of these fingerprints."""
    inputs = {"model": model, "pairs": pairs, **(surveys or {})}
    return Recipe("uncertainty", VERSION, {"settings": asdict(settings)}, inputs)


def uncertainty(
    model: Path,
    pairs: Catalog,
    directory: Path,
    settings: UncertaintySettings | None = None,
    surveys: Surveys | None = None,
    *,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Model the errors of corrected labels and check them on held-out pairs.

    Parameters
    ----------
    model : Path
        Output of train for these pairs.
    pairs : Catalog
        Output of crossmatch.
    directory : Path
        Gets the error model (``error.json``, ``error.npy``) and ``calibration.parquet``: coverage
        of the 68 % and 95 % intervals by label and subset.
    settings : UncertaintySettings, optional
    surveys : Surveys, optional
    recipe : Recipe, optional
        Default: of the inputs' own fingerprints.

    Returns
    -------
    Manifest
        ``rows``: pairs in, held-out pairs used. ``summary``: coverage (all, dense, sparse), factors
        of stated errors by survey, errors of three surveys by the three-cornered hat.

    Raises
    ------
    ModelError
        Too few held-out pairs.
    CatalogError
        Held-out pairs are not those of these pairs, or the directory holds something else.
    """
    settings, surveys = settings or UncertaintySettings(), surveys or Surveys()
    recipe = recipe or uncertainty_recipe(
        Manifest.checked(model).fingerprint, pairs.fingerprint, settings
    )
    catalogs = [pairs, surveys.target_stars, surveys.reference, *surveys.stars.values()]
    inputs = [model, *(catalog.path for catalog in catalogs if catalog is not None)]
    output = Output.prepare(directory, recipe, overwrite, inputs)
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    require_evidence(cluster, pairs, "uncertainty", _PROCESS_BYTES, _BYTES_A_PAIR)
    with unless_complete(output):
        _make(output, _Part(output, "", model, pairs, settings, surveys), cluster, report)
    return output.load_manifest()


def read_calibration(directory: Path) -> list[dict[str, Any]]:
    """Rows of ``calibration.parquet``: `uncertainty.Coverage` as mappings, in its order.

    Raises
    ------
    PartitionError
        The file is missing or damaged.
    """
    path = directory / CALIBRATION
    Manifest.checked(directory)
    with partition_errors(path):
        return list(pq.read_table(path).to_pylist())


@dataclass(frozen=True)
class _Part:
    output: Output
    key: str
    model: Path
    pairs: Catalog
    settings: UncertaintySettings
    surveys: Surveys

    def grid(self) -> Grid:
        """Cells over the training box of the correction, of which the first task tells."""
        (about,) = records(self.output, "pairs", ["pairs"])
        return Grid(tuple(about["low"]), tuple(about["high"]))


def _make(output: Output, part: _Part, cluster: Cluster, report: Report) -> None:
    for kind, keys, function, step in (
        ("pairs", ("pairs",), _pairs_part, "uncertainty pairs"),
        ("looks", tuple(_LOOKS), _look_part, "uncertainty stars"),
        ("labels", LABELS, _label_part, "uncertainty"),
    ):
        parts = {key: replace(part, key=key) for key in keys}
        run_parts(output, kind, parts, function, cluster, step, report)
    (about,) = records(output, "pairs", ["pairs"])
    looks = dict(zip(_LOOKS, records(output, "looks", list(_LOOKS)), strict=True))
    of_label = records(output, "labels", list(LABELS))
    tables = [
        _label_errors(output, label, one["factors_95"])
        for label, one in zip(LABELS, of_label, strict=True)
    ]
    errors = error_model(
        tables,
        part.grid(),
        read_piece(_file(output, "cells"))["sparse"].to_numpy(),
        about["least_log_snr"],
        correction=hashlib.sha256((part.model / models.MODEL_FILE).read_bytes()).hexdigest(),
        reference_error=part.settings.reference_error,
    )
    found = [asdict(Coverage(**row)) for one in of_label for row in one["coverage"]]
    calibration = pa.Table.from_pylist(found)
    files = [output.write_bytes(name, content) for name, content in errors.files().items()]
    files.append(output.write_file(CALIBRATION, partial(write_parquet, calibration)))
    output.commit(
        Rows(part.pairs.n_rows, about["n_used"], 0, about["dropped"]),
        tuple(files),
        {
            "method": about["method"],
            "reference_error": part.settings.reference_error,
            "factors_95": errors.about["factors_95"],
            "pairs_by_class": {
                label: one["n_class"] for label, one in zip(LABELS, of_label, strict=True)
            },
            "coverage": [row for row in found if row["subset"] in ("all", DENSE, SPARSE)],
            "error_factors": part.surveys.error_factors(),
            "three_cornered_hat": looks["hats"]["found"],
        },
    )


def _file(output: Output, name: str) -> Path:
    return output.work / "pieces" / f"{name}.arrow"


def _pairs_part(part: _Part) -> None:
    """Keep what the other tasks need of the pairs, and of those that were held out."""
    pairs, settings = part.pairs, part.settings
    target = next(name for name in pairs.schema.names if name.startswith("target_"))
    more = ("snr", "n_obs", "survey_ref", "snr_ref", "logg_ref", *_ERRORS)
    names = [target, "reference_star_id", *LABELS, *DIFFERENCES, *pairs.columns(more)]
    read = evidence(pairs, names)
    table = read.table
    rows, predicted = read.held_out(part.model)
    x = features(*(floats(table, label) for label in LABELS))
    placed = np.asarray(np.isfinite(x).all(axis=1))
    single = single_observations(table, rows, settings.min_single)
    chosen = (single & placed)[rows]
    used = np.flatnonzero(chosen)
    held = table.take(pa.array(rows[used]))
    held_out = HeldOut(
        x[rows[used]],
        floats_or_nan(held, "snr"),
        matrix32(held, DIFFERENCES).astype(np.float64) - predicted[used],
        _reference_errors(held, part.surveys.error_factors()),
        _parts(held, target, settings),
    )
    kept = table.select([*LABELS, "reference_star_id"])
    kept = kept.append_column("single", pa.array(single))
    write_piece(_file(part.output, "pairs"), kept)
    write_piece(_file(part.output, "held"), _held_table(held_out, rows[used]))
    n_held, n_placed = len(rows), int(np.count_nonzero(placed[rows]))
    dropped = read.dropped(pairs) | {
        "not held out": table.num_rows - n_held,
        "without all labels": n_held - n_placed,
        "of several observations": n_placed - len(used),
    }
    info = models.load(part.model).info
    part.output.put_record(
        "pairs",
        "pairs",
        {
            "n_used": len(used),
            "dropped": dropped,
            "method": info.method,
            "low": info.minimum,
            "high": info.maximum,
            "least_log_snr": held_out.least,
        },
    )


def _columns(name: str, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {f"{name}_{i}": np.ascontiguousarray(column) for i, column in enumerate(values.T)}


def _matrix(table: pa.Table, name: str) -> NDArray[Any]:
    columns = [table[column].to_numpy() for column in table.column_names if column.startswith(name)]
    return np.stack(columns, axis=1)


def _held_table(held_out: HeldOut, rows: NDArray[np.int64]) -> pa.Table:
    matrices = ("features", "residuals", "reference_errors")
    columns: dict[str, NDArray[Any]] = {"row": rows, "snr": held_out.snr, "part": held_out.part}
    for name in matrices:
        columns |= _columns(name, getattr(held_out, name))
    return pa.table(columns)


def _held_out(table: pa.Table) -> HeldOut:
    return HeldOut(
        _matrix(table, "features"),
        table["snr"].to_numpy(),
        _matrix(table, "residuals"),
        _matrix(table, "reference_errors"),
        table["part"].to_numpy(),
    )


def _label_errors(output: Output, label: str, factors_95: Mapping[str, float]) -> LabelErrors:
    tables = {name: read_piece(_file(output, f"{name}-{label}")) for name in _TABLES}
    columns = {
        column: tables[name][column].to_numpy() for name, some in _TABLES.items() for column in some
    }
    return LabelErrors(**columns, factors_95=factors_95)


def _look_part(part: _Part) -> None:
    part.output.put_record("looks", part.key, _LOOKS[part.key](part))


def _sparseness(part: _Part) -> dict[str, Any]:
    """Keep which held-out pairs and which cells are sparse."""
    table = read_piece(_file(part.output, "pairs"))
    x = features(*(floats(table, label) for label in LABELS))
    placed = np.asarray(np.isfinite(x).all(axis=1))
    sparseness = Sparseness.of(x[placed], part.grid(), part.settings.sparse_fraction)
    of_pairs = np.zeros(len(x), dtype=np.bool_)
    of_pairs[placed] = sparseness.of_stars
    rows = read_piece(_file(part.output, "held"))["row"].to_numpy()
    write_piece(_file(part.output, "stars"), pa.table({"sparse": of_pairs[rows]}))
    write_piece(_file(part.output, "cells"), pa.table({"sparse": sparseness.of_cells}))
    return {"pairs": len(x)}


def _label_part(part: _Part) -> None:
    """Keep the errors of a label, and say what their intervals hold."""
    label, grid = part.key, part.grid()
    held_out = _held_out(read_piece(_file(part.output, "held")))
    sparse = read_piece(_file(part.output, "cells"))["sparse"].to_numpy()
    is_sparse = read_piece(_file(part.output, "stars"))["sparse"].to_numpy()
    errors, checked = fit_label(held_out, label, grid, sparse)
    subsets = _subsets(held_out, is_sparse, sparse[grid.cells(held_out.features)])
    for name, columns in _TABLES.items():
        kept = pa.table({column: getattr(errors, column) for column in columns})
        write_piece(_file(part.output, f"{name}-{label}"), kept)
    part.output.put_record(
        "labels",
        label,
        {
            "factors_95": errors.factors_95,
            "n_class": checked.n_class,
            "coverage": [asdict(one) for one in coverages(label, checked, subsets)],
        },
    )


def _parts(held: pa.Table, target_id: str, settings: UncertaintySettings) -> NDArray[np.int8]:
    """Parts of the held-out pairs; those that share a star are in one, whatever their fold."""
    target = pc.dictionary_encode(held[target_id]).combine_chunks().indices.to_numpy()
    order = np.argsort(target, kind="stable")
    same = np.flatnonzero(target[order[1:]] == target[order[:-1]])
    # Folds of the pairs come from the same numbers: another seed makes the parts independent.
    number = key_numbers(held["reference_star_id"], settings.seed + 1)
    joined = smallest_of_joined(number, number, (order[same], order[same + 1]))
    return fold_of(joined, settings.n_parts)


def _reference_errors(
    held: pa.Table, factors: Mapping[str, Sequence[Mapping[str, Any]]]
) -> FloatArray:
    """Stated errors of the reference times the factors of its survey, shape (n, 3)."""
    errors = np.stack([floats_or_nan(held, name) for name in _ERRORS], axis=1)
    if "survey_ref" not in held.schema.names:
        return errors
    logg, snr = (floats_or_nan(held, name) for name in ("logg_ref", "snr_ref"))
    for survey in pc.unique(held["survey_ref"]).drop_null().to_pylist():
        mine = pc.fill_null(pc.equal(held["survey_ref"], survey), False).to_numpy()
        for number, label in enumerate(LABELS):
            of_survey = factors.get(survey, ())
            errors[mine, number] *= normalisation(of_survey, label, logg[mine], snr[mine])
    return errors


def _subsets(held: HeldOut, is_sparse: BoolArray, in_sparse_cell: BoolArray) -> dict[str, Any]:
    """Held-out pairs whose coverage is looked at separately."""
    teff, logg, feh = held.features[:, 0] * TEFF_UNIT_K, held.features[:, 1], held.features[:, 2]
    found = {
        "all": np.ones(len(teff), dtype=np.bool_),
        DENSE: ~is_sparse,
        SPARSE: is_sparse,
        "dense cells": ~in_sparse_cell,
        "sparse cells": in_sparse_cell,
        "giants": logg < GIANT_LOGG,
        "dwarfs": logg >= GIANT_LOGG,
        "logg < 1": logg < 1,
        "teff > 7000": teff > 7000,
        "feh < -2": feh < -2,
        "feh > 0.2": feh > 0.2,
    }
    known = np.isfinite(held.snr)
    if known.any():
        low, high = np.quantile(held.snr[known], [1 / 3, 2 / 3])
        found["low snr"], found["high snr"] = held.snr < low, held.snr >= high
    return found


def _hats(part: _Part) -> dict[str, Any]:
    """Errors of the corrected target and two references on their common stars, by label."""
    surveys = part.surveys
    if surveys.reference is None or len(surveys.stars) < 2:
        return {"found": []}
    common = common_stars(surveys.reference, surveys.stars)
    table = read_piece(_file(part.output, "pairs"))
    table = table.filter(table["single"])
    ids = table["reference_star_id"].cast(pa.string()).combine_chunks()
    row = pc.fill_null(pc.index_in(common.star_id, ids), -1).to_numpy()
    correction = models.load(part.model)
    found = []
    for first, second in combinations(sorted(surveys.stars), 2):
        (ours, base), (theirs, other) = common.labels[first], common.labels[second]
        stars, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
        paired = row[stars] >= 0
        mine = table.take(pa.array(row[stars[paired]]))
        labels = [floats(mine, label) for label in LABELS]
        target = np.stack(labels, axis=1) - correction.predict(features(*labels))
        for number, label in enumerate(LABELS):
            three = [target[:, number], base[label][i[paired]], other[label][j[paired]]]
            if np.isfinite(three).all(axis=0).sum() < _MIN_COMMON:
                continue
            corners = three_cornered_hat(three, (surveys.target, first, second), part.settings.seed)
            found += [{"label": label, **corner} for corner in corners]
    return {"found": found}


_LOOKS = {"sparseness": _sparseness, "hats": _hats}

"""Stage uncertainty: errors of corrected labels, calibrated on held-out pairs, and what they hold.

It holds a few columns of the pairs at once, about 200 bytes a pair; two cores are not needed: the
fit of 100,000 held-out pairs takes less than a minute of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask import models
from sos_dask.artifact import Manifest, Output, Recipe, Rows
from sos_dask.catalog import Catalog, partition_errors, write_parquet
from sos_dask.cluster import Report, silent
from sos_dask.columns import floats, floats32, floats_or_nan
from sos_dask.features import TEFF_UNIT_K, features
from sos_dask.folds import fold_of, smallest_of_joined, star_numbers
from sos_dask.hat import three_cornered_hat
from sos_dask.repeats import GIANT_LOGG, normalisation
from sos_dask.schema import LABELS
from sos_dask.stages.common import common_stars
from sos_dask.stages.parts import (
    DIFFERENCES,
    held_out_pairs,
    single_observations,
    training_pairs,
    unless_complete,
)
from sos_dask.uncertainty import (
    DENSE,
    SPARSE,
    Grid,
    HeldOut,
    Sparseness,
    coverages,
    fit_errors,
)

VERSION = 2
CALIBRATION = "calibration.parquet"
_MIN_COMMON = 30
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
        Too few held-out pairs, or residuals that are all zero.
    CatalogError
        Held-out pairs are not those of these pairs, or the directory holds something else.
    """
    settings, surveys = settings or UncertaintySettings(), surveys or Surveys()
    recipe = recipe or uncertainty_recipe(
        Manifest.load(model).fingerprint, pairs.fingerprint, settings
    )
    output = Output.prepare(directory, recipe, overwrite)
    if output.complete:
        return output.load_manifest()
    with unless_complete(output):
        report("uncertainty", 0, 2)
        _make(output, model, pairs, settings, surveys, report)
        report("uncertainty", 2, 2)
    return output.load_manifest()


def read_calibration(directory: Path) -> list[dict[str, Any]]:
    """Rows of ``calibration.parquet``: `uncertainty.Coverage` as mappings, in its order.

    Raises
    ------
    PartitionError
        The file is missing or damaged.
    """
    path = directory / CALIBRATION
    with partition_errors(path):
        return list(pq.read_table(path).to_pylist())


def _make(
    output: Output,
    model: Path,
    pairs: Catalog,
    settings: UncertaintySettings,
    surveys: Surveys,
    report: Report,
) -> None:
    table = _read(pairs)
    differences = [floats32(table, name) for name in DIFFERENCES]
    rows, predicted = held_out_pairs(model, table["fold"].to_numpy(), differences)
    x = features(*(floats(table, label) for label in LABELS))
    placed = np.asarray(np.isfinite(x).all(axis=1))
    single = single_observations(table, rows, settings.min_single)
    chosen = (single & placed)[rows]
    held_rows = rows[chosen]
    residuals = np.stack(differences, axis=1)[held_rows].astype(np.float64) - predicted[chosen]
    factors = surveys.error_factors()
    held = table.take(pa.array(held_rows))
    held_out = HeldOut(
        x[held_rows],
        floats_or_nan(held, "snr"),
        residuals,
        _reference_errors(held, factors),
        _parts(held, settings),
    )
    correction = models.load(model)
    grid = Grid(correction.info.minimum, correction.info.maximum)
    sparseness = Sparseness.of(x[placed], settings.sparse_fraction)
    errors, checked = fit_errors(
        held_out,
        grid,
        sparseness.cells(grid),
        correction=hashlib.sha256((model / models.MODEL_FILE).read_bytes()).hexdigest(),
        reference_error=settings.reference_error,
    )
    report("uncertainty", 1, 2)
    is_sparse = sparseness.stars(held_out.features)
    found = coverages(checked, _subsets(held_out, is_sparse, errors.is_sparse(held_out.features)))
    calibration = pa.Table.from_pylist([asdict(one) for one in found])
    corrected = np.stack([floats(table, label) for label in LABELS], axis=1)
    corrected -= correction.predict(x)
    hats = _hats(table, corrected, single, surveys, settings.seed)
    files = [output.write_bytes(name, content) for name, content in errors.files().items()]
    files.append(output.write_file(CALIBRATION, partial(write_parquet, calibration)))
    n_pairs, n_used, n_held = pairs.n_rows, table.num_rows, len(rows)
    n_placed = int(np.count_nonzero(placed[rows]))
    output.commit(
        Rows(
            n_pairs,
            len(held_rows),
            0,
            {
                "not fit for training": n_pairs - n_used,
                "not held out": n_used - n_held,
                "without all labels": n_held - n_placed,
                "of several observations": n_placed - len(held_rows),
            },
        ),
        tuple(files),
        {
            "method": correction.method,
            "reference_error": settings.reference_error,
            "factors_95": errors.about["factors_95"],
            "pairs_by_class": checked.n_class,
            "coverage": [asdict(one) for one in found if one.subset in ("all", DENSE, SPARSE)],
            "error_factors": factors,
            "three_cornered_hat": hats,
        },
    )


def _read(pairs: Catalog) -> pa.Table:
    """Pairs fit for training, in the order of the sky."""
    target = next(name for name in pairs.schema.names if name.startswith("target_"))
    more = ("snr", "n_obs", "survey_ref", "snr_ref", "logg_ref", *_ERRORS)
    names = ["fold", target, "reference_star_id", *LABELS, *DIFFERENCES, *pairs.columns(more)]
    table = training_pairs(pairs, names).select(names)
    return table.rename_columns(["target_id" if name == target else name for name in names])


def _parts(held: pa.Table, settings: UncertaintySettings) -> NDArray[np.int8]:
    """Parts of the held-out pairs; those that share a star are in one, whatever their fold."""
    target = pc.dictionary_encode(held["target_id"]).combine_chunks().indices.to_numpy()
    order = np.argsort(target, kind="stable")
    same = np.flatnonzero(target[order[1:]] == target[order[:-1]])
    # Folds of the pairs come from the same numbers: another seed makes the parts independent.
    number = star_numbers(held["reference_star_id"], settings.seed + 1)
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


def _hats(
    table: pa.Table, corrected: FloatArray, single: BoolArray, surveys: Surveys, seed: int
) -> list[dict[str, Any]]:
    """Errors of the corrected target and two references on their common stars, by label."""
    if surveys.reference is None or len(surveys.stars) < 2:
        return []
    common = common_stars(surveys.reference, surveys.stars)
    ids = table["reference_star_id"].cast(pa.string()).combine_chunks()
    row = pc.fill_null(pc.index_in(common.star_id, ids.filter(pa.array(single))), -1).to_numpy()
    mine = np.flatnonzero(single)
    found = []
    for first, second in combinations(sorted(surveys.stars), 2):
        (ours, base), (theirs, other) = common.labels[first], common.labels[second]
        stars, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
        paired = row[stars] >= 0
        target = corrected[mine[row[stars[paired]]]]
        for number, label in enumerate(LABELS):
            three = [target[:, number], base[label][i[paired]], other[label][j[paired]]]
            if np.isfinite(three).all(axis=0).sum() < _MIN_COMMON:
                continue
            corners = three_cornered_hat(three, (surveys.target, first, second), seed)
            found += [{"label": label, **asdict(corner)} for corner in corners]
    return found

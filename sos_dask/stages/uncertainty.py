"""Stage uncertainty: errors of corrected labels, calibrated on held-out pairs, and their hit rates.

A task reads the evidence table; one looks where pairs are sparse, one compares three surveys, and
one fits each label. None is left to the process that asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import floats, floats_or_nan, key_numbers, matrix32, mixed
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
from sos_dask.problem import DEFAULT, TEFF_UNIT_K
from sos_dask.schema import LABELS, SEEDS
from sos_dask.settings import Settings
from sos_dask.stages.base import Made, Role, Run, Stage
from sos_dask.stages.common import common_stars
from sos_dask.stages.evidence import (
    DIFFERENCES,
    held_out_columns,
    read_evidence,
    require_rows,
    single_observations,
)
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stars.folds import fold_of, smallest_of_joined
from sos_dask.stars.repeats import GIANT_LOGG, normalisation
from sos_dask.storage.artifact import Manifest, Output, Rows
from sos_dask.storage.catalog import partition_errors

CALIBRATION = "calibration.parquet"
_MIN_COMMON = 30
# Measured with boosted trees, 160 MiB more than with a polynomial, and a tenth more.
_PROCESS_BYTES, _BYTES_A_PAIR = 450 << 20, 250
_TABLES = {"cells": ("values", "reference"), "steps": ("profile", "reference_profile")}
_ERRORS = tuple(f"{label}_err_ref" for label in LABELS)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class UncertaintySettings(Settings):
    """How the errors of corrected labels are made."""

    reference_error: Literal["included", "removed"] = Field(
        "included", description="Whether written errors include the error of the reference."
    )
    sparse_fraction: float = Field(
        0.05, gt=0, lt=0.5, description="Share of the training stars that count as sparse."
    )
    min_single: int = Field(
        1000,
        ge=1,
        description="Only pairs of one observation count where there are as many, else all: the "
        "errors are those of one observation, because observations are corrected.",
    )
    n_parts: int = Field(5, ge=2, le=100, description="Parts of the stars left out in turn.")
    target: str = Field("target", description="Name of the target survey.", exclude=True)
    seed: int = Field(0, ge=SEEDS[0], le=SEEDS[1], description="Other seeds give other parts.")


class Uncertainty(Stage[UncertaintySettings]):
    """Model the errors of corrected labels and check them on held-out pairs.

    Writes the error model (``error.json``, ``error.npy``) and ``calibration.parquet``: hit rates
    of the 68 % and 95 % intervals by label and subset. The summary has hit rates (all, dense,
    sparse), factors of quoted errors by survey, and errors of three surveys by the three-cornered
    hat.
    """

    name = "uncertainty"
    version = 5
    Settings = UncertaintySettings
    roles = (
        Role("evidence", "Pairs with the predictions of the model.", "output"),
        Role("model", "Trained correction.", "output"),
        Role("target", "Stars of the target: how far its quoted errors are wrong.", optional=True),
        Role("reference", "United reference.", optional=True),
        Role("stars", "Stars of the surveys that it was made from.", optional=True, many=True),
    )

    @property
    def method(self) -> str:
        """Method of the model."""
        return self.manifest("model").recipe.stage.removeprefix("train-")

    def error_factors(self) -> dict[str, list[dict[str, Any]]]:
        """Factors of quoted errors by survey; none where a survey has no repeats."""
        names = {self.settings.target: "target"} if self.named("target") else {}
        names |= {name.removeprefix("stars."): name for name in self.named("stars")}
        manifests = {survey: self.catalog(name).manifest for survey, name in names.items()}
        return {
            survey: list(manifest.summary.get("error_factors", []))
            for survey, manifest in manifests.items()
            if manifest is not None
        }

    def make(self, run: Run) -> Made:
        """Read the pairs, see where they are sparse, fit each label."""
        require_rows(run, self.path("evidence"), _PROCESS_BYTES, _BYTES_A_PAIR)
        output = run.output
        (about,) = run.parts("pairs", {"pairs": None}, self.held_pairs, "uncertainty pairs")
        low, high = about["box"]
        grid = Grid(tuple(low), tuple(high))
        looks = {"sparseness": grid, "hats": None}
        _, hats = run.parts("looks", looks, self.look, "uncertainty stars")
        of_label = run.parts("labels", dict.fromkeys(LABELS, grid), self.fit_label)
        tables = [
            _label_errors(output, label, one["factors_95"])
            for label, one in zip(LABELS, of_label, strict=True)
        ]
        model_file = self.path("model") / corrections.MODEL_FILE
        errors = error_model(
            tables,
            grid,
            read_piece(_file(output, "cells"))["sparse"].to_numpy(),
            about["least_log_snr"],
            correction=hashlib.sha256(model_file.read_bytes()).hexdigest(),
            reference_error=self.settings.reference_error,
        )
        found = [asdict(Coverage(**row)) for one in of_label for row in one["coverage"]]
        for name, content in errors.files().items():
            run.write_bytes(name, content)
        run.write(CALIBRATION, pa.Table.from_pylist(found))
        given = self.manifest("evidence").rows
        rows = Rows(given.n_in, about["n_used"], 0, {**given.dropped, **about["dropped"]})
        return rows, {
            "method": about["method"],
            "reference_error": self.settings.reference_error,
            "factors_95": errors.about["factors_95"],
            "pairs_by_class": {
                label: one["n_class"] for label, one in zip(LABELS, of_label, strict=True)
            },
            "coverage": [row for row in found if row["subset"] in ("all", DENSE, SPARSE)],
            "error_factors": self.error_factors(),
            "three_cornered_hat": hats["found"],
        }

    def held_pairs(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """Keep what the other tasks need of the pairs, and of those that were held out."""
        names = ["star", "held_out", *LABELS, *DIFFERENCES, *held_out_columns(self.method)]
        more = ["target", "snr", "n_obs", "survey_ref", "snr_ref", "logg_ref", *_ERRORS]
        table = read_evidence(self.path("evidence"), names, more)
        x = DEFAULT.matrix(table)
        placed = np.asarray(np.isfinite(x).all(axis=1))
        is_held = table["held_out"].to_numpy()
        rows = np.flatnonzero(is_held)
        single = single_observations(table, rows, self.settings.min_single)
        used = np.flatnonzero(is_held & single & placed)
        held = table.take(pa.array(used))
        predicted = matrix32(held, held_out_columns(self.method))
        held_out = HeldOut(
            x[used],
            floats_or_nan(held, "snr"),
            matrix32(held, DIFFERENCES).astype(np.float64) - predicted,
            _reference_errors(held, self.error_factors()),
            _parts(held, self.settings),
        )
        kept = table.select([*LABELS, "star"]).append_column("single", pa.array(single))
        write_piece(_file(output, "pairs"), kept)
        write_piece(_file(output, "held"), _held_table(held_out, used))
        n_placed = int(np.count_nonzero(placed[rows]))
        info = corrections.load(self.path("model")).info
        return {
            "n_used": len(used),
            "dropped": {
                "not held out": table.num_rows - len(rows),
                "without all labels": len(rows) - n_placed,
                "of several observations": n_placed - len(used),
            },
            "method": info.method,
            "box": [list(info.minimum), list(info.maximum)],
            "least_log_snr": held_out.least,
        }

    def look(self, output: Output, key: str, grid: Grid | None) -> dict[str, Any]:
        """See which held-out pairs and cells are sparse, or what three surveys say."""
        return self._hats(output) if grid is None else self._sparseness(output, grid)

    def _sparseness(self, output: Output, grid: Grid) -> dict[str, Any]:
        table = read_piece(_file(output, "pairs"))
        x = DEFAULT.matrix(table)
        placed = np.asarray(np.isfinite(x).all(axis=1))
        sparseness = Sparseness.of(x[placed], grid, self.settings.sparse_fraction)
        of_pairs = np.zeros(len(x), dtype=np.bool_)
        of_pairs[placed] = sparseness.of_stars
        rows = read_piece(_file(output, "held"))["row"].to_numpy()
        write_piece(_file(output, "stars"), pa.table({"sparse": of_pairs[rows]}))
        write_piece(_file(output, "cells"), pa.table({"sparse": sparseness.of_cells}))
        return {"pairs": len(x)}

    def fit_label(self, output: Output, label: str, grid: Grid) -> dict[str, Any]:
        """Keep the errors of a label, and count how often its intervals hit."""
        held_out = _held_out(read_piece(_file(output, "held")))
        sparse = read_piece(_file(output, "cells"))["sparse"].to_numpy()
        is_sparse = read_piece(_file(output, "stars"))["sparse"].to_numpy()
        errors, checked = fit_label(held_out, label, grid, sparse)
        subsets = _subsets(held_out, is_sparse, sparse[grid.cells(held_out.features)])
        for name, columns in _TABLES.items():
            kept = pa.table({column: getattr(errors, column) for column in columns})
            write_piece(_file(output, f"{name}-{label}"), kept)
        return {
            "factors_95": errors.factors_95,
            "n_class": checked.n_class,
            "coverage": [asdict(one) for one in coverages(label, checked, subsets)],
        }

    def _hats(self, output: Output) -> dict[str, Any]:
        """Errors of the corrected target and two references on their common stars, by label."""
        surveys = {name.removeprefix("stars."): self.catalog(name) for name in self.named("stars")}
        if not self.named("reference") or len(surveys) < 2:
            return {"found": []}
        common = common_stars(self.catalog("reference"), surveys)
        table = read_piece(_file(output, "pairs"))
        table = table.filter(table["single"])
        wanted = key_numbers(pa.chunked_array([common.star_id]), 0)
        stars = table["star"].combine_chunks()
        row = pc.fill_null(pc.index_in(pa.array(wanted), stars), -1).to_numpy()
        correction = corrections.load(self.path("model"))
        found = []
        for first, second in combinations(sorted(surveys), 2):
            (ours, base), (theirs, other) = common.labels[first], common.labels[second]
            both, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
            paired = row[both] >= 0
            mine = table.take(pa.array(row[both[paired]]))
            labels = [floats(mine, label) for label in LABELS]
            target = np.stack(labels, axis=1) - correction.predict(correction.problem.matrix(mine))
            for number, label in enumerate(LABELS):
                three = [target[:, number], base[label][i[paired]], other[label][j[paired]]]
                if np.isfinite(three).all(axis=0).sum() < _MIN_COMMON:
                    continue
                names = (self.settings.target, first, second)
                corners = three_cornered_hat(three, names, self.settings.seed)
                found += [{"label": label, **corner} for corner in corners]
        return {"found": found}


def read_calibration(directory: Path) -> list[dict[str, Any]]:
    """Read the rows of ``calibration.parquet``, `intervals.Coverage` as mappings, in its order.

    Raises
    ------
    PartitionError
        The file is missing or damaged.
    """
    path = directory / CALIBRATION
    Manifest.checked(directory)
    with partition_errors(path):
        return list(pq.read_table(path).to_pylist())


def _file(output: Output, name: str) -> Path:
    return output.work / "pieces" / f"{name}.arrow"


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


def _parts(held: pa.Table, settings: UncertaintySettings) -> NDArray[np.int8]:
    """Parts of the held-out pairs; those that share a star are in one, whatever their fold."""
    # Folds of the pairs come from the same numbers: another state makes the parts independent.
    number = mixed(held["star"].to_numpy() + np.uint64(settings.seed + 1))
    if "target" not in held.column_names:
        return fold_of(number, settings.n_parts)
    target = held["target"].to_numpy()
    order = np.argsort(target, kind="stable")
    same = np.flatnonzero(target[order[1:]] == target[order[:-1]])
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

"""Stage uncertainty: errors of corrected labels, calibrated on held-out pairs, and their hit rates.

One task looks where pairs are sparse, one compares three surveys, and one fits each label. Each
reads the evidence by itself: none is left to the process that asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
from sos_dask.evidence.error_tables import error_grid, require_default
from sos_dask.evidence.intervals import (
    DENSE,
    SPARSE,
    TABLES,
    HeldOut,
    LabelErrors,
    error_model,
    fit_label,
    hit_rates,
    least_log_snr,
)
from sos_dask.evidence.three_cornered_hat import three_cornered_hat
from sos_dask.problem import DEFAULT, TEFF_UNIT_K
from sos_dask.schema import LABELS
from sos_dask.settings import Seed, Settings
from sos_dask.stages.base import Made, Role, Run, piece, read_piece, write_piece
from sos_dask.stages.evidence import (
    DIFFERENCES,
    OfModel,
    held_out_columns,
    read_evidence,
    require_models_of,
    require_rows,
    single_observations,
)
from sos_dask.stages.reference import common_stars
from sos_dask.stars.group import fold_of, smallest_of_joined
from sos_dask.stars.repeats import GIANT_LOGG, normalisation
from sos_dask.stats.numbers import find_sparse
from sos_dask.storage.artifact import Output, partition_errors
from sos_dask.storage.manifest import Manifest, Rows

CALIBRATION = "calibration.parquet"
_MIN_COMMON = 30
# Measured with boosted trees, 160 MiB more than with a polynomial, and a tenth more.
_PROCESS_BYTES, _BYTES_A_PAIR = 450 << 20, 250
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
    target: str = Field("target", description="Name of the target survey.")
    seed: Seed = Field(0, description="Other seeds give other parts.")


class Uncertainty(OfModel[UncertaintySettings]):
    """Model the errors of corrected labels and check them on held-out pairs.

    Writes the error model (``error.json``, ``error.npy``) and ``calibration.parquet``: hit rates
    of the 68 % and 95 % intervals by label and subset. The summary has hit rates (all, dense,
    sparse), factors of quoted errors by survey, and errors of three surveys by the three-cornered
    hat.
    """

    name = "uncertainty"
    version = 6
    Settings = UncertaintySettings
    roles = (
        Role("evidence", "Pairs with the predictions of the model.", "output"),
        Role("model", "Trained correction.", "output"),
        Role(
            "target_stars",
            "Stars of the target: how far its quoted errors are wrong.",
            optional=True,
        ),
        Role("reference", "United reference.", optional=True),
        Role("stars", "Stars of the surveys that it was made from.", optional=True, many=True),
    )

    @property
    def method(self) -> str:
        """Method of the model."""
        return self.manifest("model").recipe.stage.removeprefix("train-")

    def check(self) -> None:
        """Refuse a correction of other labels or inputs than errors can be modelled of."""
        require_default(corrections.load(self.path("model")).problem)

    def error_factors(self) -> dict[str, list[dict[str, Any]]]:
        """Factors of quoted errors by survey; none where a survey has no repeats."""
        names = {self.settings.target: "target_stars"} if self.named("target_stars") else {}
        names |= {name.removeprefix("stars."): name for name in self.named("stars")}
        manifests = {survey: self.catalog(name).manifest for survey, name in names.items()}
        return {
            survey: list(manifest.summary.get("error_factors", []))
            for survey, manifest in manifests.items()
            if manifest is not None
        }

    def make(self, run: Run) -> Made:
        """See where the pairs are sparse, then fit each label."""
        require_models_of(self)
        require_rows(run, self.path("evidence"), _PROCESS_BYTES, _BYTES_A_PAIR)
        looks = dict.fromkeys(("sparse", "hats"))
        about, hats = run.parts("looks", looks, self.look, "uncertainty pairs")
        box = about["box"]
        fitted = run.parts("labels", dict.fromkeys(LABELS, box), self.fit_label)
        errors = []
        for label, one in zip(LABELS, fitted, strict=True):
            table = read_piece(piece(run.output, f"errors-{label}"))
            columns = (table[name].combine_chunks().values.to_numpy() for name in TABLES)
            errors.append(LabelErrors(tuple(columns), one["factors_95"]))
        model_file = self.path("model") / corrections.MODEL_FILE
        model = error_model(
            errors,
            error_grid(*box),
            read_piece(piece(run.output, "sparse-cells"))["sparse"].to_numpy(),
            about["least_log_snr"],
            correction=hashlib.sha256(model_file.read_bytes()).hexdigest(),
            reference_error=self.settings.reference_error,
        )
        for name, content in model.files().items():
            run.write_bytes(name, content)
        found = [row for one in fitted for row in one["hit_rates"]]
        run.write(CALIBRATION, pa.Table.from_pylist(found))
        given = self.manifest("evidence").rows
        rows = Rows(given.n_in, about["n_used"], 0, {**given.dropped, **about["dropped"]})
        return rows, {
            "method": self.method,
            "reference_error": self.settings.reference_error,
            "factors_95": model.about["factors_95"],
            "pairs_by_class": dict(zip(LABELS, (one["n_class"] for one in fitted), strict=True)),
            "hit_rates": [row for row in found if row["subset"] in ("all", DENSE, SPARSE)],
            "error_factors": self.error_factors(),
            "three_cornered_hat": hats["found"],
        }

    def look(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """See which held-out pairs and cells are sparse, or what three surveys say."""
        return self._hats() if key == "hats" else self._sparse(output)

    def _read(self, *more: str) -> tuple[pa.Table, BoolArray]:
        """Columns of the evidence, and whether a pair has all labels."""
        names = dict.fromkeys([*LABELS, "star", "held_out", *more])
        wanted = ["target", "snr", "n_obs", "survey_ref", "snr_ref", "logg_ref", *_ERRORS]
        table = read_evidence(self.path("evidence"), list(names), wanted)
        return table, np.asarray(np.isfinite(DEFAULT.matrix(table)).all(axis=1))

    def _chosen(self, table: pa.Table, placed: BoolArray) -> NDArray[np.int64]:
        """Held-out pairs that intervals are made from."""
        held = table["held_out"].to_numpy()
        single = single_observations(table, np.flatnonzero(held), self.settings.min_single)
        return np.flatnonzero(held & single & placed)

    def _sparse(self, output: Output) -> dict[str, Any]:
        table, placed = self._read()
        x, used = DEFAULT.matrix(table), self._chosen(table, placed)
        info = corrections.load(self.path("model")).info
        box = [list(info.minimum), list(info.maximum)]
        of_pairs = np.zeros(len(x), dtype=np.bool_)
        centers = error_grid(*box).centers()
        of_pairs[placed], cells = find_sparse(x[placed], centers, self.settings.sparse_fraction)
        write_piece(piece(output, "sparse-cells"), pa.table({"sparse": cells}))
        write_piece(piece(output, "sparse-pairs"), pa.table({"sparse": of_pairs[used]}))
        held = table["held_out"].to_numpy()
        n_held, n_placed = (int(np.count_nonzero(some)) for some in (held, held & placed))
        snr = floats_or_nan(table.take(pa.array(used)), "snr")
        return {
            "n_used": len(used),
            "dropped": {
                "not held out": len(x) - n_held,
                "without all labels": n_held - n_placed,
                "of several observations": n_placed - len(used),
            },
            "box": box,
            "least_log_snr": least_log_snr(snr),
        }

    def fit_label(self, output: Output, label: str, box: list[list[float]]) -> dict[str, Any]:
        """Keep the errors of a label, and count how often its intervals hit."""
        predictions = held_out_columns(self.method)
        table, placed = self._read(*DIFFERENCES, *predictions)
        held = table.take(pa.array(self._chosen(table, placed)))
        held_out = HeldOut(
            DEFAULT.matrix(held),
            floats_or_nan(held, "snr"),
            matrix32(held, DIFFERENCES).astype(np.float64) - matrix32(held, predictions),
            _reference_errors(held, self.error_factors()),
            _parts(held, self.settings),
        )
        cells = read_piece(piece(output, "sparse-cells"))["sparse"].to_numpy()
        is_sparse = read_piece(piece(output, "sparse-pairs"))["sparse"].to_numpy()
        grid = error_grid(*box)
        errors, checked = fit_label(held_out, label, grid, cells)
        tables = {name: [table] for name, table in zip(TABLES, errors.tables, strict=True)}
        write_piece(piece(output, f"errors-{label}"), pa.table(tables))
        subsets = _subsets(held_out, is_sparse, cells[grid.cells(held_out.features)])
        return {
            "factors_95": errors.factors_95,
            "n_class": checked.n_class,
            "hit_rates": [asdict(one) for one in hit_rates(label, checked, subsets)],
        }

    def _hats(self) -> dict[str, Any]:
        """Errors of the corrected target and two references on their common stars, by label."""
        stars = {name.removeprefix("stars."): self.catalog(name) for name in self.named("stars")}
        if not self.named("reference") or len(stars) < 2:
            return {"found": []}
        table, _ = self._read()
        held = np.flatnonzero(table["held_out"].to_numpy())
        single = single_observations(table, held, self.settings.min_single)
        table = table.filter(pa.array(single))
        correction = corrections.load(self.path("model"))
        found = []
        for first, second, one, other in common_stars(self.catalog("reference"), stars):
            wanted = pa.array(key_numbers(one["united"], 0))
            row = pc.index_in(wanted, table["star"].combine_chunks())
            one, other = (both.filter(row.is_valid()) for both in (one, other))
            mine = table.take(row.drop_null())
            target = np.stack(
                [floats(mine, label) for label in LABELS], axis=1
            ) - correction.predict(DEFAULT.matrix(mine))
            for number, label in enumerate(LABELS):
                three = [target[:, number], floats(one, label), floats(other, label)]
                if np.isfinite(three).all(axis=0).sum() >= _MIN_COMMON:
                    names = (self.settings.target, first, second)
                    corners = three_cornered_hat(three, names, self.settings.seed)
                    found += [{"label": label, **corner} for corner in corners]
        return {"found": found}


def read_calibration(directory: Path) -> list[dict[str, Any]]:
    """Read the rows of ``calibration.parquet``, `intervals.HitRate` as mappings, in its order.

    Raises
    ------
    PartitionError
        The file is missing or damaged.
    """
    path = directory / CALIBRATION
    Manifest.checked(directory)
    with partition_errors(path):
        return list(pq.read_table(path).to_pylist())


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
    """Held-out pairs whose hit rate is looked at separately."""
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

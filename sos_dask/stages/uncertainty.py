"""Stage uncertainty: errors of corrected labels, calibrated on held-out pairs, and their hit rates.

One task looks where pairs are sparse, one compares three surveys, and one fits each label. Each
reads the evidence by itself: none is left to the process that asks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import (
    BoolArray,
    FloatArray,
    floats,
    floats_or_nan,
    key_numbers,
    matrix32,
    mixed,
)
from sos_dask.errors import ModelError
from sos_dask.evidence import covariance, intervals
from sos_dask.evidence.beyond import giants
from sos_dask.evidence.figures import edge_subsets
from sos_dask.evidence.trends import three_cornered_hat
from sos_dask.schema import LABELS
from sos_dask.settings import Seed, Settings
from sos_dask.stages.base import Made, Role, Run
from sos_dask.stages.evidence import OfModel, held_out_columns, of_surveys, single_observations
from sos_dask.stars.group import fold_of, smallest_of_joined
from sos_dask.stars.repeats import normalisation
from sos_dask.stats.numbers import ALL, DENSE, GIANT_LOGG, SPARSE, find_sparse
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Rows, sha256_of_file

CALIBRATION, CORRELATIONS = "calibration.parquet", "correlations.parquet"
_CORRELATIONS = pa.schema([
    *((name, pa.string()) for name in ("kind", "snr", "label", "other")),
    ("n", pa.int64()), ("correlation", pa.float64()), ("error", pa.float64()),
])  # fmt: skip
_MIN_COMMON = 30


class UncertaintySettings(Settings):
    """How the errors of corrected labels are made."""

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
    of the 68 % and 95 % intervals by label and subset, and ``correlations.parquet``: how the errors
    of two corrected labels of a row go together (`evidence.covariance`). The summary has hit rates
    (all, dense, sparse), the correlations, factors of quoted errors by survey, and errors of three
    surveys by the three-cornered hat.
    """

    name = "uncertainty"
    version = 12
    Settings = UncertaintySettings
    roles = (
        Role("evidence", "Pairs with the predictions of the model.", "output"),
        Role("model", "Trained correction.", "output"),
        Role("target_stars", "Stars of the target, for its quoted errors.", optional=True),
        Role("reference", "United reference.", optional=True),
        Role("stars", "Stars of the surveys that it was made from.", optional=True, many=True),
    )
    # Measured with boosted trees, 160 MiB more than with a polynomial, and a tenth more.
    pairs_memory = (450, 250)
    tables = (("hit_rates", CALIBRATION), ("correlations", CORRELATIONS))

    def check(self) -> None:
        """Refuse a correction of other labels or inputs than the evidence."""
        theirs = corrections.load(self.files("model")).problem
        if self.first is None and theirs != self.problem:
            raise ModelError(
                f"the evidence is of {self.problem.words}, the correction is of {theirs.words}",
                "Give the evidence that was made with this correction.",
            )

    def measure(self, run: Run) -> Made:
        """See where the pairs are sparse, then fit each label."""
        looks = dict.fromkeys(("sparse", "hats"))
        about, hats = run.parts("looks", looks, self.look, "uncertainty pairs")
        box, labels = about["box"], self.problem.names
        fitted = run.parts("labels", dict.fromkeys(labels, box), self.fit_label)
        tables = []
        for label in labels:
            table = run.output.read_piece(f"errors-{label}")
            columns = (table[name].combine_chunks() for name in intervals.TABLES)
            tables.append([column.values.to_numpy() for column in columns])
        model = intervals.error_model(
            tables,
            [one["factors"] for one in fitted],
            intervals.error_grid(*box),
            run.output.read_piece("cells")["sparse"].to_numpy(),
            about["least_log_snr"],
            problem=self.problem,
            correction=sha256_of_file(self.files("model") / corrections.MODEL_FILE),
        )
        for name, content in model.files().items():
            run.write_bytes(name, content)
        found = [row for one in fitted for row in one["hit_rates"]]
        run.write(CALIBRATION, pa.Table.from_pylist(found))
        (together,) = run.parts("together", {"together": None}, self.correlate)
        run.write(CORRELATIONS, pa.Table.from_pylist(together["found"], _CORRELATIONS))
        given = self.manifest("evidence").rows
        rows = Rows(given.n_in, about["n_used"], 0, {**given.dropped, **about["dropped"]})
        return rows, {
            "method": self.manifest("model").summary["method"],
            "factors_95": model.about["factors_95"],
            "pairs_by_class": dict(zip(labels, (one["n_class"] for one in fitted), strict=True)),
            "hit_rates": [row for row in found if row["subset"] in (ALL, DENSE, SPARSE)],
            "correlations": together["found"],
            "error_factors": self._error_factors(),
            "three_cornered_hat": hats["found"],
        }

    def _error_factors(self) -> dict[str, list[dict[str, Any]]]:
        """Factors of quoted errors by survey; none where a survey has no repeats."""
        given = [(self.settings.target, name) for name in self.named("target_stars")]
        given += [(name, f"stars.{name}") for name in self.many("stars")]
        found = {}
        for survey, name in given:
            if (manifest := self.catalog(name).manifest) is not None:
                found[survey] = list(manifest.summary.get("error_factors", []))
        return found

    def look(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """See which held-out pairs and cells are sparse, or what three surveys say."""
        return self._hats() if key == "hats" else self._sparse(output)

    def _pairs(self) -> tuple[pa.Table, BoolArray]:
        """Pairs of the evidence, and those that say the error of one observation."""
        names = list(dict.fromkeys([*self.problem.names, *self.problem.columns]))
        names += [*(label.diff for label in self.problem.labels), *self._predictions]
        more = ["target", "snr", "n_obs", "survey_ref", "snr_ref", "logg_ref", *LABELS]
        table = self.read([*names, "star", "held_out"], [*more, *self._stated])
        return table, single_observations(table, self.settings.min_single)

    @property
    def _predictions(self) -> tuple[str, ...]:
        return held_out_columns(self.manifest("model").summary["method"], self.problem.names)

    @property
    def _stated(self) -> tuple[str, ...]:
        """Columns of the errors that the reference states."""
        return tuple(f"{label.error}_ref" for label in self.problem.labels)

    def _sparse(self, output: Output) -> dict[str, Any]:
        """Keep the pairs that intervals are made from, and the cells where pairs are sparse."""
        table, single = self._pairs()
        problem, held = self.problem, table["held_out"].to_numpy()
        x = problem.star_matrix(table)
        placed, sparse = np.isfinite(x).all(axis=1), np.zeros(len(x), dtype=np.bool_)
        info = corrections.load(self.files("model")).info
        box = [
            [corner[place] for place in problem.star_places]
            for corner in (info.minimum, info.maximum)
        ]
        centers = intervals.error_grid(*box).centers()
        sparse[placed], cells = find_sparse(x[placed], centers, self.settings.sparse_fraction)
        used = table.append_column("sparse", pa.array(sparse)).filter(
            pa.array(held & placed & single)
        )
        output.write_piece("used", used)
        output.write_piece("cells", pa.table({"sparse": cells}))
        n_held, n_placed = (int(np.count_nonzero(some)) for some in (held, held & placed))
        return {
            "n_used": len(used),
            "dropped": {
                "not held out": len(x) - n_held,
                "without all labels": n_held - n_placed,
                "of several observations": n_placed - len(used),
            },
            "box": box,
            "least_log_snr": intervals.least_log_snr(floats_or_nan(used, "snr")),
        }

    def fit_label(self, output: Output, label: str, box: list[list[float]]) -> dict[str, Any]:
        """Keep the errors of a label, and count how often its intervals hit."""
        pairs, grid, problem = output.read_piece("used"), intervals.error_grid(*box), self.problem
        cells = output.read_piece("cells")["sparse"].to_numpy()
        stated = np.stack([floats_or_nan(pairs, name) for name in self._stated], axis=1)
        logg, snr = (floats_or_nan(pairs, name) for name in ("logg_ref", "snr_ref"))
        factors = self._error_factors()
        for survey, mine in of_surveys(pairs).items():
            for one, column in zip(self.problem.names, stated.T, strict=True):
                of_survey = factors.get(survey, ())
                column[mine] *= normalisation(of_survey, one, logg[mine], snr[mine])
        # Folds of the pairs come from the same numbers: another state makes the parts independent.
        number = mixed(pairs["star"].to_numpy() + np.uint64(self.settings.seed + 1))
        if "target" in pairs.column_names:
            links = (np.empty(0, dtype=np.int64),) * 2
            number = smallest_of_joined(number, pairs["target"].to_numpy(), links)
        held_out = intervals.HeldOut(
            problem.star_matrix(pairs),
            floats_or_nan(pairs, "snr"),
            self._residuals(pairs),
            stated,
            fold_of(number, self.settings.n_parts),
            problem,
        )
        errors = intervals.fit_label(held_out, label, grid, cells)
        tables = zip(intervals.TABLES, ([one] for one in errors.tables), strict=True)
        output.write_piece(f"errors-{label}", pa.table(dict(tables)))
        in_sparse_cell = cells[grid.cells(held_out.features)]
        subsets = _subsets(pairs, in_sparse_cell)
        return {
            "factors": errors.factors,
            "n_class": errors.n_class,
            "hit_rates": intervals.hit_rates(label, errors, subsets),
        }

    def _residuals(self, pairs: pa.Table) -> FloatArray:
        """Target - reference less what a model predicts that has not seen the star, (n, l)."""
        return self.problem.differences(pairs).astype(np.float64) - matrix32(
            pairs, self._predictions
        )

    def correlate(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """Correlate the errors of the labels, by the error model that is written."""
        pairs, problem = output.read_piece("used"), self.problem
        # Where stars are few, many pairs are wrong.
        pairs = pairs.filter(pc.invert(pairs["sparse"]))
        x, snr = problem.star_matrix(pairs), floats_or_nan(pairs, "snr")
        errors = intervals.load_errors(output.directory, problem)
        own, width = errors.half_widths(x, snr)[0], errors.half_width(x, snr)
        places = covariance.groups(giants(problem, x), snr)
        given = self._residuals(pairs), own, width, problem.names, places
        return {"found": covariance.correlations(*given)}

    def _hats(self) -> dict[str, Any]:
        """Errors of the corrected target and two references on their common stars, by label."""
        table, single = self._pairs()
        table = table.filter(pa.array(single))
        correction = corrections.load(self.files("model"))
        found = []
        for first, second, one, other in self.common_stars():
            wanted = pa.array(key_numbers(one["united"], 0))
            row = pc.index_in(wanted, table["star"].combine_chunks())
            one, other = (both.filter(row.is_valid()) for both in (one, other))
            mine = table.take(row.drop_null())
            predicted = correction.predict(self.problem.matrix(mine))
            for label, delta in zip(self.problem.names, predicted.T, strict=True):
                if not {label} <= set(LABELS):
                    continue  # of other labels the common stars are not known
                three = [floats(mine, label) - delta, floats(one, label), floats(other, label)]
                if np.isfinite(three).all(axis=0).sum() >= _MIN_COMMON:
                    names = (self.settings.target, first, second)
                    corners = three_cornered_hat(three, names, self.settings.seed)
                    found += [{"label": label, **corner} for corner in corners]
        return {"found": found}


def _subsets(pairs: pa.Table, in_sparse_cell: BoolArray) -> dict[str, Any]:
    """Held-out pairs whose hit rate is looked at separately."""
    labels, snr = {one: floats_or_nan(pairs, one) for one in LABELS}, floats_or_nan(pairs, "snr")
    is_sparse = pairs["sparse"].to_numpy()
    found = {
        ALL: np.ones(len(is_sparse), dtype=np.bool_),
        DENSE: ~is_sparse,
        SPARSE: is_sparse,
        "dense cells": ~in_sparse_cell,
        "sparse cells": in_sparse_cell,
        "giants": labels["logg"] < GIANT_LOGG,
        "dwarfs": labels["logg"] >= GIANT_LOGG,
    }
    found |= edge_subsets(labels)
    known = np.isfinite(snr)
    if known.any():
        low, high = np.quantile(snr[known], [1 / 3, 2 / 3])
        found["low snr"], found["high snr"] = snr < low, snr >= high
    return found

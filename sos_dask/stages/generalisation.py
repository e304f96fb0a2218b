"""Stage generalisation: every method trained without a region, a reference or the sparse pairs.

A task is one fit: a method without one group of pairs. It runs in one process, so that all fits
run beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import floats_or_nan
from sos_dask.errors import ModelError
from sos_dask.evidence.figures import (
    DENSITY,
    NONE,
    RANDOM,
    REFERENCE,
    REGION,
    left_out_groups,
    region_groups,
)
from sos_dask.problem import Problem
from sos_dask.settings import Settings
from sos_dask.stages.base import Made, Role, Run, Stage
from sos_dask.stages.evidence import problem_of, read_evidence
from sos_dask.stages.train import VERSION as TRAIN_VERSION
from sos_dask.stats.numbers import DENSE, SPARSE, scatter
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Recipe, Rows

TABLE = "generalisation.parquet"
Fit = tuple[str, str, str]  # method, split, group
_FIGURES = ("n", "median", "mad")
_KINDS = {"n_train": pa.int64(), "n": pa.int64(), "median": pa.float64(), "mad": pa.float64()}
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("split", "group", "method", "label")),
        *_KINDS.items(),
        *((f"{name}_random", _KINDS[name]) for name in _FIGURES),
    ]
)


class GeneralisationSettings(Settings):
    """Methods trained without one region after the other."""

    methods: Mapping[str, Mapping[str, Any]] = Field(
        {}, description="Hyper-parameters of each method"
    )
    max_pairs: int = Field(
        20_000, ge=100, description="Of more pairs, those of some stars are used: about as many"
    )
    min_pairs: int = Field(
        200, ge=10, description="Smallest group that is left out, and smallest rest that trains"
    )


class Generalisation(Stage[GeneralisationSettings]):
    """Train every method without one group of pairs after the other, and predict that group.

    Groups are the sparse pairs, cells of the Kiel diagram, and the pairs of each reference survey.
    Table: of each split, group, method and label the pairs trained on and left out, and median and
    scatter (1.4826 MAD) of the left-out pairs, corrected by a model that never saw their group
    (``median``, ``mad``), and by one that was trained on a random four fifths of all pairs
    (``median_random``, ``mad_random``, of those pairs of the group that it was not trained on,
    ``n_random``). Method ``none`` is the bare difference. Summary: groups left out, fits that were
    refused with the reason.
    """

    name = "generalisation"
    version = 4
    Settings = GeneralisationSettings
    roles = (Role("evidence", "Pairs.", "output"),)

    @classmethod
    def recipe(cls, settings: GeneralisationSettings, fingerprints: Mapping[str, str]) -> Recipe:
        """Recipe with the complete parameters of the methods, and what training makes of them."""
        methods = {
            name: corrections.check_params(name, params)
            for name, params in settings.methods.items()
        }
        params = {"settings": settings.but(methods=methods).as_json, "train_version": TRAIN_VERSION}
        return Recipe(cls.name, cls.version, params, dict(fingerprints))

    def make(self, run: Run) -> Made:
        """Fit every method without every group, then put the figures together."""
        given = self.manifest("evidence").rows
        table = self._pairs()
        splits = {name: table[name].to_pylist() for name in (DENSITY, REGION, REFERENCE)}
        groups = left_out_groups(splits, self.settings.min_pairs)
        if not groups:
            raise ModelError(
                f"{self.path('evidence')}: no group of {table.num_rows} pairs can be left out of "
                f"training: each and its rest need {self.settings.min_pairs}",
                "Match more stars, or lower [generalisation] min_pairs.",
            )
        fits: dict[str, Fit] = {}
        for method in self.settings.methods:
            for split, group in [(RANDOM, ""), *groups]:
                fits[f"{method}-{split}-{group}".replace("/", " per ")] = (method, split, group)
        done = run.parts("fits", fits, partial(self.fit, groups=groups))
        bare = problem_of(self.path("evidence")).differences(table)
        rows = {
            (NONE, *place): row | {f"{name}_random": row[name] for name in _FIGURES}
            for place, row in self._figures(table, bare, groups).items()
        }
        for (method, split, _), one in zip(fits.values(), done, strict=True):
            for *place, found in one["figures"]:
                end = "_random" if split == RANDOM else ""
                row = rows.setdefault((method, *place), {})
                row |= {f"{name}{end}" if name in _FIGURES else name: found[name] for name in found}
        keys = ("method", "split", "group", "label")
        table_rows = [{**dict(zip(keys, key, strict=True)), **row} for key, row in rows.items()]
        run.write(TABLE, pa.Table.from_pylist(table_rows, _SCHEMA))
        refused = {key: one["refused"] for key, one in zip(fits, done, strict=True)}
        dropped = {**given.dropped, "of other stars": given.n_out - table.num_rows}
        return Rows(given.n_in, table.num_rows, 0, dropped), {
            "groups": [list(group) for group in groups],
            "refused": {key: why for key, why in refused.items() if why},
        }

    def _pairs(self) -> pa.Table:
        """Pairs, of very many those of some stars, with their groups."""
        problem = problem_of(self.path("evidence"))
        kept = dict.fromkeys([*problem.columns, *(one.diff for one in problem.labels), "fold"])
        wanted = [*kept, "star", "sparse"]
        table = read_evidence(self.path("evidence"), wanted, ["survey_ref", "teff", "logg"])
        if table.num_rows > self.settings.max_pairs:
            star, n = table["star"].to_numpy(), self.settings.max_pairs
            table = table.filter(pa.array(star < np.partition(star, n)[n]))
        known = np.isfinite(problem.matrix(table)).all(axis=1)
        sparse = np.where(known, np.where(table["sparse"].to_numpy(), SPARSE, DENSE), "")
        survey = pa.array([""] * table.num_rows, pa.string())
        if "survey_ref" in table.column_names:
            survey = table["survey_ref"].fill_null("").cast(pa.string())
        region = region_groups(*(floats_or_nan(table, name) for name in ("teff", "logg")))
        for name, values in ((DENSITY, sparse), (REGION, region), (REFERENCE, survey)):
            table = table.append_column(name, pa.array(values, pa.string()))
        return table.combine_chunks()

    def fit(
        self, output: Output, key: str, item: Fit, groups: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        """Fit without a group and measure it; without random pairs, measure every group."""
        method, split, group = item
        problem, table = problem_of(self.path("evidence")), self._pairs()
        fold = _folds(table, split, group)
        x, differences = problem.matrix(table), problem.differences(table)
        batch = corrections.Batch(x, differences, fold, np.ones(len(x), np.float32))
        params = corrections.check_params(method, self.settings.methods[method])
        predicted, refused = np.full_like(differences, np.nan), ""
        try:
            source = _Source(batch, problem)
            fitted = corrections.fit(method, source, train_folds=[0], params=params)
            predicted[fold == 1] = fitted.predict(x[fold == 1])
        except ModelError as error:
            refused = error.message
        left = differences.astype(np.float64) - predicted
        found = self._figures(table, left, groups if split == RANDOM else [(split, group)])
        return {"refused": refused, "figures": [[*key, row] for key, row in found.items()]}

    def _figures(
        self, table: pa.Table, left: NDArray[np.floating], groups: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Figures of what is left of the differences in some groups, by split, group and label."""
        found = {}
        for split, group in groups:
            fold = _folds(table, split, group)
            for label, values in zip(problem_of(self.path("evidence")).names, left.T, strict=True):
                of_group = values[(fold == 1) & np.isfinite(values)].astype(np.float64)
                row: dict[str, Any] = {"n_train": int(np.count_nonzero(fold == 0))}
                row |= {"n": len(of_group), "median": None, "mad": None}
                if len(of_group):
                    row |= {"median": float(np.median(of_group)), "mad": scatter(of_group)}
                found[split, group, label] = row
        return found


@dataclass(frozen=True)
class _Source:
    """All pairs as one batch; fold 1 is left out."""

    batch: corrections.Batch
    problem: Problem
    n_batches = 1

    def load(self, index: int) -> corrections.Batch:
        return self.batch


def _folds(table: pa.Table, split: str, group: str) -> NDArray[np.int8]:
    """Train (0), left out (1), or neither (2): pairs that a split gives to no group."""
    if split == RANDOM:
        return np.asarray(table["fold"].to_numpy() == 0, dtype=np.int8)
    names = table[split].to_numpy()
    return np.where(names == "", 2, names == group).astype(np.int8)

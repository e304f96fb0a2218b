"""Stage generalisation: every method trained without a region, a reference or the sparse pairs.

A task is one fit: a method without one group of pairs. It runs in one process, so that all fits
run beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import floats32, floats_or_nan
from sos_dask.errors import ModelError
from sos_dask.evidence.figures import NONE
from sos_dask.evidence.left_out import (
    DENSE,
    DENSITY,
    RANDOM,
    REFERENCE,
    REGION,
    SPARSE,
    left_out_groups,
    region_groups,
)
from sos_dask.problem import Problem
from sos_dask.settings import Settings
from sos_dask.stages.base import Made, Role, Run, Stage
from sos_dask.stages.evidence import problem_of, read_evidence
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stages.train import VERSION as TRAIN_VERSION
from sos_dask.stats.numbers import scatter
from sos_dask.storage.artifact import Output, Recipe, Rows

TABLE = "generalisation.parquet"
Fit = tuple[str, str, str]  # method, split, group


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
        """Fit every method without every group, then compare."""
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
        write_piece(_pairs_file(run.output), table)
        fits: dict[str, Fit] = {}
        for method in self.settings.methods:
            for split, group in [(RANDOM, ""), *groups]:
                fits[f"{method}-{split}-{group}".replace("/", " per ")] = (method, split, group)
        done = run.parts("fits", fits, self.fit)
        run.write(TABLE, self._figures(run.output, table, fits, groups))
        refused = {key: one["refused"] for key, one in zip(fits, done, strict=True)}
        dropped = {**given.dropped, "of other stars": given.n_out - table.num_rows}
        rows = Rows(given.n_in, table.num_rows, 0, dropped)
        return rows, {
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
        sparse = np.where(table["sparse"].to_numpy(), SPARSE, DENSE)
        known = np.isfinite(problem.matrix(table)).all(axis=1)
        survey = pa.array([""] * table.num_rows, pa.string())
        if "survey_ref" in table.column_names:
            survey = table["survey_ref"].fill_null("").cast(pa.string())
        teff, logg = (floats_or_nan(table, name) for name in ("teff", "logg"))
        region = region_groups(teff, logg)
        found = table.select(list(kept))
        found = found.append_column(DENSITY, pa.array(np.where(known, sparse, "")))
        found = found.append_column(REGION, pa.array(region, pa.string()))
        return found.append_column(REFERENCE, survey).combine_chunks()

    def fit(self, output: Output, key: str, item: Fit) -> dict[str, Any]:
        """Fit without the group, and keep the predictions of all pairs that were left out."""
        method, split, group = item
        table = read_piece(_pairs_file(output))
        fold = _folds(table, split, group)
        problem = problem_of(self.path("evidence"))
        x, differences = problem.matrix(table), problem.differences(table)
        source = _Source(
            corrections.Batch(x, differences, fold, np.ones(len(x), np.float32)), problem
        )
        params = corrections.check_params(method, self.settings.methods[method])
        predicted, refused = np.full_like(differences, np.nan), ""
        try:
            fitted = corrections.fit(method, source, train_folds=[0], params=params)
            predicted[fold == 1] = fitted.predict(x[fold == 1])
        except ModelError as error:
            refused = error.message
        write_piece(_piece(output, key), pa.table(list(predicted.T.copy()), problem.names))
        return {"refused": refused}

    def _figures(
        self,
        output: Output,
        table: pa.Table,
        fits: Mapping[str, Fit],
        groups: list[tuple[str, str]],
    ) -> pa.Table:
        labels = problem_of(self.path("evidence")).labels
        predicted = {fit: read_piece(_piece(output, key)) for key, fit in fits.items()}
        rows = []
        for method in (NONE, *self.settings.methods):
            for split, group in groups:
                fold = _folds(table, split, group)
                for label in labels:
                    row: dict[str, Any] = {"split": split, "group": group, "method": method}
                    row |= {"label": label.name, "n_train": int(np.count_nonzero(fold == 0))}
                    bare = floats32(table, label.diff).astype(np.float64)
                    for fit, end in (
                        ((method, split, group), ""),
                        ((method, RANDOM, ""), "_random"),
                    ):
                        left = (
                            bare if method == NONE else bare - floats32(predicted[fit], label.name)
                        )
                        left = left[(fold == 1) & np.isfinite(left)]
                        row[f"n{end}"] = len(left)
                        row[f"median{end}"] = float(np.median(left)) if len(left) else None
                        row[f"mad{end}"] = scatter(left) if len(left) else None
                    rows.append(row)
        return pa.Table.from_pylist(rows)


@dataclass(frozen=True)
class _Source:
    """All pairs as one batch; fold 1 is left out."""

    batch: corrections.Batch
    problem: Problem

    @property
    def n_batches(self) -> int:
        return 1

    def load(self, index: int) -> corrections.Batch:
        return self.batch


def _folds(table: pa.Table, split: str, group: str) -> NDArray[np.int8]:
    """Train (0), left out (1), or neither (2): pairs that a split gives to no group."""
    if split == RANDOM:
        return np.asarray(table["fold"].to_numpy() == 0, dtype=np.int8)
    is_group = pc.equal(table[split], group).to_numpy(zero_copy_only=False)
    in_none = pc.equal(table[split], "").to_numpy(zero_copy_only=False)
    return np.where(in_none, 2, is_group).astype(np.int8)


def _pairs_file(output: Output) -> Path:
    return output.work / "pairs.arrow"


def _piece(output: Output, key: str) -> Path:
    return output.work / "predictions" / f"{key}.arrow"

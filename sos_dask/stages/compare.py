"""Stage compare: every trained method on the same pairs, and the one that corrects the catalog.

A task is a method (what it does on cells of label space), then a label (figures of all methods on
the same resamples). It reads the columns of the evidence that it needs: 150 bytes a pair, twice
that while a label is ranked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import floats32, matrix32
from sos_dask.errors import ModelError
from sos_dask.evidence.figures import (
    BALANCED,
    FIGURE_SCHEMA,
    NONE,
    TEST,
    TOLERANCE,
    TRAIN,
    Sample,
    Scored,
    check_rule,
    choose,
    figures,
)
from sos_dask.evidence.smoothness import (
    ARTIFACT_SCHEMA,
    MIN_CELLS,
    OUTSIDE_SCHEMA,
    Cells,
    artifact_rows,
    artifacts,
)
from sos_dask.evidence.trends import AXES
from sos_dask.schema import LABELS
from sos_dask.settings import Seed, Settings
from sos_dask.stages.base import Made, Role, Run, Stage
from sos_dask.stages.evidence import (
    columns_of,
    fitted_columns,
    held_out_columns,
    problem_of,
    read_evidence,
    require_models_of,
    require_rows,
)
from sos_dask.stats.bootstrap import draw
from sos_dask.stats.numbers import Axis
from sos_dask.storage.artifact import Output, partition_errors
from sos_dask.storage.manifest import Manifest

COMPARISON, ARTIFACTS, OUTSIDE = "comparison.parquet", "artifacts.parquet", "outside.parquet"
_PROCESS_BYTES, _BYTES_A_PAIR = 300 << 20, 400
_SAMPLES = {TEST: ("held_out", held_out_columns), TRAIN: ("trained", fitted_columns)}


class CompareSettings(Settings):
    """How the methods are compared, and by which rule one of them corrects the catalog."""

    rule: str = Field(BALANCED, description="balanced, scatter or the name of a method")
    n_bootstrap: int = Field(400, ge=100, le=10_000, description="Resamples")
    min_pairs: int = Field(30, ge=10, description="A subset with fewer pairs has no figures")
    min_bin_pairs: int = Field(50, ge=5, description="A bin with fewer pairs has no median")
    min_cell_pairs: int = Field(
        5, ge=1, description="A cell of label space with fewer training pairs is not covered"
    )
    tolerance: float = Field(
        TOLERANCE, ge=0, lt=1, description="Worse is only what is so by a larger share of the best"
    )
    seed: Seed = Field(0, description="Of the resamples")
    axes: tuple[Axis, ...] = Field(
        tuple(axis for axis in AXES if axis.name in LABELS),
        description="Bins along each label of the target; their cells are those of the artifacts",
    )


class Compare(Stage[CompareSettings]):
    """Compare trained methods on the same pairs and choose the one that corrects the catalog.

    Tables: figures (`evidence.figures`), artifacts and behaviour outside the overlap
    (`evidence.smoothness`). Summary: ``method``, the one chosen, ``rule``, ``why``, ``scores`` it
    rests on, ``metrics`` of each method, pairs of both samples.

    Example: sos-dask compare pairs model.boosted model.polynomial -o comparison
    """

    name = "compare"
    version = 5
    Settings = CompareSettings
    roles = (
        Role("evidence", "Pairs with the predictions of the models.", "output"),
        Role("model", "Trained corrections.", "output", optional=True, many=True),
    )

    @property
    def methods(self) -> list[str]:
        """Methods of the models, sorted."""
        return sorted(name.removeprefix("model.") for name in self.named("model"))

    def check(self) -> None:
        """Refuse no models, and a rule that is none."""
        if not self.methods:
            raise ModelError(
                "there is no model to compare", "Give the outputs of 'sos-dask train'."
            )
        check_rule(self.settings.rule, self.methods)

    def make(self, run: Run) -> Made:
        """Measure every method and every label, then choose."""
        require_models_of(self)
        evidence, labels = self.manifest("evidence"), problem_of(self.path("evidence")).names
        require_rows(run, self.path("evidence"), _PROCESS_BYTES, _BYTES_A_PAIR)
        of_methods = run.parts("methods", dict.fromkeys(self.methods), self.artifacts_of)
        of_labels = run.parts("labels", dict.fromkeys(labels), self.figures_of, "compare labels")
        scored, noise = {}, {}
        for label, record in zip(labels, of_labels, strict=True):
            of = {(m, name): Scored(x, np.array(rest)) for m, name, x, rest in record["scores"]}
            scored[label] = of
            noise[label] = min(of[method, "mad"].value for method in self.methods)
        rough, outside = artifact_rows(dict(zip(self.methods, of_methods, strict=True)), noise)
        roughness = {
            method: _roughness([row for row in rough if row["method"] == method])
            for method in self.methods
        }
        choice = choose(self.settings.rule, scored, roughness, self.settings.tolerance)
        rows = [row for record in of_labels for row in record["figures"]]
        run.write(COMPARISON, pa.Table.from_pylist(rows, schema=FIGURE_SCHEMA))
        run.write(ARTIFACTS, pa.Table.from_pylist(rough, schema=ARTIFACT_SCHEMA))
        run.write(OUTSIDE, pa.Table.from_pylist(outside, schema=OUTSIDE_SCHEMA))
        manifests = [self.manifest(f"model.{method}") for method in self.methods]
        metrics = [metric for one in manifests for metric in one.summary["metrics"]]
        return evidence.rows, {**asdict(choice), "metrics": metrics, **of_labels[0]["n"]}

    def artifacts_of(self, output: Output, method: str, item: None) -> dict[str, Any]:
        """Measure what a correction does on the cells of its inputs."""
        settings, problem = self.settings, problem_of(self.path("evidence"))
        axes = {axis.name: axis.edges for axis in settings.axes if axis.name in problem.columns}
        table = read_evidence(self.path("evidence"), [*problem.columns, "trained"])
        known = np.isfinite(problem.matrix(table)).all(axis=1)
        table = table.filter(pc.and_(table["trained"], pa.array(known)))
        cells = Cells.of(matrix32(table, list(axes)), list(axes.values()), settings.min_cell_pairs)
        correction = corrections.load(self.path(f"model.{method}"))

        def predict(points: NDArray[np.floating]) -> NDArray[np.floating]:
            """Predict at columns of the axes; the other inputs stand at their median."""
            at = dict(zip(axes, points.T, strict=True))
            for name in problem.columns:
                if name not in axes:
                    at[name] = np.full(len(points), np.median(floats32(table, name)))
            return correction.predict(problem.matrix(at))

        box = []
        for values in (correction.info.minimum, correction.info.maximum):
            at = {
                one.column: one.scale * (10.0**value if one.log10 else value)
                for one, value in zip(problem.inputs, values, strict=True)
            }
            box.append(np.array([at[name] for name in axes]))
        n, many = len(problem.labels), settings.n_bootstrap
        found = artifacts(predict, cells, (box[0], box[1]), n, many, settings.seed)
        count = {"n_cells": len(cells.places), "typical_count": cells.typical_count}
        return {**count, "labels": found}

    def figures_of(self, output: Output, label: str, item: None) -> dict[str, Any]:
        """Measure one label in both samples."""
        settings, path = self.settings, self.path("evidence")
        there = columns_of(path)
        edges = {axis.name: axis.edges for axis in settings.axes if axis.name in there}
        predicted = {
            name: {method: columns(method, (label,))[0] for method in self.methods}
            for name, (_, columns) in _SAMPLES.items()
        }
        names = [*edges, f"{label}_diff", "group", "sparse", "held_out", "trained"]
        more = [name for of in predicted.values() for name in of.values()]
        table = read_evidence(path, [*names, *more])
        weights = draw(settings.n_bootstrap, settings.seed)
        rows, n, scores = [], {}, {}
        for name, (inside, _) in _SAMPLES.items():
            some = table.filter(table[inside])
            labels = {axis: floats32(some, axis) for axis in edges}
            group, sparse = (some[column].to_numpy() for column in ("group", "sparse"))
            sample = Sample(name, labels, group.astype(np.int64), sparse)
            before = floats32(some, f"{label}_diff").astype(np.float64)
            residuals = {NONE: before}
            for method, column in predicted[name].items():
                residuals[method] = before - floats32(some, column)
            least = settings.min_pairs, settings.min_bin_pairs
            found, scored = figures(sample, label, residuals, edges, weights, *least)
            rows += found
            n[f"n_{name}"] = some.num_rows
            scores[name] = [
                [*key, score.value, score.replicates.tolist()]
                for key, score in scored.items()
                if key[1] in ("mad", "rms_binned")
            ]
        # A record has no nan.
        for row in rows:
            row |= {k: None for k, v in row.items() if isinstance(v, float) and np.isnan(v)}
        return {"n": n, "scores": scores[TEST], "figures": rows}


def _roughness(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean roughness of the labels that have one; nan in too few cells, or without noise."""
    known = [row["roughness"] for row in rows if row["roughness"] is not None]
    enough = known and rows[0]["n_cells"] >= MIN_CELLS
    return float(np.mean(known)) if enough else float("nan")


def read_comparison(directory: Path) -> dict[str, Any]:
    """Read a comparison as JSON values: its summary, ``figures``, ``artifacts``, ``outside``.

    Raises
    ------
    CatalogError, PartitionError
        It is unfinished, of another stage, or damaged.
    """
    manifest = Manifest.of_stage(directory, Compare.name, Compare.version)
    found: dict[str, Any] = {
        key: value for key, value in manifest.summary.items() if key != "metrics"
    }
    for key, name in (("figures", COMPARISON), ("artifacts", ARTIFACTS), ("outside", OUTSIDE)):
        with partition_errors(directory / name):
            found[key] = pq.read_table(directory / name).to_pylist()
    return found

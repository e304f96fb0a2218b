"""Stages compare and trends: what every correction leaves of target - reference, in figures.

compare takes every trained method on the same pairs and chooses the one that corrects the catalog;
trends bins by other quantities, and sees whether the references agree. A task is a method, a label
or a quantity, and reads the columns of the evidence that it needs.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import FloatArray, floats, floats32, floats_or_nan, matrix32
from sos_dask.errors import ModelError
from sos_dask.evidence import failing, figures, smoothness
from sos_dask.evidence import trends as binned
from sos_dask.evidence.figures import BALANCED, NONE, TEST, TOLERANCE, TRAIN, Sample, Scored
from sos_dask.evidence.widening import count_nearest, points_of
from sos_dask.problem import SNR
from sos_dask.schema import LABELS
from sos_dask.settings import Seed, Settings
from sos_dask.stages.base import Made, Role, Run
from sos_dask.stages.evidence import OnEvidence, fitted_columns, held_out_columns, of_surveys
from sos_dask.stages.sample import read_sample
from sos_dask.stars.union import in_order
from sos_dask.stats.bootstrap import draw
from sos_dask.stats.numbers import ALL, MIN_COUNT, Axis, equal_count_edges, robust_scale
from sos_dask.storage.artifact import Output

COMPARISON, ARTIFACTS, OUTSIDE = "comparison.parquet", "artifacts.parquet", "outside.parquet"
BINS = "bins.parquet"
TRENDS, PLANES, REFERENCES = "trends.parquet", "planes.parquet", "references.parquet"
_SAMPLES = {TEST: ("held_out", held_out_columns), TRAIN: ("trained", fitted_columns)}
_PLANE = "plane"
_N_CELLS = 20  # of an input that has no bins


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
        tuple(axis for axis in binned.AXES if axis.name in LABELS),
        description="Bins along each label of the target; their cells are those of the artifacts",
    )


class Compare(OnEvidence[CompareSettings]):
    """Compare trained methods on the same pairs and choose the one that corrects the catalog.

    Tables: figures (`evidence.figures`), artifacts and behaviour outside the overlap
    (`evidence.smoothness`), bins that fail (`evidence.failing`; without a sample of the rows those
    of pairs alone). Summary: ``method``, the one chosen, ``rule``, ``why``, ``scores`` it rests on,
    ``metrics`` of each method, pairs of both samples, ``failing`` (`failing.count_failing`).
    """

    name = "compare"
    version = 6
    Settings = CompareSettings
    roles = (
        Role("evidence", "Pairs with the predictions of the models.", "output"),
        Role("model", "Trained corrections.", "output", optional=True, many=True),
        Role("sample", "Rows of the target that pairs stand for.", "output", optional=True),
    )
    pairs_memory = (300, 400)
    tables = (
        ("figures", COMPARISON), ("artifacts", ARTIFACTS), ("outside", OUTSIDE), ("bins", BINS),
    )  # fmt: skip

    def check(self) -> None:
        """Refuse no models, and an unknown rule."""
        if not self.many("model"):
            raise ModelError(
                "there is no model to compare", "Give the outputs of 'sos-dask train'."
            )
        figures.check_rule(self.settings.rule, self.many("model"))

    def measure(self, run: Run) -> Made:
        """Measure every method and every label, then choose."""
        methods, labels = self.many("model"), self.problem.names
        of_methods = run.parts("methods", dict.fromkeys(methods), self.artifacts_of)
        if self.named("sample"):
            run.parts("weights", {"weights": None}, self.weigh, "compare weights")
        of_labels = run.parts("labels", dict.fromkeys(labels), self.figures_of, "compare labels")
        scored = {
            label: {(m, name): Scored(x, np.array(rest)) for m, name, x, rest in record["scores"]}
            for label, record in zip(labels, of_labels, strict=True)
        }
        noise = {name: min(of[m, "mad"].value for m in methods) for name, of in scored.items()}
        found = dict(zip(methods, of_methods, strict=True))
        rough, outside = smoothness.artifact_rows(found, noise)
        known: dict[str, list[float]] = {}
        for row in rough:
            if row["roughness"] is not None:  # in too few cells, or without noise
                known.setdefault(row["method"], []).append(row["roughness"])
        roughness = {method: float(np.mean(values)) for method, values in known.items()}
        choice = figures.choose(self.settings.rule, scored, roughness, self.settings.tolerance)
        rows = [row for record in of_labels for row in record["figures"]]
        run.write(COMPARISON, pa.Table.from_pylist(rows, schema=figures.FIGURE_SCHEMA))
        run.write(ARTIFACTS, pa.Table.from_pylist(rough, schema=smoothness.ARTIFACT_SCHEMA))
        run.write(OUTSIDE, pa.Table.from_pylist(outside, schema=smoothness.OUTSIDE_SCHEMA))
        bins = pa.concat_tables([run.output.read_piece(f"bins-{label}") for label in labels])
        run.write(BINS, bins)
        metrics = [one for m in methods for one in self.manifest(f"model.{m}").summary["metrics"]]
        summary = {**asdict(choice), "metrics": metrics, **of_labels[0]["n"]}
        summary["failing"] = failing.count_failing(bins)
        return self.manifest("evidence").rows, summary

    def artifacts_of(self, output: Output, method: str, item: None) -> dict[str, Any]:
        """Measure what a correction does on the cells of its inputs."""
        settings, problem = self.settings, self.problem
        axes = {axis.name: axis.edges for axis in settings.axes if axis.name in problem.columns}
        table = self.read([*problem.columns, "trained"])
        known = np.isfinite(problem.matrix(table)).all(axis=1)
        table = table.filter(pc.and_(table["trained"], pa.array(known)))
        if not axes:  # none of the usual ones: the first input
            name = problem.columns[0]
            axes = {name: equal_count_edges(floats32(table, name), _N_CELLS)}
        at = matrix32(table, list(axes)).astype(np.float64)
        cells = smoothness.Cells.of(at, list(axes.values()), settings.min_cell_pairs)
        box = at.min(axis=0, initial=np.inf), at.max(axis=0, initial=-np.inf)
        others = [name for name in problem.columns if name not in axes]
        medians = {name: float(np.median(floats32(table, name))) for name in others}
        correction = corrections.load(self.files(f"model.{method}"))

        def predict(points: NDArray[np.floating]) -> NDArray[np.floating]:
            """Predict at columns of the axes; the other inputs stand at their median."""
            at = {name: np.full(len(points), value) for name, value in medians.items()}
            # A correction is constant beyond its pairs; there may be no logarithm there.
            within = zip(axes, np.clip(points, *box).T, strict=True)
            return correction.predict(problem.matrix(at | dict(within)))

        n, many = len(problem.labels), settings.n_bootstrap
        found = smoothness.artifacts(predict, cells, box, n, many, settings.seed)
        count = {"n_cells": len(cells.places), "typical_count": cells.typical_count}
        return {**count, "labels": found}

    def weigh(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """Count how often each held-out pair stands for a row of the sample."""
        problem, rows = self.problem, read_sample(self.path("sample"), good=True)
        pairs = self.read([*problem.columns, "held_out"], [SNR])
        pairs = pairs.filter(pairs["held_out"])
        center, scale = robust_scale(problem.star_matrix(pairs))
        of_pairs, of_rows = (
            points_of((problem.star_matrix(one) - center) / scale, floats_or_nan(one, SNR))
            for one in (pairs, rows)
        )
        known, whole = (np.isfinite(one[:, :-1]).all(axis=1) for one in (of_pairs, of_rows))
        weight = np.zeros(pairs.num_rows)
        weight[known] = count_nearest(of_pairs[known], of_rows[whole])
        output.write_piece("weights", pa.table({"weight": weight}))
        return {}

    def figures_of(self, output: Output, label: str, item: None) -> dict[str, Any]:
        """Measure one label in both samples."""
        settings, methods = self.settings, self.many("model")
        names = [f"{label}_diff", "group", "sparse", "held_out", "trained"]
        for _, columns in _SAMPLES.values():
            names += [columns(method, (label,))[0] for method in methods]
        more = [*(axis.name for axis in (*settings.axes, *failing.AXES)), SNR]
        table = self.read(names, more)
        edges = {one.name: one.edges for one in settings.axes if one.name in table.column_names}
        weights = draw(settings.n_bootstrap, settings.seed)
        rows, n, scores = [], {}, {}
        for name, (inside, columns) in _SAMPLES.items():
            some = table.filter(table[inside])
            labels = {one: floats32(some, one) for one in more if one in some.column_names}
            group, sparse = (some[column].to_numpy() for column in ("group", "sparse"))
            sample = Sample(name, labels, group.astype(np.int64), sparse)
            before = floats32(some, f"{label}_diff").astype(np.float64)
            predicted = {m: floats32(some, columns(m, (label,))[0]) for m in methods}
            residuals = {NONE: before, **{m: before - values for m, values in predicted.items()}}
            least = settings.min_pairs, settings.min_bin_pairs
            found, scored = figures.figures(sample, label, residuals, edges, weights, *least)
            rows += found
            n[f"n_{name}"] = some.num_rows
            if name == TEST:
                best = min(scored[method, "mad"].value for method in methods)
                limit = failing.LIMITS.get(label, failing.LIMIT_SHARE * best)
                stand = {failing.PAIRS: np.ones(some.num_rows)}
                if self.named("sample"):
                    stand[failing.ROWS] = output.read_piece("weights")["weight"].to_numpy()
                given = residuals, labels, sample.groups, stand, settings.min_bin_pairs
                output.write_piece(f"bins-{label}", failing.failing_bins(label, limit, *given))
            scores[name] = [
                [*key, score.value, score.replicates.tolist()]
                for key, score in scored.items()
                if key[1] in ("mad", "rms_binned")
            ]
        # A record has no nan.
        for row in rows:
            row |= {k: None for k, v in row.items() if isinstance(v, float) and np.isnan(v)}
        return {"n": n, "scores": scores[TEST], "figures": rows}


class TrendSettings(Settings):
    """Quantities that differences are binned by, and their bins."""

    axes: tuple[Axis, ...] = Field(
        binned.AXES, description="Quantities of the target; those that the pairs lack are left out"
    )
    n_count_bins: int = Field(
        20, ge=1, description="Bins with equally many pairs along each quantity"
    )
    min_count: int = Field(
        MIN_COUNT,
        ge=1,
        description="A bin is judged for a difference of two references if both have as many pairs",
    )
    order: tuple[str, ...] = Field(
        (), description="Reference surveys: differences are second - first; others follow by name"
    )


class Trends(OnEvidence[TrendSettings]):
    """Bin target - reference by other quantities, before and after every correction.

    Tables: ``trends.parquet`` (bins of one quantity), ``planes.parquet`` (cells in Teff and log g),
    and ``references.parquet``, the comparison of the reference surveys in the bins of one quantity.
    Labels in them have their own units. Summary: pairs by survey, common stars, pairs in no bin of
    equal width, and agreements (`evidence.trends`).
    """

    name = "trends"
    version = 6
    Settings = TrendSettings
    roles = (
        Role("evidence", "Pairs with the predictions of models.", "output"),
        Role("reference", "United reference.", optional=True),
        Role("stars", "Stars of the surveys that it was made from.", optional=True, many=True),
    )
    pairs_memory = (200, 200)
    tables = (("trends", TRENDS),)

    def measure(self, run: Run) -> Made:
        """Bin by one quantity after the other."""
        there = self.names
        axes = {axis.name: axis for axis in self.settings.axes if axis.name in there}
        groups: dict[str, tuple[Axis, ...]] = {name: (axis,) for name, axis in axes.items()}
        if axes.keys() >= set(binned.PLANE):
            groups[_PLANE] = tuple(axes[name] for name in binned.PLANE)
        (common,) = run.parts("common", {"common": None}, self.common, "common stars")
        done = run.parts("trends", groups, self.trends_of)
        planes = [key for key in groups if key == _PLANE]
        for name, nothing, keys in (
            (TRENDS, binned.trend_table([]), [f"trends-{key}" for key in axes]),
            (REFERENCES, binned.contrast_table([]), [f"contrasts-{key}" for key in axes]),
            (PLANES, binned.trend_table([], plane=True), [f"trends-{key}" for key in planes]),
        ):
            tables = (run.output.read_piece(key) for key in keys)
            run.write(name, pa.concat_tables([nothing, *tables]))
        return self.manifest("evidence").rows, {
            "surveys": done[0]["surveys"] if done else {},
            "common_stars": common["stars"],
            "in_no_bin": {key: one["in_no_bin"] for key, one in zip(groups, done, strict=True)},
            "agreements": [one for item in done for one in item["agreements"]],
        }

    def common(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """Keep the stars that two references have: labels of the first, differences."""
        n_stars = 0
        for first, second, one, other in self.common_stars(self.settings.order):
            columns = {label: floats(one, label) for label in LABELS}
            columns |= {f"{name}_diff": floats(other, name) - x for name, x in columns.items()}
            output.write_piece(f"common-{first}-{second}", pa.table(columns))
            n_stars += len(one)
        return {"stars": n_stars}

    def trends_of(self, output: Output, key: str, axes: tuple[Axis, ...]) -> dict[str, Any]:
        """Write all trends against one quantity, or on the plane."""
        settings, labels = self.settings, self.problem.names
        methods = self.manifest("evidence").summary["methods"]
        wanted = [*(axis.name for axis in axes), *(f"{label}_diff" for label in labels), "trained"]
        for method in methods:
            wanted += [*held_out_columns(method, labels), *fitted_columns(method, labels)]
        table = self.read(wanted, ["survey_ref"])
        x = {axis.name: floats32(table, axis.name) for axis in axes}
        surveys = of_surveys(table)
        subsets = {ALL: np.ones(table.num_rows, dtype=np.bool_)}
        subsets |= {name: surveys[name] for name in in_order(surveys, settings.order)}
        binnings = {binned.EQUAL_WIDTH: [axis.edges for axis in axes]}
        if key != _PLANE:
            edges = [equal_count_edges(values, settings.n_count_bins) for values in x.values()]
            binnings[binned.EQUAL_COUNT] = edges
        known = set(self.many("stars") if self.named("reference") else ())
        trained = table["trained"].to_numpy()
        trends, contrasts, in_no_bin = [], [], {}
        rows_in = {name: binned.Binned.of(x, edges) for name, edges in binnings.items()}
        for label, (binning, edges) in itertools.product(labels, binnings.items()):
            about, difference = {"label": label, "binning": binning}, f"{label}_diff"
            bare = floats32(table, difference).astype(np.float64)
            samples: dict[tuple[str, str | None], FloatArray] = {(binned.BEFORE, None): bare}
            for method in methods:
                held_out, fitted = (
                    bare - floats32(table, columns(method, (label,))[0])
                    for columns in (held_out_columns, fitted_columns)
                )
                samples[binned.AFTER, method] = held_out
                samples[binned.FITTED, method] = np.where(trained, fitted, np.nan)
            before: dict[str, binned.Columns] = {}
            for (sample, method), values in samples.items():
                for subset, inside in subsets.items():
                    chosen = np.where(inside, values, np.nan)
                    more = {"subset": subset, "sample": sample, "method": method}
                    trends.append(binned.trend(rows_in[binning], chosen, **about, **more))
                    before.setdefault(subset, trends[-1])
            n_binned = before.pop(ALL)["n"].sum()
            if binning == binned.EQUAL_WIDTH:
                in_no_bin[label] = int(np.count_nonzero(np.isfinite(bare)) - n_binned)
            for first, second in itertools.combinations(before if key != _PLANE else (), 2):
                direct = None
                if {key, label} <= set(LABELS) and {first, second} <= known:
                    both = output.read_piece(f"common-{first}-{second}")
                    of_both = binned.Binned.of({key: floats32(both, key)}, edges)
                    direct = binned.trend(of_both, floats32(both, difference), **about)
                found = binned.contrast(before[first], before[second], direct, settings.min_count)
                contrasts.append(found)
        output.write_piece(f"trends-{key}", binned.trend_table(trends, key == _PLANE))
        output.write_piece(f"contrasts-{key}", binned.contrast_table(contrasts))
        n_pairs = {name: int(np.count_nonzero(inside)) for name, inside in surveys.items()}
        agreed = [row for one in contrasts for row in binned.agreements(one, settings.min_count)]
        return {"surveys": n_pairs, "in_no_bin": in_no_bin, "agreements": agreed}

"""Stage trends: binned medians of target - reference, and whether the references agree.

A task is a quantity: it reads the columns of the evidence that it needs, as float32: about 100
bytes a pair, and 50 more while it ranks (measured).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from sos_dask.columns import floats, floats32
from sos_dask.evidence.trends import (
    AFTER,
    AXES,
    BEFORE,
    EQUAL_COUNT,
    EQUAL_WIDTH,
    FITTED,
    PLANE,
    Columns,
    agreements,
    contrast,
    contrast_table,
    trend,
    trend_table,
)
from sos_dask.schema import LABELS
from sos_dask.settings import Settings
from sos_dask.stages.base import Made, Role, Run, Stage, piece, read_piece, write_piece
from sos_dask.stages.evidence import (
    DIFFERENCES,
    columns_of,
    fitted_columns,
    held_out_columns,
    problem_of,
    read_evidence,
    require_rows,
)
from sos_dask.stages.reference import common_stars, in_order
from sos_dask.stats.numbers import ALL, MIN_COUNT, Axis, equal_count_edges
from sos_dask.storage.artifact import Output, partition_errors
from sos_dask.storage.manifest import Manifest

TRENDS, PLANES, REFERENCES = "trends.parquet", "planes.parquet", "references.parquet"
_PROCESS_BYTES, _BYTES_A_PAIR = 200 << 20, 200
_PLANE_KEY = "plane"


class TrendSettings(Settings):
    """Quantities that differences are binned by, and their bins."""

    axes: tuple[Axis, ...] = Field(
        AXES, description="Quantities of the target; those that the pairs lack are left out"
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


class Trends(Stage[TrendSettings]):
    """Bin target - reference by other quantities, before and after every correction.

    Tables: ``trends.parquet`` (bins of one quantity), ``planes.parquet`` (cells in Teff and log g),
    and ``references.parquet``, the comparison of the reference surveys in the bins of one quantity.
    Labels in them have their own units. Summary: pairs by survey, common stars, pairs in no bin of
    equal width, and agreements (`evidence.trends`).

    Example: sos-dask trends pairs model.boosted -o trends
    """

    name = "trends"
    version = 6
    Settings = TrendSettings
    roles = (
        Role("evidence", "Pairs with the predictions of models.", "output"),
        Role("reference", "United reference.", optional=True),
        Role("stars", "Stars of the surveys that it was made from.", optional=True, many=True),
    )

    def make(self, run: Run) -> Made:
        """Bin by one quantity after the other."""
        evidence = self.manifest("evidence")
        require_rows(run, self.path("evidence"), _PROCESS_BYTES, _BYTES_A_PAIR)
        there = columns_of(self.path("evidence"))
        by_name = {axis.name: axis for axis in self.settings.axes if axis.name in there}
        groups: dict[str, tuple[Axis, ...]] = {name: (axis,) for name, axis in by_name.items()}
        if by_name.keys() >= set(PLANE):
            groups[_PLANE_KEY] = tuple(by_name[name] for name in PLANE)
        (common,) = run.parts("common", {"common": None}, self.common, "common stars")
        done = run.parts("trends", groups, self.trends_of)
        tables = {TRENDS: [trend_table([])], REFERENCES: [contrast_table([])]}
        tables[PLANES] = [trend_table([], plane=True)]
        for key in groups:
            name = PLANES if key == _PLANE_KEY else TRENDS
            tables[name].append(read_piece(piece(run.output, f"trends-{key}")))
            if key != _PLANE_KEY:
                tables[REFERENCES].append(read_piece(piece(run.output, f"contrasts-{key}")))
        for name, pieces in tables.items():
            run.write(name, pa.concat_tables(pieces))
        return evidence.rows, {
            "surveys": done[0]["surveys"] if done else {},
            "common_stars": common["stars"],
            "in_no_bin": {key: one["in_no_bin"] for key, one in zip(groups, done, strict=True)},
            "agreements": [one for item in done for one in item["agreements"]],
        }

    def common(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """Keep the stars that two references have: labels of the first, differences."""
        names = (*LABELS, *DIFFERENCES)
        texts = [("first", pa.string()), ("second", pa.string())]
        schema = pa.schema([*texts, *((name, pa.float32()) for name in names)])
        tables = [schema.empty_table()]
        if self.named("reference"):
            stars = {
                name.removeprefix("stars."): self.catalog(name) for name in self.named("stars")
            }
            found = common_stars(self.catalog("reference"), stars, self.settings.order)
            for first, second, one, other in found:
                values = [floats(one, label) for label in LABELS]
                values += [floats(other, label) - floats(one, label) for label in LABELS]
                arrays = [pa.array([name] * len(one), pa.string()) for name in (first, second)]
                arrays += [pa.array(column, pa.float32(), from_pandas=True) for column in values]
                tables.append(pa.table(arrays, schema=schema))
        table = pa.concat_tables(tables)
        write_piece(piece(output, "common"), table)
        return {"stars": table.num_rows}

    def trends_of(self, output: Output, key: str, axes: tuple[Axis, ...]) -> dict[str, Any]:
        """Write all trends against one quantity, or on the plane."""
        settings, plane = self.settings, key == _PLANE_KEY
        methods = self.manifest("evidence").summary["methods"]
        labels = problem_of(self.path("evidence")).names
        wanted = [*(axis.name for axis in axes), *(f"{label}_diff" for label in labels), "trained"]
        for method in methods:
            wanted += [*held_out_columns(method, labels), *fitted_columns(method, labels)]
        table = read_evidence(self.path("evidence"), wanted, ["survey_ref"])
        x = {axis.name: floats32(table, axis.name) for axis in axes}
        subsets = _subsets(table, settings.order)
        common = read_piece(piece(output, "common"))
        binnings = {EQUAL_WIDTH: [axis.edges for axis in axes]}
        if not plane:
            edges = [equal_count_edges(values, settings.n_count_bins) for values in x.values()]
            binnings[EQUAL_COUNT] = edges
        trends: list[Columns] = []
        contrasts: list[Columns] = []
        in_no_bin = {}
        for label, (binning, edges) in itertools.product(labels, binnings.items()):
            about = {"label": label, "binning": binning}
            before: dict[str, Columns] = {}
            for sample, method, values in _samples(table, label, methods):
                for subset, inside in subsets.items():
                    chosen = np.where(inside, values, np.nan)
                    more = {"subset": subset, "sample": sample, "method": method}
                    trends.append(trend(x, chosen, edges, **about, **more))
                    before.setdefault(subset, trends[-1])
            if not plane:
                contrasts += self._contrasts(common, before, [*x], edges, about)
            if binning == EQUAL_WIDTH:
                n_known = np.count_nonzero(np.isfinite(floats32(table, f"{label}_diff")))
                in_no_bin[label] = int(n_known - before[ALL]["n"].sum())
        write_piece(piece(output, f"trends-{key}"), trend_table(trends, plane))
        write_piece(piece(output, f"contrasts-{key}"), contrast_table(contrasts))
        n_pairs = {name: int(np.count_nonzero(inside)) for name, inside in subsets.items()}
        del n_pairs[ALL]
        agreed = [row for one in contrasts for row in agreements(one, settings.min_count)]
        return {"surveys": n_pairs, "in_no_bin": in_no_bin, "agreements": agreed}

    def _contrasts(
        self,
        common: pa.Table,
        before: Mapping[str, Columns],
        against: Sequence[str],
        edges: Sequence[NDArray[np.float64]],
        about: Mapping[str, str],
    ) -> Iterator[Columns]:
        """Every two reference surveys, also on their common stars where the bins are of labels."""
        difference = f"{about['label']}_diff"
        for first, second in itertools.combinations([name for name in before if name != ALL], 2):
            is_pair = pc.and_(pc.equal(common["first"], first), pc.equal(common["second"], second))
            both, direct = common.filter(is_pair), None
            if both.num_rows and {*against, difference} <= set(both.column_names):
                x = {name: floats32(both, name) for name in against}
                direct = trend(x, floats32(both, difference), edges, **about)
            yield contrast(before[first], before[second], direct, self.settings.min_count)


def _subsets(table: pa.Table, order: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """All pairs, and those of each reference survey."""
    subsets = {ALL: np.ones(table.num_rows, dtype=np.bool_)}
    if "survey_ref" in table.column_names:
        for name in in_order(pc.unique(table["survey_ref"]).drop_null().to_pylist(), order):
            inside = pc.fill_null(pc.equal(table["survey_ref"], name), False)
            subsets[name] = inside.to_numpy()
    return subsets


def _samples(
    table: pa.Table, label: str, methods: Sequence[str]
) -> Iterator[tuple[str, str | None, NDArray[np.float64]]]:
    """Differences of a label before and after each correction, nan outside the sample."""
    before = floats32(table, f"{label}_diff").astype(np.float64)
    yield BEFORE, None, before
    trained = table["trained"].to_numpy()
    for method in methods:
        yield AFTER, method, before - floats32(table, held_out_columns(method, (label,))[0])
        left = before - floats32(table, fitted_columns(method, (label,))[0])
        yield FITTED, method, np.where(trained, left, np.nan)


def read_trends(directory: Path) -> dict[str, Any]:
    """Read ``trends``, bins of one quantity, and ``agreements`` of references as JSON values.

    Raises
    ------
    CatalogError, PartitionError
        They are unfinished, of another stage, or damaged.
    """
    manifest = Manifest.of_stage(directory, Trends.name, Trends.version)
    with partition_errors(directory / TRENDS):
        rows = pq.read_table(directory / TRENDS).to_pylist()
    return {"trends": rows, "agreements": manifest.summary["agreements"]}

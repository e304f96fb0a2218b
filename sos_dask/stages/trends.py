"""Stage trends: binned medians of target - reference, and whether the references agree.

A task is a quantity: it reads the columns of the evidence that it needs, as float32: about 100
bytes a pair, and 50 more while it ranks (measured).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from sos_dask.columns import floats32
from sos_dask.evidence.trends import (
    AFTER,
    ALL,
    AXES,
    BEFORE,
    EQUAL_COUNT,
    EQUAL_WIDTH,
    FITTED,
    PLANE,
    Contrast,
    Trend,
    contrast_table,
    trend,
    trend_table,
)
from sos_dask.schema import LABELS
from sos_dask.settings import Settings
from sos_dask.stages.base import Made, Role, Run, Stage
from sos_dask.stages.common import common_stars
from sos_dask.stages.evidence import (
    DIFFERENCES,
    columns_of,
    fitted_columns,
    held_out_columns,
    problem_of,
    read_evidence,
    require_rows,
)
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stats.binned import MIN_COUNT, Axis, equal_count_edges
from sos_dask.storage.artifact import Manifest, Output
from sos_dask.storage.catalog import Catalog, partition_errors

TRENDS, PLANES = "trends.parquet", "planes.parquet"
REFERENCES, REFERENCE_PLANES = "references.parquet", "reference_planes.parquet"
_PROCESS_BYTES, _BYTES_A_PAIR = 200 << 20, 200
_PLANE_KEY = "plane"

FloatArray = NDArray[np.float64]


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
    and the comparison of the reference surveys in the same bins, ``references.parquet`` and
    ``reference_planes.parquet``. Labels in them have their own units. Summary: pairs by survey,
    common stars, pairs in no bin of equal width, and agreements (`evidence.trends`).

    Example: sos-dask trends pairs model.boosted -o trends
    """

    name = "trends"
    version = 5
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
        lines = [key for key in groups if key != _PLANE_KEY]
        planes = [key for key in groups if key == _PLANE_KEY]
        for file, kind, keys, empty in (
            (TRENDS, "trends", lines, trend_table([])),
            (PLANES, "trends", planes, trend_table([], plane=True)),
            (REFERENCES, "contrasts", lines, contrast_table([])),
            (REFERENCE_PLANES, "contrasts", planes, contrast_table([], plane=True)),
        ):
            pieces = [read_piece(_piece_file(run.output, kind, key)) for key in keys]
            run.write(file, pa.concat_tables([empty, *pieces]))
        return evidence.rows, {
            "surveys": done[0]["surveys"] if done else {},
            "common_stars": common["stars"],
            "in_no_bin": {key: one["in_no_bin"] for key, one in zip(groups, done, strict=True)},
            "agreements": [one for item in done for one in item["agreements"]],
        }

    def common(self, output: Output, key: str, item: None) -> dict[str, Any]:
        """Keep the stars that two references have."""
        reference = self.catalog("reference") if self.named("reference") else None
        stars = {name.removeprefix("stars."): self.catalog(name) for name in self.named("stars")}
        found = _common_stars(reference, stars, self.settings.order)
        write_piece(_piece_file(output, "common", "common"), found)
        return {"stars": found.num_rows}

    def trends_of(self, output: Output, key: str, axes: tuple[Axis, ...]) -> dict[str, Any]:
        """Write all trends against one quantity, or on the plane."""
        names = tuple(axis.name for axis in axes)
        methods = self.manifest("evidence").summary["methods"]
        labels = problem_of(self.path("evidence")).names
        wanted = [*names, *(f"{label}_diff" for label in labels), "trained"]
        for method in methods:
            wanted += [*held_out_columns(method, labels), *fitted_columns(method, labels)]
        table = read_evidence(self.path("evidence"), wanted, ["survey_ref"])
        x = [floats32(table, name) for name in names]
        subsets = _subsets(table, self.settings.order)
        plane = key == _PLANE_KEY
        binnings = {EQUAL_WIDTH: [axis.edges for axis in axes]}
        if not plane:
            n_bins = self.settings.n_count_bins
            binnings[EQUAL_COUNT] = [equal_count_edges(values, n_bins) for values in x]
        trends: list[Trend] = []
        contrasts: list[Contrast] = []
        in_no_bin = {}
        for label in labels:
            for binning, edges in binnings.items():
                about = partial(trend, edges=edges, label=label, against=names, binning=binning)
                before: dict[str, Trend] = {}
                for sample, method, values in _samples(table, label, methods):
                    for subset, inside in subsets.items():
                        chosen = np.where(inside, values, np.nan)
                        one = about(x, chosen, subset=subset, sample=sample, method=method)
                        trends.append(one)
                        before.setdefault(subset, one)
                contrasts += self._contrasts(output, before, about)
                if binning == EQUAL_WIDTH:
                    n_known = np.count_nonzero(np.isfinite(floats32(table, f"{label}_diff")))
                    in_no_bin[label] = int(n_known - before[ALL].quantiles.n.sum())
        write_piece(_piece_file(output, "trends", key), trend_table(trends, plane))
        write_piece(_piece_file(output, "contrasts", key), contrast_table(contrasts, plane))
        n_pairs = {name: int(np.count_nonzero(inside)) for name, inside in subsets.items()}
        del n_pairs[ALL]
        agreements = [
            {"binning": contrast.first.binning, **one}
            for contrast in contrasts
            for one in contrast.agreements()
        ]
        return {"surveys": n_pairs, "in_no_bin": in_no_bin, "agreements": agreements}

    def _contrasts(
        self, output: Output, before: Mapping[str, Trend], about: Callable[..., Trend]
    ) -> Iterator[Contrast]:
        """Every two reference surveys, also on their common stars where the bins are of labels."""
        common = read_piece(_piece_file(output, "common", "common"))
        label, against = before[ALL].label, before[ALL].against
        for first, second in combinations([name for name in before if name != ALL], 2):
            both = common.filter(
                pc.and_(pc.equal(common["first"], first), pc.equal(common["second"], second))
            )
            direct = None
            if both.num_rows and {*against, f"{label}_diff"} <= set(both.column_names):
                x = [floats32(both, name) for name in against]
                direct = about(x, floats32(both, f"{label}_diff"), subset=f"{first},{second}")
            yield Contrast(before[first], before[second], direct, self.settings.min_count)


def _piece_file(output: Output, kind: str, key: str) -> Path:
    return output.work / "pieces" / f"{kind}-{key}.arrow"


def _subsets(table: pa.Table, order: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """All pairs, and those of each reference survey."""
    subsets = {ALL: np.ones(table.num_rows, dtype=np.bool_)}
    if "survey_ref" in table.column_names:
        for name in _ordered(pc.unique(table["survey_ref"]).drop_null().to_pylist(), order):
            inside = pc.fill_null(pc.equal(table["survey_ref"], name), False)
            subsets[name] = inside.to_numpy()
    return subsets


def _samples(
    table: pa.Table, label: str, methods: Sequence[str]
) -> Iterator[tuple[str, str | None, FloatArray]]:
    """Differences of a label before and after each correction, nan outside the sample."""
    before = floats32(table, f"{label}_diff").astype(np.float64)
    yield BEFORE, None, before
    trained = table["trained"].to_numpy()
    for method in methods:
        yield AFTER, method, before - floats32(table, held_out_columns(method, (label,))[0])
        left = before - floats32(table, fitted_columns(method, (label,))[0])
        yield FITTED, method, np.where(trained, left, np.nan)


def _ordered(surveys: Sequence[str], order: Sequence[str]) -> list[str]:
    """Surveys in the given order, others after them by name."""
    return [
        *(name for name in order if name in surveys),
        *sorted(name for name in surveys if name not in order),
    ]


def _common_stars(
    reference: Catalog | None, stars: Mapping[str, Catalog], order: Sequence[str]
) -> pa.Table:
    """Stars that two references have: labels of the first, differences second - first.

    Values are on the zero points of ``reference``. Of a survey's rows of one star, the first that
    passes its cuts counts.
    """
    names = (*LABELS, *DIFFERENCES)
    texts = [("first", pa.string()), ("second", pa.string())]
    schema = pa.schema([*texts, *((name, pa.float32()) for name in names)])
    tables = [schema.empty_table()]
    if reference is None or len(stars) < 2:
        return tables[0]
    labels = common_stars(reference, stars).labels
    for pair in combinations(_ordered(list(stars), order), 2):
        (ours, base), (theirs, other) = (labels[name] for name in pair)
        _, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
        columns = [base[label][i] for label in LABELS]
        columns += [other[label][j] - base[label][i] for label in LABELS]
        arrays = [pa.array([name] * len(i), pa.string()) for name in pair]
        arrays += [pa.array(column, pa.float32(), from_pandas=True) for column in columns]
        tables.append(pa.table(arrays, schema=schema))
    return pa.concat_tables(tables)


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

"""Stage trends: binned medians of target - reference, and whether the references agree.

A task is a quantity: it reads the few columns it needs of the pairs (`stages.evidence`: a million
at most), as float32: about 100 bytes a pair, and 50 more while it ranks (measured).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask import corrections
from sos_dask.columns import floats32
from sos_dask.evidence.trends import (
    AFTER,
    ALL,
    AXES,
    BEFORE,
    EQUAL_COUNT,
    EQUAL_WIDTH,
    FITTED,
    MIN_COUNT,
    PLANE,
    Axis,
    Contrast,
    Trend,
    agreements,
    contrast_table,
    equal_count_edges,
    trend,
    trend_table,
)
from sos_dask.problem import features
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import LABELS
from sos_dask.stages.common import common_stars
from sos_dask.stages.evidence import DIFFERENCES, evidence, require_evidence
from sos_dask.stages.parts import manifest_of, records, run_parts, unless_complete
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.storage.artifact import Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, partition_errors, write_parquet

VERSION = 4
TRENDS, PLANES = "trends.parquet", "planes.parquet"
REFERENCES, REFERENCE_PLANES = "references.parquet", "reference_planes.parquet"
_PROCESS_BYTES = 200 << 20
_BYTES_A_PAIR = 200
_PLANE_KEY = "plane"
_PREDICTIONS = tuple(f"{label}_delta" for label in LABELS)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TrendSettings:
    """Settings of the stage.

    Parameters
    ----------
    axes : tuple of Axis
        Quantities of the target; those that the pairs lack are left out.
    n_count_bins : int
        Bins with equally many pairs along each quantity.
    min_count : int
        A bin is judged for a difference of two references if both have as many pairs in it.
    order : tuple of str
        Reference surveys; differences of two are second - first. Others follow by name.
    """

    axes: tuple[Axis, ...] = AXES
    n_count_bins: int = 20
    min_count: int = MIN_COUNT
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    output: Output
    key: str
    axes: tuple[Axis, ...]
    pairs: Catalog
    models: Mapping[str, Path]
    settings: TrendSettings


@dataclass(frozen=True)
class _Fitted:
    output: Output
    method: str
    model: Path
    pairs: Catalog


def trends_recipe(
    pairs: str,
    settings: TrendSettings,
    models: Mapping[str, str] | None = None,
    reference: str | None = None,
    stars: Mapping[str, str] | None = None,
) -> Recipe:
    """Recipe of `trends` for inputs of these fingerprints."""
    inputs = {"pairs": pairs}
    inputs |= {f"model.{method}": one for method, one in (models or {}).items()}
    if reference is not None:
        inputs |= {"reference": reference}
        inputs |= {f"{survey}.stars": one for survey, one in (stars or {}).items()}
    return Recipe("trends", VERSION, {"settings": asdict(settings)}, inputs)


def trends(
    pairs: Catalog,
    directory: Path,
    settings: TrendSettings | None = None,
    *,
    models: Mapping[str, Path] | None = None,
    reference: Catalog | None = None,
    stars: Mapping[str, Catalog] | None = None,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Trends of target - reference over the pairs fit for training.

    Parameters
    ----------
    pairs : Catalog
        Output of crossmatch.
    directory : Path
        Gets ``trends.parquet`` (bins of one quantity), ``planes.parquet`` (cells in Teff and log g)
        and the comparison of the reference surveys in the same bins, ``references.parquet`` and
        ``reference_planes.parquet``. Labels in them have their own units.
    settings : TrendSettings, optional
    models : mapping of str to Path, optional
        Outputs of train for these pairs, by method: trends after their correction are added, of the
        pairs that were held out and of those that trained the model.
    reference : Catalog, optional
        Output of reference, with ``stars``, the catalogs it was made from, by survey: references
        are then compared on their common stars, too, on the zero points that it gave them.

    Returns
    -------
    Manifest
        ``rows``: pairs in, pairs used. ``summary``: pairs by survey, common stars, pairs in no
        bin of equal width, and an `Agreement` for every two references, label and kind of bins.

    Raises
    ------
    CatalogError
        A column is missing, held-out pairs are not those of these pairs, or the directory holds
        something else.
    ClusterError
        The pairs are too many for a worker.
    """
    settings = settings or TrendSettings()
    models, stars = dict(models or {}), dict(stars or {})
    pairs.require("use", "fold", *LABELS, *DIFFERENCES)
    recipe = trends_recipe(
        pairs.fingerprint,
        settings,
        {method: Manifest.checked(path).fingerprint for method, path in models.items()},
        None if reference is None else reference.fingerprint,
        {survey: catalog.fingerprint for survey, catalog in stars.items()},
    )
    catalogs = [pairs, *stars.values(), *([reference] if reference else [])]
    inputs = [*(catalog.path for catalog in catalogs), *models.values()]
    output = Output.prepare(directory, recipe, overwrite, inputs)
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    require_evidence(cluster, pairs, "trends", _PROCESS_BYTES, _BYTES_A_PAIR)
    by_name = {axis.name: axis for axis in settings.axes if axis.name in pairs.schema.names}
    groups: dict[str, tuple[Axis, ...]] = {name: (axis,) for name, axis in by_name.items()}
    if by_name.keys() >= set(PLANE):
        groups[_PLANE_KEY] = tuple(by_name[name] for name in PLANE)
    parts = {key: _Part(output, key, axes, pairs, models, settings) for key, axes in groups.items()}
    with unless_complete(output):
        if not output.intact("common", "common"):
            write_piece(_common_file(output), _common_stars(reference, stars, settings.order))
            output.put_record("common", "common", {})
        fitted = {name: _Fitted(output, name, path, pairs) for name, path in models.items()}
        run_parts(output, "fitted", fitted, _fitted_part, cluster, "predictions", report)
        run_parts(output, "trends", parts, _trends_part, cluster, "trends", report)
        done = records(output, "trends", list(parts))
        lines = [key for key in parts if key != _PLANE_KEY]
        planes = [key for key in parts if key == _PLANE_KEY]
        files = []
        for file, kind, keys, empty in (
            (TRENDS, "trends", lines, trend_table([])),
            (PLANES, "trends", planes, trend_table([], plane=True)),
            (REFERENCES, "contrasts", lines, contrast_table([])),
            (REFERENCE_PLANES, "contrasts", planes, contrast_table([], plane=True)),
        ):
            pieces = [read_piece(_piece_file(output, kind, key)) for key in keys]
            table = pa.concat_tables([empty, *pieces])
            files.append(output.write_file(file, partial(write_parquet, table)))
        used = evidence(pairs, ["fold"])
        in_no_bin = {key: item["in_no_bin"] for key, item in zip(parts, done, strict=True)}
        output.commit(
            Rows(pairs.n_rows, used.table.num_rows, 0, used.dropped(pairs)),
            tuple(files),
            {
                "surveys": done[0]["surveys"] if done else {},
                "common_stars": read_piece(_common_file(output)).num_rows,
                "in_no_bin": in_no_bin,
                "agreements": [one for item in done for one in item["agreements"]],
            },
        )
    return output.load_manifest()


def _piece_file(output: Output, kind: str, key: str) -> Path:
    return output.work / "pieces" / f"{kind}-{key}.arrow"


def _common_file(output: Output) -> Path:
    return output.work / "pieces" / "common.arrow"


def _fitted_file(output: Output, method: str) -> Path:
    return output.work / "pieces" / f"fitted-{method}.arrow"


def _fitted_part(part: _Fitted) -> None:
    """Predictions of a model for the pairs that trained it, by their row among the pairs."""
    model = corrections.load(part.model)
    folds = model.info.train_folds
    table = evidence(part.pairs, [*LABELS, "fold"]).table
    rows = np.arange(table.num_rows)
    if folds is not None:
        rows = np.flatnonzero(np.isin(table["fold"].to_numpy(), folds))
    predicted = model.predict(features(*(floats32(table, label)[rows] for label in LABELS)))
    columns = [pa.array(np.ascontiguousarray(column)) for column in predicted.T]
    write_piece(
        _fitted_file(part.output, part.method),
        pa.table([pa.array(rows), *columns], names=["row", *_PREDICTIONS]),
    )
    part.output.put_record("fitted", part.method, {"pairs": len(rows)})


def _trends_part(part: _Part) -> None:
    """All trends against one quantity, or on the plane."""
    names = [axis.name for axis in part.axes]
    surveyed = part.pairs.columns(["survey_ref"])
    read = evidence(part.pairs, [*dict.fromkeys([*names, *DIFFERENCES]), *surveyed])
    table = read.table
    x = [floats32(table, name) for name in names]
    differences = [floats32(table, name) for name in DIFFERENCES]
    subsets = {ALL: np.ones(table.num_rows, dtype=np.bool_)}
    surveys: list[str] = []
    if surveyed:
        found = [name for name in pc.unique(table["survey_ref"]).to_pylist() if name is not None]
        surveys = _ordered(found, part.settings.order)
        subsets |= {
            name: pc.fill_null(pc.equal(table["survey_ref"], name), False).to_numpy()
            for name in surveys
        }
    samples: list[tuple[str, str | None, NDArray[np.int64], Sequence[NDArray[np.floating]]]]
    samples = [(BEFORE, None, np.arange(table.num_rows), differences)]
    for name, path in part.models.items():
        rows, predicted = read.held_out(path)
        corrected = [
            mine[rows].astype(np.float64) - predicted[:, i] for i, mine in enumerate(differences)
        ]
        samples.append((AFTER, name, rows, corrected))
        predicted = read_piece(_fitted_file(part.output, name))
        rows = predicted["row"].to_numpy()
        corrected = [
            mine[rows].astype(np.float64) - floats32(predicted, column)
            for mine, column in zip(differences, _PREDICTIONS, strict=True)
        ]
        samples.append((FITTED, name, rows, corrected))
    common = read_piece(_common_file(part.output))
    plane = part.key == _PLANE_KEY
    binnings = [(EQUAL_WIDTH, [axis.edges for axis in part.axes])]
    if not plane:
        n_bins = part.settings.n_count_bins
        binnings.append((EQUAL_COUNT, [equal_count_edges(values, n_bins) for values in x]))
    found_trends: list[Trend] = []
    contrasts: list[Contrast] = []
    for number, label in enumerate(LABELS):
        for binning, edges in binnings:
            about = partial(trend, edges=edges, label=label, against=tuple(names), binning=binning)
            before: dict[str, Trend] = {}
            for sample, method, rows, values in samples:
                for subset, inside in subsets.items():
                    chosen = inside[rows]
                    one = about(
                        [quantity[rows[chosen]] for quantity in x],
                        values[number][chosen],
                        subset=subset,
                        sample=sample,
                        method=method,
                    )
                    found_trends.append(one)
                    if sample == BEFORE:
                        before[subset] = one
            for first, second in combinations(surveys, 2):
                direct = None
                if set(names) <= set(LABELS):
                    same = pc.and_(
                        pc.equal(common["first"], first), pc.equal(common["second"], second)
                    )
                    both = common.filter(same)
                    if both.num_rows:
                        direct = about(
                            [floats32(both, name) for name in names],
                            floats32(both, f"{label}_diff"),
                            subset=f"{first},{second}",
                        )
                contrasts.append(
                    Contrast(before[first], before[second], direct, part.settings.min_count)
                )
    write_piece(
        _piece_file(part.output, "trends", part.key), trend_table(found_trends, plane=plane)
    )
    write_piece(
        _piece_file(part.output, "contrasts", part.key), contrast_table(contrasts, plane=plane)
    )
    whole = [
        t for t in found_trends if (t.binning, t.subset, t.sample) == (EQUAL_WIDTH, ALL, BEFORE)
    ]
    part.output.put_record(
        "trends",
        part.key,
        {
            "surveys": {name: int(np.count_nonzero(subsets[name])) for name in surveys},
            "in_no_bin": {
                t.label: int(np.count_nonzero(np.isfinite(values))) - int(t.quantiles.n.sum())
                for t, values in zip(whole, differences, strict=True)
            },
            "agreements": [
                {"binning": contrast.first.binning, **asdict(item)}
                for contrast in contrasts
                for item in agreements(contrast)
            ],
        },
    )


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
    schema = pa.schema(
        [
            ("first", pa.string()),
            ("second", pa.string()),
            *((name, pa.float32()) for name in (*LABELS, *DIFFERENCES)),
        ]
    )
    tables = [schema.empty_table()]
    if reference is None or len(stars) < 2:
        return tables[0]
    labels = common_stars(reference, stars).labels
    for first_name, second_name in combinations(_ordered(list(stars), order), 2):
        (ours, base), (theirs, other) = labels[first_name], labels[second_name]
        _, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
        columns = [
            *(base[label][i] for label in LABELS),
            *(other[label][j] - base[label][i] for label in LABELS),
        ]
        tables.append(
            pa.table(
                [
                    pa.array([first_name] * len(i), pa.string()),
                    pa.array([second_name] * len(i), pa.string()),
                    *(pa.array(column, pa.float32(), from_pandas=True) for column in columns),
                ],
                schema=schema,
            )
        )
    return pa.concat_tables(tables)


def read_trends(directory: Path) -> dict[str, Any]:
    """``trends``, the bins of one quantity, and ``agreements`` of the references as JSON values.

    Raises
    ------
    CatalogError, PartitionError
        They are unfinished, of another stage, or damaged.
    """
    manifest = manifest_of(directory, "trends")
    with partition_errors(directory / TRENDS):
        rows = pq.read_table(directory / TRENDS).to_pylist()
    return {"trends": rows, "agreements": manifest.summary["agreements"]}


def rms_of_medians(
    bins: Sequence[Mapping[str, Any]], min_count: int = MIN_COUNT
) -> tuple[float | None, int]:
    """Root mean square of the medians of bins with enough pairs, None without any; their number."""
    medians = [row["median"] for row in bins if row["n"] >= min_count]
    return (float(np.sqrt(np.mean(np.square(medians)))) if medians else None), len(medians)

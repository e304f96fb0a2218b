"""Stage compare: every trained method on the same pairs, and the one that corrects the catalog.

A task reads the pairs (`stages.evidence`: a million at most); then a task is a method (predictions
of the pairs it was trained on, artifacts), then a label (figures of all methods on the same
resamples). Those pairs are held at once: 150 bytes a pair, twice that while a label is ranked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask import corrections as models
from sos_dask.columns import floats32, matrix32
from sos_dask.errors import ModelError
from sos_dask.evidence.choice import BALANCED, TOLERANCE, check_rule, choose
from sos_dask.evidence.figures import NONE, TEST, TRAIN, Sample, Scored, figure_table, figures
from sos_dask.evidence.smoothness import (
    ARTIFACT_SCHEMA,
    MIN_CELLS,
    OUTSIDE_SCHEMA,
    Grid,
    artifact_rows,
    artifacts,
)
from sos_dask.evidence.trends import AXES, Axis
from sos_dask.problem import TEFF_UNIT_K, features
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import LABELS
from sos_dask.stages.evidence import DIFFERENCES, evidence, require_evidence
from sos_dask.stages.parts import manifest_of, records, run_parts, unless_complete
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stats.bootstrap import draw, group_of_stars
from sos_dask.stats.density import knn_distance, robust_scale
from sos_dask.storage.artifact import Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, partition_errors, write_parquet

VERSION = 3
COMPARISON, ARTIFACTS, OUTSIDE = "comparison.parquet", "artifacts.parquet", "outside.parquet"
SPARSE_SHARE = 0.05
N_NEIGHBOURS = 16
_PROCESS_BYTES = 300 << 20
_BYTES_A_PAIR = 400
_TIMED_ROWS = 100_000


@dataclass(frozen=True)
class CompareSettings:
    """Settings of the stage.

    Parameters
    ----------
    rule : str
        By which a method is chosen: see `sos_dask.evidence.choice`.
    n_bootstrap : int
        Resamples.
    min_pairs : int
        A subset with fewer pairs has no figures.
    min_bin_pairs : int
        A bin with fewer pairs has no median.
    min_cell_pairs : int
        A cell of label space with fewer training pairs is not covered.
    tolerance : float
        A method is worse only if it is by more than this share of the best.
    seed : int
    axes : tuple of Axis
        Bins along each label of the target; their cells make the grid of the artifacts.
    """

    rule: str = BALANCED
    n_bootstrap: int = 400
    min_pairs: int = 30
    min_bin_pairs: int = 50
    min_cell_pairs: int = 5
    tolerance: float = TOLERANCE
    seed: int = 0
    axes: tuple[Axis, ...] = tuple(axis for axis in AXES if axis.name in LABELS)


@dataclass(frozen=True)
class _Part:
    output: Output
    key: str
    pairs: Catalog
    models: Mapping[str, Path]
    settings: CompareSettings


def compare_recipe(pairs: str, models: Mapping[str, str], settings: CompareSettings) -> Recipe:
    """Recipe of `compare` for inputs of these fingerprints."""
    inputs = {"pairs": pairs, **{f"model.{method}": one for method, one in models.items()}}
    return Recipe("compare", VERSION, {"settings": asdict(settings)}, inputs)


def compare(
    pairs: Catalog,
    models: Mapping[str, Path],
    directory: Path,
    settings: CompareSettings | None = None,
    *,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Compare trained methods and choose one.

    Parameters
    ----------
    pairs : Catalog
        Output of crossmatch.
    models : mapping of str to Path
        Outputs of train for these pairs, by method, all validated in the same way.
    directory : Path
        Gets ``comparison.parquet``, ``artifacts.parquet`` and ``outside.parquet``: see
        `sos_dask.compare`.
    settings : CompareSettings, optional

    Returns
    -------
    Manifest
        ``rows``: pairs in, pairs used. ``summary``: ``method``, the one chosen, ``rule``, ``why``,
        ``scores`` it rests on, ``metrics`` of each method, pairs of both samples.

    Raises
    ------
    ModelError
        No model or one that is none, other held-out pairs, too few pairs.
    ConfigError
        Unknown rule.
    CatalogError, PartitionError
        Held-out pairs are damaged or those of other pairs.
    ClusterError
        The pairs are too many for a worker.
    """
    settings = settings or CompareSettings()
    pairs.require("use", "fold", "reference_star_id", *LABELS, *DIFFERENCES)
    if not models:
        raise ModelError("there is no model to compare", "Give the outputs of 'sos-dask train'.")
    check_rule(settings.rule, list(models))
    manifests = {method: _manifest_of(path) for method, path in models.items()}
    fingerprints = {method: manifest.fingerprint for method, manifest in manifests.items()}
    recipe = compare_recipe(pairs.fingerprint, fingerprints, settings)
    output = Output.prepare(directory, recipe, overwrite, [pairs.path, *models.values()])
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    require_evidence(cluster, pairs, "compare", _PROCESS_BYTES, _BYTES_A_PAIR)
    with unless_complete(output):
        of_pairs = {"pairs": _Part(output, "pairs", pairs, models, settings)}
        by_method = {key: _Part(output, key, pairs, models, settings) for key in models}
        by_label = {key: _Part(output, key, pairs, models, settings) for key in LABELS}
        run_parts(output, "pairs", of_pairs, _pairs_part, cluster, "compare pairs", report)
        run_parts(output, "methods", by_method, _method_part, cluster, "compare", report)
        run_parts(output, "labels", by_label, _label_part, cluster, "compare labels", report)
        of_methods = dict(zip(by_method, records(output, "methods", list(by_method)), strict=True))
        of_labels = records(output, "labels", list(by_label))
        (about,) = records(output, "pairs", ["pairs"])
        scored = [_scored(item) for item in of_labels]
        noise = {
            label: min(
                one.value for (method, name), one in of.items() if name == "mad" and method != NONE
            )
            for label, of in zip(LABELS, scored, strict=True)
        }
        rough, outside = artifact_rows(of_methods, noise)
        roughness = {
            method: _roughness([row for row in rough if row["method"] == method])
            for method in models
        }
        choice = choose(settings.rule, scored, roughness, settings.tolerance)
        found = pa.concat_tables([read_piece(_figures_file(output, label)) for label in LABELS])
        tables = {
            COMPARISON: found,
            ARTIFACTS: pa.Table.from_pylist(rough, schema=ARTIFACT_SCHEMA),
            OUTSIDE: pa.Table.from_pylist(outside, schema=OUTSIDE_SCHEMA),
        }
        files = [
            output.write_file(name, partial(write_parquet, table)) for name, table in tables.items()
        ]
        output.commit(
            Rows(pairs.n_rows, about["n_used"], 0, about["dropped"]),
            tuple(files),
            {
                **asdict(choice),
                "metrics": [
                    metric
                    for manifest in manifests.values()
                    for metric in manifest.summary["metrics"]
                ],
                "n_train": of_labels[0]["n_train"],
                "n_test": of_labels[0]["n_test"],
            },
        )
    return output.load_manifest()


def _roughness(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean roughness of the labels that have one; nan in too few cells, or without noise."""
    known = [row["roughness"] for row in rows if row["roughness"] is not None]
    enough = known and rows[0]["n_cells"] >= MIN_CELLS
    return float(np.mean(known)) if enough else float("nan")


def _manifest_of(model: Path) -> Manifest:
    """Manifest of a trained model, its files unchanged."""
    manifest = Manifest.checked(model)
    if not manifest.recipe.stage.startswith("train-"):
        raise ModelError(
            f"{model} is not a trained model but an output of '{manifest.recipe.stage}'",
            "Give the outputs of 'sos-dask train'.",
        )
    return manifest


def _pairs_file(output: Output) -> Path:
    return output.work / "pieces" / "pairs.arrow"


def _predictions_file(output: Output, method: str, sample: str) -> Path:
    return output.work / "pieces" / f"{sample}-{method}.arrow"


def _write_predictions(
    output: Output, method: str, sample: str, values: NDArray[np.float32]
) -> None:
    columns = {name: np.ascontiguousarray(values[:, i]) for i, name in enumerate(LABELS)}
    write_piece(_predictions_file(output, method, sample), pa.table(columns))


def _figures_file(output: Output, label: str) -> Path:
    return output.work / "pieces" / f"figures-{label}.arrow"


def _pairs_part(part: _Part) -> None:
    """Keep what all tasks need of the pairs: labels, samples, groups, density, predictions."""
    read = evidence(part.pairs, ["fold", "reference_star_id", *LABELS, *DIFFERENCES])
    table = read.table
    fold = table["fold"].to_numpy()
    rows: NDArray[np.int64] | None = None
    for method, path in part.models.items():
        mine, held_out = read.held_out(path)
        rows = mine if rows is None else rows
        if not np.array_equal(rows, mine):
            first = next(iter(part.models))
            raise ModelError(
                f"'{method}' holds out other pairs ({len(mine):,}) than '{first}' ({len(rows):,})",
                "Train all methods with the same validation.",
            )
        predicted = np.full((len(fold), len(LABELS)), np.nan, dtype=np.float32)
        predicted[mine] = held_out
        _write_predictions(part.output, method, TEST, predicted)
    test = np.zeros(len(fold), dtype=np.bool_)
    test[rows] = True
    # With k folds every pair is held out once, and the saved model is trained on all.
    train = np.ones_like(test) if test.all() else ~test
    encoded = pc.dictionary_encode(table["reference_star_id"].cast(pa.string())).combine_chunks()
    groups = group_of_stars(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]
    labels = matrix32(table, LABELS)
    kept = {
        **{label: labels[:, i] for i, label in enumerate(LABELS)},
        **{name: floats32(table, name) for name in DIFFERENCES},
        "group": groups,
        "test": test,
        "train": train,
        "sparse": _sparse(labels, train),
    }
    write_piece(_pairs_file(part.output), pa.table(kept))
    part.output.put_record(
        "pairs", "pairs", {"n_used": len(fold), "dropped": read.dropped(part.pairs)}
    )


def _sparse(labels: NDArray[np.float32], train: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pairs where the training pairs are as thin as around the thinnest 5 % of themselves."""
    x = features(*labels.T)
    known = np.isfinite(x).all(axis=1)
    sample = known & train
    if not sample.any():
        return np.ones(len(x), dtype=np.bool_)
    center, scale = robust_scale(x[sample])
    z = (x - center) / scale
    distance = np.full(len(x), np.inf)
    # A training pair is its own first neighbour.
    distance[sample] = knn_distance(z[sample], z[sample], N_NEIGHBOURS + 1)
    others = known & ~train
    if others.any():
        distance[others] = knn_distance(z[sample], z[others], N_NEIGHBOURS)
    return np.asarray(distance > np.quantile(distance[sample], 1 - SPARSE_SHARE))


def _method_part(part: _Part) -> None:
    """Predictions of the training pairs, and what the correction does on the grid."""
    settings = part.settings
    table = read_piece(_pairs_file(part.output))
    labels = matrix32(table, LABELS)
    correction = models.load(part.models[part.key])
    train = correction.predict(features(*labels.T))
    _write_predictions(part.output, part.key, TRAIN, train)
    sample = table["train"].to_numpy() & np.isfinite(labels).all(axis=1)
    grid = _grid(labels[sample], settings)
    unit = np.array([TEFF_UNIT_K, 1.0, 1.0])
    found = artifacts(
        lambda points: correction.predict(features(*points.T)),
        grid,
        (np.array(correction.info.minimum) * unit, np.array(correction.info.maximum) * unit),
        len(LABELS),
        settings.n_bootstrap,
        settings.seed,
    )
    part.output.put_record(
        "methods",
        part.key,
        {
            "n_cells": found[0].n_cells,
            "typical_count": grid.typical_count if found[0].n_cells else None,
            "labels": [one.record() for one in found],
        },
    )


def _grid(labels: NDArray[np.float32], settings: CompareSettings) -> Grid:
    by_name = {axis.name: axis.edges for axis in settings.axes}
    return Grid.of(labels, [by_name[label] for label in LABELS], settings.min_cell_pairs)


def _label_part(part: _Part) -> None:
    """Figures of one label in both samples."""
    settings = part.settings
    table = read_piece(_pairs_file(part.output))
    label = part.key
    before = table[f"{label}_diff"].to_numpy().astype(np.float64)
    labels = matrix32(table, LABELS)
    edges = {axis.name: axis.edges for axis in settings.axes}
    weights = draw(settings.n_bootstrap, settings.seed)
    found, n, scores = [], {}, {}
    for name in (TEST, TRAIN):
        inside = table[name].to_numpy()
        sample = Sample(
            name,
            labels[inside],
            table["group"].to_numpy()[inside],
            table["sparse"].to_numpy()[inside],
        )
        residuals = {NONE: before[inside]}
        for method in part.models:
            predicted = read_piece(_predictions_file(part.output, method, name))[label]
            residuals[method] = before[inside] - predicted.to_numpy()[inside]
        some, scored = figures(
            sample, label, residuals, edges, weights, settings.min_pairs, settings.min_bin_pairs
        )
        found += some
        n[f"n_{name}"] = int(np.count_nonzero(inside))
        if name == TEST:
            scores = scored
    write_piece(_figures_file(part.output, label), figure_table(found))
    part.output.put_record(
        "labels",
        label,
        {
            **n,
            "scores": [
                [method, name, score.value, score.replicates.tolist()]
                for (method, name), score in scores.items()
                if name in ("mad", "rms_binned")
            ],
        },
    )


def _scored(record: Mapping[str, Any]) -> dict[tuple[str, str], Scored]:
    return {
        (method, name): Scored(value, np.array(replicates))
        for method, name, value, replicates in record["scores"]
    }


def prediction_cost(model: Path) -> float:
    """CPU microseconds that a saved model needs for a row: measured here and now, best of three.

    It is no part of any output, which must not depend on the machine.
    """
    correction = models.load(model)
    rng = np.random.default_rng(0)
    low, high = np.array(correction.info.minimum), np.array(correction.info.maximum)
    x = rng.uniform(low, high, size=(_TIMED_ROWS, len(LABELS))).astype(np.float32)
    correction.predict(x)  # imports and look-ups are made once
    times = []
    for _ in range(3):
        before = time.process_time()
        correction.predict(x)
        times.append(time.process_time() - before)
    return 1e6 * min(times) / _TIMED_ROWS


def read_comparison(directory: Path) -> dict[str, Any]:
    """All of a comparison as JSON values: its summary, ``figures``, ``artifacts``, ``outside``.

    Raises
    ------
    CatalogError, PartitionError
        It is unfinished, of another stage, or damaged.
    """
    manifest = manifest_of(directory, "compare")
    found: dict[str, Any] = {
        key: value for key, value in manifest.summary.items() if key != "metrics"
    }
    for key, name in (("figures", COMPARISON), ("artifacts", ARTIFACTS), ("outside", OUTSIDE)):
        with partition_errors(directory / name):
            found[key] = pq.read_table(directory / name).to_pylist()
    return found

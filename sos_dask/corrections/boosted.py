"""Gradient-boosted trees (XGBoost), one ensemble per label: the model.

The loss is the pseudo-Huber of ``huber_slope`` times the spread of the differences. On 350,000
simulated pairs with 3 % outliers to one side it left two thirds of the error, and a third of the
bias, of squared error on clipped differences; the absolute error was no better and four times
slower, and its leaves would depend on the number of workers.

Training is data-parallel over a cluster (`boosted_cluster`) or in this process (`boosted_fit`).
With pairs laid out one block a worker, in the order of the workers' names, equal pairs on equally
many workers give equal bytes; another number of workers, or none, changes the last digits of sums
only. Both hold for ``subsample = 1``, the default: which pairs a tree sees otherwise depends on the
layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from sos_dask.corrections import (
    Content,
    Fitted,
    Float32Array,
    FloatArray,
    ModelInfo,
    Param,
    Progress,
    TrainingSource,
    boosted_cluster,
    boosted_fit,
    parse_json,
    summarise,
    to_json,
)
from sos_dask.corrections.cuda import find_gpu
from sos_dask.corrections.lookup import LookupTable, compile_trees
from sos_dask.errors import ModelError
from sos_dask.problem import FEATURES
from sos_dask.schema import LABELS

FILE = "boosted.json"
TABLE = "lookup.npy"
MIN_PAIRS = 50

PARAMS = {
    "n_rounds": Param(400, "Trees per label", 1, 20000),
    "max_depth": Param(4, "Depth of a tree", 1, 12),
    "learning_rate": Param(0.04, "Share of each tree's correction that is taken", 1e-4, 1.0),
    "min_child_weight": Param(2.0, "Smallest sum of second derivatives in a leaf", 0.0, 1e6),
    "subsample": Param(1.0, "Share of the pairs that each tree sees", 0.05, 1.0),
    "reg_lambda": Param(3.0, "Pull of the leaves to zero, in pairs", 0.0, 1e6),
    "max_bin": Param(256, "Bins of each feature", 2, 4096),
    "huber_slope": Param(
        0.2, "Residual at which the loss turns from square to linear, in spreads", 0.01, 100.0
    ),
    "stop_rounds": Param(
        0,
        "End when a training fold that is kept aside has not come closer for so many trees, and "
        "train so many on all folds; 0: n_rounds trees",
        0,
        10000,
    ),
    "nthread": Param(1, "Threads of each worker", 1, 1024),
    "seed": Param(0, "Seed of the subsamples", 0, 2**31 - 1),
    "device": Param("cpu", "Where to train", choices=("cpu", "cuda")),
    "timeout_s": Param(
        120, "Longest wait of a worker for the others in one step, in seconds", 1, 86400
    ),
}


# What `sos_dask.corrections.search` tries.
SEARCH = {
    "n_rounds": (100, 200, 400, 800),
    "max_depth": (3, 4, 5, 6, 8),
    "learning_rate": (0.02, 0.04, 0.08),
    "min_child_weight": (1.0, 2.0, 5.0, 10.0, 30.0),
    "reg_lambda": (1.0, 3.0, 10.0, 30.0),
}


class BoostedCorrection(Fitted):
    """Sums of trees.

    Parameters
    ----------
    info : ModelInfo
    ensembles : tuple of bytes
        The trees of each label in XGBoost's UBJSON; decoded where they are needed, since with a
        table they are not, and XGBoost takes more than a second to import.
    center, spread : ndarray of float64, shape (3,), K, dex, dex
        A difference is ``center + spread * (sum of the trees)``.
    table : LookupTable, optional
        The differences, compiled; a saved model has it unless its thresholds are too many.
    """

    def __init__(
        self,
        info: ModelInfo,
        ensembles: tuple[Content, ...],
        center: FloatArray,
        spread: FloatArray,
        table: LookupTable | None = None,
    ) -> None:
        super().__init__(info)
        self.ensembles = ensembles
        self.center = center
        self.spread = spread
        self.table = table

    @cached_property
    def boosters(self) -> tuple[Any, ...]:
        """The trees as ``xgboost.Booster``, one a label.

        Raises
        ------
        ModelError
            The installed XGBoost cannot read them, or they are of other features.
        """
        import xgboost

        try:
            boosters = tuple(xgboost.Booster(model_file=bytearray(e)) for e in self.ensembles)
        except xgboost.core.XGBoostError as error:
            raise ModelError(
                f"XGBoost {xgboost.__version__} cannot read the trees: {error}",
                "Install the XGBoost that the model was trained with, or train it again.",
            ) from None
        for label, booster in zip(LABELS, boosters, strict=True):
            if booster.num_features() != len(FEATURES):
                raise ModelError(f"{_file(label)}: {booster.num_features()} features, not 3")
            # A model trained on a GPU is used anywhere.
            booster.set_param({"nthread": 1, "device": "cpu"})
        return boosters

    def trees(self, features: Float32Array) -> Float32Array:
        """Sums of the trees, shape (n, 3), by XGBoost itself.

        Parameters
        ----------
        features : ndarray of float32, shape (n, 3)
            Finite: the direction that trees keep for missing values is never used.
        """
        x = np.ascontiguousarray(features)
        return np.stack([booster.inplace_predict(x) for booster in self.boosters], axis=1)

    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite features inside the box, shape (n, 3)."""
        if self.table is not None:
            return self.table.predict(features)
        return (self.center + self.spread * self.trees(features)).astype(np.float32)

    def files(self) -> Mapping[str, bytes]:
        """``boosted.json``, the trees of each label as UBJSON, and their look-up table."""
        document = {
            "formula": "center + spread * (sum of the trees)",
            "center": dict(zip(LABELS, self.center.tolist(), strict=True)),
            "spread": dict(zip(LABELS, self.spread.tolist(), strict=True)),
        }
        trees = {_file(label): bytes(e) for label, e in zip(LABELS, self.ensembles, strict=True)}
        table = self.table or compile_trees(self.boosters, self.center, self.spread)
        compiled = {} if table is None else {TABLE: table.to_bytes()}
        return {FILE: to_json(document), **trees, **compiled}


def _file(label: str) -> str:
    return f"{label}.ubj"


def restore(info: ModelInfo, files: Mapping[str, Content]) -> BoostedCorrection:
    """Model from its files; `ModelError` where they are incomplete."""
    document = parse_json(bytes(files.get(FILE, b"")), FILE)
    try:
        center = np.array([document["center"][label] for label in LABELS], dtype=np.float64)
        spread = np.array([document["spread"][label] for label in LABELS], dtype=np.float64)
        ensembles = tuple(files[_file(label)] for label in LABELS)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model 'boosted': incomplete or damaged ({error!r})") from None
    table = LookupTable.from_buffer(files[TABLE]) if TABLE in files else None
    correction = BoostedCorrection(info, ensembles, center, spread, table)
    if table is None:
        _ = correction.boosters  # so that trees that cannot be read are refused here
    return correction


def fit(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    params: Mapping[str, Any],
    client: Any,
    progress: Progress,
) -> BoostedCorrection:
    """Fit; see `sos_dask.corrections.fit`.

    Without a client the same trees are trained in this process, all pairs in its memory.
    """
    if params["device"] == "cuda" and client is None:
        find_gpu().require()
    summary = summarise(source, train_folds, client, "boosted", MIN_PAIRS)
    edges = boosted_fit.bin_edges(source, train_folds, client, summary, params["max_bin"])
    rounds = (params["n_rounds"],) * len(LABELS)
    job = boosted_fit.Job(source, train_folds, params, summary, edges, rounds)
    if client is None:
        if params["stop_rounds"]:
            job = replace(job, rounds=boosted_fit.count_rounds(job))
        boosters = boosted_fit.train(job, progress)
    else:
        if params["stop_rounds"]:
            job = replace(job, rounds=boosted_cluster.count_rounds(job, client))
        boosters = boosted_cluster.train(job, client, progress)
    info = summary.info("boosted", params, train_folds)
    ensembles = tuple(bytes(booster.save_raw("ubj")) for booster in boosters)
    return BoostedCorrection(info, ensembles, summary.center, summary.spread)

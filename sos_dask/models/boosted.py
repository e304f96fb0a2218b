"""Gradient-boosted trees (XGBoost), one ensemble per label, trained data-parallel over a cluster.

The loss is the pseudo-Huber of ``huber_slope`` times the spread of the differences. On 350,000
simulated pairs with 3 % outliers to one side it left two thirds of the error, and a third of the
bias, of squared error on clipped differences; the absolute error was no better and four times
slower, and its leaves would depend on the number of workers.

The bins of a feature are chosen here, from exact counts over all pairs, and not by XGBoost, whose
sketch depends on the order of the rows and on the workers. With pairs laid out one block a worker,
in the order of the workers' names, equal pairs on equally many workers give equal bytes; another
number of workers, or none, changes the last digits of sums only. Both hold for ``subsample = 1``,
the default: which pairs a tree sees otherwise depends on the layout.

With ``stop_rounds`` one training fold is kept aside to count the trees that help, label by label;
then all training folds grow so many. It is off by default, for it costs up to another training.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import multiprocessing
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from sos_dask.errors import ClusterError, ModelError, SosError
from sos_dask.features import FEATURES
from sos_dask.models import (
    Content,
    Fitted,
    Float32Array,
    FloatArray,
    IntArray,
    ModelInfo,
    Param,
    Progress,
    Rows,
    Summary,
    TrainingSource,
    map_batches,
    parse_json,
    release,
    summarise,
    to_json,
    training_rows,
)
from sos_dask.models.cuda import find_gpu, one_each
from sos_dask.models.lookup import LookupTable, compile_trees
from sos_dask.schema import LABELS

logger = logging.getLogger(__name__)

FILE = "boosted.json"
TABLE = "lookup.npy"
MIN_PAIRS = 50
TRIES = 3
# Edges of bins lie on a grid of this many cells over the range of a feature.
GRID = 4096
# Rows are sorted by cells of so many bins along each feature; 16 and 32 were a little slower.
_SIDE = 8

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


# What `sos_dask.models.search` tries.
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
            booster.set_param({"nthread": _threads(1), "device": "cpu"})
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
    """Fit; see `sos_dask.models.fit`.

    Without a client the same trees are trained in this process, all pairs in its memory.
    """
    if params["device"] == "cuda" and client is None:
        find_gpu().require()
    summary = summarise(source, train_folds, client, "boosted", MIN_PAIRS)
    edges = _edges(source, train_folds, client, summary, params["max_bin"])
    job = _Job(source, train_folds, params, summary, edges, (params["n_rounds"],) * len(LABELS))
    if params["stop_rounds"]:
        job = replace(job, rounds=_rounds(job) if client is None else _rounds_there(job, client))
    boosters = _fit_here(job, progress) if client is None else _fit_there(job, client, progress)
    info = summary.info("boosted", params, train_folds)
    ensembles = tuple(bytes(booster.save_raw("ubj")) for booster in boosters)
    return BoostedCorrection(info, ensembles, summary.center, summary.spread)


@dataclass(frozen=True)
class _Job:
    source: TrainingSource
    train_folds: Sequence[int] | None
    params: Mapping[str, Any]
    summary: Summary
    edges: tuple[Float32Array, ...]
    rounds: tuple[int, ...]  # of each label

    def booster_params(self) -> dict[str, Any]:
        names = (
            "max_depth", "learning_rate", "min_child_weight", "subsample", "reg_lambda", "max_bin",
            "huber_slope", "nthread", "seed", "device",
        )  # fmt: skip
        return {
            "tree_method": "hist",
            "objective": "reg:pseudohubererror",
            "base_score": 0.0,  # differences are centred
            "validate_parameters": True,
            "verbosity": 0,
            **{name: self.params[name] for name in names},
        }


def _edges(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    client: Any,
    summary: Summary,
    max_bin: int,
) -> tuple[Float32Array, ...]:
    """Lower edges of the bins of each feature: about equally many pairs in each."""
    low, width = summary.minimum, summary.maximum - summary.minimum
    counts = sum(map_batches(_cells, source, client, train_folds, low, width))
    edges = []
    for column, of_cells in enumerate(np.asarray(counts)):
        below = np.cumsum(of_cells) - of_cells
        wanted = np.arange(1, max_bin) * of_cells.sum() / max_bin
        cells = np.unique(np.searchsorted(below, wanted))
        cells = np.concatenate([[0], cells[(cells > 0) & (cells < GRID)]])
        values = low[column] + width[column] * cells / GRID
        edges.append(np.unique(values.astype(np.float32)))
    return tuple(edges)


def _cells(
    source: TrainingSource,
    index: int,
    train_folds: Sequence[int] | None,
    low: FloatArray,
    width: FloatArray,
) -> IntArray:
    """Training rows in each cell of the grid, shape (3, GRID)."""
    x = training_rows(source.load(index), train_folds).features.astype(np.float64)
    cells = (x - low) * (GRID / np.where(width > 0, width, 1.0))
    cells = np.minimum(cells.astype(np.int64), GRID - 1)
    return np.stack([np.bincount(column, minlength=GRID) for column in cells.T])


def _block(job: _Job, first: int, stop: int) -> Rows:
    """Training rows of some batches, differences in units of their spread.

    Each feature is the lower edge of its bin: so the thresholds of all trees are such edges. Rows
    of neighbouring bins lie together, which makes XGBoost a third faster: the way of a row through
    a tree is mostly that of the row before.
    """
    parts = [
        training_rows(job.source.load(index), job.train_folds)
        for index in range(first, stop)
        if job.summary.n_rows[index]
    ]
    features = np.concatenate([part.features for part in parts])
    bins = [
        np.searchsorted(of_column, column, side="right") - 1
        for of_column, column in zip(job.edges, features.T, strict=True)
    ]
    order = np.lexsort([of_column // _SIDE for of_column in bins])
    differences = np.concatenate([part.differences for part in parts])[order].astype(np.float64)
    weight = np.concatenate([part.weight for part in parts])[order]
    return Rows(
        np.stack([e[of_column[order]] for e, of_column in zip(job.edges, bins, strict=True)], 1),
        ((differences - job.summary.center) / job.summary.spread).astype(np.float32),
        (weight / job.summary.mean_weight).astype(np.float32),
    )


def _of_label(rows: Rows, label: int) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Features, differences and weights of the rows that know a label."""
    known = np.isfinite(rows.differences[:, label])
    return rows.features[known], rows.differences[known, label], rows.weight[known]


def _matrix(job: _Job, rows: Rows, label: int, bins_of: Any = None) -> Any:
    import xgboost

    x, y, weight = _of_label(rows, label)
    return xgboost.QuantileDMatrix(
        x,
        y,
        weight=weight,
        feature_names=list(FEATURES),
        max_bin=job.params["max_bin"],
        nthread=job.params["nthread"],
        ref=bins_of,
    )


def _rounds(job: _Job) -> tuple[int, ...]:
    """Trees of each label after which the last training fold came no closer, in one process."""
    import xgboost

    if job.params["device"] == "cuda":
        find_gpu().require()
    folds = job.train_folds
    if folds is None:
        seen = [job.source.load(index).fold for index in range(job.source.n_batches)]
        folds = [int(fold) for fold in np.unique(np.concatenate(seen))]
    if len(folds) < 2:
        raise ModelError(
            f"stop_rounds needs two training folds or more, not {len(folds)}",
            "Raise crossmatch.n_folds, or set stop_rounds = 0.",
        )
    *others, kept = sorted(folds)
    n = job.source.n_batches
    train = _block(replace(job, train_folds=others), 0, n)
    stop = _block(replace(job, train_folds=[kept]), 0, n)
    rounds = []
    for number, label in enumerate(LABELS):
        for name, part in (("others", train), ("one kept aside", stop)):
            if not np.isfinite(part.differences[:, number]).any():
                raise ModelError(f"stop_rounds: the training fold ({name}) has no known {label}")
        matrix = _matrix(job, train, number)
        booster = xgboost.train(
            job.booster_params(),
            matrix,
            job.params["n_rounds"],
            evals=[(_matrix(job, stop, number, matrix), "kept")],
            early_stopping_rounds=job.params["stop_rounds"],
            verbose_eval=False,
        )
        rounds.append(int(booster.best_iteration) + 1)
    return tuple(rounds)


def _rounds_there(job: _Job, client: Any) -> tuple[int, ...]:
    """`_rounds` by one worker."""
    from distributed import KilledWorker

    try:
        rounds: tuple[int, ...] = client.submit(_rounds, job, pure=False).result()
    except KilledWorker as error:
        raise ClusterError(
            f"stop_rounds: the fit that counts trees killed its worker again and again ({error})",
            "Most often it ran out of memory: it needs all pairs. Give workers more, or set "
            "stop_rounds = 0.",
        ) from error
    return rounds


def _threads(wanted: int) -> int:
    """Threads to use: a worker has so many; the process that was started has the whole machine.

    Neither trees nor predictions depend on it.
    """
    from dask.system import CPU_COUNT

    return wanted if multiprocessing.parent_process() else max(wanted, CPU_COUNT)


def _fit_here(job: _Job, progress: Progress) -> tuple[Any, ...]:
    import xgboost

    rows = _block(job, 0, job.source.n_batches)
    params = job.booster_params()
    params["nthread"] = _threads(params["nthread"])
    matrix: Any = None
    before, boosters = None, []
    for number in range(len(LABELS)):
        known = np.isfinite(rows.differences[:, number])
        if before is not None and np.array_equal(known, before):
            matrix.set_label(rows.differences[known, number])  # the bins are the same
        else:
            matrix = _matrix(job, rows, number)
        before = known
        boosters.append(xgboost.train(params, matrix, job.rounds[number]))
        progress("boosted", number + 1, len(LABELS))
    return tuple(boosters)


def _fit_there(job: _Job, client: Any, progress: Progress) -> tuple[Any, ...]:
    """Train on the cluster; after a loss of workers, again on those that are left."""
    import xgboost
    from distributed import CancelledError, KilledWorker
    from distributed.comm import CommClosedError

    losses = (
        xgboost.core.XGBoostError,
        CancelledError,
        asyncio.CancelledError,
        CommClosedError,
        KilledWorker,
        _LostError,
        AssertionError,  # xgboost.dask asserts that all parts are there
        RuntimeError,  # xgboost.dask: "Missing required workers"
        ValueError,  # xgboost.dask: "Invalid worker address"
        OSError,
        TimeoutError,
    )
    boosters: dict[int, Any] = {}
    wanted, tracker = 1, uuid.uuid4().hex
    for attempt in range(1, TRIES + 1):
        try:
            workers = _workers(client, wanted, job.params["timeout_s"])
            wanted = len(workers)
            if job.params["device"] == "cuda":
                asked = [client.submit(find_gpu, pure=False, **_on(w)) for w in workers]
                _collect(client, asked, workers, job.params["timeout_s"])
                workers = one_each(dict(zip(workers, client.gather(asked), strict=True)))
            _train_labels(job, client, workers, boosters, tracker, progress)
            return tuple(boosters[number] for number in range(len(LABELS)))
        except SosError:
            raise
        except losses as error:
            # XGBoost adds a stack trace of its own.
            text = " ".join(str(error).split("Stack trace")[0].split())
            failure = f"{type(error).__name__}: {text}"
            logger.warning("boosted: try %d of %d failed: %s", attempt, TRIES, failure)
        finally:
            with contextlib.suppress(Exception):
                client.run_on_scheduler(_stop_tracker, tracker)
    raise ClusterError(
        f"training was lost {TRIES} times, at last by {failure}",
        "Look at the workers' logs: most often they run out of memory or their node goes away. "
        "Where workers only wait long for each other, raise boosted.timeout_s.",
    )


class _LostError(Exception):
    """A worker is gone or does not answer."""


def _on(worker: str) -> dict[str, Any]:
    # Should the worker go, the task must fail or move: one that waits for it would wait for ever.
    return {"workers": [worker], "allow_other_workers": True}


def _heartbeats(client: Any) -> dict[str, float]:
    """Addresses of the workers, by name, with the time of their last heartbeat."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    by_name = sorted(workers, key=lambda address: (str(workers[address]["name"]), address))
    return {address: float(workers[address]["last_seen"]) for address in by_name}


def _workers(client: Any, wanted: int, timeout_s: float) -> list[str]:
    """Addresses of workers that answer, by name. A frozen one is still known to the scheduler."""
    from distributed import wait

    # Time for a nanny to bring a dead worker back.
    with contextlib.suppress(TimeoutError):
        client.wait_for_workers(wanted, timeout=20)
    asked = {
        worker: client.submit(_ping, worker, pure=False, workers=[worker])
        for worker in _heartbeats(client)
    }
    if asked:
        with contextlib.suppress(TimeoutError):
            wait(list(asked.values()), timeout=min(30.0, timeout_s))
    alive = [worker for worker, future in asked.items() if future.status == "finished"]
    release(list(asked.values()))
    if not alive:
        raise _LostError("no worker answers")
    return alive


def _ping(worker: str) -> str:
    return worker


def _collect(client: Any, futures: Sequence[Any], workers: Sequence[str], timeout_s: float) -> None:
    """Wait for tasks as long as the workers that were asked are there; raise what they raised."""
    from distributed import wait

    # The clocks of scheduler and client may differ: only whether a heartbeat is new counts.
    heard = {worker: (0.0, time.monotonic()) for worker in workers}
    patience_s = max(timeout_s, 20.0)
    while True:
        with contextlib.suppress(TimeoutError):
            wait(futures, timeout=2)
        for future in futures:
            if future.status in ("error", "cancelled", "lost"):
                future.result(timeout=10)
                raise _LostError(f"a task is {future.status}")
        if all(future.status == "finished" for future in futures):
            return
        now, beats = time.monotonic(), _heartbeats(client)
        for worker, (beat, since) in heard.items():
            if worker not in beats:
                raise _LostError(f"worker {worker} is gone")
            if beats[worker] != beat:
                heard[worker] = (beats[worker], now)
            elif now - since > patience_s:
                raise _LostError(f"worker {worker} has been silent for {patience_s:g} s")


def _train_labels(
    job: _Job,
    client: Any,
    workers: Sequence[str],
    boosters: dict[int, Any],
    tracker: str,
    progress: Progress,
) -> None:
    """Train the labels that have no booster yet."""
    cuts = _shares(job.summary.n_rows, len(workers))
    used = list(workers[: len(cuts)])
    blocks = [
        client.submit(_block, job, first, stop, pure=False, **_on(worker))
        for worker, (first, stop) in zip(used, cuts, strict=True)
    ]
    try:
        _collect(client, blocks, used, job.params["timeout_s"])
        for number in range(len(LABELS)):
            if number not in boosters:
                boosters[number] = _train_label(job, client, used, blocks, tracker, number)
            progress("boosted", number + 1, len(LABELS))
    finally:
        release(blocks)


def _shares(n_rows: Sequence[int] | Any, n_workers: int) -> list[tuple[int, int]]:
    """Runs of batches with about equally many rows, none empty, at most one a worker."""
    ends = np.cumsum(n_rows)
    targets = ends[-1] * np.arange(1, n_workers + 1) / n_workers
    # The batch whose middle a target passes goes to the run before it.
    stops = np.searchsorted(ends - np.asarray(n_rows) / 2, targets, side="right")
    stops[-1] = len(ends)
    runs = zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True)
    return [(a, b) for a, b in runs if np.sum(n_rows[a:b]) > 0]


def _train_label(
    job: _Job,
    client: Any,
    workers: Sequence[str],
    blocks: Sequence[Any],
    tracker: str,
    number: int,
) -> Any:
    import dask.array as da
    from xgboost import dask as xgboost_dask
    from xgboost.collective import Config

    parts = [
        client.submit(_of_label, block, number, pure=False, **_on(worker))
        for block, worker in zip(blocks, workers, strict=True)
    ]
    columns = [
        [client.submit(_item, part, item, pure=False, **_on(w)) for item in range(3)]
        for part, w in zip(parts, workers, strict=True)
    ]
    sizes = [
        client.submit(len, column[1], pure=False, **_on(w))
        for column, w in zip(columns, workers, strict=True)
    ]
    futures = [future for column in columns for future in column]
    try:
        timeout_s = job.params["timeout_s"]
        _collect(client, [*futures, *sizes], workers, timeout_s)
        n = client.gather(sizes)
        x, y, weight = (
            da.concatenate(
                [
                    da.from_delayed(column[item], shape=(rows, *tail), dtype=np.float32)
                    for column, rows in zip(columns, n, strict=True)
                ]
            )
            for item, tail in ((0, (len(FEATURES),)), (1, ()), (2, ()))
        )
        matrix = xgboost_dask.DaskQuantileDMatrix(
            client,
            x,
            y,
            weight=weight,
            feature_names=list(FEATURES),
            max_bin=job.params["max_bin"],
        )
        with _tracker_apart(tracker):
            result = xgboost_dask.train(
                client,
                job.booster_params(),
                matrix,
                num_boost_round=job.rounds[number],
                # Workers meet only when the slowest has imported all it needs.
                coll_cfg=Config(retry=3, timeout=timeout_s, tracker_timeout=max(timeout_s, 60)),
            )
        return result["booster"]
    finally:
        release([*futures, *sizes, *parts])


def _item(values: tuple[Any, ...], index: int) -> Any:
    return values[index]


# The tracker, where the workers of a training meet, ends its whole process (std::terminate on "send
# system error:Broken pipe", XGBoost 3.2) when a worker goes while they do. xgboost.dask starts it
# in the process of the scheduler, which is this one for a cluster on one machine. So it gets a
# process of its own.
_TRACKER = """
import json, os, sys
from xgboost.core import XGBoostError
from xgboost.tracker import RabitTracker

trackers = []
for line in sys.stdin:
    n_workers, addresses, timeout = json.loads(line)
    answer = None
    for host, port in addresses:
        try:
            tracker = RabitTracker(n_workers, host, port, sortby="task", timeout=timeout)
            tracker.start()
            answer = tracker.worker_args()
        except (OSError, ValueError, XGBoostError):
            continue
        trackers.append(tracker)
        break
    print(json.dumps(answer), flush=True)
os._exit(0)
"""
_TRACKERS: dict[str, subprocess.Popen[str]] = {}  # of the scheduler's process


@contextlib.contextmanager
def _tracker_apart(name: str) -> Iterator[None]:
    """Make xgboost.dask start its tracker by `_start_tracker`."""
    from xgboost import dask as xgboost_dask

    original = xgboost_dask._start_tracker
    xgboost_dask._start_tracker = partial(_start_tracker, name)
    try:
        yield
    finally:
        xgboost_dask._start_tracker = original


async def _start_tracker(
    name: str,
    n_workers: int,
    address_of_scheduler: str | None,
    address_of_user: tuple[str, int] | None,
    timeout: int | None,
) -> dict[str, str | int]:
    """Runs in the scheduler; what workers need to find a new tracker."""
    addresses = [address_of_user, (address_of_scheduler, 0), (None, 0)]
    request = json.dumps([n_workers, [address for address in addresses if address], timeout or 0])
    return await asyncio.to_thread(_ask_tracker, name, request)


def _ask_tracker(name: str, request: str) -> dict[str, str | int]:
    process = _TRACKERS.get(name)
    if process is None or process.poll() is not None:
        _stop_tracker(name)
        process = subprocess.Popen(
            [sys.executable, "-c", _TRACKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        _TRACKERS[name] = process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request + "\n")
    process.stdin.flush()
    answer: dict[str, str | int] | None = json.loads(process.stdout.readline() or "null")
    if answer is None:
        raise OSError("the tracker of XGBoost did not start")
    return answer


def _stop_tracker(name: str) -> None:
    """Runs in the scheduler: end the trackers of one fit."""
    process = _TRACKERS.pop(name, None)
    if process is not None:
        process.kill()
        process.communicate()

"""Corrections: a difference target - reference per label, as a function of the target's features.

A module of this package that has ``PARAMS`` is a method and needs no other entry. It offers

* ``PARAMS``: mapping of parameter name to `Param`;
* ``fit(source, train_folds, params, client, progress) -> Fitted``, with complete, checked params;
* ``restore(info, files) -> Fitted``, from what `Fitted.save` wrote.
"""

from __future__ import annotations

import abc
import hashlib
import importlib
import json
import math
import mmap
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sos_dask import __version__
from sos_dask.errors import ClusterError, ConfigError, ModelError
from sos_dask.features import BLOCK_ROWS, FEATURES
from sos_dask.schema import LABELS, nearest

MODEL_FORMAT = 2
MODEL_FILE = "model.json"
SEAL = "sha256"

R = TypeVar("R")
Float32Array = NDArray[np.float32]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Progress = Callable[[str, int, int], None]


Content = bytes | memoryview
_SMALL_FILE = 1 << 20


@dataclass(frozen=True)
class Batch:
    """Pairs of one partition.

    Parameters
    ----------
    features : ndarray of float32, shape (n, 3)
        Of the target, as `sos_dask.features.features` makes them.
    differences : ndarray of float32, shape (n, 3)
        Target - reference in the order of ``LABELS`` (K, dex, dex); nan where unknown.
    fold : ndarray of int8, shape (n,)
    weight : ndarray of float32, shape (n,)
        Relative: only ratios matter. Pairs of weight 0 are not used.
    errors : ndarray of float32, shape (n, 3), optional
        Of the target's labels (K, dex, dex); nan where unknown.
    """

    features: Float32Array
    differences: Float32Array
    fold: NDArray[np.int8]
    weight: Float32Array
    errors: Float32Array | None = None


class TrainingSource(Protocol):
    """Where pairs come from: picklable, batches are loaded where they are used."""

    @property
    def n_batches(self) -> int:
        """Number of batches."""

    def load(self, index: int) -> Batch:
        """Read one batch."""


class Correction(Protocol):
    """A fitted correction."""

    @property
    def method(self) -> str:
        """Name of the method."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels, in the order of the columns of a prediction."""

    def predict(self, features: Float32Array) -> Float32Array:
        """Predicted differences target - reference, shape (n, 3)."""

    def in_range(self, features: Float32Array) -> NDArray[np.bool_]:
        """Rows inside the box of the training pairs, shape (n,)."""

    def save(self, directory: Path) -> None:
        """Write a model that `load` reads."""


@dataclass(frozen=True)
class Param:
    """One parameter of a method.

    Parameters
    ----------
    default : int, float or str
        An int default takes whole numbers only.
    meaning : str
    minimum, maximum : float
        Inclusive.
    choices : tuple of str
        Accepted texts.
    """

    default: int | float | str
    meaning: str
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> int | float | str:
        """``value`` in the type of the default; `ConfigError` where it is not possible."""
        if self.choices:
            if value not in self.choices:
                raise ConfigError(
                    f"{name} = {value!r} is not one of {', '.join(self.choices)}",
                    nearest(str(value), self.choices),
                )
            return str(value)
        whole = isinstance(self.default, int)
        kinds = "a whole number" if whole else "a number"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} = {value!r} is not {kinds}")
        if whole and value != int(value):
            raise ConfigError(f"{name} = {value!r} is not {kinds}")
        if not self.minimum <= value <= self.maximum:
            raise ConfigError(f"{name} = {value!r} is outside {self.minimum:g} .. {self.maximum:g}")
        return int(value) if whole else float(value)


@dataclass(frozen=True)
class ModelInfo:
    """What every model states about itself.

    Parameters
    ----------
    method : str
    params : mapping
        Complete.
    minimum, maximum : tuple of float
        Range of each feature over the training pairs.
    n_pairs : tuple of int
        Training pairs of each label.
    train_folds : tuple of int, optional
        None: all.
    """

    method: str
    params: Mapping[str, int | float | str]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    n_pairs: tuple[int, ...]
    train_folds: tuple[int, ...] | None = None


class Fitted(abc.ABC):
    """Base of all corrections: the training box, missing features, saving.

    Outside the box of its training pairs a correction is held at the value on the nearest face:
    features are clamped to the box, feature by feature. `in_range` says where that was not needed.

    Parameters
    ----------
    info : ModelInfo
    """

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.info.method

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels, in the order of the columns of a prediction."""
        return LABELS

    def predict(self, features: Float32Array) -> Float32Array:
        """Predicted differences target - reference.

        A row's prediction does not depend on the other rows.

        Parameters
        ----------
        features : ndarray of float32, shape (n, 3)

        Returns
        -------
        ndarray of float32, shape (n, 3)
            K, dex, dex, each column contiguous. nan in all labels where any feature is nan or
            infinite.
        """
        x = _checked(features)
        low, high = self._box()
        out = np.empty((len(LABELS), len(x)), dtype=np.float32).T
        for start in range(0, len(x), BLOCK_ROWS):
            block = x[start : start + BLOCK_ROWS]
            known = _in_all_columns(np.isfinite(block))
            block = np.clip(block, low, high)
            if known.all():
                out[start : start + BLOCK_ROWS] = self.evaluate(block)
            else:
                block[~known] = low
                found = self.evaluate(block)
                found[~known] = np.nan
                out[start : start + BLOCK_ROWS] = found
        return out

    def in_range(self, features: Float32Array) -> NDArray[np.bool_]:
        """Rows inside the box of the training pairs; False where a feature is nan.

        Parameters
        ----------
        features : ndarray of float32, shape (n, 3)

        Returns
        -------
        ndarray of bool, shape (n,)
        """
        x = _checked(features)
        low, high = self._box()
        return _in_all_columns((x >= low) & (x <= high))

    def _box(self) -> tuple[Float32Array, Float32Array]:
        return (
            np.array(self.info.minimum, dtype=np.float32),
            np.array(self.info.maximum, dtype=np.float32),
        )

    @abc.abstractmethod
    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite features inside the box, shape (n, 3); a new array."""

    @abc.abstractmethod
    def files(self) -> Mapping[str, bytes]:
        """Content of the method's own files, by name; the same model gives the same bytes."""

    def save(self, directory: Path) -> None:
        """Write the model: ``model.json`` and the method's own files.

        Parameters
        ----------
        directory : Path
            Made where missing. Equal models give equal bytes.
        """
        directory.mkdir(parents=True, exist_ok=True)
        files = self.files()
        for name, content in files.items():
            (directory / name).write_bytes(content)
        info = self.info
        document = {
            "format": MODEL_FORMAT,
            "sos_dask": __version__,
            "method": info.method,
            "labels": list(LABELS),
            "features": list(FEATURES),
            "params": dict(sorted(info.params.items())),
            "train_folds": None if info.train_folds is None else list(info.train_folds),
            "n_pairs": dict(zip(LABELS, info.n_pairs, strict=True)),
            "training_range": {
                name: [low, high]
                for name, low, high in zip(FEATURES, info.minimum, info.maximum, strict=True)
            },
            "files": {
                name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())
            },
        }
        (directory / MODEL_FILE).write_bytes(sealed(document))


def _in_all_columns(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    # Several times faster than a reduction over so short an axis.
    return np.asarray(mask[:, 0] & mask[:, 1] & mask[:, 2])


def _checked(features: Float32Array) -> Float32Array:
    x = np.asarray(features, dtype=np.float32)
    if x.ndim != 2 or x.shape[1] != len(FEATURES):
        raise ModelError(f"features have shape {x.shape}, not (n, {len(FEATURES)})")
    return x


def sealed(document: Mapping[str, Any]) -> bytes:
    """JSON text of a document with the SHA-256 of all else in it."""
    return to_json({**document, SEAL: hashlib.sha256(to_json(document)).hexdigest()})


def to_json(document: Any) -> bytes:
    """JSON text, always the same for the same content; floats keep every bit."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


@cache
def methods() -> tuple[str, ...]:
    """Names of the methods, sorted."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "PARAMS")
    )


def _module(method: str) -> Any:
    if method not in methods():
        raise ConfigError(
            f"there is no method '{method}'",
            nearest(method, methods()) or f"Known are: {', '.join(methods())}.",
        )
    return importlib.import_module(f"{__name__}.{method}")


def parameters(method: str) -> Mapping[str, Param]:
    """Parameters of a method.

    Raises
    ------
    ConfigError
        Unknown method.
    """
    params: Mapping[str, Param] = _module(method).PARAMS
    return params


def check_params(method: str, params: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Complete parameters of a method: those given, and the defaults of the others.

    Raises
    ------
    ConfigError
        Unknown method or parameter (with the nearest name), wrong type, out of range.
    """
    known = parameters(method)
    for name in params:
        if name not in known:
            raise ConfigError(
                f"method '{method}' has no parameter '{name}'",
                nearest(name, known) or f"Known are: {', '.join(known)}.",
            )
    return {
        name: param.check(f"{method}.{name}", params.get(name, param.default))
        for name, param in known.items()
    }


def fit(
    method: str,
    source: TrainingSource,
    *,
    train_folds: Sequence[int] | None = None,
    params: Mapping[str, Any] | None = None,
    client: Any = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fit a correction.

    Parameters
    ----------
    method : str
        One of `methods`.
    source : TrainingSource
    train_folds : sequence of int, optional
        Only pairs of these folds are used; None: all pairs.
    params : mapping, optional
        See `parameters`.
    client : distributed.Client, optional
        Batches are loaded and worked on by its workers; None: in this process.
    progress : callable, optional
        Called with (step, done, total).

    Raises
    ------
    ConfigError
        Unknown method, or a wrong parameter.
    ModelError
        Too few pairs, a label that is constant or never known, no GPU for ``device = "cuda"``.
    ClusterError
        The cluster lost its workers again and again.
    """
    complete = check_params(method, params or {})
    folds = None if train_folds is None else tuple(int(fold) for fold in train_folds)
    fitted: Fitted = _module(method).fit(
        source, folds, complete, client, progress or (lambda step, done, total: None)
    )
    return fitted


def load(directory: Path, *, check: bool = True) -> Fitted:
    """Read a model that `Fitted.save` wrote.

    Parameters
    ----------
    directory : Path
    check : bool
        Compare the SHA-256 of its files with that stated; False only where another process of the
        same command has done so: tables are large.

    Raises
    ------
    ModelError
        A file is missing or not the one that was saved, the format is that of another version, or
        the model is one of other labels, features or methods.
    """
    directory = Path(directory)
    path = directory / MODEL_FILE
    document = parse_json(_read(path), path)
    if document.get("format") != MODEL_FORMAT:
        raise ModelError(
            f"{path}: model format {document.get('format')!r} is not {MODEL_FORMAT}",
            f"It was written by sos-dask {document.get('sos_dask')}, this is {__version__}: train "
            "it again.",
        )
    if document.pop(SEAL, None) != hashlib.sha256(to_json(document)).hexdigest():
        raise ModelError(
            f"{path} was changed after the model was saved: its SHA-256 is another one",
            "Restore it, or train the model again.",
        )
    for key, expected in (("labels", LABELS), ("features", FEATURES)):
        if document.get(key) != list(expected):
            raise ModelError(f"{path}: {key} are {document.get(key)}, not {list(expected)}")
    if document.get("method") not in methods():
        raise ModelError(
            f"{path}: method {document.get('method')!r} is not one of {', '.join(methods())}"
        )
    try:
        folds = document["train_folds"]
        ranges = [document["training_range"][name] for name in FEATURES]
        info = ModelInfo(
            method=document["method"],
            params=document["params"],
            minimum=tuple(float(low) for low, _ in ranges),
            maximum=tuple(float(high) for _, high in ranges),
            n_pairs=tuple(int(document["n_pairs"][label]) for label in LABELS),
            train_folds=None if folds is None else tuple(folds),
        )
        hashes = {str(name): str(value) for name, value in document["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: incomplete or damaged ({error!r})") from None
    files: dict[str, Content] = {}
    for name, expected_hash in hashes.items():
        if Path(name).name != name:
            raise ModelError(f"{path}: '{name}' is not a file name")
        files[name] = _mapped(directory / name)
        if check and hashlib.sha256(files[name]).hexdigest() != expected_hash:
            raise ModelError(
                f"{directory / name} is not the file that was saved with the model",
                "Its SHA-256 is another one: restore it, or train the model again.",
            )
    fitted: Fitted = _module(info.method).restore(info, files)
    return fitted


def _mapped(path: Path) -> Content:
    """Content of a file that workers on one machine share in memory; small ones are read."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < _SMALL_FILE:
                return file.read()
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: {error.strerror}", "A model is a directory that 'sos-dask train' has written."
        ) from None


def parse_json(content: bytes, name: Path | str) -> dict[str, Any]:
    """Decode a JSON object; `ModelError` where it is none."""
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{name}: not a JSON object")
    return document


@dataclass(frozen=True)
class Rows:
    """Training rows of a batch: features are finite, the weight is positive."""

    features: Float32Array
    differences: Float32Array
    weight: Float32Array


def training_rows(batch: Batch, train_folds: Sequence[int] | None) -> Rows:
    """Rows of a batch that can train: of the folds, with finite features and a known difference."""
    use = np.isfinite(batch.features).all(axis=1)
    use &= np.isfinite(batch.differences).any(axis=1) & (batch.weight > 0)
    use &= np.isfinite(batch.weight)
    if train_folds is not None:
        use &= np.isin(batch.fold, np.asarray(train_folds, dtype=np.int64))
    differences = batch.differences[use]
    return Rows(
        batch.features[use],
        np.where(np.isfinite(differences), differences, np.float32(np.nan)),
        batch.weight[use],
    )


def map_batches(
    function: Callable[..., R], source: TrainingSource, client: Any, *arguments: Any
) -> list[R]:
    """Call ``function(source, index, *arguments)`` for every batch.

    Parameters
    ----------
    function : callable
        Importable by its name on every worker; what it gives back is small.

    Returns
    -------
    list
        In the order of the batches, whoever was first.
    """
    indices = range(source.n_batches)
    if client is None:
        return [function(source, index, *arguments) for index in indices]
    from distributed import KilledWorker

    futures = client.map(_call, indices, call=(function, source, arguments), pure=False)
    try:
        results: list[R] = client.gather(futures)
    except KilledWorker as error:
        raise ClusterError(
            f"{function.__name__}: a batch killed its worker again and again ({error})",
            "Most often it ran out of memory: give workers more, or lower rows_per_partition.",
        ) from error
    finally:
        release(futures)
    return results


def release(futures: Sequence[Any]) -> None:
    """Let go of futures; what no one else wants is stopped and forgotten.

    ``Client.cancel`` is no substitute: where a cancelled task has dependents, the scheduler of
    distributed 2026.7 drops the connection to the client.
    """
    for future in futures:
        future.release()


def _call(index: int, call: tuple[Callable[..., R], TrainingSource, tuple[Any, ...]]) -> R:
    function, source, arguments = call
    return function(source, index, *arguments)


@dataclass(frozen=True)
class Summary:
    """What has to be known of the training pairs before a fit.

    Parameters
    ----------
    n_rows : ndarray of int64, shape (n_batches,)
        Training rows of each batch.
    n_pairs : ndarray of int64, shape (3,)
        Rows with a known difference, per label.
    minimum, maximum, mean, deviation : ndarray of float64, shape (3,)
        Of the features.
    center, spread : ndarray of float64, shape (3,)
        Median and robust standard deviation of the differences.
    mean_weight : float
    """

    n_rows: IntArray
    n_pairs: IntArray
    minimum: FloatArray
    maximum: FloatArray
    mean: FloatArray
    deviation: FloatArray
    center: FloatArray
    spread: FloatArray
    mean_weight: float

    def info(
        self, method: str, params: Mapping[str, int | float | str], folds: Sequence[int] | None
    ) -> ModelInfo:
        """Statement of a model fitted to these pairs."""
        return ModelInfo(
            method=method,
            params=params,
            minimum=tuple(self.minimum.tolist()),
            maximum=tuple(self.maximum.tolist()),
            n_pairs=tuple(self.n_pairs.tolist()),
            train_folds=None if folds is None else tuple(folds),
        )


# Quartiles of a normal distribution are 1.349 standard deviations apart; 1.4826 = 2 / 1.349.
_IQR = 1.3489795003921634


def summarise(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    client: Any,
    method: str,
    needed: int,
) -> Summary:
    """Look at all training pairs once.

    Parameters
    ----------
    method : str
        For messages.
    needed : int
        Pairs that each label must have.

    Raises
    ------
    ModelError
        A label is never known, constant, or known for too few pairs.
    """
    parts = map_batches(_summarise_batch, source, client, train_folds)
    n_rows = np.array([part["n"] for part in parts], dtype=np.int64)
    total = int(n_rows.sum())
    histograms = [Histogram() for _ in LABELS]
    sums, squares, weight = np.zeros(len(FEATURES)), np.zeros(len(FEATURES)), 0.0
    low, high = np.full(len(FEATURES), np.inf), np.full(len(FEATURES), -np.inf)
    for part in parts:
        sums, squares = sums + part["sum"], squares + part["square"]
        weight += part["weight"]
        low, high = np.minimum(low, part["low"]), np.maximum(high, part["high"])
        for histogram, counts in zip(histograms, part["counts"], strict=True):
            histogram.add(counts)
    folds = "" if train_folds is None else f" of folds {', '.join(map(str, train_folds))}"
    lows = np.min([part["label_low"] for part in parts], axis=0) if parts else []
    highs = np.max([part["label_high"] for part in parts], axis=0) if parts else []
    for number, label in enumerate(LABELS):
        n = histograms[number].n
        if n < max(needed, 1):
            raise ModelError(
                f"method '{method}' needs at least {needed} training pairs{folds} with a known "
                f"{label} difference, and there are {n}",
                "Widen the quality cuts or the match radius, or choose a simpler method.",
            )
        if lows[number] == highs[number]:
            raise ModelError(
                f"the {label} differences of all {n} training pairs{folds} are "
                f"{lows[number]:g}: there is nothing to learn",
                "Check that target and reference are two surveys with labels of their own.",
            )
    quartiles = np.array([h.quantiles((0.25, 0.5, 0.75)) for h in histograms])
    spread = (quartiles[:, 2] - quartiles[:, 0]) / _IQR
    mean = sums / total
    return Summary(
        n_rows=n_rows,
        n_pairs=np.array([h.n for h in histograms], dtype=np.int64),
        minimum=low,
        maximum=high,
        mean=mean,
        deviation=np.sqrt(np.maximum(squares / total - mean**2, 0.0)),
        center=quartiles[:, 1],
        # More than half of the differences may be equal.
        spread=np.where(spread > 0, spread, (np.asarray(highs) - np.asarray(lows)) / 6),
        mean_weight=weight / total,
    )


def _summarise_batch(
    source: TrainingSource, index: int, train_folds: Sequence[int] | None
) -> dict[str, Any]:
    rows = training_rows(source.load(index), train_folds)
    x, y = rows.features.astype(np.float64), rows.differences
    known = np.isfinite(y)
    return {
        "n": len(x),
        "sum": x.sum(axis=0),
        "square": (x**2).sum(axis=0),
        "weight": float(rows.weight.sum(dtype=np.float64)),
        "low": x.min(axis=0, initial=np.inf),
        "high": x.max(axis=0, initial=-np.inf),
        "label_low": y.min(axis=0, initial=np.inf, where=known),
        "label_high": y.max(axis=0, initial=-np.inf, where=known),
        "counts": [count(y[known[:, k], k]) for k in range(len(LABELS))],
    }


def count(values: Float32Array) -> tuple[NDArray[np.uint16], IntArray]:
    """Fine logarithmic histogram of finite numbers: the bins that are not empty and their counts.

    A bin is the upper half of a float32 (sign, exponent, 7 bits of mantissa), so bins are 0.4 to
    0.8 % wide at any scale, and counts of any parts add up exactly in any order.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Floats sort like integers once negative ones are flipped.
    ordered = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
    bins, counts = np.unique((ordered >> 16).astype(np.uint16), return_counts=True)
    return bins, counts.astype(np.int64)


class Histogram:
    """Sum of what `count` gives: quantiles in constant memory, the same in any order of parts."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << 16, dtype=np.int64)

    @property
    def n(self) -> int:
        """Number of values."""
        return int(self._counts.sum())

    def add(self, counts: tuple[NDArray[np.uint16], IntArray]) -> None:
        """Add one part."""
        self._counts[counts[0]] += counts[1]

    def quantiles(self, fractions: Sequence[float]) -> FloatArray:
        """Quantiles, interpolated inside their bins (to about 0.1 % of their value)."""
        cumulative = np.cumsum(self._counts)
        out = []
        for fraction in fractions:
            rank = fraction * cumulative[-1]
            index = int(np.searchsorted(cumulative, rank, side="left"))
            index = max(index, int(np.argmax(self._counts > 0)))
            inside = (rank - (cumulative[index] - self._counts[index])) / self._counts[index]
            low, high = _bin_edges(index)
            out.append(low + (high - low) * inside)
        return np.array(out)


def _bin_edges(index: int) -> tuple[float, float]:
    ordered = np.array([index << 16, (index << 16) | 0xFFFF], dtype=np.uint32)
    bits = np.where(ordered >> 31 == 1, ordered & np.uint32((1 << 31) - 1), ~ordered)
    low, high = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return float(low), float(high)

"""What all corrections are: their types, parameters, training box and file."""

from __future__ import annotations

import abc
import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sos_dask import __version__
from sos_dask.errors import ConfigError, ModelError
from sos_dask.problem import BLOCK_ROWS, FEATURES
from sos_dask.schema import LABELS, nearest

MODEL_FORMAT = 2
MODEL_FILE = "model.json"
SEAL = "sha256"

Float32Array = NDArray[np.float32]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Progress = Callable[[str, int, int], None]


Content = bytes | memoryview


@dataclass(frozen=True)
class Batch:
    """Pairs of one partition.

    Parameters
    ----------
    features : ndarray of float32, shape (n, 3)
        Of the target, as `sos_dask.problem.features` makes them.
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
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < 1e300 or (whole and value != int(value)):
            raise ConfigError(f"{name} = {value!r:.60} is not {kinds}")
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

    def of_part(self, method: str, known: Collection[str]) -> ModelInfo:
        """What a model inside of this one states: its method, and the parameters known to it."""
        own = {name: value for name, value in self.params.items() if name in known}
        return replace(self, method=method, params=own)


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


def parse_json(content: bytes, name: Path | str) -> dict[str, Any]:
    """Decode a JSON object; `ModelError` where it is none."""
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{name}: not a JSON object")
    return document

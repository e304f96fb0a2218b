"""Corrections: a difference target - reference per label, as a function of the target's features.

A module of this package that has ``PARAMS`` is a method and needs no other entry. It offers

* ``PARAMS``: mapping of parameter name to `Param`;
* ``fit(source, train_folds, params, client, progress) -> Fitted``, with complete, checked params;
* ``restore(info, files) -> Fitted``, from what `Fitted.save` wrote.
"""

from __future__ import annotations

import hashlib
import importlib
import mmap
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sos_dask import __version__
from sos_dask.corrections.base import (
    MODEL_FILE,
    MODEL_FORMAT,
    SEAL,
    Batch,
    Content,
    Correction,
    Fitted,
    Float32Array,
    FloatArray,
    IntArray,
    ModelInfo,
    Param,
    Progress,
    TrainingSource,
    parse_json,
    sealed,
    to_json,
)
from sos_dask.corrections.training import (
    Rows,
    Summary,
    map_batches,
    release,
    summarise,
    training_rows,
)
from sos_dask.errors import ConfigError, ModelError
from sos_dask.problem import FEATURES
from sos_dask.schema import LABELS, nearest
from sos_dask.stats.numbers import Histogram, count

__all__ = [
    "MODEL_FILE",
    "MODEL_FORMAT",
    "SEAL",
    "Batch",
    "Content",
    "Correction",
    "Fitted",
    "Float32Array",
    "FloatArray",
    "Histogram",
    "IntArray",
    "ModelInfo",
    "Param",
    "Progress",
    "Rows",
    "Summary",
    "TrainingSource",
    "check_params",
    "count",
    "fit",
    "load",
    "map_batches",
    "methods",
    "parameters",
    "parse_json",
    "release",
    "sealed",
    "summarise",
    "to_json",
    "training_rows",
]

_SMALL_FILE = 1 << 20


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
        Too few pairs, a label that is never known, no GPU for ``device = "cuda"``.
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

"""Corrections: a difference target - reference per label, as a function of the target's inputs.

A method is a subclass of `Correction`, with its parameters (each with default, limits and meaning),
`Correction.fit`, `Correction.restore`, and the values of its parameters that a search tries.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sos_dask import __version__
from sos_dask.corrections import base
from sos_dask.corrections.base import (
    MODEL_FILE,
    Batch,
    Correction,
    OneBatch,
    Training,
    TrainingSource,
)
from sos_dask.corrections.boosted import BoostedCorrection
from sos_dask.corrections.hybrid import HybridCorrection, SimexCorrection
from sos_dask.corrections.polynomial import PolynomialCorrection
from sos_dask.corrections.symbolic import SymbolicCorrection
from sos_dask.errors import ConfigError, ModelError
from sos_dask.problem import Problem
from sos_dask.schema import nearest
from sos_dask.settings import explained, sealed

__all__ = ["MODEL_FILE", "Batch", "Correction", "OneBatch", "Training", "TrainingSource"]

_SMALL_FILE = 1 << 20
_KINDS = (
    BoostedCorrection,
    HybridCorrection,
    PolynomialCorrection,
    SimexCorrection,
    SymbolicCorrection,
)
Params = Mapping[str, int | float | str]
_METHODS: Mapping[str, type[Correction]] = {kind.method: kind for kind in _KINDS}


def methods() -> tuple[str, ...]:
    """Names of the methods, sorted."""
    return tuple(_METHODS)


def class_of(method: str) -> type[Correction]:
    """Class of a method; `ConfigError` for an unknown one, with the nearest."""
    if method not in _METHODS:
        what = f"there is no method '{method}'"
        raise ConfigError(what, nearest(method, methods()) or f"Known are: {', '.join(methods())}.")
    return _METHODS[method]


def check_params(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the parameters of a method with its defaults; 4.0 may be given for 4.

    Raises `ConfigError`: unknown method or parameter (with the nearest name), wrong type, out of
    range.
    """
    kind = class_of(method).parameters
    whole = {
        name: int(value)
        for name, value in params.items()
        if isinstance(value, float) and value.is_integer()
        if name in kind.model_fields and kind.model_fields[name].annotation is int
    }
    try:
        return kind.model_validate({**params, **whole}).as_json
    except ValidationError as error:
        raise explained(kind, error, f"method '{method}'") from None


def fit(
    method: str,
    source: TrainingSource,
    *,
    train_folds: Sequence[int] | None = None,
    params: Mapping[str, Any] | None = None,
    client: Any = None,
) -> Correction:
    """Fit a correction by one of the `methods`, with parameters of `check_params`.

    Only pairs of the ``train_folds`` are used, by default all. Batches are loaded and worked on by
    the workers of a client of Dask; without one in this process.

    Raises `ConfigError`: unknown method, or a wrong parameter; `ModelError`: too few pairs, a label
    that is never known, no GPU for ``device = "cuda"``; `ClusterError`: the cluster lost its
    workers again and again.
    """
    kind = class_of(method)
    settings = kind.parameters(**check_params(method, params or {}))
    folds = None if train_folds is None else tuple(int(fold) for fold in train_folds)
    return kind.fit(Training(source, folds, client), settings)


def load(directory: Path, *, check: bool = True) -> Correction:
    """Read a model that `Correction.save` wrote.

    ``check`` compares the SHA-256 of its files with that stated; false only where another process
    of the same command has done so: tables are large. Raises `ModelError` where a file is missing
    or not the one that was saved, the format is that of another version, or the method is not
    known.
    """
    path = Path(directory) / MODEL_FILE
    hint = "A model is a directory that 'sos-dask train' has written."
    document = base.parse_json(bytes(_mapped(path, hint)), path)
    if document.get("format") != base.MODEL_FORMAT:
        raise ModelError(
            f"{path}: model format {document.get('format')!r} is not {base.MODEL_FORMAT}",
            f"It was written by sos-dask {document.get('sos_dask')}, this is {__version__}: train "
            "it again.",
        )
    if sealed(document) != document:
        what = f"{path} was changed after the model was saved: its SHA-256 is another one"
        raise ModelError(what, "Restore it, or train the model again.")
    info, hashes = _stated(document, path)
    files: dict[str, base.Content] = {}
    for name, expected in hashes.items():
        if Path(name).name != name:
            raise ModelError(f"{path}: '{name}' is not a file name")
        files[name] = _mapped(path.parent / name)
        if check and hashlib.sha256(files[name]).hexdigest() != expected:
            raise ModelError(
                f"{path.parent / name} is not the file that was saved with the model",
                "Its SHA-256 is another one: restore it, or train the model again.",
            )
    try:
        return _METHODS[info.method].restore(info, files)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model '{info.method}': incomplete or damaged ({error!r})") from None


def _stated(document: Mapping[str, Any], path: Path) -> tuple[base.ModelInfo, dict[str, str]]:
    """Statement of a model, and the SHA-256 of its files."""
    if document.get("method") not in methods():
        raise ModelError(
            f"{path}: method {document.get('method')!r} is not one of {', '.join(methods())}"
        )
    try:
        problem = Problem(**document["problem"])
        for key, expected in (("labels", problem.names), ("features", problem.features)):
            if document[key] != list(expected):
                raise ModelError(f"{path}: {key} are {document[key]}, not {list(expected)}")
        folds = document["train_folds"]
        ranges = [document["training_range"][name] for name in problem.features]
        info = base.ModelInfo(
            method=document["method"],
            params=document["params"],
            minimum=tuple(float(low) for low, _ in ranges),
            maximum=tuple(float(high) for _, high in ranges),
            n_pairs=tuple(int(document["n_pairs"][label]) for label in problem.names),
            train_folds=None if folds is None else tuple(folds),
            problem=problem,
        )
        return info, {str(name): str(value) for name, value in document["files"].items()}
    except ConfigError as error:
        raise ModelError(f"{path}: its problem is damaged: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: incomplete or damaged ({error!r})") from None


def _mapped(path: Path, hint: str = "") -> base.Content:
    """Content of a file that workers on one machine share in memory; small ones are read."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < _SMALL_FILE:
                return file.read()
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", hint) from None

"""Corrections: a difference target - reference per label, as a function of the target's inputs.

A method is a module of this package with

* ``Settings``: its parameters, each with default, limits and meaning;
* ``fit(training, settings, progress) -> Correction``;
* ``restore(info, files) -> Correction``, from what `Correction.save` wrote;
* optionally ``SEARCH``: values of its parameters that `sos_dask.corrections.search` tries.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sos_dask import __version__
from sos_dask.corrections import boosted, hybrid, polynomial, simex, symbolic
from sos_dask.corrections.base import (
    MODEL_FILE,
    MODEL_FORMAT,
    SEAL,
    Batch,
    Content,
    Correction,
    ModelInfo,
    Progress,
    Training,
    TrainingSource,
    parse_json,
    to_json,
)
from sos_dask.errors import ConfigError, ModelError
from sos_dask.problem import Problem
from sos_dask.schema import nearest
from sos_dask.settings import Settings

__all__ = [
    "MODEL_FILE",
    "Batch",
    "Correction",
    "ModelInfo",
    "Training",
    "TrainingSource",
    "check_params",
    "fit",
    "load",
    "method_module",
    "method_settings",
    "methods",
    "parameters",
]

_METHODS: Mapping[str, Any] = {
    "boosted": boosted,
    "hybrid": hybrid,
    "polynomial": polynomial,
    "simex": simex,
    "symbolic": symbolic,
}
_SMALL_FILE = 1 << 20


def methods() -> tuple[str, ...]:
    """Names of the methods, sorted."""
    return tuple(_METHODS)


def method_module(method: str) -> Any:
    """Module of a method; `ConfigError` with the nearest names where there is none."""
    if method not in _METHODS:
        raise ConfigError(
            f"there is no method '{method}'",
            nearest(method, methods()) or f"Known are: {', '.join(methods())}.",
        )
    return _METHODS[method]


def parameters(method: str) -> Mapping[str, FieldInfo]:
    """Parameters of a method: default, limits and meaning by name.

    Raises
    ------
    ConfigError
        Unknown method.
    """
    fields: Mapping[str, FieldInfo] = method_module(method).Settings.model_fields
    return fields


def method_settings(method: str, params: Mapping[str, Any]) -> Settings:
    """Make the settings of a method: those given, and the defaults of the others.

    A whole number may be written as 4.0.

    Raises
    ------
    ConfigError
        Unknown method or parameter (with the nearest name), wrong type, out of range.
    """
    kind: type[Settings] = method_module(method).Settings
    fields = kind.model_fields
    for name in params:
        if name not in fields:
            raise ConfigError(
                f"method '{method}' has no parameter '{name}'",
                nearest(name, fields) or f"Known are: {', '.join(fields)}.",
            )
    values = {
        name: int(value)
        if fields[name].annotation is int and isinstance(value, float) and value.is_integer()
        else value
        for name, value in params.items()
    }
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    name, value = str(first["loc"][0]), first["input"]
    shown = f"{method}.{name} = {value!r:.60}"
    if first["type"] == "literal_error":
        choices = fields[name].annotation.__args__  # type: ignore[union-attr]
        raise ConfigError(
            f"{shown} is not one of {', '.join(choices)}", nearest(str(value), choices)
        )
    if first["type"] in ("greater_than_equal", "less_than_equal"):
        limits = {key: getattr(m, key) for m in fields[name].metadata for key in m.__slots__}
        raise ConfigError(f"{shown} is outside {limits['ge']:g} .. {limits['le']:g}")
    kinds = "a whole number" if fields[name].annotation is int else "a number"
    raise ConfigError(f"{shown} is not {kinds}")


def check_params(method: str, params: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Complete parameters of a method, checked as `method_settings` does."""
    return method_settings(method, params).as_json


def fit(
    method: str,
    source: TrainingSource,
    *,
    train_folds: Sequence[int] | None = None,
    params: Mapping[str, Any] | None = None,
    client: Any = None,
    progress: Progress | None = None,
) -> Correction:
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
    settings = method_settings(method, params or {})
    folds = None if train_folds is None else tuple(int(fold) for fold in train_folds)
    fitted: Correction = _METHODS[method].fit(
        Training(source, folds, client), settings, progress or (lambda step, done, total: None)
    )
    return fitted


def load(directory: Path, *, check: bool = True) -> Correction:
    """Read a model that `Correction.save` wrote.

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
        the method is not known.
    """
    path = Path(directory) / MODEL_FILE
    hint = "A model is a directory that 'sos-dask train' has written."
    document = parse_json(bytes(_mapped(path, hint)), path)
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
    if document.get("method") not in methods():
        raise ModelError(
            f"{path}: method {document.get('method')!r} is not one of {', '.join(methods())}"
        )
    info, hashes = _stated(document, path)
    files: dict[str, Content] = {}
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
        fitted: Correction = _METHODS[info.method].restore(info, files)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model '{info.method}': incomplete or damaged ({error!r})") from None
    return fitted


def _stated(document: Mapping[str, Any], path: Path) -> tuple[ModelInfo, dict[str, str]]:
    """Statement of a model, and the SHA-256 of its files."""
    try:
        problem = Problem(**document["problem"])
    except KeyError:
        raise ModelError(f"{path}: incomplete: it has no problem (labels and inputs)") from None
    except (ConfigError, TypeError) as error:
        raise ModelError(f"{path}: its problem is damaged: {error}") from None
    for key, expected in (("labels", problem.names), ("features", problem.features)):
        if document.get(key) != list(expected):
            raise ModelError(f"{path}: {key} are {document.get(key)}, not {list(expected)}")
    try:
        folds = document["train_folds"]
        ranges = [document["training_range"][name] for name in problem.features]
        info = ModelInfo(
            method=document["method"],
            params=document["params"],
            minimum=tuple(float(low) for low, _ in ranges),
            maximum=tuple(float(high) for _, high in ranges),
            n_pairs=tuple(int(document["n_pairs"][label]) for label in problem.names),
            train_folds=None if folds is None else tuple(folds),
            problem=problem,
        )
        return info, {str(name): str(value) for name, value in document["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: incomplete or damaged ({error!r})") from None


def _mapped(path: Path, hint: str = "") -> Content:
    """Content of a file that workers on one machine share in memory; small ones are read."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < _SMALL_FILE:
                return file.read()
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", hint) from None

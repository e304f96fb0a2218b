"""Every error a user can meet, each with the exit code of the command line."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any


class SosError(Exception):
    """Base of all errors of this package: the message says what, where and what to do.

    ``message``: what is wrong and where (file, column, row or pixel). ``hint``: what to do about
    it, shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class ConfigError(SosError):
    """A setting, an argument or a job file is wrong."""

    exit_code = 3


class SurveyError(SosError):
    """A survey definition or a survey file is not what it should be."""

    exit_code = 4


class CatalogError(SosError):
    """A catalog directory is missing, incomplete, of another format or inconsistent."""

    exit_code = 5


class PartitionError(SosError):
    """One partition of a catalog cannot be read or breaks an invariant."""

    exit_code = 6


class ModelError(SosError):
    """A correction cannot be fitted, loaded or applied."""

    exit_code = 7


class ClusterError(SosError):
    """The Dask cluster failed: no workers, a task that kills its worker, a lost scheduler."""

    exit_code = 8


class StorageError(SosError):
    """The disk is full, or a file cannot be written."""

    exit_code = 9


class GateError(SosError):
    """A build is kept, but not published: its figures are outside of the limits of the job.

    ``build``: what `rebuild` would have returned; ``reasons``: one sentence for each limit.
    """

    exit_code = 10

    def __init__(self, message: str, hint: str, build: Any, reasons: Sequence[str]) -> None:
        super().__init__(message, hint)
        self.build = build
        self.reasons = tuple(reasons)


class LockedError(SosError):
    """Another process works on the store."""

    exit_code = 11


# Who raises it (a class or its module), what it then is, and what to say first. The first that fits
# counts. Nothing is imported: most commands need few of these libraries.
_LIBRARIES: tuple[tuple[str, type[SosError], str], ...] = (
    ("builtins.MemoryError", ClusterError, "there is not enough memory"),
    ("pydantic", ConfigError, "a setting is wrong"),
    ("tomllib", ConfigError, "not valid TOML"),
    ("json", CatalogError, "not valid JSON"),
    ("numpy.lib", CatalogError, "damaged array"),
    ("numpy.linalg", ModelError, "the numbers do not determine the correction"),
    ("xgboost", ModelError, "boosted trees failed"),
    ("pyarrow", CatalogError, "damaged or unusual table"),
    ("pandas", SurveyError, "the table cannot be read"),
    ("astropy", SurveyError, "the table cannot be read"),
    ("gzip", SurveyError, "damaged compressed file"),
    ("zlib", SurveyError, "damaged compressed file"),
    ("csv", SurveyError, "the table cannot be read"),
    ("builtins.EOFError", SurveyError, "the file is cut short"),
    ("dask.config", ConfigError, "the configuration of Dask is wrong"),
    ("distributed", ClusterError, "the cluster failed"),
    ("dask", ClusterError, "the cluster failed"),
    ("tornado", ClusterError, "the cluster failed"),
    ("concurrent.futures", ClusterError, "the cluster failed"),
    ("builtins.TimeoutError", ClusterError, "no answer in time"),
    ("builtins.ConnectionError", ClusterError, "the cluster failed"),
    ("builtins.UnicodeDecodeError", CatalogError, "a file is not UTF-8 text"),
    ("builtins.UnicodeEncodeError", ConfigError, "a name or a value is not UTF-8 text"),
    ("builtins.OverflowError", ConfigError, "a number is too large"),
    ("builtins.Warning", ConfigError, "the environment makes errors of warnings (PYTHONWARNINGS)"),
    ("builtins.ImportError", ConfigError, "a package is missing or broken"),
)
# Their decoders also raise errors of Python's own kinds, which are those of the file.
_DECODERS = (
    "tomllib", "json", "gzip", "csv", "pydantic", "astropy.io", "dask.config", "pyarrow.parquet",
    "numpy.lib._npyio_impl", "numpy.lib._format_impl",
)  # fmt: skip


_SECRET_NAMES = re.compile("SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|ACCESS_KEY", re.IGNORECASE)
_SECRETS = re.compile(
    r"(?<=://)[^/@\s\"']+(?=@)|(?<=X-Amz-Signature=)\w+|(?<=X-Amz-Credential=)[^&\s]+", re.ASCII
)


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Put asterisks for secrets: users and signatures in URLs, secrets of the environment."""
    text = _SECRETS.sub("***", text)
    for name, value in environment.items():
        if len(value) >= 8 and _SECRET_NAMES.search(name):
            text = text.replace(value, "***")
    return text


def understood(error: BaseException) -> SosError | None:
    """Turn what a library, a file or the machine has raised into an error of this package.

    None: nothing that a user gives leads there, the program has a defect.
    """
    if isinstance(error, SosError):
        return error
    text = " ".join(str(error).split())
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    if isinstance(error, ValueError) and "embedded null" in text:
        return ConfigError("a path or an address contains a NUL character")
    sources = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    if raised_in.startswith(_DECODERS):
        sources.append(raised_in)
    for source, kind, what in _LIBRARIES:
        if any(f"{name}.".startswith(f"{source}.") for name in sources):
            where = _place(frames) if kind in (SurveyError, CatalogError, ModelError) else ""
            return kind(f"{what}{where}: {text or type(error).__name__}")
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else _place(frames)
        return StorageError(f"cannot read or write{where}: {error.strerror or text}")
    return None


def _place(frames: Sequence[FrameType]) -> str:
    """Path that the innermost function of the package works on, where it has one."""
    for frame in reversed(frames):
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(f"{__package__}.cli"):
            return ""  # it only prints
        if module.startswith(f"{__package__}."):
            for value in frame.f_locals.values():
                if isinstance(value, Path):
                    return f" ({value})"
    return ""

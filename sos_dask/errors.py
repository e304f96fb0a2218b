"""Every error a user can meet, each with the exit code of the command line."""

from __future__ import annotations


class SosError(Exception):
    """Base of all errors of this package: the message says what, where and what to do.

    Parameters
    ----------
    message : str
        What is wrong and where (file, column, row or pixel).
    hint : str, optional
        What to do about it, shown on a line of its own.
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

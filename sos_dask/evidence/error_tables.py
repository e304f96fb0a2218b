"""Tables over the cells of label space and over S/N: half-widths at the price of two look-ups."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask import __version__
from sos_dask.columns import BoolArray, Float32Array, FloatArray, IntArray
from sos_dask.errors import ModelError
from sos_dask.problem import BLOCK_ROWS, DEFAULT, Problem
from sos_dask.schema import LABELS
from sos_dask.stats.table import Grid, pack, unpack

ERROR_FORMAT = 1
ERROR_FILE, TABLE_FILE = "error.json", "error.npy"
N_CELLS = 48  # along each axis
N_STEPS = 1024  # of log S/N
LOG_SNR = (float(np.log(0.1)), float(np.log(1e4)))


def error_grid(low: Sequence[float], high: Sequence[float]) -> Grid:
    """Cut the box of the training pairs, between two corners in the inputs, into cells."""
    return Grid(tuple(low), tuple(high), (N_CELLS,) * len(low))


def snr_steps() -> FloatArray:
    """Find the logarithm of S/N in the middle of every step of a profile, shape (N_STEPS,)."""
    low, high = LOG_SNR
    return low + (np.arange(N_STEPS) + 0.5) * (high - low) / N_STEPS


@dataclass(frozen=True)
class ErrorModel:
    """Half-widths of intervals around corrected labels.

    Parameters
    ----------
    grid : Grid
    values : ndarray of float32, shape (N_CELLS ** 3, 3)
        Half-width of the 68 % interval in each cell (K, dex, dex), at S/N where the profile is 1.
    profile : ndarray of float32, shape (1024, 3)
        Factor by S/N, in equal steps of its logarithm.
    sparse : ndarray of bool, shape (N_CELLS ** 3,)
        Cells of the sparse class.
    reference, reference_profile : ndarray of float32, shapes of values and profile
        The same two tables of the error of the reference, which the half-widths hold; 0 where it
        is not stated.
    about : mapping
        What else the file says: ``correction`` (SHA-256 of the model whose residuals these are),
        ``factors_95`` (by label and class: half-width of the 95 % interval in that of the 68 %
        one), ``reference_error`` (``included`` or ``removed``).
    """

    grid: Grid
    values: Float32Array
    profile: Float32Array
    sparse: BoolArray
    reference: Float32Array
    reference_profile: Float32Array
    about: Mapping[str, Any]

    def half_width(self, features: Float32Array, snr: NDArray[np.floating] | None) -> Float32Array:
        """Look up the half-width of the 68 % interval.

        Parameters
        ----------
        features : ndarray of float32, shape (n, 3)
            Outside the training box those of the nearest place on it count, as in a correction.
        snr : ndarray of float, shape (n,), optional
            Below the smallest of the pairs half-widths grow as its inverse, above the largest they
            stay; where it is unknown or not positive, that of the noisiest pairs counts.

        Returns
        -------
        ndarray of float32, shape (n, 3)
            K, dex, dex; nan where a feature is nan or infinite. Each label is contiguous.

        Raises
        ------
        ModelError
            Another number of features.
        """
        k = len(self.grid.shape)
        if features.ndim != 2 or features.shape[1] != k:
            raise ModelError(f"error model: features have shape {features.shape}, not (n, {k})")
        out = np.empty((len(LABELS), len(features)), dtype=np.float32)
        removed = self.about["reference_error"] == "removed"
        for first in range(0, len(features), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            x = features[block]
            cell = self.grid.cells(x)
            step = self._steps(None if snr is None else snr[block])
            known = np.isfinite(x[:, 0]) & np.isfinite(x[:, 1]) & np.isfinite(x[:, 2])
            for width, tables in zip(out[:, block], self._by_label, strict=True):
                np.take(tables[0], cell, out=width, mode="clip")
                width *= tables[1][step]
                if removed:
                    width[:] = without_reference(width, tables[2][cell] * tables[3][step])
                width[~known] = np.nan
        return out.T

    @cached_property
    def _by_label(self) -> tuple[tuple[Float32Array, ...], ...]:
        tables = (self.values, self.profile, self.reference, self.reference_profile)
        return tuple(
            tuple(np.ascontiguousarray(table[:, number]) for table in tables)
            for number in range(len(LABELS))
        )

    def is_sparse(self, features: Float32Array) -> BoolArray:
        """Tell which rows are of the sparse class, shape (n,)."""
        return np.asarray(self.sparse[self.grid.cells(features)])

    def require(self, correction: str) -> None:
        """Raise `ModelError` unless these are the errors of the correction with this SHA-256."""
        if self.about["correction"] != correction:
            raise ModelError(
                "the error model was made for another correction",
                "Give the one that was made from this model's held-out pairs.",
            )

    def describe(self, label: str) -> str:
        """Say what the half-widths of a label are."""
        factors = self.about["factors_95"][label]
        whose = (
            "corrected - reference"
            if self.about["reference_error"] == "included"
            else "corrected - reference, less the error of the reference in quadrature"
        )
        return (
            f"half-width of the 68 % interval of {label} {whose}; for 95 % times "
            f"{factors['dense']:.2f} (dense), {factors['sparse']:.2f} (sparse)"
        )

    def _steps(self, snr: NDArray[np.floating] | None) -> IntArray:
        low, high = LOG_SNR
        unknown = int(self.about["unknown_snr"])
        if snr is None:
            return np.full(1, unknown)
        with np.errstate(divide="ignore", invalid="ignore"):
            place = (np.log(snr, dtype=np.float32) - np.float32(low)) * np.float32(
                N_STEPS / (high - low)
            )
        place = np.where(np.isfinite(place), place, np.float32(unknown))
        return np.asarray(np.clip(place, 0, N_STEPS - 1), dtype=np.int64)

    def files(self) -> dict[str, bytes]:
        """Pack the model into files, by name; equal models give equal bytes."""
        tables = (self.values, self.profile, self.sparse)
        table = pack([*tables, self.reference, self.reference_profile])
        document = {
            "format": ERROR_FORMAT,
            "sos_dask": __version__,
            "labels": list(LABELS),
            "features": list(DEFAULT.features),
            "low": list(self.grid.low),
            "high": list(self.grid.high),
            "about": dict(self.about),
            "table_sha256": hashlib.sha256(table).hexdigest(),
        }
        document["sha256"] = _digest(document)
        return {
            TABLE_FILE: table,
            ERROR_FILE: (json.dumps(document, indent=1, allow_nan=False) + "\n").encode(),
        }


def without_reference(width: NDArray[Any], reference: NDArray[Any]) -> NDArray[Any]:
    """Take off the error of the reference in quadrature; at least a third of a width is left."""
    return np.asarray(np.sqrt(np.maximum(width * width - reference * reference, width * width / 9)))


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in document.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def require_default(problem: Problem) -> None:
    """Raise `ModelError` unless a correction is of the one problem that has error models."""
    if problem != DEFAULT:
        raise ModelError(
            f"errors can be modelled of {_words(DEFAULT)}; the correction is of {_words(problem)}",
            "Train with the default labels and inputs, or run coverage and apply without errors.",
        )


def _words(problem: Problem) -> str:
    inputs = (
        ("log10 " if one.log10 else "")
        + one.column
        + (f" / {one.scale:g}" if one.scale != 1 else "")
        for one in problem.inputs
    )
    return f"{', '.join(problem.names)} by {', '.join(inputs)}"


def load_errors(directory: Path, problem: Problem = DEFAULT) -> ErrorModel:
    """Read the files of an `ErrorModel`.

    Parameters
    ----------
    directory : Path
    problem : Problem
        That of the correction whose errors are wanted.

    Raises
    ------
    ModelError
        A file is missing or not the one that was saved, of another format, or of other labels or
        inputs than the correction.
    """
    require_default(problem)
    path, table = directory / ERROR_FILE, directory / TABLE_FILE
    try:
        document = json.loads(path.read_bytes())
        content = table.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{error.filename}: {error.strerror}", "An error model is made by a rebuild."
        ) from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != ERROR_FORMAT:
        raise ModelError(f"{path}: not an error model of format {ERROR_FORMAT}, the one known here")
    sha256 = hashlib.sha256(content).hexdigest()
    for name, is_whole in (
        (path, document.get("sha256") == _digest(document)),
        (table, document.get("table_sha256") == sha256),
    ):
        if not is_whole:
            raise ModelError(
                f"{name} is not the file that was saved with the error model",
                "Its SHA-256 is another one: restore it, or rebuild.",
            )
    for key, expected in (("labels", problem.names), ("features", problem.features)):
        if document.get(key) != list(expected):
            raise ModelError(
                f"{path}: its {key} are {document.get(key)}; those of the correction are "
                f"{list(expected)}",
                "Give the error model that was made from this correction's held-out pairs.",
            )
    values, profile, sparse, reference, reference_profile = unpack(content, str(table))
    grid = error_grid(document["low"], document["high"])
    return ErrorModel(
        grid, values, profile, sparse, reference, reference_profile, document["about"]
    )

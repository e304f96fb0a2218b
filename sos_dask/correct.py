"""Kernel of apply: corrected labels and flags of a table of target rows."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask.columns import floats32
from sos_dask.problem import features
from sos_dask.schema import CANONICAL, LABELS

FLAG_NULL_INPUT = 1
FLAG_OUTSIDE_TRAINING = 2
FLAG_QUALITY = 4
FLAG_MEANINGS = {
    FLAG_NULL_INPUT: "teff, logg or feh is null: no correction",
    FLAG_OUTSIDE_TRAINING: "outside the range of the training pairs: the correction at its edge",
    FLAG_QUALITY: "the row fails a quality cut",
}
_SUFFIXES = ("sos", "delta", "sos_err")
_NEW = (*(f"{label}_{suffix}" for suffix in _SUFFIXES for label in LABELS), "flag_sos")


class Predictor(Protocol):
    """What a correction must offer here."""

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Predicted differences, shape (n, 3)."""

    def in_range(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which rows lie in the range of the training pairs."""


class ErrorPredictor(Protocol):
    """What a model of errors must offer here."""

    def half_width(
        self, features: NDArray[np.float32], snr: NDArray[np.floating] | None
    ) -> NDArray[np.float32]:
        """Half-widths of the 68 % intervals, shape (n, 3); nan where there is no correction."""

    def describe(self, label: str) -> str:
        """What the half-widths of a label mean."""


def corrected_schema(schema: pa.Schema, errors: ErrorPredictor | None = None) -> pa.Schema:
    """Schema of corrected rows: all columns of the input, then the new ones."""
    fields = [field for field in schema if field.name not in _NEW]
    for suffix, text in (("sos", "corrected"), ("delta", "predicted target - reference of")):
        for label in LABELS:
            metadata = {"unit": CANONICAL[label].unit, "description": f"{text} {label}"}
            if suffix == "sos":
                metadata["ucd"] = CANONICAL[label].ucd
            fields.append(pa.field(f"{label}_{suffix}", pa.float32(), metadata=metadata))
    if errors is not None:
        for label in LABELS:
            metadata = {
                "unit": CANONICAL[label].unit,
                "ucd": f"stat.error;{CANONICAL[label].ucd}",
                "description": errors.describe(label),
            }
            fields.append(pa.field(f"{label}_sos_err", pa.float32(), metadata=metadata))
    meanings = "; ".join(f"{bit}: {text}" for bit, text in FLAG_MEANINGS.items())
    return pa.schema([*fields, pa.field("flag_sos", pa.int32(), False, {"description": meanings})])


def correct(
    table: pa.Table, correction: Predictor, errors: ErrorPredictor | None = None
) -> pa.Table:
    """Add corrected labels, predicted differences, their errors and flags.

    Parameters
    ----------
    table : pyarrow.Table
        Rows with ``teff`` (K), ``logg`` (dex, cgs) and ``feh`` (dex), null where unknown.
    correction : Predictor
    errors : ErrorPredictor, optional

    Returns
    -------
    pyarrow.Table
        Same rows in the same order, with ``*_sos``, ``*_delta``, with errors ``*_sos_err`` (all
        null where any of the three labels is null), and ``flag_sos`` (bits of `FLAG_MEANINGS`).
    """
    labels = [floats32(table, label) for label in LABELS]
    x = features(*labels)
    known = np.isfinite(x[:, 0]) & np.isfinite(x[:, 1]) & np.isfinite(x[:, 2])
    delta = correction.predict(x)
    flags = ~known * np.int32(FLAG_NULL_INPUT)
    flags |= (known & ~correction.in_range(x)) * np.int32(FLAG_OUTSIDE_TRAINING)
    if "quality" in table.schema.names:
        flags |= (table["quality"].to_numpy() != 0) * np.int32(FLAG_QUALITY)
    schema = corrected_schema(table.schema, errors)
    columns = [table[field.name] for field in table.schema if field.name not in _NEW]
    validity = pa.array(known).buffers()[1]
    new = [*(label - d for label, d in zip(labels, delta.T, strict=True)), *delta.T]
    if errors is not None:
        snr = table["snr"].to_numpy() if "snr" in table.schema.names else None
        new += [*errors.half_width(x, snr).T]
    for values in new:
        buffer = pa.py_buffer(np.ascontiguousarray(values, dtype=np.float32))
        columns.append(pa.Array.from_buffers(pa.float32(), len(values), [validity, buffer]))
    return pa.Table.from_arrays([*columns, pa.array(flags)], schema=schema)

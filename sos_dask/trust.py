"""What coverage does to corrected rows: a correction that fades, wider errors, flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.errors import PartitionError
from sos_dask.schema import LABELS

Float32Array = NDArray[np.float32]

FLAG_SPARSE = 8
FLAG_OUTSIDE = 16
FLAG_GRID_EDGE = 32
FLAG_SPREAD = 64
FLAG_AMBIGUOUS = 128
FLAG_MEANINGS = {
    FLAG_SPARSE: "few pairs near: the error is larger",
    FLAG_OUTSIDE: "outside the coverage by pairs: the correction is the fallback",
    FLAG_GRID_EDGE: "a label at the edge of the survey's grid",
    FLAG_SPREAD: "repeats of the star differ by more than their errors",
    FLAG_AMBIGUOUS: "more than one reference star may be this star",
}
FLAGS = "flag_coverage"
COVERAGE_FIELD = pa.field(
    "coverage",
    pa.float32(),
    metadata={
        "ucd": "stat.fit.goodness",
        "description": "Error in the dense overlap over the error here, at equal snr",
    },
)


class Predictor(Protocol):
    """What a correction must offer here."""

    def predict(self, features: Float32Array) -> Float32Array:
        """Predicted differences, shape (n, 3)."""

    def in_range(self, features: Float32Array) -> NDArray[np.bool_]:
        """Which rows lie in the range of the training pairs."""


@dataclass(frozen=True)
class Faded:
    """A correction that gives way to a fallback where the coverage falls.

    Parameters
    ----------
    correction : Predictor
    coverage : ndarray of float32, shape (n,)
        Of the very rows that are predicted, nan where there is none.
    inside, outside : float
        From coverage ``inside`` on the correction counts alone, from ``outside`` down the fallback,
        in proportion between them.
    fallback : callable, optional
        Features of some rows to their differences; None: no correction.
    """

    correction: Predictor
    coverage: Float32Array
    inside: float
    outside: float
    fallback: Callable[[Float32Array], Float32Array] | None = None

    def predict(self, features: Float32Array) -> Float32Array:
        """See `Predictor`; rows must be those of ``coverage``."""
        delta = self.correction.predict(features)
        rows = np.flatnonzero(self.coverage < self.inside)
        if not len(rows):
            return delta
        share = (self.coverage[rows] - self.outside) / (self.inside - self.outside)
        share = np.clip(share, 0.0, 1.0).astype(np.float32)[:, None]
        other = 0.0 if self.fallback is None else self.fallback(features[rows])
        delta = np.array(delta, dtype=np.float32)
        delta[rows] = share * delta[rows] + (1 - share) * other
        return delta

    def in_range(self, features: Float32Array) -> NDArray[np.bool_]:
        """See `Predictor`."""
        return self.correction.in_range(features)


def trusted_schema(schema: pa.Schema) -> pa.Schema:
    """Schema of corrected rows with ``coverage`` before ``flag_sos``, which tells of more."""
    index = schema.get_field_index("flag_sos")
    field = schema.field(index)
    metadata = dict(field.metadata or {})
    meanings = "; ".join(f"{bit}: {text}" for bit, text in FLAG_MEANINGS.items())
    metadata[b"description"] = metadata.get(b"description", b"") + f"; {meanings}".encode()
    return schema.set(index, field.with_metadata(metadata)).insert(index, COVERAGE_FIELD)


def with_coverage(corrected: pa.Table, scores: pa.Table) -> pa.Table:
    """Corrected rows with their coverage and its flags.

    Parameters
    ----------
    corrected : pyarrow.Table
        Output of `correct.correct`.
    scores : pyarrow.Table
        ``obs_id``, ``coverage`` and ``flag_coverage`` of the same rows in the same order.

    Raises
    ------
    PartitionError
        The rows are not the same.
    """
    if not corrected["obs_id"].equals(scores["obs_id"]):
        raise PartitionError(
            "coverage and observations hold other rows", "Make the product coverage again."
        )
    schema = trusted_schema(corrected.schema)
    added = {
        "coverage": scores["coverage"],
        "flag_sos": pc.bit_wise_or(corrected["flag_sos"], scores[FLAGS]),
    }
    columns = [added[name] if name in added else corrected[name] for name in schema.names]
    return pa.Table.from_arrays(columns, schema=schema)


def widened(corrected: pa.Table, factors: Float32Array) -> pa.Table:
    """Corrected rows whose errors hold where the coverage is low, too.

    Parameters
    ----------
    corrected : pyarrow.Table
        With ``*_sos_err``.
    factors : ndarray of float32, shape (n, 3)
        See `coverage.widths.Widths.widening`.
    """
    for label, factor in zip(LABELS, factors.T, strict=True):
        index = corrected.schema.get_field_index(f"{label}_sos_err")
        errors = pc.multiply(corrected.column(index), pa.array(np.ascontiguousarray(factor)))
        corrected = corrected.set_column(index, corrected.schema.field(index), errors)
    return corrected

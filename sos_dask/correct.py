"""Kernel of apply: corrected labels, their errors, coverage and flags of a table of target rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import Float32Array, floats32
from sos_dask.errors import PartitionError
from sos_dask.problem import DEFAULT, Problem
from sos_dask.schema import CANONICAL

FLAG_NULL_INPUT = 1
FLAG_OUTSIDE_TRAINING = 2
FLAG_QUALITY = 4
FLAG_MEANINGS = {
    FLAG_NULL_INPUT: "teff, logg or feh is null: no correction",
    FLAG_OUTSIDE_TRAINING: "outside the range of the training pairs: the correction at its edge",
    FLAG_QUALITY: "the row fails a quality cut",
}
FLAG_SPARSE = 8
FLAG_OUTSIDE = 16
FLAG_GRID_EDGE = 32
FLAG_SPREAD = 64
FLAG_AMBIGUOUS = 128
COVERAGE_MEANINGS = {
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


def _new_columns(problem: Problem) -> set[str]:
    """Columns that a correction writes; those of a correction before give way."""
    names = ((one.sos, one.delta, one.sos_err) for one in problem.labels)
    return {"flag_sos", *(name for some in names for name in some)}


def corrected_schema(
    schema: pa.Schema, errors: ErrorPredictor | None = None, problem: Problem = DEFAULT
) -> pa.Schema:
    """Make the schema of corrected rows: all columns of the input, then the new ones."""
    new = _new_columns(problem)
    fields = [field for field in schema if field.name not in new]
    ucds = {one.name: CANONICAL[one.name].ucd for one in problem.labels if one.name in CANONICAL}

    def add(column: str, unit: str, ucd: str, description: str) -> None:
        metadata = {"unit": unit, "ucd": ucd, "description": description}
        kept = {key: text for key, text in metadata.items() if text or key != "ucd"}
        fields.append(pa.field(column, pa.float32(), metadata=kept))

    for one in problem.labels:
        add(one.sos, one.unit, ucds.get(one.name, ""), f"corrected {one.name}")
    for one in problem.labels:
        add(one.delta, one.unit, "", f"predicted target - reference of {one.name}")
    for one in problem.labels if errors is not None else ():
        ucd = f"stat.error;{ucds[one.name]}" if one.name in ucds else "stat.error"
        add(one.sos_err, one.unit, ucd, errors.describe(one.name) if errors else "")
    meanings = "; ".join(f"{bit}: {text}" for bit, text in FLAG_MEANINGS.items())
    return pa.schema([*fields, pa.field("flag_sos", pa.int32(), False, {"description": meanings})])


def correct(
    table: pa.Table,
    correction: Predictor,
    errors: ErrorPredictor | None = None,
    problem: Problem = DEFAULT,
) -> pa.Table:
    """Add corrected labels, predicted differences, their errors and flags.

    Parameters
    ----------
    table : pyarrow.Table
        Rows with the labels and the inputs of the problem, null where unknown.
    correction : Predictor
    errors : ErrorPredictor, optional
    problem : Problem

    Returns
    -------
    pyarrow.Table
        Same rows in the same order, with ``*_sos``, ``*_delta``, with errors ``*_sos_err`` (all
        null where any of the inputs or labels is null), and ``flag_sos`` (bits of
        `FLAG_MEANINGS`).
    """
    labels = [floats32(table, name) for name in problem.names]
    x = problem.matrix(table)
    known = np.isfinite(x[:, 0])
    for column in (*x.T[1:], *labels):
        known &= np.isfinite(column)
    delta = correction.predict(x)
    flags = ~known * np.int32(FLAG_NULL_INPUT)
    flags |= (known & ~correction.in_range(x)) * np.int32(FLAG_OUTSIDE_TRAINING)
    if "quality" in table.schema.names:
        flags |= (table["quality"].to_numpy() != 0) * np.int32(FLAG_QUALITY)
    schema = corrected_schema(table.schema, errors, problem)
    written = _new_columns(problem)
    columns = [table[field.name] for field in table.schema if field.name not in written]
    validity = pa.array(known).buffers()[1]
    new = [*(label - d for label, d in zip(labels, delta.T, strict=True)), *delta.T]
    if errors is not None:
        snr = table["snr"].to_numpy() if "snr" in table.schema.names else None
        new += [*errors.half_width(x, snr).T]
    for values in new:
        buffer = pa.py_buffer(np.ascontiguousarray(values, dtype=np.float32))
        columns.append(pa.Array.from_buffers(pa.float32(), len(values), [validity, buffer]))
    return pa.Table.from_arrays([*columns, pa.array(flags)], schema=schema)


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


def with_coverage_schema(schema: pa.Schema) -> pa.Schema:
    """Schema of corrected rows with ``coverage`` before ``flag_sos``, which tells of more."""
    index = schema.get_field_index("flag_sos")
    field = schema.field(index)
    metadata = dict(field.metadata or {})
    meanings = "; ".join(f"{bit}: {text}" for bit, text in COVERAGE_MEANINGS.items())
    metadata[b"description"] = metadata.get(b"description", b"") + f"; {meanings}".encode()
    return schema.set(index, field.with_metadata(metadata)).insert(index, COVERAGE_FIELD)


def with_coverage(corrected: pa.Table, scores: pa.Table) -> pa.Table:
    """Corrected rows with their coverage and its flags.

    Parameters
    ----------
    corrected : pyarrow.Table
        Output of `correct`.
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
    schema = with_coverage_schema(corrected.schema)
    added = {
        "coverage": scores["coverage"],
        "flag_sos": pc.bit_wise_or(corrected["flag_sos"], scores[FLAGS]),
    }
    columns = [added[name] if name in added else corrected[name] for name in schema.names]
    return pa.Table.from_arrays(columns, schema=schema)


def widened(corrected: pa.Table, factors: Float32Array, problem: Problem = DEFAULT) -> pa.Table:
    """Corrected rows whose errors hold where the coverage is low, too.

    Parameters
    ----------
    corrected : pyarrow.Table
        With ``*_sos_err``.
    factors : ndarray of float32, shape (n, l)
        See `evidence.widening.Widths.widening`.
    """
    for label, factor in zip(problem.labels, factors.T, strict=True):
        index = corrected.schema.get_field_index(label.sos_err)
        errors = pc.multiply(corrected.column(index), pa.array(np.ascontiguousarray(factor)))
        corrected = corrected.set_column(index, corrected.schema.field(index), errors)
    return corrected

"""Kernel of apply: corrected labels, their errors, coverage and flags of a table of target rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import BoolArray, Float32Array, floats32
from sos_dask.corrections import Correction
from sos_dask.errors import PartitionError
from sos_dask.evidence.intervals import ErrorModel
from sos_dask.evidence.widening import INSIDE, KIND_FIELD, Limits
from sos_dask.problem import DEFAULT, Problem
from sos_dask.schema import CANONICAL

FLAG_NULL_INPUT = 1
FLAG_OUTSIDE_TRAINING = 2
FLAG_QUALITY = 4
FLAG_MEANINGS = {
    FLAG_NULL_INPUT: "a label is null, or an input: no correction of that label, or of any",
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
NOT_COVERED = FLAG_OUTSIDE_TRAINING | FLAG_OUTSIDE
_ABOUT = {
    "ucd": "stat.fit.goodness",
    "description": "Error in the dense overlap over the error here, at equal snr",
}
COVERAGE_FIELD = pa.field("coverage", pa.float32(), metadata=_ABOUT)


Fallback = Callable[[Float32Array, NDArray[np.int8]], NDArray[np.floating]]
Widening = Callable[
    [NDArray[np.int8], NDArray[np.int8], Float32Array, Float32Array], NDArray[np.floating]
]


@dataclass(frozen=True)
class Covered:
    """The coverage of rows, and what it does to their correction and its errors.

    ``scores`` has ``obs_id``, ``coverage``, ``flag_coverage`` and ``kind_coverage`` of the very
    rows that are corrected, in their order. ``widening`` makes of kind, class of the error model,
    half-widths (n, l) and inputs of the star the factors of the half-widths: see
    `evidence.coverage.CoverageModel.widening`. From coverage ``limits.inside`` on the correction
    counts alone, from ``limits.outside`` down the fallback, in proportion between them; without
    limits nothing fades. ``fallback`` makes of inputs and kinds of some rows their differences;
    None: no correction.
    """

    scores: pa.Table
    widening: Widening
    limits: Limits | None = None
    fallback: Fallback | None = None

    @property
    def _kind(self) -> NDArray[np.int8]:
        # Rows without a coverage have no errors either.
        return np.asarray(pc.fill_null(self.scores[KIND_FIELD.name], INSIDE).to_numpy())

    def faded(self, delta: Float32Array, x: Float32Array) -> Float32Array:
        """Predicted differences (n, l) that give way to the fallback where the coverage falls."""
        if self.limits is None:
            return delta
        coverage = pc.fill_null(self.scores["coverage"], np.nan).to_numpy()
        low, high = self.limits.outside, self.limits.inside
        rows = np.flatnonzero(coverage < high)
        share = np.clip((coverage[rows] - low) / (high - low), 0.0, 1.0)
        share = share.astype(np.float32)[:, None]
        other = 0.0 if self.fallback is None else self.fallback(x[rows], self._kind[rows])
        delta = np.array(delta, dtype=np.float32)
        delta[rows] = share * delta[rows] + (1 - share) * other
        return delta

    def widened(
        self, width: Float32Array, is_sparse: BoolArray, star: Float32Array
    ) -> Float32Array:
        """Factors (n, l) of half-widths of corrected - reference where the coverage is low."""
        return self.widening(self._kind, is_sparse.astype(np.int8), width, star).astype(np.float32)


def corrected_schema(
    schema: pa.Schema,
    errors: ErrorModel | None = None,
    problem: Problem = DEFAULT,
    covered: bool = False,
    suffix: str = "",
) -> pa.Schema:
    """Make the schema of corrected rows: all columns of the input, then the new ones."""
    # Columns of the same correction before give way.
    new = {f"flag_sos{suffix}", *([f"coverage{suffix}"] if covered else [])}
    for one in problem.labels:
        new |= {one.sos, one.delta, one.sos_err, one.sos_err_pair}
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
        own, of_pair = errors.describe(one.name) if errors else ("", "")
        add(one.sos_err, one.unit, ucd, own)
        add(one.sos_err_pair, one.unit, ucd, of_pair)
    if covered:
        fields.append(COVERAGE_FIELD.with_name(f"coverage{suffix}"))
    meanings = FLAG_MEANINGS | (COVERAGE_MEANINGS if covered else {})
    text = "; ".join(f"{bit}: {meaning}" for bit, meaning in meanings.items())
    flags = pa.field(f"flag_sos{suffix}", pa.int32(), False, {"description": text})
    return pa.schema([*fields, flags])


def correct(
    table: pa.Table,
    correction: Correction,
    errors: ErrorModel | None = None,
    problem: Problem = DEFAULT,
    covered: Covered | None = None,
    suffix: str = "",
) -> pa.Table:
    """Add corrected labels, predicted differences, their errors, coverage and flags.

    The table has the labels and the inputs of the problem, null where unknown. The same rows come
    back in the same order, with ``*_sos``, ``*_delta``, with errors ``*_sos_err`` (of the label)
    and ``*_sos_err_pair`` (of corrected - reference), null where the label or any of the inputs is
    null, ``coverage`` where it is given, and ``flag_sos`` (bits of `FLAG_MEANINGS` and
    `COVERAGE_MEANINGS`); a ``suffix`` ends the names of these two. Raises
    `PartitionError` for a coverage of other rows.
    """
    if covered is not None and not table["obs_id"].equals(covered.scores["obs_id"]):
        raise PartitionError(
            "coverage and observations contain other rows", "Make the product coverage again."
        )
    labels = [floats32(table, name) for name in problem.names]
    x = problem.matrix(table)
    known = np.isfinite(x[:, 0])
    for column in x.T[1:]:
        known &= np.isfinite(column)
    has = [known & np.isfinite(label) for label in labels]
    delta = correction.predict(x)
    if covered is not None:
        delta = covered.faded(delta, x)
    flags = ~functools.reduce(np.logical_and, has) * np.int32(FLAG_NULL_INPUT)
    flags |= (known & ~correction.in_range(x)) * np.int32(FLAG_OUTSIDE_TRAINING)
    if "quality" in table.schema.names:
        flags |= (table["quality"].to_numpy() != 0) * np.int32(FLAG_QUALITY)
    new = []
    for label, difference in zip(labels, delta.T, strict=True):
        new.append([label - difference, difference])
    if errors is not None:
        snr = table["snr"].to_numpy() if "snr" in table.schema.names else None
        star = x[:, problem.star_places]
        own, pair = errors.half_widths(star, snr)
        if covered is not None:
            factors = covered.widened(pair, errors.is_sparse(star), star)
            own, pair = own * factors, pair * factors
        for made, mine, of_pair in zip(new, own.T, pair.T, strict=True):
            made += [mine, of_pair]
    flag, columns = f"flag_sos{suffix}", {}
    columns[flag] = pa.array(flags)
    if covered is not None:
        columns[f"coverage{suffix}"] = covered.scores["coverage"]
        columns[flag] = pc.bit_wise_or(columns[flag], covered.scores[FLAGS])
    for one, is_there, made in zip(problem.labels, has, new, strict=True):
        validity = pa.array(is_there).buffers()[1]
        names = one.sos, one.delta, one.sos_err, one.sos_err_pair
        for name, values in zip(names, made, strict=False):  # without errors there are two
            buffer = pa.py_buffer(np.ascontiguousarray(values, dtype=np.float32))
            columns[name] = pa.Array.from_buffers(pa.float32(), len(values), [validity, buffer])
    schema = corrected_schema(table.schema, errors, problem, covered is not None, suffix)
    arrays = [columns[name] if name in columns else table[name] for name in schema.names]
    return pa.Table.from_arrays(arrays, schema=schema)

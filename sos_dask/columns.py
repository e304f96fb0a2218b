"""Columns between Arrow and NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]
Float32Array: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int64]
FloatingArray: TypeAlias = NDArray[np.floating]
"""Of either precision."""
BoolArray: TypeAlias = NDArray[np.bool_]
KeyArray: TypeAlias = NDArray[np.uint64]
Columns: TypeAlias = Mapping[str, FloatingArray]

# SplitMix64 (Steele, Lea & Flood 2014, OOPSLA): the step of its counter and its finaliser.
GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)  # of a word


def floats(table: pa.Table, name: str) -> FloatArray:
    """A column of numbers, shape (n,); it may share memory with the table."""
    return np.asarray(_filled(table[name].cast(pa.float64())))


def floats_or_nan(table: pa.Table, name: str) -> FloatArray:
    """A column of numbers, shape (n,); all nan where the table does not have it."""
    if name not in table.schema.names:
        return np.full(table.num_rows, np.nan)
    return floats(table, name)


def floats32(table: pa.Table, name: str) -> Float32Array:
    """A column of numbers, shape (n,), rounded; it may share memory with the table."""
    return np.asarray(_filled(table[name].cast(pa.float32())))


def matrix32(table: pa.Table, names: Sequence[str]) -> Float32Array:
    """Columns of numbers side by side, shape (n, len(names)), rounded."""
    return np.stack([floats32(table, name) for name in names], axis=1)


def reals_or_nan(table: pa.Table, name: str) -> NDArray[np.floating]:
    """A column in its own precision, NaN for null; single for one that is missing."""
    if name not in table.schema.names:
        return np.full(table.num_rows, np.nan, dtype=np.float32)
    column = table[name]
    own = column.type in (pa.float32(), pa.float64())
    return _filled(column if own else column.cast(pa.float64()))


def column_or_nan(columns: Columns, name: str, n: int) -> FloatArray:
    """A column of numbers, shape (n,); all nan where it is not among them."""
    return np.asarray(columns.get(name, np.full(n, np.nan)), dtype=np.float64)


def _filled(column: pa.ChunkedArray) -> NDArray[np.floating]:
    # Arrow fills nulls several times faster than it converts them.
    return np.asarray(pc.fill_null(column, np.nan).to_numpy())


def key_numbers(ids: pa.Array | pa.ChunkedArray, seed: int) -> KeyArray:
    """Numbers of 64 bits that follow from ids, by SplitMix64 over their text.

    Ids (n,) are text or integers (taken as their text), without nulls; other seeds give other
    numbers. Two of a hundred million ids get the same number once in 4000 times; they then share a
    fold.
    """
    text = pc.cast(ids, pa.string())
    chunks = text.chunks if isinstance(text, pa.ChunkedArray) else [text]
    numbers = (_text_numbers(chunk, seed) for chunk in chunks)
    return np.concatenate([np.empty(0, dtype=np.uint64), *numbers])


def _text_numbers(text: pa.Array, seed: int) -> KeyArray:
    """See `key_numbers`: eight bytes of all rows at a time, in memory of the size of the texts."""
    if not len(text):
        return np.empty(0, dtype=np.uint64)
    _, offsets, data = text.buffers()
    bounds = np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1]
    padded = np.zeros(int(bounds[-1] - bounds[0]) + 8, dtype=np.uint8)
    if len(padded) > 8:
        padded[:-8] = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]
    words = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))  # one from every byte on
    length, start = np.diff(bounds), bounds[:-1].astype(np.int64) - bounds[0]
    number = mixed(length.astype(np.uint64) + np.uint64((seed * GOLDEN) % 2**64))
    rows: slice | IntArray = slice(None)
    left = length > 0
    while left.any():  # only rows with bytes left: one long text costs no other row anything
        if not left.all():
            rows = np.flatnonzero(left) if isinstance(rows, slice) else rows[left]
            start, length = start[left], length[left]
        word = words[start] & _FIRST_BYTES[np.minimum(length, 8)]
        number[rows] = mixed(number[rows] ^ word)
        start, length = start + 8, length - 8
        left = length > 0
    return number


def mixed(state: KeyArray) -> KeyArray:
    """Make the output of SplitMix64 after a state: the one hash of numbers."""
    z = state + np.uint64(GOLDEN)
    for shift, factor in _MIX:
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(z ^ (z >> np.uint64(31)))


def key_hashes(column: pa.Array | pa.ChunkedArray) -> KeyArray:
    """64-bit values of a key column: the integers themselves, or `key_numbers` of the text."""
    if pa.types.is_integer(column.type):
        return np.asarray(column.to_numpy(), dtype=np.int64).view(np.uint64)
    return key_numbers(column, 0)


Values: TypeAlias = NDArray[Any] | pa.Array
"""A column: an array without nulls, or an Arrow array of numbers, text or coded text."""


def is_text(values: Values) -> bool:
    """Tell whether a column is text."""
    return isinstance(values, pa.Array) and pa.types.is_string(values.type)


def is_valid(column: pa.Array | pa.ChunkedArray) -> BoolArray:
    """Rows that have a value."""
    # By way of bytes: Arrow turns bits into booleans of NumPy one by one.
    return np.asarray(column.is_valid().cast(pa.uint8()).to_numpy().view(np.bool_))


def split(values: Values) -> tuple[NDArray[Any], BoolArray | None]:
    """Numbers, 0 where null, and where they are null (None: nowhere)."""
    if not isinstance(values, pa.Array):
        return values, None
    if not values.null_count:
        return values.to_numpy(zero_copy_only=False), None
    filled = values.fill_null(pa.scalar(0).cast(values.type))
    return filled.to_numpy(zero_copy_only=False), ~is_valid(values)


def as_array(values: NDArray[Any], valid: BoolArray | None = None) -> pa.Array:
    """Numbers as an Arrow array that shares their memory, null where they are not valid."""
    if valid is None or valid.all():
        return pa.array(values)
    # A twentieth of the time of a mask given to `pyarrow.array`.
    bits = pa.py_buffer(np.packbits(valid, bitorder="little"))
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [bits, pa.py_buffer(values)])


def taken(column: pa.Array, index: IntArray) -> pa.Array:
    """Rows of an array in the order of an index, in half the time of `pyarrow.Array.take`.

    Numbers and nulls are taken apart, and the index is not checked.
    """
    if not column.null_count or not pa.types.is_primitive(column.type):
        return pc.take(column, pa.array(index), boundscheck=False)
    data = [None, column.buffers()[1]]
    plain = pa.Array.from_buffers(column.type, len(column), data, offset=column.offset)
    values = pc.take(plain, pa.array(index), boundscheck=False)
    bits = pa.py_buffer(np.packbits(is_valid(column).take(index), bitorder="little"))
    return pa.Array.from_buffers(column.type, len(index), [bits, values.buffers()[1]])


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """All chunks of a column as one array; one alone is not copied."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

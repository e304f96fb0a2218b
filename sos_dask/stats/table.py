"""Tables over a box of a few axes: looked up in cells, or interpolated between nodes.

What takes long to calculate of a row is calculated once, for every cell or node of a grid; a row
then costs a look-up. Where a quantity is constant on the cells (errors) `Grid.cells` says which
one; where it is smooth (distances, smeared trees) `Grid.interpolate` is linear between the nodes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import Float32Array, FloatArray, IntArray
from sos_dask.errors import ModelError
from sos_dask.settings import sealed, to_json

_BLOCK_ROWS = 8192  # the arrays of a block fit the second-level cache


@dataclass(frozen=True)
class Grid:
    """Equal steps along each of the k axes of a box."""

    low: tuple[float, ...]  # corners of the box; outside it the nearest place on it counts
    high: tuple[float, ...]
    shape: tuple[int, ...]  # cells, or nodes (at least two), along each axis

    @property
    def size(self) -> int:
        """Number of cells or nodes."""
        return int(np.prod(self.shape))

    def centers(self) -> FloatArray:
        """Find the middle of every cell, shape (size, k)."""
        return self._places(0.5, np.array(self.shape))

    def nodes(self) -> FloatArray:
        """Find the place of every node, shape (size, k): the first and the last are corners."""
        return self._places(0.0, np.array(self.shape) - 1)

    def _places(self, shift: float, steps: IntArray) -> FloatArray:
        low, high = np.array(self.low), np.array(self.high)
        numbers = np.stack(np.unravel_index(np.arange(self.size), self.shape), axis=1)
        return np.asarray(low + (high - low) * ((numbers + shift) / steps))

    def cells(self, x: Float32Array) -> IntArray:
        """Find the cell of each row (n, k), shape (n,); a number for nan, too."""
        cell = np.zeros(len(x), dtype=np.int64)
        for axis, n in enumerate(self.shape):
            cell *= n
            cell += np.fmin(self._steps(x, axis, n), np.float32(n - 1)).astype(np.int64)
        return cell

    def _steps(self, x: Float32Array, axis: int, steps: int) -> Float32Array:
        """Place along an axis in steps from its lower end."""
        low, high = np.float32(self.low[axis]), np.float32(self.high[axis])
        place = np.clip(x[:, axis], low, high)
        place -= low
        place *= np.float32(steps) / (high - low if high > low else np.float32(1))
        return place

    def interpolate(self, values: Float32Array, x: Float32Array) -> Float32Array:
        """Interpolate values (size, m) at the nodes linearly to rows x (n, k), shape (n, m).

        nan where a row has one; a row does not depend on the others.
        """
        out = np.empty((len(x), values.shape[1]), dtype=np.float32)
        strides = [int(np.prod(self.shape[axis + 1 :])) for axis in range(len(self.shape))]
        for first in range(0, len(x), _BLOCK_ROWS):
            block = x[first : first + _BLOCK_ROWS]
            cell = np.zeros(len(block), dtype=np.int64)
            shares = []
            for axis, n in enumerate(self.shape):
                place = self._steps(block, axis, n - 1)
                index = np.fmin(place, np.float32(n - 2)).astype(np.int64)
                cell += index * strides[axis]
                shares.append((place - index).astype(np.float32)[:, None])
            out[first : first + _BLOCK_ROWS] = _between(values, cell, strides, shares)
        return out


def _between(
    values: Float32Array, cell: IntArray, strides: list[int], shares: list[Float32Array]
) -> Float32Array:
    """Linear along the first axis of what is linear along the others."""
    if not strides:
        return np.take(values, cell, axis=0)
    below = _between(values, cell, strides[1:], shares[1:])
    above = _between(values, cell + strides[0], strides[1:], shares[1:])
    above -= below
    above *= shares[0]
    above += below
    return above


def pack(arrays: Sequence[NDArray[Any]]) -> bytes:
    """Write arrays one after the other, in the format of NumPy, as the content of a file."""
    file = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


def unpack(content: bytes | memoryview, what: str) -> list[NDArray[Any]]:
    """Read the arrays of a content that `pack` made; they share its memory.

    Raises `ModelError` where the content, which is named ``what``, is damaged.
    """
    view = memoryview(content)
    arrays: list[NDArray[Any]] = []
    try:
        position = 0
        while position < len(view):
            head = io.BytesIO(bytes(view[position : position + 512]))
            np.lib.format.read_magic(head)
            shape, _, dtype = np.lib.format.read_array_header_1_0(head)
            position += head.tell()
            arrays.append(np.frombuffer(view, dtype, int(np.prod(shape)), position).reshape(shape))
            position += arrays[-1].nbytes
    except (ValueError, EOFError) as error:
        raise ModelError(f"{what} is damaged: {error}") from None
    return arrays


def seal(
    name: str, document: Mapping[str, Any], arrays: Sequence[NDArray[Any]]
) -> dict[str, bytes]:
    """Make the two files of a model, ``NAME.json`` and ``NAME.npy``; equal ones give equal bytes.

    The document says its ``format``; it gets the SHA-256 of the arrays and of itself.
    """
    table = pack(arrays)
    document = {**document, "table_sha256": hashlib.sha256(table).hexdigest()}
    return {f"{name}.npy": table, f"{name}.json": to_json(sealed(document, _by_key))}


def unseal(
    directory: Path, name: str, version: int, what: str
) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Read document and arrays of a model of this format that `seal` made.

    Raises `ModelError` where a file is missing, not the one that was saved, or of another format.
    """
    path, table = directory / f"{name}.json", directory / f"{name}.npy"
    try:
        document, content = json.loads(path.read_bytes()), table.read_bytes()
    except OSError as error:
        hint = f"The {what} is made by a rebuild."
        raise ModelError(f"{error.filename}: {error.strerror}", hint) from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != version:
        hint = "Run the rebuild again, or the command that made it."
        raise ModelError(f"{path}: not the {what} of format {version}, the one known here", hint)
    is_saved = hashlib.sha256(content).hexdigest() == document.get("table_sha256")
    for file, is_same in ((path, sealed(document, _by_key) == document), (table, is_saved)):
        if not is_same:
            hint = "Its SHA-256 is another one: restore it, or rebuild."
            raise ModelError(f"{file} is not the file that was saved with the model", hint)
    return document, unpack(content, str(table))


def _by_key(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True).encode()

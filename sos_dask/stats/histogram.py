"""Quantiles of any number of values in constant memory, the same in any order of parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def count(values: Float32Array) -> tuple[NDArray[np.uint16], IntArray]:
    """Fine logarithmic histogram of finite numbers: the bins that are not empty and their counts.

    A bin is the upper half of a float32 (sign, exponent, 7 bits of mantissa), so bins are 0.4 to
    0.8 % wide at any scale, and counts of any parts add up exactly in any order.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Floats sort like integers once negative ones are flipped.
    ordered = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
    bins, counts = np.unique((ordered >> 16).astype(np.uint16), return_counts=True)
    return bins, counts.astype(np.int64)


class Histogram:
    """Sum of what `count` gives: quantiles in constant memory, the same in any order of parts."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << 16, dtype=np.int64)

    @property
    def n(self) -> int:
        """Number of values."""
        return int(self._counts.sum())

    def add(self, counts: tuple[NDArray[np.uint16], IntArray]) -> None:
        """Add one part."""
        self._counts[counts[0]] += counts[1]

    def quantiles(self, fractions: Sequence[float]) -> FloatArray:
        """Quantiles, interpolated inside their bins (to about 0.1 % of their value)."""
        cumulative = np.cumsum(self._counts)
        out = []
        for fraction in fractions:
            rank = fraction * cumulative[-1]
            index = int(np.searchsorted(cumulative, rank, side="left"))
            index = max(index, int(np.argmax(self._counts > 0)))
            inside = (rank - (cumulative[index] - self._counts[index])) / self._counts[index]
            low, high = _bin_edges(index)
            out.append(low + (high - low) * inside)
        return np.array(out)


def _bin_edges(index: int) -> tuple[float, float]:
    ordered = np.array([index << 16, (index << 16) | 0xFFFF], dtype=np.uint32)
    bits = np.where(ordered >> 31 == 1, ordered & np.uint32((1 << 31) - 1), ~ordered)
    low, high = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return float(low), float(high)

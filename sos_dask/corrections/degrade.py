"""Pairs as fainter rows see their stars: noise added to labels, in inputs and differences alike.

Noise in a label makes a difference of its own: stars scattered upwards show a positive one where
there is no bias at all (regression dilution), and the more so the lower the signal to noise. A
correction learns it from pairs, and these are brighter than the rows that it is applied to. So a
pair also stands for what a row of its kind would see of the same star: at the S/N of a row of the
catalog with like labels (a donor), with noise whose variance is the donor's squared error less its
own. On skies of 400,000 rows, of whose pairs a fifth have S/N below 50 and of whose rows two
fifths, this halves the bins of faint rows that keep a trend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import Float32Array, FloatArray, mixed
from sos_dask.corrections.base import Batch, hash_rows
from sos_dask.problem import SNR, Problem

_NEAREST = 16  # rows with like labels, of which one is the donor
_MOST_REPLICAS, _ENOUGH_PAIRS = 8, 400_000
_WEIGHT = 0.5  # of a degraded pair in that of the pair; 0.25 to 1 are as good


def replicas(n_pairs: int) -> int:
    """Choose how often each of n pairs is degraded: of few pairs more often."""
    return min(max(round(_ENOUGH_PAIRS / max(n_pairs, 1)), 1), _MOST_REPLICAS)


@dataclass(frozen=True, eq=False)
class Donors:
    """Rows (m) of the catalog at whose S/N pairs are seen again.

    ``correlation`` (l, l) is that of the errors of the labels.
    """

    problem: Problem
    features: Float32Array  # (m, k), finite
    errors: Float32Array  # (m, l) of the labels, finite
    correlation: FloatArray

    @cached_property
    def _scale(self) -> FloatArray:
        """Deviations of the inputs of stars."""
        deviation = self.features[:, self.problem.star_places].std(axis=0, dtype=np.float64)
        return np.where(deviation > 0, deviation, 1.0)

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import cKDTree

        return cKDTree(self.features[:, self.problem.star_places] / self._scale)

    def degrade(self, batch: Batch, times: int) -> Batch:
        """Make pairs as fainter rows see them, some ``times`` each.

        Pairs without all inputs and errors, and draws of a donor that is not fainter, are left out.
        What is drawn of a pair follows from its own numbers.
        """
        many = min(_NEAREST, len(self.features))
        if batch.errors is None or not many:
            return rows_of(batch, np.empty(0, dtype=np.intp))
        known = np.isfinite(batch.features).all(axis=1) & np.isfinite(batch.errors).all(axis=1)
        pairs = rows_of(batch, np.flatnonzero(known))
        places = pairs.features[:, self.problem.star_places] / self._scale
        near = self._tree.query(places, k=np.arange(1, many + 1))[1]
        made = [vars(self._once(pairs, near, number)) for number in range(times)]
        columns: Any = {
            name: np.concatenate([one[name] for one in made])
            for name in made[0]
            if name != "degraded"
        }
        return Batch(**columns)

    def _once(self, pairs: Batch, near: NDArray[np.intp], number: int) -> Batch:
        state = hash_rows(pairs.features, pairs.differences) + np.uint64(number)
        row = near[np.arange(len(near)), (mixed(state) % np.uint64(near.shape[1])).astype(int)]
        snr = [place for place, one in enumerate(self.problem.inputs) if one.column == SNR]
        fainter = (self.features[row][:, snr] < pairs.features[:, snr]).all(axis=1)
        pairs, row = rows_of(pairs, np.flatnonzero(fainter)), row[fainter]
        assert pairs.errors is not None
        errors = np.maximum(self.errors[row], pairs.errors)
        more = np.square(errors, dtype=np.float64) - np.square(pairs.errors, dtype=np.float64)
        shape = np.linalg.cholesky(self.correlation)
        noise = np.sqrt(more) * (normals(pairs, number) @ shape.T)
        noisy = replace(with_noise(pairs, self.problem, noise), errors=errors)
        noisy.features[:, snr] = self.features[row][:, snr]
        return replace(noisy, weight=noisy.weight * np.float32(_WEIGHT))


def rows_of(batch: Batch, rows: NDArray[np.intp]) -> Batch:
    """Take some pairs, without these as fainter rows see them."""
    values = {**vars(batch), "degraded": None}.items()
    some: Any = {name: None if one is None else one[rows] for name, one in values}
    return Batch(**some)


def with_noise(batch: Batch, problem: Problem, noise: FloatArray) -> Batch:
    """Add noise (n, l) to the labels of the target: to inputs and differences alike."""
    features = batch.features.astype(np.float64)
    for number, item in enumerate(problem.inputs):
        if item.column not in problem.names:
            continue
        of_label = noise[:, problem.names.index(item.column)] / item.scale
        if item.log10:  # to first order
            of_label = of_label * 10.0 ** -features[:, number] / math.log(10)
        features[:, number] += of_label
    differences = (batch.differences + noise).astype(np.float32)
    return replace(batch, features=features.astype(np.float32), differences=differences)


def normals(batch: Batch, seed: int) -> FloatArray:
    """Draw standard normal numbers, shape (n, l), from a hash of each pair."""
    from scipy.special import ndtri

    state = mixed(hash_rows(batch.features, batch.differences) + np.uint64(seed))
    columns = [mixed(state + np.uint64(number)) for number in range(batch.differences.shape[1])]
    uniform = (np.stack(columns, axis=1) >> np.uint64(11)).astype(np.float64) + 0.5
    return np.asarray(ndtri(uniform / 2.0**53))

"""Pairs in memory with a known bias."""

from dataclasses import dataclass

import numpy as np

from sos_dask.corrections import Batch
from sos_dask.problem import DEFAULT, Problem
from tests.steps import features

NOISE = np.array([60.0, 0.12, 0.06])


@dataclass(frozen=True)
class ArraySource:
    """Pairs in memory, cut at ``cuts``."""

    batch: Batch
    cuts: tuple[int, ...] = ()
    problem: Problem = DEFAULT

    @property
    def n_batches(self) -> int:
        return len(self.cuts) + 1

    def load(self, index: int) -> Batch:
        edges = [0, *self.cuts, len(self.batch.fold)]
        rows = slice(edges[index], edges[index + 1])
        b = self.batch
        errors = None if b.errors is None else b.errors[rows]
        return Batch(b.features[rows], b.differences[rows], b.fold[rows], b.weight[rows], errors)


def bias(x: np.ndarray) -> np.ndarray:
    """Smooth differences with a product of log g and [Fe/H], in K, dex, dex."""
    t, g, m = (x[:, k].astype(np.float64) for k in range(3))
    return np.stack(
        [
            -40 + 220 * (t - 1) - 300 * (t - 1) ** 2 + 35 * m * (g - 3),
            0.08 + 0.10 * m * (g - 3) - 0.05 * (g - 3) ** 2,
            0.04 - 0.15 * (t - 1) - 0.06 * m * (g - 3) + 0.03 * (g - 3) ** 2 * m,
        ],
        axis=1,
    )


def biased_pairs(n: int, seed: int = 0, outliers: float = 0.0) -> Batch:
    """Giants and dwarfs with the differences of `bias`, noise and outliers to one side."""
    rng = np.random.default_rng(seed)
    giant = rng.random(n) < 0.5
    logg = np.where(giant, rng.normal(2.4, 0.5, n), rng.normal(4.3, 0.25, n)).clip(0.5, 5.0)
    teff = np.where(giant, 4000 + 280 * logg, 5700) + rng.normal(0, 300, n)
    feh = (rng.normal(-0.3, 0.35, n)).clip(-2, 0.5)
    x = features(teff, logg, feh)
    y = bias(x) + NOISE * rng.normal(size=(n, 3))
    y += np.where(rng.random((n, 3)) < outliers, rng.uniform(8, 15, (n, 3)) * NOISE, 0)
    return Batch(
        x,
        y.astype(np.float32),
        rng.integers(0, 5, n).astype(np.int8),
        np.ones(n, dtype=np.float32),
    )

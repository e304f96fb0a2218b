"""Groups of pairs that a correction must predict although nothing like them trained it.

Cross-validation leaves out stars at random, so that every left-out star has neighbours that
trained the model. Here whole regions are left out (Roberts et al. 2017, Ecography 40, 913, on
blocked cross-validation): what is found is what to expect where the overlap ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sos_dask.stats.numbers import knn_distance, robust_scale

Floats = NDArray[np.floating]

DENSITY, REGION, REFERENCE, RANDOM = "density", "region", "reference", "random"
SPARSE_SHARE = 0.05
NEIGHBOURS = 10
TEFF_EDGES_K = (4500.0, 5250.0, 6000.0, 7000.0)
LOGG_EDGES = (1.0, 2.0, 3.5)


def density_groups(parameters: Floats, share: float = SPARSE_SHARE) -> tuple[str, ...]:
    """``dense`` or ``sparse`` for every pair, by the distance to its tenth neighbour.

    Parameters
    ----------
    parameters : ndarray of float, shape (n, k)
        A pair with a nan belongs to neither (an empty text).
    share : float
        Part of the pairs that is sparse.
    """
    known = np.isfinite(parameters).all(axis=1)
    out = np.full(len(parameters), "", dtype=object)
    if known.sum() > NEIGHBOURS:
        center, scale = robust_scale(parameters[known])
        z = np.clip((parameters[known] - center) / scale, -10.0, 10.0)
        distance = knn_distance(z, z, NEIGHBOURS + 1)
        sparse = distance > np.quantile(distance, 1.0 - share)
        out[known] = np.where(sparse, "sparse", "dense")
    return tuple(out.tolist())


def region_groups(teff: Floats, logg: Floats) -> tuple[str, ...]:
    """Cell of the Kiel diagram of every pair, in words.

    Parameters
    ----------
    teff : ndarray of float, shape (n,), K
    logg : ndarray of float, shape (n,), dex (cgs)
    """
    hot = np.searchsorted(TEFF_EDGES_K, teff, side="right")
    compact = np.searchsorted(LOGG_EDGES, logg, side="right")
    across = _intervals("Teff", TEFF_EDGES_K)
    down = _intervals("log g", LOGG_EDGES)
    known = np.isfinite(teff) & np.isfinite(logg)
    return tuple(
        f"{across[i]}, {down[j]}" if good else ""
        for i, j, good in zip(hot.tolist(), compact.tolist(), known.tolist(), strict=True)
    )


def _intervals(name: str, edges: tuple[float, ...]) -> list[str]:
    inner = [f"{low:g} <= {name} < {high:g}" for low, high in pairwise(edges)]
    return [f"{name} < {edges[0]:g}", *inner, f"{name} >= {edges[-1]:g}"]


def left_out_groups(splits: Mapping[str, tuple[str, ...]], min_pairs: int) -> list[tuple[str, str]]:
    """Groups that are left out one after the other, as (split, group), sorted.

    A group is left out if it and the rest have ``min_pairs`` pairs each. Of the dense and the
    sparse pairs only the sparse ones are: the question is what training on the dense ones gives.
    """
    chosen = []
    for split, groups in splits.items():
        names, counts = np.unique([name for name in groups if name], return_counts=True)
        total = int(counts.sum())
        chosen += [
            (split, str(name))
            for name, n in zip(names, counts.tolist(), strict=True)
            if min(n, total - n) >= min_pairs and (split, name) != (DENSITY, "dense")
        ]
    return sorted(chosen)

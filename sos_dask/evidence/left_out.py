"""Groups of pairs that a correction must predict although nothing like them trained it.

Cross-validation leaves out stars at random, so that every left-out star has neighbours that
trained the model. Here whole regions are left out (Roberts et al. 2017, Ecography 40, 913, on
blocked cross-validation): what is found is what to expect where the overlap ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

DENSITY, REGION, REFERENCE, RANDOM = "density", "region", "reference", "random"
DENSE, SPARSE = "dense", "sparse"
TEFF_EDGES_K = (4500.0, 5250.0, 6000.0, 7000.0)
LOGG_EDGES = (1.0, 2.0, 3.5)


def region_groups(teff: NDArray[np.floating], logg: NDArray[np.floating]) -> list[str]:
    """Name the cell of the Kiel diagram of every pair; empty where a label is not known.

    Parameters
    ----------
    teff : ndarray of float, shape (n,), K
    logg : ndarray of float, shape (n,), dex (cgs)
    """
    across, down = _intervals("Teff", TEFF_EDGES_K), _intervals("log g", LOGG_EDGES)
    names = np.array([[f"{one}, {other}" for other in down] for one in across])
    hot = np.searchsorted(TEFF_EDGES_K, teff, side="right")
    compact = np.searchsorted(LOGG_EDGES, logg, side="right")
    found: list[str] = np.where(np.isfinite(teff + logg), names[hot, compact], "").tolist()
    return found


def _intervals(name: str, edges: tuple[float, ...]) -> list[str]:
    inner = [f"{low:g} <= {name} < {high:g}" for low, high in pairwise(edges)]
    return [f"{name} < {edges[0]:g}", *inner, f"{name} >= {edges[-1]:g}"]


def left_out_groups(splits: Mapping[str, Sequence[str]], min_pairs: int) -> list[tuple[str, str]]:
    """List the groups that are left out one after the other, as (split, group), sorted.

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
            if min(n, total - n) >= min_pairs and (split, name) != (DENSITY, DENSE)
        ]
    return sorted(chosen)

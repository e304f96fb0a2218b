"""Folds for cross-validation: every pair of one star in one fold."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def fold_of_stars(
    target: NDArray[np.int64], reference_id: pa.ChunkedArray, n_folds: int, seed: int
) -> NDArray[np.int8]:
    """Assign folds so that pairs which share a target or a reference star stay together.

    Parameters
    ----------
    target : ndarray of int64, shape (n,)
        Equal for pairs of the same target star.
    reference_id : pyarrow array of shape (n,)
        Id of the reference star of each pair.
    n_folds, seed : int

    Returns
    -------
    ndarray of int8, shape (n,)
        0 to ``n_folds - 1``: the SHA-256 of the smallest reference id of the connected pairs, so
        that a fold depends on the stars alone, not on their order or on other stars.
    """
    n = len(target)
    if n == 0:
        return np.empty(0, dtype=np.int8)
    encoded = pc.dictionary_encode(reference_id.cast(pa.string())).combine_chunks()
    reference = encoded.indices.to_numpy().astype(np.int64)
    names = encoded.dictionary.to_numpy(zero_copy_only=False)
    _, target_index = np.unique(target, return_inverse=True)
    n_references = len(names)
    size = n_references + int(target_index.max()) + 1
    links = coo_array(
        (np.ones(n, dtype=np.int8), (reference, n_references + target_index)), shape=(size, size)
    )
    _, component = connected_components(links, directed=False)
    by_name = np.argsort(names.astype(str), kind="stable")
    _, first = np.unique(component[by_name], return_index=True)
    smallest = {int(component[by_name[i]]): str(names[by_name[i]]) for i in first}
    fold_of = np.zeros(int(component.max()) + 1, dtype=np.int8)
    for number, name in smallest.items():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        fold_of[number] = int.from_bytes(digest[:8], "big") % n_folds
    folds: NDArray[np.int8] = fold_of[component[reference]]
    return folds

"""Projection of many parameters onto a plane, for looking: UMAP of a sample, and where rows fall.

UMAP (McInnes, Healy & Melville 2018, arXiv 1802.03426) lays out a sample. Any row is then placed at
the mean of its nearest neighbours in the sample, weighted by one over the squared distance: UMAP's
own transform starts there too (section 5 of the paper), goes on with a random search, is forty
times slower, and depends on which rows it is given together; this does not. The n-th neighbour may
be half as far again as the n-th nearest (Arya et al. 1998, Journal of the ACM 45, 891): most are
the nearest, and they are found in half the time. Rows beside the sample cannot be told from those
in it, so a projection shows what the overlap looks like; whether a correction can be trusted is
said by the coverage score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from sos_dask.columns import BoolArray, Float32Array, FloatArray, FloatingArray, IntArray
from sos_dask.errors import ConfigError, ModelError
from sos_dask.settings import Seed, Settings
from sos_dask.stats.numbers import uniform

_STRATA = {"teff": 500.0, "logg": 0.5, "feh": 0.5}  # cells whose rows are sampled alike
_MIN_SAMPLE = 100
_LIMIT = 5.0  # of a scaled parameter: an outlier is far away, however far
_NEAREST = 1e-6
_BLOCK = 1 << 16
_SLACK = 0.5  # by how much farther than the nearest a neighbour may be
_LEAF = 32  # points of the sample in a leaf of the tree


class ProjectionSettings(Settings):
    """A UMAP of target and overlap, for looking."""

    sample_rows: int = Field(
        20_000,
        ge=_MIN_SAMPLE,
        le=1_000_000,
        description="Rows that UMAP lays out: half of the target, half of the overlap, as far as "
        "there are",
    )
    n_neighbors: int = Field(15, ge=2, le=200, description="Of UMAP: neighbours make the structure")
    min_dist: float = Field(
        0.1, ge=0, le=1, description="Of UMAP: how close points of the plane may lie"
    )
    neighbors: int = Field(15, ge=1, le=100, description="Rows of the sample that place a row")
    map_bins: int = Field(256, ge=8, le=4096, description="Cells of the maps along each axis")
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Of the rows of the target that get a place, chosen by their keys; the pairs "
        "all get one",
    )
    seed: Seed = 0


def strata(columns: Mapping[str, FloatingArray]) -> IntArray:
    """Number the cell of label space of every row; rows with a missing label are in cell 0."""
    cell = np.ones(len(next(iter(columns.values()))), dtype=np.int64)
    for name, width in _STRATA.items():
        if name in columns:
            index = np.floor(np.asarray(columns[name], dtype=np.float64) / width)
            known = np.isfinite(index)
            index = np.clip(np.where(known, index, 0), -500, 499).astype(np.int64) + 500
            cell = np.where(known & (cell > 0), cell * 1000 + index, 0)
    return cell


def sampling_rates(counts: Mapping[int, int], sample_rows: int) -> dict[int, float]:
    """Find the share of the rows of every stratum that makes a sample of about this size.

    Strata get places in proportion to the square root of their rows (Bankier 1988, The American
    Statistician 42, 174, with power 1/2), so that rare stars are there without ruling the picture.
    """
    n = np.array(list(counts.values()), dtype=np.float64)
    places, is_full = np.zeros(len(n)), np.zeros(len(n), dtype=np.bool_)
    while not is_full.all():
        left, root = sample_rows - n[is_full].sum(), np.sqrt(n)
        places = np.where(is_full, n, left * root / root[~is_full].sum())
        if not (places[~is_full] >= n[~is_full]).any():
            break
        is_full |= places >= n
    return dict(zip(counts, np.minimum(places / n, 1.0).tolist(), strict=True))


def chosen_rows(
    keys: IntArray, cells: IntArray, rates: Mapping[int, float], seed: int
) -> BoolArray:
    """Choose the rows of the sample by a hash of their keys, whatever their order or partition.

    Cells (n,) are those of `strata`; one that the `sampling_rates` lack gives no row.
    """
    known, place = np.unique(cells, return_inverse=True)
    share = np.array([rates.get(cell, 0.0) for cell in known.tolist()])
    return np.asarray(uniform(keys, seed) < share[place])


@dataclass(frozen=True, eq=False)
class Projection:
    """A plane that rows can be placed on."""

    names: tuple[str, ...]  # of the k parameters
    center: FloatArray  # (k,): median of the sample
    scale: FloatArray  # (k,): half the width from the 16th to the 84th percentile
    sample: Float32Array  # (n, k), scaled
    plane: Float32Array  # (n, 2): where UMAP laid the sample out
    neighbors: int

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import cKDTree

        return cKDTree(self.sample, leafsize=_LEAF)

    def place(self, parameters: FloatArray) -> Float32Array:
        """Place rows with parameters (n, k) on the plane (n, 2), nan where one is unknown.

        A row's place does not depend on the other rows.
        """
        out = np.full((len(parameters), 2), np.nan, dtype=np.float32)
        known = np.flatnonzero(np.isfinite(parameters).all(axis=1))
        for first in range(0, len(known), _BLOCK):
            rows = known[first : first + _BLOCK]
            z = _scaled(parameters[rows], self.center, self.scale)
            k = np.arange(min(self.neighbors, len(self.sample))) + 1
            distance, index = self._tree.query(z, k=k, eps=_SLACK)
            weight = 1.0 / np.maximum(distance, _NEAREST) ** 2
            weight /= weight.sum(axis=1, keepdims=True)
            out[rows] = np.einsum("ij,ijk->ik", weight, self.plane[index])
        return out

    def limits(self, margin: float = 0.02) -> tuple[float, float, float, float]:
        """Bound the plane with a margin: low and high along each axis."""
        low, high = self.plane.min(axis=0), self.plane.max(axis=0)
        pad = margin * (high - low)
        (a, c), (b, d) = (low - pad).tolist(), (high + pad).tolist()
        return a, b, c, d


def _scaled(parameters: FloatArray, center: FloatArray, scale: FloatArray) -> Float32Array:
    return np.clip((parameters - center) / scale, -_LIMIT, _LIMIT).astype(np.float32)


def fit_projection(
    parameters: FloatArray, names: Sequence[str], settings: ProjectionSettings
) -> Projection:
    """Lay out a sample with UMAP; the same sample gives the same plane.

    Rows of the parameters (n, k), of `problem.parameter_matrix`, are left out where one is nan.
    Raises `ConfigError` where umap-learn is not installed, and `ModelError` at too few rows or a
    parameter that is constant.
    """
    try:
        import umap
    except ImportError:
        hint = "pip install 'sos_dask[umap]', or leave [projection] out of the job."
        raise ConfigError("a projection needs umap-learn, which is not installed", hint) from None
    known = parameters[np.isfinite(parameters).all(axis=1)]
    if len(known) < _MIN_SAMPLE:
        raise ModelError(
            f"{len(known)} of {len(parameters)} sampled rows have all of {', '.join(names)}: a "
            f"projection needs {_MIN_SAMPLE}",
            "Leave out parameters that are mostly missing, or attach a catalog that has them.",
        )
    low, center, high = np.percentile(known, (15.87, 50.0, 84.13), axis=0)
    scale = (high - low) / 2.0
    for name, width in zip(names, scale, strict=True):
        if not width > 0:
            raise ModelError(f"{name} is the same in most rows: it cannot be scaled")
    z = _scaled(known, center, scale)
    near, how = min(settings.n_neighbors, len(z) - 1), {"min_dist": settings.min_dist, "n_jobs": 1}
    layout = umap.UMAP(n_neighbors=near, random_state=settings.seed, **how)
    plane = np.asarray(layout.fit_transform(z), dtype=np.float32)
    return Projection(tuple(names), center, scale, z, plane, settings.neighbors)


def density_map(
    plane: Float32Array, limits: tuple[float, float, float, float], bins: int
) -> IntArray:
    """Count rows in each cell of the plane, (bins, bins): first axis along the first coordinate.

    Rows without a place, or outside the limits, are not counted.
    """
    counts, _, _ = np.histogram2d(plane[:, 0], plane[:, 1], bins, range=(limits[:2], limits[2:]))
    return counts.astype(np.int64)

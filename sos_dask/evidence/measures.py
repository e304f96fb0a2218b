"""Distances of rows from the overlap: small where overlap stars are dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ModelError
from sos_dask.schema import LABELS

if TYPE_CHECKING:
    from sos_dask.stats.kdtree import Tree

FloatArray = NDArray[np.float64]

MEASURES = ("neighbours", "neighbours8", "ratio", "mixture")
OF_LABELS = ("neighbours", "mixture")
"""Measures that see the three labels alone, as a correction does."""
NEIGHBOURS = 16  # 4 to 16 predict the error equally well on the simulation


LEAST_SHARE = 0.25  # 0.2 to 0.4 find the same rows on the simulation


class Measure(Protocol):
    """How far a row is from the overlap."""

    def distance(self, x: FloatArray) -> FloatArray:
        """Distances of rows (n, k) on the scale of the model; missing parameters are nan."""


@dataclass(frozen=True)
class Neighbours:
    """Distance to the k-th nearest overlap star, over the parameters that a row has.

    A row that lacks a parameter is compared, in the others, with the overlap stars that have them;
    its distance is scaled to the full number of parameters by the root of the ratio.
    """

    overlap: FloatArray
    k: int = NEIGHBOURS

    def distance(self, x: FloatArray) -> FloatArray:
        """See `Measure`; nan where a label is missing."""
        n_all = self.overlap.shape[1]
        x = x[:, :n_all]
        known = np.isfinite(x)
        pattern = known @ (1 << np.arange(n_all))
        out = np.full(len(x), np.nan)
        for code in np.unique(pattern[known[:, : len(LABELS)].all(axis=1)]):
            rows = np.flatnonzero(pattern == code)
            used = np.flatnonzero((code >> np.arange(n_all)) & 1)
            kth_distance = self._kth_distance(tuple(used.tolist()))
            out[rows] = kth_distance(x[np.ix_(rows, used)]) * np.sqrt(n_all / len(used))
        return out

    def _kth_distance(self, used: tuple[int, ...]) -> Callable[[FloatArray], FloatArray]:
        """What measures rows in some of the parameters; it is kept."""
        kept: dict[tuple[int, ...], Callable[[FloatArray], FloatArray]]
        kept = self.__dict__.setdefault("_kept", {})
        if used not in kept:
            points = self.overlap[:, used]
            points = points[np.isfinite(points).all(axis=1)]
            if not len(points):
                raise ModelError("no overlap star has the parameters that some rows have")
            k = min(self.k, len(points))
            if len(used) == len(LABELS):
                from sos_dask.stats.kdtree import Tree

                kept[used] = partial(Tree(points).kth_distance, k=k)
            else:
                from scipy.spatial import cKDTree

                tree = cKDTree(points)
                kept[used] = lambda x: tree.query(x, k=[k])[0][:, 0]
        return kept[used]


@dataclass(frozen=True)
class Share:
    """How many overlap stars there are near a row, in proportion to the rows of the catalog there.

    1 where the overlap is as frequent as it is on average: a ratio of densities, from the
    overlap stars and the rows of the catalog within the distance of the k-th overlap star.

    Parameters
    ----------
    overlap, catalog : ndarray of float64, shape (n, 3) and (m, 3)
        Scaled labels; finite.
    k : int
    """

    overlap: FloatArray
    catalog: FloatArray
    k: int = NEIGHBOURS

    def lacks(self, x: FloatArray, distance: FloatArray | None = None) -> NDArray[np.bool_]:
        """Rows near which the overlap has less than `LEAST_SHARE` of its average.

        Parameters
        ----------
        x : ndarray of float64, shape (n, 3)
            Scaled labels.
        distance : ndarray of float64, shape (n,), optional
            To the k-th overlap star, where it is known already; nan where a label is.
        """
        if not len(x):
            return np.zeros(0, dtype=np.bool_)
        if distance is None:
            distance = self._neighbours.distance(x)
        found = np.zeros(len(x), dtype=np.bool_)
        # As many rows of the catalog are within the distance where the share is the least.
        k = min(self.k, len(self.overlap))
        most = k / LEAST_SHARE * len(self.catalog) / len(self.overlap)
        # Where they lie as near as in the denser four fifths of the overlap, nothing is lacking.
        rows = np.flatnonzero(distance > self._near)
        found[rows] = self._rows.has_more(x[rows], distance[rows], most)
        return found

    @cached_property
    def _neighbours(self) -> Neighbours:
        return Neighbours(self.overlap, self.k)

    @cached_property
    def _rows(self) -> Tree:
        from sos_dask.stats.kdtree import Tree

        return Tree(self.catalog)

    @cached_property
    def _near(self) -> float:
        """Distance to the k-th of the others that four fifths of the overlap stars have."""
        some = self.overlap[:: max(len(self.overlap) // 10_000, 1)]
        k = min(self.k + 1, len(self.overlap))
        return float(np.quantile(Neighbours(self.overlap, k).distance(some), 0.8))


@dataclass(frozen=True)
class Ratio:
    """Density of the catalog over that of the overlap, by boosted trees.

    A missing parameter is a branch of its own in the trees: nothing is put in its place.
    """

    model: bytes

    @classmethod
    def fit(cls, overlap: FloatArray, catalog: FloatArray, seed: int) -> Ratio:
        """Train the classifier that tells overlap stars from rows of the catalog."""
        import xgboost as xgb

        x = np.concatenate([overlap, catalog]).astype(np.float32)
        y = np.repeat([1.0, 0.0], [len(overlap), len(catalog)])
        weight = np.where(y > 0, len(catalog) / max(len(overlap), 1), 1.0)
        params = {
            "objective": "binary:logistic", "max_depth": 4, "eta": 0.1, "min_child_weight": 20,
            "nthread": 1, "seed": seed, "tree_method": "hist",
        }  # fmt: skip
        booster = xgb.train(params, xgb.DMatrix(x, y, weight=weight, nthread=1), 100)
        return cls(bytes(booster.save_raw("ubj")))

    def distance(self, x: FloatArray) -> FloatArray:
        """See `Measure`."""
        import xgboost as xgb

        if "_booster" not in self.__dict__:
            booster = xgb.Booster(model_file=bytearray(self.model))
            booster.set_param({"nthread": 1})
            self.__dict__["_booster"] = booster
        margin = self.__dict__["_booster"].inplace_predict(
            x.astype(np.float32), predict_type="margin"
        )
        labels_known = np.isfinite(x[:, : len(LABELS)]).all(axis=1)
        return np.where(labels_known, np.exp(-margin.astype(np.float64)), np.nan)


@dataclass(frozen=True)
class Mixture:
    """Density of the overlap in the labels as Gaussians, turned into a distance."""

    weights: FloatArray
    means: FloatArray
    precisions_cholesky: FloatArray

    @classmethod
    def fit(cls, overlap: FloatArray, seed: int, n_gaussians: int = 16) -> Mixture:
        """Fit by expectation maximisation, on at most 20,000 stars."""
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        rng = np.random.default_rng(seed)
        labels = overlap[:, : len(LABELS)]
        if len(labels) > 20_000:
            labels = labels[np.sort(rng.choice(len(labels), 20_000, replace=False))]
        n_gaussians = min(n_gaussians, len(labels) // 50 + 1)
        with threadpool_limits(1):  # small products: threads cost more than they bring
            fitted = GaussianMixture(n_gaussians, random_state=seed, reg_covar=1e-3).fit(labels)
        return cls(fitted.weights_, fitted.means_, fitted.precisions_cholesky_)

    def distance(self, x: FloatArray) -> FloatArray:
        """See `Measure`; nan where a label is missing."""
        known = np.isfinite(x[:, : len(LABELS)]).all(axis=1)
        labels = x[known, : len(LABELS)]
        log_density = np.full(len(labels), -np.inf)
        for weight, mean, precision in zip(
            self.weights, self.means, self.precisions_cholesky, strict=True
        ):
            # No matrix product: its last digits depend on the other rows.
            y = ((labels - mean)[:, :, None] * precision).sum(axis=1)
            log_volume = np.log(np.diag(precision)).sum() + np.log(weight)
            log_density = np.logaddexp(log_density, log_volume - 0.5 * (y * y).sum(axis=1))
        out = np.full(len(x), np.nan)
        out[known] = np.exp(np.minimum(-log_density / len(LABELS), 50.0))
        return out

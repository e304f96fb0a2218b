"""How well the overlap represents a star: a distance to the overlap, calibrated as error growth.

A measure gives every row a distance from the overlap, small where overlap stars are dense. On pairs
that no correction was trained on, the residual in units of the noise at its signal to noise grows
with that distance. The growth is 1 in the nearer half of the pairs and rises with what is measured
beyond (`growth.Growth`); coverage = 1 / growth, so a coverage c says: the error of the corrected
labels is 1/c times that of a star of the same signal to noise in the dense overlap. The rows are
*inside*, *sparse* or *outside* by two limits of the coverage. Outside are, too, rows of a kind that
the overlap lacks, near which it has less than a quarter of the stars that the number of such rows
calls for (`_Neighbours.lacks`), and rows beyond the outermost held-out pairs, where growth cannot
be measured: the coverage of both is held below the limit.

The error model of a correction knows something of all this already. What it does not know is
counted on held-out pairs: for each kind of place, apart for the two classes of the error model, by
what its half-widths are to be multiplied to hold 68 % of all measurements (`widening`). Places
outside are of two kinds. Where stars of all surveys are few, pairs are there, and many are wrong
measurements. Where the overlap alone lacks stars there are no pairs, and the widths are
extrapolated.

Measures (``MEASURES``):

* ``neighbours``: distance to the k-th nearest overlap star in the inputs that a correction sees, on
  one robust scale;
* ``ratio``: density of the catalog over that of the overlap in all parameters, by a classifier
  (Sugiyama, Suzuki & Kanamori 2012, Density Ratio Estimation in Machine Learning, chapter 4).

Neighbours are counted once, at the nodes of a grid over the inputs; rows are looked up in between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import BoolArray, Float32Array, FloatArray, IntArray
from sos_dask.errors import ModelError
from sos_dask.evidence.growth import Growth, Noise
from sos_dask.evidence.widening import LACKING, OUTSIDE, Limits, Placed, Widths, fit_widths
from sos_dask.problem import DEFAULT, Input, Problem
from sos_dask.stats.numbers import count_within, knn_distance, robust_scale
from sos_dask.stats.table import Grid, pack

Columns = Mapping[str, NDArray[np.floating]]

MEASURES = ("neighbours", "ratio")
NEIGHBOURS = 16  # 4 to 16 predict the error equally well on the simulation
LEAST_SHARE = 0.25  # 0.2 to 0.4 find the same rows on the simulation
MIN_HELD_OUT = 100
WRONG_SIGMA = 4.0
_REACH = 0.6  # beyond it the polynomial is worse than a constant, on the simulation
_MOST_NODES, _NODES_A_STAR = 72**3, 256  # steps far finer than distances to the 16th neighbour
_MOST_ALONG = 512  # nodes of an axis
_EDGE = 0.0005  # share of the stars beyond each side of the grid
_FORMAT = 5
MODEL_FILE, TABLE_FILE, OVERLAP_FILE, RATIO_FILE = (
    "coverage.json", "coverage.npy", "overlap.npy", "ratio.ubj",
)  # fmt: skip


@dataclass(frozen=True)
class Overlap:
    """The pairs fit for training, with what is known of those that were held out.

    Parameters
    ----------
    columns : mapping of str to ndarray of float, shape (n,)
        Parameters of the target, nan where unknown.
    fold : ndarray of int8, shape (n,)
    residual : ndarray of float64, shape (n, l)
        Difference less predicted difference, one column a label; nan for pairs that were not held
        out.
    reference_error : ndarray of float64, shape (n, l)
        Stated errors of the reference, nan where unknown.
    half_width : ndarray of float64, shape (n, l), optional
        By the error model of the correction; nan for pairs whose residuals it does not speak of.
    error_class : ndarray of int8, shape (n,), optional
        1 where the error model has its pairs in its sparse class.
    """

    columns: Columns
    fold: NDArray[np.int8]
    residual: FloatArray
    reference_error: FloatArray
    half_width: FloatArray | None = None
    error_class: NDArray[np.int8] | None = None

    @property
    def held_out(self) -> BoolArray:
        """Pairs with residuals in all labels, shape (n,)."""
        return np.asarray(np.isfinite(self.residual).all(axis=1))


@dataclass(frozen=True)
class Target:
    """Rows whose intervals are to hold: a sample of the catalog, of rows that pass the cuts.

    Parameters
    ----------
    columns : mapping of str to ndarray of float, shape (m,)
        As those of the overlap.
    error_class : ndarray of int8, shape (m,)
        1 where the error model has them in its sparse class.
    """

    columns: Columns
    error_class: NDArray[np.int8]


class _Neighbours:
    """Overlap stars and rows of the catalog around a place, in scaled inputs."""

    def __init__(self, overlap: FloatArray, catalog: FloatArray, k: int = NEIGHBOURS) -> None:
        self.overlap, self.catalog, self.k = overlap, catalog, min(k, len(overlap))

    def distance(self, x: FloatArray, within: float = np.inf) -> FloatArray:
        """Measure the distance to the k-th overlap star; infinite beyond ``within``."""
        return knn_distance(self.overlap, x, self.k, within)

    def lacks(self, x: FloatArray, distance: FloatArray) -> BoolArray:
        """Tell near which rows the overlap has less than `LEAST_SHARE` of its average.

        The share is that of densities, from the overlap stars and the rows of the catalog within
        the distance of the k-th overlap star.
        """
        # As many rows of the catalog are within the distance where the share is the least.
        most = int(self.k / LEAST_SHARE * len(self.catalog) / len(self.overlap))
        found = np.zeros(len(x), dtype=np.bool_)
        # Where they lie as near as in the denser four fifths of the overlap, nothing is lacking.
        rows = np.flatnonzero(distance > self._near)
        if most < len(self.catalog) and len(rows):
            found[rows] = count_within(self.catalog, x[rows], distance[rows]) > most
        return found

    @cached_property
    def _near(self) -> float:
        """Distance to the k-th of the others that four fifths of the overlap stars have."""
        some = self.overlap[:: max(len(self.overlap) // 10_000, 1)]
        k = min(self.k + 1, len(self.overlap))
        return float(np.quantile(knn_distance(self.overlap, some, k), 0.8))


@dataclass(frozen=True)
class Places:
    """Distance from the overlap, and where the overlap lacks stars, at the nodes of a grid.

    Parameters
    ----------
    grid : Grid
        Over scaled inputs.
    values : ndarray of float32, shape (nodes, 2)
        Distance to the k-th overlap star, and 1 where the overlap lacks stars.
    """

    grid: Grid
    values: Float32Array = field(repr=False)

    @classmethod
    def of(cls, around: _Neighbours, last: float) -> Places:
        """Count the neighbours of every node; beyond twice the distance ``last`` all is as far."""
        stars = np.concatenate([around.overlap, around.catalog])
        low, high = np.quantile(stars, (_EDGE, 1 - _EDGE), axis=0)
        n_nodes = min(_MOST_NODES, _NODES_A_STAR * len(around.overlap))
        extent = np.maximum(high - low, 1e-6)
        step = float((np.prod(extent) / n_nodes) ** (1 / len(extent)))
        shape = np.clip(np.ceil(extent / step), 2, _MOST_ALONG).astype(int)
        grid = Grid(tuple(low.tolist()), tuple(high.tolist()), tuple(shape.tolist()))
        farthest = 2 * last + 2 * step
        nodes = grid.nodes()
        distance = np.minimum(around.distance(nodes, farthest), farthest)
        lacks = around.lacks(nodes, distance)
        return cls(grid, np.stack([distance, lacks], axis=1).astype(np.float32))

    def __call__(self, x: FloatArray) -> tuple[FloatArray, BoolArray]:
        """Distance (n,) of scaled rows (n, k), nan where they are, and where stars are lacking."""
        found = self.grid.interpolate(self.values, x.astype(np.float32)).astype(np.float64)
        # A row beyond the grid is as much farther as it is from the grid.
        beyond = np.maximum(np.array(self.grid.low) - x, x - np.array(self.grid.high))
        beyond = np.maximum(beyond, 0.0)
        distance = found[:, 0] + np.sqrt(np.sum(beyond * beyond, axis=1))
        return distance, found[:, 1] > 0.5


@dataclass(frozen=True)
class Ratio:
    """Density of the catalog over that of the overlap, by boosted trees.

    A missing parameter is a branch of its own in the trees: nothing is put in its place.
    """

    model: bytes = field(repr=False)

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

    @cached_property
    def _booster(self) -> Any:
        import xgboost as xgb

        booster = xgb.Booster(model_file=bytearray(self.model))
        booster.set_param({"nthread": 1})
        return booster

    def distance(self, x: FloatArray) -> FloatArray:
        """Ratio of scaled rows (n, k); missing parameters are nan."""
        margin = self._booster.inplace_predict(x.astype(np.float32), predict_type="margin")
        return np.asarray(np.exp(-margin.astype(np.float64)))


@dataclass(frozen=True)
class CoverageModel:
    """A measure with its scaling, and what its distances mean.

    Parameters
    ----------
    parameters : tuple of Input
        What rows are measured in: the inputs of the correction, for ``ratio`` and all else that the
        catalog has.
    n_inputs : int
        How many of them are inputs of the correction: without one a row has no coverage.
    center, scale : ndarray of float64, shape (k,)
    places : Places
    overlap : ndarray of float64, shape (n, n_inputs)
        Scaled inputs of the overlap stars.
    noise : Noise
    growth : Growth
    limits : Limits
    widths : Widths
        How the half-widths of an error model are widened.
    ratio : Ratio, optional
        The measure, where it is that.
    """

    parameters: tuple[Input, ...]
    n_inputs: int
    center: FloatArray
    scale: FloatArray
    places: Places
    overlap: FloatArray = field(repr=False)
    noise: Noise
    growth: Growth
    limits: Limits
    widths: Widths
    ratio: Ratio | None = None

    @property
    def reach(self) -> float:
        """Scaled distance to the nearest overlap star up to which a smooth model is extended."""
        return _REACH

    def scaled(self, columns: Columns) -> FloatArray:
        """Put parameters of rows on the scale of the model, nan where unknown."""
        return (_matrix(self.parameters, columns) - self.center) / self.scale

    def coverage(self, columns: Columns) -> tuple[Float32Array, NDArray[np.int8]]:
        """Coverage of rows, 0 to 1, and which of `KINDS` their places are.

        nan and -1 where an input is missing.
        """
        x = self.scaled(columns)
        distance, lacks = self.places(x[:, : self.n_inputs])
        if self.ratio is not None:
            distance = np.where(np.isfinite(distance), self.ratio.distance(x), np.nan)
        return self.coverage_at(distance, lacks)

    def coverage_at(
        self, distance: FloatArray, lacks: BoolArray
    ) -> tuple[Float32Array, NDArray[np.int8]]:
        """See `coverage`: of rows at known distances, and where the overlap lacks stars."""
        coverage = (1.0 / self.growth(distance)).astype(np.float32)
        outside = lacks | (distance > self.growth.last)
        below = np.nextafter(np.float32(self.limits.outside), np.float32(0))
        coverage[outside] = np.minimum(coverage[outside], below)
        kind = self.limits.classify(coverage)
        kind[lacks] = LACKING
        kind[np.isnan(coverage)] = -1
        return coverage, kind

    def within_reach(self, features: Float32Array) -> Float32Array:
        """Draw features towards their nearest overlap star until they are just outside.

        A smooth correction can be extended a little beyond its data, not without end: what is
        predicted at the returned place is held constant farther out.

        Parameters
        ----------
        features : ndarray of float32, shape (n, n_inputs)
            Finite.
        """
        center, scale = self.center[: self.n_inputs], self.scale[: self.n_inputs]
        x = (features - center) / scale
        distance, index = self._tree.query(x)
        share = np.minimum(1.0, self.reach / np.maximum(distance, 1e-12))[:, None]
        near = self.overlap[index]
        return np.asarray((near + (x - near) * share) * scale + center, dtype=np.float32)

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import cKDTree

        return cKDTree(self.overlap)

    def files(self) -> dict[str, bytes]:
        """Content of the files of the model, by name."""
        document: dict[str, Any] = {
            "format": _FORMAT,
            "measure": "neighbours" if self.ratio is None else "ratio",
            "parameters": [one.as_json for one in self.parameters],
            "n_inputs": self.n_inputs,
            "center": self.center.tolist(),
            "scale": self.scale.tolist(),
            "grid": asdict(self.places.grid),
            "noise": asdict(self.noise),
            "growth": asdict(self.growth),
            "limits": self.limits.as_json,
            "widths": self.widths.as_json(),
        }
        files = {MODEL_FILE: json.dumps(document, indent=1, sort_keys=True).encode()}
        files |= {TABLE_FILE: pack([self.places.values]), OVERLAP_FILE: pack([self.overlap])}
        if self.ratio is not None:
            files[RATIO_FILE] = self.ratio.model
        return files

    @classmethod
    def load(cls, directory: Path) -> CoverageModel:
        """Read a saved model.

        Raises
        ------
        ModelError
            A file is missing, damaged or of another format.
        """
        try:
            document = json.loads((directory / MODEL_FILE).read_text())
            if document["format"] != _FORMAT:
                raise ModelError(
                    f"{directory / MODEL_FILE} has format {document['format']}, not {_FORMAT}",
                    "Make the product again with this version of sos-dask.",
                )
            grid = {name: tuple(value) for name, value in document["grid"].items()}
            noise = {name: tuple(map(tuple, value)) for name, value in document["noise"].items()}
            growth = document["growth"]
            values = np.load(directory / TABLE_FILE)
            if values.shape != (int(np.prod(grid["shape"])), 2):
                raise ValueError(f"{TABLE_FILE} has another shape than its grid")
            ratio = None
            if document["measure"] == "ratio":
                ratio = Ratio((directory / RATIO_FILE).read_bytes())
            return cls(
                tuple(Input(**one) for one in document["parameters"]),
                document["n_inputs"],
                np.array(document["center"]),
                np.array(document["scale"]),
                Places(Grid(**grid), values),
                np.load(directory / OVERLAP_FILE),
                Noise(**noise),
                Growth(tuple(growth["distance"]), tuple(growth["growth"]), float(growth["last"])),
                Limits(**document["limits"]),
                Widths.from_json(document["widths"]),
                ratio,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the coverage model in {directory} is missing or damaged: {error!r}",
                "Make the product again.",
            ) from None


@dataclass(frozen=True)
class Fit:
    """A fitted model, and on what it stands.

    Parameters
    ----------
    model : CoverageModel
    bins : list of dict
        Of held-out pairs by distance: measured and fitted growth.
    n_held_out, n_wrong : int
        Held-out pairs, and those of them that are off by more than `WRONG_SIGMA` in all labels at
        once: wrong measurements, which say nothing of the growth and are left out of it.
    outside : float
        Share of the held-out pairs that the model calls outside.
    n_width : tuple of tuple of int
        Pairs that the widths were counted on, by class of the error model and kind of place.
    """

    model: CoverageModel
    bins: list[dict[str, float]]
    n_held_out: int
    n_wrong: int
    outside: float
    n_width: tuple[tuple[int, ...], ...]


def fit(
    overlap: Overlap,
    catalog: Columns,
    measure: str,
    limits: Limits,
    seed: int = 0,
    target: Target | None = None,
    problem: Problem = DEFAULT,
) -> Fit:
    """Fit a measure to the overlap and calibrate its distances on held-out pairs.

    Held-out pairs are measured from the pairs of the other folds alone, as a new star is; these
    are fewer, and in proportion is the number of the neighbour to which distances are.

    Parameters
    ----------
    overlap : Overlap
    catalog : mapping of str to ndarray of float, shape (m,)
        A sample of the catalog; its columns are the parameters that are used.
    measure : str
        One of `MEASURES`.
    limits : Limits
    seed : int
    target : Target, optional
        Rows whose intervals are to hold. Without them, or half-widths of the pairs, no widths are
        counted.
    problem : Problem
        Its inputs are what a correction sees.

    Raises
    ------
    ModelError
        Too few held-out pairs, or a parameter of the catalog that no overlap star has.
    """
    held_out = overlap.held_out
    n_held_out = int(np.count_nonzero(held_out))
    if n_held_out < MIN_HELD_OUT:
        raise ModelError(
            f"{n_held_out} held-out pairs are too few to calibrate the coverage",
            f"At least {MIN_HELD_OUT} are needed: match more stars or loosen the cuts.",
        )
    k = len(problem.inputs)
    parameters = problem.inputs if measure == "neighbours" else problem.parameters
    parameters = tuple(p for p in parameters if p.column in catalog and p.column in overlap.columns)
    x = _matrix(parameters, overlap.columns)
    center, scale = robust_scale(x)
    x = (x - center) / scale
    sample = (_matrix(parameters, catalog) - center) / scale
    sample = sample[np.isfinite(sample[:, :k]).all(axis=1)]
    names = [
        one.column
        for one, of_overlap, of_rows in zip(parameters, x.T, sample.T, strict=True)
        if np.isnan(of_overlap).all() and np.isfinite(of_rows).any()
    ]
    if names:
        raise ModelError(
            "no overlap star has the parameters that some rows have: " + ", ".join(names),
            "Measure the coverage by 'neighbours', or match stars that have them.",
        )
    # A row an overlap star: more are not counted better, the overlap stars are few.
    some = np.sort(np.random.default_rng(seed).permutation(len(sample))[: len(x)])
    distance, lacks = _held_out_places(overlap, x, sample, some, k, measure, seed)
    noise, ratio = _noise(overlap, distance)
    wrong = np.abs(ratio).min(axis=1) > WRONG_SIGMA
    growth, bins = Growth.fit(distance[held_out][~wrong], ratio[~wrong])
    around = _Neighbours(x[:, :k], sample[some, :k])
    nearest = distance if measure == "neighbours" else around.distance(x[:, :k])
    last = growth.last if measure == "neighbours" else float(np.nanmax(nearest))
    model = CoverageModel(
        parameters,
        k,
        center,
        scale,
        Places.of(around, last),
        x[:, :k],
        noise,
        growth,
        limits,
        Widths(np.ones((2, OUTSIDE + 1, overlap.residual.shape[1]))),
        Ratio.fit(x, sample, seed) if measure == "ratio" else None,
    )
    kind = np.full(len(x), -1, dtype=np.int8)
    kind[held_out] = model.coverage_at(distance[held_out], lacks[held_out])[1]
    n_width: tuple[tuple[int, ...], ...] = ()
    if target and overlap.half_width is not None and overlap.error_class is not None:
        widths, n_width = _widths(overlap, model, target, kind, wrong)
        model = replace(model, widths=widths)
    outside = float(np.mean(kind[held_out] >= OUTSIDE))
    return Fit(model, bins, n_held_out, int(np.count_nonzero(wrong)), outside, n_width)


def _held_out_places(
    overlap: Overlap,
    x: FloatArray,
    sample: FloatArray,
    some: IntArray,
    k: int,
    measure: str,
    seed: int,
) -> tuple[FloatArray, BoolArray]:
    """Distance of held-out pairs from those of the other folds, and whether these lack stars."""
    held_out = overlap.held_out
    distance, lacks = np.full(len(x), np.nan), np.zeros(len(x), dtype=np.bool_)
    for fold in np.unique(overlap.fold[held_out]):
        rows, others = held_out & (overlap.fold == fold), overlap.fold != fold
        nearer = max(round(NEIGHBOURS * float(np.mean(others))), 1)
        around = _Neighbours(x[others, :k], sample[some, :k], nearer)
        distance[rows] = around.distance(x[rows, :k])
        lacks[rows] = around.lacks(x[rows, :k], distance[rows])
        if measure == "ratio":
            distance[rows] = Ratio.fit(x[others], sample, seed).distance(x[rows])
    return distance, lacks


def _widths(
    overlap: Overlap,
    model: CoverageModel,
    target: Target,
    kind: NDArray[np.int8],
    wrong: BoolArray,
) -> tuple[Widths, tuple[tuple[int, ...], ...]]:
    """Widths counted on the held-out pairs that the error model speaks of."""
    assert overlap.half_width is not None and overlap.error_class is not None
    held_out = overlap.held_out
    told = np.asarray(held_out & np.isfinite(overlap.half_width).all(axis=1))
    snr = _column(overlap.columns, "snr", len(kind))
    placed = Placed(kind, overlap.error_class, model.overlap, snr).take(told)
    right = ~wrong[told[held_out]]
    return fit_widths(
        overlap.residual[told],
        overlap.half_width[told],
        right,
        placed,
        _placed(model, target),
        model.limits,
    )


def _noise(overlap: Overlap, distance: FloatArray) -> tuple[Noise, FloatArray]:
    """Noise of the nearer half of the held-out pairs, and residuals of all (m, l) in its units."""
    held_out = overlap.held_out
    n, near = len(held_out), distance[held_out]
    residual = overlap.residual[held_out]
    of_pairs = (
        _column(overlap.columns, "logg", n)[held_out],
        _column(overlap.columns, "snr", n)[held_out],
        overlap.reference_error[held_out],
    )
    dense = near <= np.quantile(near, 0.5)
    noise = Noise.fit(residual[dense], *(values[dense] for values in of_pairs))
    return noise, residual / noise.of_pairs(*of_pairs)


def _placed(model: CoverageModel, target: Target) -> Placed:
    """The rows of the target that have a coverage."""
    kind = model.coverage(target.columns)[1]
    labels = model.scaled(target.columns)[:, : model.n_inputs]
    snr = _column(target.columns, "snr", len(kind))
    return Placed(kind, target.error_class, labels, snr).take(kind >= 0)


def _matrix(parameters: tuple[Input, ...], columns: Columns) -> FloatArray:
    values = [one.values(np.asarray(columns[one.column], np.float64)) for one in parameters]
    return np.stack(values, axis=1)


def _column(columns: Columns, name: str, n: int) -> FloatArray:
    return np.asarray(columns.get(name, np.full(n, np.nan)), dtype=np.float64)

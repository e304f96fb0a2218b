"""How well the overlap represents a star: a distance to the overlap, calibrated as error growth.

A measure gives every row a distance from the overlap, small where overlap stars are dense. On pairs
that no correction was trained on, the residual in units of the noise at its signal to noise grows
with that distance (`widening.Growth`). Coverage = 1 / growth: where it is c, the error of the
corrected labels is 1/c times that of a star of the same signal to noise in the dense overlap. The
rows are *inside*, *sparse* or *outside* by two limits of the coverage. Sparse at best are rows as
far as the outermost 5 % of the pairs, or where the overlap has half of its average share of the
stars: an end of the overlap is near, and what lies behind it is in the rows, not in the pairs.
Outside are, too, rows of a kind that the overlap lacks (a quarter of its average share), and rows
beyond the outermost held-out pairs, where growth cannot be measured: the coverage of both is
held below the limit.

Measures:

* ``neighbours``: distance to the k-th nearest overlap star in the inputs that a correction sees, on
  one robust scale. Neighbours are counted once, at the nodes of a grid; rows are looked up;
* ``ratio``: density of the catalog over that of the overlap in all parameters, by a classifier
  (Sugiyama, Suzuki & Kanamori 2012, Density Ratio Estimation in Machine Learning, chapter 4). A
  missing parameter is a branch of its own in its trees.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import (
    BoolArray,
    Columns,
    Float32Array,
    FloatArray,
    FloatingArray,
    IntArray,
    column_or_nan,
)
from sos_dask.errors import ModelError
from sos_dask.evidence import beyond
from sos_dask.evidence.beyond import Left, Standing
from sos_dask.evidence.widening import (
    CLASSES,
    LACKING,
    OUTSIDE,
    SPARSE,
    Growth,
    Limits,
    Noise,
    Placed,
    Widths,
    fit_widths,
    points_of,
)
from sos_dask.problem import DEFAULT, Input, Problem, parameter_matrix
from sos_dask.run.machine import import_xgboost
from sos_dask.stats.numbers import count_within, knn_distance, robust_scale
from sos_dask.stats.table import Grid, seal, unseal

MEASURES = ("neighbours", "ratio")
WRONG_SIGMA = 4.0
_NEIGHBOURS = 16  # 4 to 16 predict the error equally well on the simulation
_LEAST_SHARE = 0.25  # 0.2 to 0.4 find the same rows on the simulation
_THIN_SHARE = 0.5  # finds 95 % of the rows that references avoid on hard skies; 0.4: 93 %
_MIN_HELD_OUT = 100
REACH = 0.6  # beyond it the polynomial is worse than a constant, on the simulation
_MOST_NODES, _NODES_A_STAR = 72**3, 256  # steps far finer than distances to the 16th neighbour
_MOST_ALONG = 512  # nodes of an axis
_GUESS_CELLS = 48**3
_NARROW = 0.1  # a narrower axis would make too many nodes of the others
_EDGE = 0.0005  # share of the stars beyond each side of the grid
_FORMAT = 10


@dataclass(frozen=True)
class Overlap:
    """The n pairs fit for training, with what is known of those that were held out."""

    columns: Columns  # parameters of the target, nan where unknown
    fold: NDArray[np.int8]
    difference: FloatArray  # (n, l), nan where unknown
    residual: FloatArray  # (n, l) difference less prediction; nan for pairs not held out
    reference_error: FloatArray  # (n, l) as stated by the reference, nan where unknown
    half_width: FloatArray | None = None  # (n, l) by the error model; nan where it is not asked
    error_class: NDArray[np.int8] | None = None  # 1 in the sparse class of the error model

    @property
    def held_out(self) -> BoolArray:
        """Pairs with residuals in all labels, shape (n,)."""
        return np.asarray(np.isfinite(self.residual).all(axis=1))


class Target(NamedTuple):
    """Rows whose intervals are to hold: a sample of the catalog, of rows that pass the cuts."""

    columns: Columns
    error_class: NDArray[np.int8]


def lacks_stars(stars: FloatArray, rows: FloatArray) -> BoolArray:
    """Tell which overlap stars (n, k) lie where the overlap has fewer than rows (m, k) tell."""
    distance = knn_distance(stars, stars, _NEIGHBOURS + 1)
    return _lacks(stars, rows, stars, distance, _NEIGHBOURS)[0]


def _lacks(
    overlap: FloatArray, catalog: FloatArray, x: FloatArray, distance: FloatArray, k: int
) -> tuple[BoolArray, BoolArray]:
    """Near which scaled rows x the overlap has less than two shares of its average.

    They are `_LEAST_SHARE` and `_THIN_SHARE`, of densities: from overlap stars and rows of the
    catalog within the distance of the k-th overlap star.
    """
    n = len(overlap)
    count = np.zeros(len(x))
    # Where stars are nearer than in the denser half of the overlap, nothing is lacking.
    near = knn_distance(overlap, overlap[:: max(n // 10_000, 1)], k + 1)
    middle, far = np.quantile(near, (0.5, 0.8))
    rows = np.flatnonzero((distance > middle) & (len(catalog) > 0))
    if len(rows):
        count[rows] = count_within(catalog, x[rows], distance[rows])
    # As many rows of the catalog are within the distance where the share is the average.
    usual = min(k, n) * len(catalog) / n
    # A catalog that all lies within tells nothing.
    count[count == len(catalog)] = 0
    return (count * _LEAST_SHARE > usual) & (distance > far), count * _THIN_SHARE > usual


@dataclass(frozen=True)
class Places:
    """Distance from the overlap, and where the overlap lacks stars, at the nodes of a grid."""

    grid: Grid  # over scaled inputs
    # (nodes, 3): distance to the k-th star; 1 where the overlap lacks stars, and where it is thin.
    values: Float32Array

    @classmethod
    def of(cls, overlap: FloatArray, catalog: FloatArray, last: float) -> Places:
        """Count the neighbours of every node; beyond twice the distance ``last`` all is as far."""
        stars = np.concatenate([overlap, catalog])
        low, high = np.quantile(stars, (_EDGE, 1 - _EDGE), axis=0)
        n_nodes = min(_MOST_NODES, _NODES_A_STAR * len(overlap))
        extent = np.maximum(high - low, _NARROW)
        step = float((np.prod(extent) / n_nodes) ** (1 / len(extent)))
        shape = np.clip(np.ceil(extent / step), 2, _MOST_ALONG).astype(int)
        grid = Grid(tuple(low.tolist()), tuple(high.tolist()), tuple(shape.tolist()))
        farthest = 2 * last + 2 * step
        nodes = grid.nodes()
        distance = np.minimum(knn_distance(overlap, nodes, _NEIGHBOURS, farthest), farthest)
        lacks, thin = _lacks(overlap, catalog, nodes, distance, _NEIGHBOURS)
        return cls(grid, np.stack([distance, lacks, thin], axis=1).astype(np.float32))

    def __call__(self, x: FloatArray) -> tuple[FloatArray, BoolArray, BoolArray]:
        """Distance (n,) of scaled rows (n, k), nan where they are; where stars lack or are thin."""
        found = self.grid.interpolate(self.values, x.astype(np.float32)).astype(np.float64)
        # A row beyond the grid is as much farther as it is from the grid.
        beyond = np.maximum(np.array(self.grid.low) - x, x - np.array(self.grid.high))
        beyond = np.maximum(beyond, 0.0)
        distance = found[:, 0] + np.sqrt(np.sum(beyond * beyond, axis=1))
        return distance, found[:, 1] > 0.5, found[:, 2] > 0.5


def _fit_ratio(overlap: FloatArray, catalog: FloatArray, seed: int) -> Any:
    """Train the classifier that tells overlap stars from rows of the catalog."""
    xgb = import_xgboost()

    x = np.concatenate([overlap, catalog]).astype(np.float32)
    y = np.repeat([1.0, 0.0], [len(overlap), len(catalog)])
    weight = np.where(y > 0, len(catalog) / max(len(overlap), 1), 1.0)
    params = {
        "objective": "binary:logistic", "max_depth": 4, "eta": 0.1, "min_child_weight": 20,
        "nthread": 1, "seed": seed, "tree_method": "hist",
    }  # fmt: skip
    return xgb.train(params, xgb.DMatrix(x, y, weight=weight, nthread=1), 100)


def _ratio(booster: Any, x: FloatArray) -> FloatArray:
    """Density of the catalog over that of the overlap of scaled rows (n, k)."""
    margin = booster.inplace_predict(x.astype(np.float32), predict_type="margin")
    return np.asarray(np.exp(-margin.astype(np.float64)))


@dataclass(frozen=True)
class CoverageModel:
    """A measure with its scaling, and what its distances mean."""

    parameters: tuple[Input, ...]  # first inputs of the star, for ``ratio`` all others
    n_inputs: int  # without one of these a row has no coverage
    center: FloatArray  # (k,)
    scale: FloatArray
    places: Places
    overlap: FloatArray  # (n, n_inputs): scaled inputs of overlap stars, where these do not lack
    noise: Noise
    growth: Growth
    limits: Limits
    widths: Widths  # by which the half-widths of an error model are widened
    zero_point: FloatArray  # (l,): median difference of the pairs
    # What stands in, in cells of `_guess_grid`: where stars are few, and where the overlap lacks
    # stars; guesses and widths of shape (2, cells, l).
    standing: Standing
    ratio: Any = None  # xgboost.Booster: the measure, where it is that

    def scaled(self, columns: Columns) -> FloatArray:
        """Put parameters of rows on the scale of the model, nan where unknown."""
        return (parameter_matrix(self.parameters, columns) - self.center) / self.scale

    def coverage(self, columns: Columns) -> tuple[Float32Array, NDArray[np.int8]]:
        """Coverage of rows, 0 to 1, and which of `KINDS` their places are.

        nan and -1 where an input is missing.
        """
        x = self.scaled(columns)
        distance, *shares = self.places(x[:, : self.n_inputs])
        if self.ratio is not None:
            distance = np.where(np.isfinite(distance), _ratio(self.ratio, x), np.nan)
        return self.coverage_at(distance, *shares)

    def coverage_at(
        self, distance: FloatArray, lacks: BoolArray, thin: BoolArray
    ) -> tuple[Float32Array, NDArray[np.int8]]:
        """See `coverage`: of rows at known distances, where the overlap lacks stars or is thin."""
        coverage = (1.0 / self.growth(distance)).astype(np.float32)
        thin = thin | (distance > self.growth.thin)
        below = np.nextafter(np.float32(self.limits.inside), np.float32(0))
        coverage[thin] = np.minimum(coverage[thin], below)
        outside = lacks | (distance > self.growth.last)
        below = np.nextafter(np.float32(self.limits.outside), np.float32(0))
        coverage[outside] = np.minimum(coverage[outside], below)
        kind = self.limits.classify(coverage)
        kind[lacks] = LACKING
        kind[np.isnan(coverage)] = -1
        return coverage, kind

    @property
    def _guess_grid(self) -> Grid:
        grid = self.places.grid
        n = round(_GUESS_CELLS ** (1 / len(grid.shape)))
        return Grid(grid.low, grid.high, (n,) * len(grid.shape))

    def with_guesses(self, few: Standing, lacking: Standing, problem: Problem) -> CoverageModel:
        """Keep what stands in at all places: see `beyond.choose`."""
        places = self._guess_grid.centers()
        distance, index = self._tree.query(places)
        features = places * self.scale[: self.n_inputs] + self.center[: self.n_inputs]
        kind = beyond.kinds(places - self.overlap[index], beyond.giants(problem, features))
        both = few.at(kind, np.zeros(len(kind))), lacking.at(kind, distance)
        guess, width = (np.stack([getattr(one, name) for one in both]) for name in Standing._fields)
        return replace(self, standing=Standing(guess, width))

    def standing_at(self, features: Float32Array, kind: NDArray[np.int8]) -> Standing:
        """Look up what stands in (n, l) at features (n, n_inputs) of places of some `KINDS`."""
        x = (features - self.center[: self.n_inputs]) / self.scale[: self.n_inputs]
        place = (kind == LACKING).astype(np.int64), self._guess_grid.cells(x.astype(np.float32))
        return Standing(self.standing.guess[place], self.standing.width[place])

    def widening(
        self,
        kind: NDArray[np.int8],
        error_class: NDArray[np.integer],
        half_width: FloatingArray,
        features: Float32Array,
        *,
        measured: bool = True,
    ) -> FloatArray:
        """Factors of half-widths as `Widths.widening`, outside by what was measured to stand in."""
        found = self.widths.widening(kind, error_class, half_width)
        rows = np.flatnonzero((kind >= OUTSIDE) & measured)
        of_guess = self.standing_at(features[rows], kind[rows]).width / half_width[rows]
        is_few = (kind[rows] == OUTSIDE)[:, None] & np.isfinite(of_guess)
        least = np.array(self.widths.factors)[error_class[rows], SPARSE]
        found[rows] = np.fmax(np.where(is_few, least, found[rows]), of_guess)
        return found

    def star_near(self, x: FloatArray, other: bool = False) -> FloatArray:
        """Find the overlap stars nearest to scaled inputs (n, k), or nearest at another place."""
        distance, index = self._tree.query(x, k=[1, 2] if other and len(self.overlap) > 1 else [1])
        place = np.minimum(distance[:, 0] == 0, index.shape[1] - 1).astype(np.int64)
        return np.asarray(self.overlap[index[np.arange(len(x)), place]])

    def within_reach(self, features: Float32Array) -> Float32Array:
        """Draw finite features (n, n_inputs) towards their nearest star until just outside.

        A smooth correction can be extended a little beyond its data, not without end: what is
        predicted at the returned place is held constant farther out.
        """
        center, scale = self.center[: self.n_inputs], self.scale[: self.n_inputs]
        x = (features - center) / scale
        grid, filled = self._cells
        is_far = ((x < grid.low) | (x > grid.high)).any(axis=1)
        is_far |= ~np.isin(grid.cells(x.astype(np.float32)), filled)
        distance, index = self._tree.query(x[is_far])
        share = np.minimum(1.0, REACH / np.maximum(distance, 1e-12))[:, None]
        near, result = self.overlap[index], np.array(features, dtype=np.float32)
        result[is_far] = (near + (x[is_far] - near) * share) * scale + center
        return result

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import cKDTree

        return cKDTree(self.overlap, compact_nodes=False)  # a fifth of the time less

    @cached_property
    def _cells(self) -> tuple[Grid, IntArray]:
        """Cells whose places are all within reach of each other, and which of them have stars."""
        low, high = self.overlap.min(axis=0), self.overlap.max(axis=0)
        shape = 1 + np.ceil((high - low) * np.sqrt(self.n_inputs) / (0.99 * REACH)).astype(int)
        grid = Grid(*(tuple(ends.tolist()) for ends in (low, high, shape)))
        return grid, np.unique(grid.cells(self.overlap.astype(np.float32)))

    def files(self) -> dict[str, bytes]:
        """Content of the files of the model, by name."""
        document = {
            "format": _FORMAT,
            "parameters": [one.as_json for one in self.parameters],
            "n_inputs": self.n_inputs,
            "center": self.center.tolist(),
            "scale": self.scale.tolist(),
            "grid": asdict(self.places.grid),
            "noise": asdict(self.noise),
            "growth": asdict(self.growth),
            "limits": self.limits.as_json,
            "widths": asdict(self.widths),
        }
        tables: list[NDArray[Any]] = [self.places.values, self.overlap, self.zero_point]
        tables += list(self.standing)
        if self.ratio is not None:
            tables.append(np.frombuffer(self.ratio.save_raw("ubj"), np.uint8))
        return seal("coverage", document, tables)

    @classmethod
    def load(cls, directory: Path) -> CoverageModel:
        """Read a saved model; `ModelError` where a file is missing, damaged or of other format."""
        document, tables = unseal(directory, "coverage", _FORMAT, "coverage model")
        values, overlap, zero_point, guess, width, *ratio = tables
        booster = None
        if ratio:
            xgboost = import_xgboost()

            booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(ratio[0]))
        grid = Grid(**{name: tuple(value) for name, value in document["grid"].items()})
        return cls(
            tuple(Input(**one) for one in document["parameters"]),
            document["n_inputs"],
            np.array(document["center"]),
            np.array(document["scale"]),
            Places(grid, values),
            overlap,
            Noise(**document["noise"]),
            Growth(**document["growth"]),
            Limits(**document["limits"]),
            Widths(**document["widths"]),
            zero_point,
            Standing(guess, width),
            booster,
        )


class Fit(NamedTuple):
    """A fitted model, and on what it stands."""

    model: CoverageModel
    bins: list[dict[str, float]]  # of held-out pairs by distance: measured and fitted growth
    n_held_out: int
    n_wrong: int  # of them off by more than `WRONG_SIGMA` in all labels at once: left out of growth
    outside: float  # share of the held-out pairs that the model calls outside
    n_width: tuple[tuple[int, ...], ...]  # pairs that the widths were counted on: see `fit_widths`
    few: Standing  # what stands in where stars are few
    lacking: Standing  # and where the overlap lacks stars


def fit(
    overlap: Overlap,
    catalog: Columns,
    measure: str,
    limits: Limits,
    seed: int = 0,
    target: Target | None = None,
    problem: Problem = DEFAULT,
    left: Left | None = None,
) -> Fit:
    """Fit a measure to the overlap and calibrate its distances on held-out pairs.

    Held-out pairs are measured from the pairs of the other folds alone, as a new star is; these
    are fewer, and in proportion is the number of the neighbour to which distances are. Without a
    target, or half-widths of the pairs, no widths are counted.

    Of the catalog a sample is given, shape (m,); its columns are the parameters that are used.
    ``left`` are differences at the ends of the overlap. The measure is one of `MEASURES`. Raises
    `ModelError` where held-out pairs are too few, or no overlap star has a parameter that the
    catalog has.
    """
    held_out = overlap.held_out
    n_held_out = int(np.count_nonzero(held_out))
    if n_held_out < _MIN_HELD_OUT:
        hint = f"At least {_MIN_HELD_OUT} are needed: match more stars or loosen the cuts."
        raise ModelError(f"{n_held_out} held-out pairs are too few to calibrate the coverage", hint)
    k = len(problem.of_star)
    parameters = problem.of_star if measure == "neighbours" else problem.parameters
    parameters = tuple(p for p in parameters if p.column in catalog and p.column in overlap.columns)
    x, sample, center, scale = _scaled(parameters, overlap.columns, catalog, k)
    # A row an overlap star: more are not counted better, the overlap stars are few.
    some = np.sort(np.random.default_rng(seed).permutation(len(sample))[: len(x)])
    stars, near = x[:, :k], sample[some, :k]
    distance, lacks, thin = _held_out_places(overlap, x, sample, near, measure, seed)
    logg, snr = (column_or_nan(overlap.columns, name, len(x)) for name in ("logg", "snr"))
    of_pairs = (logg, snr, overlap.reference_error)
    dense = distance <= np.quantile(distance[held_out], 0.5)
    noise = Noise.fit(overlap.residual[dense], *(values[dense] for values in of_pairs))
    ratio = overlap.residual / noise(*of_pairs)
    wrong = np.abs(ratio).min(axis=1) > WRONG_SIGMA
    growth, bins = Growth.fit(distance[held_out & ~wrong], ratio[held_out & ~wrong])
    last, booster = growth.last, None
    if measure == "ratio":
        last = float(np.nanmax(knn_distance(stars, stars, _NEIGHBOURS)))
        booster = _fit_ratio(x, sample, seed)
    widths = Widths(np.ones((2, len(CLASSES), overlap.residual.shape[1])).tolist())
    places = Places.of(stars, near, last)
    not_lacking = np.flatnonzero(~places(stars)[1])
    kept = stars[not_lacking] if not_lacking.size else stars
    zero_point = np.nan_to_num(np.nanmedian(overlap.difference, axis=0))
    n_labels = len(zero_point)
    empty = Standing(np.zeros((2, 0, n_labels), np.uint8), np.zeros((2, 0, n_labels), np.float32))
    meant = noise, growth, limits, widths, zero_point, empty, booster
    model = CoverageModel(parameters, k, center, scale, places, kept, *meant)
    kind = model.coverage_at(distance, lacks, thin)[1]
    few, lacking = _stands_in(overlap, model, stars, kind == OUTSIDE, left, problem)
    model = model.with_guesses(few, lacking, problem)
    n_width: tuple[tuple[int, ...], ...] = ()
    if target and overlap.half_width is not None and overlap.error_class is not None:
        told = np.where(np.isfinite(overlap.half_width).all(axis=1), kind, np.int8(-1))
        pairs = Placed(told, overlap.error_class, points_of(stars, snr))
        scaled = model.scaled(target.columns)[:, :k]
        points = points_of(scaled, column_or_nan(target.columns, "snr", len(scaled)))
        rows = Placed(model.coverage(target.columns)[1], target.error_class, points)
        residual, half_width = overlap.residual, overlap.half_width
        widths, n_width = fit_widths(residual, half_width, ~wrong, pairs, rows, limits)
        model = replace(model, widths=widths)
    outside = float(np.mean(kind[held_out] >= OUTSIDE))
    counts = n_held_out, int(np.count_nonzero(wrong)), outside, n_width
    return Fit(model, bins, *counts, few, lacking)


def _stands_in(
    overlap: Overlap,
    model: CoverageModel,
    stars: FloatArray,
    is_few: BoolArray,
    left: Left | None,
    problem: Problem,
) -> tuple[Standing, Standing]:
    """Choose what stands in where stars are few, by the held-out pairs there, and where they lack.

    Where they lack, hardly anything is done: see `beyond`.
    """
    rows = np.flatnonzero(is_few)
    residual = np.full((len(rows), len(beyond.GUESSES), len(model.zero_point)), np.nan)
    residual[:, beyond.NOTHING] = overlap.difference[rows]
    residual[:, beyond.ZERO_POINT] = overlap.difference[rows] - model.zero_point
    residual[:, beyond.EDGE] = overlap.residual[rows]
    features = stars[rows] * model.scale[: model.n_inputs] + model.center[: model.n_inputs]
    nearest = model.star_near(stars[rows], other=True)
    giant = beyond.giants(problem, features)
    kind, n_kinds = beyond.kinds(stars[rows] - nearest, giant), 4 * model.n_inputs
    known = np.asarray(np.isfinite(overlap.difference).all(axis=1))
    right = np.zeros(len(known), dtype=np.bool_)
    right[known] = beyond.right(overlap.difference[known])
    there = Left(kind, np.zeros(len(rows)), residual, right[rows])
    held = beyond.NOTHING, beyond.ZERO_POINT, beyond.EDGE
    none = Left(kind[:0], np.zeros(0), residual[:0], right[:0])
    ends = beyond.choose(left or none, n_kinds, (), held[:2], beyond.AT_MOST_BEHIND)
    lacking = ends._replace(width=np.float32(beyond.WIDER_BEHIND) * ends.width)
    return beyond.choose(there, n_kinds, held, held, known=ends.guess[0, -1]), lacking


def _scaled(
    parameters: tuple[Input, ...], overlap: Columns, catalog: Columns, k: int
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Overlap stars, rows that have the first ``k`` parameters, and center and scale of both."""
    x, sample = (parameter_matrix(parameters, columns) for columns in (overlap, catalog))
    center, scale = robust_scale(x)
    x, sample = ((rows - center) / scale for rows in (x, sample))
    sample = sample[np.isfinite(sample[:, :k]).all(axis=1)]
    lost = np.asarray(np.isnan(x).all(axis=0) & np.isfinite(sample).any(axis=0))
    if lost.any():
        names = [one.column for one, is_lost in zip(parameters, lost, strict=True) if is_lost]
        raise ModelError(
            "no overlap star has the parameters that some rows have: " + ", ".join(names),
            "Measure the coverage by 'neighbours', or match stars that have them.",
        )
    return x, sample, center, scale


def _held_out_places(
    overlap: Overlap, x: FloatArray, sample: FloatArray, near: FloatArray, measure: str, seed: int
) -> tuple[FloatArray, BoolArray, BoolArray]:
    """Distance of held-out pairs from those of the other folds; where these lack or are thin."""
    held_out, stars = overlap.held_out, x[:, : near.shape[1]]
    distance, shares = np.full(len(x), np.nan), np.zeros((2, len(x)), dtype=np.bool_)
    for fold in np.unique(overlap.fold[held_out]):
        rows, others = held_out & (overlap.fold == fold), overlap.fold != fold
        nearer = max(round(_NEIGHBOURS * float(np.mean(others))), 1)
        distance[rows] = knn_distance(stars[others], stars[rows], nearer)
        shares[:, rows] = _lacks(stars[others], near, stars[rows], distance[rows], nearer)
        if measure == "ratio":
            distance[rows] = _ratio(_fit_ratio(x[others], sample, seed), x[rows])
    return distance, *shares

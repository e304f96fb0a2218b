"""Corrections made of others: hybrid (trees on a polynomial's residuals) and SIMEX.

In a hybrid the polynomial takes the trend, so the trees have little left to say and may be few and
strongly held back: where pairs are few the correction is all but the polynomial. Pairs far off the
polynomial are outliers, which the trees do not see: at the ends of the labels, where half of the
pairs may be wrong ones, no robust loss keeps them out. The trees are smeared by a Gaussian: their
values at the nodes of an even grid as fine as the smearing are all that is left of them, a few
megabytes that stay in the cache, and between the nodes there are no steps. On 45,706 simulated
pairs with outliers its held-out scatter was 0.99 times that of boosted trees alone, and its second
differences 3.4 to 8 times smaller.

SIMEX (simulation and extrapolation) is an errors-in-variables variant of another method. Noise of
the target's labels is in the features and, with the same sign, in the differences: stars scattered
upwards in a label show a positive difference where there is no bias at all (regression dilution).
Every other method predicts that part too, as it should when noisy labels are to be corrected one by
one. This one estimates the bias at the true labels: use it to publish the bias of a survey, or to
correct labels with much smaller errors than those of the pairs; not to predict the reference. More
noise of the quoted size is added to features and differences together, ``lambda`` = 0.5 to 2 times
its variance; the fits are followed back to ``lambda`` = -1 by a parabola (Cook & Stefanski 1994,
JASA 89, 1314). It is only as good as the errors of the pairs, and takes away most of the dilution,
not all: where errors are no longer small against the structure of the bias, a parabola is too
stiff.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from sos_dask.columns import Float32Array, FloatArray
from sos_dask.corrections import base, boosted, polynomial
from sos_dask.corrections.base import Batch, Content, Correction, ModelInfo, Training
from sos_dask.corrections.boosted import BoostedCorrection
from sos_dask.corrections.degrade import normals, with_noise
from sos_dask.corrections.polynomial import PolynomialCorrection, least_pairs
from sos_dask.errors import ModelError
from sos_dask.problem import Problem
from sos_dask.stats.table import Grid, pack, unpack

GRID = "residual-grid.npy"
POLYNOMIAL = "polynomial-"
# Nodes along an axis; with three labels in double precision the filter needs 50 MB for all of
# three axes. With more axes there are no more nodes in all.
MAX_NODES = 128
# Distance of nodes, in standard deviations of the Gaussian: linear interpolation then widens the
# kernel by 4 %: it adds h^2 / 6 to its variance.
SPACING = 0.7
LAMBDAS = (0.5, 1.0, 1.5, 2.0)


def _of_trees(name: str, default: float) -> Any:
    """Setting of boosted trees with another default."""
    field = copy(boosted.Settings.model_fields[name])
    field.default = default
    return field


class Settings(polynomial.Settings, boosted.Settings):
    """Parameters of the method: those of both its parts, and its own."""

    n_rounds: int = _of_trees("n_rounds", 100)
    max_depth: int = _of_trees("max_depth", 6)
    min_child_weight: float = _of_trees("min_child_weight", 30.0)
    reg_lambda: float = _of_trees("reg_lambda", 30.0)
    huber_slope: float = _of_trees("huber_slope", 0.5)
    smoothing: float = Field(
        0.1, ge=0.02, le=3.0, description="Width of the smearing Gaussian, in standard deviations"
    )
    outlier: float = Field(
        7.0, ge=2, le=1e6, description="The trees do not see residuals beyond so many scatters"
    )


def _settings_of(kind: type[Correction], whole: Settings) -> Any:
    """Settings of a part."""
    return kind.parameters(**{name: getattr(whole, name) for name in kind.parameters.model_fields})


def _part(kind: type[Correction], info: ModelInfo, files: Mapping[str, Content], start: str) -> Any:
    """A correction inside of another one: of the files whose names start so."""
    own = {k: v for k, v in info.params.items() if k in kind.parameters.model_fields}
    inner = {k.removeprefix(start): v for k, v in files.items() if k.startswith(start)}
    return kind.restore(replace(info, method=kind.method, params=own), inner)


def residuals(batch: Batch, smooth: PolynomialCorrection, outlier: float) -> Batch:
    """Subtract a polynomial from the differences; beyond ``outlier`` scatters they are unknown."""
    left = batch.differences - smooth.predict(batch.features)
    far = np.abs(left) > outlier * smooth.scatter
    return replace(batch, differences=np.where(far, np.float32(np.nan), left))


@dataclass(eq=False)
class HybridCorrection(Correction):
    """Sum of a polynomial and of smeared trees."""

    method = "hybrid"
    parameters = Settings
    search: ClassVar = {
        "order": (2, 3, 4, 5),
        "n_rounds": (1, 50, 100, 200),
        "max_depth": (3, 4, 6),
        "min_child_weight": (10.0, 30.0, 100.0),
        "reg_lambda": (10.0, 30.0, 100.0),
        "smoothing": (0.05, 0.1, 0.15, 0.3),
    }

    smooth: PolynomialCorrection
    low: Float32Array  # first and last node of each axis of a grid
    high: Float32Array
    nodes: Float32Array  # the smeared trees there, shape (n0, n1, ..., l)

    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite inputs inside the box, shape (n, l)."""
        out: Float32Array = self.smooth.evaluate(features)
        grid = Grid(tuple(self.low), tuple(self.high), self.nodes.shape[:-1])
        out += grid.interpolate(self.nodes.reshape(grid.size, -1), features)
        return out

    def files(self) -> Mapping[str, bytes]:
        """``polynomial-coefficients.json`` and the grid of the smeared trees."""
        smooth = {f"{POLYNOMIAL}{name}": content for name, content in self.smooth.files().items()}
        return {**smooth, GRID: pack([self.low, self.high, self.nodes])}

    @classmethod
    def restore(cls, info: ModelInfo, files: Mapping[str, Content]) -> HybridCorrection:
        """Read a model from its own files."""
        smooth = _part(PolynomialCorrection, info, files, POLYNOMIAL)
        what = "the grid of the residuals"
        arrays = unpack(files[GRID], what)
        shapes = [array.shape for array in arrays]
        k = len(info.minimum)
        if shapes[:-1] != [(k,), (k,)] or len(shapes[2]) != k + 1 or min(shapes[2][:k]) < 2:
            raise ModelError(f"{what} is damaged: it has other axes")
        return cls(info, smooth, *arrays)

    @classmethod
    def fit(cls, training: Training, settings: Settings) -> HybridCorrection:
        """Fit; see `sos_dask.corrections.fit`."""
        k = len(training.problem.inputs)
        if 2**k > MAX_NODES**3:
            what = f"method 'hybrid' takes 21 inputs at most: these are {k}"
            raise ModelError(what, "Leave some out, or choose 'boosted', which takes any number.")
        needed = max(least_pairs(k), settings.min_pairs)
        info = base.summarise(training, cls.method, settings, needed).info
        smooth = PolynomialCorrection.fit(training, _settings_of(PolynomialCorrection, settings))
        less = partial(residuals, smooth=smooth, outlier=settings.outlier)
        left = replace(training, changes=(*training.changes, less))
        trees = BoostedCorrection.fit(left, _settings_of(BoostedCorrection, settings))
        low, high = (np.array(ends, np.float32) for ends in (info.minimum, info.maximum))
        width = settings.smoothing * smooth.width
        smear = partial(_smeared, low=low, high=high, width=width)
        what, advice = "hybrid: the smearing of the trees", "give workers more."
        [nodes] = base.run_tasks(smear, [trees], training.client, what, advice)
        return cls(info, smooth, low, high, nodes)


def _smeared(
    trees: BoostedCorrection, low: Float32Array, high: Float32Array, width: FloatArray
) -> Float32Array:
    """Values of trees smeared with a Gaussian of this width, at the nodes of a grid.

    Beyond the box it stays as at the nearest face. Where ``MAX_NODES`` are too few to follow the
    Gaussian, the nodes are farther apart and the interpolation smears more.
    """
    from scipy.ndimage import gaussian_filter1d

    length = (high - low).astype(np.float64)
    cells = np.clip(np.ceil(length / (width * SPACING)), 1, MAX_NODES - 1).astype(np.int64)
    while np.prod(cells + 1.0) > MAX_NODES**3:
        cells = np.maximum(cells * 9 // 10, 1)
    axes = [
        np.linspace(a, b, n + 1, dtype=np.float32) for a, b, n in zip(low, high, cells, strict=True)
    ]
    # Plane by plane: all nodes at once would be the largest array of the whole training.
    mesh = np.meshgrid(np.float32(0), *axes[1:], indexing="ij")
    nodes = np.stack(mesh, axis=-1).reshape(-1, len(axes))
    planes = []
    for nodes[:, 0] in axes[0]:
        planes.append(trees.evaluate(nodes).reshape(*(len(axis) for axis in axes[1:]), -1))
    values = np.stack(planes).astype(np.float64)
    for axis in range(len(axes)):
        if length[axis] > 0:
            sigma = width[axis] * cells[axis] / length[axis]
            values = gaussian_filter1d(values, sigma, axis=axis, mode="nearest", truncate=3.0)
    return values.astype(np.float32)


# --- SIMEX -------------------------------------------------------------------------------------


class SimexSettings(Settings):
    """Parameters of the method: those of the method that is fitted, and its own."""

    base: Literal["polynomial", "hybrid"] = Field("polynomial", description="The fitted method")
    replicas: int = Field(2, ge=1, le=100, description="Fits with added noise of each size")
    error_factor: float = Field(
        1.0, ge=0.0, le=100.0, description="True errors of the labels in units of the quoted ones"
    )


_BASES = {kind.method: kind for kind in (PolynomialCorrection, HybridCorrection)}


def noisy(
    batch: Batch, problem: Problem, amount: float, seed: int, constant: tuple[bool, ...] = ()
) -> Batch:
    """Add noise to the target's labels: to inputs and differences alike.

    Pairs without an error of each label get no weight. The noise, ``amount`` times the errors,
    follows from the seed and the pair's own numbers, not from other pairs. Labels whose differences
    are all equal (``constant``) have no noise, whatever the errors say.
    """
    if batch.errors is None:
        raise _no_errors(problem, "the pairs have none")
    noised = with_noise(batch, problem, amount * batch.errors * normals(batch, seed))
    known = np.isfinite(batch.errors).all(axis=1)
    differences = np.where(constant or False, batch.differences, noised.differences)
    weight = np.where(known, batch.weight, np.float32(0))
    return replace(noised, differences=differences, weight=weight)


def _no_errors(problem: Problem, why: str) -> ModelError:
    return ModelError(
        f"method 'simex' needs errors of the target's labels, and {why}",
        f"Map {', '.join(label.error for label in problem.labels)} in the survey's definition.",
    )


@dataclass(eq=False)
class SimexCorrection(Correction):
    """Weighted sum of fits with and without added noise."""

    method = "simex"
    parameters = SimexSettings

    parts: tuple[Correction, ...]  # one without added noise, then those of each of `LAMBDAS`

    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite inputs inside the box, shape (n, l)."""
        weights = part_weights(self.info.params["replicas"])
        total = np.zeros((len(features), len(self.problem.names)))
        for weight, part in zip(weights, self.parts, strict=True):
            total += weight * part.evaluate(features)
        return total.astype(np.float32)

    def files(self) -> Mapping[str, bytes]:
        """Files of the parts, each after the number of its part."""
        return {
            f"{number}-{name}": content
            for number, part in enumerate(self.parts)
            for name, content in part.files().items()
        }

    @classmethod
    def restore(cls, info: ModelInfo, files: Mapping[str, Content]) -> SimexCorrection:
        """Read a model from its own files."""
        kind, n_parts = _BASES[info.params["base"]], len(part_weights(info.params["replicas"]))
        return cls(info, tuple(_part(kind, info, files, f"{n}-") for n in range(n_parts)))

    @classmethod
    def fit(cls, training: Training, settings: SimexSettings) -> SimexCorrection:
        """Fit; see `sos_dask.corrections.fit`."""
        problem = training.problem
        noise = partial(noisy, problem=problem)
        # Pairs without errors are left out of the fit without noise too.
        plain = replace(training, changes=(partial(noise, amount=0.0, seed=0),))
        if not replace(plain, folds=None).n_rows:
            raise _no_errors(problem, "no pair has all of them")
        needed = least_pairs(len(problem.inputs))
        summary = base.summarise(plain, cls.method, settings, needed)
        kind, parts = _BASES[settings.base], []
        of_base = _settings_of(kind, settings)
        amounts = [0.0, *np.repeat(np.sqrt(LAMBDAS), settings.replicas)]
        noise = partial(noise, constant=tuple(summary.constant.tolist()))
        for seed, amount in enumerate(amounts, settings.seed):
            change = partial(noise, amount=amount * settings.error_factor, seed=seed)
            parts.append(kind.fit(replace(training, changes=(change,)), of_base))
        return cls(summary.info, tuple(parts))


def part_weights(replicas: int) -> FloatArray:
    """Weights, of sum 1, of the parts in the least-squares parabola's value at ``lambda`` = -1."""
    amounts = np.array([0.0, *LAMBDAS])
    at_minus_one = np.array([1.0, -1.0, 1.0]) @ np.linalg.pinv(np.vander(amounts, 3, True))
    return np.concatenate([at_minus_one[:1], np.repeat(at_minus_one[1:] / replicas, replicas)])

"""Errors-in-variables variant of a correction: simulation and extrapolation (SIMEX).

Noise of the target's labels stands in the features and, with the same sign, in the difference
target - reference. Stars scattered upwards in a label then show a positive difference where there
is no bias at all: regression dilution. Every other method predicts that part too, because it
predicts the reference, as it should when noisy labels are to be corrected one by one. This one
estimates the bias at the true labels: what one survey measures differently from the other. Use it
to study or to publish the bias of a survey, or to correct labels with much smaller errors than
those of the pairs; do not use it to predict the reference, whose scatter it leaves larger.

More noise of the quoted size is added to features and differences together, ``lambda`` = 0.5 to 2
times its variance; the fits are followed back to ``lambda`` = -1 by a parabola (Cook & Stefanski
1994, JASA 89, 1314). The parabola is a weighted sum of the predictions, so any base can be used. It
is only as good as the errors of the pairs, and takes away most of the dilution, not all: where
errors are no longer small against the structure of the bias, a parabola is too stiff.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Literal

import numpy as np
from pydantic import Field

from sos_dask.columns import Float32Array, FloatArray, mixed
from sos_dask.corrections import hybrid, polynomial
from sos_dask.corrections.base import (
    Batch,
    Content,
    Correction,
    ModelInfo,
    Progress,
    Rows,
    Training,
    files_of_part,
    hash_rows,
    summarise,
)
from sos_dask.errors import ModelError
from sos_dask.problem import Problem

LAMBDAS = (0.5, 1.0, 1.5, 2.0)
_BASES: Mapping[str, ModuleType] = {"polynomial": polynomial, "hybrid": hybrid}


class Settings(hybrid.Settings):
    """Parameters of the method: those of the method that is fitted, and its own."""

    base: Literal["polynomial", "hybrid"] = Field(
        "polynomial", description="The method that is fitted"
    )
    replicas: int = Field(2, ge=1, le=100, description="Fits with added noise of each size")
    error_factor: float = Field(
        1.0,
        ge=0.0,
        le=100.0,
        description="True errors of the labels in units of the quoted ones",
    )


def noisy(
    batch: Batch, problem: Problem, amount: float, seed: int, constant: tuple[bool, ...] = ()
) -> Batch:
    """Add noise to the target's labels: to inputs and differences alike.

    Parameters
    ----------
    batch : Batch
        Pairs without an error of each label get no weight.
    problem : Problem
    amount : float
        Size of the noise in units of the errors.
    seed : int
        The noise of a pair depends on this and on its own labels, not on other pairs.
    constant : tuple of bool
        Labels whose differences are all equal: they have no noise, whatever the errors say.
    """
    if batch.errors is None:
        raise _no_errors(problem, "the pairs have none")
    noise = amount * batch.errors * _normals(batch, seed)
    features = batch.features.astype(np.float64)
    for number, item in enumerate(problem.inputs):
        if item.column not in problem.names:
            continue
        of_label = noise[:, problem.names.index(item.column)] / item.scale
        if item.log10:  # to first order
            of_label = of_label * 10.0 ** -features[:, number] / math.log(10)
        features[:, number] += of_label
    differences = (batch.differences + noise).astype(np.float32)
    known = np.isfinite(batch.errors).all(axis=1)
    return replace(
        batch,
        features=features.astype(np.float32),
        differences=np.where(constant or False, batch.differences, differences),
        weight=np.where(known, batch.weight, np.float32(0)),
    )


def _no_errors(problem: Problem, why: str) -> ModelError:
    *first, last = [label.error for label in problem.labels]
    names = f"{', '.join(first)} and {last}" if first else last
    return ModelError(
        f"method 'simex' needs errors of the target's labels, and {why}",
        f"Map {names} in the definition of the survey.",
    )


def _normals(batch: Batch, seed: int) -> FloatArray:
    """Standard normal numbers, shape (n, l), from a hash of each pair."""
    from scipy.special import ndtri

    state = mixed(hash_rows(batch.features, batch.differences) + np.uint64(seed))
    columns = [mixed(state + np.uint64(number)) for number in range(batch.differences.shape[1])]
    uniform = (np.stack(columns, axis=1) >> np.uint64(11)).astype(np.float64) + 0.5
    return np.asarray(ndtri(uniform / 2.0**53))


@dataclass(eq=False)
class SimexCorrection(Correction):
    """Weighted sum of fits with and without added noise.

    Parameters
    ----------
    info : ModelInfo
    parts : tuple of Correction
        One without added noise, then those of each of `LAMBDAS`.
    """

    parts: tuple[Correction, ...]

    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite inputs inside the box, shape (n, l)."""
        weights = part_weights(int(self.info.params["replicas"]))
        total = np.zeros((len(features), len(self.labels)))
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


def part_weights(replicas: int) -> FloatArray:
    """Weights of the parts in the value of the least-squares parabola at ``lambda`` = -1.

    Returns
    -------
    ndarray of float64, shape (1 + 4 * replicas,)
        Their sum is 1.
    """
    amounts = np.array([0.0, *LAMBDAS])
    at_minus_one = np.array([1.0, -1.0, 1.0]) @ np.linalg.pinv(np.vander(amounts, 3, True))
    return np.concatenate([at_minus_one[:1], np.repeat(at_minus_one[1:] / replicas, replicas)])


def restore(info: ModelInfo, files: Mapping[str, Content]) -> SimexCorrection:
    """Model from its files; `ModelError` where they are incomplete."""
    module, n_parts = _BASES[info.params["base"]], 1 + len(LAMBDAS) * int(info.params["replicas"])
    of_part = info.of_part(info.params["base"], module.Settings)
    parts = (module.restore(of_part, files_of_part(files, f"{n}-")) for n in range(n_parts))
    return SimexCorrection(info, tuple(parts))


def fit(training: Training, settings: Settings, progress: Progress) -> SimexCorrection:
    """Fit; see `sos_dask.corrections.fit`."""
    problem = training.problem

    def with_noise(amount: float, seed: int, constant: tuple[bool, ...] = ()) -> Training:
        change = partial(noisy, problem=problem, amount=amount, seed=seed, constant=constant)
        return replace(training, changes=(*training.changes, change))

    # Pairs without errors are left out of the fit without noise too.
    plain = with_noise(0.0, 0)
    if not any(replace(plain, folds=None).map(_n_rows)):
        raise _no_errors(problem, "no pair has all of them")
    terms = polynomial.polynomial_terms(settings.order, len(problem.inputs))
    summary = summarise(plain, "simex", 2 * len(terms))
    constant = tuple(summary.constant.tolist())
    module = _BASES[settings.base]
    of_base = hybrid.part_settings(module.Settings, settings)
    amounts = [0.0, *np.repeat(np.sqrt(LAMBDAS), settings.replicas)]
    parts: list[Correction] = []
    for number, amount in enumerate(amounts):
        source = with_noise(amount * settings.error_factor, settings.seed + number, constant)
        parts.append(module.fit(source, of_base, lambda *_: None))
        progress("simex", number + 1, len(amounts))
    return SimexCorrection(summary.info("simex", settings, training), tuple(parts))


def _n_rows(rows: Rows) -> int:
    return len(rows.weight)

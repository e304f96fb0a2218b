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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.corrections import (
    Batch,
    Content,
    Fitted,
    Float32Array,
    FloatArray,
    ModelInfo,
    Param,
    Progress,
    TrainingSource,
    hybrid,
    map_batches,
    polynomial,
    summarise,
)
from sos_dask.errors import ModelError
from sos_dask.problem import TEFF_UNIT_K
from sos_dask.schema import LABELS

LAMBDAS = (0.5, 1.0, 1.5, 2.0)
# Errors of the labels in units of the features.
_PER_LABEL = np.array([1 / TEFF_UNIT_K, 1.0, 1.0])

PARAMS: Mapping[str, Param] = {
    **hybrid.PARAMS,
    "base": Param("polynomial", "The method that is fitted", choices=("polynomial", "hybrid")),
    "replicas": Param(2, "Fits with added noise of each size", 1, 100),
    "error_factor": Param(1.0, "True errors of the labels in units of the quoted ones", 0.0, 100.0),
}


@dataclass(frozen=True)
class NoisySource:
    """Pairs with noise added to the target's labels: to features and differences alike.

    Parameters
    ----------
    source : TrainingSource
        Its batches have errors; pairs without an error of each label are not used.
    amount : float
        Size of the noise in units of the errors.
    seed : int
        The noise of a pair depends on this and on its own labels, not on other pairs.
    constant : tuple of bool
        Labels whose differences are all equal: they have no noise, whatever the errors say.
    """

    source: TrainingSource
    amount: float
    seed: int
    constant: tuple[bool, ...] = (False,) * len(LABELS)

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return self.source.n_batches

    def load(self, index: int) -> Batch:
        """Read one batch."""
        batch = self.source.load(index)
        if batch.errors is None:
            raise ModelError(
                "method 'simex' needs errors of the target's labels, and the pairs have none",
                "Map teff_err, logg_err and feh_err in the definition of the survey.",
            )
        noise = self.amount * batch.errors * _normals(batch, self.seed)
        known = np.isfinite(batch.errors).all(axis=1)
        return replace(
            batch,
            features=(batch.features + noise * _PER_LABEL).astype(np.float32),
            differences=np.where(
                self.constant, batch.differences, (batch.differences + noise).astype(np.float32)
            ),
            weight=np.where(known, batch.weight, np.float32(0)),
        )


def _normals(batch: Batch, seed: int) -> FloatArray:
    """Standard normal numbers, shape (n, 3), from a hash of each pair."""
    from scipy.special import ndtri

    content = np.concatenate([batch.features, batch.differences], axis=1)
    bits = np.ascontiguousarray(content, dtype=np.float32).view(np.uint32).astype(np.uint64)
    state = np.full(len(bits), seed + 1, dtype=np.uint64)
    for column in bits.T:
        state = _mixed(state ^ column)
    columns = [_mixed(state + np.uint64(number)) for number in range(3)]
    uniform = (np.stack(columns, axis=1) >> np.uint64(11)).astype(np.float64) + 0.5
    return np.asarray(ndtri(uniform / 2.0**53))


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64 (Steele, Lea & Flood 2014, OOPSLA, 453)."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class SimexCorrection(Fitted):
    """Weighted sum of fits with and without added noise.

    Parameters
    ----------
    info : ModelInfo
    parts : tuple of Fitted
        One without added noise, then those of each of `LAMBDAS`.
    """

    def __init__(self, info: ModelInfo, parts: tuple[Fitted, ...]) -> None:
        super().__init__(info)
        self.parts = parts

    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite features inside the box, shape (n, 3)."""
        weights = part_weights(int(self.info.params["replicas"]))
        total = np.zeros((len(features), 3))
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


def _base(info: ModelInfo) -> tuple[ModuleType, ModelInfo]:
    """Module of the method that is fitted with and without noise, and what each fit states."""
    module = polynomial if info.params["base"] == "polynomial" else hybrid
    return module, info.of_part(str(info.params["base"]), module.PARAMS)


def restore(info: ModelInfo, files: Mapping[str, Content]) -> SimexCorrection:
    """Model from its files; `ModelError` where they are incomplete."""
    try:
        module, part_info = _base(info)
        n_parts = 1 + len(LAMBDAS) * int(info.params["replicas"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model 'simex': incomplete or damaged ({error!r})") from None
    parts = []
    for number in range(n_parts):
        start = f"{number}-"
        own = {k.removeprefix(start): v for k, v in files.items() if k.startswith(start)}
        parts.append(module.restore(part_info, own))
    return SimexCorrection(info, tuple(parts))


def fit(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    params: Mapping[str, Any],
    client: Any,
    progress: Progress,
) -> SimexCorrection:
    """Fit; see `sos_dask.corrections.fit`."""
    # Pairs without errors are left out of the fit without noise too.
    plain = NoisySource(source, 0.0, 0)
    if not any(map_batches(_has_errors, plain, client)):
        raise ModelError(
            "method 'simex' needs errors of the target's labels, and no pair has all three",
            "Map teff_err, logg_err and feh_err in the definition of the survey.",
        )
    needed = 2 * len(polynomial.polynomial_terms(params["order"]))
    summary = summarise(plain, train_folds, client, "simex", needed)
    info = summary.info("simex", params, train_folds)
    module, part = _base(info)
    constant = tuple(summary.constant.tolist())
    amounts = [0.0, *np.repeat(np.sqrt(LAMBDAS), params["replicas"])]
    parts: list[Fitted] = []
    for number, amount in enumerate(amounts):
        noise = amount * params["error_factor"]
        noisy = NoisySource(source, noise, params["seed"] + number, constant)
        parts.append(module.fit(noisy, train_folds, part.params, client, lambda *_: None))
        progress("simex", number + 1, len(amounts))
    return SimexCorrection(info, tuple(parts))


def _has_errors(source: TrainingSource, index: int) -> bool:
    return bool((source.load(index).weight > 0).any())

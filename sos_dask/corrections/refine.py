"""Robust fits of the numbers of formulas: to a sample in memory, and to all training pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.corrections import (
    FloatArray,
    Histogram,
    IntArray,
    Summary,
    TrainingSource,
    count,
    map_batches,
    training_rows,
)
from sos_dask.corrections.expression import Expression
from sos_dask.corrections.sample import Scale
from sos_dask.problem import BLOCK_ROWS

BISQUARE = 4.685
MAD_TO_SIGMA = 1.4826
STEPS = 12
CALM = 1e-4


def in_units(expression: Expression, center: float, spread: float) -> Expression:
    """A formula of scaled differences as one in K or dex."""
    return expression.scaled(spread) + Expression.number(center)


def bisquare_loss(u: FloatArray) -> FloatArray:
    """Bisquare loss, 0 to 1 (Beaton & Tukey 1974, Technometrics 16, 147)."""
    return np.asarray(1.0 - np.maximum(0.0, 1.0 - np.square(u / BISQUARE)) ** 3)


def _weight(u: FloatArray) -> FloatArray:
    return np.square(np.maximum(0.0, 1.0 - np.square(u / BISQUARE)))


def fit_sample(expression: Expression, u: FloatArray, y: FloatArray) -> Expression:
    """Robust fit of the numbers of an expression to pairs in memory."""

    def look(trial: Expression, sigma: float | None) -> _Look:
        return _look(trial, u, y, np.ones(len(y)), sigma)

    first = look(expression, None)
    fitter = _Fitter(expression, max(first.sigma(), 1e-6))
    while not fitter.done:
        fitter.take(look(fitter.trial, fitter.sigma))
    return fitter.best


@dataclass(frozen=True)
class _Look:
    """Weighted normal equations of an expression, its loss, and its residuals."""

    normal: FloatArray
    right: FloatArray
    loss: float
    total: float
    counts: tuple[NDArray[np.uint16], IntArray]

    def sigma(self) -> float:
        return _sigma([self.counts])


def _sigma(counts: Sequence[tuple[NDArray[np.uint16], IntArray]]) -> float:
    histogram = Histogram()
    for part in counts:
        histogram.add(part)
    return MAD_TO_SIGMA * float(histogram.quantiles((0.5,))[0])


def _look(
    expression: Expression, u: FloatArray, y: FloatArray, weight: FloatArray, sigma: float | None
) -> _Look:
    m = len(expression.parameters())
    normal, right = np.zeros((m, m)), np.zeros(m)
    loss, total = 0.0, 0.0
    sizes = np.empty(len(y), dtype=np.float32)
    for start in range(0, len(y), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        with np.errstate(all="ignore"):
            value, gradient = expression.value_and_gradient(u[:, block])
            residual = y[block] - value
            sizes[block] = np.abs(residual)
            if sigma is None:
                continue
            loss += float(weight[block] @ bisquare_loss(residual / sigma))
            total += float(weight[block].sum())
            weighted = gradient * (weight[block] * _weight(residual / sigma))
            # Not a matrix product: its last bits may depend on the number of threads.
            normal += np.einsum("in,jn->ij", weighted, gradient)
            right += np.einsum("in,n->i", weighted, residual)
    return _Look(normal, right, loss, total, count(sizes))


class _Fitter:
    """Levenberg-Marquardt steps for the bisquare loss: a step that does not help is taken back."""

    def __init__(self, start: Expression, sigma: float) -> None:
        self.best = self.trial = start
        self.sigma = sigma
        self.done = not start.parameters()
        self._loss = math.inf
        self._damping = 1e-3
        self._left = STEPS
        self._normal = self._right = np.zeros(0)

    def take(self, look: _Look) -> None:
        """Go on from what was seen at ``trial``."""
        loss = look.loss / look.total if look.total else math.inf
        finite = np.isfinite(look.normal).all() and np.isfinite(look.right).all()
        if math.isfinite(loss) and finite and loss < self._loss:
            calm = self._loss - loss < CALM * loss
            self.best, self._loss = self.trial, loss
            self._normal, self._right = look.normal, look.right
            self._damping /= 10
        else:
            calm = self._damping > 1e3
            self._damping *= 30
        self._left -= 1
        if calm or self._left <= 0 or not math.isfinite(self._loss):
            self.done = True
            return
        size = np.sqrt(np.diag(self._normal))
        size = np.where(size > 0, size, 1.0)
        matrix = self._normal / np.outer(size, size)
        matrix[np.diag_indices_from(matrix)] += self._damping
        step = np.linalg.lstsq(matrix, self._right / size, rcond=1e-12)[0] / size
        self.trial = self.best.with_parameters(np.array(self.best.parameters()) + step)


def refine(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    client: Any,
    scale: Scale,
    summary: Summary,
    expressions: Sequence[Expression],
) -> list[tuple[Expression, float]]:
    """Fit the numbers of formulas to all training pairs, batch by batch.

    Parameters
    ----------
    source : TrainingSource
    train_folds : sequence of int, optional
        None: all.
    client : distributed.Client, optional
    scale : Scale
    summary : Summary
    expressions : sequence of Expression
        One a label, of shifted features and scaled differences.

    Returns
    -------
    list of (Expression, float)
        Of each label in K or dex, and the scatter that is left.
    """

    def looks(trials: Sequence[Expression], sigma: Sequence[float] | None) -> list[list[_Look]]:
        parts = map_batches(
            _look_at_batch, source, client, train_folds, scale, summary, trials, sigma
        )
        return [list(of_label) for of_label in zip(*parts, strict=True)]

    start = looks(expressions, None)
    sigma = [max(_sigma([part.counts for part in parts]), 1e-6) for parts in start]
    fitters = [_Fitter(e, s) for e, s in zip(expressions, sigma, strict=True)]
    while not all(fitter.done for fitter in fitters):
        seen = looks([fitter.trial for fitter in fitters], sigma)
        for fitter, parts in zip(fitters, seen, strict=True):
            if not fitter.done:
                fitter.take(_added(parts))
    final = []
    for label, (fitter, before) in enumerate(zip(fitters, expressions, strict=True)):
        center, spread = float(summary.center[label]), float(summary.spread[label])
        # A pole may have come near.
        best = fitter.best if scale.finite(fitter.best) else before
        whole = in_units(best, center, spread)
        # The formula is what its text says.
        short = [float(f"{value:.6g}") for value in whole.parameters()]
        final.append((best, whole.with_parameters(short)))
    ends = looks([best for best, _ in final], None)
    scatter = [_sigma([part.counts for part in parts]) for parts in ends]
    return [
        (whole, s * float(summary.spread[label]))
        for label, ((_, whole), s) in enumerate(zip(final, scatter, strict=True))
    ]


def _look_at_batch(
    source: TrainingSource,
    index: int,
    train_folds: Sequence[int] | None,
    scale: Scale,
    summary: Summary,
    expressions: Sequence[Expression],
    sigma: Sequence[float] | None,
) -> list[_Look]:
    rows = training_rows(source.load(index), train_folds)
    u = scale.shift(rows.features)
    weight = rows.weight.astype(np.float64) / summary.mean_weight
    out = []
    for label, expression in enumerate(expressions):
        known = np.isfinite(rows.differences[:, label])
        y = rows.differences[known, label].astype(np.float64)
        y = (y - summary.center[label]) / summary.spread[label]
        one = None if sigma is None else sigma[label]
        out.append(_look(expression, u[:, known], y, weight[known], one))
    return out


def _added(parts: Sequence[_Look]) -> _Look:
    total = parts[0]
    for part in parts[1:]:
        total = _Look(
            total.normal + part.normal,
            total.right + part.right,
            total.loss + part.loss,
            total.total + part.total,
            part.counts,
        )
    return total

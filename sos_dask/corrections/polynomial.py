"""A polynomial of limited total order with all cross terms, fitted robustly and out of core.

Iteratively reweighted least squares: first with the weights of Huber, whose minimum is the only
one, then with the bisquare of Tukey, which ignores outliers altogether. Tuning constants 1.345 and
4.685 give 95 % efficiency on normal errors (Holland & Welsch 1977, Communications in Statistics A6,
813). On simulated pairs with 3 % outliers to one side Huber alone left five times the bias.

An iteration is one pass over the batches. What they give back is summed in their order, so the
coefficients do not depend on the number of workers. The scale of the residuals is their median
absolute value in the pass before, from a logarithmic histogram; the last passes keep it, because
together with the weights it might circle for ever.

Orders that the pairs do not tell from noise are left out, each label for itself; of such an order
powers of single inputs or products may stay. In terms that are orthogonal over the pairs, the lower
orders and powers first, all coefficients have one standard error, and m terms stay where the sum of
their squared coefficients is over 2 m squared errors (Mallows 1973, Technometrics 15, 661). So many
inputs or few pairs do not make the correction noisy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from sos_dask import settings
from sos_dask.columns import Float32Array, FloatArray, IntArray
from sos_dask.corrections import base
from sos_dask.corrections.base import Content, Correction, ModelInfo, Rows, Summary, Training
from sos_dask.errors import ModelError
from sos_dask.problem import BLOCK_ROWS
from sos_dask.run.machine import n_threads
from sos_dask.settings import to_json
from sos_dask.stats.numbers import MAD_TO_SIGMA, count

FILE = "coefficients.json"
HUBER = 1.345
BISQUARE = 4.685
HUBER_PASSES = 10
SCALE_PASSES = 10  # with the bisquare, that still renew the scale
_LEAST_PAIRS = 2  # a term, of order 1
# Of a higher order: with 2, the worst labels of 100 pairs were 1.4 times as wrong.
_PAIRS_A_TERM = 5
_KEPT_ROWS = 1_000_000  # 28 MB
_THREAD_ROWS = 20_000


class Settings(settings.Settings):
    """Parameters of the method."""

    order: int = Field(
        4,
        ge=1,
        le=6,
        description="Largest sum of the exponents of a term; less with under 5 pairs a term",
    )
    ridge: float = Field(
        1.0, ge=0.0, le=1e6, description="Pull of all coefficients but the constant to 0, in pairs"
    )
    tolerance: float = Field(
        1e-4, ge=1e-12, le=0.1, description="Largest change in the last passes, in scatters"
    )
    max_passes: int = Field(60, ge=1, le=1000, description="Largest number of passes")


@dataclass(eq=False)
class PolynomialCorrection(Correction):
    """Polynomials of the standardised inputs (x - center) / width."""

    method = "polynomial"
    parameters = Settings
    search: ClassVar = {"order": (2, 3, 4, 5), "ridge": (0.1, 1.0, 3.0, 10.0)}

    center: FloatArray
    width: FloatArray
    exponents: IntArray  # shape (m, k)
    coefficients: FloatArray  # shape (m, l)
    scatter: FloatArray  # 1.4826 times the median absolute residual of the training pairs
    passes: int  # over the pairs, that were made

    def standardised(self, features: Float32Array) -> FloatArray:
        """Standardised inputs in double precision, shape (n, k)."""
        return (features.astype(np.float64) - self.center) / self.width

    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite inputs inside the box, shape (n, l)."""
        z = self.standardised(features)
        out = evaluate_polynomials(z, self.exponents, self.coefficients)
        return out.astype(np.float32, order="C")

    def files(self) -> Mapping[str, bytes]:
        """``coefficients.json``: every float64 with all its digits."""
        labels, inputs = self.problem.names, self.problem.features
        document = {
            "formula": "sum over terms of coefficient * product of z^exponent, "
            "z = (feature - center) / width",
            "center": base.by_name(inputs, self.center),
            "width": base.by_name(inputs, self.width),
            "exponents": self.exponents.tolist(),
            "coefficients": base.by_name(labels, self.coefficients.T),
            "scatter": base.by_name(labels, self.scatter),
            "passes": self.passes,
        }
        return {FILE: to_json(document)}

    @classmethod
    def restore(cls, info: ModelInfo, files: Mapping[str, Content]) -> PolynomialCorrection:
        """Read a model from its own files."""
        document = base.parse_json(bytes(files[FILE]), FILE)
        labels, inputs = info.problem.names, info.problem.features
        center, width = (base.in_order(inputs, document[key]) for key in ("center", "width"))
        exponents = np.array(document["exponents"], dtype=np.int64).reshape(-1, len(center))
        coefficients = base.in_order(labels, document["coefficients"]).T
        scatter, passes = base.in_order(labels, document["scatter"]), int(document["passes"])
        shape = (len(exponents), len(scatter))
        if coefficients.shape != shape or not np.isfinite(coefficients).all():
            raise ModelError(f"{FILE}: needs one finite coefficient for each term and label")
        return cls(info, center, width, exponents, coefficients, scatter, passes)

    @classmethod
    def fit(cls, training: Training, settings: Settings) -> PolynomialCorrection:
        """Fit; see `sos_dask.corrections.fit`."""
        k = len(training.problem.inputs)
        summary = base.summarise(training, cls.method, settings, least_pairs(k))
        n = summary.info.n_pairs
        if training.folds is not None and min(n) < _PAIRS_A_TERM * n_terms(settings.order, k):
            # The fits of folds and of all pairs have one order.
            everything = replace(training, folds=None)
            n = base.summarise(everything, cls.method, settings, least_pairs(k)).info.n_pairs
        most = min(n) // _PAIRS_A_TERM
        order = max(o for o in range(1, settings.order + 1) if o == 1 or n_terms(o, k) <= most)
        exponents = polynomial_terms(order, k)
        m = len(exponents)
        # Numbers of four digits, so that the last bits of sums do not matter.
        center, width = (
            np.array([float(f"{value:.3e}") for value in values.tolist()])
            for values in (summary.mean, summary.deviation)
        )
        start = np.zeros((m, len(summary.center)))
        start[0] = summary.center
        found = cls(summary.info, center, width, exponents, start, summary.spread, 0)
        # A residual of pairs without noise must not become a scale of zero.
        floor = np.maximum(1e-6 * summary.spread, np.finfo(np.float64).tiny)
        n_pairs = np.array(summary.info.n_pairs)
        freedom = np.sqrt(n_pairs / (n_pairs - m))
        quiet, huber_left, scale_left = 0, HUBER_PASSES, SCALE_PASSES
        one_pass = _one_pass(training, summary)
        # Two passes without change, because the scale of a pass is that of the pass before.
        while found.passes < settings.max_passes and quiet < 2:
            is_huber = huber_left > 0
            parts = one_pass(found, is_huber, scale_left > 0)
            sigma = found.scatter
            if scale_left > 0:
                histograms = base.summed([part.counts for part in parts], len(sigma))
                medians = np.array([one.quantiles((0.5,))[0] for one in histograms])
                sigma = np.maximum(MAD_TO_SIGMA * medians * freedom, floor)
            with one_thread():
                coefficients, change = _solve(parts, found.coefficients, settings.ridge)
            found = replace(
                found, coefficients=coefficients, scatter=sigma, passes=found.passes + 1
            )
            calm = bool((change <= settings.tolerance * sigma).all())
            if is_huber:
                huber_left = 0 if calm else huber_left - 1
            else:
                scale_left -= 1
                quiet = quiet + 1 if calm else 0
        if not np.isfinite(found.coefficients).all():
            advice = "lower 'order' or raise 'ridge'"
            raise ModelError(f"the polynomial has no finite solution: {advice}")
        with one_thread():
            coefficients = _without_noise(parts, found.coefficients, exponents)
        coefficients = np.where(summary.constant, start, coefficients)
        return replace(found, coefficients=coefficients, scatter=found.scatter / freedom)


def one_thread() -> Any:
    """Matrix products by one thread: with more the last bits may depend on their number."""
    return _thread_pools().limit(limits=1)


@lru_cache(maxsize=1)
def _thread_pools() -> Any:
    # It looks through all loaded libraries, which takes longer than a small batch.
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController()


class _Part(NamedTuple):
    """Sums over the pairs of a batch."""

    normal: FloatArray  # (l, m, m)
    right: FloatArray  # (l, m)
    noise: FloatArray  # (l, 2): squares of weighted residuals, and slopes of these
    counts: list[base.Counts]  # of residuals


def _one_pass(training: Training, summary: Summary) -> Callable[..., list[_Part]]:
    """A pass over all batches, as a function of its start; parts are in the order of batches."""
    n_rows, weight = int(summary.n_rows.sum()), summary.mean_weight
    if training.client is not None or n_rows > _KEPT_ROWS:
        return lambda *start: training.map(_of_batch, weight, *start)
    rows = [training.rows(index) for index in range(training.source.n_batches)]
    threads = n_threads(n_rows, _THREAD_ROWS)

    def one_pass(*start: Any) -> list[_Part]:
        with one_thread(), ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda part: _normal_equations(part, weight, *start), rows))

    return one_pass


def _of_batch(rows: Rows, *start: Any) -> _Part:
    with one_thread():
        return _normal_equations(rows, *start)


def _normal_equations(
    rows: Rows, mean_weight: float, model: PolynomialCorrection, huber: bool, counted: bool
) -> _Part:
    """Weighted normal equations of one batch."""
    m, n_labels = model.coefficients.shape
    normal, right = np.zeros((n_labels, m, m)), np.zeros((n_labels, m))
    noise = np.zeros((n_labels, 2))
    residuals = np.empty((n_labels, len(rows.features)), dtype=np.float32)
    for first in range(0, len(rows.features), BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        terms = design_matrix(model.standardised(rows.features[block]), model.exponents).T
        y = rows.differences[block].T.astype(np.float64)
        residual = y - model.coefficients.T @ terms
        residuals[:, block] = np.abs(residual)
        size = np.abs(residual / model.scatter[:, None])
        if huber:
            weight, slope = HUBER / np.maximum(size, HUBER), (size <= HUBER).astype(np.float64)
        else:
            root = np.maximum(0.0, 1.0 - np.square(size / BISQUARE))
            weight, slope = np.square(root), root * (5.0 * root - 4.0)
        known = np.isfinite(y)
        of_pair = np.where(known, rows.weight[block].astype(np.float64) / mean_weight, 0.0)
        weight, slope = (np.where(known, one, 0.0) * of_pair for one in (weight, slope))
        y = np.where(known, y, 0.0)
        squares = np.square(weight * np.where(known, residual, 0.0))
        noise += np.stack([squares.sum(axis=1), slope.sum(axis=1)], axis=1)
        weighted = np.empty_like(terms)
        for label in range(n_labels):
            np.multiply(terms, weight[label], out=weighted)
            normal[label] += weighted @ terms.T
            right[label] += weighted @ y[label]
    counts = [count(one[np.isfinite(one)]) for one in residuals] if counted else []
    return _Part(normal, right, noise, counts)


def _without_noise(
    parts: Sequence[_Part], coefficients: FloatArray, exponents: IntArray
) -> FloatArray:
    """Coefficients (m, l) without those, of the m terms, that noise alone may have made."""
    order, is_product = exponents.sum(axis=1), np.count_nonzero(exponents, axis=1) > 1
    sequence = np.lexsort((is_product, order))
    order, is_product = order[sequence], is_product[sequence]
    normal: Any = sum(part.normal for part in parts)
    noise: Any = sum(part.noise for part in parts)
    kept = coefficients.copy()
    for label, (matrix, (squares, slope)) in enumerate(zip(normal, noise, strict=True)):
        # Variance of coefficients of orthogonal terms (Huber 1973, Annals of Statistics 1, 799).
        variance = squares * matrix[0, 0] / max(slope, 1e-6 * matrix[0, 0]) ** 2
        matrix = matrix[np.ix_(sequence, sequence)]
        size = np.sqrt(np.diag(matrix))
        size = np.where(size > 0, size, 1.0)
        # A little on the diagonal, for terms that others determine: they count for nothing.
        scaled = matrix / np.outer(size, size) + 1e-10 * np.eye(len(size))
        root = np.linalg.cholesky(scaled).T
        found = root @ (size * kept[sequence, label])
        square = np.where(np.diag(root) > 1e-4, np.square(found) - 2 * variance, 0.0)
        for power in range(1, int(order[-1]) + 1):
            every = order == power
            for part in (
                (every & is_product, every & ~is_product) if square[every].sum() <= 0 else ()
            ):
                if square[part].sum() <= 0:
                    found[part] = 0.0
        if not found.all():
            kept[sequence, label] = np.linalg.solve(root, found) / size
    return kept


def _solve(
    parts: Sequence[_Part], coefficients: FloatArray, ridge: float
) -> tuple[FloatArray, FloatArray]:
    """New coefficients and, per label, the root mean square change of the fitted values."""
    normal: Any = sum(part.normal for part in parts)
    right: Any = sum(part.right for part in parts)
    new, change = np.empty_like(coefficients), np.empty(len(right))
    for label, matrix in enumerate(normal):
        # The constant is the first term, so this is the sum of the weights.
        total = matrix[0, 0]
        size = np.sqrt(np.diag(matrix))
        size = np.where(size > 0, size, 1.0)
        scaled = matrix / np.outer(size, size)
        scaled[np.diag_indices_from(scaled)] += np.where(np.arange(len(size)) > 0, ridge / total, 0)
        # Least squares of the smallest norm: terms that the pairs cannot tell apart stay small.
        solution = np.linalg.lstsq(scaled, right[label] / size, rcond=1e-13)[0]
        new[:, label] = solution / size
        step = new[:, label] - coefficients[:, label]
        change[label] = math.sqrt(max(0.0, float(step @ matrix @ step)) / total)
    return new, change


def least_pairs(n: int) -> int:
    """Count the pairs that a polynomial of order 1 of ``n`` variables needs."""
    return _LEAST_PAIRS * n_terms(1, n)


def n_terms(order: int, n: int) -> int:
    """Count the terms of `polynomial_terms`."""
    return math.comb(n + order, order)


def polynomial_terms(order: int = 4, n: int = 3) -> IntArray:
    """List the exponents of all monomials of n variables up to a total order, shape (m, n).

    By total order, then by falling exponent of the first variable, the second, and so on: 1, x, y,
    z, x^2, xy, xz, y^2, yz, z^2, ... (35 terms for order 4 of three variables).
    """
    factors = [
        chosen
        for total in range(order + 1)
        for chosen in itertools.combinations_with_replacement(range(n), total)
    ]
    exponents = [[chosen.count(variable) for variable in range(n)] for chosen in factors]
    return np.array(exponents, dtype=np.int64).reshape(-1, n)


def design_matrix(z: FloatArray, exponents: IntArray) -> FloatArray:
    """Monomials of every row, shape (n, m), each contiguous; exponents of `polynomial_terms`."""
    columns = np.ascontiguousarray(z.T)
    out = np.ones((len(exponents), len(z)))
    places = {exponent: row for row, exponent in enumerate(map(tuple, exponents.tolist()))}
    for exponent, row in places.items():
        if any(exponent):
            # A lower monomial, which is there already, times one variable.
            variable = next(number for number, power in enumerate(exponent) if power)
            lower = tuple(p - (v == variable) for v, p in enumerate(exponent))
            np.multiply(out[places[lower]], columns[variable], out=out[row])
    return out.T


def evaluate_polynomials(
    z: FloatArray, exponents: IntArray, coefficients: FloatArray
) -> FloatArray:
    """Values (n, l) of polynomials with the same distinct monomials (m, k) of z (n, k), by Horner.

    Only element-wise operations are used, so the value of a row is the same to the last bit
    whichever rows stand beside it; a matrix product does not promise that.
    """
    found = _horner(exponents, coefficients, list(np.ascontiguousarray(z.T)))
    return np.broadcast_to(found, (len(found), len(z))).T


def _horner(
    exponents: IntArray, coefficients: FloatArray, columns: Sequence[FloatArray]
) -> FloatArray:
    """Value of a nested polynomial, shape (l, 1) where it is a constant, else (l, n)."""
    if not columns:
        return np.asarray(coefficients[0][:, None])
    total: Any = None
    for done, power in enumerate(range(int(exponents[:, 0].max()), -1, -1)):
        if done:
            total = np.multiply(total, columns[0], out=total if done > 1 else None)
        of_power = exponents[:, 0] == power
        if of_power.any():
            lower = _horner(exponents[of_power, 1:], coefficients[of_power], columns[1:])
            total = np.add(total, lower, out=total) if done else lower
    return np.asarray(total)

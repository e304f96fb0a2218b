"""What a correction sees of a star, and polynomials of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sos_dask.errors import ConfigError
from sos_dask.schema import LABELS

FEATURES = ("teff_5040", "logg", "feh")
TEFF_UNIT_K = 5040.0
# All that is known of a row, where the survey or a companion catalog has it.
PARAMETERS = (*LABELS, "snr", "rv", "phot_g_mean_mag", "distance", "ebv")
LOGARITHMIC = ("snr", "distance")
# Rows of one block: the few arrays of a block that are alive at once fit the second-level cache.
BLOCK_ROWS = 8192

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def features(teff: ArrayLike, logg: ArrayLike, feh: ArrayLike) -> NDArray[np.float32]:
    """Inputs of every correction.

    Parameters
    ----------
    teff : array_like, shape (n,), K
    logg : array_like, shape (n,), dex (cgs)
    feh : array_like, shape (n,), dex
        Of the target, nan where unknown.

    Returns
    -------
    ndarray of float32, shape (n, 3)
        Columns `FEATURES`: Teff / 5040 K, log g, [Fe/H]; each is contiguous.
    """
    columns = [np.asarray(column, dtype=np.float32) for column in (teff, logg, feh)]
    return np.stack([columns[0] / np.float32(TEFF_UNIT_K), *columns[1:]]).T


def parameters_of(columns: Mapping[str, NDArray[np.floating]], names: Sequence[str]) -> FloatArray:
    """Parameters as scores and projections see them: Teff / 5040 K, logarithms of S/N and distance.

    Parameters
    ----------
    columns : mapping of str to ndarray of float, shape (n,)
        nan where unknown.
    names : sequence of str
        Some of `PARAMETERS`, in this order.

    Returns
    -------
    ndarray of float64, shape (n, len(names))
        nan where unknown.
    """
    out = np.empty((len(columns[names[0]]), len(names)))
    for number, name in enumerate(names):
        values = np.asarray(columns[name], dtype=np.float64)
        if name == "teff":
            values = values / TEFF_UNIT_K
        elif name in LOGARITHMIC:
            values = np.log10(np.where(values > 0, values, np.nan))
        out[:, number] = values
    return out


def polynomial_terms(order: int = 4, n: int = len(FEATURES)) -> IntArray:
    """Exponents of all monomials up to a total order.

    Parameters
    ----------
    order : int
        Largest sum of the exponents.
    n : int
        Number of variables.

    Returns
    -------
    ndarray of int64, shape ((order + n)! / (order! n!), n)
        By total order, then by falling exponent of the first variable, the second, and so on:
        1, x, y, z, x^2, xy, xz, y^2, yz, z^2, ... (35 terms for order 4 of three variables).
    """
    exponents = [e for e in itertools.product(range(order + 1), repeat=n) if sum(e) <= order]
    exponents.sort(key=lambda e: (sum(e), tuple(-power for power in e)))
    return np.array(exponents, dtype=np.int64).reshape(-1, n)


def design_matrix(z: FloatArray, exponents: IntArray) -> FloatArray:
    """Monomials of every row.

    Parameters
    ----------
    z : ndarray of float64, shape (n, k)
    exponents : ndarray of int, shape (m, k)
        Of any monomials; with those of `polynomial_terms` each costs one multiplication.

    Returns
    -------
    ndarray of float64, shape (n, m)
        In column-major order: every monomial is contiguous.
    """
    z = np.asarray(z, dtype=np.float64)
    if exponents.shape[1] != z.shape[1]:
        raise ConfigError(
            f"exponents of {exponents.shape[1]} variables do not fit {z.shape[1]} columns"
        )
    columns = np.ascontiguousarray(z.T)
    out = np.empty((len(exponents), len(z)))
    known: dict[tuple[int, ...], int] = {}
    for row, exponent in enumerate(map(tuple, exponents.tolist())):
        used = [variable for variable, power in enumerate(exponent) if power]
        # A lower monomial that is there already, times one variable.
        for variable in used:
            lower = tuple(p - (v == variable) for v, p in enumerate(exponent))
            if lower in known:
                np.multiply(out[known[lower]], columns[variable], out=out[row])
                break
        else:
            out[row] = 1.0
            for variable in used:
                out[row] *= columns[variable] ** exponent[variable]
        known[exponent] = row
    return out.T


def evaluate_polynomials(
    z: FloatArray, exponents: IntArray, coefficients: FloatArray
) -> FloatArray:
    """Values of several polynomials with the same monomials, by nested multiplication (Horner).

    Only element-wise operations are used, so the value of a row is the same to the last bit
    whichever rows stand beside it; a matrix product does not promise that.

    Parameters
    ----------
    z : ndarray of float64, shape (n, k)
    exponents : ndarray of int, shape (m, k)
        Distinct rows.
    coefficients : ndarray of float64, shape (m, l)

    Returns
    -------
    ndarray of float64, shape (n, l)
    """
    plan = _nest(exponents, np.asarray(coefficients, dtype=np.float64))
    out = np.empty((len(z), coefficients.shape[1]))
    for start in range(0, len(z), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        columns = list(np.ascontiguousarray(z[block].T, dtype=np.float64))
        out[block] = _horner(plan, columns).T
    return out


def _nest(exponents: IntArray, coefficients: FloatArray) -> Any:
    """A polynomial as polynomials in the other variables, one per power of the first or None."""
    if exponents.shape[1] == 0:
        return coefficients[0][:, None]
    powers = exponents[:, 0]
    return [
        _nest(exponents[powers == p][:, 1:], coefficients[powers == p])
        if (powers == p).any()
        else None
        for p in range(int(powers.max()) + 1)
    ]


def _horner(plan: Any, columns: list[FloatArray]) -> FloatArray:
    """Value of a nested polynomial, shape (l, 1) where it is a constant, else (l, n)."""
    if not isinstance(plan, list):
        return np.asarray(plan)
    total = _horner(plan[-1], columns[1:])
    own = False
    for lower in reversed(plan[:-1]):
        total = np.multiply(total, columns[0], out=total if own else None)
        own = True
        if lower is not None:
            total += _horner(lower, columns[1:])
    return total

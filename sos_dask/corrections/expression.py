"""Formulas in a normal form, whose coefficients a fit may change; printed as text and LaTeX."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.problem import FEATURES

FloatArray = NDArray[np.float64]
DIGITS = 7
LATEX_NAMES = (r"\frac{T_\mathrm{eff}}{5040\,\mathrm{K}}", r"\log g", r"\mathrm{[Fe/H]}")

# A factor: a feature by its position or a sum in parentheses, and its whole power.
Factor = tuple["int | Expression", int]
Product = tuple[Factor, ...]


@dataclass(frozen=True)
class Expression:
    """Sum of coefficients times products; the product without factors is 1.

    Sums inside products have 1 as their first coefficient, so that no two coefficients do the
    same. Like terms are one term. Nothing is multiplied out.

    Parameters
    ----------
    terms : tuple of (product, coefficient)
        In a fixed order.
    """

    terms: tuple[tuple[Product, float], ...]

    @classmethod
    def number(cls, value: float) -> Expression:
        """A constant."""
        return cls((((), float(value)),))

    @classmethod
    def name(cls, index: int) -> Expression:
        """A feature."""
        return cls(((((index, 1),), 1.0),))

    @classmethod
    def names(cls) -> list[Expression]:
        """All features."""
        return [cls.name(index) for index in range(len(FEATURES))]

    @classmethod
    def of(cls, terms: Sequence[tuple[Product, float]]) -> Expression:
        """Sum of terms in normal form; 0 where there is none."""
        total: dict[Product, float] = {}
        for product, coefficient in terms:
            total[product] = total.get(product, 0.0) + coefficient
        kept = [(product, c) for product, c in total.items() if c != 0]
        return cls(tuple(sorted(kept, key=lambda term: _order(term[0])))) or cls.number(0)

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __add__(self, other: Expression) -> Expression:
        return Expression.of([*self.terms, *other.terms])

    def __neg__(self) -> Expression:
        return self.scaled(-1.0)

    def __sub__(self, other: Expression) -> Expression:
        return self + -other

    def scaled(self, scale: float) -> Expression:
        """All coefficients times a number."""
        return Expression.of([(product, scale * c) for product, c in self.terms])

    def __mul__(self, other: Expression) -> Expression:
        for one, rest in ((self, other), (other, self)):
            if len(one.terms) == 1 and not one.terms[0][0]:
                return rest.scaled(one.terms[0][1])
        (first, a), (second, b) = self._as_product(), other._as_product()
        powers = dict(first)
        for base, power in second:
            powers[base] = powers.get(base, 0) + power
        product = tuple(
            sorted(((b, p) for b, p in powers.items() if p), key=lambda f: _order((f,)))
        )
        return Expression.of([(product, a * b)])

    def __truediv__(self, other: Expression) -> Expression:
        product, scale = other._as_product()
        if scale == 0:
            raise ZeroDivisionError
        inverse = tuple((base, -power) for base, power in product)
        return self * Expression.of([(inverse, 1 / scale)])

    def __pow__(self, exponent: int) -> Expression:
        product, scale = self._as_product()
        raised = tuple((base, power * exponent) for base, power in product)
        return Expression.of([(raised, scale**exponent)])

    def _as_product(self) -> tuple[Product, float]:
        if len(self.terms) == 1:
            return self.terms[0]
        # The first term that is not the constant leads.
        leading = next(c for product, c in self.terms if product)
        inner = self.scaled(1 / leading)
        terms = sorted(inner.terms, key=lambda term: not term[0])
        # Not 0.9999...: its coefficient is no parameter.
        terms[0] = (terms[0][0], 1.0)
        return ((Expression(tuple(terms)), 1),), leading

    # A coefficient that leads an inner sum is 1 and stays 1: it is no parameter.

    def parameters(self) -> list[float]:
        """Coefficients that a fit may change."""
        return self._parameters(False)

    def _parameters(self, inner: bool) -> list[float]:
        out = []
        for number, (product, coefficient) in enumerate(self.terms):
            if not (inner and number == 0):
                out.append(coefficient)
            for base, _ in product:
                if isinstance(base, Expression):
                    out += base._parameters(True)
        return out

    def with_parameters(self, values: Sequence[float]) -> Expression:
        """The same form with other coefficients."""
        return self._with(iter(values), False)

    def _with(self, values: Iterator[float], inner: bool) -> Expression:
        terms = []
        for number, (product, coefficient) in enumerate(self.terms):
            coefficient = coefficient if inner and number == 0 else float(next(values))
            factors = tuple(
                (base._with(values, True) if isinstance(base, Expression) else base, power)
                for base, power in product
            )
            terms.append((factors, coefficient))
        return Expression(tuple(terms))

    def value_and_gradient(self, columns: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Values and their derivatives with respect to `parameters`.

        Parameters
        ----------
        columns : ndarray of float64, shape (3, n)
            The features.

        Returns
        -------
        ndarray of float64, shape (n,), ndarray of float64, shape (n_parameters, n)
        """
        value, gradient = self._derive(columns, False)
        return value, np.array(gradient).reshape(len(gradient), columns.shape[1])

    def _derive(self, columns: FloatArray, inner: bool) -> tuple[FloatArray, list[FloatArray]]:
        total, gradient = np.zeros(columns.shape[1]), []
        for number, (product, coefficient) in enumerate(self.terms):
            bases = [
                (
                    base._derive(columns, True)
                    if isinstance(base, Expression)
                    else (columns[base], [])
                )
                for base, _ in product
            ]
            factors = [b ** float(p) for (b, _), (_, p) in zip(bases, product, strict=True)]
            whole = functools.reduce(operator.mul, factors, np.ones(columns.shape[1]))
            total = total + coefficient * whole
            if not (inner and number == 0):
                gradient.append(whole)
            for index, ((base, of_base), (_, power)) in enumerate(zip(bases, product, strict=True)):
                others = [factor for i, factor in enumerate(factors) if i != index]
                rest = functools.reduce(operator.mul, others, np.full(len(whole), coefficient))
                outer = rest * power * base ** float(power - 1)
                gradient += [outer * derivative for derivative in of_base]
        return total, gradient

    @property
    def complexity(self) -> int:
        """Numbers and features in the formula plus the operators between them, powers included."""
        count = 0
        for product, coefficient in self.terms:
            count += 2 * (not product or coefficient not in (1.0, -1.0)) - (not product)
            for base, power in product:
                count += 1 if isinstance(base, int) else base.complexity
                count += 2 * (abs(power) != 1)
            count += max(0, len(product) - 1)
        return count + len(self.terms) - 1

    def rescaled(self, width: Sequence[float]) -> Expression:
        """The same function of features that are ``width`` times as large."""
        names = [Expression.name(index).scaled(1 / w) for index, w in enumerate(width)]
        return self.substitute(names)

    def substitute(self, names: Sequence[Expression]) -> Expression:
        """The expression with others in the place of the features."""
        total = Expression(())
        for product, coefficient in self.terms:
            value = Expression.number(coefficient)
            for base, power in product:
                inner = names[base] if isinstance(base, int) else base.substitute(names)
                raised = inner ** abs(power)
                value = value * raised if power > 0 else value / raised
            total = total + value
        return total

    def form(self) -> tuple[Any, ...]:
        """What is left without the coefficients."""
        return tuple(
            tuple((b if isinstance(b, int) else b.form(), p) for b, p in product)
            for product, _ in self.terms
        )

    def text(self, pivot: Sequence[float]) -> str:
        """Formula of features, from one of features less their pivots."""
        return self._print(_Plain(pivot))

    def latex(self, pivot: Sequence[float]) -> str:
        """LaTeX of `text`."""
        return self._print(_Latex(pivot))

    def _print(self, style: _Plain) -> str:
        out = ""
        for product, coefficient in style.merged(self.terms):
            minus = coefficient < 0
            bare = coefficient == 1 and len(product) == 1 and product[0][1] == 1
            if bare and isinstance(index := product[0][0], int):
                body = style.names[index]
            else:
                body = self._term(style, product, abs(coefficient))
            sign = (" - " if minus else " + ") if out else ("-" if minus else "")
            out += sign + body
        return out

    def _term(self, style: _Plain, product: Product, size: float) -> str:
        above = [style.factor(base, power) for base, power in product if power > 0]
        below = [style.factor(base, -power) for base, power in product if power < 0]
        if size != 1 or not above:
            above.insert(0, style.number(size))
        return style.divided(above, below)


def _order(product: Product) -> tuple[Any, ...]:
    """By total degree, then by feature; sums in parentheses last."""
    degree = sum(power for _, power in product)
    keys = tuple(
        (0, base, -power, ()) if isinstance(base, int) else (1, 0, -power, _inner_order(base))
        for base, power in product
    )
    return degree, keys


def _inner_order(base: Expression) -> tuple[Any, ...]:
    return tuple((_order(product), coefficient) for product, coefficient in base.terms)


class _Plain:
    """How a formula is written: as text."""

    def __init__(self, pivot: Sequence[float]) -> None:
        self.pivot = pivot
        self.names: Sequence[str] = FEATURES

    def merged(self, terms: Sequence[tuple[Product, float]]) -> Sequence[tuple[Product, float]]:
        """Terms in which the pivot of a bare feature is part of the constant."""
        shift = sum(
            self.pivot[index]
            for product, c in terms
            if c == 1
            and len(product) == 1
            and product[0][1] == 1
            and isinstance(index := product[0][0], int)
        )
        if not shift:
            return terms
        constant = sum(c for product, c in terms if not product) - shift
        return [*(term for term in terms if term[0]), ((), constant)]

    def number(self, value: float) -> str:
        return f"{value:.{DIGITS}g}"

    def less(self, name: str, value: float) -> str:
        if float(self.number(abs(value))) == 0:
            return name
        return f"({name} {'-' if value > 0 else '+'} {self.number(abs(value))})"

    def factor(self, base: int | Expression, power: int) -> str:
        if isinstance(base, int):
            return self.raised(self.less(self.names[base], self.pivot[base]), power)
        match base.terms:
            # A feature and a constant: one shift.
            case ((((int(index), 1),), 1.0), ((), shift)):
                return self.raised(self.less(self.names[index], self.pivot[index] - shift), power)
        return self.raised(self.bracket(base._print(self)), power)

    def bracket(self, inner: str) -> str:
        return f"({inner})"

    def raised(self, base: str, power: int) -> str:
        return base if power == 1 else f"{base}**{power}"

    def divided(self, above: list[str], below: list[str]) -> str:
        return "/".join(["*".join(above), *below])


class _Latex(_Plain):
    def __init__(self, pivot: Sequence[float]) -> None:
        super().__init__(pivot)
        self.names = LATEX_NAMES

    def number(self, value: float) -> str:
        digits, _, exponent = super().number(value).partition("e")
        return rf"{digits} \times 10^{{{int(exponent)}}}" if exponent else digits

    def less(self, name: str, value: float) -> str:
        plain = super().less(name, value)
        return self.bracket(plain[1:-1]) if plain != name else name

    def bracket(self, inner: str) -> str:
        return rf"\left({inner}\right)"

    def raised(self, base: str, power: int) -> str:
        if power == 1:
            return base
        return (base if base.startswith(r"\left(") else self.bracket(base)) + f"^{{{power}}}"

    def divided(self, above: list[str], below: list[str]) -> str:
        top = self.product(above)
        return rf"\frac{{{top}}}{{{self.product(below)}}}" if below else top

    def product(self, factors: list[str]) -> str:
        return r" \, ".join(factors)

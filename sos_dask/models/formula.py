"""Formulas: read from text without running it, simplified, differentiated, printed.

The grammar is that of arithmetic: numbers, names, ``+ - * /``, whole powers, parentheses. There
are no calls, so a formula file can compute a number and do nothing else, and Python and SymPy read
the same text with the same meaning.

Two forms of a formula are used. `Formula` is a text, evaluated as it stands. `Expression` is a sum
of products in a normal form, whose coefficients a fit may change.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ModelError
from sos_dask.features import BLOCK_ROWS, FEATURES

FloatArray = NDArray[np.float64]
MAX_TEXT = 20_000
MAX_NESTING = 60
MAX_POWER = 12
DIGITS = 7
# A divisor may fall to this share of its largest value in the box, no lower.
SMALLEST_DIVISOR = 0.02
LATEX_NAMES = (r"\frac{T_\mathrm{eff}}{5040\,\mathrm{K}}", r"\log g", r"\mathrm{[Fe/H]}")

_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
}
_APPLY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
Step = tuple[str, float]


# --- text --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Formula:
    """A formula as it is written.

    Parameters
    ----------
    text : str
    steps : tuple
        In postfix order: ``number`` with its value, ``name`` with its position, ``power`` with its
        exponent, ``negate``, or an operator for the two values before it.
    """

    text: str
    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, text: str, names: Sequence[str] = FEATURES) -> Formula:
        """Read a formula.

        Parameters
        ----------
        text : str
        names : sequence of str
            The only names that may stand in it.

        Raises
        ------
        ModelError
            Anything but arithmetic: calls, attributes, other names, powers that are not whole.
        """
        shown = text if len(text) <= 80 else text[:77] + "..."
        if len(text) > MAX_TEXT or (bad := re.search(r"[^\w.+\-*/() ]", text, re.ASCII)):
            reason = "it is too long" if len(text) > MAX_TEXT else f"{bad[0]!r} is not arithmetic"  # type: ignore[index]
            raise ModelError(f"'{shown}' is not a formula: {reason}", _ALLOWED)
        try:
            tree = ast.parse(text.strip(), mode="eval")
            steps = tuple(_steps(tree.body, list(names), 0))
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            reason = reason.partition(" - ")[0]
            raise ModelError(f"'{shown}' is not a formula: {reason}", _ALLOWED) from None
        return cls(text, steps)

    def run(self, names: Sequence[Any], number: Callable[[float], Any] = float) -> Any:
        """Value, with the arithmetic of whatever stands for the names.

        Parameters
        ----------
        names : sequence
            Values of the names.
        number : callable
            Makes a value of a number.
        """
        stack: list[Any] = []
        for kind, value in self.steps:
            if kind == "number":
                stack.append(number(value))
            elif kind == "name":
                stack.append(names[int(value)])
            elif kind == "negate":
                stack.append(-stack.pop())
            elif kind == "power":
                stack.append(_power(stack.pop(), int(value)))
            else:
                right = stack.pop()
                stack.append(_APPLY[kind](stack.pop(), right))
        return stack.pop()

    def evaluate(self, features: NDArray[np.floating]) -> FloatArray:
        """Values in double precision; each row by itself.

        Parameters
        ----------
        features : ndarray of float, shape (n, 3)

        Returns
        -------
        ndarray of float64, shape (n,)
        """
        out = np.empty(len(features))
        for start in range(0, len(features), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            columns = np.ascontiguousarray(features[block].T, dtype=np.float64)
            with np.errstate(all="ignore"):
                out[block] = self.run(list(columns))
        return out

    def is_finite(
        self, minimum: Sequence[float], maximum: Sequence[float], cells: int = 12
    ) -> bool:
        """Whether the formula is finite, and no divisor small, everywhere in a box.

        By interval arithmetic over ``cells`` parts of each side, so a pole cannot hide between
        grid points; a formula of which this cannot be shown counts as not finite.
        """
        low, high = np.asarray(minimum, dtype=np.float64), np.asarray(maximum, dtype=np.float64)
        edges = low + (high - low) * np.linspace(0, 1, cells + 1)[:, None]
        lows = np.stack(np.meshgrid(*edges[:-1].T, indexing="ij")).reshape(len(low), -1)
        highs = np.stack(np.meshgrid(*edges[1:].T, indexing="ij")).reshape(len(low), -1)
        names = [Interval(a, b) for a, b in zip(lows, highs, strict=True)]
        with np.errstate(all="ignore"):
            value = self.run(names, lambda x: Interval(np.float64(x), np.float64(x)))
        return bool(np.isfinite(value.low).all() and np.isfinite(value.high).all())


_ALLOWED = (
    f"A formula has numbers, {', '.join(FEATURES)}, + - * /, parentheses and whole powers; "
    "nothing in it is ever run."
)


def _steps(node: ast.expr, names: list[str], depth: int) -> Iterator[Step]:
    if depth > MAX_NESTING:
        raise ValueError("it is nested too deeply")
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            number = float(value)  # type: ignore[arg-type]
            if not math.isfinite(number):
                raise ValueError("a number is infinite")
            yield "number", number
        case ast.Name(id=name) if name in names:
            yield "name", float(names.index(name))
        case ast.Name(id=name):
            raise ValueError(f"there is no feature '{name}'")
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            yield from _steps(inner, names, depth + 1)
            yield "negate", 0.0
        case ast.BinOp(op=ast.Pow(), left=base, right=ast.Constant(value=value)) if (
            type(value) is int and 0 < value <= MAX_POWER
        ):
            yield from _steps(base, names, depth + 1)
            yield "power", float(value)
        case ast.BinOp(op=ast.Pow()):
            raise ValueError(f"a power is not a whole number from 1 to {MAX_POWER}")
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _BINARY:
            # Long sums lean to the left: their depth is no nesting.
            yield from _steps(left, names, depth + (not isinstance(left, ast.BinOp)))
            yield from _steps(right, names, depth + 1)
            yield _BINARY[type(op)], 0.0
        case _:
            raise ValueError(f"{type(node).__name__} is not arithmetic")


def _power(value: Any, exponent: int) -> Any:
    # Products of floats are the same in any place of an array; numpy's power need not be.
    if isinstance(value, Interval | Expression):
        return value**exponent
    return functools.reduce(operator.mul, [value] * exponent)


# --- intervals ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """Intervals that hold all values of a quantity, one in each cell of a box."""

    low: Any
    high: Any

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Interval(functools.reduce(np.minimum, ends), functools.reduce(np.maximum, ends))

    def __truediv__(self, other: Interval) -> Interval:
        across = (other.low <= 0) & (other.high >= 0)
        largest = np.max(np.maximum(np.abs(other.low), np.abs(other.high)))
        smallest = np.minimum(np.abs(other.low), np.abs(other.high))
        bad = across | (smallest < SMALLEST_DIVISOR * largest)
        inverse = Interval(
            np.where(bad, -np.inf, 1 / other.high), np.where(bad, np.inf, 1 / other.low)
        )
        return self * inverse

    def __pow__(self, exponent: int) -> Interval:
        a, b = self.low**exponent, self.high**exponent
        across = (self.low <= 0) & (self.high >= 0) & (exponent % 2 == 0)
        return Interval(np.where(across, 0.0, np.minimum(a, b)), np.maximum(a, b))


# --- normal form -------------------------------------------------------------------------------

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

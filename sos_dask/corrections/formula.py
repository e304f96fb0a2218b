"""Formulas: read from text without running it, evaluated as they stand, bounded in a box.

The grammar is that of arithmetic: numbers, names, ``+ - * /``, whole powers, parentheses. There
are no calls, so a formula file can compute a number and do nothing else, and Python and SymPy read
the same text with the same meaning.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.columns import FloatArray
from sos_dask.errors import ModelError
from sos_dask.problem import DEFAULT

DIGITS = 7
LATEX_NAMES = {
    "teff_5040": r"\frac{T_\mathrm{eff}}{5040\,\mathrm{K}}",
    "logg": r"\log g",
    "feh": r"\mathrm{[Fe/H]}",
}
MAX_TEXT = 20_000
MAX_NESTING = 60
MAX_POWER = 12
# A divisor may fall to this share of its largest value in the box, no lower.
SMALLEST_DIVISOR = 0.02

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Formula:
    """A formula as it is written, its names, and its syntax tree."""

    text: str
    names: tuple[str, ...]
    tree: ast.expr

    @classmethod
    def parse(cls, text: str, names: Sequence[str] = DEFAULT.features) -> Formula:
        """Read a formula in which no other names occur; `ModelError` for all but arithmetic."""
        shown = text if len(text) <= 80 else text[:77] + "..."
        try:
            if len(text) > MAX_TEXT:
                raise ValueError("it is too long")
            if bad := re.search(r"[^\w.+\-*/() ]", text, re.ASCII):
                raise ValueError(f"{bad[0]!r} is not arithmetic")
            formula = cls(text, tuple(names), ast.parse(text.strip(), mode="eval").body)
            with np.errstate(all="ignore"):
                formula.run([np.float64(1)] * len(names), np.float64)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise ModelError(
                f"'{shown}' is not a formula: {reason.partition(' - ')[0]}",
                f"A formula has numbers, {', '.join(names)}, + - * /, parentheses and whole "
                "powers; nothing in it is ever run.",
            ) from None
        return formula

    def run(self, values: Sequence[Any], number: Callable[[float], Any] = float) -> Any:
        """Value, with the arithmetic of whatever stands for the names and the numbers."""
        return _value(self.tree, dict(zip(self.names, values, strict=True)), number, 0)

    def evaluate(self, features: NDArray[np.floating]) -> FloatArray:
        """Values in double precision, shape (n,), of features (n, k); each row by itself."""
        columns = np.ascontiguousarray(features.T, dtype=np.float64)
        with np.errstate(all="ignore"):
            return np.broadcast_to(self.run(list(columns)), len(features))

    def is_finite(self, minimum: Sequence[float], maximum: Sequence[float]) -> bool:
        """Tell whether the formula is finite, and no divisor small, everywhere in a box.

        By interval arithmetic over parts of the box, so a pole cannot hide between grid points; a
        formula of which this cannot be shown counts as not finite.
        """
        low, high = np.asarray(minimum, dtype=np.float64), np.asarray(maximum, dtype=np.float64)
        cells = min(12, int(1e6 ** (1 / len(low))))
        edges = low + (high - low) * np.linspace(0, 1, cells + 1)[:, None]
        lows = np.stack(np.meshgrid(*edges[:-1].T, indexing="ij")).reshape(len(low), -1)
        highs = np.stack(np.meshgrid(*edges[1:].T, indexing="ij")).reshape(len(low), -1)
        names = [Interval(a, b) for a, b in zip(lows, highs, strict=True)]
        with np.errstate(all="ignore"):
            value = self.run(names, lambda x: Interval(np.float64(x), np.float64(x)))
        return bool(np.isfinite(value.low).all() and np.isfinite(value.high).all())


def _value(
    node: ast.expr, known: Mapping[str, Any], number: Callable[[float], Any], depth: int
) -> Any:
    """Value of a part of a formula; `ValueError` for anything but arithmetic."""
    if depth > MAX_NESTING:
        raise ValueError("it is nested too deeply")

    def inner(part: ast.expr, deeper: int = 1) -> Any:
        return _value(part, known, number, depth + deeper)

    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if not math.isfinite(float(value)):
                raise ValueError("a number is infinite")
            return number(float(value))
        case ast.Name(id=name):
            if name not in known:
                raise ValueError(f"there is no feature '{name}'")
            return known[name]
        case ast.UnaryOp(op=ast.USub()):
            return -inner(node.operand)
        case ast.BinOp(op=ast.Pow(), right=ast.Constant(value=int() as power)) if (
            not isinstance(power, bool) and 0 < power <= MAX_POWER
        ):
            base = inner(node.left)
            # Products of floats are the same in any place of an array; NumPy's power need not be.
            exact = isinstance(base, Interval)
            return base**power if exact else functools.reduce(operator.mul, [base] * power)
        case ast.BinOp(op=ast.Pow()):
            raise ValueError(f"a power is not a whole number from 1 to {MAX_POWER}")
        case ast.BinOp() if type(node.op) in _BINARY:
            # Long sums lean to the left: their depth is no nesting.
            left = inner(node.left, not isinstance(node.left, ast.BinOp))
            return _BINARY[type(node.op)](left, inner(node.right))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


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


@dataclass(frozen=True)
class Template:
    """A formula in normal form, with a name (``_0``, ``_1``, ...) for each number a fit may change.

    It is a sum with a constant; every term has a number, and so has every term of a sum in
    parentheses but its first, so that no two numbers do the same. Like terms are one term. Nothing
    is multiplied out.

    ``form`` (a ``sympy.Expr``) and ``formula`` are the same, of the inputs less their pivots;
    ``gradients`` are its derivatives by the numbers.
    """

    form: Any
    formula: Formula
    gradients: tuple[Formula, ...]
    names: tuple[str, ...]
    numbers: tuple[float, ...]

    @classmethod
    def of(cls, text: str, names: Sequence[str], width: Sequence[float]) -> Template | None:
        """Normal form of a formula of scaled inputs; None where it is not finite."""
        import sympy

        try:
            formula = Formula.parse(text, names)
        except ModelError:  # not a number, or nested too deeply
            return None
        inputs = [sympy.Symbol(n) / sympy.Float(w) for n, w in zip(names, width, strict=True)]
        expression = sympy.sympify(formula.run(inputs, sympy.Float))
        if expression.has(sympy.nan, sympy.zoo, sympy.oo):
            return None
        numbers: list[float] = []
        form, _ = _numbered(expression, numbers, inner=False)
        known = [*names, *(f"_{number}" for number in range(len(numbers)))]
        gradients = [form.diff(sympy.Symbol(name)) for name in known[len(names) :]]
        whole, *derivatives = (Formula.parse(_text(e), known) for e in (form, *gradients))
        return cls(form, whole, tuple(derivatives), tuple(names), tuple(numbers))

    def with_numbers(self, numbers: FloatArray) -> Template:
        """The same form with other numbers."""
        return replace(self, numbers=tuple(numbers.tolist()))

    def values(self, u: FloatArray) -> FloatArray:
        """Values at inputs less their pivots, shape (k, n)."""
        return self._run(self.formula, u)

    def gradient(self, u: FloatArray) -> FloatArray:
        """Derivatives by the numbers, shape (n, numbers)."""
        return np.stack([self._run(one, u) for one in self.gradients], axis=1)

    def _run(self, formula: Formula, u: FloatArray) -> FloatArray:
        with np.errstate(all="ignore"):
            return np.broadcast_to(formula.run([*u, *self.numbers]), u.shape[1:])

    def _filled(self, spread: float = 1.0) -> Any:
        """Expression with its numbers, times another one."""
        import sympy

        known = {sympy.Symbol(f"_{n}"): sympy.Float(x) for n, x in enumerate(self.numbers)}
        # Term by term: a whole product keeps its number outside of sums in parentheses.
        return sympy.Add(
            *(spread * term for term in sympy.Add.make_args(self.form.xreplace(known)))
        )

    @property
    def complexity(self) -> int:
        """Numbers and inputs in the formula plus the operators between them, powers included."""
        import sympy

        count = 0
        for part in sympy.preorder_traversal(_plain(self._filled())):
            if part.is_Add or part.is_Mul:
                count += len(part.args) - 1 - (part.is_Mul and abs(part.args[0]) == 1)
            elif part.is_Pow:
                count += 1 if part.exp != -1 else 0
            else:
                count += abs(part) != 1 if part.is_Number else 1
        return max(count, 1)

    def written(
        self, pivot: Sequence[float], center: float = 0.0, spread: float = 1.0
    ) -> tuple[str, str]:
        """Text and LaTeX of ``center + spread * formula``, of the inputs themselves."""
        import sympy

        symbols = [sympy.Symbol(name) for name in self.names]
        shifts = {s: s - sympy.Float(p) for s, p in zip(symbols, pivot, strict=True) if p}
        whole = _plain(self._filled(spread).xreplace(shifts) + sympy.Float(center))
        return _text(whole), _latex(whole, self.names)


def _numbered(expression: Any, numbers: list[float], inner: bool) -> tuple[Any, float]:
    """Sum with a name for each of its numbers, and the number that an inner sum was divided by."""
    import sympy

    terms = []
    for term in sympy.Add.make_args(expression):
        size, rest = term.as_coeff_Mul()
        size, body = float(size), sympy.Integer(1)
        for factor in sympy.Mul.make_args(rest):
            base, power = factor.as_base_exp()
            if base.is_Add:
                base, lead = _numbered(base, numbers, inner=True)
                size *= lead ** int(power)
            body *= base**power
        if body != 0:
            terms.append((body, size))
    # The constant is last: it leads no inner sum.
    terms.sort(key=lambda term: (term[0] == 1, sympy.default_sort_key(term[0])))
    if not inner and not any(body == 1 for body, _ in terms):
        terms.append((sympy.Integer(1), 0.0))
    lead = terms[0][1] if inner else 1.0
    total = terms[0][0] if inner else sympy.Integer(0)
    for body, size in terms[inner:]:
        total += sympy.Symbol(f"_{len(numbers)}") * body
        numbers.append(size / lead)
    return total, lead


def _plain(expression: Any) -> Any:
    """Expression with numbers of `DIGITS` digits, and whole ones without a point."""
    import sympy

    def short(number: Any) -> Any:
        value = float(f"{float(number):.{DIGITS}g}")
        whole = value.is_integer() and abs(value) < 10**DIGITS
        return sympy.Integer(int(value)) if whole else sympy.Float(str(value), DIGITS)

    return expression.xreplace({one: short(one) for one in expression.atoms(sympy.Float)})


def _text(expression: Any) -> str:
    from sympy.printing.str import StrPrinter

    class Printer(StrPrinter):
        def _print_Float(self, expr: Any) -> str:
            return f"{float(expr):.{DIGITS}g}"

        def _print_Pow(self, expr: Any, rational: bool = False) -> str:
            if expr.exp.is_Integer and expr.exp < -1:
                return f"1/{self._print(expr.base**-expr.exp)}"
            return str(super()._print_Pow(expr, rational=rational))

    return str(Printer().doprint(expression))


def _latex(expression: Any, names: Sequence[str]) -> str:
    import sympy
    from sympy.printing.latex import LatexPrinter
    from sympy.printing.precedence import PRECEDENCE

    class Printer(LatexPrinter):
        def parenthesize(self, item: Any, level: int, *args: Any, **options: Any) -> str:
            if item.is_Symbol and level >= PRECEDENCE["Pow"]:
                return rf"\left({self._print(item)}\right)"
            return str(super().parenthesize(item, level, *args, **options))

    known = {
        sympy.Symbol(name): LATEX_NAMES.get(name, rf"\mathrm{{{name}}}".replace("_", r"\_"))
        for name in names
    }
    return str(Printer({"symbol_names": known, "mul_symbol": r" \, "}).doprint(expression))

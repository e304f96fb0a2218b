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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.corrections.expression import Expression, FloatArray
from sos_dask.errors import ModelError
from sos_dask.problem import BLOCK_ROWS, FEATURES

MAX_TEXT = 20_000
MAX_NESTING = 60
MAX_POWER = 12
# A divisor may fall to this share of its largest value in the box, no lower.
SMALLEST_DIVISOR = 0.02

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

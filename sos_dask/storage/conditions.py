"""Conditions on the rows of a catalog: a Python expression of columns."""

from __future__ import annotations

import ast
import keyword
import operator
import re
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.errors import ConfigError
from sos_dask.storage.catalog import Catalog

_DOES: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.And: operator.and_, ast.Or: operator.or_,
}  # fmt: skip
_MOST_TESTS = 1000  # Arrow does not survive 20,000
# Text is kept; names in `` and those that Python takes for its own, such as class, are columns.
_TAKEN = "|".join({*keyword.kwlist} - {"and", "or", "not", "is", "True", "False", "None"})
_NAMES = re.compile(rf"'[^']*'|\"[^\"]*\"|`([^`]+)`|\b({_TAKEN})\b")
_HINT = "For example: 4000 < teff < 5000 and not (flag_sos & 23 != 0 or rv is null)."


def condition(text: str, catalog: Catalog) -> tuple[pc.Expression, list[str]]:
    """Translate a condition to a filter of Arrow, and list the columns that it needs.

    Columns, or some of their bits, are compared with numbers, text or each other (``4000 < teff``,
    ``flag & 23 == 0``, ``rv is not null``); tests are joined by ``and``, ``or``, ``not`` and
    parentheses. A value counts as the column holds it. A test of a null is neither true nor false.

    Raises `ConfigError` or `CatalogError`: it cannot be read, names no column, or compares what
    cannot be compared.
    """
    names: dict[str, str] = {}

    def short(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        return names.setdefault(name, f"_{len(names)}_") if name else match[0]

    try:
        tree = ast.parse(_NAMES.sub(short, text.strip().replace("\\", "\\\\")), mode="eval")
        reader = _Reader(text, catalog, {value: key for key, value in names.items()}, [])
        return reader.test(tree.body), reader.columns
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        raise ConfigError(f"the condition {text!r} cannot be read", _HINT) from None


class _Reader(NamedTuple):
    """Translates the nodes of an expression, whose columns it collects; `ValueError`: unknown."""

    text: str
    catalog: Catalog
    names: dict[str, str]
    columns: list[str]

    def test(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp(op, parts):
                return reduce(_DOES[type(op)], map(self.test, parts))
            case ast.UnaryOp(ast.Not(), part):
                return ~self.test(part)
            case ast.Compare(ast.Name(), [ast.Is() | ast.IsNot() as how], [ast.Name("null")]):
                is_null = self.column(node.left).is_null()
                return is_null if isinstance(how, ast.Is) else ~is_null
            case ast.Compare(first, how, others):
                sides = zip(how, pairwise([first, *others]), strict=True)
                return reduce(operator.and_, (self.compare(one, *both) for one, both in sides))
            case ast.Name():  # of a column of true and false
                return self.compare(ast.Eq(), node, ast.Constant(True))
        raise ValueError

    def compare(self, how: ast.cmpop, *sides: ast.expr) -> pc.Expression:
        n_known, fixed = len(self.columns), (ast.Constant, ast.UnaryOp)
        values = [None if isinstance(side, fixed) else self.column(side) for side in sides]
        if type(how) not in _DOES or len(self.columns) == n_known:
            raise ValueError
        kind = self.catalog.schema.field(name := self.columns[-1]).type
        try:
            for at, side in enumerate(sides):
                if values[at] is None:  # Arrow makes of it what the column holds, or refuses it
                    values[at] = pc.scalar(pa.scalar(_text(side)).cast(kind))
            found: pc.Expression = _DOES[type(how)](*values)
            self.catalog.schema.empty_table().filter(found)
        except pa.ArrowException as error:
            what = f"the condition {self.text!r} cannot be tested: '{name}' has type {kind}"
            example = "'STAR'" if pa.types.is_string(kind) else "0"
            raise ConfigError(what, f"{error}. A test of it is: {name} == {example}") from None
        return found

    def column(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.Name(name):
                self.columns.append(self.names.get(name, name))
                self.catalog.require(self.columns[-1])
                if len(self.columns) > _MOST_TESTS:
                    raise ConfigError(f"a condition has over {_MOST_TESTS} tests", _HINT)
                return pc.field(self.columns[-1])
            case ast.BinOp(ast.Name() as of, ast.BitAnd(), ast.Constant(int(bits))):
                values = self.column(of)
                kind = self.catalog.schema.field(self.columns[-1]).type
                return pc.bit_wise_and(values, pa.scalar(bits).cast(kind))
        raise ValueError


def _text(node: ast.expr) -> str:
    """A number or text."""
    match node:
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)):
            return f"-{number}"
        case ast.Constant(int() | float() | str() as found):
            return str(found)
    raise ValueError

"""A saved correction for tables in memory: of Arrow, pandas or astropy, without a cluster.

>>> from sos_dask import Correction
>>> corrected = Correction.load("store/mine/current/lamost.model.boosted").correct(table)
... # doctest: +SKIP
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask import correct, corrections
from sos_dask.columns import is_valid
from sos_dask.errors import ConfigError
from sos_dask.evidence.intervals import ErrorModel, load_errors
from sos_dask.schema import CANONICAL, TEXT_UNITS, nearest
from sos_dask.storage.manifest import sha256_of_file

T = TypeVar("T")
_ROWS_AT_ONCE = 1 << 17
_NUMBERS = pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal, pa.types.is_null


@dataclass(frozen=True)
class Correction:
    """A fitted correction, and optionally the errors of what it corrects."""

    model: corrections.Correction
    errors: ErrorModel | None = None

    @classmethod
    def load(cls, path: str | PathLike[str], errors: str | PathLike[str] | None = None) -> Self:
        """Read a model that train or a rebuild has written, and optionally its uncertainty.

        Raises
        ------
        ModelError
            A file is missing or changed, or the errors are those of another model.
        """
        model = corrections.load(Path(path))
        if errors is None:
            return cls(model)
        found = load_errors(Path(errors), model.problem)
        found.require(sha256_of_file(Path(path) / corrections.MODEL_FILE))
        return cls(model, found)

    def correct(self, table: T) -> T:
        """Correct the labels of every row, as apply does without a coverage.

        Parameters
        ----------
        table : astropy Table, pandas DataFrame or pyarrow Table
            Has the labels and the inputs of the correction by their names; masked, null or nan
            where unknown. Columns of astropy are converted from their units; others, and those
            without a unit, are in the units of the correction. Whole numbers ``quality`` that are
            not 0 count as failed cuts.

        Returns
        -------
        table of the same type
            All columns and, as float32 in the units of the correction, the corrected labels
            ``*_sos``, the predicted differences ``*_delta``, with errors ``*_sos_err``; and
            ``flag_sos``.

        Raises
        ------
        ConfigError
            A table of another type, or a column is missing, no numbers, or in a unit that cannot
            be converted.
        """
        kind, problem, given = _kind(table), self.model.problem, (self.errors, self.model.problem)
        names = kind.names(table)
        needed = list(dict.fromkeys((*problem.names, *problem.columns)))
        for name in needed:
            if names.count(name) != 1:
                raise ConfigError(
                    f"the table has {'two columns' if name in names else 'no column'} '{name}': "
                    f"this is a correction of {problem.words}",
                    "Rename one." if name in names else nearest(name, list(map(str, names))),
                )
        if self.errors is not None and "snr" in names and "snr" not in needed:
            needed.append("snr")
        units = {one.name: one.unit for one in problem.labels}
        new = correct.corrected_schema(pa.schema([]), *given).names
        pieces = []
        for first in range(0, max(len(table), 1), _ROWS_AT_ONCE):  # type: ignore[arg-type]
            rows, columns = slice(first, first + _ROWS_AT_ONCE), {}
            for name in needed:
                own = CANONICAL[name].unit if name in CANONICAL else ""
                columns[name] = _numbers(kind, table, name, rows, units.get(name, own))
            if "quality" in names:
                quality = kind.read(table, "quality", rows, "")
                if pa.types.is_integer(quality.type):
                    columns["quality"] = quality
            pieces.append(correct.correct(pa.table(columns), self.model, *given).select(new))
        made: T = kind.add(table, pa.concat_tables(pieces))
        return made


# --- types of tables ----------------------------------------------------------------------------


class _Kind(NamedTuple):
    """Names of the columns of a table; some rows of one, in a unit; a table with further ones."""

    names: Callable[[Any], Sequence[Any]]
    read: Callable[[Any, str, slice, str], pa.Array | pa.ChunkedArray]
    add: Callable[[Any, pa.Table], Any]


def _kind(table: Any) -> _Kind:
    for (module, name), kind in _KINDS.items():
        known = getattr(sys.modules.get(module), name, None)  # of others there is no table
        if known is not None and isinstance(table, known):
            return kind
    raise ConfigError(
        f"{type(table).__module__}.{type(table).__name__} is no table that can be corrected",
        "Give an astropy Table, a pandas DataFrame or a pyarrow Table.",
    )


def _numbers(kind: _Kind, table: Any, name: str, rows: slice, unit: str) -> Any:
    """Some rows of a column as floating-point numbers."""
    try:
        column = kind.read(table, name, rows, unit)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise ConfigError(f"column '{name}' contains no numbers: {error}") from None
    if not any(is_(column.type) for is_ in _NUMBERS):
        raise ConfigError(f"column '{name}' contains no numbers, but values of type {column.type}")
    return column if pa.types.is_float32(column.type) else column.cast(pa.float64(), safe=False)


def _of_arrow(table: pa.Table, name: str, rows: slice, unit: str) -> pa.ChunkedArray:
    return table[name][rows]


def _added_to_arrow(table: pa.Table, new: pa.Table) -> pa.Table:
    table = table.drop_columns([name for name in new.column_names if name in table.column_names])
    for field, column in zip(new.schema, new.columns, strict=True):
        table = table.append_column(field, column)
    return table


def _of_pandas(table: Any, name: str, rows: slice, unit: str) -> pa.Array | pa.ChunkedArray:
    return pa.array(table[name].iloc[rows], from_pandas=True)


def _added_to_pandas(table: Any, new: pa.Table) -> Any:
    return table.assign(**{name: new[name].to_numpy() for name in new.column_names})


def _of_astropy(table: Any, name: str, rows: slice, unit: str) -> pa.Array:
    from astropy import units

    column = table[name][rows]
    values = np.asarray(getattr(column, "unmasked", column))
    if values.dtype.kind not in "fiu" or values.ndim != 1:
        raise ConfigError(f"column '{name}' contains no numbers, but {values.dtype.name}")
    own = getattr(column, "unit", None)
    if unit and own is not None and unit not in TEXT_UNITS and str(own) != unit:
        try:
            values = values * own.to(units.Unit(unit))
        except (ValueError, TypeError) as error:  # an unknown one, or of another quantity
            raise ConfigError(f"column '{name}' cannot be converted to {unit}: {error}") from None
    mask = np.broadcast_to(getattr(column, "mask", False), values.shape)
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask, from_pandas=True)


def _added_to_astropy(table: Any, new: pa.Table) -> Any:
    from astropy.table import Column, MaskedColumn

    table = table.copy(copy_data=False)
    for field, column in zip(new.schema, new.columns, strict=True):
        about = {key.decode(): text.decode() for key, text in field.metadata.items()}
        more = {name: about.get(name) or None for name in ("unit", "description")}
        values = (
            pc.fill_null(column, pa.scalar(np.nan, column.type)) if column.null_count else column
        )
        kind = partial(MaskedColumn, mask=~is_valid(column)) if column.null_count else Column
        table[field.name] = kind(values.to_numpy(), **more)
    return table


_KINDS = {
    ("pyarrow", "Table"): _Kind(lambda table: table.column_names, _of_arrow, _added_to_arrow),
    ("pandas", "DataFrame"): _Kind(lambda table: list(table.columns), _of_pandas, _added_to_pandas),
    ("astropy.table", "Table"): _Kind(lambda table: table.colnames, _of_astropy, _added_to_astropy),
}

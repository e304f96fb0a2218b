"""A saved correction for tables in memory: of Arrow, pandas or astropy, without a cluster.

>>> from sos_dask import Correction
>>> corrected = Correction.load("store/mine/current/lamost.model.boosted").correct(table)
... # doctest: +SKIP
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa

from sos_dask import correct, corrections
from sos_dask.errors import ConfigError
from sos_dask.evidence.intervals import ErrorModel, load_errors
from sos_dask.schema import CANONICAL, TEXT_UNITS, nearest
from sos_dask.storage.manifest import local_copy, sha256_of_file
from sos_dask.storage.objects import as_path

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

        Raises `ModelError`: a file is missing or changed, or the errors are those of another model.
        """
        model = corrections.load(local_copy(as_path(path)))
        if errors is None:
            return cls(model)
        found = load_errors(local_copy(as_path(errors)), model.problem)
        found.require(sha256_of_file(local_copy(as_path(path)) / corrections.MODEL_FILE))
        return cls(model, found)

    def correct(self, table: T) -> T:
        """Correct the labels of every row, as apply does without a coverage.

        Parameters
        ----------
        table : astropy Table, pandas DataFrame or pyarrow Table
            Has the labels and the inputs of the correction by their names, in its units unless a
            column of astropy has a unit of its own; masked, null or nan where unknown. Whole
            numbers ``quality`` that are not 0 count as failed cuts.

        Returns
        -------
        table of the same type
            All columns, and in the units of the correction, as float32: the corrected labels
            ``*_sos``, the predicted differences ``*_delta``, with errors ``*_sos_err``; flag_sos.

        Raises
        ------
        ConfigError
            A table of another type; a column is missing, not of numbers, or of another unit.
        """
        (names, read, add), problem = _kind(table), self.model.problem
        units = dict.fromkeys((*problem.names, *problem.columns), "")
        for name in units:
            if names.count(name) != 1:
                raise ConfigError(
                    f"the table has {'two columns' if name in names else 'no column'} '{name}': "
                    f"this is a correction of {problem.words}",
                    "Rename one." if name in names else nearest(name, list(map(str, names))),
                )
        if self.errors is not None and "snr" in names:
            units["snr"] = ""
        units |= {name: CANONICAL[name].unit for name in units if name in CANONICAL}
        units |= {one.name: one.unit for one in problem.labels}
        new = correct.corrected_schema(pa.schema([]), self.errors, problem).names
        pieces = []
        for first in range(0, max(len(table), 1), _ROWS_AT_ONCE):  # type: ignore[arg-type]
            rows = slice(first, first + _ROWS_AT_ONCE)
            columns = {
                name: _numbers(read, table, name, rows, unit) for name, unit in units.items()
            }
            if "quality" in names:
                quality = read(table, "quality", rows, "")
                columns |= {"quality": quality} if pa.types.is_integer(quality.type) else {}
            done = correct.correct(pa.table(columns), self.model, self.errors, problem)
            pieces.append(done.select(new))
        corrected: T = add(table, pa.concat_tables(pieces))
        return corrected


# --- types of tables ----------------------------------------------------------------------------


def _kind(table: Any) -> tuple[list[Any], _Read, _Add]:
    """Names of the columns of a table; what reads rows of one, in a unit; what adds columns."""
    for (module, kind), (names, read, add) in _KINDS.items():
        known = getattr(sys.modules.get(module), kind, None)  # of one not imported there is none
        if known is not None and isinstance(table, known):
            return list(getattr(table, names)), read, add
    what = f"{type(table).__module__}.{type(table).__name__} is no table that can be corrected"
    raise ConfigError(what, "Give an astropy Table, a pandas DataFrame or a pyarrow Table.")


def _numbers(read: _Read, table: Any, name: str, rows: slice, unit: str) -> Any:
    """Some rows of a column as floating-point numbers."""
    try:
        column = read(table, name, rows, unit)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"column '{name}' contains no numbers: {error}") from None
    if not any(is_(column.type) for is_ in _NUMBERS):
        raise ConfigError(f"column '{name}' contains no numbers, but values of type {column.type}")
    return column if pa.types.is_float32(column.type) else column.cast(pa.float64(), safe=False)


def _of_arrow(table: Any, name: str, rows: slice, unit: str) -> Any:
    return table[name][rows]


def _added_to_arrow(table: Any, new: pa.Table) -> Any:
    table = table.drop_columns([name for name in new.column_names if name in table.column_names])
    for field, column in zip(new.schema, new.columns, strict=True):
        table = table.append_column(field, column)
    return table


def _of_pandas(table: Any, name: str, rows: slice, unit: str) -> Any:
    return pa.array(table[name].iloc[rows], from_pandas=True)


def _added_to_pandas(table: Any, new: pa.Table) -> Any:
    return table.assign(**{name: new[name].to_numpy() for name in new.column_names})


def _of_astropy(table: Any, name: str, rows: slice, unit: str) -> Any:
    from astropy import units

    column = table[name][rows]
    values, own = np.asarray(getattr(column, "unmasked", column)), getattr(column, "unit", None)
    if unit and own is not None and unit not in TEXT_UNITS and str(own) != unit:
        try:
            values = values * own.to(units.Unit(unit))
        except (ValueError, TypeError) as error:  # an unknown one, or of another quantity
            raise ConfigError(f"column '{name}' cannot be converted to {unit}: {error}") from None
    mask = np.broadcast_to(getattr(column, "mask", False), values.shape)
    return pa.array(values.astype(values.dtype.newbyteorder("=")), mask=mask)


def _added_to_astropy(table: Any, new: pa.Table) -> Any:
    from astropy.table import Column, MaskedColumn

    table = table.copy(copy_data=False)
    for field, column in zip(new.schema, new.columns, strict=True):
        values, about = column.to_numpy(), field.metadata
        more = {
            key: about.get(key.encode(), b"").decode() or None for key in ("unit", "description")
        }
        kind = partial(MaskedColumn, mask=np.isnan(values)) if column.null_count else Column
        table[field.name] = kind(values, **more)
    return table


_Read: TypeAlias = Callable[[Any, str, slice, str], Any]
_Add: TypeAlias = Callable[[Any, pa.Table], Any]
_KINDS: dict[tuple[str, str], tuple[str, _Read, _Add]] = {
    ("pyarrow", "Table"): ("column_names", _of_arrow, _added_to_arrow),
    ("pandas", "DataFrame"): ("columns", _of_pandas, _added_to_pandas),
    ("astropy.table", "Table"): ("colnames", _of_astropy, _added_to_astropy),
}

"""Whether the columns of a file serve a survey: their names, shapes, types and units."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sos_dask.errors import SurveyError
from sos_dask.ingest.readers.common import Native
from sos_dask.schema import CANONICAL, find_name, is_gaia_id, nearest
from sos_dask.surveys.definition import SourceColumn


def column_named(path: Path, name: str, known: Sequence[Native]) -> Native | None:
    """The column of that name, else the only one that is equal but for case; None without any.

    Raises
    ------
    SurveyError
        Several columns have the name.
    """
    names = [native.name for native in known]
    match = find_name(name, names)
    if match is not None and names.count(match) == 1:
        return known[names.index(match)]
    alike = [item for item in names if item == match or item.lower() == name.lower()]
    if not alike:
        return None
    raise SurveyError(
        f"{path}: column '{name}' is there {len(alike)} times: '" + "', '".join(alike) + "'",
        "Rename or remove all but one.",
    )


def sources_in(
    path: Path, name: str, source: SourceColumn, known: Sequence[Native]
) -> list[Native]:
    """Columns that one column of the product is made from: one, or all that are joined."""
    matches = [column_named(path, wanted, known) for wanted in source.sources]
    found = [match for match in matches if match is not None]
    if len(found) == len(matches) or (found and not source.join):
        return found if source.join else found[:1]
    missing = [s for s, match in zip(source.sources, matches, strict=True) if match is None]
    quoted = "' or '".join(missing)
    names = list(dict.fromkeys(native.name for native in known))
    hints = [nearest(wanted, names) for wanted in missing]
    raise SurveyError(
        f"{path}: no column '{quoted}', which '{name}' is made from",
        next((hint for hint in hints if hint), f"It has: {', '.join(names[:60])}."),
    )


def element_of(native: Native, element: int | None) -> Native:
    """A column, or one element of a vector column."""
    if element is None:
        return native
    step = np.dtype(native.dtype).itemsize if native.dtype else 0  # FITS alone has a dtype
    return replace(native, element=element, offset=native.offset + element * step)


def check_shape(path: Path, user: str, native: Native, element: int | None) -> None:
    """Raise `SurveyError` where a column has not one number or text a row."""
    where = f"{path}: column '{native.name}' ({user})"
    if native.kind not in ("int", "float", "bool", "text"):
        raise SurveyError(
            f"{where} has the type {native.kind}, which is neither one number nor one text a row",
            "Convert it to a number or to text.",
        )
    if native.width != 1 and element is None:
        many = "a vector" if native.width < 0 else f"a vector of {native.width} values"
        raise SurveyError(f"{where} is {many}", "Say which one is meant: element = 0 is the first.")
    if element is not None and 0 <= native.width <= element:
        raise SurveyError(f"{where} has no element {element}", f"It has {native.width}, from 0.")


def check_native(path: Path, name: str, source: SourceColumn, native: Native) -> None:
    """Raise `SurveyError` where a column would give wrong values: its shape, type or unit."""
    check_shape(path, f"for '{name}'", native, source.element)
    where = f"{path}: column '{native.name}'"
    if is_gaia_id(name) and native.kind == "float":
        raise SurveyError(
            f"{where} is stored as float: digits are lost of the 19-digit ids of '{name}'",
            "Get the file with integer or text ids; they cannot be repaired.",
        )
    _check_unit(where, name, source, native)


def _check_unit(where: str, name: str, source: SourceColumn, native: Native) -> None:
    if not native.unit or not source.unit or native.unit == source.unit:
        return
    from astropy import units

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stated = units.Unit(native.unit, parse_strict="silent")
        expected = units.Unit(source.unit, parse_strict="silent")
    unknown = units.UnrecognizedUnit
    if isinstance(stated, unknown) or isinstance(expected, unknown):
        return
    is_time = name == "ra" and stated == units.hour  # hours of right ascension
    if stated.is_equivalent(expected):
        is_same = bool(abs(stated.to(expected) - 1) < 1e-9)
    else:
        # Logarithms and ratios are written in many ways; lengths, times, angles are not.
        kinds = [unit.physical_type for unit in (stated, expected)]
        is_same = "dimensionless" in kinds or "unknown" in kinds
    if not is_same:
        table = "columns" if name in CANONICAL else "extra"
        unit = "hourangle" if is_time else native.unit
        raise SurveyError(
            f"{where} is in '{native.unit}', the survey says '{source.unit}'",
            f'If the file is right, set unit = "{unit}" in [{table}.{name}].',
        )

"""Quality cuts of a survey as a bit mask: a row that fails a cut gets the cut's bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.errors import SurveyError
from sos_dask.schema import find_name, nearest
from sos_dask.surveys.definition import Cut, Survey

BoolArray = NDArray[np.bool_]


def required_natives(survey: Survey, available: Collection[str]) -> dict[str, str]:
    """Columns that the cuts of a survey need.

    Parameters
    ----------
    survey : Survey
    available : collection of str
        Columns there are: of a file, of the product, or of both.

    Returns
    -------
    dict of str to str
        ``Cut.column`` -> available column: the equal name, else the only one that is equal but for
        case. Columns of optional cuts that are not available are left out.

    Raises
    ------
    SurveyError
        A column is missing; the message names it and the cut.
    """
    found = {}
    for cut in survey.cuts.values():
        match = find_name(cut.column, available)
        if match is not None:
            found[cut.column] = match
        elif not cut.optional:
            raise SurveyError(
                f"survey {survey.name}: no column '{cut.column}', which cut '{cut.name}' needs",
                nearest(cut.column, available)
                or "Say optional = true where releases without it shall pass.",
            )
    return found


def quality_mask(
    native: Mapping[str, NDArray[Any] | pa.Array], survey: Survey
) -> NDArray[np.int64]:
    """Evaluate all cuts of a survey.

    NaN, infinity, Arrow nulls and the survey's sentinels are nulls, and a null fails a cut unless
    it has ``null_passes``. In a flag whose bits are tested a sentinel is a value as any other.

    Parameters
    ----------
    native : mapping of str to array, each of shape (n,)
        The columns that the cuts name, numbers or text.
    survey : Survey

    Returns
    -------
    ndarray of int64, shape (n,)
        Sum of ``1 << bit`` of the failed cuts; 0 where all pass.

    Raises
    ------
    SurveyError
        A column is missing, or holds values that its cut cannot test.
    """
    columns = required_natives(survey, native)
    n_rows = len(next(iter(native.values()))) if native else 0
    quality = np.zeros(n_rows, dtype=np.int64)
    for cut in survey.cuts.values():
        if cut.column in columns:
            fails = ~_passes(cut, native[columns[cut.column]], survey)
            quality |= fails.astype(np.int64) << cut.bit
    return quality


def _passes(cut: Cut, column: NDArray[Any] | pa.Array, survey: Survey) -> BoolArray:
    values, null = _numbers_or_text(column)
    if isinstance(values, pa.Array):
        return _text_passes(cut, values, survey)
    if any(isinstance(value, str) for value in cut.values):
        raise _not_testable(cut, survey, "numbers, and the cut lists text")
    if values.dtype.kind == "f":
        null |= ~np.isfinite(values)
    if cut.bits_unset:
        return _bits_pass(cut, values, null, survey)
    for value in survey.missing:
        null |= values == _as_stored(value, values.dtype)
    if cut.values:
        passes = np.isin(values, [_as_stored(value, values.dtype) for value in cut.values])
    else:
        passes = np.ones(len(values), dtype=bool)
        with np.errstate(invalid="ignore"):
            if cut.min is not None:
                passes &= values >= _as_stored(cut.min, values.dtype)
            if cut.max is not None:
                passes &= values <= _as_stored(cut.max, values.dtype)
    return np.where(null, cut.null_passes, passes)


def _as_stored(value: Any, dtype: np.dtype[Any]) -> Any:
    """A limit as the column would hold it: 0.1 as float32 is not below the limit 0.1."""
    return dtype.type(value) if dtype.kind == "f" else value


def _bits_pass(cut: Cut, values: NDArray[Any], null: BoolArray, survey: Survey) -> BoolArray:
    if values.dtype.kind == "f":
        known = np.where(null, 0, values)
        if ((known != np.rint(known)) | (np.abs(known) >= 2.0**53)).any():
            raise _not_testable(cut, survey, "fractions, which have no bits")
        values = known.astype(np.int64)
    mask = np.uint64(sum(1 << bit for bit in set(cut.bits_unset)))
    # Sign extension of a narrow negative flag sets its higher bits as well, as in its own type.
    unset = (values.astype(np.int64, copy=False).view(np.uint64) & mask) == 0
    return np.where(null, cut.null_passes, unset)


def _text_passes(cut: Cut, text: pa.Array, survey: Survey) -> BoolArray:
    text = pc.fill_null(pc.ascii_trim_whitespace(text), "")
    is_null = pc.is_in(text, value_set=pa.array(["", *survey.missing_text]))
    null = is_null.to_numpy(zero_copy_only=False)
    accepted = [value for value in cut.values if isinstance(value, str)]
    if len(accepted) < len(cut.values) or not cut.values:
        if cut.bits_unset or cut.values or cut.min is not None or cut.max is not None:
            raise _not_testable(cut, survey, "text")
        return np.where(null, cut.null_passes, True)
    words = pa.array([value.strip() for value in accepted])
    found = np.asarray(pc.is_in(text, value_set=words).to_numpy(zero_copy_only=False))
    return np.where(null, found | cut.null_passes, found)  # "" may be an accepted value


def _not_testable(cut: Cut, survey: Survey, what: str) -> SurveyError:
    return SurveyError(
        f"survey {survey.name}: cut '{cut.name}' ({cut.test_text()}): column '{cut.column}' holds "
        f"{what}",
        f"Correct [cuts.{cut.name}] of the survey.",
    )


def _numbers_or_text(column: NDArray[Any] | pa.Array) -> tuple[Any, BoolArray]:
    if not isinstance(column, pa.Array):
        return column, np.zeros(len(column), dtype=bool)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column, np.zeros(len(column), dtype=bool)
    null = column.is_null().to_numpy(zero_copy_only=False)
    filled = column.fill_null(False if pa.types.is_boolean(column.type) else 0)
    return filled.to_numpy(zero_copy_only=False), np.array(null)

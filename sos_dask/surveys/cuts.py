"""Quality cuts of a survey as a bit mask: a row that fails a cut gets the cut's bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import BoolArray, is_text, split
from sos_dask.errors import SurveyError
from sos_dask.surveys.definition import Cut, Survey


def quality_mask(
    native: Mapping[str, NDArray[Any] | pa.Array], survey: Survey
) -> NDArray[np.int64]:
    """Evaluate all cuts of a survey.

    NaN, infinity, Arrow nulls and the survey's sentinels are nulls, and a null fails a cut unless
    it has ``null_passes``. In a flag whose bits are tested a sentinel is a value as any other.

    Parameters
    ----------
    native : mapping of str to array, each of shape (n,)
        The columns that the cuts name, numbers or text. Those of optional cuts may be missing.
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
    n_rows = len(next(iter(native.values()))) if native else 0
    quality = np.zeros(n_rows, dtype=np.int64)
    for cut in survey.cuts.values():
        if cut.column in native:
            fails = ~_passes(cut, native[cut.column], survey)
            quality |= fails.astype(np.int64) << cut.bit
        elif not cut.optional:
            raise SurveyError(
                f"survey {survey.name}: no column '{cut.column}', which cut '{cut.name}' needs"
            )
    return quality


def _passes(cut: Cut, column: NDArray[Any] | pa.Array, survey: Survey) -> BoolArray:
    if is_text(column):
        return _text_passes(cut, column, survey)
    values, missing = split(column)
    null = np.zeros(len(values), dtype=bool) if missing is None else missing
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

"""Numbers that stand as text or as floats, and where a bad one stands."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.errors import SurveyError
from sos_dask.ingest.arrays import IntArray, split
from sos_dask.ingest.readers import Source, text_line
from sos_dask.surveys.definition import Survey

_FORTRAN = r"^([+-]?[0-9.]+)[dD]([+-]?[0-9]+)$"
_NULL_NUMBERS = ("", "nan", "NaN", "NAN", "null", "NULL", "None")


@dataclass(frozen=True)
class Place:
    """Where values come from, to say it of a bad one."""

    source: Source
    survey: Survey
    first_row: int

    def fail(self, key: str, index: int, problem: str, hint: str = "") -> NoReturn:
        """Raise `SurveyError` of one value, which stands in this row of the batch."""
        row = self.first_row + index
        line = text_line(self.source, row)
        where = f"row {row}" + ("" if line is None else f" (line {line})")
        raise SurveyError(f"{self.source.path}: column '{key}', {where}: {problem}", hint)


def whole_numbers(place: Place, key: str, numbers: NDArray[Any]) -> IntArray:
    """Integers that a file holds as floats, as long as none can have lost a digit."""
    limit = 2.0**24 if numbers.dtype.itemsize == 4 else 2.0**53
    broken = np.flatnonzero((np.abs(numbers) >= limit) | (numbers != np.rint(numbers)))
    if len(broken):
        value = numbers[broken[0]]
        problem = (
            f"{value!s} is stored as float: digits are lost"
            if abs(value) >= limit
            else f"{value!s} is no integer"
        )
        place.fail(key, int(broken[0]), problem, "Get the file with integer or text ids.")
    return numbers.astype(np.int64)


def parse_floats(place: Place, key: str, text: pa.Array) -> pa.Array:
    """Text as float64; the survey's words for no value are null."""
    text, numbers = _cast(place, text, pa.float64())
    if numbers is None:
        index = _first_failure(text, pa.float64())
        place.fail(key, index, f"'{text[index]}' is not a number", _word_hint(text[index].as_py()))
    return numbers


def parse_integers(
    place: Place, key: str, text: pa.Array, is_id: bool = False, product: str = ""
) -> pa.Array:
    """Text as int64; an id that is written as a float is an error, as its digits are lost."""
    text, numbers = _cast(place, text, pa.int64())
    if numbers is not None:
        return numbers
    # Some are not plain integers: 5.0 and 1e3 will do, until the first that will not.
    is_whole = pc.match_substring_regex(text, r"^[+-]?[0-9]+$")
    whole = pc.ascii_ltrim(pc.if_else(is_whole, text, None), characters="+")
    rest = pc.if_else(is_whole, None, text)
    stop, problem = len(text), ""
    for part, kind, why in (
        (whole, pa.int64(), "does not fit into 64 bits"),
        (rest, pa.float64(), "is not an integer"),
    ):
        try:
            part.slice(0, stop).cast(kind)
        except pa.ArrowInvalid:
            stop, problem = _first_failure(part, kind), why
    numbers, null = split(rest.slice(0, stop).cast(pa.float64()))
    present = np.isfinite(numbers) if null is None else np.isfinite(numbers) & ~null
    if is_id and (present & (numbers > 0)).any():
        index = int(np.argmax(present & (numbers > 0)))
        place.fail(
            key,
            index,
            f"the id '{text[index]}' is stored as float: digits are lost",
            "Get the file with integer ids; these cannot be repaired.",
        )
    integers = pa.array(whole_numbers(place, key, np.where(present, numbers, 0)), mask=~present)
    if problem:
        word = text[stop].as_py()
        hint = _word_hint(word)
        if product == "obs_id":
            hint = 'If the keys are text, set dtype = "string" in [columns.obs_id] of the survey.'
        place.fail(key, stop, f"'{word}' {problem}", hint)
    return pc.coalesce(whole.cast(pa.int64()), integers)


def _cast(place: Place, text: pa.Array, kind: pa.DataType) -> tuple[pa.Array, pa.Array | None]:
    """Text, without words for no value where it has any, and its numbers if all are."""
    words = list(dict.fromkeys((*_NULL_NUMBERS, *place.survey.missing_text)))
    if not any(map(_is_number, words)):
        with contextlib.suppress(pa.ArrowInvalid):
            return text, text.cast(kind)
    text = pc.ascii_trim_whitespace(text)
    text = pc.if_else(pc.is_in(text, value_set=pa.array(words)), None, text)
    for tried in (text, None):
        if tried is None:
            tried = pc.replace_substring_regex(text, _FORTRAN, r"\1e\2")
        with contextlib.suppress(pa.ArrowInvalid):
            return text, tried.cast(kind)
    return text, None


def _is_number(word: str) -> bool:
    try:
        return bool(np.isfinite(float(word)))
    except ValueError:
        return False


def _first_failure(text: pa.Array, kind: pa.DataType) -> int:
    """Index of the first text that does not cast, found by halving."""
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            text.slice(low, middle - low).cast(kind)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _word_hint(word: str) -> str:
    if ":" in word:
        return "Sexagesimal coordinates are not read: convert them to degrees."
    if re.fullmatch(r"[+-]?[0-9.]+(,[0-9.]+)+", word):
        return "Numbers with commas are not read: write 1234.5, without a separator of thousands."
    return (
        f'If it means "no value", add it to the survey: missing_text = ["{word:.40}"]; '
        'if the column is text, set its dtype = "string".'
    )

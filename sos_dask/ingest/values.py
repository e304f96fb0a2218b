"""Native values -> values of one column of the product: units, sentinels, possible limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.ingest.arrays import (
    BoolArray,
    IntArray,
    Values,
    as_array,
    is_text,
    is_valid,
    split,
    taken,
)
from sos_dask.ingest.parse import Place, parse_floats, parse_integers, whole_numbers
from sos_dask.ingest.profile import LABEL_SHIFT, binned
from sos_dask.schema import LABELS, is_gaia_id
from sos_dask.surveys.definition import SourceColumn, Survey


@dataclass
class Made:
    """A column of the product: numbers (0 where null) or text."""

    data: Any
    valid: BoolArray | None = None
    impossible: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    example: str = ""
    histogram: dict[int, int] = field(default_factory=dict)

    @property
    def n_nulls(self) -> int:
        """Rows without a value."""
        return 0 if self.valid is None else int(len(self.valid) - np.count_nonzero(self.valid))

    def taken(self, index: IntArray) -> pa.Array:
        """Rows of these numbers, with Arrow nulls."""
        if isinstance(self.data, pa.DictionaryArray):
            return self.data.dictionary.take(taken(self.data.indices, index))
        if isinstance(self.data, pa.Array):
            return taken(self.data, index)
        return as_array(self.data[index], None if self.valid is None else self.valid[index])


def sentinels_of(survey: Survey, column: SourceColumn, dtype: np.dtype[Any]) -> list[Any]:
    """Numbers that mean null, as the native type writes them."""
    values = dict.fromkeys((*survey.missing, *column.missing))
    if dtype.kind in "iu":
        return [int(value) for value in values if float(value).is_integer()]
    if dtype.itemsize == 4:
        return [np.float32(value) for value in values]
    # A float64 column is often a widened float32.
    return list(dict.fromkeys(v for x in values for v in (float(x), float(np.float32(x)))))


def floats(place: Place, source: SourceColumn, key: str, values: Values) -> Made:
    """A float column of the product; impossible values are null and counted."""
    if is_text(values):
        values = parse_floats(place, key, values)
    raw, null = split(values)
    low, high = source.column.minimum, source.column.maximum
    sentinels = sentinels_of(place.survey, source, raw.dtype)
    with np.errstate(all="ignore"):
        scaled = raw if source.factor == 1.0 else raw * source.factor
        # Adding 0 makes -0.0 the same bytes as 0.0.
        data: Any = np.add(scaled, 0, dtype=source.dtype, casting="unsafe")
        ok = np.isfinite(data)
        if low is not None:
            ok &= data >= low
        if high is not None:
            ok &= data <= high
        for value in sentinels:
            inside = (low is None or value * source.factor >= low) and (
                high is None or value * source.factor <= high
            )
            if inside:  # the others are among the few that failed already
                ok &= raw != value
    if null is not None:
        ok &= ~null
    bad: IntArray = np.flatnonzero(~ok)
    outside, example = bad, ""
    if len(bad):
        missing = ~np.isfinite(raw[bad]) | np.isin(raw[bad], sentinels)
        if null is not None:
            missing |= null[bad]
        outside = bad[~missing]
        example = f"{raw[outside[0]]:g}" if len(outside) else ""
    histogram = {}
    if source.column.name in LABELS:
        known = data if not len(bad) else np.concatenate([data[ok], data[outside]])
        histogram = binned(known.astype(np.float32).view(np.int32) >> LABEL_SHIFT)
    data[bad] = 0
    return Made(data, ok if len(bad) else None, outside, example, histogram)


def integers(place: Place, source: SourceColumn, key: str, values: Values) -> Made:
    """An integer column of the product; impossible values are null and counted."""
    is_id = is_gaia_id(source.column.name)
    if is_text(values):
        values = parse_integers(place, key, values, is_id, source.column.name)
    raw, null = split(values)
    sentinels = sentinels_of(place.survey, source, raw.dtype)
    ok = np.ones(len(raw), dtype=bool) if null is None else ~null
    for value in sentinels:
        ok &= raw != value
    if raw.dtype.kind == "f":
        ok &= np.isfinite(raw)
        raw = whole_numbers(place, key, np.where(ok, raw, 0))
    elif raw.dtype == np.uint64 and len(raw) and int(raw.max()) >= 1 << 63:
        place.fail(key, int(np.argmax(raw)), f"{raw.max()} is above the largest 64-bit integer")
    data = raw.astype(np.int64)
    if is_id:
        ok &= data > 0
    low, high = source.column.minimum, source.column.maximum
    outside: IntArray = np.empty(0, np.int64)
    if low is not None or high is not None:
        low, high = (-np.inf if low is None else low), (np.inf if high is None else high)
        outside = np.flatnonzero(ok & ((data < low) | (data > high)))
    example = str(data[outside[0]]) if len(outside) else ""
    ok[outside] = False
    if ok.all():
        return Made(data)
    data[~ok] = 0
    return Made(data, ok, outside, example)


def text_column(place: Place, source: SourceColumn, values: Mapping[str, Values]) -> Made:
    """A text column of the product, of one native column or of several joined."""
    if len(values) == 1:
        (native,) = values.values()
        if isinstance(native, pa.DictionaryArray):
            texts = _text_part(place, source, native.dictionary)
            present = texts.is_valid().to_numpy(zero_copy_only=False)
            known = None if present.all() else present[native.indices.to_numpy()]
            return Made(pa.DictionaryArray.from_arrays(native.indices, texts), known)
    parts = [_text_part(place, source, value) for value in values.values()]
    text = parts[0]
    if source.join:
        present = [part.is_valid() for part in parts]
        any_present = present[0]
        for item in present[1:]:
            any_present = pc.or_(any_present, item)
        joined = pc.binary_join_element_wise(
            *parts, ".", null_handling="replace", null_replacement=""
        )
        text = pc.if_else(any_present, joined, None)
    valid = is_valid(text) if text.null_count else None
    return Made(text, valid)


def _text_part(place: Place, source: SourceColumn, values: Values) -> pa.Array:
    if is_text(values):
        words = pa.array(["", *place.survey.missing_text])
        text = pc.ascii_trim_whitespace(values)
        unknown = pc.is_in(text, value_set=words)
        return pc.if_else(unknown, None, text) if pc.any(unknown).as_py() else text
    raw, null = split(values)
    missing = np.isin(raw, sentinels_of(place.survey, source, raw.dtype))
    if raw.dtype.kind == "f":
        missing |= ~np.isfinite(raw)
        is_whole = bool((missing | ((raw == np.rint(raw)) & (np.abs(raw) < 2.0**53))).all())
        raw = np.where(missing, 0, raw).astype(np.int64) if is_whole else raw
    if null is not None:
        missing |= null
    return pa.array(raw, mask=missing).cast(pa.string())

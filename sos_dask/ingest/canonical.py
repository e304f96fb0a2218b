"""Native values -> canonical observations, sorted on the sky, and what a file looks like.

Units are converted, sentinels and impossible values are null and counted, and rows without a usable
key or position are rejected with their reason. Counts of all that, the `Profile`, tell whether a
file can be what its survey says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from sos_dask.columns import BoolArray, IntArray, Values, as_array, is_text, is_valid, split, taken
from sos_dask.errors import SurveyError
from sos_dask.ingest.keys import FILE, REJECTED_SCHEMA, ROW, sort_order, sorted_hashes
from sos_dask.ingest.reader import Source, either, read_native
from sos_dask.ingest.text import Place, parse_numbers, whole_numbers
from sos_dask.schema import LABELS, is_gaia_id
from sos_dask.sky.healpix import ang2pix
from sos_dask.surveys.definition import Cut, SourceColumn, Survey, passing

_REASONS = ("", "null obs_id", "null position", "ra out of range", "dec out of range")
_CHECKED = (*LABELS, "rv")
_LARGE_ID = 1 << 61  # multiples of 128, of which floats here keep those of 512
_SOME_IDS = 20
_LABEL_SHIFT = 19  # keeps sign, exponent and four bits of the fraction of a float32
_LABEL_BINS = 1 << (31 - _LABEL_SHIFT)  # of either sign

Example = tuple[int, int, str]
"""Index of a file, row there, and what stands there."""


class Profile(BaseModel):
    """Counts that tell whether a file is what its survey says; they merge exactly, in any order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_rows: int = 0  # rejected ones among them
    rejected: dict[str, int] = {}  # rows by reason
    first_rejected: Example | None = None
    nulls: dict[str, int] = {}  # of each column of the product
    impossible: dict[str, int] = {}  # values outside the limits of their column (nulls too)
    first_impossible: dict[str, Example] = {}
    lowest: dict[str, float] = {}  # of ra and dec, as the file has them, deg
    highest: dict[str, float] = {}
    # Rows in each sixteenth of an octave of a label, impossible values among them; large ids of
    # which a float keeps every digit (0), and 1 for each batch with others.
    labels: dict[str, dict[int, int]] = {}

    @classmethod
    def merge(cls, profiles: Sequence[Profile]) -> Profile:
        """Profile of all rows together."""
        how: dict[str, Callable[[Any, Any], Any]]
        how = {"first_impossible": min, "lowest": min, "highest": max}
        how |= dict.fromkeys(("rejected", "nulls", "impossible"), add)
        how["labels"] = lambda one, other: _united((one, other), add)
        rejected = (profile.first_rejected for profile in profiles)
        return cls(
            n_rows=sum(profile.n_rows for profile in profiles),
            first_rejected=min(filter(None, rejected), default=None),
            **{of: _united([getattr(p, of) for p in profiles], how[of]) for of in how},
        )

    def median(self, label: str) -> float | None:
        """Median of a label to about 4 %, impossible values among them; None without values."""
        counts = self.labels.get(label, {})
        if not counts:
            return None
        bins = np.array(list(counts), dtype=np.int32)
        centres = ((bins << _LABEL_SHIFT) | (1 << (_LABEL_SHIFT - 1))).view(np.float32)
        order = np.argsort(centres)
        total = np.cumsum(np.array(list(counts.values()))[order])
        return float(centres[order][np.searchsorted(total, (total[-1] + 1) // 2)])


def label_bins(values: NDArray[np.floating]) -> dict[int, int]:
    """Count the values in each sixteenth of an octave."""
    bins = values.astype(np.float32).view(np.int32) >> _LABEL_SHIFT
    counts = np.bincount(bins + _LABEL_BINS)
    return {int(i) - _LABEL_BINS: int(counts[i]) for i in np.flatnonzero(counts)}


def _united(
    mappings: Iterable[Mapping[Any, Any]], how: Callable[[Any, Any], Any]
) -> dict[Any, Any]:
    """One mapping of all keys, sorted, with one value made of those of each."""
    found: dict[Any, Any] = {}
    for key, value in chain.from_iterable(mapping.items() for mapping in mappings):
        found[key] = how(found[key], value) if key in found else value
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Chunk:
    """Rows ``start`` to ``stop`` of a file whose rows are counted; all of another."""

    source: Source
    start: int = 0
    stop: int = 0


def plan_chunks(source: Source, chunk_rows: int = 1_000_000) -> list[Chunk]:
    """Cut a file into chunks of so many rows that can be read independently.

    Parquet is cut between row groups; text and VOTable are one chunk.
    """
    starts, stop, n_all = [0], 0, source.n_rows or 0
    if source.kind == "fits":
        starts = list(range(0, n_all, chunk_rows))
    for n_rows in source.group_rows:
        if n_rows and stop > starts[-1] and stop + n_rows - starts[-1] > chunk_rows:
            starts.append(stop)
        stop += n_rows
    return [Chunk(source, *ends) for ends in zip(starts, [*starts[1:], n_all], strict=True)]


@dataclass(frozen=True)
class Batch:
    """Some rows of a file."""

    # Survey.arrow_schema(), _file (int32) and _row (int64, from 0), by _healpix_29 and obs_id.
    rows: pa.Table
    rejected: pa.Table  # without a usable position or key, in the order of the file
    keys: NDArray[np.uint64]  # `sorted_hashes` of their obs_id
    profile: Profile


def read_chunk(chunk: Chunk, survey: Survey, batch_rows: int = 1_000_000) -> Iterator[Batch]:
    """Read a chunk of a survey file as canonical observations, at most ``batch_rows`` at once.

    Raises `SurveyError`: the file is damaged, or a value is not what its column holds: text for a
    number, an id that lost digits as a float. The message names file, column, row and value.
    """
    for first, native in read_native(chunk.source, chunk.start, chunk.stop, batch_rows):
        yield _canonical(Place(chunk.source, survey, first), native)


def _canonical(place: Place, native: Mapping[str, Values]) -> Batch:
    survey, source = place.survey, place.source
    made = {
        name: _made(place, column, {key: native[key] for key in source.columns[name]})
        for name, column in survey.columns.items()
    }
    ra, dec, ids = (made[name] for name in ("ra", "dec", "obs_id"))
    n_rows = len(ra.data)
    if survey.constant_epoch is not None:
        made["position_epoch"] = _Made(np.full(n_rows, survey.constant_epoch, np.float32))
    quality = np.zeros(n_rows, dtype=np.int64)
    for cut in survey.cuts.values():
        tested = _tested(place, cut, native, made)
        if tested is not None:
            quality |= (~passing(cut, tested, survey)).astype(np.int64) << cut.bit
    made["quality"] = _Made(quality)
    outside = (ra.data < -180.0) | (ra.data > 360.0), np.abs(dec.data) > 90.0
    # Why a row is rejected, as index into _REASONS.
    reasons = np.select([~ids.known, ~(ra.known & dec.known), *outside], [1, 2, 3, 4])
    bad = np.flatnonzero(reasons)
    columns = [
        pa.repeat(Path(source.path).name, len(bad)),
        pa.array(place.first_row + bad),
        pa.array(_REASONS).take(pa.array(reasons[bad])),
        ids.taken(bad).cast(pa.string()),
        ra.taken(bad),
        dec.taken(bad),
    ]
    rejected = pa.Table.from_arrays(columns, schema=REJECTED_SCHEMA)
    first = None
    for row in rejected.slice(0, 1).to_pylist():
        text = f"{row['reason']} (obs_id {row['obs_id']}, ra {row['ra']}, dec {row['dec']})"
        first = (source.index, row["row"], text.replace("None", "null"))
    known = {name: made[name].data[made[name].known] for name in ("dec", "ra")}
    of_rows = Profile(
        n_rows=n_rows,
        rejected=Counter(rejected["reason"].to_pylist()),
        nulls={name: int(np.count_nonzero(~column.known)) for name, column in made.items()},
        lowest={name: float(data.min()) for name, data in known.items() if len(data)},
        highest={name: float(data.max()) for name, data in known.items() if len(data)},
        first_rejected=first,
    )
    profile = Profile.merge([of_rows, *(column.profile for column in made.values())])
    ra.data[ra.data < 0] += 360.0
    ra.data[ra.data >= 360.0] = 0.0  # 360 itself, and what rounds to it
    good: IntArray = np.flatnonzero(reasons == 0)
    cells = ang2pix(ra.data[good], dec.data[good])
    # Keys are hashed as the file has them: often in order, which on the sky they never are.
    good_ids = ids.taken(good)
    order = sort_order(cells, good_ids)
    index = good[order]
    arrays = [
        *(made[name].taken(index) for name in survey.arrow_schema().names[1:]),
        pa.array(np.full(len(index), source.index, dtype=np.int32)),
        pa.array(place.first_row + index),
    ]
    schema = survey.arrow_schema()
    for name, kind in ((FILE, pa.int32()), (ROW, pa.int64())):
        schema = schema.append(pa.field(name, kind, nullable=False))
    rows = pa.Table.from_arrays([pa.array(cells[order]), *arrays], schema=schema)
    return Batch(rows, rejected, sorted_hashes(good_ids), profile)


def _tested(
    place: Place, cut: Cut, native: Mapping[str, Values], made: Mapping[str, _Made]
) -> Values | None:
    """The column that a cut tests, with impossible values as nulls; None where there is none."""
    key = place.source.cuts.get(cut.column)
    if key is None:
        column = made.get(cut.column)
        return None if column is None else column.taken(np.arange(len(column.data)))
    values = native[key]
    if is_text(values) and not any(isinstance(value, str) for value in cut.values):
        values = parse_numbers(place, key, values, pa.int64() if cut.bits_unset else pa.float64())
    *_, name = "", *(name for name, keys in place.source.columns.items() if keys == (key,))
    ratio = place.source.ratios.get(name, 1.0)
    valid = made[name].valid if name else None
    if (valid is None and ratio == 1.0) or cut.bits_unset or is_text(values):
        return values
    numbers, null = split(values)
    valid = made[name].known if null is None else made[name].known & ~null
    return as_array(np.ascontiguousarray(numbers if ratio == 1.0 else numbers * ratio), valid)


# --- one column ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """A column of the product: numbers (0 where null) or text."""

    data: Any
    valid: BoolArray | None = None  # None: all are
    profile: Profile = field(default_factory=Profile)  # of its impossible values, and of a label

    @property
    def known(self) -> BoolArray:
        """Rows with a value."""
        return np.ones(len(self.data), dtype=bool) if self.valid is None else self.valid

    def taken(self, index: IntArray) -> pa.Array:
        """Rows of these numbers, with Arrow nulls."""
        if isinstance(self.data, pa.Array):
            return taken(self.data, index)
        return as_array(self.data[index], None if self.valid is None else self.valid[index])


def _made(place: Place, source: SourceColumn, native: Mapping[str, Values]) -> _Made:
    """Column of the product for all rows, whether usable or not."""
    if source.dtype != "string":
        ((key, values),) = native.items()
        return _numbers(place, source, key, values)
    parts = [_text(place, source, values) for values in native.values()]
    text = parts[0]
    if source.join:
        present = np.any([is_valid(part) for part in parts], axis=0)
        joined = pc.binary_join_element_wise(
            *parts, ".", null_handling="replace", null_replacement=""
        )
        text = pc.if_else(pa.array(present), joined, None)
    return _Made(text, is_valid(text) if text.null_count else None)


def _numbers(place: Place, source: SourceColumn, key: str, values: Values) -> _Made:
    """A column of numbers; impossible values are null and counted."""
    is_whole, is_id = source.dtype == "int64", is_gaia_id(source.name)
    if is_text(values):
        kind = pa.int64() if is_whole else pa.float64()
        values = parse_numbers(place, key, values, kind, source.name)
    raw, missing = _missing(place.survey, source, values)
    if is_whole:
        if raw.dtype.kind == "f":
            raw = whole_numbers(place, key, np.where(missing, 0, raw))
        elif raw.dtype == np.uint64 and len(raw) and int(raw.max()) >= 1 << 63:
            place.fail(key, int(np.argmax(raw)), f"{raw.max()} is above the largest 64-bit integer")
        data: Any = raw.astype(np.int64)
        if is_id:
            missing |= data <= 0
    else:
        with np.errstate(all="ignore"):
            # Adding 0 makes -0.0 the same bytes as 0.0.
            factor = source.factor * place.source.ratios.get(source.name, 1.0)
            scaled = raw if factor == 1.0 else raw * factor
            data = np.add(scaled, 0, dtype=source.dtype, casting="unsafe")
    ok = ~missing if is_whole else ~missing & np.isfinite(data)
    if source.column.minimum is not None:
        ok &= data >= source.column.minimum
    if source.column.maximum is not None:
        ok &= data <= source.column.maximum
    name = source.name
    profile: dict[str, Any] = {
        "labels": {name: label_bins(data[~missing])} if name in _CHECKED else {}
    }
    if is_id and len(large := data[data > _LARGE_ID]):
        is_fine = bool((large & 511).any())
        profile["labels"] = {name: {int(is_fine): 1 if is_fine else len(np.unique(large))}}
    outside = np.flatnonzero(~ok & ~missing)
    if len(outside):
        first = int(outside[0])
        text = str(raw[first]) if is_whole else f"{raw[first]:g}"
        example = (place.source.index, place.first_row + first, text)
        profile |= {"impossible": {name: len(outside)}, "first_impossible": {name: example}}
    if ok.all():
        return _Made(data, profile=Profile(**profile))
    data[~ok] = 0
    return _Made(data, ok, Profile(**profile))


def _missing(
    survey: Survey, source: SourceColumn, values: Values
) -> tuple[NDArray[Any], BoolArray]:
    """Native numbers, and where they are null, not finite or a sentinel in their own type."""
    raw, null = split(values)
    missing = np.zeros(len(raw), dtype=bool) if null is None else null
    if raw.dtype.kind == "f":
        missing |= ~np.isfinite(raw)
    for value in dict.fromkeys((*survey.missing, *source.missing)):
        if raw.dtype.kind == "f":
            missing |= raw == np.float32(value)
            if raw.dtype.itemsize > 4:  # often a widened float32
                missing |= raw == value
        elif value.is_integer():
            missing |= raw == int(value)
    return raw, missing


def _text(place: Place, source: SourceColumn, values: Values) -> pa.Array:
    """Text, or the text of numbers, null where it is empty or means null."""
    if is_text(values):
        words = pa.array(["", *place.survey.missing_text])
        text = pc.ascii_trim_whitespace(values)
        unknown = pc.is_in(text, value_set=words)
        return pc.if_else(unknown, None, text) if pc.any(unknown).as_py() else text
    raw, missing = _missing(place.survey, source, values)
    if raw.dtype.kind == "f":
        is_whole = bool((missing | ((raw == np.rint(raw)) & (np.abs(raw) < 2.0**53))).all())
        raw = np.where(missing, 0, raw).astype(np.int64) if is_whole else raw
    return pa.array(raw, mask=missing).cast(pa.string())


# --- what a file looks like ----------------------------------------------------------------------


def check_profile(profile: Profile, survey: Survey, files: Sequence[str]) -> None:
    """Refuse files, of which this is the profile of all rows, that cannot be what a survey says.

    Raises `SurveyError`: too many rejected rows; right ascension in hours or radians, unless the
    survey allows ``ra_below_24``; ids that lost digits; a label in another unit, as a logarithm or
    without any value.
    """
    n_rejected, n_rows = sum(profile.rejected.values()), profile.n_rows
    is_many = n_rejected > survey.max_rejected_fraction * n_rows
    if is_many and profile.first_rejected and (n_rejected >= 10 or 2 * n_rejected > n_rows):
        file, row, text = profile.first_rejected
        counts = ", ".join(f"{count} {reason}" for reason, count in profile.rejected.items())
        raise SurveyError(
            f"survey {survey.name}: {n_rejected} of {n_rows} rows cannot be used ({counts}); the "
            f"first is {files[file]} row {row}: {text}",
            "Check the columns of the survey; if the file is right, raise max_rejected_fraction "
            f"({survey.max_rejected_fraction:g}).",
        )
    if n_rows >= 50 and len(profile.lowest) == 2 and "ra_below_24" not in survey.allow:
        _check_positions(profile, survey, files)
    for name, number in profile.labels.items():
        if is_gaia_id(name) and number.get(0, 0) >= _SOME_IDS and 1 not in number:
            raise SurveyError(
                f"{', '.join(files)}: all {number[0]} ids of '{name}' above 2**61 are multiples of "
                "512, as of ids that went through a float: digits are lost",
                "Get the file with whole ids, or leave them out: override = {columns = {"
                f"{name} = false}}}}.",
            )
    for label in _CHECKED:
        if label in survey.columns:  # a companion of a survey has none
            _check_label(label, profile, survey, files)


def _check_positions(profile: Profile, survey: Survey, files: Sequence[str]) -> None:
    (dec_low, ra_low), (dec_high, ra_high) = profile.lowest.values(), profile.highest.values()
    ra_span, dec_span = ra_high - ra_low, dec_high - dec_low
    # A wide survey in radians fills this box; few fields in degrees do, from edge to edge.
    in_box = ra_low >= 0 and ra_high <= 6.2832 and max(-dec_low, dec_high) <= 1.5708
    if ra_low >= 0 and ra_high <= 24 and ra_span > 12 and dec_span > 20:
        unit, fix = "hours", 'unit = "hourangle" in [columns.ra]'
    elif in_box and ra_span > 4 and dec_span > 1:
        unit, fix = "radians", 'unit = "rad" in [columns.ra] and [columns.dec]'
    else:
        return
    raise SurveyError(
        f"{files[0]}: column {either(survey.columns['ra'].sources)} ('ra') runs from {ra_low:g} to "
        f"{ra_high:g}: it looks like {unit}, not degrees",
        f'Set {fix}; if they are degrees, allow = ["ra_below_24"] in the survey.',
    )


def _check_label(label: str, profile: Profile, survey: Survey, files: Sequence[str]) -> None:
    where = f"column {either(survey.columns[label].sources)} ('{label}')"
    column = survey.columns[label].column
    median = profile.median(label)
    n_impossible = profile.impossible.get(label, 0)
    n_valid = profile.n_rows - profile.nulls.get(label, 0)
    if label == "teff" and median is not None and 3 <= median <= 5 and n_impossible > n_valid:
        what = f"{files[0]}: {where} looks like log10 of a temperature: its median is {median:.2f}"
        raise SurveyError(what, "Use a file with the temperature in K.")
    if n_impossible > n_valid and n_impossible >= 10:
        file, row, value = profile.first_impossible[label]
        raise SurveyError(
            f"{files[file]}: {where}: {n_impossible} of {n_impossible + n_valid} values are not "
            f"within {column.minimum:g} to {column.maximum:g} {column.unit}, the first is {value} "
            f"in row {row}; the median is about {median:.3g}",
            f"Check its unit and its 'missing' values in [columns.{label}].",
        )
    if n_valid == 0 and profile.n_rows and label in LABELS:  # some releases have empty rv
        hint = f"Map [columns.{label}] to a column that is filled in this release."
        raise SurveyError(f"{', '.join(files)}: {where} has no value in any row", hint)

"""Survey files -> canonical observations; repeats and conflicts of keys; what a file looks like.

Nothing is lost: a value that cannot be is null and counted, and a row without a usable key or
position is in ``rejected`` with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.errors import SurveyError
from sos_dask.healpix import ang2pix
from sos_dask.readers import (
    Source,
    Values,
    is_gaia_id,
    open_source,
    read_native,
    text_line,
)
from sos_dask.schema import HEALPIX_COLUMN, LABELS, SourceColumn, Survey

__all__ = [
    "Batch", "Chunk", "Merged", "Profile", "Quality", "Source", "check_conflicts", "check_profile",
    "conflicting_keys", "losing_rows", "merge_rows", "open_source", "plan_chunks", "read_chunk",
    "rejected_rows",
]  # fmt: skip

Quality = Callable[[Mapping[str, Values], Survey], NDArray[np.int64]]
"""Failed cuts of each row as a bit mask, from the columns that the cuts name."""

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

FILE, ROW = "_file", "_row"
REJECTED_SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "row": pa.int64(),
        "reason": pa.string(),
        "obs_id": pa.string(),
        "ra": pa.float64(),
        "dec": pa.float64(),
    }
)
CONFLICT = "conflicting obs_id"
_REASONS = ("", "null obs_id", "null position", "ra out of range", "dec out of range")
_NULL_NUMBERS = ("", "nan", "NaN", "NAN", "null", "NULL", "None")
_HASH_FACTOR = np.uint64(0xFF51AFD7ED558CCD)  # of MurmurHash3's finaliser
_NO_KEY = 'Map obs_id to another column, or join several: join = ["field", "fibre"].'


@dataclass(frozen=True)
class Chunk:
    """Rows ``start`` to ``stop`` of a file (to its end where ``stop`` is None)."""

    source: Source
    start: int = 0
    stop: int | None = None


def plan_chunks(source: Source, chunk_rows: int = 1_000_000) -> list[Chunk]:
    """Cut a file into chunks that can be read independently.

    Parameters
    ----------
    source : Source
    chunk_rows : int
        Rows of a chunk. Parquet is cut between row groups; text and VOTable are one chunk.
    """
    if source.kind == "fits" and source.n_rows is not None:
        starts = range(0, source.n_rows, chunk_rows)
        return [Chunk(source, i, min(i + chunk_rows, source.n_rows)) for i in starts]
    if source.kind == "parquet":
        chunks, start, stop = [], 0, 0
        for n_rows in source.group_rows:
            if n_rows and stop > start and stop + n_rows - start > chunk_rows:
                chunks.append(Chunk(source, start, stop))
                start = stop
            stop += n_rows
        return [*chunks, Chunk(source, start, stop)]
    return [Chunk(source)]


# --- what a file looks like ------------------------------------------------------------------

Example = tuple[int, int, str]


@dataclass(frozen=True)
class Profile:
    """Counts that tell whether a file is what its survey says; they merge exactly, in any order.

    Parameters
    ----------
    n_rows : int
        Rows read, rejected ones among them.
    rejected : mapping of str to int
        Rows by reason.
    first_rejected : tuple of (file index, row, text), optional
    nulls : mapping of str to int
        Nulls of each column of the product.
    impossible : mapping of str to int
        Values outside the limits of their column (they are nulls too).
    first_impossible : mapping of str to tuple of (file index, row, value)
    bounds : mapping of str to tuple of (smallest, largest)
        Of ``ra`` and ``dec``, as the file has them, deg.
    ra_histogram : mapping of int to int
        Rows in each 15 degrees of right ascension, as the file has it.
    labels : mapping of str to mapping of int to int
        Rows in each sixteenth of an octave of a label, impossible values among them.
    """

    n_rows: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    first_rejected: Example | None = None
    nulls: Mapping[str, int] = field(default_factory=dict)
    impossible: Mapping[str, int] = field(default_factory=dict)
    first_impossible: Mapping[str, Example] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    ra_histogram: Mapping[int, int] = field(default_factory=dict)
    labels: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    @classmethod
    def merge(cls, profiles: Sequence[Profile]) -> Profile:
        """Profile of all rows together."""
        impossible: dict[str, Example] = {}
        bounds: dict[str, tuple[float, float]] = {}
        for profile in profiles:
            for name, example in profile.first_impossible.items():
                impossible[name] = min(example, impossible.get(name, example))
            for name, (low, high) in profile.bounds.items():
                known = bounds.get(name, (low, high))
                bounds[name] = (min(low, known[0]), max(high, known[1]))
        labels = sorted({name for profile in profiles for name in profile.labels})
        rejected = [item.first_rejected for item in profiles if item.first_rejected is not None]
        return cls(
            n_rows=sum(profile.n_rows for profile in profiles),
            rejected=_added([profile.rejected for profile in profiles]),
            first_rejected=min(rejected, default=None),
            nulls=_added([profile.nulls for profile in profiles]),
            impossible=_added([profile.impossible for profile in profiles]),
            first_impossible=dict(sorted(impossible.items())),
            bounds=dict(sorted(bounds.items())),
            ra_histogram=_added([profile.ra_histogram for profile in profiles]),
            labels={name: _added([p.labels.get(name, {}) for p in profiles]) for name in labels},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        plain = {name: dict(value) for name, value in vars(self).items() if hasattr(value, "items")}
        for name in ("bounds", "first_impossible"):
            plain[name] = {key: list(value) for key, value in plain[name].items()}
        plain["ra_histogram"] = _text_keys(self.ra_histogram)
        plain["labels"] = {name: _text_keys(counts) for name, counts in self.labels.items()}
        first = None if self.first_rejected is None else list(self.first_rejected)
        return {"n_rows": self.n_rows, "first_rejected": first, **plain}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Profile:
        """Inverse of `to_dict`."""
        first = raw["first_rejected"]
        examples = {name: (f, r, v) for name, (f, r, v) in raw["first_impossible"].items()}
        return cls(
            n_rows=raw["n_rows"],
            rejected=raw["rejected"],
            first_rejected=None if first is None else (first[0], first[1], first[2]),
            nulls=raw["nulls"],
            impossible=raw["impossible"],
            first_impossible=examples,
            bounds={name: (low, high) for name, (low, high) in raw["bounds"].items()},
            ra_histogram={int(key): count for key, count in raw["ra_histogram"].items()},
            labels={
                name: {int(key): count for key, count in counts.items()}
                for name, counts in raw["labels"].items()
            },
        )

    def impossible_values(self) -> dict[str, int]:
        """Columns that had values outside their limits, with the number of them."""
        return {name: count for name, count in sorted(self.impossible.items()) if count}

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


_LABEL_SHIFT = 19  # keeps sign, exponent and four bits of the fraction of a float32


def _added(counts: Sequence[Mapping[Any, int]]) -> dict[Any, int]:
    total: dict[Any, int] = {}
    for item in counts:
        for key, count in item.items():
            total[key] = total.get(key, 0) + count
    return dict(sorted(total.items()))


def _text_keys(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(key): count for key, count in counts.items()}


def _binned(bins: NDArray[Any]) -> dict[int, int]:
    if not len(bins):
        return {}
    low = int(bins.min())
    counts = np.bincount(bins - low)
    return {low + int(i): int(counts[i]) for i in np.flatnonzero(counts)}


def check_profile(profile: Profile, survey: Survey, files: Sequence[str]) -> None:
    """Refuse files that cannot be what their survey says.

    Parameters
    ----------
    profile : Profile
        Of all rows of the job.
    survey : Survey
    files : sequence of str
        Name of each file, by its index.

    Raises
    ------
    SurveyError
        Too many rejected rows; right ascension in hours; a label in another unit, as a logarithm
        or without any value.
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
    if n_rows >= 50 and "ra" in profile.bounds and "dec" in profile.bounds:
        (ra_low, ra_high), (dec_low, dec_high) = profile.bounds["ra"], profile.bounds["dec"]
        if ra_low >= 0 and ra_high <= 24 and ra_high - ra_low > 12 and dec_high - dec_low > 20:
            raise SurveyError(
                f"{files[0]}: column {_native_names(survey, 'ra')} ('ra') runs from {ra_low:g} to "
                f"{ra_high:g}: it looks like hours, not degrees",
                'Set unit = "hourangle" in [columns.ra].',
            )
    for label in LABELS:
        _check_label(label, profile, survey, files)


def _check_label(label: str, profile: Profile, survey: Survey, files: Sequence[str]) -> None:
    where = f"column {_native_names(survey, label)} ('{label}')"
    column = survey.columns[label].column
    median = profile.median(label)
    n_impossible = profile.impossible.get(label, 0)
    n_valid = profile.n_rows - profile.nulls.get(label, 0)
    if label == "teff" and median is not None and 3 <= median <= 5 and n_impossible > n_valid:
        raise SurveyError(
            f"{files[0]}: {where} looks like log10 of a temperature: its median is {median:.2f}",
            "Use a file with the temperature in K.",
        )
    if n_impossible > n_valid and n_impossible >= 10:
        file, row, value = profile.first_impossible[label]
        raise SurveyError(
            f"{files[file]}: {where}: {n_impossible} of {n_impossible + n_valid} values are not "
            f"within {column.minimum:g} to {column.maximum:g} {column.unit}, the first is {value} "
            f"in row {row}; the median is about {median:.3g}",
            f"Check its unit and its 'missing' values in [columns.{label}].",
        )
    if n_valid == 0 and profile.n_rows:
        raise SurveyError(
            f"{', '.join(files)}: {where} has no value in any row",
            f"Map [columns.{label}] to a column that is filled in this release.",
        )


def _native_names(survey: Survey, name: str) -> str:
    return "'" + "' or '".join(survey.columns[name].sources) + "'"


# --- canonical columns -----------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Some rows of a file.

    Parameters
    ----------
    rows : pyarrow.Table
        ``Survey.arrow_schema()``, then ``_file`` (int32) and ``_row`` (int64, from 0), sorted by
        ``_healpix_29`` and ``obs_id``.
    rejected : pyarrow.Table
        ``REJECTED_SCHEMA``: rows without a usable position or key, in the order of the file.
    profile : Profile
    """

    rows: pa.Table
    rejected: pa.Table
    profile: Profile


@dataclass
class _Made:
    """A column of the product: numbers (0 where null) or text."""

    data: Any
    valid: BoolArray | None = None
    impossible: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    example: str = ""
    histogram: dict[int, int] = field(default_factory=dict)

    @property
    def n_nulls(self) -> int:
        return 0 if self.valid is None else int(len(self.valid) - np.count_nonzero(self.valid))

    def taken(self, index: IntArray) -> pa.Array:
        if isinstance(self.data, pa.Array):
            return self.data.take(pa.array(index))
        mask = None if self.valid is None else ~self.valid[index]
        return pa.array(self.data[index], mask=mask)


def read_chunk(
    chunk: Chunk, survey: Survey, batch_rows: int = 1_000_000, *, quality: Quality
) -> Iterator[Batch]:
    """Read a chunk of a survey file as canonical observations.

    Parameters
    ----------
    chunk : Chunk
    survey : Survey
    batch_rows : int
        Most rows held at once.
    quality : callable
        `clean.quality_mask`.

    Yields
    ------
    Batch

    Raises
    ------
    SurveyError
        The file is damaged, or a value is not what its column holds: text for a number, an id that
        lost digits as a float. The message names file, column, row and value.
    """
    for first, native in read_native(chunk.source, chunk.start, chunk.stop, batch_rows):
        yield _canonical(_Place(chunk.source, survey, first), native, quality)


@dataclass(frozen=True)
class _Place:
    """Where values come from, to say it of a bad one."""

    source: Source
    survey: Survey
    first_row: int

    def fail(self, key: str, index: int, problem: str, hint: str = "") -> NoReturn:
        row = self.first_row + index
        line = text_line(self.source, row)
        where = f"row {row}" + ("" if line is None else f" (line {line})")
        raise SurveyError(f"{self.source.path}: column '{key}', {where}: {problem}", hint)


def _canonical(place: _Place, native: Mapping[str, Values], quality: Quality) -> Batch:
    survey, source = place.survey, place.source
    made = {}
    for name, column in survey.columns.items():
        keys = source.columns[name]
        if column.dtype == "string":
            made[name] = _text(place, column, {key: native[key] for key in keys})
        elif column.dtype == "int64":
            made[name] = _integers(place, column, keys[0], native[keys[0]])
        else:
            made[name] = _floats(place, column, keys[0], native[keys[0]])
    n_rows = len(made["ra"].data)
    if "position_epoch" not in survey.columns and survey.position_epoch is not None:
        made["position_epoch"] = _Made(np.full(n_rows, survey.position_epoch, np.float32))
    for_cuts = _for_cuts(place, native, made)
    made["quality"] = _Made(quality(for_cuts, survey) if for_cuts else np.zeros(n_rows, np.int64))
    reasons = _reasons(made)
    bounds, ra_histogram = _position_profile(made)
    ra = made["ra"].data
    bad = np.flatnonzero(reasons)
    rejected = _rejected(place, made, reasons, bad)
    ra[ra < 0] += 360.0
    ra[ra >= 360.0] = 0.0  # 360 itself, and what rounds to it
    good: IntArray = np.flatnonzero(reasons == 0)
    cells = ang2pix(ra[good], made["dec"].data[good])
    ids = made["obs_id"].data
    order = _sort_order(cells, ids.take(pa.array(good)) if isinstance(ids, pa.Array) else ids[good])
    index = good[order]
    schema = survey.arrow_schema()
    arrays = [
        pa.array(cells[order]) if name == HEALPIX_COLUMN else made[name].taken(index)
        for name in schema.names
    ]
    schema = schema.append(pa.field(FILE, pa.int32(), nullable=False))
    schema = schema.append(pa.field(ROW, pa.int64(), nullable=False))
    arrays.append(pa.array(np.full(len(index), source.index, dtype=np.int32)))
    arrays.append(pa.array(place.first_row + index))
    profile = Profile(
        n_rows=n_rows,
        rejected=_added([{_REASONS[int(code)]: 1} for code in reasons[bad]]),
        first_rejected=_first_rejected(place, rejected),
        nulls={name: column.n_nulls for name, column in sorted(made.items())},
        impossible={n: len(c.impossible) for n, c in sorted(made.items()) if len(c.impossible)},
        first_impossible={
            name: (source.index, place.first_row + int(column.impossible[0]), column.example)
            for name, column in sorted(made.items())
            if len(column.impossible)
        },
        bounds=bounds,
        ra_histogram=ra_histogram,
        labels={name: made[name].histogram for name in LABELS},
    )
    return Batch(pa.Table.from_arrays(arrays, schema=schema), rejected, profile)


def _reasons(made: Mapping[str, _Made]) -> NDArray[np.int8]:
    ra, dec = made["ra"], made["dec"]
    reasons = np.zeros(len(ra.data), dtype=np.int8)
    reasons[(dec.data < -90.0) | (dec.data > 90.0)] = 4
    reasons[(ra.data < -180.0) | (ra.data > 360.0)] = 3
    for column, code in ((ra, 2), (dec, 2), (made["obs_id"], 1)):
        if column.valid is not None:
            reasons[~column.valid] = code
    return reasons


def _position_profile(
    made: Mapping[str, _Made],
) -> tuple[dict[str, tuple[float, float]], dict[int, int]]:
    bounds = {}
    for name in ("dec", "ra"):
        column = made[name]
        data = column.data if column.valid is None else column.data[column.valid]
        if len(data):
            bounds[name] = (float(data.min()), float(data.max()))
        if name == "ra":
            inside = data[(data >= -180.0) & (data <= 360.0)]
            histogram = _binned(np.floor(inside / 15.0).astype(np.int64))
    return bounds, histogram


def _rejected(
    place: _Place, made: Mapping[str, _Made], reasons: NDArray[np.int8], bad: IntArray
) -> pa.Table:
    columns = [
        pa.array([Path(place.source.path).name] * len(bad), pa.string()),
        pa.array(place.first_row + bad),
        pa.array([_REASONS[int(code)] for code in reasons[bad]], pa.string()),
        made["obs_id"].taken(bad).cast(pa.string()),
        made["ra"].taken(bad),
        made["dec"].taken(bad),
    ]
    return pa.Table.from_arrays(columns, schema=REJECTED_SCHEMA)


def _first_rejected(place: _Place, rejected: pa.Table) -> Example | None:
    if not rejected.num_rows:
        return None
    row = rejected.slice(0, 1).to_pylist()[0]
    text = f"{row['reason']} (obs_id {row['obs_id']}, ra {row['ra']}, dec {row['dec']})"
    return place.source.index, row["row"], text.replace("None", "null")


def _for_cuts(
    place: _Place, native: Mapping[str, Values], made: Mapping[str, _Made]
) -> dict[str, Values]:
    """The columns that the cuts name: numbers are numbers, and impossible values are nulls."""
    columns: dict[str, Values] = {}
    made_from = {keys[0]: name for name, keys in place.source.columns.items() if len(keys) == 1}
    everything = np.arange(len(made["ra"].data))
    for name in {cut.column: None for cut in place.survey.cuts}:
        cuts = [cut for cut in place.survey.cuts if cut.column == name]
        key = place.source.cuts.get(name)
        if key is None:
            if name in made:
                columns[name] = made[name].taken(everything)
            continue
        values = native[key]
        of_bits = any(cut.bits_unset for cut in cuts)
        of_text = any(isinstance(value, str) for cut in cuts for value in cut.values)
        if _is_text(values) and not of_text:
            values = (_parse_integers if of_bits else _parse_floats)(place, key, values)
        product = made.get(made_from.get(key, ""))
        if product is not None and product.valid is not None and not of_bits:
            numbers, null = _split(values) if not _is_text(values) else (None, None)
            if numbers is not None:
                unusable = ~product.valid
                values = pa.array(numbers, mask=unusable if null is None else unusable | null)
        columns[name] = values
    return columns


def _is_text(values: Values) -> bool:
    return isinstance(values, pa.Array) and pa.types.is_string(values.type)


def _split(values: Values) -> tuple[NDArray[Any], BoolArray | None]:
    """Numbers, and where they are null."""
    if not isinstance(values, pa.Array):
        return values, None
    if not values.null_count:
        return values.to_numpy(zero_copy_only=False), None
    null = values.is_null().to_numpy(zero_copy_only=False)
    return values.fill_null(0).to_numpy(zero_copy_only=False), null


def _sentinels(survey: Survey, column: SourceColumn, dtype: np.dtype[Any]) -> list[Any]:
    """Numbers that mean null, as the native type writes them."""
    values = dict.fromkeys((*survey.missing, *column.missing))
    if dtype.kind in "iu":
        return [int(value) for value in values if float(value).is_integer()]
    if dtype.itemsize == 4:
        return [np.float32(value) for value in values]
    # A float64 column is often a widened float32.
    return list(dict.fromkeys(v for x in values for v in (float(x), float(np.float32(x)))))


def _floats(place: _Place, source: SourceColumn, key: str, values: Values) -> _Made:
    if _is_text(values):
        values = _parse_floats(place, key, values)
    raw, null = _split(values)
    low, high = source.column.minimum, source.column.maximum
    sentinels = _sentinels(place.survey, source, raw.dtype)
    with np.errstate(all="ignore"):
        scaled = raw if source.factor == 1.0 else raw * source.factor
        # Adding 0 makes -0.0 the same bytes as 0.0.
        data: Any = np.add(scaled, 0, dtype=source.dtype, casting="unsafe")
        ok = np.isfinite(data) if low is None or high is None else data >= low
        if low is not None and high is None:
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
        histogram = _binned(known.astype(np.float32).view(np.int32) >> _LABEL_SHIFT)
    data[bad] = 0
    return _Made(data, ok if len(bad) else None, outside, example, histogram)


def _integers(place: _Place, source: SourceColumn, key: str, values: Values) -> _Made:
    is_id = is_gaia_id(source.column.name)
    if _is_text(values):
        values = _parse_integers(place, key, values, is_id)
    raw, null = _split(values)
    sentinels = _sentinels(place.survey, source, raw.dtype)
    ok = np.ones(len(raw), dtype=bool) if null is None else ~null
    for value in sentinels:
        ok &= raw != value
    if raw.dtype.kind == "f":
        ok &= np.isfinite(raw)
        raw = _whole(place, key, np.where(ok, raw, 0))
    elif raw.dtype == np.uint64 and len(raw) and int(raw.max()) >= 1 << 63:
        place.fail(key, int(np.argmax(raw)), f"{raw.max()} is above the largest 64-bit integer")
    data = raw.astype(np.int64)
    if is_id:
        ok &= data > 0
    low, high = source.column.minimum, source.column.maximum
    inside = np.ones(0, dtype=bool)
    if low is not None or high is not None:
        inside = (data >= (-np.inf if low is None else low)) & (
            data <= (np.inf if high is None else high)
        )
    outside: IntArray = np.flatnonzero(ok & ~inside) if len(inside) else np.empty(0, np.int64)
    example = str(data[outside[0]]) if len(outside) else ""
    ok[outside] = False
    if ok.all():
        return _Made(data)
    data[~ok] = 0
    return _Made(data, ok, outside, example)


def _whole(place: _Place, key: str, numbers: NDArray[Any]) -> IntArray:
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


def _parse_floats(place: _Place, key: str, text: pa.Array) -> pa.Array:
    words = _null_words(place)
    if not any(map(_is_number, words)):
        try:
            return text.cast(pa.float64())
        except pa.ArrowInvalid:
            pass
    text = _without_words(text, words)
    try:
        return text.cast(pa.float64())
    except pa.ArrowInvalid:
        index = _first_failure(text, pa.float64())
        place.fail(key, index, f"'{text[index]}' is not a number", _word_hint(text[index].as_py()))


def _parse_integers(place: _Place, key: str, text: pa.Array, is_id: bool = False) -> pa.Array:
    words = _null_words(place)
    if not any(map(_is_number, words)):
        try:
            return text.cast(pa.int64())
        except pa.ArrowInvalid:
            pass
    text = _without_words(text, words)
    try:
        return text.cast(pa.int64())
    except pa.ArrowInvalid:
        pass
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
    numbers, null = _split(rest.slice(0, stop).cast(pa.float64()))
    present = np.isfinite(numbers) if null is None else np.isfinite(numbers) & ~null
    if is_id and (present & (numbers > 0)).any():
        index = int(np.argmax(present & (numbers > 0)))
        place.fail(
            key,
            index,
            f"the id '{text[index]}' is stored as float: digits are lost",
            "Get the file with integer ids; these cannot be repaired.",
        )
    integers = pa.array(_whole(place, key, np.where(present, numbers, 0)), mask=~present)
    if problem:
        place.fail(key, stop, f"'{text[stop]}' {problem}", _word_hint(text[stop].as_py()))
    return pc.coalesce(whole.cast(pa.int64()), integers)


def _null_words(place: _Place) -> list[str]:
    return list(dict.fromkeys((*_NULL_NUMBERS, *place.survey.missing_text)))


def _is_number(word: str) -> bool:
    try:
        return bool(np.isfinite(float(word)))
    except ValueError:
        return False


def _without_words(text: pa.Array, words: Sequence[str]) -> pa.Array:
    text = pc.ascii_trim_whitespace(text)
    return pc.if_else(pc.is_in(text, value_set=pa.array(words)), None, text)


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
    return f'If it means "no value", add it to the survey: missing_text = ["{word:.40}"].'


def _text(place: _Place, source: SourceColumn, values: Mapping[str, Values]) -> _Made:
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
    valid = text.is_valid().to_numpy(zero_copy_only=False) if text.null_count else None
    return _Made(text, valid)


def _text_part(place: _Place, source: SourceColumn, values: Values) -> pa.Array:
    if _is_text(values):
        words = pa.array(["", *place.survey.missing_text])
        text = pc.ascii_trim_whitespace(values)
        unknown = pc.is_in(text, value_set=words)
        return pc.if_else(unknown, None, text) if pc.any(unknown).as_py() else text
    raw, null = _split(values)
    missing = np.isin(raw, _sentinels(place.survey, source, raw.dtype))
    if raw.dtype.kind == "f":
        missing |= ~np.isfinite(raw)
        is_whole = bool((missing | ((raw == np.rint(raw)) & (np.abs(raw) < 2.0**53))).all())
        raw = np.where(missing, 0, raw).astype(np.int64) if is_whole else raw
    if null is not None:
        missing |= null
    return pa.array(raw, mask=missing).cast(pa.string())


def _sort_order(cells: IntArray, ids: Any) -> IntArray:
    """Order by cell, then by id; rows equal in both keep their order.

    Parameters
    ----------
    cells : ndarray of int64, shape (n,)
    ids : ndarray of int64 or pyarrow.StringArray, shape (n,)
        Text is ordered by its bytes.
    """
    order: IntArray = np.argsort(cells, kind="stable")
    in_order = cells[order]
    same = in_order[1:] == in_order[:-1]
    if not same.any():
        return order
    tied = np.zeros(len(order), dtype=bool)
    tied[1:] |= same
    tied[:-1] |= same
    where = np.flatnonzero(tied)
    rows = order[where]
    codes = _codes(ids.take(pa.array(rows)) if isinstance(ids, pa.Array) else pa.array(ids[rows]))
    cell_number = np.cumsum(~np.concatenate([[False], same])[where])
    low = int(codes.min())
    bits = (int(codes.max()) - low).bit_length()
    if bits + int(cell_number[-1]).bit_length() < 64:
        # Cell and id in one integer, all but sorted already: many times faster than two keys.
        by_id = np.argsort(cell_number << bits | codes - low, kind="stable")
    else:
        by_id = np.lexsort((codes, cell_number))
    order[where] = rows[by_id]
    return order


# --- repeats and conflicts of keys -----------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """One partition.

    Parameters
    ----------
    rows : pyarrow.Table
        Sorted by ``_healpix_29`` and ``obs_id``, each key once, without ``_file`` and ``_row``.
    rejected : pyarrow.Table
        ``REJECTED_SCHEMA``: rows whose key another row with other content has.
    n_duplicates : int
        Rows left out because all their values are those of the row that was kept.
    """

    rows: pa.Table
    rejected: pa.Table
    n_duplicates: int


def merge_rows(tables: Sequence[pa.Table], files: Sequence[str]) -> Merged:
    """Merge sorted slices of `Batch.rows` that lie in one partition.

    Of rows with one ``obs_id`` at one place the one with most values is kept, then with the fewest
    failed cuts, then with the highest ``snr``, then with the smallest content, so that the result
    depends on the rows alone. The others are duplicates (equal content) or rejected.

    Parameters
    ----------
    tables : sequence of pyarrow.Table
        At least one.
    files : sequence of str
        Names for ``rejected``, by file index.
    """
    table = pa.concat_tables(tables).combine_chunks()
    cells = table[HEALPIX_COLUMN].to_numpy()
    ids = _one_array(table["obs_id"])
    numbers = ids if pa.types.is_string(ids.type) else ids.to_numpy()
    order = _sort_order(cells, numbers)
    same = np.zeros(len(order), dtype=bool)  # whether a row has the key of the one before
    in_order = cells[order]
    candidates = np.flatnonzero(in_order[1:] == in_order[:-1]) + 1
    left, right = (ids.take(pa.array(order[candidates - step])) for step in (1, 0))
    same[candidates] = pc.equal(left, right).to_numpy(zero_copy_only=False)
    if not same.any():
        rows = table.take(pa.array(order))
        return Merged(rows.drop_columns([FILE, ROW]), REJECTED_SCHEMA.empty_table(), 0)
    repeated = same.copy()
    repeated[:-1] |= same[1:]
    where = np.flatnonzero(repeated)
    group = np.cumsum(~same[where]) - 1
    repeats = table.take(pa.array(order[where]))
    winner, equal = _settle(repeats, group)
    lost = np.flatnonzero(~winner & ~equal)
    rejected = rejected_rows(repeats.take(pa.array(lost)), CONFLICT, files)
    keep = np.ones(len(order), dtype=bool)
    keep[where] = winner
    rows = table.take(pa.array(order[keep])).drop_columns([FILE, ROW])
    return Merged(rows, rejected, int(np.count_nonzero(~winner & equal)))


def losing_rows(rows: pa.Table) -> pa.Table:
    """Rows that lose where one ``obs_id`` stands at several places, by the rule of `merge_rows`.

    Parameters
    ----------
    rows : pyarrow.Table
        All rows of these keys, as `Batch.rows`, in any order.

    Returns
    -------
    pyarrow.Table
        Rows to take out, in the order of files and rows. Rows equal to the one that is kept are not
        among them: `merge_rows` drops them.
    """
    rows = rows.combine_chunks()
    codes = _codes(_one_array(rows["obs_id"]))
    order = np.argsort(codes, kind="stable")
    group = np.cumsum(np.diff(codes[order], prepend=codes[order][:1]) != 0)
    in_order = rows.take(pa.array(order))
    winner, equal = _settle(in_order, group)
    lost = in_order.filter(pa.array(~winner & ~equal))
    return lost.sort_by([(FILE, "ascending"), (ROW, "ascending")])


def rejected_rows(rows: pa.Table, reason: str, files: Sequence[str]) -> pa.Table:
    """Rows of `Batch.rows` as a table of ``REJECTED_SCHEMA``, in the order of files and rows."""
    rows = rows.sort_by([(FILE, "ascending"), (ROW, "ascending")])
    names = pa.array(list(files), pa.string())
    columns = [
        names.take(_one_array(rows[FILE])),
        rows[ROW],
        pa.array([reason] * rows.num_rows, pa.string()),
        rows["obs_id"].cast(pa.string()),
        rows["ra"],
        rows["dec"],
    ]
    return pa.Table.from_arrays(columns, schema=REJECTED_SCHEMA)


def _settle(rows: pa.Table, group: IntArray) -> tuple[BoolArray, BoolArray]:
    """Of each group the row to keep, and which rows have its content.

    Parameters
    ----------
    rows : pyarrow.Table
    group : ndarray of int64, shape (n,)
        Ascending from 0.
    """
    content, n_valid = [], np.zeros(len(group), dtype=np.int64)
    for name in rows.column_names:
        if name not in (FILE, ROW):
            column = _one_array(rows[name])
            valid = column.is_valid().to_numpy(zero_copy_only=False)
            n_valid += valid
            content += [valid, _codes(column)]
    starts = np.flatnonzero(np.diff(group, prepend=-1))

    def equal_to(leader: IntArray) -> BoolArray:
        equal = np.ones(len(group), dtype=bool)
        for codes in content:
            equal &= codes == codes[leader[group]]
        return equal

    winner = np.zeros(len(group), dtype=bool)
    winner[starts] = True
    equal = equal_to(starts)
    if equal.all():
        return winner, equal
    quality = np.bitwise_count(rows["quality"].to_numpy())
    snr = np.zeros(len(group))
    if "snr" in rows.column_names:
        snr = rows["snr"].cast(pa.float64()).fill_null(-np.inf).to_numpy()
    order = np.lexsort((*reversed(content), -snr, quality, -n_valid, group))
    best = order[starts]
    winner[:] = False
    winner[best] = True
    return winner, equal_to(best)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _codes(column: pa.Array) -> IntArray:
    """Integers ordered as the values are, equal only for equal bytes (nulls are as 0 or '')."""
    if pa.types.is_string(column.type):
        ranks = pc.rank(column.fill_null(""), tiebreaker="dense")
        return np.asarray(ranks.to_numpy().astype(np.int64))
    values, _ = _split(column)
    if values.dtype.kind != "f":
        return values.astype(np.int64)
    bits = values.view(f"i{values.itemsize}")
    flipped = bits ^ ((bits >> (8 * values.itemsize - 1)) & np.iinfo(bits.dtype).max)
    return np.asarray(flipped.astype(np.int64))


def conflicting_keys(
    pieces: Sequence[Path | pa.Table], bucket: int = 0, n_buckets: int = 1
) -> pa.Array:
    """Values of ``obs_id`` that stand at more than one place.

    Parameters
    ----------
    pieces : sequence of Path or pyarrow.Table
        Tables or uncompressed Arrow IPC files (memory-mapped) with ``obs_id`` and ``_healpix_29``.
    bucket, n_buckets : int
        Only keys of one bucket are looked at, so that their 16 bytes a row fit in memory.

    Returns
    -------
    pyarrow.Array
        Sorted.

    Raises
    ------
    SurveyError
        More than 100 rows, and more than 1 % of the bucket's, share their key with a row elsewhere.
    """
    hashes, cells = [], []
    for ids, cell in _keys(pieces):
        hashed = _hashes(ids)
        mine = _in_bucket(hashed, bucket, n_buckets)
        hashes.append(hashed[mine])
        cells.append(cell[mine])
    hashed = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    cell = np.concatenate(cells) if cells else np.empty(0, np.int64)
    order = np.argsort(hashed)
    hashed, cell = hashed[order], cell[order]
    same = hashed[1:] == hashed[:-1]
    conflicts = np.unique(hashed[1:][same & (cell[1:] != cell[:-1])])
    if not len(conflicts):
        kind = next((ids.type for ids, _ in _keys(pieces)), pa.int64())
        return pa.array([], kind)
    first, stop = (np.searchsorted(hashed, conflicts, side) for side in ("left", "right"))
    n_excess = int((stop - first - 1).sum())
    found_ids, found_cells = [], []
    for ids, cell in _keys(pieces):
        mine = np.isin(_hashes(ids), conflicts)
        found_ids.append(ids.filter(pa.array(mine)))
        found_cells.append(pa.array(cell[mine]))
        if n_excess > 100 and len(found_ids[-1]):
            check_conflicts(n_excess, len(hashed), str(found_ids[-1][0]))
    # Two texts may share a hash: the texts themselves decide.
    table = pa.table({"key": pa.chunked_array(found_ids), "cell": pa.chunked_array(found_cells)})
    extent = table.group_by("key").aggregate([("cell", "min"), ("cell", "max")])
    keys = extent.filter(pc.not_equal(extent["cell_min"], extent["cell_max"]))["key"]
    return _one_array(keys.take(pc.sort_indices(keys)))


def check_conflicts(n_conflicts: int, n_rows: int, example: str, column: str = "obs_id") -> None:
    """Raise `SurveyError` when so many rows share their key with another that it is no key.

    Parameters
    ----------
    n_conflicts, n_rows : int
        Rows beyond the first of their key that are not its exact duplicates; all rows.
    example : str
        One such key.
    column : str
        How the column is called.
    """
    if n_conflicts > 100 and n_conflicts > 0.01 * n_rows:
        raise SurveyError(
            f"'{column}' is no key: {n_conflicts} of {n_rows} rows have the key of another row and "
            f"other values, for example {example}",
            _NO_KEY,
        )


def _keys(pieces: Sequence[Path | pa.Table]) -> Iterator[tuple[pa.Array, IntArray]]:
    for piece in pieces:
        if isinstance(piece, pa.Table):
            batches: Any = piece.to_batches()
        else:
            file = pa.ipc.open_file(pa.memory_map(str(piece)))
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        for batch in batches:
            yield batch["obs_id"], batch[HEALPIX_COLUMN].to_numpy()


def _in_bucket(hashes: NDArray[np.uint64], bucket: int, n_buckets: int) -> BoolArray:
    if n_buckets == 1:
        return np.ones(len(hashes), dtype=bool)
    mixed = (hashes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    return np.asarray(mixed % np.uint64(n_buckets) == bucket)


def _hashes(ids: pa.Array) -> NDArray[np.uint64]:
    """Integers themselves; of text a 64-bit hash, eight bytes of all rows at a time."""
    if not pa.types.is_string(ids.type):
        return np.asarray(ids.to_numpy().view(np.uint64))
    n_rows = len(ids)
    _, offsets, data = ids.buffers()
    bounds = np.frombuffer(offsets, np.int32)[ids.offset : ids.offset + n_rows + 1].astype(np.int64)
    low, stop = (int(bounds[0]), int(bounds[-1])) if n_rows else (0, 0)
    padded = np.zeros(stop - low + 8, dtype=np.uint8)
    if stop > low:
        padded[:-8] = np.frombuffer(data, np.uint8)[low:stop]
    words = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))  # one from every byte on
    starts, lengths = bounds[:-1] - low, np.diff(bounds)
    kept = (np.uint64(1) << (np.arange(8, dtype=np.uint64) * np.uint64(8))) - np.uint64(1)
    kept = np.append(kept, np.uint64(2**64 - 1))  # of 0 to 8 bytes
    hashes = lengths.astype(np.uint64)
    for step in range(0, int(lengths.max(initial=0)), 8):
        word = words[np.minimum(starts + step, len(words) - 1)]
        mixed = (hashes ^ (word & kept[np.clip(lengths - step, 0, 8)])) * _HASH_FACTOR
        # Rows that have ended stay as they are: the hash must not know the longest of its batch.
        hashes = np.where(lengths > step, mixed ^ (mixed >> np.uint64(32)), hashes)
    return hashes

"""Chunks of survey files -> canonical observations, sorted on the sky."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask.ingest.arrays import IntArray, Values, as_array, is_text, split
from sos_dask.ingest.keys import sort_order, sorted_hashes
from sos_dask.ingest.merge import FILE, REJECTED_SCHEMA, ROW
from sos_dask.ingest.parse import Place, parse_floats, parse_integers
from sos_dask.ingest.profile import Example, Profile
from sos_dask.ingest.readers import Source, read_native
from sos_dask.ingest.values import Made, floats, integers, text_column
from sos_dask.schema import HEALPIX_COLUMN, LABELS
from sos_dask.sky.healpix import ang2pix
from sos_dask.surveys.definition import Survey

_REASONS = ("", "null obs_id", "null position", "ra out of range", "dec out of range")
Quality = Callable[[Mapping[str, Values], Survey], NDArray[np.int64]]
"""Failed cuts of each row as a bit mask, from the columns that the cuts name."""


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
    keys : ndarray of uint64, shape (n,)
        `sorted_hashes` of ``obs_id`` in ``rows``.
    profile : Profile
    """

    rows: pa.Table
    rejected: pa.Table
    keys: NDArray[np.uint64]
    profile: Profile


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
        yield _canonical(Place(chunk.source, survey, first), native, quality)


def _canonical(place: Place, native: Mapping[str, Values], quality: Quality) -> Batch:
    survey, source = place.survey, place.source
    coded = _coded(source, survey)
    native = {
        key: values.dictionary_decode()
        if isinstance(values, pa.DictionaryArray) and key not in coded
        else values
        for key, values in native.items()
    }
    made = {}
    for name, column in survey.columns.items():
        keys = source.columns[name]
        if column.dtype == "string":
            made[name] = text_column(place, column, {key: native[key] for key in keys})
        elif column.dtype == "int64":
            made[name] = integers(place, column, keys[0], native[keys[0]])
        else:
            made[name] = floats(place, column, keys[0], native[keys[0]])
    n_rows = len(made["ra"].data)
    if "position_epoch" not in survey.columns and survey.position_epoch is not None:
        made["position_epoch"] = Made(np.full(n_rows, survey.position_epoch, np.float32))
    for_cuts = _for_cuts(place, native, made)
    made["quality"] = Made(quality(for_cuts, survey) if for_cuts else np.zeros(n_rows, np.int64))
    reasons = _reasons(made)
    bounds = _bounds(made)
    ra = made["ra"].data
    bad = np.flatnonzero(reasons)
    rejected = _rejected(place, made, reasons, bad)
    ra[ra < 0] += 360.0
    ra[ra >= 360.0] = 0.0  # 360 itself, and what rounds to it
    good: IntArray = np.flatnonzero(reasons == 0)
    cells = ang2pix(ra[good], made["dec"].data[good])
    ids = made["obs_id"].taken(good)
    order = sort_order(cells, ids if pa.types.is_string(ids.type) else ids.to_numpy())
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
    n_by_reason = zip(_REASONS, np.bincount(reasons, minlength=len(_REASONS)), strict=True)
    profile = Profile(
        n_rows=n_rows,
        rejected={reason: int(n) for reason, n in sorted(n_by_reason) if reason and n},
        first_rejected=_first_rejected(place, rejected),
        nulls={name: column.n_nulls for name, column in sorted(made.items())},
        impossible={n: len(c.impossible) for n, c in sorted(made.items()) if len(c.impossible)},
        first_impossible={
            name: (source.index, place.first_row + int(column.impossible[0]), column.example)
            for name, column in sorted(made.items())
            if len(column.impossible)
        },
        bounds=bounds,
        labels={name: made[name].histogram for name in LABELS if name in made},
    )
    # Keys are sorted as the file has them: often in order, which on the sky they never are.
    rows = pa.Table.from_arrays(arrays, schema=schema)
    return Batch(rows, rejected, sorted_hashes(ids), profile)


def _coded(source: Source, survey: Survey) -> set[str]:
    """Native columns that make one text of the product each, and are used for nothing else."""
    used = Counter(key for keys in source.columns.values() for key in keys)
    used.update(source.cuts.values())
    return {
        keys[0]
        for name, keys in source.columns.items()
        if survey.columns[name].dtype == "string" and name != "obs_id" and used[keys[0]] == 1
        if len(keys) == 1 and not any(cut.column == name for cut in survey.cuts.values())
    }


def _reasons(made: Mapping[str, Made]) -> NDArray[np.int8]:
    ra, dec = made["ra"], made["dec"]
    reasons = np.zeros(len(ra.data), dtype=np.int8)
    reasons[(dec.data < -90.0) | (dec.data > 90.0)] = 4
    reasons[(ra.data < -180.0) | (ra.data > 360.0)] = 3
    for column, code in ((ra, 2), (dec, 2), (made["obs_id"], 1)):
        if column.valid is not None:
            reasons[~column.valid] = code
    return reasons


def _bounds(made: Mapping[str, Made]) -> dict[str, tuple[float, float]]:
    bounds = {}
    for name in ("dec", "ra"):
        column = made[name]
        data = column.data if column.valid is None else column.data[column.valid]
        if len(data):
            bounds[name] = (float(data.min()), float(data.max()))
    return bounds


def _rejected(
    place: Place, made: Mapping[str, Made], reasons: NDArray[np.int8], bad: IntArray
) -> pa.Table:
    columns = [
        pa.array([Path(place.source.path).name] * len(bad), pa.string()),
        pa.array(place.first_row + bad),
        pa.array(_REASONS).take(pa.array(reasons[bad])),
        made["obs_id"].taken(bad).cast(pa.string()),
        made["ra"].taken(bad),
        made["dec"].taken(bad),
    ]
    return pa.Table.from_arrays(columns, schema=REJECTED_SCHEMA)


def _first_rejected(place: Place, rejected: pa.Table) -> Example | None:
    if not rejected.num_rows:
        return None
    row = rejected.slice(0, 1).to_pylist()[0]
    text = f"{row['reason']} (obs_id {row['obs_id']}, ra {row['ra']}, dec {row['dec']})"
    return place.source.index, row["row"], text.replace("None", "null")


def _for_cuts(
    place: Place, native: Mapping[str, Values], made: Mapping[str, Made]
) -> dict[str, Values]:
    """The columns that the cuts name: numbers are numbers, and impossible values are nulls."""
    columns: dict[str, Values] = {}
    made_from = {keys[0]: name for name, keys in place.source.columns.items() if len(keys) == 1}
    everything = np.arange(len(made["ra"].data))
    for name in {cut.column: None for cut in place.survey.cuts.values()}:
        cuts = [cut for cut in place.survey.cuts.values() if cut.column == name]
        key = place.source.cuts.get(name)
        if key is None:
            if name in made:
                columns[name] = made[name].taken(everything)
            continue
        values = native[key]
        of_bits = any(cut.bits_unset for cut in cuts)
        of_text = any(isinstance(value, str) for cut in cuts for value in cut.values)
        if is_text(values) and not of_text:
            values = (parse_integers if of_bits else parse_floats)(place, key, values)
        product = made.get(made_from.get(key, ""))
        if product is not None and product.valid is not None and not of_bits:
            numbers, null = split(values) if not is_text(values) else (None, None)
            if numbers is not None:
                usable = product.valid if null is None else product.valid & ~null
                values = as_array(np.ascontiguousarray(numbers), usable)
        columns[name] = values
    return columns

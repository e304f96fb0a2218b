"""Stage ingest: survey files become a HEALPix-partitioned catalog of observations.

Two passes over the rows, each of which is written twice: chunks of the files are read in parallel,
put on canonical columns, sorted on the sky and kept as Arrow pieces; then keys are checked, the
partitions are planned from the counts, and each one merges its slices of the memory-mapped pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import one_array
from sos_dask.errors import CatalogError, ConfigError, SurveyError
from sos_dask.ingest.canonical import Chunk, Profile, check_profile, plan_chunks, read_chunk
from sos_dask.ingest.keys import (
    CONFLICT,
    FILE,
    HISTOGRAM_ORDER,
    REJECTED_SCHEMA,
    ROW,
    check_conflicts,
    conflicting_keys,
    histogram_of,
    holders,
    key_ranges,
    losing_rows,
    merge_rows,
    partition_edges,
    rejected_rows,
    sorted_hashes,
)
from sos_dask.ingest.readers import Source, open_source
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import HEALPIX_COLUMN, MOST_ROWS, check_numbers
from sos_dask.sky.healpix import HealpixPixel, plan_partitions
from sos_dask.stages.needs import require_pixel
from sos_dask.stages.parts import commit_catalog, key_of, records, run_parts, unless_complete
from sos_dask.stages.pieces import copied, read_piece, write_piece
from sos_dask.storage.artifact import REJECTED, Manifest, Output, Recipe, Rows, atomic_path
from sos_dask.storage.catalog import write_parquet, write_partition
from sos_dask.storage.manifest import sha256_of_file
from sos_dask.surveys.definition import Survey

VERSION = 5
_KEYS_PER_RANGE = 10_000_000
# Measured, and a tenth more: a worker's process, and what it holds of a row while it reads a chunk.
_PROCESS_BYTES, _CHUNK_BYTES = 170 << 20, 460


@dataclass(frozen=True)
class IngestSettings:
    """Settings of the stage.

    Parameters
    ----------
    rows_per_partition : int
        Pixels are split until each holds at most so many rows.
    chunk_rows : int
        Rows that are read and sorted at once; decides memory, never the result.
    """

    rows_per_partition: int = 1_000_000
    chunk_rows: int = 500_000

    def __post_init__(self) -> None:
        check_numbers(self, rows_per_partition=(1, MOST_ROWS), chunk_rows=(1, MOST_ROWS))


@dataclass(frozen=True)
class _ChunkPart:
    output: Output
    survey: Survey
    chunk: Chunk
    settings: IngestSettings
    key: str


@dataclass(frozen=True)
class _KeyPart:
    output: Output
    pieces: tuple[str, ...]
    key: str
    first: int
    last: int


@dataclass(frozen=True)
class _PixelPart:
    output: Output
    survey: Survey
    pieces: tuple[str, ...]
    files: tuple[str, ...]
    pixel: HealpixPixel
    edges: str
    number: int


def ingest_recipe(
    survey: Survey, files: Sequence[str], settings: IngestSettings, name: str
) -> Recipe:
    """Recipe of `ingest` for files of these SHA-256 sums, in any order."""
    params = {
        "survey": survey.as_json,
        "rows_per_partition": settings.rows_per_partition,
        "name": name,
    }
    return Recipe("ingest", VERSION, params, {f"file-{i}": s for i, s in enumerate(sorted(files))})


def ingest(
    survey: Survey,
    files: Sequence[Path],
    directory: Path,
    settings: IngestSettings | None = None,
    *,
    name: str = "",
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
    digests: Sequence[str] | None = None,
) -> Manifest:
    """Make a catalog of observations from a survey's files.

    Parameters
    ----------
    survey : Survey
    files : sequence of Path
        FITS, FITS.gz, CSV, CSV.gz, Parquet or VOTable; together they are the survey.
    directory : Path
        Where the catalog goes. ``rejected.parquet`` holds rejected rows with file, row and reason.
    settings : IngestSettings, optional
    name : str
        Name of the catalog; default ``<survey>.observations``.
    digests : sequence of str, optional
        SHA-256 of the files, where the caller knows them.

    Returns
    -------
    Manifest
        ``rows``: rows of the files in, observations out, rejected, exact duplicates dropped.

    Raises
    ------
    SurveyError
        A file is missing, truncated, of the wrong kind, lacks a column, or holds values that cannot
        be what the survey says they are.
    """
    settings = settings or IngestSettings()
    if not files:
        raise ConfigError(f"no file given for survey {survey.name}")
    if settings.rows_per_partition < 1 or settings.chunk_rows < 1:
        raise ConfigError("rows_per_partition and chunk_rows must be positive")
    for file in files:
        if not file.is_file():
            raise SurveyError(
                f"{file} does not exist" if not file.exists() else f"{file} is no file"
            )
    name = name or f"{survey.name}.observations"
    # The order in which files are given must not matter: neither to the recipe nor to the rows.
    by_content = sorted(
        zip(digests or [sha256_of_file(file) for file in files], files, strict=True),
        key=lambda item: (item[0], str(item[1])),
    )
    if len({digest for digest, _ in by_content}) < len(by_content):
        raise ConfigError(
            f"the same content is given twice for survey {survey.name}: "
            + ", ".join(str(file) for _, file in by_content)
        )
    recipe = ingest_recipe(survey, [digest for digest, _ in by_content], settings, name)
    output = Output.prepare(directory, recipe, overwrite)
    if output.complete:
        return output.load_manifest()
    with unless_complete(output):
        _run(
            output, survey, [f for _, f in by_content], settings, name, cluster or Cluster(), report
        )
    return output.load_manifest()


def _run(
    output: Output,
    survey: Survey,
    files: Sequence[Path],
    settings: IngestSettings,
    name: str,
    cluster: Cluster,
    report: Report,
) -> None:
    n_bytes = _PROCESS_BYTES + _CHUNK_BYTES * settings.chunk_rows
    cluster.require_memory(n_bytes, f"ingest: a chunk of {settings.chunk_rows:,} rows of {name}")
    sources = [
        open_source(file, survey, index, output.work / "scratch")
        for index, file in enumerate(files)
    ]
    # The cut into chunks is no part of the recipe: what another one has left is not taken for ours.
    cut = settings.chunk_rows
    chunks = {
        f"{cut}-{source.index:04d}-{number:06d}": chunk
        for source in sources
        for number, chunk in enumerate(plan_chunks(source, settings.chunk_rows))
    }
    chunk_parts = {
        key: _ChunkPart(output, survey, chunk, settings, key) for key, chunk in chunks.items()
    }
    run_parts(output, "read", chunk_parts, _read_part, cluster, f"read {name}", report)
    read = records(output, "read", list(chunks))
    profile = Profile.merge([Profile(**record["profile"]) for record in read])
    _check_rows(sources, profile.n_rows)
    check_profile(profile, survey, [str(file) for file in files])
    pieces = tuple(piece for record in read for piece in record["pieces"])
    histogram = np.zeros(12 * 4**HISTOGRAM_ORDER, dtype=np.int64)
    for cells, n_rows in _histograms(output, read):
        histogram[cells] += n_rows
    pixels = plan_partitions(histogram, HISTOGRAM_ORDER, settings.rows_per_partition)
    if pixels:
        n_bytes = sum((output.work / piece).stat().st_size for piece in pieces)
        require_pixel(cluster, "ingest", name, pixels, histogram, n_bytes)
    edges = f"edges-{cut}.npy"
    _save(output.work / edges, partition_edges(pixels, _histograms(output, read)))
    runs = _runs(output, pieces)
    ranges = key_ranges(runs, int(histogram.sum()) // _KEYS_PER_RANGE + 1)
    key_parts = {
        f"{cut}-{number}": _KeyPart(output, pieces, f"{cut}-{number}", first, last)
        for number, (first, last) in enumerate(ranges)
    }
    run_parts(output, "keys", key_parts, _keys_part, cluster, f"check keys of {name}", report)
    names = tuple(file.name for file in files)  # bytes must not depend on where the files lie
    _settle_conflicts(output, pieces, names, list(key_parts))
    pixel_parts = {
        key_of(pixel): _PixelPart(output, survey, pieces, names, pixel, edges, number)
        for number, pixel in enumerate(pixels)
    }
    run_parts(output, "partitions", pixel_parts, _merge_part, cluster, f"write {name}", report)
    done = records(output, "partitions", list(pixel_parts))
    rejected = _read_rejected(output, [*chunks, "conflicts", *pixel_parts])
    n_rows = sum(record["rows"] for record in read)
    conflicts = rejected.filter(pc.equal(rejected["reason"], CONFLICT))["obs_id"]
    if len(conflicts):
        check_conflicts(len(conflicts), n_rows, conflicts[0].as_py(), f"survey {survey.name}")
    extra = []
    if rejected.num_rows:
        extra.append(output.write_file(REJECTED, partial(write_parquet, rejected)))
    properties = {"sos_survey": survey.name}
    commit_catalog(
        output,
        name,
        list(zip(pixels, done, strict=True)),
        survey.arrow_schema(),
        Rows(
            n_rows,
            sum(record["file"]["rows"] for record in done if record["file"]),
            rejected.num_rows,
            {"exact duplicates": sum(record["n_duplicates"] for record in done)},
        ),
        {
            "survey": survey.name,
            "expected_error": dict(survey.expected_error),
            "rejected": _count_reasons(rejected),
            **_cut_off(sources),
            **_summary_of(profile, survey, done),
        },
        extra,
        properties,
    )


def _check_rows(sources: Sequence[Source], n_rows: int) -> None:
    """Raise `CatalogError` unless the first pass has read all rows of the files."""
    stated = [source.n_rows for source in sources]
    total = sum(number for number in stated if number is not None)
    if None not in stated and total != n_rows:
        raise CatalogError(
            f"{total} rows of {', '.join(str(source.path) for source in sources)}, of which "
            f"{n_rows} were read",
            "Remove the folder that was to be made and run the same command again.",
        )


def _cut_off(sources: Sequence[Source]) -> dict[str, Any]:
    """Files that their service has cut off at its limit of rows."""
    names = sorted(Path(source.path).name for source in sources if source.overflow)
    return {"overflow": names} if names else {}


def _summary_of(
    profile: Profile, survey: Survey, done: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    failed = {
        cut.name: sum(record["failed"].get(str(cut.bit), 0) for record in done)
        for cut in survey.cuts.values()
    }
    return {
        "fail_cut": failed,
        "pass_all_cuts": sum(record["n_good"] for record in done),
        "impossible_values": profile.impossible,
    }


def _count_reasons(rejected: pa.Table) -> dict[str, int]:
    counts = rejected["reason"].value_counts()
    return {item["values"].as_py(): item["counts"].as_py() for item in counts}


def _read_part(part: _ChunkPart) -> None:
    """First pass: one chunk of a file becomes sorted pieces."""
    work = part.output.work
    profiles, pieces, rejected, n_cells, n_rows = [], [], [], [], 0
    counts = [np.empty((2, 0), dtype=np.int32)]
    batches = read_chunk(part.chunk, part.survey, part.settings.chunk_rows)
    for number, batch in enumerate(batches):
        n_rows += batch.rows.num_rows + batch.rejected.num_rows
        profiles.append(batch.profile)
        if batch.rejected.num_rows:
            rejected.append(batch.rejected)
        if batch.rows.num_rows:
            piece = f"pieces/{part.key}-{number:06d}.arrow"
            write_piece(work / piece, batch.rows)
            _save(_hashes_file(work / piece), batch.keys)
            pieces.append(piece)
            counts.append(histogram_of(batch.rows[HEALPIX_COLUMN].to_numpy()))
            n_cells.append(counts[-1].shape[1])
    if rejected:
        write_piece(_rejected_file(part.output, part.key), pa.concat_tables(rejected))
    histogram = f"pieces/{part.key}.npy"
    _save(work / histogram, np.concatenate(counts, axis=1))
    part.output.put_record(
        "read",
        part.key,
        {
            "rows": n_rows,
            "pieces": pieces,
            "histogram": histogram,
            "cells": n_cells,
            "profile": Profile.merge(profiles).model_dump(mode="json"),
        },
    )


def _save(path: Path, values: NDArray[Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)


def _hashes_file(piece: Path) -> Path:
    return piece.with_suffix(".keys.npy")


def _runs(output: Output, pieces: Sequence[str]) -> list[Path]:
    return [_hashes_file(output.work / piece) for piece in pieces]


def _histograms(output: Output, read: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[np.int32]]:
    """`histogram_of` one piece after the other."""
    for record in read:
        counts = np.load(output.work / record["histogram"])
        for stop, n_cells in zip(np.cumsum(record["cells"]), record["cells"], strict=True):
            yield counts[:, stop - n_cells : stop]


def _rejected_file(output: Output, key: str) -> Path:
    return output.work / "rejected" / f"{key}.arrow"


def _read_rejected(output: Output, keys: Sequence[str]) -> pa.Table:
    files = [_rejected_file(output, key) for key in keys]
    tables = [read_piece(file) for file in files if file.is_file()]
    if not tables:
        return REJECTED_SCHEMA.empty_table()
    return pa.concat_tables(tables).sort_by([("file", "ascending"), ("row", "ascending")])


def _keys_part(part: _KeyPart) -> None:
    """Keys of one range that stand at more than one position."""
    paths = [part.output.work / piece for piece in part.pieces]
    keys = conflicting_keys(paths, _runs(part.output, part.pieces), part.first, part.last)
    write_piece(_keys_file(part.output, part.key), pa.table({"obs_id": keys}))
    part.output.put_record("keys", part.key, {"n_conflicts": len(keys)})


def _keys_file(output: Output, key: str) -> Path:
    return output.work / "conflicts" / f"{key}.arrow"


def _losers_file(output: Output) -> Path:
    return output.work / "conflicts" / "losers.arrow"


def _settle_conflicts(
    output: Output,
    pieces: Sequence[str],
    names: Sequence[str],
    keys_parts: Sequence[str],
) -> None:
    """Decide which rows lose where one key stands at several positions (rare: done at once)."""
    if output.intact("conflicts", "losers"):
        return
    keys = pa.concat_tables([read_piece(_keys_file(output, key)) for key in keys_parts])["obs_id"]
    losers = pa.table({FILE: pa.array([], pa.int32()), ROW: pa.array([], pa.int64())})
    if len(keys):
        held = holders(_runs(output, pieces), sorted_hashes(one_array(keys)))
        rows = pa.concat_tables(
            [
                piece.filter(pc.is_in(piece["obs_id"], value_set=keys))
                for piece in (read_piece(output.work / pieces[number]) for number in held)
            ]
        )
        lost = losing_rows(rows)
        losers = lost.select([FILE, ROW])
        write_piece(_rejected_file(output, "conflicts"), rejected_rows(lost, CONFLICT, names))
    write_piece(_losers_file(output), losers)
    output.put_record("conflicts", "losers", {})


def _merge_part(part: _PixelPart) -> None:
    """Second pass: one partition from its slices of the pieces."""
    edges = np.load(part.output.work / part.edges, mmap_mode="r")
    slices = [
        copied(read_piece(part.output.work / name).slice(first, stop - first))
        for name, first, stop in zip(
            part.pieces, *edges[part.number : part.number + 2], strict=True
        )
        if first < stop
    ]
    losers = read_piece(_losers_file(part.output))
    if losers.num_rows:
        slices = [_without(rows, losers) for rows in slices]
    merged = merge_rows(slices, part.files)
    if merged.rejected.num_rows:
        write_piece(_rejected_file(part.output, key_of(part.pixel)), merged.rejected)
    table = merged.rows
    record = write_partition(part.output, part.pixel, table) if table.num_rows else None
    quality = table["quality"].to_numpy()
    part.output.put_record(
        "partitions",
        key_of(part.pixel),
        {
            "file": None if record is None else asdict(record),
            "n_duplicates": merged.n_duplicates,
            "n_good": int(np.count_nonzero(quality == 0)),
            "failed": {
                str(cut.bit): int(np.count_nonzero(quality & (1 << cut.bit)))
                for cut in part.survey.cuts.values()
            },
        },
    )


def _without(rows: pa.Table, losers: pa.Table) -> pa.Table:
    lost, numbers = np.sort(_row_numbers(losers)), _row_numbers(rows)
    place = np.minimum(np.searchsorted(lost, numbers), len(lost) - 1)
    return rows.filter(pa.array(lost[place] != numbers))


def _row_numbers(rows: pa.Table) -> NDArray[np.int64]:
    """File and row there as one number: files have less than 10**12 rows."""
    return np.asarray(rows[FILE].to_numpy().astype(np.int64) << 40 | rows[ROW].to_numpy())

"""Stage ingest: survey files become a HEALPix-partitioned catalog of observations.

Two passes over the rows, each of which is written twice: chunks of the files are read in parallel,
put on canonical columns, sorted on the sky and kept as Arrow pieces; then keys are checked, the
partitions are planned from the counts, and each one merges its slices of the memory-mapped pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from sos_dask.columns import one_array
from sos_dask.errors import CatalogError, ConfigError, SurveyError
from sos_dask.ingest import keys
from sos_dask.ingest.canonical import Chunk, Profile, check_profile, plan_chunks, read_chunk
from sos_dask.ingest.reader import Source, open_source
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import HEALPIX_COLUMN, MOST_ROWS
from sos_dask.settings import RowsPerPartition, Settings
from sos_dask.sky.healpix import HealpixPixel, plan_partitions
from sos_dask.stages.base import Made, Role, Run, Stage, by_pixel, partition_record
from sos_dask.storage.artifact import REJECTED, Output, atomic_path
from sos_dask.storage.manifest import Manifest, Recipe, Rows, sha256_of, sha256_of_file
from sos_dask.storage.objects import as_path, local
from sos_dask.surveys.definition import Survey

_KEYS_PER_RANGE = 10_000_000
# Measured, and a tenth more: a worker's process, and what it holds of a row while it reads a chunk.
_PROCESS_BYTES, _CHUNK_BYTES = 230 << 20, 460


class IngestSettings(Settings):
    """Sizes of partitions and chunks."""

    rows_per_partition: RowsPerPartition = 1_000_000
    chunk_rows: int = Field(
        500_000,
        ge=1,
        le=MOST_ROWS,
        exclude=True,
        description="rows that are read and sorted at once; decides memory, never the result",
    )


class SurveySettings(IngestSettings):
    """Sizes, and what decides the rows: the survey's definition and the name of the catalog."""

    survey: Survey
    name: str


class Ingest(Stage[SurveySettings]):
    """Make a catalog of observations from a survey's files.

    The files are FITS, FITS.gz, CSV, CSV.gz, Parquet or VOTable; together they are the survey.
    ``rejected.parquet`` contains rejected rows with file, row and reason.
    """

    name = "ingest"
    version = 6
    Settings = SurveySettings
    roles = (Role("file", "Files of the survey.", kind="output", many=True),)
    memory = (220, 5.0)
    reusable = ("partitions",)
    pieces: tuple[str, ...] = ()

    def __init__(self, inputs: Mapping[str, Any], settings: SurveySettings, **options: Any) -> None:
        survey = settings.survey.name
        files = {name: as_path(file) for name, file in inputs.items()}
        if not files:
            raise ConfigError(f"no file given for survey {survey}")
        for file in files.values():
            if not file.is_file():
                why = "is not a file" if file.exists() else "does not exist"
                raise SurveyError(f"{file} {why}")
        known = options.get("known") or {n: sha256_of_file(file) for n, file in files.items()}
        # The order in which files are given must not matter: neither to the recipe nor to the rows.
        in_order = sorted(files.items(), key=lambda item: (known[item[0]], str(item[1])))
        if len(set(known.values())) < len(files):
            twice = ", ".join(str(file) for _, file in in_order)
            raise ConfigError(f"the same content is given twice for survey {survey}: {twice}")
        super().__init__(dict(in_order), settings, product=settings.name, known=known)
        # Bytes must not depend on where the files lie.
        self.file_names = [file.name for _, file in in_order]

    @classmethod
    def recipe(cls, settings: SurveySettings, fingerprints: Mapping[str, str]) -> Recipe:
        """Recipe for files of these SHA-256 sums, in any order."""
        numbered = {f"file-{i}": one for i, one in enumerate(sorted(fingerprints.values()))}
        return super().recipe(settings, numbered)

    def make(self, run: Run) -> Made:
        """Read the files, settle conflicts of keys, write the partitions."""
        survey, chunk_rows = self.settings.survey, self.settings.chunk_rows
        what = f"ingest: a chunk of {chunk_rows:,} rows of {self.product}"
        run.cluster.require_memory(_PROCESS_BYTES + _CHUNK_BYTES * chunk_rows, what)
        paths, scratch = [self.path(name) for name in self.inputs], run.output.work / "scratch"
        sources = [open_source(path, survey, i, scratch) for i, path in enumerate(paths)]
        # The cut into chunks is no part of the recipe: what another left is not taken for ours.
        chunks = {
            f"{chunk_rows}-{source.index:04d}-{number:06d}": chunk
            for source in sources
            for number, chunk in enumerate(plan_chunks(source, chunk_rows))
        }
        read = run.parts("read", chunks, self.pieces_of_chunk, f"read {self.product}")
        profile = Profile.merge([Profile(**record["profile"]) for record in read])
        _check_rows(sources, profile.n_rows)
        check_profile(profile, survey, [str(path) for path in paths])
        self.pieces = tuple(piece for record in read for piece in record["pieces"])
        pixels, done = self._partitions(run)
        rejected = _rejected(run.output, [*chunks, "lost", *by_pixel(pixels)])
        n_rows = sum(record["rows"] for record in read)
        conflicts = rejected.filter(pc.equal(rejected["reason"], keys.CONFLICT))["obs_id"]
        if len(conflicts):
            where = f"survey {survey.name}"
            keys.check_conflicts(len(conflicts), n_rows, conflicts[0].as_py(), where)
        schema, properties = survey.arrow_schema(), {"sos_survey": survey.name}
        n_out = run.write_catalog(self.product, pixels, done, schema, properties)
        if rejected.num_rows:
            run.write(REJECTED, rejected)
        duplicates = {"exact duplicates": sum(record["n_duplicates"] for record in done)}
        reasons = rejected["reason"].value_counts()
        overflow = sorted(Path(source.path).name for source in sources if source.overflow)
        summary = {
            "survey": survey.name,
            "expected_error": dict(survey.expected_error),
            "rejected": dict(zip(*map(pa.Array.to_pylist, reasons.flatten()), strict=True)),
            **({"overflow": overflow} if overflow else {}),
            "fail_cut": {
                cut.name: sum(record["failed"].get(str(cut.bit), 0) for record in done)
                for cut in survey.cuts.values()
            },
            "pass_all_cuts": sum(record["n_good"] for record in done),
            "impossible_values": profile.impossible,
        }
        return Rows(n_rows, n_out, rejected.num_rows, duplicates), summary

    def _partitions(self, run: Run) -> tuple[list[HealpixPixel], list[dict[str, Any]]]:
        """Second pass: the partitions, and their records."""
        output, cut = run.output, self.settings.chunk_rows
        cells = self._arrays(output, "cells")
        histogram = np.zeros(12 * 4**keys.HISTOGRAM_ORDER, dtype=np.int64)
        for at, n_rows in map(_load, cells):
            histogram[at] += n_rows
        pixels = plan_partitions(histogram, keys.HISTOGRAM_ORDER, self.settings.rows_per_partition)
        n_bytes = sum(output.piece(one).stat().st_size for one in self.pieces)
        self.require_pixel(run.cluster, pixels, histogram, n_bytes)
        _save(output.work / f"edges-{cut}.npy", keys.partition_edges(pixels, map(_load, cells)))
        n_ranges = int(histogram.sum()) // _KEYS_PER_RANGE + 1
        hashes = keys.key_ranges(self._arrays(output, "keys"), n_ranges)
        ranges = {f"{cut}-{number}": of for number, of in enumerate(hashes)}
        run.parts("keys", ranges, self.conflicts_of_range, f"check keys of {self.product}")
        run.parts("conflicts", {"losers": list(ranges)}, self.settle_conflicts, "conflicts of keys")
        numbered = dict(zip(by_pixel(pixels), enumerate(pixels), strict=True))
        step = f"write {self.product}"
        parts = numbered, self.merged_partition, step, self.content_of_partition
        return pixels, run.parts("partitions", *parts)

    def pieces_of_chunk(self, output: Output, key: str, chunk: Chunk) -> dict[str, Any]:
        """First pass: one chunk of a file becomes sorted pieces."""
        survey, chunk_rows = self.settings.survey, self.settings.chunk_rows
        profiles, pieces, rejected, n_rows = [], [], [keys.REJECTED_SCHEMA.empty_table()], 0
        for number, batch in enumerate(read_chunk(chunk, survey, chunk_rows)):
            n_rows += batch.rows.num_rows + batch.rejected.num_rows
            profiles.append(batch.profile)
            rejected.append(batch.rejected)
            if batch.rows.num_rows:
                pieces.append(f"{key}-{number:06d}")
                path = output.piece(pieces[-1])
                output.write_piece(pieces[-1], batch.rows)
                cells = keys.histogram_of(batch.rows[HEALPIX_COLUMN].to_numpy())
                _save(path.with_suffix(".keys.npy"), batch.keys)
                _save(path.with_suffix(".cells.npy"), cells)
        _reject(output, key, pa.concat_tables(rejected))
        return {
            "rows": n_rows,
            "pieces": pieces,
            "profile": Profile.merge(profiles).model_dump(mode="json"),
        }

    def conflicts_of_range(
        self, output: Output, key: str, hashes: tuple[int, int]
    ) -> dict[str, Any]:
        """Keep the keys of one range that stand at more than one position."""
        paths = [output.piece(one) for one in self.pieces]
        twice = keys.conflicting_keys(paths, self._arrays(output, "keys"), *hashes)
        output.write_piece(f"conflicts-{key}", pa.table({"obs_id": twice}))
        return {}

    def _arrays(self, output: Output, kind: str) -> list[Path]:
        """Hashes of the ``keys``, or `keys.histogram_of` the ``cells``, in each piece."""
        return [output.work / "pieces" / f"{one}.{kind}.npy" for one in self.pieces]

    def settle_conflicts(self, output: Output, key: str, ranges: list[str]) -> dict[str, Any]:
        """Decide which rows lose where one key stands at several positions (rare: done at once)."""
        tables = [output.read_piece(f"conflicts-{one}") for one in ranges]
        twice = pa.concat_tables(tables)["obs_id"]
        losers = pa.table({keys.FILE: pa.array([], pa.int32()), keys.ROW: pa.array([], pa.int64())})
        if len(twice):
            held = keys.holders(self._arrays(output, "keys"), keys.sorted_hashes(one_array(twice)))
            found = [output.read_piece(self.pieces[one]) for one in held]
            rows = [one.filter(pc.is_in(one["obs_id"], value_set=twice)) for one in found]
            lost = keys.losing_rows(pa.concat_tables(rows))
            losers = lost.select([keys.FILE, keys.ROW])
            _reject(output, "lost", keys.rejected_rows(lost, self.file_names))
        output.write_piece(key, losers)
        return {}

    def merged_partition(
        self, output: Output, key: str, numbered: tuple[int, HealpixPixel]
    ) -> dict[str, Any]:
        """Second pass: one partition from its slices of the pieces."""
        pixel, slices = numbered[1], self._slices(output, numbered[0])
        content = self._digest(slices)
        merged = keys.merge_rows(slices, self.file_names)
        _reject(output, key, merged.rejected)
        quality = merged.rows["quality"].to_numpy()
        return {
            "file": partition_record(output, pixel, merged.rows),
            "content": content,
            "n_duplicates": merged.n_duplicates,
            "n_good": int(np.count_nonzero(quality == 0)),
            "failed": {
                str(cut.bit): int(np.count_nonzero(quality & (1 << cut.bit)))
                for cut in self.settings.survey.cuts.values()
            },
        }

    def content_of_partition(
        self, output: Output, key: str, numbered: tuple[int, HealpixPixel]
    ) -> dict[str, Any]:
        """Digest the rows of one partition."""
        return {"content": self._digest(self._slices(output, numbered[0]))}

    def _slices(self, output: Output, number: int) -> list[pa.Table]:
        """Slices of the pieces that lie in a partition, without rows that lose their key."""
        edges = np.load(local(output.work / f"edges-{self.settings.chunk_rows}.npy"), mmap_mode="r")
        bounds = zip(self.pieces, *edges[number : number + 2], strict=True)
        slices = [
            _copied(output.read_piece(one).slice(first, stop - first))
            for one, first, stop in bounds
            if first < stop
        ]
        losers = output.read_piece("losers")
        if losers.num_rows:
            slices = [keys.without_rows(rows, losers) for rows in slices]
        return slices

    def _digest(self, slices: Sequence[pa.Table]) -> str:
        """Digest rows with the names of their files, in whatever order these were given."""
        found = []
        for rows in slices:
            digest = hashlib.sha256()
            if rows.num_rows:  # all of one file
                digest.update(self.file_names[rows[keys.FILE][0].as_py()].encode())
            for column in rows.drop_columns([keys.FILE]).itercolumns():
                array = one_array(column)
                digest.update(f"{len(array)} {array.offset}".encode())
                for buffer in array.buffers():  # in a fifth of the time of its IPC message
                    digest.update(b"-" if buffer is None else buffer)
            found.append(digest.hexdigest())
        return sha256_of(sorted(found))


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


def _save(path: Path, values: NDArray[Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)


def _load(path: Path) -> NDArray[Any]:
    found: NDArray[Any] = np.load(local(path))
    return found


def _reject(output: Output, key: str, rows: pa.Table) -> None:
    """Keep the rejected rows of a part, if there are any."""
    if rows.num_rows:
        output.write_piece(f"rejected-{key}", rows)


def _rejected(output: Output, parts: Sequence[str]) -> pa.Table:
    """Rejected rows of all parts, in the order of files and rows."""
    names = [f"rejected-{part}" for part in parts]
    tables = [output.read_piece(name) for name in names if output.piece(name).is_file()]
    rejected = pa.concat_tables([keys.REJECTED_SCHEMA.empty_table(), *tables])
    return rejected.sort_by([("file", "ascending"), ("row", "ascending")])


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
) -> Manifest:
    """Make a catalog of observations from a survey's files: see `Ingest`.

    The name of the catalog is by default ``<survey>.observations``. ``rows`` of the manifest are
    rows of the files in, observations out, rejected, exact duplicates dropped.

    Raises `SurveyError`: a file is missing, truncated, of the wrong kind, lacks a column, or
    contains values that cannot be what the survey says they are.
    """
    sizes = dict(settings or IngestSettings())
    name = name or f"{survey.name}.observations"
    inputs = {f"file.{number}": file for number, file in enumerate(files)}
    stage = Ingest(inputs, SurveySettings(survey=survey, name=name, **sizes))
    return stage.run(directory, overwrite=overwrite, cluster=cluster, report=report)


def _copied(rows: pa.Table) -> pa.Table:
    """Rows of a memory-mapped piece in memory of their own, so that the piece is let go.

    Of a mapped file far more than the rows themselves counts as memory of the process: up to 2 MB
    around each place that is looked at, in every column of every piece.
    """
    return pa.concat_tables([rows, rows.slice(0, 0)]).combine_chunks()

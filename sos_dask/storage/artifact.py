"""Directories that are either complete or resumable: atomic files, Parquet files, records.

An output directory is complete when ``manifest.json`` exists; it is written last. Until then the
hidden ``.work`` folder holds one small record for every finished part, so that a killed run goes on
at the first missing part, and any number of processes may work on one output: parts are
deterministic and replaced atomically, and whoever finishes last writes the manifest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.errors import CatalogError, ConfigError, PartitionError, StorageError
from sos_dask.schema import HEALPIX_COLUMN, LABELS, described
from sos_dask.storage.manifest import (
    MANIFEST,
    WORK,
    FileRecord,
    Manifest,
    Recipe,
    Rows,
    files_below,
    footer_bytes,
    read_sealed,
    sealed_json,
    sha256_of,
    sha256_of_file,
    stored_at,
    sum_of_file,
)
from sos_dask.storage.objects import ObjectPath, as_path, lately, local, remove_tree, temporary_file

logger = logging.getLogger(__name__)
Stamp: TypeAlias = tuple[Path, int, int]
"""A file with its time and size."""
REJECTED = "rejected.parquet"
_ROW_GROUP_ROWS = 1 << 15
_WITH_BOUNDS = (HEALPIX_COLUMN, "ra", "dec", "pmra", "pmdec", "position_epoch", *LABELS)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write into a `StorageError` that names the path."""
    try:
        yield
    except OSError as error:
        number = error.errno
        text = str(error).lower()
        # Arrow keeps the number in the text; numpy says "1100 requested and 1008 written".
        if number is None and ("errno 28" in text or "requested and" in text):
            number = errno.ENOSPC
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "Free some space and run the same command again: it goes on where it stopped."
            raise StorageError(f"the disk is full: cannot write {path}", hint) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise StorageError(f"cannot write {path}: {os.strerror(number)}") from error
        raise


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a hidden temporary beside ``path``, put in its place by one rename after fsync.

    Nothing appears under the final name where the disk is full or the folder cannot be written.
    """
    with _new_file(path) as temporary:
        yield temporary
        _put_in_place(temporary, path)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Give a hidden temporary, of an object in the scratch folder of this machine."""
    if isinstance(path, ObjectPath):
        with temporary_file(path.name) as hidden, storage_errors(hidden):
            yield hidden
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    if isinstance(path, ObjectPath):
        _written.__dict__[str(path)] = path.put(temporary)
        return
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _written.__dict__[str(path.absolute())] = None


# Paths that a thread has put in place: those of a part become known to its record. Of objects also
# what `sum_of_file` gives.
_written = threading.local()


def put_copy(source: Path, path: Path) -> None:
    """Put the content of a file at another place atomically: a link to it where that can be."""
    with atomic_path(path) as temporary:
        try:
            temporary.hardlink_to(local(source))
        except OSError:
            shutil.copyfile(local(source), temporary)


def write_new(path: Path, text: str) -> bool:
    """Write a small text file where there is none; whether that was so."""
    if isinstance(path, ObjectPath):
        return bool(path.put(text.encode(), "create"))
    with storage_errors(path), contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        return True
    return False


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    if isinstance(path, ObjectPath):
        path.put(text.encode())
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


# -- Parquet files --------------------------------------------------------------------------------


_ALL_DIFFERENT = ("obs_id", "star_id", "sources")


def parquet_settings(schema: pa.Schema) -> dict[str, Any]:
    """Choose the arguments of `pyarrow.parquet.write_table` that suit catalogs.

    Measured on LAMOST rows: integers as differences, floats with the bytes of equal significance
    side by side, and LZ4 take 0.7 times the CPU time of plain values under zstd to write, 0.6 times
    to read, and as many bytes. Dictionaries of numbers cost several times the time and more bytes;
    those of keys, which are all different, a third more of the time and more bytes.
    Bounds of row groups of all columns would take a tenth of the time to write; checksums of pages,
    by which damage is seen where it is read, take a tenth, too.
    """
    numbers = [item for item in schema if pa.types.is_integer(item.type)]
    encodings = {item.name: "DELTA_BINARY_PACKED" for item in numbers}
    numbers = [item for item in schema if pa.types.is_floating(item.type)]
    encodings |= {item.name: "BYTE_STREAM_SPLIT" for item in numbers}
    return {
        "row_group_size": _ROW_GROUP_ROWS,
        "write_batch_size": _ROW_GROUP_ROWS,  # the same bytes in less time than in small steps
        "compression": "lz4",
        "write_page_checksum": True,
        "use_dictionary": [
            x.name for x in schema if pa.types.is_string(x.type) and x.name not in _ALL_DIFFERENT
        ],
        "column_encoding": encodings,
        "write_statistics": [name for name in _WITH_BOUNDS if name in schema.names],
    }


def write_parquet(table: pa.Table, path: Path) -> int:
    """Write a table the way all partitions are written; returns its rows."""
    table = table.replace_schema_metadata(described(table.schema).metadata)
    pq.write_table(table, path, **parquet_settings(table.schema))
    return int(table.num_rows)


@contextlib.contextmanager
def partition_errors(path: Path) -> Iterator[None]:
    """Turn a failed read of a Parquet file into a `PartitionError` that names it."""
    try:
        yield
    except FileNotFoundError:
        hint = "Remove its catalog and make it again."
        raise PartitionError(f"partition {path} is missing", hint) from None
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        hint = "The file is damaged: remove its catalog and make it again."
        raise PartitionError(f"partition {path} cannot be read: {error}", hint) from error


@contextlib.contextmanager
def open_parquet(
    path: Path,
    footer: pq.FileMetaData | None = None,
    coded: Sequence[str] = (),
    must_have: Sequence[str] = (),
) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file whose pages are compared with their checksums.

    Raises `PartitionError` where it is missing, damaged, or lacks a column that it ``must_have``.
    Columns of text named in ``coded`` are read as codes and their dictionary.
    """
    # Without a buffer for all columns together: measured, it costs a quarter of the time.
    with (
        partition_errors(path),
        pa.OSFile(str(local(lately(path)))) as source,
        pq.ParquetFile(
            source,
            metadata=footer or footer_of(stamp_of(path)),
            pre_buffer=False,
            read_dictionary=coded,
            page_checksum_verification=True,
        ) as file,
    ):
        for name in must_have:
            if name not in file.schema_arrow.names:
                raise PartitionError(f"partition {path} has no column '{name}'")
        yield file


def taken(file: pq.ParquetFile, rows: NDArray[np.int64], columns: Sequence[str]) -> list[pa.Table]:
    """Read some rows of a file, ascending, each once; row groups without any are not read."""
    tables, first = [], 0
    if len(rows) == file.metadata.num_rows:  # at once in a seventh less time
        return [file.read(list(columns), use_threads=False)]
    for number in range(file.metadata.num_row_groups):
        n_rows = file.metadata.row_group(number).num_rows
        low, high = np.searchsorted(rows, (first, first + n_rows))
        if low < high:
            table = file.read_row_group(number, list(columns), use_threads=False)
            if high - low < n_rows:
                table = table.take(pa.array(rows[low:high] - first))
            tables.append(table)
        first += n_rows
    return tables


def stamp_of(path: Path) -> Stamp:
    """Take the stamp of a file, by which what was read of it is kept."""
    with partition_errors(path):
        found = lately(path).stat()
    return path, found.st_mtime_ns, found.st_size


@lru_cache(maxsize=16)
def footer_of(stamp: Stamp, sha256: str = "") -> pq.FileMetaData:
    """Read the footer of a file, which must have the SHA-256 that is given; the last few are kept.

    Tasks read their partitions in several steps.
    """
    with partition_errors(stamp[0]):
        content = footer_bytes(lately(stamp[0]))
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise OSError("its footer is not the one that was written")
        return pq.read_metadata(pa.BufferReader(content))


def row_group_bounds(footer: pq.FileMetaData, column: str) -> list[tuple[Any, Any]]:
    """Read minimum and maximum of a column in each row group; (None, None) where all is null.

    Raises `PartitionError` where there are values and no statistics.
    """
    if column not in footer.schema.names:
        raise PartitionError(f"a partition has no column '{column}'")
    index, out = footer.schema.names.index(column), []
    for group in map(footer.row_group, range(footer.num_row_groups)):
        found = group.column(index).statistics
        if found is not None and (found.has_min_max or found.null_count == group.num_rows):
            out.append((found.min, found.max) if found.has_min_max else (None, None))
        elif column == HEALPIX_COLUMN:
            out.append((0, (12 << 58) - 1))  # unknown: anywhere
        else:
            raise PartitionError(f"a partition has no statistics of column '{column}'")
    return out


# -- outputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """A directory that a stage writes into; picklable, so that tasks can take it along.

    ``inputs`` are the directories that it is made from, each with its state at the start.
    """

    directory: Path
    recipe: Recipe
    inputs: tuple[tuple[Path, str], ...] = ()

    @classmethod
    def prepare(
        cls, directory: Path, recipe: Recipe, overwrite: bool = False, inputs: Iterable[Path] = ()
    ) -> Output:
        """Claim a directory for a recipe; a partly finished run of the same recipe goes on.

        Raises `CatalogError` where it contains something else and ``overwrite`` is false, and
        `ConfigError` where it is an input of what is to replace it.
        """
        states = []
        for path in inputs:
            if (path / MANIFEST).is_file():
                Manifest.checked(path)
            states.append((path.absolute(), _state_of(path)))
        output = cls(directory, recipe, tuple(states))
        if not output.complete:
            if any(files_below(directory)):
                output._replace_others(overwrite)
            write_text(output.work / "fingerprint", recipe.fingerprint)
        return output

    def _replace_others(self, overwrite: bool) -> None:
        """Remove what another recipe has left here, where that is allowed."""
        where, claimed = self.directory, self.work / "fingerprint"
        other = claimed.read_text(errors="replace") if claimed.is_file() else ""
        if other == self.fingerprint:
            return
        elsewhere = "Choose another directory."
        if not overwrite:
            what = "another run's output" if other else "other files or another output"
            hint = "Choose another directory, or give --overwrite to replace it."
            raise CatalogError(f"{where} already holds {what}", hint)
        if not other and not (where / MANIFEST).is_file():
            what = f"{where} holds files that are not an output of sos-dask: not overwritten"
            raise CatalogError(what, f"Remove them yourself. {elsewhere}")
        there = None if other else Manifest.load(where)
        names = {there.fingerprint, *(file.sha256 for file in there.files)} if there else set()
        if not names.isdisjoint(self.recipe.inputs.values()):
            what = f"{where} is to be replaced, but the new output is made from it"
            raise ConfigError(what, elsewhere)
        remove_tree(where, first=MANIFEST)

    def release(self) -> None:
        """Let go of a directory in which nothing was made, so that any recipe can claim it."""
        if list(files_below(self.directory)) == [self.work / "fingerprint"]:
            remove_tree(self.directory)

    def discard(self) -> None:
        """Remove all that was made of an output that will never be complete."""
        remove_tree(self.directory, ignore_errors=True)

    @property
    def work(self) -> Path:
        """Hidden folder of intermediate files; gone when the output is complete."""
        return self.directory / WORK

    @property
    def claimed(self) -> bool:
        """Whether the directory is seen as it was claimed, from here."""
        try:
            return (self.work / "fingerprint").read_text() == self.recipe.fingerprint
        except OSError:
            return False

    @property
    def complete(self) -> bool:
        """Whether the manifest of this very recipe exists."""
        path = self.directory / MANIFEST
        return path.is_file() and Manifest.load(self.directory).fingerprint == self.fingerprint

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the recipe."""
        return self.recipe.fingerprint

    def write_file(self, name: str, write: Callable[[Path], int]) -> FileRecord:
        """Write one file atomically; ``write`` gets a temporary path and returns the rows."""
        with _new_file(self.directory / name) as temporary:
            rows = write(temporary)
            size, digest, footer = temporary.stat().st_size, sha256_of_file(temporary), ""
            if name.endswith(".parquet"):
                footer = hashlib.sha256(footer_bytes(temporary)).hexdigest()
            record = FileRecord(name, rows, size, digest, footer)
            _put_in_place(temporary, stored_at(self.directory, self.recipe, record))
            return record

    def write_bytes(self, name: str, content: bytes) -> FileRecord:
        """Write one file of no rows atomically."""

        def write(path: Path) -> int:
            path.write_bytes(content)
            return 0

        return self.write_file(name, write)

    def piece(self, name: str) -> Path:
        """Path of an intermediate table."""
        return self.work / "pieces" / f"{name}.arrow"

    def write_piece(self, name: str, table: pa.Table) -> None:
        """Keep an intermediate table as an Arrow file, written atomically."""
        with (
            atomic_path(self.piece(name)) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)

    def read_piece(self, name: str) -> pa.Table:
        """Read an intermediate table, memory-mapped."""
        return pa.ipc.open_file(pa.memory_map(str(local(self.piece(name))))).read_all()

    def put_record(
        self, kind: str, key: str, value: Mapping[str, Any], reads: Mapping[str, Any] | None = None
    ) -> None:
        """Record that a part is finished: from now on it is skipped by a rerun.

        The files that this thread has put in place since its last record are recorded with their
        sums, so that a rerun makes damaged parts again; ``reads``: what was read, where it counts.
        """
        root = str(self.directory.absolute()) + os.sep
        written = [one for one in _written.__dict__.items() if one[0].startswith(root)]
        if not (self.directory / MANIFEST).is_file():  # else another process has completed it
            sums = {p.removeprefix(root): known or sum_of_file(as_path(p)) for p, known in written}
            document = {"part": f"{kind}/{key}", "value": value, "pieces": sums, "reads": reads}
            write_text(self.work / kind / f"{key}.json", sealed_json(document))
        _written.__dict__.clear()

    def get_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """Record of a finished part; None where it is not finished, or its record is damaged."""
        return self._record(kind, key).get("value")

    def _record(self, kind: str, key: str) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, CatalogError):
            found = read_sealed(self.work / kind / f"{key}.json", "")
            return found if found.get("part") == f"{kind}/{key}" else {}
        return {}

    def intact(self, kind: str, key: str) -> bool:
        """Whether a part is finished and the files that it has written are as they were."""
        found = self._record(kind, key)
        pieces = found.get("pieces", {}).items()
        return bool(found) and all(sum_of_file(self.directory / name) == n for name, n in pieces)

    def commit(
        self, rows: Rows, files: tuple[FileRecord, ...], summary: Mapping[str, Any] | None = None
    ) -> Manifest:
        """Write the manifest and remove the intermediate files.

        Raises `CatalogError` where the account of rows does not close, or an input was changed
        meanwhile: what was made of it is removed.
        """
        rows.check(f"stage {self.recipe.stage}")
        for path, state in self.inputs:
            if _state_of(path) != state:
                self.discard()
                what = f"{path} was changed while {self.directory} was made from it"
                raise CatalogError(what, "Run the same command again.")
        manifest = Manifest(self.recipe, rows, files, summary or {})
        text = sealed_json(manifest.document)
        if not isinstance(self.directory, ObjectPath):
            write_text(self.directory / MANIFEST, text)
        elif not (self.directory / MANIFEST).put(text.encode(), "create"):
            manifest = self._first_manifest(manifest)
        self.tidy()
        return manifest

    def _first_manifest(self, mine: Manifest) -> Manifest:
        """Manifest of the process that was first; only outputs that vary may be others."""
        first = Manifest.load(self.directory)
        if first.document != mine.document:
            what = f"{self.directory} was completed by another run with other content"
            names = {stored_at(self.directory, self.recipe, file) for file in mine.files}
            if names & {stored_at(self.directory, self.recipe, file) for file in first.files}:
                hint = "Compare versions and machines of the two, remove it and run again."
                raise CatalogError(what, hint)
            logger.warning("%s: that one is used", what)
        return first

    def tidy(self) -> None:
        """Remove what a complete output no longer needs: also what a slower process left behind."""
        if self.complete:
            remove_tree(self.work, ignore_errors=True)
            if isinstance(self.directory, ObjectPath):
                made = Manifest.load(self.directory)
                names = {stored_at(self.directory, made.recipe, file) for file in made.files}
                for path in self.directory.rglob("*"):  # what others put under their SHA-256
                    if path not in names and path.name != MANIFEST:
                        path.unlink()
            for leftover in self.directory.rglob(".*.tmp"):  # of killed processes
                leftover.unlink(missing_ok=True)


def _state_of(path: Path) -> str:
    """Digest of a manifest; without one, of size and time of a file, or of all files below."""
    if (path / MANIFEST).is_file():
        return sha256_of_file(path / MANIFEST)
    stats = {file: file.stat() for file in ([path] if path.is_file() else files_below(path))}
    times = {str(f.relative_to(path)): [s.st_size, s.st_mtime_ns] for f, s in stats.items()}
    return sha256_of(times)

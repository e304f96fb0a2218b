"""Columns added to a Parquet file without decoding and encoding again those that it has.

Column chunks may lie anywhere in a file; the footer says where. So the file is copied, the chunks
of the new columns are written behind those of the old ones, and both footers become one. What is
copied stays at its place: nothing that the footer says of it changes. A footer is a Thrift
structure in the compact protocol (Apache Parquet, ``parquet.thrift``; Apache Thrift,
``thrift-compact-protocol.md``); all of it but the row groups and their lists of columns is passed
on as it is.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sos_dask.errors import PartitionError
from sos_dask.schema import described
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.storage.artifact import FileRecord, Output
from sos_dask.storage.catalog import Catalog, parquet_settings, partition_errors
from sos_dask.storage.hats import partition_path

_MAGIC = b"PAR1"
_PIECE_BYTES = 1 << 18
# Kinds of values in the compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
# Fields of FileMetaData, of RowGroup, of ColumnChunk, and those of ColumnMetaData that are places.
_NUM_ROWS, _ROW_GROUPS = 3, 4
_COLUMNS, _BYTES, _ROWS, _COMPRESSED = 1, 2, 3, 6
_META_DATA = 3
_PAGES = (9, 10, 11)

# A structure: kind and bytes of each value, by the number of its field.
Structure = dict[int, tuple[int, bytes]]


def can_extend(catalog: Catalog, pixel: HealpixPixel, schema: pa.Schema) -> bool:
    """Whether the columns of a partition are the first of a schema, represented in the same way.

    Raises
    ------
    PartitionError
        The file is missing or damaged.
    """
    if not catalog.as_written:
        return False
    path = catalog.partition_file(pixel)
    with partition_errors(path):
        have = pq.read_metadata(path).schema
    wanted = pq.read_metadata(pa.BufferReader(_empty(schema))).schema
    return len(have) < len(wanted) and all(
        have.column(index).equals(wanted.column(index)) for index in range(len(have))
    )


def extend_partition(
    output: Output, catalog: Catalog, pixel: HealpixPixel, table: pa.Table, schema: pa.Schema
) -> FileRecord:
    """Write a partition of a catalog with more columns, atomically.

    Parameters
    ----------
    output : Output
    catalog : Catalog
    pixel : HealpixPixel
        Of a partition that `can_extend` says yes to.
    table, schema
        See `append_columns`.

    Raises
    ------
    PartitionError
        The file of the partition is not the one that the manifest of its catalog names: what is
        copied is never decoded, so that nothing else would show it.
    """
    name = partition_path(pixel)
    source = catalog.partition_file(pixel)

    def write(path: Path) -> tuple[int, str]:
        before, after = append_columns(source, table, schema, path)
        stated = catalog.stated.get(name)
        if stated is not None and stated.sha256 != before:
            raise PartitionError(
                f"partition {source} is not the file that was written: it has another SHA-256",
                "The file is damaged: remove its catalog and make it again.",
            )
        return int(table.num_rows), after

    return output.write_hashed(name, write)


def append_columns(source: Path, table: pa.Table, schema: pa.Schema, path: Path) -> tuple[str, str]:
    """Write a Parquet file with the columns of another, as they are, and new ones after them.

    Parameters
    ----------
    source : Path
        Its row groups are kept.
    table : pyarrow.Table
        The new columns, as many rows as the file has.
    schema : pyarrow.Schema
        Of the result: the columns of the file, then those of the table.
    path : Path

    Returns
    -------
    before, after : str
        SHA-256 of the source and of the file; they share the work over what they share.
    """
    with source.open("rb", buffering=0) as file, path.open("wb") as target:
        start, content = _footer(file)
        sink = _Sink(target)
        _copy(file, sink, start)
        whole = sink.sha256.copy()
        file.seek(start)
        whole.update(file.read())
        old = _row_groups(content)
        settings = parquet_settings(table.schema)
        del settings["row_group_size"]  # that of the file counts
        with pq.ParquetWriter(pa.PythonFile(sink, "w"), table.schema, **settings) as writer:
            first = 0
            for group in old:
                n_rows = _number(group[_ROWS])
                writer.write_table(table.slice(first, n_rows), row_group_size=max(n_rows, 1))
                first += n_rows
            sink.kept = io.BytesIO()
        _, content = _footer(sink.kept)
        sink.kept = None
        new = _row_groups(content)
        groups = [_merged(one, other, start) for one, other in zip(old, new, strict=True)]
        footer, _ = _structure(_footer(io.BytesIO(_empty(schema)))[1], 0)
        footer[_NUM_ROWS] = _of_number(table.num_rows)
        footer[_ROW_GROUPS] = _LIST, _of_list(groups)
        content = _bytes(footer)
        sink.write(content + len(content).to_bytes(4, "little") + _MAGIC)
    return whole.hexdigest(), sink.sha256.hexdigest()


class _Sink:
    """What is written to a file, and its SHA-256; or what is kept instead."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.kept: io.BytesIO | None = None

    def write(self, content: bytes | memoryview) -> None:
        if self.kept is not None:
            self.kept.write(content)
            return
        self.sha256.update(content)
        self.file.write(content)

    def flush(self) -> None:
        """The file is flushed when it is closed."""


def _copy(file: io.FileIO, sink: _Sink, n_bytes: int) -> None:
    """The first bytes of a file, piece by piece: each is hashed while the cache holds it."""
    file.seek(0)
    piece = memoryview(bytearray(_PIECE_BYTES))
    while n_bytes:
        n = file.readinto(piece[:n_bytes])
        if not n:
            raise EOFError(f"{file.name} has become shorter")
        sink.write(piece[:n])
        n_bytes -= n


def _empty(schema: pa.Schema) -> bytes:
    """A Parquet file of no rows."""
    file = io.BytesIO()
    pq.write_metadata(described(schema), file)
    return file.getvalue()


def _footer(file: Any) -> tuple[int, bytes]:
    """Where the footer of a Parquet file starts, and its bytes."""
    end = file.seek(-8, io.SEEK_END)
    start = end - int.from_bytes(file.read(4), "little")
    file.seek(start)
    return start, file.read(end - start)


def _row_groups(footer: bytes) -> list[Structure]:
    """Row groups of a footer; what stands behind them is not looked at."""
    at = field = 0
    while True:
        kind = footer[at] & 15
        field, at = _field(footer, at, field)
        if field == _ROW_GROUPS:
            return _structures(footer, at)
        at = _skip(footer, at, kind)


def _merged(old: Structure, new: Structure, shift: int) -> Structure:
    """The row group with the columns of both, those of the new one so far behind."""
    n, chunks = _list(old[_COLUMNS][1])
    others = [_moved(chunk, shift) for chunk in _structures(new[_COLUMNS][1])]
    sums = {
        field: _of_number(_number(old[field]) + _number(new[field]))
        for field in (_BYTES, _COMPRESSED)
        if field in old  # not every writer states both
    }
    return {**old, **sums, _COLUMNS: (_LIST, _of_list(others, n, chunks))}


def _moved(chunk: Structure, shift: int) -> Structure:
    """A column chunk whose pages lie so far behind."""
    about, _ = _structure(chunk[_META_DATA][1], 0)
    for field in _PAGES:
        if field in about:
            about[field] = _of_number(_number(about[field]) + shift)
    return {**chunk, _META_DATA: (_STRUCT, _bytes(about))}


def _structures(content: bytes, at: int = 0) -> list[Structure]:
    """Elements of the list of structures at a place."""
    n, _, at = _list_start(content, at)
    found = []
    for _ in range(n):
        element, at = _structure(content, at)
        found.append(element)
    return found


def _structure(content: bytes, at: int) -> tuple[Structure, int]:
    """The structure at a place, and the place after it."""
    found: Structure = {}
    field = 0
    while head := content[at]:
        field, first = _field(content, at, field)
        at = first if head & 15 <= _FALSE else _skip(content, first, head & 15)
        found[field] = head & 15, content[first:at]
    return found, at + 1


def _field(content: bytes, at: int, before: int) -> tuple[int, int]:
    """Number of the field whose head is at a place, after another one; the place of its value."""
    if step := content[at] >> 4:
        return before + step, at + 1
    number, at = _varint(content, at + 1)
    return _signed(number), at


def _skip(content: bytes, at: int, kind: int) -> int:
    """The place after a value.

    Nine of ten values are numbers or short texts inside a structure: they are skipped without a
    call.
    """
    if kind == _STRUCT:
        while head := content[at]:
            at += 1
            if head < 16:  # the number of the field follows
                at = _skip(content, at, _I16)
            kind = head & 15
            if kind in (_I16, _I32, _I64):
                while content[at] & 128:
                    at += 1
                at += 1
            elif kind == _BINARY and content[at] < 128:
                at += content[at] + 1
            elif kind > _FALSE:  # else the kind is the value
                at = _skip(content, at, kind)
        return at + 1
    if kind in (_I16, _I32, _I64):
        while content[at] & 128:
            at += 1
        return at + 1
    if kind == _BINARY:
        n, at = _varint(content, at)
        return at + n
    if kind in (_LIST, _SET):
        n, kind, at = _list_start(content, at)
        for _ in range(n):
            at = _skip(content, at, kind)
        return at
    if kind == _DOUBLE:
        return at + 8
    if kind in (_TRUE, _FALSE, _BYTE):
        return at + 1
    raise ValueError(f"a Parquet footer has no values of kind {kind}")


def _list_start(content: bytes, at: int) -> tuple[int, int, int]:
    """Length of a list, the kind of its elements, the place of the first."""
    n, kind = content[at] >> 4, content[at] & 15
    if n < 15:
        return n, kind, at + 1
    n, at = _varint(content, at + 1)
    return n, kind, at


def _list(content: bytes) -> tuple[int, bytes]:
    """Length of a list, and its elements."""
    n, _, at = _list_start(content, 0)
    return n, content[at:]


def _of_list(structures: Sequence[Structure], n_before: int = 0, before: bytes = b"") -> bytes:
    """A list of structures, after some whose bytes are known."""
    n = n_before + len(structures)
    head = bytes([n << 4 | _STRUCT]) if n < 15 else bytes([15 << 4 | _STRUCT]) + _of_varint(n)
    return head + before + b"".join(map(_bytes, structures))


def _bytes(structure: Structure) -> bytes:
    out = bytearray()
    before = 0
    for field, (kind, value) in sorted(structure.items()):
        assert 0 < field - before < 16  # as all of Parquet's are
        out += bytes([field - before << 4 | kind]) + value
        before = field
    return bytes(out) + b"\0"


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := content[at]) & 128:
        value |= (byte & 127) << shift
        shift += 7
        at += 1
    return value | byte << shift, at + 1


def _of_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _signed(value: int) -> int:
    return value >> 1 ^ -(value & 1)


def _number(value: tuple[int, bytes]) -> int:
    return _signed(_varint(value[1], 0)[0])


def _of_number(value: int) -> tuple[int, bytes]:
    """A number of 64 bits that is not negative."""
    return _I64, _of_varint(value << 1)

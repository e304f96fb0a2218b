"""Columns added to a Parquet file without decoding and encoding again those that it has.

Column chunks may lie anywhere in a file; the footer says where. So the file is copied, the chunks
of the new columns are written behind those of the old ones, and both footers become one. What is
copied stays at its place: nothing that the footer says of it changes. A footer is a Thrift
structure in the compact protocol (Apache Parquet, ``parquet.thrift``; Apache Thrift,
``thrift-compact-protocol.md``); all of it but the row groups and their lists of columns is passed
on as it is.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sos_dask.artifact import FileRecord, Output
from sos_dask.catalog import Catalog, parquet_settings, partition_errors, partition_path
from sos_dask.healpix import HealpixPixel

_MAGIC = b"PAR1"
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
    """
    source = catalog.partition_file(pixel)

    def write(path: Path) -> int:
        append_columns(source, table, schema, path)
        return int(table.num_rows)

    return output.write_file(partition_path(pixel), write)


def append_columns(source: Path, table: pa.Table, schema: pa.Schema, path: Path) -> None:
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
    """
    sink = pa.BufferOutputStream()
    shutil.copyfile(source, path)
    with path.open("r+b") as file:
        start, footer = _footer(file)
        old = _structures(footer[_ROW_GROUPS][1])
        settings = parquet_settings(table.schema)
        del settings["row_group_size"]  # that of the file counts
        with pq.ParquetWriter(sink, table.schema, **settings) as writer:
            first = 0
            for group in old:
                n_rows = _number(group[_ROWS])
                writer.write_table(table.slice(first, n_rows), row_group_size=max(n_rows, 1))
                first += n_rows
        written = sink.getvalue()
        end, footer = _footer(pa.BufferReader(written))
        new = _structures(footer[_ROW_GROUPS][1])
        groups = [_merged(one, other, start) for one, other in zip(old, new, strict=True)]
        _, footer = _footer(io.BytesIO(_empty(schema)))
        footer[_NUM_ROWS] = _of_number(table.num_rows)
        footer[_ROW_GROUPS] = _LIST, _of_list(groups)
        content = _bytes(footer)
        file.seek(start)
        file.write(written.slice(0, end))
        file.write(content + len(content).to_bytes(4, "little") + _MAGIC)
        file.truncate()


def _empty(schema: pa.Schema) -> bytes:
    """A Parquet file of no rows."""
    file = io.BytesIO()
    pq.write_metadata(schema, file)
    return file.getvalue()


def _footer(file: Any) -> tuple[int, Structure]:
    """Where the footer of a Parquet file starts, and what it says."""
    end = file.seek(-8, io.SEEK_END)
    start = end - int.from_bytes(file.read(4), "little")
    file.seek(start)
    return start, _structure(file.read(end - start), 0)[0]


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


def _structures(content: bytes) -> list[Structure]:
    """Elements of a list of structures."""
    n, content = _list(content)
    found, at = [], 0
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
    """The place after a value."""
    if kind == _STRUCT:
        while head := content[at]:
            at += 1
            if not head >> 4:  # the number of the field follows
                at = _skip(content, at, _I16)
            if head & 15 > _FALSE:  # else the kind is the value
                at = _skip(content, at, head & 15)
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

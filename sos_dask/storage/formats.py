"""One table in one file, written block by block: FITS, VOTable (BINARY2), CSV, ECSV and Parquet."""

from __future__ import annotations

import binascii
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.columns import is_valid
from sos_dask.errors import ConfigError
from sos_dask.schema import described
from sos_dask.storage.artifact import parquet_settings

Read = Callable[[pa.Schema], Iterable[pa.Table]]
"""Tables, one after the other, with the columns of a schema."""
Widths = Mapping[str, tuple[int, bool]]
"""Of columns of text: the longest value, and whether UTF-16 is needed."""
_BLOCK_BYTES = 1 << 20  # of records that are made at once: they stay in the second-level cache
# Types of all formats but Parquet: in records, FITS, VOTable and ECSV.
_TYPES = {
    pa.bool_(): ("S1", "L", "boolean", "bool"),
    pa.int16(): (">i2", "I", "short", "int16"),
    pa.int32(): (">i4", "J", "int", "int32"),
    pa.int64(): (">i8", "K", "long", "int64"),
    pa.float32(): (">f4", "E", "float", "float32"),
    pa.float64(): (">f8", "D", "double", "float64"),
    pa.string(): ("S", "A", "char", "string"),
}
_OTHER = "Export to .parquet, or leave it out with --columns."
_VOTABLE = """<?xml version="1.0"?>
<VOTABLE version="1.4" xmlns="http://www.ivoa.net/xml/VOTable/v1.3"><RESOURCE>
<TABLE name={}>
{}<DATA><BINARY2><STREAM encoding="base64">
"""


def plain(item: pa.Field) -> pa.Field:
    """Give a column a type that every format has: other integers become int64."""
    kind = pa.int64() if pa.types.is_integer(item.type) else item.type
    if kind not in _TYPES:
        what = f"column '{item.name}' has type {kind}, which Parquet alone can hold"
        raise ConfigError(what, _OTHER)
    return item if item.type in _TYPES else item.with_type(kind)


def about(item: pa.Field) -> dict[str, str]:
    """Name, unit, UCD and description of a column, the last three empty where it has none."""
    known = {key.decode(): value.decode() for key, value in (item.metadata or {}).items()}
    return {
        "name": item.name,
        **{key: known.get(key, "") for key in ("unit", "ucd", "description")},
    }


# -- records of fixed length ----------------------------------------------------------------------


def _widths(schema: pa.Schema, read: Read, bad: str) -> Widths:
    """Measure all text; `ConfigError` for a value with a character that the format cannot hold."""
    found = {item.name: (1, False) for item in schema if pa.types.is_string(item.type)}
    for table in read(pa.schema([schema.field(name) for name in found])) if found else ():
        for name, (width, wide) in found.items():
            column = table[name]
            place = pc.index(pc.match_substring_regex(column, bad), True).as_py()
            if place >= 0:
                what = f"column '{name}' has the value {column[place].as_py()[:40]!r}"
                raise ConfigError(f"{what}: this format has no such text", _OTHER)
            longest = pc.max(pc.binary_length(column)).as_py() or 0
            is_ascii = pc.all(pc.string_is_ascii(column)).as_py()
            found[name] = max(width, longest), wide or is_ascii is False
    return found


def _null(item: pa.Field) -> int:
    """Integer that stands for null: the smallest."""
    return int(np.iinfo(item.type.to_pandas_dtype()).min)


def _records(schema: pa.Schema, widths: Widths, flags: bool) -> np.dtype[Any]:
    """Type of a record, whose fields are numbered; with ``flags`` the bits of nulls come first."""
    kinds = [("flags", f"V{-(-len(schema) // 8)}")] if flags else []
    for number, item in enumerate(schema):
        width, wide = widths.get(item.name, ("", False))
        kinds.append((str(number), _TYPES[item.type][0] + str(width * (1 + wide))))
    return np.dtype(kinds)


def _blocks(schema: pa.Schema, read: Read, widths: Widths, flags: bool) -> Iterator[NDArray[Any]]:
    """Records of all tables, some at a time."""
    kind = _records(schema, widths, flags)
    for table in read(schema):
        for batch in table.to_batches(max_chunksize=max(1, _BLOCK_BYTES // kind.itemsize)):
            block, nulls = np.empty(len(batch), kind), np.zeros((len(batch), len(schema)), bool)
            for number, (item, column) in enumerate(zip(schema, batch.columns, strict=True)):
                if flags and column.null_count:
                    nulls[:, number] = ~is_valid(column)
                text = widths.get(item.name, (1, False))
                block[str(number)] = _values(item, column, *text, flags)
            if flags:
                block["flags"] = np.packbits(nulls, axis=1).view(kind["flags"])[:, 0]
            yield block


def _values(item: pa.Field, column: pa.Array, width: int, wide: bool, flags: bool) -> NDArray[Any]:
    """Values of a column as records have them."""
    if wide:
        text = [(one or "").encode("utf-16-be") for one in column.to_pylist()]
        return np.array(text, f"S{2 * width}")
    if pa.types.is_boolean(column.type):
        column = pc.fill_null(pc.if_else(column, "T", "F"), "?" if flags else "\0")
    if pa.types.is_string(column.type):
        padded = pc.ascii_rpad(pc.fill_null(column, ""), width, padding="\0")
        return np.frombuffer(padded.buffers()[2], f"S{width}", len(padded))
    is_float = pa.types.is_floating(column.type)
    null = np.nan if is_float else _null(item)
    if not is_float and not flags and item.nullable and pc.index(column, null).as_py() >= 0:
        what = f"column '{item.name}' has the value {null}, which stands for null in FITS"
        raise ConfigError(what, _OTHER)
    column = pc.fill_null(column, null) if column.null_count else column
    return np.asarray(column.to_numpy())


# -- formats --------------------------------------------------------------------------------------


def _write_fits(path: Path, name: str, schema: pa.Schema, read: Read) -> None:
    from astropy.io.fits import Header

    widths, n_rows = _widths(schema, read, "[^\x01-\x7f]"), 0
    row_bytes = _records(schema, widths, flags=False).itemsize
    cards = [("XTENSION", "BINTABLE"), ("BITPIX", 8), ("NAXIS", 2), ("NAXIS1", row_bytes)]
    cards += [("NAXIS2", 0), ("PCOUNT", 0), ("GCOUNT", 1), ("TFIELDS", len(schema))]
    for number, item in enumerate(schema, 1):
        form = f"{widths.get(item.name, ('',))[0]}{_TYPES[item.type][1]}"
        keys = zip(("TTYPE", "TUNIT", "TUCD", "TCOMM"), about(item).values(), strict=True)
        for key, text in [("TFORM", form), *keys]:
            if words := text.encode("ascii", "replace").decode().split():
                cards.append((f"{key}{number}", " ".join(words)))
        if pa.types.is_integer(item.type) and item.nullable:
            cards.append((f"TNULL{number}", _null(item)))
    first = Header([("SIMPLE", True), ("BITPIX", 8), ("NAXIS", 0), ("EXTEND", True)]).tostring()
    header = Header(cards)
    with path.open("wb") as file:
        file.write((first + header.tostring()).encode())
        for block in _blocks(schema, read, widths, flags=False):
            file.write(block.data)
            n_rows += len(block)
        file.write(bytes(-file.tell() % 2880))
        file.seek(len(first))
        header["NAXIS2"] = n_rows
        file.write(header.tostring().encode())


def _write_votable(path: Path, name: str, schema: pa.Schema, read: Read) -> None:
    widths, fields, rest = _widths(schema, read, "\0"), "", b""
    for item in schema:
        width, wide = widths.get(item.name, ("", False))
        of = about(item) | {"datatype": "unicodeChar" if wide else _TYPES[item.type][2]}
        text = f"<DESCRIPTION>{escape(of.pop('description'))}</DESCRIPTION>"
        of["arraysize"] = str(width)
        given = " ".join(f"{key}={quoteattr(value)}" for key, value in of.items() if value)
        fields += f"<FIELD {given}>{text}</FIELD>\n"
    with path.open("wb") as file:
        file.write(_VOTABLE.format(quoteattr(name), fields).encode())
        for block in _blocks(schema, read, widths, flags=True):
            rest += block.tobytes()
            whole = len(rest) // 3 * 3
            file.write(binascii.b2a_base64(rest[:whole], newline=False))
            rest = rest[whole:]
        file.write(binascii.b2a_base64(rest))
        file.write(b"</STREAM></BINARY2></DATA></TABLE></RESOURCE></VOTABLE>\n")


def _write_csv(path: Path, name: str, schema: pa.Schema, read: Read, head: str = "") -> None:
    kinds = [pa.string() if pa.types.is_boolean(kind) else kind for kind in schema.types]
    as_text = pa.schema(list(zip(schema.names, kinds, strict=True)))
    options = pa_csv.WriteOptions(quoting_style="needed")
    with path.open("wb") as sink:
        sink.write(head.encode())
        with pa_csv.CSVWriter(sink, as_text, write_options=options) as writer:
            for table in read(schema):
                columns = [  # astropy reads no other words for booleans
                    pc.if_else(one, "True", "False") if pa.types.is_boolean(one.type) else one
                    for one in table.columns
                ]
                writer.write_table(pa.table(columns, schema=as_text))


def _write_ecsv(path: Path, name: str, schema: pa.Schema, read: Read) -> None:
    head = "# %ECSV 1.0\n# ---\n# delimiter: ','\n# datatype:\n"
    for item in schema:
        of: dict[str, Any] = about(item) | {"datatype": _TYPES[item.type][3]}
        of["meta"] = {"ucd": of.pop("ucd")} if of["ucd"] else ""
        known = {key: value for key, value in of.items() if value}
        head += f"# - {json.dumps(known, ensure_ascii=False)}\n"  # JSON is YAML
    _write_csv(path, name, schema, read, head)


def _write_parquet(path: Path, name: str, schema: pa.Schema, read: Read) -> None:
    known, settings = described(schema), parquet_settings(schema)
    n_rows = settings.pop("row_group_size")
    with pq.ParquetWriter(path, known, **settings) as writer:
        for table in read(schema):
            writer.write_table(table.cast(known), n_rows)


FORMATS: Mapping[str, Callable[[Path, str, pa.Schema, Read], None]] = {
    ".fits": _write_fits, ".vot": _write_votable, ".xml": _write_votable, ".csv": _write_csv,
    ".ecsv": _write_ecsv, ".parquet": _write_parquet,
}  # fmt: skip
"""What writes a table, by the end of the name of its file."""

"""Parquet and VOTable, with what their writers state beside the values: masks, units, nulls.

Parquet is read by its row groups. A VOTable astropy reads whole, after one pass in little memory
that bounds what it takes.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, NoReturn
from xml.parsers import expat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sos_dask.columns import Values
from sos_dask.errors import SurveyError
from sos_dask.ingest.reader import DAMAGED, Batches, Contents, Native, Source, decoded, regrouped
from sos_dask.ingest.text import stated_by_astropy
from sos_dask.storage.objects import as_path
from sos_dask.surveys.definition import Survey

_TEXT_BYTES = 1 << 29  # of one column at once
_MOST_BYTES = 1 << 30  # of a file, which astropy holds in memory
_BOMB_BYTES = 1 << 29  # of the columns of a small file
_LEAST_ROWS = 512  # for which astropy takes memory, however few there are
_MOST_TEXT = 1 << 27  # between two tags


def open_parquet(path: Path, data_path: Path, survey: Survey) -> Contents:
    """Find out what a Parquet file contains, from its footer."""
    try:
        with pq.ParquetFile(data_path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    except (pa.ArrowException, OSError) as error:
        raise SurveyError(f"{path}: not a readable Parquet file: {error}", DAMAGED) from None
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise SurveyError(f"{path}: its row groups have not the rows of the file", DAMAGED)
    # Units and masks from the metadata that astropy and VOParquet put into the file.
    units: dict[str, str] = {}
    masks: dict[str, str] = {}
    stated = schema.metadata or {}
    outline = stated.get(b"IVOA.VOTable-Parquet.content")
    for table in _Outline(path, outline).tables if outline else ():
        units |= {item.get("name", ""): item.get("unit", "") for item in table["fields"]}
    if yaml := stated.get(b"table_meta_yaml"):
        columns, masks = stated_by_astropy(yaml.decode("utf-8", "replace").split("\n"))
        units |= {name: str(item.get("unit") or "") for name, item in columns.items()}
    natives = []
    for item in schema:
        kind, width = item.type, 1
        if pa.types.is_fixed_size_list(kind):
            kind, width = kind.value_type, kind.list_size
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind, width = kind.value_type, -1
        unit = (item.metadata or {}).get(b"unit", b"").decode("utf-8", "replace")
        known = unit or units.get(item.name, ""), masks.get(item.name, "")
        natives.append(Native(item.name, _arrow_kind(kind), width, None, *known))
    return natives, metadata.num_rows, {"group_rows": groups}


def _arrow_kind(kind: pa.DataType) -> str:
    of = pa.types
    kind = kind.value_type if of.is_dictionary(kind) else kind
    if of.is_decimal(kind):
        return "int" if kind.scale <= 0 else "float"
    if of.is_integer(kind) or of.is_null(kind):
        return "int"
    if of.is_floating(kind):
        return "float"
    text = ("string", "large_string", "string_view", "binary", "large_binary")
    if str(kind) in text or of.is_fixed_size_binary(kind):
        return "text"
    return str(kind)  # "bool" of booleans


def read_parquet(source: Source, start: int, stop: int, batch_rows: int) -> Batches:
    """Native columns of a Parquet file, as `read_native` gives them."""
    bounds = np.concatenate([[0], np.cumsum(source.group_rows)])
    groups = np.flatnonzero((bounds[:-1] >= start) & (bounds[1:] <= stop)).tolist()
    names = list(dict.fromkeys(native.name for native in source.natives.values()))
    with pq.ParquetFile(source.data_path) as file:
        coded = _coded_texts(source, file.metadata, batch_rows)
    with pq.ParquetFile(source.data_path, read_dictionary=coded) as file:
        batches = file.iter_batches(batch_rows, groups, columns=names, use_threads=False)
        for first, table in regrouped(batches, batch_rows):
            columns = {
                key: _arrow_values(source, native, table[native.name].combine_chunks())
                for key, native in source.natives.items()
            }
            yield start + first, columns


def _coded_texts(source: Source, metadata: pq.FileMetaData, batch_rows: int) -> list[str]:
    """Text columns that are read as codes: one long text in many rows is little in the file."""
    texts = {native.name for native in source.natives.values() if native.kind == "text"}
    coded = set()
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        share = min(1.0, batch_rows / max(group.num_rows, 1))
        for column in map(group.column, range(metadata.num_columns)):
            name = column.path_in_schema
            if name in texts:
                _check_texts(source, name, int(share * column.total_uncompressed_size))
                if column.has_dictionary_page:
                    coded.add(name)
    return sorted(coded)


def _check_texts(source: Source, name: str, n_bytes: int) -> None:
    if n_bytes > _TEXT_BYTES:
        what = f"{source.path}: the texts of column '{name}' take {n_bytes >> 20} MiB at once"
        raise SurveyError(what, "Shorten them, or write smaller row groups.")


def _arrow_values(source: Source, native: Native, column: pa.Array) -> pa.Array:
    if native.element is not None:
        try:
            column = pc.list_element(column, native.element)
        except (pa.ArrowInvalid, IndexError):
            raise SurveyError(
                f"{source.path}: a row of column '{native.name}' has no element {native.element}"
            ) from None
    if pa.types.is_dictionary(column.type):
        if native.kind == "text":
            lengths = pc.binary_length(column.dictionary).cast(pa.int64())
            _check_texts(source, native.name, pc.sum(lengths.take(column.indices)).as_py() or 0)
        column = column.dictionary_decode()
    if native.kind == "text":
        return decoded(column.cast(pa.binary()))
    if native.kind == "bool":
        return column.cast(pa.int8())
    if pa.types.is_float16(column.type):
        return column.cast(pa.float32())
    if pa.types.is_decimal(column.type) or pa.types.is_null(column.type):
        return column.cast(pa.int64() if native.kind == "int" else pa.float64())
    return column


class _Outline:
    """Tables of a VOTable and what its service states of it, without the data.

    ``tables`` are the attributes of each TABLE, with its ``fields`` (attributes of each) and
    ``rows`` (of TABLEDATA; 0 of streams); ``overflow`` where QUERY_STATUS is that.
    """

    def __init__(self, path: Path, content: bytes | Path) -> None:
        self._path, self._failed, self._n_text = path, "", 0
        self.tables: list[dict[str, Any]] = []
        self.overflow = False
        parser = expat.ParserCreate()
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.StartDoctypeDeclHandler = self._doctype
        try:
            with content.open("rb") if isinstance(content, Path) else BytesIO(content) as file:
                parser.ParseFile(file)
        except expat.ExpatError as error:
            raise SurveyError(f"{path}: not a readable VOTable: {error}", DAMAGED) from None

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        tag = tag.rpartition(":")[2]
        self._n_text = -_MOST_BYTES if tag == "STREAM" else 0  # which is all rows in one text
        if tag == "TR" and self.tables:
            self.tables[-1]["rows"] += 1
        elif tag == "TABLE":
            self.tables.append(attributes | {"fields": [], "rows": 0})
        elif tag == "FIELD" and self.tables:
            self.tables[-1]["fields"].append(attributes)
        elif tag in ("STREAM", "PARQUET") and "href" in attributes:
            raise SurveyError(
                f"{self._path}: its rows are in another file, {attributes['href']:.200}",
                "Ingest that file, or save the table with its rows inside, as TOPCAT does.",
            )
        elif tag in ("INFO", "PARAM"):
            name = attributes.get("name", "").strip().upper()
            value = attributes.get("value", "").strip()
            if name == "ERROR" or (name == "QUERY_STATUS" and value.upper() == "ERROR"):
                self._failed = f"{name} {value}:"
            elif name == "QUERY_STATUS" and value.upper() == "OVERFLOW":
                self.overflow = True

    def _text(self, text: str) -> None:
        if self._failed:
            self._failed += f" {text.strip()}" if len(self._failed) < 500 else ""
        self._n_text += len(text)
        if self._n_text > _MOST_TEXT:
            _too_large(self._path, f"a text of over {_MOST_TEXT >> 20} MiB")

    def _end(self, tag: str) -> None:
        if self._failed:
            raise SurveyError(
                f"{self._path} is the answer of a query that failed ({self._failed.rstrip(' :')})",
                "Run the query again; its rows are not complete.",
            )

    def _doctype(self, *args: object) -> NoReturn:
        raise SurveyError(f"{self._path}: a VOTable with a document type is not read", DAMAGED)

    def number_of(self, hdu: int | None) -> int:
        """Place of the table that is meant, from 0; raises `SurveyError` where that is open."""
        n_tables = len(self.tables)
        number = hdu or 1
        if number <= n_tables and (hdu or n_tables == 1):
            return number - 1
        if not self.tables:
            raise SurveyError(f"{self._path} contains no table", DAMAGED)
        shown = []
        for place, table in enumerate(self.tables[:20], start=1):
            names = [item.get("name", "") for item in table["fields"]]
            names[8:] = ["..."] * (len(names) > 8)
            shown.append(f"{place} '{table.get('name', table.get('ID', ''))}' ({', '.join(names)})")
        which = f"has {n_tables} tables, and which one is meant is not said"
        what = which if hdu is None else f"has no table {hdu}"
        hint = f"Its tables are {'; '.join(shown)}: set hdu in the survey to its number."
        raise SurveyError(f"{self._path} {what}", hint)


def _too_large(path: Path, what: str) -> NoReturn:
    hint = "Convert it: stilts tpipe in=FILE ifmt=votable out=table.fits"
    raise SurveyError(f"{path} has {what}, and a VOTable is read into memory as a whole", hint)


def _stated(text: str) -> int | None:
    """A number of rows or values, None where it is none."""
    return int(text[:20]) if text.isascii() and text.isdigit() else None


def _row_bytes(item: dict[str, str]) -> int:
    """Bytes a row of a FIELD by its ``arraysize``, at least."""
    sizes = map(_stated, item.get("arraysize", "").split("x"))
    each = 4 if item.get("datatype") in ("char", "unicodeChar") else 8
    return each * prod(size for size in sizes if size is not None)


def open_votable(path: Path, data_path: Path, survey: Survey) -> Contents:
    """Find out what the table of a VOTable contains that the survey means."""
    outline, n_bytes = _Outline(path, data_path), data_path.stat().st_size
    if n_bytes > _MOST_BYTES:
        _too_large(path, f"{n_bytes >> 20} MiB")
    for table in outline.tables:
        row_bytes = sum(map(_row_bytes, table["fields"]))
        table["stated"] = _stated(table.get("nrows", "").strip())
        n_rows = max(table["rows"], table["stated"] or 0, _LEAST_ROWS)
        if row_bytes * n_rows > max(_BOMB_BYTES, 8 * n_bytes):
            what = f"{n_rows} rows of {row_bytes} bytes by the 'arraysize' of its fields"
            _too_large(path, what)
    if outline.overflow and "overflow" not in survey.allow:
        raise SurveyError(
            f"{path} is not complete: its service cut it off (QUERY_STATUS OVERFLOW)",
            "Run the query again with a higher limit of rows (MAXREC, ROW_LIMIT = -1), or set "
            'allow = ["overflow"] in the survey.',
        )
    number = outline.number_of(survey.hdu)
    stated = outline.tables[number]["stated"]
    parsed = _parsed(path, data_path, number, None)
    n_rows, types = len(parsed.array), parsed.array.dtype
    if stated not in (None, n_rows):
        raise SurveyError(f"{path} has {n_rows} rows, and says {stated}", DAMAGED)
    natives = []
    for place, item in enumerate(parsed.fields):
        dtype = types[place]
        names = {"i": "int", "u": "int", "f": "float", "b": "bool", "U": "text", "S": "text"}
        kind = names.get(dtype.base.kind, str(item.datatype))
        if dtype.kind == "O" and kind in ("char", "unicodeChar"):
            kind = "text"
        unit, name = str(item.unit or ""), str(item.name or item.ID)
        natives.append(Native(name, kind, prod(dtype.shape), unit=unit, offset=place))
    alone = len(outline.tables) == 1
    return natives, n_rows, {"number": number, "alone": alone, "overflow": outline.overflow}


def _parsed(path: Path, data_path: Path, number: int, source: Source | None) -> Any:
    """Table of that number; of an opened file its columns, of which no value may be changed."""
    from astropy.io.votable import exceptions, parse

    changes = tuple(getattr(exceptions, f) for f in ("E02", "W30", "W31", "W46", "W49", "W51"))
    places = None
    if source is not None and source.alone:  # astropy looks for them in every table of the file
        places = sorted({native.offset for native in source.natives.values()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for category in changes if source is not None else ():
                warnings.simplefilter("error", category)
            # IRSA writes "null", others "nan", "n/a" or "--"; astropy shows the first letter.
            warnings.filterwarnings("ignore", ".*'[nN-]'", exceptions.W30)
            how = {"verify": "ignore" if source is None else "warn", "filename": path.name}
            document = parse(data_path, places, table_number=number, **how)
            return list(document.iter_tables())[number]
    except changes as error:
        raise SurveyError(
            f"{path}: a value does not fit its column: {error}",
            "It would be cut, or become null or 0. Write the table again as VOTable 1.4, "
            "for example with TOPCAT.",
        ) from None
    except Exception as error:  # expat, struct and a family of its own: all mean the same here
        raise SurveyError(f"{path}: not a readable VOTable: {error}", DAMAGED) from None


def read_votable(source: Source, start: int, stop: int, batch_rows: int) -> Batches:
    """Native columns of one table of a VOTable, as `read_native` gives them."""
    table = _parsed(as_path(source.path), Path(source.data_path), source.number, source)
    names = table.array.dtype.names
    places = sorted({native.offset for native in source.natives.values()})
    for first in range(0, len(table.array), batch_rows):
        columns: dict[str, Values] = {}
        for key, native in source.natives.items():
            name = names[places.index(native.offset) if source.alone else native.offset]
            column = table.array[name][first : first + batch_rows]
            if column.ndim > 1:  # also of arraysize="1"
                column = column.reshape(len(column), -1)[:, native.element or 0]
            columns[key] = _values(native, column)
        yield first, columns


def _values(native: Native, column: Any) -> pa.Array:
    mask, data = np.ma.getmaskarray(column), np.ma.getdata(column)
    if native.kind == "text":
        items = (str(item.decode() if isinstance(item, bytes) else item) for item in data)
        return pa.array([None if m else i for i, m in zip(items, mask, strict=True)], pa.string())
    if native.kind == "bool":
        data = data.astype(np.int8)
    return pa.array(data.astype(data.dtype.newbyteorder("=")), mask=mask)

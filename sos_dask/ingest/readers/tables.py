"""Parquet and VOTable, which state the types and units of their columns."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sos_dask.errors import SurveyError
from sos_dask.ingest.arrays import Values, decoded, regrouped
from sos_dask.ingest.readers.common import DAMAGED, Batches, Contents, Native, Source


def open_parquet(path: Path, data_path: Path) -> Contents:
    """What a Parquet file holds, from its footer."""
    try:
        with pq.ParquetFile(data_path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    except (pa.ArrowException, OSError) as error:
        raise SurveyError(f"{path}: not a readable Parquet file: {error}", DAMAGED) from None
    natives = [_arrow_native(item) for item in schema]
    return Contents(natives, metadata.num_rows, {"group_rows": groups})


def _arrow_native(item: pa.Field) -> Native:
    kind, width = item.type, 1
    if pa.types.is_fixed_size_list(kind):
        kind, width = kind.value_type, kind.list_size
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind, width = kind.value_type, -1
    unit = (item.metadata or {}).get(b"unit", b"").decode("utf-8", "replace")
    return Native(item.name, _arrow_kind(kind), width, unit=unit)


def _arrow_kind(kind: pa.DataType) -> str:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_integer(kind) or types.is_null(kind):
        return "int"
    if types.is_boolean(kind):
        return "bool"
    if types.is_floating(kind):
        return "float"
    if types.is_decimal(kind):
        return "int" if kind.scale <= 0 else "float"
    text = (types.is_string, types.is_large_string, types.is_string_view)
    binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return "text" if any(test(kind) for test in (*text, *binary)) else str(kind)


def read_parquet(source: Source, start: int, stop: int | None, batch_rows: int) -> Batches:
    """Native columns of a Parquet file, as `read_native` gives them."""
    bounds = np.concatenate([[0], np.cumsum(source.group_rows)])
    stop = int(bounds[-1]) if stop is None else stop
    groups = np.flatnonzero((bounds[:-1] >= start) & (bounds[1:] <= stop)).tolist()
    names = list(dict.fromkeys(native.name for native in source.natives.values()))
    with pq.ParquetFile(source.data_path) as file:
        batches = file.iter_batches(batch_rows, groups, columns=names, use_threads=False)
        for first, table in regrouped(batches, batch_rows):
            yield (
                start + first,
                {
                    key: _arrow_values(source, native, table[native.name].combine_chunks())
                    for key, native in source.natives.items()
                },
            )


def _arrow_values(source: Source, native: Native, column: pa.Array) -> pa.Array:
    if native.element is not None:
        try:
            column = pc.list_element(column, native.element)
        except (pa.ArrowInvalid, IndexError):
            raise SurveyError(
                f"{source.path}: a row of column '{native.name}' has no element {native.element}"
            ) from None
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if native.kind == "text":
        binary = not (
            pa.types.is_string(column.type)
            or pa.types.is_large_string(column.type)
            or pa.types.is_string_view(column.type)
        )
        return decoded(column.cast(pa.binary())) if binary else column.cast(pa.string())
    if native.kind == "bool":
        return column.cast(pa.int8())
    if pa.types.is_float16(column.type):
        return column.cast(pa.float32())
    if pa.types.is_decimal(column.type) or pa.types.is_null(column.type):
        return column.cast(pa.int64() if native.kind == "int" else pa.float64())
    return column


def _parse_votable(path: Path, data_path: Path) -> Any:
    from astropy.io.votable import parse

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parse(data_path, verify="ignore").get_first_table()
    except Exception as error:  # expat, struct and a family of its own: all mean the same here
        raise SurveyError(f"{path}: not a readable VOTable: {error}", DAMAGED) from None


def open_votable(path: Path, data_path: Path) -> Contents:
    """What the first table of a VOTable holds."""
    table = _parse_votable(path, data_path)
    natives = []
    for number, item in enumerate(table.fields):
        dtype = table.array.dtype[number]
        kind, width = dtype.base.kind, int(np.prod(dtype.shape, dtype=np.int64))
        names = {"i": "int", "u": "int", "f": "float", "b": "bool", "U": "text", "S": "text"}
        kind = names.get(kind, str(item.datatype))
        if dtype.kind == "O" and item.datatype in ("char", "unicodeChar"):
            kind = "text"
        unit = "" if item.unit is None else str(item.unit)
        natives.append(Native(str(item.name or item.ID), kind, width, unit=unit))
    return Contents(natives, len(table.array))


def read_votable(source: Source, start: int, stop: int | None, batch_rows: int) -> Batches:
    """Native columns of the first table of a VOTable, as `read_native` gives them."""
    table = _parse_votable(Path(source.path), Path(source.data_path))
    numbers = {str(item.name or item.ID): number for number, item in enumerate(table.fields)}
    for first in range(0, len(table.array), batch_rows):
        columns: dict[str, Values] = {}
        for key, native in source.natives.items():
            name = table.array.dtype.names[numbers[native.name]]
            column = table.array[name][first : first + batch_rows]
            if native.element is not None:
                column = column.reshape(len(column), -1)[:, native.element]
            columns[key] = _masked_values(native, column)
        yield first, columns


def _masked_values(native: Native, column: Any) -> pa.Array:
    mask = np.ma.getmaskarray(column)
    data = np.ma.getdata(column)
    if native.kind == "text":
        items = (str(item.decode() if isinstance(item, bytes) else item) for item in data)
        return pa.array([None if m else i for i, m in zip(items, mask, strict=True)], pa.string())
    if native.kind == "bool":
        data = data.astype(np.int8)
    return pa.array(data.astype(data.dtype.newbyteorder("=")), mask=mask)

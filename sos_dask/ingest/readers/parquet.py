"""Parquet, with what its writer states beside the values: masks, units, nulls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sos_dask.errors import SurveyError
from sos_dask.ingest.arrays import decoded, regrouped
from sos_dask.ingest.readers.common import (
    DAMAGED,
    Batches,
    Contents,
    Native,
    Source,
    stated_by_astropy,
)
from sos_dask.ingest.readers.votable import Outline

_TEXT_BYTES = 1 << 29


def open_parquet(path: Path, data_path: Path) -> Contents:
    """What a Parquet file holds, from its footer."""
    try:
        with pq.ParquetFile(data_path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    except (pa.ArrowException, OSError) as error:
        raise SurveyError(f"{path}: not a readable Parquet file: {error}", DAMAGED) from None
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise SurveyError(f"{path}: its row groups have not the rows of the file", DAMAGED)
    natives = _stated(path, schema, [_arrow_native(item) for item in schema])
    return Contents(natives, metadata.num_rows, {"group_rows": groups})


def _stated(path: Path, schema: pa.Schema, natives: list[Native]) -> list[Native]:
    """Units and masks from the metadata that astropy and VOParquet put into the file."""
    metadata = schema.metadata or {}
    units: dict[str, str] = {}
    outline = metadata.get(b"IVOA.VOTable-Parquet.content")
    if outline:
        for table in Outline(path).scanned(outline).tables:
            units |= {item.get("name", ""): item.get("unit", "") for item in table["fields"]}
    masks: dict[str, str] = {}
    text = metadata.get(b"table_meta_yaml", b"").decode("utf-8", "replace")
    if text:
        columns, masks = stated_by_astropy(text.split("\n"))
        units |= {name: str(item.get("unit") or "") for name, item in columns.items()}
    return [
        replace(n, unit=n.unit or units.get(n.name, ""), mask=masks.get(n.name, ""))
        for n in natives
    ]


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
        coded = _coded_texts(source, file.metadata, batch_rows)
    with pq.ParquetFile(source.data_path, read_dictionary=coded) as file:
        batches = file.iter_batches(batch_rows, groups, columns=names, use_threads=False)
        for first, table in regrouped(batches, batch_rows):
            yield (
                start + first,
                {
                    key: _arrow_values(source, native, table[native.name].combine_chunks())
                    for key, native in source.natives.items()
                },
            )


def _coded_texts(source: Source, metadata: pq.FileMetaData, batch_rows: int) -> list[str]:
    """Text columns that are read as codes: one long text in many rows is little in the file."""
    texts = {native.name for native in source.natives.values() if native.kind == "text"}
    coded = set()
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        share = min(1.0, batch_rows / max(group.num_rows, 1))
        for place in range(metadata.num_columns):
            column = group.column(place)
            if column.path_in_schema in texts:
                n_bytes = int(share * column.total_uncompressed_size)
                _check_texts(source, column.path_in_schema, n_bytes)
                if column.has_dictionary_page:
                    coded.add(column.path_in_schema)
    return sorted(coded)


def _check_texts(source: Source, name: str, n_bytes: int) -> None:
    if n_bytes > _TEXT_BYTES:
        raise SurveyError(
            f"{source.path}: the texts of column '{name}' take {n_bytes >> 20} MiB at once",
            "Shorten them, or write smaller row groups.",
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
        if native.kind == "text":
            lengths = pc.binary_length(column.dictionary).cast(pa.int64())
            _check_texts(source, native.name, pc.sum(lengths.take(column.indices)).as_py() or 0)
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

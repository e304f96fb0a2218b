"""Delimited text: every column as text, so that a bad number is known with its line."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa
import pyarrow.csv as pa_csv

from sos_dask.errors import SurveyError
from sos_dask.ingest.arrays import decoded, regrouped
from sos_dask.ingest.readers.common import DAMAGED, Batches, Contents, Native, Source


def open_text(path: Path, gzipped: bool) -> Contents:
    """What delimited text holds, from its first line."""
    with open_bytes(path, gzipped) as file:
        line, skip_lines = file.readline(), 1
        while line and not line.strip():
            line = file.readline()
            skip_lines += 1
        has_rows = any(row.strip() for row in file)
    try:
        header_line = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        header_line = line.decode("latin-1")
    unquoted = re.sub(r'"[^"]*"', "", header_line)
    delimiter = max(",|;\t", key=unquoted.count)
    if unquoted.count(delimiter) == 0:
        if re.search(r"\.fits?(\.|$)", path.name.lower()):
            raise SurveyError(
                f"{path} is no FITS file: it begins with {header_line:.80}",
                "Download it again; a table of text may have any other name, like .csv.",
            )
        raise SurveyError(
            f"{path}: its first line has none of the delimiters , | ; and tab: {header_line:.80}",
            "The first line must hold the column names.",
        )
    header = [name.strip() for name in next(csv.reader([header_line], delimiter=delimiter))]
    for name in header:
        if header.count(name) > 1 and name:
            raise SurveyError(
                f"{path}: column '{name}' is there {header.count(name)} times",
                "Rename or remove all but one.",
            )
    unique = tuple(name or f"\0{number}" for number, name in enumerate(header))
    natives = [Native(name, "text") for name in header if name]
    layout = {
        "header": unique,
        "delimiter": delimiter,
        "skip_lines": skip_lines,
        "gzipped": gzipped,
    }
    return Contents(natives, None if has_rows else 0, layout)


@contextlib.contextmanager
def open_bytes(path: Path, gzipped: bool) -> Iterator[BinaryIO]:
    """Open a file that may be gzipped; damage of it is a `SurveyError`."""
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            yield file  # type: ignore[misc]  # GzipFile has all that is used of BinaryIO
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SurveyError(f"{path}: truncated or damaged gzip file: {error}", DAMAGED) from None


def read_text(source: Source, start: int, stop: int | None, batch_rows: int) -> Batches:
    """Native columns of delimited text, as `read_native` gives them."""
    # All as text: numbers are cast later at the same cost, and a bad one is known with its row.
    types = {native.name: pa.binary() for native in source.natives.values()}
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(pa.OSFile(source.data_path))
        if source.gzipped:
            file = stack.enter_context(pa.CompressedInputStream(file, "gzip"))
        try:
            reader = stack.enter_context(
                pa_csv.open_csv(
                    file,
                    pa_csv.ReadOptions(
                        use_threads=False,
                        block_size=1 << 20,
                        column_names=source.header,
                        skip_rows=source.skip_lines,
                    ),
                    pa_csv.ParseOptions(delimiter=source.delimiter),
                    pa_csv.ConvertOptions(column_types=types, include_columns=list(types)),
                )
            )
            for first, batch in regrouped(reader, batch_rows):
                yield first, {name: decoded(batch[name].combine_chunks()) for name in types}
        except pa.ArrowInvalid as error:
            _explain_text(source, error)


def _explain_text(source: Source, error: Exception) -> NoReturn:
    """Say which line of a text file is wrong (a second, slow pass)."""
    path = Path(source.path)
    with (
        open_bytes(path, source.gzipped) as file,
        io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="") as text,
    ):
        rows = csv.reader(text, delimiter=source.delimiter)
        for row in rows:
            if rows.line_num > source.skip_lines and row and len(row) != len(source.header):
                raise SurveyError(
                    f"{path}: line {rows.line_num} has {len(row)} fields, "
                    f"the header has {len(source.header)}",
                    "The file is damaged or truncated, or a field with the delimiter in it is "
                    "not quoted.",
                ) from None
    raise SurveyError(f"{path} cannot be read: {error}", DAMAGED) from error


def text_line(source: Source, row: int) -> int | None:
    """Line of a text file (from 1) that holds a data row (from 0); None for other formats."""
    if source.kind != "csv":
        return None
    with open_bytes(Path(source.path), source.gzipped) as file:
        for number, line in enumerate(file, start=1):
            if number > source.skip_lines and line.strip(b"\r\n"):
                row -= 1
                if row < 0:
                    return number
    return None

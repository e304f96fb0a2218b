"""FITS binary tables: big-endian records, read in blocks straight into columns."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import Values
from sos_dask.errors import SurveyError
from sos_dask.ingest.reader import DAMAGED, Batches, Contents, Native, Source, decoded
from sos_dask.surveys.definition import Survey

_BLOCK_BYTES = 1 << 20  # stays in the second-level cache while its columns are pulled out
_TYPES = {"L": "u1", "B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8"}
_KINDS = {"L": "bool", "E": "float", "D": "float", **dict.fromkeys("BIJK", "int")}
_BYTES = {"C": 8, "M": 16, "P": 8, "Q": 16}  # of other types; 1 of the rest


def open_fits(path: Path, data_path: Path, survey: Survey) -> Contents:
    """Find out what a FITS binary table contains, from its header."""
    from astropy.io import fits

    hdu = survey.hdu
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            headers = _headers(data_path)
    except (OSError, ValueError, KeyError, TypeError, fits.VerifyError) as error:
        raise SurveyError(f"{path}: not a readable FITS file: {error}", DAMAGED) from None
    tables = {
        number: f"{number} '{header.get('EXTNAME', '')}' ({header.get('NAXIS2')} rows)"
        for number, (header, _) in enumerate(headers)
        if str(header.get("XTENSION", "")).strip() == "BINTABLE"
    }
    if not tables:
        hint = "Convert it, for example with TOPCAT."
        raise SurveyError(f"{path} contains no binary table", hint)
    if hdu is None and len(tables) == 1:
        (hdu,) = tables
    if hdu not in tables:
        what = f"HDU {hdu} is not a binary table"
        if hdu is None or hdu >= len(headers):
            what = (
                f"HDU {hdu} does not exist" if hdu else "which of its tables is meant is not said"
            )
        known = ", ".join(tables.values())
        raise SurveyError(f"{path}: {what}", f"Tables are in HDU {known}: set hdu in the survey.")
    names = {str(header.get("EXTNAME", "")).strip(): i for i, (header, _) in enumerate(headers)}
    natives, layout, n_rows = [], [], int(headers[hdu][0]["NAXIS2"])
    for place, name in enumerate(("", *survey.beside)):
        number = names.get(name, 0) if place else hdu
        if number not in tables:
            raise SurveyError(f"{path}: no table '{name}'", f"It has {', '.join(tables.values())}.")
        header, offset = headers[number]
        row_bytes = int(header["NAXIS1"])
        if row_bytes < 1 or n_rows < 0:
            what = f"{n_rows} rows of {row_bytes} bytes are not a table"
            raise SurveyError(f"{path}: {what}", DAMAGED)
        if int(header["NAXIS2"]) != n_rows:
            what = f"HDU {tables[hdu]} and HDU {tables[number]} do not belong together row by row"
            raise SurveyError(f"{path}: {what}", DAMAGED)
        expected = offset + row_bytes * n_rows + int(header.get("PCOUNT", 0))
        actual = data_path.stat().st_size
        if actual < expected:
            what = f"{actual} bytes, its header asks for {expected}"
            raise SurveyError(f"{path} is truncated: {what}", DAMAGED)
        layout.append((offset, row_bytes))
        try:
            for native in _fits_columns(path, header):
                whole = f"{name}.{native.name}" if place else native.name
                natives.append(replace(native, name=whole, table=place))
        except KeyError as error:
            raise SurveyError(f"{path}: its header is damaged: {error}", DAMAGED) from None
    return natives, n_rows, {"tables": tuple(layout)}


def _headers(path: Path) -> list[tuple[Any, int]]:
    """Header of each HDU, and where its data begin.

    `astropy.io.fits.open` takes minutes over, or allocates, what a damaged header claims.
    """
    from astropy.io import fits

    found = []
    with path.open("rb") as file:
        while file.peek(8)[:8] in (b"SIMPLE  ", b"XTENSION"):
            header = fits.Header.fromfile(file)
            start = file.tell()
            found.append((header, start))
            if not 0 <= int(header["NAXIS"]) <= 999:
                raise ValueError(f"NAXIS is {header['NAXIS']}")
            stop = start + header.data_size_padded
            if not start <= stop < path.stat().st_size:
                break
            file.seek(stop)
    return found


def _fits_columns(path: Path, header: Any) -> Iterator[Native]:
    """Columns of a binary table, as FITS 4.0, section 7.3 defines them."""
    offset = 0
    for number in range(1, int(header["TFIELDS"]) + 1):
        form = str(header[f"TFORM{number}"]).strip()
        match = re.match(r"(\d*)([LXBIJKAEDCMPQ])", form)
        if match is None:
            raise SurveyError(f"{path}: column {number} has the unknown format '{form}'")
        repeat, code = int(match[1] or 1), match[2]
        scale, zero = header.get(f"TSCAL{number}", 1), header.get(f"TZERO{number}", 0)
        dtype, kind = _TYPES.get(code, ""), _KINDS.get(code, form)
        size = _BYTES.get(code, np.dtype(dtype or "u1").itemsize) * repeat
        if code == "A":
            dtype, kind = f"S{repeat}", "text"
        elif code == "X":
            size = (repeat + 7) // 8
        if kind == "int" and not (scale == 1 and float(zero).is_integer()):
            kind = "float"
        yield Native(
            name=str(header.get(f"TTYPE{number}", f"col{number}")).strip(),
            kind=kind if repeat else form,
            width=1 if code == "A" else repeat,
            unit=str(header.get(f"TUNIT{number}", "")).strip(),
            offset=offset,
            dtype=dtype,
            null=header.get(f"TNULL{number}") if code in "BIJK" else None,
            scale=scale,
            zero=zero,
        )
        offset += size
    if offset != int(header["NAXIS1"]):
        what = f"{path}: its columns take {offset} bytes a row, NAXIS1 says {header['NAXIS1']}"
        raise SurveyError(what, "The header is damaged.")


def read_fits(source: Source, start: int, stop: int, batch_rows: int) -> Batches:
    """Native columns of FITS binary tables side by side, as `read_native` gives them."""
    natives = source.natives
    with Path(source.data_path).open("rb") as file:
        for first in range(start, stop, batch_rows):
            n_rows = min(batch_rows, stop - first)
            columns = {
                key: np.empty(n_rows, np.dtype(native.dtype).newbyteorder("="))
                for key, native in natives.items()
            }
            for table in {native.table for native in natives.values()}:
                own = {key: columns[key] for key in natives if natives[key].table == table}
                _read_table(source, file, table, first, own)
            yield first, {key: _fits_values(natives[key], columns[key]) for key in natives}


def _read_table(
    source: Source, file: BufferedReader, table: int, first: int, columns: dict[str, NDArray[Any]]
) -> None:
    """Fill columns of one table with its rows from the first on."""
    offset, row_bytes = source.tables[table]
    fields = [(source.natives[key].dtype, source.natives[key].offset) for key in columns]
    formats, offsets = zip(*fields, strict=True)
    layout: Any = {"names": list(columns), "formats": formats, "offsets": offsets}
    record = np.dtype(layout | {"itemsize": row_bytes})
    block = np.empty(max(1, _BLOCK_BYTES // row_bytes), record)
    raw = memoryview(block.view(np.uint8).data)
    n_rows = len(next(iter(columns.values())))
    file.seek(offset + first * row_bytes)
    for low in range(0, n_rows, len(block)):
        n = min(len(block), n_rows - low)
        if file.readinto(raw[: n * row_bytes]) < n * row_bytes:
            raise SurveyError(f"{source.path} became shorter while it was read", DAMAGED)
        for key, column in columns.items():
            column[low : low + n] = block[key][:n]


def _fits_values(native: Native, column: NDArray[Any]) -> Values:
    if native.kind == "text":
        return _text(column)
    if native.kind == "bool":
        return pa.array((column == ord("T")).view(np.int8), mask=~np.isin(column, (84, 70)))
    null = None if native.null is None else column == native.null
    if native.kind == "int" and native.zero:
        if column.dtype == np.int64 and native.zero == 1 << 63:
            column = column.view(np.uint64) ^ np.uint64(1 << 63)
        else:
            column = column.astype(np.int64) + int(native.zero)
    elif native.scale != 1 or native.zero:
        column = column * float(native.scale) + float(native.zero)
    return column if null is None or not null.any() else pa.array(column, mask=null)


def _text(column: NDArray[Any]) -> pa.Array:
    """Text of fixed-width bytes, which FITS pads with blanks or ends with a NUL."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(column))]
    kind = pa.binary(column.dtype.itemsize)
    fixed = pa.FixedSizeBinaryArray.from_buffers(kind, len(column), buffers)
    text = pc.ascii_rtrim(decoded(fixed.cast(pa.binary())), characters=" \0")
    if pc.any(pc.match_substring(text, "\0")).as_py():
        text = pc.replace_substring_regex(text, pattern="(?s)\0.*", replacement="")
    return text

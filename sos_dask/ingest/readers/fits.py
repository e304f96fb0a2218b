"""FITS binary tables: big-endian records, read in blocks straight into columns."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import Values
from sos_dask.errors import SurveyError
from sos_dask.ingest.readers import DAMAGED, Batches, Contents, Native, Source, decoded

_BLOCK_BYTES = 1 << 20  # stays in the second-level cache while its columns are pulled out
_TYPES = {"L": "u1", "B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8"}
_KINDS = {"L": "bool", "E": "float", "D": "float", **dict.fromkeys("BIJK", "int")}
_BYTES = {"C": 8, "M": 16, "P": 8, "Q": 16}
# Short texts are mostly classes, of which each is made a text only once.
_SHORT, _FEW, _FIRST_ROWS = 8, 1000, 10_000


def open_fits(path: Path, data_path: Path, hdu: int | None) -> Contents:
    """Find out what a FITS binary table contains, from its header."""
    from astropy.io import fits

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            headers = _headers(data_path)
    except (OSError, ValueError, KeyError, TypeError, fits.VerifyError) as error:
        raise SurveyError(f"{path}: not a readable FITS file: {error}", DAMAGED) from None
    kinds = [str(header.get("XTENSION", "")).strip() for header, _ in headers]
    tables = {
        number: f"{number} '{header.get('EXTNAME', '')}' ({header.get('NAXIS2')} rows)"
        for number, (header, _) in enumerate(headers)
        if kinds[number] == "BINTABLE"
    }
    if hdu not in tables and (hdu is not None or len(tables) != 1):
        what = f"HDU {hdu} is no binary table"
        if hdu is None:
            what = "which of its tables is meant is not said"
        elif hdu >= len(headers):
            what = f"HDU {hdu} does not exist"
        raise SurveyError(
            f"{path}: {what}" if tables else f"{path} holds no binary table",
            f"Tables are in HDU {', '.join(tables.values())}: set hdu in the survey."
            if tables
            else "Convert it, for example with TOPCAT.",
        )
    header, offset = headers[next(iter(tables)) if hdu is None else hdu]
    row_bytes, n_rows = int(header["NAXIS1"]), int(header["NAXIS2"])
    if row_bytes < 1 or n_rows < 0:
        raise SurveyError(f"{path}: {n_rows} rows of {row_bytes} bytes are no table", DAMAGED)
    expected = offset + row_bytes * n_rows + int(header.get("PCOUNT", 0))
    actual = data_path.stat().st_size
    if actual < expected:
        raise SurveyError(
            f"{path} is truncated: {actual} bytes, its header asks for {expected}", DAMAGED
        )
    try:
        natives = list(_fits_columns(path, header))
    except KeyError as error:
        raise SurveyError(f"{path}: its header is damaged: {error}", DAMAGED) from None
    return Contents(natives, n_rows, {"offset": offset, "row_bytes": row_bytes})


def _headers(path: Path) -> list[tuple[Any, int]]:
    """Header of each HDU, and where its data begin.

    `astropy.io.fits.open` takes minutes over, or allocates, what a damaged header claims.
    """
    from astropy.io import fits

    found = []
    with path.open("rb") as file:
        while file.peek(8)[:8] in (b"SIMPLE  ", b"XTENSION"):
            header = fits.Header.fromfile(file)
            found.append((header, file.tell()))
            n_axes = int(header["NAXIS"])
            if not 0 <= n_axes <= 999:
                raise ValueError(f"NAXIS is {n_axes}")
            shape = [int(header[f"NAXIS{axis}"]) for axis in range(1, n_axes + 1)]
            if header.get("GROUPS") is True:
                shape = shape[1:]
            n_values = int(header.get("PCOUNT", 0)) + (prod(shape) if shape else 0)
            n_bytes = abs(int(header["BITPIX"])) // 8 * int(header.get("GCOUNT", 1)) * n_values
            stop = file.tell() + -(-n_bytes // 2880) * 2880
            if not file.tell() <= stop < path.stat().st_size:
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
        size = _BYTES.get(code, 1) * repeat
        if code == "A":
            dtype, kind = f"S{repeat}", "text"
        elif code == "X":
            size = (repeat + 7) // 8
        elif dtype:
            size = np.dtype(dtype).itemsize * repeat
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
        raise SurveyError(
            f"{path}: its columns take {offset} bytes a row, NAXIS1 says {header['NAXIS1']}",
            "The header is damaged.",
        )


def read_fits(source: Source, start: int, stop: int | None, batch_rows: int) -> Batches:
    """Native columns of a FITS binary table, as `read_native` gives them."""
    stop = source.n_rows if stop is None else stop
    assert stop is not None
    natives = source.natives
    record = np.dtype(
        {
            "names": list(natives),
            "formats": [native.dtype for native in natives.values()],
            "offsets": [native.offset for native in natives.values()],
            "itemsize": source.row_bytes,
        }
    )
    block_rows = max(1, _BLOCK_BYTES // source.row_bytes)
    block = np.empty(block_rows, record)
    raw = memoryview(block.view(np.uint8).data)
    with Path(source.data_path).open("rb", buffering=0) as file:
        file.seek(source.offset + start * source.row_bytes)
        for first in range(start, stop, batch_rows):
            n_rows = min(batch_rows, stop - first)
            columns = {
                key: np.empty(n_rows, np.dtype(native.dtype).newbyteorder("="))
                for key, native in natives.items()
            }
            for low in range(0, n_rows, block_rows):
                n = min(block_rows, n_rows - low)
                _read_exactly(source, file, raw[: n * source.row_bytes])
                for key, column in columns.items():
                    column[low : low + n] = block[key][:n]
            yield first, {key: _fits_values(natives[key], columns[key]) for key in natives}


def _read_exactly(source: Source, file: io.FileIO, target: memoryview) -> None:
    done = 0
    while done < len(target):
        got = file.readinto(target[done:])
        if not got:
            raise SurveyError(f"{source.path} became shorter while it was read", DAMAGED)
        done += got


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
    """Fixed-width bytes as text: a dictionary where it is short and few of them differ."""
    width = column.dtype.itemsize
    buffers = [None, pa.py_buffer(np.ascontiguousarray(column))]
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(column), buffers)
    if width <= _SHORT and len(fixed.slice(0, _FIRST_ROWS).unique()) <= _FEW:
        coded = fixed.dictionary_encode()
        return pa.DictionaryArray.from_arrays(coded.indices, _unpadded(coded.dictionary))
    return _unpadded(fixed)


def _unpadded(fixed: pa.Array) -> pa.StringArray:
    """Text of fixed-width bytes, which FITS pads with blanks or ends with a NUL."""
    text = pc.ascii_rtrim(decoded(fixed.cast(pa.binary())), characters=" \0")
    if pc.any(pc.match_substring(text, "\0")).as_py():
        text = pc.replace_substring_regex(text, pattern="(?s)\0.*", replacement="")
    return text

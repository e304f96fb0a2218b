"""Survey files as they come: what is in them, checks that need no rows, native columns in batches.

Formats are told by content, never by name: FITS binary tables (a gzipped one is decompressed once),
delimited text, Parquet and VOTable. Only the columns that a survey needs are read.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import gzip
import hashlib
import io
import os
import re
import uuid
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.errors import StorageError, SurveyError
from sos_dask.schema import CANONICAL, SourceColumn, Survey, nearest

Values: TypeAlias = NDArray[Any] | pa.Array
"""A native column: an array without nulls, or an Arrow array of numbers or text."""

_BLOCK_BYTES = 1 << 20  # stays in the second-level cache while its columns are pulled out
_GZIP = b"\x1f\x8b"
_DAMAGED = "Download it again and compare its size and checksum with the survey's."
_PACKED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Native:
    """One column of a survey file.

    Parameters
    ----------
    name : str
        As the file spells it.
    kind : str
        ``int``, ``float``, ``bool``, ``text``, or the format where it is none of these.
    width : int
        Values in each row; -1 where rows differ.
    element : int, optional
        The one that is read of a vector.
    unit : str
        As the file states it.
    offset, dtype, null, scale, zero
        Place in a FITS record, NumPy type there, TNULL, TSCAL and TZERO.
    """

    name: str
    kind: str
    width: int = 1
    element: int | None = None
    unit: str = ""
    offset: int = 0
    dtype: str = ""
    null: int | None = None
    scale: float = 1
    zero: float = 0


@dataclass(frozen=True)
class Source:
    """One opened survey file; it holds no rows and pickles small.

    Parameters
    ----------
    path : str
        As the user gave it.
    data_path : str
        What is read: the decompressed copy of a gzipped FITS file.
    kind : str
        ``fits``, ``csv``, ``parquet`` or ``votable``.
    index : int
        Number of the file in the job.
    n_rows : int, optional
        None for text, which has to be read to be counted.
    natives : mapping of str to Native
        The columns that are needed, by a key of our own (``PARAM[0]`` for an element).
    columns : mapping of str to tuple of str
        Column of the product -> keys of its natives (several where joined).
    cuts : mapping of str to str
        ``Cut.column`` -> key of the native; a column of the product is not in it.
    offset, row_bytes : int
        FITS: where the table begins, and bytes a row.
    group_rows : tuple of int
        Parquet: rows of each row group.
    header, delimiter, skip_lines, gzipped
        Text: all column names, and how to read it.
    """

    path: str
    data_path: str
    kind: str
    index: int
    n_rows: int | None
    natives: Mapping[str, Native]
    columns: Mapping[str, tuple[str, ...]]
    cuts: Mapping[str, str]
    offset: int = 0
    row_bytes: int = 0
    group_rows: tuple[int, ...] = ()
    header: tuple[str, ...] = ()
    delimiter: str = ","
    skip_lines: int = 1
    gzipped: bool = False


@dataclass
class _Contents:
    """What a file holds, before the survey's columns are looked up in it."""

    kind: str
    data_path: Path
    natives: list[Native]
    n_rows: int | None
    layout: dict[str, Any] = field(default_factory=dict)


def open_source(path: Path, survey: Survey, index: int, scratch: Path) -> Source:
    """Find out what a survey file is and where the survey's columns lie in it.

    Parameters
    ----------
    path : Path
    survey : Survey
    index : int
        Number of the file in the job.
    scratch : Path
        Folder for the decompressed copy of a gzipped FITS file; a copy that is there is reused.

    Returns
    -------
    Source

    Raises
    ------
    SurveyError
        The file is missing, damaged, truncated, empty or of another format, or it lacks a column
        or has it with a type or unit that would give wrong values.
    StorageError
        The decompressed copy cannot be written.
    """
    head, gzipped = _first_bytes(path)
    kind = _kind_of(path, head)
    data_path = path
    if gzipped and kind != "csv":
        data_path, gzipped = _decompressed(path, scratch), False
    contents = {
        "fits": lambda: _open_fits(path, data_path, survey.hdu),
        "parquet": lambda: _open_parquet(path, data_path),
        "votable": lambda: _open_votable(path, data_path),
        "csv": lambda: _open_csv(path, gzipped),
    }[kind]()
    if contents.n_rows == 0:
        raise SurveyError(f"{path} has no rows")
    by_name = {native.name: native for native in contents.natives}
    natives: dict[str, Native] = {}
    columns = {}
    for name, source in survey.columns.items():
        found = _sources_in(path, name, source, by_name)
        keys = []
        for native in found:
            _check_native(path, name, source, native)
            key = native.name if source.element is None else f"{native.name}[{source.element}]"
            natives[key] = _element_of(native, source.element)
            keys.append(key)
        columns[name] = tuple(keys)
    cuts = {}
    for cut in survey.cuts:
        match = find_name(cut.column, by_name)
        if match is not None:
            _check_shape(path, f"cut '{cut.name}'", by_name[match], None)
            cuts[cut.column] = match
            natives[match] = by_name[match]
        elif cut.column not in survey.columns and not cut.optional:
            raise SurveyError(
                f"{path}: no column '{cut.column}', which cut '{cut.name}' needs",
                nearest(cut.column, by_name)
                or "Say optional = true where releases without it shall pass.",
            )
    return Source(
        path=str(path),
        data_path=str(contents.data_path),
        kind=kind,
        index=index,
        n_rows=contents.n_rows,
        natives=natives,
        columns=columns,
        cuts=cuts,
        **contents.layout,
    )


def find_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that is equal, else the only one that is equal but for case, else None."""
    known = list(known)
    if name in known:
        return name
    alike = [item for item in known if item.lower() == name.lower()]
    return alike[0] if len(alike) == 1 else None


def read_native(
    source: Source, start: int, stop: int | None, batch_rows: int
) -> Iterator[tuple[int, dict[str, Values]]]:
    """Read native columns.

    Parameters
    ----------
    source : Source
    start, stop : int
        Rows; of Parquet the bounds of row groups, of text and VOTable all.
    batch_rows : int
        Most rows at once.

    Yields
    ------
    tuple of int and dict
        Number of the first row (from 0) and its columns by their keys: numbers in native byte
        order, text of binary files without padding, text files all as text.

    Raises
    ------
    SurveyError
        The file is damaged or changed since it was opened.
    """
    readers = {
        "fits": _read_fits,
        "parquet": _read_parquet,
        "votable": _read_votable,
        "csv": _read_csv,
    }
    try:
        yield from readers[source.kind](source, start, stop, batch_rows)
    except (OSError, pa.ArrowException, EOFError, zlib.error) as error:
        raise SurveyError(f"{source.path} cannot be read: {error}", _DAMAGED) from error


def text_line(source: Source, row: int) -> int | None:
    """Line of a text file (from 1) that holds a data row (from 0); None for other formats."""
    if source.kind != "csv":
        return None
    with _open_bytes(Path(source.path), source.gzipped) as file:
        for number, line in enumerate(file, start=1):
            if number > source.skip_lines and line.strip(b"\r\n"):
                row -= 1
                if row < 0:
                    return number
    return None


# --- what a file is --------------------------------------------------------------------------


def _first_bytes(path: Path, size: int = 1 << 16) -> tuple[bytes, bool]:
    """First bytes of the content, and whether they came out of gzip."""
    if path.is_dir():
        raise SurveyError(f"{path} is a directory, not a file", "Name the files in it.")
    try:
        with path.open("rb") as file:
            head = file.read(size)
        if head.startswith(_GZIP):
            with gzip.open(path) as packed:
                return packed.read(size), True
    except FileNotFoundError:
        raise SurveyError(f"{path} does not exist") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SurveyError(f"{path}: damaged gzip file: {error}", _DAMAGED) from None
    except OSError as error:
        raise SurveyError(f"{path} cannot be read: {error.strerror or error}") from None
    return head, False


def _kind_of(path: Path, head: bytes) -> str:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not text:
        raise SurveyError(f"{path} is empty", _DAMAGED)
    if head.startswith(b"SIMPLE  ="):
        return "fits"
    if head.startswith(b"PAR1"):
        return "parquet"
    if text.startswith((b"<!doctype html", b"<html")):
        raise SurveyError(
            f"{path} is a web page, not a table", "The download failed: open it to see why."
        )
    if text.startswith((b"<?xml", b"<votable")):
        return "votable"
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            raise SurveyError(f"{path} is {name}-compressed", "Decompress it first.")
    if b"\0" in head:
        raise SurveyError(
            f"{path} is neither FITS, Parquet, VOTable nor delimited UTF-8 text",
            "Convert it, for example with TOPCAT.",
        )
    return "csv"


def _decompressed(path: Path, scratch: Path) -> Path:
    """Decompress a file into the scratch folder, once: the name there holds its size and time."""
    status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    stem = path.name.removesuffix(".gz")
    target = scratch / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{stem}"
    if target.is_file():
        return target
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with gzip.open(path) as packed, temporary.open("wb") as file:
            while block := packed.read(1 << 22):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SurveyError(f"{path}: truncated or damaged gzip file: {error}", _DAMAGED) from None
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise StorageError(f"cannot decompress {path} into {scratch}: {what}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


# --- whether its columns serve ---------------------------------------------------------------


def _sources_in(
    path: Path, name: str, source: SourceColumn, known: Mapping[str, Native]
) -> list[Native]:
    matches = [find_name(wanted, known) for wanted in source.sources]
    found = [known[match] for match in matches if match is not None]
    if len(found) == len(matches) or (found and not source.join):
        return found if source.join else found[:1]
    missing = [s for s, match in zip(source.sources, matches, strict=True) if match is None]
    quoted = "' or '".join(missing)
    hints = [nearest(wanted, known) for wanted in missing]
    raise SurveyError(
        f"{path}: no column '{quoted}', which '{name}' is made from",
        next((hint for hint in hints if hint), f"It has: {', '.join(list(known)[:60])}."),
    )


def _element_of(native: Native, element: int | None) -> Native:
    if element is None:
        return native
    step = np.dtype(native.dtype).itemsize if native.dtype else 0
    return replace(native, element=element, offset=native.offset + element * step)


def _check_shape(path: Path, user: str, native: Native, element: int | None) -> None:
    where = f"{path}: column '{native.name}' ({user})"
    if native.kind not in ("int", "float", "bool", "text"):
        raise SurveyError(f"{where} has format {native.kind}, which is not one value a row")
    if native.width != 1 and element is None:
        many = "a vector" if native.width < 0 else f"a vector of {native.width} values"
        raise SurveyError(f"{where} is {many}", "Say which one is meant: element = 0 is the first.")
    if element is not None and 0 <= native.width <= element:
        raise SurveyError(f"{where} has no element {element}", f"It has {native.width}, from 0.")


def _check_native(path: Path, name: str, source: SourceColumn, native: Native) -> None:
    _check_shape(path, f"for '{name}'", native, source.element)
    where = f"{path}: column '{native.name}'"
    if is_gaia_id(name) and native.kind == "float":
        raise SurveyError(
            f"{where} is stored as float: digits are lost of the 19-digit ids of '{name}'",
            "Get the file with integer or text ids; they cannot be repaired.",
        )
    _check_unit(where, name, source, native)


def is_gaia_id(name: str) -> bool:
    """Whether a column of the product holds ids of 19 digits, which no float can hold."""
    return name.lower().endswith("source_id")


def _check_unit(where: str, name: str, source: SourceColumn, native: Native) -> None:
    if not native.unit or not source.unit or native.unit == source.unit:
        return
    from astropy import units

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stated = units.Unit(native.unit, parse_strict="silent")
        expected = units.Unit(source.unit, parse_strict="silent")
    unknown = units.UnrecognizedUnit
    if isinstance(stated, unknown) or isinstance(expected, unknown):
        return
    is_time = name == "ra" and stated == units.hour  # hours of right ascension
    if stated.is_equivalent(expected):
        is_same = bool(abs(stated.to(expected) - 1) < 1e-9)
    else:
        is_same = not is_time
    if not is_same:
        table = "columns" if name in CANONICAL else "extra"
        unit = "hourangle" if is_time else native.unit
        raise SurveyError(
            f"{where} is in '{native.unit}', the survey says '{source.unit}'",
            f'If the file is right, set unit = "{unit}" in [{table}.{name}].',
        )


# --- FITS ------------------------------------------------------------------------------------

_FITS_TYPES = {
    "L": ("u1", "bool"),
    "B": ("u1", "int"),
    "I": (">i2", "int"),
    "J": (">i4", "int"),
    "K": (">i8", "int"),
    "E": (">f4", "float"),
    "D": (">f8", "float"),
}
_FITS_BYTES = {"C": 8, "M": 16, "P": 8, "Q": 16}


def _open_fits(path: Path, data_path: Path, hdu: int) -> _Contents:
    from astropy.io import fits

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of truncation, which is said with numbers below
            with fits.open(data_path, memmap=True, disable_image_compression=True) as hdus:
                headers = [(item.header, int(item.fileinfo()["datLoc"])) for item in hdus]
    except (OSError, ValueError, KeyError, TypeError, fits.VerifyError) as error:
        raise SurveyError(f"{path}: not a readable FITS file: {error}", _DAMAGED) from None
    kinds = [str(header.get("XTENSION", "")).strip() for header, _ in headers]
    if hdu >= len(headers) or kinds[hdu] != "BINTABLE":
        tables = [
            f"{number} '{header.get('EXTNAME', '')}' ({header['NAXIS2']} rows)"
            for number, (header, _) in enumerate(headers)
            if kinds[number] == "BINTABLE"
        ]
        what = "is no binary table" if hdu < len(headers) else "does not exist"
        raise SurveyError(
            f"{path}: HDU {hdu} {what}",
            f"Tables are in HDU {', '.join(tables)}: set hdu in the survey."
            if tables
            else "It holds no binary table at all.",
        )
    header, offset = headers[hdu]
    row_bytes, n_rows = int(header["NAXIS1"]), int(header["NAXIS2"])
    expected = offset + row_bytes * n_rows + int(header.get("PCOUNT", 0))
    actual = data_path.stat().st_size
    if actual < expected:
        raise SurveyError(
            f"{path} is truncated: {actual} bytes, its header asks for {expected}", _DAMAGED
        )
    try:
        natives = list(_fits_columns(path, header))
    except KeyError as error:
        raise SurveyError(f"{path}: its header is damaged: {error}", _DAMAGED) from None
    layout = {"offset": offset, "row_bytes": row_bytes}
    return _Contents("fits", data_path, natives, n_rows, layout)


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
        width = repeat
        if code == "A":
            dtype, kind, size, width = f"S{repeat}", "text", repeat, 1
        elif code == "X":
            dtype, kind, size = "", form, (repeat + 7) // 8
        elif code in _FITS_BYTES:
            dtype, kind, size = "", form, _FITS_BYTES[code] * repeat
        else:
            dtype, kind = _FITS_TYPES[code]
            size = np.dtype(dtype).itemsize * repeat
            if kind == "int" and not (scale == 1 and float(zero).is_integer()):
                kind = "float"
        if repeat == 0:
            kind = form
        yield Native(
            name=str(header.get(f"TTYPE{number}", f"col{number}")).strip(),
            kind=kind,
            width=width,
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


def _read_fits(
    source: Source, start: int, stop: int | None, batch_rows: int
) -> Iterator[tuple[int, dict[str, Values]]]:
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
            raise SurveyError(f"{source.path} became shorter while it was read", _DAMAGED)
        done += got


def _fits_values(native: Native, column: NDArray[Any]) -> Values:
    if native.kind == "text":
        return _padded_text(column)
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


def _padded_text(column: NDArray[Any]) -> pa.Array:
    """Fixed-width bytes as text; FITS pads with blanks, or ends the text with a NUL."""
    width = column.dtype.itemsize
    buffers = [None, pa.py_buffer(np.ascontiguousarray(column))]
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(column), buffers)
    text = pc.ascii_rtrim(decoded(fixed.cast(pa.binary())), characters=" \0")
    if pc.any(pc.match_substring(text, "\0")).as_py():
        text = pc.replace_substring_regex(text, pattern="(?s)\0.*", replacement="")
    return text


def decoded(column: pa.Array) -> pa.Array:
    """Binary as text: UTF-8, and where it is not, Latin-1 (every byte has a meaning there)."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array(
            [None if v is None else v.decode("latin-1") for v in column.to_pylist()], pa.string()
        )


# --- delimited text --------------------------------------------------------------------------


def _open_csv(path: Path, gzipped: bool) -> _Contents:
    with _open_bytes(path, gzipped) as file:
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
    return _Contents("csv", path, natives, None if has_rows else 0, layout)


@contextlib.contextmanager
def _open_bytes(path: Path, gzipped: bool) -> Iterator[BinaryIO]:
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            yield file  # type: ignore[misc]  # GzipFile has all that is used of BinaryIO
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SurveyError(f"{path}: truncated or damaged gzip file: {error}", _DAMAGED) from None


def _read_csv(
    source: Source, start: int, stop: int | None, batch_rows: int
) -> Iterator[tuple[int, dict[str, Values]]]:
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
            for first, batch in _regrouped(reader, batch_rows):
                yield first, {name: decoded(batch[name].combine_chunks()) for name in types}
        except pa.ArrowInvalid as error:
            _explain_text(source, error)


def _explain_text(source: Source, error: Exception) -> NoReturn:
    """Say which line of a text file is wrong (a second, slow pass)."""
    path = Path(source.path)
    with (
        _open_bytes(path, source.gzipped) as file,
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
    raise SurveyError(f"{path} cannot be read: {error}", _DAMAGED) from error


def _regrouped(
    batches: Iterable[pa.RecordBatch], batch_rows: int
) -> Iterator[tuple[int, pa.Table]]:
    """Tables of exactly ``batch_rows`` rows (the last may be shorter), each with its first row."""
    first, held, n_held = 0, [], 0
    for batch in batches:
        held.append(batch)
        n_held += batch.num_rows
        if n_held >= batch_rows:
            table = pa.Table.from_batches(held)
            while table.num_rows >= batch_rows:
                yield first, table.slice(0, batch_rows)
                first += batch_rows
                table = table.slice(batch_rows)
            held, n_held = table.to_batches(), table.num_rows
    if n_held:
        yield first, pa.Table.from_batches(held)


# --- Parquet ---------------------------------------------------------------------------------


def _open_parquet(path: Path, data_path: Path) -> _Contents:
    try:
        with pq.ParquetFile(data_path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    except (pa.ArrowException, OSError) as error:
        raise SurveyError(f"{path}: not a readable Parquet file: {error}", _DAMAGED) from None
    natives = [_arrow_native(item) for item in schema]
    return _Contents("parquet", data_path, natives, metadata.num_rows, {"group_rows": groups})


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


def _read_parquet(
    source: Source, start: int, stop: int | None, batch_rows: int
) -> Iterator[tuple[int, dict[str, Values]]]:
    bounds = np.concatenate([[0], np.cumsum(source.group_rows)])
    stop = int(bounds[-1]) if stop is None else stop
    groups = np.flatnonzero((bounds[:-1] >= start) & (bounds[1:] <= stop)).tolist()
    names = list(dict.fromkeys(native.name for native in source.natives.values()))
    with pq.ParquetFile(source.data_path) as file:
        batches = file.iter_batches(batch_rows, groups, columns=names, use_threads=False)
        for first, table in _regrouped(batches, batch_rows):
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


# --- VOTable ---------------------------------------------------------------------------------


def _parse_votable(path: Path, data_path: Path) -> Any:
    from astropy.io.votable import parse

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parse(data_path, verify="ignore").get_first_table()
    except Exception as error:  # expat, struct and a family of its own: all mean the same here
        raise SurveyError(f"{path}: not a readable VOTable: {error}", _DAMAGED) from None


def _open_votable(path: Path, data_path: Path) -> _Contents:
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
    return _Contents("votable", data_path, natives, len(table.array))


def _read_votable(
    source: Source, start: int, stop: int | None, batch_rows: int
) -> Iterator[tuple[int, dict[str, Values]]]:
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

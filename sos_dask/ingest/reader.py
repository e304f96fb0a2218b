"""Survey files as they come: what is in them, checks that need no rows, native columns in batches.

Formats are told by content, never by name: FITS binary tables (a gzipped one is decompressed once),
delimited text (ECSV and VizieR's among it), Parquet and VOTable. Only the columns that a survey
needs are read. Each format has a function that tells the `Contents` of a file, and one that reads
`Batches`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.columns import Values, as_array
from sos_dask.errors import CatalogError, SosError, StorageError, SurveyError
from sos_dask.schema import CANONICAL, is_gaia_id, nearest
from sos_dask.storage.artifact import atomic_path, write_text
from sos_dask.storage.manifest import read_sealed, sealed_json, sum_of_file
from sos_dask.storage.objects import as_path, local
from sos_dask.surveys.definition import SourceColumn, Survey

DAMAGED = "Download it again and compare its size and checksum with the survey's."
_GZIP = b"\x1f\x8b"
_KINDS = {b"SIMPLE  =": "fits", b"PAR1": "parquet", b"<?xml": "votable", b"<votable": "votable"}
_PACKED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Native:
    """One column of a survey file."""

    name: str  # as the file spells it
    kind: str  # int, float, bool, text, or the format where it is none of these
    width: int = 1  # values in each row; -1 where rows differ
    element: int | None = None  # the one that is read of a vector
    unit: str = ""  # as the file states it
    # The column that is true where this one has no value, as astropy writes it beside; in a
    # `Source` its key.
    mask: str = ""
    offset: int = 0  # place in a FITS record; of a VOTable the number of the field
    table: int = 0  # FITS: which of the tables that are read side by side
    twin: str = ""  # key of the id in the first of them, to which this one must be equal
    dtype: str = ""  # FITS: NumPy type there, TNULL, TSCAL and TZERO
    null: int | None = None
    scale: float = 1
    zero: float = 0


@dataclass(frozen=True)
class Source:
    """One opened survey file; it has no rows and pickles small."""

    path: str  # as the user gave it
    data_path: str  # what is read: the decompressed copy of a gzipped file, but for text
    kind: str  # fits, csv, parquet or votable
    index: int  # number of the file in the job
    n_rows: int | None  # None for text, which has to be read to be counted
    natives: Mapping[str, Native]  # those needed, by a key of our own (PARAM[0] for an element)
    columns: Mapping[str, tuple[str, ...]]  # of the product -> keys of natives, several if joined
    cuts: Mapping[str, str]  # Cut.column -> key of the native; no columns of the product
    ratios: Mapping[str, float]  # of the product -> unit of the file / unit of the survey, if not 1
    overflow: bool = False  # the service that made the file has cut it off at its limit of rows
    offset: int = 0  # text: where the rows begin
    tables: tuple[tuple[int, int], ...] = ()  # FITS: where the rows begin, and bytes of each
    number: int = 0  # VOTable: which table, from 0
    alone: bool = True  # VOTable: it is the only table
    group_rows: tuple[int, ...] = ()  # Parquet: rows of each row group
    header: tuple[str, ...] = ()  # text: all column names, and how to read it
    delimiter: str = ","
    skip_lines: int = 1


Contents: TypeAlias = tuple[list[Native], int | None, dict[str, Any]]
"""Columns of a file, its rows, and the fields of `Source` that its format has."""
Batches: TypeAlias = Iterator[tuple[int, dict[str, Values]]]
"""Number of the first row (from 0) and the columns by their keys."""


def _format(kind: str) -> tuple[Callable[..., Contents], Callable[..., Batches]]:
    from sos_dask.ingest import fits, tables, text  # which import this module

    return {
        "fits": (fits.open_fits, fits.read_fits),
        "parquet": (tables.open_parquet, tables.read_parquet),
        "votable": (tables.open_votable, tables.read_votable),
        "csv": (text.open_text, text.read_text),
    }[kind]


def open_source(path: Path, survey: Survey, index: int, scratch: Path) -> Source:
    """Find out what a survey file is and where the survey's columns lie in it.

    ``index`` is the number of the file in the job; ``scratch`` is a folder for the decompressed
    copy of a gzipped file, and a copy that is there is reused.

    Raises `SurveyError`: the file is missing, damaged, truncated, empty or of another format, holds
    several tables of which the survey names none, or it lacks a column, has it twice or has it with
    a type or unit that would give wrong values. Raises `StorageError`: the decompressed copy cannot
    be written.
    """
    kind, gzipped = _kind_of(path)
    data_path = _decompressed(path, scratch) if gzipped and kind != "csv" else path
    if kind in ("csv", "parquet") and (survey.hdu or 1) > 1:
        raise SurveyError(f"{path} has one table only, and the survey says hdu = {survey.hdu}")
    with _refused(path):
        known, n_rows, layout = _format(kind)[0](path, local(data_path), survey)
        if n_rows == 0:
            raise SurveyError(f"{path} has no rows")
        found = _Found(path, known, survey)
    of = (found.natives, found.columns, found.cuts, found.ratios)
    return Source(str(path), str(data_path), kind, index, n_rows, *of, **layout)


def read_native(source: Source, start: int, stop: int, batch_rows: int) -> Batches:
    """Read native columns of rows ``start`` to ``stop``, at most ``batch_rows`` at once.

    Of Parquet these are bounds of row groups, of text and VOTable all rows. Numbers come in native
    byte order, text of binary files without padding, text files all as text.

    Raises `SurveyError`: the file is damaged or changed since it was opened.
    """
    with _refused(source.path):
        source = replace(source, data_path=str(local(as_path(source.data_path))))
        for first, values in _format(source.kind)[1](source, start, stop, batch_rows):
            for key, native in source.natives.items():
                if native.mask:
                    values[key] = _masked(values[key], values[native.mask])
                if native.twin:
                    _check_twins(source, first, native, (values[native.twin], values[key]))
            yield first, values


@contextlib.contextmanager
def _refused(path: Path | str) -> Iterator[None]:
    """Make whatever a reader raises of a damaged file a `SurveyError`."""
    try:
        yield
    except SosError:
        raise
    except Exception as error:  # astropy, Arrow, expat, NumPy, gzip: each has its own
        raise SurveyError(
            f"{path} cannot be read: {str(error) or type(error).__name__}", DAMAGED
        ) from error


def _check_twins(source: Source, first: int, native: Native, twins: tuple[Values, Values]) -> None:
    """Raise `SurveyError` where tables that are read side by side have other ids in a row."""
    one, other = (ids if isinstance(ids, pa.Array) else as_array(ids) for ids in twins)
    if not one.equals(other):
        rows = enumerate(zip(one.to_pylist(), other.to_pylist(), strict=True), first)
        for row, (a, b) in rows:
            if a != b:
                raise SurveyError(
                    f"{source.path}: row {row}: '{native.twin}' is {a}, '{native.name}' is {b}",
                    "The rows of these tables do not belong together: download the file again.",
                )


def _masked(values: Values, mask: Values) -> pa.Array:
    """A column, null where its mask is true or unknown."""
    values, mask = (v if isinstance(v, pa.Array) else as_array(v) for v in (values, mask))
    hidden = pc.fill_null(pc.not_equal(mask, 0), True)
    return pc.if_else(hidden, pa.scalar(None, values.type), values)


# --- which format, and the decompressed copy ---------------------------------------------------


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file that may be gzipped; damage of it is a `SurveyError`."""
    try:
        with local(path).open("rb") as file:
            packed = file.peek(2).startswith(_GZIP)
            yield gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[misc]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SurveyError(f"{path}: truncated or damaged gzip file: {error}", DAMAGED) from None


def _kind_of(path: Path) -> tuple[str, bool]:
    """Tell the format of a file by its first bytes, and whether it is gzipped."""
    try:
        with opened(path) as file:
            head, gzipped = file.read(1 << 16), isinstance(file, gzip.GzipFile)
    except FileNotFoundError:
        raise SurveyError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise SurveyError(f"{path} is a directory, not a file", "Name the files in it.") from None
    except OSError as error:
        raise SurveyError(f"{path} cannot be read: {error.strerror or error}") from None
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not text:
        raise SurveyError(f"{path} is empty", DAMAGED)
    for begin, kind in _KINDS.items():
        if head.startswith(begin) or text.startswith(begin):
            return kind, gzipped
    packed = [name for begin, name in _PACKED.items() if head.startswith(begin)]
    if text.startswith((b"<!doctype html", b"<html")):
        what, hint = "a web page, not a table", "The download failed: open it to see why."
    elif packed:
        what, hint = f"{packed[0]}-compressed", "Decompress it first."
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")) or b",\0" in head[:1000]:
        what, hint = "UTF-16 text", "Save it as UTF-8."
    elif b"\0" in head:
        what = "neither FITS, Parquet, VOTable nor delimited UTF-8 text"
        hint = "Convert it, for example with TOPCAT."
    else:
        return "csv", gzipped
    raise SurveyError(f"{path} is {what}", hint)


def _decompressed(path: Path, scratch: Path) -> Path:
    """Decompress a file into the scratch folder, once: the name there contains size and time."""
    status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    stem = path.name.removesuffix(".gz")
    target = scratch / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{stem}"
    stated = target.with_name(f"{target.name}.json")  # unpacked bytes have no checksum
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, CatalogError):
        if read_sealed(stated, "")["sum"] == sum_of_file(target):
            return target
    try:
        with atomic_path(target) as hidden, opened(path) as packed, hidden.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 22)
        write_text(stated, sealed_json({"sum": sum_of_file(target)}))
    except OSError as error:
        raise StorageError(f"cannot decompress {path} into {scratch}: {error.strerror}") from error
    return target


# --- whether the columns of a file serve a survey: names, shapes, types and units ---------------


class _Found:
    """The columns of a file that a survey needs, by key, with their masks."""

    def __init__(self, path: Path, known: list[Native], survey: Survey) -> None:
        self._path, self._known, self._allow = path, known, survey.allow
        self.natives: dict[str, Native] = {}
        self.ratios: dict[str, float] = {}
        self.columns = {
            name: tuple(self._column(name, source)) for name, source in survey.columns.items()
        }
        for key in self.columns["obs_id"]:
            for other in known:
                if other.table and other.name.partition(".")[2].lower() == key.lower():
                    self._add(replace(other, twin=key))
        self.cuts: dict[str, str] = {}
        for cut in survey.cuts.values():
            native = self._named(cut.column)
            if native is not None:
                self._check_shape(f"cut '{cut.name}'", native, None)
                self.cuts[cut.column] = self._add(native)
            elif cut.column not in survey.columns and not cut.optional:
                raise SurveyError(
                    f"{path}: no column '{cut.column}', which cut '{cut.name}' needs",
                    nearest(cut.column, [native.name for native in known])
                    or "Set optional = true if releases without it are accepted.",
                )

    def _named(self, name: str) -> Native | None:
        """The column of that name, else the only one that is equal but for case."""
        alike = [item for item in self._known if item.name.lower() == name.lower()]
        alike = [item for item in alike if item.name == name] or alike
        if len(alike) > 1:
            names = "', '".join(native.name for native in alike)
            what = f"{self._path}: column '{name}' is there {len(alike)} times: '{names}'"
            raise SurveyError(what, "Rename or remove all but one.")
        return alike[0] if alike else None

    def _column(self, name: str, source: SourceColumn) -> Iterator[str]:
        """Keys of what one column of the product is made from: one native, or all joined."""
        found = {wanted: self._named(wanted) for wanted in source.sources}
        matches = list(filter(None, found.values()))
        missing = [wanted for wanted, native in found.items() if native is None]
        if missing and (source.join or not matches):
            names = list(dict.fromkeys(native.name for native in self._known))
            hints = (nearest(wanted, names) for wanted in missing)
            what = f"{self._path}: no column {either(missing)}, which '{name}' is made from"
            raise SurveyError(what, next(filter(None, hints), f"It has: {', '.join(names[:60])}."))
        for native in matches if source.join else matches[:1]:
            self._check_shape(f"for '{name}'", native, source.element)
            where = f"{self._path}: column '{native.name}'"
            if is_gaia_id(name) and native.kind == "float":
                raise SurveyError(
                    f"{where} is stored as float: digits are lost of the 19-digit ids of '{name}'",
                    "Get the file with integer or text ids; they cannot be repaired.",
                )
            ratio = _ratio(where, source, native.unit, self._allow)
            if ratio != 1.0:
                self.ratios[name] = ratio
            yield self._add(native, source.element)

    def _check_shape(self, user: str, native: Native, element: int | None) -> None:
        """Raise `SurveyError` where a column has not one number or text a row."""
        if native.kind not in ("int", "float", "bool", "text"):
            problem = f"has the type {native.kind}, which is neither one number nor one text a row"
            hint = "Convert it to a number or to text."
        elif native.width != 1 and element is None:
            problem = "is a vector" + (f" of {native.width} values" if native.width >= 0 else "")
            hint = "Name the one that is meant: element = 0 is the first."
        elif element is not None and 0 <= native.width <= element:
            problem, hint = f"has no element {element}", f"It has {native.width}, from 0."
        else:
            return
        raise SurveyError(f"{self._path}: column '{native.name}' ({user}) {problem}", hint)

    def _add(self, native: Native, element: int | None = None) -> str:
        """Add a column, or an element of it, to those that are read, with its mask; its key."""
        masks = [n for n in self._known if n.name == (native.mask or f"{native.name}.mask")]
        if native.mask and len(masks) != 1:
            what = f"in a column '{native.mask}', which is there {len(masks)} times"
            hint = "Without it values would be read that its writer took for none."
            raise SurveyError(f"{self._path}: column '{native.name}' has its mask {what}", hint)
        # Another program may have dropped what astropy states and kept its columns.
        is_mask = len(masks) == 1 and masks[0].kind == "bool"
        mask = self._add(masks[0], element) if is_mask else ""
        key = native.name
        if element is not None:
            key += f"[{element}]"
            step = np.dtype(native.dtype).itemsize if native.dtype else 0  # FITS alone has a dtype
            native = replace(native, element=element, offset=native.offset + element * step)
        self.natives[key] = replace(native, mask=mask)
        return key


def _ratio(where: str, source: SourceColumn, stated: str, allow: Collection[str]) -> float:
    """Unit that a file states over that of the survey; `SurveyError` where there is none."""
    if not stated or not source.unit or stated == source.unit:
        return 1.0
    from astropy import units

    plain = re.sub("(?i)^decimal |(?<=[a-z]{3})s$", "", stated)  # decimal degrees, Kelvins
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = (units.Unit(u, parse_strict="silent") for u in (stated, plain, source.unit))
        found, plain, expected = read
    found = plain if str(found.physical_type) == "unknown" else found
    if source.name == "ra" and found == units.hour:
        found = units.hourangle
    is_plain = isinstance(found, units.UnitBase)  # no logarithm
    if is_plain and found.is_equivalent(expected):
        ratio = float(found.to(expected))
        return 1.0 if abs(ratio - 1) < 1e-9 else ratio
    kind = str(found.physical_type)
    # Logarithms and ratios are written in many ways; lengths, times, angles are not.
    is_same = kind == "unknown" and "unknown_unit" in allow
    if str(expected.physical_type) in ("dimensionless", "unknown"):
        is_same = not is_plain or kind in ("dimensionless", "unknown", "acceleration")
    if not is_same:
        table = "columns" if source.name in CANONICAL else "extra"
        hint = f"Correct the unit in [{table}.{source.name}], or the file: they do not convert."
        if kind == "unknown":
            hint = 'If it is the same, set allow = ["unknown_unit"] in the survey.'
        raise SurveyError(f"{where} is in '{stated}', the survey says '{source.unit}'", hint)
    return 1.0


# --- what several formats share -----------------------------------------------------------------


def either(names: Iterable[str]) -> str:
    """Names of columns for a message: 'a' or 'b'."""
    return "'" + "' or '".join(names) + "'"


def decoded(column: pa.Array) -> pa.Array:
    """Binary as text: UTF-8, and where it is not, Latin-1 (every byte has a meaning there)."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        texts = (None if v is None else v.decode("latin-1") for v in column.to_pylist())
        return pa.array(texts, pa.string())


def regrouped(batches: Iterable[pa.RecordBatch], batch_rows: int) -> Iterator[tuple[int, pa.Table]]:
    """Tables of exactly ``batch_rows`` rows (the last may be shorter), each with its first row.

    Raises `ValueError` where rows are so long that a table would take gigabytes.
    """
    first, held, n_held, n_bytes = 0, [], 0, 0
    for batch in batches:
        held.append(batch)
        n_held += batch.num_rows
        n_bytes += batch.nbytes
        if n_bytes > 1 << 29 and n_bytes > n_held << 12:
            raise ValueError(f"{n_held} rows take {n_bytes >> 20} MiB: texts are too long")
        while n_held >= batch_rows:
            table = pa.Table.from_batches(held)
            yield first, table.slice(0, batch_rows)
            first += batch_rows
            table = table.slice(batch_rows)
            held, n_held, n_bytes = table.to_batches(), table.num_rows, table.nbytes
    if n_held:
        yield first, pa.Table.from_batches(held)

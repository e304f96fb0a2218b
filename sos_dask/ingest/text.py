"""Delimited text: every column as text, so that a bad number is known with its line.

CSV and its kin, with ``#`` comments before the header or a header that is one, ECSV (its YAML
header states types, units and masks) and VizieR's TSV (a row of units and one of dashes).
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from sos_dask.errors import SurveyError
from sos_dask.ingest.reader import Batches, Contents, Native, Source, decoded, opened, regrouped
from sos_dask.schema import is_gaia_id
from sos_dask.storage.objects import as_path
from sos_dask.surveys.definition import Survey

_BLOCK_BYTES = 1 << 20  # no row is longer
_COMMENT_BYTES = 1 << 24
_OTHERS = {
    "mrt": rb"(?im)^Byte-by-byte Description of file",
    "ipac": rb"(?m)\A(\\.*\n)*\|.*\|\s*\n(\|\s*-*[a-z]+\s*)+\|\s*$",
}
_FORTRAN = r"^([+-]?[0-9.]+)[dD]([+-]?[0-9]+)$"
_NULL_NUMBERS = ("", "nan", "NaN", "NAN", "null", "NULL", "None")
_TRUTH = {"false": 0, "f": 0, "0": 0, "true": 1, "t": 1, "1": 1, "": None, "null": None}


def open_text(path: Path, data_path: Path, survey: Survey) -> Contents:
    """Find out what delimited text contains, from its first lines."""
    with opened(path) as file:
        _refuse_others(path, file.read(1 << 16))
        file.seek(0)
        comments, line = _head(path, file)
        offset, skip_lines = file.tell(), len(comments) + 1
        following = list(islice(_lines(path, file, skip_lines), 2))
        file.seek(offset)
        has_rows = any(block.strip() for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
    comments = [comment for comment in comments if comment.startswith("#")]
    stated: dict[str, dict[str, Any]] = {}  # of each column: its unit and type, as astropy does
    masks: dict[str, str] = {}
    if comments and re.match(r"# ?%ECSV", comments[0]):
        yaml = [comment[1:].removeprefix(" ").rstrip("\r\n") for comment in comments[1:]]
        stated, masks = stated_by_astropy(yaml)
        delimiter = "," if re.search(r"^delimiter: *['\"]?,", "\n".join(yaml), re.M) else " "
    else:
        unquoted = re.sub(r'"[^"]*"', "", line)
        delimiter = max(",|;\t", key=unquoted.count)
        delimiter = delimiter if delimiter in unquoted else " "
        values = _fields(line, delimiter) if comments else []
        if any(map(_is_number, values)):
            # The header is a comment: the last that has a name for each value.
            skip_lines, offset = skip_lines - 1, offset - len(_encoded(line))
            following, has_rows = [line, *following], True
            fitting = (c for c in comments[::-1] if len(_fields(c[1:], delimiter)) == len(values))
            line = next(fitting, comments[-1])[1:].lstrip()
    header = _fields(line, delimiter)
    if delimiter == " " and re.search(r"\.fits?(\.|$)", path.name.lower()):
        hint = "Download it again; a table of text may have any other name, like .csv."
        raise SurveyError(f"{path} is not a FITS file: it begins with {line:.80}", hint)
    if len(header) < 2:
        what = f"{path}: its first line has none of the delimiters , | ; tab and blank: {line:.80}"
        raise SurveyError(what, "The first line must contain the column names.")
    below = _below_vizier(following[:2], delimiter)
    offset += sum(len(_encoded(text)) for text in following[:below])
    if below == 2:
        units = zip(header, _fields(following[0], delimiter), strict=False)
        stated = {name: {"unit": unit} for name, unit in units}
    counts = Counter(header)
    natives = [_native(name, counts, stated.get(name, {}), masks) for name in header if name]
    # Arrow takes no name twice; the survey uses none of these.
    names = (n if n and counts[n] == 1 else f"\0{place}" for place, n in enumerate(header))
    layout = {"header": tuple(names), "delimiter": delimiter, "offset": offset}
    return natives, None if has_rows else 0, layout | {"skip_lines": skip_lines + below}


def _native(name: str, known: Counter[str], item: dict[str, Any], masks: dict[str, str]) -> Native:
    is_mask = name in masks.values() or (name[-5:] == ".mask" and name[:-5] in known)
    kind = "bool" if item.get("datatype") == "bool" or is_mask else "text"
    kind, unit = str(item.get("subtype") or kind), str(item.get("unit") or "")
    return Native(name, kind, unit=unit, mask=masks.get(name, ""))


def stated_by_astropy(lines: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Read the YAML header that astropy writes into ECSV and Parquet.

    Returns what is stated of each column (``datatype``, ``unit``, ...), and the column with its
    mask of each that has one.
    """
    from astropy.table.meta import get_header_from_yaml

    header = get_header_from_yaml(lines)
    masks = dict(_masks((header.get("meta") or {}).get("__serialized_columns__")))
    return {str(item["name"]): dict(item) for item in header["datatype"]}, masks


def _masks(node: Any, mask: str = "") -> Iterator[tuple[str, str]]:
    """Columns with the mask that stands beside them at any depth of astropy's description."""
    if not isinstance(node, Mapping):
        return
    own = node.get("mask")
    if isinstance(own, Mapping) and isinstance(own.get("name"), str):
        mask = own["name"]
    if mask and isinstance(node.get("name"), str):
        yield node["name"], mask
    for key, item in node.items():
        if key != "mask":
            yield from _masks(item, mask)


def _below_vizier(following: list[str], delimiter: str) -> int:
    """Lines between header and rows in VizieR's text: units and dashes, dashes alone, or none."""
    for number, line in enumerate(following):
        if re.fullmatch(r"[-\s,|;]*-{2,}[-\s,|;]*", line):
            # A number in the line above: it is a row of data, and so is this one.
            is_row = number == 1 and any(map(_is_number, _fields(following[0], delimiter)))
            return 0 if is_row else number + 1
    return 0


def _refuse_others(path: Path, head: bytes) -> None:
    """Raise `SurveyError` of tables of text whose columns no delimiter parts."""
    for name, pattern in _OTHERS.items():
        if re.search(pattern, head.removeprefix(b"\xef\xbb\xbf")):
            raise SurveyError(
                f"{path} is a table of the format {name.upper()}, which is not read",
                'Convert it: python -c "from astropy.table import Table; '
                f"Table.read('{path.name}', format='ascii.{name}').write('table.fits')\"",
            )


def _head(path: Path, file: BinaryIO) -> tuple[list[str], str]:
    """Blank lines and comments before the first line of another kind, and that line."""
    before: list[str] = []
    n_bytes = 0
    for line in _lines(path, file):
        if line.strip() and not line.startswith("#"):
            if line.count('"') % 2 or "\r" in line.rstrip("\r\n"):
                what = f"{path}: line {len(before) + 1}, the header, has a line break in it"
                raise SurveyError(what, "Line ends are LF or CR LF, and names have no line breaks.")
            return before, line
        before.append(line)
        n_bytes += len(line)
        if n_bytes > _COMMENT_BYTES:
            raise SurveyError(f"{path}: its first {n_bytes >> 20} MiB are blank or comments")
    return before, before.pop() if before else ""


def _lines(path: Path | str, file: BinaryIO, number: int = 0) -> Iterator[str]:
    """Lines of bounded length after so many; a byte that is not UTF-8 is kept as a surrogate."""
    while line := file.readline(_BLOCK_BYTES + 1):
        number += 1
        if len(line) > _BLOCK_BYTES:
            what = f"{path}: line {number} is too long, over {_BLOCK_BYTES >> 20} MiB"
            raise SurveyError(what, "It is not a table of text, or its line ends are lost.")
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        yield line.decode("utf-8", "surrogateescape")


def _encoded(line: str) -> bytes:
    """Bytes of a line as they are in the file."""
    return line.encode("utf-8", "surrogateescape")


def _fields(line: str, delimiter: str) -> list[str]:
    """Stripped values of one line."""
    line = _encoded(line).decode("latin-1" if re.search("[\udc80-\udcff]", line) else "utf-8")
    if delimiter == " ":
        line = " ".join(line.split())
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[+-]?\.?[0-9][0-9.]*([eEdD][+-]?[0-9]+)?", text))


class _Rows(io.RawIOBase):
    """Text below the header; where blanks part it, one for each run of them outside quotes."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        file.seek(source.offset)
        self._file, self._blanks, self._held = file, source.delimiter == " ", b""
        self.n_lines, self.quoted = 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._held:
            block = self._file.read(_BLOCK_BYTES)
            if not block:
                return 0
            block += self._file.readline(_BLOCK_BYTES)
            self.n_lines += block.count(b"\n") + (block[-1:] != b"\n")
            self.quoted = self.quoted or b'"' in block
            if self._blanks:
                block = re.sub(rb'("[^"]*")|[ \t]+', lambda match: match[1] or b" ", block)
                block = re.sub(rb"(?m)^ +| +(?=\r?$)", b"", block)
            self._held = block
        n = min(len(target), len(self._held))
        target[:n], self._held = self._held[:n], self._held[n:]
        return n


def read_text(source: Source, start: int, stop: int, batch_rows: int) -> Batches:
    """Native columns of delimited text, as `read_native` gives them."""
    # All as text: numbers are cast later at the same cost, and a bad one is known with its row.
    natives = source.natives.values()
    types = {native.name: pa.binary() for native in natives}
    n_rows = 0
    with opened(as_path(source.path)) as file:
        below = _Rows(source, file)
        options = (
            pa_csv.ReadOptions(
                use_threads=False, block_size=_BLOCK_BYTES, column_names=source.header
            ),
            pa_csv.ParseOptions(delimiter=source.delimiter, newlines_in_values=True),
            pa_csv.ConvertOptions(column_types=types, include_columns=list(types)),
        )
        try:
            content = pa.PythonFile(io.BufferedReader(below, _BLOCK_BYTES), "r")
            with pa_csv.open_csv(content, *options) as reader:
                for first, batch in regrouped(reader, batch_rows):
                    n_rows = first + batch.num_rows
                    texts = {name: decoded(batch[name].combine_chunks()) for name in types}
                    for native in natives:
                        if native.kind == "bool":
                            texts[native.name] = _truth(source, native.name, texts[native.name])
                    yield first, texts
        except pa.ArrowInvalid:
            deque(_rows(source, strict=False), 0)
            raise
        if below.quoted and below.n_lines > n_rows:
            # A quote that is not closed swallows rows, and Arrow does not mind.
            deque(_rows(source, strict=True), 0)


def _truth(source: Source, name: str, text: pa.Array) -> pa.Array:
    words = pc.utf8_lower(pc.ascii_trim_whitespace(text))
    place = pc.index_in(words, value_set=pa.array(list(_TRUTH)))
    if place.null_count > words.null_count:
        word = words.filter(pc.is_null(place)).drop_null()[0]
        raise SurveyError(f"{source.path}: column '{name}': '{word}' is neither True nor False")
    return pa.array(list(_TRUTH.values()), pa.int8()).take(place)


def _rows(source: Source, strict: bool) -> Iterator[int]:
    """Number of the first line of each row; raise `SurveyError` of one that is wrong (slow)."""
    begin, n_fields = source.skip_lines + 1, len(source.header)
    with opened(as_path(source.path)) as file:
        below = io.BufferedReader(_Rows(source, file), _BLOCK_BYTES)
        lines = _lines(source.path, below, source.skip_lines)
        rows = csv.reader(lines, delimiter=source.delimiter, strict=strict)
        try:
            for row in rows:
                if len(row) not in (0, n_fields):
                    what = f"line {begin} has {len(row)} fields, the header has {n_fields}"
                    hint = "The file is damaged or truncated, or a field with the delimiter in it "
                    raise SurveyError(f"{source.path}: {what}", f"{hint}is not quoted.")
                if row:
                    yield begin
                begin = source.skip_lines + rows.line_num + 1
        except csv.Error as error:
            what = f"line {begin}: a quoted text does not end where a field ends: {error}"
            hint = "Close the quote, or write quotes inside a quoted text twice."
            raise SurveyError(f"{source.path}: {what}", hint) from None


# --- numbers that stand as text ----------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Origin of values, which the message of a bad one names."""

    source: Source
    survey: Survey
    first_row: int

    def fail(self, key: str, index: int, problem: str, hint: str = "") -> NoReturn:
        """Raise `SurveyError` of one value, which stands in this row of the batch."""
        row = self.first_row + index
        where = f"row {row}"
        if self.source.kind == "csv":
            for line in islice(_rows(self.source, strict=False), row, row + 1):
                where += f" (line {line})"
        raise SurveyError(f"{self.source.path}: column '{key}', {where}: {problem}", hint)


def whole_numbers(place: Place, key: str, numbers: NDArray[Any]) -> NDArray[np.int64]:
    """Integers that a file has as floats, as long as none can have lost a digit."""
    limit = 2.0**24 if numbers.dtype.itemsize == 4 else 2.0**53
    for index in np.flatnonzero((np.abs(numbers) >= limit) | (numbers != np.rint(numbers))):
        place.fail(key, int(index), *_not_whole(numbers[index], limit))
    return numbers.astype(np.int64)


def _not_whole(number: float, limit: float) -> tuple[str, str]:
    is_large = abs(number) >= limit
    problem = "is stored as float: digits are lost" if is_large else "is not an integer"
    return f"{number!s} {problem}", "Get the file with integer or text ids."


def parse_numbers(
    place: Place, key: str, text: pa.Array, kind: pa.DataType, product: str = ""
) -> pa.Array:
    """Text as int64 or float64; the survey's words for no value are null.

    ``product`` is the column that they are for. In one of ids a float is an error: it lost digits.
    """
    words = list(dict.fromkeys((*_NULL_NUMBERS, *place.survey.missing_text)))
    if not any(map(_is_number, words)):
        with contextlib.suppress(pa.ArrowInvalid):
            return text.cast(kind)
    text = pc.ascii_trim_whitespace(text)
    text = pc.if_else(pc.is_in(text, value_set=pa.array(words)), None, text)
    with contextlib.suppress(pa.ArrowInvalid):
        return text.cast(kind)
    numbers: list[float | None] = []
    for index, word in enumerate(text.to_pylist()):  # 5.0 and 1e3 are integers, 1.5D+03 a number
        try:
            numbers.append(None if word is None else _number(word, kind == pa.int64(), product))
        except ValueError as error:
            place.fail(key, index, *error.args)
    return pa.array(numbers, kind)


def _number(word: str, is_whole: bool, product: str) -> float | None:
    """One number, null where it is not finite; raise `ValueError` of what is wrong and a hint."""
    if is_whole and re.fullmatch(r"[+-]?[0-9]+", word):
        if len(word) > 20 or not -(2**63) <= int(word) < 2**63:
            raise ValueError(f"'{word}' does not fit into 64 bits", _word_hint(word, product))
        return int(word)
    try:
        number = float(re.sub(_FORTRAN, r"\1e\2", word.replace("_", "?")))
    except ValueError:
        what = "an integer" if is_whole else "a number"
        raise ValueError(f"'{word}' is not {what}", _word_hint(word, product)) from None
    if not math.isfinite(number):
        return None
    if is_whole and is_gaia_id(product) and number > 0:
        hint = "Get the file with integer ids; these cannot be repaired."
        raise ValueError(f"the id '{word}' is stored as float: digits are lost", hint)
    if is_whole and (abs(number) >= 2.0**53 or not number.is_integer()):
        raise ValueError(*_not_whole(number, 2.0**53))
    return int(number) if is_whole else number


def _word_hint(word: str, product: str) -> str:
    if product == "obs_id":
        return 'If the keys are text, set dtype = "string" in [columns.obs_id] of the survey.'
    if ":" in word:
        return "Sexagesimal coordinates are not read: convert them to degrees."
    if re.fullmatch(r"[+-]?[0-9.]+(,[0-9.]+)+", word):
        return "Numbers with commas are not read: write 1234.5, without a separator of thousands."
    return (
        f'If it means "no value", add it to the survey: missing_text = ["{word:.40}"]; '
        'if the column is text, set its dtype = "string".'
    )

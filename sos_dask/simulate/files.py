"""FITS and Parquet files, written piece by piece, and complete or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.errors import StorageError
from sos_dask.simulate.columns import NativeColumn

_BLOCK = 2880
_ROW_GROUP = 131_072


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            "Free space or choose another directory.",
        ) from error


class _AtomicFile:
    """A file that appears under its name only when all of it is on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hidden = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with _storage_errors(path):
            self._file = self._hidden.open("w+b")

    def _close(self) -> None:
        """Write what is left."""

    def _discard(self) -> None:
        """Let go of what writes to the file."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with _storage_errors(self.path):
                    self._close()
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    self._hidden.replace(self.path)
        finally:
            self._discard()
            self._file.close()
            self._hidden.unlink(missing_ok=True)


def _card(key: str, value: str | int | bool, comment: str = "") -> bytes:
    if isinstance(value, bool):
        text = f"{'T' if value else 'F':>20}"
    elif isinstance(value, int):
        text = f"{value:>20}"
    else:
        text = f"'{value:<8}'"
    return f"{key:<8}= {text}{' / ' + comment if comment else ''}".ljust(80)[:80].encode("ascii")


def _header(cards: Sequence[bytes]) -> bytes:
    text = b"".join(cards) + b"END".ljust(80)
    return text.ljust(-(-len(text) // _BLOCK) * _BLOCK)


def primary_header() -> bytes:
    """Header of an empty primary HDU."""
    return _header(
        [_card("SIMPLE", True), _card("BITPIX", 8), _card("NAXIS", 0), _card("EXTEND", True)]
    )


def table_header(columns: Sequence[NativeColumn], row_bytes: int, n_rows: int, name: str) -> bytes:
    """Header of a binary table (FITS standard 4.0, section 7.3)."""
    cards = [
        _card("XTENSION", "BINTABLE"),
        _card("BITPIX", 8),
        _card("NAXIS", 2),
        _card("NAXIS1", row_bytes),
        _card("NAXIS2", n_rows),
        _card("PCOUNT", 0),
        _card("GCOUNT", 1),
        _card("TFIELDS", len(columns)),
        _card("EXTNAME", name),
    ]
    for number, column in enumerate(columns, 1):
        cards += [_card(f"TTYPE{number}", column.name), _card(f"TFORM{number}", column.form)]
        if column.unit:
            cards.append(_card(f"TUNIT{number}", column.unit))
        if column.shape:
            cards.append(_card(f"TDIM{number}", f"({','.join(map(str, column.shape[::-1]))})"))
    return _header(cards)


def padded(data: bytes) -> bytes:
    """Data of an HDU, filled to whole blocks with zeros."""
    return data + bytes(-len(data) % _BLOCK)


def image_hdu(values: NDArray[np.int32]) -> bytes:
    """An image extension of one dimension."""
    cards = [
        _card("XTENSION", "IMAGE"),
        _card("BITPIX", 32),
        _card("NAXIS", 1),
        _card("NAXIS1", len(values)),
        _card("PCOUNT", 0),
        _card("GCOUNT", 1),
    ]
    return _header(cards) + padded(values.astype(">i4").tobytes())


def table_hdu(columns: Sequence[NativeColumn], rows: NDArray[Any], name: str) -> bytes:
    """A small binary table as a whole."""
    header = table_header(columns, rows.dtype.itemsize, len(rows), name)
    return header + padded(rows.tobytes())


class FitsTable(_AtomicFile):
    """A FITS file with one long table, whose rows come in pieces and in any order.

    Parameters
    ----------
    path : Path
    columns, dtype : sequence of NativeColumn, numpy dtype
        The table and its packed record.
    n_rows : int
        Final number of rows; the header is written first.
    name : str
        EXTNAME.
    trailer : bytes
        Whole HDUs that follow.

    Raises
    ------
    StorageError
        The file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[NativeColumn],
        dtype: np.dtype[Any],
        n_rows: int,
        name: str,
        trailer: bytes = b"",
    ) -> None:
        super().__init__(path)
        self._dtype, self._n_rows, self._trailer = dtype, n_rows, trailer
        header = primary_header() + table_header(columns, dtype.itemsize, n_rows, name)
        self._start = len(header)
        with _storage_errors(path):
            self._file.write(header)

    def __enter__(self) -> FitsTable:
        return self

    def write(self, first_row: int, rows: NDArray[Any]) -> None:
        """Put rows at their place."""
        with _storage_errors(self.path):
            self._file.seek(self._start + first_row * self._dtype.itemsize)
            self._file.write(np.ascontiguousarray(rows).data)

    def read(self, row: int) -> NDArray[Any]:
        """One row that was written before."""
        self._file.seek(self._start + row * self._dtype.itemsize)
        return np.frombuffer(self._file.read(self._dtype.itemsize), dtype=self._dtype)

    def _close(self) -> None:
        size = self._n_rows * self._dtype.itemsize
        self._file.seek(self._start + size)
        self._file.write(bytes(-size % _BLOCK) + self._trailer)


class ParquetTable(_AtomicFile):
    """A Parquet file whose row groups are of one size, however its rows come.

    Parameters
    ----------
    path : Path
    schema : pyarrow.Schema

    Raises
    ------
    StorageError
        The file cannot be written.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        super().__init__(path)
        # Dictionaries of floats cost ten times the processor time and more bytes.
        self._writer = pq.ParquetWriter(
            self._file, schema, compression="zstd", compression_level=1, use_dictionary=["survey"]
        )
        self._waiting: list[pa.Table] = []
        self._n_waiting = 0

    def __enter__(self) -> ParquetTable:
        return self

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self._waiting.append(table)
        self._n_waiting += table.num_rows
        if self._n_waiting >= _ROW_GROUP:
            self._flush(self._n_waiting // _ROW_GROUP * _ROW_GROUP)

    def _flush(self, n_rows: int) -> None:
        table = pa.concat_tables(self._waiting)
        with _storage_errors(self.path):
            # A copy in one piece: page limits, and so bytes, depend on the chunks of a column.
            for start in range(0, n_rows, _ROW_GROUP):
                group = table.slice(start, min(_ROW_GROUP, n_rows - start)).combine_chunks()
                self._writer.write_table(group, row_group_size=_ROW_GROUP)
        self._waiting = [table.slice(n_rows)]
        self._n_waiting = table.num_rows - n_rows

    def _close(self) -> None:
        if self._n_waiting:
            self._flush(self._n_waiting)
        self._writer.close()

    def _discard(self) -> None:
        # A writer that is left open would write when it is collected, to a closed file.
        with suppress(Exception):
            self._writer.close()

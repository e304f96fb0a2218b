"""Pieces: intermediate tables as Arrow files, which are memory-mapped."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from sos_dask.storage.artifact import atomic_path


def write_piece(path: Path, table: pa.Table) -> None:
    """Keep an intermediate table as an Arrow file, written atomically."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def read_piece(path: Path) -> pa.Table:
    """An intermediate table, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def copied(rows: pa.Table) -> pa.Table:
    """Rows of a memory-mapped piece in memory of their own, so that the piece is let go.

    Of a mapped file far more than the rows themselves counts as memory of the process: up to 2 MB
    around each place that is looked at, in every column of every piece.
    """
    return pa.concat_tables([rows, rows.slice(0, 0)]).combine_chunks()

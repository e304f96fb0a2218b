"""Survey files as they come: what is in them, checks that need no rows, native columns in batches.

Formats are told by content, never by name: FITS binary tables (a gzipped one is decompressed once),
delimited text, Parquet and VOTable. Only the columns that a survey needs are read.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import pyarrow as pa

from sos_dask.errors import SurveyError
from sos_dask.ingest.readers.columns import check_native, check_shape, element_of, sources_in
from sos_dask.ingest.readers.common import DAMAGED, Batches, Native, Source
from sos_dask.ingest.readers.files import decompressed, first_bytes, kind_of
from sos_dask.ingest.readers.fits import open_fits, read_fits
from sos_dask.ingest.readers.tables import open_parquet, open_votable, read_parquet, read_votable
from sos_dask.ingest.readers.text import open_text, read_text, text_line
from sos_dask.schema import find_name, nearest
from sos_dask.survey import Survey

__all__ = ["Native", "Source", "open_source", "read_native", "text_line"]


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
    head, gzipped = first_bytes(path)
    kind = kind_of(path, head)
    data_path = path
    if gzipped and kind != "csv":
        data_path, gzipped = decompressed(path, scratch), False
    contents = {
        "fits": lambda: open_fits(path, data_path, survey.hdu),
        "parquet": lambda: open_parquet(path, data_path),
        "votable": lambda: open_votable(path, data_path),
        "csv": lambda: open_text(path, gzipped),
    }[kind]()
    if contents.n_rows == 0:
        raise SurveyError(f"{path} has no rows")
    by_name = {native.name: native for native in contents.natives}
    natives: dict[str, Native] = {}
    columns = {}
    for name, source in survey.columns.items():
        found = sources_in(path, name, source, by_name)
        keys = []
        for native in found:
            check_native(path, name, source, native)
            key = native.name if source.element is None else f"{native.name}[{source.element}]"
            natives[key] = element_of(native, source.element)
            keys.append(key)
        columns[name] = tuple(keys)
    cuts = {}
    for cut in survey.cuts:
        match = find_name(cut.column, by_name)
        if match is not None:
            check_shape(path, f"cut '{cut.name}'", by_name[match], None)
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
        data_path=str(data_path),
        kind=kind,
        index=index,
        n_rows=contents.n_rows,
        natives=natives,
        columns=columns,
        cuts=cuts,
        **contents.layout,
    )


def read_native(source: Source, start: int, stop: int | None, batch_rows: int) -> Batches:
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
        order, text of binary files without padding (of FITS a dictionary where it is short), text
        files all as text.

    Raises
    ------
    SurveyError
        The file is damaged or changed since it was opened.
    """
    readers = {
        "fits": read_fits,
        "parquet": read_parquet,
        "votable": read_votable,
        "csv": read_text,
    }
    try:
        yield from readers[source.kind](source, start, stop, batch_rows)
    except (OSError, pa.ArrowException, EOFError, zlib.error) as error:
        raise SurveyError(f"{source.path} cannot be read: {error}", DAMAGED) from error

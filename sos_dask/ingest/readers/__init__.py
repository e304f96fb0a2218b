"""Survey files as they come: what is in them, checks that need no rows, native columns in batches.

Formats are told by content, never by name: FITS binary tables (a gzipped one is decompressed once),
delimited text (ECSV and VizieR's among it), Parquet and VOTable. Only the columns that a survey
needs are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sos_dask.errors import SosError, SurveyError
from sos_dask.ingest.readers.columns import (
    check_native,
    check_shape,
    column_named,
    element_of,
    sources_in,
)
from sos_dask.ingest.readers.common import DAMAGED, Batches, Contents, Native, Source, masked
from sos_dask.ingest.readers.files import decompressed, first_bytes, kind_of
from sos_dask.ingest.readers.fits import open_fits, read_fits
from sos_dask.ingest.readers.parquet import open_parquet, read_parquet
from sos_dask.ingest.readers.text import open_text, read_text, text_line
from sos_dask.ingest.readers.votable import open_votable, read_votable
from sos_dask.schema import nearest
from sos_dask.surveys.definition import Survey

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
        The file is missing, damaged, truncated, empty or of another format, holds several tables
        of which the survey names none, or it lacks a column, has it twice or has it with a type or
        unit that would give wrong values.
    StorageError
        The decompressed copy cannot be written.
    """
    head, gzipped = first_bytes(path)
    kind = kind_of(path, head)
    data_path = path
    if gzipped and kind != "csv":
        data_path, gzipped = decompressed(path, scratch), False
    if kind in ("csv", "parquet") and (survey.hdu or 1) > 1:
        raise SurveyError(f"{path} has one table only, and the survey says hdu = {survey.hdu}")
    with _refused(path):
        contents = {
            "fits": lambda: open_fits(path, data_path, survey.hdu),
            "parquet": lambda: open_parquet(path, data_path),
            "votable": lambda: open_votable(path, data_path, survey),
            "csv": lambda: open_text(path, gzipped),
        }[kind]()
        return _source(path, data_path, kind, index, survey, contents)


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


def _source(
    path: Path, data_path: Path, kind: str, index: int, survey: Survey, contents: Contents
) -> Source:
    if contents.n_rows == 0:
        raise SurveyError(f"{path} has no rows")
    known = contents.natives
    names = [native.name for native in known]
    natives: dict[str, Native] = {}
    columns = {}
    for name, source in survey.columns.items():
        found = sources_in(path, name, source, known)
        keys = []
        for native in found:
            check_native(path, name, source, native)
            keys.append(_add(path, natives, native, known, source.element))
        columns[name] = tuple(keys)
    cuts = {}
    for cut in survey.cuts.values():
        match = column_named(path, cut.column, known)
        if match is not None:
            check_shape(path, f"cut '{cut.name}'", match, None)
            cuts[cut.column] = _add(path, natives, match, known)
        elif cut.column not in survey.columns and not cut.optional:
            raise SurveyError(
                f"{path}: no column '{cut.column}', which cut '{cut.name}' needs",
                nearest(cut.column, names)
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
        overflow=contents.overflow,
        **contents.layout,
    )


def _add(
    path: Path,
    natives: dict[str, Native],
    native: Native,
    known: Sequence[Native],
    element: int | None = None,
) -> str:
    """Add a column, or an element of it, to those that are read, with its mask; its key."""
    masks = [n for n in known if n.name == (native.mask or f"{native.name}.mask")]
    if native.mask and len(masks) != 1:
        raise SurveyError(
            f"{path}: column '{native.name}' has its mask in a column '{native.mask}', which is "
            f"there {len(masks)} times",
            "Without it values would be read that its writer took for none.",
        )
    # Another program may have dropped what astropy states and kept its columns.
    mask = _add(path, natives, masks[0], known, element) if _is_mask(masks) else ""
    key = native.name if element is None else f"{native.name}[{element}]"
    natives[key] = replace(element_of(native, element), mask=mask)
    return key


def _is_mask(found: Sequence[Native]) -> bool:
    return len(found) == 1 and found[0].kind == "bool"


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
    batches = readers[source.kind](source, start, stop, batch_rows)
    while True:
        with _refused(source.path):
            batch = next(batches, None)
        if batch is None:
            return
        first, values = batch
        for key, native in source.natives.items():
            if native.mask:
                values[key] = masked(values[key], values[native.mask])
        yield first, values

"""What a survey file and its columns are, to all readers of formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.ingest.arrays import Values, as_array

Batches: TypeAlias = Iterator[tuple[int, dict[str, Values]]]
"""Number of the first row (from 0) and the columns by their keys."""
DAMAGED = "Download it again and compare its size and checksum with the survey's."


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
    mask : str
        The column that is true where this one has no value, as astropy writes it beside; in a
        `Source` its key.
    offset, dtype, null, scale, zero
        Place in a FITS record, NumPy type there, TNULL, TSCAL and TZERO; of a VOTable the number
        of the field.
    """

    name: str
    kind: str
    width: int = 1
    element: int | None = None
    unit: str = ""
    mask: str = ""
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
    overflow : bool
        The service that made the file has cut it off at its limit of rows.
    offset, row_bytes : int
        FITS and text: where the rows begin; FITS: bytes a row.
    number, alone : int and bool
        VOTable: which table, from 0, and whether it is the only one.
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
    overflow: bool = False
    offset: int = 0
    row_bytes: int = 0
    number: int = 0
    alone: bool = True
    group_rows: tuple[int, ...] = ()
    header: tuple[str, ...] = ()
    delimiter: str = ","
    skip_lines: int = 1
    gzipped: bool = False


@dataclass(frozen=True)
class Contents:
    """What a file holds, before the survey's columns are looked up in it."""

    natives: list[Native]
    n_rows: int | None
    layout: dict[str, Any] = field(default_factory=dict)
    overflow: bool = False


def masked(values: Values, mask: Values) -> pa.Array:
    """A column, null where its mask is true or unknown."""
    values, mask = (v if isinstance(v, pa.Array) else as_array(v) for v in (values, mask))
    hidden = pc.fill_null(pc.not_equal(mask, 0), True)
    return pc.if_else(hidden, pa.scalar(None, values.type), values)


def stated_by_astropy(lines: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Read the YAML header that astropy writes into ECSV and Parquet.

    Returns
    -------
    tuple of dict and dict
        What is stated of each column (``datatype``, ``unit``, ...), and the mask of each column
        that has one.
    """
    from astropy.table.meta import get_header_from_yaml

    header = get_header_from_yaml(lines)
    meta = header.get("meta") or {}
    masks = dict(_masks(meta.get("__serialized_columns__") or {}))
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

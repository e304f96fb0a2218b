"""What a survey is: its native columns, its quality cuts, and both in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from sos_dask.schema import CANONICAL, HEALPIX, QUALITY, Column

ALLOWANCES = ("ra_below_24", "overflow")
"""Odd data that a survey may accept: right ascensions in deg that look like hours, and a VOTable
that its service has cut off (QUERY_STATUS OVERFLOW)."""
COLUMN_HEADINGS = ("column", "native", "unit", "dtype", "UCD", "description")
CUT_HEADINGS = ("cut", "test", "reason", "bit")


@dataclass(frozen=True)
class SourceColumn:
    """How one column of the product is made from native columns.

    Parameters
    ----------
    column : Column
        What is made.
    sources : tuple of str
        Native names. The first that a file has is used (releases differ); with ``join`` all are.
        A name that the file has in another case only counts as the same.
    join : bool
        The value is the text of all ``sources``, joined by dots; a null is empty text there. A
        numeric column counts with its text in the file, or its shortest text where the file is
        binary. Only for string columns.
    unit : str
        Unit of the native column.
    dtype : str
        Type in the product.
    missing : tuple of float
        Numbers that mean null here, beside the survey's own.
    element : int, optional
        Element of a vector column, from 0.
    factor : float
        Product value = native value * ``factor``; follows from the two units.
    """

    column: Column
    sources: tuple[str, ...]
    join: bool = False
    unit: str = ""
    dtype: str = ""
    missing: tuple[float, ...] = ()
    element: int | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Cut:
    """One quality cut: a row that fails it gets bit ``bit`` of ``quality``.

    There is exactly one test: limits (one or both), ``bits_unset`` or ``values``.

    Parameters
    ----------
    name : str
    bit : int
        0 to 62, unique in the survey.
    column : str
        A native column, with its native values and units; where the file has none of that name,
        the column of the product of that name. Sentinels and impossible values are nulls, but not
        in a flag whose bits are tested.
    minimum, maximum : float, optional
        Inclusive limits.
    bits_unset : tuple of int
        Numbers (0 is the lowest) of the bits that must be 0 in an integer flag.
    values : tuple of float or of str
        Accepted values.
    null_passes : bool
        Whether a null passes; by default it fails.
    optional : bool
        A file without the column passes; by default that is an error.
    reason : str
        Why, with the source.
    """

    name: str
    bit: int
    column: str
    minimum: float | None = None
    maximum: float | None = None
    bits_unset: tuple[int, ...] = ()
    values: tuple[float | str, ...] = ()
    null_passes: bool = False
    optional: bool = False
    reason: str = ""

    def test_text(self) -> str:
        """The test in words, for example ``snrg >= 20`` or ``ASPCAPFLAG bit 23 unset``."""
        if self.bits_unset:
            word = "bit" if len(self.bits_unset) == 1 else "bits"
            text = f"{self.column} {word} {', '.join(map(str, self.bits_unset))} unset"
        elif self.values:
            shown = ", ".join(plain(value) for value in self.values)
            text = f"{self.column} {'=' if len(self.values) == 1 else 'is one of'} {shown}"
        elif self.minimum is not None and self.maximum is not None:
            text = f"{plain(self.minimum)} <= {self.column} <= {plain(self.maximum)}"
        elif self.minimum is not None:
            text = f"{self.column} >= {plain(self.minimum)}"
        elif self.maximum is not None:
            text = f"{self.column} <= {plain(self.maximum)}"
        else:
            text = f"{self.column} is not null"
        return text + (" or null" if self.null_passes else "")


@dataclass(frozen=True)
class Survey:
    """One source catalog and release, as its TOML file describes it.

    Parameters
    ----------
    name, title, reference : str
        ``name`` is lower-case letters, digits and dashes.
    columns : mapping of str to SourceColumn
        Canonical and extra columns, in the order of the product.
    hdu : int, optional
        Table extension of a FITS file, or table of a VOTable, from 1; None: its only table.
    position_epoch : float, optional
        Julian year of ra and dec where no column gives it.
    missing : tuple of float
        Sentinels that mean null in every numeric column; compare them in the column's own type
        (the float32 nearest to -9999.99 is another number than the float64).
    missing_text : tuple of str
        Sentinels of text columns and of numbers in text files, beside the empty string.
    cuts : tuple of Cut
        In the order of the file.
    expected_error : mapping of str to float
        Typical error of a label or ``rv``, in its canonical unit, used where the survey states
        none.
    notes : str
        What a user must know.
    max_rejected_fraction : float
        Above this fraction of unusable rows the file is taken to be another than the definition
        describes.
    allow : tuple of str
        Some of ``ALLOWANCES``: checks of the data that are known to be wrong for this survey.
    definition : str
        The decoded file with the overrides as JSON: equal definitions treat a file alike.
    """

    name: str
    title: str
    columns: Mapping[str, SourceColumn]
    reference: str = ""
    hdu: int | None = None
    position_epoch: float | None = None
    missing: tuple[float, ...] = ()
    missing_text: tuple[str, ...] = ()
    cuts: tuple[Cut, ...] = ()
    expected_error: Mapping[str, float] = field(default_factory=dict)
    notes: str = ""
    max_rejected_fraction: float = 0.01
    allow: tuple[str, ...] = ()
    definition: str = ""

    def arrow_schema(self) -> pa.Schema:
        """Schema of the observations: ``_healpix_29``, the survey's columns, then ``quality``.

        ``position_epoch`` stands before ``quality`` where it is one value for the whole survey.
        """
        fields = [HEALPIX.arrow(nullable=False)]
        for source in self.columns.values():
            required = source.column.name in ("obs_id", "ra", "dec")
            fields.append(source.column.arrow(source.dtype, nullable=not required))
        if "position_epoch" not in self.columns and self.position_epoch is not None:
            fields.append(CANONICAL["position_epoch"].arrow())
        fields.append(QUALITY.arrow(nullable=False))
        return pa.schema(fields)


def describe_columns(survey: Survey) -> list[tuple[str, ...]]:
    """One row a column, as text under ``COLUMN_HEADINGS``.

    Native names stand as ``a or b`` (the first in the file), ``a + b`` (joined) or ``a[2]`` (an
    element); a native unit that is converted follows as ``a in kpc``.
    """
    rows: list[tuple[str, ...]] = []
    for source in survey.columns.values():
        column = source.column
        native = (" + " if source.join else " or ").join(source.sources)
        native += "" if source.element is None else f"[{source.element}]"
        native += f" in {source.unit}" if source.factor != 1.0 else ""
        rows.append(
            (column.name, native, column.unit, source.dtype, column.ucd, column.description)
        )
    if "position_epoch" not in survey.columns and survey.position_epoch is not None:
        epoch, value = CANONICAL["position_epoch"], f"= {plain(survey.position_epoch)}"
        rows.append((epoch.name, value, epoch.unit, epoch.dtype, epoch.ucd, epoch.description))
    return rows


def describe_cuts(survey: Survey) -> list[tuple[str, ...]]:
    """One row a cut, as text under ``CUT_HEADINGS``; ``bit`` is its number in ``quality``."""
    return [(cut.name, cut.test_text(), cut.reason, str(cut.bit)) for cut in survey.cuts]


def plain(value: float | str) -> str:
    """A value as text, whole numbers without a point."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return str(int(value) if whole else value)

"""The canonical columns: names, types, units and possible values."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sos_dask.errors import ConfigError

LABELS = ("teff", "logg", "feh")
HEALPIX_COLUMN = "_healpix_29"
TEXT_UNITS = ("log10(cm/s2)", "dex")
"""Logarithms, which do not convert: a native unit must be the same text."""
DTYPES = {
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
}


@dataclass(frozen=True)
class Column:
    """One column: what it means and which values are possible.

    ``dtype``: one of ``DTYPES``. ``unit``: as astropy reads it, or one of ``TEXT_UNITS``; empty for
    a pure number. ``ucd``: Unified Content Descriptor (IVOA UCD1+). ``minimum``, ``maximum``:
    inclusive; outside them a value is impossible and becomes null (it is counted).
    """

    name: str
    dtype: str
    unit: str = ""
    ucd: str = ""
    description: str = ""
    minimum: float | None = None
    maximum: float | None = None

    def arrow(self, dtype: str | None = None, nullable: bool = True) -> pa.Field:
        """Arrow field with unit, UCD and description as metadata."""
        metadata = {"unit": self.unit, "ucd": self.ucd, "description": self.description}
        return pa.field(
            self.name,
            DTYPES[dtype or self.dtype],
            nullable=nullable,
            metadata={key: value for key, value in metadata.items() if value},
        )


# fmt: off
_CANONICAL = (
    ("obs_id", "int64", "", "meta.id;meta.main", "Key of the observation in its survey"),
    ("ra", "float64", "deg", "pos.eq.ra;meta.main", "Right ascension (ICRS) at position_epoch"),
    ("dec", "float64", "deg", "pos.eq.dec;meta.main", "Declination (ICRS) at position_epoch"),
    ("position_epoch", "float32", "yr", "time.epoch;pos", "Julian year of the position"),
    ("gaia_dr2_source_id", "int64", "", "meta.id.cross", "Source id of Gaia DR2"),
    ("gaia_dr3_source_id", "int64", "", "meta.id.cross", "Source id of Gaia DR3 (= EDR3)"),
    ("pmra", "float64", "mas/yr", "pos.pm;pos.eq.ra", "Proper motion in ra, times cos(dec)"),
    ("pmdec", "float64", "mas/yr", "pos.pm;pos.eq.dec", "Proper motion in dec"),
    ("teff", "float32", "K", "phys.temperature.effective", "Effective temperature"),
    ("teff_err", "float32", "K", "stat.error;phys.temperature.effective", "Error of teff"),
    ("logg", "float32", "log10(cm/s2)", "phys.gravity", "Surface gravity"),
    ("logg_err", "float32", "log10(cm/s2)", "stat.error;phys.gravity", "Error of logg"),
    ("feh", "float32", "dex", "phys.abund.Fe", "Iron abundance [Fe/H]"),
    ("feh_err", "float32", "dex", "stat.error;phys.abund.Fe", "Error of feh"),
    ("snr", "float32", "", "stat.snr", "Signal to noise ratio"),
    ("rv", "float32", "km/s", "spect.dopplerVeloc.opt;pos.heliocentric", "Radial velocity"),
    ("rv_err", "float32", "km/s", "stat.error;spect.dopplerVeloc.opt", "Error of rv"),
    ("phot_g_mean_mag", "float32", "mag", "phot.mag;em.opt", "Gaia G"),
    ("parallax", "float32", "mas", "pos.parallax", "Parallax"),
    ("distance", "float32", "pc", "pos.distance", "Distance"),
    ("ebv", "float32", "mag", "phot.color.excess", "Colour excess E(B-V)"),
)
_POSSIBLE: Mapping[str, tuple[float, float]] = {
    "position_epoch": (1800, 2100),
    "pmra": (-12000, 12000), "pmdec": (-12000, 12000),
    "teff": (1000, 100000), "teff_err": (0, 20000),
    "logg": (-2, 10), "logg_err": (0, 10),
    "feh": (-10, 2), "feh_err": (0, 10),
    "snr": (0, 1e6), "rv": (-2000, 2000), "rv_err": (0, 2000),
    "phot_g_mean_mag": (-3, 25), "parallax": (-1000, 1000), "distance": (0, 1e8),
    "ebv": (-1, 1000),
}
_ADDED = (
    ("quality", "int64", "", "meta.code.qual", "Bit mask of failed cuts; 0 passes all of them"),
    (HEALPIX_COLUMN, "int64", "", "pos.healpix", "HEALPix cell of the position, order 29, NESTED"),
)
# fmt: on
CANONICAL: Mapping[str, Column] = {
    name: Column(name, dtype, unit, ucd, description, *_POSSIBLE.get(name, ()))
    for name, dtype, unit, ucd, description in _CANONICAL
}
QUALITY, HEALPIX = (Column(*column) for column in _ADDED)
KEYS = ("obs_id", "star_id")
"""Keys of rows; of a catalog that has both the first names the rows: observations of stars."""
REQUIRED = ("obs_id", "ra", "dec")
RESERVED = (
    HEALPIX_COLUMN, "quality", "star_id", "n_obs", "n_used", "teff_spread", "logg_spread",
    "feh_spread", "flag_spread", "survey", "sources", "n_surveys", "Norder", "Dir", "Npix",
    "coverage", "kind_coverage", "flag_coverage", "flag_sos",
    *(
        f"{label}_{kind}"
        for label in LABELS
        for kind in ("sos", "delta", "sos_err", "sos_err_pair")
    ),
)  # fmt: skip
"""Columns that later stages or the HATS layout add: no native extra may take their names."""


def nearest(name: str, known: Collection[str]) -> str:
    """The names most like a wrong one, as a hint for a person; empty where none is like it."""
    lower = {item.lower(): item for item in known}
    found = difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.55)
    return "Did you mean " + " or ".join(lower[item] for item in found) + "?" if found else ""


MOST_ROWS = 1_000_000_000
YEARS = (1800.0, 2100.0)


def is_gaia_id(name: str) -> bool:
    """Whether a column of the product holds ids of 19 digits, which no float can hold."""
    return name.lower().endswith("source_id")


def require_columns(schema: pa.Schema, names: tuple[str, ...], where: str) -> None:
    """Raise `ConfigError` naming the first column a catalog lacks, with the nearest names."""
    for name in names:
        if name not in schema.names:
            raise ConfigError(f"{where} has no column '{name}'", nearest(name, schema.names))


def described(schema: pa.Schema) -> pa.Schema:
    """Schema with what pandas, and what is built on it, reads of the types of its columns.

    Without it pandas turns integers among which some are null to float64, which does not hold ids
    of 19 digits, and booleans to objects. Of a file, and of a folder by ``_common_metadata``.
    """
    columns = []
    for item in schema:
        try:
            name = np.dtype(item.type.to_pandas_dtype()).name
        except (NotImplementedError, TypeError):  # a type that pandas does not have
            name = "object"
        kind = name
        if item.nullable and pa.types.is_integer(item.type):
            kind = name.replace("i", "I").replace("u", "U")
        elif item.nullable and pa.types.is_boolean(item.type):
            kind = "boolean"
        text = "unicode" if pa.types.is_string(item.type) else name
        names = {"name": item.name, "field_name": item.name}
        columns.append(names | {"pandas_type": text, "numpy_type": kind, "metadata": None})
    about = {"index_columns": [], "column_indexes": [], "columns": columns}
    return schema.with_metadata({"pandas": json.dumps(about)})

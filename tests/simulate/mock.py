"""A mock sky as it is read from its files."""

import hashlib
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from astropy.io import fits

from sos_dask.simulate import SkySettings, simulate
from sos_dask.simulate.sky import (
    APOGEE,
    GALAH,
    LAMOST,
)
from sos_dask.simulate.surveys import (
    SURVEYS,
)
from sos_dask.sky import healpix
from sos_dask.surveys.definition import load_survey

N_LAMOST = 40_000


DEFINITIONS = {
    LAMOST: load_survey("lamost-dr11-lrs"),
    APOGEE: load_survey("apogee-dr17"),
    GALAH: load_survey("galah-dr4"),
}


LABELS = ("teff", "logg", "feh")


SMALL: dict[str, Any] = {"n_lamost": 600, "n_apogee": 200, "n_galah": 200}


class Sky:
    """One mock sky by survey: all native ``rows``; ``seen``, the distinct ones in canonical
    columns; their ``truth``."""

    def __init__(self, directory, **given):
        self.paths = simulate(SkySettings(**given), directory)
        self.gaia = pq.read_table(self.paths["gaia"])
        self.truth_table = pq.read_table(self.paths["truth"])
        self.rows: dict[int, Any] = {}
        self.seen: dict[int, dict[str, Any]] = {}
        self.truth: dict[int, dict[str, Any]] = {}
        for number, survey in SURVEYS.items():
            with fits.open(self.paths[survey.name], memmap=False) as hdus:
                rows = self.rows[number] = np.array(hdus[1].data)
            part = self.truth_table.filter(pc.equal(self.truth_table["survey"], survey.name))
            part = part.sort_by("row")
            ids = part["gaia_source_id"].fill_null(0).to_numpy()
            self.truth[number] = {
                name: part[name].to_numpy(zero_copy_only=False) for name in part.column_names
            } | {"gaia_source_id": ids}
            self.seen[number] = {
                name: canonical(rows[column.sources[0]][: part.num_rows])
                for name, column in DEFINITIONS[number].columns.items()
            }

    def labels(self, survey, end=""):
        """Labels (n, 3) as measured, or their errors."""
        return np.stack([self.seen[survey][f"{label}{end}"] for label in LABELS], axis=-1)

    def true_labels(self, survey, start=""):
        """True labels (n, 3), or the injected bias."""
        return np.stack([self.truth[survey][f"{start}{label}"] for label in LABELS], axis=-1)


def canonical(values):
    """Native values as text, integers, or floats with NaN for -9999."""
    if values.dtype.kind == "S":
        return np.char.strip(values.astype(str))
    if values.dtype.kind == "f":
        return np.where(values == -9999, np.nan, values).astype(float)
    return values.astype(np.int64)


def moved(table, years):
    """Special stars at another epoch."""
    ra, dec, pmra, pmdec = table.T
    return healpix.propagate(ra, dec, pmra, pmdec, years)


def digests(paths):
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}

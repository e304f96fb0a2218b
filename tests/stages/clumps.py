"""The clumps that tests of stages look at: many repeats at the hard places of the sky."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sos_dask.schema import CANONICAL
from sos_dask.sky.healpix import ang2pix, propagate
from sos_dask.stars.group import GAIA_IDS, DedupeSettings, id_values
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.store import verify
from tests.skies import observations

EPOCH = 2016.0
SIZES = (10**6, 40)
N_ROWS = 600


def sky(n: int, seed: int) -> pa.Table:
    """Clumps at the hard places, with Gaia ids, proper motions and epochs, each often null."""
    rng = np.random.default_rng(seed)
    table = observations(n, seed)
    place = np.round(table["dec"].to_numpy() + 100).astype(np.int64)
    star = place * 100 + rng.integers(0, 30, n) + 10**15  # the rows of a clump share some ids
    columns = {
        "position_epoch": (rng.choice([1999.5, 2000.0, 2015.5, 2016.0], n), 0.2),
        "gaia_dr2_source_id": (star + rng.integers(0, 3, n), 0.5),
        "gaia_dr3_source_id": (star, 0.4),
        "pmra": (rng.normal(0, 300, n), 0.3),
        "pmdec": (rng.normal(0, 300, n), 0.3),
    }
    for place_of, (name, (values, nulls)) in enumerate(columns.items(), start=4):
        field = CANONICAL[name].arrow()
        data = pa.array(values, mask=rng.random(n) < nulls).cast(field.type)
        table = table.add_column(place_of, field, data)
    return table


def rows_of(directory: Path) -> pa.Table:
    catalog = Catalog.open(directory)
    assert verify(directory) == []
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels]).combine_chunks()


def ids_of(table: pa.Table) -> dict[str, np.ndarray]:
    return {release: id_values(table[name]) for release, name in GAIA_IDS.items()}


SETTINGS = DedupeSettings(radius_arcsec=0.8, id_radius_arcsec=5.0)


def chain(n: int, seed: int, **moving: Any) -> pa.Table:
    """A row an arcsecond from the next along the equator, the keys in their order.

    Only the first row knows where a star of two or three rows begins: it is far away.
    """
    rng = np.random.default_rng(seed)
    ra, dec = (np.arange(n) - n / 2) / 3600, rng.uniform(-0.1, 0.1, n) / 3600
    if moving:
        ra, dec = propagate(ra, dec, moving["pmra"], moving["pmdec"], 2000.0 - EPOCH)
    table = observations(n, seed)
    columns = {
        "_healpix_29": ang2pix(ra % 360, dec),
        "obs_id": np.arange(n) + 10**6 * seed,
        "ra": ra % 360,
        "dec": dec,
        "quality": np.zeros(n, dtype=np.int64),
    }
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values))
    for name, values in moving.items():
        table = table.append_column(CANONICAL[name].arrow(), pa.array(values))
    return table.sort_by([("_healpix_29", "ascending"), ("obs_id", "ascending")])

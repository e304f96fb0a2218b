"""What is known of the star that an observation belongs to, as bits for its flags."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import surroundings
from sos_dask.stars.group import GAIA_IDS
from sos_dask.stars.match import MatchSettings, match
from sos_dask.storage.catalog import Catalog
from sos_dask.trust import FLAG_AMBIGUOUS, FLAG_SPREAD

_ID_RADIUS_ARCSEC = 10.0  # observations with one Gaia id are of one star
_STAR, _SPREAD = "star_id", "flag_spread"


def star_flags(
    table: pa.Table, pixel: HealpixPixel, stars: Catalog, pairs: Catalog, radius_arcsec: float
) -> NDArray[np.int32]:
    """Bits `trust.FLAG_SPREAD` and `trust.FLAG_AMBIGUOUS` of observations, shape (n,).

    An observation belongs to the star with its Gaia id, else to the nearest: what is marked is
    looked for first, and what is found near it is asked for its own star among all.

    Parameters
    ----------
    table : pyarrow.Table
        Observations of one partition.
    stars : Catalog
        Output of dedupe.
    pairs : Catalog
        Output of crossmatch, of these stars or of the observations themselves.
    radius_arcsec : float
        Largest separation of an observation and its star.
    """
    flags = np.zeros(table.num_rows, dtype=np.int32)
    radius = max(radius_arcsec, _ID_RADIUS_ARCSEC)
    ranges = sorted([(pixel.first, pixel.stop), *surroundings(pixel, radius)[0]])
    of_stars = f"target_{_STAR}" in pairs.schema.names
    key = f"target_{_STAR if of_stars else 'obs_id'}"
    matched = pairs.read_ranges(ranges, [key, "ambiguous"])
    ambiguous = matched.filter(matched["ambiguous"])[key].combine_chunks()
    if not of_stars and len(ambiguous):
        flags[pc.is_in(table["obs_id"], ambiguous).to_numpy()] = FLAG_AMBIGUOUS
    names = [HEALPIX_COLUMN, _STAR, "ra", "dec", "position_epoch", *GAIA_IDS.values(), _SPREAD]
    near = stars.read_ranges(ranges, stars.columns(names))
    mark = np.zeros(near.num_rows, dtype=np.int32)
    if _SPREAD in near.schema.names:
        mark[near[_SPREAD].to_numpy()] = FLAG_SPREAD
    if of_stars and len(ambiguous):
        mark[pc.is_in(near[_STAR], ambiguous).to_numpy()] |= FLAG_AMBIGUOUS
    if not mark.any() or not table.num_rows:
        return flags
    settings = MatchSettings(radius_arcsec=radius_arcsec, id_radius_arcsec=radius)
    some = np.unique(match(table, near.filter(pa.array(mark != 0)), settings, _STAR).left)
    found = match(table.take(pa.array(some)), near, settings, _STAR)
    flags[some[found.left]] |= mark[found.right]
    return flags

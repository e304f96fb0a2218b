"""Bits of `flag_sos` that tell of the survey's grid and of the star, against what makes them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sos_dask.api import crossmatch, dedupe
from sos_dask.correct import FLAG_AMBIGUOUS, FLAG_GRID_EDGE, FLAG_SPREAD
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.sky.healpix import ang2pix
from sos_dask.stages.coverage import GRID_STEPS, star_flags
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.stars.group import DedupeSettings
from sos_dask.storage.catalog import Catalog
from tests.job import write_job
from tests.skies import observations, write_catalog

GRID = {"teff": (4500.0, 6500.0), "feh": (-0.5, 9.0)}
ARCSEC = 1 / 3600


def read(store, product, columns=None):
    catalog = Catalog.open((store / "current" / product).resolve())
    return pa.concat_tables([catalog.read(pixel, columns) for pixel in catalog.pixels])


@pytest.fixture(scope="module")
def store(small_sky, tmp_path_factory):
    """A build where limits lie inside the sky, repeats may not differ, and neighbours are near."""
    folder = tmp_path_factory.mktemp("flags")
    grid = ", ".join(f"{label} = [{low}, {high}]" for label, (low, high) in GRID.items())
    more = (
        f"[coverage]\ngrid = {{{grid}}}\n"
        "[dedupe]\nmax_spread = 1.0\n"
        '[crossmatch]\ntarget = "stars"\nradius_arcsec = 600\nuse_gaia_id = false\n'
    )
    rebuild(load_job(write_job(folder, small_sky, more=more)))
    return folder / "store"


def flagged(table, bit):
    return (table["flag_sos"].to_numpy() & bit) > 0


def test_labels_at_the_edge_of_the_grid(store):
    rows = read(store, "lamost.corrected")
    values = {
        label: pc.fill_null(rows[label], np.nan).to_numpy() for label in ("teff", "logg", "feh")
    }
    low, high = np.nanmin(values["logg"]), np.nanmax(values["logg"])  # of the catalog: not named
    expected = np.zeros(rows.num_rows, dtype=bool)
    for label, (first, last) in {**GRID, "logg": (low, high)}.items():
        step = GRID_STEPS[label]
        expected |= (values[label] <= first + step) | (values[label] >= last - step)
    assert 0.2 < expected.mean() < 0.8
    np.testing.assert_array_equal(flagged(rows, FLAG_GRID_EDGE), expected)


def test_repeats_that_differ_flag_all_observations_of_their_star(store):
    rows = read(store, "lamost.corrected")
    stars = read(store, "lamost.stars", ["gaia_dr3_source_id", "n_obs", "flag_spread"])
    spread = stars.filter(stars["flag_spread"])
    found = flagged(rows, FLAG_SPREAD)
    assert found.sum() == pc.sum(spread["n_obs"]).as_py() > 300
    known = rows["gaia_dr3_source_id"].is_valid().to_numpy()
    expected = pc.is_in(rows["gaia_dr3_source_id"], spread["gaia_dr3_source_id"].combine_chunks())
    np.testing.assert_array_equal(found[known], expected.to_numpy()[known])


def test_several_reference_stars_near_flag_all_observations_of_the_target(store):
    rows = read(store, "lamost.corrected")
    pairs = read(store, "lamost.pairs", ["target_star_id", "n_candidates", "n_obs"])
    several = pairs.filter(pc.greater(pairs["n_candidates"], 1))
    stars = read(store, "lamost.stars", ["star_id", "gaia_dr3_source_id"])
    ids = stars.filter(pc.is_in(stars["star_id"], several["target_star_id"].combine_chunks()))
    found = flagged(rows, FLAG_AMBIGUOUS)
    assert found.sum() == pc.sum(several["n_obs"]).as_py() > 20
    known = rows["gaia_dr3_source_id"].is_valid().to_numpy()
    expected = pc.is_in(rows["gaia_dr3_source_id"], ids["gaia_dr3_source_id"].combine_chunks())
    np.testing.assert_array_equal(found[known], expected.to_numpy()[known])


def placed(offsets, teff, ra=45.0, dec=41.8103148957786, first=1):
    """Observations at offsets in arcsec to the east of a corner of base pixels."""
    n = len(offsets)
    east = np.asarray(offsets) * ARCSEC / np.cos(np.radians(dec))
    table = observations(n)
    names = table.schema.names
    values = {
        "ra": (ra + east) % 360.0,
        "dec": np.full(n, dec),
        "obs_id": np.arange(first, first + n),
        "teff": np.asarray(teff, dtype=float),
        "quality": np.zeros(n, dtype=np.int64),
        "snr": np.linspace(100.0, 50.0, n),
    }
    values["_healpix_29"] = ang2pix(values["ra"], values["dec"])
    for label, error in (("logg", 0.1), ("feh", 0.05), ("teff_err", 20.0)):
        values[label] = np.full(n, 4.0 if label == "logg" else error)
    for name, value in values.items():
        index = names.index(name)
        table = table.set_column(
            index, table.schema.field(index), pa.array(value).cast(table.schema.field(index).type)
        )
    return table.sort_by([("_healpix_29", "ascending"), ("obs_id", "ascending")])


@pytest.mark.parametrize("target", ["stars", "observations"])
def test_a_neighbour_of_a_marked_star_is_not_marked(tmp_path, target):
    # One star at 0 with a repeat at 1.0, another at 2.2 whose repeats disagree: 1.2 from the first
    # star's repeat, in reach of it. The corner of two partitions lies between them.
    rows = placed([0.0, 1.0, 2.2, 2.25], [5000, 5000, 5000, 6000])
    observed = write_catalog(rows, tmp_path / "obs", 2)
    dedupe(observed, tmp_path / "stars", DedupeSettings(radius_arcsec=1.5))
    stars = Catalog.open(tmp_path / "stars")
    references = write_catalog(placed([2.0, 2.4], [5000, 5000], first=50), tmp_path / "ref")
    left = stars if target == "stars" else observed
    crossmatch(
        left,
        references,
        tmp_path / "pairs",
        CrossmatchSettings(radius_arcsec=1.0),
    )
    pairs = Catalog.open(tmp_path / "pairs")
    found: dict[int, int] = {}
    for pixel in observed.pixels:
        table = observed.read(pixel)
        flags = star_flags(table, pixel, stars, pairs, 1.5)
        found |= dict(zip(table["obs_id"].to_pylist(), flags.tolist(), strict=True))
    marked = FLAG_SPREAD | FLAG_AMBIGUOUS
    assert len(observed.pixels) > 1
    assert found == {1: 0, 2: 0, 3: marked, 4: marked}


def test_an_id_reaches_farther_than_a_position(tmp_path):
    rows = placed([-3.0, 3.0], [5000, 7000])  # on both sides of an edge
    ids = pa.array([77, 77], rows.schema.field("obs_id").type)
    field = pa.field("gaia_dr3_source_id", pa.int64(), True)
    observed = write_catalog(rows.append_column(field, ids), tmp_path / "obs", 1)
    dedupe(observed, tmp_path / "stars", DedupeSettings(radius_arcsec=1.5))
    stars = Catalog.open(tmp_path / "stars")
    assert stars.n_rows == 1 and len(observed.pixels) == 2
    crossmatch(
        stars,
        observed,
        tmp_path / "pairs",
        CrossmatchSettings(radius_arcsec=0.5),
    )
    for pixel in observed.pixels:
        table = observed.read(pixel)
        found = star_flags(table, pixel, stars, Catalog.open(tmp_path / "pairs"), 1.5)
        assert (found & FLAG_SPREAD).tolist() == [FLAG_SPREAD]

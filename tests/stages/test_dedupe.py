"""Stars do not depend on how the sky is cut."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sos_dask.api import dedupe
from sos_dask.sky.healpix import ang2pix, propagate
from sos_dask.stars.combine import combine
from sos_dask.stars.group import DedupeSettings, group, rank_of
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.skies import write_catalog
from tests.stages.clumps import N_ROWS, SETTINGS, SIZES, chain, ids_of, rows_of, sky


def primaries_at_one_epoch(table: pa.Table) -> np.ndarray:
    """Primaries of all rows, each moved to the latest epoch where it can be."""
    ra, dec = table["ra"].to_numpy(), table["dec"].to_numpy()
    pmra, pmdec, epoch = (table[name].to_numpy() for name in ("pmra", "pmdec", "position_epoch"))
    moves = ~np.isnan(pmra) & ~np.isnan(pmdec) & ~np.isnan(epoch)
    moved = propagate(ra, dec, pmra, pmdec, 2016.0 - epoch.astype(np.float64))
    ra, dec = np.where(moves, moved[0], ra), np.where(moves, moved[1], dec)
    cells = ang2pix(ra, dec)
    order = np.argsort(cells, kind="stable")
    ids = {release: values[order] for release, values in ids_of(table).items()}
    rank = rank_of(table["obs_id"])[order]
    groups = group(ra[order], dec[order], cells[order], rank, ids, None, SETTINGS)
    primary = np.empty(len(order), dtype=np.int64)
    primary[order] = order[groups.primary]
    return primary


@pytest.mark.parametrize("number", [1, 2, 3])
def test_dedupe_equals_one_call_of_the_kernel(stars, number):
    table = sky(N_ROWS, number).combine_chunks()
    expected = combine(table, primaries_at_one_epoch(table), SETTINGS, {}).combine_chunks()
    assert N_ROWS / 6 < expected.num_rows < 0.9 * N_ROWS, "the sky is no test of repeats"
    for size in SIZES:
        found = rows_of(stars / f"stars{number}-{size}")
        assert found.equals(expected), size
        manifest = Manifest.load(stars / f"stars{number}-{size}")
        rows, summary = manifest.rows, manifest.summary
        assert (rows.n_in, rows.n_out) == (N_ROWS, expected.num_rows)
        repeats = np.count_nonzero(expected["n_obs"].to_numpy() > 1)
        assert summary["stars_with_repeats"] == repeats > 50
        assert summary["stars_with_large_spread"] == pc.sum(expected["flag_spread"]).as_py() > 5
        assert rows.dropped == {"merged": N_ROWS - expected.num_rows}
    n_partitions = {len(Catalog.open(stars / f"obs{number}-{size}").pixels) for size in SIZES}
    assert len(n_partitions) > 1


def test_some_stars_reach_over_the_edge_of_a_partition(stars):
    """Else the tests here would not see a mistake at the edges."""
    table = sky(N_ROWS, 1).combine_chunks()
    cells, primary = table["_healpix_29"].to_numpy(), primaries_at_one_epoch(table)
    pixels = Catalog.open(stars / "obs1-40").pixels
    firsts = np.array([pixel.first for pixel in pixels])
    partition = np.searchsorted(firsts, cells, side="right")
    assert np.count_nonzero(partition != partition[primary]) > 20


@pytest.mark.parametrize("n", [148, 149, 150, 151])
def test_long_chains_over_edges(tmp_path, n):
    """Where a chain is cut into stars depends on its far end, many radii and partitions away."""
    table = chain(n, 1).combine_chunks()
    settings = DedupeSettings(radius_arcsec=1.3, id_radius_arcsec=1.3, use_gaia_id=False)
    ra, dec, cells = (table[name].to_numpy() for name in ("ra", "dec", "_healpix_29"))
    groups = group(ra, dec, cells, rank_of(table["obs_id"]), {}, None, settings)
    expected = combine(table, groups.primary, settings, {}).combine_chunks()
    assert n / 3 <= expected.num_rows <= (n + 1) / 2
    observed = write_catalog(table, tmp_path / "observed", 10)
    assert len(observed.pixels) >= 2
    dedupe(observed, tmp_path / "stars", settings)
    assert rows_of(tmp_path / "stars").equals(expected)

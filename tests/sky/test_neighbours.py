"""Rows near each other, against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.columns import FloatArray
from sos_dask.errors import ConfigError
from sos_dask.sky.healpix import ang2pix, separation_arcsec
from sos_dask.sky.neighbours import candidates, pairs_within, rows_near
from tests.geometry import HARD, SETTINGS, around, seeds


def clumps(rng: np.random.Generator, n: int, radius_arcsec: float) -> tuple[FloatArray, FloatArray]:
    """Positions a few radii around the places where matching goes wrong."""
    ra, dec = np.array(HARD)[rng.integers(0, len(HARD), n)].T
    return around(rng, ra, dec, 4 * radius_arcsec)


def pairs_of(blocks) -> set[tuple[int, int]]:
    found = [(i, j) for a, b in blocks for i, j in zip(a.tolist(), b.tolist(), strict=True)]
    assert len(set(found)) == len(found), "every pair at most once"
    return set(found)


@settings(SETTINGS, max_examples=60)
@given(
    seed=seeds,
    n=st.integers(0, 120),
    m=st.integers(0, 120),
    radius_arcsec=st.sampled_from([1e-3, 0.7, 3.0, 200.0, 9000.0, 72000.0]),
    many_reaches=st.booleans(),
)
def test_candidates_miss_no_pair(seed, n, m, radius_arcsec, many_reaches):
    rng = np.random.default_rng(seed)
    ra1, dec1 = clumps(rng, n, min(radius_arcsec, 40000))
    ra2, dec2 = clumps(rng, m, min(radius_arcsec, 40000))
    by_cell = np.argsort(ang2pix(ra2, dec2), kind="stable")
    ra2, dec2 = ra2[by_cell], dec2[by_cell]
    reach = radius_arcsec * rng.uniform(0, 1, n) ** 3 if many_reaches else radius_arcsec
    found = pairs_of(candidates(ang2pix(ra1, dec1), reach, ang2pix(ra2, dec2)))
    separation = separation_arcsec(ra1[:, None], dec1[:, None], ra2[None, :], dec2[None, :])
    near = np.argwhere(separation <= np.broadcast_to(reach, n)[:, None])
    assert found.issuperset(map(tuple, near.tolist()))
    rows = rows_near(ang2pix(ra2, dec2), ang2pix(ra1, dec1), reach)
    assert rows.tolist() == sorted({j for _, j in found})


@settings(SETTINGS, max_examples=40)
@given(seeds, st.integers(0, 300), st.sampled_from([0.01, 1.5, 60.0, 7200.0]))
def test_candidates_of_a_catalog_with_itself(seed, n, radius_arcsec):
    ra, dec = clumps(np.random.default_rng(seed), n, radius_arcsec)
    by_cell = np.argsort(ang2pix(ra, dec), kind="stable")
    ra, dec = ra[by_cell], dec[by_cell]
    cells = ang2pix(ra, dec)
    found = pairs_of(candidates(cells, radius_arcsec, cells))
    separation = separation_arcsec(ra[:, None], dec[:, None], ra[None, :], dec[None, :])
    near = np.argwhere(np.triu(separation <= radius_arcsec, k=1))
    assert found.issuperset(map(tuple, near.tolist()))


@settings(SETTINGS, max_examples=200)
@given(seeds, st.integers(0, 300), st.sampled_from([1e-3, 1.5, 17.9, 18.1, 60.0, 3600.0]))
def test_pairs_within_are_those_of_brute_force(seed, n, radius_arcsec):
    rng = np.random.default_rng(seed)
    ra, dec = clumps(rng, n, radius_arcsec)
    if n > 1:  # a pair at the very distance
        radius_arcsec = float(separation_arcsec(ra[:1], dec[:1], ra[1:2], dec[1:2])[0])
        radius_arcsec = min(max(radius_arcsec, 1e-3), 3600.0)
    by_cell = np.argsort(ang2pix(ra, dec), kind="stable")
    ra, dec = ra[by_cell], dec[by_cell]
    pairs = pairs_within(ra, dec, ang2pix(ra, dec), radius_arcsec, n * n)
    assert pairs is not None
    i, j = pairs
    found = list(zip(i.tolist(), j.tolist(), strict=True))
    one, other = np.triu_indices(n, k=1)
    near = separation_arcsec(ra[one], dec[one], ra[other], dec[other]) <= radius_arcsec
    assert sorted(found) == list(zip(one[near].tolist(), other[near].tolist(), strict=True))


def test_pairs_within_need_more_room_than_is_taken_at_first():
    ra, dec = np.full(100, 45.0), np.full(100, 10.0)
    pairs = pairs_within(ra, dec, ang2pix(ra, dec), 1.0, 4950)
    assert pairs is not None
    i, j = pairs
    assert pairs_within(ra, dec, ang2pix(ra, dec), 1.0, 4949) is None
    assert len(i) == len(j) == 100 * 99 // 2 and (i < j).all()


def test_candidates_in_a_crowd_are_found_and_few():
    """More rows in a cell than are compared at once, among them many at one position."""
    rng = np.random.default_rng(5)
    centre_ra, centre_dec = np.full(4000, 45.0), np.full(4000, 41.8103148957786)
    ra, dec = around(rng, centre_ra, centre_dec, 600.0)
    ra[:200], dec[:200] = ra[0], dec[0]
    by_cell = np.argsort(ang2pix(ra, dec), kind="stable")
    ra, dec = ra[by_cell], dec[by_cell]
    cells = ang2pix(ra, dec)
    found = {(i, j) for i, j in pairs_of(candidates(cells, 1.0, cells)) if i < j}
    separation = separation_arcsec(ra[:, None], dec[:, None], ra[None, :], dec[None, :])
    near = {tuple(pair) for pair in np.argwhere(np.triu(separation <= 1.0, k=1)).tolist()}
    assert found >= near and len(near) >= 200 * 199 // 2
    assert len(found) < 2 * len(near), "not all of the crowd with all of it"


@pytest.mark.parametrize("reach", [-1.0, float("nan"), float("inf"), 72001.0])
def test_reach_that_is_none(reach):
    cells = ang2pix(np.zeros(2), np.zeros(2))
    for given_reach in (reach, np.array([1.0, reach])):
        with pytest.raises(ConfigError, match="reach"):
            list(candidates(cells, given_reach, cells))

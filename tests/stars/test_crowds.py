"""Trees over crowded places against brute force over all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.columns import IntArray
from sos_dask.sky import neighbours
from sos_dask.sky.healpix import ang2pix, separation_arcsec
from sos_dask.sky.neighbours import Sky
from sos_dask.stars.crowds import LEAF, Places
from tests.geometry import HARD, SETTINGS, around, seeds

Rng = np.random.Generator


def crowd(rng: Rng, n: int) -> Sky:
    """Rows about an arcsecond around a hard place, many at one position."""
    centre = np.array(HARD)[rng.integers(0, len(HARD))]
    ra, dec = around(rng, np.full(n, centre[0]), np.full(n, centre[1]), rng.choice([0.5, 4.0]))
    same = rng.integers(0, max(n // 2, 1), n)
    some = rng.random(n) < rng.choice([0.1, 0.7])
    ra, dec = np.where(some, ra[same], ra), np.where(some, dec[same], dec)
    order = np.argsort(ang2pix(ra, dec), kind="stable")
    ra, dec = ra[order], dec[order]
    return Sky(ra, dec, ang2pix(ra, dec), rng.permutation(n) // rng.integers(1, 4))


def apart(sky: Sky, rows: IntArray, others: IntArray) -> np.ndarray:
    i, j = np.meshgrid(rows, others, indexing="ij")
    return sky.separation(i.ravel(), j.ravel()).reshape(i.shape)


@settings(SETTINGS, max_examples=150)
@given(seeds, st.integers(0, 60), st.integers(1, 4))
def test_places_are_the_distinct_positions_of_a_key(seed, n, n_keys):
    rng = np.random.default_rng(seed)
    sky, key = crowd(rng, n), rng.integers(0, n_keys, n)
    rows = rng.permutation(n)[: n - n // 4]
    places = Places.of(sky, rows, key[rows])
    name = list(zip(key.tolist(), sky.ra.tolist(), sky.dec.tolist(), strict=True))
    assert len(places.row) == len({name[row] for row in rows.tolist()})
    assert (np.diff(places.key) >= 0).all()
    for row, place in zip(rows.tolist(), places.place.tolist(), strict=True):
        members = [other for other in rows.tolist() if name[other] == name[row]]
        assert places.row[place] == min(members, key=lambda at: (sky.rank[at], at))
        assert places.key[place] == key[row]
    tree = places.tree
    n_leaves = len(tree.boxes) // 2
    assert n_leaves == 1 or n_leaves // 2 * LEAF < len(places.row) <= n_leaves * LEAF
    assert len(tree.spans) == len(tree.counts) == 2 * n_leaves
    assert tree.counts[1] == len(places.row)
    for node in range(1, 2 * n_leaves):
        low = node
        while low < n_leaves:
            low *= 2
        first = (low - n_leaves) * LEAF
        below = slice(first, first + LEAF * (n_leaves >> (node.bit_length() - 1)))
        points = tree.points[below]
        assert tree.counts[node] == len(points)
        if len(points):
            box = [*points.min(axis=0), *points.max(axis=0)]
            assert tree.boxes[node].tolist() == box
            assert tree.spans[node].tolist() == [tree.key[below].min(), tree.key[below].max()]


@settings(SETTINGS, max_examples=150)
@given(seeds, st.integers(0, 60), st.integers(1, 4), st.sampled_from([0.3, 1.0, 3.0]))
def test_links_join_what_all_pairs_join(seed, n, n_keys, radius):
    rng = np.random.default_rng(seed)
    sky, key = crowd(rng, n), rng.integers(0, n_keys, n)
    rows = np.sort(rng.permutation(n)[: n - n // 4])
    i, j = Places.of(sky, rows, key[rows]).links(radius)
    assert len(i) < max(len(rows), 1) and (i < j).all()
    linked = (apart(sky, rows, rows) <= radius) & (key[rows][:, None] == key[rows])
    wanted, found = list(range(len(rows))), list(range(n))
    for p, q in np.argwhere(linked).tolist():
        low, high = sorted((wanted[p], wanted[q]))
        wanted = [low if one == high else one for one in wanted]
    for p, q in zip(i.tolist(), j.tolist(), strict=True):
        low, high = sorted((found[p], found[q]))
        found = [low if one == high else one for one in found]
    assert [found[row] for row in rows.tolist()] == [int(rows[at]) for at in wanted]


@settings(SETTINGS, max_examples=150)
@given(seeds, st.integers(0, 60), st.sampled_from([0.3, 1.0, 3.0]))
def test_who_leads_and_who_is_nearest(seed, n, radius):
    rng = np.random.default_rng(seed)
    sky = crowd(rng, n)
    near = apart(sky, np.arange(n), np.arange(n)) <= radius
    leads, claimed = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    for row in np.lexsort((np.arange(n), sky.rank)).tolist():
        if not claimed[row]:
            leads[row] = True
            claimed |= near[row]
    places = Places.of(sky, np.arange(n))
    assert sorted(places.leading(radius).row.tolist()) == np.flatnonzero(leads).tolist()

    key = rng.integers(0, 3, n)
    others = np.flatnonzero(rng.random(n) < 0.5)
    asked, hosts = Places.of(sky, np.arange(n), key), Places.of(sky, others, key[others])
    i, j = asked.nearest(hosts, radius)
    assert (key[i] == key[j]).all() and (sky.separation(i, j) <= radius).all()
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == len(i)
    best = dict.fromkeys(asked.row.tolist(), np.inf)
    for row, separation in zip(i.tolist(), sky.separation(i, j).tolist(), strict=True):
        best[row] = min(best[row], separation)
    for row, found in best.items():
        same = hosts.row[key[hosts.row] == key[row]]
        wanted = sky.separation(np.full(len(same), row), same).min(initial=np.inf)
        assert found == (wanted if wanted <= radius else np.inf)
    assert len(i) <= len(asked.row) + 2, "few more than the nearest"


def test_who_claims_is_decided_by_what_is_measured(monkeypatch):
    """Compiled loops may take the last digit for another one than numpy does."""
    ra, dec = np.array([45.0, 45.0]), np.array([0.0, 1e-4])
    radius = float(separation_arcsec(ra[:1], dec[:1], ra[1:], dec[1:])[0])
    places = Places.of(Sky(ra, dec, ang2pix(ra, dec), np.arange(2)), np.arange(2))
    assert places.leading(radius).row.tolist() == [0]
    assert [side.tolist() for side in places.links(radius)] == [[0], [1]]
    measured = separation_arcsec
    monkeypatch.setattr(neighbours, "separation_arcsec", lambda *at: measured(*at) * (1 + 1e-12))
    assert sorted(places.leading(radius).row.tolist()) == [0, 1]
    assert [side.tolist() for side in places.links(radius)] == [[], []]


@pytest.mark.parametrize("factor", [1 - 1e-9, 1 + 1e-9])
def test_radius_to_nine_digits(factor):
    ra, dec = np.array([45.0, 45.0]), np.array([0.0, 1e-4])
    sky = Sky(ra, dec, ang2pix(ra, dec), np.arange(2))
    one, other = Places.of(sky, np.array([0])), Places.of(sky, np.array([1]))
    i, j = one.nearest(other, 0.36 * factor)
    assert (i.tolist(), j.tolist()) == (([0], [1]) if factor > 1 else ([], []))

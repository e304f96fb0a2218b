"""Crossmatch against brute force over all pairs, and against astropy."""

import csv
import pickle
from typing import Any
from unittest import mock

import astropy.units as u
import healpy
import numpy as np
import pyarrow as pa
import pytest
from astropy.coordinates import SkyCoord, search_around_sky
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sos_dask.columns import FloatArray
from sos_dask.errors import ConfigError, PartitionError
from sos_dask.sky.healpix import (
    HealpixPixel,
    ang2pix,
    in_ranges,
    propagate,
    separation_arcsec,
)
from sos_dask.sky.neighbours import surroundings
from sos_dask.stars import match as crossmatch
from sos_dask.stars.match import Matches, MatchSettings, Motion, match, reach_arcsec

THOROUGH = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, max_examples=150
)
# Poles, RA 0, points where four and where only three base pixels meet, edges of base pixels.
CORNER = float(np.degrees(np.arcsin(2 / 3)))
CENTRES = [
    (0.0, 90.0), (77.0, -90.0), (0.0, 0.0), (0.0, 12.3), (45.0, 0.0), (0.0, CORNER),
    (90.0, -CORNER), (270.0, CORNER), (45.0, CORNER), (180.0, 89.9999), (90.0, 60.0),
    (22.5, 20.0), (211.1, -33.3),
]  # fmt: skip
Rng = np.random.Generator
seeds = st.integers(0, 2**32 - 1)
radii = st.sampled_from([0.002, 0.3, 1.0, 1.5, 20.0, 600.0, 3000.0])


def anchors(rng: Rng) -> np.ndarray:
    """Two hard places, and a corner of a cell of some order at the first of them; shape (3, 2)."""
    places = np.array(CENTRES)[rng.integers(0, len(CENTRES), 2)]
    order = int(rng.integers(8, 30))
    cell = ang2pix(places[:1, 0], places[:1, 1], order)
    corner = healpy.boundaries(1 << order, cell, step=1, nest=True)[:, :, int(rng.integers(0, 4))]
    return np.concatenate([places, np.stack(healpy.vec2ang(corner, lonlat=True), axis=1)])


def clumps(
    rng: Rng, n: int, radius_arcsec: float, places: np.ndarray
) -> tuple[FloatArray, FloatArray]:
    """Positions at about a radius from each other around places, some of them several times."""
    ra, dec = places[rng.integers(0, len(places), n)].T
    angle, far = rng.uniform(0, 2 * np.pi, n), radius_arcsec * 2e3 * rng.random(n)
    far[rng.random(n) < 0.1] = 0.0
    ra, dec = propagate(ra, dec, far * np.sin(angle), far * np.cos(angle), 1.0)
    copies = rng.random(n) < 0.2
    source = rng.integers(0, n, n)
    return np.where(copies, ra[source], ra), np.where(copies, dec[source], dec)


def sky_table(ra: Any, dec: Any, **columns: Any) -> Any:
    cells = ang2pix(np.asarray(ra, float), np.asarray(dec, float))
    table = pa.table({"_healpix_29": cells, "ra": ra, "dec": dec, **columns})
    return table.take(pa.array(np.argsort(cells, kind="stable")))


def random_table(rng: Rng, n: int, radius_arcsec: float, kind: set[str], places: np.ndarray) -> Any:
    """A table with any mixture of nulls in what moves rows and in what names them."""
    ra, dec = clumps(rng, n, radius_arcsec, places)
    columns = {"star_id": rng.permutation(n)}
    if "epoch" in kind:
        epochs = rng.choice([1991.25, 2000.0, 2015.5, 2016.0], n)
        if "many" in kind:
            epochs = rng.uniform(1950, 2020, n)
        columns["position_epoch"] = pa.array(epochs.astype("f4"), mask=rng.random(n) < 0.2)
    if "pm" in kind:
        size = min(radius_arcsec * 50.0, 4000.0) * 10 ** rng.uniform(-2, 1, n)
        for name in ("pmra", "pmdec"):
            columns[name] = pa.array(rng.normal(0, size), mask=rng.random(n) < 0.2)
    star = rng.integers(1, max(n // 3, 2), n)
    for name in ("gaia_dr3_source_id", "gaia_dr2_source_id"):
        if name[5:8] in kind:
            ids = np.where(rng.random(n) < 0.7, star, rng.integers(1, max(n // 3, 2), n)) + 2**61
            columns[name] = pa.array(ids, mask=rng.random(n) < 0.4)
    return sky_table(ra, dec, **columns)


def column(table, name):
    if name not in table.schema.names:
        return np.full(table.num_rows, np.nan)
    return np.asarray(table[name].to_numpy(), dtype=float)


def brute_force(left, right, radius, id_radius, use_gaia_id, key="star_id"):
    """Candidates as {left row: [(not by id, separation, key, right row)]}, and conflicts."""
    n, m = left.num_rows, right.num_rows
    i, j = (grid.ravel() for grid in np.meshgrid(np.arange(n), np.arange(m), indexing="ij"))
    a = {c: column(left, c)[i] for c in ("ra", "dec", "pmra", "pmdec", "position_epoch")}
    b = {c: column(right, c)[j] for c in a}
    epochs = np.isfinite(a["position_epoch"]) & np.isfinite(b["position_epoch"])
    move_b = epochs & np.isfinite(b["pmra"]) & np.isfinite(b["pmdec"])
    move_a = epochs & ~move_b & np.isfinite(a["pmra"]) & np.isfinite(a["pmdec"])
    for one, other, moves in ((a, b, move_a), (b, a, move_b)):
        years = other["position_epoch"] - one["position_epoch"]
        ra, dec = propagate(
            one["ra"],
            one["dec"],
            np.where(moves, one["pmra"], 0.0),
            np.where(moves, one["pmdec"], 0.0),
            np.where(moves, years, 0.0),
        )
        one["ra"], one["dec"] = np.where(moves, ra, one["ra"]), np.where(moves, dec, one["dec"])
    separation = separation_arcsec(a["ra"], a["dec"], b["ra"], b["dec"]).reshape(n, m)
    ids = [
        (left[name].to_pylist(), right[name].to_pylist())
        for name in ("gaia_dr3_source_id", "gaia_dr2_source_id")
        if use_gaia_id and name in left.schema.names and name in right.schema.names
    ]
    keys = right[key].to_pylist()
    found: dict[int, list] = {}
    conflicts = 0
    for p, q in np.argwhere(separation <= max(radius, id_radius)).tolist():
        common = [x[p] == y[q] for x, y in ids if x[p] is not None and y[q] is not None]
        if any(common) if common else separation[p, q] <= radius:
            found.setdefault(p, []).append((not any(common), separation[p, q], keys[q], q))
        elif common and separation[p, q] <= radius:
            conflicts += 1
    return {p: sorted(found[p]) for p in sorted(found)}, conflicts


def as_dict(matches: Matches):
    found: dict[int, list] = {}
    for p, q, separation, n, by_id in zip(
        matches.left.tolist(), matches.right.tolist(), matches.separation_arcsec.tolist(),
        matches.n_candidates.tolist(), matches.by_id.tolist(), strict=True,
    ):  # fmt: skip
        found.setdefault(p, []).append((not by_id, separation, q, n))
    return found


kinds = st.sets(st.sampled_from(["epoch", "many", "pm", "dr3", "dr2"]))


@THOROUGH
@given(seeds, radii, kinds, kinds, st.booleans(), st.booleans())
def test_equals_brute_force(seed, radius, left_kind, right_kind, use_gaia_id, crowded):
    """Also by what matches places where many rows crowd."""
    with mock.patch.object(crossmatch, "is_crowded", lambda *_: crowded):
        equals_brute_force(seed, radius, left_kind, right_kind, use_gaia_id)


def equals_brute_force(seed, radius, left_kind, right_kind, use_gaia_id):
    rng = np.random.default_rng(seed)
    places = anchors(rng)
    left, right = (
        random_table(rng, int(rng.integers(1, 70)), radius, kind, places)
        for kind in (left_kind, right_kind)
    )
    id_radius = radius * float(rng.uniform(1, 1.15))
    wanted, conflicts = brute_force(left, right, radius, id_radius, use_gaia_id)
    every = match(
        left,
        right,
        MatchSettings(
            radius_arcsec=radius, id_radius_arcsec=id_radius, pairs="all", use_gaia_id=use_gaia_id
        ),
    )
    assert every.n_conflicts == conflicts
    assert as_dict(every) == {
        p: [(far, s, q, len(rows)) for far, s, _, q in rows] for p, rows in wanted.items()
    }
    assert list(as_dict(every)) == list(wanted)  # sorted by left, too
    best = match(
        left,
        right,
        MatchSettings(
            radius_arcsec=radius, id_radius_arcsec=id_radius, pairs="best", use_gaia_id=use_gaia_id
        ),
    )
    assert as_dict(best) == {
        p: [(far, s, q, len(rows)) for far, s, _, q in rows[:1]] for p, rows in wanted.items()
    }


@THOROUGH
@given(seeds, radii, kinds, kinds)
def test_no_pair_reaches_farther_than_stated(seed, radius, left_kind, right_kind):
    rng = np.random.default_rng(seed)
    places = anchors(rng)
    left, right = (random_table(rng, 60, radius, kind, places) for kind in (left_kind, right_kind))
    found = match(
        left, right, MatchSettings(radius_arcsec=radius, id_radius_arcsec=radius * 1.1, pairs="all")
    )

    def motion(table: pa.Table) -> Motion:
        epochs, pm = column(table, "position_epoch"), np.hypot(
            column(table, "pmra"), column(table, "pmdec")
        )  # fmt: skip
        pm, epochs = pm[np.isfinite(pm)], epochs[np.isfinite(epochs)]
        if not len(epochs):
            return Motion(float(pm.max(initial=0)), np.nan, np.nan)
        return Motion(float(pm.max(initial=0)), float(epochs.min()), float(epochs.max()))

    chosen = MatchSettings(radius_arcsec=radius, id_radius_arcsec=radius * 1.1)
    reach = reach_arcsec(chosen, motion(left), motion(right), ids=True)
    (ra1, dec1), (ra2, dec2) = ((column(t, "ra"), column(t, "dec")) for t in (left, right))
    i, j = found.left, found.right
    assert np.all(separation_arcsec(ra1[i], dec1[i], ra2[j], dec2[j]) <= reach)


def test_reach_of_catalogs():
    plain, fixed = MatchSettings(radius_arcsec=1.0), Motion(0.0, np.nan, np.nan)
    assert reach_arcsec(plain, fixed, fixed, ids=False) == pytest.approx(1.0, abs=0.01)
    assert reach_arcsec(plain, fixed, fixed, ids=True) == pytest.approx(10.0, abs=0.01)
    off = MatchSettings(radius_arcsec=1.0, use_gaia_id=False)
    assert reach_arcsec(off, fixed, fixed, ids=True) == pytest.approx(1.0, abs=0.01)
    fast, old = Motion(10_000.0, 2016.0, 2016.0), Motion(0.0, 1991.0, 2000.0)
    assert reach_arcsec(plain, old, fast, ids=False) == pytest.approx(251.0, abs=0.01)
    assert reach_arcsec(plain, fast, old, ids=False) == pytest.approx(251.0, abs=0.01)
    assert reach_arcsec(plain, fixed, fast, ids=False) == pytest.approx(1.0, abs=0.01)
    each = reach_arcsec(plain, old, fast, ids=False, pm_mas_yr=np.array([0.0, 400.0]))
    assert np.allclose(each, [1.0, 11.0], atol=0.01)


@pytest.mark.parametrize("kind", [set(), {"epoch", "pm", "dr3"}])
def test_partitions_see_what_the_whole_sky_sees(kind):
    rng = np.random.default_rng(5)
    skies = [anchors(rng) for _ in range(10)]
    both = []
    for _ in range(2):
        tables = [random_table(rng, 60, 1.0, kind, places) for places in skies]
        table = pa.concat_tables(tables).drop(["star_id"])
        table = table.append_column("star_id", pa.array(rng.permutation(table.num_rows)))
        both.append(table.sort_by([("_healpix_29", "ascending"), ("star_id", "ascending")]))
    left, right = both
    chosen = MatchSettings(radius_arcsec=1.0, id_radius_arcsec=3.0, pairs="all")
    bound = Motion(3000.0, 1991.25, 2016.0) if kind else Motion(0.0, np.nan, np.nan)
    reach = float(reach_arcsec(chosen, bound, bound, ids=True))
    whole = match(left, right, chosen)
    assert len(whole.left) > 300
    names = ("left", "right", "separation_arcsec", "n_candidates", "by_id")
    parts_found: list[list] = []
    conflicts = 0
    left_cells, right_cells = (t["_healpix_29"].to_numpy() for t in (left, right))
    for base in range(12):
        for pixel in (HealpixPixel(9, int(p)) for p in np.unique(left_cells >> 40)):
            if pixel.first >> 58 != base:
                continue
            rows = np.flatnonzero((left_cells >= pixel.first) & (left_cells < pixel.stop))
            ranges = sorted([(pixel.first, pixel.stop), *surroundings(pixel, reach)[0]])
            others = np.flatnonzero(in_ranges(right_cells, ranges))
            found = match(left.take(pa.array(rows)), right.take(pa.array(others)), chosen)
            conflicts += found.n_conflicts
            values = [getattr(found, name) for name in names]
            parts_found.append([rows[values[0]], others[values[1]], *values[2:]])
    assert conflicts == whole.n_conflicts
    for number, name in enumerate(names):
        together = np.concatenate([part[number] for part in parts_found])
        np.testing.assert_array_equal(together, getattr(whole, name))


@pytest.mark.parametrize("radius", [0.5, 30.0])
def test_equals_astropy(radius):
    rng = np.random.default_rng(7)
    skies = [anchors(rng) for _ in range(10)]
    left, right = (
        pa.concat_tables([random_table(rng, 100, radius, set(), places) for places in skies])
        .sort_by([("_healpix_29", "ascending")])
        .combine_chunks()
        for _ in range(2)
    )
    a, b = (SkyCoord(t["ra"].to_numpy(), t["dec"].to_numpy(), unit="deg") for t in (left, right))
    i, j, apart, _ = search_around_sky(a, b, radius * u.arcsec)
    clear = np.abs(apart.arcsec - radius) > 1e-6
    found = match(left, right, MatchSettings(radius_arcsec=radius, pairs="all", use_gaia_id=False))
    inside = np.abs(found.separation_arcsec - radius) > 1e-6
    assert len(found.left) > 1000
    assert set(zip(i[clear].tolist(), j[clear].tolist(), strict=True)) == set(
        zip(found.left[inside].tolist(), found.right[inside].tolist(), strict=True)
    )


def test_radius_is_inclusive():
    left, right = sky_table([10.0], [20.0]), sky_table([10.0002], [20.0003], star_id=[1])
    apart = float(separation_arcsec(*(np.array([x]) for x in (10.0, 20.0, 10.0002, 20.0003)))[0])
    assert len(match(left, right, MatchSettings(radius_arcsec=apart)).left) == 1
    assert len(match(left, right, MatchSettings(radius_arcsec=np.nextafter(apart, 0))).left) == 0


def test_ties_go_to_the_smallest_key():
    left = sky_table([10.0], [20.0])
    for keys in ([7, 3, 5], ["b", "a", "c"]):
        right = sky_table([10.0] * 3, [20.0] * 3, star_id=keys, other=[1, 2, 3])
        found = match(left, right, MatchSettings(radius_arcsec=1.0))
        assert (found.right.tolist(), found.n_candidates.tolist()) == ([1], [3])
        assert match(
            left, right, MatchSettings(radius_arcsec=1.0), right_key="other"
        ).right.tolist() == [0]


def test_id_goes_before_distance_and_releases_are_not_mixed():
    left = sky_table([10.0], [20.0], gaia_dr3_source_id=[5], gaia_dr2_source_id=[6])
    right = sky_table(
        [10.0, 10.0, 10.0, 10.001, 10.0],
        [20.0, 20.0, 20.0, 20.0, 20.0],
        star_id=[0, 1, 2, 3, 4],
        gaia_dr3_source_id=pa.array([6, None, None, 5, 0]),
        gaia_dr2_source_id=pa.array([5, 5, None, 7, -9999]),
    )
    keys = right["star_id"].to_numpy()
    found = match(left, right, MatchSettings(radius_arcsec=1.0, pairs="all"))
    assert keys[found.right].tolist() == [3, 2, 4]
    assert found.by_id.tolist() == [True, False, False]
    assert found.n_conflicts == 2
    found = match(left, right, MatchSettings(radius_arcsec=1.0, pairs="all", use_gaia_id=False))
    assert keys[found.right].tolist() == [0, 1, 2, 4]
    assert not found.by_id.any()


def test_star_of_high_proper_motion():
    # Barnard's star moves 10.4 arcsec a year; its place in 1991.25 is 257 arcsec from that in 2016.
    ra, dec, pmra, pmdec = 269.44850252543836, 4.739420051112412, -801.551, 10362.394
    now = [np.array([x]) for x in (ra, dec, pmra, pmdec)]
    old = propagate(now[0], now[1], now[2], now[3], 1991.25 - 2016.0)
    left = sky_table(old[0], old[1], position_epoch=np.array([1991.25], "f4"))
    right = sky_table(
        [ra],
        [dec],
        star_id=[1],
        position_epoch=np.array([2016.0], "f4"),
        pmra=[pmra],
        pmdec=[pmdec],
    )
    assert match(left, right, MatchSettings(radius_arcsec=0.001)).right.tolist() == [0]
    assert (
        match(
            left, right.drop(["pmra"]), MatchSettings(radius_arcsec=200.0, id_radius_arcsec=200.0)
        ).right.tolist()
        == []
    )
    swapped = match(
        right, left.append_column("star_id", pa.array([1])), MatchSettings(radius_arcsec=0.001)
    )
    assert swapped.right.tolist() == [0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_pairs_as_far_apart_as_can_be(sign):
    """Each row is at the end of its motion, and just within the radius, of one other row.

    All of it happens where, and in the direction in which, cells of HEALPix are narrowest: on the
    edges of base pixels at the poles.
    """
    rng = np.random.default_rng(1)
    n, radius, pm, years = 60_000, 0.5, 400.0, 26.0
    ra = (rng.choice([0.0, 90.0, 180.0, 270.0], n) + rng.normal(0, 1, n)) % 360.0
    dec = sign * (90.0 - 2.0 * rng.random(n))
    angle = rng.choice([0, np.pi], n) + rng.choice([-1, 1], n) * np.arctan(2 / np.pi)
    angle += rng.normal(0, 0.1, n)
    pmra, pmdec = pm * np.sin(angle), pm * np.cos(angle)
    for epochs, path in ((False, 0.0), (True, -years)):
        columns, left = {"star_id": np.arange(n)}, {"star_id": np.arange(n)}
        if epochs:
            columns |= {"pmra": pmra, "pmdec": pmdec, "position_epoch": np.full(n, 2016.0)}
            left["position_epoch"] = np.where(np.arange(n) == 0, 2016.0, 2016.0 + path)
        other_ra, other_dec = propagate(ra, dec, pmra, pmdec, path - 0.99999e3 * radius / pm)
        a, b = sky_table(other_ra, other_dec, **left), sky_table(ra, dec, **columns)
        found = match(a, b, MatchSettings(radius_arcsec=radius, pairs="all"))
        own = a["star_id"].to_numpy()[found.left] == b["star_id"].to_numpy()[found.right]
        assert np.count_nonzero(own) == n - epochs


@pytest.mark.parametrize("ids", [False, True])
def test_crowds(ids):
    """Hundreds of rows in one cell, and one id on all of them."""
    rng = np.random.default_rng(3)
    tables = []
    for n in (400, 500):
        ra, dec = 45.0 + rng.normal(0, 2e-3, n), rng.normal(0, 2e-3, n)
        ra[: n // 4], dec[: n // 4] = 45.0, 1e-4
        columns = {"gaia_dr3_source_id": np.where(rng.random(n) < 0.6, 1, 2)} if ids else {}
        tables.append(sky_table(ra, dec, star_id=rng.permutation(n), **columns))
    wanted, conflicts = brute_force(tables[0], tables[1], 1.0, 2.0, True)
    found = match(
        tables[0], tables[1], MatchSettings(radius_arcsec=1.0, id_radius_arcsec=2.0, pairs="all")
    )
    assert as_dict(found) == {
        p: [(far, s, q, len(rows)) for far, s, _, q in rows] for p, rows in wanted.items()
    }
    assert found.n_conflicts == conflicts
    assert (conflicts > 1000) == ids


def test_a_placeholder_id_does_not_make_all_pairs(monkeypatch):
    """20,000 x 20,000 rows with one id: only those near each other are compared."""
    rng = np.random.default_rng(4)
    n = 20_000
    tables = [
        sky_table(
            rng.uniform(0, 360, n),
            np.degrees(np.arcsin(rng.uniform(-1, 1, n))),
            star_id=np.arange(n),
            gaia_dr3_source_id=np.full(n, 1),
        )
        for _ in range(2)
    ]
    compared = []
    original = crossmatch._separation

    def counting(a, b, i, j):
        compared.append(len(i))
        return original(a, b, i, j)

    monkeypatch.setattr(crossmatch, "_separation", counting)
    match(tables[0], tables[1], MatchSettings(radius_arcsec=1.0))
    assert sum(compared) < 10_000


def test_many_rows_at_one_position():
    """Counts of pairs are exact where no memory could hold the pairs, and all are refused."""
    n = 100_000
    ids = np.where(np.arange(n) % 2 == 0, np.arange(n) + 1, 0)
    table = sky_table(np.full(n, 10.0), np.full(n, 5.0), star_id=np.arange(n)[::-1],
                      gaia_dr3_source_id=ids)  # fmt: skip
    found = match(table, table, MatchSettings(radius_arcsec=1.0))
    assert found.left.tolist() == list(range(n))
    by_id = ids > 0
    assert (found.by_id == by_id).all() and (found.right[by_id] == found.left[by_id]).all()
    # With an id: the row of the same one, and half of all that have none. Without: all.
    np.testing.assert_array_equal(found.n_candidates, np.where(by_id, 1 + n // 2, n))
    assert set(found.right[~by_id]) == {n - 1}, "the smallest key"
    assert found.n_conflicts == (n // 2) ** 2 - n // 2
    with pytest.raises(ConfigError, match=r"50,000 reference rows crowd at ra 10\.0+, dec 5\.0+"):
        match(table, table, MatchSettings(radius_arcsec=1.0, pairs="all"))


@pytest.mark.parametrize("rows", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("pairs", ["best", "all"])
def test_empty(rows, pairs):
    rng = np.random.default_rng(0)
    kind = {"epoch", "pm", "dr3", "dr2"}
    places = anchors(rng)
    left, right = (random_table(rng, 3, 1.0, kind, places).slice(0, n) for n in rows)
    found = match(left, right, MatchSettings(radius_arcsec=1.0, pairs=pairs))
    assert len(found.left) == len(found.right) == len(found.n_candidates) == 0
    assert found.left.dtype == found.right.dtype == np.int64
    assert found.n_candidates.dtype == np.int32
    assert found.by_id.dtype == np.bool_


def test_columns_of_nulls_are_as_good_as_absent():
    rng = np.random.default_rng(8)
    places = anchors(rng)
    left, right = (random_table(rng, 50, 1.0, set(), places) for _ in range(2))
    wanted = match(left, right, MatchSettings(radius_arcsec=1.0))
    assert len(wanted.left)
    names = ("position_epoch", "pmra", "pmdec", "gaia_dr3_source_id", "gaia_dr2_source_id")
    for dtype in (pa.null(), pa.int64()):
        full = [
            pa.table(
                {**{c: t[c] for c in t.schema.names}, **{n: pa.nulls(50, dtype) for n in names}}
            )
            for t in (left, right)
        ]
        found = match(full[0], full[1], MatchSettings(radius_arcsec=1.0))
        np.testing.assert_array_equal(found.right, wanted.right)


def test_wrong_input():
    good = sky_table([10.0, 200.0], [20.0, -20.0], star_id=[1, 2])
    with pytest.raises(PartitionError, match="left side of the crossmatch is not sorted"):
        match(good.take(pa.array([1, 0])), good, MatchSettings(radius_arcsec=1.0))
    with pytest.raises(ConfigError, match="right side of the crossmatch has no column 'obs_id'"):
        match(good, good, MatchSettings(radius_arcsec=1.0), right_key="obs_id")
    with pytest.raises(ConfigError, match="left side of the crossmatch has no column 'dec'"):
        match(good.drop(["dec"]), good, MatchSettings(radius_arcsec=1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"radius_arcsec": 0.0},
        {"radius_arcsec": -1.0},
        {"radius_arcsec": float("nan")},
        {"radius_arcsec": 3600.0},
        {"radius_arcsec": 1.0, "id_radius_arcsec": 0.5},
        {"radius_arcsec": 1.0, "pairs": "some"},
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(ConfigError):
        MatchSettings(**wrong)


def test_settings_cross_processes():
    chosen = MatchSettings(radius_arcsec=1.0, id_radius_arcsec=2.0, pairs="all", use_gaia_id=False)
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert (
        MatchSettings(radius_arcsec=1.0, id_radius_arcsec=0.5, use_gaia_id=False).id_radius_arcsec
        == 0.5
    )


@pytest.mark.parametrize(
    ("target", "target_key", "n_pairs", "n_references"),
    [
        ("lamost_dr3_giants.csv", "obsid", 736, 601),
        ("galah_dr4.csv", "sobject_id", 601, 571),
    ],
)
def test_real_surveys(real_data, target, target_key, n_pairs, n_references):
    """Counts of an independent brute-force match at 3 arcsec with APOGEE."""

    def load(name: str, key: str) -> Any:
        with (real_data / name).open() as file:
            rows = list({row[key]: row for row in reversed(list(csv.DictReader(file)))}.values())
        ra, dec = (np.array([float(row[c]) for row in rows]) for c in ("ra", "dec"))
        return sky_table(ra, dec, star_id=[row[key] for row in rows])

    found = match(
        load(target, target_key),
        load("apogee_dr17.csv", "apogee_id"),
        MatchSettings(radius_arcsec=3.0),
    )
    assert (len(found.left), len(np.unique(found.right))) == (n_pairs, n_references)

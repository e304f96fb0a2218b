"""Grouping against a plain-Python version of the stated rule."""

import csv
import itertools
import pickle
from typing import Any
from unittest import mock

import healpy
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sos_dask.errors import ConfigError, PartitionError
from sos_dask.sky.healpix import HealpixPixel, ang2pix, in_ranges, propagate, separation_arcsec
from sos_dask.stars import group as grouping
from sos_dask.stars.group import DedupeSettings, Groups, group, group_around

THOROUGH = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, max_examples=200
)
CORNER = float(np.degrees(np.arcsin(2 / 3)))
CENTRES = [
    (0.0, 90.0), (77.0, -90.0), (0.0, 0.0), (45.0, 0.0), (0.0, CORNER), (90.0, -CORNER),
    (45.0, CORNER), (180.0, 89.9999), (90.0, 60.0), (211.1, -33.3),
]  # fmt: skip
Rng = np.random.Generator
seeds = st.integers(0, 2**32 - 1)


class Sky:
    """Rows to be grouped: a few stars, often blended, each with a few observations."""

    def __init__(self, rng: Rng, n: int, radius: float, releases: tuple[str, ...], ties: bool):
        places = np.array(CENTRES)[rng.integers(0, len(CENTRES), 2)]
        order = int(rng.integers(8, 30))
        cell = ang2pix(places[:1, 0], places[:1, 1], order)
        corner = healpy.boundaries(1 << order, cell, step=1, nest=True)[:, :, rng.integers(0, 4)]
        places = np.concatenate([places, np.stack(healpy.vec2ang(corner, lonlat=True), axis=1)])
        n_stars = max(n // 3, 1)
        star_ra, star_dec = places[rng.integers(0, 3, n_stars)].T
        # Stars about a radius apart, so that chains, blends and lonely ones all occur.
        star_ra, star_dec = self.around(rng, star_ra, star_dec, radius * rng.uniform(0.3, 4))
        twins = rng.random(n_stars) < 0.2
        star_ra = np.where(twins, star_ra[0], star_ra)
        star_dec = np.where(twins, star_dec[0], star_dec)
        star = rng.integers(0, n_stars, n)
        ra, dec = self.around(rng, star_ra[star], star_dec[star], radius * rng.uniform(0, 1.2))
        same = rng.random(n) < rng.choice([0.15, 0.7])
        ra, dec = np.where(same, star_ra[star], ra), np.where(same, star_dec[star], dec)
        cells = ang2pix(ra, dec)
        sky = np.argsort(cells, kind="stable")
        self.ra, self.dec, self.cells, star = ra[sky], dec[sky], cells[sky], star[sky]
        self.rank = rng.permutation(n) // (3 if ties else 1)
        self.ids = {}
        for release in releases:
            name = rng.permutation(n_stars)[star] + 2**61
            wrong, none = rng.random(n) < 0.1, rng.random(n) < rng.choice([0.1, 0.5, 0.9])
            name = np.where(wrong, rng.integers(0, n_stars, n) + 2**61, name)
            self.ids[release] = np.where(none, rng.choice([0, -9999], n), name)
        self.frontier = rng.random(n) < 0.05

    @staticmethod
    def around(rng: Rng, ra: Any, dec: Any, arcsec: float) -> Any:
        angle, far = rng.uniform(0, 2 * np.pi, len(ra)), arcsec * 1e3 * rng.random(len(ra))
        return propagate(ra, dec, far * np.sin(angle), far * np.cos(angle), 1.0)

    def group(self, chosen: DedupeSettings, rows: Any = slice(None)) -> Groups:
        ids = {release: values[rows] for release, values in self.ids.items()}
        return group(
            self.ra[rows],
            self.dec[rows],
            self.cells[rows],
            self.rank[rows],
            ids,
            self.frontier[rows],
            chosen,
        )


def links_listed(listed: bool) -> Any:
    """Rows are grouped by a list of their links, however many, or without one."""
    if listed:
        return mock.patch.object(grouping, "_MOST", 1 << 20)
    return mock.patch.object(grouping._Listed, "of", lambda *_: None)


def one_by_one(sky: Sky, chosen: DedupeSettings) -> tuple[list[int], list[bool]]:
    """The stated rule, one row after the other."""
    n = len(sky.ra)
    index = np.arange(n)
    i, j = (grid.ravel() for grid in np.meshgrid(index, index))
    apart = separation_arcsec(sky.ra[i], sky.dec[i], sky.ra[j], sky.dec[j]).reshape(n, n).tolist()
    near, far = chosen.radius_arcsec, chosen.id_radius_arcsec
    rank = [(r, p) for p, r in enumerate(sky.rank.tolist())]
    # Newest first.
    names = [sky.ids[r].tolist() for r in ("dr3", "dr2") if r in sky.ids and chosen.use_gaia_id]

    def same_id(p: int, q: int) -> bool:
        return any(name[p] == name[q] > 0 for name in names)

    linked = [
        [q for q in range(n) if q != p and apart[p][q] <= (far if same_id(p, q) else near)]
        for p in range(n)
    ]
    # Components that hold a frontier row.
    touched = sky.frontier.tolist()
    todo = [p for p in range(n) if touched[p]]
    while todo:
        for q in linked[todo.pop()]:
            if not touched[q]:
                touched[q] = True
                todo.append(q)

    tier = [next((t for t, name in enumerate(names) if name[p] > 0), 9) for p in range(n)]
    star = list(range(n))

    for p in range(n):  # rule 1
        for q in linked[p]:
            if tier[p] == tier[q] < 9 and names[tier[p]][p] == names[tier[p]][q]:
                star = [star[p] if s == star[q] else s for s in star]
    if len(names) == 2:  # rule 2
        older = names[1]
        held = {
            star[p]: {older[q] for q in range(n) if star[q] == star[p] and older[q] > 0}
            for p in range(n)
            if tier[p] == 0
        }
        links = sorted(
            (older[q] not in held[star[p]], apart[p][q], rank[p][0], rank[q][0], p, q)
            for p in range(n)
            for q in linked[p]
            if tier[p] == 0 and tier[q] == 1
        )
        joins: dict[int, int] = {}
        for *_, p, q in links:
            host, guest = star[p], star[q]
            if guest not in joins and (not held[host] or older[q] in held[host]):
                joins[guest] = host
                held[host].add(older[q])
        star = [joins.get(s, s) for s in star]
    primary = list(range(n))
    known = [t < 9 for t in tier]
    for p in range(n):
        if known[p]:
            primary[p] = min((q for q in range(n) if known[q] and star[q] == star[p]),
                             key=lambda q: rank[q])  # fmt: skip
    left = []
    for p in range(n):  # rule 3
        if not known[p]:
            hosts = [q for q in linked[p] if known[q]]
            if hosts:
                primary[p] = primary[min(hosts, key=lambda q: (apart[p][q], rank[q]))]
            else:
                left.append(p)
    claimed: set[int] = set()
    primaries = []
    for p in sorted(left, key=lambda p: rank[p]):  # rule 4
        if p not in claimed:
            primaries.append(p)
            claimed |= {q for q in left if q in linked[p]}
    for p in left:
        if p not in primaries:
            hosts = [q for q in primaries if q in linked[p]]
            primary[p] = min(hosts, key=lambda q: (apart[p][q], rank[q]))
    return primary, touched


@THOROUGH
@given(
    seeds,
    st.integers(1, 45),
    st.sampled_from([0.01, 1.5, 600.0]),
    st.sampled_from([(), ("dr3",), ("dr2",), ("dr2", "dr3")]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_group_equals_one_by_one(seed, n, radius, releases, ties, use_gaia_id, crowded):
    """By the links of rows, and by what stands in for them where they crowd."""
    rng = np.random.default_rng(seed)
    sky = Sky(rng, n, radius, releases, ties)
    chosen = DedupeSettings(
        radius_arcsec=radius, id_radius_arcsec=radius * rng.uniform(1, 3), use_gaia_id=use_gaia_id
    )
    with links_listed(not crowded):
        found = sky.group(chosen)
    primary, touched = one_by_one(sky, chosen)
    assert found.primary.tolist() == primary
    assert found.touches_frontier.tolist() == touched


def stars_of(primary: Any, key: Any) -> set[frozenset[int]]:
    members: dict[int, list[int]] = {}
    for row, leader in enumerate(primary.tolist()):
        members.setdefault(leader, []).append(int(key[row]))
    return {frozenset(group) for group in members.values()}


@pytest.mark.parametrize("releases", [(), ("dr2", "dr3")])
def test_order_of_rows_does_not_matter(releases):
    rng = np.random.default_rng(2)
    for _ in range(20):
        sky = Sky(rng, 60, 1.5, releases, ties=False)
        rows = np.lexsort((rng.random(60), sky.cells))
        one, other = sky.group(DedupeSettings()), sky.group(DedupeSettings(), rows)
        np.testing.assert_array_equal(rows[other.primary], one.primary[rows])
        np.testing.assert_array_equal(other.touches_frontier, one.touches_frontier[rows])


@pytest.mark.parametrize("centre", [(0.0, 90.0), (0.0, CORNER), (0.0, 0.0), (45.0, CORNER)])
@pytest.mark.parametrize("releases", [(), ("dr2", "dr3")])
@pytest.mark.parametrize("moved", [0.0, 2.0])
def test_partitions_see_what_the_whole_sky_sees(centre, releases, moved):
    """Pixels of 6 arcsec with chains of stars over many of them, read in growing rings."""
    rng = np.random.default_rng(11)
    n, chosen = 1500, DedupeSettings(radius_arcsec=1.5, id_radius_arcsec=2.5)
    sky = Sky(rng, n, 1.5, releases, ties=False)
    place = (np.full(n, centre[0]), np.full(n, centre[1]))
    ra, dec = sky.around(rng, *place, 50.0)
    cells = ang2pix(ra, dec)
    order = np.argsort(cells, kind="stable")
    sky.ra, sky.dec, sky.cells = ra[order], dec[order], cells[order]
    sky.ids = {r: np.where(rng.random(n) < 0.3, 1 + rng.integers(0, 200, n), 0) for r in releases}
    sky.frontier = np.zeros(n, dtype=bool)
    whole = sky.group(chosen).primary
    assert len(np.unique(whole)) < 0.8 * n
    stored = ang2pix(*sky.around(rng, sky.ra, sky.dec, moved)) if moved else sky.cells
    table = pa.table({"_healpix_29": sky.cells, "ra": sky.ra, "dec": sky.dec, "row": np.arange(n)})
    for release, values in sky.ids.items():
        table = table.append_column(f"gaia_{release}_source_id", pa.array(values))
    n_reads = 0
    pixels = [HealpixPixel(15, int(p)) for p in np.unique(stored >> 28)]
    for pixel in pixels:

        def read(ranges: Any, pixel: HealpixPixel = pixel) -> Any:
            nonlocal n_reads
            n_reads += 1
            own = in_ranges(stored, [(pixel.first, pixel.stop)])
            known = in_ranges(stored, ranges)
            assert known[own].all()
            return table.filter(pa.array(known)), own[known]

        reach = chosen.id_radius_arcsec + moved
        found, own, primary = group_around(
            pixel, read, lambda some: sky.rank[some["row"].to_numpy()], reach, chosen, ""
        )
        rows = found["row"].to_numpy()
        np.testing.assert_array_equal(rows[primary[own]], whole[rows[own]])
    assert n_reads > len(pixels)


def row_of_sky(positions_arcsec: list[float], dr3: list[int], dr2: list[int]) -> Any:
    """Rows on a line, ranked in their order; gives primaries in the order of the input."""
    n = len(positions_arcsec)
    ra, dec = np.full(n, 45.0), np.array(positions_arcsec) / 3600.0
    cells = ang2pix(ra, dec)
    order = np.argsort(cells, kind="stable")
    ids = {"dr3": np.array(dr3)[order], "dr2": np.array(dr2)[order]}
    found = group(
        ra[order],
        dec[order],
        cells[order],
        order,
        ids,
        None,
        DedupeSettings(radius_arcsec=1.5, id_radius_arcsec=10.0),
    )
    assert not found.touches_frontier.any()
    out = np.empty(n, dtype=int)
    out[order] = order[found.primary]
    return out.tolist()


@pytest.mark.parametrize(
    ("positions", "dr3", "dr2", "primaries"),
    [
        # A chain of four, 1 arcsec apart: friends of friends would make it one star.
        ([0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 2]),
        # The third row is claimed by the first, but nearer to the later primary.
        ([0, 2.5, 1.4], [0, 0, 0], [0, 0, 0], [0, 1, 1]),
        # Different ids are different stars even at the same place; equal ids reach 10 arcsec.
        ([0, 0, 9], [1, 2, 1], [0, 0, 0], [0, 1, 0]),
        ([0, 10.5], [1, 1], [0, 0], [0, 1]),
        # A row without an id goes to the nearest row that has one; that row is the primary.
        ([0.6, 0, 1], [0, 1, 2], [0, 0, 0], [2, 1, 2]),
        # DR3 decides, where a row has both; DR2 alone joins the same DR2, or by position.
        ([0, 0.5], [1, 1], [5, 6], [0, 0]),
        ([0, 0.5], [1, 2], [5, 5], [0, 1]),
        ([0, 8], [1, 0], [5, 5], [0, 0]),
        ([0, 0.5], [1, 0], [5, 6], [0, 1]),
        ([0, 0.5], [1, 0], [0, 6], [0, 0]),
        # Two DR2 stars near one DR3 star: only the nearer is it.
        ([0, 1.0, -0.5], [1, 0, 0], [0, 5, 6], [0, 1, 0]),
        # One that shares a DR2 id goes before one that is nearer.
        ([0, 3, 0.5], [1, 2, 0], [0, 5, 5], [0, 1, 1]),
        # A star may take a second group of the DR2 id that it has taken, and no other.
        ([0, 9.5, 19, 0.2, 0.2, 19], [1, 1, 1, 0, 0, 0], [0, 0, 0, 6, 5, 5], [0, 0, 0, 3, 0, 0]),
        # The id of no release is compared with that of another.
        ([0, 3], [7, 0], [0, 7], [0, 1]),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_rule_by_example(positions, dr3, dr2, primaries, listed):
    with links_listed(listed):
        assert row_of_sky(positions, dr3, dr2) == primaries


@THOROUGH
@given(seeds, st.integers(0, 29), st.sampled_from([0.01, 1.5, 600.0]), st.booleans())
def test_what_reaches_out_of_a_pixel_is_read(seed, order, reach, moving):
    """Every row within reach of a row inside, and no row of a link that is cut off unmarked."""
    rng = np.random.default_rng(seed)
    n, chosen = 60, DedupeSettings(radius_arcsec=reach, use_gaia_id=False)
    sky = Sky(rng, n, reach, (), ties=False)
    moved = reach * rng.uniform(0, 2) if moving else 0.0
    stored = ang2pix(*sky.around(rng, sky.ra, sky.dec, moved)) if moving else sky.cells
    pixel = HealpixPixel(order, int(stored[rng.integers(n)] >> 2 * (29 - order)))
    inside = in_ranges(stored, [(pixel.first, pixel.stop)])
    i, j = (grid.ravel() for grid in np.meshgrid(np.arange(n), np.arange(n)))
    apart = separation_arcsec(sky.ra[i], sky.dec[i], sky.ra[j], sky.dec[j])
    linked = (apart <= reach).reshape(n, n)
    table = pa.table({"_healpix_29": sky.cells, "ra": sky.ra, "dec": sky.dec, "row": np.arange(n)})
    reads: list[Any] = []

    def read(ranges: Any) -> Any:
        assert all(low < high for low, high in ranges)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(ranges))
        known = in_ranges(stored, ranges)
        assert in_ranges(np.array([pixel.first, pixel.stop - 1]), ranges).all()
        assert known[linked[inside].any(axis=0)].all(), "within reach of a row inside"
        reads.append(known)
        return table.filter(pa.array(known)), inside[known]

    def marked(ra: Any, dec: Any, cells: Any, rank: Any, ids: Any, frontier: Any, used: Any) -> Any:
        known = reads[-1]
        assert not frontier[inside[known]].any()
        whole = np.flatnonzero(known)[~frontier]
        assert known[linked[whole].any(axis=0)].all(), "all links of a row that is not marked"
        return group(ra, dec, cells, rank, ids, frontier, used)

    with mock.patch.object(grouping, "group", marked):
        found, own, primary = group_around(
            pixel, read, lambda some: sky.rank[some["row"].to_numpy()], reach + moved, chosen, ""
        )
    rows = found["row"].to_numpy()
    np.testing.assert_array_equal(rows[own], np.flatnonzero(inside))
    sky.frontier = np.zeros(n, dtype=bool)
    np.testing.assert_array_equal(rows[primary[own]], sky.group(chosen).primary[rows[own]])


def test_members_lie_within_the_radius_of_their_primary():
    rng = np.random.default_rng(0)
    n = 20_000
    ra, dec = 150 + rng.normal(0, 0.02, n), rng.normal(0, 0.02, n)
    cells = ang2pix(ra, dec)
    sky = np.argsort(cells)
    ra, dec, rank = ra[sky], dec[sky], rng.permutation(n)
    found = group(ra, dec, cells[sky], rank, {}, None, DedupeSettings(radius_arcsec=1.5))
    leader = found.primary
    apart = separation_arcsec(ra, dec, ra[leader], dec[leader])
    assert apart.max() <= 1.5
    np.testing.assert_array_equal(leader[leader], leader)
    assert 0.1 * n < len(np.unique(leader)) < 0.8 * n


@pytest.mark.parametrize("releases", [(), ("dr2", "dr3")])
@pytest.mark.parametrize("place", ["scattered", "grid", "one position"])
def test_crowds_are_grouped_as_by_their_links(place, releases):
    """A thousand rows within the radius, steps of just the radius, and ids of all kinds."""
    rng = np.random.default_rng(5)
    n = 1200
    for number in range(4):
        sky = Sky(rng, n, 1.5, releases, ties=number % 2 == 1)
        ra, dec = np.repeat([CENTRES[number]], n, axis=0).T.astype(np.float64)
        if place == "scattered":
            ra, dec = sky.around(rng, ra, dec, 1.5)
        elif place == "grid":
            step = 1.5 / 3600 * rng.integers(0, 6, (2, n))
            ra, dec = (100.0 + step[0]) % 360, step[1] - 0.002
        cells = ang2pix(ra, dec)
        order = np.argsort(cells, kind="stable")
        sky.ra, sky.dec, sky.cells = ra[order], dec[order], cells[order]
        if number > 1:  # few ids, many rows each
            sky.ids = {release: np.where(ids > 0, ids % 5, 0) for release, ids in sky.ids.items()}
        found = []
        for listed in (True, False):
            with links_listed(listed):
                found.append(sky.group(DedupeSettings(radius_arcsec=1.5, id_radius_arcsec=4.0)))
        np.testing.assert_array_equal(found[0].primary, found[1].primary)
        np.testing.assert_array_equal(found[0].touches_frontier, found[1].touches_frontier)


@pytest.mark.parametrize("listed", [True, False])
def test_the_radius_is_inclusive_to_the_last_bit(listed):
    rng = np.random.default_rng(8)
    for _ in range(300):
        ra, dec = rng.uniform(0, 360) + rng.uniform(0, 1e-3, 2), rng.uniform(-1e-3, 1e-3, 2)
        cells = ang2pix(ra, dec)
        order = np.argsort(cells)
        ra, dec, cells = ra[order], dec[order], cells[order]
        apart = float(separation_arcsec(ra[:1], dec[:1], ra[1:], dec[1:])[0])
        with links_listed(listed):
            for radius, primary in ((apart, [0, 0]), (np.nextafter(apart, 0.0), [0, 1])):
                chosen = DedupeSettings(radius_arcsec=radius, id_radius_arcsec=10.0)
                found = group(ra, dec, cells, np.arange(2), {}, np.array([True, False]), chosen)
                assert found.primary.tolist() == primary
                assert found.touches_frontier.tolist() == [True, primary[1] == 0]


def test_a_million_rows_crowd():
    """More pairs than any memory holds: at one position, and within a tenth of an arcsecond."""
    rng = np.random.default_rng(2)
    n = 10**6
    rank = rng.permutation(n)
    ra, dec = np.full(n, 10.0), np.full(n, 5.0)
    frontier = np.arange(n) == 0
    ids = {"dr3": np.where(rng.random(n) < 0.5, np.arange(n) + 1, 0)}
    found = group(ra, dec, ang2pix(ra, dec), rank, ids, frontier, DedupeSettings())
    assert found.touches_frontier.all()
    known = ids["dr3"] > 0
    np.testing.assert_array_equal(found.primary[known], np.flatnonzero(known))
    best = np.flatnonzero(known)[np.argmin(rank[known])]
    assert (found.primary[~known] == best).all()
    ra, dec = 10 + rng.uniform(-1e-5, 1e-5, n), 5 + rng.uniform(-1e-5, 1e-5, n)
    cells = ang2pix(ra, dec)
    sky = np.argsort(cells)
    found = group(ra[sky], dec[sky], cells[sky], rank, {}, frontier, DedupeSettings())
    assert found.touches_frontier.all()
    assert (found.primary == np.argmin(rank)).all()


def test_hundreds_of_observations_of_one_star():
    """Standard stars, and placeholders that look like ids, are searched on the sky."""
    rng = np.random.default_rng(1)
    n = 600
    ra, dec = np.full(n, 45.0), rng.choice([0.0, 4.0 / 3600, 30.0 / 3600], n)
    ids = np.where(rng.random(n) < 0.8, 1, 2)
    cells = ang2pix(ra, dec)
    sky = np.argsort(cells, kind="stable")
    ra, dec, ids, rank = ra[sky], dec[sky], ids[sky], rng.permutation(n)
    found = group(
        ra,
        dec,
        cells[sky],
        rank,
        {"dr3": ids},
        None,
        DedupeSettings(radius_arcsec=1.5, id_radius_arcsec=10.0),
    )
    where = np.where(dec > 20 / 3600, 10, 0) + ids  # 0 and 4 arcsec belong together
    assert stars_of(found.primary, np.arange(n)) == stars_of(where, np.arange(n))
    for name in np.unique(where):
        rows = np.flatnonzero(where == name)
        assert set(found.primary[rows]) == {rows[np.argmin(rank[rows])]}


@pytest.mark.parametrize("ids", [{}, {"dr3": np.zeros(0, dtype=np.int64)}])
def test_no_rows(ids):
    none, integers = np.zeros(0), np.zeros(0, dtype=np.int64)
    found = group(none, none, integers, integers, ids, integers > 0, DedupeSettings())
    assert len(found.primary) == len(found.touches_frontier) == 0


def test_rows_must_be_sorted_on_the_sky():
    two = np.array([10.0, 200.0])
    cells = np.sort(ang2pix(two, two / 10))[::-1]
    with pytest.raises(PartitionError, match="not sorted"):
        group(two, two / 10, cells, np.arange(2), {}, None, DedupeSettings())


@pytest.mark.parametrize(
    "wrong",
    [
        {"radius_arcsec": 0.0},
        {"radius_arcsec": float("nan")},
        {"id_radius_arcsec": 3600.0},
        {"radius_arcsec": 2.0, "id_radius_arcsec": 1.0},
        {"method": "mean"},
        {"max_spread": 0.0},
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(ConfigError):
        DedupeSettings(**wrong)


def test_settings_cross_processes():
    chosen = DedupeSettings(
        radius_arcsec=2.0, id_radius_arcsec=3.0, method="median", max_spread=4.0, use_gaia_id=False
    )
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert (
        DedupeSettings(radius_arcsec=2.0, id_radius_arcsec=1.0, use_gaia_id=False).id_radius_arcsec
        == 1.0
    )


def test_repeats_of_apogee(real_data):
    """Real repeats: rows of one APOGEE id at one place are one star."""
    with (real_data / "apogee_dr17.csv").open() as file:
        rows = list(csv.DictReader(file))
    ra, dec = (np.array([float(row[name]) for row in rows]) for name in ("ra", "dec"))
    names = np.array([row["apogee_id"] for row in rows])
    cells = ang2pix(ra, dec)
    sky = np.argsort(cells, kind="stable")
    none = np.zeros(len(sky), dtype=np.int64)
    found = group(
        ra[sky], dec[sky], cells[sky], np.arange(len(sky)), {"dr3": none}, None, DedupeSettings()
    )
    together = names[sky] == names[sky][found.primary]
    assert together.mean() > 0.999
    n_stars = len(np.unique(found.primary))
    assert n_stars == pytest.approx(len(np.unique(names)), rel=2e-3)

"""Geometry on the sphere, against brute force, astropy and the definition of HEALPix."""

import itertools
import subprocess
import sys
import warnings

import healpy
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sos_dask.errors import ConfigError
from sos_dask.healpix import (
    MAX_ORDER,
    FloatArray,
    HealpixPixel,
    IntArray,
    ang2pix,
    cell_ranges,
    in_ranges,
    partition_of,
    plan_partitions,
    with_neighbours,
)
from sos_dask.nearby import candidates, near_edge, pairs_within
from sos_dask.sphere import ARCSEC_PER_RADIAN, propagate, separation_arcsec, unit_vectors
from sos_dask.surroundings import (
    around_cells,
    near_pixel,
    order_for_radius,
    surrounding_cells,
    surroundings,
)

SETTINGS = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, max_examples=100
)
right_ascensions = st.floats(0, 360, exclude_max=True, allow_subnormal=False)
declinations = st.floats(-90, 90, allow_subnormal=False)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def pixels(draw: st.DrawFn, max_order: int = MAX_ORDER) -> HealpixPixel:
    order = draw(st.integers(0, max_order))
    return HealpixPixel(order, draw(st.integers(0, 12 * 4**order - 1)))


def on_sphere(rng: np.random.Generator, n: int) -> tuple[FloatArray, FloatArray]:
    return rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))


@pytest.mark.parametrize("order", [0, 5, 13, MAX_ORDER])
def test_cells_and_neighbours_are_those_of_healpy(order):
    ra, dec = on_sphere(np.random.default_rng(order), 20_000)
    ra, dec = np.append(ra, [0.0, 45.0, 359.99]), np.append(dec, [90.0, -90.0, 0.0])
    cells = ang2pix(ra, dec, order)
    assert np.array_equal(cells, healpy.ang2pix(1 << order, ra, dec, nest=True, lonlat=True))
    around = healpy.get_all_neighbours(1 << order, cells, nest=True)
    assert np.array_equal(with_neighbours(cells, order)[:, 1:].T, around)


@pytest.mark.parametrize("dec", [90.001, -91.0, np.nan])
def test_a_place_off_the_sphere_has_no_cell(dec):
    with pytest.raises(ValueError, match="declination"):
        ang2pix(np.array([0.0, 1.0]), np.array([0.0, dec]))


def test_import_is_light():
    """Every process of a cluster pays for it."""
    code = "import sys, sos_dask.stages.apply; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    heavy = {"astropy", "healpy", "matplotlib", "pandas", "scipy", "xgboost", "distributed"}
    assert heavy.isdisjoint(run.stdout.split())


def hard_places() -> list[tuple[float, float]]:
    """Poles, RA 0, and every corner of the twelve base pixels: at eight only three of them meet."""
    corners = healpy.boundaries(1, np.arange(12), step=1, nest=True).transpose(0, 2, 1)
    x, y, z = corners.reshape(-1, 3).T
    found = {
        (round(float(ra), 9) % 360, round(float(dec), 9))
        for ra, dec in zip(np.degrees(np.arctan2(y, x)), np.degrees(np.arcsin(z)), strict=True)
    }
    return [*sorted(found), (0.0, 0.0), (0.0, 30.0), (180.0, -60.0)]


HARD = hard_places()


def around(
    rng: np.random.Generator, ra: FloatArray, dec: FloatArray, radius_arcsec: float
) -> tuple[FloatArray, FloatArray]:
    """Points at a random angle from others, at most (and often almost) the radius away."""
    n = len(ra)
    angle = np.radians(radius_arcsec / 3600) * np.minimum(1, rng.uniform(0, 1.3, n)) * 0.999999
    towards = rng.uniform(0, 2 * np.pi, n)
    lon, lat = np.radians(ra), np.radians(dec)
    sin_lat = np.sin(lat) * np.cos(angle) + np.cos(lat) * np.sin(angle) * np.cos(towards)
    d_lon = np.arctan2(
        np.sin(towards) * np.sin(angle) * np.cos(lat), np.cos(angle) - np.sin(lat) * sin_lat
    )
    return np.degrees(lon + d_lon) % 360, np.degrees(np.arcsin(np.clip(sin_lat, -1, 1)))


# --- pixels ---------------------------------------------------------------------------------------


@SETTINGS
@given(pixels(MAX_ORDER - 1))
def test_a_pixel_is_the_range_of_its_children(pixel):
    children = [HealpixPixel(pixel.order + 1, 4 * pixel.pixel + i) for i in range(4)]
    assert pixel.first == children[0].first
    assert pixel.stop == children[3].stop
    assert all(a.stop == b.first for a, b in itertools.pairwise(children))
    assert pixel.stop - pixel.first == 4 ** (MAX_ORDER - pixel.order)


@SETTINGS
@given(pixels(), pixels())
@example(HealpixPixel(2, 4), HealpixPixel(2, 5))
@example(HealpixPixel(2, 4), HealpixPixel(4, 5 * 16))
@example(HealpixPixel(2, 4), HealpixPixel(4, 5 * 16 - 1))
def test_overlap_is_containment(a, b):
    low, high = sorted((a, b), key=lambda pixel: pixel.order)
    inside = high.pixel >> 2 * (high.order - low.order) == low.pixel
    assert a.overlaps(b) == b.overlaps(a) == inside


@SETTINGS
@given(pixels())
def test_text_of_a_pixel_is_read_back(pixel):
    assert HealpixPixel.parse(str(pixel)) == pixel


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "2:x", "2:4:1", "2.0:4", "order:pixel"])
def test_text_that_is_no_pixel(text):
    with pytest.raises(ConfigError, match="is not a HEALPix pixel") as caught:
        HealpixPixel.parse(text)
    assert "2:44" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-1:0", "order -1 is outside 0..29"),
        ("30:0", "order 30 is outside 0..29"),
        ("0:12", r"pixel 12 does not exist at HEALPix order 0 \(0..11\)"),
        ("2:-1", "pixel -1 does not exist"),
        ("29:3458764513820540928", "does not exist at HEALPix order 29"),
    ],
)
def test_pixels_that_do_not_exist(text, message):
    with pytest.raises(ConfigError, match=message):
        HealpixPixel.parse(text)


@SETTINGS
@given(right_ascensions, declinations, st.integers(0, MAX_ORDER))
@example(0.0, 90.0, 29)
@example(0.0, -90.0, 29)
@example(359.99999999999994, 0.0, 29)
def test_cells_exist_and_hold_their_position(ra, dec, order):
    cell = int(ang2pix(np.array([ra]), np.array([dec]), order)[0])
    assert 0 <= cell < 12 * 4**order
    fine = int(ang2pix(np.array([ra]), np.array([dec]))[0])
    pixel = HealpixPixel(order, fine >> 2 * (MAX_ORDER - order))
    assert pixel.first <= fine < pixel.stop
    # On an edge rounding may choose the neighbour; nowhere else may the orders disagree.
    assert pixel.pixel in with_neighbours(np.array([cell]), order)


def test_orders_agree_away_from_edges():
    ra, dec = on_sphere(np.random.default_rng(1), 20000)
    fine = ang2pix(ra, dec)
    for order in (0, 1, 5, 11, 20):
        assert np.array_equal(ang2pix(ra, dec, order), fine >> 2 * (MAX_ORDER - order))


def test_right_ascension_wraps():
    dec = np.array([-90.0, -41.8, 0.0, 41.81, 90.0])
    zero = ang2pix(np.zeros(5), dec)
    assert np.array_equal(zero, ang2pix(np.full(5, 360.0), dec))
    assert zero.dtype == np.int64


# --- separations and motions ----------------------------------------------------------------------


@SETTINGS
@given(seeds, st.floats(1e-4, 6e5))
def test_separation_against_astropy(seed, radius_arcsec):
    from astropy.coordinates import angular_separation

    rng = np.random.default_rng(seed)
    ra1, dec1 = on_sphere(rng, 50)
    ra2, dec2 = around(rng, ra1, dec1, radius_arcsec)
    expected = np.degrees(angular_separation(*np.radians([ra1, dec1, ra2, dec2]))) * 3600
    found = separation_arcsec(ra1, dec1, ra2, dec2)
    # The positions themselves are rounded to about 1e-10 arcsec. Near 180 degrees haversines lose
    # half the digits, which no catalog match reaches.
    tolerance = 1e-9 if radius_arcsec < 5e5 else 1e-2
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=tolerance)


@SETTINGS
@given(right_ascensions, declinations)
@example(0.0, 90.0)
def test_separation_of_a_point_from_itself_and_its_opposite(ra, dec):
    one = (np.array([ra]), np.array([dec]))
    assert separation_arcsec(*one, *one)[0] == 0
    assert separation_arcsec(*one, one[0] + 180, -one[1])[0] == pytest.approx(648000, abs=0.02)


@pytest.mark.parametrize("dec", [-90.0, -89.9999, -60.0, 0.0, 60.0, 89.9999])
def test_one_arcsecond_is_one_arcsecond(dec):
    step = 1 / 3600
    north = separation_arcsec(np.zeros(1), np.array([dec]), np.zeros(1), np.array([dec + step]))
    assert north[0] == pytest.approx(1, rel=1e-6)
    across = separation_arcsec(
        np.array([359.9999]), np.array([dec]), np.array([0.0001]), np.array([dec])
    )
    assert across[0] == pytest.approx(0.72 * np.cos(np.radians(dec)), rel=1e-6, abs=1e-9)


@SETTINGS
@given(
    right_ascensions,
    declinations,
    st.floats(-12000, 12000),
    st.floats(-12000, 12000),
    st.floats(-50, 50),
)
@example(0.0, 90.0, 3000.0, -4000.0, 16.0)
@example(269.45207, 4.69339, -801.55, 10362.39, -16.0)  # Barnard's star
@example(359.9999999, 0.0, 3000.0, 0.0, 16.0)
@example(0.0, 0.0, -1e-10, 0.0, 1.0)  # rounds to 360 degrees
@example(0.0, 90.0, 0.0, 1.0, 1.0)
def test_propagation_against_astropy(ra, dec, pmra, pmdec, years):
    """Along a great circle, in the direction and by the angle of the proper motion."""
    from astropy import units as u
    from astropy.coordinates import offset_by

    found_ra, found_dec = propagate(
        np.array([ra]), np.array([dec]), np.array([pmra]), np.array([pmdec]), years
    )
    angle_mas = np.hypot(pmra, pmdec) * abs(years)
    towards = np.arctan2(pmra * years, pmdec * years)
    lon, lat = offset_by(ra * u.deg, dec * u.deg, towards * u.rad, (angle_mas * u.mas).to(u.rad))
    assert 0 <= found_ra[0] < 360 and -90 <= found_dec[0] <= 90
    expected = (np.array([lon.to_value(u.deg)]), np.array([lat.to_value(u.deg)]))
    # The arcsine of astropy loses digits at the poles: its error is the rounding over cos(dec).
    to_pole = np.radians(90.0 - abs(found_dec[0]))
    lost = min(3e-16 / to_pole, 3e-8) if to_pole > 0 else 3e-8
    assert separation_arcsec(found_ra, found_dec, *expected)[0] < 2e-6 + lost * ARCSEC_PER_RADIAN
    moved = separation_arcsec(np.array([ra]), np.array([dec]), found_ra, found_dec)[0]
    assert moved == pytest.approx(angle_mas / 1000, rel=1e-6, abs=2e-6)


def test_propagation_against_space_motion():
    """Without radial motion a star keeps to its great circle, slowing as it recedes sideways."""
    from astropy import units as u
    from astropy.coordinates import SkyCoord
    from astropy.time import Time

    rng = np.random.default_rng(2)
    ra, dec = on_sphere(rng, 200)
    pmra, pmdec = rng.normal(0, 200, (2, 200))
    coords = SkyCoord(
        ra * u.deg,
        dec * u.deg,
        pm_ra_cosdec=pmra * u.mas / u.yr,
        pm_dec=pmdec * u.mas / u.yr,
        distance=np.full(200, 100.0) * u.pc,
        radial_velocity=np.zeros(200) * u.km / u.s,
        obstime=Time(2016.0, format="jyear"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ERFA on years it calls dubious
        moved = coords.apply_space_motion(new_obstime=Time(2000.0, format="jyear"))
    found = propagate(ra, dec, pmra, pmdec, -16.0)
    difference = separation_arcsec(*found, moved.ra.to_value(u.deg), moved.dec.to_value(u.deg))
    assert difference.max() < 1e-4


def test_stars_without_motion_stay_exactly():
    ra, dec = on_sphere(np.random.default_rng(3), 100)
    zero = np.zeros(100)
    for years in (16.0, np.full(100, 16.0)):
        found_ra, found_dec = propagate(ra, dec, zero, zero, years)
        assert np.array_equal(found_ra, ra) and np.array_equal(found_dec, dec)
    moving = np.full(100, 5.0)
    assert np.array_equal(propagate(ra, dec, moving, moving, 0.0)[0], ra)


@SETTINGS
@given(seeds)
def test_motion_there_and_back(seed):
    rng = np.random.default_rng(seed)
    ra, dec = on_sphere(rng, 20)
    dec = np.clip(dec, -80, 80)
    pm = rng.normal(0, 500, (2, 20))
    there_ra, there_dec = propagate(ra, dec, pm[0], pm[1], 20.0)
    back = propagate(there_ra, there_dec, pm[0], pm[1], -20.0)
    # The direction of north turns on the way by about angle * tan(dec).
    turned = (np.hypot(*pm) / 1000 * 20) ** 2 / 206265 * np.tan(np.radians(81)) * 2
    assert (separation_arcsec(ra, dec, *back) <= turned + 1e-6).all()


def test_unit_vectors():
    ra, dec = np.array([0.0, 90.0, 123.0, 0.0]), np.array([0.0, 0.0, 90.0, -90.0])
    expected = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, -1]]
    np.testing.assert_allclose(unit_vectors(ra, dec), expected, atol=1e-15)


# --- neighbours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("radius_arcsec", [0.001, 0.3, 1.0, 3.0, 60.0, 3600.0, 36000.0, 100000.0])
@settings(SETTINGS, max_examples=12)
@given(seed=seeds)
def test_radius_lies_in_the_cell_and_its_neighbours(radius_arcsec, seed):
    """What every match rests on: nothing within the radius is outside of the nine cells."""
    rng = np.random.default_rng(seed)
    order = order_for_radius(radius_arcsec)
    ra, dec = on_sphere(rng, 1500)
    hard_ra, hard_dec = np.repeat(np.array(HARD), 60, axis=0).T
    hard_ra, hard_dec = around(rng, hard_ra, hard_dec, 3 * radius_arcsec)
    ra, dec = np.concatenate([ra, hard_ra]), np.concatenate([dec, hard_dec])
    ra2, dec2 = around(rng, ra, dec, radius_arcsec)
    near = separation_arcsec(ra, dec, ra2, dec2) <= radius_arcsec
    assert near.mean() > 0.95
    shift = 2 * (MAX_ORDER - order)
    cells = with_neighbours(ang2pix(ra, dec) >> shift, order)
    found = (cells == (ang2pix(ra2, dec2) >> shift)[:, None]).any(axis=1)
    assert found[near].all()


def test_order_for_radius_is_deep_but_not_too_deep():
    orders = [order_for_radius(radius) for radius in np.geomspace(1e-5, 1e5, 200)]
    assert orders == sorted(orders, reverse=True)
    assert orders[0] == MAX_ORDER and orders[-1] == 0
    side_arcsec = healpy.nside2resol(2 ** order_for_radius(1.0)) * 206264.8
    assert 2 <= side_arcsec < 4


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf"), 648000.0])
def test_radius_that_is_none(radius):
    with pytest.raises(ConfigError, match="radius"):
        order_for_radius(radius)


@SETTINGS
@given(st.integers(0, 12), seeds)
def test_neighbours_are_mutual(order, seed):
    cells = np.random.default_rng(seed).integers(0, 12 * 4**order, 20)
    for cell, *others in with_neighbours(cells, order):
        for other in others:
            assert other != cell or order == 0
            assert other == -1 or cell in with_neighbours(np.array([other]), order)[0]


def test_neighbours_at_the_eight_corners_and_of_nothing():
    rows = with_neighbours(np.arange(12 * 4**3), 3)
    assert (rows == -1).sum() == 24  # three cells at each of eight corners
    assert with_neighbours(np.empty(0, dtype=np.int64), 5).shape == (0, 9)


def rings_by_steps(pixel: HealpixPixel, order: int, layers: int) -> list[set[int]]:
    depth = order - pixel.order
    seen = set(range(pixel.pixel << 2 * depth, (pixel.pixel + 1) << 2 * depth))
    front, rings = set(seen), []
    for _ in range(layers):
        near = with_neighbours(np.array(sorted(front), dtype=np.int64), order)
        front = set(near.ravel().tolist()) - seen - {-1}
        seen |= front
        rings.append(front)
        if not front:
            break
    return rings + [set()] * (layers - len(rings))


@settings(SETTINGS, max_examples=60)
@given(pixels(3), st.integers(0, 3), st.integers(1, 4))
@example(HealpixPixel(0, 0), 0, 4)
@example(HealpixPixel(0, 4), 2, 3)
@example(HealpixPixel(1, 3), 1, 2)
def test_surrounding_cells_are_the_rings_of_neighbours(pixel, depth, layers):
    order = pixel.order + depth
    rings = surrounding_cells(pixel, order, layers)
    assert [set(ring.tolist()) for ring in rings] == rings_by_steps(pixel, order, layers)
    together = np.concatenate(rings)
    assert len(np.unique(together)) == len(together), "disjoint"
    assert all(np.array_equal(ring, np.unique(ring)) for ring in rings), "sorted"
    inside = together >> 2 * depth == pixel.pixel
    assert not inside.any()


def test_surrounding_cells_above_the_order_of_the_pixel():
    pixel = HealpixPixel(4, 100)
    (same,) = surrounding_cells(pixel, 4, 1)
    (above,) = surrounding_cells(pixel, 2, 1)
    assert np.array_equal(same, above) and len(same) == 8


@settings(SETTINGS, max_examples=30)
@given(st.integers(0, 11), seeds)
def test_surrounding_cells_hold_every_position_near_the_pixel(base, seed):
    """A margin of one ring at the order of a radius misses nothing."""
    rng = np.random.default_rng(seed)
    pixel, radius_arcsec = HealpixPixel(0, base), 7200.0
    order = order_for_radius(radius_arcsec)
    corners = healpy.boundaries(1, base, step=40, nest=True).T
    ra, dec = (
        np.degrees(np.arctan2(corners[:, 1], corners[:, 0])) % 360,
        np.degrees(np.arcsin(np.clip(corners[:, 2], -1, 1))),
    )
    ra2, dec2 = around(rng, np.repeat(ra, 5), np.repeat(dec, 5), radius_arcsec)
    cells = ang2pix(ra2, dec2) >> 2 * (MAX_ORDER - order)
    outside = cells >> 2 * order != base
    (ring,) = surrounding_cells(pixel, order, 1)
    assert np.isin(cells[outside], ring).all()


@pytest.mark.parametrize("radius_arcsec", [0.5, 30.0, 3600.0, 80000.0])
@settings(SETTINGS, max_examples=15)
@given(pixel=pixels(12), seed=seeds)
@example(pixel=HealpixPixel(0, 3), seed=0)
@example(pixel=HealpixPixel(1, 19), seed=0)
def test_surroundings_hold_every_position_near_the_pixel(radius_arcsec, pixel, seed):
    """Also where the pixel is smaller than the radius."""
    rng = np.random.default_rng(seed)
    inside = rng.integers(pixel.first, pixel.stop, 40)
    edge = np.array([pixel.first, pixel.stop - 1])
    ra, dec = healpy.pix2ang(1 << MAX_ORDER, np.append(inside, edge), nest=True, lonlat=True)
    first, second = surroundings(pixel, radius_arcsec, 2)
    for layers, reach in ((first, radius_arcsec), ([*first, *second], 2 * radius_arcsec)):
        near_ra, near_dec = around(rng, np.repeat(ra, 20), np.repeat(dec, 20), reach)
        cells = ang2pix(near_ra, near_dec)
        own = (cells >= pixel.first) & (cells < pixel.stop)
        assert (own | in_ranges(cells, sorted(layers))).all()
    edges = [edge for part in sorted([*first, *second]) for edge in part]
    assert edges == sorted(edges), "disjoint"
    assert not in_ranges(inside, sorted([*first, *second])).any()
    assert sorted(first) == first and sorted(second) == second


@pytest.mark.parametrize("radius_arcsec", [0.001, 0.5, 30.0, 3600.0, 30000.0])
@settings(SETTINGS, max_examples=20)
@given(order=st.integers(0, 20), seed=seeds)
def test_what_lies_near_the_edge_of_a_pixel(radius_arcsec, order, seed):
    """Two positions within the radius in different pixels: each is found from the other's."""
    rng = np.random.default_rng(seed)
    ra, dec = np.array(HARD)[rng.integers(0, len(HARD), 30)].T
    ra, dec = around(rng, ra, dec, 4 * radius_arcsec)
    one, other = ang2pix(ra, dec), ang2pix(*around(rng, ra, dec, radius_arcsec))
    own, far = one >> 2 * (MAX_ORDER - order), other >> 2 * (MAX_ORDER - order)
    for number in np.unique(own[own != far]).tolist():
        pixel = HealpixPixel(order, number)
        inside, outside = (
            one[(own == number) & (far != number)],
            other[(own == number) & (far != number)],
        )
        assert near_edge(pixel, inside, radius_arcsec).all()
        assert near_edge(pixel, outside, radius_arcsec).all()
        assert near_edge(pixel, inside, np.full(len(inside), radius_arcsec)).all()
        assert near_pixel(pixel, np.append(inside, outside), radius_arcsec).all()
        ranges = around_cells(pixel, outside, radius_arcsec)
        assert in_ranges(inside, ranges).all()
        assert all(pixel.first <= first < stop <= pixel.stop for first, stop in ranges)


@pytest.mark.parametrize("order", [0, 3, 7])
def test_few_positions_are_near_the_edge_of_a_pixel(order):
    pixel = HealpixPixel(order, 5)
    rng = np.random.default_rng(1)
    cells = rng.integers(pixel.first, pixel.stop, 10**5)
    assert near_edge(pixel, cells, 0.01).mean() < 0.01
    assert not near_edge(pixel, cells, 0.01).all()
    assert near_edge(pixel, cells, 200000.0).all()
    ring = surrounding_cells(pixel, order + 7, 1)[0] << 2 * (MAX_ORDER - order - 7)
    cells = np.concatenate([ring + rng.integers(0, 1 << 2 * (22 - order)) for _ in range(40)])
    assert near_pixel(pixel, cells, 0.01).mean() < 0.01


@SETTINGS
@given(st.lists(st.integers(0, 200), max_size=12), st.lists(st.integers(-5, 205), max_size=30))
def test_in_ranges_against_a_search(edges, cells):
    unique = sorted(set(edges))
    ranges = list(zip(unique[::2], unique[1::2], strict=False))
    expected = [any(first <= cell < stop for first, stop in ranges) for cell in cells]
    assert in_ranges(np.array(cells, dtype=np.int64), ranges).tolist() == expected
    in_order = np.array(sorted([*cells, *edges]), dtype=np.int64)
    expected = [any(first <= cell < stop for first, stop in ranges) for cell in in_order]
    assert in_ranges(in_order, ranges).tolist() == expected


# --- candidates of a match ------------------------------------------------------------------------


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


@settings(SETTINGS, max_examples=40)
@given(seeds, st.integers(0, 300), st.sampled_from([0.01, 1.5, 60.0, 7200.0]))
def test_candidates_of_a_catalog_with_itself(seed, n, radius_arcsec):
    ra, dec = clumps(np.random.default_rng(seed), n, radius_arcsec)
    by_cell = np.argsort(ang2pix(ra, dec), kind="stable")
    ra, dec = ra[by_cell], dec[by_cell]
    cells = ang2pix(ra, dec)
    found = pairs_of(candidates(cells, radius_arcsec, cells, later_only=True))
    assert all(i < j for i, j in found)
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
    i, j = pairs_within(ra, dec, ang2pix(ra, dec), radius_arcsec)
    found = list(zip(i.tolist(), j.tolist(), strict=True))
    one, other = np.triu_indices(n, k=1)
    near = separation_arcsec(ra[one], dec[one], ra[other], dec[other]) <= radius_arcsec
    assert sorted(found) == list(zip(one[near].tolist(), other[near].tolist(), strict=True))


def test_pairs_within_need_more_room_than_is_taken_at_first():
    ra, dec = np.full(100, 45.0), np.full(100, 10.0)
    i, j = pairs_within(ra, dec, ang2pix(ra, dec), 1.0)
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
    found = pairs_of(candidates(cells, 1.0, cells, later_only=True))
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


# --- ranges and partitions ------------------------------------------------------------------------


@SETTINGS
@given(st.integers(0, 3), seeds, st.floats(0, 1))
def test_cell_ranges_cover_their_cells_only(order, seed, fraction):
    n = 12 * 4**order
    chosen = np.random.default_rng(seed).random(n) < fraction
    cells = np.flatnonzero(chosen)
    ranges = cell_ranges(cells, order)
    shift = 2 * (MAX_ORDER - order)
    covered: list[int] = []
    for first, stop in ranges:
        covered += range(first >> shift, stop >> shift)
    assert covered == cells.tolist()
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges)), "adjacent are joined"
    assert all(type(edge) is int for pair in ranges for edge in pair)


def histogram_of(cells: IntArray, order: int) -> IntArray:
    counts = np.bincount(cells >> 2 * (MAX_ORDER - order), minlength=12 * 4**order)
    return counts.astype(np.int64)


@settings(SETTINGS, max_examples=60)
@given(
    seed=seeds,
    n=st.integers(0, 3000),
    order=st.integers(0, 5),
    limit=st.integers(1, 400),
    width=st.floats(0.001, 180),
    max_order=st.none() | st.integers(0, 7),
)
def test_partitions_hold_every_row_once_and_few_enough(seed, n, order, limit, width, max_order):
    rng = np.random.default_rng(seed)
    centre = HARD[seed % len(HARD)]
    ra, dec = around(rng, np.full(n, centre[0]), np.full(n, centre[1]), width * 3600)
    cells = ang2pix(ra, dec)
    plan = plan_partitions(histogram_of(cells, order), order, limit, max_order)
    assert plan == sorted(plan, key=lambda pixel: pixel.first)
    assert all(a.stop <= b.first for a, b in itertools.pairwise(plan))
    index = partition_of(cells, plan)
    assert (index >= 0).all(), "every row has a partition"
    rows = np.bincount(index, minlength=len(plan)) if n else np.zeros(len(plan), dtype=int)
    deepest = order if max_order is None else min(order, max_order)
    for pixel, count in zip(plan, rows, strict=True):
        inside = (cells >= pixel.first) & (cells < pixel.stop)
        assert inside.sum() == count > 0, "no empty partition, and the right rows"
        assert pixel.order <= deepest
        assert count <= limit or pixel.order == deepest
        if pixel.order:
            parent = HealpixPixel(pixel.order - 1, pixel.pixel >> 2)
            above = ((cells >= parent.first) & (cells < parent.stop)).sum()
            assert above > limit, "split only where it is needed"


def test_plan_of_no_rows_is_empty():
    assert plan_partitions(np.zeros(12, dtype=np.int64), 0, 10) == []


@SETTINGS
@given(st.lists(pixels(2), max_size=6), st.lists(st.integers(0, 12 * 4**29 - 1), max_size=30))
def test_partition_of_against_a_search(candidates, cells):
    chosen: list[HealpixPixel] = []
    for pixel in sorted(candidates, key=lambda pixel: (pixel.first, pixel.order)):
        if not any(pixel.overlaps(other) for other in chosen):
            chosen.append(pixel)
    edges = [edge for pixel in chosen for edge in (pixel.first, pixel.stop - 1, pixel.stop)]
    every = np.array(cells + edges, dtype=np.int64)
    expected = [
        next((i for i, pixel in enumerate(chosen) if pixel.first <= cell < pixel.stop), -1)
        for cell in every.tolist()
    ]
    assert partition_of(every, iter(chosen)).tolist() == expected


def test_partitions_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(4)
    cells = ang2pix(*on_sphere(rng, 5000))
    plan = plan_partitions(histogram_of(cells, 4), 4, 100)
    shuffled = rng.permutation(cells)
    assert plan_partitions(histogram_of(shuffled, 4), 4, 100) == plan
    assert (np.diff(partition_of(np.sort(cells), plan)) >= 0).all()

"""Cells, pixels and partitions, against brute force and the definition of HEALPix."""

import itertools
import subprocess
import sys

import healpy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sos_dask.columns import IntArray
from sos_dask.errors import ConfigError
from sos_dask.sky.healpix import (
    MAX_ORDER,
    HealpixPixel,
    ang2pix,
    cell_ranges,
    in_ranges,
    plan_partitions,
    with_neighbours,
)
from tests.geometry import (
    HARD,
    SETTINGS,
    around,
    declinations,
    on_sphere,
    pixels,
    right_ascensions,
    seeds,
)


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


# --- neighbours -----------------------------------------------------------------------------------


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
)
def test_partitions_hold_every_row_once_and_few_enough(seed, n, order, limit, width):
    rng = np.random.default_rng(seed)
    centre = HARD[seed % len(HARD)]
    ra, dec = around(rng, np.full(n, centre[0]), np.full(n, centre[1]), width * 3600)
    cells = ang2pix(ra, dec)
    plan = plan_partitions(histogram_of(cells, order), order, limit)
    assert plan == sorted(plan, key=lambda pixel: pixel.first)
    assert all(a.stop <= b.first for a, b in itertools.pairwise(plan))
    rows = [np.sum((cells >= pixel.first) & (cells < pixel.stop)) for pixel in plan]
    assert sum(rows) == n, "every row has a partition"
    for pixel, count in zip(plan, rows, strict=True):
        assert count > 0, "no empty partition"
        assert pixel.order <= order
        assert count <= limit or pixel.order == order
        if pixel.order:
            parent = HealpixPixel(pixel.order - 1, pixel.pixel >> 2)
            above = ((cells >= parent.first) & (cells < parent.stop)).sum()
            assert above > limit, "split only where it is needed"


def test_plan_of_no_rows_is_empty():
    assert plan_partitions(np.zeros(12, dtype=np.int64), 0, 10) == []


def test_partitions_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(4)
    cells = ang2pix(*on_sphere(rng, 5000))
    plan = plan_partitions(histogram_of(cells, 4), 4, 100)
    shuffled = rng.permutation(cells)
    assert plan_partitions(histogram_of(shuffled, 4), 4, 100) == plan

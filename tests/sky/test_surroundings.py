"""What surrounds a pixel misses nothing near it."""

import healpy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sos_dask.errors import ConfigError
from sos_dask.sky.healpix import (
    MAX_ORDER,
    HealpixPixel,
    ang2pix,
    in_ranges,
    separation_arcsec,
    with_neighbours,
)
from sos_dask.sky.neighbours import (
    near_edge,
    near_pixel,
    order_for_radius,
    surrounding_cells,
    surroundings,
)
from tests.geometry import HARD, SETTINGS, around, on_sphere, pixels, seeds


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

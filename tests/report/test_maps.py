"""Maps: rows where they are, counts in cells, coverage and its growth."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import Normalize

from sos_dask.evidence.coverage_maps import SKY_ORDER, STEPS
from sos_dask.evidence.widening import CLASSES
from sos_dask.report import maps, page
from sos_dask.report import maps as kinds
from sos_dask.report.maps import Plane, growth_figure
from sos_dask.report.style import new_figure
from sos_dask.sky.healpix import ang2pix
from sos_dask.storage.manifest import Manifest
from tests.report.made import drawn


def spot(axes: Any) -> tuple[float, float]:
    """Where the picture of a map shows something, by the projection of matplotlib."""
    picture = picture_of(axes)
    row, column = np.nonzero(np.isfinite(picture))
    places = np.stack([column + 0.5, row + 0.5], axis=1) / np.array(picture.shape[::-1])
    x, y = np.rad2deg((axes.transAxes - axes.transData).transform(places)).T
    label = axes.xaxis.get_major_formatter()(np.deg2rad(x.mean()), 0)
    ra = 180 - x.mean()
    assert float(label.removesuffix("°")) == round(ra), "what is written at the axis"
    return ra, y.mean()


@pytest.mark.parametrize("place", [(90.0, 40.0), (250.0, -20.0), (181.0, 65.0), (30.0, 1.0)])
def test_a_map_shows_rows_where_they_are(place):
    counts = np.zeros(maps.N_SKY, dtype=np.int64)
    ra, dec = place
    counts[ang2pix(np.array([ra]), np.array([dec]), maps.ORDER)] = 9
    drawn = maps.sky_figure({"one": counts, "none": np.zeros_like(counts)})
    assert drawn is not None and drawn.facts["rows"] == {"one": 9}
    assert drawn.facts["order"] == maps.ORDER
    shown_ra, shown_dec = spot(drawn.figure.axes[0])
    cell = float(np.rad2deg(np.sqrt(4 * np.pi / maps.N_SKY)))
    assert abs(shown_ra - ra) * np.cos(np.deg2rad(dec)) < 0.75 * cell
    assert abs(shown_dec - dec) < 0.75 * cell
    assert maps.sky_figure({"none": np.zeros_like(counts)}) is None


def test_the_galactic_plane_is_where_astropy_has_it():
    from astropy.coordinates import SkyCoord

    axes = new_figure(2.0).subplots(subplot_kw={"projection": "mollweide"})
    maps.sky_map(axes, np.ones(12), 0, Normalize(0, 1))
    x, dec = np.rad2deg(axes.lines[0].get_xydata()).T
    ra = 180 - x  # right ascension grows to the left of 180 degrees in the middle
    assert (np.diff(x) >= 0).all(), "one line, which does not cross the map to come back"
    assert ra.min() < 1.1 and ra.max() > 358.9
    plane = SkyCoord(ra, dec, unit="deg").galactic
    assert np.abs(plane.b.deg).max() < 1e-4
    longitude = np.sort(plane.l.deg)
    assert np.diff(longitude, append=longitude[0] + 360).max() < 1, "all around the sky"
    # The centre of the Galaxy, by itself: Sgr A* is at 17h 45m 40s, -29 degrees.
    near = np.argmin(np.hypot(ra - 266.405, dec + 28.936))
    assert ra[near] == pytest.approx(266.405, abs=0.5) and dec[near] == pytest.approx(
        -28.9, abs=0.5
    )


labels = st.lists(
    st.tuples(st.floats(2000, 11000, width=32) | st.just(float("nan")), st.floats(-1, 6, width=32)),
    max_size=40,
)


@given(labels, st.integers(0, 40))
def test_counts_on_the_plane_do_not_depend_on_partitions_and_lose_no_row(rows, cut):
    teff, logg = np.array(rows, dtype=np.float32).reshape(-1, 2).T
    cells = maps.kiel_cells(teff, logg)
    parts = [maps.kiel_cells(teff[s], logg[s]) for s in (np.s_[:cut], np.s_[cut:])]
    np.testing.assert_array_equal(cells, np.concatenate(parts))
    np.testing.assert_array_equal(cells < 0, np.isnan(teff))
    beyond = (teff < 3000) | (teff >= 10000) | (logg < -0.5) | (logg >= 5.5)
    assert (cells[beyond & ~np.isnan(teff)] == maps.N_CELLS).all()
    well_inside = (teff > 3000) & (teff < 9999) & (logg > -0.5) & (logg < 5.499)
    assert (cells[well_inside] < maps.N_CELLS).all()
    centre_teff, centre_logg = maps.kiel_centres()
    inside = (cells >= 0) & (cells < maps.N_CELLS)
    assert (np.abs(centre_teff[cells[inside]] - teff[inside]) <= 25.01).all()
    assert (np.abs(centre_logg[cells[inside]] - logg[inside]) <= 0.02501).all()


def test_growth_names_the_pairs_for_which_the_model_is_too_small(current):
    table = page.Build.open({"coverage": current / "lamost.coverage"}).table("growth")
    assert table is not None
    limits = Manifest.load(current / "lamost.coverage").summary["limits"]
    said = drawn(growth_figure(table, limits)).facts
    n = np.sum(table["n"].to_numpy())
    assert (said["n_bins"], said["n_pairs"]) == (table.num_rows, n)
    double = table.set_column(2, "growth_measured", pa.array(2 * table["growth"].to_numpy()))
    worse = drawn(growth_figure(double, limits)).facts["worse"]
    assert (worse["n_bins"], worse["n_pairs"]) == (table.num_rows, n)
    right = table.set_column(2, "growth_measured", table["growth"])
    assert drawn(growth_figure(right, limits)).facts["worse"] is None
    assert growth_figure(table.slice(0, 0), limits) is None


def test_maps_of_coverage_count_what_the_manifest_counts(current):
    maps = pq.read_table(current / "lamost.coverage" / "maps.parquet")
    summary = Manifest.load(current / "lamost.coverage").summary
    said = drawn(kinds.coverage_figure(maps, SKY_ORDER, STEPS["kiel"])).facts["rows"]
    assert said == {name: summary["rows"][name] for name in CLASSES}
    assert kinds.coverage_figure(maps.slice(0, 0), SKY_ORDER, STEPS["kiel"]) is None


places = st.lists(st.tuples(st.floats(-1, 4, width=32), st.floats(-3, 9, width=32)), max_size=40)


@given(places, st.integers(8, 300))
def test_coarse_cells_are_whole_groups_of_cells(rows, bins):
    plane = Plane((0.0, 3.0, -2.0, 8.0), bins)
    first, second = np.array(rows, dtype=np.float32).reshape(-1, 2).T
    cells = plane.cells(first, second)
    fine = [
        np.floor((values.astype(float) - low) * (bins / (high - low))).astype(int)
        for values, low, high in ((first, 0.0, 3.0), (second, -2.0, 8.0))
    ]
    inside = np.all([(f >= 0) & (f < bins) for f in fine], axis=0)
    np.testing.assert_array_equal(cells >= 0, inside)
    expected = fine[0] // plane.group * plane.coarse + fine[1] // plane.group
    np.testing.assert_array_equal(cells[inside], expected[inside])
    assert plane.coarse <= 64 and len(plane.edges(plane.group)[0]) == plane.coarse + 1


# --- kernels, by small exact cases ----------------------------------------------------------------


def test_cells_of_equal_size_make_a_picture():
    x, y = np.array([1.5, 3.5, 3.5]), np.array([10.0, 30.0, 10.0])
    x_edges, y_edges, picture = kinds._mosaic(x, y, (1.0, 10.0), np.array([7.0, 8.0, 9.0]))
    np.testing.assert_allclose(x_edges, [1, 2, 3, 4])
    np.testing.assert_allclose(y_edges, [5, 15, 25, 35])
    empty = np.nan
    expected = [[7, empty, 9], [empty, empty, empty], [empty, empty, 8]]
    np.testing.assert_array_equal(picture, expected)
    none = np.zeros(0)
    assert np.isnan(kinds._mosaic(none, none, (1.0, 1.0), none)[2]).all()


def test_limits_contain_nearly_all_rows():
    places = np.arange(100.0)[::-1]
    counts = np.ones(100)
    assert kinds._nearly_all(places, counts, 0.9, 0.25) == (3.75, 94.25)
    counts[0] = 1e6  # at 99, nearly all
    assert kinds._nearly_all(places, counts, 0.9, 1.0) == (98.0, 100.0)


@pytest.mark.parametrize(("rows", "order"), [(4, 6), (3, 5), (1, 5), (0.25, 4), (0.01, 3)])
def test_cells_of_the_sky_are_as_fine_as_rows_allow(rows, order):
    counts = np.full(kinds.N_SKY, int(rows)) if rows >= 1 else np.zeros(kinds.N_SKY, int)
    if rows < 1:
        counts[:: round(1 / rows)] = 1
    assert kinds._order(counts) == order
    assert kinds._coarser(counts, order).sum() == counts.sum()
    assert len(kinds._coarser(counts, 3)) == 768


def test_bins_of_growth_are_put_together_in_steps_of_equal_ratio():
    x = np.array([1.0, 1.1, 2.0, 30.0])  # eight steps a decade: 1 to 1.33, 1.78 to 2.37
    n, values = np.array([1, 3, 5, 7]), np.array([2.0, 4.0, 6.0, 8.0])
    found = kinds._together(x, n, values)
    np.testing.assert_allclose(found[0], [np.sqrt(1.1), 2.0, 30.0])
    np.testing.assert_allclose(found[1], [3.5, 6.0, 8.0])  # weighted by pairs
    np.testing.assert_allclose(found[2], [1.0, 0.0, 0.0])  # standard error of two values


def test_shares_of_coverage_are_drawn_where_they_are():
    def row(name, place, counts):
        known = {"map": name, "pixel": None, "teff": None, "logg": None, **place}
        return known | dict(zip(CLASSES, counts, strict=True))

    table = pa.Table.from_pylist(
        [
            row("sky", {"pixel": 5}, (6, 2, 0)),
            row("sky", {"pixel": 9}, (1, 0, 1)),
            row("kiel", {"teff": 5050.0, "logg": 4.05}, (6, 2, 0)),
            row("kiel", {"teff": 5250.0, "logg": 4.25}, (1, 0, 1)),
        ]
    )
    found = drawn(kinds.coverage_figure(table, 1, {"teff": 100.0, "logg": 0.1}))
    assert found.facts["rows"] == {"inside": 7, "sparse": 2, "outside": 1}
    titles = [axes.get_title() for axes in found.figure.axes[:3]]
    assert titles == ["inside: 70.0 %", "sparse: 20.0 %", "outside: 10.0 %"]
    on_sky = ((0.75 / 0.7, 0.5 / 0.7), (0.25 / 0.2, 0.0), (0.0, 0.5 / 0.1))
    in_kiel = ((75, 50), (25, 0), (0, 50))
    upper, lower = found.figure.axes[:3], found.figure.axes[3:6]
    for above, below, sky, kiel in zip(upper, lower, on_sky, in_kiel, strict=True):
        shown, picture = picture_of(above), picture_of(below)
        np.testing.assert_allclose(np.unique(shown[np.isfinite(shown)]), sorted(sky))
        assert picture.shape == (3, 3)
        assert (picture[0, 0], picture[2, 2]) == kiel and np.isnan(picture[1, 1])


def picture_of(axes: Any) -> np.ndarray:
    """What a map shows in each cell, nan where nothing."""
    shown: Any = (axes.images or axes.collections)[0]
    return np.asarray(np.ma.filled(np.ma.asarray(shown.get_array()), np.nan))


def test_the_kiel_diagram_counts_rows_in_their_cells():
    cells = kinds.kiel_cells(np.array([5010.0, 5010.0, 20000.0]), np.array([4.01, 4.01, 4.0]))
    before = np.bincount(cells, minlength=kinds.N_CELLS + 1)
    after = np.bincount(cells[:1], minlength=kinds.N_CELLS + 1)
    found = drawn(kinds.kiel_figure(before, after))
    assert found.facts == {"known": 3, "before": 1, "after": 0}
    for axes, rows in zip(found.figure.axes, (2, 1), strict=False):
        picture = picture_of(axes)
        [place] = np.argwhere(np.isfinite(picture))
        assert picture[tuple(place)] == rows
        mesh: Any = axes.collections[0]
        low, high = (mesh.get_coordinates()[tuple(corner)] for corner in (place, place + 1))
        assert (low <= (5010, 4.01)).all() and (high > (5010, 4.01)).all()
    assert kinds.kiel_figure(np.zeros_like(before), np.zeros_like(before)) is None

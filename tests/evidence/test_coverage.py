"""Coverage: measures, calibration, classes, maps."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.coverage import (
    _NEIGHBOURS,
    MEASURES,
    REACH,
    CoverageModel,
    Overlap,
    Places,
    Target,
    _lacks,
)
from sos_dask.evidence.coverage import fit as fit_coverage
from sos_dask.evidence.widening import (
    INSIDE,
    LACKING,
    OUTSIDE,
    Limits,
)
from sos_dask.schema import LABELS
from sos_dask.stages.coverage import CoverageSettings
from sos_dask.stats.numbers import knn_distance


def sky(n, rng, low=0.0, high=3.0):
    """Rows that fill a box of label space evenly; one of its axes runs from low to high."""
    x = rng.uniform(0, 3, (n, 3))
    x[:, 1] = rng.uniform(low, high, n)
    return {
        "teff": 4000 + 1000 * x[:, 0],
        "logg": x[:, 1],
        "feh": x[:, 2] - 2,
        "snr": rng.uniform(20, 200, n),
        "rv": rng.normal(0, 50, n),
        "phot_g_mean_mag": rng.uniform(10, 17, n),
    }


def overlap_of(columns, rng, sigma=(50.0, 0.1, 0.05), growth=None):
    n = len(columns["teff"])
    residual = rng.normal(0, 1, (n, 3)) * np.array(sigma)
    if growth is not None:
        residual *= growth[:, None]
    fold = (np.arange(n) % 5).astype(np.int8)
    return Overlap(columns, fold, residual, residual, np.full((n, 3), np.nan))


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(1)
    return fit_coverage(overlap_of(sky(4000, rng), rng), sky(5000, rng), "neighbours", Limits())


def test_a_known_third_of_the_rows_without_overlap_is_found():
    rng = np.random.default_rng(2)

    def sheet(n, high):  # as stars do, rows lie near a surface; the border in it has no gap
        columns = sky(n, rng, 0, high)
        columns["feh"] = (columns["teff"] - 5500) / 1500 + rng.normal(0, 0.03, n)
        return columns

    overlap, rows = overlap_of(sheet(50_000, 2), rng), sheet(30_000, 3)
    model = fit_coverage(overlap, sheet(200_000, 3), "neighbours", Limits()).model
    outside = model.coverage(rows)[1] >= OUTSIDE
    assert abs(outside.mean() - 1 / 3) < 0.02
    assert outside[rows["logg"] > 2.2].all() and outside[rows["logg"] < 2].mean() < 0.01


SIGMA = np.array([50.0, 0.1, 0.05])


def thinning(n, rng):
    """Rows of which few have a log g towards 3, where errors are three times as large."""
    columns = sky(n, rng)
    columns["logg"] = 3 * rng.beta(1, 4, n)
    far = columns["logg"] > 1.8
    return columns, far, SIGMA * np.where(far, 3.0, 1.0)[:, None]


def test_intervals_hold_in_each_class_wrong_measurements_included():
    rng = np.random.default_rng(10)
    columns, far, size = thinning(20_000, rng)
    overlap = overlap_of(columns, rng, growth=np.where(far, 3.0, 1.0))
    half_width = np.tile(SIGMA, (20_000, 1))
    half_width[::7] = np.nan  # nothing is said of these
    overlap = replace(overlap, half_width=half_width, error_class=far.astype(np.int8))
    overlap.residual[rng.random(20_000) < np.where(far, 0.2, 0.0)] += 100 * SIGMA
    target = Target(columns, far.astype(np.int8))
    found = fit_coverage(overlap, columns, "neighbours", Limits(), target=target)
    assert 0 < np.sum(found.n_width) <= 6 * 20_000 // 7
    fresh, is_far, size = thinning(20_000, rng)
    error = np.abs(rng.normal(0, 1, (20_000, 3)) * size)
    error[rng.random(20_000) < np.where(is_far, 0.2, 0.0)] += 100 * SIGMA
    kind = found.model.coverage(fresh)[1]
    widening = found.model.widths.widening(
        kind, is_far.astype(np.int64), np.tile(SIGMA, (20_000, 1))
    )
    held = error <= SIGMA * widening
    counted = 0
    for error_class, numbers in enumerate(found.n_width):
        for number, n in enumerate(numbers[:LACKING]):
            mine = (kind == number) & (is_far == error_class)
            if n > 200 and np.count_nonzero(mine) > 200:
                assert np.mean(held[mine]) == pytest.approx(0.68, abs=0.01 + n**-0.5)
                counted += 1
    assert counted >= 2
    assert np.mean(held[kind >= OUTSIDE]) > 0.64


def test_intervals_hold_for_the_rows_not_for_the_pairs():
    """Pairs are bright, rows are faint, and the error model knows nothing of the noise."""
    rng = np.random.default_rng(12)
    columns, rows = sky(8000, rng), sky(8000, rng)
    columns["snr"], rows["snr"] = rng.uniform(10, 200, 8000), rng.uniform(10, 60, 8000)
    overlap = overlap_of(columns, rng, growth=np.hypot(1, 60 / columns["snr"]))
    overlap = replace(
        overlap, half_width=np.tile(SIGMA, (8000, 1)), error_class=np.zeros(8000, dtype=np.int8)
    )
    error = np.abs(rng.normal(0, SIGMA, (8000, 3)) * np.hypot(1, 60 / rows["snr"])[:, None])

    def held(target):
        model = fit_coverage(overlap, rows, "neighbours", Limits(), target=target).model
        kind = model.coverage(rows)[1]
        half_width, dense = np.tile(SIGMA, (8000, 1)), np.zeros(8000, dtype=int)
        width = half_width * model.widths.widening(kind, dense, half_width)
        return np.mean((error <= width)[kind == INSIDE])

    of_rows = held(Target(rows, np.zeros(8000, dtype=np.int8)))
    of_pairs = held(Target(columns, np.zeros(8000, dtype=np.int8)))
    assert of_rows == pytest.approx(0.68, abs=0.04) and of_pairs < of_rows - 0.1


def test_stars_that_the_overlap_lacks_are_told_from_lonely_places():
    rng = np.random.default_rng(15)
    x = rng.normal(0, 1, (20_000, 3))
    catalog = np.concatenate([x, rng.normal([8, 0, 0], 0.5, (20_000, 3))])
    columns = {"teff": 5040 * x[:, 0], "logg": x[:, 1], "feh": x[:, 2]}
    overlap = overlap_of({k: v[::4] for k, v in columns.items()}, rng)
    rows = dict(zip(LABELS, catalog.T * np.array([5040.0, 1, 1])[:, None], strict=True))
    model = fit_coverage(overlap, rows, "neighbours", Limits()).model
    some = np.array([[8.0, 0, 0], [0, 8.0, 0], [0, 0, 0]])
    kinds = model.coverage(dict(zip(LABELS, (some * [5040.0, 1, 1]).T, strict=True)))[1]
    assert kinds.tolist() == [
        LACKING,
        OUTSIDE,
        INSIDE,
    ]


def test_a_kind_of_which_the_overlap_has_too_little_is_outside():
    rng = np.random.default_rng(11)
    x = rng.uniform(0, 3, (40_000, 3))
    kept = (x[:, 1] < 2) | (rng.random(40_000) < 0.1)
    overlap, rows = x[kept][:10_000], rng.uniform(0, 3, (5000, 3))

    def lacks(overlap):
        distance = knn_distance(overlap, rows, _NEIGHBOURS)
        return _lacks(overlap, x[20_000:], rows, distance, _NEIGHBOURS)[0]

    found = lacks(overlap)
    assert found[rows[:, 1] > 2.3].mean() > 0.95
    assert found[rows[:, 1] < 1.9].mean() < 0.01 < found.mean()
    # As well where there are ten times as many rows: it is the share that counts.
    assert lacks(overlap[::10])[rows[:, 1] < 1.5].mean() < 0.01


def half_diagonal(places: Places) -> float:
    """How far at most a row's distance is from that between the nodes of the grid around it.

    A distance to the k-th star changes no faster than the place; a row lies among the nodes of its
    cell as their weights say, at a mean distance from them of at most half the cell's diagonal.
    """
    grid = places.grid
    steps = (np.array(grid.high) - np.array(grid.low)) / (np.array(grid.shape) - 1)
    return float(np.sqrt(np.sum(steps**2))) / 2


def inside_of(places: Places, x):
    return ((x >= places.grid.low) & (x <= places.grid.high)).all(axis=1)


def test_rows_are_looked_up_as_their_neighbours_say():
    rng = np.random.default_rng(16)
    x = rng.normal(0, 1, (20_000, 3))
    stars, rows = x[::4] * [1, 1, 0.8], rng.normal(0, 1.1, (5000, 3))
    places, exact = Places.of(stars, x, last=2.0), knn_distance(stars, rows, _NEIGHBOURS)
    distance, lacks, thin = places(rows)
    near = (exact < 2.0) & inside_of(places, rows)
    bound = half_diagonal(places)
    assert bound < 0.1 and np.count_nonzero(near) > 4000
    assert np.abs(distance - exact)[near].max() < bound + 1e-5
    assert np.abs(distance / exact - 1)[exact < 2.0].max() < 0.25
    assert np.median(np.abs(distance / exact - 1)[near]) < 0.02
    assert (distance[exact > 2.5] > 2.0).all()
    # Where a row's answer differs, it is next to rows with the other one.
    truth = _lacks(stars, x, rows, exact, _NEIGHBOURS)
    assert np.mean(lacks == truth[0]) > 0.97 and np.mean(thin == truth[1]) > 0.97
    assert thin[lacks].all() and 0.0 < np.mean(thin) < 0.08  # as chance makes it
    assert np.isnan(places(np.full((1, 3), np.nan))[0]).all()


def test_without_its_table_a_row_has_the_same_coverage(fitted):
    """Rows against their own neighbours: the table is all that stands between."""
    model, columns = fitted.model, sky(3000, np.random.default_rng(17))
    score, kind = model.coverage(columns)
    rows = model.scaled(columns)[:, : model.n_inputs]
    exact = knn_distance(model.overlap, rows, _NEIGHBOURS)
    bound = half_diagonal(model.places)
    some = inside_of(model.places, rows) & (kind < LACKING)
    some &= np.abs(exact - model.growth.last) > bound
    assert np.count_nonzero(some) > 2000
    ends = [1 / model.growth(exact + step) for step in (bound + 1e-5, -bound - 1e-5)]
    below = np.nextafter(np.float32(model.limits.outside), np.float32(0))
    low, high = (np.where(exact > model.growth.last, np.minimum(end, below), end) for end in ends)
    # At the thin end of the overlap a row is sparse at best.
    sparse = np.nextafter(np.float32(model.limits.inside), np.float32(0))
    thin = model.places(rows)[2]
    low = np.where(thin | (exact > model.growth.thin - bound), np.minimum(low, sparse), low)
    high = np.where(thin | (exact > model.growth.thin + bound), np.minimum(high, sparse), high)
    assert (score[some] >= low[some] - 1e-6).all() and (score[some] <= high[some] + 1e-6).all()


def test_wrong_measurements_do_not_count_as_growth():
    rng = np.random.default_rng(5)
    overlap = overlap_of(sky(4000, rng), rng)
    overlap.residual[:40] += np.array([5000.0, 10.0, 5.0])
    found = fit_coverage(overlap, sky(2000, rng), "neighbours", Limits())
    assert found.n_wrong == 40 and found.n_held_out == 4000


@given(cut=st.integers(0, 500), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_row_does_not_depend_on_those_beside_it(fitted, cut, seed):
    rows = sky(500, np.random.default_rng(seed), 0, 6)
    whole, _ = fitted.model.coverage(rows)
    parts = [
        fitted.model.coverage({k: v[part] for k, v in rows.items()})[0]
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert ((whole > 0) & (whole <= 1)).all()


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_saved_and_say_nothing_of_rows_without_a_label(name, tmp_path):
    rng = np.random.default_rng(6)
    overlap, rows = overlap_of(sky(1500, rng), rng), sky(300, rng)
    rows["logg"][:10] = np.nan
    rows["rv"][10:20] = np.nan
    model = fit_coverage(overlap, sky(2000, rng), name, Limits(), seed=7).model
    for file, content in model.files().items():
        (tmp_path / file).write_bytes(content)
    score, kind = model.coverage(rows)
    assert np.isnan(score[:10]).all() and np.isfinite(score[10:]).all()
    assert ((kind < 0) == np.isnan(score)).all()
    assert CoverageModel.load(tmp_path).coverage(rows)[0].tobytes() == score.tobytes()


def test_only_the_grid_and_what_is_lacking_depend_on_the_sample_of_the_catalog():
    rng = np.random.default_rng(6)
    overlap, rows = overlap_of(sky(1500, rng), rng), sky(2000, np.random.default_rng(20))
    one, other = (
        fit_coverage(overlap, sky(2000, np.random.default_rng(seed)), "neighbours", Limits())
        for seed in (8, 9)
    )
    assert (one.bins, one.n_held_out, one.n_wrong) == (other.bins, other.n_held_out, other.n_wrong)
    documents = []
    for found in (one, other):
        documents.append(json.loads(found.model.files()["coverage.json"]))
        for name in ("grid", "table_sha256", "sha256"):  # their nodes are elsewhere
            del documents[-1][name]
    assert documents[0] == documents[1], "to the byte"
    np.testing.assert_array_equal(one.model.overlap, other.model.overlap)
    # What is looked up differs by no more than the cells of both grids allow.
    bound = sum(half_diagonal(found.model.places) for found in (one, other)) + 1e-5
    x = one.model.scaled(rows)
    (mine, *lacks), (its, *others) = (found.model.places(x) for found in (one, other))
    common = inside_of(one.model.places, x) & inside_of(other.model.places, x)
    assert np.count_nonzero(common) > 1900
    assert 0 < np.abs(mine - its)[common].max() < bound
    # So do scores, but at the two borders beyond which a row is outside.
    growth = one.model.growth
    border = np.any(np.array(lacks) != np.array(others), axis=0)
    for limit in (growth.last, growth.thin):
        border |= (mine > limit) != (its > limit)
    assert np.mean(border) < 0.01
    score, again = (found.model.coverage(rows)[0][~border] for found in (one, other))
    assert score == pytest.approx(again, abs=0.05)


def test_a_smooth_model_is_extended_only_so_far(fitted):
    model = fitted.model
    far = np.array([[1.0, 40.0, -0.5]], dtype=np.float32)
    near = model.within_reach(far)
    scaled = (near - model.center) / model.scale
    distance = np.sqrt(((model.overlap - scaled) ** 2).sum(axis=1)).min()
    assert distance == pytest.approx(REACH, rel=1e-3)
    inside = (model.overlap[:5] * model.scale + model.center).astype(np.float32)
    assert model.within_reach(inside) == pytest.approx(inside, rel=1e-5)


def test_any_place_is_drawn_to_its_nearest_star(fitted):
    """Against all distances: places near stars stay, at borders of cells and beyond all, too."""
    model = fitted.model
    rng = np.random.default_rng(4)
    low, high = model.overlap.min(axis=0), model.overlap.max(axis=0)
    wide = rng.uniform(low - 2 * REACH, high + 2 * REACH, (400, model.n_inputs))
    near = model.overlap[rng.integers(0, len(model.overlap), 400)]
    near = near + rng.normal(0, 0.7 * REACH, near.shape)
    scaled = np.concatenate([wide, near, [low, high]])
    x = (scaled * model.scale + model.center).astype(np.float32)
    scaled = (x - model.center) / model.scale
    apart = np.sqrt(((scaled[:, None] - model.overlap) ** 2).sum(axis=2))
    star, distance = model.overlap[apart.argmin(axis=1)], apart.min(axis=1)
    assert 100 < np.count_nonzero(distance < REACH) < 700
    share = np.minimum(1, REACH / np.maximum(distance, 1e-12))[:, None]
    expected = (star + (scaled - star) * share) * model.scale + model.center
    np.testing.assert_allclose(model.within_reach(x), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("measure", ["neighbors", "Ratio", "", "neighbours8", None, 1])
def test_a_measure_that_is_none_is_refused(measure):
    with pytest.raises(ConfigError) as caught:
        CoverageSettings(measure=measure)
    assert "measure" in str(caught.value)
    assert all(f"'{name}'" in str(caught.value) for name in MEASURES), "and which there are"


def test_bad_limits_and_too_few_pairs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"outside = 0\.6 is not below inside = 0\.5"):
        Limits(inside=0.5, outside=0.6)
    rng = np.random.default_rng(0)
    with pytest.raises(ModelError, match="50 held-out pairs are too few"):
        fit_coverage(overlap_of(sky(50, rng), rng), sky(50, rng), "neighbours", Limits())
    columns = sky(500, rng)
    columns["rv"][:] = np.nan
    overlap, message = overlap_of(columns, rng), "no overlap star has the parameters .* have: rv\n"
    with pytest.raises(ModelError, match=message):
        fit_coverage(overlap, sky(500, rng), "ratio", Limits())
    assert fit_coverage(overlap, columns, "ratio", Limits()).model.ratio is not None
    with pytest.raises(ModelError, match="No such file"):
        CoverageModel.load(tmp_path)

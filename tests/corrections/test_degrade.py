"""Pairs as fainter rows see them: what is added to which, and that it follows from the pair."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sos_dask.corrections import Batch
from sos_dask.corrections.degrade import _WEIGHT, Donors, normals, replicas, rows_of, with_noise
from sos_dask.problem import DEFAULT, Input, Label, Problem, input_of

PROBLEM = Problem(inputs=(*DEFAULT.inputs, input_of("snr")))
OWN, THEIRS = np.array([30.0, 0.06, 0.03]), np.array([90.0, 0.10, 0.08])
CORRELATION = np.array([[1.0, 0.7, 0.4], [0.7, 1.0, 0.1], [0.4, 0.1, 1.0]])


def stars(n: int, seed: int, snr: float | np.ndarray) -> np.ndarray:
    """Inputs of giants at some S/N."""
    rng = np.random.default_rng(seed)
    logg = rng.uniform(1.5, 3.5, n)
    columns = {"teff": 4000 + 280 * logg + rng.normal(0, 150, n), "logg": logg}
    columns |= {"feh": rng.normal(-0.3, 0.3, n), "snr": np.broadcast_to(snr, n)}
    return PROBLEM.matrix(columns)


def pairs(n: int, seed: int = 0, snr: float | np.ndarray = 100.0) -> Batch:
    rng = np.random.default_rng(seed + 1000)
    y = (rng.normal(size=(n, 3)) * OWN).astype(np.float32)
    errors = np.tile(OWN, (n, 1)).astype(np.float32)
    fold = rng.integers(0, 5, n).astype(np.int8)
    return Batch(stars(n, seed, snr), y, fold, rng.uniform(0.5, 1, n).astype(np.float32), errors)


def donors(m: int = 500, snr: float | np.ndarray = 25.0, errors: np.ndarray = THEIRS) -> Donors:
    of_rows = np.broadcast_to(errors, (m, 3)).astype(np.float32)
    return Donors(PROBLEM, stars(m, 77, snr), of_rows, CORRELATION)


def added(batch: Batch, made: Batch) -> np.ndarray:
    """Noise in the differences of pairs that were all degraded so often, shape (n, l)."""
    times = len(made.fold) // len(batch.fold)
    return made.differences.astype(float) - np.tile(batch.differences, (times, 1))


def as_rows(batch: Batch) -> list[tuple[bytes, ...]]:
    """Rows as they are, in an order that follows from them."""
    assert batch.errors is not None
    columns: tuple[np.ndarray, ...]
    columns = batch.features, batch.differences, batch.errors, batch.fold, batch.weight
    return sorted(tuple(one.tobytes() for one in row) for row in zip(*columns, strict=True))


def test_as_much_is_added_as_the_donor_is_worse_and_together():
    batch = pairs(20_000)
    noise = added(batch, donors().degrade(batch, 2))
    expected = np.sqrt(THEIRS**2 - OWN**2)
    assert len(noise) == 40_000
    np.testing.assert_allclose(noise.std(axis=0), expected, rtol=0.02)  # 3 in 1 / sqrt(2 n)
    assert (np.abs(noise.mean(axis=0)) < 4 * expected / np.sqrt(len(noise))).all()
    np.testing.assert_allclose(np.corrcoef(noise.T), CORRELATION, atol=0.02)
    again = np.corrcoef(noise[:20_000].T, noise[20_000:].T)[:3, 3:]
    assert np.abs(again).max() < 0.03, "every draw of a pair is its own"


def test_what_is_better_known_of_the_donor_gets_no_noise():
    batch = pairs(300)
    made = donors(errors=np.array([90.0, 0.01, 0.08])).degrade(batch, 1)
    noise = added(batch, made)
    assert (noise[:, 1] == 0).all() and (noise[:, [0, 2]] != 0).all()
    np.testing.assert_array_equal(made.features[:, 1], batch.features[:, 1])


def test_inputs_move_with_the_differences_and_have_the_s_n_of_the_donor():
    batch, snr = pairs(2000), np.random.default_rng(0).uniform(15, 60, 500)
    rows = donors(snr=snr)
    made = rows.degrade(batch, 1)
    noise = added(batch, made)
    moved = made.features[:, :3].astype(float) - batch.features[:, :3]
    np.testing.assert_allclose(moved * [5040.0, 1, 1], noise, rtol=1e-3, atol=1e-3)
    assert np.isin(made.features[:, 3], rows.features[:, 3]).all()
    assert len(np.unique(made.features[:, 3])) > 100
    np.testing.assert_array_equal(made.fold, batch.fold)
    np.testing.assert_allclose(made.weight, _WEIGHT * batch.weight, rtol=1e-6)
    assert made.degraded is None


def test_errors_are_those_that_labels_have_now():
    """SIMEX adds noise in proportion to them."""
    batch = pairs(200)
    made = donors(errors=np.array([90.0, 0.01, 0.08])).degrade(batch, 1)
    assert made.errors is not None
    np.testing.assert_allclose(made.errors, np.tile([90.0, 0.06, 0.08], (200, 1)), rtol=1e-6)


def test_a_donor_is_a_row_with_like_labels():
    """One of the sixteen nearest in the inputs of the star; each is taken."""
    batch, rows = pairs(400), donors(snr=np.linspace(10, 60, 500))
    made = rows.degrade(batch, 8)
    scale = rows.features[:, :3].std(axis=0)
    away = (batch.features[:, None, :3] - rows.features[None, :, :3]) / scale
    rank = np.argsort(np.argsort(np.linalg.norm(away, axis=2), axis=1), axis=1)
    row = np.searchsorted(rows.features[:, 3], made.features[:, 3])
    np.testing.assert_array_equal(rows.features[row, 3], made.features[:, 3])
    taken = np.bincount(rank[np.tile(np.arange(400), 8), row], minlength=16)
    assert len(taken) == 16
    assert np.abs(taken - 200).max() < 5 * np.sqrt(200)


@given(seed=st.integers(0, 1000), n=st.integers(1, 60), data=st.data())
def test_what_is_drawn_of_a_pair_follows_from_its_own_numbers(seed, n, data):
    batch, rows = pairs(n, seed, np.random.default_rng(seed).uniform(20, 60, n)), donors(snr=40.0)
    whole = rows.degrade(batch, 3)
    order = np.random.default_rng(seed).permutation(n)
    shuffled = rows_of(batch, order)
    assert as_rows(rows.degrade(shuffled, 3)) == as_rows(whole)
    cut = data.draw(st.integers(0, n))
    parts = []
    for some in (np.arange(cut), np.arange(cut, n)):
        parts += as_rows(rows.degrade(rows_of(batch, some), 3))
    assert sorted(parts) == as_rows(whole)


def test_only_fainter_rows_are_donors():
    numbers = 1 + np.arange(3000) / 4096  # of the pairs, in their weights
    batch = pairs(3000, snr=np.linspace(10, 100, 3000))
    batch = replace(batch, weight=numbers.astype(np.float32))
    rows = donors(snr=np.random.default_rng(0).uniform(10, 100, 500))
    made = rows.degrade(batch, 1)
    pair = np.searchsorted(batch.weight, made.weight / np.float32(_WEIGHT))
    assert (made.features[:, 3] < batch.features[pair, 3]).all()
    assert 0.4 < len(made.fold) / 3000 < 0.6
    assert len(rows.degrade(pairs(100, snr=10.0), 4).fold) == 0
    assert len(donors(snr=100.0).degrade(batch, 4).fold) == 0, "as bright is not fainter"


@pytest.mark.parametrize("what", ["errors", "features"])
def test_a_pair_of_which_something_is_unknown_is_left_out(what):
    batch = pairs(50)
    getattr(batch, what)[::5, 1] = np.nan
    known = rows_of(batch, np.flatnonzero(np.arange(50) % 5))
    assert as_rows(donors().degrade(batch, 2)) == as_rows(donors().degrade(known, 2))
    assert len(donors().degrade(batch, 2).fold) == 80


def test_an_unknown_difference_stays_unknown():
    batch = pairs(50)
    batch.differences[::2, 1] = np.nan
    made = donors().degrade(batch, 1)
    np.testing.assert_array_equal(np.isnan(made.differences), np.isnan(batch.differences))
    assert np.isfinite(made.features).all()


def test_without_errors_or_donors_there_is_nothing():
    batch = pairs(20)
    for made in (donors().degrade(replace(batch, errors=None), 3), donors(0).degrade(batch, 3)):
        assert made.features.shape == (0, 4) and made.differences.shape == (0, 3)
        assert made.fold.dtype == np.int8 and len(made.weight) == 0
    assert len(donors(3).degrade(batch, 2).fold) == 40, "fewer rows than neighbours are taken"
    none = rows_of(batch, np.arange(0))
    assert donors().degrade(none, 2).features.shape == (0, 4)


def test_rows_of_one_value_are_donors_too():
    rows = donors()
    rows.features[:, 2] = -0.25
    assert len(rows.degrade(pairs(30), 1).fold) == 30


def test_a_logarithm_moves_to_first_order():
    problem = Problem(
        labels=(Label(name="distance"), Label(name="teff")),
        inputs=(input_of("distance"), Input(column="distance", scale=10.0, log10=True, name="d10"),
                input_of("teff"), input_of("snr")),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    columns = {"distance": rng.uniform(100, 2000, 300), "teff": rng.uniform(4000, 7000, 300)}
    x = problem.matrix({**columns, "snr": np.full(300, 50.0)})
    batch = Batch(x, np.zeros((300, 2), "f4"), np.zeros(300, np.int8), np.ones(300, "f4"))
    noise = rng.normal(size=(300, 2)) * [0.1, 50.0]
    made = with_noise(batch, problem, noise)
    moved = {name: column + noise[:, i] for i, (name, column) in enumerate(columns.items())}
    expected = problem.matrix({**moved, "snr": np.full(300, 50.0)})
    np.testing.assert_allclose(made.features, expected, rtol=1e-6)
    change = made.features[:, 0].astype(float) - x[:, 0]
    slope = 1 / (columns["distance"] * math.log(10))
    np.testing.assert_allclose(change, slope * noise[:, 0], atol=5e-7)
    assert np.abs(change).max() > 1e-4
    np.testing.assert_allclose(made.differences, noise, rtol=1e-6)
    assert (made.features[:, 3] == x[:, 3]).all(), "no label"


def test_normal_numbers_are_normal_and_of_each_pair():
    batch = pairs(20_000)
    found, other = normals(batch, 0), normals(batch, 1)
    assert found.shape == (20_000, 3)
    both = np.column_stack([found, other])
    np.testing.assert_allclose(np.corrcoef(both.T), np.eye(6), atol=0.03)
    quantiles = np.quantile(both, [0.023, 0.159, 0.5, 0.841, 0.977], axis=0)
    np.testing.assert_allclose(quantiles, np.array([[-2, -1, 0, 1, 2]]).T * np.ones(6), atol=0.08)
    np.testing.assert_array_equal(normals(batch, 0), found)
    other_y = replace(batch, differences=batch.differences + np.float32(1))
    assert not np.isin(normals(other_y, 0), found).any()


def test_few_pairs_are_degraded_more_often():
    n = np.arange(1, 3_000_000, 997)
    times = np.array([replicas(int(one)) for one in n])
    assert (np.diff(times) <= 0).all() and times[0] > 1 and times[-1] == 1
    assert replicas(0) == times[0]

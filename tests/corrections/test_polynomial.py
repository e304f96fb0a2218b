import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sos_dask import corrections as models
from sos_dask.corrections import Batch, polynomial
from sos_dask.corrections.polynomial import (
    PolynomialCorrection,
    design_matrix,
    evaluate_polynomials,
    polynomial_terms,
)
from sos_dask.problem import BLOCK_ROWS, Input, Label, Problem
from tests.corrections.pairs import NOISE, ArraySource, bias, biased_pairs


def fit(source: ArraySource, **options) -> PolynomialCorrection:
    out = models.fit("polynomial", source, **options)
    assert isinstance(out, PolynomialCorrection)
    return out


def error(correction, seed=99):
    """Root mean square of prediction - true difference, in units of the noise."""
    x = biased_pairs(20_000, seed).features
    inside = x[correction.in_range(x)]
    return np.sqrt(np.mean((correction.predict(inside) - bias(inside)) ** 2, axis=0)) / NOISE


@pytest.mark.parametrize("order", [1, 3, 4])
def test_a_polynomial_of_its_order_is_recovered(order):
    rng = np.random.default_rng(order)
    x = rng.uniform([0.7, 0.5, -2], [1.5, 5, 0.5], (4000, 3)).astype(np.float32)
    z = (x - [1.1, 2.7, -0.7]) / [0.3, 1.5, 0.8]
    terms = polynomial_terms(order)
    truth = np.prod(z[:, None, :] ** terms, axis=2) @ rng.normal(size=(len(terms), 3))
    batch = Batch(
        x,
        (truth * [100, 1, 0.1]).astype(np.float32),
        np.zeros(len(x), dtype=np.int8),
        np.ones(len(x), dtype=np.float32),
    )
    out = fit(ArraySource(batch, (1000,)), params={"order": order, "ridge": 0, "tolerance": 1e-9})
    assert out.coefficients.shape == (len(terms), 3)
    size = np.abs(batch.differences).max(axis=0)
    assert (np.abs(out.predict(x) - batch.differences) / size).max() < 2e-6


def test_the_interaction_of_features_is_found():
    out = fit(ArraySource(biased_pairs(30_000, 7)))
    assert error(out).max() < 0.1
    # No term is left out: without products the error is far larger.
    assert error(fit(ArraySource(biased_pairs(30_000, 7)), params={"order": 1})).max() > 0.2


@pytest.mark.parametrize("outliers", [0.05, 0.2])
def test_outliers_do_not_move_the_fit(outliers):
    batch = biased_pairs(30_000, 8, outliers)
    out = fit(ArraySource(batch))
    x = biased_pairs(20_000, 98).features
    offset = np.median(out.predict(x) - bias(x), axis=0) / NOISE
    assert np.abs(offset).max() < 0.03
    assert error(out).max() < 0.12
    np.testing.assert_allclose(out.scatter, NOISE * (1.05 if outliers < 0.1 else 1.3), rtol=0.1)
    # They would move a mean by half a sigma and more.
    mean = np.mean(batch.differences - bias(batch.features), axis=0) / NOISE
    assert (mean > 10 * outliers).all()


def worst_of_few(n: int, ridge: float = 1.0) -> float:
    """Error of the worst label with n pairs, mean of five draws."""
    few = [ArraySource(biased_pairs(n, seed)) for seed in range(5)]
    return float(np.mean([error(fit(one, params={"ridge": ridge})).max() for one in few]))


def test_few_pairs_are_steadied_by_the_ridge_and_by_a_lower_order(monkeypatch):
    lower = worst_of_few(100)
    monkeypatch.setattr(polynomial, "_PAIRS_A_TERM", 2)
    assert worst_of_few(150) < 0.6 * worst_of_few(150, ridge=0.0)
    assert lower < 0.85 * worst_of_few(100)


def test_the_order_follows_the_number_of_pairs():
    orders = [fit(ArraySource(biased_pairs(n))).exponents.sum(axis=1).max() for n in (175, 174, 30)]
    assert orders == [4, 3, 1]


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_features_that_say_nothing_are_harmless(ridge):
    batch = biased_pairs(3000, 9)
    batch.features[:, 2] = -0.25
    batch.features[:, 1] = batch.features[:, 0]
    out = fit(ArraySource(batch), params={"ridge": ridge})
    predicted = out.predict(batch.features)
    residual = batch.differences - predicted
    assert np.abs(np.median(residual, axis=0) / NOISE).max() < 0.2
    assert np.isfinite(out.coefficients).all()
    assert np.abs(predicted).max() < 2 * np.abs(batch.differences).max()


def test_batches_only_change_the_last_digits():
    batch = biased_pairs(5000, 10, 0.03)
    whole = fit(ArraySource(batch))
    parts = fit(ArraySource(batch, (1, 1, 900, 4990)))
    assert whole.info == parts.info
    x = batch.features
    assert (np.abs(whole.predict(x) - parts.predict(x)) / NOISE).max() < 1e-5


def test_a_cluster_gives_the_same_bytes(cluster):
    source = ArraySource(biased_pairs(5000, 11, 0.03), (700, 2500, 2500, 4800))
    there = fit(source, client=cluster.client)
    assert there.files() == fit(source).files()


def test_only_the_chosen_folds_are_used():
    batch = biased_pairs(6000, 12)
    spoiled = batch.differences.copy()
    spoiled[batch.fold == 3] = 1e6
    rest = [0, 1, 2, 4]
    expected = fit(ArraySource(batch), train_folds=rest)
    out = fit(
        ArraySource(Batch(batch.features, spoiled, batch.fold, batch.weight)), train_folds=rest
    )
    assert out.files() == expected.files()


def test_weights_count_by_their_ratios():
    batch = biased_pairs(4000, 13)
    weight = np.random.default_rng(0).choice([0.0, 1.0, 2.0], 4000).astype(np.float32)
    weighted = Batch(batch.features, batch.differences, batch.fold, weight)
    scaled = Batch(batch.features, batch.differences, batch.fold, weight * 1024)
    out = fit(ArraySource(weighted))
    assert out.files() == fit(ArraySource(scaled)).files()
    assert out.info.n_pairs[0] == np.count_nonzero(weight)
    # A pair of weight 0 may hold anything.
    spoiled = batch.differences.copy()
    spoiled[weight == 0] = -1e7
    ignored = fit(ArraySource(Batch(batch.features, spoiled, batch.fold, weight)))
    assert ignored.files() == out.files()
    # Weight moves the fit: pairs that are off by one sigma get all of it.
    shifted = batch.differences + np.where(weight == 2, 1, 0)[:, None] * NOISE
    heavy = np.where(weight == 2, 1000, 1).astype(np.float32)
    x = batch.features
    lift = fit(ArraySource(Batch(x, shifted.astype(np.float32), batch.fold, heavy))).predict(
        x
    ) - bias(x)
    assert (np.median(lift, axis=0) / NOISE > 0.9).all()


def test_labels_may_be_unknown_in_different_pairs():
    batch = biased_pairs(6000, 14)
    expected = fit(ArraySource(batch))
    batch.differences[::2, 1] = np.nan
    batch.differences[1000:4000, 2] = np.nan
    out = fit(ArraySource(batch, (1000, 4000)))
    assert out.info.n_pairs == (6000, 3000, 3000)
    assert error(out).max() < 0.35
    # The other labels only decide how many passes there are.
    np.testing.assert_allclose(
        out.coefficients[:, 0], expected.coefficients[:, 0], rtol=0, atol=1e-4 * NOISE[0]
    )


def test_differences_of_one_value_and_few_others():
    # The quartiles are equal: the scale must not become zero.
    batch = biased_pairs(1000, 15)
    batch.differences[:900] = np.array([10, 0.1, 0.01], dtype=np.float32)
    out = fit(ArraySource(batch))
    np.testing.assert_allclose(
        np.median(out.predict(batch.features), axis=0), [10, 0.1, 0.01], rtol=0.05
    )


def test_the_passes_end():
    # Here weights and scale circle unless the scale is kept in the end.
    for seed in (6, 7, 9):
        batch = biased_pairs(250, seed, 0.1)
        assert fit(ArraySource(batch)).passes < 60


# --- terms -------------------------------------------------------------------------------------


def test_terms_have_the_documented_order():
    assert polynomial_terms(2).tolist() == [
        [0, 0, 0],
        [1, 0, 0], [0, 1, 0], [0, 0, 1],
        [2, 0, 0], [1, 1, 0], [1, 0, 1], [0, 2, 0], [0, 1, 1], [0, 0, 2],
    ]  # fmt: skip
    assert polynomial_terms().shape == (35, 3)
    assert polynomial_terms(0).tolist() == [[0, 0, 0]]


@given(st.integers(0, 6), st.integers(1, 4))
def test_terms_are_all_of_them_once(order, n):
    terms = polynomial_terms(order, n)
    assert len(terms) == math.comb(order + n, n)
    assert len(np.unique(terms, axis=0)) == len(terms)
    assert (terms >= 0).all()
    assert terms.sum(axis=1).max() == order
    assert (np.diff(terms.sum(axis=1)) >= 0).all()


@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=20, unique=True),
    st.integers(0, 40),
    st.integers(0, 2**32 - 1),
)
def test_any_polynomial_equals_its_definition(exponents, n, seed):
    rng = np.random.default_rng(seed)
    z = rng.uniform(-2, 2, (n, 3))
    powers = np.array(exponents)
    coefficients = rng.normal(size=(len(powers), 2))
    expected = np.prod(z[:, None, :] ** powers, axis=2)
    np.testing.assert_allclose(
        evaluate_polynomials(z, powers, coefficients),
        expected @ coefficients,
        rtol=1e-10,
        atol=1e-10,
    )


@given(st.integers(0, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_design_matrix_is_all_terms_of_all_rows(order, n, seed):
    z = np.random.default_rng(seed).uniform(-2, 2, (7, n))
    terms = polynomial_terms(order, n)
    expected = np.prod(z[:, None, :] ** terms, axis=2)
    np.testing.assert_allclose(design_matrix(z, terms), expected, rtol=1e-12)


def test_the_value_of_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(2)
    z = rng.normal(size=(2 * BLOCK_ROWS + 37, 3))
    terms = polynomial_terms()
    coefficients = rng.normal(size=(len(terms), 3))
    whole = evaluate_polynomials(z, terms, coefficients)
    order = rng.permutation(len(z))
    np.testing.assert_array_equal(evaluate_polynomials(z[order], terms, coefficients), whole[order])
    some = order[:11]
    np.testing.assert_array_equal(evaluate_polynomials(z[some], terms, coefficients), whole[some])
    # Labels do not disturb each other either.
    alone = evaluate_polynomials(z, terms, coefficients[:, 1:2])
    np.testing.assert_array_equal(alone[:, 0], whole[:, 1])


# --- the fit, by brute force -------------------------------------------------------------------


@pytest.mark.parametrize("huber", [True, False])
def test_normal_equations_are_those_of_all_rows(huber):
    batch = biased_pairs(300, 3, 0.1)
    batch.differences[::7, 1] = np.nan
    weight = np.random.default_rng(3).uniform(0.5, 2, 300).astype(np.float32)
    source = ArraySource(Batch(batch.features, batch.differences, batch.fold, weight))
    model = fit(source, params={"order": 1})
    rows = models.Training(source).rows(0)
    normal, right, noise, counts = polynomial._normal_equations(rows, 1.25, model, huber, True)
    z = (batch.features - model.center) / model.width
    terms = np.column_stack([np.ones(300), z])
    for label in range(3):
        known = np.isfinite(batch.differences[:, label])
        a, y = terms[known], batch.differences[known, label].astype(np.float64)
        residual = y - a @ model.coefficients[:, label]
        u = np.abs(residual) / model.scatter[label]
        robust = np.where(u > 1.345, 1.345 / np.maximum(u, 1e-9), 1.0)
        robust = robust if huber else np.where(u < 4.685, (1 - (u / 4.685) ** 2) ** 2, 0.0)
        w = robust * weight[known] / 1.25
        np.testing.assert_allclose(normal[label], a.T @ (w[:, None] * a), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(right[label], a.T @ (w * y), rtol=1e-9, atol=1e-9)
        step = 1e-5 * model.scatter[label]
        ahead, behind = (_bent(residual + d, model.scatter[label], huber) for d in (step, -step))
        slope = (ahead - behind) / (2 * step) * weight[known] / 1.25
        np.testing.assert_allclose(noise[label, 0], np.sum((w * residual) ** 2), rtol=1e-9)
        np.testing.assert_allclose(noise[label, 1], np.sum(slope), rtol=1e-4)
        assert counts[label][1].sum() == known.sum()
    assert polynomial._normal_equations(rows, 1.25, model, huber, False).counts == []


def _bent(residual, scatter, huber):
    """Residuals times their weights."""
    u = np.abs(residual) / scatter
    if huber:
        return residual * np.minimum(1.0, 1.345 / np.maximum(u, 1e-9))
    return residual * np.where(u < 4.685, (1 - (u / 4.685) ** 2) ** 2, 0.0)


def test_orders_that_noise_alone_may_have_made_are_left_out():
    """Of a plane 126 terms of noise are no part; of a sharp curve all orders are; labels differ."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(4000, 5))
    plane, curve = 1.0 + x @ [0.3, 0.0, -0.2, 0.1, 0.0], 0.3 * x[:, 0] ** 4 + x[:, 1] ** 3
    truth = np.stack([plane, curve], axis=1)
    y = truth + rng.standard_t(3, size=truth.shape)
    labels = tuple(Label(name=name) for name in ("plane", "curve"))
    problem = Problem(labels=labels, inputs=tuple(Input(column=c) for c in "abcde"))
    fold = np.zeros(4000, np.int8)
    batch = Batch(x.astype("f4"), y.astype("f4"), fold, np.ones(4000, np.float32))
    model = fit(ArraySource(batch, problem=problem))
    order = model.exponents.sum(axis=1)
    assert (np.abs(model.coefficients[order > 1, 0]) < 1e-9).all()
    assert all(np.abs(model.coefficients[order == power, 1]).max() > 0.05 for power in (3, 4))
    error = np.sqrt(np.mean((model.predict(batch.features) - truth) ** 2, axis=0))
    # Of m terms the error is scatter * sqrt(m / n), a little more for heavy tails.
    assert error[0] < 0.06
    assert error[1] < 0.35


def test_the_ridge_leaves_the_constant_alone():
    rng = np.random.default_rng(0)
    terms = np.column_stack([np.ones(50), rng.normal(size=(50, 2))])
    y = 100 + terms @ [0.0, 2.0, -1.0]
    nothing = np.zeros((1, 2))
    part = polynomial._Part(np.stack([terms.T @ terms]), np.stack([terms.T @ y]), nothing, [])
    start = np.zeros((3, 1))
    found, change = polynomial._solve([part], start, 0.0)
    np.testing.assert_allclose(found[:, 0], [100, 2, -1], rtol=1e-9)
    np.testing.assert_allclose(change[0], np.sqrt(np.mean(y**2)), rtol=1e-9)
    halves = [polynomial._Part(part.normal / 2, part.right / 2, nothing, [])] * 2
    ridge = 5.0
    pulled, _ = polynomial._solve(halves, start, ridge)
    matrix = part[0][0]
    penalty = np.diag(np.diag(matrix)) * ridge / 50
    penalty[0, 0] = 0
    expected = np.linalg.solve(matrix + penalty, part[1][0])
    np.testing.assert_allclose(pulled[:, 0], expected, rtol=1e-9)


def test_a_fit_ends_after_two_passes_without_change(monkeypatch):
    changes = []
    solve = polynomial._solve

    def seen(*given):
        coefficients, change = solve(*given)
        changes.append(change)
        return coefficients, change

    monkeypatch.setattr(polynomial, "_solve", seen)
    found = fit(ArraySource(biased_pairs(3000, 5)), params={"order": 2, "tolerance": 1e-3})
    assert len(changes) == found.passes < 60
    calm = [bool((one <= 1.02e-3 * found.scatter).all()) for one in changes]
    assert calm[-2:] == [True, True] and not all(calm[-3:])


def test_how_often_weights_are_mild_and_the_scale_is_measured(monkeypatch):
    """Where no pass is without change: so many passes each, at most."""
    seen = []
    normal_equations = polynomial._normal_equations

    def equations(rows, weight, model, huber, counted):
        seen.append((huber, counted))
        return normal_equations(rows, weight, model, huber, counted)

    monkeypatch.setattr(polynomial, "_normal_equations", equations)
    found = fit(ArraySource(biased_pairs(500, 5)), params={"order": 1, "tolerance": 1e-12})
    n_counted = polynomial.HUBER_PASSES + polynomial.SCALE_PASSES
    assert len(seen) == found.passes > n_counted
    assert [huber for huber, _ in seen].count(True) == polynomial.HUBER_PASSES
    n_left = found.passes - n_counted
    assert [counted for _, counted in seen] == [True] * n_counted + [False] * n_left

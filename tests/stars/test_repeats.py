"""Widths of pulls: known noise is recovered, wrong measurements hardly matter, parts add up."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask.schema import LABELS
from sos_dask.stars.repeats import (
    MIN_PULLS,
    SNR_EDGES,
    merged_pulls,
    normalisation,
    pull_correlation,
    pull_counts,
)

UNIT = {"teff": 60.0, "logg": 0.1, "feh": 0.05}


def repeats(
    n_stars: int = 4000, seed: int = 0, outliers: float = 0.0, visits: int = 3
) -> tuple[pa.Table, np.ndarray]:
    """Stars seen several times, and their primaries; giants' errors are stated 2 times too small.

    Dwarfs state theirs 0.8 times too large below S/N 50 and rightly above.
    """
    rng = np.random.default_rng(seed)
    n = n_stars * visits
    star = np.repeat(np.arange(n_stars), visits)
    snr = np.repeat(rng.choice([25.0, 75.0], n_stars), visits)
    giant = star % 2 == 0
    factor = np.where(giant, 2.0, np.where(snr < 50, 0.8, 1.0))
    wrong = rng.random(n) < outliers
    columns = {
        "_healpix_29": rng.permutation(n),
        "quality": np.zeros(n, np.int64),
        "snr": snr,
    }
    for label, unit in UNIT.items():
        stated = unit * rng.uniform(0.5, 2.0, n)
        true = np.where(giant, 2.0, 4.5) if label == "logg" else 5000.0
        noise = stated * factor * rng.normal(size=n) + wrong * 20 * unit * rng.choice([-1, 1], n)
        columns |= {label: true + noise, f"{label}_err": stated}
    order = rng.permutation(n)
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    return pa.table(columns).take(pa.array(order)), place[star * visits][order]


def by_kind(factors) -> dict:
    return {(f.label, f.kind, f.mean_snr and round(f.mean_snr)): f for f in factors}


@pytest.mark.parametrize("outliers", [0.0, 0.03])
def test_known_factors_are_recovered(outliers):
    found = by_kind(merged_pulls([pull_counts(*repeats(outliers=outliers))]))
    for label in LABELS:
        for kind, snr, true in (
            ("giant", 25, 2.0),
            ("giant", 75, 2.0),
            ("dwarf", 25, 0.8),
            ("dwarf", 75, 1.0),
        ):
            one = found[label, kind, snr]
            assert one.n > 1000
            assert (one.snr_low, one.snr_high) == ((None, 30.0) if snr == 25 else (30.0, None))
            assert one.low is not None and one.high is not None
            assert one.low < one.factor < one.high
            slack = 0.04 if outliers else 0.0  # what wrong measurements leave below 4 widths
            assert one.low < true + slack * true and true - slack * true < one.high, one


def visits_of_any_snr(
    seed: int, power: list[float], n_stars: int, wrong: float
) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Dwarfs and giants seen twice at other S/N, their primaries, and the noise of (n, 3) labels.

    True error / stated error is a power of S/N, of giants of the other sign and 1.5 times as large.
    """
    rng = np.random.default_rng(seed)
    n = 2 * n_stars
    star = np.repeat(np.arange(n_stars), 2)
    snr = np.clip(np.exp(rng.normal(4.0, 0.8, n_stars)[star] + rng.normal(0.0, 0.5, n)), 8.0, 900.0)
    giant, wrong_ones = rng.random(n_stars)[star] < 0.4, rng.random(n) < wrong
    columns: dict[str, Any] = {"_healpix_29": np.arange(n), "snr": snr}
    columns["quality"] = np.zeros(n, np.int64)
    noise = np.empty((n, 3))
    for number, (label, unit) in enumerate(UNIT.items()):
        error = unit * rng.uniform(0.8, 1.5, n_stars)[star] * np.hypot(0.4, 50.0 / snr)
        factor = (snr / 50.0) ** power[number]
        noise[:, number] = error * rng.normal(size=n)
        away = np.where(wrong_ones, rng.uniform(8.0, 30.0, n) * unit * rng.choice([-1, 1], n), 0.0)
        true = np.where(giant, 2.0, 4.5) if label == "logg" else 5000.0
        columns[label] = true + noise[:, number] + away
        columns[f"{label}_err"] = error / np.where(giant, 1.5 / factor, factor)
    columns["logg"] = np.where(giant, np.minimum(columns["logg"], 3.4), columns["logg"])
    return pa.table(columns), 2 * star, noise


def widths_of(table, noise, factors, edges) -> np.ndarray:
    """Pull widths of normalised errors by label, kind of star and bin of S/N."""
    snr, logg = table["snr"].to_numpy(), table["logg"].to_numpy()
    found = []
    for number, label in enumerate(LABELS):
        error = table[f"{label}_err"].to_numpy() * normalisation(factors, label, logg, snr)
        for is_kind in (logg >= 3.5, logg < 3.5):
            for low, high in pairwise(edges):
                pull = (noise[:, number] / error)[is_kind & (snr >= low) & (snr < high)]
                found.append(np.diff(np.quantile(pull, [0.16, 0.84]))[0] / 2)
    return np.array(found)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("wrong", [0.0, 0.05])
def test_normalised_errors_are_those_of_either_observation(seed, wrong):
    """Not of the worse of both, though the factor is a power of S/N."""
    power = np.random.default_rng(seed).uniform(0.2, 0.45, 3) * [1, -1, (-1) ** seed]
    table, primary, noise = visits_of_any_snr(seed, power, 120_000, wrong)
    factors = [one.__dict__ for one in merged_pulls([pull_counts(table, primary)])]
    widths = widths_of(table, noise, factors, [20.0, 30.0, 50.0, 100.0, 200.0, 400.0])
    assert np.abs(widths - 1).max() < 0.1
    assert np.sqrt(np.mean((widths - 1) ** 2)) < 0.03 + 0.3 * wrong


def test_few_repeats_still_tell_of_the_snr():
    """A trend needs 200 pulls of a kind; those of fewer have one factor."""
    table, primary, noise = visits_of_any_snr(5, [0.45, -0.45, 0.3], 2_000, 0.05)
    edges = [15.0, 30.0, 100.0, 400.0]
    factors = [one.__dict__ for one in merged_pulls([pull_counts(table, primary)])]
    assert min(one["n"] for one in factors) >= 0.9 * MIN_PULLS
    assert np.abs(widths_of(table, noise, factors, edges) - 1).max() < 0.25
    of_kinds = [one for one in factors if one["mean_snr"] is None]
    assert np.abs(widths_of(table, noise, of_kinds, edges) - 1).max() > 0.4


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 8))
def test_factors_are_continuous_and_constant_beyond_their_ends(seed, n):
    rng = np.random.default_rng(seed)
    nodes = np.sort(np.exp(rng.uniform(2.0, 6.0, n)))
    factors = [
        {"label": "teff", "kind": "dwarf", "mean_snr": snr, "n": MIN_PULLS, "factor": factor}
        for snr, factor in zip(nodes.tolist(), rng.uniform(0.3, 3.0, n).tolist(), strict=True)
    ]
    factors += [{"label": "teff", "kind": "all", "mean_snr": None, "n": MIN_PULLS, "factor": 7.0}]
    factors += [{**one, "n": MIN_PULLS - 1, "factor": 99.0} for one in factors]

    def factor_of(snr, logg: float = 4.0) -> list[float]:
        return normalisation(factors, "teff", np.full(len(snr), logg), np.array(snr)).tolist()

    wanted = [one["factor"] for one in factors[:n]]
    assert factor_of(nodes) == pytest.approx(wanted)
    assert factor_of(nodes * (1 + 1e-9)) == pytest.approx(wanted, rel=1e-5)
    assert factor_of([-3.0, 0.0, 1e-9, 1e9]) == pytest.approx([wanted[0]] * 3 + [wanted[-1]])
    assert factor_of([np.nan, np.inf]) == [7.0, 7.0]
    assert factor_of(nodes, logg=2.0) == [7.0] * n


def test_normalised_errors_have_width_one():
    table, primary = repeats(seed=3)
    factors = [one.__dict__ for one in merged_pulls([pull_counts(table, primary)])]
    for label in LABELS:
        factor = normalisation(factors, label, table["logg"].to_numpy(), table["snr"].to_numpy())
        place = table.schema.get_field_index(f"{label}_err")
        table = table.set_column(
            place, f"{label}_err", pa.array(factor * table[f"{label}_err"].to_numpy())
        )
    for one in merged_pulls([pull_counts(table, primary)]):
        assert one.factor == pytest.approx(1.0, abs=0.06), one


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = [
        one.low is not None and one.high is not None and one.low < 2.0 < one.high
        for seed in range(40)
        for one in merged_pulls([pull_counts(*repeats(400, seed))])
        if one.kind == "giant" and one.mean_snr is None and one.label == "feh"
    ]
    assert len(held) == 40 and sum(held) >= 33  # below once in 600 tries of a 95 % interval


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 100), st.integers(1, 5))
def test_parts_add_up_and_order_does_not_matter(seed, n_parts):
    table, primary = repeats(150, seed)
    whole = merged_pulls([pull_counts(table, primary)])
    rng = np.random.default_rng(seed)
    part_of = rng.integers(0, n_parts, len(primary))[primary]
    parts = []
    for number in range(n_parts):
        rows = rng.permutation(np.flatnonzero(part_of == number))
        place = np.full(len(primary), -1)
        place[rows] = np.arange(len(rows))
        parts.append(pull_counts(table.take(pa.array(rows)), place[primary[rows]]))
    assert merged_pulls(parts) == whole


def test_without_repeats_the_factor_is_one():
    table, _ = repeats(50, visits=1)
    counts = pull_counts(table, np.arange(50))
    assert counts == []
    found = merged_pulls([counts])
    assert [(f.label, f.kind, f.n, f.factor, f.low) for f in found] == [
        (label, "all", 0, 1.0, None) for label in LABELS
    ]
    assert normalisation([], "teff", np.array([2.0]), np.array([np.nan])).tolist() == [1.0]


def test_few_pulls_make_no_factor():
    found = by_kind(merged_pulls([pull_counts(*repeats(MIN_PULLS // 2 - 1, visits=2))]))
    assert 0.9 * MIN_PULLS / 2 < found["teff", "all", None].n < MIN_PULLS / 2
    assert found["teff", "all", None].factor == 1.0


def test_surveys_without_errors_are_measured_by_the_expected_ones():
    table, primary = repeats()
    table = table.drop_columns([f"{label}_err" for label in LABELS])
    assert pull_counts(table, primary) == []
    found = by_kind(merged_pulls([pull_counts(table, primary, {"teff": 600.0})]))
    assert 0.1 < found["teff", "giant", None].factor < 0.4
    assert found["logg", "all", None].n == 0


def test_rows_that_fail_cuts_are_no_repeats():
    table, primary = repeats(500)
    bad = table.set_column(1, "quality", pa.array(np.ones(len(primary), np.int64)))
    assert pull_counts(bad, primary) == []


def test_a_measurement_listed_twice_is_no_repeat():
    table, primary = repeats(500)
    cells = 2 * table["_healpix_29"].to_numpy()
    copies = [table.set_column(0, "_healpix_29", pa.array(cells + extra)) for extra in (0, 1)]
    both = pa.concat_tables(copies).combine_chunks()
    assert pull_counts(both, np.append(primary, primary)) == pull_counts(table, primary)


def counts_of(flat: list[int]) -> np.ndarray:
    """Counts by label, kind, bin of S/N and bin of the pull; the last one sums log S/N."""
    counts = np.zeros((3, 2, len(SNR_EDGES) + 2, 193), dtype=np.int64)
    place, count = np.array(flat, dtype=np.int64).reshape(-1, 2).T
    counts.ravel()[place] = count
    return counts


def bin_of(pull: float) -> int:
    """Twelve bins an octave from 2^-10 on; what lies beyond is in the first and the last one."""
    return min(max(math.floor((math.log2(pull) + 10) * 12), 0), 191) if pull else 0


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.sampled_from([np.float32, np.float64]))
def test_pulls_are_those_of_one_row_after_the_other(seed, n, dtype):
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {"_healpix_29": rng.integers(0, n + 1, n)}
    columns["quality"] = (rng.random(n) < 0.2) * 1
    for label in LABELS:
        values, errors = rng.uniform(3, 4, n), rng.choice([0, 0.1, 0.7, np.nan], n)
        values[rng.random(n) < 0.3] = 3.25  # some rows have the labels of the one before
        values[rng.random(n) < 0.2] = np.nan
        columns |= {label: values.astype(dtype), f"{label}_err": errors.astype(dtype)}
    snr = rng.choice([5.0, 10.0, 21.0, 29.9, 30.0, 55.0, 700.0, 0.0, -1.0, np.inf, np.nan], n)
    columns["snr"] = snr.astype(np.float32)
    primary, expected = rng.integers(-1, max(n // 3, 1), n), {"teff": 0.2, "feh": 0.4}
    wanted = counts_of([])

    def error_of(label: str, row: int) -> float:
        stated = float(columns[f"{label}_err"][row])
        return stated if stated > 0 else expected.get(label, math.nan)

    for star in set(primary.tolist()) - {-1}:
        rows = np.flatnonzero((primary == star) & (columns["quality"] == 0))
        rows = rows[np.argsort(columns["_healpix_29"][rows], kind="stable")].tolist()
        new = [
            one
            for place, one in enumerate(rows)
            if not place or any(columns[x][one] != columns[x][rows[place - 1]] for x in LABELS)
        ]
        for number, label in enumerate(LABELS):
            chain = [one for one in new if np.isfinite(columns[label][one] + error_of(label, one))]
            for one, two in pairwise(chain):
                pull = abs(float(columns[label][one]) - float(columns[label][two]))
                errors = [error_of(label, one), error_of(label, two)]
                pull /= math.hypot(*errors)
                kind = int(float(columns["logg"][one]) + float(columns["logg"][two]) < 7.0)
                both, place = columns["snr"][[one, two]].astype(float), len(SNR_EDGES) + 1
                if np.isfinite(both).all() and min(both) > 0 and max(both) <= 2 * min(both):
                    mean = np.average(np.log2(both), weights=np.square(errors)) + 1e-12
                    place = np.searchsorted(np.log2(SNR_EDGES), mean, side="right")
                    wanted[number, kind, place, -1] += round(1024 * mean)
                wanted[number, kind, place, bin_of(pull)] += 1
    found = counts_of(pull_counts(pa.table(columns), primary, expected))
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pulls_beside_the_limits_of_bins(dtype):
    limits = 2.0 ** (np.arange(-3, 196) / 12 - 10)
    away = np.array([1e-12, 1e-10, 3e-9, 1e-6, 4e-3])
    pull = np.concatenate([limits[:, None] * (1 + away), limits[:, None] * (1 - away)]).ravel()
    pull = np.concatenate([pull, [0.0, 1e-200, 1e-30, 1e30]]).astype(dtype)
    n = len(pull)
    none = pa.nulls(2 * n, pa.float32())
    columns: dict[str, Any] = {"_healpix_29": np.arange(2 * n)}
    columns |= {
        "quality": np.zeros(2 * n, dtype=np.int64),
        "teff": np.stack([np.zeros(n, dtype), pull], axis=1).ravel(),
    }
    columns |= {"teff_err": np.full(2 * n, 0.5, dtype=dtype), "logg": none, "feh": none}
    columns["logg"] = np.arange(2 * n) + 3.5  # no row is listed twice
    counts = counts_of(pull_counts(pa.table(columns), np.arange(2 * n) // 2))
    wanted = [bin_of(one) for one in (pull.astype(np.float64) / math.sqrt(0.5)).tolist()]
    assert counts[0].sum(axis=(0, 1)).tolist() == np.bincount(wanted, minlength=193).tolist()
    assert counts.sum() == n


# --- correlation of the errors of labels --------------------------------------------------------

CORRELATION = np.array([[1.0, 0.7, -0.3], [0.7, 1.0, 0.1], [-0.3, 0.1, 1.0]])


def correlated(
    n_stars: int, seed: int = 0, wrong: float = 0.0, correlation: np.ndarray = CORRELATION
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of stars seen one to four times, their errors, and the numbers of the stars."""
    rng = np.random.default_rng(seed)
    star = np.repeat(rng.permutation(n_stars) * 7 + 3, rng.integers(1, 5, n_stars))
    n = len(star)
    errors = rng.uniform(0.3, 3.0, (n, 1)) * [60.0, 0.1, 0.05]
    noise = rng.normal(size=(n, 3)) @ np.linalg.cholesky(correlation + 1e-9 * np.eye(3)).T
    noise += np.where(rng.random((n, 1)) < wrong, rng.uniform(-30, 30, (n, 3)), 0)
    values = star[:, None] * [10.0, 0.01, 0.02] + errors * noise
    order = rng.permutation(n)
    return values[order], errors[order], star[order]


@pytest.mark.parametrize(("wrong", "slack"), [(0.0, 0.03), (0.05, 0.06)])
def test_a_known_correlation_is_found(wrong, slack):
    found = pull_correlation(*correlated(8000, 1, wrong))
    np.testing.assert_allclose(found, CORRELATION, atol=slack)


def test_the_correlation_does_not_depend_on_the_widths_of_errors():
    values, errors, star = correlated(4000, 2)
    stated = errors * [0.6, 1.0, 1.7]
    np.testing.assert_allclose(pull_correlation(values, stated, star), CORRELATION, atol=0.05)


@pytest.mark.parametrize("joined", [1.0, -1.0])
def test_a_correlation_can_be_drawn_from(joined):
    """Errors that are one and the same too, and those of few repeats."""
    one = np.array([[1.0, joined, 0.0], [joined, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for n_stars in (MIN_PULLS, 3000):
        found = pull_correlation(*correlated(n_stars, 3, correlation=one))
        np.linalg.cholesky(found)
        np.testing.assert_allclose(np.diag(found), 1.0)
        assert found[0, 1] * joined > 0.98
        np.testing.assert_allclose(found, found.T)


def test_few_or_unknown_repeats_tell_of_no_correlation():
    values, errors, star = correlated(4000, 4)
    once = np.unique(star, return_index=True)[1]
    some = np.flatnonzero(np.isin(star, np.unique(star)[: MIN_PULLS // 4]))
    unknown = np.where(np.arange(3) == 2, np.nan, errors)
    for measured in (
        (values[once], errors[once], star[once]),
        (values[some], errors[some], star[some]),
        (values[:0], errors[:0], star[:0]),
        (values, unknown, star),
        (values, np.zeros_like(errors), star),
    ):
        np.testing.assert_array_equal(pull_correlation(*measured), np.eye(3))
    assert (pull_correlation(values, errors, star) != np.eye(3)).any()

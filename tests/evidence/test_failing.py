"""Bins that fail, against one bin after the other written out."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from sos_dask.evidence.failing import (
    AXES,
    BIN_SCHEMA,
    LIMITS,
    PAIRS,
    ROWS,
    RULE,
    count_failing,
    failing_bins,
    weighted_medians,
)
from sos_dask.evidence.figures import BANDS
from sos_dask.stats.bootstrap import N_GROUPS
from sos_dask.stats.numbers import binned_quantiles

N = 6000


def one_bin(values: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> tuple[float, ...]:
    """Pairs, their effective number, weighted median and its error of one bin, pair by pair."""
    order = np.argsort(values)
    total, middles = 0.0, []
    for weight in weights[order]:
        middles.append(total + weight / 2)
        total += weight
    p16, median, p84 = (np.interp(s * total, middles, values[order]) for s in (0.16, 0.5, 0.84))
    of_stars: dict[int, float] = {}
    for value, weight, group in zip(values, weights, groups, strict=True):
        of_stars[group] = of_stars.get(group, 0.0) + weight * np.sign(value - median)
    squares = max(sum(x**2 for x in of_stars.values()), sum(w**2 for w in weights))
    error = 1.2533141 * (p84 - p16) / 2 * np.sqrt(squares) / total if len(values) > 1 else np.nan
    return len(values), total**2 / squares, median, error


def medians(columns: list[Any], n_cells: int = 1) -> dict[str, Any]:
    """`weighted_medians` of cells, values, weights and groups in any order."""
    order = np.lexsort((columns[1], columns[0]))
    cells, values, weights, groups = (column[order] for column in columns)
    return weighted_medians(cells, values, weights, groups, n_cells)


def sky(seed: int = 0) -> tuple[dict, dict, np.ndarray, dict]:
    """Differences with a trend at low S/N that one method leaves, and weights of the pairs."""
    rng = np.random.default_rng(seed)
    x = rng.normal([5500, 3.5, -0.2], [900, 0.9, 0.4], (N, 3)).astype(np.float32)
    snr = rng.integers(15, 200, N).astype(np.float32)
    labels = dict(zip(("teff", "logg", "feh"), x.T, strict=True)) | {"snr": snr}
    trend = np.where(snr < 50, 0.15 * (labels["teff"] - 5500) / 900, 0.0)
    noise = rng.normal(0, 0.05, N)
    residuals = {"none": 0.2 + noise, "good": noise, "blind": noise + trend}
    residuals["good"][:40] = np.nan
    snr[50:60] = np.nan
    weights = {PAIRS: np.ones(N), ROWS: rng.poisson(2.0, N).astype(float)}
    return residuals, labels, rng.integers(0, N_GROUPS, N), weights


@pytest.mark.parametrize("seed", range(5))
def test_weighted_medians_are_those_of_one_cell_after_the_other(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 400))
    cells, weights = rng.integers(0, 12, n), rng.integers(1, 5, n).astype(float)
    values, groups = rng.normal(size=n), rng.integers(0, 60, n)
    found = medians([cells, values, weights, groups], 13)
    for cell in range(13):
        at = cells == cell
        got = [found[name][cell] for name in ("n", "n_effective", "median", "error")]
        if at.any():
            assert got == pytest.approx(one_bin(values[at], weights[at], groups[at]), nan_ok=True)
        else:
            assert got[:2] == [0, 0] and np.isnan(got[2:]).all()


def test_equal_weights_are_plain_medians_and_copies_of_stars_are_no_more_certain():
    rng = np.random.default_rng(1)
    values, ones = rng.normal(size=1001), np.ones(1001)
    cells, groups = np.zeros(1001, dtype=np.int64), np.arange(1001)
    once = medians([cells, values, ones, groups])
    plain = binned_quantiles(cells, values, 1)
    assert once["median"] == plain.median and once["n_effective"] == pytest.approx(1001, abs=2)
    assert once["error"] == pytest.approx(plain.error, rel=0.01)
    copies = medians([np.repeat(x, 4) for x in (cells, values, ones, groups)])
    assert copies["error"] == pytest.approx(once["error"], rel=0.01) and copies["n"] == 4004


def test_errors_of_weighted_medians_are_right():
    rng = np.random.default_rng(2)
    pulls = []
    for _ in range(400):
        star = np.repeat(np.arange(150), 2)  # two observations of each, half of the noise in common
        values = np.repeat(rng.normal(size=150), 2) + rng.normal(size=300)
        weights = rng.integers(1, 9, 300).astype(float)
        found = medians([np.zeros(300, dtype=np.int64), values, weights, star])
        pulls.append(found["median"][0] / found["error"][0])
    assert 0.85 < np.std(pulls) < 1.15


def test_bins_and_counts_are_those_written_out():
    residuals, labels, groups, weights = sky()
    table = failing_bins("feh", LIMITS["feh"], residuals, labels, groups, weights, 50)
    assert table.schema == BIN_SCHEMA
    rows = {tuple(row.values())[:6]: row for row in table.to_pylist()}
    known = np.isfinite(sum(residuals.values()))
    bands = {"all": known}
    for name, (low, high) in BANDS.items():
        bands[name] = known & (labels["snr"] >= low) & (labels["snr"] < high)
    counts: dict[tuple, list[int]] = {}
    n_bins = 0
    for method, values in residuals.items():
        for axis in AXES:
            ends = [-np.inf, *axis.edges, np.inf]
            for band, inside in bands.items():
                for low, high in pairwise(ends):
                    at = inside & (labels[axis.name] >= low) & (labels[axis.name] < high)
                    for weighting, w in weights.items():
                        mine = at & (w > 0)
                        if not mine.any():
                            continue
                        n_bins += 1
                        key = method, "feh", axis.name, band, weighting
                        row = rows[*key, low if np.isfinite(low) else None]
                        wanted = one_bin(values[mine], w[mine], groups[mine])
                        got = [row[x] for x in ("n", "n_effective", "median", "error")]
                        assert got[:3] == pytest.approx(wanted[:3], rel=1e-6)
                        fails = abs(wanted[2]) > max(0.01, 3 * wanted[3])
                        judged = wanted[1] >= 50
                        assert row["fails"] == (fails if judged else None)
                        assert row["bin_high"] == (high if np.isfinite(high) else None)
                        for place in (("feh", axis.name), ("all", "all")):
                            n = counts.setdefault((method, *place, f"{weighting} {band}"), [0, 0])
                            n[0] += bool(judged and fails)
                            n[1] += bool(judged)
    assert n_bins == table.num_rows
    entries = count_failing(table)
    names = ("method", "label", "against")
    found = {(*(e[x] for x in names), kind): n for e in entries for kind, n in e["counts"].items()}
    assert found == counts
    # The trend that one method leaves at low S/N is seen there, and nowhere else.
    assert found["blind", "feh", "teff", "pairs snr 20-50"][0] > 5
    assert found["blind", "all", "all", "pairs snr > 100"][0] == 0
    assert found["good", "all", "all", "rows all"][0] == 0
    assert found["none", "all", "all", "rows all"][0] == found["none", "all", "all", "rows all"][1]


def test_without_signal_to_noise_there_is_one_band():
    residuals, labels, groups, weights = sky()
    few = {"logg": labels["logg"]}
    one = {PAIRS: weights[PAIRS]}
    table = failing_bins("mg_fe", 0.02, residuals, few, groups, one, 50)
    assert set(table["band"].to_pylist()) == {"all"}
    assert set(table["against"].to_pylist()) == {"logg"}
    assert [list(entry["counts"]) for entry in count_failing(table)] == [["pairs all"]] * 6


def test_the_rule_says_the_limits():
    units = {"teff": "K", "logg": "dex", "feh": "dex", "rv": "km/s"}
    for label, limit in LIMITS.items():
        assert f"{limit:g} {units[label]} ({label})" in RULE

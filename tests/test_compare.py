import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from sos_dask.errors import ModelError
from sos_dask.evidence.figures import held_out_metrics
from sos_dask.stats.numbers import (
    binned_quantiles,
    bins_of,
    equal_count_edges,
    rms_of_medians,
    scatter,
)


def test_scatter_is_that_of_a_normal_distribution_and_ignores_outliers():
    values = np.random.default_rng(3).normal(7.0, 2.0, 200_000)
    values[:2000] = 1e6
    assert scatter(values) == pytest.approx(2.0, rel=0.03)
    assert np.isnan(scatter(values[:0]))
    assert scatter(np.array([1.0, 2.0, 4.0])) == pytest.approx(1.4826)


def test_metrics_count_only_pairs_with_difference_and_prediction():
    differences = np.array([[10, 1, 0.1], [20, 2, 0.3], [60, np.nan, 0.8]], dtype=np.float32)
    predicted = np.array([[9, 1, 0.0], [18, 1, np.nan], [60, 5, 0.2]], dtype=np.float32)
    teff, logg, feh = held_out_metrics("m", ("teff", "logg", "feh"), differences, predicted)
    assert (teff.method, teff.label, teff.subset, teff.n) == ("m", "teff", "all", 3)
    assert teff.median_before == 20
    assert teff.scatter_before == pytest.approx(14.826)
    assert teff.median_after == 1
    assert teff.scatter_after == pytest.approx(1.4826)
    assert (logg.label, logg.n, logg.median_before, logg.median_after) == ("logg", 2, 1.5, 0.5)
    # Before and after are of the same pairs.
    assert (feh.label, feh.n) == ("feh", 2)
    assert feh.median_before == pytest.approx(0.45)
    assert feh.median_after == pytest.approx(0.35)
    assert json.loads(json.dumps(asdict(teff)))["scatter_after"] == teff.scatter_after


def test_a_label_without_held_out_pair_is_an_error():
    differences = np.ones((3, 3), dtype=np.float32)
    differences[:, 2] = np.nan
    with pytest.raises(ModelError, match="m: no held-out pair has feh"):
        held_out_metrics("m", ("teff", "logg", "feh"), differences, np.zeros_like(differences))


def binned_median_rms(x, residual, edges, min_count=20) -> float:
    n_bins = max(len(edges) - 1, 0)
    found = binned_quantiles(bins_of(x, edges), residual, n_bins)
    rms, _ = rms_of_medians(found.n, found.median, min_count)
    return math.nan if rms is None else rms


def test_binned_medians_find_a_trend_that_medians_hide():
    rng = np.random.default_rng(4)
    x = rng.uniform(-1, 1, 20_000)
    noise = rng.normal(0, 0.1, len(x))
    edges = equal_count_edges(x, 20)
    assert abs(np.median(0.5 * x + noise)) < 0.02
    assert binned_median_rms(x, noise, edges) < 0.01
    assert binned_median_rms(x, 0.5 * x + noise, edges) == pytest.approx(0.5 / 3**0.5, rel=0.05)


def test_binned_medians_leave_out_unknown_values_and_thin_bins():
    x = np.array([0.0, 0.1, 0.2, 1.5, 2.0, np.nan, 0.3, 5.0])
    residual = np.array([1.0, 2.0, 3.0, 9.0, 9.0, 1e9, np.nan, 1e9])
    edges = np.array([0.0, 1.0, 2.0])
    out = binned_quantiles(bins_of(x, edges), residual, 2)
    assert out.n.tolist() == [3, 2]  # the last bin includes its upper edge; 5.0 is outside
    assert rms_of_medians(out.n, out.median, 3) == (2.0, 1)
    assert binned_median_rms(x, residual, edges, 3) == 2.0


@pytest.mark.parametrize("x", [np.empty(0), np.full(50, np.nan)])
def test_binned_medians_of_nothing(x):
    assert np.isnan(binned_median_rms(x, x, equal_count_edges(x, 10)))


def test_binned_medians_of_one_value():
    x = np.full(50, 3.0)
    assert binned_median_rms(x, np.full(50, 0.25), equal_count_edges(x, 10)) == 0.25

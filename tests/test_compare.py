import json
from dataclasses import asdict

import numpy as np
import pytest

from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.metrics import binned_median_rms, held_out_metrics, scatter


def test_scatter_is_that_of_a_normal_distribution_and_ignores_outliers():
    values = np.random.default_rng(3).normal(7.0, 2.0, 200_000)
    values[:2000] = 1e6
    assert scatter(values) == pytest.approx(2.0, rel=0.03)
    assert np.isnan(scatter(values[:0]))
    assert scatter(np.array([1.0, 2.0, 4.0])) == pytest.approx(1.4826)


def test_metrics_count_only_pairs_with_difference_and_prediction():
    differences = np.array([[10, 1, 0.1], [20, 2, 0.3], [60, np.nan, 0.8]], dtype=np.float32)
    predicted = np.array([[9, 1, 0.0], [18, 1, np.nan], [60, 5, 0.2]], dtype=np.float32)
    teff, logg, feh = held_out_metrics("m", differences, predicted, "sparse")
    assert (teff.method, teff.label, teff.subset, teff.n) == ("m", "teff", "sparse", 3)
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
        held_out_metrics("m", differences, np.zeros_like(differences))


def test_binned_medians_find_a_trend_that_medians_hide():
    rng = np.random.default_rng(4)
    x = rng.uniform(-1, 1, 20_000)
    noise = rng.normal(0, 0.1, len(x))
    flat = binned_median_rms(x, noise, 20)
    trend = binned_median_rms(x, 0.5 * x + noise, 20)
    assert abs(np.median(0.5 * x + noise)) < 0.02
    assert flat.rms < 0.01
    assert trend.rms == pytest.approx(0.5 / np.sqrt(3), rel=0.05)
    assert sum(trend.n) == len(x)
    assert max(trend.n) - min(trend.n) <= 1


def test_binned_medians_leave_out_unknown_values_and_thin_bins():
    x = np.array([0.0, 0.1, 0.2, 1.5, 2.0, np.nan, 0.3, 5.0])
    residual = np.array([1.0, 2.0, 3.0, 9.0, 9.0, 1e9, np.nan, 1e9])
    out = binned_median_rms(x, residual, [0.0, 1.0, 2.0], min_count=3)
    assert out.edges == (0.0, 1.0, 2.0)
    assert out.n == (3, 2)  # the last bin includes its upper edge; 5.0 is outside
    assert out.median[0] == 2.0
    assert np.isnan(out.median[1])
    assert out.rms == 2.0


@pytest.mark.parametrize("x", [np.empty(0), np.full(50, np.nan)])
def test_binned_medians_of_nothing(x):
    assert np.isnan(binned_median_rms(x, x).rms)


def test_binned_medians_of_one_value():
    out = binned_median_rms(np.full(50, 3.0), np.full(50, 0.25))
    assert out.rms == 0.25
    assert sum(out.n) == 50


@pytest.mark.parametrize("bins", [0, -1, [1.0], [1.0, 1.0, 2.0], [2.0, 1.0]])
def test_impossible_bins(bins):
    with pytest.raises(ConfigError):
        binned_median_rms(np.arange(9.0), np.arange(9.0), bins)

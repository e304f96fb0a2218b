"""Correlations of the errors of labels: known ones are recovered within their standard errors."""

import numpy as np
import pytest

from sos_dask.evidence.covariance import correlations, groups

NAMES = ("teff", "logg", "feh")
TRUTH = np.array([[1.0, 0.7, -0.3], [0.7, 1.0, 0.2], [-0.3, 0.2, 1.0]])


def pairs(n: int, seed: int, heavy: bool = False, wrong: float = 0.0):
    """Residuals with errors of references in them, independent in each label, and own errors."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(n, 3)) @ np.linalg.cholesky(TRUTH).T
    if heavy:  # of a size that all labels of a row share, with half of the 16-84 % range 1
        normal /= np.sqrt(rng.chisquare(5, (n, 1)) / 5) * 1.105
    own = np.array([50.0, 0.1, 0.05]) * rng.uniform(0.5, 2.0, (n, 1))
    residual = own * normal + 0.8 * own * rng.normal(size=(n, 3))
    residual[rng.random(n) < wrong] += [900.0, -2.0, 1.5]
    return residual, own


@pytest.mark.parametrize(
    ("heavy", "wrong", "bias"), [(False, 0.0, 0.0), (True, 0.0, 0.06), (False, 0.05, 0.08)]
)
def test_known_correlations_are_found_with_their_errors(heavy, wrong, bias):
    """Over seeds; of wrong rows and heavy tails little is left, where moments would be off by 1."""
    off = []
    for seed in range(12):
        residual, own = pairs(3000, seed, heavy, wrong)
        every = {("all", "all"): np.ones(3000, bool)}
        for row in correlations(residual, own, np.hypot(1, 0.8) * own, NAMES, every):
            true = TRUTH[NAMES.index(row["label"]), NAMES.index(row["other"])]
            assert row["n"] == 3000
            off.append([row["correlation"] - true, row["error"]])
    error, stated = np.array(off).T
    assert len(off) == 36 and np.abs(error).max() < bias + 4 * stated.max()
    assert abs(np.median(error)) < bias + 0.015
    if not bias:
        assert np.std(error / stated) == pytest.approx(1.0, abs=0.35)


def test_groups_are_kinds_and_bands_and_thin_ones_are_left_out():
    residual, own = pairs(1000, 1)
    residual[:500, 2] = np.nan
    giant, snr = np.arange(1000) < 150, np.where(np.arange(1000) % 2, 30.0, np.nan)
    found = correlations(residual, own, 1.3 * own, NAMES, groups(giant, snr))
    n = {(r["kind"], r["snr"], r["label"], r["other"]): r["n"] for r in found}
    assert n["all", "all", "teff", "logg"] == 1000 and n["all", "all", "teff", "feh"] == 500
    assert n["dwarfs", "snr 20-50", "teff", "logg"] == 425
    assert not [key for key in n if key[:2] == ("giants", "snr 20-50")], "75 are too few"
    assert not [key for key in n if key[1] == "snr 50-100"]

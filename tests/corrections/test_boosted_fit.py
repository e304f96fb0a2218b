"""Bins of boosted trees, and what their bytes depend on."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sos_dask import corrections as models
from sos_dask.corrections import Batch, Training, boosted
from sos_dask.corrections.base import summarise
from sos_dask.corrections.boosted import BoostedCorrection, Job
from tests.corrections.pairs import NOISE, ArraySource, biased_pairs
from tests.corrections.test_boosted import QUICK, fit
from tests.steps import FEATURES


def thresholds(correction: BoostedCorrection) -> list[set[float]]:
    """Thresholds of all trees, per feature."""
    out: list[set[float]] = [set() for _ in FEATURES]
    for booster in correction.boosters:
        document = json.loads(bytes(booster.save_raw("json")))
        for tree in document["learner"]["gradient_booster"]["model"]["trees"]:
            nodes = zip(
                tree["left_children"],
                tree["split_indices"],
                tree["split_conditions"],
                strict=True,
            )
            for left, feature, condition in nodes:
                if left != -1:
                    out[feature].add(float(np.float32(condition)))
    return out


def test_thresholds_lie_on_few_edges():
    source = ArraySource(biased_pairs(20_000, 11))
    out = fit(source, params=QUICK)
    coarse = fit(source, params={**QUICK, "max_bin": 16})
    for fine, few in zip(thresholds(out), thresholds(coarse), strict=True):
        assert 20 < len(fine) < 256
        assert 5 < len(few) < 16


def test_order_and_batches_of_the_pairs_do_not_matter():
    batch = biased_pairs(8000, 12, 0.03)
    order = np.random.default_rng(0).permutation(8000)
    shuffled = Batch(
        batch.features[order], batch.differences[order], batch.fold[order], batch.weight[order]
    )
    out, other = fit(ArraySource(batch)), fit(ArraySource(shuffled, (10, 11, 5000)))
    x = batch.features
    assert (np.abs(out.predict(x) - other.predict(x)) / NOISE).max() < 1e-4
    assert thresholds(out) == thresholds(other)


def test_what_is_unknown_of_one_label_does_not_touch_the_trees_of_another():
    batch = biased_pairs(3000, 18)
    some = batch.differences.copy()
    some[::3, 1] = np.nan
    whole = fit(ArraySource(batch), params=QUICK)
    part = fit(ArraySource(replace(batch, differences=some)), params=QUICK)
    same = [a == b for a, b in zip(whole.ensembles, part.ensembles, strict=True)]
    assert same == [True, False, True]


def test_a_feature_of_one_value_is_never_split():
    batch = biased_pairs(2000, 13)
    batch.features[:, 2] = -0.25
    out = fit(ArraySource(batch), params=QUICK)
    assert thresholds(out)[2] == set()
    assert np.isfinite(out.predict(batch.features)).all()


def test_neither_trees_nor_predictions_depend_on_threads(monkeypatch):
    batch = biased_pairs(20_000, 4)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(boosted, "n_threads", lambda *_, n=threads: n)
        correction = fit(ArraySource(batch), params={**QUICK, "subsample": 0.7})
        found.append((correction.files(), correction.trees(batch.features).tobytes()))
    assert found[0] == found[1] == found[2]


def test_a_seed_decides_the_subsample():
    source = ArraySource(biased_pairs(3000, 16))
    params = {**QUICK, "subsample": 0.5}
    assert fit(source, params=params).files() == fit(source, params=params).files()
    assert fit(source, params={**params, "seed": 1}).files() != fit(source, params=params).files()


def test_a_block_is_scaled_and_lies_on_the_lower_edges():
    batch = biased_pairs(500, 5)
    source = ArraySource(batch, (200, 200))
    training = models.Training(source)
    settings = boosted.Settings(max_bin=8)
    summary = models.base.summarise(training, "boosted", settings, 1)
    edges = boosted._bin_edges(training, summary.info, 8)
    for column, of_column in zip(batch.features.T, edges, strict=True):
        counts = np.bincount(np.searchsorted(of_column, column, side="right"))
        assert of_column[0] == column.min()
        assert counts[0] == 0
        assert np.abs(counts[1:] - 500 / 8).max() < 10
    rows = boosted.Job(training, settings, summary, edges).block(0, 3)
    assert all(np.isin(x, e).all() for x, e in zip(rows.features.T, edges, strict=True))
    expected = (batch.differences - summary.center) / summary.spread
    for found, all_of in zip(rows.differences.T, expected.T, strict=True):
        np.testing.assert_allclose(np.sort(found), np.sort(all_of), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rows.weight, np.ones(500))


@pytest.mark.parametrize("trees", [1, 7, 10, 11, 25])
def test_training_goes_on_from_any_tree_with_equal_bytes(trees):
    batch = biased_pairs(3000, 19, 0.03)
    batch.differences[::4, 2] = np.nan
    training, settings = Training(ArraySource(batch)), boosted.Settings(n_rounds=10)
    summary = summarise(training, "boosted", settings, 50)
    job = Job(training, settings, summary, boosted._bin_edges(training, summary.info, 256))
    kept = []

    def keep(n_trees, trained, booster):
        if n_trees == trees:
            kept.extend([*trained, bytes(booster.save_raw("ubj"))])

    rows = job.block(0, 1)
    whole = job.boost(rows, 1, (), keep)
    assert len(kept) == (trees + 9) // 10
    assert job.boost(rows, 2, kept) == whole

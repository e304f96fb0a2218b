"""Skies that are hard: each shape does what it promises, and another seed is another sky."""

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sos_dask.errors import ConfigError
from sos_dask.simulate import SkySettings, shapes
from sos_dask.simulate.files import prepare
from sos_dask.simulate.sky import APOGEE, GALAH, LAMOST, SHAPES, references_avoid
from sos_dask.simulate.surveys import SURVEYS, stated_error_factor
from tests.simulate.mock import Sky


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    return Sky(tmp_path_factory.mktemp("hard"), n_lamost=40_000, seed=7, sky=("hard",))


def curve(label, values, seed, *names):
    """Injected differences along one label of a dwarf or a giant, without noise."""
    true = np.tile([5400.0, 4.4 if label != 1 else 2.5, -0.2], (len(values), 1))
    true[:, label] = values
    given = SkySettings(seed=seed, sky=names)
    return shapes.lamost_pipeline(given, true, np.zeros_like(true))


def test_hard_is_all_shapes():
    assert SkySettings(sky=("hard",)).shapes == set(SHAPES)
    assert SkySettings().shapes == frozenset()
    with pytest.raises(ConfigError, match="'narrow' or 'hard'"):
        SkySettings(sky=("stp",))  # type: ignore[arg-type]


def test_another_seed_is_another_pipeline():
    teff = np.linspace(4000, 7800, 77)
    found = [curve(0, teff, seed, "hard") for seed in (1, 2, 1)]
    np.testing.assert_array_equal(found[0], found[2])
    assert np.all(np.abs(found[0] - found[1]).max(axis=0) > [20.0, 0.03, 0.02])
    rv = [shapes.rv_offset(SkySettings(seed=seed), teff, 50.0) for seed in (1, 2)]
    assert np.ptp(rv[0]) > 0.2
    assert np.all(np.abs(np.array(rv) + 4.5) < 1.2)
    assert np.abs(rv[0] - rv[1]).max() > 0.05


@pytest.mark.parametrize("seed", range(4))
def test_a_shape_is_the_same_whatever_others_are_given(seed):
    teff = np.linspace(4000, 7800, 77)
    alone = curve(0, teff, seed, "hooks") - curve(0, teff, seed, "wrong")
    beside = curve(0, teff, seed, "hooks", "narrow") - curve(0, teff, seed, "narrow")
    np.testing.assert_allclose(alone, beside, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_step_is_as_sharp_as_it_is_wide(seed):
    teff = np.arange(4700.0, 6400.0, 2.0)
    added = curve(0, teff, seed, "step") - curve(0, teff, seed, "wrong")
    assert np.all(np.abs(added[-1] - added[0]) > [39.0, 0.059, 0.039])
    rising = (added[:, 1] - added[0, 1]) / (added[-1, 1] - added[0, 1])
    # From 10 to 90 %: 2 artanh(0.8) widths, of a Teff that itself has a smooth bias.
    middle = teff[(rising > 0.1) & (rising < 0.9)]
    assert 12.0 < np.ptp(middle) < 26.0
    # The pipeline steps by the Teff that it sees, with its noise.
    true = np.tile([middle.mean(), 4.4, -0.2], (2, 1))
    noise = np.array([[-100.0, 0.0, 0.0], [100.0, 0.0, 0.0]])
    low, high = shapes.lamost_pipeline(SkySettings(seed=seed, sky=("step",)), true, noise)
    assert np.all(np.abs(high - low) > [39.0, 0.059, 0.039])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("label", "ends"), [(0, (3500, 11000)), (1, (-0.5, 5.2)), (2, (-4, 0.55))])
def test_labels_saturate_at_both_ends(seed, label, ends):
    values = np.linspace(ends[0], ends[1], 200)
    measured = values + curve(label, values, seed, "saturation")[:, label]
    slope = np.gradient(measured, values)
    smooth = np.gradient(values + curve(label, values, seed, "wrong")[:, label], values)
    assert slope[-1] < 0.7 * smooth[-1]
    assert slope[0] < 0.7 * smooth[0]
    assert slope[0] > 0.0 or smooth[0] < 0.0


def test_hooks_are_at_the_edges_alone():
    for label, inside, beyond in ((0, 6900, 8000), (1, 1.1, 0.0), (2, -1.9, -2.8), (2, 0.1, 0.5)):
        values = np.array([inside, beyond], dtype=float)
        added = curve(label, values, 3, "hooks") - curve(label, values, 3, "wrong")
        np.testing.assert_allclose(added[0], 0.0, atol=1e-9)
        assert np.all(np.abs(added[1]) > [80.0, 0.1, 0.07])


def test_truth_of_a_hard_sky(hard):
    for survey in (LAMOST, GALAH, APOGEE):
        wrong = hard.truth[survey]["is_outlier"]
        assert 0.04 < wrong.mean() < 0.06
        left = hard.labels(survey) - hard.true_labels(survey) - hard.true_labels(survey, "bias_")
        size = SURVEYS[survey].noise(hard.seen[survey]["snr"])
        assert 0.9 < np.nanmedian(np.abs(left[~wrong] / size[~wrong])) / 0.6745 < 1.2
        assert np.nanmedian(np.abs(left[wrong]) / size[wrong]) > 4.0
        rv = hard.seen[survey]["rv"] - hard.truth[survey]["rv"] - hard.truth[survey]["bias_rv"]
        assert abs(np.nanmedian(rv)) < 0.1
    snr, wrong = hard.seen[LAMOST]["snr"], hard.truth[LAMOST]["is_outlier"]
    assert abs(np.median(snr[wrong]) / np.median(snr[~wrong]) - 1.0) < 0.15, "nothing tells them"


def test_errors_are_correlated_and_stated_by_the_snr(hard):
    right = ~hard.truth[LAMOST]["is_outlier"]
    snr = hard.seen[LAMOST]["snr"]
    left = hard.labels(LAMOST) - hard.true_labels(LAMOST) - hard.true_labels(LAMOST, "bias_")
    left /= SURVEYS[LAMOST].noise(snr)
    known = right & np.isfinite(left).all(axis=1)
    correlation = np.corrcoef(left[known].T)
    assert np.all(correlation[0, 1:] > 0.4)
    assert np.all(correlation < 0.95 + np.eye(3))
    pull = left / hard.labels(LAMOST, "_err") * SURVEYS[LAMOST].noise(snr)
    low, high = (np.nanstd(pull[known & chosen], axis=0) for chosen in (snr < 20, snr > 150))
    assert np.all(np.abs(np.log(low / high)) > 0.3)
    # The references state theirs as on any sky.
    stated = hard.labels(APOGEE, "_err") / SURVEYS[APOGEE].noise(hard.seen[APOGEE]["snr"])
    factor = stated_error_factor(hard.true_labels(APOGEE)[:, 1], hard.seen[APOGEE]["snr"])
    assert abs(np.nanmedian(stated[:, 0] / factor) - 1.0) < 0.02


def test_the_overlap_of_a_hard_sky_is_narrow(hard):
    for survey in (APOGEE, GALAH):
        assert not references_avoid(*hard.true_labels(survey).T, narrow=True).any()
        assert not hard.truth[survey]["is_avoided"].any()
    truth = hard.truth[LAMOST]
    assert 0.03 < truth["is_avoided"].mean() < 0.15
    references = np.concatenate([hard.truth[survey]["star"] for survey in (APOGEE, GALAH)])
    paired = np.isin(truth["star"], references)
    snr = hard.seen[LAMOST]["snr"]
    faint = (snr > 20) & (snr < 50)
    assert 0.26 < faint.mean() < 0.34
    assert 0.07 < faint[paired].mean() < 0.16
    assert np.median(truth["distance"][paired]) < 0.7 * np.median(truth["distance"])


def test_the_demonstration_makes_another_sky_where_other_shapes_are_given(tmp_path):
    seen = []
    for given in ((), ("step",), ("step",)):
        made: list[Any] = []
        prepare(tmp_path, 1000, 1, lambda *done, made=made: made.append(done), given)
        truth = pq.read_schema(tmp_path / "sky" / "truth.parquet").names
        seen.append((bool(made), "bias_rv" in truth))
    assert seen == [(True, False), (True, True), (False, True)]

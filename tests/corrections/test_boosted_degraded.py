"""Trees that also see pairs as fainter rows see them, then the measured pairs alone."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from sos_dask import corrections as models
from sos_dask.corrections import Batch, boosted
from sos_dask.corrections.base import Training, summarise
from sos_dask.corrections.boosted import MAX_CELLS, BoostedCorrection
from sos_dask.corrections.degrade import Donors, rows_of
from sos_dask.problem import DEFAULT, KNOWN_INPUTS, RV, Problem, input_of
from tests.corrections.pairs import ArraySource
from tests.corrections.test_boosted import fit

PROBLEM = Problem(inputs=(*DEFAULT.inputs, input_of("snr")))
QUICK = {"n_rounds": 40, "learning_rate": 0.2, "measured_rounds": 40}
SPREAD = np.array([180.0, 0.4, 0.3])  # of the stars
AT_100 = np.array([45.0, 0.1, 0.075])  # errors at S/N 100; in proportion to 1 / S/N


@dataclass(frozen=True)
class Degraded(ArraySource):
    """Pairs in memory, some times as rows of the catalog see them, too."""

    donors: Donors | None = None
    times: int = 4

    def load(self, index: int) -> Batch:
        batch = super().load(index)
        if not self.times:
            return batch
        assert self.donors is not None
        return replace(batch, degraded=self.donors.degrade(batch, self.times))


def seen(n: int, seed: int, snr: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Giants of one clump as a survey sees them: inputs, errors, and what the noise was."""
    rng = np.random.default_rng(seed)
    true = [4800.0, 2.5, -0.2] + SPREAD * rng.normal(size=(n, 3))
    errors = AT_100 * (100.0 / snr)[:, None]
    noise = errors * rng.normal(size=(n, 3))
    labels = true + noise
    columns = dict(zip(PROBLEM.names, labels.T, strict=True))
    return PROBLEM.matrix({**columns, "snr": snr}), errors.astype(np.float32), noise


def bright(n: int, seed: int = 0, low: float = 60.0, high: float = 300.0) -> Batch:
    """Pairs whose targets have a high S/N: their differences are noise, and no bias at all."""
    rng = np.random.default_rng(seed + 500)
    x, errors, noise = seen(n, seed, rng.uniform(low, high, n))
    fold, weight = rng.integers(0, 5, n).astype(np.int8), np.ones(n, np.float32)
    return Batch(x, noise.astype(np.float32), fold, weight, errors)


def faint_rows(n: int = 5000, seed: int = 9, low: float = 15.0, high: float = 60.0) -> Donors:
    snr = np.random.default_rng(seed).uniform(low, high, n)
    x, errors, _ = seen(n, seed, snr)
    return Donors(PROBLEM, x, errors, np.eye(3))


def source(batch: Batch, cuts: tuple[int, ...] = (), **more) -> Degraded:
    return Degraded(batch, cuts, PROBLEM, faint_rows(), **more)


def test_what_noise_makes_of_faint_rows_is_learnt_from_bright_pairs():
    """Rows scattered upwards are too high: by the share of their scatter that is noise."""
    batch, rng = bright(8000), np.random.default_rng(7)
    x, errors, noise = seen(20_000, 8, rng.uniform(20, 40, 20_000))
    plain = fit(replace(source(batch), times=0), params=QUICK)
    both = fit(source(batch), params=QUICK)
    share = errors[0] ** 2 / (errors[0] ** 2 + SPREAD**2)
    assert (share > 0.2).all(), "noise matters"
    middle = np.abs(x[:, 0] - np.median(x[:, 0])) < 1.5 * x[:, 0].std()
    for label in range(3):
        edges = np.quantile(x[middle, label], np.linspace(0, 1, 9))
        bins = np.searchsorted(edges, x[:, label])
        rms = []
        for one in (plain, both):
            left = (noise - one.predict(x))[:, label]
            means = [np.mean(left[middle & (bins == number)]) for number in range(2, 8)]
            rms.append(np.sqrt(np.mean(np.square(means))))
        assert rms[1] < 0.6 * rms[0], label


def test_a_bias_that_depends_on_s_n_is_found_by_the_measured_pairs():
    """What noise does not make: a step below S/N 80, which degraded pairs do not have."""
    batch = bright(12_000, low=40.0, high=120.0)
    step = 0.3 * SPREAD * (batch.features[:, 3:] < np.log10(80))
    stepped = replace(batch, differences=(batch.differences + step).astype(np.float32))
    x, _, _ = seen(4000, 5, np.full(4000, 60.0))

    def found(**more: int) -> np.ndarray:
        with_step, without = (
            fit(
                replace(source(one), donors=faint_rows(low=40.0, high=80.0)),
                params={**QUICK, **more},
            )
            for one in (stepped, batch)
        )
        change = np.median(with_step.predict(x) - without.predict(x), axis=0)
        return np.asarray(change / (0.3 * SPREAD))

    kept = found()
    assert (np.abs(kept - 1) < 0.2).all()
    assert (np.abs(found(measured_rounds=0) - 1) > 2 * np.abs(kept - 1)).all()


def test_a_constant_difference_stays_a_zero_point():
    batch = bright(2000)
    batch.differences[:, 1] = 0.25
    made = fit(source(batch), params=QUICK)
    x, _, _ = seen(500, 3, np.full(500, 20.0))
    np.testing.assert_allclose(made.predict(x)[:, 1], 0.25, rtol=1e-6)
    assert np.ptp(made.predict(x)[:, 0]) > 1


def test_without_degraded_pairs_there_are_no_further_trees():
    batch = bright(2000)
    plain = ArraySource(batch, (), PROBLEM)
    found = fit(plain, params=QUICK)
    assert found.boosters[0].num_boosted_rounds() == 40
    assert fit(plain, params={**QUICK, "measured_rounds": 0}).ensembles == found.ensembles
    assert fit(source(batch, times=0), params=QUICK).ensembles == found.ensembles
    both = fit(source(batch), params={**QUICK, "measured_rounds": 7})
    assert both.boosters[0].num_boosted_rounds() == 47
    assert both.info.n_pairs == found.info.n_pairs == (2000,) * 3
    assert both.info.minimum == found.info.minimum, "the box is that of measured pairs"
    assert not np.array_equal(both.predict(batch.features), found.predict(batch.features))


def test_the_first_trees_are_those_without_measured_rounds():
    batch = bright(2000)
    whole = fit(source(batch), params=QUICK)
    first = fit(source(batch), params={**QUICK, "measured_rounds": 0})
    for one, other in zip(whole.boosters, first.boosters, strict=True):
        begun = one[: other.num_boosted_rounds()]
        x = np.ascontiguousarray(batch.features)
        np.testing.assert_array_equal(begun.inplace_predict(x), other.inplace_predict(x))


def test_order_and_batches_of_degraded_pairs_do_not_matter():
    batch = bright(4000)
    order = np.random.default_rng(0).permutation(4000)
    shuffled = source(rows_of(batch, order), (10, 11, 3000))
    one, other = (fit(given, params=QUICK) for given in (source(batch), shuffled))
    x = batch.features
    assert (np.abs(one.predict(x) - other.predict(x)) / AT_100).max() < 1e-3


def test_pairs_of_other_folds_are_not_degraded_into_the_training():
    batch = bright(1500)
    others = [1, 2, 3, 4]
    changed = replace(batch, differences=batch.differences.copy())
    changed.differences[batch.fold == 0] += 1000
    made = [fit(source(one), train_folds=others, params=QUICK) for one in (batch, changed)]
    assert made[0].ensembles == made[1].ensembles


def test_polynomials_see_the_measured_pairs_alone():
    batch = bright(2000)
    plain = models.fit("polynomial", ArraySource(batch, (), PROBLEM), params={"order": 1})
    both = models.fit("polynomial", source(batch), params={"order": 1})
    assert plain.contents() == both.contents()


def test_degraded_rows_are_rows_of_a_training_that_asks_for_them():
    given = source(bright(300), (100,))
    measured = Training(given, (1, 2))
    both = replace(measured, degraded=True)
    for index in range(2):
        first, rows = measured.rows(index), both.rows(index)
        n = len(first.weight)
        for one, more in zip(first, rows, strict=True):
            np.testing.assert_array_equal(more[:n], one)
        made = given.load(index).degraded
        assert made is not None
        of_folds = np.isin(made.fold, (1, 2))
        np.testing.assert_array_equal(rows.features[n:], made.features[of_folds])


# --- bins --------------------------------------------------------------------------------------

TIMES = (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("n_inputs", TIMES)
@pytest.mark.parametrize("with_snr", [True, False])
@pytest.mark.parametrize("most", [8, 64, 256, 4096])
def test_bins_fit_into_the_table_or_are_as_many_as_asked_for(n_inputs, with_snr, most):
    others = [one for one in KNOWN_INPUTS if one.column != "snr"]
    inputs = (input_of("snr"), *others)[:n_inputs] if with_snr else others[:n_inputs]
    problem = Problem(inputs=tuple(inputs))
    bins = boosted._n_bins(problem, most)
    assert len(bins) == n_inputs and max(bins) <= most
    cells = np.prod([float(one) for one in bins])
    of_star = [n for n, one in zip(bins, problem.inputs, strict=True) if one in problem.of_star]
    assert len(set(of_star)) == 1
    if cells > MAX_CELLS:
        assert set(bins) == {most}, "no table: nothing is given away"
        finest = (MAX_CELLS / 16) ** (1 / len(of_star))
        assert finest < 64, "a table of few bins alone"
    elif of_star[0] < most:
        more = cells * (1 + 1 / of_star[0]) ** len(of_star)
        assert more > MAX_CELLS, "as many as there may be"
        assert of_star[0] >= 32


def test_bins_of_the_usual_problems():
    assert boosted._n_bins(DEFAULT, 256) == [256, 256, 256]
    assert boosted._n_bins(PROBLEM, 256) == [128, 128, 128, 16]
    assert boosted._n_bins(PROBLEM, 64) == [64, 64, 64, 16]
    assert boosted._n_bins(RV, 256) == [38, 38, 38, 38, 16]
    assert boosted._n_bins(Problem(inputs=(input_of("snr"),)), 256) == [256]
    assert boosted._n_bins(Problem(inputs=KNOWN_INPUTS), 256) == [256] * len(KNOWN_INPUTS)


@pytest.mark.parametrize("n_inputs", [3, 4, 5, 8])
def test_the_table_is_there_where_bins_fit(n_inputs, monkeypatch, tmp_path):
    """With thresholds on every bin that there may be; limits are smaller here, to be quick."""
    monkeypatch.setattr(boosted, "MAX_CELLS", 1 << 15)
    monkeypatch.setattr(boosted, "_LEAST_BINS", 6)
    problem = Problem(inputs=KNOWN_INPUTS[:n_inputs])
    rng = np.random.default_rng(n_inputs)
    x = rng.normal(size=(3000, n_inputs)).astype(np.float32)
    y = np.stack([np.sin(3 * x).sum(axis=1)] * 3, axis=1).astype(np.float32)
    y += rng.normal(size=y.shape).astype(np.float32)
    batch = Batch(x, y, np.zeros(3000, np.int8), np.ones(3000, np.float32))
    training = Training(ArraySource(batch, (), problem))
    info = summarise(training, "boosted", boosted.Settings(), 1).info
    bins, edges = boosted._n_bins(problem, 256), boosted._bin_edges(training, info, 256)
    assert [len(of) for of in edges] == pytest.approx(bins, rel=0.05)
    fitted = fit(training.source, params={"n_rounds": 60, "min_child_weight": 0.0})
    fitted.save(tmp_path / "model")
    loaded = models.load(tmp_path / "model")
    assert isinstance(loaded, BoostedCorrection)
    assert (loaded.table is None) == (n_inputs == 8)
    if loaded.table is not None:
        assert 2**12 < loaded.table.values[..., 0].size <= 1 << 15
    np.testing.assert_allclose(loaded.predict(x), fitted.predict(x), rtol=1e-5, atol=1e-5)

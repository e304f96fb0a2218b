from collections.abc import Mapping
from itertools import pairwise
from types import SimpleNamespace as Figure
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.errors import ModelError
from sos_dask.evidence.figures import (
    FIGURE_SCHEMA,
    NONE,
    STATISTICS,
    SUBSETS,
    TEST,
    Sample,
    figures,
)
from sos_dask.stats.bootstrap import N_GROUPS, draw

N = 4000
EDGES = {
    "teff": np.linspace(4000.0, 8000.0, 9),
    "logg": np.linspace(0.0, 5.0, 6),
    "feh": np.linspace(-3.0, 1.0, 9),
}
WEIGHTS = draw(100, 0)
Found = Mapping[tuple[str, str, str], Figure]


def sky(seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    labels = rng.uniform([4000, 0, -3], [8000, 5, 1], size=(N, 3)).T
    return Sample(
        TEST,
        dict(zip(EDGES, labels, strict=True)),
        rng.integers(0, N_GROUPS, N),
        rng.random(N) < 0.05,
    )


def compared(residuals: Mapping[str, np.ndarray], sample: Sample, **more) -> Found:
    chosen: dict[str, Any] = {"min_pairs": 30, "min_bin_pairs": 50, **more}
    weights = chosen.pop("weights", WEIGHTS)
    found, _ = figures(sample, "feh", residuals, EDGES, weights, **chosen)
    return {(f["method"], f["subset"], f["statistic"]): Figure(**f) for f in found}


@pytest.fixture(scope="module")
def residuals() -> dict[str, np.ndarray]:
    """A trend with Teff that one method takes away and another does not; the noise is 0.05."""
    sample = sky()
    noise = np.random.default_rng(1).normal(0, 0.05, N)
    trend = 0.1 * (sample.labels["teff"] - 6000) / 2000
    return {NONE: 0.2 + trend + noise, "good": noise, "half": trend / 2 + noise}


@pytest.fixture(scope="module")
def found(residuals) -> Found:
    return compared(residuals, sky())


def test_every_figure_is_there(residuals, found):
    assert set(found) == {(m, s, f) for m in residuals for s in SUBSETS for f in STATISTICS}
    table = pa.Table.from_pylist([vars(row) for row in found.values()], FIGURE_SCHEMA)
    assert table.num_rows == len(found) and set(vars(found["none", "all", "mad"])) == set(
        FIGURE_SCHEMA.names
    )


def test_figures_are_exact(residuals, found):
    sample = sky()
    masks = {
        "all": np.ones(N, dtype=bool),
        "sparse": sample.sparse,
        "dense": ~sample.sparse,
        "logg < 1": sample.labels["logg"] < 1,
        "teff > 7000": sample.labels["teff"] > 7000,
        "feh < -2": sample.labels["feh"] < -2,
        "feh > 0.2": sample.labels["feh"] > 0.2,
    }
    for method, values in residuals.items():
        for subset, mask in masks.items():
            x = values[mask]
            median = np.median(x)
            wanted = {
                "median": median,
                "mad": 1.4826 * np.median(np.abs(x - median)),
                "width": np.diff(np.percentile(x, [16, 84]))[0] / 2,
            }
            for name, value in wanted.items():
                figure = found[method, subset, name]
                assert figure.value == pytest.approx(value)
                assert figure.n == len(x)
                assert figure.low <= figure.value <= figure.high
                assert figure.high - figure.low < 8 * 1.3 * np.std(x) / np.sqrt(len(x))


def test_bins_show_the_trend_that_is_left(residuals, found):
    sample = sky()
    medians, errors, n = [], [], []
    for label, edges in EDGES.items():
        for low, high in pairwise(edges):
            x = sample.labels[label]
            inside = residuals["half"][(x >= low) & (x < high)]
            medians.append((abs(np.median(inside)), label, low, high, len(inside)))
            errors.append(1.2533 * np.std(inside) / np.sqrt(len(inside)))
            n.append(len(inside))
    figure = found["half", "all", "rms_binned"]
    assert figure.value == pytest.approx(np.sqrt(np.mean([m[0] ** 2 for m in medians])))
    assert figure.error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.2)
    assert figure.n == sum(n)
    worst = found["half", "all", "worst_bin"]
    assert (worst.value, worst.against, worst.bin_low, worst.bin_high, worst.n) == max(medians)
    assert worst.against == "teff" and worst.value == pytest.approx(0.044, abs=0.01)
    assert worst.low < worst.value < worst.high
    # What is no trend is noise.
    flat = found["good", "all", "rms_binned"]
    assert flat.value == pytest.approx(flat.error, rel=0.5) and flat.value < figure.value / 3


def test_better_is_said_only_where_it_is_certain(residuals, found):
    sample = sky()
    worse = found["half", "all", "mad"]
    best = found["good", "all", "mad"]
    assert (best.behind, best.behind_low, best.behind_high) == (0, 0, 0)
    assert worse.behind == pytest.approx(worse.value - best.value)
    assert 0 < worse.behind_low < worse.behind < worse.behind_high
    # On the same resamples a difference is known better than of two samples.
    widths = [figure.high - figure.low for figure in (worse, best)]
    assert worse.behind_high - worse.behind_low < np.hypot(*widths)
    # Stars fall into groups at random, so a few sets of resamples serve all samples.
    weights = [draw(200, number) for number in range(5)]
    said, statistics = 0, ("median", "mad", "width")
    for seed in range(40):
        rng = np.random.default_rng(seed)
        first = {name: values[:500] for name, values in sample.labels.items()}
        few = Sample(TEST, first, rng.integers(0, N_GROUPS, 500), sample.sparse[:500])
        equal = dict(zip((NONE, "a", "b"), rng.normal(size=(3, 500)), strict=True))
        both = compared(equal, few, min_pairs=500, min_bin_pairs=501, weights=weights[seed % 5])
        lows = [[both[m, "all", name].behind_low or 0.0 for m in "ab"] for name in statistics]
        said += sum(max(pair) > 0 for pair in lows)
    assert 0.01 < said / 40 / 3 < 0.1, "of equals one is better in one of twenty"


def test_too_few_pairs_are_null_with_their_number(residuals):
    sample = sky()
    few = Sample(TEST, sample.labels, sample.groups, np.arange(N) < 12)
    found = compared(residuals, few)
    for statistic in STATISTICS:
        figure = found["good", "sparse", statistic]
        assert (figure.value, figure.low, figure.behind, figure.n) == (None, None, None, 12)
        assert found["good", "dense", statistic].value is not None
    thin = compared(residuals, sample, min_bin_pairs=N)
    assert thin["good", "all", "rms_binned"].value is None
    assert thin["good", "all", "worst_bin"].n == 0
    assert thin["good", "all", "mad"].value is not None


def test_the_order_of_the_pairs_does_not_matter(residuals, found):
    sample = sky()
    order = np.random.default_rng(9).permutation(N)
    labels = {name: values[order] for name, values in sample.labels.items()}
    turned = Sample(TEST, labels, sample.groups[order], sample.sparse[order])
    again = compared({name: values[order] for name, values in residuals.items()}, turned)
    assert again == found


def test_pairs_that_a_method_does_not_predict_count_for_none(residuals):
    some = {name: values.copy() for name, values in residuals.items()}
    some["half"][:100] = np.nan
    found = compared(some, sky())
    assert {found[m, "all", "mad"].n for m in some} == {N - 100}


def test_bad_samples_are_errors(residuals):
    with pytest.raises(ModelError, match=r"4000 test pairs .* at least 4001 are needed"):
        compared(residuals, sky(), min_pairs=N + 1)

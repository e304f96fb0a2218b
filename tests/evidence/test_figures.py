"""Figures of methods on the same pairs, the choice of one, and regions left out."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from types import SimpleNamespace as Figure
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.figures import (
    DENSITY,
    FIGURE_SCHEMA,
    NONE,
    REFERENCE,
    REGION,
    STATISTICS,
    SUBSETS,
    TEST,
    Choice,
    Sample,
    Scored,
    check_rule,
    choose,
    figures,
    held_out_metrics,
    left_out_groups,
    region_groups,
)
from sos_dask.schema import LABELS
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
    rest = rng.integers(0, N_GROUPS, N), rng.random(N) < 0.05
    columns = dict(zip(EDGES, labels, strict=True)) | {
        "snr": rng.integers(10, 200, N).astype(float)
    }
    return Sample(TEST, columns, *rest)


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
        "snr 20-50": (sample.labels["snr"] >= 20) & (sample.labels["snr"] < 50),
        "snr 50-100": (sample.labels["snr"] >= 50) & (sample.labels["snr"] < 100),
        "snr > 100": sample.labels["snr"] >= 100,
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


ROUGHNESS = {"boosted": 0.8, "hybrid": 0.1, "polynomial": 0.02}


def scored(value: float, error: float = 0.001) -> Scored:
    """A figure whose resamples move up and down with those of all others, and a little alone."""
    together = np.random.default_rng(0).normal(0, 0.1, 500)
    alone = np.random.default_rng(int(1e6 * value)).normal(0, error, 500)
    return Scored(value, value + together + alone)


def chosen(rule: str, values: dict[str, tuple[float, float, float]], **more) -> Choice:
    """Choice by the scatter of each label; binned medians are the same for all."""
    figures = {}
    for number, label in enumerate(LABELS):
        of = {(method, "mad"): scored(each[number]) for method, each in values.items()}
        of |= {(method, "rms_binned"): scored(0.1) for method in values}
        figures[label] = {**of, (NONE, "mad"): scored(2.0), (NONE, "rms_binned"): scored(1.0)}
    return choose(rule, figures, more.pop("roughness", ROUGHNESS), **more)


EQUAL = {"boosted": (1.0, 1.0, 1.0), "hybrid": (1.0, 1.0, 1.0), "polynomial": (1.05, 1.0, 1.0)}


def test_the_smoothest_of_those_that_are_as_good():
    choice = chosen("balanced", EQUAL)
    assert choice.method == "hybrid"
    assert choice.why.startswith(
        "hybrid: no label is significantly worse than with the best method; the smoothest "
        "(roughness 0.100) of boosted and hybrid; "
    )
    assert "polynomial is worse in teff scatter by 5.00 % [4." in choice.why
    by, low, high = choice.scores["polynomial"]["worse_in"]["teff scatter"]
    assert low < by < high
    assert by == pytest.approx(0.05)
    assert choice.scores["hybrid"]["worse_in"] == {}
    assert choice.scores["hybrid"]["scatter"] == pytest.approx(0.5)
    assert choice.scores["hybrid"]["scatter_low"] < 0.5 < choice.scores["hybrid"]["scatter_high"]


def test_a_difference_within_its_interval_is_none():
    values = {"boosted": (1.0, 1.0, 1.0), "polynomial": (1.05, 1.0, 1.0)}
    assert chosen("balanced", values).method == "boosted"
    noisy = {
        label: {(m, s): Scored(o.value, o.value + np.random.default_rng(i).normal(0, 0.1, 500))
         for i, ((m, s), o) in enumerate(of.items())}
        for label in LABELS
        for of in [{("boosted", "mad"): scored(1.0), ("polynomial", "mad"): scored(1.05),
                    (NONE, "mad"): scored(2.0)}]
    }  # fmt: skip
    assert choose("balanced", noisy, ROUGHNESS).method == "polynomial"


def test_a_certain_difference_that_does_not_matter_is_none():
    values = {"boosted": (1.0, 1.0, 1.0), "polynomial": (1.005, 1.0, 1.0)}
    assert chosen("balanced", values).method == "polynomial"
    assert chosen("balanced", values, tolerance=0.0).method == "boosted"


def test_where_each_is_worse_somewhere_the_average_decides():
    values = {"boosted": (1.0, 1.1, 1.0), "polynomial": (1.1, 1.0, 1.0), "hybrid": (1.3, 1.3, 1.3)}
    choice = chosen("balanced", values)
    assert choice.method == "polynomial"
    assert "not in the scatter averaged over them" in choice.why
    assert "hybrid is worse in " in choice.why and ", and in 2 more" in choice.why


def test_without_cells_the_smallest_scatter_of_the_good():
    nan = dict.fromkeys(ROUGHNESS, float("nan"))
    choice = chosen("balanced", {"a": (1.001, 1, 1), "b": (1.0, 1, 1)}, roughness=nan)
    assert choice.method == "b"
    assert choice.scores["b"]["roughness"] is None
    assert "too few cells" in choice.why


def test_the_other_rules():
    values = {**EQUAL, "boosted": (0.999, 1.0, 1.0)}
    assert chosen("scatter", values).method == "boosted"
    assert "smallest held-out scatter" in chosen("scatter", values).why
    assert chosen("scatter", {m: EQUAL["hybrid"] for m in "zca"}).method == "a", "first by name"
    named = chosen("polynomial", values)
    assert (named.method, named.rule) == ("polynomial", "polynomial")
    assert named.why == "polynomial: the job names it"
    assert chosen("balanced", {"a": (1, 1, 1)}).why == "a: the only method"


def test_nothing_to_choose_or_no_such_rule():
    with pytest.raises(ModelError, match="no method to choose from"):
        choose("balanced", {label: {(NONE, "mad"): scored(1.0)} for label in LABELS}, {})
    with pytest.raises(ConfigError, match="rule 'balancd'") as caught:
        check_rule("balancd", ["boosted"])
    assert "balanced" in caught.value.hint
    check_rule("boosted", ["boosted"])


def test_regions_say_their_limits_and_hold_their_lower_edges():
    teff = np.array([4499.0, 4500.0, 7000.0, np.nan])
    logg = np.array([0.5, 1.0, 4.0, 4.0])
    assert region_groups(teff, logg) == [
        "Teff < 4500, log g < 1",
        "4500 <= Teff < 5250, 1 <= log g < 2",
        "Teff >= 7000, log g >= 3.5",
        "",
    ]


def test_small_groups_and_small_rests_are_not_left_out():
    splits = {
        DENSITY: ("dense",) * 90 + ("sparse",) * 10,
        REGION: ("a",) * 60 + ("b",) * 9 + ("",) * 31,
        REFERENCE: ("only",) * 100,
    }
    assert left_out_groups(splits, 10) == [(DENSITY, "sparse")]
    assert left_out_groups(splits, 9) == [(DENSITY, "sparse"), (REGION, "a"), (REGION, "b")]
    assert left_out_groups(splits, 11) == []

import numpy as np
import pytest

from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.figures import NONE, Choice, Scored, check_rule, choose
from sos_dask.schema import LABELS

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

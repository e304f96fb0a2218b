"""Figures of panels: trends, methods, hit rates, formulas."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.mathtext import MathTextParser

from sos_dask.report import page
from sos_dask.report.figures import (
    calibration_figure,
    comparison_figure,
    formula_lines,
    front_figure,
    overlap_figure,
    reference_figure,
    trend_figure,
)
from sos_dask.schema import LABELS
from tests.report.made import UNITS, comparison, drawn

TEFF = r"\frac{T_\mathrm{eff}}{5040\,\mathrm{K}}"


LONG = (
    rf"-38.6 + 354.7 \, \left({TEFF} - 1\right) + 18.7 \, \left(\log g - 5.2\right) \, "
    rf"\left(\log g + 5.2 \, \left({TEFF} - 0.05 \, \left(\log g - 3\right) + 0.09 \, "
    rf"\left(\mathrm{{[Fe/H]}} + 0.2\right) - 1\right)^{{2}} - \frac{{1}}{{\log g + 7}}\right)"
)


@pytest.mark.parametrize("width", [30, 60, 1000])
def test_a_formula_is_broken_into_lines_that_lose_nothing(width, monkeypatch):
    monkeypatch.setattr("sos_dask.report.figures._LETTERS", width)
    lines = formula_lines(LONG)
    assert (len(lines) == 1) == (width == 1000)
    whole = re.sub(r"\s|\{\}|\\times|\\,", "", "".join(lines))
    expected = LONG.replace(TEFF, "t").replace(r"\left", "").replace(r"\right", "")
    assert whole == re.sub(r"\s|\\,", "", expected)
    for line in lines:
        MathTextParser("path").parse(f"${line}$")  # every line can be typeset by itself


def test_the_front_marks_the_formula_taken():
    front = [
        {"complexity": c, "loss": 0.4 / c, "scatter": 0.1 / c, "standard_error": 0.01}
        for c in (1, 3, 9)
    ]
    entry = {"front": front, "chosen": 1}
    figure = front_figure(dict.fromkeys(LABELS, entry), UNITS, 4000).figure
    for axes in figure.axes:
        marked = [line for line in axes.lines if line.get_marker() == "D"]
        places = [np.asarray(line.get_xydata()).tolist() for line in marked]
        assert places == [[[3.0, pytest.approx(0.4 / 3)]]]


def trends(labels) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"label": label, "against": against, "binning": "equal-width", "subset": "all",
             "sample": sample, "method": None if sample == "before" else "boosted", "n": 90,
             "centre": float(at), "median": 1.0, "p16": -1.0, "p84": 2.0, "error": 0.1}
            for label in labels for against in labels for sample in ("before", "after")
            for at in range(5)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("labels", [{"rv": "km/s"}, {**UNITS, "rv": "km/s", "mg_fe": "dex"}])
def test_one_label_or_five_make_figures(labels):
    drawn = trend_figure(trends(labels), labels, "boosted", False, "lamost")
    assert drawn is not None and drawn.facts["n"] == {"before": 450, "fitted": 0, "after": 450}
    assert len(drawn.figure.axes) == len(labels) ** 2
    assert "km/s" in drawn.figure.axes[-1].get_xlabel() + drawn.figure.axes[
        0
    ].get_xlabel() + "".join(axes.get_ylabel() for axes in drawn.figure.axes)


def test_calibration_states_how_many_pairs_judge_each_part(current):
    table = page.Build.open({"uncertainty": current / "lamost.uncertainty"}).table("hit_rates")
    assert table is not None
    said = drawn(calibration_figure(table, UNITS)).facts["pairs"]
    for row in table.to_pylist():
        if row["subset"] in ("all", "sparse", "giants"):
            assert said[row["subset"]] == row["n"]
    assert calibration_figure(table.slice(0, 0), UNITS) is None


def test_medians_beyond_the_panel_are_triangles_at_its_edge():
    table = trends({"teff": "K"}).to_pylist()
    wild = [{**row, "centre": 9.0, "median": 99.0} for row in table if row["sample"] == "after"][:1]
    few = [{**row, "centre": 7.0, "n": 19} for row in table[:1]]
    inside = drawn(trend_figure(pa.Table.from_pylist(table), UNITS, "boosted", False, "lamost"))
    assert inside.facts["clipped"] is False
    given = pa.Table.from_pylist([*table, *wild, *few])
    found = drawn(trend_figure(given, {"teff": "K"}, "boosted", False, "lamost"))
    assert found.facts["clipped"] is True
    assert found.facts["n"] == {"before": 450, "fitted": 0, "after": 540}, "19 pairs are too few"
    [axes] = found.figure.axes
    marked = [
        np.asarray(line.get_xydata()).tolist() for line in axes.lines if line.get_marker() == "^"
    ]
    assert marked[-1] == [[9.0, axes.get_ylim()[1]]]
    assert axes.get_ylim() == pytest.approx((-1.36, 2.36)), "16th to 84th percentile, and margins"


def test_differences_of_references_are_counted_where_they_are_judged():
    def row(at, significance, n_common, n=90):
        return {
            "binning": "equal-width", "first": "a", "second": "b", "label": "teff",
            "against": "teff", "centre": at, "significance": significance,
            "significance_common": 1.0, "difference": significance, "n_common": n_common,
            **{f"{name}_{side}": value for side in ("first", "second")
               for name, value in (("n", n), ("median", 1.0), ("error", 0.1))},
        }  # fmt: skip

    rows = [row(0.0, 3.0, 20), row(1.0, -3.1, 19), row(2.0, None, 0, 5), row(3.0, 4.0, 0)]
    table = pa.Table.from_pylist(rows)
    found = drawn(reference_figure(table, {"teff": "K"}, "a", "b", "lamost"))
    counts = {"judged": 3, "significant": 2, "common": 39}
    assert found.facts == {"first": "a", "second": "b", **counts}
    upper, lower = found.figure.axes
    assert [len(np.asarray(line.get_xdata())) for line in upper.lines[1:3]] == [3, 3], (
        "five pairs are too few"
    )
    heights = [bar.get_height() for bar in lower.patches if hasattr(bar, "get_height")]
    assert [h for h in heights if abs(h) in (3.0, 3.1, 4.0)] == [3.0, -3.1, 4.0]
    direct = next(line for line in lower.lines if line.get_marker() == "D")
    assert np.isfinite(direct.get_ydata()).tolist() == [True, False, False, False]
    assert reference_figure(table, {"teff": "K"}, "a", "c", "lamost") is None


def test_pairs_and_rows_are_shares_in_the_same_bins():
    rng = np.random.default_rng(0)
    pairs = {"snr": rng.uniform(20, 400, 500), "teff": rng.normal(5000, 300, 500)}
    rows = {"snr": rng.uniform(10, 80, 3000), "teff": np.full(3000, np.nan)}
    pairs["snr"][0], rows["snr"][:2] = 0.0, np.nan
    found = drawn(overlap_figure(pairs, rows, UNITS))
    [axes] = found.figure.axes  # no row has a Teff
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "S/N"
    steps: Any = axes.patches
    for step, values in zip(steps, (rows["snr"][2:], pairs["snr"][1:]), strict=True):
        shares, edges, _ = step.get_data()
        assert len(shares) == 40 and 99 < shares.sum() <= 100
        np.testing.assert_allclose(shares, 100 * np.histogram(values, edges)[0] / len(values))
    assert found.facts["pairs"] == 500 and found.facts["rows"] == 3000
    inside = [np.mean((x["snr"] >= 20) & (x["snr"] < 50)) for x in (pairs, rows)]
    assert found.facts["bands"]["S/N 20–50"] == [f"{100 * x:.1f} %" for x in inside]
    assert overlap_figure({"teff": pairs["teff"]}, rows, UNITS) is None


def test_dots_are_at_their_values_one_below_the_other():
    found = drawn(comparison_figure(comparison(), UNITS, "boosted"))
    axes = found.figure.axes[0]
    assert axes.get_xscale() == "log" and axes.get_ylim() == (2.5, -0.5)
    drawn_bars: Any = axes.containers
    by_method = {bar.get_label(): bar.lines[0].get_xydata() for bar in drawn_bars}
    assert list(by_method) == ["none", "boosted (chosen)", "polynomial"]
    step = 0.76 / 3
    for slot, (data, factor) in enumerate(zip(by_method.values(), (2.0, 1.0, 1.2), strict=True)):
        np.testing.assert_allclose(data[:, 0], 30 * factor)
        np.testing.assert_allclose(data[:, 1], np.arange(3) + (slot - 1) * step)

"""Kernels of the report: counts, projections, formulas, tables, the same bytes again."""

import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser

from sos_dask.report import maps, page
from sos_dask.report.figures import comparison_figure, formula_lines, front_figure, trend_figure
from sos_dask.report.page import Build, Picture, Table, html
from sos_dask.report.style import Drawn, listed, new_figure, number, render, robust_limits
from sos_dask.schema import LABELS
from sos_dask.sky.healpix import ang2pix

UNITS = {"teff": "K", "logg": "dex", "feh": "dex"}


def plain_figure() -> Drawn:
    figure = new_figure(2.0)
    axes = figure.subplots()
    axes.plot([0, 1], [2, 3])
    axes.set_xlabel(r"$T_\mathrm{eff}$ [K]")
    return Drawn("A title", figure, {"n": 1})


def test_the_same_figure_gives_the_same_bytes_whatever_the_user_has_set():
    import matplotlib as mpl

    first = render(plain_figure)
    with mpl.rc_context({"font.size": 30, "savefig.dpi": 20}):
        second = render(plain_figure)
        assert mpl.rcParams["font.size"] == 30, "the user's settings are left alone"
    assert first is not None
    assert first == second
    assert first.png.startswith(b"\x89PNG") and first.pdf.startswith(b"%PDF")
    for word in (b"CreationDate", b"Matplotlib", b"matplotlib"):
        assert word not in first.png and word not in first.pdf
    assert render(lambda: None) is None


# --- counts -------------------------------------------------------------------------------------


def test_a_map_shows_rows_where_they_are():
    counts = np.zeros(maps.N_SKY, dtype=np.int64)
    counts[ang2pix(np.array([90.0]), np.array([40.0]), maps.ORDER)] = 9
    drawn = maps.sky_figure({"one": counts, "none": np.zeros_like(counts)})
    assert drawn is not None and drawn.facts["rows"] == {"one": 9}
    axes = drawn.figure.axes[0]
    picture: np.ndarray = np.ma.filled(np.ma.asarray(axes.collections[0].get_array()), np.nan)
    dec, x = np.argwhere(np.isfinite(picture)).T
    ra = 180.0 - (x / picture.shape[1] * 360.0 - 180.0)  # grows to the left
    assert np.abs(ra.mean() - 90.0) < 8 and np.abs(dec.mean() / len(picture) * 180 - 130.0) < 8
    galactic = axes.lines[0]
    assert np.rad2deg(galactic.get_ydata()).max() == pytest.approx(62.9, abs=0.2)
    assert maps.sky_figure({"none": np.zeros_like(counts)}) is None


labels = st.lists(
    st.tuples(st.floats(2000, 11000, width=32) | st.just(float("nan")), st.floats(-1, 6, width=32)),
    max_size=40,
)


@given(labels, st.integers(0, 40))
def test_counts_on_the_plane_do_not_depend_on_partitions_and_lose_no_row(rows, cut):
    teff, logg = np.array(rows, dtype=np.float32).reshape(-1, 2).T
    cells = maps.kiel_cells(teff, logg)
    parts = [maps.kiel_cells(teff[s], logg[s]) for s in (np.s_[:cut], np.s_[cut:])]
    np.testing.assert_array_equal(cells, np.concatenate(parts))
    np.testing.assert_array_equal(cells < 0, np.isnan(teff))
    beyond = (teff < 3000) | (teff >= 10000) | (logg < -0.5) | (logg >= 5.5)
    assert (cells[beyond & ~np.isnan(teff)] == maps.N_CELLS).all()
    well_inside = (teff > 3000) & (teff < 9999) & (logg > -0.5) & (logg < 5.499)
    assert (cells[well_inside] < maps.N_CELLS).all()
    centre_teff, centre_logg = maps.kiel_centres()
    inside = (cells >= 0) & (cells < maps.N_CELLS)
    assert (np.abs(centre_teff[cells[inside]] - teff[inside]) <= 25.01).all()
    assert (np.abs(centre_logg[cells[inside]] - logg[inside]) <= 0.02501).all()


# --- formulas -----------------------------------------------------------------------------------

TEFF = r"\frac{T_\mathrm{eff}}{5040\,\mathrm{K}}"
LONG = (
    rf"-38.6 + 354.7 \, \left({TEFF} - 1\right) + 18.7 \, \left(\log g - 5.2\right) \, "
    rf"\left(\log g + 5.2 \, \left({TEFF} - 0.05 \, \left(\log g - 3\right) + 0.09 \, "
    rf"\left(\mathrm{{[Fe/H]}} + 0.2\right) - 1\right)^{{2}} - \frac{{1}}{{\log g + 7}}\right)"
)


@pytest.mark.parametrize("width", [30, 60, 1000])
def test_a_formula_is_broken_into_lines_that_lose_nothing(width):
    lines = formula_lines(LONG, width)
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


# --- words and tables ---------------------------------------------------------------------------


def test_numbers_have_the_digits_of_their_unit():
    assert number(-37.89, "K", sign=True) == "−37.9"
    assert number(0.06941, "dex") == "0.0694"
    assert number(None, "dex") == number(float("nan"), "dex") == "–"
    assert listed(["teff"]) == "Teff" and listed(LABELS) == "Teff, log g and [Fe/H]"


def test_limits_hold_zero_and_ignore_a_few_wild_bins():
    low = np.append(np.linspace(1, 2, 99), -1e6)
    bottom, top = robust_limits(low, low + 1)
    assert -1 < bottom <= 0 and 2.8 < top < 4
    assert robust_limits(np.array([np.nan]), np.array([np.nan])) == (-1.0, 1.0)


METRICS = [
    {
        "method": method, "label": label, "subset": "all", "n": 500, "median_before": -3.0,
        "scatter_before": 2.0, "median_after": 0.0, "scatter_after": after,
    }
    for method, after in (("boosted", 1.0), ("polynomial", 1.5))
    for label in LABELS
]  # fmt: skip


def test_the_headline_says_what_was_gained():
    gains = page.gains(METRICS, UNITS, "boosted")
    assert [gain["label"] for gain in gains] == list(LABELS)
    assert gains[0]["before"] == "2" and gains[0]["after"] == "1" and gains[0]["share"] == "−50 %"
    assert gains[1]["after"] == "1.000" and gains[1]["n"] == 500
    table = page.metrics(METRICS, UNITS, "polynomial")
    assert {table.rows[i][1] for i in table.strong} == {"polynomial"}
    assert len(table.rows) == 6


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


def comparison() -> pa.Table:
    rows = []
    for method, factor in (("none", 2.0), ("boosted", 1.0), ("polynomial", 1.2)):
        for label in LABELS:
            for sample in ("test", "train"):
                for subset in ("all", "sparse", "teff > 7000"):
                    for statistic in ("median", "mad", "width", "rms_binned", "worst_bin"):
                        value = factor * (30.0 if label == "teff" else 0.05)
                        rows.append(
                            {
                                "method": method, "label": label, "sample": sample,
                                "subset": subset, "statistic": statistic, "value": value,
                                "low": 0.9 * value, "high": 1.1 * value,
                                "error": 0.3 if statistic == "worst_bin" else None, "n": 700,
                            }
                        )  # fmt: skip
    return pa.Table.from_pylist(rows)


def test_the_comparison_shows_every_figure_with_its_interval():
    found = page.comparison(comparison(), UNITS, "boosted", "sparse")
    assert len(found.rows) == 3 * (2 * 2 + 1), "none has no training pairs of its own"
    row = next(r for r in found.rows if r[:3] == ("Teff [K]", "boosted", "test"))
    assert row[3] == "700" and row[5] == "30.0\n[27.0, 33.0]" and row[8].endswith("± 0.3")
    drawn = comparison_figure(comparison(), UNITS, "boosted")
    assert drawn is not None
    assert drawn.facts["pairs"] == {"all": 700, "sparse": 700, "Teff > 7000": 700}
    assert comparison_figure(comparison().slice(0, 0), UNITS, "boosted") is None


def test_text_of_users_is_escaped_on_the_page():
    evil = "<script>alert(1)</script>"
    rendered = render(plain_figure)
    assert rendered is not None
    facts = {"known": 1, "before": evil, "after": 0}
    pictures = {"kiel": Picture(f'" onload="{evil}', facts, rendered.png)}
    bad = Table((evil,), ((evil,),))
    names = ("account", "inputs", "products", "software", "metrics", "worst", "short", "agreements",
             "disagreeing", "flags", "follow_up", "artifacts", "outside", "hit_rates")  # fmt: skip
    tables = dict.fromkeys(names) | {"comparison": {}, "left_out": {}, "gains": []}
    tables |= {"cuts": {evil: bad}}
    tables |= dict.fromkeys(("account", "inputs", "products", "software"), bad)
    tables["disagreeing"] = []
    facts["before"] = 7
    text = html(Build({}, {}), pictures, tables, job=evil, job_text=evil, version="1")
    assert "<script" not in text and 'onload="' not in text
    assert "Trends before and after" not in text, "a section without content is left out"
    assert 'width="1278"' in text and pictures["kiel"].size == (1278, 360)
    assert pictures["kiel"].share == 1


def test_intervals_that_hold_less_than_they_say():
    rows = [
        {"label": label, "subset": subset, "level": level, "n": n, "coverage": coverage,
         "low": coverage - 0.02, "high": coverage + 0.02}
        for label, subset, level, n, coverage in [
            ("teff", "all", 0.68, 1000, 0.67),
            ("teff", "logg < 1", 0.95, 44, 0.84),
            ("logg", "feh > 0.2", 0.68, 182, 0.5),
            ("feh", "dense", 0.68, 1000, 0.8),
            ("feh", "feh < -2", 0.68, 0, 0.0),
        ]
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows).rename_columns({"coverage": "hit_rate"})
    short = page.short_intervals(table)
    assert [(row["label"], row["hit_rate"]) for row in short] == [("logg", 0.5), ("teff", 0.84)]
    assert page.short_intervals(table.slice(0, 1)) == []

"""Kernels of the report: counts, projections, formulas, tables, the same bytes again."""

import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser
from sos_dask.report.formulas import formula_lines, front_figure
from sos_dask.report.methods import comparison_figure
from sos_dask.report.words import number

from sos_dask.report import headline, planes, sky, tables
from sos_dask.report.page import Code, Page, Picture, Section, html
from sos_dask.report.style import Drawn, new_figure, render, robust_limits
from sos_dask.schema import LABELS
from sos_dask.sky.healpix import ang2pix


def plain_figure() -> Drawn:
    figure = new_figure(2.0)
    axes = figure.subplots()
    axes.plot([0, 1], [2, 3])
    axes.set_xlabel(r"$T_\mathrm{eff}$ [K]")
    return Drawn("A title", "A caption.", "An alternative.", figure)


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

cells29 = st.lists(st.integers(0, (12 << 58) - 1), max_size=60)


@given(cells29, st.integers(0, 60))
def test_sky_counts_do_not_depend_on_partitions(cells, cut):
    values = np.sort(np.array(cells, dtype=np.int64))

    def total(*parts):
        counts = np.zeros(sky.N_CELLS, dtype=np.int64)
        for part in parts:
            found, n = sky.cell_counts(part)
            assert len(set(found.tolist())) == len(found)
            counts[found] += n
        return counts

    whole = total(values)
    np.testing.assert_array_equal(whole, total(values[:cut], values[cut:]))
    assert whole.sum() == len(values)
    expected = np.bincount(values >> (2 * (29 - sky.ORDER)), minlength=sky.N_CELLS)
    np.testing.assert_array_equal(whole, expected)


@given(st.floats(0, 359.99), st.floats(-89.9, 89.9))
def test_the_projection_and_its_inverse_agree(ra, dec):
    x, y = sky.project(np.array([ra]), np.array([dec]))
    back_ra, back_dec = sky.unproject(x, y)
    assert back_dec[0] == pytest.approx(dec, abs=1e-6)
    assert (back_ra[0] - ra) * np.cos(np.deg2rad(dec)) == pytest.approx(0, abs=1e-5)


def test_the_galactic_plane_is_where_astropy_has_it():
    from astropy.coordinates import SkyCoord

    ra, dec = sky.galactic_plane()
    latitude = SkyCoord(ra, dec, unit="deg").galactic.b.deg
    np.testing.assert_allclose(latitude, 0, atol=1e-4)
    assert np.ptp(ra) > 350


def test_a_map_shows_rows_where_they_are():
    counts = np.zeros(sky.N_CELLS, dtype=np.int64)
    counts[ang2pix(np.array([90.0]), np.array([40.0]), sky.ORDER)] = 9
    rendered = render(lambda: sky.sky_figure({"one": counts, "none": np.zeros_like(counts)}))
    assert rendered is not None
    assert "one: 9 rows" in rendered.caption and "none" not in rendered.caption.split(";")[1:]
    assert render(lambda: sky.sky_figure({"none": np.zeros_like(counts)})) is None


labels = st.lists(
    st.tuples(st.floats(2000, 11000, width=32) | st.just(float("nan")), st.floats(-1, 6, width=32)),
    max_size=40,
)


@given(labels, st.integers(0, 40))
def test_counts_on_the_plane_do_not_depend_on_partitions_and_lose_no_row(rows, cut):
    teff, logg = np.array(rows, dtype=np.float32).reshape(-1, 2).T
    cells = planes.cells_of(teff, logg)
    whole = planes.histogram(cells)
    parts = [
        planes.histogram(planes.cells_of(teff[s], logg[s])) for s in (np.s_[:cut], np.s_[cut:])
    ]
    np.testing.assert_array_equal(whole.counts, parts[0].counts + parts[1].counts)
    assert whole.n_outside == parts[0].n_outside + parts[1].n_outside
    n_null = int(np.isnan(teff).sum())
    assert whole.counts.sum() + whole.n_outside + n_null == len(teff)
    centre_teff, centre_logg = planes.plane_centres()
    inside = cells >= 0
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
    figure = front_figure(dict.fromkeys(LABELS, entry), 4000).figure
    for axes in figure.axes:
        marked = [line for line in axes.lines if line.get_marker() == "D"]
        places = [np.asarray(line.get_xydata()).tolist() for line in marked]
        assert places == [[[3.0, pytest.approx(0.4 / 3)]]]


# --- words and tables ---------------------------------------------------------------------------


def test_numbers_have_the_digits_of_their_unit():
    assert number(-37.89, "teff", sign=True) == "−37.9"
    assert number(0.06941, "logg") == "0.0694"
    assert number(None, "feh") == number(float("nan"), "feh") == "–"


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
    gains = headline.gains(METRICS, "boosted")
    assert [gain.label for gain in gains] == ["Teff", "log g", "[Fe/H]"]
    assert gains[0].before == "2" and gains[0].after == "1" and gains[0].share == "−50 %"
    assert gains[1].after == "1.000" and gains[1].n == "500"
    table = tables.metrics(METRICS, "polynomial")
    assert {table.rows[i][1] for i in table.strong} == {"polynomial"}
    assert len(table.rows) == 6


def test_the_worst_bin_is_found_among_those_with_enough_pairs():
    rows = [
        {"label": "teff", "against": "logg", "binning": "equal-width", "subset": "all",
         "sample": sample, "method": "boosted", "low": low, "high": low + 1, "n": n,
         "median": median, "error": 1.0}
        for sample, low, n, median in (
            ("after", 0.0, 900, 2.0), ("after", 1.0, 900, -7.0), ("after", 2.0, 30, 99.0),
            ("fitted", 3.0, 900, 50.0),
        )
    ]  # fmt: skip
    (note,) = headline.worst_bins(pa.Table.from_pylist(rows), "boosted")
    assert "−7.0" in note and "log g 1 to 2" in note and "99" not in note and "50" not in note
    assert headline.worst_bins(pa.Table.from_pylist(rows), "hybrid") == []


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
    found = tables.comparison(comparison(), "boosted", "sparse")
    assert len(found.rows) == 3 * (2 * 2 + 1), "none has no training pairs of its own"
    row = next(r for r in found.rows if r[:3] == ("Teff [K]", "boosted", "test"))
    assert row[3] == "700" and row[5] == "30.0\n[27.0, 33.0]" and row[8].endswith("± 0.3")
    assert tables.subsets(comparison()) == ["all", "sparse", "teff > 7000"]
    rendered = render(lambda: comparison_figure(comparison(), "boosted"))
    assert rendered is not None and "sparse 700" in rendered.caption
    assert render(lambda: comparison_figure(comparison().slice(0, 0), "boosted")) is None


def test_rows_that_fail_cuts_are_counted_and_shares_are_of_all_rows():
    table = tables.cuts("lamost", 200, 150, [tables.CutCount("snr", "snrg >= 20", 50)])
    assert table.rows == (
        ("snr", "snrg >= 20", "50", "25.00 %"), ("all cuts", "rows that fail any", "50", "25.00 %"),
    )  # fmt: skip


def test_text_of_users_is_escaped_on_the_page():
    evil = "<script>alert(1)</script>"
    rendered = render(plain_figure)
    assert rendered is not None
    picture = Picture("p", evil, evil, f'" onload="{evil}', rendered.png)
    table = tables.Table(evil, (evil,), ((evil,),))
    section = Section("s", evil, evil, (picture, table), (Code(evil, evil),))
    text = html(Page(evil, evil, [], evil, [evil], [section, Section("empty", "nothing")], "1"))
    assert "<script" not in text and 'onload="' not in text
    assert "nothing" not in text
    assert (
        f'width="{picture.size[0]}"' in text and picture.size == (1278, 360) and picture.share == 1
    )


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
    (note,) = headline.of_intervals(pa.Table.from_pylist(rows))
    assert note.replace("\u00a0", " ") == (
        "Intervals that hold fewer held-out pairs than they say: log g, [Fe/H] > 0.2: 50 % instead "
        "of 68 % (n = 182); Teff, log g < 1: 84 % instead of 95 % (n = 44)."
    )
    assert headline.of_intervals(pa.Table.from_pylist(rows[:1])) == []
    many = [rows[1] | {"coverage": 0.5 + i / 100, "high": 0.6} for i in range(9)]
    assert headline.of_intervals(pa.Table.from_pylist(many))[0].endswith("; and 4 more.")

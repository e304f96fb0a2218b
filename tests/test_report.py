"""Kernels of the report: counts, projections, formulas, tables, the same bytes again."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import Normalize
from matplotlib.mathtext import MathTextParser

from sos_dask.report import maps, page
from sos_dask.report.figures import comparison_figure, formula_lines, front_figure, trend_figure
from sos_dask.report.page import Build, Picture, Table, html
from sos_dask.report.style import Drawn, listed, new_figure, number, render, robust_limits
from sos_dask.schema import LABELS
from sos_dask.sky.healpix import ang2pix
from sos_dask.storage.manifest import Manifest, Recipe, Rows

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


def spot(axes) -> tuple[float, float]:
    """Place of the middle of all that a map shows: right ascension and declination."""
    image = axes.collections[0]
    picture: np.ndarray = np.ma.filled(np.ma.asarray(image.get_array()), np.nan)
    east, north = np.rad2deg(np.moveaxis(image.get_coordinates(), -1, 0))  # as it is drawn
    shown = np.isfinite(picture)
    x = 0.5 * (east[:-1, :-1] + east[1:, 1:])[shown]
    y = 0.5 * (north[:-1, :-1] + north[1:, 1:])[shown]
    label = axes.xaxis.get_major_formatter()(np.deg2rad(x.mean()), 0)
    ra = 180 - x.mean()
    assert float(label.removesuffix("°")) == round(ra), "what is written at the axis"
    return ra, y.mean()


@pytest.mark.parametrize("place", [(90.0, 40.0), (250.0, -20.0), (181.0, 65.0), (30.0, 1.0)])
def test_a_map_shows_rows_where_they_are(place):
    counts = np.zeros(maps.N_SKY, dtype=np.int64)
    ra, dec = place
    counts[ang2pix(np.array([ra]), np.array([dec]), maps.ORDER)] = 9
    drawn = maps.sky_figure({"one": counts, "none": np.zeros_like(counts)})
    assert drawn is not None and drawn.facts["rows"] == {"one": 9}
    assert drawn.facts["order"] == maps.ORDER
    shown_ra, shown_dec = spot(drawn.figure.axes[0])
    cell = float(np.rad2deg(np.sqrt(4 * np.pi / maps.N_SKY)))
    assert abs(shown_ra - ra) * np.cos(np.deg2rad(dec)) < 0.75 * cell
    assert abs(shown_dec - dec) < 0.75 * cell
    assert maps.sky_figure({"none": np.zeros_like(counts)}) is None


def test_the_galactic_plane_is_where_astropy_has_it():
    from astropy.coordinates import SkyCoord

    axes = new_figure(2.0).subplots(subplot_kw={"projection": "mollweide"})
    maps.sky_map(axes, np.ones(12), 0, Normalize(0, 1))
    x, dec = np.rad2deg(axes.lines[0].get_xydata()).T
    ra = 180 - x  # right ascension grows to the left of 180 degrees in the middle
    assert (np.diff(x) >= 0).all(), "one line, which does not cross the map to come back"
    assert ra.min() < 1.1 and ra.max() > 358.9
    plane = SkyCoord(ra, dec, unit="deg").galactic
    assert np.abs(plane.b.deg).max() < 1e-4
    longitude = np.sort(plane.l.deg)
    assert np.diff(longitude, append=longitude[0] + 360).max() < 1, "all around the sky"
    # The centre of the Galaxy, by itself: Sgr A* is at 17h 45m 40s, -29 degrees.
    near = np.argmin(np.hypot(ra - 266.405, dec + 28.936))
    assert ra[near] == pytest.approx(266.405, abs=0.5) and dec[near] == pytest.approx(
        -28.9, abs=0.5
    )


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


def test_rows_that_fail_cuts_are_counted_and_shares_are_of_all_rows():
    given = {
        "fibers": {"bit": 3, "column": "fibermask", "max": 0, "null_passes": True},
        "snr": {"bit": 0, "column": "snrg", "min": 20.0},
        "unused": {"bit": 7, "column": "flag", "bits_unset": [2, 4]},
    }
    recipe = Recipe("ingest", 1, {"settings": {"survey": {"cuts": given}}}, {})
    summary = {"fail_cut": {"snr": 50, "fibers": 1}, "pass_all_cuts": 150}
    # 10 rows were rejected: shares are of the 200 that are in the catalog.
    found = page.cuts(Manifest(recipe, Rows(210, 200, 10), (), summary))
    assert found.headers == ("cut", "a row passes if", ">rows that fail", ">share")
    assert found.rows == (
        ("snr", "snrg >= 20", "50", "25.0 %"),
        ("fibers", "fibermask <= 0 or null", "1", "0.5 %"),
        ("unused", "flag bits 2, 4 unset", "0", "0.0 %"),
        ("all cuts", "rows that fail any", "50", "25.0 %"),
    )
    assert found.strong == {3}
    none = page.cuts(Manifest(Recipe("ingest", 1, {}, {}), Rows(7, 7), (), {"pass_all_cuts": 7}))
    assert none.rows == (("all cuts", "rows that fail any", "0", "0.0 %"),)


def page_with(folder: Path, kind: str, file: str, table: pa.Table) -> tuple[dict, str]:
    """Tables and text of the page of a build with one table, where ``boosted`` was chosen."""
    (folder / kind).mkdir(parents=True)
    pq.write_table(table, folder / kind / file)
    summaries = {kind: {}, "comparison": {"method": "boosted"}}
    made = {name: Manifest(Recipe(name, 1, {}, {}), Rows(0, 0), (), of)
            for name, of in summaries.items()}  # fmt: skip
    build = Build({"comparison": folder, kind: folder / kind}, made)
    tables = page.tables(build, {}, {}, {})
    text = html(build, {}, tables, job="j", job_text="", version="1")
    return tables, text.replace("&nbsp;", " ")


def test_the_worst_bin_is_that_of_the_chosen_method_on_all_test_pairs(tmp_path):
    def row(label, value, **other):
        known = {"method": "boosted", "sample": "test", "subset": "all", "statistic": "worst_bin"}
        return {**known, "label": label, "value": value, "low": None, "high": None, "error": 0.3,
                "n": 900, "against": "logg", "bin_low": 1.0, "bin_high": 2.0, **other}  # fmt: skip

    wrong = [
        row("teff", 99.0, method="polynomial"), row("teff", 98.0, sample="train"),
        row("teff", 97.0, subset="sparse"), row("teff", 96.0, statistic="rms_binned"),
        row("teff", 95.0, method="none"), row("rv", 94.0), row("logg", None, n=3, against=None),
    ]  # fmt: skip
    mine = [row("feh", 0.25), row("teff", -7.0, error=None)]
    table = pa.Table.from_pylist([*wrong, *mine])
    found, text = page_with(tmp_path, "comparison", "comparison.parquet", table)
    assert found["worst"] == mine[::-1], "by label, as the problem has them"
    assert (
        "Largest binned median that is left, of held-out pairs: Teff −7.0 K at log g 1 to 2 "
        "(n = 900); [Fe/H] 0.2500 ± 0.3000 dex at log g 1 to 2 (n = 900)."
    ) in text
    assert set(found["comparison"]) == {"all", "sparse"}


def hit_rates(given) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"label": label, "subset": subset, "level": level, "n": n, "hit_rate": rate,
             "low": rate - 0.02, "high": rate + 0.02}
            for label, subset, level, n, rate in given
        ]
    )  # fmt: skip


def test_intervals_that_hold_less_than_they_say(tmp_path):
    rows = [
        ("teff", "all", 0.68, 1000, 0.67),
        ("teff", "logg < 1", 0.95, 44, 0.84),
        ("logg", "feh > 0.2", 0.68, 182, 0.5),
        ("feh", "dense", 0.68, 1000, 0.8),
        ("feh", "feh < -2", 0.68, 0, 0.0),
    ]
    short = page.short_intervals(hit_rates(rows))
    names = ("label", "subset", "level", "n", "hit_rate")
    assert [tuple(row[name] for name in names) for row in short] == [rows[2], rows[1]]
    assert page.short_intervals(hit_rates(rows[:1])) == []

    def said(rows) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        tables, text = page_with(folder, "uncertainty", "calibration.parquet", hit_rates(rows))
        assert tables["short"] == page.short_intervals(hit_rates(rows))
        return text

    assert (
        "<li>Intervals that contain fewer held-out pairs than they state: log g, [Fe/H] &gt; 0.2: "
        "50 % instead of 68 % (n = 182); Teff, log g &lt; 1: 84 % instead of 95 % (n = 44).</li>"
    ) in said(rows)
    assert "Intervals that contain fewer" not in said(rows[:1])
    many = said([("teff", "all", 0.95, 500 + i, 0.5 + i / 100) for i in range(9)])
    assert "(n = 504); and 4 more.</li>" in many
    assert all((f"(n = {500 + i})" in many) == (i < 5) for i in range(9))
    five = said([("teff", "all", 0.95, 500 + i, 0.5 + i / 100) for i in range(5)])
    assert "(n = 504).</li>" in five and "more.</li>" not in five


class Hostile:
    """Makes hostile texts, each with the place where it is put, and remembers all of them."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def __call__(self, place: str) -> str:
        self.places.append(place)
        return f"<script>alert('{place}')</script>\" onload=\"{place}"

    @staticmethod
    def escaped(place: str) -> str:
        return f"&lt;script&gt;alert(&#39;{place}&#39;)&lt;/script&gt;&#34; onload=&#34;{place}"


def hostile_build(evil: Hostile) -> Build:
    """A build whose names, settings and summaries are all hostile."""
    method, target = evil("method"), evil("target")
    summaries: dict[str, dict] = {
        "evidence": {"problem": {"labels": [{"name": "teff", "unit": evil("unit")}]}},
        "comparison": {"method": method, "why": f"x{evil('why')}", "rule": evil("rule")},
        "coverage": {
            "meaning": {"coverage": evil("meaning"), "inside": evil("inside")},
            "warnings": [evil("warning")],
        },
    }
    names = (f"{target}.observations", f"{evil('reference')}.observations", f"{target}.corrected",
             "pairs", f"model.{method}", *summaries)  # fmt: skip
    found = {
        name: Manifest(Recipe(name, 1, {}, {}), Rows(7, 7), (), summaries.get(name, {}))
        for name in names
    }
    return Build(dict.fromkeys(found, Path()), found)


def hostile_facts(evil: Hostile) -> dict[str, dict]:
    """What the captions of all figures say."""
    return {
        "sky": {"order": 6, "degrees": 0.9, "rows": {evil("fact_sky"): 1}},
        "trends-x": {
            "n": {"before": 1, "after": 1, "fitted": 1},
            "method": evil("fact_method"),
            "clipped": True,
        },
        "references-x": {"significant": evil("fact_beyond"), "judged": 2, "common": 3},
        "comparison": {"pairs": {evil("fact_comparison"): 1}},
        "correction": {
            "n_before": 1, "n_after": 1, "at": {evil("fact_at"): 1.0}, "has_errors": True
        },
        "kiel": {"known": 1, "before": 7, "after": 0},
        "formulas": {"complexity": {evil("fact_complexity"): 1}, "n_sample": 1},
        "formula-fronts": {"n_judge": 1},
        "calibration": {"pairs": {evil("fact_calibration"): 1}},
        "coverage": {
            "order": 5, "n": 3, "rows": {"inside": 1, evil("fact_class"): 2},
            "steps": {"teff": 250.0, "logg": evil("fact_step")},
        },
        "coverage-growth": {
            "n_bins": 1, "n_pairs": 1,
            "worse": {"n_bins": evil("fact_worse"), "n_pairs": 1, "distance": evil("fact_far")},
        },
        "projection": {
            "parameters": [evil("fact_parameter")], "n_scored": 1, "group": 2, "n_without": 1,
            "n_not_asked": 1,
        },
        "generalisation": {"pairs": {evil("fact_generalisation"): 1}},
    }  # fmt: skip


def hostile_tables(evil: Hostile) -> dict[str, object]:
    def bad(name: str) -> Table:
        return Table((evil(f"head_{name}"),), ((evil(f"cell_{name}"),),))

    plain = ("account", "inputs", "products", "software", "agreements", "follow_up",
             "artifacts", "outside", "hit_rates")  # fmt: skip
    # The first table of a kind is open, others are folded.
    several = {
        kind: {evil(f"{kind}_{i}"): bad(f"{kind}_{i}") for i in range(2)}
        for kind in ("cuts", "comparison", "left_out")
    }
    worst = {"label": "teff", "value": 1.0, "error": 1.0, "against": evil("worst_against"),
             "bin_low": 1.0, "bin_high": 2.0, "n": 3}  # fmt: skip
    short = {"label": evil("short_label"), "subset": evil("short_subset"), "hit_rate": 0.5,
             "level": 0.68, "n": 3}  # fmt: skip
    gain = {name: evil(f"gain_{name}") for name in ("before", "after", "share")}
    disagreeing = {name: evil(name) for name in ("first", "second", "n_significant", "n_bins")}
    flag = (evil("flag"), evil("flag_rows"), evil("flag_share"))
    return {
        **{name: bad(name) for name in plain},
        **several,
        "flags": Table((evil("head_flags"), "n", "share"), (flag,)),
        "worst": [worst],
        "short": [short],
        "gains": [{"label": "teff", "n": 1, **gain}],
        "disagreeing": [disagreeing],
    }


def test_text_of_users_is_escaped_on_the_page():
    rendered = render(plain_figure)
    assert rendered is not None
    evil = Hostile()
    pictures = {
        name: Picture(evil(f"title_{number}"), facts, rendered.png)
        for number, (name, facts) in enumerate(hostile_facts(evil).items())
    }
    formulas = {"labels": {"teff": {"formula": evil("formula")}}, "features": evil("features")}
    more = {name: evil(name) for name in ("job", "job_text", "version")}
    build, tables = hostile_build(evil), hostile_tables(evil)
    text = html(build, pictures, tables, **more, formulas=formulas)
    assert "<script" not in text and 'onload="' not in text
    missing = [place for place in evil.places if Hostile.escaped(place) not in text]
    assert not missing, "all of it is on the page"
    assert len(set(evil.places)) > 80


def test_a_section_without_content_is_left_out():
    rendered = render(plain_figure)
    assert rendered is not None
    pictures = {"kiel": Picture("K", {"known": 1, "before": 7, "after": 0}, rendered.png)}
    names = ("account", "inputs", "products", "software", "worst", "short", "agreements",
             "flags", "follow_up", "artifacts", "outside", "hit_rates")  # fmt: skip
    tables = dict.fromkeys(names) | {"comparison": {}, "left_out": {}, "cuts": {}}
    tables |= dict.fromkeys(("account", "inputs", "products", "software"), Table(("a",), ()))
    tables |= {"gains": [], "disagreeing": []}
    text = html(Build({}, {}), pictures, tables, job="j", job_text="a = 1", version="1")
    assert "The correction" in text and "Trends before and after" not in text
    assert 'width="1278"' in text and pictures["kiel"].size == (1278, 360)
    assert pictures["kiel"].share == 1

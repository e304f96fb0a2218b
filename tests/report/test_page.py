"""The page: its tables, and the text of users on it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sos_dask.evidence.coverage_maps import STEPS
from sos_dask.evidence.widening import CLASSES
from sos_dask.report import page
from sos_dask.report.figures import comparison_figure
from sos_dask.report.page import Build, Picture, Table, html
from sos_dask.report.style import render
from sos_dask.schema import LABELS
from sos_dask.storage.manifest import Manifest, Recipe, Rows
from tests.report.made import UNITS, comparison, plain_figure

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


def test_the_comparison_shows_every_figure_with_its_interval():
    found = page.comparison(comparison(), UNITS, "boosted", "sparse")
    assert len(found.rows) == 3 * (2 * 2 + 1), "none has no training pairs of its own"
    row = next(r for r in found.rows if r[:3] == ("Teff [K]", "boosted", "test"))
    assert row[3] == "700" and row[5] == "30.0\n[27.0, 33.0]" and row[8].endswith("± 0.3")
    drawn = comparison_figure(comparison(), UNITS, "boosted")
    assert drawn is not None
    assert drawn.facts["pairs"] == {"all": 700, "sparse": 700, "Teff > 7000": 700}
    assert comparison_figure(comparison().slice(0, 0), UNITS, "boosted") is None


def test_failing_bins_are_shown_by_label_axis_and_band():
    counts = {"pairs all": [3, 20], "pairs snr 20-50": [0, 9], "rows all": [1, 18]}
    entries = [
        {"method": method, "label": label, "against": against, "counts": counts}
        for method in ("none", "boosted")
        for label, against in (("teff", "logg"), ("all", "all"))
    ]
    found = page.failing(entries, "boosted")
    assert found.headers == ("label by", ">pairs all", ">pairs S/N 20–50", ">rows all")
    wanted = ("3/20", "0/9", "1/18")
    assert found.rows == (("Teff by log g", *wanted), ("all by all", *wanted))
    assert found.strong == {1}


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
    tables = page.tables(build, page.of_every_page(build, {}, {}), {})
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


def test_regions_to_follow_up_are_cells_with_their_rows(current):
    maps = pq.read_table(current / "lamost.coverage" / "maps.parquet")
    table = page.follow_up(maps, STEPS["labels"], UNITS)
    regions = [row for row in maps.to_pylist() if row["map"] == "labels" and row["outside"]]
    assert len(table.rows) == min(len(regions), 10) > 0
    first, region = table.rows[0], max(regions, key=lambda row: row["outside"])
    low, high = (float(text.replace("−", "-")) for text in first[0].split(" to "))
    assert region["teff"] is not None
    assert low < region["teff"] < high and high - low == STEPS["labels"]["teff"]
    assert (
        first[3] == f"{region['outside']:,}"
        and first[4] == f"{sum(region[name] for name in CLASSES):,}"
    )


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
        "overlap": {
            "pairs": 1, "rows": 1, "bins": 40, "beyond": evil("fact_beyond_ends"),
            "bands": {evil("fact_band"): ["1 %", evil("fact_share")]},
        },
        "trends-x": {
            "n": {"before": 1, "after": 1, "fitted": 1},
            "method": evil("fact_method"),
            "clipped": True,
        },
        "references-x": {"significant": evil("fact_beyond"), "judged": 2, "common": 3},
        "comparison": {"pairs": {evil("fact_comparison"): 1}},
        "correction": {
            "n_before": 1, "n_after": 1, "at": {evil("fact_at"): 1.0}
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
             "artifacts", "outside", "hit_rates", "correlations")  # fmt: skip
    # The first table of a kind is open, others are folded.
    several = {
        kind: {evil(f"{kind}_{i}"): bad(f"{kind}_{i}") for i in range(2)}
        for kind in ("cuts", "comparison", "failing", "left_out")
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
             "flags", "follow_up", "artifacts", "outside", "hit_rates",
             "correlations")  # fmt: skip
    tables = dict.fromkeys(names) | {"comparison": {}, "failing": {}, "left_out": {}}
    tables["cuts"] = {}
    tables |= dict.fromkeys(("account", "inputs", "products", "software"), Table(("a",), ()))
    tables |= {"gains": [], "disagreeing": []}
    text = html(Build({}, {}), pictures, tables, job="j", job_text="a = 1", version="1")
    assert "The correction" in text and "Trends before and after" not in text
    assert 'width="1278"' in text and pictures["kiel"].size == (1278, 360)
    assert pictures["kiel"].share == 1

"""What is printed: tables, one JSON object, progress, text of others."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from sos_dask.cli.output import reporting, show_table
from tests.command_line import LAMOST
from tests.conftest import ROOT
from tests.job import write_job


def test_numbers_that_are_none_are_null(capsys):
    from sos_dask.cli.output import print_json

    print_json({"a": float("nan"), "b": [np.inf, 1.5], "path": Path("x"), "n": (1, "t", None)})
    assert json.loads(capsys.readouterr().out) == {
        "a": None, "b": [None, 1.5], "path": "x", "n": [1, "t", None]
    }  # fmt: skip


def test_lines_of_progress_are_few(capsys, monkeypatch):
    now = iter(range(0, 3000, 3))  # seconds, at each call
    monkeypatch.setattr("sos_dask.cli.output.time.monotonic", lambda: next(now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with reporting() as report:
        for _ in range(2):  # two steps of one name
            for done in (0, 0, *range(1, 13), 12):
                report("dedupe", done, 12)
    lines = capsys.readouterr().err.splitlines()
    half = lines[: len(lines) // 2]
    assert lines == half + half
    assert (half[0], half[-1]) == ("dedupe: 0/12", "dedupe: 12/12")
    assert half[1:-1] == ["dedupe: 3/12", "dedupe: 7/12", "dedupe: 11/12"]


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(cli, small_store, small_sky, tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    given = ["rebuild", write_job(tmp_path, small_sky), "--store", small_store]
    rebuilt = cli(*given, "-w", 0)
    others = [[*given, "--dry-run"], ["surveys"]]
    others += [[name, "--store", small_store] for name in ("status", "uncertainty")]
    shown = [rebuilt, cli("surveys", LAMOST), *(cli(*other) for other in others)]
    for ran in shown:
        assert ran.code == 0
        for line in ran.out.splitlines():
            assert len(line.rstrip()) <= width or "/" in line or "survey" in line, line
    assert re.search(r"lamost\.observations +5,000 +4,996 +0 +4 exact", rebuilt.out)
    assert re.search(r"teff \[K\] +polynomial \* +\d+ +[-+][\d.]+ +[-+][\d.]+ +[\d.]+", rebuilt.out)
    assert f"Products: {small_store / 'current'}" in rebuilt.out


def test_text_of_users_is_no_markup(cli, small_sky, tmp_path):
    """Brackets in names are shown as they are."""
    folder = tmp_path / "[bold]x[/bold]"
    folder.mkdir(parents=True)
    ran = cli(
        "ingest", "apogee-dr17", small_sky / "apogee.fits", "-o", folder / "[red]cat", "-w", 0
    )
    assert ran.code == 0
    assert ran.out.startswith(f"{folder}/[red]cat: 1,100 rows in, ")
    text = (ROOT / f"sos_dask/surveys/{LAMOST}.toml").read_text()
    text = re.sub(r"^title = .*$", 'title = "[bold]Mine[/bold] [/oops]"', text, flags=re.M)
    text = re.sub(r'reason = "Teff has a value"', 'reason = "[/red] why"', text)
    (folder / "mine.toml").write_text(text)
    shown = cli("surveys", folder / "mine.toml")
    assert shown.code == 0
    assert "[bold]Mine[/bold] [/oops]" in shown.out and "[/red] why" in shown.out


def test_a_step_prints_one_line(cli, small_store):
    ran = cli("dedupe", small_store / "current/apogee.observations", "-o", "stars", "-w", 0)
    assert ran.out == "stars: 1,099 rows in, 978 out, 121 merged\n"
    assert re.search(r"^dedupe.*: 0/\d+$", ran.err, re.M)


def test_a_table_shows_values_as_its_columns_ask(capsys, monkeypatch):
    figure = {"label": "teff", "value": -3.25, "low": -4.0, "high": -2.5, "behind_low": 0.1}
    rows = [
        {"label": "teff", "n": 12345, "x": 1.25, "share": 0.1234, "figure": figure, "why": "a [b]"},
        {"label": "feh", "n": 0, "x": None, "share": None, "figure": None, "why": "4 merged"},
        {"label": "feh", "n": 3, "x": -0.5, "x_low": -0.75, "x_high": 0.25, "why": ""},
    ]
    columns = "label n=rows x:+=median_after share:.1%=share_% figure:? why"
    lines = {}
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        show_table("Title: [x]", columns, rows)
        lines[width] = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[80][0] == "Title: [x]"
    assert re.fullmatch(r"label +rows +after +share % +figure +why", lines[80][3])
    assert re.fullmatch(
        "teff \\[K\\] +12,345 +\\+1\\.2 +12\\.3 +-3\\.2 \\+ +a \\[b\\]", lines[80][5]
    )
    assert re.fullmatch(r"feh \[dex\] +0 +- +- +- +4 merged", lines[80][6])
    assert re.fullmatch(r"feh \[dex\] +3 +-0\.5000 +- +-", lines[80][7])
    assert lines[80][8] == "-.7500, +0.2500", "two characters less, so that it fits"
    assert "-0.7500, +0.2500" in lines[120] and "-4.0, -2.5" not in lines[80]
    assert any(line.endswith("-4.0, -2.5") for line in lines[120])


def test_a_column_without_letters_is_one_of_numbers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show_table("", "a b", [{"a": "12", "b": "12 x"}, {"a": "3", "b": "3"}])
    found = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert found[-2:] == [" 12   12 x ", "  3   3    "]

"""What is shown of builds, stores, surveys and outputs."""

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sos_dask.evidence.failing import count_failing
from sos_dask.stages.compare import Compare
from sos_dask.surveys.definition import builtin_surveys
from tests.command_line import LAMOST, STAGE, Cli, assert_error, assert_shape
from tests.job import write_job

INTERVAL = r"-?[\d.]+, [\d.]+"


FIGURE = {
    "method": str, "label": str, "sample": str, "subset": str, "statistic": str, "value": object,
    "low": object, "high": object, "error": object, "n": int, "behind": object,
    "behind_low": object, "behind_high": object, "against": object, "bin_low": object,
    "bin_high": object,
}  # fmt: skip


@pytest.fixture
def store(small_store, tmp_path) -> Path:
    return Path(shutil.copytree(small_store, tmp_path / "store", symlinks=True))


def test_compare_shows_the_current_build_as_json(cli: Cli, small_store):
    ran = cli("compare", "--store", small_store, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert set(found) == {
        "path", "method", "rule", "why", "scores", "n_train", "n_test", "figures", "artifacts",
        "outside", "bins", "failing", "costs",
    }  # fmt: skip
    assert found["method"] == "polynomial" and found["rule"] == "balanced"
    table = pq.read_table(small_store / "current/lamost.comparison/comparison.parquet")
    assert found["figures"] == table.to_pylist()
    for figure in found["figures"]:
        assert set(figure) == set(FIGURE)
        if figure["value"] is not None:
            assert figure["low"] <= figure["value"] <= figure["high"], figure
    table = pq.read_table(small_store / "current/lamost.comparison/bins.parquet")
    assert found["bins"] == table.to_pylist() and found["failing"] == count_failing(table)
    cost = found["costs"]["polynomial"]
    assert_shape(cost, {"train_cpu_s": float, "train_wall_s": float})
    assert all(value > 0 for value in cost.values())


@pytest.mark.parametrize("width", [80, 140])
def test_compare_shows_tables_that_fit(cli: Cli, small_store, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    ran = cli("compare", "--store", small_store)
    assert ran.code == 0, ran.err
    for line in ran.out.splitlines():
        assert len(line.rstrip()) <= width or line.startswith("Rule "), line
    assert "…" not in ran.out
    for label in ("teff [K]", "logg [dex]", "feh [dex]"):
        assert f"{label}: target - reference of " in ran.out
    # A method on a line of its own with the marks, the intervals below.
    assert re.search(r"^none +\S+ \+ +\S+ \+", ran.out.replace("\n ", "\n"), re.M)
    assert re.search(rf"polynomial \* .*\n +{INTERVAL} +{INTERVAL}", ran.out)
    assert ("half-width" in ran.out) == (width == 140)
    for text in ("Artifacts", "Outside the overlap", "Cost", "feh < -2", "± ", "too few pairs"):
        assert text in ran.out, text
    assert "Rule 'balanced' chose polynomial: the only method." in ran.out
    # Failing bins of pairs and of rows, in one table where there is room.
    tables = re.findall(r"polynomial: failing / judged.*?\n all ", ran.out, re.S)
    assert len(tables) == (1 if width == 140 else 2)
    found = Compare.load(small_store / "current/lamost.comparison")["failing"]
    [teff] = [
        r for r in found if (r["method"], r["label"], r["against"]) == ("none", "teff", "feh")
    ]
    cells = [f"{n}/{of}" for n, of in teff["counts"].values()]
    for some in [cells] if width == 140 else (cells[:4], cells[4:]):
        assert re.search(r"teff +feh +" + " +".join(some) + r" *\n", ran.out), some
    assert "over 10 K (teff)" in ran.out


def test_compare_of_one_label_and_of_training_pairs(cli: Cli, small_store):
    ran = cli("compare", "--store", small_store, "--label", "feh", "--sample", "train")
    assert "feh [dex]" in ran.out and "training pairs" in ran.out
    assert "teff [K]" not in ran.out and "held-out pairs" not in ran.out


def test_compare_and_trends_are_single_steps_too(cli: Cli, small_store, tmp_path):
    current = small_store / "current"
    given = [current / "lamost.pairs", "polynomial"]
    train = ["train", current / "lamost.pairs", "-w", 0]
    assert cli(*train, "-m", "boosted", "-p", "n_rounds=20", "-o", "boosted").code == 0
    ran = cli("compare", current / "lamost.pairs", current / "lamost.model.polynomial", "boosted",
              "-o", "out", "-w", 0)  # fmt: skip
    assert_error(ran, 7, "boosted predicts teff, logg, feh from teff_5040, logg, feh: .*, snr\n")
    assert cli(*train, "-m", "polynomial", "-p", "order=2", "-o", "polynomial").code == 0
    ran = cli("compare", *given, "boosted", "-o", "out", "--rule", "scatter", "-w", 0, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["rule"] == "scatter" and ran.json["costs"] is None
    assert {row["method"] for row in ran.json["artifacts"]} == {"polynomial", "boosted"}
    ran = cli("trends", *given, "boosted", "-o", "trends", "-w", 0)
    assert ran.code == 0, ran.err
    assert re.search(r"label +against +before +boosted +polynomial", ran.out)
    again = cli("compare", *given, "boosted", "-o", "out", "--rule", "scatter", "-w", 0)
    assert again.code == 0 and "Cost" not in again.out


def test_trends_show_the_current_build(cli: Cli, small_store):
    ran = cli("trends", "--store", small_store)
    assert ran.code == 0, ran.err
    assert re.search(r"^ *feh +logg +[\d.]+ +[\d.]+ *$", ran.out, re.M)
    assert "K for teff, dex for logg, dex for feh. After: of held-out pairs." in ran.out
    ran = cli("trends", "--store", small_store, "--label", "feh", "--against", "logg")
    assert "feh [dex] against logg: median of target - reference" in ran.out
    assert "teff [K]" not in ran.out
    found = cli(
        "trends", "--store", small_store, "--label", "feh", "--against", "logg", "--json"
    ).json
    table = pq.read_table(small_store / "current/lamost.trends/trends.parquet").to_pylist()
    wanted = [row for row in table if (row["label"], row["against"]) == ("feh", "logg")]
    assert found["trends"] == wanted and found["agreements"]
    bins = [
        row for row in wanted
        if (row["subset"], row["binning"], row["sample"]) == ("all", "equal-width", "before")
        and row["n"]
    ]  # fmt: skip
    for row in bins:
        place = [f"{row['low']:g}..{row['high']:g}", f"{row['n']:,}", f"{row['median']:+.4f}"]
        assert re.search(" +".join(map(re.escape, place)), ran.out), place


def test_names_that_are_none(cli: Cli, small_store):
    at = ["--store", small_store]
    assert_error(cli("compare", *at, "--label", "fe"), 3, "--label 'fe' is not one of", "feh")
    assert_error(cli("compare", *at, "--sample", "tests"), 3, "--sample 'tests' is not")
    assert_error(cli("trends", *at, "--against", "colour"), 3, "--against 'colour' is not")
    assert_error(cli("trends", *at, "--method", "boosted"), 3, "--method 'boosted' is not")
    assert_error(cli("trends", *at, "--label", "x"), 3, "--label 'x' is not")


def test_stores_and_models_that_are_none(cli: Cli, small_store, store):
    current = small_store / "current"
    for name in ("compare", "trends"):
        assert_error(cli(name, "--store", "gone"), 5, "no sos-dask store at 'gone'")
        assert_error(cli(name, current / "lamost.pairs"), 3, "--out is missing")
    assert_error(cli("compare", current / "lamost.pairs", "-o", "out"), 7, "no model to compare")
    assert_error(
        cli("compare", current / "lamost.pairs", current / "reference", "-o", "out", "-w", 0),
        7, "is not a trained model",
    )  # fmt: skip
    twice = [current / "lamost.model.polynomial"] * 2
    assert_error(cli("compare", current / "lamost.pairs", *twice, "-o", "out"), 3, "both models of")
    path = (store / "current/lamost.comparison/comparison.parquet").resolve()
    path.write_bytes(path.read_bytes()[:100])
    assert_error(cli("compare", "--store", store), 5, r"comparison\.parquet has 100 bytes")
    shutil.rmtree(path.parent)
    assert_error(cli("compare", "--store", store), 5, "does not exist")


def test_other_documents(cli, small_store, small_sky, tmp_path):
    store = Path(shutil.copytree(small_store, tmp_path / "store", symlinks=True))
    shutil.rmtree(store / "logs", ignore_errors=True)  # of other tests
    job = write_job(tmp_path, small_sky, ("[train]", "[crossmatch]\nn_folds = 4\n[train]"))
    planned = cli("rebuild", job, "--dry-run", "--json").json
    assert_shape(planned, {"stages": {str: {"stage": str, "runs": bool, "why": str}}})
    assert planned["stages"]["lamost.pairs"] == {
        "stage": "crossmatch", "runs": True, "why": "n_folds 5 -> 4"
    }  # fmt: skip
    found = cli("status", "--store", store, "--json").json
    assert_shape(
        found,
        {
            "store": str, "current": str, "builds": [str], "products": {str: STAGE}, "utc": str,
            "last_run": type(None), "last_failure": type(None), "running": type(None),
            "missing": list, "unfinished": list, "bytes": int, "unused_bytes": int,
        },
    )  # fmt: skip
    assert next(iter(found["products"])) == "lamost.observations"
    (store / "artifacts/apply/123/.work").mkdir(parents=True)
    removed = cli("gc", "--store", store, "--dry-run", "--json").json
    assert removed["dry_run"] is True
    assert_shape(removed["removed"], [{"path": str, "bytes": int}])
    listed = cli("surveys", "--json").json
    assert_shape(listed, {"surveys": [{"name": str, "title": str}]})
    assert [item["name"] for item in listed["surveys"]] == builtin_surveys()
    explained = cli("surveys", LAMOST, "--json").json
    assert {"column": "teff", "unit": "K"}.items() <= explained["columns"][4].items()
    assert {cut["cut"] for cut in explained["cuts"]} >= {"snr", "teff"}
    simulated = cli("simulate", "-o", "mock", "--rows", 1000, "--json").json
    assert set(simulated["files"]) >= {"lamost", "apogee", "galah", "truth"}
    assert all(Path(file).is_file() for file in simulated["files"].values())


def test_uncertainty_shows_what_was_checked(cli, small_store, tmp_path):
    ran = cli("uncertainty", "--store", small_store)
    assert ran.code == 0, ran.err
    for text in (
        "Held-out pairs inside their interval",
        "sparse cells",
        "Quoted errors by repeats",
    ):
        assert text in ran.out
    found = cli("uncertainty", "--store", small_store, "--json").json
    share = {"hit_rate": float, "low": float, "high": float}
    one = {"label": str, "subset": str, "level": float, "n": int, **share}
    assert_shape(found["hit_rates"], [one])
    assert {"path", "method", "factors_95", "error_factors"} <= set(found)
    assert set(found["error_factors"]) == {"lamost", "apogee", "galah"}
    assert_error(cli("uncertainty", "--store", tmp_path), 5, "no sos-dask store at")


def test_verify_takes_a_build(cli, small_store):
    ran = cli("verify", small_store / "current")
    assert ran.code == 0
    assert ran.out.count("no problem found") == len(ran.out.splitlines()) >= 9
    for product in (
        "lamost.corrected",
        "lamost.model.polynomial",
        "lamost.comparison",
        "lamost.uncertainty",
    ):
        assert f"{small_store}/current/{product}: " in ran.out
    assert cli("verify", small_store).out == ran.out
    each = cli("verify", *sorted((small_store / "current").iterdir()))
    assert sorted(each.out.splitlines()) == sorted(ran.out.splitlines())
    assert each.code == 5
    assert "current/build.json is a file: a directory" in each.err


def test_verify_reads_models(cli, small_store, tmp_path):
    shutil.copytree(small_store / "current/lamost.model.polynomial", tmp_path / "model")
    with (tmp_path / "model/held_out.parquet").open("ab") as file:
        file.write(b"x")
    ran = cli("verify", "gone", "model")
    assert ran.code == 5 and "held_out.parquet has " in ran.out
    assert "gone does not exist" in ran.err

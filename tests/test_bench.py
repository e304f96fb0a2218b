"""The benchmarks run, and say what they promise, on a sky of a few thousand rows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sos_dask.schema import LABELS
from sos_dask.storage.catalog import Catalog
from tests.bench import products, promises
from tests.bench.__main__ import main
from tests.bench.book import Book, markdown
from tests.bench.measure import ROOT, Part, Usage, measure, tail
from tests.bench.plan import Measured, plan, report
from tests.bench.steps import STEPS
from tests.skies import observations, write_catalog

ROWS = 3000
USAGE = {"wall_s", "cpu_s", "rss_gib", "anon_gib", "process_gib", "worker_gib", "state", "parts"}


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """What a run of our side and the k-d tree says; without workers, which start slowly."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "tests.bench", "--rows", ROWS, "--out", out, "--workers", 0]
    command += ["--steps", "crossmatch,dedupe", "--peers", "scipy"]
    run = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (out / "bench.md").read_text().count("**sos-dask**") == 3
    return json.loads((out / "bench.json").read_text())


def test_entries_have_the_promised_keys(entries):
    keys = {"step", "rows", "ours", "peer", "theirs", "ratio_cpu", "ratio_wall"}
    assert [(e["step"], e["variant"], e["peer"]) for e in entries] == [
        ("crossmatch", "", None),
        ("crossmatch", "", "scipy: keys only"),
        ("crossmatch", "Gaia ids and motions", None),
        ("dedupe", "", None),
        ("dedupe", "", "scipy"),
    ]
    for entry in entries:
        assert keys <= set(entry) and entry["rows"] == ROWS
        sides = [entry["ours"]] + ([entry["theirs"]] if entry["peer"] else [])
        for usage in sides:
            assert set(usage) >= USAGE
            assert usage["state"] == "done"
            assert 0.05 < usage["cpu_s"] < 60 and 0.05 < usage["wall_s"] < 60
            assert 0.02 < usage["process_gib"] <= usage["rss_gib"] < 4
        if entry["peer"]:
            cpu = entry["theirs"]["cpu_s"] / entry["ours"]["cpu_s"]
            assert entry["ratio_cpu"] == pytest.approx(cpu, abs=0.02)
        else:
            assert entry["theirs"] is entry["ratio_cpu"] is entry["ratio_wall"] is None
            assert entry["ours"]["parts"][0]["name"] == "start"


def test_the_programs_agree(entries):
    pairs = next(e for e in entries if e["step"] == "crossmatch" and e["peer"])
    assert pairs["same_result"] and pairs["pairs"] == pairs["their_pairs"] > 200
    ours = next(e for e in entries if e["step"] == "dedupe" and not e["peer"])
    theirs = next(e for e in entries if e["step"] == "dedupe" and e["peer"])
    assert ours["stars"] == pytest.approx(theirs["stars"], abs=10)
    assert ours["stars"] == pytest.approx(ours["true_stars"], abs=10)


def test_the_whole_tree_is_measured(tmp_path):
    """Time and memory of a child of a child, even of one whose parent is gone, are counted."""
    child = (
        "import time\nblock = bytearray(300 << 20)\nend = time.process_time() + 0.5\n"
        "while time.process_time() < end: pass\n"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    usage = measure([sys.executable, "-c", parent], tmp_path / "log")
    assert usage.state == "done"
    assert 0.5 < usage.cpu_s < 5.0
    assert usage.worker_gib > 0.29 and usage.rss_gib > 0.29
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    waits = f"import time\n{orphan}\ntime.sleep(2)"
    assert measure([sys.executable, "-c", waits], tmp_path / "log").cpu_s > 0.5


def test_a_peer_is_stopped_at_its_limit(tmp_path):
    code = "import time\nprint('begins')\ntime.sleep(60)"
    usage = measure([sys.executable, "-c", code], tmp_path / "log", limit_s=0.5)
    assert usage.state == "stopped" and usage.wall_s < 5
    assert "begins" in tail(tmp_path / "log")
    book = Book(tmp_path)
    book.add("ingest", "", 1000, Usage(0.1, 0.1, 0.1))
    book.add("ingest", "", 1000, Usage(0.1, 0.1, 0.1), "slow", usage)
    assert "| >" in (tmp_path / "bench.md").read_text()


def test_a_failure_is_shown_and_gives_no_ratio(tmp_path):
    usage = measure([sys.executable, "-c", "raise SystemExit('no luck')"], tmp_path / "log")
    assert usage.state == "failed" and "no luck" in tail(tmp_path / "log")
    book = Book(tmp_path)
    book.add("apply", "", 1000, Usage(1.0, 1.0, 0.1), "broken", usage)
    assert book.entries[0]["ratio_cpu"] is None
    assert "failed" in markdown(book.entries)


def test_a_second_run_replaces_its_entries(tmp_path):
    for cpu_s in (1.0, 2.0):
        book = Book(tmp_path)
        book.add("apply", "", 1000, Usage(1.0, cpu_s, 0.1))
        book.add("apply", "", 2000, Usage(1.0, cpu_s, 0.1))
    kept = json.loads(Path(tmp_path / "bench.json").read_text())
    assert [(e["rows"], e["ours"]["cpu_s"]) for e in kept] == [(1000, 2.0), (2000, 2.0)]


@pytest.mark.parametrize("text", ["{", "[{}]", '[{"step": "apply"}]', "[1]", "driver_gib"])
def test_results_of_another_version_are_refused(tmp_path, monkeypatch, capsys, text):
    """Before anything is measured: tables are made of the entries of all runs."""
    if text == "driver_gib":
        usage = Usage(1.0, 1.0, 0.1, parts=(Part("start", 0, 1.0, 1.0, 0.1, 0.1, 0.1),))
        Book(tmp_path).add("apply", "", 1000, usage)
        Book(tmp_path)
        text = (tmp_path / "bench.json").read_text().replace("driver_gib", "master_gib")
    (tmp_path / "bench.json").write_text(text)
    monkeypatch.setattr("sys.argv", ["bench", "--rows", "1000", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "bench.json is not of this version" in said and "choose another folder" in said
    assert (tmp_path / "bench.json").read_text() == text


def test_the_plan_grows_with_the_rows():
    few, many = (plan(rows, Measured()) for rows in (2e7, 2e9))
    by_name = {stage.name: stage for stage in few}
    for stage in many:
        assert stage.tasks >= by_name[stage.name].tasks
        before = by_name[stage.name]
        assert stage.cpu_s + stage.driver_s > before.cpu_s + before.driver_s
    text = "\n".join(report(1e8, 2, Measured()))
    assert "| apply |" in text and "What binds first" in text


def test_all_steps_are_documented():
    assert all(step.__doc__ for step in STEPS.values())


@pytest.fixture
def builds(tmp_path):
    """Two builds of one catalog each, under an old and a new name."""
    found = []
    for build, name in (("old", "pairs"), ("new", "lamost.pairs")):
        folder = tmp_path / build / name
        folder.mkdir(parents=True)
        stated = {"products": {name: "x"}}
        (tmp_path / build / "build.json").write_text(json.dumps(stated))
        (folder / "manifest.json").write_text(json.dumps({"rows": {"in": 3}, "files": {}}))
        (folder / "model.json").write_text(json.dumps({"by": "ab" * 32, "slope": 1.0}))
        rows = {"star_id": [3, 1, None], "teff": [5000.0, None, 6000.0], "teff_err": [50.0] * 3}
        pq.write_table(pa.table(rows), folder / "rows.parquet")
        found.append(folder)
    return found


def compared(builds, capsys) -> tuple[int, list[str]]:
    status = products.main([str(folder.parent) for folder in builds])
    return status, capsys.readouterr().out.splitlines()


def test_equal_products_under_another_name(builds, capsys):
    assert compared(builds, capsys) == (0, ["pairs -> lamost.pairs: same bytes"])


def test_differences_of_products_are_named_with_their_place(builds, capsys):
    new = builds[1]
    rows = {"star_id": [1, None, 4], "teff": [None, 6025.0, 4000.0], "teff_err": [50.0] * 3}
    pq.write_table(pa.table(rows), new / "rows.parquet")
    (new / "model.json").write_text(json.dumps({"by": "cd" * 32, "slope": 2.0}))
    (new / "manifest.json").write_text(json.dumps({"rows": {"in": 4}, "files": {}}))
    status, lines = compared(builds, capsys)
    assert status == 1 and lines == [
        "pairs -> lamost.pairs: differs",
        "    model.json: 1 of 2 numbers differ, most by 0.5 of itself: slope = 1.0 -> 2.0",
        "    rows.parquet: 1 of 3 rows only old, as star_id=3",
        "    rows.parquet: 1 of 3 rows only new, as star_id=4",
        "    rows.parquet: teff: largest difference 25 (6000 -> 6025) at a row without a key, "
        "1 of 2 rows, at most 0.5 of its error",
        "    manifest, rows: 1 of 1 numbers differ, most by 0.25 of itself: in = 3 -> 4",
    ]


def test_a_product_of_one_side_is_named(builds, capsys):
    stated = {"products": {"lamost.stars": "x"}}
    (builds[1].parent / "build.json").write_text(json.dumps(stated))
    assert compared(builds, capsys) == (1, ["pairs: only old", "lamost.stars: only new"])


def labelled(n: int, noise: float, **more) -> promises.Rows:
    """Rows of normal true labels with normal errors, as `promises.read` gives them."""
    rng = np.random.default_rng(1)
    size = dict(zip(LABELS, (400.0, 0.5, 0.4), strict=True))
    rows = {"snr": np.full(n, 40.0), "flag": np.zeros(n, int), "true_star": rng.integers(0, n, n)}
    rows |= {"true_is_outlier": np.zeros(n, bool), "true_is_avoided": np.zeros(n, bool)}
    for name, middle in zip(LABELS, (5500.0, 3.0, -0.3), strict=True):
        rows[f"true_{name}"] = middle + size[name] * rng.normal(size=n)
        rows[name] = rows[f"true_{name}"] + noise * size[name] * rng.normal(size=n)
        rows[f"{name}_sos"] = rows[name].copy()
        rows[f"{name}_err"] = rows[f"{name}_sos_err"] = np.full(n, noise * size[name])
        rows[f"true_bias_{name}"] = np.zeros(n)
    return rows | more


def test_a_bin_fails_that_is_off_by_more_than_is_allowed():
    rng = np.random.default_rng(0)
    by = rng.uniform([4000.0, 1.0, -1.0], [6000.0, 5.0, 0.0], (60_000, 3))
    error = rng.normal(0.0, [20.0, 0.05, 0.03], by.shape)
    snr = rng.choice([30.0, 200.0], len(by))
    error[(by[:, 0] >= 5000.0) & (by[:, 0] < 5250.0) & (snr < 50.0), 0] += 12.0
    failing = {(x["snr"], x["label"], x["by"]): x for x in promises.trends(by, error, snr)}
    found = {name: row["failing"] for name, row in failing.items() if row["failing"]}
    assert found == {("20-50", "teff", "teff"): 1}
    assert failing["20-50", "teff", "teff"]["worst"][0][0] == 5000.0
    assert failing["50-100", "teff", "teff"]["bins"] == 0


def test_the_bound_is_what_noise_must_leave(monkeypatch):
    """Of normal labels and errors the best correction shrinks by s^2 / (S^2 + s^2)."""
    monkeypatch.setattr(promises, "_N_ROUNDS", 40)
    rows = labelled(20_000, 0.7)
    corrected = promises.noise_alone(rows)
    for place, name in enumerate(LABELS):
        removed = rows[name] - corrected[:, place]
        slope = np.polyfit(rows[name], removed, 1)[0]
        assert slope == pytest.approx(0.49 / 1.49, abs=0.03)
        left = np.std(corrected[:, place] - rows[f"true_{name}"])
        best = np.sqrt(0.49 / 1.49) * np.std(rows[f"true_{name}"])
        assert left == pytest.approx(best, rel=0.03)


def test_errors_outside_and_inside():
    rows = labelled(6000, 0.5)
    rows["flag"] = np.repeat([0, 8, 16], 2000)
    rows["feh_sos"] = rows["feh"] + 0.5
    found = {(x["class"], x["snr"], x["label"]): x for x in promises.errors(rows)}
    assert found["inside", "all", "teff"]["hit"] == pytest.approx(0.683, abs=0.03)
    assert found["sparse", "20-50", "teff"]["pull"] == pytest.approx(1.0, abs=0.06)
    assert found["outside", "all", "logg"]["n"] == 2000
    assert promises.own_errors(rows, ()) == [], "no bright rows that tell of the bias"
    worse = {(x["kind"], x["label"]) for x in promises.outside(rows) if x["worse"]}
    assert ("rest", "feh") in worse and not [x for x in worse if x[1] != "feh"]
    rows["true_is_avoided"] = rows["flag"] > 0
    shares = promises.coverage(rows)
    assert shares["avoided_outside_or_sparse"] == 1.0 and shares["others_outside"] == 0.0


def test_own_errors_are_those_of_the_noise_about_the_bias():
    rows = labelled(40_000, 0.2)
    rows["snr"][::2] = 150.0
    at_low_snr = 1.0 + (rows["snr"] < 100.0)
    for name in LABELS:
        rows[name] += 0.1 * rows[f"true_{name}"]
        rows[f"{name}_err"] = rows[f"{name}_err"] / at_low_snr
    rows["true_is_outlier"][:4000] = True
    rows["feh"][:4000] += 3.0
    factor = {"label": "feh", "kind": "all", "n": 10**6, "mean_snr": None, "factor": 2.0}
    found = promises.own_errors(rows, [factor])
    assert {(x["kind"], x["snr"]) for x in found} >= {("all", 30.0), ("dwarf", 100.0)}
    for one in [x for x in found if x["n"] > 2000]:
        assert one["stated"] == pytest.approx(2.0 if one["snr"] == 30.0 else 1.0, rel=0.08)
        times = 2.0 if one["label"] == "feh" else 1.0
        assert one["normalised"] == pytest.approx(one["stated"] / times)


def test_a_velocity_that_is_off_is_seen(tmp_path):
    table = observations(8000).append_column("use", pa.array(np.ones(8000, bool)))
    pairs = write_catalog(table, tmp_path / "pairs")
    rows = {name: table[name].to_numpy() for name in ("snr", "teff")}
    rng = np.random.default_rng(2)
    offset = np.full(8000, -4.5)
    rows |= {"flag": np.zeros(8000, int), "true_rv": rng.normal(size=8000), "true_bias_rv": offset}
    rows["rv_delta"] = offset + 0.1 * ((rows["teff"] >= 5000.0) & (rows["teff"] < 5250.0))
    rows["rv_sos"] = rows["true_rv"] + rng.normal(0.0, 2.0, 8000)
    found = {(x["by"], x["what"]): x for x in promises.velocity(rows, pairs)}
    seen = found["teff", "predicted - injected"]
    assert seen["failing"] == 1 and seen["worst"][:2] == pytest.approx([5000.0, 0.1])
    assert found["snr", "predicted - injected"]["failing"] == 0
    assert found["snr", "corrected - true"]["failing"] == 0, "noise of a mean is no failure"


def test_the_promises_of_a_store(small_store, small_sky, monkeypatch):
    monkeypatch.setattr(promises, "_N_ROUNDS", 10)
    found = promises.promises(small_store, small_sky / "truth.parquet", right=False)
    corrected = Catalog.open(small_store / "current" / "lamost.corrected")
    assert 0.5 * corrected.n_rows < found["rows"] < corrected.n_rows
    assert "rv" not in found
    assert 0.01 < found["coverage"]["avoided"] < 0.04
    lines = list(promises.text(json.loads(json.dumps(found)), 2))
    for title in ("(a)", "(b)", "(c)", "(d, f)", "(e)"):
        assert sum(line.startswith(title) for line in lines) == 1
    right = promises.promises(small_store, small_sky / "truth.parquet", right=True)
    assert right["rows"] < found["rows"]

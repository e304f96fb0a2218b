"""The report of a whole store: complete, self-contained, the same again, and in a real browser."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sos_dask.correct import FLAG_OUTSIDE, FLAGS
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.evidence.projection import ProjectionSettings
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.rebuild.plan import plan
from sos_dask.report import page
from sos_dask.report.figures import (
    left_out_figure,
)
from sos_dask.report.style import (
    render,
)
from sos_dask.stages import report as stage
from sos_dask.stages.projection import ProjectionStage, load_projection
from sos_dask.stages.report import (
    PAGE,
    ReportSettings,
    ReportStage,
    figures,
    of_build,
)
from sos_dask.stages.train import GeneralisationSettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.store import read_build
from tests.job import contents
from tests.report.made import UNITS, drawn
from tests.services import require
from tests.steps import generalisation, report

FIGURES = {
    "sky",
    "overlap",
    "trends-polynomial",
    "trends-more",
    "references-apogee-galah",
    "correction",
    "kiel",
    "comparison",
    "calibration",
    "coverage",
    "coverage-growth",
}


SETTINGS = ReportSettings(
    job="small", job_text="a = 1  # <b>", software={"sos-dask": "0", "numpy": "1"}
)


VOID = {"meta", "link", "img", "br", "hr", "input"}


@pytest.fixture(scope="module")
def products(small_store) -> dict[str, Path]:
    current = small_store / "current"
    return {
        name: current / name
        for name in json.loads((current / "build.json").read_text())["products"]
    }


@pytest.fixture(scope="module")
def made(products, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("report") / "out"
    report(products, folder, SETTINGS)
    return folder


class Reader(HTMLParser):
    """Checks that elements close in order, and collects what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[set[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag == "figure":
            self.figures.append(set())
        elif "figure" in self.open:
            self.figures[-1].add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def test_the_page_needs_nothing_else(made):
    text = (made / PAGE).read_text()
    reader = Reader(text)
    assert not re.search(r"https?://|url\(|@import|<script", text)
    assert {link["href"] for link in reader.all("link")} == {"data:,"}
    anchors = {a["href"] for a in reader.all("a")}
    assert anchors == {f"#{h2['id']}" for h2 in reader.all("h2") if h2["id"] != "notes"}
    for image in reader.all("img"):
        assert str(image["src"]).startswith("data:image/png;base64,")
        assert len(str(image["alt"])) > 30
    assert len(reader.all("img")) == len(FIGURES)
    # Every table and every picture has a caption.
    assert len(reader.all("table")) > 8
    held = [figure for figure in reader.figures if figure & {"table", "img", "pre"}]
    assert len(held) == sum(len(reader.all(tag)) for tag in ("table", "img", "pre"))
    assert all("figcaption" in figure for figure in held)


def test_all_that_is_promised_is_there(made, products):
    manifest = Manifest.load(made)
    assert set(manifest.summary["figures"]) == FIGURES
    expected = {PAGE, *(f"figures/{n}.{kind}" for n in FIGURES for kind in ("png", "pdf"))}
    assert {record.path for record in manifest.files} == expected
    assert {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()} == expected | {
        "manifest.json"
    }
    text = (made / PAGE).read_text()
    for name, path in products.items():
        assert name in text and Manifest.load(path).fingerprint in text
    for survey in ("lamost", "apogee", "galah"):
        observations = Manifest.load(products[f"{survey}.observations"])
        assert all(digest in text for digest in observations.recipe.inputs.values())
        assert f"{observations.rows.n_in:,}" in text
        for name, failed in observations.summary["fail_cut"].items():
            assert f"<td>{name}</td>" in text and f">{failed:,}</td>" in text
    assert "a = 1  # &lt;b&gt;" in text, "the job file, escaped"
    corrected = Catalog.open(products["lamost.corrected"])
    table = pq.read_table([corrected.partition_file(p) for p in corrected.pixels], columns=["teff"])
    assert f"{table.num_rows - table['teff'].null_count:,} rows with both labels" in text


def test_a_stopped_run_goes_on_and_workers_change_no_byte(
    made, products, cluster, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    drawn: list[str] = []
    part = ReportStage.draw_figure
    few = ("kiel", "calibration", "correction", "coverage-growth")
    monkeypatch.setattr(
        "sos_dask.stages.report.figures",
        lambda build: {name: draw for name, draw in figures(build).items() if name in few},
    )

    def stopping(self, output, key, item):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(key)
        return part(self, output, key, item)

    with monkeypatch.context() as patch:
        patch.setattr(ReportStage, "draw_figure", stopping)
        with pytest.raises(KeyboardInterrupt):
            report(products, out, SETTINGS)
    assert not (out / PAGE).exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("figures/*")}
    assert {path.stem for path in before} == set(drawn)
    report(products, out, SETTINGS, cluster=cluster)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "none is drawn twice"
    whole, found = contents(made / "figures"), contents(out / "figures")
    names = [f"{name}.{kind}" for name in few for kind in ("png", "pdf")]
    assert found == {name: whole[name] for name in names}


def test_rows_on_the_kiel_plane_and_their_errors_are_counted(small_store):
    current = small_store / "current"
    catalog = Catalog.open(current / "lamost.corrected")
    pixel = catalog.pixels[0]
    counts = stage._count_kiel(catalog, pixel, ["teff", "feh"])
    known, beyond = 0, 0
    cells: dict[int, list[float]] = {}
    for row in catalog.read(pixel).to_pylist():
        if row["teff"] is None or row["logg"] is None:
            continue
        known += 1
        i, j = int((row["teff"] - 3000) // 50), int((row["logg"] + 0.5) // 0.05)
        if not (0 <= i < 140 and 0 <= j < 120):
            beyond += 1
        elif row["teff_sos_err"] is not None and row["teff_sos_err"] > 0:
            cells.setdefault(i * 120 + j, []).append(row["teff_sos_err"])
    assert counts["before"].sum() == known > 500 and counts["before"][-1] == beyond
    assert set(counts) == {"before", "after", "teff_n", "teff_sum", "feh_n", "feh_sum"}
    assert counts["teff_n"][:-1].sum() == sum(map(len, cells.values())) > 300
    n, total = counts["teff_n"], counts["teff_sum"]
    off = 0
    for cell, errors in cells.items():
        if n[cell] != len(errors):
            off += 1  # a label on the edge of a cell, in another precision
            continue
        assert total[cell] * 1e-6 == pytest.approx(np.sum(np.log10(errors)), abs=1e-6 * len(errors))
    assert off < 0.02 * len(cells)


def test_what_is_missing_is_left_out(products, tmp_path):
    without = (
        "lamost.trends", "reference", "galah.stars", "lamost.uncertainty", "lamost.coverage",
    )  # fmt: skip
    few = {n: p for n, p in products.items() if n not in without}
    manifest = report(few, tmp_path / "few", SETTINGS)
    assert set(manifest.summary["figures"]) == {"sky", "overlap", "kiel", "comparison"}
    text = (tmp_path / "few" / PAGE).read_text()
    assert "Trends before and after" not in text and "The methods compared" in text
    with pytest.raises(ConfigError, match="nothing to report"):
        report({"lamost.pairs": products["lamost.pairs"]}, tmp_path / "none", SETTINGS)
    with pytest.raises(CatalogError, match="already holds"):
        report(products, tmp_path / "few", SETTINGS)


def test_a_rebuild_makes_the_report_when_the_job_asks(small_store, tmp_path, monkeypatch):
    # Which figures there are is another test's matter, and they take long to draw.
    monkeypatch.setattr(
        "sos_dask.stages.report.figures",
        lambda build: {"calibration": figures(build)["calibration"]},
    )
    shutil.copytree(small_store.parent, tmp_path / "copy", symlinks=True)
    file = tmp_path / "copy" / "job.toml"
    file.write_text(file.read_text().replace("enabled = false", "enabled = true"))
    job = load_job(file)
    assert [(s.product, s.reason) for s in plan(job) if not s.complete] == [
        ("report", "not built before")
    ]
    build = rebuild(job)
    assert [stage.product for stage in build.stages if stage.ran] == ["report"]
    text = (build.path / "report" / PAGE).read_text()
    assert "job “small”" in text and "lamost.fits" in text
    assert rebuild(job).path == build.path
    # The single step makes the same page from the published build alone.
    of_build(tmp_path / "copy" / "store").run(tmp_path / "again")
    assert (tmp_path / "again" / PAGE).read_text() == text
    # Another comment in the job is another page, and nothing else.
    file.write_text(file.read_text() + "# a comment\n")
    (stage,) = [stage for stage in plan(load_job(file)) if not stage.complete]
    assert stage.product == "report" and stage.reason.startswith("job_file")


def test_software_is_part_of_the_recipe():
    one = ReportStage.recipe(SETTINGS, {})
    other = ReportStage.recipe(SETTINGS.but(software={"numpy": "2"}), {})
    assert one.fingerprint != other.fingerprint
    assert {"python", "numpy", "matplotlib"} <= set(ReportSettings(job="a", job_text="b").software)


@pytest.fixture(scope="module")
def plane(current, tmp_path_factory) -> Path:
    pytest.importorskip("umap")
    folder: Path = tmp_path_factory.mktemp("plane") / "projection"
    catalogs = [Catalog.open(current / name) for name in ("lamost.observations", "lamost.pairs")]
    settings = ProjectionSettings(sample_rows=400, map_bins=96)
    inputs = dict(zip(("observations", "pairs"), catalogs, strict=True))
    ProjectionStage(inputs, settings).run(folder)
    return folder


@pytest.fixture(scope="module")
def left_out(current, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("left-out") / "generalisation"
    pairs = Catalog.open(current / "lamost.pairs")
    generalisation(
        pairs, folder, {"polynomial": {"order": 2}}, GeneralisationSettings(min_pairs=20)
    )
    return folder


def test_the_page_has_the_plane_and_the_groups(current, plane, left_out, tmp_path, monkeypatch):
    wanted = {"projection", "generalisation"}
    monkeypatch.setattr(
        "sos_dask.stages.report.figures",
        lambda build: {name: draw for name, draw in figures(build).items() if name in wanted},
    )
    panels = {}

    def watched(draw):
        def kept():
            if (found := draw()) is not None:
                panels.update({axes.get_title(): axes for axes in found.figure.axes})
            return found

        return render(kept)

    monkeypatch.setattr("sos_dask.stages.report.render", watched)
    products = {name: current / name for name in read_build(current)["products"]}
    more = {"lamost.generalisation": left_out, "lamost.projection": plane}
    manifest = report({**products, **more}, tmp_path / "out", SETTINGS)
    assert set(manifest.summary["figures"]) == wanted
    text = (tmp_path / "out" / PAGE).read_text()
    known, outside = by_row(plane, current / "lamost.coverage")
    assert known.sum() > 1000 and f"({known.sum():,} scored rows)" in text
    # The right panel of the figure as it was drawn: each cell with its own share.
    image = panels["outside the coverage"].collections[0]
    share = np.full(known.shape, np.nan)
    np.divide(100.0 * outside, known, out=share, where=known > 0)
    assert np.nanmin(share) == 0 and np.nanmax(share) > 50 and len(np.unique(share)) > 10
    shown = np.ma.filled(np.ma.asarray(image.get_array()), np.nan)
    np.testing.assert_array_equal(shown, share.T, "the first coordinate is drawn to the right")


def by_row(plane: Path, coverage: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a coverage in each coarse cell, and those outside: each row found by its id."""

    def rows(folder: Path, *names: str) -> dict[Any, dict]:
        found = pq.read_table(folder / "dataset", columns=["obs_id", *names]).to_pylist()
        by_id = {row["obs_id"]: row for row in found}
        assert len(by_id) == len(found)
        return by_id

    scores = rows(coverage, "coverage", FLAGS)
    bins = Manifest.load(plane).recipe.params["settings"]["map_bins"]
    group = -(-bins // 64)
    low_1, high_1, low_2, high_2 = load_projection(plane).limits()
    known, outside = np.zeros((2, -(-bins // group), -(-bins // group)), dtype=int)
    for key, row in rows(plane, "umap_1", "umap_2").items():
        if row["umap_1"] is None or scores[key]["coverage"] is None:
            continue
        i = math.floor((row["umap_1"] - low_1) * (bins / (high_1 - low_1)))
        j = math.floor((row["umap_2"] - low_2) * (bins / (high_2 - low_2)))
        if 0 <= i < bins and 0 <= j < bins:
            known[i // group, j // group] += 1
            outside[i // group, j // group] += bool(scores[key][FLAGS] & FLAG_OUTSIDE)
    return known, outside


def test_a_plane_of_other_rows_is_refused(current, plane, tmp_path):
    products = {name: current / name for name in read_build(current)["products"]}
    shutil.copytree(plane, tmp_path / "other")
    catalog = Catalog.open(tmp_path / "other")
    file = catalog.partition_file(catalog.pixels[0])
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(CatalogError):
        report({**products, "projection": tmp_path / "other"}, tmp_path / "out", SETTINGS)


def test_groups_left_out_are_shown_beside_groups_that_trained(left_out):
    table = pq.read_table(left_out / "generalisation.parquet")
    said = drawn(left_out_figure(table, UNITS, "polynomial")).facts["pairs"]
    assert any(name.startswith("apogee") for name in said) and any("≥" in name for name in said)
    assert left_out_figure(table.slice(0, 0), UNITS, "x") is None
    shown = page.left_out(table, UNITS, "polynomial")
    rows = [r for r in table.to_pylist() if r["method"] == "polynomial"]
    assert len(shown.rows) == len(rows) > 3
    for row in rows:
        numbers = (f"{row['n_train']:,}", f"{row['n']:,}")
        assert any(cells[3:5] == numbers and cells[1] == row["split"] for cells in shown.rows)


_RULES = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


_PROBE = """<script>addEventListener("load", () => {
  const width = document.documentElement.clientWidth, beyond = [];
  for (const e of document.querySelectorAll("body *")) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1) && !e.closest(".wide"))
      beyond.push(e.tagName + " " + box.right);
  }
  const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
  const scroll = document.documentElement.scrollWidth;
  parent.postMessage(JSON.stringify({width, scroll, beyond, broken}), "*");
})</script></body>"""


_FRAME = """<body><script>onmessage = e => document.body.dataset.probe = e.data</script>
<iframe style="border:0" width="{width}" height="800" src="probe.html"></iframe>"""


@pytest.fixture(scope="module")
def browser():
    """Runs a real browser without a window; gives its standard output and error."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        require(names[0])
    assert program is not None

    def run(page: Path, *options: str) -> tuple[str, str]:
        done = subprocess.run(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--enable-logging=stderr", *options, f"file://{page}"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout, done.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_in_a_browser(made, browser, tmp_path, width):
    # The page forbids scripts, so its copy with the probe must not say so.
    text = _RULES.sub("", (made / PAGE).read_text())
    (tmp_path / "probe.html").write_text(text.replace("</body>", _PROBE))
    frame = tmp_path / "frame.html"
    frame.write_text(_FRAME.format(width=width))
    out, _ = browser(frame, "--window-size=1600,1000", "--dump-dom")
    found = re.search(r'data-probe="([^"]*)"', out)
    assert found is not None
    probe = json.loads(found[1].replace("&quot;", '"'))
    assert probe == {"width": width, "scroll": width, "beyond": [], "broken": 0}


@pytest.mark.slow
def test_the_console_of_a_browser_stays_empty(made, browser, tmp_path):
    out, errors = browser((made / PAGE).resolve(), "--dump-dom")
    assert "What to watch out for" in out
    assert "CONSOLE" not in errors
    # What this test would see: an image that the page's own rules forbid.
    bad = tmp_path / "bad.html"
    text = (
        (made / PAGE).read_text().replace("</body>", '<img src="http://localhost:9/x.png"></body>')
    )
    bad.write_text(text)
    assert "CONSOLE" in browser(bad, "--dump-dom")[1]

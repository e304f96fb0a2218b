"""Figures and tables of the report from the real products of the small store."""

import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sos_dask.correct import FLAG_OUTSIDE, FLAGS
from sos_dask.errors import CatalogError
from sos_dask.evidence.coverage import SKY_ORDER, STEPS
from sos_dask.evidence.projection import ProjectionSettings
from sos_dask.report import maps as kinds
from sos_dask.report import page
from sos_dask.report.figures import calibration_figure, left_out_figure
from sos_dask.report.maps import Plane, growth_figure
from sos_dask.report.style import Drawn, percent, readable, render
from sos_dask.stages.projection import ProjectionStage, load_projection
from sos_dask.stages.report import PAGE, ReportSettings, figures
from sos_dask.stages.train import GeneralisationSettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.store import read_build
from tests.run import generalisation, report

SETTINGS = ReportSettings(job="small", job_text="a = 1", software={"sos-dask": "0"})
UNITS = {"teff": "K", "logg": "dex", "feh": "dex"}


@pytest.fixture(scope="module")
def current(small_store) -> Path:
    folder: Path = small_store / "current"
    return folder


def drawn(found) -> Drawn:
    assert found is not None
    return found


def test_calibration_states_how_many_pairs_judge_each_part(current):
    table = page.Build.open({"uncertainty": current / "uncertainty"}).table("hit_rates")
    assert table is not None
    said = drawn(calibration_figure(table, UNITS)).facts["pairs"]
    for row in table.to_pylist():
        if row["subset"] in ("all", "sparse", "giants"):
            assert said[row["subset"]] == row["n"]
    assert calibration_figure(table.slice(0, 0), UNITS) is None


def test_growth_names_the_pairs_for_which_the_model_is_too_small(current):
    table = page.Build.open({"coverage": current / "coverage"}).table("growth")
    assert table is not None
    limits = Manifest.load(current / "coverage").summary["limits"]
    said = drawn(growth_figure(table, limits)).facts
    n = np.sum(table["n"].to_numpy())
    assert (said["n_bins"], said["n_pairs"]) == (table.num_rows, n)
    double = table.set_column(2, "growth_measured", pa.array(2 * table["growth"].to_numpy()))
    worse = drawn(growth_figure(double, limits)).facts["worse"]
    assert (worse["n_bins"], worse["n_pairs"]) == (table.num_rows, n)
    right = table.set_column(2, "growth_measured", table["growth"])
    assert drawn(growth_figure(right, limits)).facts["worse"] is None
    assert growth_figure(table.slice(0, 0), limits) is None


def test_maps_of_coverage_count_what_the_manifest_counts(current):
    maps = pq.read_table(current / "coverage" / "maps.parquet")
    summary = Manifest.load(current / "coverage").summary
    said = drawn(kinds.coverage_figure(maps, SKY_ORDER, STEPS["kiel"])).facts["rows"]
    assert said == {name: summary["rows"][name] for name in kinds.CLASSES}
    assert kinds.coverage_figure(maps.slice(0, 0), SKY_ORDER, STEPS["kiel"]) is None


def test_regions_to_follow_up_are_cells_with_their_rows(current):
    maps = pq.read_table(current / "coverage" / "maps.parquet")
    table = page.follow_up(maps, STEPS["labels"], UNITS)
    regions = [row for row in maps.to_pylist() if row["map"] == "labels" and row["outside"]]
    assert len(table.rows) == min(len(regions), 10) > 0
    first, region = table.rows[0], max(regions, key=lambda row: row["outside"])
    low, high = (float(text.replace("−", "-")) for text in first[0].split(" to "))
    assert region["teff"] is not None
    assert low < region["teff"] < high and high - low == STEPS["labels"]["teff"]
    assert (
        first[3] == f"{region['outside']:,}"
        and first[4] == f"{sum(region[name] for name in kinds.CLASSES):,}"
    )


# --- the plane of all parameters ----------------------------------------------------------------

places = st.lists(st.tuples(st.floats(-1, 4, width=32), st.floats(-3, 9, width=32)), max_size=40)


@given(places, st.integers(8, 300))
def test_coarse_cells_are_whole_groups_of_cells(rows, bins):
    plane = Plane((0.0, 3.0, -2.0, 8.0), bins)
    first, second = np.array(rows, dtype=np.float32).reshape(-1, 2).T
    cells = plane.cells(first, second)
    fine = [
        np.floor((values.astype(float) - low) * (bins / (high - low))).astype(int)
        for values, low, high in ((first, 0.0, 3.0), (second, -2.0, 8.0))
    ]
    inside = np.all([(f >= 0) & (f < bins) for f in fine], axis=0)
    np.testing.assert_array_equal(cells >= 0, inside)
    expected = fine[0] // plane.group * plane.coarse + fine[1] // plane.group
    np.testing.assert_array_equal(cells[inside], expected[inside])
    assert plane.coarse <= 64 and len(plane.edges(plane.group)[0]) == plane.coarse + 1


class Straight:
    """Lays out the first two parameters as they are: UMAP itself takes half a minute to start."""

    def __init__(self, **settings: Any) -> None:
        pass

    def fit_transform(self, parameters: np.ndarray) -> np.ndarray:
        return parameters[:, :2]


@pytest.fixture(scope="module")
def plane(current, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("plane") / "projection"
    catalogs = [Catalog.open(current / name) for name in ("lamost.observations", "pairs")]
    settings = ProjectionSettings(sample_rows=400, map_bins=96)
    inputs = dict(zip(("observations", "pairs"), catalogs, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Straight))
        ProjectionStage(inputs, settings).run(folder)
    return folder


@pytest.fixture(scope="module")
def left_out(current, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("left-out") / "generalisation"
    pairs = Catalog.open(current / "pairs")
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
    more = {"generalisation": left_out, "projection": plane}
    manifest = report({**products, **more}, tmp_path / "out", SETTINGS)
    assert set(manifest.summary["figures"]) == wanted
    text = (tmp_path / "out" / PAGE).read_text()
    known, outside = by_row(plane, current / "coverage")
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


def test_words_are_those_of_a_person_and_shares_are_never_nothing():
    assert readable("worse in feh scatter, teff_err") == "worse in [Fe/H] scatter, teff_err"
    assert percent(48, 1_000_000) == "<0.1 %"
    assert percent(0, 10) == "0.0 %" and percent(1, 8) == "12.5 %" and percent(1, 0) == "–"

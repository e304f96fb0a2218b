"""Figures and tables of the report from the real products of the small store."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sos_dask.report.calibration import calibration_figure, growth_figure
from sos_dask.report.projection import Grid, agreement
from sos_dask.report.words import percent, readable
from sos_dask.stages.report_content import figures, grid_of

from sos_dask.correct import FLAG_OUTSIDE, FLAGS
from sos_dask.errors import CatalogError
from sos_dask.evidence.maps import SKY_ORDER, STEPS, follow_up
from sos_dask.evidence.projection import ProjectionSettings
from sos_dask.report import generalisation as groups
from sos_dask.report import trust
from sos_dask.report.style import Rendered, render
from sos_dask.stages.generalisation import GeneralisationSettings
from sos_dask.stages.projection import ProjectionStage
from sos_dask.stages.report import PAGE, ReportSettings, report
from sos_dask.storage.artifact import Manifest
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.store import read_build
from tests.run import generalisation

SETTINGS = ReportSettings("small", "a = 1", {}, {"sos-dask": "0"})


@pytest.fixture(scope="module")
def current(small_store) -> Path:
    folder: Path = small_store / "current"
    return folder


def drawn(draw) -> Rendered:
    rendered = render(draw)
    assert rendered is not None
    assert rendered.png.startswith(b"\x89PNG") and len(rendered.alt) > 30
    return rendered


def test_calibration_states_how_many_pairs_judge_each_part(current):
    table = pq.read_table(current / "uncertainty" / "calibration.parquet")
    said = drawn(lambda: calibration_figure(table)).caption
    for row in table.to_pylist():
        if row["subset"] in ("all", "sparse", "giants"):
            assert f"{row['subset']} {row['n']:,}" in said
    assert render(lambda: calibration_figure(table.slice(0, 0))) is None


def test_growth_names_the_pairs_for_which_the_model_is_too_small(current):
    table = pq.read_table(current / "coverage" / "calibration.parquet")
    limits = Manifest.load(current / "coverage").summary["limits"]
    said = drawn(lambda: growth_figure(table, limits)).caption
    n = np.sum(table["n"].to_numpy())
    assert f"{table.num_rows:,} bins of {n:,} pairs" in said
    double = table.set_column(2, "growth_measured", pa.array(2 * table["growth"].to_numpy()))
    said = drawn(lambda: growth_figure(double, limits)).caption
    assert f"In {table.num_rows} bins of {n:,} pairs" in said
    right = table.set_column(2, "growth_measured", table["growth"])
    assert "more than 1.5" not in drawn(lambda: growth_figure(right, limits)).caption
    assert render(lambda: growth_figure(table.slice(0, 0), limits)) is None


def test_maps_of_coverage_count_what_the_manifest_counts(current):
    maps = pq.read_table(current / "coverage" / "maps.parquet")
    summary = Manifest.load(current / "coverage").summary
    draw = trust.coverage_figure
    said = drawn(lambda: draw(maps, SKY_ORDER, STEPS["kiel"], summary["meaning"])).caption
    for name in trust.CLASSES:
        assert f"{summary['rows'][name]:,} {name}" in said
        assert summary["meaning"][name] in said
    assert render(lambda: draw(maps.slice(0, 0), SKY_ORDER, STEPS["kiel"], {})) is None


def test_regions_to_follow_up_are_cells_with_their_rows(current):
    maps = pq.read_table(current / "coverage" / "maps.parquet")
    regions = follow_up(maps)
    table = trust.follow_up(regions, STEPS["labels"])
    assert len(table.rows) == len(regions) > 0
    first, region = table.rows[0], regions[0]
    low, high = (float(text.replace("−", "-")) for text in first[0].split(" to "))
    assert region["teff"] is not None
    assert low < region["teff"] < high and high - low == STEPS["labels"]["teff"]
    assert first[3] == f"{region['outside']:,}" and first[4] == f"{region['rows']:,}"


# --- the plane of all parameters ----------------------------------------------------------------

places = st.lists(st.tuples(st.floats(-1, 4, width=32), st.floats(-3, 9, width=32)), max_size=40)


@given(places, st.integers(8, 300))
def test_coarse_cells_are_whole_groups_of_cells(rows, bins):
    grid = Grid((0.0, 3.0, -2.0, 8.0), bins)
    first, second = np.array(rows, dtype=np.float32).reshape(-1, 2).T
    cells = grid.cells(first, second)
    fine = [
        np.floor((values.astype(float) - low) * (bins / (high - low))).astype(int)
        for values, low, high in ((first, 0.0, 3.0), (second, -2.0, 8.0))
    ]
    inside = np.all([(f >= 0) & (f < bins) for f in fine], axis=0)
    np.testing.assert_array_equal(cells >= 0, inside)
    maps = pa.table(
        {"cell_1": fine[0][inside], "cell_2": fine[1][inside], "n": np.ones(inside.sum(), int)}
    )
    expected = np.bincount(cells[inside], minlength=grid.coarse**2)
    np.testing.assert_array_equal(grid.coarsened(maps, "n"), expected)
    assert grid.coarse <= 64 and len(grid.edges(grid.group)[0]) == grid.coarse + 1


def test_agreement_is_the_share_with_one_answer():
    overlap = np.array([5, 0, 1])
    table = agreement(overlap, (np.array([70, 20, 10]), np.array([5, 15, 0])))
    assert table is not None
    assert table.rows == (
        ("cell with pairs", "75", "5", "80"),
        ("cell without a pair", "5", "15", "20"),
        ("all", "80", "20", "100"),
    )
    assert "Of 100 rows" in table.caption and " 90.0 % get" in table.caption
    assert "agree for 68.0 %" in table.caption  # 0.8 * 0.8 + 0.2 * 0.2
    assert agreement(overlap, (np.zeros(3, int), np.zeros(3, int))) is None


@pytest.fixture(scope="module")
def plane(current, tmp_path_factory) -> Path:
    pytest.importorskip("umap")
    folder: Path = tmp_path_factory.mktemp("plane") / "projection"
    catalogs = [Catalog.open(current / name) for name in ("lamost.observations", "pairs")]
    settings = ProjectionSettings(sample_rows=400, map_bins=96)
    inputs = dict(zip(("observations", "pairs"), catalogs, strict=True))
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
    wanted = {"projection", "generalisation", "generalisation-scatter"}
    monkeypatch.setattr(
        "sos_dask.stages.report.figures",
        lambda build: {name: draw for name, draw in figures(build).items() if name in wanted},
    )
    products = {name: current / name for name in read_build(current)["products"]}
    more = {"generalisation": left_out, "projection": plane}
    manifest = report({**products, **more}, tmp_path / "out", SETTINGS)
    assert set(manifest.summary["figures"]) == wanted
    text = (tmp_path / "out" / PAGE).read_text()
    # The same rows counted at once, without partitions.
    grid, maps = grid_of(plane), pq.read_table(plane / "maps.parquet")
    overlap = grid.coarsened(maps, "n_overlap")
    counts = np.zeros((2, 2), dtype=int)
    placed, scored = Catalog.open(plane), Catalog.open(current / "coverage")
    for pixel in placed.pixels:
        table = placed.read(pixel).join(
            scored.read(pixel, ["obs_id", "coverage", FLAGS]), "obs_id", join_type="inner"
        )
        for row in table.to_pylist():
            if row["umap_1"] is None or row["coverage"] is None:
                continue
            (cell,) = grid.cells(np.array([row["umap_1"]]), np.array([row["umap_2"]]))
            counts[int(overlap[cell] == 0), int(row[FLAGS] & FLAG_OUTSIDE != 0)] += cell >= 0
    assert counts.sum() > 1000 and counts.min() > 0
    for row, name in zip(counts, ("cell with pairs", "cell without a pair"), strict=True):
        shown = text[text.index(f"<td>{name}</td>") :][:200]
        assert f">{row[0]:,}<" in shown and f">{row[1]:,}<" in shown and f">{row.sum():,}<" in shown
    share = 100 * np.trace(counts) / counts.sum()
    assert f"{share:.1f} % get the same answer" in text


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
    for statistic in ("median", "mad"):
        said = drawn(lambda s=statistic: groups.generalisation_figure(table, s, "polynomial"))
        assert "apogee " in said.caption and "≥" in said.caption
    assert render(lambda: groups.generalisation_figure(table.slice(0, 0), "mad", "x")) is None
    shown = groups.generalisation_table(table, "polynomial", "polynomial")
    rows = [r for r in table.to_pylist() if r["method"] == "polynomial"]
    assert len(shown.rows) == len(rows) > 3
    for row in rows:
        numbers = (f"{row['n_train']:,}", f"{row['n']:,}")
        assert any(cells[3:5] == numbers and cells[1] == row["split"] for cells in shown.rows)


def test_words_are_those_of_a_person_and_shares_are_never_nothing():
    assert readable("worse in feh scatter, teff_err") == "worse in [Fe/H] scatter, teff_err"
    assert percent(48, 1_000_000) == "<0.1 %"
    assert percent(0, 10) == "0.0 %" and percent(1, 8) == "12.5 %" and percent(1, 0) == "–"

"""Stage coverage on a small build: aligned columns, honest counts, same bytes, the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sos_dask.cli import app
from sos_dask.columns import floats, key_hashes
from sos_dask.correct import FLAG_OUTSIDE, FLAG_SPARSE
from sos_dask.errors import CatalogError
from sos_dask.evidence.coverage import CoverageModel
from sos_dask.evidence.widening import KINDS
from sos_dask.problem import DEFAULT
from sos_dask.stages.coverage import (
    Coverage,
    CoverageSettings,
    _counts,
    parameter_columns,
    read_overlap,
)
from sos_dask.stages.evidence import EVIDENCE
from sos_dask.stats.numbers import uniform
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest, Recipe, sealed_json
from tests.command_line import assert_error, cli
from tests.job import contents
from tests.skies import observations, write_catalog
from tests.steps import coverage

__all__ = ["cli"]


def opened(store, name):
    return Catalog.open((store / "current" / name).resolve())


def test_columns_stand_beside_the_observations(small_store):
    rows, scores = (
        opened(small_store, "lamost.observations"),
        opened(small_store, "lamost.coverage"),
    )
    corrected = opened(small_store, "lamost.corrected")
    assert scores.pixels == rows.pixels
    summary = Manifest.load(small_store / "current" / "lamost.coverage").summary
    n = dict.fromkeys(("outside", "sparse", "unknown"), 0)
    without = dict.fromkeys(summary["rows_without"], 0)
    bits = dict.fromkeys(summary["flags"], 0)
    for pixel in rows.pixels:
        table, score, out = rows.read(pixel), scores.read(pixel), corrected.read(pixel)
        assert table["obs_id"].equals(score["obs_id"])
        assert score["coverage"].equals(out["coverage"])
        assert score["coverage"].null_count == out["teff_sos"].null_count
        flags = out["flag_sos"].to_numpy()
        n["outside"] += int(np.count_nonzero(flags & FLAG_OUTSIDE))
        n["sparse"] += int(np.count_nonzero(flags & FLAG_SPARSE))
        n["unknown"] += score["coverage"].null_count
        for name in without:
            without[name] += int(np.count_nonzero(~np.isfinite(floats(table, name))))
        for bit in bits:
            bits[bit] += int(np.count_nonzero(score["flag_coverage"].to_numpy() & int(bit)))
        value, kind = (score[name].drop_null().to_numpy() for name in score.column_names[-3::2])
        assert (kind == 0).tolist() == (value >= 0.8).tolist()
        assert (kind >= 2).tolist() == (value < 0.5).tolist()
    assert without == summary["rows_without"] and max(without.values()) > 0
    assert bits == summary["flags"] and sum(bits.values()) > 0
    assert {name: summary["rows"][name] for name in n} == n
    assert sum(summary["shares"].values()) == pytest.approx(1)
    assert summary["parameters_without_column"] == ["distance", "ebv"]


def test_workers_and_what_was_there_before_change_no_byte(build, cluster, tmp_path):
    names = ("lamost.pairs", "lamost.observations", "lamost.stars")
    pairs, rows, stars = (Catalog.open(build / name) for name in names)
    model = build / "lamost.model.polynomial"
    first, second = CoverageSettings(), CoverageSettings(inside=0.95, outside=0.9)

    def made(name: str, settings: CoverageSettings, **options) -> dict[str, str]:
        coverage(model, pairs, rows, stars, tmp_path / name, settings, **options)
        return contents(tmp_path / name)

    before = made("out", first)
    assert made("workers", first, cluster=cluster) == before
    # In the same folder and process.
    assert before != made("out", second, overwrite=True) == made("fresh", second)


def test_pairs_of_another_model_are_refused(small_store, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in (small_store / "current" / "lamost.model.polynomial").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    held_out = pq.read_table(model / "held_out.parquet")
    pq.write_table(held_out.slice(1), model / "held_out.parquet")
    pairs, rows = opened(small_store, "lamost.pairs"), opened(small_store, "lamost.observations")
    stars = opened(small_store, "lamost.stars")
    manifest = Manifest.load(model)
    other = replace(manifest.recipe, params={**manifest.recipe.params, "again": 1})
    Output(model, other).commit(manifest.rows, ())
    with pytest.raises(CatalogError, match="does not hold the pairs"):
        coverage(model, pairs, rows, stars, tmp_path / "out", CoverageSettings())


def test_the_command_tells_shares_maps_and_follow_up(small_store, capsys):
    with pytest.raises(SystemExit):
        app(["coverage", "--store", str(small_store), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["inside"] + found["sparse"] + found["outside"] + found["unknown"] == pytest.approx(
        1
    )
    n_rows = sum(found["rows"][name] for name in ("inside", "sparse", "outside"))
    assert sum(cell["rows"] for cell in found["kiel"]) == n_rows
    assert sum(cell["rows"] for cell in found["sky"]) == n_rows
    assert found["intervals"]["inside"].startswith("counted on ")
    assert found["intervals"][KINDS[-1]].startswith("extrapolated")
    stars = found["stars"]
    assert sum(stars[name] for name in ("inside", "sparse", "outside", "unknown")) == pytest.approx(
        1
    )
    assert stars["sampled"] == opened(small_store, "lamost.stars").n_rows  # a small store: all
    counts = [cell["outside"] for cell in found["follow_up"]]
    assert counts == sorted(counts, reverse=True) and counts[0] > 0
    with pytest.raises(SystemExit):
        app(["coverage", "--store", str(small_store)])
    text = capsys.readouterr().out
    assert "Where follow-up would gain most" in text and "Bits of flag_sos" in text


def test_shares_of_stars_are_those_of_their_labels(small_store):
    found = Coverage.load(small_store / "current" / "lamost.coverage")
    model = CoverageModel.load(small_store / "current" / "lamost.coverage")
    stars = opened(small_store, "lamost.stars")
    table = pa.concat_tables([stars.read(pixel) for pixel in stars.pixels])
    score, _ = model.coverage(parameter_columns(table, DEFAULT))
    assert found["stars"]["inside"] == np.mean(score >= 0.8)
    assert found["stars"]["unknown"] == np.mean(np.isnan(score))


def test_a_store_without_coverage_is_told_what_to_do(small_store, tmp_path):
    command = ["coverage", "--store", str(tmp_path)]
    with pytest.raises(CatalogError, match="no sos-dask store at"):
        app(command)
    (tmp_path / "artifacts").mkdir()
    with pytest.raises(CatalogError, match=r"has no current build\s+Run a rebuild first"):
        app(command)
    current = tmp_path / "current"
    current.mkdir()
    (current / "lamost.pairs").mkdir()
    (current / "build.json").write_text(
        sealed_json({"products": {"lamost.pairs": ""}, "stages": {"lamost.pairs": ""}})
    )
    with pytest.raises(CatalogError, match="has no product 'coverage'"):
        app(command)
    (current / "build.json").write_text(
        sealed_json({"products": {"lamost.coverage": ""}, "stages": {"lamost.coverage": ""}})
    )
    shutil.copytree(small_store / "current" / "lamost.coverage", current / "lamost.coverage")
    made = Manifest.load(current / "lamost.coverage")
    older = replace(made, recipe=replace(made.recipe, version=made.recipe.version - 1))
    (current / "lamost.coverage" / "manifest.json").write_text(sealed_json(older.document))
    with pytest.raises(CatalogError, match="made by another version"):
        app(command)


def test_the_single_step_takes_the_settings_of_a_job(small_store, cli):
    current = small_store / "current"
    inputs = [
        current / name
        for name in ("lamost.pairs", "lamost.model.polynomial", "lamost.observations")
    ]
    inputs.append(current / "lamost.stars")
    options = ["--inside", 0.9, "--outside", 0.6, "--grid", "teff=3500,8500"]
    ran = cli("coverage", *inputs, "-o", "out", "-w", 0, *options, "--seed", 3, "--json")
    assert ran.code == 0, ran.err
    settings = CoverageSettings(inside=0.9, outside=0.6, grid={"teff": (3500.0, 8500.0)}, seed=3)
    params = Coverage.recipe(settings, {}).params
    assert Manifest.load(Path("out")).recipe.params == json.loads(json.dumps(params))
    scores = pq.read_table(Path("out") / "dataset", columns=["coverage"])["coverage"].to_numpy()
    assert json.loads(ran.out)["inside"] == pytest.approx(np.mean(scores >= 0.9))


@pytest.mark.parametrize("grid", ["teff", "teff=1", "teff=2,1", "snr=1,2", "feh=nan,1", "teff=a,b"])
def test_limits_of_a_grid_that_are_none(cli, grid):
    ran = cli("coverage", *"abcd", "-o", "out", "--grid", grid)
    assert_error(ran, 3, f"'{grid}' is not LABEL=LOW,HIGH", "teff=3500,8500")


@pytest.mark.parametrize("measure", ["neighbors", "Ratio"])
def test_a_measure_that_is_none(cli, measure):
    ran = cli("coverage", *"abcd", "-o", "out", "--measure", measure)
    assert_error(ran, 3, "measure", "neighbours", "ratio", f"given: .{measure}")
    assert not Path("out").exists()


def test_maps_are_a_table(small_store):
    found = Coverage.load(small_store / "current" / "lamost.coverage")
    maps = pq.read_table(small_store / "current" / "lamost.coverage" / "maps.parquet")
    assert isinstance(maps, pa.Table) and set(found["meaning"]) >= {"inside", "outside"}


def test_a_sample_is_chosen_by_the_keys_alone(build, tmp_path, monkeypatch):
    inputs = {role: build / f"lamost.{role}" for role in ("pairs", "observations", "stars")}
    inputs |= {"evidence": build / "lamost.evidence", "model": build / "lamost.model.polynomial"}
    stage = Coverage(inputs, CoverageSettings(seed=3))
    monkeypatch.setattr("sos_dask.stages.coverage._SAMPLE_ROWS", 500)
    output = Output(tmp_path / "out", Recipe("coverage", 1, {}, {}))
    for role, key in (("observations", "obs_id"), ("stars", "star_id")):
        catalog = stage.catalog(role)
        for number, pixel in enumerate(catalog.pixels):
            stage.sample(output, f"{role}-{number}", (role, pixel))
            rows = catalog.read(pixel)
            chosen = uniform(key_hashes(rows[key]), 3) < 500 / catalog.n_rows
            found = output.read_piece(f"samples-{role}-{number}")
            assert found["teff"].equals(rows["teff"].filter(pa.array(chosen)))
            assert key not in found.column_names


def test_pairs_without_an_input_are_no_overlap(build, tmp_path):
    evidence, model = build / "lamost.evidence", build / "lamost.model.polynomial"
    whole = read_overlap(evidence, model)
    table = pq.read_table(evidence / EVIDENCE)
    place = table.schema.get_field_index("feh")
    feh = pa.array(table["feh"].to_numpy(), mask=np.arange(len(table)) % 5 == 0)
    pq.write_table(table.set_column(place, "feh", feh), tmp_path / EVIDENCE)
    some = read_overlap(tmp_path, model)
    assert len(some.fold) == len(whole.fold) - -(-len(table) // 5)
    assert np.isfinite(some.columns["feh"]).all()


def test_classes_are_counted():
    kind = np.array([-1, 0, 0, 1, 2, 3, 3, -1], dtype=np.int8)
    assert _counts(kind) == {"unknown": 2, "inside": 2, "sparse": 1, "outside": 3}
    assert sum(_counts(kind[:0]).values()) == 0


def test_a_constant_label_has_no_edge(small_store, tmp_path):
    table = observations(50)
    place = table.schema.get_field_index("feh")
    table = table.set_column(place, table.schema.field(place), pa.array([-0.1] * 50, pa.float32()))
    roles = "evidence", "pairs", "stars", "model.polynomial"
    given = {role.split(".")[0]: small_store / f"current/lamost.{role}" for role in roles}
    stage = Coverage({**given, "observations": write_catalog(table, tmp_path / "rows")})
    assert stage.grid["feh"] == (-np.inf, np.inf)
    assert np.isfinite(stage.grid["teff"]).all()

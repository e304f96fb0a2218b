"""Pairs that statements rest on: all, or those of some stars, and what was held out of them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sos_dask.api import train
from sos_dask.columns import floats32, key_numbers
from sos_dask.corrections import load
from sos_dask.errors import CatalogError, ClusterError, ModelError
from sos_dask.run.cluster import Cluster
from sos_dask.schema import LABELS
from sos_dask.stages.compare import Compare, Trends
from sos_dask.stages.coverage import Coverage
from sos_dask.stages.evidence import (
    Evidence,
    EvidenceSettings,
    fitted_columns,
    held_out_columns,
    held_out_pairs,
    of_surveys,
    read_evidence,
    single_observations,
    sparse_pairs,
)
from sos_dask.stages.train import TrainSettings
from sos_dask.stages.uncertainty import Uncertainty
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.skies import write_catalog
from tests.stages.pairs import read
from tests.steps import features, make_evidence

DIFFERENCES = [f"{label}_diff" for label in LABELS]


@pytest.fixture
def pairs(build) -> Catalog:
    return Catalog.open(build / "lamost.pairs")


def test_the_thin_part_of_the_pairs_is_sparse():
    rng = np.random.default_rng(0)
    labels = rng.normal([5000, 3, 0], [500, 1, 0.3], size=(1000, 3)).astype(np.float32)
    labels[:50] = (labels[:50] - [5000, 3, 0]) * 8.0 + [5000, 3, 0]  # a halo
    labels[7, 1] = np.nan
    trained = np.arange(1000) % 5 > 0
    found = sparse_pairs(features(*labels.T), trained)
    assert found[7] and abs(found[trained].sum() - 40) <= 1
    assert found[:50].mean() > 0.75 and found[50:][~trained[50:]].mean() < 0.1
    assert sparse_pairs(np.full((5, 3), np.nan, np.float32), np.ones(5, bool)).all()


def test_single_observations_where_there_are_as_many():
    table = pa.table({"n_obs": [1, 1, 2, 1, 3], "held_out": [True, True, True, False, False]})
    assert single_observations(table, 2).tolist() == [True, True, False, True, False]
    assert single_observations(table, 3).all(), "of those held out there are two"
    assert single_observations(table.drop_columns(["n_obs"]), 1).all()


def test_pairs_by_their_reference_survey():
    found = of_surveys(pa.table({"survey_ref": ["b", None, "a", "b"]}))
    assert {name: mine.tolist() for name, mine in found.items()} == {
        "b": [True, False, False, True],
        "a": [False, False, True, False],
    }
    assert of_surveys(pa.table({"star": [1]})) == {}


def test_held_out_pairs_are_those_of_the_model(build, pairs):
    model = build / "lamost.model.polynomial"
    whole = read(pairs.path)
    whole = whole.filter(whole["use"])
    fold, differences = whole["fold"].to_numpy(), [floats32(whole, name) for name in DIFFERENCES]
    every = np.ones(len(fold), bool)
    rows, predicted = held_out_pairs(model, fold, differences, every)
    kept = np.arange(len(fold)) % 3 == 0
    some, of_some = held_out_pairs(model, fold, [one[kept] for one in differences], kept)
    inside = kept[rows]
    assert np.array_equal(np.flatnonzero(kept)[some], rows[inside])
    assert np.array_equal(of_some, predicted[inside])
    differences[0] = differences[0] + 1
    with pytest.raises(CatalogError, match="does not hold the pairs"):
        held_out_pairs(model, fold, differences, every)


def test_the_table_has_every_pair_fit_for_training_and_every_prediction(build, pairs, tmp_path):
    models = {"polynomial": build / "lamost.model.polynomial"}
    manifest = make_evidence(pairs, models, tmp_path / "evidence")
    whole = read(pairs.path)
    whole = whole.filter(whole["use"])
    assert manifest.rows.n_out == whole.num_rows and manifest.rows.n_in == pairs.n_rows
    names = ["fold", "survey_ref", *LABELS, *DIFFERENCES, "snr", "feh_err_ref"]
    found = read_evidence(tmp_path / "evidence", names)
    for name in names:
        assert found[name].equals(whole[name].cast(found[name].type)), name
    ids = read_evidence(tmp_path / "evidence", ["star", "target", "group"])
    star = ids["star"].to_numpy()
    n_stars = len(whole["reference_star_id"].unique())
    assert np.array_equal(star, key_numbers(whole["reference_star_id"], 0))
    assert len(np.unique(star)) == len(np.unique(star + ids["group"].to_numpy())) == n_stars
    assert len(ids["target"].unique()) == len(whole["target_obs_id"].unique()) == whole.num_rows
    columns = [*held_out_columns("polynomial"), *fitted_columns("polynomial"), "held_out"]
    found = read_evidence(tmp_path / "evidence", columns)
    held_out = pq.read_table(build / "lamost.model.polynomial" / "held_out.parquet")
    model = load(build / "lamost.model.polynomial")
    fitted = model.predict(model.problem.matrix(whole))
    order = np.argsort(whole["fold"].to_numpy(), kind="stable")
    assert found["held_out"].to_numpy().all()
    for number, label in enumerate(LABELS):
        predicted = floats32(found, columns[number])
        assert np.array_equal(predicted[order], floats32(held_out, f"{label}_delta"), True)
        assert np.array_equal(floats32(found, columns[3 + number]), fitted[:, number], True)
    with pytest.raises(CatalogError, match="has no column 'teff_fitted_boosted'"):
        read_evidence(tmp_path / "evidence", fitted_columns("boosted"))
    assert read_evidence(tmp_path / "evidence", ["fold"], ["bp_rp"]).column_names == ["fold"]


def test_with_a_fold_held_out_the_others_train(build, pairs, tmp_path):
    train(
        pairs,
        tmp_path / "model",
        TrainSettings(method="polynomial", params={"order": 2}, validation="holdout"),
    )
    make_evidence(pairs, {"polynomial": tmp_path / "model"}, tmp_path / "out")
    name = held_out_columns("polynomial")[0]
    found = read_evidence(tmp_path / "out", ["fold", "held_out", "trained", name])
    held_out = found["fold"].to_numpy() == 0
    assert np.array_equal(found["held_out"].to_numpy(), held_out)
    assert np.array_equal(found["trained"].to_numpy(), ~held_out)
    assert np.array_equal(found[name].is_valid().to_numpy(), held_out)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_table_of_many_pairs_is_of_some_stars(build, pairs, tmp_path, share):
    models = {"polynomial": build / "lamost.model.polynomial"}
    names = ["star", "fold", *DIFFERENCES, *held_out_columns("polynomial")]
    make_evidence(pairs, models, tmp_path / "all")
    everything = read_evidence(tmp_path / "all", names)
    settings = EvidenceSettings(max_pairs=int(share * pairs.n_rows))
    manifest = make_evidence(pairs, models, tmp_path / "some", settings)
    found = read_evidence(tmp_path / "some", names)
    expected = share * everything.num_rows
    assert abs(found.num_rows - expected) < 5 * np.sqrt(expected)
    kept = pc.is_in(everything["star"], found["star"].unique())
    assert found.equals(everything.filter(kept)), "a star is kept whole"
    assert sum(manifest.rows.dropped.values()) == pairs.n_rows - found.num_rows
    whole = read(pairs.path)
    other = write_catalog(whole, tmp_path / "pairs", 20, "pairs")
    assert len(other.pixels) > len(pairs.pixels)
    make_evidence(other, models, tmp_path / "other", settings)
    same = [tmp_path / name / "evidence.parquet" for name in ("some", "other")]
    assert same[0].read_bytes() == same[1].read_bytes(), "in any partitions"


def test_stages_look_at_no_more_pairs_than_that(build, pairs, tmp_path):
    """Each in a store with more pairs than are looked at: it counts those that it left out."""
    model = build / "lamost.model.polynomial"
    settings = EvidenceSettings(max_pairs=pairs.n_rows // 2)
    make_evidence(pairs, {"polynomial": model}, tmp_path / "evidence", settings)
    of_table = {"evidence": tmp_path / "evidence"}
    made = [
        Uncertainty({**of_table, "model": model}).run(tmp_path / "uncertainty"),
        Compare({**of_table, "model.polynomial": model}).run(tmp_path / "compare"),
        Trends(of_table).run(tmp_path / "trends"),
    ]
    n_kept = read_evidence(tmp_path / "evidence", ["fold"]).num_rows
    for manifest in made:
        dropped = manifest.rows.dropped
        beyond = dropped["of stars beyond a million pairs"]
        assert pairs.n_rows - beyond - dropped["not fit for training"] == n_kept
        assert manifest.rows.n_in == manifest.rows.n_out + sum(dropped.values())


def test_memory_that_is_needed_stops_growing(pairs, tmp_path, monkeypatch):
    asked: list[int] = []

    class Asked(Cluster):
        def require_memory(self, n_bytes: int, what: str) -> None:
            asked.append(n_bytes)

    for most in (10, 20, 30):
        settings = EvidenceSettings(max_pairs=most)
        make_evidence(pairs, {}, tmp_path / str(most), settings, cluster=Asked())
    assert asked[0] == (300 << 20) + 400 * 10 + 40 * pairs.n_rows
    assert np.diff(asked).tolist() == [4000, 4000]
    monkeypatch.setattr("sos_dask.run.cluster.memory_bytes", lambda: 300 << 20)
    with pytest.raises(ClusterError, match="evidence: 40 pairs"):
        make_evidence(pairs, {}, tmp_path / "large", EvidenceSettings(max_pairs=40))


def test_evidence_of_another_model_is_refused(build, pairs, tmp_path):
    """Two models of one method: columns are found by the method's name."""
    other = tmp_path / "other"
    train(pairs, other, TrainSettings(method="polynomial", params={"order": 1}))
    make_evidence(pairs, {"polynomial": build / "lamost.model.polynomial"}, tmp_path / "evidence")
    of_table = {"evidence": tmp_path / "evidence"}
    with pytest.raises(ModelError, match="was made without the model"):
        Uncertainty({**of_table, "model": other}).run(tmp_path / "uncertainty")
    with pytest.raises(ModelError, match="was made without the model"):
        Compare({**of_table, "model.polynomial": other}).run(tmp_path / "compare")
    more = {
        "pairs": pairs,
        "observations": build / "lamost.observations",
        "stars": build / "lamost.stars",
    }
    with pytest.raises(ModelError, match="was made without the model"):
        Coverage({**of_table, "model": other, **more}).run(tmp_path / "coverage")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("other", "evidence")]


def test_other_pairs_of_the_evidence_are_another_output(build, pairs, tmp_path):
    model = build / "lamost.model.polynomial"
    prints = []
    for name, settings in (("all", None), ("some", EvidenceSettings(max_pairs=200))):
        make_evidence(pairs, {"polynomial": model}, tmp_path / name, settings)
        stage = Uncertainty({"evidence": tmp_path / name, "model": model})
        prints.append(Uncertainty.recipe(stage.settings, stage.fingerprints()).fingerprint)
    assert prints[0] != prints[1]


def test_a_further_method_leaves_what_depends_on_the_chosen_model_alone():
    prints = {"model": "m", "observations": "o"}
    stages: list[tuple[Any, bool]] = [(Uncertainty, True), (Coverage, True), (Compare, False)]
    for stage, same in stages:
        recipes = [
            stage.recipe(stage.Settings(), {**prints, "evidence": table}) for table in ("a", "b")
        ]
        assert (recipes[0].fingerprint == recipes[1].fingerprint) is same
        assert (recipes[0].params.get("evidence_version") == Evidence.version) is same


@pytest.mark.parametrize("stage", [Compare, Trends, Uncertainty])
@pytest.mark.parametrize("has_workers", [True, False])
def test_a_finished_table_too_large_for_a_worker_is_refused(
    build, stage, has_workers, tmp_path, monkeypatch
):
    """The stage that reads it says so by its own name, and starts nothing."""

    class Small(Cluster):
        @property
        def memory_limit_bytes(self) -> int | None:
            return 100 << 20 if has_workers else None

    if not has_workers:
        monkeypatch.setattr("sos_dask.run.cluster.memory_bytes", lambda: 100 << 20)
    model = build / "lamost.model.polynomial"
    more = {Compare: {"model.polynomial": model}, Trends: {}, Uncertainty: {"model": model}}
    monkeypatch.setattr(Evidence, "make", lambda *_: pytest.fail("the table is finished"))
    inputs = {"evidence": build / "lamost.evidence", **more[stage]}
    n_pairs = Manifest.load(build / "lamost.evidence").rows.n_out
    with pytest.raises(ClusterError) as caught:
        stage(inputs).run(tmp_path / "out", cluster=Small())
    wanted = f"{stage.name}: {n_pairs:,} pairs of {build / 'lamost.evidence'}"
    assert wanted in str(caught.value), str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert list((tmp_path / "out").glob("*.parquet")) == []

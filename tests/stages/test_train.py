"""Training as a stage: what is held out and what is predicted of it, who is asked to work."""

import json
import re

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sos_dask import corrections as models
from sos_dask.api import crossmatch, train
from sos_dask.corrections import estimators
from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.figures import held_out_metrics
from sos_dask.run.cluster import Cluster
from sos_dask.schema import LABELS
from sos_dask.stages import train as stage
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.stages.train import PairsSource, TrainSettings, asks_workers, metrics_of
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.skies import write_catalog
from tests.stages.clumps import N_ROWS, rows_of, sky
from tests.stages.pairs import used


def columns(table, names):
    return np.stack([table[name].to_numpy() for name in names], axis=1)


@pytest.mark.parametrize("method", ["boosted", "polynomial", "hybrid"])
def test_held_out_pairs_are_predicted_as_the_saved_model_corrects(small_store, tmp_path, method):
    pairs = Catalog.open(small_store / "current/lamost.pairs")
    settings = TrainSettings(
        method=method, params={"n_rounds": 20} if method == "boosted" else {}, validation="holdout"
    )
    train(pairs, tmp_path / "model", settings)
    held_out = pq.read_table(tmp_path / "model/held_out.parquet")
    found = models.load(tmp_path / "model").predict(
        columns(held_out, [f"x_{label}" for label in LABELS])
    )
    assert np.isfinite(found).any(axis=0).all()
    np.testing.assert_array_equal(found, columns(held_out, [f"{label}_delta" for label in LABELS]))


def test_workers_are_asked_for_many_pairs_a_search_and_a_gpu(small_store, monkeypatch):
    pairs = Catalog.open(small_store / "current/lamost.pairs")
    assert not asks_workers(pairs, TrainSettings(method="boosted", params={"device": "cpu"}))
    assert asks_workers(pairs, TrainSettings(method="boosted", params={"device": "cuda"}))
    assert asks_workers(pairs, TrainSettings(method="polynomial", params={}, search=3))
    monkeypatch.setattr(stage, "LOCAL_PAIRS", pairs.n_rows - 1)
    assert asks_workers(pairs, TrainSettings(method="polynomial", params={}))


@pytest.mark.parametrize(
    ("distributed", "is_elsewhere", "on_workers"),
    [
        ("auto", False, False), ("auto", True, True), ("always", False, True),
        ("never", True, False),
    ],
)  # fmt: skip
def test_where_fits_are_data_parallel(
    build, cluster, tmp_path, monkeypatch, distributed, is_elsewhere, on_workers
):
    """Few pairs: on workers where these are elsewhere, or where it is asked for."""
    clients, fit = [], models.fit

    def seen(*given, client=None, **more):
        clients.append(client)
        return fit(*given, **more)

    monkeypatch.setattr(models, "fit", seen)
    monkeypatch.setattr(Cluster, "is_elsewhere", is_elsewhere)
    settings = TrainSettings(method="polynomial", params={"order": 1}, distributed=distributed)
    pairs = Catalog.open(build / "lamost.pairs")
    made = train(pairs, tmp_path / "model", settings, cluster=cluster)
    here = set() if is_elsewhere and not on_workers else {on_workers}
    assert {client is not None for client in clients} == here
    assert "distributed" not in made.recipe.params["settings"], "how it is made is no part of it"


@pytest.mark.parametrize(
    ("method", "params", "validation", "distributed"),
    [
        ("polynomial", {"order": 1}, "kfold", "never"),
        ("boosted", {"n_rounds": 5}, "holdout", "auto"),
        ("hybrid", {"n_rounds": 5, "order": 1}, "holdout", "auto"),
        ("simex", {"replicas": 1, "order": 1, "max_passes": 2}, "holdout", "auto"),
        ("symbolic", {"generations": 1}, "holdout", "auto"),
    ],
)
def test_a_driver_whose_workers_are_elsewhere_does_nothing_heavy(
    small_store, cluster, tmp_path, monkeypatch, method, params, validation, distributed
):
    """It may be on a login node: it reads no pairs, and makes no tables and no predictions."""
    given = {"method": method, "params": params, "validation": validation}
    settings = TrainSettings(**given, distributed=distributed)
    pairs = write_catalog(rows_of(small_store / "current/lamost.pairs"), tmp_path / "pairs")
    here = train(pairs, tmp_path / "here", TrainSettings(**given))

    def heavy(*_):
        raise AssertionError("in the driver")

    monkeypatch.setattr(Cluster, "is_elsewhere", True)
    monkeypatch.setattr(PairsSource, "load", heavy)
    monkeypatch.setattr(models.Correction, "predict", heavy)
    monkeypatch.setattr(models.class_of(method), "evaluate", heavy)
    monkeypatch.setattr(models.class_of(method), "files", heavy)
    monkeypatch.setattr(models.class_of("boosted"), "evaluate", heavy)
    there = train(pairs, tmp_path / "there", settings, cluster=cluster)
    assert {one.path: one.sha256 for one in there.files} == {
        one.path: one.sha256 for one in here.files
    }
    assert there.summary == here.summary


def test_always_on_workers_needs_some(build, tmp_path):
    settings = TrainSettings(method="boosted", distributed="always")
    with pytest.raises(ConfigError, match="needs workers"):
        train(Catalog.open(build / "lamost.pairs"), tmp_path / "model", settings)


def test_validation_is_by_the_number_of_pairs(build, tmp_path):
    pairs = Catalog.open(build / "lamost.pairs")
    n = used(build).num_rows
    for limit, expected in ((n, "holdout"), (n + 1, "kfold")):
        settings = TrainSettings(method="polynomial", params={"order": 1}, kfold_limit=limit)
        manifest = train(pairs, tmp_path / expected, settings)
        assert manifest.summary["validation"] == expected


def test_pairs_that_are_kept_are_those_that_are_read(build, monkeypatch):
    source = stage.PairsSource(Catalog.open(build / "lamost.pairs"))
    for index in range(source.n_batches):
        kept = source.load(index)
        assert source.load(index) is kept
        with monkeypatch.context() as patch:
            patch.setattr(stage, "_KEPT_ROWS", source.catalog.n_rows - 1)
            again = source.load(index)
        assert again is not kept
        for name, values in vars(kept).items():
            np.testing.assert_array_equal(values, getattr(again, name))


def test_a_search_sees_the_folds_that_train(build, tmp_path, monkeypatch):
    """Each fit has its own search, of the folds that it trains on; the best of them is fitted."""
    asked = []

    def found(method, source, folds, params, n, seed, client):
        asked.append((folds, n, seed, params["max_depth"]))
        return {**params, "n_rounds": 2, "max_depth": len(asked)}, [{"params": {}, "loss": 0.5}]

    monkeypatch.setattr(estimators, "search", found)
    settings = TrainSettings(
        method="boosted", params={"n_rounds": 3}, validation="holdout", search=4, seed=7
    )
    manifest = train(Catalog.open(build / "lamost.pairs"), tmp_path / "model", settings)
    folds = sorted(map(int, manifest.summary["folds"]))
    (one,) = asked
    assert one[:3] == (folds[1:], 4, 7)
    assert manifest.summary["params"]["max_depth"] == 1
    trials = json.loads((tmp_path / "model/search.json").read_text())
    assert trials == [{"train_folds": folds[1:], "trials": [{"params": {}, "loss": 0.5}]}]
    monkeypatch.setattr(models.class_of("polynomial"), "search", {})
    plain = TrainSettings(method="polynomial", params={"order": 1}, search=4)
    train(Catalog.open(build / "lamost.pairs"), tmp_path / "plain", plain)
    assert len(asked) == 1 and not (tmp_path / "plain/search.json").exists()


def test_every_held_out_pair_is_predicted_once(current):
    manifest = Manifest.load(current / "lamost.model.polynomial")
    pairs = rows_of(current / "lamost.pairs")
    used = pairs.filter(pairs["use"])
    held_out = pq.read_table(current / "lamost.model.polynomial/held_out.parquet")
    for name in ("teff_diff", "logg_diff", "feh_diff"):
        assert sorted(held_out[name].to_pylist()) == sorted(used[name].to_pylist())
    assert manifest.summary["validation"] == "kfold"
    assert sum(manifest.summary["folds"].values()) == used.num_rows == manifest.rows.n_out

    def matrix(suffix):
        return np.stack([held_out[f"{label}_{suffix}"].to_numpy() for label in LABELS], axis=1)

    again = held_out_metrics("polynomial", LABELS, matrix("diff"), matrix("delta"))
    assert again == metrics_of(manifest)
    assert all(metric.n == used.num_rows for metric in again)
    assert models.load(current / "lamost.model.polynomial").info.train_folds is None


def test_held_out_predictions_come_from_models_that_never_saw_the_fold(current):
    pairs = Catalog.open(current / "lamost.pairs")
    problem = models.load(current / "lamost.model.polynomial").problem
    source = PairsSource(pairs, problem)
    folds = sorted(set(rows_of(current / "lamost.pairs")["fold"].to_pylist()))
    held_out = pq.read_table(current / "lamost.model.polynomial/held_out.parquet")
    fold = folds[1]
    correction = models.fit("polynomial", source, train_folds=[f for f in folds if f != fold])
    rows = held_out.filter(pc.equal(held_out["fold"], fold))
    x = columns(rows, [f"x_{column}" for column in problem.columns])
    assert "x_snr" in rows.column_names
    expected = np.stack([rows[f"{label}_delta"].to_numpy() for label in LABELS], axis=1)
    np.testing.assert_array_equal(correction.predict(x), expected)


def test_holdout_never_trains_on_fold_zero(current, tmp_path):
    pairs = Catalog.open(current / "lamost.pairs")
    settings = TrainSettings(method="polynomial", params={"order": 2}, validation="holdout")
    manifest = train(pairs, tmp_path / "model", settings)
    names = sorted(int(fold) for fold in manifest.summary["folds"])
    assert models.load(tmp_path / "model").info.train_folds == tuple(names[1:])
    held_out = pq.read_table(tmp_path / "model/held_out.parquet")
    assert set(held_out["fold"].to_pylist()) == {names[0]}
    assert held_out.num_rows == manifest.summary["folds"][str(names[0])]


@pytest.mark.parametrize(
    ("method", "params", "validation", "message"),
    [
        ("polynomal", {}, "auto", "there is no method 'polynomal'"),
        ("polynomial", {"ordr": 3}, "auto", "method 'polynomial': unknown key 'ordr'"),
        (
            "polynomial",
            {"order": 99},
            "auto",
            "method 'polynomial': order: must be less than or equal to 6 (given: 99)",
        ),
        ("polynomial", {"order": "high"}, "auto", "order: must be a valid integer (given: 'high')"),
        (
            "polynomial",
            {},
            "kfolds",
            "must be 'auto', 'kfold' or 'holdout' (given: 'kfolds')",
        ),
    ],
)
def test_wrong_settings_of_training_leave_nothing(
    current, tmp_path, method, params, validation, message
):
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(
            Catalog.open(current / "lamost.pairs"),
            tmp_path / "m",
            TrainSettings(method=method, params=params, validation=validation),
        )
    assert not (tmp_path / "m").exists()


def test_too_few_pairs_is_an_error(stars, tmp_path):
    left = write_catalog(sky(N_ROWS, 1).slice(0, 12), tmp_path / "few", 100)
    crossmatch(
        left,
        left,
        tmp_path / "pairs",
        CrossmatchSettings(radius_arcsec=0.001, id_radius_arcsec=0.001),
    )
    with pytest.raises(ModelError, match="pairs"):
        train(
            Catalog.open(tmp_path / "pairs"),
            tmp_path / "m",
            TrainSettings(method="polynomial", params={}),
        )
    assert not (tmp_path / "m").exists()

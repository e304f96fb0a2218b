"""Training as a stage: what is held out, who is asked, what a search is given."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from sos_dask import corrections as models
from sos_dask.api import train
from sos_dask.schema import LABELS
from sos_dask.stages import train as stage
from sos_dask.stages.train import TrainSettings, asks_workers
from sos_dask.storage.catalog import Catalog
from tests.stages.pairs import used


def columns(table, names):
    return np.stack([table[name].to_numpy() for name in names], axis=1)


@pytest.mark.parametrize("method", ["boosted", "polynomial", "hybrid"])
def test_held_out_pairs_are_predicted_as_the_saved_model_corrects(small_store, tmp_path, method):
    pairs = Catalog.open(small_store / "current/pairs")
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
    pairs = Catalog.open(small_store / "current/pairs")
    assert not asks_workers(pairs, TrainSettings(method="boosted", params={"device": "cpu"}))
    assert asks_workers(pairs, TrainSettings(method="boosted", params={"device": "cuda"}))
    assert asks_workers(pairs, TrainSettings(method="polynomial", params={}, search=3))
    monkeypatch.setattr(stage, "LOCAL_PAIRS", pairs.n_rows - 1)
    assert asks_workers(pairs, TrainSettings(method="polynomial", params={}))


def test_validation_is_by_the_number_of_pairs(build, tmp_path):
    pairs = Catalog.open(build / "pairs")
    n = used(build).num_rows
    for limit, expected in ((n, "holdout"), (n + 1, "kfold")):
        given = {"method": "polynomial", "params": {"order": 1}, "kfold_limit": limit}
        manifest = train(pairs, tmp_path / expected, TrainSettings(**given))
        assert manifest.summary["validation"] == expected


def test_pairs_that_are_kept_are_those_that_are_read(build, monkeypatch):
    source = stage.PairsSource(Catalog.open(build / "pairs"))
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

    monkeypatch.setattr(stage, "search", found)
    given = {"params": {"n_rounds": 3}, "validation": "holdout", "search": 4, "seed": 7}
    settings = TrainSettings(method="boosted", **given)
    manifest = train(Catalog.open(build / "pairs"), tmp_path / "model", settings)
    folds = sorted(map(int, manifest.summary["folds"]))
    (one,) = asked
    assert one[:3] == (folds[1:], 4, 7)
    assert manifest.summary["params"]["max_depth"] == 1
    trials = json.loads((tmp_path / "model/search.json").read_text())
    assert trials == [{"train_folds": folds[1:], "trials": [{"params": {}, "loss": 0.5}]}]
    plain = TrainSettings(method="polynomial", params={"order": 1}, search=4)
    train(Catalog.open(build / "pairs"), tmp_path / "plain", plain)
    assert len(asked) == 1 and not (tmp_path / "plain/search.json").exists()

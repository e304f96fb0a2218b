import numpy as np
import pyarrow.parquet as pq
import pytest

from sos_dask import corrections as models
from sos_dask.api import train
from sos_dask.schema import LABELS
from sos_dask.stages import train as stage
from sos_dask.stages.train import TrainSettings, asks_workers
from sos_dask.storage.catalog import Catalog


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

"""What models predict of pairs that they were not trained on."""

import re

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sos_dask import corrections as models
from sos_dask.api import crossmatch, train
from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.figures import held_out_metrics
from sos_dask.schema import LABELS
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.stages.train import PairsSource, TrainSettings, metrics_of
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.sky import write_catalog
from tests.stages.clumps import N_ROWS, rows_of, sky


def test_every_held_out_pair_is_predicted_once(current):
    manifest = Manifest.load(current / "model.polynomial")
    pairs = rows_of(current / "pairs")
    used = pairs.filter(pairs["use"])
    held_out = pq.read_table(current / "model.polynomial/held_out.parquet")
    for name in ("teff_diff", "logg_diff", "feh_diff"):
        assert sorted(held_out[name].to_pylist()) == sorted(used[name].to_pylist())
    assert manifest.summary["validation"] == "kfold"
    assert sum(manifest.summary["folds"].values()) == used.num_rows == manifest.rows.n_out

    def matrix(suffix):
        return np.stack([held_out[f"{label}_{suffix}"].to_numpy() for label in LABELS], axis=1)

    again = held_out_metrics("polynomial", LABELS, matrix("diff"), matrix("delta"))
    assert again == metrics_of(manifest)
    assert all(metric.n == used.num_rows for metric in again)
    assert models.load(current / "model.polynomial").info.train_folds is None


def test_held_out_predictions_come_from_models_that_never_saw_the_fold(current):
    pairs = Catalog.open(current / "pairs")
    source = PairsSource(pairs)
    folds = sorted(set(rows_of(current / "pairs")["fold"].to_pylist()))
    held_out = pq.read_table(current / "model.polynomial/held_out.parquet")
    fold = folds[1]
    correction = models.fit("polynomial", source, train_folds=[f for f in folds if f != fold])
    rows = held_out.filter(pc.equal(held_out["fold"], fold))
    x = np.stack([rows[f"x_{label}"].to_numpy() for label in LABELS], axis=1)
    expected = np.stack([rows[f"{label}_delta"].to_numpy() for label in LABELS], axis=1)
    np.testing.assert_array_equal(correction.predict(x), expected)


def test_holdout_never_trains_on_fold_zero(current, tmp_path):
    pairs = Catalog.open(current / "pairs")
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
        ("polynomial", {"ordr": 3}, "auto", "no parameter 'ordr'"),
        ("polynomial", {"order": 99}, "auto", "polynomial.order = 99 is outside"),
        ("polynomial", {"order": "high"}, "auto", "is not a whole number"),
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
            Catalog.open(current / "pairs"),
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

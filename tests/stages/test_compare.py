"""The comparison of a whole store: against the pairs and models themselves, and bad input."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sos_dask import corrections as models
from sos_dask.api import train
from sos_dask.errors import CatalogError, ClusterError, ConfigError, ModelError, SosError
from sos_dask.evidence.failing import BIN_SCHEMA
from sos_dask.evidence.figures import FIGURE_SCHEMA, STATISTICS, SUBSETS
from sos_dask.evidence.smoothness import ARTIFACT_SCHEMA, OUTSIDE_SCHEMA
from sos_dask.run.cluster import Cluster
from sos_dask.schema import LABELS
from sos_dask.stages.compare import Compare, CompareSettings
from sos_dask.stages.evidence import read_evidence
from sos_dask.stages.sample import read_sample
from sos_dask.stages.train import TrainSettings
from sos_dask.stats.numbers import scatter
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.job import contents
from tests.skies import write_catalog
from tests.stages.pairs import column, read, used
from tests.steps import compare, features

FEW = CompareSettings(n_bootstrap=100, min_bin_pairs=20)


@pytest.fixture(scope="module")
def trained(build, tmp_path_factory) -> dict[str, Path]:
    """A straight correction and one of order 3, whose held-out pairs are of every fold."""
    folder = tmp_path_factory.mktemp("models")
    pairs = Catalog.open(build / "lamost.pairs")
    for name, order in (("straight", 1), ("cubic", 3)):
        train(
            pairs,
            folder / name,
            TrainSettings(method="polynomial", params={"order": order}, validation="kfold"),
        )
    return {name: folder / name for name in ("straight", "cubic")}


@pytest.fixture(scope="module")
def compared(build, trained, tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("compared") / "out"
    compare(Catalog.open(build / "lamost.pairs"), trained, directory, FEW)
    return directory


def test_a_rebuild_makes_the_comparison(build):
    manifest = Manifest.load(build / "lamost.comparison")
    assert set(manifest.recipe.inputs) == {"evidence", "model.polynomial", "sample"}
    assert {record.path for record in manifest.files} == {
        "comparison.parquet", "artifacts.parquet", "outside.parquet", "bins.parquet",
    }  # fmt: skip
    assert manifest.rows.n_in == Catalog.open(build / "lamost.pairs").n_rows
    assert manifest.rows.n_out == used(build).num_rows
    assert manifest.summary["method"] == "polynomial"
    assert len(manifest.summary["metrics"]) == 3


def test_tables_have_every_figure(compared):
    tables = {
        name: pq.read_table(compared / f"{name}.parquet")
        for name in ("comparison", "artifacts", "outside", "bins")
    }
    assert [path.name for path in compared.parent.iterdir()] == ["out"], "its table is removed"
    schemas = [table.schema.remove_metadata() for table in tables.values()]
    assert schemas == [FIGURE_SCHEMA, ARTIFACT_SCHEMA, OUTSIDE_SCHEMA, BIN_SCHEMA]
    assert set(tables["bins"]["weighting"].to_pylist()) == {"pairs"}, "no rows were given"
    n = 3 * 3 * 2 * len(SUBSETS) * len(STATISTICS)
    assert tables["comparison"].num_rows == n
    assert len({tuple(row.values())[:5] for row in tables["comparison"].to_pylist()}) == n
    assert tables["artifacts"].num_rows == 2 * 3
    assert tables["outside"].num_rows == 2 * 3 * 2


def test_held_out_figures_are_of_held_out_pairs_and_training_figures_of_the_saved_model(
    build, trained, compared
):
    found = {
        (row["method"], row["label"], row["sample"], row["statistic"]): row
        for row in Compare.load(compared)["figures"]
        if row["subset"] == "all"
    }
    pairs = used(build)
    for name, model in trained.items():
        held_out = pq.read_table(model / "held_out.parquet")
        predicted = models.load(model).predict(
            features(*(column(pairs, label) for label in LABELS))
        )
        for number, label in enumerate(LABELS):
            test = column(held_out, f"{label}_diff") - column(held_out, f"{label}_delta")
            fitted = column(pairs, f"{label}_diff") - predicted[:, number]
            for sample, values in (("test", test), ("train", fitted)):
                values = values[np.isfinite(values)]
                row = found[name, label, sample, "mad"]
                assert row["n"] == len(values)
                assert row["value"] == pytest.approx(scatter(values), abs=1e-12)
                assert found[name, label, sample, "median"]["value"] == pytest.approx(
                    np.median(values), abs=1e-12
                )
            before = column(pairs, f"{label}_diff")
            row = found["none", label, "test", "mad"]
            assert row["value"] == pytest.approx(scatter(before[np.isfinite(before)]), abs=1e-12)


def test_pairs_stand_for_the_rows_that_they_are_nearest_to(build):
    """Weighted bins of a label against a star-by-star search among all pairs."""
    names = ["teff", "logg", "feh", "snr", "held_out", "teff_diff", "teff_held_out_polynomial"]
    pairs = read_evidence(build / "lamost.evidence", names)
    pairs = pairs.filter(pairs["held_out"])
    rows = read_sample(build / "lamost.sample", good=True)
    x, at = (np.stack([column(one, name) for name in LABELS], axis=1) for one in (pairs, rows))
    at = at[np.isfinite(at).all(axis=1)]
    snr = column(rows.filter(np.isfinite(column(rows, "teff") + column(rows, "logg"))), "snr")
    center = np.median(x, axis=0)
    scale = 1.4826 * np.median(np.abs(x - center), axis=0)
    far = np.log(snr)[:, None] - np.log(column(pairs, "snr"))
    far = far**2 + sum((2 * (at[:, i, None] - x[:, i]) / scale[i]) ** 2 for i in range(len(LABELS)))
    nearest = np.argsort(far, axis=1)[:, :8]
    weight = np.bincount(nearest.ravel(), minlength=len(x))
    left = column(pairs, "teff_diff") - column(pairs, "teff_held_out_polynomial")
    found = {
        row["bin_low"]: row
        for row in Compare.load(build / "lamost.comparison")["bins"]
        if [row[name] for name in ("method", "label", "against", "band", "weighting")]
        == ["polynomial", "teff", "logg", "all", "rows"]
    }
    for low in (2.25, 2.5, 4.0, 4.25):
        inside = (x[:, 1] >= low) & (x[:, 1] < low + 0.25) & (weight > 0)
        w = np.repeat(left[inside], weight[inside])
        assert found[low]["n"] == inside.sum() > 10
        assert found[low]["median"] == pytest.approx(np.median(w), abs=3.0)
        kish = weight[inside].sum() ** 2 / (weight[inside] ** 2).sum()
        assert found[low]["n_effective"] <= kish * 1.001
    # Pairs are brighter than rows: with their weights they are less so.
    bright = column(pairs, "snr")
    assert np.median(snr) < np.average(bright, weights=weight) < np.mean(bright)


def test_the_thinnest_twentieth_of_the_training_pairs_is_sparse(build, compared):
    n = {
        (row["sample"], row["subset"]): row["n"]
        for row in Compare.load(compared)["figures"]
        if (row["method"], row["label"], row["statistic"]) == ("none", "teff", "mad")
    }
    for sample in ("train", "test"):
        total = n[sample, "all"]
        assert n[sample, "sparse"] == pytest.approx(0.05 * total, abs=1)
        assert n[sample, "sparse"] + n[sample, "dense"] == total
    assert n["test", "logg < 1"] == np.count_nonzero(column(used(build), "logg") < 1)


def test_the_better_method_is_chosen_and_said(build, trained, compared):
    found = Compare.load(compared)
    by = {r["method"]: r for r in found["artifacts"] if r["label"] == "logg"}
    assert by["straight"]["roughness"] == pytest.approx(0, abs=1e-3)
    assert by["cubic"]["roughness_low"] > by["straight"]["roughness_high"]
    assert by["cubic"]["noise"] == by["straight"]["noise"] > 0
    assert found["method"] == "cubic" and found["rule"] == "balanced"
    assert "straight is worse in " in found["why"]
    assert found["scores"]["straight"]["worse_in"]


def test_the_bytes_depend_neither_on_workers_nor_on_partitions(
    build, trained, compared, cluster, tmp_path
):
    whole = contents(compared)
    pairs = Catalog.open(build / "lamost.pairs")
    compare(pairs, trained, tmp_path / "workers", FEW, cluster=cluster)
    assert contents(tmp_path / "workers") == whole
    table = read(pairs.path)
    cut = write_catalog(table, tmp_path / "pairs", 50, "pairs")
    assert len(cut.pixels) > len(pairs.pixels)
    compare(cut, trained, tmp_path / "cut", FEW)
    again = contents(tmp_path / "cut")
    del whole["manifest.json"], again["manifest.json"]
    assert again == whole


def test_a_stopped_run_goes_on(build, trained, compared, tmp_path, monkeypatch):
    part = Compare.figures_of
    done: list[str] = []

    def stopping(self, output, label, item):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(label)
        return part(self, output, label, item)

    pairs = Catalog.open(build / "lamost.pairs")
    with monkeypatch.context() as patch:
        patch.setattr(Compare, "figures_of", stopping)
        with pytest.raises(KeyboardInterrupt):
            compare(pairs, trained, tmp_path / "out", FEW)
    monkeypatch.setattr(Compare, "artifacts_of", lambda *_: pytest.fail("was done before"))
    compare(pairs, trained, tmp_path / "out", FEW)
    assert contents(tmp_path / "out") == contents(compared)


def test_holdout_compares_on_the_pairs_that_no_model_saw(build, tmp_path):
    pairs = Catalog.open(build / "lamost.pairs")
    train(
        pairs,
        tmp_path / "model",
        TrainSettings(method="polynomial", params={"order": 2}, validation="holdout"),
    )
    manifest = compare(pairs, {"polynomial": tmp_path / "model"}, tmp_path / "out", FEW)
    fold = used(build)["fold"].to_numpy()
    assert manifest.summary["n_test"] == np.count_nonzero(fold == 0)
    assert manifest.summary["n_train"] == np.count_nonzero(fold != 0)


# -- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def model(trained, tmp_path) -> Path:
    """A copy of a model, free to be damaged."""
    return Path(shutil.copytree(trained["cubic"], tmp_path / "model"))


def refused(
    build: Path, given: dict[str, Path], out: Path, error: type[SosError], text: str
) -> None:
    with pytest.raises(error, match=text):
        compare(Catalog.open(build / "lamost.pairs"), given, out, FEW)
    assert not (out / "manifest.json").exists()


def test_models_that_are_none(build, model, tmp_path):
    out = tmp_path / "out"
    refused(build, {}, out, ModelError, "no model to compare")
    refused(build, {"x": tmp_path / "gone"}, out, CatalogError, "gone does not exist")
    refused(build, {"x": build / "lamost.pairs"}, out, ModelError, "is not a trained model but")
    assert not out.exists()
    (model / "coefficients.json").write_text("{}")
    refused(build, {"x": model}, out, CatalogError, r"coefficients\.json has 2 bytes")


def test_damaged_held_out_pairs(build, model, trained, tmp_path):
    path, out = model / "held_out.parquet", tmp_path / "out"
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    refused(build, {"x": model}, out, CatalogError, r"held_out\.parquet has \d+ bytes")
    path.unlink()
    refused(build, {"x": model}, out, CatalogError, r"held_out\.parquet is missing")
    assert not out.exists(), "nothing is left of a run that made nothing"


def test_models_of_other_pairs_or_validation(build, trained, tmp_path):
    pairs = Catalog.open(build / "lamost.pairs")
    table = read(pairs.path)
    other = write_catalog(table.slice(3), tmp_path / "other")
    with pytest.raises(CatalogError, match="does not hold the pairs"):
        compare(other, trained, tmp_path / "out", FEW)
    train(
        pairs,
        tmp_path / "holdout",
        TrainSettings(method="polynomial", params={"order": 2}, validation="holdout"),
    )
    given = {**trained, "holdout": tmp_path / "holdout"}
    refused(build, given, tmp_path / "out", ModelError, "'holdout' holds out other pairs")


def test_settings_that_cannot_be(build, trained, tmp_path):
    pairs = Catalog.open(build / "lamost.pairs")
    with pytest.raises(ConfigError, match="no rule 'smoothest'"):
        compare(pairs, trained, tmp_path / "out", CompareSettings(rule="smoothest"))
    with pytest.raises(ModelError, match="at least 100000 are needed"):
        compare(pairs, trained, tmp_path / "out", CompareSettings(min_pairs=100_000))

    class Small(Cluster):
        @property
        def memory_limit_bytes(self) -> int | None:
            return 100 << 20

    with pytest.raises(ClusterError, match=r"evidence: .* pairs of"):
        compare(pairs, trained, tmp_path / "other", FEW, cluster=Small())


def test_another_output_is_no_comparison(build, compared):
    with pytest.raises(CatalogError, match="is not an output of 'compare' but of 'crossmatch'"):
        Compare.load(build / "lamost.pairs")
    with pytest.raises(CatalogError, match="does not exist"):
        Compare.load(build / "gone")

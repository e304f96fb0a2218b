"""The stage that leaves groups of pairs out of training."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sos_dask.corrections import Batch, fit
from sos_dask.errors import ModelError
from sos_dask.evidence.figures import (
    DENSITY,
    REFERENCE,
)
from sos_dask.problem import DEFAULT, KNOWN_INPUTS, Label, Problem
from sos_dask.schema import LABELS
from sos_dask.stages.compare import Trends
from sos_dask.stages.evidence import EvidenceSettings
from sos_dask.stages.train import TABLE, Generalisation, GeneralisationSettings
from sos_dask.stats.numbers import scatter
from tests.job import contents
from tests.skies import write_catalog
from tests.steps import generalisation, make_evidence

METHODS: dict[str, dict[str, float]] = {"polynomial": {"order": 2}, "boosted": {"n_rounds": 100}}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs whose difference is linear, but for cool giants, where it is 0.5 dex larger."""
    rng = np.random.default_rng(5)
    n = 3000
    teff, logg = rng.uniform(4600, 6900, n), rng.uniform(2.1, 4.9, n)
    apart = (teff < 5250) & (logg < 3.5)
    diffs = np.where(apart, 0.5, 0.0) + rng.normal(0, 0.05, n)
    columns = {
        "_healpix_29": np.sort(rng.integers(0, 12 << 58, n)),
        "teff": teff, "logg": logg, "feh": rng.uniform(-1, 0.3, n), "snr": rng.uniform(20, 90, n),
        "teff_diff": 1000.0 * diffs, "logg_diff": diffs, "feh_diff": diffs + 0.1 * (logg - 3.0),
        "fold": rng.integers(0, 5, n).astype(np.int8), "use": rng.random(n) < 0.95,
        "reference_star_id": [f"star {number}" for number in range(n)],
        "survey_ref": np.where(rng.random(n) < 0.4, "galah", "apogee"),
    }  # fmt: skip
    table = pa.table(columns)
    return write_catalog(table, tmp_path_factory.mktemp("pairs") / "pairs", name="pairs")


@pytest.fixture(scope="module")
def made(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generalisation") / "alone"
    manifest = generalisation(pairs, folder, METHODS, GeneralisationSettings(min_pairs=100))
    return folder, manifest, pq.read_table(folder / TABLE).to_pandas()


def test_a_region_unlike_the_others_is_found_out_only_by_leaving_it_out(made):
    _, manifest, table = made
    assert manifest.summary["refused"] == {}
    cool = "4500 <= Teff < 5250, 2 <= log g < 3.5"
    rows = table[(table.group == cool) & (table.label == "logg")].set_index("method")
    assert set(rows.index) == {"none", "polynomial", "boosted"}
    assert rows.loc["none", "median"] == pytest.approx(0.5, abs=0.02)
    # What was never seen cannot be corrected; what was seen is.
    assert rows.loc["boosted", "median"] > 0.2
    assert abs(rows.loc["boosted", "median_random"]) < 0.06


def test_figures_are_those_of_a_fit_without_the_group(pairs, made):
    """Brute force: the polynomial without one reference, and without the other folds."""
    _, _, table = made
    rows = pa.concat_tables([pairs.read(pixel) for pixel in pairs.pixels])
    rows = rows.filter(rows["use"])
    x, differences = DEFAULT.matrix(rows), DEFAULT.differences(rows)
    out = np.array(rows["survey_ref"].to_pylist()) == "galah"
    at_random = rows["fold"].to_numpy() == 0

    def left(train: np.ndarray, at: np.ndarray) -> np.ndarray:
        weight = np.ones(len(rows), np.float32)
        batch = Batch(x, differences, np.where(train, 0, 1).astype(np.int8), weight)

        class Source:
            problem, n_batches = DEFAULT, 1

            def load(self, index: int) -> Batch:
                return batch

        fitted = fit("polynomial", Source(), train_folds=[0], params=METHODS["polynomial"])
        return differences[at].astype(np.float64) - fitted.predict(x[at])

    expected = {
        "": left(~out, out),
        "_random": left(~at_random, out & at_random),
    }
    of_group = table[(table.split == REFERENCE) & (table.group == "galah")]
    for number, label in enumerate(LABELS):
        found = of_group[of_group.label == label].set_index("method")
        assert found.loc["polynomial", "n_train"] == np.count_nonzero(~out)
        for end, values in expected.items():
            row = found.loc["polynomial"]
            assert row[f"n{end}"] == len(values)
            assert row[f"median{end}"] == np.median(values[:, number])
            assert row[f"mad{end}"] == scatter(values[:, number])
        bare = differences[out, number].astype(np.float64)
        for end in ("", "_random"):
            assert found.loc["none", f"n{end}"] == len(bare)
            assert found.loc["none", f"median{end}"] == np.median(bare)


def test_references_and_sparse_pairs_are_left_out_too(made):
    _, manifest, table = made
    groups = [tuple(group) for group in manifest.summary["groups"]]
    assert (DENSITY, "sparse") in groups
    assert [g for s, g in groups if s == REFERENCE] == ["apogee", "galah"]
    swapped = table[(table.split == REFERENCE) & (table.method == "boosted")]
    # Both references have the same scale here, so neither needs the other.
    assert (swapped.set_index("label").loc["feh", "median"].abs() < 0.02).all()
    counts = swapped.drop_duplicates("group").set_index("group")
    assert counts.loc["apogee", "n"] == counts.loc["galah", "n_train"]


def test_rows_add_up_and_workers_make_the_same_bytes(pairs, made, cluster, tmp_path):
    folder, manifest, _ = made
    used = sum(int(pairs.read(pixel, ["use"])["use"].to_numpy().sum()) for pixel in pairs.pixels)
    assert manifest.rows.n_out == used
    settings = GeneralisationSettings(min_pairs=100)
    generalisation(pairs, tmp_path / "there", METHODS, settings, cluster=cluster)
    assert contents(tmp_path / "there") == contents(folder)


def test_many_pairs_are_sampled(pairs, tmp_path):
    settings = GeneralisationSettings(max_pairs=1500, min_pairs=100)
    manifest = generalisation(pairs, tmp_path / "x", {"polynomial": {"order": 1}}, settings)
    assert manifest.rows.n_out == 1500


def test_too_few_pairs_are_refused_and_leave_nothing(pairs, tmp_path):
    settings = GeneralisationSettings(min_pairs=2000)
    with pytest.raises(ModelError, match=r"no group of \d+ pairs can be left out"):
        generalisation(pairs, tmp_path / "x", METHODS, settings)
    assert not (tmp_path / "x").exists()


def test_other_labels_and_inputs_are_as_good(tmp_path):
    """A radial velocity by two inputs, of pairs that have no log g."""
    rng = np.random.default_rng(6)
    n = 3000
    teff, feh = rng.uniform(4000, 7500, n), rng.uniform(-2, 0.5, n)
    columns = {
        "_healpix_29": np.sort(rng.integers(0, 12 << 58, n)),
        "teff": teff, "feh": feh, "rv": rng.normal(0, 30, n),
        "rv_diff": 2.0 + feh + (teff - 5500) / 1000 + rng.normal(0, 0.5, n),
        "fold": rng.integers(0, 5, n).astype(np.int8), "use": np.ones(n, bool),
        "reference_star_id": [f"star {number}" for number in range(n)],
    }  # fmt: skip
    pairs = write_catalog(pa.table(columns), tmp_path / "pairs")
    problem = Problem(labels=(Label(name="rv"),), inputs=(KNOWN_INPUTS[0], KNOWN_INPUTS[2]))
    make_evidence(pairs, {}, tmp_path / "evidence", EvidenceSettings(problem=problem))
    given = {"evidence": tmp_path / "evidence"}
    settings = GeneralisationSettings(methods=METHODS, min_pairs=100)
    Generalisation(given, settings).run(tmp_path / "out")
    found = pq.read_table(tmp_path / "out" / TABLE).to_pandas()
    assert set(found["label"]) == {"rv"} and set(found["split"]) == {DENSITY}
    by_method = found.set_index("method")
    assert by_method.loc["polynomial", "mad"] < 0.6 < by_method.loc["none", "mad"]
    Trends(given).run(tmp_path / "trends")
    trends = pq.read_table(tmp_path / "trends" / "trends.parquet").to_pandas()
    assert set(trends["label"]) == {"rv"} and set(trends["against"]) == {"teff", "feh"}
    assert pq.read_table(tmp_path / "trends" / "planes.parquet").num_rows == 0

"""Errors of a whole store: what the stage writes, what apply makes of it, and its refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from sos_dask.api import crossmatch, train
from sos_dask.columns import floats, floats32
from sos_dask.correct import FLAG_OUTSIDE, FLAG_SPARSE
from sos_dask.errors import CatalogError, ModelError
from sos_dask.evidence.coverage import CoverageModel
from sos_dask.evidence.intervals import load_errors
from sos_dask.problem import DEFAULT, Input, Problem
from sos_dask.schema import LABELS
from sos_dask.settings import sealed, to_json
from sos_dask.stages.evidence import read_evidence
from sos_dask.stages.reference import common_stars
from sos_dask.stages.train import TrainSettings
from sos_dask.stages.uncertainty import Uncertainty, UncertaintySettings
from sos_dask.stars.repeats import normalisation
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.surveys.definition import load_survey
from tests.job import contents
from tests.skies import write_catalog
from tests.stages.pairs import read
from tests.steps import Surveys, apply, uncertainty


def surveys(build: Path) -> Surveys:
    return Surveys(
        "lamost",
        Catalog.open(build / "lamost.stars"),
        Catalog.open(build / "reference"),
        {name: Catalog.open(build / f"{name}.stars") for name in ("apogee", "galah")},
    )


def run(build: Path, directory: Path, **settings) -> Manifest:
    return uncertainty(
        build / "lamost.model.polynomial",
        Catalog.open(build / "lamost.pairs"),
        directory,
        UncertaintySettings(**settings),
        surveys(build),
    )


@pytest.fixture(scope="module")
def alone(build, tmp_path_factory) -> Path:
    """Errors made by the single step."""
    directory: Path = tmp_path_factory.mktemp("uncertainty") / "one"
    run(build, directory)
    return directory


def test_a_rebuild_makes_the_errors(build):
    directory = build / "lamost.uncertainty"
    manifest = Manifest.load(directory)
    assert {one.path for one in manifest.files} == {
        "error.json", "error.npy", "calibration.parquet", "correlations.parquet",
    }  # fmt: skip
    used = read(build / "lamost.pairs").filter(pc.field("use"))
    assert manifest.rows.n_out == used.num_rows
    assert set(manifest.summary["error_factors"]) == {"lamost", "apogee", "galah"}
    calibration = Uncertainty.load(directory)["hit_rates"]
    assert {one["label"] for one in calibration} == set(LABELS)
    assert {one["level"] for one in calibration} == {0.68, 0.95}
    assert {"all", "dense", "sparse", "giants", "low snr"} <= {one["subset"] for one in calibration}
    for one in calibration:
        test = binomtest(round(one["hit_rate"] * one["n"]), one["n"])
        assert [one["low"], one["high"]] == list(test.proportion_ci(0.95))
        if one["subset"] in ("all", "dense"):
            low, high = test.proportion_ci(0.9999)
            assert low < one["level"] < high, one
    counted = [one for one in calibration if one["subset"] in ("dense", "sparse")]
    assert sum(one["n"] for one in counted) == 2 * 3 * used.num_rows
    assert manifest.summary["hit_rates"] == [
        one for one in calibration if one["subset"] in ("all", "dense", "sparse")
    ]


def test_subsets_are_those_of_the_pairs(build):
    """Counted on the table of evidence itself; where every pair is held out and of one star."""
    table = read_evidence(build / "lamost.evidence", [*LABELS, "snr"])
    teff, logg, feh, snr = (floats32(table, name) for name in (*LABELS, "snr"))
    low, high = np.quantile(snr, [1 / 3, 2 / 3])
    n = {
        (one["subset"], one["label"]): one["n"]
        for one in Uncertainty.load(build / "lamost.uncertainty")["hit_rates"]
    }
    expected = {
        "all": np.ones(len(teff), bool), "giants": logg < 3.5, "dwarfs": logg >= 3.5,
        "logg < 1": logg < 1, "feh > 0.2": feh > 0.2, "low snr": snr < low, "high snr": snr >= high,
    }  # fmt: skip
    for name, inside in expected.items():
        if inside.any():
            assert n[name, "teff"] == np.count_nonzero(inside), name
    assert n["dense", "teff"] + n["sparse", "teff"] == n["all", "teff"]
    assert n["dense cells", "feh"] + n["sparse cells", "feh"] == n["all", "feh"]
    assert n["sparse", "teff"] == pytest.approx(0.05 * n["all", "teff"], abs=1)


def test_errors_of_the_reference_are_normalised_by_its_survey(build, tmp_path, monkeypatch):
    seen = {}

    def fit_label(held_out, label, grid, cells):
        seen[label] = held_out
        raise ModelError("seen")

    def factor_of(label: str, kind: str, factor: float) -> dict[str, object]:
        limits = {"snr_low": None, "snr_high": None, "mean_snr": None}
        return {"label": label, "kind": kind, **limits, "n": 10**6, "factor": factor}

    factors = {
        "apogee": [factor_of("logg", "all", 2.0)],
        "galah": [factor_of("teff", "giant", 3.0)],
    }
    monkeypatch.setattr(Uncertainty, "_error_factors", lambda stage: factors)
    monkeypatch.setattr("sos_dask.evidence.intervals.fit_label", fit_label)
    with pytest.raises(ModelError, match="seen"):
        run(build, tmp_path / "out")
    held_out = seen[LABELS[0]]
    names = [*(f"{label}_err_ref" for label in LABELS), "logg_ref", "snr_ref", "survey_ref"]
    table = read_evidence(build / "lamost.evidence", [*names, "star", "target"])
    logg, snr = (floats(table, name) for name in ("logg_ref", "snr_ref"))
    for survey, of_survey in factors.items():
        mine = np.array(table["survey_ref"].to_pylist()) == survey
        for number, label in enumerate(LABELS):
            stated = floats(table, f"{label}_err_ref")[mine]
            factor = normalisation(of_survey, label, logg[mine], snr[mine])
            np.testing.assert_array_equal(held_out.reference_errors[mine, number], stated * factor)
            changes = (survey, label) in (("apogee", "logg"), ("galah", "teff"))
            assert (factor != 1).any() == changes
    for name in ("star", "target"):
        ids, where = np.unique(table[name].to_numpy(), return_inverse=True)
        parts = np.stack([np.bincount(where, held_out.part == k, len(ids)) for k in range(5)])
        assert (np.count_nonzero(parts, axis=0) == 1).all(), "one star, one part"
    stars = np.unique(table["star"].to_numpy(), return_index=True)[1]
    assert np.bincount(held_out.part[stars]).min() > 0.15 * len(stars)


def test_factors_of_stated_errors_are_those_that_were_simulated(build):
    """Stated / true error of dwarfs is 0.6 + 1.4 s / (s + 50), of rv 1.2 (`simulate`)."""
    factors = Manifest.load(build / "lamost.stars").summary["error_factors"]
    [rv] = [one for one in factors if (one["label"], one["kind"]) == ("rv", "all")]
    assert rv["low"] - 0.05 < 1 / 1.2 < rv["high"] + 0.05
    factors = [one for one in factors if one["label"] != "rv"]
    dwarfs = [f for f in factors if f["kind"] == "dwarf" and f["mean_snr"]]
    for one in dwarfs:
        assert one["n"] > 100
        share = one["mean_snr"] / (one["mean_snr"] + 50.0)
        assert one["low"] - 0.05 < 1 / (0.6 + 1.4 * share) < one["high"] + 0.05, one
    assert len(dwarfs) >= 6


def test_rows_behind_the_cut_for_duplicates_are_repeats(build):
    """APOGEE marks all rows of a star but one: without them nothing would tell of its errors."""
    quality = read(build / "apogee.observations")["quality"].to_numpy()
    marked = np.count_nonzero(quality == 1 << load_survey("apogee-dr17").cuts["duplicate"].bit)
    factors = Manifest.load(build / "apogee.stars").summary["error_factors"]
    n = {one["label"]: one["n"] for one in factors if one["kind"] == "all"}
    assert marked > 100 and n["teff"] > 0.6 * marked
    assert np.count_nonzero(read(build / "apogee.stars")["n_used"].to_numpy() > 1) < 0.1 * marked


def test_correlations_are_those_of_the_simulation(build):
    """Errors of its labels are independent; what a correction takes out of them is not."""
    found = Uncertainty.load(build / "lamost.uncertainty")["correlations"]
    assert found == Manifest.load(build / "lamost.uncertainty").summary["correlations"]
    whole = [one for one in found if (one["kind"], one["snr"]) == ("all", "all")]
    assert [(one["label"], one["other"]) for one in whole] == [
        ("teff", "logg"), ("teff", "feh"), ("logg", "feh")
    ]  # fmt: skip
    assert all(abs(one["correlation"]) < 0.25 + 4 * one["error"] for one in whole)


def test_corrected_rows_carry_the_errors(build):
    table = read(build / "lamost.corrected")
    errors = load_errors(build / "lamost.uncertainty")
    x = DEFAULT.matrix(table)
    own, wanted = errors.half_widths(x, table["snr"].to_numpy())
    kind = read(build / "lamost.coverage")["kind_coverage"].fill_null(0).to_numpy()
    known = CoverageModel.load(build / "lamost.coverage")
    factors = known.widths.widening(kind, errors.is_sparse(x).astype(np.int64), wanted)
    own *= factors.astype(np.float32)
    wanted *= factors.astype(np.float32)
    for number, label in enumerate(LABELS):
        column = table[f"{label}_sos_err"]
        assert column.null_count == table[f"{label}_sos"].null_count > 0
        known = column.is_valid().to_numpy()
        assert known.tolist() == table[f"{label}_sos"].is_valid().to_pylist()
        covered = known & (table["flag_sos"].to_numpy() & (FLAG_SPARSE | FLAG_OUTSIDE) == 0)
        assert covered.sum() > 100
        assert np.array_equal(column.to_numpy()[covered], own[covered, number])
        pair = table[f"{label}_sos_err_pair"].to_numpy()
        assert np.array_equal(pair[covered], wanted[covered, number])
        assert (column.to_numpy()[known] > 0).all()
    files = sorted((build / "lamost.corrected" / "dataset").rglob("Npix=*.parquet"))
    metadata = pq.read_schema(files[0]).field("teff_sos_err").metadata
    assert metadata[b"unit"] == b"K"
    assert metadata[b"ucd"] == b"stat.error;phys.temperature.effective"
    assert b"of corrected teff: that of corrected - reference" in metadata[b"description"]
    metadata = pq.read_schema(files[0]).field("teff_sos_err_pair").metadata
    assert b"for 95 % times" in metadata[b"description"]


def test_a_correction_by_other_inputs_is_refused(build, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(build / "lamost.model.polynomial", model)
    document = json.loads((model / "model.json").read_text())
    document["problem"]["inputs"][2]["column"] = "rv"
    (model / "model.json").write_bytes(to_json(sealed(document)))
    stage = Uncertainty({"evidence": build / "lamost.evidence", "model": model})
    with pytest.raises(ModelError, match=r"the correction is of teff, logg, feh by .* logg, rv"):
        stage.check()


def test_all_inputs_are_read(build, monkeypatch):
    problem = Problem(inputs=(*DEFAULT.inputs, Input(column="rv")))
    monkeypatch.setattr(Uncertainty, "problem", problem)
    inputs = {"evidence": build / "lamost.evidence", "model": build / "lamost.model.polynomial"}
    table, _ = Uncertainty(inputs)._pairs()
    assert problem.matrix(table).shape == (len(table), 4)


def test_the_same_in_any_partitions(build, alone, tmp_path):
    pairs = read(build / "lamost.pairs")
    again = write_catalog(pairs, tmp_path / "pairs", 20, "pairs")
    assert len(again.pixels) > len(Catalog.open(build / "lamost.pairs").pixels)
    uncertainty(
        build / "lamost.model.polynomial",
        again,
        tmp_path / "two",
        UncertaintySettings(),
        surveys(build),
    )
    one, two = contents(alone), contents(tmp_path / "two")
    for name in ("error.json", "error.npy", "calibration.parquet"):
        assert one[name] == two[name]
    assert contents((build / "lamost.uncertainty").resolve())["error.npy"] == one["error.npy"]


def test_single_observations_are_preferred(build, tmp_path):
    """Among pairs of stars, whose labels are combined."""
    stars, reference = (Catalog.open(build / name) for name in ("lamost.stars", "reference"))
    crossmatch(stars, reference, tmp_path / "pairs")
    pairs = Catalog.open(tmp_path / "pairs")
    train(pairs, tmp_path / "model", TrainSettings(method="polynomial", params={"order": 2}))
    given = tmp_path / "model", pairs
    single = uncertainty(*given, tmp_path / "single", UncertaintySettings(min_single=50))
    n_several = single.rows.dropped["of several observations"]
    used = read(pairs.path).filter(pc.field("use"))
    assert n_several == pc.sum(pc.greater(used["n_obs"], 1)).as_py() > 0
    everything = uncertainty(*given, tmp_path / "all", UncertaintySettings(min_single=10**6))
    assert everything.rows.dropped["of several observations"] == 0
    files = [(tmp_path / name / "error.npy").read_bytes() for name in ("single", "all")]
    assert files[0] != files[1]


def test_common_stars_have_the_labels_of_both(build):
    """All stars that both surveys have with a good row, each with the labels of its first one."""
    given = surveys(build).stars
    ((first, second, one, other),) = common_stars(Catalog.open(build / "reference"), given)
    assert (first, second) == ("apogee", "galah")
    good = {
        name: {str(row["star_id"]): row for row in read(build / f"{name}.stars").to_pylist()
               if row["quality"] == 0}
        for name in given
    }  # fmt: skip
    known = Manifest.load(build / "reference").summary["offsets"]
    offsets = {name: known.get(name, {}) for name in given}
    assert any(offsets.values()), "there is a zero point to forget"
    expected: dict[str, dict[str, dict]] = {name: {} for name in given}
    n_bad = 0
    for star in read(build / "reference").to_pylist():
        sources = [text.split(":", 1) for text in star["sources"].split(";")]
        rows = {name: [good[name].get(key) for survey, key in sources if survey == name]
                for name in given}  # fmt: skip
        found = {name: [row for row in of if row] for name, of in rows.items()}
        if all(found.values()):
            for name, of in found.items():
                expected[name][star["star_id"]] = of[0]
        n_bad += all(rows.values()) and not all(found.values())
    assert n_bad > 0, "some stars are left out"
    for name, table in zip(given, (one, other), strict=True):
        assert table.column_names == ["united", *LABELS]
        united = table["united"].to_pylist()
        assert len(set(united)) == len(united) > 20
        assert set(united) == set(expected[name])
        assert united == one["united"].to_pylist(), "row by row the same stars"
        for label in LABELS:
            values = [expected[name][star][label] for star in united]
            wanted = np.array(values, dtype=float) - offsets[name].get(label, 0.0)
            np.testing.assert_allclose(table[label].to_numpy(), wanted, rtol=1e-6)


def test_the_hat_is_that_of_the_common_stars(build, alone, tmp_path):
    hats = Manifest.load(alone).summary["three_cornered_hat"]
    for one in hats:
        assert one["survey"] in ("lamost", "apogee", "galah") and one["n"] >= 30
        assert one["negative"] == (one["variance"] < 0 or one["low"] < 0)
    bare = uncertainty(
        build / "lamost.model.polynomial", Catalog.open(build / "lamost.pairs"), tmp_path / "bare"
    ).summary
    assert bare["three_cornered_hat"] == [] and bare["error_factors"] == {}


def test_errors_of_another_correction_are_refused(build, tmp_path):
    observations = Catalog.open(build / "lamost.observations")
    model = Path(shutil.copytree(build / "lamost.model.polynomial", tmp_path / "model"))
    document = json.loads((model / "model.json").read_text())
    document["train_folds"] = [1, 2, 3]
    (model / "model.json").write_bytes(to_json(sealed(document)))
    with pytest.raises(ModelError, match="made for another correction"):
        apply(model, observations, tmp_path / "out", errors=build / "lamost.uncertainty")
    spoilt = Path(shutil.copytree(build / "lamost.uncertainty", tmp_path / "spoilt"))
    table = bytearray((spoilt / "error.npy").read_bytes())
    table[-1] ^= 1
    (spoilt / "error.npy").write_bytes(table)
    with pytest.raises(ModelError, match="not the file that was saved"):
        apply(build / "lamost.model.polynomial", observations, tmp_path / "out", errors=spoilt)
    assert not (tmp_path / "out").exists()


def test_apply_without_errors_writes_none(build, tmp_path):
    observations = Catalog.open(build / "lamost.observations")
    apply(build / "lamost.model.polynomial", observations, tmp_path / "plain")
    assert "teff_sos_err" not in Catalog.open(tmp_path / "plain").schema.names


def test_pairs_of_another_model(build, tmp_path):
    pairs = read(build / "lamost.pairs")
    other = write_catalog(pairs.slice(3), tmp_path / "pairs", 10**6, "pairs")
    with pytest.raises(CatalogError, match="does not hold the pairs"):
        uncertainty(build / "lamost.model.polynomial", other, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "a failed run leaves nothing"

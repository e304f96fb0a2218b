"""Jobs on real tables: what is learnt from them, and by how much stars agree better after.

The job files are in ``real``; figures without a command were counted from the tables alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sos_dask import api
from sos_dask.errors import SurveyError
from sos_dask.rebuild.job import load_job
from sos_dask.stages.compare import Compare
from sos_dask.storage.manifest import Manifest
from sos_dask.surveys.definition import load_survey
from tests.stages.clumps import rows_of
from tests.surveys.comoving import write_pairs

JOBS = Path(__file__).parent / "real"


def built(name: str, folder: Path, data: Path, data_2: Path, **variables: Path) -> Path:
    """Products of a job."""
    places = {"SOS_REAL_DATA": data, "SOS_REAL2_DATA": data_2, **variables}
    with pytest.MonkeyPatch.context() as patch:
        for key, path in places.items():
            patch.setenv(key, str(path))
        job = load_job(JOBS / f"{name}.toml")
        made = api.rebuild(job.but(store=str(folder / name)))
    return made.path


@pytest.fixture(scope="module")
def m67(real_data, real_data_2, tmp_path_factory) -> Path:
    return built("m67", tmp_path_factory.mktemp("m67"), real_data, real_data_2)


def validation(build: Path, name: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows of a validation by label, group and survey."""
    rows = pq.read_table(build / f"{name}.validation" / "validation.parquet").to_pylist()
    return {(row["label"], row["group"], row["survey"]): row for row in rows}


@pytest.mark.slow
def test_galah_on_seismic_giants(real_data, real_data_2, tmp_path):
    build = built("seismic", tmp_path, real_data, real_data_2)
    figures = Compare.load(build / "galah.comparison")["figures"]
    after = {
        one["label"]: one
        for one in figures
        if (one["method"], one["subset"], one["sample"], one["statistic"])
        == ("polynomial", "all", "test", "mad")
    }
    assert {one["n"] for one in after.values()} == {1093}, "1,080 spectra, 13 of them twice"
    for label, most in (("teff", 46), ("logg", 0.092), ("feh", 0.0335)):
        assert after[label]["value"] < most


@pytest.mark.slow
def test_members_of_m67_by_five_surveys(m67):
    [feh] = [one for one in Manifest.load(m67 / "members.validation").summary["groups"]
             if one["label"] == "feh"]  # fmt: skip
    assert feh["survey_spread_before"] > 0.09 and feh["survey_spread_after"] < 0.035
    found = validation(m67, "members")
    # Counted from the tables alone; repeats of APOGEE count by row.
    before = {"lrs": (-0.002, 0.067, 181), "galah": (-0.047, 0.086, 149),
              "mrs": (-0.062, 0.062, 233), "gaia": (-0.25, 0.31, 1011),
              "apogee": (0.002, 0.023, 163)}  # fmt: skip
    for survey, (middle, width, n) in before.items():
        one = found["feh", "NGC2682", survey]
        assert one["n"] == n
        known = one["median_before"], one["scatter_before"]
        assert known == pytest.approx((middle, width), abs=0.006)
    both = found["feh", "NGC2682", "all"]
    assert both["scatter_after"] < both["scatter_before"]


@pytest.mark.slow
def test_benchmark_stars(m67):
    found = validation(m67, "benchmarks")
    for label, middle, width in (("teff", -20, 184), ("logg", -0.04, 0.12), ("feh", -0.24, 0.23)):
        one = found[label, "all", "gaia"]
        assert one["is_truth"] and one["n"] == one["n_after"] == 109
        assert one["median_before"] == pytest.approx(middle, rel=0.07)
        assert one["scatter_before"] == pytest.approx(width, rel=0.02)
        # Outside the coverage of M 67 little may change.
        assert one["scatter_after"] < 1.1 * one["scatter_before"]
    feh = found["feh", "all", "gaia"]
    assert abs(feh["median_after"]) < abs(feh["median_before"])
    rows = Manifest.load(m67 / "benchmarks.validation").rows
    assert rows.n_in == 192 and rows.dropped == {"not in the unified catalog": 11}


@pytest.mark.slow
def test_traps_do_not_get_into_fits_and_means(m67):
    fitted = pq.read_table(m67 / "lrs.evidence" / "evidence.parquet")
    assert len(fitted) == 146 and min(fitted["feh"].to_pylist()) > -1.0
    stars = rows_of(m67 / "sos").to_pylist()
    nonsense = [
        int(row["gaia_dr3_source_id"])
        for row in rows_of(m67 / "mrs.observations").to_pylist()
        if row["feh"] < -1.5 and row["cluster"] in ("NGC0869", "NGC0884")
    ]
    assert len(nonsense) == 11
    by_id = {one["gaia_dr3_source_id"]: one for one in stars}
    for number in nonsense:
        one = by_id[number]
        assert one["feh_mrs"] is None or one["flag_sos"] & 1, "a flag says that rows fail a cut"
    assert all(one["feh_mrs"] > -1.5 for one in stars
               if one["feh_mrs"] is not None and not one["flag_sos"] & 1)  # fmt: skip


@pytest.mark.slow
def test_comoving_pairs(real_data, real_data_2, tmp_path):
    assert write_pairs(real_data_2, tmp_path / "pairs.csv", 1.0) == 377
    build = built("pairs", tmp_path, real_data, real_data_2, PAIRS=tmp_path / "pairs.csv")
    found = validation(build, "comoving")
    for label, survey, n_pairs in (("rv", "rave", 17), ("feh", "apogee", 2)):
        pooled = found[label, "all", survey]
        assert pooled["n"] == 2 * n_pairs == pooled["n_after"]
    # Deviations from the mean of a pair are half of the difference, times the root of 2.
    wide = 2**0.5 * found["rv", "all", "rave"]["scatter_before"]
    assert wide == pytest.approx(5.6, abs=0.7)
    assert 2**0.5 * found["feh", "all", "apogee"]["scatter_before"] < 0.03


def twice(rv: str, error: str) -> dict[str, Any]:
    own = {name: {"source": "dr3_source_id"} for name in ("obs_id", "gaia_dr3_source_id")}
    labels = dict.fromkeys(("teff", "logg", "feh", "snr"), False)
    return {
        "columns": {**own, "rv": {"source": rv}, "rv_err": {"source": error}, **labels},
        "cuts": dict.fromkeys(("flags", "teff", "logg", "feh"), False),
    }


def test_one_instrument_twice_makes_no_error_smaller(real_data_2, tmp_path):
    columns = {"dr2": ("RVel", "e_RVel"), "dr3": ("radial_velocity", "radial_velocity_error")}
    rows = {}
    for name, given in columns.items():
        survey = load_survey("gaia-dr3-rvs", twice(*given))
        api.ingest(survey, [str(real_data_2 / "praesepe_gaia_dr2_dr3_rv.csv")], tmp_path / name)
        rows[name] = tmp_path / name
    made = api.unify(rows, tmp_path / "sos", api.UnifySettings(labels=("rv",)))
    [told] = [one for one in made.summary["errors"] if "width" in one]
    assert told["n"] == 206 and told["width"] == pytest.approx(0.61, abs=0.02)
    assert 0.5 < told["correlation"] <= 0.9
    stars = [one for one in rows_of(tmp_path / "sos").to_pylist() if one["rv_n"] == 2]
    errors = np.array([[one["rv_err"], one["rv_err_dr2"], one["rv_err_dr3"]] for one in stars])
    gain = errors[:, 0] / errors[:, 1:].min(axis=1)
    assert len(stars) == 206 and np.median(gain) > 0.98 and gain.min() > 0.9
    assert gain.max() < 1.001, "the better one alone is as good"


def test_ids_that_went_through_a_float_are_refused(real_data, tmp_path):
    column = {"columns": {"gaia_dr3_source_id": {"source": "gaiadr3_source_id", "missing": [0]}}}
    survey = load_survey("galah-dr4-subset", column)
    with pytest.raises(SurveyError, match=r"all 511 ids .* digits are lost"):
        api.ingest(survey, [str(real_data / "galah_dr4.csv")], tmp_path / "galah")

"""Real tables of stars in clusters: what is wrong in them does not get through.

Figures are those that were counted from the files alone.
"""

import csv
from typing import Any

import numpy as np
import pytest

from sos_dask import api
from sos_dask.errors import SurveyError
from sos_dask.storage.catalog import Catalog
from sos_dask.surveys.definition import load_survey

# Members of open clusters with labels of LAMOST, in another layout than that of LAMOST.
IMPUTED = {
    "bit": 8,
    "column": "imputed_uncertainties_flag",
    "values": ["False"],
    "reason": "its errors are not measured",
}
MEMBERS: dict[str, Any] = {
    "columns": {
        **{name: {"source": name} for name in ("teff", "logg", "feh", "rv")},
        **{f"{name}_err": {"source": f"{name}_err"} for name in ("teff", "logg", "feh", "rv")},
        "obs_id": {"source": "dr3_source_id", "dtype": "int64"},
        "ra": {"source": "ra2000"},
        "dec": {"source": "dec2000"},
        "gaia_dr2_source_id": {"source": "dr2_source_id", "missing": [0]},
        "gaia_dr3_source_id": {"source": "dr3_source_id"},
        "phot_g_mean_mag": {"source": "gmag_edr3"},
    },
    "extra": {
        "cluster": {"source": "Cluster", "dtype": "string"},
        "sdss": {"source": "sdss_id", "dtype": "int64", "missing": [-9223372036854775808]},
    },
    "cuts": {
        "imputed": IMPUTED,
        "poor": {"bit": 9, "column": "feh", "min": -1.5, "reason": "poorer than any open cluster"},
    },
}
MRS = MEMBERS | {
    "columns": MEMBERS["columns"] | {"snr": False},
    "extra": MEMBERS["extra"] | {"obsid": False, "band": False},
    "cuts": MEMBERS["cuts"] | {"snr": False, "rv_flag": False},
}
LRS = MEMBERS | {"extra": MEMBERS["extra"] | {"class": False, "subclass": False}}
M67_FIELD: dict[str, Any] = {
    "columns": {
        "teff": {"source": "teff_gspphot"},
        "logg": {"source": "logg_gspphot"},
        "feh": {"source": "mh_gspphot"},
        "rv_err": False,
        "snr": False,
    },
    "cuts": {"flags": False},
}


def ingested(folder, name, path, override):
    """Columns of the catalog as arrays, nan for nulls, with ``quality``; and its survey."""
    survey = load_survey(name, override)
    manifest = api.ingest(survey, [str(path)], folder / name)
    catalog = Catalog.open(folder / name)
    rows = [row for pixel in catalog.pixels for row in catalog.read(pixel).to_pylist()]
    assert manifest.rows.n_in == len(rows), "nothing is lost, and nothing is rejected"
    found = {}
    for column in rows[0]:
        values = [row[column] for row in rows]
        numbers = all(isinstance(value, float | None) for value in values)
        found[column] = np.array([np.nan if v is None and numbers else v for v in values])
    return found, survey


def fails(found, survey, cut):
    return (found["quality"] >> survey.cuts[cut].bit & 1).astype(bool)


def native(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def scatter(values):
    """Median and scatter (1.4826 MAD)."""
    middle = np.median(values)
    return middle, 1.4826 * np.median(np.abs(values - middle))


def matched(one, other):
    """Rows of both with the same id of Gaia DR3, good in both."""
    _, a, b = np.intersect1d(
        one["gaia_dr3_source_id"], other["gaia_dr3_source_id"], return_indices=True
    )
    return a, b


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def tables(real_data_2, folder):
    files = {
        "mrs": ("lamost-dr11-mrs", "lamost_mrs_clusters.csv", MRS),
        "lrs": ("lamost-dr11-lrs", "lamost_lrs_clusters.csv", LRS),
        "gaia": ("gaia-dr3-rvs", "gaia_dr3_m67_field.csv", M67_FIELD),
    }
    return {
        key: (*ingested(folder, name, real_data_2 / file, override), native(real_data_2 / file))
        for key, (name, file, override) in files.items()
    }


def test_an_error_of_9999_is_none(tables):
    found, survey, rows = tables["mrs"]
    assert len(found["rv"]) == len(rows) == 555
    errors = {int(row["dr3_source_id"]): float(row["rv_err"]) for row in rows}
    stated = np.array([errors[number] for number in found["obs_id"]])
    assert np.count_nonzero(stated == 9999) == 17
    none = np.isnan(found["rv_err"])
    np.testing.assert_array_equal(none, stated > 2000)
    assert np.count_nonzero(none) == 22, "and five means of such errors, from 3779 to 7070 km/s"
    assert np.nanmax(found["rv_err"]) < 100
    np.testing.assert_array_equal(fails(found, survey, "rv_err"), none)
    assert fails(found, survey, "imputed")[none].all()
    assert not np.isnan(found["rv"]).any(), "the value stays, with its flag"


def test_hot_stars_are_flagged(tables):
    found, survey, _ = tables["mrs"]
    assert np.count_nonzero(found["teff"] > 7500) == 26
    np.testing.assert_array_equal(fails(found, survey, "hot"), found["teff"] > 7500)
    nonsense = found["feh"] < -1.5
    young = np.isin(found["cluster"], ["NGC0869", "NGC0884"])
    assert np.count_nonzero(nonsense & young) == 11
    assert np.all(found["quality"][nonsense] != 0)
    assert found["feh"][found["quality"] == 0].min() > -1.0


@pytest.mark.parametrize(("key", "differ"), [("lrs", 16), ("mrs", 15)])
def test_ids_of_two_gaia_releases_stay_apart(tables, key, differ):
    found, _, rows = tables[key]
    stated = {int(row["dr3_source_id"]): int(row["dr2_source_id"]) for row in rows}
    assert {*found["gaia_dr3_source_id"]} == {*stated}
    wanted = [stated[number] for number in found["gaia_dr3_source_id"]]
    np.testing.assert_array_equal(found["gaia_dr2_source_id"].astype(np.int64), wanted)
    assert np.count_nonzero(found["gaia_dr2_source_id"] != found["gaia_dr3_source_id"]) == differ


@pytest.mark.parametrize(("key", "n_null"), [("lrs", 271), ("mrs", 277)])
def test_the_smallest_integer_is_no_id(tables, key, n_null):
    found, _, _ = tables[key]
    known = np.array([value for value in found["sdss"] if value is not None])
    assert len(found["sdss"]) - len(known) == n_null and known.min() > 0
    assert not any(name != name.strip() for name in found["cluster"])


def test_empty_fields_of_the_gaia_archive_are_null(tables):
    found, _, rows = tables["gaia"]
    assert len(rows) == 4784
    for column, theirs, n_known in (
        ("rv", "radial_velocity", 1021),
        ("teff", "teff_gspphot", 4586),
    ):
        assert sum(row[theirs] != "" for row in rows) == n_known
        assert np.count_nonzero(np.isfinite(found[column])) == n_known
    assert np.all(found["position_epoch"] == 2016.0)


@pytest.mark.parametrize(
    ("label", "middle", "width"),
    [("rv", -3.78, 3.25), ("feh", 0.051, 0.060), ("teff", 36, 76), ("logg", 0.034, 0.086)],
)
def test_lamost_low_minus_medium_resolution(tables, label, middle, width):
    (low, *_), (medium, *_) = tables["lrs"], tables["mrs"]
    a, b = matched(low, medium)
    known = ~np.isnan(medium["rv_err"][b])
    assert np.count_nonzero(known) == 156 == len(b) - 6, "six have no error of rv"
    found = scatter(low[label][a[known]] - medium[label][b[known]])
    assert found == pytest.approx((middle, width), rel=0.02)


@pytest.mark.parametrize(
    ("key", "n", "middle", "width"), [("lrs", 111, -4.06, 3.19), ("mrs", 210, -0.59, 2.51)]
)
def test_lamost_minus_gaia_in_m67(tables, key, n, middle, width):
    lamost, gaia = tables[key][0], tables["gaia"][0]
    a, b = matched(lamost, gaia)
    known = np.isfinite(gaia["rv"][b]) & np.isfinite(lamost["rv_err"][a])
    assert np.count_nonzero(known) == n
    found = scatter((lamost["rv"][a] - gaia["rv"][b])[known].astype(float))
    assert found == pytest.approx((middle, width), rel=0.02)


RAVE: dict[str, Any] = {
    "position_epoch": 2015.0,
    "columns": {
        "obs_id": {"source": "row_id", "dtype": "int64"},
        **{name: {"source": name} for name in ("ra", "dec", "rv")},
        "rv_err": {"source": "erv"},
        **dict.fromkeys(("teff", "logg", "feh", "teff_err", "logg_err", "feh_err", "snr"), False),
    },
    "cuts": dict.fromkeys(("snr", "teff", "logg", "feh"), False),
}


def test_ids_of_gaia_dr1_are_no_canonical_column(real_data_2, tmp_path):
    path = real_data_2 / "rave_comoving_stars.csv"
    with pytest.raises(SurveyError, match="no column 'gaiaedr3_source_id' or"):
        ingested(tmp_path, "rave-dr6", path, RAVE)
    own = {"extra": {"tgas_source_id": {"source": "tgas_source_id", "dtype": "int64"}}}
    columns = {"columns": RAVE["columns"] | {"gaia_dr3_source_id": False}}
    found, _ = ingested(tmp_path, "rave-dr6", path, RAVE | own | columns)
    assert [name for name in found if name.endswith("source_id")] == ["tgas_source_id"]
    assert np.count_nonzero(np.isfinite(found["rv"])) == 1096
    assert np.nanmax(found["rv_err"]) == pytest.approx(100.98)


def test_three_surveys_of_one_cluster(tables, folder, tmp_path):
    rows = {"gaia": "gaia-dr3-rvs", "mrs": "lamost-dr11-mrs", "lrs": "lamost-dr11-lrs"}
    settings = api.UnifySettings(labels=("teff", "logg", "feh", "rv"), order=tuple(rows))
    given = {name: folder / path for name, path in rows.items()}
    made = api.unify(given, tmp_path / "sos", settings)
    assert made.rows.n_in == 4784 + 555 + 691 == made.rows.n_out + made.rows.dropped["merged"]
    told = {(x["label"], x["survey"], x.get("other")): x for x in made.summary["errors"]}
    # Counted by hand, on all stars in common: the cuts leave less here.
    for other, offset, n in (("lrs", 4.06, 111), ("mrs", 0.59, 210)):
        rv = told["rv", "gaia", other]
        assert abs(rv["offset"] - offset) < 2 * 1.25 * rv["scatter"] / rv["n"] ** 0.5
        assert n / 2 < rv["n"] < n
    for survey, others, hat in (("gaia", "mrs lrs", 1.7), ("mrs", "gaia lrs", 1.8),
                                ("lrs", "gaia mrs", 2.9)):  # fmt: skip
        found = told["rv", survey, others]
        assert found["low"] < hat < found["high"] and found["negative"] == (found["low"] < 0)
    # Stated errors of labels are too small by about 2, those of velocities right.
    widths = [told[label, "mrs", "lrs"]["width"] for label in ("teff", "logg", "feh", "rv")]
    np.testing.assert_allclose(widths, [2.1, 1.9, 2.2, 1.0], rtol=0.25)

"""What the surveys measure of the mock sky: biases, errors, outliers, flags and repeats."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from hypothesis import given
from hypothesis import strategies as st

from sos_dask import api
from sos_dask.simulate import SkySettings, simulate
from sos_dask.simulate.sky import (
    APOGEE,
    GALAH,
    LAMOST,
)
from sos_dask.simulate.surveys import (
    SURVEYS,
    columns,
    galah_bias,
    lamost_bias,
    stated_error_factor,
)
from sos_dask.sky import healpix
from sos_dask.storage.catalog import Catalog
from tests.simulate.mock import DEFINITIONS, N_LAMOST, SMALL, Sky, digests


@pytest.mark.parametrize("survey", SURVEYS)
def test_built_in_survey_definitions_read_the_files(survey):
    definition = DEFINITIONS[survey]
    native = set(columns(survey).names)
    for column in definition.columns.values():
        assert native & set(column.sources), column.column.name
    for cut in definition.cuts.values():
        assert cut.column in native | set(definition.columns), cut.name
    assert definition.position_epoch == SURVEYS[survey].epoch


def test_repeats(sky):
    rows, seen, truth = sky.rows[LAMOST], sky.seen[LAMOST], sky.truth[LAMOST]
    assert len(np.unique(truth["star"])) == N_LAMOST - round(0.45 * N_LAMOST)
    n_distinct = len(truth["star"])
    copies = rows[n_distinct:]
    assert len(copies) == N_LAMOST - n_distinct == 4
    originals = {row["obsid"]: row.tobytes() for row in rows[:n_distinct]}
    assert all(row.tobytes() == originals[row["obsid"]] for row in copies)

    order = np.lexsort((truth["row"], truth["star"]))
    same = np.flatnonzero(np.diff(truth["star"][order]) == 0)
    a, b = order[same], order[same + 1]
    apart = healpix.separation_arcsec(*(seen[name][i] for i in (a, b) for name in ("ra", "dec")))
    assert 0.1 < np.median(apart) < 0.3
    assert apart.max() < 1.5
    assert np.median(b - a) > 1000
    ids = seen["gaia_dr3_source_id"]
    both = (ids[a] > 0) & (ids[b] > 0)
    assert both.mean() > 0.9
    np.testing.assert_array_equal(ids[a][both], ids[b][both])
    difference = seen["teff"][a] - seen["teff"][b]
    assert (difference[np.isfinite(difference)] != 0).mean() > 0.999


def test_no_repeats(tmp_path):
    sky = Sky(tmp_path, n_lamost=1000, repeat_fraction=0.0)
    assert len(np.unique(sky.truth[LAMOST]["star"])) == 1000


def test_duplicate_bit_of_apogee(sky):
    rows, star = sky.rows[APOGEE], sky.truth[APOGEE]["star"]
    duplicate = (rows["EXTRATARG"] & 16) > 0
    assert 0.08 < duplicate.mean() < 0.14
    best: dict[int, float] = {}
    for number, snr in zip(star, rows["SNR"], strict=True):
        best[number] = max(best.get(number, 0.0), snr)
    highest = np.array([best[number] for number in star]) == rows["SNR"]
    np.testing.assert_array_equal(highest, ~duplicate)
    names = sky.seen[APOGEE]["apogee_id"]
    for name, number in zip(names[duplicate], star[duplicate], strict=True):
        assert set(names[star == number]) - {"VESTA"} == {name} - {"VESTA"}
    star = sky.truth[GALAH]["star"]
    assert 0 < len(star) - len(np.unique(star)) < 0.01 * len(star)


@pytest.mark.parametrize("survey", SURVEYS)
def test_labels_are_truth_plus_bias_plus_noise_of_the_stated_size(sky, survey):
    true = sky.true_labels(survey)
    bias = {LAMOST: lamost_bias, GALAH: galah_bias}.get(survey, lambda *_: 0.0)(*true.T)
    factor = stated_error_factor(true[:, 1], sky.seen[survey]["snr"])
    pull = (sky.labels(survey) - true - bias) * factor[:, None] / sky.labels(survey, "_err")
    outlier = sky.truth[survey]["is_outlier"]
    for x in pull[~outlier].T:
        x = x[np.isfinite(x)]
        assert abs(x.mean()) < 4.5 / np.sqrt(len(x))
        assert abs(x.std() - 1.0) < 4.5 / np.sqrt(2 * len(x))
        assert np.abs(x).max() < 6
    assert np.nanmedian(np.abs(pull[outlier])) > 5


def test_truth_contains_the_injected_bias(sky):
    for survey, function in ((LAMOST, lamost_bias), (GALAH, galah_bias)):
        bias = function(*sky.true_labels(survey).T)
        np.testing.assert_allclose(sky.true_labels(survey, "bias_"), bias, rtol=1e-3, atol=1e-3)
    assert not sky.true_labels(APOGEE, "bias_").any()


def test_without_bias(tmp_path):
    sky = Sky(tmp_path, n_lamost=10_000, bias=False, outlier_fraction=0.0)
    for survey in SURVEYS:
        pull = (sky.labels(survey) - sky.true_labels(survey)) / sky.labels(survey, "_err")
        n = np.isfinite(pull).sum(axis=0)
        assert np.all(np.abs(np.nanmean(pull, axis=0)) < 9 / np.sqrt(n))
        assert not sky.true_labels(survey, "bias_").any()
        assert not sky.truth[survey]["is_outlier"].any()
    assert abs(np.nanmedian(sky.seen[LAMOST]["rv"] - sky.truth[LAMOST]["rv"])) < 0.3


def test_bias_is_strong_at_the_edges_and_can_be_undone():
    bulk = lamost_bias(5200.0, 4.4, 0.0)
    for edge in ((3900.0, 0.3, -0.3), (7800.0, 4.0, 0.0), (5000.0, 1.5, -2.5), (5200.0, 4.4, 0.5)):
        assert np.all(np.abs(lamost_bias(*edge) - bulk) > [20.0, 0.05, 0.04]), edge
    # The effect of log g depends on [Fe/H]: not a sum of functions of one label each.
    teff = 4800.0
    corners = [lamost_bias(teff, g, m) for g in (1.5, 3.2) for m in (-1.0, 0.0)]
    assert abs((corners[0] - corners[1] - corners[2] + corners[3])[2]) > 0.05
    # One measured triple has one true triple.
    grid = np.stack(
        np.meshgrid(np.linspace(3600, 9000, 28), np.linspace(0, 5, 26), np.linspace(-3, 0.5, 36)),
        -1,
    ).reshape(-1, 3)
    step = np.diag([10.0, 0.01, 0.01])
    slopes = np.stack(
        [(lamost_bias(*(grid + s).T) - lamost_bias(*(grid - s).T)) / (2 * s.max()) for s in step],
        -1,
    )
    assert np.linalg.det(np.eye(3) + slopes).min() > 0.1


def test_sizes_of_the_bias(sky):
    size = np.abs(lamost_bias(*sky.true_labels(LAMOST).T))
    assert np.all(size.max(axis=0) < [200.0, 0.35, 0.5])
    assert np.all(size.mean(axis=0) > [25.0, 0.05, 0.04])


def test_radial_velocity_offsets(sky):
    for number, survey in SURVEYS.items():
        difference = sky.seen[number]["rv"] - sky.truth[number]["rv"]
        assert abs(np.nanmedian(difference) - survey.rv_offset) < 0.1


@given(st.floats(-1, 6), st.floats(0, 2000))
def test_error_factor_is_within_its_range(logg, snr):
    assert 0.5 <= stated_error_factor(logg, snr) <= 2.0


def test_outliers_and_flags_of_apogee(sky):
    rows, outlier = sky.rows[APOGEE], sky.truth[APOGEE]["is_outlier"]
    assert 0.02 < outlier.mean() < 0.04
    flag = rows["ASPCAPFLAG"].astype(np.int64)
    bad = (flag >> 23 & 1).astype(bool)
    assert bad[outlier].mean() > 0.45
    assert bad[~outlier].mean() < 0.02
    assert (flag >= 1 << 32).any()
    no_labels = bad | (flag >> 24 & 1).astype(bool)
    np.testing.assert_array_equal(np.isnan(rows["TEFF"]), no_labels)
    np.testing.assert_array_equal(np.isnan(rows["LOGG"]), no_labels)
    np.testing.assert_array_equal(np.isnan(rows["FE_H"]), rows["FE_H_FLAG"] != 0)
    assert np.all(rows["FE_H_FLAG"][no_labels] != 0)


def test_outliers_and_flags_of_galah(sky):
    rows, outlier = sky.rows[GALAH], sky.truth[GALAH]["is_outlier"]
    assert (rows["flag_sp"][outlier] != 0).mean() > 0.5
    assert (rows["flag_sp"][~outlier] != 0).mean() < 0.04
    assert (rows["flag_fe_h"][outlier] != 0).mean() > 0.35
    assert (rows["flag_fe_h"][~outlier] != 0).mean() < 0.03
    assert np.isfinite(rows["teff"][rows["flag_sp"] == 0]).all()
    assert np.isnan(rows["teff"]).any()


def test_outliers_of_lamost_have_lower_snr(sky):
    outlier = sky.truth[LAMOST]["is_outlier"]
    snr = sky.seen[LAMOST]["snr"]
    assert (snr[outlier] < 20).mean() > 2 * (snr[~outlier] < 20).mean()
    assert 0.05 < (snr < 20).mean() < 0.35


def test_nulls_are_the_surveys_own(sky):
    lamost, apogee = sky.rows[LAMOST], sky.rows[APOGEE]
    for name, low, high in (("teff", 0.001, 0.01), ("feh_err", 0.001, 0.01), ("rv", 0.01, 0.04)):
        assert low < (lamost[name] == -9999).mean() < high
    floats = [name for name in lamost.dtype.names or () if lamost[name].dtype.kind == "f"]
    assert all(np.isfinite(lamost[name]).all() for name in floats)
    for survey in SURVEYS:
        assert 0.003 < (sky.seen[survey]["gaia_dr3_source_id"] == 0).mean() < 0.06
    assert np.isnan(apogee["GAIAEDR3_PMRA"][apogee["GAIAEDR3_SOURCE_ID"] == 0]).all()
    nowhere = np.isnan(apogee["RA"])
    assert [name.strip() for name in apogee["APOGEE_ID"][nowhere]] == [b"VESTA"]
    for name in ("phot_g_mean_mag", "distance", "parallax", "ebv", "pmra"):
        assert 0.005 < sky.gaia[name].null_count / sky.gaia.num_rows < 0.08


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A sky of five surveys, and the same stars without the last two."""
    given: dict[str, Any] = {"n_lamost": 20_000, "seed": 7}
    settings = SkySettings(**given, n_rave=3000, n_rvs=4000)
    paths = simulate(settings, tmp_path_factory.mktemp("five"))
    return paths, simulate(SkySettings(**given), tmp_path_factory.mktemp("three"))


def test_five_surveys_of_the_same_stars(five, tmp_path):
    """What is written of the others is what it is without RAVE and the RVS."""
    paths, without = five
    assert {*paths} - {*without} == {"rave", "rvs"}
    names = {"lamost", "apogee", "galah", "gaia"}
    assert {n: digests(paths)[n] for n in names} == {n: digests(without)[n] for n in names}
    truth = pq.read_table(paths["truth"]).to_pandas()
    for name, definition in (("rave", "rave-dr6"), ("rvs", "gaia-dr3-rvs")):
        manifest = api.ingest(definition, paths[name], tmp_path / name)
        catalog = Catalog.open(tmp_path / name)
        rows = pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels]).to_pandas()
        own = truth[truth["survey"] == name]
        assert manifest.rows.n_in == len(rows) == len(own) > 2900
        both = rows.assign(obs_id=rows["obs_id"].astype(str)).merge(
            own, on="obs_id", suffixes=("", "_true")
        )
        assert len(both) == len(rows)
        n_shared = own["star"].isin(truth[truth["survey"] == "lamost"]["star"]).mean()
        assert n_shared > 0.1, "stars of other surveys"
        bright = both[both["snr"] > 30]
        offset = np.nanmedian(bright["rv"] - bright["rv_true"])
        assert abs(offset - {"rave": 0.3, "rvs": -0.15}[name]) < 0.15
        good = both[(both["quality"] == 0) & ~both["is_outlier"]]
        assert len(good) > 0.5 * len(both)
        assert abs(np.median(good["teff"] - good["teff_true"] - good["bias_teff"])) < 15
        caught = both["quality"][both["is_outlier"]] != 0
        assert caught.mean() > 0.5
        ids = rows["gaia_dr3_source_id"]
        assert ids.isna().mean() == (0.0 if name == "rvs" else pytest.approx(0.035, abs=0.015))


def test_a_sky_without_rave_leaves_none_of_other_stars(tmp_path):
    folder = tmp_path / "sky"
    written = simulate(SkySettings(**SMALL, n_rave=300, n_rvs=300), folder)
    assert all(path.is_file() for path in written.values()) and len(written) == 7
    again = simulate(SkySettings(**SMALL, seed=2), folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in again.values()}


def test_clusters_share_labels_and_binaries_vary(tmp_path):
    given: dict[str, Any] = {"n_lamost": 12_000, "n_rvs": 3000, "seed": 3}
    paths = simulate(SkySettings(**given, n_clusters=6, binaries=0.2), tmp_path / "some")
    truth = pq.read_table(paths["truth"]).to_pandas()
    rows = fits.getdata(paths["lamost"])
    own = truth[truth["survey"] == "lamost"].sort_values("row")
    members = own[own["cluster"] > 0].groupby("cluster")
    assert len(members) == 6 and members.size().min() > 10
    assert (members["feh"].nunique() == 1).all() and (members["rv"].std() < 1.6).all()
    assert (members["distance"].nunique() == 1).all()
    listed = pq.read_table(paths["members"]).to_pandas()
    of_star = dict(zip(own["gaia_source_id"], own["cluster"], strict=True))
    for star, name in zip(listed["source_id"], listed["cluster"], strict=True):
        assert of_star.get(star, int(name.split("-")[1])) == int(name.split("-")[1])
    varies = own["rv_amplitude"] > 0
    assert 0.17 < varies[own["is_special"] == 0].mean() < 0.23
    measured = rows["rv"][own["row"]]
    off = np.where(measured > -9000, measured - own["rv"] + 4.9, np.nan)
    strong = np.asarray(own["rv_amplitude"] > 15) & (rows["snrg"][own["row"]] > 40)
    calm = ~np.asarray(varies) & (rows["snrg"][own["row"]] > 40)
    assert np.nanstd(off[strong]) > 3 * np.nanstd(off[calm])
    plain = simulate(SkySettings(**given), tmp_path / "none")
    assert "members" not in plain
    assert "cluster" not in pq.read_schema(plain["truth"]).names

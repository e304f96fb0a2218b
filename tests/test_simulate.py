"""The mock sky: what it promises about its files, its truth and its difficult stars."""

import errno
import hashlib
import io
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from sos_dask.errors import ConfigError, StorageError
from sos_dask.simulate import SkySettings, files, simulate
from sos_dask.simulate.sky import (
    APOGEE,
    GALAH,
    LAMOST,
    SPECIAL_STARS,
    from_galactic,
    make_plates,
    reference_rows,
    references_avoid,
    to_galactic,
)
from sos_dask.simulate.surveys import (
    SURVEYS,
    columns,
    galah_bias,
    lamost_bias,
    stated_error_factor,
)
from sos_dask.sky import healpix
from sos_dask.surveys.definition import load_survey

N_LAMOST = 40_000
DEFINITIONS = {
    LAMOST: load_survey("lamost-dr11-lrs"),
    APOGEE: load_survey("apogee-dr17"),
    GALAH: load_survey("galah-dr4"),
}
LABELS = ("teff", "logg", "feh")
# The columns of the DR11 LRS catalogue of A, F, G and K stars.
LAMOST_COLUMNS = [
    "obsid", "uid", "gp_id", "designation", "obsdate", "lmjd", "mjd", "planid", "spid",
    "fiberid", "ra_obs", "dec_obs", "snru", "snrg", "snrr", "snri", "snrz", "class", "subclass",
    "z", "z_err", "ps_id", "mag_ps_g", "mag_ps_r", "mag_ps_i", "mag_ps_z", "mag_ps_y",
    "gaia_source_id", "gaia_g_mean_mag", "fibertype", "offsets", "offsets_v", "ra", "dec",
    "fibermask", "with_norm_flux", "teff", "teff_err", "logg", "logg_err", "feh", "feh_err",
    "rv", "rv_err", "alpha_m", "alpha_m_err", "vsini_lasp",
]  # fmt: skip
GAIA_COLUMNS = {
    "source_id": "int64", "ra": "double deg", "dec": "double deg", "parallax": "float mas",
    "parallax_error": "float mas", "pmra": "double mas/yr", "pmdec": "double mas/yr",
    "phot_g_mean_mag": "float mag", "phot_bp_mean_mag": "float mag",
    "phot_rp_mean_mag": "float mag", "distance": "float pc", "ebv": "float mag",
}  # fmt: skip
TRUTH_COLUMNS = {
    "survey": "string", "obs_id": "string", "row": "int64", "star": "int64",
    "gaia_source_id": "int64", "teff": "float K", "logg": "float dex", "feh": "float dex",
    "rv": "float km/s", "distance": "float pc", "ebv": "float mag", "is_outlier": "bool",
    "is_special": "bool", "bias_teff": "float K", "bias_logg": "float dex", "bias_feh": "float dex",
}  # fmt: skip
SMALL: dict[str, Any] = {"n_lamost": 600, "n_apogee": 200, "n_galah": 200}


class Sky:
    """One mock sky by survey: all native ``rows``; ``seen``, the distinct ones in canonical
    columns; their ``truth``."""

    def __init__(self, directory, **given):
        self.paths = simulate(SkySettings(**given), directory)
        self.gaia = pq.read_table(self.paths["gaia"])
        self.truth_table = pq.read_table(self.paths["truth"])
        self.rows: dict[int, Any] = {}
        self.seen: dict[int, dict[str, Any]] = {}
        self.truth: dict[int, dict[str, Any]] = {}
        for number, survey in SURVEYS.items():
            with fits.open(self.paths[survey.name], memmap=False) as hdus:
                rows = self.rows[number] = np.array(hdus[1].data)
            part = self.truth_table.filter(pc.equal(self.truth_table["survey"], survey.name))
            part = part.sort_by("row")
            ids = part["gaia_source_id"].fill_null(0).to_numpy()
            self.truth[number] = {
                name: part[name].to_numpy(zero_copy_only=False) for name in part.column_names
            } | {"gaia_source_id": ids}
            self.seen[number] = {
                name: canonical(rows[column.sources[0]][: part.num_rows])
                for name, column in DEFINITIONS[number].columns.items()
            }

    def labels(self, survey, end=""):
        """Labels (n, 3) as measured, or their errors."""
        return np.stack([self.seen[survey][f"{label}{end}"] for label in LABELS], axis=-1)

    def true_labels(self, survey, start=""):
        """True labels (n, 3), or the injected bias."""
        return np.stack([self.truth[survey][f"{start}{label}"] for label in LABELS], axis=-1)


def canonical(values):
    """Native values as text, integers, or floats with NaN for -9999."""
    if values.dtype.kind == "S":
        return np.char.strip(values.astype(str))
    if values.dtype.kind == "f":
        return np.where(values == -9999, np.nan, values).astype(float)
    return values.astype(np.int64)


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    return Sky(tmp_path_factory.mktemp("sky"), n_lamost=N_LAMOST, seed=7)


def moved(table, years):
    """Special stars at another epoch."""
    ra, dec, pmra, pmdec = table.T
    return healpix.propagate(ra, dec, pmra, pmdec, years)


def digests(paths):
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


# Determinism


def test_same_settings_same_bytes_and_other_seed_other_bytes(tmp_path):
    first, again, other = (
        digests(simulate(SkySettings(n_lamost=3000, seed=seed), tmp_path / name))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_block_size_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_ROW_GROUP", 1000)
    sky = SkySettings(n_lamost=6000)
    assert len(make_plates(sky).blocks(files.BLOCK_STARS)) == 1
    whole = digests(simulate(sky, tmp_path / "whole"))
    monkeypatch.setattr(files, "BLOCK_STARS", 400)
    assert len(make_plates(sky).blocks(400)) > 8
    pieces = simulate(sky, tmp_path / "pieces")
    assert digests(pieces) == whole
    truth = pq.ParquetFile(pieces["truth"]).metadata
    assert {truth.row_group(i).num_rows for i in range(truth.num_row_groups - 1)} == {1000}


def test_progress_reaches_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_STARS", 500)
    seen: dict[str, list[tuple[int, int]]] = {}
    sky = SkySettings(n_lamost=2000, n_apogee=300, n_galah=400)
    simulate(sky, tmp_path, lambda name, *rows: seen.setdefault(name, []).append(rows))
    last = {name: steps[-1] for name, steps in seen.items()}
    assert last == {"lamost": (2000, 2000), "apogee": (300, 300), "galah": (400, 400)}
    assert all(steps == sorted(steps) for steps in seen.values())


# Files


def test_files_open_with_astropy_without_complaint(sky):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for survey in SURVEYS.values():
            with fits.open(sky.paths[survey.name]) as hdus:
                hdus.verify("exception")
        table = Table.read(sky.paths["lamost"], hdu=1)
    assert table.colnames == LAMOST_COLUMNS
    assert [str(table[name].unit) for name in ("ra", "teff", "rv")] == ["deg", "K", "km / s"]
    assert table["gaia_source_id"].dtype.newbyteorder("=") == np.int64
    assert table["ra"].dtype.newbyteorder("=") == np.float64


def test_layout_of_the_reference_files(sky):
    with fits.open(sky.paths["apogee"]) as hdus:
        assert len(hdus) == 5
        assert isinstance(hdus[2], fits.ImageHDU)
        assert hdus[2].data.shape == (360,)
        assert len(hdus[3].data) == 1
        assert set(np.char.strip(hdus[4].data["TELESCOPE"])) == {"apo25m", "lco25m"}
        shapes = [hdus[1].data[name].shape[1:] for name in ("FPARAM", "FPARAM_COV", "X_H")]
        assert shapes == [(9,), (9, 9), (27,)]
        assert hdus[1].columns["ASPCAPFLAG"].format == "K"
    with fits.open(sky.paths["galah"]) as hdus:
        formats = {column.name: column.format for column in hdus[1].columns}
    assert formats["sobject_id"] == formats["gaiadr3_source_id"] == "K"
    assert (formats["flag_sp"], formats["teff"]) == ("J", "E")


@pytest.mark.parametrize("survey", SURVEYS)
def test_built_in_survey_definitions_read_the_files(survey):
    definition = DEFINITIONS[survey]
    native = set(columns(survey).names)
    for column in definition.columns.values():
        assert native & set(column.sources), column.column.name
    for cut in definition.cuts.values():
        assert cut.column in native | set(definition.columns), cut.name
    assert definition.position_epoch == SURVEYS[survey].epoch


def test_row_counts(sky):
    total = reference_rows(N_LAMOST)
    counts = {survey: len(rows) for survey, rows in sky.rows.items()}
    assert counts == {LAMOST: N_LAMOST, APOGEE: round(0.44 * total), GALAH: round(0.56 * total)}
    assert abs(reference_rows(19_000_000) - 1_700_000) < 10_000
    for survey in SURVEYS:
        # The file's records and nothing else: no padding shifts a column.
        keys = sky.seen[survey]["obs_id"].astype(str)
        np.testing.assert_array_equal(keys, sky.truth[survey]["obs_id"].astype(str))


def test_parquet_schemas(sky):
    for table, known in ((sky.truth_table, TRUTH_COLUMNS), (sky.gaia, GAIA_COLUMNS)):
        found = {field.name: f"{field.type} {field.metadata.get(b'unit', b'').decode()}".strip()
                 for field in table.schema}  # fmt: skip
        assert list(found.items()) == list(known.items()), "in this order"
        assert all(field.metadata[b"description"] for field in table.schema)
        assert all(set(field.metadata) <= {b"unit", b"description"} for field in table.schema)
    nulls = {name for name in TRUTH_COLUMNS if sky.truth_table[name].null_count}
    assert nulls == {"gaia_source_id"}
    assert not any(sky.gaia[name].null_count for name in ("source_id", "ra", "dec"))


def test_ids_are_unique_and_files_not_sorted_on_the_sky(sky):
    for survey in SURVEYS:
        assert len(set(sky.truth[survey]["obs_id"])) == len(sky.truth[survey]["obs_id"])
    cells = healpix.ang2pix(sky.seen[LAMOST]["ra"], sky.seen[LAMOST]["dec"], 4)
    assert np.count_nonzero(np.diff(cells) < 0) > 50
    assert len(set(sky.gaia["source_id"].to_pylist())) == sky.gaia.num_rows


# Repeats


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


# Truth


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


# Outliers, flags and nulls


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


# Sky


def test_footprints(sky):
    dec = {s: sky.seen[s]["dec"][~sky.truth[s]["is_special"]] for s in SURVEYS}
    assert dec[LAMOST].min() > -10.1
    assert dec[GALAH].max() < 10.1
    assert np.nanmin(dec[APOGEE]) < -40
    assert np.nanmax(dec[APOGEE]) > 40
    assert -10 < np.median(dec[LAMOST][dec[LAMOST] < 10]) < 10


def test_overlap_by_id_and_by_place_is_that_of_the_truth(sky):
    lamost, star_l = sky.seen[LAMOST], sky.truth[LAMOST]["star"]
    gaia_l = lamost["gaia_dr3_source_id"]
    first = np.unique(star_l, return_index=True)[1]
    tree = cKDTree(healpix.unit_vectors(lamost["ra"][first], lamost["dec"][first]))
    # Everything at the epoch of LAMOST, J2000.
    columns = (sky.gaia[name].to_pylist() for name in ("source_id", "pmra", "pmdec"))
    motion = {key: pm for key, *pm in zip(*columns, strict=True)}
    for survey, least in ((APOGEE, 0.15), (GALAH, 0.05)):
        seen, truth = sky.seen[survey], sky.truth[survey]
        star, true_ids = truth["star"], truth["gaia_source_id"]
        pm = np.array([motion.get(key, (0.0, 0.0)) for key in true_ids], dtype=float)
        good = np.isfinite(pm).all(axis=1) & (true_ids > 0) & np.isfinite(seen["ra"])
        years = 2000.0 - SURVEYS[survey].epoch
        pmra, pmdec = pm[good].T
        place = healpix.propagate(seen["ra"][good], seen["dec"][good], pmra, pmdec, years)
        shared = np.isin(star[good], star_l)
        assert shared.mean() > least
        distance, nearest = tree.query(healpix.unit_vectors(*place))
        found = distance * healpix.ARCSEC_PER_RADIAN < 1.5
        assert np.all(found[shared])
        assert (star_l[first][nearest][shared] == star[good][shared]).mean() > 0.999
        assert found[~shared].mean() < 0.005
        gaia = seen["gaia_dr3_source_id"]
        by_id = {key: number for key, number in zip(gaia_l, star_l, strict=True) if key > 0}
        here = np.isin(gaia, list(by_id))
        assert here.any()
        assert all(by_id[key] == number for key, number in zip(gaia[here], star[here], strict=True))


def test_references_avoid_regions_that_lamost_covers(sky):
    avoided = references_avoid(*sky.true_labels(LAMOST).T)
    assert 0.01 < avoided.mean() < 0.04
    for survey in (APOGEE, GALAH):
        assert not references_avoid(*sky.true_labels(survey).T).any()
        t, g, m = sky.true_labels(survey).T
        for sparse in (g < 1, t > 7000, m < -2, m > 0.2):
            assert 0 < sparse.mean() < 0.06


def test_default_overlap_serves_training():
    sky = SkySettings()
    plan = make_plates(sky)
    # Stars of LAMOST plates that a reference observes too; some are observed by both.
    shares = {s: int(plan.counts[s][0][plan.kind == LAMOST].sum()) for s in (APOGEE, GALAH)}
    n_stars = plan.counts[LAMOST][0].sum()
    assert 0.10 < shares[APOGEE] / n_stars < 0.15
    assert 0.05 < shares[GALAH] / n_stars < 0.08


def test_special_stars_are_in_every_survey(sky):
    table = SPECIAL_STARS
    still = np.hypot(table[:, 2], table[:, 3]) == 0
    fast = np.hypot(table[:, 2], table[:, 3]) > 1000
    assert fast.sum() == 6
    for survey in SURVEYS:
        truth, seen = sky.truth[survey], sky.seen[survey]
        index = np.full(len(table), -1)
        for row in np.flatnonzero(truth["is_special"])[::-1]:
            index[truth["star"][row]] = row
        assert np.all(index >= 0)
        assert not truth["is_outlier"][index].any()
        ra, dec = seen["ra"][index], seen["dec"][index]
        np.testing.assert_array_equal(ra[still], table[still, 0])
        np.testing.assert_array_equal(dec[still], table[still, 1])
        there = moved(table, SURVEYS[survey].epoch - 2016.0)
        assert healpix.separation_arcsec(ra, dec, *there).max() < 1e-3
        assert np.all(seen["gaia_dr3_source_id"][index] > 0)
        assert np.all(np.isfinite(sky.labels(survey)[index]))
    assert not sky.rows[APOGEE]["ASPCAPFLAG"][sky.truth[APOGEE]["is_special"]].any()
    assert not sky.rows[GALAH]["flag_sp"][sky.truth[GALAH]["is_special"]].any()


def test_special_stars_are_where_they_claim():
    table = SPECIAL_STARS
    ra, dec, pmra, pmdec = table.T
    assert np.all(90.0 - np.abs(dec[:7]) < 0.01)
    assert np.all(np.minimum(ra[7:13], 360.0 - ra[7:13]) < 1e-4)
    for border_ra, border_dec in table[13:20, :2]:
        around = [(border_ra + a) % 360.0 for a in (-1e-6, 1e-6)]
        cells = {int(c) for x in around for y in (border_dec - 1e-6, border_dec + 1e-6)
                 for c in healpix.ang2pix(np.array([x]), np.array([y]), 1)}  # fmt: skip
        assert len(cells) > 1, (border_ra, border_dec)
    assert np.all(np.hypot(pmra, pmdec)[20:] > 1000)
    for epoch in (2000.0, 2008.0, 2016.0):
        x = healpix.unit_vectors(*moved(table, epoch - 2016.0))
        distance = cKDTree(x).query(x, k=2)[0][:, 1] * healpix.ARCSEC_PER_RADIAN
        if epoch != 2008.0:
            assert distance.min() > 5
    old_ra = moved(table, -16.0)[0]
    assert abs(old_ra[21] - ra[21]) > 300  # across RA 0
    assert abs(old_ra[24] - ra[24]) > 90  # past the pole


@given(st.floats(0, 359.9), st.floats(-89, 89))
def test_galactic_coordinates_round_trip(ra, dec):
    lon, lat = to_galactic(np.array([ra]), np.array([dec]))
    back = from_galactic(lon, lat)
    assert healpix.separation_arcsec(np.array([ra]), np.array([dec]), *back)[0] < 0.01


def test_galactic_coordinates_of_known_places():
    # The north Galactic pole and the Galactic centre in ICRS.
    lon, lat = to_galactic(np.array([192.85948, 266.40499]), np.array([27.12825, -28.93617]))
    assert lat[0] > 89.999
    assert abs(lat[1]) < 1e-3
    assert min(lon[1], 360 - lon[1]) < 1e-3


# Plans and failures


@settings(deadline=None, max_examples=40)
@given(
    n_lamost=st.integers(500, 60_000),
    n_apogee=st.none() | st.integers(200, 30_000),
    n_galah=st.none() | st.integers(200, 30_000),
    repeat_fraction=st.floats(0, 0.8),
    seed=st.integers(0, 2**40),
)
def test_plan_counts_every_row_once(**given):
    sky = SkySettings(**given)
    plan = make_plates(sky)
    for survey, n_rows in sky.rows().items():
        assert plan.n_rows[survey] == n_rows
        counts = plan.counts[survey]
        assert 0 <= n_rows - counts.sum() <= (4 if survey == LAMOST else 0)
        assert np.all(counts >= 0)
        assert np.all(counts[0] <= plan.n_stars)
        assert np.all(counts[1:] <= counts[0])
        starts = plan.first_rows(survey).ravel()
        np.testing.assert_array_equal(starts[1:], (starts + counts.ravel())[:-1])
        assert starts[0] == 0
    blocks = plan.blocks(1000)
    assert blocks[0].start == 0
    assert blocks[-1].stop == len(plan.kind)
    assert all(a.stop == b.start for a, b in pairwise(blocks))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_lamost": 10}, {"n_apogee": 5}, {"n_galah": -1}, {"seed": -1}, {"repeat_fraction": 0.9},
        {"outlier_fraction": float("nan")}, {"uncovered": -0.1},
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SkySettings(**wrong)


def test_failure_leaves_nothing_behind(tmp_path):
    before = digests(simulate(SkySettings(**SMALL), tmp_path))

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(SkySettings(n_lamost=700), tmp_path, stop)
    left = {path.stem: path for path in tmp_path.iterdir()}
    assert digests(left) == before


def test_full_disk_is_a_storage_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_truth_table", full)
    with pytest.raises(StorageError, match="the disk is full"):
        simulate(SkySettings(**SMALL), tmp_path)
    assert not list(tmp_path.iterdir())


class FullDisk(io.FileIO):
    """A file on a disk on which so many more bytes fit, without a buffer."""

    left = 0

    def write(self, content: Any) -> int:
        size = memoryview(content).nbytes
        if size > self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= size
        return super().write(content)

    def truncate(self, size: int | None = None) -> int:
        self.write(
            bytes((size or 0) - self.seek(0, 2))
        )  # the rest of the last block is written, too
        return super().truncate(size)


@pytest.mark.parametrize("survey", SURVEYS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])  # in the header, among the rows, at the end
def test_full_disk_while_a_fits_table_is_written(survey, share, tmp_path, monkeypatch):
    before = digests(simulate(SkySettings(**SMALL), tmp_path))
    path = tmp_path / f"{SURVEYS[survey].name}.fits"
    with fits.open(path) as hdus:
        rows = hdus[1].fileinfo()
        size = hdus[1].header["NAXIS1"] * hdus[1].header["NAXIS2"]
    limit = int(rows["datLoc"] * (share > 0) + share * size)
    opened = []
    open_file = Path.open

    def open_on_full_disk(file, mode="r", *more, **options):
        if mode != "w+b" or not file.name.startswith(f".{path.name}"):
            return open_file(file, mode, *more, **options)
        full = FullDisk(file, mode)
        full.left = limit
        opened.append(file)
        return full

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(StorageError, match=rf"the disk is full: cannot write .*{path.name}"):
        simulate(SkySettings(**SMALL, seed=2), tmp_path)
    assert len(opened) == 1
    left = digests({file.stem: file for file in tmp_path.iterdir()})
    assert left.keys() == before.keys(), "no half of a file is left"
    assert left[SURVEYS[survey].name] == before[SURVEYS[survey].name]
    if share < 1:
        assert left == before
    else:  # other files are complete by then: each is the one of before, or a whole new one
        monkeypatch.setattr(Path, "open", open_file)
        after = digests(simulate(SkySettings(**SMALL, seed=2), tmp_path / "whole"))
        assert all(left[name] in (before[name], after[name]) for name in left)


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        simulate(SkySettings(n_lamost=600), tmp_path / "file" / "sky")

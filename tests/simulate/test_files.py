"""The files of the mock sky: layout, determinism, failures."""

import errno
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table

from sos_dask.errors import StorageError
from sos_dask.simulate import SkySettings, files, simulate
from sos_dask.simulate.sky import (
    APOGEE,
    GALAH,
    LAMOST,
    make_plates,
    reference_rows,
)
from sos_dask.simulate.surveys import (
    SURVEYS,
)
from sos_dask.sky import healpix
from tests.simulate.mock import N_LAMOST, SMALL, Sky, digests

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


# Means of absolute values of a sky of 2,000 LAMOST rows.
MEANS = {
    "lamost": {
        "ra": 141.831809, "dec": 26.708736, "teff": 5365.728781, "teff_err": 100.243501,
        "logg": 3.672447, "logg_err": 0.16039, "feh": 0.270192, "feh_err": 0.089908,
        "snr": 79.540092, "rv": 30.677249, "rv_err": 4.223215, "phot_g_mean_mag": 15.38207,
    },
    "apogee": {
        "ra": 194.8656, "dec": 33.455586, "pmra": 39.135176, "pmdec": 62.308933,
        "teff": 5189.777054, "teff_err": 20.340059, "logg": 3.165082, "logg_err": 0.041126,
        "feh": 0.288282, "feh_err": 0.017383, "snr": 266.715062, "rv": 30.20531,
        "rv_err": 0.058788, "phot_g_mean_mag": 13.276976, "parallax": 1.818068,
        "distance": 3021.85732, "ebv": 0.212259,
    },
    "galah": {
        "ra": 189.403765, "dec": 23.030009, "teff": 5425.197983, "teff_err": 52.600421,
        "logg": 3.72436, "logg_err": 0.086259, "feh": 0.270862, "feh_err": 0.067361,
        "snr": 62.4493, "rv": 29.980655, "rv_err": 0.241537, "phot_g_mean_mag": 13.186253,
        "parallax": 2.143095, "distance": 1854.754283, "ebv": 0.099362,
    },
    "gaia": {
        "ra": 166.319190, "dec": 27.569310, "parallax": 1.372077, "parallax_error": 0.0397624,
        "pmra": 16.518904, "pmdec": 22.123971, "phot_g_mean_mag": 14.582866,
        "phot_bp_mean_mag": 15.123250, "phot_rp_mean_mag": 13.832084, "distance": 3473.540742,
        "ebv": 0.198965,
    },
}  # fmt: skip


def test_a_sky_is_the_same_in_every_release(tmp_path):
    sky = Sky(tmp_path, n_lamost=2000, seed=3)
    gaia = {
        name: column.to_numpy() for name, column in zip(GAIA_COLUMNS, sky.gaia.columns, strict=True)
    }
    files = {SURVEYS[number].name: columns for number, columns in sky.seen.items()} | {"gaia": gaia}
    for name, means in MEANS.items():
        found = {column: np.nanmean(np.abs(files[name][column])) for column in means}
        assert found == pytest.approx(means, rel=2e-5), name


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

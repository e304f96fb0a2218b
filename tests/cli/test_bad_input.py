"""Survey files, definitions and jobs that are not what they should be."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from tests.command_line import LAMOST, assert_error, assert_nothing_final
from tests.conftest import ROOT
from tests.job import contents, write_job


@pytest.fixture(scope="module")
def spectra(small_sky) -> Table:
    """The first 600 rows of the simulated LAMOST table."""
    return Table.read(small_sky / "lamost.fits")[:600]


def column(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Table, Path], Path]:
    def build(table: Table, folder: Path) -> Path:
        table[name] = change(np.asarray(table[name], dtype=np.float64))
        table.write(folder / "changed.fits")
        return folder / "changed.fits"

    return build


def _positive(values: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.where(values > 0, change(np.maximum(values, 1e-9)), values)


def truncated(table: Table, folder: Path) -> Path:
    table.write(folder / "whole.fits")
    (folder / "part.fits").write_bytes((folder / "whole.fits").read_bytes()[:60_000])
    return folder / "part.fits"


def truncated_gzip(table: Table, folder: Path) -> Path:
    table.write(folder / "whole.fits.gz")
    whole = (folder / "whole.fits.gz").read_bytes()
    (folder / "part.fits.gz").write_bytes(whole[: len(whole) // 2])
    return folder / "part.fits.gz"


def without_column(table: Table, folder: Path) -> Path:
    table.rename_column("teff", "teff_k")
    table.write(folder / "renamed.fits")
    return folder / "renamed.fits"


def text_in_a_number(table: Table, folder: Path) -> Path:
    words = [f"{value:.2f}" for value in table["teff"]]
    words[123] = "hot"
    table["teff"] = words
    table.write(folder / "words.csv")
    return folder / "words.csv"


def no_rows(table: Table, folder: Path) -> Path:
    table[:0].write(folder / "empty.fits")
    return folder / "empty.fits"


def no_table(table: Table, folder: Path) -> Path:
    fits.PrimaryHDU(np.zeros((8, 8))).writeto(folder / "image.fits")
    return folder / "image.fits"


def no_fits(table: Table, folder: Path) -> Path:
    (folder / "letter.fits").write_text("Dear reader\n")
    return folder / "letter.fits"


def no_bytes(table: Table, folder: Path) -> Path:
    (folder / "nothing.fits").touch()
    return folder / "nothing.fits"


def one_key(table: Table, folder: Path) -> Path:
    table["obsid"] = 7
    table.write(folder / "keys.fits")
    return folder / "keys.fits"


BAD_FILES = {
    "missing": (lambda table, folder: folder / "gone.fits", [r"gone\.fits does not exist"]),
    "folder": (lambda table, folder: folder, ["is not a file"]),
    "truncated": (truncated, [r"part\.fits is truncated: 60000 bytes", "Download it again"]),
    "truncated gzip": (truncated_gzip, [r"part\.fits\.gz: truncated or damaged", "Download"]),
    "no FITS": (no_fits, [r"letter\.fits is not a FITS file", "Download"]),
    "no bytes": (no_bytes, [r"nothing\.fits is empty"]),
    "no table": (no_table, [r"image\.fits contains no binary table", "Convert it"]),
    "no rows": (no_rows, [r"empty\.fits has no rows"]),
    "missing column": (without_column, [r"renamed\.fits: no column 'teff'", "Did you mean teff_k"]),
    "text": (text_in_a_number, [r"column 'teff', row 123 \(line 125\): 'hot' is not a number"]),
    "teff in 1000 K": (
        column("teff", lambda v: _positive(v, lambda x: x / 1000)),
        [r"changed\.fits: column 'teff'", r"not within 1000 to 100000 K", "row 0", "unit"],
    ),
    "teff as log10": (
        column("teff", lambda v: _positive(v, np.log10)),
        [r"changed\.fits: column 'teff'.* looks like log10", "temperature in K"],
    ),
    "ra in hours": (
        column("ra", lambda v: v / 15),
        [r"changed\.fits: column 'ra'.* looks like hours", "hourangle"],
    ),
    "ra out of range": (
        column("ra", lambda v: v + 200),
        [r"ra out of range", r"changed\.fits row \d+", "max_rejected_fraction"],
    ),
    "all null": (
        column("feh", lambda v: np.full_like(v, -9999)),
        [r"changed\.fits: column 'feh'.* has no value in any row", r"Map \[columns\.feh\]"],
    ),
    "Gaia id as float": (
        column("gaia_source_id", lambda v: v),
        ["column 'gaia_source_id' is stored as float: digits are lost", "cannot be repaired"],
    ),
    "no key": (one_key, [r"'obs_id' is not a key: 599 of 600", "join"]),
}


@pytest.mark.parametrize(("build", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_survey_file(cli, spectra, tmp_path, build, says):
    file = build(spectra.copy(), tmp_path)
    ran = cli("ingest", LAMOST, file, "-o", "out", "-w", 0)
    assert_error(ran, 4, *says)
    assert_nothing_final(tmp_path / "out")
    again = cli("ingest", LAMOST, file, "-o", "out", "-w", 0, "--json")
    assert (again.code, again.out, again.message) == (4, "", ran.message)


def test_a_failed_ingest_does_not_block_its_directory(cli, small_sky, tmp_path):
    assert cli("ingest", LAMOST, small_sky / "apogee.fits", "-o", "out", "-w", 0).code == 4
    assert not (tmp_path / "out").exists()
    assert cli("ingest", "apogee-dr17", small_sky / "apogee.fits", "-o", "out", "-w", 0).code == 0


BAD_SURVEYS = {
    "wrong hdu": ("hdu = 1", "hdu = 2", [r"lamost\.fits: HDU 2 does not exist"]),
    "unknown key": ("[columns.ra]", "[colums.ra]", ["key 'colums'", "Did you mean columns"]),
    "unknown column": ("[columns.teff]", "[columns.tef]", [r"columns\.tef\]", "Did you mean teff"]),
    "not TOML": ("[columns.ra]", "[columns.ra", ["not valid TOML", "line"]),
    "newer format": ("format = 1", "format = 2", ["survey format 2 is not 1"]),
}


@pytest.mark.parametrize(("old", "new", "says"), BAD_SURVEYS.values(), ids=BAD_SURVEYS)
def test_a_bad_survey_definition(cli, small_sky, tmp_path, old, new, says):
    text = (ROOT / f"sos_dask/surveys/{LAMOST}.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1))
    ran = cli("ingest", "./mine.toml", small_sky / "lamost.fits", "-o", "out", "-w", 0)
    assert_error(ran, 4, *says)
    assert_nothing_final(tmp_path / "out")


BAD_JOBS: dict[str, tuple[tuple[str, str], int, list[str]]] = {
    "unknown section": (("[train]", "[trian]"), 3, ["unknown key 'trian'", "Did you mean train"]),
    "unknown key": (
        ("[train]", "[crossmatch]\nradius = 1\n[train]"), 3,
        [r"job\.toml: unknown key 'crossmatch\.radius'", "radius_arcsec"],
    ),
    "no radius": (
        ("[train]", "[crossmatch]\nradius_arcsec = 0\n[train]"), 3,
        [r"crossmatch\.radius_arcsec.*greater than 0 \(given: 0\)"],
    ),
    "two references of one name": (("[reference.galah]", "[reference.apogee]"), 3,
                                   ["not valid TOML.*apogee"]),
    "a reference named like the target": (("[reference.galah]", "[reference.lamost]"), 3,
                                          ["two surveys are named 'lamost'"]),
    "unknown survey": (('"galah-dr4"', '"galah-dr44"'), 4,
                       [r"job\.toml: reference\.galah\.survey: there is no survey 'galah-dr44'",
                         "Did you mean galah-dr4"]),
    "missing file": (("{SMALL_SKY}/galah.fits", "{SMALL_SKY}/gala.fits"), 4,
                     [r"gala\.fits does not exist", "environment variables"]),
    "unset variable": (("{SMALL_SKY}/galah.fits", "{NOWHERE}/galah.fits"), 3,
                       [r"\$\{NOWHERE\} is neither set in the environment"]),
    "override of an unknown key": (
        ('files = ["${SMALL_SKY}/galah.fits"]',
         'files = ["${SMALL_SKY}/galah.fits"]\noverride = {cuts = {snr = {mni = 3}}}'), 4,
        ["unknown key 'cuts.snr.mni'", "min"],
    ),
    "unknown method": (('methods = ["polynomial"]', 'methods = ["polinomial"]'), 3,
                       [r"job\.toml: train\.methods: there is no method 'polinomial'",]),
    "unknown parameter": (('methods = ["polynomial"]',
                           'methods = ["polynomial"]\nparams = {polynomial = {ordr = 3}}'), 3,
                          [r"job\.toml: train\.params\.polynomial: .*unknown key 'ordr'"]),
    "order out of range": (('methods = ["polynomial"]',
                            'methods = ["polynomial"]\nparams = {polynomial = {order = 99}}'), 3,
                           [r"job\.toml: train\.params\.polynomial: .*order"]),
    "reference without a name": (("[reference.apogee]", "[reference]"), 3,
                                 [r"reference\.survey = 'apogee-dr17' is given where a table",
                                  r"\[reference\.apogee\]"]),
    "a target with a wrong survey": ((f'survey = "{LAMOST}"', 'survey = "apogee-dr17"'), 4,
                                     [r"lamost\.fits: no column"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "code", "says"), BAD_JOBS.values(), ids=BAD_JOBS)
def test_a_bad_job(cli, small_sky, tmp_path, change, code, says):
    job = write_job(tmp_path, small_sky, change)
    assert_error(cli("rebuild", job, "-w", 0), code, *says)
    if ("is neither set" not in says[0] and code == 3) or "survey: " in says[0]:
        assert not Path("store").exists(), "nothing is written before the job is read"
    assert not (tmp_path / "store/current").exists()
    assert_nothing_final(tmp_path / "store")


def test_a_job_file_that_is_none(cli, small_sky, tmp_path):
    assert_error(
        cli("rebuild", "gone.toml"), 3, r"job file gone\.toml cannot be read: No such file"
    )
    assert_error(cli("rebuild", tmp_path), 3, "Is a directory")
    assert_error(
        cli("rebuild", small_sky / "lamost.fits"), 3, r"lamost\.fits: byte \d+ is not UTF-8"
    )


def test_too_few_pairs(cli, small_store, small_sky, tmp_path):
    shutil.copytree(small_store, tmp_path / "store", symlinks=True)
    few = ("[train]", "[crossmatch]\nradius_arcsec = 0.0001\nuse_gaia_id = false\n[train]")
    before = contents(tmp_path / "store/current")
    ran = cli("rebuild", write_job(tmp_path, small_sky, few), "-w", 0)
    assert_error(ran, 7, "pairs", "Widen|[Mm]atch more stars")
    assert contents(tmp_path / "store/current") == before

"""The command line as a user meets it: errors, exit codes, JSON, text, help, signals."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pyarrow as pa
import pytest
from astropy.io import fits
from astropy.table import Table

from sos_dask import corrections as models
from sos_dask.cli import app, main
from sos_dask.cli.output import reporting
from sos_dask.errors import SosError
from sos_dask.evidence.coverage import MEASURES
from sos_dask.stages.coverage import CoverageSettings
from sos_dask.stages.report import figures
from sos_dask.stars.group import DedupeSettings
from sos_dask.stars.unify import UnifySettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import MANIFEST, sealed_json
from sos_dask.surveys.definition import builtin_surveys
from tests.conftest import ROOT
from tests.job import contents, write_job
from tests.sky import observations, write_catalog

LAMOST = "lamost-dr11-lrs"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What stands on stderr but for the progress."""
        lines = self.err.splitlines()
        return "\n".join(line for line in lines if not re.search(r": \d+/\d+$", line))

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Ran]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path) -> Cli:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["sos-dask", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Ran(int(end.value.code or 0), out, err)

    return run


def command(*arguments: object) -> list[str]:
    """The installed command as another process."""
    return [str(Path(sys.executable).with_name("sos-dask")), *map(str, arguments)]


def assert_error(ran: Ran, code: int, *says: str) -> None:
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.message.startswith("error: "), ran.err
    for text in says:
        assert re.search(text, ran.message), (text, ran.message)
    assert "Traceback" not in ran.err and "unexpected" not in ran.err
    assert len(ran.message.splitlines()) <= 3, "an error is a sentence, and what to do"


def assert_nothing_final(folder: Path) -> None:
    """No complete output and no data of one under its own name."""
    names = {path.name for path in folder.rglob("*") if ".work" not in path.parts}
    assert not names & {MANIFEST, "hats.properties", "partition_info.csv"}
    assert not [name for name in names if name.endswith((".parquet", ".tmp"))]


# -- survey files that are not what they should be ------------------------------------------------


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
    "folder": (lambda table, folder: folder, ["is no file"]),
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


# -- job files ------------------------------------------------------------------------------------

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
                          [r"job\.toml: train\.params\.polynomial: .*no parameter 'ordr'"]),
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
    assert_error(ran, 7, "pairs", "Widen|match more stars")
    assert contents(tmp_path / "store/current") == before


# -- arguments of the steps -----------------------------------------------------------------------

BAD_ARGUMENTS: dict[str, tuple[list[str], int, list[str]]] = {
    "radius 0": (["crossmatch", "{lamost.stars}", "{reference}", "--radius-arcsec", "0"], 3,
                 ["radius_arcsec: must be greater than 0"]),
    "radius below 0": (["dedupe", "{lamost.observations}", "--radius-arcsec", "-1"], 3,
                       [r"radius_arcsec: .*given: -1\.0"]),
    "radius nan": (["reference", "a={apogee.stars}", "--radius-arcsec", "nan"], 3,
                   ["radius_arcsec: .*given: nan"]),
    "shard": (["apply", "{model.polynomial}", "{lamost.observations}", "--partitions", "5/3"], 3,
              ["no shard 5 of 3", "1/3 to 3/3"]),
    "partition": (["apply", "{model.polynomial}", "{lamost.observations}", "--partitions", "99"],
                  3, ["partitions are 0 to"]),
    "dedupe method": (["dedupe", "{lamost.observations}", "--method", "mean"], 3,
                      ["method: must be 'inverse-variance'"]),
    "unify method": (["reference", "a={apogee.stars}", "--method", "mean"], 3, ["precedence"]),
    "pairs": (["crossmatch", "{lamost.stars}", "{reference}", "--radius-arcsec", "1", "--pairs",
               "most"], 3, ["pairs: must be 'best' or 'all'"]),
    "same name": (["reference", "a={apogee.stars}", "a={galah.stars}"], 3,
                  ["two surveys are named 'a'"]),
    "no name": (["reference", "{apogee.stars}"], 3, ["is not NAME=DIRECTORY"]),
    "no directory": (["reference", "apogee="], 3, ["is not NAME=DIRECTORY"]),
    "no catalog": (["dedupe", "gone"], 5, ["gone does not exist"]),
    "other folder": (["dedupe", "{sky}"], 5, ["not an output of sos-dask"]),
    "model as catalog": (["apply", "{model.polynomial}", "{model.polynomial}"], 5,
                         ["is not a catalog"]),
    "stars again": (["dedupe", "{lamost.stars}"], 5, ["no column 'obs_id'"]),
    "pairs as target": (["crossmatch", "{pairs}", "{reference}", "--radius-arcsec", "1"], 5,
                        ["neither star_id nor obs_id"]),
    "no pairs": (["train", "{reference}", "-m", "polynomial"], 5,
                 ["is not a catalog of pairs", "sos-dask crossmatch"]),
    "no model": (["apply", "{pairs}", "{lamost.observations}"], 7, [r"model\.json"]),
    "missing model": (["apply", "gone", "{lamost.observations}"], 7, [r"gone/model\.json"]),
    "train method": (["train", "{pairs}", "-m", "polynomal"], 3,
                     ["no method 'polynomal'", "polynomial"]),
    "train parameter": (["train", "{pairs}", "-m", "polynomial", "-p", "ordr=3"], 3,
                        ["no parameter 'ordr'", "order"]),
    "parameter out of range": (["train", "{pairs}", "-m", "polynomial", "-p", "order=77"], 3,
                               [r"polynomial\.order = 77 is outside"]),
    "parameter without value": (["train", "{pairs}", "-m", "polynomial", "-p", "order"], 3,
                                ["is not NAME=VALUE"]),
    "validation": (["train", "{pairs}", "-m", "polynomial", "--validation", "kfolds"], 3,
                   ["validation: ", "'kfold'"]),
    "margin": (["ingest", LAMOST, "{sky}/lamost.fits", "--margin-arcsec", "0"], 3,
               ["--margin-arcsec 0 is not between"]),
    "same file twice": (["ingest", LAMOST, "{sky}/lamost.fits", "{sky}/lamost.fits"], 3,
                        ["the same content is given twice"]),
    "unknown survey": (["ingest", "lamost-dr12-lrs", "{sky}/lamost.fits"], 4,
                       ["no survey 'lamost-dr12-lrs'", "Did you mean lamost-dr1"]),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "says"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(cli, small_store, small_sky, tmp_path, arguments, code, says):
    def path(match: re.Match[str]) -> str:
        return str(small_sky if match[1] == "sky" else small_store / "current" / match[1])

    given = [re.sub(r"\{([\w.]+)\}", path, argument) for argument in arguments]
    assert_error(cli(*given, "-o", "out", "-w", 0), code, *says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["dedupe", "x"], "Missing option '--out'"),
        (["dedupe"], "Missing argument"),
        (["rebuild", "x", "-w", "-1"], "--workers"),
        (["rebuild", "x", "-w", "many"], "--workers"),
        (["crossmatch", "a", "b"], "--out"),
        (["crossmatch", "a", "b", "-o", "c", "--radius-arcsec", "1", "--folds", "1"], "--folds"),
        (["ingest", LAMOST, "x", "-o", "c", "--rows-per-partition", "0"], "--rows-per-partition"),
        (["demo", "--rows", "3"], "--rows"),
        (["simulate", "-o", "x", "--seed", "-1"], "--seed"),
        (["status", "--strore", "x"], "No such option: --strore"),
    ],
)
def test_usage_errors_are_told_with_code_2(cli, arguments, says):
    ran = cli(*arguments)
    assert ran.code == 2 and ran.out == ""
    assert says in ran.err


def test_stores_that_are_none(cli, small_sky):
    commands = ("status", "report", "compare", "trends", "coverage", "uncertainty")
    for name in ("gc", *commands):
        assert_error(cli(name, "--store", "gone"), 5, "no sos-dask store at 'gone'")
    for name in ("a", "b"):
        Path("store", name, "artifacts").mkdir(parents=True)
    for name in commands:
        says = "no sos-dask store at 'store'; .*\n  Stores near it: store/a, store/b"
        assert_error(cli(name), 5, says)
    for name in ("status", "gc"):
        assert_error(cli(name, "--store", small_sky), 5, "no sos-dask store at ")
    assert_error(cli("verify", "gone"), 5, "gone does not exist")


# -- damaged catalogs and models ------------------------------------------------------------------


@pytest.fixture
def observed(small_store, tmp_path) -> Path:
    """A copy of the observations, free to be damaged."""
    return Path(shutil.copytree(small_store / "current/lamost.observations", tmp_path / "observed"))


def test_a_catalog_of_a_newer_format(cli, observed):
    manifest = observed / MANIFEST
    manifest.write_text(sealed_json({**json.loads(manifest.read_text()), "format": 3}))
    ran = cli("dedupe", observed, "-o", "out", "-w", 0)
    assert_error(ran, 5, r"observed/manifest\.json has format 3", "Install a newer sos-dask")


def test_an_unfinished_catalog(cli, small_store):
    current = small_store / "current"
    model, catalog = current / "model.polynomial", current / "lamost.observations"
    assert cli("apply", model, catalog, "-o", "out", "-w", 0, "--partitions", "0").code == 0
    ran = cli("verify", "out")
    assert_error(ran, 5, r"out has no manifest\.json", "unfinished: run the command that makes it")


@pytest.mark.parametrize(
    ("damage", "workers"), [("cut", 0), ("cut", 1), ("gone", 0), ("overwritten", 0)]
)
def test_a_damaged_partition_is_named(cli, observed, workers, damage):
    catalog = Catalog.open(observed)
    file = catalog.partition_file(catalog.pixels[1])
    if damage == "gone":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:3000] if damage == "cut" else bytes(len(content)))
    ran = cli("dedupe", observed, "-o", "out", "-w", workers)
    # Sizes are seen when the catalog is opened, content where it is read.
    code = 6 if damage == "overwritten" else 5
    assert_error(ran, code, re.escape(str(file)), "(remove|Remove) (its catalog|.*/observed)")
    assert_nothing_final(observed.parent / "out")
    assert not (observed.parent / "out" / MANIFEST).exists()
    checked = cli("verify", observed)
    assert checked.code == 5 and file.name in checked.out
    as_json = cli("verify", observed, "--json")
    assert as_json.code == 5
    assert any(file.name in text for text in as_json.json["problems"][str(observed)])


def test_a_tampered_model(cli, small_store, tmp_path):
    model = Path(shutil.copytree(small_store / "current/model.polynomial", tmp_path / "model"))
    (name,) = json.loads((model / "model.json").read_text())["files"]
    (model / name).write_bytes((model / name).read_bytes() + b" ")
    ran = cli("apply", model, small_store / "current/lamost.observations", "-o", "out", "-w", 0)
    assert_error(ran, 7, f"{name} is not the file that was saved", "train the model again")
    assert not (tmp_path / "out").exists()


def test_another_output_is_not_overwritten_unless_told(cli, small_store, tmp_path):
    catalog = small_store / "current/apogee.observations"
    assert cli("dedupe", catalog, "-o", "out", "-w", 0).code == 0
    before = contents(tmp_path / "out")
    more = ["dedupe", catalog, "-o", "out", "-w", 0, "--method", "median"]
    assert_error(cli(*more), 5, "out already holds", "--overwrite")
    assert contents(tmp_path / "out") == before
    assert cli(*more, "--overwrite").code == 0
    assert contents(tmp_path / "out") != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("42")
    ran = cli("dedupe", catalog, "-o", "mine", "-w", 0, "--overwrite")
    assert_error(ran, 5, "no output of sos-dask: not overwritten")
    assert (tmp_path / "mine/thesis.tex").read_text() == "42"


def test_a_simulated_sky_replaces_no_files_unless_told(cli, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/galah.fits").write_text("the real one")
    ran = cli("simulate", "-o", "mine", "--rows", 1000)
    assert_error(ran, 5, "mine/galah.fits exists", "--overwrite")
    assert contents(tmp_path / "mine").keys() == {"galah.fits"}
    assert cli("simulate", "-o", "mine", "--rows", 1000, "--overwrite").code == 0
    assert fits.getheader(tmp_path / "mine/galah.fits", 1)["NAXIS2"] > 0


def test_a_reference_made_by_hand_is_that_of_a_rebuild(cli, small_store):
    current = small_store / "current"
    surveys = [f"{name}={current / f'{name}.stars'}" for name in ("apogee", "galah")]
    assert cli("reference", *surveys, "-o", "reference", "-w", 0).code == 0
    made, built = (
        pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])
        for catalog in (Catalog.open("reference"), Catalog.open((current / "reference").resolve()))
    )
    assert made.equals(built)
    assert cli("reference", *surveys, "-o", "raw", "-w", 0, "--no-offsets").code == 0
    raw = Catalog.open("raw")
    assert not pa.concat_tables([raw.read(pixel) for pixel in raw.pixels]).equals(built)


def test_a_command_does_not_overwrite_what_it_reads(cli, small_store, tmp_path):
    for name in ("pairs", "lamost.stars", "reference", "model.polynomial", "lamost.observations"):
        shutil.copytree((small_store / "current" / name).resolve(), tmp_path / name)
    stars, pairs, model = "lamost.stars", "pairs", "model.polynomial"
    before = contents(tmp_path)
    for more in (
        ("dedupe", "lamost.observations", "-o", "lamost.observations"),
        ("train", pairs, "-m", "polynomial", "-o", pairs),
        ("crossmatch", stars, "reference", "--radius-arcsec", 1, "-o", stars),
        ("crossmatch", stars, "reference", "--radius-arcsec", 1, "-o", "reference"),
        ("apply", model, "lamost.observations", "-o", "lamost.observations"),
        ("apply", model, "lamost.observations", "-o", model),
    ):
        ran = cli(*more, "-w", 0, "--overwrite")
        assert_error(ran, 3, f"{more[-1]} is to be replaced, but", "another directory")
        assert contents(tmp_path) == before


def test_an_output_that_cannot_be_made(cli, small_store, tmp_path):
    catalog = small_store / "current/apogee.observations"
    (tmp_path / "file").touch()
    for place in ("file", "file/out", "/proc/out"):
        assert_error(cli("dedupe", catalog, "-o", place, "-w", 0), 9, f"cannot .*write {place}")
    assert (tmp_path / "file").read_bytes() == b""


# -- full disks and signals, in real processes ----------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A file system of 700 KiB; only where one may be mounted."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.fault
def test_a_full_disk(small_sky, tiny_disk, tmp_path):
    job = write_job(tmp_path, small_sky, ('store = "store"', f'store = "{tiny_disk}"'))
    ran = subprocess.run(command("rebuild", job, "-w", 0), capture_output=True, text=True)
    assert ran.returncode == 9 and ran.stdout == ""
    assert re.search(rf"^error: the disk is full: cannot write {tiny_disk}/", ran.stderr, re.M)
    assert "it goes on where it stopped" in ran.stderr
    assert not (tiny_disk / "current").exists()
    assert not list(tiny_disk.rglob("*.tmp"))
    for manifest in tiny_disk.rglob(MANIFEST):
        assert Catalog.open(manifest.parent).manifest is not None


@pytest.mark.fault
def test_a_file_that_grows_too_large(small_sky, tmp_path):
    """The same where no file system can be mounted: a limit on the size of files."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = ["ingest", LAMOST, small_sky / "lamost.fits", "-o", tmp_path / "out", "-w", 0]
    ran = subprocess.run(command(*arguments), capture_output=True, text=True, preexec_fn=limit)
    assert ran.returncode == 9, ran.stderr
    assert re.search(rf"^error: the disk is full: cannot write {tmp_path}/out/", ran.stderr, re.M)
    assert_nothing_final(tmp_path / "out")
    # With room again the same command goes on.
    assert subprocess.run(command(*arguments), capture_output=True).returncode == 0


@pytest.mark.fault
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupt_ends_cleanly(small_sky, tmp_path, workers):
    """Ctrl-C goes to the whole group of processes, as a terminal sends it."""
    job = write_job(tmp_path, small_sky)
    process = subprocess.Popen(
        command("rebuild", job, "-w", workers),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(("dedupe", "reference", "crossmatch")):
            break
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert "stopped; run the same command again to continue" in err
    assert "Traceback" not in err
    assert not psutil.wait_procs(children, timeout=20)[1], "workers outlived their driver"
    assert not (tmp_path / "store/current").exists()


def test_threads_make_what_workers_make(cli, small_store, tmp_path):
    observed = small_store / "current/lamost.observations"
    assert cli("dedupe", observed, "-o", "alone/stars", "-w", 0).code == 0
    assert cli("dedupe", observed, "-o", "threads/stars", "--threads", 3).code == 0
    assert contents(tmp_path / "alone") == contents(tmp_path / "threads")
    both = cli("dedupe", observed, "-o", "both", "--threads", 2, "-w", 2)
    assert_error(both, 3, "--threads goes with neither --workers nor --scheduler")


@pytest.mark.fault
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_threads_end_and_go_on_again(small_sky, tmp_path, sent):
    """By Ctrl-C in order; after a kill the same command goes on where it was."""
    arguments = ["ingest", LAMOST, small_sky / "lamost.fits", "--rows-per-partition", "30"]
    subprocess.run(command(*arguments, "-o", tmp_path / "alone/stars", "-w", 0), check=True)
    run = command(*arguments, "-o", tmp_path / "threads/stars", "--threads", 2)
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("write"):
            break
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    assert out == "" and "Traceback" not in err
    assert not (tmp_path / "threads/stars" / MANIFEST).exists()
    subprocess.run(run, check=True)
    assert contents(tmp_path / "alone") == contents(tmp_path / "threads")


def test_shards_may_run_at_once(small_store, tmp_path):
    current = small_store / "current"
    catalog = current / "lamost.observations"
    arguments = ["apply", current / "model.polynomial", catalog, "-o", tmp_path / "out", "-w", 0]
    shards = [
        subprocess.Popen(
            command(*arguments, "--json", "--partitions", f"{number}/3"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2, 3)
    ]
    ended = [shard.communicate(timeout=120) for shard in shards]
    assert [shard.returncode for shard in shards] == [0, 0, 0], ended
    documents = [json.loads(out) for out, _ in ended]
    assert any(document["complete"] for document in documents), "nobody committed"
    alone = subprocess.run(
        command(*arguments[:4], tmp_path / "out", "-w", 0, "--json"), capture_output=True, text=True
    )
    assert json.loads(alone.stdout)["rows"]["out"] == Catalog.open(catalog).n_rows


def test_output_that_nobody_reads_is_no_error():
    ran = subprocess.run(
        f"{command('surveys', LAMOST, '--json')[0]} surveys {LAMOST} --json | head -c 1",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.stdout, ran.stderr) == ("{", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_an_error():
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(command("surveys"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 9
    assert ran.stderr == f"error: cannot read or write: {os.strerror(errno.ENOSPC)}\n"


def test_debug_shows_where(cli, monkeypatch, capsys):
    assert "Traceback" not in cli("dedupe", "gone", "-o", "out").err
    monkeypatch.setattr(sys, "argv", ["sos-dask", "dedupe", "gone", "-o", "out", "--debug"])
    with pytest.raises(SosError, match="gone does not exist"):
        main()


# -- JSON -----------------------------------------------------------------------------------------

ROWS = {"in": int, "out": int, "rejected": int, "dropped": dict, "added": dict}
STEP = {"complete": bool, "path": str, "stage": str, "rows": ROWS, "summary": dict}
STAGE = {"stage": str, "rows": ROWS, "path": str, "summary": dict}
METRIC = {
    "method": str, "label": str, "subset": str, "n": int, "median_before": float,
    "scatter_before": float, "median_after": float, "scatter_after": float,
}  # fmt: skip
BUILD = {
    "build": str, "path": str, "chosen": str, "why": str,
    "stages": {str: {"ran": bool, "why": str, **STAGE}},
    "metrics": [METRIC], "products": {str: str},
}  # fmt: skip


def assert_shape(value: Any, shape: Any, where: str = "document") -> None:
    """The value has just the keys and types of the shape; ``{str: ...}`` is any mapping."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), where
        if list(shape) == [str]:
            assert value, where
            shape = dict.fromkeys(value, shape[str])
        assert set(value) == set(shape), where
        for key, inner in shape.items():
            assert_shape(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list) and value, where
        for number, item in enumerate(value):
            assert_shape(item, shape[0], f"{where}[{number}]")
    else:
        assert type(value) is shape, f"{where} is {value!r}"


def test_steps_print_their_account_as_json(cli, small_sky, tmp_path):
    """All single steps, one after the other, on what the one before wrote."""

    def step(*arguments: object) -> Any:
        ran = cli(*arguments, "-w", 0, "--json")
        assert ran.code == 0, ran.err
        assert_shape(ran.json, STEP)
        assert ran.json["complete"] and ran.json["path"] == str(arguments[-1])
        return ran.json

    for survey, definition in (
        ("lamost", LAMOST),
        ("apogee", "apogee-dr17"),
        ("galah", "galah-dr4"),
    ):
        done = step("ingest", definition, small_sky / f"{survey}.fits", "-o", survey)
        rows = done["rows"]
        assert rows["in"] == rows["out"] + rows["rejected"] + sum(rows["dropped"].values())
        stars = step("dedupe", survey, "-o", f"{survey}.stars")
        assert stars["rows"]["in"] == rows["out"]
    step("reference", "apogee=apogee.stars", "galah=galah.stars", "-o", "reference")
    pairs = step("crossmatch", "lamost.stars", "reference", "--radius-arcsec", 1, "-o", "pairs")
    model = step("train", "pairs", "-m", "polynomial", "-p", "order=3", "-o", "model")
    assert_shape(model["summary"]["metrics"], [METRIC])
    assert model["rows"]["in"] == pairs["rows"]["out"]
    assert models.load(tmp_path / "model").info.params["order"] == 3
    corrected = step("apply", "model", "lamost", "-o", "corrected")
    assert corrected["rows"]["out"] == corrected["rows"]["in"] == 4996
    verified = cli("verify", "corrected", "pairs", "--json")
    assert verified.json == {"problems": {"corrected": [], "pairs": []}}
    again = cli("apply", "model", "lamost", "-o", "corrected", "-w", 0, "--json")
    assert again.json == corrected, "a finished output is left alone"


def test_a_training_of_few_pairs_needs_no_workers(cli, small_store):
    nobody = ["--scheduler", "tcp://127.0.0.1:9"]
    pairs = small_store / "current/pairs"
    ran = cli("train", pairs, "-m", "polynomial", "-o", "model", "--json")
    assert ran.json["rows"]["in"] >= ran.json["rows"]["out"] > 100
    refused = cli("train", pairs, "-m", "polynomial", "-o", "other", *nobody)
    assert_error(refused, 3, "--scheduler has no effect: train uses one process")
    searched = cli("train", pairs, "-m", "polynomial", "--search", 2, "-o", "other", *nobody)
    assert_error(searched, 8, "no Dask scheduler answers")


def test_an_unfinished_apply_says_so(cli, small_store):
    current = small_store / "current"
    arguments = ["apply", current / "model.polynomial", current / "lamost.observations", "-w", 0]
    ran = cli(*arguments, "-o", "out", "--partitions", "1/2", "--json")
    assert ran.json == {"complete": False, "path": "out"}
    ran = cli(*arguments, "-o", "out", "--partitions", "1/2")
    assert ran.out == "out: other partitions are still missing\n"


def test_rebuild_prints_one_json_object_and_nothing_else(small_sky, small_store, tmp_path):
    """In a real process with workers: whatever those print must not get between."""
    shutil.copytree(small_store, tmp_path / "store", symlinks=True)
    both = 'methods = ["polynomial", "boosted"]\nparams = {boosted = {n_rounds = 20}}'
    job = write_job(tmp_path, small_sky, ('methods = ["polynomial"]', both))
    ran = subprocess.run(
        command("rebuild", job, "-w", 1, "--json"), capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert_shape(document, BUILD)
    assert re.search(r"^train boosted: \d/\d$", ran.stderr, re.M), "progress goes to stderr"
    assert Ran(0, "", ran.stderr).message == "", "nothing but progress is on stderr"
    stages = document["stages"]
    assert stages["lamost.observations"]["why"] == "unchanged"
    assert not stages["lamost.observations"]["ran"]
    assert stages["lamost.observations"]["rows"] == {
        "in": 5000, "out": 4996, "rejected": 0, "dropped": {"exact duplicates": 4}, "added": {},
    }  # fmt: skip
    assert stages["model.boosted"]["ran"] and stages["comparison"]["ran"]
    assert document["chosen"] in ("polynomial", "boosted")
    assert document["why"].startswith(f"{document['chosen']}: ")
    # The same model as before corrects the same rows.
    assert stages["lamost.corrected"]["ran"] == (document["chosen"] == "boosted")
    found = {(metric["method"], metric["label"]) for metric in document["metrics"]}
    assert found >= {
        (m, label) for m in ("polynomial", "boosted") for label in ("teff", "logg", "feh")
    }
    for metric in document["metrics"]:
        assert metric["n"] > 100 and metric["scatter_after"] < metric["scatter_before"]
    assert set(document["products"]) == set(stages)


def test_other_documents(cli, small_store, small_sky, tmp_path):
    store = Path(shutil.copytree(small_store, tmp_path / "store", symlinks=True))
    job = write_job(tmp_path, small_sky, ("[train]", "[crossmatch]\nn_folds = 4\n[train]"))
    planned = cli("rebuild", job, "--dry-run", "--json").json
    assert_shape(planned, {"stages": {str: {"stage": str, "runs": bool, "why": str}}})
    assert planned["stages"]["pairs"] == {
        "stage": "crossmatch", "runs": True, "why": "n_folds 5 -> 4"
    }  # fmt: skip
    found = cli("status", "--store", store, "--json").json
    assert_shape(
        found,
        {
            "store": str, "current": str, "builds": [str], "products": {str: STAGE},
            "missing": list, "unfinished": list, "bytes": int, "unused_bytes": int,
        },
    )  # fmt: skip
    assert next(iter(found["products"])) == "lamost.observations"
    (store / "artifacts/apply/123/.work").mkdir(parents=True)
    removed = cli("gc", "--store", store, "--dry-run", "--json").json
    assert removed["dry_run"] is True
    assert_shape(removed["removed"], [{"path": str, "bytes": int}])
    listed = cli("surveys", "--json").json
    assert_shape(listed, {"surveys": [{"name": str, "title": str}]})
    assert [item["name"] for item in listed["surveys"]] == builtin_surveys()
    explained = cli("surveys", LAMOST, "--json").json
    assert {"column": "teff", "unit": "K"}.items() <= explained["columns"][4].items()
    assert {cut["cut"] for cut in explained["cuts"]} >= {"snr", "teff"}
    simulated = cli("simulate", "-o", "mock", "--rows", 1000, "--json").json
    assert set(simulated["files"]) >= {"lamost", "apogee", "galah", "truth"}
    assert all(Path(file).is_file() for file in simulated["files"].values())


def test_uncertainty_shows_what_was_checked(cli, small_store, tmp_path):
    ran = cli("uncertainty", "--store", small_store)
    assert ran.code == 0, ran.err
    for text in (
        "Held-out pairs inside their interval",
        "sparse cells",
        "Quoted errors by repeats",
    ):
        assert text in ran.out
    found = cli("uncertainty", "--store", small_store, "--json").json
    share = {"hit_rate": float, "low": float, "high": float}
    one = {"label": str, "subset": str, "level": float, "n": int, **share}
    assert_shape(found["hit_rates"], [one])
    assert {"path", "method", "reference_error", "factors_95", "error_factors"} <= set(found)
    assert set(found["error_factors"]) == {"lamost", "apogee", "galah"}
    assert_error(cli("uncertainty", "--store", tmp_path), 5, "no sos-dask store at")


def test_apply_adds_errors(cli, small_store, tmp_path):
    build = (small_store / "current").resolve()
    given = ["apply", build / "model.polynomial", build / "lamost.observations", "-w", 0]
    ran = cli(*given, "--errors", build / "uncertainty", "-o", "corrected")
    assert ran.code == 0, ran.err
    names = Catalog.open(tmp_path / "corrected").schema.names
    assert [name for name in names if name.endswith("_sos_err")] == [
        "teff_sos_err", "logg_sos_err", "feh_sos_err",
    ]  # fmt: skip
    assert_error(cli(*given, "--errors", build / "pairs", "-o", "other"), 7, "error.json")


def test_demo_compares_with_the_truth(cli, tmp_path, monkeypatch):
    # Which figures there are is another test's matter, and they take as long as the rest.
    monkeypatch.setattr(
        "sos_dask.stages.report.figures", lambda build: {"sky": figures(build)["sky"]}
    )
    ran = cli("demo", "--rows", 1000, "--store", "demo", "-w", 0, "--json")
    assert ran.code == 0, ran.err
    truth = ran.json.pop("truth")
    document = {key: value for key, value in ran.json.items() if key != "truth"}
    assert_shape(document, BUILD)
    assert len(truth) == 9
    for item in truth:
        assert set(item) == {"label", "binned_by", "n_bins", "n", "rms_before", "rms_after"}
    assert (tmp_path / "demo/current/lamost.corrected/manifest.json").is_file()
    again = cli("demo", "--rows", 1000, "--store", "demo", "-w", 0)
    assert again.code == 0 and "unchanged" in again.out
    assert "simulate" not in again.err, "the sky is made once"
    for text in ("Held-out pairs", "Label - truth", "teff [K]", "scatter", "feh [dex]"):
        assert text in again.out


def test_numbers_that_are_none_are_null(capsys):
    from sos_dask.cli.output import print_json

    print_json({"a": float("nan"), "b": [np.inf, 1.5], "path": Path("x"), "n": (1, "t", None)})
    assert json.loads(capsys.readouterr().out) == {
        "a": None, "b": [None, 1.5], "path": "x", "n": [1, "t", None]
    }  # fmt: skip


# -- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(cli, small_store, small_sky, tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    given = ["rebuild", write_job(tmp_path, small_sky), "--store", small_store]
    rebuilt = cli(*given, "-w", 0)
    others = [[*given, "--dry-run"], ["surveys"]]
    others += [[name, "--store", small_store] for name in ("status", "uncertainty")]
    shown = [rebuilt, cli("surveys", LAMOST), *(cli(*other) for other in others)]
    for ran in shown:
        assert ran.code == 0
        for line in ran.out.splitlines():
            assert len(line.rstrip()) <= width or "/" in line or "survey" in line, line
    assert re.search(r"lamost\.observations +5,000 +4,996 +0 +4 exact", rebuilt.out)
    assert re.search(r"teff \[K\] +polynomial \* +\d+ +[-+][\d.]+ +[-+][\d.]+ +[\d.]+", rebuilt.out)
    assert f"Products: {small_store / 'current'}" in rebuilt.out


def test_text_of_users_is_no_markup(cli, small_sky, tmp_path):
    """Brackets in names are shown as they are."""
    folder = tmp_path / "[bold]x[/bold]"
    folder.mkdir(parents=True)
    ran = cli(
        "ingest", "apogee-dr17", small_sky / "apogee.fits", "-o", folder / "[red]cat", "-w", 0
    )
    assert ran.code == 0
    assert ran.out.startswith(f"{folder}/[red]cat: 1,100 rows in, ")
    text = (ROOT / f"sos_dask/surveys/{LAMOST}.toml").read_text()
    text = re.sub(r"^title = .*$", 'title = "[bold]Mine[/bold] [/oops]"', text, flags=re.M)
    text = re.sub(r'reason = "Teff has a value"', 'reason = "[/red] why"', text)
    (folder / "mine.toml").write_text(text)
    shown = cli("surveys", folder / "mine.toml")
    assert shown.code == 0
    assert "[bold]Mine[/bold] [/oops]" in shown.out and "[/red] why" in shown.out


def test_a_step_prints_one_line(cli, small_store):
    ran = cli("dedupe", small_store / "current/apogee.observations", "-o", "stars", "-w", 0)
    assert ran.out == "stars: 1,099 rows in, 978 out, 121 merged\n"
    assert re.search(r"^dedupe.*: 0/\d+$", ran.err, re.M)


def test_verify_takes_a_build(cli, small_store):
    ran = cli("verify", small_store / "current")
    assert ran.code == 0
    assert ran.out.count("no problem found") == len(ran.out.splitlines()) >= 9
    for product in ("lamost.corrected", "model.polynomial", "comparison", "uncertainty"):
        assert f"{small_store}/current/{product}: " in ran.out
    assert cli("verify", small_store).out == ran.out
    each = cli("verify", *sorted((small_store / "current").iterdir()))
    assert sorted(each.out.splitlines()) == sorted(ran.out.splitlines())
    assert each.code == 5
    assert "current/build.json is a file: a directory" in each.err


def test_verify_reads_models(cli, small_store, tmp_path):
    shutil.copytree(small_store / "current/model.polynomial", tmp_path / "model")
    with (tmp_path / "model/held_out.parquet").open("ab") as file:
        file.write(b"x")
    ran = cli("verify", "gone", "model")
    assert ran.code == 5 and "held_out.parquet has " in ran.out
    assert "gone does not exist" in ran.err


def test_a_file_where_a_directory_is_expected(cli, small_sky, small_store):
    current, table = small_store / "current", small_sky / "gaia.parquet"
    attach = ["attach", current / "lamost.observations", table, "-c", "distance"]
    for given in (attach, ["dedupe", table]):
        ran = cli(*given, "-o", "x", "-w", 0)
        assert_error(ran, 5, "gaia.parquet is a file: a directory", "sos-dask ingest")
    before = table.read_bytes()
    ran = cli("dedupe", current / "lamost.observations", "-o", table, "-w", 0)
    assert_error(ran, 9, r"cannot write .*gaia\.parquet: it is a file, not a directory")
    assert table.read_bytes() == before


def test_a_catalog_of_others_has_no_account_of_errors(cli, tmp_path):
    """Observations without our manifest are deduplicated, too."""
    catalog = write_catalog(observations(300, spread=True), tmp_path / "theirs")
    (catalog.path / MANIFEST).unlink()
    properties = catalog.path / "hats.properties"
    properties.write_text(properties.read_text().replace("hats_builder=sos-dask\n", ""))
    ran = cli("dedupe", "theirs", "-o", "stars", "-w", 0)
    assert ran.code == 0, ran.err
    assert "300 rows in" in ran.out


# -- help, documents, start -----------------------------------------------------------------------

COMMANDS = sorted(
    str(command.name or command.callback.__name__)  # type: ignore[union-attr]
    for command in app.registered_commands
)


def test_the_commands_are_these():
    assert COMMANDS == [
        "apply", "attach", "compare", "coverage", "crossmatch", "dedupe", "demo", "gc", "ingest",
        "rebuild", "reference", "report", "simulate", "status", "surveys", "train", "trends",
        "uncertainty", "verify",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example(cli, name):
    ran = cli(name, "--help")
    assert ran.code == 0 and ran.err == ""
    assert "Example" in ran.out
    assert re.search(rf"sos-dask {name}\b", ran.out.split("Example")[1])
    (registered,) = [
        command for command in app.registered_commands
        if (command.name or command.callback.__name__) == name  # type: ignore[union-attr]
    ]  # fmt: skip
    assert registered.callback is not None and registered.callback.__doc__
    first = registered.callback.__doc__.splitlines()[0]
    assert len(first) > 20 and first.endswith(".")
    assert cli("-h").out.count(f"│ {name} ") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_terminal(cli, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    shown = cli(name, "--help").out
    assert "…" not in shown, "a name is cut"
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    import typer

    group: Any = typer.main.get_command(app)
    for parameter in group.commands[name].params:
        assert parameter.name == "help" or getattr(parameter, "help", None), parameter.name


def test_the_examples_are_commands_that_exist(cli):
    """Every example parses: known command, known options."""
    for name in COMMANDS:
        text = re.sub(r"[│╭╮╰╯─]", " ", cli(name, "--help").out)
        example = re.search(rf"sos-dask ({name}\b.*?)\s*\n\s*\n", text.split("Example")[1], re.S)
        assert example, name
        words = example[1].split()
        options = {word for word in words if word.startswith("-")}
        known = set(re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", text.split(example[1])[1]))
        assert options <= known, (name, options - known)


def test_the_readme_names_every_command():
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `sos-dask ")]
    assert rows, "the README has a table of commands"
    named = {
        word for row in rows for word in re.findall(r"`(?:sos-dask )?([a-z]+)", row.split("|")[1])
    }
    assert named == set(COMMANDS)


def test_the_readme_states_the_exit_codes():
    text = (ROOT / "README.md").read_text()
    codes = {error.exit_code for error in SosError.__subclasses__()}
    assert codes == set(range(3, 10))
    for error in SosError.__subclasses__():
        kind = error.__name__.removesuffix("Error").lower()
        word = {"config": "configuration", "survey": "survey file"}.get(kind, kind)
        assert f"{error.exit_code} {word}" in text, error.__name__


def test_help_names_every_method(cli):
    trained = cli("train", "--help").out
    assert [name for name in models.methods() if name not in trained] == []
    for command, settings in (("dedupe", DedupeSettings), ("reference", UnifySettings)):
        names = get_args(settings.model_fields["method"].annotation)
        assert len(names) > 1
        helping = cli(command, "--help").out
        assert [name for name in names if name not in helping] == []
    assert get_args(CoverageSettings.model_fields["measure"].annotation) == MEASURES
    assert [name for name in MEASURES if name not in cli("coverage", "--help").out] == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys, sos_dask.cli; print([n for n in ('pandas', 'dask', 'distributed', 'astropy', "
        "'xgboost', 'scipy', 'numba', 'healpy', 'matplotlib') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_version(cli):
    from sos_dask import __version__

    assert cli("--version").out == f"{__version__}\n"
    assert cli().code == 2 and "Usage" in cli().out + cli().err


def test_lines_of_progress_are_few(capsys, monkeypatch):
    now = iter(range(0, 3000, 3))  # seconds, at each call
    monkeypatch.setattr("sos_dask.cli.output.time.monotonic", lambda: next(now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with reporting() as report:
        for _ in range(2):  # two steps of one name
            for done in (0, 0, *range(1, 13), 12):
                report("dedupe", done, 12)
    lines = capsys.readouterr().err.splitlines()
    half = lines[: len(lines) // 2]
    assert lines == half + half
    assert (half[0], half[-1]) == ("dedupe: 0/12", "dedupe: 12/12")
    assert half[1:-1] == ["dedupe: 3/12", "dedupe: 7/12", "dedupe: 11/12"]


def test_a_scheduler_file_that_is_not_there(cli, small_store):
    given = ["dedupe", small_store / "current/apogee.observations", "-o", "x"]
    ran = cli(*given, "--scheduler", "./nofile.json")
    assert_error(ran, 3, r"there is no file \./nofile\.json")

"""Options: what is refused, where outputs and stores are found, what runs the tasks."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from sos_dask.cli.options import Options
from sos_dask.errors import ConfigError
from sos_dask.stages.apply import ApplySettings
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.stars.group import DedupeSettings
from tests.command_line import LAMOST, assert_error
from tests.job import contents

BAD_ARGUMENTS: dict[str, tuple[list[str], int, list[str]]] = {
    "radius 0": (["crossmatch", "{lamost.stars}", "{reference}", "--radius-arcsec", "0"], 3,
                 ["radius_arcsec: must be greater than 0"]),
    "radius below 0": (["dedupe", "{lamost.observations}", "--radius-arcsec", "-1"], 3,
                       [r"radius_arcsec: .*given: -1\.0"]),
    "radius nan": (["reference", "a={apogee.stars}", "--radius-arcsec", "nan"], 3,
                   ["radius_arcsec: .*given: nan"]),
    "shard": (["apply", "{lamost.model.polynomial}", "{lamost.observations}",
               "--partitions", "5/3"], 3, ["no shard 5 of 3", "1/3 to 3/3"]),
    "partition": (["apply", "{lamost.model.polynomial}", "{lamost.observations}",
                   "--partitions", "99"], 3, ["partitions are 0 to"]),
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
    "model as catalog": (["apply", "{lamost.model.polynomial}", "{lamost.model.polynomial}"], 5,
                         ["is not a catalog"]),
    "stars again": (["dedupe", "{lamost.stars}"], 5, ["no column 'obs_id'"]),
    "pairs as target": (["crossmatch", "{lamost.pairs}", "{reference}", "--radius-arcsec", "1"], 5,
                        ["neither star_id nor obs_id"]),
    "no pairs": (["train", "{reference}", "-m", "polynomial"], 5,
                 ["is not a catalog of pairs", "sos-dask crossmatch"]),
    "no model": (["apply", "{lamost.pairs}", "{lamost.observations}"], 7, [r"model\.json"]),
    "missing model": (["apply", "gone", "{lamost.observations}"], 7, [r"gone/model\.json"]),
    "train method": (["train", "{lamost.pairs}", "-m", "polynomal"], 3,
                     ["no method 'polynomal'", "polynomial"]),
    "train parameter": (["train", "{lamost.pairs}", "-m", "polynomial", "-p", "ordr=3"], 3,
                        ["unknown key 'ordr'", "order"]),
    "parameter out of range": (["train", "{lamost.pairs}", "-m", "polynomial", "-p", "order=77"], 3,
                               ["order: must be less than or equal to 6", "77"]),
    "parameter without value": (["train", "{lamost.pairs}", "-m", "polynomial", "-p", "order"], 3,
                                ["is not NAME=VALUE"]),
    "validation": (["train", "{lamost.pairs}", "-m", "polynomial", "--validation", "kfolds"], 3,
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


def test_an_output_that_cannot_be_made(cli, small_store, tmp_path):
    catalog = small_store / "current/apogee.observations"
    (tmp_path / "file").touch()
    for place in ("file", "file/out", "/proc/out"):
        assert_error(cli("dedupe", catalog, "-o", place, "-w", 0), 9, f"cannot .*write {place}")
    assert (tmp_path / "file").read_bytes() == b""


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
    assert_error(ran, 5, "not an output of sos-dask: not overwritten")
    assert (tmp_path / "mine/thesis.tex").read_text() == "42"


def test_a_command_does_not_overwrite_what_it_reads(cli, small_store, tmp_path):
    for name in (
        "lamost.pairs",
        "lamost.stars",
        "reference",
        "lamost.model.polynomial",
        "lamost.observations",
    ):
        shutil.copytree((small_store / "current" / name).resolve(), tmp_path / name)
    stars, pairs, model = "lamost.stars", "lamost.pairs", "lamost.model.polynomial"
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


def test_threads_make_what_workers_make(cli, small_store, tmp_path):
    observed = small_store / "current/lamost.observations"
    assert cli("dedupe", observed, "-o", "alone/stars", "-w", 0).code == 0
    assert cli("dedupe", observed, "-o", "threads/stars", "--threads", 3).code == 0
    assert contents(tmp_path / "alone") == contents(tmp_path / "threads")
    both = cli("dedupe", observed, "-o", "both", "--threads", 2, "-w", 2)
    assert_error(both, 3, "--threads goes with neither --workers nor --scheduler")


def test_a_training_of_few_pairs_needs_no_workers(cli, small_store):
    nobody = ["--scheduler", "tcp://127.0.0.1:9"]
    pairs = small_store / "current/lamost.pairs"
    ran = cli("train", pairs, "-m", "polynomial", "-o", "model", "--json")
    assert ran.json["rows"]["in"] >= ran.json["rows"]["out"] > 100
    asked = cli("train", pairs, "-m", "polynomial", "-o", "other", *nobody)
    assert_error(asked, 8, "no Dask scheduler answers")
    searched = cli("train", pairs, "-m", "polynomial", "--search", 2, "-o", "other", *nobody)
    assert_error(searched, 8, "no Dask scheduler answers")


def test_a_scheduler_file_that_is_not_there(cli, small_store):
    given = ["dedupe", small_store / "current/apogee.observations", "-o", "x"]
    ran = cli(*given, "--scheduler", "./nofile.json")
    assert_error(ran, 3, r"there is no file \./nofile\.json")


def test_options_become_the_settings_of_the_stage(cli, small_store, monkeypatch):
    made: list[Any] = []
    monkeypatch.setattr(Options, "run", lambda self, stage: made.append(stage))
    current = small_store / "current"
    observed, stars = current / "apogee.observations", current / "apogee.stars"
    cli("dedupe", observed, "-o", "x", "--no-gaia-id", "--radius-arcsec", 2, "--method", "median")
    assert made[0].settings == DedupeSettings(use_gaia_id=False, radius_arcsec=2, method="median")
    assert made[0].inputs["observations"].path == observed
    cli("crossmatch", stars, current / "reference", "-o", "x", "--folds", 3, "--pairs", "all")
    assert made[1].settings == CrossmatchSettings(n_folds=3, pairs="all")
    cli("reference", f"b={stars}", f"a={current / 'galah.stars'}", "-o", "x", "--no-offsets")
    assert (made[2].settings.order, made[2].settings.offsets) == (("b", "a"), {})
    cli("apply", current / "model.polynomial", observed, "-o", "x", "--partitions", "1/2")
    assert made[3].settings == ApplySettings(fallback="edge", partitions="1/2")
    assert len(made) == 4


@pytest.mark.parametrize(
    ("name", "options", "cores", "threads"),
    [
        ("dedupe", [], 4, 4),
        ("dedupe", [], 5, None),
        ("dedupe", ["--threads", "7"], 2, 7),
        ("dedupe", ["-w", "1"], 2, None),
        ("attach", [], 2, None),
    ],
)
def test_light_steps_run_in_threads_where_cores_are_few(
    cli, small_store, monkeypatch, name, options, cores, threads
):
    given: list[Any] = []

    def start(**arguments: Any) -> Any:
        given.append(arguments)
        raise ConfigError("not started")

    monkeypatch.setattr("sos_dask.cli.options.start", start)
    monkeypatch.setattr("sos_dask.cli.options.n_cores", lambda: cores)
    catalog = small_store / "current/apogee.observations"
    more = [catalog, "-c", "x=teff"] if name == "attach" else []
    assert_error(cli(name, catalog, *more, "-o", "out", *options), 3, "not started")
    workers = 1 if "-w" in options else None
    place = {"n_workers": workers, "memory_limit": "auto", "scheduler": None}
    assert given == [{**place, "n_threads": threads}]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["-C", "kind=slurm"], "No such option"),
        (["--cluster", "slurm"], "'slurm' is not NAME=VALUE"),
        (["--cluster", "kind=slrm"], "kind: must be 'local', .*given: 'slrm'"),
        (["--cluster", "minmum=2"], "unknown key 'minmum'"),
        (["--cluster", "queue=long"], "queue has no effect with kind = 'local'"),
        (["--cluster", "kind=slurm", "-w", 1], "n_workers has no effect with kind = 'slurm'"),
        (["--cluster", "kind=address"], "kind = 'address' needs scheduler"),
        (["--cluster", "kind=pbs", "--cluster", "walltime=1h"], "walltime: .*given: '1h'"),
        (["--cluster", "tls.ca_file=a"], "'tls.cert' is missing"),
        (
            ["--cluster", "kind=cuda"],
            r"needs a package .*: dask_cuda\n  pip install 'sos_dask\[cuda\]'",
        ),
    ],
)
def test_settings_of_a_cluster_that_are_wrong(cli, small_store, monkeypatch, given, says):
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    ran = cli("dedupe", small_store / "current/apogee.observations", "-o", "out", *given)
    assert ran.code in (2, 3), ran.err
    assert re.search(says, ran.err), ran.err

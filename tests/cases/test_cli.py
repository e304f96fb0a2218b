"""Options, jobs, paths and environments that go wrong in the field."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from sos_dask import api
from sos_dask.cli.output import shown
from sos_dask.errors import CatalogError, ConfigError, SosError, SurveyError, understood
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.plan import plan
from sos_dask.simulate.files import against_truth
from sos_dask.storage.manifest import sealed_json
from sos_dask.storage.store import publish, read_build
from tests.command_line import Cli, assert_error, cli, command
from tests.job import write_job

__all__ = ["cli"]  # a fixture

NAMED = 'target_name = "lamost"\n'


# -- settings ------------------------------------------------------------------------------------

DEEP = "x = " + "[" * 3000 + "]" * 3000
WRONG = {
    "nan": ("[dedupe]\nradius_arcsec = nan", "'dedupe.radius_arcsec' is nan"),
    "inf": ("[dedupe]\nmax_spread = inf", "'dedupe.max_spread' is inf"),
    "nan of a method": ("[train.params.boosted]\nlearning_rate = nan", "learning_rate' is nan"),
    "in a list": ("[coverage]\ngrid = {teff = [1.0, inf]}", "'coverage.grid.teff.1' is inf"),
    "of an override": ("[target.override]\nmissing = [nan]", "'target.override.missing.0'"),
    "more than 64 bits": ("[compare]\nmin_pairs = 99999999999999999999999", "64 bits"),
    "10,000 digits": ("[compare]\nmin_pairs = " + "9" * 10_000, "not valid TOML"),
    "too many rows": ("[ingest]\nrows_per_partition = 10000000000", "rows_per_partition"),
    "deep list": (DEEP, "nested too deep"),
    "deep table": ("[" + ".".join("a" * 3000) + "]\nb = 1", "nested too deep"),
    "NUL": ('[variables]\nX = "a\\u0000b"', "'variables.X' contains a NUL"),
    "key twice": ("[ingest]\n[ingest]", "not valid TOML"),
    "text for a number": ('[crossmatch]\nradius_arcsec = "1.0"', "crossmatch.radius_arcsec"),
    "text for a yes": ('[dedupe]\nuse_gaia_id = "yes"', "dedupe.use_gaia_id"),
    "number for a yes": ("[coverage]\ncompare = 1", "coverage.compare"),
    "list for a table": ("ingest = [1]", "ingest"),
    "grid upside down": ("[coverage.grid]\nfeh = [1.0, -1.0]", "1 is not below -1"),
    "negative seed": ("seed = -1", "seed"),
    "method twice": ('[train]\nmethods = ["polynomial", "polynomial"]', "'polynomial' twice"),
    "path as a name": ('[attach."../../../x"]\nfiles = ["a"]\ncolumns = {a = "a"}', "not a name"),
    "reference as a path": (
        '[reference."a/b"]\nsurvey = "apogee-dr17"\nfiles = ["a"]',
        "not a name",
    ),
    "long name": (f'[attach.{"a" * 300}]\nfiles = ["a"]\ncolumns = {{a = "a"}}', "not a name"),
}


BASE = """
[target]
survey = "lamost-dr3-giants"
files = ["l.csv"]
[reference.apogee]
survey = "apogee-dr17-subset"
files = ["a.csv"]
"""


@pytest.mark.parametrize(("text", "says"), WRONG.values(), ids=WRONG)
def test_a_job_with_an_impossible_setting(cli: Cli, tmp_path, text, says):
    parts = [BASE, text] if text.startswith("[") else [text, BASE]
    head = 'format = 1\nname = "small"\nstore = "store"'
    (tmp_path / "job.toml").write_text("\n".join([head, *parts]))
    assert_error(cli("rebuild", "job.toml", "-w", 0), 3, "job.toml", says)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", "A b", "x" * 65])
def test_names_that_would_leave_the_build(cli: Cli, tmp_path, name):
    for old in (NAMED, 'name = "small"\n'):
        key = old.split(" ")[0]
        job = write_job(tmp_path, tmp_path, ("\n" + old, f'\n{key} = "{name}"\n'))
        assert_error(cli("rebuild", job, "-w", 0), 3, key, "is not a name")
    with pytest.raises(CatalogError, match="cannot be named"):
        publish(tmp_path, "job", "", {f"../{name}": (None, tmp_path)})  # type: ignore[dict-item]


def test_a_build_of_impossible_products_is_none(tmp_path):
    impossible = sealed_json({"products": {"../x": ""}, "stages": {"../x": ""}})
    for document, why in (
        ("[]", "not a JSON object"),
        ("{}", "has no digest"),
        ("[" * 9999, "is damaged"),
        (impossible, "impossible names"),
    ):
        (tmp_path / "build.json").write_text(document)
        with pytest.raises(CatalogError, match=f"is not a build: .*{why}"):
            read_build(tmp_path)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"x = " + b"[" * 5000, b"name = \x00", b"x = nan"]
)
def test_a_survey_or_job_of_other_bytes(cli: Cli, tmp_path, content):
    (tmp_path / "my.toml").write_bytes(content)
    assert_error(cli("surveys", "my.toml"), 4, r"my\.toml")
    assert_error(cli("rebuild", "my.toml"), 3, r"my\.toml")


def test_a_job_that_is_a_pipe_is_not_waited_for(cli: Cli, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_error(cli("rebuild", "pipe"), 3, "not a regular file")


def test_a_job_may_have_a_byte_order_mark_and_line_ends_of_windows(tmp_path):
    job = write_job(tmp_path, tmp_path)
    text = job.read_text()
    job.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_job(job).text == text


def test_a_target_without_a_name_has_that_of_its_survey(tmp_path, small_sky):
    unnamed = write_job(tmp_path, small_sky, (NAMED, ""))
    names = [stage.product for stage in plan(load_job(unnamed))]
    assert {"lamost-dr11-lrs.stars", "lamost-dr11-lrs.corrected"} <= set(names)
    assert not [name for name in names if name.startswith("lamost.")]
    (tmp_path / "own.toml").write_text(
        (Path(api.__file__).parent / "surveys" / "lamost-dr11-lrs.toml")
        .read_text()
        .replace('name = "lamost-dr11-lrs"', 'name = "own-survey"', 1)
    )
    change = ('survey = "lamost-dr11-lrs"', 'survey = "./own.toml"')
    own = write_job(tmp_path, small_sky, (NAMED, ""), change)
    assert "own-survey.corrected" in [stage.product for stage in plan(load_job(own))]
    equal = ("[reference.apogee]", "[reference.own-survey]")
    with pytest.raises(ConfigError, match="named 'own-survey'") as caught:
        plan(load_job(write_job(tmp_path, small_sky, (NAMED, ""), change, equal)))
    assert "target_name" in caught.value.hint


# -- options -------------------------------------------------------------------------------------

STEPS = {
    "ingest": ["ingest", "lamost-dr11-lrs", "x.fits"],
    "dedupe": ["dedupe", "{build}/galah.observations"],
    "reference": ["reference", "galah={build}/galah.stars"],
    "crossmatch": ["crossmatch", "{build}/lamost.stars", "{build}/reference"],
    "attach": ["attach", "{build}/lamost.observations", "{build}/reference", "-c", "x=teff"],
    "train": ["train", "{build}/lamost.pairs", "-m", "boosted"],
    "apply": ["apply", "{build}/lamost.model.polynomial", "{build}/lamost.observations"],
    "coverage": ["coverage", *["{build}/lamost.pairs"] * 4],
    "compare": ["compare"],
    "trends": ["trends"],
}
OPTIONS = [
    ("ingest", 3, "--margin-arcsec=nan"),
    ("ingest", 2, "--rows-per-partition=9999999999999999999999"),
    ("dedupe", 3, "--radius-arcsec=nan"),
    ("dedupe", 3, "--radius-arcsec=1e400"),
    ("dedupe", 3, "--max-spread=inf"),
    ("dedupe", 3, "--max-spread=nan"),
    ("dedupe", 3, "--no-gaia-id", "--id-radius-arcsec=20"),
    ("dedupe", 3, "--memory-limit=1B"),
    ("dedupe", 3, "--memory-limit=GiB"),
    ("dedupe", 3, "--memory-limit=-1GiB"),
    ("dedupe", 3, "--memory-limit=1e400GiB"),
    ("dedupe", 3, "--workers=1000000000"),
    ("dedupe", 3, "--threads=1000000000"),
    ("dedupe", 3, "--scheduler=tcp://x:1", "--workers=1"),
    ("dedupe", 3, "--scheduler=tcp://x:1", "--memory-limit=1GiB"),
    ("dedupe", 3, "--scheduler=/dev/null"),
    ("dedupe", 8, "--scheduler=tcp://x:99999"),
    ("dedupe", 8, "--scheduler=ucx://x:1"),
    ("dedupe", 2, "--method="),
    ("reference", 3, "--epoch=nan"),
    ("reference", 3, "--epoch=1e9"),
    ("crossmatch", 3, "--no-gaia-id", "--id-radius-arcsec=20"),
    ("crossmatch", 2, "--seed=-1"),
    ("crossmatch", 2, "--seed=1180591620717411303424"),
    ("attach", 3, "--radius-arcsec=5"),
    ("attach", 3, "--by=position", "--id-radius-arcsec=5"),
    ("attach", 3, "--id-radius-arcsec=nan"),
    ("attach", 3, "-c", "../x=teff"),
    ("attach", 3, "-c", "x=logg"),
    ("train", 3, "--param=learning_rate=NaN"),
    ("train", 3, "--param=max_depth=Infinity"),
    ("train", 3, "--param=max_depth=" + "9" * 5000),
    ("train", 3, "--param=max_depth=" + "[" * 5000),
    ("apply", 3, "--partitions=0/0"),
    ("apply", 3, "--partitions=" + "9" * 5000),
    ("apply", 3, "--partitions=-1/4"),
    ("coverage", 3, "--inside=nan"),
    ("coverage", 3, "--grid=teff=1,inf"),
    ("coverage", 3, "--measure=x"),
    ("coverage", 3, "--store=store"),
    ("compare", 3, "--rule=scatter"),
    ("compare", 3, "--overwrite"),
    ("trends", 3, "--workers=1"),
]


@pytest.mark.parametrize("case", OPTIONS, ids=lambda c: f"{c[0]} {c[2]}"[:50])
def test_an_option_that_means_nothing(cli: Cli, small_store, tmp_path, case):
    """Refused with its exit code and a sentence; nothing is written."""
    name, code, *options = case
    build = small_store / "current"
    given = [text.format(build=build) for text in STEPS[name]]
    more = ["--store", small_store] if name in ("compare", "trends") else ["-o", "out"]
    ran = cli(*given, *more, *options)
    assert ran.code == code, ran.err
    assert ran.out == "" and "unexpected" not in ran.err and "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command_line", ["verify {}", "dedupe {} -o out", "status {}", "surveys {}"]
)
@pytest.mark.parametrize(
    "path", ["a\0b", "x" * 300, "x/" * 3000, "/dev/null", "\udcff", "[red]x[/]"]
)
def test_an_impossible_path(cli: Cli, command_line, path):
    ran = cli(*(part.format(path) for part in command_line.split()))
    assert ran.code in (2, 3, 4, 5, 9), ran.err
    assert "unexpected" not in ran.err and "Traceback" not in ran.err and "\0" not in ran.err
    if "[" in path:
        assert path in ran.err


# -- a store is found ----------------------------------------------------------------------------


def test_a_store_is_found_by_its_job(cli: Cli, small_store, small_sky, tmp_path):
    (tmp_path / "store").mkdir()
    for place in ("store/real", "store/other"):
        (tmp_path / place).symlink_to(small_store)
    (tmp_path / "jobs").mkdir()
    job = write_job(tmp_path / "jobs", small_sky, ('store = "store"', 'store = "../store/real"'))
    name = cli("status", "store/real", "--json").json["current"]
    for given in (["jobs/job.toml"], ["--store", "jobs/job.toml"], ["--store", "store/real"]):
        assert cli("status", *given, "--json").json["current"] == name
    says = r"no sos-dask store at 'store'; give --store or a job file\n.*store/other, store/real"
    for command_name in ("status", "gc", "report", "uncertainty", "compare", "trends", "coverage"):
        assert_error(cli(command_name), 5, says)
    assert_error(cli("status", job, "--store", "store"), 3, "Give one")
    (tmp_path / "store/other").unlink()
    for command_name in ("status", "uncertainty", "trends", "coverage"):
        assert cli(command_name, "--json").code == 0
    assert cli("gc", "--dry-run").code == 0


# -- what a terminal would obey ------------------------------------------------------------------


def test_control_characters_are_shown_escaped(cli: Cli, tmp_path):
    survey = (Path(api.__file__).parent / "surveys" / "lamost-dr11-lrs.toml").read_text()
    title = next(line for line in survey.splitlines() if line.startswith("title"))
    evil = r'title = "\u001b[31m[red]x[/] \u202eright :smile: \u009b2J"'
    (tmp_path / "evil.toml").write_text(survey.replace(title, evil))
    ran = cli("surveys", "./evil.toml")
    assert ran.code == 0
    assert r"\x1b[31m[red]x[/] \u202eright :smile: \x9b2J" in ran.out
    for given in ("verify", "surveys", "status"):
        ran = cli(given, "a\x1b[2J\r\nb")
        assert r"a\x1b[2J\r\nb" in ran.err and "\x1b" not in ran.err
    usage = cli("status", "--\x1b[2J")
    assert usage.code == 2 and "\x1b" not in usage.err
    assert shown("Teff µ ± — Å 星") == "Teff µ ± — Å 星"


# -- the environment -----------------------------------------------------------------------------

DRAW = """
import sys
from sos_dask.report.style import Drawn, new_figure, render
def draw():
    figure = new_figure(2)
    figure.subplots().plot([1, 2])
    return Drawn("title", figure, {})
rendered = render(draw)
print(len(rendered.png), len(rendered.pdf), "matplotlib.pyplot" in sys.modules)
"""


def test_figures_are_drawn_whatever_backend_a_notebook_names():
    sizes = set()
    for backend in ("module://matplotlib_inline.backend_inline", "rubbish"):
        environment = {**os.environ, "MPLBACKEND": backend}
        code = DRAW + f"import os\nassert os.environ['MPLBACKEND'] == {backend!r}"
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        sizes.add(ran.stdout)
    assert len(sizes) == 1 and "False" in sizes.pop()


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii", "COLUMNS": "1", "TERM": "dumb", "NO_COLOR": "1"},
        {"HOME": "/none", "TMPDIR": "/none", "NUMBA_CACHE_DIR": "/proc/none", "COLUMNS": "x"},
    ],
)
def test_poor_terminals_and_homes(small_store, environment):
    ran = subprocess.run(
        command("compare", "--store", small_store),
        env={**os.environ, **environment},
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert b"Traceback" not in ran.stderr and ran.stdout


def test_closed_streams(small_store):
    for closed in (">&-", "2>&-", ">&- 2>&- <&-"):
        line = " ".join([*command("status", "--store", small_store), closed])
        assert subprocess.run(["sh", "-c", line], capture_output=True).returncode == 0, closed


def test_a_reader_that_went_away(small_store):
    for how in ("--json", "--label=teff"):
        line = " ".join([*command("trends", how, "--store", small_store), "| head -c 1"])
        shell = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"]
        ran = subprocess.run(shell, capture_output=True)
        assert ran.returncode == 141 and ran.stderr == b"", how


# -- one place that explains errors --------------------------------------------------------------


def _raised(code: str) -> BaseException:
    try:
        exec(code)
    except BaseException as error:
        return error
    raise AssertionError(code)


@pytest.mark.parametrize(
    "code, exit_code",
    [
        ("import json; json.loads('{')", 5),
        ("import json; json.loads('[' * 100000)", 5),
        ("import tomllib; tomllib.loads('x')", 3),
        ("import tomllib; tomllib.loads('x=' + '[' * 100000)", 3),
        ("import pyarrow.parquet as pq, io; pq.read_table(io.BytesIO(b'PAR1'))", 5),
        ("import pyarrow as pa; pa.array(['x']).cast('int64')", 5),
        ("import numpy, io; numpy.load(io.BytesIO(b'x' * 100))", 5),
        ("import gzip; gzip.decompress(b'x' * 100)", 4),
        ("import gzip; gzip.decompress(gzip.compress(b'x' * 100)[:20])", 4),
        ("b'\\xff'.decode()", 5),
        ("'\\udcff'.encode()", 3),
        ("open('a\\0b')", 3),
        ("open('/none/x')", 9),
        ("raise MemoryError", 8),
        ("raise TimeoutError", 8),
        ("raise OSError('Arrow knows no number')", 9),
        ("from distributed.comm import CommClosedError as E; raise E('gone')", 8),
        ("2.0 ** 10000", 3),
    ],
)
def test_what_files_and_machines_raise_is_understood(code, exit_code):
    found = understood(_raised(code))
    assert isinstance(found, SosError) and found.exit_code == exit_code, found


@pytest.mark.parametrize(
    "code", ["{}['x']", "[][1]", "None.x", "int('x')", "assert False", "1 / 0", "f = 1; f()"]
)
def test_defects_of_the_program_are_not_excused(code):
    assert understood(_raised(code)) is None


def test_an_error_names_what_was_worked_on(tmp_path):
    truth = tmp_path / "truth.parquet"
    truth.write_bytes(b"no table")
    with pytest.raises(pa.ArrowInvalid) as caught:
        against_truth(tmp_path, truth)
    assert str(truth) in str(understood(caught.value))


# -- Python --------------------------------------------------------------------------------------


def test_the_python_functions_take_text(small_store, small_sky, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build = str(small_store / "current")
    assert api.status(str(small_store)).products
    assert api.verify(f"{build}/lamost.pairs") == []
    assert api.gc(str(small_store), dry_run=True) == []
    manifest = api.ingest("galah-dr4", [str(small_sky / "galah.fits")], "galah")
    assert api.ingest("galah-dr4", str(small_sky / "galah.fits"), "galah") == manifest
    api.dedupe("galah", "galah.stars", api.DedupeSettings())
    united = api.ReferenceSettings(offsets={})
    api.reference({"galah": "galah.stars"}, "reference", united)
    api.crossmatch(
        f"{build}/lamost.stars",
        Path("reference"),
        "pairs",
        api.CrossmatchSettings(radius_arcsec=1.0),
    )
    made = api.apply(
        f"{build}/lamost.model.polynomial", f"{build}/lamost.observations", "out",
        api.ApplySettings(fallback="polynomial"), coverage=f"{build}/lamost.coverage",
        errors=f"{build}/lamost.uncertainty", smooth=f"{build}/lamost.model.polynomial",
    )  # fmt: skip
    assert made is not None and made.rows.n_out == made.rows.n_in > 4000
    job = write_job(tmp_path, small_sky)
    assert [stage.product for stage in api.plan(str(job), "elsewhere")]
    for wrong, kind in (
        (lambda: api.ingest("no-survey", "x.fits", "out2"), SurveyError),
        (lambda: api.verify("a\0b"), ConfigError),
        (lambda: api.status("nowhere"), CatalogError),
        (lambda: api.rebuild("nowhere.toml"), ConfigError),
        (lambda: api.DedupeSettings(max_spread=float("nan")), ConfigError),
    ):
        with pytest.raises(kind):
            wrong()
    assert list(inspect.signature(api.status).parameters) == ["store"]

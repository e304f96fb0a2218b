"""The command line as a whole: usage, exit codes, streams, help, signals."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest

from sos_dask import corrections as models
from sos_dask.cli import app, main
from sos_dask.errors import SosError
from sos_dask.evidence.coverage import MEASURES
from sos_dask.stages.coverage import CoverageSettings
from sos_dask.stars.group import DedupeSettings
from sos_dask.stars.union import UnionSettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import MANIFEST
from tests.command_line import LAMOST, assert_nothing_final, command
from tests.conftest import ROOT
from tests.job import contents, write_job


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


def test_debug_shows_where(cli, monkeypatch, capsys):
    assert "Traceback" not in cli("dedupe", "gone", "-o", "out").err
    monkeypatch.setattr(sys, "argv", ["sos-dask", "dedupe", "gone", "-o", "out", "--debug"])
    with pytest.raises(SosError, match="gone does not exist"):
        main()


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


def test_version(cli):
    from sos_dask import __version__

    assert cli("--version").out == f"{__version__}\n"
    assert cli().code == 2 and "Usage" in cli().out + cli().err


COMMANDS = sorted(
    str(command.name or command.callback.__name__)  # type: ignore[union-attr]
    for command in app.registered_commands
)


def test_the_commands_are_these():
    assert COMMANDS == [
        "agreement", "apply", "attach", "builds", "compare", "coverage", "crossmatch", "dedupe",
        "demo", "diff", "export", "gc", "ingest", "publish", "rebuild", "reference", "report",
        "rollback", "simulate", "status", "surveys", "train", "trends", "uncertainty", "unify",
        "verify",
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
    assert named == {*COMMANDS, "cluster"}  # which has commands of its own


def test_the_readme_states_the_exit_codes():
    text = (ROOT / "README.md").read_text()
    codes = {error.exit_code for error in SosError.__subclasses__()}
    assert codes == set(range(3, 12))
    for error in SosError.__subclasses__():
        kind = error.__name__.removesuffix("Error").lower()
        word = {"config": "configuration", "survey": "survey file"}.get(kind, kind)
        assert f"{error.exit_code} {word}" in text, error.__name__


def test_help_names_every_method(cli):
    trained = cli("train", "--help").out
    assert [name for name in models.methods() if name not in trained] == []
    for name, settings in (("dedupe", DedupeSettings), ("reference", UnionSettings)):
        known = get_args(settings.model_fields["method"].annotation)
        assert len(known) > 1
        helping = cli(name, "--help").out
        assert [one for one in known if one not in helping] == []
    assert get_args(CoverageSettings.model_fields["measure"].annotation) == MEASURES
    assert [name for name in MEASURES if name not in cli("coverage", "--help").out] == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys, sos_dask.cli; print([n for n in ('pandas', 'dask', 'distributed', 'astropy', "
        "'xgboost', 'scipy', 'numba', 'healpy', 'matplotlib') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


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
    tiny = 'store = "store"', f'store = "{tiny_disk}"'
    ran = subprocess.run(command("rebuild", write_job(tmp_path, small_sky, tiny), "-w", 0),
                         capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 9 and "the rebuild will not fit" in ran.stderr
    # Nothing is refused; the disk is full while it runs.
    job = write_job(tmp_path, small_sky, tiny, ("[train]", "[space]\ncheck = false\n[train]"))
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

"""Rebuilds that nobody watches: logs, commands for failures, estimates, metrics, exit codes."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sos_dask.errors import ConfigError, LockedError, StorageError, redacted
from sos_dask.rebuild.estimate import estimate
from sos_dask.rebuild.history import last_runs
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.lock import locked
from sos_dask.rebuild.plan import plan
from sos_dask.rebuild.scheduled import scheduled
from tests.command_line import command
from tests.job import write_job

TELL = """
[on_failure]
command = ["sh", "-c", "env | grep ^SOS_ > told; {then}"]
timeout_s = 1.0
"""
BROKEN = ("lamost.fits", "nothing.fits")


def told(folder: Path) -> dict[str, str]:
    lines = (folder / "told").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_an_unchanged_night_is_logged(job, store, cli):
    ran = cli("rebuild", job.path, "--log-format", "json", "--json")
    assert ran.code == 0 and ran.json["outcome"] == "unchanged"
    lines = [json.loads(line) for line in ran.err.splitlines()]
    assert [one["event"] for one in lines if one["event"] != "step"] == ["start", "end"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", x["time"]) for x in lines)
    found = cli("status", "--store", store, "--json").json
    assert found["last_run"]["outcome"] == "unchanged" and found["last_failure"] is None
    assert "Last run" in cli("status", "--store", store).out


def test_another_rebuild_is_waited_for_by_nobody(job, store, cli):
    with locked(store, "rebuild of 'other'"):
        ran = cli("rebuild", job.path, "--log-format", "json")
        assert ran.code == LockedError.exit_code == 11
        assert json.loads(ran.err.splitlines()[-1])["event"] == "error"
        assert cli("gc", "--store", store).code == 11
        assert cli("rebuild", job.path, "--no-lock").code == 0
        assert "'other'" in cli("status", "--store", store).out


@pytest.mark.parametrize(
    ("then", "says"), [("exit 0", ""), ("exit 3", "failed: 3"), ("sleep 60", "no end after 1 s")]
)
def test_a_failure_is_told(store, small_sky, cli, monkeypatch, caplog, then, says):
    monkeypatch.setenv("SURVEY_PASSWORD", "pass-word-1")
    job = write_job(store.parent, small_sky, BROKEN, more=TELL.format(then=then))
    began = time.monotonic()
    ran = cli("rebuild", job)
    assert ran.code == 4 and "nothing.fits does not exist" in ran.err
    assert time.monotonic() - began < 30
    assert says in caplog.text
    found = told(store.parent)
    assert found["SOS_OUTCOME"] == "failed" and found["SOS_EXIT_CODE"] == "4"
    assert "nothing.fits" in found["SOS_REASON"] and Path(found["SOS_LOG"]).is_file()
    shown = cli("status", "--store", store).out
    assert "Last failure" in shown and "nothing.fits" in shown


def test_a_command_that_is_none_hides_nothing(store, small_sky, cli, caplog):
    more = '\n[on_failure]\ncommand = ["/no/such/program"]\n'
    ran = cli("rebuild", write_job(store.parent, small_sky, BROKEN, more=more))
    assert ran.code == 4 and "does not exist" in ran.err and "/no/such/program" in caplog.text


def test_what_does_not_fit_is_not_begun(store, small_sky, cli, monkeypatch):
    change = ("[train]", "[crossmatch]\nn_folds = 4\n[train]")
    job = write_job(store.parent, small_sky, change)
    planned = plan(load_job(job))
    found, n_stages = estimate(store, planned), sum(not one.complete for one in planned)
    assert (found.stages, found.of) == (n_stages, len(planned))
    assert found.seconds is not None and 0 < found.seconds < 600
    assert 10_000 < found.bytes < 2**30 and (found.free_bytes or 0) > 0
    usage = shutil.disk_usage(store)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match=f"will not fit: it takes {n_stages} of") as refused:
        scheduled(load_job(job))
    assert refused.value.exit_code == 9 and "gc" in refused.value.hint
    first = [one for one in plan(load_job(job), store.parent / "none")]
    everything = estimate(store.parent / "none", first)
    assert everything.seconds is None and everything.bytes > 2**20


def test_metrics_are_those_of_the_run(store, small_sky, cli):
    more = '\n[metrics]\nfile = "night.prom"\n'
    job = write_job(store.parent, small_sky, more=more)
    assert cli("rebuild", job).code == 0
    text = (store.parent / "night.prom").read_text()
    metric = re.compile(r'sos_dask_(\w+)\{job="small"(?:,\w+="[\w. ]+")*\} -?[\d.e+-]+')
    names = {"rows", "rejected_rows", "stage_seconds", "hit_rate", "failing_bins", "run_exit_code"}
    found = [metric.fullmatch(line) for line in text.splitlines() if not line.startswith("#")]
    assert all(found) and names <= {match[1] for match in found if match}
    assert 'rows{job="small",product="lamost.observations"} 49' in text
    failing = write_job(store.parent, small_sky, BROKEN, more=more)
    assert cli("rebuild", failing).code == 4
    after = (store.parent / "night.prom").read_text()
    assert 'run_exit_code{job="small"} 4' in after
    assert 'rows{job="small",product="lamost.observations"} 49' in after
    with pytest.raises(ConfigError, match=r"metrics\.file"):
        load_job(write_job(store.parent, small_sky, more=more.replace(".prom", ".toml")))


@pytest.mark.fault
def test_a_stop_by_the_batch_system_is_told(small_sky, tmp_path):
    job = write_job(tmp_path, small_sky, more=TELL.format(then="true"))
    process = subprocess.Popen(command("rebuild", job, "--workers", 0), stderr=subprocess.PIPE)
    logs = tmp_path / "store/logs"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not any(
        '"begin"' in log.read_text() for log in logs.glob("*.jsonl")
    ):
        time.sleep(0.05)
    assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "stopped" in message
    assert told(tmp_path)["SOS_EXIT_CODE"] == "130"
    found = last_runs(tmp_path / "store")
    assert found["running"] is None and found["last_failure"]["message"].endswith("by a signal")
    assert not (tmp_path / "store/lock.json").exists()


@pytest.mark.fault
def test_a_killed_run_is_seen(small_sky, tmp_path):
    job = write_job(tmp_path, small_sky)
    process = subprocess.Popen(command("rebuild", job, "--workers", 0), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not last_runs(tmp_path / "store")["running"]:
        time.sleep(0.05)
    assert process.poll() is None and time.monotonic() < deadline
    process.kill()
    process.wait()
    with locked(tmp_path / "store", "rebuild"):  # of a dead process of this host
        pass


def test_no_secret_is_kept(store, small_sky, monkeypatch):
    for files in ("https://user:word@host/x.fits", "s3://key@bucket/x.fits"):
        with pytest.raises(ConfigError, match="password") as refused:
            load_job(write_job(store.parent, small_sky, BROKEN, more=f"# {files}\n"))
        assert "word@" not in str(refused.value)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "0123456789abc")
    text = "GET https://h/x?X-Amz-Credential=me%2F1&X-Amz-Signature=77ab with 0123456789abc"
    assert redacted(text) == "GET https://h/x?X-Amz-Credential=***&X-Amz-Signature=*** with ***"
    assert redacted("s3://bucket/a@b, tcp://host:1") == "s3://bucket/a@b, tcp://host:1"


def test_nothing_stored_is_run():
    """No pickle, no eval, no loader that makes objects of what a file says."""
    source = Path(sys.modules["sos_dask"].__file__ or "").parent
    texts = {path: path.read_text() for path in source.rglob("*.py")}
    texts.pop(source / "run" / "workers.py")  # calls that a driver sends to its own workers
    forbidden = re.compile(
        r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)\b|\b(eval|exec)\(|"
        r"allow_pickle=True|yaml\.load|unsafe_load|shell=True|os\.system",
        re.MULTILINE,
    )
    found = [(path, match[0]) for path, text in texts.items() for match in forbidden.finditer(text)]
    assert len(texts) > 50 and not found

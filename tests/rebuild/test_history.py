"""Builds that are refused, published by a person, withdrawn; logs of runs."""

import json
import os
import socket
import subprocess

import pytest

from sos_dask.errors import CatalogError
from sos_dask.rebuild import history
from sos_dask.rebuild.history import RunLog, builds, find_build, last_runs, publish_build, rollback
from sos_dask.rebuild.lock import locked
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Recipe, Rows
from sos_dask.storage.store import publish, published

SECRET = "s3cr3t-k3y-of-the-store"


def made(store, number, refused=()):
    """A build of one product."""
    recipe = Recipe("test", 1, {"number": number}, {})
    directory = store / "artifacts/test" / recipe.fingerprint
    output = Output.prepare(directory, recipe)
    if not output.complete:
        output.commit(Rows(number, number), ())
    return publish(store, "job", "text", {"made": (recipe, directory)}, refused)


@pytest.fixture
def store(tmp_path):
    for number in range(3):
        made(tmp_path / "store", number)
    return tmp_path / "store"


def states(store):
    return [one.state for one in builds(store)]


def test_a_refused_build_is_published_by_a_person(store):
    before = (store / "current").resolve()
    with pytest.raises(CatalogError, match=r"no build .* was refused"):
        publish_build(store)
    refused = made(store, 3, ("rows fell", "bins fail"))
    assert (store / "current").resolve() == before
    assert states(store) == ["kept", "kept", "current", "refused"]
    assert builds(store)[-1].reasons == ("rows fell", "bins fail")
    assert history.unpublished(store, {"made": refused.resolve().name}) == (None, "")
    fingerprints = {"made": (refused / "made").resolve().name}
    assert history.unpublished(store, fingerprints) == (refused, "")
    assert publish_build(store) == refused and published(store) == fingerprints
    assert states(store) == ["kept", "kept", "kept", "current"]
    assert history.unpublished(store, fingerprints) == (None, "")


def test_a_rollback_withdraws_what_it_leaves(store):
    first, second, third = (store / "builds" / one.name for one in builds(store))
    assert rollback(store) == second and states(store) == ["kept", "current", "withdrawn"]
    left, why = history.unpublished(store, {"made": (third / "made").resolve().name})
    assert left == third and "rollback" in why
    assert rollback(store, first.name[:-3]) == first
    with pytest.raises(CatalogError, match="no earlier build"):
        rollback(store)
    with pytest.raises(CatalogError, match="is the current build"):
        rollback(store, "current")
    publish_build(store, third.name)
    assert states(store) == ["kept", "withdrawn", "current"]


@pytest.mark.parametrize("name", ["", "2", "x", "../builds", "/tmp"])
def test_a_build_has_one_name(store, name):
    with pytest.raises(CatalogError, match="begin"):
        find_build(store, name)


def test_a_build_with_a_product_that_is_gone_is_not_published(store):
    gone = store / "builds" / builds(store)[0].name
    (gone / "made/manifest.json").unlink()
    with pytest.raises(CatalogError, match="has no manifest"):
        publish_build(store, gone.name)
    (gone / "build.json").write_text("{")
    assert states(store) == ["damaged", "kept", "current"]


def test_logs_tell_how_runs_ended(store, monkeypatch):
    monkeypatch.setattr(history, "_KEPT_LOGS", 3)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    echoed: list[str] = []
    for number in range(5):
        log = RunLog(store, echoed.append)
        log.path = log.path.with_name(f"2026-{number}.jsonl")
        log.event("start", job="mine", host="another", pid=1)
        log.event("begin", product="made")
        if number == 3:
            text = f"s3://user:pw@host/b refused {SECRET}"
            log.event("end", outcome="failed", exit_code=9, message=text)
            log.event("on_failure", result=0)
    assert len(list((store / "logs").iterdir())) == 3
    told = last_runs(store)
    assert told["last_run"]["outcome"] == "killed" and "'made'" in told["last_run"]["message"]
    assert [one["outcome"] for one in history.runs(store)] == ["killed", "failed", "killed"]
    everything = "".join(one.read_text() for one in (store / "logs").iterdir())
    assert (
        SECRET not in everything and "user:pw" not in everything and "s3://***@host" in everything
    )
    assert "\n".join(echoed[-2:]) + "\n" == (store / "logs/2026-4.jsonl").read_text()
    assert all(json.loads(line)["time"].endswith("Z") for line in echoed)


def test_a_running_one_is_no_dead_one(store):
    with locked(store, "rebuild of 'mine'") as at:
        RunLog(store).event("start", job="mine", host=socket.gethostname(), pid=os.getpid())
        at("train")
        told = last_runs(store)
        assert told["last_run"] is None and told["running"]["stage"] == "train"
    assert last_runs(store) == {"running": None, "last_run": None, "last_failure": None}, "no lock"
    gone = subprocess.Popen(["true"])
    gone.wait()
    RunLog(store).event("start", job="other", host=socket.gethostname(), pid=gone.pid)
    assert last_runs(store)["last_run"]["outcome"] == "killed"


def test_a_log_that_cannot_be_written_stops_nothing(store, caplog):
    (store / "logs").write_text("no folder")
    RunLog(store).event("start")
    assert "cannot be written" in caplog.text

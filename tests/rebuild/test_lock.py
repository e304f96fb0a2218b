"""The lock of a store: who holds it, when it is taken over."""

import json
import os
import subprocess
import sys
import time

import pytest

from sos_dask.errors import LockedError
from sos_dask.rebuild import lock
from sos_dask.rebuild.lock import Holder, holder_of, locked
from sos_dask.storage import artifact

HOLD = """
import sys, time
from pathlib import Path
from sos_dask.rebuild.lock import locked
with locked(Path(sys.argv[1]), "rebuild of 'other'") as at:
    at("train")
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_one_process_holds_it(other, tmp_path):
    says = rf"'other' on .*, process {other.pid}, .*'train'"
    with pytest.raises(LockedError, match=says) as end, locked(tmp_path, "gc"):
        pass
    assert end.value.exit_code == 11 and "status" in end.value.hint
    assert "--no-lock" not in end.value.hint
    with pytest.raises(LockedError, match=says) as end, locked(tmp_path, "rebuild of 'mine'"):
        pass
    assert "--no-lock" in end.value.hint
    found = holder_of(tmp_path)
    assert found is not None and (found.pid, found.stage) == (other.pid, "train")


def test_it_is_taken_from_a_dead_process_of_this_host(other, tmp_path):
    other.kill()
    other.wait()
    assert holder_of(tmp_path) is None
    with locked(tmp_path, "gc"):
        found = holder_of(tmp_path)
        assert found is not None and (found.pid, found.what) == (os.getpid(), "gc")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("late", [2 * lock.LEASE_S, -2 * lock.LEASE_S])
def test_it_is_taken_from_another_host_that_does_not_renew_it(tmp_path, late):
    there = vars(Holder.here("rebuild")) | {"host": "another", "pid": 1}
    (tmp_path / lock.LOCK).write_text(json.dumps(there))
    with pytest.raises(LockedError, match="on another"), locked(tmp_path, "gc"):
        pass
    there["renewed"] = time.time() - late
    (tmp_path / lock.LOCK).write_text(json.dumps(there))
    with locked(tmp_path, "gc"):
        pass


def test_it_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_S", 0.5)
    with locked(tmp_path, "rebuild"):
        for _ in range(8):
            time.sleep(0.2)
            assert holder_of(tmp_path) is not None


def test_after_a_long_pause_it_is_renewed_and_removed(tmp_path):
    with locked(tmp_path, "rebuild") as at:
        held = json.loads((tmp_path / lock.LOCK).read_text())
        (tmp_path / lock.LOCK).write_text(json.dumps(held | {"renewed": 1.0}))
        assert holder_of(tmp_path) is None
        at("train")
        assert holder_of(tmp_path) is not None
    assert not (tmp_path / lock.LOCK).exists()


def test_a_lock_whose_answer_was_lost_is_held(tmp_path, monkeypatch):
    def write(path, text):
        artifact.write_new(path, text)
        return False

    monkeypatch.setattr(lock, "write_new", write)
    with locked(tmp_path, "rebuild"):
        assert holder_of(tmp_path) is not None


def test_one_that_was_taken_over_is_left_alone(tmp_path):
    with locked(tmp_path, "rebuild") as at:
        theirs = json.dumps(vars(Holder.here("another")))
        (tmp_path / lock.LOCK).write_text(theirs)
        at("train")
        assert (tmp_path / lock.LOCK).read_text() == theirs
    assert (tmp_path / lock.LOCK).read_text() == theirs


def test_what_is_no_lock_is_none(tmp_path):
    (tmp_path / lock.LOCK).write_text("{")
    with locked(tmp_path, "rebuild"):
        pass

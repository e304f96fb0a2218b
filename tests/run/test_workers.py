"""Workers that are not there, of another kind, blind, frozen, lost: each is named."""

import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from sos_dask.errors import ClusterError, StorageError
from sos_dask.run.cluster import start
from sos_dask.run.workers import Workers, _rooms, call, pack
from tests.apart import apart, freeze

pytestmark = pytest.mark.fault


def test_tasks_ahead_and_the_last_ones():
    two = {"a": {"nthreads": 1}, "b": {"nthreads": 1}}
    assert _rooms(two, {}, 10) == ["a", "b", "a", "b"]
    assert _rooms(two, {"a": 1, "b": 2}, 10) == ["a"]
    assert _rooms(two, {"a": 1}, 2) == ["b"]  # the last ones wait for a worker that is free
    assert _rooms({"a": {"nthreads": 2}}, {}, 1) == ["a"]
    assert _rooms({}, {}, 3) == []


def test_what_is_packed_raises_where_it_is_called():
    packed = pack(Unreadable())
    with pytest.raises(OSError, match="damaged"):
        call(packed)


class Unreadable:
    def __call__(self) -> None:
        """Never reached."""

    def __reduce__(self):
        return _fail, ()


def _fail() -> None:
    raise OSError("damaged")


def test_a_task_that_cannot_be_unpickled_is_an_error_as_it_was(cluster):
    with pytest.raises(OSError, match="damaged"):
        cluster.run(str, [Unreadable()], "unpickle")
    assert cluster.run(str, [1], "goes on") == ["1"]


def test_no_worker_at_all(tmp_path, caplog):
    with apart(tmp_path) as made, start(scheduler=str(made.file), timeout=4) as cluster:
        began = time.monotonic()
        with pytest.raises(ClusterError, match="can be used, after 4 s: none has connected"):
            cluster.run(str, [1], "wait")
        assert 3 < time.monotonic() - began < 20
        assert caplog.text.count("waiting for workers of tcp://127.0.0.1:") == 1


OTHERS = {
    "bare": ("import sys; sys.modules['sos_dask'] = None", "has no package 'sos_dask', and this"),
    "old": ("import sos_dask; sos_dask.__version__ = '0.0.9'", r"has sos_dask 0\.0\.9, and this"),
    "odd": (
        "import importlib.metadata as m;"
        "m.version = lambda name, v=m.version: '1.0' if name == 'pyarrow' else v(name)",
        r"has pyarrow 1\.0, and this process has pyarrow \d",
    ),
}


def test_a_worker_of_another_kind_gets_no_tasks(tmp_path, caplog):
    with apart(tmp_path) as made, start(scheduler=str(made.file), timeout=4) as cluster:
        for name, (preload, _) in OTHERS.items():
            made.worker("--no-nanny", "--name", name, "--preload", preload)
        cluster.client.wait_for_workers(len(OTHERS), timeout=60)
        with pytest.raises(ClusterError, match="can be used, after 4 s") as caught:
            cluster.run(str, [1], "wait")
        for name, (_, cause) in OTHERS.items():
            assert re.search(f"worker {name} at tcp://127[^ ]* {cause}", caught.value.message)
            assert re.search(f"worker {name} at [^ ]* {cause}.*: it gets no tasks", caplog.text)
        made.worker("--no-nanny", "--name", "good")  # a late one
        cluster.client.wait_for_workers(len(OTHERS) + 1, timeout=60)
        assert set(cluster.run(worker_name, list(range(10)), "work")) == {"good"}


def worker_name(_: int) -> str:
    from distributed import get_worker

    return str(get_worker().name)


def see(path: Path) -> None:
    if os.environ.get("BLIND"):
        raise StorageError(f"does not see {path}")
    assert path.exists()


def test_a_worker_that_does_not_see_the_store_gets_no_tasks(tmp_path, caplog):
    with apart(tmp_path, 1) as made, start(scheduler=str(made.file), timeout=20) as cluster:
        blind = "import os; os.environ['BLIND'] = '1'"
        made.worker("--no-nanny", "--name", "blind", "--preload", blind)
        cluster.client.wait_for_workers(2, timeout=60)
        cluster.prepare(partial(see, tmp_path))
        assert "blind" not in cluster.run(worker_name, list(range(20)), "work")
        wait_until(lambda: cluster.workers.look() and "blind" in caplog.text)
        assert f"does not see {tmp_path}: it gets no tasks" in caplog.text


def wait_until(true, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def mark(folder: Path) -> str:
    """A task of half a second that says where it began."""
    (folder / f"began-{os.getpid()}").touch()
    time.sleep(0.5)
    return f"{os.getpid()}"


def test_tasks_follow_workers_that_come_freeze_and_go(tmp_path, caplog):
    with apart(tmp_path, 1) as made, start(scheduler=str(made.file), timeout=5) as cluster:
        first = made.workers[0]

        def change() -> None:
            wait_until((tmp_path / f"began-{first.pid}").exists)
            second = made.worker("--no-nanny")  # a late one
            wait_until((tmp_path / f"began-{second.pid}").exists)
            freeze(first)
            time.sleep(8)
            third = made.worker("--no-nanny")
            wait_until((tmp_path / f"began-{third.pid}").exists)
            os.kill(second.pid, signal.SIGKILL)

        changing = threading.Thread(target=change, daemon=True)
        changing.start()
        pids = cluster.run(mark, [tmp_path] * 60, "mark")
        changing.join(60)
        assert len(pids) == 60
        assert {str(one.pid) for one in made.workers} == set(pids)
        assert "has been silent for 5 s and is given up" in caplog.text


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_the_scheduler_is_lost(tmp_path, blow):
    with apart(tmp_path, 1) as made, start(scheduler=str(made.file), timeout=5) as cluster:
        struck = threading.Timer(1, os.kill, (made.scheduler.pid, blow))
        cluster.prepare(partial(see, tmp_path))
        struck.start()
        began = time.monotonic()
        says = "scheduler .* (is gone|does not answer for 5 s)"
        with pytest.raises(ClusterError, match=says) as caught:
            cluster.run(time.sleep, [0.2] * 200, "sleep")
        assert "Run the same command again" in caught.value.hint
        assert time.monotonic() - began < 40


def test_a_result_that_is_lost_before_it_is_read(tmp_path, monkeypatch):
    """The worker goes between the end of its task and the reading of its result."""
    real = Workers.fetch
    killed: list[str] = []
    with apart(tmp_path, 2) as made, start(scheduler=str(made.file), timeout=20) as cluster:
        cluster.client.wait_for_workers(2, timeout=60)
        pids = cluster.client.run(os.getpid)

        def fetch(self, wanted, addresses):
            if not killed:
                killed.append(addresses[0])
                os.kill(pids[addresses[0]], signal.SIGKILL)
            return real(self, wanted, addresses)

        monkeypatch.setattr(Workers, "fetch", fetch)
        assert cluster.run(str, list(range(20)), "work") == [str(x) for x in range(20)]
        assert killed


def test_answers_have_a_limit(tmp_path):
    with apart(tmp_path, 2) as made, start(scheduler=str(made.file)) as cluster:
        cluster.client.wait_for_workers(2, timeout=60)
        assert len(cluster.cpu_seconds()) == 3
        freeze(made.workers[0])
        began = time.monotonic()
        assert len(cluster.cpu_seconds()) == 2
        assert time.monotonic() - began < 20


def test_a_scheduler_without_the_package(tmp_path):
    options = "import sys; sys.modules['sos_dask'] = None"
    with (
        apart(tmp_path, 0, "--preload", options) as made,
        pytest.raises(ClusterError, match=r"the scheduler tcp://.* has no package 'sos_dask'"),
        start(scheduler=str(made.file)),
    ):
        pass


def test_settings_that_workers_lack_are_named_once(tmp_path, caplog):
    with apart(tmp_path, 1) as made, start(scheduler=str(made.file)) as cluster:
        assert cluster.run(str, [1, 2], "work") == ["1", "2"]
        cluster.prepare(partial(see, tmp_path))
        assert caplog.text.count("should have the settings of deploy/dask.yaml") == 1
        assert "distributed.worker.memory.pause is 0.8, not False" in caplog.text

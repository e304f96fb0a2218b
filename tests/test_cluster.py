import os
import signal
import time
from pathlib import Path

import pytest

from sos_dask.cluster import Cluster, start
from sos_dask.errors import ClusterError, SurveyError


def double(number: int) -> int:
    return 2 * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise SurveyError("bad file", "mend it")
    return number


def die_once(folder: str) -> str:
    """Kill the own worker the first time only: what a lost node does."""
    flag = Path(folder) / "died"
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_keep_the_order_of_tasks(cluster):
    seen = []
    tasks = list(range(40))
    assert cluster.run(double, tasks, "double", lambda *said: seen.append(said)) == [
        2 * task for task in tasks
    ]
    assert seen[0] == ("double", 0, 40)
    assert seen[-1] == ("double", 40, 40)
    assert Cluster().run(double, tasks, "double") == [2 * task for task in tasks]
    assert cluster.run(double, [], "nothing") == []


@pytest.mark.parametrize("remote", [True, False])
def test_an_error_of_a_task_arrives_as_it_was(cluster, remote):
    running = cluster if remote else Cluster()
    with pytest.raises(SurveyError, match="bad file") as caught:
        running.run(fail_at_three, list(range(10)), "fail")
    assert caught.value.hint == "mend it"
    assert running.run(double, [1], "goes on") == [2]


def environment(name: str) -> str | None:
    return os.environ.get(name)


def test_workers_keep_freed_memory_for_the_next_task(cluster):
    names = ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS"]
    assert cluster.run(environment, names, "look") == [str(256 << 20), "1", "1"]


@pytest.mark.fault
def test_a_killed_worker_costs_nothing(tmp_path):
    with start(2, "2GiB") as cluster:
        assert cluster.run(die_once, [str(tmp_path)] * 6, "die") == ["survived"] * 6


@pytest.mark.fault
def test_a_task_that_always_kills_is_an_error():
    with start(1, "2GiB") as cluster, pytest.raises(ClusterError, match="killed its worker"):
        cluster.run(die, [0], "die")


def test_no_scheduler_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("sos_dask.cluster._LISTENING_S", 0.3)
    says = r"no Dask scheduler answers at (tcp://)?127\.0\.0\.1:1: .*refused"
    for address in ("tcp://127.0.0.1:1", "127.0.0.1:1"):
        began = time.monotonic()
        with pytest.raises(ClusterError, match=says), start(scheduler=address):
            pass
        assert time.monotonic() - began < 10


def test_a_partition_too_large_for_a_worker_is_refused_before_it_starts(cluster, tmp_path):
    from sos_dask.stages.parts import require_memory
    from tests.sky import observations, write_catalog

    catalog = write_catalog(observations(2000, spread=True), tmp_path / "cat")
    require_memory(cluster, catalog, "dedupe")
    require_memory(Cluster(), catalog, "dedupe")
    with start(1, "120MiB") as small, pytest.raises(ClusterError) as caught:
        require_memory(small, catalog, "dedupe")
    assert "dedupe: partition" in caught.value.message
    assert "the limit is 120 MiB" in caught.value.message
    assert "memory_limit" in caught.value.hint


def test_cpu_seconds_are_of_this_process_and_of_the_workers(cluster):
    assert Cluster().cpu_seconds().keys() == {""}
    before = cluster.cpu_seconds()
    assert len(before) == 1 + cluster.n_workers
    cluster.run(_busy, [0.3], "busy")
    after = cluster.cpu_seconds()
    assert sum(after[name] - before[name] for name in before if name) >= 0.3


def _busy(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass

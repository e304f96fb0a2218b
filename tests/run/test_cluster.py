import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from sos_dask.errors import ClusterError, ConfigError, SurveyError
from sos_dask.run.cluster import Cluster, check_place, start
from sos_dask.run.machine import memory_bytes, n_cores
from sos_dask.sky.healpix import ang2pix


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


def meet(barrier: threading.Barrier) -> str:
    barrier.wait(20)
    return threading.current_thread().name


def test_workers_of_this_machine_are_here_and_others_elsewhere(cluster, monkeypatch):
    assert not cluster.is_elsewhere and not Cluster().is_elsewhere
    monkeypatch.setattr("psutil.net_if_addrs", dict)
    assert cluster.is_elsewhere


def test_threads_run_tasks_at_once():
    with start(n_threads=3) as threads:
        assert threads.n_workers == 3
        names = threads.run(meet, [threading.Barrier(3)] * 6, "meet")
        assert len(set(names)) == 3 and threading.current_thread().name not in names
        seen = []
        report = lambda *said: seen.append(said)  # noqa: E731
        assert threads.run(double, list(range(40)), "double", report) == list(range(0, 80, 2))
        assert seen == [("double", number, 40) for number in range(41)]
        assert threads.run(double, [], "nothing") == []


def test_an_error_in_a_thread_stops_the_others():
    done = []

    def fail_at_once(number: int) -> None:
        if number == 0:
            raise SurveyError("bad file")
        time.sleep(0.01)
        done.append(number)

    with start(n_threads=2) as threads, pytest.raises(SurveyError, match="bad file"):
        threads.run(fail_at_once, list(range(1000)), "fail")
    assert len(done) < 500


def test_the_memory_of_threads():
    with start(n_threads=4) as threads:
        assert threads.memory_limit_bytes == memory_bytes() // 4
    with (
        start(n_threads=2, memory_limit="100MiB") as threads,
        pytest.raises(ClusterError, match="limit is 100 MiB"),
    ):
        threads.require_memory(200 << 20, "dedupe")


def test_a_memory_limit_is_a_number_of_bytes_or_none():
    with start(n_threads=2, memory_limit="0") as threads:
        assert threads.memory_limit_bytes is None
        threads.require_memory(1 << 60, "dedupe")
    for n_workers, n_threads in ((None, 2), (1, None)):
        with (
            pytest.raises(ConfigError, match="'much' is not a memory limit"),
            start(n_workers, "much", n_threads=n_threads),
        ):
            pass


def fail_to_read(task: int) -> None:
    raise OSError("Couldn't deserialize thrift")  # as Arrow does, without a number


def test_an_unreadable_file_is_not_taken_for_a_lost_cluster(cluster):
    with pytest.raises(OSError, match="deserialize"):
        cluster.run(fail_to_read, [1, 2], "read")


@pytest.mark.parametrize("where", ["workers", "threads", "here"])
def test_an_error_of_a_task_arrives_as_it_was(cluster, where):
    running = {"workers": cluster, "threads": Cluster(None, 2), "here": Cluster()}[where]
    with pytest.raises(SurveyError, match="bad file") as caught:
        running.run(fail_at_three, list(range(10)), "fail")
    assert caught.value.hint == "mend it"
    assert running.run(double, [1], "goes on") == [2]


def environment(name: str) -> str | None:
    return os.environ.get(name)


def test_workers_keep_freed_memory_for_the_next_task(cluster):
    names = ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS"]
    assert cluster.run(environment, names, "look") == [str(256 << 20), "1", "1"]


def resident_mib(_: int) -> float:
    return psutil.Process().memory_info().rss / 2**20


def fill_and_free(number: int) -> float:
    blocks = [bytearray(1 << 20) for _ in range(200)]
    del blocks
    return resident_mib(number)


def test_a_stage_does_not_inherit_the_memory_of_the_one_before():
    with start(1, "3GiB") as cluster:
        before = max(cluster.run(resident_mib, [1] * 8, "look"))
        kept = cluster.run(fill_and_free, [1] * 8, "fill")
        assert min(kept) > before + 150
        assert max(cluster.run(resident_mib, [1] * 8, "look")) < min(kept) - 150


@pytest.mark.fault
def test_a_killed_worker_costs_nothing(tmp_path):
    with start(2, "2GiB") as cluster:
        assert cluster.run(die_once, [str(tmp_path)] * 6, "die") == ["survived"] * 6


@pytest.mark.fault
def test_a_task_that_always_kills_is_an_error():
    with start(1, "2GiB") as cluster, pytest.raises(ClusterError, match="killed its worker"):
        cluster.run(die, [0], "die")


_INTERRUPTED = """
import os, signal, threading, time
from sos_dask.run.cluster import start
if __name__ == "__main__":
    threading.Timer({after}, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with start(2, "1GiB"):
            time.sleep(20)
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.parametrize("after", [0.05, 0.4, 0.9])
def test_an_interrupt_while_workers_start_is_not_lost(tmp_path, after):
    script = tmp_path / "script.py"
    script.write_text(_INTERRUPTED.format(after=after))
    began = time.monotonic()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("stopped\n", "")
    assert time.monotonic() - began < 15


def test_no_scheduler_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("sos_dask.run.kinds._LISTENING_S", 0.3)
    says = r"no Dask scheduler answers at (tcp://)?127\.0\.0\.1:1: .*refused"
    for address in ("tcp://127.0.0.1:1", "127.0.0.1:1"):
        began = time.monotonic()
        with pytest.raises(ClusterError, match=says), start(scheduler=address):
            pass
        assert time.monotonic() - began < 10


def test_a_partition_too_large_for_a_worker_is_refused_before_it_starts(tmp_path):
    """What is refused with its limit fits into a worker that has what the message asks for."""
    from sos_dask.api import dedupe
    from sos_dask.stars.group import DedupeSettings
    from tests.skies import observations, write_catalog

    table = in_one_pixel(observations(300_000, spread=True))
    large = write_catalog(table, tmp_path / "large")
    small = write_catalog(table, tmp_path / "small", rows_per_partition=40_000)
    assert len(large.pixels) == 1 < len(small.pixels)
    with start(1, "360MiB") as cluster:
        with pytest.raises(ClusterError) as caught:
            dedupe(large, tmp_path / "refused", DedupeSettings(), cluster=cluster)
        few = dedupe(small, tmp_path / "few", DedupeSettings(), cluster=cluster)
    assert f"dedupe: partition {large.pixels[0]} of {large.path} (300,000" in caught.value.message
    assert "the limit is 360 MiB" in caught.value.message
    assert "rows_per_partition" in caught.value.hint
    enough = re.search(r"Give workers (\d+) MiB", caught.value.hint)
    assert enough and 360 < int(enough[1]) < 460
    with start(1, f"{int(enough[1]) + 1}MiB") as cluster:
        many = dedupe(large, tmp_path / "held", DedupeSettings(), cluster=cluster)
    assert many.rows == few.rows
    dedupe(large, tmp_path / "refused", DedupeSettings())  # nobody limits this process


def in_one_pixel(table: pa.Table) -> pa.Table:
    """The same rows closer together, inside one base pixel."""
    ra, dec = 40.0 + table["ra"].to_numpy() / 36.0, table["dec"].to_numpy() / 18.0 + 41.0
    for name, values in (("ra", ra), ("dec", dec), ("_healpix_29", ang2pix(ra, dec))):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values))
    return table.sort_by([("_healpix_29", "ascending"), ("obs_id", "ascending")])


def test_workers_have_one_thread_and_this_process_all(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with start(1, "1GiB") as cluster:
        assert "OMP_NUM_THREADS" not in os.environ
        assert cluster.run(os.getenv, ["OMP_NUM_THREADS"], "ask") == ["1"]


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


@pytest.mark.parametrize(("limit", "n_bytes"), [("64MiB", 64 << 20), ("1GB", 10**9), ("0", None)])
def test_limits_of_memory(limit, n_bytes):
    with start(0, limit) as here:
        assert here.memory_limit_bytes == n_bytes


@pytest.mark.parametrize("limit", ["63MiB", "-1GiB", "1e30", "GiB", "", "2000000TiB"])
def test_limits_of_memory_that_cannot_be_meant(limit):
    with pytest.raises(ConfigError, match="not a memory limit"):
        check_place(1, limit)


def test_what_a_worker_can_use_of_its_limit():
    here = Cluster(thread_bytes=1000)
    here.require_memory(950, "work")
    with pytest.raises(ClusterError, match="95% can be used"):
        here.require_memory(951, "work")
    here.require_driver_memory(memory_bytes(), "work")
    with pytest.raises(ClusterError, match="in the process that was started"):
        here.require_driver_memory(memory_bytes() + 1, "work")


def test_places_that_are_impossible(tmp_path):
    most = 64 * n_cores()
    check_place(most)
    check_place(0)
    check_place(None, n_threads=most)
    (tmp_path / "scheduler.json").touch()
    check_place(None, scheduler=str(tmp_path / "scheduler.json"))
    for given, words in (
        ({"n_workers": most + 1}, "workers are not possible"),
        ({"n_workers": -1}, "workers are not possible"),
        ({"n_workers": None, "n_threads": 0}, "threads are not possible"),
        ({"n_workers": 1, "n_threads": 1}, "--threads goes with neither"),
        ({"n_workers": None, "n_threads": 1, "scheduler": "a:1"}, "--threads goes with neither"),
        ({"n_workers": 1, "scheduler": "a:1"}, "of its own"),
        ({"n_workers": None, "scheduler": "a:1", "memory_limit": "1GiB"}, "of its own"),
        ({"n_workers": None, "scheduler": str(tmp_path)}, "there is no file"),
        ({"n_workers": None, "scheduler": "none.json"}, "there is no file"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_place(**given)

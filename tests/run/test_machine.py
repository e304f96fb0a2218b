import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sos_dask.run import machine


def test_cores_are_those_this_process_may_use():
    assert 1 <= machine.n_cores() <= (os.cpu_count() or 1)
    code = "from sos_dask.run.machine import n_cores; print(n_cores())"
    one = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    printed = subprocess.run([*one, sys.executable, "-c", code], check=True, capture_output=True)
    assert int(printed.stdout) == 1


@pytest.mark.parametrize(
    ("controllers", "files"),
    [
        ("", {"cpu.max": "{} 100000"}),
        ("cpu,cpuacct", {"cpu.cfs_quota_us": "{}", "cpu.cfs_period_us": "100000"}),
    ],
)
def test_cores_are_those_a_batch_job_has_the_time_of(monkeypatch, tmp_path, controllers, files):
    job = tmp_path / controllers / "batch" / "job"
    job.mkdir(parents=True)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(128)))
    (tmp_path / "groups").write_text(f"4:memory:/other\n1:{controllers}:/batch/job\n")
    assert machine.n_cores() == 128
    for quota, cores in (("150000", 2), ("800000", 8), ("-1", 128), ("max", 128)):
        for name, text in files.items():
            (job / name).write_text(text.format(quota))
        assert machine.n_cores() == cores


def test_memory_is_no_more_than_the_machine_has():
    assert 1 << 28 < machine.memory_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("controllers", "name"), [("", "memory.max"), ("memory", "memory.limit_in_bytes")]
)
def test_the_limit_of_a_batch_job_counts_also_when_a_group_above_has_it(
    monkeypatch, tmp_path, controllers, name
):
    job = tmp_path / controllers / "batch" / "job"
    (job / "task").mkdir(parents=True)
    (job / name).write_text(f"{3 << 20}\n")
    (job / "task" / name).write_text("max\n")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    groups = tmp_path / "groups"
    groups.write_text(f"7:cpu,cpuacct:/other\n1:{controllers}:/batch/job/task\n")
    monkeypatch.setattr(machine, "_OWN_GROUPS", groups)
    assert machine.memory_bytes() == 3 << 20
    (job / name).unlink()
    assert machine.memory_bytes() == psutil.virtual_memory().total


_FILL = """
import threading, psutil
from sos_dask.run.machine import give_back_memory, keep_freed_memory
if {keep}:
    keep_freed_memory()
def resident():
    return psutil.Process().memory_info().rss >> 20
def fill():
    blocks = [bytearray(1 << 20) for _ in range(200)]
before = resident()
thread = threading.Thread(target=fill)
thread.start()
thread.join()
kept = resident()
give_back_memory()
print(kept - before, resident() - before)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_threads_use_freed_memory_again(keep):
    """A process of its own, because the setting stays."""
    code = _FILL.format(keep=keep)
    root = Path(__file__).parents[2]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = [sys.executable, "-c", code]
    printed = subprocess.run(run, cwd=root, env=plain, check=True, capture_output=True)
    kept, given_back = map(int, printed.stdout.split())
    assert given_back < 50
    assert 150 < kept < 300 if keep else kept < 50


def test_arrow_does_without_pandas():
    code = """
import sys
import numpy as np
import pyarrow as pa
from sos_dask.run.machine import leave_pandas_out
leave_pandas_out()
table = pa.table({"a": np.array([1.5, np.nan]), "b": ["x", None]})
assert table["a"].to_numpy()[0] == 1.5 and table["b"].to_numpy().tolist() == ["x", None]
assert pa.array(np.array([np.nan]), from_pandas=True).null_count == 1
assert "pandas" not in sys.modules
import pandas
assert pandas.Series([1]).sum() == 1
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_xgboost_does_without_scikit_learn_where_nobody_else_is():
    code = """
import sys
from sos_dask.run.machine import import_xgboost, leave_pandas_out
if len(sys.argv) > 1:
    leave_pandas_out()
xgboost = import_xgboost()
assert ("sklearn" in sys.modules) == (len(sys.argv) == 1)
import numpy, sklearn.neighbors
assert xgboost.train({}, xgboost.DMatrix(numpy.eye(3), [1, 2, 3]), 2).num_boosted_rounds() == 2
"""
    for alone in ([], ["alone"]):
        run = [sys.executable, "-c", code, *alone]
        subprocess.run(run, cwd=Path(__file__).parents[2], check=True)


@pytest.mark.parametrize(("n_rows", "n_threads"), [(0, 1), (9, 1), (10, 1), (20, 2), (10**9, 3)])
def test_threads_have_rows_enough(monkeypatch, n_rows, n_threads):
    monkeypatch.setattr(machine, "n_cores", lambda: 3)
    assert machine.n_threads(n_rows, 10) == n_threads

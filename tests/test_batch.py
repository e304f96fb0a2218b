"""What jobs/ has for a batch system, run by a real one; workers that are its jobs."""

import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import dask
import pytest

from sos_dask.errors import ClusterError
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.run.cluster import start
from sos_dask.run.kinds import SETTINGS, nested
from sos_dask.stages.apply import Apply
from tests.apart import ROOT
from tests.job import contents
from tests.slurm import Slurm, array_script, slurm

pytestmark = pytest.mark.services
JOBS = ROOT / "jobs"


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """SLURM of two nodes, whose jobs find `sos-dask` and `dask`."""
    folder = tmp_path_factory.mktemp("slurm")
    programs = folder / "bin"
    programs.mkdir()
    for name, module in (("sos-dask", "sos_dask.cli"), ("dask", "dask.__main__")):
        text = f"#!{sys.executable}\nfrom {module} import main\n"
        text += 'if __name__ == "__main__":\n    main()\n'  # workers import this file
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    changed = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setenv(name, value)
        with slurm(folder / "slurm") as made:
            patch.setenv("SLURM_CONF", made.env["SLURM_CONF"])
            yield made


@pytest.fixture(scope="module")
def expected(small_sky, tmp_path_factory) -> Path:
    """Store of the smoke job, without a cluster."""
    folder: Path = tmp_path_factory.mktemp("expected")
    rebuild(load_job(smoke(folder, small_sky)))
    return folder / "store/smoke"


def smoke(folder: Path, sky: Path) -> Path:
    """The smoke job in a folder of its own."""
    (folder / "jobs").mkdir(exist_ok=True)
    (folder / "smoke-sky").symlink_to(sky)
    shutil.copy(JOBS / "smoke.toml", folder / "jobs")
    return folder / "jobs/smoke.toml"


def artifacts(store: Path) -> dict[str, str]:
    return contents(store / "artifacts")


ON_LOOPBACK: dict[str, Any] = {
    "kind": "slurm", "minimum": 2, "memory": "1GiB", "interface": "lo", "walltime": "00:20:00",
}  # fmt: skip


def test_workers_are_jobs_and_a_cancelled_one_is_replaced(
    batch: Slurm, small_sky, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cancelled: list[str] = []

    def cancel() -> None:
        while not list((tmp_path / "store").glob("**/.work")):
            time.sleep(0.05)
        while not cancelled:  # Python is slow to start
            cancelled.extend(batch.running()[:1])
        batch.ask("scancel", *cancelled)

    job, canceller = smoke(tmp_path, small_sky), threading.Thread(target=cancel, daemon=True)
    with start(**ON_LOOPBACK, log_directory=str(tmp_path / "logs")) as cluster:
        canceller.start()
        rebuild(load_job(job), cluster=cluster)
        canceller.join(60)
        deadline = time.monotonic() + 60
        while cluster.n_workers < 2 or set(batch.running()) & set(cancelled):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        environ = cluster.client.run(os.getenv, "MALLOC_ARENA_MAX")
        assert set(environ.values()) == {"1"}
        assert not cluster.is_elsewhere
        pause = cluster.client.run(_setting, "distributed.worker.memory.pause")
        assert set(pause.values()) == {False}
    assert cancelled and artifacts(tmp_path / "store/smoke") == artifacts(expected)
    deadline = time.monotonic() + 30
    while batch.running():
        assert time.monotonic() < deadline, "jobs outlived their driver"
        time.sleep(0.2)


def _setting(name: str) -> object:
    return dask.config.get(name)


def test_a_job_that_the_queue_refuses_is_said(batch, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with (
        start(**ON_LOOPBACK, queue="nowhere", timeout=5) as cluster,
        pytest.raises(ClusterError, match="none has connected"),
    ):
        cluster.run(str, [1], "work")
    assert "could not be submitted: sbatch: error: invalid partition" in caplog.text


def test_a_rebuild_in_one_allocation(batch: Slurm, small_sky, expected, tmp_path):
    job = smoke(tmp_path, small_sky)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    small = ["--ntasks=2", "--mem-per-cpu=1G"]
    number = batch.submit(*small, JOBS / "rebuild.sbatch", job, cwd=tmp_path)
    log = tmp_path / f"sos-rebuild-{number}.out"
    assert batch.finish(number) == {number: "COMPLETED 0:0"}, log.read_text()
    assert artifacts(tmp_path / "store/smoke") == artifacts(expected)
    assert "should have the settings" not in log.read_text()
    assert not list(tmp_path.glob(".sos-rebuild*"))


def test_an_array_of_which_one_task_is_lost(batch: Slurm, expected, tmp_path):
    current = expected / "current"
    given = [current / "lamost.model.polynomial", current / "lamost.observations"]
    script = array_script(tmp_path, 3)
    first = ["--array=1,3", "--mem=1G", script, *given, "out"]
    assert set(batch.finish(batch.submit(*first, cwd=tmp_path)).values()) == {"COMPLETED 0:0"}
    assert not (tmp_path / "out/manifest.json").exists()
    second = ["--array=2", "--mem=1G", script, *given, "out"]
    assert batch.finish(batch.submit(*second, cwd=tmp_path)) == {"2": "COMPLETED 0:0"}
    Apply({"model": given[0], "observations": given[1]}).run(tmp_path / "whole", cluster=None)
    one, whole = contents(tmp_path / "out/dataset"), contents(tmp_path / "whole/dataset")
    assert one == whole


def test_the_settings_for_schedulers_and_workers_of_others():
    assert dask.config.collect([str(ROOT / "deploy/dask.yaml")], env={}) == nested(SETTINGS)

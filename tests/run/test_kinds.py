"""What the kinds of clusters are asked for, where there is none of them."""

import base64
import re
from typing import Any

import dask
import pytest

from sos_dask.errors import ClusterError
from sos_dask.rebuild.job import load_job
from sos_dask.run import kinds
from sos_dask.run.cluster import start
from sos_dask.run.kinds import ClusterSettings
from tests.job import write_job


def test_a_job_of_the_batch_system_asks_for_what_is_given():
    given: dict[str, Any] = {"cores": 4, "memory": "8GiB", "walltime": "10:00:00", "queue": "long"}
    settings = ClusterSettings(kind="pbs", interface="lo", directives=["-A me"], **given)
    with kinds._batch(settings, None) as cluster:
        script = cluster.job_script()
    for line in ("-q long", "-A me", "-l walltime=10:00:00"):
        assert f"#PBS {line}\n" in script
    for option in ("--nworkers 4", "--nthreads 1", "--memory-limit 2.00GiB", "--interface lo"):
        assert option in script
    # They end, one after the other, before the job does, and others are there.
    assert "--lifetime 32400s --lifetime-stagger 1800s" in script
    assert "export MALLOC_ARENA_MAX=1\n" in script
    inherited = re.search(r"export DASK_INTERNAL_INHERIT_CONFIG=(\S+)", script)
    assert inherited and base64.b64decode(inherited[1])
    assert dask.config.deserialize(inherited[1]) == kinds.nested(kinds.SETTINGS)


def test_a_batch_system_that_is_not_there(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nowhere")
    with (
        pytest.raises(ClusterError, match="none has connected"),
        start(kind="pbs", interface="lo", timeout=3) as cluster,
    ):
        cluster.run(str, [1], "work")
    assert "a job for workers could not be submitted: [Errno 2]" in caplog.text


class Fake:
    """A cluster of another package, which says what it is asked for."""

    asked: dict[str, Any]

    def __init__(self, **asked: Any) -> None:
        type(self).asked = asked
        raise RuntimeError("no API server")


@pytest.mark.parametrize(
    ("module", "name", "given", "asked"),
    [
        (
            "dask_kubernetes.operator",
            "KubeCluster",
            {"kind": "kubernetes", "spec": "cluster.yaml", "namespace": "stars"},
            {"custom_cluster_spec": "cluster.yaml", "namespace": "stars"},
        ),
        ("dask_cuda", "LocalCUDACluster", {"kind": "cuda", "n_workers": 2}, {"n_workers": 2}),
    ],
)
def test_clusters_of_other_packages(monkeypatch, module, name, given, asked):
    imported = type("Module", (), {name: Fake})
    monkeypatch.setattr("importlib.import_module", lambda name: {module: imported}[name])
    says = f"no cluster of kind '{given['kind']}' can be started: no API server"
    with pytest.raises(ClusterError, match=says), start(**given):
        pass
    assert asked.items() <= Fake.asked.items()


def test_time_limits():
    assert ClusterSettings().timeout_s == 120
    assert ClusterSettings(scheduler="a:1").timeout_s == 30
    assert ClusterSettings(kind="slurm").timeout_s == 3600
    assert ClusterSettings(kind="slurm", timeout=5).timeout_s == 5
    assert ClusterSettings(scheduler="a:1").place == "address"


def test_paths_of_a_job_are_relative_to_it(tmp_path):
    more = '[cluster]\nscheduler = "dask/scheduler.json"\n[cluster.tls]\n'
    more += 'ca_file = "ca.pem"\ncert = "/etc/cert.pem"\nkey = "key.pem"\n'
    place = load_job(write_job(tmp_path, tmp_path, more=more)).place
    assert place.scheduler == str(tmp_path / "dask/scheduler.json")
    assert place.tls and dict(place.tls) == {
        "ca_file": str(tmp_path / "ca.pem"),
        "cert": "/etc/cert.pem",
        "key": str(tmp_path / "key.pem"),
    }

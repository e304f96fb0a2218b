"""Scheduler, workers and driver on hosts of their own: network namespaces on a bridge.

Each has an address and a folder of its own; what they share is the store and the job.
"""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.apart import ROOT, kill
from tests.job import contents, write_job
from tests.services import require

pytestmark = [pytest.mark.services, pytest.mark.fault]
_NET = "10.213.7"


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str
    link: str  # its end on the bridge
    folder: Path

    def start(self, log: Path, *words: str) -> subprocess.Popen:
        """Start Python on this host, in its folder."""
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = ["ip", "netns", "exec", self.name, sys.executable, *words]
        with log.open("a") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, cwd=self.folder, env=env)

    def dask(self, program: str, *words: str) -> subprocess.Popen:
        """Start a scheduler or a worker."""
        code = f"from distributed.cli import dask_{program}; dask_{program}.main()"
        return self.start(self.folder / "log", "-c", code, *words, "--no-dashboard")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path) -> Iterator[list[Host]]:
    """Four hosts on one network."""
    require("ip", root=True)
    tag = uuid.uuid4().hex[:6]
    bridge, made = f"br{tag}", []
    with contextlib.ExitStack() as stack:
        ip("link", "add", bridge, "type", "bridge")
        stack.callback(ip, "link", "del", bridge)
        ip("link", "set", bridge, "up")
        for number in range(1, 5):
            name, link, inner = f"h{number}{tag}", f"v{number}{tag}", f"w{number}{tag}"
            folder = tmp_path / f"host{number}"
            folder.mkdir()
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", link, "type", "veth", "peer", "name", inner)
            ip("link", "set", inner, "netns", name)
            ip("link", "set", link, "master", bridge, "up")
            ip("-n", name, "addr", "add", f"{_NET}.{number}/24", "dev", inner)
            ip("-n", name, "link", "set", inner, "up")
            ip("-n", name, "link", "set", "lo", "up")
            made.append(Host(name, f"{_NET}.{number}", link, folder))
        yield made


def test_a_rebuild_over_several_hosts_one_of_which_is_cut_off(
    hosts, small_sky, small_store, tmp_path
):
    one, two, three, four = hosts
    write_job(tmp_path, small_sky)
    store = tmp_path / "store"
    with contextlib.ExitStack() as stack:
        address = f"tcp://{one.address}:8786"
        running = [one.dask("scheduler", "--host", one.address, "--port", "8786")]
        for host in (two, three):
            given = ["--nthreads", "1", "--host", host.address, "--name", f"on {host.address}"]
            running.append(host.dask("worker", address, *given))
        main = "from sos_dask.cli import main; main()"
        log = tmp_path / "driver.log"
        given = ["rebuild", "../job.toml", "--scheduler", address, "--cluster", "timeout=10"]
        deadline = time.monotonic() + 200
        for process in running:
            stack.callback(kill, process)
        while not all("Registered to" in (x.folder / "log").read_text() for x in (two, three)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        driver = four.start(log, "-c", main, *given)
        stack.callback(kill, driver)
        while not list(store.glob("artifacts/dedupe/*/.work/stars/*.json")):
            assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        ip("link", "set", two.link, "down")
        assert driver.wait(240) == 0, log.read_text()
    assert f"worker on {two.address} at" in log.read_text()
    assert "has been silent for 10 s and is given up" in log.read_text()
    assert contents(store / "artifacts") == contents(small_store / "artifacts")
    assert not list(four.folder.iterdir())
    assert {path.name for path in three.folder.iterdir()} == {"log"}

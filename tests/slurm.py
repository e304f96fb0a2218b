"""A real SLURM on the loopback of this machine: controller, nodes and munge in one folder."""

import os
import random
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.apart import ROOT
from tests.services import require

_CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
KillWait=2
InactiveLimit=0
MinJobAge=600
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
_NODE += "RealMemory={memory} State=UNKNOWN\n"


@dataclass(frozen=True)
class Slurm:
    """Commands of a running SLURM."""

    folder: Path
    env: dict[str, str]

    def ask(self, *command: object) -> str:
        """Standard output of a command."""
        words = [str(word) for word in command]
        ran = subprocess.run(words, env=self.env, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, (words, ran.stderr)
        return ran.stdout.strip()

    def submit(self, *command: object, cwd: Path) -> str:
        """Number of a batch job."""
        return self.ask("sbatch", "--parsable", f"--chdir={cwd}", *command)

    def running(self, name: str = "") -> list[str]:
        """Numbers of running jobs, of a name."""
        named = [f"--name={name}"] if name else []
        return self.ask("squeue", "-h", "-r", "-t", "R", "-o", "%i", *named).split()

    def states(self, job: str) -> dict[str, str]:
        """State of a job, or of each task of an array, and its exit code."""
        found = {}
        for line in self.ask("scontrol", "-o", "show", "job", job).splitlines():
            one = dict(word.partition("=")[::2] for word in line.split())
            name = one.get("ArrayTaskId", one["JobId"])
            found[name] = f"{one['JobState']} {one['ExitCode']}"
        return found

    def finish(self, job: str, limit_s: float = 240) -> dict[str, str]:
        """Wait for a job; its states."""
        deadline = time.monotonic() + limit_s
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        while True:
            states = self.states(job)
            if not any(one.startswith(going) for one in states.values()):
                return states
            assert time.monotonic() < deadline, states
            time.sleep(0.2)


def array_script(folder: Path, n: int) -> Path:
    """Write `jobs/apply-array.sbatch` as one of n shards."""
    text = (ROOT / "jobs/apply-array.sbatch").read_text()
    wide = re.search(r"--array=1-(\d+)$", text, re.MULTILINE)
    assert wide and f"\nN={wide[1]}\n" in text
    text = text.replace(f"--array=1-{wide[1]}", f"--array=1-{n}")
    script = folder / "array.sbatch"
    script.write_text(text.replace(f"\nN={wide[1]}\n", f"\nN={n}\n"))
    return script


def _free_ports(n: int) -> int:
    """First of so many free ports."""
    while True:
        first = random.randrange(20_000, 50_000)
        with suppress(OSError):
            for port in range(first, first + n):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
            return first


@contextmanager
def slurm(folder: Path, n_nodes: int = 2, cpus: int = 1) -> Iterator[Slurm]:
    """Start SLURM in an empty folder; all of its jobs and processes end with the block."""
    require("slurmctld", "slurmd", "munged", "sbatch", root=True)
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    (folder / "state").mkdir()
    host, port = socket.gethostname().split(".")[0], _free_ports(n_nodes + 1)
    memory = psutil.virtual_memory().total // 2**20 * 9 // 10 // n_nodes
    names = [f"n{number}" for number in range(n_nodes)]
    conf = _CONF.format(host=host, port=port, folder=folder)
    for number, name in enumerate(names, start=1):
        node = _NODE.format(name=name, host=host, port=port + number, cpus=cpus, memory=memory)
        conf = conf.replace("PartitionName", f"{node}PartitionName")
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    made = Slurm(folder, os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path})
    munge = [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"]
    munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    try:
        made.ask("munged", "--force", f"--key-file={key}", *munge)
        made.ask("slurmctld", "-c")
        for name in names:
            (folder / f"spool-{name}").mkdir()
            made.ask("slurmd", "-N", name)
        deadline = time.monotonic() + 60
        while len(made.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) < n_nodes:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.2)
        yield made
    finally:
        _end(made)


def _end(made: Slurm) -> None:
    """Cancel all jobs, then end what was started, by its process number."""
    with suppress(AssertionError):
        made.ask("scancel", "--full", "--user=root")
        deadline = time.monotonic() + 20
        while made.ask("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.2)
    started = []
    for name in ("slurmd-*.pid", "slurmctld.pid", "munged.pid"):
        for file in made.folder.glob(name):
            with suppress(OSError, ValueError, psutil.NoSuchProcess):
                started.append(psutil.Process(int(file.read_text())))
                started[-1].terminate()
    for one in psutil.wait_procs(started, timeout=10)[1]:
        one.kill()

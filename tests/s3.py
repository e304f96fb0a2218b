"""A real S3 server (SeaweedFS) on loopback, for tests and measurements."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from sos_dask.storage.manifest import MANIFEST, Manifest
from sos_dask.storage.store import home, read_build

_PORTS = {"s3": 0, "master": 1, "volume": 2, "filer": 3}
KEYS = {"AWS_ACCESS_KEY_ID": "observer", "AWS_SECRET_ACCESS_KEY": "not-to-be-told"}


class Server:
    """The server: it can be stopped and started again, with the same objects and address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.first = folder, _free_ports()
        self.process: subprocess.Popen | None = None
        (folder / "data").mkdir(parents=True)
        user = {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
        given = {"name": "test", "credentials": [user], "actions": ["Admin"]}
        (folder / "users.json").write_text(json.dumps({"identities": [given]}))
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which AWS's and our programs find it."""
        return {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.first}"}

    def start(self) -> None:
        """Start it, and wait until it stores objects."""
        weed = str(Path(sys.executable).with_name("weed"))
        ports = [f"-{name}.port={self.first + n}" for name, n in _PORTS.items()]
        # By default these are far above the others, where they may be taken.
        ports += [f"-{name}.port.grpc={self.first + n + len(_PORTS)}" for name, n in _PORTS.items()]
        options = ["-s3", "-filer", "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=20"]
        options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=256"]
        options += [f"-dir={self.folder / 'data'}", f"-s3.config={self.folder / 'users.json'}"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [weed, "server", *ports, *options], stdout=log, stderr=subprocess.STDOUT
            )
        code = "from sos_dask.storage.objects import ObjectPath; ObjectPath('s3://tests/started').put(b'')"
        run = [sys.executable, "-c", code]
        try:
            subprocess.run(run, env=os.environ | self.environment, check=True, timeout=90)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill it."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


def _free_ports() -> int:
    """First of as many ports in a row as are needed."""
    n = 2 * len(_PORTS)
    for first in range(21000 + os.getpid() * 16 % 10000, 32000, n):
        with suppress(OSError):
            for port in range(first, first + n):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


def manifests(store: Path) -> dict[str, bytes]:
    """Manifest of every product of the current build, by its name."""
    build = read_build(store / "current")
    homes = {
        x: home(build["stages"][x], (store / "current" / x).resolve()) for x in build["products"]
    }
    return {product: (path / MANIFEST).read_bytes() for product, path in homes.items()}


def same_files(store: Path) -> int:
    """Compare every file of the current build with its manifest; their number."""
    n_files = 0
    for product, stage in read_build(store / "current")["stages"].items():
        path = home(stage, (store / "current" / product).resolve())
        n_files += len(Manifest.checked(path, "sha256").files)
    return n_files

"""Commands about clusters: ``sos-dask cluster certs``."""

from __future__ import annotations

from pathlib import Path

from sos_dask.cli.options import Shown, command
from sos_dask.cli.output import say
from sos_dask.run.certificates import make_certificates


@command()
def certs(directory: Path, *, days: int = 365) -> Shown:
    """Make certificates for TLS between this process, scheduler and workers.

    Example: sos-dask cluster certs certificates
    """
    made = make_certificates(directory, days)
    files = {name: str(file.absolute()) for name, file in made.items()}
    yield {"files": files}
    say("[cluster.tls]")
    for name, file in files.items():
        say(f'{name} = "{file}"')
    say(f"Keep the folder to yourself: who has {files['key']} can run programs on the cluster.")

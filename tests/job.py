"""A job on a simulated sky, and what tests and benchmarks ask of its store."""

import hashlib
from pathlib import Path
from typing import Any

from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.simulate import SkySettings, simulate

DEFAULT_PARTITIONS = ("[ingest]\nrows_per_partition = 1500\n", "")
WITH_REPORT = ("enabled = false", "enabled = true")

JOB = """
format = 1
name = "small"
store = "store"
target_name = "lamost"
[variables]
SMALL_SKY = "{sky}"
[target]
survey = "lamost-dr11-lrs"
files = ["${{SMALL_SKY}}/lamost.fits"]
[reference.apogee]
survey = "apogee-dr17"
files = ["${{SMALL_SKY}}/apogee.fits"]
[reference.galah]
survey = "galah-dr4"
files = ["${{SMALL_SKY}}/galah.fits"]
[ingest]
rows_per_partition = 1500
[train]
methods = ["polynomial"]
[report]
enabled = false
"""


def write_job(folder: Path, sky: Path, *changes: tuple[str, str], more: str = "") -> Path:
    """Write the job into a folder; each change replaces a text that is there exactly once."""
    text = JOB.format(sky=sky)
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    job = folder / "job.toml"
    job.write_text(text + more)
    return job


def methods(*names: str, more: str = "") -> tuple[str, str]:
    """Change of the job: other methods, and further keys of their table."""
    listed = ", ".join(f'"{name}"' for name in names)
    return 'methods = ["polynomial"]', f"methods = [{listed}]{more}"


def build(folder: Path, *changes: tuple[str, str], **sky: Any) -> Path:
    """Make a sky in ``folder / "sky"`` and a build of it in ``folder / "store"``; the job."""
    simulate(SkySettings(**sky), folder / "sky")
    job = write_job(folder, folder / "sky", *changes)
    rebuild(load_job(job))
    return job


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path below the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

"""A small job on a simulated sky, and what tests ask of its store."""

import hashlib
from pathlib import Path

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


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path below the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

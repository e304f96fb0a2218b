"""Fixtures that many tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the small real survey tables; skips where they are absent."""
    folder = Path(os.environ.get("SOS_REAL_DATA", ROOT.parent / "shared" / "data" / "real"))
    if not folder.is_dir():
        pytest.skip(f"no real survey tables at {folder} (set SOS_REAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def cluster():
    """A real cluster of two worker processes, started once."""
    from sos_dask.cluster import start

    with start(2, "3GiB") as running:
        yield running

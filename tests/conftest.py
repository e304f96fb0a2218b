"""Fixtures that many tests share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pandas  # noqa: F401  programs that results are compared with need it of Arrow
import pytest
from hypothesis import HealthCheck, settings

from tests.command_line import cli
from tests.s3 import Server

__all__ = ["cli"]  # a fixture

# Whether a machine is busy is no property of the software. Threads of XGBoost that wait for each
# other are not to spin: beside other programs that takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the small real survey tables; skips where they are absent."""
    folder = Path(os.environ.get("SOS_REAL_DATA", ROOT.parent / "shared" / "data" / "real"))
    if not folder.is_dir():
        pytest.skip(f"no real survey tables at {folder} (set SOS_REAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def real_data_2() -> Path:
    """Folder of the second set of real tables; skips where they are absent."""
    folder = Path(os.environ.get("SOS_REAL2_DATA", ROOT.parent / "shared" / "data" / "real2"))
    if not folder.is_dir():
        pytest.skip(f"no second set of real tables at {folder} (set SOS_REAL2_DATA)")
    return folder


@pytest.fixture(scope="session")
def cluster():
    """A real cluster of two worker processes, started once."""
    from sos_dask.run.cluster import start

    with start(2, "3GiB") as running:
        yield running


@pytest.fixture(scope="session")
def client(cluster):
    """Client of the cluster of two worker processes that all tests share."""
    return cluster.client


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[Server]:
    """A real S3 server, started once; the environment tells where it and copies of objects are."""
    server = Server(tmp_path_factory.mktemp("s3"))
    copies = str(tmp_path_factory.mktemp("copies"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", copies)
        for name, value in {**server.environment, "TMPDIR": copies}.items():
            patch.setenv(name, value)
        yield server
    server.stop()


@pytest.fixture
def prefix(s3_server) -> str:
    """URL of a place without objects."""
    return f"s3://tests/{uuid4().hex}"


@pytest.fixture(scope="session")
def small_sky(tmp_path_factory) -> Path:
    """Folder of a simulated sky: 5,000 LAMOST rows, as the surveys' own FITS tables."""
    from sos_dask.simulate import SkySettings, simulate

    folder: Path = tmp_path_factory.mktemp("small") / "sky"
    simulate(SkySettings(n_lamost=5000), folder)
    return folder


@pytest.fixture(scope="session")
def small_store(small_sky, tmp_path_factory) -> Path:
    """Store with one build of `tests.job`; only to be read, or copied (links as links)."""
    from sos_dask.rebuild.job import load_job
    from sos_dask.rebuild.pipeline import rebuild
    from tests.job import write_job

    folder: Path = tmp_path_factory.mktemp("small-store")
    rebuild(load_job(write_job(folder, small_sky)))
    return folder / "store"


@pytest.fixture(scope="session")
def current(small_store) -> Path:
    """The build of `small_store`."""
    folder: Path = small_store / "current"
    return folder

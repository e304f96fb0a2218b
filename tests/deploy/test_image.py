"""The image: built from the Dockerfile on a Debian base, and run as a user who is not root."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import require

ROOT = Path(__file__).parent.parent.parent
BASE = "localhost/base:12"
IMAGE = "localhost/sos-dask:test"


def buildah(*words: str | Path) -> str:
    done = subprocess.run(
        ["buildah", *map(str, words)],
        env=os.environ | {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"buildah {words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


def of_pip() -> list[Path]:
    """Files that pip is configured by here, and what these name: certificates, other indexes."""
    found = []
    for asked in ("debug", "list"):
        command = [sys.executable, "-m", "pip", "config", asked]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found += re.findall(r"(?:file://|[\s'])(/[^\s',]+)", done.stdout)
    return sorted({path for path in map(Path, found) if path.exists() and path.parent != path})


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    require("buildah", "mmdebstrap", "crun", root=True)
    if shutil.disk_usage("/var").free < 20 << 30:
        pytest.skip("an image and its layers need 20 GiB in /var")
    base = tmp_path_factory.mktemp("image") / "base.tar"
    packages = "--include=python3,python3-venv,ca-certificates"
    made = ["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", str(base)]
    subprocess.run(made, check=True, capture_output=True)
    container = buildah("from", "scratch")
    buildah("add", "-q", container, base, "/")
    buildah("commit", "-q", "--rm", container, BASE)
    base.unlink()
    # An index on disk has its files beside its pages.
    places = [path.parent if path.name == "simple" else path for path in of_pip()]
    volumes = [f"--volume={path}:{path}:ro" for path in places]
    buildah("bud", "--build-arg", f"BASE={BASE}", "--target", "cpu", *volumes,
            "-t", IMAGE, "-f", ROOT / "deploy" / "Dockerfile", ROOT)  # fmt: skip
    container = buildah("from", IMAGE)
    yield container
    buildah("rm", container)
    buildah("rmi", "-f", IMAGE, BASE)


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(1500)
def test_the_image_works_for_a_user_who_is_not_root(image, tmp_path):
    tmp_path.chmod(0o777)

    def inside(*words: str) -> str:
        return buildah("run", f"--volume={tmp_path}:/data", image, "--", *words)

    assert inside("id", "-u") == "10001"
    assert "rebuild" in inside("sos-dask", "--help")
    inside("sos-dask", "simulate", "-o", "/data/sky", "--rows", "2000")
    survey = next((tmp_path / "sky").glob("*lamost*"), None) or next((tmp_path / "sky").iterdir())
    assert survey.stat().st_uid == 10001
    inside("sos-dask", "ingest", "lamost-dr11-lrs", f"/data/sky/{survey.name}", "-o", "/data/rows",
           "--workers", "2")  # fmt: skip
    assert (tmp_path / "rows" / "manifest.json").stat().st_uid == 10001
    settings = inside("python3", "-c", "import dask; print(dask.config.get("
                      "'distributed.worker.memory.pause'))")  # fmt: skip
    assert settings == "False"

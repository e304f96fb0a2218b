"""Programs of the system that some tests need: a real SLURM, network namespaces, image builders."""

import os
import shutil
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "build" / "tools" / "bin"
"""Where .ci/tools installs programs."""


def require(*programs: str, root: bool = False) -> None:
    """Skip a test where a program is not installed; fail instead where all of them are promised.

    ``SOS_SERVICES=all`` promises them: what lands has run them. ``root``: the test needs root, too.
    """
    missing = [name for name in programs if shutil.which(name, path=_path()) is None]
    if root and os.geteuid() != 0:
        missing.append("root")
    if missing:
        reason = f"needs {', '.join(missing)} (see .ci)"
        if os.environ.get("SOS_SERVICES") == "all":
            pytest.fail(reason)
        pytest.skip(reason)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", str(TOOLS)])

"""Fixtures of the tests of stages."""

import itertools
from pathlib import Path

import pytest

from sos_dask.api import dedupe
from tests.skies import write_catalog
from tests.stages.clumps import N_ROWS, SETTINGS, SIZES, sky


@pytest.fixture(scope="session")
def stars(tmp_path_factory) -> Path:
    """The same observations, and the stars made of them, cut in several ways; only to be read."""
    root: Path = tmp_path_factory.mktemp("stages")
    for number, size in itertools.product((1, 2, 3), SIZES):
        observed = write_catalog(sky(N_ROWS, number), root / f"obs{number}-{size}", size)
        dedupe(observed, root / f"stars{number}-{size}", SETTINGS)
    return root


@pytest.fixture(scope="session")
def build(small_store) -> Path:
    """The build of the small store itself, behind its link."""
    found: Path = (small_store / "current").resolve()
    return found

"""Stores with a build of the small job, and what rebuilds of it do."""

import shutil
from pathlib import Path

import pytest

from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.rebuild.plan import plan
from tests.job import write_job

SNR_30 = ('files = ["${SMALL_SKY}/lamost.fits"]', 'files = ["${SMALL_SKY}/lamost.fits"]\n'
          "override = { cuts = { snr = { min = 30 } } }")  # fmt: skip


def ran(build) -> set[str]:
    return {stage.product for stage in build.stages if stage.ran}


def reasons(job, store=None) -> dict[str, str]:
    return {stage.product: stage.reason for stage in plan(job, store) if not stage.complete}


def downstream(job, *first: str) -> set[str]:
    """Products that are made of some products, directly or not, and these."""
    found = set(first)
    fingerprints = {s.recipe.fingerprint for s in plan(job) if s.product in found}
    for stage in plan(job):
        if fingerprints & set(stage.recipe.inputs.values()):
            found.add(stage.product)
            fingerprints.add(stage.recipe.fingerprint)
    return found


@pytest.fixture
def store(small_store, small_sky, tmp_path) -> Path:
    """A copy of the store beside its job, free to be changed."""
    shutil.copytree(small_store, tmp_path / "store", symlinks=True)
    write_job(tmp_path, small_sky)
    return tmp_path / "store"


@pytest.fixture(scope="session")
def twice_built(small_store, small_sky, tmp_path_factory) -> Path:
    """A store with a second build, of another cut; only to be copied, as `changed` does."""
    folder: Path = tmp_path_factory.mktemp("twice")
    shutil.copytree(small_store, folder / "store", symlinks=True)
    rebuild(load_job(write_job(folder, small_sky, SNR_30)))
    return folder / "store"


@pytest.fixture
def changed(store, twice_built, small_sky):
    """The job with the other cut, which is built in the store."""
    shutil.rmtree(store)
    shutil.copytree(twice_built, store, symlinks=True)
    return load_job(write_job(store.parent, small_sky, SNR_30))


@pytest.fixture
def job(store):
    return load_job(store.parent / "job.toml")

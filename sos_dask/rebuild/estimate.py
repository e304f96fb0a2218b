"""What a rebuild will take, by what the published build took and how its input has grown."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sos_dask.errors import CatalogError
from sos_dask.rebuild.history import current_products, runs
from sos_dask.rebuild.plan import Planned
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.objects import ObjectPath
from sos_dask.storage.store import costs, file_sizes

# Of a first build, measured: its outputs and intermediate files in bytes of the survey files.
_OF_INPUT = 4.0
_SCRATCH = 2.0  # intermediate files of ingest in bytes of its output
_MIB = 2**20


@dataclass(frozen=True)
class Estimate:
    """What a rebuild will take; seconds and memory are None where no run tells.

    ``stages`` that will run, of ``of``; ``bytes`` that it writes, of ``free_bytes`` on a disk;
    ``peak_mib`` of the largest process of the last run on this machine that ran a stage.
    """

    stages: int
    of: int
    seconds: float | None
    bytes: int
    free_bytes: int | None
    peak_mib: int | None

    @property
    def in_words(self) -> str:
        """The estimate as a text."""
        time = "" if self.seconds is None else f", about {_duration(self.seconds)}"
        peak = "" if self.peak_mib is None else f", {self.peak_mib:,} MiB in a process"
        disk = f"{self.bytes / _MIB:,.0f} MiB"
        disk += "" if self.free_bytes is None else f" of {self.free_bytes / _MIB:,.0f} MiB free"
        return f"{self.stages} of {self.of} stages{time}, {disk}{peak}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _there(directory: Path) -> int:
    """Bytes of what a killed run has left of an output."""
    if isinstance(directory, ObjectPath):
        return 0
    return sum(file.lstat().st_size for file in directory.rglob("*") if not file.is_dir())


def estimate(store: Path, stages: Sequence[Planned]) -> Estimate:
    """Estimate what the stages of a plan that are not complete will take."""
    todo = [one for one in stages if not one.complete]
    sizes, known = file_sizes(store), costs(store)
    before = {}
    for name, path in current_products(store).items():
        with suppress(CatalogError):  # only an estimate wants it
            before[name] = Manifest.load(path)
    growth = {}
    for one in stages:
        if one.recipe.stage == "ingest":
            now = sum(sizes.get(digest, 0) for digest in one.recipe.inputs.values())
            old = before.get(one.product)
            was = sum(sizes.get(digest, 0) for digest in old.recipe.inputs.values()) if old else 0
            growth[one.product] = now / was if was else 1.0
    n_bytes, seconds, scratch, tells = 0.0, 0.0, 0.0, bool(before)
    most = max(growth.values(), default=1.0)
    for one in todo:
        old, factor = before.get(one.product), growth.get(one.product, most)
        if old is None:
            inputs = sum(sizes.get(digest, 0) for digest in one.recipe.inputs.values())
            n_bytes += _OF_INPUT * inputs
            continue
        written = factor * sum(file.bytes for file in old.files)
        n_bytes += max(0.0, written - _there(one.directory))
        scratch = max(scratch, _SCRATCH * written if one.recipe.stage == "ingest" else 0.0)
        took = known.get(old.fingerprint)
        tells &= took is not None
        seconds += factor * took["wall_s"] if took else 0.0
    free = None
    if not isinstance(store, ObjectPath):
        place = next(path for path in (store, *store.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
    peaks = (one["peak_mib"] for one in runs(store) if "peak_mib" in one)
    peak = next(peaks, None)
    took_s = round(seconds, 1) if tells else None
    return Estimate(len(todo), len(stages), took_s, int(n_bytes + scratch), free, peak)

"""What all stages do, written once: inputs, recipe, restart, memory, parts, commit.

A stage is a subclass of `Stage`: a ``name`` and a ``version``, its ``Settings`` (the only place
where a setting is declared), its ``roles``, the inputs by what they are to it, and ``make``. That
runs its parts (`Run.parts`: finished ones are skipped after a restart), gathers their records and
writes what is made of them. A part is a method of the stage that gets the output, the part's key
and a small item, writes its files and returns a record. A stage travels to workers as paths and
numbers; catalogs are opened there, once. Below is what stages ask of catalogs that they match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask.errors import CatalogError, ConfigError, StorageError, SurveyError
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import HEALPIX_COLUMN, KEYS, YEARS
from sos_dask.settings import Settings
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel
from sos_dask.stars.match import MOTION, Motion
from sos_dask.storage.artifact import Output, write_parquet
from sos_dask.storage.catalog import Catalog, write_catalog_metadata, write_partition
from sos_dask.storage.manifest import FileRecord, Manifest, Recipe, Rows, local_copy
from sos_dask.storage.objects import as_path, at_once

S = TypeVar("S", bound=Settings)
T = TypeVar("T")
Part = Callable[[Output, str, T], Mapping[str, Any]]
Made = tuple[Rows, Mapping[str, Any]]
Place = tuple[str, HealpixPixel]  # a catalog and its partition
_LIKE_KEYS = re.compile(r"(id|ids|key|name|designation|index)$", re.IGNORECASE)


@dataclass(frozen=True)
class Role:
    """An input by what it is to a stage; ``output``: a directory that another stage made.

    With ``many`` inputs are named ``<name>.<...>``, such as ``model.boosted``.
    """

    name: str
    text: str  # for help
    kind: Literal["catalog", "output"] = "catalog"
    optional: bool = False
    many: bool = False


class Stage(Generic[S]):
    """One stage on its inputs.

    Parameters
    ----------
    inputs : mapping of str to Catalog, Path or str
        By role; of a role with ``many`` by ``<role>.<name>``. Catalogs are opened or given by path.
    settings : Settings, optional
        Default: those of the stage.
    product : str
        Name of what is made; default: that of the directory.
    known : mapping of str to str, optional
        Fingerprints of the inputs where the caller has them.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    Settings: ClassVar[type[Settings]] = Settings
    roles: ClassVar[tuple[Role, ...]] = ()
    memory: ClassVar[tuple[int, float]] = (230, 6.0)
    """MiB of a worker's process, and its peak beside that in bytes of its partition (measured)."""
    partitioned: ClassVar[str] = ""
    """Role of the catalog whose partitions are the parts: its largest must fit into a worker."""

    def __init__(
        self,
        inputs: Mapping[str, Catalog | Path | str],
        settings: S | None = None,
        *,
        product: str = "",
        known: Mapping[str, str] | None = None,
    ) -> None:
        self.known = dict(known or {})
        self.settings: S = self.Settings() if settings is None else settings  # type: ignore[assignment]
        self.product = product
        self.inputs: dict[str, Catalog | Path] = {}
        for name, given in inputs.items():
            kind = self.role_of(name).kind
            if isinstance(given, str | Path):
                given = Catalog.open(given) if kind == "catalog" else as_path(given)
            self.inputs[name] = given
        for role in self.roles:
            if not role.optional and not self.named(role.name):
                raise ConfigError(f"{self.name}: the input '{role.name}' is missing: {role.text}")

    def __getstate__(self) -> dict[str, Any]:
        # A catalog is opened where it is used: nothing may be raised while a task is unpickled.
        light = {
            name: one.__reduce__() if isinstance(one, Catalog) else one
            for name, one in self.inputs.items()
        }
        return {**self.__dict__, "inputs": light}

    @classmethod
    def role_of(cls, name: str) -> Role:
        """Role that an input of this name has."""
        for role in cls.roles:
            if name == role.name or (role.many and name.startswith(f"{role.name}.")):
                return role
        raise ConfigError(f"{cls.name} has no input '{name}'")

    def named(self, role: str) -> list[str]:
        """Names of the inputs of a role in their order: one or none, unless it takes many."""
        return [name for name in self.inputs if name == role or name.startswith(f"{role}.")]

    def many(self, role: str) -> list[str]:
        """Names of the many inputs of a role, each without that of the role, sorted."""
        return sorted(name.removeprefix(f"{role}.") for name in self.named(role))

    def catalog(self, name: str) -> Catalog:
        """Catalog that is an input."""
        found: Any = self.inputs[name]
        catalog: Catalog = found[0](*found[1]) if isinstance(found, tuple) else found
        return catalog

    def path(self, name: str) -> Path:
        """Directory of an input."""
        found = self.inputs[name]
        return found if isinstance(found, Path) else self.catalog(name).path

    def files(self, name: str) -> Path:
        """Directory on this machine with the files of an input, but for partitions."""
        return local_copy(self.path(name))

    def manifest(self, name: str) -> Manifest:
        """Manifest of an input that another stage made."""
        return Manifest.load(self.path(name))

    @classmethod
    def recipe(cls, settings: S, fingerprints: Mapping[str, str]) -> Recipe:
        """Recipe for inputs of these fingerprints, which need not exist yet."""
        return Recipe(cls.name, cls.version, {"settings": settings.as_json}, dict(fingerprints))

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the inputs by name."""
        return self.known or {name: fingerprint_of(one) for name, one in self.inputs.items()}

    def check(self) -> None:
        """Refuse inputs that do not fit, before anything is written."""

    def held_bytes(self) -> int:
        """Bytes that a worker holds beside its partition, such as a model."""
        return 0

    def make(self, run: Run) -> Made | None:
        """Make all of the output but its manifest; give the account of rows and a summary.

        None while parts of other processes are missing.
        """
        raise NotImplementedError

    def run(self, directory: str | Path, **options: Any) -> Manifest:
        """Make the output, or finish it: `attempt` where no other process makes parts of it."""
        made = self.attempt(directory, **options)
        if made is None:
            raise StorageError(
                f"{directory}: parts of other processes are missing",
                "Run the other parts, too; `attempt` is for one of several processes.",
            )
        return made

    def attempt(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        cluster: Cluster | None = None,
        report: Report = silent,
    ) -> Manifest | None:
        """Make the output, or finish it; a complete one is left alone.

        With ``overwrite`` another output in the directory is replaced; without a cluster tasks run
        in this process. None while parts are missing that other processes make.
        """
        directory = as_path(directory)
        self.product = self.product or directory.name
        if cluster is not None and cluster.client is not None:
            # Workers may be in another folder. A catalog travels by an absolute path as it is.
            directory = directory.absolute()
            self.inputs = {
                x: one.absolute() if isinstance(one, Path) else one
                for x, one in self.inputs.items()
            }
        self.check()
        recipe = self.recipe(self.settings, self.fingerprints())
        output = Output.prepare(directory, recipe, overwrite, map(self.path, self.inputs))
        made_before = output.complete
        if not made_before:
            run = Run(output, cluster or Cluster(), report)
            try:
                run.cluster.prepare(
                    partial(_see, output, [self.path(x).absolute() for x in self.inputs])
                )
                if self.partitioned:
                    self.require_partition(run.cluster, self.catalog(self.partitioned))
                made = self.make(run)
                if made is not None:
                    output.commit(made[0], tuple(run.files), made[1])
            except Exception as error:
                if not output.complete:
                    if isinstance(error, SurveyError):  # what was made of refused files is useless
                        output.discard()
                    output.release()
                    raise
                output.tidy()
        # Another process may have completed it meanwhile.
        return Manifest.checked(directory) if output.complete else None

    def require_partition(self, cluster: Cluster, catalog: Catalog) -> None:
        """Raise `ClusterError` where the largest partition of a catalog does not fit a worker."""
        if catalog.pixels and cluster.memory_limit_bytes is not None:
            pixel, n_bytes = catalog.largest_partition()
            n_rows = catalog.partition_rows(pixel)
            self._require(cluster, f"{pixel} of {catalog.path} ({n_rows:,} rows)", n_bytes)

    def require_pixel(
        self,
        cluster: Cluster,
        pixels: Sequence[HealpixPixel],
        histogram: NDArray[np.int64],
        n_bytes: int,
    ) -> None:
        """Raise `ClusterError` where the largest partition that is planned will not fit a worker.

        ``histogram`` has the rows of every cell of the sky, which take ``n_bytes`` in memory.
        """
        shift = 2 * MAX_ORDER - (len(histogram) // 12).bit_length() + 1
        rows = [int(histogram[one.first >> shift : one.stop >> shift].sum()) for one in pixels]
        if rows:
            most = int(np.argmax(rows))
            what = f"{pixels[most]} of {self.product} ({rows[most]:,} rows)"
            self._require(cluster, what, n_bytes * rows[most] // max(sum(rows), 1))

    def _require(self, cluster: Cluster, partition: str, n_bytes: int) -> None:
        """Refuse a partition of so many bytes in memory that does not fit into a worker."""
        mib, copies = self.memory
        needed = int((mib << 20) + copies * n_bytes) + self.held_bytes()
        cluster.require_memory(needed, f"{self.name}: partition {partition}")


@dataclass(frozen=True)
class Run:
    """One run of a stage: where it writes, where its parts run, and what it has written."""

    output: Output
    cluster: Cluster
    report: Report
    files: list[FileRecord] = field(default_factory=list)

    def parts(
        self, kind: str, items: Mapping[str, T], part: Part[T], step: str = ""
    ) -> list[dict[str, Any]]:
        """Run a part for each item that has no sound record; give all records in their order.

        Items come by the key of their record, which is in the folder ``kind``; a part is a function
        or method ``(output, key, item) -> record``, importable by its name; ``step`` names it for
        progress (default: the stage). Raises `StorageError` where a record is missing: it was
        removed meanwhile, or the workers run another version.
        """
        step = step or self.output.recipe.stage
        where = self.output.directory
        made = at_once(where, partial(self.output.intact, kind), items)
        missing = [
            (self.output, kind, key, item, part)
            for (key, item), is_made in zip(items.items(), made, strict=True)
            if not is_made
        ]
        if missing:
            self.cluster.run(_do, missing, step, self.report)
        else:
            self.report(step, len(items), len(items))
        found = []
        records = at_once(where, partial(self.output.get_record, kind), items)
        for key, record in zip(items, records, strict=True):
            if record is None:
                raise StorageError(
                    f"{self.output.work}: the record '{kind}/{key}' of a finished part is missing",
                    "Run again; driver and workers must run the same version.",
                )
            found.append(record)
        return found

    def write(self, name: str, table: pa.Table) -> None:
        """Write a table of the output."""
        self.files.append(self.output.write_file(name, partial(write_parquet, table)))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write another file of the output."""
        self.files.append(self.output.write_bytes(name, content))

    def write_catalog(
        self,
        name: str,
        pixels: Sequence[HealpixPixel],
        records: Sequence[Mapping[str, Any]],
        schema: pa.Schema,
        properties: Mapping[str, str] | None = None,
        catalog_type: str = "object",
    ) -> int:
        """Write the catalog's own files; partitions without rows are left out. Returns its rows.

        Of each pixel there is a record, in which ``file`` is what `partition_record` returned.
        """
        files = {
            pixel: FileRecord(**record["file"])
            for pixel, record in zip(pixels, records, strict=True)
            if record["file"] is not None
        }
        n_rows = sum(file.rows for file in files.values())
        about = name, list(files), schema, n_rows
        self.files.extend(files.values())
        self.files.extend(
            write_catalog_metadata(self.output, *about, catalog_type=catalog_type, extra=properties)
        )
        return n_rows


def _do(task: tuple[Output, str, str, T, Part[T]]) -> None:
    output, kind, key, item, part = task
    output.put_record(kind, key, part(output, key, item))


def _see(output: Output, inputs: Sequence[Path]) -> None:
    """Raise `StorageError` where this worker does not see what the driver sees."""
    if not output.claimed:
        raise StorageError(f"does not see what this process has written into {output.work}")
    for path in inputs:
        if not path.exists():
            raise StorageError(f"does not see {path}")


def fingerprint_of(given: Catalog | Path) -> str:
    """Fingerprint of an input."""
    return given.fingerprint if isinstance(given, Catalog) else Manifest.load(given).fingerprint


def by_pixel(pixels: Sequence[HealpixPixel]) -> dict[str, HealpixPixel]:
    """Partitions by the key of their record."""
    return {f"{pixel.order}-{pixel.pixel}": pixel for pixel in pixels}


def places(catalogs: Mapping[str, Catalog]) -> dict[str, Place]:
    """Partitions of several catalogs by the key of their record, each with its catalog's name."""
    return {
        f"{name}-{key}": (name, pixel)
        for name, catalog in catalogs.items()
        for key, pixel in by_pixel(catalog.pixels).items()
    }


def partition_record(output: Output, pixel: HealpixPixel, table: pa.Table) -> dict[str, Any] | None:
    """Write a partition, unless it has no rows; its record for `Run.write_catalog`."""
    return asdict(write_partition(output, pixel, table)) if table.num_rows else None


@lru_cache(maxsize=4)
def loaded(load: Callable[[Path], Any], directory: Path, key: str) -> Any:
    """Read what is in a directory once in a process; with another key it may hold another one."""
    return load(directory)


# -- catalogs that are matched --------------------------------------------------------------------


def require_whole(catalog: Catalog, names: Iterable[str]) -> None:
    """Raise `CatalogError` where ids, which are to be compared, have lost their last digits."""
    for name in catalog.columns(names):
        if pa.types.is_floating(catalog.schema.field(name).type):
            raise CatalogError(
                f"{catalog.path}: column '{name}' is stored as float: digits are lost of its ids",
                "Make the catalog again with integer or text ids, or match by position alone: "
                "--no-gaia-id or --by position.",
            )


def key_column(catalog: Catalog) -> str:
    """Find the key of a catalog: ``star_id`` or ``obs_id``, whichever it has."""
    if known := catalog.columns(KEYS):
        return known[0]
    able = [
        item.name
        for item in catalog.schema
        if item.name != HEALPIX_COLUMN
        and (pa.types.is_integer(item.type) or pa.types.is_string(item.type))
    ]
    named = " or --key ".join([name for name in able if _LIKE_KEYS.search(name)] or able)
    hint = f"Give the column that names each row, for example --key {named}."
    none = "It has no column of integers or text that could name its rows."
    raise CatalogError(f"{catalog.path} has neither star_id nor obs_id", hint if able else none)


def motion_of(catalog: Catalog) -> Motion:
    """Bound proper motion and epoch over a whole catalog, from the footers of its files.

    Raises `CatalogError` where epochs are not Julian years: foreign catalogs may have days.
    """
    known = catalog.bounds(*MOTION)
    low, high = known.get("position_epoch", (np.nan, np.nan))
    if low < YEARS[0] or high > YEARS[1]:
        raise CatalogError(
            f"{catalog.path}: column 'position_epoch' has values from {low:g} to {high:g}, and "
            f"Julian years are needed ({YEARS[0]:g} to {YEARS[1]:g})",
            "Convert it, or rename it: rows without an epoch are matched where they stand.",
        )
    pmra, pmdec = (max(map(abs, known.get(name, (0.0, 0.0)))) for name in ("pmra", "pmdec"))
    moving = {"pmra", "pmdec"} <= set(catalog.schema.names)
    return Motion(float(np.hypot(pmra, pmdec)) if moving else 0.0, low, high)

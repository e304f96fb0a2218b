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
from sos_dask.storage.manifest import FileRecord, Manifest, Recipe, Rows, local_copy, sha256_of
from sos_dask.storage.objects import as_path, at_once
from sos_dask.storage.parts import Former, Reads, traced

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
    reusable: ClassVar[tuple[str, ...]] = ()
    """Kinds of parts that depend on settings, `state` and what they read of catalogs alone."""

    def __init__(
        self,
        inputs: Mapping[str, Catalog | Path | str],
        settings: S | None = None,
        *,
        product: str = "",
        known: Mapping[str, str] | None = None,
    ) -> None:
        self.known = dict(known or {})
        self.counted: dict[str, int] = {}
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

    @property
    def catalogs(self) -> dict[str, Catalog]:
        """Catalogs that are inputs, by name."""
        return {n: self.catalog(n) for n in self.inputs if self.role_of(n).kind == "catalog"}

    def stated(self, reads: Reads) -> dict[str, Any] | None:
        """Name what was read by inputs and the SHA-256 of files; None for those of others."""
        known = {one.path: (name, one) for name, one in self.catalogs.items() if one.manifest}
        if not reads.files.keys() <= known.keys():
            return None
        files, empty = {}, {}
        for path, seen in reads.files.items():
            name, catalog = known[path]
            files[name] = {file: catalog.stated[file].sha256 for file in sorted(seen)}
            empty[name] = sorted(reads.empty.get(path, ()))
        return {"files": files, "empty": empty}

    def base(self) -> str:
        """Digest all that decides reusable parts but for what they read."""
        schemas = {name: str(one.schema) for name, one in self.catalogs.items()}
        recipe = self.recipe(self.settings, {})
        return sha256_of([vars(recipe), repr(self.state()), schemas, pa.__version__])

    def would_read(self, reads: Mapping[str, Any]) -> bool:
        """Check whether a part would read just what another one has read (see `stated`)."""
        catalogs = self.catalogs
        for name, files in reads["files"].items():
            stated = catalogs[name].stated
            if any(x not in stated or stated[x].sha256 != files[x] for x in files):
                return False
        return not any(catalogs[x].overlapping(some) for x, some in reads["empty"].items())

    def state(self) -> Any:
        """Tell what reusable parts depend on beside settings and rows; its text is compared."""
        return None

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
        former: Former | None = None,
    ) -> Manifest | None:
        """Make the output, or finish it; a complete one is left alone.

        With ``overwrite`` another output in the directory is replaced; without a cluster tasks run
        in this process. Parts of a ``former`` output that would be the same are taken over. None
        while parts are missing that other processes make.
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
            run = Run(output, cluster or Cluster(), report, self, former)
            try:
                run.cluster.prepare(
                    partial(_see, output, [self.path(x).absolute() for x in self.inputs])
                )
                if self.partitioned:
                    self.require_partition(run.cluster, self.catalog(self.partitioned))
                made = self.make(run)
                if made is not None:
                    if former is not None and self.reusable:
                        former.remember(output, self.base(), self.reusable, run.files)
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
    """One run of a stage: where it writes, where its parts run, what it has written and reuses."""

    output: Output
    cluster: Cluster
    report: Report
    stage: Stage[Any] | None = None
    former: Former | None = None
    files: list[FileRecord] = field(default_factory=list)

    def parts(
        self,
        kind: str,
        items: Mapping[str, T],
        part: Part[T],
        step: str = "",
        content: Part[T] | None = None,
    ) -> list[dict[str, Any]]:
        """Run a part for each item that has no sound record; give all records in their order.

        Items come by the key of their record, which is in the folder ``kind``; a part is a function
        or method ``(output, key, item) -> record``, importable by its name; ``step`` names it for
        progress (default: the stage). ``content``: a part that gives a digest, as ``content``, of
        what a reusable part is made of beside catalogs; the record of that has it, too. Raises
        `StorageError` where a record is missing: it was removed meanwhile, or the workers run
        another version.
        """
        step = step or self.output.recipe.stage
        where = self.output.directory
        made = at_once(where, partial(self.output.intact, kind), items)
        known = dict(zip(items, made, strict=True))
        missing = {key: item for key, item in items.items() if not known[key]}
        if missing and self.former and self.stage and kind in self.stage.reusable:
            taken = self._taken(self.former, self.stage, kind, missing, content, step)
            missing = {key: item for key, item in missing.items() if key not in taken}
            for what, n in (("run", len(missing)), ("taken", len(taken))):
                self.stage.counted[what] = self.stage.counted.get(what, 0) + n
        if missing:
            tasks = [(self.output, kind, key, item, part) for key, item in missing.items()]
            self.cluster.run(_do, tasks, step, self.report)
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

    def _taken(
        self,
        former: Former,
        stage: Stage[Any],
        kind: str,
        items: Mapping[str, T],
        content: Part[T] | None,
        step: str,
    ) -> set[str]:
        """Take over the parts of a former output that would be the same; their keys."""
        known, prefix = former.parts(stage.base()), f"{kind}/"
        known = {key: known[prefix + key] for key in items if prefix + key in known}
        known = {key: one for key, one in known.items() if stage.would_read(one["reads"])}
        if content is not None and known:
            again = {key: items[key] for key in known}
            found = self.parts(f"{kind}-content", again, content, f"{step}: compare")
            now = {key: one["content"] for key, one in zip(again, found, strict=True)}
            known = {k: one for k, one in known.items() if one["value"]["content"] == now[k]}
        tasks = [(former, self.output, prefix + key, one) for key, one in known.items()]
        done = self.cluster.run(_take, tasks, f"{step}: take over", self.report) if tasks else []
        return {key for key, taken in zip(known, done, strict=True) if taken}

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
    stage, reads = getattr(part, "__self__", None), None
    if not isinstance(stage, Stage) or kind not in stage.reusable:
        value = part(output, key, item)
    else:
        with traced() as seen:
            value = part(output, key, item)
        reads = stage.stated(seen)
    output.put_record(kind, key, value, reads)


def _take(task: tuple[Former, Output, str, Mapping[str, Any]]) -> bool:
    former, output, part, known = task
    return former.take(output, part, known)


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

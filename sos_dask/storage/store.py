"""A store on disk: builds, what they use, what is unfinished, what can go; checks of outputs.

Layout (``<store>``)::

    artifacts/<stage>/<fingerprint>/     one output each, complete when it has a manifest
    builds/<utc>/<product>               links to artifacts, and build.json
    current                              link to the latest build, swapped atomically

Objects have no links: ``build.json`` names the products, ``current`` contains the build's name.
    digests.json  costs.json             memory of hashed survey files, and of what outputs took
    parts/  logs/  lock.json             memory of parts of outputs; logs of runs; who works here
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sos_dask import __version__
from sos_dask.columns import key_hashes
from sos_dask.errors import CatalogError, ConfigError, PartitionError, SosError, StorageError
from sos_dask.schema import HEALPIX_COLUMN, KEYS
from sos_dask.settings import is_product
from sos_dask.sky.healpix import HealpixPixel, ang2pix
from sos_dask.storage import hats, parts
from sos_dask.storage.artifact import REJECTED, partition_errors, storage_errors, write_text
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.hats import COLLECTION
from sos_dask.storage.manifest import (
    MANIFEST,
    WORK,
    Check,
    Manifest,
    Recipe,
    Rows,
    files_below,
    read_sealed,
    sealed_json,
    sha256_of_file,
    stored_at,
)
from sos_dask.storage.objects import ObjectPath, as_path, followed, local, remove_tree

logger = logging.getLogger(__name__)
BUILD_FILE = "build.json"
_COSTS = "costs.json"
_TIMES = 20  # that others may be first to let ``current`` name their build
DIGESTS_FILE = "digests.json"
_MARGIN = "margin"
# Input whose rows a stage takes: the first of these roles that its recipe has.
ROW_INPUTS = ("observations", "catalog", "target", "target.0", "pairs")


@dataclass(frozen=True)
class StageResult:
    """What became of one stage; ``parts`` that were ``run`` and ``taken`` over, where it ran."""

    product: str
    stage: str
    ran: bool
    why: str
    path: str
    rows: Rows
    summary: Mapping[str, Any]
    parts: Mapping[str, int] = field(default_factory=dict)


def home(stage: str, directory: Path) -> Path:
    """Where the manifest of an output is: a margin catalog lies inside its collection."""
    return directory / _MARGIN if stage == _MARGIN else directory


def result_of(product: str, stage: str, directory: Path, ran: bool, why: str) -> StageResult:
    """Describe a finished stage by its manifest."""
    made = Manifest.load(home(stage, directory))
    return StageResult(product, stage, ran, why, str(directory), made.rows, made.summary)


def check_product(product: str, stage: str, directory: Path, by: Check) -> None:
    """Compare the files of a product, by SHA-256 or size, with its manifest.

    Raises `CatalogError` where a file is missing or not the one written: it is not published.
    """
    try:
        manifest = Manifest.checked(home(stage, directory), by)
        if stage == _MARGIN and not _is_stated(directory / COLLECTION, manifest):
            raise CatalogError(f"{directory / COLLECTION} is not the file that was written")
    except (CatalogError, OSError) as error:
        hint = f"Remove {directory} and run the rebuild again: it is made anew."
        what = f"product '{product}' is not published: {_said(error)}"
        raise CatalogError(what, hint) from None


def _is_stated(collection: Path, margin: Manifest) -> bool:
    return bool(margin.summary.get("collection_sha256") == sha256_of_file(collection))


def _said(error: Exception) -> str:
    return error.message if isinstance(error, SosError) else str(error)


# -- builds ---------------------------------------------------------------------------------------


def publish(
    store: Path,
    job: str,
    job_text: str,
    products: Mapping[str, tuple[Recipe, Path]],
    refused: Sequence[str] = (),
) -> Path:
    """Link the products into a new build and let ``current`` name it; an equal build is kept.

    ``products`` are recipe and directory of each, in the order of the plan. With reasons why it is
    refused the build is made, and ``current`` stays.
    """
    for product in products:
        if not is_product(product):
            raise CatalogError(f"a product cannot be named '{product}'")
    fingerprints = {product: recipe.fingerprint for product, (recipe, _) in products.items()}
    current = store / "current"
    known = published(store)
    if known == fingerprints:
        return current.resolve()
    if not known and (current / BUILD_FILE).exists():
        logger.warning("%s is damaged: a new build is made", current / BUILD_FILE)
    now = datetime.datetime.now(datetime.UTC)
    build = store / "builds" / now.strftime("%Y%m%dT%H%M%S.%fZ")
    with storage_errors(build):
        if not isinstance(build, ObjectPath):
            build.mkdir(parents=True)
            for product, (_, directory) in products.items():
                target = os.path.relpath(directory, build)
                (build / product).symlink_to(target, target_is_directory=True)
        document = {
            "job": job,
            "job_file": job_text,
            "products": fingerprints,
            "stages": {product: recipe.stage for product, (recipe, _) in products.items()},
            "sos_dask": __version__,
            "utc": now.isoformat(timespec="seconds"),
            **({"refused": list(refused)} if refused else {}),
        }
        write_text(build / BUILD_FILE, sealed_json(document, sort_keys=False))
    return build if refused else make_current(store, build)


def make_current(store: Path, build: Path) -> Path:
    """Let ``current`` name a build of the store, by one atomic swap; the build that it names."""
    current = store / "current"
    if isinstance(current, ObjectPath):
        return _put_current(current, build, read_build(build)["products"])
    swap = store / f".current.{uuid.uuid4().hex}"
    with storage_errors(swap):
        swap.symlink_to(f"builds/{build.name}", target_is_directory=True)
        swap.replace(current)
    return build


def _put_current(current: ObjectPath, build: Path, fingerprints: Mapping[str, str]) -> Path:
    """Let ``current`` name a build, unless an equal one beside this run was first."""
    for _ in range(_TIMES):
        mode: Any = "create"
        with contextlib.suppress(FileNotFoundError):
            mode = {"e_tag": current.stat().e_tag}
            if published(current.parent) == fingerprints:
                first = current.resolve()
                if first != build:  # else the answer to our own put was lost
                    remove_tree(build)
                return first
        if current.put(f"builds/{build.name}\n".encode(), mode):
            return build
    raise StorageError(f"{current} changes all the time", "Let one rebuild run at a time.")


def read_build(path: Path) -> dict[str, Any]:
    """Read ``build.json`` of a build; `CatalogError` where it is damaged, or a link is another."""
    try:
        build = read_sealed(path.resolve() / BUILD_FILE, "")
        products, stages = build["products"], build["stages"]
        if not all(map(is_product, products)) or list(stages) != list(products):
            raise CatalogError("its products have impossible names")
        for product, fingerprint in products.items():
            link = path / product
            known = isinstance(link, ObjectPath) or link.is_dir()
            if link.is_symlink():
                known = link.readlink().name == fingerprint
            if not known:
                raise CatalogError(f"{product} is not the link to artifact {fingerprint[:12]}")
        return build
    except (CatalogError, OSError, KeyError, TypeError, AttributeError) as error:
        again = "Run the rebuild again: a new build is made."
        raise CatalogError(f"{path} is not a build: {_said(error)}", again) from None


def published(store: Path) -> dict[str, str]:
    """Fingerprints of the products of the latest build; empty without a readable one."""
    with contextlib.suppress(CatalogError):
        return dict(read_build(store / "current")["products"])
    return {}


def current_recipes(store: Path) -> dict[str, Recipe]:
    """Recipes of the products of the latest build; empty without one."""
    recipes = {}
    for product in published(store):
        directory = (store / "current" / product).resolve()
        with contextlib.suppress(CatalogError):
            recipes[product] = Manifest.load(home(directory.parent.name, directory)).recipe
    return recipes


def current_product(store: Path, kind: str) -> Path:
    """Find the directory of a product of the current build, such as ``lamost.coverage``.

    Raises `CatalogError` where none has this name, or these last parts of it.
    """
    require_store(store)
    products = [str(name) for name in read_build(store / "current")["products"]]
    for name in products:
        if f".{name}".endswith(f".{kind}"):
            return (store / "current" / name).resolve()
    alike = [name for name in products if name.split(".")[-1] == kind.rsplit(".", maxsplit=1)[-1]]
    hint = "Its job does not ask for it, or another version made it: run the rebuild again."
    hint = f"It has: {', '.join(alike)}." if alike else hint
    raise CatalogError(f"the current build of {store} has no product '{kind}'", hint)


def outputs_of(path: Path) -> list[Path]:
    """List the products of a build, or of the current one of a store; else the path itself."""
    build = path if (path / BUILD_FILE).is_file() else followed(path / "current")
    if not (build / BUILD_FILE).is_file():
        return [path]
    return [followed(build / product) for product in read_build(build)["products"]]


# -- memories beside the artifacts, whose bytes must not depend on times --------------------------


def remember(path: Path, known: Mapping[str, Any]) -> None:
    """Write a memory of a store."""
    write_text(path, sealed_json({path.stem: known}))


def remembered(path: Path) -> dict[str, Any]:
    """Read a memory of a store; empty where there is none, or with a warning where damaged."""
    try:
        return dict(read_sealed(path, "").get(path.stem, {}))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except CatalogError as error:
        logger.warning("%s; what it remembered is measured or hashed again", error.message)
        return {}


def put_cost(store: Path, fingerprint: str, **seconds: float) -> None:
    """Remember the seconds that the run which finished an output took."""
    cost = {name: round(value, 3) for name, value in seconds.items()}
    remember(store / _COSTS, {**costs(store), fingerprint: cost})


def costs(store: Path) -> dict[str, dict[str, float]]:
    """Read the known costs of outputs (``wall_s``, ``cpu_s`` of all processes) by fingerprint."""
    return remembered(store / _COSTS)


def file_sizes(store: Path) -> dict[str, int]:
    """Bytes of the survey files that a rebuild into this store has hashed, by SHA-256."""
    known = remembered(store / DIGESTS_FILE)
    return {digest: int(key.rsplit(":", 2)[1]) for key, digest in known.items()}


def file_names(store: Path) -> dict[str, str]:
    """Names of the survey files that a rebuild into this store has hashed, by SHA-256."""
    known = remembered(store / DIGESTS_FILE)
    names = {digest: Path(key.rsplit(":", 2)[0]).name for key, digest in sorted(known.items())}
    return dict(sorted(names.items()))


# -- stores ---------------------------------------------------------------------------------------


def stores_near(place: Path) -> list[Path]:
    """Find stores beside a folder and right below it."""
    found = [*place.parent.glob("*/artifacts"), *place.glob("*/artifacts")]
    return sorted({path.parent for path in found if path.is_dir()})


def require_store(store: Path, built: bool = True) -> None:
    """Raise `CatalogError` unless a folder is a store, and has a current build if asked for."""
    if not (store / "artifacts").is_dir():
        near = [str(path) for path in stores_near(store)[:5]]
        hint = f"Stores near it: {', '.join(near)}." if near else "A rebuild makes one."
        raise CatalogError(f"no sos-dask store at '{store}'; give --store or a job file", hint)
    if built and not (store / "current").exists():
        raise CatalogError(f"{store} has no current build", "Run a rebuild first.")


@dataclass(frozen=True)
class StoreStatus:
    """Content of a store; ``missing``: products of the build that are gone, or damaged."""

    store: Path
    current: str
    builds: tuple[str, ...]
    products: tuple[StageResult, ...]
    missing: tuple[str, ...]
    unfinished: tuple[str, ...]
    unused_bytes: int
    bytes: int


def status(store: Path) -> StoreStatus:
    """Read the latest build of a store, its products, unfinished outputs and bytes."""
    require_store(store, built=False)
    products, missing = [], []
    current = store / "current"
    for product, stage in read_build(current)["stages"].items() if current.exists() else ():
        directory = (current / product).resolve()
        try:
            products.append(result_of(product, stage, directory, False, "published"))
        except CatalogError as error:
            missing.append(f"{product}: {error.message}")
    used = _used_artifacts(store, _kept_builds(store))
    sizes = {path: _size(path) for path in _artifacts(store)}
    unfinished = (p for p in sizes if not (home(p.parent.name, p) / MANIFEST).is_file())
    return StoreStatus(
        store,
        current.resolve().name if current.exists() else "",
        tuple(path.name for path in builds_in(store)),
        tuple(products),
        tuple(missing),
        tuple(str(path.relative_to(store)) for path in unfinished),
        sum(size for path, size in sizes.items() if path not in used),
        sum(sizes.values()),
    )


def gc(store: Path, *, keep: int = 3, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove old builds and every output that no kept build uses, unfinished ones too.

    ``keep`` of the latest builds stay, at least 1, and the latest that was refused: the current one
    always does. Returns what was (with ``dry_run``: would be) removed, with its bytes.

    Raises `CatalogError` where a build appears meanwhile: what it needs may be among what goes.
    """
    if keep < 1:
        raise ConfigError(f"{keep} builds cannot be kept: the current one always stays")
    require_store(store, built=False)
    known = set(builds_in(store))
    kept = _kept_builds(store, keep)
    for build in kept:
        read_build(build)  # what a damaged one needs is not known
    used = _used_artifacts(store, kept)
    doomed = [path for path in builds_in(store) if path not in kept]
    doomed += [path for path in _artifacts(store) if path not in used]
    forgotten = parts.forgotten(store, (path.name for path in used))
    removed = [(path, _size(path)) for path in [*doomed, *forgotten]]
    if not dry_run:
        for path in [*doomed, *forgotten]:
            if not known.issuperset(builds_in(store)):
                what = f"gc of {store} has stopped: a build was made meanwhile"
                raise CatalogError(what, "Run it again when no rebuild runs.")
            path.unlink() if path.is_file() else remove_tree(path, first=MANIFEST)
        names = {path.name for path in used}
        cost = costs(store)
        if not cost.keys() <= names:
            remember(store / _COSTS, {name: cost[name] for name in cost if name in names})
    return removed


def builds_in(store: Path) -> list[Path]:
    """List the builds of a store, the oldest first."""
    return sorted(path for path in (store / "builds").glob("*") if path.is_dir())


def _artifacts(store: Path) -> list[Path]:
    return sorted(path for path in (store / "artifacts").glob("*/*") if path.is_dir())


def _kept_builds(store: Path, keep: int = 0) -> set[Path]:
    """The latest builds (0: all), the latest that was refused, and the current one."""
    refused = [path for path in builds_in(store) if keep and _is_refused(path)]
    kept = {*[path for path in builds_in(store) if path not in refused][-keep:], *refused[-1:]}
    current = (store / "current").resolve()
    if current.exists() and current.parent.name == "builds":
        kept.add(store / "builds" / current.name)
    return kept


def _is_refused(build: Path) -> bool:
    with contextlib.suppress(CatalogError):
        return "refused" in read_build(build)
    return False


def _used_artifacts(store: Path, builds: set[Path]) -> set[Path]:
    root, links = store.resolve(), [link for build in builds for link in _links(build)]
    return {store / link.relative_to(root) for link in links if link.is_relative_to(root)}


def _links(build: Path) -> list[Path]:
    if not isinstance(build, ObjectPath):
        return [link.resolve() for link in build.glob("*") if link.is_symlink()]
    with contextlib.suppress(CatalogError):
        return [(build / product).resolve() for product in read_build(build)["products"]]
    return []


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if not file.is_dir())


# -- verify ---------------------------------------------------------------------------------------


def verify(path: str | Path) -> list[str]:
    """Check every invariant of an output or a catalog; an empty list says that all hold.

    Of every output: the digest of its manifest, its account of rows against its Parquet files and
    against its input in the same store, size and SHA-256 of every file, files that are not in the
    manifest. Of a catalog also: the schema of each partition, rows against properties, order of
    rows, membership of every row in its pixel, ``_healpix_29`` against ra and dec, unique keys,
    overlap of pixels.

    Gives one sentence for each thing that is wrong, naming file, pixel, column or row. Raises
    `CatalogError` where no manifest can be read, or it names a file outside of the output.
    """
    path = as_path(path)
    is_catalog = hats.properties_file(path).is_file()
    if (path / COLLECTION).is_file() and not is_catalog:
        return [*_collection_problems(path), *verify(path / hats.primary_of(path / COLLECTION))]
    problems = list(_output_problems(path)) if hats.is_ours(path) else []
    try:
        if is_catalog:
            catalog = Catalog.read_only(path)
            problems.extend(_row_problems(catalog))
            problems.extend(catalog.problems())
    except SosError as error:
        problems.append(error.message)
    return problems


def _collection_problems(path: Path) -> Iterator[str]:
    """Problems of the margins that lie beside a primary catalog."""
    names = hats.read_properties(path / COLLECTION).get("all_margins", "").split()
    ours = [_MARGIN] if (path / _MARGIN).is_dir() else []  # whatever the file says
    for name in dict.fromkeys([*names, *ours]):
        margin = path / name
        if ".." in margin.parts or not margin.is_dir():
            yield f"margin '{name}' is missing"
            continue
        yield from (f"{name}: {problem}" for problem in verify(margin))
        if hats.is_ours(margin) and not _is_stated(path / COLLECTION, Manifest.load(margin)):
            yield f"{COLLECTION} was changed: its SHA-256 is not that of {name}"


def _output_problems(root: Path) -> Iterator[str]:
    """Problems of the files of an output and of its account of rows."""
    manifest, whole = Manifest.load(root), root.resolve()
    for record, found in manifest.files_in(root):
        file = as_path(found)
        if not isinstance(file, ObjectPath) and not file.resolve().is_relative_to(whole):
            yield f"{record.path} is a link out of the output"
        elif problem := record.problem(found):
            yield problem
        elif record.path.endswith(".parquet"):
            with partition_errors(file):
                n_rows = pq.read_metadata(local(file)).num_rows
            if n_rows != record.rows:
                yield f"{record.path} has {n_rows} rows, the manifest says {record.rows}"
    names = {file.relative_to(root).as_posix() for file in files_below(root)}
    stated = {stored_at(root, manifest.recipe, record) for record in manifest.files}
    for name in sorted(names - {MANIFEST, *(str(one.relative_to(root)) for one in stated)}):
        if not name.startswith(f"{WORK}/"):
            yield f"{name} is not in the manifest"
    yield from _account_problems(root, manifest)


def _account_problems(root: Path, manifest: Manifest) -> Iterator[str]:
    """Problems of the account of rows by itself, by its files, and by its input."""
    rows, stage, inputs = manifest.rows, manifest.recipe.stage, manifest.recipe.inputs
    try:
        rows.check(f"stage {stage}")
    except CatalogError as error:
        yield error.message
    of = {record.path: record.rows for record in manifest.files}
    n_rejected = of.get(REJECTED, 0)
    if stage == "ingest" and n_rejected != rows.rejected:
        yield f"the account has {rows.rejected} rejected, {REJECTED} {n_rejected}"
    roles = [role for role in ROW_INPUTS if role in inputs][:1]
    if stage in ("reference", "report"):  # all surveys; no rows at all
        roles = list(inputs) if stage == "reference" else []
    store = next((p for p in root.resolve().parents if p.name == "artifacts"), None)
    if store is not None and roles:
        found = [next(store.glob(f"*/{escape(str(inputs[role]))}"), None) for role in roles]
        there = [path for path in found if path is not None and (path / MANIFEST).is_file()]
        n_in = sum(Manifest.load(path).rows.n_out for path in there)
        if len(there) == len(roles) and n_in != rows.n_in:
            yield f"the account has {rows.n_in} rows in, {', '.join(roles)} have {n_in}"


def _row_problems(catalog: Catalog) -> Iterator[str]:
    """Problems of the rows of all partitions; files that differ from the manifest are read, too."""
    unchecked, keys = replace(catalog, manifest=None), [np.empty(0, dtype=np.uint64)]
    for pixel in catalog.pixels:
        try:
            table = unchecked.read(pixel)
            for problem in _partition_problems(catalog, pixel, table):
                yield f"pixel {pixel}: {problem}"
            key = next((name for name in KEYS if name in table.schema.names), "")
            if key and table[key].null_count:
                yield f"pixel {pixel}: {table[key].null_count} rows have no {key}"
            elif key:
                keys.append(key_hashes(table[key]))
        except PartitionError as error:
            yield f"pixel {pixel}: {error.message}"
        except (ValueError, TypeError, KeyError, AttributeError, pa.ArrowException) as error:
            # A damaged footer can make any type of any column.
            yield f"pixel {pixel}: its rows cannot be checked: {error!r}"
    hashes = np.sort(np.concatenate(keys))
    n_repeated = int(np.count_nonzero(hashes[1:] == hashes[:-1]))
    if n_repeated and not _is_margin(catalog):
        yield f"{n_repeated} keys occur more than once in the catalog"


def _is_margin(catalog: Catalog) -> bool:
    return catalog.properties.get("dataproduct_type") == "margin"


def _partition_problems(catalog: Catalog, pixel: HealpixPixel, table: pa.Table) -> Iterator[str]:
    """Problems of the rows of a partition."""
    if not table.schema.remove_metadata().equals(catalog.schema, check_metadata=False):
        yield "its schema is not the catalog's"
    if HEALPIX_COLUMN not in table.schema.names:
        yield f"no column {HEALPIX_COLUMN}"
        return
    cells = table[HEALPIX_COLUMN].to_numpy()
    outside = np.flatnonzero((cells < pixel.first) | (cells >= pixel.stop))
    if len(outside) and not _is_margin(catalog):
        yield f"{len(outside)} rows lie outside, the first is row {outside[0]}"
    falling = np.flatnonzero(np.diff(cells) < 0)
    if len(falling):
        yield f"not sorted by {HEALPIX_COLUMN} at row {falling[0] + 1}"
    names = [catalog.properties.get(f"hats_col_{name}", name) for name in ("ra", "dec")]
    if set(names) <= set(table.schema.names):  # a catalog that adds columns has none of its own
        ra, dec = (table[name] for name in names)
        if ra.null_count or dec.null_count:
            yield "null positions"
        elif catalog.manifest is not None:
            wrong = np.flatnonzero(ang2pix(ra.to_numpy(), dec.to_numpy()) != cells)
            if len(wrong):
                yield f"{HEALPIX_COLUMN} does not fit ra and dec at row {wrong[0]}"

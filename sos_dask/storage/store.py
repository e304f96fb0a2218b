"""A store on disk: builds, what they use, what is unfinished, what can go; checks of outputs.

Layout (``<store>``)::

    artifacts/<stage>/<fingerprint>/     one output each, complete when it has a manifest
    builds/<utc>/<product>               links to artifacts, and build.json
    current                              link to the latest build, swapped atomically
    digests.json  costs.json             memory of hashed survey files, and of what outputs took
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask import __version__
from sos_dask.columns import key_hashes
from sos_dask.errors import CatalogError, ConfigError, PartitionError, SosError
from sos_dask.run.machine import n_cores
from sos_dask.schema import HEALPIX_COLUMN, KEYS
from sos_dask.settings import is_product
from sos_dask.sky.healpix import HealpixPixel, ang2pix
from sos_dask.storage.artifact import REJECTED, partition_errors, storage_errors, write_text
from sos_dask.storage.catalog import (
    COLLECTION,
    PROPERTIES,
    Catalog,
    is_ours,
    primary_of,
    properties_file,
    read_properties,
)
from sos_dask.storage.manifest import (
    MANIFEST,
    WORK,
    Check,
    Manifest,
    Recipe,
    read_sealed,
    sealed_json,
    sha256_of_file,
)

logger = logging.getLogger(__name__)
BUILD_FILE = "build.json"
COSTS = "costs.json"
DIGESTS_FILE = "digests.json"
_MARGIN = "margin"
# Input whose rows a stage takes: the first of these roles that its recipe has.
_ROW_INPUTS = ("observations", "catalog", "target", "target.0", "pairs")


@dataclass(frozen=True)
class StageResult:
    """What became of one stage."""

    product: str
    stage: str
    ran: bool
    why: str
    rows_in: int
    rows_out: int
    rejected: int
    dropped: Mapping[str, int]
    added: Mapping[str, int]
    path: str
    summary: Mapping[str, Any] = field(default_factory=dict)


def home(stage: str, directory: Path) -> Path:
    """Where the manifest of an output is: a margin catalog lies inside its collection."""
    return directory / "margin" if stage == "margin" else directory


def result_of(product: str, stage: str, directory: Path, ran: bool, why: str) -> StageResult:
    """Describe a finished stage by its manifest."""
    manifest = Manifest.load(home(stage, directory))
    rows = manifest.rows
    return StageResult(
        product,
        stage,
        ran,
        why,
        rows.n_in,
        rows.n_out,
        rows.rejected,
        dict(rows.dropped),
        dict(rows.added),
        str(directory),
        manifest.summary,
    )


def check_product(product: str, stage: str, directory: Path, by: Check) -> None:
    """Compare the files of a product, by SHA-256 or size, with its manifest.

    Raises
    ------
    CatalogError
        A file is missing or not the one that was written: the product is not published.
    """
    place = home(stage, directory)
    try:
        stated = Manifest.checked(place, by, n_cores()).summary.get("collection_sha256")
        if stage == "margin" and stated != sha256_of_file(directory / COLLECTION):
            raise CatalogError(f"{directory / COLLECTION} is not the file that was written")
    except (CatalogError, OSError) as error:
        what = error.message if isinstance(error, CatalogError) else str(error)
        raise CatalogError(
            f"product '{product}' is not published: {what}",
            f"Remove {directory} and run the rebuild again: it is made anew.",
        ) from None


def publish(
    store: Path, job: str, job_text: str, products: Mapping[str, tuple[Recipe, Path]]
) -> Path:
    """Link the products into a new build and let ``current`` name it; an equal build is kept.

    Parameters
    ----------
    job, job_text : str
        Name and text of the job.
    products : mapping of str to (Recipe, Path)
        Recipe and directory of each, in the order of the plan.
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
        }
        write_text(build / BUILD_FILE, sealed_json(document, sort_keys=False))
        swap = store / f".current.{os.getpid()}"
        swap.unlink(missing_ok=True)
        swap.symlink_to(os.path.relpath(build, store), target_is_directory=True)
        swap.replace(current)
    return build


@dataclass(frozen=True)
class Cost:
    """Seconds that the run which finished an output took, and CPU seconds of all processes."""

    wall_s: float
    cpu_s: float


def put_cost(store: Path, fingerprint: str, cost: Cost) -> None:
    """Remember a cost beside the artifacts, whose bytes must not depend on times."""
    path = store / COSTS
    known = {name: asdict(one) for name, one in costs(store).items()}
    known[fingerprint] = {name: round(value, 3) for name, value in asdict(cost).items()}
    remember(path, known)


def remember(path: Path, known: Mapping[str, Any]) -> None:
    """Write a memory of a store, beside its products."""
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


def costs(store: Path) -> dict[str, Cost]:
    """Read the known costs of outputs, by fingerprint."""
    return {name: Cost(**one) for name, one in remembered(store / COSTS).items()}


def read_build(path: Path) -> dict[str, Any]:
    """``build.json`` of a build; `CatalogError` where it is none, or a link is another."""
    try:
        build = read_sealed(path / BUILD_FILE, "")
        products, stages = build["products"], build["stages"]
        if not all(map(is_product, products)) or list(stages) != list(products):
            raise CatalogError("its products have impossible names")
        for product, fingerprint in products.items():
            link = path / product
            known = link.readlink().name == fingerprint if link.is_symlink() else link.is_dir()
            if not known:
                raise CatalogError(f"{product} is not the link to artifact {fingerprint[:12]}")
        return build
    except (CatalogError, OSError, KeyError, TypeError, AttributeError) as error:
        what = error.message if isinstance(error, CatalogError) else error
        raise CatalogError(
            f"{path} is not a build: {what}", "Run the rebuild again: a new build is made."
        ) from None


def stores_near(place: Path) -> list[Path]:
    """Find stores beside a folder and right below it."""
    found = [*place.parent.glob("*/artifacts"), *place.glob("*/artifacts")]
    return sorted({path.parent for path in found if path.is_dir()})


def require_store(store: Path, built: bool = True) -> None:
    """Raise `CatalogError` unless a folder is a store, and has a current build if asked for."""
    if not (store / "artifacts").is_dir():
        near = [str(path) for path in stores_near(store)[:5]]
        raise CatalogError(
            f"no sos-dask store at '{store}'; give --store or a job file",
            f"Stores near it: {', '.join(near)}." if near else "A rebuild makes one.",
        )
    if built and not (store / "current").exists():
        raise CatalogError(f"{store} has no current build", "Run a rebuild first.")


def current_product(store: Path, product: str) -> Path:
    """Find the directory of a product of the current build, or raise `CatalogError`."""
    require_store(store)
    current = store / "current"
    if product not in read_build(current)["products"]:
        raise CatalogError(
            f"the current build of {store} has no product '{product}'",
            "It was made by another version: run the rebuild again.",
        )
    return (current / product).resolve()


def file_names(store: Path) -> dict[str, str]:
    """Names of the survey files that a rebuild into this store has hashed, by SHA-256."""
    known = remembered(store / DIGESTS_FILE)
    names = {digest: Path(key.rsplit(":", 2)[0]).name for key, digest in sorted(known.items())}
    return dict(sorted(names.items()))


def published(store: Path) -> dict[str, str]:
    """Fingerprints of the products of the latest build; empty without a readable one."""
    try:
        return dict(read_build(store / "current")["products"])
    except (CatalogError, KeyError):
        return {}


def current_recipes(store: Path) -> dict[str, Recipe]:
    """Recipes of the products of the latest build; empty without one."""
    recipes = {}
    for product in published(store):
        directory = (store / "current" / product).resolve()
        with contextlib.suppress(CatalogError):
            recipes[product] = Manifest.load(home(directory.parent.name, directory)).recipe
    return recipes


def outputs_of(path: Path) -> list[Path]:
    """List the products of a build, or of the current one of a store; else the path itself."""
    build = path if (path / BUILD_FILE).is_file() else path / "current"
    if not (build / BUILD_FILE).is_file():
        return [path]
    return [build / product for product in read_build(build)["products"]]


@dataclass(frozen=True)
class StoreStatus:
    """What a store holds; ``missing``: products of the build that are gone, or damaged."""

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
    products, missing, name = [], [], ""
    current = store / "current"
    if current.exists():
        name = current.resolve().name
        for product, stage_name in read_build(current)["stages"].items():
            directory = (current / product).resolve()
            try:
                products.append(result_of(product, stage_name, directory, False, "published"))
            except CatalogError as error:
                missing.append(f"{product}: {error.message}")
    used = _used_artifacts(store, keep=None)
    sizes = {path: _size(path) for path in _artifacts(store)}
    return StoreStatus(
        store,
        name,
        tuple(sorted(path.name for path in (store / "builds").glob("*"))),
        tuple(products),
        tuple(missing),
        tuple(str(path.relative_to(store)) for path in sizes if _is_unfinished(path)),
        sum(size for path, size in sizes.items() if path not in used),
        sum(sizes.values()),
    )


def gc(store: Path, *, keep_builds: int = 1, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove old builds and every output that no kept build uses, unfinished ones too.

    Do not run it beside a rebuild.

    Parameters
    ----------
    store : Path
    keep_builds : int
        How many of the latest builds stay, at least 1: the current one always does.
    dry_run : bool
        Only list what would go.

    Returns
    -------
    list of (Path, int)
        What was (would be) removed, with its bytes.
    """
    if keep_builds < 1:
        raise ConfigError(f"{keep_builds} builds cannot be kept: the current one always stays")
    require_store(store, built=False)
    kept = _kept_builds(store, keep_builds)
    for build in kept:
        read_build(build)  # what a damaged one needs is not known
    used = _used_artifacts(store, keep_builds)
    doomed = [path for path in sorted((store / "builds").glob("*")) if path not in kept]
    doomed += [path for path in _artifacts(store) if path not in used]
    removed = [(path, _size(path)) for path in doomed]
    for path in () if dry_run else doomed:
        shutil.rmtree(path)
    return removed


def _artifacts(store: Path) -> list[Path]:
    return sorted(path for path in (store / "artifacts").glob("*/*") if path.is_dir())


def _is_unfinished(path: Path) -> bool:
    return not (home(path.parent.name, path) / MANIFEST).is_file()


def _kept_builds(store: Path, keep: int | None) -> set[Path]:
    builds = sorted((store / "builds").glob("*"))
    kept = set(builds if keep is None else builds[-keep:])
    current = store / "current"
    if current.exists() and current.resolve().parent.name == "builds":
        kept.add(store / "builds" / current.resolve().name)
    return kept


def _used_artifacts(store: Path, keep: int | None) -> set[Path]:
    root = store.resolve()
    links = [
        link.resolve()
        for build in _kept_builds(store, keep)
        if build.is_dir()
        for link in build.iterdir()
        if link.is_symlink()
    ]
    return {store / link.relative_to(root) for link in links if link.is_relative_to(root)}


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


# -- verify ---------------------------------------------------------------------------------------


def verify(path: str | Path) -> list[str]:
    """Check every invariant of an output or a catalog; an empty list says that all hold.

    Of every output: the digest of its manifest, its account of rows against its Parquet files and
    against its input in the same store, size and SHA-256 of every file, files that are not in the
    manifest. Of a catalog also: the schema of each partition, rows against properties, order of
    rows, membership of every row in its pixel, ``_healpix_29`` against ra and dec, unique keys,
    overlap of pixels.

    Returns
    -------
    list of str
        One sentence for each thing that is wrong, naming file, pixel, column or row.

    Raises
    ------
    CatalogError
        There is no manifest that can be read, or it names a file outside of the output.
    """
    path = Path(path)
    if (path / COLLECTION).is_file() and not properties_file(path).is_file():
        return [*_verify_collection(path), *verify(path / primary_of(path / COLLECTION))]
    if not properties_file(path).is_file():
        return _verify_output(path, Manifest.load(path))
    problems: list[str] = []
    if is_ours(path):
        problems += _verify_output(path, Manifest.load(path))
    try:
        catalog = Catalog.read_only(path)
    except SosError as error:
        return [*problems, error.message]
    problems += _verify_rows(catalog)
    try:
        catalog.check_account()
    except SosError as error:
        problems.append(error.message)
    return problems


def _verify_collection(path: Path) -> list[str]:
    """Problems of the margins that lie beside a primary catalog."""
    problems = []
    names = read_properties(path / COLLECTION).get("all_margins", "").split()
    ours = [_MARGIN] if (path / _MARGIN).is_dir() else []  # whatever the file says
    for name in dict.fromkeys([*names, *ours]):
        margin = path / name
        if ".." in margin.parts or not margin.is_dir():
            problems.append(f"margin '{name}' is missing")
            continue
        problems += [f"{name}: {problem}" for problem in verify(margin)]
        if is_ours(margin):
            stated = Manifest.load(margin).summary.get("collection_sha256")
            if stated != sha256_of_file(path / COLLECTION):
                problems.append(f"{COLLECTION} was changed: its SHA-256 is not that of {name}")
    return problems


def _verify_rows(catalog: Catalog) -> list[str]:
    """Problems of the rows of all partitions; files that differ from the manifest are read, too."""
    problems = []
    is_margin = catalog.properties.get("dataproduct_type") == "margin"
    keys: list[NDArray[np.uint64]] = []
    for pixel in catalog.pixels:
        try:
            found, key = _verify_partition(catalog, pixel, is_margin)
        except PartitionError as error:
            problems.append(f"pixel {pixel}: {error.message}")
            continue
        except (ValueError, TypeError, KeyError, AttributeError, pa.ArrowException) as error:
            # A damaged footer can make any type of any column.
            problems.append(f"pixel {pixel}: its rows cannot be checked: {error!r}")
            continue
        problems += found
        keys.append(key)
    if not is_margin and keys:
        hashes = np.sort(np.concatenate(keys))
        n_repeated = int(np.count_nonzero(hashes[1:] == hashes[:-1]))
        if n_repeated:
            problems.append(f"{n_repeated} keys occur more than once in the catalog")
    return problems


def _verify_output(root: Path, manifest: Manifest) -> list[str]:
    """Problems of the files of an output and of its account of rows."""
    problems = []
    whole = root.resolve()
    for record in manifest.files:
        file = root / record.path
        if not file.resolve().is_relative_to(whole):
            problems.append(f"{record.path} is a link out of the output")
        elif problem := record.problem(root):
            problems.append(problem)
        elif record.path.endswith(".parquet"):
            with partition_errors(file):
                n_rows = pq.read_metadata(file).num_rows
            if n_rows != record.rows:
                problems.append(f"{record.path} has {n_rows} rows, the manifest says {record.rows}")
    known = {MANIFEST, *(record.path for record in manifest.files)}
    for file in sorted(root.rglob("*")):
        name = str(file.relative_to(root))
        temporary = name.endswith(".tmp") or name.startswith(f"{WORK}/")
        if not file.is_dir() and name not in known and not temporary:
            problems.append(f"{name} is not in the manifest")
    return problems + _account_problems(root, manifest)


def _account_problems(root: Path, manifest: Manifest) -> list[str]:
    """Problems of the account of rows by itself, by its files, and by its input."""
    rows, problems = manifest.rows, []
    try:
        rows.check(f"stage {manifest.recipe.stage}")
    except CatalogError as error:
        problems.append(error.message)
    of = {record.path: record.rows for record in manifest.files}
    partitions = [record.rows for record in manifest.files if record.is_partition]
    if (partitions or PROPERTIES in of) and sum(partitions) != rows.n_out:
        problems.append(f"the account has {rows.n_out} rows out, its partitions {sum(partitions)}")
    n_rejected = of.get(REJECTED, 0)
    if manifest.recipe.stage == "ingest" and n_rejected != rows.rejected:
        problems.append(f"the account has {rows.rejected} rejected, {REJECTED} {n_rejected}")
    inputs = manifest.recipe.inputs
    roles = [role for role in _ROW_INPUTS if role in inputs][:1]
    if manifest.recipe.stage in ("reference", "report"):  # all surveys; no rows at all
        roles = list(inputs) if manifest.recipe.stage == "reference" else []
    store = next((p for p in root.resolve().parents if p.name == "artifacts"), None)
    if store is not None and roles:
        found = [next(store.glob(f"*/{escape(str(inputs[role]))}"), None) for role in roles]
        there = [path for path in found if path is not None and (path / MANIFEST).is_file()]
        n_in = sum(Manifest.load(path).rows.n_out for path in there)
        if len(there) == len(roles) and n_in != rows.n_in:
            problems.append(f"the account has {rows.n_in} rows in, {', '.join(roles)} have {n_in}")
    return problems


def _verify_partition(
    catalog: Catalog, pixel: HealpixPixel, is_margin: bool
) -> tuple[list[str], NDArray[np.uint64]]:
    where = f"pixel {pixel}"
    table = replace(catalog, manifest=None).read(pixel)
    problems = []
    if not table.schema.remove_metadata().equals(catalog.schema, check_metadata=False):
        problems.append(f"{where}: its schema is not the catalog's")
    no_key = np.empty(0, dtype=np.uint64)
    if HEALPIX_COLUMN not in table.schema.names:
        return [*problems, f"{where}: no column {HEALPIX_COLUMN}"], no_key
    cells = table[HEALPIX_COLUMN].to_numpy()
    outside = (cells < pixel.first) | (cells >= pixel.stop)
    if not is_margin and outside.any():
        row = int(np.argmax(outside))
        problems.append(f"{where}: {int(outside.sum())} rows lie outside, the first is row {row}")
    falling = np.diff(cells) < 0
    if falling.any():
        problems.append(
            f"{where}: not sorted by {HEALPIX_COLUMN} at row {int(np.argmax(falling)) + 1}"
        )
    names = [catalog.properties.get(f"hats_col_{name}", name) for name in ("ra", "dec")]
    if set(names) <= set(table.schema.names):  # a catalog that adds columns has none of its own
        ra, dec = (table[name] for name in names)
        if ra.null_count or dec.null_count:
            problems.append(f"{where}: null positions")
        elif catalog.manifest is not None:
            wrong = ang2pix(ra.to_numpy(), dec.to_numpy()) != cells
            if wrong.any():
                row = int(np.argmax(wrong))
                problems.append(f"{where}: {HEALPIX_COLUMN} does not fit ra and dec at row {row}")
    if catalog.manifest is not None:
        stated = catalog.partition_rows(pixel)
        if stated != table.num_rows:
            problems.append(f"{where}: {table.num_rows} rows, the manifest says {stated}")
    key = next((name for name in reversed(KEYS) if name in table.schema.names), "")
    if key and table[key].null_count:
        problems.append(f"{where}: {table[key].null_count} rows have no {key}")
        key = ""
    return problems, key_hashes(table[key]) if key else no_key

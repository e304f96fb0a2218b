"""A store on disk: builds, what they use, what is unfinished, what can go.

Layout (``<store>``)::

    artifacts/<stage>/<fingerprint>/     one output each, complete when it has a manifest
    builds/<utc>/<product>               links to artifacts, and build.json
    current                              link to the latest build, swapped atomically
    digests.json  costs.json             memory of hashed survey files, and of what outputs took
"""

from __future__ import annotations

import datetime
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sos_dask import __version__
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.run.machine import n_cores
from sos_dask.settings import is_product
from sos_dask.storage.artifact import (
    MANIFEST,
    Check,
    Manifest,
    Recipe,
    check_files,
    storage_errors,
    write_text,
)
from sos_dask.storage.digests import read_sealed, sealed_json, sha256_of_file
from sos_dask.storage.hats import COLLECTION

logger = logging.getLogger(__name__)
BUILD_FILE = "build.json"
COSTS = "costs.json"
DIGESTS_FILE = "digests.json"


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
    """What a finished stage says of itself."""
    manifest = Manifest.load(home(stage, directory))
    return StageResult(
        product=product,
        stage=stage,
        ran=ran,
        why=why,
        rows_in=manifest.rows.n_in,
        rows_out=manifest.rows.n_out,
        rejected=manifest.rows.rejected,
        dropped=dict(manifest.rows.dropped),
        added=dict(manifest.rows.added),
        path=str(directory),
        summary=manifest.summary,
    )


def check_product(product: str, stage: str, directory: Path, by: Check) -> None:
    """Compare the files of a product with its manifest before it is published.

    Parameters
    ----------
    by : str
        ``sha256`` or ``size``.

    Raises
    ------
    CatalogError
        A file is missing or not the one that was written.
    """
    place = home(stage, directory)
    try:
        manifest = Manifest.load(place)
        check_files(place, manifest, by, n_cores())
        stated = manifest.summary.get("collection_sha256")
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
    """What the run that finished an output took on the machine that ran it.

    Parameters
    ----------
    wall_s : float
    cpu_s : float
        Of the driver and of all workers.
    """

    wall_s: float
    cpu_s: float


def put_cost(store: Path, fingerprint: str, cost: Cost) -> None:
    """Remember a cost beside the artifacts, whose bytes must not depend on times."""
    path = store / COSTS
    known = {name: asdict(one) for name, one in costs(store).items()}
    known[fingerprint] = {name: round(value, 3) for name, value in asdict(cost).items()}
    remember(path, known)


def remember(path: Path, known: Mapping[str, Any]) -> None:
    """Write what a store remembers beside its products."""
    write_text(path, sealed_json({path.stem: known}))


def remembered(path: Path) -> dict[str, Any]:
    """Read what a store remembers beside its products; empty, with a warning, where damaged."""
    try:
        return dict(read_sealed(path, "").get(path.stem, {}))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except CatalogError as error:
        logger.warning("%s; what it remembered is measured or hashed again", error.message)
        return {}


def costs(store: Path) -> dict[str, Cost]:
    """Costs of outputs by their fingerprints; those that are not known are missing."""
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
    """Check that a folder is a store, with a current build where one is asked for.

    Raises
    ------
    CatalogError
        It is none; the hint names the stores beside and right below it.
    """
    if not (store / "artifacts").is_dir():
        near = [str(path) for path in stores_near(store)[:5]]
        raise CatalogError(
            f"no sos-dask store at '{store}'; give --store or a job file",
            f"Stores near it: {', '.join(near)}." if near else "A rebuild makes one.",
        )
    if built and not (store / "current").exists():
        raise CatalogError(f"{store} has no current build", "Run a rebuild first.")


def current_product(store: Path, product: str) -> Path:
    """Directory of a product of the current build.

    Raises
    ------
    CatalogError
        There is no build, or it does not have the product.
    """
    current = store / "current"
    require_store(store)
    if product not in read_build(current).get("products", {}):
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
    current = store / "current"
    recipes = {}
    for product in published(store):
        directory = (current / product).resolve()
        try:
            recipes[product] = Manifest.load(home(directory.parent.name, directory)).recipe
        except CatalogError:
            continue
    return recipes


def outputs_of(path: Path) -> list[Path]:
    """Products of a build, or of the current one of a store, in the order of the plan.

    A path that is neither is given back as it is.
    """
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
    """Latest build of a store, its products in the order of the plan, unfinished outputs, space.

    Raises
    ------
    CatalogError
        The folder is no store.
    """
    require_store(store, built=False)
    products, missing = [], []
    current = store / "current"
    name = ""
    if current.exists():
        build = read_build(current)
        name = current.resolve().name
        for product, stage_name in build["stages"].items():
            directory = (current / product).resolve()
            try:
                products.append(result_of(product, stage_name, directory, False, "published"))
            except CatalogError as error:
                missing.append(f"{product}: {error.message}")
    used = _used_artifacts(store, keep=None)
    artifacts = _artifacts(store)
    sizes = {path: _size(path) for path in artifacts}
    return StoreStatus(
        store,
        name,
        tuple(sorted(path.name for path in (store / "builds").glob("*"))),
        tuple(products),
        tuple(missing),
        tuple(str(path.relative_to(store)) for path in artifacts if _is_unfinished(path)),
        sum(size for path, size in sizes.items() if path not in used),
        sum(sizes.values()),
    )


def gc(store: Path, *, keep_builds: int = 1, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove old builds and every output that no kept build uses.

    Parameters
    ----------
    keep_builds : int
        How many of the latest builds stay (at least 1: the current one always does).
    dry_run : bool
        Only say what would go.

    Returns
    -------
    list of (Path, int)
        What was (would be) removed, with its bytes. Unfinished outputs go, too: do not run it
        beside a rebuild.
    """
    if keep_builds < 1:
        raise ConfigError(f"{keep_builds} builds cannot be kept: the current one always stays")
    require_store(store, built=False)
    kept = _kept_builds(store, keep_builds)
    for build in kept:
        read_build(build)  # with one that is damaged nobody knows what it needs
    used = _used_artifacts(store, keep_builds)
    doomed = [path for path in sorted((store / "builds").glob("*")) if path not in kept]
    doomed += [path for path in _artifacts(store) if path not in used]
    removed = [(path, _size(path)) for path in doomed]
    if not dry_run:
        for path in doomed:
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

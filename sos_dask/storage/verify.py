"""Check of every invariant of an output on disk."""

from __future__ import annotations

from dataclasses import replace
from glob import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.columns import key_hashes
from sos_dask.errors import CatalogError, PartitionError, SosError
from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.sky.healpix import HealpixPixel, ang2pix
from sos_dask.storage.artifact import MANIFEST, REJECTED, Manifest, is_temporary
from sos_dask.storage.catalog import Catalog, partition_errors
from sos_dask.storage.digests import sha256_of_file
from sos_dask.storage.hats import (
    COLLECTION,
    PROPERTIES,
    is_ours,
    primary_of,
    properties_file,
    read_properties,
)

OUR_MARGIN = "margin"
# Input whose rows a stage takes: the first of these roles that its recipe has.
_ROW_INPUTS = ("observations", "catalog", "target", "target.0", "pairs")


def verify(path: str | Path) -> list[str]:
    """Check every invariant of an output or a catalog; an empty list says that all hold.

    Checked of every output: the digest of its manifest, its account of rows against its Parquet
    files and against its input where that is in the same store, size and SHA-256 of every file,
    files that nobody wrote down. Of a catalog besides: the schema of each partition, rows against
    properties, order of rows, membership of every row in its pixel, ``_healpix_29`` against ra and
    dec, unique keys, overlap of pixels.

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
    ours = [OUR_MARGIN] if (path / OUR_MARGIN).is_dir() else []  # whatever the file says
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
        if not file.is_dir() and name not in known and not is_temporary(name):
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
        else:
            wrong = ang2pix(ra.to_numpy(), dec.to_numpy()) != cells
            if wrong.any() and catalog.manifest is not None:
                row = int(np.argmax(wrong))
                problems.append(f"{where}: {HEALPIX_COLUMN} does not fit ra and dec at row {row}")
    if catalog.manifest is not None:
        stated = catalog.partition_rows(pixel)
        if stated != table.num_rows:
            problems.append(f"{where}: {table.num_rows} rows, the manifest says {stated}")
    key = next((n for n in ("obs_id", "star_id") if n in table.schema.names), None)
    if key is not None and table[key].null_count:
        problems.append(f"{where}: {table[key].null_count} rows have no {key}")
        key = None
    return problems, no_key if key is None else key_hashes(table[key])

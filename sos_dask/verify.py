"""Check of every invariant of a catalog on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sos_dask.artifact import Manifest, sha256_of_file
from sos_dask.catalog import PROPERTIES, Catalog, properties_file
from sos_dask.columns import key_hashes
from sos_dask.errors import CatalogError, PartitionError
from sos_dask.healpix import HealpixPixel, ang2pix
from sos_dask.schema import HEALPIX_COLUMN


def verify(path: str | Path) -> list[str]:
    """Check every invariant of a catalog; an empty list says that all hold.

    Of an output that is no catalog, as a model: its account of rows and its files.
    Checked: manifest and its account of rows, size and SHA-256 of every file, files that nobody
    wrote down, the schema of each partition, rows against manifest and properties, order of rows,
    membership of every row in its pixel, ``_healpix_29`` against ra and dec, unique keys, overlap
    of pixels.

    Returns
    -------
    list of str
        One sentence for each thing that is wrong, naming file, pixel, column or row.
    """
    path = Path(path)
    collection = path / "collection.properties"
    if not properties_file(path).is_file() and not collection.is_file():
        return _verify_files(path, Manifest.load(path))
    catalog = Catalog.open(path, any_type=True)
    problems: list[str] = []
    if catalog.manifest is not None:
        problems += _verify_files(catalog.path, catalog.manifest)
    for left, right in zip(catalog.pixels, catalog.pixels[1:], strict=False):
        if left.overlaps(right):
            problems.append(f"pixels {left} and {right} overlap")
    is_margin = catalog.properties.get("dataproduct_type") == "margin"
    total = 0
    keys: list[NDArray[np.uint64]] = []
    for pixel in catalog.pixels:
        try:
            rows, found, key = _verify_partition(catalog, pixel, is_margin)
        except PartitionError as error:
            problems.append(f"pixel {pixel}: {error.message}")
            continue
        total += rows
        problems += found
        keys.append(key)
    if not is_margin and keys:
        hashes = np.sort(np.concatenate(keys))
        n_repeated = int(np.count_nonzero(hashes[1:] == hashes[:-1]))
        if n_repeated:
            problems.append(f"{n_repeated} keys occur more than once in the catalog")
    stated = catalog.properties.get("hats_nrows")
    if stated is not None and not problems and int(stated) != total:
        problems.append(f"{PROPERTIES} says {stated} rows, the partitions hold {total}")
    return problems


def _verify_files(root: Path, manifest: Manifest) -> list[str]:
    problems = []
    known = set()
    for record in manifest.files:
        file = root / record.path
        known.add(file)
        if not file.is_file():
            problems.append(f"{record.path} is missing")
        elif file.stat().st_size != record.bytes:
            problems.append(
                f"{record.path} has {file.stat().st_size} bytes, the manifest says {record.bytes}"
            )
        elif sha256_of_file(file) != record.sha256:
            problems.append(f"{record.path} was changed: its SHA-256 is not the manifest's")
    for file in sorted((root / "dataset").rglob("*.parquet")):
        if file not in known:
            problems.append(f"{file.relative_to(root)} is not in the manifest")
    try:
        manifest.rows.check(f"stage {manifest.recipe.stage}")
    except CatalogError as error:
        problems.append(error.message)
    return problems


def _verify_partition(
    catalog: Catalog, pixel: HealpixPixel, is_margin: bool
) -> tuple[int, list[str], NDArray[np.uint64]]:
    where = f"pixel {pixel}"
    table = catalog.read(pixel)
    problems = []
    if not table.schema.remove_metadata().equals(catalog.schema, check_metadata=False):
        problems.append(f"{where}: its schema is not the catalog's")
    no_key = np.empty(0, dtype=np.uint64)
    if HEALPIX_COLUMN not in table.schema.names:
        return (
            table.num_rows,
            [*problems, f"{where}: no column {HEALPIX_COLUMN}"],
            no_key,
        )
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
    return table.num_rows, problems, no_key if key is None else key_hashes(table[key])

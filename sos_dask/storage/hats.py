"""Directories in the HATS layout, and how those of other programs become like ours.

Of a catalog of another program, what the properties name is followed: names of ra and dec, suffix
of the files. Positions become ``ra`` and ``dec`` in float64 degrees with ra in [0, 360), the cells
are computed from them, and the rows of a partition are sorted by cell, then key. The columns that
decide this are read once a process for the last few partitions.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sos_dask.columns import FloatArray, IntArray
from sos_dask.errors import CatalogError, ConfigError, PartitionError
from sos_dask.schema import HEALPIX, HEALPIX_COLUMN, KEYS, nearest
from sos_dask.sky.healpix import HealpixPixel, ang2pix, centre, unit_vectors, with_neighbours
from sos_dask.storage.artifact import Stamp, open_parquet, partition_errors
from sos_dask.storage.manifest import MANIFEST, WORK, files_below
from sos_dask.storage.objects import local

BUILDER = "sos-dask"
PROPERTIES = "hats.properties"
COLLECTION = "collection.properties"
PARTITION_INFO = "partition_info.csv"
COMMON_METADATA = "dataset/_common_metadata"
NOT_A_CATALOG = "Ask who made it, or make it again with hats-import or LSDB."
# Positions are rounded to single precision by some writers, which can carry a row over the edge of
# its partition: it keeps the nearest cell inside. Farther out it is in the wrong file.
_PULLS_ARCSEC = (0.001, 0.05, 0.1, 0.2, 0.4, 0.8)


# -- folders --------------------------------------------------------------------------------------


def partition_path(pixel: HealpixPixel) -> str:
    """Path of a partition, relative to its catalog."""
    folder = pixel.pixel // 10000 * 10000
    return f"dataset/Norder={pixel.order}/Dir={folder}/Npix={pixel.pixel}.parquet"


def properties_file(path: Path) -> Path:
    """Path of the properties of a catalog, which HATS of 2024 named otherwise."""
    old = path / "properties"
    return old if old.is_file() and not (path / PROPERTIES).is_file() else path / PROPERTIES


def require_kind(path: Path, properties: Mapping[str, str], *kinds: str) -> None:
    """Raise `CatalogError` unless the ``dataproduct_type`` of a catalog is one of these."""
    kind = properties.get("dataproduct_type", "object").lower()
    if kind not in kinds:
        names = ("hats_primary_table_url", "hats_assn_join_table_url")
        of = " or ".join(properties[name] for name in names if name in properties)
        what = f"its dataproduct_type is {kind}: a catalog of stars or observations is needed"
        hint = f"Give the catalog that it belongs to: {of}." if of else ""
        raise CatalogError(f"{path}: {what}", hint)


def read_properties(path: Path) -> dict[str, str]:
    """Read a Java-style properties file; `CatalogError` where it cannot be read."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise CatalogError(f"{path} cannot be read: {error}") from None
    pairs = (line.partition("=") for line in lines if line and line[0] not in "#!")
    return {key.strip(): value.strip().replace("\\:", ":") for key, _, value in pairs}


def is_ours(path: Path) -> bool:
    """Whether a directory must have a manifest: not a catalog, or one that sos-dask makes."""
    file = properties_file(path)
    if not file.is_file() or (path / MANIFEST).exists() or (path / WORK).exists():
        return True
    return read_properties(file).get("hats_builder") == BUILDER


def primary_of(collection: Path) -> str:
    """Relative path of the primary catalog of a collection, which lies below it."""
    name = read_properties(collection).get("hats_primary_table_url", "")
    parts = PurePosixPath(name).parts
    below = collection.parent / name if name.isprintable() else collection.parent
    if not parts or "/" in parts or ".." in parts or not properties_file(below).is_file():
        what = f"hats_primary_table_url={name[:200]!r} is not a catalog below its folder"
        raise CatalogError(f"{collection}: {what}")
    return name


def listed(path: Path) -> list[tuple[HealpixPixel, str]]:
    """Read pixels and their stated rows, if any, of ``partition_info.csv``; empty without it."""
    info = path / PARTITION_INFO
    try:
        with info.open(newline="") as file:
            return [
                (HealpixPixel(int(row["Norder"]), int(row["Npix"])), row.get("num_rows") or "")
                for row in csv.DictReader(file)
            ]
    except FileNotFoundError:
        return []
    except (OSError, KeyError, TypeError, ValueError, csv.Error, ConfigError) as error:
        raise CatalogError(f"{info} cannot be read: {error!r}") from None


def first_schema(path: Path, *files: Path) -> pa.Schema:
    """Read the schema of the first file of a catalog that is there, without its metadata."""
    for file in files:
        if file.is_file():
            with partition_errors(file):
                return pq.read_schema(local(file)).remove_metadata()
    raise CatalogError(f"{path} has no partitions and no schema", NOT_A_CATALOG)


# -- partitions and columns of other programs -----------------------------------------------------


def _visible(folder: Path) -> list[Path]:
    """Files of a folder but for hidden ones and metadata, in the order of their names."""
    return [file for file in sorted(files_below(folder)) if not file.name.startswith((".", "_"))]


def data_files(path: Path) -> Iterator[Path]:
    """Files where HATS has partitions."""
    for place in sorted((path / "dataset").glob("Norder=*/Dir=*/Npix=*")):
        yield from [place] if place.is_file() else _visible(place)


def files_by_pixel(
    path: Path, properties: Mapping[str, str]
) -> dict[HealpixPixel, tuple[Path, ...]]:
    """Find the files of partitions in any tree, by order and pixel in their names.

    A wrong guess is refused when rows are read: they lie outside the partition.
    """
    suffix = properties.get("hats_npix_suffix", ".parquet")
    if suffix != "/" and (not suffix.startswith(".") or "/" in suffix):
        raise CatalogError(f"{path}: {PROPERTIES} states hats_npix_suffix={suffix}")
    found: dict[HealpixPixel, tuple[Path, ...]] = {}
    standard = list(data_files(path))
    pattern = r"Norder=(\d+)/.*Npix=(\d+)" if standard else r"(\d+)\D+(\d+)\D*$"
    for file in standard or _visible(path):
        numbers = re.search(pattern, file.relative_to(path).with_suffix("").as_posix())
        in_folder = standard and file.parent.name.startswith("Npix=")
        if numbers and (in_folder or file.suffix.startswith((".p", suffix))):
            with suppress(ConfigError):  # numbers of something else
                pixel = HealpixPixel(int(numbers[1]), int(numbers[2]))
                found[pixel] = (*found.get(pixel, ()), file)
    return found


def columns_here(
    path: Path, schema: pa.Schema, properties: Mapping[str, str], key: str, key_name: str
) -> tuple[pa.Schema, dict[str, str]]:
    """Schema by which a catalog is read, and the stored names of its columns.

    Raises `CatalogError` where a name is there twice, position or key are missing, or of no use.
    """
    for name in schema.names:
        if (n := schema.names.count(name)) > 1:
            raise CatalogError(f"{path}: column '{name}' is there {n} times", NOT_A_CATALOG)
    new = {properties.get(f"hats_col_{name}", name): name for name in ("ra", "dec")}
    for name, here in new.items():
        if name not in schema.names:
            what = f"{PROPERTIES} names '{name}' as {here}, which is not a column"
            raise CatalogError(f"{path}: {what}", nearest(name, schema.names))
    others = {*new.values(), *(KEYS if key else ())}
    if key:
        if key not in schema.names or key in new:
            raise CatalogError(f"{path} has no key column '{key}'", nearest(key, schema.names))
        new[key] = key_name
    fields, stored = [], {}
    for item in schema:
        name = new.get(item.name, item.name)
        while item.name not in new and (name in others or name in stored):
            name += "_other"  # another column has its name
        kind = _type_here(item.type)
        if name in ("ra", "dec"):
            if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
                raise CatalogError(f"{path}: '{item.name}' has type {kind}, not numbers in degrees")
            kind = pa.float64()
        elif name == HEALPIX_COLUMN or (name in KEYS and pa.types.is_integer(kind)):
            kind = pa.int64()
        fields.append(item.with_name(name).with_type(kind))
        stored[name] = item.name
    if HEALPIX_COLUMN not in stored:
        fields.insert(0, HEALPIX.arrow().remove_metadata())
    return pa.schema(fields), stored


def _type_here(kind: pa.DataType) -> pa.DataType:
    """Type of a column as it is read: text has one representation."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(value) or pa.types.is_large_string(value)
    return pa.string() if text or pa.types.is_string_view(value) else kind


# -- rows of other programs -----------------------------------------------------------------------


class Order(NamedTuple):
    """Cells of a partition, ascending; its rows in that order, None where they stand so."""

    cells: IntArray
    rows: IntArray | None
    as_written: bool


@lru_cache(maxsize=4)
def order_of(
    stamps: tuple[Stamp, ...], pixel: HealpixPixel | None, names: tuple[str, ...]
) -> Order:
    """Find the order of the rows of some files, which lie in a pixel unless it is a margin.

    ``names`` are those stored of ra, dec, key and cells, empty where there is none. Raises
    `PartitionError` where a row has no position, or one outside of the pixel.
    """
    files, (ra, dec, key, cells) = [path for path, _, _ in stamps], names
    found: list[IntArray] = []
    for path in files:
        with open_parquet(path, must_have=[ra, dec]) as file:
            table = file.read([ra, dec], use_threads=False)
            found.append(_cells_of(*_positions(table, ra, dec, path), pixel, path))
    computed = np.concatenate(found)
    rows = np.argsort(computed, kind="stable")
    ordered = computed[rows]
    same = np.append(False, ordered[1:] == ordered[:-1])
    ties = np.flatnonzero(same | np.append(same[1:], False))
    if key and len(ties):
        some = rows[ties]
        keys = column_of(files, key).take(pa.array(some))
        rank = pc.rank(keys, tiebreaker="dense").to_numpy()
        rows[ties] = some[np.lexsort((some, rank, computed[some]))]
    if np.any(rows[1:] < rows[:-1]):
        return Order(ordered, rows, False)
    return Order(ordered, None, bool(cells) and _are_cells(column_of(files, cells), ordered))


def column_of(files: Sequence[Path], name: str) -> pa.ChunkedArray:
    """Read a column in the order of the files."""
    found = []
    for path in files:
        with open_parquet(path, must_have=[name]) as file:
            column = file.read([name], use_threads=False)[name]
            found.append(pa.table([column.cast(_type_here(column.type))], [name]))
    return pa.concat_tables(found)[name]


def _positions(table: pa.Table, ra: str, dec: str, path: Path) -> tuple[FloatArray, FloatArray]:
    """Right ascension and declination, degrees; every row must have both."""
    values = [pc.fill_null(table[name].cast(pa.float64()), np.nan).to_numpy() for name in (ra, dec)]
    bad = ~((np.abs(values[0]) <= 360) & (np.abs(values[1]) <= 90))
    if bad.any():
        row = int(np.argmax(bad))
        raise PartitionError(
            f"partition {path}, row {row}: {ra}={table[ra][row].as_py()}, "
            f"{dec}={table[dec][row].as_py()} is not a position ({int(bad.sum())} such rows)",
            "Remove these rows from the catalog: no row is left out without a word.",
        )
    return values[0], values[1]


def in_circle(ra: FloatArray) -> FloatArray:
    """Right ascension in [0, 360)."""
    turned = np.mod(ra, 360.0)
    return np.where(turned < 360, turned, 0.0)  # a tiny negative one is rounded to 360


def _cells_of(ra: FloatArray, dec: FloatArray, pixel: HealpixPixel | None, path: Path) -> IntArray:
    """Cells of positions; of those just outside of the pixel the nearest cell inside."""
    cells = ang2pix(ra, dec)
    if pixel is None:
        return cells
    rows = np.flatnonzero((cells < pixel.first) | (cells >= pixel.stop))
    start, middle = unit_vectors(ra[rows], dec[rows]), unit_vectors(*centre(pixel))
    toward = middle - start * (start @ middle.T)
    toward /= np.linalg.norm(toward, axis=1, keepdims=True)
    for pull in _PULLS_ARCSEC if len(rows) else ():
        x, y, z = (start + np.radians(pull / 3600) * toward).T
        pulled = ang2pix(np.degrees(np.arctan2(y, x)), np.degrees(np.arctan2(z, np.hypot(x, y))))
        inside = (pulled >= pixel.first) & (pulled < pixel.stop)
        cells[rows[inside]] = pulled[inside]
        rows, start, toward = rows[~inside], start[~inside], toward[~inside]
    if len(rows):
        raise PartitionError(
            f"partition {path}, row {rows[0]}: ra={ra[rows[0]]}, dec={dec[rows[0]]} lies "
            f"outside HEALPix pixel {pixel} ({len(rows)} such rows)",
            NOT_A_CATALOG,
        )
    return cells


def _are_cells(stored: pa.ChunkedArray, cells: IntArray) -> bool:
    """Whether stored cells are those of the positions, to the rounding of another library."""
    if stored.type != pa.int64() or stored.null_count:
        return False
    values = stored.to_numpy()
    other = values != cells
    near = with_neighbours(cells[other], 29) == values[other][:, None]
    return bool(near.any(axis=1).all() and (values[1:] >= values[:-1]).all())

"""Catalogs on disk: HEALPix-partitioned Parquet in the HATS layout.

The layout is that of the IVOA note "HATS" (Caplar et al. 2025, arXiv 2501.02103): one Parquet file
a pixel under ``dataset/Norder=K/Dir=D/Npix=N.parquet``, sorted by ``_healpix_29``, with
``hats.properties``, ``partition_info.csv`` and ``dataset/_common_metadata`` beside it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.errors import CatalogError, ConfigError, PartitionError
from sos_dask.schema import HEALPIX_COLUMN, KEYS, described, nearest
from sos_dask.sky.healpix import HealpixPixel, Ranges
from sos_dask.storage.artifact import (
    Output,
    footer_of,
    open_parquet,
    partition_errors,
    row_group_bounds,
    taken,
    write_parquet,
    write_text,
)
from sos_dask.storage.manifest import MANIFEST, WORK, FileRecord, Manifest, sha256_of_file

BUILDER = "sos-dask"
PROPERTIES = "hats.properties"
COLLECTION = "collection.properties"
PARTITION_INFO = "partition_info.csv"
COMMON_METADATA = "dataset/_common_metadata"
NOT_A_CATALOG = "Ask who made it, or make it again with hats-import or LSDB."


# -- folders of catalogs --------------------------------------------------------------------------


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
        raise CatalogError(
            f"{path}: its dataproduct_type is {kind}: a catalog of stars or observations is needed",
            f"Give the catalog that it belongs to: {of}." if of else "",
        )


def read_properties(path: Path) -> dict[str, str]:
    """Read a Java-style properties file; `CatalogError` where it is none."""
    properties = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CatalogError(f"{path} cannot be read: {error}") from None
    for line in lines:
        if line.strip() and not line.lstrip().startswith(("#", "!")):
            key, _, value = line.partition("=")
            properties[key.strip()] = value.strip().replace("\\:", ":")
    return properties


def is_ours(path: Path) -> bool:
    """Whether a directory must have a manifest: no catalog, or one that sos-dask makes or made."""
    if not properties_file(path).is_file():
        return True
    if (path / MANIFEST).exists() or (path / WORK).exists():
        return True
    return read_properties(properties_file(path)).get("hats_builder") == BUILDER


def primary_of(collection: Path) -> str:
    """Relative path of the primary catalog of a collection, which lies below it."""
    name = read_properties(collection).get("hats_primary_table_url", "")
    parts = PurePosixPath(name).parts
    below = collection.parent / name if name.isprintable() else collection.parent
    if not parts or "/" in parts or ".." in parts or not properties_file(below).is_file():
        raise CatalogError(
            f"{collection}: hats_primary_table_url={name[:200]!r} is no catalog below its folder"
        )
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


# -- writing --------------------------------------------------------------------------------------


def write_partition(
    output: Output, pixel: HealpixPixel, table: pa.Table, root: str = ""
) -> FileRecord:
    """Write one partition atomically below an output (in its folder ``root``)."""
    return output.write_file(root + partition_path(pixel), lambda path: write_parquet(table, path))


def write_catalog_metadata(
    output: Output,
    name: str,
    pixels: Sequence[HealpixPixel],
    schema: pa.Schema,
    n_rows: int,
    *,
    catalog_type: str = "object",
    extra: Mapping[str, str] | None = None,
    root: str = "",
) -> tuple[FileRecord, ...]:
    """Write ``hats.properties``, ``partition_info.csv`` and ``_common_metadata``.

    They are computed from what was written, never inherited from a parent catalog.
    """
    properties = {
        "obs_collection": name,
        "dataproduct_type": catalog_type,
        "hats_nrows": str(n_rows),
        **{f"hats_col_{name}": name for name in ("ra", "dec") if name in schema.names},
        "hats_col_healpix": HEALPIX_COLUMN,
        "hats_col_healpix_order": "29",
        "hats_npix_suffix": ".parquet",
        "hats_order": str(max((pixel.order for pixel in pixels), default=0)),
        "hats_version": "v0.1",
        "hats_builder": BUILDER,
        **(extra or {}),
    }
    text = "".join(f"{key}={value}\n" for key, value in properties.items())
    info = io.StringIO()
    writer = csv.writer(info, lineterminator="\n")
    writer.writerow(["Norder", "Npix"])
    # Breadth first, as hats sorts them.
    writer.writerows(sorted((pixel.order, pixel.pixel) for pixel in pixels))

    common = io.BytesIO()
    pq.write_metadata(described(schema), common)
    return (
        output.write_bytes(root + PROPERTIES, f"# HATS catalog\n{text}".encode()),
        output.write_bytes(root + PARTITION_INFO, info.getvalue().encode()),
        output.write_bytes(root + COMMON_METADATA, common.getvalue()),
    )


def write_collection(directory: Path, name: str, primary: str, margins: Sequence[str]) -> str:
    """Write ``collection.properties``: a primary catalog with margins; SHA-256 of the file."""
    lines = [f"obs_collection={name}", f"hats_primary_table_url={primary}"]
    if margins:
        lines += [f"all_margins={' '.join(margins)}", f"default_margin={margins[0]}"]
    write_text(directory / COLLECTION, "# HATS collection\n" + "\n".join(lines) + "\n")
    return sha256_of_file(directory / COLLECTION)


# -- reading --------------------------------------------------------------------------------------


def first_schema(path: Path, *files: Path) -> pa.Schema:
    """Read the schema of the first file of a catalog that is there, without its metadata."""
    for file in files:
        if file.is_file():
            with partition_errors(file):
                return pq.read_schema(file).remove_metadata()
    raise CatalogError(f"{path} has no partitions and no schema", NOT_A_CATALOG)


@dataclass(frozen=True)
class Catalog:
    """A catalog on disk: a handle that holds no rows.

    Parameters
    ----------
    path : Path
    pixels : tuple of HealpixPixel
        Partitions in the order of the sky curve.
    schema : pyarrow.Schema
    properties : mapping of str to str
        Content of ``hats.properties``.
    manifest : Manifest, optional
        None for a catalog made by another program.
    """

    path: Path
    pixels: tuple[HealpixPixel, ...]
    schema: pa.Schema
    properties: Mapping[str, str] = field(default_factory=dict)
    manifest: Manifest | None = None

    @classmethod
    def open(cls, path: str | Path, *, key: str = "", key_name: str = "star_id") -> Catalog:
        """Open a catalog, or the primary catalog of a HATS collection, and check it.

        Its small files are compared with the manifest by bytes and SHA-256, partitions by bytes;
        the account of rows, the properties and the list of partitions must say the same.

        Parameters
        ----------
        key : str
            Of a catalog made by another program: the column whose integers or texts name its rows.
        key_name : str
            Name that it gets, ``star_id`` or ``obs_id``.

        Raises
        ------
        CatalogError
            Not there, unfinished, damaged, of another format or type (as a margin), or not as its
            manifest says.
        """
        catalog = cls.read_only(path, key=key, key_name=key_name)
        require_kind(catalog.path, catalog.properties, "object", "source")
        if catalog.manifest is not None:
            Manifest.checked(catalog.path)
        catalog.check_account()
        return catalog

    @classmethod
    def read_only(cls, path: str | Path, *, key: str = "", key_name: str = "star_id") -> Catalog:
        """Open a catalog without the checks of `open`: tasks do, whose driver has made them."""
        path = Path(path)
        collection = path / COLLECTION
        if collection.is_file() and not properties_file(path).is_file():
            return cls.read_only(path / primary_of(collection), key=key, key_name=key_name)
        manifest = Manifest.load(path) if is_ours(path) else None
        if not properties_file(path).is_file():
            raise CatalogError(f"{path} is not a catalog: it has no {PROPERTIES}")
        properties = read_properties(properties_file(path))
        require_kind(path, properties, "object", "source", "margin")  # `verify` reads margins, too
        if key and manifest is not None and key not in KEYS:
            raise CatalogError(
                f"{path} was made by sos-dask: the key of its rows is not '{key}'",
                f"Leave --key out: it is {' or '.join(KEYS)}.",
            )
        if manifest is None:
            from sos_dask.storage.foreign import open_foreign

            return open_foreign(path, properties, key, key_name)
        pixels = sorted((pixel for pixel, _ in listed(path)), key=lambda pixel: pixel.first)
        files = [path / name for name in (COMMON_METADATA, *map(partition_path, pixels[:1]))]
        return cls(path, tuple(pixels), first_schema(path, *files), properties, manifest)

    def check_account(self) -> None:
        """Compare the list of partitions, the manifest's rows and ``hats_nrows``."""
        again = f"Restore its files, or remove {self.path} and make it again."
        for left, right in pairwise(self.pixels):
            if left.overlaps(right):
                raise CatalogError(
                    f"{self.path / PARTITION_INFO}: pixels {left} and {right} overlap", again
                )
        if self.manifest is not None:
            listed = {partition_path(pixel) for pixel in self.pixels}
            stated = {record.path for record in self.manifest.files if record.is_partition}
            for name in sorted(listed ^ stated):
                raise CatalogError(
                    f"{self.path}: {name} is in only one of {MANIFEST} and {PARTITION_INFO}", again
                )
            if self.n_rows != self.manifest.rows.n_out:
                raise CatalogError(
                    f"{self.path}: {MANIFEST} states {self.manifest.rows.n_out} rows out, its "
                    f"partitions have {self.n_rows}",
                    again,
                )
        n_rows = self.properties.get("hats_nrows")
        if n_rows is not None and n_rows != str(self.n_rows):
            raise CatalogError(
                f"{self.path}: {PROPERTIES} states hats_nrows={n_rows[:40]}, the partitions of "
                f"{PARTITION_INFO} have {self.n_rows} rows",
                again,
            )
        if not self.pixels and any((self.path / "dataset").rglob("Npix=*")):
            raise CatalogError(f"{self.path / PARTITION_INFO} lists none of the partitions", again)

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        # A task carries only the path; each worker opens the catalog once.
        known = self.path / (MANIFEST if self.manifest is not None else PROPERTIES)
        return _reopen, (str(self.path), known.stat().st_mtime_ns)

    @property
    def as_written(self) -> bool:
        """Whether rows and columns stand in the files as they are read."""
        return True

    @property
    def has_our_columns(self) -> bool:
        """Whether columns have the same names and types in the files as here."""
        return True

    @property
    def name(self) -> str:
        """Name of the catalog."""
        return self.properties.get("obs_collection", self.path.name)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the catalog, for the recipes of what is made from it."""
        assert self.manifest is not None  # else it is a `ForeignCatalog`
        return self.manifest.fingerprint

    @property
    def n_rows(self) -> int:
        """Rows of all partitions."""
        return sum(self.partition_rows(pixel) for pixel in self.pixels)

    def partition_rows(self, pixel: HealpixPixel) -> int:
        """Rows of one partition."""
        stated = self.stated.get(partition_path(pixel))
        return int(self._footer(pixel).num_rows) if stated is None else stated.rows

    @cached_property
    def stated(self) -> dict[str, FileRecord]:
        """Files that the manifest names, by their path; none without a manifest."""
        files = self.manifest.files if self.manifest is not None else ()
        return {record.path: record for record in files}

    def partition_file(self, pixel: HealpixPixel) -> Path:
        """Path of one partition."""
        return self.path / partition_path(pixel)

    def columns(self, names: Iterable[str]) -> list[str]:
        """Those of the names that the catalog has, in the given order."""
        return [name for name in names if name in self.schema.names]

    def require(self, *names: str) -> None:
        """Raise `CatalogError` for the first column that is missing."""
        for name in names:
            if name not in self.schema.names:
                raise CatalogError(
                    f"{self.path} has no column '{name}'", nearest(name, self.schema.names)
                )

    def read(
        self, pixel: HealpixPixel, columns: Sequence[str] | None = None, *, coded: bool = False
    ) -> pa.Table:
        """Read one partition.

        Parameters
        ----------
        pixel : HealpixPixel
        columns : sequence of str, optional
            Default all.
        coded : bool
            Read text of few different values as codes and their dictionary: a fifth of the time.

        Raises
        ------
        PartitionError
            The file is missing, damaged or lacks a column.
        """
        text = _text_of_few_values(self._footer(pixel)) if coded else []
        with self._opened(pixel, text) as file:
            return file.read(columns=columns, use_threads=False)

    def _opened(
        self, pixel: HealpixPixel, coded: Sequence[str] = ()
    ) -> AbstractContextManager[pq.ParquetFile]:
        return open_parquet(self.partition_file(pixel), self._footer(pixel), coded)

    def rows_in(
        self,
        pixel: HealpixPixel,
        ranges: Ranges,
        *,
        wanted: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None = None,
    ) -> NDArray[np.int64]:
        """Find the rows of a partition whose ``_healpix_29`` lies in one of the ranges.

        Nothing but the cells is read, and only of row groups that lie partly in the ranges.

        Parameters
        ----------
        pixel : HealpixPixel
        ranges : list of (first, stop)
            Half-open, sorted, disjoint.
        wanted : callable, optional
            Tells which of the cells that lie in the ranges are wanted.

        Returns
        -------
        ndarray of int64
            Row numbers, ascending.

        Raises
        ------
        PartitionError
            The partition is damaged, or not sorted on the sky.
        """
        found = [np.empty(0, dtype=np.int64)]
        starts, stops = edges_of(ranges)
        with self._opened(pixel) as file:
            first = 0
            for number, (low, high) in enumerate(row_group_bounds(file.metadata, HEALPIX_COLUMN)):
                n_rows = file.metadata.row_group(number).num_rows
                at = int(np.searchsorted(stops, low, side="right"))
                if at < len(starts) and starts[at] <= high:
                    inside = starts[at] <= low and high < stops[at]
                    if inside and wanted is None:
                        found.append(np.arange(first, first + n_rows))
                    else:
                        group = file.read_row_group(number, [HEALPIX_COLUMN], use_threads=False)
                        cells = self._in_order(pixel, group)
                        rows = rows_between(cells, starts, stops)
                        if wanted is not None:
                            rows = rows[wanted(cells[rows])]
                        found.append(first + rows)
                first += n_rows
        return np.concatenate(found)

    def cells(self, pixel: HealpixPixel) -> NDArray[np.int64]:
        """Read the ``_healpix_29`` of all rows of a partition; an error unless they ascend."""
        return self._in_order(pixel, self.read(pixel, [HEALPIX_COLUMN]))

    def _in_order(self, pixel: HealpixPixel, rows: pa.Table) -> NDArray[np.int64]:
        cells: NDArray[np.int64] = rows[HEALPIX_COLUMN].to_numpy()
        if np.any(cells[1:] < cells[:-1]):
            raise PartitionError(f"{self.partition_file(pixel)} is not sorted by {HEALPIX_COLUMN}")
        return cells

    def take(
        self, pixel: HealpixPixel, rows: NDArray[np.int64], columns: Sequence[str]
    ) -> pa.Table:
        """Read some rows of a partition, in ascending order, each once."""
        with self._opened(pixel) as file:
            tables = taken(file, rows, columns)
        return pa.concat_tables(tables or [self._no_rows(columns)])

    def _no_rows(self, columns: Sequence[str]) -> pa.Table:
        return pa.schema([self.schema.field(name) for name in columns]).empty_table()

    def overlapping(self, ranges: Ranges) -> list[HealpixPixel]:
        """Partitions that meet one of the ranges (sorted, disjoint), in the order of the sky."""
        starts, stops = edges_of(ranges)
        firsts, lasts = self._edges
        at = np.searchsorted(stops, firsts, side="right")
        meets = at < len(starts)
        meets[meets] = starts[at[meets]] < lasts[meets]
        return [self.pixels[number] for number in np.flatnonzero(meets)]

    @cached_property
    def _edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return edges_of([(pixel.first, pixel.stop) for pixel in self.pixels])

    def read_ranges(self, ranges: Ranges, columns: Sequence[str]) -> pa.Table:
        """Rows whose ``_healpix_29`` lies in one of the half-open ranges (sorted, disjoint).

        Of row groups without such rows nothing but the cells is read.
        """
        tables = [
            self.take(pixel, rows, columns)
            for pixel in self.overlapping(ranges)
            if len(rows := self.rows_in(pixel, ranges))
        ]
        return pa.concat_tables(tables or [self._no_rows(columns)])

    def bounds(self, *columns: str) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of columns, from one look at each footer.

        Columns that the catalog lacks, or that are all null, are left out.
        """
        found: dict[str, tuple[float, float]] = {}
        names = self.columns(columns)
        for pixel in self.pixels if names else ():
            footer = self._footer(pixel)
            for name in names:
                for low, high in row_group_bounds(footer, name):
                    if low is not None:
                        before = found.get(name, (np.inf, -np.inf))
                        found[name] = min(before[0], float(low)), max(before[1], float(high))
        return found

    def largest_partition(self) -> tuple[HealpixPixel, int]:
        """The partition with most rows, and its bytes in memory (of text those in the file)."""
        pixel = max(self.pixels, key=self.partition_rows)
        widths = {
            item.name: item.type.bit_width // 8
            for item in self.schema
            if pa.types.is_primitive(item.type)
        }
        n_bytes = 0
        for footer in self._footers(pixel):
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                for index in range(group.num_columns):
                    chunk = group.column(index)
                    width = widths.get(chunk.path_in_schema, 0)
                    n_bytes += max(chunk.total_uncompressed_size, width * chunk.num_values)
        return pixel, n_bytes

    def _footers(self, pixel: HealpixPixel) -> list[pq.FileMetaData]:
        """Footers of the files of a partition."""
        return [self._footer(pixel)]

    def _footer(self, pixel: HealpixPixel) -> pq.FileMetaData:
        """Footer of a partition, which must be the one that was written."""
        path = self.partition_file(pixel)
        stated = self.stated.get(partition_path(pixel))
        with partition_errors(path):
            footer = footer_of(path, "" if stated is None else stated.footer)
        if stated is not None and stated.rows != footer.num_rows:
            raise PartitionError(
                f"partition {path} has {footer.num_rows} rows, the manifest states {stated.rows}",
                "Remove its catalog and make it again.",
            )
        return footer


def edges_of(ranges: Ranges) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split ranges into their starts and their stops."""
    return (
        np.array([first for first, _ in ranges], dtype=np.int64),
        np.array([stop for _, stop in ranges], dtype=np.int64),
    )


def rows_between(
    cells: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Find the places of ascending cells that lie between starts and stops."""
    low, high = np.searchsorted(cells, starts), np.searchsorted(cells, stops)
    count = high - low
    return np.arange(count.sum()) + np.repeat(high - np.cumsum(count), count)


def _text_of_few_values(footer: pq.FileMetaData) -> list[str]:
    """Columns of text that take at most two bytes a row: different values would take five."""
    first = footer.row_group(0) if footer.num_row_groups else None
    chunks = [first.column(number) for number in range(first.num_columns)] if first else []
    return [
        chunk.path_in_schema
        for chunk in chunks
        if chunk.physical_type == "BYTE_ARRAY"
        and chunk.total_uncompressed_size <= 2 * chunk.num_values
    ]


@lru_cache(maxsize=8)
def _reopen(path: str, stamp: int) -> Catalog:
    return Catalog.read_only(path)

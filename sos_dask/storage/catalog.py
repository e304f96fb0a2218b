"""Catalogs on disk: HEALPix-partitioned Parquet in the HATS layout.

The layout is that of the IVOA note "HATS" (Caplar et al. 2025, arXiv 2501.02103): one Parquet file
a pixel under ``dataset/Norder=K/Dir=D/Npix=N.parquet``, sorted by ``_healpix_29``, with
``hats.properties``, ``partition_info.csv`` and ``dataset/_common_metadata`` beside it.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from sos_dask.schema import HEALPIX_COLUMN, KEYS, LABELS, described, nearest
from sos_dask.sky.healpix import HealpixPixel, Ranges
from sos_dask.storage.artifact import MANIFEST, WORK, FileRecord, Manifest, Output, write_text
from sos_dask.storage.manifest import footer_bytes, sha256_of_file

BUILDER = "sos-dask"
PROPERTIES = "hats.properties"
COLLECTION = "collection.properties"
PARTITION_INFO = "partition_info.csv"
COMMON_METADATA = "dataset/_common_metadata"
NOT_A_CATALOG = "Ask who made it, or make it again with hats-import or LSDB."
ROW_GROUP_ROWS = 1 << 15

_WITH_BOUNDS = (HEALPIX_COLUMN, "ra", "dec", "pmra", "pmdec", "position_epoch", *LABELS)


# -- folders of catalogs --------------------------------------------------------------------------


def partition_path(pixel: HealpixPixel) -> str:
    """Path of a partition, relative to its catalog."""
    folder = pixel.pixel // 10000 * 10000
    return f"dataset/Norder={pixel.order}/Dir={folder}/Npix={pixel.pixel}.parquet"


def properties_file(path: Path) -> Path:
    """Path of the properties of a catalog; HATS of 2024 named them otherwise."""
    old = path / "properties"
    return old if old.is_file() and not (path / PROPERTIES).is_file() else path / PROPERTIES


def require_sources(path: Path, properties: Mapping[str, str]) -> None:
    """Refuse a HATS product that is not a list of stars or observations."""
    kind = properties.get("dataproduct_type", "object").lower()
    if kind not in ("object", "source"):
        of = [
            properties[name]
            for name in ("hats_primary_table_url", "hats_assn_join_table_url")
            if name in properties
        ]
        raise CatalogError(
            f"{path}: its dataproduct_type is {kind}: a catalog of stars or observations is needed",
            f"Give the catalog that it belongs to: {' or '.join(of)}." if of else "",
        )


def read_properties(path: Path) -> dict[str, str]:
    """Read a Java-style properties file.

    Raises
    ------
    CatalogError
        It cannot be read, or is no text.
    """
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


def listed(path: Path) -> list[dict[str, str]]:
    """Lines of ``partition_info.csv``, none where it is missing."""
    info = path / PARTITION_INFO
    try:
        with info.open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise CatalogError(f"{info} cannot be read: {error!r}") from None


def pixel_of(row: Mapping[str, str], path: Path) -> HealpixPixel:
    """Pixel of a line of the ``partition_info.csv`` of a catalog."""
    try:
        return HealpixPixel(int(row["Norder"]), int(row["Npix"]))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CatalogError(f"{path / PARTITION_INFO} cannot be read: {error!r}") from None


# -- writing --------------------------------------------------------------------------------------


def parquet_settings(schema: pa.Schema) -> dict[str, Any]:
    """Arguments of `pyarrow.parquet.write_table` that suit catalogs.

    Measured on LAMOST rows: integers as differences, floats with the bytes of equal significance
    side by side, and LZ4 take 0.7 times the CPU time of plain values under zstd to write, 0.6 times
    to read, and as many bytes. Dictionary encoding is for text alone: of numbers it costs several
    times the time and more bytes. Bounds of row groups are kept of positions, motions and labels
    alone: those of all columns would take a tenth of the time to write. Pages have checksums, so
    that damage is seen where it is read; they take a tenth of the time, too.
    """
    encodings = {}
    for item in schema:
        if pa.types.is_integer(item.type):
            encodings[item.name] = "DELTA_BINARY_PACKED"
        elif pa.types.is_floating(item.type):
            encodings[item.name] = "BYTE_STREAM_SPLIT"
    return {
        "row_group_size": ROW_GROUP_ROWS,
        "write_batch_size": ROW_GROUP_ROWS,  # the same bytes in less time than in small steps
        "compression": "lz4",
        "write_page_checksum": True,
        "use_dictionary": [item.name for item in schema if pa.types.is_string(item.type)],
        "column_encoding": encodings,
        "write_statistics": [name for name in _WITH_BOUNDS if name in schema.names],
    }


def write_parquet(table: pa.Table, path: Path) -> int:
    """Write a table the way all partitions are written; returns its rows."""
    table = table.replace_schema_metadata(described(table.schema).metadata)
    pq.write_table(table, path, **parquet_settings(table.schema))
    return int(table.num_rows)


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

    def save_schema(path: Path) -> int:
        pq.write_metadata(described(schema), path)
        return 0

    return (
        output.write_bytes(root + PROPERTIES, f"# HATS catalog\n{text}".encode()),
        output.write_bytes(root + PARTITION_INFO, info.getvalue().encode()),
        output.write_file(root + COMMON_METADATA, save_schema),
    )


def write_collection(directory: Path, name: str, primary: str, margins: Sequence[str]) -> str:
    """Write ``collection.properties``: a primary catalog with margins; SHA-256 of the file."""
    lines = [f"obs_collection={name}", f"hats_primary_table_url={primary}"]
    if margins:
        lines += [f"all_margins={' '.join(margins)}", f"default_margin={margins[0]}"]
    write_text(directory / COLLECTION, "# HATS collection\n" + "\n".join(lines) + "\n")
    return sha256_of_file(directory / COLLECTION)


# -- reading --------------------------------------------------------------------------------------


@contextmanager
def partition_errors(path: Path) -> Iterator[None]:
    """Turn a failed read of a Parquet file into a `PartitionError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise PartitionError(
            f"partition {path} is missing", "Remove its catalog and make it again."
        ) from None
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise PartitionError(
            f"partition {path} cannot be read: {error}",
            "The file is damaged: remove its catalog and make it again.",
        ) from error


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
        require_sources(catalog.path, catalog.properties)
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
        manifest = None
        if is_ours(path):
            manifest = Manifest.load(path)
        if not properties_file(path).is_file():
            raise CatalogError(f"{path} is not a catalog: it has no {PROPERTIES}")
        properties = read_properties(properties_file(path))
        if key and manifest is not None and key not in KEYS:
            raise CatalogError(
                f"{path} was made by sos-dask: the key of its rows is not '{key}'",
                f"Leave --key out: it is {' or '.join(KEYS)}.",
            )
        if manifest is None:
            from sos_dask.storage.foreign import open_foreign

            return open_foreign(path, properties, key, key_name)
        pixels = [pixel_of(row, path) for row in listed(path)]
        pixels.sort(key=lambda pixel: pixel.first)
        common = path / COMMON_METADATA
        if common.is_file():
            with partition_errors(common):
                schema = pq.read_schema(common)
        elif pixels:
            first = path / partition_path(pixels[0])
            with partition_errors(first):
                schema = pq.read_schema(first)
        else:
            raise CatalogError(f"{path} has no partitions and no schema")
        return cls(path, tuple(pixels), schema.remove_metadata(), properties, manifest)

    def check_account(self) -> None:
        """Compare the list of partitions, the manifest's rows and ``hats_nrows``.

        Of a catalog made by others the footers of all partitions are read.

        Raises
        ------
        CatalogError, PartitionError
        """
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
                    f"{self.path} has no column '{name}'",
                    nearest(name, self.schema.names),
                )

    def read(
        self, pixel: HealpixPixel, columns: Sequence[str] | None = None, *, coded: bool = False
    ) -> pa.Table:
        """Rows of one partition.

        Parameters
        ----------
        columns : sequence of str, optional
            Default all.
        coded : bool
            Text of few different values as codes and their dictionary: a fifth of the time.

        Raises
        ------
        PartitionError
            The file is missing, damaged or lacks a column.
        """
        text = _text_of_few_values(self._footer(pixel)) if coded else []
        with self._opened(pixel, text) as file:
            table = file.read(columns=columns, use_threads=False)
            if columns is None or len(columns):
                self._require_rows(pixel, table.num_rows)
            return table

    def _require_rows(self, pixel: HealpixPixel, n_rows: int) -> None:
        """Raise `PartitionError` unless a partition has the rows that the manifest states."""
        stated = self.stated.get(partition_path(pixel))
        if stated is not None and stated.rows != n_rows:
            raise PartitionError(
                f"partition {self.partition_file(pixel)} has {n_rows} rows, the manifest states "
                f"{stated.rows}",
                "Remove its catalog and make it again.",
            )

    @contextmanager
    def _opened(self, pixel: HealpixPixel, coded: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
        path, footer = self.partition_file(pixel), self._footer(pixel)
        # Without a buffer for all columns together: measured, it costs a quarter of the time.
        with (
            partition_errors(path),
            pa.OSFile(str(path)) as source,
            pq.ParquetFile(
                source,
                metadata=footer,
                pre_buffer=False,
                read_dictionary=coded,
                page_checksum_verification=True,
            ) as file,
        ):
            yield file

    def rows_in(
        self,
        pixel: HealpixPixel,
        ranges: Ranges,
        *,
        wanted: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None = None,
    ) -> NDArray[np.int64]:
        """Row numbers of a partition whose ``_healpix_29`` lies in one of the ranges.

        Nothing but the cells is read, and only of row groups that lie partly in the ranges.

        Parameters
        ----------
        ranges : list of (first, stop)
            Half-open, sorted, disjoint.
        wanted : callable, optional
            Which of the cells that lie in the ranges are wanted.

        Returns
        -------
        ndarray of int64
            Ascending.

        Raises
        ------
        PartitionError
            The partition is damaged, or not sorted on the sky.
        """
        found = [np.empty(0, dtype=np.int64)]
        starts, stops = _edges(ranges)
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
                        rows = _between(cells, starts, stops)
                        if wanted is not None:
                            rows = rows[wanted(cells[rows])]
                        found.append(first + rows)
                first += n_rows
        return np.concatenate(found)

    def cells(self, pixel: HealpixPixel) -> NDArray[np.int64]:
        """The ``_healpix_29`` of all rows of a partition, ascending.

        Raises
        ------
        PartitionError
            The partition is damaged, or not sorted on the sky.
        """
        return self._in_order(pixel, self.read(pixel, [HEALPIX_COLUMN]))

    def _in_order(self, pixel: HealpixPixel, rows: pa.Table) -> NDArray[np.int64]:
        cells: NDArray[np.int64] = rows[HEALPIX_COLUMN].to_numpy()
        if np.any(cells[1:] < cells[:-1]):
            raise PartitionError(f"{self.partition_file(pixel)} is not sorted by {HEALPIX_COLUMN}")
        return cells

    def take(
        self, pixel: HealpixPixel, rows: NDArray[np.int64], columns: Sequence[str]
    ) -> pa.Table:
        """Some rows of a partition; row groups without any of them are not read.

        Parameters
        ----------
        rows : ndarray of int64
            Row numbers, ascending, each once.
        """
        tables = []
        with self._opened(pixel) as file:
            first = 0
            for number in range(file.metadata.num_row_groups):
                n_rows = file.metadata.row_group(number).num_rows
                low, high = np.searchsorted(rows, (first, first + n_rows))
                if low < high:
                    table = file.read_row_group(number, list(columns), use_threads=False)
                    if high - low < n_rows:
                        table = table.take(pa.array(rows[low:high] - first))
                    tables.append(table)
                first += n_rows
        return pa.concat_tables(tables or [self._no_rows(columns)])

    def _no_rows(self, columns: Sequence[str]) -> pa.Table:
        return pa.schema([self.schema.field(name) for name in columns]).empty_table()

    def overlapping(self, ranges: Ranges) -> list[HealpixPixel]:
        """Partitions that meet one of the ranges (sorted, disjoint), in the order of the sky."""
        starts, stops = _edges(ranges)
        at = np.searchsorted(stops, self._firsts, side="right")
        meets = at < len(starts)
        meets[meets] = starts[at[meets]] < self._stops[meets]
        return [self.pixels[number] for number in np.flatnonzero(meets)]

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        return np.array([pixel.first for pixel in self.pixels], dtype=np.int64)

    @cached_property
    def _stops(self) -> NDArray[np.int64]:
        return np.array([pixel.stop for pixel in self.pixels], dtype=np.int64)

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
            footer = _footer_of(path, "" if stated is None else stated.footer)
        self._require_rows(pixel, footer.num_rows)
        return footer


def _edges(ranges: Ranges) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and stops of ranges."""
    return (
        np.array([first for first, _ in ranges], dtype=np.int64),
        np.array([stop for _, stop in ranges], dtype=np.int64),
    )


def _between(
    cells: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Places of ascending cells that lie between the starts and stops."""
    low, high = np.searchsorted(cells, starts), np.searchsorted(cells, stops)
    count = high - low
    return np.arange(count.sum()) + np.repeat(high - np.cumsum(count), count)


def row_group_bounds(footer: pq.FileMetaData, column: str) -> list[tuple[Any, Any]]:
    """Minimum and maximum of a column in each row group; (None, None) where all is null.

    Raises
    ------
    PartitionError
        The footer holds no statistics although there are values.
    """
    index = footer.schema.names.index(column) if column in footer.schema.names else -1
    if index < 0:
        raise PartitionError(f"a partition has no column '{column}'")
    out: list[tuple[Any, Any]] = []
    for number in range(footer.num_row_groups):
        statistics = footer.row_group(number).column(index).statistics
        if statistics is not None and statistics.has_min_max:
            out.append((statistics.min, statistics.max))
        elif statistics is not None and statistics.null_count == footer.row_group(number).num_rows:
            out.append((None, None))
        elif column == HEALPIX_COLUMN:
            out.append((0, (12 << 58) - 1))  # unknown: anywhere
        else:
            raise PartitionError(f"a partition has no statistics of column '{column}'")
    return out


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


def _footer_of(path: Path, sha256: str) -> pq.FileMetaData:
    """Footer of a file; the last few are kept, for tasks read their partitions in several steps."""
    found = path.stat()
    return _kept_footer(str(path), found.st_mtime_ns, found.st_size, sha256)


@lru_cache(maxsize=16)
def _kept_footer(path: str, stamp: int, size: int, sha256: str) -> pq.FileMetaData:
    content = footer_bytes(Path(path))
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise OSError("its footer is not the one that was written")
    return pq.read_metadata(pa.BufferReader(content))


@lru_cache(maxsize=8)
def _reopen(path: str, stamp: int) -> Catalog:
    return Catalog.read_only(path)

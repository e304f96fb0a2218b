"""Catalogs on disk: HEALPix-partitioned Parquet in the HATS layout.

The layout is that of the IVOA note "HATS" (Caplar et al. 2025, arXiv 2501.02103): one Parquet file
a pixel under ``dataset/Norder=K/Dir=D/Npix=N.parquet``, sorted by ``_healpix_29``, with
``hats.properties``, ``partition_info.csv`` and ``dataset/_common_metadata`` beside it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.artifact import (
    MANIFEST,
    FileRecord,
    Manifest,
    Output,
    Recipe,
    atomic_path,
    sha256_of_file,
)
from sos_dask.errors import CatalogError, PartitionError
from sos_dask.healpix import HealpixPixel, Ranges, in_ranges
from sos_dask.schema import HEALPIX_COLUMN, nearest

ROW_GROUP_ROWS = 1 << 16
PROPERTIES = "hats.properties"
PARTITION_INFO = "partition_info.csv"
COMMON_METADATA = "dataset/_common_metadata"


def partition_path(pixel: HealpixPixel) -> str:
    """Path of a partition, relative to its catalog."""
    folder = pixel.pixel // 10000 * 10000
    return f"dataset/Norder={pixel.order}/Dir={folder}/Npix={pixel.pixel}.parquet"


def write_parquet(table: pa.Table, path: Path) -> int:
    """Write a table the way all partitions are written; returns its rows.

    Dictionary encoding is for text alone: of numbers it costs ten times the time and more bytes.
    """
    text = [f.name for f in table.schema if pa.types.is_string(f.type)]
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        compression_level=1,
        use_dictionary=text,
        write_statistics=True,
    )
    return int(table.num_rows)


def write_partition(
    output: Output, pixel: HealpixPixel, table: pa.Table, root: str = ""
) -> FileRecord:
    """Write one partition atomically below an output (in its folder ``root``)."""
    return output.write_file(root + partition_path(pixel), lambda path: write_parquet(table, path))


@contextmanager
def partition_errors(path: Path) -> Iterator[None]:
    """Turn a failed read of a Parquet file into a `PartitionError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise PartitionError(
            f"partition {path} is missing", "Remove its catalog and make it again."
        ) from None
    except (pa.ArrowInvalid, pa.ArrowException, OSError, EOFError) as error:
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
    def open(cls, path: str | Path) -> Catalog:
        """Open a catalog, or the primary catalog of a HATS collection.

        Raises
        ------
        CatalogError
            Not there, unfinished, damaged or of a newer format.
        """
        path = Path(path)
        collection = path / "collection.properties"
        if collection.is_file() and not (path / PROPERTIES).is_file():
            return cls.open(path / read_properties(collection)["hats_primary_table_url"])
        manifest = None
        if (path / MANIFEST).is_file() or not (path / PROPERTIES).is_file():
            manifest = Manifest.load(path)
        if not (path / PROPERTIES).is_file():
            raise CatalogError(f"{path} is not a catalog: it has no {PROPERTIES}")
        properties = read_properties(path / PROPERTIES)
        info = path / PARTITION_INFO
        try:
            with info.open(newline="") as file:
                pixels = [
                    HealpixPixel(int(row["Norder"]), int(row["Npix"]))
                    for row in csv.DictReader(file)
                ]
        except (OSError, KeyError, ValueError) as error:
            raise CatalogError(f"{info} cannot be read: {error!r}") from None
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

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        # A task carries only the path; each worker opens the catalog once.
        known = self.path / (MANIFEST if self.manifest is not None else PROPERTIES)
        return _reopen, (str(self.path), known.stat().st_mtime_ns)

    @property
    def name(self) -> str:
        """Name of the catalog."""
        return self.properties.get("obs_collection", self.path.name)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the catalog, for the recipes of what is made from it."""
        if self.manifest is not None:
            return self.manifest.fingerprint
        content = [
            sha256_of_file(self.path / partition_path(pixel)) for pixel in self.pixels
        ]  # made by others: its content is all there is to go by
        return Recipe("foreign", 1, {"content": content}, {}).fingerprint

    @property
    def n_rows(self) -> int:
        """Rows of all partitions."""
        return sum(self.partition_rows(pixel) for pixel in self.pixels)

    def partition_rows(self, pixel: HealpixPixel) -> int:
        """Rows of one partition."""
        stated = self._stated_rows.get(partition_path(pixel))
        return int(self._footer(pixel).num_rows) if stated is None else stated

    @cached_property
    def _stated_rows(self) -> dict[str, int]:
        files = self.manifest.files if self.manifest is not None else ()
        return {record.path: record.rows for record in files}

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

    def read(self, pixel: HealpixPixel, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of one partition.

        Raises
        ------
        PartitionError
            The file is missing, damaged or lacks a column.
        """
        path = self.partition_file(pixel)
        with partition_errors(path), pq.ParquetFile(path) as file:
            return file.read(columns=columns, use_threads=False)

    def read_ranges(self, ranges: Ranges, columns: Sequence[str]) -> pa.Table:
        """Rows whose ``_healpix_29`` lies in one of the half-open ranges (sorted, disjoint).

        Only row groups that can hold such rows are read; ``columns`` must name ``_healpix_29``.
        """
        tables = []
        starts = np.array([first for first, _ in ranges], dtype=np.int64)
        stops = np.array([stop for _, stop in ranges], dtype=np.int64)
        for pixel in self.pixels:
            if not _any_overlap(starts, stops, pixel.first, pixel.stop - 1):
                continue
            path = self.partition_file(pixel)
            with partition_errors(path), pq.ParquetFile(path) as file:
                bounds = row_group_bounds(file.metadata, HEALPIX_COLUMN)
                groups = [
                    number
                    for number, (low, high) in enumerate(bounds)
                    if _any_overlap(starts, stops, low, high)
                ]
                if not groups:
                    continue
                table = file.read_row_groups(groups, columns=list(columns), use_threads=False)
            cells = table[HEALPIX_COLUMN].to_numpy()
            tables.append(table.filter(pa.array(in_ranges(cells, ranges))))
        if not tables:
            fields = [self.schema.field(name) for name in columns]
            return pa.schema(fields).empty_table()
        return pa.concat_tables(tables)

    def bounds(self, column: str) -> tuple[float, float] | None:
        """Smallest and largest value of a column, read from the footers; None if all is null."""
        lows, highs = [], []
        for pixel in self.pixels:
            for low, high in row_group_bounds(self._footer(pixel), column):
                if low is not None:
                    lows.append(float(low))
                    highs.append(float(high))
        return (min(lows), max(highs)) if lows else None

    def largest_partition(self) -> tuple[HealpixPixel, int]:
        """The partition with most bytes in memory, and those bytes (by the footers)."""
        sizes = {}
        for pixel in self.pixels:
            footer = self._footer(pixel)
            groups = (footer.row_group(number) for number in range(footer.num_row_groups))
            sizes[pixel] = sum(group.total_byte_size for group in groups)
        pixel = max(sizes, key=lambda pixel: sizes[pixel])
        return pixel, sizes[pixel]

    def _footer(self, pixel: HealpixPixel) -> pq.FileMetaData:
        path = self.partition_file(pixel)
        with partition_errors(path):
            return pq.read_metadata(path)


def _any_overlap(starts: NDArray[np.int64], stops: NDArray[np.int64], low: int, high: int) -> bool:
    """Whether the closed interval [low, high] meets any of the half-open ranges."""
    index = int(np.searchsorted(stops, low, side="right"))
    return index < len(starts) and bool(starts[index] <= high)


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


def read_properties(path: Path) -> dict[str, str]:
    """Read a Java-style properties file."""
    properties = {}
    for line in path.read_text().splitlines():
        if line.strip() and not line.lstrip().startswith(("#", "!")):
            key, _, value = line.partition("=")
            properties[key.strip()] = value.strip().replace("\\:", ":")
    return properties


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
        "hats_builder": "sos-dask",
        **(extra or {}),
    }
    text = "".join(f"{key}={value}\n" for key, value in properties.items())
    info = io.StringIO()
    writer = csv.writer(info, lineterminator="\n")
    writer.writerow(["Norder", "Npix"])
    # Breadth first, as hats sorts them.
    writer.writerows(sorted((pixel.order, pixel.pixel) for pixel in pixels))

    def save_text(content: str) -> Any:
        def write(path: Path) -> int:
            path.write_text(content)
            return 0

        return write

    def save_schema(path: Path) -> int:
        pq.write_metadata(schema, path)
        return 0

    return (
        output.write_file(root + PROPERTIES, save_text("# HATS catalog\n" + text)),
        output.write_file(root + PARTITION_INFO, save_text(info.getvalue())),
        output.write_file(root + COMMON_METADATA, save_schema),
    )


def write_collection(directory: Path, name: str, primary: str, margins: Sequence[str]) -> None:
    """Write ``collection.properties``: a primary catalog with margins, paths relative to it."""
    lines = [f"obs_collection={name}", f"hats_primary_table_url={primary}"]
    if margins:
        lines += [f"all_margins={' '.join(margins)}", f"default_margin={margins[0]}"]
    with atomic_path(directory / "collection.properties") as path:
        path.write_text("# HATS collection\n" + "\n".join(lines) + "\n")


@lru_cache(maxsize=8)
def _reopen(path: str, stamp: int) -> Catalog:
    return Catalog.open(path)

"""Catalogs on disk: HEALPix-partitioned Parquet in the HATS layout, ours and those of others.

The layout is that of the IVOA note "HATS" (Caplar et al. 2025, arXiv 2501.02103): one Parquet file
a pixel under ``dataset/Norder=K/Dir=D/Npix=N.parquet``, sorted by ``_healpix_29``, with
``hats.properties``, ``partition_info.csv`` and ``dataset/_common_metadata`` beside it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain, islice, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sos_dask.columns import BoolArray, IntArray, KeyArray, key_hashes
from sos_dask.errors import CatalogError, PartitionError
from sos_dask.schema import HEALPIX_COLUMN, KEYS, described, nearest
from sos_dask.sky.healpix import HealpixPixel, Ranges
from sos_dask.sky.neighbours import runs
from sos_dask.storage import hats, parts
from sos_dask.storage.artifact import (
    Output,
    footer_of,
    open_parquet,
    partition_errors,
    row_group_bounds,
    stamp_of,
    taken,
    write_parquet,
    write_text,
)
from sos_dask.storage.hats import COLLECTION, COMMON_METADATA, PARTITION_INFO, PROPERTIES
from sos_dask.storage.manifest import MANIFEST, FileRecord, Manifest, Recipe, sha256_of_file
from sos_dask.storage.objects import as_path, at_once

_KEYS_AT_ONCE = 20_000_000


# -- writing --------------------------------------------------------------------------------------


def write_partition(output: Output, pixel: HealpixPixel, table: pa.Table) -> FileRecord:
    """Write one partition atomically."""
    return output.write_file(hats.partition_path(pixel), lambda path: write_parquet(table, path))


def write_catalog_metadata(
    output: Output,
    name: str,
    pixels: Sequence[HealpixPixel],
    schema: pa.Schema,
    n_rows: int,
    *,
    catalog_type: str,
    extra: Mapping[str, str] | None,
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
        "hats_builder": hats.BUILDER,
        **(extra or {}),
    }
    text = "".join(f"{key}={value}\n" for key, value in properties.items())
    # Breadth first, as hats sorts them.
    rows = sorted((pixel.order, pixel.pixel) for pixel in pixels)
    info = "Norder,Npix\n" + "".join(f"{order},{pixel}\n" for order, pixel in rows)
    common = io.BytesIO()
    pq.write_metadata(described(schema), common)
    return (
        output.write_bytes(PROPERTIES, f"# HATS catalog\n{text}".encode()),
        output.write_bytes(PARTITION_INFO, info.encode()),
        output.write_bytes(COMMON_METADATA, common.getvalue()),
    )


def write_collection(directory: Path, name: str, primary: str, margin: str) -> str:
    """Write ``collection.properties``: a primary catalog with a margin; SHA-256 of the file."""
    text = f"obs_collection={name}\nhats_primary_table_url={primary}\n"
    text += f"all_margins={margin}\ndefault_margin={margin}\n"
    write_text(directory / COLLECTION, f"# HATS collection\n{text}")
    return sha256_of_file(directory / COLLECTION)


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Catalog:
    """A catalog on disk: a handle without rows, which travels to tasks as a path.

    ``pixels`` are the partitions in the order of the sky curve, ``properties`` the content of
    ``hats.properties``. A catalog of another program is read as if it were ours: see
    `sos_dask.storage.hats`. It has no manifest; what follows that belongs to such a one alone.
    """

    path: Path
    pixels: tuple[HealpixPixel, ...]
    schema: pa.Schema
    properties: Mapping[str, str] = field(default_factory=dict)
    manifest: Manifest | None = None
    key: str = ""  # the column that was given as key
    key_name: str = ""  # its name here
    # Names of the columns in the files by their names here, without a computed ``_healpix_29``.
    stored: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[HealpixPixel, tuple[Path, ...]] = field(default_factory=dict)
    known_as_written: bool = False  # set in tasks, whose driver has looked at every row

    @classmethod
    def open(cls, path: str | Path, *, key: str = "", key_name: str = "star_id") -> Catalog:
        """Open a catalog, or the primary catalog of a HATS collection, and check it.

        Its small files are compared with the manifest by bytes and SHA-256, partitions by bytes;
        the account of rows, the properties and the list of partitions must say the same. Of a
        catalog made by another program, ``key`` is the column whose integers or texts name its
        rows, and ``key_name`` the name that it gets, ``star_id`` or ``obs_id``.

        Raises `CatalogError`: not there, unfinished, damaged, of another format or type (as a
        margin), or not as its manifest says.
        """
        catalog = cls.read_only(path, key=key, key_name=key_name)
        hats.require_kind(catalog.path, catalog.properties, "object", "source")
        hint = hats.NOT_A_CATALOG
        if catalog.manifest is not None:
            Manifest.checked(catalog.path)
            hint = f"Restore its files, or remove {catalog.path} and make it again."
        for problem in catalog.problems():
            raise CatalogError(f"{catalog.path}: {problem}", hint)
        return catalog

    @classmethod
    def read_only(cls, path: str | Path, *, key: str = "", key_name: str = "star_id") -> Catalog:
        """Open a catalog without the checks of `open`: tasks do, whose driver has made them."""
        path = as_path(path)
        collection, file = path / COLLECTION, hats.properties_file(path)
        if collection.is_file() and not file.is_file():
            return cls.read_only(path / hats.primary_of(collection), key=key, key_name=key_name)
        manifest = Manifest.load(path) if hats.is_ours(path) else None
        if not file.is_file():
            raise CatalogError(f"{path} is not a catalog: it has no {PROPERTIES}")
        properties = hats.read_properties(file)
        hats.require_kind(path, properties, "object", "source", "margin")  # of `verify`
        pixels = [pixel for pixel, _ in hats.listed(path)]
        first = [path / hats.partition_path(pixel) for pixel in pixels[:1]]
        more: tuple[Any, ...] = (manifest,)
        if manifest is None:
            files = hats.files_by_pixel(path, properties)
            pixels = pixels if (path / PARTITION_INFO).is_file() else list(files)
            files = {pixel: files[pixel] for pixel in pixels if pixel in files}
            whole = hats.first_schema(path, *chain(*files.values()), path / COMMON_METADATA)
            schema, stored = hats.columns_here(path, whole, properties, key, key_name)
            properties |= {"hats_col_ra": "ra", "hats_col_dec": "dec"}  # as columns are named here
            more = (None, key, key_name, stored, files)
        elif key and key not in KEYS:
            what = f"{path} was made by sos-dask: the key of its rows is not '{key}'"
            raise CatalogError(what, f"Leave --key out: it is {' or '.join(KEYS)}.")
        else:
            schema = hats.first_schema(path, path / COMMON_METADATA, *first)
        in_order = tuple(sorted(pixels, key=attrgetter("first")))
        return cls(path, in_order, schema, properties, *more)

    def problems(self) -> Iterator[str]:
        """Compare the list of partitions with the files, and the rows that all of these state."""
        if self.stored:
            known = set(chain.from_iterable(self.files.values()))
            for file in hats.data_files(self.path):
                if file not in known:
                    yield f"{PARTITION_INFO} does not list {file.relative_to(self.path)}"
            for pixel, told in hats.listed(self.path):
                if told and told.strip() != str(self.partition_rows(pixel)):
                    have = f"its files have {self.partition_rows(pixel)}"
                    yield f"{PARTITION_INFO} states {told} rows of partition {pixel}, {have}"
        for left, right in pairwise(self.pixels):
            if left.overlaps(right):
                yield f"{PARTITION_INFO}: pixels {left} and {right} overlap"
        if self.manifest is not None:
            named = {hats.partition_path(pixel) for pixel in self.pixels}
            written = {name for name, record in self.stated.items() if record.is_partition}
            for name in sorted(named ^ written):
                yield f"{name} is in only one of {MANIFEST} and {PARTITION_INFO}"
            n_out = self.manifest.rows.n_out
            if self.n_rows != n_out:
                yield f"{MANIFEST} states {n_out} rows out, its partitions have {self.n_rows}"
        told = self.properties.get("hats_nrows", str(self.n_rows))
        if told != str(self.n_rows):
            have = f"the partitions of {PARTITION_INFO} have {self.n_rows} rows"
            yield f"{PROPERTIES} states hats_nrows={told[:40]}, {have}"
        if not self.pixels and any((self.path / "dataset").rglob("Npix=*")):
            yield f"{PARTITION_INFO} lists none of the partitions"

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # A task carries only the path; each worker opens the catalog once.
        more = (self.key, self.key_name, bool(self.stored) and self.as_written)
        return _reopen, (str(self.path.absolute()), self._changed, *more)

    @cached_property
    def _changed(self) -> int:
        file = hats.properties_file(self.path) if self.manifest is None else self.path / MANIFEST
        return int(file.stat().st_mtime_ns)

    @property
    def as_written(self) -> bool:
        """Whether rows and columns are known to stand in the files as they are read."""
        examined = self.__dict__.get("_examined", ("", False))
        return not self.stored or self.known_as_written or examined[1]

    @property
    def has_our_columns(self) -> bool:
        """Whether columns have the same names and types in the files as here."""
        files = chain.from_iterable(self.files.values())
        return all(hats.first_schema(self.path, file).equals(self.schema) for file in files)

    @property
    def name(self) -> str:
        """Name of the catalog."""
        return self.properties.get("obs_collection", self.path.name)

    @property
    def fingerprint(self) -> str:
        """Fingerprint for the recipes of what is made from the catalog.

        Of a catalog of another program, of its content and of the names by which it is read; an
        error where a key is null or occurs twice, or a row has no position in its pixel.
        """
        return self._examined[0] if self.manifest is None else self.manifest.fingerprint

    @cached_property
    def _examined(self) -> tuple[str, bool]:
        """The fingerprint, and whether the files can be read like our own; looks at every row."""
        content, as_written = [], self.has_our_columns
        for pixel in self.pixels:
            files = self.files_of(pixel)
            for file in files:
                with partition_errors(file):
                    content.append(sha256_of_file(file))
            as_written &= self._order(pixel).as_written and files == (self.partition_file(pixel),)
        for name in self.columns(KEYS)[:1]:
            self._require_unique(name)
        pixels = [str(pixel) for pixel in self.pixels]
        params = {"content": content, "pixels": pixels, "columns": dict(self.stored)}
        return Recipe("foreign", 2, params, {}).fingerprint, as_written

    def _require_unique(self, name: str) -> None:
        """Refuse nulls and repeats in a key, some values at a time where there are very many."""
        key, kind = f"the key '{self.stored[name]}'", self.schema.field(name).type
        hint = "Give the column that names each row: --key NAME."
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind)):
            what = f"{key} has type {kind}: integers or text are needed"
            raise CatalogError(f"{self.path}: {what}", hint)

        def keys_of(pixel: HealpixPixel) -> tuple[pa.ChunkedArray, KeyArray]:
            where = f"{self.path}, partition {pixel}"
            try:
                keys = hats.column_of(self.files_of(pixel), self.stored[name]).cast(kind)
            except pa.ArrowInvalid as error:
                what = f"{where}: {key} does not fit into 64 bits with a sign: {error}"
                raise CatalogError(what, hint) from None
            if keys.null_count:
                row = pc.index(keys.is_null(), True).as_py()
                raise CatalogError(f"{where}, row {row}: {key} is null", hint)
            return keys, key_hashes(keys)

        n_parts = 1 + self.n_rows // _KEYS_AT_ONCE
        for part in range(n_parts):
            hashes = [h[h % n_parts == part] for _, h in map(keys_of, self.pixels)]
            some = np.sort(np.concatenate(hashes or [[]]))
            again = some[1:][some[1:] == some[:-1]]
            for keys, found in map(keys_of, self.pixels if len(again) else ()):
                for row in np.flatnonzero(found == again[0])[:1]:
                    what = f"has the value {keys[int(row)].as_py()!r} in more than one row"
                    raise CatalogError(f"{self.path}: {key} {what}", hint)

    @property
    def n_rows(self) -> int:
        """Rows of all partitions."""
        return sum(map(self.partition_rows, self.pixels))

    def partition_rows(self, pixel: HealpixPixel) -> int:
        """Rows of one partition."""
        stated = self.stated.get(hats.partition_path(pixel))
        return stated.rows if stated else sum(one.num_rows for one in self._footers(pixel))

    @cached_property
    def stated(self) -> dict[str, FileRecord]:
        """Files that the manifest names, by their path; none without a manifest."""
        return {record.path: record for record in self.manifest.files} if self.manifest else {}

    def partition_file(self, pixel: HealpixPixel) -> Path:
        """Path of one partition."""
        return self.path / hats.partition_path(pixel)

    def files_of(self, pixel: HealpixPixel) -> tuple[Path, ...]:
        """Files of one partition: one, but for some catalogs of other programs."""
        return self.files.get(pixel) or (self.partition_file(pixel),)

    def columns(self, names: Iterable[str]) -> list[str]:
        """Those of the names that the catalog has, in the given order."""
        return [name for name in names if name in self.schema.names]

    def require(self, *names: str) -> None:
        """Raise `CatalogError` for the first column that is missing."""
        for name in names:
            if name not in self.schema.names:
                hint = nearest(name, self.schema.names)
                raise CatalogError(f"{self.path} has no column '{name}'", hint)

    def read(
        self, pixel: HealpixPixel, columns: Sequence[str] | None = None, *, coded: bool = False
    ) -> pa.Table:
        """Read one partition, by default all columns.

        With ``coded``, text of few different values comes as codes and their dictionary, in a fifth
        of the time. Raises `PartitionError` where the file is missing, damaged or lacks a column.
        """
        if not self.as_written:
            return self._sorted(pixel, self.schema.names if columns is None else columns)
        text = _text_of_few_values(self._footers(pixel)[0]) if coded else []
        with self._opened(pixel, text) as file:
            return file.read(columns=columns, use_threads=False)

    def _opened(
        self, pixel: HealpixPixel, coded: Sequence[str] = ()
    ) -> AbstractContextManager[pq.ParquetFile]:
        return open_parquet(self.partition_file(pixel), self._footers(pixel)[0], coded)

    def rows_in(
        self,
        pixel: HealpixPixel,
        ranges: Ranges,
        *,
        wanted: Callable[[IntArray], BoolArray] | None = None,
    ) -> IntArray:
        """Find the rows of a partition whose ``_healpix_29`` lies in one of the ranges, ascending.

        Nothing but the cells is read, and only of row groups that lie partly in the ranges (sorted,
        disjoint, half-open). ``wanted`` tells which of the cells that lie in them count. Raises
        `PartitionError` where they are not sorted on the sky.
        """
        starts, stops = edges_of(ranges)

        def inside(cells: IntArray) -> IntArray:
            rows = rows_between(cells, starts, stops)
            return rows if wanted is None else rows[wanted(cells[rows])]

        if not self.as_written:
            return inside(self.cells(pixel))
        found, first = [np.empty(0, dtype=np.int64)], 0
        with self._opened(pixel) as file:
            for number, (low, high) in enumerate(row_group_bounds(file.metadata, HEALPIX_COLUMN)):
                n_rows = file.metadata.row_group(number).num_rows
                at = int(np.searchsorted(stops, low, side="right"))
                if at < len(starts) and starts[at] <= high:
                    if wanted is None and starts[at] <= low and high < stops[at]:
                        rows = np.arange(n_rows)
                    else:
                        group = file.read_row_group(number, [HEALPIX_COLUMN], use_threads=False)
                        rows = inside(self._in_order(pixel, group))
                    found.append(first + rows)
                first += n_rows
        return np.concatenate(found)

    def cells(self, pixel: HealpixPixel) -> IntArray:
        """Read the ``_healpix_29`` of all rows of a partition; an error unless they ascend."""
        if not self.as_written:
            return self._order(pixel).cells
        return self._in_order(pixel, self.read(pixel, [HEALPIX_COLUMN]))

    def _in_order(self, pixel: HealpixPixel, rows: pa.Table) -> IntArray:
        cells: IntArray = rows[HEALPIX_COLUMN].to_numpy()
        if np.any(cells[1:] < cells[:-1]):
            raise PartitionError(f"{self.partition_file(pixel)} is not sorted by {HEALPIX_COLUMN}")
        return cells

    def take(self, pixel: HealpixPixel, rows: IntArray, columns: Sequence[str]) -> pa.Table:
        """Read some rows of a partition, in ascending order, each once."""
        if not self.as_written:
            return self._sorted(pixel, columns).take(pa.array(rows))
        with self._opened(pixel) as file:
            tables = taken(file, rows, columns)
        return pa.concat_tables(tables or [self._no_rows(columns)])

    def _sorted(self, pixel: HealpixPixel, columns: Sequence[str]) -> pa.Table:
        """Rows of a partition of another program with our names, types and order."""
        self.require(*columns)
        order = self._order(pixel)
        schema = self._no_rows([name for name in columns if name != HEALPIX_COLUMN]).schema
        stored = [self.stored[name] for name in schema.names]
        tables = []
        for path in self.files_of(pixel) if stored else ():
            with open_parquet(path, must_have=stored) as file:
                read = file.read(stored, use_threads=False).select(stored)
            arrays = [one.cast(f.type) for one, f in zip(read.columns, schema, strict=True)]
            tables.append(pa.Table.from_arrays(arrays, schema=schema))
        found = {HEALPIX_COLUMN: pa.chunked_array([order.cells])}
        if stored:
            whole = pa.concat_tables(tables)
            whole = whole if order.rows is None else whole.take(pa.array(order.rows))
            found |= dict(zip(schema.names, whole.columns, strict=True))
        if "ra" in found:
            found["ra"] = pa.chunked_array([hats.in_circle(found["ra"].to_numpy())])
        return pa.table([found[name] for name in columns], schema=self._no_rows(columns).schema)

    def _order(self, pixel: HealpixPixel) -> hats.Order:
        key = next((name for name in KEYS if name in self.stored), "")
        names = [self.stored.get(name, "") for name in ("ra", "dec", key, HEALPIX_COLUMN)]
        is_margin = self.properties.get("dataproduct_type") == "margin"
        stamps = tuple(map(stamp_of, self.files_of(pixel)))
        return hats.order_of(stamps, None if is_margin else pixel, tuple(names))

    def _no_rows(self, columns: Sequence[str]) -> pa.Table:
        return pa.schema([self.schema.field(name) for name in columns]).empty_table()

    def overlapping(self, ranges: Ranges) -> list[HealpixPixel]:
        """Partitions that meet one of the ranges (sorted, disjoint), in the order of the sky."""
        starts, stops = edges_of(ranges)
        firsts, lasts = self._edges
        at = np.searchsorted(stops, firsts, side="right")
        meets = np.append(starts, np.iinfo(np.int64).max)[at] < lasts
        found = [self.pixels[number] for number in np.flatnonzero(meets)]
        parts.note(self.path, *map(hats.partition_path, found))
        parts.note_empty(self.path, ranges, [(one.first, one.stop) for one in found])
        return found

    @cached_property
    def _edges(self) -> IntArray:
        return edges_of([(pixel.first, pixel.stop) for pixel in self.pixels])

    def read_ranges(self, ranges: Ranges, columns: Sequence[str]) -> pa.Table:
        """Rows whose ``_healpix_29`` lies in one of the half-open ranges (sorted, disjoint).

        Of row groups without such rows nothing but the cells is read.
        """
        found = [(pixel, self.rows_in(pixel, ranges)) for pixel in self.overlapping(ranges)]
        tables = [self.take(pixel, rows, columns) for pixel, rows in found if len(rows)]
        return pa.concat_tables(tables or [self._no_rows(columns)])

    def bounds(self, *columns: str) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of columns, from one look at each footer.

        Of other programs, a column is read where it has no sound statistics. Columns that the
        catalog lacks, or that are all null, are left out.
        """
        ends: dict[str, list[float]] = {name: [] for name in self.columns(columns)}

        def of_pixel(pixel: HealpixPixel) -> list[list[float]]:
            return [self._ends(pixel, name) for name in ends]

        for found in at_once(self.path, of_pixel, self.pixels if ends else ()):
            for values, more in zip(ends.values(), found, strict=True):
                values += more
        return {name: (min(values), max(values)) for name, values in ends.items() if values}

    def null_counts(self, columns: Iterable[str]) -> dict[str, int]:
        """Count the nulls of columns by the footers of our own files, as far as these tell."""
        counts: dict[str, int] = dict.fromkeys(self.columns(columns), 0)
        footers = chain(*at_once(self.path, self._footers, self.pixels))
        for chunk in chain(*map(_chunks, footers)):
            if chunk.path_in_schema in counts:
                found = chunk.statistics
                counts[chunk.path_in_schema] += found.null_count if found is not None else 0
        return counts

    def _ends(self, pixel: HealpixPixel, name: str) -> list[float]:
        """Bounds of a column in a partition, or in each of its row groups."""
        try:
            stored = self.stored.get(name, name)
            bounds = chain(*(row_group_bounds(one, stored) for one in self._footers(pixel)))
            ends = [float(end) for end in chain(*bounds) if end is not None]
            if not self.stored or np.isfinite(ends).all():
                return ends
        except (PartitionError, TypeError, ValueError):
            if not self.stored:
                raise
        column = self.read(pixel, [name])[name].cast(pa.float64())
        ends = pc.min_max(column.filter(pc.is_finite(column))).values()
        return [end.as_py() for end in ends if end.is_valid]

    def largest_partition(self) -> tuple[HealpixPixel, int]:
        """The partition with most rows, and its bytes in memory (of text those in the file)."""
        pixel = max(self.pixels, key=self.partition_rows)
        primitive = (item for item in self.schema if pa.types.is_primitive(item.type))
        widths = {item.name: item.type.bit_width // 8 for item in primitive}
        n_bytes = 0
        for chunk in chain(*map(_chunks, self._footers(pixel))):
            width = widths.get(chunk.path_in_schema, 0)
            n_bytes += max(chunk.total_uncompressed_size, width * chunk.num_values)
        return pixel, n_bytes

    def _footers(self, pixel: HealpixPixel) -> list[pq.FileMetaData]:
        """Footers of the files of a partition, which must be those that were written."""
        name, footers = hats.partition_path(pixel), []
        parts.note(self.path, name)
        stated = self.stated.get(name)
        for path in self.files_of(pixel):
            footers.append(footer_of(stamp_of(path), stated.footer if stated else ""))
            n_rows = footers[-1].num_rows
            if stated and stated.rows != n_rows:
                what = f"has {n_rows} rows, the manifest states {stated.rows}"
                raise PartitionError(f"partition {path} {what}", "Make its catalog again.")
        return footers


def edges_of(ranges: Ranges) -> IntArray:
    """Split n ranges into their starts and their stops, shape (2, n)."""
    return np.array(ranges, dtype=np.int64).reshape(-1, 2).T.copy()


def rows_between(cells: IntArray, starts: IntArray, stops: IntArray) -> IntArray:
    """Find the places of ascending cells that lie between starts and stops."""
    low = np.searchsorted(cells, starts)
    return runs(low, np.searchsorted(cells, stops) - low)


def _chunks(footer: pq.FileMetaData) -> Iterator[pq.ColumnChunkMetaData]:
    """Chunks of the columns of all row groups."""
    for group in map(footer.row_group, range(footer.num_row_groups)):
        yield from map(group.column, range(group.num_columns))


def _text_of_few_values(footer: pq.FileMetaData) -> list[str]:
    """Columns of text that take at most two bytes a row: different values would take five."""
    first = islice(_chunks(footer), footer.num_columns)
    text = (chunk for chunk in first if chunk.physical_type == "BYTE_ARRAY")
    return [c.path_in_schema for c in text if c.total_uncompressed_size <= 2 * c.num_values]


@lru_cache(maxsize=8)
def _reopen(path: str, stamp: int, key: str, key_name: str, as_written: bool) -> Catalog:
    found = Catalog.read_only(path, key=key, key_name=key_name)
    return replace(found, known_as_written=as_written)

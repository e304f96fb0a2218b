"""HATS catalogs made by other programs, read as if they were ours.

What the properties name is followed: names of ra and dec, suffix of the files. Positions become
``ra`` and ``dec`` in float64 degrees with ra in [0, 360), the cells are computed from them, and the
rows of a partition are sorted by cell, then key. The columns of a partition that decide this are
read once a process for the last few partitions; a catalog whose files are already so is read like
our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.columns import FloatArray, IntArray, key_hashes
from sos_dask.errors import CatalogError, PartitionError
from sos_dask.schema import HEALPIX, HEALPIX_COLUMN, KEYS, nearest
from sos_dask.sky.healpix import (
    MAX_ORDER,
    HealpixPixel,
    Ranges,
    ang2pix,
    centre,
    unit_vectors,
    with_neighbours,
)
from sos_dask.storage.artifact import footer_of, open_parquet, partition_errors, taken
from sos_dask.storage.catalog import (
    COMMON_METADATA,
    NOT_A_CATALOG,
    PARTITION_INFO,
    PROPERTIES,
    Catalog,
    edges_of,
    first_schema,
    listed,
    partition_path,
    properties_file,
    read_properties,
    rows_between,
)
from sos_dask.storage.manifest import Recipe, sha256_of_file

# Positions are rounded to single precision by some writers, which can carry a row over the edge of
# its partition: it keeps the nearest cell inside. Farther out it is in the wrong file.
_PULLS_ARCSEC = (0.001, 0.05, 0.1, 0.2, 0.4, 0.8)
_KEYS_AT_ONCE = 20_000_000


class _Order(NamedTuple):
    """Cells of a partition, ascending; its rows in that order, None where they stand so."""

    cells: IntArray
    rows: IntArray | None
    as_written: bool


@dataclass(frozen=True)
class ForeignCatalog(Catalog):
    """A catalog of another program; see `Catalog` for the further parameters.

    Parameters
    ----------
    key, key_name : str
        Column that was given as key, empty for none, and its name here.
    stored : mapping of str to str
        Names of the columns in the files by their names here, without a computed ``_healpix_29``.
    files : mapping of HealpixPixel to tuple of Path
    known_as_written : bool
        Set in tasks, whose driver has looked at every row.
    """

    key: str = ""
    key_name: str = ""
    stored: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[HealpixPixel, tuple[Path, ...]] = field(default_factory=dict)
    known_as_written: bool = False

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        stamp = properties_file(self.path).stat().st_mtime_ns
        return _reopen, (str(self.path), stamp, self.key, self.key_name, self.as_written)

    @property
    def as_written(self) -> bool:
        """Whether rows and columns are known to stand in the files as they are read."""
        return self.known_as_written or ("_examined" in self.__dict__ and self._examined[1])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the content and of the names by which it is read.

        Raises an error where a key is null or occurs twice, or a row has no position in its pixel.
        """
        return self._examined[0]

    @cached_property
    def _examined(self) -> tuple[str, bool]:
        """The fingerprint, and whether the files can be read like our own; looks at every row."""
        content, as_written = [], True
        for pixel in self.pixels:
            files = self.files[pixel]
            for file in files:
                with partition_errors(file):
                    content.append(sha256_of_file(file))
            as_written &= self._order(pixel).as_written and files == (self.partition_file(pixel),)
        for name in self.columns(KEYS)[:1]:
            self._require_unique(name)
        params = {
            "content": content,
            "pixels": [str(pixel) for pixel in self.pixels],
            "columns": dict(self.stored),
        }
        return Recipe("foreign", 2, params, {}).fingerprint, as_written and self.has_our_columns

    @property
    def has_our_columns(self) -> bool:
        """Whether columns have the same names and types in the files as here."""
        return all(
            first_schema(self.path, file).equals(self.schema)
            for files in self.files.values()
            for file in files
        )

    def _require_unique(self, name: str) -> None:
        """Refuse nulls and repeats in a key, some values at a time where there are very many."""
        hint = "Give the column that names each row: --key NAME."
        kind = self.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind)):
            raise CatalogError(
                f"{self.path}: the key '{self.stored[name]}' has type {kind}: integers or text are "
                "needed",
                hint,
            )
        n_parts = 1 + self.n_rows // _KEYS_AT_ONCE
        for part in range(n_parts):
            found = [np.empty(0, dtype=np.uint64)]
            for pixel in self.pixels:
                keys = self._keys(pixel, name)
                if keys.null_count:
                    row = pc.index(keys.is_null(), True).as_py()
                    where = f"{self.path}, partition {pixel}, row {row}"
                    raise CatalogError(f"{where}: the key '{self.stored[name]}' is null", hint)
                hashes = key_hashes(keys)
                found.append(hashes[hashes % n_parts == part] if n_parts > 1 else hashes)
            hashes = np.sort(np.concatenate(found))
            again = hashes[1:][hashes[1:] == hashes[:-1]]
            for pixel in self.pixels if len(again) else ():
                keys = self._keys(pixel, name)
                at = np.flatnonzero(np.isin(key_hashes(keys), again[:1]))
                if len(at):
                    raise CatalogError(
                        f"{self.path}: the key '{self.stored[name]}' has the value "
                        f"{keys[int(at[0])].as_py()!r} in more than one row",
                        hint,
                    )

    def _keys(self, pixel: HealpixPixel, name: str) -> pa.ChunkedArray:
        """A key column in the order of the files."""
        keys = _column(self.files[pixel], self.stored[name])
        try:
            return keys.cast(self.schema.field(name).type)
        except pa.ArrowInvalid as error:
            raise CatalogError(
                f"{self.path}, partition {pixel}: the key '{self.stored[name]}' does not fit into "
                f"64 bits with a sign: {error}",
                "Give another column: --key NAME.",
            ) from None

    def check_account(self) -> None:
        """Compare the partitions with the files, ``partition_info.csv`` and ``hats_nrows``."""
        known = {file for files in self.files.values() for file in files}
        for file in data_files(self.path):
            if file not in known:
                raise CatalogError(
                    f"{self.path / PARTITION_INFO} does not list {file.relative_to(self.path)}",
                    NOT_A_CATALOG,
                )
        for pixel, n_rows in listed(self.path):
            if n_rows and n_rows.strip() != str(self.partition_rows(pixel)):
                raise CatalogError(
                    f"{self.path / PARTITION_INFO} states {n_rows} rows of partition {pixel}, its "
                    f"files have {self.partition_rows(pixel)}",
                    NOT_A_CATALOG,
                )
        super().check_account()

    def partition_rows(self, pixel: HealpixPixel) -> int:
        """Rows of one partition."""
        return sum(int(footer.num_rows) for footer in self._footers(pixel))

    def _footers(self, pixel: HealpixPixel) -> list[pq.FileMetaData]:
        footers = []
        for file in self.files[pixel]:
            with partition_errors(file):
                footers.append(footer_of(file))
        return footers

    def bounds(self, *columns: str) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of columns; of those without statistics all rows are read.

        Columns that the catalog lacks, or that are all null, are left out.
        """
        try:
            found = super().bounds(*columns)
            if np.isfinite(list(found.values())).all():
                return found
        except (PartitionError, TypeError, ValueError):
            pass
        found = {}
        for name in self.columns(columns):
            ends: list[float] = []
            for pixel in self.pixels:
                column = self.read(pixel, [name])[name].cast(pa.float64())
                both = pc.min_max(column.filter(pc.is_finite(column)))
                ends += [end.as_py() for end in both.values() if end.is_valid]
            if ends:
                found[name] = min(ends), max(ends)
        return found

    def read(
        self, pixel: HealpixPixel, columns: Sequence[str] | None = None, *, coded: bool = False
    ) -> pa.Table:
        """Rows of one partition, see `Catalog.read`."""
        if self.as_written:
            return super().read(pixel, columns, coded=coded)
        rows = np.arange(self.partition_rows(pixel))
        return self.take(pixel, rows, self.schema.names if columns is None else columns)

    def rows_in(
        self,
        pixel: HealpixPixel,
        ranges: Ranges,
        *,
        wanted: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None = None,
    ) -> NDArray[np.int64]:
        """Row numbers of a partition whose cells lie in the ranges, see `Catalog.rows_in`."""
        if self.as_written:
            return super().rows_in(pixel, ranges, wanted=wanted)
        cells = self._order(pixel).cells
        rows = rows_between(cells, *edges_of(ranges))
        return rows if wanted is None else rows[wanted(cells[rows])]

    def cells(self, pixel: HealpixPixel) -> NDArray[np.int64]:
        """The cells of all rows of a partition, ascending."""
        return super().cells(pixel) if self.as_written else self._order(pixel).cells

    def take(
        self, pixel: HealpixPixel, rows: NDArray[np.int64], columns: Sequence[str]
    ) -> pa.Table:
        """Some rows of a partition, see `Catalog.take`."""
        if self.as_written:
            return super().take(pixel, rows, columns)
        self.require(*columns)
        order = self._order(pixel)
        places = rows if order.rows is None else order.rows[rows]
        by_place = np.argsort(places, kind="stable")
        sorted_places = places[by_place]
        others = [name for name in columns if name != HEALPIX_COLUMN]
        names = [self.stored[name] for name in others]
        tables = [self._no_rows(others)]
        first = 0
        for path in self.files[pixel] if names else ():
            with _opened(path, names) as file:
                n_rows = file.metadata.num_rows
                low, high = np.searchsorted(sorted_places, (first, first + n_rows))
                for table in taken(file, sorted_places[low:high] - first, names):
                    tables.append(self._as_ours(table.select(names), others))
                first += n_rows
        found = pa.concat_tables(tables)
        if order.rows is not None and names:
            found = found.take(pa.array(np.argsort(by_place)))
        cells = pa.chunked_array([order.cells[rows]])
        arrays = [cells if name == HEALPIX_COLUMN else found[name] for name in columns]
        return pa.Table.from_arrays(arrays, schema=self._no_rows(columns).schema)

    def _as_ours(self, table: pa.Table, columns: Sequence[str]) -> pa.Table:
        """Columns of a file with the names and types that they have here."""
        schema = self._no_rows(columns).schema
        table = pa.Table.from_arrays(
            [column.cast(kind) for column, kind in zip(table.columns, schema.types, strict=True)],
            schema=schema,
        )
        if "ra" in columns:
            at, turned = schema.get_field_index("ra"), _in_circle(table["ra"].to_numpy())
            table = table.set_column(at, schema.field(at), pa.array(turned))
        return table

    def _order(self, pixel: HealpixPixel) -> _Order:
        stamps = []
        for file in self.files[pixel]:
            with partition_errors(file):
                stat = file.stat()
            stamps.append((str(file), stat.st_mtime_ns, stat.st_size))
        key = next((self.stored[name] for name in KEYS if name in self.stored), "")
        cells = self.stored.get(HEALPIX_COLUMN, "")
        inside = None if self.properties.get("dataproduct_type") == "margin" else pixel
        return _kept_order(tuple(stamps), inside, self.stored["ra"], self.stored["dec"], key, cells)


def open_foreign(
    path: Path, properties: Mapping[str, str], key: str = "", key_name: str = "star_id"
) -> ForeignCatalog:
    """Open a catalog of another program.

    Parameters
    ----------
    path : Path
    properties : mapping of str to str
    key : str
        Column of unique integers or texts that names the rows; it becomes ``key_name`` here.

    Raises
    ------
    CatalogError
        Properties, list of partitions or schema are missing, or fit neither each other nor HATS.
    """
    files = partitions_of(path, properties)
    pixels = sorted(files, key=lambda pixel: pixel.first)
    whole = first_schema(path, *(files[pixels[0]][:1] if pixels else [path / COMMON_METADATA]))
    schema, stored = _as_here(whole, properties, key, key_name, path)
    known = {**properties, "hats_col_ra": "ra", "hats_col_dec": "dec"}  # as the columns are named
    return ForeignCatalog(
        path, tuple(pixels), schema, known, None, key, key_name if key else "", stored, files
    )


def partitions_of(
    path: Path, properties: Mapping[str, str]
) -> dict[HealpixPixel, tuple[Path, ...]]:
    """Find the files of each partition; without ``partition_info.csv`` of those that are there."""
    suffix = properties.get("hats_npix_suffix", ".parquet")
    if suffix != "/" and (not suffix.startswith(".") or "/" in suffix):
        raise CatalogError(f"{path}: {PROPERTIES} states hats_npix_suffix={suffix}")
    there = _by_numbers(path, suffix)
    if not (path / PARTITION_INFO).is_file():
        return there
    found: dict[HealpixPixel, tuple[Path, ...]] = {}
    for pixel, _ in listed(path):
        if pixel in found:
            raise CatalogError(f"{path / PARTITION_INFO} lists partition {pixel} twice")
        if pixel not in there:
            raise PartitionError(
                f"partition {path / partition_path(pixel)} is missing",
                f"{PARTITION_INFO} lists it. {NOT_A_CATALOG}",
            )
        found[pixel] = there[pixel]
    return found


def _files_below(folder: Path) -> list[Path]:
    """Files of a folder but for hidden ones and metadata, in the order of their names."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith((".", "_"))
    ]


def data_files(path: Path) -> Iterator[Path]:
    """Files where HATS has partitions."""
    for place in sorted((path / "dataset").glob("Norder=*/Dir=*/Npix=*")):
        yield from [place] if place.is_file() else _files_below(place)


def _by_numbers(path: Path, suffix: str) -> dict[HealpixPixel, tuple[Path, ...]]:
    """Files of partitions in any tree, by order and pixel in their names.

    A wrong guess is refused when rows are read: they lie outside the partition.
    """
    found: dict[HealpixPixel, tuple[Path, ...]] = {}
    standard = list(data_files(path))
    pattern = r"Norder=(\d+)/.*Npix=(\d+)" if standard else r"(\d+)\D+(\d+)\D*$"
    for file in standard or _files_below(path):
        numbers = re.search(pattern, file.relative_to(path).with_suffix("").as_posix())
        in_folder = standard and file.parent.name.startswith("Npix=")
        if numbers is None or not (in_folder or file.suffix.startswith((".p", suffix))):
            continue
        order, pixel = int(numbers[1]), int(numbers[2])
        if order <= MAX_ORDER and pixel < 12 * 4**order:
            key = HealpixPixel(order, pixel)
            found[key] = (*found.get(key, ()), file)
    return found


def _as_here(
    schema: pa.Schema, properties: Mapping[str, str], key: str, key_name: str, path: Path
) -> tuple[pa.Schema, dict[str, str]]:
    """Schema by which a catalog is read, and the stored names of its columns."""
    for name in schema.names:
        if (n := schema.names.count(name)) > 1:
            raise CatalogError(f"{path}: column '{name}' is there {n} times", NOT_A_CATALOG)
    new = {properties.get(f"hats_col_{name}", name): name for name in ("ra", "dec")}
    for name, here in new.items():
        if name not in schema.names:
            raise CatalogError(
                f"{path}: {PROPERTIES} names '{name}' as {here}, which is no column",
                nearest(name, schema.names),
            )
    taken = {*new.values(), *(KEYS if key else ())}
    if key:
        if key not in schema.names or key in new:
            raise CatalogError(f"{path} has no key column '{key}'", nearest(key, schema.names))
        new[key] = key_name
    fields, stored = [], {}
    for item in schema:
        name = new.get(item.name, item.name)
        while item.name not in new and (name in taken or name in stored):
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


# -- rows -----------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path, names: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """A file that must have these columns."""
    with open_parquet(path) as file:
        for name in names:
            if name not in file.schema_arrow.names:
                raise PartitionError(f"partition {path} has no column '{name}'")
        yield file


def _column(files: Sequence[Path], name: str) -> pa.ChunkedArray:
    found = []
    for path in files:
        with _opened(path, [name]) as file:
            column = file.read([name], use_threads=False)[name]
            found.append(pa.table([column.cast(_type_here(column.type))], [name]))
    return pa.concat_tables(found)[name]


@lru_cache(maxsize=4)
def _kept_order(
    stamps: tuple[tuple[str, int, int], ...],
    pixel: HealpixPixel | None,
    ra: str,
    dec: str,
    key: str,
    cells: str,
) -> _Order:
    """Order of the rows of a partition, from the files with these sizes and times.

    They lie in the pixel, where one is given: those of a margin do not.
    """
    files = [Path(name) for name, _, _ in stamps]
    found: list[IntArray] = []
    for path in files:
        with _opened(path, [ra, dec]) as file:
            table = file.read([ra, dec], use_threads=False)
            position = _positions(table, ra, dec, path)
            found.append(ang2pix(*position) if pixel is None else _cells_of(*position, pixel, path))
    computed = np.concatenate(found)
    rows = np.argsort(computed, kind="stable")
    ordered = computed[rows]
    same = np.append(False, ordered[1:] == ordered[:-1])
    ties = np.flatnonzero(same | np.append(same[1:], False))
    if key and len(ties):
        some = rows[ties]
        keys = pc.rank(_column(files, key).take(pa.array(some)), tiebreaker="dense").to_numpy()
        rows[ties] = some[np.lexsort((some, keys, computed[some]))]
    if np.array_equal(rows, np.arange(len(rows))):
        return _Order(ordered, None, bool(cells) and _are_cells(_column(files, cells), ordered))
    return _Order(ordered, rows, False)


def _positions(table: pa.Table, ra: str, dec: str, path: Path) -> tuple[FloatArray, FloatArray]:
    """Right ascension and declination, degrees; every row must have both."""
    values = [pc.fill_null(table[name].cast(pa.float64()), np.nan).to_numpy() for name in (ra, dec)]
    bad = ~((np.abs(values[0]) <= 360) & (np.abs(values[1]) <= 90))
    if bad.any():
        row = int(np.argmax(bad))
        raise PartitionError(
            f"partition {path}, row {row}: {ra}={table[ra][row].as_py()}, "
            f"{dec}={table[dec][row].as_py()} is no position ({int(bad.sum())} such rows)",
            "Remove these rows from the catalog: no row is left out without a word.",
        )
    return values[0], values[1]


def _in_circle(ra: FloatArray) -> FloatArray:
    """Right ascension in [0, 360)."""
    if ((ra >= 0) & (ra < 360)).all():
        return ra
    turned = np.mod(ra, 360.0)
    return np.where(turned < 360, turned, 0.0)  # a tiny negative one is rounded to 360


def _cells_of(ra: FloatArray, dec: FloatArray, pixel: HealpixPixel, path: Path) -> IntArray:
    cells = ang2pix(ra, dec)
    outside = (cells < pixel.first) | (cells >= pixel.stop)
    if outside.any():
        rows = np.flatnonzero(outside)
        middle = unit_vectors(*centre(pixel))
        start = unit_vectors(ra[rows], dec[rows])
        toward = middle - start * (start @ middle.T)
        toward /= np.linalg.norm(toward, axis=1, keepdims=True)
        for pull in _PULLS_ARCSEC:
            x, y, z = (start + np.radians(pull / 3600) * toward).T
            pulled = ang2pix(
                np.degrees(np.arctan2(y, x)), np.degrees(np.arctan2(z, np.hypot(x, y)))
            )
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


@lru_cache(maxsize=8)
def _reopen(path: str, stamp: int, key: str, key_name: str, as_written: bool) -> ForeignCatalog:
    properties = read_properties(properties_file(Path(path)))
    found = open_foreign(Path(path), properties, key, key_name)
    return replace(found, known_as_written=as_written)

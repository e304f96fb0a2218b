"""Folders of HATS catalogs: properties, lists of partitions, files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from sos_dask.errors import CatalogError, ConfigError, PartitionError
from sos_dask.schema import HEALPIX_COLUMN, described
from sos_dask.sky.healpix import MAX_ORDER, HealpixPixel
from sos_dask.storage.artifact import MANIFEST, WORK, FileRecord, Output, write_text
from sos_dask.storage.digests import sha256_of_file

BUILDER = "sos-dask"
PROPERTIES = "hats.properties"
COLLECTION = "collection.properties"
PARTITION_INFO = "partition_info.csv"
COMMON_METADATA = "dataset/_common_metadata"
NOT_A_CATALOG = "Ask who made it, or make it again with hats-import or LSDB."


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


def partitions_of(
    path: Path, properties: Mapping[str, str]
) -> dict[HealpixPixel, tuple[Path, ...]]:
    """Files of each partition; without ``partition_info.csv`` those that are there."""
    suffix = properties.get("hats_npix_suffix", ".parquet")
    if suffix != "/" and (not suffix.startswith(".") or "/" in suffix):
        raise CatalogError(f"{path}: {PROPERTIES} states hats_npix_suffix={suffix}")
    pixels = [pixel_of(row, path) for row in listed(path)]
    found = {}
    elsewhere: dict[HealpixPixel, tuple[Path, ...]] | None = None
    if not (path / PARTITION_INFO).is_file():
        pixels = list(elsewhere := _by_numbers(path))
    for pixel in pixels:
        if pixel in found:
            raise CatalogError(f"{path / PARTITION_INFO} lists partition {pixel} twice")
        base = path / partition_path(pixel).removesuffix(".parquet")
        file = base if suffix == "/" else base.with_name(base.name + suffix)
        files = (file,) if file.is_file() else tuple(_files_below(file if file.is_dir() else base))
        if not files:
            if elsewhere is None:
                elsewhere = _by_numbers(path)
            files = elsewhere.get(pixel, ())
        if not files:
            raise PartitionError(
                f"partition {file} is missing", f"{PARTITION_INFO} lists it. {NOT_A_CATALOG}"
            )
        found[pixel] = files
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


def _by_numbers(path: Path) -> dict[HealpixPixel, tuple[Path, ...]]:
    """Files of partitions in any tree, by order and pixel in their names.

    A wrong guess is refused when rows are read: they lie outside the partition.
    """
    found: dict[HealpixPixel, tuple[Path, ...]] = {}
    standard = list(data_files(path))
    pattern = r"Norder=(\d+)/.*Npix=(\d+)" if standard else r"(\d+)\D+(\d+)\D*$"
    for file in standard or _files_below(path):
        numbers = re.search(pattern, file.relative_to(path).with_suffix("").as_posix())
        if numbers is None or not (standard or file.suffix.startswith(".par")):
            continue
        order, pixel = int(numbers[1]), int(numbers[2])
        if order <= MAX_ORDER and pixel < 12 * 4**order:
            key = HealpixPixel(order, pixel)
            found[key] = (*found.get(key, ()), file)
    return found


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

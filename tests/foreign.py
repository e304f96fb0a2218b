"""HATS catalogs as other programs write them."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sos_dask.api import attach, crossmatch
from sos_dask.cli import main
from sos_dask.sky.healpix import ang2pix, plan_partitions
from sos_dask.stages.attach import AttachSettings
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.storage.catalog import Catalog
from tests.skies import observations, write_catalog

SETTINGS = CrossmatchSettings(radius_arcsec=1.0, use_gaia_id=False)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: its exit code, and all that it wrote."""

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["sos-dask", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), " ".join((said.out + said.err).split())

    return command


def stars(n: int = 500, seed: int = 2) -> pa.Table:
    """Stars without cells, at the hard places of the sky, in no order."""
    table = observations(n, seed).drop_columns(["_healpix_29", "quality"])
    table = table.rename_columns(["star_id", *table.schema.names[1:]])
    return table.take(pa.array(np.random.default_rng(seed).permutation(n)))


def of_others(
    folder: Path,
    table: pa.Table,
    *,
    cells: str | None = "_healpix_29",
    order: int = 29,
    suffix: str = ".parquet",
    files: int = 1,
    in_order: bool = False,
    rows_per_partition: int = 200,
    split_by: tuple | None = None,
    path: str = "dataset/Norder={0}/Dir={1}/Npix={2}",
    **properties: str,
) -> Path:
    """Write a table, which has ra and dec, as other programs do."""
    ra, dec = split_by or (table["ra"].to_numpy(), table["dec"].to_numpy())
    place = ang2pix(ra % 360, dec)
    if in_order:
        rows = pa.array(np.lexsort((table["star_id"].to_numpy(), place)))
        table, place = table.take(rows), place[rows.to_numpy()]
    if cells:
        table = table.add_column(0, cells, pa.array(place >> 2 * (29 - order)))
    names = {properties.get(f"hats_col_{name}", name): name for name in ("ra", "dec")}
    back = {here: name for name, here in names.items()}
    table = table.rename_columns([back.get(name, name) for name in table.schema.names])
    histogram = np.bincount(place >> 2 * 21, minlength=12 * 4**8).astype(np.int64)
    pixels = plan_partitions(histogram, 8, rows_per_partition)
    lines = ["Norder,Npix,num_rows"]
    for pixel in pixels:
        part = table.filter(pa.array((place >= pixel.first) & (place < pixel.stop)))
        lines.append(f"{pixel.order},{pixel.pixel},{part.num_rows}")
        base = folder / path.format(pixel.order, pixel.pixel // 10000 * 10000, pixel.pixel)
        base.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "/":
            base.mkdir()
            step = -(-part.num_rows // files)
            for number in range(files):
                pq.write_table(part.slice(number * step, step), base / f"part{number}.parquet")
        else:
            pq.write_table(part, base.with_name(base.name + suffix), row_group_size=30)
    (folder / "partition_info.csv").write_text("\n".join(lines) + "\n")
    about = {
        "obs_collection": folder.name,
        "dataproduct_type": "object",
        "hats_nrows": str(table.num_rows),
        "hats_col_ra": "ra",
        "hats_col_dec": "dec",
        "hats_col_healpix": cells or "_healpix_29",
        "hats_col_healpix_order": str(order),
        "hats_npix_suffix": suffix,
        **properties,
    }
    write_properties(folder, about)
    (folder / "dataset").mkdir(exist_ok=True)
    pq.write_metadata(table.schema, folder / "dataset/_common_metadata")
    return folder


def write_properties(folder: Path, about: dict[str, str]) -> None:
    text = "".join(f"{key}={value}\n" for key, value in about.items())
    (folder / "hats.properties").write_text("#HATS catalog\n" + text)


def each_file(folder: Path, change) -> Path:
    for file in sorted((folder / "dataset").rglob("Npix=*.parquet")):
        pq.write_table(change(pq.ParquetFile(file).read()), file)
    (folder / "dataset/_common_metadata").unlink()
    return folder


def retyped(name: str, kind: pa.DataType):
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, table[name].cast(kind))

    return change


def pairs_of(left: Catalog, right: Catalog, folder: Path) -> pa.Table:
    crossmatch(left, right, folder, SETTINGS)
    found = Catalog.open(folder)
    table = pa.concat_tables([found.read(pixel) for pixel in found.pixels])
    names = ["target_obs_id", "reference_star_id", "separation_arcsec", "n_candidates", "teff_ref"]
    return table.select(names).sort_by([("target_obs_id", "ascending")])


def rows_of(catalog: Catalog) -> pa.Table:
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])


def named_stars() -> pa.Table:
    table = stars()
    names = [f"star {key % 7}" for key in table["star_id"].to_pylist()]
    return table.append_column("name", pa.array(names))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Targets, and what a catalog of our own gives them: pairs, attached values, rows."""
    folder = tmp_path_factory.mktemp("ours")
    left = write_catalog(observations(500, 1), folder / "left", 250)
    table = named_stars()
    cells = pa.array(ang2pix(table["ra"].to_numpy(), table["dec"].to_numpy()))
    table = table.add_column(0, "_healpix_29", cells)
    table = table.sort_by([("_healpix_29", "ascending"), ("star_id", "ascending")])
    right = write_catalog(table, folder / "right", 400)
    attach(
        left,
        right,
        folder / "attached",
        AttachSettings(columns={"t": "teff", "n": "name"}, by="position"),
    )
    pairs = pairs_of(left, right, folder / "pairs")
    assert len(pairs) > 300
    return left, pairs, rows_of(Catalog.open(folder / "attached")), rows_of(right)

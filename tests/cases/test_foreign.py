"""HATS catalogs of other programs are refused in words, and they read ours to the last digit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table

from sos_dask.api import attach, crossmatch, margin
from sos_dask.errors import CatalogError, PartitionError, SosError
from sos_dask.stages.attach import AttachSettings, MarginSettings
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.store import verify
from tests.foreign import (
    each_file,
    expected,
    of_others,
    pairs_of,
    rows_of,
    run,
    stars,
)
from tests.skies import observations, write_catalog

__all__ = ["expected", "run"]


# -- what is no catalog of stars, or damaged ------------------------------------------------------

COMMANDS = (
    "crossmatch {bad} {good} -o {out}",
    "crossmatch {good} {bad} -o {out}",
    "attach {bad} {good} -c t=teff --by position -o {out}",
    "attach {good} {bad} -c t=teff --by position -o {out}",
    "dedupe {bad} -o {out}",
    "reference a={bad} b={good} -o {out}",
    "apply {good} {bad} -o {out}",
    "train {bad} -m polynomial -o {out}",
    "coverage {good} {good} {bad} {good} -o {out}",
    "coverage {good} {good} {good} {bad} -o {out}",
)


@pytest.mark.parametrize("kind", ["margin", "association", "index", "map"])
def test_another_product_of_hats_is_refused_by_every_command(tmp_path, run, expected, kind):
    good = expected[0].path
    bad = of_others(
        tmp_path / "bad", stars(), dataproduct_type=kind, hats_primary_table_url="the_stars"
    )
    if kind != "margin":  # the others have no positions
        each_file(bad, lambda part: part.select(["star_id"]))
    for text in COMMANDS:
        words = text.format(bad=bad, good=good, out=tmp_path / "out").split()
        code, said = run(*words)
        assert code == 5, (text, said)
        assert f"dataproduct_type is {kind}" in said and "the_stars" in said
        assert not (tmp_path / "out").exists()


def test_a_margin_is_made_only_where_it_has_the_columns_of_its_catalog(tmp_path):
    table = stars()
    margin(
        Catalog.open(of_others(tmp_path / "good", table)),
        tmp_path / "margin",
        MarginSettings(radius_arcsec=60.0),
    )
    assert verify(tmp_path / "margin/margin") == []
    named = of_others(tmp_path / "named", table, hats_col_ra="RA_ICRS")
    with pytest.raises(CatalogError, match="other names or types"):
        margin(Catalog.open(named), tmp_path / "no", MarginSettings(radius_arcsec=60.0))
    assert not (tmp_path / "no").exists()


def test_observations_of_others_are_deduped_like_our_own(tmp_path, run):
    own = write_catalog(observations(300, 1), tmp_path / "own", 200)
    table = rows_of(own).drop_columns("_healpix_29")
    table = table.rename_columns(["star_id", *table.schema.names[1:]])  # as of_others sorts by it
    written = of_others(tmp_path / "other", table.take(pa.array(np.arange(300)[::-1])))
    each_file(written, lambda p: p.rename_columns(["_healpix_29", "name", *p.schema.names[2:]]))
    for path, more in ((own.path, []), (written, ["--key", "name"])):
        code, said = run("dedupe", path, "-o", tmp_path / f"{path.name}.stars", *more)
        assert code == 0, said
    stars_of = [rows_of(Catalog.open(tmp_path / f"{name}.stars")) for name in ("own", "other")]
    assert stars_of[1].cast(stars_of[0].schema).equals(stars_of[0])


def test_our_own_margin_is_refused_and_its_collection_is_the_catalog(tmp_path, expected):
    left = expected[0]
    margin(left, tmp_path / "c", MarginSettings(radius_arcsec=60.0))
    with pytest.raises(CatalogError, match="dataproduct_type is margin"):
        Catalog.open(tmp_path / "c/margin")
    assert verify(tmp_path / "c/margin") == []
    assert Catalog.open(tmp_path / "c").fingerprint == left.fingerprint


def _null(part: pa.Table) -> pa.Table:
    ra = part["ra"].to_pylist()
    return part.set_column(part.schema.get_field_index("ra"), "ra", pa.array([None, *ra[1:]]))


def _far(part: pa.Table) -> pa.Table:
    dec = -part["dec"].to_numpy()
    return part.set_column(part.schema.get_field_index("dec"), "dec", pa.array(dec))


def test_verify_reads_margins_of_others_whose_rows_lie_around(tmp_path):
    folder = of_others(tmp_path / "m", stars(), dataproduct_type="margin")
    assert verify(each_file(folder, _far)) == []


def _lost_line(folder: Path) -> Path:
    file = folder / "partition_info.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    return folder


def _lost_file(folder: Path) -> Path:
    next(folder.rglob("Npix=*.parquet")).unlink()
    return folder


def _fewer_rows(folder: Path) -> Path:
    file = next(folder.rglob("Npix=*.parquet"))
    pq.write_table(pq.ParquetFile(file).read().slice(1), file)
    return folder


def _changed(old: str, new: str):
    def change(folder: Path) -> Path:
        file = folder / "hats.properties"
        file.write_text(file.read_text().replace(old, new))
        return folder

    return change


DAMAGES = {
    "null position": (lambda f: each_file(f, _null), 6, "row 0: ra=None"),
    "declination 91": (
        lambda f: each_file(f, lambda p: p.set_column(3, "dec", pa.array(np.full(len(p), 91.0)))),
        6,
        "dec=91.0 is not a position",
    ),
    "rows of other pixels": (lambda f: each_file(f, _far), 6, "outside HEALPix pixel"),
    "a line lost": (_lost_line, 5, "does not list dataset/"),
    "a file lost": (_lost_file, 6, "is missing"),
    "a row lost": (_fewer_rows, 5, "rows"),
    "hats_nrows": (_changed("hats_nrows=500", "hats_nrows=499"), 5, "hats_nrows=499"),
    "suffix": (_changed("suffix=.parquet", "suffix=../../x"), 5, "hats_npix_suffix"),
    "ra": (_changed("col_ra=ra", "col_ra=raa"), 5, "names 'raa' as ra"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_does_not_fit_together_is_refused(tmp_path, run, expected, case):
    damage, exit_code, says = DAMAGES[case]
    bad = damage(of_others(tmp_path / "bad", stars()))
    for order in ([expected[0].path, bad], [bad, expected[0].path]):
        code, said = run("crossmatch", *order, "-o", tmp_path / "out")
        assert code == exit_code and says in said, said
        assert not (tmp_path / "out").exists()


def test_verify_names_null_keys(tmp_path):
    folder = of_others(tmp_path / "bad", stars())
    each_file(folder, lambda p: p.set_column(1, "star_id", pa.nulls(len(p), pa.int64())))
    assert any("rows have no star_id" in problem for problem in verify(folder))


def test_hats_nrows_counts_all_files_of_folders(tmp_path):
    folder = of_others(tmp_path / "bad", stars(), suffix="/", files=3)
    next(folder.rglob("part1.parquet")).unlink()
    with pytest.raises(SosError, match="rows"):
        Catalog.open(folder)


def test_overlapping_partitions_are_refused(tmp_path):
    folder = of_others(tmp_path / "bad", stars(), rows_per_partition=10**6)
    info = folder / "partition_info.csv"
    order, pixel, _ = info.read_text().splitlines()[1].split(",")
    inner = folder / f"dataset/Norder={int(order) + 1}/Dir=0/Npix={int(pixel) * 4}.parquet"
    inner.parent.mkdir(parents=True)
    shutil.copy(next(folder.rglob(f"Npix={pixel}.parquet")), inner)
    info.write_text(info.read_text() + f"{int(order) + 1},{int(pixel) * 4},\n")
    with pytest.raises(CatalogError, match="overlap"):
        Catalog.open(folder)


def test_a_partition_of_which_a_column_is_missing_is_named(tmp_path):
    folder = of_others(tmp_path / "bad", stars())
    file = next(folder.rglob("Npix=*.parquet"))
    pq.write_table(pq.ParquetFile(file).read().drop_columns("teff"), file)
    foreign = Catalog.open(folder)
    with pytest.raises(PartitionError, match="no column 'teff'"):
        rows_of(foreign)


# -- what others read of ours ---------------------------------------------------------------------

IDS = 4_611_686_018_427_387_905 + 2 * np.arange(12)


@pytest.fixture
def product(tmp_path, run):
    """Observations with Gaia ids of which some are null, some rows rejected."""
    (tmp_path / "s.toml").write_text(
        'format = 1\nname = "s"\ntitle = "S"\nposition_epoch = 2016.0\n[columns]\n'
        + "".join(f'{n} = {{ source = "{n}" }}\n' for n in ("obs_id", "ra", "dec", "teff", "logg"))
        + 'feh = { source = "feh" }\ngaia_dr3_source_id = { source = "gaia" }\n'
    )
    lines = ["obs_id,ra,dec,teff,logg,feh,gaia"]
    for number, key in enumerate(IDS):
        ra = "" if number == 11 else 10 * number
        lines.append(f"{key},{ra},5,5000,2.5,-0.1,{key if number % 3 else ''}")
    (tmp_path / "s.csv").write_text("\n".join(lines) + "\n")
    code, said = run("ingest", tmp_path / "s.toml", tmp_path / "s.csv", "-o", tmp_path / "obs")
    assert code == 0, said
    return tmp_path / "obs"


def test_ids_of_products_stay_integers_in_pandas_and_astropy(product):
    kept = [int(key) for number, key in enumerate(IDS) if number % 3 and number != 11]
    file = next(product.rglob("Npix=*.parquet"))
    assert pd.read_parquet(file)["gaia_dr3_source_id"].dtype == "Int64"
    frame = pd.read_parquet(product / "dataset")
    assert frame["gaia_dr3_source_id"].dtype == "Int64"
    assert sorted(frame["gaia_dr3_source_id"].dropna()) == kept
    assert frame["obs_id"].dtype == "int64" and frame["teff"].dtype == "float32"
    column = Table.from_pandas(frame)["gaia_dr3_source_id"]
    assert column.dtype == np.int64 and column.mask.sum() == 4
    assert sorted(column.compressed().tolist()) == kept


def test_every_parquet_file_of_a_product_says_its_types(product):
    files = [*product.rglob("*.parquet"), *product.rglob("_common_metadata")]
    assert {file.name for file in files} >= {"rejected.parquet", "_common_metadata"}
    for file in files:
        schema = pq.read_schema(file)
        about = json.loads(schema.metadata[b"pandas"])
        assert [column["name"] for column in about["columns"]] == schema.names
        for column, item in zip(about["columns"], schema, strict=True):
            if pa.types.is_integer(item.type):
                expected = str(item.type)
                assert column["numpy_type"] == (
                    expected.capitalize() if item.nullable else expected
                )


@pytest.mark.parametrize("kind", [pa.float64(), pa.int64(), pa.string()])
def test_ids_that_lost_digits_match_nothing_in_silence(tmp_path, kind):
    table = observations(50, 1)
    ids = pa.array(np.arange(50) * 3 + (1 << 61) + 1)
    left = write_catalog(table.append_column("gaia_dr3_source_id", ids), tmp_path / "left", 250)
    others = table.drop_columns(["_healpix_29", "quality"])
    others = others.rename_columns(["star_id", *others.schema.names[1:]])
    others = others.append_column("gaia_dr3_source_id", ids.cast(kind, safe=False))
    right = Catalog.open(of_others(tmp_path / "right", others))
    by_id = CrossmatchSettings(radius_arcsec=1.0)

    def match() -> int:
        attach(left, right, tmp_path / "attached", AttachSettings(columns={"t": "teff"}))
        return crossmatch(left, right, tmp_path / "pairs", by_id).rows.n_out

    if kind != pa.float64():
        assert match() == 50
        return
    with pytest.raises(CatalogError, match="'gaia_dr3_source_id' is stored as float"):
        match()
    with pytest.raises(CatalogError, match="'gaia_dr3_source_id' is stored as float"):
        crossmatch(left, right, tmp_path / "pairs", by_id)
    assert len(pairs_of(left, right, tmp_path / "by position")) >= 50


def test_a_column_twice_in_a_catalog_of_others_is_refused(tmp_path):
    folder = each_file(
        of_others(tmp_path / "twice", stars()), lambda t: t.append_column("teff", t["teff"])
    )
    with pytest.raises(CatalogError, match="column 'teff' is there 2 times"):
        Catalog.open(folder)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("teff", ["hot"], "column 'teff' has type string, not numbers"),
        ("pmra", ["fast"], "column 'pmra' has type string, not numbers"),
        ("position_epoch", [57388.0], "column 'position_epoch' has values from 57388"),
        ("gaia_dr3_source_id", ["Gaia DR3 12"], "column 'gaia_dr3_source_id' is not an id"),
        ("gaia_dr3_source_id", [""], "column 'gaia_dr3_source_id' is not an id"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, name, values, words):
    table = observations(50, 1)
    ids = pa.array(np.arange(50) + 1)
    left = write_catalog(table.append_column("gaia_dr3_source_id", ids), tmp_path / "left", 250)
    others = table.drop_columns(["_healpix_29", "quality", *({name} & set(table.schema.names))])
    others = others.rename_columns(["star_id", *others.schema.names[1:]])
    others = others.append_column(name, pa.array(values * 50))
    right = Catalog.open(of_others(tmp_path / "right", others))
    with pytest.raises((CatalogError, PartitionError), match=words):
        crossmatch(left, right, tmp_path / "pairs", CrossmatchSettings(radius_arcsec=1.0))

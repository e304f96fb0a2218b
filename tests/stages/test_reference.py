"""The reference does not depend on how the sky is cut."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sos_dask.api import reference
from sos_dask.schema import CANONICAL
from sos_dask.sky.healpix import ang2pix, propagate
from sos_dask.stages.reference import MIN_COMMON, ReferenceSettings, common_stars
from sos_dask.stars.combine import combine
from sos_dask.stars.group import GAIA_IDS, DedupeSettings, group, rank_of
from sos_dask.stars.union import unite
from sos_dask.storage.catalog import Catalog
from tests.job import contents
from tests.skies import observations, write_catalog
from tests.stages.clumps import EPOCH, SIZES, chain, ids_of, rows_of


def united(tables: dict[str, pa.Table], settings: ReferenceSettings) -> pa.Table:
    """All surveys united by one call of the kernels."""
    parts = []
    for survey, table in tables.items():
        moving = (
            pc.and_(pc.and_(pc.is_valid(table["pmra"]), pc.is_valid(table["pmdec"])),
                    pc.is_valid(table["position_epoch"])).to_numpy()
        )  # fmt: skip
        epoch = pc.fill_null(table["position_epoch"], EPOCH).to_numpy()
        ra, dec = propagate(
            table["ra"].to_numpy(),
            table["dec"].to_numpy(),
            pc.fill_null(table["pmra"], 0.0).to_numpy(),
            pc.fill_null(table["pmdec"], 0.0).to_numpy(),
            np.where(moving, EPOCH - epoch, 0.0),
        )
        new = {
            "ra": pa.array(ra),
            "dec": pa.array(dec),
            "_healpix_29": pa.array(ang2pix(ra, dec)),
            "star_id": table["star_id"].cast(pa.string()),
            "position_epoch": pc.if_else(
                pa.array(moving), pa.scalar(EPOCH, pa.float32()), table["position_epoch"]
            ),
        }
        for name, values in new.items():
            field = table.schema.field(name).with_type(values.type)
            table = table.set_column(table.schema.get_field_index(name), field, values)
        parts.append(table.append_column("survey", pa.array([survey] * table.num_rows)))
    together = pa.concat_tables(parts, promote_options="permissive")
    order = np.argsort(together["_healpix_29"].to_numpy(), kind="stable")
    together = together.take(pa.array(order)).combine_chunks()
    names = list(tables)
    of_survey = together["survey"].to_pylist()
    keys = [
        f"{names.index(survey)}:{star}"
        for survey, star in zip(of_survey, together["star_id"].to_pylist(), strict=True)
    ]
    groups = group(
        together["ra"].to_numpy(),
        together["dec"].to_numpy(),
        together["_healpix_29"].to_numpy(),
        rank_of(pa.chunked_array([keys])),
        ids_of(together),
        None,
        DedupeSettings(
            radius_arcsec=settings.radius_arcsec, id_radius_arcsec=settings.id_radius_arcsec
        ),
    )
    return unite(together, groups.primary, settings).combine_chunks()


@pytest.mark.parametrize("method", ["precedence", "weighted-mean"])
def test_reference_equals_one_call_of_the_kernel(stars, tmp_path, method):
    expected = None
    big, small = SIZES
    for number, (one, other, third) in enumerate(
        ((big, big, big), (big, small, small), (small, big, 200), (small, small, big))
    ):
        catalogs = {
            "apogee": Catalog.open(stars / f"stars2-{one}"),
            "galah": Catalog.open(stars / f"stars3-{other}"),
        }
        settings = ReferenceSettings(
            method=method,
            order=("apogee", "galah"),
            radius_arcsec=0.3,
            id_radius_arcsec=3.0,
            epoch=EPOCH,
            rows_per_partition=third,
            offsets={},
        )
        directory = tmp_path / str(number)
        manifest = reference(catalogs, directory, settings)
        if expected is None:
            tables = {name: rows_of(catalog.path) for name, catalog in catalogs.items()}
            expected = united(tables, settings)
        found = rows_of(directory)
        assert found.equals(expected), (one, other, third)
        several = np.count_nonzero(expected["n_surveys"].to_numpy() > 1)
        assert manifest.summary["stars_in_several_surveys"] == several > 20
        assert manifest.rows.n_in == sum(catalog.n_rows for catalog in catalogs.values())


def test_reference_does_not_depend_on_the_order_of_arguments(stars, tmp_path):
    settings = ReferenceSettings(
        method="precedence",
        order=("apogee", "galah"),
        radius_arcsec=0.3,
        id_radius_arcsec=3.0,
        offsets={},
    )
    catalogs = {name: Catalog.open(stars / f"stars{n}-40") for name, n in
                (("apogee", 2), ("galah", 3))}  # fmt: skip
    first = reference(catalogs, tmp_path / "1" / "reference", settings)
    second = reference(dict(reversed(catalogs.items())), tmp_path / "2" / "reference", settings)
    assert first.fingerprint == second.fingerprint
    assert contents(tmp_path / "1" / "reference") == contents(tmp_path / "2" / "reference")


@pytest.mark.parametrize("n", [278, 279, 280, 281])
@pytest.mark.parametrize("speed", [100, 3000])
def test_chains_of_moving_stars(tmp_path, n, speed):
    """A chain at the common epoch; at their own epochs its stars stand up to a minute away."""
    rng = np.random.default_rng(1)
    settings = ReferenceSettings(
        method="precedence",
        order=("a", "b"),
        radius_arcsec=1.3,
        id_radius_arcsec=1.3,
        epoch=EPOCH,
        rows_per_partition=10,
        offsets={},
    )
    catalogs = {}
    for number, name in enumerate("ab", start=1):
        pm = {key: rng.uniform(-speed, speed, n) for key in ("pmra", "pmdec")}
        table = chain(n, number, **pm)
        epoch = pa.array(np.full(n, 2000.0), pa.float32())
        table = table.append_column(CANONICAL["position_epoch"].arrow(), epoch)
        no_ids = pa.nulls(n, pa.int64())
        for release in GAIA_IDS.values():
            table = table.append_column(CANONICAL[release].arrow(), no_ids)
        stars = combine(table, np.arange(n), DedupeSettings(), {})
        catalogs[name] = write_catalog(stars, tmp_path / name, 10, f"{name}.stars")
    expected = united({name: rows_of(c.path) for name, c in catalogs.items()}, settings)
    assert n / 3 < expected.num_rows < 200
    reference(catalogs, tmp_path / "reference", settings)
    assert len(Catalog.open(tmp_path / "reference").pixels) >= 2
    assert rows_of(tmp_path / "reference").equals(expected)


def surveys_apart(folder: Path, n: int, shift: float, n_bad: int = 0) -> dict[str, Catalog]:
    """The same stars in two surveys, the second ``shift`` higher; some of it fail a cut."""
    rng = np.random.default_rng(3)
    stars = {}
    for number, name in enumerate("ab"):
        table = observations(n, spread=True)
        quality = np.zeros(n, dtype=np.int64)
        quality[: number * n_bad] = 1
        columns = {"teff": 5000.0 + number * shift + rng.normal(0, 1, n), "quality": quality}
        for label, values in columns.items():
            place = table.schema.get_field_index(label)
            field = table.schema.field(place)
            table = table.set_column(place, field, pa.array(values).cast(field.type))
        made = combine(table, np.arange(n), DedupeSettings(), {})
        stars[name] = write_catalog(made, folder / name, 20, f"{name}.stars")
    return stars


@pytest.mark.parametrize("n_bad", [0, 1])
def test_zero_points_are_medians_of_fifty_common_stars_or_more(tmp_path, n_bad, caplog):
    stars = surveys_apart(tmp_path, MIN_COMMON, 40.0, n_bad)
    settings = ReferenceSettings(order=("a",), rows_per_partition=20)
    found = reference(stars, tmp_path / "reference", settings).summary["offsets"]
    assert ("b has fewer than 50 good stars in common with a" in caplog.text) == bool(n_bad)
    if n_bad:
        assert found == {}
        return
    teff = [
        {row["ra"]: row["teff"] for row in rows_of(catalog.path).to_pylist()}
        for catalog in stars.values()
    ]
    differences = [teff[1][place] - teff[0][place] for place in teff[0]]
    assert found["b"]["teff"] == np.median(differences)
    assert 35 < found["b"]["teff"] < 45 and set(found["b"]) == {"teff", "logg", "feh"}
    ((first, second, one, other),) = common_stars(
        Catalog.open(tmp_path / "reference"), stars, ("b",)
    )
    assert (first, second) == ("b", "a") and len(one) == len(other) == MIN_COMMON
    assert one["united"].equals(other["united"])
    apart = np.array(one["teff"].to_numpy()) - other["teff"].to_numpy()
    assert sorted(apart) == pytest.approx(sorted(np.array(differences) - found["b"]["teff"]))


def test_common_stars_are_those_that_pass_their_cuts(tmp_path):
    stars = surveys_apart(tmp_path, 60, 0.0, 7)
    settings = ReferenceSettings(order=("a",), offsets={"b": {"teff": 10.0}})
    reference(stars, tmp_path / "reference", settings)
    ((first, _, one, other),) = common_stars(Catalog.open(tmp_path / "reference"), stars)
    assert first == "a" and len(one) == len(other) == 53
    given = rows_of(stars["b"].path)["teff"].to_numpy().astype(np.float64)
    assert np.isin(other["teff"].to_numpy() + 10.0, given).all()

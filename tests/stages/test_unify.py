"""One row a star over all surveys: its rows, their average, its flags."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.api import unify
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN
from sos_dask.sky.healpix import HealpixPixel, ang2pix, propagate, unit_vectors
from sos_dask.stages.members import MembersStage
from sos_dask.stages.unify import (
    FLAG_DISAGREE,
    FLAG_FAILS,
    FLAG_REJECTED,
    FLAG_UNCOVERED,
    FLAG_VARIABLE,
    UnifySettings,
)
from sos_dask.stages.united import enough
from sos_dask.stars.group import DedupeSettings, group, rank_of
from sos_dask.storage.catalog import Catalog
from tests.skies import observations, write_catalog
from tests.stages.clumps import SIZES, ids_of, rows_of, sky

HOW: dict[str, Any] = {"order": ("c", "a", "b"), "radius_arcsec": 0.8, "id_radius_arcsec": 5.0}


def grouped(tables: dict[str, pa.Table]) -> dict[str, set[str]]:
    """Members of each star of rows that do not move, by one call of the kernel."""
    parts = []
    for number, name in enumerate(HOW["order"]):
        table = tables[name].append_column("survey", pa.array([name] * len(tables[name])))
        text = table["obs_id"].cast(pa.string())
        rank = number * 10**9 + rank_of(text)
        parts.append(table.append_column("rank", pa.array(rank)).append_column("text", text))
    together = pa.concat_tables(parts, promote_options="permissive")
    order = np.argsort(together[HEALPIX_COLUMN].to_numpy(), kind="stable")
    together = together.take(pa.array(order)).combine_chunks()
    names = ("ra", "dec", HEALPIX_COLUMN, "rank")
    settings = DedupeSettings(radius_arcsec=0.8, id_radius_arcsec=5.0)
    ra, dec, cells, ranks = (together[name].to_numpy() for name in names)
    primary = group(ra, dec, cells, ranks, ids_of(together), None, settings).primary
    keys = [f"{a}:{b}" for a, b in zip(together["survey"].to_pylist(),
                                       together["text"].to_pylist(), strict=True)]  # fmt: skip
    stars: dict[str, set[str]] = {}
    for key, leader in zip(keys, primary.tolist(), strict=True):
        stars.setdefault(keys[leader], set()).add(key)
    return stars


def stars_of(directory: Path) -> list[dict[str, Any]]:
    """Stars as dicts, in the order of right ascension."""
    return rows_of(directory).sort_by("ra").to_pylist()


def test_stars_are_those_of_one_call_of_the_kernel(tmp_path):
    tables = {}
    for number, name in enumerate("abc", start=1):
        table = sky(400, number)
        still = [x for x in table.schema.names if x not in ("pmra", "pmdec", "position_epoch")]
        tables[name] = table.select(still)
    expected, found = grouped(tables), {}
    for size in SIZES:
        rows = {x: write_catalog(one, tmp_path / f"{x}{size}", size) for x, one in tables.items()}
        settings = UnifySettings(rows_per_partition=size, labels=("teff", "logg", "feh"), **HOW)
        made = unify(rows, tmp_path / f"sos{size}", settings)
        found[size] = rows_of(tmp_path / f"sos{size}")
        sources = found[size]["sources"].to_pylist()
        stars = dict(zip(found[size]["star_id"].to_pylist(), sources, strict=True))
        assert {star: set(text.split(";")) for star, text in stars.items()} == expected
        assert (made.rows.n_in, made.rows.n_out) == (1200, len(expected))
        assert sum(found[size]["n_obs"].to_pylist()) == 1200
        MembersStage({"sos": tmp_path / f"sos{size}"}).run(tmp_path / f"members{size}")
        listed: dict[str, set[str]] = {}
        for row in rows_of(tmp_path / f"members{size}").to_pylist():
            listed.setdefault(row["star_id"], set()).add(row["obs_id"])
        assert listed == expected
    assert found[SIZES[0]].equals(found[SIZES[1]])


def test_stars_are_those_of_a_union_find_on_the_whole_sphere(tmp_path):
    """Stars anywhere, poles and RA 0 among them, of one to nine rows in three surveys."""
    rng = np.random.default_rng(5)
    n_stars = 1200
    ra = np.concatenate([rng.uniform(0, 360, n_stars - 40), rng.normal(0, 1e-5, 20) % 360,
                         rng.uniform(0, 360, 20)])  # fmt: skip
    dec = np.degrees(np.arcsin(rng.uniform(-1, 1, n_stars)))
    dec[-20:] = np.where(rng.random(20) < 0.5, -1, 1) * (90 - rng.uniform(0, 0.01, 20))
    tables, rows = {}, []
    for number, name in enumerate("abc", start=1):
        star = np.repeat(np.arange(n_stars), rng.integers(0, 4, n_stars))
        east, north = rng.normal(0, 120.0, (2, len(star)))  # mas
        where = propagate(ra[star], dec[star], east, north, 1.0)
        table = observations(len(star), number)
        ids = pa.array(10**15 + star, mask=rng.random(len(star)) < 0.4)
        columns = {HEALPIX_COLUMN: ang2pix(*where), "ra": where[0], "dec": where[1],
                   "quality": np.zeros(len(star), dtype=np.int64)}  # fmt: skip
        for column, values in columns.items():
            place = table.schema.get_field_index(column)
            table = table.set_column(place, table.schema.field(column), pa.array(values))
        table = table.append_column(CANONICAL["gaia_dr3_source_id"].arrow(), ids)
        keys = [f"{name}:{key}" for key in table["obs_id"].to_pylist()]
        rows += list(zip(keys, unit_vectors(*where), ids.to_pylist(), strict=True))
        order = [(HEALPIX_COLUMN, "ascending"), ("obs_id", "ascending")]
        tables[name] = table.sort_by(order)
    of = np.arange(len(rows))

    def find(one: int) -> int:
        while of[one] != one:
            one = of[one]
        return one

    place = np.array([one[1] for one in rows])
    apart = np.degrees(np.linalg.norm(place[:, None] - place, axis=2)) * 3600
    same = np.array([-k if one[2] is None else one[2] for k, one in enumerate(rows, start=1)])
    links = (apart < 0.8) | ((apart < 5.0) & (same[:, None] == same))
    for i, j in zip(*np.nonzero(np.triu(links, 1)), strict=True):
        of[find(j)] = find(i)
    expected: dict[int, set[str]] = {}
    for one, row in enumerate(rows):
        expected.setdefault(find(one), set()).add(row[0])
    surveys = {x: write_catalog(one, tmp_path / x, 300) for x, one in tables.items()}
    settings = UnifySettings(rows_per_partition=500, labels=("teff",), **HOW)
    made = unify(surveys, tmp_path / "sos", settings)
    found = rows_of(tmp_path / "sos")
    assert len(Catalog.open(tmp_path / "sos").pixels) > 5
    groups = [frozenset(text.split(";")) for text in found["sources"].to_pylist()]
    assert set(groups) == {frozenset(one) for one in expected.values()}
    assert made.rows.n_in == len(rows) == made.rows.n_out + made.rows.dropped["merged"]


def test_a_key_that_would_be_two_members_is_refused(tmp_path):
    keys = np.array(["a;b", "c"])
    table = sky(2, 1)
    place = table.schema.get_field_index("obs_id")
    table = table.set_column(place, "obs_id", pa.array(keys))
    unify(
        {"one": write_catalog(table, tmp_path / "one")},
        tmp_path / "sos",
        UnifySettings(labels=("teff",)),
    )
    with pytest.raises(CatalogError, match="contains ';'"):
        MembersStage({"sos": tmp_path / "sos"}).run(tmp_path / "members")


def test_partitions_that_are_compared_are_of_all_of_the_sky():
    """As many as are enough for every two surveys, be they few or many."""
    pixels = [HealpixPixel(2, number) for number in range(192)]
    counts = np.zeros((3, 12 * 4**8), dtype=np.int64)
    counts[0] = 2
    counts[1, ::64] = 1  # 64 of each pixel
    assert enough(pixels, counts, 10**9) == pixels
    chosen = enough(pixels, counts, 64 * 10)
    assert len(chosen) == 10 and chosen != pixels[:10]
    assert enough(pixels, counts, 1)[0] in pixels
    counts[2, pixels[7].first >> 42] = 5  # in one pixel alone
    assert pixels[7] in enough(pixels, counts, 64 * 10)


def survey(folder: Path, n: int, *, rows: dict[str, Any], corrected: bool) -> Catalog:
    """Rows at places a degree apart along the equator, with the given columns."""
    star = np.array(rows.pop("star"), dtype=np.int64)
    table = observations(len(star), n)
    ra, dec = (10 + star).astype(np.float64), np.zeros(len(star))
    cells, quality = ang2pix(ra, dec), np.array(rows.pop("quality", [0] * len(star)))
    fixed = {HEALPIX_COLUMN: cells, "ra": ra, "dec": dec, "quality": quality}
    for name, values in {**fixed, "obs_id": np.arange(len(star)) + 100 * n}.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values))
    table = table.drop_columns([x for x in table.schema.names if x[:4] in ("teff", "logg", "feh_")])
    table = table.drop_columns(["feh"])
    flags = rows.pop("flags", [0] * len(star))
    for name, values in rows.items():
        label, _, error = name.partition("_")
        name = f"{label}_sos{'_err' if error else ''}" if corrected else name
        table = table.append_column(name, pa.array(values, pa.float32()))
    if corrected:
        table = table.append_column("flag_sos", pa.array(flags, pa.int32()))
    table = table.sort_by([(HEALPIX_COLUMN, "ascending"), ("obs_id", "ascending")])
    return write_catalog(table, folder / str(n))


@pytest.fixture
def two(tmp_path) -> dict[str, Catalog]:
    reference = {
        "star": [0, 1, 2, 3, 4, 4],
        "feh": [0.1, 0.2, 0.3, 0.4, 0.0, 0.0],
        "feh_err": [0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
        "rv": [1.0, 2.0, 3.0, 4.0, 10.0, 30.0],
        "rv_err": [0.5] * 6,
        "quality": [0, 4, 0, 0, 0, 0],
    }
    target = {
        "star": [0, 1, 2, 2, 2, 5, 5, 6],
        "feh": [0.2, 0.5, 0.4, 0.4, 3.0, 0.7, 0.9, 1.0],
        "feh_err": [0.2, 0.1, 0.1, 0.1, 0.1, 0.3, 0.1, 0.2],
        "rv": [None, 2.0, 3.0, 3.0, 3.0, 5.0, 5.0, 9.0],
        "rv_err": [None, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
        "flags": [0, 0, 0, 0, 0, 16, 0, 2],
    }
    return {
        "ref": survey(tmp_path, 1, rows=reference, corrected=False),
        "far": survey(tmp_path, 2, rows=target, corrected=True),
    }


def test_averages_grades_and_flags(two, tmp_path):
    settings = UnifySettings(order=("ref", "far"), labels=("feh", "rv"))
    made = unify(two, tmp_path / "sos", settings)
    stars = stars_of(tmp_path / "sos")
    zero, one, two_, three, four, five, six = stars
    assert abs(zero["feh"] - 0.12) < 1e-6 and abs(zero["feh_err"] - 0.008**0.5) < 1e-6
    assert (zero["feh_n"], zero["n_surveys"], zero["n_obs"], zero["flag_sos"]) == (2, 2, 2, 0)
    assert (zero["feh_ref"], zero["feh_far"]) == pytest.approx((0.1, 0.2))
    assert (zero["rv"], zero["rv_far"], zero["rv_n"]) == (1.0, None, 1)
    assert one["feh"] == pytest.approx(0.5) and one["flag_sos"] == 0, "a row that fails has no say"
    assert two_["feh_far"] == pytest.approx(0.4) and two_["flag_sos"] == FLAG_REJECTED
    assert three["feh"] == pytest.approx(0.4) and three["star_id"] == "ref:103"
    assert four["flag_sos"] == FLAG_VARIABLE and abs(four["rv_scatter"] - 200**0.5) < 1e-4
    assert five["feh"] == pytest.approx(0.9) and five["flag_sos"] == 0, "the other is not covered"
    assert six["feh"] == pytest.approx(1.0) and six["flag_sos"] == FLAG_UNCOVERED
    assert made.rows.n_in == 14 and made.rows.n_out == 7
    assert made.summary["flags"]["a measurement was left out as an outlier"] == 1


def test_surveys_that_disagree_and_rows_that_fail(tmp_path):
    rows = {"star": [0, 1], "feh": [0.0, 0.5], "feh_err": [0.1, 0.1], "quality": [0, 2]}
    other = {"star": [0], "feh": [2.0], "feh_err": [0.1]}
    given = {
        "a": survey(tmp_path, 1, rows=rows, corrected=False),
        "b": survey(tmp_path, 2, rows=other, corrected=False),
    }
    unify(given, tmp_path / "sos", UnifySettings(labels=("feh",)))
    first, second = stars_of(tmp_path / "sos")
    assert first["flag_sos"] == FLAG_DISAGREE and first["feh_chi2"] == pytest.approx(200)
    assert second["flag_sos"] == FLAG_FAILS and second["feh"] == pytest.approx(0.5)


def test_a_label_that_no_survey_has_is_refused(two, tmp_path):
    with pytest.raises(CatalogError, match="no survey has the label 'mg_fe' on a common scale"):
        unify(two, tmp_path / "sos", UnifySettings(labels=("mg_fe",)))
    assert not (tmp_path / "sos").exists()


def test_each_label_has_its_own_flags_and_surveys_apart_are_said(two, tmp_path, caplog):
    rows = {"star": [0, 5], "feh": [0.1, 0.2], "feh_err": [0.1, 0.1], "rv": [1.0, 2.0],
            "rv_err": [0.1, 0.1], "flags": [16, 16]}  # fmt: skip
    mine = rows_of(survey(tmp_path, 3, rows=rows, corrected=True).path)
    own = pa.array([0] * len(mine), pa.int32())
    catalog = write_catalog(mine.append_column("flag_sos_rv", own), tmp_path / "own")
    unify({"own": catalog}, tmp_path / "sos", UnifySettings(labels=("feh", "rv")))
    assert [one["flag_sos"] for one in stars_of(tmp_path / "sos")] == [FLAG_UNCOVERED] * 2
    unify({"own": catalog}, tmp_path / "rv", UnifySettings(labels=("rv",)))
    assert [one["flag_sos"] for one in stars_of(tmp_path / "rv")] == [0, 0]
    unify({"own": catalog, "ref": two["ref"]}, tmp_path / "both", UnifySettings(labels=("rv",)))
    assert "ref has fewer than 50 good stars in common" in caplog.text


def test_what_is_not_corrected_of_a_target_does_not_count(two, tmp_path):
    mine = rows_of(two["far"].path).drop_columns(["rv_sos", "rv_sos_err"])
    for name in ("rv", "rv_err"):  # as the survey states them
        mine = mine.append_column(name, pa.array([1.0] * len(mine), pa.float32()))
    raw = write_catalog(mine, tmp_path / "raw")
    unify({"ref": two["ref"], "raw": raw}, tmp_path / "sos", UnifySettings(labels=("feh", "rv")))
    assert all(one["rv_n"] <= 1 and "rv_raw" not in one for one in stars_of(tmp_path / "sos"))
    with pytest.raises(CatalogError, match="'rv' on a common scale"):
        unify({"raw": raw}, tmp_path / "none", UnifySettings(labels=("feh", "rv")))


@pytest.mark.parametrize("names", [("a-b", "a_b"), ("n", "ref")])
def test_surveys_whose_columns_would_be_alike_are_refused(two, tmp_path, names):
    given = dict(zip(names, two.values(), strict=True))
    with pytest.raises(ConfigError, match="would have the names of others"):
        unify(given, tmp_path / "sos", UnifySettings(labels=("feh",)))


def test_one_gaia_id_of_stars_far_apart_is_said(two, tmp_path, caplog):
    given = {}
    for name, rows in two.items():
        table = rows_of(rows.path)
        number = np.arange(len(table))
        if name == "far":  # the first two rows of the reference, at other places
            number -= len(table) - 2
        ids = [5 * 10**18 + x if x >= 0 else None for x in number.tolist()]
        column = pa.array(ids, pa.int64())
        names = [x for x in table.schema.names if x != "gaia_dr3_source_id"]
        table = table.select(names).append_column("gaia_dr3_source_id", column)
        given[name] = write_catalog(table, tmp_path / f"with-{name}")
    made = unify(given, tmp_path / "sos", UnifySettings(order=("ref", "far"), labels=("feh",)))
    assert made.summary["ids_apart"] == 2
    assert re.search(r"source_id: 2 of \d+ ids are of stars farther apart", caplog.text)
    assert "5000000000000000000 of far:" in caplog.text and "ref:" in caplog.text
    sources = [one["sources"] for one in stars_of(tmp_path / "sos")]
    assert not any("far:201" in one and "ref:104" in one for one in sources), "they stay apart"

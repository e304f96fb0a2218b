"""Stages on catalogs: the result does not depend on partitions, files, order or who ran what."""

import contextlib
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from hypothesis import given
from hypothesis import strategies as st

from sos_dask import corrections as models
from sos_dask.api import crossmatch, dedupe, reference, train
from sos_dask.errors import CatalogError, ConfigError, ModelError, SurveyError
from sos_dask.evidence.figures import held_out_metrics
from sos_dask.run.cluster import Cluster
from sos_dask.schema import CANONICAL, LABELS
from sos_dask.sky.healpix import HealpixPixel, ang2pix, propagate, separation_arcsec
from sos_dask.stages.apply import parse_partitions
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.stages.ingest import IngestSettings, ingest
from sos_dask.stages.reference import ReferenceSettings
from sos_dask.stages.train import PairsSource, TrainSettings, metrics_of
from sos_dask.stars.combine import combine
from sos_dask.stars.group import GAIA_IDS, DedupeSettings, group, id_values, rank_of
from sos_dask.stars.match import match
from sos_dask.stars.unify import unify
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import MANIFEST, Manifest
from sos_dask.storage.store import verify
from sos_dask.surveys.definition import load_survey
from tests.job import contents
from tests.run import apply
from tests.sky import observations, write_catalog

EPOCH = 2016.0
SIZES = (10**6, 40)
N_ROWS = 600


def sky(n: int, seed: int) -> pa.Table:
    """Clumps at the hard places, with Gaia ids, proper motions and epochs, each often null."""
    rng = np.random.default_rng(seed)
    table = observations(n, seed)
    place = np.round(table["dec"].to_numpy() + 100).astype(np.int64)
    star = place * 100 + rng.integers(0, 30, n) + 10**15  # the rows of a clump share some ids
    columns = {
        "position_epoch": (rng.choice([1999.5, 2000.0, 2015.5, 2016.0], n), 0.2),
        "gaia_dr2_source_id": (star + rng.integers(0, 3, n), 0.5),
        "gaia_dr3_source_id": (star, 0.4),
        "pmra": (rng.normal(0, 300, n), 0.3),
        "pmdec": (rng.normal(0, 300, n), 0.3),
    }
    for place_of, (name, (values, nulls)) in enumerate(columns.items(), start=4):
        field = CANONICAL[name].arrow()
        data = pa.array(values, mask=rng.random(n) < nulls).cast(field.type)
        table = table.add_column(place_of, field, data)
    return table


def rows_of(directory: Path) -> pa.Table:
    catalog = Catalog.open(directory)
    assert verify(directory) == []
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels]).combine_chunks()


def ids_of(table: pa.Table) -> dict[str, np.ndarray]:
    return {release: id_values(table[name]) for release, name in GAIA_IDS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same observations, and the stars made of them, cut in several ways."""
    root = tmp_path_factory.mktemp("stages")
    for number, size in itertools.product((1, 2, 3), SIZES):
        write_catalog(sky(N_ROWS, number), root / f"obs{number}-{size}", size)
    return root


SETTINGS = DedupeSettings(radius_arcsec=0.8, id_radius_arcsec=5.0)


@pytest.fixture(scope="module")
def stars(folder) -> Path:
    for number, size in itertools.product((1, 2, 3), SIZES):
        observed = Catalog.open(folder / f"obs{number}-{size}")
        dedupe(observed, folder / f"stars{number}-{size}", SETTINGS)
    return folder


# -- partition independence -----------------------------------------------------------------------


def primaries_at_one_epoch(table: pa.Table) -> np.ndarray:
    """Primaries of all rows, each moved to the latest epoch where it can be."""
    ra, dec = table["ra"].to_numpy(), table["dec"].to_numpy()
    pmra, pmdec, epoch = (table[name].to_numpy() for name in ("pmra", "pmdec", "position_epoch"))
    moves = ~np.isnan(pmra) & ~np.isnan(pmdec) & ~np.isnan(epoch)
    moved = propagate(ra, dec, pmra, pmdec, 2016.0 - epoch.astype(np.float64))
    ra, dec = np.where(moves, moved[0], ra), np.where(moves, moved[1], dec)
    cells = ang2pix(ra, dec)
    order = np.argsort(cells, kind="stable")
    ids = {release: values[order] for release, values in ids_of(table).items()}
    rank = rank_of(table["obs_id"])[order]
    groups = group(ra[order], dec[order], cells[order], rank, ids, None, SETTINGS)
    primary = np.empty(len(order), dtype=np.int64)
    primary[order] = order[groups.primary]
    return primary


@pytest.mark.parametrize("number", [1, 2, 3])
def test_dedupe_equals_one_call_of_the_kernel(stars, number):
    table = sky(N_ROWS, number).combine_chunks()
    expected = combine(table, primaries_at_one_epoch(table), SETTINGS, {}).combine_chunks()
    assert N_ROWS / 6 < expected.num_rows < 0.9 * N_ROWS, "the sky is no test of repeats"
    for size in SIZES:
        found = rows_of(stars / f"stars{number}-{size}")
        assert found.equals(expected), size
        rows = Manifest.load(stars / f"stars{number}-{size}").rows
        assert (rows.n_in, rows.n_out) == (N_ROWS, expected.num_rows)
        assert rows.dropped == {"merged": N_ROWS - expected.num_rows}
    n_partitions = {len(Catalog.open(stars / f"obs{number}-{size}").pixels) for size in SIZES}
    assert len(n_partitions) > 1


def test_some_stars_reach_over_the_edge_of_a_partition(stars):
    """Else the tests here would not see a mistake at the edges."""
    table = sky(N_ROWS, 1).combine_chunks()
    cells, primary = table["_healpix_29"].to_numpy(), primaries_at_one_epoch(table)
    pixels = Catalog.open(stars / "obs1-40").pixels
    firsts = np.array([pixel.first for pixel in pixels])
    partition = np.searchsorted(firsts, cells, side="right")
    assert np.count_nonzero(partition != partition[primary]) > 20


def chain(n: int, seed: int, **moving: Any) -> pa.Table:
    """A row an arcsecond from the next along the equator, the keys in their order.

    Only the first row knows where a star of two or three rows begins: it is far away.
    """
    rng = np.random.default_rng(seed)
    ra, dec = (np.arange(n) - n / 2) / 3600, rng.uniform(-0.1, 0.1, n) / 3600
    if moving:
        ra, dec = propagate(ra, dec, moving["pmra"], moving["pmdec"], 2000.0 - EPOCH)
    table = observations(n, seed)
    columns = {
        "_healpix_29": ang2pix(ra % 360, dec),
        "obs_id": np.arange(n) + 10**6 * seed,
        "ra": ra % 360,
        "dec": dec,
        "quality": np.zeros(n, dtype=np.int64),
    }
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values))
    for name, values in moving.items():
        table = table.append_column(CANONICAL[name].arrow(), pa.array(values))
    return table.sort_by([("_healpix_29", "ascending"), ("obs_id", "ascending")])


@pytest.mark.parametrize("n", [148, 149, 150, 151])
def test_long_chains_over_edges(tmp_path, n):
    """Where a chain is cut into stars depends on its far end, many radii and partitions away."""
    table = chain(n, 1).combine_chunks()
    settings = DedupeSettings(radius_arcsec=1.3, id_radius_arcsec=1.3, use_gaia_id=False)
    ra, dec, cells = (table[name].to_numpy() for name in ("ra", "dec", "_healpix_29"))
    groups = group(ra, dec, cells, rank_of(table["obs_id"]), {}, None, settings)
    expected = combine(table, groups.primary, settings, {}).combine_chunks()
    assert n / 3 <= expected.num_rows <= (n + 1) / 2
    observed = write_catalog(table, tmp_path / "observed", 10)
    assert len(observed.pixels) >= 2
    dedupe(observed, tmp_path / "stars", settings)
    assert rows_of(tmp_path / "stars").equals(expected)


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


@pytest.mark.parametrize("pairs", ["best", "all"])
def test_crossmatch_equals_one_call_of_the_kernel(stars, tmp_path, pairs):
    settings = CrossmatchSettings(radius_arcsec=0.5, id_radius_arcsec=4.0, pairs=pairs)
    left, right = rows_of(stars / f"stars1-{SIZES[0]}"), rows_of(stars / f"stars2-{SIZES[0]}")
    matches = match(left, right, settings)
    assert len(matches.left) > 100 and matches.by_id.any() and not matches.by_id.all()
    tables = []
    for one, other in itertools.product(SIZES, SIZES):
        directory = tmp_path / f"{one}-{other}"
        manifest = crossmatch(
            Catalog.open(stars / f"stars1-{one}"),
            Catalog.open(stars / f"stars2-{other}"),
            directory,
            settings,
        )
        assert manifest.summary["pairs"] == len(matches.left)
        assert manifest.summary["refused_by_id"] == matches.n_conflicts
        table = rows_of(directory)
        for name, expected in (
            ("target_star_id", left["star_id"].take(matches.left)),
            ("reference_star_id", right["star_id"].take(matches.right)),
            ("separation_arcsec", pa.array(matches.separation_arcsec)),
            ("n_candidates", pa.array(matches.n_candidates)),
            ("by_id", pa.array(matches.by_id)),
            ("teff_diff", pc.subtract(*(side["teff"].take(index) for side, index in (
                (left, matches.left), (right, matches.right))))),
        ):  # fmt: skip
            assert table[name].to_pylist() == expected.to_pylist(), name
        tables.append(table)
    assert all(table.equals(tables[0]) for table in tables)


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
    return unify(together, groups.primary, settings).combine_chunks()


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


# -- folds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "key"), [("stars", "star_id"), ("obs", "obs_id")])
def test_pairs_that_share_a_star_share_a_fold(stars, tmp_path, target, key):
    """Of the target or of the reference; also where observations of one star are the targets."""
    tables = []
    steps: set[str] = set()
    for size in SIZES:
        crossmatch(
            Catalog.open(stars / f"{target}1-{size}"),
            Catalog.open(stars / f"stars2-{size}"),
            tmp_path / str(size),
            CrossmatchSettings(
                radius_arcsec=0.3,
                id_radius_arcsec=3.0,
                pairs="all",
                n_folds=4,
                seed=3,
            ),
            report=lambda step, done, total: steps.add(step),
        )
        tables.append(rows_of(tmp_path / str(size)))
        manifest = Manifest.load(tmp_path / str(size))
        stars_found = pc.count_distinct(tables[-1]["reference_star_id"]).as_py()
        assert manifest.summary["reference_stars"] == stars_found
    assert "folds" in steps, "no pairs are joined over the edge of a partition: this tests little"
    pairs = tables[0]
    assert pairs.equals(tables[1])
    folds = pairs["fold"].to_numpy()
    for name in (f"target_{key}", "reference_star_id"):
        of: dict[object, int] = {}
        for star, fold in zip(pairs[name].to_pylist(), folds.tolist(), strict=True):
            assert of.setdefault(star, fold) == fold, name
    if target == "obs":
        # Observations of one star, as its Gaia id says, within the radius of ids.
        table = sky(N_ROWS, 1)
        rows = pc.index_in(pairs["target_obs_id"], table["obs_id"]).to_numpy()
        ids = id_values(table["gaia_dr3_source_id"])[rows]
        ra, dec = table["ra"].to_numpy()[rows], table["dec"].to_numpy()[rows]
        one, other = np.nonzero((ids[:, None] == ids) & (ids[:, None] > 0))
        near = separation_arcsec(ra[one], dec[one], ra[other], dec[other]) <= 3.0
        assert np.count_nonzero(near & (rows[one] != rows[other])) > 20
        assert (folds[one[near]] == folds[other[near]]).all()
    assert set(folds.tolist()) <= set(range(4))
    assert len(set(folds.tolist())) > 1


def test_a_crossmatch_that_broke_off_while_joining_folds_goes_on(stars, tmp_path):
    catalogs = (
        Catalog.open(stars / f"obs1-{SIZES[1]}"),
        Catalog.open(stars / f"stars2-{SIZES[1]}"),
    )
    settings = CrossmatchSettings(
        radius_arcsec=0.3, id_radius_arcsec=3.0, pairs="all", n_folds=4, seed=3
    )
    crossmatch(*catalogs, tmp_path / "whole", settings, name="pairs")

    def break_off(step: str, done: int, total: int) -> None:
        if (step, done) == ("folds", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crossmatch(*catalogs, tmp_path / "broken", settings, name="pairs", report=break_off)
    crossmatch(*catalogs, tmp_path / "broken", settings, name="pairs")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


# -- ingest ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lamost(small_sky, tmp_path_factory) -> dict[str, list[Path]]:
    """The same rows as one file, as three, and in another order."""
    folder = tmp_path_factory.mktemp("files")
    with fits.open(small_sky / "lamost.fits") as file:
        data = file[1].data
        shuffled = np.random.default_rng(5).permutation(len(data))
        parts = {
            "a": data[shuffled[:700]], "b": data[shuffled[700:701]], "c": data[shuffled[701:]],
            "reversed": data[::-1],
        }  # fmt: skip
        for name, rows in parts.items():
            fits.BinTableHDU(rows.copy()).writeto(folder / f"{name}.fits")
    return {
        "one": [small_sky / "lamost.fits"],
        "three": [folder / f"{name}.fits" for name in "abc"],
        "other order": [folder / f"{name}.fits" for name in "cab"],
        "reversed": [folder / "reversed.fits"],
    }


@pytest.mark.parametrize("chunk_rows", [500_000, 317])
def test_ingest_does_not_depend_on_files_chunks_or_order(lamost, tmp_path, chunk_rows):
    survey = load_survey("lamost-dr11-lrs")
    found = {}
    for name, files in lamost.items():
        settings = IngestSettings(rows_per_partition=1000, chunk_rows=chunk_rows)
        manifest = ingest(survey, files, tmp_path / name, settings, name="lamost")
        assert (manifest.rows.n_in, manifest.rows.n_out) == (5000, 4996)
        found[name] = contents(tmp_path / name / "dataset")
    assert all(item == found["one"] for item in found.values())
    assert len(found["one"]) > 12
    both = [Manifest.load(tmp_path / name) for name in ("three", "other order")]
    assert both[0] == both[1], "the order in which files are named is no difference"
    if chunk_rows == 317:
        whole = ingest(
            survey,
            lamost["one"],
            tmp_path / "whole",
            IngestSettings(rows_per_partition=1000),
            name="lamost",
        )
        assert whole == Manifest.load(tmp_path / "one"), "chunk_rows decides memory alone"


def test_ingest_refuses_a_file_twice(lamost, tmp_path):
    copy = shutil.copy(lamost["three"][0], tmp_path / "copy.fits")
    with pytest.raises(ConfigError, match="the same content is given twice"):
        ingest(load_survey("lamost-dr11-lrs"), [lamost["three"][0], copy], tmp_path / "out")


def test_a_run_that_made_nothing_leaves_nothing(lamost, small_sky, tmp_path):
    """So the same directory serves the next try, with whatever was wrong mended."""
    survey = load_survey("lamost-dr11-lrs")
    with pytest.raises(SurveyError, match="no column"):
        ingest(survey, [small_sky / "apogee.fits"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ingest(survey, lamost["one"], tmp_path / "out")
    with pytest.raises(CatalogError, match="--overwrite"):
        ingest(survey, lamost["three"], tmp_path / "out")
    ingest(survey, lamost["three"], tmp_path / "out", overwrite=True)


# -- train ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def current(small_store) -> Path:
    return small_store / "current"


def test_every_held_out_pair_is_predicted_once(current):
    manifest = Manifest.load(current / "model.polynomial")
    pairs = rows_of(current / "pairs")
    used = pairs.filter(pairs["use"])
    held_out = pq.read_table(current / "model.polynomial/held_out.parquet")
    for name in ("teff_diff", "logg_diff", "feh_diff"):
        assert sorted(held_out[name].to_pylist()) == sorted(used[name].to_pylist())
    assert manifest.summary["validation"] == "kfold"
    assert sum(manifest.summary["folds"].values()) == used.num_rows == manifest.rows.n_out

    def matrix(suffix):
        return np.stack([held_out[f"{label}_{suffix}"].to_numpy() for label in LABELS], axis=1)

    again = held_out_metrics("polynomial", LABELS, matrix("diff"), matrix("delta"))
    assert again == metrics_of(manifest)
    assert all(metric.n == used.num_rows for metric in again)
    assert models.load(current / "model.polynomial").info.train_folds is None


def test_held_out_predictions_come_from_models_that_never_saw_the_fold(current):
    pairs = Catalog.open(current / "pairs")
    source = PairsSource(pairs)
    folds = sorted(set(rows_of(current / "pairs")["fold"].to_pylist()))
    held_out = pq.read_table(current / "model.polynomial/held_out.parquet")
    fold = folds[1]
    correction = models.fit("polynomial", source, train_folds=[f for f in folds if f != fold])
    rows = held_out.filter(pc.equal(held_out["fold"], fold))
    x = np.stack([rows[f"x_{label}"].to_numpy() for label in LABELS], axis=1)
    expected = np.stack([rows[f"{label}_delta"].to_numpy() for label in LABELS], axis=1)
    np.testing.assert_array_equal(correction.predict(x), expected)


def test_holdout_never_trains_on_fold_zero(current, tmp_path):
    pairs = Catalog.open(current / "pairs")
    settings = TrainSettings(method="polynomial", params={"order": 2}, validation="holdout")
    manifest = train(pairs, tmp_path / "model", settings)
    names = sorted(int(fold) for fold in manifest.summary["folds"])
    assert models.load(tmp_path / "model").info.train_folds == tuple(names[1:])
    held_out = pq.read_table(tmp_path / "model/held_out.parquet")
    assert set(held_out["fold"].to_pylist()) == {names[0]}
    assert held_out.num_rows == manifest.summary["folds"][str(names[0])]


@pytest.mark.parametrize(
    ("method", "params", "validation", "message"),
    [
        ("polynomal", {}, "auto", "there is no method 'polynomal'"),
        ("polynomial", {"ordr": 3}, "auto", "no parameter 'ordr'"),
        ("polynomial", {"order": 99}, "auto", "polynomial.order = 99 is outside"),
        ("polynomial", {"order": "high"}, "auto", "is not a whole number"),
        (
            "polynomial",
            {},
            "kfolds",
            "must be 'auto', 'kfold' or 'holdout' (given: 'kfolds')",
        ),
    ],
)
def test_wrong_settings_of_training_leave_nothing(
    current, tmp_path, method, params, validation, message
):
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(
            Catalog.open(current / "pairs"),
            tmp_path / "m",
            TrainSettings(method=method, params=params, validation=validation),
        )
    assert not (tmp_path / "m").exists()


def test_too_few_pairs_is_an_error(stars, tmp_path):
    left = write_catalog(sky(N_ROWS, 1).slice(0, 12), tmp_path / "few", 100)
    crossmatch(
        left,
        left,
        tmp_path / "pairs",
        CrossmatchSettings(radius_arcsec=0.001, id_radius_arcsec=0.001),
    )
    with pytest.raises(ModelError, match="pairs"):
        train(
            Catalog.open(tmp_path / "pairs"),
            tmp_path / "m",
            TrainSettings(method="polynomial", params={}),
        )
    assert not (tmp_path / "m").exists()


# -- apply ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(current, tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("apply") / "whole"
    apply(current / "model.polynomial", Catalog.open(current / "lamost.observations"), directory)
    return contents(directory)


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3]))[::2])
def test_shards_in_any_order_equal_all(current, whole, tmp_path, order):
    catalog = Catalog.open(current / "lamost.observations")
    results = [
        apply(current / "model.polynomial", catalog, tmp_path / "out", partitions=f"{number}/3")
        for number in order
    ]
    assert [manifest is None for manifest in results] == [True, True, False]
    assert contents(tmp_path / "out") == whole


def test_pixels_and_indices_equal_all(current, whole, tmp_path):
    catalog = Catalog.open(current / "lamost.observations")
    model = current / "model.polynomial"
    n = len(catalog.pixels)
    north = [HealpixPixel(0, number) for number in range(4)]
    seen = [str(p) for p in north if any(p.overlaps(pixel) for pixel in catalog.pixels)]
    assert apply(model, catalog, tmp_path / "out", partitions=",".join(seen)) is None
    assert not (tmp_path / "out" / MANIFEST).exists()
    with pytest.raises(CatalogError, match=r"has no manifest\.json"):
        Catalog.open(tmp_path / "out")
    assert apply(model, catalog, tmp_path / "out", partitions="0,2-3,0-1") is None
    written = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out/dataset").rglob("*.parquet")
    }
    done = apply(model, catalog, tmp_path / "out", partitions=f"0-{n - 1}")
    assert done is not None and done.rows.n_out == catalog.n_rows
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in written.items())
    assert contents(tmp_path / "out") == whole


def test_another_model_or_catalog_does_not_mix_with_a_begun_output(current, tmp_path):
    catalog = Catalog.open(current / "lamost.observations")
    assert apply(current / "model.polynomial", catalog, tmp_path / "out", partitions="0") is None
    train(
        Catalog.open(current / "pairs"),
        tmp_path / "other",
        TrainSettings(method="polynomial", params={"order": 2}, validation="holdout"),
    )
    for model, observed in (
        (tmp_path / "other", catalog),
        (current / "model.polynomial", Catalog.open(current / "lamost.stars")),
    ):
        with pytest.raises(CatalogError, match="another run's output"):
            apply(model, observed, tmp_path / "out")


def test_a_tampered_model_is_refused(current, tmp_path):
    model = Path(shutil.copytree(current / "model.polynomial", tmp_path / "model"))
    catalog = Catalog.open(current / "lamost.observations")
    document = json.loads((model / "model.json").read_text())
    (name,) = document["files"]
    content = (model / name).read_bytes()
    (model / name).write_bytes(content.replace(b"1", b"2", 1))
    with pytest.raises(ModelError, match="is not the file that was saved"):
        apply(model, catalog, tmp_path / "out")
    assert not (tmp_path / "out").exists()


PIXELS = st.lists(
    st.integers(0, 12 * 4**3 - 1), min_size=1, max_size=40, unique=True
).map(lambda numbers: [HealpixPixel(3, number) for number in sorted(numbers)])  # fmt: skip


@given(PIXELS, st.integers(1, 60))
def test_shards_partition_the_list(pixels, total):
    shards = [parse_partitions(f"{number}/{total}", pixels) for number in range(1, total + 1)]
    assert sorted(itertools.chain(*shards)) == parse_partitions("all", pixels)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@given(PIXELS, st.data())
def test_indices_and_ranges(pixels, data):
    last = len(pixels) - 1
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, last), st.integers(0, last)).map(sorted), min_size=1)
    )
    text = ",".join(f"{a}-{b}" if a != b else f" {a}" for a, b in spans)
    expected = sorted({index for a, b in spans for index in range(a, b + 1)})
    assert parse_partitions(text, pixels) == expected


@given(PIXELS, st.integers(0, 6), st.data())
def test_a_pixel_means_what_is_inside_or_around_it(pixels, order, data):
    number = data.draw(st.integers(0, 12 * 4**order - 1))
    first, stop = number << 2 * (29 - order), (number + 1) << 2 * (29 - order)
    expected = [i for i, p in enumerate(pixels) if p.first < stop and first < p.stop]
    text = f"{order}:{number}"
    if expected:
        assert parse_partitions(text, pixels) == expected
    else:
        with pytest.raises(ConfigError, match="no rows in that pixel"):
            parse_partitions(text, pixels)


@given(st.text(alphabet="0123456789/-,: allx", max_size=12))
def test_any_text_gives_indices_or_a_clear_error(text):
    pixels = [HealpixPixel(0, number) for number in range(12)]
    with contextlib.suppress(ConfigError):
        found = parse_partitions(text, pixels)
        assert found == sorted(set(found))
        assert set(found) <= set(range(12))


@pytest.mark.parametrize(
    "text", ["5/3", "0/3", "0/0", "", "x", "12", "3-1", "0-12", "-1", "1/3/5", "1.5", "1,", ":",
             "0:12", "30:1", "0:-1", "a:1", "1:2:3"],
)  # fmt: skip
def test_wrong_partitions(text):
    with pytest.raises(ConfigError) as caught:
        parse_partitions(text, [HealpixPixel(0, number) for number in range(12)])
    assert caught.value.exit_code == 3


# -- a cluster changes nothing --------------------------------------------------------------------


def test_two_workers_give_the_same_bytes(cluster, stars, current, whole, tmp_path):
    assert isinstance(cluster, Cluster)
    for name, running in (("alone", Cluster()), ("together", cluster)):
        dedupe(
            Catalog.open(stars / "obs1-40"), tmp_path / name / "stars", SETTINGS, cluster=running
        )
        crossmatch(
            Catalog.open(stars / "obs1-40"),
            Catalog.open(stars / "stars2-40"),
            tmp_path / name / "pairs",
            CrossmatchSettings(radius_arcsec=1.0),
            cluster=running,
        )
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")
    model, catalog = current / "model.polynomial", Catalog.open(current / "lamost.observations")
    apply(model, catalog, tmp_path / "applied", cluster=cluster)
    assert contents(tmp_path / "applied") == whole

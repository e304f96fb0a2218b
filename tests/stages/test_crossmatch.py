"""Pairs and their folds do not depend on how the sky is cut."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sos_dask.api import crossmatch
from sos_dask.errors import CatalogError
from sos_dask.schema import LABELS
from sos_dask.sky.healpix import separation_arcsec
from sos_dask.stages.crossmatch import Crossmatch, CrossmatchSettings
from sos_dask.stars.group import GAIA_IDS, id_values
from sos_dask.stars.match import match
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.job import contents
from tests.skies import write_catalog
from tests.stages.clumps import N_ROWS, SIZES, rows_of, sky


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


@pytest.mark.parametrize(("target", "key"), [("stars", "star_id"), ("obs", "obs_id")])
def test_pairs_that_share_a_star_share_a_fold(stars, tmp_path, target, key):
    """Of the target or of the reference; also where observations of one star are the targets."""
    tables = []
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
        )
        tables.append(rows_of(tmp_path / str(size)))
        manifest = Manifest.load(tmp_path / str(size))
        stars_found = pc.count_distinct(tables[-1]["reference_star_id"]).as_py()
        assert manifest.summary["reference_stars"] == stars_found
    pixels = Catalog.open(tmp_path / str(SIZES[1]))
    seen = [set(pixels.read(one)["reference_star_id"].to_pylist()) for one in pixels.pixels]
    n_again = sum(map(len, seen)) - len(set().union(*seen))
    assert n_again > 2, "no pairs are joined over the edge of a partition: this tests little"
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


def test_a_crossmatch_that_broke_off_goes_on(stars, tmp_path):
    catalogs = (
        Catalog.open(stars / f"obs1-{SIZES[1]}"),
        Catalog.open(stars / f"stars2-{SIZES[1]}"),
    )
    settings = CrossmatchSettings(
        radius_arcsec=0.3, id_radius_arcsec=3.0, pairs="all", n_folds=4, seed=3
    )
    crossmatch(*catalogs, tmp_path / "whole", settings, name="pairs")
    places = [("crossmatch", 2), ("folds", 1), ("write pairs", 2)]

    def break_off(step: str, done: int, total: int) -> None:
        if places and (step, done) == places[0]:
            raise KeyboardInterrupt

    while places:
        with pytest.raises(KeyboardInterrupt):
            crossmatch(*catalogs, tmp_path / "broken", settings, name="pairs", report=break_off)
        del places[0]
    crossmatch(*catalogs, tmp_path / "broken", settings, name="pairs")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_the_order_in_which_inputs_are_named_does_not_matter(stars, tmp_path):
    inputs = {"target": stars / "stars1-40", "reference": stars / "obs2-40"}
    Crossmatch(inputs).run(tmp_path / "1" / "pairs")
    Crossmatch(dict(reversed(inputs.items()))).run(tmp_path / "2" / "pairs")
    pairs = rows_of(tmp_path / "1" / "pairs")
    assert pairs.num_rows > 20 and "target_star_id" in pairs.schema.names
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_pairs_fit_for_training(stars, tmp_path):
    """One candidate, no cut failed, repeats that agree, and some label on both sides."""
    sides = [rows_of(stars / "stars1-40"), rows_of(stars / "obs2-40")]
    changed = []
    for number, table in enumerate(sides):
        for name in LABELS[: 3 - number]:  # of the first all at once, of the second not log Z
            unknown = np.arange(len(table)) % 9 == number
            place = table.schema.get_field_index(name)
            labels = pa.array(table[name].to_numpy(), mask=unknown)
            table = table.set_column(place, table.schema.field(place), labels)
        changed.append(write_catalog(table, tmp_path / str(number), 100))
    settings = CrossmatchSettings(radius_arcsec=0.5, id_radius_arcsec=4.0, pairs="all")
    manifest = crossmatch(*changed, tmp_path / "pairs", settings)
    pairs = rows_of(tmp_path / "pairs")
    left, right = (
        {row[key]: row for row in rows_of(catalog.path).to_pylist()}
        for catalog, key in zip(changed, ("star_id", "obs_id"), strict=True)
    )
    n_good = 0
    for pair in pairs.to_pylist():
        one, other = left[pair["target_star_id"]], right[pair["reference_star_id"]]
        good = one["quality"] == 0 and other["quality"] == 0 and not one["flag_spread"]
        known = any(one[label] is not None and other[label] is not None for label in LABELS)
        assert pair["ambiguous"] == (pair["n_candidates"] > 1)
        assert pair["use"] == (good and known and not pair["ambiguous"])
        n_good += pair["use"]
        assert (pair["ra"], pair["snr"]) == (one["ra"], one["snr"])
        assert pair["teff_ref"] == other["teff"]
    assert 5 < n_good == manifest.summary["fit_for_training"] < len(pairs) / 2
    counts = {"ambiguous": pc.sum(pairs["ambiguous"]), "by_id": pc.sum(pairs["by_id"])}
    for name, count in counts.items():
        assert manifest.summary[name] == count.as_py() > 0
    without = set(left) - set(pairs["target_star_id"].to_pylist())
    assert manifest.rows.dropped == {"without a pair": len(without)}


def test_pairs_carry_the_labels_and_inputs_of_corrections(stars, tmp_path):
    """Other inputs are another recipe: pairs that lack them are not taken for these."""
    sides, alphas = {}, {}
    for side, name in (("target", "stars1-40"), ("reference", "stars2-40")):
        table = rows_of(stars / name)
        alphas[side] = pa.array(np.arange(table.num_rows) / 7, pa.float32())
        field = pa.field("alpha", pa.float32(), metadata={"unit": "dex"})
        table = table.append_column(field, alphas[side]).append_column("vsini", alphas[side])
        sides[side] = write_catalog(table, tmp_path / side, 40)
    plain = Crossmatch(sides).run(tmp_path / "plain")
    asked = CrossmatchSettings(labels=(*LABELS, "alpha"), inputs=("vsini", "teff"))
    more = Crossmatch(sides, asked).run(tmp_path / "more")
    assert more.fingerprint != plain.fingerprint
    pairs = rows_of(tmp_path / "more")
    keys = {"target": "target_star_id", "reference": "reference_star_id"}
    found = []
    for (side, key), name in zip(keys.items(), ("stars1-40", "stars2-40"), strict=True):
        stars_there = rows_of(stars / name)["star_id"].combine_chunks()
        found.append(alphas[side].take(pc.index_in(pairs[key], stars_there).combine_chunks()))
    one, other = (values.to_numpy() for values in found)
    for name, expected in (("vsini", one), ("alpha", one), ("alpha_ref", other)):
        np.testing.assert_array_equal(pairs[name].to_numpy(), expected)
    np.testing.assert_array_equal(pairs["alpha_diff"].to_numpy(), one - other)
    assert pairs.schema.field("alpha_diff").metadata[b"unit"] == b"dex"
    new = ["vsini", "alpha", "alpha_ref", "alpha_diff"]
    assert pairs.drop_columns(new).equals(rows_of(tmp_path / "plain"))


@pytest.mark.parametrize("column", ["teff", "pmra"])
def test_columns_that_are_not_numbers_are_refused(stars, tmp_path, column):
    table = rows_of(stars / "stars1-40").slice(0, 20)
    place = table.schema.get_field_index(column)
    text = pa.array(["5000"] * 20)
    wrong = write_catalog(table.set_column(place, column, text), tmp_path / "text")
    right = Catalog.open(stars / "stars2-40")
    for sides in ((wrong, right), (right, wrong)):
        with pytest.raises(CatalogError, match=f"column '{column}' has type string, not numbers"):
            crossmatch(*sides, tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


def test_float_ids_are_refused_where_they_are_compared(stars, tmp_path):
    table = rows_of(stars / "stars1-40")
    for name in GAIA_IDS.values():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(pa.float64()))
    right = Catalog.open(stars / "stars2-40")
    wrong = write_catalog(table, tmp_path / "floats", 40)
    with pytest.raises(CatalogError, match="is stored as float"):
        crossmatch(wrong, right, tmp_path / "pairs")
    alone = CrossmatchSettings(use_gaia_id=False)
    crossmatch(wrong, right, tmp_path / "pairs", alone)
    crossmatch(Catalog.open(stars / "stars1-40"), right, tmp_path / "whole", alone)
    names = ["target_star_id", "reference_star_id", "separation_arcsec", "by_id"]
    assert (
        rows_of(tmp_path / "pairs").select(names).equals(rows_of(tmp_path / "whole").select(names))
    )

"""Pairs that training sees: their weights, their errors, and how fainter rows see them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sos_dask import corrections as models
from sos_dask.errors import ModelError
from sos_dask.problem import DEFAULT, RV, Problem, input_of
from sos_dask.sky.healpix import ang2pix
from sos_dask.stages.sample import read_sample
from sos_dask.stages.train import PairsSource, Train, TrainSettings, normalised_errors
from sos_dask.stars.repeats import normalisation
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.skies import hard_positions, observations, write_catalog
from tests.stages.pairs import read

BY_SNR = Problem(inputs=(*DEFAULT.inputs, input_of("snr")))
SIZES = (10**6, 40, 5)


def pairs_of_stars(n_stars: int, seed: int) -> pa.Table:
    """Pairs at the hard places: of each star up to six, at most 10 arcsec from each other."""
    rng = np.random.default_rng(seed)
    star = np.repeat(np.arange(n_stars), rng.integers(1, 7, n_stars))
    n = len(star)
    ra, dec = (values[star] for values in hard_positions(n_stars, rng))
    north = rng.uniform(-3.5, 3.5, n) / 3600
    over = np.abs(dec + north) > 90
    dec = np.where(over, np.sign(dec) * 180 - dec - north, dec + north)
    east = rng.uniform(-3.5, 3.5, n) / 3600
    ra = ra + np.where(over, 180.0, 0.0) + east / np.maximum(np.cos(np.radians(dec)), 1e-5)
    table = observations(n, seed)
    columns = {"ra": ra % 360, "dec": dec, "_healpix_29": ang2pix(ra % 360, dec)}
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values))
    table = table.append_column("reference_star_id", pa.array([f"s{one}" for one in star]))
    for label in DEFAULT.labels:
        table = table.append_column(label.diff, pa.array(rng.normal(size=n).astype(np.float32)))
    table = table.append_column("fold", pa.array((star % 5).astype(np.int8)))
    table = table.append_column("use", pa.array(rng.random(n) < 0.8))
    return table.sort_by([("_healpix_29", "ascending"), ("obs_id", "ascending")])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pairs_of_one_star_weigh_less_than_two_stars(tmp_path, seed):
    """However the sky is cut, and whichever the edges that go through a star."""
    table = pairs_of_stars(80, seed)
    used = table.filter(table["use"])
    stars = used["reference_star_id"].to_pylist()
    expected = np.array([2 / (1 + stars.count(one)) for one in stars], np.float32)
    assert len(set(expected.tolist())) > 3
    divided = 0
    for size in SIZES:
        catalog = write_catalog(table, tmp_path / str(size), size, "pairs")
        source = PairsSource(catalog)
        found = [source.load(index).weight for index in range(source.n_batches)]
        np.testing.assert_array_equal(np.concatenate(found), expected)
        parts = [set(catalog.read(one)["reference_star_id"].to_pylist()) for one in catalog.pixels]
        divided += sum(map(len, parts)) - 80
    assert divided > 10, "edges go through stars"
    total = {one: expected[np.array(stars) == one].sum() for one in set(stars)}
    assert min(total.values()) >= 1 and max(total.values()) < 2


def test_pairs_without_a_star_weigh_as_much_as_any(tmp_path):
    table = pairs_of_stars(20, 4).drop_columns(["reference_star_id"])
    batch = PairsSource(write_catalog(table, tmp_path / "pairs")).load(0)
    assert (batch.weight == 1).all() and len(batch.weight) > 20


# -- as fainter rows see them ----------------------------------------------------------------------


def source_of(monkeypatch: pytest.MonkeyPatch, folder: Path, **given: Any) -> PairsSource:
    """Source of the pairs that a stage gives to its first fit."""
    seen: list[PairsSource] = []

    def fit(method: str, source: PairsSource, *_: Any, **__: Any) -> None:
        seen.append(source)
        raise ModelError("seen")

    problem = given.pop("problem", BY_SNR)
    with monkeypatch.context() as patch, pytest.raises(ModelError, match="seen"):
        patch.setattr(models, "fit", fit)
        Train(given, TrainSettings(method="boosted", params={}, problem=problem)).run(folder)
    return seen[0]


@pytest.fixture
def inputs(build) -> dict[str, Path | Catalog]:
    names = {"pairs": "pairs", "sample": "sample", "target_stars": "stars"}
    return {role: build / f"lamost.{name}" for role, name in names.items()}


def test_a_rebuild_trains_on_pairs_as_its_rows_see_them(build):
    made = Manifest.load(build / "lamost.model.polynomial").recipe.inputs
    assert set(made) == {"pairs", "sample", "target_stars"}
    for name, product in (("sample", "sample"), ("target_stars", "stars"), ("pairs", "pairs")):
        assert made[name] == Manifest.load(build / f"lamost.{product}").fingerprint


def test_degraded_pairs_are_as_faint_as_rows_of_the_sample(inputs, monkeypatch, tmp_path):
    source = source_of(monkeypatch, tmp_path / "out", **inputs)
    rows = BY_SNR.matrix(read_sample(inputs["sample"], good=True))
    n_degraded = 0
    for index in range(source.n_batches):
        batch = source.load(index)
        made = batch.degraded
        assert made is not None and made.errors is not None and made.degraded is None
        assert len(made.fold) <= source.times * len(batch.fold)
        assert np.isin(made.features[:, 3], rows[:, 3]).all()
        assert set(made.fold) <= set(batch.fold)
        n_degraded += len(made.fold)
    assert n_degraded > source.catalog.n_rows


@pytest.mark.parametrize("size", SIZES)
def test_degraded_pairs_do_not_depend_on_partitions(inputs, monkeypatch, tmp_path, size):
    def everything(pairs: Path | Catalog, name: str) -> np.ndarray:
        source = source_of(monkeypatch, tmp_path / name, **{**inputs, "pairs": pairs})
        made = [source.load(index).degraded for index in range(source.n_batches)]
        parts = [
            np.column_stack([one.features, one.differences, one.weight]) for one in made if one
        ]
        return np.sort(np.concatenate(parts), axis=0)

    other = write_catalog(read(Path(str(inputs["pairs"]))), tmp_path / "pairs", size, "pairs")
    np.testing.assert_array_equal(everything(other, "a"), everything(inputs["pairs"], "b"))


def test_without_rows_or_s_n_pairs_are_as_they_were_measured(inputs, monkeypatch, tmp_path, build):
    bare = {"pairs": inputs["pairs"]}
    table = read(build / "lamost.pairs").drop_columns(["feh_err"])
    unknown = write_catalog(table, tmp_path / "pairs", name="pairs")
    for number, given in enumerate(
        (bare, {**inputs, "problem": DEFAULT}, {**inputs, "pairs": unknown})
    ):
        source = source_of(monkeypatch, tmp_path / str(number), **given)
        assert source.times == 0 and source.load(0).degraded is None


def test_a_label_that_is_no_input_makes_no_bias_of_its_noise(build, monkeypatch, tmp_path):
    """Radial velocity by G, labels and S/N: scattered upwards it is no more often met."""
    table = read(build / "lamost.pairs")
    for name in ("rv_diff", "rv_err"):
        values = pa.array(np.zeros(len(table), np.float32))
        table = table.drop_columns([name]) if name in table.schema.names else table
        table = table.append_column(name, values)
    pairs = write_catalog(table, tmp_path / "pairs", name="pairs")
    given = {"pairs": pairs, "sample": build / "lamost.sample", "problem": RV}
    assert source_of(monkeypatch, tmp_path / "out", **given).times == 0


def test_errors_are_normalised_by_the_repeats_of_the_target(inputs, monkeypatch, tmp_path, build):
    factors = Manifest.load(build / "lamost.stars").summary["error_factors"]
    source = source_of(monkeypatch, tmp_path / "out", **inputs)
    used = read(build / "lamost.pairs")
    used = used.filter(used["use"])
    errors = np.concatenate([source.load(n).errors for n in range(source.n_batches)])
    logg, snr = (np.array(used[name].to_numpy(), np.float64) for name in ("logg", "snr"))
    for number, label in enumerate(DEFAULT.labels):
        factor = normalisation(factors, label.name, logg, snr)
        stated = used[label.error].to_numpy()
        np.testing.assert_allclose(errors[:, number], stated * factor, rtol=1e-6)
        assert (factor != 1).any()
    plain = normalised_errors(used, DEFAULT, ())
    np.testing.assert_allclose(plain[:, 0], used["teff_err"].to_numpy(), rtol=1e-6)


def test_the_correlation_of_errors_is_that_of_repeats(tmp_path):
    """Of pairs in use, however the sky is cut."""
    table, rng = pairs_of_stars(600, 5), np.random.default_rng(5)
    star = np.array([int(one[1:]) for one in table["reference_star_id"].to_pylist()])
    common = rng.normal(size=len(star))
    for name, unit, sign in (("teff", 50.0, 1), ("logg", 0.1, 1), ("feh", 0.05, -1)):
        values = (
            5.0 + 0.01 * star + unit * (sign * 0.9 * common + 0.44 * rng.normal(size=len(star)))
        )
        values[~table["use"].to_numpy()] = 1e4 * rng.normal(size=np.sum(~table["use"].to_numpy()))
        for column, of in ((name, values), (f"{name}_err", np.full(len(star), unit))):
            place = table.schema.get_field_index(column)
            field = table.schema.field(place)
            table = table.set_column(place, field, pa.array(of).cast(field.type))
    found = []
    for size in SIZES:
        catalog = write_catalog(table, tmp_path / str(size), size, "pairs")
        found.append(PairsSource(catalog).correlation_of_errors())
        np.testing.assert_array_equal(found[0], found[-1])
    expected = 0.81 * np.array([[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    np.fill_diagonal(expected, 1.0)
    np.testing.assert_allclose(found[0], expected, atol=0.08)

"""Corrected rows: of any share of the partitions, and with the coverage of a rebuild."""

import contextlib
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sos_dask.api import train
from sos_dask.correct import COVERAGE_MEANINGS, FLAG_MEANINGS, FLAG_OUTSIDE, FLAG_SPARSE
from sos_dask.errors import CatalogError, ConfigError, ModelError
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.apply import Apply, ApplySettings, parse_partitions
from sos_dask.stages.train import TrainSettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import MANIFEST, Manifest
from sos_dask.storage.store import verify
from tests.command_line import Cli, assert_error, cli
from tests.job import contents
from tests.stages.clumps import rows_of
from tests.steps import apply

__all__ = ["cli"]  # a fixture


@pytest.fixture(scope="module")
def whole(current, tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("apply") / "whole"
    apply(
        current / "lamost.model.polynomial",
        Catalog.open(current / "lamost.observations"),
        directory,
    )
    return contents(directory)


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3]))[::2])
def test_shards_in_any_order_equal_all(current, whole, tmp_path, order):
    catalog = Catalog.open(current / "lamost.observations")
    results = [
        apply(
            current / "lamost.model.polynomial", catalog, tmp_path / "out", partitions=f"{number}/3"
        )
        for number in order
    ]
    assert [manifest is None for manifest in results] == [True, True, False]
    assert contents(tmp_path / "out") == whole


def test_pixels_and_indices_equal_all(current, whole, tmp_path):
    catalog = Catalog.open(current / "lamost.observations")
    model = current / "lamost.model.polynomial"
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
    assert (
        apply(current / "lamost.model.polynomial", catalog, tmp_path / "out", partitions="0")
        is None
    )
    train(
        Catalog.open(current / "lamost.pairs"),
        tmp_path / "other",
        TrainSettings(method="polynomial", params={"order": 2}, validation="holdout"),
    )
    for model, observed in (
        (tmp_path / "other", catalog),
        (current / "lamost.model.polynomial", Catalog.open(current / "lamost.stars")),
    ):
        with pytest.raises(CatalogError, match="another run's output"):
            apply(model, observed, tmp_path / "out")


def test_a_tampered_model_is_refused(current, tmp_path):
    model = Path(shutil.copytree(current / "lamost.model.polynomial", tmp_path / "model"))
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


# -- with a coverage ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build(current) -> Path:
    return Path(current).resolve()


def test_single_steps_make_the_rows_of_a_rebuild(cli: Cli, build, tmp_path):
    model, catalog = build / "lamost.model.polynomial", build / "lamost.observations"
    errors = ["--errors", build / "lamost.uncertainty"]
    ran = cli(
        "coverage", build / "lamost.pairs", model, catalog, build / "lamost.stars", *errors,
        "-o", "coverage", "-w", 0,
    )  # fmt: skip
    assert ran.code == 0 and "inside" in ran.out, ran.err
    assert rows_of(tmp_path / "coverage").equals(rows_of(build / "lamost.coverage"))
    given = ["apply", model, catalog, *errors, "--coverage", "coverage", "--fallback", "measured"]
    assert cli(*given, "-o", "whole/corrected", "-w", 0).code == 0
    made, wanted = rows_of(tmp_path / "whole/corrected"), rows_of(build / "lamost.corrected")
    assert made.equals(wanted)
    assert made.schema.equals(wanted.schema, check_metadata=True)
    for shard in ("2/2", "1/2"):
        assert cli(*given, "-o", "shards/corrected", "-w", 0, "--partitions", shard).code == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_the_steps_before_make_the_bytes_of_a_rebuild(cli: Cli, build, tmp_path):
    def made(name: str, *arguments: object) -> None:
        ran = cli(*arguments, "-o", name, "-w", 0)
        assert ran.code == 0, ran.err
        assert contents(tmp_path / name) == contents(build / name), name

    made("lamost.stars", "dedupe", build / "lamost.observations")
    stars = [f"{name}={build / name}.stars" for name in ("apogee", "galah")]
    united = ["reference", *stars, "--rows-per-partition", 1500]
    made("reference", *united)
    assert Manifest.load(tmp_path / "reference").summary["offsets"]["galah"], "a shift to miss"
    pairs = ["crossmatch", build / "lamost.observations", tmp_path / "reference"]
    assert cli(*pairs, "-o", "lamost.pairs", "-w", 0).code == 0
    assert rows_of(tmp_path / "lamost.pairs").equals(rows_of(build / "lamost.pairs"))
    assert cli(*united, "--no-offsets", "-o", "unshifted", "-w", 0).code == 0
    assert not rows_of(tmp_path / "unshifted").equals(rows_of(build / "reference"))


def test_a_fallback_that_is_not_there_is_refused(build, tmp_path):
    inputs = {
        "model": build / "lamost.model.polynomial",
        "observations": build / "lamost.observations",
    }
    covered = {**inputs, "coverage": build / "lamost.coverage"}
    cases: list[tuple[dict[str, Path], Any]]
    cases = [(covered, "polynomial"), (inputs, "none"), (inputs, "polynomial")]
    for chosen, fallback in cases:
        with pytest.raises(ConfigError, match=f"the fallback is '{fallback}'"):
            Apply(chosen, ApplySettings(fallback=fallback)).run(tmp_path / "out")
    smooth = {"smooth": build / "lamost.model.polynomial"}
    for chosen in ({**covered, **smooth}, {**inputs, **smooth}):
        with pytest.raises((ConfigError, ModelError), match="the fallback is 'edge'"):
            Apply(chosen).run(tmp_path / "out")


def test_what_the_correction_fades_to(cli: Cli, build, tmp_path):
    model, catalog = build / "lamost.model.polynomial", build / "lamost.observations"
    given = ["apply", model, catalog, "--coverage", build / "lamost.coverage", "-w", 0]
    for name in ("none", "edge"):
        assert cli(*given, "--fallback", name, "-o", name).code == 0
    assert cli("apply", model, catalog, "-o", "plain", "-w", 0).code == 0
    none, edge, plain = (rows_of(tmp_path / name) for name in ("none", "edge", "plain"))
    assert edge["teff_delta"].equals(plain["teff_delta"])
    flags = none["flag_sos"].to_numpy()
    outside, inside = flags & FLAG_OUTSIDE != 0, flags & (FLAG_OUTSIDE | FLAG_SPARSE | 1) == 0
    assert outside.any() and inside.any()
    delta = none["teff_delta"].to_numpy()
    assert (delta[outside & (flags & 1 == 0)] == 0).all()
    assert (delta[inside] == plain["teff_delta"].to_numpy()[inside]).all()
    assert Manifest.load(tmp_path / "none").summary["fallback"] == "none"


def test_a_coverage_that_does_not_fit_is_refused(cli: Cli, build, tmp_path):
    model, catalog = build / "lamost.model.polynomial", build / "lamost.observations"
    trained = ["train", build / "lamost.pairs", "-m", "polynomial", "-p", "order=2", "-w", 0]
    assert cli(*trained, "-o", "other").code == 0
    other = tmp_path / "other"
    given = ["-o", "out", "-w", 0, "--coverage"]
    ran = cli("apply", model, catalog, *given, build / "lamost.pairs")
    assert_error(
        ran, 5, "pairs is not a product 'coverage'", "sos-dask coverage PAIRS MODEL CATALOG STARS"
    )
    ran = cli("apply", model, build / "lamost.stars", *given, build / "lamost.coverage")
    assert_error(ran, 5, "is not the coverage of .*lamost.stars")
    ran = cli("apply", other, catalog, *given, build / "lamost.coverage")
    assert_error(ran, 7, "was made for another correction")
    inputs = [build / "lamost.pairs", model, catalog, build / "lamost.stars"]
    assert cli("coverage", *inputs, "-o", "plain", "-w", 0).code == 0
    ran = cli("apply", model, catalog, *given, "plain", "--errors", build / "lamost.uncertainty")
    assert_error(ran, 7, "was made without these errors", "Rerun sos-dask coverage .* --errors")
    boosted = ["train", build / "lamost.pairs", "-m", "boosted", "-p", "n_rounds=5", "-w", 0]
    assert cli(*boosted, "-o", "trees").code == 0
    ran = cli("apply", model, catalog, *given, build / "lamost.coverage", "--fallback", "trees")
    assert_error(ran, 7, "trees is a model of method 'boosted' .*: the fallback is a polynomial")
    ran = cli("apply", model, catalog, "-o", "out", "-w", 0, "--fallback", "none")
    assert_error(ran, 3, "--fallback needs --coverage")
    assert not (tmp_path / "out").exists()


def test_rows_do_not_depend_on_how_many_are_corrected_at_once(build, tmp_path, monkeypatch):
    inputs = {
        "model": build / "lamost.model.polynomial",
        "observations": build / "lamost.observations",
    }
    inputs |= {"coverage": build / "lamost.coverage", "errors": build / "lamost.uncertainty"}
    for n_rows in (1 << 17, 97):
        monkeypatch.setattr("sos_dask.stages.apply._ROWS_AT_ONCE", n_rows)
        Apply(inputs, ApplySettings(fallback="none")).run(tmp_path / str(n_rows) / "corrected")
    assert contents(tmp_path / "97") == contents(tmp_path / str(1 << 17))


def test_a_worker_must_hold_the_models_too(build):
    inputs = {
        "model": build / "lamost.model.polynomial",
        "observations": build / "lamost.observations",
    }
    sizes = [
        sum(file.stat().st_size for file in (build / name).iterdir())
        for name in ("lamost.model.polynomial", "lamost.uncertainty")
    ]
    assert Apply(inputs).held_bytes() == sizes[0]
    assert Apply({**inputs, "errors": build / "lamost.uncertainty"}).held_bytes() == sum(sizes)


def test_flags_are_counted(build):
    rows, manifest = rows_of(build / "lamost.corrected"), Manifest.load(build / "lamost.corrected")
    meanings = FLAG_MEANINGS | COVERAGE_MEANINGS
    flags = rows["flag_sos"].to_numpy()
    assert manifest.summary["flags"] == {
        text: int(np.count_nonzero(flags & bit)) for bit, text in meanings.items()
    }
    assert sum(manifest.summary["flags"].values()) > 100


def test_paths_that_are_missing(cli: Cli, build):
    ran = cli("coverage", build / "lamost.pairs", build / "lamost.model.polynomial", "-o", "out")
    assert_error(ran, 3, re.escape("2 paths are not PAIRS MODEL CATALOG STARS"))
    inputs = [
        build / name
        for name in (
            "lamost.pairs",
            "lamost.model.polynomial",
            "lamost.observations",
            "lamost.stars",
        )
    ]
    assert_error(cli("coverage", *inputs), 3, "--out is missing")


def test_apply_replaces_columns_that_a_catalog_has_already(build, tmp_path):
    model = build / "lamost.model.polynomial"
    apply(model, Catalog.open(build / "lamost.observations"), tmp_path / "once")
    apply(model, Catalog.open(tmp_path / "once"), tmp_path / "twice")
    assert rows_of(tmp_path / "twice").equals(rows_of(tmp_path / "once"))
    assert verify(tmp_path / "twice") == []

"""Coverage and apply as single steps: what a rebuild makes, row for row."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sos_dask.correct import FLAG_OUTSIDE, FLAG_SPARSE
from sos_dask.errors import ConfigError, ModelError
from sos_dask.stages.apply import Apply, ApplySettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.store import verify
from tests.command_line import Cli, assert_error, cli
from tests.job import contents
from tests.run import apply

__all__ = ["cli"]  # a fixture


@pytest.fixture(scope="module")
def build(small_store) -> Path:
    return (small_store / "current").resolve()


def rows(catalog: Path) -> pa.Table:
    opened = Catalog.open(catalog)
    return pa.concat_tables([opened.read(pixel) for pixel in opened.pixels])


def test_single_steps_make_the_rows_of_a_rebuild(cli: Cli, build, tmp_path):
    model, catalog = build / "model.polynomial", build / "lamost.observations"
    errors = ["--errors", build / "uncertainty"]
    ran = cli(
        "coverage", build / "pairs", model, catalog, build / "lamost.stars", *errors,
        "-o", "coverage", "-w", 0,
    )  # fmt: skip
    assert ran.code == 0 and "inside" in ran.out, ran.err
    assert rows(tmp_path / "coverage").equals(rows(build / "coverage"))
    given = ["apply", model, catalog, *errors, "--coverage", "coverage", "--fallback", model]
    assert cli(*given, "-o", "whole/corrected", "-w", 0).code == 0
    made, wanted = rows(tmp_path / "whole/corrected"), rows(build / "lamost.corrected")
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
    made("pairs", "crossmatch", tmp_path / "lamost.stars", tmp_path / "reference")
    made("model.polynomial", "train", tmp_path / "pairs", "-m", "polynomial")
    assert cli(*united, "--no-offsets", "-o", "unshifted", "-w", 0).code == 0
    assert not rows(tmp_path / "unshifted").equals(rows(build / "reference"))


def test_a_fallback_that_is_not_there_is_refused(build, tmp_path):
    inputs = {"model": build / "model.polynomial", "observations": build / "lamost.observations"}
    covered = {**inputs, "coverage": build / "coverage"}
    cases: list[tuple[dict[str, Path], Any]]
    cases = [(covered, "polynomial"), (inputs, "none"), (inputs, "polynomial")]
    for given, fallback in cases:
        with pytest.raises(ConfigError, match=f"the fallback is '{fallback}'"):
            Apply(given, ApplySettings(fallback=fallback)).run(tmp_path / "out")
    smooth = {"smooth": build / "model.polynomial"}
    for given in ({**covered, **smooth}, {**inputs, **smooth}):
        with pytest.raises((ConfigError, ModelError), match="the fallback is 'edge'"):
            Apply(given).run(tmp_path / "out")


def test_what_the_correction_fades_to(cli: Cli, build, tmp_path):
    model, catalog = build / "model.polynomial", build / "lamost.observations"
    given = ["apply", model, catalog, "--coverage", build / "coverage", "-w", 0]
    for name in ("none", "edge"):
        assert cli(*given, "--fallback", name, "-o", name).code == 0
    assert cli("apply", model, catalog, "-o", "plain", "-w", 0).code == 0
    none, edge, plain = (rows(tmp_path / name) for name in ("none", "edge", "plain"))
    assert edge["teff_delta"].equals(plain["teff_delta"])
    flags = none["flag_sos"].to_numpy()
    outside, inside = flags & FLAG_OUTSIDE != 0, flags & (FLAG_OUTSIDE | FLAG_SPARSE | 1) == 0
    assert outside.any() and inside.any()
    delta = none["teff_delta"].to_numpy()
    assert (delta[outside & (flags & 1 == 0)] == 0).all()
    assert (delta[inside] == plain["teff_delta"].to_numpy()[inside]).all()
    assert Manifest.load(tmp_path / "none").summary["fallback"] == "none"


def test_a_coverage_that_does_not_fit_is_refused(cli: Cli, build, tmp_path):
    model, catalog = build / "model.polynomial", build / "lamost.observations"
    trained = ["train", build / "pairs", "-m", "polynomial", "-p", "order=2", "-w", 0]
    assert cli(*trained, "-o", "other").code == 0
    other = tmp_path / "other"
    given = ["-o", "out", "-w", 0, "--coverage"]
    ran = cli("apply", model, catalog, *given, build / "pairs")
    assert_error(
        ran, 5, "pairs is no product 'coverage'", "sos-dask coverage PAIRS MODEL CATALOG STARS"
    )
    ran = cli("apply", model, build / "lamost.stars", *given, build / "coverage")
    assert_error(ran, 5, "is not the coverage of .*lamost.stars")
    ran = cli("apply", other, catalog, *given, build / "coverage")
    assert_error(ran, 7, "was made for another correction")
    inputs = [build / "pairs", model, catalog, build / "lamost.stars"]
    assert cli("coverage", *inputs, "-o", "plain", "-w", 0).code == 0
    ran = cli("apply", model, catalog, *given, "plain", "--errors", build / "uncertainty")
    assert_error(ran, 7, "was made without these errors", "Rerun sos-dask coverage .* --errors")
    boosted = ["train", build / "pairs", "-m", "boosted", "-p", "n_rounds=5", "-w", 0]
    assert cli(*boosted, "-o", "trees").code == 0
    ran = cli("apply", model, catalog, *given, build / "coverage", "--fallback", "trees")
    assert_error(ran, 7, "trees is a model of method 'boosted': the fallback is 'polynomial'")
    ran = cli("apply", model, catalog, "-o", "out", "-w", 0, "--fallback", "none")
    assert_error(ran, 3, "--fallback needs --coverage")
    assert not (tmp_path / "out").exists()


def test_paths_that_are_missing(cli: Cli, build):
    ran = cli("coverage", build / "pairs", build / "model.polynomial", "-o", "out")
    assert_error(ran, 3, re.escape("2 paths are not PAIRS MODEL CATALOG STARS"))
    inputs = [
        build / name
        for name in ("pairs", "model.polynomial", "lamost.observations", "lamost.stars")
    ]
    assert_error(cli("coverage", *inputs), 3, "--out is missing")


def test_apply_replaces_columns_that_a_catalog_has_already(build, tmp_path):
    model = build / "model.polynomial"
    apply(model, Catalog.open(build / "lamost.observations"), tmp_path / "once")
    apply(model, Catalog.open(tmp_path / "once"), tmp_path / "twice")
    assert rows(tmp_path / "twice").equals(rows(tmp_path / "once"))
    assert verify(tmp_path / "twice") == []

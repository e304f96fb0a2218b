"""The gate: which figures stop a build, and how it says so."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.errors import GateError
from sos_dask.rebuild import gate
from sos_dask.rebuild.gate import Figures, GateSection, figures_of, label_shifts, reasons
from sos_dask.rebuild.history import builds, products_of
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.storage.manifest import Manifest
from tests.job import write_job
from tests.skies import observations, write_catalog

SOUND = Figures(
    {"a": 1000}, {"a": 0.01}, {"a.teff": 0.1}, {"c": 0.2}, {"b": (5, 50)},
    {"u.teff": (0.68, 0.6, 0.7)},
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rows": {"a": 980}}, "a: 980 rows, 2 % less than the 1,000 .* 1 %"),
        ({"rejected": {"a": 0.03}}, "a: 3 % rejected rows, 1 % in the published build"),
        ({"nulls": {"a.teff": 0.2}}, "a.teff: 20 % nulls, 10 % in the published build .* 2 %"),
        ({"nulls": {"a.feh": 0.95}}, "a.feh: 95 % nulls .limit 90 %"),
        ({"outside": {"c": 0.4}}, "c: 40 % rows outside the coverage"),
        ({"failing": {"b": (11, 50)}}, "b: 11 of 50 bins .* fail, 5 of 50"),
        ({"hit_rates": {"u.teff": (0.5, 0.45, 0.55)}}, "68 % intervals contain 50 %"),
        ({"hit_rates": {"u.teff": (0.9, 0.85, 0.95)}}, "68 % intervals contain 90 %"),
        ({"rows": {"a": 995}}, ""),
        ({"rows": {}}, ""),  # the job no longer asks for it
        ({"rows": {"a": 2000, "new": 1}}, ""),
        ({"failing": {"b": (11, 200)}}, ""),
        ({"hit_rates": {"u.teff": (0.5, 0.4, 0.6)}}, ""),
        ({"rejected": {"a": 0.0, "new": 0.1}}, ""),
    ],
)
def test_each_limit(monkeypatch, changed, says):
    of = {"now": SOUND._replace(**changed), "before": SOUND}
    monkeypatch.setattr(gate, "figures_of", lambda products, lenient=False: of[products["which"]])
    monkeypatch.setattr(gate, "label_shifts", lambda before, after: iter(()))
    now, before = {"which": "now"}, {"which": "before"}
    found = list(reasons(GateSection(), now, before))  # type: ignore[arg-type]
    assert len(found) == bool(says)
    assert re.search(says, "".join(found))
    off = GateSection(enabled=False)
    assert not list(reasons(off, now, before))  # type: ignore[arg-type]


def test_figures_of_a_build(small_store):
    products = products_of(small_store / "current")
    found = figures_of(products)
    observed = Manifest.load(products["lamost.observations"])
    assert found.rows["lamost.observations"] == observed.rows.n_out
    assert found.rejected["apogee.observations"] > 0
    assert 0 < found.nulls["lamost.observations.feh"] < 0.1
    assert 0 < found.nulls["lamost.corrected.corrected label"] < 0.1
    assert set(found.hit_rates) == {f"lamost.uncertainty.{x}" for x in ("teff", "logg", "feh")}
    assert 0 < found.outside["lamost.coverage"] < 1 and found.failing["lamost.comparison"][1] > 0
    assert list(reasons(GateSection(), products, {})) == []
    assert list(reasons(GateSection(), products, products)) == []


def test_labels_are_compared_on_rows_of_both(small_store, tmp_path):
    table = observations(3000, spread=True)
    moved = {}
    for name, shift in (("old", 0.0), ("new", 30.0)):
        sos = pa.array(table["teff"].to_numpy() - shift, pa.float32())
        some = table.append_column("teff_sos", sos).slice(0 if shift else 500)
        moved[name] = {"x": write_catalog(some, tmp_path / name, 100 if shift else 300).path}
    manifest = Manifest.load
    applied = lambda path: _as_stage(manifest(path), "apply")  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "load", applied)
        (found,) = label_shifts(moved["old"], moved["new"])
    assert (found["product"], found["label"], found["n"]) == ("x", "teff", 2500)
    assert np.allclose([found["p16"], found["median"], found["p84"]], -30, atol=1e-3)


def _as_stage(made: Manifest, stage: str) -> Manifest:
    recipe = type(made.recipe)(stage, 1, made.recipe.params, made.recipe.inputs)
    return Manifest(recipe, made.rows, made.files, made.summary)


@pytest.fixture
def refusing(changed, store, small_sky) -> Path:
    """A job of products that are all there, but for the cut of the published ones: they shift."""
    return write_job(store.parent, small_sky, more="[gate.shift]\nteff = 1e-9\n")


def test_a_refused_build_is_kept_and_a_person_decides(refusing, store, cli, caplog):
    before = (store / "current").resolve()
    first = cli("rebuild", refusing, "--json")
    assert first.code == 10 and first.json["outcome"] == "refused"
    assert "median of teff" in first.json["reasons"][0]
    assert (store / "current").resolve() == before
    again = cli("rebuild", refusing)
    assert again.code == 10 and "not published: lamost.corrected: the median" in again.err
    states = [one.state for one in builds(store)]
    assert states == ["kept", "current", "refused"], "it is one build"
    listed = cli("builds", "--store", store)
    assert "refused" in listed.out and "median of teff" in " ".join(listed.out.split())
    differ = cli("diff", "current", first.json["build"], "--store", store)
    assert differ.code == 0 and "snr" in differ.out and "teff [K]" in differ.out
    told = cli("status", "--store", store, "--json").json
    assert told["last_failure"]["outcome"] == "refused" and told["current"] == before.name

    assert cli("publish", "--store", store).code == 0
    done = cli("rebuild", refusing, "--json")
    assert (done.code, done.json["outcome"]) == (0, "unchanged")
    assert done.json["build"] == first.json["build"]
    assert cli("rollback", "--store", store, "--json").json["current"] == before.name
    with pytest.raises(GateError, match="withdrawn by a rollback") as stopped:
        rebuild(load_job(refusing))
    assert stopped.value.build.outcome == "refused"
    assert cli("gc", "--store", store, "--keep", 1).code == 0
    assert [one.state for one in builds(store)] == ["current", "withdrawn"]


def test_a_wider_limit_publishes_what_was_refused(refusing, store, small_sky):
    with pytest.raises(GateError):
        rebuild(load_job(refusing))
    build = rebuild(load_job(write_job(store.parent, small_sky)))
    assert build.outcome == "published" and not [one for one in build.stages if one.ran]
    assert [one.state for one in builds(store)] == ["kept", "kept", "current"]


def test_a_build_that_cannot_be_compared_is_not_published(refusing, store, small_sky, cli):
    before = (store / "current").resolve()
    one = next((before / "lamost.corrected").resolve().rglob("Npix=*.parquet"))
    whole = one.read_bytes()
    one.write_bytes(whole[:-99])
    with pytest.raises(GateError, match="cannot be compared with the published build") as stopped:
        rebuild(load_job(refusing))
    assert cli("publish", "--store", store).code == 0, "a person decides"
    assert (store / "current").resolve() == stopped.value.build.path.resolve()
    back = cli("rollback", "--store", store)
    assert back.code == 5 and "Npix" in back.err, "a damaged build is not published again"
    for one in (store / "current/").iterdir():
        one.unlink()
    (store / "current/build.json").write_text("{")
    with pytest.raises(GateError, match="its list of products cannot be read"):
        rebuild(load_job(write_job(store.parent, small_sky)))


def test_limits_of_other_labels_stay():
    assert GateSection(shift={"teff": 50.0}).shift == {
        "teff": 50.0, "logg": 0.04, "feh": 0.02, "rv": 0.1,
    }  # fmt: skip

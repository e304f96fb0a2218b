"""Labels and inputs beside the usual ones, from files to corrected rows."""

import numpy as np
import pyarrow as pa
import pytest

from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.run.cluster import Cluster
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.survey_files import write_csv

N = 400
USUAL = ("teff", "logg", "feh")
JOB = """
format = 1
name = "labels"
store = "store"
[target]
survey = "target.toml"
files = ["target.csv"]
[reference.first]
survey = "first.toml"
files = ["first.csv"]
[reference.velocities]
survey = "velocities.toml"
files = ["velocities.csv"]
[attach.gaia]
files = ["gaia.csv"]
columns = {distance = "dist", colour = "bp_rp"}
by = "position"
[dedupe]
use_gaia_id = false
[corrections.labels]
labels = ["teff", "feh"]
inputs = ["teff", "logg", "feh", "distance", "colour"]
[corrections.more-labels]
labels = ["mg_fe", "rv"]
inputs = ["teff"]
[train]
methods = ["polynomial"]
[train.params.polynomial]
order = 1
[report]
enabled = false
"""


def describe(folder, name, columns, extra=()):
    """Survey whose columns have the names of the product."""
    text = f'format = 1\nname = "{name}"\ntitle = "x"\nposition_epoch = 2016.0\n[columns]\n'
    for column in ("obs_id", "ra", "dec", *columns):
        text += f'{column} = {{ source = "{column}" }}\n'
    for column in extra:
        text += f'[extra.{column}]\nsource = "{column}"\nunit = "dex"\n'
    (folder / f"{name}.toml").write_text(text)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build: two surveys of stars with [Mg/Fe], and one of nothing but velocities and it."""
    folder, rng = tmp_path_factory.mktemp("labels"), np.random.default_rng(5)
    place = {"ra": rng.uniform(0, 360, N), "dec": rng.uniform(-60, 60, N)}
    true = {"teff": rng.normal(5200, 400, N), "logg": rng.uniform(1, 4.8, N)}
    true |= {"feh": rng.normal(-0.2, 0.3, N), "mg_fe": rng.normal(0.1, 0.1, N)}
    true["rv"] = rng.normal(0, 30, N)
    bias = {"teff": 40.0, "logg": 0.1, "feh": 0.05, "mg_fe": -0.05, "rv": -4.5}
    noise = {"teff": 20.0, "logg": 0.05, "feh": 0.02, "mg_fe": 0.04, "rv": 0.8}
    star = np.concatenate([np.arange(N), np.arange(100)])  # 100 are observed twice
    target = {"obs_id": np.arange(len(star)), **{x: v[star] for x, v in place.items()}}
    for label, values in true.items():
        error = noise[label] * rng.choice([0.5, 2.0], len(star))
        target[label] = values[star] + bias[label] + error * rng.normal(size=len(star))
        target[f"{label}_err"] = error
    write_csv(folder / "target.csv", target)
    describe(folder, "target", [x for x in target if x[:2] not in ("ra", "de", "ob", "mg")],
             ["mg_fe", "mg_fe_err"])  # fmt: skip
    first = {"obs_id": np.arange(N), **place}
    first |= {x: true[x] + 0.2 * noise[x] * rng.normal(size=N) for x in (*USUAL, "mg_fe", "rv")}
    some = slice(0, 300)
    write_csv(folder / "first.csv", {x: values[some] for x, values in first.items()})
    describe(folder, "first", [*USUAL, "rv"], ["mg_fe"])
    zero = {"mg_fe": 0.3, "rv": 2.0}
    other = {x: true[x] + shift + 0.2 * noise[x] * rng.normal(size=N) for x, shift in zero.items()}
    some = slice(200, 400)
    velocities = {"obs_id": np.arange(N), **place, **other}
    write_csv(folder / "velocities.csv", {x: values[some] for x, values in velocities.items()})
    describe(folder, "velocities", ["rv"], ["mg_fe"])
    gaia = {"source_id": np.arange(N) + 1, **place, "dist": rng.uniform(100, 2000, N)}
    write_csv(folder / "gaia.csv", gaia | {"bp_rp": rng.normal(1, 0.2, N)})
    (folder / "job.toml").write_text(JOB)
    build = rebuild(load_job(folder / "job.toml"), cluster=Cluster())
    return build.path, true, star, target


def read(path):
    catalog = Catalog.open(path)
    table = pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])
    key = "obs_id" if "obs_id" in table.schema.names else "star_id"
    return table.sort_by(key)


def test_repeats_are_combined_with_their_errors(built):
    path, _, star, target = built
    stars = read(path / "target.stars")
    assert stars.num_rows == N
    for label in ("mg_fe", "rv"):
        weight = target[f"{label}_err"] ** -2
        total = np.bincount(star, weight)
        mean = np.bincount(star, weight * target[label]) / total
        np.testing.assert_allclose(stars[label].to_numpy(), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stars[f"{label}_err"].to_numpy(), total**-0.5, rtol=1e-5)


def test_a_survey_without_the_usual_labels_gives_its_own_on_the_scale_of_the_first(built):
    path, true, *_ = built
    offsets = Manifest.load(path / "reference").summary["offsets"]["velocities"]
    assert offsets == pytest.approx({"mg_fe": 0.3, "rv": 2.0}, rel=0.05)
    united = read(path / "reference")
    assert united.num_rows == N
    assert united.schema.field("mg_fe").metadata[b"unit"] == b"dex"
    for survey, label, least in (("first", "teff", 300), ("velocities", "mg_fe", 400)):
        assert united[label].is_valid().to_numpy().sum() == least, survey
    key = [int(text.split(":")[1]) for text in united["star_id"].to_pylist()]
    off = united["rv"].to_numpy() - true["rv"][key]
    assert abs(np.median(off[np.array(key) >= 300])) < 0.1


def test_every_label_is_corrected(built):
    path, true, star, target = built
    rows = read(path / "target.more-labels.corrected")
    assert rows.num_rows == len(star)
    assert {"flag_sos", "flag_sos_more_labels", "colour", "distance"} <= set(rows.schema.names)
    assert "logg_sos" not in rows.schema.names
    for label, limit in (("teff", 6.0), ("feh", 0.006), ("mg_fe", 0.01), ("rv", 0.2)):
        after = rows[f"{label}_sos"].to_numpy() - true[label][star]
        before = target[label] - true[label][star]
        assert abs(np.median(after)) < limit < abs(np.median(before))
        assert (rows[f"{label}_sos_err"].to_numpy() > 0).all()
    assert rows.schema.field("mg_fe_sos").metadata[b"unit"] == b"dex"

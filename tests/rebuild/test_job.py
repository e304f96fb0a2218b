import re

import pytest

from sos_dask.errors import ConfigError
from sos_dask.rebuild.job import _ELSEWHERE, Job, load_job
from sos_dask.settings import Settings
from tests.conftest import ROOT

GOOD = """
format = 1
name = "t"
target_name = "lamost"
store = "store"
[variables]
DATA = "data"
[target]
survey = "lamost-dr3-giants"
files = ["${DATA}/l.csv"]
[reference.apogee]
survey = "apogee-dr17-subset"
files = ["a.csv"]
"""


def load(tmp_path, text):
    path = tmp_path / "job.toml"
    path.write_text(text)
    return load_job(path)


def test_paths_are_relative_to_the_job_and_take_variables(tmp_path, monkeypatch):
    job = load(tmp_path, GOOD)
    assert job.resolve(job.target.files[0]) == tmp_path / "data/l.csv"
    assert job.resolve(job.store) == tmp_path / "store"
    monkeypatch.setenv("DATA", "/elsewhere")
    assert str(job.resolve(job.target.files[0])) == "/elsewhere/l.csv"
    with pytest.raises(ConfigError, match="NOWHERE"):
        job.resolve("${NOWHERE}/x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("format = 1", "format = 2"), "job format 2"),
        (GOOD.replace('name = "t"', 'nmae = "t"'), "name"),
        (GOOD + "[crosmatch]\n", "unknown key 'crosmatch'.*\n.*crossmatch"),
        (GOOD + "[crossmatch]\nradius = 1\n", "unknown key 'crossmatch.radius'.*\n.*radius_arcsec"),
        (GOOD + "[crossmatch]\nradius_arcsec = 0\n", "crossmatch.radius_arcsec.*greater than 0"),
        (GOOD + "[crossmatch]\nradius_arcsec = -1\n", "crossmatch.radius_arcsec"),
        (GOOD + "[dedupe]\nmethod = 'mean'\n", "dedupe.method.*inverse-variance"),
        (GOOD + "[ingest]\nrows_per_partition = 'many'\n", "ingest.rows_per_partition"),
        (GOOD + "[reference_union]\norder = ['galah']\n", "reference_union.order names 'galah'"),
        (GOOD.replace("reference.apogee", "reference.lamost"), "two surveys are named 'lamost'"),
        (GOOD.replace("reference.apogee", 'reference."Bad Name"'), "Bad Name"),
        (GOOD.replace('files = ["a.csv"]', "files = []"), "reference.apogee.files"),
        (GOOD + "[unify]\nmethod = 'x'\n", "'unify.method'"),
        (GOOD + "[coverage]\nradius_arcsec = 9.0\n", "unknown key 'coverage.radius.*dedupe"),
        (GOOD + "[compare]\nseed = 3\n", "unknown key 'compare.seed'.*top of the job"),
        (GOOD + "[coverage]\ncompare = false\n", "unknown key 'coverage.compare'.*gone"),
        (GOOD + "[coverage]\ngrid = {tef = [1.0, 2.0]}\n", "coverage.grid: 'tef' is not one of"),
        (GOOD + "[coverage]\ninside = 0.4\n", "outside = 0.5 is not below inside = 0.4"),
        (GOOD + "[reference_union]\noffsets = 'foo'\n", "reference_union.offsets: must be"),
        (GOOD + "[reference.apogee]\n", "not valid TOML"),
        ("format = 1\n", "is missing"),
    ],
)
def test_a_wrong_job_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    import re

    assert re.search(message, str(caught.value), re.S), str(caught.value)
    assert "job.toml" in str(caught.value)


def test_missing_job_file():
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_job("/no/such/job.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda p: p.name)
def test_the_jobs_of_the_project_load(path):
    assert load_job(path).reference


def test_the_readme_of_jobs_names_every_key():
    text = (ROOT / "jobs" / "README.md").read_text()
    tables: list[type[Settings]] = [Job]
    while tables:
        for name, field in tables.pop().model_fields.items():
            if name in ("axes", "flags"):  # of [compare] and [unify]: a job may not give them
                assert {("compare", name), ("unify", name)} & _ELSEWHERE.keys()
            elif not field.exclude or field.description:
                assert re.search(rf"`[^`]*\b{name}\b[^`]*`", text), name
            kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
            tables += [k for k in kinds if isinstance(k, type) and issubclass(k, Settings)]

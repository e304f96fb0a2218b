"""Small, constant and degenerate evidence: what is learnt from it, and what is said of it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sos_dask import corrections as models
from sos_dask.cli import main
from sos_dask.cli.steps import show_build
from sos_dask.corrections import boosted
from sos_dask.corrections.estimators import search
from sos_dask.evidence.widening import MIN_GROWTH_PAIRS, Growth
from sos_dask.rebuild.job import load_job
from sos_dask.rebuild.pipeline import rebuild
from sos_dask.run import machine
from sos_dask.schema import LABELS
from sos_dask.stages.coverage import Coverage, _warnings
from tests.corrections.pairs import ArraySource, biased_pairs

LAWS: dict[str, Any] = {
    "given": lambda d: np.maximum(d, 0.35),
    "constant": np.ones_like,
    "falling": lambda d: 1 / np.hypot(1, d),
    "grows": lambda d: np.hypot(1, d),
    "step": lambda d: np.where(d > 1.3, 3.0, 1.0),
    "steep": lambda d: 1 + (d / 1.5) ** 3,
}


@pytest.mark.parametrize("law", LAWS)
def test_pairs_are_called_outside_as_often_as_their_errors_are_twice_the_unit(law):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        d = np.exp(rng.normal(-1.6, 0.55, 630))
        error = LAWS[law](d / np.median(d))
        drawn = rng.standard_normal if law == "given" else lambda s: rng.standard_t(4, s)  # noqa: B023
        growth, bins = Growth.fit(d, drawn((630, 3)) * error[:, None])
        unit = np.sqrt(np.mean(error[d < np.median(d)] ** 2))
        called = np.mean(1 / growth(d) < 0.5)
        assert called == pytest.approx(np.mean(error / unit > 2), abs=0.1), seed
        found = growth(np.append(np.sort(d), 1e9))
        assert (np.diff(found) >= 0).all() and (found[: 630 // 2] == 1).all()
        assert len(growth.distance) > 1 and sum(row["n"] for row in bins) == 630


@pytest.mark.parametrize(
    ("distance", "ratio"),
    [
        (np.arange(MIN_GROWTH_PAIRS - 1.0), 1.0),
        (np.ones(500), 1.0),  # all equally far
        (np.arange(500.0), 0.0),  # no errors
        (np.zeros(0), 1.0),
    ],
)
def test_a_growth_that_cannot_be_measured_is_one(distance, ratio):
    errors = ratio * np.random.default_rng(0).normal(size=(len(distance), 3))
    growth, bins = Growth.fit(distance, errors)
    assert len(growth.distance) == 1 and bins == []
    assert growth(np.array([0.0, 3.0, 1e9])).tolist() == [1, 1, 1]


def test_a_label_without_errors_takes_no_part_in_the_growth():
    rng = np.random.default_rng(1)
    d = rng.uniform(0, 1, 1000)
    ratio = rng.normal(size=(1000, 3)) * np.hypot(1, 3 * d)[:, None]
    two = ratio.copy()
    two[:, 2] = np.where(d > 0.99, 0.25, 0.0)  # constant but for a few
    growth, _ = Growth.fit(d, two)
    assert growth(np.ones(1)) == pytest.approx(Growth.fit(d, ratio)[0](np.ones(1)), rel=0.2)


def test_warnings_when_most_is_outside(small_store, monkeypatch, capsys):
    directory = (small_store / "current/lamost.coverage").resolve()
    found = Coverage.load(directory)
    fitted = {"growth": {"distance": [1.0, 2.0]}, "held_out_pairs": 629, "pairs_outside": 0.33}
    assert _warnings(fitted, 0.5) == []
    (pairs,) = _warnings({**fitted, "pairs_outside": 0.34}, 0.1)
    (rows,) = _warnings(fitted, 0.51)
    (few,) = _warnings({**fitted, "growth": {"distance": [1.0]}}, 0.1)
    (snr,) = _warnings(fitted, 0.1, has_snr=False)
    assert "no column 'snr'" in snr
    assert "34% of the held-out training pairs are outside" in pairs
    assert "51% of the rows" in rows and "too few to measure" in few
    monkeypatch.setattr(Coverage, "load", lambda _: {**found, "warnings": [pairs]})
    code, out, _ = run(monkeypatch, capsys, "coverage", "--store", small_store)
    assert code == 0 and f"Warning: {pairs}" in out


def run(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["sos-dask", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


CONSTANT: dict[str, Any] = {
    "constant": lambda y: np.full_like(y, 0.03125),
    "zero": np.zeros_like,
    "rounded": lambda y: (y - np.float32(0.1)) - y,  # a constant, in numbers of 24 bits
    "all but few": lambda y: np.where(np.arange(len(y)) < 5, 0.25, 0.1).astype(np.float32),
    "zero but few": lambda y: np.where(np.arange(len(y)) < 5, 0.25, 0.0).astype(np.float32),
    "of two values": lambda y: np.where(np.arange(len(y)) % 9 == 0, 0.1, 0.0).astype(np.float32),
}
QUICK: dict[str, Any] = {
    "polynomial": {"order": 2},
    "boosted": {"n_rounds": 100},
    "hybrid": {"order": 2, "n_rounds": 20},
    "symbolic": {"generations": 2, "population": 20},
    "simex": {"order": 2, "replicas": 1, "base": "hybrid", "n_rounds": 10},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", CONSTANT)
@pytest.mark.parametrize("method", QUICK)
def test_a_label_that_differs_by_a_constant_is_a_zero_point(method, kind, tmp_path):
    if method == "symbolic":
        pytest.importorskip("pyoperon")
    batch = biased_pairs(600, 3)
    errors = np.tile(np.array([20, 0.05, 0.05], np.float32), (600, 1))
    batch = type(batch)(batch.features, batch.differences, batch.fold, batch.weight, errors)
    batch.differences[:, 2] = CONSTANT[kind](batch.differences[:, 2])
    source = ArraySource(batch)
    models.fit(method, source, params=QUICK[method]).save(tmp_path / "model")
    found = models.load(tmp_path / "model").predict(batch.features)
    assert np.isfinite(found).all()
    exact = 0 if kind in ("constant", "zero") else 0.05 if method == "simex" else 1e-5
    error = np.abs(found[:, 2] - np.median(batch.differences[:, 2]))
    if kind != "of two values":
        assert np.median(error) <= exact
    assert np.median(np.abs(batch.differences - found)[:, 0]) < 60  # others are learnt as ever


def test_a_search_with_constant_labels():
    batch = biased_pairs(600, 3)
    batch.differences[:] = [64, 0.0, 0.125]
    params = models.check_params("polynomial", {})
    _, trials = search("polynomial", ArraySource(batch), [0, 1, 2, 3, 4], params, 3)
    assert all(trial["loss"] is not None for trial in trials)


def _survey(folder: Path, name: str, columns: dict[str, np.ndarray]) -> None:
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    sources = "".join(f'{out} = {{ source = "{out}" }}\n' for out in ("ra", "dec", *LABELS))
    (folder / f"{name}.toml").write_text(
        f'format = 1\nname = "{name}"\ntitle = "x"\nposition_epoch = 2000.0\n'
        f'[columns]\nobs_id = {{ source = "obs_id" }}\n{sources}'
    )


@pytest.fixture
def constant_job(tmp_path):
    """A job in which [Fe/H] differs by 1/32, and 400 stars."""
    rng, n = np.random.default_rng(0), 400
    labels = {
        "teff": rng.normal(5000, 400, n).round(1),
        "logg": rng.uniform(1, 4.5, n).round(3),
        "feh": np.round(rng.normal(-0.2, 0.3, n) * 64) / 64,
    }
    place = {
        "obs_id": np.arange(n),
        "ra": rng.uniform(0, 360, n),
        "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, n))),
    }
    _survey(tmp_path, "one", {**place, **labels})
    other = {
        "teff": labels["teff"] + 50 + rng.normal(0, 20, n),
        "logg": labels["logg"] - 0.1 + rng.normal(0, 0.05, n),
        "feh": labels["feh"] - 1 / 32,
    }
    _survey(tmp_path, "two", {**place, **other})
    job = tmp_path / "job.toml"
    job.write_text(
        'format = 1\nname = "j"\nstore = "store"\ntarget_name = "one"\n'
        '[target]\nsurvey = "one.toml"\nfiles = ["one.parquet"]\n'
        '[reference.two]\nsurvey = "two.toml"\nfiles = ["two.parquet"]\n'
        '[train]\nmethods = ["polynomial"]\n[train.params.polynomial]\norder = 2\n'
    )
    return job, other["feh"]


def test_a_constant_label_goes_through_a_whole_rebuild(constant_job, capsys, monkeypatch):
    job, truth = constant_job
    build = rebuild(load_job(job))
    files = sorted((build.path / "one.corrected").resolve().rglob("Npix=*.parquet"))
    columns = ["obs_id", "feh_sos", "feh_sos_err", "teff_sos_err"]
    table = pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
    table = table.sort_by("obs_id")
    assert table["feh_sos"].to_numpy() == pytest.approx(truth, abs=0)
    for name in columns[2:]:
        error = table[name].to_numpy()
        assert np.isfinite(error).all() and (error > 0).all()
    for file in build.path.resolve().glob("*/manifest.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)
    show_build(build)
    store = job.parent / "store"
    for command in ("compare", "trends", "uncertainty", "coverage"):
        assert run(monkeypatch, capsys, command, "--store", store)[0] == 0
    assert (build.path / "report/report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--scheduler", "tcp://127.0.0.1:9", "--distributed", "never"),
            "--scheduler has no effect with --distributed never",
        ),
        (("--workers", "2", "--distributed", "never"), "--workers has no effect"),
        (("--memory-limit", "1GiB"), "--memory-limit has no effect"),
        (("--search", "3", "-m", "symbolic"), "no parameters to search"),
    ],
)
def test_options_that_train_would_drop_are_refused(
    arguments, says, small_store, tmp_path, monkeypatch, capsys
):
    pairs, out = small_store / "current/lamost.pairs", tmp_path / "model"
    method = () if "-m" in arguments else ("-m", "polynomial")
    code, _, err = run(monkeypatch, capsys, "train", pairs, *method, "-o", out, *arguments)
    assert code == 3 and says in err and not out.exists()


def test_no_workers_are_what_train_has(small_store, tmp_path, monkeypatch, capsys):
    pairs = small_store / "current/lamost.pairs"
    arguments = ("train", pairs, "-m", "polynomial", "-p", "order=1", "-o", tmp_path / "model")
    assert run(monkeypatch, capsys, *arguments, "--workers", "0")[0] == 0


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("coverage", "--measure=ratio"),
        ("coverage", "--workers=2"),
        ("compare", "--rule=scatter"),
        ("trends", "--overwrite"),
    ],
)
def test_options_of_a_step_are_refused_where_a_build_is_shown(
    command, option, small_store, monkeypatch, capsys
):
    code, _, err = run(monkeypatch, capsys, command, "--store", small_store, option)
    assert code == 3 and f"{option.partition('=')[0]} has no effect where no catalogs" in err


def test_workers_beside_a_scheduler_are_refused(small_store, tmp_path, monkeypatch, capsys):
    stars = small_store / "current/lamost.stars"
    both = ("--workers", "2", "--scheduler", "tcp://127.0.0.1:9")
    code, _, err = run(monkeypatch, capsys, "dedupe", stars, "-o", tmp_path / "out", *both)
    assert code == 3 and "(--scheduler) has workers and memory limits of its own" in err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("boosted = { n_rounds = nan }", "boosted.n_rounds' is nan"),
        ("boosted = { n_rounds = inf }", "boosted.n_rounds' is inf"),
        ("boosted = { learning_rate = nan }", "boosted.learning_rate' is nan"),
        ("polynomial = { ridge = -inf }", "polynomial.ridge' is -inf"),
        (
            "polynomial = { order = -3 }",
            "params.polynomial: method 'polynomial': order: must be greater than or equal to 1",
        ),
        (
            "polynomial = { order = 1_000_000 }",
            "order: must be less than or equal to 6 (given: 1000000)",
        ),
    ],
)
def test_params_of_a_job_that_are_no_numbers(constant_job, text, says, monkeypatch, capsys):
    job, _ = constant_job
    job.write_text(
        job.read_text().partition("[train]")[0]
        + f'[train]\nmethods = ["polynomial", "boosted"]\n[train.params]\n{text}\n'
    )
    code, _, err = run(monkeypatch, capsys, "rebuild", job)
    assert code == 3 and says in err


def test_threads_follow_the_number_of_rows(monkeypatch):
    monkeypatch.setattr(machine, "n_cores", lambda: 8)
    asked = [machine.n_threads(n, 50_000) for n in (0, 736, 99_999, 100_000, 10**9)]
    assert asked == [1, 1, 1, 2, 8]
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    assert machine.n_threads(10**9, 50_000) == 1


def test_few_pairs_are_boosted_by_one_thread(monkeypatch):
    seen, boost = [], boosted.Job.boost

    def watched(job, rows, threads, *others):
        seen.append(threads)
        return boost(job, rows, threads, *others)

    monkeypatch.setattr(boosted.Job, "boost", watched)
    monkeypatch.setattr(machine, "n_cores", lambda: 2)
    for n_pairs in (736, 120_000):
        models.fit("boosted", ArraySource(biased_pairs(n_pairs)), params={"n_rounds": 1})
    assert seen == [1, 2]

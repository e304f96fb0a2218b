import json
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sos_dask import corrections as models
from sos_dask.corrections import Batch, symbolic
from sos_dask.corrections.formula import Formula
from sos_dask.corrections.symbolic import Scale, SymbolicCorrection, draw_sample
from sos_dask.errors import ConfigError, ModelError
from sos_dask.schema import LABELS
from sos_dask.stats.numbers import scatter
from tests.corrections.pairs import NOISE, ArraySource, bias, biased_pairs
from tests.corrections.test_formula import points, python
from tests.steps import FEATURES

QUICK = {"n_sample": 1000, "population": 60, "generations": 10, "max_length": 15}


def fit(source, **options) -> SymbolicCorrection:
    out = models.fit("symbolic", source, **options)
    assert isinstance(out, SymbolicCorrection)
    return out


# --- sample ------------------------------------------------------------------------------------


def sample_of(source, wanted=1000):
    training = models.Training(source)
    summary = models.base.summarise(training, "symbolic", symbolic.Settings(), 1)
    return draw_sample(training, Scale.of(summary), wanted)


def test_the_sample_does_not_depend_on_order_or_batches():
    batch = biased_pairs(6000, 1)
    batch.differences[::7, 1] = np.nan
    order = np.random.default_rng(0).permutation(6000)
    shuffled = Batch(
        batch.features[order], batch.differences[order], batch.fold[order], batch.weight[order]
    )
    one, other = sample_of(ArraySource(batch)), sample_of(ArraySource(shuffled, (5, 5, 4000)))
    np.testing.assert_array_equal(one.features, other.features)
    np.testing.assert_array_equal(one.differences, other.differences)
    assert 900 < len(one.features) < 1100


def test_the_sample_takes_more_of_sparse_places():
    batch = biased_pairs(20_000, 2)
    chosen = sample_of(ArraySource(batch), 2000)
    poor = [np.mean(rows.features[:, 2] < -1.2) for rows in (batch, chosen)]
    assert poor[1] > 2.5 * poor[0]
    assert len(sample_of(ArraySource(batch), 100_000).features) == 20_000


# --- engines that are not there ----------------------------------------------------------------


def test_without_pyoperon(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyoperon", None)
    with pytest.raises(ModelError, match="needs pyoperon") as caught:
        fit(ArraySource(biased_pairs(1000)))
    assert "sos_dask[symbolic]" in caught.value.hint


def test_pysr_is_not_imported_without_julia(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("PYTHON_JULIACALL_EXE", raising=False)
    with pytest.raises(ModelError, match=r"engine = 'pysr' needs .*julia") as caught:
        fit(ArraySource(biased_pairs(1000)), params={"engine": "pysr"})
    assert "operon" in caught.value.hint
    assert "pysr" not in sys.modules
    with pytest.raises(ConfigError, match="must be 'operon' or 'pysr'"):
        fit(ArraySource(biased_pairs(1000)), params={"engine": "eureqa"})


def test_formulas_of_pysr_are_read(monkeypatch):
    class Regressor:
        def __init__(self, **options):
            assert options["deterministic"] is True
            assert options["parallelism"] == "serial"

        def fit(self, z, y, variable_names):
            assert variable_names == list(FEATURES)
            self.equations_ = {"equation": ["0.1", "logg * feh * 0.3 + 0.1", "1.0 / (feh - feh)"]}

    monkeypatch.setattr(symbolic, "_require", lambda engine: None)
    monkeypatch.setitem(sys.modules, "pysr", SimpleNamespace(PySRRegressor=Regressor))
    batch = biased_pairs(3000, 3)
    out = fit(ArraySource(batch), params={**QUICK, "engine": "pysr"})
    assert [len(choice.front) for choice in out.choices] == [2, 2, 2]
    assert np.isfinite(out.predict(batch.features)).all()


# --- fits --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    pytest.importorskip("pyoperon")
    source = ArraySource(biased_pairs(3000, 1, 0.03), (700,))
    return fit(source, train_folds=[1, 2, 3, 4], params=QUICK)


@pytest.fixture
def saved(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    return tmp_path / "model"


def test_simple_formulas_are_recovered_in_spite_of_outliers():
    pytest.importorskip("pyoperon")
    b = biased_pairs(20_000, 4)
    rng = np.random.default_rng(4)

    def truth(x):
        t, g, m = x.T.astype(np.float64)
        return np.stack([-40 + 250 * (t - 1), 0.1 * m * (g - 3), 0.05 + 0.1 * m / (g + 1)], axis=1)

    y = truth(b.features) + NOISE / 2 * rng.normal(size=(20_000, 3))
    y += (rng.random((20_000, 3)) < 0.03) * rng.uniform(8, 15, (20_000, 3)) * NOISE
    source = ArraySource(Batch(b.features, y.astype("f4"), b.fold, b.weight), (3000, 9000))
    out = fit(source, params={"generations": 20, "population": 200, "n_sample": 2000})
    error = (out.predict(b.features) - truth(b.features)) / NOISE
    assert (np.sqrt(np.mean(error**2, axis=0)) < [0.05, 0.05, 0.08]).all()
    assert (np.abs(np.median(error, axis=0)) < 0.03).all()
    for choice, limit in zip(out.choices, (7, 17, 21), strict=True):
        assert choice.complexity <= limit, choice.formula
    for k, choice in enumerate(out.choices):
        assert choice.scatter == pytest.approx(NOISE[k] / 2, rel=0.1)


def test_better_than_a_constant_and_the_numbers_come_from_all_pairs(fitted):
    x = biased_pairs(10_000, 5).features
    x = x[fitted.in_range(x)]
    left = np.array([scatter(r) for r in (bias(x) - fitted.predict(x)).T])
    before = np.array([scatter(r) for r in bias(x).T])
    assert (left < 0.8 * before).all()
    for choice in fitted.choices:
        chosen = choice.front[choice.chosen]
        assert choice.complexity == chosen.complexity
        assert choice.formula != chosen.formula


def test_the_front(fitted):
    for choice in fitted.choices:
        front = choice.front
        assert front[0].complexity == 1
        assert [c.complexity for c in front] == sorted({c.complexity for c in front})
        assert [c.loss for c in front] == sorted({c.loss for c in front}, reverse=True)
        chosen = front[choice.chosen]
        assert chosen.behind <= chosen.standard_error
        for simpler in front[: choice.chosen]:
            assert simpler.behind > simpler.standard_error
        assert front[-1].behind == 0
        for candidate in front:
            assert np.isfinite(Formula.parse(candidate.formula).evaluate(points())).all()


def test_patience_chooses_the_simplest():
    pytest.importorskip("pyoperon")
    source = ArraySource(biased_pairs(2000, 1))
    out = fit(source, params={**QUICK, "standard_errors": 100})
    assert [choice.complexity for choice in out.choices] == [1, 1, 1]
    center = np.median(source.batch.differences, axis=0)
    predicted = out.predict(source.batch.features[:1])[0]
    np.testing.assert_allclose((predicted - center) / NOISE, 0, atol=0.1)


def test_prediction(fitted):
    x = biased_pairs(5000, 6).features
    whole = fitted.predict(x)
    assert whole.dtype == np.float32
    assert whole.shape == (5000, 3)
    x[0, 0], x[1, 2], x[2, 1] = np.nan, np.inf, -np.inf
    out = fitted.predict(x)
    assert np.isnan(out[:3]).all()
    np.testing.assert_array_equal(out[3:], whole[3:])
    far = np.array([[99, 99, 99], [-99, -99, -99]], dtype=np.float32)
    edge = np.array([fitted.info.maximum, fitted.info.minimum], dtype=np.float32)
    np.testing.assert_array_equal(fitted.predict(far), fitted.predict(edge))
    assert np.isfinite(fitted.predict(far)).all()


def test_too_few_and_unknown():
    pytest.importorskip("pyoperon")
    with pytest.raises(ModelError, match=r"'symbolic' needs at least 200 .* are 150"):
        fit(ArraySource(biased_pairs(150)))
    batch = biased_pairs(1000)
    batch.differences[:, 2] = np.nan
    with pytest.raises(ModelError, match="known feh difference, and there are 0"):
        fit(ArraySource(batch))


def test_a_feature_of_one_value():
    pytest.importorskip("pyoperon")
    batch = biased_pairs(1000, 8)
    batch.features[:, 2] = -0.25
    out = fit(ArraySource(batch), params={**QUICK, "generations": 5})
    assert np.isfinite(out.predict(batch.features)).all()


def test_same_seed_same_bytes_in_any_order_and_on_a_cluster(fitted, cluster):
    batch = biased_pairs(3000, 1, 0.03)
    options: dict[str, Any] = {"train_folds": [1, 2, 3, 4], "params": QUICK}
    again = fit(ArraySource(batch, (700,)), **options)
    assert again.files() == fitted.files()
    there = fit(ArraySource(batch, (700,)), client=cluster.client, **options)
    assert there.files() == fitted.files()
    order = np.random.default_rng(0).permutation(3000)
    shuffled = Batch(
        batch.features[order], batch.differences[order], batch.fold[order], batch.weight[order]
    )
    other = fit(ArraySource(shuffled, (10, 2000)), **options)
    difference = (other.predict(batch.features) - fitted.predict(batch.features)) / NOISE
    assert np.abs(difference).max() < 1e-3
    assert [c.front for c in other.choices] == [c.front for c in fitted.choices]


# --- files -------------------------------------------------------------------------------------


def test_saved_and_loaded_without_the_engine(fitted, saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyoperon", None)
    again = models.load(saved)
    x = biased_pairs(3000, 7).features
    np.testing.assert_array_equal(again.predict(x), fitted.predict(x))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(x), again.predict(x))
    again.save(tmp_path / "again")
    for name in ("model.json", "formula.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    document = json.loads((saved / "formula.json").read_text())
    for label, column in zip(LABELS, again.predict(x).T, strict=True):
        entry = document["labels"][label]
        known = again.in_range(x)
        np.testing.assert_allclose(
            python(entry["formula"], x[known].astype(np.float64)), column[known], rtol=1e-4
        )


def test_a_changed_or_missing_file_is_named(saved):
    file = saved / "formula.json"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"1", b"2", 1))
    with pytest.raises(ModelError, match=r"formula\.json is not the file"):
        models.load(saved)
    file.unlink()
    with pytest.raises(ModelError, match=r"formula\.json: No such file"):
        models.load(saved)


def edited(fitted, **changes):
    document = json.loads(fitted.files()["formula.json"])
    document["labels"]["logg"].update(changes)
    return {"formula.json": json.dumps(document).encode()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formula": "__import__('os').system('id')"}, "logg: .* is not a formula"),
        ({"formula": "exp(feh)"}, "Call is not arithmetic"),
        ({"formula": "mass"}, "no feature 'mass'"),
        ({"formula": "1/(logg - 3)"}, "formula of logg is not finite"),
        ({"formula": None}, "damaged.*valid string"),
        ({"complexity": "much"}, "damaged"),
        ({"front": [{"formula": "1"}]}, "damaged"),
        ({"front": None}, "damaged"),
    ],
)
def test_a_formula_file_with_more_than_arithmetic_is_refused(fitted, changes, message):
    with pytest.raises(ModelError, match=message):
        SymbolicCorrection.restore(fitted.info, edited(fitted, **changes))


def test_an_incomplete_file_is_refused(fitted):
    for content in (b"", b"{", b"[]", b"{}", b'{"labels": []}'):
        with pytest.raises(ModelError, match=r"formula\.json"):
            SymbolicCorrection.restore(fitted.info, {"formula.json": content})
    with pytest.raises(ModelError, match=r"formula\.json"):
        SymbolicCorrection.restore(fitted.info, {})


def test_shares_of_cells():
    counts = np.array([0, 4, 100, 10_000])
    shares = symbolic._shares(counts, 500, True)
    assert counts @ shares == pytest.approx(500)
    assert shares[1] == 1
    assert shares[2] == pytest.approx(10 * shares[3])
    even = symbolic._shares(counts, 500, False)
    np.testing.assert_allclose(even, 500 / counts.sum())
    np.testing.assert_array_equal(symbolic._shares(counts, 20_000, True), np.ones(4))


def test_the_choice_from_a_front():
    class Form:
        def __init__(self, complexity, noise):
            self.complexity, self.noise = complexity, noise

        def values(self, u):
            return u[0] + self.noise * u[1]

    rng = np.random.default_rng(0)
    u, y = rng.normal(size=(2, 4000)), np.zeros(4000)
    y += u[0] + 0.1 * rng.normal(size=4000)
    # A worse one that is longer has no place; one that is a little worse and shorter is taken.
    worse = -0.001 * np.sign((y - u[0]) @ u[1])
    pairs = ((5, 0.0), (9, 20 * worse), (1, 0.5), (3, worse), (3, 0.3))
    forms: Any = [Form(*pair) for pair in pairs]
    front, chosen = symbolic._front(forms, u, y, 1.0)
    assert [form.complexity for form, _ in front] == [1, 3, 5]
    assert front[1][0] is forms[3]
    assert chosen == 1
    assert symbolic._front(forms, u, y, 0.0)[1] == 2
    best = front[-1][1]
    assert best["behind"] == best["standard_error"] == 0
    residual = np.abs(y - u[0])
    assert best["scatter"] == pytest.approx(1.4826 * np.median(residual))
    size = residual / best["scatter"] / 4.685
    loss = np.mean(np.where(size < 1, 1 - (1 - size**2) ** 3, 1))
    assert best["loss"] == pytest.approx(loss, rel=0.01)

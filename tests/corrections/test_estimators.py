"""Methods as scikit-learn estimators, and the search of their parameters."""

import os
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator

import sos_dask
from sos_dask import corrections as models
from sos_dask.corrections import class_of, estimators
from sos_dask.corrections.estimators import ESTIMATORS, candidates, search
from sos_dask.corrections.polynomial import PolynomialCorrection
from sos_dask.errors import ClusterError, ConfigError, ModelError
from sos_dask.problem import DEFAULT, RV
from sos_dask.settings import to_json
from tests.corrections.pairs import ArraySource, biased_pairs

BATCH = biased_pairs(1000, 1)
SOURCE = ArraySource(BATCH, (300,))
QUICK: dict[str, dict[str, Any]] = {
    "polynomial": {"order": 1},
    "boosted": {"n_rounds": 20, "learning_rate": 0.3, "min_pairs": 2},
    "hybrid": {"order": 1, "n_rounds": 5, "min_pairs": 2, "smoothing": 3.0},
    "symbolic": {"min_pairs": 10, "population": 10, "generations": 1},
}
TOO_FEW = {
    "check_regressor_multioutput": "11 pairs of 10 inputs: twice as many as terms are needed"
}
WEIGHTS = {
    "check_sample_weight_equivalence_on_dense_data": "the scale of residuals and the edges of bins "
    "count pairs, whatever they weigh; the check has fewer pairs than its 30 inputs need"
}
EXPECTED = {"polynomial": TOO_FEW | WEIGHTS, "hybrid": TOO_FEW | WEIGHTS}


def quick(method):
    if method == "symbolic":
        pytest.importorskip("pyoperon")
    return ESTIMATORS[method](**QUICK[method])


@pytest.mark.parametrize("method", ESTIMATORS)
def test_what_scikit_learn_expects(method):
    expected = EXPECTED.get(method, WEIGHTS)
    done = check_estimator(quick(method), expected_failed_checks=expected, on_skip=None)
    failed = {one["check_name"] for one in done if one["status"] == "xfail"}
    assert failed == set(expected), "what does not fail is not expected to"
    assert sum(one["status"] == "passed" for one in done) > 50


@pytest.mark.parametrize("method", ESTIMATORS)
def test_parameters_are_those_of_the_method(method):
    kind, settings = ESTIMATORS[method], class_of(method).parameters
    params = kind().get_params()
    assert params.pop("problem") is None
    assert params == settings().as_json
    for name, field in settings.model_fields.items():
        assert f"{name} : " in str(kind.__doc__)
        assert str(field.description) in str(kind.__doc__)
    assert getattr(sos_dask, kind.__name__) is kind
    with pytest.raises(TypeError, match="depht"):
        kind(depht=3)


@pytest.mark.parametrize("method", ["polynomial", "boosted", "hybrid"])
def test_several_labels_as_the_method_itself_fits_them(method, tmp_path):
    batch = biased_pairs(800, 2)
    batch.differences[::3, 1] = np.nan
    batch.weight[::7] = 0.25
    names = pd.DataFrame(batch.features, columns=DEFAULT.features)
    labels = pd.DataFrame(batch.differences, columns=["teff_diff", "logg_diff", "feh_diff"])
    estimator = quick(method).fit(names, labels, batch.weight)
    fitted = models.fit(method, ArraySource(batch), params=QUICK[method])
    np.testing.assert_array_equal(estimator.predict(names), fitted.predict(batch.features))
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(again.predict(names), estimator.predict(names))
    problem = estimator.correction_.problem
    assert problem.features == problem.columns == DEFAULT.features
    assert [one.unit for one in problem.labels] == [one.unit for one in DEFAULT.labels]
    estimator.correction_.save(tmp_path / "model")
    loaded = models.load(tmp_path / "model")
    found = loaded.predict(batch.features)  # of trees by their table
    np.testing.assert_allclose(found, fitted.predict(batch.features), rtol=1e-4, atol=1e-5)
    known = np.isfinite(batch.differences)
    residual = batch.differences - fitted.predict(batch.features)
    assert estimator.score(names, labels) == pytest.approx(
        np.mean([1 - np.var(r[k]) / np.var(d[k]) - np.mean(r[k]) ** 2 / np.var(d[k])
                 for r, d, k in zip(residual.T, batch.differences.T, known.T, strict=True)]),
        abs=1e-6,
    )  # fmt: skip


def test_a_problem_transforms_the_columns_of_a_catalog():
    batch = biased_pairs(600)
    raw = pd.DataFrame(batch.features * [5040, 1, 1], columns=DEFAULT.columns)
    estimator = estimators.Polynomial(order=2, problem=DEFAULT).fit(raw, batch.differences)
    assert estimator.correction_.problem is DEFAULT
    fitted = models.fit("polynomial", ArraySource(batch), params={"order": 2})
    np.testing.assert_allclose(estimator.predict(raw), fitted.predict(batch.features), rtol=1e-3)
    for columns, other in ((raw[["logg", "teff", "feh"]], DEFAULT), (raw, RV)):
        with pytest.raises(ValueError, match=r"X has 3 columns \((logg|teff), .* the problem is"):
            estimators.Polynomial(problem=other).fit(columns, batch.differences)


def test_names_that_no_column_can_have_are_numbered():
    x = pd.DataFrame(BATCH.features, columns=["T eff", "logg", "[Fe/H]"])
    one = estimators.Polynomial(order=1).fit(x, BATCH.differences[:, 0]).correction_.problem
    assert one.features == ("x0", "logg", "x2") and one.names == ("y0",)
    assert estimators.Polynomial(order=1).fit(x, x["logg"]).correction_.problem.names == ("logg",)


def test_a_search_of_scikit_learn():
    grid = estimators.Boosted(n_rounds=np.int64(5), learning_rate=np.float32(0.5))
    assert np.all(cross_val_score(grid, BATCH.features, BATCH.differences, cv=3) < 1)


X, Y = BATCH.features, BATCH.differences[:, 0]


@pytest.mark.parametrize(
    ("x", "y", "params", "message"),
    [
        (np.where(np.arange(3) == 1, np.nan, X), Y, {}, "Input X contains NaN"),
        (np.where(X[0] == X, np.inf, X), Y, {}, "Input X contains infinity"),
        (X, np.full(1000, np.nan), {}, "needs at least 50 training pairs .* there are 0"),
        (X[:1], Y[:1], {}, "1 sample"),
        (X[:9], Y[:9], {}, "needs at least 50 training pairs .* there are 9"),
        (X, Y[:9], {}, "inconsistent numbers of samples"),
        (X.astype(str).astype(object) + "K", Y, {}, "could not convert string to float"),
        (X, Y, {"max_depth": "4"}, "max_depth: must be a valid integer"),
        (X, Y, {"max_depth": 99}, "max_depth: must be less than or equal to 12"),
    ],
)
def test_what_cannot_be_fitted(x, y, params, message):
    with pytest.raises(ValueError, match=message):
        estimators.Boosted(**params).fit(x, y)


def test_many_inputs():
    x = np.random.default_rng(0).normal(size=(400, 24)).astype(np.float32)
    y = x @ np.arange(24)
    assert estimators.Polynomial(order=1).fit(x, y).score(x, y) > 0.99
    boosted = estimators.Boosted(n_rounds=20, learning_rate=0.5).fit(x, y)
    assert boosted.score(x, y) > 0.5
    assert "no_table" in boosted.correction_.files()["boosted.json"].decode()
    # Of order 4 it has 20,475 terms: so few pairs are for order 1.
    few = estimators.Polynomial().fit(x, y).correction_
    assert isinstance(few, PolynomialCorrection) and len(few.exponents) == 25
    with pytest.raises(ModelError, match="takes 21 inputs at most"):
        estimators.Hybrid(order=1).fit(x, y)


def test_many_inputs_of_a_formula():
    pytest.importorskip("pyoperon")
    x = np.random.default_rng(0).normal(size=(400, 24)).astype(np.float32)
    found = estimators.Symbolic(n_sample=200, population=20, generations=3).fit(x, x[:, 3])
    assert np.isfinite(found.predict(x)).all()


# --- search ------------------------------------------------------------------------------------


def defaults(method, **params):
    return models.check_params(method, params)


@pytest.mark.parametrize("method", ["polynomial", "boosted", "hybrid"])
def test_candidates(method):
    params = defaults(method)
    drawn = candidates(method, params, 12, 3)
    space = class_of(method).search
    assert drawn[0] == {name: params[name] for name in space}
    assert len(drawn) == 12
    assert all(drawn.count(one) == 1 for one in drawn)
    assert drawn == candidates(method, params, 12, 3) != candidates(method, params, 12, 4)
    for one in drawn:
        models.check_params(method, {**params, **one})


def test_a_small_space_is_tried_all():
    space = class_of("polynomial").search
    drawn = candidates("polynomial", defaults("polynomial"), 200, 0)
    assert len(drawn) == np.prod([len(values) for values in space.values()])
    other = candidates("polynomial", defaults("polynomial", ridge=0.7), 200, 0)
    assert other[0]["ridge"] == 0.7 and all(one in other for one in drawn)


def test_the_best_is_found_and_all_are_told():
    # A line through a curved bias, to begin with.
    params, trials = search("polynomial", SOURCE, [1, 2, 3, 4], defaults("polynomial", order=1), 10)
    assert params["order"] in (2, 3, 4)
    assert set(params) == set(class_of("polynomial").parameters.model_fields)
    assert len(trials) == 10
    assert all(len(trial["losses"]) == 4 for trial in trials)
    means = [trial["loss"] for trial in trials]
    assert means == sorted(means) == [pytest.approx(np.mean(trial["losses"])) for trial in trials]
    assert trials[0]["params"].items() <= params.items()
    assert trials[-1]["params"]["order"] == 1
    assert to_json(trials)


@pytest.mark.parametrize("method", ["polynomial", "boosted"])
def test_a_loss_is_that_of_a_fit_without_the_fold(method):
    """Pairs as fainter rows see them train as in any fit, and judge nothing."""
    batch = biased_pairs(1000, 1, outliers=0.1)
    batch.differences[::5, 2] = np.nan
    batch.weight[::3] = 0.01
    fainter = biased_pairs(1500, 2)
    fainter.differences[:] += [500, 5, 5]
    source = models.OneBatch(replace(batch, degraded=fainter), DEFAULT)
    params = {"order": 2} if method == "polynomial" else {"n_rounds": 5, "learning_rate": 0.5}
    (_, (trial,)) = search(method, source, [0, 2, 3], defaults(method, **params), 1)
    for fold, loss in zip((0, 2, 3), trial["losses"], strict=True):
        others = [one for one in (0, 2, 3) if one != fold]
        fitted = models.fit(method, source, train_folds=others, params=params)
        rows = batch.fold == fold
        truth = batch.differences[rows].astype(float)
        size = np.abs(truth - fitted.predict(batch.features[rows]))
        size /= 1.4826 * np.nanmedian(np.abs(truth - np.nanmedian(truth, axis=0)), axis=0)
        assert loss == pytest.approx(np.nanmean(np.minimum(size, 4), axis=0).mean(), rel=1e-4)


def test_held_out_folds_have_no_part():
    batch = biased_pairs(1000, 1)
    params = defaults("polynomial")
    before = search("polynomial", ArraySource(batch), [1, 2, 3], params, 6)
    batch.differences[batch.fold == 0] = 1e6
    batch.differences[batch.fold == 4] = np.nan
    assert search("polynomial", ArraySource(batch), [3, 1, 2], params, 6) == before
    # A fold of which no pair knows a difference judges nothing.
    assert search("polynomial", ArraySource(batch), [1, 2, 3, 4], params, 6) == before


def test_the_same_on_a_cluster(cluster):
    # The seed draws few and shallow trees.
    params = defaults("boosted", n_rounds=20)
    weight = np.linspace(0.5, 1, 1000, dtype=np.float32)
    source = ArraySource(replace(BATCH, weight=weight))
    here = search("boosted", source, [1, 2], params, 3, 34)
    assert search("boosted", source, [1, 2], params, 3, 34, client=cluster.client) == here


def _end(*args):
    os._exit(1)


@pytest.mark.fault
def test_a_fit_that_kills_its_worker_is_told(cluster, monkeypatch):
    # The graph has the function that scores: of a worker it is the end.
    monkeypatch.setattr(estimators, "_robust_score", _end)
    with pytest.raises(ClusterError, match="search of 'polynomial': a fit killed its worker"):
        search("polynomial", SOURCE, [1, 2], defaults("polynomial"), 2, client=cluster.client)


def test_of_very_many_pairs_some_count(monkeypatch):
    params = defaults("polynomial", order=1)
    monkeypatch.setattr(estimators, "_MOST_PAIRS", 400)
    x, y, _, fold, _ = estimators._pairs(SOURCE, [1, 2, 3])
    assert 340 < len(x) < 460 and set(fold) == {1, 2, 3}
    shuffled = np.random.default_rng(0).permutation(1000)
    names = ("features", "differences", "fold", "weight")
    other = models.Batch(**{name: getattr(BATCH, name)[shuffled] for name in names})
    again = estimators._pairs(ArraySource(other), [1, 2, 3])
    assert sorted(map(tuple, np.c_[x, y].tolist())) == sorted(map(tuple, np.c_[again[:2]].tolist()))
    assert len(search("polynomial", SOURCE, [1, 2, 3], params, 3)[1]) == 3


def test_workers_read_the_pairs_of_a_search(client, monkeypatch):
    here = estimators._pairs(SOURCE, [1, 2])
    monkeypatch.delattr(ArraySource, "load")
    for one, other in zip(estimators._pairs(SOURCE, [1, 2], client), here, strict=True):
        np.testing.assert_array_equal(one, other)


def test_candidates_that_cannot_be_fitted_lose(monkeypatch):
    def fit(kind, training, settings):
        if settings.order == 5:
            raise ModelError("no finite solution")
        return fitted(training, settings)

    fitted = PolynomialCorrection.fit
    monkeypatch.setattr(PolynomialCorrection, "fit", classmethod(fit))
    source = ArraySource(biased_pairs(90))
    params, trials = search("polynomial", source, range(5), defaults("polynomial", order=5), 8)
    assert int(params["order"]) < 5
    assert any(row["loss"] is None for row in trials)
    with pytest.raises(ModelError, match=r"needs at least 8 training pairs"):
        search("polynomial", ArraySource(biased_pairs(12)), [0, 1], defaults("polynomial"), 4)


def test_what_cannot_be_searched():
    with pytest.raises(ConfigError, match="'symbolic' has no parameters to search"):
        search("symbolic", SOURCE, [1, 2], defaults("symbolic"), 4)
    with pytest.raises(ModelError, match="two training folds"):
        search("polynomial", SOURCE, [1], defaults("polynomial"), 4)

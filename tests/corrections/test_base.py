"""What all methods share."""

import csv
import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from sos_dask import corrections as models
from sos_dask.corrections import Batch, boosted
from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.figures import held_out_metrics
from sos_dask.problem import DEFAULT, Input, Label, Problem
from sos_dask.schema import LABELS
from sos_dask.settings import sealed, to_json
from sos_dask.sky.healpix import unit_vectors
from sos_dask.stats.numbers import Histogram, count
from tests.corrections.pairs import ArraySource, biased_pairs
from tests.steps import FEATURES, features

QUICK = {"polynomial": {"order": 2}, "boosted": {"n_rounds": 20}}
METHODS = sorted(QUICK)


@pytest.fixture(scope="module", params=METHODS)
def fitted(request) -> models.Correction:
    source = ArraySource(biased_pairs(2000, 1), (700,))
    return models.fit(request.param, source, train_folds=[1, 2, 3, 4], params=QUICK[request.param])


@pytest.fixture
def saved(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    return tmp_path / "model"


# --- methods and parameters --------------------------------------------------------------------


def test_methods_are_the_modules():
    assert set(METHODS) <= set(models.methods())
    assert "lookup" not in models.methods()  # a module beside them that is no method
    assert list(models.methods()) == sorted(models.methods())
    for method in models.methods():
        assert models.check_params(method, {}) == {
            name: field.default
            for name, field in models.class_of(method).parameters.model_fields.items()
        }


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="no method 'bosted'") as caught:
        models.fit("bosted", ArraySource(biased_pairs(10)))
    assert "boosted" in caught.value.hint


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("polynomial", {"ordr": 3}, "method 'polynomial': unknown key 'ordr'"),
        ("polynomial", {"order": 0}, r"order: must be greater than or equal to 1 \(given: 0\)"),
        ("polynomial", {"order": 7}, "order: must be less than or equal to 6"),
        ("polynomial", {"order": 2.5}, "order: must be a valid integer"),
        ("polynomial", {"order": True}, "order: must be a valid integer"),
        ("polynomial", {"order": "4"}, "order: must be a valid integer"),
        ("polynomial", {"ridge": -1}, "ridge: must be greater than or equal to 0"),
        ("polynomial", {"ridge": float("nan")}, "ridge: must be a finite number"),
        ("boosted", {"device": "gpu"}, r"device: must be 'cpu' or 'cuda' \(given: 'gpu'\)"),
        ("boosted", {"max_dept": 3}, "unknown key 'max_dept'"),
        ("boosted", {"subsample": 0}, "subsample: must be greater than or equal to 0.05"),
        ("boosted", {"learning_rate": 2}, "learning_rate: must be less than or equal to 1"),
        ("boosted", {"n_rounds": 0}, "n_rounds: must be greater than or equal to 1"),
    ],
)
def test_wrong_parameters(method, params, message):
    with pytest.raises(ConfigError, match=message):
        models.fit(method, ArraySource(biased_pairs(500)), params=params)


def test_the_nearest_parameter_is_named():
    with pytest.raises(ConfigError) as caught:
        models.check_params("boosted", {"max_dept": 3})
    assert "max_depth" in caught.value.hint


def test_numbers_get_the_type_of_the_default():
    params = models.check_params("polynomial", {"order": 3.0, "ridge": 2})
    assert isinstance(params["order"], int)
    assert isinstance(params["ridge"], float)
    assert (params["order"], params["ridge"]) == (3, 2.0)


# --- training rows and their summary -----------------------------------------------------------


def rows_of(batch, folds=None):
    return models.Training(ArraySource(batch), folds).rows(0)


def test_rows_that_cannot_train_are_left_out():
    x = np.ones((7, 3), dtype=np.float32)
    y = np.ones((7, 3), dtype=np.float32)
    x[1, 2], x[2, 0] = np.nan, np.inf
    y[3] = np.nan
    y[4, 1] = np.inf
    weight = np.array([1, 1, 1, 1, 1, 0, 1], dtype=np.float32)
    fold = np.array([0, 0, 0, 0, 0, 0, 4], dtype=np.int8)
    rows = rows_of(Batch(x, y, fold, weight))
    assert len(rows.features) == 3
    assert np.isnan(rows.differences[1, 1])
    assert len(rows_of(Batch(x, y, fold, weight), [4]).features) == 1
    assert len(rows_of(Batch(x, y, fold, weight), []).features) == 0


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_histogram_quantiles(scale):
    rng = np.random.default_rng(5)
    values = (scale * rng.standard_cauchy(20_001)).astype(np.float32)
    histogram = Histogram()
    for part in np.array_split(values, 7):
        histogram.add(count(part))
    fractions = (0.0, 0.02, 0.25, 0.4, 0.75, 0.9, 1.0)
    expected = np.quantile(values, fractions)
    np.testing.assert_allclose(histogram.quantiles(fractions), expected, rtol=8e-3)
    assert histogram.n == len(values)
    again = Histogram()
    again.add(count(rng.permutation(values)))
    np.testing.assert_array_equal(again.quantiles(fractions), histogram.quantiles(fractions))


def test_median_of_odd_and_even_numbers():
    for values in ([3.0], [1.0, 2.0, 9.0], [-5.0, -4.0, -1.0], [0.0, 0.0, 7.0]):
        histogram = Histogram()
        histogram.add(count(np.array(values, dtype=np.float32)))
        assert histogram.quantiles((0.5,))[0] == pytest.approx(np.median(values), rel=8e-3)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_pairs(method):
    with pytest.raises(ModelError, match=r"needs at least \d+ training pairs .* there are 7"):
        models.fit(method, ArraySource(biased_pairs(7)))
    # Enough pairs, but not in the folds.
    with pytest.raises(ModelError, match=r"of folds 7 .* there are 0"):
        models.fit(method, ArraySource(biased_pairs(1000)), train_folds=[7])


@pytest.mark.parametrize("method", METHODS)
def test_a_label_that_is_never_known(method):
    batch = biased_pairs(1000)
    batch.differences[:, 2] = np.nan
    with pytest.raises(ModelError, match="known feh difference, and there are 0"):
        models.fit(method, ArraySource(batch, (300, 600)))


@pytest.mark.parametrize("method", METHODS)
def test_no_batch_at_all(method):
    empty = biased_pairs(0)
    with pytest.raises(ModelError, match="there are 0"):
        models.fit(method, ArraySource(empty, (0, 0)))


# --- prediction --------------------------------------------------------------------------------


def test_prediction_has_its_shape_and_type(fitted):
    x = biased_pairs(100, 2).features
    out = fitted.predict(x)
    assert out.shape == (100, 3)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert fitted.problem.names == LABELS
    assert fitted.predict(x[:0]).shape == (0, 3)
    with pytest.raises(ModelError, match=r"shape \(100, 2\)"):
        fitted.predict(x[:, :2])


def test_a_row_is_predicted_the_same_in_any_company(fitted):
    x = biased_pairs(20_000, 3).features
    whole = fitted.predict(x)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_array_equal(fitted.predict(x[order]), whole[order])
    np.testing.assert_array_equal(fitted.predict(x[order[:3]]), whole[order[:3]])
    np.testing.assert_array_equal(fitted.predict(np.asfortranarray(x)), whole)


def test_unknown_features_give_unknown_predictions(fitted):
    x = biased_pairs(12, 4).features
    expected = fitted.predict(x)
    for row, value in enumerate((np.nan, np.inf, -np.inf)):
        for column in range(3):
            x[3 * row + column, column] = value
    out = fitted.predict(x)
    assert np.isnan(out[:9]).all()
    np.testing.assert_array_equal(out[9:], expected[9:])
    assert not fitted.in_range(x)[:9].any()


def test_outside_the_training_box_the_correction_is_held(fitted):
    low, high = np.array(fitted.info.minimum), np.array(fitted.info.maximum)
    middle = (low + high) / 2
    far, edge = np.tile(middle, (6, 1)), np.tile(middle, (6, 1))
    for column in range(3):
        far[column, column], edge[column, column] = high[column] + 50, high[column]
        far[3 + column, column], edge[3 + column, column] = low[column] - 50, low[column]
    far, edge = far.astype(np.float32), edge.astype(np.float32)
    np.testing.assert_array_equal(fitted.predict(far), fitted.predict(edge))
    assert fitted.in_range(edge).all()
    assert not fitted.in_range(far).any()


def test_the_box_is_that_of_the_training_pairs(fitted):
    batch = biased_pairs(2000, 1)
    used = batch.features[batch.fold > 0]
    np.testing.assert_array_equal(fitted.info.minimum, used.min(axis=0))
    np.testing.assert_array_equal(fitted.info.maximum, used.max(axis=0))
    assert fitted.info.n_pairs == (len(used),) * 3
    assert fitted.info.train_folds == (1, 2, 3, 4)


# --- saving and loading ------------------------------------------------------------------------


def test_a_saved_model_comes_back(fitted, saved, tmp_path):
    again = models.load(saved)
    x = biased_pairs(3000, 5).features
    # Saved trees are a look-up table: the same sums, rounded once.
    rtol, atol = (3e-6, 3e-5) if fitted.method == "boosted" else (0.0, 0.0)
    np.testing.assert_allclose(again.predict(x), fitted.predict(x), rtol=rtol, atol=atol)
    assert again.info == fitted.info
    assert again.method == fitted.method
    again.save(tmp_path / "again")
    names = sorted(file.name for file in saved.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir())
    for name in names:
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert not name.endswith((".pkl", ".pickle"))


def test_a_model_travels_to_workers(fitted):
    x = biased_pairs(100, 6).features
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(x), fitted.predict(x))


def test_the_same_pairs_give_the_same_bytes(fitted):
    source = ArraySource(biased_pairs(2000, 1), (700,))
    again = models.fit(fitted.method, source, train_folds=[1, 2, 3, 4], params=QUICK[fitted.method])
    assert again.files() == fitted.files()


def test_what_a_model_states(fitted, saved):
    document = json.loads((saved / "model.json").read_text())
    assert document["format"] == models.base.MODEL_FORMAT
    assert document["method"] == fitted.method
    assert document["labels"] == list(LABELS)
    assert document["features"] == list(FEATURES)
    assert document["params"] == models.check_params(fitted.method, QUICK[fitted.method])
    assert document["train_folds"] == [1, 2, 3, 4]
    assert set(document["training_range"]) == set(FEATURES)
    others = {file.name for file in saved.iterdir()} - {"model.json"}
    assert set(document["files"]) == others
    for name, value in document["files"].items():
        assert hashlib.sha256((saved / name).read_bytes()).hexdigest() == value


def test_a_changed_file_is_named(saved):
    for file in sorted(saved.iterdir()):
        if file.name == "model.json":
            continue
        content = file.read_bytes()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(ModelError, match=file.name):
            models.load(saved)
        file.write_bytes(content)
    models.load(saved)


def test_a_missing_file_is_named(saved):
    for file in sorted(saved.iterdir()):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ModelError, match=f"{file.name}: No such file"):
            models.load(saved)
        file.write_bytes(content)


def _edit(saved: Path, **changes: object) -> None:
    document = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_bytes(to_json(sealed({**document, **changes})))


def test_an_edited_model_is_refused(saved):
    """A wider training range would extrapolate without a word."""
    text = (saved / "model.json").read_text()
    document = json.loads(text)
    document["training_range"]["logg"][1] += 1.0
    for edited in (json.dumps(document), text.replace('"format": 3', '"format":  3, "x": 1')):
        (saved / "model.json").write_text(edited)
        with pytest.raises(ModelError, match="was changed after the model was saved"):
            models.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": models.base.MODEL_FORMAT + 1}, r"model format 4 is not 3"),
        ({"format": None}, "model format None"),
        ({"labels": ["teff", "feh", "logg"]}, "labels are"),
        ({"features": ["teff", "logg", "feh"]}, "features are"),
        ({"problem": {"labels": []}}, "its problem is damaged"),
        ({"problem": {"labels": [{"name": "rv"}]}}, r"labels are .* not \['rv'\]"),
        ({"method": "psychic"}, "method 'psychic' is not one of"),
        ({"method": None}, "method None"),
        ({"files": {"../../secret": "00"}}, "'../../secret' is not a file name"),
        ({"files": {}}, "incomplete|not valid|damaged"),
        ({"files": []}, "damaged"),
        ({"training_range": {"logg": [0, 1]}}, "damaged"),
        ({"training_range": {name: [0, "x"] for name in FEATURES}}, "damaged"),
        ({"n_pairs": None}, "damaged"),
        ({"format": 2}, r"model format 2 is not 3(.|\n)*train it again"),
    ],
)
def test_a_model_of_another_kind_is_refused(saved, changes, message):
    _edit(saved, **changes)
    with pytest.raises(ModelError, match=message):
        models.load(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00"])
def test_a_damaged_model_file_is_refused(saved, content):
    (saved / "model.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.json: not"):
        models.load(saved)


def test_a_model_of_one_method_is_not_read_as_another(saved, fitted):
    other = next(method for method in METHODS if method != fitted.method)
    _edit(saved, method=other)
    with pytest.raises(ModelError):
        models.load(saved)


def test_saving_again_replaces(saved, fitted):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    fitted.save(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    shutil.rmtree(saved)
    with pytest.raises(ModelError, match=r"model\.json: No such file"):
        models.load(saved)


# --- other problems ----------------------------------------------------------------------------

PROBLEM = Problem(
    labels=(Label(name="rv", unit="km/s"), Label(name="feh", unit="dex")),
    inputs=(*DEFAULT.inputs, Input(column="starspot_share", scale=0.5)),
)


def pairs_of(problem: Problem, n: int, seed: int) -> Batch:
    """Pairs whose first label depends on the last input."""
    batch = biased_pairs(n, seed)
    rng = np.random.default_rng(seed)
    columns = {"teff": batch.features[:, 0] * 5040, "logg": batch.features[:, 1]}
    columns |= {"feh": batch.features[:, 2]}
    columns["starspot_share"] = rng.uniform(0, 0.5, n).astype(np.float32)
    x = problem.matrix(columns)
    y = batch.differences[:, 1 : 1 + len(problem.labels)].copy()
    y[:, 0] += 2 * x[:, -1]
    errors = np.full_like(y, 0.05)
    return Batch(x, y, batch.fold, batch.weight, errors)


@pytest.mark.parametrize("method", ["polynomial", "boosted", "hybrid", "simex"])
@pytest.mark.parametrize(
    "problem", [PROBLEM, PROBLEM.but(labels=PROBLEM.labels[:1], inputs=PROBLEM.inputs[2:])]
)
def test_any_labels_and_inputs(method, problem, tmp_path):
    source = ArraySource(pairs_of(problem, 4000, 1), (1500,), problem)
    quick = {"n_rounds": 60, "learning_rate": 0.1} if method in ("boosted", "hybrid") else {}
    quick |= {"smoothing": 0.3} if method == "hybrid" else {}
    fitted = models.fit(method, source, train_folds=[1, 2, 3, 4], params=quick)
    fitted.save(tmp_path / "model")
    again = models.load(tmp_path / "model")
    assert again.problem == problem
    held = source.batch.fold == 0
    x, y = source.batch.features[held], source.batch.differences[held]
    predicted = again.predict(x)
    assert predicted.shape == y.shape
    left, before = y - predicted, y - np.median(y, axis=0)
    assert (left.std(axis=0)[0] < 0.4 * before.std(axis=0)[0]).all()
    np.testing.assert_allclose(predicted, fitted.predict(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=rf"not \(n, {len(problem.inputs)}\)"):
        again.predict(np.ones((2, 7), np.float32))


def test_a_symbolic_formula_of_other_inputs():
    pytest.importorskip("pyoperon")
    problem = PROBLEM.but(labels=PROBLEM.labels[:1])
    source = ArraySource(pairs_of(problem, 2000, 1), (), problem)
    quick = {"n_sample": 500, "population": 100, "generations": 10, "max_length": 12}
    fitted = models.fit("symbolic", source, params=quick)
    assert "starspot_share" in fitted.files()["formula.json"].decode()
    left = source.batch.differences - fitted.predict(source.batch.features)
    assert left.std() < 0.4 * source.batch.differences.std()


def test_trees_of_too_many_cells_predict_directly_and_say_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(boosted, "MAX_CELLS", 1000)
    source = ArraySource(pairs_of(PROBLEM, 2000, 1), (), PROBLEM)
    fitted = models.fit("boosted", source, params={"n_rounds": 20})
    fitted.save(tmp_path / "model")
    assert "the trees predict directly" in caplog.text
    assert not (tmp_path / "model/lookup.npy").exists()
    assert "cells" in json.loads((tmp_path / "model/boosted.json").read_text())["no_table"]
    x = source.batch.features
    np.testing.assert_array_equal(models.load(tmp_path / "model").predict(x), fitted.predict(x))


def test_a_model_without_a_problem_is_refused(saved):
    document = json.loads((saved / "model.json").read_text())
    assert document["problem"] == DEFAULT.as_json
    del document["problem"]
    (saved / "model.json").write_bytes(to_json(sealed(document)))
    with pytest.raises(ModelError, match=r"model\.json: incomplete .*problem"):
        models.load(saved)


# --- real stars --------------------------------------------------------------------------------


def _first_rows(path: Path, key: str) -> list[dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row[key], row)
    return list(rows.values())


def _column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def _real_pairs(folder: Path) -> Batch:
    """LAMOST DR3 giants within 3 arcsec of a star of APOGEE DR17."""
    lamost = _first_rows(folder / "lamost_dr3_giants.csv", "obsid")
    apogee = _first_rows(folder / "apogee_dr17.csv", "apogee_id")
    sky = [unit_vectors(_column(rows, "ra"), _column(rows, "dec")) for rows in (lamost, apogee)]
    chord = 2 * np.sin(np.radians(3 / 3600) / 2)
    distance, nearest = cKDTree(sky[1]).query(sky[0], distance_upper_bound=chord)
    found = np.flatnonzero(np.isfinite(distance))
    pairs = [lamost[i] for i in found], [apogee[i] for i in nearest[found]]
    target = [_column(pairs[0], name) for name in LABELS]
    reference = [_column(pairs[1], name) for name in ("teff", "logg", "fe_h")]
    fold = [
        hashlib.sha256(star["apogee_id"].encode()).digest()[0] % 5  # all spectra of a star together
        for star in pairs[1]
    ]
    return Batch(
        features(*target),
        np.stack(target, axis=1).astype(np.float32) - np.stack(reference, axis=1).astype("f4"),
        np.array(fold, dtype=np.int8),
        np.ones(len(fold), dtype=np.float32),
    )


def test_real_giants_agree_with_apogee_after_the_correction(real_data):
    batch = _real_pairs(real_data)
    assert len(batch.fold) == 736
    metrics = []
    for method in METHODS:
        predicted = np.empty_like(batch.differences)
        for fold in range(5):
            rest = [other for other in range(5) if other != fold]
            correction = models.fit(method, ArraySource(batch, (200, 500)), train_folds=rest)
            held_out = batch.fold == fold
            predicted[held_out] = correction.predict(batch.features[held_out])
        metrics += held_out_metrics(method, LABELS, batch.differences, predicted)
    ratio = {
        method: sum(m.scatter_after / m.scatter_before for m in metrics if m.method == method)
        for method in METHODS
    }
    best = {m.label: m for m in metrics if m.method == min(ratio, key=lambda name: ratio[name])}
    assert best["feh"].scatter_before == pytest.approx(0.119, abs=0.001)
    assert best["feh"].scatter_after < 0.060
    assert abs(best["feh"].median_after) < 0.01
    assert best["logg"].scatter_after < 0.095
    assert best["teff"].scatter_after < 27.5
    for metric in metrics:
        assert metric.scatter_after < 0.65 * metric.scatter_before


def test_a_summary_is_that_of_all_rows():
    batch = biased_pairs(900, 2)
    batch.differences[::3, 1] = np.nan
    batch.differences[:, 2] = 0.25
    weight = np.random.default_rng(2).uniform(1, 3, 900).astype(np.float32)
    source = ArraySource(replace(batch, weight=weight), (0, 100, 640))
    settings = models.polynomial.Settings()
    found = models.base.summarise(models.Training(source), "polynomial", settings, 1)
    x = batch.features.astype(np.float64)
    assert found.n_rows.tolist() == [0, 100, 540, 260]
    assert found.info.n_pairs == (900, 600, 900)
    np.testing.assert_array_equal(found.info.minimum, x.min(axis=0))
    np.testing.assert_array_equal(found.info.maximum, x.max(axis=0))
    np.testing.assert_allclose(found.mean, x.mean(axis=0))
    np.testing.assert_allclose(found.deviation, x.std(axis=0), rtol=1e-6)
    assert found.mean_weight == pytest.approx(weight.mean())
    assert found.constant.tolist() == [False, False, True]
    y = batch.differences.astype(np.float64)
    np.testing.assert_allclose(found.center, np.nanmedian(y, axis=0), rtol=0.02, atol=1e-3)
    quartiles = np.nanquantile(y, (0.25, 0.75), axis=0)
    expected = np.where(found.constant, 1, (quartiles[1] - quartiles[0]) / 1.349)
    np.testing.assert_allclose(found.spread, expected, rtol=0.02)

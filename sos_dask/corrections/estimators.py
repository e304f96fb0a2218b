"""Methods as scikit-learn estimators, and the search of their parameters by dask-ml.

>>> from sos_dask import Boosted
>>> Boosted(n_rounds=200).fit(X, y).correction_.save(path)                       # doctest: +SKIP
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

from sos_dask import corrections
from sos_dask.columns import Float32Array, FloatArray
from sos_dask.corrections import base
from sos_dask.corrections.base import Batch, OneBatch, Training, TrainingSource
from sos_dask.corrections.degrade import rows_of
from sos_dask.errors import ClusterError, ConfigError, ModelError, SosError
from sos_dask.problem import Input, Label, Problem
from sos_dask.run.workers import Lost, Workers
from sos_dask.schema import CANONICAL
from sos_dask.settings import is_column
from sos_dask.stats.numbers import MAD_TO_SIGMA

_X: Mapping[str, Any] = {"dtype": np.float32}
_Y: Mapping[str, Any] = {"dtype": np.float32, "ensure_all_finite": "allow-nan", "ensure_2d": False}
_CLIP = 4.0  # spreads; how far an outlier is does not matter to a search
_LOSSES = 3  # of all workers that fit
_JUDGES = 5  # folds that judge candidates
_MOST_PAIRS = 1_000_000  # of a search: 40 MB

_DOC = """

Parameters
----------
{}
problem : Problem, optional
    Labels, and inputs: the columns of X are ``problem.columns``. Default: inputs are the columns of
    X as they are, with their names or x0, x1, ...; labels are named as the columns of y, less
    ``_diff``, or y0, y1, ...

Attributes
----------
correction_ : sos_dask.corrections.Correction
    ``correction_.save(path)`` writes a model for ``sos-dask apply`` and `sos_dask.Correction.load`,
    which look for columns of these names.
"""


class EstimatorError(ModelError, ValueError):
    """A method refuses its parameters or its pairs: also a ValueError, as scikit-learn expects."""


class _Estimator(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """A method of `sos_dask.corrections`, in this process, for pairs in memory."""

    method: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        """Give ``__init__`` the parameters of the method, which are declared there alone."""
        super().__init_subclass__(**options)
        fields = corrections.class_of(cls.method).parameters.model_fields
        defaults = {name: field.default for name, field in fields.items()} | {"problem": None}
        kind = inspect.Parameter.KEYWORD_ONLY
        own = [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
        place = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.Signature([place, *own])

        def __init__(self: Any, *args: Any, **given: Any) -> None:
            given = signature.bind(self, *args, **given).arguments
            vars(self).update({name: given.get(name, defaults[name]) for name in defaults})

        __init__.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[method-assign]
        lines = [
            f"{name} : {inspect.formatannotation(field.annotation)}, default {field.default!r}"
            f"\n    {field.description}."
            for name, field in fields.items()
        ]
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "") + _DOC.format("\n".join(lines))

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Fit the correction.

        Parameters
        ----------
        X : array-like, shape (n, k)
            Inputs, all finite. They are rounded to float32.
        y : array-like, shape (n,) or (n, l)
            Differences target - reference of one label or several; nan where unknown.
        sample_weight : array-like, shape (n,), optional
            Only ratios matter; pairs of weight 0 are not used.

        Raises
        ------
        EstimatorError
            A wrong parameter, or too few pairs.
        ValueError
            Inputs that are not finite numbers, or arrays of other shapes.
        """
        return self._fit(X, y, sample_weight)

    def _fit(self, X: Any, y: Any, sample_weight: Any, degraded: Any = None) -> Self:
        """Fit; some pairs may be others as fainter rows see them."""
        names = [*getattr(y, "columns", [getattr(y, "name", None)])]
        X, y = validate_data(self, X, y, validate_separately=({**_X, "ensure_min_samples": 2}, _Y))
        check_consistent_length(X, y)
        self._labels = y.shape[1:]  # none where y has one axis
        y = y.reshape(len(y), -1)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float32, ensure_non_negative=True)
        # The grids of searches have numbers of NumPy.
        params = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in self.get_params(deep=False).items()
        }
        try:
            problem = self._problem(names, y.shape[1], params.pop("problem"))
            batch = Batch(_inputs(problem, X), y, np.zeros(len(X), np.int8), weight)
            if degraded is not None:
                pairs, fainter = (rows_of(batch, np.flatnonzero(degraded == i)) for i in (0, 1))
                batch = replace(pairs, degraded=fainter)
            self.correction_ = corrections.fit(self.method, OneBatch(batch, problem), params=params)
        except SosError as error:
            raise EstimatorError(error.message, error.hint) from error
        return self

    def predict(self, X: Any) -> FloatArray:
        """Predict the differences target - reference.

        Parameters
        ----------
        X : array-like, shape (n, k)
            Inputs; outside the range of the training pairs the nearest place in it counts.

        Returns
        -------
        ndarray, shape (n,) or (n, l)
            As y was given; nan where a logarithm of an input is unknown.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, **_X)
        found = self.correction_.predict(_inputs(self.correction_.problem, X))
        return found.astype(np.float64).reshape(len(X), *self._labels)

    def score(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> float:
        """Calculate R², the mean over the labels, each of the rows that know it."""
        from sklearn.metrics import r2_score

        found = self.predict(X)
        truth = check_array(y, **_Y).reshape(len(found), -1)
        weight = _check_sample_weight(sample_weight, found)
        scores = []
        for one, other in zip(truth.T, found.reshape(truth.shape).T, strict=True):
            known = np.isfinite(one) & np.isfinite(other)
            scores.append(r2_score(one[known], other[known], sample_weight=weight[known]))
        return float(np.mean(scores))

    def _problem(self, names: Sequence[Any], n_labels: int, given: Problem | None) -> Problem:
        """Problem of the columns as they are, or the given one if it is of such columns."""
        columns = [*getattr(self, "feature_names_in_", given.columns if given else [])]
        if given is None:
            columns = columns or [None] * self.n_features_in_
            names = names if len(names) == n_labels else [None] * n_labels
            labels = [_named(name, f"y{n}").removesuffix("_diff") for n, name in enumerate(names)]
            units = {name: CANONICAL[name].unit for name in labels if name in CANONICAL}
            inputs = [Input(column=_named(name, f"x{n}")) for n, name in enumerate(columns)]
            named = tuple(Label(name=name, unit=units.get(name, "")) for name in labels)
            return Problem(labels=named, inputs=tuple(inputs))
        expected = len(given.columns), len(given.names), [*given.columns]
        if (self.n_features_in_, n_labels, columns) != expected:
            raise ConfigError(
                f"X has {self.n_features_in_} columns ({', '.join(columns)}), y {n_labels}; the "
                f"problem is {given.words}",
                f"Give X with the columns {', '.join(given.columns)}, in this order.",
            )
        return given


def _inputs(problem: Problem, X: Float32Array) -> Float32Array:
    return problem.matrix(dict(zip(problem.columns, X.T, strict=True)))


def _named(name: Any, other: str) -> str:
    return name if isinstance(name, str) and is_column(name) else other


class Polynomial(_Estimator):
    """Robust polynomial of limited total order, with all cross terms."""

    method = "polynomial"


class Boosted(_Estimator):
    """Gradient-boosted trees (XGBoost), one ensemble a label."""

    method = "boosted"


class Hybrid(_Estimator):
    """Boosted trees on a polynomial's residual, smoothed on a grid; of at most 21 inputs."""

    method = "hybrid"


class Symbolic(_Estimator):
    """A readable formula found by symbolic regression (``pip install 'sos_dask[symbolic]'``)."""

    method = "symbolic"


ESTIMATORS: Mapping[str, type[_Estimator]] = {
    kind.method: kind for kind in (Polynomial, Boosted, Hybrid, Symbolic)
}


# --- search -------------------------------------------------------------------------------------


def candidates(method: str, params: corrections.Params, n: int, seed: int) -> list[dict[str, Any]]:
    """Draw at most n different sets of the searched parameters; the first is that of ``params``."""
    from sklearn.model_selection import ParameterGrid, ParameterSampler

    space = corrections.class_of(method).search
    if not space:
        raise ConfigError(f"method '{method}' has no parameters to search")
    first = {name: params[name] for name in space}
    n_most = min(n, len(ParameterGrid(space)))
    drawn = ParameterSampler(space, n_most, random_state=seed)
    others = [{name: one[name] for name in space} for one in drawn]
    return [first, *(one for one in others if one != first)][:n]


def search(
    method: str,
    source: TrainingSource,
    train_folds: Sequence[int],
    params: corrections.Params,
    n: int,
    seed: int = 0,
    client: Any = None,
) -> tuple[corrections.Params, list[dict[str, Any]]]:
    """Choose parameters of a method by cross-validation over the folds that train it.

    dask-ml fits every candidate without each of (at most five of) the folds and judges it on that
    fold. Candidates are drawn at random (Bergstra & Bengio 2012, JMLR 13, 281), all where there are
    no more than ``n``; the first is ``params``, which are complete. A fit is one task of one
    thread, so the choice does not depend on the workers: with a client tasks are theirs, and each
    needs all pairs in its memory. Of more than a million pairs a random million counts.

    Gives the complete parameters of the best candidate, and all candidates as JSON, the best first:
    their parameters, their loss on each fold kept aside, and the mean. A loss is the mean over the
    labels of the mean absolute residual, in spreads of the differences; None where a candidate
    could not be fitted.

    Raises `ModelError`: fewer than two folds, or no candidate can be fitted; `ClusterError`: a fit
    killed its workers again and again.
    """
    # Not RandomizedSearchCV: it cannot be told to try a given candidate, too.
    from dask_ml.model_selection import GridSearchCV

    drawn = candidates(method, params, n, seed)
    X, y, weight, fold, degraded = _pairs(source, sorted(map(int, train_folds)), client)
    folds = np.unique(fold[~degraded])
    if len(folds) < 2:
        raise ModelError(
            f"a search for parameters of '{method}' needs two training folds, and there is "
            f"{len(folds)}",
            "Raise crossmatch.n_folds.",
        )
    cv = [(np.flatnonzero(fold != n), np.flatnonzero((fold == n) & ~degraded)) for n in folds]
    problem = source.problem
    problem = problem.but(inputs=tuple(Input(column=name) for name in problem.features))
    tried = _Tried(ESTIMATORS[method](**params, problem=problem))
    searched = GridSearchCV(
        tried,
        [{f"estimator__{name}": [value] for name, value in one.items()} for one in drawn],
        scoring=_robust_score,
        iid=False,
        refit=False,
        cv=cv[:_JUDGES],
        cache_cv=False,  # copies of all folds in every worker
        # dask-ml's own way to a client tries for ever again what kills its worker.
        scheduler="sync" if client is None else partial(_on_workers, client, method),
    )
    with np.errstate(invalid="ignore"):  # spreads of infinite scores
        found = searched.fit(X, y, sample_weight=weight, degraded=degraded).cv_results_
    scores = [found[f"split{number}_test_score"] for number in range(searched.n_splits_)]
    losses = np.array([*-np.array(scores), -np.mean(scores, axis=0)]).T
    order = np.argsort(losses[:, -1], kind="stable").tolist()
    if not np.isfinite(losses[order[0], -1]):
        others = cv[0][0]
        tried.estimator._fit(X[others], y[others], weight[others], degraded[others])  # says why
        raise ModelError(f"no candidate of the search of '{method}' can be fitted without any fold")
    trials = []
    for number in order:
        *each, mean = (one if np.isfinite(one) else None for one in losses[number].tolist())
        trials.append({"params": drawn[number], "losses": each, "loss": mean})
    return {**params, **drawn[order[0]]}, trials


def _pairs(
    source: TrainingSource, folds: Sequence[int], client: Any = None
) -> tuple[NDArray[Any], ...]:
    """Columns of the training rows, their fold, and which are pairs as fainter rows see them.

    Of very many, some that their numbers choose.
    """
    read, batches = partial(_pairs_of, source, folds), range(source.n_batches)
    parts = base.run_tasks(read, batches, client, "search: a batch", "give workers more.")
    columns = tuple(map(np.concatenate, zip(*itertools.chain(*parts), strict=True)))
    if (share := _MOST_PAIRS / max(len(columns[0]), 1)) < 1:
        chosen = base.hash_rows(*columns[:2]) < np.uint64(share * 2.0**64)
        columns = tuple(column[chosen] for column in columns)
    return columns


def _pairs_of(source: TrainingSource, folds: Sequence[int], index: int) -> list[tuple[Any, ...]]:
    """Training rows of one batch, fold by fold: see `_pairs`."""
    loaded, parts = OneBatch(source.load(index), source.problem), []
    for fold in folds:
        rows = Training(loaded, (fold,), degraded=True).rows(0)
        n = len(Training(loaded, (fold,)).rows(0).features)
        place = np.arange(len(rows.features))
        parts.append((*rows, np.full_like(place, fold), place >= n))
    return parts


class _Tried(BaseEstimator):
    """A candidate: a model too large for the pairs is a bad one, no reason to stop or to warn."""

    def __init__(self, estimator: _Estimator) -> None:
        self.estimator = estimator

    def fit(self, X: Any, y: Any, sample_weight: Any, degraded: Any) -> Self:
        with suppress(EstimatorError):
            self.estimator._fit(X, y, sample_weight, degraded)
        return self


def _robust_score(tried: _Tried, X: Float32Array, y: Float32Array) -> float:
    """Less the loss on the fold that was kept aside; -inf where nothing was fitted."""
    if not hasattr(tried.estimator, "correction_"):
        return -np.inf
    losses = []
    for truth, predicted in zip(y.T.astype(np.float64), tried.estimator.predict(X).T, strict=True):
        truth, predicted = (one[np.isfinite(truth)] for one in (truth, predicted))
        if len(truth):
            spread = MAD_TO_SIGMA * np.median(np.abs(truth - np.median(truth)))
            scaled = np.abs(truth - predicted) / (spread if spread > 0 else 1.0)
            losses.append(np.mean(np.minimum(scaled, _CLIP)))
    return -float(np.mean(losses))


def _on_workers(client: Any, method: str, graph: Any, keys: Any, **options: Any) -> Any:
    """Scheduler of Dask: the workers of a client that are fit; again where they are lost."""
    from distributed import futures_of

    workers = Workers.of(client)
    for _ in range(_LOSSES):
        addresses = list(workers.wait_for(1))
        futures = client.get(graph, keys, sync=False, workers=addresses)
        try:
            return workers.fetch(futures, addresses)
        except Lost as lost:
            workers.release(futures_of(futures))  # else they wait for these workers for ever
            if lost.__cause__ is not None:  # one after the other: Dask gave it to others before
                break
    hint = "Most often it ran out of memory: every fit needs all pairs. Give workers more."
    raise ClusterError(f"search of '{method}': a fit killed its worker again and again", hint)

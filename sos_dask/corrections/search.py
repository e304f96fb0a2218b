"""Hyper-parameters chosen by successive halving over the cluster.

Candidates are drawn at random (Bergstra & Bengio 2012, JMLR 13, 281); the parameters of the job are
the first of them. In a round each is fitted with one more of the training folds kept aside and
judged on it; the better half goes on (Jamieson & Talwalkar 2016, AISTATS 51, 240). Held-out folds
have no part in it. A fit is one task of one thread, so the choice does not depend on the workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sos_dask.corrections import class_of, fit
from sos_dask.corrections.base import Training, TrainingSource, run_tasks
from sos_dask.errors import ConfigError, ModelError
from sos_dask.stats.numbers import MAD_TO_SIGMA

CLIP = 4.0  # spreads; how far an outlier is does not matter
MAX_FOLDS = 5  # that judge the last candidates

Params = Mapping[str, int | float | str]


def candidates(method: str, params: Params, n: int, seed: int) -> list[Params]:
    """Draw at most n different sets of the searched parameters; the first is that of ``params``."""
    space = class_of(method).search
    if not space:
        raise ConfigError(f"method '{method}' has no parameters to search")
    rng = np.random.default_rng(seed)
    found: list[Params] = [{name: params[name] for name in space}]
    for _ in range(20 * n):
        if len(found) >= n:
            break
        drawn = {name: values[int(rng.integers(len(values)))] for name, values in space.items()}
        if drawn not in found:
            found.append(drawn)
    return found


def search(
    method: str,
    source: TrainingSource,
    train_folds: Sequence[int],
    params: Params,
    n: int,
    seed: int = 0,
    client: Any = None,
) -> tuple[Params, list[dict[str, Any]]]:
    """Choose parameters of a method by the folds that train it; no other fold is read.

    Of ``n`` candidates the first is ``params``, which are complete. With a client fits are tasks of
    its workers, each of which needs all pairs in its memory.

    Returns
    -------
    params : mapping
        Complete parameters of the best candidate.
    trials : list of dict
        All candidates as JSON, the best first: their parameters, their loss on each fold kept aside
        for them, and the mean. A loss is the mean over the labels of the mean absolute residual, in
        spreads of the differences; None where a candidate could not be fitted.

    Raises
    ------
    ModelError
        Fewer than two folds, or no candidate can be fitted.
    """
    folds = sorted(int(fold) for fold in train_folds)
    if len(folds) < 2:
        raise ModelError(
            f"a search for parameters of '{method}' needs two training folds, and there is "
            f"{len(folds)}",
            "Raise crossmatch.n_folds.",
        )
    what, advice = f"search of '{method}': a fit", "every fit needs all pairs. Give workers more."
    drawn = candidates(method, params, n, seed)
    losses: list[list[float]] = [[] for _ in drawn]

    def rank(number: int) -> tuple[float, ...]:
        return -len(losses[number]), float(np.mean(losses[number])), number

    order, n_alive = list(range(len(drawn))), len(drawn)
    for kept in folds[:MAX_FOLDS]:
        alive = order[:n_alive]
        jobs = [(method, source, folds, kept, {**params, **drawn[number]}) for number in alive]
        for number, loss in zip(alive, run_tasks(_loss, jobs, client, what, advice), strict=True):
            losses[number].append(loss)
        order.sort(key=rank)
        if not np.isfinite(np.mean(losses[order[0]])):
            raise ModelError(f"no candidate of the search of '{method}' can be fitted")
        n_alive = max((n_alive + 1) // 2, 2)
    trials = []
    for number in order:
        known = [*losses[number], float(np.mean(losses[number]))]
        *each, mean = (loss if np.isfinite(loss) else None for loss in known)
        trials.append({"params": dict(drawn[number]), "losses": each, "loss": mean})
    return {**params, **drawn[order[0]]}, trials


def _loss(job: tuple[str, TrainingSource, Sequence[int], int, Params]) -> float:
    """Loss of one fit on the fold that was kept aside; infinite where it cannot be fitted."""
    method, source, folds, kept, params = job
    try:
        others = [fold for fold in folds if fold != kept]
        fitted = fit(method, source, train_folds=others, params=params)
    except ModelError:
        # A model too large for the pairs is a bad candidate, no reason to stop.
        return float("inf")
    rows = [Training(source, (kept,)).rows(index) for index in range(source.n_batches)]
    truth = np.concatenate([row.differences for row in rows]).astype(np.float64)
    residual = np.abs(truth - np.concatenate([fitted.predict(row.features) for row in rows]))
    spread = MAD_TO_SIGMA * np.nanmedian(np.abs(truth - np.nanmedian(truth, axis=0)), axis=0)
    scaled = np.minimum(residual / np.where(spread > 0, spread, 1.0), CLIP)
    return float(np.mean([np.nanmean(column) for column in scaled.T]))

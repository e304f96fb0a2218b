"""Search of hyper-parameters."""

import numpy as np
import pytest

from sos_dask import corrections as models
from sos_dask.corrections import candidates, class_of, search
from sos_dask.errors import ConfigError, ModelError
from sos_dask.settings import to_json
from tests.corrections.pairs import ArraySource, biased_pairs

SOURCE = ArraySource(biased_pairs(1000, 1), (300,))


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


def test_a_small_space_has_few_candidates():
    n = np.prod([len(values) for values in class_of("polynomial").search.values()])
    assert len(candidates("polynomial", defaults("polynomial"), 200, 0)) == n


def test_the_best_is_found_and_all_are_told():
    # A line through a curved bias, to begin with.
    params, trials = search("polynomial", SOURCE, [1, 2, 3, 4], defaults("polynomial", order=1), 10)
    assert params["order"] in (2, 3, 4)
    assert set(params) == set(class_of("polynomial").parameters.model_fields)
    assert len(trials) == 10
    judged = [len(trial["losses"]) for trial in trials]
    assert judged == sorted(judged, reverse=True)
    assert judged[0] == 4
    assert judged.count(1) == 5
    finals = [trial["loss"] for trial in trials if len(trial["losses"]) == 4]
    assert finals == sorted(finals)
    first = next(trial for trial in trials if trial["params"]["order"] == 1)
    assert first["losses"][0] > trials[0]["losses"][0]
    assert to_json(trials)


def test_held_out_folds_have_no_part():
    batch = biased_pairs(1000, 1)
    params = defaults("polynomial")
    before = search("polynomial", ArraySource(batch), [1, 2, 3], params, 6)
    batch.differences[batch.fold == 0] = 1e6
    batch.differences[batch.fold == 4] = np.nan
    assert search("polynomial", ArraySource(batch), [3, 1, 2], params, 6) == before


def test_the_same_on_a_cluster(cluster):
    # The seed draws few and shallow trees.
    params = defaults("boosted", n_rounds=20)
    here = search("boosted", SOURCE, [1, 2], params, 3, 34)
    assert search("boosted", SOURCE, [1, 2], params, 3, 34, client=cluster.client) == here


def test_candidates_that_are_too_large_lose():
    source = ArraySource(biased_pairs(90))
    params, trials = search("polynomial", source, range(5), defaults("polynomial", order=5), 8)
    assert int(params["order"]) < 5
    assert any(row["loss"] is None for row in trials)
    with pytest.raises(ModelError, match="no candidate"):
        search("polynomial", ArraySource(biased_pairs(12)), [0, 1], defaults("polynomial"), 4)


def test_what_cannot_be_searched():
    with pytest.raises(ConfigError, match="'symbolic' has no parameters to search"):
        search("symbolic", SOURCE, [1, 2], defaults("symbolic"), 4)
    with pytest.raises(ModelError, match="two training folds"):
        search("polynomial", SOURCE, [1], defaults("polynomial"), 4)

import itertools

import numpy as np
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st

from sos_dask import corrections
from sos_dask.corrections import Batch, boosted
from sos_dask.corrections.boosted import BoostedCorrection, LookupTable, compile_trees
from sos_dask.errors import ModelError
from sos_dask.stats.table import pack
from tests.corrections.pairs import ArraySource

ZERO, ONE = np.zeros(1), np.ones(1)


def random_booster(rng: np.random.Generator, rounds: int, depth: int, bins: int) -> xgboost.Booster:
    x = rng.normal(size=(400, 3)).astype(np.float32)
    y = x.sum(axis=1) + x[:, 0] * x[:, 1] + rng.normal(size=400)
    params = {"max_depth": depth, "max_bin": bins, "eta": 0.3, "nthread": 1, "lambda": 0.1}
    return xgboost.train(params, xgboost.QuantileDMatrix(x, y, max_bin=bins), rounds)


def probes(rng: np.random.Generator, table: LookupTable) -> np.ndarray:
    """Values everywhere, on the thresholds, just beside them, and far away."""
    columns = []
    for edges in table.edges:
        special = [np.float32(3e38), np.float32(-3e38)]
        beside = np.nextafter(edges, np.float32(-np.inf)), np.nextafter(edges, np.float32(np.inf))
        pool = np.concatenate([edges, *beside, special, rng.normal(size=50) * 2]).astype(np.float32)
        columns.append(rng.choice(pool, 2000))
    return np.stack(columns, axis=1)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(0, 12), st.integers(1, 6), st.sampled_from([2, 7, 64, 256])
)
def test_equals_xgboost_on_every_row(seed, rounds, depth, bins):
    rng = np.random.default_rng(seed)
    boosters = [random_booster(rng, rounds, depth, bins) for _ in range(2)]
    table = compile_trees(boosters, np.zeros(2), np.ones(2))
    assert table is not None
    x = probes(rng, table)
    expected = np.stack([booster.inplace_predict(x) for booster in boosters], axis=1)
    np.testing.assert_allclose(table.predict(x), expected, rtol=2e-6, atol=2e-6)


def test_scaled_table_holds_the_differences():
    rng = np.random.default_rng(3)
    boosters = [random_booster(rng, 6, 4, 32) for _ in range(3)]
    center, spread = np.array([5.0, -1.0, 0.1]), np.array([50.0, 0.2, 0.05])
    table = compile_trees(boosters, center, spread)
    assert table is not None
    x = probes(rng, table)
    trees = np.stack([booster.inplace_predict(x) for booster in boosters], axis=1)
    np.testing.assert_allclose(table.predict(x), center + spread * trees, rtol=3e-6, atol=3e-6)


def test_survives_bytes_and_does_not_copy():
    rng = np.random.default_rng(1)
    table = compile_trees([random_booster(rng, 5, 3, 16)], ZERO, ONE)
    assert table is not None
    content = pack([*table.edges, table.values])
    again = LookupTable.from_buffer(content)
    assert not again.values.flags.owndata
    x = probes(rng, table)
    assert np.array_equal(again.predict(x), table.predict(x))
    assert pack([*again.edges, again.values]) == content
    wide = LookupTable(table.edges, np.pad(table.values, ((0, 1),) * 3 + ((0, 0),)))
    for damaged in (b"", content[:40], content[:-1], b"x" * 600, pack([*wide.edges, wide.values])):
        with pytest.raises(ModelError, match="damaged"):
            LookupTable.from_buffer(damaged)


def test_too_fine_a_grid_gets_no_table(monkeypatch):
    booster = random_booster(np.random.default_rng(2), 5, 3, 16)
    monkeypatch.setattr(boosted, "MAX_CELLS", 8)
    assert compile_trees([booster], ZERO, ONE) is None


def test_thresholds_closer_than_float32_divides_by():
    edges = np.array([0.0, 1e-41, 3e-41], np.float32)
    values = np.array([-1.0, 0.0, 5e-42, 1e-41, 2e-41, 3e-41, 1.0], np.float32)
    assert boosted._Bins(edges).of(values).tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_unknown_inputs_of_a_model_with_a_table_give_unknown_labels(tmp_path):
    """A table has a cell for every number, the unknown ones too: the model must leave them out."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(1500, 3)).astype(np.float32)
    y = np.stack([x.sum(axis=1), x[:, 0] * x[:, 1], x[:, 2]], axis=1).astype(np.float32)
    batch = Batch(x, y, (np.arange(1500) % 5).astype(np.int8), np.ones(1500, np.float32))
    trained = corrections.fit("boosted", ArraySource(batch), params={"n_rounds": 20})
    trained.save(tmp_path / "model")
    loaded = corrections.load(tmp_path / "model")
    assert isinstance(loaded, BoostedCorrection) and loaded.table is not None
    monsters = [np.nan, np.inf, -np.inf]
    rows = np.concatenate([np.tile(x[7], (10, 1)), x[:500]])
    for row, (column, value) in enumerate(itertools.product(range(3), monsters)):
        rows[row, column] = value
    assert np.isfinite(loaded.table.predict(rows[9:])).all()
    found = loaded.predict(rows)
    assert np.isnan(found[:9]).all(), "in all labels, whichever input is unknown"
    np.testing.assert_array_equal(found[9], found[10 + 7])
    np.testing.assert_allclose(found, trained.predict(rows), rtol=3e-6, atol=3e-6)
    # Those beside it change nothing of a row.
    np.testing.assert_array_equal(loaded.predict(rows[9:]), found[9:])
    everything = np.full((4, 3), np.nan, np.float32)
    assert np.isnan(loaded.predict(everything)).all()


def test_a_finite_row_is_in_the_table_wherever_it_is(tmp_path):
    table = compile_trees([random_booster(np.random.default_rng(6), 5, 3, 16)], ZERO, ONE)
    assert table is not None
    largest = np.finfo(np.float32).max
    corner = np.array([[largest] * 3, [-largest] * 3, [largest, -largest, 0]], np.float32)
    ends = [np.concatenate([[part[0] - 1], part, [part[-1] + 1]]) for part in table.edges]
    near = np.array([[end[-1] for end in ends], [end[0] for end in ends],
                     [ends[0][-1], ends[1][0], 0]], np.float32)  # fmt: skip
    np.testing.assert_array_equal(table.predict(corner), table.predict(near))

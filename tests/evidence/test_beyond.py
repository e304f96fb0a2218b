import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sos_dask.evidence import beyond
from sos_dask.evidence.beyond import EDGE, GUESSES, NOTHING, ZERO_POINT, Left, choose
from sos_dask.problem import DEFAULT

N = 400
EVERY = tuple(range(len(GUESSES)))


def left(sizes, n=N, kind=0, distance=0.3, wrong=0):
    """Pairs of which each guess leaves normal residuals of a size, in all of three labels."""
    rng = np.random.default_rng(0)
    residual = rng.normal(0, 1, (n, len(GUESSES), 3)) * np.array(sizes)[None, :, None]
    right = np.arange(n) >= wrong
    return Left(np.full(n, kind), np.full(n, distance), residual, right)


@pytest.mark.parametrize("best", EVERY)
def test_the_guess_that_leaves_least_is_chosen_where_it_was_measured(best):
    sizes = [1.0, 1.0, 1.0]
    sizes[best] = 0.2
    found = choose(left(sizes, kind=5), 12, EVERY)
    assert (found.guess[5, 1] == best).all() and not np.delete(found.guess, 5, axis=0).any()
    assert found.width[5, 1] == pytest.approx(sizes[best], rel=0.1)
    assert np.isnan(found.width[5, 0]).sum() == 0  # where no pairs are, the width is the common one


def test_a_little_nearer_or_few_pairs_or_farther_somewhere_is_not_enough():
    assert not choose(left([1.0, 1.0, 0.9]), 12, EVERY).guess.any()
    assert not choose(left([1.0, 1.0, 0.1], n=30), 12, EVERY).guess.any()
    near, far = left([1.0, 1.0, 0.1]), left([1.0, 1.0, 1.5], n=80, distance=0.7)
    both = Left(*(np.concatenate(one) for one in zip(near, far, strict=True)))
    assert not choose(both, 12, EVERY).guess.any()
    assert (choose(near, 12, EVERY).guess[0, 1] == EDGE).all()


def test_what_is_better_everywhere_stands_in_where_nothing_tells():
    everywhere = (NOTHING, ZERO_POINT)
    found = choose(left([5.0, 1.0, 9.0], kind=3), 12, EVERY, everywhere)
    assert (found.guess == ZERO_POINT).all()
    kind, distance = np.array([0, 3, 3]), np.array([0.0, 0.3, 99.0])
    assert (found.at(kind, distance).guess == ZERO_POINT).all()
    # In one kind nothing is better; in another the correction itself.
    parts = left([5.0, 1.0, 9.0]), left([0.1, 1.0, 9.0], n=100, kind=1)
    more = left([5.0, 1.0, 0.1], n=100, kind=2)
    all_kinds = Left(*(np.concatenate(one) for one in zip(*parts, more, strict=True)))
    guess = choose(all_kinds, 12, EVERY, everywhere).guess[:, 1, 0]
    assert guess[:4].tolist() == [ZERO_POINT, NOTHING, EDGE, NOTHING]


def test_wrong_pairs_count_in_widths_alone():
    """Of 100 wrong pairs the correction makes right ones; of the others it makes wrong ones."""
    wrong, right = left([9.0, 9.0, 0.1], n=300, wrong=300), left([0.5, 1.0, 5.0], n=200)
    both = Left(*(np.concatenate(one) for one in zip(wrong, right, strict=True)))
    found = choose(both, 12, EVERY)
    assert not found.guess.any()
    share = (np.abs(both.residual[:, NOTHING]) <= found.width[0, 1]).mean()
    assert share == pytest.approx(0.683, abs=0.01)


def test_unknown_guesses_are_not_chosen_and_no_pairs_choose_nothing():
    pairs = left([1.0, 1.0, 0.1])
    pairs.residual[:, EDGE] = np.nan
    assert not choose(pairs, 12, EVERY).guess.any()
    none = choose(left([1.0] * 3, n=0), 12, EVERY, EVERY)
    assert not none.guess.any() and np.isnan(none.width).all()


def test_pairs_wrong_in_all_labels_at_once_are_told():
    rng = np.random.default_rng(1)
    difference = rng.normal(5, 1, (2000, 3))
    difference[:60] += 30
    difference[60:200, 0] += 30  # a hook of one label is no wrong measurement
    right = beyond.right(difference)
    assert not right[:60].any() and right[60:].all()


@given(st.integers(0, 2**32 - 1))
def test_ends_are_left_out_on_one_side_of_giants_and_of_dwarfs(seed):
    rng = np.random.default_rng(seed)
    x, giant = rng.normal(0, 1, (300, 3)), rng.random(300) < 0.3
    upper, lower = beyond.ends(x, giant)
    for rows in (np.flatnonzero(giant), np.flatnonzero(~giant)):
        for axis in range(3):
            order = rows[np.argsort(x[rows, axis])]
            n = int(0.15 * (len(rows) - 1))
            assert upper[order[-n:]].all() if n else True
            assert lower[order[:n]].all()
    assert 0 < upper.mean() < 0.6 and 0 < lower.mean() < 0.6


def test_kinds_are_the_way_from_the_nearest_star():
    away = np.array([[3.0, -1, 0], [0.1, -1, 0.2], [0, 0, 2]])
    found = beyond.kinds(away, np.array([False, False, True]))
    assert found.tolist() == [1, 2, 11]
    guess = np.zeros((12, 6, 3), np.uint8)
    guess[1, 0, 2] = guess[11, 3, 0] = EDGE
    rows = beyond.table(beyond.Standing(guess, np.full(guess.shape, 7, np.float32)), DEFAULT)
    keys = ("stars", "input", "side", "nearer_than", "label", "guess", "error")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("others", "teff_5040", "above", 0.25, "feh", "edge", 7.0),
        ("giants", "feh", "above", 2.0, "teff", "edge", 7.0),
    ]

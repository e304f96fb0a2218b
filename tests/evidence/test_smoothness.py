from typing import Any

import numpy as np
import pytest

from sos_dask.evidence.smoothness import (
    BEYOND,
    MIN_CELLS,
    STEPS,
    UNCOVERED,
    Cells,
    artifacts,
)

EDGES = tuple(np.linspace(0.0, 8.0, 9) for _ in range(3))
BOX = (np.full(3, 0.5), np.full(3, 7.5))


def grid(seed: int = 0) -> Cells:
    """Pairs in the middle of the box, five cells wide."""
    labels = np.random.default_rng(seed).uniform(1.0, 6.0, size=(20_000, 3))
    return Cells.of(labels, EDGES, 10)


def measured(function, on: Cells | None = None) -> dict[str, Any]:
    def predict(x: np.ndarray) -> np.ndarray:
        return function(np.clip(x, *BOX))[:, None]

    (found,) = artifacts(predict, on or grid(), BOX, 1, 200, 0)
    return found


def test_a_grid_counts_the_pairs_of_its_cells():
    one = Cells.of(np.array([[0.5, 0.5, 0.5]] * 3 + [[8.0, 8.0, 8.0]] + [[9, 1, 1]]), EDGES, 2)
    assert one.counts.sum() == 4 and one.counts[0, 0, 0] == 3 and one.counts[7, 7, 7] == 1
    assert one.places.tolist() == [[0, 0, 0]]
    assert [part.tolist() for part in one.sides(one.places)] == [[[0.5] * 3], [[1.0] * 3]]
    assert one.typical_count == 3


def test_a_line_is_smooth_and_a_step_is_not():
    line = measured(lambda x: 0.3 * x[:, 0] - 0.1 * x[:, 2])
    step = measured(lambda x: np.where(x[:, 0] < 3.3, 0.0, 1.0))
    assert line["second_difference"][0] == pytest.approx(0, abs=1e-12)
    assert line["jump"] == pytest.approx(0.3 / STEPS)
    # One cell of five along one axis of three holds the step: two second differences of eight.
    assert step["second_difference"][0] == pytest.approx(np.sqrt(2 / 8 / 5 / 3))
    assert step["jump"] == 1.0
    assert step["jump_low"] <= step["jump_high"] == 1.0
    value, low, high = step["second_difference"]
    assert low < value < high
    assert len(grid().places) == 125


def test_a_staircase_is_rougher_than_the_curve_it_follows():
    curve = measured(lambda x: np.sin(x[:, 1] / 2))
    stairs = measured(lambda x: np.sin(np.floor(x[:, 1] * 3) / 6))
    stairs, curve = (one["second_difference"] for one in (stairs, curve))
    assert stairs[0] > 20 * curve[0] > 0
    assert stairs[1] > curve[2], "their intervals are apart"


def test_the_second_difference_of_a_parabola_is_its_curvature():
    found = measured(lambda x: x[:, 0] ** 2)
    h = 1.0 / STEPS
    assert found["second_difference"][0] == pytest.approx(2 * h**2 / np.sqrt(3))


def test_behaviour_outside_the_overlap():
    found = measured(lambda x: np.where(x[:, 0] > 6.2, 5.0, 0.0) + 0 * x[:, 1])
    outside = {one["where"]: one for one in found["outside"]}
    assert found["jump"] == 0, "inside it is flat"
    assert outside[UNCOVERED]["exceeds"] == outside[UNCOVERED]["step"] == 5.0
    assert outside[BEYOND]["exceeds"] == outside[BEYOND]["step"] == 5.0
    # Cells in the box: 7.5 is the centre of the last; 125 of 8^3 are covered.
    assert outside[UNCOVERED]["n_cells"] == 512 - 125
    assert outside[UNCOVERED]["share"] == pytest.approx(2 * 64 / (512 - 125))
    # Six faces of 25 cells; the values of one of them are high.
    assert outside[BEYOND]["n_cells"] == 150
    assert outside[BEYOND]["share"] == pytest.approx(25 / 150)


def test_a_flat_correction_does_nothing_outside():
    found = measured(lambda x: np.full(len(x), 2.0))
    for one in found["outside"]:
        names = ("inside_low", "inside_high", "exceeds", "share", "step")
        assert [one[name] for name in names] == [2, 2, 0, 0, 0]


def test_too_few_cells_say_nothing():
    few = Cells.of(np.full((100, 3), 2.5), EDGES, 5)
    assert len(few.places) < MIN_CELLS
    found = measured(lambda x: x[:, 0], few)
    assert found["second_difference"] == [None] * 3 and found["jump"] is None
    assert found["outside"] == []
    assert Cells.of(np.zeros((0, 3)), EDGES, 5).typical_count is None

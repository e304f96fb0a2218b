"""Figures and tables of how surveys agree."""

from typing import Any

import numpy as np
import pytest

from sos_dask.report import maps
from sos_dask.report.style import render
from sos_dask.report.unified import agreeing, errors_figure, pairs_figure, validation_figure
from tests.report.made import UNITS, drawn

SURVEYS = ("a", "b", "c")


def hat(survey: str, other: str, error: float | None) -> dict[str, Any]:
    return {"label": "feh", "survey": survey, "other": other, "n": 90, "hat": error, "low": -0.01,
            "high": 0.09, "negative": error is None}  # fmt: skip


ERRORS: list[dict[str, Any]] = [
    {"label": "feh", "survey": "a", "other": "b", "n": 80, "offset": 0.02, "scatter": 0.1,
     "width": 1.5, "correlation": 0.0},
    {"label": "feh", "survey": "a", "other": "c", "n": 60, "offset": -0.01, "scatter": 0.2},
    *({"label": "feh", "survey": one, "floor": 0.03} for one in SURVEYS),
    hat("a", "b c", 0.05), hat("b", "a c", None), hat("c", "a b", 0.06),
]  # fmt: skip


def row(group: str, survey: str, n: int, before: Any, after: Any, **more: Any) -> dict[str, Any]:
    found = {"label": "feh", "group": group, "survey": survey, "is_truth": False, "n": 2 * n}
    sides = {"median_before": before, "median_after": after, "n_after": n}
    return {**found, **sides, "scatter_before": 0.2, "scatter_after": 0.1, **more}


LIST = [
    row("one", "all", 40, 0.0, 0.0), row("one", "a", 20, 0.3, 0.1), row("one", "b", 20, -0.1, 0.1),
    row("one", "c", 4, 9.0, 9.0), row("two", "all", 4, 0.0, 0.0), row("all", "all", 44, None, None),
    row("all", "all", 44, 0.5, 0.2, label="teff", is_truth=True),
    row("all", "all", 44, 0.5, 0.2, label="logg"),
]  # fmt: skip


def lines_of(found) -> dict[str, list[tuple[float, float]]]:
    """Places of the marks by panel and series."""
    marks: dict[str, list[tuple[float, float]]] = {}
    for axes in found.figure.axes:
        for container in axes.containers:
            line = container.lines[0]
            key = f"{axes.get_xlabel()} {container.get_label()}"
            marks.setdefault(key, []).extend(zip(*line.get_data(), strict=True))
    return marks


def test_pairs_are_drawn_with_their_scatter():
    found = drawn(pairs_figure(ERRORS, {"feh": "dex"}))
    marks = lines_of(found)
    assert marks["offset ± scatter [dex] stars that both surveys have"] == [(0.02, 0), (-0.01, 1)]
    assert marks["scatter / stated errors stars that both surveys have"] == [(1.5, 0)]
    assert [x.get_text() for x in found.figure.axes[0].get_yticklabels()] == ["a − b", "a − c"]
    assert pairs_figure([], UNITS) is None


def test_errors_are_drawn_beside_hats_and_negative_ones_counted():
    cells = np.bincount(maps.error_cells(np.full(50, 0.04)), minlength=maps.N_ERRORS)
    found = drawn(errors_figure(ERRORS, {"feh:a": cells}, {"feh": "dex"}, SURVEYS))
    assert found.facts == {"negative": 1, "hats": 3}
    marks = {key: [x for x, _ in of] for key, of in lines_of(found).items()}
    assert marks["error [dex] stated (median, 16–84 %)"] == pytest.approx([0.04], rel=0.03)
    assert marks["error [dex] with the floor, as used"] == pytest.approx([0.05], rel=0.03)
    hats = [
        x for key, of in marks.items() if "stated" not in key and "floor" not in key for x in of
    ]
    assert sorted(hats) == [0.05, 0.06]
    assert errors_figure([], {}, UNITS, SURVEYS) is None


def test_groups_are_drawn_before_and_after():
    shown = {(one["label"], one["group"]): one for one in agreeing(LIST)}
    assert shown["feh", "one"]["offset_before"] == pytest.approx(0.2)
    assert shown["feh", "one"]["offset_after"] == 0, "medians of the surveys with five stars"
    assert shown["teff", "all"]["offset_after"] == 0.2, "of the truth"
    assert ("logg", "all") not in shown, "neither a truth nor groups"
    found = drawn(validation_figure("list", LIST, UNITS))
    assert found.facts["groups"] == 2, "that of four stars is left out"
    texts = [x.get_text() for x in found.figure.axes[0].get_yticklabels()]
    assert texts == ["all (44)", "one (40)"]
    assert validation_figure("list", [LIST[4]], UNITS) is None


def test_velocities_and_errors_are_counted_in_cells():
    n_obs, scatter = np.array([1, 2, 3, 99]), np.array([5.0, 1.0, np.nan, 1e9])
    cells = maps.velocity_cells(n_obs, scatter)
    assert cells[0] == cells[2] == -1 and cells[3] == maps.N_VELOCITY - 1
    stars = np.bincount(cells[cells >= 0], minlength=maps.N_VELOCITY)
    found = drawn(maps.velocity_figure(stars, np.zeros_like(stars)))
    assert found.facts["stars"] == 2 and found.facts["variable"] == 0
    assert maps.velocity_figure(np.zeros_like(stars), stars) is None
    values = np.geomspace(0.01, 100, 999)
    cells = maps.error_cells(np.append(values, [np.nan, -1, 0]))
    assert (cells[-3:] == -1).all()
    counts = np.bincount(cells[cells >= 0], minlength=maps.N_ERRORS)
    expected = np.quantile(values, (0.5, 0.16, 0.84))
    np.testing.assert_allclose(maps.typical_errors(counts), expected, rtol=0.05)


def test_the_same_figure_gives_the_same_bytes():
    once, again = (render(lambda: validation_figure("list", LIST, UNITS)) for _ in range(2))
    assert once is not None and again is not None
    assert (once.png, once.pdf) == (again.png, again.pdf)

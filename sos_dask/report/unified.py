"""Figures and tables of the unified catalog: how surveys agree, and stars that must agree.

``errors``: rows of ``errors.parquet`` of the unified catalog. ``labels``: units by label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sos_dask.columns import IntArray
from sos_dask.report.figures import Series, dots
from sos_dask.report.maps import typical_errors
from sos_dask.report.page import (
    Build,
    Columns,
    Row,
    Table,
    by_label,
    gains,
    label_text,
    tabulate,
    value_text,
)
from sos_dask.report.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    Drawn,
    Labels,
    percent,
)
from sos_dask.stats.numbers import ALL
from sos_dask.storage.artifact import partition_errors
from sos_dask.storage.objects import local

_FEW = 5  # stars of a group that is not drawn
_MOST_GROUPS = 30
_OWN = ("teff", "logg")  # what stars of a cluster do not share


def _pairs(errors: Iterable[Row]) -> list[Row]:
    return [one for one in errors if one.get("offset") is not None]


def _two(one: Row) -> str:
    return f"{one['survey']} − {one['other']}"


def pairs_figure(errors: Sequence[Row], labels: Labels) -> Drawn | None:
    """Draw offset, scatter and pull width of every two surveys on common stars."""
    points: dict[Any, Any] = {}
    places = {_two(one): _two(one) for one in _pairs(errors)}
    for one in _pairs(errors):
        at, spread = one["offset"], one["scatter"]
        points["offset", one["label"], _two(one), ""] = at, at - spread, at + spread
        if one.get("width"):
            points["width", one["label"], _two(one), ""] = one["width"], None, None
    if not points:
        return None
    rows = {"offset": "offset ± scatter [{unit}]", "width": "scatter / stated errors"}
    series = [Series("", "stars that both surveys have", BLUE, "o", 0)]
    figure, grid = dots(labels, places, rows, series, points, logarithmic=False)
    for axes in grid[1]:
        axes.axvline(1, color=BLACK, linewidth=0.6)
    return Drawn("Do the surveys agree", figure, {"pairs": len(places)})


def errors_figure(
    errors: Sequence[Row], counts: Mapping[str, IntArray], labels: Labels, surveys: Sequence[str]
) -> Drawn | None:
    """Draw the stated errors of the surveys beside what their differences tell of them.

    ``counts``: errors in cells, by ``label:survey``.
    """
    points: dict[Any, Any] = {}
    floor = {(x["label"], x["survey"]): x["floor"] for x in errors if x.get("floor") is not None}
    for key, of_cells in counts.items():
        label, _, survey = key.partition(":")
        if survey in surveys and of_cells.any():
            stated = typical_errors(of_cells)
            with_floor = float(np.hypot(stated[0], floor.get((label, survey), 0.0)))
            points["", label, survey, "stated"] = stated
            points["", label, survey, "used"] = with_floor, None, None
    hats = [one for one in errors if one.get("n") and one.get("offset") is None]
    of_three = list(dict.fromkeys(one["other"] for one in hats))
    for one in hats:
        if one["hat"] is not None:
            key = f"hat {of_three.index(one['other'])}"
            points["", one["label"], one["survey"], key] = one["hat"], one["low"], one["high"]
    if not points:
        return None
    series = [
        Series("stated", "stated (median, 16–84 %)", GREY, "o", 0),
        Series("used", "with the floor, as used", ORANGE, "s", 1),
        *(Series(f"hat {at}", "" if at else "from differences of three surveys", BLUE, "D", 2)
          for at in range(len(of_three))),
    ]  # fmt: skip
    places = {one: one for one in surveys}
    figure, _ = dots(labels, places, {"": "error [{unit}]"}, series, points)
    facts = {"negative": sum(one["hat"] is None for one in hats), "hats": len(hats)}
    return Drawn("Are the stated errors right", figure, facts)


def agreeing(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """List groups of stars that must agree, over all surveys, before and after.

    ``rows``: of ``validation.parquet``. ``offset_before`` and ``offset_after``: of the median from
    the truth; without a truth, how far medians of surveys lie apart.
    """
    found = []
    has_groups = {one["label"] for one in rows if one["group"] != ALL}
    for one in rows:
        if one["survey"] != ALL or not (one["is_truth"] or one["label"] in has_groups):
            continue
        item = dict(one)
        mine = [x for x in rows if (x["label"], x["group"]) == (one["label"], one["group"])
                and x["survey"] != ALL and min(x["n"], x["n_after"]) >= _FEW]  # fmt: skip
        for when in ("before", "after"):
            medians = [x[f"median_{when}"] for x in mine if x[f"median_{when}"] is not None]
            apart = np.std(medians).item() if len(medians) > 1 and one["group"] != ALL else None
            item[f"offset_{when}"] = one[f"median_{when}"] if one["is_truth"] else apart
        found.append(item)
    return found


def validation_figure(name: str, rows: Sequence[Row], labels: Labels) -> Drawn | None:
    """Draw scatter and offset of every group of a list, before and after."""
    items = [one for one in agreeing(rows) if min(one["n"], one["n_after"]) >= _FEW]
    n: dict[str, int] = {}
    for one in items:
        n[one["group"]] = max(n.get(one["group"], 0), one["n_after"])
    largest = sorted(n, key=lambda group: (group != ALL, -n[group]))[:_MOST_GROUPS]
    points: dict[Any, Any] = {}
    for one in items:
        for row in ("scatter", "offset"):
            before, after = one[f"{row}_before"], one[f"{row}_after"]
            if before is not None and after is not None:
                key = row, one["label"], one["group"]
                points[*key, "before"] = before, *sorted((before, after))
                points[*key, "after"] = after, None, None
    if not points:
        return None
    rows_of = {"scatter": "scatter [{unit}]", "offset": "offset [{unit}]"}
    looks = {"before": (GREY, "o", 0, False), "after": (BLUE, "D", 0, True)}
    series = [Series(when, when, *look) for when, look in looks.items()]
    shown = {label: unit for label, unit in labels.items() if label in {x["label"] for x in items}}
    places = {group: f"{group} ({n[group]:,})" for group in largest}
    figure, _ = dots(shown, places, rows_of, series, points, logarithmic=False)
    facts = {"name": name, "groups": len(places), "left_out": len(n) - len(places), "few": _FEW}
    return Drawn(f"Stars that must agree: {name}", figure, facts)


def validations(directories: Mapping[str, Path]) -> dict[str, list[Row]]:
    """Read the rows of every list of stars, without nan, by its name; of products by name."""
    found: dict[str, list[Row]] = {}
    for product, directory in directories.items():
        if product.endswith(".validation"):
            path = directory / "validation.parquet"
            with partition_errors(path):
                rows = pq.read_table(local(path)).to_pylist()
            found[product.removesuffix(".validation")] = [
                {x: None if isinstance(v, float) and np.isnan(v) else v for x, v in one.items()}
                for one in rows
            ]
    return found


def tables(
    build: Build, found: dict[str, Any], stars: Mapping[str, IntArray], bits: Mapping[int, str]
) -> dict[str, Any]:
    """Add the tables of the unified catalog to those of every page.

    ``stars``: by number of surveys, in ``surveys``. ``bits``: meaning of bits of its flags.
    """
    labels, summary, n_stars = build.labels, build.summary("sos"), build.manifests["sos"].rows.n_out
    errors = by_label(summary["errors"], labels)

    def shares(names: Columns, items: Iterable[Row]) -> Table:
        share: Columns = {">stars": "n", ">share": lambda item: percent(item["n"], n_stars)}
        return tabulate(items, {**names, **share})

    def figure(key: str) -> Any:
        return lambda item: "–" if item.get(key) is None else f"{item[key]:.2f}"

    counts = [{"surveys": n, "n": int(x)} for n, x in enumerate(stars["surveys"]) if x]
    flags = [{"bit": x, "meaning": y, "n": summary["flags"][y]} for x, y in bits.items()]
    floors = [x for x in errors if x.get("floor") is not None]
    hats = [x for x in errors if x.get("n") and x.get("offset") is None]
    lists = {name: agreeing(rows) for name, rows in validations(build.directories).items()}
    whole = {
        name: [x for x in rows if x["group"] == ALL and (x["is_truth"] or x["label"] not in _OWN)]
        for name, rows in lists.items()
    }
    return found | {
        "surveys": shares({">surveys": "surveys"}, counts),
        "flags": shares({">bit": "bit", "meaning": "meaning"}, flags),
        "pairs": tabulate(_pairs(errors), {
            "label": label_text(labels), "difference": _two, ">stars": "n",
            ">offset": value_text(labels, "offset", True),
            ">scatter": value_text(labels, "scatter"),
            ">scatter / stated errors": figure("width"), ">correlation": figure("correlation"),
        }, lambda one: (one.get("width") or 1) > 2 or (one.get("width") or 1) < 0.5),
        "hats": tabulate(hats, {
            "label": label_text(labels), "survey": "survey", "beside": "other", ">stars": "n",
            ">error": value_text(labels, "hat"),
            ">from": value_text(labels, "low", True), ">to": value_text(labels, "high", True),
        }, lambda one: one["negative"]),
        "floors": tabulate(floors, {"label": label_text(labels), "survey": "survey",
                                    ">floor": value_text(labels, "floor")}),
        "gains": {name: gains([{**x, "method": name} for x in rows], labels, name)
                  for name, rows in whole.items()},
        "lists": {name: tabulate(by_label(rows, labels), {
            "label": label_text(labels), "group": "group",
            ">rows before": "n", ">stars after": "n_after",
            **{f">{what} {when}": value_text(labels, f"{what}_{when}", what == "offset")
               for what in ("scatter", "offset") for when in ("before", "after")},
        }, lambda one: one["group"] == ALL) for name, rows in lists.items()},
    }  # fmt: skip

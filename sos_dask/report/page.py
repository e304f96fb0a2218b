"""The page: a build opened for its report, its tables, and one HTML file that needs nothing else.

All texts of the page are in its template; here are numbers in rows.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sos_dask.evidence.coverage_maps import follow_up as most_outside
from sos_dask.evidence.failing import RULE
from sos_dask.evidence.figures import NONE, SUBSETS, TEST, TRAIN
from sos_dask.problem import Problem
from sos_dask.report.figures import group_words, select
from sos_dask.report.style import (
    DPI,
    WIDTH,
    Labels,
    listed,
    number,
    ordered,
    percent,
    readable,
    word,
)
from sos_dask.stats.numbers import ALL
from sos_dask.storage.artifact import partition_errors
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.objects import local
from sos_dask.storage.store import home
from sos_dask.surveys.definition import Cut

Row = Mapping[str, Any]
Columns = Mapping[str, str | Callable[[Any], str]]
OBSERVATIONS, CORRECTED, PAIRS = "observations", "corrected", "pairs"
_UNITS = {"log10(cm/s2)": "dex", "log10(cm.s**-2)": "dex"}
_TABLES = {
    "trends": ("trends", "trends.parquet"),
    "planes": ("trends", "planes.parquet"),
    "references": ("trends", "references.parquet"),
    "comparison": ("comparison", "comparison.parquet"),
    "artifacts": ("comparison", "artifacts.parquet"),
    "outside": ("comparison", "outside.parquet"),
    "hit_rates": ("uncertainty", "calibration.parquet"),
    "correlations": ("uncertainty", "correlations.parquet"),
    "growth": ("coverage", "calibration.parquet"),
    "coverage": ("coverage", "maps.parquet"),
    "projection": ("projection", "maps.parquet"),
    "left_out": ("generalisation", "generalisation.parquet"),
}
_STATISTICS = {
    "median": "median",
    "mad": "scatter (1.4826 MAD)",
    "width": "half of the 16–84 % width",
    "rms_binned": "rms of binned medians",
    "worst_bin": "worst bin",
}


class Build:
    """The products of a rebuild, opened: directories and manifests by product, in plan order.

    ``choice``: why the method was chosen, and the figures of all. ``method``: the one that corrects
    the catalog; empty without one. ``models``: their directories by method, the chosen one first.
    ``labels``: units of the labels of the problem. ``target``, ``references``: names of the survey
    that is corrected and of the others. ``reference``: what to call the reference. ``unified``: the
    products are those of the unified catalog, whose labels count.
    """

    def __init__(self, directories: Mapping[str, Path], manifests: Mapping[str, Manifest]) -> None:
        self.directories, self.manifests = directories, manifests
        self.choice = self.summary("comparison")
        self.method = str(self.choice.get("method", ""))
        models = {
            name.split(".")[-1]: path
            for name, path in directories.items()
            if "model" in name.split(".")[:-1]
        }
        self.models = dict(sorted(models.items(), key=lambda item: item[0] != self.method))
        self.problem = Problem(**self.summary("evidence").get("problem", {}))
        self.labels: Labels = {x.name: _UNITS.get(x.unit, x.unit) for x in self.problem.labels}
        self.unified = "sos" in directories and not self.method
        if self.unified:
            schema, given = self.counted["sos"].schema, manifests["sos"].recipe.params["settings"]
            units = {x: (schema.field(x).metadata or {}).get(b"unit", b"") for x in given["labels"]}
            self.labels = {x: _UNITS.get(y.decode(), y.decode()) for x, y in units.items()}
        self.surveys = [name.removesuffix(f".{OBSERVATIONS}") for name in self.of(OBSERVATIONS)]
        self.target = self.one(CORRECTED).split(".")[0] if self.one(CORRECTED) else "target"
        self.references = [name for name in self.surveys if name != self.target]
        self.reference = self.references[0] if len(self.references) == 1 else "reference"

    @classmethod
    def open(cls, directories: Mapping[str, Path]) -> Build:
        """Read the manifest of every product."""
        # A link of a build is followed, so that tasks find it after the next build, too.
        found = {name: path.resolve() for name, path in directories.items()}
        return cls(found, {n: Manifest.checked(home_of(n, path)) for n, path in found.items()})

    def of(self, kind: str) -> list[str]:
        """Names of the products of a kind: ``pairs``, ``lamost.pairs``."""
        return [name for name in self.directories if name.split(".")[-1] == kind]

    def one(self, kind: str) -> str:
        """Name of the product of a kind; empty without one."""
        return next(iter(self.of(kind)), "")

    def summary(self, kind: str) -> Row:
        """Summary of the product of a kind; empty without one."""
        name = self.one(kind)
        return self.manifests[name].summary if name else {}

    def table(self, name: str) -> pa.Table | None:
        """One of the tables that the report knows; None where there is none."""
        kind, file = _TABLES[name]
        path = self.directories.get(self.one(kind), Path()) / file
        if not self.one(kind) or not path.is_file():
            return None
        with partition_errors(path):
            return pq.read_table(local(path))

    @property
    def contrasts(self) -> list[tuple[str, str]]:
        """Pairs of references that trends compare."""
        table = self.table("references")
        columns = [table[name].to_pylist() for name in ("first", "second")] if table else [(), ()]
        return list(dict.fromkeys(zip(*columns, strict=True)))

    @cached_property
    def counted(self) -> dict[str, Catalog]:
        """Catalogs whose rows are counted in cells of the sky or a plane."""
        kinds = [OBSERVATIONS, PAIRS, CORRECTED, *["projection"] * (self.scores is not None)]
        kinds += ["sos"] * self.unified
        names = [name for kind in kinds for name in self.of(kind)]
        return {name: Catalog.open(self.directories[name]) for name in names}

    @cached_property
    def scores(self) -> Catalog | None:
        """Coverage of every row of the target; None without it."""
        name = self.one("coverage")
        return Catalog.open(self.directories[name]) if name else None


def home_of(name: str, path: Path) -> Path:
    """Directory of the manifest of a product."""
    return home("margin" if name.endswith(".collection") else "", path)


# --- tables -------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table, all text.

    ``>`` before a header: the column contains numbers. ``strong``: rows that stand out.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()


def tabulate(
    items: Iterable[Any], columns: Columns, strong: Callable[[Any], bool] = lambda item: False
) -> Table:
    """Lay out items, a row for each; columns by header: a key, or what gives the text."""
    items = list(items)
    rows = tuple(
        tuple(_brief(item.get(x)) if isinstance(x, str) else x(item) for x in columns.values())
        for item in items
    )
    return Table(tuple(columns), rows, frozenset(i for i, item in enumerate(items) if strong(item)))


def _brief(value: Any) -> str:
    """Write a value with four digits; a dash where there is none."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _plain(table: pa.Table | None) -> Table | None:
    """Lay out a table as it is."""
    if table is None:
        return None
    kinds = {x.name: pa.types.is_floating(x.type) or pa.types.is_integer(x.type)
             for x in table.schema}  # fmt: skip
    return tabulate(table.to_pylist(), {">" * kind + name: name for name, kind in kinds.items()})


def _account(build: Build) -> Table:
    """Rows in, out, and where the others went, for every product with rows."""

    def reasons(item: Row) -> str:
        dropped = [f"{n:,} {reason}" for reason, n in item["dropped"].items() if n]
        return ", ".join(dropped + [f"+{n:,} {why}" for why, n in item["added"].items() if n])

    items = [{"product": name, **vars(one.rows)} for name, one in build.manifests.items()]
    columns: Columns = {
        "product": "product", ">rows in": "n_in", ">rows out": "n_out", ">rejected": "rejected",
        "dropped, +added": reasons,
    }  # fmt: skip
    return tabulate([one for one in items if one["n_in"] or one["n_out"]], columns)


def cuts(manifest: Manifest) -> Table:
    """How many rows of a survey fail each quality cut."""
    n_rows, summary = manifest.rows.n_out, manifest.summary
    given = manifest.recipe.params.get("settings", {}).get("survey", {}).get("cuts", {})
    items = []
    for name, cut in sorted(given.items(), key=lambda item: item[1]["bit"]):
        failed = int(summary.get("fail_cut", {}).get(name, 0))
        items.append({"cut": name, "test": Cut(**{**cut, "name": name}).test_text(), "n": failed})
    n_failed = n_rows - int(summary.get("pass_all_cuts", 0))
    items.append({"cut": "all cuts", "test": "rows that fail any", "n": n_failed})
    columns: Columns = {
        "cut": "cut", "a row passes if": "test", ">rows that fail": "n",
        ">share": lambda item: percent(item["n"], n_rows),
    }  # fmt: skip
    return tabulate(items, columns, lambda item: item is items[-1])


def by_label(items: Iterable[Row], labels: Labels) -> list[Row]:
    """Sort items by the order of the labels."""
    items = list(items)
    return [item for label in labels for item in items if item["label"] == label]


def label_text(labels: Labels) -> Callable[[Row], str]:
    """Name of the label with its unit."""
    return lambda item: f"{word(item['label'])} [{labels[item['label']]}]"


def value_text(labels: Labels, key: str, sign: bool = False) -> Callable[[Row], str]:
    """Text of a value in the unit of the label."""
    return lambda item: number(item.get(key), labels[item["label"]], sign)


def comparison(table: pa.Table, labels: Labels, chosen: str, subset: str) -> Table:
    """Every method in one part of the parameter space, on test and training pairs."""
    mine = select(table, subset=subset).to_pylist()
    statistics = ordered([row["statistic"] for row in mine], _STATISTICS)
    methods = ordered([row["method"] for row in mine], (NONE,))
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in mine:
        if (row["method"], row["sample"]) != (NONE, TRAIN):
            key = (row["label"], row["method"], row["sample"])
            # A binned figure counts a pair once for each quantity: the first ones count pairs.
            item = found.setdefault(key, {**row, "cells": {}})
            item["cells"][row["statistic"]] = row
    items = sorted(found.values(), key=lambda r: (methods.index(r["method"]), r["sample"]))

    def cell(name: str) -> Callable[[Row], str]:
        return lambda item: _interval(item["cells"].get(name), labels[item["label"]])

    columns: Columns = {
        "label": label_text(labels), "method": "method", "sample": "sample", ">pairs": "n",
        **{f">{_STATISTICS.get(name, name)}": cell(name) for name in statistics},
    }  # fmt: skip
    return tabulate(by_label(items, labels), columns, lambda item: item["method"] == chosen)


def failing(entries: Iterable[Row], method: str) -> Table:
    """How many bins fail of those that are judged with one method, by weighting and band of S/N."""
    items = [entry for entry in entries if entry["method"] == method]
    columns: dict[str, Any] = {
        "label by": lambda item: f"{word(item['label'])} by {word(item['against'])}"
    }
    for kind in items[0]["counts"]:
        columns[f">{word(kind)}"] = lambda item, kind=kind: "/".join(map(str, item["counts"][kind]))
    return tabulate(items, columns, lambda item: item["label"] == ALL)


def _interval(cell: Row | None, unit: str) -> str:
    if cell is None:
        return "–"
    text = number(cell["value"], unit, cell["statistic"] == "median")
    if cell.get("error") is not None:
        text += f" ± {number(cell['error'], unit)}"
    elif cell.get("low") is not None and cell.get("high") is not None:
        text += f"\n[{number(cell['low'], unit)}, {number(cell['high'], unit)}]"
    if cell.get("against"):
        place = f"{word(cell['against'])} {cell['bin_low']:g} to {cell['bin_high']:g}"
        text += f"\nat {place}".replace("-", "−")
    return text


def _agreements(items: Iterable[Row], labels: Labels) -> Table | None:
    """Whether two references agree over the bins of each quantity."""
    columns: Columns = {
        "difference": lambda item: f"{item['second']} − {item['first']}",
        "label": label_text(labels),
        "in bins of": lambda item: word(item["against"]),
        "through": lambda item: "target" if item["by"] == "target" else "stars in both",
        ">bins": "n_bins",
        ">median": value_text(labels, "median", True),
        ">rms": value_text(labels, "rms"),
        ">excess": value_text(labels, "excess"),
        ">beyond 3σ": "n_significant",
        ">chance": lambda item: f"{item['p_value']:.1g}",
    }
    shown = [
        item
        for item in items
        if item["binning"] == "equal-width" and item["n_bins"] and "," not in item["against"]
    ]
    return tabulate(shown, columns, lambda item: item["p_value"] < 0.001) if items else None


def follow_up(maps: pa.Table, steps: Mapping[str, float], labels: Labels) -> Table:
    """The cells of label space (of width ``steps``) with most rows outside the coverage."""

    def region(name: str) -> Callable[[Row], str]:
        half = steps[name] / 2
        return lambda item: f"{item[name] - half:g} to {item[name] + half:g}".replace("-", "−")

    columns: Columns = {
        **{f"{word(name)} [{labels.get(name, '')}]": region(name) for name in steps},
        ">rows outside": "outside", ">all rows": "rows", ">G [mag]": "phot_g_mean_mag",
    }  # fmt: skip
    return tabulate(most_outside(maps), columns)


def left_out(table: pa.Table, labels: Labels, method: str) -> Table:
    """Median and scatter of one method in every group of pairs, left out and not."""
    raw = {(r["split"], r["group"], r["label"]): r
           for r in select(table, method=NONE).to_pylist()}  # fmt: skip
    items = [
        {**row, **{f"raw_{name}": raw.get((row["split"], row["group"], row["label"]), {}).get(name)
                   for name in ("median", "mad")}}
        for row in select(table, method=method).to_pylist()
    ]  # fmt: skip
    columns: dict[str, Any] = {
        "label": label_text(labels), "split": "split", "group left out": group_words,
        ">trained on": "n_train", ">pairs left out": "n",
    }  # fmt: skip
    for name, key, sign in (("median", "median", True), ("scatter", "mad", False)):
        columns[f">{name} uncorrected"] = value_text(labels, f"raw_{key}", sign)
        columns[f">{name} left out"] = value_text(labels, key, sign)
        columns[f">{name} not left out"] = value_text(labels, f"{key}_random", sign)
    return tabulate(by_label(items, labels), {**columns, ">pairs not left out": "n_random"})


def short_intervals(table: pa.Table) -> list[Row]:
    """Where intervals contain fewer held-out pairs than they state, beyond chance; worst first."""
    short = [row for row in table.to_pylist() if row["n"] and row["high"] < row["level"]]
    return sorted(short, key=lambda row: row["hit_rate"] - row["level"])


def gains(items: Iterable[Row], labels: Labels, chosen: str) -> list[Row]:
    """Scatter of each label before and after the chosen method, on held-out pairs, as text."""
    found: list[Row] = []
    for item in by_label(items, labels):
        if item["method"] == chosen:
            before, after = item["scatter_before"], item["scatter_after"]
            digits = 0 if labels[item["label"]] == "K" else 3
            share = f"{100 * (after / before - 1):+.0f} %".replace("-", "−") if before else ""
            text = {"before": f"{before:.{digits}f}", "after": f"{after:.{digits}f}"}
            found.append({"label": item["label"], "n": item["n"], "share": share, **text})
    return found


def _disagreeing(items: Iterable[Row], labels: Labels) -> list[Row]:
    """Pairs of references with significant differences in bins of the labels, and in how many."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for item in items:
        if (item["binning"], item["by"]) == ("equal-width", "target") and item["against"] in labels:
            pair = {name: item[name] for name in ("first", "second")}
            start = {**pair, "n_significant": 0, "n_bins": 0}
            total = found.setdefault((item["first"], item["second"]), start)
            for name in ("n_significant", "n_bins"):
                total[name] += item[name]
    return [item for item in found.values() if item["n_significant"]]


def of_every_page(build: Build, files: Row, software: Row) -> dict[str, Any]:
    """Make the tables of counts and provenance.

    ``files``: names of survey files by SHA-256. ``software``: versions.
    """
    observed = {name: build.manifests[f"{name}.{OBSERVATIONS}"] for name in build.surveys}
    hashes = [(survey, files.get(digest, ""), digest) for survey, manifest in observed.items()
              for digest in manifest.recipe.inputs.values()]  # fmt: skip
    products = [(name, one.recipe.stage, str(one.recipe.version), one.fingerprint)
                for name, one in build.manifests.items()]  # fmt: skip
    return {
        "account": _account(build),
        "cuts": {name: cuts(manifest) for name, manifest in observed.items()},
        "inputs": Table(("survey", "file", "SHA-256"), tuple(hashes)),
        "products": Table(("product", "stage", ">version", "fingerprint"), tuple(products)),
        "software": Table(("package", "version"), tuple(software.items())),
    }


def tables(build: Build, found: dict[str, Any], steps: Mapping[str, float]) -> dict[str, Any]:
    """Add all tables of the page of a target by the names that its template gives them.

    ``steps``: width of a region of label space.
    """
    labels, method = build.labels, build.method
    agreed = build.summary("trends").get("agreements", ())
    found |= {
        "gains": gains(build.choice.get("metrics", ()), labels, method),
        "disagreeing": _disagreeing(agreed, labels),
        "agreements": _agreements(agreed, labels),
        **{
            name: _plain(build.table(name))
            for name in ("artifacts", "outside", "hit_rates", "correlations")
        },
        **dict.fromkeys(("worst", "flags", "follow_up", "short")),
        "comparison": {},
        "failing": {},
        "left_out": {},
    }
    if (table := build.table("comparison")) is not None:
        subsets = ordered(table["subset"].to_pylist(), SUBSETS)
        found["comparison"] = {one: comparison(table, labels, method, one) for one in subsets}
        worst = select(table, sample=TEST, subset=ALL, statistic="worst_bin", method=method)
        known = [row for row in worst.to_pylist() if row["value"] is not None]
        found["worst"] = by_label(known, labels)
    if entries := build.choice.get("failing"):
        methods = ordered([one["method"] for one in entries], (method, NONE))
        found["failing"] = {one: failing(entries, one) for one in methods}
    if (table := build.table("hit_rates")) is not None:
        found["short"] = short_intervals(table)
    if flags := build.summary(CORRECTED).get("flags"):
        n_rows = build.manifests[build.one(CORRECTED)].rows.n_out
        found["flags"] = tabulate(
            sorted(flags.items(), key=lambda item: (-item[1], item[0])),
            {"meaning": lambda item: readable(item[0]), ">rows": lambda item: f"{item[1]:,}",
             ">share": lambda item: percent(item[1], n_rows)},
        )  # fmt: skip
    if (table := build.table("coverage")) is not None:
        found["follow_up"] = follow_up(table, steps, labels)
    if (table := build.table("left_out")) is not None:
        found["left_out"] = {name: left_out(table, labels, name) for name in build.models}
    return found


# --- the page -----------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A figure on the page; ``facts`` are for its caption."""

    title: str
    facts: Row
    png: bytes

    @property
    def data(self) -> str:
        """The picture as text."""
        return base64.b64encode(self.png).decode()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header of the PNG."""
        return int.from_bytes(self.png[16:20]), int.from_bytes(self.png[20:24])

    @property
    def share(self) -> float:
        """Share of the width of the page."""
        return round(self.size[0] / round(WIDTH * DPI), 3)


def html(
    build: Build, pictures: Mapping[str, Picture], tables: Row, *, job: str, job_text: str,
    version: str, formulas: Row | None = None,
) -> str:  # fmt: skip
    """Write the page of a build as HTML; all text is escaped.

    ``pictures``: by the names of the figures. ``tables``: of `tables`. ``job``, ``version``: name
    of the job, version of this program. ``formulas``: content of the symbolic model's file.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sos_dask"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    texts = {one.__name__: one for one in (listed, number, percent, readable, word)}
    environment.filters |= {"count": lambda n: f"{n:,}", **texts}
    name = "unified.html" if build.unified else "report.html"
    return environment.get_template(name).render(
        build=build, pictures=pictures, tables=tables, formulas=formulas, job=job,
        job_text=job_text, version=version, rule=RULE,
    )  # fmt: skip

"""Tables of the report: counts, methods, references, provenance. Text only, numbers aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.report.words import (
    NONE,
    STATISTICS,
    SUBSETS,
    UNITS,
    WORDS,
    number,
    ordered,
    readable,
    subset_words,
)
from sos_dask.schema import LABELS


@dataclass(frozen=True)
class Table:
    """A table with its caption.

    Parameters
    ----------
    caption : str
        What the figures mean, how to read them, of how many.
    headers : tuple of str
        ``>`` before a header: the column holds numbers.
    rows : tuple of tuple of str
    strong : frozenset of int
        Rows that stand out.
    """

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Product:
    """One product of the build, as its manifest states it.

    Parameters
    ----------
    name, stage : str
    version : int
    fingerprint : str
    n_in, n_out, rejected : int
    dropped, added : mapping of str to int
    summary : mapping
    """

    name: str
    stage: str
    version: int
    fingerprint: str
    n_in: int
    n_out: int
    rejected: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CutCount:
    """A quality cut and how many rows fail it."""

    name: str
    test: str
    n_failed: int


def account(products: Sequence[Product]) -> Table:
    """From the files to the product: rows in, out, and where the others went."""
    rows = []
    for product in products:
        if not product.n_in and not product.n_out:
            continue
        reasons = [f"{n:,} {reason}" for reason, n in product.dropped.items() if n]
        reasons += [f"+{n:,} {reason}" for reason, n in product.added.items() if n]
        counts = (product.n_in, product.n_out, product.rejected)
        rows.append((product.name, *(f"{n:,}" for n in counts), ", ".join(reasons)))
    return Table(
        "From files to product. At every stage rows in plus rows added are exactly rows out, "
        "rejected (without a usable position or key; kept in a table of their own) and dropped "
        "for the stated reason.",
        ("product", ">rows in", ">rows out", ">rejected", "dropped, +added"),
        tuple(rows),
    )


def cuts(survey: str, n_rows: int, n_passing: int, counts: Sequence[CutCount]) -> Table:
    """How many rows of a survey fail each quality cut."""
    rows = [
        (cut.name, cut.test, f"{cut.n_failed:,}", _percent(cut.n_failed, n_rows)) for cut in counts
    ]
    rows.append(("all cuts", "rows that fail any", f"{n_rows - n_passing:,}",
                 _percent(n_rows - n_passing, n_rows)))  # fmt: skip
    return Table(
        f"Quality cuts of {survey}, {n_rows:,} rows. A row that fails a cut stays in the catalog "
        "with a bit in its column quality, and is not used for training; a row can fail several.",
        ("cut", "a row passes if", ">rows that fail", ">share"),
        tuple(rows),
        frozenset({len(rows) - 1}),
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "–"


def metrics(items: Sequence[Mapping[str, Any]], chosen: str) -> Table:
    """Median and scatter of every method on held-out pairs, where no comparison was made."""
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for label in LABELS:
        for item in items:
            if item["label"] != label:
                continue
            if item["method"] == chosen:
                strong.add(len(rows))
            rows.append(
                (
                    f"{WORDS[label]} [{UNITS[label]}]",
                    item["method"],
                    f"{item['n']:,}",
                    *(number(item[f"median_{when}"], label, True) for when in ("before", "after")),
                    *(number(item[f"scatter_{when}"], label) for when in ("before", "after")),
                )
            )
    return Table(
        "Median and scatter (1.4826 MAD) of target minus reference on pairs that the model was "
        f"not trained on, before and after the correction. Bold: {chosen}, which corrects the "
        "catalog.",
        (
            "label", "method", ">pairs", ">median before", ">median after", ">scatter before",
            ">scatter after",
        ),
        tuple(rows),
        frozenset(strong),
    )  # fmt: skip


def comparison(table: pa.Table, chosen: str, subset: str) -> Table:
    """Every method in one part of the parameter space, on test and training pairs."""
    mine = table.filter(pc.equal(table["subset"], subset)).to_pylist()
    statistics = ordered([row["statistic"] for row in mine], tuple(STATISTICS))
    methods = ordered([row["method"] for row in mine], (NONE,))
    found = {(r["method"], r["label"], r["sample"], r["statistic"]): r for r in mine}
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for label in LABELS:
        for method in methods:
            for sample in ("test",) if method == NONE else ("test", "train"):
                cells = [found.get((method, label, sample, one)) for one in statistics]
                if not any(cells):
                    continue
                # A binned figure counts a pair once a quantity: the first ones count pairs.
                n = next(cell["n"] for cell in cells if cell)
                if method == chosen:
                    strong.add(len(rows))
                texts = [_interval(cell, label) for cell in cells]
                rows.append((f"{WORDS[label]} [{UNITS[label]}]", method, sample, f"{n:,}", *texts))
    what = "all pairs" if subset == "all" else f"pairs with {subset_words(subset)}"
    if subset in ("dense", "sparse"):
        what = f"pairs in the {subset} part of the label space"
    return Table(
        f"Target minus reference, {what}: each figure with its 95 % bootstrap interval (worst "
        "bin: with the error of that bin’s median). “test”: pairs the model was not trained "
        "on; “train”: pairs it was; “none”: without correction. Of two methods one is better only "
        f"where their intervals say so. Bold: {chosen}.",
        (
            "label", "method", "sample", ">pairs",
            *(f">{STATISTICS.get(one, one)}" for one in statistics),
        ),
        tuple(rows),
        frozenset(strong),
    )  # fmt: skip


def _interval(cell: Mapping[str, Any] | None, label: str) -> str:
    if cell is None:
        return "–"
    text = number(cell["value"], label, cell["statistic"] == "median")
    if cell.get("error") is not None:
        text += f" ± {number(cell['error'], label)}"
    elif cell.get("low") is not None and cell.get("high") is not None:
        text += f"\n[{number(cell['low'], label)}, {number(cell['high'], label)}]"
    if cell.get("against"):
        place = WORDS.get(cell["against"], cell["against"])
        text += f"\nat {place} {cell['bin_low']:g} to {cell['bin_high']:g}".replace("-", "−")
    return text


def subsets(table: pa.Table) -> list[str]:
    """Parts of the parameter space that a comparison has."""
    return ordered(table["subset"].to_pylist(), SUBSETS)


def agreements(items: Sequence[Mapping[str, Any]]) -> Table:
    """Whether two references agree over the bins of each quantity."""
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for item in items:
        if item["binning"] != "equal-width" or not item["n_bins"] or "," in item["against"]:
            continue
        if item["p_value"] < 0.001:
            strong.add(len(rows))
        label = item["label"]
        through = "target" if item["by"] == "target" else "stars in both"
        rows.append(
            (
                f"{item['second']} − {item['first']}",
                f"{WORDS[label]} [{UNITS[label]}]",
                WORDS.get(item["against"], item["against"]),
                through,
                str(item["n_bins"]),
                number(item["median"], label, True),
                number(item["rms"], label),
                number(item["excess"], label),
                str(item["n_significant"]),
                f"{item['p_value']:.1g}",
            )
        )
    return Table(
        "Do the references agree? Difference of their binned medians, through the target and on "
        "stars that both observed: median and rms over the bins, the part of the rms that errors "
        "do not explain (excess), bins beyond 3σ, and the chance of so large a χ² were there no "
        "difference. Bold: below 0.001.",
        (
            "difference", "label", "in bins of", "through", ">bins", ">median", ">rms", ">excess",
            ">beyond 3σ", ">chance",
        ),
        tuple(rows),
        frozenset(strong),
    )  # fmt: skip


def flags(meanings: Mapping[str, int], n_rows: int) -> Table:
    """Flags of the corrected rows."""
    return Table(
        f"Flags of the {n_rows:,} corrected rows (bits of flag_sos); a row can have several.",
        ("meaning", ">rows", ">share"),
        tuple((readable(text), f"{n:,}", _percent(n, n_rows)) for text, n in meanings.items()),
    )


def plain(table: pa.Table, caption: str) -> Table:
    """A table as it is, numbers with four digits."""
    headers, columns = [], []
    for name in table.schema.names:
        kind = table.schema.field(name).type
        is_number = pa.types.is_floating(kind) or pa.types.is_integer(kind)
        headers.append((">" if is_number else "") + name)
        columns.append([_brief(value) for value in table[name].to_pylist()])
    return Table(caption, tuple(headers), tuple(zip(*columns, strict=True)))


def _brief(value: Any) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def inputs(files: Sequence[tuple[str, str, str]]) -> Table:
    """Input files: survey, name, hash."""
    return Table(
        "Input files by content: sha256sum of a file must give this.",
        ("survey", "file", "SHA-256"),
        tuple(files),
    )


def fingerprints(products: Sequence[Product]) -> Table:
    """Fingerprints of the products."""
    return Table(
        "Products. A fingerprint is the SHA-256 of the stage, its version, all its settings and "
        "the fingerprints of its inputs: the same fingerprint is the same product.",
        ("product", "stage", ">version", "fingerprint"),
        tuple((p.name, p.stage, str(p.version), p.fingerprint) for p in products),
    )


def software(versions: Mapping[str, str]) -> Table:
    """Versions of the programs."""
    return Table("Software that made this report.", ("package", "version"), tuple(versions.items()))

"""The gate: a build whose figures are damaged is kept, but not published.

A build is compared with the published one, and with limits of its own. What is counted is in the
manifests and the footers of partitions; corrected labels are compared on rows of some partitions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from pydantic import Field, field_validator

from sos_dask.columns import floats_or_nan
from sos_dask.correct import FLAG_MEANINGS, FLAG_NULL_INPUT
from sos_dask.schema import LABELS
from sos_dask.settings import Settings
from sos_dask.stats.numbers import ALL
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest

_COUNTED = ("ingest", "dedupe", "reference", "crossmatch", "attach", "apply", "unify", "members")
_SHIFT_ROWS, _SHIFT_PARTS = 500_000, 24
_FEWEST_BINS = 3  # so many more bins that fail are no chance
_LEVEL = 0.68


_SHIFTS = {"teff": 20.0, "logg": 0.04, "feh": 0.02, "rv": 0.1}


class GateSection(Settings):
    """Limits of a build; shares are numbers from 0 to 1, changes are since the published build."""

    enabled: bool = True
    rows: float = Field(0.01, ge=0, description="Largest share of rows that a product may lose.")
    rejected: float = Field(0.01, ge=0, description="Largest rise of the share of rejected rows.")
    nulls: float = Field(0.02, ge=0, description="Largest rise of the share of nulls of a label.")
    shift: dict[str, float] = Field(
        default_factory=_SHIFTS.copy,
        description="Largest shift of the median of corrected labels, of rows in both builds.",
    )
    failing: float = Field(0.1, ge=0, description="Largest rise of the share of failing bins.")
    outside: float = Field(0.15, ge=0, description="Largest rise of the share outside coverage.")
    lowest_hit_rate: float = Field(0.58, ge=0, le=1, description="Of 68 % intervals.")
    highest_hit_rate: float = Field(0.8, ge=0, le=1, description="Of 68 % intervals.")
    most_rejected: float = Field(0.2, ge=0, le=1, description="Largest share of rejected rows.")
    most_nulls: float = Field(0.9, ge=0, le=1, description="Largest share of nulls of a label.")

    @field_validator("shift")
    @classmethod
    def _others_stay(cls, given: dict[str, float]) -> dict[str, float]:
        return _SHIFTS | given


class Figures(NamedTuple):
    """What the gate looks at, by product, or by product and label."""

    rows: dict[str, int]
    rejected: dict[str, float]
    nulls: dict[str, float]
    outside: dict[str, float]
    failing: dict[str, tuple[int, int]]  # bins that fail, and that are judged
    hit_rates: dict[str, tuple[float, float, float]]  # with the ends of its interval


def figures_of(products: Mapping[str, Path], lenient: bool = False) -> Figures:
    """Count the figures of a build, whose products are given with their directories.

    ``lenient``: another version of a stage may have told other things.
    """
    found = Figures({}, {}, {}, {}, {}, {})
    for product, directory in products.items():
        try:
            _count(found, product, directory)
        except KeyError:
            if not lenient:
                raise
    return found


def _count(found: Figures, product: str, directory: Path) -> None:
    made = Manifest.load(directory)
    stage, rows, told = made.recipe.stage, made.rows, made.summary
    if stage in _COUNTED:
        found.rows[product] = rows.n_out
    if stage == "ingest":
        found.rejected[product] = rows.rejected / max(rows.n_in, 1)
        for label, n in Catalog.read_only(directory).null_counts(LABELS).items():
            found.nulls[f"{product}.{label}"] = n / max(rows.n_out, 1)
    elif stage == "apply":
        no_label = told["flags"][FLAG_MEANINGS[FLAG_NULL_INPUT]]
        found.nulls[f"{product}.corrected label"] = no_label / max(rows.n_out, 1)
    elif stage == "coverage":
        found.outside[product] = told["shares"]["outside"]
    elif stage == "compare":
        for entry in told["failing"]:
            if entry["method"] == told["method"] and entry["label"] == ALL:
                fails, judged = entry["counts"]["pairs all"]
                found.failing[product] = (fails, judged)
    elif stage == "uncertainty":
        for row in told["hit_rates"]:
            if row["subset"] == ALL and row["level"] == _LEVEL and "hit_rate" in row:
                rate = row["hit_rate"], row["low"], row["high"]
                found.hit_rates[f"{product}.{row['label']}"] = rate


def reasons(
    limits: GateSection, now: Mapping[str, Path], before: Mapping[str, Path]
) -> Iterator[str]:
    """Tell why a build is not to be published, in words; nothing where it is.

    ``now`` and ``before`` are directories of the products of the new build and of the published
    one, which may be none.
    """
    if not limits.enabled:
        return
    new, old = figures_of(now), figures_of(before, lenient=True)
    for product, n in old.rows.items():
        left = new.rows.get(product, n)  # a product that the job no longer asks for
        if n - left > limits.rows * n:
            lost = f"{_percent(1 - left / n)} less than the {n:,} of the published build"
            yield f"{product}: {left:,} rows, {lost} (limit {_percent(limits.rows)})"
    for what, mine, theirs, rise, most in (
        ("rejected rows", new.rejected, old.rejected, limits.rejected, limits.most_rejected),
        ("nulls", new.nulls, old.nulls, limits.nulls, limits.most_nulls),
        ("rows outside the coverage", new.outside, old.outside, limits.outside, 1.0),
    ):
        for name, share in mine.items():
            was = theirs.get(name, share)
            if share - was > rise:
                yield (
                    f"{name}: {_percent(share)} {what}, {_percent(was)} in the published build "
                    f"(largest rise {_percent(rise)})"
                )
            elif share > most:
                yield f"{name}: {_percent(share)} {what} (limit {_percent(most)})"
    for name, (fails, judged) in new.failing.items():
        was, of = old.failing.get(name, (fails, judged))
        rise = fails / max(judged, 1) - was / max(of, 1)
        if rise > limits.failing and fails - was >= _FEWEST_BINS:
            yield (
                f"{name}: {fails} of {judged} bins of held-out pairs fail, {was} of {of} in the "
                f"published build (largest rise {_percent(limits.failing)})"
            )
    low, high = limits.lowest_hit_rate, limits.highest_hit_rate
    for name, (rate, least, most) in new.hit_rates.items():
        # All of them: a label without noise, as a constant.
        if most < low or (high < least and rate < 1):
            yield (
                f"{name}: 68 % intervals contain {_percent(rate)} of the held-out pairs "
                f"(limits {_percent(low)} and {_percent(high)})"
            )
    for shift in label_shifts(before, now):
        label, limit = shift["label"], limits.shift.get(shift["label"])
        if limit is not None and abs(shift["median"]) > limit:
            yield (
                f"{shift['product']}: the median of {label} has moved by {shift['median']:+.4g} "
                f"on {shift['n']:,} rows of both builds (limit {limit:g})"
            )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def label_shifts(before: Mapping[str, Path], after: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """Measure how corrected labels have moved between two builds, on rows that are in both.

    Yields ``product``, ``label``, ``n`` and the ``median``, ``p16`` and ``p84`` of after - before,
    on up to some 500,000 rows of two dozen partitions from all of the sky.
    """
    for product in before:
        if product in after and Manifest.load(after[product]).recipe.stage == "apply":
            old, new = (Catalog.read_only(one[product]) for one in (before, after))
            labels = [name for name in new.schema.names if name.endswith("_sos")]
            yield from _shifts(product, old, new, old.columns(labels))


def _shifts(
    product: str, old: Catalog, new: Catalog, columns: list[str]
) -> Iterator[dict[str, Any]]:
    n_parts = len(old.pixels)
    wanted = min(n_parts, max(_SHIFT_PARTS, n_parts * _SHIFT_ROWS // max(old.n_rows, 1)))
    step = 1 + old.n_rows * wanted // max(n_parts * _SHIFT_ROWS, 1)
    moved: dict[str, list[Any]] = {name: [] for name in columns}
    for number in np.unique(np.linspace(0, n_parts - 1, wanted).astype(int)) if n_parts else ():
        pixel = old.pixels[number]
        was = old.read(pixel, ["obs_id", *columns])
        now = new.read_ranges([(pixel.first, pixel.stop)], ["obs_id", *columns])
        place = pc.index_in(was["obs_id"], now["obs_id"].combine_chunks())
        both = place.is_valid()
        was, now = was.filter(both), now.take(place.drop_null())
        for name, values in moved.items():
            values.append((floats_or_nan(now, name) - floats_or_nan(was, name))[::step])
    for name, values in moved.items():
        change = np.concatenate(values or [np.empty(0)])
        change = change[np.isfinite(change)]
        if len(change):
            p16, median, p84 = map(float, np.percentile(change, [16, 50, 84]))
            of = {"product": product, "label": name.removesuffix("_sos"), "n": len(change)}
            yield {**of, "median": median, "p16": p16, "p84": p84}

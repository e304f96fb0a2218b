"""Stage validate: stars that must agree, before and after the corrections."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from sos_dask.columns import FloatArray, IntArray, floats_or_nan
from sos_dask.errors import CatalogError
from sos_dask.problem import ColumnName
from sos_dask.schema import LABELS
from sos_dask.settings import Settings
from sos_dask.stages.base import Made, Role, Run, Stage
from sos_dask.stages.united import with_text_key
from sos_dask.stats.numbers import scatter
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Rows

logger = logging.getLogger(__name__)
ALL = "all"  # groups, and surveys
_FEW = 10  # members from which on a group counts by itself
_OF_SURVEY = 5


class ValidateSettings(Settings):
    """What must agree."""

    labels: tuple[ColumnName, ...] = Field((*LABELS, "rv"), description="Labels to look at.")
    group: ColumnName | None = Field(
        None, description="Column of the list that names a group, whose members agree."
    )


class Validate(Stage[ValidateSettings]):
    """Compare what surveys say of the stars of a list, before and after.

    Where the list has a label, it is the truth, and differences from it are looked at; else values,
    in groups. ``validation.parquet`` has a row by group, survey and label: number of stars, median
    and scatter (1.4826 MAD) of native rows and of those on the common scale; survey ``all``: of
    native rows together, and of the unified catalog. Group ``all``: deviations from the medians of
    groups.
    """

    name = "validate"
    version = 2
    Settings = ValidateSettings
    roles = (
        Role("list", "Stars of the list, ingested."),
        Role("pairs", "Its pairs with the unified catalog."),
        Role("sos", "The unified catalog."),
        Role("rows", "Corrected rows or observations of a survey, by its name.", many=True),
        Role("reference", "The united references, with their zero points.", "output", True),
    )

    def check(self) -> None:
        """Refuse a list without the column of groups."""
        if self.settings.group is not None:
            self.catalog("list").require(self.settings.group)

    def make(self, run: Run) -> Made:
        """Read the stars of the list in all catalogs, and compare."""
        pairs, listed = _read(self.catalog("pairs")), _read(self.catalog("list"))
        if not pairs.num_rows:
            raise CatalogError(
                f"no star of the list {self.path('list')} is in the unified catalog",
                "Its positions or Gaia ids may be of another epoch or release.",
            )
        found_of = pc.is_in(listed["obs_id"], pairs["target_obs_id"].combine_chunks())
        lost = listed["obs_id"].filter(pc.invert(found_of))
        if len(lost):
            some = ", ".join(map(str, lost.slice(0, 5).to_pylist()))
            text = "%d of %d stars of the list are not in the unified catalog, such as %s"
            logger.warning(f"%s: {text}", self.product, len(lost), len(listed), some)
        place = pc.index_in(pairs["target_obs_id"], listed["obs_id"].combine_chunks())
        listed = listed.take(place)
        group = np.full(len(listed), ALL, dtype=object)
        if self.settings.group is not None:
            names = pc.fill_null(listed[self.settings.group].cast(pa.string()), "")
            group = names.to_numpy(zero_copy_only=False)
            if ALL in group:
                what = f"the list {self.path('list')} has a group '{ALL}', the name of the total"
                raise CatalogError(what, f"Give it another name in column {self.settings.group}.")
        star = pairs["reference_star_id"].combine_chunks()
        of_star: dict[str, list[int]] = {}  # a star may be in the list several times
        for number, one in enumerate(star.to_pylist()):
            of_star.setdefault(one, []).append(number)
        found = [self._of_stars(star, of_star)]
        keys = found[0].pop("sources")
        known = "reference" in self.inputs
        self.offsets = self.manifest("reference").summary["offsets"] if known else {}
        found += [self._of_survey(survey, keys) for survey in self.many("rows")]
        told = []
        for label in self.settings.labels:
            truth = floats_or_nan(listed, label)
            is_truth = bool(np.isfinite(truth).any())
            parts = {
                one["survey"]: _less(one, label, truth if is_truth else np.zeros(len(truth)))
                for one in found
                if label in one
            }
            told += [{"label": label, "is_truth": is_truth, **one} for one in _rows(parts, group)]
        run.write("validation.parquet", pa.Table.from_pylist(told, _SCHEMA))
        n_in, n_out = self.catalog("list").n_rows, len(set(pairs["target_obs_id"].to_pylist()))
        more = {"further pairs": pairs.num_rows - n_out}
        dropped = {"not in the unified catalog": n_in - n_out}
        return Rows(n_in, pairs.num_rows, 0, dropped, more), {
            "stars": n_out,
            "groups": _summary(told),
        }

    def _of_stars(self, star: pa.Array, of_star: dict[str, list[int]]) -> dict[str, Any]:
        """Averages of the stars, and the places in the list by the name of each row."""
        labels = self.settings.labels
        table = _read(self.catalog("sos"), ["star_id", "sources", *labels], star)
        sources = zip(table["star_id"].to_pylist(), table["sources"].to_pylist(), strict=True)
        keys = {key: of_star[one] for one, text in sources for key in text.split(";")}
        number, table = _spread(table, [of_star[one] for one in table["star_id"].to_pylist()])
        values = {x: (None, floats_or_nan(table, x)) for x in labels if x in table.schema.names}
        return {"survey": ALL, "star": number, "sources": keys, **values}

    def _of_survey(self, survey: str, keys: dict[str, list[int]]) -> dict[str, Any]:
        """Native and corrected labels of the rows of a survey that pass its cuts."""
        catalog, start = self.catalog(f"rows.{survey}"), f"{survey}:"
        wanted = pa.array([x.removeprefix(start) for x in keys if x.startswith(start)], pa.string())
        known = [x for x in self.settings.labels if x in catalog.schema.names]
        corrected = catalog.columns([f"{label}_sos" for label in known])
        table = _read(catalog, ["obs_id", "quality", *known, *corrected], wanted)
        table = table.filter(pc.equal(table["quality"], 0))
        star, table = _spread(table, [keys[start + x] for x in table["star_id"].to_pylist()])
        values = {}
        for label in known:
            after = f"{label}_sos" if f"{label}_sos" in corrected else label
            zero = self.offsets.get(survey, {}).get(label, 0.0)
            values[label] = floats_or_nan(table, label), floats_or_nan(table, after) - zero
        return {"survey": survey, "star": star, **values}


_SCHEMA = pa.schema([
    *((name, pa.string()) for name in ("label", "group", "survey")),
    ("is_truth", pa.bool_()), ("n", pa.int64()), ("n_after", pa.int64()),
    *((f"{x}_{when}", pa.float64()) for when in ("before", "after") for x in ("median", "scatter")),
])  # fmt: skip


def _read(catalog: Catalog, names: list[str] | None = None, keys: pa.Array = None) -> pa.Table:
    """Rows of a catalog, those with some keys, which become text."""
    schema = (
        catalog.schema if names is None else pa.schema([catalog.schema.field(x) for x in names])
    )
    tables = [schema.empty_table()]
    if keys is not None:
        tables = [with_text_key(tables[0])]
    for pixel in catalog.pixels:
        table = catalog.read(pixel, names)
        if keys is not None:
            table = with_text_key(table)
            table = table.filter(pc.is_in(table["star_id"], keys))
        tables.append(table)
    return pa.concat_tables(tables)


def _spread(table: pa.Table, places: list[list[int]]) -> tuple[IntArray, pa.Table]:
    """Rows of a table, each once for every place of its star in the list; and those places."""
    rows = np.repeat(np.arange(len(places)), [len(one) for one in places])
    flat = np.array([one for of_row in places for one in of_row], dtype=np.int64)
    return flat, table.take(pa.array(rows, pa.int64()))


def _less(found: dict[str, Any], label: str, truth: FloatArray) -> tuple[Any, ...]:
    """Stars, native and corrected values of a label less the truth."""
    before, after = (x if x is None else x - truth[found["star"]] for x in found[label])
    return found["star"], before, after


def _rows(parts: dict[str, tuple[Any, ...]], group: Any) -> Iterator[dict[str, Any]]:
    """Medians and scatters by group and survey."""
    surveys = [one for name, one in parts.items() if name != ALL]
    if ALL in parts and surveys:
        # Native rows of all surveys stand for what there was before.
        stars, befores = (np.concatenate([one[x] for one in surveys]) for x in (0, 1))
        parts = parts | {ALL: (parts[ALL][0], befores, parts[ALL][2], stars)}
    for name, (star, before, after, *other) in parts.items():
        sides = ((other[0] if other else star), before), (star, after)
        pooled: list[list[FloatArray]] = [[], []]
        for one in sorted(set(group)):
            told: dict[str, Any] = {"group": one, "survey": name}
            for side, (of, values) in enumerate(sides):
                mine = values[(group[of] == one) & np.isfinite(values)]
                when, count = ("before", "n") if side == 0 else ("after", "n_after")
                told |= {count: len(mine), f"scatter_{when}": scatter(mine)}
                told[f"median_{when}"] = float(np.median(mine)) if len(mine) else np.nan
                if len(mine) > 1:  # as far off as from a center that is known
                    grow = (len(mine) / (len(mine) - 1)) ** 0.5
                    pooled[side].append((mine - np.median(mine)) * grow)
            if told["n"] or told["n_after"]:
                yield told
        if len(set(group)) > 1 and all(pooled):
            whole = [np.concatenate(one) for one in pooled]
            told = {"group": ALL, "survey": name, "n": len(whole[0]), "n_after": len(whole[1])}
            yield told | {"scatter_before": scatter(whole[0]), "scatter_after": scatter(whole[1])}


def _summary(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By label: groups of which the scatter fell, and how far surveys differ in them."""
    found = []
    for label in dict.fromkeys(one["label"] for one in told):
        mine = [one for one in told if one["label"] == label and one["group"] != ALL]
        large = [one for one in mine if one["survey"] == ALL and one["n_after"] >= _FEW]
        fell = [one for one in large if one["scatter_after"] < one["scatter_before"]]
        spreads: dict[str, list[float]] = {"before": [], "after": []}
        for group in dict.fromkeys(one["group"] for one in mine):
            some = [one for one in mine if one["group"] == group and one["survey"] != ALL]
            some = [one for one in some if min(one["n"], one["n_after"]) >= _OF_SURVEY]
            for when, values in spreads.items() if len(some) > 1 else ():
                values.append(float(np.std([one[f"median_{when}"] for one in some])))
        row: dict[str, Any] = {"label": label, "groups": len(large), "scatter_fell": len(fell)}
        for when, values in spreads.items():
            row[f"survey_spread_{when}"] = float(np.median(values)) if values else None
        found.append(row)
    return found

"""Stage crossmatch: pairs of target and reference stars, with folds for training.

A part matches one partition of the target, of which it reads the rows near a reference star.

A part knows all pairs of its own partition. What it cannot know is which of them are joined with
pairs of other partitions; those that may be, with all that they are joined with, are *edge pairs*.
One part joins the edge pairs of all partitions, then the pairs are written with their final folds.
Its memory goes with the edge pairs: some percent of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from sos_dask.columns import BoolArray, FloatArray, IntArray, floats_or_nan, key_numbers
from sos_dask.errors import CatalogError
from sos_dask.problem import DEFAULT, ColumnName
from sos_dask.schema import HEALPIX_COLUMN
from sos_dask.settings import Seed
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import near_edge, near_pixel, rows_near, surroundings
from sos_dask.stages.base import (
    Made,
    Role,
    Run,
    Stage,
    by_pixel,
    key_column,
    motion_of,
    partition_record,
    require_whole,
)
from sos_dask.stars.group import GAIA_IDS, fold_of, id_values, same_targets, smallest_of_joined
from sos_dask.stars.match import MOTION, MatchSettings, Motion, match, reach_arcsec
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Rows

_CARRIED = ("ra", "dec", "teff", "teff_err", "logg", "logg_err", "feh", "feh_err", "snr", "rv",
            "rv_err", "phot_g_mean_mag", "distance", "ebv", "n_obs")  # fmt: skip
_REFERENCE = (*(c for c in _CARRIED if c not in ("ra", "dec", "n_obs")), "survey")
_FLAGS = ("quality", "flag_spread")
_COUNTED = ("n_matched", "n_stars", "ambiguous", "by_id", "refused_by_id", "fit_for_training")
_NUMBERS = (
    pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null
)  # fmt: skip

# Partitions, and rows of them.
_Found: TypeAlias = list[tuple[HealpixPixel, IntArray]]


class CrossmatchSettings(MatchSettings):
    """How pairs are found and get their folds."""

    n_folds: int = Field(
        5,
        ge=2,
        le=100,
        description="Folds for cross-validation; all pairs of a star are in one.",
        json_schema_extra={"option": "--folds"},
    )
    seed: Seed = Field(0, description="Other seeds give other folds.")
    labels: tuple[ColumnName, ...] = Field(
        DEFAULT.names, description="Columns whose difference target - reference pairs have."
    )
    inputs: tuple[ColumnName, ...] = Field(
        DEFAULT.columns, description="Further columns of the target that pairs have."
    )

    @property
    def further(self) -> tuple[str, ...]:
        """Labels, their errors and inputs that pairs do not have anyway."""
        names = [*self.inputs, *(name for one in self.labels for name in (one, f"{one}_err"))]
        return tuple(name for name in dict.fromkeys(names) if name not in _CARRIED)

    @property
    def radii(self) -> tuple[float, float]:
        """Targets within the first, or of equal Gaia ids within the second, are one star."""
        return self.radius_arcsec, max(self.radius_arcsec, self.id_radius_arcsec)


class Crossmatch(Stage[CrossmatchSettings]):
    """Match a target catalog with a reference catalog.

    The pairs lie on the partitions of the target. The summary counts pairs, distinct reference
    stars, ambiguous pairs, pairs by id, position matches refused by ids.
    """

    name = "crossmatch"
    version = 7
    Settings = CrossmatchSettings
    roles = (
        Role("target", "Observations (obs_id) or stars (star_id) of the target."),
        Role("reference", "Stars of the reference (star_id); observations are taken too."),
    )
    partitioned = "target"
    memory = (220, 4.0)
    reusable = ("matches",)
    motions: tuple[Motion, Motion]
    shared_ids: bool

    def check(self) -> None:
        """Refuse catalogs that lack a column, or have ids or numbers of another type."""
        target, reference = both = self.catalog("target"), self.catalog("reference")
        shared = [n for n in target.columns(GAIA_IDS.values()) if n in reference.schema.names]
        self.shared_ids = bool(shared) and self.settings.use_gaia_id
        for catalog in both:
            key_column(catalog)
            catalog.require("ra", "dec", HEALPIX_COLUMN)
            require_whole(catalog, shared if self.shared_ids else ())
            for name in catalog.columns((*MOTION, *self.settings.labels)):
                kind = catalog.schema.field(name).type
                if not any(test(kind) for test in _NUMBERS):
                    raise CatalogError(
                        f"{catalog.path}: column '{name}' has type {kind}, not numbers"
                    )
        self.motions = motion_of(target), motion_of(reference)

    def state(self) -> Any:
        """Tell what all partitions share: see `Stage.state`."""
        return self.motions, self.shared_ids

    def make(self, run: Run) -> Made:
        """Match every partition, join the folds of all, and write the pairs."""
        target = self.catalog("target")
        pixels = by_pixel(target.pixels)
        matched = run.parts("matches", pixels, self.pairs_of_pixel)
        [joined] = run.parts("joined", {"folds": list(pixels)}, self.join_folds, "folds")
        written = run.parts("pairs", pixels, self.write_pairs, f"write {self.product}")
        n_out = run.write_catalog(self.product, target.pixels, written, self._schema())
        counts = {name: sum(record[name] for record in matched) for name in _COUNTED}
        n_matched = counts.pop("n_matched")
        n_stars = counts.pop("n_stars") - joined["n_again"]
        summary = {"pairs": n_out, "reference_stars": n_stars, **counts}
        summary["reach_arcsec"] = float(self._reach())
        dropped = {"without a pair": target.n_rows - n_matched}
        further = {"further pairs": n_out - n_matched}
        return Rows(target.n_rows, n_out, 0, dropped, further), summary

    @property
    def _of_reference(self) -> tuple[str, ...]:
        """Columns of the reference that pairs have."""
        further = self.settings.further
        labels = [name for one in self.settings.labels for name in (one, f"{one}_err")]
        return tuple(dict.fromkeys([*_REFERENCE, *(n for n in labels if n in further)]))

    def _reach(self, pm_mas_yr: FloatArray | None = None) -> FloatArray:
        """Bound how far the pairs of reference stars reach; without motions: of any star."""
        found = reach_arcsec(self.settings, *self.motions, self.shared_ids, pm_mas_yr)
        return np.asarray(found)

    def _schema(self) -> pa.Schema:
        """Schema of the pairs."""
        target, reference = self.catalog("target"), self.catalog("reference")
        left, right, key = target.schema, reference.schema, key_column(target)
        fields = [
            pa.field(HEALPIX_COLUMN, pa.int64(), False),
            pa.field(f"target_{key}", left.field(key).type, False),
            pa.field("reference_star_id", right.field(key_column(reference)).type, False),
            pa.field("separation_arcsec", pa.float64(), False, {"unit": "arcsec"}),
            pa.field("n_candidates", pa.int32(), False),
            pa.field("ambiguous", pa.bool_(), False),
            pa.field("by_id", pa.bool_(), False),
            pa.field("fold", pa.int8(), False),
            pa.field(
                "use", pa.bool_(), False, {"description": "fit for training where a label is known"}
            ),
        ]
        fields += [left.field(name) for name in target.columns((*_CARRIED, *self.settings.further))]
        fields += [
            right.field(n).with_name(f"{n}_ref") for n in reference.columns(self._of_reference)
        ]
        for label in target.columns(reference.columns(self.settings.labels)):
            unit = (left.field(label).metadata or {}).get(b"unit", b"").decode()
            text = {"unit": unit, "description": f"target - reference {label}"}
            fields.append(pa.field(f"{label}_diff", pa.float32(), metadata=text))
        return pa.schema(fields)

    def pairs_of_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Keep the pairs of one partition, with the folds that they have by themselves."""
        left_key, right_key = (key_column(self.catalog(role.name)) for role in self.roles)
        left, left_at, right, right_at = self._near_rows(pixel)

        def of_reference(rows: IntArray, *names: str) -> pa.Table:
            return _matched(self.catalog("reference"), right, right_at, rows, names)

        matching = self.settings.but(use_gaia_id=self.shared_ids)
        matches = match(
            left, right, matching, lambda rows: of_reference(rows, right_key)[right_key]
        )
        names = (left_key, *_CARRIED, *self.settings.further, *_FLAGS)
        target = _matched(self.catalog("target"), left, left_at, matches.left, names)
        reference = of_reference(matches.right, right_key, *self._of_reference, *_FLAGS)
        number = key_numbers(reference[right_key], self.settings.seed)
        smallest = smallest_of_joined(number, number, self._links(target))
        reach = self._reach(_total_pm(reference))
        is_open = near_edge(pixel, reference[HEALPIX_COLUMN].to_numpy(), reach)
        is_open |= near_edge(pixel, target[HEALPIX_COLUMN].to_numpy(), self.settings.radii[1])
        ambiguous = matches.n_candidates > 1
        use = ~ambiguous & _is_good(target) & _is_good(reference)
        columns: dict[str, Any] = {
            f"target_{left_key}": target[left_key],
            "reference_star_id": reference[right_key],
            "separation_arcsec": matches.separation_arcsec,
            "n_candidates": matches.n_candidates,
            "ambiguous": ambiguous,
            "by_id": matches.by_id,
            "fold": fold_of(smallest, self.settings.n_folds),
            "use": use,
        }
        columns |= {name: target[name] for name in target.schema.names}
        columns |= {f"{name}_ref": reference[name] for name in reference.schema.names}
        schema, known = self._schema(), np.zeros(len(use), dtype=np.bool_)
        for label in (name for name in self.settings.labels if f"{name}_diff" in schema.names):
            columns[f"{label}_diff"] = pc.subtract(target[label], reference[label])
            known |= pc.is_valid(columns[f"{label}_diff"]).to_numpy()
        columns["use"] = use = use & known
        pairs = pa.table({name: columns[name] for name in schema.names}).cast(schema)
        is_edge = np.isin(smallest, smallest[is_open])
        edge = pa.table({"is_edge": is_edge, "smallest": smallest, "number": number})
        for name, values in zip(edge.schema.names, edge.columns, strict=True):
            pairs = pairs.append_column(name, values)
        for name in _ids_in(target):
            pairs = pairs.append_column(name, target[name])
        output.write_piece(f"pairs-{key}", pairs)
        return {
            "n_matched": int(np.count_nonzero(np.diff(matches.left, prepend=-1))),
            "n_stars": len(np.unique(number)),
            "ambiguous": int(ambiguous.sum()),
            "by_id": int(matches.by_id.sum()),
            "refused_by_id": matches.n_conflicts,
            "fit_for_training": int(np.count_nonzero(use)),
        }

    def _near_rows(self, pixel: HealpixPixel) -> tuple[pa.Table, _Found, pa.Table, _Found]:
        """Rows of both sides that can be in a pair: what decides of them, and where they are."""
        target, reference, reach = self.catalog("target"), self.catalog("reference"), self._reach()
        deciding = dict.fromkeys(["ra", "dec", *MOTION, *GAIA_IDS.values()])
        names = reference.columns([HEALPIX_COLUMN, *deciding])
        ranges = sorted([(pixel.first, pixel.stop), *surroundings(pixel, float(reach))[0]])
        reaches = partial(near_pixel, pixel, reach_arcsec=float(reach))
        right_at = [
            (other, rows)
            for other in reference.overlapping(ranges)
            if len(rows := reference.rows_in(other, ranges, wanted=reaches))
        ]
        found = [reference.take(other, rows, names) for other, rows in right_at]
        right = pa.concat_tables(found or [reference.schema.empty_table().select(names)])
        cells = target.cells(pixel) if right.num_rows else np.empty(0, dtype=np.int64)
        reaches_of = self._reach(_total_pm(right))
        rows = rows_near(cells, right[HEALPIX_COLUMN].to_numpy(), reaches_of)
        left = target.take(pixel, rows, target.columns(deciding))
        left = left.append_column(target.schema.field(HEALPIX_COLUMN), pa.array(cells[rows]))
        return left.combine_chunks(), [(pixel, rows)], right.combine_chunks(), right_at

    def _links(self, targets: pa.Table) -> tuple[IntArray, IntArray]:
        """Pairs whose targets may be one star."""
        ra, dec, cells = (targets[name].to_numpy() for name in ("ra", "dec", HEALPIX_COLUMN))
        ids = [id_values(targets[name]) for name in _ids_in(targets)]
        return same_targets(ra, dec, cells, ids, *self.settings.radii)

    def join_folds(self, output: Output, key: str, pixels: list[str]) -> dict[str, Any]:
        """Join the edge pairs of all partitions; keep their folds.

        The record counts reference stars that several partitions have, but for one of these.
        """
        kept = [output.read_piece(f"pairs-{one}") for one in pixels]
        if not kept:
            return {"n_again": 0}
        names = ["smallest", "number", HEALPIX_COLUMN, "ra", "dec", *_ids_in(kept[0])]
        edges = [one.select(names).filter(one["is_edge"]) for one in kept]
        together = pa.concat_tables(edges)
        smallest, number = together["smallest"].to_numpy(), together["number"].to_numpy()
        joined = smallest_of_joined(smallest, number, self._links(together))
        folds = fold_of(joined, self.settings.n_folds)
        starts = np.cumsum([one.num_rows for one in edges])[:-1]
        for one, fold in zip(pixels, np.split(folds, starts), strict=True):
            output.write_piece(f"folds-{one}", pa.table({"fold": fold}))
        n_stars = sum(len(np.unique(some)) for some in np.split(number, starts))
        return {"n_again": n_stars - len(np.unique(number))}

    def write_pairs(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write a partition of pairs with its final folds."""
        pairs, final = (output.read_piece(f"{kind}-{key}") for kind in ("pairs", "folds"))
        folds = pairs["fold"].to_numpy().copy()
        folds[pairs["is_edge"].to_numpy()] = final["fold"].to_numpy()
        place, schema = pairs.schema.get_field_index("fold"), self._schema()
        pairs = pairs.set_column(place, schema.field("fold"), pa.array(folds))
        return {"file": partition_record(output, pixel, pairs.select(schema.names))}


def _matched(
    catalog: Catalog, near: pa.Table, found: _Found, wanted: IntArray, names: Sequence[str]
) -> pa.Table:
    """Matched rows with further columns, which are read of them alone: one in ten that are near."""
    names = [name for name in catalog.columns(names) if name not in near.schema.names]
    needed, place = np.unique(wanted, return_inverse=True)
    first, tables = 0, [catalog.schema.empty_table().select(names)]
    for pixel, rows in found:
        here = needed[(needed >= first) & (needed < first + len(rows))]
        tables += [catalog.take(pixel, rows[here - first], names)] if len(here) else []
        first += len(rows)
    further, matched = pa.concat_tables(tables).take(place), near.take(wanted)
    for name in names:
        matched = matched.append_column(further.schema.field(name), further[name])
    return matched


def _ids_in(rows: pa.Table) -> list[str]:
    return [name for name in GAIA_IDS.values() if name in rows.schema.names]


def _total_pm(rows: pa.Table) -> FloatArray:
    """Total proper motions, 0 where there is none."""
    pmra, pmdec = (floats_or_nan(rows, name) for name in ("pmra", "pmdec"))
    return np.asarray(np.nan_to_num(np.hypot(pmra, pmdec)))


def _is_good(rows: pa.Table) -> BoolArray:
    """Rows that pass all cuts and whose repeats agree."""
    good = np.ones(rows.num_rows, dtype=bool)
    for name in set(_FLAGS) & set(rows.schema.names):
        good &= rows[name].to_numpy() == 0
    return good

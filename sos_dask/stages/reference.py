"""Stage reference: the reference surveys united, one row a star."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sos_dask.columns import floats, floats_or_nan
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN, LABELS
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.base import Made, Role, Run, by_pixel, partition_record
from sos_dask.stages.united import United, UnitedSettings, together, with_text_key
from sos_dask.stars.group import GAIA_IDS
from sos_dask.stars.match import MOTION
from sos_dask.stars.union import UnionSettings, common_differences, in_order, unite, with_errors
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Rows

logger = logging.getLogger(__name__)
_STAR_COLUMNS = ("star_id", "quality", "flag_spread", *(f"{label}_spread" for label in LABELS))
_COLUMNS = (HEALPIX_COLUMN, *_STAR_COLUMNS, *CANONICAL)
# What decides which rows are one star.
_COMPARED = (HEALPIX_COLUMN, "star_id", "ra", "dec", *MOTION, *GAIA_IDS.values(), "quality")
MIN_COMMON = 50


class ReferenceSettings(UnionSettings, UnitedSettings):
    """How the stars of the reference surveys are united."""


class Reference(United[ReferenceSettings]):
    """Unite the stars of the reference surveys.

    Rows in are the stars of all surveys, rows out stars; the others are merged with another
    survey's. The summary says how many stars several surveys have, and the zero points.
    """

    name = "reference"
    version = 7
    Settings = ReferenceSettings
    roles = (Role("stars", "Stars of a survey (output of dedupe), by its name.", many=True),)
    of_surveys = "stars"
    union: UnionSettings

    def check(self) -> None:
        """Refuse catalogs that lack a column, and offsets of one that they do not have."""
        for name, catalog in self.surveys().items():
            offsets = self.settings.known_offsets.get(name, {})
            catalog.require("star_id", "ra", "dec", HEALPIX_COLUMN, "quality", *offsets)

    def make(self, run: Run) -> Made:
        """Plan the partitions, measure the zero points, and unite the stars of each partition."""
        catalogs, self.union = self.surveys(), self.settings
        pixels, _ = self.plan(run, "reference")
        parts = by_pixel(pixels)
        if self.settings.offsets == "measured" and len(catalogs) > 1:
            run.parts("common", parts, self.compare_surveys, "zero points")
            common = [run.output.read_piece(f"common-{key}") for key in parts]
            self.union = self.union.but(offsets=_zero_points(pa.concat_tables(common)))
            first, *others = in_order(catalogs, self.settings.order)
            for name in (one for one in others if one not in self.union.known_offsets):
                text = "%s has fewer than %d good stars in common with %s: its zero points are not "
                logger.warning(text + "measured, and nothing is removed", name, MIN_COMMON, first)
        done = run.parts("stars", parts, self.stars_of_pixel)
        no_rows = {
            survey: one.schema.empty_table().select(one.columns(self._columns))
            for survey, one in catalogs.items()
        }
        schema = unite(together(no_rows), np.empty(0, dtype=np.int64), self.union).schema
        n_out = run.write_catalog(self.product, pixels, done, schema)
        merged = sum(record["n_members"] for record in done) - n_out
        summary = {
            "stars_in_several_surveys": sum(record["n_several"] for record in done),
            "stars": {survey: catalog.n_rows for survey, catalog in catalogs.items()},
            "offsets": {survey: dict(of) for survey, of in self.union.known_offsets.items()},
        }
        return Rows(sum(c.n_rows for c in catalogs.values()), n_out, 0, {"merged": merged}), summary

    @property
    def _columns(self) -> tuple[str, ...]:
        """Columns of the surveys that the stars are made of."""
        return tuple(dict.fromkeys([*_COLUMNS, *with_errors(self.settings.labels)]))

    def compare_surveys(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Keep the differences of the stars of one partition that several surveys have."""
        members, primary = self.members(pixel, (*_COMPARED, *self.settings.measured))
        table = common_differences(members, primary, self.settings)
        output.write_piece(f"common-{key}", table)
        return {}

    def stars_of_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write the stars whose primary lies in one partition, at the common epoch."""
        members, primary = self.members(pixel, self._columns)
        stars = unite(members, primary, self.union)
        return {
            "file": partition_record(output, pixel, stars),
            "n_members": members.num_rows,
            "n_several": int(np.count_nonzero(stars["n_surveys"].to_numpy() > 1)),
        }


def _zero_points(common: pa.Table) -> dict[str, dict[str, float]]:
    """Median difference of each survey from the first, by label; in the order of the sky."""
    offsets: dict[str, dict[str, float]] = {}
    for survey in sorted(pc.unique(common["survey"]).to_pylist()):
        rows = common.filter(pc.equal(common["survey"], survey)).drop_columns("survey")
        known = {name: floats(rows, name) for name in rows.column_names}
        known = {name: values[np.isfinite(values)] for name, values in known.items()}
        found = {x: float(np.median(v)) for x, v in known.items() if len(v) >= MIN_COMMON}
        offsets |= {survey: found} if found else {}
    return offsets


def common_stars(
    reference: Catalog, stars: Mapping[str, Catalog], order: Sequence[str] = ()
) -> Iterator[tuple[str, str, pa.Table, pa.Table]]:
    """Yield the stars that two surveys have, for every two surveys of a united reference.

    ``stars`` are the catalogs that the reference was made from, by survey; surveys in ``order``
    come first, others follow by name. Of a survey's rows of one star, the first that passes its
    cuts counts. Given are the names of both, and their tables, row by row the same stars:
    ``united``, the ``star_id`` of the reference, and labels (K, dex, dex) of the survey on the zero
    points of the reference.
    """
    reference.require("n_surveys", "sources")
    members = _sources(reference)
    manifest = reference.manifest
    offsets = manifest.summary.get("offsets", {}) if manifest is not None else {}
    found = {}
    for name in in_order(stars, order):
        mine = members.filter(pc.equal(members["survey"], name))
        rows = _good_rows(stars[name], mine["key"])
        place = pc.index_in(mine["key"], rows["star_id"].combine_chunks())
        good = np.flatnonzero(place.is_valid().to_numpy())
        number, first = np.unique(mine["number"].to_numpy()[good], return_index=True)
        at = pa.array(good[first])
        chosen, zero = rows.take(place.take(at)), offsets.get(name, {})
        columns = {one: floats_or_nan(chosen, one) - zero.get(one, 0.0) for one in LABELS}
        found[name] = (number, pa.table({"united": mine["united"].take(at), **columns}))
    for one, other in combinations(found, 2):
        (ours, table), (theirs, others) = found[one], found[other]
        _, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
        yield one, other, table.take(pa.array(i)), others.take(pa.array(j))


def _sources(reference: Catalog) -> pa.Table:
    """Rows of the stars that several surveys have: number and id of the star, survey, key there."""
    names = ["star_id", "sources"]
    tables = [pa.schema([(name, pa.string()) for name in names]).empty_table()]
    for pixel in reference.pixels:
        table = reference.read(pixel, [*names, "n_surveys"])
        table = table.filter(pc.greater(table["n_surveys"], 1)).select(names)
        tables.append(table.cast(tables[0].schema))
    stars = pa.concat_tables(tables).combine_chunks()
    split = pc.split_pattern(stars["sources"].combine_chunks(), ";")
    parts = pc.split_pattern(pc.list_flatten(split), ":", max_splits=1)
    number = pc.list_parent_indices(split)
    columns = {"number": number, "united": stars["star_id"].take(number)}
    both = {"survey": pc.list_element(parts, 0), "key": pc.list_element(parts, 1)}
    return pa.table({**columns, **both})


def _good_rows(catalog: Catalog, wanted: pa.ChunkedArray) -> pa.Table:
    """Rows with quality 0 of a catalog of stars, by key as text."""
    names = ["star_id", "quality", *catalog.columns(LABELS)]
    kept = [with_text_key(catalog.schema.empty_table().select(names))]
    for pixel in catalog.pixels:
        table = with_text_key(catalog.read(pixel, names))
        good = pc.and_(pc.equal(table["quality"], 0), pc.is_in(table["star_id"], wanted))
        kept.append(table.filter(good))
    return pa.concat_tables(kept)

"""Stage reference: the reference surveys united, one row a star."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN, LABELS, MOST_ROWS, YEARS
from sos_dask.settings import Settings
from sos_dask.sky.healpix import HealpixPixel, IntArray, Ranges, in_ranges, plan_partitions
from sos_dask.stages.crossmatch import at_epoch, motion_of, moved_arcsec
from sos_dask.stages.ids import GAIA_IDS, rank_of
from sos_dask.stages.needs import catalog_bytes, require_pixel
from sos_dask.stages.parts import commit_catalog, key_of, records, run_parts, unless_complete
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stars.group import Radii, group_around
from sos_dask.stars.unify import UnifySettings, common_differences, unify
from sos_dask.storage.artifact import Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, write_partition

VERSION = 5
_HISTOGRAM_ORDER = 8
_STAR_COLUMNS = ("star_id", "quality", "flag_spread", *(f"{label}_spread" for label in LABELS))
# What decides which rows are one star, and the labels.
_COMPARED = ("star_id", "ra", "dec", "pmra", "pmdec", "position_epoch", *GAIA_IDS.values(),
             "quality", *LABELS)  # fmt: skip
MIN_COMMON = 50


class ReferenceSettings(Settings):
    """How the stars of the reference surveys are united."""

    unify: UnifySettings
    radius_arcsec: float = Field(
        1.5,
        gt=0,
        lt=3600,
        description="Stars of two surveys within it are one star, where no Gaia ids say otherwise.",
    )
    id_radius_arcsec: float = Field(
        10.0, gt=0, lt=3600, description="Stars of equal Gaia id within it are one star."
    )
    epoch: float = Field(
        2016.0,
        ge=YEARS[0],
        le=YEARS[1],
        description="Julian year to which positions with proper motions are moved.",
    )
    rows_per_partition: int = Field(1_000_000, ge=1, le=MOST_ROWS)
    measure_offsets: bool = Field(
        False,
        description="Put every survey on the zero point of the first in the order: the median "
        f"difference of common stars is subtracted where they are {MIN_COMMON} or more.",
    )

    @model_validator(mode="after")
    def _radii_agree(self) -> Self:
        _ = self.grouping
        return self

    @property
    def grouping(self) -> Radii:
        """How the stars of all surveys are grouped."""
        return Radii(radius_arcsec=self.radius_arcsec, id_radius_arcsec=self.id_radius_arcsec)


@dataclass(frozen=True)
class _Count:
    output: Output
    survey: str
    catalog: Catalog
    pixel: HealpixPixel
    epoch: float


@dataclass(frozen=True)
class _Part:
    output: Output
    catalogs: Mapping[str, Catalog]
    pixel: HealpixPixel
    settings: ReferenceSettings
    motion_arcsec: float


def reference_recipe(catalogs: Mapping[str, str], settings: ReferenceSettings) -> Recipe:
    """Recipe of `reference` for catalogs of these fingerprints, by survey."""
    return Recipe("reference", VERSION, {"settings": settings.as_json}, dict(catalogs))


def reference(
    catalogs: Mapping[str, Catalog],
    directory: Path,
    settings: ReferenceSettings,
    *,
    name: str = "reference",
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Unite the stars of the reference surveys.

    Parameters
    ----------
    catalogs : mapping of str to Catalog
        Stars (output of dedupe) by name of the survey.
    directory : Path
    settings : ReferenceSettings

    Returns
    -------
    Manifest
        ``rows``: stars of all surveys in, stars out, stars merged with another survey's.
    """
    for catalog in catalogs.values():
        catalog.require("star_id", "ra", "dec", HEALPIX_COLUMN, "quality", *LABELS)
    fingerprints = {survey: catalog.fingerprint for survey, catalog in catalogs.items()}
    output = Output.prepare(
        directory,
        reference_recipe(fingerprints, settings),
        overwrite,
        [catalog.path for catalog in catalogs.values()],
    )
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    with unless_complete(output):
        counts = {
            f"{survey}-{key_of(pixel)}": _Count(output, survey, catalog, pixel, settings.epoch)
            for survey, catalog in catalogs.items()
            for pixel in catalog.pixels
        }
        run_parts(output, "counts", counts, _count_part, cluster, "reference plan", report)
        histogram = np.zeros(12 * 4**_HISTOGRAM_ORDER, dtype=np.int64)
        for record in records(output, "counts", list(counts)):
            np.add.at(histogram, record["cells"], record["rows"])
        pixels = plan_partitions(histogram, _HISTOGRAM_ORDER, settings.rows_per_partition)
        if pixels:
            n_bytes = sum(catalog_bytes(catalog) for catalog in catalogs.values())
            require_pixel(cluster, "reference", name, pixels, histogram, n_bytes)
        motion = max(moved_arcsec(motion_of(c), settings.epoch) for c in catalogs.values())
        parts = {
            key_of(pixel): _Part(output, catalogs, pixel, settings, motion) for pixel in pixels
        }
        offsets: Mapping[str, Mapping[str, float]] = settings.unify.offsets
        if settings.measure_offsets and len(catalogs) > 1:
            run_parts(output, "common", parts, _common_part, cluster, "zero points", report)
            offsets = _zero_points(output, list(parts))
            fixed = settings.but(unify=settings.unify.but(offsets=offsets))
            parts = {key: replace(part, settings=fixed) for key, part in parts.items()}
        run_parts(output, "stars", parts, _reference_part, cluster, "reference", report)
        done = records(output, "stars", list(parts))
        n_in = sum(catalog.n_rows for catalog in catalogs.values())
        n_out = sum(record["n_stars"] for record in done)
        merged = sum(record["n_members"] for record in done) - n_out
        commit_catalog(
            output,
            name,
            list(zip(pixels, done, strict=True)),
            unify(_no_rows(catalogs), np.empty(0, dtype=np.int64), settings.unify).schema,
            Rows(n_in, n_out, 0, {"merged": merged}),
            {
                "stars_in_several_surveys": sum(record["n_several"] for record in done),
                "stars": {survey: catalog.n_rows for survey, catalog in catalogs.items()},
                "offsets": {survey: dict(values) for survey, values in offsets.items()},
            },
        )
    return output.load_manifest()


def _columns(catalog: Catalog) -> list[str]:
    return catalog.columns([HEALPIX_COLUMN, *_STAR_COLUMNS, *CANONICAL])


def _count_part(part: _Count) -> None:
    columns = part.catalog.columns([HEALPIX_COLUMN, "ra", "dec", "pmra", "pmdec", "position_epoch"])
    table = at_epoch(part.catalog.read(part.pixel, columns), part.epoch)
    cells, rows = np.unique(
        table[HEALPIX_COLUMN].to_numpy() >> 2 * (29 - _HISTOGRAM_ORDER), return_counts=True
    )
    part.output.put_record(
        "counts",
        f"{part.survey}-{key_of(part.pixel)}",
        {"cells": cells.tolist(), "rows": rows.tolist()},
    )


def _no_rows(catalogs: Mapping[str, Catalog]) -> pa.Table:
    return _together(
        {
            survey: pa.schema([c.schema.field(n) for n in _columns(c)]).empty_table()
            for survey, c in catalogs.items()
        }
    )


def _together(tables: Mapping[str, pa.Table]) -> pa.Table:
    """Stars of all surveys in one table, keys as text, with the survey's name in a column."""
    parts = []
    for survey, table in tables.items():
        index = table.schema.get_field_index("star_id")
        table = table.set_column(index, "star_id", table["star_id"].cast(pa.string()))
        parts.append(
            table.append_column("survey", pa.array([survey] * table.num_rows, pa.string()))
        )
    return pa.concat_tables(parts, promote_options="default")


def _zero_points(output: Output, keys: list[str]) -> dict[str, dict[str, float]]:
    """Median difference of each survey from the first, by label; in the order of the sky."""
    pieces = pa.concat_tables([read_piece(_common_file(output, key)) for key in keys])
    offsets: dict[str, dict[str, float]] = {}
    for survey in sorted(pc.unique(pieces["survey"]).to_pylist()):
        rows = pieces.filter(pc.equal(pieces["survey"], survey))
        if rows.num_rows >= MIN_COMMON:
            offsets[survey] = {label: float(np.median(rows[label].to_numpy())) for label in LABELS}
    return offsets


def _common_file(output: Output, key: str) -> Path:
    return output.work / "common-stars" / f"{key}.arrow"


def _common_part(part: _Part) -> None:
    """Differences of the stars of one partition that several surveys have."""
    members, primary = _members(part, _COMPARED)
    key = key_of(part.pixel)
    table = common_differences(members, primary, part.settings.unify.order)
    write_piece(_common_file(part.output, key), table)
    part.output.put_record("common", key, {"n_stars": table.num_rows})


def _members(part: _Part, names: Sequence[str]) -> tuple[pa.Table, IntArray]:
    """Rows of the stars whose primary lies in one partition, and the row of each one's primary."""
    settings, pixel = part.settings, part.pixel

    def read(ranges: Ranges) -> tuple[pa.Table, NDArray[np.bool_]]:
        rows = {
            survey: at_epoch(
                catalog.read_ranges(ranges, catalog.columns([HEALPIX_COLUMN, *names])),
                settings.epoch,
            )
            for survey, catalog in part.catalogs.items()
        }
        table = _together(rows).combine_chunks()
        table = table.take(pa.array(np.argsort(table[HEALPIX_COLUMN].to_numpy(), kind="stable")))
        return table, in_ranges(table[HEALPIX_COLUMN].to_numpy(), [(pixel.first, pixel.stop)])

    reach = max(settings.radius_arcsec, settings.id_radius_arcsec) + part.motion_arcsec
    table, inside, primary = group_around(
        pixel,
        read,
        partial(_ranks, order=settings.unify.order),
        reach,
        settings.grouping,
        "the reference",
    )
    ours = inside[primary]
    row_of = np.cumsum(ours) - 1
    return table.filter(pa.array(ours)), row_of[primary[ours]]


def _reference_part(part: _Part) -> None:
    """Stars whose primary lies in one partition, at the common epoch."""
    members, primary = _members(part, (*_STAR_COLUMNS, *CANONICAL))
    stars = unify(members, primary, part.settings.unify)
    record = write_partition(part.output, part.pixel, stars) if stars.num_rows else None
    part.output.put_record(
        "stars",
        key_of(part.pixel),
        {
            "file": None if record is None else asdict(record),
            "n_stars": stars.num_rows,
            "n_members": members.num_rows,
            "n_several": int(np.count_nonzero(stars["n_surveys"].to_numpy() > 1)),
        },
    )


def _ranks(table: pa.Table, order: tuple[str, ...]) -> IntArray:
    """Preference for the primary: the survey's place in the order or its name, then the key."""
    names = sorted(pc.unique(table["survey"]).to_pylist())
    ranked = [*order, *(name for name in names if name not in order)]
    place = pc.index_in(table["survey"], pa.array(ranked, pa.string())).to_numpy()
    rank = np.empty(table.num_rows, dtype=np.int64)
    first = 0
    for number in range(len(ranked)):
        rows = np.flatnonzero(place == number)
        rank[rows] = first + rank_of(table["star_id"].take(pa.array(rows)))
        first += len(rows)
    return rank

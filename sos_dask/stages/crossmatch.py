"""Stage crossmatch: pairs of target and reference stars, with folds for training.

A part matches one partition of the target. Of the rows near any reference star it reads what
decides (positions, motions, ids), and of the matched rows alone all that is carried along.

A part knows all pairs of its own partition. What it cannot know is which of them are joined with
pairs of other partitions; it leaves those that may be as *edge pairs*, with all that they are
joined with. One task joins the edge pairs of all partitions, and says where that changes a fold.
Its memory goes with the edge pairs: some percent of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from sos_dask.columns import FloatArray, IntArray, KeyArray, key_numbers
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN, LABELS
from sos_dask.settings import Seed
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.sky.neighbours import near_edge, near_pixel, rows_near, surroundings
from sos_dask.stages.base import (
    Made,
    Role,
    Run,
    Stage,
    by_pixel,
    partition_record,
    read_piece,
    write_piece,
)
from sos_dask.stages.ids import key_column, motion_of, require_numbers, require_whole
from sos_dask.stars.group import (
    GAIA_IDS,
    fold_of,
    id_values,
    same_targets,
    smallest_of_joined,
)
from sos_dask.stars.match import MOTION, MatchSettings, Motion, match, reach_arcsec
from sos_dask.storage.artifact import Output, partition_errors, storage_errors, write_parquet
from sos_dask.storage.catalog import Catalog, partition_path
from sos_dask.storage.manifest import WORK, Rows

_CARRIED = ("ra", "dec", "teff", "teff_err", "logg", "logg_err", "feh", "feh_err", "snr", "rv",
            "rv_err", "phot_g_mean_mag", "distance", "ebv", "n_obs")  # fmt: skip
_REFERENCE = (*(c for c in _CARRIED if c not in ("ra", "dec", "n_obs")), "survey")
_FLAGS = ("quality", "flag_spread")
BoolArray = NDArray[np.bool_]
_Found = list[tuple[HealpixPixel, IntArray]]  # rows of partitions


class _Change(NamedTuple):
    """Rows of a partition of pairs whose folds change, and their folds."""

    pixel: HealpixPixel
    rows: IntArray
    folds: NDArray[np.int8]


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

    @property
    def radii(self) -> tuple[float, float]:
        """Targets within the first, or of equal Gaia ids within the second, are one star."""
        return self.radius_arcsec, max(self.radius_arcsec, self.id_radius_arcsec)


class Crossmatch(Stage[CrossmatchSettings]):
    """Match a target catalog with a reference catalog.

    The pairs lie on the partitions of the target. The summary counts pairs, distinct reference
    stars, ambiguous pairs, pairs by id, position matches refused by ids.

    Example: sos-dask crossmatch lamost.stars reference -o pairs
    """

    name = "crossmatch"
    version = 6
    Settings = CrossmatchSettings
    roles = (
        Role("target", "Observations (obs_id) or stars (star_id) of the target."),
        Role("reference", "Stars of the reference (star_id); observations are taken too."),
    )
    partitioned = "target"
    memory = (220, 4.0)
    motions: tuple[Motion, Motion]
    shared_ids: bool

    @property
    def target(self) -> Catalog:
        """Catalog whose rows get a counterpart."""
        return self.catalog("target")

    @property
    def reference(self) -> Catalog:
        """Catalog of the counterparts."""
        return self.catalog("reference")

    def check(self) -> None:
        """Refuse catalogs that lack a column, or have ids or numbers of another type."""
        target, reference = self.target, self.reference
        key_column(target), key_column(reference)
        target.require("ra", "dec", HEALPIX_COLUMN)
        reference.require("ra", "dec", HEALPIX_COLUMN)
        shared = [n for n in target.columns(GAIA_IDS.values()) if n in reference.schema.names]
        self.shared_ids = bool(shared) and self.settings.use_gaia_id
        for catalog in (target, reference):
            require_whole(catalog, shared if self.shared_ids else ())
            require_numbers(catalog, (*MOTION, *LABELS))
        self.motions = motion_of(target), motion_of(reference)

    def make(self, run: Run) -> Made:
        """Match every partition, join the folds of all, and write those that change."""
        target, output = self.target, run.output
        pixels = by_pixel(target.pixels)
        matched = run.parts("matches", pixels, self.pairs_of_pixel)
        joining = partial(_changed_folds, output, pixels)
        [(changes, n_again)] = run.cluster.run(joining, [self.settings], "folds")
        changed = {}
        if changes:
            done = run.parts("folds", changes, _change_folds, "folds")
            changed = dict(zip(changes, done, strict=True))
        for (key, pixel), record in zip(pixels.items(), matched, strict=True):
            if key not in changes and record["file"] is not None:
                _keep_pairs(output, pixel)
        written = [changed.get(*item) for item in zip(pixels, matched, strict=True)]
        n_out = run.write_catalog(self.product, target.pixels, written, self.pairs_schema())
        n_matched = sum(record["n_matched"] for record in matched)
        summary = {
            "pairs": n_out,
            "reference_stars": sum(record["n_stars"] for record in matched) - n_again,
            **{
                name: sum(record[name] for record in matched)
                for name in ("ambiguous", "by_id", "refused_by_id", "fit_for_training")
            },
            "reach_arcsec": float(self.reach_arcsec()),
        }
        dropped = {"without a pair": target.n_rows - n_matched}
        further = {"further pairs": n_out - n_matched}
        return Rows(target.n_rows, n_out, 0, dropped, further), summary

    def reach_arcsec(self, pm_mas_yr: FloatArray | None = None) -> FloatArray:
        """Bound how far the pairs of reference stars reach; without motions: of any star."""
        found = reach_arcsec(self.settings, *self.motions, self.shared_ids, pm_mas_yr)
        return np.asarray(found)

    def pairs_schema(self) -> pa.Schema:
        """Schema of the pairs."""
        left, right = self.target, self.reference
        key, right_key = key_column(left), key_column(right)
        fields = [
            pa.field(HEALPIX_COLUMN, pa.int64(), False),
            pa.field(f"target_{key}", left.schema.field(key).type, False),
            pa.field("reference_star_id", right.schema.field(right_key).type, False),
            pa.field("separation_arcsec", pa.float64(), False, {"unit": "arcsec"}),
            pa.field("n_candidates", pa.int32(), False),
            pa.field("ambiguous", pa.bool_(), False),
            pa.field("by_id", pa.bool_(), False),
            pa.field("fold", pa.int8(), False),
            pa.field("use", pa.bool_(), False, {"description": "fit for training"}),
        ]
        fields += [left.schema.field(name) for name in left.columns(_CARRIED)]
        fields += [
            right.schema.field(name).with_name(f"{name}_ref") for name in right.columns(_REFERENCE)
        ]
        for label in LABELS:
            if label in left.schema.names and label in right.schema.names:
                text = {"unit": CANONICAL[label].unit, "description": f"target - reference {label}"}
                fields.append(pa.field(f"{label}_diff", pa.float32(), metadata=text))
        return pa.schema(fields)

    def pairs_of_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write the pairs of one partition aside, with the folds that they have by themselves."""
        left_key, right_key = key_column(self.target), key_column(self.reference)
        left_at, right_at, left, right = self._near_rows(pixel)

        def keys_of(rows: IntArray) -> pa.ChunkedArray:  # text that is read for few ties only
            return _take(self.reference, right_at, right, rows, [right_key])[right_key]

        matches = match(left, right, self.settings, keys_of)
        names = [left_key, *_CARRIED, *GAIA_IDS.values(), *_FLAGS]
        target = _take(self.target, left_at, left, matches.left, names)
        names = [right_key, *_REFERENCE, *_FLAGS]
        reference = _take(self.reference, right_at, right, matches.right, names)
        number = key_numbers(reference[right_key], self.settings.seed)
        smallest = smallest_of_joined(number, number, _links(target, self.settings))
        reach = self.reach_arcsec(_total_pm(reference))
        open_ = near_edge(pixel, reference[HEALPIX_COLUMN].to_numpy(), reach)
        open_ |= near_edge(pixel, target[HEALPIX_COLUMN].to_numpy(), self.settings.radii[1])
        _write_edge_pairs(_edge_file(output, key), target, smallest, number, open_)
        ambiguous = matches.n_candidates > 1
        use = ~ambiguous & _is_good(target) & _is_good(reference)
        columns: dict[str, Any] = {
            HEALPIX_COLUMN: target[HEALPIX_COLUMN],
            f"target_{left_key}": target[left_key],
            "reference_star_id": reference[right_key],
            "separation_arcsec": matches.separation_arcsec,
            "n_candidates": matches.n_candidates,
            "ambiguous": ambiguous,
            "by_id": matches.by_id,
            "fold": fold_of(smallest, self.settings.n_folds),
            "use": use,
        }
        columns |= {name: target[name] for name in self.target.columns(_CARRIED)}
        columns |= {f"{n}_ref": reference[n] for n in self.reference.columns(_REFERENCE)}
        for label in LABELS:
            if label in target.schema.names and label in reference.schema.names:
                difference = pc.subtract(target[label], reference[label])
                columns[f"{label}_diff"] = difference
                columns["use"] &= pc.is_valid(difference).to_numpy()
        pairs = pa.table(columns).cast(self.pairs_schema())
        return {
            "file": _write_pairs(output, pixel, pairs) if pairs.num_rows else None,
            "n_matched": int(np.count_nonzero(np.diff(matches.left, prepend=-1))),
            "n_stars": len(np.unique(number)),
            "ambiguous": int(ambiguous.sum()),
            "by_id": int(matches.by_id.sum()),
            "refused_by_id": matches.n_conflicts,
            "fit_for_training": int(pc.sum(pairs["use"]).as_py() or 0),
        }

    def _near_rows(self, pixel: HealpixPixel) -> tuple[_Found, _Found, pa.Table, pa.Table]:
        """Rows of both sides that can be in a pair, and the columns of them that decide."""
        target, reference, reach = self.target, self.reference, float(self.reach_arcsec())
        ranges = sorted([(pixel.first, pixel.stop), *surroundings(pixel, reach)[0]])
        reaches = partial(near_pixel, pixel, reach_arcsec=reach)
        right_at = [
            (other, rows)
            for other in reference.overlapping(ranges)
            if len(rows := reference.rows_in(other, ranges, wanted=reaches))
        ]
        deciding = ["ra", "dec"]
        if any({"pmra", "pmdec"} <= set(side.schema.names) for side in (target, reference)):
            deciding += MOTION
        if self.shared_ids:
            deciding += GAIA_IDS.values()
        columns = reference.columns([HEALPIX_COLUMN, *deciding])
        empty = reference.schema.empty_table().select(columns)
        found = [reference.take(other, rows, columns) for other, rows in right_at]
        right = pa.concat_tables(found or [empty])
        cells = target.cells(pixel) if right.num_rows else np.empty(0, dtype=np.int64)
        reaches_of = self.reach_arcsec(_total_pm(right))
        rows = rows_near(cells, right[HEALPIX_COLUMN].to_numpy(), reaches_of)
        left = target.take(pixel, rows, target.columns(deciding))
        left = left.append_column(target.schema.field(HEALPIX_COLUMN), pa.array(cells[rows]))
        return [(pixel, rows)], right_at, left, right


def _take(
    catalog: Catalog, found: _Found, known: pa.Table, wanted: IntArray, names: list[str]
) -> pa.Table:
    """Rows of those that were found, in any order, with further columns beside the known ones."""
    is_wanted = np.zeros(known.num_rows, dtype=np.bool_)
    is_wanted[wanted] = True
    unique = np.flatnonzero(is_wanted)
    place = np.cumsum(is_wanted)[wanted] - 1
    columns = [name for name in catalog.columns(names) if name not in known.schema.names]
    tables = [catalog.schema.empty_table().select(columns)]
    first = 0
    for pixel, rows in found:
        low, high = np.searchsorted(unique, (first, first + len(rows)))
        if low < high:
            tables.append(catalog.take(pixel, rows[unique[low:high] - first], columns))
        first += len(rows)
    further = pa.concat_tables(tables[1:] or tables).combine_chunks().take(pa.array(place))
    rows = known.take(pa.array(wanted))
    for name in columns:
        rows = rows.append_column(further.schema.field(name), further[name])
    return rows


def _total_pm(rows: pa.Table) -> FloatArray:
    """Total proper motions, 0 where there is none."""
    if not {"pmra", "pmdec"} <= set(rows.schema.names):
        return np.zeros(rows.num_rows)
    pmra, pmdec = (np.asarray(rows[name].to_numpy(), np.float64) for name in ("pmra", "pmdec"))
    return np.asarray(np.nan_to_num(np.hypot(pmra, pmdec)))


def _is_good(rows: pa.Table) -> NDArray[np.bool_]:
    """Rows that pass all cuts and whose repeats agree."""
    good = np.ones(rows.num_rows, dtype=bool)
    for name in set(_FLAGS) & set(rows.schema.names):
        good &= rows[name].to_numpy() == 0
    return good


def _links(targets: pa.Table, settings: CrossmatchSettings) -> tuple[IntArray, IntArray]:
    return same_targets(
        targets["ra"].to_numpy(),
        targets["dec"].to_numpy(),
        targets[HEALPIX_COLUMN].to_numpy(),
        [id_values(targets[name]) for name in GAIA_IDS.values() if name in targets.schema.names],
        *settings.radii,
    )


def _write_edge_pairs(
    path: Path, targets: pa.Table, smallest: KeyArray, number: KeyArray, is_open: BoolArray
) -> None:
    """Keep the pairs that may be joined with those of other partitions, and what they are."""
    rows = np.flatnonzero(np.isin(smallest, smallest[is_open]))
    edge = pa.table({"row": rows, "smallest": smallest[rows], "number": number[rows]})
    for name in (HEALPIX_COLUMN, "ra", "dec", *GAIA_IDS.values()):
        if name in targets.schema.names:
            edge = edge.append_column(name, targets[name].take(pa.array(rows)))
    write_piece(path, edge)


def _changed_folds(
    output: Output, pixels: Mapping[str, HealpixPixel], settings: CrossmatchSettings
) -> tuple[dict[str, _Change], int]:
    """Join the edge pairs of all partitions: where folds change, and reference stars seen again."""
    tables = [read_piece(_edge_file(output, key)) for key in pixels]
    if not tables:
        return {}, 0
    edges = pa.concat_tables(tables)
    smallest, number = edges["smallest"].to_numpy(), edges["number"].to_numpy()
    joined = smallest_of_joined(smallest, number, _links(edges, settings))
    folds = fold_of(joined, settings.n_folds)
    changes = folds != fold_of(smallest, settings.n_folds)
    found = {}
    n_stars = first = 0
    for (key, pixel), table in zip(pixels.items(), tables, strict=True):
        here = slice(first, first + table.num_rows)
        first = here.stop
        n_stars += len(np.unique(number[here]))
        at = np.flatnonzero(changes[here])
        if len(at):
            found[key] = _Change(pixel, table["row"].to_numpy()[at], folds[here][at])
    return found, n_stars - len(np.unique(number))


def _change_folds(output: Output, key: str, change: _Change) -> dict[str, Any]:
    """Write a partition of pairs with its final folds."""
    path = _partition_file(output, change.pixel)
    with partition_errors(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        pairs = file.read(use_threads=False)
    folds = pairs["fold"].to_numpy().copy()
    folds[change.rows] = change.folds
    place = pairs.schema.get_field_index("fold")
    pairs = pairs.set_column(place, pairs.schema.field("fold"), pa.array(folds, pa.int8()))
    return {"file": partition_record(output, change.pixel, pairs)}


def _write_pairs(output: Output, pixel: HealpixPixel, pairs: pa.Table) -> dict[str, Any]:
    """Write pairs aside: not even a task that outlives its worker can touch the final file."""
    name = f"{WORK}/{_partition_file(output, pixel).relative_to(output.work)}"
    record = output.write_file(name, lambda path: write_parquet(pairs, path))
    return asdict(replace(record, path=partition_path(pixel)))


def _keep_pairs(output: Output, pixel: HealpixPixel) -> None:
    """Move pairs whose folds are final into their place, unless that was done before."""
    path = output.directory / partition_path(pixel)
    with storage_errors(path), partition_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _partition_file(output, pixel).replace(path)
        except FileNotFoundError:
            if not path.is_file():
                raise


def _partition_file(output: Output, pixel: HealpixPixel) -> Path:
    return output.work / "partitions" / f"{pixel.order}-{pixel.pixel}.parquet"


def _edge_file(output: Output, key: str) -> Path:
    return output.work / "edges" / f"{key}.arrow"

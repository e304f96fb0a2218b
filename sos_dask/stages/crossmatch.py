"""Stage crossmatch: pairs of target and reference stars, with folds for training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.artifact import Manifest, Output, Recipe, Rows, atomic_path
from sos_dask.catalog import Catalog, write_partition
from sos_dask.cluster import Cluster, Report, silent
from sos_dask.crossmatch import MatchSettings, Motion, match, reach_arcsec
from sos_dask.dedupe import DedupeSettings, group
from sos_dask.errors import CatalogError
from sos_dask.folds import fold_of_stars
from sos_dask.healpix import HealpixPixel, surroundings
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN, LABELS
from sos_dask.stages.parts import (
    GAIA_IDS,
    commit_catalog,
    id_values,
    key_of,
    rank_of,
    read_piece,
    records,
    require_memory,
    run_parts,
    unless_complete,
    write_piece,
)

VERSION = 1
_MOTION = ("pmra", "pmdec", "position_epoch")
_CARRIED = ("ra", "dec", "teff", "teff_err", "logg", "logg_err", "feh", "feh_err", "snr", "rv",
            "rv_err", "phot_g_mean_mag", "distance", "ebv", "n_obs")  # fmt: skip
_REFERENCE = (*(c for c in _CARRIED if c not in ("ra", "dec", "n_obs")), "survey")


@dataclass(frozen=True)
class PairSettings:
    """Settings of the stage.

    Parameters
    ----------
    match : MatchSettings
    n_folds : int
        Folds for cross-validation; all pairs of one star are in one fold.
    seed : int
        Other seeds give other folds.
    """

    match: MatchSettings
    n_folds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class _Part:
    output: Output
    left: Catalog
    right: Catalog
    pixel: HealpixPixel
    settings: PairSettings
    reach_arcsec: float


@dataclass(frozen=True)
class _PairsPart:
    output: Output
    pixel: HealpixPixel
    first_row: int  # of the partition's pairs among all pairs


def crossmatch_recipe(left: str, right: str, settings: PairSettings) -> Recipe:
    """Recipe of `crossmatch` for catalogs of these fingerprints."""
    return Recipe(
        "crossmatch", VERSION, {"settings": asdict(settings)}, {"target": left, "reference": right}
    )


def crossmatch(
    left: Catalog,
    right: Catalog,
    directory: Path,
    settings: PairSettings,
    *,
    name: str = "pairs",
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Match a target catalog with a reference catalog.

    Parameters
    ----------
    left : Catalog
        Observations (``obs_id``) or stars (``star_id``) of the target.
    right : Catalog
        Stars of the reference (``star_id``); observations are taken too.
    directory : Path
        Where the catalog of pairs goes, on the partitions of ``left``.
    settings : PairSettings

    Returns
    -------
    Manifest
        ``rows``: target rows in, pairs out, targets without a pair dropped. ``summary``: pairs,
        distinct reference stars, ambiguous pairs, pairs by id, position matches refused by ids.

    Raises
    ------
    CatalogError
        A column is missing, or the directory holds something else.
    """
    key, right_key = key_column(left), key_column(right)
    left.require("ra", "dec", HEALPIX_COLUMN)
    right.require("ra", "dec", HEALPIX_COLUMN)
    output = Output.prepare(
        directory, crossmatch_recipe(left.fingerprint, right.fingerprint, settings), overwrite
    )
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    require_memory(cluster, left, "crossmatch")
    shared_ids = settings.match.use_gaia_id and any(
        column in left.schema.names and column in right.schema.names for column in GAIA_IDS.values()
    )
    reach = reach_arcsec(settings.match, motion_of(left), motion_of(right), shared_ids)
    parts = {
        key_of(pixel): _Part(output, left, right, pixel, settings, reach) for pixel in left.pixels
    }
    with unless_complete(output):
        run_parts(output, "matches", parts, _match_part, cluster, "crossmatch", report)
        _assign_folds(output, list(parts), settings, key)
        matched = records(output, "matches", list(parts)) or []
        starts = np.cumsum([0, *(record["n_pairs"] for record in matched)])
        finals = {
            key_of(pixel): _PairsPart(output, pixel, int(start))
            for pixel, start in zip(left.pixels, starts, strict=False)
        }
        run_parts(output, "pairs", finals, _pairs_part, cluster, "pairs", report)
        written = records(output, "pairs", list(parts)) or []
        n_out = sum(record["n_pairs"] for record in matched)
        n_matched = sum(record["n_matched"] for record in matched)
        n_in = left.n_rows
        summary = {
            "pairs": n_out,
            "reference_stars": _n_reference_stars(output, list(parts)),
            **{
                name: sum(record[name] for record in matched)
                for name in ("ambiguous", "by_id", "refused_by_id", "fit_for_training")
            },
            "reach_arcsec": reach,
        }
        commit_catalog(
            output,
            name,
            list(zip(left.pixels, written, strict=True)),
            pairs_schema(left, right, key, right_key),
            Rows(
                n_in,
                n_out,
                0,
                {"without a pair": n_in - n_matched},
                {"further pairs": n_out - n_matched},
            ),
            summary,
        )
    return output.load_manifest()


def key_column(catalog: Catalog) -> str:
    """``star_id`` or ``obs_id``, whichever a catalog has."""
    for name in ("star_id", "obs_id"):
        if name in catalog.schema.names:
            return name
    raise CatalogError(
        f"{catalog.path} has neither star_id nor obs_id",
        "Only catalogs of observations or stars can be matched.",
    )


def motion_of(catalog: Catalog) -> Motion:
    """Bounds on proper motion and epoch over a whole catalog, from the footers of its files."""

    def bound(name: str) -> float:
        limits = catalog.bounds(name) if name in catalog.schema.names else None
        return max(abs(limits[0]), abs(limits[1])) if limits else 0.0

    moving = "pmra" in catalog.schema.names and "pmdec" in catalog.schema.names
    epochs = catalog.bounds("position_epoch") if "position_epoch" in catalog.schema.names else None
    low, high = epochs or (np.nan, np.nan)
    return Motion(float(np.hypot(bound("pmra"), bound("pmdec"))) if moving else 0.0, low, high)


def pairs_schema(left: Catalog, right: Catalog, key: str, right_key: str) -> pa.Schema:
    """Schema of the pairs of two catalogs."""
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
    fields += [
        pa.field(
            f"{label}_diff",
            pa.float32(),
            metadata={"unit": CANONICAL[label].unit, "description": f"target - reference {label}"},
        )
        for label in LABELS
        if label in left.schema.names and label in right.schema.names
    ]
    return pa.schema(fields)


def _match_part(part: _Part) -> None:
    """Pairs of one partition, without folds, into an intermediate file."""
    left_key, right_key = key_column(part.left), key_column(part.right)
    left_names = [HEALPIX_COLUMN, left_key, *_CARRIED, *_MOTION, *GAIA_IDS.values()]
    right_names = [
        HEALPIX_COLUMN,
        right_key,
        "ra",
        "dec",
        *_MOTION,
        *GAIA_IDS.values(),
        *_REFERENCE,
    ]
    flags = ("quality", "flag_spread")
    left = part.left.read(part.pixel, part.left.columns([*left_names, *flags]))
    around = surroundings(part.pixel, part.reach_arcsec)[0]
    ranges = sorted([(part.pixel.first, part.pixel.stop), *around])
    right = part.right.read_ranges(ranges, part.right.columns([*right_names, *flags]))
    matches = match(left, right, part.settings.match, right_key)
    target, reference = left.take(matches.left), right.take(matches.right)
    ambiguous = matches.n_candidates > 1
    use = ~ambiguous & _is_good(target) & _is_good(reference)
    columns: dict[str, pa.Array | pa.ChunkedArray | NDArray[np.generic]] = {
        HEALPIX_COLUMN: target[HEALPIX_COLUMN],
        f"target_{left_key}": target[left_key],
        "reference_star_id": reference[right_key],
        "separation_arcsec": matches.separation_arcsec,
        "n_candidates": matches.n_candidates,
        "ambiguous": ambiguous,
        "by_id": matches.by_id,
        "fold": np.zeros(len(use), dtype=np.int8),
        "use": use,
    }
    for name in part.left.columns(_CARRIED):
        columns[name] = target[name]
    for name in part.right.columns(_REFERENCE):
        columns[f"{name}_ref"] = reference[name]
    for label in LABELS:
        if label in target.schema.names and label in reference.schema.names:
            difference = pc.subtract(target[label], reference[label])
            columns[f"{label}_diff"] = difference
            columns["use"] &= pc.is_valid(difference).to_numpy()
    schema = pairs_schema(part.left, part.right, left_key, right_key)
    pairs = pa.table(
        [
            pa.chunked_array([c])
            if isinstance(c, pa.Array)
            else pa.chunked_array([pa.array(c)])
            if isinstance(c, np.ndarray)
            else c
            for c in columns.values()
        ],
        names=list(columns),
    ).cast(schema)
    ids = {c: target[c] for c in GAIA_IDS.values() if c in target.schema.names}
    for name, column in ids.items():
        pairs = pairs.append_column(f"_{name}", column)
    write_piece(_match_file(part.output, key_of(part.pixel)), pairs)
    part.output.put_record(
        "matches",
        key_of(part.pixel),
        {
            "n_pairs": pairs.num_rows,
            "n_matched": len(np.unique(matches.left)),
            "ambiguous": int(ambiguous.sum()),
            "by_id": int(matches.by_id.sum()),
            "refused_by_id": matches.n_conflicts,
            "fit_for_training": int(pc.sum(pairs["use"]).as_py() or 0),
        },
    )


def _is_good(rows: pa.Table) -> NDArray[np.bool_]:
    """Rows that pass all cuts and whose repeats agree."""
    good = np.ones(rows.num_rows, dtype=bool)
    if "quality" in rows.schema.names:
        good &= rows["quality"].to_numpy() == 0
    if "flag_spread" in rows.schema.names:
        good &= ~rows["flag_spread"].to_numpy()
    return good


def _match_file(output: Output, key: str) -> Path:
    return output.work / "pieces" / f"{key}.arrow"


def _read_matches(output: Output, keys: list[str], columns: list[str] | None = None) -> pa.Table:
    tables = []
    for key in keys:
        table = read_piece(_match_file(output, key))
        tables.append(table if columns is None else table.select(columns))
    return pa.concat_tables(tables)


def _n_reference_stars(output: Output, keys: list[str]) -> int:
    ids = _read_matches(output, keys, ["reference_star_id"])["reference_star_id"]
    return int(pc.count_distinct(ids).as_py())


def _assign_folds(output: Output, keys: list[str], settings: PairSettings, key: str) -> None:
    """Folds of all pairs, one file: observations of one star, and pairs of one reference, together.

    The pairs are at most a few times the reference stars, so they are held at once.
    """
    path = output.work / "folds.npy"
    if path.is_file():
        return
    pairs = _read_matches(output, keys)
    ids = {
        release: id_values(pairs[f"_{column}"])
        for release, column in GAIA_IDS.items()
        if f"_{column}" in pairs.schema.names
    }
    radius = settings.match.radius_arcsec
    same = group(
        pairs["ra"].to_numpy(),
        pairs["dec"].to_numpy(),
        pairs[HEALPIX_COLUMN].to_numpy(),
        rank_of(pairs[f"target_{key}"]),
        ids,
        None,
        DedupeSettings(
            radius_arcsec=radius, id_radius_arcsec=max(radius, settings.match.id_radius_arcsec)
        ),
    )
    folds = fold_of_stars(same.primary, pairs["reference_star_id"], settings.n_folds, settings.seed)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, folds)


def _pairs_part(part: _PairsPart) -> None:
    """Final partition of pairs, with folds."""
    key = key_of(part.pixel)
    pairs = _read_matches(part.output, [key])
    stop = part.first_row + pairs.num_rows
    folds = np.load(part.output.work / "folds.npy", mmap_mode="r")[part.first_row : stop]
    names = [name for name in pairs.schema.names if not name.startswith("_gaia")]
    field = pairs.schema.field("fold")
    pairs = pairs.select(names).set_column(
        pairs.schema.get_field_index("fold"), field, pa.array(folds, pa.int8())
    )
    record = write_partition(part.output, part.pixel, pairs) if pairs.num_rows else None
    part.output.put_record("pairs", key, {"file": None if record is None else asdict(record)})

"""Make the mock sky block by block and write its five files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sos_dask.errors import StorageError
from sos_dask.simulate import sky, tables
from sos_dask.simulate.columns import COLUMNS, NativeColumn, record_dtype
from sos_dask.simulate.files import FitsTable, ParquetTable, image_hdu, table_hdu
from sos_dask.simulate.names import field_names, telescopes
from sos_dask.simulate.plan import Plan, SkySettings, make_plan, plate_generator, special_centres
from sos_dask.simulate.sky import APOGEE, GALAH, LAMOST, FloatArray, IntArray, Stars
from sos_dask.simulate.tables import Observed, Visits

NAMES = {LAMOST: "lamost", APOGEE: "apogee", GALAH: "galah"}
BLOCK_STARS = 65_536
"""Stars in memory at once (about 300 MB). It changes no byte of the output."""


def _field(name: str, kind: pa.DataType, unit: str, description: str) -> pa.Field:
    metadata = {"unit": unit, "description": description}
    return pa.field(name, kind, metadata={key: text for key, text in metadata.items() if text})


# fmt: off
GAIA_SCHEMA = pa.schema([
    _field("source_id", pa.int64(), "", "Source id of Gaia DR3"),
    _field("ra", pa.float64(), "deg", "Right ascension at J2016"),
    _field("dec", pa.float64(), "deg", "Declination at J2016"),
    _field("parallax", pa.float32(), "mas", "Parallax"),
    _field("parallax_error", pa.float32(), "mas", "Error of parallax"),
    _field("pmra", pa.float64(), "mas/yr", "Proper motion in ra, times cos(dec)"),
    _field("pmdec", pa.float64(), "mas/yr", "Proper motion in dec"),
    _field("phot_g_mean_mag", pa.float32(), "mag", "G"),
    _field("phot_bp_mean_mag", pa.float32(), "mag", "BP"),
    _field("phot_rp_mean_mag", pa.float32(), "mag", "RP"),
    _field("distance", pa.float32(), "pc", "Distance, with the error of the parallax"),
    _field("ebv", pa.float32(), "mag", "E(B-V)"),
])
TRUTH_SCHEMA = pa.schema([
    _field("survey", pa.string(), "", "lamost, apogee or galah"),
    _field("obs_id", pa.string(), "", "obsid, APSTAR_ID or sobject_id, as text"),
    _field("row", pa.int64(), "", "Row in the survey's file, from 0"),
    _field("star", pa.int64(), "", "Number of the star, the same in every survey"),
    _field("gaia_source_id", pa.int64(), "", "Gaia DR3 id, if in the file or not"),
    _field("teff", pa.float32(), "K", "True effective temperature"),
    _field("logg", pa.float32(), "dex", "True surface gravity"),
    _field("feh", pa.float32(), "dex", "True [Fe/H]"),
    _field("rv", pa.float32(), "km/s", "True radial velocity"),
    _field("distance", pa.float32(), "pc", "True distance"),
    _field("ebv", pa.float32(), "mag", "True E(B-V)"),
    _field("is_outlier", pa.bool_(), "", "The labels are wrong"),
    _field("is_special", pa.bool_(), "", "One of special_stars()"),
    _field("bias_teff", pa.float32(), "K", "Injected difference survey - truth"),
    _field("bias_logg", pa.float32(), "dex", "Injected difference survey - truth"),
    _field("bias_feh", pa.float32(), "dex", "Injected difference survey - truth"),
])
# fmt: on


def sky_files(directory: Path) -> dict[str, Path]:
    """Files that `simulate` writes, by what it calls them."""
    paths = {name: directory / f"{name}.fits" for name in NAMES.values()}
    return paths | {name: directory / f"{name}.parquet" for name in ("gaia", "truth")}


def simulate(
    settings: SkySettings,
    directory: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Path]:
    """Write a mock sky.

    Memory does not grow with its size. Files appear complete, and replace those of an earlier call.

    Parameters
    ----------
    settings : SkySettings
    directory : Path
        Made if it is not there.
    progress : callable, optional
        Called after every block with a survey's name, the rows done and all its rows.

    Returns
    -------
    dict of str to Path
        ``lamost``, ``apogee``, ``galah``: the surveys' own tables (FITS, HDU 1).
        ``gaia``: companion with distances and proper motions of every star in Gaia (Parquet,
        `GAIA_SCHEMA`; about 2 % nulls in each column but the id and the position).
        ``truth``: one row for each row of the three tables (`TRUTH_SCHEMA`), keyed by ``survey``
        and ``obs_id``. Exact duplicates are in it once.

    Raises
    ------
    StorageError
        The directory or a file cannot be written.
    """
    plan = make_plan(settings)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make directory {directory}: {error.strerror}") from error
    paths = sky_files(directory)
    with ExitStack() as stack:
        fits = {
            survey: stack.enter_context(
                FitsTable(
                    paths[name],
                    COLUMNS[survey],
                    record_dtype(survey),
                    plan.rounds[survey].n_rows,
                    name.upper(),
                    _apogee_trailer(plan) if survey == APOGEE else b"",
                )
            )
            for survey, name in NAMES.items()
        }
        gaia = stack.enter_context(ParquetTable(paths["gaia"], GAIA_SCHEMA))
        truth = stack.enter_context(ParquetTable(paths["truth"], TRUTH_SCHEMA))
        done = dict.fromkeys(NAMES, 0)
        for block in plan.blocks(BLOCK_STARS):
            made = _make_block(plan, block, settings)
            gaia.write(_gaia_table(made))
            truths, plates = [], []
            for survey, name in NAMES.items():
                visits = _visits(plan, block, made, survey, settings)
                observed = tables.SURVEYS[survey](visits)
                _write_rounds(fits[survey], visits, observed.rows)
                truths.append(_truth_table(name, visits, observed))
                plates.append(visits.plate)
                done[survey] += len(visits.row)
                if progress is not None:
                    progress(name, done[survey], plan.rounds[survey].n_rows)
            # By plate, so that the order does not depend on the blocks.
            order = np.argsort(np.concatenate(plates), kind="stable")
            truth.write(pa.concat_tables(truths).take(order))
        _write_duplicates(fits[LAMOST], plan)
        if progress is not None:
            progress(NAMES[LAMOST], settings.n_lamost, settings.n_lamost)
    return paths


@dataclass(frozen=True)
class _Block:
    """Stars of some plates, and the random numbers of their observations."""

    stars: Stars
    plate: IntArray  # of each star, from 0 in the block
    uniform: Mapping[str, FloatArray]
    normal: Mapping[str, FloatArray]
    visit_uniform: Mapping[int, Mapping[str, FloatArray]]
    visit_normal: Mapping[int, Mapping[str, FloatArray]]


def _named(names: tuple[str, ...], pieces: list[FloatArray]) -> Mapping[str, FloatArray]:
    return dict(zip(names, np.concatenate(pieces, axis=1), strict=True))


def _make_block(plan: Plan, block: slice, settings: SkySettings) -> _Block:
    uniform, normal = [], []
    visit_uniform: dict[int, list[FloatArray]] = {survey: [] for survey in NAMES}
    visit_normal: dict[int, list[FloatArray]] = {survey: [] for survey in NAMES}
    for plate in range(block.start, block.stop):
        rng = plate_generator(settings.seed, int(plan.kind[plate]), int(plan.number[plate]))
        n = int(plan.n_stars[plate])
        uniform.append(rng.random((len(sky.UNIFORMS), n)))
        normal.append(rng.standard_normal((len(sky.NORMALS), n)))
        for survey in NAMES:
            n = int(plan.rounds[survey].counts[:, plate].sum())
            visit_uniform[survey].append(rng.random((len(tables.UNIFORMS), n)))
            visit_normal[survey].append(rng.standard_normal((len(tables.NORMALS), n)))
    u, v = _named(sky.UNIFORMS, uniform), _named(sky.NORMALS, normal)
    n_stars = plan.n_stars[block]
    plate_of = np.repeat(np.arange(len(n_stars)), n_stars)
    kind = plan.kind[block][plate_of]
    ra, dec = plan.ra[block][plate_of], plan.dec[block][plate_of]
    number = plan.first_star[block.start] + np.arange(len(plate_of))
    special = kind == sky.SPECIAL
    if special.any():
        ra[special], dec[special] = special_centres()
    return _Block(
        stars=sky.make_stars(number, kind, (ra, dec), u, v, settings.uncovered),
        plate=plate_of,
        uniform=u,
        normal=v,
        visit_uniform={s: _named(tables.UNIFORMS, visit_uniform[s]) for s in NAMES},
        visit_normal={s: _named(tables.NORMALS, visit_normal[s]) for s in NAMES},
    )


def _rank_in_plate(key: FloatArray, plate: IntArray, n_stars: IntArray) -> IntArray:
    """Rank of each star by key (0 to 1) among those of its plate."""
    order = np.argsort(plate + np.minimum(key, 1.0 - 1e-9), kind="stable")
    starts = np.cumsum(n_stars) - n_stars
    rank = np.empty(len(key), dtype=np.int64)
    rank[order] = np.arange(len(key)) - starts[plate[order]]
    return rank


def _selection_key(stars: Stars, uniform: FloatArray, survey: int) -> FloatArray:
    """Small for stars that a reference prefers: bright ones, giants for APOGEE; 1 for the avoided.

    The smallest keys 1 - u^(1/w) are a sample with weights w (Efraimidis & Spirakis 2006,
    Inf. Process. Lett. 97, 181).
    """
    weight = np.exp(-np.maximum(stars.g - (13.8 if survey == APOGEE else 13.2), 0.0) / 0.8)
    if survey == APOGEE:
        weight *= np.where(stars.logg < 3.6, 3.0, 1.0)
    avoided = sky.references_avoid(stars.teff, stars.logg, stars.feh)
    key = 1.0 - uniform ** (1.0 / np.maximum(weight, 1e-6))
    return np.asarray(np.where(avoided, 1.0, key))


def _visits(plan: Plan, block: slice, made: _Block, survey: int, settings: SkySettings) -> Visits:
    """Observations of a block by a survey, by plate, round and star."""
    name = NAMES[survey]
    rounds = plan.rounds[survey]
    counts, first_row = rounds.counts[:, block], rounds.first_row[:, block]
    plate, n_stars = made.plate, plan.n_stars[block]
    key = made.uniform[name]
    if survey != LAMOST:
        key = _selection_key(made.stars, key, survey)
    seen = _rank_in_plate(key, plate, n_stars) < counts[0][plate]
    again = _rank_in_plate(np.where(seen, made.uniform[f"{name}_repeat"], 1.0), plate, n_stars)
    members, which, rows = [], [], []
    for number, (n, start) in enumerate(zip(counts, first_row, strict=True)):
        chosen = np.flatnonzero(again < n[plate]) if number else np.flatnonzero(seen)
        members.append(chosen)
        which.append(np.full(len(chosen), number, dtype=np.int64))
        rows.append(np.repeat(start - (np.cumsum(n) - n), n) + np.arange(len(chosen)))
    index = np.concatenate(members)
    # The random numbers of a plate's observations were drawn together.
    order = np.argsort(plate[index], kind="stable")
    index, round_number, row = (
        index[order],
        np.concatenate(which)[order],
        np.concatenate(rows)[order],
    )
    number = block.start + plate[index]
    return Visits(
        stars=made.stars.take(index),
        index=index,
        round=round_number,
        row=row,
        n_rows=rounds.n_rows,
        n_first=int(rounds.counts[0].sum()),
        plate=number,
        plate_ra=plan.ra[number],
        plate_dec=plan.dec[number],
        uniform=made.visit_uniform[survey],
        normal=made.visit_normal[survey],
        biased=settings.bias,
        outlier_fraction=settings.outlier_fraction,
    )


def _write_rounds(fits: FitsTable, visits: Visits, rows: NDArray[Any]) -> None:
    """Put rows at their places: those of a round are neighbours in the file."""
    order = np.argsort(visits.round, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(visits.round[order])) + 1):
        if len(part):
            fits.write(int(visits.row[part[0]]), rows[part])


def _write_duplicates(fits: FitsTable, plan: Plan) -> None:
    """Fill the last rows with exact copies of rows spread over the file."""
    rounds = plan.rounds[LAMOST]
    first, n_rows = rounds.n_distinct, rounds.n_rows
    for copy in range(first, n_rows):
        fits.write(copy, fits.read((copy - first) * first // (n_rows - first)))


def _gaia_table(made: _Block) -> pa.Table:
    stars, gap1, gap2 = made.stars, made.uniform["gap1"], made.uniform["gap2"]
    keep = stars.gaia > 0
    special = stars.kind == sky.SPECIAL
    error, distance = sky.visible_distance(stars, made.normal["parallax"])

    def gap(low: float) -> NDArray[np.bool_]:
        return np.asarray((gap1 >= low) & (gap1 < low + 0.02) & ~special)

    values = [
        (stars.gaia, None),
        (stars.ra, None),
        (stars.dec, None),
        (1000.0 / stars.distance + error * made.normal["parallax"], gap(0.0)),
        (error, gap(0.0)),
        (stars.pmra, gap(0.0)),
        (stars.pmdec, gap(0.0)),
        (stars.g, gap(0.1)),
        (stars.bp + 0.004 * made.normal["bp"], gap(0.2)),
        (stars.rp + 0.004 * made.normal["rp"], gap(0.2)),
        (distance, gap(0.0) | gap(0.3)),
        (stars.ebv * np.exp(0.1 * made.normal["rp"]), (gap2 < 0.03) & ~special),
    ]
    return _table(GAIA_SCHEMA, values, keep)


def _truth_table(name: str, visits: Visits, observed: Observed) -> pa.Table:
    stars, n = visits.stars, len(visits.row)
    obs_id = pa.array(observed.obs_id)
    columns = [
        pa.array(np.full(n, name)),
        obs_id.cast(pa.string()),
        pa.array(visits.row),
        pa.array(stars.number),
        pa.array(stars.gaia, mask=stars.gaia == 0),
    ]
    for value in (stars.teff, stars.logg, stars.feh, stars.rv, stars.distance, stars.ebv):
        columns.append(pa.array(value.astype(np.float32)))
    columns += [pa.array(visits.is_outlier), pa.array(visits.special)]
    columns += [pa.array(column.astype(np.float32)) for column in observed.bias.T]
    return pa.Table.from_arrays(columns, schema=TRUTH_SCHEMA)


def _table(
    schema: pa.Schema,
    values: list[tuple[NDArray[Any], NDArray[np.bool_] | None]],
    keep: NDArray[np.bool_],
) -> pa.Table:
    columns = []
    for field, (value, gap) in zip(schema, values, strict=True):
        typed = value[keep].astype(field.type.to_pandas_dtype())
        columns.append(pa.array(typed, mask=None if gap is None else gap[keep]))
    return pa.Table.from_arrays(columns, schema=schema)


def _apogee_trailer(plan: Plan) -> bytes:
    """HDUs 2 to 4 of allStar: an image, one row about the vectors, and the fields."""
    text = [
        NativeColumn("PARAM_SYMBOL", "144A", "", ()),
        NativeColumn("ELEM_SYMBOL", "54A", "", ()),
        NativeColumn("PARAM_VALUE", "9E", "", ()),
    ]
    arrays = np.zeros(1, dtype=[column.dtype for column in text])
    symbols = b"TEFF LOGG LOG10VDOP METALS C N ALPHA LGVSINI O".split()
    arrays["PARAM_SYMBOL"] = b"".join(symbol.ljust(16) for symbol in symbols)
    arrays["ELEM_SYMBOL"] = b"C CIN O NaMgAlSiP S K CaTiTiV CrMnFeCoNiCuGeRbCeNdYbC1"
    fields = [
        NativeColumn("TELESCOPE", "6A", "", ()),
        NativeColumn("FIELD", "16A", "", ()),
        NativeColumn("ASPCAP_VERSION", "16A", "", ()),
    ]
    used = np.flatnonzero((plan.rounds[APOGEE].counts[0] > 0) & (plan.kind != sky.SPECIAL))
    rows = np.zeros(len(used), dtype=[column.dtype for column in fields])
    rows["TELESCOPE"] = telescopes(plan.dec[used])
    rows["FIELD"] = field_names(plan.ra[used], plan.dec[used])
    rows["ASPCAP_VERSION"] = b"synspec_rev1"
    return (
        image_hdu(np.zeros(360, dtype=np.int32))
        + table_hdu(text, arrays, "ARRAYS")
        + table_hdu(fields, rows, "FIELDS")
    )

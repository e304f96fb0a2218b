"""Make the mock sky block by block, and write its files: complete, or not there at all.

The demonstration is made of it: such a sky with a job file, and the comparison with the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask.columns import BoolArray, FloatArray, IntArray
from sos_dask.errors import StorageError
from sos_dask.run.cluster import Report, silent
from sos_dask.schema import LABELS
from sos_dask.simulate import shapes, sky, surveys
from sos_dask.simulate.sky import APOGEE, LAMOST, RVS, Draws, Plates, SkySettings, Stars
from sos_dask.simulate.surveys import ALL_SURVEYS, SURVEYS, TABLES, Records, Visits
from sos_dask.stats.numbers import binned_quantiles, bins_of, rms_of_medians
from sos_dask.storage.artifact import atomic_path, storage_errors, write_text
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import canonical_json

BLOCK_STARS = 65_536
"""Stars in memory at once (about 300 MB). It changes no byte of the output."""
_ROW_GROUP = 131_072
# Where stars of all kinds are many: 95 % of the overlap; the sparse edges are outside.
DENSE = {"teff": (4000.0, 6800.0), "logg": (1.2, 5.0), "feh": (-1.2, 0.2)}
N_BINS = 20
MIN_STARS_A_BIN = 50
_FITS_BLOCK = 2880


def sky_files(directory: Path) -> dict[str, Path]:
    """Files that `simulate` can write, by what it calls them."""
    paths = {survey.name: directory / f"{survey.name}.fits" for survey in ALL_SURVEYS.values()}
    return paths | {name: directory / f"{name}.parquet" for name in ("gaia", "truth", "members")}


def simulate(settings: SkySettings, directory: Path, progress: Report = silent) -> dict[str, Path]:
    """Write a mock sky.

    Memory does not grow with its size. Files appear complete, and replace those of an earlier call.

    Parameters
    ----------
    directory : Path
        Made if it is not there.
    progress : callable, optional
        Called after every block with a survey's name, the rows done and all its rows.

    Returns
    -------
    dict of str to Path
        ``lamost``, ``apogee``, ``galah``: the surveys' own tables (FITS, HDU 1), and ``rave`` and
        ``rvs`` where the settings ask for them; else files of these names are removed.
        ``gaia``: companion with distances and proper motions of every star in Gaia (Parquet;
        about 2 % nulls in each column but the id and the position).
        ``truth``: one row for each row of these tables (Parquet), keyed by ``survey`` and
        ``obs_id``. Exact duplicates are in it once. Of a sky with shapes it tells of every row
        whether the references avoid such stars (``is_avoided``), and ``bias_rv`` (km/s); of one
        with clusters or binaries ``cluster`` and ``rv_amplitude`` (km/s).
        ``members``: Gaia id, place and cluster of the stars in clusters, where there are any.

    Raises
    ------
    StorageError
        The directory or a file cannot be written.
    """
    plates = sky.make_plates(settings)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make directory {directory}: {error.strerror}") from error
    paths = sky_files(directory)
    observed = {number: ALL_SURVEYS[number] for number in plates.counts}
    done = dict.fromkeys(observed, 0)
    with ExitStack() as stack:
        opened = stack.enter_context
        write = {of: opened(_fits_table(paths[by.name], of, plates)) for of, by in observed.items()}
        gaia, truth = (opened(_parquet_file(paths[name])) for name in ("gaia", "truth"))
        members = opened(_parquet_file(paths["members"])) if settings.n_clusters else None
        for block in plates.blocks(BLOCK_STARS):
            made = _make_block(plates, block, settings)
            gaia(_gaia_table(made))
            if members is not None:
                members(_members_table(made.stars))
            truths = []
            for number, survey in observed.items():
                visits = _visits(plates, block, made, number, settings)
                rows, obs_id = TABLES[number](visits)
                for turn in np.unique(visits.round):
                    here = np.flatnonzero(visits.round == turn)  # neighbours in the file
                    write[number](int(visits.row[here[0]]), rows[here])
                truths.append(_truth_table(visits, obs_id))
                done[number] += len(rows)
                progress(survey.name, done[number], plates.n_rows[number])
            table = pa.concat_tables(truths)  # by plate: the order does not depend on the blocks
            plate = made.plate[table["star"].to_numpy() - made.stars.number[0]]
            truth(table.take(np.argsort(plate, kind="stable")))
    progress(SURVEYS[LAMOST].name, settings.n_lamost, settings.n_lamost)
    names = {survey.name for survey in ALL_SURVEYS.values() if survey not in observed.values()}
    for name in names | ({"members"} if not settings.n_clusters else set()):
        paths.pop(name).unlink(missing_ok=True)  # of other stars
    return paths


# Files


@contextmanager
def _parquet_file(path: Path) -> Iterator[Callable[[pa.Table], None]]:
    """A Parquet file whose row groups are of one size, however its rows come."""
    # Dictionaries of floats cost ten times the processor time and more bytes.
    options: Any = {"compression": "zstd", "compression_level": 1, "use_dictionary": ["survey"]}
    waiting: list[pa.Table] = []
    writers: list[pq.ParquetWriter] = []  # one, made when the columns are known
    with atomic_path(path) as hidden, ExitStack() as stack:

        def write(*tables: pa.Table, least: int = _ROW_GROUP) -> None:
            table = pa.concat_tables([*waiting, *tables])
            if not writers:
                writer = pq.ParquetWriter(hidden, table.schema, **options)
                writers.append(stack.enter_context(writer))
            while table.num_rows >= least:
                # A copy in one piece: page limits, and so bytes, depend on the chunks of a column.
                writers[0].write_table(table.slice(0, _ROW_GROUP).combine_chunks(), _ROW_GROUP)
                table = table.slice(_ROW_GROUP)
            waiting[:] = [table]

        yield write
        write(least=1)


@contextmanager
def _fits_table(path: Path, survey: int, plates: Plates) -> Iterator[Callable[[int, Records], Any]]:
    """A FITS file with the table of a survey in HDU 1; in that of APOGEE three more follow.

    What it gives writes rows at their place. The last rows are exact copies of others.
    """
    from astropy.io import fits

    name = ALL_SURVEYS[survey].name.upper()
    table = fits.BinTableHDU.from_columns(surveys.columns(survey), nrows=0, name=name)
    table.header["NAXIS2"] = n_rows = plates.n_rows[survey]
    size = table.header["NAXIS1"]
    header = (fits.PrimaryHDU().header.tostring() + table.header.tostring()).encode("ascii")
    with atomic_path(path) as hidden:
        with hidden.open("w+b") as file:
            file.write(header)

            def write(first_row: int, rows: Records) -> None:
                with storage_errors(path):  # here: other files are open, which would be named
                    file.seek(len(header) + first_row * size)
                    file.write(np.ascontiguousarray(rows).data)

            yield write
            n_distinct = int(plates.counts[survey].sum())
            for row in range(n_distinct, n_rows):
                original = (row - n_distinct) * n_distinct // (n_rows - n_distinct)
                file.seek(len(header) + original * size)
                write(row, np.frombuffer(file.read(size), np.uint8))
            end = len(header) + n_rows * size
            file.truncate(end + -end % _FITS_BLOCK)
        if survey == APOGEE:
            used = np.flatnonzero((plates.counts[APOGEE][0] > 0) & (plates.kind != sky.SPECIAL))
            fields = np.zeros(len(used), dtype=[("TELESCOPE", "S6"), ("FIELD", "S16")])
            fields["TELESCOPE"] = surveys.telescopes(plates.dec[used])
            fields["FIELD"] = surveys.field_names(plates.ra[used], plates.dec[used])
            symbols = np.array([(b"C N O Mg",)], dtype=[("ELEM_SYMBOL", "S54")])
            with fits.open(hidden, mode="append") as hdus:
                hdus.append(fits.ImageHDU(np.zeros(360, dtype=np.int32)))
                hdus.append(fits.BinTableHDU(symbols, name="ARRAYS"))
                hdus.append(fits.BinTableHDU(fields, name="FIELDS"))


# Blocks


@dataclass(frozen=True)
class _Block:
    """Stars of some plates, and the random numbers of their observations by survey."""

    stars: Stars
    plate: IntArray  # of each star
    uniform: Draws
    normal: Draws
    visits: Mapping[int, tuple[Draws, Draws]]


def _make_block(plates: Plates, block: slice, settings: SkySettings) -> _Block:
    of_surveys = [surveys.UNIFORMS, surveys.NORMALS] * len(plates.counts)
    names: list[Sequence[str]] = [sky.UNIFORMS, sky.NORMALS, *of_surveys, sky.FURTHER_UNIFORMS, ()]
    drawn: list[list[FloatArray]] = [[] for _ in names]
    for plate in range(block.start, block.stop):
        rng = sky.generator(
            settings.seed, sky.PLATE_STREAM, plates.kind[plate], plates.number[plate]
        )
        numbers = [plates.n_stars[plate]]
        numbers += [counts[:, plate].sum() for counts in plates.counts.values()] + numbers
        for place, number in enumerate(np.repeat(numbers, 2)):
            draw = rng.standard_normal if place % 2 else rng.random
            drawn[place].append(draw((len(names[place]), number)))
    uniform, normal, *draws, further, _ = (
        dict(zip(own, np.concatenate(pieces, axis=1), strict=True))
        for own, pieces in zip(names, drawn, strict=True)
    )
    visits = dict(zip(plates.counts, zip(draws[::2], draws[1::2], strict=True), strict=True))
    plate_of = np.repeat(np.arange(block.start, block.stop), plates.n_stars[block])
    stars = sky.make_stars(plates, plate_of, uniform, normal, settings)
    return _Block(stars, plate_of, uniform | further, normal, visits)


def _selection_key(
    stars: Stars, uniform: FloatArray, survey: int, settings: SkySettings
) -> FloatArray:
    """Small for stars that a reference prefers: bright ones, giants for APOGEE; 1 for the avoided.

    The smallest keys 1 - u^(1/w) are a sample with weights w (Efraimidis & Spirakis 2006,
    Inf. Process. Lett. 97, 181).
    """
    weight = np.exp(-np.maximum(stars.g - (13.8 if survey == APOGEE else 13.2), 0.0) / 0.8)
    if survey == APOGEE:
        weight *= np.where(stars.logg < 3.6, 3.0, 1.0)
    weight *= shapes.preference(settings, stars.g, stars.distance, stars.feh)
    key = 1.0 - uniform ** (1.0 / np.maximum(weight, 1e-6))
    if narrow := "narrow" in settings.shapes:
        key = np.minimum(key, 1.0 - 2e-9)  # even the least preferred come before the avoided
    return np.where(
        sky.references_avoid(stars.teff, stars.logg, stars.feh, narrow=narrow), 1.0, key
    )


def _visits(
    plates: Plates, block: slice, made: _Block, survey: int, settings: SkySettings
) -> Visits:
    """Observations of a block by a survey, by plate, round and star."""
    name, counts = ALL_SURVEYS[survey].name, plates.counts[survey]
    n_stars, plate = plates.n_stars[block], made.plate
    starts = np.repeat(np.cumsum(n_stars) - n_stars, n_stars)

    def rank(key: FloatArray) -> IntArray:
        """Rank of each star by key (0 to 1) among those of its plate."""
        order = np.argsort(plate - block.start + np.minimum(key, 1.0 - 1e-9), kind="stable")
        found = np.empty(len(key), dtype=np.int64)
        found[order] = np.arange(len(key)) - starts
        return found

    key = made.uniform[name]
    if survey != LAMOST:
        key = _selection_key(made.stars, key, survey, settings)
    if survey == RVS:
        key = np.where(made.stars.gaia == 0, 1.0, key)
    seen = rank(key) < counts[0][plate]
    again = rank(np.where(seen, made.uniform[f"{name}_repeat"], 1.0))
    first_rows = plates.first_rows(survey)[:, block]
    found = []
    for number, (n, first) in enumerate(zip(counts[:, block], first_rows, strict=True)):
        chosen = np.flatnonzero(again < counts[number][plate] if number else seen)
        row = np.repeat(first - (np.cumsum(n) - n), n) + np.arange(len(chosen))
        found.append([chosen, np.full(len(chosen), number), row])
    together = np.concatenate(found, axis=1)
    # The random numbers of a plate's observations were drawn together.
    star, turn, row = together[:, np.argsort(plate[together[0]], kind="stable")]
    return Visits(
        ALL_SURVEYS[survey], settings, made.stars.take(star), star, turn, row, int(counts[0].sum()),
        plates.ra[plate[star]], plates.dec[plate[star]], *made.visits[survey],
    )  # fmt: skip


def _table(name: str, values: Mapping[str, Any], null: Mapping[str, BoolArray]) -> pa.Table:
    """Rows of a Parquet file, null where the mask of a column says so."""
    fields, arrays = [], []
    for line in surveys.layout(name).splitlines():
        column, kind, unit, description = (text.strip() for text in line.split("|"))
        metadata = ({"unit": unit} if unit else {}) | {"description": description}
        fields.append(pa.field(column, pa.type_for_alias(kind), metadata=metadata))
        arrays.append(pa.array(values[column], fields[-1].type, mask=null.get(column)))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _gaia_table(made: _Block) -> pa.Table:
    stars, normal = made.stars, made.normal
    parallax, error, distance = stars.gaia_distance(normal["parallax"], normal["parallax"])
    own = ("ra", "dec", "pmra", "pmdec")
    values = {
        "source_id": stars.gaia, **{name: getattr(stars, name) for name in own},
        "parallax": parallax, "parallax_error": error,
        "phot_g_mean_mag": stars.g, "phot_bp_mean_mag": stars.bp + 0.004 * normal["bp"],
        "phot_rp_mean_mag": stars.rp + 0.004 * normal["rp"], "distance": distance,
        "ebv": stars.ebv * np.exp(0.1 * normal["rp"]),
    }  # fmt: skip

    def gap(low: float, high: float, number: str = "gap1") -> BoolArray:
        drawn = made.uniform[number]
        return np.asarray((drawn >= low) & (drawn < high) & (stars.kind != sky.SPECIAL))

    null = dict.fromkeys(("parallax", "parallax_error", "pmra", "pmdec"), gap(0.0, 0.02))
    null |= {"phot_g_mean_mag": gap(0.1, 0.12), "ebv": gap(0.0, 0.03, "gap2")}
    null |= dict.fromkeys(("phot_bp_mean_mag", "phot_rp_mean_mag"), gap(0.2, 0.22))
    null["distance"] = gap(0.0, 0.02) | gap(0.3, 0.32)
    return _table("gaia", values, null).filter(pa.array(stars.gaia > 0))


def _members_table(stars: Stars) -> pa.Table:
    some = stars.take(np.flatnonzero((stars.cluster > 0) & (stars.gaia > 0)))
    names = [f"cluster-{number}" for number in some.cluster.tolist()]
    return _table("members", {"source_id": some.gaia, **vars(some), "cluster": names}, {})


def _truth_table(visits: Visits, obs_id: NDArray[Any]) -> pa.Table:
    stars = visits.stars
    own = ("teff", "logg", "feh", "rv", "distance", "ebv")
    values = {
        "survey": [visits.survey.name] * len(obs_id), "obs_id": pa.array(obs_id).cast(pa.string()),
        "row": visits.row, "star": stars.number, "gaia_source_id": stars.gaia,
        **{name: getattr(stars, name) for name in own},
        "is_outlier": visits.outlier, "is_special": visits.special,
        **{f"bias_{label}": visits.bias[:, place] for place, label in enumerate(LABELS)},
    }  # fmt: skip
    table = _table("truth", values, {"gaia_source_id": stars.gaia == 0})
    if visits.settings.n_clusters or visits.settings.binaries:
        table = table.append_column("cluster", pa.array(stars.cluster))
        table = table.append_column("rv_amplitude", pa.array(stars.amplitude))
    if not visits.settings.shapes:
        return table
    narrow = "narrow" in visits.settings.shapes
    avoided = sky.references_avoid(stars.teff, stars.logg, stars.feh, narrow=narrow)
    table = table.append_column("is_avoided", pa.array(avoided))
    return table.append_column("bias_rv", pa.array(visits.bias_rv.astype(np.float32)))


# The demonstration


def prepare(
    store: Path, n_lamost: int, seed: int, report: Report = silent, shapes: Sequence[Any] = ()
) -> Path:
    """Simulate the sky of the demonstration, unless it is there, and write its job file.

    The job file, in ``store``, is returned.
    """
    sky = store / "sky"
    given: dict[str, Any] = {"n_lamost": n_lamost, "seed": seed}
    settings = SkySettings(**given, sky=tuple(shapes))
    if shapes:
        given["sky"] = list(shapes)
    wanted = canonical_json(given).decode()
    done = sky / "settings.json"
    if not done.is_file() or done.read_text("utf-8") != wanted:
        done.unlink(missing_ok=True)
        simulate(settings, sky, lambda survey, *rows: report(f"simulate {survey}", *rows))
        write_text(done, wanted)
    job = store / "demo.toml"
    template = resources.files("sos_dask") / "templates" / "demo.toml"
    write_text(job, template.read_text("utf-8"))
    return job


def against_truth(corrected: Path, truth: Path) -> list[dict[str, Any]]:
    """Compare corrected LAMOST labels with the truth of the simulation, in the dense region.

    Rows that fail a quality cut, outliers and rows without a correction are left out. The bins are
    equal parts of the dense region in the observed labels: ``n_bins`` with enough rows, ``n`` rows
    in them, and the rms of the medians of label - truth (in the unit of the label) before and
    after the correction.
    """
    of_lamost = (pc.field("survey") == "lamost") & ~pc.field("is_outlier")
    known = pq.read_table(truth, columns=["obs_id", *LABELS], filters=of_lamost)
    known = known.set_column(0, "obs_id", known["obs_id"].cast(pa.int64()))
    catalog = Catalog.open(corrected)
    columns = ["quality", "obs_id", *LABELS, *(f"{label}_sos" for label in LABELS)]
    rows = pa.concat_tables([catalog.read(pixel, columns) for pixel in catalog.pixels])
    rows = rows.filter((pc.field("quality") == 0) & pc.field("feh_sos").is_valid())
    both = rows.join(known, "obs_id", join_type="inner", right_suffix="_true")
    before, after, true_labels = (
        np.stack([both[f"{label}{end}"].to_numpy() for label in LABELS], axis=1)
        for end in ("", "_sos", "_true")
    )
    low, high = np.array([DENSE[label] for label in LABELS]).T
    inside = ((before >= low) & (before < high)).all(axis=1)
    found = []
    for (number, label), (other, binned_by) in product(enumerate(LABELS), repeat=2):
        bins = bins_of(before[inside, other], np.linspace(*DENSE[binned_by], N_BINS + 1))
        row: dict[str, Any] = {"label": label, "binned_by": binned_by}
        for name, labels in (("rms_before", before), ("rms_after", after)):
            some = binned_quantiles(bins, (labels - true_labels)[inside, number], N_BINS)
            used = some.n[some.n >= MIN_STARS_A_BIN]
            row |= {"n_bins": len(used), "n": int(used.sum())}
            row[name] = rms_of_medians(some.n, some.median, MIN_STARS_A_BIN)[0] or math.nan
        found.append(row)
    return found

"""What the steps start from: the simulated sky, our catalogs of it, and the inputs of the peers.

Everything is made once and kept; what is there and fits the settings is left alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sos_dask.run.cluster import Cluster, start
from sos_dask.schema import HEALPIX_COLUMN, LABELS
from sos_dask.simulate import SkySettings, simulate
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.stars.group import DedupeSettings
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog, write_partition
from sos_dask.storage.manifest import Recipe
from sos_dask.surveys.definition import load_survey
from tests.skies import commit

RADIUS_ARCSEC = 1.0
MARGIN_ARCSEC = 5.0
REPEAT_ARCSEC = 1.5
TREES = {"n_rounds": 500, "max_depth": 6, "learning_rate": 0.02}
SURVEYS = {"lamost": "lamost-dr11-lrs", "apogee": "apogee-dr17", "galah": "galah-dr4"}
MOTION = ("pmra", "pmdec", "position_epoch")
# What our pairs hold of each side, so that nobody carries more than the others.
CARRIED = ("ra", "dec", "teff", "teff_err", "logg", "logg_err", "feh", "feh_err", "snr", "rv",
           "rv_err", "phot_g_mean_mag")  # fmt: skip
CARRIED_REFERENCE = (*CARRIED, "distance", "ebv")
_IMPORT_FILE_ROWS = 1_000_000


@dataclass(frozen=True)
class Place:
    """The folder of a run of the benchmarks and its settings.

    Parameters
    ----------
    out : Path
    rows : int
        Of LAMOST.
    n_pairs : int
        That `train` uses.
    workers : int
    """

    out: Path
    rows: int
    n_pairs: int
    workers: int

    @property
    def sky(self) -> Path:
        """The surveys' own files."""
        return self.out / "sky"

    def ours(self, name: str) -> Path:
        """A catalog or model of ours that other steps use."""
        return self.out / "ours" / name

    def peers(self, name: str) -> Path:
        """An input of a peer."""
        return self.out / "peers" / name

    def to_json(self) -> str:
        """The settings, for `main` in another process."""
        return json.dumps({**asdict(self), "out": str(self.out)})


def sky(place: Place, cluster: Cluster) -> None:
    """Simulate the surveys' files, unless they are there with these settings."""
    settings = SkySettings(n_lamost=place.rows)
    make_once(
        place.sky,
        settings.as_json,
        lambda folder: simulate(settings, folder, lambda *done: _say("simulate %s: %d/%d", *done)),
    )


def observations(place: Place, cluster: Cluster) -> None:
    """Our catalog of the LAMOST rows."""
    from sos_dask.stages.ingest import ingest

    ingest(
        load_survey(SURVEYS["lamost"]),
        [place.sky / "lamost.fits"],
        place.ours("lamost"),
        name="lamost",
        overwrite=True,
        cluster=cluster,
    )


def reference(place: Place, cluster: Cluster) -> None:
    """Our union of APOGEE and GALAH, one row a star."""
    from sos_dask.api import dedupe
    from sos_dask.api import reference as unite
    from sos_dask.stages.ingest import ingest
    from sos_dask.stages.reference import ReferenceSettings

    stars = {}
    for name in ("apogee", "galah"):
        survey, path = load_survey(SURVEYS[name]), place.ours(name)
        files = [place.sky / f"{name}.fits"]
        ingest(survey, files, path, name=name, overwrite=True, cluster=cluster)
        dedupe(
            Catalog.open(path),
            place.ours(f"{name}.stars"),
            DedupeSettings(),
            overwrite=True,
            cluster=cluster,
        )
        stars[name] = Catalog.open(place.ours(f"{name}.stars"))
    settings = ReferenceSettings(method="precedence", order=tuple(stars), offsets={})
    unite(stars, place.ours("reference"), settings, overwrite=True, cluster=cluster)


def plain(place: Place, cluster: Cluster) -> None:
    """The reference without proper motions and epochs: all that the peers look at is positions."""
    from sos_dask.api import margin
    from sos_dask.stages.attach import MarginSettings

    source = Catalog.open(place.ours("reference"))
    names = [name for name in source.schema.names if name not in MOTION]
    schema = pa.schema([source.schema.field(name) for name in names])
    _derive(
        source,
        place.ours("plain"),
        schema,
        {"without": list(MOTION)},
        lambda pixel: source.read(pixel, names),
    )
    margin(
        Catalog.open(place.ours("plain")),
        place.ours("plain.collection"),
        MarginSettings(radius_arcsec=MARGIN_ARCSEC),
        overwrite=True,
        cluster=cluster,
    )


def pairs(place: Place, cluster: Cluster) -> None:
    """Pairs of LAMOST and the reference: exactly so many that can be used for training."""
    from sos_dask.api import crossmatch

    crossmatch(
        Catalog.open(place.ours("lamost")),
        Catalog.open(place.ours("reference")),
        place.ours("pairs.all"),
        CrossmatchSettings(radius_arcsec=RADIUS_ARCSEC),
        overwrite=True,
        cluster=cluster,
    )
    source = Catalog.open(place.ours("pairs.all"))
    rows = pa.concat_tables([source.read(pixel) for pixel in source.pixels])
    rows = rows.filter(rows["use"])
    n, wanted = rows.num_rows, place.n_pairs
    # Where there are too few, they are used several times, with labels a little apart.
    chosen = np.arange(wanted) * n // wanted
    rows = rows.take(pa.array(chosen))
    rng = np.random.default_rng(1)
    for label, width in zip(LABELS, (30.0, 0.05, 0.05), strict=True):
        again = np.concatenate([[False], chosen[1:] == chosen[:-1]])
        values = rows[label].to_numpy() + np.where(again, width * rng.standard_normal(wanted), 0.0)
        index = rows.schema.get_field_index(label)
        rows = rows.set_column(index, rows.schema.field(label), pa.array(values.astype(np.float32)))
    cells = rows[HEALPIX_COLUMN].to_numpy()

    def of_pixel(pixel: Any) -> pa.Table:
        first, stop = np.searchsorted(cells, [pixel.first, pixel.stop])
        return rows.slice(first, stop - first)

    _derive(source, place.ours("pairs"), source.schema, {"n_pairs": wanted}, of_pixel)


def model(place: Place, cluster: Cluster) -> None:
    """A boosted model of the pairs."""
    from sos_dask.api import train
    from sos_dask.stages.train import TrainSettings

    settings = TrainSettings(method="boosted", params=TREES, validation="holdout")
    train(
        Catalog.open(place.ours("pairs")),
        place.ours("model"),
        settings,
        overwrite=True,
        cluster=cluster,
    )


def errors(place: Place, cluster: Cluster) -> None:
    """The error model of that model."""
    from tests.steps import uncertainty

    uncertainty(
        place.ours("model"),
        Catalog.open(place.ours("pairs")),
        place.ours("errors"),
        overwrite=True,
    )


def import_files(place: Place, cluster: Cluster) -> None:
    """LAMOST as Parquet files in the order of the FITS file: the columns that we read of it."""
    columns = load_survey(SURVEYS["lamost"]).columns
    wanted = {name: column.sources[0] for name, column in columns.items()}

    def write(folder: Path) -> None:
        from astropy.io import fits

        with fits.open(place.sky / "lamost.fits", memmap=True) as file:
            data = file[1].data
            for number, first in enumerate(range(0, len(data), _IMPORT_FILE_ROWS)):
                rows = data[first : first + _IMPORT_FILE_ROWS]
                table = pa.table({name: _native(rows, source) for name, source in wanted.items()})
                pq.write_table(table, folder / f"{number:04d}.parquet", **PARQUET)

    make_once(place.peers("import"), {"sky": _settings_of(place.sky)}, write)


def fits_files(place: Place, cluster: Cluster) -> None:
    """Both sides of the crossmatch as FITS tables with the columns that our pairs hold."""
    left, right = Catalog.open(place.ours("lamost")), Catalog.open(place.ours("plain"))

    def write(folder: Path) -> None:
        _write_fits(left, ("obs_id", *left.columns(CARRIED)), folder / "left.fits")
        _write_fits(right, ("star_id", *right.columns(CARRIED_REFERENCE)), folder / "right.fits")

    wanted = {"left": left.fingerprint, "right": right.fingerprint}
    make_once(place.peers("fits"), wanted, write)


def star_files(place: Place, cluster: Cluster) -> None:
    """LAMOST with the true number of every row's star, for a group-by with perfect knowledge."""
    source = Catalog.open(place.ours("lamost"))

    def write(folder: Path) -> None:
        known = true_stars(place)
        keys = known["obs_id"].to_numpy()
        for number, pixel in enumerate(source.pixels):
            rows = source.read(pixel, ("obs_id", *source.columns(CARRIED)))
            star = known["star"].take(pa.array(np.searchsorted(keys, rows["obs_id"].to_numpy())))
            table = rows.append_column("star", star)
            pq.write_table(table, folder / f"{number:04d}.parquet", **PARQUET)

    make_once(place.peers("stars"), {"lamost": source.fingerprint}, write)


def true_stars(place: Place) -> pa.Table:
    """``obs_id`` (sorted) and number of the star, of every LAMOST row of the simulation."""
    dataset = pq.ParquetFile(place.sky / "truth.parquet")
    pieces = []
    for batch in dataset.iter_batches(columns=["survey", "obs_id", "star"]):
        batch = batch.filter(pc.equal(batch["survey"], "lamost"))
        pieces.append(pa.table({"obs_id": batch["obs_id"].cast(pa.int64()), "star": batch["star"]}))
    return pa.concat_tables(pieces).sort_by("obs_id")


ITEMS: Mapping[str, tuple[Callable[[Place, Cluster], None], Sequence[str]]] = {
    "sky": (sky, ()),
    "observations": (observations, ("sky",)),
    "reference": (reference, ("sky",)),
    "plain": (plain, ("reference",)),
    "pairs": (pairs, ("observations", "reference")),
    "model": (model, ("pairs",)),
    "errors": (errors, ("model",)),
    "import": (import_files, ("sky",)),
    "fits": (fits_files, ("observations", "plain")),
    "stars": (star_files, ("observations",)),
}

# As our partitions are written: without dictionaries, which cost numbers ten times the time.
PARQUET: Mapping[str, Any] = {
    "row_group_size": 1 << 16,
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": ["class", "subclass"],
}


def in_order(wanted: Sequence[str]) -> list[str]:
    """Items and all that they need, those that are needed first."""
    found: list[str] = []
    for name in wanted:
        found += [item for item in in_order(ITEMS[name][1]) if item not in found]
        if name not in found:
            found.append(name)
    return found


def make_once(folder: Path, settings: Mapping[str, Any], make: Callable[[Path], Any]) -> None:
    """Make a folder unless it is there with these settings."""
    if _settings_of(folder) == json.loads(json.dumps(settings)):
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    make(folder)
    (folder / "settings.json").write_text(json.dumps(settings, indent=1))


def _settings_of(folder: Path) -> Any:
    path = folder / "settings.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _derive(
    source: Catalog,
    path: Path,
    schema: pa.Schema,
    params: Mapping[str, Any],
    rows_of: Callable[[Any], pa.Table],
) -> None:
    """Write a catalog on the partitions of another."""
    recipe = Recipe("bench", 1, params, {"source": source.fingerprint})
    output = Output.prepare(path, recipe, overwrite=True)
    if output.complete:
        return
    done = []
    for pixel in source.pixels:
        table = rows_of(pixel)
        if table.num_rows:
            record = write_partition(output, pixel, table.combine_chunks())
            done.append((pixel, {"file": asdict(record)}))
    commit(output, path.name, [one for one, _ in done], [one for _, one in done], schema)


def _native(rows: Any, name: str) -> pa.Array:
    """A column of a FITS table in the byte order of the machine."""
    values = np.asarray(rows[name])
    if values.dtype.kind in "SU":
        return pa.array(np.char.strip(values.astype("U")).tolist(), pa.string())
    return pa.array(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="))))


def _write_fits(catalog: Catalog, names: Sequence[str], path: Path) -> None:
    """A catalog as one FITS table, partition after partition; null becomes NaN."""
    from astropy.io import fits

    codes = {pa.int64(): "K", pa.float64(): "D", pa.float32(): "E", pa.int32(): "J"}
    kinds = {"K": ">i8", "D": ">f8", "E": ">f4", "J": ">i4"}
    columns, dtypes = [], []
    for name in names:
        code = codes.get(catalog.schema.field(name).type)
        width = 0 if code else max(_lengths(catalog, name))
        columns.append(fits.Column(name, format=code or f"{width}A"))
        dtypes.append((name, kinds[code] if code else f"S{width}"))
    dtype = np.dtype(dtypes)
    table = fits.BinTableHDU.from_columns(columns, nrows=0)
    table.header["NAXIS2"] = catalog.n_rows
    with path.open("wb") as file:
        file.write(fits.PrimaryHDU().header.tostring().encode("ascii"))
        file.write(table.header.tostring().encode("ascii"))
        for pixel in catalog.pixels:
            rows = catalog.read(pixel, names)
            records = np.empty(rows.num_rows, dtype=dtype)
            for name in names:
                values = rows[name].to_numpy()
                records[name] = values.astype(dtype[name]) if values.dtype == object else values
            file.write(records.tobytes())
        file.write(bytes(-catalog.n_rows * dtype.itemsize % 2880))


def _lengths(catalog: Catalog, name: str) -> Iterator[int]:
    for pixel in catalog.pixels:
        yield pc.max(pc.binary_length(catalog.read(pixel, (name,))[name])).as_py() or 1


def _say(text: str, *values: object) -> None:
    print(text % values, file=sys.stderr, flush=True)


def main() -> None:
    """Make items; called as ``python -m tests.bench.prepare PLACE ITEM ...``."""
    raw = json.loads(sys.argv[1])
    place = Place(**{**raw, "out": Path(raw["out"])})
    items = in_order(sys.argv[2:])
    place.out.mkdir(parents=True, exist_ok=True)
    if "sky" in items:  # before there are workers that wait
        sky(place, Cluster())
    with start(place.workers) as cluster:
        for name in items:
            ITEMS[name][0](place, cluster)


if __name__ == "__main__":
    main()

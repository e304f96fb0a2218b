"""What a user would write or run instead, each as short and as fast as it gets.

``python -m tests.bench.peers NAME ARGUMENTS``; STILTS is run as it is.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sos_dask.corrections import load
from sos_dask.corrections.boosted import BoostedCorrection
from sos_dask.storage.artifact import parquet_settings
from tests.steps import FEATURES, features

WRITE: Mapping[str, Any] = {"compression": "lz4"}  # the fastest
RADIAN_ARCSEC = 648000.0 / np.pi


def partitions(catalog: Path) -> list[Path]:
    """Files of a HATS catalog."""
    return sorted((catalog / "dataset").rglob("Npix=*.parquet"))


def _read(catalog: Path, columns: list[str] | None = None) -> pa.Table:
    return pa.concat_tables([pq.ParquetFile(path).read(columns) for path in partitions(catalog)])


def _vectors(table: pa.Table) -> np.ndarray:
    ra, dec = np.radians(table["ra"].to_numpy()), np.radians(table["dec"].to_numpy())
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)


def _chord(arcsec: float) -> float:
    return float(2.0 * np.sin(arcsec / RADIAN_ARCSEC / 2.0))


def kdtree_crossmatch(left: str, right: str, out: str, radius: str, workers: str) -> None:
    """Nearest reference of every row by a k-d tree of unit vectors; only keys are written."""
    from scipy.spatial import cKDTree

    target = _read(Path(left), ["obs_id", "ra", "dec"])
    other = _read(Path(right), ["star_id", "ra", "dec"])
    tree = cKDTree(_vectors(other))
    distance, index = tree.query(
        _vectors(target), distance_upper_bound=_chord(float(radius)), workers=int(workers)
    )
    found = np.flatnonzero(np.isfinite(distance))
    pairs = pa.table(
        {
            "obs_id": target["obs_id"].take(pa.array(found)),
            "star_id": other["star_id"].take(pa.array(index[found])),
            "separation": 2.0 * np.arcsin(distance[found] / 2.0) * RADIAN_ARCSEC,
        }
    )
    pq.write_table(pairs, out, use_dictionary=False, **WRITE)


def lsdb_crossmatch(
    left: str, right: str, out: str, radius: str, workers: str, columns: str, other_columns: str
) -> None:
    """LSDB's crossmatch and ``write_catalog``, both without what is not asked for."""
    lsdb = importlib.import_module("lsdb")
    client = importlib.import_module("dask.distributed").Client
    with client(n_workers=int(workers), threads_per_worker=1):
        target = lsdb.open_catalog(left, columns=columns.split(","))
        reference = lsdb.open_catalog(right, columns=other_columns.split(","))
        target.crossmatch(
            reference,
            n_neighbors=1,
            radius_arcsec=float(radius),
            require_right_margin=True,
            suffixes=("_l", "_r"),
            suffix_method="all_columns",
        ).write_catalog(
            out,
            catalog_name="pairs",
            as_collection=False,
            progress_bar=False,
            create_parquet_metadata=False,
            create_per_partition_statistics=False,
            should_write_skymap=False,
            write_table_kwargs={**WRITE, "use_dictionary": False},
        )


def hats_import(files: str, out: str, workers: str) -> None:
    """hats-import of Parquet files, with half of the CPU time that its defaults take."""
    arguments = importlib.import_module("hats_import.catalog.arguments").ImportArguments
    readers = importlib.import_module("hats_import.catalog.file_readers")
    pipeline = importlib.import_module("hats_import.pipeline").pipeline
    folder = Path(out)
    pipeline(
        arguments(
            input_file_list=sorted(Path(files).glob("*.parquet")),
            file_reader=readers.ParquetPyarrowReader(chunksize=1_000_000),
            ra_column="ra",
            dec_column="dec",
            sort_columns="obs_id",
            pixel_threshold=1_000_000,
            highest_healpix_order=8,
            create_metadata=False,
            should_write_skymap=False,
            write_table_kwargs={**WRITE, "use_dictionary": ["class", "subclass"]},
            output_path=folder.parent,
            output_artifact_name=folder.name,
            dask_n_workers=int(workers),
            dask_threads_per_worker=1,
            progress_bar=False,
        )
    )


def kdtree_dedupe(catalog: str, out: str, radius: str, workers: str) -> None:
    """Friends of friends within a radius; the row with the best S/N of each group is kept."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    places = _read(Path(catalog), ["obs_id", "ra", "dec", "snr"])
    n = places.num_rows
    pairs = cKDTree(_vectors(places)).query_pairs(_chord(float(radius)), output_type="ndarray")
    links = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, star = connected_components(links, directed=False)
    snr = np.nan_to_num(places["snr"].to_numpy(zero_copy_only=False), nan=-1.0)
    best = np.lexsort((places["obs_id"].to_numpy(), -snr, star))
    keep = np.zeros(n, dtype=bool)
    keep[best[np.concatenate([[True], np.diff(star[best]) > 0])]] = True
    first = 0
    Path(out).mkdir(parents=True)
    for number, path in enumerate(partitions(Path(catalog))):
        rows = pq.ParquetFile(path).read()
        chosen = rows.filter(pa.array(keep[first : first + rows.num_rows]))
        first += rows.num_rows
        _write(chosen, Path(out) / f"{number:05d}.parquet")


def polars_dedupe(files: str, out: str) -> None:
    """A group-by on the true star of every row, which nobody knows in practice."""
    pl = importlib.import_module("polars")
    rows = pl.scan_parquet(sorted(Path(files).glob("*.parquet")))
    values = [name for name in rows.collect_schema().names() if name not in ("star", "obs_id")]
    (
        rows.group_by("star")
        .agg(pl.len().alias("n_obs"), pl.col("obs_id").min(), *(pl.col(v).mean() for v in values))
        .sink_parquet(out, **WRITE)
    )


def apply_one_label(model: str, catalog: str, out: str, threads: str) -> None:
    """``Booster.inplace_predict`` of one label, partition by partition, in one process."""
    import xgboost

    booster = xgboost.Booster(model_file=Path(model) / "teff.ubj")
    booster.set_param({"nthread": int(threads)})
    scale = json.loads((Path(model) / "boosted.json").read_text())
    center, spread = scale["center"]["teff"], scale["spread"]["teff"]
    Path(out).mkdir(parents=True)
    for number, path in enumerate(partitions(Path(catalog))):
        rows = pq.ParquetFile(path).read()
        teff, logg, feh = (
            rows[name].to_numpy(zero_copy_only=False) for name in ("teff", "logg", "feh")
        )
        x = np.stack([teff / np.float32(5040.0), logg, feh], axis=1)
        delta = center + spread * booster.inplace_predict(x)
        rows = rows.append_column("teff_sos", pa.array((teff - delta).astype(np.float32)))
        _write(rows, Path(out) / f"{number:05d}.parquet")


def predict(model: str, catalog: str, out: str, how: str, threads: str) -> None:
    """Three labels of every row, in memory: by the look-up ``table``, or by XGBoost on a device.

    Partitions are read before the clock starts; the rate counts what the GPU takes to get them.
    """
    import xgboost

    correction = load(Path(model))
    assert isinstance(correction, BoostedCorrection)
    assert correction.table is not None
    boosters = [xgboost.Booster(model_file=bytearray(trees)) for trees in correction.ensembles]
    for booster in boosters:
        booster.set_param({"nthread": int(threads), "device": "cpu" if how == "table" else how})
    n_rows, seconds, worst, warm = 0, 0.0, 0.0, False
    for path in partitions(Path(catalog)):
        rows = pq.ParquetFile(path).read(["teff", "logg", "feh"]).drop_null()
        x = features(*(rows[name].to_numpy() for name in ("teff", "logg", "feh")))
        x = x[correction.in_range(x)]
        if not len(x):
            continue
        start = time.perf_counter()
        if how == "table":
            found = correction.predict(x)
        else:
            matrix = xgboost.DMatrix(x, feature_names=list(FEATURES), nthread=int(threads))
            trees = np.stack([booster.predict(matrix) for booster in boosters], axis=1)
            found = correction.center + correction.spread * trees
        if warm:
            seconds += time.perf_counter() - start
            n_rows += len(x)
        warm = True
        apart = np.abs(found - correction.table.predict(x)) / correction.spread
        worst = max(worst, float(apart.max()))
    Path(out).write_text(
        json.dumps({"rows_a_s": round(n_rows / max(seconds, 1e-9)), "worst": worst})
    )


def copy(catalog: str, out: str) -> None:
    """Read every column of every partition and write it again: the least that apply can take."""
    Path(out).mkdir(parents=True)
    for number, path in enumerate(partitions(Path(catalog))):
        _write(pq.ParquetFile(path).read(use_threads=False), Path(out) / f"{number:05d}.parquet")


def _write(table: pa.Table, path: Path) -> None:
    """Write with the settings of our partitions."""
    pq.write_table(table, path, **parquet_settings(table.schema))


def train_one_process(pairs: str, out: str, params: str, threads: str) -> None:
    """XGBoost in one process: three labels, trained without fold 0, which is then predicted."""
    import xgboost

    names = ("teff", "logg", "feh")
    rows = _read(Path(pairs), [*names, *(f"{name}_diff" for name in names), "fold", "use"])
    rows = rows.filter(rows["use"])
    train = rows["fold"].to_numpy() != 0
    x = np.stack([rows[name].to_numpy() for name in names], axis=1)
    x[:, 0] /= 5040.0
    settings = json.loads(params)
    n_rounds = settings.pop("n_rounds")
    scatter = {}
    Path(out).mkdir(parents=True)
    for name in names:
        y = rows[f"{name}_diff"].to_numpy()
        low, center, high = np.percentile(y[train], (15.87, 50.0, 84.13))
        spread = (high - low) / 2.0
        matrix = xgboost.QuantileDMatrix(
            x[train], (y[train] - center) / spread, max_bin=256, nthread=int(threads)
        )
        booster = xgboost.train(
            {
                "tree_method": "hist",
                "objective": "reg:pseudohubererror",
                "huber_slope": 0.5,
                "base_score": 0.0,
                "min_child_weight": 5.0,
                "reg_lambda": 10.0,
                "nthread": int(threads),
                **settings,
            },
            matrix,
            n_rounds,
        )
        booster.save_model(Path(out) / f"{name}.ubj")
        left = y[~train] - (center + spread * booster.inplace_predict(x[~train]))
        scatter[name] = float(1.4826 * np.median(np.abs(left - np.median(left))))
    (Path(out) / "scatter.json").write_text(json.dumps(scatter))


PEERS: Mapping[str, Callable[..., None]] = {
    "kdtree-crossmatch": kdtree_crossmatch,
    "lsdb-crossmatch": lsdb_crossmatch,
    "hats-import": hats_import,
    "kdtree-dedupe": kdtree_dedupe,
    "polars-dedupe": polars_dedupe,
    "apply-one-label": apply_one_label,
    "predict": predict,
    "copy": copy,
    "train-one-process": train_one_process,
}


def _main() -> None:
    PEERS[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    _main()

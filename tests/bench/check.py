"""Whether the programs found the same: ``python -m tests.bench.check NAME ARGUMENTS``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tests.bench.peers import partitions


def _pairs(kind: str, path: Path) -> pa.Table:
    """Keys of the pairs that a program wrote."""
    if kind == "ours":
        from sos_dask.storage.catalog import Catalog

        catalog = Catalog.open(path)
        columns = ("target_obs_id", "reference_star_id")
        table = pa.concat_tables([catalog.read(pixel, columns) for pixel in catalog.pixels])
    elif kind == "scipy":
        table = pq.read_table(path, columns=["obs_id", "star_id"])
    elif kind == "lsdb":
        columns = ("obs_id_l", "star_id_r")
        table = pa.concat_tables(
            [pq.ParquetFile(file).read(list(columns)) for file in partitions(path)]
        )
    else:
        from astropy.io import fits

        with fits.open(path) as file:
            data = file[1].data
            star = pa.array(np.asarray(data["star_id"]).astype(str).tolist())
            table = pa.table({"obs_id": np.asarray(data["obs_id"]).astype(np.int64), "s": star})
    obs_id, star_id = table.columns
    return pa.table({"obs_id": obs_id.cast(pa.int64()), "star_id": star_id.cast(pa.string())})


def crossmatch(ours: str, kind: str, theirs: str) -> dict[str, Any]:
    """Compare two sets of pairs."""
    one, other = _pairs("ours", Path(ours)), _pairs(kind, Path(theirs))
    keys = ["obs_id", "star_id"]
    only_ours = one.join(other, keys=keys, join_type="left anti").num_rows
    only_theirs = other.join(one, keys=keys, join_type="left anti").num_rows
    return {
        "same_result": only_ours == 0 and only_theirs == 0 and one.num_rows == other.num_rows,
        "pairs": one.num_rows,
        "their_pairs": other.num_rows,
        "only_ours": only_ours,
        "only_theirs": only_theirs,
    }


def stars(kind: str, path: str) -> dict[str, Any]:
    """Count the stars that a program wrote."""
    if kind == "stilts":
        from astropy.io import fits

        with fits.open(path) as file:
            return {"stars": int(file[1].header["NAXIS2"])}
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*.parquet"))
    return {"stars": sum(pq.read_metadata(file).num_rows for file in files)}


def true_stars(sky: str) -> dict[str, Any]:
    """Stars that LAMOST has in the simulation, and how many of them have repeats."""
    known = pq.read_table(Path(sky) / "truth.parquet", columns=["survey", "star"])
    star = known.filter(pc.equal(known["survey"], "lamost"))["star"].to_numpy()
    _, counts = np.unique(star, return_counts=True)
    return {"true_stars": len(counts), "true_repeats": int(np.count_nonzero(counts > 1))}


def apply(ours: str, theirs: str) -> dict[str, Any]:
    """Compare the corrected Teff of rows inside the range of the training pairs."""
    a = _labels([file for file in partitions(Path(ours))], ("obs_id", "teff_sos", "flag_sos"))
    b = _labels(sorted(Path(theirs).glob("*.parquet")), ("obs_id", "teff_sos"))
    order = np.argsort(b["obs_id"], kind="stable")
    place = order[np.searchsorted(b["obs_id"], a["obs_id"], sorter=order)]
    inside = (a["flag_sos"] & 3) == 0
    difference = np.abs(a["teff_sos"] - b["teff_sos"][place])[inside]
    return {
        "same_result": bool(len(difference) and np.nanmax(difference) < 0.01),
        "largest_teff_difference_k": float(np.nanmax(difference)) if len(difference) else 0.0,
    }


def _labels(files: list[Path], names: tuple[str, ...]) -> dict[str, Any]:
    table = pa.concat_tables([pq.ParquetFile(file).read(list(names)) for file in files])
    return {name: table[name].to_numpy() for name in names}


def size(path: str) -> dict[str, Any]:
    """Files and bytes below a folder."""
    files = [file for file in Path(path).rglob("*") if file.is_file() and not file.is_symlink()]
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}


CHECKS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "crossmatch": crossmatch,
    "stars": stars,
    "true-stars": true_stars,
    "apply": apply,
}

if __name__ == "__main__":
    print(json.dumps(CHECKS[sys.argv[1]](*sys.argv[2:])))

"""Export of a large catalog, beside pyarrow with astropy at once and with NumPy by partition.

``python -m tests.bench.exports [--rows 19000000] [--catalog DIR] [--formats fits,parquet]`` prints
wall and CPU seconds, the peak memory of a process and the bytes of the file. Without a catalog one
is made. astropy holds all rows; NumPy writes bare records (no header, nulls or text).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import SOS, interleaved, table
from tests.bench.scale import make

AT_ONCE = """
import sys, pyarrow.parquet as pq
from astropy.table import Table
whole = pq.read_table(sys.argv[1] + "/dataset", partitioning=None)
Table({name: whole[name].to_numpy() for name in whole.schema.names}).write(sys.argv[2])
"""
RECORDS = """
import sys, numpy as np, pyarrow.parquet as pq
from pathlib import Path
with open(sys.argv[2], "wb") as out:
    for path in sorted(Path(sys.argv[1]).rglob("Npix=*.parquet")):
        rows = pq.ParquetFile(path).read(use_threads=False)
        columns = {one: rows[one].to_numpy() for one in rows.schema.names}
        kinds = [(one, x.dtype.newbyteorder(">")) for one, x in columns.items()]
        block = np.empty(len(rows), kinds)
        for one, values in columns.items():
            block[one] = values
        block.tofile(out)
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.exports", description=__doc__)
    parser.add_argument("--rows", type=int, default=19_000_000)
    parser.add_argument("--catalog", type=Path)
    parser.add_argument("--formats", default="fits,vot,csv,ecsv,parquet")
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        catalog, log, out = given.catalog or place / "catalog", place / "log", place / "out"
        if given.catalog is None:
            make(given.rows, catalog, place / "other", 2)
        commands: dict[str, tuple[str | Path, ...]] = {
            f"sos-dask export, .{one}": (SOS, "export", catalog, "-o", f"{out}.{one}")
            for one in given.formats.split(",")
        }
        peers = {"NumPy records": RECORDS, "astropy at once": AT_ONCE}
        if given.catalog is None:  # text and nulls are not theirs
            commands |= {x: (sys.executable, "-c", peers[x], catalog, f"{out}.fits") for x in peers}
        for name, command in commands.items():
            [used] = interleaved({name: command}, 1, log)[name]
            figures = f"{used.wall_s:.1f}", f"{used.cpu_s:.1f}", f"{used.process_gib:.2f}"
            made = Path(command[-1])
            lines.append((name, *figures, f"{made.stat().st_size / 1e9:.2f}"))
            made.unlink()
    print("\n".join(table("writer, >wall s, >CPU s, >GiB, >GB of the file", lines)))


if __name__ == "__main__":
    main()

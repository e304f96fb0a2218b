"""List the stars of comoving pairs: ``python -m tests.surveys.comoving OUT MOST_PC``."""

import csv
import os
import sys
from pathlib import Path


def write_pairs(folder: Path, out: Path, most_pc: float) -> int:
    """Write a row for each star of each pair; the number of pairs."""
    with (folder / "rave_comoving_stars.csv").open(newline="") as lines:
        stars = {row["row_id"]: row for row in csv.DictReader(lines)}
    with (folder / "rave_comoving_pairs.csv").open(newline="") as lines:
        pairs = [row for row in csv.DictReader(lines) if float(row["separation"]) < most_pc]
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pair", "row_id", "ra", "dec"])
        for pair in pairs:
            for star in (stars[pair["star1"]], stars[pair["star2"]]):
                name = f"{pair['star1']}-{pair['star2']}"
                writer.writerow([name, star["row_id"], star["ra"], star["dec"]])
    return len(pairs)


if __name__ == "__main__":
    write_pairs(Path(os.environ["SOS_REAL2_DATA"]), Path(sys.argv[1]), float(sys.argv[2]))

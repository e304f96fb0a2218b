"""Does the coverage say the truth? A build on a mock sky against the truth of that sky.

Run: python -m tests.bench.coverage STORE TRUTH [CORRECTED [COVERAGE]]
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sos_dask.catalog import Catalog
from sos_dask.coverage import CLASSES, CoverageModel, residual_width
from sos_dask.schema import LABELS
from sos_dask.simulate.sky import references_avoid


def rows_of(corrected: Catalog, truth: Path) -> dict[str, np.ndarray]:
    """All rows with their true labels, as arrays."""
    names = ["obs_id", "quality", "snr", "coverage", *LABELS, *(f"{x}_sos" for x in LABELS)]
    names += corrected.columns([f"{label}_sos_err" for label in LABELS])
    table = pa.concat_tables([corrected.read(pixel, names) for pixel in corrected.pixels])
    columns = ["obs_id", *LABELS, "is_outlier"]
    true = pq.read_table(truth, columns=columns, filters=[("survey", "=", "lamost")])
    keys = true["obs_id"].cast(pa.int64()).to_numpy()
    order = np.argsort(keys, kind="stable")
    true = true.take(pa.array(order[np.searchsorted(keys[order], table["obs_id"].to_numpy())]))
    rows = {name: pc.fill_null(table[name], np.nan).to_numpy() for name in names[2:]}
    rows["quality"] = table["quality"].to_numpy()
    rows |= {f"true_{label}": true[label].to_numpy() for label in LABELS}
    rows["is_outlier"] = true["is_outlier"].to_numpy(zero_copy_only=False)
    rows["uncovered"] = references_avoid(*(rows[f"true_{label}"] for label in LABELS))
    return rows


def report(corrected: Catalog, coverage: Path, truth: Path) -> None:
    """Print fractions, predicted and true errors by decile of coverage, intervals by class."""
    rows = rows_of(corrected, truth)
    model = CoverageModel.load(coverage)
    score = rows["coverage"]
    place = model.limits.classify(score)
    known = np.isfinite(score)
    print("rows", len(score), "| share of rows:")
    for number, name in enumerate(CLASSES):
        print(f"  {name:8} {np.mean(known & (place == number)):.4f}")
    print(f"  unknown  {np.mean(~known):.4f}")
    print(f"  where the references have no star, by truth: {np.mean(rows['uncovered']):.4f}")
    good = known & (rows["quality"] == 0) & ~rows["is_outlier"]
    error = np.stack([rows[f"{label}_sos"] - rows[f"true_{label}"] for label in LABELS], axis=1)
    width = model.predicted_error(rows, score)
    if f"{LABELS[0]}_sos_err" in rows:
        width = np.stack([rows[f"{label}_sos_err"] for label in LABELS], axis=1)
    print("deciles of coverage of good rows: predicted / true error; share uncovered by truth")
    edges = np.quantile(score[good], np.linspace(0, 1, 11))
    bins = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, 9)
    for decile in range(10):
        at = good & (bins == decile)
        if not at.any():  # many equal scores
            continue
        ratios = [1 / residual_width((error / width)[at, i]) for i in range(len(LABELS))]
        text = " ".join(f"{ratio:6.2f}" for ratio in ratios)
        share = np.mean(rows["uncovered"][at])
        print(f"  {decile} coverage {np.median(score[at]):.3f} {text}  {share:.3f}")
    print("intervals: share that holds the truth, mean half-width, width of the true error")
    for number, name in enumerate(CLASSES):
        at = good & (place == number)
        if not at.any():
            continue
        for i, label in enumerate(LABELS):
            holds = np.mean(np.abs(error[at, i]) <= width[at, i])
            mean = float(np.mean(width[at, i], dtype=np.float64))
            true = residual_width(error[at, i])
            print(f"  {name:8} {label:5} {holds:.3f} {mean:9.3f} {true:9.3f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("truth", type=Path)
    parser.add_argument("corrected", type=Path, nargs="?")
    parser.add_argument("coverage", type=Path, nargs="?")
    options = parser.parse_args()
    current = options.store / "current"
    corrected = options.corrected or current / "lamost.corrected"
    report(Catalog.open(corrected), options.coverage or current / "coverage", options.truth)


if __name__ == "__main__":
    main()

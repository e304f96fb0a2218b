"""Does the coverage say the truth? A build on a mock sky against the truth of that sky.

Run: ``python -m tests.bench.coverage --rows 400000 --seed 11 --out DIR`` makes the sky and builds;
``--store STORE --truth TRUTH`` takes what is there; ``--uncovered 0.3333`` leaves a known third of
the stars without references.

An interval is one of corrected label - reference. So every row gets a simulated measurement by the
reference: its true labels and the noise of the reference, at the reference's signal to noise of one
of the eight pairs that are nearest in the labels and in the signal to noise of the target. The
share that holds the bare truth, which has no noise, stands beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.stats import spearmanr

from sos_dask.columns import FloatArray
from sos_dask.evidence.coverage import MEASURES, CoverageModel, fit
from sos_dask.evidence.widening import CLASSES, LACKING, OUTSIDE
from sos_dask.problem import DEFAULT
from sos_dask.schema import LABELS
from sos_dask.simulate.sky import SkySettings, references_avoid
from sos_dask.simulate.surveys import SURVEYS, difficulty
from sos_dask.stages.coverage import read_overlap
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.job import DEFAULT_PARTITIONS, build, methods

Rows = dict[str, NDArray[Any]]
LEVEL = 0.68
PARAMETERS = tuple(item.column for item in DEFAULT.parameters)
_SPACING = np.array([600.0, 0.6, 0.3])  # K, dex, dex that are as far as a factor e of S/N


def rows_of(corrected: Catalog, truth: Path) -> Rows:
    """All rows that have a coverage, with their parameters and their true labels."""
    names = ["obs_id", "quality", "coverage", *corrected.columns(PARAMETERS)]
    names += [f"{label}_sos{end}" for label in LABELS for end in ("", "_err")]
    table = pa.concat_tables([corrected.read(pixel, names) for pixel in corrected.pixels])
    columns = ["obs_id", *LABELS, "is_outlier"]
    true = pq.read_table(truth, columns=columns, filters=[("survey", "=", "lamost")])
    keys = true["obs_id"].cast(pa.int64()).to_numpy()
    order = np.argsort(keys, kind="stable")
    true = true.take(pa.array(order[np.searchsorted(keys[order], table["obs_id"].to_numpy())]))
    rows: Rows = {name: pc.fill_null(table[name], np.nan).to_numpy() for name in names[2:]}
    rows["quality"] = table["quality"].to_numpy()
    rows |= {f"true_{label}": true[label].to_numpy().astype(np.float64) for label in LABELS}
    rows["is_outlier"] = true["is_outlier"].to_numpy(zero_copy_only=False)
    rows["uncovered"] = references_avoid(*(rows[f"true_{label}"] for label in LABELS))
    known = np.isfinite(rows["coverage"])
    return {name: values[known] for name, values in rows.items()}


def reference_noise(rows: Rows, pairs: Catalog, seed: int = 0) -> FloatArray:
    """Errors (n, 3) of a simulated measurement of every row by the reference."""
    rng = np.random.default_rng(seed)
    names = ["use", *LABELS, "snr", "survey_ref", "snr_ref"]
    table = pa.concat_tables([pairs.read(pixel, names) for pixel in pairs.pixels])
    table = table.filter(table["use"])

    def place(columns: Rows) -> FloatArray:
        labels = np.stack([columns[label] for label in LABELS], axis=1) / _SPACING
        return np.column_stack([labels, np.log(np.maximum(columns["snr"], 1.0))])

    tree = cKDTree(place({name: table[name].to_numpy() for name in (*LABELS, "snr")}))
    near = tree.query(place(rows), k=8)[1]
    pair = near[np.arange(len(near)), rng.integers(0, 8, len(near))]
    snr = table["snr_ref"].to_numpy()[pair]
    survey = table["survey_ref"].to_numpy(zero_copy_only=False)[pair]
    error = np.full((len(pair), len(LABELS)), np.nan)
    for kind in SURVEYS.values():
        mine = survey == kind.name
        error[mine] = kind.noise(snr[mine])
    error *= difficulty(*(rows[f"true_{label}"] for label in LABELS))[:, None]
    return np.asarray(error * rng.normal(size=error.shape))


def report(rows: Rows, coverage: Path, pairs: Catalog) -> None:
    """Print fractions, intervals by class, and predicted and true errors by decile."""
    model = CoverageModel.load(coverage)
    limits = model.limits
    score = rows["coverage"]
    place = limits.classify(score)
    outlier, uncovered = rows["is_outlier"], rows["uncovered"]
    print(f"{len(score)} rows with a coverage; share of each class, without outliers:")
    for number, name in enumerate(CLASSES):
        right = np.mean((place == number)[~outlier])
        print(f"  {name:8} {np.mean(place == number):.4f}  {right:.4f}")
    found = place == OUTSIDE
    print(
        f"  without references by truth: {np.mean(uncovered):.4f}; of these found outside "
        f"{np.mean(found[uncovered]):.3f}, of the others {np.mean(found[~uncovered]):.4f}"
    )
    error = np.stack([rows[f"{label}_sos"] - rows[f"true_{label}"] for label in LABELS], axis=1)
    width = np.stack([rows[f"{label}_sos_err"] for label in LABELS], axis=1).astype(np.float64)
    observed = np.abs(error - reference_noise(rows, pairs))
    good = rows["quality"] == 0
    lacking = model.coverage(rows)[1] == LACKING
    kinds = [(name, place == number) for number, name in enumerate(CLASSES)]
    kinds += [("few", found & ~lacking), ("lacking", lacking)]
    for text, chosen in (("without", good & ~outlier), ("with", good)):
        print(
            f"intervals, rows {text} simulated outliers: n, share that holds the reference, "
            "the truth; mean and median half-width, half-width that would hold 68 %"
        )
        for name, of_kind in kinds:
            for i, label in enumerate(LABELS):
                at = chosen & of_kind
                if not at.any():
                    continue
                mine, seen = width[at, i], observed[at, i]
                print(
                    f"  {name:8} {label:5} {len(mine):8} {np.mean(seen <= mine):.3f} "
                    f"{np.mean(np.abs(error[at, i]) <= mine):.3f} {np.mean(mine):8.3f} "
                    f"{np.median(mine):8.3f} {np.quantile(seen, LEVEL):8.3f}"
                )
    print("deciles of coverage inside or sparse: predicted / true error of right rows, of all rows")
    covered = good & ~found
    # Half of the rows or more have a coverage of 1: they are one bin.
    edges = np.unique(np.quantile(score[covered & ~outlier], np.linspace(0, 1, 11)))
    bins = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, len(edges) - 1)
    for decile in range(len(edges)):
        at = covered & (bins == decile)
        ratios = [
            1 / np.quantile(observed[chosen] / width[chosen], LEVEL, axis=0)
            for chosen in (at & ~outlier, at)
        ]
        print(
            f"  from {edges[decile]:.3f}: {np.count_nonzero(at)}",
            *(f"{x:.3f}" for x in np.concatenate(ratios)),
        )


def measures(
    rows: Rows, coverage: Path, evidence: Path, model: Path, n_rows: int = 100_000
) -> None:
    """Print of every measure its rate (rows per second and core), and how it tells true errors.

    On a sample of the good rows: rank correlation of the distance with |corrected - true label|
    over noise; mean error of the tenth that it has farthest over that of the nearer half.
    """
    rng = np.random.default_rng(0)
    good = np.flatnonzero((rows["quality"] == 0) & ~rows["is_outlier"])
    known = np.flatnonzero(np.isfinite(rows["teff"]))
    catalog = {n: rows[n][rng.permutation(known)[:200_000]] for n in PARAMETERS if n in rows}
    chosen = np.sort(rng.permutation(good)[:n_rows])
    some = {name: rows[name][chosen] for name in catalog}
    overlap = read_overlap(evidence, model)
    stored = CoverageModel.load(coverage)
    error = np.stack([rows[f"{n}_sos"][chosen] - rows[f"true_{n}"][chosen] for n in LABELS], axis=1)
    size = np.sqrt(np.mean((error / stored.noise(some["logg"], some["snr"])) ** 2, axis=1))
    print(f"{len(overlap.fold)} overlap stars: rows/s/core, rank correlation, far over near")
    for name in MEASURES:
        fitted = fit(overlap, catalog, name, stored.limits).model
        start = time.process_time()
        fitted.coverage(some)
        rate = len(chosen) / (time.process_time() - start)
        x = fitted.scaled(some)
        far = fitted.places(x[:, : fitted.n_inputs])[0]
        far = far if fitted.ratio is None else fitted.ratio.distance(x)
        ends = size[far >= np.quantile(far, 0.9)].mean() / size[far <= np.median(far)].mean()
        print(f"  {name:12} {rate:10.0f} {spearmanr(far, size).statistic:6.3f} {ends:6.3f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--uncovered", type=float, default=SkySettings().uncovered)
    parser.add_argument("--out", type=Path, help="folder of the sky and of its build")
    parser.add_argument("--store", type=Path, help="of a finished build")
    parser.add_argument("--truth", type=Path, help="truth.parquet of its sky")
    given = parser.parse_args()
    if given.store and given.truth:
        store, truth = given.store, given.truth
    elif given.out:
        sky = {"n_lamost": given.rows, "seed": given.seed, "uncovered": given.uncovered}
        trained = methods("polynomial", "hybrid", more='\nvalidation = "kfold"')
        build(given.out, DEFAULT_PARTITIONS, trained, **sky)
        store, truth = given.out / "store", given.out / "sky" / "truth.parquet"
    else:
        parser.error("give --out, or --store and --truth")
    current = store / "current"
    corrected, pairs, coverage = (
        (current / name).resolve() for name in ("lamost.corrected", "pairs", "coverage")
    )
    rows = rows_of(Catalog.open(corrected), truth)
    report(rows, coverage, Catalog.open(pairs))
    method = Manifest.load(current / "lamost.comparison").summary["method"]
    measures(rows, coverage, current / "lamost.evidence", current / f"lamost.model.{method}")


if __name__ == "__main__":
    main()

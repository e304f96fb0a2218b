"""What is left of the trends, bin by bin, on a simulated sky: every method, the worst bins.

``python -m tests.bench.accuracy --store STORE [--truth truth.parquet]``: all pairs of the current
build are held out once (k folds by star). A bin of a LAMOST label passes where the median of
corrected - reference (and corrected - true label) is under 10 K, 0.02 dex or 0.01 dex, or under
three of its standard errors where that is more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sos_dask import corrections as models
from sos_dask.columns import FloatArray
from sos_dask.schema import LABELS
from sos_dask.stages.train import PairsSource
from sos_dask.stats.numbers import scatter
from sos_dask.storage.catalog import Catalog

LIMITS = {"teff": 10.0, "logg": 0.02, "feh": 0.01}
EDGES = {
    "teff": np.arange(3000.0, 8501.0, 250.0),
    "logg": np.arange(-0.5, 5.6, 0.25),
    "feh": np.arange(-3.0, 1.01, 0.1),
}
MIN_STARS = 200


@dataclass(frozen=True)
class Pairs:
    """Pairs that can train, with the true labels and the injected bias where they are known."""

    source: PairsSource
    batch: models.Batch = field(repr=False)
    labels: FloatArray = field(repr=False)
    true: FloatArray | None = field(repr=False)
    bias: FloatArray | None = field(repr=False)
    outlier: NDArray[np.bool_] | None = field(repr=False)


def read_pairs(store: Path, truth: Path | None, folder: str = "current/lamost.pairs") -> Pairs:
    """Pairs of a build; ``truth`` is the file that the simulator wrote."""
    catalog = Catalog.open(store / folder)
    source = PairsSource(catalog)
    parts = [source.load(index) for index in range(source.n_batches)]
    key = "target_obs_id" if "target_obs_id" in catalog.schema.names else "target_star_id"
    names = [*LABELS, key, "use"]
    table = pa.concat_tables([catalog.read(pixel, names) for pixel in catalog.pixels])
    table = table.filter(table["use"])
    batch = models.Batch(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.differences for part in parts]),
        np.concatenate([part.fold for part in parts]),
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.errors for part in parts if part.errors is not None]),
    )
    labels = np.stack([table[label].to_numpy().astype(np.float64) for label in LABELS], axis=1)
    if truth is None:
        return Pairs(source, batch, labels, None, None, None)
    known = pq.read_table(truth, filters=[("survey", "=", "lamost")])
    ids = known["obs_id"].to_numpy().astype(np.int64)
    order = np.argsort(ids)
    row = order[np.searchsorted(ids[order], table[key].to_numpy().astype(np.int64))]
    true, bias = (
        np.stack([known[f"{start}{label}"].to_numpy()[row] for label in LABELS], axis=1)
        for start in ("", "bias_")
    )
    outlier = known["is_outlier"].to_numpy()[row]
    return Pairs(source, batch, labels, true.astype(float), bias.astype(float), outlier)


def held_out(
    pairs: Pairs, method: str, params: Mapping[str, Any], folds: Sequence[int] | None = None
) -> tuple[FloatArray, float]:
    """Prediction of every pair by a fit without its fold (nan in other folds), and CPU seconds."""
    every = [int(fold) for fold in np.unique(pairs.batch.fold)]
    out = np.full(pairs.labels.shape, np.nan)
    began = time.process_time()
    for fold in folds or every:
        train = [name for name in every if name != fold]
        fitted = models.fit(method, pairs.source, train_folds=train, params=params)
        rows = pairs.batch.fold == fold
        out[rows] = fitted.predict(pairs.batch.features[rows])
    return out, time.process_time() - began


@dataclass(frozen=True)
class Bin:
    """Median of a label's residuals in one bin of a label."""

    label: str
    by: str
    low: float
    n: int
    median: float
    error: float

    @property
    def ratio(self) -> float:
        """Size of the median in units of what is allowed."""
        return abs(self.median) / max(LIMITS[self.label], 3 * self.error)


def bins(labels: FloatArray, residuals: FloatArray) -> list[Bin]:
    """All bins of more than `MIN_STARS` pairs, the worst first."""
    found = []
    for column, label in enumerate(LABELS):
        for axis, by in enumerate(LABELS):
            index = np.digitize(labels[:, axis], EDGES[by])
            for number in np.unique(index):
                inside = residuals[(index == number), column]
                inside = inside[np.isfinite(inside)]
                if len(inside) > MIN_STARS:
                    # Of a median of normal values: sqrt(pi / 2) times that of the mean.
                    error = np.sqrt(np.pi / 2) * scatter(inside) / np.sqrt(len(inside))
                    low = EDGES[by][number - 1] if number else -np.inf
                    median = float(np.median(inside))
                    found.append(Bin(label, by, float(low), len(inside), median, float(error)))
    return sorted(found, key=lambda item: -item.ratio)


def report(name: str, found: Sequence[Bin], worst: int) -> None:
    """Print the number of bins that fail and the worst of all."""
    failing = sum(item.ratio > 1 for item in found)
    print(f"  {name}: {failing} of {len(found)} bins fail")
    for item in found[:worst]:
        print(
            f"    {item.label:4} in {item.by:4} from {item.low:8.2f}: {item.median:+9.4f} "
            f"+- {item.error:.4f} (n = {item.n:,}), {item.ratio:.2f} of what is allowed"
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.accuracy", description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--truth", type=Path)
    parser.add_argument(
        "--pairs", default="current/lamost.pairs", help="inside the store (%(default)s)"
    )
    parser.add_argument("--methods", nargs="*", default=["polynomial", "boosted", "hybrid"])
    parser.add_argument("--folds", nargs="*", type=int, help="that are held out; default all")
    parser.add_argument("--worst", type=int, default=5, help="bins to print (%(default)s)")
    given = parser.parse_args()
    pairs = read_pairs(given.store, given.truth, given.pairs)
    print(f"{len(pairs.labels):,} pairs")
    for method in given.methods:
        predicted, cpu_s = held_out(pairs, method, {}, given.folds)
        known = np.isfinite(predicted).all(axis=1)
        left = pairs.batch.differences[known] - predicted[known]
        sizes = ", ".join(f"{scatter(left[:, k]):.4g}" for k in range(len(LABELS)))
        print(f"{method}: held-out scatter {sizes}; {cpu_s:.1f} CPU-s")
        labels = pairs.labels[known]
        report("corrected - reference", bins(labels, left), given.worst)
        if pairs.true is not None:
            left = labels - predicted[known] - pairs.true[known]
            report("corrected - true", bins(labels, left), given.worst)


if __name__ == "__main__":
    main()

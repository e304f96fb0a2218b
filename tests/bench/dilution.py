"""Noise is not trend: what noise alone does to a correction, and what SIMEX gives back.

``python -m tests.bench.dilution --store STORE --truth truth.parquet``, once on a sky without
injected bias (``demo``'s simulator has the switch) and once on one with it.

Let t = T + b(T) + e be a label of the target and r = T + e' that of the reference. Among stars of
one t the mean of t - r is E[b + e | t]. Without bias, and with normal noise of variance s^2, that
is -s^2 d/dt log p(t) for any density p of the noisy labels (Robbins 1956; Efron 2011, JASA 106,
1602): for a normal p of variance S^2 + s^2 a line of slope s^2 / (S^2 + s^2). So a correction that
predicts the reference has this slope where there is no bias, and must have it. Printed per label:

* ``normal``: that slope, with the true scatter of the labels, as if all stars were one normal;
* ``known``: the slope of t - T on t, from the truth: what noise (and bias) does;
* of each method: the slope of its prediction on t, for held-out stars;
* ``bias``: rms, over bins, of the median of prediction - b at the noise-free labels T + b(T);
* ``scatter``: of corrected - reference for held-out stars.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sos_dask import corrections as models
from sos_dask.columns import BoolArray, FloatArray
from sos_dask.schema import LABELS
from sos_dask.stages.train import PairsSource
from sos_dask.stats.numbers import (
    binned_quantiles,
    bins_of,
    equal_count_edges,
    rms_of_medians,
    scatter,
)
from sos_dask.storage.catalog import Catalog
from tests.steps import features

METHODS = {
    "polynomial": ("polynomial", {}),
    "boosted": ("boosted", {}),
    "hybrid": ("hybrid", {}),
    "simex polynomial": ("simex", {}),
    "simex hybrid": ("simex", {"base": "hybrid"}),
}


def read(catalog: Catalog, truth: Path) -> tuple[FloatArray, FloatArray, FloatArray, BoolArray]:
    """Labels (n, 3), true ones, injected differences, and which are wrong, of pairs that train."""
    key = "target_obs_id" if "target_obs_id" in catalog.schema.names else "target_star_id"
    names = [*LABELS, key, "use"]
    table = pa.concat_tables([catalog.read(pixel, names) for pixel in catalog.pixels])
    table = table.filter(table["use"])
    known = pq.read_table(truth, filters=[("survey", "=", "lamost")])
    ids = known["obs_id"].to_numpy().astype(np.int64)
    order = np.argsort(ids)
    row = order[np.searchsorted(ids[order], table[key].to_numpy().astype(np.int64))]
    known = known.take(pa.array(row))
    labels, true, bias = (
        np.stack([of[f"{start}{x}"].to_numpy().astype(np.float64) for x in LABELS], axis=1)
        for of, start in ((table, ""), (known, ""), (known, "bias_"))
    )
    return labels, true, bias, known["is_outlier"].to_numpy()


def slope(x: FloatArray, y: FloatArray) -> float:
    """Least squares, among the middle 96 % of x."""
    low, high = np.quantile(x, [0.02, 0.98])
    inside = (x > low) & (x < high)
    return float(np.polyfit(x[inside], y[inside], 1)[0])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.dilution", description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    given = parser.parse_args()
    catalog = Catalog.open(given.store / "current" / "lamost.pairs")
    source = PairsSource(catalog)
    parts = [source.load(index) for index in range(source.n_batches)]
    fold, differences, stated, inputs = (
        np.concatenate([np.asarray(getattr(part, name)) for part in parts])
        for name in ("fold", "differences", "errors", "features")
    )
    labels, true, bias, outlier = read(catalog, given.truth)
    held = (fold == 0) & ~outlier
    labels, true, bias = labels[held], true[held], bias[held]
    noise = labels - true - bias
    factor = [scatter(noise[:, k] / stated[held][:, k]) for k in range(len(LABELS))]
    print(f"{len(fold):,} pairs; true errors are {factor} of the quoted ones")
    print("label  method            normal   known    slope    bias rms  scatter")
    clean = features(*(true + bias).T)
    folds = [int(fold) for fold in np.unique(fold) if fold]
    for name in given.methods:
        method, params = METHODS[name]
        fitted = models.fit(method, source, train_folds=folds, params=params)
        predicted = fitted.predict(inputs[held]).astype(np.float64)
        at_truth = fitted.predict(clean).astype(np.float64)
        left = differences[held] - predicted
        for k, label in enumerate(LABELS):
            t = labels[:, k]
            normal = np.var(noise[:, k]) / np.var(t)
            edges = equal_count_edges(true[:, k], 20)
            bins = bins_of(true[:, k], edges)
            binned = binned_quantiles(bins, at_truth[:, k] - bias[:, k], len(edges) - 1)
            recovered = rms_of_medians(binned.n, binned.median)[0] or np.nan
            slopes = (normal, slope(t, t - true[:, k]), slope(t, predicted[:, k]))
            figures = [*slopes, recovered, scatter(left[:, k])]
            print(f"{label:6} {name:17}", *(f"{figure:8.4f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()

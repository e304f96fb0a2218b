"""What corrections promise, counted on a rebuild of a mock sky against the truth of that sky.

``python -m tests.bench.promises --store STORE --truth truth.parquet [--right] [--json]``, for skies
of ``sos-dask simulate --sky hard`` and any other. Rows count that pass the quality cuts and have a
correction, wrong ones included; with ``--right`` those alone that the simulation did not spoil.
*Inside* has none of the flags 1, 2, 8, 16; *sparse* is 8 and *outside* 16.

**Failing bins.** A bin of over 200 rows inside fails where the median of corrected - true label is
over 10 K, 0.02 dex (log g) or 0.01 dex ([Fe/H]) and over three of its standard errors.

**The bound by true labels.** A correction sees noisy labels, so even the best one shrinks what it
corrects: among rows of one *true* label the noise does not average out (Eddington bias). The best
correction is the conditional expectation E[target - truth | observed Teff, log g, [Fe/H], S/N].
It is estimated from the truth of all right rows (no references, no coverage, no pairs) by boosted
trees, separately for the two halves of the stars, each from the other half. `bound` counts the same
bins of the same rows after this correction: what noise alone must leave, and what little these
trees miss. Compare counts, and the rms of the medians that are over three standard errors.

**Outside.** By kind of star (true labels), median |error| of corrected and of uncorrected labels
and the standard error of their difference, from a bootstrap by star; a label is *worse* where
the corrected one is over the other by more than that.

**Errors.** ``*_sos_err`` are of the corrected label itself: they are compared with the truth. A
pull is (corrected - true) / error; its width is half of its 16-84 % range. The target's own errors,
as stated and normalised by repeats, are compared with the noise of the right rows: what a label is
off the truth by, less the median of that of the 100 rows of S/N over 100 of the nearest true labels
(the bias of the pipeline there; within 150 K, 0.15 and 0.1 dex, else the row does not count).

**Radial velocity.** In bins of S/N and Teff with over 200 pairs: median of predicted - injected
difference, which has no noise of its own, and of corrected - true velocity, which has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xgboost as xgb
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from sos_dask.columns import BoolArray, FloatArray, IntArray
from sos_dask.correct import FLAG_NULL_INPUT, FLAG_OUTSIDE, FLAG_OUTSIDE_TRAINING, FLAG_SPARSE
from sos_dask.evidence.failing import AXES, LIMITS
from sos_dask.evidence.figures import BANDS as SNR
from sos_dask.schema import LABELS
from sos_dask.simulate.sky import references_avoid
from sos_dask.stars.repeats import SNR_EDGES, normalisation
from sos_dask.stats.numbers import GIANT_LOGG, binned_quantiles, scatter
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest

Rows = dict[str, NDArray[Any]]
EDGES = {axis.name: axis.edges for axis in AXES} | {"snr": np.geomspace(10.0, 1000.0, 21)}
MIN_ROWS = 200
_NEAR, _N_NEAR = np.array([150.0, 0.15, 0.1]), 100  # of one place by true labels
BANDS = {"all": (0.0, np.inf)} | {name.removeprefix("snr "): ends for name, ends in SNR.items()}
KINDS: dict[str, Callable[[FloatArray, FloatArray, FloatArray], Any]] = {
    "hot": lambda t, g, m: t > 7000.0,
    "cool dwarfs": lambda t, g, m: (t < 4600.0) & (g > 4.0),
    "log g < 1": lambda t, g, m: g < 1.0,
    "metal-poor": lambda t, g, m: m < -2.0,
    "metal-rich": lambda t, g, m: m > 0.2,
}
_N_RESAMPLES = 200
_TREES = {"max_depth": 8, "eta": 0.08, "min_child_weight": 20, "max_bin": 1024, "subsample": 0.7}
_N_ROUNDS = 250


def read(corrected: Catalog, truth: Path, right: bool, labels: tuple[str, ...], end: str) -> Rows:
    """Rows of good quality that have a correction, with their true values (``true_*``)."""
    flag = f"flag_sos{end}"
    names = {"obs_id", "quality", "snr", *LABELS, *labels, flag}
    names |= {f"{x}{y}" for x in (*LABELS, *labels) for y in ("_err", "_sos", "_sos_err", "_delta")}
    there = [name for name in corrected.schema.names if name in names]
    table = pa.concat_tables([corrected.read(pixel, there) for pixel in corrected.pixels])
    null = pc.bit_wise_and(table[flag], FLAG_NULL_INPUT)
    table = table.filter(pc.and_(pc.equal(table["quality"], 0), pc.equal(null, 0)))
    true = pq.read_table(truth, filters=[("survey", "=", "lamost")])
    keys = true["obs_id"].cast(pa.int64()).to_numpy()
    order = np.argsort(keys, kind="stable")
    true = true.take(pa.array(order[np.searchsorted(keys[order], table["obs_id"].to_numpy())]))
    rows: Rows = {name: table[name].to_numpy() for name in there}
    rows["flag"] = rows[flag].astype(np.int64)
    for name in true.column_names:
        if name not in ("survey", "obs_id"):
            values = true[name].to_numpy(zero_copy_only=False)
            rows[f"true_{name}"] = values.astype(np.float64) if values.dtype == "f4" else values
    labels_there = [rows[f"true_{name}"] for name in LABELS]
    rows.setdefault("true_is_avoided", references_avoid(*labels_there))
    kept = ~rows["true_is_outlier"] | (not right)
    return {name: values[kept] for name, values in rows.items()}


def stacked(rows: Rows, before: str = "", after: str = "") -> FloatArray:
    """Columns of the three labels, shape (n, 3)."""
    return np.stack([rows[f"{before}{x}{after}"].astype(np.float64) for x in LABELS], axis=1)


def classes(rows: Rows) -> dict[str, BoolArray]:
    """Rows inside, sparse and outside."""
    flag = rows["flag"]
    outside = (flag & FLAG_OUTSIDE) > 0
    sparse = ~outside & ((flag & FLAG_SPARSE) > 0)
    inside = ~outside & ~sparse & ((flag & FLAG_OUTSIDE_TRAINING) == 0)
    return {"inside": inside, "sparse": sparse, "outside": outside}


def noise_alone(rows: Rows) -> FloatArray:
    """Labels (n, 3) after the best correction that noisy inputs allow, see the module."""
    x = np.column_stack([stacked(rows), np.log(np.maximum(rows["snr"], 1.0))])
    difference = stacked(rows) - stacked(rows, "true_")
    half = rows["true_star"] % 2 == 0
    found = stacked(rows)
    for label in range(len(LABELS)):
        y = difference[:, label]
        for mine in (half, ~half):
            other = ~mine & ~rows["true_is_outlier"]
            size = scatter(y[other])
            data = xgb.QuantileDMatrix(x[other], y[other] / size, max_bin=_TREES["max_bin"])
            trees = xgb.train({**_TREES, "seed": 0}, data, _N_ROUNDS)
            found[mine, label] -= trees.inplace_predict(x[mine]) * size
    return found


# --- counts -------------------------------------------------------------------------------------


def binned(by: FloatArray, edges: FloatArray, error: FloatArray) -> tuple[FloatArray, ...]:
    """Lower edge, median, its standard error and rows of the bins of over 200 rows."""
    found = binned_quantiles(np.digitize(by, edges), error, len(edges) + 1)
    kept = found.n > MIN_ROWS
    low = np.append(-np.inf, edges)
    return tuple(np.asarray(x, float)[kept] for x in (low, found.median, found.error, found.n))


def trends(by: FloatArray, error: FloatArray, snr: FloatArray) -> list[dict[str, Any]]:
    """Failing bins of the errors (n, 3) of each label, by each label (n, 3) and band of S/N."""
    found = []
    for band, (low, high) in BANDS.items():
        chosen = (snr >= low) & (snr < high)
        for label, name in enumerate(LABELS):
            for axis, other in enumerate(LABELS):
                bins = binned(by[chosen, axis], EDGES[other], error[chosen, label])
                _, median, size, n = bins
                ratio = np.abs(median) / np.maximum(LIMITS[name], 3 * size)
                seen = np.abs(median) > 3 * size
                row: dict[str, Any] = {"snr": band, "label": name, "by": other, "bins": len(n)}
                row["failing"] = int((ratio > 1).sum())
                row["square"] = float((median[seen] ** 2).sum())
                row["worst"] = [
                    [float(values[at]) for values in bins]
                    for at in np.argsort(-ratio)[:3] if ratio[at] > 1
                ]  # fmt: skip
                found.append(row)
    return found


def outside(rows: Rows) -> list[dict[str, Any]]:
    """Errors of corrected and uncorrected labels outside, by kind of star and label."""
    left = np.ones(len(rows["flag"]), dtype=bool)
    found = []
    at_all = classes(rows)["outside"]
    for kind, is_kind in {**KINDS, "rest": lambda t, *_: np.ones(len(t), dtype=bool)}.items():
        chosen = left & is_kind(*stacked(rows, "true_").T)
        left &= ~chosen
        at = np.flatnonzero(chosen & at_all)
        star = np.unique(rows["true_star"][at], return_inverse=True)[1]
        for name in LABELS if len(at) else ():
            true = rows[f"true_{name}"][at]
            after, before = (np.abs(rows[x][at] - true) for x in (f"{name}_sos", name))
            medians = [_median_by_star(x, star) for x in (after, before)]
            row: dict[str, Any] = {"kind": kind, "label": name, "n": len(at)}
            row["corrected"], row["raw"] = (float(np.median(x)) for x in (after, before))
            row["error"] = float(np.std(medians[0] - medians[1]))
            row["worse"] = bool(row["corrected"] - row["raw"] > row["error"])
            if f"{name}_sos_err" in rows:
                row["hit"] = float(np.mean(after <= rows[f"{name}_sos_err"][at]))
            found.append(row)
    return found


def _median_by_star(values: FloatArray, star: IntArray) -> FloatArray:
    """Medians of resamples of the stars, all of the same random numbers."""
    rng = np.random.default_rng(0)
    order = np.argsort(values)
    n, found = int(star.max()) + 1, []
    for _ in range(_N_RESAMPLES):
        times = np.bincount(rng.integers(0, n, n), minlength=n)[star[order]]
        total = np.cumsum(times)
        found.append(values[order[np.searchsorted(total, total[-1] / 2)]])
    return np.array(found)


def width(pull: FloatArray) -> float:
    """Half of the 16-84 % range; nan without values."""
    known = pull[np.isfinite(pull)]
    return float(np.diff(np.quantile(known, [0.16, 0.84]))[0] / 2) if len(known) else np.nan


def errors(rows: Rows) -> list[dict[str, Any]]:
    """Hit rates of the 68 % intervals and pull widths, by class, label and band of S/N."""
    found = []
    for place, chosen in classes(rows).items():
        for band, (low, high) in BANDS.items():
            at = chosen & (rows["snr"] >= low) & (rows["snr"] < high)
            for name in LABELS if at.any() else ():
                true = rows[f"true_{name}"][at]
                row: dict[str, Any] = {"class": place, "snr": band, "label": name}
                row["n"] = int(at.sum())
                if f"{name}_sos_err" in rows:
                    off, size = rows[f"{name}_sos"][at] - true, rows[f"{name}_sos_err"][at]
                    row["hit"] = float(np.mean(np.abs(off) <= size))
                    row["pull"] = width(off / size)
                found.append(row)
    return found


def own_errors(rows: Rows, factors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pull widths of the target's own errors by label, kind of star and bin of S/N."""
    some = {name: values[~rows["true_is_outlier"]] for name, values in rows.items()}
    place, snr, logg = stacked(some, "true_") / _NEAR, some["snr"], some["logg"]
    bright = np.flatnonzero(snr > 100.0)
    if len(bright) < _N_NEAR:
        return []
    apart, near = cKDTree(place[bright]).query(place, _N_NEAR)
    kinds = {"all": apart[:, -1] < 1.0}
    kinds |= {
        "dwarf": kinds["all"] & (logg >= GIANT_LOGG),
        "giant": kinds["all"] & (logg < GIANT_LOGG),
    }
    found = []
    for name in LABELS:
        off = some[name] - some[f"true_{name}"]
        pull = (off - np.median(off[bright][near], axis=1)) / some[f"{name}_err"]
        normalised = pull / normalisation(factors, name, logg, snr)
        for kind, chosen in kinds.items():
            for low, high in zip((0.0, *SNR_EDGES), (*SNR_EDGES, np.inf), strict=True):
                at = chosen & (snr >= low) & (snr < high)
                if at.sum() > MIN_ROWS:
                    row: dict[str, Any] = {"label": name, "kind": kind, "snr": low}
                    row |= {"n": int(at.sum()), "stated": width(pull[at])}
                    found.append(row | {"normalised": width(normalised[at])})
    return found


def coverage(rows: Rows) -> dict[str, float]:
    """Shares of the rows that the references avoid, and of others, by class."""
    avoided, of = rows["true_is_avoided"], classes(rows)
    return {
        **{name: float(chosen.mean()) for name, chosen in of.items()},
        "avoided": float(avoided.mean()),
        "avoided_outside_or_sparse": float((of["outside"] | of["sparse"])[avoided].mean()),
        "others_outside": float(of["outside"][~avoided].mean()),
    }


def velocity(rows: Rows, pairs: Catalog) -> list[dict[str, Any]]:
    """Radial velocity inside, in each bin of S/N and of Teff of over 200 pairs."""
    names = ["use", "snr", "teff"]
    table = pa.concat_tables([pairs.read(pixel, names) for pixel in pairs.pixels])
    table = table.filter(table["use"])
    inside = classes(rows)["inside"]
    off = {"corrected - true": rows["rv_sos"] - rows["true_rv"]}
    if "true_bias_rv" in rows:
        off["predicted - injected"] = rows["rv_delta"] - rows["true_bias_rv"]
    found = []
    for axis in ("snr", "teff"):
        places = np.digitize(pc.fill_null(table[axis], np.nan).to_numpy(), EDGES[axis])
        n_pairs = np.bincount(places, minlength=len(EDGES[axis]) + 1)
        for what, error in off.items():
            bins = binned(rows[axis][inside], EDGES[axis], error[inside])
            kept = n_pairs[np.searchsorted(EDGES[axis], bins[0], side="right")] > MIN_ROWS
            edge, median, size = (values[kept] for values in bins[:3])
            row: dict[str, Any] = {"by": axis, "what": what, "bins": int(kept.sum())}
            # What has no noise of its own is not excused by its standard error.
            noise = 3 * size if what == "corrected - true" else 0.0 * size
            row["failing"] = int((np.abs(median) > np.maximum(LIMITS["rv"], noise)).sum())
            worst = int(np.argmax(np.abs(median)))
            row["worst"] = [float(x[worst]) for x in (edge, median, size)]
            found.append(row)
    return found


def promises(store: Path, truth: Path, right: bool) -> dict[str, Any]:
    """All figures of a store."""
    current = store / "current"
    stars = Manifest.load(current / "lamost.stars")
    rows = read(Catalog.open(current / "lamost.corrected"), truth, right, LABELS, "")
    inside = classes(rows)["inside"]
    some = {name: values[inside] for name, values in rows.items()}
    true = stacked(some, "true_")
    error, best = stacked(some, "", "_sos") - true, noise_alone(rows)[inside] - true
    found: dict[str, Any] = {
        "rows": len(inside), "right_alone": right, "coverage": coverage(rows),
        "by_observed": trends(stacked(some), error, some["snr"]),
        "by_true": trends(true, error, some["snr"]), "bound": trends(true, best, some["snr"]),
        "bound_by_observed": trends(stacked(some), best, some["snr"]),
        "outside": outside(rows), "errors": errors(rows),
        "own_errors": own_errors(rows, stars.summary.get("error_factors", ())),
    }  # fmt: skip
    if (current / "lamost.rv.corrected").exists():
        rows = read(Catalog.open(current / "lamost.rv.corrected"), truth, right, ("rv",), "_rv")
        found["rv"] = velocity(rows, Catalog.open(current / "lamost.pairs"))
    return found


# --- text ---------------------------------------------------------------------------------------


def _counts(found: list[dict[str, Any]], bound: list[dict[str, Any]]) -> Iterator[str]:
    """Failing bins of all bins, and of the best correction, by label, axis and band; their sums."""
    yield f"{'label by axis: failing/bins (best)':36}" + "".join(f"{x:>18}" for x in BANDS)
    cells = list(zip(found, bound, strict=True))
    names = list(dict.fromkeys((row["label"], row["by"]) for row in found))
    for name in [*names, None]:
        text = f"  {'all' if name is None else ' by '.join(name):34}"
        for band in BANDS:
            some = [
                (one, best) for one, best in cells
                if one["snr"] == band and name in (None, (one["label"], one["by"]))
            ]  # fmt: skip
            fails, least = (sum(pair[x]["failing"] for pair in some) for x in (0, 1))
            bins = sum(one["bins"] for one, _ in some)
            text += f"{f'{fails}/{bins} ({least})':>18}"
        yield text
    ratios = []
    for band in BANDS:
        squares = [sum(x["square"] for x in side if x["snr"] == band) for side in (found, bound)]
        ratios.append(np.sqrt(squares[0] / squares[1]) if squares[1] else np.nan)
    yield f"  {'rms of medians / the best':34}" + "".join(f"{x:18.2f}" for x in ratios)


def _worst(found: list[dict[str, Any]], n: int) -> Iterator[str]:
    """The worst failing bins of each band."""
    for band in BANDS:
        bins = [(one, *x) for one in found if one["snr"] == band for x in one["worst"]]
        bins.sort(key=lambda x: -abs(x[2]) / max(LIMITS[x[0]["label"]], 3 * x[3]))
        for one, edge, median, size, rows in bins[:n]:
            yield (
                f"    S/N {band}: {one['label']} by {one['by']} from {edge:g}: {median:+.4g} "
                f"+- {size:.2g}, {rows:.0f} rows"
            )


def text(found: dict[str, Any], n_worst: int) -> Iterator[str]:
    """Lines of the tables."""
    of = found["coverage"]
    yield (
        f"{found['rows']:,} rows of good quality{' that are right' * found['right_alone']}: inside "
        f"{of['inside']:.3f}, sparse {of['sparse']:.3f}, outside {of['outside']:.3f}"
    )
    yield (
        f"(e) avoided by the references {of['avoided']:.3f}, of them outside or sparse "
        f"{of['avoided_outside_or_sparse']:.3f}; of the others outside {of['others_outside']:.3f}"
    )
    for title, name, bound in (
        ("(a) inside, by observed labels", "by_observed", "bound_by_observed"),
        ("(b) inside, by true labels", "by_true", "bound"),
    ):
        yield title
        yield from _counts(found[name], found[bound])
        yield from _worst(found[name], n_worst)
    yield "(c) outside: median |error| corrected, raw, standard error of the difference; hit rate"
    for row in found["outside"]:
        yield (
            f"  {row['kind']:12}{row['label']:6}{row['n']:7} {row['corrected']:9.4g} "
            f"{row['raw']:9.4g} {row['error']:8.2g} {row.get('hit', np.nan):6.3f}"
            f"{'  WORSE' * row['worse']}"
        )
    yield "(d, f) rows, hit rate, pull width"
    for row in found["errors"]:
        if row["class"] == "inside" or row["snr"] == "all":
            yield (
                f"  {row['class']:8} S/N {row['snr']:7}{row['label']:6}{row['n']:8} "
                f"{row.get('hit', np.nan):6.3f} {row.get('pull', np.nan):6.3f}"
            )
    yield "(f) from S/N: pull width of the target's own errors, as stated > normalised by repeats"
    for name, of_kind in groupby(
        found["own_errors"], lambda row: f"{row['label']:6}{row['kind']:7}"
    ):
        each = (f"{x['snr']:g}: {x['stated']:.2f} > {x['normalised']:.3f}" for x in of_kind)
        yield f"  {name}{'   '.join(each)}"
    for row in found.get("rv", ()):
        edge, median, size = row["worst"]
        yield (
            f"(g) rv, {row['what']} by {row['by']}: {row['failing']}/{row['bins']} bins fail, "
            f"worst from {edge:g}: {median:+.3f} +- {size:.3f} km/s"
        )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--right", action="store_true", help="without rows that are wrong")
    parser.add_argument("--worst", type=int, default=3, help="bins to print (%(default)s)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = promises(given.store, given.truth, given.right)
    print(json.dumps(found) if given.json else "\n".join(text(found, given.worst)))


if __name__ == "__main__":
    main()

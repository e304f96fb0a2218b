"""Figures and tables made for tests of the report."""

import pyarrow as pa

from sos_dask.report.style import Drawn, new_figure
from sos_dask.schema import LABELS

UNITS = {"teff": "K", "logg": "dex", "feh": "dex"}


def plain_figure() -> Drawn:
    figure = new_figure(2.0)
    axes = figure.subplots()
    axes.plot([0, 1], [2, 3])
    axes.set_xlabel(r"$T_\mathrm{eff}$ [K]")
    return Drawn("A title", figure, {"n": 1})


def comparison() -> pa.Table:
    rows = []
    for method, factor in (("none", 2.0), ("boosted", 1.0), ("polynomial", 1.2)):
        for label in LABELS:
            for sample in ("test", "train"):
                for subset in ("all", "sparse", "teff > 7000"):
                    for statistic in ("median", "mad", "width", "rms_binned", "worst_bin"):
                        value = factor * (30.0 if label == "teff" else 0.05)
                        rows.append(
                            {
                                "method": method, "label": label, "sample": sample,
                                "subset": subset, "statistic": statistic, "value": value,
                                "low": 0.9 * value, "high": 1.1 * value,
                                "error": 0.3 if statistic == "worst_bin" else None, "n": 700,
                            }
                        )  # fmt: skip
    return pa.Table.from_pylist(rows)


def drawn(found) -> Drawn:
    assert found is not None
    return found

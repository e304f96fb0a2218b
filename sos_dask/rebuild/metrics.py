"""Figures of a run as a text file for Prometheus (the textfile collector of its node exporter)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sos_dask.errors import SosError
from sos_dask.rebuild.gate import figures_of
from sos_dask.rebuild.history import current_products
from sos_dask.rebuild.job import Job
from sos_dask.storage.artifact import write_text
from sos_dask.storage.objects import as_path, on_disk
from sos_dask.storage.store import StageResult, home

logger = logging.getLogger(__name__)


def write_metrics(
    job: Job,
    store: Path,
    results: Sequence[StageResult],
    seconds: Mapping[str, float],
    outcome: Mapping[str, Any],
) -> None:
    """Write the file of ``[metrics]`` atomically; where that fails, a warning is all.

    Its figures are those of the build that the run made, or of the published one where it failed.
    """
    if job.metrics.file is None:
        return
    path, code = Path(job.metrics.file), outcome["exit_code"]
    try:
        path = on_disk(job.resolve(job.metrics.file), "[metrics] file")
        made = {one.product: home(one.stage, as_path(one.path)) for one in results}
        found: dict[str, list[str]] = {}
        for name, labels, value in (
            *_samples(made if code in (0, 10) else current_products(store), results, seconds),
            ("run_seconds", {}, outcome["seconds"]),
            ("run_exit_code", {}, code),
            ("run_end_timestamp_seconds", {}, time.time()),
        ):
            text = ",".join(f'{key}="{one}"' for key, one in {"job": job.name, **labels}.items())
            found.setdefault(name, []).append(f"sos_dask_{name}{{{text}}} {value:.13g}\n")
        lines = (f"# TYPE sos_dask_{name} gauge\n{''.join(of)}" for name, of in found.items())
        write_text(path, "".join(lines))
    except (OSError, SosError) as error:
        logger.warning("the metrics %s cannot be written: %s", path, error)


def _samples(
    products: Mapping[str, Path], results: Sequence[StageResult], seconds: Mapping[str, float]
) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each figure."""
    found = figures_of(products, lenient=True)
    fails = {name: n for name, (n, _) in found.failing.items()}
    judged = {name: n for name, (_, n) in found.failing.items()}
    rates = {name: rate for name, (rate, *_) in found.hit_rates.items()}
    of: dict[str, Mapping[str, float]] = {
        "rows": found.rows,
        "rejected_rows": {one.product: one.rows.rejected for one in results},
        "null_share": found.nulls,
        "outside_share": found.outside,
        "failing_bins": fails,  # trends that a correction leaves
        "judged_bins": judged,
        "hit_rate": rates,
        "stage_seconds": {one.product: seconds.get(one.product, 0.0) for one in results},
    }
    for name, values in of.items():
        for product, value in values.items():
            yield name, {"product": product}, value
    for one in results:
        for how, n in one.parts.items():
            yield "parts", {"product": one.product, "how": how}, n

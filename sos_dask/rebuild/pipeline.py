"""Rebuild: what has changed in a job's plan is run, then all products are published at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sos_dask.evidence.figures import Metric
from sos_dask.rebuild.job import Job
from sos_dask.rebuild.plan import COMPARISON, plan
from sos_dask.rebuild.planner import Stage
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.storage.artifact import Manifest, Output
from sos_dask.storage.store import (
    Cost,
    StageResult,
    check_product,
    home,
    publish,
    put_cost,
    result_of,
)


@dataclass(frozen=True)
class Build:
    """A published build."""

    name: str
    path: Path
    products: Mapping[str, str]
    stages: tuple[StageResult, ...]
    metrics: tuple[Metric, ...]
    chosen: str
    why: str


def rebuild(
    job: Job,
    store: Path | None = None,
    *,
    cluster: Cluster | Callable[[], Any] | None = None,
    report: Report = silent,
    on_stage: Callable[[StageResult], None] = lambda result: None,
) -> Build:
    """Run what has changed and publish the products.

    Parameters
    ----------
    job : Job
    store : Path, optional
        Default: that of the job.
    cluster : Cluster or callable, optional
        Runs the tasks, or gives a context manager of what does; it is entered only if a stage runs.
        Default: tasks run in this process.
    report : Report
    on_stage : callable
        Gets each stage's result as it is done.

    Returns
    -------
    Build

    Raises
    ------
    CatalogError
        A file of a product is not the one that was written: nothing is published. The SHA-256 of
        all files are compared, or their bytes (``[publish] check = "size"``; always of those that
        this run has written).
    """
    store = store or job.resolve(job.store)
    stages = plan(job, store)
    results: list[StageResult] = []

    def finish(stage: Stage, ran: bool) -> None:
        result = result_of(stage.product, stage.recipe.stage, stage.directory, ran, stage.reason)
        results.append(result)
        on_stage(result)

    def run_all(active: Cluster) -> None:
        nonlocal stages
        for number in range(len(stages)):
            stage = stages[number]
            if not stage.complete:
                with _measured(store, stage, active):
                    stage.run(active, report)
            finish(stage, not stage.complete)
            if stage.product == COMPARISON and not stage.complete:
                # Now it is known which model corrects the catalog.
                stages = [*stages[: number + 1], *plan(job, store)[number + 1 :]]

    if all(stage.complete for stage in stages):
        for stage in stages:
            finish(stage, False)
    elif cluster is None or isinstance(cluster, Cluster):
        run_all(cluster or Cluster())
    else:
        with cluster() as active:
            run_all(active)
    for stage in stages:
        if not stage.complete:  # a rebuild beside this one may have been ahead of these workers
            Output(home(stage.recipe.stage, stage.directory), stage.recipe).tidy()
    for number, stage in enumerate(stages):
        report("check products", number, len(stages))
        # What this very run has hashed while it wrote needs no second look at its content.
        by = job.publish.check if stage.complete else "size"
        check_product(stage.product, stage.recipe.stage, stage.directory, by)
    report("check products", len(stages), len(stages))
    comparison = next(stage for stage in stages if stage.product == COMPARISON)
    choice = Manifest.load(comparison.directory).summary
    path = publish(
        store,
        job.name,
        job.text,
        {stage.product: (stage.recipe, stage.directory) for stage in stages},
    )
    products = {stage.product: str(path / stage.product) for stage in stages}
    return Build(
        path.name,
        path,
        products,
        tuple(results),
        tuple(Metric(**item) for item in choice["metrics"]),
        choice["method"],
        choice["why"],
    )


@contextmanager
def _measured(store: Path, stage: Stage, cluster: Cluster) -> Iterator[None]:
    """Remember what a stage took."""
    wall, before = time.monotonic(), cluster.cpu_seconds()
    yield
    after = cluster.cpu_seconds()
    cpu = sum(max(now - before.get(name, 0.0), 0.0) for name, now in after.items())
    put_cost(store, stage.recipe.fingerprint, Cost(time.monotonic() - wall, cpu))

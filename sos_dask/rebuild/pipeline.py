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
from sos_dask.rebuild.plan import Plan, Planned
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.stages.compare import Compare
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.store import (
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
    plan = Plan(job, store)
    store = plan.store
    done: list[Planned] = []
    results: list[StageResult] = []

    def finish(planned: Planned) -> None:
        stage, ran = planned.recipe.stage, not planned.complete
        result = result_of(planned.product, stage, planned.directory, ran, planned.reason)
        done.append(planned)
        results.append(result)
        on_stage(result)

    def run_all(active: Cluster) -> None:
        for step in plan.steps:
            planned = plan.resolve(step)  # now it is known which model corrects the catalog
            if not planned.complete:
                with _measured(store, planned, active):
                    planned.run(active, report)
            finish(planned)

    known = plan.all()
    if all(planned.complete for planned in known):
        for planned in known:
            finish(planned)
    elif cluster is None or isinstance(cluster, Cluster):
        run_all(cluster or Cluster())
    else:
        with cluster() as active:
            run_all(active)
    for planned in done:
        if not planned.complete:  # a rebuild beside this one may have been ahead of these workers
            Output(home(planned.recipe.stage, planned.directory), planned.recipe).tidy()
    for number, planned in enumerate(done):
        report("check products", number, len(done))
        # What this very run has hashed while it wrote needs no second look at its content.
        by = job.publish.check if planned.complete else "size"
        check_product(planned.product, planned.recipe.stage, planned.directory, by)
    report("check products", len(done), len(done))
    comparison = next(planned for planned in done if planned.step.stage is Compare)
    choice = Manifest.load(comparison.directory).summary
    path = publish(
        store,
        job.name,
        job.text,
        {planned.product: (planned.recipe, planned.directory) for planned in done},
    )
    return Build(
        path.name,
        path,
        {planned.product: str(path / planned.product) for planned in done},
        tuple(results),
        tuple(Metric(**item) for item in choice["metrics"]),
        choice["method"],
        choice["why"],
    )


@contextmanager
def _measured(store: Path, planned: Planned, cluster: Cluster) -> Iterator[None]:
    """Remember what a stage took."""
    wall, before = time.monotonic(), cluster.cpu_seconds()
    yield
    after = cluster.cpu_seconds()
    cpu = sum(max(now - before.get(name, 0.0), 0.0) for name, now in after.items())
    put_cost(store, planned.recipe.fingerprint, wall_s=time.monotonic() - wall, cpu_s=cpu)

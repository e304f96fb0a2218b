"""Rebuild: what has changed in a job's plan is run, then all products are published at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sos_dask.errors import SosError
from sos_dask.evidence.figures import Metric
from sos_dask.rebuild.job import Job
from sos_dask.rebuild.plan import Plan, Planned
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.stages.compare import Compare
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.objects import followed
from sos_dask.storage.store import (
    StageResult,
    check_product,
    home,
    publish,
    put_cost,
    result_of,
)


@dataclass(frozen=True)
class Choice:
    """The method that was chosen for one correction, why, and the figures of all methods."""

    chosen: str
    why: str
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class Build:
    """A published build; ``choices`` by the names of corrections' products, in their order."""

    name: str
    path: Path
    products: Mapping[str, str]
    stages: tuple[StageResult, ...]
    choices: Mapping[str, Choice]


def rebuild(
    job: Job,
    store: Path | None = None,
    *,
    cluster: Cluster | Callable[[], Any] | None = None,
    report: Report = silent,
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
    known = plan.all()
    complete = all(planned.complete for planned in known)
    place: AbstractContextManager[Cluster] = nullcontext(Cluster())
    if not complete and cluster is not None:
        place = nullcontext(cluster) if isinstance(cluster, Cluster) else cluster()
    done: list[Planned] = []
    results: list[StageResult] = []
    with place as active:
        # Step by step it becomes known which model corrects the catalog.
        for planned in known if complete else map(plan.resolve, plan.steps):
            if not planned.complete:
                with _measured(store, planned, active):
                    planned.run(active, report)
            name, stage, ran = planned.product, planned.recipe.stage, not planned.complete
            results.append(result_of(name, stage, planned.directory, ran, planned.reason))
            done.append(planned)
    for number, planned in enumerate(done):
        report("check products", number, len(done))
        stage, directory, by = planned.recipe.stage, planned.directory, job.publish.check
        if not planned.complete:
            # A rebuild beside this one may have been ahead of these workers.
            Output(home(stage, directory), planned.recipe).tidy()
            by = "size"  # this very run has hashed the content while it wrote
        check_product(planned.product, stage, directory, by)
    report("check products", len(done), len(done))
    choices = {}
    for planned in done:
        if planned.step.stage is Compare:
            found = Manifest.load(planned.directory).summary
            metrics = tuple(Metric(**item) for item in found["metrics"])
            name = planned.product.removesuffix(".comparison")
            choices[name] = Choice(found["method"], found["why"], metrics)
    products = {planned.product: (planned.recipe, planned.directory) for planned in done}
    path = publish(store, job.name, job.text, products)
    return Build(
        path.name,
        path,
        {name: str(followed(path / name)) for name in products},
        tuple(results),
        choices,
    )


@contextmanager
def _measured(store: Path, planned: Planned, cluster: Cluster) -> Iterator[None]:
    """Remember what a stage took."""
    wall, before = time.monotonic(), cluster.cpu_seconds()
    try:
        yield
    except SosError as error:  # which of several surveys or corrections it is
        error.message = f"{planned.product}: {error.message}"
        raise
    after = cluster.cpu_seconds()
    cpu = sum(max(now - before.get(name, 0.0), 0.0) for name, now in after.items())
    put_cost(store, planned.recipe.fingerprint, wall_s=time.monotonic() - wall, cpu_s=cpu)

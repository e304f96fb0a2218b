"""Rebuild: what has changed in a job's plan is run, then all products are published at once.

Unless the gate refuses: then they are a build that ``current`` does not name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sos_dask.errors import CatalogError, GateError, ModelError, SosError, StorageError
from sos_dask.evidence.figures import Metric
from sos_dask.rebuild import gate, history
from sos_dask.rebuild.job import Job
from sos_dask.rebuild.plan import Plan, Planned
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.stages.compare import Compare
from sos_dask.storage import store as stores
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Manifest, Recipe
from sos_dask.storage.objects import followed
from sos_dask.storage.parts import Former
from sos_dask.storage.store import StageResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The method that was chosen for one correction, why, and the figures of all methods."""

    chosen: str
    why: str
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class Build:
    """A build; ``choices`` by the names of corrections' products, in their order.

    ``outcome``: ``published``, ``unchanged`` (it was already) or ``refused`` for ``reasons``.
    """

    name: str
    path: Path
    products: Mapping[str, str]
    stages: tuple[StageResult, ...]
    choices: Mapping[str, Choice]
    outcome: str = "published"
    reasons: tuple[str, ...] = ()


class Watch:
    """Gets to know what a rebuild does; may raise to stop it."""

    def planned(self, store: Path, stages: Sequence[Planned]) -> None:
        """Get the stages before the first of them runs, as far as they are known."""

    def begins(self, product: str) -> None:
        """Get the product of a stage that is to run."""

    def ended(self, result: StageResult, seconds: float) -> None:
        """Get what a stage made, and how long it took."""


def rebuild(
    job: Job,
    store: Path | None = None,
    *,
    cluster: Cluster | Callable[[], Any] | None = None,
    report: Report = silent,
    watch: Watch | None = None,
) -> Build:
    """Run what has changed and publish the products, if the gate lets them pass.

    The store is by default that of the job. The cluster runs the tasks, or gives a context manager
    of what does, which is entered only if a stage runs; by default tasks run in this process.

    Raises `CatalogError` where a file of a product is not the one that was written: nothing is
    published. The SHA-256 of all files are compared, or their bytes (``[publish] check = "size"``;
    always of those that this run has written). Raises `GateError` where the figures of the build
    are outside of the limits of the job (``[gate]``), or a rollback has withdrawn it: it is kept,
    and not published.
    """
    plan = Plan(job, store)
    store, watch = plan.store, watch or Watch()
    known = plan.all()
    watch.planned(store, known)
    complete = all(planned.complete for planned in known)
    place: AbstractContextManager[Cluster] = nullcontext(Cluster())
    if not complete and cluster is not None:
        place = nullcontext(cluster) if isinstance(cluster, Cluster) else cluster()
    former = history.current_products(store)
    done: list[Planned] = []
    results: list[StageResult] = []
    with place as active:
        # Step by step it becomes known which model corrects the catalog.
        for planned in known if complete else map(plan.resolve, plan.steps):
            began, counts = time.monotonic(), {}
            if not planned.complete:
                watch.begins(planned.product)
                with _measured(store, planned, active):
                    before = former.get(planned.product)
                    counts = planned.run(active, report, Former(store.absolute(), before))
            name, stage, ran = planned.product, planned.recipe.stage, not planned.complete
            result = stores.result_of(name, stage, planned.directory, ran, planned.reason)
            results.append(replace(result, parts=counts))
            watch.ended(results[-1], time.monotonic() - began)
            done.append(planned)
    for number, planned in enumerate(done):
        report("check products", number, len(done))
        stage, directory, by = planned.recipe.stage, planned.directory, job.publish.check
        if not planned.complete:
            # A rebuild beside this one may have been ahead of these workers.
            Output(stores.home(stage, directory), planned.recipe).tidy()
            by = "size"  # this very run has hashed the content while it wrote
        stores.check_product(planned.product, stage, directory, by)
    report("check products", len(done), len(done))
    choices = {}
    for planned in done:
        if planned.step.stage is Compare:
            found = Manifest.load(planned.directory).summary
            metrics = tuple(Metric(**item) for item in found["metrics"])
            name = planned.product.removesuffix(".comparison")
            choices[name] = Choice(found["method"], found["why"], metrics)
    products = {planned.product: (planned.recipe, planned.directory) for planned in done}
    path, outcome, refused = _published(job, store, products)
    places = {name: str(followed(path / name)) for name in products}
    build = Build(path.name, path, places, tuple(results), choices, outcome, refused)
    if refused:
        what = f"build {build.name} of {store} is kept, but not published: {'; '.join(refused)}"
        hint = (
            f"See sos-dask diff current {build.name}; sos-dask publish {build.name} publishes it."
        )
        raise GateError(what, hint, build, refused)
    return build


def _published(
    job: Job, store: Path, products: Mapping[str, tuple[Recipe, Path]]
) -> tuple[Path, str, tuple[str, ...]]:
    """Publish products, unless they are or must not be; the build, the outcome, and why not."""
    fingerprints = {product: recipe.fingerprint for product, (recipe, _) in products.items()}
    before = history.current_products(store)
    if stores.published(store) == fingerprints:
        return stores.publish(store, job.name, job.text, products), "unchanged", ()
    now = {name: stores.home(recipe.stage, path) for name, (recipe, path) in products.items()}
    known, withdrawn = history.unpublished(store, fingerprints)
    refused = (withdrawn,) if withdrawn else _refused(job, store, now, before)
    if known is None:
        known = stores.publish(store, job.name, job.text, products, refused)
    elif not refused:
        history.publish_build(store, known.name)
    return known, "refused" if refused else "published", refused


def _refused(
    job: Job, store: Path, now: Mapping[str, Path], before: Mapping[str, Path]
) -> tuple[str, ...]:
    """Reasons not to publish; that nothing can be compared is one, too."""
    found: list[str] = []
    try:
        if job.gate.enabled and not before and (store / "current").exists():
            raise CatalogError("its list of products cannot be read")
        for reason in gate.reasons(job.gate, now, before):
            found.append(reason)
    except StorageError:
        raise
    except SosError as error:
        found.append(f"it cannot be compared with the published build: {error.message}")
    return tuple(found)


@contextmanager
def _measured(store: Path, planned: Planned, cluster: Cluster) -> Iterator[None]:
    """Remember what a stage took."""
    wall, before = time.monotonic(), cluster.cpu_seconds()
    try:
        yield
    except ModelError as error:  # which of several surveys or corrections it is
        error.message = f"{planned.product}: {error.message}"
        raise
    after = cluster.cpu_seconds()
    cpu = sum(max(now - before.get(name, 0.0), 0.0) for name, now in after.items())
    stores.put_cost(store, planned.recipe.fingerprint, wall_s=time.monotonic() - wall, cpu_s=cpu)

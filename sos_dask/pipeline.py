"""Rebuild: a job becomes stages with fingerprints; what changed is run, then published at once.

On disk (``<store>``)::

    artifacts/<stage>/<fingerprint>/     one output each, complete when it has a manifest
    builds/<utc>/<product>               links to artifacts, and build.json
    current                              link to the latest build, swapped atomically
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sos_dask import __version__, models
from sos_dask.artifact import (
    MANIFEST,
    WORK,
    Manifest,
    Output,
    Recipe,
    Rows,
    canonical_json,
    sha256_of_file,
    storage_errors,
    write_text,
)
from sos_dask.catalog import PROPERTIES, Catalog
from sos_dask.cluster import Cluster, Report, silent
from sos_dask.compare import Metric, choose
from sos_dask.config import DedupeSection, Job, SurveySection
from sos_dask.crossmatch import MatchSettings
from sos_dask.dedupe import DedupeSettings
from sos_dask.errors import CatalogError, ConfigError, SurveyError
from sos_dask.schema import load_survey
from sos_dask.stages.apply import apply, apply_recipe
from sos_dask.stages.crossmatch import PairSettings, crossmatch, crossmatch_recipe
from sos_dask.stages.dedupe import dedupe, dedupe_recipe
from sos_dask.stages.ingest import IngestSettings, ingest, ingest_recipe
from sos_dask.stages.margin import margin, margin_recipe
from sos_dask.stages.reference import ReferenceSettings, reference, reference_recipe
from sos_dask.stages.train import TrainSettings, metrics_of, train, train_recipe
from sos_dask.stages.trends import TrendSettings, trends, trends_recipe
from sos_dask.unify import UnifySettings

BUILD_FILE = "build.json"


@dataclass(frozen=True)
class Stage:
    """One stage of a plan.

    Parameters
    ----------
    product : str
        Name of what it makes, unique in the plan.
    recipe : Recipe
    directory : Path
        Where the output is or will be.
    run : callable
        Makes the output; takes the cluster and a report.
    complete : bool
    reason : str
        Why it would run, or ``unchanged``.
    """

    product: str
    recipe: Recipe
    directory: Path
    run: Callable[[Cluster, Report], Manifest | None]
    complete: bool
    reason: str


@dataclass(frozen=True)
class StageResult:
    """What became of one stage."""

    product: str
    stage: str
    ran: bool
    why: str
    rows_in: int
    rows_out: int
    rejected: int
    dropped: Mapping[str, int]
    added: Mapping[str, int]
    path: str
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """A published build."""

    name: str
    path: Path
    products: Mapping[str, str]
    stages: tuple[StageResult, ...]
    metrics: tuple[Metric, ...]
    chosen: str


class _Planner:
    """Collects the stages of a job in order."""

    def __init__(self, job: Job, store: Path) -> None:
        self.job = job
        self.store = store
        self.stages: list[Stage] = []
        self.published = _published(store)
        self.previous = _current_recipes(store)
        self.names: dict[str, str] = {}  # of products and files, by fingerprint

    def add(
        self, product: str, recipe: Recipe, run: Callable[[Path, Cluster, Report], Manifest | None]
    ) -> str:
        """Add a stage; returns the fingerprint of its output."""
        if any(stage.product == product for stage in self.stages):
            raise ConfigError(f"two stages would make '{product}': give the surveys other names")
        directory = self.store / "artifacts" / recipe.stage / recipe.fingerprint
        home = _home(recipe.stage, directory)
        complete = Output(home, recipe).complete
        self.names[recipe.fingerprint] = product
        reason = "unchanged" if complete else self._reason(product, recipe, home)
        self.stages.append(
            Stage(
                product,
                recipe,
                directory,
                lambda cluster, report: run(directory, cluster, report),
                complete,
                reason,
            )
        )
        return recipe.fingerprint

    def directory(self, fingerprint: str) -> Path:
        """Directory of an output planned before."""
        return next(s.directory for s in self.stages if s.recipe.fingerprint == fingerprint)

    def catalog(self, fingerprint: str) -> Catalog:
        """Catalog planned before; it exists once its stage has run."""
        return Catalog.open(self.directory(fingerprint))

    def _reason(self, product: str, recipe: Recipe, directory: Path) -> str:
        if (directory / WORK).is_dir():
            return "unfinished: goes on where it stopped"
        if self.published.get(product) == recipe.fingerprint:
            return "its output was removed"
        before = self.previous.get(product)
        if before is None:
            return "not built before"
        if before.stage != recipe.stage or before.version != recipe.version:
            return f"version of the stage {before.version} -> {recipe.version}"
        settings = _differences(before.params, recipe.params)
        inputs = [
            f"{self.names.get(now, name)} changed"
            for name, now in recipe.inputs.items()
            if now not in before.inputs.values()
        ]
        removed = [f"{name} removed" for name in before.inputs if name not in recipe.inputs]
        return "; ".join([*settings, *inputs, *removed])


def _differences(before: Any, after: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, as ``key old -> new``."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found = []
        for key in sorted({*before, *after}):
            inner = f"{where}.{key}" if where else str(key)
            found += _differences(before.get(key), after.get(key), inner)
        return found
    if canonical_json(before) == canonical_json(after):
        return []
    short = where.removeprefix("settings.").removeprefix("survey.")
    return [f"{short} {_brief(before)} -> {_brief(after)}"]


def _brief(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def plan(job: Job, store: Path | None = None) -> list[Stage]:
    """Stages of a job in the order of their inputs, each with the reason why it would run.

    Reads the survey files once to hash them (remembered by size and time of change).

    Raises
    ------
    ConfigError, SurveyError
        The job or a survey definition is wrong, or a survey file is missing.
    """
    store = store or job.resolve(job.store)
    planner = _Planner(job, store)
    observations = _add_survey(planner, job.target_name, job.target)
    references = {
        name: _add_survey(planner, name, section)["stars"]
        for name, section in job.reference.items()
    }
    unify = UnifySettings(
        method=job.unify.method,
        order=tuple(job.unify.order or job.reference),
        offsets=job.unify.fixed_offsets,
    )
    reference_settings = ReferenceSettings(
        unify,
        job.unify.radius_arcsec,
        job.unify.id_radius_arcsec,
        job.unify.epoch,
        job.ingest.rows_per_partition,
        job.unify.offsets == "measured",
    )
    united = planner.add(
        "reference",
        reference_recipe(references, reference_settings),
        lambda directory, cluster, report: reference(
            {name: planner.catalog(fingerprint) for name, fingerprint in references.items()},
            directory,
            reference_settings,
            cluster=cluster,
            report=report,
        ),
    )
    match = job.crossmatch
    pair_settings = PairSettings(
        MatchSettings(match.radius_arcsec, match.id_radius_arcsec, match.pairs, match.use_gaia_id),
        match.n_folds,
        job.seed,
    )
    left = observations[match.target]
    pairs = planner.add(
        "pairs",
        crossmatch_recipe(left, united, pair_settings),
        lambda directory, cluster, report: crossmatch(
            planner.catalog(left),
            planner.catalog(united),
            directory,
            pair_settings,
            cluster=cluster,
            report=report,
        ),
    )
    trained = {method: _add_training(planner, method, pairs) for method in job.train.methods}
    chosen = planner.add(
        "chosen",
        Recipe("choose", 1, {"rule": job.train.choose}, trained),
        lambda directory, cluster, report: _choose(planner, directory, trained, job.train.choose),
    )
    trend_settings = TrendSettings(order=unify.order)
    planner.add(
        "trends",
        trends_recipe(pairs, trend_settings, trained, united, references),
        lambda directory, cluster, report: trends(
            planner.catalog(pairs),
            directory,
            trend_settings,
            models={name: planner.directory(model) for name, model in trained.items()},
            reference=planner.catalog(united),
            stars={name: planner.catalog(catalog) for name, catalog in references.items()},
            cluster=cluster,
            report=report,
        ),
    )
    source = observations["observations"]

    def run_apply(directory: Path, cluster: Cluster, report: Report) -> Manifest | None:
        method = Manifest.load(planner.directory(chosen)).summary["method"]
        return apply(
            planner.directory(trained[method]),
            planner.catalog(source),
            directory,
            name=f"{job.target_name}.corrected",
            cluster=cluster,
            report=report,
            model_fingerprint=chosen,
        )

    planner.add(f"{job.target_name}.corrected", apply_recipe(chosen, source), run_apply)
    return planner.stages


def _add_survey(planner: _Planner, name: str, section: SurveySection) -> dict[str, str]:
    """Ingest and dedupe of one survey; fingerprints of its observations and its stars."""
    job = planner.job
    definition = section.survey
    if definition.endswith(".toml") or "/" in definition:
        definition = str(job.resolve(definition))
    survey = load_survey(definition, section.override)
    files = [job.resolve(file) for file in section.files]
    digests = _digests(planner.store, files)
    planner.names |= {digest: file.name for digest, file in zip(digests, files, strict=True)}
    settings = IngestSettings(job.ingest.rows_per_partition, job.ingest.chunk_rows)
    product = f"{name}.observations"
    observations = planner.add(
        product,
        ingest_recipe(survey, digests, settings, product),
        lambda directory, cluster, report: ingest(
            survey,
            files,
            directory,
            settings,
            name=product,
            cluster=cluster,
            report=report,
            digests=digests,
        ),
    )
    products = {"observations": observations}
    if job.ingest.margin_arcsec is not None:
        radius = job.ingest.margin_arcsec
        planner.add(
            f"{name}.collection",
            margin_recipe(observations, radius),
            lambda directory, cluster, report: margin(
                planner.catalog(observations), directory, radius, cluster=cluster, report=report
            ),
        )
    dedupe_settings = _dedupe_settings(section.dedupe or job.dedupe)
    products["stars"] = planner.add(
        f"{name}.stars",
        dedupe_recipe(observations, dedupe_settings, survey.expected_error),
        lambda directory, cluster, report: dedupe(
            planner.catalog(observations),
            directory,
            dedupe_settings,
            expected_error=survey.expected_error,
            name=f"{name}.stars",
            cluster=cluster,
            report=report,
        ),
    )
    return products


def _dedupe_settings(section: DedupeSection) -> DedupeSettings:
    return DedupeSettings(**section.model_dump())


def _add_training(planner: _Planner, method: str, pairs: str) -> str:
    job = planner.job
    seed = {"seed": job.seed} if "seed" in models.parameters(method) else {}
    params = {**seed, **job.train.params.get(method, {})}
    settings = TrainSettings(method, models.check_params(method, params), job.train.validation)
    return planner.add(
        f"model.{method}",
        train_recipe(pairs, settings),
        lambda directory, cluster, report: train(
            planner.catalog(pairs), directory, settings, cluster=cluster, report=report
        ),
    )


def _choose(planner: _Planner, directory: Path, trained: Mapping[str, str], rule: str) -> Manifest:
    """Choose the method that corrects the catalog, by the rule of the job."""
    metrics = [
        metric
        for fingerprint in trained.values()
        for metric in metrics_of(Manifest.load(planner.directory(fingerprint)))
    ]
    output = Output.prepare(directory, Recipe("choose", 1, {"rule": rule}, trained))
    if output.complete:
        return output.load_manifest()
    method = rule if rule in trained else choose(metrics)
    summary = {"method": method, "metrics": [asdict(metric) for metric in metrics]}
    return output.commit(Rows(0, 0), (), summary)


def _digests(store: Path, files: list[Path]) -> list[str]:
    """SHA-256 of the survey files, remembered in the store by path, size and time of change."""
    memory = store / "digests.json"
    try:
        known: dict[str, str] = json.loads(memory.read_text())
    except (OSError, json.JSONDecodeError):
        known = {}
    digests = []
    for file in files:
        if not file.is_file():
            raise SurveyError(
                f"{file} does not exist" if not file.exists() else f"{file} is not a file",
                "Check the path in the job file; environment variables can set its folder.",
            )
        stat = file.stat()
        key = f"{file}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            known[key] = sha256_of_file(file)
            write_text(memory, json.dumps(known, indent=1, sort_keys=True))
        digests.append(known[key])
    return digests


def rebuild(
    job: Job,
    store: Path | None = None,
    *,
    cluster: Callable[[], Any] | None = None,
    report: Report = silent,
    on_stage: Callable[[StageResult], None] = lambda result: None,
) -> Build:
    """Run what has changed and publish the products.

    Parameters
    ----------
    job : Job
    store : Path, optional
        Default: that of the job.
    cluster : callable, optional
        Gives a context manager of a `Cluster`; it is entered only if a stage runs. Default: tasks
        run in this process.
    report : Report
    on_stage : callable
        Gets each stage's result as it is done.

    Returns
    -------
    Build
    """
    store = store or job.resolve(job.store)
    stages = plan(job, store)
    results: list[StageResult] = []

    def finish(stage: Stage, ran: bool) -> None:
        result = _result_of(stage, ran)
        results.append(result)
        on_stage(result)

    def run_all(active: Cluster) -> None:
        for stage in stages:
            if not stage.complete:
                stage.run(active, report)
            finish(stage, not stage.complete)

    if all(stage.complete for stage in stages):
        for stage in stages:
            finish(stage, False)
    elif cluster is None:
        run_all(Cluster())
    else:
        with cluster() as active:
            run_all(active)
    for stage in stages:
        if not stage.complete:  # a rebuild beside this one may have been ahead of these workers
            Output(_home(stage.recipe.stage, stage.directory), stage.recipe).tidy()
    metrics, chosen = _choice_of(stages)
    path = _publish(store, job, stages)
    products = {stage.product: str(path / stage.product) for stage in stages}
    return Build(path.name, path, products, tuple(results), metrics, chosen)


def _home(stage: str, directory: Path) -> Path:
    """Where the manifest of an output is: a margin catalog lies inside its collection."""
    return directory / "margin" if stage == "margin" else directory


def _result_of(stage: Stage, ran: bool) -> StageResult:
    manifest = Manifest.load(_home(stage.recipe.stage, stage.directory))
    return StageResult(
        product=stage.product,
        stage=stage.recipe.stage,
        ran=ran,
        why=stage.reason,
        rows_in=manifest.rows.n_in,
        rows_out=manifest.rows.n_out,
        rejected=manifest.rows.rejected,
        dropped=dict(manifest.rows.dropped),
        added=dict(manifest.rows.added),
        path=str(stage.directory),
        summary=manifest.summary,
    )


def _choice_of(stages: list[Stage]) -> tuple[tuple[Metric, ...], str]:
    stage = next(stage for stage in stages if stage.product == "chosen")
    summary = Manifest.load(stage.directory).summary
    return tuple(Metric(**item) for item in summary["metrics"]), str(summary["method"])


def _publish(store: Path, job: Job, stages: list[Stage]) -> Path:
    """Link the products into a new build and let ``current`` name it; an equal build is kept."""
    fingerprints = {stage.product: stage.recipe.fingerprint for stage in stages}
    current = store / "current"
    if _published(store) == fingerprints:
        return current.resolve()
    now = datetime.datetime.now(datetime.UTC)
    build = store / "builds" / now.strftime("%Y%m%dT%H%M%S.%fZ")
    with storage_errors(build):
        build.mkdir(parents=True)
        for stage in stages:
            target = os.path.relpath(stage.directory, build)
            (build / stage.product).symlink_to(target, target_is_directory=True)
        document = {
            "job": job.name,
            "job_file": job.text,
            "products": fingerprints,
            "stages": {stage.product: stage.recipe.stage for stage in stages},
            "sos_dask": __version__,
            "utc": now.isoformat(timespec="seconds"),
        }
        write_text(build / BUILD_FILE, json.dumps(document, indent=1))
        swap = store / f".current.{os.getpid()}"
        swap.unlink(missing_ok=True)
        swap.symlink_to(os.path.relpath(build, store), target_is_directory=True)
        swap.replace(current)
    return build


def _read_build(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / BUILD_FILE).read_text()))
    except (OSError, ValueError) as error:
        raise CatalogError(f"{path} is not a build: {error}") from None


def _published(store: Path) -> dict[str, str]:
    """Fingerprints of the products of the latest build; empty without a readable one."""
    try:
        return dict(_read_build(store / "current")["products"])
    except (CatalogError, KeyError):
        return {}


def _current_recipes(store: Path) -> dict[str, Recipe]:
    """Recipes of the products of the latest build; empty without one."""
    current = store / "current"
    recipes = {}
    for product in _published(store):
        directory = (current / product).resolve()
        try:
            recipes[product] = Manifest.load(_home(directory.parent.name, directory)).recipe
        except CatalogError:
            continue
    return recipes


def catalogs_of(build: Path) -> list[Path]:
    """Catalogs among the products of a build, in the order of the plan.

    Raises
    ------
    CatalogError
        Not a build.
    """
    products = [build / product for product in _read_build(build)["products"]]
    return [path for path in products if (path / PROPERTIES).is_file()]


@dataclass(frozen=True)
class StoreStatus:
    """What a store holds; ``missing``: products of the build that are gone, or damaged."""

    store: Path
    current: str
    builds: tuple[str, ...]
    products: tuple[StageResult, ...]
    missing: tuple[str, ...]
    unfinished: tuple[str, ...]
    unused_bytes: int
    bytes: int


def status(store: Path) -> StoreStatus:
    """Latest build of a store, its products in the order of the plan, unfinished outputs, space.

    Raises
    ------
    CatalogError
        The folder is no store.
    """
    if not (store / "artifacts").is_dir():
        raise CatalogError(f"{store} is not a store: it has no artifacts", "Run a rebuild first.")
    products, missing = [], []
    current = store / "current"
    name = ""
    if current.exists():
        build = _read_build(current)
        name = current.resolve().name
        for product, stage_name in build["stages"].items():
            directory = (current / product).resolve()
            try:
                recipe = Manifest.load(_home(stage_name, directory)).recipe
            except CatalogError as error:
                missing.append(f"{product}: {error.message}")
                continue
            stage = Stage(product, recipe, directory, lambda *_: None, True, "published")
            products.append(_result_of(stage, False))
    used = _used_artifacts(store, keep=None)
    artifacts = _artifacts(store)
    sizes = {path: _size(path) for path in artifacts}
    return StoreStatus(
        store,
        name,
        tuple(sorted(path.name for path in (store / "builds").glob("*"))),
        tuple(products),
        tuple(missing),
        tuple(str(path.relative_to(store)) for path in artifacts if _is_unfinished(path)),
        sum(size for path, size in sizes.items() if path not in used),
        sum(sizes.values()),
    )


def gc(store: Path, *, keep_builds: int = 1, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove old builds and every output that no kept build uses.

    Parameters
    ----------
    keep_builds : int
        How many of the latest builds stay (at least 1: the current one always does).
    dry_run : bool
        Only say what would go.

    Returns
    -------
    list of (Path, int)
        What was (would be) removed, with its bytes. Unfinished outputs go, too: do not run it
        beside a rebuild.
    """
    if keep_builds < 1:
        raise ConfigError(f"{keep_builds} builds cannot be kept: the current one always stays")
    if not (store / "artifacts").is_dir():
        raise CatalogError(f"{store} is not a store: it has no artifacts")
    kept = _kept_builds(store, keep_builds)
    used = _used_artifacts(store, keep_builds)
    doomed = [path for path in sorted((store / "builds").glob("*")) if path not in kept]
    doomed += [path for path in _artifacts(store) if path not in used]
    removed = [(path, _size(path)) for path in doomed]
    if not dry_run:
        for path in doomed:
            shutil.rmtree(path)
    return removed


def _artifacts(store: Path) -> list[Path]:
    return sorted(path for path in (store / "artifacts").glob("*/*") if path.is_dir())


def _is_unfinished(path: Path) -> bool:
    return not (_home(path.parent.name, path) / MANIFEST).is_file()


def _kept_builds(store: Path, keep: int | None) -> set[Path]:
    builds = sorted((store / "builds").glob("*"))
    kept = set(builds if keep is None else builds[-keep:])
    current = store / "current"
    if current.exists():
        kept.add(store / "builds" / current.resolve().name)
    return kept


def _used_artifacts(store: Path, keep: int | None) -> set[Path]:
    root = store.resolve()
    return {
        store / link.resolve().relative_to(root)
        for build in _kept_builds(store, keep)
        for link in build.iterdir()
        if link.is_symlink()
    }


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())

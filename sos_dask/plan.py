"""The plan of a job: its stages in the order of their inputs, each with why it would run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sos_dask import models
from sos_dask.artifact import (
    WORK,
    Manifest,
    Output,
    Recipe,
    Rows,
    canonical_json,
    sha256_of_file,
    write_text,
)
from sos_dask.catalog import Catalog
from sos_dask.cluster import Cluster, Report
from sos_dask.compare import choose
from sos_dask.config import DedupeSection, Job, SurveySection
from sos_dask.crossmatch import MatchSettings
from sos_dask.dedupe import DedupeSettings
from sos_dask.errors import ConfigError, SurveyError
from sos_dask.schema import load_survey
from sos_dask.stages.apply import apply, apply_recipe
from sos_dask.stages.crossmatch import PairSettings, crossmatch, crossmatch_recipe
from sos_dask.stages.dedupe import dedupe, dedupe_recipe
from sos_dask.stages.ingest import IngestSettings, ingest, ingest_recipe
from sos_dask.stages.margin import margin, margin_recipe
from sos_dask.stages.reference import ReferenceSettings, reference, reference_recipe
from sos_dask.stages.train import TrainSettings, metrics_of, train, train_recipe
from sos_dask.stages.trends import TrendSettings, trends, trends_recipe
from sos_dask.store import current_recipes, home, published
from sos_dask.unify import UnifySettings


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


class _Planner:
    """Collects the stages of a job in order."""

    def __init__(self, job: Job, store: Path) -> None:
        self.job = job
        self.store = store
        self.stages: list[Stage] = []
        self.published = published(store)
        self.previous = current_recipes(store)
        self.names: dict[str, str] = {}  # of products and files, by fingerprint

    def add(
        self, product: str, recipe: Recipe, run: Callable[[Path, Cluster, Report], Manifest | None]
    ) -> str:
        """Add a stage; returns the fingerprint of its output."""
        if any(stage.product == product for stage in self.stages):
            raise ConfigError(f"two stages would make '{product}': give the surveys other names")
        directory = self.store / "artifacts" / recipe.stage / recipe.fingerprint
        place = home(recipe.stage, directory)
        complete = Output(place, recipe).complete
        self.names[recipe.fingerprint] = product
        reason = "unchanged" if complete else self._reason(product, recipe, place)
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
    settings = TrainSettings(
        method,
        models.check_params(method, params),
        job.train.validation,
        search=job.train.search,
        seed=job.seed,
    )
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

"""The plan of a job: its stages in the order of their inputs, each with why it would run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from sos_dask import corrections as models
from sos_dask.errors import ConfigError, SurveyError
from sos_dask.evidence.choice import check_rule
from sos_dask.evidence.projection import ProjectionSettings
from sos_dask.rebuild.job import AttachSection, Job, SurveySection
from sos_dask.rebuild.planner import Planner, Stage
from sos_dask.run.machine import n_cores
from sos_dask.stages.apply import Trust, apply, apply_recipe
from sos_dask.stages.attach import AttachSettings, attach, attach_recipe, companion_survey
from sos_dask.stages.compare import Compare, CompareSettings
from sos_dask.stages.coverage import Coverage, CoverageSettings, coverage_recipe
from sos_dask.stages.crossmatch import PairSettings, crossmatch, crossmatch_recipe
from sos_dask.stages.dedupe import dedupe, dedupe_recipe
from sos_dask.stages.evidence import Evidence, EvidenceSettings, make_evidence
from sos_dask.stages.generalisation import Generalisation, GeneralisationSettings
from sos_dask.stages.ingest import IngestSettings, ingest, ingest_recipe
from sos_dask.stages.margin import margin, margin_recipe
from sos_dask.stages.projection import ProjectionStage
from sos_dask.stages.reference import ReferenceSettings, reference, reference_recipe
from sos_dask.stages.report import ReportSettings, report_recipe
from sos_dask.stages.report import report as make_report
from sos_dask.stages.train import TrainSettings, train, train_recipe
from sos_dask.stages.trends import Trends, TrendSettings
from sos_dask.stages.uncertainty import (
    Surveys,
    UncertaintySettings,
    uncertainty,
    uncertainty_recipe,
)
from sos_dask.stars.match import MatchSettings
from sos_dask.stars.unify import UnifySettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import sha256_of_file
from sos_dask.storage.store import DIGESTS_FILE, remember, remembered
from sos_dask.surveys.definition import Survey, load_survey

COMPARISON = "comparison"


def plan(job: Job, store: Path | None = None) -> list[Stage]:
    """Stages of a job in the order of their inputs, each with the reason why it would run.

    Reads the survey files once to hash them (remembered by size and time of change). Which model a
    rule will choose is known once the comparison has run: the stages after it must then be planned
    again.

    Raises
    ------
    ConfigError, SurveyError
        The job or a survey definition is wrong, or a survey file is missing.
    """
    job = _checked(job)
    target = str(job.target_name)
    store = store or job.resolve(job.store)
    planner = Planner(job, store)
    observations = _add_survey(planner, target, job.target, job.attach)
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
        unify=unify,
        radius_arcsec=job.unify.radius_arcsec,
        id_radius_arcsec=job.unify.id_radius_arcsec,
        epoch=job.unify.epoch,
        rows_per_partition=job.ingest.rows_per_partition,
        measure_offsets=job.unify.offsets == "measured",
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
        match=MatchSettings(
            radius_arcsec=match.radius_arcsec,
            id_radius_arcsec=match.id_radius_arcsec,
            pairs=match.pairs,
            use_gaia_id=match.use_gaia_id,
        ),
        n_folds=match.n_folds,
        seed=job.seed,
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
    models_by_name = {f"model.{method}": one for method, one in trained.items()}
    evidence = planner.add(
        "evidence",
        Evidence.recipe(EvidenceSettings(), {"pairs": pairs, **models_by_name}),
        lambda directory, cluster, report: make_evidence(
            planner.catalog(pairs),
            {name: planner.directory(model) for name, model in trained.items()},
            directory,
            cluster=cluster,
            report=report,
        ),
    )
    compare_settings = CompareSettings(
        **job.compare.model_dump(exclude={"rule"}),
        rule=check_rule(job.compare.rule, job.train.methods),
        seed=job.seed,
    )
    compared = planner.add(
        COMPARISON,
        Compare.recipe(compare_settings, {"evidence": evidence, **models_by_name}),
        lambda directory, cluster, report: Compare(
            {
                "evidence": planner.directory(evidence),
                **{f"model.{name}": planner.directory(model) for name, model in trained.items()},
            },
            compare_settings,
        ).run(directory, cluster=cluster, report=report),
    )
    chosen = planner.chosen(compared, trained, compare_settings.rule)
    trend_settings = TrendSettings(order=unify.order)
    planner.add(
        "trends",
        Trends.recipe(
            trend_settings,
            {
                "evidence": evidence,
                "reference": united,
                **{f"stars.{name}": one for name, one in references.items()},
            },
        ),
        lambda directory, cluster, report: Trends(
            {
                "evidence": planner.directory(evidence),
                "reference": planner.catalog(united),
                **{f"stars.{n}": planner.catalog(one) for n, one in references.items()},
            },
            trend_settings,
        ).run(directory, cluster=cluster, report=report),
    )
    error_settings = UncertaintySettings(
        job.uncertainty.reference_error, job.uncertainty.sparse_fraction, seed=job.seed
    )
    target_stars = observations["stars"]
    error_recipe = uncertainty_recipe(
        chosen,
        pairs,
        error_settings,
        {
            f"{target}.stars": target_stars,
            "reference": united,
            **{f"{name}.stars": fingerprint for name, fingerprint in references.items()},
        },
    )
    errors = planner.add(
        "uncertainty",
        error_recipe,
        lambda directory, cluster, report: uncertainty(
            planner.directory(chosen),
            planner.catalog(pairs),
            directory,
            error_settings,
            Surveys(
                target,
                planner.catalog(target_stars),
                planner.catalog(united),
                {name: planner.catalog(references[name]) for name in references},
            ),
            recipe=error_recipe,
            cluster=cluster,
            report=report,
        ),
    )
    source = observations["observations"]
    covered = _add_coverage(planner, evidence, chosen, pairs, observations, errors)
    fallback = job.coverage.fallback
    if fallback == "auto":
        fallback = "polynomial" if "polynomial" in trained else "edge"
    smooth = trained["polynomial"] if fallback == "polynomial" else None
    planner.add(
        f"{target}.corrected",
        apply_recipe(chosen, source, errors, covered, fallback, smooth or ""),
        lambda directory, cluster, report: apply(
            planner.directory(chosen),
            planner.catalog(source),
            directory,
            name=f"{target}.corrected",
            cluster=cluster,
            report=report,
            errors=planner.directory(errors),
            trust=Trust(
                planner.catalog(covered), fallback, planner.directory(smooth) if smooth else None
            ),
        ),
    )
    _add_looks(planner, pairs, evidence, source)
    if job.report.enabled:
        _add_report(planner)
    return planner.stages


@contextmanager
def _key(job: Job, key: str) -> Iterator[None]:
    """Put the job file and its key before the message of an error."""
    try:
        yield
    except (ConfigError, SurveyError) as error:
        raise type(error)(f"{job.path}: {key}: {error.message}", error.hint) from None


def _checked(job: Job) -> Job:
    """Job whose target has a name; wrong surveys, methods and parameters are refused."""
    sections = {"target": job.target} | {f"reference.{n}": s for n, s in job.reference.items()}
    for name, section in sections.items():
        with _key(job, f"{name}.survey"):
            definition = _definition(job, section)
        if name == "target" and job.target_name is None:
            job = job.model_copy(update={"target_name": definition.name})
            if definition.name in job.reference:
                raise ConfigError(
                    f"{job.path}: the target's survey and a reference are named "
                    f"'{definition.name}'",
                    'Give the target another name: target_name = "...".',
                )
    for method in job.train.methods:
        with _key(job, "train.methods"):
            models.parameters(method)
        with _key(job, f"train.params.{method}"):
            _params(job, method)
    with _key(job, "compare.rule"):
        check_rule(job.compare.rule, job.train.methods)
    return job


def _definition(job: Job, section: SurveySection) -> Survey:
    """Definition of a survey with the changes of the job."""
    definition = section.survey
    if definition.endswith(".toml") or "/" in definition:
        definition = str(job.resolve(definition))
    return load_survey(definition, section.override)


def _add_looks(planner: Planner, pairs: str, evidence: str, source: str) -> None:
    """What a job may ask for beside the correction: nothing else depends on it."""
    job = planner.job
    if job.generalisation is not None:
        methods = {method: _params(job, method) for method in job.train.methods}
        settings = GeneralisationSettings(**job.generalisation.model_dump(), methods=methods)
        planner.add(
            "generalisation",
            Generalisation.recipe(settings, {"evidence": evidence}),
            lambda directory, cluster, report: Generalisation(
                {"evidence": planner.directory(evidence)}, settings
            ).run(directory, cluster=cluster, report=report),
        )
    if job.projection is not None:
        looks = ProjectionSettings(**job.projection.model_dump(), seed=job.seed)
        planner.add(
            "projection",
            ProjectionStage.recipe(looks, {"observations": source, "pairs": pairs}),
            lambda directory, cluster, report: ProjectionStage(
                {"observations": planner.catalog(source), "pairs": planner.catalog(pairs)},
                looks,
                product=f"{job.target_name}.projection",
            ).run(directory, cluster=cluster, report=report),
        )


def _add_report(planner: Planner) -> None:
    """The report of all stages before it."""
    job = planner.job
    done = {stage.product: stage for stage in planner.stages}
    digests = {
        digest
        for stage in done.values()
        if stage.recipe.stage == "ingest"
        for digest in stage.recipe.inputs.values()
    }
    settings = ReportSettings(
        job.name, job.text, {digest: planner.names[digest] for digest in sorted(digests)}
    )
    planner.add(
        "report",
        report_recipe({name: stage.recipe.fingerprint for name, stage in done.items()}, settings),
        lambda directory, cluster, report: make_report(
            {name: stage.directory for name, stage in done.items()},
            directory,
            settings,
            cluster=cluster,
            report=report,
        ),
    )


def _add_coverage(
    planner: Planner,
    evidence: str,
    chosen: str,
    pairs: str,
    target: Mapping[str, str],
    errors: str,
) -> str:
    """Where the correction may be trusted, for every observation."""
    job, section = planner.job, planner.job.coverage
    settings = CoverageSettings(
        measure=section.measure,
        inside=section.inside,
        outside=section.outside,
        grid={str(label): limits for label, limits in section.grid.items()},
        radius_arcsec=(job.target.dedupe or job.dedupe).radius_arcsec,
        seed=job.seed,
    )
    observations, stars = target["observations"], target["stars"]
    return planner.add(
        "coverage",
        coverage_recipe(evidence, chosen, pairs, observations, stars, settings, errors),
        lambda directory, cluster, report: Coverage(
            {
                "evidence": planner.directory(evidence),
                "model": planner.directory(chosen),
                "pairs": planner.catalog(pairs),
                "observations": planner.catalog(observations),
                "stars": planner.catalog(stars),
                "errors": planner.directory(errors),
            },
            settings,
        ).run(directory, cluster=cluster, report=report),
    )


def _add_survey(
    planner: Planner,
    name: str,
    section: SurveySection,
    companions: Mapping[str, AttachSection] | None = None,
) -> dict[str, str]:
    """Ingest, attach and dedupe of one survey; fingerprints of its observations and its stars."""
    job = planner.job
    survey = _definition(job, section)
    observations = _add_ingest(planner, f"{name}.observations", survey, section.files)
    for companion, attached in (companions or {}).items():
        observations = _add_attach(planner, name, observations, companion, attached)
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
    dedupe_settings = section.dedupe or job.dedupe
    products["stars"] = planner.add(
        f"{name}.stars",
        dedupe_recipe(observations, dedupe_settings),
        lambda directory, cluster, report: dedupe(
            planner.catalog(observations),
            directory,
            dedupe_settings,
            name=f"{name}.stars",
            cluster=cluster,
            report=report,
        ),
    )
    return products


def _add_ingest(planner: Planner, product: str, survey: Survey, names: list[str]) -> str:
    job = planner.job
    files = [job.resolve(file) for file in names]
    digests = _digests(planner.store, files)
    planner.names |= {digest: file.name for digest, file in zip(digests, files, strict=True)}
    settings = IngestSettings(
        rows_per_partition=job.ingest.rows_per_partition, chunk_rows=job.ingest.chunk_rows
    )
    return planner.add(
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


def _add_attach(
    planner: Planner, name: str, catalog: str, companion: str, section: AttachSection
) -> str:
    """Columns of a companion catalog on the observations; ingests it where it is a table file."""
    job = planner.job
    columns = section.columns
    if section.catalog is not None:
        path = job.resolve(section.catalog)
        other = Catalog.open(path).fingerprint

        def opened() -> Catalog:
            return Catalog.open(path)
    else:
        survey = companion_survey(
            companion,
            columns,
            key=section.id,
            ra=section.ra,
            dec=section.dec,
            epoch=section.epoch,
            by=section.by,
        )
        other = _add_ingest(planner, f"{companion}.companion", survey, section.files)
        columns = {column: column for column in columns}

        def opened() -> Catalog:
            return planner.catalog(other)

    settings = AttachSettings(
        columns=columns,
        by=section.by,
        radius_arcsec=section.radius_arcsec,
        id_radius_arcsec=section.id_radius_arcsec,
    )
    return planner.add(
        f"{name}.with-{companion}",
        attach_recipe(catalog, other, settings),
        lambda directory, cluster, report: attach(
            planner.catalog(catalog),
            opened(),
            directory,
            settings,
            name=f"{name}.observations",
            cluster=cluster,
            report=report,
        ),
    )


def _add_training(planner: Planner, method: str, pairs: str) -> str:
    job = planner.job
    settings = TrainSettings(
        method=method,
        params=_params(job, method),
        validation=job.train.validation,
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


def _params(job: Job, method: str) -> dict[str, int | float | str]:
    seed = {"seed": job.seed} if "seed" in models.parameters(method) else {}
    return models.check_params(method, {**seed, **job.train.params.get(method, {})})


def _digests(store: Path, files: list[Path]) -> list[str]:
    """SHA-256 of the survey files, remembered in the store by path, size and time of change."""
    memory = store / DIGESTS_FILE
    known = remembered(memory)
    keys = {}
    for file in files:
        if not file.is_file():
            raise SurveyError(
                f"{file} does not exist" if not file.exists() else f"{file} is not a file",
                "Check the path in the job file; environment variables can set its folder. "
                'Of [attach.NAME], a catalog is given as catalog = "DIR", not in files.',
            )
        stat = file.stat()
        keys[file] = f"{file}:{stat.st_size}:{stat.st_mtime_ns}"
    missing = [file for file, key in keys.items() if key not in known]
    with ThreadPoolExecutor(n_cores()) as pool:  # hashing holds no lock of the interpreter
        for file, digest in zip(missing, pool.map(sha256_of_file, missing), strict=True):
            known[keys[file]] = digest
            remember(memory, known)
    return [known[keys[file]] for file in files]

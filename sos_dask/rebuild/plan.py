"""The plan of a job: its stages as a list, each with its inputs by the names of products.

`steps` says what a job asks for: a list of `Step`. A `Plan` tells of each step which output it
makes, whether that is there, and why it would be made. Which model corrects the catalog is known
once the comparison has run: steps that use it are resolved after that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from sos_dask import corrections
from sos_dask.errors import ConfigError, SurveyError
from sos_dask.evidence.figures import check_rule
from sos_dask.problem import BUILT_IN, DEFAULT, SNR, Label, Problem, input_of
from sos_dask.rebuild.job import (
    AttachSection,
    CorrectionSection,
    Job,
    SurveySection,
    TargetSection,
    ValidateSection,
)
from sos_dask.run.cluster import Cluster, Report
from sos_dask.run.machine import n_cores
from sos_dask.schema import CANONICAL, Column, is_gaia_id, nearest
from sos_dask.settings import Settings
from sos_dask.stages.apply import Apply
from sos_dask.stages.attach import Attach, Margin, companion_survey
from sos_dask.stages.base import Stage
from sos_dask.stages.compare import Compare, Trends
from sos_dask.stages.coverage import Coverage
from sos_dask.stages.crossmatch import Crossmatch
from sos_dask.stages.dedupe import Dedupe
from sos_dask.stages.evidence import Evidence
from sos_dask.stages.ingest import Ingest
from sos_dask.stages.members import MembersStage
from sos_dask.stages.projection import ProjectionStage
from sos_dask.stages.reference import Reference
from sos_dask.stages.report import ReportStage
from sos_dask.stages.sample import Sample
from sos_dask.stages.train import Generalisation, Train
from sos_dask.stages.uncertainty import Uncertainty
from sos_dask.stages.unify import Unify
from sos_dask.stages.validate import Validate
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import WORK, Manifest, Recipe, canonical_json, sha256_of_file
from sos_dask.storage.parts import Former
from sos_dask.storage.store import (
    DIGESTS_FILE,
    current_recipes,
    home,
    published,
    remember,
    remembered,
)
from sos_dask.surveys.definition import Survey, load_survey

logger = logging.getLogger(__name__)
_PLACES = ("obs_id", "ra", "dec", "position_epoch")
# What pairs, and the table of evidence made of them, call columns of their own.
_OF_PAIRS = ("target_obs_id", "target_star_id", "reference_star_id", "separation_arcsec",
             "n_candidates", "ambiguous", "by_id", "fold", "use", "survey_ref", "star", "target",
             "group", "held_out", "trained", "sparse")  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """Stands for the model of a target that its comparison chooses, until that has run."""

    target: str


Inputs: TypeAlias = Mapping[str, str | Chosen | Path]
"""By role: the name of a product, or a path for what no step makes."""


@dataclass(frozen=True)
class Step:
    """One stage of a job; its product is unique in the job.

    ``catalog``: name that a catalog gives itself, default that of the product.
    """

    product: str
    stage: type[Stage[Any]]
    settings: Settings
    inputs: Inputs
    catalog: str = ""


@dataclass(frozen=True)
class Planned:
    """A step whose inputs, and their fingerprints, are known by role.

    ``directory``: where the output is or will be. ``reason``: why it would run, or ``unchanged``.
    """

    step: Step
    recipe: Recipe
    directory: Path
    inputs: Mapping[str, Path]
    fingerprints: Mapping[str, str]
    complete: bool
    reason: str

    @property
    def product(self) -> str:
        """Name of what is made."""
        return self.step.product

    def run(self, cluster: Cluster, report: Report, former: Former | None = None) -> dict[str, int]:
        """Make the output; the numbers of parts that were ``run`` and ``taken`` over."""
        step, known = self.step, self.fingerprints
        name = step.catalog or step.product
        stage = step.stage(self.inputs, step.settings, product=name, known=known)
        stage.run(self.directory, cluster=cluster, report=report, former=former)
        return stage.counted


def steps(job: Job) -> list[Step]:
    """List what a job asks for, in the order of the inputs; a wrong job or survey is refused."""
    targets = _targets(job)
    asked = {one.name: _corrections(job, one) for one in targets}
    further = dict.fromkeys(x for of in asked.values() for one in of for x in one.problem.names)
    labels = tuple(name for name in further if name not in job.reference_union.measured)
    of_target = {
        one.name: [*_survey_steps(job, one.name, one.section, labels, one.attached)]
        for one in targets
    }
    made, stars = list(chain.from_iterable(of_target.values())), {}
    of_references: list[Step] = []
    for name, section in job.reference.items():
        of_references += _survey_steps(job, name, section, labels)
        stars[f"stars.{name}"] = f"{name}.stars"
    union = job.reference_union
    union = union.but(order=union.order or tuple(job.reference), labels=labels)
    if "rows_per_partition" not in job.reference_union.model_fields_set:
        union = union.but(rows_per_partition=job.ingest.rows_per_partition)
    of_references.append(Step("reference", Reference, union, stars))
    made += of_references
    of_surveys: dict[str, str] = {}
    for target in targets:
        observations, of_one = target.observations, asked[target.name]
        pairs = [*_pair_steps(job, target.name, observations, of_one)]
        common = [step.product for step in (*of_target[target.name], *of_references, *pairs)]
        made += pairs
        for one in of_one:
            mine = [*_correction_steps(job, target, one, stars, union.order, observations)]
            # A further correction adds its columns to those of the one before.
            observations = f"{one.place}.corrected"
            products = [*common, *(step.product for step in mine)]
            name = f"{one.place}.report" if one.place != targets[0].name else "report"
            made += [*mine, *_report_steps(job, name, products)]
        of_surveys[f"rows.{target.name}"] = observations
    if job.unify is not None:
        of_surveys |= {f"rows.{name}": f"{name}.observations" for name in job.reference}
        made += _unify_steps(job, asked, union.order, of_surveys, stars)
        labels = made[-2].settings.labels  # type: ignore[attr-defined]
        for name, given in job.validation.items():
            made += _validate_steps(job, name, given, labels, of_surveys)
        products = [f"{name.removeprefix('rows.')}.observations" for name in of_surveys]
        products += ["sos", "sos.members", *(f"{name}.validation" for name in job.validation)]
        made += _report_steps(job, "sos.report", products)
    names = [step.product for step in made]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two stages would make '{name}': give the surveys other names")
    return made


@dataclass(frozen=True)
class _Target:
    """One target of a job: its name, its table, its measured columns, companions it gets."""

    name: str
    key: str  # of its table
    section: TargetSection
    columns: Mapping[str, Column]
    attached: Mapping[str, AttachSection]

    @property
    def observations(self) -> str:
        """Product with its rows, and what companions add to them."""
        return (
            f"{self.name}.{f'with-{list(self.attached)[-1]}' if self.attached else 'observations'}"
        )


@dataclass(frozen=True)
class _Correction:
    """One correction of a target: what its products are called, and what it is made with."""

    place: str  # before the names of its products: ``lamost``, or ``lamost.rv``
    suffix: str  # of its coverage and flags in the corrected catalog
    problem: Problem
    params: Mapping[str, dict[str, Any]]  # all, by method


def _corrections(job: Job, target: _Target) -> list[_Correction]:
    """List the corrections of a target in their order; wrong labels, inputs, methods are refused.

    The first has the names of its products by the target alone. Of several targets, one need not
    have the labels and inputs of every correction.
    """
    found: list[_Correction] = []
    taken = dict.fromkeys(target.columns, "the target")
    chosen = target.section.corrections or list(job.corrections)
    for name, section in job.corrections.items():
        if name not in chosen:
            continue
        with _key(job, f"corrections.{name}"):
            try:
                problem = _problem(job, name, section, target)
            except ConfigError as error:
                if target.section.corrections or not job.targets:
                    raise
                text = "%s goes without [corrections.%s]: %s"
                logger.warning(text, target.key, name, error.message)
                continue
        methods = section.methods or job.train.methods
        for method in methods:
            with _key(job, f"corrections.{name}.methods" if section.methods else "train.methods"):
                corrections.class_of(method)
        for method in {*job.train.params, *section.params}:
            with _key(job, f"train.params.{method}"):
                _params(job, method)
            with _key(job, f"corrections.{name}.params.{method}"):
                _params(job, method, section.params)
        with _key(job, "compare.rule"):
            check_rule(job.compare.rule, methods)
        if job.coverage.fallback not in ("auto", "measured", "none", "edge", *methods):
            raise ConfigError(
                f"{job.path}: coverage.fallback = '{job.coverage.fallback}' is not among the "
                f"methods of [corrections.{name}]"
            )
        place, suffix = (f"{target.name}.{name}", f"_{name}") if found else ("", "")
        suffix = suffix.replace("-", "_")
        new = [f"coverage{suffix}", f"flag_sos{suffix}"]
        for one in problem.labels:
            new += [one.sos, one.delta, one.sos_err, one.sos_err_pair]
        for column in new:
            if column in taken:
                raise ConfigError(
                    f"{job.path}: [corrections.{name}] makes a column '{column}', which "
                    f"{taken[column]} has already",
                    "Correct a label in one correction only; give columns other names.",
                )
            taken[column] = f"[corrections.{name}]"
        params = {method: _params(job, method, section.params) for method in methods}
        found.append(_Correction(place or target.name, suffix, problem, params))
    if not found:
        raise ConfigError(
            f"{job.path}: {target.key} has the labels and inputs of none of the [corrections.*]",
            f"It has: {', '.join(target.columns)}.",
        )
    return found


def _problem(job: Job, name: str, section: CorrectionSection, of: _Target) -> Problem:
    """Labels with their units, and inputs, which the surveys of a job must have.

    Of several targets, one need not have all inputs of a built-in correction.
    """
    target = of.columns
    references = {x: _columns(job, one) for x, one in job.reference.items()}
    known = BUILT_IN.get(name)
    labels = section.labels or (known.names if known else ())
    inputs = section.inputs or (known.columns if known else ())
    if section.inputs is None and known is DEFAULT and SNR in target:
        inputs = (*inputs, SNR)
    elif section.inputs is None and job.targets:
        for lacking in [one for one in inputs if one not in target]:
            logger.warning("%s has no '%s', input of [corrections.%s]", of.key, lacking, name)
        inputs = tuple(one for one in inputs if one in target)
    for key, names in (("labels", labels), ("inputs", inputs)):
        if not names:
            raise ConfigError(f"'{key}' is missing", f"Built in are: {', '.join(BUILT_IN)}.")
        for one in names:
            if one not in target:
                hint = f"Known are: {', '.join(target)}; [attach.NAME] adds others."
                hint = nearest(one, target) or hint
                raise ConfigError(f"the target has no measured column '{one}' ({key})", hint)
            base = one.removesuffix("_ref").removesuffix("_diff")
            if one in _OF_PAIRS or (base != one and base in target):
                raise ConfigError(
                    f"column '{one}' ({key}) has the name of a column that pairs have anyway",
                    "Give it another name in [extra.NAME] of the survey, or in [attach.NAME].",
                )
            if key == "labels":
                _check_label(one, target[one], references)
    of_labels = tuple(Label(name=one, unit=target[one].unit) for one in labels)
    return Problem(labels=of_labels, inputs=tuple(map(input_of, inputs)))


def _check_label(name: str, column: Column, references: Mapping[str, Mapping[str, Column]]) -> None:
    """Refuse a label of whole numbers, and one that references lack or have in another unit."""
    theirs = {survey: columns[name] for survey, columns in references.items() if name in columns}
    if not theirs:
        of_references = dict.fromkeys(x for columns in references.values() for x in columns)
        hint = nearest(name, of_references) or f"They have: {', '.join(of_references)}."
        raise ConfigError(f"no reference has the label '{name}'", hint)
    for survey, one in {"the target": column, **theirs}.items():
        if not one.dtype.startswith("float"):
            hint = f'Write dtype = "float32" in [extra.{name}].'
            raise ConfigError(f"label '{name}' is {one.dtype} in {survey}", hint)
        if one.unit != column.unit:
            raise ConfigError(
                f"label '{name}' is in '{column.unit}' in the target and in '{one.unit}' in "
                f"{survey}",
                "Convert one of the files, or write the same unit where it is the same.",
            )


def _columns(job: Job, section: SurveySection) -> dict[str, Column]:
    """Find the measured columns of a survey: numbers that neither name nor place a row."""
    columns = _definition(job, section).columns.items()
    return {
        name: one.column
        for name, one in columns
        if one.dtype != "string" and name not in _PLACES and not is_gaia_id(name)
    }


def _pair_steps(
    job: Job, target: str, observations: str, asked: Sequence[_Correction]
) -> Iterator[Step]:
    """List the steps that find the pairs of one target, with all that its corrections ask for."""
    pairs = f"{target}.pairs"
    left = f"{target}.stars" if job.crossmatch.target == "stars" else observations
    settings = _own(job, Crossmatch, job.crossmatch).but(
        labels=tuple(dict.fromkeys(name for one in asked for name in one.problem.names)),
        inputs=tuple(dict.fromkeys(name for one in asked for name in one.problem.columns)),
    )
    yield Step(pairs, Crossmatch, settings, {"target": left, "reference": "reference"})
    columns = [one.column for each in asked for one in each.problem.parameters]
    columns += [label.error for each in asked for label in each.problem.labels]
    columns += [name for each in asked for name in each.problem.names]
    settings = Sample.Settings(columns=tuple(dict.fromkeys(columns)), seed=job.seed)
    yield Step(f"{target}.sample", Sample, settings, {"observations": observations})
    if job.projection is not None:
        settings = _own(job, ProjectionStage, job.projection)
        inputs = {"observations": observations, "pairs": pairs}
        yield Step(f"{target}.projection", ProjectionStage, settings, inputs)


def _correction_steps(
    job: Job,
    of: _Target,
    one: _Correction,
    stars: Mapping[str, str],
    order: tuple[str, ...],
    observations: str,
) -> Iterator[Step]:
    """List the steps of one correction of a target, whose rows are observations."""
    target, place = of.name, one.place
    pairs, target_stars = f"{target}.pairs", f"{target}.stars"
    yield from _model_steps(job, one, target)
    seen: Inputs = {"evidence": f"{place}.evidence"}
    chosen: Inputs = {**seen, "model": Chosen(place)}
    both = {"reference": "reference", **stars}
    yield Step(f"{place}.trends", Trends, Trends.Settings(order=order), {**seen, **both})
    settings = _own(job, Uncertainty, job.uncertainty).but(target=target)
    inputs: dict[str, str | Chosen | Path] = {**chosen, "target_stars": target_stars, **both}
    yield Step(f"{place}.uncertainty", Uncertainty, settings, inputs)
    radius = (of.section.dedupe or job.dedupe).radius_arcsec
    settings = _own(job, Coverage, job.coverage).but(radius_arcsec=radius)
    inputs = {"pairs": pairs, "observations": observations, "stars": target_stars}
    inputs |= {"errors": f"{place}.uncertainty", "sample": f"{target}.sample"}
    yield Step(f"{place}.coverage", Coverage, settings, {**chosen, **inputs})
    fallback = job.coverage.fallback
    if fallback == "auto":
        fallback = "measured"
    inputs = {"model": Chosen(place), "observations": observations}
    inputs |= {"errors": f"{place}.uncertainty", "coverage": f"{place}.coverage"}
    if fallback == "polynomial":
        inputs["smooth"] = f"{place}.model.polynomial"
    settings = Apply.Settings(fallback=fallback, suffix=one.suffix)
    yield Step(f"{place}.corrected", Apply, settings, inputs)
    if job.generalisation is not None:
        settings = _own(job, Generalisation, job.generalisation).but(methods=one.params)
        yield Step(f"{place}.generalisation", Generalisation, settings, seen)


def _unify_steps(
    job: Job,
    asked: Mapping[str, Sequence[_Correction]],
    order: Sequence[str],
    rows: Mapping[str, str],
    stars: Mapping[str, str],
) -> Iterator[Step]:
    """List the steps that join all surveys: by default with the labels that the job corrects."""
    assert job.unify is not None
    labels = dict.fromkeys(x for of in asked.values() for one in of for x in one.problem.names)
    flags = {
        target: {name: f"flag_sos{one.suffix}" for one in of for name in one.problem.names}
        for target, of in asked.items()
    }
    surveys = [name.removeprefix("rows.") for name in rows]
    for key, names in (("order", job.unify.order), ("expected_error", job.unify.expected_error)):
        for name in names:
            if name not in surveys:
                hint = nearest(name, surveys) or f"Surveys: {', '.join(surveys)}."
                raise ConfigError(f"{job.path}: unify.{key} names '{name}', no survey of it", hint)
    given = job.unify.model_fields_set
    settings = job.unify.but(flags=flags, order=job.unify.order or (*order, *asked))
    if "labels" not in given:
        settings = settings.but(labels=tuple(labels))
    if "rows_per_partition" not in given:
        settings = settings.but(rows_per_partition=job.ingest.rows_per_partition)
    yield Step("sos", Unify, settings, {**rows, **stars, "reference": "reference"})
    yield Step("sos.members", MembersStage, MembersStage.Settings(), {"sos": "sos"})


def _validate_steps(
    job: Job, name: str, given: ValidateSection, labels: tuple[str, ...], rows: Mapping[str, str]
) -> Iterator[Step]:
    """List the steps that look at the stars of a list."""
    with _key(job, f"validation.{name}"):
        survey = _definition(job, given)
    yield _ingest_step(job, f"{name}.list", survey, given.files)
    settings = _own(job, Crossmatch, job.crossmatch).but(labels=(), inputs=())
    inputs = {"target": f"{name}.list", "reference": "sos"}
    yield Step(f"{name}.stars-of-list", Crossmatch, settings, inputs)
    inputs = {"list": f"{name}.list", "pairs": f"{name}.stars-of-list", "sos": "sos", **rows}
    inputs["reference"] = "reference"
    how = Validate.Settings(labels=labels, group=given.group)
    yield Step(f"{name}.validation", Validate, how, inputs)


def _report_steps(job: Job, name: str, products: Iterable[str]) -> Iterator[Step]:
    """List the step that makes a page of products, where the job wants reports."""
    if job.report.enabled:
        settings = ReportStage.Settings(job=job.name, job_text=job.text)
        yield Step(name, ReportStage, settings, {f"product.{x}": x for x in products})


def _model_steps(job: Job, one: _Correction, target: str) -> Iterator[Step]:
    """List the steps that fit all methods to one target, and compare them."""
    pairs = f"{target}.pairs"
    given = {"pairs": pairs, "sample": f"{target}.sample", "target_stars": f"{target}.stars"}
    models = {f"model.{method}": f"{one.place}.model.{method}" for method in one.params}
    for method, params in one.params.items():
        settings = Train.Settings(
            method=method,
            params=params,
            validation=job.train.validation,
            search=job.train.search,
            distributed=job.train.distributed,
            seed=job.seed,
            problem=one.problem,
        )
        yield Step(f"{one.place}.model.{method}", Train, settings, given)
    evidence = f"{one.place}.evidence"
    of_problem = Evidence.Settings(problem=one.problem)
    yield Step(evidence, Evidence, of_problem, {"pairs": pairs, **models})
    compare = _own(job, Compare, job.compare)
    inputs = {"evidence": evidence, **models, "sample": f"{target}.sample"}
    yield Step(f"{one.place}.comparison", Compare, compare, inputs)


def _survey_steps(
    job: Job,
    name: str,
    section: SurveySection,
    labels: Sequence[str],
    companions: Mapping[str, AttachSection] = MappingProxyType({}),
) -> Iterator[Step]:
    """List ingest, attach and dedupe of one survey."""
    survey = _definition(job, section)
    observations = f"{name}.observations"
    yield _ingest_step(job, observations, survey, section.files)
    for companion, attached in companions.items():
        columns = dict(attached.columns)
        other: str | Path
        if attached.catalog is not None:
            other = job.resolve(attached.catalog)
        else:
            options = attached.model_dump(include={"ra", "dec", "epoch", "by"})
            read = companion_survey(companion, columns, key=attached.id, **options)
            other = f"{companion}.companion"
            yield _ingest_step(job, other, read, attached.files)
            columns = {column: column for column in columns}
        settings = _own(job, Attach, attached).but(columns=columns)
        inputs = {"catalog": observations, "other": other}
        observations = f"{name}.with-{companion}"
        yield Step(observations, Attach, settings, inputs, f"{name}.observations")
    if job.ingest.margin_arcsec is not None:
        margin = Margin.Settings(radius_arcsec=job.ingest.margin_arcsec)
        yield Step(f"{name}.collection", Margin, margin, {"catalog": observations})
    dedupe = section.dedupe or job.dedupe
    known = {**_columns(job, section), **_attached(companions)}
    dedupe = dedupe.but(labels=tuple(label for label in labels if label in known))
    yield Step(f"{name}.stars", Dedupe, dedupe, {"observations": observations})


def _ingest_step(job: Job, product: str, survey: Survey, files: list[str]) -> Step:
    sizes = {name: size for name, size in job.ingest if name != "margin_arcsec"}
    settings = Ingest.Settings(survey=survey, name=product, **sizes)
    paths = {f"file.{number}": job.resolve(file) for number, file in enumerate(files)}
    return Step(product, Ingest, settings, paths)


def _own(job: Job, stage: type[Stage[Any]], section: Settings) -> Any:
    """Settings of a stage from a section of the job, which may have more keys, and its seed."""
    fields = stage.Settings.model_fields
    values = {name: value for name, value in dict(section).items() if name in fields}
    if "seed" in fields:
        values["seed"] = job.seed
    return stage.Settings(**values)


def _params(
    job: Job, method: str, more: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """All parameters of a method, of the job and of what one correction has more."""
    known = corrections.class_of(method).parameters.model_fields
    given = {"seed": job.seed} if "seed" in known else {}
    given |= {**job.train.params.get(method, {}), **(more or {}).get(method, {})}
    return corrections.check_params(method, given)


@contextmanager
def _key(job: Job, key: str) -> Iterator[None]:
    """Put the job file and its key before the message of an error."""
    try:
        yield
    except (ConfigError, SurveyError) as error:
        raise type(error)(f"{job.path}: {key}: {error.message}", error.hint) from None


def _targets(job: Job) -> list[_Target]:
    """Name the targets, each with its companions; wrong surveys are refused."""
    sections = {"target": job.target} if job.target is not None else {}
    sections |= {f"targets.{name}": section for name, section in job.targets.items()}
    found: list[_Target] = []
    for key, section in sections.items():
        with _key(job, f"{key}.survey"):
            definition = _definition(job, section)
        name = (job.target_name or definition.name) if key == "target" else key.partition(".")[2]
        if name in job.reference or name in [one.name for one in found]:
            raise ConfigError(
                f"{job.path}: the target's survey and another one are named '{name}'",
                'Give the target another name: target_name = "...".',
            )
        attached = {
            companion: one
            for companion, one in job.attach.items()
            if one.target == name or (one.target is None and not found)
        }
        columns = _columns(job, section) | _attached(attached)
        found.append(_Target(name, f"[{key}]", section, columns, attached))
    for companion, of in job.attach.items():
        if of.target is not None and of.target not in (names := [one.name for one in found]):
            text = f"{job.path}: attach.{companion}.target: '{of.target}' is no target"
            raise ConfigError(text, nearest(of.target, names) or f"Targets: {', '.join(names)}.")
    for name, other in job.reference.items():
        with _key(job, f"reference.{name}.survey"):
            columns = _columns(job, other)
        for label in job.reference_union.known_offsets.get(name, {}):
            if label not in columns:
                text = f"{job.path}: reference_union.offsets: reference.{name} has no '{label}'"
                raise ConfigError(text, nearest(label, columns))
    return found


def _attached(companions: Mapping[str, AttachSection]) -> dict[str, Column]:
    """Find the columns that companions add."""
    names = [name for one in companions.values() for name in one.columns]
    return {name: CANONICAL.get(name, Column(name, "float32")) for name in names}


def _definition(job: Job, section: SurveySection) -> Survey:
    """Definition of a survey with the changes of the job."""
    definition = section.survey
    if definition.endswith(".toml") or "/" in definition:
        definition = str(job.resolve(definition))
    return load_survey(definition, section.override)


def plan(job: Job, store: Path | None = None) -> list[Planned]:
    """Resolve all steps of a job: see `Plan`.

    Steps that use the chosen model are known for good only once the comparison has run.
    """
    return Plan(job, store).all()


class Plan:
    """The steps of a job over a store; default that of the job.

    Survey files are read once to hash them (remembered by size and time of change).

    Raises
    ------
    ConfigError, SurveyError
        The job or a survey definition is wrong, or a survey file is missing.
    """

    def __init__(self, job: Job, store: Path | None = None) -> None:
        self.store = store or job.resolve(job.store)
        self.steps = steps(job)
        self.rule = job.compare.rule
        self._published = published(self.store)
        self._previous = current_recipes(self.store)
        self._planned: dict[str, Planned] = {}
        files = {
            path: path.name
            for step in self.steps
            if step.stage is Ingest
            for path in step.inputs.values()
            if isinstance(path, Path)
        }
        self._digests = _digests(self.store, list(files))
        self._refuse_twice()
        self._files = {self._digests[path]: name for path, name in files.items()}
        self._names = dict(self._files)

    def _refuse_twice(self) -> None:
        """Refuse a file that is two surveys: their stars would agree, and count twice."""
        seen: dict[tuple[str, str], str] = {}
        for step in (step for step in self.steps if step.stage is Ingest):
            for path in step.inputs.values():
                settings: Any = step.settings
                digest, survey = self._digests[Path(str(path))], settings.survey.name
                first = seen.setdefault((digest, survey), step.product)
                if first != step.product:
                    what = f"{path} has the content of a file of {first}: one survey twice"
                    raise ConfigError(what, f"Take it out of {step.product}.")

    def all(self) -> list[Planned]:
        """Resolve all steps as far as they are known."""
        return [self.resolve(step) for step in self.steps]

    def resolve(self, step: Step) -> Planned:
        """Tell which output a step makes, whether it is complete, and why it would run."""
        fingerprints, paths = {}, {}
        for role, given in step.inputs.items():
            if isinstance(given, Chosen):
                given = self._chosen(given.target)
            if isinstance(given, Path):
                paths[role] = given
                fingerprints[role] = self._digests.get(given) or Catalog.open(given).fingerprint
            else:
                paths[role] = self._planned[given].directory
                fingerprints[role] = self._planned[given].recipe.fingerprint
        if step.stage is ReportStage:
            files = dict(sorted(self._files.items()))
            step = replace(step, settings=step.settings.but(files=files))
        recipe = step.stage.recipe(step.settings, fingerprints)
        directory = self.store / "artifacts" / recipe.stage / recipe.fingerprint
        place = home(recipe.stage, directory)
        complete = Output(place, recipe).complete
        reason = "unchanged" if complete else self._reason(step.product, recipe, place)
        planned = Planned(step, recipe, directory, paths, fingerprints, complete, reason)
        self._planned[step.product] = planned
        self._names.setdefault(recipe.fingerprint, step.product)
        return planned

    def _chosen(self, target: str) -> str:
        """Product of the model that corrects a target; the comparison until it has run.

        What is made with the model depends on the model alone, not on how it was chosen.
        """
        if f"{target}.model.{self.rule}" in self._planned:
            return f"{target}.model.{self.rule}"
        comparison = self._planned[f"{target}.comparison"]
        if not Output(comparison.directory, comparison.recipe).complete:
            return comparison.product
        return f"{target}.model.{Manifest.load(comparison.directory).summary['method']}"

    def _reason(self, product: str, recipe: Recipe, directory: Path) -> str:
        if (directory / WORK).is_dir():
            return "unfinished: goes on where it stopped"
        if self._published.get(product) == recipe.fingerprint:
            return "its output was removed"
        before = self._previous.get(product)
        if before is None:
            return "not built before"
        if before.stage != recipe.stage or before.version != recipe.version:
            return f"version of the stage {before.version} -> {recipe.version}"
        settings = differences(before.params, recipe.params)
        old = before.inputs.values()
        changed = {name: now for name, now in recipe.inputs.items() if now not in old}
        inputs = [f"{self._names.get(now, name)} changed" for name, now in changed.items()]
        removed = [f"{name} removed" for name in before.inputs if name not in recipe.inputs]
        return "; ".join([*settings, *inputs, *removed])


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Name what differs between two JSON values, each as ``key old -> new``."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found = []
        for key in sorted({*before, *after}):
            inner = f"{where}.{key}" if where else str(key)
            found += differences(before.get(key), after.get(key), inner)
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


def _digests(store: Path, files: list[Path]) -> dict[Path, str]:
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
    return {file: known[keys[file]] for file in files}

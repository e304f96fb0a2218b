"""Job files: one TOML says which surveys are put on which scale, and how."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from sos_dask.errors import ConfigError, SosError, redacted
from sos_dask.evidence.projection import ProjectionSettings
from sos_dask.rebuild.gate import GateSection
from sos_dask.run.kinds import ClusterSettings, TlsSettings
from sos_dask.schema import YEARS
from sos_dask.settings import NAME_RULE, Settings, explained, is_name, parse_toml
from sos_dask.stages.attach import AttachSettings
from sos_dask.stages.compare import CompareSettings
from sos_dask.stages.coverage import CoverageSettings
from sos_dask.stages.crossmatch import CrossmatchSettings
from sos_dask.stages.ingest import IngestSettings
from sos_dask.stages.reference import ReferenceSettings
from sos_dask.stages.train import GeneralisationSettings
from sos_dask.stages.uncertainty import UncertaintySettings
from sos_dask.stages.unify import UnifySettings
from sos_dask.stars.group import DedupeSettings
from sos_dask.storage.objects import ObjectPath, as_path, on_disk

JOB_FORMAT = 1
_SEED = "Give seed at the top of the job."
_LABELS = "Give them in [corrections.NAME]."
# Settings of stages that a job gives in another place, or that are gone.
_ELSEWHERE = {
    ("crossmatch", "seed"): _SEED,
    ("dedupe", "labels"): _LABELS,
    ("unify", "flags"): _LABELS,
    ("unify", "method"): "It is a key of [reference_union].",
    ("unify", "offsets"): "It is a key of [reference_union].",
    ("reference_union", "labels"): _LABELS,
    ("crossmatch", "labels"): _LABELS,
    ("crossmatch", "inputs"): _LABELS,
    ("compare", "seed"): _SEED,
    ("compare", "axes"): "The bins are fixed.",
    ("uncertainty", "seed"): _SEED,
    ("uncertainty", "reference_error"): "It is gone: both errors are written, *_sos_err of the "
    "label itself and *_sos_err_pair of corrected - reference.",
    ("uncertainty", "target"): "Give target_name at the top of the job.",
    ("coverage", "seed"): _SEED,
    ("coverage", "radius_arcsec"): "It is that of [dedupe].",
    ("coverage", "compare"): "It is gone: measures are no longer ranked.",
    ("projection", "seed"): _SEED,
    ("generalisation", "seed"): _SEED,
    ("generalisation", "methods"): "They are those of [train].",
}


class SurveySection(Settings):
    """One survey: its definition, its files, and what a job changes of the definition."""

    survey: str
    files: list[str] = Field(min_length=1)
    override: dict[str, Any] = Field(default_factory=dict)
    dedupe: DedupeSettings | None = None


class TargetSection(SurveySection):
    """A survey that is put on the scale of the reference.

    ``corrections``: names of the [corrections.*] that it gets; default: all whose labels and inputs
    it has.
    """

    corrections: list[str] | None = Field(None, min_length=1)


class ValidateSection(SurveySection):
    """A list of stars that must agree: a survey of its own, whose labels are the truth.

    ``group``: column (of [extra.NAME]) that names a group, whose members agree.
    """

    group: str | None = None


class IngestSection(IngestSettings):
    """How survey files become partitions."""

    margin_arcsec: float | None = Field(
        None, gt=0, lt=3600, description="Also write a margin catalog of this radius, for LSDB."
    )


class CrossmatchSection(CrossmatchSettings):
    """How target and reference are matched."""

    target: Literal["stars", "observations"] = "observations"


class TrainSection(Settings):
    """Which methods are trained, and how they are validated."""

    methods: list[str] = Field(default_factory=lambda: ["polynomial", "boosted"], min_length=1)
    validation: Literal["auto", "kfold", "holdout"] = "auto"
    params: dict[str, dict[str, Any]] = Field(default_factory=dict)
    search: int = Field(0, ge=0, le=1000)
    distributed: Literal["auto", "always", "never"] = "auto"


class CorrectionSection(Settings):
    """What is corrected by what: a table ``[corrections.NAME]``.

    ``labels`` and ``inputs`` are columns of the target, labels of a reference, too. Those of the
    built-in corrections ``labels`` (teff, logg, feh) and ``rv`` need not be given.
    """

    labels: list[str] | None = Field(None, min_length=1)
    inputs: list[str] | None = Field(None, min_length=1)
    methods: list[str] | None = Field(None, min_length=1)
    params: dict[str, dict[str, Any]] = Field(default_factory=dict)


class ReportSection(Settings):
    """Whether a rebuild makes the report."""

    enabled: bool = True


class PublishSection(Settings):
    """How products are compared with their manifests before they are published."""

    check: Literal["sha256", "size"] = "sha256"


class AttachSection(AttachSettings):
    """Columns of another catalog that are added to a target, by default the first."""

    target: str | None = None
    files: list[str] = Field(default_factory=list)
    catalog: str | None = None
    id: str = "source_id"
    ra: str = "ra"
    dec: str = "dec"
    epoch: float = Field(2016.0, ge=YEARS[0], le=YEARS[1])

    @model_validator(mode="after")
    def _one_source(self) -> AttachSection:
        if bool(self.files) == (self.catalog is not None):
            raise ValueError("give either files or catalog")
        return self


class CoverageSection(CoverageSettings):
    """Where the correction may be trusted, and what is done elsewhere.

    ``fallback = "auto"``: what was best where regions were left out of the training.
    """

    fallback: Literal["auto", "measured", "polynomial", "none", "edge"] = "auto"


class OnFailureSection(Settings):
    """A command that a rebuild runs when it has failed; it finds why in its environment."""

    command: list[str] = Field(default_factory=list)
    timeout_s: float = Field(60.0, gt=0, le=3600)


class MetricsSection(Settings):
    """A text file for Prometheus that every rebuild writes."""

    file: str | None = Field(None, pattern=r"\.prom$")


class SpaceSection(Settings):
    """Whether a rebuild is refused where what it will write does not fit on the disk."""

    check: bool = True


class Job(Settings):
    """A whole rebuild.

    There is one survey in ``[target]``, or several in ``[targets.NAME]``. ``target_name`` stands in
    products, figures and titles; by default it is that of its survey. ``path`` is the file, to
    whose folder relative paths are relative, and ``text`` its content, kept with every build.
    """

    TABLE_HINTS: ClassVar = {
        "reference": "Each reference survey has a table of its own, such as [reference.apogee], "
        "with the keys survey and files.",
        "corrections": "Each correction has a table of its own, such as [corrections.rv], with the "
        "keys labels, inputs and methods.",
        "targets": "Each target has a table of its own, such as [targets.lamost], with the keys "
        "survey and files.",
    }

    format: int
    name: str
    store: str
    seed: int = Field(0, ge=0, lt=2**31)
    variables: dict[str, str] = Field(default_factory=dict)
    target: TargetSection | None = None
    target_name: str | None = None
    targets: dict[str, TargetSection] = Field(default_factory=dict)
    reference: dict[str, SurveySection] = Field(min_length=1)
    ingest: IngestSection = Field(default_factory=IngestSection)
    dedupe: DedupeSettings = Field(default_factory=DedupeSettings)
    reference_union: ReferenceSettings = Field(default_factory=ReferenceSettings)
    crossmatch: CrossmatchSection = Field(default_factory=CrossmatchSection)
    corrections: dict[str, CorrectionSection] = Field(
        default_factory=lambda: {"labels": CorrectionSection()}, min_length=1
    )
    train: TrainSection = Field(default_factory=TrainSection)
    compare: CompareSettings = Field(default_factory=CompareSettings)
    uncertainty: UncertaintySettings = Field(default_factory=UncertaintySettings)
    report: ReportSection = Field(default_factory=ReportSection)
    publish: PublishSection = Field(default_factory=PublishSection)
    attach: dict[str, AttachSection] = Field(default_factory=dict)
    coverage: CoverageSection = Field(default_factory=CoverageSection)
    unify: UnifySettings | None = None
    validation: dict[str, ValidateSection] = Field(default_factory=dict)
    projection: ProjectionSettings | None = None
    generalisation: GeneralisationSettings | None = None
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    gate: GateSection = Field(default_factory=GateSection)
    on_failure: OnFailureSection = Field(default_factory=OnFailureSection)
    metrics: MetricsSection = Field(default_factory=MetricsSection)
    space: SpaceSection = Field(default_factory=SpaceSection)
    path: Path = Field(Path(), exclude=True)
    text: str = Field("", exclude=True)

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: int) -> int:
        if value != JOB_FORMAT:
            raise ValueError(f"job format {value} is not {JOB_FORMAT}, the one known here")
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> Job:
        named = {"name": self.name} | {f"reference.{name}": name for name in self.reference}
        named |= {f"attach.{name}": name for name in self.attach}
        named |= {f"corrections.{name}": name for name in self.corrections}
        named |= {f"targets.{name}": name for name in self.targets}
        named |= {f"validation.{name}": name for name in self.validation}
        if self.validation and self.unify is None:
            raise ValueError("[validation.*] looks at the unified catalog: add a table [unify]")
        if self.target_name is not None:
            named["target_name"] = self.target_name
        for key, name in named.items():
            if not is_name(name):
                raise ValueError(f"{key}: '{name}' is not a name: {NAME_RULE}")
        if self.target is None and (not self.targets or self.target_name is not None):
            raise ValueError("there is no table [target], or [targets.NAME] for several surveys")
        for name in filter(None, [self.target_name, *self.targets, *self.validation]):
            if name in self.reference or (name == self.target_name and name in self.targets):
                raise ValueError(f"two surveys are named '{name}'")
        for target in filter(None, [self.target, *self.targets.values()]):
            for name in target.corrections or ():
                if name not in self.corrections:
                    raise ValueError(f"a target names '{name}', which is no [corrections.*]")
        union = self.reference_union
        offsets = () if isinstance(union.offsets, str) else union.offsets
        for key, names in (("order", union.order), ("offsets", offsets)):
            for name in names:
                if name not in self.reference:
                    raise ValueError(
                        f"reference_union.{key} names '{name}', which is no [reference.*]"
                    )
        lists: dict[str, list[str]] = {"train.methods": self.train.methods}
        for name, one in self.corrections.items():
            of_one = {"labels": one.labels, "inputs": one.inputs, "methods": one.methods}
            lists |= {f"corrections.{name}.{key}": given or [] for key, given in of_one.items()}
        for key, listed in lists.items():
            for twice in {item for item in listed if listed.count(item) > 1}:
                raise ValueError(f"{key} names '{twice}' twice")
        return self

    @property
    def place(self) -> ClusterSettings:
        """Where tasks run, with whole paths."""
        given = self.cluster
        paths = {"spec": given.spec, "log_directory": given.log_directory}
        if given.scheduler is not None and given.scheduler.endswith(".json"):
            paths["scheduler"] = given.scheduler
        found: dict[str, Any] = {x: str(self.resolve(one)) for x, one in paths.items() if one}
        if given.tls is not None:
            found["tls"] = TlsSettings(**{x: str(self.resolve(one)) for x, one in given.tls})
        return given.but(**found)

    def resolve(self, text: str) -> Path:
        """Path written in the job: variables put in, relative to the folder of the job file."""

        def value(match: re.Match[str]) -> str:
            name = match[1]
            found = os.environ.get(name) or self.variables.get(name)
            if found is None:
                raise ConfigError(
                    f"{self.path}: ${{{name}}} is neither set in the environment nor in [variables]"
                )
            return found

        try:
            path = as_path(re.sub(r"\$\{(\w+)\}", value, text)).expanduser()
            return path if isinstance(path, ObjectPath) else (self.path.parent / path).resolve()
        except SosError as error:
            raise ConfigError(f"{self.path}: {error.message}", error.hint) from None
        except (RuntimeError, ValueError) as error:  # no home folder; a loop of links
            raise ConfigError(f"{self.path}: path '{text}': {error}") from None


def load_job(path: str | Path) -> Job:
    """Read a job file.

    Raises `ConfigError`: not there, not TOML, an unknown key (with the nearest known ones), a value
    out of range.
    """
    path = on_disk(as_path(path), "job file")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe may never end
            raise ConfigError(f"job file {path} is not a regular file")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"job file {path} cannot be read: {why}") from None
    try:
        text, raw = parse_toml(content, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", error.hint) from None
    if redacted(text, {}) != text:
        hint = "A job is kept with every build: leave them to the environment, as ${NAME}."
        raise ConfigError(f"{path} contains a user, a password or a signature in a URL", hint)
    for (section, key), hint in _ELSEWHERE.items():
        if isinstance(raw.get(section), dict) and key in raw[section]:
            raise ConfigError(f"{path}: unknown key '{section}.{key}'", hint)
    try:
        return Job.model_validate({**raw, "path": path.absolute(), "text": text})
    except ValidationError as error:
        raise explained(Job, error, str(path)) from None

"""Job files: one TOML says which surveys are put on which scale, and how."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from sos_dask.errors import ConfigError
from sos_dask.schema import MOST_ROWS
from sos_dask.settings import NAME_RULE, Settings, explained, is_name, parse_toml
from sos_dask.stars.group import DedupeSettings

JOB_FORMAT = 1


class SurveySection(Settings):
    """One survey: its definition, its files, and what a job changes of the definition."""

    survey: str
    files: list[str] = Field(min_length=1)
    override: dict[str, Any] = Field(default_factory=dict)
    dedupe: DedupeSettings | None = None


class IngestSection(Settings):
    """How survey files become partitions."""

    rows_per_partition: int = Field(1_000_000, gt=0, le=MOST_ROWS)
    chunk_rows: int = Field(500_000, gt=0, le=MOST_ROWS)
    margin_arcsec: float | None = Field(None, gt=0, lt=3600)


class UnifySection(Settings):
    """How the reference surveys become one."""

    method: Literal["precedence", "weighted-mean"] = "precedence"
    order: list[str] | None = None
    offsets: Literal["measured"] | dict[str, dict[str, float]] = "measured"
    radius_arcsec: float = Field(1.5, gt=0, lt=3600)
    id_radius_arcsec: float = Field(10.0, gt=0, lt=3600)
    epoch: float = Field(2016.0, gt=1800, lt=2100)

    @property
    def fixed_offsets(self) -> dict[str, dict[str, float]]:
        """Offsets by survey and label; empty where they are measured."""
        return {} if self.offsets == "measured" else self.offsets


class CrossmatchSection(Settings):
    """How target and reference are matched."""

    target: Literal["stars", "observations"] = "stars"
    radius_arcsec: float = Field(1.0, gt=0, lt=3600)
    id_radius_arcsec: float = Field(10.0, gt=0, lt=3600)
    pairs: Literal["best", "all"] = "best"
    use_gaia_id: bool = True
    n_folds: int = Field(5, ge=2, le=100)


class TrainSection(Settings):
    """Which methods are trained, and how they are validated."""

    methods: list[str] = Field(default_factory=lambda: ["polynomial", "boosted"], min_length=1)
    validation: Literal["auto", "kfold", "holdout"] = "auto"
    params: dict[str, dict[str, Any]] = Field(default_factory=dict)
    search: int = Field(0, ge=0, le=1000)


class CompareSection(Settings):
    """How the methods are compared, and by which rule one of them corrects the catalog."""

    rule: str = "balanced"
    n_bootstrap: int = Field(400, ge=100, le=10_000)
    min_pairs: int = Field(30, ge=10, le=MOST_ROWS)
    min_bin_pairs: int = Field(50, ge=5, le=MOST_ROWS)
    min_cell_pairs: int = Field(5, ge=1, le=MOST_ROWS)
    tolerance: float = Field(0.01, ge=0, lt=1)


class UncertaintySection(Settings):
    """How the errors of corrected labels are made."""

    reference_error: Literal["included", "removed"] = "included"
    sparse_fraction: float = Field(0.05, gt=0, lt=0.5)


class ReportSection(Settings):
    """Whether a rebuild makes the report."""

    enabled: bool = True


class PublishSection(Settings):
    """How products are compared with their manifests before they are published."""

    check: Literal["sha256", "size"] = "sha256"


class AttachSection(Settings):
    """Columns of another catalog that are added to the target."""

    files: list[str] = Field(default_factory=list)
    catalog: str | None = None
    columns: dict[str, str] = Field(min_length=1)
    by: Literal["gaia_dr3_source_id", "gaia_dr2_source_id", "position"] = "gaia_dr3_source_id"
    id: str = "source_id"
    ra: str = "ra"
    dec: str = "dec"
    epoch: float = Field(2016.0, gt=1800, lt=2100)
    radius_arcsec: float = Field(1.0, gt=0, lt=3600)
    id_radius_arcsec: float = Field(10.0, gt=0, lt=3600)

    @model_validator(mode="after")
    def _one_source(self) -> AttachSection:
        if bool(self.files) == (self.catalog is not None):
            raise ValueError("give either files or catalog")
        return self


class CoverageSection(Settings):
    """Where the correction may be trusted, and what is done elsewhere.

    ``fallback = "auto"``: the polynomial where it is trained, else the correction's edge.
    """

    measure: Literal["neighbours", "ratio"] = "neighbours"
    inside: float = Field(0.8, gt=0, lt=1)
    outside: float = Field(0.5, gt=0, lt=1)
    fallback: Literal["auto", "polynomial", "none", "edge"] = "auto"
    grid: dict[
        Literal["teff", "logg", "feh"], Annotated[tuple[float, float], Field(strict=False)]
    ] = Field(default_factory=dict)

    @field_validator("grid")
    @classmethod
    def _low_and_high(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for label, (low, high) in value.items():
            if not low < high:
                raise ValueError(f"{label}: {low:g} is not below {high:g}")
        return value


class ProjectionSection(Settings):
    """A UMAP of target and overlap, for looking; made where the job has the section."""

    sample_rows: int = Field(20_000, ge=100, le=1_000_000)
    n_neighbors: int = Field(15, ge=2, le=200)
    min_dist: float = Field(0.1, ge=0, le=1)
    neighbors: int = Field(15, ge=1, le=100)
    map_bins: int = Field(256, ge=8, le=4096)
    share: float = Field(1.0, gt=0, le=1)


class GeneralisationSection(Settings):
    """Methods trained without one region after the other, where the job has the section."""

    max_pairs: int = Field(20_000, ge=100, le=MOST_ROWS)
    min_pairs: int = Field(200, ge=10, le=MOST_ROWS)


class ClusterSection(Settings):
    """Where the work is done."""

    n_workers: int | None = Field(None, ge=0, le=10_000)
    memory_limit: str = "auto"
    scheduler: str | None = None


class Job(Settings):
    """A whole rebuild.

    Parameters
    ----------
    target_name : str, optional
        Name of the target in products, figures and titles. Default: the name of its survey.
    path : Path
        The file; relative paths in it are relative to its folder.
    text : str
        Its content, kept with every build.
    """

    TABLE_HINTS: ClassVar = {
        "reference": "Each reference survey has a table of its own, such as [reference.apogee], "
        "with the keys survey and files."
    }

    format: int
    name: str
    store: str
    seed: int = Field(0, ge=0, lt=2**31)
    variables: dict[str, str] = Field(default_factory=dict)
    target: SurveySection
    target_name: str | None = None
    reference: dict[str, SurveySection] = Field(min_length=1)
    ingest: IngestSection = Field(default_factory=IngestSection)
    dedupe: DedupeSettings = Field(default_factory=DedupeSettings)
    unify: UnifySection = Field(default_factory=UnifySection)
    crossmatch: CrossmatchSection = Field(default_factory=CrossmatchSection)
    train: TrainSection = Field(default_factory=TrainSection)
    compare: CompareSection = Field(default_factory=CompareSection)
    uncertainty: UncertaintySection = Field(default_factory=UncertaintySection)
    report: ReportSection = Field(default_factory=ReportSection)
    publish: PublishSection = Field(default_factory=PublishSection)
    attach: dict[str, AttachSection] = Field(default_factory=dict)
    coverage: CoverageSection = Field(default_factory=CoverageSection)
    projection: ProjectionSection | None = None
    generalisation: GeneralisationSection | None = None
    cluster: ClusterSection = Field(default_factory=ClusterSection)
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
        if self.target_name is not None:
            named["target_name"] = self.target_name
        for key, name in named.items():
            if not is_name(name):
                raise ValueError(f"{key}: '{name}' is no name: {NAME_RULE}")
        if self.target_name in self.reference:
            raise ValueError(f"two surveys are named '{self.target_name}'")
        for name in self.unify.order or ():
            if name not in self.reference:
                raise ValueError(f"unify.order names '{name}', which is no [reference.*]")
        for name in self.unify.fixed_offsets:
            if name not in self.reference:
                raise ValueError(f"unify.offsets names '{name}', which is no [reference.*]")
        if len(set(self.train.methods)) < len(self.train.methods):
            raise ValueError("train.methods names a method twice")
        if self.coverage.fallback == "polynomial" and "polynomial" not in self.train.methods:
            raise ValueError("coverage.fallback = 'polynomial' is not among train.methods")
        return self

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
            path = Path(re.sub(r"\$\{(\w+)\}", value, text)).expanduser()
            return (self.path.parent / path).resolve()
        except (RuntimeError, ValueError) as error:  # no home folder; a loop of links
            raise ConfigError(f"{self.path}: path '{text}': {error}") from None


def load_job(path: str | Path) -> Job:
    """Read a job file.

    Raises
    ------
    ConfigError
        Not there, not TOML, an unknown key (with the nearest known ones), a value out of range.
    """
    path = Path(path)
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
    try:
        return Job.model_validate({**raw, "path": path.absolute(), "text": text})
    except ValidationError as error:
        raise explained(Job, error, str(path)) from None

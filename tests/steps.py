"""Stages as tests call them: on pairs and models by themselves, with their table of evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from sos_dask.columns import Float32Array
from sos_dask.problem import DEFAULT
from sos_dask.stages.apply import Apply, ApplySettings
from sos_dask.stages.compare import Compare, CompareSettings, Trends, TrendSettings
from sos_dask.stages.coverage import Coverage, CoverageSettings
from sos_dask.stages.evidence import Evidence, EvidenceSettings, on_pairs
from sos_dask.stages.report import ReportSettings, ReportStage
from sos_dask.stages.train import Generalisation, GeneralisationSettings
from sos_dask.stages.uncertainty import Uncertainty, UncertaintySettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest

Models = Mapping[str, Path]
FEATURES = DEFAULT.features


def features(teff: ArrayLike, logg: ArrayLike, feh: ArrayLike) -> Float32Array:
    """Inputs of the default problem."""
    return DEFAULT.matrix({"teff": teff, "logg": logg, "feh": feh})


@dataclass(frozen=True)
class Trust:
    """Inputs of apply by which a correction fades."""

    coverage: Catalog
    fallback: str = "edge"
    smooth: Path | None = None


@dataclass(frozen=True)
class Surveys:
    """Inputs of uncertainty beside pairs and model."""

    target: str = "target"
    target_stars: Catalog | None = None
    reference: Catalog | None = None
    stars: Mapping[str, Catalog] = field(default_factory=dict)


def _named(models: Models) -> dict[str, Catalog | Path]:
    return {f"model.{method}": path for method, path in models.items()}


def make_evidence(
    pairs: Catalog,
    models: Models,
    directory: Path,
    settings: EvidenceSettings | None = None,
    **options: Any,
) -> Manifest:
    return Evidence({"pairs": pairs, **_named(models)}, settings).run(directory, **options)


def compare(
    pairs: Catalog,
    models: Models,
    directory: Path,
    settings: CompareSettings | None = None,
    **options: Any,
) -> Manifest:
    return on_pairs(Compare, pairs, models, directory, settings, _named(models), **options)


def trends(
    pairs: Catalog,
    directory: Path,
    settings: TrendSettings | None = None,
    *,
    models: Models | None = None,
    reference: Catalog | None = None,
    stars: Mapping[str, Catalog] | None = None,
    **options: Any,
) -> Manifest:
    more: dict[str, Catalog | Path] = {} if reference is None else {"reference": reference}
    more |= {f"stars.{name}": one for name, one in (stars or {}).items()}
    return on_pairs(Trends, pairs, models or {}, directory, settings, more, **options)


def uncertainty(
    model: Path,
    pairs: Catalog,
    directory: Path,
    settings: UncertaintySettings | None = None,
    surveys: Surveys | None = None,
    **options: Any,
) -> Manifest:
    surveys, settings = surveys or Surveys(), settings or UncertaintySettings()
    more: dict[str, Catalog | Path] = {"model": model}
    given = {"target_stars": surveys.target_stars, "reference": surveys.reference}
    more |= {name: one for name, one in given.items() if one is not None}
    more |= {f"stars.{name}": one for name, one in surveys.stars.items()}
    method = Manifest.load(model).recipe.stage.removeprefix("train-")
    settings = settings.but(target=surveys.target)
    return on_pairs(Uncertainty, pairs, {method: model}, directory, settings, more, **options)


def coverage(
    model: Path,
    pairs: Catalog,
    catalog: Catalog,
    stars: Catalog,
    directory: Path,
    settings: CoverageSettings | None = None,
    *,
    errors: Path | None = None,
    **options: Any,
) -> Manifest:
    more: dict[str, Catalog | Path] = {"model": model, "pairs": pairs}
    more |= {"observations": catalog, "stars": stars} | ({"errors": errors} if errors else {})
    method = Manifest.load(model).recipe.stage.removeprefix("train-")
    return on_pairs(Coverage, pairs, {method: model}, directory, settings, more, **options)


def generalisation(
    pairs: Catalog,
    directory: Path,
    methods: Mapping[str, Mapping[str, Any]],
    settings: GeneralisationSettings | None = None,
    **options: Any,
) -> Manifest:
    settings = (settings or GeneralisationSettings()).but(methods=methods)
    return on_pairs(Generalisation, pairs, {}, directory, settings, {}, **options)


def apply(
    model: Path,
    catalog: Catalog,
    directory: Path,
    *,
    partitions: str = "all",
    name: str = "",
    errors: Path | None = None,
    trust: Trust | None = None,
    **options: Any,
) -> Manifest | None:
    inputs: dict[str, Catalog | Path | str] = {"model": model, "observations": catalog}
    given: dict[str, Any] = {"partitions": partitions}
    if errors is not None:
        inputs["errors"] = errors
    if trust is not None:
        inputs["coverage"], given["fallback"] = trust.coverage, trust.fallback
        if trust.smooth is not None:
            inputs["smooth"] = trust.smooth
    name = name or catalog.name.removesuffix(".observations") + ".corrected"
    return Apply(inputs, ApplySettings(**given), product=name).attempt(directory, **options)


def report(products: Models, directory: Path, settings: ReportSettings, **options: Any) -> Manifest:
    given = {f"product.{name}": path.resolve() for name, path in products.items()}
    return ReportStage(given, settings).run(directory, **options)

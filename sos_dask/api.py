"""Everything that the commands do, as documented functions in one place.

>>> from sos_dask import api
>>> with api.start(n_workers=2) as cluster:                                  # doctest: +SKIP
...     api.ingest("lamost-dr11-lrs", ["dr11.fits.gz"], "lamost", cluster=cluster)
...     api.dedupe("lamost", "lamost.stars", api.DedupeSettings(), cluster=cluster)

Files and directories are given as text or `Path`, catalogs and jobs opened or by their path,
surveys by name. Whatever the input is, only `SosError` and its kinds are raised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sos_dask import simulate as _simulate
from sos_dask.errors import understood
from sos_dask.rebuild import pipeline as _pipeline
from sos_dask.rebuild import plan as _plan
from sos_dask.rebuild.job import Job, load_job
from sos_dask.run.cluster import Cluster, start
from sos_dask.simulate import SkySettings
from sos_dask.stages import apply as _apply
from sos_dask.stages import attach as _attach
from sos_dask.stages import compare as _compare
from sos_dask.stages import coverage as _coverage
from sos_dask.stages import crossmatch as _crossmatch
from sos_dask.stages import dedupe as _dedupe
from sos_dask.stages import ingest as _ingest
from sos_dask.stages import margin as _margin
from sos_dask.stages import reference as _reference
from sos_dask.stages import report as _report
from sos_dask.stages import train as _train
from sos_dask.stages import trends as _trends
from sos_dask.stages import uncertainty as _uncertainty
from sos_dask.stages.apply import Trust
from sos_dask.stages.attach import AttachSettings
from sos_dask.stages.compare import CompareSettings
from sos_dask.stages.coverage import CoverageSettings
from sos_dask.stages.crossmatch import PairSettings
from sos_dask.stages.ingest import IngestSettings
from sos_dask.stages.reference import ReferenceSettings
from sos_dask.stages.report import ReportSettings
from sos_dask.stages.train import TrainSettings
from sos_dask.stages.trends import TrendSettings
from sos_dask.stages.uncertainty import Surveys, UncertaintySettings
from sos_dask.stars.group import DedupeSettings
from sos_dask.stars.match import MatchSettings
from sos_dask.stars.unify import UnifySettings
from sos_dask.storage import store as _store
from sos_dask.storage.catalog import Catalog
from sos_dask.surveys.definition import Survey, builtin_surveys, load_survey

_Result = TypeVar("_Result")
# What is made of a path or a name where a function wants the thing.
_OPENED: Mapping[Any, Callable[[Any], Any]] = {
    Path: Path,
    Catalog: Catalog.open,
    Survey: load_survey,
    Job: load_job,
}


def _public(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let a function take names and paths, as text too; all it raises becomes a `SosError`."""
    signature = inspect.signature(function, eval_str=True)
    wanted = {name: item.annotation for name, item in signature.parameters.items()}

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> _Result:
        given = signature.bind(*args, **kwargs)
        try:
            for name, value in given.arguments.items():
                given.arguments[name] = _opened(value, wanted[name])
            return function(*given.args, **given.kwargs)
        except Exception as error:
            known = understood(error)
            if known is None or known is error:
                raise
            raise known from error

    parameters = [
        item.replace(annotation=_accepted(item.annotation))
        for item in signature.parameters.values()
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _opened(value: Any, wanted: Any) -> Any:
    """A value as the function wants it: paths and names are opened, also in lists and settings."""
    is_path = isinstance(value, str | PathLike)
    inner = get_args(wanted)
    if get_origin(wanted) is Sequence and inner[0] in _OPENED:
        return [_opened(item, inner[0]) for item in ([value] if is_path else value)]
    for kind in inner if get_origin(wanted) in (Union, UnionType) else (wanted,):
        if is_path and isinstance(kind, type) and kind in _OPENED:
            return value if isinstance(value, kind) else _OPENED[kind](value)
        if kind in (Trust, Surveys) and isinstance(value, kind):
            hints = get_type_hints(kind)
            return replace(value, **{k: _opened(getattr(value, k), hints[k]) for k in hints})
        if isinstance(value, Mapping) and get_origin(kind) is Mapping:
            return {key: _opened(item, get_args(kind)[1]) for key, item in value.items()}
    return value


def _accepted(wanted: Any) -> Any:
    """Annotation of what `_opened` takes."""
    if get_origin(wanted) in (Union, UnionType):
        return Union[tuple(map(_accepted, get_args(wanted)))]  # noqa: UP007
    if get_origin(wanted) in (Sequence, Mapping):
        return get_origin(wanted)[tuple(map(_accepted, get_args(wanted)))]
    return str | Path | wanted if isinstance(wanted, type) and wanted in _OPENED else wanted


apply = _public(_apply.apply)
attach = _public(_attach.attach)
compare = _public(_compare.compare)
coverage = _public(_coverage.coverage)
crossmatch = _public(_crossmatch.crossmatch)
dedupe = _public(_dedupe.dedupe)
gc = _public(_store.gc)
ingest = _public(_ingest.ingest)
margin = _public(_margin.margin)
plan = _public(_plan.plan)
rebuild = _public(_pipeline.rebuild)
reference = _public(_reference.reference)
report = _public(_report.report)
simulate = _public(_simulate.simulate)
status = _public(_store.status)
train = _public(_train.train)
trends = _public(_trends.trends)
uncertainty = _public(_uncertainty.uncertainty)
verify = _public(_store.verify)

__all__ = [
    "AttachSettings",
    "Catalog",
    "Cluster",
    "CompareSettings",
    "CoverageSettings",
    "DedupeSettings",
    "IngestSettings",
    "Job",
    "MatchSettings",
    "PairSettings",
    "ReferenceSettings",
    "ReportSettings",
    "SkySettings",
    "Survey",
    "Surveys",
    "TrainSettings",
    "TrendSettings",
    "Trust",
    "UncertaintySettings",
    "UnifySettings",
    "apply",
    "attach",
    "builtin_surveys",
    "compare",
    "coverage",
    "crossmatch",
    "dedupe",
    "gc",
    "ingest",
    "load_job",
    "load_survey",
    "margin",
    "plan",
    "rebuild",
    "reference",
    "report",
    "simulate",
    "start",
    "status",
    "train",
    "trends",
    "uncertainty",
    "verify",
]

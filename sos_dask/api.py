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
from functools import wraps
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from sos_dask import simulate as _simulate
from sos_dask.errors import understood
from sos_dask.rebuild import pipeline as _pipeline
from sos_dask.rebuild import plan as _plan
from sos_dask.rebuild.job import Job, load_job
from sos_dask.run.cluster import Cluster, silent, start
from sos_dask.simulate import SkySettings
from sos_dask.stages import ingest as _ingest
from sos_dask.stages.apply import Apply, ApplySettings
from sos_dask.stages.attach import Attach, AttachSettings, Margin, MarginSettings
from sos_dask.stages.base import Stage
from sos_dask.stages.compare import Compare, CompareSettings, Trends, TrendSettings
from sos_dask.stages.coverage import Coverage, CoverageSettings
from sos_dask.stages.crossmatch import Crossmatch, CrossmatchSettings
from sos_dask.stages.dedupe import Dedupe
from sos_dask.stages.evidence import Evidence
from sos_dask.stages.ingest import IngestSettings
from sos_dask.stages.reference import Reference, ReferenceSettings
from sos_dask.stages.train import Train, TrainSettings
from sos_dask.stages.uncertainty import Uncertainty, UncertaintySettings
from sos_dask.stages.unify import Unify, UnifySettings
from sos_dask.stars.group import DedupeSettings
from sos_dask.storage import export as _export
from sos_dask.storage import store as _store
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.objects import as_path
from sos_dask.surveys.definition import Survey, builtin_surveys, load_survey
from sos_dask.tables import Correction

_Result = TypeVar("_Result")
# What is made of a path or a name where a function wants the thing.
_OPENED: Mapping[Any, Callable[[Any], Any]] = {
    Path: as_path,
    Catalog: Catalog.open,
    Survey: load_survey,
    Job: load_job,
}


def _public(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let a function take names and paths, as text too; all it raises becomes a `SosError`."""
    signature = inspect.signature(function, eval_str=True)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> _Result:
        given = signature.bind(*args, **kwargs)
        try:
            for name, value in given.arguments.items():
                given.arguments[name] = _opened(value, signature.parameters[name].annotation)
            return function(*given.args, **given.kwargs)
        except Exception as error:
            known = understood(error)
            if known is None or known is error:
                raise
            raise known from error

    return run


def _opened(value: Any, wanted: Any) -> Any:
    """A value as the function wants it: paths and names are opened, also in lists."""
    is_path = isinstance(value, str | PathLike)
    inner = get_args(wanted)
    if get_origin(wanted) is Sequence and inner[0] in _OPENED:
        return [_opened(item, inner[0]) for item in ([value] if is_path else value)]
    for kind in inner if get_origin(wanted) in (Union, UnionType) else (wanted,):
        if is_path and isinstance(kind, type) and kind in _OPENED:
            return value if isinstance(value, kind) and kind is not Path else _OPENED[kind](value)
    return value


def _step(stage: type[Stage[Any]]) -> Callable[..., Any]:
    """Make a function of a stage: its inputs by role, a directory, settings."""
    fixed = [role for role in stage.roles if not role.optional]
    further = [role for role in stage.roles if role.optional]

    def run(*args: Any, **kwargs: Any) -> Manifest | None:
        given = signature.bind(*args, **kwargs).arguments
        inputs: dict[str, Any] = {}
        for role in stage.roles:
            value = given.get(role.name)
            if role.many and value is not None:
                inputs |= {f"{role.name}.{name}": one for name, one in dict(value).items()}
            elif value is not None:
                inputs[role.name] = value
        made = stage(inputs, given.get("settings"), product=given.get("name", ""))
        options = {
            name: given[name] for name in ("overwrite", "cluster", "report") if name in given
        }
        return made.attempt(given["directory"], **options)

    place, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    fields = stage.Settings.model_fields.values()
    needed = inspect.Parameter.empty if any(one.is_required() for one in fields) else None
    signature = inspect.Signature(
        [
            *(inspect.Parameter(role.name, place) for role in fixed),
            inspect.Parameter("directory", place),
            inspect.Parameter("settings", place, default=needed),
            *(inspect.Parameter(role.name, named, default=None) for role in further),
            inspect.Parameter("name", named, default=""),
            inspect.Parameter("overwrite", named, default=False),
            inspect.Parameter("cluster", named, default=None),
            inspect.Parameter("report", named, default=silent),
        ]
    )
    lines = []
    for role in stage.roles:
        kind = "path or Catalog" if role.kind == "catalog" else "path"
        many = "mapping of str to " if role.many else ""
        optional = ", optional" if role.optional else ""
        lines.append(f"{role.name} : {many}{kind}{optional}\n    {role.text}")
    lines += [
        "directory : path\n    Where the output goes; several processes may share it.",
        f"settings : {stage.Settings.__name__}{', optional' if needed is None else ''}",
        "name : str\n    Name of the catalog; default that of the directory.",
        "overwrite : bool\n    Replace another output in ``directory``.",
    ]
    doc = inspect.cleandoc(stage.__doc__ or "")
    run.__doc__ = "\n".join([doc, "", "Parameters", "----------", *lines])
    run.__name__ = run.__qualname__ = stage.__name__.lower()
    run.__signature__ = signature  # type: ignore[attr-defined]
    return _public(run)


apply = _step(Apply)
attach = _step(Attach)
compare = _step(Compare)
coverage = _step(Coverage)
crossmatch = _step(Crossmatch)
dedupe = _step(Dedupe)
evidence = _step(Evidence)
export = _public(_export.export)
gc = _public(_store.gc)
ingest = _public(_ingest.ingest)
margin = _step(Margin)
plan = _public(_plan.plan)
rebuild = _public(_pipeline.rebuild)
reference = _step(Reference)
simulate = _public(_simulate.simulate)
status = _public(_store.status)
train = _step(Train)
trends = _step(Trends)
uncertainty = _step(Uncertainty)
unify = _step(Unify)
verify = _public(_store.verify)


__all__ = [
    "ApplySettings", "AttachSettings", "Catalog", "Cluster", "CompareSettings", "Correction",
    "CoverageSettings", "CrossmatchSettings", "DedupeSettings", "IngestSettings", "Job",
    "MarginSettings", "ReferenceSettings", "SkySettings", "Survey", "TrainSettings",
    "TrendSettings", "UncertaintySettings", "UnifySettings", "apply", "attach", "builtin_surveys",
    "compare", "coverage", "crossmatch", "dedupe", "evidence", "export", "gc", "ingest", "load_job",
    "load_survey", "margin", "plan", "rebuild", "reference", "simulate", "start", "status", "train",
    "trends", "uncertainty", "unify", "verify",
]  # fmt: skip

"""Options: their texts from one file, and commands made of functions with settings."""

from __future__ import annotations

import contextlib
import functools
import inspect
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from sos_dask.cli.output import Row, print_json, reporting, show_step
from sos_dask.errors import ConfigError, StorageError
from sos_dask.rebuild.job import load_job
from sos_dask.run import LIGHT
from sos_dask.run.cluster import Cluster, start
from sos_dask.run.kinds import nested
from sos_dask.run.machine import leave_pandas_out, n_cores
from sos_dask.schema import nearest
from sos_dask.settings import Settings
from sos_dask.stages.base import Stage
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.objects import as_path
from sos_dask.storage.store import stores_near

# More threads than this wait for each other: Python itself runs in one at a time.
_FEW_CORES = 4
_ENDS = {"workers": (0, None), "threads": (1, None), "rows": (1000, 10**9), "seed": (0, 2**31 - 1)}
_ENDS |= {"rave": (0, 10**9), "rvs": (0, 10**9), "clusters": (0, 10**6)}
_ENDS |= {"days": (1, 36_500)}
_TEXTS = tomllib.loads((resources.files("sos_dask") / "templates/options.toml").read_text("utf-8"))


def _no_file(path: Path | None) -> Path | None:
    """Refuse a file where a directory is written."""
    if path is not None and path.exists() and not path.is_dir():
        raise StorageError(
            f"cannot write {path}: it is a file, not a directory", "Choose another name."
        )
    return path


def find_store(store: Path | None, job: Path | None = None) -> Path:
    """Find the store: of a job file, as given, ``store`` or the only one near it."""
    if store is not None and job is not None:
        raise ConfigError("--store and a job file or store are given", "Give one of them.")
    place = store or job
    if place is None:
        place = Path("store")
        near = [] if (place / "artifacts").is_dir() else stores_near(place)
        return near[0] if len(near) == 1 else place
    if place.is_file() or (place.suffix == ".toml" and not place.is_dir()):
        loaded = load_job(place)
        return loaded.resolve(loaded.store)
    return place


def open_catalogs(
    paths: Iterable[str | Path], keys: Sequence[str] | None, key_name: str = "star_id"
) -> list[Catalog]:
    """Catalogs given by path; those of other programs with the first of the keys that they have."""
    opened = [Catalog.open(path) for path in paths]
    names = [name for one in opened if one.manifest is None for name in one.schema.names]
    for key in keys or ():
        if key not in names:
            raise ConfigError(
                f"--key {key}: no catalog of another program has such a column", nearest(key, names)
            )
    for number, one in enumerate(opened):
        key = next((key for key in keys or () if key in one.schema.names), "")
        if key and one.manifest is None:
            opened[number] = Catalog.open(one.path, key=key, key_name=key_name)
    return opened


def cluster_settings(texts: Iterable[str] | None) -> dict[str, Any]:
    """Settings of a cluster by name, of NAME=VALUE, as in ``[cluster]`` of a job; quotes may go."""
    found: dict[str, Any] = {}
    for text in texts or ():
        name, given, value = text.partition("=")
        if not given or not name:
            raise ConfigError(f"--cluster '{text}' is not NAME=VALUE", "For example kind=slurm.")
        found[name] = value
        with contextlib.suppress(tomllib.TOMLDecodeError):
            found[name] = tomllib.loads(f"value = {value}")["value"]
    return nested(found)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options shared by commands that run a stage: where, over what, how it is told.

    ``given``: parameters of the command, as in Python, with another value than the default.
    ``settings`` makes those of the stage, of their options and of what else they need.
    """

    out: Path
    threads: int | None = None
    workers: int | None = None
    memory_limit: str = "auto"
    scheduler: str | None = None
    cluster: list[str] | None = None
    overwrite: bool = False
    as_json: bool = False
    command: str
    given: tuple[str, ...]
    settings: Callable[..., Any]

    def refuse(self, names: Collection[str], why: str, hint: str = "Leave it out.") -> None:
        """Refuse given options by their names in Python; ``why`` follows "has no effect"."""
        for name in self.given:
            if name in names:
                raise ConfigError(f"--{name.replace('_', '-')} has no effect{why}", hint)

    def start(self) -> AbstractContextManager[Cluster]:
        """Start what runs the tasks: threads for light ones where there are few cores."""
        leave_pandas_out()
        threads = self.threads
        is_free = (self.workers, threads) == (None, None) and not self.wants_cluster
        if is_free and self.command in LIGHT and n_cores() <= _FEW_CORES:
            threads = n_cores()
        given: dict[str, Any] = {"n_workers": self.workers, "memory_limit": self.memory_limit}
        given |= {"scheduler": self.scheduler, **cluster_settings(self.cluster)}
        return start(n_threads=threads, **given)

    @property
    def wants_cluster(self) -> bool:
        """Whether a cluster is asked for: workers, or a scheduler."""
        return bool(self.workers) or self.scheduler is not None or bool(self.cluster)

    def run(self, stage: Stage[Any], out: Path | None = None) -> Manifest | None:
        """Run a stage, with progress on stderr; None while parts of other processes are missing."""
        with reporting() as report, self.start() as cluster:
            given: dict[str, Any] = {"cluster": cluster, "report": report}
            return stage.attempt(out or self.out, overwrite=self.overwrite, **given)


Place = Path | None
Places = list[Path] | None
Name = str | None
Names = list[str] | None
Shown = Iterator[Row]
"""What a command gives that shows something: yields all that --json prints, then prints text."""


def command(stage: type[Stage[Any]] | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Make a command of a function: positional parameters are arguments, others options.

    The fields of the settings of ``stage`` become options, less those that are parameters. A stage
    that the function returns is run, and its account printed. ``options`` are `Options`, less those
    that are its own parameters.
    """
    made: Any = stage.Settings if stage else Settings

    def decorate(function: Callable[..., Any]) -> Any:
        name = function.__name__
        own = dict(inspect.signature(function, eval_str=True).parameters)
        with_options = own.pop("options", None) is not None
        parameters = {x: _declared(name, one) for x, one in own.items()}
        field_of = {}
        for field, info in made.model_fields.items():
            if field not in own and (one := _option(field, info)) is not None:
                parameters[one.name] = one
                field_of[one.name] = field
        shared = dict(inspect.signature(Options, eval_str=True).parameters)
        for x in ("command", "given", "settings", *own, *([] if name in LIGHT else ["threads"])):
            shared.pop(x, None)
        if not with_options:
            shared = {x: one for x, one in shared.items() if x == "as_json"}
        parameters |= {x: _declared(name, one) for x, one in shared.items()}

        @functools.wraps(function)
        def run(**given: Any) -> None:
            changed = tuple(x for x, value in given.items() if value != parameters[x].default)
            taken = {"out": Path()} | {x: given.pop(x) for x in shared}
            values = [(x, field, given.pop(x)) for x, field in field_of.items()]
            chosen = {field: value if x == field else not value for x, field, value in values}
            settings = functools.partial(made, **chosen)
            options = Options(**taken, command=name, given=changed, settings=settings)
            result = function(**given, **({"options": options} if with_options else {}))
            if isinstance(result, Stage):
                show_step(options.run(result), options.out, options.as_json)
            elif result is not None:
                document = next(result)
                if options.as_json:
                    print_json(document)
                else:
                    next(result, None)
                if code := document.get("exit_code"):
                    raise typer.Exit(code)

        keyword = inspect.Parameter.KEYWORD_ONLY
        arguments = [x for x, one in own.items() if one.kind is not keyword]
        order = sorted(parameters, key=lambda x: (x not in arguments, x != "out"))
        signature = inspect.Signature([parameters[x] for x in order])
        run.__signature__ = signature  # type: ignore[attr-defined]
        return run

    return decorate


def _declared(command: str, parameter: inspect.Parameter) -> inspect.Parameter:
    """Parameter of a command with its text of the table."""
    name = parameter.name
    words, text = _TEXTS.get(f"{command}.{name}") or _TEXTS[name]
    names = [word for word in words.split() if word.startswith("-")]
    metavar = words.removeprefix(" ".join(names)).strip() or None
    takes: Any = {"parser": as_path} if "Path" in str(parameter.annotation) else {}
    made: Any = typer.Argument(metavar=metavar, help=text, **takes)
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        names = names or [f"--{name.replace('_', '-')}"]
        low, high = _ENDS.get(name, (None, None))
        check = _no_file if name == "out" else None
        how = {"min": low, "max": high, "callback": check, **takes}
        made = typer.Option(*names, metavar=metavar, help=text, **how)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return parameter.replace(kind=keyword, annotation=Annotated[parameter.annotation, made])


def _option(name: str, field: Any) -> inspect.Parameter | None:
    """Option of a field of settings, ``no_...`` of a switch that is on; None where it has none."""
    kind, default = field.annotation, field.get_default(call_default_factory=True)
    more = field.json_schema_extra or {}
    help_text = field.description or ""
    metavar = {float: "X", int: "N", str: "NAME"}.get(kind)
    if kind is bool and default:
        name, default, help_text = f"no_{name.removeprefix('use_')}", False, more.get("no", "")
    elif get_origin(kind) is Literal:
        *first, last = get_args(kind)
        kind, metavar = str, "NAME"
        help_text = f"{help_text.rstrip('.')}: {', '.join(first)} or {last}."
    elif field.is_required() or (metavar is None and kind is not bool):
        return None
    limits: dict[str, Any] = {}
    ends = {"ge": ("min", 0), "gt": ("min", 1), "le": ("max", 0), "lt": ("max", -1)}
    for limit in field.metadata if kind is int else ():
        for attribute, (end, more_by) in ends.items():
            if hasattr(limit, attribute):
                limits[end] = getattr(limit, attribute) + more_by
    flag = more.get("option", f"--{name.replace('_', '-')}")
    made: Any = typer.Option(flag, metavar=metavar, help=help_text, **limits)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, made])

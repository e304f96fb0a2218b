"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from sos_dask.errors import ConfigError, StorageError
from sos_dask.settings import Settings

if TYPE_CHECKING:
    from sos_dask.run.cluster import Cluster
    from sos_dask.storage.catalog import Catalog

DEBUG = "--debug"

Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-w",
        min=0,
        metavar="N",
        help="Worker processes; 0: none, all in this process. Default: one per core.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads of this process instead of workers; with up to 4 cores the default, one "
        "per core. They start at once and share the memory of the process.",
        show_default=False,
    ),
]
_MEMORY = typer.Option(
    "--memory-limit", metavar="SIZE", help="Memory of each worker or thread, like 4GiB."
)
MemoryLimit = Annotated[str, _MEMORY]
OptionalMemoryLimit = Annotated[str | None, _MEMORY]


Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Address or scheduler file of a running Dask cluster, used instead of own workers.",
    ),
]


def _no_file(path: Path | None) -> Path | None:
    """Refuse a file where a directory is written."""
    if path is not None and path.exists() and not path.is_dir():
        raise StorageError(
            f"cannot write {path}: it is a file, not a directory", "Choose another name."
        )
    return path


Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="DIRECTORY",
        help="Directory that gets the output.",
        callback=_no_file,
    ),
]
OptionalOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIRECTORY",
        help="Directory that gets the output; with PAIRS.",
        callback=_no_file,
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another output in the same directory.")
]
Key = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        metavar="COLUMN",
        help="Key of a catalog that another program made: integers or text, each once. Repeatable: "
        "a catalog takes the first that it has. Default: star_id or obs_id.",
        show_default=False,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")
]
CatalogPath = Annotated[Path, typer.Argument(help="Directory of a catalog.", show_default=False)]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIRECTORY",
        help="Folder of artifacts and builds, or a job file: its store. Default: store, or the "
        "only store near it.",
        show_default=False,
    ),
]
JobOrStore = Annotated[
    Path | None,
    typer.Argument(
        metavar="[JOB]", help="Job file (its store is used), or a store.", show_default=False
    ),
]


def find_store(store: Path | None, job: Path | None = None) -> Path:
    """Find the store: of a job file, as given, ``store`` or the only one near it.

    Raises
    ------
    ConfigError
        Both are given, or the job file is wrong.
    """
    from sos_dask.storage.store import stores_near

    if store is not None and job is not None:
        raise ConfigError("--store and a job file or store are given", "Give one of them.")
    place = store or job
    if place is not None and (place.is_file() or (place.suffix == ".toml" and not place.is_dir())):
        from sos_dask.rebuild.job import load_job

        loaded = load_job(place)
        return loaded.resolve(loaded.store)
    if place is None:
        place = Path("store")
        near = [] if (place / "artifacts").is_dir() else stores_near(place)
        place = near[0] if len(near) == 1 else place
    return place


Rows = Annotated[
    int,
    typer.Option("--rows", min=1000, max=10**9, metavar="N", help="Rows of LAMOST."),
]
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**31 - 1, metavar="N", help="Same seed, same sky."),
]


# More threads than this wait for each other: Python itself runs in one at a time.
_FEW_CORES = 4


@dataclass(frozen=True)
class StepOptions:
    """Options shared by all single-step commands: workers, overwrite, output format."""

    workers: Workers = None
    memory_limit: MemoryLimit = "auto"
    scheduler: Scheduler = None
    overwrite: Overwrite = False
    as_json: Json = False
    given: tuple[str, ...] = field(default=(), init=False)

    def refuse(self, names: Collection[str], why: str, hint: str = "Leave it out.") -> None:
        """Refuse options that would have no effect.

        Parameters
        ----------
        names : collection of str
            Parameters of the command, as in Python.
        why, hint : str
            The first follows "has no effect".

        Raises
        ------
        ConfigError
            One of them was given, another value than the default.
        """
        for name in self.given:
            if name in names:
                separator = "" if why.startswith(":") else " "
                text = f"--{name.replace('_', '-')} has no effect{separator}{why}"
                raise ConfigError(text, hint)

    def refuse_all_but(self, *names: str) -> None:
        """Refuse options but some, ``--store`` and ``--json``, of a command that shows a build."""
        self.refuse(
            set(self.given) - {"store", "as_json", *names},
            "where no catalogs are given by path",
            "Without them the command shows the current build of --store.",
        )

    def start(self) -> AbstractContextManager[Cluster]:
        """What runs the tasks of the step."""
        from sos_dask.run.cluster import start
        from sos_dask.run.machine import leave_pandas_out

        leave_pandas_out()
        return start(self.workers, self.memory_limit, self.scheduler)


@dataclass(frozen=True)
class LightStepOptions(StepOptions):
    """Options of a step whose tasks spend nearly all their time in compiled code.

    Threads can do them. On two cores worker processes take a second to start, which is a third of
    a whole crossmatch of 19 million rows.
    """

    threads: Threads = None

    def __post_init__(self) -> None:
        # Read when Arrow is loaded, which is later: freed memory is used again, not given back.
        os.environ.setdefault("MIMALLOC_PURGE_DELAY", "-1")

    def start(self) -> AbstractContextManager[Cluster]:
        """What runs the tasks of the step: threads where there are few cores."""
        from sos_dask.run.cluster import start
        from sos_dask.run.machine import leave_pandas_out, n_cores

        leave_pandas_out()
        is_free = self.workers is None and self.scheduler is None
        few = n_cores() if is_free and n_cores() <= _FEW_CORES else None
        return start(self.workers, self.memory_limit, self.scheduler, self.threads or few)


def open_catalogs(
    paths: Iterable[str | Path], keys: Sequence[str] | None, key_name: str = "star_id"
) -> list[Catalog]:
    """Catalogs given by path; those of other programs with the first of the keys that they have.

    Raises
    ------
    ConfigError
        A key is in none of the catalogs of other programs.
    """
    from sos_dask.schema import nearest
    from sos_dask.storage.catalog import Catalog

    opened = [Catalog.open(path) for path in paths]
    names = [name for one in opened if one.manifest is None for name in one.schema.names]
    for key in keys or ():
        if key not in names:
            raise ConfigError(
                f"--key {key}: no catalog of another program has such a column",
                nearest(key, names),
            )
    for number, one in enumerate(opened):
        key = next((key for key in keys or () if key in one.schema.names), "")
        if key and one.manifest is None:
            opened[number] = Catalog.open(one.path, key=key, key_name=key_name)
    return opened


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of its ``settings`` and its ``options``.

    Its ``settings`` is annotated with the type of the settings, and gets a function that makes them
    of the options and of what else they need. Fields that are not numbers, texts, choices or
    switches have no option.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.name not in ("settings", "options")]
    made: type[Settings] | None = None
    settings: dict[str, inspect.Parameter] = {}
    if "settings" in signature.parameters:
        [made] = get_args(signature.parameters["settings"].annotation)
        taken = {one.name for one in own}
        found = (_option(*item) for item in made.model_fields.items() if item[0] not in taken)
        settings = {one.name: one for one in found if one is not None}
    kind = signature.parameters["options"].annotation
    shared = inspect.signature(kind, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        changed = tuple(name for name, value in given.items() if value != defaults[name])
        options = kind(**{name: given.pop(name) for name in shared})
        object.__setattr__(options, "given", changed)
        if made is not None:
            chosen = {name: given.pop(name) for name in settings}
            for name in [name for name in chosen if name.startswith("no_")]:
                chosen[_asked(made, name)] = not chosen.pop(name)
            given["settings"] = functools.partial(made, **chosen)
        command(options=options, **given)

    common = inspect.signature(StepOptions).parameters
    ordered = [shared[name] for name in (*(set(shared) - set(common)), *common)]
    everything = (*own, *settings.values(), *ordered)
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in everything]
    defaults = {item.name: item.default for item in parameters}
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _asked(settings: type[Settings], name: str) -> str:
    """Field that the option ``--no-...`` sets to false."""
    name = name.removeprefix("no_")
    return name if name in settings.model_fields else f"use_{name}"


def _option(name: str, field: Any) -> inspect.Parameter | None:
    """Option of a field of settings; None for a field that has no place on a command line."""
    kind, default = field.annotation, field.get_default(call_default_factory=True)
    more = field.json_schema_extra or {}
    help_text = field.description or ""
    limits: dict[str, Any] = {}
    metavar = {float: "X", int: "N", str: "NAME"}.get(kind)
    if kind is bool and default:
        name, default, help_text = f"no_{name.removeprefix('use_')}", False, more.get("no", "")
    elif get_origin(kind) is Literal:
        *first, last = get_args(kind)
        kind, metavar = str, "NAME"
        help_text = f"{help_text.rstrip('.')}: {', '.join(first)} or {last}."
    elif field.is_required() or (metavar is None and kind is not bool):
        return None
    if kind is int:
        ends = {"ge": ("min", 0), "gt": ("min", 1), "le": ("max", 0), "lt": ("max", -1)}
        for limit in field.metadata:
            for name_of, (end, more_by) in ends.items():
                if hasattr(limit, name_of):
                    limits[end] = getattr(limit, name_of) + more_by
    flag = more.get("option", f"--{name.replace('_', '-')}")
    option: Any = typer.Option(flag, metavar=metavar, help=help_text, **limits)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )

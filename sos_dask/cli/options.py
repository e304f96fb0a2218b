"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sos_dask.errors import ConfigError, StorageError

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
RowsPerPartition = Annotated[
    int,
    typer.Option(
        "--rows-per-partition",
        min=1,
        metavar="N",
        help="Pixels are split until each contains at most this many rows.",
    ),
]
_LARGEST_SEED = 2**31 - 1
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=_LARGEST_SEED, metavar="N", help="Same seed, same sky."),
]
Radius = Annotated[
    float,
    typer.Option("--radius-arcsec", metavar="X", help="Largest separation of rows of one star."),
]
IdRadius = Annotated[
    float,
    typer.Option("--id-radius-arcsec", metavar="X", help="The same for rows of one Gaia id."),
]
NoGaiaId = Annotated[
    bool, typer.Option("--no-gaia-id", help="Only positions count, Gaia ids do not.")
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


def with_step_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of its parameter ``options``."""
    signature = inspect.signature(command, eval_str=True)
    kind = signature.parameters["options"].annotation
    shared = inspect.signature(kind, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        changed = tuple(name for name, value in given.items() if value != defaults[name])
        options = kind(**{name: given.pop(name) for name in shared})
        object.__setattr__(options, "given", changed)
        command(options=options, **given)

    own = [item for item in signature.parameters.values() if item.name != "options"]
    common = inspect.signature(StepOptions).parameters
    ordered = [shared[name] for name in (*(set(shared) - set(common)), *common)]
    everything = (*own, *ordered)
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in everything]
    defaults = {item.name: item.default for item in parameters}
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run

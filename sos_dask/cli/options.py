"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sos_dask.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from sos_dask.cluster import Cluster

DEBUG = "--debug"

Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-w",
        min=0,
        metavar="N",
        help="Worker processes; 0: none, all in this process. Default: one a core.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads of this process instead of workers; with up to 4 cores the default, one a "
        "core. They start at once and need less memory, but have none of their own.",
        show_default=False,
    ),
]
_MEMORY = typer.Option(
    "--memory-limit", metavar="SIZE", help="Memory of each worker or thread, like 4GiB."
)
MemoryLimit = Annotated[str, _MEMORY]
OptionalMemoryLimit = Annotated[str | None, _MEMORY]


def _scheduler(text: str | None) -> str | None:
    """Refuse a scheduler file that is not there."""
    if text and text.endswith(".json") and not Path(text).is_file():
        raise ConfigError(f"--scheduler: there is no file {text}", "Has the scheduler started?")
    return text


Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        callback=_scheduler,
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
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")
]
CatalogPath = Annotated[Path, typer.Argument(help="Directory of a catalog.", show_default=False)]
Store = Annotated[
    Path, typer.Option("--store", metavar="DIRECTORY", help="Folder of artifacts and builds.")
]
Rows = Annotated[int, typer.Option("--rows", min=1000, metavar="N", help="Rows of LAMOST.")]
RowsPerPartition = Annotated[
    int,
    typer.Option(
        "--rows-per-partition",
        min=1,
        metavar="N",
        help="Pixels are split until each holds at most so many rows.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Same seed, same sky.")]
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


def refuse_with_scheduler(scheduler: str | None, workers: int | None, memory: str | None) -> None:
    """Refuse options of own workers beside a scheduler, whose workers are used.

    Raises
    ------
    ConfigError
        Both are given.
    """
    if scheduler is not None and (workers is not None or memory not in (None, "auto")):
        name = "--memory-limit" if workers is None else "--workers"
        raise ConfigError(
            f"{name} has no effect with --scheduler",
            "The workers of the running cluster are used, with the memory that they were given.",
        )


# More threads than this wait for each other: Python itself runs in one at a time.
_FEW_CORES = 4


@dataclass(frozen=True)
class StepOptions:
    """Options of every command that runs one step: where it is done, over what, how it is told."""

    workers: Workers = None
    memory_limit: MemoryLimit = "auto"
    scheduler: Scheduler = None
    overwrite: Overwrite = False
    as_json: Json = False
    given: tuple[str, ...] = field(default=(), init=False)

    def refuse(self, names: Collection[str], why: str, hint: str) -> None:
        """Refuse options that would have no effect.

        Parameters
        ----------
        names : collection of str
            Parameters of the command, as in Python.
        why, hint : str
            The first follows the name of the option.

        Raises
        ------
        ConfigError
            One of them was given, another value than the default.
        """
        for name in self.given:
            if name in names:
                raise ConfigError(f"--{name.replace('_', '-')} {why}", hint)

    def refuse_all_but(self, *names: str) -> None:
        """Refuse options but some, ``--store`` and ``--json``, of a command that shows a build."""
        self.refuse(
            set(self.given) - {"store", "as_json", *names},
            "has an effect only where catalogs are given by path",
            "Without them the command shows the current build of --store.",
        )

    def start(self) -> AbstractContextManager[Cluster]:
        """What runs the tasks of the step."""
        from sos_dask.cluster import start
        from sos_dask.machine import leave_pandas_out

        refuse_with_scheduler(self.scheduler, self.workers, self.memory_limit)
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
        """What runs the tasks of the step: threads where there are few cores.

        Raises
        ------
        ConfigError
            Both threads and workers are asked for.
        """
        from sos_dask.cluster import start
        from sos_dask.machine import leave_pandas_out, n_cores

        refuse_with_scheduler(self.scheduler, self.workers, self.memory_limit)
        is_free = self.workers is None and self.scheduler is None
        if self.threads is not None and not is_free:
            raise ConfigError(
                "--threads goes with neither --workers nor --scheduler",
                "Tasks run in threads of this process, in worker processes, or on a cluster.",
            )
        leave_pandas_out()
        few = n_cores() if is_free and n_cores() <= _FEW_CORES else None
        return start(self.workers, self.memory_limit, self.scheduler, self.threads or few)


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

"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

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
_MEMORY = typer.Option("--memory-limit", metavar="SIZE", help="Memory of each worker, like 4GiB.")
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
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIRECTORY", help="Directory that gets the output.")
]
OptionalOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIRECTORY",
        help="Directory that gets the output; with PAIRS.",
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


@dataclass(frozen=True)
class StepOptions:
    """Options of every command that runs one step: where it is done, over what, how it is told."""

    workers: Workers = None
    memory_limit: MemoryLimit = "auto"
    scheduler: Scheduler = None
    overwrite: Overwrite = False
    as_json: Json = False


def with_step_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each of `StepOptions`; it gets them as ``options``."""
    signature = inspect.signature(command, eval_str=True)
    names = [field.name for field in fields(StepOptions)]
    shared = inspect.signature(StepOptions, eval_str=True).parameters.values()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = StepOptions(**{name: given.pop(name) for name in names})
        command(**given, options=options)

    own = [item for item in signature.parameters.values() if item.name != "options"]
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in (*own, *shared)]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run

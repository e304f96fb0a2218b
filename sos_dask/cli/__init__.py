"""The command line: arguments in, documented functions called, text or JSON out. No logic."""

from __future__ import annotations

import gc
import os
import select
import sys
from typing import Annotated, Any

import typer

from sos_dask.run import LIGHT

# Read when NumPy and Arrow are loaded: products are small, and threads for them would wait in a
# loop for the next; memory that threads have freed is used again, not given back.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if set(sys.argv[1:2]) & set(LIGHT):
    os.environ.setdefault("MIMALLOC_PURGE_DELAY", "-1")

from sos_dask.cli import builds, cluster, steps, views
from sos_dask.cli.output import complain, prepare_streams, shown
from sos_dask.errors import understood

app = typer.Typer(
    name="sos-dask",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Put stellar spectroscopic surveys on one scale, out of core.\n\n"
    "Start with **sos-dask demo**, then write a job like jobs/real.toml and run "
    "**sos-dask rebuild JOB**.",
)
_DEBUG = "--debug"
_ABANDONED = 141  # exit code of a program whose output nobody reads, as shells give it
_GROUPS = {
    "Whole rebuilds": (
        *(steps.demo, steps.rebuild, builds.status, builds.builds, builds.diff),
        *(builds.publish, builds.rollback, builds.gc),
    ),
    "Single steps, in their order": (
        *(steps.simulate, steps.ingest, steps.attach, steps.dedupe),
        *(steps.reference, steps.crossmatch, steps.train, steps.apply, steps.unify),
        steps.export,
    ),
    "Look and check": (
        *(views.compare, views.trends, views.uncertainty, views.coverage),
        *(views.agreement, views.report, views.surveys, views.verify),
    ),
}
for _title, _commands in _GROUPS.items():
    for _command in _commands:
        app.command(rich_help_panel=_title)(_command)


_of_clusters = typer.Typer(no_args_is_help=True, help="What clusters need.")
_of_clusters.command()(cluster.certs)
app.add_typer(_of_clusters, name="cluster", rich_help_panel="Look and check")


def main() -> None:
    """Entry point: runs a command, turns errors into a message and an exit code."""
    gc.set_threshold(100_000)  # imports make many objects and no garbage
    debug = _DEBUG in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != _DEBUG]
    prepare_streams()
    try:
        for number, argument in enumerate(arguments, start=1):
            if not argument or (argument[:2] == "--" and argument[-1] == "="):
                raise typer.BadParameter(f"argument {number} is empty: is a shell variable unset?")
        try:
            code = app(arguments, standalone_mode=False)
        finally:
            _flush()
    except SystemExit as end:
        broken = end.__context__  # Typer ends without a word, whichever pipe it was
        if end.code == _ABANDONED or not isinstance(broken, BrokenPipeError):
            raise
        code = _ABANDONED if _nobody_reads() else _told(broken)
    except Exception as error:
        if debug:
            raise
        left = isinstance(error, BrokenPipeError) and _nobody_reads()
        code = _ABANDONED if left else _told(error)
    if code == 130:
        print("stopped; run the same command again to continue", file=sys.stderr)
    raise SystemExit(code)


def _told(error: Exception) -> int:
    """Print an error as a sentence; return its exit code."""
    usage: Any = error
    if hasattr(usage, "show"):  # a wrong command line; its class is private to typer
        usage.message = shown(usage.message)
        usage.show()
        return int(usage.exit_code)
    # Typer makes a stop of what a file ends with.
    known = understood(error.__cause__ or error if isinstance(error, typer.Abort) else error)
    if known is not None:
        complain(f"error: {shown(known.message)}", known.hint)
        return known.exit_code
    complain(
        f"unexpected error: {type(error).__name__}: {shown(str(error))}",
        f"Give {_DEBUG} to see where, and please report it.",
    )
    return 1


def _write_nowhere() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _nobody_reads() -> bool:
    """Check whether the reader of standard output went away; then nothing more is written."""
    poll = select.poll()
    poll.register(1, 0)
    gone = any(events & select.POLLERR for _, events in poll.poll(0))
    if gone:
        _write_nowhere()
    return gone


def _flush() -> None:
    """Write what is left; a reader that went away (``| head``) is no error."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _write_nowhere()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(_ABANDONED) from None
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        from sos_dask import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show tracebacks.")] = False,
) -> None:
    """Options of all commands."""

"""The command line: arguments in, documented functions called, text or JSON out. No logic."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

import typer

from sos_dask.cli import coverage, evidence, look, steps, store
from sos_dask.cli.options import DEBUG
from sos_dask.errors import SosError, StorageError

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
_GROUPS = {
    "Whole rebuilds": (store.demo, store.rebuild, store.status, store.gc),
    "Single steps, in their order": (
        steps.simulate,
        steps.ingest,
        coverage.attach,
        steps.dedupe,
        steps.reference,
        steps.crossmatch,
        steps.train,
        steps.apply,
    ),
    "Look and check": (
        evidence.compare,
        evidence.trends,
        look.uncertainty,
        coverage.coverage,
        look.report,
        look.surveys,
        look.verify,
    ),
}
for _title, _commands in _GROUPS.items():
    for _command in _commands:
        app.command(rich_help_panel=_title)(_command)


def main() -> None:
    """Entry point: runs a command, turns errors into a message and an exit code."""
    gc.set_threshold(100_000)  # imports make many objects and no garbage
    # Read when NumPy is loaded, which is later: products are small, and threads for them would wait
    # in a loop for the next.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    debug = DEBUG in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    try:
        try:
            app(arguments)
        finally:
            _flush()
    except SystemExit as end:
        if end.code == 130:
            print("stopped; run the same command again to go on", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            raise
        text, code = _explained(error)
        print(text, file=sys.stderr)
        raise SystemExit(code) from None


def _explained(error: Exception) -> tuple[str, int]:
    """What a user reads of an error, and the exit code."""
    if isinstance(error, SosError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        where = f" {error.filename}" if error.filename else ""
        return f"error: cannot read or write{where}: {error.strerror}", StorageError.exit_code
    return (
        f"unexpected error: {type(error).__name__}: {error}\n"
        f"  Say {DEBUG} to see where, and please report it.",
        1,
    )


def _flush() -> None:
    """Write what is left; a reader that went away (``| head``) is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks.")] = False,
) -> None:
    """Options of all commands."""

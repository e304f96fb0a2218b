"""What commands print: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from sos_dask.evidence.figures import Metric
    from sos_dask.rebuild.pipeline import Build
    from sos_dask.run.cluster import Report
    from sos_dask.storage.manifest import Manifest, Rows
    from sos_dask.storage.store import StageResult

LABEL_UNITS = {"teff": "K", "logg": "dex", "feh": "dex"}
_LOG_SECONDS = 10.0
_WIDE = 110  # columns of a terminal
_WIDTH = 120  # of a table that goes into a file
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode: control, format, half a character, line ends


def prepare_streams() -> None:
    """Let every character be written, whatever the locale is, and to streams that are closed."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def shown(text: str) -> str:
    """Escape what a terminal would obey instead of show: names and titles come from files."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(char) in _UNSEEN
        else char
        for char in text
    )


def complain(text: str, hint: str = "") -> None:
    """Print an error and what to do, each on a line of its own."""
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed
        print(text, *([f"  {shown(hint)}"] if hint else []), sep="\n", file=sys.stderr)


@contextlib.contextmanager
def reporting() -> Iterator[Report]:
    """Progress on stderr: bars in a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield _PlainReport()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks or (done == 0 and progress.tasks[tasks[step]].completed):
                tasks[step] = progress.add_task(shown(step), total=total)
            progress.update(tasks[step], completed=done, total=total)

        yield report


class _PlainReport:
    """One line when a step begins, one when it ends, and between at most one in ten seconds."""

    def __init__(self) -> None:
        self.said: dict[str, tuple[float, int, int]] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        at, before, of = self.said.get(step, (-math.inf, -1, total))
        now = time.monotonic()
        ended = done == total and (before, of) != (done, total)
        begun = step not in self.said or done < before  # steps of one name may follow each other
        if begun or ended or (done > before and now >= at + _LOG_SECONDS):
            self.said[step] = now, done, total
            print(f"{shown(step)}: {done}/{total}", file=sys.stderr, flush=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object; numbers that are not finite become null."""
    print(json.dumps(_plain(document), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> Console:
    """Console for text: as wide as the terminal; 120 columns in files, or COLUMNS."""
    from rich.console import Console

    is_free = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    made = Console(width=_WIDTH if is_free else None, highlight=False)
    # Its own answer to a reader that went away hides which pipe it was.
    vars(made)["on_broken_pipe"] = _reader_went_away
    return made


def digits_of(label: str) -> int:
    """Decimals with which a label is shown."""
    return 1 if label == "teff" else 4


def with_unit(label: str) -> str:
    """Name a label with its unit."""
    return f"{label} [{LABEL_UNITS[label]}]" if label in LABEL_UNITS else label


def is_wide() -> bool:
    """Tell whether the terminal has room for every interval; --json always has them."""
    return console().width >= _WIDE


def _reader_went_away() -> None:
    raise BrokenPipeError


def say(text: str) -> None:
    """Print lines of text as they are: brackets in names are no markup, long paths stay whole."""
    console().print(shown_lines(text), markup=False, emoji=False, soft_wrap=True)


def shown_lines(text: str) -> str:
    """Escape each line of a text, see `shown`."""
    return "\n".join(map(shown, text.split("\n")))


def show_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table under its title; a header that begins with ``>`` heads a column of numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, header in enumerate(headers):
        is_number = header.startswith(">")
        table.add_column(
            Text(shown_lines(header.removeprefix(">"))),
            justify="right" if is_number else "left",
            no_wrap=number == 0 or is_number,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(shown_lines(cell)) for cell in row))
    target = console()
    target.print(Text(shown_lines(title), "bold"))
    target.print(table)


def rows_document(rows: Rows) -> dict[str, Any]:
    """Account of rows of one step."""
    return {
        "in": rows.n_in,
        "out": rows.n_out,
        "rejected": rows.rejected,
        "dropped": dict(rows.dropped),
        "added": dict(rows.added),
    }


def show_step(manifest: Manifest | None, out: Path, as_json: bool) -> None:
    """Print the account of one step; without a manifest other processes have still to finish."""
    if manifest is None:
        if as_json:
            print_json({"complete": False, "path": out})
        else:
            say(f"{out}: other partitions are still missing")
        return
    rows = manifest.rows
    if as_json:
        print_json(
            {
                "complete": True,
                "path": out,
                "stage": manifest.recipe.stage,
                "rows": rows_document(rows),
                "summary": manifest.summary,
            }
        )
        return
    account = [f"{rows.n_in:,} rows in", f"{rows.n_out:,} out"]
    account += [f"{rows.rejected:,} rejected"] if rows.rejected else []
    account += _counts({**rows.dropped, **rows.added})
    say(f"{out}: {', '.join(account)}")


def _counts(reasons: Mapping[str, int]) -> list[str]:
    return [f"{count:,} {reason}" for reason, count in reasons.items() if count]


def show_stages(title: str, stages: Sequence[StageResult], with_reason: bool = True) -> None:
    """Print the account of rows of every stage, and why it ran."""
    rows = []
    for stage in stages:
        counts = [stage.rows.n_in, stage.rows.n_out, stage.rows.rejected]
        numbers = [f"{count:,}" for count in counts] if sum(counts) else ["", "", ""]
        others = _counts(stage.rows.dropped) + [f"+{text}" for text in _counts(stage.rows.added)]
        row = [stage.product, *numbers, ", ".join(others)]
        rows.append([*row, stage.why] if with_reason else row)
    headers = ["product", ">rows in", ">rows out", ">rejected", "dropped, +added"]
    show_table(title, [*headers, "why"] if with_reason else headers, rows)


def show_metrics(metrics: Sequence[Metric], chosen: str = "") -> None:
    """Print median and scatter of held-out pairs by label and method."""
    order = list(LABEL_UNITS)
    rows = []
    for metric in sorted(metrics, key=lambda m: (order.index(m.label), m.method, m.subset)):
        digits = 1 if metric.label == "teff" else 4
        rows.append(
            [
                f"{metric.label} [{LABEL_UNITS[metric.label]}]",
                metric.method + (" *" if metric.method == chosen else ""),
                f"{metric.n:,}",
                *(f"{x:+.{digits}f}" for x in (metric.median_before, metric.median_after)),
                *(f"{x:.{digits}f}" for x in (metric.scatter_before, metric.scatter_after)),
            ]
        )
    show_table(
        "Held-out pairs, target - reference: median and scatter (1.4826 MAD)",
        [
            "label",
            "method",
            ">pairs",
            ">median\nbefore",
            ">\nafter",
            ">scatter\nbefore",
            ">\nafter",
        ],
        rows,
    )
    if chosen:
        say("* the method that corrects the catalog")


def build_document(build: Build) -> dict[str, Any]:
    """A build as JSON values."""
    return {
        "build": build.name,
        "path": build.path,
        "chosen": build.chosen,
        "why": build.why,
        "stages": {
            stage.product: {"ran": stage.ran, "why": stage.why, **stage_document(stage)}
            for stage in build.stages
        },
        "metrics": [asdict(metric) for metric in build.metrics],
        "products": build.products,
    }


def stage_document(stage: StageResult) -> dict[str, Any]:
    """What a stage made, as JSON values."""
    return {
        "stage": stage.stage,
        "rows": {
            "in": stage.rows.n_in,
            "out": stage.rows.n_out,
            "rejected": stage.rows.rejected,
            "dropped": stage.rows.dropped,
            "added": stage.rows.added,
        },
        "path": stage.path,
        "summary": {key: value for key, value in stage.summary.items() if key != "metrics"},
    }


def show_build(build: Build) -> None:
    """Print a build: its stages, its metrics, and where the products are."""
    show_stages("Stages", build.stages)
    show_metrics(build.metrics, build.chosen)
    say(f"Chosen is {build.why}.")
    for stage in build.stages:
        for text in stage.summary.get("warnings", ()):
            say(f"Warning, {stage.product}: {text}")
    say(f"Products: {build.path.parent.parent / 'current'} (build {build.name})")
    if "report" in build.products:
        say(f"Report: {build.path.parent.parent / 'current' / 'report' / 'report.html'}")

"""What commands print: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sos_dask.errors import redacted
from sos_dask.evidence.figures import Metric
from sos_dask.rebuild.history import now
from sos_dask.run.cluster import Report
from sos_dask.storage.manifest import Manifest, Rows
from sos_dask.storage.store import StageResult

if TYPE_CHECKING:
    from sos_dask.rebuild.estimate import Estimate

Row = Mapping[str, Any]
LABEL_UNITS = {"teff": "K", "logg": "dex", "feh": "dex", "rv": "km/s"}
LOG_FORMATS = ("text", "json")
_LOG_SECONDS = 10.0
_WIDE = 110  # columns of a terminal
_WIDTH = 120  # of a table that goes into a file
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode: control, format, half a character, line ends


_as_lines: list[bool] = []  # where stderr is for programs


def prepare_streams() -> None:
    """Let every character be written, whatever the locale is, and to streams that are closed."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115
    _as_lines.clear()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def shown(text: str, kept: str = "") -> str:
    """Escape what a terminal would obey instead of show: names and titles come from files."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(char) in _UNSEEN and char not in kept
        else char
        for char in text
    )


def complain(text: str, hint: str = "") -> None:
    """Print an error and what to do, each on a line of its own, or as a line of JSON."""
    text, hint = redacted(text), redacted(hint)
    if _as_lines:
        print_event("error", message=text.removeprefix("error: "), hint=hint)
        return
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed
        print(text, *([f"  {shown(hint)}"] if hint else []), sep="\n", file=sys.stderr)


def print_line(line: str) -> None:
    """Print a line on stderr."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def print_event(name: str, **facts: Any) -> None:
    """Print an event on stderr as a line of JSON with its time."""
    print_line(redacted(json.dumps({"time": now(), "event": name, **facts}, default=str)))


class _Lines(logging.Handler):
    """Prints warnings as lines of JSON."""

    def emit(self, record: logging.LogRecord) -> None:
        print_event(record.levelname.lower(), message=record.getMessage())


@contextlib.contextmanager
def reporting(log_format: str = "text") -> Iterator[Report]:
    """Progress on stderr: bars in a terminal, plain lines elsewhere, or lines of JSON."""
    if log_format == "json":
        _as_lines.append(True)
        handler, logger = _Lines(), logging.getLogger("sos_dask")
        logger.addHandler(handler)
        try:
            yield _plain_report(lambda step, n, of: print_event("step", step=step, done=n, of=of))
        finally:
            logger.removeHandler(handler)
        return
    if not sys.stderr.isatty():
        yield _plain_report()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description:28}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks or (done == 0 and progress.tasks[tasks[step]].completed):
                tasks[step] = progress.add_task(shown(step), total=total)
            progress.update(tasks[step], completed=done, total=total)

        yield report


def _print_step(step: str, done: int, total: int) -> None:
    print(f"{shown(step)}: {done}/{total}", file=sys.stderr, flush=True)


def _plain_report(write: Report = _print_step) -> Report:
    """One line when a step begins, one when it ends, and between at most one in ten seconds."""
    said: dict[str, tuple[float, int, int]] = {}

    def report(step: str, done: int, total: int) -> None:
        at, before, of = said.get(step, (-math.inf, -1, total))
        now = time.monotonic()
        ended = done == total and (before, of) != (done, total)
        begun = step not in said or done < before  # steps of one name may follow each other
        if begun or ended or (done > before and now >= at + _LOG_SECONDS):
            said[step] = now, done, total
            write(step, done, total)

    return report


def show_estimate(found: Estimate) -> None:
    """Print on stderr what a rebuild will take."""
    print_line(f"This run: {found.in_words}")


def print_json(document: Row) -> None:
    """Print one JSON object; numbers that are not finite become null, dataclasses objects."""
    print(json.dumps(_plain(document), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _console() -> Any:
    """Console for text: as wide as the terminal; 120 columns in files, or COLUMNS."""
    from rich.console import Console

    is_free = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    made = Console(width=_WIDTH if is_free else None, highlight=False)
    # Its own answer to a reader that went away hides which pipe it was.
    vars(made)["on_broken_pipe"] = _reader_went_away
    return made


def _reader_went_away() -> None:
    raise BrokenPipeError


def is_wide() -> bool:
    """Tell whether the terminal has room for every interval; --json always has them."""
    return bool(_console().width >= _WIDE)


def say(text: str, wrap: bool = False) -> None:
    """Print lines as they are: brackets in names are no markup; long paths stay whole."""
    _console().print(shown(text, kept="\n"), markup=False, emoji=False, soft_wrap=not wrap)


def show_table(title: str, columns: str, rows: Iterable[Row]) -> None:
    """Print a table under its title.

    ``columns`` are words ``key:format=header``, of which the last two may be missing; ``_`` in a
    header is a space. Default format: the decimals of the row's label, with a sign for ``+``, and
    on the next line the interval ``key_low, key_high``, for ``?`` only in a wide terminal. A value
    may be a row itself, whose ``value`` is shown with ``low`` and ``high``. Columns without a
    letter are of numbers.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    words = [word.partition("=") for word in columns.split()]
    parts = [word.partition(":") for word, _, _ in words]
    cells = [[_cell(row, key, form) for key, _, form in parts] for row in rows]
    for place, (word, _, header) in enumerate(words):
        firsts = "".join(line[place].partition("\n")[0] for line in cells)
        is_number = firsts.upper() == firsts.lower()
        header = header or word.partition(":")[0]
        header = header.replace("_", "\n" if is_number and len(header) > 9 else " ", 1)
        table.add_column(
            Text(shown(header.replace("_", " "), "\n")),
            justify="right" if is_number else "left",
            no_wrap=place == 0 or is_number,
            overflow="fold",
        )
    for line in cells:
        table.add_row(*(Text(shown(cell, "\n")) for cell in line))
    target = _console()
    target.print(Text(shown(title, "\n"), "bold"))
    target.print(table)


def _cell(row: Row, key: str, form: str) -> str:
    """Text of a cell; a dash where there is no value."""
    value, prefix = row.get(key), f"{key}_"
    if isinstance(value, Mapping):
        row, value, prefix = value, value["value"], ""
    if value is None:
        return "-"
    if not isinstance(value, float):
        text = f"{value:,}" if isinstance(value, int) else str(value)
        return with_unit(text) if key == "label" else text
    digits = digits_of(row.get("label", ""))
    spec = {"": f".{digits}f", "?": f".{digits}f", "+": f"+.{digits}f"}.get(form, form)
    text = f"{value:{spec}}".removesuffix("%") + " +" * ((row.get("behind_low") or 0) > 0)
    low, high = (row.get(f"{prefix}{end}") for end in ("low", "high"))
    if low is None or (form == "?" and not is_wide()):
        return text
    interval = f"{low:{spec}}, {high:{spec}}"
    if not is_wide() and spec.endswith(".4f"):
        interval = interval.replace("-0.", "-.").replace(" 0.", " .").removeprefix("0")
    return f"{text}\n{interval}"


def with_unit(label: str) -> str:
    """Name a label with its unit."""
    return f"{label} [{LABEL_UNITS[label]}]" if label in LABEL_UNITS else label


def digits_of(label: str) -> int:
    """Decimals with which a label is shown."""
    return {"teff": 1, "rv": 3}.get(label, 4)


def number(value: float | None, label: str, sign: str = "") -> str:
    """Write a value with the decimals of its label."""
    return "-" if value is None else f"{value:{sign}.{digits_of(label)}f}"


def stage_document(stage: StageResult) -> Row:
    """What a stage made, as JSON values."""
    summary = {key: value for key, value in stage.summary.items() if key != "metrics"}
    made = {"stage": stage.stage, "rows": _account(stage.rows)}
    return {**made, "path": stage.path, "summary": summary}


def _account(rows: Rows) -> Row:
    more = {key: getattr(rows, key) for key in ("rejected", "dropped", "added")}
    return {"in": rows.n_in, "out": rows.n_out, **more}


def show_step(manifest: Manifest | None, out: Path, as_json: bool) -> None:
    """Print the account of one step; without a manifest other processes have still to finish."""
    document: dict[str, Any] = {"complete": manifest is not None, "path": out}
    text = "other partitions are still missing"
    if manifest is not None:
        rows = manifest.rows
        document |= {"stage": manifest.recipe.stage, "summary": manifest.summary}
        document["rows"] = _account(rows)
        reasons = _reasons({"rejected": rows.rejected, **rows.dropped, **rows.added})
        text = ", ".join([f"{rows.n_in:,} rows in", f"{rows.n_out:,} out", *reasons])
    if as_json:
        print_json(document)
    else:
        say(f"{out}: {text}")


def _reasons(counts: Mapping[str, int], sign: str = "") -> list[str]:
    return [f"{sign}{count:,} {reason}" for reason, count in counts.items() if count]


def show_stages(title: str, stages: Iterable[StageResult], more: str = "") -> None:
    """Print the account of rows of every stage, and further columns."""
    rows = []
    for stage in stages:
        row = {**vars(stage.rows), **vars(stage)}
        if not (stage.rows.n_in or stage.rows.n_out):
            row |= dict.fromkeys(("n_in", "n_out", "rejected"), "")
        row["others"] = ", ".join(_reasons(row["dropped"]) + _reasons(row["added"], "+"))
        rows.append(row)
    show_table(
        title, f"product n_in=rows_in n_out=rows_out rejected others=dropped,_+added {more}", rows
    )


def show_metrics(metrics: Iterable[Metric], chosen: str = "") -> None:
    """Print median and scatter of held-out pairs by label and method."""
    metrics = list(metrics)
    order = list(dict.fromkeys([*LABEL_UNITS, *(m.label for m in metrics)]))
    rows = sorted(metrics, key=lambda m: (order.index(m.label), m.method, m.subset))
    show_table(
        "Held-out pairs, target - reference: median and scatter (1.4826 MAD)",
        "label method n=pairs median_before:+ median_after:+ scatter_before scatter_after",
        [{**vars(m), "method": m.method + " *" * (m.method == chosen)} for m in rows],
    )
    if chosen:
        say("* the method that corrects the catalog")

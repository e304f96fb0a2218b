"""Results: ``bench.json`` grows with every comparison, ``bench.md`` is made from it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from sos_dask.errors import ConfigError
from tests.bench.measure import GIB, INTERVAL_S, Usage, table

_KEY = ("step", "variant", "rows", "peer")


class Book:
    """The results in a folder; an entry of the same step, variant, rows and peer is replaced.

    Parameters
    ----------
    folder : Path
        Gets ``bench.json`` and ``bench.md``, both written anew at every entry.

    Raises
    ------
    ConfigError
        The ``bench.json`` that is there is not of this version: no table can be made of it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bench.json"
        self.entries = _earlier(self.path)

    def add(
        self,
        step: str,
        variant: str,
        rows: int,
        ours: Usage,
        peer: str = "",
        theirs: Usage | None = None,
        **facts: Any,
    ) -> None:
        """Keep one comparison, or our side alone.

        Parameters
        ----------
        facts
            What else is worth knowing: whether both found the same, counts, bytes.
        """
        entry = {
            "step": step,
            "variant": variant,
            "rows": rows,
            "ours": usage_to_json(ours),
            "peer": peer or None,
            "theirs": None if theirs is None else usage_to_json(theirs),
            "ratio_cpu": _ratio(ours, theirs, "cpu_s"),
            "ratio_wall": _ratio(ours, theirs, "wall_s"),
            **facts,
        }
        key = [entry[name] for name in _KEY]
        others = [old for old in self.entries if [old[name] for name in _KEY] != key]
        self.entries = [*others, entry]
        _replace(self.path, json.dumps(self.entries, indent=1) + "\n")
        _replace(self.path.with_suffix(".md"), markdown(self.entries))
        print(_line(entry), flush=True)


def _earlier(path: Path) -> list[dict[str, Any]]:
    """Entries of the runs before."""
    if not path.is_file():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text())
        markdown(entries)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path} is not of this version of the benchmarks ({type(error).__name__}: {error})",
            "Move it away, or choose another folder.",
        ) from None
    return entries


def usage_to_json(usage: Usage) -> dict[str, Any]:
    """A `Usage` with rounded numbers."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 3)
        if isinstance(value, dict):
            return {name: rounded(item) for name, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, tuple | list) else value

    return {name: rounded(value) for name, value in asdict(usage).items()}


def _ratio(ours: Usage, theirs: Usage | None, name: str) -> float | None:
    """How many times more they took; None where that means nothing."""
    if theirs is None or "failed" in (ours.state, theirs.state):
        return None
    ratio: float = getattr(theirs, name) / max(getattr(ours, name), 1e-9)
    return round(ratio, 2)


def _replace(path: Path, text: str) -> None:
    hidden = path.with_name(f".{path.name}.tmp")
    hidden.write_text(text)
    hidden.replace(path)


def _line(entry: dict[str, Any]) -> str:
    """One line for the terminal."""
    ours, theirs = entry["ours"], entry["theirs"]
    name = entry["step"] + (f" ({entry['variant']})" if entry["variant"] else "")
    text = f"{name}: {_amounts(ours)}"
    if theirs is not None:
        text += f"; {entry['peer']}: {_amounts(theirs)}"
        if entry["ratio_cpu"] is not None:
            bound = " at least" if theirs["state"] == "stopped" else ""
            text += f"; ratio{bound} {entry['ratio_cpu']} CPU, {entry['ratio_wall']} wall"
    facts = [f"{k} {v}" for k, v in entry.items() if k in _facts(entry)]
    return text + (f" [{', '.join(facts)}]" if facts else "")


def _amounts(usage: dict[str, Any]) -> str:
    state = "" if usage["state"] == "done" else f" {usage['state'].upper()}"
    return (
        f"{usage['wall_s']:.1f} s wall, {usage['cpu_s']:.1f} CPU-s, {usage['rss_gib']:.2f} GiB"
        + state
    )


def _facts(entry: dict[str, Any]) -> list[str]:
    known = {"step", "variant", "rows", "ours", "peer", "theirs", "ratio_cpu", "ratio_wall"}
    return [name for name in entry if name not in known]


def markdown(entries: list[dict[str, Any]]) -> str:
    """Tables for people: one of all comparisons, one of the parts of our steps."""
    return "\n".join(_markdown(entries)) + "\n"


def _markdown(entries: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{machine()}. {versions()}."
    yield ""
    yield (
        "CPU-s: user and system time of the whole process tree. RSS: largest sum of the resident "
        f"memory of its processes, sampled every {INTERVAL_S:g} s. Ratios: theirs / ours; `>`: the "
        "peer was stopped at the limit of time. A wall time in parentheses: other programs used "
        "more than a tenth of the machine meanwhile."
    )
    yield ""
    yield from table(
        "step, >rows, program, >wall s, >CPU-s, >RSS GiB, >ratio CPU, >ratio wall, result",
        [_comparison(entry) for entry in sorted(entries, key=_place)],
    )
    yield ""
    yield "Where our steps spend it; the first part is what comes before the first task."
    yield ""
    yield from table(
        "step, >rows, part, >tasks, >wall s, >CPU-s, >RSS GiB, >driver GiB, >largest worker GiB",
        [row for entry in sorted(entries, key=_place) for row in _parts(entry)],
    )


def _name(entry: dict[str, Any]) -> str:
    return entry["step"] + (f", {entry['variant']}" if entry["variant"] else "")


def _comparison(entry: dict[str, Any]) -> list[str]:
    facts = [f"{fact.replace('_', ' ')} {_value(entry[fact])}" for fact in _facts(entry)]
    if entry["theirs"] is None:
        first = [_name(entry), f"{entry['rows']:,}", "**sos-dask**", *_cells(entry["ours"]), "", ""]
    else:
        bound = ">" if entry["theirs"]["state"] == "stopped" else ""
        ratios = (entry["ratio_cpu"], entry["ratio_wall"])
        cells = ["" if ratio is None else f"{bound}{ratio:.1f}" for ratio in ratios]
        first = ["", "", entry["peer"], *_cells(entry["theirs"]), *cells]
    return [*first, ", ".join(facts)]


def _parts(entry: dict[str, Any]) -> Iterator[list[str]]:
    if entry["theirs"] is not None or entry["step"] == "memory":  # the same as of rebuild
        return
    for number, part in enumerate(entry["ours"]["parts"]):
        first = ["", ""] if number else [_name(entry), f"{entry['rows']:,}"]
        used = [f"{part[name]:.1f}" for name in ("wall_s", "cpu_s")]
        used += [f"{part[name]:.2f}" for name in ("rss_gib", "driver_gib", "worker_gib")]
        yield [*first, part["name"], str(part["tasks"] or ""), *used]


def _place(entry: dict[str, Any]) -> tuple[Any, ...]:
    from tests.bench.steps import STEPS

    names = list(STEPS)
    place = names.index(entry["step"]) if entry["step"] in names else len(names)
    return place, entry["rows"], entry["variant"], entry["theirs"] is not None


def _cells(usage: dict[str, Any]) -> list[str]:
    busy = usage["other_cpu_s"] > 0.1 * usage["wall_s"] * (os.cpu_count() or 1)
    wall = f"({usage['wall_s']:.1f})" if busy else f"{usage['wall_s']:.1f}"
    wall = {"stopped": f"stopped after {usage['wall_s']:.0f}", "failed": "failed"}.get(
        usage["state"], wall
    )
    return [wall, f"{usage['cpu_s']:.1f}", f"{usage['rss_gib']:.2f}"]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> str:
    """The machine in words."""
    memory = psutil.virtual_memory().total / GIB
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} ({platform.machine()})"


def versions() -> str:
    """Python and the packages that do the work, with their versions."""
    names = (
        "sos_dask",
        "pyarrow",
        "numpy",
        "xgboost",
        "dask",
        "lsdb",
        "hats-import",
        "scipy",
        "polars",
    )
    found = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except ImportError:
            continue
    return ", ".join(found)

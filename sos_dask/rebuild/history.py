"""What happened in a store: builds and which of them counts, and the log of every run."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sos_dask.errors import CatalogError, SosError, redacted
from sos_dask.rebuild.lock import holder_of
from sos_dask.storage import store as stores
from sos_dask.storage.artifact import write_text
from sos_dask.storage.manifest import MANIFEST, sealed_json

logger = logging.getLogger(__name__)
_LOGS, _KEPT_LOGS = "logs", 100
FAILED = ("failed", "refused", "killed")


def now() -> str:
    """Write the present time as ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


# -- builds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildInfo:
    """One build of a store.

    ``state``: ``current``, ``refused`` by the gate, ``withdrawn`` by a rollback, ``kept`` or
    ``damaged``; ``reasons`` for that, in words.
    """

    name: str
    utc: str
    job: str
    state: str
    reasons: tuple[str, ...] = ()


def builds(store: Path) -> list[BuildInfo]:
    """List the builds of a store, the oldest first."""
    stores.require_store(store, built=False)
    current, found = (store / "current").resolve().name, []
    for path in stores.builds_in(store):
        try:
            made = stores.read_build(path)
        except CatalogError as error:
            found.append(BuildInfo(path.name, "", "", "damaged", (error.message,)))
            continue
        state, reasons = "kept", made.get("refused", ())
        if path.name == current:
            state, reasons = "current", ()
        elif "withdrawn" in made:
            state, reasons = "withdrawn", [made["withdrawn"]]
        elif reasons:
            state = "refused"
        found.append(BuildInfo(path.name, made["utc"], made["job"], state, tuple(reasons)))
    return found


def find_build(store: Path, name: str) -> Path:
    """Find a build by its name, the beginning of it, or ``current``.

    Raises `CatalogError` where there is none, or several.
    """
    names = [one.name for one in builds(store)]
    if name == "current":
        stores.require_store(store)
        return (store / "current").resolve()
    fits = [one for one in names if name and one.startswith(name)]
    if len(fits) != 1:
        what = f"{len(fits)} builds of {store} begin" if fits else f"no build of {store} begins"
        hint = f"Builds: current, {', '.join(names[-5:])}." if names else "Run a rebuild first."
        raise CatalogError(f"{what} with '{name}'", hint)
    return store / "builds" / fits[0]


def unpublished(store: Path, fingerprints: Mapping[str, str]) -> tuple[Path | None, str]:
    """Find a build of these products that was refused or withdrawn, and why it is withdrawn."""
    for one in reversed(builds(store)):
        path = store / "builds" / one.name
        if one.state in ("refused", "withdrawn"):
            made = stores.read_build(path)
            if made["products"] == fingerprints:
                return path, str(made.get("withdrawn", ""))
    return None, ""


def publish_build(store: Path, name: str = "") -> Path:
    """Let ``current`` name a build, though the gate refused it; by default the last one refused.

    Raises `CatalogError` where there is none, or one of its products is gone.
    """
    if not name:
        refused = [one.name for one in builds(store) if one.state == "refused"]
        if not refused:
            raise CatalogError(f"no build of {store} was refused", "Give the name of a build.")
        name = refused[-1]
    path = find_build(store, name)
    made = stores.read_build(path)
    for product, stage in made["stages"].items():
        stores.check_product(product, stage, (path / product).resolve(), "size")
    reasons = [made.pop(name, None) for name in ("refused", "withdrawn")]
    if any(reasons):
        _write(path, {**made, "accepted": now()})
    stores.make_current(store, path)
    return path


def rollback(store: Path, name: str = "") -> Path:
    """Let ``current`` name an earlier build, by default the one that was published before it.

    What it leaves is withdrawn: a rebuild that makes the same products again does not publish them.
    """
    stores.require_store(store)
    left = (store / "current").resolve()
    if not name:
        before = [one.name for one in builds(store) if one.state == "kept" and one.name < left.name]
        if not before:
            raise CatalogError(f"{store} has no earlier build than {left.name}", "gc removes them.")
        name = before[-1]
    path = find_build(store, name)
    if path.name == left.name:
        raise CatalogError(f"{name} is the current build already", "sos-dask builds lists them.")
    publish_build(store, path.name)
    why = f"it was withdrawn by a rollback at {now()}"
    _write(left, {**stores.read_build(left), "withdrawn": why})
    return path


def _write(build: Path, document: Mapping[str, Any]) -> None:
    write_text(build / stores.BUILD_FILE, sealed_json(document, sort_keys=False))


def products_of(build: Path) -> dict[str, Path]:
    """Directories of the manifests of a build's products."""
    stages = stores.read_build(build)["stages"].items()
    return {product: stores.home(stage, (build / product).resolve()) for product, stage in stages}


def current_products(store: Path) -> dict[str, Path]:
    """Products of the published build that are whole enough to be compared with; none without."""
    current, artifacts = store / "current", (store / "artifacts").resolve()
    try:
        found = products_of(current)
    except CatalogError:  # its links, where it has any, still tell what was published
        linked = [(one.name, one.resolve()) for one in sorted(current.glob("*"))]
        linked = [(name, path) for name, path in linked if path.parent.parent == artifacts]
        found = {name: stores.home(path.parent.name, path) for name, path in linked}
    return {product: path for product, path in found.items() if (path / MANIFEST).is_file()}


# -- the log of a run -----------------------------------------------------------------------------


class RunLog:
    """Log of one run: a file of JSON lines in the store, each with its time.

    ``echo`` gets each line, too. It never fails a run: what cannot be written is a warning.
    """

    def __init__(self, store: Path, echo: Callable[[str], None] | None = None) -> None:
        stamp = now().translate(str.maketrans("", "", "-:"))
        self.path = store / _LOGS / f"{stamp}-{os.getpid()}.jsonl"
        self.echo = echo
        self._lines: list[str] = []

    def event(self, name: str, **facts: Any) -> None:
        """Write an event and its facts, without secrets."""
        document = {"time": now(), "event": name, **facts}
        line = redacted(json.dumps(document, default=str))
        self._lines.append(line)
        if self.echo is not None:
            self.echo(line)
        try:
            write_text(self.path, "\n".join(self._lines) + "\n")
            if len(self._lines) == 1:
                for old in sorted(self.path.parent.glob("*.jsonl"))[:-_KEPT_LOGS]:
                    old.unlink(missing_ok=True)
        except (OSError, SosError) as error:
            logger.warning("the log %s cannot be written: %s", self.path, error)


def runs(store: Path) -> Iterator[dict[str, Any]]:
    """Read how each run began and ended, the latest first; a running one is left out.

    ``outcome``: ``published``, ``unchanged``, ``refused``, ``failed``, ``interrupted`` (Ctrl-C) or
    ``killed``.
    """
    busy = holder_of(store)
    for path in sorted((store / _LOGS).glob("*.jsonl"), reverse=True):
        try:
            events = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            first, last = events[0], events[-1]
        except (OSError, ValueError, IndexError):
            continue
        last = next((one for one in reversed(events) if one["event"] == "end"), last)
        ended = last["event"] == "end"
        is_holder = busy and (first["host"], first["pid"]) == (busy.host, busy.pid)
        if not ended and (is_holder or _runs_here(first)):
            continue
        begun = {"began": first["time"], "job": first["job"], "log": str(path)}
        stage = next((one["product"] for one in reversed(events) if "product" in one), "")
        died = {"outcome": "killed", "message": f"it did not end; its last stage was '{stage}'"}
        yield begun | (last if ended else {**died, "time": last["time"]})


def _runs_here(first: Mapping[str, Any]) -> bool:
    """Whether the process that began a log runs on this host: one without the lock."""
    with contextlib.suppress(psutil.Error):
        began = datetime.datetime.fromisoformat(first["time"]).timestamp()
        is_here = first["host"] == socket.gethostname()
        return bool(is_here and psutil.Process(first["pid"]).create_time() <= began)
    return False


def last_runs(store: Path) -> dict[str, Any]:
    """Find the last run, the last that failed, and what runs now; None where there is none."""
    all_runs = list(runs(store))
    failed = next((one for one in all_runs if one["outcome"] in FAILED), None)
    busy = holder_of(store)
    last = next(iter(all_runs), None)
    running = busy and {**vars(busy), "words": busy.words}
    return {"last_run": last, "last_failure": failed, "running": running}

"""Commands on the builds of a store: which there are, how they differ, which one counts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer

from sos_dask.cli.options import Place, Shown, command, find_store
from sos_dask.cli.output import (
    Row,
    number,
    print_line,
    say,
    show_stages,
    show_table,
    shown,
    stage_document,
    with_unit,
)
from sos_dask.rebuild import history
from sos_dask.rebuild.gate import label_shifts
from sos_dask.rebuild.lock import locked
from sos_dask.storage import store as stores
from sos_dask.storage.manifest import Manifest

_MIB = 2**20


@command()
def status(job: Place = None, *, store: Place = None) -> Shown:
    """Show the current build of a store, its last runs, what runs now, and space.

    Example: sos-dask status jobs/real.toml
    """
    where = find_store(store, job)
    found = stores.status(where)
    told = history.last_runs(where)
    made = stores.read_build(where / "current")["utc"] if found.current else ""
    products = {one.product: stage_document(one) for one in found.products}
    kept = {name: value for name, value in vars(found).items() if name != "products"}
    yield {**kept, "utc": made, **told, "products": products}
    say(f"Current build: {found.current or 'none'} (of {len(found.builds)})")
    for title, name in (("Last run", "last_run"), ("Last failure", "last_failure")):
        if one := told[name]:
            text = f": {one['message']}" if "message" in one else ""
            say(f"{title}: {one['time']}, {one['outcome']}{text} (log {one['log']})")
    if one := told["running"]:
        say(f"Running: {one['words']}")
    if found.products:
        show_stages("Products", found.products)
    for title, texts in (("Missing", found.missing), ("Unfinished", found.unfinished)):
        for text in texts:
            say(f"{title}: {text}")
    say(
        f"Space: {found.bytes / _MIB:,.1f} MiB, "
        f"of which no build uses {found.unused_bytes / _MIB:,.1f} MiB"
    )


@command()
def builds(job: Place = None, *, store: Place = None) -> Shown:
    """List the builds of a store: when each was made, which is current, why one was refused.

    Example: sos-dask builds --store store
    """
    found = history.builds(find_store(store, job))
    yield {"builds": found}
    show_table("Builds", "name utc=made job state", [vars(one) for one in found])
    for one in found:
        for text in one.reasons:
            say(f"{one.name} {one.state}: {text}")


@command()
def diff(before: str, after: str, *, store: Place = None) -> Shown:
    """Compare two builds: rows of the products, shifts of corrected labels, settings.

    Example: sos-dask diff current 20261128T2 --store store
    """
    from sos_dask.rebuild.plan import differences

    where = find_store(store)
    old, new = (history.products_of(history.find_build(where, one)) for one in (before, after))
    both = {name: [_made(one, name) for one in (old, new)] for name in {**old, **new}}
    rows = [
        {"product": name, "before": _rows(was), "after": _rows(now), "same": was == now}
        for name, (was, now) in both.items()
    ]
    settings = {
        name: found
        for name, (was, now) in both.items()
        if was and now and (found := differences(was.recipe.params, now.recipe.params))
    }
    shifts = list(label_shifts(old, new))
    yield {"rows": rows, "shifts": shifts, "settings": settings}
    words = {True: "yes", False: "no"}
    table = [{**one, "same": words[bool(one["same"])]} for one in rows]
    show_table("Rows out of each product", "product before after same", table)
    show_table(
        "Corrected labels, after - before, of rows in both builds",
        "product name=label n=rows median p16=16_% p84=84_%",
        [_shift_row(one) for one in shifts],
    )
    for name, texts in settings.items():
        say(f"{name}: {'; '.join(texts)}")


def _made(products: Mapping[str, Path], name: str) -> Manifest | None:
    return Manifest.load(products[name]) if name in products else None


def _rows(made: Manifest | None) -> int | None:
    return None if made is None else made.rows.n_out


def _shift_row(shift: Row) -> dict[str, Any]:
    label = shift["label"]
    texts = {x: number(shift[x], label, "+") for x in ("median", "p16", "p84")}
    return {**shift, **texts, "name": with_unit(label)}


@command()
def publish(build: str | None = None, *, store: Place = None) -> Shown:
    """Let a build be the current one though the gate refused it; by default the last one refused.

    Example: sos-dask publish 20261128T223535 --store store
    """
    yield from _moved("publish", history.publish_build, find_store(store), build)


@command()
def rollback(build: str | None = None, *, store: Place = None) -> Shown:
    """Go back to an earlier build, by default the one before the current one.

    The build that is left is not published again by a rebuild, until sos-dask publish does.

    Example: sos-dask rollback --store store
    """
    yield from _moved("rollback", history.rollback, find_store(store), build)


def _moved(what: str, move: Callable[[Path, str], Path], store: Path, build: str | None) -> Shown:
    with locked(store, what):
        path = move(store, build or "")
    yield {"current": path.name}
    say(f"Current build: {path.name}")


@command()
def gc(
    job: Place = None, *, store: Place = None, keep: int = 3, dry_run: bool = False,
    yes: bool = False,
) -> Shown:  # fmt: skip
    """Remove old builds and outputs that no kept build uses; the current one always stays.

    On a terminal it asks first.

    Example: sos-dask gc --store store --keep 3 --yes
    """
    where = find_store(store, job)
    stores.require_store(where, built=False)
    if sys.stdin.isatty() and not (yes or dry_run):
        doomed = stores.gc(where, keep=keep, dry_run=True)
        n_bytes = sum(size for _, size in doomed)
        for path, _ in doomed:
            print_line(shown(str(path)))
        asked = f"Remove these {len(doomed)} items, {n_bytes / _MIB:.1f} MiB?"
        if doomed and not typer.confirm(asked, err=True):
            yield {"dry_run": False, "removed": []}
            return
    with nullcontext() if dry_run else locked(where, "gc"):
        removed = stores.gc(where, keep=keep, dry_run=dry_run)
    yield {"dry_run": dry_run, "removed": [{"path": path, "bytes": n} for path, n in removed]}
    for path, size in removed:
        say(f"{'would remove' if dry_run else 'removed'} {path} ({size / _MIB:.1f} MiB)")
    say(f"{len(removed)} items, {sum(size for _, size in removed) / _MIB:.1f} MiB")

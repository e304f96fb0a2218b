"""Parts of an output that are taken over from an earlier one, because they would be the same.

What a part reads of catalogs is traced while it runs: partitions, and sky where it finds none.
That, its record and the SHA-256 of its files are remembered beside the artifacts::

    parts/<fingerprint>.json      of each part of an output
    parts/<fingerprint>/          intermediate files, which the output itself does not keep

A part of a later output of the same stage, settings and version is not run where it would read just
the same; so the bytes are those of a run from nothing. A memory that is lost costs time alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from sos_dask.errors import CatalogError
from sos_dask.storage.artifact import Output, put_copy, write_text
from sos_dask.storage.manifest import FileRecord, read_sealed, sealed_json, sha256_of_file

FOLDER = "parts"
_trace = threading.local()


@dataclass
class Reads:
    """What was read of catalogs, by their path: files of partitions, and ranges without any."""

    files: dict[Path, set[str]] = field(default_factory=dict)
    empty: dict[Path, set[tuple[int, int]]] = field(default_factory=dict)


@contextlib.contextmanager
def traced() -> Iterator[Reads]:
    """Trace what this thread reads of catalogs."""
    _trace.reads = reads = Reads()
    try:
        yield reads
    finally:
        del _trace.reads


def note(path: Path, *files: str) -> None:
    """Trace that partitions were read, or found."""
    if hasattr(_trace, "reads"):
        _trace.reads.files.setdefault(path, set()).update(files)


def note_empty(
    path: Path, ranges: Iterable[tuple[int, int]], found: Sequence[tuple[int, int]]
) -> None:
    """Trace where no partition was found: the ranges less those that were, both ascending."""
    if not hasattr(_trace, "reads"):
        return
    empty, at = _trace.reads.empty.setdefault(path, set()), 0
    for low, high in ranges:
        while at < len(found) and found[at][1] <= low:
            at += 1
        place = at
        while place < len(found) and found[place][0] < high:
            if low < found[place][0]:
                empty.add((low, found[place][0]))
            low = max(low, found[place][1])
            place += 1
        if low < high:
            empty.add((low, high))


@dataclass(frozen=True)
class Former:
    """Where parts of an earlier output are remembered, and those of a new one will be.

    ``directory``: the earlier output, which may be none.
    """

    store: Path
    directory: Path | None = None

    def _memory(self, fingerprint: str) -> Path:
        return self.store / FOLDER / fingerprint

    @cached_property
    def _known(self) -> dict[str, Any]:
        with contextlib.suppress(CatalogError, OSError):
            name = self.directory.name if self.directory else "none"
            return read_sealed(self._memory(name).with_suffix(".json"), "")
        return {}

    def parts(self, base: str) -> dict[str, dict[str, Any]]:
        """Read what is remembered of parts with the same base, by kind and key."""
        return dict(self._known["parts"]) if self._known.get("base") == base else {}

    def take(self, output: Output, part: str, known: Mapping[str, Any]) -> bool:
        """Put the files of a part in place and record it; false where one is not as it was."""
        kind, _, key = part.partition("/")
        found = []
        for name, digest in known["pieces"].items():
            inside = PurePosixPath(name)
            if self.directory is None or inside.is_absolute() or ".." in inside.parts:
                return False
            is_kept = inside.parts[0] != output.work.name
            source = (self.directory if is_kept else self._memory(self.directory.name)) / name
            try:
                if sha256_of_file(source) != digest:
                    return False
            except OSError:
                return False
            found.append((source, output.directory / name))
        for source, target in found:
            put_copy(source, target)
        output.put_record(kind, key, known["value"], known["reads"])
        return True

    def remember(
        self, output: Output, base: str, kinds: Iterable[str], files: Iterable[FileRecord]
    ) -> None:
        """Remember the parts of an output that is about to be complete, whose files are known."""
        written = {file.path: file.sha256 for file in files}
        found, memory = {}, self._memory(output.fingerprint)
        for path in (path for kind in kinds for path in (output.work / kind).glob("*.json")):
            record = read_sealed(path, "")
            if record["reads"] is None:  # of a catalog without digests
                continue
            if not output.intact(*record["part"].split("/", 1)):  # damaged since: run it again
                continue
            for name in record["pieces"]:
                path = output.directory / name
                record["pieces"][name] = written.get(name) or sha256_of_file(path)
                if PurePosixPath(name).parts[0] == output.work.name:
                    put_copy(path, memory / name)
            found[record.pop("part")] = record
        document = sealed_json({"base": base, "parts": found})
        write_text(memory.with_suffix(".json"), document)


def forgotten(store: Path, kept: Iterable[str]) -> list[Path]:
    """List what is remembered of the parts of other outputs than those of these fingerprints."""
    known = set(kept)
    found = (path for path in (store / FOLDER).glob("*") if path.stem not in known)
    return sorted(path for path in found if path.exists())

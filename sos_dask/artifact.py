"""Directories that are either complete or resumable: recipes, atomic files, records, manifests.

An output directory is complete when ``manifest.json`` exists; it is written last. Until then the
hidden ``.work`` folder holds one small record for every finished part, so that a killed run goes on
at the first missing part, and any number of processes may work on one output: parts are
deterministic and replaced atomically, and whoever finishes last writes the manifest.
Nothing in a manifest depends on time, machine or number of workers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sos_dask.errors import CatalogError, ConfigError, StorageError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
WORK = ".work"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Recipe:
    """All that decides what a stage writes.

    Parameters
    ----------
    stage : str
    version : int
        Raised when the code of a stage changes its output.
    params : mapping
        Exactly the settings that the stage reads; JSON values.
    inputs : mapping of str to str
        Fingerprints of the inputs: other recipes, or content hashes of raw files.
    """

    stage: str
    version: int
    params: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the canonical JSON of the recipe."""
        text = canonical_json(
            {
                "stage": self.stage,
                "version": self.version,
                "params": self.params,
                "inputs": self.inputs,
            }
        )
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """One file of an output: path relative to it, rows, bytes and SHA-256."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Rows:
    """Row accounting: ``n_in + sum(added) == n_out + rejected + sum(dropped)``.

    Parameters
    ----------
    n_in, n_out, rejected : int
    dropped, added : mapping of str to int
        Rows that were left out or came more than once on purpose, by reason.
    """

    n_in: int
    n_out: int
    rejected: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)

    def check(self, where: str) -> None:
        """Raise `CatalogError` when the account does not close."""
        left = self.n_in + sum(self.added.values())
        right = self.n_out + self.rejected + sum(self.dropped.values())
        if left != right:
            raise CatalogError(
                f"{where}: {self.n_in} rows in (added {dict(self.added)}) are not {self.n_out} out "
                f"+ {self.rejected} rejected + dropped {dict(self.dropped)}",
                "This is a defect of the program: please report it with the command.",
            )


@dataclass(frozen=True)
class Manifest:
    """What a complete output is, was made from, and holds."""

    recipe: Recipe
    rows: Rows
    files: tuple[FileRecord, ...]
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the recipe."""
        return self.recipe.fingerprint

    def to_json(self) -> str:
        """Indented JSON with sorted keys."""
        return json.dumps(
            {
                "format": MANIFEST_FORMAT,
                "fingerprint": self.fingerprint,
                "stage": self.recipe.stage,
                "version": self.recipe.version,
                "params": self.recipe.params,
                "inputs": self.recipe.inputs,
                "rows": {
                    "in": self.rows.n_in,
                    "out": self.rows.n_out,
                    "rejected": self.rows.rejected,
                    "dropped": self.rows.dropped,
                    "added": self.rows.added,
                },
                "summary": self.summary,
                "files": {
                    record.path: {
                        "rows": record.rows,
                        "bytes": record.bytes,
                        "sha256": record.sha256,
                    }
                    for record in sorted(self.files, key=lambda record: record.path)
                },
            },
            indent=1,
            sort_keys=True,
            allow_nan=False,
        )

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read the manifest of a complete output.

        Raises
        ------
        CatalogError
            No manifest (unfinished or not ours), damaged, or of a newer format.
        """
        path = directory / MANIFEST
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            if not directory.is_dir():
                raise CatalogError(f"{directory} does not exist") from None
            hint = (
                "It is unfinished: run the command that makes it again."
                if (directory / WORK).is_dir()
                else "It is not an output of sos-dask."
            )
            raise CatalogError(f"{directory} has no {MANIFEST}", hint) from None
        except NotADirectoryError:
            raise CatalogError(
                f"{directory} is a file: a directory that sos-dask or HATS made is needed",
                "Make one of a table: sos-dask ingest SURVEY FILE -o DIR; the columns of another "
                "one in a job: [attach.NAME] with files.",
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CatalogError(
                f"{path} is damaged: {error}", f"Remove {directory} and run again."
            ) from None
        if raw.get("format", 0) > MANIFEST_FORMAT:
            raise CatalogError(
                f"{path} has format {raw['format']}, newer than {MANIFEST_FORMAT} known here",
                "Install a newer sos-dask.",
            )
        try:
            manifest = cls(
                recipe=Recipe(raw["stage"], raw["version"], raw["params"], raw["inputs"]),
                rows=Rows(
                    raw["rows"]["in"],
                    raw["rows"]["out"],
                    raw["rows"]["rejected"],
                    raw["rows"]["dropped"],
                    raw["rows"]["added"],
                ),
                files=tuple(
                    FileRecord(name, item["rows"], item["bytes"], item["sha256"])
                    for name, item in raw["files"].items()
                ),
                summary=raw["summary"],
            )
        except (KeyError, TypeError) as error:
            raise CatalogError(
                f"{path} is damaged: {error!r} is missing or wrong",
                f"Remove {directory} and run again.",
            ) from None
        if manifest.fingerprint != raw.get("fingerprint"):
            raise CatalogError(
                f"{path} was changed: its fingerprint does not fit its recipe",
                f"Remove {directory} and run again.",
            )
        return manifest


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write into a `StorageError` that names the path."""
    try:
        yield
    except OSError as error:
        number = error.errno
        text = str(error).lower()
        # Arrow keeps the number in the text; numpy says "1100 requested and 1008 written".
        if number is None and ("errno 28" in text or "requested and" in text):
            number = errno.ENOSPC
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                f"the disk is full: cannot write {path}",
                "Free some space and run the same command again: it goes on where it stopped.",
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise StorageError(f"cannot write {path}: {os.strerror(number)}") from error
        raise


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A hidden temporary beside ``path``, put in its place by one rename after fsync.

    Raises
    ------
    StorageError
        The disk is full or the folder cannot be written. Nothing appears under the final name.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


def _finished_files(directory: Path) -> Iterator[Path]:
    """Files of a directory but for those that a killed process left half written."""
    return (
        path for path in directory.rglob("*") if path.is_file() and not path.name.endswith(".tmp")
    )


@dataclass(frozen=True)
class Output:
    """A directory that a stage writes into; picklable, so that tasks can take it along.

    Parameters
    ----------
    directory : Path
    recipe : Recipe
    """

    directory: Path
    recipe: Recipe

    @classmethod
    def prepare(cls, directory: Path, recipe: Recipe, overwrite: bool = False) -> Output:
        """Claim a directory for a recipe; a partly finished run of the same recipe goes on.

        Raises
        ------
        CatalogError
            The directory holds something else and ``overwrite`` is false.
        ConfigError
            The directory is an input of what is to replace it.
        """
        output = cls(directory, recipe)
        if not output.complete and any(_finished_files(directory)):
            claimed = directory / WORK / "fingerprint"
            other = claimed.read_text() if claimed.is_file() else ""
            if other != recipe.fingerprint:
                if not overwrite:
                    raise CatalogError(
                        f"{directory} already holds "
                        + ("another run's output" if other else "other files or another output"),
                        "Choose another directory, or say --overwrite to replace it.",
                    )
                if not other and not (directory / MANIFEST).is_file():
                    raise CatalogError(
                        f"{directory} holds files that are no output of sos-dask: not overwritten",
                        "Remove them yourself or choose another directory.",
                    )
                there = None if other else Manifest.load(directory)
                names = [there.fingerprint, *(file.sha256 for file in there.files)] if there else []
                if not set(names).isdisjoint(recipe.inputs.values()):
                    raise ConfigError(
                        f"{directory} is to be replaced, but the new output is made from it",
                        "Choose another directory.",
                    )
                shutil.rmtree(directory)
        if not output.complete:
            write_text(output.work / "fingerprint", recipe.fingerprint)
        return output

    def release(self) -> None:
        """Let go of a directory in which nothing was made, so that any recipe can claim it."""
        if list(_finished_files(self.directory)) == [self.work / "fingerprint"]:
            shutil.rmtree(self.directory)

    def discard(self) -> None:
        """Remove all that was made of an output that will never be complete."""
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def work(self) -> Path:
        """Hidden folder of intermediate files; gone when the output is complete."""
        return self.directory / WORK

    @property
    def complete(self) -> bool:
        """Whether the manifest of this very recipe exists."""
        path = self.directory / MANIFEST
        return path.is_file() and Manifest.load(self.directory).fingerprint == self.fingerprint

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the recipe."""
        return self.recipe.fingerprint

    def write_file(self, name: str, write: Callable[[Path], int]) -> FileRecord:
        """Write one file atomically; ``write`` gets a temporary path and returns the rows."""
        return self.write_hashed(name, lambda path: (write(path), sha256_of_file(path)))

    def write_hashed(self, name: str, write: Callable[[Path], tuple[int, str]]) -> FileRecord:
        """Write one file atomically; ``write`` returns the rows and the SHA-256 of the file."""
        path = self.directory / name
        with atomic_path(path) as temporary:
            rows, sha256 = write(temporary)
            record = FileRecord(name, rows, temporary.stat().st_size, sha256)
        return record

    def write_bytes(self, name: str, content: bytes) -> FileRecord:
        """Write one file of no rows atomically."""

        def write(path: Path) -> int:
            path.write_bytes(content)
            return 0

        return self.write_file(name, write)

    def put_record(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        """Say that a part is finished: from now on it is skipped by a rerun."""
        if (self.directory / MANIFEST).is_file():
            return  # another process has completed the output meanwhile
        write_text(self.work / kind / f"{key}.json", canonical_json(value))

    def get_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """What was said of a finished part; None where it is not finished."""
        try:
            return dict(json.loads((self.work / kind / f"{key}.json").read_text()))
        except FileNotFoundError:
            return None

    def commit(
        self,
        rows: Rows,
        files: tuple[FileRecord, ...],
        summary: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write the manifest and remove the intermediate files."""
        rows.check(f"stage {self.recipe.stage}")
        manifest = Manifest(self.recipe, rows, files, summary or {})
        write_text(self.directory / MANIFEST, manifest.to_json())
        self.tidy()
        return manifest

    def tidy(self) -> None:
        """Remove what a complete output no longer needs: also what a slower process left behind."""
        if not self.complete:
            return
        shutil.rmtree(self.work, ignore_errors=True)
        for leftover in self.directory.rglob(".*.tmp"):  # of killed processes
            leftover.unlink(missing_ok=True)

    def load_manifest(self) -> Manifest:
        """Manifest of the complete output."""
        return Manifest.load(self.directory)

"""What a complete output is: its recipe, its files, its account of rows; digests of all of them.

Nothing in a manifest depends on time, machine or number of workers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from sos_dask.errors import CatalogError
from sos_dask.run.machine import n_cores
from sos_dask.settings import sealed
from sos_dask.storage.objects import ObjectPath, as_path, at_once, copied, copy_to, local, scratch

MANIFEST = "manifest.json"
WORK = ".work"
_FORMAT = 2  # of manifests
_ROWS = ("in", "out", "rejected", "dropped", "added")
_MOST_ROWS = 1 << 62
_BLOCK = 1 << 18
_TAIL = 8  # of a Parquet file: length of the footer, magic
_FOOTER = 1 << 16  # bytes of an object that are asked for at once: most footers are smaller
_VARYING = "train-"  # begins the names of stages whose output may differ from run to run

Check = Literal["sha256", "size"]


# -- files and digests ----------------------------------------------------------------------------


def files_below(directory: Path) -> Iterator[Path]:
    """Files of a directory but for those that a killed process left half written."""
    return (
        path for path in directory.rglob("*") if path.is_file() and not path.name.endswith(".tmp")
    )


def canonical_json(value: Any) -> bytes:
    """Write JSON with sorted keys and no spaces: equal values give equal text."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def sha256_of(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with local(path).open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def footer_bytes(path: Path) -> bytes:
    """Read the footer of a Parquet file, with its length and magic; `OSError` where it has none."""
    path = copied(path) if isinstance(path, ObjectPath) else path
    if isinstance(path, ObjectPath):
        content = path.tail(_FOOTER)
        length = int.from_bytes(content[-_TAIL:-4], "little") + _TAIL
        content = content if length <= len(content) else path.tail(length)
        if length > len(content):
            raise OSError("its footer is cut off or damaged")
        return content[-length:]
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL, 0))
        length = int.from_bytes(file.read(4), "little") + _TAIL
        if length > size:
            raise OSError("its footer is cut off or damaged")
        file.seek(size - length)
        return file.read(length)


def sum_of_file(path: Path) -> list[int]:
    """Count the bytes of a file and sum its 64-bit words, in a tenth of the time of a SHA-256.

    Empty where there is no file. Of an object its size and a number of its ETag.
    """
    if not path.is_file():
        return []
    if isinstance(path, ObjectPath):
        return list(path.stat()[:2])
    total = size = 0
    content = bytearray(_BLOCK)
    words = np.frombuffer(content, np.uint64)
    with path.open("rb") as file:
        while n_bytes := file.readinto(content):
            content[n_bytes : n_bytes + -n_bytes % 8] = bytes(-n_bytes % 8)
            size += n_bytes
            total += int(words[: -(-n_bytes // 8)].sum())
    return [size, total]


def sealed_json(document: Mapping[str, Any], sort_keys: bool = True) -> str:
    """Write indented JSON of a document that carries its own digest."""
    whole = sealed(document, canonical_json)
    return json.dumps(whole, indent=1, sort_keys=sort_keys, allow_nan=False)


def read_sealed(path: Path, hint: str) -> dict[str, Any]:
    """Read what `sealed_json` made, without the digest.

    Raises `CatalogError` with the hint where it is damaged, and `FileNotFoundError` or
    `NotADirectoryError` where it is not there.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CatalogError(f"{path} cannot be read: {error}", hint) from None
    try:
        document: dict[str, Any] = json.loads(content)
        if not isinstance(document, dict):
            raise TypeError("it is not a JSON object")
        digest = sealed(document, canonical_json)["sha256"]
        stated = document.pop("sha256", None)
    except (ValueError, TypeError, RecursionError) as error:
        raise CatalogError(f"{path} is damaged or cannot be read: {error}", hint) from None
    if stated is None:
        what = "has no digest: it is damaged, or an older version of sos-dask made it"
        raise CatalogError(f"{path} {what}", hint)
    if stated != digest:
        raise CatalogError(f"{path} was changed: its digest does not fit its content", hint)
    return document


# -- recipes and manifests ------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a stage writes.

    ``version`` is raised when the code of a stage changes its output, ``params`` are exactly the
    settings that it reads (JSON values), ``inputs`` the fingerprints of its inputs: other recipes,
    or content hashes of raw files.
    """

    stage: str
    version: int
    params: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the canonical JSON of the recipe."""
        return sha256_of(vars(self))


@dataclass(frozen=True)
class FileRecord:
    """One file of an output: path relative to it, rows, bytes and SHA-256.

    ``footer`` is the SHA-256 of a Parquet file's footer: with it and the checksums of pages, what a
    task reads of a large file is checked without reading the rest.
    """

    path: str
    rows: int
    bytes: int
    sha256: str
    footer: str = ""

    def __post_init__(self) -> None:
        inside = PurePosixPath(self.path)
        if inside.is_absolute() or ".." in inside.parts or not inside.parts or "\0" in self.path:
            raise ValueError(f"the path {self.path!r} is not inside the output")
        _require_counts(self.rows, self.bytes)

    @property
    def is_partition(self) -> bool:
        """Whether it is a partition of a catalog: all other files are small."""
        return "/Npix=" in self.path

    def problem(self, file: str | ObjectPath, by: Check = "sha256") -> str:
        """Compare the file with the record; empty where they agree."""
        try:
            size = (file.stat() if isinstance(file, ObjectPath) else os.stat(file)).st_size  # noqa: PTH116
            if size != self.bytes:
                return f"{self.path} has {size} bytes, the manifest says {self.bytes}"
            if by == "sha256" and sha256_of_file(as_path(file)) != self.sha256:
                return f"{self.path} was changed: its SHA-256 is not the manifest's"
        except (FileNotFoundError, NotADirectoryError):
            return f"{self.path} is missing"
        except OSError as error:
            return f"{self.path} cannot be read: {error.strerror}"
        return ""


def _require_counts(*values: Any) -> None:
    for value in values:
        if type(value) is not int or not 0 <= value <= _MOST_ROWS:
            raise ValueError(f"{str(value)[:40]} is not a number of rows or bytes")


@dataclass(frozen=True)
class Rows:
    """Row accounting: ``n_in + sum(added) == n_out + rejected + sum(dropped)``.

    Rows were dropped, or came more than once, on purpose: their numbers by reason.
    """

    n_in: int
    n_out: int
    rejected: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        reasons = [*self.dropped.values(), *self.added.values()]
        _require_counts(self.n_in, self.n_out, self.rejected, *reasons)

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
    """What a complete output is, was made from, and contains."""

    recipe: Recipe
    rows: Rows
    files: tuple[FileRecord, ...]
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the recipe."""
        return self.recipe.fingerprint

    def files_in(self, directory: Path) -> list[tuple[FileRecord, str | ObjectPath]]:
        """Files of a directory with their records; objects as they are listed."""
        if not isinstance(directory, ObjectPath):  # tens of thousands of files
            return [(one, os.path.join(directory, one.path)) for one in self.files]  # noqa: PTH118
        there = {str(one): one for one in directory.rglob("*")}
        paths = [stored_at(directory, self.recipe, one) for one in self.files]
        return [
            (one, there.get(str(path), path)) for one, path in zip(self.files, paths, strict=True)
        ]

    @property
    def document(self) -> dict[str, Any]:
        """JSON value of the manifest, without its digest."""
        return {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            **vars(self.recipe),
            "rows": dict(zip(_ROWS, vars(self.rows).values(), strict=True)),
            "summary": self.summary,
            "files": {
                record.path: {k: v for k, v in vars(record).items() if k != "path" and v != ""}
                for record in self.files
            },
        }

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read the manifest of a complete output.

        Raises `CatalogError` where there is none (unfinished or not ours), or it is damaged or of
        another format.
        """
        path = directory / MANIFEST
        again = f"Remove {directory} and run again."
        try:
            raw = read_sealed(path, again)
        except (FileNotFoundError, NotADirectoryError):
            raise _no_manifest(directory) from None
        try:
            if raw["format"] != _FORMAT:
                age, hint = "an older", "Run the rebuild into an empty store, or what made it."
                if raw["format"] > _FORMAT:
                    age, hint = "a newer", "Install a newer sos-dask."
                what = f"{path} has format {raw['format']} of {age} version of sos-dask"
                raise CatalogError(f"{what}, known here is format {_FORMAT}", hint)
            if not isinstance(raw["stage"], str) or not isinstance(raw["version"], int):
                raise TypeError("stage or version")
            recipe = Recipe(raw["stage"], raw["version"], {**raw["params"]}, {**raw["inputs"]})
            rows = Rows(*(raw["rows"][name] for name in _ROWS))
            files = tuple(FileRecord(name, **item) for name, item in raw["files"].items())
            manifest = cls(recipe, rows, files, {**raw["summary"]})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CatalogError(f"{path} is damaged: {error!r} is missing or wrong", again) from None
        if manifest.fingerprint != raw.get("fingerprint"):
            raise CatalogError(
                f"{path} was changed: its fingerprint does not fit its recipe", again
            )
        return manifest

    @classmethod
    def checked(cls, directory: Path, by: Check | None = None) -> Manifest:
        """Read the manifest of a complete output and compare its files with it.

        By ``sha256`` or ``size`` (bytes); by default by SHA-256 all files but the partitions, whose
        footers are checked where they are read. Raises `CatalogError` as `load`, or where a file is
        not the one written.
        """
        manifest = cls.load(directory)

        def compare(found: tuple[FileRecord, Any]) -> str:
            record, file = found
            return record.problem(file, by or ("size" if record.is_partition else "sha256"))

        hint = f"Restore the file, or remove {directory} and make it again."
        with ThreadPoolExecutor(n_cores()) as pool:  # hashing holds no lock of the interpreter
            each = pool.map if by else partial(at_once, directory)
            for problem in each(compare, manifest.files_in(directory)):
                if problem:
                    raise CatalogError(f"{directory}/{problem}", hint)
        return manifest

    @classmethod
    def of_stage(cls, directory: Path, stage: str, version: int) -> Manifest:
        """Read, as `checked` does, the manifest of an output of this version of a stage."""
        manifest = cls.checked(directory)
        made = manifest.recipe
        if made.stage != stage:
            raise CatalogError(f"{directory} is not an output of '{stage}' but of '{made.stage}'")
        if made.version != version:
            what = f"{directory} was made by another version of sos-dask: it has version"
            what = f"{what} {made.version} of '{stage}', known here is version {version}"
            raise CatalogError(what, "Run the rebuild again, or the command that made it.")
        return manifest


def stored_at(directory: Path, recipe: Recipe, record: FileRecord) -> Any:
    """Path of a file of an output: of an object that may differ from run to run by its SHA-256.

    So it is never another one than the manifest names, whoever puts it meanwhile.
    """
    varies = isinstance(directory, ObjectPath) and recipe.stage.startswith(_VARYING)
    return directory / (f"{record.path}.{record.sha256}" if varies else record.path)


def local_copy(
    directory: Path, recipe: Recipe | None = None, files: Sequence[FileRecord] = ()
) -> Path:
    """Give a directory on this machine with the files of an output, but for partitions.

    Of objects it is a copy, made once and compared with their SHA-256. An output without a manifest
    yet is given with its recipe and files. Raises `CatalogError` where one is missing or changed.
    """
    if not isinstance(directory, ObjectPath):
        return directory
    if recipe is None:
        manifest = Manifest.load(directory)
        recipe, files = manifest.recipe, [x for x in manifest.files if not x.is_partition]
    digest = sha256_of([[file.path, file.sha256] for file in files])
    folder = scratch() / digest[:2] / f"{digest[2:32]}-{directory.name[:16]}"
    for file in files:
        target, source = folder / file.path, stored_at(directory, recipe, file)
        if target.is_file() and target.stat().st_size == file.bytes:
            os.utime(target)  # it is used
            continue
        again = f"Restore it, or remove {directory} and make it again."
        try:
            copy_to(source, target)
        except FileNotFoundError:
            raise CatalogError(f"{source} is missing", again) from None
        if sha256_of_file(target) != file.sha256:
            target.unlink()
            raise CatalogError(f"{source} was changed: its SHA-256 is not the manifest's", again)
    return folder


def _no_manifest(directory: Path) -> CatalogError:
    """Tell why a directory has no manifest."""
    if not directory.exists():
        return CatalogError(f"{directory} does not exist")
    if directory.is_dir():
        is_unfinished = (directory / WORK).is_dir()
        again = "It is unfinished: run the command that makes it again."
        hint = again if is_unfinished else "It is not an output of sos-dask."
        return CatalogError(f"{directory} has no {MANIFEST}", hint)
    return CatalogError(
        f"{directory} is a file: a directory that sos-dask or HATS made is needed",
        "Make one of a table: sos-dask ingest SURVEY FILE -o DIR; the columns of another one in a "
        "job: [attach.NAME] with files.",
    )

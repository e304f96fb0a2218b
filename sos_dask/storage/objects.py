"""Where files lie: on disk, or as objects of an S3 server; a file of a web server can be read.

`as_path` makes a path of what is given. An `ObjectPath` names an object, or what is below a prefix,
by its URL, and has the methods of a path that the package uses; to read its content, `local` gives
a copy on this machine, made once. Copies lie in the scratch folder under URL and ETag, so that a
changed object is copied again, and the oldest are removed while they take over half of the disk.

Credentials, endpoint and region are those of AWS's own variables and files, and stay here: messages
tell the URL and the cause.
"""

from __future__ import annotations

import configparser
import contextlib
import datetime
import errno
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from sos_dask.errors import ConfigError, StorageError

SCHEMES = ("s3", "https")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_BLOCK = 32 << 20
_PIECE = 256 << 20  # larger files are put in pieces
_AT_ONCE = 16  # requests of one process
_UNUSED_S = 600  # copies that were used since are never removed
_LATELY_S, _MOST_KNOWN = 5.0, 10_000
_LOCK_S = 300.0
_ROOM_S = 20.0  # between looks at the size of all copies
_LIMIT = "120s"  # of one request
_PATIENCE = datetime.timedelta(seconds=60)  # of a server that is away
_RETRY = {
    "max_retries": 1000,
    "retry_timeout": _PATIENCE,
    "backoff": {
        "init_backoff": datetime.timedelta(milliseconds=100),
        "max_backoff": datetime.timedelta(seconds=2),
        "base": 2,
    },
}
_OF_PROFILE = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}
_VARIABLES = {  # the last one that is set counts
    "AWS_ENDPOINT_URL": "endpoint",
    "AWS_ENDPOINT_URL_S3": "endpoint",
    "AWS_DEFAULT_REGION": "region",
    "AWS_REGION": "region",
}
# What is told of a failure: never the request, or more of the answer.
_CAUSES = (
    r"<Code>(\w+)</Code>",
    r"status code: (\d+ [\w ]+)",
    r"Invalid(Certificate)",
    r'(?:message|error): "([^"]+)"',
    r"kind: (Timeout)",
)


logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


class _Stat(NamedTuple):
    """What is known of an object: ``st_mtime_ns`` is another number for another ETag or time."""

    st_size: int
    st_mtime_ns: int
    e_tag: str | None


def as_path(given: str | os.PathLike[str]) -> Path:
    """Make a path of what is given: of s3://bucket/key and https://host/file an `ObjectPath`.

    ``current`` of a store and the products of builds are followed. Raises `ConfigError`: another
    scheme, or no bucket or host.
    """
    if isinstance(given, ObjectPath):
        return given
    text = str(given)
    found = _URL.match(text)
    if found is None:
        return Path(given)
    shown = re.sub(r"//[^/]*@", "//", re.split(r"[?#]", text)[0])  # without a password or signature
    if not text.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        known = " and ".join(f"{scheme}://" for scheme in SCHEMES)
        hint = f"Known are {known} in small letters, as text; a folder of this name is ./{shown}."
        raise ConfigError(f"'{shown}' is not a URL that is known here", hint)
    path = ObjectPath(text)
    if len(path.parts) < 2 or ".." in path.parts or (shown != text and found[1] == "https"):
        hint = "For example s3://bucket/folder, or https://host/file.fits without password and '?'."
        raise ConfigError(f"'{shown}' cannot be used", hint)
    return path.resolve()


def on_disk(path: Path, what: str) -> Path:
    """Give a path that must lie on disk; `ConfigError` for an object."""
    if isinstance(path, ObjectPath):
        raise ConfigError(f"{what} {path} is a URL", "Give a path on this machine.")
    return path


def followed(path: Path) -> Path:
    """Give the place of a product of a build that has no links; links stay as they are."""
    return path.resolve() if isinstance(path, ObjectPath) else path


class ObjectPath(PosixPath):
    """An object, or what is below a prefix: ``s3://bucket/key``, ``https://host/file``.

    The file system knows nothing of it: a function of another library that is given one raises
    `StorageError`.
    """

    _seen: _Stat | None = None

    def __str__(self) -> str:
        first, *rest = self.parts or ("",)
        return "/".join([f"{first}/" if first[:-1] in SCHEMES else first, *rest])

    def __fspath__(self) -> str:
        raise StorageError(f"{self} does not lie on this machine", "Copy it to a disk first.")

    @property
    def scheme(self) -> str:
        """``s3`` or ``https``."""
        return self.parts[0].removesuffix(":")

    @property
    def key(self) -> str:
        """Name of the object in its bucket or on its host."""
        return "/".join(self.parts[2:])

    # -- what is there ----------------------------------------------------------------------------

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Ask for size and ETag; `FileNotFoundError` without an object of this name."""
        if self._seen is not None:
            return self._seen
        if not self.key:
            raise _missing(self)
        with _asking(self) as (client, key):
            return _stat_of(_obstore().head(client, key))

    lstat = stat

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        with contextlib.suppress(FileNotFoundError):
            return self.stat() is not None
        return False

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        return self._seen is None and next(self.rglob("*"), None) is not None

    def exists(self) -> bool:
        """Whether there is an object of this name, or below."""
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        """Never: there are no links."""
        return False

    def rglob(self, pattern: str) -> Generator[ObjectPath, None, None]:
        """List the objects below whose names fit a pattern, in the order of their keys."""
        if self.scheme != "s3":
            return
        with _asking(self) as (client, key):
            for listed in _obstore().list(client, prefix=key or None):
                for item in listed:
                    found = self._found(item)
                    if fnmatch.fnmatchcase(found.name, pattern):
                        yield found

    def glob(self, pattern: str) -> Generator[ObjectPath, None, None]:
        """List objects and prefixes whose names below fit the parts of a pattern."""
        first, _, rest = pattern.partition("/")
        with _asking(self) as (client, key):
            found = _obstore().list_with_delimiter(client, prefix=key or None)
        folders = [self / name.rsplit("/", 1)[-1] for name in found["common_prefixes"]]
        for one in [*folders, *map(self._found, found["objects"])]:
            if fnmatch.fnmatchcase(one.name, first):
                yield from one.glob(rest) if rest and one._seen is None else () if rest else [one]

    def _found(self, item: Any) -> ObjectPath:
        return type(self)(f"s3://{self.parts[1]}/{item['path']}").seen(_stat_of(item))

    def seen(self, stat: _Stat | None = None) -> ObjectPath:
        """Give the same path with what is known of the object now."""
        path = type(self)(*self.parts)
        path._seen = stat or self.stat()
        return path

    # -- names ------------------------------------------------------------------------------------

    def absolute(self) -> ObjectPath:
        """Give the path as it is."""
        return self

    expanduser = absolute

    def is_absolute(self) -> bool:
        """Always."""
        return True

    def resolve(self, strict: bool = False) -> ObjectPath:
        """Follow ``current`` of a store, and the products that ``build.json`` of a build names."""
        parts = list(self.parts)
        if self.scheme == "s3" and "current" in parts[2:]:
            at = parts.index("current", 2)
            with contextlib.suppress(FileNotFoundError):
                named = type(self)(*parts[: at + 1]).read_text(errors="replace")
                parts[at : at + 1] = named.strip().split("/")
        if self.scheme == "s3" and "builds" in parts[2:-2]:
            at = parts.index("builds", 2)
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                made = json.loads(type(self)(*parts[: at + 2], "build.json").read_bytes())
                product = parts[at + 2]
                parts[at : at + 3] = "artifacts", made["stages"][product], made["products"][product]
        return type(self)(*parts)

    # -- content ----------------------------------------------------------------------------------

    def open(self, mode: str = "r", *args: Any, **more: Any) -> Any:
        """Open a copy of the object for reading."""
        if "r" not in mode or "+" in mode:
            raise StorageError(f"{self} cannot be changed in place")
        return local(self).open(mode, *args, **more)

    def read_bytes(self) -> bytes:
        """Read the object."""
        with _asking(self) as (client, key):
            return bytes(_obstore().get(client, key).bytes())

    def read_text(self, encoding: str | None = None, errors: str | None = None, *_: Any) -> str:
        """Read the object as text."""
        return self.read_bytes().decode("utf-8", errors or "strict")

    def tail(self, n_bytes: int) -> bytes:
        """Read the last bytes of the object."""
        options = {"range": {"suffix": n_bytes}}
        with _asking(self) as (client, key):
            return bytes(_obstore().get(client, key, options=options).bytes())

    def put(self, content: bytes | Path, mode: Any = "overwrite") -> list[int]:
        """Put an object as a whole, from memory or of a file, which becomes the local copy.

        Returns what `stat` says of it from now on: size and number of the ETag; empty where
        ``mode`` is "create" and there is one, or ``{"e_tag": ...}`` and it has changed.
        """
        if self.scheme != "s3":
            raise ConfigError(f"{self} can only be read", "Write to a folder, or to s3://.")
        there: Any = _obstore().exceptions
        _lately.pop(self, None)
        # In pieces, which no condition goes with: a file is not held in memory.
        large = isinstance(content, Path) and content.stat().st_size > _PIECE
        try:
            with _asking(self, writes=True) as (client, key):
                made = _obstore().put(client, key, content, mode=mode, use_multipart=large)
        except (there.AlreadyExistsError, there.PreconditionError):
            return []
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        stat = _stat_of({**made, "size": size})
        if isinstance(content, Path):
            kept = _copy_of(self.seen(stat))
            kept.parent.mkdir(exist_ok=True)
            content.replace(kept)
            _make_room()
        return list(stat[:2])

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        with _asking(self) as (client, key):
            _obstore().delete(client, key)

    def mkdir(self, *args: Any, **more: Any) -> None:
        """Do nothing: a prefix is there with its first object."""


def remove_tree(path: Path, *, first: str = "", ignore_errors: bool = False) -> None:
    """Remove a folder, or all objects below a prefix: that named ``first`` before the others."""
    if not isinstance(path, ObjectPath):
        shutil.rmtree(path, ignore_errors=ignore_errors)
        return
    if first:
        (path / first).unlink()
    keys = [one.key for one in path.rglob("*")]
    with _asking(path) as (client, _):
        for start in range(0, len(keys), 1000):
            _obstore().delete(client, keys[start : start + 1000])


def link(path: Path, target: Path, last: str) -> None:
    """Let a folder contain another one under a name: by a link, or a copy of the objects.

    What is named ``last`` is copied last, and tells that all is there.
    """
    if not isinstance(path, ObjectPath):
        with contextlib.suppress(FileExistsError):
            path.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()))
    elif not (path / last).is_file():
        files = [one for one in target.rglob("*") if one.name != last]
        for file in filter(lambda one: one.is_file(), [*files, target / last]):
            (path / file.relative_to(target)).put(local(file).read_bytes())


def at_once(path: Path, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Call a function for each item; of objects many at once, for their server takes its time."""
    if not isinstance(path, ObjectPath):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(function, items)


# -- copies on this machine -----------------------------------------------------------------------


def local(path: Path) -> Path:
    """Give a file on this machine with the content of a file: itself, or a copy of an object.

    A copy is used soon: after a while without use it may be removed.
    """
    if not isinstance(path, ObjectPath):
        return path
    path = path.seen()
    found = copied(path)
    if found is path:
        copy = _copy_of(path)
        with (scratch() / f"lock-{copy.parent.name}").open("a") as lock:
            _wait_for(lock)  # processes of one machine copy it once
            if copied(path) is path:
                copy_to(path, copy)
        _make_room()
        return copy
    return found


def _wait_for(lock: Any) -> None:
    """Lock a file; after a time limit go on without, for a copy made twice is harmless."""
    end = time.monotonic() + _LOCK_S
    while time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.05)
    logger.warning("%s is locked for %g s: work goes on without it", lock.name, _LOCK_S)


def copied(path: ObjectPath) -> Path:
    """Give the copy of an object that is on this machine; the path itself without one."""
    copy, size = _copy_of(path), path.stat().st_size
    with contextlib.suppress(FileNotFoundError):
        if copy.stat().st_size == size:
            os.utime(copy)
            return copy
    return path


def copy_to(path: ObjectPath, target: Path) -> None:
    """Copy an object to a file, which appears complete or not at all."""
    stat = path.stat()
    try:
        with temporary_file(target.name) as hidden:
            _copy(path, stat, hidden)
            target.parent.mkdir(parents=True, exist_ok=True)
            hidden.replace(target)
    except OSError as error:
        what = f"cannot copy {path} to {scratch()}: {error.strerror or error}"
        raise StorageError(what, "Let TMPDIR name a folder with room.") from error


def lately(path: Path) -> Path:
    """Give a path that knows what was asked of its object in the last seconds, by this process.

    A task opens its partitions several times, and each question takes its time.
    """
    if not isinstance(path, ObjectPath):
        return path
    at, found = _lately.get(path, (-_LATELY_S, path))
    if time.monotonic() > at + _LATELY_S:
        if len(_lately) > _MOST_KNOWN:
            _lately.clear()
        found = path.seen()
        _lately[path] = time.monotonic(), found
    return found


_lately: dict[Path, tuple[float, Path]] = {}


@contextlib.contextmanager
def temporary_file(name: str) -> Iterator[Path]:
    """Give the path of a new file in the scratch folder, which is removed if it is still there."""
    hidden = scratch() / f".{uuid.uuid4().hex}.{name[-80:]}"
    try:
        yield hidden
    finally:
        hidden.unlink(missing_ok=True)


def scratch() -> Path:
    """Folder of copies and temporary files of this user, below ``TMPDIR``."""
    folder = Path(tempfile.gettempdir()) / f"sos-dask-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StorageError(f"{folder} belongs to another user", "Let TMPDIR name another folder.")
    return folder


def _copy_of(path: ObjectPath) -> Path:
    stat = path.stat()
    name = hashlib.sha256(f"{path}\0{stat.e_tag or stat.st_mtime_ns}".encode()).hexdigest()
    return scratch() / name[:2] / f"{name[2:32]}-{path.name[-80:]}"


def _copy(path: ObjectPath, stat: _Stat, target: Path) -> None:
    """Copy an object in blocks, all of which must be of the version that was asked for."""
    options: dict[str, Any] = {"if_match": stat.e_tag} if stat.e_tag else {}
    limit = "2h" if path.scheme == "https" else _LIMIT
    with _asking(path, limit=limit) as (client, key), target.open("wb") as file:
        if path.scheme == "https":  # not every server gives ranges
            for block in _obstore().get(client, key, options=options).stream(_BLOCK):
                file.write(block)
        else:
            for start in range(0, stat.st_size, _BLOCK):
                options["range"] = (start, min(start + _BLOCK, stat.st_size))
                file.write(_obstore().get(client, key, options=options).bytes())
    if target.stat().st_size != stat.st_size:
        what = f"{path}: {target.stat().st_size} of {stat.st_size} bytes were received"
        raise StorageError(what, "Run the same command again.")


def _make_room() -> None:
    """Remove the oldest copies while all take more than half of what they could."""
    if time.monotonic() < _looked[0] + _ROOM_S:
        return
    _looked[0] = time.monotonic()
    found = []
    for path in scratch().rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process makes room, too
            if path.is_file():
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    limit = (total + shutil.disk_usage(scratch()).free) // 2
    for used, size, path in sorted(found):
        if total <= limit or used > time.time() - _UNUSED_S:
            return
        path.unlink(missing_ok=True)
        total -= size


_looked = [-_ROOM_S]


# -- the client -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _obstore() -> Any:
    try:
        import obstore
        import obstore.store
    except ImportError:
        hint = "Install it: pip install 'sos_dask[s3]'."
        raise ConfigError("s3:// and https:// need the package obstore", hint) from None
    return obstore


@lru_cache(maxsize=64)
def _client(scheme: str, host: str, limit: str) -> Any:
    """Client of a bucket, or of a web server, with a limit of the time of a request."""
    store, options = _obstore().store, {"timeout": limit, "connect_timeout": "5s"}
    if scheme == "https":
        how = {"client_options": options, "retry_config": _RETRY}
        return store.HTTPStore(f"https://{host}", **how)
    config = _profile() | {"checksum_algorithm": "sha256"}
    config |= {key: os.environ[name] for name, key in _VARIABLES.items() if os.environ.get(name)}
    options["allow_http"] = config.get("endpoint", "").startswith("http://")
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        options["root_certificate"] = Path(bundle).read_text()
    return store.S3Store(host, config=config, client_options=options, retry_config=_RETRY)


def _profile() -> dict[str, Any]:
    """What the profile of AWS's own files says, where no key is in the environment."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    asked = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    files = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials"}
    paths = [Path(os.environ.get(x) or f"~/.aws/{file}").expanduser() for x, file in files.items()]
    parser = configparser.RawConfigParser()
    try:
        parser.read(paths, "utf-8")
    except (configparser.Error, UnicodeDecodeError, OSError):  # its text may contain a key
        where = " or ".join(map(str, paths))
        raise ConfigError(f"{where} cannot be read", "Write them with: aws configure.") from None
    sections = filter(parser.has_section, (f"profile {asked}", asked or "default"))
    found = {key: value for section in sections for key, value in parser.items(section)}
    if asked and "aws_access_key_id" not in found:
        hint = "Give keys in the environment: aws configure export-credentials --format env."
        raise ConfigError(f"the AWS profile '{asked}' has no aws_access_key_id", hint)
    return {here: found[name] for name, here in _OF_PROFILE.items() if name in found}


def _stat_of(item: Any) -> _Stat:
    version = f"{item['e_tag']}\0{item['last_modified'] if item['e_tag'] is None else ''}"
    number = int.from_bytes(hashlib.sha256(version.encode()).digest()[:7])
    return _Stat(item["size"], number, item["e_tag"])


def _missing(path: ObjectPath) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "there is no such object", str(path))


@contextlib.contextmanager
def _asking(
    path: ObjectPath, *, writes: bool = False, limit: str = _LIMIT
) -> Iterator[tuple[Any, str]]:
    """Give the client for an object, and its key.

    A refusal or silence of its server becomes a `StorageError` that names URL and cause.
    """
    there: Any = _obstore().exceptions
    try:
        key = unquote(path.key) if path.scheme == "https" else path.key
        yield _client(path.scheme, path.parts[1], limit), key
    except FileNotFoundError:
        if writes:
            raise _no_bucket(path) from None
        raise _missing(path) from None
    except (there.AlreadyExistsError, there.PreconditionError):
        if writes:
            raise
        again = "Run the same command again."
        raise StorageError(f"{path} was changed while it was read", again) from None
    except there.BaseError as error:
        found = (re.search(cause, str(error)) for cause in _CAUSES)
        cause = next((one[1] for one in found if one), type(error).__name__)
        if cause == "NoSuchBucket":
            raise _no_bucket(path) from None
        denied = isinstance(error, there.PermissionDeniedError | there.UnauthenticatedError)
        address = "its address" if path.scheme == "https" else "AWS_ENDPOINT_URL"
        hint = f"Check that the server runs, and {address}, then run the same command again."
        if denied:
            hint = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and its rights."
        what = "refused" if denied else "cannot be reached"
        raise StorageError(f"{path} {what}: {cause}", hint) from None


def _no_bucket(path: ObjectPath) -> StorageError:
    return StorageError(f"{path}: there is no such bucket", "Make it, or check its name.")

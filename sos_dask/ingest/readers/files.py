"""Which format a file has, told by its first bytes, and its decompressed copy."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import uuid
import zlib
from pathlib import Path

from sos_dask.errors import CatalogError, StorageError, SurveyError
from sos_dask.ingest.readers.common import DAMAGED
from sos_dask.storage.manifest import read_sealed, sealed_json, sum_of_file

_GZIP = b"\x1f\x8b"
_WIDE = (b"\xff\xfe", b"\xfe\xff")
_PACKED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def first_bytes(path: Path, size: int = 1 << 16) -> tuple[bytes, bool]:
    """First bytes of the content, and whether they came out of gzip."""
    if path.is_dir():
        raise SurveyError(f"{path} is a directory, not a file", "Name the files in it.")
    try:
        with path.open("rb") as file:
            head = file.read(size)
        if head.startswith(_GZIP):
            with gzip.open(path) as packed:
                return packed.read(size), True
    except FileNotFoundError:
        raise SurveyError(f"{path} does not exist") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SurveyError(f"{path}: damaged gzip file: {error}", DAMAGED) from None
    except OSError as error:
        raise SurveyError(f"{path} cannot be read: {error.strerror or error}") from None
    return head, False


def kind_of(path: Path, head: bytes) -> str:
    """``fits``, ``csv``, ``parquet`` or ``votable``."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not text:
        raise SurveyError(f"{path} is empty", DAMAGED)
    if head.startswith(b"SIMPLE  ="):
        return "fits"
    if head.startswith(b"PAR1"):
        return "parquet"
    if text.startswith((b"<!doctype html", b"<html")):
        raise SurveyError(
            f"{path} is a web page, not a table", "The download failed: open it to see why."
        )
    if text.startswith((b"<?xml", b"<votable")):
        return "votable"
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            raise SurveyError(f"{path} is {name}-compressed", "Decompress it first.")
    if head.startswith(_WIDE) or b",\0" in head[:1000]:
        raise SurveyError(f"{path} is UTF-16 text", "Save it as UTF-8.")
    if b"\0" in head:
        raise SurveyError(
            f"{path} is neither FITS, Parquet, VOTable nor delimited UTF-8 text",
            "Convert it, for example with TOPCAT.",
        )
    return "csv"


def decompressed(path: Path, scratch: Path) -> Path:
    """Decompress a file into the scratch folder, once: the name there holds its size and time."""
    status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    stem = path.name.removesuffix(".gz")
    target = scratch / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{stem}"
    stated = target.with_name(f"{target.name}.json")  # unpacked bytes have no checksum
    try:
        if read_sealed(stated, "")["sum"] == sum_of_file(target):
            return target
    except (FileNotFoundError, NotADirectoryError, CatalogError):
        pass
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with gzip.open(path) as packed, temporary.open("wb") as file:
            while block := packed.read(1 << 22):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        text = sealed_json({"sum": sum_of_file(temporary)})
        temporary.replace(target)
        temporary.write_text(text)
        temporary.replace(stated)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SurveyError(f"{path}: truncated or damaged gzip file: {error}", DAMAGED) from None
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise StorageError(f"cannot decompress {path} into {scratch}: {what}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target

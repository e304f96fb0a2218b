"""Digests of files and of JSON documents that carry their own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sos_dask.errors import CatalogError

_DIGEST = "sha256"
_BLOCK = 1 << 18
_TAIL = 8  # of a Parquet file: length of the footer, magic


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def footer_bytes(path: Path) -> bytes:
    """Read the footer of a Parquet file: metadata, length and magic.

    Raises
    ------
    OSError
        The file is too short to have one.
    """
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL, 0))
        length = int.from_bytes(file.read(4), "little") + _TAIL
        if length > size:
            raise OSError("its footer is cut off or damaged")
        file.seek(size - length)
        return file.read(length)


def sum_of_file(path: Path) -> list[int]:
    """Bytes of a file and the sum of its 64-bit words, in a tenth of the time of a SHA-256.

    Empty where there is no file.
    """
    if not path.is_file():
        return []
    total = size = 0
    content = bytearray(_BLOCK)
    words = np.frombuffer(content, np.uint64)
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(content):
            content[n_bytes : n_bytes + -n_bytes % 8] = bytes(-n_bytes % 8)
            size += n_bytes
            total += int(words[: -(-n_bytes // 8)].sum())
    return [size, total]


def digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a document without its digest."""
    content = {key: value for key, value in document.items() if key != _DIGEST}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def sealed_json(document: Mapping[str, Any], sort_keys: bool = True) -> str:
    """Indented JSON of a document that carries its own digest."""
    sealed = {**document, _DIGEST: digest_of(document)}
    return json.dumps(sealed, indent=1, sort_keys=sort_keys, allow_nan=False)


def read_sealed(path: Path, hint: str) -> dict[str, Any]:
    """Read what `sealed_json` made, without the digest.

    Parameters
    ----------
    path : Path
    hint : str
        What to do where the file is damaged.

    Raises
    ------
    CatalogError
        The file is damaged, or an older version wrote it.
    FileNotFoundError, NotADirectoryError
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CatalogError(f"{path} cannot be read: {error.strerror}", hint) from None
    try:
        document = json.loads(content)
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
        digest = digest_of(document)
    except (ValueError, RecursionError) as error:
        raise CatalogError(f"{path} is damaged: {error}", hint) from None
    if _DIGEST not in document:
        raise CatalogError(
            f"{path} has no digest: an older version of sos-dask made it, or it is damaged",
            f"{hint} A store of an older version must be made again as a whole.".lstrip(),
        )
    if document.pop(_DIGEST) != digest:
        raise CatalogError(f"{path} was changed: its digest does not fit its content", hint)
    return document

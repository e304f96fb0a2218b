"""Certificates with which client, scheduler and workers of a cluster know each other (TLS)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from sos_dask.errors import ConfigError, StorageError

_NAMES = {"ca_file": "ca.pem", "cert": "cert.pem", "key": "key.pem"}
_CA_KEY = "ca-key.pem"
_NEW = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_AUTHORITY = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
_MEMBER = ("-addext", "basicConstraints=critical,CA:FALSE")


def make_certificates(folder: Path, days: int = 365) -> Mapping[str, Path]:
    """Make an authority and a certificate of it in a folder; the files of ``[cluster.tls]``.

    Keys can be read by their owner alone. Dask compares the authority, not the names of hosts.
    Raises `StorageError`: the folder has such files already, or cannot be written; `ConfigError`:
    the program openssl (3.0 or newer) is missing, or fails.
    """
    files = {name: folder / file for name, file in _NAMES.items()}
    ca_key = folder / _CA_KEY
    for file in (*files.values(), ca_key):
        if file.exists():
            raise StorageError(f"{file} exists", "Choose another folder, or remove it.")
    program = shutil.which("openssl")
    if program is None:
        raise ConfigError("certificates need the program openssl", "Install it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}") from None
    authority = ["-keyout", str(ca_key), "-out", str(files["ca_file"]), "-subj", "/CN=sos-dask CA"]
    member = ["-keyout", str(files["key"]), "-out", str(files["cert"]), "-subj", "/CN=sos-dask"]
    member += ["-CA", str(files["ca_file"]), "-CAkey", str(ca_key)]
    before = os.umask(0o077)
    try:
        for more in ((*authority, *_AUTHORITY), (*member, *_MEMBER)):
            command = [program, *_NEW, "-days", str(days), *more]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"openssl failed: {last}", "It must be version 3.0 or newer.") from None
    finally:
        os.umask(before)
    return files

"""Paths of objects: names, content, copies, what is refused, and what a server says."""

import fcntl
import http.server
import os
import pickle
import shutil
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from sos_dask import api
from sos_dask.errors import ConfigError, SosError, StorageError
from sos_dask.storage import objects as module
from sos_dask.storage.manifest import sha256_of_file
from sos_dask.storage.objects import ObjectPath, as_path, lately, local, remove_tree
from tests.s3 import KEYS


def at(url: str) -> ObjectPath:
    path = as_path(url)
    assert isinstance(path, ObjectPath)
    return path


@pytest.mark.parametrize(
    "given",
    ["gs://b/x", "S3://b/x", "s3:/b/x", "s3:b/../x:/", "file:///x", "http://h/x", Path("s3://b/x")],
)
def test_other_schemes_are_refused_or_plain_folders(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if str(given).startswith("s3:b"):
        assert as_path(given) == Path(given)
        return
    with pytest.raises(ConfigError, match="not a URL that is known here"):
        as_path(given)


@pytest.mark.parametrize(
    "given", ["s3://", "s3://b/../x", "https://me:secret@h/x", "https://h/x?signature=secret"]
)
def test_unusable_urls_are_refused_without_their_secrets(given):
    with pytest.raises(ConfigError, match="cannot be used") as error:
        as_path(given)
    assert "secret" not in str(error.value)


URLS = ["gs://b/x", "S3://b/x", "s3:/b/x"]


@pytest.mark.parametrize(
    ("number", "command"),
    list(enumerate([
        "rebuild JOB --store URL", "rebuild URL", "status URL", "status --store URL",
        "gc --store URL", "verify URL", "ingest lamost-dr11-lrs URL -o x",
        "ingest lamost-dr11-lrs f -o URL", "ingest URL/s.toml f -o x",
        "dedupe URL -o x", "reference a=URL -o x",
        "crossmatch URL URL -o x", "attach URL URL -c a -o x", "train URL -m polynomial -o x",
        "apply URL URL -o x", "apply m c --coverage c --fallback URL -o x", "report --store URL",
        "report --out URL", "compare URL", "simulate -o URL", "demo --store URL",
    ])),
)  # fmt: skip
def test_no_command_makes_a_folder_of_a_url(cli, tmp_path, small_sky, number, command):
    from tests.job import write_job

    url = URLS[number % len(URLS)]
    if "JOB" in command:
        command = command.replace("JOB", str(write_job(tmp_path, small_sky)))
    ran = cli(*command.replace("URL", url).split())
    assert ran.code in (3, 4)
    assert url.split("/")[0] in ran.message
    assert [path.name for path in tmp_path.iterdir() if path.name != "job.toml"] == []


@pytest.mark.parametrize(
    "change",
    [
        ('store = "store"', 'store = "URL"'),
        ("${SMALL_SKY}/lamost.fits", "URL/lamost.fits"),
        ('survey = "apogee-dr17"', 'survey = "URL/apogee.toml"'),
        ("[report]", '[attach.gaia]\ncatalog = "URL"\ncolumns = {a = "b"}\n[report]'),
        ("[report]", '[attach.gaia]\nfiles = ["URL/f"]\ncolumns = {a = "b"}\n[report]'),
    ],
)
def test_no_key_of_a_job_makes_a_folder_of_a_url(cli, tmp_path, small_sky, change):
    from tests.job import write_job

    old, new = change
    for url in URLS:
        job = write_job(tmp_path, small_sky, (old, new.replace("URL", url)))
        ran = cli("rebuild", job)
        assert ran.code in (3, 4)
        assert url.split("/")[0] in ran.message
    assert {path.name for path in tmp_path.iterdir()} <= {"job.toml", "store"}


def test_a_path_of_an_object_behaves_like_one(prefix):
    path = at(f"{prefix}/a/b.parquet")
    assert str(path) == repr(path)[len("ObjectPath('") : -2] == f"{prefix}/a/b.parquet"
    assert pickle.loads(pickle.dumps(path)) == path
    assert str(pickle.loads(pickle.dumps(path.parent))) == f"{prefix}/a"
    assert str(path.with_name("c") / "d") == f"{prefix}/a/c/d"
    assert str(path.relative_to(at(prefix))) == "a/b.parquet"
    with pytest.raises(StorageError, match="does not lie on this machine"):
        open(path)  # noqa: PTH123, SIM115


def test_content_of_objects(prefix):
    top = at(prefix)
    first = top / "a" / "one"
    assert not first.exists()
    assert not top.is_dir()
    _, number = first.put(b"12345")
    assert (first.stat().st_size, first.stat().st_mtime_ns) == (5, number)
    (top / "a" / "b" / "a b#ü.csv").put(b"6")
    assert first.is_file()
    assert not first.is_dir()
    assert (top / "a").is_dir()
    assert [str(one.relative_to(top)) for one in top.rglob("*")] == ["a/b/a b#ü.csv", "a/one"]
    assert [one.name for one in (top / "a").glob("*")] == ["b", "one"]
    assert [one.name for one in top.glob("*/*")] == ["b", "one"]
    assert [one.name for one in top.glob("*/*/*.csv")] == ["a b#ü.csv"]
    assert local(top / "a" / "b" / "a b#ü.csv").read_bytes() == b"6"
    assert first.tail(2) == b"45"
    assert first.read_text() == "12345"
    with pytest.raises(FileNotFoundError, match=f"{prefix}/a/two"):
        (top / "a" / "two").read_bytes()
    remove_tree(top / "a")
    assert not top.is_dir()


def test_puts_that_depend_on_what_is_there(prefix):
    path = at(f"{prefix}/current")
    assert path.put(b"1", "create")
    assert not path.put(b"2", "create")
    known = path.stat().e_tag
    assert path.put(b"3", {"e_tag": known})
    assert not path.put(b"4", {"e_tag": known})
    assert path.read_bytes() == b"3"


def test_a_large_file_is_put_in_pieces(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 6 << 20)
    file, path = tmp_path / "x", at(f"{prefix}/large")
    file.write_bytes(os.urandom(13 << 20))
    digest = sha256_of_file(file)
    size, number = path.put(file)
    assert (size, number) == tuple(path.stat()[:2]) and size == 13 << 20
    assert sha256_of_file(local(path)) == digest
    module.remove_tree(module.scratch())
    assert sha256_of_file(local(path)) == digest


def test_a_lock_of_another_process_is_waited_for_with_a_limit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_LOCK_S", 0.2)
    with (tmp_path / "x").open("a") as mine, (tmp_path / "x").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        module._wait_for(mine)
    assert "work goes on without it" in caplog.text


def test_one_of_many_is_first(prefix):
    path, winners = at(f"{prefix}/manifest.json"), list[str]()

    def put(number: int) -> None:
        if path.put(str(number).encode(), "create"):
            winners.append(str(number))

    threads = [threading.Thread(target=put, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert winners == [path.read_text()]


def test_a_copy_is_made_once_and_again_when_the_object_has_changed(prefix, monkeypatch):
    path, blocks = at(f"{prefix}/x"), list[int]()
    made = module._copy

    def copy(*given):
        blocks.append(1)
        made(*given)

    monkeypatch.setattr(module, "_copy", copy)
    monkeypatch.setattr(module, "_BLOCK", 3)
    path.put(b"12345678")
    assert [local(path).read_bytes() for _ in range(2)] == [b"12345678"] * 2
    path.put(b"abcdefgh")
    assert local(path).read_bytes() == b"abcdefgh"
    assert len(blocks) == 2
    local(path).unlink()  # by someone who needs room
    assert local(path).read_bytes() == b"abcdefgh"


def test_what_was_asked_is_known_for_some_seconds(prefix, monkeypatch):
    path = at(f"{prefix}/x")
    path.put(b"1")
    first = lately(path)
    assert lately(path) is first
    path.put(b"22")  # by this process
    assert lately(path).stat().st_size == 2
    monkeypatch.setattr(module, "_LATELY_S", 0.0)
    assert lately(path) is not lately(path)


def test_the_oldest_copies_make_room(prefix, monkeypatch):
    one, two = at(f"{prefix}/one"), at(f"{prefix}/two")
    one.put(bytes(1000))
    two.put(bytes(1000))
    old, used = local(one), local(two)
    os.utime(old, (1, 1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Free", (), {"free": 0}))
    monkeypatch.setattr(module, "_looked", [-100.0])
    module._make_room()
    assert not old.exists()
    assert used.exists()


def test_refusals_name_url_and_cause_and_no_secret(prefix, monkeypatch):
    at(f"{prefix}/x").put(b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-this-secret")
    module._client.cache_clear()
    with pytest.raises(StorageError, match=f"{prefix}/x refused: .*Signature") as error:
        at(f"{prefix}/x").read_bytes()
    assert "AWS_SECRET_ACCESS_KEY" in error.value.hint
    assert error.value.exit_code == 9
    assert not any(key in str(error.value) for key in [*KEYS.values(), "not-this-secret"])
    module._client.cache_clear()


def test_silence_has_a_limit(monkeypatch):
    import datetime

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    few = module._RETRY | {"retry_timeout": datetime.timedelta(seconds=1)}
    monkeypatch.setattr(module, "_RETRY", few)
    module._client.cache_clear()
    started = time.monotonic()
    with pytest.raises(StorageError, match="s3://some/x cannot be reached: Connection refused"):
        at("s3://some/x").read_bytes()
    assert time.monotonic() - started < 30
    module._client.cache_clear()


def test_a_profile_of_aws(prefix, s3_server, tmp_path, monkeypatch):
    file = tmp_path / "credentials"
    keys = "\n".join(f"{name.lower()} = {value}" for name, value in KEYS.items())
    file.write_text(f"[other]\naws_access_key_id = none\n[night]\n{keys}\n")
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "night")
    module._client.cache_clear()
    at(f"{prefix}/x").put(b"1")
    monkeypatch.setenv("AWS_PROFILE", "nigth")
    module._client.cache_clear()
    with pytest.raises(ConfigError, match="'nigth' has no aws_access_key_id"):
        at(f"{prefix}/x").read_bytes()
    module._client.cache_clear()


def test_a_missing_package_is_named(monkeypatch):
    import sys

    module._obstore.cache_clear()
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match="obstore") as error:
        as_path("s3://b/x").exists()
    assert "sos_dask[s3]" in error.value.hint
    module._obstore.cache_clear()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@contextmanager
def web_server(folder: Path, certificate: Path):
    """An HTTPS server of a folder, without ranges; its address."""
    kind = partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("localhost", 0), kind)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_survey_files_of_a_web_server(small_sky, s3_server, tmp_path, monkeypatch):
    pair = tmp_path / "pair.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    make += " -addext basicConstraints=critical,CA:FALSE -addext subjectAltName=DNS:localhost"
    make += f" -keyout {pair} -out {tmp_path / 'certificate.pem'}"
    subprocess.run(make.split(), check=True, capture_output=True)
    with pair.open("a") as file:
        file.write((tmp_path / "certificate.pem").read_text())
    (tmp_path / "files").mkdir()
    for name in ("apogee.fits", "my apogee.fits"):
        (tmp_path / "files" / name).write_bytes((small_sky / "apogee.fits").read_bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    with web_server(tmp_path / "files", pair) as address:
        file, spaced = f"{address}/apogee.fits", as_path(f"{address}/my%20apogee.fits")
        assert sha256_of_file(spaced) == sha256_of_file(small_sky / "apogee.fits")
        made = api.ingest("apogee-dr17", [file], tmp_path / "web")
        with pytest.raises(SosError, match=r"none\.fits does not exist"):
            api.ingest("apogee-dr17", [f"{address}/none.fits"], tmp_path / "none")
        with pytest.raises(ConfigError, match="can only be read"):
            api.ingest("apogee-dr17", [file], f"{address}/out")
    alone = api.ingest("apogee-dr17", [small_sky / "apogee.fits"], tmp_path / "disk")
    assert [one.sha256 for one in made.files] == [one.sha256 for one in alone.files]

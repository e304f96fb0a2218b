"""TLS: certificates that are made, and who gets in with them."""

import shutil
import stat

import pytest

from sos_dask.errors import ClusterError, ConfigError, StorageError
from sos_dask.run.certificates import make_certificates
from sos_dask.run.cluster import start
from sos_dask.run.workers import Workers
from tests.apart import apart


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> dict[str, str]:
    made = make_certificates(tmp_path_factory.mktemp("tls") / "new")
    return {name: str(file) for name, file in made.items()}


def test_keys_are_of_their_owner_alone(tls, tmp_path):
    folder = tmp_path / "certs"
    made = make_certificates(folder, 2)
    assert {oct(stat.S_IMODE(one.stat().st_mode)) for one in folder.iterdir()} == {"0o600"}
    before = made["key"].read_bytes()
    with pytest.raises(StorageError, match="exists"):
        make_certificates(folder)
    assert made["key"].read_bytes() == before


def test_what_openssl_says_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: "false")
    with pytest.raises(ConfigError, match="openssl failed"):
        make_certificates(tmp_path / "a")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="need the program openssl"):
        make_certificates(tmp_path / "a")


def test_the_command(cli, tmp_path):
    ran = cli("cluster", "certs", "certificates", "--days", 3)
    assert ran.code == 0 and "[cluster.tls]" in ran.out
    assert f'key = "{tmp_path}/certificates/key.pem"' in ran.out.replace("\n", "")
    assert cli("cluster", "certs", "certificates").code == 9


def test_workers_of_this_machine_speak_tls(tls):
    with start(1, tls=tls) as cluster:
        assert cluster.run(str, [1, 2], "work") == ["1", "2"]
        addresses = [*cluster.workers.there(), Workers.of(cluster.client).place]
        assert all(one.startswith("tls://") for one in addresses)


def test_only_who_has_a_certificate_gets_in(tls, tmp_path):
    options = [word for name, file in tls.items() for word in (_OPTION[name], file)]
    other = {x: str(y) for x, y in make_certificates(tmp_path / "others").items()}
    with apart(tmp_path, 1, *options, "--protocol", "tls") as made:
        with start(scheduler=str(made.file), tls=tls) as cluster:
            assert cluster.run(str, [1], "work") == ["1"]
        for given in (None, other):
            with (
                pytest.raises(ClusterError, match="no Dask scheduler answers"),
                start(scheduler=str(made.file), tls=given),
            ):
                pass


_OPTION = {"ca_file": "--tls-ca-file", "cert": "--tls-cert", "key": "--tls-key"}


def test_a_file_that_is_missing(tls):
    with (
        pytest.raises(ConfigError, match=r"cluster\.tls\.key: there is no file gone"),
        start(1, tls=tls | {"key": "gone"}),
    ):
        pass

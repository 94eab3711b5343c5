"""The stack's certificate: what browsers would refuse is refused before anything starts; a self-signed one is made."""

from __future__ import annotations

import io
import ipaddress
import ssl
import stat
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from cv_platform.containers.certificate import (
    certificate_problems,
    certificate_warnings,
    install,
    make_certificate,
)
from cv_platform.containers.env_file import read_env
from cv_platform.errors import ConfigError, ServiceError

VALUES = {"TLS_CERTIFICATE": "own.pem", "TLS_KEY": "own.key", "PUBLIC_HOST": "vision.example.org"}
NAMES = (
    x509.DNSName("localhost"),
    x509.DNSName("vision.example.org"),
    x509.IPAddress(ipaddress.ip_address("10.1.2.3")),
)


def write_pair(
    folder: Path,
    *,
    begins_in_days: float = -1,
    ends_in_days: float = 90,
    encryption: KeySerializationEncryption | None = None,
) -> None:
    """Writes a leaf that some authority has signed, whose certificate nobody here has, as `own.pem` and `own.key`."""
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name.from_rfc4514_string("CN=An authority"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=begins_in_days))
        .not_valid_after(now + timedelta(days=ends_in_days))
        .add_extension(x509.SubjectAlternativeName(NAMES), critical=True)
        .sign(authority, hashes.SHA256())
    )
    (folder / "own.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    (folder / "own.key").write_bytes(secret)
    (folder / "own.key").chmod(0o600)


def test_a_valid_pair_is_no_problem_for_any_of_its_names(tmp_path: Path) -> None:
    write_pair(tmp_path)
    for host in ("vision.example.org", "10.1.2.3", ""):
        assert certificate_problems({**VALUES, "PUBLIC_HOST": host}, tmp_path) == []
    assert certificate_warnings(VALUES, tmp_path) == []


def test_without_tls_there_is_nothing_to_check(tmp_path: Path) -> None:
    assert certificate_problems({"TLS_CERTIFICATE": "", "TLS_KEY": ""}, tmp_path) == []
    assert certificate_warnings({}, tmp_path) == []


@pytest.mark.parametrize("name", ["TLS_CERTIFICATE", "TLS_KEY"])
def test_one_without_the_other_is_named(name: str, tmp_path: Path) -> None:
    (problem,) = certificate_problems({**VALUES, name: ""}, tmp_path)
    assert f"Received: no {name}" in problem


def test_files_that_are_not_there_are_both_named(tmp_path: Path) -> None:
    problems = certificate_problems(VALUES, tmp_path)
    assert [problem.split(":")[0] for problem in problems] == ["TLS_CERTIFICATE", "TLS_KEY"]
    assert all("No such file" in problem for problem in problems)


def test_a_key_in_the_place_of_the_certificate(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (problem,) = certificate_problems({**VALUES, "TLS_CERTIFICATE": "own.key"}, tmp_path)
    assert "TLS_CERTIFICATE: expected PEM with `BEGIN CERTIFICATE`" in problem


def test_a_damaged_certificate(tmp_path: Path) -> None:
    write_pair(tmp_path)
    text = (tmp_path / "own.pem").read_text()
    (tmp_path / "own.pem").write_text(text[:100] + text[140:])
    (problem,) = certificate_problems(VALUES, tmp_path)
    assert "own.pem" in problem


def test_the_key_of_another_certificate(tmp_path: Path) -> None:
    write_pair(tmp_path)
    certificate = (tmp_path / "own.pem").read_text()
    write_pair(tmp_path)
    (tmp_path / "own.pem").write_text(certificate)
    (problem,) = certificate_problems(VALUES, tmp_path)
    assert "Received: the key of another certificate" in problem


def test_a_key_with_a_passphrase_asks_nobody(tmp_path: Path) -> None:
    write_pair(tmp_path, encryption=BestAvailableEncryption(b"correct horse"))
    (problem,) = certificate_problems(VALUES, tmp_path)
    assert "a key with a passphrase" in problem


@pytest.mark.parametrize(
    ("begins_in_days", "ends_in_days", "received"),
    [(-90, -1, "one that has expired"), (1, 90, "one that is not valid yet")],
)
def test_a_certificate_out_of_its_time(
    begins_in_days: float, ends_in_days: float, received: str, tmp_path: Path
) -> None:
    write_pair(tmp_path, begins_in_days=begins_in_days, ends_in_days=ends_in_days)
    (problem,) = certificate_problems(VALUES, tmp_path)
    assert f"Received: {received}" in problem
    assert certificate_warnings(VALUES, tmp_path) == []


@pytest.mark.parametrize(("host", "received"), [("other.example.org", "other names"), ("10.9.9.9", "other addresses")])
def test_a_certificate_for_other_hosts(host: str, received: str, tmp_path: Path) -> None:
    write_pair(tmp_path)
    (problem,) = certificate_problems({**VALUES, "PUBLIC_HOST": host}, tmp_path)
    assert f"for {host} (PUBLIC_HOST). Received: {received}" in problem


@pytest.mark.parametrize(("mode", "is_refused"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True)])
def test_others_may_not_read_the_key(mode: int, is_refused: bool, tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "own.key").chmod(mode)
    problems = certificate_problems(VALUES, tmp_path)
    assert [f"mode {mode:o}" in problem and "chmod 600" in problem for problem in problems] == [True] * is_refused


def test_says_that_a_certificate_ends_soon(tmp_path: Path) -> None:
    write_pair(tmp_path, ends_in_days=9.2)
    assert certificate_problems(VALUES, tmp_path) == []
    (warning,) = certificate_warnings(VALUES, tmp_path)
    assert "ends in 9 day(s)" in warning
    assert "make stack-reload" in warning


def test_makes_a_certificate_that_a_client_accepts_for_each_name_and_an_authority_for_none(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("PUBLIC_HOST=vision.example.org\nBIND_ADDRESS=10.1.2.3\n# mine\nTLS_CERTIFICATE=\nTLS_KEY=\n")
    env_file.chmod(0o600)
    certificate = make_certificate(env_file, read_env(env_file))
    values = read_env(env_file)
    assert values["TLS_CERTIFICATE"] == "tls/certificate.pem"
    assert "# mine" in env_file.read_text()
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "tls" / "key.pem").stat().st_mode) == 0o600
    for host in ("vision.example.org", "localhost", "127.0.0.1", "::1", "10.1.2.3"):
        assert certificate_problems({**values, "PUBLIC_HOST": host}, tmp_path) == []
    made = x509.load_pem_x509_certificate(certificate.read_bytes())
    assert made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert made.not_valid_after_utc - made.not_valid_before_utc <= timedelta(days=398)


def test_makes_it_anew_and_another_one(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("PUBLIC_HOST=localhost\n")
    first = make_certificate(env_file, read_env(env_file)).read_text()
    assert make_certificate(env_file, read_env(env_file)).read_text() != first
    assert certificate_problems(read_env(env_file), tmp_path) == []


def test_an_any_address_is_no_name(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("BIND_ADDRESS=0.0.0.0\n")
    made = x509.load_pem_x509_certificate(make_certificate(env_file, read_env(env_file)).read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


def test_leaves_the_users_own_files_alone(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("TLS_CERTIFICATE=own.pem\nTLS_KEY=own.key\n")
    with pytest.raises(ConfigError, match="files of your own"):
        make_certificate(env_file, read_env(env_file))
    assert list(tmp_path.iterdir()) == [env_file]


def test_refuses_a_host_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PUBLIC_HOST"):
        make_certificate(tmp_path / ".env", {"PUBLIC_HOST": "localhost,IP:10.0.0.1"})


def fake_docker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Makes a `docker` of our own all that is on PATH besides the shell's commands."""
    for name in ("sh", "cat"):
        (folder / name).symlink_to(f"/bin/{name}")
    (folder / "docker").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_without_openssl_it_asks_nginxs_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path)
    (tmp_path / "bin").mkdir()
    script = f'echo "$*" >{tmp_path}/asked; cat >{tmp_path}/request; cat {tmp_path}/own.key {tmp_path}/own.pem'
    fake_docker(tmp_path / "bin", monkeypatch, script)
    env_file = tmp_path / ".env"
    env_file.write_text("NGINX_IMAGE=here/nginx:1\n")
    assert make_certificate(env_file, read_env(env_file)).read_text() == (tmp_path / "own.pem").read_text()
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("run --rm --interactive --network none --entrypoint openssl here/nginx:1 req -x509 ")
    assert "subjectAltName = DNS:localhost,IP:127.0.0.1,IP:::1" in (tmp_path / "request").read_text()


def test_without_any_openssl_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(tmp_path, monkeypatch, "echo 'openssl: not found' >&2; exit 127")
    with pytest.raises(ServiceError, match="Install openssl"):
        make_certificate(tmp_path / ".env", {})


def test_gives_nginx_both_files_at_once_for_its_group_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path)
    (tmp_path / "bin").mkdir()
    fake_docker(tmp_path / "bin", monkeypatch, f'echo "$*" >{tmp_path}/asked; cat >{tmp_path}/sent.tar')
    install("c0ffee", VALUES, tmp_path)
    assert (tmp_path / "asked").read_text() == "cp - c0ffee:/etc/nginx/tls\n"
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "sent.tar").read_bytes())) as archive:
        found = {m.name: (m.uid, m.gid, m.mode) for m in archive.getmembers()}
        archive.extractall(tmp_path / "sent", filter="data")
    assert found == {"certificate.pem": (0, 101, 0o440), "key.pem": (0, 101, 0o440)}
    for sent, given in (("certificate.pem", "own.pem"), ("key.pem", "own.key")):
        assert (tmp_path / "sent" / sent).read_bytes() == (tmp_path / given).read_bytes()


def test_the_number_for_trusting_a_certificate_itself_is_pythons() -> None:
    from cv_platform.containers import certificate

    assert certificate._PARTIAL_CHAIN == ssl.VERIFY_X509_PARTIAL_CHAIN


def test_a_key_that_cannot_be_read(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (problem,) = certificate_problems({**VALUES, "TLS_KEY": "."}, tmp_path)
    assert "TLS_KEY: expected a file that you can read" in problem
    assert "Is a directory" in problem

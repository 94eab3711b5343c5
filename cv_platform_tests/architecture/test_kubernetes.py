"""The manifests for Kubernetes, which no test runs: they say what `docker/compose.yaml` says, in another language."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cv_platform_tests.support.stack_files import COMPOSE, DOCKER, REPOSITORY, SERVICES

K8S = REPOSITORY / "k8s"
VERSION = "1.34"
RESOURCES = {
    (resource["kind"], resource["metadata"]["name"]): resource
    for path in sorted((K8S / "base").glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for resource in yaml.safe_load_all(path.read_text())
}
POD: dict[str, Any] = RESOURCES["StatefulSet", "service"]["spec"]["template"]["spec"]
DAGSTER: dict[str, Any] = yaml.safe_load((K8S / "dagster-values.yaml").read_text())
CODE: dict[str, Any] = DAGSTER["dagster-user-deployments"]["deployments"][0]
RAY: dict[str, Any] = yaml.safe_load((K8S / "raycluster.yaml").read_text())["spec"]
RAY_PODS = {
    "head": RAY["headGroupSpec"]["template"]["spec"],
    **{group["groupName"]: group["template"]["spec"] for group in RAY["workerGroupSpecs"]},
}


def as_by_default(value: str) -> str:
    """Returns what Compose makes of a value without docker/.env; a secret becomes nothing."""
    return re.sub(r"\$\{[A-Z_]+(?:(:-)([^}]*)|:[+?][^}]*)\}", lambda found: found[2] or "", str(value))


def in_kubernetes(size: str) -> str:
    return as_by_default(size).upper() + "i"


def env_file(name: str) -> dict[str, str]:
    lines = (K8S / "overlays" / "example" / f"{name}.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def test_the_schemas_know_every_field() -> None:
    for resource in RESOURCES.values():
        kubernetes_validate.validate(resource, VERSION, strict=True)
    pods = {name: {"apiVersion": "v1", "kind": "Pod", "spec": spec} for name, spec in RAY_PODS.items()}
    for pod in pods.values():
        kubernetes_validate.validate(pod, VERSION, strict=True)
    pods["head"]["spec"] = {**RAY_PODS["head"], "terminationGracePeriodSecond": 45}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pods["head"], VERSION, strict=True)


def test_kustomize_finds_what_it_names() -> None:
    base = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())
    assert {*base["resources"], "kustomization.yaml"} == {path.name for path in (K8S / "base").iterdir()}
    overlay = yaml.safe_load((K8S / "overlays" / "example" / "kustomization.yaml").read_text())
    named = {
        (kind, one["name"])
        for kind, key in (("ConfigMap", "configMap"), ("Secret", "secret"))
        for one in overlay[f"{key}Generator"]
    }
    assert named == {(kind, name) for kind in ("ConfigMap", "Secret") for name in ("service", "platform")}
    for secret in overlay["secretGenerator"]:
        assert (K8S / "overlays" / "example" / f"{secret['envs'][0]}.example").is_file()
        ignored = (REPOSITORY / ".gitignore").read_text().splitlines()
        assert "/k8s/overlays/*/*.env" in ignored


def test_the_services_settings_are_composes() -> None:
    settings, secrets = RESOURCES["ConfigMap", "service"]["data"], env_file("service")
    environment = SERVICES["service"]["environment"]
    assert settings.keys() | secrets.keys() == environment.keys()
    assert settings == {name: as_by_default(environment[name]) for name in settings}


def test_the_platforms_settings_are_composes() -> None:
    settings, secrets = RESOURCES["ConfigMap", "platform"]["data"], env_file("platform")
    environment = COMPOSE["x-platform-environment"]
    # The chart names its own code location, no proxy is in a pod's environment unless somebody puts it there, and a
    # cluster has a Prometheus and receivers of its own.
    others = {"CV_CODE_HOST", "NO_PROXY", "no_proxy", "PROMETHEUS_URL", "<<"}
    assert settings.keys() | secrets.keys() == environment.keys() - others
    expected = {name: as_by_default(environment[name]) for name in settings}
    for name in ("CV_RAY_ADDRESS", "CV_RAY_JOBS_URL"):  # KubeRay calls the head after its cluster.
        expected[name] = re.sub("ray-(node-)?head", "cv-platform-head-svc", expected[name])
    assert settings == expected


def test_the_service_is_started_as_in_compose() -> None:
    service, [container] = SERVICES["service"], POD["containers"]
    assert container["image"] == as_by_default(service["image"])
    assert [port["containerPort"] for port in container["ports"]] == [4242]
    assert "EXPOSE 4242\n" in (DOCKER / "service.Dockerfile").read_text()
    assert container["resources"]["limits"]["memory"] == in_kubernetes(service["mem_limit"])
    assert float(container["resources"]["limits"]["cpu"]) == pytest.approx(float(as_by_default(service["cpus"])))
    assert POD["terminationGracePeriodSeconds"] == int(service["stop_grace_period"].removesuffix("s"))
    assert ["CMD", *container["readinessProbe"]["exec"]["command"]] == service["healthcheck"]["test"]
    seconds = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert seconds == int(service["healthcheck"]["start_period"].removesuffix("s"))
    assert RESOURCES["StatefulSet", "service"]["spec"]["replicas"] == int(as_by_default(service["deploy"]["replicas"]))


def test_the_service_writes_where_it_does_in_compose_and_its_spool_outlives_it() -> None:
    service, [container] = SERVICES["service"], POD["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {f"{name}:{path}" for name, path in mounts.items() if name != "tmp"} == set(service["volumes"])
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    size = re.fullmatch(r"/tmp:size=(\d+)m,.*", service["tmpfs"][0])
    assert size is not None
    assert volumes["tmp"]["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{size[1]}Mi"}
    stateful = RESOURCES["StatefulSet", "service"]["spec"]
    [spool] = stateful["volumeClaimTemplates"]
    assert spool["metadata"]["name"] == "spool"
    assert set(stateful["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}
    most = int(RESOURCES["ConfigMap", "service"]["data"]["CV_SPOOL_MAX_BYTES"])
    assert int(spool["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) * 2**30 > most


def test_nothing_has_rights_beyond_those_of_its_user() -> None:
    pods = {"service": POD, **RAY_PODS}
    contexts = [
        (spec["securityContext"], one["securityContext"]) for spec in pods.values() for one in spec["containers"]
    ]
    dagsters = (CODE, DAGSTER["dagsterWebserver"], DAGSTER["dagsterDaemon"])
    contexts += [(one["podSecurityContext"], one["securityContext"]) for one in dagsters]
    for pod, container in contexts:
        assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == SERVICES["service"]["user"] == COMPOSE["x-platform"]["user"]
        assert pod["runAsNonRoot"] is container["readOnlyRootFilesystem"] is True
        assert container["capabilities"] == {"drop": ["ALL"]}
        assert container["allowPrivilegeEscalation"] is False
    assert not any(spec["automountServiceAccountToken"] for spec in pods.values())


def test_dagsters_processes_are_composes() -> None:
    code = SERVICES["dagster-code"]
    for one in (CODE, DAGSTER["dagsterWebserver"], DAGSTER["dagsterDaemon"]):
        assert f"{one['image']['repository']}:{one['image']['tag']}" == as_by_default(code["image"])
    assert f"--port {CODE['port']} {' '.join(CODE['codeServerArgs'])}" in code["command"][-1]
    mounted = {f"{mount['name']}:{mount['mountPath']}" for mount in CODE["volumeMounts"]}
    assert {volume for volume in code["volumes"] if not volume.startswith(".")} <= mounted
    for one, name in ((CODE, "code"), (DAGSTER["dagsterWebserver"], "webserver"), (DAGSTER["dagsterDaemon"], "daemon")):
        expected = in_kubernetes(SERVICES[f"dagster-{name}"]["mem_limit"])
        assert one["resources"]["limits"]["memory"] == expected
        assert {"name": "tmp", "mountPath": "/tmp"} in one["volumeMounts"]
    assert DAGSTER["postgresql"]["enabled"] is False


def test_dagsters_instance_is_composes() -> None:
    instance = yaml.safe_load((DOCKER / "dagster" / "dagster.yaml").read_text())
    snake = {
        section: {
            re.sub(r"(?<=[a-z])([A-Z])", lambda found: f"_{found[1].lower()}", name): value
            for name, value in DAGSTER["dagsterDaemon"][key].items()
        }
        for section, key in (("run_monitoring", "runMonitoring"), ("run_retries", "runRetries"))
    }
    more = DAGSTER["additionalInstanceConfig"]
    assert {**snake, **more} == {name: instance[name] for name in (*snake, *more)}
    assert DAGSTER["retention"]["sensor"]["purgeAfterDays"] == instance["retention"]["sensor"]["purge_after_days"]
    logs = instance["compute_logs"]["config"]["base_dir"]
    assert DAGSTER["computeLogManager"]["config"]["localComputeLogManager"]["baseDir"] == logs
    assert "DAGSTER_HOME=" + DAGSTER["global"]["dagsterHome"] in (DOCKER / "platform.Dockerfile").read_text()


def test_pods_hear_those_who_reach_them_in_compose() -> None:
    policies = {name: one["spec"] for (kind, name), one in RESOURCES.items() if kind == "NetworkPolicy"}
    assert policies["nothing-else"]["podSelector"] == {}
    assert "ingress" not in policies["nothing-else"]
    [service] = policies["service"]["ingress"]
    assert [port["port"] for port in service["ports"]] == [4242]
    assert all("podSelector" not in one for one in service["from"]), "no pod beside it, but those of other namespaces"
    [code] = policies["dagster-code"]["ingress"]
    assert [port["port"] for port in code["ports"]] == [CODE["port"]]
    callers = {name for name, one in SERVICES.items() if "code" in one["networks"]} - {
        "dagster-code",
        "dagster-code-gpu",
    }
    assert set(code["from"][0]["podSelector"]["matchExpressions"][0]["values"]) == callers


def test_rays_nodes_have_the_version_that_is_locked() -> None:
    assert f"\nray=={RAY['rayVersion']} " in (REPOSITORY / "requirements.lock").read_text()
    platform = as_by_default(COMPOSE["x-platform"]["image"])
    for spec in RAY_PODS.values():
        [container] = spec["containers"]
        assert container["image"] == platform
        assert {source for one in container["envFrom"] for source in one} == {"configMapRef", "secretRef"}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/data/home", "/data/storage", "/tmp"}


def test_the_readme_says_that_nothing_of_it_was_run() -> None:
    assert "**Not run.**" in (K8S / "README.md").read_text()


def test_no_secret_is_in_the_repository() -> None:
    for path in Path(K8S).rglob("*.yaml"):
        assert "kind: Secret" not in path.read_text()
    assert all(
        value == "" or "PASSWORD@" in value for name in ("service", "platform") for value in env_file(name).values()
    )

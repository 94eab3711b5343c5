"""Alert rules and what is scraped for them, read without an engine; `make stack-test` runs promtool on them too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml

from cv_platform.config import MonitorConfig
from cv_platform.monitoring import service_alerts
from cv_platform.monitoring.exported_metrics import HELP
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform_tests.support.stack_files import DOCKER, REPOSITORY, SERVICES
from trials.stack.promql import RULES, Query, dashboard_queries, rule_queries

METRICS = (REPOSITORY / "docs" / "reference" / "metrics.md").read_text()
ALERTS_GUIDE = (REPOSITORY / "docs" / "how-to" / "alerts.md").read_text()
PROMETHEUS: dict[str, Any] = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
ALERTMANAGER: dict[str, Any] = yaml.safe_load((DOCKER / "alertmanager" / "alertmanager.yml").read_text())
GROUPS = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
TESTS = sorted((DOCKER / "prometheus" / "tests").glob("*.yml"))
QUERIES = [*dashboard_queries(), *rule_queries()]
EXPORTED = re.findall(r"^(\w+)$", Path(__file__).with_name("exposed_metrics.txt").read_text(), re.MULTILINE)

every_alert = pytest.mark.parametrize("name", sorted(ALERTS))


def of_the_service() -> set[str]:
    registry = prometheus_client.CollectorRegistry()
    ServingMetrics(registry)
    kinds = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in registry.collect() for suffix in kinds[family.type]}


def of_nginx() -> set[str]:
    text = (DOCKER / "nginx" / "templates" / "metrics.conf.template").read_text()
    return set(re.findall(r"# TYPE (\w+) gauge", text))


def test_alerts_have_names_of_their_own() -> None:
    assert len(ALERTS) == sum(len(group["rules"]) for group in GROUPS)
    assert len({group["name"] for group in GROUPS}) == len(GROUPS)


@every_alert
def test_an_alert_says_what_is_wrong_how_bad_it_is_and_where_to_read_on(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/how-to/alerts.md#alert-{name.lower()}"
    assert f"\n## Alert {name}\n" in ALERTS_GUIDE


def test_no_section_speaks_of_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^## Alert (\w+)$", ALERTS_GUIDE, re.MULTILINE)) == set(ALERTS)


@every_alert
def test_an_alert_is_seen_to_fire_and_to_be_silent_by_promtool(name: str) -> None:
    cases = [
        case
        for path in TESTS
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == name
    ]
    assert any(case.get("exp_alerts") for case in cases)
    assert any(not case.get("exp_alerts") for case in cases)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.source} {query.name}")
def test_asks_for_metrics_that_something_exposes(query: Query) -> None:
    known = of_the_service() | of_nginx() | set(HELP) | set(EXPORTED) | {"up", "ALERTS"}
    assert query.metrics
    assert query.metrics <= known


def test_metrics_are_told_from_functions_labels_and_strings() -> None:
    text = (
        'sum by (le, job) (rate(a_total{route=~"/b.*",c="d"}[$__rate_interval])) / on (e) group_left (f) '
        'max_over_time(count(g == 1)[1h:1m]) > bool 0.5e3 or absent(h offset 5m) and i{j=~"$k"} unless time() - l'
    )
    assert Query("file", "name", text).metrics == {"a_total", "g", "h", "i", "l"}
    assert Query("file", "name", text).plain.count("$") == 0


def test_documented_metrics_are_exposed() -> None:
    documented = {
        name for row in re.findall(r"^\| (`cv_[^|]+)\|", METRICS, re.MULTILINE) for name in re.findall(r"cv_\w+", row)
    }
    exposed = of_the_service() | {re.sub(r"_bucket$", "", name) for name in of_the_service()} | set(HELP)
    assert documented <= exposed
    assert documented >= set(HELP)


def test_prometheus_scrapes_services_of_the_stack() -> None:
    hosts: set[str] = set()
    for job in PROMETHEUS["scrape_configs"]:
        for static in job.get("static_configs", []):
            hosts |= {target.partition(":")[0] for target in static["targets"]}
        for discovered in job.get("dns_sd_configs", []):
            hosts |= set(discovered["names"])
    exporters = {name for name in SERVICES if "exporter" in name}
    assert hosts - {"localhost"} <= set(SERVICES)
    assert {"service", "nginx", "alertmanager", *exporters} <= hosts


def test_nginx_asks_each_page_that_prometheus_wants_to_know_of() -> None:
    (pages,) = [job for job in PROMETHEUS["scrape_configs"] if job["job_name"] == "page"]
    template = (DOCKER / "nginx" / "templates" / "metrics.conf.template").read_text()
    assert set(pages["static_configs"][0]["targets"]) == set(
        re.findall(r"^ +/probe/([a-z-]+) http", template, re.MULTILINE)
    )
    assert "listen 9113" in template
    assert not any(port.endswith(":9113") for port in SERVICES["nginx"]["ports"])


def test_alertmanager_silences_only_what_follows_from_another_alert() -> None:
    for rule in ALERTMANAGER["inhibit_rules"]:
        sources, targets = (
            {name for matcher in rule[key] for name in re.findall(r"[A-Z]\w+", matcher)}
            for key in ("source_matchers", "target_matchers")
        )
        assert sources | targets <= set(ALERTS)
        assert {ALERTS[name]["labels"]["severity"] for name in sources} == {"critical"}


def test_the_webhook_is_appended_to_the_one_receiver() -> None:
    base = (DOCKER / "alertmanager" / "alertmanager.yml").read_text()
    whole = yaml.safe_load(base + (DOCKER / "alertmanager" / "webhook.yml").read_text())
    assert ALERTMANAGER["receivers"] == [{"name": ALERTMANAGER["route"]["receiver"]}]
    assert whole["receivers"] == [
        {"name": "people", "webhook_configs": [{"url_file": "/tmp/webhook_url", "send_resolved": True}]}
    ]
    assert {**whole, "receivers": None} == {**ALERTMANAGER, "receivers": None}


def test_without_prometheus_the_same_thresholds_hold() -> None:
    def limits(name: str) -> list[float]:
        return [float(number) for number in re.findall(r"[><]=? ([\d.]+)", ALERTS[name]["expr"])]

    assert limits("SpoolOld") == [service_alerts.OLDEST_ENTRY_SECONDS]
    assert limits("UnknownImages") == [service_alerts.UNKNOWN_SHARE, service_alerts.FEWEST_IMAGES]
    weekly = MonitorConfig().period + service_alerts.STALE_AFTER
    assert limits("MonitoringStale") == [weekly.days]
    assert limits("LogEntriesRejected") == limits("ModelSwapFailed") == [0]
    source = Path(service_alerts.__file__).read_text()
    judged = set(re.findall(r'Trouble\(\s*"(\w+)"', source))
    assert judged == set(ALERTS) & set(re.findall(r"\w+", ALERTS_GUIDE.partition("\n## ")[0]))
    assert {"SpoolOld", "ModelSwapFailed", "UnknownImages", "MonitoringStale"} < judged

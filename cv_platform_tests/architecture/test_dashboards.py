"""Grafana's dashboards and provisioning, read without Grafana, which `make stack-test` has no need of either."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cv_platform_tests.support.stack_files import DOCKER, SERVICES
from trials.stack.promql import DASHBOARDS, dashboard_queries

SCHEMA = json.loads(Path(__file__).with_name("grafana_dashboard.schema.json").read_text())
FILES = sorted(DASHBOARDS.glob("*.json"))
PROVISIONING = DOCKER / "grafana" / "provisioning"

every_dashboard = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_there_is_a_dashboard_for_each_part() -> None:
    assert [path.stem for path in FILES] == ["drift", "host", "model", "service", "spool"]
    assert [load(path)["uid"] for path in FILES] == [path.stem for path in FILES]
    assert len({load(path)["title"] for path in FILES}) == len(FILES)


@every_dashboard
def test_is_in_the_shape_of_grafanas_model(path: Path) -> None:
    Draft202012Validator.check_schema(SCHEMA)
    errors = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(SCHEMA).iter_errors(load(path))]
    assert errors == []


@every_dashboard
def test_panels_have_numbers_and_queries_have_letters_of_their_own(path: Path) -> None:
    panels = load(path)["panels"]
    numbers = [panel["id"] for panel in panels]
    assert len(set(numbers)) == len(numbers)
    for panel in panels:
        letters = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(letters)) == len(letters)


@every_dashboard
def test_panels_lie_beside_each_other(path: Path) -> None:
    places = [panel["gridPos"] for panel in load(path)["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart or above


@every_dashboard
def test_uses_the_variables_that_it_has_and_no_others(path: Path) -> None:
    dashboard = load(path)
    own = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = {name for q in dashboard_queries() if q.source == path.name for name in re.findall(r"\$(\w+)", q.expression)}
    assert used - {"__rate_interval"} == own
    # All values is a regular expression.
    text = "".join(t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", []))
    assert re.findall(r'(?<!~)"\$', text) == []


@every_dashboard
def test_a_panel_with_several_series_says_which_is_which(path: Path) -> None:
    for panel in load(path)["panels"]:
        targets = panel.get("targets", [])
        assert len(targets) < 2 or all(target["legendFormat"] for target in targets)
        for target in targets:
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = re.search(r"by \(([^)]*)\)", target["expr"])
            assert kept is None or labels <= set(re.split(r",\s*", kept[1])) or "le" in kept[1]


def test_the_data_source_is_the_one_that_panels_name() -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["uid"], source["type"], source["url"]) == ("prometheus", "prometheus", "http://prometheus:9090")
    prometheus = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]


def test_grafana_finds_its_files_where_they_are_mounted() -> None:
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "files.yaml").read_text())["providers"]
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DASHBOARDS / Path(home).name).exists()


def test_grafana_has_no_login_but_nginxs_and_no_administrator() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Editor"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert "GF_SECURITY_ADMIN_PASSWORD" not in environment

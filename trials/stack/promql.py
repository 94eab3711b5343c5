"""Every PromQL expression of the dashboards and alert rules, asked of a running Prometheus.

Grafana itself is not needed: a panel whose expression gives no series here shows none there.
https://prometheus.io/docs/prometheus/latest/querying/api/
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import yaml

from benchmarks.options import REPOSITORY

DASHBOARDS = REPOSITORY / "docker" / "grafana" / "dashboards"
RULES = REPOSITORY / "docker" / "prometheus" / "rules"
_RATE_INTERVAL = "5m"
_LOOK_BACK = "30m"
"""What has had a series so lately counts as measured: replicas and models come and go."""
_STRINGS = re.compile(r"""r?"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""")
_LABEL_LISTS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAMES = re.compile(r"(?<![\w$.])[a-zA-Z_:][\w:]*(?![\w:])(?!\s*\()")
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan", "group_left", "group_right"}


@dataclass(frozen=True)
class Query:
    """One expression, as Grafana or Prometheus would ask it.

    Attributes:
        source: the file's name.
        name: of the panel, variable, annotation or alert.
        expression: with Grafana's own `$…`.
        is_condition: alerts and annotations are well when they give nothing; what they look at must be there all the
            same.
    """

    source: str
    name: str
    expression: str
    is_condition: bool = False

    @property
    def plain(self) -> str:
        """The expression without Grafana's variables: all values, five minutes."""
        return re.sub(r"\$\{?\w+\}?", ".*", self.expression.replace("$__rate_interval", _RATE_INTERVAL))

    @property
    def metrics(self) -> set[str]:
        """The names of the metrics in it."""
        text = _STRINGS.sub("", self.plain)
        text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
        return {name for name in _NAMES.findall(_LABEL_LISTS.sub(" ", text)) if name.lower() not in _WORDS}


@dataclass(frozen=True)
class Answer:
    """What Prometheus said to a query.

    Attributes:
        query: the question.
        series: how many it gave.
        error: Prometheus' own words, when it refused.
        unmeasured: metrics of the expression of which it has had no series lately.
    """

    query: Query
    series: int
    error: str | None
    unmeasured: tuple[str, ...]

    @property
    def gave_data(self) -> bool:
        """Whether a person sees something; for a condition: whether it could hold."""
        return self.error is None and (not self.unmeasured if self.query.is_condition else self.series > 0)

    def __str__(self) -> str:
        """Returns a line such as `host.json, Memory: 1 series`."""
        found = self.error or f"{self.series} series"
        lacks = f"; not measured: {', '.join(self.unmeasured)}" if self.unmeasured else ""
        return f"{self.query.source}, {self.query.name}: {found}{lacks}"


def dashboard_queries() -> list[Query]:
    """Returns what the dashboards ask: panels, variables and annotations."""
    return [
        query
        for path in sorted(DASHBOARDS.glob("*.json"))
        for query in _of_dashboard(path.name, json.loads(path.read_text(encoding="utf-8")))
    ]


def rule_queries() -> list[Query]:
    """Returns the conditions of the alert rules."""
    return [
        Query(path.name, rule["alert"], rule["expr"], is_condition=True)
        for path in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


def check_queries(prometheus_url: str, session: httpx.Client) -> list[Answer]:
    """Asks Prometheus every query of the dashboards and rules.

    Args:
        prometheus_url: such as `http://127.0.0.1:9090`.
        session: with nginx's login, where that stands before it.

    Raises:
        httpx.HTTPError: Prometheus cannot be reached, or the login is wrong.
    """
    queries = [*dashboard_queries(), *rule_queries()]
    measured = {
        name: bool(_ask(prometheus_url, session, f"count(last_over_time({name}[{_LOOK_BACK}]))")[0])
        for name in sorted(set().union(*(query.metrics for query in queries)))
    }
    answers: list[Answer] = []
    for query in queries:
        series, error = _ask(prometheus_url, session, query.plain)
        unmeasured = tuple(sorted(name for name in query.metrics if not measured[name]))
        answers.append(Answer(query, series, error, unmeasured))
    return answers


def _of_dashboard(source: str, dashboard: dict[str, Any]) -> Iterator[Query]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield Query(source, f"{panel['title']} {target['refId']}", target["expr"])
    for variable in dashboard["templating"]["list"]:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
        yield Query(source, f"${variable['name']}", f"group by ({label}) ({metric})")
    for annotation in dashboard["annotations"]["list"]:
        yield Query(source, annotation["name"], annotation["expr"], is_condition=True)


def _ask(prometheus_url: str, session: httpx.Client, expression: str) -> tuple[int, str | None]:
    """Returns how many series there are now, and why Prometheus refused."""
    response = session.post(f"{prometheus_url}/api/v1/query", data={"query": expression})
    if response.status_code in {httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY}:
        return 0, response.json()["error"]
    response.raise_for_status()
    result = response.json()["data"]
    if result["resultType"] != "vector":
        return 1, None
    return sum(sample["value"][1] != "NaN" for sample in result["result"]), None

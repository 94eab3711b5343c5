"""What PostgreSQL does for the queries of a block: its plans, with the pages that each node read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, event


@dataclass
class Plans:
    """What was asked, filled at the end of the block.

    Attributes:
        nodes: of all plans, as `EXPLAIN (ANALYZE, BUFFERS)` tells them.
        pages: read from memory or disk by all queries, each as often as it was read.
    """

    nodes: list[dict[str, Any]] = field(default_factory=list)
    pages: int = 0

    def sequential(self) -> set[str]:
        """Returns the tables that were read from beginning to end."""
        return {node["Relation Name"] for node in self.nodes if node["Node Type"] == "Seq Scan"}

    def most_rows(self, table: str) -> float:
        """Returns how many rows of a table one node looked at, the one with the most."""
        scans = [node for node in self.nodes if node.get("Relation Name") == table]
        seen = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
        return max(sum(node.get(name, 0) for name in seen) * node["Actual Loops"] for node in scans)


@contextmanager
def explained(engine: Engine) -> Iterator[Plans]:
    """Explains, in the end, each query that the block has sent: it is answered a second time."""
    asked: list[tuple[str, Any]] = []
    plans = Plans()

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.lstrip().startswith(("SELECT", "WITH")):
            asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield plans
    finally:
        event.remove(engine, "before_cursor_execute", note)
    with engine.connect() as connection:
        for statement, parameters in asked:
            explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
            ((found,),) = connection.exec_driver_sql(explain, parameters).scalars()
            top = found["Plan"]
            plans.pages += top["Shared Hit Blocks"] + top["Shared Read Blocks"]
            plans.nodes += _flat(top)


def _flat(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _flat(child)

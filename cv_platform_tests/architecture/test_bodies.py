"""Bodies of assets, sensors and jobs are as short as CONTRIBUTING.md promises: the work is in the domain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DECLARE = {"asset", "sensor", "run_failure_sensor", "schedule", "op", "job", "multi_observable_source_asset"}


def bodies() -> Iterator[tuple[str, int]]:
    """Yields each body's name and how many lines it has without its docstring, imports, comments and blank lines."""
    for path in (REPOSITORY / "cv_platform" / "defs").rglob("*.py"):
        text = path.read_text()
        lines = [line.strip() for line in text.splitlines()]
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef) and any(map(declares, function.decorator_list)):
                work = [statement for statement in function.body if not is_aside(statement)]
                counted = {n for one in work for n in range(one.lineno, (one.end_lineno or one.lineno) + 1)}
                yield f"{path.name}: {function.name}", sum(lines[n - 1][:1] not in {"", "#"} for n in counted)


def declares(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func).rpartition(".")[2] in DECLARE


def is_aside(statement: ast.stmt) -> bool:
    is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_docstring or isinstance(statement, ast.Import | ast.ImportFrom)


def test_bodies_are_as_short_as_promised() -> None:
    found = dict(bodies())
    assert len(found) > 25
    (most,) = re.findall(r"a body of about 15 lines, (\d+) at most", (REPOSITORY / "CONTRIBUTING.md").read_text())
    assert {name: lines for name, lines in found.items() if lines > int(most)} == {}
    assert max(found.values()) == int(most), "The promise can be shorter."

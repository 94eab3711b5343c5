"""What `make docs` adds to MkDocs: links to functions of the code lead to their lines, in pages of the site.

Documents link to files, as a repository's pages show them: [`Spool.begin`](../../cv_platform/…/spool.py).
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
CODE_LINK = re.compile(r"\[`([\w.]+)`\]\((\.\./[^)#]+\.py)\)")
"""The name of a function, class or value, and its file."""


def line_of(name: str, source: Path) -> int:
    """Returns the line where `name` (`function`, `Class.method`, `VALUE`) is defined.

    Raises:
        LookupError: the file has no such name.
    """
    node: ast.AST = ast.parse(source.read_text(encoding="utf-8"))
    for part in name.split("."):
        found = [child for child in ast.iter_child_nodes(node) if part in _names(child)]
        if not found:
            raise LookupError(f"Expected {name} in {source}. Received: a file without it. Correct the link.")
        node = found[0]
    return node.lineno  # pyright: ignore[reportAttributeAccessIssue]


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for each file of the code that a document links to."""
    from mkdocs.structure.files import File
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    linked = {
        normpath(f"docs/{dirname(file.src_uri)}/{target}")
        for file in files.documentation_pages()
        for _, target in CODE_LINK.findall(file.content_string)
    }
    for path in sorted(linked):
        look = HtmlFormatter(full=True, title=path, linenos="table", anchorlinenos=True, lineanchors="line")
        content = highlight((REPOSITORY / path).read_text(encoding="utf-8"), PythonLexer(), look)
        files.append(File.generated(config, f"source/{path}.html", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to the code's files into links to the lines of those pages."""
    folder = dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        path = normpath(f"docs/{folder}/{found[2]}")
        line = line_of(found[1], REPOSITORY / path)
        return f"[`{found[1]}`]({relpath(f'source/{path}.html', folder or '.')}#line-{line})"

    return CODE_LINK.sub(link, markdown)

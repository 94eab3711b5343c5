"""What the repository promises in words: documents whose links, commands and names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cv_platform.settings import Settings

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted([REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs").rglob("*.md")])
# The changelog names what has gone, too, and the import's table a user's files.
LASTING = [path for path in DOCUMENTS if path.name not in {"CHANGELOG.md", "import.md"}]
OTHER_FOLDERS = {"valid/", "test/", "reference/", "models/"}
"""Of a user's images, and of central storage."""
MAKEFILE = (REPOSITORY / "Makefile").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", LASTING, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_files_and_folders_that_are_named_exist(document: Path) -> None:
    ignored = (REPOSITORY / ".gitignore").read_text().split()
    made_later = tuple(line.removeprefix("/") for line in ignored if line.startswith("/"))
    named = set(re.findall(r"`(\.?\w[\w.-]*(?:/[\w.-]+)*(?:/|\.py)|\.?\w[\w.-]*(?:/[\w.-]+)+)`", document.read_text()))
    named = {name for name in named if not name.startswith(made_later)} - OTHER_FOLDERS
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_make_targets_exist(document: Path) -> None:
    named = set(re.findall(r"`make ([a-z][a-z-]*)", document.read_text()))
    known = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
    assert named <= known


def test_the_descriptions_of_make_help_begin_in_one_column() -> None:
    shown = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
    described = dict(re.findall(r"^([a-z-]+):.*## (.+)$", MAKEFILE, re.MULTILINE))
    lines = [line for line in shown.stdout.splitlines() if line.startswith("  make ")]
    assert len(lines) == len(described)
    columns = {line.removeprefix("  make ").find(f"  {described[line.split()[1]]}") for line in lines}
    assert columns == {max(map(len, described))}


def test_readme_describes_every_environment_variable() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    source = (REPOSITORY / "cv_platform" / "settings.py").read_text()
    names = r"CV_[A-Z_]+|DATABASE_URL|MLFLOW_TRACKING_URI|MLFLOW_PUBLIC_URL|EVIDENTLY_URL|DAGSTER_HOME|OTEL_[A-Z_]+"
    variables = set(re.findall(rf'"({names})"', source))
    assert len(variables) > 12
    assert {name for name in variables if f"`{name}`" not in readme} == set()
    example = (REPOSITORY / ".env.example").read_text()
    assert {name for name in variables if f"# {name}=" not in example} == set()


def test_readme_describes_every_config_section() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for section in ("model", "dataset", "validate", "train", "evaluate", "deploy", "monitor", "alerts"):
        assert f"| `{section}` |" in readme


def test_default_ports_are_those_of_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    settings = Settings.from_environment({})
    for port in (settings.service_port, settings.dagster_port, settings.mlflow_port, settings.evidently_port):
        assert str(port) in readme


def test_only_the_settings_module_reads_the_environment() -> None:
    # To the processes that they start; they read no setting.
    pass_it_on = {f"cv_platform/local/{name}.py" for name in ("environment", "mlflow_server", "run_program")}
    pass_it_on |= {"cv_platform/containers/engine.py"}
    readers = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "cv_platform").rglob("*.py")
        if re.search(r"os\.environ|os\.getenv", path.read_text())
    }
    assert readers == {"cv_platform/settings.py"} | pass_it_on


def test_the_cli_explains_itself() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cv_platform.cli", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    for command in ("demo", "run", "up", "down", "status", "migrate", "import-dataset", "validate-config"):
        assert command in result.stdout

"""What the repository promises in words: documents whose links, commands and names exist."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cv_platform import cli
from cv_platform.reference import augmentation_page, commands_page, configuration_page, environment_example
from cv_platform.settings import Settings

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [
        *(REPOSITORY / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")),
        *(REPOSITORY / "docs").rglob("*.md"),
    ]
)
# The changelog names what has gone, too, and the import's table a user's files.
LASTING = [path for path in DOCUMENTS if path.name not in {"CHANGELOG.md", "import.md"}]
OTHER_FOLDERS = {"valid/", "test/", "reference/", "models/", "audit/"}
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


def test_functions_that_are_linked_exist() -> None:
    hooks = runpy.run_path(str(REPOSITORY / "docs" / "hooks.py"))
    linked = [
        (name, document.parent / target)
        for document in DOCUMENTS
        for name, target in hooks["CODE_LINK"].findall(document.read_text())
    ]
    assert len(linked) > 30
    for name, source in linked:
        assert hooks["line_of"](name, source) > 0
    with pytest.raises(LookupError, match="Correct the link"):
        hooks["line_of"]("NoSuchName", Path(__file__))


@pytest.mark.parametrize(
    ("document", "written"),
    [
        ("docs/reference/configuration.md", configuration_page()),
        ("docs/reference/commands.md", commands_page(cli._parser())),
        ("docs/reference/augmentation.md", augmentation_page()),
        (".env.example", environment_example()),
    ],
    ids=["configuration", "commands", "augmentation", "environment"],
)
def test_documents_that_are_written_from_the_code_are_up_to_date(document: str, written: str) -> None:
    assert (REPOSITORY / document).read_text() == written, "Run `make reference`."


def test_the_example_of_the_environment_names_every_variable_once_and_sets_none() -> None:
    lines = environment_example().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []
    named = [found[1] for line in lines if (found := re.match(r"#([A-Z_]+)=", line))]
    assert sorted(named) == sorted(Settings.variables().values())


def test_the_readme_is_short_and_names_the_ports() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    settings = Settings.from_environment({})
    for port in (settings.service_port, settings.dagster_port, settings.mlflow_port, settings.evidently_port):
        assert f":{port}>" in readme


def test_the_client_and_the_images_of_the_stack_have_the_version_of_the_package() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    for name in ("docker/compose.yaml", "docker/notebook.Dockerfile", "cv_platform/containers/engine.py"):
        tags = re.findall(r"cv-platform/\w+:([\d.]+)", (REPOSITORY / name).read_text())
        assert set(tags) == {version}, name
    client = tomllib.loads((REPOSITORY / "cv_platform" / "client" / "pyproject.toml").read_text())["project"]
    assert client["version"] == version


def test_only_the_settings_module_reads_the_environment() -> None:
    # To the processes that they start; they read no setting.
    pass_it_on = {f"cv_platform/local/{name}.py" for name in ("environment", "mlflow_server", "run_program")}
    pass_it_on |= {"cv_platform/containers/engine.py", "cv_platform/serving/model/shadow.py"}
    pass_it_on |= {"cv_platform/training/together.py"}  # TensorFlow takes its place among several from TF_CONFIG.
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

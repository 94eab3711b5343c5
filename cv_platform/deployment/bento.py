"""Builds a Bento: what serving ships, with one model inside, so that it runs where there is no central storage.

The build runs in a process of its own: BentoML takes its home from the environment when it is imported.
https://docs.bentoml.com/en/latest/get-started/packaging-for-deployment.html
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cv_platform.errors import ExportError
from cv_platform.storage import BundleMetadata

logger = logging.getLogger(__name__)

SHIPPED: tuple[str, ...] = (
    "__init__.py",
    "audit.py",
    "errors.py",
    "files.py",
    "config",
    "cores.py",
    "loopback.py",
    "settings.py",
    "images",
    "properties.py",
    "predictions.py",
    "object_store.py",
    "probation.py",
    "storage.py",
    "client",
    "serving",
    "database",
)
"""The files and folders of `cv_platform` that a Bento holds: what serving may import, nothing else."""
SOURCES: tuple[str, ...] = ("bentofile.yaml", "bentos", *(f"cv_platform/{name}" for name in SHIPPED))
"""All files and folders that a Bento is built from, beside its model."""
BENTO_FOLDER = Path("bentos", "image_classifier")
BUNDLED_FOLDER = "bundled_model"
"""Beside the Bento's service.py: the model that it starts with when central storage names none."""
_PACKAGE = Path(__file__).resolve().parents[1]
_BUILD_TIMEOUT_SECONDS = 600.0


def build_bento(folder: Path, metadata: BundleMetadata, *, bentoml_home: Path, source: Path | None = None) -> str:
    """Builds a Bento around a bundle and returns its tag, `<model_name>:<version in lower case>`.

    Serve it with `BENTOML_HOME=<bentoml_home> bentoml serve <tag>`. A tag that exists already is left as it is, since
    a server may run it: the new build's version ends in -2, -3, …

    Args:
        folder: the bundle's files, see `CentralStorage.fetch_bundle`.
        metadata: the bundle's metadata.
        bentoml_home: Bento store, made when it is missing. One server per home: they share its metrics folder.
        source: folder that holds `bentofile.yaml` and `bentos/image_classifier`; by default the one that holds
            `cv_platform`.

    Raises:
        ExportError: the sources are not there, or BentoML refuses the build; with the end of its output.
    """
    source = source or _PACKAGE.parent
    if not (source / BENTO_FOLDER / "service.py").is_file():
        raise ExportError(
            f"Expected the service's sources in {source / BENTO_FOLDER}. Received: none. "
            "Build Bentos from a checkout of the repository."
        )
    bentoml_home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cv-bento-") as temporary:
        context = Path(temporary)
        write_build_context(context, folder, metadata, source=source)
        version = _free_version(bentoml_home, metadata)
        command = [
            "env",  # Adds to the environment of the child only.
            f"BENTOML_HOME={bentoml_home.resolve()}",
            "BENTOML_DO_NOT_TRACK=True",
            sys.executable,
            *("-m", "bentoml", "build", str(context), "--output", "tag"),
            *("--name", metadata.model_name, "--version", version),
        ]
        try:
            done = subprocess.run(
                command, cwd=context, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as err:
            raise ExportError(f"Expected BentoML to build {metadata.model_name}. Received: {err}") from err
    tags = [line.removeprefix("__tag__:") for line in done.stdout.splitlines() if line.startswith("__tag__:")]
    if done.returncode != 0 or not tags:
        output = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise ExportError(
            f"Expected BentoML to build {metadata.model_name}. Received: status {done.returncode}:\n{output}"
        )
    logger.info("Built the Bento %s", tags[-1])
    return tags[-1]


def write_build_context(context: Path, folder: Path, metadata: BundleMetadata, *, source: Path | None = None) -> None:
    """Fills `context` with all that goes into a Bento: the slice of the package, the service, the bundled model.

    Its requirements hold what the model's runtime needs: TensorFlow only for a model that runs by it.
    """
    from cv_platform.serving.model.fallback import write_fallback

    source = source or _PACKAGE.parent
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", BUNDLED_FOLDER)
    package = context / _PACKAGE.name
    package.mkdir(parents=True)
    for name in SHIPPED:
        if (_PACKAGE / name).is_dir():
            shutil.copytree(_PACKAGE / name, package / name, ignore=skip)
        else:
            shutil.copyfile(_PACKAGE / name, package / name)
    shutil.copytree(source / BENTO_FOLDER, context / BENTO_FOLDER, ignore=skip)
    further = context / BENTO_FOLDER / f"requirements-{metadata.runtime}.txt"
    if further.is_file():
        with (context / BENTO_FOLDER / "requirements.txt").open("a", encoding="utf-8") as requirements:
            requirements.write(further.read_text(encoding="utf-8"))
    for leftover in (context / BENTO_FOLDER).glob("requirements-*.txt"):
        leftover.unlink()
    # A regular package, or that of an installed checkout would be imported instead, wherever it stands in sys.path.
    (context / BENTO_FOLDER.parts[0] / "__init__.py").touch()
    shutil.copyfile(source / "bentofile.yaml", context / "bentofile.yaml")
    bundled = context / BENTO_FOLDER / BUNDLED_FOLDER
    write_fallback(folder, metadata, bundled)
    (bundled / ".lock").unlink(missing_ok=True)


def _free_version(bentoml_home: Path, metadata: BundleMetadata) -> str:
    first = metadata.version.lower()
    builds = bentoml_home / "bentos" / metadata.model_name
    taken = {path.name for path in builds.iterdir()} if builds.is_dir() else set()
    version, count = first, 1
    while version in taken:
        count += 1
        version = f"{first}-{count}"
    return version

"""`cv-platform reproduce`: trains a published version again, from what its bundle says, and compares both.

On the machine that trained it the weights are the same, to the last bit; elsewhere rounding differs, and each metric
that was recorded has to lie in the interval of the one measured now. Nothing is published, and nothing stays.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cv_platform.config import ExperimentConfig, parse_experiment
from cv_platform.errors import BundleNotFoundError, DatasetError, TrainingError
from cv_platform.settings import Settings
from cv_platform.storage import BundleMetadata, CentralStorage

if TYPE_CHECKING:
    from cv_platform.records import Evaluation, PackedImages

logger = logging.getLogger(__name__)

_REPOSITORY = Path(__file__).parents[2]
_CODE = ("training", "encoders", "images", "datasets/packing.py", "datasets/shards", "datasets/manifest.py")
"""Of `cv_platform`: what decides pixels, splits and weights."""
_LIBRARIES = ("tensorflow", "keras", "numpy", "imgaug", "opencv-python-headless")


@dataclass(frozen=True)
class Reproduction:
    """A version beside what training it again gives.

    Attributes:
        version: of the published model.
        same_weights: to the last bit.
        rows: metric, recorded, now, and the interval of what was measured now, which holds the recorded value or not.
        notes: what is not as it was, in sentences.
    """

    version: str
    same_weights: bool
    rows: tuple[tuple[str, float, float, tuple[float, float]], ...]
    notes: tuple[str, ...]

    @property
    def held(self) -> bool:
        """Whether the weights are the same, or no recorded metric is outside."""
        return self.same_weights or (bool(self.rows) and not self.outside)

    @property
    def outside(self) -> tuple[str, ...]:
        """The metrics whose recorded value does not lie in the interval."""
        return tuple(name for name, recorded, _, (low, high) in self.rows if not low <= recorded <= high)

    def __str__(self) -> str:
        """Returns the comparison for people."""
        lines = [*self.notes, f"weights: {'the same, to the last bit' if self.same_weights else 'others'}"]
        lines += [
            f"{name}: recorded {recorded:.4f}, now {now:.4f} ({low:.4f} to {high:.4f})"
            for name, recorded, now, (low, high) in self.rows
        ]
        if self.held:
            return "\n".join([*lines, f"{self.version} is reproduced."])
        outside = ", ".join(self.outside) or "no metric was recorded"
        return "\n".join([*lines, f"{self.version} is not reproduced: {outside}."])


def reproduce(
    settings: Settings, version: str, *, say: Callable[[str], None], other_code: bool = False
) -> Reproduction:
    """Trains a published version again and compares it.

    Args:
        settings: the installation, with the dataset's repository.
        version: of any published model.
        say: is given a line per step.
        other_code: train by the code and libraries that are here, where they are not those of the version.

    Raises:
        BundleNotFoundError: nobody has published the version.
        ConfigError: this release does not take the config that was recorded.
        DatasetError: the data are gone, or are others under the same tag.
        TrainingError: the code or the libraries are others, and `other_code` is not set; or the training fails.
    """
    storage = CentralStorage(settings.storage_url)
    model_name = next((name for name, known in storage.stored_bundles() if known == version), None)
    if model_name is None:
        raise BundleNotFoundError(
            f"Expected a published version. Received: {version}. Its folder in {settings.storage_url} names it."
        )
    metadata = storage.read_metadata(model_name, version)
    config = parse_experiment(metadata.effective_config, origin=f"the bundle of {model_name} {version}")
    notes = code_differences(metadata.git_commit, settings.revision)
    if notes and not other_code:
        commit = metadata.git_commit
        remedy = f"Run it in a checkout of that commit (git worktree add ../then {commit}; make setup there), or see"
        raise TrainingError(
            f"Expected the code and libraries that trained {version}. Received: {' '.join(notes)} "
            f"{remedy if commit else 'See'} what is here gives: --other-code."
        )
    with tempfile.TemporaryDirectory(prefix="reproduce-", dir=_scratch(settings)) as folder:
        return _compare(metadata, config, storage, settings, Path(folder), notes, say)


def code_differences(commit: str | None, revision: str | None, *, repository: Path = _REPOSITORY) -> tuple[str, ...]:
    """Returns in sentences what is not as it was at `commit`: code that decides the weights, and the lock's libraries.

    Args:
        commit: that trained the version; None where nobody knows.
        revision: of this installation, where it is no checkout, as in an image.
        repository: the checkout.
    """
    if commit is None:
        return ("Which commit trained it was not recorded.",)
    if _git(repository, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        if revision == commit:
            return ()
        return (f"The commit {commit[:12]} is not in {repository}: fetch it, if it still exists.",)
    notes = []
    paths = [f"cv_platform/{name}" for name in _CODE]
    changed = (_git(repository, "diff", "--name-only", commit, "--", *paths) or "").split()
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        notes.append(f"Changed since the commit {commit[:12]}: {', '.join(changed[:3])}{more}.")
    locked = dict(
        re.findall(r"^([\w.-]+)==([^\s;\\]+)", _git(repository, "show", f"{commit}:requirements.lock") or "", re.M)
    )
    for library in _LIBRARIES:
        installed = importlib.metadata.version(library)
        if library in locked and locked[library] != installed:
            notes.append(f"{library} {installed} is installed, and its lock has {locked[library]}.")
    return tuple(notes)


def _git(repository: Path, *arguments: str) -> str | None:
    """Returns what git prints; None where it fails, or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _scratch(settings: Settings) -> Path:
    cache = settings.home / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _compare(
    metadata: BundleMetadata,
    config: ExperimentConfig,
    storage: CentralStorage,
    settings: Settings,
    folder: Path,
    notes: tuple[str, ...],
    say: Callable[[str], None],
) -> Reproduction:
    from cv_platform.evaluation.classifier import load_classifier
    from cv_platform.evaluation.evaluate import evaluate_model
    from cv_platform.training.trainer import train_model, weights_sha256, with_own_weights

    # What it began with is no part of it: a name of a model in the home, which the folder here does not have.
    config = with_own_weights(config, settings.home / "models")
    say(f"looking for {metadata.ds_name} {metadata.dvc_tag} …")
    packed, manifest = _pack(metadata, config, settings)
    say(f"training {config.model.architecture} on {packed.counts['train']} images …")
    trained = train_model(packed, config, directory=folder / "models", spare_bytes=settings.spare_disk_bytes)
    say("evaluating …")
    # What is compared needs neither plots of errors nor corrupted images.
    quick = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"robustness_images": 0, "worst_errors": 0})}
    )
    now: Evaluation = evaluate_model(
        trained, packed, quick, champion=None, directory=folder / "evaluation", run=None, manifest=manifest
    )
    files, _ = storage.fetch_bundle(metadata.model_name, metadata.version, settings.home / "cache")
    published = load_classifier(files / f"{metadata.model_name}.keras", classes=len(metadata.class_names))
    rows = [
        (name, metadata.metrics[name], now.metrics[name], ends)
        for name, ends in now.intervals.items()
        if name in metadata.metrics and name in now.metrics
    ]
    return Reproduction(metadata.version, weights_sha256(published) == trained.weights_sha256, tuple(rows), notes)


def _pack(metadata: BundleMetadata, config: ExperimentConfig, settings: Settings) -> tuple[PackedImages, Path]:
    from cv_platform.datasets.manifest import read_manifest
    from cv_platform.datasets.packing import pack_images
    from cv_platform.datasets.versions import checkout_version

    version = checkout_version(config.dataset, config.model, home=settings.home)
    if version.provenance.dvc_md5 != metadata.dvc_md5:
        raise DatasetError(
            f"Expected {metadata.ds_name} {metadata.dvc_tag} as it was, DVC md5 {metadata.dvc_md5}. Received: "
            f"{version.provenance.dvc_md5}; somebody has moved the tag. Tag the commit of those images, and put its "
            "name into a copy of the config."
        )
    rows = read_manifest(version.manifest_path)
    quarantined = [str(path) for path in rows.loc[rows["status"] != "used", "path"]]
    packed = pack_images(
        version,
        config.model,
        quarantined=quarantined,
        home=settings.home,
        spare_bytes=settings.spare_disk_bytes,
        uint8_budget_bytes=config.dataset.packed_uint8_bytes,
        pack_scale=config.train.pack_scale,
    )
    return packed, version.manifest_path

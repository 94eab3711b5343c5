"""A version that is trained again: a real one, of scikit-learn's digits, by a small network in one epoch."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cv_platform.commands.reproduce import Reproduction, code_differences, reproduce
from cv_platform.config import ExperimentConfig, load_experiment, parse_experiment
from cv_platform.deployment.bundle import Place, Splits, publish_model
from cv_platform.errors import BundleNotFoundError, DatasetError, TrainingError
from cv_platform.records import TrainedModel
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage, new_version
from cv_platform_tests.support.record_samples import drift_detectors

pytestmark = pytest.mark.xdist_group("tensorflow")
REPOSITORY = Path(__file__).parents[3]


def quick_digits() -> ExperimentConfig:
    digits = load_experiment(REPOSITORY / "configs" / "digits.yaml").model_dump(mode="json")
    digits["model"] |= {"architecture": "small_cnn"}
    digits["train"] |= {"epochs": 1, "optimizer": "adam", "init_lr": 0.003}
    digits["evaluate"] |= {"robustness_images": 0}
    return parse_experiment(digits, origin="the test")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("reproduce")
    return Settings.from_environment({"CV_HOME": str(home), "CV_CONFIGS": str(home / "configs")})


@pytest.fixture(scope="module")
def published(settings: Settings) -> TrainedModel:
    from cv_platform.datasets.packing import open_split, pack_images
    from cv_platform.datasets.versions import checkout_version
    from cv_platform.drift.encoders import build_uae
    from cv_platform.evaluation.evaluate import evaluate_model
    from cv_platform.training.trainer import train_model

    config, home = quick_digits(), settings.home
    version = checkout_version(config.dataset, config.model, home=home)
    packed = pack_images(version, config.model, quarantined=(), home=home)
    trained = train_model(packed, config, directory=home / "models")
    evaluation = evaluate_model(trained, packed, config, champion=None, directory=home / "evaluation", run=None)
    splits = Splits(*(open_split(packed, split) for split in ("train", "valid", "test")))
    build_uae(trained.task.image_size, 4, 0).save(trained.directory / f"{trained.model.model_name}_uae.keras")
    detectors = drift_detectors(trained.directory, model=trained.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cv_platform.deployment.bundle.build_bento", lambda *_, **__: "digits:none")
        place = Place(CentralStorage(settings.storage_url), home / "bentoml", home / "cache")
        golden = splits.test.images[:4]
        publish_model(trained, detectors, evaluation, golden, deploy=config.deploy, place=place, splits=splits)
    return trained


def test_a_published_version_is_trained_again_to_the_same_weights(settings: Settings, published: TrainedModel):
    steps = list[str]()
    # The working tree of who runs this may differ from any commit.
    found = reproduce(settings, published.model.version, say=steps.append, other_code=True)
    assert found.same_weights
    assert found.held
    assert all(recorded == pytest.approx(now) for _, recorded, now, _ in found.rows)
    assert {"accuracy", "macro_f1"} <= {name for name, *_ in found.rows}
    assert "is reproduced" in str(found)
    assert [step.split()[0] for step in steps] == ["looking", "training", "evaluating"]
    assert not list((settings.home / "cache").glob("reproduce-*"))


def test_what_is_gone_or_another_is_said_before_anything_is_trained(settings: Settings, published: TrainedModel):
    say = list[str]().append
    with pytest.raises(TrainingError, match=r"Which commit trained it was not recorded.*--other-code"):
        reproduce(settings, published.model.version, say=say)
    with pytest.raises(BundleNotFoundError, match="Expected a published version"):
        reproduce(settings, new_version(), say=say, other_code=True)
    storage = CentralStorage(settings.storage_url)
    folder, metadata = storage.fetch_bundle(published.model.model_name, published.model.version, settings.home)
    moved = metadata.model_copy(update={"version": new_version(), "dvc_md5": "0" * 32})
    storage.publish_bundle(folder, moved)
    with pytest.raises(DatasetError, match=r"DVC md5 0{32}\. Received: .*moved the tag"):
        reproduce(settings, moved.version, say=say, other_code=True)
    gone = {**metadata.effective_config, "dataset": {**metadata.effective_config["dataset"], "dvc_tag": "v9.9.9"}}
    untagged = moved.model_copy(update={"version": new_version(), "effective_config": gone})
    storage.publish_bundle(folder, untagged)
    with pytest.raises(DatasetError, match=r"v9\.9\.9"):
        reproduce(settings, untagged.version, say=say, other_code=True)
    from_gone = {**metadata.effective_config["model"], "weights": "digits_classifier/20260131T060000Z-1f3c9a2e"}
    taught = moved.model_copy(
        update={"version": new_version(), "effective_config": {**metadata.effective_config, "model": from_gone}}
    )
    storage.publish_bundle(folder, taught)
    with pytest.raises(TrainingError, match=rf"1f3c9a2e, which is not in {settings.home / 'models'}\. Of"):
        reproduce(settings, taught.version, say=say, other_code=True)


def test_other_code_and_other_libraries_are_named(tmp_path: Path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    code, lock = tmp_path / "cv_platform" / "training" / "fitting.py", tmp_path / "requirements.lock"
    code.parent.mkdir(parents=True)
    code.write_text("a = 1\n")
    lock.write_text("keras==0.1 \\\n    --hash=sha256:0\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "Begin")
    commit = git("rev-parse", "HEAD")
    (only_keras,) = code_differences(commit, None, repository=tmp_path)
    assert only_keras.startswith("keras ")
    assert only_keras.endswith("its lock has 0.1.")
    code.write_text("a = 2\n")
    changed, _ = code_differences(commit, None, repository=tmp_path)
    assert changed == f"Changed since the commit {commit[:12]}: cv_platform/training/fitting.py."
    (gone,) = code_differences("1" * 40, None, repository=tmp_path)
    assert "is not in" in gone
    assert code_differences("1" * 40, "1" * 40, repository=tmp_path) == ()  # An image of that commit.


def test_other_weights_reproduce_where_each_recorded_metric_lies_in_the_interval():
    inside, outside = ("accuracy", 0.95, 0.94, (0.92, 0.96)), ("macro_f1", 0.99, 0.94, (0.92, 0.96))
    assert Reproduction("v", same_weights=False, rows=(inside,), notes=()).held
    found = Reproduction("v", same_weights=False, rows=(inside, outside), notes=())
    assert (found.held, found.outside) == (False, ("macro_f1",))
    assert "v is not reproduced: macro_f1." in str(found)
    assert not Reproduction("v", same_weights=False, rows=(), notes=()).held

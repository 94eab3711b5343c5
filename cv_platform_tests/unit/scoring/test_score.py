from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from cv_platform.cli import main
from cv_platform.compute import engine as engines
from cv_platform.compute import map_shards
from cv_platform.compute.local import LocalEngine
from cv_platform.errors import BundleNotFoundError, DatasetError, LockHeldError, StorageError
from cv_platform.files import exclusive
from cv_platform.images import preprocess, read_image, resize
from cv_platform.properties import image_properties
from cv_platform.scoring import score
from cv_platform.scoring.score import score_images
from cv_platform.scoring.sources import read_file
from cv_platform.serving.app import create_app
from cv_platform.serving.model.explain import Explain, draw
from cv_platform.serving.model.runtime import PublishedModel, load_bundle
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from cv_platform_tests.support import poison
from cv_platform_tests.support.app_fixtures import MakeWorker
from cv_platform_tests.support.http_client import Client, FixedModels
from cv_platform_tests.support.pictures import picture, write_pictures
from cv_platform_tests.support.tiny_models import MODEL_NAME, TinyExport, publish_tiny
from cv_platform_tests.support.waiting import wait_until

VERSION = "20260101T000000Z-00000001"
PROCESSES = LocalEngine(2, worth_seconds=0)


@pytest.fixture
def settings(tmp_path: Path, hand_made: TinyExport) -> Settings:
    made = Settings.from_environment({"CV_HOME": str(tmp_path / "home")})
    publish_tiny(CentralStorage(made.storage_url), hand_made, VERSION)
    return made


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images in two folders, one that is cut off, and two files that are none."""
    folder = write_pictures(tmp_path / "images", [f"{name}/{i}.png" for name in "ab" for i in range(5)])
    (folder / "a/cut.png").write_bytes(picture(99)[:40])
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(picture(1))
    return folder


def read(path: Path) -> dict[str, list]:
    return pq.read_table(path).to_pydict()


def test_each_image_has_one_row_with_the_answer_of_the_service(
    settings: Settings, images: Path, tmp_path: Path, make_worker: MakeWorker
) -> None:
    scored = score_images(str(images), VERSION, tmp_path / "scores.parquet", settings=settings)
    assert (scored.images, scored.problems, scored.computed) == (11, 1, 11)
    rows = read(tmp_path / "scores.parquet")
    assert rows["path"] == [*(f"a/{i}.png" for i in range(5)), "a/cut.png", *(f"b/{i}.png" for i in range(5))]
    assert rows["sha256"] == [hashlib.sha256((images / path).read_bytes()).hexdigest() for path in rows["path"]]
    model = load_bundle(CentralStorage(settings.storage_url), MODEL_NAME, VERSION, cache=tmp_path / "cache", threads=1)
    client = Client(create_app(make_worker(models=FixedModels(model))))
    for row, path in enumerate(rows["path"]):
        answer = client.predict((images / path).read_bytes()).json()
        if path == "a/cut.png":
            assert rows["problem"][row] == f"TruncatedImageError: {answer['message']}"
            assert rows["predicted_class"][row] is rows["confidence"][row] is rows["is_unknown"][row] is None
            assert np.isnan(rows["bbsd_feats"][row]).all()
            continue
        assert rows["problem"][row] is None
        assert [float(f"{p:.7g}") for p in rows["bbsd_feats"][row]] == list(answer["prediction"].values())
        assert rows["predicted_class"][row] == answer["predicted_class"]
        assert rows["is_unknown"][row] == answer["is_unknown"]
        assert rows["confidence"][row] == max(rows["bbsd_feats"][row])
        assert (len(rows["uae_feats"][row]), len(rows["features"][row]), len(rows["properties"][row])) == (4, 5, 7)
    assert set(rows["model_version"]) == {VERSION}


def test_each_row_has_the_pixel_statistics_of_its_own_image(settings: Settings, images: Path, tmp_path: Path) -> None:
    write_pictures(images, [f"b/more-{i}.png" for i in range(20)], first_seed=100)
    score_images(str(images), VERSION, tmp_path / "scores.parquet", settings=settings)
    rows = read(tmp_path / "scores.parquet")
    model = load_bundle(CentralStorage(settings.storage_url), MODEL_NAME, VERSION, cache=tmp_path / "cache", threads=1)
    size, made = model.metadata.image_size, model.preprocessing
    seen = {
        path: image_properties(preprocess((images / path).read_bytes(), size, preprocessing=made))
        for path, problem in zip(rows["path"], rows["problem"], strict=True)
        if problem is None
    }
    assert (len(rows["path"]), len(seen)) == (31, 30)
    assert len({values.tobytes() for values in seen.values()}) == 30, "no two images are alike"
    for path, properties in zip(rows["path"], rows["properties"], strict=True):
        np.testing.assert_array_equal(np.float32(properties), seen.get(path, np.full(7, np.nan, np.float32)))


def test_each_row_has_its_heat_map_where_that_is_asked_for(settings: Settings, images: Path, tmp_path: Path) -> None:
    (images / "large.png").write_bytes(picture(7, (300, 600)))
    output = tmp_path / "scores.parquet"
    score_images(str(images), VERSION, output, settings=settings, heat_maps=True, engine=PROCESSES)
    rows = read(output)
    model = load_bundle(CentralStorage(settings.storage_url), MODEL_NAME, VERSION, cache=tmp_path / "cache", threads=1)
    for path, problem, jpeg in zip(rows["path"], rows["problem"], rows["heat_map"], strict=True):
        if path == "a/cut.png":
            assert (problem is None, jpeg) == (False, None)
            continue
        image = read_image((images / path).read_bytes(), max_pixels=10**6, preprocessing=model.preprocessing).pixels
        cam = model.predict(resize(image, model.metadata.image_size)).cam
        if path == "large.png":
            image = np.asarray(cv2.resize(image, (256, 128), interpolation=cv2.INTER_AREA), np.uint8)
        expected = draw(image, cam, Explain.JPEG).overlaid
        drawn, wanted = (cv2.imdecode(np.frombuffer(one, np.uint8), cv2.IMREAD_COLOR) for one in (jpeg, expected))
        assert drawn is not None
        assert wanted is not None
        assert drawn.shape == wanted.shape
        assert np.abs(drawn.astype(int) - wanted.astype(int)).mean() < 2.0
    score_images(str(images), VERSION, output, settings=settings)
    assert "heat_map" not in read(output)


KILLED = """
import os, signal, sys
from pathlib import Path
from cv_platform.compute import open_engine
from cv_platform.compute.local import LocalEngine
from cv_platform.scoring import score
from cv_platform.settings import Settings
score._FEWEST_IMAGES = 2
whole = score.map_shards
def killed(*arguments, **options):
    for number, made in enumerate(whole(*arguments, **options)):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield made
score.map_shards = killed
settings = Settings.from_environment({"CV_HOME": sys.argv[1], "CV_COMPUTE": sys.argv[5]})
engine = open_engine(settings) if sys.argv[5] == "ray" else LocalEngine(2, worth_seconds=0)
score.score_images(sys.argv[2], sys.argv[3], Path(sys.argv[4]), settings=settings, engine=engine)
"""


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.timeout(900)])])
def test_a_killed_scoring_loses_only_what_was_not_finished(
    settings: Settings, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setattr(score, "_FEWEST_IMAGES", 2)
    whole, output = tmp_path / "whole.parquet", tmp_path / "scores.parquet"
    assert score_images(str(images), VERSION, whole, settings=settings, engine=PROCESSES).computed == 11
    arguments = [str(settings.home), str(images), VERSION, str(output), engine]
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not output.exists()
    # Three of six batches, of two images but for the last, were finished.
    assert score_images(str(images), VERSION, output, settings=settings).computed in {5, 6}
    assert output.read_bytes() == whole.read_bytes(), "whoever scores it, and in how many goes"
    assert [path.name for path in tmp_path.glob(".*.parts")] == []


def test_a_folder_that_is_away_for_a_while_is_waited_for(
    settings: Settings,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(score, "_FEWEST_IMAGES", 2)
    monkeypatch.setattr(engines, "_WAITS_SECONDS", (0.1,) * 600)
    whole, output, away = tmp_path / "whole.parquet", tmp_path / "scores.parquet", tmp_path / "away"
    score_images(str(images), VERSION, whole, settings=settings)

    def come_back() -> None:
        wait_until(lambda: f"Expected images at {images}. Received: nothing" in caplog.text)
        away.rename(images)

    returning = threading.Thread(target=come_back)

    def go_away() -> None:
        images.rename(away)
        returning.start()

    monkeypatch.setattr(score, "map_shards", after_the_first(go_away))
    score_images(str(images), VERSION, output, settings=settings)
    returning.join()
    assert output.read_bytes() == whole.read_bytes(), "no image has the absence as its problem"


def after_the_first(action: Callable[[], object], *, at: int = 0) -> Callable[..., Iterator[Any]]:
    """Returns `map_shards`, but for what happens once the first shard is done, or another one, counted from 0."""

    def mapped(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, made in enumerate(map_shards(*arguments, **options)):
            if number == at:
                action()
            yield made

    return mapped


def test_an_image_that_is_gone_is_told_from_a_folder_that_is_away(images: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_file(str(images), "a/9.png")
    with pytest.raises(FileNotFoundError):
        read_file(images.as_uri(), "a/9.png")
    shutil.rmtree(images)
    for _ in range(2):  # Not there, and then not mounted.
        for root in (str(images), images.as_uri()):
            with pytest.raises(StorageError, match=r"Received: nothing, as .* sees it\. Mount it.* or a URL such as"):
                read_file(root, "a/0.png")
        images.mkdir(exist_ok=True)


def test_a_machine_that_does_not_see_central_storage_says_what_it_needs(settings: Settings, tmp_path: Path) -> None:
    model = PublishedModel(settings.storage_url, MODEL_NAME, VERSION, tmp_path)
    with pytest.raises(BundleNotFoundError, match="Received: other"):
        replace(model, version="other").load()
    with pytest.raises(StorageError, match=r"Received: nothing, as .* sees it\..* as CV_STORAGE") as caught:
        replace(model, storage_url=str(tmp_path / "nowhere")).load()
    assert not isinstance(caught.value, BundleNotFoundError), "it may pass, and is waited for"


POISONED = """
import os, sys
from cv_platform.cli import main
from cv_platform.scoring import score
from cv_platform_tests.support import poison
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # Where a command always begins alone.
score.score_batch = poison.scores
sys.exit(main(["score", *sys.argv[1:]]))
"""


def test_a_command_that_an_image_has_ended_names_it_when_it_is_called_again(
    settings: Settings, images: Path, tmp_path: Path
) -> None:
    write_pictures(images, [poison.POISON])
    output = tmp_path / "scores.parquet"
    command = [sys.executable, "-c", POISONED, str(images), "--model", VERSION, "--output", str(output)]
    environment = {**os.environ, "CV_HOME": str(settings.home)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "12 images: 2 without an answer" in again.stdout
    require_poison_named(output, images)


def require_poison_named(output: Path, images: Path) -> None:
    """Looks into the scores of images, one of which ends its process, and one of which may be cut off."""
    rows = read(output)
    problems = dict(zip(rows["path"], rows["problem"], strict=True))
    assert problems.pop("cat/3.png").startswith("its decoding has ended 3 processes, the last of which ")
    assert [path for path, problem in problems.items() if problem and path != "a/cut.png"] == []
    digest = hashlib.sha256((images / "cat/3.png").read_bytes()).hexdigest()
    assert rows["sha256"][rows["path"].index("cat/3.png")] == digest


def test_what_comes_early_in_order_has_all_later_batches_scored_again(
    settings: Settings, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "_FEWEST_IMAGES", 3)

    def fails(*_: object) -> tuple[int, int]:
        raise OSError("No space left.")

    monkeypatch.setattr(score, "_join", fails)
    known = set[Path]()

    def new_parts() -> int:
        with pytest.raises(OSError, match="No space"):
            score_images(str(images), VERSION, tmp_path / "scores.parquet", settings=settings)
        new = {*(tmp_path / ".scores.parquet.parts").glob("*.arrow")} - known
        known.update(new)
        return len(new)

    assert new_parts() == 4, "11 images, three in a batch"
    write_pictures(images, ["z.png"])
    assert new_parts() == 1
    write_pictures(images, ["a/9.png"])
    assert new_parts() == 4, "of 13 images, all but the first three"


def test_the_command_scores_an_archive(
    settings: Settings,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CV_HOME", str(settings.home))
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", images)
    outputs = [tmp_path / "folder.parquet", tmp_path / "archive.parquet"]
    for source, output in zip((str(images), archive), outputs, strict=True):
        assert main(["score", source, "--model", VERSION, "--output", str(output)]) == 0
        captured = capsys.readouterr()
        assert "11 images: 1 without an answer, 0 unknown; 11 scored now" in captured.out
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_the_command_says_at_which_images_it_has_failed_and_where(
    settings: Settings,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CV_HOME", str(settings.home))
    for path in (settings.home / "storage").rglob("*.onnx"):
        path.chmod(0o644)
        path.write_bytes(b"damaged")
    assert main(["score", str(images), "--model", VERSION, "--output", str(tmp_path / "scores.parquet")]) == 1
    said, note = capsys.readouterr().err.splitlines()
    assert "expected the published files. Missing or changed: model.onnx" in said
    assert note == f"  Of a/0.png to b/4.png, in this process on {socket.gethostname()}"


def test_what_cannot_be_scored_is_said(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no image")
    output = tmp_path / "scores.parquet"
    for source, message in (("gone", "where nothing is"), ("empty", "Expected images"), ("text.txt", "neither")):
        with pytest.raises(DatasetError, match=message):
            score_images(str(tmp_path / source), VERSION, output, settings=settings)
    with pytest.raises(BundleNotFoundError, match=f"Received: other. Published: {VERSION}"):
        score_images(str(tmp_path), "other", output, settings=settings)
    with exclusive(tmp_path / ".scores.parquet.parts.lock"), pytest.raises(LockHeldError, match="Wait for the first"):
        score_images(str(tmp_path), VERSION, output, settings=settings)
    assert not list(tmp_path.glob("*.parquet"))
    assert not (tmp_path / ".scores.parquet.parts").exists()

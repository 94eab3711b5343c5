"""Images in a bucket of a real S3 API (moto's server over HTTP): scored as those of a folder, and waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from cv_platform.compute import engine as engines
from cv_platform.errors import StorageError
from cv_platform.scoring import score
from cv_platform.scoring.score import score_images
from cv_platform.scoring.sources import PassedOver, read_images
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.hand_made import hand_made_export
from cv_platform_tests.support.pictures import picture, write_pictures
from cv_platform_tests.support.tiny_models import TinyExport, publish_tiny
from cv_platform_tests.support.waiting import wait_until
from cv_platform_tests.unit.datasets.sources.test_phone_photos import HEIC
from cv_platform_tests.unit.monitoring.test_scored import folder, report_on, scores_of, with_reference
from cv_platform_tests.unit.scoring.test_score import PROCESSES, VERSION, after_the_first


@dataclass
class Storage:
    """A server that can be stopped, and started again at the same port with all that it had."""

    server: ThreadedMotoServer

    def stop(self) -> None:
        self.port = self.server.get_host_and_port()[1]
        self.server.stop()

    def start(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", port=self.port, verbose=False)
        self.server.start()


@pytest.fixture(scope="module")
def server() -> Iterator[Storage]:
    made = Storage(ThreadedMotoServer("127.0.0.1", port=0, verbose=False))
    made.server.start()
    yield made
    made.server.stop()


@pytest.fixture(scope="module")
def s3_endpoint(server: Storage) -> str:
    return "http://{}:{}".format(*server.server.get_host_and_port())


@pytest.fixture(scope="module")
def hand_made(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    return hand_made_export(tmp_path_factory.mktemp("tiny") / "export")


@pytest.fixture
def settings(tmp_path: Path, s3_url: str, hand_made: TinyExport, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # Else the driver tries for ten seconds by itself.
    S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(score, "_FEWEST_IMAGES", 2)
    made = Settings.from_environment({"CV_HOME": str(tmp_path / "home"), "CV_STORAGE": s3_url})
    publish_tiny(CentralStorage(s3_url), hand_made, VERSION)
    return made


@pytest.fixture
def images(tmp_path: Path, s3_url: str) -> str:
    """Returns the URL of ten images, which lie in `tmp_path / "images"` as well."""
    folder = write_pictures(tmp_path / "images", [f"{name}/{i}.png" for name in "ab" for i in range(5)])
    S3FileSystem().put(str(folder), f"{s3_url}-images", recursive=True)
    return f"{s3_url}-images"


def test_images_in_a_bucket_have_the_rows_of_those_in_a_folder(settings: Settings, images: str, tmp_path: Path) -> None:
    folder, bucket = tmp_path / "folder.parquet", tmp_path / "bucket.parquet"
    assert score_images(str(tmp_path / "images"), VERSION, folder, settings=settings).images == 10
    assert score_images(images, VERSION, bucket, settings=settings, engine=PROCESSES).images == 10
    assert pq.read_table(bucket).equals(pq.read_table(folder))


def test_objects_are_told_by_their_first_bytes_and_one_that_cannot_be_read_has_a_row(
    settings: Settings, s3_url: str, tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "images", [f"a/{i}.png" for i in range(4)])
    (folder / "plain").write_bytes(picture(9))
    (folder / "photo.heic").write_bytes(HEIC)
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(5000))
    for name in ("empty", "empty.png", "archive.zip"):
        (folder / name).touch()
    bucket, storage = f"{s3_url}-images", S3FileSystem()
    storage.put(str(folder), bucket, recursive=True)
    for marker in (f"{bucket}/", f"{bucket}/a/"):  # What web consoles put in place of folders.
        storage.call_s3("put_object", Bucket=bucket.split("/")[2], Key=marker.split("/", 3)[3], Body=b"")
    outputs = [tmp_path / "folder.parquet", tmp_path / "bucket.parquet"]
    scored = [
        score_images(source, VERSION, output, settings=settings)
        for source, output in zip((str(folder), bucket), outputs, strict=True)
    ]
    assert [(one.images, one.problems, one.passed_over) for one in scored] == [(7, 2, PassedOver(3, 1))] * 2
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    paths = ["a/0.png", "a/gone.png", "empty.png", "plain"]
    found = dict(read_images(bucket, paths, [10, 10, 0, 10]))
    assert [type(found[path]) for path in paths] == [bytes, FileNotFoundError, bytes, bytes]
    storage.rm(bucket, recursive=True)
    with pytest.raises(StorageError, match=r"Expected images at .*Received: nothing"):
        list(read_images(bucket, paths, [10, 10, 0, 10]))


def test_objects_are_asked_for_once_each_and_many_at_a_time(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together = [f"{name}/{i}.png" for name in "ab" for i in range(5)]
    asked: list[str] = []
    now = most = 0
    call = S3FileSystem._call_s3

    async def counted(self: S3FileSystem, method: str, *arguments: object, **options: object) -> object:
        nonlocal now, most
        asked.append(method)
        now += 1
        most = max(most, now)
        try:
            return await call(self, method, *arguments, **options)
        finally:
            now -= 1

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
    assert [path for path, _ in read_images(images, together, [100] * 10)] == together
    assert (asked, most) == (["get_object"] * 10, 10)


def test_a_scoring_of_a_bucket_that_was_stopped_goes_on_where_it_was(
    settings: Settings, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.parquet", tmp_path / "scores.parquet"
    score_images(images, VERSION, whole, settings=settings)

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(score, "map_shards", after_the_first(stop, at=2))
        with pytest.raises(KeyboardInterrupt):
            score_images(images, VERSION, output, settings=settings)
    assert score_images(images, VERSION, output, settings=settings).computed == 6
    assert output.read_bytes() == whole.read_bytes()


def test_the_report_on_a_bucket_is_that_on_its_folder(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    settings = with_reference(tmp_path)
    images, bucket = folder(tmp_path / "images", 120, first_seed=2000), f"{s3_url}-images"
    for path in images.iterdir():
        cv2.imwrite(str(path), np.asarray(cv2.imread(str(path))) // 2)
    S3FileSystem().put(str(images), bucket, recursive=True)
    scores = scores_of(images, settings)
    here = report_on(images, settings, scores=scores)
    page = images.with_suffix(".html").read_text()
    score_images(bucket, VERSION, scores, settings=settings)
    there = report_on(images, settings, scores=scores, source=bucket)
    assert (there.verdict, there.rows, there.top_images) == ("drift", 120, here.top_images)
    assert there.p_values == pytest.approx(here.p_values)
    assert page.count("data:image/jpeg") == 12
    assert images.with_suffix(".html").read_text().replace(bucket, str(images)) == page


def test_a_storage_that_refuses_connections_is_waited_for(
    settings: Settings,
    images: str,
    server: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(engines, "_WAITS_SECONDS", (0.1,) * 600)
    whole, output = tmp_path / "whole.parquet", tmp_path / "scores.parquet"
    score_images(images, VERSION, whole, settings=settings)

    def come_back() -> None:
        wait_until(lambda: "is tried again in" in caplog.text)
        server.start()

    returning = threading.Thread(target=come_back)

    def go_away() -> None:
        server.stop()
        with pytest.raises(StorageError, match=r"Cannot list the versions of .* Could not connect to the endpoint"):
            CentralStorage(settings.storage_url).bundle_versions("tiny")
        returning.start()

    monkeypatch.setattr(score, "map_shards", after_the_first(go_away))
    score_images(images, VERSION, output, settings=settings)
    returning.join()
    assert output.read_bytes() == whole.read_bytes()

"""`cv-platform predict` against the real app on a real port."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from cv_platform.cli import main
from cv_platform.local.http import free_port, wait_for_http
from cv_platform.serving.app import create_app
from cv_platform_tests.support.app_fixtures import MakeWorker, make_worker
from cv_platform_tests.support.http_client import flat_image, png

__all__ = ["make_worker"]


@pytest.fixture
def url(make_worker: MakeWorker) -> Iterator[str]:
    port = free_port()
    app = create_app(make_worker(CV_API_KEYS="first,second"))
    server = uvicorn.Server(uvicorn.Config(app, port=port, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for_http(f"http://127.0.0.1:{port}/health_check", seconds=60, alive=thread.is_alive)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(60)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "red.png").write_bytes(png(flat_image(199, 99, 99)))
    (folder / "green.png").write_bytes(png(flat_image(99, 199, 99)))
    return folder


def test_prints_a_table_of_the_files_and_succeeds(
    url: str, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CV_API_KEYS", "second")
    assert main(["predict", str(images), "--url", url]) == 0
    header, green, red = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "class", "probability", "prediction", "id"]
    assert green.split()[:3] == [str(images / "green.png"), "dog", "50.0%"]
    assert red.split()[:3] == [str(images / "red.png"), "cat", "50.0%"]


def test_prints_json_and_fails_when_any_file_failed(
    url: str, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CV_API_KEYS", "first")
    (images / "broken.png").write_bytes(b"no image")
    assert main(["predict", str(images), "--url", url, "--json", "--explain", "jpeg"]) == 1
    captured = capsys.readouterr()
    broken, green, _ = (json.loads(line) for line in captured.out.splitlines())
    assert "Expected an image" in broken["error"]
    assert green["predicted_class"] == "dog"
    assert green["overlaid_img"]
    assert f"error: {images / 'broken.png'}: Expected an image" in captured.err
    assert "1 file has no prediction" in captured.err


def test_says_what_to_do_without_a_key_or_a_service(
    url: str, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("CV_API_KEYS", raising=False)
    assert main(["predict", str(images), "--url", url]) == 1
    assert "X-API-Key" in capsys.readouterr().err


def test_what_is_not_there_goes_to_stderr_and_the_good_ones_are_predicted(
    url: str, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CV_API_KEYS", "first")
    (images / "broken.png").write_bytes(b"no image")
    gone, broken, red = (str(images / name) for name in ("gone.png", "broken.png", "red.png"))
    assert main(["predict", gone, broken, red, "--url", url]) == 1
    captured = capsys.readouterr()
    header, row = captured.out.splitlines()
    assert header.startswith("file ")
    assert row.startswith(red)
    of_gone, of_broken, count = captured.err.splitlines()
    assert of_gone.startswith(f"error: {gone}: Expected an image file, or a folder of them. Received: nothing there")
    assert of_broken.startswith(f"error: {broken}: Expected an image")
    assert count == "error: 2 files have no prediction."

    assert main(["predict", gone, "--url", url, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["file"] == gone


def test_prints_no_header_over_nothing(images: Path, url: str, capsys: pytest.CaptureFixture[str]):
    # Nothing to send; nothing there to send it to; nobody who may.
    assert main(["predict", str(images / "gone.png"), "--url", url]) == 1
    assert main(["predict", str(images), "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    assert main(["predict", str(images), "--url", url]) == 1
    assert capsys.readouterr().out == ""

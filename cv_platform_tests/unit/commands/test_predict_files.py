from pathlib import Path

import pytest

from cv_platform.client import RequestRefusedError
from cv_platform.commands.predict_files import FileAnswer, expand, predict_files, show_predictions
from cv_platform.settings import Settings
from cv_platform_tests.support.app_fixtures import MakeWorker, make_worker, worker
from cv_platform_tests.support.client_of import client_of
from cv_platform_tests.support.http_client import FixedModels, brightness_model, flat_image, png

__all__ = ["make_worker", "worker"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    (folder / "b.png").write_bytes(png(flat_image(199, 99, 99)))
    (folder / "below" / "a.JPG").write_bytes(png(flat_image(99, 99, 199)))
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not for the service")
    return folder


def test_a_folder_is_the_images_below_it_and_a_named_file_itself(folder: Path):
    expanded = expand([folder, folder / "notes.txt"])
    assert expanded.unusable == []
    names = [str(path.relative_to(folder)) for path in expanded.files]
    assert names == ["b.png", "below/a.JPG", "broken.png", "notes.txt"]
    assert expanded.left_out == {".txt": 1}


def test_the_images_of_a_folder_are_known_by_their_content(folder: Path):
    content = (folder / "b.png").read_bytes()
    for name in ("scan.jfif", "photo.JPE", "without_suffix", ".hidden.png", "preview.dng"):
        (folder / name).write_bytes(content)
    (folder / "@eaDir").mkdir()
    (folder / "@eaDir" / "thumbnail.jpg").write_bytes(content)
    for name in ("phone.heic", "second.HEIC", "README"):
        (folder / name).write_bytes(b"\0\0\0\x20ftypheic\0\0\0\0")
    expanded = expand([folder])
    names = [path.name for path in expanded.files]
    assert names == ["b.png", "a.JPG", "broken.png", "photo.JPE", "scan.jfif", "without_suffix"]
    assert expanded.left_out == {".heic": 2, ".dng": 1, ".txt": 1, "": 1}


def shown(client_errors: list[str], *paths: Path) -> int:
    """Asks a port where nothing listens, so that only what needs no service is said."""
    return show_predictions(
        Settings.from_environment({}),
        paths,
        url="http://127.0.0.1:1",
        as_json=False,
        explain="none",
        say=print,
        complain=client_errors.append,
    )


def test_files_left_out_are_counted_and_a_large_share_of_them_is_an_error(tmp_path: Path):
    lines: list[str] = []
    for number in range(2):
        (tmp_path / f"{number}.heic").write_bytes(b"\0\0\0\x20ftypheic")
        (tmp_path / f"{number}.txt").write_text("a note")
    assert shown(lines, tmp_path) == 3  # The folder has no image, and two files might have been some.
    assert lines[1] == (
        "error: left out, as they are none of JPEG, PNG, WEBP, BMP, TIFF, GIF: .heic 2, .txt 2. "
        "Convert those that are images."
    )
    lines.clear()
    for number in range(2):
        (tmp_path / f"{number}.heic").unlink()
    assert shown(lines, tmp_path) == 1
    assert lines[1] == "left out, as they are none of JPEG, PNG, WEBP, BMP, TIFF, GIF: .txt 2."


def test_names_everything_that_is_not_there(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    expanded = expand([tmp_path / "gone.png", folder, tmp_path / "empty"])
    assert len(expanded.files) == 3
    assert [answer.path.name for answer in expanded.unusable] == ["gone.png", "empty"]
    assert "Received: nothing there" in str(expanded.unusable[0].error)
    assert "in this folder. Received: none" in str(expanded.unusable[1].error)


def test_a_broken_file_has_its_error_and_the_others_go_on(folder: Path, make_worker: MakeWorker):
    with client_of(make_worker()) as client:
        answers = list(predict_files(client, expand([folder]).files, explain="none"))
    assert [answer.row()[1:3] for answer in answers[:2]] == [("cat", "50.0%"), ("owl", "50.0%")]
    assert answers[0].row()[3] == answers[0].as_json()["prediction_id"]
    assert str(answers[2].error).startswith("Expected an image")
    with pytest.raises(ValueError, match="Expected a result"):
        answers[2].row()
    assert set(answers[2].as_json()) == {"file", "error"}


def test_a_client_that_is_refused_stops_at_once(folder: Path, make_worker: MakeWorker):
    worker = make_worker(CV_API_KEYS="one")
    with client_of(worker) as client, pytest.raises(RequestRefusedError, match="X-API-Key"):
        list(predict_files(client, expand([folder]).files, explain="none"))


def test_several_classes_have_their_probabilities_and_none_says_so(folder: Path, make_worker: MakeWorker):
    def rows(threshold: float) -> list[FileAnswer]:
        model = brightness_model(classifier_type="multi-label", threshold=threshold)
        with client_of(make_worker(models=FixedModels(model))) as client:
            return list(predict_files(client, [folder / "b.png"], explain="none"))

    assert rows(0.25)[0].row()[1:3] == ("cat|dog|owl", "50.0% 25.0% 25.0%")
    assert rows(0.9)[0].row()[1:3] == ("(none)", "")

from pathlib import Path

import pytest

from cv_platform.errors import RequestRefusedError
from cv_platform.serving.predict_files import FileAnswer, expand, predict_files
from cv_platform_tests.unit.serving.app_fixtures import MakeContext
from cv_platform_tests.unit.serving.http_client import FixedModels, brightness_model, flat_image, png
from cv_platform_tests.unit.serving.test_client import client_of


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
    files, unusable = expand([folder, folder / "notes.txt"])
    assert unusable == []
    assert [str(path.relative_to(folder)) for path in files] == ["b.png", "below/a.JPG", "broken.png", "notes.txt"]


def test_names_everything_that_is_not_there(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    files, unusable = expand([tmp_path / "gone.png", folder, tmp_path / "empty"])
    assert len(files) == 3
    assert [answer.path.name for answer in unusable] == ["gone.png", "empty"]
    assert "Received: nothing there" in str(unusable[0].error)
    assert "in this folder. Received: none" in str(unusable[1].error)


def test_a_broken_file_has_its_error_and_the_others_go_on(folder: Path, make_context: MakeContext):
    with client_of(make_context()) as client:
        answers = list(predict_files(client, expand([folder])[0], explain="none"))
    assert [answer.row()[1:3] for answer in answers[:2]] == [("cat", "50.0%"), ("owl", "50.0%")]
    assert answers[0].row()[3] == answers[0].as_json()["prediction_id"]
    assert str(answers[2].error).startswith("Expected an image")
    with pytest.raises(ValueError, match="Expected a result"):
        answers[2].row()
    assert set(answers[2].as_json()) == {"file", "error"}


def test_a_client_that_is_refused_stops_at_once(folder: Path, make_context: MakeContext):
    context = make_context(CV_API_KEYS="one")
    with client_of(context) as client, pytest.raises(RequestRefusedError, match="X-API-Key"):
        list(predict_files(client, expand([folder])[0], explain="none"))


def test_several_classes_have_their_probabilities_and_none_says_so(folder: Path, make_context: MakeContext):
    def rows(threshold: float) -> list[FileAnswer]:
        model = brightness_model(classifier_type="multi-label", threshold=threshold)
        with client_of(make_context(models=FixedModels(model))) as client:
            return list(predict_files(client, [folder / "b.png"], explain="none"))

    assert rows(0.25)[0].row()[1:3] == ("cat|dog|owl", "50.0% 25.0% 25.0%")
    assert rows(0.9)[0].row()[1:3] == ("(none)", "")

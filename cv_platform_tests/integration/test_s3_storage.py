"""Central storage on S3: a real S3 API (moto's server) over HTTP, and hosts whose moves of the pointer meet."""

import hashlib
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from cv_platform.cli import main
from cv_platform.datasets.importing import import_dataset
from cv_platform.datasets.versions import checkout_version
from cv_platform.errors import PointerMovedError, StorageError
from cv_platform.object_store import ObjectStore
from cv_platform.serving.model.promotion import PROMOTION_LOCK, Promoter
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.hand_made import hand_made_export
from cv_platform_tests.support.pictures import class_folders, picture
from cv_platform_tests.support.tiny_models import MODEL_NAME, TinyExport, publish_tiny
from cv_platform_tests.unit.datasets.conftest import dataset, model

SERVICE = "image_classifier"
FIRST, SECOND, THIRD = "20260101T000000Z-00000001", "20260102T000000Z-00000002", "20260103T000000Z-00000003"


@pytest.fixture
def url(s3_url: str) -> str:
    return s3_url


@pytest.fixture(scope="module")
def hand_made(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    return hand_made_export(tmp_path_factory.mktemp("tiny") / "export")


def pointer(version: str) -> ProductionPointer:
    return ProductionPointer(model_name=MODEL_NAME, version=version, since_utc=datetime.now(UTC))


def test_a_clone_fetches_from_a_dvc_remote_what_another_machine_has_pushed(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, elsewhere = tmp_path / "here" / "datasets", tmp_path / "elsewhere"
    for tag, count in (("v1.0.0", 2), ("v1.1.0", 3)):
        import_dataset(class_folders(tmp_path / tag, count), ds_name="pets", tag=tag, ds_root=root)
    command = ["dataset", "push", "pets", "--root", str(root)]
    assert main(command) != 0
    assert "dvc remote add -d" in capsys.readouterr().err
    with (root / "pets" / ".dvc" / "config").open("a") as file:
        file.write(f"    remote = store\n['remote \"store\"']\n    url = {url}/dvc\n")
    assert main(command) == 0
    assert "it has the images of v1.0.0, v1.1.0" in capsys.readouterr().out
    assert main(command) == 0
    assert "0 files were sent" in capsys.readouterr().out

    (elsewhere / "datasets").mkdir(parents=True)
    shutil.copytree(root / "pets", elsewhere / "datasets" / "pets", ignore=shutil.ignore_patterns("cache"))
    version = checkout_version(dataset(), model(), home=elsewhere)
    assert (version.directory / "images/cat/0.png").read_bytes() == picture(0)


def test_the_pointer_moves_from_where_it_was_seen_and_from_nowhere_else(url: str):
    storage = CentralStorage(url)
    first, second = pointer(FIRST), pointer(SECOND)
    with pytest.raises(PointerMovedError, match="Received: nothing"):
        storage.swap_pointer(SERVICE, first, second)
    storage.swap_pointer(SERVICE, None, first)
    with pytest.raises(PointerMovedError, match=FIRST):
        storage.swap_pointer(SERVICE, None, second)
    storage.swap_pointer(SERVICE, first, second)
    assert storage.read_pointer(SERVICE) == second
    with pytest.raises(PointerMovedError, match=SECOND):
        storage.swap_pointer(SERVICE, first, None)
    storage.swap_pointer(SERVICE, second, None)
    assert storage.read_pointer(SERVICE) is None


class HurriedStore(ObjectStore):
    """Lets another host move the pointer after this one has read it and before it writes it."""

    between: Callable[[], object] | None = None

    def read(self, path: str) -> str | None:
        seen = super().read(path)
        if self.between is not None:
            act, self.between = self.between, None
            act()
        return seen


class HurriedStorage(CentralStorage):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.store = self._store = HurriedStore(url)


@pytest.fixture
def here(url: str) -> HurriedStorage:
    return HurriedStorage(url)


@pytest.fixture
def elsewhere(url: str, here: HurriedStorage) -> CentralStorage:
    """Another host's view: connections and caches of its own."""
    S3FileSystem.clear_instance_cache()
    other = CentralStorage(url)
    assert other._store._fs is not here._store._fs
    return other


@pytest.mark.parametrize("new", [pointer(THIRD), None], ids=["move", "removal"])
def test_a_move_between_reading_and_writing_is_not_lost(here: HurriedStorage, elsewhere: CentralStorage, new):
    first, second = pointer(FIRST), pointer(SECOND)
    elsewhere.swap_pointer(SERVICE, None, first)
    here.store.between = lambda: elsewhere.swap_pointer(SERVICE, first, second)
    with pytest.raises(PointerMovedError, match=SECOND):
        here.swap_pointer(SERVICE, first, new)
    assert elsewhere.read_pointer(SERVICE) == second


def test_of_two_first_deployments_one_is_refused(here: HurriedStorage, elsewhere: CentralStorage):
    first = pointer(FIRST)
    here.store.between = lambda: elsewhere.swap_pointer(SERVICE, None, first)
    with pytest.raises(PointerMovedError, match=FIRST):
        here.swap_pointer(SERVICE, None, pointer(SECOND))
    assert elsewhere.read_pointer(SERVICE) == first


def test_a_pointer_that_vanishes_meanwhile_is_not_brought_back(here: HurriedStorage, elsewhere: CentralStorage):
    first = pointer(FIRST)
    elsewhere.swap_pointer(SERVICE, None, first)
    here.store.between = lambda: elsewhere.swap_pointer(SERVICE, first, None)
    with pytest.raises(PointerMovedError, match="nothing"):
        here.swap_pointer(SERVICE, first, pointer(SECOND))
    assert elsewhere.read_pointer(SERVICE) is None


def test_a_write_whose_answer_was_lost_and_that_is_sent_again_has_moved_the_pointer(url: str):
    refused: list[bool] = []

    class LossyStore(ObjectStore):
        def _write_if(self, path: str, text: str | None, tag: str | None) -> bool:
            assert super()._write_if(path, text, tag)
            again = super()._write_if(path, text, tag)  # As the driver repeats it: refused, as the tag is ours now.
            refused.append(not again)
            return again

    storage, first = CentralStorage(url), pointer(FIRST)
    storage._store = LossyStore(url)
    storage.swap_pointer(SERVICE, None, first)
    assert refused == [True]
    assert storage.read_pointer(SERVICE) == first


def test_a_bucket_that_is_not_there_is_no_conflict(url: str):
    with pytest.raises(StorageError, match="Check CV_STORAGE") as raised:
        CentralStorage("s3://no-such-bucket/storage").swap_pointer(SERVICE, None, pointer(FIRST))
    assert not isinstance(raised.value, PointerMovedError)


def test_promotions_on_two_hosts_forget_no_version(
    here: HurriedStorage, elsewhere: CentralStorage, tmp_path: Path, hand_made: TinyExport
):
    for version in (FIRST, SECOND, THIRD):
        publish_tiny(elsewhere, hand_made, version)

    def on(host: CentralStorage, folder: str) -> Promoter:
        return Promoter(host, SERVICE, tmp_path / folder, tmp_path / folder / PROMOTION_LOCK)

    on(elsewhere, "elsewhere").promote(MODEL_NAME, FIRST)
    here.store.between = lambda: on(elsewhere, "elsewhere").promote(MODEL_NAME, SECOND)
    on(here, "here").promote(MODEL_NAME, THIRD)
    production = elsewhere.read_pointer(SERVICE)
    assert production is not None
    assert (production.version, production.previous_version) == (THIRD, SECOND)


def test_images_of_a_bucket_are_scored_by_a_model_of_a_bucket(
    url: str, tmp_path: Path, hand_made: TinyExport, monkeypatch: pytest.MonkeyPatch
):
    publish_tiny(CentralStorage(url), hand_made, FIRST)
    source = f"{url.removesuffix('/storage')}/photos"
    for name, data in (("a/1.png", picture(1)), ("a/cut.png", picture(2)[:40]), ("b.png", picture(3)), ("b.txt", b"")):
        S3FileSystem().pipe_file(f"{source}/{name}", data)
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CV_STORAGE", url)
    assert main(["score", source, "--model", FIRST, "--output", str(tmp_path / "scores.parquet")]) == 0
    rows = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    assert rows["path"] == ["a/1.png", "a/cut.png", "b.png"]
    assert [problem and problem.split(":")[0] for problem in rows["problem"]] == [None, "TruncatedImageError", None]
    assert rows["sha256"][2] == hashlib.sha256(picture(3)).hexdigest()

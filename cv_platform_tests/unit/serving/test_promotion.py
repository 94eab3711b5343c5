import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cv_platform.database.file_lock import exclusive
from cv_platform.errors import BundleNotFoundError, CorruptBundleError, DeploymentError, PromotionBusyError
from cv_platform.serving.promotion import PROMOTION_LOCK, promote, roll_back
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.tiny_models import MODEL_NAME, TinyExport, publish_tiny

pytestmark = pytest.mark.xdist_group("tensorflow")

SERVICE = "image_classifier"
FIRST, SECOND, THIRD = "20260101T000000Z-00000001", "20260102T000000Z-00000002", "20260103T000000Z-00000003"


@pytest.fixture
def storage(tmp_path: Path, tiny_export: TinyExport) -> CentralStorage:
    storage = CentralStorage(tmp_path / "storage")
    for version in (FIRST, SECOND, THIRD):
        publish_tiny(storage, tiny_export, version)
    return storage


def move(storage: CentralStorage, cache: Path, version: str | None = None) -> None:
    promote(storage, service=SERVICE, model_name=MODEL_NAME, version=version, cache=cache, lock=cache / PROMOTION_LOCK)


def move_back(storage: CentralStorage, cache: Path) -> ProductionPointer:
    return roll_back(storage, service=SERVICE, cache=cache, lock=cache / PROMOTION_LOCK)


def served(storage: CentralStorage) -> tuple[str, str | None]:
    pointer = storage.read_pointer(SERVICE)
    assert pointer is not None
    return pointer.version, pointer.previous_version


def test_takes_the_newest_version_by_default(storage: CentralStorage, cache: Path):
    move(storage, cache)
    assert served(storage) == (THIRD, None)


def test_remembers_what_was_served_before(storage: CentralStorage, cache: Path):
    move(storage, cache, FIRST)
    move(storage, cache, SECOND)
    assert served(storage) == (SECOND, FIRST)


def test_promoting_what_is_served_forgets_nothing(storage: CentralStorage, cache: Path):
    move(storage, cache, FIRST)
    move(storage, cache, SECOND)
    before = storage.read_pointer(SERVICE)
    move(storage, cache, SECOND)
    after = storage.read_pointer(SERVICE)
    assert served(storage) == (SECOND, FIRST)
    assert before is not None
    assert after is not None
    assert after.since_utc > before.since_utc


def test_a_corrupt_version_does_not_move_the_pointer(storage: CentralStorage, cache: Path, tmp_path: Path):
    move(storage, cache, FIRST)
    (tmp_path / "storage" / "models" / MODEL_NAME / SECOND / "golden.npz").unlink()
    with pytest.raises(CorruptBundleError, match=r"golden\.npz"):
        move(storage, cache, SECOND)
    assert served(storage) == (FIRST, None)


def test_unknown_models_and_versions_are_named(storage: CentralStorage, cache: Path):
    with pytest.raises(BundleNotFoundError, match="which has none"):
        promote(storage, service=SERVICE, model_name="unknown", cache=cache, lock=cache / PROMOTION_LOCK)
    with pytest.raises(BundleNotFoundError, match=THIRD):
        move(storage, cache, "20260104T000000Z-00000004")
    assert storage.read_pointer(SERVICE) is None


def test_rolls_back_and_forth(storage: CentralStorage, cache: Path):
    move(storage, cache, FIRST)
    move(storage, cache, THIRD)
    assert move_back(storage, cache).version == FIRST
    assert served(storage) == (FIRST, THIRD)
    move_back(storage, cache)
    assert served(storage) == (THIRD, FIRST)


def test_refuses_to_roll_back_where_nothing_was_before(storage: CentralStorage, cache: Path):
    with pytest.raises(DeploymentError, match="nothing was deployed"):
        move_back(storage, cache)
    move(storage, cache, FIRST)
    with pytest.raises(DeploymentError, match=FIRST):
        move_back(storage, cache)


def test_a_second_promotion_is_refused_while_one_is_under_way_and_waits_where_it_may(
    storage: CentralStorage, cache: Path
):
    lock = cache / PROMOTION_LOCK
    cache.mkdir()
    with exclusive(lock, timeout_seconds=1):
        for attempt in (lambda: move(storage, cache, FIRST), lambda: move_back(storage, cache)):
            with pytest.raises(PromotionBusyError, match="another update"):
                attempt()
    assert storage.read_pointer(SERVICE) is None

    held, waiting = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(lock, timeout_seconds=1):
            held.set()
            assert waiting.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(30)
    threading.Timer(0.2, waiting.set).start()
    promote(storage, service=SERVICE, model_name=MODEL_NAME, version=FIRST, cache=cache, lock=lock, wait_seconds=60)
    other.join(30)
    assert waiting.is_set()
    assert served(storage) == (FIRST, None)


def test_promotions_that_race_leave_a_pointer_that_remembers_the_one_before(storage: CentralStorage, cache: Path):
    def race(version: str) -> None:
        promote(
            storage,
            service=SERVICE,
            model_name=MODEL_NAME,
            version=version,
            cache=cache,
            lock=cache / PROMOTION_LOCK,
            wait_seconds=60,
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(race, (FIRST, SECOND)))
    assert served(storage) in {(FIRST, SECOND), (SECOND, FIRST)}

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cv_platform.audit import AuditLog
from cv_platform.errors import BundleNotFoundError, CorruptBundleError, DeploymentError, PromotionBusyError
from cv_platform.files import exclusive
from cv_platform.serving.model.promotion import PROMOTION_LOCK, Claim, Promoter
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.tiny_models import MODEL_NAME, TinyExport, publish_tiny

SERVICE = "image_classifier"
FIRST, SECOND, THIRD = "20260101T000000Z-00000001", "20260102T000000Z-00000002", "20260103T000000Z-00000003"


@pytest.fixture
def storage(tmp_path: Path, hand_made: TinyExport) -> CentralStorage:
    storage = CentralStorage(tmp_path / "storage")
    for version in (FIRST, SECOND, THIRD):
        publish_tiny(storage, hand_made, version)
    return storage


def promoter(storage: CentralStorage, cache: Path, wait_seconds: float = 0.0) -> Promoter:
    return Promoter(storage, SERVICE, cache, cache / PROMOTION_LOCK, wait_seconds)


def move(storage: CentralStorage, cache: Path, version: str | None = None) -> None:
    promoter(storage, cache).promote(MODEL_NAME, version)


def move_back(storage: CentralStorage, cache: Path) -> ProductionPointer:
    return promoter(storage, cache).roll_back().pointer


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
        promoter(storage, cache).promote("unknown")
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
    promoter(storage, cache, wait_seconds=60).promote(MODEL_NAME, FIRST)
    other.join(30)
    assert waiting.is_set()
    assert served(storage) == (FIRST, None)


def test_promotions_that_race_leave_a_pointer_that_remembers_the_one_before(storage: CentralStorage, cache: Path):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda version: promoter(storage, cache, 60).promote(MODEL_NAME, version), (FIRST, SECOND)))
    assert served(storage) in {(FIRST, SECOND), (SECOND, FIRST)}


class HurriedStorage(CentralStorage):
    """Lets somebody on another host, whose lock is another file, move the pointer after it was read and before it is
    moved: `moves` are made one after the other, one per reading."""

    moves: list[str]

    def read_pointer(self, service: str) -> ProductionPointer | None:
        pointer = super().read_pointer(service)
        if self.moves:
            version = self.moves.pop(0)
            move(CentralStorage(self.url), Path(self.url).parent / "cache-of-another-host", version)
        return pointer


@pytest.fixture
def hurried(storage: CentralStorage) -> HurriedStorage:
    hurried = HurriedStorage(storage.url)
    hurried.moves = []
    return hurried


def test_a_promotion_on_another_host_is_what_this_one_replaces(hurried: HurriedStorage, cache: Path):
    move(hurried, cache, FIRST)
    hurried.moves = [SECOND]
    done = promoter(hurried, cache).promote(MODEL_NAME, THIRD)
    assert done.before is not None
    assert done.before.version == SECOND
    assert served(hurried) == (THIRD, SECOND)


def test_a_rollback_does_not_undo_a_promotion_on_another_host(hurried: HurriedStorage, cache: Path):
    move(hurried, cache, FIRST)
    move(hurried, cache, SECOND)
    hurried.moves = [THIRD]
    with pytest.raises(PromotionBusyError):
        move_back(hurried, cache)
    assert served(hurried) == (THIRD, SECOND)


def owned(storage: CentralStorage, export: TinyExport, experiment: str, version: str, **changes: str) -> None:
    publish_tiny(storage, export, version, effective_config={"name": experiment}, **changes)


CATS, DOGS = "20260201T000000Z-00000001", "20260202T000000Z-00000002"


def test_another_experiment_takes_the_place_of_one_only_where_it_says_so(
    storage: CentralStorage, cache: Path, hand_made: TinyExport
):
    owned(storage, hand_made, "cats", CATS)
    owned(storage, hand_made, "dogs", DOGS)
    promoter(storage, cache).promote(MODEL_NAME, CATS, claim=Claim("cats"))
    for claim in (Claim("dogs"), Claim("dogs", takes_over="owls")):
        with pytest.raises(DeploymentError, match=r"belongs to the experiment cats.*service: dogs.*takes_over: cats"):
            promoter(storage, cache).promote(MODEL_NAME, DOGS, claim=claim)
    assert served(storage) == (CATS, None)
    promoter(storage, cache).promote(MODEL_NAME, DOGS, claim=Claim("dogs", takes_over="cats"))
    assert served(storage) == (DOGS, CATS)
    assert [entry.action for entry in AuditLog(storage.url).entries()] == ["promote", "take-over"]
    with pytest.raises(DeploymentError, match="belongs to the experiment dogs"):
        promoter(storage, cache).promote(MODEL_NAME, CATS, claim=Claim("cats"))
    move_back(storage, cache)  # With the version before comes its owner.
    promoter(storage, cache).promote(MODEL_NAME, CATS, claim=Claim("cats"))
    assert served(storage) == (CATS, DOGS)


def test_an_old_pointer_belongs_to_the_experiment_that_trained_its_bundle(
    storage: CentralStorage, cache: Path, hand_made: TinyExport
):
    owned(storage, hand_made, "cats", CATS)
    old = {"model_name": MODEL_NAME, "version": CATS, "since_utc": "2026-01-01T00:00:00Z"}
    storage.write_pointer(SERVICE, ProductionPointer.model_validate(old))
    with pytest.raises(DeploymentError, match="belongs to the experiment cats"):
        promoter(storage, cache).promote(MODEL_NAME, FIRST, claim=Claim("dogs"))
    storage.delete_bundle(MODEL_NAME, CATS)  # Nobody can tell any more, and nobody is kept from mending it.
    promoter(storage, cache).promote(MODEL_NAME, FIRST, claim=Claim("dogs"))
    assert served(storage) == (FIRST, CATS)


def test_the_experiment_is_known_even_when_its_bundle_is_gone(
    storage: CentralStorage, cache: Path, hand_made: TinyExport
):
    owned(storage, hand_made, "cats", CATS)
    move(storage, cache, CATS)
    storage.delete_bundle(MODEL_NAME, CATS)
    with pytest.raises(DeploymentError, match="belongs to the experiment cats"):
        promoter(storage, cache).promote(MODEL_NAME, FIRST, claim=Claim("dogs"))


def test_whoever_takes_a_service_during_the_load_test_is_not_replaced_either(
    hurried: HurriedStorage, cache: Path, hand_made: TinyExport
):
    owned(hurried, hand_made, "cats", CATS)
    hurried.moves = [CATS]  # After the first look, which saw a free service.
    with pytest.raises(DeploymentError, match="belongs to the experiment cats"):
        promoter(hurried, cache).promote(MODEL_NAME, FIRST, claim=Claim("dogs"))
    assert served(hurried) == (CATS, None)


def test_a_version_that_another_host_deletes_after_its_load_test_is_not_promoted(storage: CentralStorage, cache: Path):
    class Collected(CentralStorage):
        def swap_pointer(self, service: str, expected: ProductionPointer | None, new: ProductionPointer | None) -> None:
            if new is not None and new.version == SECOND:
                storage.delete_bundle(MODEL_NAME, SECOND)
            super().swap_pointer(service, expected, new)

    move(storage, cache, FIRST)
    with pytest.raises(BundleNotFoundError, match=SECOND):
        move(Collected(storage.url), cache, SECOND)
    assert served(storage) == (FIRST, None)

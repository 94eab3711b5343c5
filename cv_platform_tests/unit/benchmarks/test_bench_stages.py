"""How long many images take many workers, by what one costs."""

import pytest

from benchmarks.bench_stages import Cost


@pytest.mark.parametrize(
    ("images", "workers", "seconds"),
    [
        (1_000, 1, 2.0),
        (1_000, 4, 0.512),  # 8 shards of 128: two for each.
        (1_000, 32, 0.256),  # No more than one shard is anybody's.
        (100, 32, 0.2),  # Which has fewer images than others.
        (1_000_000, 32, 62.72),  # 7,813 shards: somebody has 245.
        (1_000_000, 1_000, 10.0),  # The driver's.
    ],
)
def test_who_has_most_to_do_is_waited_for(images: int, workers: int, seconds: float) -> None:
    cost = Cost(worker=2e-3, driver=1e-5, per_shard=lambda _: 128)
    assert cost.seconds(images, workers) == pytest.approx(seconds)

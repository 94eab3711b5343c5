from __future__ import annotations

import numpy as np
import pytest

from cv_platform.compute.rows import batch_slices, row_shards


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(0, [0]), (1, [1]), (256, [256]), (257, [257]), (258, [256, 2]), (513, [256, 257]), (1025, [256, 256, 256, 257])],
)
def test_no_batch_has_one_row_of_several_and_shards_have_the_batches_of_the_whole(count: int, sizes: list[int]) -> None:
    batches = [list(range(count))[rows] for rows in batch_slices(count)]
    assert [len(batch) for batch in batches] == sizes
    assert [row for batch in batches for row in batch] == list(range(count))
    pixels = np.broadcast_to(np.uint8(0), (count, 1, 1, 3))
    assert [len(batch) for shard in row_shards(pixels) for batch in shard.batches()] == sizes


def test_a_shard_names_its_rows_and_reads_them() -> None:
    pixels = np.arange(12, dtype=np.uint8)[:, None, None, None]
    (shard,) = row_shards(pixels, np.array([1, 2, 7]))
    assert (shard.name, shard.images) == ("rows 1 to 7", 3)
    assert [batch.ravel().tolist() for batch in shard.batches(2)] == [[1, 2, 7]]
    (nothing,) = row_shards(pixels, np.array([], dtype=np.intp))
    assert (nothing.name, nothing.images) == ("no rows", 0)

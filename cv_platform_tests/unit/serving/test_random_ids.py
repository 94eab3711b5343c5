"""Identifiers without a call of the system for each."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from cv_platform.serving.random_ids import new_id


def test_ids_are_uuids_of_version_4_and_all_differ_from_many_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: new_id(), range(5_000)))
    assert {made.version for made in ids} == {4}
    assert len(set(ids)) == 5_000


def test_a_fork_does_not_repeat_the_ids_of_its_parent() -> None:
    new_id()  # There are some left, which both would have.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, new_id().bytes)
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 16) != new_id().bytes

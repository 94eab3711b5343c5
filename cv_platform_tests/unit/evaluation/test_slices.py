from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cv_platform.datasets.manifest_rows import MANIFEST_SCHEMA
from cv_platform.evaluation.slices import judge_slices, slice_columns
from cv_platform.properties import batch_properties


def test_the_part_that_is_worse_beyond_chance_is_named_first():
    camera = np.array(["old"] * 40 + ["new"] * 160)
    correct = np.ones(200, dtype=bool)
    correct[:20] = False
    correct[40:48] = False
    noise = np.random.default_rng(0).random((200, 8))
    slices = judge_slices(pd.DataFrame(noise).assign(camera=camera), correct)
    worst = slices[0]
    assert (worst.column, worst.value, worst.images, worst.accuracy) == ("camera", "old", 40, 0.5)
    assert worst.is_worse
    # By an independent implementation of Fisher's test, times the number of parts: 8 × 4 quarters and 2 cameras.
    fisher: Any = stats.fisher_exact([[20, 20], [152, 8]], alternative="less")
    by_hand = fisher.pvalue
    assert len(slices) == 34
    np.testing.assert_allclose(worst.p_value, by_hand * 34, rtol=1e-6)
    assert [part.is_worse for part in slices[1:]] == [False] * 33


def test_many_looks_at_chance_name_a_part_as_rarely_as_stated():
    rng = np.random.default_rng(1)
    named = 0
    for _ in range(60):
        slices = judge_slices(pd.DataFrame(rng.random((120, 6))), rng.random(120) < 0.85)
        named += any(part.is_worse for part in slices)
    assert named <= 8  # Of 60 with a rate of 0.05, more would be seen once in 200 times.


def test_columns_are_properties_sizes_and_what_the_manifest_says():
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    manifest = pd.DataFrame(
        {
            "sha256": ["a", "b", "c"],
            "split": ["test"] * 3,
            "width_px": [10, 20, 30],
            "height_px": [10, 10, 10],
            "camera": ["x", None, "y"],
        }
    )
    columns = slice_columns(batch_properties(images), manifest)
    assert {"luma_mean", "width_px", "camera", "pixels", "aspect"} <= set(columns)
    assert not {"sha256", "split"} & set(columns)
    assert columns["pixels"].tolist() == [100, 200, 300]


def test_each_column_of_a_manifest_is_one_column():
    manifest = pd.DataFrame({name: [1, 2, 3] for name in MANIFEST_SCHEMA.names})
    columns = slice_columns(batch_properties(np.zeros((3, 8, 8, 3), np.uint8)), manifest)
    assert columns.columns.is_unique
    assert columns["luma_mean"].tolist() == [0, 0, 0]  # Of what the model sees, not of the manifest's overview.


def test_a_manifest_without_deep_images_is_sliced():
    manifest = pd.DataFrame({"largest_sample": [np.nan] * 40, "channels": [1, 3] * 20})
    columns = slice_columns(batch_properties(np.zeros((40, 8, 8, 3), np.uint8)), manifest)
    slices = judge_slices(columns, np.arange(40) % 2 == 0)
    assert {part.column for part in slices} == {"channels"}


def test_small_parts_and_constant_columns_are_not_judged():
    columns = pd.DataFrame({"constant": [1.0] * 50, "rare": ["a"] * 45 + ["b"] * 5, "flag": [True, False] * 25})
    slices = judge_slices(columns, np.arange(50) % 3 > 0)
    assert {(part.column, part.value) for part in slices} == {("flag", "True"), ("flag", "False")}

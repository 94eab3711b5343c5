from __future__ import annotations

import numpy as np
import pytest

from cv_platform.drift.sample import DriftSample, require_comparable
from cv_platform.errors import InvalidSampleError


def arrays(rows: int = 3) -> dict[str, np.ndarray]:
    return {
        "bbsd": np.full((rows, 2), 0.5),
        "features": np.ones((rows, 4)),
        "uae": np.ones((rows, 3)),
        "properties": np.ones((rows, 7)),
    }


def test_holds_float32_whatever_it_is_given() -> None:
    sample = DriftSample(**arrays())
    assert {getattr(sample, name).dtype for name in arrays()} == {np.dtype(np.float32)}
    assert len(sample) == 3
    assert sample.describe() == {"bbsd": 2, "features": 4, "uae": 3, "properties": 7}


def test_a_sample_may_be_empty() -> None:
    assert len(DriftSample(**arrays(0))) == 0


def test_names_every_mistake_at_once() -> None:
    broken = arrays()
    broken["features"] = broken["features"][:2]
    broken["uae"][1, 0] = np.nan
    broken["properties"] = np.ones((3, 6))
    broken["bbsd"][0, 0] = 1.5
    with pytest.raises(InvalidSampleError) as raised:
        DriftSample(**broken)
    message = str(raised.value)
    assert "features 2" in message
    assert "uae: 1 rows are not finite float32 (first: 1)" in message
    assert "6 columns instead of 7" in message
    assert "no probabilities" in message


@pytest.mark.parametrize(
    "wrong", [np.ones(3), np.ones((3, 0)), np.array([["a", "b"]] * 3), np.ones((3, 2, 2))], ids=lambda a: str(a.shape)
)
def test_refuses_what_is_no_matrix_of_numbers(wrong: np.ndarray) -> None:
    with pytest.raises(InvalidSampleError, match=r"uae: "):
        DriftSample(**{**arrays(), "uae": wrong})


def test_a_number_too_large_for_float32_is_not_finite() -> None:
    given = arrays()
    given["features"][2, 1] = 1e39
    with pytest.raises(InvalidSampleError, match="features: 1 rows"):
        DriftSample(**given)


def test_from_rows_leaves_out_rows_that_are_not_finite_anywhere() -> None:
    given = arrays(4)
    given["bbsd"][1, 0] = np.nan
    given["uae"][3, 2] = np.inf
    given["features"][:, 0] = [10, 11, 12, 13]
    sample, kept = DriftSample.from_rows(given)
    assert kept.tolist() == [True, False, True, False]
    assert sample.features[:, 0].tolist() == [10, 12]


def test_from_rows_still_refuses_misaligned_rows() -> None:
    given = arrays(4)
    given["uae"] = given["uae"][:3]
    with pytest.raises(InvalidSampleError, match="rows differ"):
        DriftSample.from_rows(given)


def test_samples_of_another_model_or_too_few_rows_are_not_comparable() -> None:
    other = {**arrays(1), "uae": np.ones((1, 5))}
    with pytest.raises(InvalidSampleError) as raised:
        require_comparable(DriftSample(**arrays()), DriftSample(**other))
    assert "uae: 3 columns in the reference, 5 in the current sample" in str(raised.value)
    assert "1 current rows" in str(raised.value)

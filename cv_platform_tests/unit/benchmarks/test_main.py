from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import default_output, main
from benchmarks.options import REPOSITORY


def test_reports_go_below_a_named_installation_else_to_build(tmp_path: Path) -> None:
    assert default_output(str(tmp_path)) == tmp_path / "benchmarks"
    assert default_output(None) == REPOSITORY / "build" / "benchmarks"


def test_unknown_benchmark_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["prediction"])
    assert (
        "names of predict, training-input, serving, runtime, soak, stack, startup. Received: 5, ['prediction']"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("arguments", [["--phases", "az"], ["--scale", "0"]])
def test_phases_and_scales_that_mean_nothing_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["soak", *arguments])

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.options import REPOSITORY, default_output


def test_reports_go_below_a_named_installation_else_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path))
    assert default_output() == tmp_path / "benchmarks"
    monkeypatch.delenv("CV_HOME")
    assert default_output() == REPOSITORY / "build" / "benchmarks"


def test_unknown_benchmark_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["prediction"])
    said = capsys.readouterr().err
    assert "names of predict, input-pipeline, data, near-copies, serving" in said
    assert f"{', '.join(BENCHMARKS)}. Received: 5, ['prediction']" in said

from __future__ import annotations

import pytest

from trials.__main__ import main


@pytest.mark.parametrize("arguments", [["--phases", "a,z"], ["--scale", "0"]])
def test_phases_and_scales_that_mean_nothing_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["soak", *arguments])

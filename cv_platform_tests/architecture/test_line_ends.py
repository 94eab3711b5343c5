"""What runs in Linux has Unix line ends, also in a checkout of git for Windows (`core.autocrlf=true`)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> bytes:
    identity = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env={**os.environ, **identity}, capture_output=True, check=True, timeout=120
    )
    return done.stdout


def test_a_checkout_of_git_for_windows_runs_in_linux(tmp_path: Path) -> None:
    origin, checkout = tmp_path / "origin", tmp_path / "checkout"
    origin.mkdir()
    git(origin, "init", "--quiet")
    listed = [Path(os.fsdecode(name)) for name in git(REPOSITORY, "ls-files", "-z").split(b"\0") if name]
    names = [name for name in listed if (REPOSITORY / name).exists()]
    for name in names:
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, origin / name)
    git(origin, "add", "--all", "--force")
    git(origin, "commit", "--quiet", "--message", "all")
    git(tmp_path, "clone", "--quiet", "--config", "core.autocrlf=true", str(origin), str(checkout))
    texts = [name for name in names if name.suffix != ".png"]
    assert {name for name in texts if b"\r\n" in (checkout / name).read_bytes()} == set()
    for script in checkout.rglob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    assert any(name.suffix == ".sh" for name in names)

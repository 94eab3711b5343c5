"""`python -m cv_platform.maintenance.volumes …`: the volumes of the stack as streams, from within a container.

`make stack-backup` and `make stack-restore` run it in the service `maintenance` of docker/compose.yaml, which has every
volume mounted; what they send and get are streams of `archive_stream.py` with names `<volume>/<path>`. The order of a
backup is the embedded installation's, see `contents.py`: `spool`, the request log's dump, `names`, the other dumps, and
last `things`, which the names name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cv_platform.errors import BackupError, CvPlatformError
from cv_platform.files import exclusive
from cv_platform.maintenance.archive import write_member
from cv_platform.maintenance.archive_stream import ArchiveReader, packing
from cv_platform.maintenance.backup import add_part, maintenance_lock, part_bytes
from cv_platform.maintenance.contents import (
    UNFINISHED,
    Part,
    pointers_part,
    records_part,
    spool_part,
    stored_parts,
    training_parts,
)

KIND = "part of a stack"
MOUNTS = {
    "home": Path("/data/home"),
    "storage": Path("/data/storage"),
    "mlflow": Path("/data/mlflow"),
    "evidently": Path("/data/evidently"),
    "notebooks": Path("/data/notebooks"),
    "spool": Path("/data/service"),
}
"""Of the service `maintenance`, by volume."""
_EVERYTHING = "."


def phases() -> dict[str, list[tuple[str, Part]]]:
    """Returns volume and part of all that is copied, by phase, in its order."""
    return {
        "spool": [("spool", spool_part())],
        "names": [("home", records_part()), ("storage", pointers_part(_EVERYTHING))],
        "things": [
            # What runs have printed is in the volume alone: the stack's Dagster shows it.
            ("home", Part("dagster", skip=("*.lock",))),
            ("home", Part("metrics", skip=(".*",))),
            ("evidently", Part(_EVERYTHING)),
            *(("home", part) for part in training_parts()),
            *(("storage", part) for part in stored_parts(_EVERYTHING)),
            ("mlflow", Part(_EVERYTHING, skip=UNFINISHED)),
            ("notebooks", Part(_EVERYTHING, skip=(".cache", ".ipynb_checkpoints"))),
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m cv_platform.maintenance.volumes", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    hold = commands.add_parser("hold", help="keep other maintenance away until standard input ends")
    hold.set_defaults(command=lambda _: _hold())
    send = commands.add_parser("send", help="write a phase to standard output")
    send.add_argument("phase", choices=list(phases()))
    send.set_defaults(command=lambda options: _send(options.phase))
    receive = commands.add_parser("receive", help="write what standard input holds into empty volumes")
    receive.set_defaults(command=lambda _: _receive())
    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except CvPlatformError as err:
        sys.stderr.write(f"error: {err}\n")
        return 1
    return 0


def _hold() -> None:
    """Takes the lock of backup and garbage collection, says what is to be copied, and waits for the end of input.

    Whoever started it may be killed: then the input ends, too.
    """
    with exclusive(maintenance_lock(MOUNTS["home"]), timeout_seconds=0.0):
        needed = sum(part_bytes(part, MOUNTS[volume]) for parts in phases().values() for volume, part in parts)
        sys.stdout.write(json.dumps({"bytes": needed}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


def _send(phase: str) -> None:
    files = Counter[str]()
    run = MOUNTS["home"] / "run"
    with (
        # On a disk: the container's /tmp is memory.
        tempfile.TemporaryDirectory(dir=run, prefix=".backup-") as staging,
        packing(sys.stdout.buffer, kind=KIND, product_version="") as writer,
    ):
        for volume, part in phases()[phase]:
            files[volume] += add_part(writer, part, MOUNTS[volume], below=volume, staging=Path(staging))
        writer.details = {"files": dict(files)}
    sys.stdout.buffer.flush()


def _receive() -> None:
    for info, content in ArchiveReader("standard input", sys.stdin.buffer):
        volume, _, path = info.name.partition("/")
        if volume not in MOUNTS:
            raise BackupError(
                f"Expected one of the volumes {', '.join(MOUNTS)}. Received: {volume!r}. "
                "Restore it with the release that made it."
            )
        try:
            write_member(content, MOUNTS[volume] / path)
        except FileExistsError as err:
            raise BackupError(f"Expected empty volumes. Received: {err}. Restore into new ones.") from err
    spool = MOUNTS["spool"] / "spool"
    if spool.is_dir():
        spool.chmod(0o700)  # A service refuses one that others may read.
    os.sync()


if __name__ == "__main__":
    sys.exit(main())

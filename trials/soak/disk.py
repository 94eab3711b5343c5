"""Phase f: the disk of the spool runs full while PostgreSQL is away, and everything has to come back by itself."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence

from trials.findings import Findings, wait_until
from trials.soak.stage import Stage, add_rows
from trials.traffic import Traffic, failures, statuses

DISK_MIB = 128
"""More than the spool's reserve, and a backlog larger than that: deleting what was drained needs the reserve."""
RESERVE_MIB = 32
FULL_SECONDS = 90.0
RECOVERY_SECONDS = 60.0


def on_a_small_disk(command: Sequence[str], folder: str) -> list[str]:
    """Returns a command that runs another with a file system of `DISK_MIB` of its own at `folder`.

    A mount namespace keeps the file system from everybody else, and ends with the last process in it; a user namespace
    lets those mount who are not root. See unshare(1).
    """
    rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = f"mount -t tmpfs -o size={DISK_MIB}m,mode=700 tmpfs {shlex.quote(folder)} && exec {shlex.join(command)}"
    return ["unshare", *rights, "--mount", "sh", "-c", script]


def fill_the_disk(stage: Stage) -> Findings:
    """Stops PostgreSQL until the spool has filled its disk, and starts it again; nobody makes room by hand."""
    findings = Findings()
    spool = stage.settings.home / "spool"
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir(mode=0o700)
    with stage.service(
        "full disk",
        wrap=lambda command: on_a_small_disk(command, str(spool)),
        CV_SPARE_DISK_BYTES=str(RESERVE_MIB * 2**20),
    ) as server:
        with Traffic(server.base_url, stage.uploads, concurrency=4, is_unique=True) as traffic:
            traffic.wait_for(50, seconds=30)
            with stage.database_stopped():
                wait_until(
                    lambda: sum(outcome.status == 503 for outcome in traffic.outcomes) >= 50,
                    seconds=FULL_SECONDS,
                    what="50 answers with 503",
                )
                # One worker may be full before the other.
                wait_until(
                    lambda: {stage.get(server, "/health_check")[0] for _ in range(8)} == {503},
                    seconds=FULL_SECONDS,
                    what="503 from /health_check of every worker",
                )
                while_full, health = stage.get(server, "/health_check")
            refused = len(traffic.outcomes)
            recovered = traffic.wait_for(200, seconds=RECOVERY_SECONDS)
            last = traffic.outcomes[refused:]
        wait_until(lambda: stage.get(server, "/health_check")[0] == 200, seconds=RECOVERY_SECONDS, what="health again")
        outcomes = traffic.outcomes
        add_rows(findings, stage, outcomes)
    failed = failures(outcomes)
    others = [outcome for outcome in failed if outcome.status != 503]
    findings.add(
        f"200 or 503 on a disk of {DISK_MIB} MiB, nothing else",
        statuses(outcomes) + (f", {others[0].error[:200]}" if others else ""),
        not others,
    )
    findings.add(
        "/health_check 503 while it is full, 200 afterwards",
        f"{while_full} ({health.get('message', '')[:100]}), 200",
        while_full == 503,
    )
    findings.add("200 again without a hand's help once PostgreSQL is back", statuses(last), recovered)
    return findings

"""Functions on shards that end their process at one image, as a decoder does that a file makes crash.

Other processes find them by their names; imports little, as each of them does it anew.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cv_platform.config import ExperimentConfig
    from cv_platform.datasets.manifest_rows import Part
    from cv_platform.datasets.shards.writing import Plan
    from cv_platform.deployment.replay import UploadShard
    from cv_platform.encoders.embeddings import Part as EmbeddedPart
    from cv_platform.encoders.encoder import Encoder
    from cv_platform.scoring.rows import Batch, Scorer
    from cv_platform.serving.model.runtime import PublishedModel
    from cv_platform.training.search import Proposal, Search

POISON = "cat/3.png"
MARK = b"poison"


def scores(scorer: Scorer, batch: Batch) -> Any:
    """Scores a batch that has not the image in it."""
    from cv_platform.scoring.rows import score_batch

    _survive(POISON not in batch.paths)
    return score_batch(scorer, batch)


def describes(part: Part) -> Any:
    """Describes a part of a manifest that has not the image in it."""
    from cv_platform.datasets.manifest_rows import describe

    _survive(POISON not in [entry.path for entry in part.entries])
    return describe(part)


def embeds(encoder: Encoder, part: EmbeddedPart) -> Any:
    """Embeds a part that has not the image in it."""
    from cv_platform.encoders.embeddings import embed_part

    _survive(not _has_poison(part.pixels.files.paths))  # pyright: ignore[reportAttributeAccessIssue]
    return embed_part(encoder, part)


def packs(plan: Plan) -> Any:
    """Packs a shard that has not the image in it."""
    from cv_platform.datasets.shards.writing import write_shard

    _survive(not _has_poison(plan.files.paths))
    return write_shard(plan)


def packs_alone(plan: Plan) -> Any:
    """Packs a shard that has not the image in it beside others, as where memory is short."""
    from cv_platform.datasets.shards.writing import write_shard

    _survive(plan.images == 1 or not _has_poison(plan.files.paths))
    return write_shard(plan)


def _has_poison(paths: Sequence[str]) -> bool:
    return any(path.endswith(POISON) for path in paths)


def answers(old: PublishedModel, new: PublishedModel, shard: UploadShard) -> Any:
    """Answers uploads of which none ends with the mark."""
    from cv_platform.deployment.replay import answer_uploads

    _survive(not any(content.endswith(MARK) for content in shard.contents))
    return answer_uploads(old, new, shard)


def trains(search: Search, config: ExperimentConfig, proposal: Proposal) -> Any:
    """Trains a trial that is not the first one."""
    from cv_platform.training.search import _outcome

    _survive(proposal.number > 0)
    return _outcome(search, config, proposal)


def _survive(is_well: bool) -> None:
    if not is_well:
        os.kill(os.getpid(), signal.SIGKILL)

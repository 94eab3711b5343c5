"""What the loop does next, and why: drift or labels → a new data version → training → gate → replay → deployment.

`decide` takes facts and knows no clock, database or Dagster; `read_facts` gathers what the platform's own records say,
and `defs.loop` acts. The loop trains on no data version and recipe twice, keeps to its budget, and stops where labels
are refused, until they or the rules about them have changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sqlalchemy import Engine, Select, func, select

from cv_platform.config import ExperimentConfig, LoopConfig
from cv_platform.database.schema import feedback, predictions
from cv_platform.datasets.versions import list_tags
from cv_platform.errors import DatasetError, InvalidDatasetError, StorageError, SuspectLabelsError
from cv_platform.monitoring.episodes import OpenEpisode, open_episode
from cv_platform.monitoring.growth import GROWN_SUFFIX, GrowthRules, grow_dataset
from cv_platform.probation import Probation
from cv_platform.record_store import RecordStore
from cv_platform.records import Deployment, Evaluation, LabelledVersion, ModelIdentity, Replay, TrainedModel
from cv_platform.storage import CentralStorage

WEEK = timedelta(days=7)
_MOST_STATEMENTS = 1000
"""The latest ones, besides two for each label that is needed, that are looked at before all are counted."""
Action = Literal["wait", "grow", "retrain"]
Step = Literal["idle", "at work", "collecting labels", "resting", "growing", "retraining", "stopped"]


@dataclass(frozen=True)
class LoopFacts:
    """What the loop decides by.

    Attributes:
        now: with its zone.
        episode: drift that lasts; None without.
        labels: uploads labelled since the version that the labels have made last.
        fresh_labels: of them, those since the last attempt to make one.
        has_more_labels: there are as many as are needed, and the rest was not counted.
        last_statement: the log's last one, `feedback.id`; 0: none.
        attempt: the last attempt; None before the first.
        target: the tag that a training would have.
        target_key: names its data and the recipe; a training with the same one would be the same again.
        is_trained: the latest model is of that.
        unfinished: a run of the experiment that is at work; empty without.
        tried: what became of the loop's own run with `target_key`; empty: there was none.
        trainings: when its trainings of the last week were asked for, the latest first.
        challenger: what became of the latest model, in words, by stage.
        probation: the one under way on live traffic, as counted now, or the last one; None without.
    """

    now: datetime
    episode: OpenEpisode | None = None
    labels: int = 0
    fresh_labels: int = 0
    has_more_labels: bool = False
    last_statement: int = 0
    attempt: LabelledVersion | None = None
    target: str = ""
    target_key: str = ""
    is_trained: bool = False
    unfinished: str = ""
    tried: str = ""
    trainings: tuple[datetime, ...] = ()
    challenger: Mapping[str, str] = field(default_factory=dict[str, str])
    probation: Probation | None = None

    @property
    def progress(self) -> str:
        """Names what the page shows of a probation under way: another word when there is a tenth more of it."""
        one = self.probation
        if one is None:
            return ""
        seen = one.tally.champion.asked + one.tally.challenger.asked + one.tally.shadow.asked
        return f"{one.probation_id} {one.state} {int(math.log(1 + seen, 1.1))}"

    @property
    def counted(self) -> str:
        """Says how many labels there are."""
        return f"{self.labels}{' or more' if self.has_more_labels else ''}"

    def runs_left(self, loop: LoopConfig) -> int:
        """Returns how many trainings the budget of the last seven days leaves."""
        return max(0, loop.max_runs_per_week - len(self.trainings))

    def rests_until(self, loop: LoopConfig) -> datetime | None:
        """Returns when the next training may begin; None: at once."""
        ends = [self.trainings[0] + timedelta(hours=loop.cool_down_hours)] if self.trainings else []
        if not self.runs_left(loop):
            ends.append(self.trainings[loop.max_runs_per_week - 1] + WEEK)
        latest = max(ends, default=self.now)
        return latest if latest > self.now else None


@dataclass(frozen=True)
class Decision:
    """What the loop does now, and why, in words."""

    action: Action
    step: Step
    reason: str


def decide(facts: LoopFacts, loop: LoopConfig) -> Decision:
    """Returns what the loop does now.

    Args:
        facts: see there.
        loop: thresholds, budget and rules; `enabled` is the caller's part.
    """
    if facts.unfinished:
        return Decision("wait", "at work", f"{facts.unfinished} is at work")
    attempt = facts.attempt
    is_pending = attempt is not None and attempt.tag == facts.target and not facts.is_trained and not facts.tried
    needed = loop.min_new_labels_in_drift if facts.episode else loop.min_new_labels
    counted = f"{facts.counted} of {needed} new labels"
    if facts.episode is None and facts.labels < needed and not (is_pending and attempt and attempt.statements):
        failed = f"; its {facts.tried}" if facts.tried and not facts.is_trained else ""
        return Decision("wait", "idle", f"no drift lasts, and there are {counted}{failed}")
    cause = f"drift since {facts.episode.window_end_utc:%Y-%m-%d %H:%M} UTC, " if facts.episode else ""
    if (until := facts.rests_until(loop)) is not None:
        budget = f"{facts.runs_left(loop)} of {loop.max_runs_per_week} trainings of this week are left"
        return Decision("wait", "resting", f"{cause}{counted}; until {until:%Y-%m-%d %H:%M} UTC it rests, {budget}")
    if facts.labels >= needed:
        if attempt is None or not attempt.refused or _may_try_again(facts, attempt, loop, needed):
            return Decision("grow", "growing", f"{cause}{counted}: the dataset grows by them")
        return Decision("wait", "stopped", f"the labels were refused. {attempt.refused}")
    if not facts.is_trained and not facts.tried:
        return Decision("retrain", "retraining", f"{cause}{facts.target} has not been trained on with this recipe")
    seen = f"{facts.target} is trained on already" if facts.is_trained else f"its {facts.tried}"
    return Decision("wait", "collecting labels", f"{cause}{counted}; {seen}, and the same again gives the same model")


def _may_try_again(facts: LoopFacts, attempt: LabelledVersion, loop: LoopConfig, needed: int) -> bool:
    """Whether refused labels may have become others: by new rules, or by enough labels since, after a while."""
    if (attempt.trust, attempt.without) != (loop.trust, loop.without):
        return True
    has_rested = attempt.made_utc + timedelta(hours=loop.cool_down_hours) <= facts.now
    return has_rested and facts.fresh_labels >= needed


def read_facts(
    config: ExperimentConfig, engine: Engine, *, home: Path, storage: CentralStorage, now: datetime
) -> LoopFacts:
    """Gathers what records, log and dataset say; what Dagster knows (runs) is not in it.

    Raises:
        DatasetError, StorageError, DatabaseUnavailableError, SchemaMismatchError: see there.
    """
    records = RecordStore(home, config.name)
    attempt = records.latest(LabelledVersion)
    target = target_config(config, attempt, home=home)
    made, looked_at = (attempt.statements, attempt.looked_at) if attempt else (0, 0)
    enough = max(config.loop.min_new_labels, config.loop.min_new_labels_in_drift)
    count = _count_labels(engine, config.model.model_name, made, looked_at, enough=enough)
    pointer = storage.read_pointer(config.deploy.service)
    episode = None
    if pointer is not None and pointer.model_name == config.model.model_name:
        model = ModelIdentity(model_name=pointer.model_name, version=pointer.version)
        reference = storage.read_accepted(model.model_name, model.version)
        episode = open_episode(
            engine, experiment=config.name, model=model, reference=reference.report_id if reference else ""
        )
    probation = storage.read_probation(config.deploy.service)
    tags = list_tags(config.dataset, home=home)
    recipe = target.fingerprint("model", "dataset", "train", without=("dataset.dvc_tag",))
    return LoopFacts(
        now=now,
        episode=episode,
        labels=count.labels,
        fresh_labels=count.fresh,
        has_more_labels=count.has_more,
        last_statement=count.last,
        attempt=attempt,
        target=target.dataset.dvc_tag,
        target_key=f"{tags.get(target.dataset.dvc_tag, 'none')}-{recipe}",
        is_trained=is_trained_on(target, home),
        challenger=_challenger(records, pointer.version if pointer else ""),
        probation=probation if probation and probation.model_name == config.model.model_name else None,
    )


def target_config(config: ExperimentConfig, attempt: LabelledVersion | None, *, home: Path) -> ExperimentConfig:
    """Returns the experiment on the version that the labels have made of the configured one; else as it is."""
    tag = config.dataset.dvc_tag
    if attempt is None or GROWN_SUFFIX.sub("", attempt.tag) != GROWN_SUFFIX.sub("", tag):
        return config
    if list_tags(config.dataset, home=home).get(attempt.tag) != attempt.dvc_md5:
        return config  # Somebody has removed the version, or moved its tag.
    return config.with_fields({"dataset.dvc_tag": attempt.tag})


def is_trained_on(config: ExperimentConfig, home: Path) -> bool:
    """Whether the latest training of an experiment had the recipe and the images that the next one would have."""
    try:
        trained = RecordStore(home, config.name).latest(TrainedModel)
        tags = list_tags(config.dataset, home=home)
    except (DatasetError, StorageError):
        return False  # The run says what is wrong.
    if trained is None or tags.get(config.dataset.dvc_tag) != trained.provenance.dvc_md5:
        return False
    today, then = config.model_dump(mode="json"), trained.effective_config
    # The same images under another tag are the same.
    today["dataset"]["dvc_tag"] = then.get("dataset", {}).get("dvc_tag")
    return all(then.get(section) == today[section] for section in ("model", "dataset", "train"))


def grow_by_labels(
    config: ExperimentConfig, engine: Engine, *, home: Path, now: datetime, spare_bytes: int | None = None
) -> LabelledVersion:
    """Makes the labels in the log the next version; where they are refused, returns that, with the version before.

    Unless `loop.enabled` is set nothing is stored, and the record says what would be.

    Raises:
        DatasetError, DatabaseUnavailableError, SchemaMismatchError: see `growth.grow_dataset`.
    """
    before = RecordStore(home, config.name).latest(LabelledVersion)
    base, loop = target_config(config, before, home=home), config.loop
    last = _count_labels(engine, config.model.model_name, 0, 0, enough=1).last
    tag = base.dataset.dvc_tag
    is_next = before is not None and before.tag == tag
    record = LabelledVersion(
        base=tag,
        tag=tag,
        dvc_md5=list_tags(config.dataset, home=home).get(tag, ""),
        statements=before.statements if before and is_next else 0,
        looked_at=last,
        made_utc=now,
        trust=loop.trust,
        without=loop.without,
    )
    rules = GrowthRules(trusted=loop.trust, without=loop.without, is_dry_run=not loop.enabled)
    try:
        grown = grow_dataset(base, engine, rules, home=home, spare_bytes=spare_bytes)
    except InvalidDatasetError as err:
        suspects = err.sources if isinstance(err, SuspectLabelsError) else ()
        return record.model_copy(update={"refused": str(err), "suspects": suspects})
    if grown.version is None:
        told = ("loop.enabled is false: nothing was stored. It would be:", *grown.summary)
        return record.model_copy(update={"summary": told, "looked_at": record.statements})
    made = {"tag": grown.version.tag, "dvc_md5": grown.version.dvc_md5, "statements": last, "summary": grown.summary}
    return record.model_copy(update=made)


class _Count(NamedTuple):
    """Uploads labelled since one statement and since another, the model's last statement, and whether more were."""

    labels: int
    fresh: int
    last: int
    has_more: bool


def _count_labels(engine: Engine, model_name: str, made: int, looked_at: int, *, enough: int) -> _Count:
    """Counts kept uploads that were labelled by statements after each of two: all, or of the latest ones where enough.

    What is not after the earlier of the two is not read: where there is nothing else, that one is the last.

    Args:
        engine: of the request log.
        model_name: whose uploads.
        made: the statement up to which a version was made.
        looked_at: the one up to which an attempt was.
        enough: counts from which on it does not matter how many more there are.
    """
    most = _MOST_STATEMENTS + 2 * enough
    with engine.connect() as connection:
        labels, fresh, last, statements, first = connection.execute(_labelled(model_name, made, looked_at, most)).one()
        is_all = statements < most
        if is_all or (labels >= enough and (fresh >= enough or first <= looked_at)):
            return _Count(labels, fresh, last, not is_all)
        labels, fresh, last, *_ = connection.execute(_labelled(model_name, made, looked_at, None)).one()
    return _Count(labels, fresh, last, has_more=False)


def _labelled(model_name: str, made: int, looked_at: int, most: int | None) -> Select[Any]:
    """Returns what counts labels, see `_count_labels`, by the latest statements, and these, and finds the first."""
    earlier = min(made, looked_at)
    said = select(feedback.c.id, feedback.c.prediction_id).where(feedback.c.id > earlier)
    latest = said.order_by(feedback.c.id.desc()).limit(most).subquery()
    number, upload = latest.c.id, predictions.c.image_sha256
    is_of_it = (predictions.c.prediction_id == latest.c.prediction_id) & (predictions.c.model_name == model_name)
    return select(
        func.count(upload.distinct()).filter(number > made),
        func.count(upload.distinct()).filter(number > looked_at),
        func.coalesce(func.max(number).filter(upload.is_not(None)), earlier),
        func.count(),
        func.min(number),
    ).select_from(latest.outerjoin(predictions, is_of_it))


def _challenger(records: RecordStore, served: str) -> dict[str, str]:
    trained = records.latest(TrainedModel)
    if trained is None:
        return {}
    version = trained.model.version
    told = {"model": f"{version}, trained on {trained.provenance}"}
    for stage, record in (("gate", records.latest(Evaluation)), ("replay", records.latest(Replay))):
        if record is not None and record.model.version == version:
            told[stage] = f"{'passed' if record.passed else 'refused'}: {'; '.join(record.reasons)}"
    deployed = records.latest(Deployment)
    if served == version:
        told["deployment"] = "in production"
    elif deployed is not None and deployed.model.version == version:
        told["deployment"] = f"was in production; {served or 'nothing'} is now"
    return told


def loop_page(facts: LoopFacts, decision: Decision, config: ExperimentConfig) -> str:
    """Returns where the loop of an experiment stands, as Markdown."""
    loop, attempt = config.loop, facts.attempt
    episode = "none"
    if (one := facts.episode) is not None:
        episode = f"drift in the window until {one.window_end_utc:%Y-%m-%d %H:%M} UTC ({one.report_url})"
    rests = facts.rests_until(loop)
    labels = f"{facts.counted} uploads since the last version"
    if attempt is not None:
        labels += f"; {attempt.tag} of {attempt.made_utc:%Y-%m-%d %H:%M} UTC" if attempt.statements else ""
        labels += f"; refused: labels of {', '.join(attempt.suspects) or 'no source'}" if attempt.refused else ""
    rows: dict[str, Any] = {
        "step": decision.step if loop.enabled else f"off (loop.enabled); it would be: {decision.step}",
        "why": decision.reason,
        "open episode": episode,
        "labels": labels,
        "next training": f"{facts.target}{', trained on already' if facts.is_trained else ''}",
        "budget": f"{facts.runs_left(loop)} of {loop.max_runs_per_week} trainings a week left"
        + (f", rests until {rests:%Y-%m-%d %H:%M} UTC" if rests else ""),
        **{f"latest {stage}" if stage == "model" else stage: said for stage, said in facts.challenger.items()},
    }
    if (tried := facts.probation) is not None:
        said = f": {tried.reason}" if tried.reason else ""
        rows["on live traffic"] = f"{tried.version} since {tried.since_utc:%Y-%m-%d %H:%M} UTC, {tried.state}{said}"
    page = _markdown_table([["", ""], *([f"**{name}**", value] for name, value in rows.items())])
    if not (figures := tried.figures if tried else []):
        return page
    return f"{page}\n\n{_markdown_table([list(figures[0]), *(list(row.values()) for row in figures)])}"


def _markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    head, *rest = [f"| {' | '.join(' '.join(str(cell).split()).replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])

"""Searches for a better recipe: trials of the same packed images, each a training of its own, kept by Optuna.

Optuna's TPE (Bergstra et al. 2011) proposes, its Hyperband (Li et al. 2018) stops early what falls behind. A study is
named after all that its trials share, so that a search that is asked for again, after a kill or with a larger budget,
goes on where it was, and one over other data or another space begins anew. A trial that was killed is trained again
with the same values, from its last whole epoch on. https://optuna.readthedocs.io
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from cv_platform.compute import map_shards
from cv_platform.compute.engine import Salvage
from cv_platform.compute.ray_engine import RayEngine
from cv_platform.config import ExperimentConfig, Span
from cv_platform.datasets.packing import open_split
from cv_platform.errors import DatabaseUnavailableError, TrackingError, TrainingError
from cv_platform.pages import render
from cv_platform.records import PackedImages
from cv_platform.tracking import MlflowRun
from cv_platform.training.fitting import fit_model

if TYPE_CHECKING:
    import optuna

    from cv_platform.compute.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """What a search needs beside its config.

    Attributes:
        packed: the pixels that all trials share.
        storage: Optuna's.
        folder: of the trials under way.
        run: MLflow run that the trials' runs go below.
        spare_bytes: see `files.require_free_space`.
    """

    packed: PackedImages
    storage: optuna.storages.BaseStorage
    folder: Path
    run: MlflowRun
    spare_bytes: int | None = None


def study_name(packed: PackedImages, config: ExperimentConfig) -> str:
    """Returns the name of the study: the same for all that its trials share."""
    shared = config.with_fields({}).fingerprint("model", "train", without=["train.mlflow", "model.drift_detection"])
    space = json.dumps([config.tune.space, config.tune.metric, config.tune.pruning], sort_keys=True)
    digest = hashlib.sha256(f"{shared} {space} {packed.directory.name}".encode()).hexdigest()
    return f"{config.name}-{digest[:10]}"


def run_search(search: Search, config: ExperimentConfig, engine: Engine | None = None) -> optuna.Study:
    """Trains trials until the budget is used, and returns the study.

    By Ray, as many at a time as it has workers, which reach Optuna's storage and MLflow by the same addresses; by any
    other engine one after the other, in this process.

    Raises:
        TrainingError: not one trial could be trained; the message has the last reason.
        DatabaseUnavailableError: the database that keeps the trials is away; the same call goes on when it is back.
    """
    import optuna

    try:
        return _run_trials(search, config, engine)
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as err:
        cause = err.__cause__ if isinstance(err.__cause__, SQLAlchemyError) else err
        raise DatabaseUnavailableError(
            f"Expected the database that keeps the trials of {study_name(search.packed, config)}. Received: "
            f"{str(cause).partition(chr(10))[0]:.300}. What was finished is kept: when the database is back, type the "
            "command again, and the search goes on."
        ) from err


def _run_trials(search: Search, config: ExperimentConfig, engine: Engine | None) -> optuna.Study:
    import optuna

    study = _open_study(search, config)
    _take_up(study)
    last_error = "as many as tune.trials have failed before"
    proposals = _proposals(study, config)
    work = partial(_outcome, search, config)
    outcomes: Iterable[tuple[Proposal, tuple[str, Any]]] = ((one, work(one)) for one in proposals)
    if isinstance(engine, RayEngine):
        single = engine.one_each()
        # A proposal counts as one image, so that none is ever divided.
        salvage: Salvage[Proposal, tuple[str, Any]] = Salvage(
            divide=lambda one: [one], join=lambda found: found[0], lost=lambda one, why: ("FAIL", f"it {why}")
        )
        outcomes = map_shards(
            work,
            proposals,
            engine=single,
            title="Searching",
            total=config.tune.trials,
            in_order=False,
            salvage=salvage,
        )
    for one, (state, found) in outcomes:
        if state == "COMPLETE":
            study.tell(one.number, found)
            logger.info("%s: %s %.4f with %s", one.name, config.tune.metric, found, one.changes)
            continue
        study.tell(one.number, state=optuna.trial.TrialState[state])
        if state == "PRUNED":
            logger.info("%s: stopped early", one.name)
            continue
        last_error = str(found)
        logger.warning("%s failed: %s", one.name, found)
        if _failed_alone(study):
            break
    if not _finished(study, optuna.trial.TrialState.COMPLETE):
        raise TrainingError(f"Expected a trial that could be trained to its end. Received none: {last_error}")
    return study


@dataclass(frozen=True)
class Proposal:
    """A trial that is to be trained, by this process or by another one: a shard of a search.

    Attributes:
        number: in its study.
        id: in Optuna's storage.
        changes: the values that it tries, by field.
        seconds: that are left of the search's time.
    """

    number: int
    id: int
    changes: Mapping[str, Any]
    seconds: float

    @property
    def images(self) -> int:
        """One, for the progress."""
        return 1

    @property
    def name(self) -> str:
        """How the log calls it."""
        return f"trial {self.number}"


def _proposals(study: optuna.Study, config: ExperimentConfig) -> Iterator[Proposal]:
    while (rest := _budget(study, config)) is not None:
        trial = study.ask()
        changes = {field: _suggest(trial, config, field, said) for field, said in config.tune.spans.items()}
        yield Proposal(trial.number, trial._trial_id, changes, rest)  # No public name has it.


def _outcome(search: Search, config: ExperimentConfig, proposal: Proposal) -> tuple[str, Any]:
    """Trains a trial, and returns the name of Optuna's state for it, with its value or why there is none."""
    import optuna

    name = study_name(search.packed, config)
    study = optuna.load_study(study_name=name, storage=search.storage, pruner=_pruner(config))
    trial = optuna.trial.Trial(study, proposal.id)
    try:
        deadline = time.monotonic() + proposal.seconds
        return "COMPLETE", _train(search, config, trial, proposal.changes, deadline=deadline)
    except optuna.TrialPruned:
        return "PRUNED", None
    except (TrainingError, ValidationError, TrackingError) as err:
        # Values that do not go together, or a rate that diverges: a finding, and no reason to end the search.
        return "FAIL", str(err)


def _open_study(search: Search, config: ExperimentConfig) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name, direction = study_name(search.packed, config), "minimize" if "entropy" in config.tune.metric else "maximize"
    study = optuna.create_study(
        storage=search.storage, study_name=name, direction=direction, pruner=_pruner(config), load_if_exists=True
    )
    # Drawn anew where a search goes on, or it would propose what it has tried.
    study.sampler = optuna.samplers.TPESampler(
        seed=config.train.seed + len(study.trials), n_startup_trials=max(4, min(10, config.tune.trials // 3))
    )
    own = _own_values(config)
    if not study.trials and own is not None:
        study.enqueue_trial(own)  # The recipe as it is: what is found is never worse than it.
    return study


def _pruner(config: ExperimentConfig) -> optuna.pruners.BasePruner:
    import optuna

    epochs = config.tune.spans.get("train.epochs", [config.train.epochs])
    most = int(epochs.high if isinstance(epochs, Span) else max(epochs)) + (config.transfer is not None)
    return (
        optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(1, most), reduction_factor=3)
        if config.tune.pruning == "hyperband"
        else optuna.pruners.NopPruner()
    )


def _own_values(config: ExperimentConfig) -> dict[str, Any] | None:
    """Returns what the config itself has for the fields that are searched; None where that is not in the space."""
    dump, own = config.model_dump(mode="json"), dict[str, Any]()
    for field, said in config.tune.spans.items():
        value: Any = dump
        for part in field.split("."):
            value = value[part]
        if isinstance(said, Span):
            is_in = isinstance(value, int | float) and said.low <= value <= said.high
        else:
            is_in = value in said
        if not is_in:
            return None
        own[field] = value
    return own


def _take_up(study: optuna.Study) -> None:
    """Puts the trials that a killed process has left into the queue again, with their values."""
    from optuna.trial import TrialState

    for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(left.number, state=TrialState.FAIL)
        study.enqueue_trial(left.params, user_attrs={"goes_on_with": left.number})
        logger.info("going on with trial %d, which was interrupted", left.number)


def _finished(study: optuna.Study, *states: optuna.trial.TrialState) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def _failed_alone(study: optuna.Study) -> bool:
    """Whether the first trials have all failed: then the next will, too."""
    from optuna.trial import TrialState

    return not _finished(study, TrialState.COMPLETE, TrialState.PRUNED) and len(_finished(study, TrialState.FAIL)) >= 5


def _budget(study: optuna.Study, config: ExperimentConfig) -> float | None:
    """Returns the seconds that are left for trials; None when nothing is."""
    from optuna.trial import TrialState

    # What a kill has interrupted was trained again as another trial, and between the two nothing was.
    interrupted = {trial.user_attrs.get("goes_on_with") for trial in study.get_trials(deepcopy=False)}
    ended = _finished(study, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    done = [trial for trial in ended if trial.number not in interrupted]
    under_way = len(_finished(study, TrialState.RUNNING))
    if len(done) + under_way >= config.tune.trials:
        return None
    if config.tune.max_seconds is None:
        return math.inf
    used = sum(trial.duration.total_seconds() for trial in done if trial.duration)
    return config.tune.max_seconds - used if used < config.tune.max_seconds else None


def _suggest(trial: optuna.Trial, config: ExperimentConfig, field: str, said: Span | list[Any]) -> Any:
    if not isinstance(said, Span):
        with warnings.catch_warnings():
            # Lists, such as one of augmenters, come back from the database as they are; Optuna promises single values.
            warnings.filterwarnings("ignore", "Choices for a categorical distribution", UserWarning)
            return trial.suggest_categorical(field, said)
    value: Any = config.model_dump(mode="json")
    for part in field.split("."):
        value = value[part]
    ends = (said.low, said.high, said.step or 1)
    if not isinstance(value, float) and all(float(end).is_integer() for end in ends):
        return trial.suggest_int(field, int(said.low), int(said.high), step=int(said.step or 1), log=said.log)
    return trial.suggest_float(field, said.low, said.high, step=said.step, log=said.log)


def _train(
    search: Search, config: ExperimentConfig, trial: optuna.Trial, changes: Mapping[str, Any], *, deadline: float
) -> float:
    """Trains one trial and returns what it is judged by.

    Raises:
        TrialPruned: it fell behind, or the time is over.
        ValidationError: the values do not go together.
        TrainingError: it cannot be trained.
    """
    import optuna

    trained = config.with_fields(changes)
    metric = config.tune.metric
    digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:12]
    work = search.folder / f"trial-{digest}"
    work.mkdir(parents=True, exist_ok=True)
    pruned: optuna.TrialPruned | None = None
    value = math.nan
    with search.run.child(f"trial {trial.number}", {"experiment": config.name, "stage": "tune"}) as run:
        run.log_params(changes)
        try:
            fitted = fit_model(
                trained,
                open_split(search.packed, "train"),
                open_split(search.packed, "valid"),
                folder=work,
                run=_JudgedRun(run, trial, trained, metric, deadline=deadline),
                spare_bytes=search.spare_bytes,
            )
            value = fitted.history[metric][fitted.best_epoch - 1]
            run.log_metrics({f"best_{metric}": value, "trial": trial.number}, step=len(fitted.history[metric]))
        except optuna.TrialPruned as err:
            pruned = err  # That is no failure of the run.
            run.set_tags({"stopped_early": err})
    shutil.rmtree(work, ignore_errors=True)
    if pruned is not None:
        raise pruned
    return value


class _JudgedRun(MlflowRun):
    """A trial's run: what each epoch reports is judged, too."""

    def __init__(
        self, run: MlflowRun, trial: optuna.Trial, config: ExperimentConfig, metric: str, *, deadline: float
    ) -> None:
        super().__init__(run.tracking_uri, run.run_id, run.experiment_id)
        self._epochs = config.train.epochs + (config.transfer is not None)
        self._trial, self._metric, self._deadline = trial, metric, deadline
        self._best = math.inf if "entropy" in metric else -math.inf

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Logs an epoch, and ends the trial where it falls behind or the time is over.

        Raises:
            TrialPruned: it is to end.
        """
        import optuna

        try:
            super().log_metrics(metrics, step=step)
        except TrackingError as err:  # What decides about trials is in Optuna's storage.
            logger.warning("MLflow has not got an epoch of trial %d: %s", self._trial.number, err)
        if self._metric not in metrics:  # What is logged beside the epochs.
            return
        value = metrics[self._metric]
        self._best = min(self._best, value) if "entropy" in self._metric else max(self._best, value)
        self._trial.report(self._best, step)
        if step >= self._epochs:
            return  # It is trained: there is nothing to save.
        if time.monotonic() > self._deadline:
            raise optuna.TrialPruned("the time is over")
        if self._trial.should_prune():
            raise optuna.TrialPruned("it fell behind")

    def log_curve(self, name: str, points: Mapping[int, float]) -> None:
        """Logs a number by step, where MLflow is there."""
        try:
            super().log_curve(name, points)
        except TrackingError as err:
            logger.warning("MLflow has not got %s of trial %d: %s", name, self._trial.number, err)


def search_page(study: optuna.Study, config: ExperimentConfig) -> str:
    """Returns a page with the best values, every trial, and Optuna's plots; it loads nothing."""
    from optuna import visualization
    from optuna.trial import TrialState

    complete = len(_finished(study, TrialState.COMPLETE))
    plots: list[tuple[str, Callable[[optuna.Study], Any]]] = [
        ("How the best value came about", visualization.plot_optimization_history)
    ]
    plots += [("Epoch by epoch", visualization.plot_intermediate_values), ("Each field", visualization.plot_slice)]
    if complete > 1 and len(study.best_params) > 1:
        plots.append(("All fields together", visualization.plot_parallel_coordinate))
        plots.append(("What matters", visualization.plot_param_importances))
    figures = list[tuple[str, str]]()
    for title, plot in plots:
        try:
            figure = plot(study)
        except (ValueError, RuntimeError, TypeError) as err:  # Such as trials that were all equally good, or lists.
            logger.info("no plot %r: %s", title, err)
            continue
        figures.append((title, figure.to_html(full_html=False, include_plotlyjs=not figures)))
    return render(
        "training/search.html",
        title=f"Search for {config.name}",
        study=study,
        metric=config.tune.metric,
        fields=sorted(config.tune.space),
        trials=study.get_trials(deepcopy=False),
        figures=figures,
    )

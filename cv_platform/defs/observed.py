"""What the platform reads and others write: the request log and the dataset's repository, as assets that are observed.

A sensor reports them when they have changed, by two cheap questions and without a run; Dagster's page does on demand.
https://docs.dagster.io/guides/build/assets/external-assets
"""

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import dagster as dg

from cv_platform.config import ExperimentConfig
from cv_platform.defs.metadata import table
from cv_platform.errors import CvPlatformError, DatabaseUnavailableError, UnknownDatasetVersionError
from cv_platform.settings import Settings

COUNTED_ROWS = 10_000
"""Of a log up to which they are counted at each look; a larger one has PostgreSQL's estimate."""
_ESTIMATE = "estimated_rows"


class _Source(NamedTuple):
    spec: dg.AssetSpec
    look: Callable[[ExperimentConfig], tuple[str | None, dict[str, Any]]]
    """Returns the data version, None where what is new makes nothing stale, and metadata."""


def repository_key(experiment: str) -> dg.AssetKey:
    """Returns the key of the dataset's repository, as one experiment sees it."""
    return dg.AssetKey(["observed", f"{experiment}_dataset_repository"])


def request_log_key(experiment: str) -> dg.AssetKey:
    """Returns the key of the request log, as one experiment sees it."""
    return dg.AssetKey(["observed", f"{experiment}_request_log"])


def observed_assets(config: ExperimentConfig) -> dg.AssetsDefinition:
    """Returns both assets; their keys stand apart from the experiment's own, which `key:<name>/*` makes."""
    sources = _sources(config)
    with warnings.catch_warnings():
        # Dagster 1.13 calls this decorator beta; requirements.lock holds the version that was tried.
        warnings.simplefilter("ignore", dg.BetaWarning)

        @dg.multi_observable_source_asset(
            name=f"{config.name}_observed", specs=[source.spec for source in sources], can_subset=True
        )
        def observed(context: dg.AssetExecutionContext) -> Iterator[dg.ObserveResult]:
            for spec, look in sources:
                if spec.key in context.selected_asset_keys:
                    version, metadata = look(config)
                    data_version = None if version is None else dg.DataVersion(version)
                    yield dg.ObserveResult(asset_key=spec.key, data_version=data_version, metadata=metadata)

        return observed


def observed_sensor(config: ExperimentConfig) -> dg.SensorDefinition:
    """Returns the sensor that reports what has changed; what cannot be reached now keeps its last observation."""

    @dg.sensor(
        name=f"{config.name}_observed",
        minimum_interval_seconds=300,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports new rows of the request log, and where the dataset's tag points, without a run.",
    )
    def observe(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        known: dict[str, str] = json.loads(context.cursor) if context.cursor else {}
        events, problems = list[dg.AssetObservation](), list[str]()
        for spec, look in _sources(config):
            try:
                version, metadata = look(config)
            except CvPlatformError as err:
                problems.append(str(err))
                continue
            # An estimate changes with every ANALYZE.
            mark = repr(sorted((name, value) for name, value in metadata.items() if name != _ESTIMATE))
            if known.get(spec.key.to_user_string()) != mark:
                known[spec.key.to_user_string()] = mark
                events.append(observation(spec.key, version, metadata))
        skip = None if events else " ".join(problems) or "Nothing has changed."
        return dg.SensorResult(asset_events=events, cursor=json.dumps(known, sort_keys=True), skip_reason=skip)

    return observe


def observation(key: dg.AssetKey, version: str | None, metadata: dict[str, Any]) -> dg.AssetObservation:
    """Returns the event of an observation; Dagster takes the data version as a tag."""
    tags = None if version is None else {"dagster/data_version": version}
    return dg.AssetObservation(key, metadata=metadata, tags=tags)


def _sources(config: ExperimentConfig) -> list[_Source]:
    shared: dict[str, Any] = {"group_name": config.name, "owners": list(config.owners)}
    return [
        _Source(
            dg.AssetSpec(
                repository_key(config.name),
                description="The Git repository of the dataset's versions; the data version is DVC's md5 of the tag.",
                kinds={"git", "dvc"},
                **shared,
            ),
            _look_at_repository,
        ),
        _Source(
            dg.AssetSpec(
                request_log_key(config.name),
                description="The model's answered requests in PostgreSQL: when the last one was answered, and how many "
                f"rows there are, counted up to {COUNTED_ROWS:,}; of more, `{_ESTIMATE}` is PostgreSQL's own estimate. "
                "New ones make no report stale: windows do.",
                kinds={"postgres"},
                **shared,
            ),
            _look_at_log,
        ),
    ]


def _look_at_repository(config: ExperimentConfig) -> tuple[str | None, dict[str, Any]]:
    from cv_platform.datasets.versions import list_tags

    tag, tags = config.dataset.dvc_tag, list_tags(config.dataset, home=Settings.from_environment().home)
    if tag not in tags:
        raise UnknownDatasetVersionError(f"Expected the tag {tag}. Received: {', '.join(tags) or 'none'}.")
    newest = [{"tag": name, "dvc_md5": md5} for name, md5 in reversed(tags.items())]
    return tags[tag], {"tag": tag, "dvc_md5": tags[tag], "tags": len(tags), "newest": table(newest[:20])}


def _look_at_log(config: ExperimentConfig) -> tuple[str | None, dict[str, Any]]:
    from cv_platform.database.address import running_database_url
    from cv_platform.database.connection import make_engine
    from cv_platform.monitoring.window import count_requests, estimate_rows, last_request

    url = running_database_url(Settings.from_environment())
    if url is None:
        raise DatabaseUnavailableError("Expected the request log. Received: none that runs. Run: make up.")
    engine, model_name = make_engine(url), config.model.model_name
    try:
        last = last_request(engine, model_name=model_name)
        rows = count_requests(engine, model_name=model_name, most=COUNTED_ROWS + 1)
        is_counted = rows <= COUNTED_ROWS
        size = {"dagster/row_count": rows} if is_counted else {_ESTIMATE: estimate_rows(engine, model_name=model_name)}
    finally:
        engine.dispose()
    return None, {**size, **({"last_row": dg.MetadataValue.timestamp(last)} if last else {})}

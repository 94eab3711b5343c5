"""Passes records between assets: small frozen pydantic models, kept as JSON, which point to the files they describe."""

from __future__ import annotations

import dagster as dg

from cv_platform.errors import StorageError
from cv_platform.record_store import RecordStore, record_stores
from cv_platform.records import Record
from cv_platform.settings import Settings

_PARENT, _RETRY = "dagster/parent_run_id", "dagster/retry_number"
"""Tags of a run; the second has one that Dagster's daemon has started for one that was killed."""


class RecordIOManager(dg.ConfigurableIOManager):
    """Keeps the records of each experiment by version, see `record_store`."""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Takes note of what is the latest when the run begins."""
        if context.run is not None and context.instance is not None:
            for store in record_stores(Settings.from_environment().home):
                store.seen(first_attempt(context.run, context.instance))

    def handle_output(self, context: dg.OutputContext, obj: Record | None) -> None:
        """Keeps the asset's record, with the versions of what it was made from."""
        if obj is None:  # An asset without a value, such as an external observation.
            return
        store, asset, run_id = _place(context)
        upstream = [dep.asset_key.path[-1] for dep in context.asset_spec.deps]
        record = obj.model_copy(update={"made_from": store.made_from(upstream, run_id=run_id)})
        context.add_output_metadata({"record": store.write(asset, record, run_id=run_id)})

    def load_input(self, context: dg.InputContext) -> Record:
        """Reads the upstream asset's record as the type that the asset body annotates.

        Raises:
            StorageError: the upstream asset was never materialised here, or by another version of the platform.
        """
        store, asset, run_id = _place(context)
        version = store.version_for(asset, run_id=run_id)
        if version is None:
            name = context.asset_key.to_user_string()
            raise StorageError(
                f"Expected a materialised {name}. Received: no record in {store.folder}. Materialise it first."
            )
        return store.read(asset, context.dagster_type.typing_type, version)


def _place(context: dg.InputContext | dg.OutputContext) -> tuple[RecordStore, str, str]:
    experiment, asset = context.asset_key.path
    run_id = first_attempt(context.step_context.dagster_run, context.step_context.instance)
    return RecordStore(Settings.from_environment().home, experiment), asset, run_id


def first_attempt(run: dg.DagsterRun, instance: dg.DagsterInstance) -> str:
    """Returns the id of a run; of an automatic retry, that of the first attempt, whose work it goes on with."""
    while _RETRY in run.tags and (parent := instance.get_run_by_id(run.tags.get(_PARENT, ""))):
        run = parent
    return run.run_id

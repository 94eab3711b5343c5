"""Passes records between assets: small frozen pydantic models, kept as JSON, which point to the files they describe."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
from pydantic import BaseModel, ValidationError

from cv_platform.errors import StorageError
from cv_platform.files import write_file
from cv_platform.settings import Settings


class RecordIOManager(dg.ConfigurableIOManager):
    """Keeps the latest record of each asset in `$CV_HOME/records/<experiment>/<asset>.json`."""

    def handle_output(self, context: dg.OutputContext, obj: BaseModel | None) -> None:
        """Replaces the asset's record in one step."""
        if obj is None:  # An asset without a value, such as an external observation.
            return
        write_file(_record_path(context.asset_key), obj.model_dump_json(indent=2))

    def load_input(self, context: dg.InputContext) -> BaseModel:
        """Reads the upstream asset's latest record as the type that the asset body annotates.

        Raises:
            StorageError: the upstream asset was never materialised here, or by another version of the platform.
        """
        path = _record_path(context.asset_key)
        record = context.dagster_type.typing_type
        name = context.asset_key.to_user_string()
        try:
            return record.model_validate_json(path.read_bytes())
        except FileNotFoundError as err:
            raise StorageError(
                f"Expected a materialised {name}. Received: nothing at {path}. Materialise it first."
            ) from err
        except ValidationError as err:
            raise StorageError(
                f"Expected a record of {name} of this version. Received: {err}. Materialise {name} again."
            ) from err


def _record_path(key: dg.AssetKey) -> Path:
    return Settings.from_environment().home.joinpath("records", *key.path).with_suffix(".json")

"""The sections together: one experiment."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from cv_platform.config.fields import ExperimentName, Section
from cv_platform.config.images import DatasetConfig, EncoderConfig, ValidateConfig
from cv_platform.config.model import PRETRAINED_ARCHITECTURES, ModelConfig
from cv_platform.config.production import (
    AlertsConfig,
    DeployConfig,
    LabelsConfig,
    LoopConfig,
    MonitorConfig,
    ScoreConfig,
)
from cv_platform.config.recipe import EvaluateConfig, TrainConfig, TransferConfig
from cv_platform.config.search import Span, TuneConfig

_OWNER = re.compile(r"team:.+|\w[\w.%+-]*@[a-z0-9.-]+\.[a-z]{2,7}", re.ASCII | re.IGNORECASE)
"""What Dagster takes."""


class ExperimentConfig(Section):
    """One experiment: one file in `configs/`, one branch of the asset graph."""

    name: ExperimentName = Field(description="of the experiment: its group in Dagster, its folder of records")
    description: str = Field(default="", description="shown in Dagster")
    owners: tuple[str, ...] = Field(default=("team:computer-vision",), description="e-mail addresses, or team:NAME")
    model: ModelConfig = Field(description="the network")
    dataset: DatasetConfig = Field(description="the images")
    encoder: EncoderConfig = Field(default=EncoderConfig(), description="what images are compared by")
    # Called `validate` in YAML, dumps and schema; pydantic keeps that attribute for a deprecated method of its own.
    validation: ValidateConfig = Field(
        default=ValidateConfig(), alias="validate", description="limits of the dataset's checks"
    )
    train: TrainConfig = Field(default=TrainConfig(), description="the recipe")
    tune: TuneConfig = Field(default=TuneConfig(), description="a search for a better recipe")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="the gate")
    deploy: DeployConfig = Field(default=DeployConfig(), description="the service")
    monitor: MonitorConfig = Field(default=MonitorConfig(), description="the drift report")
    labels: LabelsConfig = Field(default=LabelsConfig(), description="the next version of the dataset")
    score: ScoreConfig = Field(default=ScoreConfig(), description="images that are answered in one go")
    loop: LoopConfig = Field(default=LoopConfig(), description="what follows drift and labels by itself")
    alerts: AlertsConfig = Field(default=AlertsConfig(), description="what is worth a message")

    @field_validator("owners")
    @classmethod
    def _known_to_dagster(cls, owners: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [owner for owner in owners if not _OWNER.fullmatch(owner)]:
            raise ValueError(
                "expected e-mail addresses whose last part has 2 to 7 letters, or team:NAME. "
                f"Received: {', '.join(map(repr, wrong))}. Correct them."
            )
        return owners

    @model_validator(mode="after")
    def _require_epochs(self) -> Self:
        if self.train.epochs == 0 and self.transfer is None:
            raise ValueError(
                f"train.epochs: expected at least 1 for {self.model.architecture}, whose weights are random; "
                "0 is for networks that come with weights, or with train.transfer.head: fit"
            )
        return self

    @model_validator(mode="after")
    def _require_equal_shares(self) -> Self:
        if self.train.batch_size % self.train.workers:
            raise ValueError(
                f"train.batch_size: expected a multiple of train.workers, which share each batch. Received: "
                f"{self.train.batch_size} for {self.train.workers}. Correct one of them."
            )
        if self.train.workers > 1 and self.train.job_gpus is not None:
            raise ValueError(
                f"train.job_gpus: expected null, as CV_COMPUTE=ray places the {self.train.workers} train.workers. "
                f"Received: {self.train.job_gpus}. Correct one of them."
            )
        if self.train.workers > 1 and self.train.devices == "all":
            raise ValueError(
                f"train.devices: expected one, as each of the {self.train.workers} train.workers computes on one. "
                "Received: all. Take one of the two."
            )
        return self

    @model_validator(mode="after")
    def _require_one_class_for_balance(self) -> Self:
        if self.train.imbalance != "none" and self.model.classifier_type == "multi-label":
            raise ValueError(
                f"train.imbalance: expected none for multi-label, where no image has one class. Received: "
                f"{self.train.imbalance}. Remove it."
            )
        return self

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        mistakes = list[str]()
        for field, said in self.tune.spans.items():
            for value in (said.low, said.high) if isinstance(said, Span) else said:
                try:
                    self.with_fields({field: value})
                except KeyError:
                    mistakes.append(f"{field}: expected a field of this file; configs/schema.json has them all")
                    break
                except ValidationError as err:
                    mistakes += [f"{field}: {value} is none: {one['msg']}" for one in err.errors()]
        if mistakes:
            raise ValueError("\n    ".join(["tune.space: expected what makes valid configs; received:", *mistakes]))
        return self

    def with_fields(self, changes: Mapping[str, Any]) -> ExperimentConfig:
        """Returns this experiment with other values of fields, named as in YAML, and nothing to search.

        Raises:
            KeyError: there is no such field.
            ValidationError: a value is none of its field, or they do not go together.
        """
        dump = self.model_dump(mode="json", exclude={"tune"})
        for field, value in changes.items():
            *sections, last = field.split(".")
            section = functools.reduce(lambda inner, name: inner[name], sections, dump)
            if last not in section:
                raise KeyError(field)
            whole = isinstance(value, float) and value.is_integer() and not isinstance(section[last], float)
            section[last] = int(value) if whole else value
        return ExperimentConfig.model_validate(dump)

    @property
    def transfer(self) -> TransferConfig | None:
        """How the training begins with a head alone; None if it does not."""
        transfer, is_pretrained = self.train.transfer, self.model.architecture in PRETRAINED_ARCHITECTURES
        return transfer if transfer.head == "fit" or (transfer.head == "auto" and is_pretrained) else None

    def fingerprint(self, *fields: str, without: Iterable[str] = ()) -> str:
        """Returns 12 hex digits over `fields`, named as in YAML: code versions carry it.

        Args:
            *fields: sections, or single fields: `monitor.alpha`; all sections, when none is given.
            without: fields below them that are left out.

        Raises:
            KeyError: there is no such field.
        """
        dump = self.model_dump(mode="json")
        for field in without:
            *sections, last = field.split(".")
            del functools.reduce(lambda section, name: section[name], sections, dump)[last]
        chosen = {
            field: functools.reduce(lambda section, name: section[name], field.split("."), dump)
            for field in fields or dump
        }
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of an experiment; `configs/schema.json` is this, and a test holds it."""
    schema = ExperimentConfig.model_json_schema()
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    schema["title"] = "cv_platform experiment"
    return schema

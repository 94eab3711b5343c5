"""The section `tune`: what a search for a better recipe may change, and how long it may take."""

from __future__ import annotations

from typing import Any, Literal, Self, cast

from pydantic import Field, ValidationError, model_validator

from cv_platform.config.fields import Section

SEARCHABLE = ("train", "model.architecture", "model.dropout")
"""What a search may change: nothing that decides pixels, classes or seeds, so that trials share data and compare."""
FIXED = ("train.seed", "train.pack_scale", "train.devices", "train.mlflow", "train.temperature_scaling")


class Span(Section):
    """Numbers from `low` to `high`: whole ones where both are."""

    low: float = Field(description="the least")
    high: float = Field(description="the greatest")
    log: bool = Field(default=False, description="drawn evenly over the logarithm: rates, penalties")
    step: float | None = Field(default=None, gt=0, description="only low, low + step, low + 2 step, …")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"expected low < high; received {self.low:g}, {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log: expected low > 0, and no step; received low {self.low:g}, step {self.step}")
        return self


class TuneConfig(Section):
    """A search by Optuna over fields of this file: `cv-platform tune`."""

    space: dict[str, Any] = Field(
        default_factory=dict,
        description="by field, such as train.init_lr: {low: 0.001, high: 0.1, log: true}, or a list of values; fields "
        "below train, model.architecture and model.dropout",
    )
    metric: Literal["val_accuracy", "val_cross_entropy"] = Field(
        default="val_accuracy", description="what the best trial is the best in, at its best epoch"
    )
    trials: int = Field(
        default=20,
        ge=1,
        le=10_000,
        description="how many are trained at most, those that are stopped early or fail, too",
    )
    max_seconds: float | None = Field(
        default=None, gt=0, description="of all trials together, over all times that the command was typed"
    )
    pruning: Literal["hyperband", "none"] = Field(
        default="hyperband", description="hyperband: trials that fall behind are stopped early"
    )

    @property
    def spans(self) -> dict[str, Span | list[Any]]:
        """The space: what each field may be."""
        return {
            field: Span.model_validate(said) if isinstance(said, dict) else list(said)
            for field, said in self.space.items()
        }

    @model_validator(mode="after")
    def _check_space(self) -> Self:
        mistakes = list[str]()
        for field, said in self.space.items():
            if not field.startswith(tuple(f"{root}." for root in SEARCHABLE)) and field not in SEARCHABLE[1:]:
                mistakes.append(f"{field}: expected a field below {', '.join(SEARCHABLE)}")
            elif field.startswith(FIXED):
                mistakes.append(f"{field}: expected one that trials may differ in, other than {', '.join(FIXED)}")
            elif isinstance(said, dict):
                try:
                    Span.model_validate(said)
                except ValidationError as err:
                    reasons = [f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip() for one in err.errors()]
                    mistakes.append(f"{field}: {'; '.join(reasons)}")
            elif not _are_choices(said):
                mistakes.append(f"{field}: expected {{low: …, high: …}} or a list of different values; received {said}")
        if mistakes:
            raise ValueError("\n    ".join(["space: expected what can be searched; received:", *mistakes]))
        return self


def _are_choices(said: Any) -> bool:
    values = cast("list[Any]", said) if isinstance(said, list) else []
    return len(values) > 1 and not any(values.count(one) > 1 for one in values)

"""An architecture of the user's own: `model.architecture: module:function`."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from cv_platform.errors import TrainingError
from cv_platform.training.architectures import Architecture

if TYPE_CHECKING:
    import keras

    from cv_platform.config import ModelConfig


def find_source(name: str) -> Path | None:
    """Returns the file of the module of `module:function`, which is not run; None: there is no such file."""
    try:
        found = importlib.util.find_spec(name.partition(":")[0])
    except Exception:  # It imports the packages around the module, which may raise anything.
        return None
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


class UsersArchitecture(Architecture):
    """What a function makes of the image: `function(image, model)` returns the last feature map.

    The function gets the image, `(N, H, W, 3)` uint8 RGB as a Keras tensor, and the section `model` of the config. It
    returns an `(N, h, w, c)` tensor made by Keras's own layers, without Lambda: the network must load in safe mode in a
    process that does not have the function. Pooling, dropout and the layers behind them are the platform's.

    Args:
        name: `module:function`; the module must be importable where the training runs.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        module_name, _, function_name = name.partition(":")
        try:
            self._function: Any = getattr(importlib.import_module(module_name), function_name)
        except Exception as err:  # A user's module may raise anything.
            raise self._error(
                f"{type(err).__name__}: {err}", "Install the module, or put its folder on PYTHONPATH"
            ) from err

    @override
    def feature_map(self, image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
        import keras

        try:
            result = self._function(image, model)
        except Exception as err:  # As above.
            raise self._error(f"it raised {type(err).__name__}: {err}", "Mend the function") from err
        if not isinstance(result, keras.KerasTensor):
            raise self._error(f"it returned {type(result).__name__}", "Return what a Keras layer returns")
        if len(result.shape) != 4 or None in result.shape[1:] or min(result.shape[1:]) < 1:
            raise self._error(f"it returned a tensor of shape {result.shape}", "Return the map before it is pooled")
        try:
            layers = keras.Model(image, result).layers
        except ValueError as err:
            raise self._error(f"its result is not made from the image ({err})", "Begin with the argument") from err
        strange = [
            f"{type(layer).__name__} {layer.name}"
            for layer in layers
            if not type(layer).__module__.startswith("keras.") or type(layer).__name__ == "Lambda"
        ]
        if strange:
            raise self._error(
                f"layers that load nowhere else: {', '.join(strange)}", "Take layers of Keras in their place"
            )
        return result

    def _error(self, received: str, advice: str) -> TrainingError:
        return TrainingError(
            "model.architecture: expected module:function that takes (image, model) and returns the last feature map, "
            f"(N, h, w, c). Received: {self.name}: {received}. {advice}."
        )

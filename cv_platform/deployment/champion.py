"""Asks the version in production about another model's test images, as it would answer them when it serves.

It is the published bundle that answers, by its own runtime, threshold and preprocessing: what challengers have to beat
is what people get.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from cv_platform import images
from cv_platform.compute import map_shards
from cv_platform.compute.engine import Engine as ComputeEngine
from cv_platform.compute.engine import patiently
from cv_platform.compute.rows import Device, RowShard, row_shards
from cv_platform.config import ClassifierType
from cv_platform.datasets.packing import PackedSplit
from cv_platform.deployment.bundle import TRAINED_ON
from cv_platform.errors import BundleNotFoundError, CorruptBundleError, ImageError
from cv_platform.evaluation.gate import Champion
from cv_platform.predictions import predicted_flags
from cv_platform.records import DatasetVersion, ModelIdentity, Task
from cv_platform.serving.model.runtime import LoadedModel, PublishedModel, fetch, load_folder
from cv_platform.storage import BundleMetadata, CentralStorage

logger = logging.getLogger(__name__)

_BATCH = 64
_DECODERS = 2


def ask_champion(
    challenger: ModelIdentity,
    task: Task,
    test: PackedSplit,
    version: DatasetVersion,
    *,
    service: str,
    storage: CentralStorage,
    home: Path,
    engine: ComputeEngine | None = None,
) -> Champion | None:
    """Returns what `service` would answer to the test images; None where it serves no other version of this model.

    A champion that cannot be asked is one with a problem, in words: it does not stand aside.

    Args:
        challenger: the model that wants its place.
        task: the challenger's.
        test: the test images, with the challenger's pixels.
        version: the checkout that they come from, for a champion that sees other pixels.
        service: whose pointer is read.
        storage: central storage.
        home: downloads are kept in `home/cache`.
        engine: whose machines answer where that takes long and the champion sees the same pixels; None: this process
            alone.

    Raises:
        StorageError: central storage cannot be reached. That may pass, and says nothing about a model.
    """
    champion = champion_of(challenger, service=service, storage=storage)
    if champion is None:
        return None
    try:
        name, cache = champion.model_name, home / "cache"
        folder, metadata = patiently(str(champion), fetch, storage, name, champion.version, cache=cache)
        if problem := class_difference(metadata, task.class_names, task.classifier_type):
            return Champion(champion.version, problem=problem)
        model = load_folder(folder, metadata)
        if (metadata.image_size, metadata.preprocessing_hash) == (task.image_size, task.preprocessing_hash):
            published = PublishedModel(storage.url, name, champion.version, home, "cache")
            probabilities = _shared_out(Answers(published, model), test, engine)
        else:
            decoded = _decoded(model, version, test.paths)
            probabilities = [model.predict_batch(batch).probabilities for batch in decoded]
    except (BundleNotFoundError, CorruptBundleError) as err:
        return Champion(champion.version, problem=f"its bundle does not answer. {err}")
    except (OSError, ImageError, ValueError) as err:
        return Champion(champion.version, problem=f"it does not take the test images. {err}")
    # Both have the same classes, maybe in another order.
    columns = [metadata.class_names.index(name) for name in task.class_names]
    decisions = predicted_flags(np.concatenate(probabilities), task.classifier_type, metadata.threshold)[:, columns]
    return Champion(champion.version, decisions, images_seen(folder / TRAINED_ON, test.sha256))


def champion_of(challenger: ModelIdentity, *, service: str, storage: CentralStorage) -> ModelIdentity | None:
    """Returns what `service` serves; None where that is no other version of the challenger's model.

    Raises:
        StorageError: central storage cannot be reached.
    """
    pointer = patiently(f"The pointer of {service}", storage.read_pointer, service)
    if pointer is None or pointer.model_name != challenger.model_name or pointer.version == challenger.version:
        return None
    return ModelIdentity(model_name=pointer.model_name, version=pointer.version)


def class_difference(metadata: BundleMetadata, class_names: Sequence[str], classifier_type: ClassifierType) -> str:
    """Says what makes the answers of a bundle and of a model incomparable; empty where nothing does.

    Args:
        metadata: of the bundle in production.
        class_names, classifier_type: of the new model; the order of the classes may differ.
    """
    if metadata.classifier_type != classifier_type:
        return f"it is {metadata.classifier_type}, and the new model {classifier_type}"
    missing = [name for name in metadata.class_names if name not in class_names]
    further = [name for name in class_names if name not in metadata.class_names]
    parts = [f"{what} {', '.join(names)}" for what, names in (("no", missing), ("also", further)) if names]
    return f"it has other classes; the new model has {' and '.join(parts)}" if parts else ""


@dataclass(frozen=True)
class Answers:
    """What the champion answers: by the model at hand with all cores; elsewhere by the published one with one core."""

    published: PublishedModel
    model: LoadedModel | None = None

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return Answers, (self.published,)

    def __call__(self, shard: RowShard) -> np.ndarray:
        """Returns `(n, C)` float32 probabilities of a shard's images."""
        model = self.model or self.published.load()
        return np.concatenate([model.predict_batch(batch).probabilities for batch in shard.batches(_BATCH)])


def _shared_out(answers: Answers, test: PackedSplit, engine: ComputeEngine | None) -> list[np.ndarray]:
    shards = row_shards(test.images)
    alone_seconds = Device.here().alone_seconds(engine)
    total = len(test.paths)
    made = map_shards(answers, shards, engine=engine, title="Champion", total=total, alone_seconds=alone_seconds)
    return [probabilities for _, probabilities in made]


def _decoded(model: LoadedModel, version: DatasetVersion, paths: Sequence[str]) -> Iterator[np.ndarray]:
    """Yields `(n, H, W, 3)` uint8 as the champion sees the test images, in order."""
    size = model.metadata.image_size

    def decode(path: str) -> np.ndarray:
        data = (version.directory / path).read_bytes()
        return images.preprocess(data, size, max_pixels=images.MAX_LOCAL_PIXELS, preprocessing=model.preprocessing)

    with ThreadPoolExecutor(_DECODERS) as pool:
        for start in range(0, len(paths), _BATCH):
            yield np.stack(list(pool.map(decode, paths[start : start + _BATCH])))


def images_seen(path: Path, sha256: Sequence[str]) -> np.ndarray | None:
    """Returns which images a model was trained on, `(N,)` bool; None where there is no such file.

    Args:
        path: of `TRAINED_ON` in its bundle.
        sha256: of the images' files.
    """
    if not path.is_file():
        return None
    known = {row.tobytes().hex() for row in np.load(path, allow_pickle=False)}
    return np.array([digest in known for digest in sha256], dtype=bool)

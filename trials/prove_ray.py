"""`python -m trials.prove_ray ARCHIVE`: the whole graph by Ray on two nodes of this machine, with the bytes of `local`.

Takes a few CIFAR-10 images of each class, imports them into two fresh installations, and materialises everything up to
the deployment and batch scores in each: once with processes of this machine, once with a Ray cluster of two nodes of
one core each, which is given what a network says of the test and the reference split, too (`trials.asks_others`). Then
each thing that was made is compared by its hash. Ends with 0 only if all are equal, and both nodes have worked on
shards in each part of the graph.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Stopwatch, machine_line
from benchmarks.installation import isolated_environment, isolated_settings, scratch_folder, write_config
from benchmarks.ray_nodes import ray_nodes
from cv_platform.config import ExperimentConfig, load_experiment, parse_experiment
from cv_platform.demo import read_record
from cv_platform.errors import CvPlatformError, DatasetError
from cv_platform.files import file_sha256
from cv_platform.local.environment import prepare_home
from cv_platform.local.graph import materialize
from cv_platform.records import (
    BatchScores,
    DatasetVersion,
    DriftDetectors,
    Embeddings,
    Evaluation,
    ModelBundle,
    PackedImages,
    ReferenceData,
    TrainedModel,
)
from cv_platform.settings import Settings, prepare_process
from cv_platform.storage import CentralStorage
from trials.prove_cifar import CONFIG, import_archive

TRAIN, TEST = 80, 20
"""Images of each class: 1,000 in all."""
DEFINITIONS = "trials.asks_others"
PARTS = {
    "dataset to model": "+key:{name}/model",
    "evaluation to deployment": "+key:{name}/deployment and not +key:{name}/model",
    "batch scores": "key:{name}/batch_scores",
}
"""Of the graph, by what they are called."""
_OF_A_RUN = ("model_version",)
"""Columns that name when a model was trained."""
_BUNDLED = ("golden.npz", "trained_on.npy", "unknown.npz")
"""Files of a bundle, which do not name it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the proof and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m trials.prove_ray", description=__doc__)
    parser.add_argument("archive", type=Path, help=".tar.gz with train/<class>/ and test/<class>/ folders")
    archive: Path = parser.parse_args(arguments).archive.absolute()
    prepare_process()
    try:
        with scratch_folder("prove-ray") as folder:
            return prove(archive, folder, lambda line: print(line, flush=True))
    except CvPlatformError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1


def prove(archive: Path, folder: Path, say: Callable[[str], None]) -> int:
    """Makes everything twice, and compares it.

    Raises:
        CvPlatformError: a graph could not be materialised.
    """
    clock = Stopwatch()
    images = folder / "images"
    choose_images(archive, images)
    config = write_config(_experiment(images), folder / "configs")
    by = {"local": made(folder / "local", config, images, {"CV_COMPUTE": "local"}, say)}
    with ray_nodes(2, takes_jobs=True) as cluster:
        environment = {"CV_COMPUTE": "ray", "CV_RAY_ADDRESS": str(cluster.address)}
        worked = _Worked(f"http://{cluster.head_node.webui_url}")
        by["ray"] = made(folder / "ray", config, images, environment, say, worked.look)
    is_proved = by["local"] == by["ray"]
    for name, digest in by["local"].items():
        say(f"  {'equal    ' if by['ray'].get(name) == digest else 'DIFFERENT'} {name}: {digest[:16]}")
    for part, counts in worked.shards.items():
        is_proved &= len(counts) == 2
        whose = "by both nodes" if len(counts) == 2 else "NOT BY BOTH"
        say(f"  {whose} {part}: {counts.total()} shards, {[*counts.values()]}")
    verdict = "proved" if is_proved else "NOT proved"
    say(f"prove-ray: {verdict} in {clock.seconds:.0f} s; {machine_line(('ray', 'keras'))}")
    return 0 if is_proved else 1


class _Worked:
    """How many shards each node of a Ray cluster has worked on in each part of the graph, as its dashboard says."""

    def __init__(self, dashboard: str) -> None:
        self._dashboard = dashboard
        self._before = Counter[str]()
        self.shards: dict[str, Counter[str]] = {}

    def look(self, part: str) -> None:
        """Notes what was worked on since the last look."""
        from ray.util.state import list_tasks

        tasks: list[Any] = list_tasks(self._dashboard, filters=[("func_or_class_name", "=", "_work")], limit=10_000)
        now = Counter(str(task.node_id) for task in tasks if task.state == "FINISHED")
        self.shards[part], self._before = now - self._before, now


def choose_images(archive: Path, folder: Path) -> None:
    """Unpacks the first images of each class, by name, to `folder/<split>/<class>/`.

    Raises:
        DatasetError: the archive has none.
    """
    chosen = Counter[tuple[str, str]]()
    with tarfile.open(archive) as files:
        for member in sorted((one for one in files.getmembers() if one.isfile()), key=lambda one: one.name):
            *_, split, class_name, name = ("", "", *member.name.split("/"))
            if chosen[split, class_name] >= {"train": TRAIN, "test": TEST}.get(split, 0):
                continue
            content = files.extractfile(member)
            assert content is not None
            chosen[split, class_name] += 1
            target = folder / split / class_name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())
    if not chosen:
        raise DatasetError(f"Expected train/<class>/ and test/<class>/ in {archive}. Received: none. Name another one.")


def _experiment(scored: Path) -> ExperimentConfig:
    """Returns the CIFAR-10 experiment: two epochs, no gate, and images to score."""
    content = load_experiment(CONFIG).model_dump(mode="json")
    content["train"] |= {"epochs": 2, "batch_size": 64}
    content["evaluate"] |= {"min_accuracy": 0.0, "min_macro_f1": 0.0}
    content["validate"] |= {"deepchecks_suites": "off"}
    content["model"]["drift_detection"] |= {"reference_data_n_sample": 100}
    return parse_experiment({**content, "score": {"source": str(scored)}}, origin="trials.prove_ray")


def made(
    home: Path,
    config: Path,
    images: Path,
    compute: Mapping[str, str],
    say: Callable[[str], None],
    look: Callable[[str], None] = lambda part: None,
) -> dict[str, str]:
    """Materialises the graph in an installation of its own, and returns the sha256 of each thing that it made.

    Args:
        home: of the installation.
        config: of the experiment.
        images: to be imported.
        compute: variables of the engine.
        say: is given lines.
        look: is told of each part of the graph that was made.
    """
    experiment = load_experiment(config)
    settings = isolated_settings(home, config)
    say(f"importing {images} into {home}, and materialising everything by {compute['CV_COMPUTE']} …")
    if import_archive(images, experiment.dataset.ds_name, experiment.dataset.dvc_tag, settings) != 0:
        raise DatasetError(f"Expected `cv-platform import-dataset` to import {images}. Received: its error above.")
    environment = {**isolated_environment(settings, database_url=""), **compute}
    prepare_home(settings)
    for part, selection in PARTS.items():
        log = home / "logs" / "graph.log"
        materialize(selection.format(name=experiment.name), environment, log=log, say=say, module=DEFINITIONS)
        look(part)
    return _digests(settings, experiment.name)


def _digests(settings: Settings, name: str) -> dict[str, str]:
    packed = read_record(settings, name, PackedImages).directory
    shards = [path for path in sorted(packed.iterdir()) if path.name not in {"packed.json", "verified.json"}]
    scores = read_record(settings, name, BatchScores)
    detectors = read_record(settings, name, DriftDetectors)
    model = read_record(settings, name, ModelBundle).model
    storage = CentralStorage(settings.storage_url)
    bundle, _ = storage.fetch_bundle(model.model_name, model.version, settings.home / "cache")
    return {
        "manifest": file_sha256(read_record(settings, name, DatasetVersion).manifest_path),
        "embeddings": file_sha256(read_record(settings, name, Embeddings).path),
        **{f"packed images, {path.name}": file_sha256(path) for path in shards if path.is_file()},
        "weights": read_record(settings, name, TrainedModel).weights_sha256,
        "evaluation": read_record(settings, name, Evaluation).content_version(),
        "UAE": detectors.encoder_hash,
        "drift detectors": detectors.content_version(),
        **{f"bundle, {name}": file_sha256(bundle / name) for name in _BUNDLED},
        "bundle, model.onnx, weights and operations": graph_sha256(bundle / "model.onnx"),
        "evaluated predictions": _rows_sha256(read_record(settings, name, Evaluation).predictions_path),
        "reference data": _rows_sha256(read_record(settings, name, ReferenceData).path),
        "batch scores": _rows_sha256(scores.directory / BatchScores.FILE),
    }


def graph_sha256(path: Path) -> str:
    """Returns a digest of an ONNX graph's weights and operations, whose names and order are others in each export."""
    graph = onnx.load(path).graph
    weights = (onnx.numpy_helper.to_array(one) for one in graph.initializer)
    parts = sorted(hashlib.sha256(f"{one.dtype} {one.shape}".encode() + one.tobytes()).hexdigest() for one in weights)
    return hashlib.sha256(" ".join(parts + sorted(node.op_type for node in graph.node)).encode()).hexdigest()


def _rows_sha256(path: Path) -> str:
    table = pq.read_table(path)
    table = table.drop_columns([name for name in _OF_A_RUN if name in table.column_names])
    written = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(None).combine_chunks(), written)
    return hashlib.sha256(written.getvalue()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from cv_platform.errors import CorruptBundleError
from cv_platform.serving.model.runtime_tensorflow import TensorFlowRuntime
from cv_platform_tests.support.tiny_models import TinyExport, tiny_images

pytestmark = pytest.mark.xdist_group("tensorflow")

PREDICTED = np.array([-1], dtype=np.int32)


def test_calls_of_any_batch_size_trace_nothing(tensorflow_export: TinyExport):
    import tensorflow as tf

    runtime = TensorFlowRuntime(tensorflow_export.folder / "saved_model")
    graphs: list[object] = []
    original = tf.Graph.__init__

    def counting(self: tf.Graph, *args: object, **kwargs: object) -> None:
        graphs.append(self)
        original(self, *args, **kwargs)

    tf.Graph.__init__ = counting
    try:
        for count in (1, 2, 5, 1):
            runtime(tiny_images(count), np.full(count, -1, dtype=np.int32))
    finally:
        tf.Graph.__init__ = original
    assert not graphs


def test_wrong_shape_is_a_value_error(tensorflow_export: TinyExport):
    runtime = TensorFlowRuntime(tensorflow_export.folder / "saved_model")
    with pytest.raises(ValueError, match="Expected images"):
        runtime(np.zeros((1, 9, 9, 3), np.uint8), PREDICTED)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(CorruptBundleError, match="SavedModel"):
        TensorFlowRuntime(tmp_path)


def test_threads_are_left_alone_once_tensorflow_runs(tensorflow_export: TinyExport):
    before = TensorFlowRuntime(tensorflow_export.folder / "saved_model")(tiny_images(1), PREDICTED)
    after = TensorFlowRuntime(tensorflow_export.folder / "saved_model", threads=1)(tiny_images(1), PREDICTED)
    np.testing.assert_allclose(after.probabilities, before.probabilities, atol=8 * float(np.finfo(np.float32).eps))


def test_a_dropped_model_is_released(tensorflow_export: TinyExport):
    runtime = TensorFlowRuntime(tensorflow_export.folder / "saved_model")
    runtime(tiny_images(1), PREDICTED)
    loaded = weakref.ref(runtime._loaded)
    del runtime
    gc.collect()
    assert loaded() is None

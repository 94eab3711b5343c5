import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cv_platform.errors import CorruptBundleError
from cv_platform.serving.model.runtime_onnx import OnnxRuntime
from cv_platform_tests.support.proxies import counting_server, proxy_variables
from cv_platform_tests.support.tiny_models import TinyExport, tiny_images

pytestmark = pytest.mark.xdist_group("tensorflow")

PREDICTED = np.array([-1], dtype=np.int32)


def adding(directory: Path, *, weights: str | None = None, domain: str = "") -> Path:
    """Writes a small graph that adds four numbers: with weights in another file, or by an operator of `domain`."""
    added = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    if weights is None:
        added.float_data.extend([0, 1, 2, 3])
    else:
        added.data_location = TensorProto.EXTERNAL
        added.external_data.add(key="location", value=weights)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"], domain=domain)],
        "adding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [added],
    )
    imports = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path = directory / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())
    return path


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(CorruptBundleError, match=r"model\.onnx.*Export"):
        OnnxRuntime(tmp_path / "model.onnx")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(CorruptBundleError, match=r"model\.onnx"):
        OnnxRuntime(tmp_path / "model.onnx")


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, tiny_export: TinyExport):
    content = (tiny_export.folder / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptBundleError):
        OnnxRuntime(tmp_path / "model.onnx")


@pytest.mark.parametrize("location", ["../secret.bin", "{absolute}"])
def test_weights_outside_the_bundle_are_refused(tmp_path: Path, location: str):
    (tmp_path / "bundle").mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    path = adding(tmp_path / "bundle", weights=location.format(absolute=secret))
    with pytest.raises(CorruptBundleError, match=r"(?i)external data path"):
        OnnxRuntime(path)


def test_operators_from_elsewhere_are_refused(tmp_path: Path):
    with pytest.raises(CorruptBundleError, match="not a registered"):
        OnnxRuntime(adding(tmp_path, domain="my.operators"))


def test_another_signature_is_refused_and_named(tmp_path: Path):
    with pytest.raises(CorruptBundleError, match=r"'images'.*Received: from {'x'"):
        OnnxRuntime(adding(tmp_path))


def test_the_exported_graph_holds_standard_operators_and_its_weights(tiny_export: TinyExport):
    graph = onnx.load(tiny_export.folder / "model.onnx", load_external_data=False).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert not [node.op_type for node in graph.node if "Grad" in node.op_type]
    assert all(weight.data_location == TensorProto.DEFAULT for weight in graph.initializer)


def test_wrong_shape_is_a_value_error(tiny_export: TinyExport):
    runtime = OnnxRuntime(tiny_export.folder / "model.onnx", threads=1)
    with pytest.raises(ValueError, match="Expected images"):
        runtime(np.zeros((1, 9, 9, 3), np.uint8), PREDICTED)
    with pytest.raises(ValueError, match="Expected images"):
        runtime(cast(Any, np.zeros((1, 16, 16, 3), np.float32)), PREDICTED)


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_answers_do_not_depend_on_the_threads(tiny_export: TinyExport, threads: int | None):
    with np.load(tiny_export.folder / "golden.npz") as golden:
        answer = OnnxRuntime(tiny_export.folder / "model.onnx", threads=threads)(
            golden["images"], golden["class_index"]
        )
        np.testing.assert_allclose(answer.probabilities, golden["probabilities"], atol=1e-6)
    assert {a.dtype for a in (answer.probabilities, answer.features, answer.uae, answer.cam)} == {np.dtype(np.float32)}
    assert answer.cam.shape == (4, 8, 8)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
def test_memory_stays_where_it_is_after_many_swaps(tiny_export: TinyExport):
    # In a process of its own, whose memory nobody else moves. Weights of 40 MB would be seen at once.
    code = (
        "import gc, os, pathlib, sys, numpy as np\n"
        "from cv_platform.serving.model.runtime_onnx import OnnxRuntime\n"
        "def rss(): return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "images = np.zeros((64, 16, 16, 3), np.uint8)\n"
        "def swap():\n"
        "    model = OnnxRuntime(pathlib.Path(sys.argv[1]), threads=1)\n"
        "    model(images, np.full(64, -1, np.int32))\n"
        "for _ in range(3): swap()\n"
        "before = rss()\n"
        "for _ in range(20): swap()\n"
        "gc.collect()\n"
        "print((rss() - before) / 1e6)"
    )
    command = [sys.executable, "-c", code, str(tiny_export.folder / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ))
    assert float(done.stdout) < 8.0


def test_a_dropped_model_is_released(tiny_export: TinyExport):
    import weakref

    runtime = OnnxRuntime(tiny_export.folder / "model.onnx", threads=1)
    runtime(tiny_images(1), PREDICTED)
    session = weakref.ref(runtime._session)
    del runtime
    gc.collect()
    assert session() is None


def test_what_it_runs_is_told_to_nobody(tmp_path: Path, tiny_export: TinyExport):
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from cv_platform.serving.model.runtime_onnx import OnnxRuntime\n"
        f"images = np.zeros({tiny_images(2).shape}, np.uint8)\n"
        "OnnxRuntime(Path(sys.argv[1]))(images, np.full(len(images), -1, np.int32))"
    )
    # Under CI, ONNX Runtime sends nothing by itself.
    environment = {name: value for name, value in os.environ.items() if name not in {"CI", "ORT_DISABLE_TELEMETRY"}}
    with counting_server(status=502) as proxy:
        subprocess.run(
            [sys.executable, "-c", code, str(tiny_export.folder / "model.onnx")],
            env={**environment, **proxy_variables(proxy.url), "HOME": str(tmp_path)},
            check=True,
            timeout=120,
        )
    assert proxy.asked == []
    assert list(tmp_path.iterdir()) == []

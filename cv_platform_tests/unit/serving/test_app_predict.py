import base64
import hashlib
import struct
import zlib
from uuid import UUID

import cv2
import numpy as np
import pytest
from PIL import Image

from cv_platform.images import preprocess
from cv_platform.properties import image_properties
from cv_platform.serving.app import create_app
from cv_platform.serving.model import explain
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.routes import answer
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform_tests.support.app_fixtures import MakeWorker, spooled, spooled_images
from cv_platform_tests.support.http_client import (
    BrightnessRuntime,
    Client,
    FixedModels,
    brightness_model,
    flat_image,
    png,
)
from cv_platform_tests.support.tiny_models import tiny_metadata

# Means + 1 are (200, 100, 100), so the probabilities are (0.5, 0.25, 0.25).
REDDISH = png(flat_image(199, 99, 99))


def decoded(text: str) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(base64.b64decode(text, validate=True), np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def test_answers_with_the_originals_fields_and_the_new_ones(client: Client):
    response = client.predict(REDDISH)
    assert response.status_code == 200
    body = response.json()
    assert body["model_name"] == "tiny"
    assert body["prediction"] == {"cat": 0.5, "dog": 0.25, "owl": 0.25}
    assert list(body["prediction"]) == ["cat", "dog", "owl"]
    assert body["predicted_class"] == "cat"
    assert body["predicted_classes"] == ["cat"]
    assert body["message"] == "ok"
    assert UUID(body["prediction_id"]).version == 4
    assert body["model_version"].endswith("Z-" + body["model_version"][-8:])
    assert decoded(body["overlaid_img"]).shape == decoded(body["raw_hm_img"]).shape == (171, 256, 3)
    assert base64.b64decode(body["overlaid_img"])[:3] == b"\xff\xd8\xff"
    assert body["media_type"] == "image/jpeg"


@pytest.mark.parametrize("where", ["query", "form"])
def test_explains_as_png_when_asked(client: Client, where: str):
    options = {"params": {"explain": "png"}} if where == "query" else {"data": {"explain": "png"}}
    body = client.predict(REDDISH, **options).json()
    assert base64.b64decode(body["overlaid_img"])[:4] == b"\x89PNG"
    assert base64.b64decode(body["raw_hm_img"])[:4] == b"\x89PNG"


def test_explains_with_the_small_matrix_when_asked(client: Client):
    body = client.predict(REDDISH, params={"explain": "cam"}).json()
    # (199 + 99 + 99) / 3 / 255, at every fourth pixel of a 16 × 16 image.
    assert body["cam"] == [[0.519] * 4] * 4
    assert body["overlaid_img"] is body["raw_hm_img"] is None


@pytest.mark.parametrize("explain", ["jpeg", "cam"])
def test_says_that_a_map_is_blank(client: Client, explain: str):
    # Its maps are the brightness of the image.
    body = client.predict(png(np.zeros((8, 8, 3), np.uint8)), params={"explain": explain}).json()
    assert body["message"].startswith("The heat-map is blank: no part of the image raises")
    assert body["cam"] == ([[0.0] * 4] * 4 if explain == "cam" else None)


def test_leaves_out_the_explanation_when_asked(client: Client):
    body = client.predict(REDDISH, params={"explain": "none"}).json()
    assert body["cam"] is body["overlaid_img"] is body["raw_hm_img"] is None
    assert body["message"] == "ok"


def test_the_forms_explain_wins_over_the_querys(client: Client):
    body = client.predict(REDDISH, params={"explain": "png"}, data={"explain": "none"}).json()
    assert body["overlaid_img"] is None


def test_the_entry_is_in_the_spool_when_the_answer_arrives(client: Client, worker: WorkerParts):
    body = client.predict(REDDISH, params={"explain": "none"}).json()
    (record,) = spooled(worker)
    assert record["prediction_id"] == body["prediction_id"]
    assert record["request_method"] == "POST"
    assert record["request_url"] == "/predict?explain=none"
    assert record["response_status_code"] == 200
    assert record["response_message"] == "ok"
    assert 0 < record["timespan"] < 60
    assert record["model_name"] == "tiny"
    assert record["model_version"] == body["model_version"]
    assert record["predicted_class"] == "cat"
    assert record["prediction_json"] == {"cat": 0.5, "dog": 0.25, "owl": 0.25}
    assert spooled_images(worker) == [REDDISH]


def test_the_log_has_the_tag_and_which_key_it_was_but_not_the_key(make_worker: MakeWorker):
    worker = make_worker(CV_API_KEYS="first-key,second-key")
    closed = Client(create_app(worker))
    for key, tag in (("first-key", "line-3"), ("second-key", "A.b_c-9"), ("first-key", None)):
        params = {"explain": "none"} | ({"tag": tag} if tag else {})
        assert closed.predict(REDDISH, params=params, headers={"X-API-Key": key}).status_code == 200
    records = spooled(worker)
    assert [record["tag"] for record in records] == ["line-3", "A.b_c-9", None]
    first = hashlib.sha256(b"first-key").hexdigest()[:8]
    assert [record["client"] == first for record in records] == [True, False, True]
    assert not any("-key" in str(record) for record in records)
    assert [record["request_url"] for record in records][2] == "/predict?explain=none"


@pytest.mark.parametrize(
    ("proxies", "told", "network"),
    [
        ("", ["203.0.113.77"], None),
        ("10.0.0.0/8", ["203.0.113.77"], None),
        ("10.0.0.0/8,127.0.0.1", ["203.0.113.77"], "203.0.113.0/24"),
        ("127.0.0.0/8", ["2001:db8:1:2::3"], "2001:db8:1::/48"),
        ("127.0.0.0/8", ["::ffff:203.0.113.77"], "203.0.113.0/24"),
        ("127.0.0.0/8", [], None),
        ("127.0.0.0/8", ["unknown"], None),
        ("127.0.0.0/8", ["203.0.113.77", "198.51.100.1"], None),
    ],
)
def test_the_log_has_the_network_that_a_trusted_proxy_tells_and_never_the_address(
    make_worker: MakeWorker, proxies: str, told: list[str], network: str | None
):
    worker = make_worker(CV_TRUSTED_PROXIES=proxies)
    headers = [("X-Real-IP", address) for address in told]
    assert Client(create_app(worker)).predict(REDDISH, headers=headers).status_code == 200
    (record,) = spooled(worker)
    assert record["network"] == network
    assert not any(address in str(record) for address in told)


@pytest.mark.parametrize("tag", ["", "a" * 65, "two words", "line/3", "<b>", "\u0661"])
def test_a_tag_that_is_none_is_refused_before_the_body_is_read(client: Client, worker: WorkerParts, tag: str):
    response = client.predict(REDDISH, params={"tag": tag})
    assert (response.status_code, response.json()["expected"].startswith("tag=1 to 64 letters")) == (422, True)
    assert not any(record["prediction_id"] for record in spooled(worker))


@pytest.mark.parametrize("upload", [REDDISH, b"no image"], ids=["answered", "refused"])
def test_the_log_keeps_no_key_that_a_client_put_into_the_query(client: Client, worker: WorkerParts, upload: bytes):
    queries = (
        "api_key=s3cret&explain=none&token=s3cret",
        "s3cret",
        "s3cret=",
        "a=1&%65xplain=s3cret",
        "explain=none;k=s3cret",
        "explain=s3cret",
        "explain&explain=cam",
    )
    for query in queries:
        client.post(f"/predict?{query}", files={"file": ("image.png", upload, "image/png")})
    assert [record["request_url"] for record in spooled(worker)] == [
        "/predict?***=***&explain=none&***=***",
        "/predict?***",
        "/predict?***=***",
        "/predict?***=***&***=***",
        "/predict?explain=***",
        "/predict?explain=***",
        "/predict?explain&explain=cam",
    ]
    assert not any("s3cret" in str(record) for record in spooled(worker))


def test_properties_and_model_input_are_those_of_the_one_preprocessing(make_worker: MakeWorker):
    seen: list[np.ndarray] = []

    class Watching(BrightnessRuntime):
        def __call__(self, images, class_index):
            seen.append(images[0].copy())
            return super().__call__(images, class_index)

    worker = make_worker(models=FixedModels(LoadedModel(tiny_metadata(), Watching())))
    data = png(np.random.default_rng(3).integers(0, 256, (37, 91, 3), dtype=np.uint8))
    prediction_id = UUID(Client(create_app(worker)).predict(data).json()["prediction_id"])
    expected = preprocess(data, (16, 16))
    np.testing.assert_array_equal(seen[0], expected)
    stored = worker.log.opened.find_prediction(prediction_id)
    assert stored is not None
    np.testing.assert_array_equal(stored.properties, image_properties(expected))
    assert stored.media_type == "image/png"


@pytest.mark.parametrize(("keep", "kept"), [("all", 1), ("none", 0)])
def test_keeps_the_uploads_that_the_settings_ask_for(make_worker: MakeWorker, keep: str, kept: int):
    worker = make_worker(CV_LOG_IMAGES=keep)
    assert Client(create_app(worker)).predict(REDDISH).status_code == 200
    assert len(spooled_images(worker)) == kept
    assert len(spooled(worker)) == 1


def test_samples_about_a_tenth_of_the_uploads_and_the_same_ones_each_time():
    kept = [answer._is_kept(str(number).encode(), "sampled") for number in range(2000)]
    assert 140 < sum(kept) < 270  # Binomial(2000, 26/256): mean 203, five standard deviations are 68.
    assert kept == [answer._is_kept(str(number).encode(), "sampled") for number in range(2000)]


def test_a_failing_explanation_never_loses_the_prediction(
    client: Client, worker: WorkerParts, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> None:
        raise MemoryError("no room for a picture")

    monkeypatch.setattr(answer, "draw", broken)
    response = client.predict(REDDISH)
    assert response.status_code == 200
    body = response.json()
    assert body["predicted_class"] == "cat"
    assert body["overlaid_img"] is None
    assert "pictures could not be drawn" in body["message"]
    make_worker.stop(worker)  # Its message follows the entry, see `BegunEntry`.
    assert spooled(worker)[0]["response_message"] == body["message"]


def test_multi_label_answers_every_class_from_the_threshold_on(make_worker: MakeWorker):
    model = brightness_model(classifier_type="multi-label", threshold=0.25)
    worker = make_worker(models=FixedModels(model))
    client = Client(create_app(worker))
    body = client.predict(png(flat_image(199, 99, 99))).json()
    assert body["predicted_class"] == "cat|dog|owl"
    assert body["predicted_classes"] == ["cat", "dog", "owl"]
    # Means + 1 are (240, 80, 80): 0.6, 0.2, 0.2.
    assert client.predict(png(flat_image(239, 79, 79))).json()["predicted_class"] == "cat"


def test_multi_label_may_predict_no_class(make_worker: MakeWorker):
    worker = make_worker(models=FixedModels(brightness_model(classifier_type="multi-label", threshold=0.9)))
    body = Client(create_app(worker)).predict(REDDISH).json()
    assert body["predicted_class"] == ""
    assert body["predicted_classes"] == []
    assert spooled(worker)[0]["predicted_class"] == ""


def test_an_upload_of_many_megabytes_passes_through_the_temporary_file(make_worker: MakeWorker):
    worker = make_worker(CV_MAX_UPLOAD_BYTES="10000000")
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    data = png(noise)
    assert len(data) > 2_500_000
    response = Client(create_app(worker)).predict(data)
    assert response.status_code == 200
    assert spooled_images(worker) == [data]
    assert max(decoded(response.json()["overlaid_img"]).shape) == explain.LONGEST_SIDE_PX


def test_predictions_at_the_same_time_are_all_answered_and_logged(client: Client, worker: WorkerParts):
    request = ("POST", "/predict", {"files": {"file": ("a.png", REDDISH)}})
    responses = client.together([request] * 20)
    assert [r.status_code for r in responses] == [200] * 20
    ids = {r.json()["prediction_id"] for r in responses}
    assert len(ids) == 20
    assert {record["prediction_id"] for record in spooled(worker)} == ids


def test_counts_answers_and_classes(client: Client, worker: WorkerParts):
    client.predict(REDDISH)
    client.predict(b"")
    collected = worker.metrics._requests.collect()
    counts = {s.labels["status"]: s.value for metric in collected for s in metric.samples if s.name.endswith("_total")}
    assert counts == {"200": 1.0, "400": 1.0}


def bomb(side: int) -> bytes:
    """Returns a PNG of `side × side` black pixels with one bit each: a few kB that decode to 3·side² bytes."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8))
    data = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_small_image_of_one_bit_per_pixel_is_answered(client: Client):
    assert client.predict(bomb(64)).status_code == 200


def test_refuses_a_decompression_bomb_by_its_header_before_decoding(
    client: Client, worker: WorkerParts, monkeypatch: pytest.MonkeyPatch
):
    decoders: list[str] = []
    monkeypatch.setattr(cv2, "imdecode", lambda *_: decoders.append("OpenCV"))
    monkeypatch.setattr(Image.Image, "load", lambda *_: decoders.append("Pillow"))
    data = bomb(18_920)
    assert len(data) < 45_000
    assert 3 * 18_920**2 > 1_000_000_000
    response = client.predict(data)
    assert response.status_code == 413
    assert "at most 40000000 pixels" in response.json()["message"]
    assert decoders == []
    assert spooled(worker)[0]["response_status_code"] == 413
    assert spooled_images(worker) == []


def test_a_part_without_a_file_name_is_the_file(client: Client):
    """As Node's FormData sends a Buffer, and curl what it reads by `-F 'file=<a.jpg'`."""
    noise = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert len(noise) > 4096  # Of a text, no more is read.
    for header in (b"", b"Content-Type: image/png\r\n"):
        body = b'--x\r\nContent-Disposition: form-data; name="file"\r\n' + header + b"\r\n" + noise + b"\r\n--x--\r\n"
        answer = client.post("/predict", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert answer.status_code == 200
    nameless = [("files", (None, noise, "image/png"))] * 2
    assert client.post("/predict/batch", files=nameless).json()["answered"] == 2


def test_a_path_in_place_of_a_file_is_called_a_text(client: Client):
    refused = client.post("/predict", files={"file": (None, "photos/a.jpg")})
    assert refused.status_code == 422
    assert "'file' (text)" in refused.json()["message"]


def test_a_body_may_be_the_image_itself(client: Client, worker: WorkerParts):
    """`curl --data-binary @a.png -H 'Content-Type: image/png'`."""
    for media_type in ("image/png", "IMAGE/x-anything; q=1"):
        answer = client.post("/predict?explain=cam", content=REDDISH, headers={"Content-Type": media_type})
        assert answer.status_code == 200
        assert answer.json()["prediction"] == {"cat": 0.5, "dog": 0.25, "owl": 0.25}
        assert answer.json()["cam"] == [[0.519] * 4] * 4
    assert spooled_images(worker) == [REDDISH]
    for content, status in ((b"", 400), (REDDISH[:90], 400), (b"no image", 415), (bytes(300_000), 413)):
        refused = client.post("/predict", content=content, headers={"Content-Type": "image/png"})
        assert refused.status_code == status
    # Between the form's allowance and the image's: it is read, and refused all the same.
    refused = client.post("/predict", content=bytes(200_001), headers={"Content-Type": "image/png"})
    assert (refused.status_code, refused.json()["max_bytes"]) == (413, 200_000)
    batch = client.post("/predict/batch", content=REDDISH, headers={"Content-Type": "image/png"})
    assert batch.status_code == 422

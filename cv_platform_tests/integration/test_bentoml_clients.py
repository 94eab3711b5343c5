"""BentoML's own clients, and a service as `bentoml serve` runs it: closed by an API key, with a real model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bentoml
import httpx
import numpy as np
import pytest
from bentoml.exceptions import BentoMLException

from cv_platform.serving.model.runtime import load_folder
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.app_fixtures import spooled_at
from cv_platform_tests.support.hand_made import hand_made_export
from cv_platform_tests.support.http_client import png
from cv_platform_tests.support.served import serving
from cv_platform_tests.support.tiny_models import CLASS_NAMES, MODEL_NAME, publish_tiny, tiny_images

KEY = "a-key-of-bentomls-client"
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Served:
    """The service, an image, and what the model says of it."""

    url: str
    home: Path
    image: Path
    probabilities: dict[str, float]

    def logged(self) -> dict[str, dict[str, Any]]:
        """Returns the log entries of answered images, by prediction."""
        return {record["prediction_id"]: record for record in spooled_at(self.home) if record.get("prediction_id")}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bentoml")
    export = hand_made_export(folder / "export")
    storage = CentralStorage(folder / "storage")
    metadata = publish_tiny(storage, export)
    storage.write_pointer(
        "image_classifier",
        ProductionPointer(model_name=MODEL_NAME, version=metadata.version, since_utc=datetime.now(UTC)),
    )
    picture = tiny_images(1, seed=2)[0]
    probabilities = load_folder(export.folder, metadata).predict(picture).probabilities
    image = folder / "picture.png"
    image.write_bytes(png(picture))
    with serving(folder, {"CV_SERVICE_WORKERS": "1", "CV_API_KEYS": KEY}) as port:
        url = f"http://127.0.0.1:{port}"
        yield Served(url, folder, image, dict(zip(CLASS_NAMES, map(float, probabilities), strict=True)))


@pytest.fixture
def client(served: Served) -> Iterator[Any]:  # Its methods are made when it starts.
    with bentoml.SyncHTTPClient(served.url, token=KEY) as client:
        yield client


def require_answer(served: Served, answer: dict[str, Any]) -> None:
    """The model's answer, durable in the log by now."""
    np.testing.assert_allclose(
        [answer["prediction"][name] for name in CLASS_NAMES], [*served.probabilities.values()], atol=1e-6
    )
    record = served.logged()[answer["prediction_id"]]
    assert (record["predicted_class"], record["response_status_code"]) == (answer["predicted_class"], 200)


def test_the_sync_client_predicts_with_its_token_and_the_answer_is_logged(served: Served, client: Any) -> None:
    answer = client.predict(file=served.image)
    require_answer(served, answer)
    assert answer["media_type"] == "image/jpeg"
    assert served.logged()[answer["prediction_id"]]["request_url"] == "/predict"


@pytest.mark.parametrize("explain", ["png", "cam", "none"])
def test_the_client_says_what_to_explain(served: Served, client: Any, explain: str) -> None:
    answer = client.predict(file=served.image, explain=explain)
    assert answer["media_type"] == ("image/png" if explain == "png" else None)
    assert (answer["cam"] is not None) is (explain == "cam")


def test_the_async_client_predicts(served: Served) -> None:
    async def ask() -> list[dict[str, Any]]:
        made: Any = bentoml.AsyncHTTPClient(served.url, token=KEY)
        async with made as client:
            one = await client.predict(file=served.image, explain="none")
            return [one, await client.predict_batch(files=[served.image] * 2)]

    one, batch = asyncio.run(ask())
    for answer in [one, *batch["results"]]:
        require_answer(served, answer)


def test_a_broken_file_of_a_batch_is_told_with_what_was_expected(served: Served, client: Any) -> None:
    good, bad = client.predict_batch(files=[served.image, Path(__file__)], explain="none")["results"]
    require_answer(served, good)
    assert (bad["filename"], bad["status_code"]) == (Path(__file__).name, 415)
    assert "PNG" in bad["expected"]


def test_feedback_is_kept(served: Served, client: Any) -> None:
    prediction_id = client.predict(file=served.image, explain="none")["prediction_id"]
    said = client.feedback(prediction_id=prediction_id, true_class="owl", source="bentoml")
    assert (said["true_class"], said["message"]) == ("owl", "ok")
    client.feedback(prediction_id=prediction_id, none_of_these=True)
    kept = [record for record in spooled_at(served.home) if record.get("source") in ("bentoml", "client")]
    assert [record["true_class"] for record in kept][-2:] == ["owl", ""]


@pytest.mark.parametrize("token", [None, "another-key"])
def test_without_the_key_every_endpoint_is_refused(served: Served, token: str | None) -> None:
    before = len(served.logged())
    made: Any = bentoml.SyncHTTPClient(served.url, token=token)
    with made as client:
        for call in (
            lambda: client.predict(file=served.image),
            lambda: client.predict_batch(files=[served.image]),
            lambda: client.feedback(prediction_id="4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11", true_class="owl"),
        ):
            with pytest.raises(BentoMLException, match="closed by API keys") as refused:
                call()
            assert refused.value.error_code == 401
    assert len(served.logged()) == before


def test_what_is_wrong_reaches_the_client_in_words(served: Served, client: Any) -> None:
    with pytest.raises(BentoMLException, match="Expected an image") as refused:
        client.predict(file=Path(__file__))
    assert refused.value.error_code == 415
    with pytest.raises(BentoMLException, match="explain: expected jpeg, png, cam, none"):
        client.predict(file=served.image, explain="gif")
    with pytest.raises(BentoMLException, match="prediction_id"):
        client.feedback(prediction_id="no-id", true_class="owl")


def test_a_form_that_names_an_address_makes_the_service_fetch_nothing(served: Served, client: Any) -> None:
    # BentoML's own handlers would fetch it.
    with pytest.raises(BentoMLException, match="one image in the field 'file'") as refused:
        client.predict(file=f"{served.url}/models/current")
    assert refused.value.error_code == 422
    assert "/models/current" not in (served.home / "service.log").read_text()


@pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/feedback"])
def test_pickles_and_plain_json_are_refused(served: Served, path: str) -> None:
    for kind in ("application/vnd.bentoml+pickle", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": kind, "Authorization": f"Bearer {KEY}"}
        answer = httpx.post(served.url + path, content=b"cos\nsystem\n(S'true'\ntR.", headers=headers)
        assert answer.status_code == 422, answer.text
        assert kind in answer.json()["message"]


def test_the_schema_names_the_endpoints_as_bentoml_does(served: Served) -> None:
    schema = httpx.get(f"{served.url}/schema.json").json()
    assert schema["name"] == "image_classifier"
    routes = {route["name"]: route for route in schema["routes"]}
    assert {name: route["route"] for name, route in routes.items()} == {
        "predict": "/predict",
        "predict_batch": "/predict/batch",
        "feedback": "/feedback",
    }
    file = routes["predict"]["input"]["properties"]["file"]
    assert (file["type"], file["content_type"]) == ("file", "image/*")
    assert routes["predict"]["input"]["properties"]["explain"]["enum"] == ["jpeg", "png", "cam", "none"]


def test_the_services_log_shows_no_token(served: Served, client: Any) -> None:
    client.predict(file=served.image, explain="none")
    assert KEY not in (served.home / "service.log").read_text()
    assert KEY not in json.dumps(spooled_at(served.home))

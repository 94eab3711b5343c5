"""The service's log: one line per request, with its id, without a secret, and impossible to forge."""

import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest

from cv_platform.errors import DatabaseUnavailableError
from cv_platform.serving.app import create_app
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform.serving.telemetry.log_format import configure_logging
from cv_platform.settings import Settings
from cv_platform_tests.support.app_fixtures import ADMIN_TOKEN, MakeWorker
from cv_platform_tests.support.http_client import BrightnessRuntime, Client, FixedModels, flat_image, png
from cv_platform_tests.support.tiny_models import tiny_metadata

IMAGE = png(flat_image(10, 20, 30))
API_KEY = 'key "with" quotes'
PASSWORD = "päss/wörd"
SECRETS = {
    "CV_ADMIN_TOKEN": ADMIN_TOKEN,
    "CV_API_KEYS": API_KEY,
    "DATABASE_URL": "postgresql://cv:p%C3%A4ss%2Fw%C3%B6rd@127.0.0.1:1/cv",
    "CV_ALERT_URLS": "slack://token-a/token-b",
}
Configure = Callable[..., io.StringIO]


@pytest.fixture
def configure() -> Iterator[Configure]:
    """Makes this process log as a service does, to a text that it returns, until the end of the test."""
    names = ("", "bentoml", "uvicorn", "uvicorn.error", "circus", "cv_platform")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]

    def make(**environment: str) -> io.StringIO:
        stream = io.StringIO()
        configure_logging(Settings.from_environment({**SECRETS, **environment}), stream)
        return stream

    yield make
    logging.captureWarnings(False)
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def accesses(stream: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines(stream) if line["logger"] == "cv_platform.serving.http.access"]


def test_a_prediction_leaves_one_access_line(configure: Configure, client: Client, worker: WorkerParts):
    stream = configure()
    response = client.predict(IMAGE, headers={"X-Request-Id": "my-request"})
    (line,) = accesses(stream)
    model = worker.models.current()
    assert model is not None
    assert 0 < line.pop("seconds") < 60
    written = datetime.fromisoformat(line.pop("time"))
    assert written.tzinfo == UTC
    assert line == {
        "level": "INFO",
        "logger": "cv_platform.serving.http.access",
        "message": "POST /predict 200",
        "request_id": "my-request",
        "method": "POST",
        "route": "/predict",
        "path": "/predict",
        "status": 200,
        "model_version": model.metadata.version,
        "prediction_id": response.json()["prediction_id"],
    }


def test_a_batch_leaves_one_line_with_the_number_of_its_predictions(configure: Configure, client: Client):
    stream = configure()
    client.post("/predict/batch", files=[("files", ("a.png", IMAGE)), ("files", ("b.png", IMAGE))])
    (line,) = accesses(stream)
    assert (line["route"], line["status"], line["predictions"]) == ("/predict/batch", 200, 2)
    assert "prediction_id" not in line


@pytest.mark.parametrize(
    ("path", "route"), [("/nowhere", "unmatched"), ("/predictions/abc", "/predictions/{prediction_id}")]
)
def test_a_refusal_leaves_one_line(configure: Configure, client: Client, path: str, route: str):
    stream = configure()
    response = client.get(path)
    (line,) = accesses(stream)
    assert line["request_id"] == response.headers["x-request-id"]
    assert (line["route"], line["path"], line["status"]) == (route, path, response.status_code)


def test_probes_and_scrapes_leave_none(configure: Configure, client: Client):
    stream = configure()
    assert client.get("/metrics").status_code == 200
    assert accesses(stream) == []


class LoggingRuntime(BrightnessRuntime):
    def __call__(self, images: Any, class_index: Any) -> Any:
        logging.getLogger("somebody.elses").warning("the model is called")
        return super().__call__(images, class_index)


def test_lines_of_the_threads_that_predict_carry_the_request(configure: Configure, make_worker: MakeWorker):
    worker = make_worker(models=FixedModels(LoadedModel(tiny_metadata(), LoggingRuntime())))
    stream = configure()
    requests = [
        ("POST", "/predict", {"files": {"file": ("a.png", IMAGE)}, "headers": {"X-Request-Id": f"request-{number}"}})
        for number in range(8)
    ]
    responses = Client(create_app(worker)).together(requests)
    assert {response.status_code for response in responses} == {200}
    called = [line["request_id"] for line in lines(stream) if line["logger"] == "somebody.elses"]
    assert sorted(called) == [f"request-{number}" for number in range(8)]


def test_lines_outside_of_requests_carry_none(configure: Configure):
    stream = configure()
    logging.getLogger("cv_platform.serving.model.holder").info("Worker %s serves", "w1")
    (line,) = lines(stream)
    assert line["message"] == "Worker w1 serves"
    assert "request_id" not in line


def test_an_exception_is_a_field(configure: Configure):
    stream = configure()
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("bentoml.serve").exception("it failed")
    (line,) = lines(stream)
    assert line["level"] == "ERROR"
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("ValueError: two\nlines")


def test_bentomls_and_uvicorns_lines_and_warnings_look_the_same(configure: Configure):
    for name in ("bentoml", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.StreamHandler(io.StringIO()))
        logger.propagate = False
    stream = configure()
    logging.getLogger("bentoml.serve").warning("from BentoML")
    logging.getLogger("uvicorn.error").error("from uvicorn")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("from Python", UserWarning, stacklevel=1)
    messages = [line["message"] for line in lines(stream)]
    assert messages[:2] == ["from BentoML", "from uvicorn"]
    # Plotly, once imported, breaks Python's line in two.
    assert "UserWarning:" in messages[2]
    assert "from Python" in messages[2]


HOSTILE = "x\n2026 INFO forged\r\x1b[2J\x7f\u2028\x9b\udcff ü"


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_what_a_client_sends_cannot_forge_a_line_or_move_the_cursor(configure: Configure, log_format: str):
    stream = configure(CV_LOG_FORMAT=log_format)
    logging.getLogger("bentoml").warning("path %s", HOSTILE, extra={"fields": {"path": HOSTILE}})
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("bentoml").exception("it failed")
    text = stream.getvalue()
    assert not [character for character in text if not character.isprintable() and character != "\n"]
    assert not re.search("^2026 INFO forged", text, re.MULTILINE)
    if log_format == "json":
        assert lines(stream)[0]["message"] == f"path {HOSTILE}"
        assert text.isascii()


def test_the_text_format_shows_the_fields(configure: Configure, client: Client):
    stream = configure(CV_LOG_FORMAT="text")
    client.get("/nowhere", headers={"X-Request-Id": "abc"})
    line = stream.getvalue().splitlines()[-1]
    expected = (
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO cv_platform\.serving\.http\.access: GET unmatched 404 "
        r"request_id=abc method=GET route=unmatched path=/nowhere status=404 seconds=\d.*"
    )
    assert re.fullmatch(expected, line)


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_secret_is_ever_in_the_log(configure: Configure, make_worker: MakeWorker, log_format: str):
    stream = configure(CV_LOG_FORMAT=log_format)
    worker = make_worker(**SECRETS)
    headers = {"X-API-Key": API_KEY, "Authorization": f"Bearer {ADMIN_TOKEN}", "Cookie": API_KEY}
    client = Client(create_app(worker), headers)
    assert client.predict(IMAGE, params={"key": API_KEY}).status_code == 200
    assert client.get(f"/predictions/{uuid4()}?token={ADMIN_TOKEN}").status_code == 503
    assert client.delete(f"/predictions/{uuid4()}").status_code == 503
    assert client.get(f"/{ADMIN_TOKEN}").status_code == 404
    error = DatabaseUnavailableError(f"{SECRETS['DATABASE_URL']} with {PASSWORD} and {API_KEY!r}")
    logging.getLogger("cv_platform").warning("%s %s", SECRETS["CV_ALERT_URLS"], ADMIN_TOKEN, exc_info=error)
    text = stream.getvalue()
    assert text.count("***") >= 6
    forms = [
        ADMIN_TOKEN,
        API_KEY,
        json.dumps(API_KEY)[1:-1],
        PASSWORD,
        json.dumps(PASSWORD)[1:-1],
        "p%C3%A4ss",
        "token-b",
    ]
    assert [form for form in forms if form in text] == []
    if log_format == "json":
        assert all(isinstance(line, dict) for line in lines(stream))


def test_a_query_is_not_in_the_log(configure: Configure, client: Client):
    stream = configure()
    client.get("/nowhere?signature=sesame&key=open")
    (line,) = accesses(stream)
    assert line["path"] == "/nowhere"
    assert "sesame" not in stream.getvalue()


def test_an_unforeseen_error_is_logged_once_with_the_request(configure: Configure, make_worker: MakeWorker):
    class Broken(BrightnessRuntime):
        def __call__(self, images: Any, class_index: Any) -> Any:
            raise RuntimeError("no idea")

    stream = configure()
    client = Client(create_app(make_worker(models=FixedModels(LoadedModel(tiny_metadata(), Broken())))))
    response = client.predict(IMAGE)
    assert response.status_code == 500
    errors = [line for line in lines(stream) if "exception" in line]
    assert [line["request_id"] for line in errors] == [response.json()["request_id"]]
    assert [line["status"] for line in accesses(stream)] == [500]
    assert UUID(hex=errors[0]["request_id"])

"""A client of the service: images in, typed results out, errors with the service's own words.

    with Client("http://127.0.0.1:4242") as client:
        result = client.predict("seven.png")
        client.feedback(result.prediction_id, "7")

Retries: an answer of 429 or 503 is a refusal, so it is sent again after the time that Retry-After names, a bounded
number of times; so is a request whose connection could not be opened. Whatever the service may already have done is
not: no 504, no connection that broke, no time-out. A prediction is not idempotent: each one that is answered has an
entry and an id of its own, and a refusal that was retried may have a row in `api_log` without a prediction. Nothing is
lost by a retry. A prediction is in the log twice only when the service answered 503 because its disk did not confirm
the first entry in time and wrote it after all. Feedback carries one Idempotency-Key through all attempts, so it is kept
once.

httpx is imported late: the service, which takes the shapes of its answers from this package, does without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast
from urllib.parse import quote
from uuid import UUID, uuid4

from cv_platform.client.answers import (
    BatchFailure,
    BatchResult,
    CurrentModels,
    DeletionResult,
    FeedbackResult,
    Health,
    MovedPointer,
    PredictionResult,
    StoredResult,
    read_answer,
)
from cv_platform.client.errors import ClientError, RequestRefusedError, ServiceUnavailableError, UnusableImageError
from cv_platform.client.loopback import direct_transport

if TYPE_CHECKING:
    import httpx

Image = str | Path | bytes
"""A file, or an image's bytes."""
ExplainChoice = Literal["jpeg", "png", "cam", "none"]
_LATER = frozenset({429, 503})
_FIRST_WAIT_SECONDS = 0.5
_UNUSABLE_IMAGE = "unusable_image"
"""The code by which the service says that the image, and not the request, cannot be used."""
_Shape = TypeVar("_Shape")


@dataclass(frozen=True)
class BatchAnswer:
    """What became of one image of a batch: a result or an error, never both.

    Attributes:
        filename: its name, or `image-3` for the third one when it was sent as bytes.
        result: the prediction; None when it was refused.
        error: why it was refused; None when it was answered.
    """

    filename: str
    result: PredictionResult | None
    error: ClientError | None


class Client:
    """Talks to one service; safe to use from several threads, and best used in a `with` block.

    Each call raises `RequestRefusedError` where the request, its key or its token has to change, or names what is not
    there (404), and `ServiceUnavailableError` where the service cannot be reached or, after all retries, has no time,
    no model or no log to ask.

    Args:
        url: where the service is, such as `http://127.0.0.1:4242`.
        api_key: needed where the service has CV_API_KEYS.
        admin_token: needed for `update_model`, `rollback` and `delete_prediction`.
        timeout: seconds that one attempt may take to connect, send or wait for a part of the answer.
        retries: how often a refused request is sent again.
        longest_wait_seconds: a Retry-After beyond this is not waited for.
        transport: of httpx; None opens connections: to this machine without a proxy, elsewhere as HTTP_PROXY says.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        admin_token: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        longest_wait_seconds: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import httpx

        headers = {"X-API-Key": api_key} if api_key else {}
        transport = transport or direct_transport(url)
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, transport=transport)
        self._admin = {"Authorization": f"Bearer {admin_token}"} if admin_token else {}
        self._url = url
        self._retries = retries
        self._longest_wait_seconds = longest_wait_seconds
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def predict(self, image: Image, *, explain: ExplainChoice = "jpeg", tag: str | None = None) -> PredictionResult:
        """Returns the prediction of one image; it is in the service's log for good.

        Args:
            image: what is asked about.
            explain: what to add to the probabilities.
            tag: where it is from, such as a line or camera: 1 to 64 letters, digits, dots, dashes or underscores.

        Raises:
            UnusableImageError: the service cannot use the image.
        """
        files = {"file": _part(image, 1)}
        return self._send(PredictionResult, "POST", "/predict", params=_query(explain, tag), files=files)

    def predict_batch(
        self, images: Sequence[Image], *, explain: ExplainChoice = "jpeg", tag: str | None = None
    ) -> list[BatchAnswer]:
        """Returns an answer for each image, in their order; one that cannot be used does not lose the others."""
        parts = [_part(image, number) for number, image in enumerate(images, start=1)]
        files = [("files", part) for part in parts]
        response = self._attempt("POST", "/predict/batch", params=_query(explain, tag), files=files)
        # When all images are refused the status is theirs, and the items are there all the same.
        if response.status_code != 200 and "results" not in _fields(response):
            raise _error(response)
        batch = _parse(BatchResult, response)
        return [
            BatchAnswer(name, None, _error_of(item.status_code, item.message, is_image=True))
            if isinstance(item, BatchFailure)
            else BatchAnswer(name, item, None)
            for (name, _), item in zip(parts, batch.results, strict=True)
        ]

    def feedback(
        self,
        prediction_id: UUID | str,
        true_class: str | None = None,
        *,
        none_of_these: bool = False,
        source: str = "client",
        idempotency_key: str | None = None,
    ) -> FeedbackResult:
        """Says what an image really shows.

        Args:
            prediction_id: of the prediction.
            true_class: one of the model's classes; multi-label classes are joined by `|`.
            none_of_these: in place of `true_class`: the image shows none of the model's classes.
            source: who says so.
            idempotency_key: makes this statement one, however often it is sent, and refuses another one under the same
                key; None: one for this call's attempts.
        """
        what = {"none_of_these": True} if none_of_these else {}
        if true_class is not None:
            what |= {"true_class": true_class}
        said = {**what, "source": source}
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        return self._send(FeedbackResult, "POST", f"/feedback/{_id(prediction_id)}", json=said, headers=headers)

    def prediction(self, prediction_id: UUID | str) -> StoredResult:
        """Returns a result again."""
        return self._send(StoredResult, "GET", f"/predictions/{_id(prediction_id)}")

    def delete_prediction(self, prediction_id: UUID | str) -> DeletionResult:
        """Deletes a prediction for good; needs the admin token."""
        return self._send(DeletionResult, "DELETE", f"/predictions/{_id(prediction_id)}", headers=self._admin)

    def models_current(self) -> CurrentModels:
        """Returns what is in production, and what each worker runs."""
        return self._send(CurrentModels, "GET", "/models/current")

    def update_model(self, model_name: str, version: str | None = None) -> MovedPointer:
        """Puts a published version (by default the newest) into production; needs the admin token.

        Raises:
            RequestRefusedError: among others, it did not pass its load test (409).
            ServiceUnavailableError: among others, another update is under way.
        """
        params = {"version": version} if version else {}
        path = f"/update_model/{quote(model_name, safe='')}.yaml"
        return self._send(MovedPointer, "PUT", path, params=params, headers=self._admin)

    def rollback(self) -> MovedPointer:
        """Puts the previous version back into production, as `update_model` does."""
        return self._send(MovedPointer, "POST", "/rollback", headers=self._admin)

    def health(self) -> Health:
        """Returns what one worker says of itself, ready or not; never retried."""
        return _parse(Health, self._request("GET", "/health_check"))

    def _send(self, shape: type[_Shape], method: str, path: str, **options: Any) -> _Shape:
        response = self._attempt(method, path, **options)
        if response.is_success:
            return _parse(shape, response)
        raise _error(response)

    def _attempt(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Sends a request, again while it is refused for the time being; returns the last answer."""
        wait = _FIRST_WAIT_SECONDS
        for retries_left in range(self._retries, -1, -1):
            try:
                response = self._request(method, path, **options)
            except _NotSentError:
                if not retries_left:
                    raise
                asked = wait
            else:
                if response.status_code not in _LATER or not retries_left:
                    return response
                asked = _retry_after(response.headers, wait)
                if asked > self._longest_wait_seconds:
                    return response
            self._sleep(asked)
            wait *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        import httpx

        try:
            return self._http.request(method, path, **options)
        except (httpx.ConnectError, httpx.ConnectTimeout) as err:
            raise _NotSentError(
                f"Expected the service at {self._url}. Received: {err}. Start it, or correct the URL."
            ) from err
        except (httpx.HTTPError, httpx.InvalidURL) as err:
            raise ServiceUnavailableError(
                f"Expected an answer of {self._url}. Received: {type(err).__name__} {err}. Whether it did what was "
                "asked is not known."
            ) from err


class _NotSentError(ServiceUnavailableError):
    """No connection: the service has seen nothing of the request."""


def _query(explain: ExplainChoice, tag: str | None) -> dict[str, str]:
    return {"explain": explain} if tag is None else {"explain": explain, "tag": tag}


def _part(image: Image, number: int) -> tuple[str, bytes]:
    if isinstance(image, bytes):
        return f"image-{number}", image
    path = Path(image)
    try:
        return path.name, path.read_bytes()
    except OSError as err:
        raise UnusableImageError(f"Expected an image file. Received: {path}: {err.strerror}.") from err


def _id(prediction_id: UUID | str) -> UUID:
    try:
        return prediction_id if isinstance(prediction_id, UUID) else UUID(prediction_id)
    except ValueError as err:
        raise RequestRefusedError(
            f"Expected a prediction_id, as `predict` returns it. Received: {ascii(prediction_id)[:80]}.",
            status_code=422,
        ) from err


def _retry_after(headers: Mapping[str, str], default: float) -> float:
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return default
    return max(0.0, seconds) if math.isfinite(seconds) else default


def _fields(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], body) if isinstance(body, dict) else {}


def _parse(shape: type[_Shape], response: httpx.Response) -> _Shape:
    try:
        return read_answer(shape, _fields(response))
    except ValueError as err:
        raise ServiceUnavailableError(
            f"Expected the answer of an image classifier service. Received from {response.url} with status "
            f"{response.status_code}: {response.text[:200]!r}. Is that the service's URL?",
            status_code=response.status_code,
        ) from err


def _error(response: httpx.Response) -> ClientError:
    fields = _fields(response)
    # BentoML's own refusals have another shape.
    text = str(fields.get("message") or fields.get("error") or response.text[:200] or "no text")
    if "request_id" in fields:
        text += f" (request {fields['request_id']})"
    # A malformed request has the same status as a broken image, and any body may be too large.
    is_image = fields.get("code") == _UNUSABLE_IMAGE or (
        response.status_code == 413 and "/predict" in response.url.path
    )
    if response.status_code == 409 and "retry-after" in response.headers:
        return ServiceUnavailableError(text, status_code=409)
    return _error_of(response.status_code, text, is_image=is_image)


def _error_of(status: int, text: str, *, is_image: bool) -> ClientError:
    if status == 429 or status >= 500:
        return ServiceUnavailableError(f"{text} (status {status})", status_code=status)
    kind = UnusableImageError if is_image else RequestRefusedError
    return kind(text, status_code=status)

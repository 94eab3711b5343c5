"""The image classifier as a BentoML service: its endpoints, and around them the app of `cv_platform.serving`.

Over HTTP, `POST /predict`, `/predict/batch` and `/feedback` are answered by the app's routes of these paths, which take
what BentoML's clients send and everything else that the API promises. BentoML's own handlers would read a stranger's
body before anybody asks for a key, fetch an image from any address that a form names, and call a broken form their
own error. Both ways end in the same functions. Whatever else BentoML has (`/schema.json`, `/docs.json`, endpoints that
you add to the class) is served behind the app's checks.

From a checkout: `bentoml serve bentos.image_classifier.service:ImageClassifier`; by tag: `bentoml serve <tag>`, with a
model inside. Give each server a BENTOML_HOME of its own: servers that share one wipe each other's metrics.

BentoML imports this module twice: in its first process, which reads the class, starts the workers and serves nothing,
and in each worker. The first must fail at once where a setting is wrong, and be quick: the workers wait for it. So
what serves is imported in workers alone. https://docs.bentoml.com/en/latest/build-with-bentoml/asgi.html
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml.validators import ContentType

from cv_platform.client import ExplainChoice
from cv_platform.database.address import postgres_url
from cv_platform.serving.capacity.limits import ServingLimits
from cv_platform.serving.http.bentoml_app import AnswerFirst
from cv_platform.serving.telemetry.log_format import configure_logging
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

if __name__ == "service" and sys.argv[1:2] == ["build"]:  # BentoML takes this folder alone, which lacks cv_platform.
    _folder = Path(__file__).resolve().parent
    _checkout = _folder.parents[1]
    if not (_checkout / "bentofile.yaml").is_file():
        raise ImportError(
            f"Expected a checkout, with bentofile.yaml, around {_folder}. Received: {_checkout}, which has none. Run "
            "`bentoml build` in a checkout."
        )
    _starts = (Path(), Path(os.environ.get("PWD", "")))  # BentoML has changed into the folder.
    _options = [part for part in sys.argv[2:] if _folder not in {(start / part).resolve() for start in _starts}]
    _whole = ["-m", "bentoml", "build", *_options, "-f", str(_checkout / "bentofile.yaml"), str(_checkout)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *_whole])
_settings = Settings.from_environment()
configure_logging(_settings)
# Without these no worker could start, and each would be started again and again.
CentralStorage(_settings.storage_url)
if _settings.database_url is not None:
    postgres_url(_settings.database_url.get_secret_value())
_limits = ServingLimits.of(_settings)


_Image = Annotated[Path, ContentType("image/*")]
_Answer = dict[str, Any]
"""The JSON of the routes, see `cv_platform.client.answers`. BentoML 1.4's clients could not read its types: they
fail on a list that may be null, and drop the fields of all but the first of several shapes."""


_UNUSED = {"TimeoutMiddleware", "OpenTelemetryMiddleware"}


class _Lean(bentoml.Service[Any]):
    """A service without BentoML's time-out, which keeps a timer for each request for all of its time, answered or not.

    The app has one that does not (`http.deadline`), and spans of its own; BentoML 1.4 has no setting for neither, and
    for each request it would look at the excluded addresses, which are all.
    """

    def to_asgi(self, is_main: bool = True) -> Any:
        """Returns BentoML's app."""
        app: Any = super().to_asgi(is_main)
        app.user_middleware = [m for m in app.user_middleware if m.cls.__name__ not in _UNUSED]
        return app


@bentoml.service(
    name="image_classifier",
    service_class=_Lean,
    workers=_settings.service_workers,
    # Of another service that calls this one. No limit on concurrency: BentoML's would count clients that do not take
    # their answers, and refuse health to everybody.
    traffic={"timeout": _limits.longest_seconds},
    # The app has its own of all three, without a client's paths and headers in labels and lines.
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    tracing={"excluded_urls": ".*"},
)
class ImageClassifier:
    """Classifies images, explains the answers, and logs every request durably."""

    def __init__(self) -> None:
        from cv_platform.serving.app import create_app
        from cv_platform.serving.routes.endpoints import Endpoints
        from cv_platform.serving.worker import open_worker

        bundled = Path(__file__).resolve().with_name("bundled_model")
        self._opened = ExitStack()
        parts = self._opened.enter_context(
            open_worker(_settings, bundled=bundled if bundled.is_dir() else None, limits=_limits)
        )
        self._endpoints = Endpoints(parts)
        served = bentoml.server_context
        app = create_app(parts, bento=(served.bento_name or "image_classifier", served.bento_version))
        ImageClassifier.context.state["app"] = app
        # For BentoML's documents, which describe what is mounted; the middleware below is the way to it.
        ImageClassifier.mount_apps.clear()
        ImageClassifier.mount_asgi_app(app)

    @bentoml.api
    async def predict(self, file: _Image, explain: ExplainChoice = "jpeg") -> _Answer:
        """Classifies one image; with the answer it is in the request log for good."""
        return await self._endpoints.predict(file, explain)

    @bentoml.api(route="/predict/batch")
    async def predict_batch(self, files: list[_Image], explain: ExplainChoice = "jpeg") -> _Answer:
        """Classifies several images: `results` has an item for each, in their order, also for one that fails."""
        return await self._endpoints.predict_batch(files, explain)

    @bentoml.api
    async def feedback(
        self, prediction_id: str, true_class: str | None = None, none_of_these: bool = False, source: str = "client"
    ) -> _Answer:
        """Keeps what an image really shows: one of the model's classes, or none of these."""
        statement = {"true_class": true_class, "none_of_these": none_of_these, "source": source}
        return await self._endpoints.feedback({"prediction_id": prediction_id, **statement})

    @bentoml.on_shutdown
    def stop(self) -> None:
        """Takes the worker off the list and lets go of its files."""
        self._opened.close()


# BentoML 1.4.39 types a class as an instance of its protocol.
ImageClassifier.add_asgi_middleware(AnswerFirst, ours=lambda: ImageClassifier.context.state["app"])  # pyright: ignore[reportArgumentType]


def _prepare_worker() -> None:
    """Sets up this process for serving."""
    from cv_platform.serving.http.connections import bound_connections
    from cv_platform.serving.machine import bound_opencv, return_large_blocks

    return_large_blocks()
    bound_opencv(_limits.model_threads)
    bound_connections()


if bentoml.server_context.worker_index is not None:
    _prepare_worker()

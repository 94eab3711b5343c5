"""The image classifier as a BentoML service: the FastAPI app of `cv_platform.serving`, mounted, once per worker.

From a checkout: `bentoml serve bentos.image_classifier.service:ImageClassifier`; by tag: `bentoml serve <tag>`, with a
model inside. Give each server a BENTOML_HOME of its own: servers that share one wipe each other's metrics.
https://docs.bentoml.com/en/latest/build-with-bentoml/asgi.html
"""

from __future__ import annotations

from pathlib import Path

import bentoml

from cv_platform.serving.app import create_app
from cv_platform.serving.clean_requests import CleanRequest, escape_access_log
from cv_platform.serving.context import ServingContext
from cv_platform.settings import Settings

_settings = Settings.from_environment()
_bundled = Path(__file__).resolve().with_name("bundled_model")
_context = ServingContext(_settings, bundled=_bundled if _bundled.is_dir() else None)
_per_worker = _context.limits.max_uploads + _context.limits.max_in_flight


@bentoml.service(
    name="image_classifier",
    workers=_settings.service_workers,
    # The app's own limits answer first, with advice; these hold when the app does not. BentoML divides the
    # concurrency among the workers.
    traffic={"timeout": 120, "max_concurrency": 2 * _per_worker * _settings.service_workers},
    # BentoML 1.4.39 decodes the header as UTF-8 before it sends the end of the answer: a wrong one cuts the connection.
    logging={"access": {"request_content_type": False}},
)
@bentoml.asgi_app(create_app(_context), path="/")
class ImageClassifier:
    """Classifies images, explains the answers, and logs every request durably."""

    def __init__(self) -> None:
        _context.start()

    def __is_ready__(self) -> bool:
        return _context.models.current() is not None

    @bentoml.on_shutdown
    def stop(self) -> None:
        """Takes the worker off the list and lets go of its files."""
        _context.stop()


# Around everything that BentoML itself answers, such as /metrics; only its access log runs further out.
# BentoML 1.4.39 types the class as an instance of its protocol.
ImageClassifier.add_asgi_middleware(CleanRequest)  # pyright: ignore[reportArgumentType]
escape_access_log()

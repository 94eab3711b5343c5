"""The image classifier as a BentoML service: the FastAPI app of `cv_platform.serving`, once per worker.

From a checkout: `bentoml serve bentos.image_classifier.service:ImageClassifier`; by tag: `bentoml serve <tag>`, with a
model inside. Give each server a BENTOML_HOME of its own: servers that share one wipe each other's metrics.

BentoML imports this module twice: in its first process, which reads the class, starts the workers and serves nothing,
and in each worker. The first must fail at once where a setting is wrong, and be quick: the workers wait for it. So
what serves is imported in workers alone. https://docs.bentoml.com/en/latest/build-with-bentoml/asgi.html
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml

from cv_platform.database.address import postgres_url
from cv_platform.serving.capacity.limits import ServingLimits
from cv_platform.serving.telemetry.log_format import configure_logging
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

if TYPE_CHECKING:
    from fastapi import FastAPI

_settings = Settings.from_environment()
configure_logging(_settings)
# Without these no worker could start, and each would be started again and again.
CentralStorage(_settings.storage_url)
if _settings.database_url is not None:
    postgres_url(_settings.database_url.get_secret_value())
_limits = ServingLimits.of(_settings)


_opened = ExitStack()


@functools.cache
def _app() -> FastAPI:
    """Opens this process's worker, and returns its app."""
    from cv_platform.serving.app import create_app
    from cv_platform.serving.worker import open_worker

    bundled = Path(__file__).resolve().with_name("bundled_model")
    parts = open_worker(_settings, bundled=bundled if bundled.is_dir() else None, limits=_limits)
    return create_app(_opened.enter_context(parts))


@bentoml.service(
    name="image_classifier",
    workers=_settings.service_workers,
    # The app's own limits answer first, with advice; this one holds when the app does not. None on concurrency: it
    # would count clients that do not take their answers, and refuse health to everybody.
    traffic={"timeout": _limits.longest_seconds},
    # The app has its own of all three, without a client's paths and headers in labels and lines.
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    tracing={"excluded_urls": ".*"},
)
class ImageClassifier:
    """Classifies images, explains the answers, and logs every request durably."""

    def __init__(self) -> None:
        _app()

    @bentoml.on_shutdown
    def stop(self) -> None:
        """Takes the worker off the list and lets go of its files."""
        _opened.close()


def _answer_alone() -> None:
    """Gives the service of this worker its app."""
    from cv_platform.serving.app import AnswerAlone
    from cv_platform.serving.http.connections import bound_connections
    from cv_platform.serving.machine import return_large_blocks

    return_large_blocks()
    bound_connections()
    # BentoML 1.4.39 types a class as an instance of its protocol.
    ImageClassifier.add_asgi_middleware(AnswerAlone, ours=_app)  # pyright: ignore[reportArgumentType]


if bentoml.server_context.worker_index is not None:
    _answer_alone()

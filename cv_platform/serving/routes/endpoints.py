"""The service's endpoints for callers in its own process, as BentoML's users have them in tests and notebooks.

Requests over HTTP are answered by the routes; both do the same by the same functions, up to the durable log entry. Who
is in the process needs no API key, and counts for the rates as one client.
https://docs.bentoml.com/en/latest/build-with-bentoml/testing.html
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.responses import Response
from starlette.types import Scope

from cv_platform.errors import CvPlatformError
from cv_platform.serving.http.problems import problem_of
from cv_platform.serving.http.request_facts import facts_of
from cv_platform.serving.model.explain import Explain
from cv_platform.serving.problem import Problem
from cv_platform.serving.routes.batch import BATCH_PATH, answer_batch, form_of
from cv_platform.serving.routes.feedback import FEEDBACK_PATH, FeedbackOn, keep
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform.serving.routes.predict import PREDICT_PATH, answer_and_log, begin
from cv_platform.serving.telemetry.observation import Observation, end_observation, observe


class Endpoints:
    """What one worker answers to callers in its process.

    Args:
        parts: the worker's, open.
    """

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts

    async def predict(self, file: Path, explain: str) -> dict[str, Any]:
        """Answers one image once its log entry is durable.

        Raises:
            Problem: as POST /predict refuses it.
            CvPlatformError: the image is not usable, or the log cannot keep the answer.
        """
        parts = self._parts
        async with self._request(PREDICT_PATH) as request:
            model = begin(parts, request)
            with self._uploads([file]) as (upload,):
                parts.admission.admit()
                return await answer_and_log(parts, request, model, upload, Explain(explain), dict[str, Any])

    async def predict_batch(self, files: Sequence[Path], explain: str) -> dict[str, Any]:
        """Answers several images, each on its own.

        Raises:
            Problem: as POST /predict/batch refuses it.
        """
        async with self._request(BATCH_PATH) as request:
            model = begin(self._parts, request)
            form = form_of(self._parts.limits.max_batch_files)
            if not 1 <= len(files) <= form.max_files:
                raise Problem(422, f"Expected {form.expected}. Received: {len(files)}.", expected=form.expected)
            with self._uploads(files) as uploads:
                return _body(await answer_batch(self._parts, request, model, uploads, Explain(explain)))

    async def feedback(self, statement: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps what somebody says of a prediction: the fields of `routes.feedback.FeedbackOn`.

        Raises:
            Problem: as POST /feedback refuses it.
            ValueError: the fields are others.
        """
        said = FeedbackOn.model_validate(statement)
        async with self._request(FEEDBACK_PATH) as request:
            return _body(await keep(self._parts, request, said.prediction_id, said))

    @asynccontextmanager
    async def _request(self, path: str) -> AsyncGenerator[Request]:
        """Yields what stands for a request; what refuses it is logged as that of any other."""
        scope: Scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
        token = observe(Observation(facts_of(scope), self._parts.metrics, None))
        try:
            yield Request(scope)
        except (Problem, CvPlatformError) as err:
            problem = err if isinstance(err, Problem) else problem_of(err)
            if path != FEEDBACK_PATH and not facts_of(scope).is_logged:
                await self._parts.refusals.log(scope, problem.status_code, problem.message)
            raise
        finally:
            end_observation(token)

    @contextmanager
    def _uploads(self, files: Sequence[Path]) -> Generator[list[UploadFile]]:
        """Opens files as uploads, and takes the memory that they need."""
        sizes = [file.stat().st_size for file in files]
        with ExitStack() as opened:
            opened.enter_context(self._parts.admission.memory.upload(sum(sizes)))(sum(sizes))
            yield [
                UploadFile(opened.enter_context(file.open("rb")), size=size, filename=file.name)
                for file, size in zip(files, sizes, strict=True)
            ]


def _body(response: Response) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(bytes(response.body))
    if response.status_code >= 400:
        raise Problem(response.status_code, body["message"], expected=body["expected"], extra=body)
    return body

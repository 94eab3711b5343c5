import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cv_platform.serving.capacity.limits import PROMOTION_SECONDS, BodyAllowance, BodyLimit, Gate, ServingLimits
from cv_platform.serving.http.problems import Problem, problem_response
from cv_platform.settings import Settings
from cv_platform_tests.unit.serving.http_client import RawAnswer, send_raw

LIMIT = 1000


async def echo_length(request: Request) -> Response:
    return JSONResponse({"bytes": len(await request.body())})


async def on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem_response(request.scope, error)


APP = BodyLimit(
    Starlette(routes=[Route("/", echo_length, methods=["POST"])], exception_handlers={Problem: on_problem}),
    allowance_for=lambda path: BodyAllowance(LIMIT, 5.0),
)


def post(chunks: list[bytes], *lengths: bytes) -> RawAnswer:
    return send_raw(APP, "POST", "/", headers=[(b"content-length", length) for length in lengths], chunks=chunks)


def test_a_body_of_exactly_the_limit_passes():
    assert post([b"x" * LIMIT], b"1000").body == {"bytes": LIMIT}


def test_a_declared_length_above_the_limit_is_refused_before_a_byte_is_read():
    answer = post([b"x" * 1001], b"1001")
    assert answer.status == 413
    assert answer.chunks_read == 0
    assert answer.headers["connection"] == "close"
    assert answer.body["max_bytes"] == LIMIT


def test_a_body_without_a_length_is_counted_and_cut_off_at_the_limit():
    answer = post([b"x" * 300] * 1_000)
    assert answer.status == 413
    assert answer.chunks_read == 4


def test_a_body_that_is_longer_than_it_declares_is_counted_too():
    assert post([b"x" * 1001], b"10").status == 413


@pytest.mark.parametrize("length", [b"9" * 19, b"9" * 5_000, b"0" * 5_000 + b"1001", b"1001 "])
def test_huge_lengths_are_too_large_whatever_their_form(length: bytes):
    assert post([b"x"], length).status == 413


@pytest.mark.parametrize("length", [b"", b"-1", b"1e3", b"0x10", b"ten", "١٠".encode(), b"10.0", b"1, 2", b"1_0"])
def test_a_length_that_is_no_number_is_malformed(length: bytes):
    answer = post([b"x"], length)
    assert answer.status == 400
    assert answer.chunks_read == 0


def test_two_lengths_that_differ_are_malformed_and_two_equal_ones_are_one():
    assert post([b"x"], b"1", b"2").status == 400
    assert post([b"x"], b"1", b"1").status == 200


def test_leading_zeros_do_not_change_a_length():
    assert post([b"x"], b"0" * 100 + b"1").status == 200


def test_the_gate_admits_up_to_its_limit_and_again_after_one_left():
    gate = Gate(2)
    assert [gate.enter(), gate.enter(), gate.enter()] == [True, True, False]
    assert gate.is_full
    gate.leave()
    assert not gate.is_full
    assert gate.enter()
    assert gate.inside == 2


def test_the_gate_counts_right_when_threads_race():
    gate = Gate(10)
    barrier = threading.Barrier(16)

    def enter_often(_: int) -> int:
        barrier.wait()
        return sum(gate.enter() for _ in range(1_000))

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(enter_often, range(16))) == 10
    assert gate.inside == 10


def test_several_places_are_taken_all_or_none():
    gate = Gate(4)
    assert [gate.enter(3), gate.enter(2), gate.enter(1)] == [True, False, True]
    gate.leave(3)
    assert gate.inside == 1


def test_a_gate_for_nobody_is_refused():
    with pytest.raises(ValueError, match="1 or more"):
        Gate(0)


class Stalled:
    """Sends its chunks, and then nothing any more."""

    def __init__(self, *chunks: bytes, is_complete: bool) -> None:
        self.messages: list[Any] = [
            {"type": "http.request", "body": chunk, "more_body": not is_complete or number < len(chunks) - 1}
            for number, chunk in enumerate(chunks)
        ]

    async def __call__(self) -> Any:
        if self.messages:
            return self.messages.pop(0)
        return await asyncio.Event().wait()


async def answer(app: ASGIApp, receive: Stalled, *headers: tuple[bytes, bytes]) -> int:
    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if message["type"] == "http.response.start" else [])

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": list(headers)}
    async with asyncio.timeout(30):
        await app(scope, receive, send)
    return statuses[0]


def limited(routes: Route, *, seconds: float, small_bodies: Gate | None = None) -> BodyLimit:
    return BodyLimit(
        Starlette(routes=[routes], exception_handlers={Problem: on_problem}),
        allowance_for=lambda path: BodyAllowance(LIMIT, seconds),
        small_bodies=small_bodies,
    )


def test_a_body_that_does_not_arrive_in_time_is_a_408():
    app = limited(Route("/", echo_length, methods=["POST"]), seconds=0.05)
    assert asyncio.run(answer(app, Stalled(b"x", is_complete=False), (b"content-length", b"2"))) == 408


def test_a_body_in_time_may_take_as_long_as_it_likes_to_answer():
    async def wait_for_the_end(request: Request) -> Response:
        await request.body()
        receiving = asyncio.ensure_future(request.receive())  # As whoever watches for the client's going away.
        done, _ = await asyncio.wait([receiving], timeout=0.3)
        receiving.cancel()
        return JSONResponse({"received": len(done)})

    app = limited(Route("/", wait_for_the_end, methods=["POST"]), seconds=0.05)
    assert asyncio.run(answer(app, Stalled(b"x", is_complete=True), (b"content-length", b"1"))) == 200


@pytest.mark.parametrize("header", [(b"content-length", b"2"), (b"transfer-encoding", b"chunked")])
def test_no_more_small_bodies_than_there_are_places(header: tuple[bytes, bytes]):
    gate = Gate(1)
    app = limited(Route("/", echo_length, methods=["POST", "GET"]), seconds=0.5, small_bodies=gate)

    async def three() -> list[int]:
        slow = asyncio.create_task(answer(app, Stalled(b"x", is_complete=False), header))
        await asyncio.sleep(0)
        return [
            await answer(app, Stalled(b"xx", is_complete=True), header),
            await answer(app, Stalled(b"", is_complete=True)),
            await slow,
        ]

    assert asyncio.run(three()) == [429, 200, 408]
    assert gate.inside == 0


def settings(**environment: str) -> Settings:
    return Settings.from_environment(environment)


def test_without_settings_a_worker_takes_its_share_of_the_cores_and_room_for_a_batch():
    limits = ServingLimits.of(settings(CV_SERVICE_WORKERS="2"), cores=8)
    assert (limits.predict_threads, limits.model_threads) == (4, 1)
    assert limits.max_in_flight == 16 * 4 + 32
    assert limits.max_batch_files == 32
    assert limits.predict_seconds == 30.0


def test_settings_win_over_what_is_derived():
    limits = ServingLimits.of(
        settings(
            CV_SERVICE_WORKERS="2",
            CV_PREDICT_THREADS="1",
            CV_PREDICT_TIMEOUT_SECONDS="5",
            CV_MAX_IN_FLIGHT="7",
            CV_MAX_BATCH_FILES="3",
        ),
        cores=8,
    )
    assert (limits.predict_threads, limits.model_threads) == (1, 4)
    assert (limits.max_in_flight, limits.max_batch_files, limits.predict_seconds) == (7, 3, 5.0)


def test_a_batch_is_never_larger_than_what_could_be_admitted():
    assert ServingLimits.of(settings(CV_MAX_IN_FLIGHT="4"), cores=2).max_batch_files == 4
    assert ServingLimits.of(settings(CV_RATE_LIMIT_PER_MINUTE="10"), cores=2).max_batch_files == 10


def test_bentomls_limit_holds_only_where_the_apps_own_do_not():
    limits = ServingLimits.of(settings(CV_PREDICT_TIMEOUT_SECONDS="100"), cores=2)
    assert limits.longest_seconds > limits.upload_seconds + 2 * 100
    short = ServingLimits.of(settings(CV_PREDICT_TIMEOUT_SECONDS="1"), cores=2)
    assert short.longest_seconds > short.small_body_seconds + PROMOTION_SECONDS

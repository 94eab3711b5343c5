import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cv_platform.serving.capacity.limits import Gate
from cv_platform.serving.http.body_limit import BodyAllowance, BodyLimit
from cv_platform.serving.http.problems import problem_response
from cv_platform.serving.problem import Problem
from cv_platform_tests.support.http_client import RawAnswer, send_raw

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

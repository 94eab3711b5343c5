import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cv_platform.serving.limits import BodyLimit, Gate
from cv_platform.serving.problems import Problem, problem_response
from cv_platform_tests.unit.serving.http_client import RawAnswer, send_raw

LIMIT = 1000


async def echo_length(request: Request) -> Response:
    return JSONResponse({"bytes": len(await request.body())})


async def on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem_response(request.scope, error)


APP = BodyLimit(
    Starlette(routes=[Route("/", echo_length, methods=["POST"])], exception_handlers={Problem: on_problem}),
    limit_for=lambda path: LIMIT,
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


def test_a_gate_for_nobody_is_refused():
    with pytest.raises(ValueError, match="1 or more"):
        Gate(0)

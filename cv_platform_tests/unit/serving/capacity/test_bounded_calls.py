import asyncio
import threading

import pytest

from cv_platform.serving.capacity.bounded_calls import BoundedCalls
from cv_platform.serving.problem import Problem


def test_returns_what_the_call_returns_and_raises_what_it_raises():
    calls = BoundedCalls("calls", "it", threads=2, seconds=10)

    def fail() -> None:
        raise KeyError("why")

    async def both() -> int:
        with pytest.raises(KeyError, match="why"):
            await calls.run(fail)
        return await calls.run(lambda: 7)

    assert asyncio.run(both()) == 7
    assert calls.gate.inside == 0
    calls.close(5)


def test_a_call_that_hangs_is_a_503_in_time_and_keeps_its_place_until_it_ends():
    calls = BoundedCalls("look-ups", "the request log", threads=1, places=1, seconds=0.05)
    go = threading.Event()

    async def hang() -> list[Problem]:
        problems: list[Problem] = []
        for work in (go.wait, lambda: True):
            with pytest.raises(Problem) as caught:
                await calls.run(work)
            problems.append(caught.value)
        return problems

    late, full = asyncio.run(hang())
    assert (late.status_code, full.status_code) == (503, 429)
    assert "the request log hangs" in late.message
    assert late.headers is not None
    assert int(late.headers["Retry-After"]) > 0
    go.set()

    async def again() -> bool:
        async with asyncio.timeout(30):
            while calls.gate.inside:
                await asyncio.sleep(0.01)
        return await calls.run(lambda: True, seconds=30)

    assert asyncio.run(again())
    calls.close(5)


def test_what_waits_behind_a_call_that_hangs_is_told_in_time_and_never_runs():
    calls = BoundedCalls("look-ups", "the request log", threads=1, seconds=0.05)
    go = threading.Event()
    ran: list[int] = []

    async def hang() -> list[object]:
        return await asyncio.gather(
            calls.run(go.wait), *(calls.run(lambda n=n: ran.append(n)) for n in range(8)), return_exceptions=True
        )

    problems = asyncio.run(hang())
    assert [problem.status_code for problem in problems if isinstance(problem, Problem)] == [503] * 8 + [429]
    go.set()
    calls.close(5)
    assert ran == []
    assert calls.gate.inside == 0


def test_a_closed_one_says_that_the_service_stops():
    calls = BoundedCalls("calls", "it", threads=1, seconds=1)
    calls.close(5)
    with pytest.raises(Problem, match="stopping"):
        asyncio.run(calls.run(lambda: None))
    assert calls.gate.inside == 0

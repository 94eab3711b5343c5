from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import (
    Alternative,
    Check,
    Observation,
    Ratio,
    Report,
    available_cores,
    bootstrap_interval,
    compare,
    in_process,
    interleaved_order,
    machine_line,
    measure_interleaved,
    table,
    write_report,
)


def observed(units: int, wall_seconds: float, cpu_seconds: float | None = None, **metrics: float) -> Observation:
    return Observation(units=units, wall_seconds=wall_seconds, cpu_seconds=cpu_seconds, metrics=metrics)


def test_order_turns_round_with_every_round() -> None:
    assert list(interleaved_order(["a", "b", "c"], 3)) == [
        (0, "a"),
        (0, "b"),
        (0, "c"),
        (1, "c"),
        (1, "b"),
        (1, "a"),
        (2, "a"),
        (2, "b"),
        (2, "c"),
    ]


def test_measures_in_interleaved_order_and_throws_the_warm_up_away() -> None:
    calls: list[str] = []

    def measured(name: str) -> Alternative:
        def measure() -> Observation:
            calls.append(name)
            return observed(units=len(calls), wall_seconds=1.0)

        return Alternative(name, measure)

    observations = measure_interleaved([measured("a"), measured("b")], rounds=2, warm_up=1)

    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert {name: [o.units for o in found] for name, found in observations.items()} == {"a": [3, 6], "b": [4, 5]}


@pytest.mark.parametrize(("rounds", "warm_up"), [(0, 1), (1, -1)])
def test_refuses_to_measure_nothing(rounds: int, warm_up: int) -> None:
    with pytest.raises(ValueError, match="Expected rounds"):
        measure_interleaved([Alternative("a", lambda: observed(1, 1.0))], rounds=rounds, warm_up=warm_up)


def test_refuses_two_alternatives_of_one_name() -> None:
    same = Alternative("a", lambda: observed(1, 1.0))
    with pytest.raises(ValueError, match="different names"):
        measure_interleaved([same, same], rounds=1)


def test_derives_rates_from_units_and_times() -> None:
    assert observed(units=200, wall_seconds=4.0, cpu_seconds=0.5, p99_ms=7.0).values() == {
        "units_per_second": 50.0,
        "wall_us_per_unit": 20_000.0,
        "cpu_us_per_unit": 2_500.0,
        "p99_ms": 7.0,
    }


def test_leaves_cpu_time_out_where_the_system_does_not_tell() -> None:
    assert "cpu_us_per_unit" not in observed(units=1, wall_seconds=1.0).values()


def test_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    # The machine slows down fivefold from round to round. By round: 10/2, 60/10, 200/50 = 5, 6, 4; the ratio of the
    # medians would be 60/10 = 6.
    observations = {
        "slow": [observed(1, seconds) for seconds in (10.0, 60.0, 200.0)],
        "fast": [observed(1, seconds) for seconds in (2.0, 10.0, 50.0)],
    }
    ratio = compare(observations, "slow", "fast", "wall_us_per_unit", seed=1)
    assert ratio is not None
    assert ratio.median == pytest.approx(5.0)
    assert ratio.low >= 4.0
    assert ratio.high <= 6.0
    assert ratio.rounds == 3


def test_ratio_of_something_not_measured_is_none() -> None:
    observations = {"a": [observed(1, 1.0)], "b": [observed(1, 1.0, cpu_seconds=1.0)]}
    assert compare(observations, "a", "b", "cpu_us_per_unit") is None


def test_ratio_reads_as_one_line() -> None:
    ratio = Ratio(
        quantity="p50_ms", numerator="original", denominator="platform", median=48.04, low=46, high=50.5, rounds=5
    )
    assert str(ratio) == "p50_ms: original / platform = 48.04 (46.00–50.50, 5 rounds)"


def test_bootstrap_repeats_with_its_seed_and_differs_without() -> None:
    values = np.random.default_rng(0).normal(10, 3, 15)
    assert bootstrap_interval(values, seed=3, resamples=50) == bootstrap_interval(values, seed=3, resamples=50)
    assert bootstrap_interval(values, seed=3, resamples=50) != bootstrap_interval(values, seed=4, resamples=50)


def test_bootstrap_of_equal_values_has_no_width() -> None:
    assert bootstrap_interval(np.full(5, 2.5), seed=0) == (2.5, 2.5)


def test_bootstrap_interval_of_the_median_agrees_with_the_order_statistics() -> None:
    # The binomial interval of the median of 25 values at 95 % is (x8, x18); the bootstrap's is close to it.
    low, high = bootstrap_interval(np.arange(1.0, 26.0), seed=0)
    assert 7 <= low <= 9
    assert 17 <= high <= 19


def test_bootstrap_refuses_no_values() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(np.array([]), seed=0)


def test_in_process_work_is_timed_and_counted() -> None:
    observation = in_process(lambda: sum(1 for _ in range(1000)))()
    assert observation.units == 1000
    assert observation.wall_seconds > 0
    assert observation.cpu_seconds is not None


def test_machine_line_names_versions_and_what_is_absent() -> None:
    line = machine_line(["numpy", "no-such-library"])
    assert f"numpy {np.__version__}" in line
    assert "no-such-library absent" in line
    assert f"{available_cores()} cores" in line


@pytest.fixture
def report() -> Report:
    observations = {
        "original": [observed(10, 10.0, 20.0, p99_ms=30.0), observed(10, 20.0, 40.0, p99_ms=50.0)],
        "platform": [observed(100, 10.0, 5.0), observed(100, 10.0, 5.0)],
    }
    ratio = compare(observations, "platform", "original", "units_per_second")
    assert ratio is not None
    return Report(
        name="example",
        title="An example",
        unit="request",
        started_utc=datetime(2026, 1, 31, 6, 0, tzinfo=UTC),
        seconds=61.0,
        machine="a machine",
        settings={"rounds": 2},
        observations=observations,
        ratios=[ratio],
        notes=["a note"],
    )


def test_table_shows_medians_ratios_notes_and_machine(report: Report) -> None:
    title, head, original, platform, ratio, note, machine = table(report).splitlines()
    assert title == "An example"
    assert head.split() == ["requests_per_second", "wall_us_per_request", "cpu_us_per_request", "p99_ms"]
    # By hand: rates 1 and 0.5, wall 1 s and 2 s, CPU 2 s and 4 s a request; medians in between.
    assert original.split() == ["original", "0.8", "1,500,000.0", "3,000,000.0", "40.0"]
    assert platform.split() == ["platform", "10.0", "100,000.0", "50,000.0", "–"]
    assert ratio.startswith("requests_per_second: platform / original = 15.00 (")
    assert note == "a note"
    assert machine == "a machine; 61 s"


def test_table_of_a_trial_shows_its_checks_and_how_many_held(report: Report) -> None:
    checks = [
        Check(what="swaps", expected="0 failed", received="0 failed", held=True),
        Check(what="kills", expected="0 lost", received="2 lost", held=False),
    ]
    trial = report.model_copy(update={"observations": {}, "ratios": [], "notes": [], "checks": checks})
    assert table(trial).splitlines() == [
        "An example",
        "held    swaps: expected 0 failed. Received: 0 failed.",
        "FAILED  kills: expected 0 lost. Received: 2 lost.",
        "1 of 2 held",
        "a machine; 61 s",
    ]


def test_report_survives_its_json(report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "new" / "folder")
    assert path.name == "example-20260131T060000Z.json"
    assert Report.model_validate_json(path.read_text(encoding="utf-8")) == report

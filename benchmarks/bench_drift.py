"""Drift verdicts on real images: false alarms, what is noticed, and what a verdict costs beside Evidently's metrics.

Each window is compared with a reference of 1,500 drawn anew: held-out images of one network, none of them in both.
Verdicts of several families of detectors are compared on the same windows. Nulls are drawn of the same images as the
reference, so that each alarm is false, and windows are independent given these images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.drift_samples import SEVERITY_2, Samples, read_samples
from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.options import Options
from cv_platform.compute.blas import one_blas_thread
from cv_platform.config import MonitorConfig
from cv_platform.drift.family import DEFAULT_DETECTORS, DETECTOR_NAMES
from cv_platform.drift.localisation import class_movements, effect_sizes, image_scores
from cv_platform.drift.sample import REPRESENTATIONS, DriftSample
from cv_platform.drift.verdict import DriftVerdict, judge

ALPHA = 0.05
NULLS, TRIALS = 300, 25
_REFERENCE = 1500
_PERMUTATIONS = 199
"""Fewer than a report takes, for thousands of verdicts: the power is understated a little."""
NOTED: Mapping[str, tuple[float, float, float]] = {
    "noise sd 10": (1.0, 1.0, 1.0),
    "noise sd 100": (0.1, 0.21, 1.0),
    "small turn, shift, zoom": (1.0, 1.0, 1.0),
    "medium turn, shift, zoom": (0.5, 1.0, 1.0),
    "channels swapped": (0.5, 0.85, 1.0),
    "brightness 0.7": (1.0, 1.0, 1.0),
    "JPEG quality 20": (1.0, 0.92, 1.0),
    "a class missing": (1.0, 0.0, 0.75),
}
"""Of each shift the part of the window, and what `notes/drift.md` has for 100 and 500 images."""
RABANSER_100, DETECTRON_10 = 0.47, 0.37
"""BBSDs on 100 images, mean over shifts (Rabanser et al. 2019); Detectron on 10 of CIFAR-10.1 (Ginsberg et al.)."""
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "default": DEFAULT_DETECTORS,
    "default and encoder_mmd": (*DEFAULT_DETECTORS, "encoder_mmd"),
}
_FEW = 10
"""Windows that a family besides the default judges: with the encoder's 1,280 columns it takes most of the time."""
LIBRARIES = ("numpy", "scipy", "evidently")

Found = Mapping[str, Sequence[DriftVerdict]]
"""By family, its verdicts on the windows."""


def run(options: Options) -> Report:
    """Measures the digits, and the images of `options.archive` (SPLIT/CLASS/image)."""
    clock, begun = Stopwatch(), time.process_time()
    sets = read_samples(options)
    features_seconds, begun = time.process_time() - begun, time.process_time()
    checks: list[Check] = []
    notes: list[str] = []
    with one_blas_thread():
        for samples in sets:
            options.say(f"{samples.name}: false alarms, then shifts …")
            notes.append(f"{samples.name}: accuracy {samples.accuracy:.3f} on {len(samples.held_out)} held-out images")
            _false_alarms(samples, options, checks, notes)
            if samples.shifted:
                _power(samples, options, checks, notes)
    verdicts_seconds = time.process_time() - begun
    observed = [samples for samples in sets if len(samples.held_out) >= 5500]
    if observed:
        _cost(observed[0], options, checks, notes)
    notes.append(
        f"CPU: {features_seconds:.0f} s for features that were not kept, {verdicts_seconds:.0f} s for verdicts"
    )
    return Report(
        name="drift",
        title="Drift verdicts on real images",
        unit="window",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"alpha": ALPHA, "null windows": NULLS, "shifted windows": TRIALS, "reference images": _REFERENCE},
        observations={},
        ratios=[],
        checks=checks,
        notes=notes,
    )


@dataclass(frozen=True)
class _Drawn:
    """A reference and a window without a common image."""

    reference: DriftSample
    window: DriftSample


def _false_alarms(samples: Samples, options: Options, checks: list[Check], notes: list[str]) -> None:
    """Draws reference and window of the same images, 300 times for each size."""
    rows = len(samples.held_out)
    for size in (50, 100, 500):
        reference = min(_REFERENCE, rows - size)

        def draw(rng: np.random.Generator, size: int = size, reference: int = reference) -> _Drawn:
            order = rng.permutation(rows)
            return _Drawn(
                samples.held_out.take(order[:reference]), samples.held_out.take(order[reference : reference + size])
            )

        found = _judged(draw, NULLS, options.seed)
        low, high = (int(stats.binom.ppf(q, NULLS, ALPHA)) for q in (0.025, 0.975))
        alarms = sum(verdict.drifted for verdict in found["default"])
        what = f"{samples.name}: false alarms of {NULLS} windows of {size}"
        # Of drawn permutations p-values are whole multiples of one in 200: fewer is no fault.
        checks.append(Check(what=what, expected=f"≤ {high}", received=f"{alarms}", held=alarms <= high))
        notes.append(f"{samples.name}: false alarms, {size} images ({low} to {high} of {NULLS}): {_told(found)}")


def _power(samples: Samples, options: Options, checks: list[Check], notes: list[str]) -> None:
    for shift, (fraction, *known) in NOTED.items():
        for size, before in zip((100, 500), known, strict=True):
            found = _judged(_drawing(samples, shift, fraction, size), TRIALS, options.seed)
            rate = _rate(found["default"])
            # Both are measured on some dozens of windows.
            slack = 2 * float(np.sqrt(2 * max(before * (1 - before), 0.02) / TRIALS))
            checks.append(
                Check(
                    what=f"{shift}, {fraction:.0%} of {size} images",
                    expected=f"≥ {before:.2f}, two standard errors aside",
                    received=f"{rate:.2f}",
                    held=rate >= before - slack,
                )
            )
            notes.append(f"{shift}, {fraction:.0%} of {size}: {_told(found)}")
    for size, least, who in ((10, DETECTRON_10, "Detectron"), (100, RABANSER_100, "BBSDs")):
        every: dict[str, list[DriftVerdict]] = {family: [] for family in FAMILIES}
        for shift in (name for name in samples.shifted if name.startswith(SEVERITY_2)):
            found = _judged(_drawing(samples, shift, 1.0, size), TRIALS, options.seed)
            notes.append(f"{shift}, {size} images: {_told(found)}")
            for family, verdicts in found.items():
                every[family] += verdicts
        rate = _rate(every["default"])
        notes.append(f"severity 2, {size} images, mean: {_told(every)}")
        checks.append(
            Check(
                what=f"noticed of {size} images at severity 2, mean of six",
                expected=f"≥ {least:.2f}, what {who} is published with for another shift",
                received=f"{rate:.2f}",
                held=rate >= least,
            )
        )


def _drawing(samples: Samples, shift: str, fraction: float, size: int) -> Callable[[np.random.Generator], _Drawn]:
    """Returns what draws a reference, and a window of which a part is shifted."""
    usual = np.setdiff1d(np.arange(len(samples.held_out)), samples.sources)

    def draw(rng: np.random.Generator) -> _Drawn:
        order = rng.permutation(usual)
        reference, rest = samples.held_out.take(order[:_REFERENCE]), order[_REFERENCE:]
        if shift == "a class missing":
            return _Drawn(reference, samples.held_out.take(rest[samples.labels[rest] != 0][:size]))
        changed = samples.shifted[shift]
        count = round(fraction * size)
        parts = changed.take(rng.permutation(len(changed))[:count]), samples.held_out.take(rest[: size - count])
        return _Drawn(reference, _joined(*parts))

    return draw


def _joined(left: DriftSample, right: DriftSample) -> DriftSample:
    names = (*REPRESENTATIONS, "encoded")
    return DriftSample(*(np.concatenate([getattr(left, name), getattr(right, name)]) for name in names))


def _judged(draw: Callable[[np.random.Generator], _Drawn], windows: int, seed: int) -> Found:
    found: dict[str, list[DriftVerdict]] = {family: [] for family in FAMILIES}
    for window in range(windows):
        drawn = draw(np.random.default_rng([seed, window]))
        for family, names in FAMILIES.items():
            if family == "default" or window < _FEW:
                found[family].append(
                    judge(
                        drawn.reference,
                        drawn.window,
                        alpha=ALPHA,
                        permutations=_PERMUTATIONS,
                        max_reference_rows=_REFERENCE,
                        seed=window,
                        detectors=names,
                    )
                )
    return found


def _rate(verdicts: Sequence[DriftVerdict]) -> float:
    return float(np.mean([verdict.drifted for verdict in verdicts]))


def _told(found: Found) -> str:
    """Returns how often each family says drift, and each detector alone."""
    families = ", ".join(f"{family} {_rate(verdicts):.3f}" for family, verdicts in found.items())
    # Where families have one in common, the first has judged most windows.
    alone = {
        name: np.mean([verdict.p_values[name] <= ALPHA for verdict in verdicts])
        for verdicts in reversed(list(found.values()))
        for name in verdicts[0].p_values
    }
    return f"{families}; each alone: " + ", ".join(f"{name} {share:.2f}" for name, share in alone.items())


def _cost(samples: Samples, options: Options, checks: list[Check], notes: list[str]) -> None:
    """Measures the whole verdict as a report makes it, and what the original system runs on the same rows, once."""
    order = np.random.default_rng(options.seed).permutation(len(samples.held_out))
    reference, window = samples.held_out.take(order[:5000]), samples.held_out.take(order[5000:5500])
    monitor = MonitorConfig()
    effort: dict[str, Any] = {
        "permutations": monitor.permutations,
        "max_reference_rows": monitor.max_reference_rows,
        "seed": monitor.seed,
    }
    names = [str(at) for at in range(reference.bbsd.shape[1])]

    def whole() -> None:
        verdict = judge(reference, window, alpha=ALPHA, **effort)
        effect_sizes(reference, window, verdict, class_names=names)
        class_movements(reference, window, class_names=names, classifier_type="multi-class")
        image_scores(reference, window, seed=monitor.seed)

    ours = float(np.median([_seconds(whole) for _ in range(3)]))
    each = {
        name: _seconds(lambda name=name: judge(reference, window, alpha=ALPHA, detectors=(name,), **effort))
        for name in DETECTOR_NAMES
    }
    notes.append("CPU s of each detector: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in each.items()))
    options.say("Evidently's six embedding metrics, in a report and in a test suite …")
    parts = {part: _seconds(lambda part=part: _evidently(part, reference, window)) for part in ("report", "test suite")}
    theirs = sum(parts.values())
    notes.append("CPU s of Evidently's six: " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items()))
    checks += [
        Check(
            what="whole verdict of 500 images, reference of 5,000, CPU s",
            expected="≤ 2.5",
            received=f"{ours:.2f}",
            held=ours <= 2.5,
        ),
        Check(
            what="Evidently's six embedding metrics, in report and test suite / whole verdict, CPU",
            expected="≥ 50",
            received=f"{theirs / ours:.0f}",
            held=theirs >= 50 * ours,
        ),
    ]


def _seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def _evidently(part: str, reference: DriftSample, current: DriftSample) -> None:
    """Does what the original system does: four methods on the untrained embedding, two on the probabilities."""
    from evidently.legacy.metrics import EmbeddingsDriftMetric
    from evidently.legacy.metrics.data_drift.embedding_drift_methods import distance, mmd, model, ratio
    from evidently.legacy.pipeline.column_mapping import ColumnMapping
    from evidently.legacy.report import Report as EvidentlyReport
    from evidently.legacy.test_suite import TestSuite
    from evidently.legacy.tests import TestEmbeddingsDrift

    def six(make: Any) -> Any:
        methods: list[tuple[str, Any]] = [
            (name, method)
            for name in ("uae", "bbsd")
            for method in (
                mmd(threshold=0.015, quantile_probability=0.95),
                ratio(component_stattest="ks", threshold=0.05),
            )
        ]
        methods += [("uae", distance(dist="euclidean", threshold=0.2)), ("uae", model(threshold=0.75))]
        return [make(name, drift_method=method) for name, method in methods]

    columns = {name: [f"{name}{at}" for at in range(getattr(reference, name).shape[1])] for name in ("uae", "bbsd")}
    frames = [
        pd.concat(
            [pd.DataFrame(getattr(sample, name), columns=pd.Index(named)) for name, named in columns.items()], axis=1
        )
        for sample in (reference, current)
    ]
    judged: Any = (
        EvidentlyReport(six(EmbeddingsDriftMetric)) if part == "report" else TestSuite(six(TestEmbeddingsDrift))
    )
    judged.run(reference_data=frames[0], current_data=frames[1], column_mapping=ColumnMapping(embeddings=columns))
    judged.as_dict()

"""Compares the results of a sweep: best scale, Pareto front, and where guidance does harm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from .metrics import ACCURACY, FRECHET, METRICS, Result
from .settings import Curve, SweepSetting, format_scales

MAX_CURVES = 8  # that the sentence on the Pareto front lists
Harm = Mapping[SweepSetting, tuple[str, ...]]  # {setting that is worse than no guidance: reasons}


@dataclass(frozen=True)
class Verdict:
    """How the settings compare.

    Attributes:
        best: the one with the lowest Frechet distance.
        most_accurate: the most accurate one whose Frechet distance is within the best one's
            interval.
        front: the Pareto front of accuracy, Frechet distance and seconds per image; cheapest
            first.
        harmful: {setting that is worse than no guidance: reasons}.
        warnings: sentences about the harmful settings; the model's default scale comes first.
        findings: sentences about everything else.
    """

    best: SweepSetting
    most_accurate: SweepSetting
    front: tuple[SweepSetting, ...]
    harmful: Harm
    warnings: tuple[str, ...]
    findings: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*self.findings, *(f"Warning: {text}" for text in self.warnings)])


def verdict_of(results: Sequence[Result], default_scale: float | None = None) -> Verdict:
    """Compare results.

    Args:
        default_scale: the model's default guidance scale.

    Raises:
        ValueError: if there are no results.
    """
    if not results:
        raise ValueError("results: no setting is measured yet")
    best = min(results, key=lambda result: result.value(FRECHET))
    close = [result for result in results if result.value(FRECHET) <= best.interval(FRECHET)[1]]
    most_accurate = max([best, *close], key=_accuracy)  # the best in case of a tie
    front, harmful = pareto_front(results), find_harm(results)
    findings, warnings = _judge_default_scale(results, harmful, default_scale)
    findings = [*_best_findings(results, best, most_accurate), *findings]
    findings.append(_front_finding(results, front))
    return Verdict(
        best.setting,
        most_accurate.setting,
        tuple(result.setting for result in front),
        harmful,
        (*warnings, *_curve_warnings(results, harmful)),
        tuple(findings),
    )


def find_harm(results: Sequence[Result]) -> Harm:
    """{setting that is worse than no guidance: reasons}.

    A setting is worse if its interval of the Frechet distance lies above that of the unguided
    baseline with the same scheduler and steps, or its interval of the accuracy lies below.
    """
    by_setting = {result.setting: result for result in results}
    harmful: dict[SweepSetting, tuple[str, ...]] = {}
    for result in results:
        baseline = by_setting.get(result.setting.unguided, result)  # none is worse than itself
        for name in (FRECHET, ACCURACY):
            if name not in result.metrics or name not in baseline.metrics:
                continue
            (low, high), (base_low, base_high) = result.interval(name), baseline.interval(name)
            worse = low > base_high if name == FRECHET else high < base_low
            if worse:
                values = f"{result.full_text(name)} against {baseline.full_text(name)}"
                reasons = harmful.get(result.setting, ())
                harmful[result.setting] = (*reasons, f"{result.title(name)} {values}")
    return harmful


def pareto_front(results: Sequence[Result]) -> list[Result]:
    """Results that no other dominates in accuracy (if measured), Frechet distance and cost.

    The cheapest comes first. Results with the same number of network evaluations have the median
    of their seconds as cost, so that noise of the clock has no effect.
    """
    seconds = defaultdict(list)
    for result in results:
        seconds[result.evaluations].append(result.seconds)
    losses = np.array(
        [(median(seconds[r.evaluations]), r.value(FRECHET), -_accuracy(r)) for r in results]
    )
    no_worse = (losses[:, None] <= losses).all(2)
    better = (losses[:, None] < losses).any(2)
    front = np.flatnonzero(~(no_worse & better).any(0))
    return [results[i] for i in sorted(front, key=lambda i: tuple(losses[i, :2]))]


def _accuracy(result: Result) -> float:
    return result.value(ACCURACY) if ACCURACY in result.metrics else 0.0


def _judge_default_scale(
    results: Sequence[Result], harmful: Harm, default_scale: float | None
) -> tuple[list[str], list[str]]:
    """Findings and warnings about the model's default scale."""
    if not default_scale:
        return [], []
    text = f"model's default scale, {default_scale:.12g},"
    count = sum(result.setting.at_scale(default_scale) for result in results)
    if not count:
        return [f"The {text} was not measured."], []
    worse = [s for s in harmful if s.at_scale(default_scale)]
    if not worse:
        return [f"The {text} is never worse than no guidance."], []
    where = "" if count == 1 else f" in {len(worse)} of {count} settings"
    reasons = f"{worse[0].curve}: {' and '.join(harmful[worse[0]])}"
    return [], [f"guidance at the {text} is worse than no guidance{where}; {reasons}."]


def _curve_warnings(results: Sequence[Result], harmful: Harm) -> Iterator[str]:
    """One warning for the curves that differ only in steps and are worse at the same scales."""
    groups: dict[tuple[str, str, tuple[float, ...]], list[Curve]] = defaultdict(list)
    for curve, worse in _scales_by_curve(harmful).items():
        groups[curve.scheduler, curve.variant, worse].append(curve)
    for (scheduler, variant, worse), curves in groups.items():
        name, example_steps = curves[0], ""
        if len(curves) > 1:
            *steps, last = (str(curve.steps) for curve in curves)
            name = Curve(scheduler, f"{', '.join(steps)} and {last}", variant)
            example_steps = f"with {curves[0].steps} steps "
        measured = {r.setting.guidance_scale for r in results if r.setting.curve in curves} - {0.0}
        where = "every scale" if len(worse) == len(measured) > 1 else _scales_text(worse)
        example = next(s for s in harmful if (s.curve, s.guidance_scale) == (curves[0], worse[-1]))
        yield (
            f"{name}: guidance at {where} is worse than no guidance; at {example.scale_text} "
            f"{example_steps}{' and '.join(harmful[example])}."
        )


def _best_findings(results: Sequence[Result], best: Result, most_accurate: Result) -> Iterator[str]:
    title = best.title(FRECHET)
    yield f"The best scale by {title} is {_describe(best)}."
    if best.setting.guidance_scale == 0 and len(results) > 1:
        yield (
            "Images without guidance are closest to the real images; guidance can improve other "
            f"metrics, but its {title} is higher."
        )
    if most_accurate is not best:
        yield (
            f"Of the settings whose {title} is within the interval of the best, the most accurate "
            f"is scale {_describe(most_accurate)}."
        )


def _front_finding(results: Sequence[Result], front: Sequence[Result]) -> str:
    scales = _scales_by_curve(result.setting for result in front)
    parts = [f"{curve} at {_scales_text(values)}" for curve, values in scales.items()]
    listed = parts[:MAX_CURVES] + ["and more"] * (len(parts) > MAX_CURVES)
    accuracy = "accuracy, " if any(ACCURACY in result.metrics for result in front) else ""
    return (
        f"{len(front)} of {len(results)} settings are Pareto-optimal: no other is at least as good "
        f"in {accuracy}{front[0].title(FRECHET)} and seconds per image and better in one of them. "
        f"Cheapest first: {'; '.join(listed)}."
    )


def _scales_by_curve(settings: Iterable[SweepSetting]) -> dict[Curve, tuple[float, ...]]:
    scales: dict[Curve, list[float]] = defaultdict(list)
    for setting in settings:
        scales[setting.curve].append(setting.guidance_scale)
    return {curve: tuple(sorted(values)) for curve, values in scales.items()}


def _scales_text(scales: Sequence[float]) -> str:
    return f"scale{'s' if len(scales) > 1 else ''} {format_scales(scales)}"


def _describe(result: Result) -> str:
    """Scale, curve, metrics and seconds of a result."""
    parts = [f"{result.title(FRECHET)} {result.full_text(FRECHET)}"]
    if ACCURACY in result.metrics:
        parts.append(f"{METRICS[ACCURACY].title} {result.full_text(ACCURACY)}")
    if "recall" in result.metrics:
        parts.append(f"recall {result.text('recall')}")
    parts.append(f"{result.seconds:.2g} {result.cost['clock']} seconds per image")
    return f"{result.setting.scale_text} ({result.setting.curve}): {', '.join(parts)}"

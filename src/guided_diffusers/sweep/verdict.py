"""Compares the results of a sweep: best scale, Pareto front, and where guidance does harm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from .metrics import ACCURACY, FRECHET, METRICS, Result
from .settings import Curve, SweepSetting, format_number, format_scales

MAX_CURVES = 8  # that the sentence on the Pareto front lists


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
    harmful: Mapping[SweepSetting, tuple[str, ...]]
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
    findings = [
        *_best_findings(results, best, most_accurate),
        *_default_scale_findings(results, harmful, default_scale),
        _front_finding(results, front),
    ]
    warnings = [
        *_default_scale_warnings(results, harmful, default_scale),
        *_curve_warnings(results, harmful),
    ]
    return Verdict(
        best.setting,
        most_accurate.setting,
        tuple(result.setting for result in front),
        harmful,
        tuple(warnings),
        tuple(findings),
    )


def find_harm(results: Sequence[Result]) -> dict[SweepSetting, tuple[str, ...]]:
    """{setting that is worse than no guidance: reasons}.

    A setting is worse if its interval of the Frechet distance lies above that of the unguided
    baseline with the same scheduler and steps, or its interval of the accuracy lies below.
    """
    by_setting = {result.setting: result for result in results}
    harmful = {}
    for result in results:
        baseline = by_setting.get(result.setting.unguided)
        if baseline is None or baseline is result:
            continue
        reasons = tuple(
            f"{result.title(name)} {result.full_text(name)} against {baseline.full_text(name)}"
            for name in (FRECHET, ACCURACY)
            if _is_worse(result, baseline, name)
        )
        if reasons:
            harmful[result.setting] = reasons
    return harmful


def _is_worse(result: Result, baseline: Result, name: str) -> bool:
    if name not in result.metrics or name not in baseline.metrics:
        return False
    (low, high), (baseline_low, baseline_high) = result.interval(name), baseline.interval(name)
    return high < baseline_low if METRICS[name].better == "more" else low > baseline_high


def pareto_front(results: Sequence[Result]) -> list[Result]:
    """Results that no other dominates in accuracy (if measured), Frechet distance and cost.

    The cheapest comes first. Results with the same number of network evaluations have the median
    of their seconds as cost, so that noise of the clock has no effect.
    """
    seconds = defaultdict(list)
    for result in results:
        seconds[result.evaluations].append(result.seconds)

    def losses(result: Result) -> tuple[float, float, float]:
        return median(seconds[result.evaluations]), result.value(FRECHET), -_accuracy(result)

    scored = [(losses(result), result) for result in results]
    front = []
    for loss, result in scored:
        dominated = any(
            other != loss and all(a <= b for a, b in zip(other, loss, strict=True))
            for other, _ in scored
        )
        if not dominated:
            front.append((loss, result))
    return [result for _, result in sorted(front, key=lambda pair: pair[0][:2])]


def _accuracy(result: Result) -> float:
    return result.value(ACCURACY) if ACCURACY in result.metrics else 0.0


def _default_scale_warnings(
    results: Sequence[Result],
    harmful: Mapping[SweepSetting, tuple[str, ...]],
    default_scale: float | None,
) -> Iterator[str]:
    worse = [setting for setting in harmful if setting.guidance_scale == default_scale]
    if worse:
        count = len(at_scale(results, default_scale))
        where = "" if count == 1 else f" in {len(worse)} of {count} settings"
        yield (
            f"guidance at the model's default scale, {format_number(default_scale)}, is worse than "
            f"no guidance{where}; {worse[0].curve}: {' and '.join(harmful[worse[0]])}."
        )


def _curve_warnings(
    results: Sequence[Result], harmful: Mapping[SweepSetting, tuple[str, ...]]
) -> Iterator[str]:
    """One warning for the curves that differ only in steps and are worse at the same scales."""
    groups: dict[tuple[str, str, tuple[float, ...]], list[Curve]] = defaultdict(list)
    for curve, worse in _scales_by_curve(harmful).items():
        groups[curve.scheduler, curve.variant, worse].append(curve)
    for (scheduler, variant, worse), curves in groups.items():
        group_name, steps_of_example = curves[0], ""
        if len(curves) > 1:
            *steps, last = (str(curve.steps) for curve in curves)
            group_name = Curve(scheduler, f"{', '.join(steps)} and {last}", variant)
            steps_of_example = f"with {curves[0].steps} steps "
        measured = {r.setting.guidance_scale for r in results if r.setting.curve in curves} - {0.0}
        where = "every scale" if len(worse) == len(measured) > 1 else _scales_text(worse)
        example = next(
            setting
            for setting in harmful
            if setting.curve == curves[0] and setting.guidance_scale == worse[-1]
        )
        yield (
            f"{group_name}: guidance at {where} is worse than no guidance; at "
            f"{format_number(worse[-1])} {steps_of_example}{' and '.join(harmful[example])}."
        )


def _best_findings(results: Sequence[Result], best: Result, most_accurate: Result) -> Iterator[str]:
    title, setting = best.title(FRECHET), best.setting
    yield (
        f"The best scale by {title} is {format_number(setting.guidance_scale)} ({setting.curve}): "
        f"{_describe(best)}."
    )
    if setting.guidance_scale == 0 and len(results) > 1:
        yield (
            "Images without guidance are closest to the real images; guidance can improve other "
            f"metrics, but its {title} is higher."
        )
    if most_accurate is not best:
        setting = most_accurate.setting
        yield (
            f"Of the settings whose {title} is within the interval of the best, the most accurate "
            f"is scale {format_number(setting.guidance_scale)} ({setting.curve}): "
            f"{_describe(most_accurate)}."
        )


def _default_scale_findings(
    results: Sequence[Result], harmful: Iterable[SweepSetting], default_scale: float | None
) -> Iterator[str]:
    if not default_scale:
        return
    scale = format_number(default_scale)
    if not at_scale(results, default_scale):
        yield f"The model's default scale, {scale}, was not measured."
    elif not any(setting.guidance_scale == default_scale for setting in harmful):
        yield f"The model's default scale, {scale}, is never worse than no guidance."


def _front_finding(results: Sequence[Result], front: Sequence[Result]) -> str:
    scales = _scales_by_curve(result.setting for result in front)
    parts = [f"{curve} at {_scales_text(values)}" for curve, values in scales.items()]
    listed = parts[:MAX_CURVES] + (["and more"] if len(parts) > MAX_CURVES else [])
    accuracy = "accuracy, " if any(ACCURACY in result.metrics for result in front) else ""
    return (
        f"{len(front)} of {len(results)} settings are Pareto-optimal: no other is at least as good "
        f"in {accuracy}{front[0].title(FRECHET)} and seconds per image and better in one of them. "
        f"Cheapest first: {'; '.join(listed)}."
    )


def at_scale(results: Sequence[Result], scale: float | None) -> list[Result]:
    """The results at a guidance scale."""
    return [result for result in results if result.setting.guidance_scale == scale]


def _scales_by_curve(settings: Iterable[SweepSetting]) -> dict[Curve, tuple[float, ...]]:
    scales: dict[Curve, list[float]] = defaultdict(list)
    for setting in settings:
        scales[setting.curve].append(setting.guidance_scale)
    return {curve: tuple(sorted(values)) for curve, values in scales.items()}


def _scales_text(scales: Sequence[float]) -> str:
    return f"scale{'s' if len(scales) > 1 else ''} {format_scales(scales)}"


def _describe(result: Result) -> str:
    parts = [f"{result.title(FRECHET)} {result.full_text(FRECHET)}"]
    if ACCURACY in result.metrics:
        parts.append(f"{METRICS[ACCURACY].title} {result.full_text(ACCURACY)}")
    if "recall" in result.metrics:
        parts.append(f"recall {result.text('recall')}")
    parts.append(f"{result.seconds:.2g} {result.cost['clock']} seconds per image")
    return ", ".join(parts)

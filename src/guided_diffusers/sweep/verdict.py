"""What a sweep comes to, in words: the best scale, what is worth its cost, and where guidance does harm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from .figures import METRICS, Result
from .points import Line, Point, line_name, number, scales_name

CRITERION, ACCURACY = "frechet_distance", "top_1"


@dataclass(frozen=True)
class Verdict:
    """How the points compare.

    Attributes:
        best: the one with the lowest Frechet distance.
        sharpest: the most accurate one of those whose Frechet distance is within the interval of the best's.
        front: those than which no other is better in one of accuracy, Frechet distance and seconds an image, and not
            worse in the others; cheapest first.
        harmful: those that are worse than the same without guidance, with the reasons.
        warnings: of these, in sentences, first of the model's own scale.
        words: the rest, in sentences.
    """

    best: Point
    sharpest: Point
    front: tuple[Point, ...]
    harmful: Mapping[Point, tuple[str, ...]]
    warnings: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*self.words, *(f"Warning: {one}" for one in self.warnings)])


def verdict_of(results: Sequence[Result], own_scale: float | None = None) -> Verdict:
    """Compare measured points.

    Args:
        own_scale: the scale that the model guides with when it isn't told another.

    Raises:
        ValueError: if there are none.
    """
    if not results:
        raise ValueError("no point is measured")
    best = min(results, key=lambda one: one.value(CRITERION))
    sharpest = max(
        (one for one in results if one.value(CRITERION) <= best.ends(CRITERION)[1]), key=_accuracy
    )
    front, harmful = pareto_front(results), harm(results)
    return Verdict(
        best.point,
        sharpest.point,
        tuple(one.point for one in front),
        harmful,
        tuple(_warnings(results, harmful, own_scale)),
        tuple(_words(results, best, sharpest, front, harmful, own_scale)),
    )


def harm(results: Sequence[Result]) -> dict[Point, tuple[str, ...]]:
    """The points that are worse than none, with the reasons.

    Worse is an interval that lies wholly beyond that of the same scheduler and steps without guidance: of the Frechet
    distance above it, of the accuracy below.
    """
    measured, found = {one.point: one for one in results}, {}
    for one in results:
        none = measured.get(one.point.unguided)
        if none is None or one is none:
            continue
        names = [
            name for name in (CRITERION, ACCURACY) if name in one.figures and name in none.figures
        ]
        reasons = tuple(
            f"{one.title(name)} {one.shown(name, True)} against {none.shown(name, True)}"
            for name in names
            if (
                one.ends(name)[1] < none.ends(name)[0]
                if METRICS[name].better == "more"
                else one.ends(name)[0] > none.ends(name)[1]
            )
        )
        if reasons:
            found[one.point] = reasons
    return found


def pareto_front(results: Sequence[Result]) -> list[Result]:
    """Those that no other dominates in accuracy (where it is known), Frechet distance and cost; cheapest first.

    The clock isn't exact: points with equally many evaluations of the networks cost the median of their seconds.
    """
    groups = defaultdict(list)
    for one in results:
        groups[_evaluations(one)].append(one.cost["seconds"])
    seconds = {group: median(values) for group, values in groups.items()}
    losses = [
        (-_accuracy(one), one.value(CRITERION), seconds[_evaluations(one)]) for one in results
    ]
    front = [
        (loss[2], loss[1], i)
        for i, loss in enumerate(losses)
        if not any(
            other != loss and all(a <= b for a, b in zip(other, loss, strict=True))
            for other in losses
        )
    ]
    return [results[i] for _, _, i in sorted(front)]


def _evaluations(result: Result) -> tuple[float, float]:
    return result.cost["network_evaluations"], result.cost["classifier_evaluations"]


def _accuracy(result: Result) -> float:
    return result.value(ACCURACY) if ACCURACY in result.figures else 0.0


def _warnings(
    results: Sequence[Result], harmful: Mapping[Point, tuple[str, ...]], own_scale: float | None
) -> Iterable[str]:
    """Of the model's own scale; then of each scheduler, those together that say the same of the same scales."""
    own = [point for point in harmful if point.guidance_scale == own_scale]
    if own:
        everywhere = sum(one.point.guidance_scale == own_scale for one in results)
        where = "" if everywhere == 1 else f" in {len(own)} of {everywhere} settings"
        yield (
            f"guidance at the model's own scale, {number(own_scale)}, is worse than none{where}; "
            f"{line_name(own[0].line)}: {' and '.join(harmful[own[0]])}."
        )
    alike: dict[tuple[str, str, tuple[float, ...]], list[Line]] = defaultdict(list)
    for (scheduler, steps, guided), worse in _by_line(harmful).items():
        alike[scheduler, guided, worse].append((scheduler, steps, guided))
    for (scheduler, guided, worse), lines in alike.items():
        steps = listed([str(count) for _, count, _ in lines])
        measured = {one.point.guidance_scale for one in results if one.point.line in lines} - {0.0}
        said = "every scale" if len(worse) == len(measured) > 1 else _at(worse)
        example = next(
            point
            for point in harmful
            if point.line == lines[0] and point.guidance_scale == worse[-1]
        )
        yield (
            f"{line_name((scheduler, steps, guided))}: guidance at {said} is worse than none; at "
            f"{number(worse[-1])} {'with ' + str(lines[0][1]) + ' steps ' if len(lines) > 1 else ''}"
            f"{' and '.join(harmful[example])}."
        )


def _by_line(some: Iterable[Point]) -> dict[Line, tuple[float, ...]]:
    """{what points have in common: their scales, in order}."""
    found: dict[Line, list[float]] = defaultdict(list)
    for point in some:
        found[point.line].append(point.guidance_scale)
    return {line: tuple(sorted(scales)) for line, scales in found.items()}


def _words(
    results: Sequence[Result],
    best: Result,
    sharpest: Result,
    front: Sequence[Result],
    harmful: Mapping[Point, tuple[str, ...]],
    own_scale: float | None,
) -> Iterable[str]:
    title = best.title(CRITERION)
    yield (
        f"The best scale by {title} is {number(best.point.guidance_scale)} ({line_name(best.point.line)}): "
        f"{_described(best)}."
    )
    if best.point.guidance_scale == 0 and len(results) > 1:
        yield f"So images without guidance are nearest to the real ones; what guidance gains, it pays for in {title}."
    if sharpest is not best:
        yield (
            f"Of the points whose {title} is within the interval of the best's, the most accurate is scale "
            f"{number(sharpest.point.guidance_scale)} ({line_name(sharpest.point.line)}): {_described(sharpest)}."
        )
    own = [one for one in results if one.point.guidance_scale == own_scale]
    if own_scale and not own:
        yield f"The model's own scale, {number(own_scale)}, was not measured."
    elif own_scale and not any(one.point in harmful for one in own):
        yield f"The model's own scale, {number(own_scale)}, is nowhere worse than none."
    lines = [
        f"{line_name(line)} at {_at(scales)}"
        for line, scales in _by_line(one.point for one in front).items()
    ]
    accuracy = "accuracy, " if ACCURACY in best.figures else ""
    yield (
        f"{len(front)} of {len(results)} points are worth their cost: no other is as good in {accuracy}{title} and "
        f"seconds an image, and better in one. From the cheapest to the dearest: {'; '.join(lines[:8])}"
        f"{'; and more' if len(lines) > 8 else ''}."
    )


def _at(scales: Sequence[float]) -> str:
    return f"scale{'s' * (len(scales) > 1)} {scales_name(scales)}"


def _described(result: Result) -> str:
    parts = [f"{result.title(CRITERION)} {result.shown(CRITERION, True)}"]
    parts += [f"judge agrees {result.shown(ACCURACY, True)}"] if ACCURACY in result.figures else []
    parts += [f"recall {result.shown('recall')}"] if "recall" in result.figures else []
    return ", ".join(
        [*parts, f"{result.cost['seconds']:.2g} {result.cost['clock']} seconds an image"]
    )


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

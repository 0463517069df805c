"""The settings that a sweep measures: scheduler, steps, scale, and when and how guidance acts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

from ..defaults import ALGORITHMS


class Curve(NamedTuple):
    """What settings that differ only in their guidance scale have in common.

    Attributes:
        steps: number of steps; text where a sentence names several.
        variant: `SweepSetting.variant`.
    """

    scheduler: str
    steps: int | str
    variant: str

    def __str__(self) -> str:
        plural = "" if self.steps == 1 else "s"
        variant = f", guided {self.variant}" if self.variant else ""
        return f"{self.scheduler}, {self.steps} step{plural}{variant}"

    @property
    def name(self) -> str:
        """The curve as part of a file name."""
        return _join_words(f"{self.scheduler}-{self.steps}-steps", self.variant)


@dataclass(frozen=True)
class SweepSetting:
    """One combination of sampling arguments.

    Attributes:
        scheduler: name as of `scheduler_name`.
        guidance_start, guidance_stop: part of the run that is guided; the defaults guide all of
            it, also where the pipeline's own differ.
        guidance_algorithm, guidance_every, guidance_tolerance: None: the pipeline's defaults.
        guidance_schedule: its knots (sigma / alpha, scale). None: the pipeline's default.

    With `guidance_scale=0` these have no effect and keep their default values.
    """

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    guidance_algorithm: str | None = None
    guidance_every: int | None = None
    guidance_tolerance: float | None = None
    guidance_schedule: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        if self.guidance_schedule is not None:  # lists, from JSON
            knots = tuple((float(sigma), float(scale)) for sigma, scale in self.guidance_schedule)
            object.__setattr__(self, "guidance_schedule", knots)

    @property
    def name(self) -> str:
        """Name of the setting's files, without suffix."""
        stem = f"{self.scheduler}-{self.num_inference_steps}-steps-scale-{self.scale_text}"
        return _join_words(stem, self.variant)

    @property
    def variant(self) -> str:
        """When and how guidance acts, such as "from 0.2 to 1, strang"; "" for the defaults."""
        parts = []
        if (self.guidance_start, self.guidance_stop) != (0, 1):
            parts.append(f"from {self.guidance_start:.12g} to {self.guidance_stop:.12g}")
        if self.guidance_algorithm is not None:
            parts.append(self.guidance_algorithm)
        if self.guidance_every is not None:
            parts.append(f"every {self.guidance_every}")
        if self.guidance_tolerance is not None:
            parts.append(f"tolerance {self.guidance_tolerance:.12g}")
        if self.guidance_schedule is not None:
            digest = hashlib.sha256(repr(self.guidance_schedule).encode()).hexdigest()
            parts.append(f"by schedule {digest[:6]}")
        return ", ".join(parts)

    @property
    def scale_text(self) -> str:
        return f"{self.guidance_scale:.12g}"

    @property
    def curve(self) -> Curve:
        return Curve(self.scheduler, self.num_inference_steps, self.variant)

    @property
    def unguided(self) -> SweepSetting:
        """The baseline: same scheduler and steps, no guidance."""
        return SweepSetting(self.scheduler, self.num_inference_steps, 0.0)

    def at_scale(self, scale: float | None) -> bool:
        """Whether it has this scale at all noise levels."""
        return self.guidance_scale == scale and self.guidance_schedule is None

    @property
    def call_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call."""
        items = asdict(self).items()
        call = {name: value for name, value in items if name != "scheduler" and value is not None}
        if self.guidance_schedule is not None:
            sigmas, scales = map(list, zip(*self.guidance_schedule, strict=True))
            call["guidance_schedule"] = {"sigmas": sigmas, "scales": scales}
        return call

    def __str__(self) -> str:
        return f"{self.curve}, scale {self.scale_text}"


def _join_words(stem: str, variant: str) -> str:
    return "-".join([stem, *variant.replace(",", "").split()])


def format_scales(scales: Iterable[float]) -> str:
    return ", ".join(f"{scale:.12g}" for scale in scales)


def sweep_grid(
    scales: Iterable[float],
    schedulers: Iterable[str],
    steps: Iterable[int],
    intervals: Iterable[tuple[float, float]] = ((0.0, 1.0),),
    algorithms: Iterable[str | None] = (None,),
    every: Iterable[int] = (),
    tolerances: Iterable[float] = (),
) -> list[SweepSetting]:
    """Every combination once, few steps first, each preceded by its unguided baseline.

    `every` and `tolerances` are alternatives and are not combined with each other.

    Raises:
        ValueError: for a value that the pipeline does not accept, or an empty list of schedulers,
            steps, intervals or algorithms.
    """
    scales, schedulers, steps, intervals, algorithms, every, tolerances = (
        list(dict.fromkeys(values))
        for values in (scales, schedulers, steps, intervals, algorithms, every, tolerances)
    )
    for name, values, is_allowed, allowed in (
        ("scales", scales, math.isfinite, "finite numbers; 0 is off"),
        ("steps", steps, _is_positive_integer, "integers from 1"),
        ("every", every, _is_positive_integer, "integers from 1"),
        ("tolerances", tolerances, lambda t: 0 < t < math.inf, "positive numbers"),
        ("algorithms", algorithms, lambda a: a in (None, *ALGORITHMS), ", ".join(ALGORITHMS)),
        ("intervals", intervals, lambda i: 0 <= i[0] < i[1] <= 1, "0 <= start < stop <= 1"),
    ):
        for value in values:
            if not is_allowed(value):
                text = "{:g}:{:g}".format(*value) if name == "intervals" else value
                raise ValueError(f"{name}: {text} is not allowed; use {allowed}")
    if not (schedulers and steps and intervals and algorithms):
        raise ValueError(
            f"schedulers={schedulers}, steps={steps}, intervals={intervals}, "
            f"algorithms={algorithms}: at least one value of each is needed"
        )
    reuse: list[dict[str, Any]] = [{"guidance_every": int(k)} for k in every]
    reuse += [{"guidance_tolerance": float(tolerance)} for tolerance in tolerances]
    guided_scales = [float(scale) for scale in sorted(scales) if scale != 0]
    guided = list(product(intervals, algorithms, reuse or [{}], guided_scales))
    settings = []
    for count, scheduler in product(sorted(steps), schedulers):
        settings.append(SweepSetting(scheduler, int(count), 0.0))
        for interval, algorithm, options, scale in guided:
            values = (scale, *map(float, interval), algorithm)
            settings.append(SweepSetting(scheduler, int(count), *values, **options))
    return settings


def _is_positive_integer(value: float) -> bool:
    return value >= 1 and value == int(value)

"""What a sweep measures, and where: one JSON a point, whole or absent, made by one process at a time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers.utils.logging import get_logger
from filelock import FileLock, Timeout

from ..pipeline import ALGORITHMS
from ..sampling.manifest import differences
from ..utils import finite, write_json
from .figures import Result

logger = get_logger(__name__)
Line = tuple[str, int, str]  # a scheduler, a number of steps, when and how guidance acts
ELSEWHERE = {
    "model",
    "reference.name",
}  # settings whose names may differ: their digests are beside them


@dataclass(frozen=True)
class Point:
    """How images are sampled, in the words of the pipeline's call.

    Attributes:
        scheduler: as `schedulers` calls it.
        guidance_start, guidance_stop: by default the whole run, whatever the pipeline's own are.
        guidance_algorithm, guidance_every, guidance_tolerance: None: the pipeline's own. All of these are as they are
            by default where `guidance_scale` is 0, since they have no effect there.
    """

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    guidance_algorithm: str | None = None
    guidance_every: int | None = None
    guidance_tolerance: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return (
            f"{self.scheduler}-{self.num_inference_steps}-steps-scale-{number(self.guidance_scale)}"
            + ("-" + self.guided.replace(", ", "-").replace(" ", "-") if self.guided else "")
        )

    @property
    def guided(self) -> str:
        """When and how guidance acts; "" for the whole run, asked and entering the step as the pipeline's own are."""
        start, stop = self.guidance_start, self.guidance_stop
        return ", ".join(
            [f"from {number(start)} to {number(stop)}"] * ((start, stop) != (0, 1))
            + ([self.guidance_algorithm] if self.guidance_algorithm is not None else [])
            + ([f"every {self.guidance_every}"] if self.guidance_every is not None else [])
            + (
                [f"tolerance {number(self.guidance_tolerance)}"]
                if self.guidance_tolerance is not None
                else []
            )
        )

    @property
    def line(self) -> Line:
        """What it has in common with the points that differ in the scale alone."""
        return self.scheduler, self.num_inference_steps, self.guided

    @property
    def unguided(self) -> Point:
        """The same without guidance."""
        return Point(self.scheduler, self.num_inference_steps, 0.0)

    @property
    def call(self) -> dict[str, Any]:
        """Its arguments of the pipeline's call."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name != "scheduler" and value is not None
        }

    def __str__(self) -> str:
        return f"{line_name(self.line)}, scale {number(self.guidance_scale)}"


def number(value: float) -> str:
    return f"{value:.12g}"


def scales_name(scales: Iterable[float]) -> str:
    return ", ".join(map(number, scales))


def line_name(line: tuple[str, int | str, str]) -> str:
    scheduler, steps, guided = line
    return f"{scheduler}, {steps} step{'s' * (steps != 1)}" + (
        f", guided {guided}" if guided else ""
    )


def points(
    scales: Iterable[float],
    schedulers: Iterable[str],
    steps: Iterable[int],
    intervals: Iterable[tuple[float, float]] = ((0.0, 1.0),),
    algorithms: Iterable[str | None] = (None,),
    every: Iterable[int] = (),
    tolerances: Iterable[float] = (),
) -> list[Point]:
    """Every combination once, the cheapest first; scale 0, which all others are compared with, is always among them.
    `every` and `tolerances` aren't combined with each other.

    Raises:
        ValueError: for a scale below 0, less than one step, an interval that isn't 0 <= start < stop <= 1, or an
            algorithm, a number of steps between questions or a tolerance that the pipeline doesn't take.
    """
    scales, schedulers, steps, intervals, algorithms, every, tolerances = (
        list(dict.fromkeys(one))
        for one in (scales, schedulers, steps, intervals, algorithms, every, tolerances)
    )
    for scale in scales:
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scales: {scale} isn't allowed; 0 (off) and more are")
    for count in steps:
        if count != int(count) or count < 1:
            raise ValueError(f"steps: {count} isn't allowed; whole numbers from 1 on are")
    for start, stop in intervals:
        if not 0 <= start < stop <= 1:
            raise ValueError(
                f"intervals: {start:g}:{stop:g} isn't allowed; 0 <= start < stop <= 1 is"
            )
    for k in every:
        if k != int(k) or k < 1:
            raise ValueError(f"every: {k} isn't allowed; whole numbers from 1 on are")
    for most in tolerances:
        if not 0 < most < math.inf:
            raise ValueError(f"tolerances: {most} isn't allowed; positive numbers are")
    if unknown := set(algorithms) - {None, *ALGORITHMS}:
        raise ValueError(
            f"algorithms: {sorted(unknown)} are unknown; {', '.join(ALGORITHMS)} are allowed"
        )
    if not (schedulers and steps and intervals and algorithms):
        raise ValueError(
            f"schedulers={schedulers}, steps={steps}, intervals={intervals}, algorithms={algorithms}: one "
            "of each is needed"
        )
    asked = [*((int(k), None) for k in every), *((None, float(most)) for most in tolerances)] or [
        (None, None)
    ]
    guided = [scale for scale in sorted(scales) if scale > 0]
    return [
        point
        for count in sorted(steps)
        for scheduler in schedulers
        for point in [
            Point(scheduler, int(count), 0.0),
            *(
                Point(
                    scheduler,
                    int(count),
                    float(scale),
                    float(start),
                    float(stop),
                    algorithm,
                    k,
                    most,
                )
                for start, stop in intervals
                for algorithm in algorithms
                for k, most in asked
                for scale in guided
            ),
        ]
    ]


class Store:
    """The measured points of a folder, `points/NAME.json` with `points/NAME.png`.

    Args:
        settings: what, beside the point, its figures depend on; as JSON.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        self.folder, self.settings = (
            Path(folder) / "points",
            json.loads(json.dumps(finite(settings))),
        )
        self._broken: set[Path] = set()

    def path(self, point: Point) -> Path:
        return self.folder / f"{point.name}.json"

    def read(self, path: Path) -> Result | None:
        """A point's figures; None where there are none, or only a part of them, which is said.

        Raises:
            ValueError: if they were measured with other settings.
        """
        try:
            record = json.loads(path.read_text())
            found = Result.from_json(Point(**record["point"]), record)
            settings = record["settings"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if path not in self._broken:
                logger.warning(
                    f"{path} can't be read ({type(error).__name__}: {error}); the point is measured again"
                )
            self._broken.add(path)
            return None
        if other := [
            f"{name} was {was}, is {now}"
            for name, was, now in differences(settings, self.settings)
            if name not in ELSEWHERE
        ]:
            raise ValueError(
                f"{path} was measured with other settings ({'; '.join(other)}), and points of one folder "
                "are compared: use the same settings, or another folder"
            )
        return found

    def all(self) -> list[Result]:
        """Every point of the folder, also those of other sweeps with these settings."""
        return [
            found for path in sorted(self.folder.glob("[!.]*.json")) if (found := self.read(path))
        ]

    def write(self, result: Result) -> None:
        """Whole, or not at all."""
        write_json(
            {"point": asdict(result.point), "settings": self.settings, **result.to_json()},
            self.path(result.point),
        )

    @contextmanager
    def claimed(self, point: Point) -> Iterator[bool]:
        """Whether the point is this process's within; the operating system frees it if the process is killed."""
        folder = self.folder.parent / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{point.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def fill(
        self, wanted: Sequence[Point], measure: Callable[[Point], Result], wait: float = 2.0
    ) -> int:
        """Measure the points that nobody has measured, and wait for those that other processes are at.

        Args:
            wait: seconds between looks at what others do.

        Returns:
            How many points this process measured.
        """
        left, mine = list(wanted), 0
        while left:
            busy = []
            for point in left:
                if self.read(self.path(point)) is None:
                    with self.claimed(point) as claimed:
                        if not claimed:
                            busy.append(point)
                            continue
                        if self.read(self.path(point)) is None:  # nobody was faster
                            self.write(measure(point))
                            mine += 1
            if len(busy) == len(left):
                time.sleep(wait)
            left = busy
        return mine

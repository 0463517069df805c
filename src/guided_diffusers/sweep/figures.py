"""The figures of a point: values with their intervals, costs, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .points import Point

PICTURES = 10  # images of a point that are kept


class Metric(NamedTuple):
    """How a figure is called, what is better ("more", "less", or "real": near the real images'), and its format."""

    title: str
    better: str
    form: str = ".3f"

    def shown(self, value: float) -> str:
        return format(value, self.form)


METRICS = {
    "top_1": Metric("judge agrees", "more", ".1%"),
    "frechet_distance": Metric("Frechet distance", "less", ".3g"),
    "kernel_distance": Metric("kernel distance", "less", ".3g"),
    "precision": Metric("precision", "more"),
    "recall": Metric("recall", "more"),
    "density": Metric("density", "more"),
    "coverage": Metric("coverage", "more"),
    "relative_diversity": Metric("diversity in a class", "real"),
    "class_score": Metric("class score", "more", ".3g"),
}


@dataclass(frozen=True)
class Result:
    """What was measured of a point.

    Attributes:
        figures: as of `evaluation.compare`: {name: {"value", "interval" or None, "real", "name", ...}}.
        cost: an image's: `network_evaluations` and `classifier_evaluations`, rows of their forward passes; `seconds`,
            of the `clock` "CPU" or "wall"; and what they depend on: `device`, `threads`, `batch_size`, `versions`.
        pictures: the file, beside the JSON, of the first images in a row.
        per_class: a row a label, as of `evaluation.Evaluation`.
    """

    point: Point
    figures: Mapping[str, Mapping[str, Any]]
    cost: Mapping[str, Any]
    pictures: str | None = None
    per_class: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "point"}

    @classmethod
    def from_json(cls, point: Point, content: Mapping[str, Any]) -> Result:
        """Raises:
        KeyError, TypeError: for a part that is missing, or no number.
        """
        found = cls(
            point,
            content["figures"],
            content["cost"],
            content["pictures"],
            tuple(content["per_class"]),
        )
        numbers = [
            found.value("frechet_distance"),
            *(
                found.cost[name]
                for name in ("network_evaluations", "classifier_evaluations", "seconds")
            ),
        ]
        if not all(isinstance(one, (int, float)) for one in numbers):
            raise TypeError("a figure is no number")
        return found

    def value(self, name: str) -> float:
        return self.figures[name]["value"]

    def ends(self, name: str) -> tuple[float, float]:
        """Of a figure's interval; both the value where none was measured."""
        low, high = self.figures[name]["interval"] or (self.value(name),) * 2
        return low, high

    def title(self, name: str) -> str:
        """What a figure is called: the published name, where the features are those of the published figure."""
        return self.figures.get(name, {}).get("name") or METRICS[name].title

    def shown(self, name: str, interval: bool = False) -> str:
        """A figure as text, and its interval in brackets; "" where it wasn't measured."""
        if name not in self.figures:
            return ""
        metric, (low, high) = METRICS[name], self.ends(name)
        ends = f" ({metric.shown(low)} to {metric.shown(high)})" if interval and low < high else ""
        return metric.shown(self.value(name)) + ends

"""The measured metrics and costs of one setting, and how they are displayed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .settings import Curve, SweepSetting

FRECHET, ACCURACY = "frechet_distance", "top_1"
PICTURES = 10  # images of each setting that are kept


class Metric(NamedTuple):
    """How a metric is displayed.

    Attributes:
        better: "real": values close to the real images' are better.
        format: format specification of its values.
    """

    title: str
    better: Literal["more", "less", "real"]
    format: str = ".3f"

    def text(self, value: float) -> str:
        return format(value, self.format)


METRICS = {  # explained in templates/glossary.html.j2
    ACCURACY: Metric("judge accuracy", "more", ".1%"),
    FRECHET: Metric("Frechet distance", "less", ".3g"),
    "kernel_distance": Metric("kernel distance", "less", ".3g"),
    "sliced_wasserstein": Metric("sliced Wasserstein distance", "less", ".3g"),
    "precision": Metric("precision", "more"),
    "recall": Metric("recall", "more"),
    "density": Metric("density", "more"),
    "coverage": Metric("coverage", "more"),
    "relative_diversity": Metric("within-class diversity", "real"),
    "class_score": Metric("class score", "more", ".3g"),
}


@dataclass(frozen=True)
class Result:
    """What was measured for one setting.

    Attributes:
        metrics: as of `evaluation.compare`: {name: {"value", "interval" or None, "real", ...}}.
        cost: per image: `network_evaluations` and `classifier_evaluations`, images in their
            forward passes; `seconds` of the `clock` "CPU" or "wall"; and what these depend on:
            `device`, `threads`, `batch_size`, `versions`.
        pictures: file name, beside the JSON, of the first images in a row.
        per_class: one row per label, as of `evaluation.Evaluation`.
    """

    setting: SweepSetting
    metrics: Mapping[str, Mapping[str, Any]]
    cost: Mapping[str, Any]
    pictures: str | None = None
    per_class: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything except the setting."""
        names = ("cost", "pictures", "per_class")
        return {"figures": self.metrics} | {name: getattr(self, name) for name in names}

    @classmethod
    def from_json(cls, setting: SweepSetting, content: Mapping[str, Any]) -> Result:
        """The result that `to_json` wrote.

        Raises:
            KeyError, TypeError: for a missing part, or a metric or cost that is not a number.
        """
        per_class = tuple(content["per_class"])
        metrics = {}
        for name, metric in content["figures"].items():
            if metric["value"] is not None:  # it was NaN: not measured, as for one image a class
                is_known = metric["interval"] and None not in metric["interval"]
                metrics[name] = {**metric, "interval": metric["interval"] if is_known else None}
        result = cls(setting, metrics, content["cost"], content["pictures"], per_class)
        for value in (result.value(FRECHET), *result.evaluations, result.seconds):
            if not isinstance(value, (int, float)):
                raise TypeError(f"{value!r} is not a number")
        return result

    def value(self, name: str) -> float:
        return self.metrics[name]["value"]

    def interval(self, name: str) -> tuple[float, float]:
        """Confidence interval of a metric; (value, value) where none was measured."""
        value = self.value(name)
        low, high = self.metrics[name]["interval"] or (value, value)
        return low, high

    def title(self, name: str) -> str:
        """Title of a metric; the published name, such as FID, where the features allow it."""
        return self.metrics.get(name, {}).get("name") or METRICS[name].title

    def text(self, name: str) -> str:
        """A metric's value as text; "" where it was not measured."""
        return METRICS[name].text(self.value(name)) if name in self.metrics else ""

    def interval_text(self, name: str) -> str:
        """A metric's interval as text, such as "0.9 to 1.1"; "" where there is none."""
        low, high = self.interval(name) if name in self.metrics else (0, 0)
        return f"{METRICS[name].text(low)} to {METRICS[name].text(high)}" if low < high else ""

    def full_text(self, name: str) -> str:
        """A metric's value with its interval in brackets."""
        interval = self.interval_text(name)
        return self.text(name) + (f" ({interval})" if interval else "")

    @property
    def evaluations(self) -> tuple[float, float]:
        """Evaluations of denoiser and classifier per image."""
        return self.cost["network_evaluations"], self.cost["classifier_evaluations"]

    @property
    def evaluations_text(self) -> str:
        return "{:.3g} + {:.3g}".format(*self.evaluations)

    @property
    def seconds(self) -> float:
        """Seconds per image."""
        return self.cost["seconds"]


def group_by_curve(results: Sequence[Result]) -> dict[Curve, list[Result]]:
    """{curve: its results, starting with the unguided baseline}; `results` are sorted by scale."""
    curves: dict[Curve, list[Result]] = defaultdict(list)
    for result in results:
        if result.setting.guidance_scale:
            curves[result.setting.curve].append(result)
    for baseline in results:
        if baseline.setting.guidance_scale == 0:
            unguided = baseline.setting.curve
            for curve in [c for c in curves if c[:2] == unguided[:2]] or [unguided]:
                curves[curve].insert(0, baseline)
    return dict(curves)

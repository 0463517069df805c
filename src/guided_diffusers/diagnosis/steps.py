"""Records what guidance does at each step of a sampling run.

    record = GuidanceDiagnostics("sneaker")
    pipeline("sneaker", guidance_scale=3.0, callback_on_step_end=record)
    record.save("steps.json")
    record.save("steps.png")

    record = GuidanceDiagnostics()                       # any pipeline, through `guide`
    term = ClassifierGuidance(classifier, "sneaker", scale=3.0)
    with guide(stable_diffusion, *record.watch(term)):
        stable_diffusion("a photo of a shoe")

The images don't change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from ..files import write_json
from ..guidance import ClassifierGuidance, Guidance, GuidanceSum, NoiseAwareGuidance, StepContext
from ..guider import Guider
from ..likelihood import Label
from ..noise import NoiseLevel
from ..utils import require_matplotlib
from .report import saved_axes

PLOTS = {
    "log_probability": "log p(label | x_t)",
    "guidance_to_score": "|guidance| / |score|",
    "cosine": "cosine to the step before",
    "outside": "x0 outside [-1, 1], share of values",
}
NOT_OF_PARTICLES = (
    "particles={}: GuidanceDiagnostics follows each image from step to step, and populations are "
    "resampled between them; record a call without particles"
)
FORMATS = (".json", ".png", ".pdf", ".svg")


class GuidanceDiagnostics(PipelineCallback):
    """Records metrics of guidance for each step and image, where x_t = alpha x0 + sigma eps:

        log_probability      log p(label | x_t) of the noise-aware classifier
        guidance_to_score    |g| / |s|, g the guidance added to the score s = (alpha x0 - x_t) / sigma^2
        cosine               <g, h> / (|g| |h|), h the guidance of the step before
        outside              share of values outside [-1, 1] in the guided x0 + sigma^2 / alpha g: how
                             much clipping would change; has no meaning for latents
        outside_unguided     the same of the x0 that the network predicts

    Without a label or a classifier the first is NaN; without guidance at this and the previous step
    the third is.

    Args:
        label: an id, a name or a mixture, or a list that the images take in turn, across calls.
        classifier: evaluates the label; it need not be the one that guides. None: the pipeline's.

    Attributes:
        images: number of images seen.

    Raises:
        ValueError: at the first step, for a label that the classifier doesn't have, or particles.
    """

    tensor_inputs = ["sample", "x0", "score_shift"]

    def __init__(
        self,
        label: Label | Sequence[Label] | None = None,
        classifier: torch.nn.Module | None = None,
    ):
        super().__init__()
        self.labels = list(label) if isinstance(label, (list, tuple)) else [label]
        if label is None:
            self.labels = []
        self.classifier, self.images = classifier, 0
        self._levels: list[NoiseLevel] = []  # of the pipeline's run
        self._label_term: NoiseAwareGuidance | None = None  # evaluates the labels of the run
        self._current: _Step | None = None
        self._previous: _Step | None = None  # of the same run
        # by step: index, timestep and sigma / alpha; the metrics of each run
        self._recorded: dict[int, tuple[dict[str, Any], list[dict[str, Tensor]]]] = {}

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Record a step of `ClassifierGuidedPipeline`.

        Raises:
            ValueError: for a call with particles.
        """
        if particles := getattr(pipeline, "particles", None):
            raise ValueError(NOT_OF_PARTICLES.format(particles))
        sample, x0, shift = (callback_kwargs[name] for name in self.tensor_inputs)
        if step_index == 0:
            self._levels = Guider(pipeline.scheduler, ()).levels
            classifier = pipeline.classifier if self.classifier is None else self.classifier
            self._label_term = None
            if self.labels and classifier is not None:
                labels = islice(cycle(self.labels), self.images, self.images + len(sample))
                self._label_term = ClassifierGuidance(classifier, list(labels))
        level = self._levels[step_index]
        self._start_step(_Step(step_index, float(timestep), level, sample, x0, shift))
        self._record_label(self._label_term)
        return {}

    def watch(self, *terms: Guidance) -> tuple[Guidance, ...]:
        """The terms, wrapped so that their steps are recorded, for pipelines without our callback.

        Their sum is g, and the first noise-aware term gives the log-probability. Steps at which no
        term is active aren't seen. Watched terms are evaluated at every step: a pipeline's
        `guidance_tolerance` has no effect on them.
        """
        return tuple(_WatchedTerm(term, self) for term in GuidanceSum(terms).terms())

    def record_term(self, term: Guidance, step: StepContext, score: Tensor) -> None:
        """Record what a watched term adds to the score at a step."""
        if self._current is None or self._current.sample is not step.sample:  # its first term
            fields = step.index, step.timestep, step.level, step.sample, step.x0
            self._start_step(_Step(*fields, score))
        else:
            self._current.shift = self._current.shift + score
        self._record_label(term)

    def _start_step(self, step: _Step) -> None:
        self._finish_step()
        if self._previous is None or step.index <= self._previous.index:  # another run
            self._previous, self.images = None, self.images + len(step.sample)
        self._current = step

    def _record_label(self, term: Guidance | None) -> None:
        current = self._current
        if current.log_p is None and isinstance(term, NoiseAwareGuidance):
            z, t, _ = term.network_input(current.sample, current.level)
            with torch.no_grad():
                current.log_p = term.log_probability(z, t)

    def _finish_step(self) -> None:
        step = self._current
        if step is not None:
            position = {"index": step.index, "timestep": step.timestep}
            position["sigma_over_alpha"] = step.level.sigma / step.level.alpha
            _, runs = self._recorded.setdefault(step.index, (position, []))
            runs.append(step.metrics(self._previous))
            self._previous, self._current = step, None

    def steps(self) -> list[dict[str, Any]]:
        """`index`, `timestep`, `sigma_over_alpha` and the metrics, (images,) float32, of each step.

        Raises:
            ValueError: if no step was recorded.
        """
        self._finish_step()
        if not self._recorded:
            raise ValueError(
                "guidance diagnostics: no step was seen; pass the record as "
                "callback_on_step_end, or guide with the terms that watch(...) returns"
            )
        steps = []
        for _, (position, runs) in sorted(self._recorded.items()):
            metrics = {name: torch.cat([run[name] for run in runs]).cpu() for name in runs[0]}
            steps.append({**position, **metrics})
        return steps

    def save(self, path: str | Path) -> None:
        """Write the metrics as JSON, or plot them (.png, .pdf, .svg) with the middle 80% of images.

        JSON has the mean over the images for which a metric is defined (null if there is none), and
        each image's log-probability as `log_probabilities`.

        Raises:
            ValueError: for another suffix, or if no step was recorded.
            ImportError: for a plot without matplotlib.
            OSError: if the file can't be written.
        """
        path = Path(path)
        check_output(path)
        steps = self.steps()
        if path.suffix.lower() != ".json":
            return _plot(steps, self.images, path)
        rows = []
        for step in steps:
            row: dict[str, Any] = {}
            for name, value in step.items():
                is_metric = isinstance(value, Tensor)
                row[name] = value.double().nanmean().item() if is_metric else value
            row["log_probabilities"] = step["log_probability"].tolist()
            rows.append(row)
        write_json({"images": self.images, "steps": rows}, path)


@dataclass
class _Step:
    """A step of a run; `shift` is the guidance, (B, C, H, W), None: there is none."""

    index: int
    timestep: float
    level: NoiseLevel
    sample: Tensor
    x0: Tensor
    shift: Tensor | None
    log_p: Tensor | None = None

    def metrics(self, previous: _Step | None) -> dict[str, Tensor]:
        """The metrics, each (B,); releases `sample` and `x0`."""
        undefined = self.sample.new_full((len(self.sample),), torch.nan)
        guided, ratio, cosine = self.x0, torch.zeros_like(undefined), undefined
        if self.shift is not None:
            guided = self.x0 + self.level.sigma**2 / self.level.alpha * self.shift
            ratio = _norm(self.shift) / _norm(self.level.score(self.sample, self.x0))
            if previous is not None and previous.shift is not None:
                product = self.shift.flatten(1).double() * previous.shift.flatten(1).double()
                norms = _norm(self.shift) * _norm(previous.shift)
                cosine = product.sum(1) / norms  # 0 / 0 is NaN
        metrics = {
            "log_probability": undefined if self.log_p is None else self.log_p,
            "guidance_to_score": ratio,
            "cosine": cosine,
            "outside": (guided.abs() > 1).flatten(1).double().mean(1),
            "outside_unguided": (self.x0.abs() > 1).flatten(1).double().mean(1),
        }
        self.sample = self.x0 = undefined  # the next step needs only the shift
        return {name: value.float() for name, value in metrics.items()}


class _WatchedTerm(Guidance):
    """A term that reports to a record. It isn't a `NoiseAwareGuidance`: no step is skipped."""

    def __init__(self, term: Guidance, record: GuidanceDiagnostics):
        super().__init__()
        self.term, self.record = term, record
        self.conditions, self.through_network = term.conditions, term.through_network

    def active(self, index: int, count: int, level: NoiseLevel) -> bool:
        return self.term.active(index, count, level)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return self.term.modules()

    def log_factor(self, step: StepContext) -> Tensor | None:
        return self.term.log_factor(step)

    def differs_within(self, particles: int) -> str | None:
        raise ValueError(NOT_OF_PARTICLES.format(particles))

    def score(self, step: StepContext) -> Tensor:
        score = self.term.score(step)
        self.record.record_term(self.term, step, score)
        return score


def _norm(value: Tensor) -> Tensor:
    # in float64: a saturated classifier's gradient is so small that its squares would underflow
    return torch.linalg.vector_norm(value.flatten(1).double(), dim=1)


def check_output(path: Path) -> None:
    """Raise ValueError for a suffix that `GuidanceDiagnostics.save` can't write, or ImportError."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"diagnostics {path}: a name that ends with {', '.join(FORMATS)} is allowed"
        )
    if path.suffix.lower() != ".json":
        require_matplotlib()


def _plot(steps: Sequence[dict[str, Any]], images: int, path: Path) -> None:
    title = f"guidance at each step: mean of {images} images, and the middle 80% of them"
    with saved_axes(path, len(PLOTS), title) as axes:
        for axis, (name, axis_title) in zip(axes, PLOTS.items(), strict=True):
            _plot_curve(axis, steps, name, "guided")
            if name == "outside":
                _plot_curve(axis, steps, "outside_unguided", "unguided")
                axis.legend(fontsize="small", frameon=False)
            axis.set_title(axis_title, fontsize="medium")
            axis.set_xlabel("step")


def _plot_curve(axis: Any, steps: Sequence[dict[str, Any]], name: str, label: str) -> None:
    """Mean over the images at each step, and their 10% and 90% quantiles as a band."""
    x, values = [step["index"] for step in steps], [step[name].double() for step in steps]
    means = [value.nanmean().item() for value in values]
    (line,) = axis.plot(x, means, marker="o", markersize=3, label=label)
    low, high = ([value.nanquantile(share).item() for value in values] for share in (0.1, 0.9))
    axis.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)

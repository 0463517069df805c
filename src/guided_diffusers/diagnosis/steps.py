"""What guidance did at each step of a run: how sure the classifier is, how strong guidance is, whether it turns.

    record = GuidanceDiagnostics("sneaker")
    pipeline("sneaker", guidance_scale=3.0, callback_on_step_end=record)
    record.save("steps.json")
    record.save("steps.png")

    record = GuidanceDiagnostics()                                             # of any pipeline, through `guide`
    with guide(stable_diffusion, *record.watch(ClassifierGuidance(classifier, "sneaker", scale=3.0))):
        stable_diffusion("a photo of a shoe")

It only looks on: the images are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback

from ..guidance import ClassifierGuidance, Guidance, GuidanceSum, NoiseAwareGuidance, StepContext
from ..guider import Guider
from ..likelihood import Label
from ..noise import NoiseLevel
from ..utils import aside, require_matplotlib, write_json

FIGURES = {
    "log_probability": "log p(label | x_t)",
    "guidance_to_score": "|guidance| / |score|",
    "cosine": "cosine to the step before",
    "outside": "x0 outside [-1, 1], share of values",
}
FORMATS = (".json", ".png", ".pdf", ".svg")


class GuidanceDiagnostics(PipelineCallback):
    """Records, for each step and image, of a pipeline's sample x_t = alpha x0 + sigma eps:

        log_probability      log p(label | x_t) of the noise-aware classifier
        guidance_to_score    |g| / |s|, g what guidance adds to the network's score s = (alpha x0 - x_t) / sigma^2
        cosine               <g, h> / (|g| |h|), h the guidance of the step before
        outside              the share of values beyond [-1, 1] of the x0 that guidance made, x0 + sigma^2 / alpha g:
                             what clipping would change; of latents it says nothing
        outside_unguided     the same of the x0 that the network predicted

    Without a label or a classifier the first is NaN, without guidance at a step and the one before the third.

    Args:
        label: an id, a name or a mixture, or a list that the images take in turn, those of further calls going on.
        classifier: that is asked for the label, such as one that doesn't guide. None: the pipeline's own.

    Raises:
        ValueError: for a label that the classifier doesn't have, at the first step.
    """

    tensor_inputs = ["sample", "x0", "score_shift"]

    def __init__(
        self,
        label: Label | Sequence[Label] | None = None,
        classifier: torch.nn.Module | None = None,
    ):
        super().__init__()
        self.labels = (
            [] if label is None else list(label) if isinstance(label, (list, tuple)) else [label]
        )
        self.classifier, self.images = classifier, 0
        self._levels: list[NoiseLevel] = []  # of the pipeline's run
        self._asked: NoiseAwareGuidance | None = None  # for the run's labels
        self._now: _Step | None = None
        self._before: _Step | None = None  # of the same run
        self._figures: dict[int, list[dict[str, torch.Tensor]]] = {}  # by step, a mapping a run
        self._places: dict[int, tuple[float, float]] = {}  # by step, timestep and sigma / alpha

    def callback_fn(
        self,
        pipeline: Any,
        step_index: int,
        timestep: Any,
        callback_kwargs: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Of `ClassifierGuidedPipeline`, after each step."""
        sample = callback_kwargs["sample"]
        if step_index == 0:
            self._levels = Guider(pipeline.scheduler, ()).levels
            asked = pipeline.classifier if self.classifier is None else self.classifier
            labels = [
                self.labels[(self.images + i) % len(self.labels)]
                for i in range(len(sample))
                if self.labels
            ]
            self._asked = (
                ClassifierGuidance(asked, labels) if labels and asked is not None else None
            )
        self._go_on(
            _Step(
                step_index,
                float(timestep),
                self._levels[step_index],
                sample,
                callback_kwargs["x0"],
                callback_kwargs["score_shift"],
            ),
            self._asked,
        )
        return {}

    def watch(self, *terms: Guidance) -> tuple[Guidance, ...]:
        """The terms, each of which tells of its steps, for a pipeline without a callback of ours.

        Their sum is g. The log-probability is what the first noise-aware term says. Steps at which no term acts aren't
        seen. A pipeline's `guidance_tolerance` can't spare them: they are asked at each step.
        """
        return tuple(_Watched(term, self) for term in GuidanceSum(terms).terms())

    def saw(self, term: Guidance, step: StepContext, score: torch.Tensor) -> None:
        """What a watched term adds at a step."""
        if self._now is None or self._now.sample is not step.sample:  # the first term at this step
            self._go_on(
                _Step(step.index, step.timestep, step.level, step.sample, step.x0, score),
                term if isinstance(term, NoiseAwareGuidance) else None,
            )
            return
        self._now.shift = self._now.shift + score
        if self._now.log_p is None and isinstance(term, NoiseAwareGuidance):
            self._now.log_p = _log_probability(term, step.sample, step.level)

    def _go_on(self, step: _Step, asked: NoiseAwareGuidance | None) -> None:
        self._finish_step()
        if self._before is None or step.index <= self._before.index:  # another run
            self._before, self.images = None, self.images + len(step.sample)
        if asked is not None:
            step.log_p = _log_probability(asked, step.sample, step.level)
        self._now = step

    def _finish_step(self) -> None:
        if self._now is not None:
            now, level = self._now, self._now.level
            self._figures.setdefault(now.index, []).append(now.figures(self._before))
            self._places[now.index] = now.timestep, level.sigma / level.alpha
            self._before, self._now = now, None

    def steps(self) -> list[dict[str, Any]]:
        """A mapping a step: `index`, `timestep`, `sigma_over_alpha`, and each figure of each image, (images,) float32.

        Raises:
            ValueError: if nothing was seen.
        """
        self._finish_step()
        if not self._figures:
            raise ValueError(
                "guidance diagnostics: no step was seen; pass the record as callback_on_step_end, or use "
                "what watch(...) gives"
            )
        return [
            {
                "index": index,
                "timestep": self._places[index][0],
                "sigma_over_alpha": self._places[index][1],
                **{name: torch.cat([run[name] for run in runs]).cpu() for name in runs[0]},
            }
            for index, runs in sorted(self._figures.items())
        ]

    def save(self, path: str | Path) -> None:
        """Write the figures as JSON, or draw them (.png, .pdf, .svg) with the middle 80% of the images as a band.

        JSON has the means over the images where a figure is defined (null: nowhere), and the log-probability of each
        image as `log_probabilities`.

        Raises:
            ValueError: for another ending, or if nothing was seen.
            ImportError: for a picture where matplotlib is missing.
            OSError: for a full disk.
        """
        path = Path(path)
        check_output(path)
        steps = self.steps()
        if path.suffix.lower() != ".json":
            return _draw(steps, self.images, path)
        rows = []
        for step in steps:
            each = {name: value for name, value in step.items() if isinstance(value, torch.Tensor)}
            rows.append(
                {
                    **{name: value for name, value in step.items() if name not in each},
                    **{name: value.double().nanmean().item() for name, value in each.items()},
                    "log_probabilities": each["log_probability"].tolist(),
                }
            )
        write_json({"images": self.images, "steps": rows}, path)


@dataclass
class _Step:
    """A step of a run; `shift` is what guidance adds to the score, (B, C, H, W), None: nothing."""

    index: int
    timestep: float
    level: NoiseLevel
    sample: torch.Tensor
    x0: torch.Tensor
    shift: torch.Tensor | None
    log_p: torch.Tensor | None = None

    def figures(self, before: _Step | None) -> dict[str, torch.Tensor]:
        """Each (B,); networks and samples are let go of."""
        undefined = self.sample.new_full((len(self.sample),), torch.nan)
        guided, ratio, cosine = self.x0, torch.zeros_like(undefined), undefined
        if self.shift is not None:
            guided = self.x0 + self.level.sigma**2 / self.level.alpha * self.shift
            ratio = _norm(self.shift) / _norm(self.level.score(self.sample, self.x0))
            if before is not None and before.shift is not None:
                product = (self.shift.flatten(1).double() * before.shift.flatten(1).double()).sum(1)
                cosine = product / (_norm(self.shift) * _norm(before.shift))  # 0 / 0 is NaN
        found = {
            "log_probability": undefined if self.log_p is None else self.log_p,
            "guidance_to_score": ratio,
            "cosine": cosine,
            "outside": _outside(guided),
            "outside_unguided": _outside(self.x0),
        }
        self.sample = self.x0 = undefined  # the next step looks at the shift alone
        return {name: value.float() for name, value in found.items()}


class _Watched(Guidance):
    """A term that tells a record of its steps; else as it is, but that a tolerance can't ask it for some images."""

    def __init__(self, term: Guidance, record: GuidanceDiagnostics):
        super().__init__()
        self.term, self.record = term, record
        self.conditions, self.through_network = term.conditions, term.through_network

    def active(self, index: int, count: int, level: NoiseLevel) -> bool:
        return self.term.active(index, count, level)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return self.term.modules()

    def score(self, step: StepContext) -> torch.Tensor:
        score = self.term.score(step)
        self.record.saw(self.term, step, score)
        return score


def _log_probability(
    term: NoiseAwareGuidance, sample: torch.Tensor, level: NoiseLevel
) -> torch.Tensor:
    """What the term's network says of its label, (B,)."""
    dtype = next((p.dtype for p in term.module.parameters()), sample.dtype)
    z = sample / (level.alpha**2 + level.sigma**2) ** 0.5
    with torch.no_grad():
        return term.log_likelihood(z.to(dtype), term.schedule.timestep(level))


def _norm(value: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(
        value.flatten(1).double(), dim=1
    )  # squares of a sure classifier's would vanish


def _outside(x0: torch.Tensor) -> torch.Tensor:
    return (x0.abs() > 1).flatten(1).double().mean(1)


def check_output(path: Path) -> None:
    """Refuse a file that can't be written.

    Raises:
        ValueError: for its ending.
        ImportError: for a picture where matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"diagnostics {path}: a name that ends with {', '.join(FORMATS)} is allowed"
        )
    if path.suffix.lower() != ".json":
        require_matplotlib()


def _draw(steps: Sequence[dict[str, Any]], images: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(FIGURES), 3.4), layout="constrained")
    x = [step["index"] for step in steps]
    for axis, (name, title) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        curves = (
            [(name, "guided"), ("outside_unguided", "unguided")]
            if name == "outside"
            else [(name, None)]
        )
        for key, label in curves:
            values = [step[key].double() for step in steps]
            lines = axis.plot(
                x, [one.nanmean().item() for one in values], marker="o", markersize=3, label=label
            )
            band = [[one.nanquantile(share).item() for one in values] for share in (0.1, 0.9)]
            axis.fill_between(x, *band, alpha=0.2, color=lines[0].get_color(), linewidth=0)
            if label:
                axis.legend(fontsize="small", frameon=False)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"guidance, step by step: mean of {images} images, and the middle 80% of them",
        fontsize="medium",
    )
    with aside(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:].lower())

"""Guidance by the classifier's value, without its gradient, against classifier-free guidance.

    python examples/benchmarks/gradient_free.py --reference data/fashion-mnist      # half an hour of one core
    python examples/benchmarks/gradient_free.py --reference data/fashion-mnist --steps 15 --num-images 2000

The network gets the label y. Classifier-free guidance moves its prediction away from that of the null label,
everywhere alike. Here the classifier, in one forward pass, chooses for each image and step (Shenoy et al. 2024,
"Gradient-free classifier guidance for diffusion model sampling", in which both choices come from a classifier):

    confidence   the scale is scale (1 - p(y | x)): nothing is added where the label is already certain
    label        the reference is not the null label but the most probable label beside y

p is the noise-aware classifier's, of the predicted x0 ("x0") or of the noisy sample ("x_t"). Where the scale is below
--threshold times its largest value, the reference isn't evaluated. All rows have the same seeds and solver. A setting
is measured once: run the command again to continue. After each rule the table is in `gradient_free.md` and `.json`, and
at the end it is printed. A rule pays off if, against a row of classifier-free guidance that takes as long or
longer, up to 5%, it is better in one of agreement, Frechet distance and recall beyond both intervals, and in none
worse; the last column names such rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from guided_diffusers import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    Guidance,
    StepContext,
)
from guided_diffusers.arguments import DEFAULTS
from guided_diffusers.evaluation import load_network
from guided_diffusers.files import write_bytes, write_json
from guided_diffusers.sweep import Result, SweepSetting, measure_points
from guided_diffusers.text import markdown_table
from guided_diffusers.utils import load_pipeline

METRICS = {"top_1": 1, "frechet_distance": -1, "recall": 1}  # 1: more is better
CLASSIFIER_FREE = "classifier-free"


class Reference(torch.nn.Module):
    """The network under other labels, (B,), evaluated for some images, `rows`; 0 for the others."""

    def __init__(self, network: torch.nn.Module, labels: torch.Tensor, rows: torch.Tensor):
        super().__init__()
        self.network, self.labels, self.rows = network, labels, rows

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(sample)
        if len(self.rows):
            part, labels = sample[self.rows], self.labels[self.rows]
            output[self.rows] = self.network(part, timestep, labels, return_dict=False)[0]
        return output


class GradientFreeGuidance(Guidance):
    """scale_i (score(x_t | y) - score(x_t | reference)), chosen by a classifier's probabilities.

    Args:
        pipeline: with a noise-aware classifier and a network that knows the labels and a null label.
        label: one id per image.
        by_confidence: scale_i = scale (1 - p(y | x)); else scale_i = scale.
        by_label: the reference is the most probable label beside y; else the null label.
        of: "x0" or "x_t", of which the probabilities are.
        threshold: the reference is evaluated where scale_i is above this times scale.
    """

    supports_pure_noise = True

    def __init__(
        self,
        pipeline: ClassifierGuidedPipeline,
        label: Sequence[int],
        scale: float,
        start: float,
        *,
        by_confidence: bool,
        by_label: bool,
        of: str = "x0",
        threshold: float = 0.0,
    ):
        super().__init__(scale, start)
        self.pipeline, self.labels = pipeline, torch.tensor(label)
        self.by_confidence, self.by_label, self.of = by_confidence, by_label, of
        self.threshold = threshold
        self.classifier = ClassifierGuidance(pipeline.classifier, 0)  # for its schedule

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.pipeline.classifier,)

    def probabilities(self, step: StepContext) -> torch.Tensor:
        """(B, num_labels)."""
        z, t = step.x0.clamp(-1, 1), 0.0
        if self.of == "x_t":
            z, t, _ = self.classifier.network_input(step.sample, step.level)
        return self.pipeline.classifier(z, t).logits.softmax(-1)

    def score(self, step: StepContext) -> torch.Tensor:
        labels = self.labels.to(step.sample.device)[:, None]
        p = self.probabilities(step)
        share = 1 - p.gather(1, labels) if self.by_confidence else torch.ones_like(p[:, :1])
        reference = torch.full_like(labels[:, 0], self.pipeline.null_label)
        if self.by_label:
            reference = p.scatter(1, labels, -1.0).argmax(1)
        is_evaluated = share > self.threshold
        rows = is_evaluated[:, 0].nonzero().flatten()
        x0 = step.predict(step.sample, Reference(self.pipeline.unet, reference, rows))
        share = (share * is_evaluated).reshape(-1, *[1] * (step.sample.ndim - 1))
        return self.scale_at(step) * share * step.level.score_shift(step.x0 - x0)


Term = Callable[[ClassifierGuidedPipeline, Sequence[int], float, float], Guidance]


def classifier_free(
    pipeline: ClassifierGuidedPipeline, label: Sequence[int], scale: float, start: float
) -> Guidance:
    return ClassifierFreeGuidance(pipeline.null_label, scale, start)


def with_term(pipeline: ClassifierGuidedPipeline, term: Term) -> ClassifierGuidedPipeline:
    """The same networks; `guidance_scale` and `guidance_start` are those of `term`."""

    class WithTerm(ClassifierGuidedPipeline):
        def __call__(
            self,
            label: Any,
            *args: Any,
            guidance_scale: float = 0.0,
            guidance_start: float = 0.0,
            **arguments: Any,
        ) -> Any:
            guidance = term(self, label, guidance_scale, guidance_start) if guidance_scale else None
            arguments |= {"guidance_scale": 0.0, "guidance": guidance}
            return super().__call__(label, *args, **arguments)

    return WithTerm(**pipeline.components, defaults=dict(pipeline.config.defaults))


@dataclass(frozen=True)
class Rule:
    """Rows of the table: a term in place of the classifier's, or that one (None), and its settings."""

    name: str
    term: Term | None
    points: tuple[tuple[float, float], ...]  # (scale, start)
    tolerance: float | None = None


def rules(threshold: float) -> list[Rule]:
    """All rows, the most important first."""
    gradient_free = partial(GradientFreeGuidance, threshold=threshold)
    whole, late = (1.0, 0.0), (1.0, 0.4)
    confidence = partial(gradient_free, by_confidence=True, by_label=False)
    label = partial(gradient_free, by_confidence=False, by_label=True)
    both = partial(gradient_free, by_confidence=True, by_label=True)
    return [
        Rule("label only", None, ((0.0, 0.0),)),
        Rule(CLASSIFIER_FREE, classifier_free, (late,)),
        Rule("by confidence and label, x0", both, (late,)),
        Rule(CLASSIFIER_FREE, classifier_free, ((0.5, 0.4),)),
        Rule("by confidence, x0", confidence, ((2.0, 0.4),)),
        Rule("by label, x0", label, (late,)),
        Rule("preset: classifier", None, (late,), 0.1),
        Rule(CLASSIFIER_FREE, classifier_free, ((2.0, 0.4), whole, (0.5, 0.0))),
        Rule("by confidence and label, x_t", partial(both, of="x_t"), (late,)),
        Rule("by confidence, x_t", partial(confidence, of="x_t"), ((2.0, 0.4),)),
        Rule("by confidence and label, x0", both, (whole,)),
        Rule("by confidence, x0", confidence, ((2.0, 0.0),)),
        Rule("by label, x0", label, (whole,)),
        Rule("classifier", None, (whole,)),
    ]


# ---------------------------------------------------------------- the table


def is_above(one: Result, other: Result, name: str) -> bool:
    """Whether a metric is better beyond both intervals."""
    sign = METRICS[name]
    ends = (
        sorted(sign * end for end in one.interval(name)),
        sorted(sign * end for end in other.interval(name)),
    )
    return ends[0][0] > ends[1][1]


def pays_off(result: Result, plain: Result) -> bool:
    """Whether a row is better than one of classifier-free guidance that costs at least as much."""
    cheaper = result.seconds <= 1.05 * plain.seconds
    better = any(is_above(result, plain, name) for name in METRICS)
    return cheaper and better and not any(is_above(plain, result, name) for name in METRICS)


def title(rule: Rule, point: SweepSetting) -> str:
    if not point.guidance_scale:
        return rule.name
    start = f", from {point.guidance_start:.0%} on" if point.guidance_start else ""
    return f"{rule.name}, scale {point.guidance_scale:g}{start}"


def table(results: dict[str, Result]) -> str:
    plain = {name: result for name, result in results.items() if name.startswith(CLASSIFIER_FREE)}
    rows = []
    for name, result in results.items():
        is_rule = name.startswith("by ")
        beaten = [n for n, other in plain.items() if is_rule and pays_off(result, other)]
        metrics = [result.full_text("top_1"), result.full_text("frechet_distance")]
        metrics += [result.full_text("recall"), result.evaluations_text, f"{result.seconds:.3f}"]
        rows.append([name, *metrics, "; ".join(beaten)])
    header = ["guidance", "agreement", "Frechet distance", "recall"]
    header += ["evaluations: model + classifier", "CPU s per image", "better than"]
    return markdown_table(header, rows)


def measure(options: argparse.Namespace) -> None:
    """Measure all rows, and report after each rule."""
    pipeline = load_pipeline(options.model).to(options.device)
    pipeline.register_to_config(defaults=dict(DEFAULTS))
    if pipeline.null_label is None:
        raise SystemExit(f"--model {options.model}: a network with a null label is needed")
    judge = load_network(options.judge, torch.device(options.device))
    results: dict[str, Result] = {}
    for rule in rules(options.threshold):
        points = [
            SweepSetting(options.solver, options.steps, *point, guidance_tolerance=rule.tolerance)
            for point in rule.points
        ]
        folder = options.output / rule.name.replace(",", "").replace(":", "").replace(" ", "-")
        share_real_images(folder, options.output)
        store = measure_points(
            pipeline if rule.term is None else with_term(pipeline, rule.term),
            points,
            options.reference,
            folder,
            judge,
            judge,
            num_images=options.num_images,
            batch_size=options.batch_size,
            dtype=options.dtype,
            model=options.model,
            progress=not options.quiet,
        )
        for point in points:
            results[title(rule, point)] = store.read(store.path(point))
        report(results, options)


def share_real_images(folder: Path, output: Path) -> None:
    """Let all folders of results keep what is computed of the real images in one place."""
    folder.mkdir(parents=True, exist_ok=True)
    (output / "real").mkdir(exist_ok=True)
    if not (folder / ".real").exists():
        (folder / ".real").symlink_to("../real", target_is_directory=True)


def report(results: dict[str, Result], options: argparse.Namespace) -> None:
    """Write the table and the results measured so far."""
    write_bytes(table(results).encode(), options.output / "gradient_free.md")
    settings = {name: str(value) for name, value in vars(options).items() if name != "output"}
    rows = {name: result.to_json() for name, result in results.items()}
    write_json({"settings": settings, "rows": rows}, options.output / "gradient_free.json")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--reference", required=True, help="labelled dataset, for its test images")
    option("--model", default="fashion-mnist", help="bundled model, folder or Hub id")
    option("--judge", default="fashion-mnist", help="a classifier that never guides")
    option("--solver", default="dpmsolver++", help="(default: %(default)s)")
    option("--steps", type=int, default=10, help="(default: %(default)s)")
    option("--threshold", type=float, default=0.05, help="(default: %(default)s)")
    option("--num-images", type=int, default=1000, help="images per row (default: %(default)s)")
    option("--batch-size", type=int, default=100, help="(default: %(default)s)")
    dtypes = ("float32", "bfloat16", "float16")
    option("--dtype", default="bfloat16", choices=dtypes, help="autocast dtype of the network")
    option("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    option("--output", type=Path, default=Path("out/gradient_free"), help="(default: %(default)s)")
    option("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    measure(options)
    print((options.output / "gradient_free.md").read_text())


if __name__ == "__main__":
    main()

"""What the published recipe's quality costs: DDPM, 250 steps, Algorithm 1, a gradient at every step, against fewer.

    python examples/benchmarks/quality_cost.py --reference data/fashion-mnist                  # three hours of one core
    python examples/benchmarks/quality_cost.py --reference data/fashion-mnist --part solvers   # where guidance diverges
    python examples/benchmarks/quality_cost.py --reference my/data --model my/pipeline --judge my/judge --device cuda

Four parts, each with a table; all points of one have the same seeds, and nothing of the model's own preset:

    quality     the published recipe, and of one solver at some steps: no guidance, the plain correction at every step,
                and fewer questions (`guidance_tolerance`) from a fraction of the run on. Equal quality is the published
                recipe's accuracy less half a point, and its Frechet distance and recall within their bootstrap
                intervals. The surcharge of guidance is a run's seconds above those of the same without.
    solvers     where the plain correction and splitting diverge: scales 1 to 20 by solver; the Frechet distances above
                those without guidance are marked.
    directions  what is made of the gradient at high scales: dynamic thresholding of x0, the gradient orthogonal to the
                predicted x0 (Sadat et al. 2024), at most as long as the score, or as long as it.
    preset      for a network that is told the label: what the model takes by itself (`training/bundle.py --preset`) is
                the most accurate of the points with fewer questions that are no worse than no guidance in Frechet
                distance and recall, within their intervals.

In the first three the network isn't told the label, so that the classifier alone steers. Each point is measured once
and kept: started again, or several times at once, the benchmark goes on. The seconds of the first and the last table
are those of one batch of each setting, in turns, so that whatever else the machine does falls on all alike: the median
of --repeats turns, CPU time on a CPU; the published recipe has one turn. It writes `quality_cost.json` and `.md` with
the tables of all parts that were measured, `quality_cost.png` and `preset.json` into the output folder.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from guided_diffusers import ClassifierGuidance, ClassifierGuidedPipeline, Guidance, StepContext
from guided_diffusers.evaluation import load_network
from guided_diffusers.pipeline import DEFAULTS
from guided_diffusers.sampling import sample
from guided_diffusers.speed import computing_in
from guided_diffusers.sweep import Result, SweepSetting, measure_points
from guided_diffusers.sweep.measure import DTYPES, quiet_copy
from guided_diffusers.sweep.schedulers import scheduler_for
from guided_diffusers.utils import exchanged, load_pipeline, write_bytes, write_json

PARTS = ("quality", "solvers", "directions", "preset")
SOLVERS = {
    name: (None, "lie_trotter", "strang")
    for name in ("ddim", "dpmsolver++", "dpmsolver++3m", "unipc", "heun", "euler")
} | {"dpmsolver++-thresholding": (None,)}
SCALES = (1.0, 3.0, 5.0, 10.0, 20.0)
FIGURES = ("top_1", "frechet_distance", "recall")


class Orthogonal(ClassifierGuidance):
    """What of the gradient is orthogonal to the predicted x0, image by image."""

    def score(self, step: StepContext) -> torch.Tensor:
        g, x0 = super().score(step).flatten(1), step.x0.flatten(1)
        along = (g * x0).sum(1, keepdim=True) / x0.square().sum(1, keepdim=True)
        return (g - along * x0).reshape(step.sample.shape)


class Capped(ClassifierGuidance):
    """The gradient, at most as long as the score, image by image."""

    def score(self, step: StepContext) -> torch.Tensor:
        g = super().score(step)
        norms = [
            one.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.ndim - 1)) for one in (step.score, g)
        ]
        return g * (norms[0] / norms[1].clamp(min=1e-12)).clamp(max=1)


DIRECTIONS: dict[
    str, tuple[str, Callable[..., Guidance], tuple[float, ...]]
] = {  # solver, term, scales
    "as it is": ("dpmsolver++", ClassifierGuidance, (3.0, 5.0, 10.0, 20.0)),
    "dynamic thresholding": (
        "dpmsolver++-thresholding",
        ClassifierGuidance,
        (3.0, 5.0, 10.0, 20.0),
    ),
    "orthogonal to x0": ("dpmsolver++", Orthogonal, (3.0, 5.0, 10.0, 20.0)),
    "capped at the score": ("dpmsolver++", Capped, (3.0, 5.0, 10.0, 20.0)),
    "as long as the score, times": (
        "dpmsolver++",
        partial(ClassifierGuidance, normalize=True),
        (0.1, 0.2, 0.5, 1.0),
    ),
}


def steered(
    pipeline: ClassifierGuidedPipeline, term: Callable[..., Guidance]
) -> ClassifierGuidedPipeline:
    """The same networks, guided by a term of another kind."""

    class Steered(ClassifierGuidedPipeline):
        def _terms(self, labels: Any, per_label: int, scale: float, *more: Any) -> list[Guidance]:
            return [term(self.classifier, labels, scale)] if scale else []

    return Steered(**pipeline.components, defaults=dict(pipeline.config.defaults))


@dataclass(frozen=True)
class Setting:
    """A point of the first table, and what it is there for."""

    kind: str
    point: SweepSetting


def settings(
    solver: str,
    steps: Sequence[int],
    scales: Sequence[float],
    starts: Sequence[float],
    tolerances: Sequence[float],
) -> Iterator[Setting]:
    for count in steps:
        yield Setting("unguided", SweepSetting(solver, count, 0.0))
        for scale in scales:
            yield Setting("plain", SweepSetting(solver, count, scale))
        for start, scale, most in product(starts, scales, tolerances):
            yield Setting(
                "spared", SweepSetting(solver, count, scale, start, guidance_tolerance=most)
            )


def solver_points(steps: Sequence[int]) -> Iterator[SweepSetting]:
    for count in steps:
        for solver, algorithms in SOLVERS.items():
            yield SweepSetting(solver, count, 0.0)
            for scale in SCALES:
                for algorithm in algorithms:
                    yield SweepSetting(solver, count, scale, guidance_algorithm=algorithm)


def as_good(result: Result, other: Result) -> bool:
    """Whether Frechet distance and recall are the other's, within its intervals, or better."""
    return (
        result.value("frechet_distance") <= other.interval("frechet_distance")[1]
        and result.value("recall") >= other.interval("recall")[0]
    )


def equal(result: Result, published: Result) -> bool:
    """Whether the quality is the published recipe's."""
    return result.value("top_1") >= published.value("top_1") - 0.005 and as_good(result, published)


def chosen(found: Sequence[tuple[Setting, Result]]) -> SweepSetting | None:
    """The most accurate point that is as good as none of the same steps; None if none is."""
    none = {
        one.point.num_inference_steps: result for one, result in found if one.kind == "unguided"
    }
    harmless = [
        (result.value("top_1"), one.point)
        for one, result in found
        if one.kind == "spared" and as_good(result, none[one.point.num_inference_steps])
    ]
    return max(harmless, key=lambda row: row[0], default=(0.0, None))[1]


def in_turns(
    pipeline: ClassifierGuidedPipeline,
    wanted: Sequence[Setting],
    folder: str,
    conditional: bool | None,
    options: argparse.Namespace,
) -> dict[str, float]:
    """{setting: seconds an image}; each turn's are kept in the folder's `timing.json`."""
    path = options.output / folder / "timing.json"
    taken: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}

    def now() -> float:
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if pipeline.device.type == "cpu" else time.perf_counter()

    labels = sorted(pipeline.config.id2label)
    with computing_in(pipeline.unet, DTYPES[options.dtype]):
        for turn, one in product(range(options.repeats), wanted):
            if len(taken.get(str(one.point), [])) > (0 if one.kind == "published" else turn):
                continue
            made = quiet_copy(pipeline, scheduler_for(pipeline.scheduler, one.point.scheduler))
            began = now()
            for _ in sample(
                made,
                labels,
                0,
                options.batch_size,
                range(options.batch_size),
                conditional=conditional,
                output_type="pt",
                **one.point.call_arguments,
            ):
                taken.setdefault(str(one.point), []).append((now() - began) / options.batch_size)
            write_json(taken, path)
    return {name: statistics.median(seconds[: options.repeats]) for name, seconds in taken.items()}


def quality_rows(
    found: Sequence[tuple[Setting, Result]], timing: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The first table, and the last."""
    took = {one.point: timing[str(one.point)] for one, _ in found}
    published_point, published = next(
        ((one.point, result) for one, result in found if one.kind == "published"), (None, None)
    )
    rows = []
    for one, result in found:
        cost = result.cost
        row = {
            "kind": one.kind,
            "setting": str(one.point),
            "steps": one.point.num_inference_steps,
            **{name: result.value(name) for name in FIGURES},
            **{f"{name}_interval": list(result.interval(name)) for name in FIGURES},
            "network_evaluations": cost["network_evaluations"],
            "classifier_evaluations": cost["classifier_evaluations"],
            "seconds": took[one.point],
        }
        if published is not None:
            row |= {
                "seconds_of_published": took[one.point] / took[published_point],
                "equal_quality": equal(result, published),
            }
        none = took.get(one.point.unguided)
        plain = took.get(
            SweepSetting(
                one.point.scheduler, one.point.num_inference_steps, one.point.guidance_scale
            )
        )
        if one.point.guidance_scale and none is not None and plain is not None:
            row["surcharge_of_plain"] = (took[one.point] - none) / (plain - none)
        rows.append(row)
    return rows


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| | setting | accuracy | Frechet distance | recall | network + classifier | s an image | of published | "
        "surcharge | equal |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["frechet_distance_interval"]
        share = f"{row['seconds_of_published']:.3f}" if "seconds_of_published" in row else ""
        surcharge = f"{row['surcharge_of_plain']:.2f}" if "surcharge_of_plain" in row else ""
        lines.append(
            f"| {row['kind']} | {row['setting']} | {row['top_1']:.1%} | {row['frechet_distance']:.2f} "
            f"({low:.2f} to {high:.2f}) | {row['recall']:.3f} | {row['network_evaluations']:.0f} + "
            f"{row['classifier_evaluations']:.1f} | {row['seconds']:.3f} | {share} | {surcharge} | "
            f"{'yes' if row.get('equal_quality') else ''} |"
        )
    return "\n".join(lines)


def solver_rows(results: Sequence[Result], images: int) -> list[dict[str, Any]]:
    values = {result.setting: result.value("frechet_distance") for result in results}
    none = {point.curve[:2]: value for point, value in values.items() if point.guidance_scale == 0}
    return [
        {
            "images": images,
            "steps": point.num_inference_steps,
            "solver": point.scheduler,
            "algorithm": point.guidance_algorithm or "output",
            "scale": point.guidance_scale,
            "frechet_distance": value,
            "unguided": none[point.curve[:2]],
            "diverged": not value <= none[point.curve[:2]],
        }
        for point, value in values.items()
        if point.guidance_scale
    ]


def solver_table(rows: Sequence[dict[str, Any]]) -> str:
    """The second table: Frechet distances by steps, solver, algorithm and scale; those above unguided are marked."""
    scales = list(dict.fromkeys(row["scale"] for row in rows))
    lines = [
        "| steps | solver | guidance | unguided | "
        + " | ".join(f"scale {scale:g}" for scale in scales)
        + " |",
        "|---|---|---|---|" + "---|" * len(scales),
    ]
    for place in dict.fromkeys(
        (row["steps"], row["solver"], row["algorithm"], row["unguided"]) for row in rows
    ):
        cells = [
            f"**{row['frechet_distance']:.2f}**"
            if row["diverged"]
            else f"{row['frechet_distance']:.2f}"
            for row in rows
            if (row["steps"], row["solver"], row["algorithm"]) == place[:3]
        ]
        lines.append("| {} | {} | {} | {:.2f} | ".format(*place) + " | ".join(cells) + " |")
    return "\n".join(lines)


def direction_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| gradient | scale | accuracy | Frechet distance | recall |", "|---|---|---|---|---|"]
    return "\n".join(
        lines
        + [
            f"| {row['direction']} | {row['scale']:g} | {row['top_1']:.1%} | "
            f"{row['frechet_distance']:.2f} | {row['recall']:.3f} |"
            for row in rows
        ]
    )


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy, Frechet distance and recall against seconds an image; beside a point its number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    kinds = {
        "published": ("published recipe", "#222222", "*"),
        "plain": ("asked at each step", "#3266a8", "o"),
        "spared": ("asked where it pays", "#d1603d", "o"),
    }
    titles = {
        "top_1": "judge agrees (more is better)",
        "frechet_distance": "Frechet distance (less is better)",
        "recall": "recall (more is better)",
    }
    for axis, name in zip(axes, FIGURES, strict=True):
        for kind, (label, color, mark) in kinds.items():
            its = [row for row in rows if row["kind"] == kind]
            ends = [
                [max(side * (row[f"{name}_interval"][end] - row[name]), 0) for row in its]
                for end, side in ((0, -1), (1, 1))
            ]
            axis.errorbar(
                [row["seconds"] for row in its],
                [row[name] for row in its],
                ends,
                fmt=mark,
                color=color,
                markersize=11 if mark == "*" else 6,
                linewidth=1,
                capsize=2,
                label=label,
            )
            for row in its:
                axis.annotate(
                    row["steps"],
                    (row["seconds"], row[name]),
                    (6, 3),
                    textcoords="offset points",
                    fontsize=8,
                )
        axis.set(xscale="log", xlabel="seconds an image; beside a mark: steps", title=titles[name])
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "--model",
        default="fashion-mnist",
        help="a bundled model, a folder or a Hub id (default: %(default)s)",
    )
    option(
        "--reference", required=True, help="labelled real images, as of `guided-diffusers sweep`"
    )
    option(
        "--judge",
        default="fashion-mnist",
        help="a classifier that never guided (default: %(default)s)",
    )
    option("--part", choices=PARTS, action="append", help="one of the tables (default: all)")
    option(
        "--solver",
        default="dpmsolver++",
        help="of the first and the last table (default: %(default)s)",
    )
    option("--scale", type=float, default=3.0, help="of the first table (default: %(default)s)")
    option(
        "--steps",
        type=int,
        nargs="+",
        default=[10, 15, 25],
        help="of the first table (default: 10 15 25)",
    )
    option(
        "--starts",
        type=float,
        nargs="*",
        default=[0.2],
        help="`guidance_start` there (default: 0.2)",
    )
    option(
        "--tolerances",
        type=float,
        nargs="+",
        default=[0.1, 0.2],
        help="`guidance_tolerance` there; the first in the last table, too (default: 0.1 0.2)",
    )
    option(
        "--num-images",
        type=int,
        default=2000,
        help="of a point of the first table (default: %(default)s)",
    )
    option("--repeats", type=int, default=3, help="turns of a timing (default: %(default)s)")
    option(
        "--solver-images",
        type=int,
        default=200,
        help="of the second and third (default: %(default)s)",
    )
    option(
        "--solver-steps",
        type=int,
        nargs="+",
        default=[5, 10],
        help="of the second and third (default: 5 10)",
    )
    option("--preset-images", type=int, default=1000, help="of the last (default: %(default)s)")
    option("--preset-steps", type=int, nargs="+", default=[15], help="of the last (default: 15)")
    option(
        "--preset-starts",
        type=float,
        nargs="+",
        default=[0.2, 0.3, 0.4, 0.5],
        help="`guidance_start` of the last (default: 0.2 0.3 0.4 0.5)",
    )
    option(
        "--preset-scales",
        type=float,
        nargs="+",
        default=[1.0, 2.0, 3.0],
        help="of the last (default: 1 2 3)",
    )
    option(
        "--dtype",
        default="bfloat16",
        choices=("float32", "bfloat16", "float16"),
        help="what the network computes in (default: %(default)s)",
    )
    option("--batch-size", type=int, default=100, help="images at once (default: %(default)s)")
    option("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    option(
        "--output",
        type=Path,
        default=Path("out/quality_cost"),
        help="a folder (default: %(default)s)",
    )
    option("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is allowed")

    # 1. The model without its own preset
    device = torch.device(options.device)
    pipeline, judge = load_pipeline(options.model).to(device), load_network(options.judge, device)
    pipeline.register_to_config(defaults=dict(DEFAULTS))
    if pipeline.scheduler.config.get("beta_schedule"):  # one of those that are exchanged below
        pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    told = pipeline.config.id2label is not None and bool(
        pipeline.unet.config.get("num_class_embeds")
    )

    def measure(
        points: Sequence[SweepSetting],
        folder: str,
        images: int,
        tell: bool = False,
        bootstrap: int = 100,
        by: ClassifierGuidedPipeline = pipeline,
    ) -> list[Result]:
        store = measure_points(
            by,
            points,
            options.reference,
            options.output / folder,
            judge,
            judge,
            num_images=images,
            conditional=(None if tell else False) if told else None,
            dtype=options.dtype,
            batch_size=options.batch_size,
            bootstrap=bootstrap,
            model=options.model,
            progress=not options.quiet,
        )
        return [store.read(store.path(point)) for point in points]

    # 2. The parts, beside those that are there
    path = options.output / "quality_cost.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in options.part or PARTS:
        if part == "quality":
            wanted = [
                *settings(
                    options.solver,
                    options.steps,
                    [options.scale],
                    options.starts,
                    options.tolerances,
                ),
                Setting(
                    "published", SweepSetting("ddpm", 250, options.scale, guidance_algorithm="mean")
                ),
            ]
            results = measure([one.point for one in wanted], part, options.num_images)
            timing = in_turns(pipeline, wanted, part, False if told else None, options)
            figures[part] = quality_rows(list(zip(wanted, results, strict=True)), timing)
            draw(figures[part], options.output / "quality_cost.png")
        elif part == "solvers":
            points = list(solver_points(options.solver_steps))
            figures[part] = solver_rows(
                measure(points, part, options.solver_images, bootstrap=2), options.solver_images
            )
        elif part == "directions":
            figures[part] = []
            for name, (solver, term, scales) in DIRECTIONS.items():
                points = [
                    SweepSetting(solver, max(options.solver_steps), scale) for scale in scales
                ]
                figures[part] += [
                    {
                        "images": options.solver_images,
                        "steps": one.setting.num_inference_steps,
                        "direction": name,
                        "scale": one.setting.guidance_scale,
                        **{key: one.value(key) for key in FIGURES},
                    }
                    for one in measure(
                        points,
                        f"{part}/{name}",
                        options.solver_images,
                        bootstrap=2,
                        by=steered(pipeline, term),
                    )
                ]
        else:
            wanted = list(
                settings(
                    options.solver,
                    options.preset_steps,
                    options.preset_scales,
                    options.preset_starts,
                    options.tolerances[:1],
                )
            )
            found = list(
                zip(
                    wanted,
                    measure([one.point for one in wanted], part, options.preset_images, tell=True),
                    strict=True,
                )
            )
            figures[part] = quality_rows(found, in_turns(pipeline, wanted, part, None, options))
            write_preset(figures[part], chosen(found), options.output / "preset.json")

    # 3. All of them as tables
    write_json(figures, path)
    tables = {
        "quality": (quality_table, "What the published recipe's quality costs"),
        "solvers": (
            solver_table,
            "Frechet distance by solver, {images} images a point; bold where it is above "
            "that without guidance",
        ),
        "directions": (
            direction_table,
            "What is made of the gradient, {steps} steps, {images} images a point",
        ),
        "preset": (quality_table, "The preset: a network that is told the label"),
    }
    text = (
        "".join(
            f"## {title.format_map(figures[part][0])}\n\n{table(figures[part])}\n\n"
            for part, (table, title) in tables.items()
            if part in figures
        ).rstrip("\n")
        + "\n"
    )
    write_bytes(text.encode(), options.output / "quality_cost.md")
    print(text)


def write_preset(rows: Sequence[dict[str, Any]], best: SweepSetting | None, path: Path) -> None:
    """How the model samples by itself, and its row beside those of no guidance and of guidance at each step; nothing
    where no guidance is better."""
    path.unlink(missing_ok=True)
    print(f"preset: {best or 'no guidance'}")
    if best is None:
        return
    shown = [
        {
            "guidance": row["setting"],
            "agreement": row["top_1"],
            **{
                name: row[name]
                for name in (
                    "frechet_distance",
                    "recall",
                    "network_evaluations",
                    "classifier_evaluations",
                    "seconds",
                )
            },
        }
        for row in rows
        if row["kind"] != "spared" or row["setting"] == str(best)
    ]
    defaults = {
        name: value for name, value in best.call_arguments.items() if value != DEFAULTS[name]
    }
    write_json(
        {
            "scheduler": best.scheduler,
            "defaults": defaults,
            "rows": shown,
            "command": shlex.join(["python", *sys.argv]),
        },
        path,
    )


if __name__ == "__main__":
    main()

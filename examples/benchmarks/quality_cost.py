"""Quality at less cost: the published recipe against fewer steps and fewer evaluations of the classifier.

    python examples/benchmarks/quality_cost.py --reference data/fashion-mnist                  # three hours of one core
    python examples/benchmarks/quality_cost.py --reference data/fashion-mnist --part solvers   # where guidance diverges
    python examples/benchmarks/quality_cost.py --reference my/data --model my/pipeline --judge my/judge --device cuda

The published recipe is DDPM, 250 steps, Algorithm 1 of Dhariwal & Nichol (2021), a gradient at every step. There are
four parts, each with a table; all settings of a part have the same seeds, and the model's own preset isn't used:

    quality     the published recipe; and for one solver at several numbers of steps: no guidance, guidance evaluated at
                every step ("plain"), and `guidance_tolerance` from a fraction of the run on ("reuse"). Equal quality:
                the published recipe's accuracy less half a point, and its Frechet distance and recall within their
                bootstrap intervals. The surcharge is the time above that of the same steps without guidance.
    solvers     where the plain correction and operator splitting diverge: scales 1 to 20 by solver; Frechet distances
                above those without guidance are marked.
    directions  changes of the gradient at high scales: dynamic thresholding of x0, the gradient orthogonal to the
                predicted x0 (Sadat et al. 2024), capped at the norm of the score, or rescaled to it.
    preset      for a network that gets the label. The preset (`training/bundle.py --preset`) is the most accurate
                setting with reuse whose Frechet distance and recall are no worse than without guidance, within their
                intervals.

In the first three the network doesn't get the label, so only the classifier steers. Each setting is measured once: run
the command again, or several times at once, to continue. Seconds of the first and the last table are those of one batch
of each setting, interleaved: the median of --repeats turns, CPU time on a CPU; the published recipe has one turn.
Writes `quality_cost.json` and `.md` with the tables of all parts measured so far, `quality_cost.png` and
`preset.json`.
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
from guided_diffusers.arguments import DEFAULTS
from guided_diffusers.evaluation import load_network
from guided_diffusers.files import write_bytes, write_json
from guided_diffusers.sampling import sample
from guided_diffusers.speed import computing_in
from guided_diffusers.sweep import Result, SweepSetting, measure_points
from guided_diffusers.sweep.measure import DTYPES, quiet_copy
from guided_diffusers.text import markdown_table
from guided_diffusers.utils import exchanged, load_pipeline, scheduler_for

PARTS = ("quality", "solvers", "directions", "preset")
SOLVERS = {
    name: (None, "lie_trotter", "strang")
    for name in ("ddim", "dpmsolver++", "dpmsolver++3m", "unipc", "heun", "euler")
} | {"dpmsolver++-thresholding": (None,)}
SCALES = (1.0, 3.0, 5.0, 10.0, 20.0)
METRICS = ("top_1", "frechet_distance", "recall")


# ---------------------------------------------------------------- settings


class Orthogonal(ClassifierGuidance):
    """The part of each image's gradient that is orthogonal to its predicted x0."""

    def score(self, step: StepContext) -> torch.Tensor:
        g, x0 = super().score(step).flatten(1), step.x0.flatten(1)
        along = (g * x0).sum(1, keepdim=True) / x0.square().sum(1, keepdim=True)
        return (g - along * x0).reshape(step.sample.shape)


class Capped(ClassifierGuidance):
    """Each image's gradient, at most as long as its score."""

    def score(self, step: StepContext) -> torch.Tensor:
        g = super().score(step)
        score_norm, norm = (
            tensor.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.ndim - 1))
            for tensor in (step.score, g)
        )
        return g * (score_norm / norm.clamp(min=1e-12)).clamp(max=1)


@dataclass(frozen=True)
class Direction:
    """A solver, a term in place of the classifier's, and its scales."""

    solver: str
    term: Callable[..., Guidance]
    scales: tuple[float, ...] = (3.0, 5.0, 10.0, 20.0)


DIRECTIONS = {
    "as it is": Direction("dpmsolver++", ClassifierGuidance),
    "dynamic thresholding": Direction("dpmsolver++-thresholding", ClassifierGuidance),
    "orthogonal to x0": Direction("dpmsolver++", Orthogonal),
    "capped at the score": Direction("dpmsolver++", Capped),
    "as long as the score, times": Direction(
        "dpmsolver++", partial(ClassifierGuidance, normalize=True), (0.1, 0.2, 0.5, 1.0)
    ),
}


def with_term(
    pipeline: ClassifierGuidedPipeline, term: Callable[..., Guidance]
) -> ClassifierGuidedPipeline:
    """The same networks; `guidance_scale` is the scale of `term` instead of `ClassifierGuidance`."""

    class WithTerm(ClassifierGuidedPipeline):
        def __call__(
            self, label: Any, *args: Any, guidance_scale: float = 0.0, **arguments: Any
        ) -> Any:
            guidance = None
            if guidance_scale:
                guidance = term(self.classifier, label, guidance_scale)
            return super().__call__(
                label, *args, guidance_scale=0.0, guidance=guidance, **arguments
            )

    return WithTerm(**pipeline.components, defaults=dict(pipeline.config.defaults))


@dataclass(frozen=True)
class Setting:
    """A row of the quality and preset tables: `kind` is published, unguided, plain or reuse."""

    kind: str
    point: SweepSetting


def quality_settings(
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
        for start, scale, tolerance in product(starts, scales, tolerances):
            point = SweepSetting(solver, count, scale, start, guidance_tolerance=tolerance)
            yield Setting("reuse", point)


def solver_points(steps: Sequence[int]) -> Iterator[SweepSetting]:
    for count in steps:
        for solver, algorithms in SOLVERS.items():
            yield SweepSetting(solver, count, 0.0)
            for scale, algorithm in product(SCALES, algorithms):
                yield SweepSetting(solver, count, scale, guidance_algorithm=algorithm)


# ---------------------------------------------------------------- comparisons


def as_good(result: Result, other: Result) -> bool:
    """Whether Frechet distance and recall are at least the other's, within its intervals."""
    return (
        result.value("frechet_distance") <= other.interval("frechet_distance")[1]
        and result.value("recall") >= other.interval("recall")[0]
    )


def equal_quality(result: Result, published: Result) -> bool:
    return result.value("top_1") >= published.value("top_1") - 0.005 and as_good(result, published)


def best_harmless(results: Sequence[tuple[Setting, Result]]) -> SweepSetting | None:
    """The most accurate setting with reuse that is as good as no guidance; None if none is."""
    unguided = {
        setting.point.num_inference_steps: result
        for setting, result in results
        if setting.kind == "unguided"
    }
    best, best_accuracy = None, 0.0
    for setting, result in results:
        if setting.kind != "reuse":
            continue
        accuracy = result.value("top_1")
        if accuracy > best_accuracy and as_good(
            result, unguided[setting.point.num_inference_steps]
        ):
            best, best_accuracy = setting.point, accuracy
    return best


# ---------------------------------------------------------------- measurements


class Benchmark:
    """The model without its preset, the judge, and the options."""

    def __init__(self, options: argparse.Namespace):
        device = torch.device(options.device)
        self.options = options
        self.pipeline = load_pipeline(options.model).to(device)
        self.judge = load_network(options.judge, device)
        self.pipeline.register_to_config(defaults=dict(DEFAULTS))
        if self.pipeline.scheduler.config.get("beta_schedule"):
            self.pipeline.scheduler = exchanged(self.pipeline.scheduler, "ddim")
        has_labels = self.pipeline.config.id2label is not None
        embeds = bool(self.pipeline.unet.config.get("num_class_embeds"))
        self.takes_label = has_labels and embeds

    def conditional(self, give_label: bool) -> bool | None:
        """`conditional` of the pipeline's calls."""
        return False if self.takes_label and not give_label else None

    def measure(
        self,
        points: Sequence[SweepSetting],
        folder: str,
        images: int,
        give_label: bool = False,
        bootstrap: int = 100,
        pipeline: ClassifierGuidedPipeline | None = None,
    ) -> list[Result]:
        """Results of the settings, kept in a folder of the output."""
        options = self.options
        store = measure_points(
            pipeline or self.pipeline,
            points,
            options.reference,
            options.output / folder,
            self.judge,
            self.judge,
            num_images=images,
            conditional=self.conditional(give_label),
            dtype=options.dtype,
            batch_size=options.batch_size,
            bootstrap=bootstrap,
            model=options.model,
            progress=not options.quiet,
        )
        return [store.read(store.path(point)) for point in points]

    def time(
        self, settings: Sequence[Setting], folder: str, give_label: bool = False
    ) -> dict[str, float]:
        """{setting: seconds per image}, measured in turns; each turn is kept in `timing.json`."""
        options = self.options
        path = options.output / folder / "timing.json"
        seconds: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
        with computing_in(self.pipeline.unet, DTYPES[options.dtype]):
            for turn, setting in product(range(options.repeats), settings):
                turns_done = len(seconds.get(str(setting.point), []))
                if turns_done > (0 if setting.kind == "published" else turn):
                    continue
                spent = self.time_batch(setting.point, self.conditional(give_label))
                seconds.setdefault(str(setting.point), []).append(spent / options.batch_size)
                write_json(seconds, path)
        return {
            name: statistics.median(turns[: options.repeats]) for name, turns in seconds.items()
        }

    def time_batch(self, point: SweepSetting, conditional: bool | None) -> float:
        """Seconds of one batch: CPU time on a CPU."""

        def now() -> float:
            if self.pipeline.device.type == "cuda":
                torch.cuda.synchronize()
            on_cpu = self.pipeline.device.type == "cpu"
            return time.process_time() if on_cpu else time.perf_counter()

        scheduler = scheduler_for(self.pipeline.scheduler, point.scheduler)
        batches = sample(
            quiet_copy(self.pipeline, scheduler),
            sorted(self.pipeline.config.id2label),
            0,
            self.options.batch_size,
            range(self.options.batch_size),
            conditional=conditional,
            output_type="pt",
            **point.call_arguments,
        )
        start = now()
        for _ in batches:
            pass
        return now() - start


def quality_part(bench: Benchmark) -> list[dict[str, Any]]:
    options = bench.options
    settings = list(
        quality_settings(
            options.solver, options.steps, [options.scale], options.starts, options.tolerances
        )
    )
    published = SweepSetting("ddpm", 250, options.scale, guidance_algorithm="mean")
    settings.append(Setting("published", published))
    points = [setting.point for setting in settings]
    results = bench.measure(points, "quality", options.num_images)
    timing = bench.time(settings, "quality")
    rows = quality_rows(list(zip(settings, results, strict=True)), timing)
    draw(rows, options.output / "quality_cost.png")
    return rows


def solvers_part(bench: Benchmark) -> list[dict[str, Any]]:
    options = bench.options
    points = list(solver_points(options.solver_steps))
    results = bench.measure(points, "solvers", options.solver_images, bootstrap=2)
    return solver_rows(results, options.solver_images)


def directions_part(bench: Benchmark) -> list[dict[str, Any]]:
    options, rows = bench.options, []
    for name, direction in DIRECTIONS.items():
        steps = max(options.solver_steps)
        results = bench.measure(
            [SweepSetting(direction.solver, steps, scale) for scale in direction.scales],
            f"directions/{name}",
            options.solver_images,
            bootstrap=2,
            pipeline=with_term(bench.pipeline, direction.term),
        )
        for result in results:
            row = {
                "images": options.solver_images,
                "steps": steps,
                "direction": name,
                "scale": result.setting.guidance_scale,
            }
            rows.append(row | {metric: result.value(metric) for metric in METRICS})
    return rows


def preset_part(bench: Benchmark) -> list[dict[str, Any]]:
    options = bench.options
    settings = list(
        quality_settings(
            options.solver,
            options.preset_steps,
            options.preset_scales,
            options.preset_starts,
            options.tolerances[:1],
        )
    )
    points = [setting.point for setting in settings]
    measured = bench.measure(points, "preset", options.preset_images, give_label=True)
    results = list(zip(settings, measured, strict=True))
    rows = quality_rows(results, bench.time(settings, "preset", give_label=True))
    write_preset(rows, best_harmless(results), options.output / "preset.json")
    return rows


# ---------------------------------------------------------------- rows and tables


def quality_rows(
    results: Sequence[tuple[Setting, Result]], timing: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Rows of the quality and preset tables."""
    seconds = {setting.point: timing[str(setting.point)] for setting, _ in results}
    published = next((pair for pair in results if pair[0].kind == "published"), None)
    rows = []
    for setting, result in results:
        point = setting.point
        row = {
            "kind": setting.kind,
            "setting": str(point),
            "steps": point.num_inference_steps,
            **{name: result.value(name) for name in METRICS},
            **{f"{name}_interval": list(result.interval(name)) for name in METRICS},
            "network_evaluations": result.cost["network_evaluations"],
            "classifier_evaluations": result.cost["classifier_evaluations"],
            "seconds": seconds[point],
        }
        if published is not None:
            row["seconds_of_published"] = seconds[point] / seconds[published[0].point]
            row["equal_quality"] = equal_quality(result, published[1])
        unguided = seconds.get(point.unguided)
        plain = seconds.get(
            SweepSetting(point.scheduler, point.num_inference_steps, point.guidance_scale)
        )
        if point.guidance_scale and unguided is not None and plain is not None:
            row["surcharge_of_plain"] = (seconds[point] - unguided) / (plain - unguided)
        rows.append(row)
    return rows


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["", "setting", "accuracy", "Frechet distance", "recall", "network + classifier"]
    header += ["s per image", "of published", "surcharge", "equal"]
    lines = []
    for row in rows:
        low, high = row["frechet_distance_interval"]
        share, surcharge = row.get("seconds_of_published"), row.get("surcharge_of_plain")
        lines.append(
            [
                row["kind"],
                row["setting"],
                f"{row['top_1']:.1%}",
                f"{row['frechet_distance']:.2f} ({low:.2f} to {high:.2f})",
                f"{row['recall']:.3f}",
                f"{row['network_evaluations']:.0f} + {row['classifier_evaluations']:.1f}",
                f"{row['seconds']:.3f}",
                "" if share is None else f"{share:.3f}",
                "" if surcharge is None else f"{surcharge:.2f}",
                "yes" if row.get("equal_quality") else "",
            ]
        )
    return markdown_table(header, lines)


def solver_rows(results: Sequence[Result], images: int) -> list[dict[str, Any]]:
    values = {result.setting: result.value("frechet_distance") for result in results}
    unguided = {
        point.curve[:2]: value for point, value in values.items() if point.guidance_scale == 0
    }
    return [
        {
            "images": images,
            "steps": point.num_inference_steps,
            "solver": point.scheduler,
            "algorithm": point.guidance_algorithm or "output",
            "scale": point.guidance_scale,
            "frechet_distance": value,
            "unguided": unguided[point.curve[:2]],
            "diverged": not value <= unguided[point.curve[:2]],
        }
        for point, value in values.items()
        if point.guidance_scale
    ]


def solver_table(rows: Sequence[dict[str, Any]]) -> str:
    """Frechet distances by steps, solver, algorithm and scale; bold: above unguided."""
    scales = list(dict.fromkeys(row["scale"] for row in rows))
    header = ["steps", "solver", "guidance", "unguided", *(f"scale {scale:g}" for scale in scales)]
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        key = (row["steps"], row["solver"], row["algorithm"], f"{row['unguided']:.2f}")
        mark = "**" if row["diverged"] else ""
        lines.setdefault(key, []).append(f"{mark}{row['frechet_distance']:.2f}{mark}")
    return markdown_table(header, [[*key, *cells] for key, cells in lines.items()])


def direction_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["gradient", "scale", "accuracy", "Frechet distance", "recall"]
    lines = [
        [
            row["direction"],
            f"{row['scale']:g}",
            f"{row['top_1']:.1%}",
            f"{row['frechet_distance']:.2f}",
            f"{row['recall']:.3f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


TABLES = {
    "quality": (quality_table, "Quality of the published recipe at less cost"),
    "solvers": (
        solver_table,
        "Frechet distance by solver, {images} images per setting; bold: above that without guidance",
    ),
    "directions": (
        direction_table,
        "Changes of the gradient, {steps} steps, {images} images per setting",
    ),
    "preset": (quality_table, "The preset: a network that gets the label"),
}


def tables(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """The tables of all measured parts, in Markdown."""
    sections = []
    for part, (table, title) in TABLES.items():
        if part in results:
            rows = results[part]
            sections.append(f"## {title.format_map(rows[0])}\n\n{table(rows)}")
    return "\n".join(sections)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot accuracy, Frechet distance and recall against seconds per image."""
    from matplotlib.figure import Figure

    kinds = {
        "published": ("published recipe", "#222222", "*", 11),
        "plain": ("evaluated at each step", "#3266a8", "o", 6),
        "reuse": ("evaluated with a tolerance", "#d1603d", "o", 6),
    }
    titles = {
        "top_1": "agreement (higher is better)",
        "frechet_distance": "Frechet distance (lower is better)",
        "recall": "recall (higher is better)",
    }
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, len(METRICS))
    for axis, name in zip(axes, METRICS, strict=True):
        for kind, (label, color, marker, size) in kinds.items():
            points = [row for row in rows if row["kind"] == kind]
            x, y = [row["seconds"] for row in points], [row[name] for row in points]
            low = [max(row[name] - row[f"{name}_interval"][0], 0) for row in points]
            high = [max(row[f"{name}_interval"][1] - row[name], 0) for row in points]
            style = {"color": color, "markersize": size, "linewidth": 1, "capsize": 2}
            axis.errorbar(x, y, [low, high], fmt=marker, label=label, **style)
            for row in points:
                place = (row["seconds"], row[name])
                axis.annotate(row["steps"], place, (6, 3), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", xlabel="seconds per image; beside a mark: steps", title=titles[name])
        axis.grid(alpha=0.3)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_preset(rows: Sequence[dict[str, Any]], best: SweepSetting | None, path: Path) -> None:
    """Write the preset with its row, that of no guidance and those of plain guidance.

    Nothing is written if no guidance is better.
    """
    path.unlink(missing_ok=True)
    print(f"preset: {best or 'no guidance'}")
    if best is None:
        return
    names = ("frechet_distance", "recall", "network_evaluations", "classifier_evaluations")
    shown = [
        {
            "guidance": row["setting"],
            "agreement": row["top_1"],
            **{name: row[name] for name in (*names, "seconds")},
        }
        for row in rows
        if row["kind"] != "reuse" or row["setting"] == str(best)
    ]
    defaults = {
        name: value for name, value in best.call_arguments.items() if value != DEFAULTS[name]
    }
    content = {
        "scheduler": best.scheduler,
        "defaults": defaults,
        "rows": shown,
        "command": shlex.join(["python", *sys.argv]),
    }
    write_json(content, path)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def option(name: str, default: Any, help: str, **settings: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
        parser.add_argument(name, default=default, help=f"{help} (default: {shown})", **settings)

    several = {"type": float, "nargs": "+"}
    counts = {"type": int, "nargs": "+"}
    parser.add_argument(
        "--reference", required=True, help="labelled real images, as of `guided-diffusers sweep`"
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="a table (default: all)")
    option("--model", "fashion-mnist", "bundled model, folder or Hub id")
    option("--judge", "fashion-mnist", "a classifier that never guides")
    option("--solver", "dpmsolver++", "of quality and preset")
    option("--scale", 3.0, "of quality", type=float)
    option("--steps", [10, 15, 25], "of quality", **counts)
    option("--starts", [0.2], "`guidance_start` of quality", type=float, nargs="*")
    option(
        "--tolerances",
        [0.1, 0.2],
        "`guidance_tolerance` of quality; the first is that of preset, too",
        **several,
    )
    option("--num-images", 2000, "images per setting of quality", type=int)
    option("--repeats", 3, "turns of a timing", type=int)
    option("--solver-images", 200, "images per setting of solvers and directions", type=int)
    option("--solver-steps", [5, 10], "of solvers; the largest is that of directions", **counts)
    option("--preset-images", 1000, "images per setting of preset", type=int)
    option("--preset-steps", [15], "of preset", **counts)
    option("--preset-starts", [0.2, 0.3, 0.4, 0.5], "`guidance_start` of preset", **several)
    option("--preset-scales", [1.0, 2.0, 3.0], "of preset", **several)
    dtypes = ("float32", "bfloat16", "float16")
    option("--dtype", "bfloat16", "autocast dtype of the network", choices=dtypes)
    option("--batch-size", 100, "images at once", type=int)
    option("--device", "cpu", "cpu, cuda, ...")
    option("--output", Path("out/quality_cost"), "output folder", type=Path)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is allowed")
    return options


def main() -> None:
    options = parse_options()
    bench = Benchmark(options)
    path = options.output / "quality_cost.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    parts = {
        "quality": quality_part,
        "solvers": solvers_part,
        "directions": directions_part,
        "preset": preset_part,
    }
    for part in options.part or PARTS:
        results[part] = parts[part](bench)
    write_json(results, path)
    text = tables(results)
    write_bytes(text.encode(), options.output / "quality_cost.md")
    print(text)


if __name__ == "__main__":
    main()

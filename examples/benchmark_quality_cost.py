"""What the published recipe's quality costs: DDPM, 250 steps, Algorithm 1, a gradient at every step, against fewer.

    python examples/benchmark_quality_cost.py --reference data/fashion-mnist                  # three hours of one core
    python examples/benchmark_quality_cost.py --reference data/fashion-mnist --part solvers   # where guidance diverges
    python examples/benchmark_quality_cost.py --reference my/data --model my/pipeline --judge my/judge --device cuda

All points have the same seeds, and the network isn't told the label, so that the classifier alone steers. Each is
measured once and kept: started again, or several times at once, the benchmark goes on. It writes `quality_cost.json`,
`quality_cost.md`, two tables, and `quality_cost.png` into the output folder.

Equal quality is the published recipe's accuracy less half a point, and its Frechet distance and recall within their
bootstrap intervals. The surcharge of guidance is a run's seconds above those of the same solver and steps unguided.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from guided_diffusers.evaluation import load_network
from guided_diffusers.sampling.loading import load_pipeline
from guided_diffusers.sweep import Point, Result, Store, measure_points

SOLVERS = {name: (None, "lie_trotter", "strang") for name in (
    "ddim", "dpmsolver++", "dpmsolver++3m", "unipc", "heun", "euler")} | {"dpmsolver++-thresholding": (None,)}
SCALES = (1.0, 3.0, 5.0, 10.0, 20.0)
FIGURES = ("top_1", "frechet_distance", "recall")


@dataclass(frozen=True)
class Setting:
    """A point of the first table, and what it is there for."""

    kind: str
    point: Point


def settings(solver: str, scale: float, steps: Sequence[int], tolerances: Sequence[float], every: Sequence[int],
             ) -> Iterator[Setting]:
    yield Setting("published", Point("ddpm", 250, scale, guidance_algorithm="mean"))
    for count in steps:
        yield Setting("unguided", Point(solver, count, 0.0))
        yield Setting("plain", Point(solver, count, scale))
        for most in tolerances:
            yield Setting("spared", Point(solver, count, scale, guidance_algorithm="strang", guidance_tolerance=most))
        for k in every:
            yield Setting("spared", Point(solver, count, scale, guidance_algorithm="strang", guidance_every=k))


def solver_points(steps: int) -> Iterator[Point]:
    for solver, algorithms in SOLVERS.items():
        yield Point(solver, steps, 0.0)
        for scale in SCALES:
            for algorithm in algorithms:
                yield Point(solver, steps, scale, guidance_algorithm=algorithm)


def equal(result: Result, published: Result) -> bool:
    """Whether the quality is the published recipe's."""
    return (result.value("top_1") >= published.value("top_1") - 0.005
            and result.value("frechet_distance") <= published.ends("frechet_distance")[1]
            and result.value("recall") >= published.ends("recall")[0])


def quality_rows(found: Sequence[tuple[Setting, Result]]) -> list[dict[str, Any]]:
    """The first table."""
    seconds = {(one.kind, one.point.scheduler, one.point.num_inference_steps): result.cost["seconds"]
               for one, result in found if one.kind in ("unguided", "plain")}
    published = next((result for one, result in found if one.kind == "published"), None)
    rows = []
    for one, result in found:
        cost, place = result.cost, (one.point.scheduler, one.point.num_inference_steps)
        row = {"kind": one.kind, "setting": str(one.point), **{name: result.value(name) for name in FIGURES},
               **{f"{name}_interval": list(result.ends(name)) for name in FIGURES},
               "network_evaluations": cost["network_evaluations"],
               "classifier_evaluations": cost["classifier_evaluations"], "seconds": cost["seconds"]}
        if published is not None:
            row |= {"seconds_of_published": cost["seconds"] / published.cost["seconds"],
                    "equal_quality": equal(result, published)}
        none, plain = (seconds.get((kind, *place)) for kind in ("unguided", "plain"))
        if one.point.guidance_scale and none is not None and plain is not None:
            row["surcharge_of_plain"] = (cost["seconds"] - none) / (plain - none)
        rows.append(row)
    return rows


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| | setting | accuracy | Frechet distance | recall | network + classifier | s an image | of published | "
             "surcharge | equal |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["frechet_distance_interval"]
        share = f"{row['seconds_of_published']:.3f}" if "seconds_of_published" in row else ""
        surcharge = f"{row['surcharge_of_plain']:.2f}" if "surcharge_of_plain" in row else ""
        lines.append(f"| {row['kind']} | {row['setting']} | {row['top_1']:.1%} | {row['frechet_distance']:.2f} "
                     f"({low:.2f} to {high:.2f}) | {row['recall']:.3f} | {row['network_evaluations']:.0f} + "
                     f"{row['classifier_evaluations']:.1f} | {row['seconds']:.3f} | {share} | {surcharge} | "
                     f"{'yes' if row.get('equal_quality') else ''} |")
    return "\n".join(lines)


def solver_table(store: Store, steps: int) -> tuple[str, list[dict[str, Any]]]:
    """The second table: Frechet distances by solver, algorithm and scale; those above unguided are marked."""
    lines = ["| solver | guidance | unguided | " + " | ".join(f"scale {scale:g}" for scale in SCALES) + " |",
             "|---|---|---|" + "---|" * len(SCALES)]
    rows = []
    for solver, algorithms in SOLVERS.items():
        none = store.read(store.path(Point(solver, steps, 0.0)))
        for algorithm in algorithms:
            cells = []
            for scale in SCALES:
                result = store.read(store.path(Point(solver, steps, scale, guidance_algorithm=algorithm)))
                if none is None or result is None:
                    cells.append("")
                    continue
                value, base = result.value("frechet_distance"), none.value("frechet_distance")
                worse = not value <= base
                cells.append(f"**{value:.2f}**" if worse else f"{value:.2f}")
                rows.append({"solver": solver, "algorithm": algorithm or "output", "scale": scale,
                             "frechet_distance": value, "unguided": base, "diverged": worse,
                             "top_1": result.value("top_1")})
            base = "" if none is None else f"{none.value('frechet_distance'):.2f}"
            lines.append(f"| {solver} | {algorithm or 'output'} | {base} | " + " | ".join(cells) + " |")
    return "\n".join(lines), rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy, Frechet distance and recall against seconds an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in rows) if kind != "unguided"]
    titles = {"top_1": "accuracy by the judge", "frechet_distance": "Frechet distance", "recall": "recall"}
    for axis, name in zip(axes, FIGURES, strict=True):
        for kind in kinds:
            its = [row for row in rows if row["kind"] == kind]
            values = [row[name] for row in its]
            ends = [[max(value - row[f"{name}_interval"][0], 0) for value, row in zip(values, its, strict=True)],
                    [max(row[f"{name}_interval"][1] - value, 0) for value, row in zip(values, its, strict=True)]]
            axis.errorbar([row["seconds"] for row in its], values, ends, fmt="o" if kind != "published" else "*",
                          markersize=11 if kind == "published" else 6, linewidth=1, capsize=2, label=kind)
        axis.set(xscale="log", xlabel="seconds an image", title=titles[name])
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", default="fashion-mnist", help="a bundled model, a folder or a Hub id (default: %(default)s)")
    option("--reference", required=True, help="labelled real images, as of `guided-diffusers sweep`")
    option("--judge", default="fashion-mnist", help="a classifier that never guided (default: %(default)s)")
    option("--part", choices=("quality", "solvers"), action="append", help="one of the two tables (default: both)")
    option("--solver", default="dpmsolver++", help="of the first table (default: %(default)s)")
    option("--scale", type=float, default=3.0, help="of the first table (default: %(default)s)")
    option("--steps", type=int, nargs="+", default=[10, 15, 25], help="of the first table (default: 10 15 25)")
    option("--tolerances", type=float, nargs="*", default=[0.05, 0.1], help="`guidance_tolerance` (default: 0.05 0.1)")
    option("--every", type=int, nargs="*", default=[], help="`guidance_every` (default: none)")
    option("--num-images", type=int, default=2000, help="of a point of the first table (default: %(default)s)")
    option("--solver-images", type=int, default=100, help="of the second table (default: %(default)s)")
    option("--solver-steps", type=int, default=10, help="of the second table (default: %(default)s)")
    option("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"),
           help="what the network computes in (default: %(default)s)")
    option("--batch-size", type=int, default=100, help="images at once (default: %(default)s)")
    option("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    option("--output", type=Path, default=Path("out/quality_cost"), help="a folder (default: %(default)s)")
    option("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()

    device = torch.device(options.device)
    pipeline, judge = load_pipeline(options.model).to(device), load_network(options.judge, device)
    shared = {"conditional": None if pipeline.config.id2label is None or not pipeline.unet.config.get(
        "num_class_embeds") else False, "dtype": options.dtype, "batch_size": options.batch_size,
        "model": options.model, "progress": not options.quiet}
    parts, figures, text = options.part or ["quality", "solvers"], {}, []
    if "quality" in parts:
        wanted = list(settings(options.solver, options.scale, options.steps, options.tolerances, options.every))
        wanted = wanted[1:] + wanted[:1]  # the published recipe takes longest
        store = measure_points(pipeline, [one.point for one in wanted], options.reference, options.output / "quality",
                               judge, judge, num_images=options.num_images, **shared)
        figures["quality"] = quality_rows([(one, store.read(store.path(one.point))) for one in wanted])
        text.append(quality_table(figures["quality"]))
        draw(figures["quality"], options.output / "quality_cost.png")
    if "solvers" in parts:
        store = measure_points(pipeline, list(solver_points(options.solver_steps)), options.reference,
                               options.output / "solvers", judge, judge, num_images=options.solver_images, **shared)
        table, figures["solvers"] = solver_table(store, options.solver_steps)
        text.append(table)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "quality_cost.json").write_text(json.dumps(figures, indent=2) + "\n")
    (options.output / "quality_cost.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()

"""Light classifiers that learned from a larger one: what their gradients cost, and what they guide to.

    sh training/fashion_mnist_student.sh                                # trains them
    python examples/benchmarks/students.py --reference data/fashion-mnist \\
        --classifiers bundled=src/guided_diffusers/bundled/fashion-mnist/classifier half=out/students/half
    python examples/benchmarks/students.py --reference data/fashion-mnist \\
        --configs training/configs/students/*.json                      # untrained: only what they cost
    python examples/benchmarks/students.py ... --num-images 200 --settings label-15

The settings are the bundled preset's (`label-15`: the network gets the label, 15 steps, guidance from 40% of the run
on, scale 1), the same in 25 steps, and those of a network that doesn't get the label (`null-15`, `null-25`: from 20%,
scale 3); all evaluate the classifier by `guidance_tolerance=0.1`. For each classifier and setting: agreement, Frechet
distance and recall of the same seeds, with intervals, and the surcharge: CPU seconds of a batch with guidance over
those of the same batch without, less 1, in turns; the median of --repeats turns and their smallest and largest. A
gradient is log p(y | x_t)'s in x_t, of a batch, over a forward pass of the diffusion model, in turns, too. Run it again
to resume. Writes `students.json` and `students.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality_cost import METRICS, Benchmark
from recipes_table import named_folder

from guided_diffusers import ClassifierGuidance, NoiseAwareClassifier
from guided_diffusers.files import write_bytes, write_json
from guided_diffusers.guidance import gradient
from guided_diffusers.speed import computing_in
from guided_diffusers.sweep import SweepSetting
from guided_diffusers.sweep.measure import DTYPES
from guided_diffusers.text import markdown_table

SOLVER = "dpmsolver++"
SETTINGS = {
    f"{kind}-{steps}": SweepSetting(SOLVER, steps, scale, start, guidance_tolerance=0.1)
    for kind, scale, start in (("label", 1.0, 0.4), ("null", 3.0, 0.2))
    for steps in (15, 25)
}


def cpu_time(function: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def relative_cost(bench: Benchmark) -> float:
    """Time of a gradient over that of a forward pass of the network, median of turns."""
    options, pipeline = bench.options, bench.pipeline
    count = options.batch_size
    size = pipeline.unet.config.sample_size
    x = torch.randn(count, pipeline.unet.config.in_channels, size, size)
    labels = {"class_labels": torch.zeros(count, dtype=torch.long)} if bench.takes_label else {}
    term = ClassifierGuidance(pipeline.classifier, 0)

    def guide() -> torch.Tensor:
        return gradient(lambda z: term.log_probability(z, 500.0), x)

    ratios = []
    pipeline.classifier.requires_grad_(False)
    with torch.no_grad(), computing_in(pipeline.unet, DTYPES[options.dtype]):
        for _ in range(options.repeats + 1):  # the first turn warms up
            network = cpu_time(lambda: pipeline.unet(x, 500, **labels))
            ratios.append(cpu_time(guide) / network)
    return statistics.median(ratios[1:])


def cost(bench: Benchmark) -> dict[str, float]:
    """Number of parameters of the classifier, and what its gradient costs."""
    parameters = sum(parameter.numel() for parameter in bench.pipeline.classifier.parameters())
    return {"parameters": parameters, "relative_cost": relative_cost(bench)}


def surcharges(bench: Benchmark, point: SweepSetting, give_label: bool) -> list[float]:
    """Time with guidance over that without, less 1, of each turn."""
    conditional, turns = bench.conditional(give_label), []
    with computing_in(bench.pipeline.unet, DTYPES[bench.options.dtype]):
        for _ in range(bench.options.repeats):
            unguided = bench.time_batch(point.unguided, conditional)
            turns.append(bench.time_batch(point, conditional) / unguided - 1)
    return turns


def measure(bench: Benchmark, name: str, setting: str) -> dict[str, Any]:
    """A row of the table."""
    point, options, give_label = SETTINGS[setting], bench.options, setting.startswith("label")
    folder = f"{name}/{'label' if give_label else 'null'}"
    result = bench.measure([point], folder, options.num_images, give_label)[0]
    turns = surcharges(bench, point, give_label)
    return {
        "classifier": name,
        "setting": setting,
        "images": options.num_images,
        **{metric: result.value(metric) for metric in METRICS},
        **{f"{metric}_interval": list(result.interval(metric)) for metric in METRICS},
        "classifier_evaluations": result.cost["classifier_evaluations"],
        "surcharge": statistics.median(turns),
        "surcharge_range": [min(turns), max(turns)],
    }


def table(rows: list[dict[str, Any]], classifiers: dict[str, dict[str, float]]) -> str:
    header = ["setting", "classifier", "parameters", "gradient / forward pass", "agreement"]
    header += ["Frechet distance", "recall", "evaluations", "surcharge"]
    lines = []
    for row in sorted(rows, key=lambda row: list(SETTINGS).index(row["setting"])):
        cells = [row["setting"], row["classifier"]]
        known = classifiers[row["classifier"]]
        cells += [f"{known['parameters']:,}", f"{known['relative_cost']:.2f}"]
        for metric, form in zip(METRICS, (".1%", ".2f", ".3f"), strict=True):
            low, high = row[f"{metric}_interval"]
            cells.append(f"{row[metric]:{form}} ({low:{form}} to {high:{form}})")
        low, high = row["surcharge_range"]
        cells.append(f"{row['classifier_evaluations']:.1f}")
        cells.append(f"{row['surcharge']:.1%} ({low:.1%} to {high:.1%})")
        lines.append(cells)
    return markdown_table(header, lines)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--reference", required=True, help="labelled real images")
    named = {"type": named_folder, "nargs": "+", "default": []}
    option("--classifiers", **named, metavar="NAME=FOLDER", help="classifiers to compare")
    option("--configs", nargs="+", type=Path, default=[], help="JSON files of architectures")
    option("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    option("--model", default="fashion-mnist", help="bundled model, folder or Hub id")
    option("--judge", default="fashion-mnist", help="a classifier that never guides")
    option("--num-images", type=int, default=2000, help="images per setting")
    option("--repeats", type=int, default=7, help="turns of a timing")
    option("--dtype", default="bfloat16", choices=list(DTYPES), help="autocast dtype")
    option("--batch-size", type=int, default=100)
    option("--device", default="cpu")
    option("--output", type=Path, default=Path("out/students"))
    option("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    path = options.output / "students.json"
    results = json.loads(path.read_text()) if path.exists() else {"classifiers": {}, "rows": []}
    for config in options.configs:
        bench = Benchmark(options)
        pipeline, name = bench.pipeline, f"{config.stem}, untrained"
        shared = {"num_labels": len(pipeline.config.id2label), "power_range": (1.0, 8.0)}
        shared |= {key: pipeline.unet.config[key] for key in ("sample_size", "in_channels")}
        classifier = NoiseAwareClassifier(**shared, **json.loads(config.read_text()))
        pipeline.register_modules(classifier=classifier.to(options.device).eval())
        results["classifiers"][name] = cost(bench)
        write_json(results, path)
        print(name, results["classifiers"][name], flush=True)
    for name, folder in options.classifiers:
        bench = Benchmark(options)
        classifier = NoiseAwareClassifier.from_pretrained(folder).to(options.device)
        bench.pipeline.register_modules(classifier=classifier)
        if name not in results["classifiers"]:
            results["classifiers"][name] = cost(bench)
            write_json(results, path)
        done = {row["setting"] for row in results["rows"] if row["classifier"] == name}
        for setting in [setting for setting in options.settings if setting not in done]:
            results["rows"].append(measure(bench, name, setting))
            write_json(results, path)
            print(results["rows"][-1], flush=True)
    text = table(results["rows"], results["classifiers"])
    write_bytes(text.encode(), options.output / "students.md")
    print(text)


if __name__ == "__main__":
    main()

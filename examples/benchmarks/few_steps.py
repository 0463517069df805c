"""Few evaluations of the network: timesteps and guidance scales found by a search, without training.

    python examples/benchmarks/few_steps.py --data data/fashion-mnist --search 2 4 8 --output out/few_steps
    python examples/benchmarks/few_steps.py --data data/fashion-mnist --output out/few_steps
    python examples/benchmarks/few_steps.py --data my/data --model my/pipeline --search 4 --output out/mine

The first command searches for each number of steps: the timesteps (`timesteps=` of the pipeline's call) and a
guidance scale for each of them (a function of the noise level, `scale=` of `ClassifierGuidance`), and tries
DPM-Solver++ of order 1 (DDIM) and 2. It minimises the Frechet distance to training images, plus --penalty times what
the agreement lacks of --agreement, by changes of random size of a random half of the numbers, of which the opposite is
tried, too ((1+1) evolution strategy with mirrored steps). Its seeds are other ones than those of the second command,
which measures the settings found and the even spacing with one scale, of the same seeds, against the test images, with
95% bootstrap intervals. The network doesn't get the label, so only the classifier steers. Run it again to resume.
Writes `found.json`, `few_steps.json` and `few_steps.md`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from guidance_table import CallArguments, Judge, generate, quality

from guided_diffusers import (
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    NoiseAwareClassifier,
)
from guided_diffusers.bundled import folder
from guided_diffusers.evaluation.metrics import (
    bootstrap_frechet_distances,
    bootstrap_weights,
    confidence_interval,
    frechet_distance,
)
from guided_diffusers.files import write_bytes, write_json
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.noise import NoiseLevel, TrainedSchedule, schedule_config
from guided_diffusers.speed import computing_in
from guided_diffusers.sweep.measure import DTYPES
from guided_diffusers.text import markdown_table

TUNING_SEED = 10**6
REAL_IMAGES = 10_000  # at most, of a split
#: smallest distance of two timesteps, as a share of the schedule's length
GAP = 0.02
MAX_SEARCH = 30  # steps; more, evenly spaced, are nearly as near as `GAP`


class ScaleByTimestep:
    """The guidance scale of the nearest of the timesteps, as a function of the noise level."""

    def __init__(self, schedule: TrainedSchedule, timesteps: list[int], scales: list[float]):
        self.schedule, self.timesteps, self.scales = schedule, timesteps, scales

    def __call__(self, level: NoiseLevel) -> float:
        t = self.schedule.timestep(level)
        return min(zip(self.timesteps, self.scales, strict=True), key=lambda p: abs(p[0] - t))[1]


class FewSteps:
    """The pipeline, the judge, and the features of the real images."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        parts = {}
        if options.classifier is not None:
            parts["classifier"] = NoiseAwareClassifier.from_pretrained(options.classifier)
        self.pipeline = ClassifierGuidedPipeline.from_pretrained(
            options.model, defaults={}, **parts
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.last = self.pipeline.scheduler.config.num_train_timesteps - 1
        self.schedule = TrainedSchedule(schedule_config(self.pipeline.classifier))
        self.judge = Judge(options.model / "judge")
        self.data = load_splits(options.data)

    def real_features(self, split: str) -> torch.Tensor:
        images = LabelledImages(self.data[split], resolution=self.pipeline.unet.config.sample_size)
        count = min(len(images), REAL_IMAGES)
        return self.judge(torch.stack([images[i]["pixel_values"] for i in range(count)]))[1]

    def images(
        self, setting: dict[str, Any], count: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """Images of a setting, their labels, and their cost."""
        options = argparse.Namespace(**vars(self.options))
        labels = len(self.pipeline.config.id2label)
        options.images_per_label, options.seed = -(-count // labels), seed
        options.num_inference_steps = None
        config = self.pipeline.scheduler.config
        self.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="dpmsolver++", solver_order=setting["solver_order"]
        )
        classifier = self.pipeline.classifier
        scale = ScaleByTimestep(self.schedule, setting["timesteps"], setting["scales"])
        fixed = {"conditional": False, "guidance_scale": 0.0, "timesteps": setting["timesteps"]}

        def arguments(indices: list[int], labels: list[int]) -> dict[str, Any]:
            return {**fixed, "guidance": ClassifierGuidance(classifier, labels, scale)}

        call: CallArguments = arguments
        with computing_in(self.pipeline.unet, DTYPES[options.dtype]):
            images, targets, cost = generate(self.pipeline, call, classifier, options)
        return ((images + 1) * 127.5).round() / 127.5 - 1, targets, cost

    # ------------------------------------------------------------ the search

    def objective(self, setting: dict[str, Any], real: torch.Tensor) -> dict[str, float]:
        options = self.options
        images, targets, _ = self.images(setting, options.search_images, TUNING_SEED)
        predicted, features = self.judge(images)
        agreement = float((predicted == targets).float().mean())
        distance = frechet_distance(real, features)
        value = distance + options.penalty * max(0.0, options.agreement - agreement)
        return {"value": value, "frechet_distance": distance, "agreement": agreement}

    def search(self, steps: int, real: torch.Tensor) -> dict[str, Any]:
        """The best setting of so many steps, with its metrics on the tuning seeds."""
        rng, guesses = random.Random(steps), []
        for order in {1, min(steps, 2)}:
            guesses.append({"solver_order": order, **first_guess(steps, self.last)})
            guesses[-1]["tuning"] = self.objective(guesses[-1], real)
            print(steps, guesses[-1], flush=True)
        best = min(guesses, key=lambda setting: setting["tuning"]["value"])
        size, left = 1.0, self.options.evaluations
        while left > 0:
            changes = [rng.gauss(0, size) * (rng.random() < 0.5) for _ in range(2 * steps)]
            improved = False
            for sign in (1, -1):
                setting = changed(best, [sign * change for change in changes], self.last)
                if setting is None or setting == best:
                    continue
                setting["tuning"], left = self.objective(setting, real), left - 1
                if setting["tuning"]["value"] < best["tuning"]["value"]:
                    best, improved = setting, True
                    print(steps, best, flush=True)
                    break
            size = min(1.2 * size, 2.0) if improved else max(0.9 * size, 0.1)
        return best | {"first_guesses": [guess["tuning"] for guess in guesses]}

    # ------------------------------------------------------------ the measurement

    def measure(self, setting: dict[str, Any], real: torch.Tensor) -> dict[str, Any]:
        """Metrics of the measured seeds, with intervals."""
        images, targets, cost = self.images(setting, self.options.num_images, 0)
        metrics, correct = quality(self.judge, images, targets, real)
        features = self.judge(images)[1]
        weights = bootstrap_weights(len(features), 200, 0)
        mean, covariance = real.double().mean(dim=0), torch.cov(real.double().T)
        distances = bootstrap_frechet_distances((mean, covariance), features, weights)
        means = weights @ correct.double() / weights.sum(dim=1)
        intervals = {
            "frechet_distance": confidence_interval(metrics["frechet_distance"], distances, low=0),
            "agreement": confidence_interval(metrics["agreement"], means, low=0, high=1),
        }
        lists = {f"{name}_interval": list(ends) for name, ends in intervals.items()}
        return {**metrics, **lists, **cost, "images": len(images)}


def first_guess(steps: int, last: int) -> dict[str, Any]:
    """Even spacing of the timesteps, shifted to less noise, and scale 3."""
    timesteps = [round(last * (0.93 - 0.8 * i / max(steps - 1, 1))) for i in range(steps)]
    return {"timesteps": timesteps, "scales": [3.0] * steps}


def changed(setting: dict[str, Any], changes: list[float], last: int) -> dict[str, Any] | None:
    """The setting with other timesteps and scales; None if the timesteps don't fall."""
    steps = len(setting["timesteps"])
    pairs = zip(setting["timesteps"], changes[:steps], strict=True)
    timesteps = [round(t + 0.04 * last * change) for t, change in pairs]
    pairs = zip(setting["scales"], changes[steps:], strict=True)
    scales = [round(scale + change, 3) for scale, change in pairs]
    gaps = [a - b for a, b in zip(timesteps, [*timesteps[1:], 0], strict=True)]
    if timesteps[0] > last or min(gaps[:-1], default=last) < GAP * last or gaps[-1] < 0:
        return None
    if min(scales) < 0:
        return None
    return {"solver_order": setting["solver_order"], "timesteps": timesteps, "scales": scales}


def even(steps: int, last: int, scale: float, order: int) -> dict[str, Any]:
    """Trailing timesteps, one scale, as without a search."""
    timesteps = [round((last + 1) * (1 - i / steps)) - 1 for i in range(steps)]
    return {"solver_order": order, "timesteps": timesteps, "scales": [scale] * steps}


def table(rows: dict[str, Any]) -> str:
    header = ["evaluations", "timesteps", "guidance scales", "agreement", "Frechet distance"]
    lines = []
    for name, row in rows.items():
        low, high = row["frechet_distance_interval"]
        first, last = row["agreement_interval"]
        is_even = name.startswith("even")
        timesteps = "even" if is_even else ", ".join(map(str, row["timesteps"]))
        scales = (
            f"{row['scales'][0]:g}" if is_even else ", ".join(f"{s:.1f}" for s in row["scales"])
        )
        cells = [f"{row['network_evaluations']:.0f} + {row['guide_evaluations']:.0f}"]
        cells += [f"{timesteps}, order {row['solver_order']}", scales]
        cells.append(f"{row['agreement']:.1%} ({first:.1%} to {last:.1%})")
        cells.append(f"{row['frechet_distance']:.2f} ({low:.2f} to {high:.2f})")
        lines.append([*cells, f"{row['recall']:.3f}"])
    return markdown_table([*header, "recall"], lines)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--data", required=True, help="labelled dataset, with training and test images")
    option("--model", type=Path, default=folder("fashion-mnist"), help="pipeline folder with judge")
    option("--classifier", type=Path, help="another classifier than the model's")
    option("--search", type=int, nargs="+", help="numbers of steps to search for; then it ends")
    option("--evaluations", type=int, default=60, help="of a search (default: %(default)s)")
    option("--search-images", type=int, default=250, help="of an evaluation")
    option("--agreement", type=float, default=0.93, help="wanted in the search")
    option("--penalty", type=float, default=5.0, help="per unit of missing agreement")
    option("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 15], help="to measure")
    option("--scale", type=float, default=3.0, help="of even spacing")
    option("--num-images", type=int, default=2000, help="to measure")
    option("--batch-size", type=int, default=100)
    option("--dtype", default="bfloat16", choices=list(DTYPES), help="autocast dtype")
    option("--output", type=Path, default=Path("out/few_steps"))
    options = parser.parse_args()
    if options.search and not 1 <= min(options.search) <= max(options.search) <= MAX_SEARCH:
        parser.error(f"--search {options.search}: 1 to {MAX_SEARCH} steps are allowed")
    return options


def main() -> None:
    options = parse_options()
    few = FewSteps(options)
    found_path, path = options.output / "found.json", options.output / "few_steps.json"
    found = json.loads(found_path.read_text()) if found_path.exists() else {}
    if options.search:
        real = few.real_features("train")
        for steps in options.search:
            if str(steps) not in found:
                found[str(steps)] = few.search(steps, real)
                write_json(found, found_path)
        return
    rows = json.loads(path.read_text()) if path.exists() else {}
    real = few.real_features("test")
    for steps in options.steps:
        settings = {
            f"even-{steps}": even(steps, few.last, options.scale, min(2, steps)),
            f"found-{steps}": found.get(str(steps)),
        }
        for name, setting in settings.items():
            if setting is not None and name not in rows:
                rows[name] = setting | few.measure(setting, real)
                write_json(rows, path)
                print(name, rows[name], flush=True)
    write_bytes(table(rows).encode(), options.output / "few_steps.md")
    print(table(rows))


if __name__ == "__main__":
    main()

"""A learned guidance schedule against the search by hand, at equal numbers of evaluations.

    python examples/benchmarks/learned_schedule.py                                          # --part exact: seconds
    python examples/benchmarks/learned_schedule.py --part model --reference data/fashion-mnist   # hours of one core

exact   30 one-dimensional problems in which the denoiser is exact and the classifier's gradient is too small by a
        factor that depends on the noise level, so that the best weight isn't constant. Images are 1,000 numbers, six
        steps of DDIM; the distance is the squared Wasserstein distance to the label's distribution. Compared at equal
        numbers of evaluations: the grid of a hand search (constant scales, in the whole run and without its end),
        Nelder and Mead's simplex (`sweep --learn`), a (1+1) evolution strategy with the 1/5 rule, and SPSA; each fits
        four scales.
        The table has the geometric mean over the problems.
model   `sweep` of a pipeline: a grid of --evaluations settings (scales, in the whole run and from 20% and 40% on), and
        `sweep --learn 4` with as many evaluations, each of --images images. The best of the grid by the sliced
        Wasserstein distance, and the learned schedule, are then measured on other seeds, in the folder --output/final.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from guided_diffusers.evaluation import load_network
from guided_diffusers.sweep import SweepSetting, measure_points, nelder_mead, sweep
from guided_diffusers.text import markdown_table
from guided_diffusers.utils import load_pipeline, scheduler_name

KNOTS, IMAGES, STEPS = 4, 1000, 6
Objective = Callable[[Sequence[float]], float]


def exact_problem(seed: int) -> Objective:
    """Distance of guided samples as a function of the weights at `KNOTS` noise levels."""
    random = np.random.default_rng(seed)
    means = np.array([-1.5, 1.0]) + 0.5 * random.standard_normal(2)
    stds = np.array([0.8, 0.6])
    sigmas = np.append(np.geomspace(20, 0.05, STEPS), 0.0)
    noise = random.standard_normal(IMAGES)
    truth = np.sort(means[1] + stds[1] * random.standard_normal(20_000))
    quantiles = np.quantile(truth, (np.arange(IMAGES) + 0.5) / IMAGES)
    knots = np.log(np.geomspace(0.05, 20, KNOTS))

    def distance(scales: Sequence[float]) -> float:
        x = noise * sigmas[0]
        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
            variances = stds**2 + sigma**2
            log_parts = -((x[:, None] - means) ** 2) / 2 / variances - np.log(variances) / 2
            shares = np.exp(log_parts - np.logaddexp(*log_parts.T)[:, None])
            scores = (means - x[:, None]) / variances
            score = (shares * scores).sum(1)
            gradient = (0.3 + 0.5 * np.sin(seed + np.log(sigma)) ** 2) * (scores[:, 1] - score)
            weight = np.interp(np.log(sigma), knots, np.abs(scales))
            x = x + (sigma - next_sigma) * sigma * (score + weight * gradient)
        return float(np.mean((np.sort(x) - quantiles) ** 2))

    return distance


def hand_search(function: Objective, evaluations: int) -> float:
    values = []
    for scale in np.geomspace(0.5, 10, evaluations // 2):
        values += [function(scale * np.array(on)) for on in ([1, 1, 1, 1], [0, 1, 1, 1])]
    return min(values)


def simplex(function: Objective, evaluations: int) -> float:
    values = []

    def kept(scales: Sequence[float]) -> float:
        values.append(function(scales))
        return values[-1]

    nelder_mead(kept, [1.0] * KNOTS, 1.0, evaluations)
    return min(values)


def evolution(function: Objective, evaluations: int, seed: int = 0) -> float:
    """(1+1) evolution strategy with the 1/5 rule for its step."""
    random, x, step = np.random.default_rng(seed), np.ones(KNOTS), 1.0
    value = function(x)
    for _ in range(evaluations - 1):
        candidate = x + step * random.standard_normal(KNOTS)
        new = function(candidate)
        if new <= value:
            x, value, step = candidate, new, 1.5 * step
        else:
            step *= 1.5**-0.25
    return value


def spsa(function: Objective, evaluations: int, seed: int = 0) -> float:
    """Spall's simultaneous perturbation, with a third evaluation of each new point; its first step
    has length 4^-0.602 = 0.43 in each coordinate."""
    random, x, best, rate = np.random.default_rng(seed), np.ones(KNOTS), np.inf, None
    for k in range(evaluations // 3):
        signs, width = random.choice([-1.0, 1.0], KNOTS), 0.3 / (k + 1) ** 0.101
        slope = (function(x + width * signs) - function(x - width * signs)) / 2
        rate = 1 / max(abs(slope), 1e-9) if rate is None else rate
        x = x - rate / (k + 4) ** 0.602 * slope * signs
        best = min(best, function(x))
    return best


def exact_part() -> str:
    methods = {
        "search by hand": hand_search,
        "Nelder-Mead": simplex,
        "(1+1) evolution strategy": evolution,
        "SPSA": spsa,
    }
    rows = []
    for evaluations in (16, 24, 40, 80):
        row = [str(evaluations)]
        for method in methods.values():
            values = [method(exact_problem(seed), evaluations) for seed in range(30)]
            row.append(f"{np.exp(np.mean(np.log(values))):.4f}")
        rows.append(row)
    return markdown_table(["evaluations", *methods], rows)


def model_part(options: argparse.Namespace) -> str:
    pipeline = load_pipeline(options.model)
    network = load_network(options.model)
    run = {"num_images": options.images, "conditional": options.conditional}
    count, scheduler = options.evaluations, scheduler_name(pipeline.scheduler)
    grid = [
        SweepSetting(scheduler, options.steps, float(f"{scale:.3g}"), start)
        for start in (0.0, 0.2, 0.4)
        for scale in np.geomspace(0.5, 8, count // 3)
    ]
    store = measure_points(
        pipeline, grid, options.reference, options.output / "hand", network, network, seed=1, **run
    )
    by_hand = min(grid, key=lambda s: store.read(store.path(s)).value("sliced_wasserstein"))
    fit = {"steps": [options.steps], "scales": [0], "learn": KNOTS, "evaluations": count}
    sweep(pipeline, options.reference, options.output / "learned", network, network, **fit, **run)
    paths = (options.output / "learned" / "points").glob("*schedule*.json")
    final = {**run, "num_images": options.final_images, "seed": 2}
    learned = [SweepSetting(**read_point(path)) for path in paths]
    settings = [by_hand.unguided, by_hand, *learned]
    store = measure_points(
        pipeline, settings, options.reference, options.output / "final", network, network, **final
    )
    names = ("top_1", "frechet_distance", "sliced_wasserstein", "recall")
    rows = []
    for setting in settings:
        result = store.read(store.path(setting))
        rows.append([str(setting), *(result.full_text(name) for name in names)])
    return markdown_table(["setting", "agreement", "Frechet", "sliced Wasserstein", "recall"], rows)


def read_point(path: Path) -> dict:
    return json.loads(path.read_text())["point"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--part", choices=("exact", "model"), default="exact")
    option("--reference", help="for the model: real images, a Hub dataset or a folder")
    option("--model", default="fashion-mnist", help="a bundled model (default: %(default)s)")
    option("--steps", type=int, default=15, help="(default: %(default)s)")
    option("--evaluations", type=int, default=30, help="(default: %(default)s)")
    option("--images", type=int, default=500, help="of an evaluation (default: %(default)s)")
    option("--final-images", type=int, default=2000, help="(default: %(default)s)")
    option("--conditional", action=argparse.BooleanOptionalAction, help="as of `sweep`")
    option("--output", type=Path, default=Path("out/learned_schedule"), help="(%(default)s)")
    options = parser.parse_args()
    if options.part == "model" and options.reference is None:
        parser.error("--part model needs --reference")
    print(exact_part() if options.part == "exact" else model_part(options))


if __name__ == "__main__":
    main()

"""Populations of particles: is the evidence unbiased, is it log p(y) of real images, and what do they cost?

    python examples/benchmarks/populations.py --part closed-form   # two minutes of a core
    python examples/benchmarks/populations.py --part labels        # the bundled model: half an hour
    python examples/benchmarks/populations.py --part cost

closed-form: four Gaussians at the corners of a square, of which one has the label: p(y) = 1/4 by symmetry, also of the
samples of any scheduler. The mean of exp(log_evidence) of many populations, and how many standard errors it is from
1/4. labels: the bundled Fashion-MNIST model without the label, whose labels are equally frequent; the median
log_evidence of a few populations, against log 0.1. cost: CPU time of a call with particles over one of the same images
without, both of the same steps, in turns; the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import time
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    SchedulerMixin,
)
from powers import BETAS, ExactClassifier, ExactNetwork, Mixture
from tqdm.auto import tqdm

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.files import write_json
from guided_diffusers.speed import optimize
from guided_diffusers.utils import scheduler_for

SCHEDULERS: dict[str, tuple[SchedulerMixin, dict[str, Any]]] = {
    "DDPM": (DDPMScheduler(**BETAS, clip_sample=False), {}),
    "DDIM, eta 1, trailing": (
        DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"),
        {"eta": 1.0},
    ),
    "EulerAncestral": (EulerAncestralDiscreteScheduler(**BETAS), {}),
    "SDE-DPM-Solver++ (2)": (
        DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++"),
        {},
    ),
}
CORNERS = [
    (0, 0.25, [1.0, 1.0], 0.5),
    (1, 0.25, [1.0, -1.0], 0.5),
    (1, 0.25, [-1.0, 1.0], 0.5),
    (1, 0.25, [-1.0, -1.0], 0.5),
]


def closed_form(populations: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """Mean evidence by scheduler, number of particles, and whether they are resampled at the end."""
    mixture, rows = Mixture(CORNERS), []
    print(f"{'':24} {'K':>3} resample   mean evidence   standard errors from 1/4   ancestors")
    for name, (scheduler, call) in SCHEDULERS.items():
        pipeline = ClassifierGuidedPipeline(
            ExactNetwork(mixture), scheduler, ExactClassifier(mixture)
        )
        pipeline.set_progress_bar_config(disable=True)
        for particles in (4, 64):
            for resample in (True, False):
                result = pipeline(
                    0,
                    populations * particles,
                    particles=particles,
                    resample=resample,
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(seed + particles + 1000 * resample),
                    output_type="latent",
                    **call,
                )
                evidence = result.log_evidence.exp()
                error = float(evidence.std()) / populations**0.5
                ancestors = [len(set(row)) for row in result.ancestors.tolist()]
                row = {
                    "scheduler": name,
                    "particles": particles,
                    "resample": resample,
                    "evidence": float(evidence.mean()),
                    "error": error,
                    "deviation": (float(evidence.mean()) - 0.25) / error,
                    "ancestors": sum(ancestors) / populations,
                }
                rows.append(row)
                print(
                    f"{name:24} {particles:3d} {resample!s:8} {row['evidence']:8.4f} +- {error:.4f} "
                    f"{row['deviation']:17.1f} {row['ancestors']:20.1f}",
                    flush=True,
                )
    return rows


def bundled(scheduler: str) -> ClassifierGuidedPipeline:
    pipeline = ClassifierGuidedPipeline.from_bundled()
    pipeline.scheduler = scheduler_for(pipeline.scheduler, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def labels(particles: int, repeats: int, steps: int, scheduler: str, seed: int) -> dict[str, Any]:
    """log_evidence, effective sample size and ancestors of each label's populations."""
    pipeline, names = bundled(scheduler), ("log_evidence", "effective_sample_size", "ancestors")
    table: dict[str, dict[str, list[float]]] = {}
    call = {"conditional": False, "num_inference_steps": steps, "output_type": "latent"}
    with optimize(pipeline, batch_size=particles * repeats) as chosen:
        print(chosen)
        for label in tqdm(range(10)):
            generator, name = (
                torch.Generator().manual_seed(seed + label),
                pipeline.config.id2label[label],
            )
            result = pipeline(
                label, particles * repeats, particles=particles, generator=generator, **call
            )
            row = table[name] = {column: getattr(result, column).tolist() for column in names}
            row["ancestors"] = [len(set(of_population)) for of_population in row["ancestors"]]
            middle = median(row["log_evidence"])
            tqdm.write(
                f"{name:12} median log evidence {middle:6.2f} ({middle - log(0.1):+.2f} from log 0.1); "
                f"all {', '.join(f'{value:.2f}' for value in row['log_evidence'])}; effective size "
                f"{median(row['effective_sample_size']):.1f}, ancestors {median(row['ancestors'])}"
            )
    return {"particles": particles, "steps": steps, "scheduler": scheduler, "labels": table}


def cost(particles: int, pairs: int, steps: int) -> dict[str, Any]:
    """CPU seconds of one population with its weights and of the same images without."""
    pipeline, times = bundled("ddpm"), {"with": [], "without": []}
    call = {"conditional": False, "num_inference_steps": steps, "guidance_scale": 1.0}
    # of the same steps without particles, all are guided, and evaluated, too
    without = {"guidance_start": 0.0, "guidance_every": 1, "guidance_algorithm": "mean"}
    for pair in tqdm(range(pairs + 1)):  # the first warms up
        for name, more in (("with", {"particles": particles}), ("without", without))[
            :: (-1) ** pair
        ]:
            generator = [torch.Generator().manual_seed(i) for i in range(particles)]
            start = time.process_time()
            pipeline(7, particles, generator=generator, **call, **more)
            times[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)][1:]
    print(f"with over without particles: median {median(ratios):.3f} of {pairs} pairs")
    print(
        f"  from {min(ratios):.3f} to {max(ratios):.3f}; {median(times['without']):.2f} s without"
    )
    return {"particles": particles, "steps": steps, "ratio": median(ratios), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--part", choices=("closed-form", "labels", "cost"), required=True)
    for flag, kind, default, text in (
        ("--populations", int, 1000, "of each row of closed-form"),
        ("--particles", int, 32, "of labels and cost"),
        ("--repeats", int, 5, "populations of each label, pairs of calls of cost"),
        ("--steps", int, 25, "of a run"),
        ("--scheduler", str, "ddpm", "of labels"),
        ("--seed", int, 0, "of the noise"),
        ("--output", Path, Path("out/populations"), "folder of PART.json"),
    ):
        option(flag, type=kind, default=default, help=f"{text} (default: %(default)s)")
    options = parser.parse_args()
    if options.part == "closed-form":
        results: Any = closed_form(options.populations, options.steps, options.seed)
    elif options.part == "labels":
        names = ("particles", "repeats", "steps", "scheduler", "seed")
        results = labels(*(getattr(options, name) for name in names))
    else:
        results = cost(options.particles, options.repeats, options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(results, options.output / f"{options.part}.json")


if __name__ == "__main__":
    main()

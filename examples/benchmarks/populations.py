"""Populations of particles: is the evidence unbiased, is it log p(y) of real images, and what do they cost?

    python examples/benchmarks/populations.py --part closed-form   # two minutes of a core
    python examples/benchmarks/populations.py --part labels        # the bundled model: half an hour
    python examples/benchmarks/populations.py --part cost

closed-form: four Gaussians at the corners of a square, of which one has the label: p(y) = 1/4 by symmetry, also of the
samples of any scheduler. The mean of exp(log_evidence) of many populations, and how many standard errors it is from
1/4. labels: the bundled Fashion-MNIST model without the label, whose labels are equally frequent; the median
log_evidence of a few populations and the log of their mean evidence, which is the unbiased one, against log 0.1, and,
with --reference 1000, against the labels of so many images without guidance; run it again to resume. cost: CPU time of
a call with particles, and of one with guidance_power, over one of the same images without, of the same steps, in turns;
the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import time
from math import exp, log
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


def labels(options: argparse.Namespace) -> dict[str, Any]:
    """log_evidence, effective sample size and ancestors of each label's populations; a label that
    the file has is kept."""
    path, particles, repeats = options.output / "labels.json", options.particles, options.repeats
    settings = {"particles": particles, "repeats": repeats, "steps": options.steps}
    settings |= {
        "scheduler": options.scheduler,
        "seed": options.seed,
        "reference": options.reference,
    }
    results: dict[str, Any] = {"settings": settings, "labels": {}}
    if path.exists() and json.loads(path.read_text())["settings"] == settings:
        results = json.loads(path.read_text())
    pipeline, call = bundled(options.scheduler), {"conditional": False, "output_type": "latent"}
    call["num_inference_steps"] = options.steps
    with optimize(pipeline, batch_size=particles * repeats) as chosen:
        print(chosen)
        if options.reference and "unguided" not in results:
            results["unguided"] = unguided(pipeline, options.reference, options.seed, call)
        for label, name in pipeline.config.id2label.items():
            if name not in results["labels"]:
                call["generator"] = torch.Generator().manual_seed(options.seed + int(label))
                found = pipeline(int(label), particles * repeats, particles=particles, **call)
                results["labels"][name] = {
                    "log_evidence": found.log_evidence.tolist(),
                    "effective_sample_size": found.effective_sample_size.tolist(),
                    "ancestors": [len(set(row)) for row in found.ancestors.tolist()],
                }
                write_json(results, path)
            row = results["labels"][name]
            middle, size = median(row["log_evidence"]), median(row["effective_sample_size"])
            mean = log(sum(map(exp, row["log_evidence"])) / len(row["log_evidence"]))
            free = f", unguided {results['unguided'][name]:.2f}" if options.reference else ""
            print(
                f"{name:12} median log evidence {middle:6.2f} ({middle - log(0.1):+.2f} from log 0.1), "
                f"log of the mean {mean:.2f}{free}; "
                f"all {', '.join(f'{value:.2f}' for value in row['log_evidence'])}; effective "
                f"size {size:.1f}, ancestors {median(row['ancestors'])}",
                flush=True,
            )
    return results


def unguided(
    pipeline: ClassifierGuidedPipeline, images: int, seed: int, call: dict[str, Any]
) -> dict[str, float]:
    """log of the mean p(y | x) of images without guidance, which the evidence estimates."""
    generator, probabilities = torch.Generator().manual_seed(seed), []
    for _ in tqdm(range(-(-images // 100)), desc="unguided"):
        found = pipeline(num_images_per_label=100, generator=generator, **call).images
        with torch.no_grad():
            probabilities.append(pipeline.classifier(found, 0.0).logits.softmax(-1))
    mean = torch.cat(probabilities).mean(0).log().tolist()
    return {name: mean[int(label)] for label, name in pipeline.config.id2label.items()}


def cost(particles: int, pairs: int, steps: int) -> dict[str, Any]:
    """CPU seconds of images as one population, and with a power, over those without."""
    pipeline, results = bundled("ddpm"), {}
    # all steps are guided, and evaluated, in each
    call = {"conditional": False, "num_inference_steps": steps, "guidance_scale": 1.0}
    call |= {"guidance_start": 0.0, "guidance_every": 1}
    without = {**call, "guidance_algorithm": "mean"}
    kinds = {
        "particles": ({**call, "particles": particles, "guidance_every": None}, without),
        "power": ({**without, "guidance_power": 3.0}, without),
    }
    for kind, calls in kinds.items():
        times: tuple[list[float], list[float]] = ([], [])
        for pair in tqdm(range(pairs + 1)):  # the first warms up
            for k in (0, 1)[:: (-1) ** pair]:
                generator = [torch.Generator().manual_seed(i) for i in range(particles)]
                start = time.process_time()
                pipeline(7, particles, generator=generator, **calls[k])
                times[k].append(time.process_time() - start)
        ratios = [a / b for a, b in zip(*times, strict=True)][1:]
        print(f"with {kind} over without: median {median(ratios):.3f} of {pairs} pairs")
        print(f"  from {min(ratios):.3f} to {max(ratios):.3f}; {median(times[1]):.2f} s without")
        results[kind] = {"images": particles, "steps": steps, "ratios": ratios}
    return results


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
        ("--reference", int, 0, "of labels: images without guidance, to compare p(y) with"),
        ("--seed", int, 0, "of the noise"),
        ("--output", Path, Path("out/populations"), "folder of PART.json"),
    ):
        option(flag, type=kind, default=default, help=f"{text} (default: %(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.part == "closed-form":
        results: Any = closed_form(options.populations, options.steps, options.seed)
    elif options.part == "labels":
        results = labels(options)
    else:
        results = cost(options.particles, options.repeats, options.steps)
    write_json(results, options.output / f"{options.part}.json")


if __name__ == "__main__":
    main()

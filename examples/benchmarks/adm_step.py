"""Time of a guided step with an ADM network: the pipeline against its floor, interleaved, medians.

    python examples/benchmarks/adm_step.py --steps 30
    OMP_NUM_THREADS=1 python examples/benchmarks/adm_step.py --cpu-time         # on a busy machine

The floor is what every guided step must compute: the network's forward pass, the classifier's, and the gradient of its
log-probability. The networks are ADM's at 64x64 with 64 channels and random weights.
"""

import argparse
import time
from statistics import median

import torch
from diffusers import DDPMScheduler

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.openai import ADMUNet2DModel

WARM_UP = 2  # steps that are not counted


def clock(options: argparse.Namespace) -> float:
    if options.device != "cpu":
        torch.accelerator.synchronize()
    return time.process_time() if options.cpu_time else time.perf_counter()


def make_pipeline(device: str) -> ClassifierGuidedPipeline:
    torch.manual_seed(0)
    unet = ADMUNet2DModel(sample_size=64, out_channels=6).eval()
    classifier = NoiseAwareClassifier(sample_size=64).eval()
    scheduler = DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace")
    pipeline = ClassifierGuidedPipeline(unet, scheduler, classifier).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_floor(
    pipeline: ClassifierGuidedPipeline, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor
) -> None:
    """What every guided step must compute."""
    with torch.no_grad():
        pipeline.unet(x, t)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        log_p = pipeline.classifier(x, t).logits.log_softmax(dim=-1)
        torch.autograd.grad(log_p.gather(1, labels[:, None]).sum(), x)


def measure(
    pipeline: ClassifierGuidedPipeline, options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Seconds of each step of the pipeline, and of the floor on the same sample."""
    labels = torch.arange(options.batch_size, device=options.device)
    steps, floors, start = [], [], 0.0

    def after_step(
        _: object, index: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        nonlocal start
        end = clock(options)
        if index >= WARM_UP:
            steps.append(end - start)
            floor_start = clock(options)
            run_floor(pipeline, tensors["latents"], t, labels)
            floors.append(clock(options) - floor_start)
        start = clock(options)
        return {}

    pipeline(
        labels,
        num_inference_steps=options.steps + WARM_UP,
        guidance_algorithm="mean",
        output_type="latent",
        callback_on_step_end=after_step,
    )
    return steps, floors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a busy machine")
    options = parser.parse_args()
    pipeline = make_pipeline(options.device)
    steps, floors = measure(pipeline, options)
    ratio = median(step / floor for step, floor in zip(steps, floors, strict=True))
    unet, classifier = (
        sum(parameter.numel() for parameter in module.parameters()) / 1e6
        for module in (pipeline.unet, pipeline.classifier)
    )
    print(
        f"{options.steps} steps, networks of {unet:.1f} M + {classifier:.1f} M parameters on "
        f"{options.device}: step {median(steps) * 1e3:.0f} ms, floor {median(floors) * 1e3:.0f} "
        f"ms, median ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    main()

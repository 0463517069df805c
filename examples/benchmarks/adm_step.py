"""What guidance costs a step beside the networks: our pipeline against the bare floor, interleaved, medians.

    python examples/benchmarks/adm_step.py --steps 30
    OMP_NUM_THREADS=1 python examples/benchmarks/adm_step.py --cpu-time         # on a machine that is busy

The floor is what every guided step must do: the network's forward pass, the classifier's, and the gradient of its log
probability in the image. The networks are ADM's at 64x64 with 64 channels, their weights random.
"""

import argparse
import time
from statistics import median

import torch
from diffusers import DDPMScheduler

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.openai import ADMUNet2DModel

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--device", default="cpu")
parser.add_argument("--cpu-time", action="store_true", help="the CPU time, for a busy machine")
options = parser.parse_args()

torch.manual_seed(0)
unet = ADMUNet2DModel(sample_size=64, out_channels=6).to(options.device).eval()
classifier = NoiseAwareClassifier(sample_size=64).to(options.device).eval()
scheduler = DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace")
pipeline = ClassifierGuidedPipeline(unet, scheduler, classifier)
pipeline.set_progress_bar_config(disable=True)
labels = torch.arange(options.batch_size, device=options.device)


def now() -> float:
    if options.device != "cpu":
        torch.accelerator.synchronize()
    return time.process_time() if options.cpu_time else time.perf_counter()


def floor(x: torch.Tensor, t: torch.Tensor) -> float:
    """Seconds of the bare computation."""
    began = now()
    with torch.no_grad():
        unet(x, t)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        log_p = classifier(x, t).logits.log_softmax(dim=-1)
        torch.autograd.grad(log_p[range(len(labels)), labels].sum(), x)
    return now() - began


ours, bare, last = [], [], None


def after_step(
    _: object, index: int, t: torch.Tensor, values: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Times the step that ended, then the floor on the same sample."""
    global last
    ended = now()
    if index > 1:  # the first two warm up
        ours.append(ended - last)
        bare.append(floor(values["latents"], t))
    last = now()
    return {}


pipeline(
    labels,
    num_inference_steps=options.steps + 2,
    guidance_algorithm="mean",
    output_type="latent",
    callback_on_step_end=after_step,
)
millions = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (unet, classifier)]
ratio = median(a / b for a, b in zip(ours, bare, strict=True))
print(
    f"{options.steps} steps, networks of {millions[0]:.1f} M + {millions[1]:.1f} M parameters on {options.device}: "
    f"step {median(ours) * 1e3:.0f} ms, floor {median(bare) * 1e3:.0f} ms, median ratio {ratio:.3f}"
)

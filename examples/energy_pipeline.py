"""Guidance of an image or a video model by a function of what it makes: left half dark, first frame red, ...

    python examples/energy_pipeline.py
    python examples/energy_pipeline.py --model Qwen/Qwen-Image --energy symmetric --scale 100
    python examples/energy_pipeline.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --energy "red start" \
        --call '{"height": 480, "width": 832, "num_frames": 33}' --output red.mp4

Needs a GPU for Flux, Qwen-Image or Wan 2.1 (1.3B). Latents of such models are a sequence of patches, or frames; terms
get what the pipeline would decode of them, in [-1, 1]: an image, (B, C, H, W), or a video, (B, C, F, H, W). With
`frames` of `guide` only those frames are decoded, which for a single one takes the memory of its latent frame.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

from guided_diffusers import EnergyGuidance, guide


def red(frames: torch.Tensor) -> torch.Tensor:
    target = torch.tensor([1.0, -1.0, -1.0], device=frames.device).reshape(1, 3, 1, 1, 1)
    return (frames - target).square().flatten(1).mean(1)


def dark(images: torch.Tensor) -> torch.Tensor:
    return (images + 1).square().flatten(1).mean(1)


#: by name: the energy, and the frames of a video that it looks at
ENERGIES = {
    "dark left": (lambda images: dark(images[..., : images.shape[-1] // 2]), "all"),
    "symmetric": (lambda images: (images - images.flip(-1)).square().flatten(1).mean(1), "all"),
    "dark": (dark, "all"),
    "red start": (red, [0]),
}


def make(pipeline: Any, energy: str, scale: float, **call: Any) -> Any:
    """Guided images, or the frames of videos."""
    function, frames = ENERGIES[energy]
    with guide(pipeline, EnergyGuidance(function, scale), frames=frames):
        return pipeline(**call)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-schnell")
    parser.add_argument("--prompt", default="a cat in a garden by a lake")
    parser.add_argument("--energy", choices=ENERGIES, default="dark left")
    parser.add_argument("--scale", type=float, default=1000.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--call", type=json.loads, default={}, help="further arguments of the pipeline, as JSON"
    )
    parser.add_argument(
        "--output", type=Path, default="energy.png", help=".png, or .mp4 of a video"
    )
    options = parser.parse_args()

    pipeline = DiffusionPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    pipeline.enable_model_cpu_offload()
    generator = torch.Generator().manual_seed(options.seed)
    call = {"prompt": options.prompt, "generator": generator, **options.call}
    made = make(pipeline, options.energy, options.scale, **call)[0]
    if options.output.suffix == ".mp4":
        export_to_video(made, str(options.output), fps=16)
    else:
        made.save(options.output)


if __name__ == "__main__":
    main()

"""Guidance of a model with packed latents by a function of the image: its left half dark, or symmetry.

    python examples/energy_packed.py
    python examples/energy_packed.py --model Qwen/Qwen-Image --energy symmetric --scale 100

Needs a GPU for Flux or Qwen-Image. The latents of such models are a sequence of patches; terms get the image that the
pipeline would decode, (B, C, H, W) in [-1, 1].
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from guided_diffusers import EnergyGuidance, guide

ENERGIES = {
    "dark left": lambda x: (x[..., : x.shape[-1] // 2] + 1).square().flatten(1).mean(1),
    "symmetric": lambda x: (x - x.flip(-1)).square().flatten(1).mean(1),
}


def make_images(pipeline: Any, energy: str, scale: float, **call: Any) -> Any:
    """Guided images."""
    with guide(pipeline, EnergyGuidance(ENERGIES[energy], scale)):
        return pipeline(**call).images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-schnell")
    parser.add_argument("--prompt", default="a house by a lake")
    parser.add_argument("--energy", choices=ENERGIES, default="dark left")
    parser.add_argument("--scale", type=float, default=1000.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="energy.png")
    options = parser.parse_args()

    pipeline = DiffusionPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    pipeline.enable_model_cpu_offload()
    generator = torch.Generator().manual_seed(options.seed)
    call = {"prompt": options.prompt, "generator": generator}
    make_images(pipeline, options.energy, options.scale, **call)[0].save(options.output)


if __name__ == "__main__":
    main()

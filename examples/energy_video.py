"""Guidance of a video model by a function of its frames: the first frame red, or the whole video dark.

    python examples/energy_video.py
    python examples/energy_video.py --energy dark --frames 17 --scale 300 --output dark.mp4

Needs a GPU for Wan 2.1 (1.3B). Terms get the decoded video, (B, C, F, H, W) in [-1, 1]; with `frames` of `guide`
only those frames are decoded, which for a single one takes the memory of its latent frame.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

from guided_diffusers import EnergyGuidance, guide


def red(frames: torch.Tensor) -> torch.Tensor:
    target = torch.tensor([1.0, -1.0, -1.0], device=frames.device).reshape(1, 3, 1, 1, 1)
    return (frames - target).square().flatten(1).mean(1)


def dark(frames: torch.Tensor) -> torch.Tensor:
    return (frames + 1).square().flatten(1).mean(1)


#: by name: the energy, and the frames that it looks at
ENERGIES = {"red": (red, [0]), "dark": (dark, "all")}


def make_video(pipeline: Any, energy: str, scale: float, **call: Any) -> Any:
    """The frames of a guided video."""
    function, frames = ENERGIES[energy]
    with guide(pipeline, EnergyGuidance(function, scale), frames=frames):
        return pipeline(**call).frames


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--prompt", default="a cat walks through a garden")
    parser.add_argument("--energy", choices=ENERGIES, default="red")
    parser.add_argument("--scale", type=float, default=1000.0, help="(default: %(default)s)")
    parser.add_argument("--frames", type=int, default=33, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="energy.mp4")
    options = parser.parse_args()

    pipeline = DiffusionPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    pipeline.enable_model_cpu_offload()
    call = {"height": 480, "width": 832, "num_frames": options.frames}
    call["generator"] = torch.Generator().manual_seed(options.seed)
    frames = make_video(pipeline, options.energy, options.scale, prompt=options.prompt, **call)
    export_to_video(frames[0], str(options.output), fps=16)


if __name__ == "__main__":
    main()

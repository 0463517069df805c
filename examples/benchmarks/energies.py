"""Energies of the images of every kind of pipeline do what they say: "left half dark", "first frame red".

    git clone https://github.com/huggingface/diffusers ~/diffusers
    python examples/benchmarks/energies.py --diffusers ~/diffusers --picture examples/figures/energies.png

Diffusers' own tests build each pipeline at tiny size with random weights, as for pipelines.py; nothing is downloaded.
The layers of its decoder are replaced by a linear one, which shows the first three channels of its latents as red,
green and blue: a sample is a mosaic, in which a person can see where guidance acted. Packing, scaling, the frames that
a latent frame makes, and the order in which they are decoded are the pipeline's own. Measured on its output:

    inside    mean of the left half, in [-1, 1]; of a video, the redness R - (G + B) / 2 of the first frame, in [-2, 2];
              both without guidance and with it
    elsewhere the same of the right half; of a video, of its last frame

The scale is raised from 64 until the inside has moved by --moved.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from diffusers.utils import logging
from pipelines import SetUp, find_tests, tensor_of
from standins import without_hub

from guided_diffusers import EnergyGuidance
from guided_diffusers.files import write_json

#: what its latents are: the test of each family's pipeline
FAMILIES = {
    "pixels: DeepFloyd IF": "deepfloyd_if/test_if.py",
    "4-D: Stable Diffusion": "stable_diffusion/test_stable_diffusion.py",
    "4-D: Stable Diffusion 3": "stable_diffusion_3/test_pipeline_stable_diffusion_3.py",
    "4-D: Z-Image": "z_image/test_z_image.py",
    "packed: Flux": "flux/test_pipeline_flux.py",
    "packed: Flux 2": "flux2/test_pipeline_flux2.py",
    "packed: Qwen-Image": "qwenimage/test_qwenimage.py",
    "packed video: LTX": "ltx/test_ltx.py",
    "causal video: Wan": "wan/test_wan.py",
    "causal video: HunyuanVideo": "hunyuan_video/test_hunyuan_video.py",
    "causal video: HunyuanVideo 1.5": "hunyuan_video1_5/test_hunyuan_1_5.py",
    "causal video: CogVideoX": "cogvideo/test_cogvideox.py",
    "causal video: Mochi": "mochi/test_mochi.py",
    "causal video: Kandinsky 5": "kandinsky5/test_kandinsky5.py",
    "frames: Stable Video Diffusion": "stable_video_diffusion/test_stable_video_diffusion.py",
}
SIZE, FRAMES = 32, 9


def dark_left(images: torch.Tensor) -> torch.Tensor:
    return (images[..., : images.shape[-1] // 2] + 1).square().flatten(1).mean(1)


def red_start(video: torch.Tensor) -> torch.Tensor:
    red = video.new_tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1, 1)
    return (video - red).square().flatten(1).mean(1)


def measures(images: torch.Tensor) -> tuple[float, float]:
    """(inside, elsewhere) of images in [-1, 1]."""
    if images.ndim == 4:
        half = images.shape[-1] // 2
        return images[..., :half].mean().item(), images[..., half:].mean().item()
    redness = (images[:, 0] - images[:, 1:].mean(1)).mean((0, 2, 3))
    return redness[0].item(), redness[-1].item()


def build(test: type, steps: int) -> SetUp:
    """The pipeline of a test, which makes images and videos of one size in some steps."""
    test, changes = test(), {"num_inference_steps": steps, "output_type": "np"}
    own = test.get_dummy_inputs
    accepted = inspect.signature(test.pipeline_class.__call__).parameters
    changes |= {name: SIZE for name in ("height", "width") if name in accepted}

    def inputs() -> dict[str, Any]:
        given = own("cpu") if "device" in inspect.signature(own).parameters else own()
        frames = {name: FRAMES for name in ("num_frames", "video_length") if name in given}
        return {**given, **changes, **frames}

    test.get_dummy_inputs = inputs
    return SetUp(test)


class Mosaic(torch.nn.Module):
    """In place of a decoder's layers: latents (B, C, ...) to pixels (B, 3, ...), each of its latent.

    Attributes:
        shapes: of the output of the layers that it replaces, by that of their input, and by whether it
            is the first of a video.
    """

    def __init__(self, layers: torch.nn.Module):
        super().__init__()
        self.layers, self.gain, self.shapes = layers, 0.0, {}

    def forward(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        key = (z.shape[1:], kwargs.get("first_chunk"))
        if key not in self.shapes:
            made = self.layers(z, *args, **kwargs)
            self.is_tuple = isinstance(made, tuple)
            self.shapes[key] = (made[0] if self.is_tuple else made).shape[1:]
            self.gain = self.gain or 0.4 / z.std().item()
        shape = self.shapes[key]
        pixels = self.gain * z[:, [channel % z.shape[1] for channel in range(3)]]
        if z.ndim == 5:
            pixels = pixels[:, :, latent_frames(z.shape[2], shape[1])]
        for dim in (-2, -1):
            pixels = pixels.repeat_interleave(shape[dim] // z.shape[dim], dim)
        return (pixels, None) if self.is_tuple else pixels


def latent_frames(count: int, frames: int) -> list[int]:
    """Which of `count` latent frames each frame is made of: a causal decoder makes the first frame of
    the first, and 2, 4 or 8 of each other."""
    for ratio in (2, 4, 8):
        if frames == 1 + ratio * (count - 1):
            return [-(-frame // ratio) for frame in range(frames)]
    return [frame * count // frames for frame in range(frames)]


def guided(set_up: SetUp, plain: torch.Tensor, moved: float) -> tuple[float, torch.Tensor]:
    """(scale, images) where the inside moved far enough; it moves in proportion to a small scale."""
    energy, sign, frames = dark_left, -1, "all"
    if plain.ndim == 5:
        energy, sign, frames = red_start, 1, [0]
    scale = 64.0
    for _ in range(5):
        images = tensor_of(set_up.run(EnergyGuidance(energy, scale), frames=frames))
        difference = sign * (measures(images)[0] - measures(plain)[0])
        if not 0 < difference < moved:
            break
        scale *= min(max(2.0, 2 * moved / difference), 1e4)
    return scale, images


def rows(folder: Path, families: list[str], options: argparse.Namespace) -> Iterator[tuple]:
    """(family, class, scale, images without and with guidance) of each."""
    for family in families:
        name, test = next(find_tests(folder, ["pipelines/" + FAMILIES[family]]))
        with without_hub():
            set_up = build(test, options.steps)
            if (vae := getattr(set_up.pipeline, "vae", None)) is not None:
                vae.decoder = Mosaic(vae.decoder)
            plain = tensor_of(set_up.run())
            scale, images = guided(set_up, plain, options.moved)
        yield family, name.partition(" ")[0], scale, plain, images


def strip(images: torch.Tensor, count: int) -> torch.Tensor:
    """The frames of the first sample in a row, (H, W, 3) in [0, 1], with white to `count` frames."""
    frames = images[0].unsqueeze(1) if images.ndim == 4 else images[0]
    frames = torch.nn.functional.interpolate(frames.transpose(0, 1), (SIZE, SIZE))
    frames = torch.nn.functional.pad((frames.clamp(-1, 1) + 1) / 2, (1, 1, 1, 1), value=1.0)
    row = torch.ones(3, SIZE + 2, count * (SIZE + 2))
    row[..., : len(frames) * (SIZE + 2)] = torch.cat(list(frames), dim=-1)
    return row.movedim(0, -1)


def picture(shown: list[tuple[str, torch.Tensor, torch.Tensor]], path: Path) -> None:
    """A row a family: without guidance, and with it; the frames of a video side by side."""
    count = max(images.shape[2] if images.ndim == 5 else 1 for _, images, _ in shown)
    gap = torch.ones(SIZE + 2, SIZE, 3)
    lines = [torch.cat([strip(a, count), gap, strip(b, count)], dim=1) for _, a, b in shown]
    canvas = torch.cat(lines)
    figure, axis = plt.subplots(figsize=(canvas.shape[1] / 75, canvas.shape[0] / 75))
    axis.imshow(canvas, interpolation="nearest")
    height, width = SIZE + 2, count * (SIZE + 2)
    centers = [height * (line + 0.5) for line in range(len(shown))]
    axis.set_yticks(centers, [family for family, *_ in shown], fontsize=7)
    axis.set_xticks([0, width + SIZE], ["without guidance", "with guidance"], fontsize=8, ha="left")
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout with its tests")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=6, help="per run (default: %(default)s)")
    parser.add_argument("--moved", type=float, default=0.6, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument("--picture", type=Path, help="image without and with guidance")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.get_logger("guided_diffusers.guider").setLevel("ERROR")
    sys.path.insert(0, str(options.diffusers))
    print("| latents | pipeline | scale | inside | elsewhere |\n|---|---|---|---|---|")
    shown, results = [], {}
    for family, name, scale, plain, images in rows(options.diffusers, options.only, options):
        (inside, elsewhere), (inside_after, elsewhere_after) = measures(plain), measures(images)
        text = f"{inside:.2f} to {inside_after:.2f} | {elsewhere:.2f} to {elsewhere_after:.2f}"
        print(f"| {family} | {name} | {scale:.0f} | {text} |", flush=True)
        results[family] = {"pipeline": name, "scale": scale}
        results[family] |= {"inside": [inside, inside_after]}
        results[family] |= {"elsewhere": [elsewhere, elsewhere_after]}
        shown.append((family, plain, images))
    if options.json:
        write_json(results, options.json)
    if options.picture:
        picture(shown, options.picture)


if __name__ == "__main__":
    main()

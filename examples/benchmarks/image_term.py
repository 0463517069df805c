"""Time and peak memory of a term of images in a packed-latent and in a video pipeline, over their floor.

    python examples/benchmarks/image_term.py
    python examples/benchmarks/image_term.py --steps 12 --output out/image_term.json

The floor of a step is the pipeline's own step, then decoding what the term looks at once forward and once backward by
the plain decoder, with checkpointing as in `guide`; of a single frame of a video, that of four frames: the last of the
five that two latent frames make, the fewest that this decoder can make four of. Each case runs in a process of its own,
whose largest memory is read from the operating system; that of the loaded process is subtracted. Networks are small,
with random weights. Operations are those of convolutions and matrix products, which torch counts; other than seconds
they don't depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from guided_diffusers import EnergyGuidance, guide
from guided_diffusers.files import write_json

WIDTH = 32
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def energy(images: torch.Tensor) -> torch.Tensor:
    return images.square().flatten(1).sum(1)


def make_flux() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        shift_factor=0.0,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    embeds = {"prompt_embeds": torch.randn(1, 8, WIDTH), "height": 256, "width": 256}
    return pipeline, {**embeds, "pooled_prompt_embeds": torch.randn(1, WIDTH)}


def make_wan(frames: int) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=1,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=64,
    )
    statistics_of_latents = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = diffusers.AutoencoderKLWan(
        base_dim=16, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, **statistics_of_latents
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.WanPipeline(None, None, vae, scheduler, transformer)
    embeds = {
        name: torch.randn(1, 8, WIDTH) for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    return pipeline, {**embeds, "height": 64, "width": 64, "num_frames": frames}


#: name: (pipeline and call, `frames` of guide, shape of the latents that the floor decodes)
CASES: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], Any, tuple[int, ...]]] = {
    "Flux, 256x256": (make_flux, "all", (1, 4, 64, 64)),
    "Wan, 9 frames, all": (lambda: make_wan(9), "all", (1, 4, 3, 8, 8)),
    "Wan, 33 frames, middle": (lambda: make_wan(33), "middle", (1, 4, 2, 8, 8)),
}


class Operations(TorchDispatchMode):
    """Counts those of convolutions and matrix products, also in backward passes."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **kwargs, out_val=result)
        return result


def measure(name: str, guided: bool, steps: int) -> dict[str, float]:
    """Seconds of a step (median), MiB above those of the loaded process, and 10^9 operations of a
    step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # freed memory goes back at once
    make, frames, shape = CASES[name]
    pipeline, call = make()
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.vae, pipeline.transformer):
        module.eval().requires_grad_(False)
    times, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def floor() -> None:
        z = torch.randn(shape, requires_grad=True)
        images = checkpoint(lambda z: pipeline.vae.decode(z).sample, z, use_reentrant=False)
        seen = images[:, :, -4:] if frames == "middle" else images
        torch.autograd.grad(energy(seen).sum(), z)

    def callback(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if not guided:
            with torch.enable_grad():
                floor()
        times.append(time.process_time())
        return tensors

    call |= {
        "num_inference_steps": steps,
        "output_type": "latent",
        "callback_on_step_end": callback,
    }
    term = EnergyGuidance(energy, 1e-6 if guided else 0.0)
    with guide(pipeline, term, frames=frames):
        pipeline(**call)
    seconds = [after - begin for begin, after in zip(times[1:-1], times[2:], strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    operations = []
    for count in (2, 3):
        call["num_inference_steps"] = count
        with Operations() as counter, guide(pipeline, term, frames=frames):
            pipeline(**call)
        operations.append(counter.total / 1e9)
    return {
        "seconds": statistics.median(seconds),
        "mib": peak / 1024,
        "gflop": operations[1] - operations[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8, help="per run (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    results, context = {}, multiprocessing.get_context("fork")
    print(f"{'case':>24} {'s':>15} {'ratio':>6} {'MiB':>15} {'10^9 operations':>17} {'ratio':>6}")
    for name in options.cases:
        row = {}
        for kind in ("floor", "guided"):
            with context.Pool(1) as pool:
                row[kind] = pool.apply(measure, (name, kind == "guided", options.steps))
        results[name] = row
        (s0, m0, f0), (s1, m1, f1) = (row[kind].values() for kind in ("floor", "guided"))
        seconds, memory = f"{s1:.3f} of {s0:.3f}", f"{m1:.0f} of {m0:.0f}"
        operations = f"{f1:.2f} of {f0:.2f}"
        print(
            f"{name:>24} {seconds:>15} {s1 / s0:6.3f} {memory:>15} {operations:>17} {f1 / f0:6.3f}",
            flush=True,
        )
    if options.output:
        write_json(results, options.output)


if __name__ == "__main__":
    main()

"""Throughput and memory of the training loop, against a bare loop and a script like Diffusers' example.

    OMP_NUM_THREADS=1 python examples/benchmarks/training.py                     # about three minutes on a CPU
    python examples/benchmarks/training.py --device cuda --resolution 64 --steps 300 --workers 4
    python examples/benchmarks/training.py --images data/fashion-mnist --resolution 28 --cache_images

All three train the same network on the same images with AdamW, clipped gradients and a moving average. The bare loop
has the images in memory as a tensor, draws, steps, and does nothing else. The plain script is what Diffusers'
unconditional example does: a DataLoader of transformed images, `accelerate`, `EMAModel`, the loss on a progress bar at
every step. Ours is the `Trainer` of the training scripts, which reads its images from Parquet and decodes them.

The loops take turns at every step of one process, so that other load on the machine affects all; time is CPU time, or
with --device cuda wall-clock time. Peak memory is that of four steps in a new process each: all tensors, as torch's
allocator counts them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, load_dataset
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from guided_diffusers.learning.batches import Batch, StepRandom
from guided_diffusers.learning.distributed import make_accelerator
from guided_diffusers.learning.loop import Trainer
from guided_diffusers.learning.options import Options
from guided_diffusers.learning.prepare import load_data

ROOT = Path(__file__).parents[2]

LOOPS = ("ours", "bare", "plain")
WARM_UP = 3  # steps that are not counted


def network(options: argparse.Namespace, channels: int) -> UNet2DModel:
    config = json.loads((ROOT / "training/configs/fashion_mnist_unet.json").read_text())
    torch.manual_seed(0)
    return UNet2DModel(
        **config, sample_size=options.resolution, in_channels=channels, out_channels=channels
    )


def batch_loss(
    model: torch.nn.Module,
    scheduler: DDPMScheduler,
    x0: torch.Tensor,
    eps: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:
    return F.mse_loss(model(scheduler.add_noise(x0, eps, t), t).sample.float(), eps)


def bare(options: argparse.Namespace, folder: Path) -> Iterator[None]:
    """The least that a training step does."""
    split = load_dataset(str(folder), split="train")
    images = torch.from_numpy(
        np.stack([np.array(row["image"]) for row in split.select(range(min(2000, len(split))))])
    )
    images = (
        images.reshape(len(images), *images.shape[1:3], -1).permute(0, 3, 1, 2).to(options.device)
    )
    model, scheduler = network(options, images.shape[1]).to(options.device), DDPMScheduler()
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, 1e-4)
    while True:
        x0 = images[torch.randint(len(images), (options.batch_size,))] / 127.5 - 1
        t, eps = torch.randint(1000, (len(x0),)).to(x0.device), torch.randn(x0.shape).to(x0.device)
        batch_loss(model, scheduler, x0, eps, t).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 0.001)
        yield


def plain(options: argparse.Namespace, folder: Path) -> Iterator[None]:
    """A training loop like that of Diffusers' unconditional example."""

    def transform(examples: dict[str, list[Image.Image]]) -> dict[str, list[torch.Tensor]]:
        size = (options.resolution, options.resolution)
        images = (
            np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
            for image in examples["image"]
        )
        arrays = (image.reshape(*size, -1).transpose(2, 0, 1) for image in images)
        return {"input": [torch.from_numpy(array) / 127.5 - 1 for array in arrays]}

    accelerator = Accelerator(cpu=options.device == "cpu")
    split = load_dataset(str(folder), split="train")
    channels = len(split[0]["image"].getbands())
    loader = DataLoader(
        split.with_transform(transform),
        options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
    )
    model, scheduler = network(options, channels), DDPMScheduler()
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    rate = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=5)
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    ema.to(accelerator.device)
    bar, step = tqdm(disable=True), 0
    while True:
        for batch in loader:
            x0 = batch["input"]
            eps = torch.randn(x0.shape).to(x0.device)
            t = torch.randint(1000, (len(x0),), device=x0.device).long()
            with accelerator.accumulate(model):
                loss = batch_loss(model, scheduler, x0, eps, t)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(model.parameters())
                bar.update(1)
                step += 1
            logs = {"loss": loss.detach().item(), "lr": rate.get_last_lr()[0], "step": step}
            bar.set_postfix(**logs)
            accelerator.log(logs, step=step)
            yield


def ours(
    options: argparse.Namespace, folder: Path, output: str, between: Callable[[], None]
) -> Trainer:
    """`Trainer`, which calls `between` once a step."""
    settings = Options(
        train_data_dir=str(folder),
        resolution=options.resolution,
        train_batch_size=options.batch_size,
        max_train_steps=options.steps + WARM_UP + 1,
        lr_warmup_steps=5,
        checkpointing_steps=10**9,
        validation_steps=0,
        output_dir=output,
        cpu=options.device == "cpu",
        progress=False,
        cache_images=options.cache_images,
        dataloader_num_workers=options.workers,
    )
    accelerator = make_accelerator(settings)
    data, _ = load_data(settings, accelerator)
    run, scheduler = (
        Trainer(settings, accelerator, network(options, data.channels), data),
        DDPMScheduler(),
    )

    def loss(model: torch.nn.Module, batch: Batch, draws: StepRandom) -> torch.Tensor:
        between()
        x0, t = batch["pixel_values"], draws.randint(1000)
        return batch_loss(model, scheduler, x0, draws.randn(*x0.shape[1:]), t)

    run.train(loss, lambda model, step: {})
    return run


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(options: argparse.Namespace, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Seconds of every step of each loop, and the share of time that ours waits for data.

    The other loops make a step just before each step of ours.
    """
    others = {"bare": bare(options, folder), "plain": plain(options, folder)}
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    since = None

    def between() -> None:
        nonlocal since
        if since is not None:
            seconds["ours"].append(clock(options.device) - since)
        for name, steps in others.items():
            start = clock(options.device)
            next(steps)
            seconds[name].append(clock(options.device) - start)
        since = clock(options.device)

    with tempfile.TemporaryDirectory() as output:
        run = ours(options, folder, output, between)
    waiting = run.data_seconds / sum(seconds["ours"])
    return {name: values[WARM_UP:] for name, values in seconds.items()}, waiting


def peak_memory(name: str, options: argparse.Namespace, folder: Path) -> float:
    """MiB of tensors at the peak of four steps of a loop."""

    def four_steps() -> None:
        if name == "ours":
            options.steps = 0
            with tempfile.TemporaryDirectory() as output:
                ours(options, folder, output, lambda: None)
        else:
            steps = {"bare": bare, "plain": plain}[name](options, folder)
            for _ in range(WARM_UP + 1):
                next(steps)

    if options.device == "cuda":
        four_steps()
        return torch.cuda.max_memory_allocated() / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        four_steps()
    with tempfile.TemporaryDirectory() as place:
        profile.export_chrome_trace(f"{place}/trace.json")
        events = json.loads(Path(place, "trace.json").read_text())["traceEvents"]
    return (
        max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
        / 2**20
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="folder of images or Parquet files (default: noise)")
    parser.add_argument("--resolution", type=int, default=28)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that read images, except in the bare loop"
    )
    parser.add_argument(
        "--cache_images", action="store_true", help="ours keeps decoded images in memory"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--alone", choices=LOOPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(options.images or made)
        if options.images is None:
            draw = np.random.default_rng(0)
            noise = draw.integers(0, 256, (2000, options.resolution, options.resolution), np.uint8)
            rows = {"image": [Image.fromarray(image) for image in noise], "label": [0, 1] * 1000}
            Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
        if options.alone:
            print(peak_memory(options.alone, options, folder))
            return
        seconds, waiting = measure(options, folder)
        line = [sys.executable, __file__, *sys.argv[1:], "--images", str(folder), "--alone"]
        outputs = {
            name: subprocess.run(
                [*line, name], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            for name in LOOPS
        }
    peaks = {name: float(text.splitlines()[-1]) for name, text in outputs.items()}
    for name in LOOPS:
        print(
            f"{name:6} {1e3 * statistics.median(seconds[name]):8.1f} ms per step, peak "
            f"{peaks[name]:8.1f} MiB"
        )
    for other in LOOPS[1:]:
        ratio = statistics.median(
            other_time / own_time
            for other_time, own_time in zip(seconds[other], seconds["ours"], strict=False)
        )
        memory = peaks["ours"] / peaks[other]
        print(
            f"against {other}: throughput {ratio:.3f} (median of steps), peak memory {memory:.3f}"
        )
    print(f"ours waits {waiting:.1%} of its time for data")


if __name__ == "__main__":
    main()

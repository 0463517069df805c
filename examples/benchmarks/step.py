"""Time and memory of a guided step: the pipeline against its floor, and against an unguided step.

    python examples/benchmarks/step.py                                   # two sizes, about three minutes on a CPU
    python examples/benchmarks/step.py --size small --steps 200 --output figures.json
    OMP_NUM_THREADS=1 python examples/benchmarks/step.py --cpu-time      # on a busy machine
    python examples/benchmarks/step.py --device cuda
    python examples/benchmarks/step.py --size small --compile            # and `speed.optimize`

The floor is the least that any implementation computes: one forward pass of the network, one of the classifier and the
gradient with respect to its input, without gradients of parameters. It is timed after every step of the pipeline,
in the same run, so that other load on the machine affects both.

Peak memory is that of three steps in a new process, as torch's allocator counts it: tensors above the weights, without
the allocator's reserves. The memory of the process, also printed, is mostly Python and torch themselves.

--compile also times guided steps with autocast to bfloat16, with torch.compile, and with both, interleaved with the
plain step on the same networks. Compiling takes minutes; its time is that of the first call minus the second, from an
empty cache, on one core.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.files import write_json
from guided_diffusers.speed import optimize

PLAIN, ATTENTION = "DownBlock2D", "AttnDownBlock2D"
SIZES: dict[str, dict[str, Any]] = {  # of a test, of the bundled models, and 64 channels at 64x64
    "tiny": {
        "batch": 2,
        "image": (1, 8),
        "unet": (32, 32),
        "classifier": (32, 32),
        "groups": 8,
    },
    "small": {
        "batch": 16,
        "image": (1, 28),
        "unet": (32, 64, 128),
        "classifier": (32, 64, 96),
        "groups": 16,
    },
    "large": {
        "batch": 4,
        "image": (3, 64),
        "unet": (64, 128, 192),
        "classifier": (64, 128, 192),
        "groups": 32,
    },
}
STEPS_PER_CALL = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "eager": {"dtype": torch.float32, "compile": False},
    "autocast": {"dtype": torch.bfloat16, "compile": False},
    "compiled": {"dtype": torch.float32, "compile": True},
    "both": {"dtype": torch.bfloat16, "compile": True},
}


def make_pipeline(size: str, device: str) -> ClassifierGuidedPipeline:
    settings, levels = SIZES[size], len(SIZES[size]["unet"])
    channels, resolution = settings["image"]
    shared = {
        "sample_size": resolution,
        "in_channels": channels,
        "layers_per_block": 1,
        "attention_head_dim": 32,
        "norm_num_groups": settings["groups"],
    }
    unet = UNet2DModel(
        out_channels=channels,
        block_out_channels=settings["unet"],
        down_block_types=(PLAIN,) * (levels - 1) + (ATTENTION,),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        **shared,
    )
    classifier = NoiseAwareClassifier(
        num_labels=10,
        block_out_channels=settings["classifier"],
        down_block_types=("ResnetDownsampleBlock2D",) * (levels - 1) + (ATTENTION,),
        **shared,
    )
    pipeline = ClassifierGuidedPipeline(
        unet.eval(), DDIMScheduler(clip_sample=False), classifier.eval()
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_floor(pipeline: ClassifierGuidedPipeline, size: str) -> Callable[[], None]:
    """What each guided step must compute, on the same networks."""
    settings = SIZES[size]
    labels = torch.zeros(settings["batch"], 1, dtype=torch.long, device=pipeline.device)
    channels, resolution = settings["image"]
    x = torch.randn(settings["batch"], channels, resolution, resolution, device=pipeline.device)
    for part in (pipeline.unet, pipeline.classifier):
        part.requires_grad_(False)

    def floor() -> None:
        with torch.no_grad():
            pipeline.unet(x, 500)
        with torch.enable_grad():
            z = x.detach().requires_grad_(True)
            log_p = pipeline.classifier(z, 500).logits.log_softmax(-1).gather(1, labels)
            torch.autograd.grad(log_p.sum(), z)

    return floor


def call(pipeline: ClassifierGuidedPipeline, size: str, guided: bool, **more: Any) -> None:
    pipeline([0] * SIZES[size]["batch"], guidance_scale=float(guided), output_type="latent", **more)


def clock(device: str, cpu_time: bool) -> Callable[[], float]:
    """A clock in seconds; with --cpu-time, of this process and the compilers that it started."""

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        if not cpu_time:
            return time.perf_counter()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    return now


def time_steps(size: str, device: str, steps: int, cpu_time: bool) -> dict[str, list[float]]:
    """Seconds of guided and unguided steps, and of the floor after each of them."""
    now = clock(device, cpu_time)
    pipeline = make_pipeline(size, device)
    floor, seconds = make_floor(pipeline, size), {"floor": [], "guided": [], "unguided": []}
    kind, begin = "", 0.0

    def after_step(
        pipeline: ClassifierGuidedPipeline, index: int, t: torch.Tensor, tensors: dict
    ) -> dict:
        nonlocal begin
        if index:  # the first step includes the preparations of the call
            seconds[kind].append(now() - begin)
        begin = now()
        floor()
        seconds["floor"].append(now() - begin)
        begin = now()
        return {}

    for warm_up in (True, False):
        for _ in range(1 if warm_up else max(1, steps // (STEPS_PER_CALL - 1))):
            for kind in ("guided", "unguided"):
                steps_and_hook = {
                    "num_inference_steps": STEPS_PER_CALL,
                    "callback_on_step_end": after_step,
                }
                call(pipeline, size, kind == "guided", **steps_and_hook)
        if warm_up:
            seconds = {name: [] for name in seconds}
    return seconds


def time_settings(
    size: str, device: str, steps: int, cpu_time: bool
) -> dict[str, dict[str, float]]:
    """For each of `SETTINGS`: milliseconds per guided step, their ratio to eager, seconds of compiling."""
    pipeline, now = make_pipeline(size, device), clock(device, cpu_time)

    def seconds(name: str) -> float:
        with optimize(pipeline, channels_last=False, **SETTINGS[name]):
            begin = now()
            call(pipeline, size, True, num_inference_steps=STEPS_PER_CALL)
            return now() - begin

    results: dict[str, dict[str, float]] = {}
    for name in SETTINGS:
        first, pairs = seconds(name), []
        for _ in range(max(2, steps // STEPS_PER_CALL)):
            pairs.append((seconds(name), seconds("eager")))
        ratios = [changed / eager for changed, eager in pairs]
        results[name] = {
            "ms": 1e3 * statistics.median(changed for changed, _ in pairs) / STEPS_PER_CALL,
            "ratio": statistics.median(ratios),
            "compile_seconds": 0.0,
        }
        if SETTINGS[name]["compile"]:
            results[name]["compile_seconds"] = first - pairs[0][0]
    return results


def peak_memory(size: str, device: str, kind: str) -> dict[str, float]:
    """MiB at the peak of three steps: tensors above the weights, the weights, and the process."""
    pipeline = make_pipeline(size, device)
    floor = make_floor(pipeline, size)
    weights = sum(part.get_memory_footprint() for part in (pipeline.unet, pipeline.classifier))

    def three_steps() -> None:
        if kind == "floor":
            for _ in range(3):
                floor()
        else:
            call(pipeline, size, kind == "guided", num_inference_steps=3)

    three_steps()  # allocates what later calls reuse
    if device == "cpu":
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            three_steps()
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        tensors = max(
            event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"
        )
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        three_steps()
        tensors = torch.cuda.max_memory_allocated() - before
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        name: value / 2**20
        for name, value in (("tensors", tensors), ("weights", weights), ("process", process))
    }


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Results of a size: memory, each kind in a new process, then time."""
    results: dict[str, Any] = {}
    for kind in ("floor", "guided", "unguided"):
        command = [
            sys.executable,
            __file__,
            "--size",
            size,
            "--device",
            options.device,
            "--probe",
            kind,
        ]
        results[kind] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
    for kind, seconds in time_steps(size, options.device, options.steps, options.cpu_time).items():
        tenths = statistics.quantiles(seconds, n=10)
        results[kind] |= {
            "ms": 1e3 * statistics.median(seconds),
            "ms_10%": 1e3 * tenths[0],
            "ms_90%": 1e3 * tenths[-1],
            "steps": len(seconds),
        }
    if options.compile:
        with tempfile.TemporaryDirectory() as cache:  # an empty cache for the compilers
            command = [
                sys.executable,
                __file__,
                "--size",
                size,
                "--device",
                options.device,
                "--probe",
                "settings",
                "--steps",
                str(options.steps),
                *(["--cpu-time"] if options.cpu_time else []),
            ]
            alone = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            run = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, **alone}
            )
            results["settings"] = json.loads(run.stdout)
    results["guided / floor"] = {
        name: results["guided"][name] / results["floor"][name] for name in ("ms", "tensors")
    }
    return results


def print_results(size: str, results: dict[str, Any]) -> None:
    settings = SIZES[size]
    channels, resolution = settings["image"]
    print(
        f"\n{size}: {settings['batch']} images of {resolution}x{resolution}x{channels}, network "
        f"{settings['unet']}, classifier {settings['classifier']}, "
        f"weights {results['floor']['weights']:.0f} MiB"
    )
    print(
        f"{'':>10} {'ms per step':>11} {'10% to 90%':>16} {'tensors MiB':>12} {'process MiB':>12}"
    )
    for kind in ("floor", "guided", "unguided"):
        row = results[kind]
        spread = f"{row['ms_10%']:.1f} to {row['ms_90%']:.1f}"
        print(
            f"{kind:>10} {row['ms']:11.1f} {spread:>16} {row['tensors']:12.1f} "
            f"{row['process']:12.0f}"
        )
    ratio = results["guided / floor"]
    print(f"guided / floor: {ratio['ms']:.3f} in time, {ratio['tensors']:.3f} in memory")
    for name, row in results.get("settings", {}).items():
        compiling = ""
        if SETTINGS[name]["compile"]:
            compiling = f", after {row['compile_seconds']:.0f} s of compiling"
        print(
            f"{name:>10} {row['ms']:11.1f} ms per guided step, {row['ratio']:.3f} of "
            f"eager{compiling}"
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--size", choices=SIZES, action="append", help="a size (default: small and large)")
    option("--steps", type=int, default=50, help="timed steps per kind (default: %(default)s)")
    option("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    option("--cpu-time", action="store_true", help="CPU time of the process, not wall-clock time")
    option("--compile", action="store_true", help="also time autocast and torch.compile")
    option("--output", type=Path, help="JSON file of the results")
    option("--probe", choices=["floor", "guided", "unguided", "settings"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.probe == "settings":
        size, steps = options.size[0], options.steps
        print(json.dumps(time_settings(size, options.device, steps, options.cpu_time)))
        return
    if options.probe:
        print(json.dumps(peak_memory(options.size[0], options.device, options.probe)))
        return
    results = {}
    for size in options.size or ("small", "large"):
        results[size] = measure(size, options)
        print_results(size, results[size])
    if options.output:
        write_json(results, options.output)


if __name__ == "__main__":
    main()

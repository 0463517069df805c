"""What a guided step costs on a device, what makes it cheaper, and where it makes the host wait: one table.

    python examples/benchmarks/gpu.py --device cuda --size small --size large --json gpu.json
    OMP_NUM_THREADS=1 python examples/benchmarks/gpu.py --device cpu --size small        # without a GPU
    python examples/benchmarks/gpu.py --device meta --size tiny                          # shapes and waits, no times

Steps: the floor (the network's forward pass, the classifier's, and the gradient in its input, without this package), an
unguided step, a guided one, and a guided one with autocast, channels_last, torch.compile, and compile and autocast
together. They are timed in turns after a warm-up; a ratio is the median over the turns. Times are wall-clock on CUDA,
which is synchronised before each reading of the clock, and CPU time of the process on a CPU.

Waits: operations for which the host waits for the device within the loop, a step. On CUDA they are torch's warnings of
`torch.cuda.set_sync_debug_mode`, which doesn't see all; on "cpu" and "meta" those of `host_reads.SimulatedDevice`, on
which every operation is seen, by package. Beside them all reads that torch.profiler sees in the loop: on a CPU also the
check for NaN, which reads at each step there, and on an accelerator only at the end of the run.

Processes: images per second of several processes together, of the bundled model (`scaling.py`).
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from host_reads import SimulatedDevice, in_loop, to_device
from scaling import measure_processes
from step import SIZES, call, clock, make_floor, make_pipeline

from guided_diffusers import ClassifierGuidedPipeline, EnergyGuidance
from guided_diffusers.files import write_json
from guided_diffusers.speed import optimize
from guided_diffusers.text import markdown_table

STEPS = 4  # of a timed call
BFLOAT16, FLOAT16 = {"dtype": torch.bfloat16}, {"dtype": torch.float16}
SETTINGS: dict[str, dict[str, Any]] = {
    "guided, autocast to bfloat16": BFLOAT16,
    "guided, autocast to float16": FLOAT16,
    "guided, channels_last": {"channels_last": True},
    "guided, channels_last, bfloat16": {**BFLOAT16, "channels_last": True},
    "guided, torch.compile": {"compile": True},
    "guided, torch.compile, bfloat16": {**BFLOAT16, "compile": True},
}
OFF = {"dtype": torch.float32, "compile": False, "channels_last": False}
SCHEDULERS = ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler")
#: by which torch.profiler shows that the host waits
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "cudaStreamSynchronize")


# ---------------------------------------------------------------- times


def in_turns(
    functions: dict[str, Callable[[], float]], turns: int, base: str
) -> list[dict[str, Any]]:
    """Rows of {"step", "ms", "ratio"}: medians of the milliseconds, and of the ratios to `base` in
    the same turn; each function returns its seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            spent = function()
            if turn:  # the first one is the warm-up
                seconds[name].append(spent)
    rows = []
    for name, spent in seconds.items():
        ratios = [one / other for one, other in zip(spent, seconds[base], strict=True)]
        ms = 1e3 * statistics.median(spent)
        rows.append({"step": name, "ms": ms, "ratio": statistics.median(ratios)})
    return rows


def time_steps(size: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds per step, and their ratios to the floor, of all kinds of steps."""
    pipeline = make_pipeline(size, options.device)
    floor, now = make_floor(pipeline, size), clock(options.device, options.device == "cpu")

    def seconds(function: Callable[[], Any], count: int = STEPS, **settings: Any) -> float:
        with optimize(pipeline, **{**OFF, **settings}, backend=options.backend):
            start = now()
            function()
            return (now() - start) / count

    def floors() -> None:
        for _ in range(STEPS):
            floor()

    def guided() -> None:
        call(pipeline, size, True, num_inference_steps=STEPS)

    def unguided() -> None:
        call(pipeline, size, False, num_inference_steps=STEPS)

    functions = {
        "floor": lambda: seconds(floors),
        "unguided": lambda: seconds(unguided),
        "guided": lambda: seconds(guided),
    }
    for name, settings in SETTINGS.items():
        if options.no_compile and settings.get("compile"):
            continue
        functions[name] = lambda settings=settings: seconds(guided, **settings)
    return in_turns(functions, options.turns, "floor")


# ---------------------------------------------------------------- waits


class CudaWaits:
    """torch's warnings of synchronising operations, as the switch of `in_loop`."""

    @property
    def is_on(self) -> bool:
        return torch.cuda.get_sync_debug_mode() != 0

    @is_on.setter
    def is_on(self, value: bool) -> None:
        torch.cuda.set_sync_debug_mode("warn" if value else "default")


def cuda_waits(pipeline: ClassifierGuidedPipeline, run: Callable[[], Any]) -> dict[str, int]:
    run()  # what is loaded at a first call
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with in_loop(pipeline.unet, CudaWaits()):
            run()
    return {"all packages": sum("called a synchronizing" in str(w.message) for w in caught)}


def simulated_waits(pipeline: ClassifierGuidedPipeline, run: Callable[[], Any]) -> dict[str, int]:
    with SimulatedDevice() as device, in_loop(pipeline.unet, device):
        to_device(pipeline.unet, pipeline.classifier)
        run()
    counts = {"guided_diffusers": 0, "diffusers": 0}
    for wait in device.waits:
        counts[wait.package] = counts.get(wait.package, 0) + 1
    return counts


class Profiled:
    """torch.profiler, as the switch of `in_loop`."""

    def __init__(self, device: str):
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile, self._is_on = torch.profiler.profile(activities=activities), False

    @property
    def is_on(self) -> bool:
        return self._is_on

    @is_on.setter
    def is_on(self, value: bool) -> None:
        if value != self._is_on:
            self._is_on = value
            (self.profile.start if value else self.profile.stop)()


def profiled_reads(
    pipeline: ClassifierGuidedPipeline, run: Callable[[], Any], device: str
) -> dict[str, int]:
    """{event: number} of `READS` in the loop."""
    profiled = Profiled(device)
    with in_loop(pipeline.unet, profiled):
        run()
    events = profiled.profile.key_averages()
    return {event.key: event.count for event in events if event.key in READS}


def waits(size: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of {"guidance", "scheduler", "shape", packages, "profiler"}: waits a step."""
    settings = SIZES[size]
    kinds: dict[str, dict[str, Any]] = {
        "none": {"guidance_scale": 0.0},
        "classifier": {"guidance_scale": 1.0},
        "classifier, tolerance 0.1": {"guidance_scale": 1.0, "guidance_tolerance": 0.1},
        "energy": {
            "guidance_scale": 0.0,
            "guidance": EnergyGuidance(lambda x: x.square().mean((1, 2, 3)), 1e-3),
        },
    }
    if options.reading_term:  # shows that a read is counted
        kinds["energy that reads"] = {
            "guidance_scale": 0.0,
            "guidance": EnergyGuidance(lambda x: x.square().mean((1, 2, 3)) * x.max().item(), 1e-3),
        }
    rows = []
    for kind, arguments in kinds.items():
        for scheduler in SCHEDULERS if kind == "classifier" else SCHEDULERS[:1]:
            pipeline = make_pipeline(size, "cpu" if options.device == "meta" else options.device)
            pipeline.scheduler = getattr(diffusers, scheduler).from_config(
                pipeline.scheduler.config, clip_sample=False
            )

            def run(steps: int, pipeline: Any = pipeline, arguments: Any = arguments) -> Any:
                labels, call = [0] * settings["batch"], {"num_inference_steps": steps}
                return pipeline(labels, **call, **arguments, output_type="latent").images

            row: dict[str, Any] = {"guidance": kind, "scheduler": scheduler}
            if options.device != "meta":
                reads = profiled_reads(pipeline, lambda run=run: run(STEPS), options.device)
                row["profiler"] = {name: number / STEPS for name, number in reads.items()}
            count = cuda_waits if options.device == "cuda" else simulated_waits
            shapes: list[Any] = []
            counts = count(pipeline, lambda run=run, shapes=shapes: shapes.append(run(STEPS).shape))
            row["shape"] = tuple(shapes[-1])
            row["waits"] = {name: number / STEPS for name, number in counts.items()}
            rows.append(row)
    return rows


# ---------------------------------------------------------------- the report


def report(results: dict[str, Any]) -> str:
    """Markdown tables of the results."""
    text = f"Device {results['device']}, torch {results['torch']}, {results['threads']} threads.\n"
    for size, parts in results["sizes"].items():
        batch, image = SIZES[size]["batch"], "{0}x{1}x{1}".format(*SIZES[size]["image"])
        text += f"\n{size}: {batch} images {image}, a step\n\n"
        if times := parts.get("steps"):
            rows = [[row["step"], f"{row['ms']:.1f}", f"{row['ratio']:.3f}"] for row in times]
            text += markdown_table(["step", "ms", "of the floor"], rows) + "\n"
        rows = []
        for row in parts["waits"]:
            counts = ", ".join(f"{name} {number:g}" for name, number in row["waits"].items())
            reads = row.get("profiler", {}).items()
            profiler = ", ".join(f"{name.split('::')[-1]} {number:g}" for name, number in reads)
            rows.append([row["guidance"], row["scheduler"], row["shape"], counts, profiler])
        header = ["guidance", "scheduler", "result", "waits a step", "reads in the profiler"]
        text += markdown_table(header, rows)
    if processes := results.get("processes"):
        first = processes[0]["images_a_second"]
        rows = [
            [row["processes"], f"{row['images_a_second']:.1f}", row["images_a_second"] / first]
            for row in processes
        ]
        rows = [[count, speed, f"{ratio:.2f}"] for count, speed, ratio in rows]
        text += "\n" + markdown_table(["processes", "images a second", "of the first row"], rows)
    return text


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--device", choices=("cpu", "cuda", "meta"), default="cpu", help="(default: cpu)")
    option("--size", choices=SIZES, action="append", help="a size (default: small)")
    option("--turns", type=int, default=10, help="turns of the timing (default: %(default)s)")
    option("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    option("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    option("--processes", type=int, nargs="*", default=[1, 2], help="none: not measured")
    option("--images", type=int, default=256, help="of all processes (default: %(default)s)")
    option("--reading-term", action="store_true", help="add a term that reads, to see it counted")
    option("--json", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    if options.turns < 1:
        parser.error(f"--turns {options.turns}: at least 1 is allowed")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds none; cpu and meta work without")
    return options


def main() -> None:
    options = parse_options()
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    results: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps_of_a_call": STEPS,
        "sizes": {},
    }
    for size in options.size or ["small"]:
        results["sizes"][size] = {"waits": waits(size, options)}
        if options.device != "meta":
            results["sizes"][size]["steps"] = time_steps(size, options)
    if options.device != "meta" and options.processes:
        results["processes"] = [
            measure_processes(count, options.images, options.device) for count in options.processes
        ]
    print(report(results))
    if options.json:
        write_json(results, options.json)


if __name__ == "__main__":
    main()

"""A run reads no value on the host between its first and its last step, so that an accelerator never waits for it.

Shown on a simulated device (`examples/benchmarks/host_reads.py`), on which a run gives the images of the CPU.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from helpers import TRAINING, load_script
from test_guidance import quiet, small_classifier, small_unet

from guided_diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    EnergyGuidance,
    Guidance,
    StepContext,
    guide,
)

BENCHMARKS = TRAINING.parent / "examples/benchmarks"
host_reads = load_script("host_reads", BENCHMARKS)
SimulatedDevice, in_loop, to_device = (
    host_reads.SimulatedDevice,
    host_reads.in_loop,
    host_reads.to_device,
)
ONE_LEVEL = {"block_out_channels": (8,), "layers_per_block": 1}
ONE_UNET = {**ONE_LEVEL, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


def classifier(**changes: Any) -> Any:
    return small_classifier(**ONE_LEVEL, down_block_types=("ResnetDownsampleBlock2D",), **changes)


def pipeline(scheduler: Any = None, **changes: Any) -> ClassifierGuidedPipeline:
    unet = small_unet(**ONE_UNET, num_class_embeds=4)
    scheduler = scheduler or diffusers.DPMSolverMultistepScheduler()
    return quiet(unet, scheduler, classifier(**changes))


def images(pipeline: ClassifierGuidedPipeline, label: Any = ("cat", "owl"), **call: Any) -> Any:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    call = {"num_inference_steps": 3, "guidance_scale": 0.0, **call}
    return pipeline(list(label), generator=generators, output_type="latent", **call).images


def waits(pipeline: ClassifierGuidedPipeline, **call: Any) -> Any:
    """The device after a run, whose images are compared with those of the CPU."""
    expected = images(pipeline, **call)
    with SimulatedDevice() as device, in_loop(pipeline.unet, device):
        to_device(pipeline.unet, pipeline.classifier)
        result = images(pipeline, **call)
        assert result.device.type == "meta"
        result = result.cpu()
    assert torch.allclose(result, expected, rtol=1e-3, atol=1e-3)
    return device


def of_package(device: Any, package: str) -> set[tuple[str, str]]:
    return {(wait.kind, wait.place) for wait in device.waits if wait.package == package}


# ------------------------------------------------------------ the simulated device


def read_by_mask(x: torch.Tensor) -> None:
    x[x > 0]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: bool(x.any()),
        lambda x: f"{x[0]:g}",
        lambda x: x.tolist(),
        torch.Tensor.cpu,
        torch.Tensor.nonzero,
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 0),
        read_by_mask,
    ],
)
def test_what_reads_a_value_is_noted_with_its_place(read: Callable[[torch.Tensor], Any]) -> None:
    with SimulatedDevice() as device:
        x = torch.arange(3.0, device="meta")
        y = x.relu().reshape(3, 1).sum(0) + torch.ones(1, device="meta")
        assert not device.waits
        read(x)
        assert [wait.kind for wait in device.waits] == ["read"]
        assert device.waits[0].package == "test_host_reads.py"
        assert y.cpu() == 4


def test_copies_that_wait_are_noted_and_devices_dont_mix() -> None:
    x = torch.arange(3.0)
    with SimulatedDevice() as device:
        there = x.to("meta", non_blocking=True)
        assert not device.waits
        x.to("meta")
        torch.tensor([1.0], device="meta")
        there[torch.tensor([0, 2])]
        assert [wait.kind for wait in device.waits] == ["copy"] * 3
        assert (there * torch.tensor(2.0)).device.type == "meta"  # a number is allowed
        with pytest.raises(RuntimeError, match="two devices"):
            there + x
        there.mul_(2)
        assert there[1:].tolist() == [2, 4]


def test_a_read_that_a_term_makes_is_counted_at_each_step() -> None:
    class Reading(Guidance):
        def score(self, step: StepContext) -> torch.Tensor:
            return step.sample * (step.x0.abs().max().item() * 1e-3)

    device = waits(pipeline(), guidance=Reading(), num_inference_steps=3)
    assert [wait.package for wait in device.waits if wait.kind == "read"] == [
        "test_host_reads.py"
    ] * 3


# ------------------------------------------------------------ the pipeline's loop


def brightness(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean((1, 2, 3))


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "classifier": lambda: {"guidance_scale": 2.0},
    "mixtures, a scale per image": lambda: {
        "label": [{"cat": 1.0, "owl": 0.5}, "dog"],
        "guidance_scale": [1.0, 2.0],
    },
    "both, from 0.3 to 0.9": lambda: {
        "guidance_scale": 2.0,
        "guidance_start": 0.3,
        "guidance_stop": 0.9,
        "classifier_free_scale": [0.3, 0.1],
    },
    "every second step": lambda: {"guidance_scale": 2.0, "guidance_every": 2},
    "strang": lambda: {"guidance_scale": 2.0, "guidance_algorithm": "strang"},
    "energy": lambda: {"guidance": EnergyGuidance(brightness, 0.1)},
    "energy through the network": lambda: {
        "guidance": EnergyGuidance(brightness, 1e-3, through_network=True)
    },
    "rescaled to the score": lambda: {
        "guidance": EnergyGuidance(brightness, 0.1, normalize=True, start=0.4)
    },
    "classifier-free: rescale, threshold, a function of the noise level": lambda: {
        "guidance": ClassifierFreeGuidance(
            3, lambda level: level.alpha, rescale=0.5, threshold=0.9, sigma_interval=(0.1, 50)
        )
    },
    "a callback": lambda: {
        "guidance_scale": 2.0,
        "callback_on_step_end": lambda *step: {},
        "callback_on_step_end_tensor_inputs": ["latents", "x0", "score_shift"],
    },
    "from the middle": lambda: {
        "guidance_scale": 2.0,
        "latents": torch.ones(2, 1, 8, 8),
        "strength": 0.7,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_reads_nothing_and_waits_for_no_copy(kind: str) -> None:
    assert waits(pipeline(), **KINDS[kind]()).waits == []


def test_a_run_with_a_power_or_a_worse_network_reads_nothing() -> None:
    powers = pipeline(power_range=(1.0, 8.0))
    call = {"guidance_scale": 1.0, "guidance_power": 3.0, "conditional": False}
    assert waits(powers, **call).waits == []
    worse = small_unet(**ONE_UNET, num_class_embeds=4)
    guided = pipeline()
    expected = images(guided, guidance=AutoGuidance(worse, 0.1))
    with SimulatedDevice() as device, in_loop(guided.unet, device):
        to_device(guided.unet, guided.classifier, worse)
        result = images(guided, guidance=AutoGuidance(worse, 0.1)).cpu()
    assert torch.allclose(result, expected, rtol=1e-3, atol=1e-3) and device.waits == []


def test_a_decision_by_values_reads_them_once_a_step_and_nothing_else() -> None:
    """Which images are evaluated, and which populations are resampled, the host decides."""
    call = {"guidance_scale": 2.0, "guidance_tolerance": 1e-6, "num_inference_steps": 5}
    device = waits(pipeline(), **call)
    assert of_package(device, "guided_diffusers") == {("read", "splitting.py, _store")}
    assert len(device.waits) == 4  # not at the first step
    ancestral = pipeline(diffusers.DDPMScheduler(clip_sample=False))
    device = waits(ancestral, label=["cat"], guidance_scale=1.0, particles=2)
    reads = [wait.place for wait in device.reads("guided_diffusers")]
    assert reads == ["particles.py, _sizes"] * 2  # the last step has no noise, and no weights


SCHEDULERS = {  # whether its own steps read values
    "DDIMScheduler": True,
    "DDPMScheduler": True,
    "DPMSolverMultistepScheduler": False,
    "DPMSolverSinglestepScheduler": False,
    "UniPCMultistepScheduler": False,
    "EulerDiscreteScheduler": False,
    "EulerAncestralDiscreteScheduler": False,
    "FlowMatchEulerDiscreteScheduler": False,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_any_scheduler_only_its_own_steps_read(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    if scheduler.config.get("clip_sample"):
        scheduler.register_to_config(clip_sample=False)
    device = waits(pipeline(scheduler), guidance_scale=0.1)
    assert of_package(device, "guided_diffusers") == set()
    assert bool(device.reads("diffusers")) == SCHEDULERS[name]
    assert {wait.package for wait in device.waits} <= {"diffusers"}


# ------------------------------------------------------------ another pipeline's loop


def test_guide_reads_nothing_between_the_first_and_the_last_step() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**tiny_pipelines.SD)
    stable_diffusion = tiny_pipelines.stable_diffusion(scheduler=scheduler)
    channels = stable_diffusion.unet.config.in_channels
    term = ClassifierGuidance(classifier(in_channels=channels), ["cat", "owl"], 2.0)

    def call(device: str) -> torch.Tensor:
        arguments = tiny_pipelines.sd_call(num_inference_steps=4)
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = value.to(device)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return stable_diffusion(**arguments, generator=generators).images

    with guide(stable_diffusion, term):
        expected = call("cpu")
    with SimulatedDevice() as device:
        networks = stable_diffusion.unet, stable_diffusion.vae, term.classifier
        to_device(*networks)
        term = ClassifierGuidance(term.classifier, ["cat", "owl"], 2.0)
        with guide(stable_diffusion, term), in_loop(stable_diffusion.unet, device, step=1):
            result = call("meta").cpu()
    assert torch.allclose(result, expected, rtol=1e-3, atol=1e-2)
    assert device.reads("diffusers") == []
    # of the last step: whether it gave the predicted x0
    assert of_package(device, "guided_diffusers") == {("read", "attach.py, check_ending")}


# ------------------------------------------------------------ the benchmark


def run_benchmark(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    command = ["gpu", "--size", "tiny", "--processes", "--json", str(path), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    return json.loads(path.read_text())["sizes"]["tiny"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_benchmark_prints_each_row(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--device", device, "--turns", "1", "--no-compile", "--reading-term"]
    results = run_benchmark(monkeypatch, tmp_path / "gpu.json", *arguments)
    text = capsys.readouterr().out
    for row in results["waits"]:
        assert f"| {row['guidance']} | {row['scheduler']} | (2, 1, 8, 8) | " in text
    own = [row for row in results["waits"] if "reads" not in row["guidance"]]
    reading = next(row for row in results["waits"] if "reads" in row["guidance"])
    tolerance = [row for row in own if "tolerance" in row["guidance"]]
    assert [row["waits"]["guided_diffusers"] > 0 for row in tolerance] == [True]
    others = [row for row in own if row not in tolerance]
    assert [row["waits"]["guided_diffusers"] for row in others] == [0] * 5
    assert reading["waits"]["gpu.py"] == 1  # the counter counts
    if device == "meta":
        assert "steps" not in results and " ms " not in text
        return
    names = [row["step"] for row in results["steps"]]
    assert names[:3] == ["floor", "unguided", "guided"] and len(names) == 7
    assert all(row["ms"] > 0 and f"| {row['step']} | " in text for row in results["steps"])
    assert results["steps"][0]["ratio"] == 1
    plain = next(row for row in own if row["guidance"] == "classifier")
    counts = [sum(row["profiler"].values()) for row in (own[0], plain, reading)]
    assert counts == [0, 2, 3]  # on a CPU: two checks a step, and the term's read

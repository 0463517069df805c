"""What makes a step cheaper: the same images up to rounding, compiled once, less memory where asked, and undone."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DDIMScheduler
from test_guidance import level_at, quiet, sample, small_classifier, small_unet, step_at
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusers import (
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    NoiseAwareCLIPGuidance,
    speed,
)
from guided_diffusers.defaults import DEFAULTS
from guided_diffusers.guidance import gradient
from guided_diffusers.networks import no_parameter_grad
from guided_diffusers.speed import computing_in, gradients_in, optimize

ONE_LEVEL = {"block_out_channels": (8,), "layers_per_block": 1}
COMPILED = {"dtype": torch.float32, "compile": True}


def tiny_pipeline() -> ClassifierGuidedPipeline:
    """Of one level: what takes seconds here is to trace a network."""
    unet = small_unet(**ONE_LEVEL, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    classifier = small_classifier(**ONE_LEVEL, down_block_types=("ResnetDownsampleBlock2D",))
    return quiet(unet, DDIMScheduler(clip_sample=False), classifier)


class Compilations:
    """A backend of `torch.compile` that counts, and runs what was traced as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


class TinyCLIP(torch.nn.Module):
    """What `NoiseAwareCLIPGuidance` needs, of 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(65, 5)
        self.config, self.scale = small_classifier().config, 3.0

    def encode_image(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        t = torch.as_tensor(timestep, dtype=sample.dtype).expand(len(sample), 1) / 1000
        return torch.nn.functional.normalize(
            self.layer(torch.cat([sample.flatten(1), t], dim=1)), dim=-1
        )

    def encode_prompts(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(
            torch.tensor([[len(text), 1.0, 2, 3, 4] for text in texts]), dim=-1
        )


def terms(count: int) -> dict[str, ClassifierGuidance | NoiseAwareCLIPGuidance]:
    """Every kind of term that asks a network trained on noise, for `count` images, each its own."""
    torch.manual_seed(0)
    small, each = small_classifier(), torch.arange(count)
    multi = small_classifier(problem_type="multi_label_classification")
    regressor = small_classifier(problem_type="regression")
    return {
        "labels": ClassifierGuidance(
            small, (each % 3).tolist(), joint_temperature=1.5, marginal_temperature=0.5
        ),
        "one label": ClassifierGuidance(
            small, {"cat": 1.0, "owl": -0.5}, torch.linspace(0, 5, count)
        ),
        "multi": ClassifierGuidance(
            multi, [{int(i) % 3: 1.0, (int(i) + 1) % 3: 2.0} for i in each]
        ),
        "targets": ClassifierGuidance(
            regressor, target=torch.stack([each, -each, 2 * each], 1).double(), std=0.5
        ),
        "one target": ClassifierGuidance(regressor, target=1.5),
        "clip": NoiseAwareCLIPGuidance(TinyCLIP(), ["a" * (int(i) + 1) for i in each]),
    }


def a_step(count: int, ratio: float = 1.0) -> Any:
    return step_at(
        level_at(ratio), torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    )


# torch.compile


def test_compiled_once_for_all_steps_labels_scales_and_calls() -> None:
    pipeline, calls = tiny_pipeline(), []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args: calls.append(len(args[0]))
    )  # as the sweep's
    runs = [
        (["cat", "dog", "owl"], 20.0, 4),
        (["dog", "dog", {"cat": 1.0, "owl": -1.0}], [1.0, 30.0, 2.0], 7),
        (["cat", "dog", "owl"], 5.0, 3),
    ]
    expected = [
        sample(pipeline, label, guidance_scale=scale, num_inference_steps=steps)
        for label, scale, steps in runs
    ]
    calls.clear()
    backend = Compilations()
    with optimize(pipeline, **COMPILED, backend=backend):
        for (label, scale, steps), images in zip(runs, expected, strict=True):
            found = sample(pipeline, label, guidance_scale=scale, num_inference_steps=steps)
            assert (found - images).norm() < 1e-5 * images.norm()
            assert backend.count == 2  # the network, and the classifier's value and gradient
    assert calls == [3] * 14
    assert torch.equal(
        sample(pipeline, *runs[0][:1], guidance_scale=20.0, num_inference_steps=4), expected[0]
    )


@pytest.mark.parametrize("kind", ["labels", "multi", "targets", "clip"])
def test_value_and_gradient_in_one_are_those_apart(kind: str) -> None:
    term, z = terms(3)[kind], a_step(3).sample.double()
    term.module.double()
    log_p, grad = speed.value_and_gradient(term, z, torch.tensor(412.5))
    torch.testing.assert_close(log_p, term.log_likelihood(z, 412.5))
    torch.testing.assert_close(grad, gradient(lambda z: term.log_likelihood(z, 412.5), z))


def test_softplus_is_followed_though_not_compiled() -> None:
    classifier = small_classifier(pool="spatial")
    term, step, backend = (
        ClassifierGuidance(classifier, [0, 1], softplus=3.0),
        a_step(2),
        Compilations(),
    )
    expected = term.score(step)
    with gradients_in(classifier, compile=backend):
        assert torch.equal(term.score(step), expected) and not backend.count


# chunks


@pytest.mark.parametrize("kind", ["labels", "one label", "multi", "targets", "one target", "clip"])
def test_a_gradient_in_chunks_is_the_same(kind: str) -> None:
    term, step, rows = terms(5)[kind], a_step(5), []
    expected = term.score(step)
    term.module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with gradients_in(term.module, chunk_size=2):
        found = term.score(step)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert len({float(image.norm()) for image in found}) >= 4
    assert rows == ([] if kind == "clip" else [2, 2, 1])


@pytest.mark.parametrize("kind", ["labels", "targets", "clip"])
def test_a_term_for_another_number_of_images_is_refused_in_chunks_too(kind: str) -> None:
    term = terms(4)[kind]
    with gradients_in(term.module, chunk_size=3), pytest.raises(ValueError, match=r"\b4\b.*\b6\b"):
        term.score(a_step(6))  # of the second chunk, one would be left, which is one for all


def peak(function: Callable[[], Any], folder: Path) -> int:
    """Bytes of the tensors above what was there before, at their most, as torch's allocator counts them."""
    function()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    totals = [
        event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"
    ]
    return max(totals) - min(totals)


def test_chunks_take_less_memory(tmp_path: Path) -> None:
    term, step = terms(16)["labels"], a_step(16)
    with no_parameter_grad(term.modules()):
        whole = peak(lambda: term.score(step), tmp_path)
        with gradients_in(term.module, chunk_size=2):
            chunked = peak(lambda: term.score(step), tmp_path)
    assert chunked < 0.3 * whole, (chunked, whole)


# autocast


def test_autocast_computes_in_bfloat16_and_gives_float32() -> None:
    term, step, seen = terms(4)["labels"], a_step(4), []
    expected = term.score(step)
    term.module.conv_in.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    with gradients_in(term.module, torch.bfloat16):
        found = term.score(step)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(1), expected.flatten(1))
    assert found.dtype == torch.float32 and cosine.min() > 0.99 and not torch.equal(found, expected)
    assert seen == [torch.bfloat16]
    unet = small_unet()
    with torch.no_grad():
        plain = unet(step.sample, 10).sample
        with computing_in(unet, torch.bfloat16):
            found = unet(step.sample, 10).sample
        assert found.dtype == torch.float32 and not torch.equal(found, plain)
        torch.testing.assert_close(found, plain, rtol=0.05, atol=0.05)
        assert torch.equal(unet(step.sample, 10).sample, plain) and "forward" not in vars(unet)


# together


def test_optimized_is_saved_as_it_is_and_undone(tmp_path: Path) -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False), small_classifier())
    plain = {
        name: dict(vars(part))
        for name, part in (("unet", pipeline.unet), ("classifier", pipeline.classifier))
    }
    expected = sample(pipeline, ["cat", "owl"], num_inference_steps=3)
    chosen = optimize(
        pipeline,
        dtype=torch.bfloat16,
        channels_last=True,
        compile=True,
        chunk_size=1,
        backend=Compilations(),
    )
    assert len(chosen.on) == 7 and not chosen.off and str(chosen).count("as requested") == 7
    assert pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    pipeline.save_pretrained(tmp_path)
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, ["cat", "owl"], num_inference_steps=3), expected)
    chosen.undo()
    chosen.undo()
    for name, before in plain.items():
        assert vars(getattr(pipeline, name)).keys() == before.keys()
        assert all(p.is_contiguous() for p in getattr(pipeline, name).parameters())
    assert torch.equal(sample(pipeline, ["cat", "owl"], num_inference_steps=3), expected)


def test_optimize_says_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(), small_classifier())

    def on(*args: Any, **kwargs: Any) -> set[str]:
        with optimize(pipeline, *args, **kwargs) as chosen:
            assert chosen.on.keys() | chosen.off.keys() == {
                f"{name}, {what}"
                for name in ("unet", "classifier")
                for what in ("autocast", "channels_last", "torch.compile")
            }
            return set(chosen.on)

    both = {"unet, autocast", "classifier, autocast"}
    monkeypatch.setattr(speed, "computes_in_bfloat16", lambda device: False)
    assert on() == set()
    monkeypatch.setattr(speed, "computes_in_bfloat16", lambda device: True)
    assert on() == both and on(1) == on(1000, 10, 4) == set()
    assert on(1000, batch_size=16) == {"unet, autocast"}
    assert on(device="cuda") == both | {"unet, channels_last", "classifier, channels_last"}
    compiled = {"unet, torch.compile", "classifier, torch.compile"}
    assert on(10_000_000, 1000) == both | compiled and on(64, 2) == both
    assert on(10_000, 9) == both and on(10_000, 10) == both | compiled
    assert on(10_000_000, 1000, dtype=torch.float32) == {"unet, torch.compile"}
    half = quiet(small_unet().bfloat16(), DDIMScheduler(), small_classifier().bfloat16())
    with optimize(half) as chosen:
        assert not chosen.on and chosen.off["unet, autocast"] == "its weights are torch.bfloat16"


def test_optimize_counts_what_the_pipeline_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own interval and every k-th step; with a tolerance batches shrink, and shrunk ones aren't compiled."""
    pipeline = tiny_pipeline()
    monkeypatch.setattr(speed, "computes_in_bfloat16", lambda device: True)
    interval = {"guidance_start": 0.5, "guidance_stop": 0.9}
    for own, evaluations in (
        ({}, 1000),
        (interval, 400),
        ({"guidance_every": 4}, 250),
        ({"guidance_scale": 0.0}, 0),
    ):
        pipeline.register_to_config(defaults=DEFAULTS | own)
        with optimize(pipeline, 100, 10, 50) as chosen:
            said = chosen.on | chosen.off
            assert said["classifier, torch.compile"].startswith(f"{evaluations} evaluations;")
            assert said["unet, torch.compile"].startswith("1000 evaluations;")
    pipeline.register_to_config(defaults=DEFAULTS | {"guidance_tolerance": 0.1})
    with optimize(pipeline, 10_000, 10, 50) as chosen:
        assert (
            "guidance_tolerance" in chosen.off["classifier, torch.compile"]
            and "unet, torch.compile" in chosen.on
        )


def test_what_optimize_refuses() -> None:
    pipeline, alone = tiny_pipeline(), quiet(small_unet(), DDIMScheduler())
    for call, message in (
        ({"images": 0}, "images=0"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"dtype": torch.float64}, "dtype=torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            optimize(pipeline, **call)
        assert "forward" not in vars(pipeline.unet) and "input_gradient" not in vars(
            pipeline.classifier
        )
    with optimize(alone, dtype=torch.bfloat16) as chosen:
        assert set(chosen.on) == {"unet, autocast"}
    with pytest.raises(
        ValueError, match="chunk_size=4 has no effect: the pipeline has no classifier"
    ):
        optimize(alone, chunk_size=4)


# offloading


def test_offloading_moves_no_model_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's hook sends away the one that came before, if there is one. Onto the CPU itself: no bytes move."""
    sent: list[str] = []
    pre_forward = CpuOffload.pre_forward

    def counted(self: CpuOffload, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.prev_module_hook is not None:
            sent.append(type(self.prev_module_hook.model).__name__)
        return pre_forward(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", counted)

    def sent_in_steps(pipeline: ClassifierGuidedPipeline) -> int:
        seen: list[int] = []

        def note(*args: Any) -> dict:
            seen.append(len(sent))
            return {}

        sample(pipeline, ["cat", "owl"], num_inference_steps=4, callback_on_step_end=note)
        assert len(seen) == 4
        return seen[-1] - seen[0]

    pipeline, plain = tiny_pipeline(), tiny_pipeline()
    with optimize(plain, dtype=torch.bfloat16):
        expected = sample(plain, ["cat", "owl"], num_inference_steps=3)
    chosen = optimize(pipeline, dtype=torch.bfloat16)
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # at the end of a call, Diffusers hooks the models anew
        assert sent_in_steps(pipeline) == 0
        assert torch.equal(sample(pipeline, ["cat", "owl"], num_inference_steps=3), expected)
    chosen.undo()
    assert torch.equal(
        sample(pipeline, ["cat"], num_inference_steps=3),
        sample(plain, ["cat"], num_inference_steps=3),
    )
    with pytest.raises(ValueError, match="UNet2DModel is offloaded already"):
        optimize(pipeline, dtype=torch.bfloat16)

    class TakingTurns(ClassifierGuidedPipeline):
        model_cpu_offload_seq = "unet->classifier->vae"

    turns = TakingTurns(**tiny_pipeline().components)
    turns.set_progress_bar_config(disable=True)
    turns.enable_model_cpu_offload(device="cpu")
    assert sent_in_steps(turns) >= 3


# accelerators


class Waits(TorchDispatchMode):
    """Notes the operations for which an accelerator would make the host wait: copies to it that don't say otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if op is torch.ops.aten._to_copy.default:
            to = torch.device(kwargs.get("device") or args[0].device)
            if to != args[0].device and not kwargs.get("non_blocking"):
                self.found.append(f"{op} {tuple(args[0].shape)}")
        return op(*args, **kwargs)


@pytest.mark.parametrize("kind", ["labels", "one label", "multi", "targets"])
@pytest.mark.parametrize("settings", [None, {}, {"chunk_size": 2}])
def test_a_step_doesnt_wait_for_the_device(kind: str, settings: dict[str, int] | None) -> None:
    """On the device without data, what reads a value raises; what was moved at the first step isn't at the second."""
    term = terms(4)[kind]
    term.module.to("meta")
    step = step_at(level_at(1.0), torch.zeros(4, 1, 8, 8, device="meta"))
    faster = nullcontext() if settings is None else gradients_in(term.module, **settings)
    with no_parameter_grad(term.modules()), faster:
        term.score(step)
        with Waits() as waits:
            assert term.score(step).device.type == "meta"
        assert not waits.found

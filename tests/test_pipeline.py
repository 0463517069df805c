"""ClassifierGuidedPipeline: what each argument does, that nothing else changes, and what is refused."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import Clock, Mixture, OracleClassifier, OracleUNet
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from test_guidance import NAMES, Pull, WithoutCount, counted, quiet, small_classifier, small_unet
from test_schedulers import CASES

from guided_diffusers import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    EnergyGuidance,
    StepContext,
    networks,
    noise_levels,
)
from guided_diffusers.arguments import DEFAULTS
from guided_diffusers.noise import NoiseLevel, is_flow
from guided_diffusers.sampling import resolve_defaults

CONDITIONAL = {"num_class_embeds": 4}  # three labels and the null label


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def images(pipeline: ClassifierGuidedPipeline, *args: Any, **kwargs: Any) -> torch.Tensor:
    call = {
        "output_type": "latent",
        "num_inference_steps": 4,
        "generator": torch.Generator().manual_seed(0),
        **kwargs,
    }
    return pipeline(*args, **call).images


def told(unet: torch.nn.Module) -> list[list[int] | None]:
    """The class labels of the network's calls, as they come."""
    seen: list[list[int] | None] = []

    def note(module: Any, args: Any, kwargs: dict) -> None:
        seen.append(kwargs["class_labels"].tolist() if "class_labels" in kwargs else None)

    unet.register_forward_pre_hook(note, with_kwargs=True)
    return seen


# scale 0 and batches

UNGUIDED = {
    "DDPM": {},
    "DDIM": {},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "HeunDiscrete": {},
    "DPMSolverMultistep": {},
    "UniPCMultistep": {},
    "PNDM": {},
    "FlowMatchEulerDiscrete": {},
    "EDMEuler": {},
    "KDPM2Discrete": {},
    "LCM": {},
    "DEISMultistep": {},
    "LMSDiscrete": {},
    "TCD": {},
}


@pytest.mark.parametrize("name", UNGUIDED)
def test_scale_0_is_the_plain_diffusers_loop_bit_for_bit(name: str) -> None:
    unet, scheduler = small_unet(), getattr(diffusers, f"{name}Scheduler")()
    classifier = small_classifier()
    calls = counted(classifier)
    found = images(
        quiet(unet, scheduler, classifier), "cat", 2, guidance_scale=0, num_inference_steps=5
    )

    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 1, 8, 8, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    takes = inspect.signature(scheduler.step).parameters
    draws = {
        name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in takes
    }
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = (
                scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            )
            x = scheduler.step(unet(scaled, t).sample, t, x, **draws).prev_sample
    assert torch.equal(found, x) and not calls
    assert (
        not torch.equal(
            images(quiet(unet, scheduler, classifier), "cat", 2, num_inference_steps=5), x
        )
        and calls
    )


STOCHASTIC = {
    "DDPM": {},
    "DDIM": {"eta": 1.0},
    "EulerAncestralDiscrete": {},
    "KDPM2AncestralDiscrete": {},
    "LCM": {},
    "DPMSolverMultistep": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSDE": {},
    "SASolver": {},
    "CosineDPMSolverMultistep": {},
    "DPMSolverMultistep ": {},
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_an_image_is_the_same_in_any_batch(name: str) -> None:
    config = dict(STOCHASTIC[name])
    call = {"eta": config.pop("eta")} if "eta" in config else {}
    labels, scales = ["cat", "dog", "owl", "cat"], [0.0, 1.0, 5.0, 50.0]

    def batch(chosen: list[int]) -> torch.Tensor:
        pipeline = quiet(
            small_unet(),
            getattr(diffusers, f"{name.strip()}Scheduler")(**config),
            small_classifier(),
        )
        every = generators(4)
        return images(
            pipeline,
            [labels[i] for i in chosen],
            guidance_scale=[scales[i] for i in chosen],
            generator=[every[i] for i in chosen],
            **call,
        )

    together = batch([0, 1, 2, 3])
    assert len({float(image.sum()) for image in together}) == 4
    for split in ([[0], [1], [2], [3]], [[3, 1], [2, 0]]):
        for chosen in split:
            torch.testing.assert_close(batch(chosen), together[chosen], rtol=1e-3, atol=1e-4)


def test_the_noise_of_dpm_solver_sde_is_the_generators() -> None:
    """It draws from a seed of its own: one from the generators, anew in each call, and none left behind."""
    scheduler = diffusers.DPMSolverSDEScheduler()
    pipeline, latents = quiet(small_unet(), scheduler, small_classifier()), torch.randn(1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    first, second = (images(pipeline, 0, latents=latents, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    again = images(pipeline, 0, latents=latents, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, again)
    unseeded = [images(pipeline, 0, latents=latents, generator=None) for _ in range(2)]
    assert not torch.equal(*unseeded) and scheduler.noise_sampler_seed is None


# labels


@pytest.mark.parametrize(
    ("label", "ids"),
    [
        ("owl", [2, 2]),
        (1, [1, 1]),
        (["cat", 2], [0, 0, 2, 2]),
        (torch.tensor([2, 1]), [2, 2, 1, 1]),
        ({"dog": 1.0}, [1, 1]),
        ({"dog": 0.5, "cat": 0.5}, [3, 3]),
        (["owl", {"dog": -1.0}], [2, 2, 3, 3]),
        (None, [3, 3]),
    ],
)
def test_a_class_conditional_network_gets_the_label(label: Any, ids: list[int]) -> None:
    """Two images a label; mixtures and no label are the null label, id 3."""
    unet = small_unet(**CONDITIONAL)
    seen = told(unet)
    found = images(quiet(unet, DDIMScheduler(), small_classifier()), label, 2)
    assert seen == [ids] * 4 and len(found) == len(ids)
    assert len({float(image.sum()) for image in found}) == len(ids)  # each has its own noise


def test_conditional_decides_what_the_network_is_told() -> None:
    unet = small_unet(**CONDITIONAL)
    pipeline, seen = quiet(unet, DDIMScheduler(), small_classifier()), told(unet)
    found = {value: images(pipeline, "dog", conditional=value) for value in (None, True, False)}
    assert seen == [[1]] * 8 + [[3]] * 4
    assert torch.equal(found[None], found[True]) and not torch.equal(found[True], found[False])
    unconditional = small_unet()
    seen = told(unconditional)
    images(quiet(unconditional, DDIMScheduler(), small_classifier()), "dog")
    assert seen == [None] * 4


def test_a_network_without_a_null_label_needs_a_label_an_image() -> None:
    pipeline = quiet(small_unet(num_class_embeds=3), DDIMScheduler(), small_classifier())
    images(pipeline, ["cat", "dog"])
    for call in (
        {"label": {"cat": 0.5, "dog": 0.5}},
        {"label": None},
        {"label": 0, "conditional": False},
    ):
        with pytest.raises(
            ValueError, match=r"has no null label \(3 class embeddings, 3 known labels\)"
        ):
            images(pipeline, **call)


def test_names_come_from_the_classifier_or_the_pipeline() -> None:
    unet, classifier = (
        small_unet(**CONDITIONAL),
        small_classifier(id2label={0: "rose", 1: "tulip", 2: "daisy"}),
    )
    seen = told(unet)
    images(quiet(unet, DDIMScheduler(), classifier, id2label=NAMES), "daisy")
    images(quiet(unet, DDIMScheduler(), WithoutCount(classifier), id2label=NAMES), "owl")
    images(
        quiet(unet, DDIMScheduler(), id2label={str(i): name for i, name in NAMES.items()}),
        "owl",
        guidance_scale=0,
    )
    assert seen == [[2]] * 12


# guidance_scale


def test_guidance_scale_for_all_a_label_and_an_image() -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(), small_classifier())
    labels, latents = (
        ["cat", "owl"],
        torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    )

    def at(scale: Any) -> torch.Tensor:
        return images(pipeline, labels, 2, guidance_scale=scale, latents=latents)

    off, weak, strong = at(0), at(100.0), at(1000.0)
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(weak, strong, strict=True))
    torch.testing.assert_close(
        at([100.0, 1000.0]), torch.cat([weak[:2], strong[2:]]), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        at(torch.tensor([1000.0, 0, 100, 1000])),
        torch.stack([strong[0], off[1], weak[2], strong[3]]),
        rtol=1e-3,
        atol=1e-4,
    )
    assert torch.equal(at([100, 100]), weak)
    for wrong in ([1.0, 2.0, 3.0], [[1.0]], [1.0]):
        with pytest.raises(
            ValueError,
            match=r"guidance_scale(=.*a finite number or one per image| has shape .*; a number, or one per label)",
        ):
            at(wrong)


def test_more_guidance_more_of_the_class(mixture: Mixture) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    pipeline = quiet(OracleUNet(mixture, "epsilon", Clock()), scheduler, OracleClassifier(mixture))
    share = {}
    for scale in (0.0, 1.0, 4.0):
        found = images(pipeline, 0, 200, guidance_scale=scale, num_inference_steps=20)
        share[scale] = float((mixture.log_joint(found, 1.0, 0.01).argmax(-1) == 0).double().mean())
    assert share[0.0] == pytest.approx(0.4, abs=0.12) and share[1.0] > 0.97 and share[4.0] > 0.97


# outputs and callbacks


def test_output_types() -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(), small_classifier())
    latent = images(pipeline, "cat", 2)
    pt, array, pil = (images(pipeline, "cat", 2, output_type=kind) for kind in ("pt", "np", "pil"))
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert isinstance(array, np.ndarray) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [(image.mode, image.size) for image in pil] == [("L", (8, 8))] * 2
    assert np.abs(np.asarray(pil[1]) / 255 - array[1, :, :, 0]).max() <= 0.5 / 255 + 1e-6
    result = pipeline("cat", num_inference_steps=2, return_dict=False)
    assert isinstance(result, tuple) and len(result) == 1
    colour = quiet(small_unet(in_channels=3, out_channels=3), DDIMScheduler())
    assert images(colour, output_type="pil")[0].mode == "RGB"


def test_callbacks_see_and_change_tensors() -> None:
    pipeline, seen = quiet(small_unet(), DDIMScheduler(), small_classifier()), []

    def stop(given: ClassifierGuidedPipeline, index: int, t: torch.Tensor, tensors: dict) -> dict:
        assert given is pipeline
        seen.append((index, int(t), sorted(tensors), tensors["score_shift"] is not None))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 3 else {}

    found = images(
        pipeline,
        "cat",
        callback_on_step_end=stop,
        guidance_stop=0.5,
        callback_on_step_end_tensor_inputs=["latents", "model_output", "score_shift"],
    )
    assert not found.any()
    names = ["latents", "model_output", "score_shift"]
    assert seen == [
        (i, t, names, i < 2) for i, t in enumerate(pipeline.scheduler.timesteps.tolist())
    ]
    assert images(
        pipeline, "cat", callback_on_step_end=lambda *_: None
    ).any()  # may give nothing back


def test_a_callback_object_brings_its_tensors() -> None:
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline: Any, index: int, t: Any, tensors: dict) -> dict:
            return {"latents": tensors["latents"] / 2} if index == 3 else tensors

    pipeline = quiet(small_unet(), DDIMScheduler(), small_classifier())
    halved = images(
        pipeline, "cat", callback_on_step_end=Halve(cutoff_step_ratio=None, cutoff_step_index=0)
    )
    torch.testing.assert_close(2 * halved, images(pipeline, "cat"))


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), HeunDiscreteScheduler()], ids=repr)
def test_a_callback_ends_the_run_as_in_diffusers(scheduler: Any) -> None:
    pipeline, seen = quiet(small_unet(), scheduler, small_classifier()), []
    calls = told(pipeline.unet)

    def stop(given: ClassifierGuidedPipeline, index: int, t: Any, tensors: dict) -> dict:
        assert not given.interrupt and given.guidance_scale == 2.0
        seen.append((index, given.num_timesteps, tensors["latents"]))
        given._interrupt = index == 1
        return {}

    found = images(pipeline, "cat", callback_on_step_end=stop, guidance_scale=2.0)
    steps = len(scheduler.timesteps)
    assert [one[:2] for one in seen] == [(0, steps), (1, steps)] and len(calls) == 2
    assert torch.equal(found, seen[1][2]) and pipeline.interrupt
    whole = images(pipeline, "cat", guidance_scale=2.0)  # the next call runs to its end
    assert len(calls) == 2 + steps and not torch.equal(whole, found) and not pipeline.interrupt


def test_a_callback_object_that_cuts_off_reads_the_number_of_steps() -> None:
    class CutOff(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline: Any, index: int, t: Any, tensors: dict) -> dict:
            if index + 1 == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
                pipeline._guidance_scale = 0.0  # as SDCFGCutoffCallback
            return tensors

    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False), small_classifier())
    cut, whole = (
        images(pipeline, "cat", 2, guidance_scale=500.0, callback_on_step_end=callback)
        for callback in (CutOff(cutoff_step_ratio=0.5), None)
    )
    assert torch.equal(cut, images(pipeline, "cat", 2, guidance_scale=500.0, guidance_stop=0.5))
    assert not torch.equal(cut, whole)


OFFICIAL = {  # callbacks of Diffusers: what they change
    "SDCFGCutoffCallback": "prompt_embeds",
    "SDXLCFGCutoffCallback": "prompt_embeds, add_text_embeds, add_time_ids",
    "SDXLControlnetCFGCutoffCallback": "prompt_embeds, add_text_embeds, add_time_ids, image",
    "SD3CFGCutoffCallback": "prompt_embeds, pooled_prompt_embeds",
    "IPAdapterScaleCutoffCallback": "the scale of an IP adapter",
}


def test_diffusers_callbacks_of_other_pipelines_are_refused_before_the_run() -> None:
    classes = [value for value in vars(diffusers.callbacks).values() if isinstance(value, type)]
    classes = [c for c in classes if issubclass(c, PipelineCallback) and c is not PipelineCallback]
    assert {cls.__name__ for cls in classes} == OFFICIAL.keys()
    pipeline = quiet(small_unet(), DDIMScheduler(), small_classifier())
    calls = told(pipeline.unet)
    for cls in classes:
        name, callback = cls.__name__, cls(cutoff_step_ratio=0.5)
        for given in (callback, MultiPipelineCallbacks([callback])):
            with pytest.raises(
                ValueError, match=f"={name}: it changes {OFFICIAL[name]}, which this"
            ):
                images(pipeline, "cat", callback_on_step_end=given)
    assert not calls


def test_a_callback_sets_the_scale_of_the_next_steps() -> None:
    """From step 2 on: as a term whose scale is a function of the noise level."""
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False), small_classifier())
    first, then = 100.0, torch.tensor([300.0, 0.0])

    def change(scale: Any) -> Any:
        def callback(given: ClassifierGuidedPipeline, index: int, t: Any, tensors: dict) -> None:
            if index == 1:
                given._guidance_scale = scale

        return callback

    pipeline.scheduler.set_timesteps(4)
    third = noise_levels(pipeline.scheduler)[2].sigma
    term = ClassifierGuidance(
        pipeline.classifier, "cat", lambda level: then if level.sigma <= third else first
    )
    expected = images(pipeline, ["cat", "cat"], guidance_scale=0.0, guidance=term)
    for scale in (then, then.tolist()):
        call = {"guidance_scale": first, "callback_on_step_end": change(scale)}
        assert torch.equal(images(pipeline, ["cat", "cat"], **call), expected)
        assert pipeline.guidance_scale is scale
    off = images(pipeline, "cat", guidance_scale=0.0, callback_on_step_end=change(0))
    assert torch.equal(off, images(pipeline, "cat", guidance_scale=0.0))
    with pytest.raises(ValueError, match="_guidance_scale=3.0: the call began without guidance"):
        images(pipeline, "cat", guidance_scale=0.0, callback_on_step_end=change(3))
    with pytest.raises(ValueError, match=r"_guidance_scale has shape \(3,\); a number, or one per"):
        images(pipeline, "cat", guidance_scale=1.0, callback_on_step_end=change([1, 2, 3]))


def test_a_callback_sets_a_scale_for_each_label() -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False), small_classifier())

    def change(scale: Any) -> Any:
        def callback(given: ClassifierGuidedPipeline, index: int, t: Any, tensors: dict) -> None:
            given._guidance_scale = scale if index == 1 else given._guidance_scale

        return callback

    call = {"num_images_per_label": 2, "guidance_scale": 100.0}
    of_labels, of_images = (
        images(pipeline, ["cat", "dog"], callback_on_step_end=change(scale), **call)
        for scale in ([300.0, 0.0], [300.0, 300.0, 0.0, 0.0])
    )
    assert torch.equal(of_labels, of_images)
    assert not torch.equal(of_labels, images(pipeline, ["cat", "dog"], **call))


def test_errors_of_a_users_code_say_where() -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False))
    energy = EnergyGuidance(lambda x: x[5].sum())
    calls = {
        "in EnergyGuidance at step 0 (timestep 500)": {"guidance": energy},
        "in callback_on_step_end at step 0 (timestep 500)": {
            "callback_on_step_end": lambda p, i, t, k: k["nothing"]
        },
    }
    for note, call in calls.items():
        with pytest.raises((IndexError, KeyError)) as error:
            images(pipeline, num_inference_steps=2, **call)
        if hasattr(error.value, "add_note"):
            assert error.value.__notes__ == [note]


@pytest.mark.parametrize("name", ["unet", "classifier"])
def test_one_layer_of_another_dtype_is_refused_by_name(name: str) -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False), small_classifier())
    getattr(pipeline, name).conv_in.double()
    with pytest.raises(ValueError, match=f"^{name}: its weights are .*float32 and torch.float64"):
        images(pipeline, "cat")


def test_only_what_a_callback_reads_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """x0 is computed once more at a step where it is among the tensor inputs."""
    calls, x0 = [], NoiseLevel.x0
    monkeypatch.setattr(NoiseLevel, "x0", lambda *args: calls.append(1) or x0(*args))
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False))
    counts = {}
    for names in (["latents"], ["latents", "x0"]):
        calls.clear()
        options = {"callback_on_step_end_tensor_inputs": names, "num_inference_steps": 4}
        pipeline(callback_on_step_end=lambda p, i, t, k: None, output_type="latent", **options)
        counts[names[-1]] = len(calls)
    assert counts == {"latents": 0, "x0": 4}


def test_parameters_are_frozen_once_a_step_for_a_term_through_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also for a term that decodes; and no parameter gets a gradient."""
    contexts, freeze = [], networks._false

    def count(flags: Any) -> Any:
        if any(name != "training" for _, name in flags):
            contexts.append(1)
        return freeze(flags)

    monkeypatch.setattr(networks, "_false", count)
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False))
    energy = EnergyGuidance(lambda x: x.square().sum((1, 2, 3)), through_network=True)
    counts = []
    for steps in (2, 5):
        contexts.clear()
        pipeline(guidance=energy, num_inference_steps=steps, output_type="latent")
        counts.append(len(contexts))
    assert counts[1] - counts[0] == 3
    assert all(p.grad is None and p.requires_grad for p in pipeline.unet.parameters())


# presets

PRESET = {
    "guidance_scale": 50.0,
    "guidance_start": 0.5,
    "guidance_stop": 0.75,
    "guidance_tolerance": 0.1,
    "guidance_schedule": {"sigmas": [0.1, 10.0], "scales": [0.5, 2.0]},
}
NEUTRAL = {
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "guidance_tolerance": None,
    "guidance_schedule": None,
}
MIXTURE = {"cat": 1.0, "dog": 0.5}


@pytest.mark.parametrize(
    ("label", "call", "mode", "expected"),
    [
        ("cat", {}, "label", {}),
        ("cat", {"conditional": True, "guidance_scale": 3}, "label", {"guidance_scale": 3}),
        ("cat", {"conditional": False}, "classifier", NEUTRAL),
        (["cat", "owl"], {"conditional": False}, "classifier", NEUTRAL),
        (MIXTURE, {}, "classifier", NEUTRAL),
        ([MIXTURE, {"owl": 0.5}], {}, "classifier", NEUTRAL),
        (MIXTURE, {"guidance_stop": 0.5}, "classifier", {**NEUTRAL, "guidance_stop": 0.5}),
        ("cat", {"classifier_free_scale": 2.0}, "classifier_free", NEUTRAL),
        ("cat", {"classifier_free_scale": 0.0}, "label", {}),
        ("cat", {"guidance": ClassifierFreeGuidance(3)}, "classifier_free", NEUTRAL),
        ("cat", {"guidance": [Pull(0.1) + ClassifierFreeGuidance(3)]}, "classifier_free", NEUTRAL),
        ("cat", {"guidance": Pull(0.1)}, "label", {}),
        (None, {"guidance": Pull(0.1)}, "classifier", {**NEUTRAL, "guidance_scale": 0.0}),
        ("cat", {"guidance_every": 2}, "label", {"guidance_every": 2, "guidance_tolerance": None}),
    ],
)
def test_a_preset_is_of_one_mode(
    label: Any, call: dict[str, Any], mode: str, expected: dict[str, Any]
) -> None:
    """In another, guidance acts in the whole run, at each step; the output says what was used."""
    parts = small_unet(**CONDITIONAL), DDIMScheduler(clip_sample=False), small_classifier()
    fixed = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
    output = quiet(*parts, defaults=PRESET)(label, output_type="latent", **fixed, **call)
    free_scale = {"classifier_free_scale": call.get("classifier_free_scale", 0.0)}
    steps = {"num_inference_steps": 4}
    assert output.settings == {
        "mode": mode,
        **DEFAULTS,
        **PRESET,
        **free_scale,
        **steps,
        **expected,
    }
    explicit = {name: value for name, value in output.settings.items() if name != "mode"}
    if label is None:
        del explicit["guidance_scale"]
    given = {name: value for name, value in call.items() if name not in DEFAULTS}
    assert torch.equal(output.images, images(quiet(*parts), label, **explicit, **given))


def test_modes_have_presets_of_their_own(tmp_path: Path) -> None:
    modes = {
        "classifier": {"guidance_scale": 70.0, "guidance_start": 0.25, "num_inference_steps": 3},
        "classifier_free": {"guidance_scale": 0.0, "guidance_stop": None},
    }
    parts = small_unet(**CONDITIONAL), DDIMScheduler(clip_sample=False), small_classifier()
    quiet(*parts, defaults={**PRESET, "modes": modes}).save_pretrained(tmp_path)
    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.defaults["modes"] == modes

    def settings(label: Any, **call: Any) -> dict[str, Any]:
        found = pipeline(label, output_type="latent", **call).settings
        if isinstance(label, str):  # what the folder of `sample` records
            recorded = resolve_defaults(pipeline, call)
            assert {"mode": found["mode"], **recorded} == {**call, **found}
        return found

    assert settings("cat") == {"mode": "label", **DEFAULTS, **PRESET}
    own = {"mode": "classifier", **DEFAULTS, **modes["classifier"]}
    assert settings(MIXTURE) == settings("cat", conditional=False) == own
    assert settings("cat", conditional=False, guidance_scale=2.0) == {**own, "guidance_scale": 2.0}
    own = {"mode": "classifier_free", **DEFAULTS, "classifier_free_scale": 1.5}
    assert settings("cat", classifier_free_scale=1.5) == {**own, "guidance_scale": 0.0}

    # without class embeddings, the classifier is the usual one; with an image, neither is
    parts = DDIMScheduler(clip_sample=False), small_classifier()
    call = {"output_type": "latent", "num_inference_steps": 2}
    alone = quiet(small_unet(), *parts, defaults=PRESET)
    assert alone(MIXTURE, **call).settings["guidance_start"] == 0.5
    larger = quiet(small_unet(in_channels=2), *parts, defaults=PRESET)
    found = larger("cat", image=torch.zeros(1, 1, 4, 4), **call).settings
    steps = {"num_inference_steps": 2}
    assert found == {"mode": "upsampler", **DEFAULTS, **PRESET, **NEUTRAL, **steps}


@pytest.mark.parametrize(
    ("call", "steps"),
    [
        ({}, 7),
        ({"num_inference_steps": 5}, 5),
        ({"timesteps": [900, 500, 100]}, 3),
        ({"timesteps": torch.tensor([900, 100]), "num_inference_steps": 9}, 2),
    ],
)
def test_the_settings_are_those_used_wherever_they_are_said(call: dict, steps: int) -> None:
    """In `output.settings` and in the folder of `sample`: the number of custom timesteps, and
    "output" where a default of "mean" has no DDPM step."""
    defaults = {"guidance_algorithm": "mean", "num_inference_steps": 7}
    for scheduler, algorithm in ((DDPMScheduler(), "mean"), (LCMScheduler(), "output")):
        pipeline = quiet(small_unet(), scheduler, small_classifier(), defaults=defaults)
        found = pipeline("cat", output_type="latent", **call).settings
        recorded = resolve_defaults(pipeline, call)
        for settings in (found, recorded):
            assert settings["num_inference_steps"] == steps == pipeline.num_timesteps
            assert settings["guidance_algorithm"] == algorithm


def test_a_preset_of_the_usual_mode_leaves_its_limits() -> None:
    defaults = {"guidance_start": 0.4, "modes": {"label": {"guidance_scale": 2.0}}}
    pipeline = quiet(
        small_unet(**CONDITIONAL), DDIMScheduler(), small_classifier(), defaults=defaults
    )
    settings = resolve_defaults(pipeline, {})
    assert (settings["guidance_start"], settings["guidance_scale"]) == (0.4, 2.0)
    hidden = resolve_defaults(pipeline, {"conditional": False})
    assert (hidden["guidance_start"], hidden["guidance_scale"]) == (0.0, 1.0)


LIMITED = {name: value for name, value in PRESET.items() if name != "guidance_schedule"}


def test_a_batch_of_two_modes_is_warned_of() -> None:
    parts = small_unet(**CONDITIONAL), DDIMScheduler(clip_sample=False), small_classifier()
    preset = quiet(*parts, defaults=LIMITED)
    with pytest.warns(
        UserWarning, match=r"single labels and mixtures differ in \['guidance_start'"
    ):
        images(preset, ["cat", MIXTURE])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images(preset, ["cat", MIXTURE], guidance_start=0, guidance_stop=1, guidance_every=1)
        images(quiet(*parts), ["cat", MIXTURE])
        images(preset, [MIXTURE, MIXTURE], guidance_scale=[1.0, 2.0])


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        (
            {"modes": {"labels": {}}},
            r"defaults: modes: \['labels'\] are unknown; allowed: \['class",
        ),
        ({"modes": {"label": {"scale": 1}}}, r"defaults: modes: label: \['scale'\] are unknown"),
        ({"modes": ["label"]}, r"defaults: modes=\['label'\]: a mapping of"),
        ({"modes": {"label": 3}}, "defaults: modes: label=3: a mapping of"),
        ([1], r"defaults=\[1\]: a mapping of"),
    ],
)
def test_other_presets_are_refused(defaults: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet(small_unet(), DDIMScheduler(), small_classifier(), defaults=defaults)


# callbacks, further


def test_the_callbacks_output_is_the_corrected_one() -> None:
    """For epsilon: unguided output - sigma * score shift."""
    pipeline, seen = quiet(small_unet(), DDIMScheduler(), small_classifier()), {}
    for scale in (0, 50.0):

        def note(pipeline: Any, index: int, t: Any, tensors: dict, scale: float = scale) -> dict:
            seen[scale, index] = tensors
            return {}

        images(
            pipeline,
            "cat",
            guidance_scale=scale,
            callback_on_step_end=note,
            callback_on_step_end_tensor_inputs=["model_output", "score_shift"],
        )
    level = noise_levels(pipeline.scheduler)[0]
    expected = seen[0, 0]["model_output"] - level.sigma * seen[50.0, 0]["score_shift"]
    torch.testing.assert_close(seen[50.0, 0]["model_output"], expected)


# steps, timesteps, sigmas, eta


@pytest.mark.parametrize(
    "scheduler", sorted({case.scheduler for case in CASES} - {"DDPMWuerstchenScheduler"})
)
def test_timesteps_and_sigmas_have_an_effect_or_are_refused(scheduler: str) -> None:
    case = next(case for case in CASES if case.scheduler == scheduler)
    pipeline = quiet(small_unet(), getattr(diffusers, scheduler)(**case.config))
    largest = 1 if is_flow(pipeline.scheduler) else 100  # of the sigmas, in [0, 1] for a flow
    sigmas = [0.9 * largest, 0.6 * largest, 0.3 * largest, 0.1 * largest]
    for name, value in (("timesteps", [900, 600, 300, 100]), ("sigmas", sigmas)):
        try:
            images(pipeline, **{name: value})
        except ValueError as error:
            assert name in str(error) and (
                f"{name}: {scheduler} takes no custom ones" in str(error)
                or f"{name}={value}: {scheduler} can't take it" in str(error)
                or name == "sigmas"
                and "use_flow_sigmas" in str(error)
                or "has no noise level" in str(error)
                or f"{name}={value}: {scheduler} allows numbers from 0 to" in str(error)
                or "must start before" in str(error)
            )
        else:
            used = pipeline.scheduler.timesteps.tolist()
            first = (
                used[0] / 1000
                if name == "timesteps"
                else float(pipeline.scheduler.sigmas[0]) / largest
            )
            assert first == pytest.approx(0.9, abs=1e-3)
            assert len(set(used)) == (
                3 if scheduler == "EulerDiscreteScheduler" and name == "sigmas" else 4
            )


def test_a_noise_level_that_is_none_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="timesteps, sigmas: at timestep 20000 FlowMatchEulerDiscreteScheduler has no",
    ):
        images(
            quiet(small_unet(), diffusers.FlowMatchEulerDiscreteScheduler()),
            sigmas=[20.0, 5.0, 1.0],
        )


def test_eta_adds_noise_where_the_scheduler_has_it() -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(), small_classifier())
    assert not torch.equal(images(pipeline, "cat", eta=1.0), images(pipeline, "cat"))
    for eta in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"eta={eta}: DDIMScheduler allows 0 to 1"):
            images(pipeline, "cat", eta=eta)
    with pytest.raises(ValueError, match="eta=0.5: EulerDiscreteScheduler allows only 0"):
        images(quiet(small_unet(), EulerDiscreteScheduler()), eta=0.5)


# Algorithm 1, and learned variances


def algorithm_1(
    pipeline: ClassifierGuidedPipeline, label: int, scale: float, steps: int
) -> torch.Tensor:
    """x_{t-1} ~ N(mu + s Sigma grad log p(y | x_t), Sigma), with the tables of guided-diffusion's shorter run."""
    unet, classifier = pipeline.unet, pipeline.classifier
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()[::-1]
    abar = scheduler.alphas_cumprod.double()[times]
    before = torch.cat([torch.ones(1), abar[:-1]])
    beta = 1 - abar / before
    posterior = beta * (1 - before) / (1 - abar)
    clipped = torch.cat([posterior[1:2], posterior[1:]])
    large = torch.cat([posterior[1:2], beta[1:]])

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 8, 8, generator=generator)
    for i, t in list(enumerate(times))[::-1]:
        with torch.no_grad():
            eps, *v = (
                unet(x, t).sample.chunk(2, dim=1)
                if unet.config.out_channels == 2
                else (unet(x, t).sample,)
            )
        x0 = (x - (1 - abar[i]).sqrt() * eps) / abar[i].sqrt()
        mean = (before[i].sqrt() * beta[i] * x0 + (1 - beta[i]).sqrt() * (1 - before[i]) * x) / (
            1 - abar[i]
        )
        match scheduler.config.variance_type:
            case "fixed_small":
                variance = posterior[i]
            case "fixed_large":
                variance = large[i]
            case "learned_range":
                fraction = (v[0] + 1) / 2
                variance = (fraction * beta[i].log() + (1 - fraction) * clipped[i].log()).exp()
        z = x.float().requires_grad_(True)
        log_p = classifier(z, t).logits.log_softmax(-1)[:, label].sum()
        x = mean + scale * variance * torch.autograd.grad(log_p, z)[0]
        if i > 0:
            x = x + torch.as_tensor(variance).sqrt() * torch.randn(x.shape, generator=generator)
        x = x.float()
    return x


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_mean_is_algorithm_1(variance_type: str) -> None:
    unet = small_unet(out_channels=2 if variance_type == "learned_range" else 1)
    scheduler = DDPMScheduler(variance_type=variance_type, clip_sample=False)
    pipeline = quiet(unet, scheduler, small_classifier())
    found = images(
        pipeline, "dog", guidance_scale=300.0, num_inference_steps=8, guidance_algorithm="mean"
    )
    expected = algorithm_1(pipeline, 1, 300.0, 8)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    other = images(
        pipeline, "dog", guidance_scale=300.0, num_inference_steps=8, guidance_algorithm="output"
    )
    assert (found - other).abs().max() > 0.02 * expected.abs().max()


def test_mean_is_refused_where_there_is_none() -> None:
    for name in ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "UnCLIP", "FlowMatchEulerDiscrete"):
        pipeline = quiet(small_unet(), getattr(diffusers, f"{name}Scheduler")(), small_classifier())
        with pytest.raises(
            ValueError, match=f"mean of a DDPM step; with {name}Scheduler the others are allowed"
        ):
            images(pipeline, "dog", guidance_algorithm="mean")


@pytest.mark.parametrize(
    "name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "PNDM"]
)
def test_a_learned_variance_is_dropped_where_it_is_not_read(name: str) -> None:
    """The same images as from the same network without the variance's channels."""
    both, alone = small_unet(out_channels=2), small_unet()
    alone.load_state_dict(
        {
            **both.state_dict(),
            "conv_out.weight": both.conv_out.weight[:1],
            "conv_out.bias": both.conv_out.bias[:1],
        }
    )
    found, expected = (
        images(quiet(unet, getattr(diffusers, f"{name}Scheduler")(), small_classifier()), "cat")
        for unet in (both, alone)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["DDPM", "DDPMParallel"])
def test_a_learned_variance_is_read_by_ddpm(name: str) -> None:
    unet, classifier = small_unet(out_channels=2), small_classifier()
    found = {
        kind: images(
            quiet(unet, getattr(diffusers, f"{name}Scheduler")(variance_type=kind), classifier),
            "cat",
        )
        for kind in ("learned_range", "fixed_small")
    }
    assert found["learned_range"].shape == (1, 1, 8, 8) and not torch.allclose(*found.values())
    with pytest.raises(
        ValueError, match="variance_type='learned_range' needs a network with a learned variance, 2"
    ):
        images(quiet(small_unet(), DDPMScheduler(variance_type="learned_range"), classifier), "cat")
    with pytest.raises(
        ValueError, match="the network gave 3 channels for a sample of 1; 1 or, with a learned vari"
    ):
        images(quiet(small_unet(out_channels=3), DDPMScheduler(), classifier), "cat")


# components


def state(pipeline: ClassifierGuidedPipeline) -> dict[str, Any]:
    facts: dict[str, Any] = {"scheduler": dict(pipeline.scheduler.config)}
    for part in ("unet", "classifier"):
        module = getattr(pipeline, part)
        facts[part] = [
            (name, p.requires_grad, p.grad, p.sum().item()) for name, p in module.named_parameters()
        ]
        facts[part] += [child.training for child in module.modules()]
    return facts


def test_a_call_leaves_the_components_as_they_were() -> None:
    pipeline = quiet(small_unet(), DDPMScheduler(), small_classifier())
    pipeline.unet.train()
    pipeline.classifier.conv_in.weight.requires_grad_(False)
    before = state(pipeline)
    images(pipeline, "cat")
    assert state(pipeline) == before

    def fail(*_: Any) -> dict:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        images(pipeline, "cat", callback_on_step_end=fail)
    assert state(pipeline) == before


def test_the_starting_noise_can_be_given_and_is_left_alone() -> None:
    pipeline, latents = (
        quiet(small_unet(), DDIMScheduler(), small_classifier()),
        torch.randn(2, 1, 8, 8),
    )
    copy = latents.clone()
    found = images(pipeline, "cat", 2, latents=latents)
    assert torch.equal(latents, copy)
    assert torch.equal(images(pipeline, "cat", 2, latents=latents, generator=None), found)
    assert torch.equal(
        images(pipeline, latents=latents), images(pipeline, None, 2, latents=latents)
    )
    wide = torch.randn(1, 1, 16, 8)
    assert images(pipeline, latents=wide).shape == wide.shape


class PlainNetwork(torch.nn.Module):
    """A network of one's own: no config, any size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: Any, return_dict: bool = True) -> Any:
        output = self.layer(sample).tanh()
        return SimpleNamespace(sample=output) if return_dict else (output,)


class PlainClassifier(torch.nn.Module):
    """A classifier of one's own, with a dictionary as its config."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 3)
        self.config = {
            "num_train_timesteps": 500,
            "beta_schedule": "scaled_linear",
            "num_labels": 3,
            "id2label": {"0": "cat", "1": "dog", "2": "owl"},
        }

    def forward(self, sample: torch.Tensor, timestep: float) -> Any:
        return SimpleNamespace(logits=self.layer(sample.flatten(1)))


def test_plain_modules_are_components() -> None:
    pipeline = quiet(PlainNetwork(), EulerDiscreteScheduler(), PlainClassifier())
    assert pipeline.num_labels == 3 and pipeline.dtype == torch.float32
    with pytest.raises(
        ValueError,
        match="height and width, sample_shape, or latents, are needed: the network's config has no sample_size",
    ):
        images(pipeline, "owl")
    latents = torch.randn(1, 1, 8, 8)
    off, on = (images(pipeline, "owl", latents=latents, guidance_scale=scale) for scale in (0, 5.0))
    assert not torch.allclose(off, on)
    with pytest.raises(
        ValueError, match="label 'cow' is unknown; allowed: ids 0 to 2 and the names"
    ):
        images(pipeline, "cow", latents=latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    full = images(
        quiet(small_unet(), DDIMScheduler(), small_classifier()), "cat", guidance_scale=20.0
    )
    pipeline = quiet(small_unet(), DDIMScheduler(), small_classifier()).to(dtype)
    assert pipeline.dtype == dtype and pipeline.classifier.dtype == dtype
    seen: list[torch.dtype] = []

    class Look(Pull):
        def score(self, step: StepContext) -> torch.Tensor:
            seen.extend([step.sample.dtype, step.x0.dtype])
            return super().score(step)

    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = images(pipeline, "cat", guidance_scale=20.0, latents=latents, guidance=Look(1e-9))
    assert found.dtype == dtype and set(seen) == {torch.float32}
    torch.testing.assert_close(found.float(), full, rtol=0.1, atol=0.1)
    mixed = quiet(
        small_unet(), DDIMScheduler(), small_classifier().to(dtype)
    )  # a float32 network, a half classifier
    torch.testing.assert_close(
        images(mixed, "cat", guidance_scale=20.0), full, rtol=0.05, atol=0.05
    )


def test_a_network_stored_in_8_bits_computes_in_its_compute_dtype() -> None:
    unet = small_unet()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipeline = quiet(unet, DDIMScheduler(), small_classifier())
    assert pipeline.dtype == torch.float32 and images(pipeline, "cat").isfinite().all()


def test_offloading_gives_the_same_images() -> None:
    """Onto the CPU itself: the hooks run and no bytes move. (Sequential offloading refuses that in any pipeline.)"""
    expected = images(quiet(small_unet(), DDIMScheduler(), small_classifier()), "cat")
    pipeline = quiet(small_unet(), DDIMScheduler(), small_classifier())
    pipeline.enable_model_cpu_offload(device="cpu")
    for part in (pipeline.unet, pipeline.classifier):  # neither sends the other away, in every step
        assert part._hf_hook.prev_module_hook is None
    for _ in range(2):
        torch.testing.assert_close(images(pipeline, "cat"), expected)
    assert all(
        p.requires_grad for part in (pipeline.unet, pipeline.classifier) for p in part.parameters()
    )


# saving, loading, other pipelines


def test_saved_and_loaded_gives_the_same_images_and_names(tmp_path: Path) -> None:
    pipeline = quiet(small_unet(**CONDITIONAL), EulerDiscreteScheduler(), small_classifier())
    expected = images(pipeline, ["cat", "owl"], guidance_scale=10.0)
    pipeline.save_pretrained(tmp_path)
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images(loaded, ["cat", "owl"], guidance_scale=10.0), expected)
    assert loaded.config.id2label == NAMES and loaded.num_labels == 3
    assert type(loaded.classifier) is type(pipeline.classifier) and not list(
        tmp_path.rglob("*.bin")
    )
    half = ClassifierGuidedPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == half.classifier.dtype == torch.bfloat16
    flowers = small_classifier(id2label={0: "rose", 1: "tulip", 2: "daisy"})
    assert (
        ClassifierGuidedPipeline.from_pretrained(tmp_path, classifier=flowers).config.id2label[2]
        == "daisy"
    )


def test_a_ddpm_folder_and_a_classifier_are_a_pipeline(tmp_path: Path) -> None:
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    alone = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    assert alone.classifier is None
    with pytest.raises(
        ValueError, match="label has no effect: the network is unconditional and there is no class"
    ):
        alone(0)
    guided = ClassifierGuidedPipeline.from_pretrained(tmp_path, classifier=small_classifier())
    for pipeline in (alone, guided):
        pipeline.set_progress_bar_config(disable=True)
    alone.save_pretrained(tmp_path / "again")
    assert ClassifierGuidedPipeline.from_pretrained(tmp_path / "again").classifier is None
    expected = images(quiet(small_unet(), DDPMScheduler(), small_classifier()), "dog")
    assert torch.equal(images(guided, "dog"), expected)
    assert torch.equal(images(alone), images(guided, "dog", guidance_scale=0))


def test_from_a_ddpm_pipeline_and_back() -> None:
    plain = DDPMPipeline(small_unet(), DDPMScheduler())
    guided = ClassifierGuidedPipeline.from_pipe(plain, classifier=small_classifier())
    guided.set_progress_bar_config(disable=True)
    assert guided.unet is plain.unet and guided.config.id2label == NAMES
    images(guided, "owl")
    again = ClassifierGuidedPipeline.from_pipe(guided)
    assert again.classifier is guided.classifier and again.unet is plain.unet
    back = DDPMPipeline.from_pipe(guided)
    back.set_progress_bar_config(disable=True)
    assert back.unet is plain.unet
    generator = torch.Generator().manual_seed(0)
    array = back(generator=generator, num_inference_steps=4, output_type="np").images
    assert np.array_equal(array, images(guided, output_type="np"))


def test_an_unknown_bundled_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'no-such-model' is not bundled; allowed: "):
        ClassifierGuidedPipeline.from_bundled("no-such-model")


# what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"num_images_per_label": 0},
            "num_images_per_label=0: an integer from 1 to 1000000 is allowed",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps=0: an integer from 1 to 1000 is allowed"),
        ({"output_type": "jpg"}, "output_type='jpg': 'pil', 'np', 'pt' and 'latent' are allowed"),
        (
            {"guidance_algorithm": "both"},
            "guidance_algorithm='both': one of output, mean, lie_trotter, strang",
        ),
        (
            {"guidance_start": 0.9, "guidance_stop": 0.1},
            "guidance_start=0.9, guidance_stop=0.1: 0 <= start <= stop <= 1 is allowed",
        ),
        (
            {"guidance_scale": float("inf")},
            "guidance_scale=.*inf.*: a finite number or one per image is allowed",
        ),
        (
            {"label": None, "guidance_scale": 2.0},
            "guidance_scale=2.0, classifier_free_scale=None need a label to steer to",
        ),
        ({"label": "cow"}, "label 'cow' is unknown"),
        ({"label": 3}, "label 3 is unknown; allowed: ids 0 to 2"),
        (
            {"conditional": True},
            "conditional=True needs a network with class embeddings; this one is unconditional",
        ),
        (
            {"generator": generators(3)},
            "generator is a list of 3; one, or one for each of the 1 images, is allowed",
        ),
        (
            {"latents": torch.zeros(2, 1, 8, 8)},
            r"latents has shape \(2, 1, 8, 8\); \(1, C, H, W\) is allowed",
        ),
        ({"latents": torch.zeros(8, 8)}, r"latents has shape \(8, 8\); \(B, C, H, W\) is allowed"),
        (
            {"label": None, "num_images_per_label": 3, "latents": torch.zeros(2, 1, 8, 8)},
            "latents has shape",
        ),
        ({"timesteps": [1, 0], "sigmas": [1.0]}, "timesteps and sigmas: only one is allowed"),
        (
            {"callback_on_step_end_tensor_inputs": ["latent"]},
            r"callback_on_step_end_tensor_inputs=\['latent'\]: a list of names among",
        ),
        (
            {"guidance": Pull([1.0, 2.0])},
            "scale holds 2 numbers for 1 images; one, or one per image, is allowed",
        ),
    ],
)
def test_wrong_input_is_refused(call: dict[str, Any], message: str) -> None:
    pipeline = quiet(small_unet(), DDPMScheduler(), small_classifier())
    with pytest.raises(ValueError, match=message):
        pipeline(**{"label": "cat", "num_inference_steps": 2, **call})


def test_wrong_pipelines_are_refused() -> None:
    conditional = small_unet(**CONDITIONAL)
    for label, named in (({"cat": 1.0, "dog": 1.0}, "{0: 1.0, 1: 1.0}"), (None, "no label")):
        with pytest.raises(
            ValueError,
            match=f"conditional=True: the network can't be conditioned on {named}; use None or False",
        ):
            images(quiet(conditional, DDIMScheduler(), small_classifier()), label, conditional=True)
    alone = quiet(conditional, DDIMScheduler(), id2label=NAMES)
    with pytest.raises(
        ValueError, match=r"guidance_scale=1.0 needs a classifier, and the pipeline has none: pass"
    ):
        images(alone, "cat", guidance_scale=1.0)
    assert torch.equal(images(alone, "cat"), images(alone, "cat", guidance_scale=0))
    with pytest.raises(
        ValueError, match="label 7 is unknown to the network; ids 0 to 3 are allowed"
    ):
        images(quiet(conditional, DDIMScheduler()), 7, guidance_scale=0)
    bare = torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match="classifier Linear: its config must hold the noise schedule"
    ):
        images(quiet(small_unet(), DDIMScheduler(), bare), 0)


@pytest.mark.parametrize("factor", [1, 2])  # pixels of a latent
def test_images_of_another_size_are_those_of_latents_of_that_size(factor: int) -> None:
    vae = None
    if factor == 2:
        blocks = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (2, 2)
        vae = diffusers.AutoencoderKL(1, 1, *blocks, norm_num_groups=2, latent_channels=1)
    adaptive = small_classifier(pool="adaptive")
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False), adaptive, vae)
    size = {"height": 4 * factor, "width": 6 * factor}
    call = {"output_type": "pt", "guidance_scale": 9.0}
    sized = images(pipeline, "cat", **size, **call)
    assert sized.shape[2:] == tuple(size.values())
    latents = torch.randn(1, 1, 4, 6, generator=generators(1)[0])
    assert torch.equal(sized, images(pipeline, "cat", latents=latents, **call))
    assert images(pipeline, "cat", width=6 * factor, **call).shape[2:] == (8 * factor, 6 * factor)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 5}, "height=5: multiples of 2, from 2 to 16384, are allowed"),
        (
            {"height": 0, "width": 4},
            "height=0, width=4: multiples of 2, from 2 to 16384, are allowed",
        ),
        ({"width": -2}, "width=-2: multiples of 2"),
        ({"width": 8.0}, "width=8.0: multiples of 2"),
        ({"width": True}, "width=True: multiples of 2"),
        ({"width": 4, "latents": torch.zeros(1, 1, 8, 8)}, "width=4: latents has a size"),
        ({"width": 4}, "the samples have 8 x 4, the classifier takes 8 x 8 only"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images(quiet(small_unet(), DDIMScheduler(), small_classifier()), "cat", **call)


def test_guidance_of_ones_own_adds_to_the_classifiers() -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False), small_classifier())
    alone = images(pipeline, "cat")
    assert torch.equal(images(pipeline, "cat", guidance=Pull(0.0)), alone)
    assert images(pipeline, "cat", guidance=Pull(0.3)).std() < 0.9 * alone.std()
    twice = images(pipeline, "cat", guidance_scale=2.0)
    term = ClassifierGuidance(pipeline.classifier, "cat", 1.0)
    torch.testing.assert_close(images(pipeline, "cat", guidance_scale=1.0, guidance=term), twice)
    torch.testing.assert_close(
        images(pipeline, "cat", guidance_scale=0, guidance=term + term), twice
    )


@pytest.mark.parametrize(
    ("scheduler", "scale", "warned"),
    [
        (DDIMScheduler(), 1.0, True),
        (DDIMScheduler(), 0.0, False),
        (DDIMScheduler(clip_sample=False), 1.0, False),
        (DDPMScheduler(), 1.0, False),
    ],
)
def test_warns_of_clipping_that_spoils_guidance(
    scheduler: Any, scale: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images(quiet(small_unet(), scheduler, small_classifier()), 0, guidance_scale=scale)
    assert ("clip_sample=False" in caplog.text) == warned


def test_a_term_of_scale_0_is_off() -> None:
    class Refuses(Pull):
        def score(self, step: StepContext) -> torch.Tensor:
            raise AssertionError("was asked")

    pipeline = quiet(small_unet(), DDPMScheduler(), small_classifier())
    assert torch.equal(images(pipeline, "cat", guidance=Refuses(0.0)), images(pipeline, "cat"))


def test_the_interval_is_checked_at_scale_0() -> None:
    with pytest.raises(
        ValueError, match=r"guidance_start=5: a finite number from 0 to 1 is allowed"
    ):
        images(
            quiet(small_unet(), DDPMScheduler(), small_classifier()),
            "cat",
            guidance_scale=0,
            guidance_start=5,
        )


def test_names_are_those_of_an_exchanged_classifier() -> None:
    pipeline = quiet(small_unet(), DDPMScheduler(), small_classifier())
    cat = images(pipeline, "cat")
    pipeline.classifier = small_classifier()
    pipeline.classifier.register_to_config(id2label={0: "x", 1: "y", 2: "z"})
    with pytest.raises(ValueError, match="'cat' is unknown"):
        images(pipeline, "cat")
    assert torch.equal(images(pipeline, "x"), cat)

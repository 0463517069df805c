"""Guiding existing pipelines: tiny ones of each kind, with their own schedulers, against their formulas written out."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from functools import partial
from math import hypot
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler, EulerDiscreteScheduler, VQModel
from test_guidance import small_classifier
from tiny_pipelines import (
    PIPELINES,
    SD,
    TOKENS,
    WIDTH,
    Recorder,
    Seen,
    Spy,
    conditional_unet,
    dit,
    embeds,
    formula,
    lively,
    normal,
    sd_call,
    stable_diffusion,
    x0_of,
)
from torch._dynamo import OptimizedModule

from guided_diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    EnergyGuidance,
    Guidance,
    StepContext,
)
from guided_diffusers.attach import guide

# every pipeline


@pytest.mark.parametrize("name", PIPELINES)
def test_at_scale_0_it_is_the_unguided_pipeline_bit_for_bit(name: str) -> None:
    pipeline, call = PIPELINES[name]()
    record = Recorder(pipeline)
    plain, off = record(**call), record(Spy(0.0), **call)
    assert len(plain) == len(off) > 0 and all(
        torch.equal(a["next"], b["next"]) for a, b in zip(plain, off, strict=True)
    )
    assert all(torch.isfinite(step["next"]).all() for step in plain)


@pytest.mark.parametrize("name", PIPELINES)
def test_what_a_term_sees_and_what_becomes_of_its_score(name: str) -> None:
    """The predicted x0 moves by sigma^2 / alpha score, all read from formulas written out."""
    pipeline, call = PIPELINES[name]()
    spy, record, scale = Spy(0.2), Recorder(pipeline), 0.2
    plain, steps = record(**call), record(spy, **call)
    assert len(spy.seen) == len(steps) == len(plain)
    for index, (step, got) in enumerate(zip(spy.seen, steps, strict=True)):
        t, rows = got["timestep"], len(step.sample)
        assert (
            rows == 2
            and step.index == index
            and step.count == len(steps)
            and step.timestep == float(t)
        )
        alpha, sigma = formula(pipeline.scheduler, t)
        assert step.level.alpha == pytest.approx(alpha, rel=2e-3, abs=1e-6)
        assert step.level.sigma == pytest.approx(sigma, rel=2e-3)
        torch.testing.assert_close(step.sample, got["sample"][:rows])
        moved = x0_of(pipeline.scheduler, got["model_output"], t, got["sample"])[:rows]
        shift = sigma**2 / max(alpha, 2.0**-24) * -scale * (got["sample"][:rows] - 0.3)
        size = max(
            float(moved.abs().max()),
            float(shift.abs().max()),
            float((sigma * got["model_output"]).abs().max()),
        )
        torch.testing.assert_close(moved, step.x0 + shift, rtol=5e-3, atol=1e-4 * size)
        torch.testing.assert_close(
            spy.again[index], step.x0, rtol=1e-3, atol=1e-4 * float(step.x0.abs().max())
        )
    first = x0_of(
        pipeline.scheduler, plain[0]["model_output"], plain[0]["timestep"], plain[0]["sample"]
    )[:2]
    torch.testing.assert_close(
        spy.seen[0].x0, first, rtol=2e-3, atol=1e-4 * float(first.abs().max())
    )
    if steps[0]["model_output"].shape[1] > plain[0]["sample"].shape[1]:  # the learned variance
        variances = [
            step["model_output"][:, plain[0]["sample"].shape[1] :] for step in (plain[0], steps[0])
        ]
        assert torch.equal(*variances)


@pytest.mark.parametrize("name", PIPELINES)
def test_afterwards_the_pipeline_is_as_before_also_after_an_exception(name: str) -> None:
    pipeline, call = PIPELINES[name]()
    modules = [one for one in pipeline.components.values() if isinstance(one, torch.nn.Module)]
    next(modules[0].parameters()).requires_grad_(False)
    wanted = [[p.requires_grad for p in module.parameters()] for module in modules]
    states = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
    plain = Recorder(pipeline)(**call)
    attributes = [
        set(vars(module)) for module in modules
    ]  # a cache of diffusers stays from the first run

    class Fails(Spy):
        def score(self, step: StepContext) -> torch.Tensor:
            score = super().score(step)  # after the network was evaluated for the gradient
            assert not any(p.requires_grad for module in modules[:1] for p in module.parameters())
            if step.index == 1:
                raise KeyError("inside")
            return score

    with pytest.raises(KeyError, match="inside"), guide(pipeline, Fails()):
        pipeline(**deepcopy(call))
    assert "step" not in vars(pipeline.scheduler)
    for module, grads, state, names in zip(modules, wanted, states, attributes, strict=True):
        assert [p.requires_grad for p in module.parameters()] == grads and set(
            vars(module)
        ) == names
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    again = Recorder(pipeline)(**call)
    assert all(torch.equal(a["next"], b["next"]) for a, b in zip(plain, again, strict=True))


# what the terms can ask for


DECODES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "SD": lambda pipeline, z: pipeline.vae.decode(z / 0.18215).sample,
    "SDXL": lambda pipeline, z: pipeline.vae.decode(z / 0.13025).sample,
    "SD 3": lambda pipeline, z: pipeline.vae.decode(z / 1.5 + 0.06).sample,
    "DiT": lambda pipeline, z: pipeline.vae.decode(z / 0.18215).sample,
    "LDM": lambda pipeline, z: pipeline.vqvae.decode(z / 0.18215).sample,
    "Kandinsky": lambda pipeline, z: pipeline.movq.decode(z, force_not_quantize=True).sample,
    "IF": lambda pipeline, z: z,
}


class StraightThrough:
    """A decoder that quantizes, as its gradient has it: around the code that it found for z0, not rounded."""

    def __init__(self, vqvae: VQModel, z0: torch.Tensor):
        self.vqvae, self.z0, self.code = vqvae, z0, vqvae.quantize(z0)[0]

    def decode(self, z: torch.Tensor) -> Any:
        return self.vqvae.decode(self.code + (z - self.z0), force_not_quantize=True)


@pytest.mark.parametrize("name", DECODES)
def test_terms_look_at_images_as_the_pipeline_decodes_them(name: str) -> None:
    """The score is the finite difference of the energy of what the pipeline's own decoder makes of x0."""
    pipeline, call = PIPELINES[name]()
    record, target = (
        Seen(EnergyGuidance(lambda images: ((images - 0.2) ** 2).flatten(1).sum(1), 0.5)),
        DECODES[name],
    )
    Recorder(pipeline)(record.term, **call)
    for step, score in zip(record.steps, record.scores, strict=True):
        x0 = step.x0.double()
        with torch.no_grad():
            torch.testing.assert_close(step.decode(step.x0), target(pipeline, step.x0))
            network = next(
                (
                    deepcopy(one).double()
                    for key in ("vae", "movq", "vqvae")
                    if (one := getattr(pipeline, key, None))
                ),
                None,
            )
            vqvae = StraightThrough(network, x0 / 0.18215) if name == "LDM" else None
            holder = type("Holder", (), {"vae": network, "movq": network, "vqvae": vqvae})()
            direction, h = normal(*x0.shape, seed=8).double(), 1e-5 * float(x0.abs().max())
            up, down = (
                ((target(holder, x0 + s * h * direction) - 0.2) ** 2).flatten(1).sum(1)
                for s in (1, -1)
            )
        jacobian = step.level.alpha / (step.level.alpha**2 + step.level.sigma**2)
        torch.testing.assert_close(
            (score * direction).flatten(1).sum(1),
            -0.5 * jacobian * (up - down) / (2 * h),
            rtol=2e-3,
            atol=1e-4 * float(score.norm()),
        )


def test_the_gradient_through_the_network_is_the_finite_difference() -> None:
    """In float64, of the image's energy, through the two halves of classifier-free guidance, written out."""
    scheduler = DDIMScheduler(clip_sample=False, **SD)
    pipeline = stable_diffusion(scheduler=scheduler).to(torch.float64)
    record = Seen(
        EnergyGuidance(lambda images: (images**2).sum((1, 2, 3)), 0.5, through_network=True)
    )
    call = sd_call(**{name: value.double() for name, value in embeds().items()})
    Recorder(pipeline)(record.term, **call)
    assert len(record.steps) == 3

    def energy(x: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma = formula(scheduler, t)
        no, yes = (
            pipeline.unet(x, t, encoder_hidden_states=call[name]).sample
            for name in ("negative_prompt_embeds", "prompt_embeds")
        )
        x0 = (x - sigma * (no + 5.0 * (yes - no))) / alpha
        return (pipeline.vae.decode(x0 / 0.18215).sample ** 2).sum((1, 2, 3))

    for step, score in zip(record.steps, record.scores, strict=True):
        direction, h = normal(*step.sample.shape, seed=8).double(), 1e-5
        with torch.no_grad():
            up, down = (energy(step.sample + s * h * direction, step.timestep) for s in (1, -1))
        torch.testing.assert_close(
            (score * direction).sum((1, 2, 3)), -0.5 * (up - down) / (2 * h), rtol=1e-4, atol=1e-9
        )


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks, embeddings and noise that are made meanwhile are."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def waves(x0: torch.Tensor) -> torch.Tensor:
    """An energy with a gradient of the same size wherever x0 is: cos(x0)."""
    return x0.sin().flatten(1).sum(1)


@pytest.mark.parametrize("name", PIPELINES)
def test_an_energy_of_x0_falls_as_its_finite_differences_say(name: str, float64: None) -> None:
    """Measured from outside, on what reaches the second step of whole runs.

    Through the network the predicted x0 moves by -scale sigma^2 / alpha grad_x E(x0(x)), and that gradient is the slope
    of the energy between unguided runs whose sample was moved. Without, E falls by what the gradient in x0 predicts,
    scale sigma^2 / (alpha^2 + sigma^2) |grad E|^2.
    """
    pipeline, call = PIPELINES[name]()
    record, scale, h = Recorder(pipeline), 1e-6, 1e-5

    def second(*terms: Guidance, nudge: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(sample, predicted x0) of the two images."""
        got = record(*terms, nudge=nudge, **call)[1]
        return got["sample"][:2], x0_of(
            pipeline.scheduler, got["model_output"], got["timestep"], got["sample"]
        )[:2]

    def slope(gradient: torch.Tensor, *points: torch.Tensor) -> torch.Tensor:
        return (gradient * (points[0] - points[1]) / (2 * h)).flatten(1).sum(1)

    (x, plain), (above, up), (below, down) = second(), second(nudge=h), second(nudge=-h)
    alpha, sigma = formula(pipeline.scheduler, record.steps[1]["timestep"])
    begin = 0.9 / len(record.steps)  # from the second step
    (seen, through), (seen_too, beside) = (
        second(EnergyGuidance(waves, scale, begin, of="x0", through_network=one))
        for one in (True, False)
    )
    assert torch.equal(seen, x) and torch.equal(seen_too, x) and x.dtype == torch.float64
    gradient = (plain - through) * alpha / (scale * sigma**2)
    # a control network's own gradient is left out: what it said is taken as given
    tolerance = 0.05 if name == "ControlNet" else 1e-4
    torch.testing.assert_close(
        slope(gradient, above, below),
        (waves(up) - waves(down)) / (2 * h),
        rtol=tolerance,
        atol=tolerance * float(gradient.norm()),
    )
    fall = scale * sigma**2 / (alpha**2 + sigma**2) * plain.cos().square().flatten(1).sum(1)
    torch.testing.assert_close(waves(plain) - waves(beside), fall, rtol=1e-3, atol=0)


def counted(network: torch.nn.Module) -> list[int]:
    """The batch sizes of the network's calls, as they come."""
    calls: list[int] = []
    network.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(
            len(args[0] if args else next(iter(kwargs.values())))
        ),
        with_kwargs=True,
    )
    return calls


CONDITIONS: dict[
    str, tuple[dict[str, Any], float, dict[str, Any]]
] = {  # null, the pipeline's scale, its "off"
    "SD": (
        {"encoder_hidden_states": embeds()["negative_prompt_embeds"]},
        5.0,
        {"guidance_scale": 1.0},
    ),
    "SDXL": (
        {
            "encoder_hidden_states": embeds()["negative_prompt_embeds"],
            "added_cond_kwargs": {"text_embeds": normal(2, WIDTH, seed=6)},
        },
        5.0,
        {"guidance_scale": 1.0},
    ),
    "SD 3": (
        {
            "encoder_hidden_states": embeds()["negative_prompt_embeds"],
            "pooled_projections": normal(2, WIDTH, seed=6),
        },
        5.0,
        {"guidance_scale": 1.0},
    ),
    "DiT": ({"class_labels": torch.tensor([1000])}, 4.0, {"guidance_scale": 1.0}),
    "PixArt-sigma": (
        {"encoder_hidden_states": embeds()["negative_prompt_embeds"]},
        5.0,
        {"guidance_scale": 1.0},
    ),
    "Kandinsky": (
        {"added_cond_kwargs": {"image_embeds": normal(2, WIDTH, seed=2)}},
        4.0,
        {"guidance_scale": 1.0},
    ),
    "ControlNet": (
        {"encoder_hidden_states": embeds()["negative_prompt_embeds"]},
        5.0,
        {"guidance_scale": 1.0},
    ),
    "IF": (
        {"encoder_hidden_states": embeds()["negative_prompt_embeds"]},
        5.0,
        {"guidance_scale": 1.0},
    ),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_classifier_free_guidance_is_the_pipelines_own_with_one_call_a_step(name: str) -> None:
    pipeline, call = PIPELINES[name]()
    null, scale, off = CONDITIONS[name]
    record = Recorder(pipeline)
    if (
        name == "ControlNet"
    ):  # its control for the null prompt comes from the null prompt in one, and not in the other
        call["controlnet_conditioning_scale"] = 0.0
    own = record(**call)
    calls = counted(getattr(pipeline, "unet", None) or pipeline.transformer)
    ours = record(ClassifierFreeGuidance(null, scale - 1), **{**call, **off})
    assert calls == [4] * len(own)
    for one, other in zip(own, ours, strict=True):
        rows = len(other["next"])
        torch.testing.assert_close(
            other["next"], one["next"][:rows], rtol=2e-3, atol=2e-4 * float(one["next"].abs().max())
        )
    plain = record(**{**call, **off})
    assert (plain[0]["next"] - ours[0]["next"]).norm() > 1e-3 * (plain[0]["next"]).norm()


def test_conditions_act_on_part_of_the_run_and_beside_the_pipelines_own_guidance() -> None:
    pipeline, call = PIPELINES["SD"]()
    null = {"encoder_hidden_states": embeds()["negative_prompt_embeds"][:1]}
    calls = counted(pipeline.unet)
    Recorder(pipeline)(ClassifierFreeGuidance(null, 2.0, 0.0, 0.5), **call)  # PNDM: four steps
    assert calls == [8, 8, 4, 4]

    pipeline, call = PIPELINES["img2img"]()
    calls, spy = counted(pipeline.unet), Spy(0.1)
    Recorder(pipeline)(
        ClassifierFreeGuidance(null, 2.0, 0.5, 1.0) + spy, **{**call, "num_inference_steps": 6}
    )
    assert [step.index for step in spy.seen] == [0, 1, 2, 3] and {
        step.count for step in spy.seen
    } == {4}
    assert calls == [4, 4, 4, 4, 8, 4, 8, 4]  # the spy's own between them


def test_a_worse_network_is_told_the_same() -> None:
    """Autoguidance of a whole Stable Diffusion step, written out."""
    pipeline, call = PIPELINES["SD 2 Euler v"]()
    worse = lively(conditional_unet(), seed=5)
    record = Recorder(pipeline)
    plain, ours = record(**call), record(AutoGuidance(worse, 2.0), **call)
    got, context = plain[0], torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    _, sigma = formula(pipeline.scheduler, got["timestep"])
    with torch.no_grad():
        no, yes = worse(
            torch.cat([got["sample"]] * 2) / hypot(1, sigma),
            got["timestep"],
            encoder_hidden_states=context,
        ).sample.chunk(2)
    bad = no + 5.0 * (yes - no)
    torch.testing.assert_close(
        ours[0]["model_output"],
        got["model_output"] + 2 * (got["model_output"] - bad),
        rtol=1e-3,
        atol=1e-4,
    )
    assert all(p.requires_grad for p in worse.parameters())


def test_a_classifier_steers_stable_diffusion_by_names_and_scales_an_image() -> None:
    pipeline, call = PIPELINES["SD"]()
    classifier, record = small_classifier(in_channels=4), Recorder(pipeline)
    record_of = Seen(ClassifierGuidance(classifier, ["cat", "owl"], [2.0, 0.0]))
    plain, ours = record(**call), record(record_of.term, **call)
    assert not torch.equal(plain[-1]["next"][0], ours[-1]["next"][0])
    torch.testing.assert_close(
        ours[-1]["next"][1], plain[-1]["next"][1]
    )  # PNDM mixes steps, not images
    step, score = record_of.steps[0], record_of.scores[0]
    _, sigma = formula(pipeline.scheduler, step.timestep)
    torch.testing.assert_close(
        ours[0]["model_output"], plain[0]["model_output"] - sigma * score, rtol=1e-3, atol=1e-5
    )
    with pytest.raises(
        ValueError, match="label holds 3 labels up to id 2; one, or one for each of the 2 images"
    ):
        record(ClassifierGuidance(classifier, [0, 1, 2]), **call)


@pytest.mark.parametrize("name", ["img2img", "img2img Euler", "inpainting 9", "inpainting 4"])
def test_images_that_exist_are_guided_to_a_lower_energy(name: str) -> None:
    pipeline, call = PIPELINES[name]()
    call |= {"output_type": "latent", "strength": 0.7, "num_inference_steps": 10}

    def energy(latents: torch.Tensor) -> torch.Tensor:
        return latents.float()[..., :4].square().mean((1, 2, 3))

    def run(scale: float) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        with guide(pipeline, EnergyGuidance(energy, scale, of="x0")):
            return pipeline(**{**call, "generator": generators})[0]

    plain, guided, more = run(0.0), run(20.0), run(60.0)
    assert (energy(guided) < energy(plain)).all() and (energy(more) < energy(guided)).all()
    if name == "inpainting 4":  # outside the mask the pipeline puts the image back
        torch.testing.assert_close(guided[..., 4:], plain[..., 4:])
        assert not torch.equal(guided[..., :4], plain[..., :4])


def test_a_sum_of_terms_is_one_guidance() -> None:
    pipeline, call = PIPELINES["SD without"]()
    record, null = Recorder(pipeline), {"encoder_hidden_states": embeds()["negative_prompt_embeds"]}
    terms = [Spy(0.1), ClassifierFreeGuidance(null, 2.0)]
    plain, one, other, both, summed = (
        record(*some, **call)[0]["model_output"]
        for some in ([], terms[:1], terms[1:], terms, [terms[0] + terms[1]])
    )
    torch.testing.assert_close(both - plain, (one - plain) + (other - plain), rtol=1e-3, atol=1e-5)
    assert torch.equal(both, summed)


def test_dit_of_two_images_of_one_seed_is_not_taken_for_a_doubled_batch() -> None:
    pipeline = dit()
    classifier = small_classifier(in_channels=4)
    call = {
        "class_labels": [3, 3],
        "guidance_scale": 1.0,
        "num_inference_steps": 2,
        "output_type": "np",
    }
    with guide(pipeline, ClassifierGuidance(classifier, ["cat", "dog"])):
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        images = pipeline(**call, generator=generators).images
    assert abs(images[0] - images[1]).max() > 1e-4


def test_within_inference_mode_it_is_the_same() -> None:
    pipeline, call = PIPELINES["SD 2 Euler v"]()
    record, null = Recorder(pipeline), {"encoder_hidden_states": embeds()["negative_prompt_embeds"]}

    def terms() -> Guidance:
        return ClassifierFreeGuidance(null, 2.0) + EnergyGuidance(
            lambda x: (x**2).sum((1, 2, 3)), through_network=True
        )

    plain = record(terms(), **call)[-1]["next"]
    with torch.inference_mode():  # the network is evaluated again there, for the gradient
        torch.testing.assert_close(record(terms(), **call)[-1]["next"], plain)


def test_a_new_call_and_other_timesteps_are_a_new_run() -> None:
    pipeline, call = PIPELINES["SDXL"]()
    spy = Spy(0.1)
    with guide(pipeline, spy):
        pipeline(**deepcopy(call))
        pipeline(**{**deepcopy(call), "num_inference_steps": 2})
        pipeline(**{**deepcopy(call), "timesteps": [900, 400]})
    assert [(step.index, step.count) for step in spy.seen] == [
        (0, 3),
        (1, 3),
        (2, 3),
        (0, 2),
        (1, 2),
        (0, 2),
        (1, 2),
    ]
    assert [step.timestep for step in spy.seen[-2:]] == [900, 400]


def test_a_run_that_broke_off_leaves_nothing_to_the_next() -> None:
    """Between the network's call and the step: the call must not count for the next run."""
    pipeline, call = PIPELINES["SDXL"]()
    spy = Spy(0.1)

    class Broken(Exception):
        pass

    def rescale(self: Any) -> float:
        raise Broken

    with guide(pipeline, spy):
        own = type(pipeline).guidance_rescale
        type(pipeline).guidance_rescale = property(rescale)
        try:
            with pytest.raises(Broken):
                pipeline(**deepcopy(call))
        finally:
            type(pipeline).guidance_rescale = own
        assert not spy.seen
        pipeline(**deepcopy(call))
    assert len(spy.again) == 3


def test_a_loop_of_ones_own_is_guided_too() -> None:
    """With timesteps set before, and the second half of the run only."""
    pipeline, _ = PIPELINES["SD"]()
    pipeline.scheduler = EulerDiscreteScheduler(**SD)
    pipeline.scheduler.set_timesteps(4)
    begun = pipeline.scheduler.timesteps[2:]
    x, spy = normal(1, 4, 8, 8) * 2, Spy(0.1)
    with guide(pipeline, spy), torch.no_grad():
        for t in begun:
            output = pipeline.unet(
                pipeline.scheduler.scale_model_input(x, t), t, normal(1, TOKENS, WIDTH)
            ).sample
            x = pipeline.scheduler.step(output, t, x).prev_sample
    assert [(step.index, step.count) for step in spy.seen] == [(0, 2), (1, 2)]
    assert [step.timestep for step in spy.seen] == begun.tolist()


# misuse


def test_what_cannot_be_guided_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, call = PIPELINES["SD"]()
    spy = Spy()

    def entering(pipeline: Any, *terms: Any) -> None:
        with guide(pipeline, *terms):
            raise AssertionError

    class Bare:
        scheduler, unet = DDIMScheduler(), None

    with pytest.raises(ValueError, match="pipeline Bare has no unet or transformer or prior"):
        entering(Bare(), spy)
    Bare.scheduler = None
    with pytest.raises(ValueError, match="pipeline Bare has no scheduler"):
        entering(Bare(), spy)
    with pytest.raises(ValueError, match=r"terms: \[\]; one or more terms"):
        entering(pipeline)
    with pytest.raises(ValueError, match=r"terms: \['NoiseAwareClassifier'\]; one or more terms"):
        entering(pipeline, small_classifier())
    with guide(pipeline, spy):
        with pytest.raises(ValueError, match="is guided already; give all terms to one guide"):
            entering(pipeline, spy)
        pipeline(**call)
    assert "step" not in vars(pipeline.scheduler) and "nothing was guided" not in caplog.text
    with guide(pipeline, spy):
        pass
    assert (
        "nothing was guided: PNDMScheduler.step of the StableDiffusionPipeline was not called"
        in caplog.text
    )
    pipeline.scheduler = diffusers.DDIMInverseScheduler()
    with pytest.raises(ValueError, match="scheduler DDIMInverseScheduler can't be guided"):
        entering(pipeline, spy)


def test_conditions_that_the_network_is_not_told_are_refused() -> None:
    pipeline, call = PIPELINES["SD"]()
    record = Recorder(pipeline)
    with pytest.raises(
        ValueError,
        match=r"a term has the condition 'class_labels'; the pipeline passes its "
        r"UNet2DConditionModel \['encoder_hidden_states', ",
    ):
        record(ClassifierFreeGuidance(1), **call)
    for shape in ((3, TOKENS, WIDTH), (1, TOKENS + 1, WIDTH)):
        with pytest.raises(
            ValueError, match=r"a condition has shape .* in the place of \(4, 5, 8\); one row"
        ):
            record(ClassifierFreeGuidance({"encoder_hidden_states": normal(*shape)}), **call)
    record(ClassifierFreeGuidance(1, 0.0), **call)


def test_a_condition_for_some_of_the_images_is_refused() -> None:
    """Of two prompts with two images each, whose rows are 0, 0, 1, 1 and not 0, 1, 0, 1."""
    pipeline, call = PIPELINES["SD"]()
    rows = {"encoder_hidden_states": normal(2, TOKENS, WIDTH)}
    with (
        pytest.raises(ValueError, match="'encoder_hidden_states' has 2 rows for 4 images; one row"),
        guide(pipeline, ClassifierFreeGuidance(rows, 2.0)),
    ):
        pipeline(**call, num_images_per_prompt=2)


def test_a_pipeline_with_the_same_network_and_its_own_scheduler_is_guided_by_its_own_terms() -> (
    None
):
    first = stable_diffusion(scheduler=DDIMScheduler(clip_sample=False, **SD))
    second = stable_diffusion(
        diffusers.StableDiffusionPipeline, EulerDiscreteScheduler(**SD), first.unet
    )
    null = {"encoder_hidden_states": normal(1, TOKENS, WIDTH)}
    terms = ClassifierFreeGuidance(null, 2.0), ClassifierFreeGuidance(null, 3.0)

    def images(pipeline: Any) -> torch.Tensor:
        return pipeline(**sd_call(), generator=torch.Generator().manual_seed(0)).images

    plain, guided = images(second), []
    for pipeline, term in zip((first, second), terms, strict=True):
        with guide(pipeline, term):
            guided.append(images(pipeline))
    with guide(first, terms[0]):
        assert torch.equal(images(second), plain)
        with guide(second, terms[1]):
            assert torch.equal(images(second), guided[1])
            assert torch.equal(images(first), guided[0])


WITHOUT_SOURCE = """
class Nonlinear(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self):
        self.scheduler.set_timesteps(3)
        latents = normal(1, 4, 8, 8)
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t, normal(1, TOKENS, WIDTH)).sample.tanh()
            latents = self.scheduler.step(output, t, latents).prev_sample
"""


def test_a_combination_that_is_not_affine_and_has_no_source_is_refused_where_it_matters() -> None:
    exec(WITHOUT_SOURCE, names := {**globals(), "DiffusionPipeline": diffusers.DiffusionPipeline})
    pipeline = names["Nonlinear"](conditional_unet(), DDIMScheduler(clip_sample=False, **SD))
    square = lambda x: (x**2).sum((1, 2, 3))  # noqa: E731
    with guide(pipeline, EnergyGuidance(square, of="x0")):
        pipeline()
    with (
        pytest.raises(
            ValueError, match="no weighted mean of the batch's parts .*use through_network=False"
        ),
        guide(pipeline, EnergyGuidance(square, of="x0", through_network=True)),
    ):
        pipeline()


def test_a_network_that_is_not_seen_is_told_of() -> None:
    pipeline, call = PIPELINES["SD"]()

    class Unseen(Guidance):
        def score(self, step: StepContext) -> torch.Tensor:
            return step.predict(step.sample)

    with (
        pytest.raises(
            ValueError,
            match="between two steps none of its unet, transformer, prior, decoder was called",
        ),
        guide(pipeline, Unseen()),
    ):
        pipeline.unet = conditional_unet()  # as a pipeline with two networks that change over
        pipeline(**call)


def test_a_scheduler_that_is_exchanged_within_is_refused_at_the_next_call() -> None:
    pipeline, call = PIPELINES["SD"]()
    own, spy = pipeline.scheduler, Spy(0.1)
    with guide(pipeline, spy):
        pipeline(**deepcopy(call))
        count = len(spy.seen)
        for other in (DDIMScheduler.from_config(own.config), deepcopy(own), None):
            pipeline.scheduler = other
            kind = type(other).__name__
            if other is None:  # the network alone, in a loop of one's own
                with pytest.raises(ValueError, match="PNDMScheduler for NoneType, whose steps"):
                    pipeline.unet(normal(1, 4, 8, 8), 5, normal(1, TOKENS, WIDTH))
                continue
            with pytest.raises(ValueError, match=f"within guide, PNDMScheduler for {kind}, whose"):
                pipeline(**deepcopy(call))
        assert len(spy.seen) == count
        pipeline.scheduler = own  # put back, it is guided as before
        pipeline(**deepcopy(call))
        assert len(spy.seen) == 2 * count
        pipeline.scheduler = other = DDIMScheduler.from_config(own.config)
    assert pipeline.scheduler is other and "step" not in vars(own)
    with guide(pipeline, spy):
        pipeline(**deepcopy(call))
    assert len(spy.seen) > 2 * count


COPIES = {"deepcopy": deepcopy, "copy": copy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_the_scheduler_made_within_is_not_guided(name: str) -> None:
    """Its steps are those of a scheduler that was never guided, and leave the original as it is."""
    pipeline, _ = PIPELINES["SD"]()
    pipeline.scheduler = scheduler = EulerDiscreteScheduler(**SD)
    fresh, spy = EulerDiscreteScheduler(**SD), Spy(0.1)
    x, eps = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1)
    with guide(pipeline, spy):
        copied = COPIES[name](scheduler)
        for one in (scheduler, copied, fresh):
            one.set_timesteps(3)
        for index in range(2):
            expected = fresh.step(eps, fresh.timesteps[index], x).prev_sample
            assert torch.equal(copied.step(eps, copied.timesteps[index], x).prev_sample, expected)
        assert not spy.seen and scheduler.step_index is None and copied.step_index == 2
        with pytest.raises(ValueError, match="between two steps none of its unet"):
            scheduler.step(eps, scheduler.timesteps[0], x)  # guided: the spy evaluates the network
        assert len(spy.seen) == 1
    expected = fresh.step(eps, fresh.timesteps[2], x).prev_sample
    assert torch.equal(copied.step(eps, copied.timesteps[2], x).prev_sample, expected)
    assert (
        len(spy.seen) == 1 and vars(copied).keys() == vars(fresh).keys() == vars(scheduler).keys()
    )


def test_a_step_that_the_user_replaced_is_kept_and_copied() -> None:
    pipeline, call = PIPELINES["SD"]()
    scheduler = pipeline.scheduler
    own = scheduler.step = partial(type(scheduler).step, scheduler)
    with guide(pipeline, Spy(0.1)):
        pipeline(**call)
        assert vars(copy(scheduler))["step"] is own and scheduler.step is not own
    assert scheduler.step is own and "__getstate__" not in vars(scheduler)


def test_a_pipeline_copied_within_is_not_guided() -> None:
    pipeline, call = PIPELINES["SD"]()

    def images(one: Any) -> torch.Tensor:
        return one(**deepcopy(call), generator=torch.Generator().manual_seed(0)).images

    plain, spy, rows = images(pipeline), Spy(0.1), []
    free = ClassifierFreeGuidance({"encoder_hidden_states": normal(1, TOKENS, WIDTH)}, 3.0)
    with guide(pipeline, spy, free):
        copied = deepcopy(pipeline)
        copied.unet.register_forward_hook(lambda _, args, output: rows.append(len(output[0])))
        assert torch.equal(images(copied), plain) and not spy.seen
        assert not torch.equal(images(pipeline), plain) and spy.seen
    assert torch.equal(images(copied), plain)
    assert set(rows) == {4}  # two images, with and without the prompt; the term adds no rows


def test_dit_with_a_scheduler_that_scales_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="not given the sample as EulerDiscreteScheduler scales it.*use a "
        "scheduler that doesn't scale",
    ):
        Recorder(dit(EulerDiscreteScheduler()))(Spy(), **PIPELINES["DiT"]()[1])


def test_a_classifier_on_another_device_is_refused() -> None:
    pipeline, call = PIPELINES["SD"]()
    with pytest.raises(
        ValueError,
        match=r"NoiseAwareClassifier is on \['meta'\], the pipeline's samples are on cpu",
    ):
        Recorder(pipeline)(
            ClassifierGuidance(small_classifier(in_channels=4).to("meta"), "cat"), **call
        )


def test_infinite_guidance_is_refused() -> None:
    pipeline, call = PIPELINES["SD"]()
    with pytest.raises(FloatingPointError, match="the guidance is not finite at step 0 of 4"):
        Recorder(pipeline)(
            EnergyGuidance(lambda x: (x * 1e38).exp().sum((1, 2, 3)), of="x0"), **call
        )


def test_a_classifier_of_images_is_not_asked_about_packed_latents() -> None:
    pipeline, call = PIPELINES["Flux"]()
    with pytest.raises(ValueError, match=r"sample.shape is \(2, 16, 16\)"):
        Recorder(pipeline)(ClassifierGuidance(small_classifier(), "cat"), **call)


def test_clipping_without_noise_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, call = PIPELINES["DDIM"]()
    Recorder(pipeline)(Spy(0.0), **call)
    assert "clip_sample=False" not in caplog.text
    Recorder(pipeline)(Spy(0.1), **call)
    assert caplog.text.count("use clip_sample=False") == 1


# networks in other clothes


def test_a_network_whose_forward_is_exchanged_meanwhile() -> None:
    """As offloading does after each call of the pipeline."""
    pipeline, call = PIPELINES["SD"]()
    spies = Spy(0.1), Spy(0.1)
    expected = Recorder(pipeline)(spies[0], **call)
    add_hook_to_module(pipeline.unet, ModelHook())
    with guide(pipeline, spies[1]):
        pipeline(**deepcopy(call), generator=torch.Generator().manual_seed(7))
        remove_hook_from_module(pipeline.unet)
        add_hook_to_module(pipeline.unet, ModelHook())
        pipeline(**deepcopy(call), generator=torch.Generator().manual_seed(7))
    assert len(spies[1].again) == 2 * len(expected)
    for index, seen in enumerate(spies[1].again):
        torch.testing.assert_close(seen, spies[0].again[index % len(expected)])
    remove_hook_from_module(pipeline.unet)


def test_in_half_precision_it_is_nearly_the_same() -> None:
    scores = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipeline, call = PIPELINES["SD 2 Euler v"]()
        null = {"encoder_hidden_states": embeds()["negative_prompt_embeds"]}
        energy = Seen(
            EnergyGuidance(lambda x: (x.float() ** 2).sum((1, 2, 3)), 1e-3, through_network=True)
        )
        call = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) else value
            for name, value in call.items()
        }
        Recorder(pipeline.to(dtype))(energy.term + ClassifierFreeGuidance(null, 0.1), **call)
        assert energy.scores[0].dtype == torch.float32
        scores[dtype] = energy.scores[0]
    assert (
        torch.nn.functional.cosine_similarity(
            *(score.flatten() for score in scores.values()), dim=0
        )
        > 0.95
    )


def test_a_compiled_network() -> None:
    """Which diffusers sees through, and whose signature says nothing."""
    pipeline, call = PIPELINES["DiT without"]()
    record, call = Recorder(pipeline), {**call, "num_inference_steps": 2}

    def terms() -> Guidance:
        return ClassifierFreeGuidance(1000, 2.0) + Spy(0.1)

    expected, calls = record(terms(), **call), counted(pipeline.transformer)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    assert isinstance(pipeline.transformer, OptimizedModule)
    ours = record(terms(), **call)
    assert calls == [4, 2] * len(ours)  # with the null label; the spy's own
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one["next"], other["next"])


def test_after_guidance_that_was_not_finite_the_next_run_is_its_own() -> None:
    """Within one block: the error of a run is raised once, not at the next one's first call."""
    pipeline, call = PIPELINES["DDIM"]()
    factor = [float("nan")]

    class Sometimes(Spy):
        def score(self, step: StepContext) -> torch.Tensor:
            return factor[0] * super().score(step)

    with guide(pipeline, Sometimes(0.1)):
        with pytest.raises(FloatingPointError, match="not finite at step 0"):
            pipeline(**deepcopy(call))
        factor[0] = 1.0
        pipeline(**deepcopy(call))

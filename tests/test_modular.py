"""The block of Modular Diffusers, against the equivalent plain pipeline under `guide`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance as Guider
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)
from test_guidance import small_classifier
from tiny_pipelines import SD, Seen, Spy, normal, quiet, sdxl, sdxl_call

from guided_diffusers import ClassifierFreeGuidance, ClassifierGuidance
from guided_diffusers.attach import guide
from guided_diffusers.modular import ClassifierGuidanceBlock

LATENTS = normal(2, 4, 8, 8, seed=3)


def modular(block: bool = True) -> Any:
    """SDXL from embeddings to latents, with our block or without; components, but for the scheduler, as `sdxl()`."""
    blocks = StableDiffusionXLCoreDenoiseStep()
    if block:
        blocks.sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks.insert(
            "guidance", ClassifierGuidanceBlock(), 2
        )
    pipeline = blocks.init_pipeline()
    plain = sdxl()
    pipeline.update_components(
        unet=plain.unet,
        vae=plain.vae,
        scheduler=EulerDiscreteScheduler(**SD),
        guider=Guider(guidance_scale=5.0),
    )
    if block:
        pipeline.update_components(classifier=small_classifier(in_channels=4))
    return quiet(pipeline)


def call(pipeline: Any, **more: Any) -> torch.Tensor:
    given = sdxl_call()
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "height",
        "width",
        "num_inference_steps",
    )
    return pipeline(
        **{**{name: given[name] for name in names}, "latents": LATENTS.clone(), **more},
        output="latents",
        generator=torch.Generator().manual_seed(0),
    )


def test_at_scale_0_the_latents_are_the_same_bit_for_bit() -> None:
    plain = call(modular(block=False))
    pipeline = modular()
    assert torch.equal(call(pipeline, label="cat", guidance_scale=0.0), plain)
    assert not torch.equal(call(pipeline, label="cat"), plain)
    assert all(p.requires_grad for p in pipeline.classifier.parameters())


class Mine(ClassifierGuidanceBlock):
    """A user's block, in a file that holds more than it."""


def test_the_file_of_a_users_block_is_not_saved_with_it(tmp_path: Path) -> None:
    Mine().save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir() and not list(tmp_path.rglob("*.py"))
    ClassifierGuidanceBlock().save_pretrained(tmp_path / "block")
    assert len(list(tmp_path.rglob("*.py"))) == 1


def test_it_is_the_plain_pipeline_under_guide() -> None:
    label, scale = ["cat", "owl"], [3.0, 1.0]
    pipeline = modular()
    ours = call(pipeline, label=label, guidance_scale=scale)
    term = ClassifierGuidance(small_classifier(in_channels=4), label, scale)
    plain = sdxl()
    with guide(plain, term):
        expected = plain(
            **sdxl_call(), latents=LATENTS.clone(), generator=torch.Generator().manual_seed(0)
        ).images
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    with guide(plain, ClassifierGuidance(small_classifier(in_channels=4), label, [0.0, 0.0])):
        free = plain(
            **sdxl_call(), latents=LATENTS.clone(), generator=torch.Generator().manual_seed(0)
        ).images
    assert (ours - free).norm() > 20 * (
        ours - expected
    ).norm()  # the two calls' batches differ, in rounding
    assert torch.equal(
        call(pipeline, label=label, guidance_scale=scale), ours
    )  # nothing is left from a run


def test_guide_works_on_a_modular_pipeline() -> None:
    label, pipeline = ["cat", "owl"], modular(block=False)
    with guide(pipeline, ClassifierGuidance(small_classifier(in_channels=4), label, 3.0)):
        guided = call(pipeline)
    assert torch.equal(guided, call(modular(), label=label, guidance_scale=3.0))


def test_terms_through_the_network_ask_it_again_in_as_many_calls() -> None:
    """A modular pipeline calls its network once for each part of its classifier-free guidance."""
    pipeline, spy = modular(block=False), Spy(0.1)
    with guide(pipeline, spy):
        call(pipeline)
    assert len(spy.again) == 3
    for again, step in zip(spy.again, spy.seen, strict=True):
        torch.testing.assert_close(again, step.x0, rtol=1e-3, atol=1e-4)
    null = {
        "encoder_hidden_states": sdxl_call()["negative_prompt_embeds"],
        "added_cond_kwargs": {"text_embeds": sdxl_call()["negative_pooled_prompt_embeds"]},
    }
    own = call(pipeline)
    pipeline.update_components(guider=Guider(guidance_scale=1.0))
    with guide(pipeline, ClassifierFreeGuidance(null, 4.0)):
        torch.testing.assert_close(call(pipeline), own, rtol=1e-3, atol=1e-3)


def test_img2img_begins_midway() -> None:
    """As the plain pipeline of image to image under `guide`, bit for bit as `guide` on the modular one; `start` and
    `stop` count from where the run begins."""
    image, label = normal(2, 4, 8, 8, seed=6), ["cat", "owl"]
    given = {
        "image_latents": image,
        "strength": 0.7,
        "num_inference_steps": 6,
        "latents": None,
    }  # four steps
    plain = quiet(StableDiffusionXLImg2ImgPipeline(**sdxl().components, add_watermarker=False))
    own = {name: value for name, value in sdxl_call().items() if name not in ("height", "width")}
    own |= {"image": image, "strength": 0.7, "num_inference_steps": 6}

    def under_guide(pipeline: Any, *interval: float) -> tuple[torch.Tensor, list[int]]:
        """The latents, and at which steps the term acted."""
        seen = Seen(ClassifierGuidance(small_classifier(in_channels=4), label, 3.0, *interval))
        with guide(pipeline, seen.term):
            if pipeline is plain:
                latents = plain(**own, generator=torch.Generator().manual_seed(0)).images
            else:
                latents = call(pipeline, **given)
        assert {step.count for step in seen.steps} == {4}
        return latents, [step.index for step in seen.steps]

    full = call(modular(), label=label, guidance_scale=3.0, **given)
    free = call(modular(), label=label, guidance_scale=0.0, **given)
    found, steps = under_guide(modular(block=False))
    assert torch.equal(found, full) and steps == [0, 1, 2, 3]
    expected, steps = under_guide(plain)
    torch.testing.assert_close(full, expected, rtol=1e-3, atol=1e-4)
    assert steps == [0, 1, 2, 3] and (full - free).norm() > 20 * (full - expected).norm()

    late, steps = under_guide(modular(block=False), 0.5)
    assert steps == [2, 3] and not torch.equal(late, free)
    expected, steps = under_guide(plain, 0.5)
    torch.testing.assert_close(late, expected, rtol=1e-3, atol=1e-4)
    assert steps == [2, 3] and (late - full).norm() > 20 * (late - expected).norm()
    assert under_guide(modular(block=False), 0.0, 0.5)[1] == [0, 1]


def test_what_the_classifier_does_not_know_is_refused() -> None:
    pipeline = modular()
    with pytest.raises(ValueError, match="label 'cow' is unknown; allowed: ids 0 to 2"):
        call(pipeline, label="cow")
    with pytest.raises(ValueError, match="Required input 'label' is missing"):
        call(pipeline)

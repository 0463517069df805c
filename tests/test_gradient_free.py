"""Guidance by a classifier's value alone (`examples/benchmarks/gradient_free.py`): what its rules choose."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from helpers import TRAINING, load_script
from test_guidance import quiet, small_classifier, small_unet

from guided_diffusers import ClassifierFreeGuidance, ClassifierGuidedPipeline

gradient_free = load_script("gradient_free", TRAINING.parent / "examples/benchmarks")
ONE_LEVEL = {"block_out_channels": (8,), "layers_per_block": 1}


def pipeline(logits: list[float]) -> ClassifierGuidedPipeline:
    """With a classifier that gives these logits of any image, and a network with a null label."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = small_unet(**ONE_LEVEL, **blocks, num_class_embeds=4)
    classifier = small_classifier(**ONE_LEVEL, down_block_types=("ResnetDownsampleBlock2D",))
    torch.nn.init.zeros_(classifier.head[-1].out.weight)
    classifier.head[-1].out.bias.data = torch.tensor(logits)
    return quiet(unet, diffusers.DDIMScheduler(clip_sample=False), classifier)


def images(pipeline: ClassifierGuidedPipeline, guidance: Any) -> tuple[torch.Tensor, int]:
    """Images of the labels 0 and 1, and how many rows the network was evaluated for."""
    rows: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    call = {"guidance_scale": 0.0, "num_inference_steps": 3, "output_type": "latent"}
    result = pipeline([0, 1], generator=generators, guidance=guidance, **call).images
    hook.remove()
    return result, sum(rows)


def term(pipeline: ClassifierGuidedPipeline, scale: float, **rule: Any) -> Any:
    rule = {"by_confidence": False, "by_label": False, **rule}
    return gradient_free.GradientFreeGuidance(pipeline, [0, 1], scale, 0.0, **rule)


@pytest.mark.parametrize("of", ["x0", "x_t"])
def test_without_a_rule_it_is_classifier_free_guidance_and_by_label_with_another_null(
    of: str,
) -> None:
    guided = pipeline([0.0, 0.0, 1.0])
    for by_label, reference in ((False, 3), (True, 2)):  # 2 is the most probable beside 0 and 1
        expected, rows = images(guided, ClassifierFreeGuidance(reference, 0.3))
        result, evaluated = images(guided, term(guided, 0.3, by_label=by_label, of=of))
        assert torch.allclose(result, expected, atol=1e-5) and evaluated == rows == 12


def test_by_confidence_the_scale_is_that_share_and_nothing_is_evaluated_where_it_is_low() -> None:
    guided = pipeline([0.0, 0.0, 0.0])
    expected, _ = images(guided, ClassifierFreeGuidance(3, 0.2))
    result, _ = images(guided, term(guided, 0.3, by_confidence=True))  # 1 - p = 2/3
    assert torch.allclose(result, expected, atol=1e-5)
    certain = pipeline([60.0, 0.0, 0.0])
    plain, _ = images(certain, None)
    result, evaluated = images(certain, term(certain, 0.3, by_confidence=True, threshold=0.05))
    assert torch.equal(result[0], plain[0]) and not torch.allclose(result[1], plain[1])
    assert evaluated == 3 * (2 + 1)

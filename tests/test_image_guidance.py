"""Guidance through the predicted x0: gradients against closed forms, preprocessing against the real processors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import hypot
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Mixture
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image
from test_guidance import level_at, normal, quiet, sample, small_unet
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from guided_diffusers import ClassifierGuidedPipeline, StepContext
from guided_diffusers.guidance import Guidance
from guided_diffusers.image_guidance import (
    CLIPGuidance,
    ImageClassifierGuidance,
    NoiseAwareCLIPGuidance,
    Preprocess,
    as_tensor,
)
from guided_diffusers.images import decode


class Linear(torch.nn.Module):
    """Three logits of 4x4 grey images, in float64."""

    def __init__(self, **config: Any):
        super().__init__()
        self.weight = torch.nn.Parameter(normal(3, 16, seed=5))
        self.config = config
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.mT


def step_of(
    mixture: Mixture,
    ratio: float = 0.7,
    prediction: str = "epsilon",
    batch: int = 3,
    **changes: Any,
) -> StepContext:
    """A step at random samples with the exact network."""
    level = level_at(ratio, prediction)

    def predict(x: torch.Tensor) -> torch.Tensor:
        return mixture.denoised(x, level.alpha, level.sigma, None)

    x = level.alpha * mixture.means[[0, 1, 0, 1, 0][:batch]] + level.sigma * normal(
        batch, 1, 4, 4, seed=2
    )
    return replace(StepContext(x, predict(x), predict, level, 3, 10, 0.0), **changes)


def difference(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, scale: float = 1.0
) -> Any:
    """(direction, its directional derivative of `function` (B,) by central differences)."""
    direction, h = normal(*x.shape, seed=7).to(x), 1e-5 * scale
    with torch.no_grad():
        return direction, (function(x + h * direction) - function(x - h * direction)) / (2 * h)


def log_p(
    label: int, classifier: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor
) -> torch.Tensor:
    output = classifier(images)
    return getattr(output, "logits", output).log_softmax(-1)[:, label]


# the gradient


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("ratio", [0.2, 2.0])
def test_through_the_network_it_is_the_exact_gradient(
    mixture: Mixture, prediction: str, ratio: float
) -> None:
    step, classifier = step_of(mixture, ratio, prediction), Linear()
    score = ImageClassifierGuidance(classifier, 2, 1.5, through_network=True).score(step)
    direction, expected = difference(
        lambda x: 1.5 * log_p(2, classifier, step.predict(x)),
        step.sample,
        hypot(step.level.alpha, step.level.sigma),
    )
    torch.testing.assert_close((score * direction).sum((1, 2, 3)), expected, rtol=1e-6, atol=1e-8)


def test_without_the_network_it_is_that_of_gaussian_data_of_unit_variance(mixture: Mixture) -> None:
    """alpha / (alpha^2 + sigma^2) times the gradient at x0; for such data, exact."""
    classifier = Linear()
    cheap, exact = (
        ImageClassifierGuidance(classifier, 2, through_network=value) for value in (False, True)
    )
    step = step_of(mixture)
    direction, expected = difference(lambda x0: log_p(2, classifier, x0), step.x0)
    alpha, sigma = step.level.alpha, step.level.sigma
    torch.testing.assert_close(
        (cheap.score(step) * direction).sum((1, 2, 3)),
        alpha / (alpha**2 + sigma**2) * expected,
        rtol=1e-6,
        atol=1e-8,
    )
    assert not torch.allclose(cheap.score(step), exact.score(step), rtol=0.1)
    for prediction in ("epsilon", "edm_epsilon", "flow"):
        step = step_of(Mixture(std=1.0, prior=(1.0, 0.0)), prediction=prediction)
        torch.testing.assert_close(cheap.score(step), exact.score(step), rtol=1e-6, atol=1e-8)


def test_labels_scales_temperatures_and_problem_types_are_those_of_classifier_guidance(
    mixture: Mixture,
) -> None:
    step, names = step_of(mixture), {0: "cat", 1: "dog", 2: "owl"}
    classifier = Linear(id2label=names)

    def expect(function: Callable[[torch.Tensor], torch.Tensor], term: Guidance) -> None:
        direction, expected = difference(
            lambda x: function(classifier(step.predict(x))), step.sample
        )
        torch.testing.assert_close(
            (term.score(step) * direction).sum((1, 2, 3)), expected, rtol=1e-5, atol=1e-7
        )

    exact: dict[str, Any] = {"through_network": True}
    weights, scale = (
        normal(3, 3).new_tensor([[0, 1, 0], [0.5, 0, -2], [0, 0, 1]]),
        torch.tensor([1.0, 2.0, 0.5]),
    )
    term = ImageClassifierGuidance(classifier, ["dog", {"cat": 0.5, "owl": -2}, 2], scale, **exact)
    expect(lambda logits: scale * (weights * logits.log_softmax(-1)).sum(-1), term)
    term = ImageClassifierGuidance(
        classifier, "dog", joint_temperature=2.0, marginal_temperature=0.5, **exact
    )
    expect(lambda logits: 2 * logits[:, 1] - (0.5 * logits).logsumexp(-1), term)
    classifier.config["problem_type"] = "multi_label_classification"
    expect(
        lambda logits: logits[:, 1].sigmoid().log(),
        ImageClassifierGuidance(classifier, "dog", **exact),
    )
    classifier.config["problem_type"] = "regression"
    term = ImageClassifierGuidance(classifier, target=[1.0, 2.0, 3.0], std=0.5, **exact)
    expect(lambda f: -((f - torch.tensor([1.0, 2.0, 3.0])) ** 2).sum(-1) / 0.5, term)


def test_normalize_counts_scores(mixture: Mixture) -> None:
    step = step_of(mixture)
    plain, term = (
        ImageClassifierGuidance(Linear(), 1, 2.0, normalize=value).score(step)
        for value in (False, True)
    )
    norms = [one.flatten(1).norm(dim=1) for one in (plain, term, step.score)]
    torch.testing.assert_close(norms[1], 2 * norms[2])
    torch.testing.assert_close(
        term.flatten(1) / norms[1][:, None], plain.flatten(1) / norms[0][:, None]
    )


def tiny_resnet(channels: int = 3) -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=channels,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate("abc")),
    )
    return transformers.ResNetForImageClassification(config).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_networks_dtype_is_its_own_and_the_gradients_that_of_the_sample(
    mixture: Mixture, dtype: torch.dtype
) -> None:
    step = step_of(mixture)
    step = replace(step, sample=step.sample.float(), x0=step.x0.float())
    made = [
        lambda to: ImageClassifierGuidance(tiny_resnet(1).to(to), 1),
        lambda to: CLIPGuidance(tiny_clip().to(to), "cat", processor=clip_processor()),
    ]
    for make in made:
        full, other = make(torch.float32).score(step), make(dtype).score(step)
        assert other.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(full.flatten(), other.flatten(), dim=0) > 0.97


def test_softplus_smooths_the_gradient_and_is_taken_back(mixture: Mixture) -> None:
    step, model = step_of(mixture), tiny_resnet(1)
    plain, term = (
        ImageClassifierGuidance(model, "b", softplus=beta).score(step) for beta in (None, 3.0)
    )
    assert not torch.allclose(plain, term, rtol=0.01)
    smooth = tiny_resnet(1)
    for module in [
        module
        for module in smooth.modules()
        if any(isinstance(c, torch.nn.ReLU) for c in module.children())
    ]:
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.Softplus(3.0))
    torch.testing.assert_close(ImageClassifierGuidance(smooth, "b").score(step), term)
    torch.testing.assert_close(ImageClassifierGuidance(model, "b").score(step), plain)


@pytest.mark.parametrize("through_network", [False, True])
def test_an_off_the_shelf_model_becomes_more_sure_of_the_label_along_a_real_trajectory(
    through_network: bool,
) -> None:
    """Of the predicted x0 on the way, and of the images in the end."""
    pipeline, model = ClassifierGuidedPipeline.from_bundled(defaults={}), tiny_resnet()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    found = {}
    for scale in (0.0, 60.0):
        on_the_way = []

        class Watch(ImageClassifierGuidance):
            def score(self, step: StepContext, seen: list = on_the_way) -> torch.Tensor:
                seen.append(log_p(2, model, self.preprocess(step.x0)))
                return super().score(step)

        asked = lambda level, scale=scale: scale + 1e-9  # noqa: E731 - at 0 it would not be asked
        term = Watch(model, "c", asked, processor=processor, through_network=through_network)
        images = sample(pipeline, num_images_per_label=3, num_inference_steps=6, guidance=term)
        with torch.no_grad():
            found[scale] = torch.stack([*on_the_way, log_p(2, model, term.preprocess(images))])
    rise = (found[60.0] - found[0.0]).detach()
    assert (rise[-3:] > 0).all() and rise[-1].mean() > 0.02 and (rise[2:].mean(1) > 0).all(), (
        rise.mean(1)
    )


def test_scale_0_and_its_interval_switch_it_off() -> None:
    pipeline, model = quiet(small_unet(), DDIMScheduler()), tiny_resnet(1)
    plain, calls = sample(pipeline, num_inference_steps=4), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(
        plain,
        sample(pipeline, num_inference_steps=4, guidance=ImageClassifierGuidance(model, 0, 0.0)),
    )
    assert not calls
    for interval in ({"start": 0.5}, {"stop": 0.5}, {"sigma_interval": (1.0, 20.0)}):
        guided = sample(
            pipeline,
            num_inference_steps=4,
            guidance=ImageClassifierGuidance(model, 0, 5, **interval),
        )
        assert len(calls) == 2 and not torch.equal(plain, guided)
        calls.clear()


# latents


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=1,
        scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


@pytest.mark.parametrize("through_network", [False, True])
def test_through_a_decoder_it_is_the_finite_difference(
    mixture: Mixture, through_network: bool
) -> None:
    vae, model = tiny_vae().double(), tiny_resnet().double()
    step = step_of(mixture, decode=lambda z: decode(vae, z))
    processor = {
        "size": {"height": 12, "width": 12},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    term = ImageClassifierGuidance(model, 1, processor=processor, through_network=through_network)
    view = step.predict if through_network else lambda x0: x0
    at, factor = (
        (step.sample, 1.0)
        if through_network
        else (step.x0, step.level.alpha / (step.level.alpha**2 + step.level.sigma**2))
    )
    direction, expected = difference(
        lambda x: log_p(1, model, term.preprocess(vae.decode(view(x) / 0.5).sample)), at
    )
    torch.testing.assert_close(
        (term.score(step) * direction).sum((1, 2, 3)), factor * expected, rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("kind", ["classifier", "clip with cut-outs"])
def test_decoding_for_a_gradient_holds_the_activations_of_one_image(kind: str) -> None:
    """Each image by itself, and once more in the backward pass, whatever the number of cut-outs."""
    vae = tiny_vae()
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    pipeline, seen = quiet(small_unet(sample_size=4), scheduler, vae=vae), []
    vae.decoder.register_forward_pre_hook(
        lambda _, args: seen.append((len(args[0]), torch.is_grad_enabled()))
    )
    term = (
        ImageClassifierGuidance(tiny_resnet(), 1)
        if kind == "classifier"
        else CLIPGuidance(tiny_clip(), "cat", processor=clip_processor(), cutouts=3)
    )
    sample(pipeline, num_images_per_label=3, num_inference_steps=1, guidance=term)
    assert seen == [(1, True)] * 6


# preprocessing


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth, with an edge, clear of 0 and 255, where Pillow clips what bicubic resampling overshoots."""
    y, x = np.mgrid[:height, :width] / 20
    planes = [128 + 60 * np.sin(x + y), 128 + 50 * np.cos(2 * x) * np.sin(y), 100 + 60 * (x > y)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)


VIT, CONVNEXT, CLIP = "ViTImageProcessor", "ConvNextImageProcessor", "CLIPImageProcessor"
PROCESSORS = [
    (VIT, {"size": {"height": 48, "width": 40}}),
    (VIT, {"size": {"height": 100, "width": 120}, "resample": 3}),
    (VIT, {"do_resize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}),
    (VIT, {"do_normalize": False}),
    (
        VIT,
        {"do_rescale": False, "image_mean": [100.0, 90.0, 80.0], "image_std": [50.0, 60.0, 70.0]},
    ),
    (VIT, {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
    (CONVNEXT, {"size": {"shortest_edge": 384}}),
    (CONVNEXT, {"size": {"shortest_edge": 40}, "crop_pct": 0.8}),
    (CLIP, {}),
    (CLIP, {"size": {"shortest_edge": 41}, "crop_size": {"height": 32, "width": 30}}),
    (CLIP, {"size": {"shortest_edge": 50}, "do_center_crop": False}),
    (CLIP, {"do_resize": False, "crop_size": {"height": 60, "width": 64}}),
]


@pytest.mark.parametrize(("name", "changes"), PROCESSORS)
@pytest.mark.parametrize("size", [(60, 90), (91, 64)])
def test_preprocessing_is_that_of_the_real_processors(
    name: str, changes: dict, size: tuple[int, int]
) -> None:
    """Up to the rounding to 8 bits of Pillow's two passes of resizing; without resizing, exactly."""
    processor = getattr(transformers, name)(**changes)
    image = picture(*size)
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="pt").pixel_values))
    for ours in (Preprocess(processor), Preprocess(processor.to_dict())):
        found = ours(as_tensor(image)[None])
        std = min(processor.image_std) if processor.do_normalize else 1
        grain = (processor.rescale_factor if processor.do_rescale else 1) / std
        error = (found - expected).abs()
        assert found.shape == expected.shape and error.max() < (
            1.6 * grain if processor.do_resize else 1e-4 * grain
        )
        assert error.mean() < 0.5 * grain


def test_preprocessing_turns_grey_to_rgb_and_back() -> None:
    grey, colour = picture(30, 30, "L"), picture(30, 30)
    processor = transformers.ViTImageProcessor(size={"height": 20, "width": 20})
    expected = torch.as_tensor(processor(grey.convert("RGB"), return_tensors="pt").pixel_values)
    assert (Preprocess(processor)(as_tensor(grey)[None]) - expected).abs().max() < 1.6 / 255 / 0.224
    torch.testing.assert_close(
        Preprocess(channels=3)(as_tensor(grey)[None])[0], as_tensor(grey.convert("RGB"))
    )
    one = Preprocess({"rescale_factor": 1 / 255}, channels=1)(as_tensor(colour)[None])
    expected = torch.from_numpy(np.asarray(colour.convert("L"), np.float32))[None, None] / 255
    assert (one - expected).abs().max() < 1.01 / 255


def test_without_a_processor_the_network_is_given_its_size_in_our_range() -> None:
    images = as_tensor(picture(30, 30))[None]
    torch.testing.assert_close(Preprocess()(images), images)
    torch.testing.assert_close(
        Preprocess(size=15)(images),
        torch.nn.functional.interpolate(images, (15, 15), mode="bilinear", antialias=True),
    )
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    model, seen = transformers.ViTForImageClassification(config).eval(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ImageClassifierGuidance(model, 1).log_likelihood(images, None)
    assert seen[0].shape == (1, 1, 8, 8) and seen[0].abs().max() <= 1


@pytest.mark.parametrize(
    "name", ["LevitImageProcessor", "EfficientNetImageProcessor", "MobileViTImageProcessor"]
)
def test_a_processor_that_does_more_than_its_settings_say_is_refused(name: str) -> None:
    size = {"crop_size": {"height": 200, "width": 200}} if "Mobile" in name else {}
    with pytest.raises(ValueError, match=f"processor: {name}.* does something that isn't in"):
        Preprocess(getattr(transformers, name)(**size))


def test_preprocessing_is_differentiable_beyond_the_range_and_in_float64() -> None:
    ours = Preprocess(
        CLIPImageProcessor(size={"shortest_edge": 6}, crop_size={"height": 5, "width": 5})
    )
    assert torch.autograd.gradcheck(ours, 3 * normal(2, 1, 9, 7).requires_grad_(True))


# CLIP

WORDS = ["cat", "dog", "owl"]


def clip_processor(edge: int = 8) -> CLIPProcessor:
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])
    return CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}),
        tokenizer,
    )


def tiny_clip() -> CLIPModel:
    """Its weights large enough that the embeddings differ."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            projection_dim=8,
            vision_config={**shape, "image_size": 8, "patch_size": 4},
            text_config={
                **shape,
                "vocab_size": 54,
                "max_position_embeddings": 12,
                "bos_token_id": 52,
                "eos_token_id": 53,
                "pad_token_id": 53,
            },
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def similarity(model: CLIPModel, pixels: torch.Tensor, words: list[str]) -> torch.Tensor:
    """exp(logit_scale) cos(image, text), (B, N), of CLIPModel's own forward pass."""
    tokens = clip_processor().tokenizer(words, padding=True, return_tensors="pt")
    return model(pixel_values=pixels, **tokens).logits_per_image


def test_clips_gradient_is_that_of_its_own_logits(mixture: Mixture) -> None:
    """With weights, one mixture an image, in float64, through the network."""
    model, step = tiny_clip().double(), step_of(mixture)
    prompts = [{"cat": 1.0, "dog": -0.5}, "owl", {"dog": 2.0}]
    weights = normal(3, 3).new_tensor([[1, -0.5, 0], [0, 0, 1], [0, 2, 0]])
    term = CLIPGuidance(model, prompts, 0.5, processor=clip_processor(), through_network=True)
    direction, expected = difference(
        lambda x: (
            0.5 * (weights * similarity(model, term.preprocess(step.predict(x)), WORDS)).sum(-1)
        ),
        step.sample,
    )
    torch.testing.assert_close(
        (term.score(step) * direction).sum((1, 2, 3)), expected, rtol=1e-5, atol=1e-7
    )
    negative = CLIPGuidance(model, {"cat": -1.0}, processor=clip_processor()).score(step)
    torch.testing.assert_close(
        negative, -CLIPGuidance(model, "cat", processor=clip_processor()).score(step)
    )


def test_image_prompts_add_to_the_text(mixture: Mixture) -> None:
    model, step, processor = tiny_clip().double(), step_of(mixture), clip_processor()
    a, b = picture(20, 30), as_tensor(picture(16, 16, "L"))

    def score(**prompts: Any) -> torch.Tensor:
        return CLIPGuidance(model, processor=processor, **prompts).score(step)

    both = score(prompt="cat", image_prompt=((a, 0.5), (b, -1.0)))
    torch.testing.assert_close(
        both, score(prompt="cat") + 0.5 * score(image_prompt=a) - score(image_prompt=b)
    )
    each = score(image_prompt=[a, b, a])
    torch.testing.assert_close(each[[0, 2]], score(image_prompt=a)[[0, 2]])
    torch.testing.assert_close(each[1], score(image_prompt=b)[1])
    torch.testing.assert_close(
        score(image_prompt=torch.stack([b, -b, b]))[1], score(image_prompt=-b)[1]
    )
    term = CLIPGuidance(model, image_prompt=a, processor=processor)
    own = model.get_image_features(
        processor.image_processor(a, return_tensors="pt").pixel_values.double()
    )
    own = own.pooler_output / own.pooler_output.norm()
    assert (term.direction * own).sum() > 0.99  # Pillow rounds
    exact = CLIPGuidance(
        model, "cat", tokenizer=processor.tokenizer, processor=processor.image_processor
    ).score(step)
    torch.testing.assert_close(exact, score(prompt="cat"))
    backwards = {chr(c): 122 - c for c in range(97, 123)} | {
        chr(c) + "</w>": c - 71 for c in range(97, 123)
    }
    other = CLIPTokenizer(vocab=backwards | {"<|startoftext|>": 52, "<|endoftext|>": 53}, merges=[])
    assert not torch.allclose(score(prompt="cat", tokenizer=other), exact, rtol=1e-3)


def test_cutouts_are_drawn_from_the_seed_and_the_step_alone(mixture: Mixture) -> None:
    model, step = tiny_clip().double(), step_of(mixture)

    def score(step: StepContext, cutouts: int = 4, **options: Any) -> torch.Tensor:
        return CLIPGuidance(
            model, "cat", processor=clip_processor(), cutouts=cutouts, **options
        ).score(step)

    first = score(step)
    torch.manual_seed(1)
    torch.testing.assert_close(first, score(step), rtol=0, atol=0)
    alone = replace(step, sample=step.sample[1:2], x0=step.x0[1:2])
    torch.testing.assert_close(first[1:2], score(alone))
    for other in (
        score(step, seed=1),
        score(replace(step, index=4)),
        score(step, cutouts=3),
        score(step, cutouts=0),
        score(step, smallest_cutout=0.8),
    ):
        assert not torch.allclose(first, other, rtol=1e-3)
    whole = score(step, smallest_cutout=1.0, cutouts=2)  # the whole of a square image, twice
    torch.testing.assert_close(whole, score(step, cutouts=0))


def test_clip_guidance_finds_the_prompt_in_a_run() -> None:
    pipeline, model = quiet(small_unet(), DDIMScheduler(clip_sample=False)), tiny_clip()
    found = []
    for scale in (0.0, 30.0):
        term = CLIPGuidance(model, "owl", scale, processor=clip_processor(), cutouts=2, seed=3)
        images = sample(pipeline, num_images_per_label=6, num_inference_steps=10, guidance=term)
        with torch.no_grad():
            found.append(similarity(model, term.preprocess(images), ["owl"])[:, 0])
    assert ((found[1] - found[0]) > 0).all()


class NoiseAware(torch.nn.Module):
    """Encodes noisy images linearly, of a weight that depends on the timestep, and prompts by their length."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
        self.weight, self.scale = (
            torch.nn.Parameter(normal(4, 16)),
            torch.tensor(3.0, dtype=torch.float64),
        )

    def encode_image(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        return torch.nn.functional.normalize(
            sample.flatten(1) @ self.weight.mT + timestep / 100, dim=-1
        )

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(
            torch.stack([normal(4, seed=len(one)) for one in prompts]), dim=-1
        )


@pytest.mark.parametrize("ratio", [0.3, 4.0])
def test_a_noise_aware_clip_gives_the_gradient_of_its_critic(
    mixture: Mixture, ratio: float
) -> None:
    clip, step = NoiseAware(), step_of(mixture, ratio, "edm_epsilon")
    term = NoiseAwareCLIPGuidance(clip, ["a", {"bb": 2.0, "ccc": -1.0}, "a"], [1.0, 0.5, 2.0])
    t, texts = term.schedule.timestep(step.level), clip.encode_prompts(["a", "bb", "ccc"])
    weights = normal(3, 3).new_tensor([[1, 0, 0], [0, 1, -0.5], [2, 0, 0]])
    direction, expected = difference(
        lambda x: (
            3
            * weights
            * (clip.encode_image(x / hypot(step.level.alpha, step.level.sigma), t) @ texts.mT)
        ).sum(-1),
        step.sample,
    )
    torch.testing.assert_close(
        (term.score(step) * direction).sum((1, 2, 3)), expected, rtol=1e-5, atol=1e-8
    )
    unit = NoiseAwareCLIPGuidance(clip, "a", normalize=True).score(step)
    torch.testing.assert_close(unit.flatten(1).norm(dim=1), step.score.flatten(1).norm(dim=1))


def test_the_real_noise_aware_clip_steers_a_run() -> None:
    from guided_diffusers.clip import NoiseAwareCLIP

    torch.manual_seed(0)
    clip = NoiseAwareCLIP(
        {
            "sample_size": 8,
            "in_channels": 1,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
        },
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "vocab_size": 54,
            "num_attention_heads": 2,
            "max_position_embeddings": 12,
            "projection_dim": 8,
            "bos_token_id": 52,
            "eos_token_id": 53,
            "pad_token_id": 53,
        },
        tokenizer=clip_processor().tokenizer,
    ).eval()
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False))
    found = []
    for scale in (0.0, 3.0):
        term = NoiseAwareCLIPGuidance(clip, "owl", scale)
        images = sample(pipeline, num_images_per_label=6, num_inference_steps=10, guidance=term)
        with torch.no_grad():
            found.append((clip.encode_image(images, 0) @ clip.encode_prompts(["owl"]).mT)[:, 0])
    assert (found[1] > found[0]).all()


# what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageClassifierGuidance(Linear()), "label=None, target=None: .* needs a label"),
        (
            lambda: ImageClassifierGuidance(tiny_resnet(), "zebra"),
            "label 'zebra' is unknown; allowed: ids 0 to 2 and",
        ),
        (
            lambda: ImageClassifierGuidance(tiny_resnet(), 3),
            "label 3 is unknown; allowed: ids 0 to 2",
        ),
        (
            lambda: ImageClassifierGuidance(Linear(), 0, softplus=3.0),
            "Linear has no torch.nn.ReLU to make smooth",
        ),
        (
            lambda: Preprocess({"do_flip": True}),
            r"processor has \['do_flip'\]; allowed: \['crop_pct'",
        ),
        (
            lambda: Preprocess({"size": 224}),
            "processor: size=224; {height, width} or {shortest_edge} is allowed",
        ),
        (
            lambda: Preprocess({"crop_size": {"shortest_edge": 3}}),
            "crop_size=.*; {height, width} is allowed",
        ),
        (
            lambda: Preprocess({"resample": 1, "size": {"shortest_edge": 8}}),
            r"resample=1; 2 \(bilinear\) and 3 \(bicubic\) are allowed",
        ),
        (
            lambda: Preprocess({"image_mean": [0.5] * 4, "image_std": [1] * 4}),
            "channels=4: 1 and 3 are allowed",
        ),
        (
            lambda: Preprocess({"image_mean": [0.5] * 3, "image_std": [1] * 3}, channels=1),
            "each of the network's 1 chan",
        ),
        (lambda: Preprocess({"image_mean": 0.5}), "image_mean=0.5, image_std=None; a number"),
        (
            lambda: Preprocess({"image_processor_type": "NoSuchImageProcessor"}),
            "transformers has no NoSuchImageProcessor",
        ),
        (
            lambda: Preprocess()(torch.zeros(1, 4, 8, 8)),
            r"images have 4 channels; 1 \(grey\) and 3 \(RGB\)",
        ),
        (
            lambda: Preprocess({"crop_size": {"height": 9, "width": 4}})(torch.zeros(1, 1, 8, 8)),
            "is larger than",
        ),
        (lambda: Preprocess({"image_std": 0.5}), "image_std=0.5 has no effect without image_mean"),
        (lambda: Preprocess({"resample": 3}), "resample=3 has no effect without size"),
        (
            lambda: Preprocess({"crop_pct": 0.9, "size": {"height": 8, "width": 8}}),
            "crop_pct=0.9 has no effect with size",
        ),
        (lambda: CLIPGuidance(tiny_clip()), "prompt, image_prompt: at least one is needed"),
        (lambda: CLIPGuidance(tiny_clip(), "cat"), "tokenizer is needed for prompt='cat'"),
        (
            lambda: CLIPGuidance(
                tiny_clip(),
                ["cat", "dog"],
                image_prompt=[picture(8, 8)] * 3,
                processor=clip_processor(),
            ),
            "prompt, image_prompt hold 2 and 3; as many, or one, is allowed",
        ),
        (
            lambda: CLIPGuidance(tiny_clip(), "a" * 20, processor=clip_processor()),
            "has 22 tokens; up to 12 are allowed",
        ),
        (
            lambda: CLIPGuidance(tiny_clip(), [], processor=clip_processor()),
            "prompt is an empty list",
        ),
        (
            lambda: CLIPGuidance(tiny_clip(), {}, processor=clip_processor()),
            r"prompt has \(\); one, several with finite",
        ),
        (
            lambda: CLIPGuidance(tiny_clip(), {"cat": float("nan")}, processor=clip_processor()),
            "prompt has .*nan",
        ),
        (
            lambda: CLIPGuidance(tiny_clip(), image_prompt="cat"),
            r"image_prompt has \(\('cat', 1.0\),\)",
        ),
        (lambda: CLIPGuidance(tiny_clip(), "cat", cutouts=-1), "cutouts=-1, .* 0 or more"),
        (
            lambda: CLIPGuidance(tiny_clip(), "cat", cutouts=1, smallest_cutout=0.0),
            "smallest_cutout=0.0: .*above 0",
        ),
        (
            lambda: CLIPGuidance(tiny_clip(), "cat", seed=3),
            "seed=3, .* have no effect without cutouts",
        ),
        (lambda: NoiseAwareCLIPGuidance(NoiseAware(), [3]), r"prompt has \(\(3, 1.0\),\)"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_list_of_another_length_than_the_batch_is_refused(mixture: Mixture) -> None:
    step = step_of(mixture)
    for term in (
        CLIPGuidance(tiny_clip(), ["cat", "dog"], processor=clip_processor()),
        NoiseAwareCLIPGuidance(NoiseAware(), ["cat", "dog"]),
    ):
        with pytest.raises(
            ValueError, match="prompt holds 2 for 3 images; one, or one per image, is allowed"
        ):
            term.score(step)
    with pytest.raises(ValueError, match="label holds 2 labels"):
        ImageClassifierGuidance(Linear(), [0, 1]).score(step)

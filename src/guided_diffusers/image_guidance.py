"""Guidance by networks trained on clean images: any image classifier, CLIP.

    score  +=  scale * grad_x log p(y | decode(x0(x_t)))

Also guidance by a noise-aware CLIP. `transformers` is imported only where it is used.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .guidance import (
    Guidance,
    NoiseAwareGuidance,
    Scale,
    StepContext,
    differ_within,
    rescale_to_score,
    x0_value_and_gradient,
)
from .likelihood import Label, logits_of, make_likelihood
from .networks import check_module, check_softplus, evaluating, relu_as_softplus
from .noise import module_config
from .preprocess import Preprocess, as_tensor
from .utils import parameter_dtype

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

Prompt = str | Mapping[str, float]


class ImageClassifierGuidance(Guidance):
    """Guidance by an image classifier trained on clean images.

        score += scale * grad_x log p(y | decode(x0))

    The classifier is evaluated on the predicted x0 (Bansal et al. 2023, "Universal guidance for
    diffusion models", eq. 6). At high noise levels x0 is a blur, unlike its training images: a
    `start` above 0, or a `sigma_interval`, leaves those steps out.

    Args:
        classifier: an image classification model of `transformers`, or any module that maps
            images (B, C, H, W) to `.logits`, or to logits (B, num_labels).
        label, target, std, joint_temperature, marginal_temperature, softplus: as in
            `ClassifierGuidance`, with `id2label` and `problem_type` of the classifier's config.
        scale, start, stop, sigma_interval: as in `Guidance`; scale 0 is off.
        processor: the model's image processor, or its settings, as in `Preprocess`. None: images
            in [-1, 1], resized to `config.image_size` if there is one.
        through_network: whether the gradient also passes through the diffusion network: exact, at
            the cost of its forward and backward pass. Images then stay realistic; otherwise large
            scales produce adversarial noise (`examples/benchmarks/x0_gradient.py`).
        normalize: rescale each image's gradient to the norm of its score.

    Raises:
        ValueError: for an invalid argument, or one without effect for this classifier.
    """

    def __init__(
        self,
        classifier: torch.nn.Module,
        label: Label | Sequence[Label] | Tensor | None = None,
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
        processor: BaseImageProcessor | Mapping[str, Any] | None = None,
        target: float | Sequence[float] | Tensor | None = None,
        std: float = 1.0,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 1.0,
        softplus: float | None = None,
        through_network: bool = False,
        normalize: bool = False,
    ):
        super().__init__(scale, start, stop, sigma_interval)
        check_module("classifier", classifier)
        check_softplus(classifier, softplus)
        self.module, self.softplus = classifier, softplus
        self.through_network, self.normalize = through_network, normalize
        self.supports_pure_noise = not (through_network or normalize)
        config = dict(module_config(classifier))
        if config.get("id2label"):
            config.setdefault("num_labels", len(config["id2label"]))  # a property in transformers
        self.likelihood = make_likelihood(
            config, label, target, std, joint_temperature, marginal_temperature
        )
        self.preprocess = Preprocess(
            processor, config.get("num_channels"), config.get("image_size")
        )

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.module,)

    def log_likelihood(self, images: Tensor, step: StepContext | None = None) -> Tensor:
        """log p(y | images) up to a constant, (B,), of images (B, C, H, W) in about [-1, 1]."""
        pixels = self.preprocess(images)
        module = relu_as_softplus(self.module, self.softplus)
        output = module(pixels.to(parameter_dtype(self.module, pixels.dtype)))
        return self.likelihood(logits_of(output))

    def log_factor(self, step: StepContext) -> Tensor:
        """log p(y | decode(x0)), (B,), at any scale."""
        return self.log_likelihood(step.decode(step.x0), step)

    def score(self, step: StepContext) -> Tensor:
        return image_score(self, step)


class CLIPGuidance(Guidance):
    """Guidance by CLIP's similarity of the predicted x0 to a prompt.

        score += scale * grad_x f(decode(x0))
        f(image) = exp(logit_scale) sum_i w_i <e(image), e(prompt_i)>,    |e| = 1

    At the optimum of CLIP's contrastive loss, f is log p(prompt | image) up to a constant (van den
    Oord et al. 2018, "Representation learning with contrastive predictive coding", section 2.3). A
    scale k of the cosine distance is k / exp(logit_scale) here, k / 100 for OpenAI's models.

    Args:
        model: a `transformers.CLIPModel`.
        prompt: a text, {text: weight, ...}, or a list of these, one per image. Negative weights
            guide away from the text.
        scale, start, stop, sigma_interval: as in `Guidance`; scale 0 is off.
        image_prompt: in addition to the text or instead: an image, a tuple of (image, weight)
            pairs, or a list of these, one per image; PIL, or (1 or 3, H, W) in [-1, 1].
        processor: a `CLIPProcessor`, or as in `ImageClassifierGuidance`.
        tokenizer: tokenizer of the text. None: that of the processor.
        cutouts: number of random square crops that replace the image; f is their mean. 0: off.
        smallest_cutout: smallest side of a crop, as a fraction in (0, 1] of the image's shorter
            side, up to which sides are uniform.
        seed: seed of the crops, which are the same for all images of a step.
        through_network, normalize: as in `ImageClassifierGuidance`.

    Raises:
        ValueError: for an invalid argument, or one without effect.
    """

    def __init__(
        self,
        model: CLIPModel,
        prompt: Prompt | list[Prompt] | None = None,
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
        image_prompt: Any = None,
        processor: CLIPProcessor | BaseImageProcessor | Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        cutouts: int = 0,
        smallest_cutout: float = 0.3,
        seed: int = 0,
        through_network: bool = False,
        normalize: bool = False,
    ):
        super().__init__(scale, start, stop, sigma_interval)
        _check_cutouts(cutouts, smallest_cutout, seed)
        self.module, self.through_network, self.normalize = model, through_network, normalize
        self.supports_pure_noise = not (through_network or normalize)
        self.cutouts, self.smallest_cutout, self.seed = cutouts, smallest_cutout, seed
        from transformers import ProcessorMixin

        vision = getattr(getattr(model, "config", None), "vision_config", None)
        if vision is None:
            raise ValueError(f"model={type(model).__name__}: a transformers.CLIPModel is allowed")
        if isinstance(processor, ProcessorMixin):
            tokenizer, processor = tokenizer or processor.tokenizer, processor.image_processor
        self.preprocess = Preprocess(processor, vision.num_channels, vision.image_size)
        self.tokenizer = tokenizer
        with evaluating(model):
            self.direction = self._direction(prompt, image_prompt)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.module,)

    def score(self, step: StepContext) -> Tensor:
        return image_score(self, step)

    def log_likelihood(self, images: Tensor, step: StepContext) -> Tensor:
        """f(images), (B,), of images (B, C, H, W) in about [-1, 1]."""
        views = self._crops(images, step.index) if self.cutouts else [images]
        embeds = self._embed(torch.cat([self.preprocess(view) for view in views]))
        mean = embeds.reshape(len(views), len(images), -1).mean(0)
        scale = self.module.logit_scale.to(mean.dtype).exp()
        return scale * inner_product(mean, self.direction)

    def _crops(self, images: Tensor, index: int) -> list[Tensor]:
        """Random square crops, each at the same position of all images."""
        draw = random.Random(f"cutouts {self.seed} {index}")
        height, width = images.shape[2:]
        crops = []
        for _ in range(self.cutouts):
            side = max(1, round(draw.uniform(self.smallest_cutout, 1) * min(height, width)))
            top, left = draw.randint(0, height - side), draw.randint(0, width - side)
            crops.append(images[..., top : top + side, left : left + side])
        return crops

    def _direction(self, prompt: Any, image_prompt: Any) -> Tensor:
        """Weighted sum of the embeddings of all prompts, (1 or B, D)."""
        if prompt is None and image_prompt is None:
            raise ValueError("prompt, image_prompt: at least one is needed")
        if prompt is not None and self.tokenizer is None:
            raise ValueError(f"tokenizer is needed for prompt={prompt!r}, or a CLIPProcessor")
        if isinstance(image_prompt, Tensor) and image_prompt.ndim == 4:
            image_prompt = list(image_prompt)
        directions = []
        for name, value, kinds, embed in (
            ("prompt", prompt, str, self._embed_texts),
            ("image_prompt", image_prompt, (Image.Image, Tensor), self._embed_images),
        ):
            if value is not None:
                directions.append(prompt_direction(name, value, kinds, embed))
        counts = [len(direction) for direction in directions]
        if len({*counts} - {1}) > 1:
            raise ValueError(
                f"prompt, image_prompt hold {counts[0]} and {counts[1]}; as many, or one, is "
                "allowed"
            )
        return sum(directions)

    def _embed(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(parameter_dtype(self.module))
        return unit_norm(self.module.get_image_features(pixels).pooler_output)

    def _embed_images(self, images: list[Image.Image | Tensor]) -> Tensor:
        device = self.module.logit_scale.device
        tensors = [image if isinstance(image, Tensor) else as_tensor(image) for image in images]
        return torch.cat([self._embed(self.preprocess(x[None].to(device))) for x in tensors])

    def _embed_texts(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        tokens = tokens.to(self.module.logit_scale.device)
        length = tokens.input_ids.shape[1]
        limit = self.module.config.text_config.max_position_embeddings
        if length > limit:
            raise ValueError(f"prompt: the longest has {length} tokens; up to {limit} are allowed")
        features = self.module.get_text_features(tokens.input_ids, tokens.attention_mask)
        return unit_norm(features.pooler_output)


class NoiseAwareCLIPGuidance(NoiseAwareGuidance):
    """Guidance by a CLIP that was trained on noisy images.

        score += scale * grad_x f(x_t, t)
        f(x_t, t) = exp(logit_scale) sum_i w_i <e(x_t, t), e(prompt_i)>

    Nichol et al. 2021, "GLIDE: Towards photorealistic image generation and editing with text-guided
    diffusion models", section 2.3. At the optimum of the contrastive loss, the gradient of f is
    grad log p(prompt | x_t), without a predicted x0.

    Args:
        clip: `NoiseAwareCLIP`, or a module with `encode_image(sample, timestep)` (B, D) and
            `encode_prompts(texts)` (N, D), both of unit norm, `scale`, which is exp(logit_scale),
            and a `config` with the noise schedule of its training.
        prompt: as in `CLIPGuidance`. The others are as in `NoiseAwareGuidance`; scale 0 is off.

    Raises:
        ValueError: for an invalid argument.
    """

    def __init__(
        self,
        clip: torch.nn.Module,
        prompt: Prompt | list[Prompt],
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
        normalize: bool = False,
    ):
        super().__init__(clip, scale, start, stop, sigma_interval, normalize)
        with evaluating(clip):
            self.direction = prompt_direction("prompt", prompt, str, clip.encode_prompts)

    def log_likelihood(self, z: Tensor, t: float) -> Tensor:
        return self.module.scale * inner_product(self.module.encode_image(z, t), self.direction)

    def differs_within(self, particles: int) -> str | None:
        return "prompts" if differ_within(self.direction.tolist(), particles) else None

    def select(self, images: slice | list[int], count: int) -> NoiseAwareCLIPGuidance:
        part = super().select(images, count)
        check_direction(self.direction, count)
        part.direction = self.direction[images] if len(self.direction) > 1 else self.direction
        return part


def image_score(term: ImageClassifierGuidance | CLIPGuidance, step: StepContext) -> Tensor:
    """scale * grad_x log_likelihood(decode(x0)), (B, C, H, W)."""

    def log_likelihood(x0: Tensor) -> Tensor:
        images = step.decode(x0)
        if images.ndim != 4:
            raise ValueError(
                f"{type(term).__name__}: images (B, C, H, W) are allowed, not {tuple(images.shape)}; "
                "of a video take a frame, guide(pipeline, term, frames='middle')"
            )
        return term.log_likelihood(images, step)

    log_p, grad = x0_value_and_gradient(log_likelihood, step, term.through_network)
    step.log_factors.append(log_p)
    if term.normalize:
        grad = rescale_to_score(grad, step)
    return term.scale_at(step) * grad


def unit_norm(embeds: Tensor) -> Tensor:
    """Embeddings scaled to norm 1, in float32 or wider."""
    return F.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)


def _check_cutouts(cutouts: int, smallest: float, seed: int) -> None:
    if cutouts < 0 or not 0 < smallest <= 1:
        raise ValueError(
            f"cutouts={cutouts!r}, smallest_cutout={smallest!r}: 0 or more, and above 0, up to 1, "
            "are allowed"
        )
    if not cutouts and (seed, smallest) != (0, 0.3):
        raise ValueError(f"seed={seed}, smallest_cutout={smallest} have no effect without cutouts")


def prompt_direction(
    name: str, prompt: Any, kinds: type | tuple[type, ...], embed: Callable[[list], Tensor]
) -> Tensor:
    """Weighted sum of prompt embeddings, sum_i w_i e(prompt_i), (1 or B, D).

    `prompt`: of one of the `kinds`, {prompt: weight}, a tuple of (prompt, weight), a list of these.
    """
    rows = []
    for value in prompt if isinstance(prompt, list) else [prompt]:
        if isinstance(value, Mapping):
            value = tuple(value.items())
        row = value if isinstance(value, tuple) else ((value, 1.0),)
        if not row or not all(_is_weighted(pair, kinds) for pair in row):
            raise ValueError(
                f"{name} has {row!r}; one, several with finite weights, or a list of such is "
                "allowed"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{name} is an empty list; give at least one")
    with torch.inference_mode(False), torch.no_grad():
        embeds = embed([item for row in rows for item, _ in row])
        weights = torch.block_diag(*[torch.tensor([[weight for _, weight in row]]) for row in rows])
        return weights.to(embeds) @ embeds


def _is_weighted(pair: Any, kinds: type | tuple[type, ...]) -> bool:
    if not isinstance(pair, tuple) or len(pair) != 2:
        return False
    item, weight = pair
    return isinstance(item, kinds) and isinstance(weight, Real) and isfinite(weight)


def inner_product(embeds: Tensor, direction: Tensor) -> Tensor:
    """<embeds, direction>, (B,)."""
    check_direction(direction, len(embeds))
    return (embeds * direction.to(embeds)).sum(-1)


def check_direction(direction: Tensor, count: int) -> None:
    """Raise ValueError unless there is one direction, or one for each of `count` images."""
    if len(direction) not in (1, count):
        raise ValueError(
            f"prompt holds {len(direction)} for {count} images; one, or one per image, is allowed"
        )

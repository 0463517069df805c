"""Guidance through the predicted x0, by networks that know only clean images: any image classifier, CLIP.

    score  +=  scale * grad_x log p(y | decode(x0(x_t)))

and, beside it, by a CLIP that reads noisy images itself. None of this imports `transformers` before it is used.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image

from .guidance import (
    Guidance,
    NoiseAwareGuidance,
    Scale,
    StepContext,
    check_eval_mode,
    check_softplus,
    relu_as_softplus,
    rescale_to_score,
    x0_gradient,
)
from .likelihood import Label, logits_of, make_likelihood
from .noise import module_config
from .preprocess import Preprocess, as_tensor

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

Prompt = str | Mapping[str, float]


class ImageGuidance(Guidance):
    """Steer by a network of clean images: adds `scale * grad_x log p(y | decode(x0(x_t)))`.

    Args:
        module: the network; it must be in evaluation mode.
        through_network: whether the gradient goes through the diffusion network, too (`x0_gradient`): exact, for its
            forward and backward pass. It then stays among images that the network knows; without, large scales draw
            what the classifier likes and we see as noise. Of the bundled model a step costs twice as much, and 45 %,
            85 % and 98 % of the images show the label at scale 1, 4 and 16, instead of 13 %, 33 % and 68 %
            (`examples/benchmarks/x0_gradient.py`).
        normalize: scale the gradient of each image to the norm of its score, so that `scale` counts scores.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        scale: Scale,
        start: float,
        stop: float,
        sigma_interval: tuple[float, float] | None,
        through_network: bool,
        normalize: bool,
    ):
        super().__init__(scale, start, stop, sigma_interval)
        check_eval_mode(module)
        self.module, self.through_network, self.normalize = module, through_network, normalize
        self.supports_pure_noise = not (through_network or normalize)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.module,)

    @abstractmethod
    def log_likelihood(self, images: torch.Tensor, step: StepContext) -> torch.Tensor:
        """log p(y | images), (B,), up to a constant, of images (B, C, H, W) in about [-1, 1]."""

    def score(self, step: StepContext) -> torch.Tensor:
        grad = x0_gradient(
            lambda x0: self.log_likelihood(step.decode(x0), step), step, self.through_network
        )
        return self.scale_at(step) * (rescale_to_score(grad, step) if self.normalize else grad)

    def _in_dtype(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.to(next((p.dtype for p in self.module.parameters()), pixels.dtype))


class ImageClassifierGuidance(ImageGuidance):
    """Steer to what an off-the-shelf image classifier calls the label: adds `scale * grad_x log p(y | decode(x0))`.

    The classifier was trained on clean images and looks at the predicted x0 (universal guidance, Bansal et al. 2023,
    "Universal guidance for diffusion models", eq. 6). In much noise x0 is a blur that it has never seen: a `start`
    above 0, or a `sigma_interval`, leaves those steps out.

    Args:
        classifier: an image classification model of `transformers`, or any module of images (B, C, H, W) that gives
            `.logits` or the logits (B, num_labels) themselves, in evaluation mode.
        label, target, std, joint_temperature, marginal_temperature, softplus: as in `ClassifierGuidance`; names are
            those of `config.id2label`, the kind is `config.problem_type`.
        scale: 0 is off; 1 takes the classifier's probability of x0 for that of the image.
        start, stop, sigma_interval: when it acts, as in `Guidance`.
        processor: the model's image processor, or a mapping of its settings, as in `Preprocess`. None: the classifier
            is given images in [-1, 1], resized to its `config.image_size` where there is one.
        through_network, normalize: as in `ImageGuidance`.

    Raises:
        ValueError: for any other argument, or one without effect for this classifier.
    """

    def __init__(
        self,
        classifier: torch.nn.Module,
        label: Label | Sequence[Label] | torch.Tensor | None = None,
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
        processor: BaseImageProcessor | Mapping[str, Any] | None = None,
        target: float | Sequence[float] | torch.Tensor | None = None,
        std: float = 1.0,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 1.0,
        softplus: float | None = None,
        through_network: bool = False,
        normalize: bool = False,
    ):
        super().__init__(classifier, scale, start, stop, sigma_interval, through_network, normalize)
        config = dict(module_config(classifier))
        if config.get("id2label"):
            config.setdefault("num_labels", len(config["id2label"]))  # a property in transformers
        self.likelihood = make_likelihood(
            config, label, target, std, joint_temperature, marginal_temperature
        )
        check_softplus(classifier, softplus)
        self.softplus = softplus
        self.preprocess = Preprocess(
            processor, config.get("num_channels"), config.get("image_size")
        )

    def log_likelihood(self, images: torch.Tensor, step: StepContext) -> torch.Tensor:
        return self.likelihood(logits_of(self.module(self._in_dtype(self.preprocess(images)))))

    def score(self, step: StepContext) -> torch.Tensor:
        with relu_as_softplus(
            self.module, self.softplus
        ):  # also while a checkpointed block runs again
            return super().score(step)


class CLIPGuidance(ImageGuidance):
    """Steer to what CLIP finds like a prompt: adds `scale * grad_x f(decode(x0))`,

        f(image) = exp(logit_scale) sum_i w_i <e(image), e(prompt_i)>,    |e| = 1

    At the optimum of CLIP's contrastive loss f is log p(prompt | image) up to a constant (van den Oord et al. 2018,
    "Representation learning with contrastive predictive coding", section 2.3), so that scale 1 means what it does for a
    classifier; a cosine distance of k elsewhere is a scale of k / exp(logit_scale), k / 100 for OpenAI's models.

    Args:
        model: a `transformers.CLIPModel`, in evaluation mode.
        prompt: a text, {text: weight, ...}, or a list of such, one an image. Negative weights steer away.
        scale: 0 is off.
        start, stop, sigma_interval: when it acts, as in `Guidance`.
        image_prompt: beside or instead of the text, an image, a tuple of (image, weight) pairs, or a list of such, one
            an image; PIL, or (1 or 3, H, W) in [-1, 1].
        processor: a `CLIPProcessor`, an image processor, or a mapping of its settings, as in `Preprocess`. None: the
            model is given images in [-1, 1], resized to its `image_size`.
        tokenizer: of the text; None: the processor's own.
        cutouts: how many random squares of the image are looked at, instead of all of it; f is their mean. 0: off.
        smallest_cutout: their sides are uniform from this share, in (0, 1], of the image's shorter side to all of it.
        seed: of the cut-outs, which depend on it and the step's index alone, and are the same for all images.
        through_network, normalize: as in `ImageGuidance`.

    Raises:
        ValueError: for any other argument, or one without effect.
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
        super().__init__(model, scale, start, stop, sigma_interval, through_network, normalize)
        if cutouts < 0 or not 0 < smallest_cutout <= 1:
            raise ValueError(
                f"cutouts={cutouts!r}, smallest_cutout={smallest_cutout!r}: 0 or more, and above 0, up to "
                "1, are allowed"
            )
        if not cutouts and (seed, smallest_cutout) != (0, 0.3):
            raise ValueError(
                f"seed={seed}, smallest_cutout={smallest_cutout} have no effect without cutouts"
            )
        if (prompt is None) and (image_prompt is None):
            raise ValueError("prompt, image_prompt: at least one is needed")
        if isinstance(image_prompt, torch.Tensor) and image_prompt.ndim == 4:
            image_prompt = list(image_prompt)
        from transformers import ProcessorMixin

        if isinstance(processor, ProcessorMixin):
            tokenizer, processor = tokenizer or processor.tokenizer, processor.image_processor
        if prompt is not None and tokenizer is None:
            raise ValueError(
                f"tokenizer is needed for prompt={prompt!r}; or give a CLIPProcessor as processor"
            )
        self.cutouts, self.smallest_cutout, self.seed, self.tokenizer = (
            cutouts,
            smallest_cutout,
            seed,
            tokenizer,
        )
        vision = model.config.vision_config
        self.preprocess = Preprocess(processor, vision.num_channels, vision.image_size)
        given = [
            ("prompt", prompt, str, self._embed_texts),
            ("image_prompt", image_prompt, (Image.Image, torch.Tensor), self._embed_pictures),
        ]
        each = [
            direction(name, value, kinds, embed)
            for name, value, kinds, embed in given
            if value is not None
        ]
        counts = [len(one) for one in each]
        if len({*counts} - {1}) > 1:
            raise ValueError(
                f"prompt, image_prompt hold {counts[0]} and {counts[1]}; as many, or one, is allowed"
            )
        self.direction = sum(each)

    def log_likelihood(self, images: torch.Tensor, step: StepContext) -> torch.Tensor:
        views = self._cut(images, step.index) if self.cutouts else [images]
        embeds = self._embed(torch.cat([self.preprocess(view) for view in views]))
        mean = embeds.reshape(len(views), len(images), -1).mean(0)
        return self.module.logit_scale.to(mean.dtype).exp() * along(mean, self.direction, "prompt")

    def _cut(self, images: torch.Tensor, index: int) -> list[torch.Tensor]:
        """Random squares of the images: of one place and size in all of them."""
        draw, (height, width) = random.Random(f"cutouts {self.seed} {index}"), images.shape[2:]
        views = []
        for _ in range(self.cutouts):
            side = max(1, round(draw.uniform(self.smallest_cutout, 1) * min(height, width)))
            top, left = draw.randint(0, height - side), draw.randint(0, width - side)
            views.append(images[..., top : top + side, left : left + side])
        return views

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return unit(self.module.get_image_features(self._in_dtype(pixels)).pooler_output)

    def _embed_pictures(self, images: list[Image.Image | torch.Tensor]) -> torch.Tensor:
        device = self.module.logit_scale.device
        tensors = [one if isinstance(one, torch.Tensor) else as_tensor(one) for one in images]
        return torch.cat([self._embed(self.preprocess(one[None].to(device))) for one in tensors])

    def _embed_texts(self, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt").to(
            self.module.logit_scale.device
        )
        length, most = (
            tokens.input_ids.shape[1],
            self.module.config.text_config.max_position_embeddings,
        )
        if length > most:
            raise ValueError(f"prompt: the longest has {length} tokens; up to {most} are allowed")
        return unit(
            self.module.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        )


class NoiseAwareCLIPGuidance(NoiseAwareGuidance):
    """Steer by a CLIP that reads noisy images: adds `scale * grad_x f(x_t, t)`,

        f(x_t, t) = exp(logit_scale) sum_i w_i <e(x_t, t), e(prompt_i)>

    Nichol et al. 2021, "GLIDE: Towards photorealistic image generation and editing with text-guided diffusion models",
    section 2.3. At the contrastive optimum its gradient is grad log p(prompt | x_t), with no predicted x0 in between.

    Args:
        clip: `NoiseAwareCLIP`, or anything with `encode_image(sample, timestep)` (B, D) and `encode_prompts(texts)`
            (N, D), both of unit norm, `scale`, the exponential above, and a `config` with the noise schedule that it
            was trained with.
        prompt: a text, {text: weight, ...}, or a list of such, one an image. Negative weights steer away.
        scale: 0 is off.
        start, stop, sigma_interval: when it acts, as in `Guidance`.
        normalize: as in `NoiseAwareGuidance`.

    Raises:
        ValueError: for any other argument.
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
        self.direction = direction("prompt", prompt, str, clip.encode_prompts)

    def log_likelihood(self, z: torch.Tensor, t: float) -> torch.Tensor:
        return self.module.scale * along(self.module.encode_image(z, t), self.direction, "prompt")

    def select(self, rows: slice | list[int], count: int) -> NoiseAwareCLIPGuidance:
        part = super().select(rows, count)
        check_direction(self.direction, count, "prompt")
        part.direction = self.direction[rows] if len(self.direction) > 1 else self.direction
        return part


def unit(embeds: torch.Tensor) -> torch.Tensor:
    """Scaled to norm 1, in float32 or wider."""
    return F.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)


def direction(
    name: str,
    prompt: Any,
    kinds: type | tuple[type, ...],
    embed: Callable[[list], torch.Tensor],
) -> torch.Tensor:
    """sum_i w_i e(prompt_i), (1 or B, D), of a prompt, a mapping or a tuple of pairs with weights, or a list of such.

    Raises:
        ValueError: for other prompts, or weights that are no finite numbers.
    """
    rows = [
        tuple(one.items())
        if isinstance(one, Mapping)
        else one
        if isinstance(one, tuple)
        else ((one, 1.0),)
        for one in (prompt if isinstance(prompt, list) else [prompt])
    ]
    for row in rows:
        if not row or not all(
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], kinds)
            and isinstance(pair[1], Real)
            and isfinite(pair[1])
            for pair in row
        ):
            raise ValueError(
                f"{name} has {row!r}; one, several with finite weights, or a list of such is allowed"
            )
    if not rows:
        raise ValueError(f"{name} is an empty list; give at least one")
    with torch.inference_mode(False), torch.no_grad():
        embeds = embed([item for row in rows for item, _ in row])
        weights = torch.block_diag(*[torch.tensor([[weight for _, weight in row]]) for row in rows])
        return weights.to(embeds) @ embeds


def along(embeds: torch.Tensor, direction: torch.Tensor, name: str) -> torch.Tensor:
    """<embeds, direction>, (B,).

    Raises:
        ValueError: for a direction an image, of another number of images.
    """
    check_direction(direction, len(embeds), name)
    return (embeds * direction.to(embeds)).sum(-1)


def check_direction(direction: torch.Tensor, count: int, name: str) -> None:
    if len(direction) not in (1, count):
        raise ValueError(
            f"{name} holds {len(direction)} for {count} images; one, or one an image, is allowed"
        )

"""Networks that look at images: where features are from, and judges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import bundled
from ..classifier import NoiseAwareClassifier
from ..likelihood import logits_of
from ..preprocess import Preprocess
from ..sampling.manifest import add_weights

INCEPTION = "inception"


@dataclass(frozen=True)
class Network:
    """Features and, of a classifier, logits of images (B, 1 or 3, H, W) in [-1, 1].

    Attributes:
        name: what the report calls it.
        module: the weights.
        look: images -> (features (B, D), logits (B, K) or None).
        names: of its classes by id; {}: none.
        classes: K; None: no classifier.
    """

    name: str
    module: nn.Module
    look: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    names: dict[int, str] = field(default_factory=dict)
    classes: int | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raises:
        ValueError: for features of another shape than (B, D).
        FloatingPointError: for features or logits that are NaN or infinite.
        """
        parameter = next(self.module.parameters(), images)
        features, logits = self.look(images.to(parameter.device))
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"features: {self.name} gives {tuple(features.shape)} for {len(images)} images; (B, D) is "
                "allowed"
            )
        if not features.isfinite().all() or logits is not None and not logits.isfinite().all():
            raise FloatingPointError(f"{self.name} gives features or logits that are not finite")
        return features.float(), None if logits is None else logits.float()

    @property
    def inception(self) -> bool:
        return self.name == INCEPTION

    def digest(self) -> str:
        """Of its name and weights."""
        add_weights(found := hashlib.sha256(self.name.encode()), self.module)
        return found.hexdigest()[:16]


def load_network(name: str | Path, device: str | torch.device = "cpu") -> Network:
    """A network by what it is called on the command line.

    Args:
        name: `inception` (torch-fidelity's), a bundled model (its judge), or the folder or Hub id of a
            `NoiseAwareClassifier` (asked at t = 0), of a `transformers` image classifier or another vision model.

    Raises:
        ValueError: for a name that is none of these.
        ImportError: where torch-fidelity is missing, saying what to install.
        OSError: for files that are missing or broken.
    """
    if str(name) == INCEPTION:
        found = inception()
    elif "/" not in str(name) and not Path(name).exists():
        found = of_classifier(
            NoiseAwareClassifier.from_pretrained(bundled.folder(str(name)) / "judge"),
            f"{name}/judge",
        )
    else:
        found = _saved(str(name))
    found.module.to(device).eval()
    return found


def _saved(name: str) -> Network:
    import transformers

    try:
        config: Any = NoiseAwareClassifier.load_config(name)
    except (OSError, ValueError):
        config = {}
    if config.get("_class_name") == NoiseAwareClassifier.__name__:
        return of_classifier(NoiseAwareClassifier.from_pretrained(name), name)
    config = transformers.AutoConfig.from_pretrained(name)
    processor = Preprocess(
        transformers.AutoImageProcessor.from_pretrained(name, use_fast=False),
        getattr(config, "num_channels", None),
    )
    if any(one.endswith("ForImageClassification") for one in config.architectures or ()):
        model = transformers.AutoModelForImageClassification.from_pretrained(name)
        return of_classifier(model, name, lambda images: model(processor(images)))
    model = transformers.AutoModel.from_pretrained(name)

    def look(images: Tensor) -> tuple[Tensor, None]:
        pixels = processor(images)
        output = (
            model.get_image_features(pixels) if hasattr(config, "vision_config") else model(pixels)
        )
        if isinstance(output, Tensor):
            return output, None
        pooled = output.get("pooler_output")
        return (output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)), None

    return Network(name, model, look)


def of_module(module: nn.Module, name: str | None = None) -> Network:
    """Any module of images (B, C, H, W) in [-1, 1] that gives features (B, D)."""
    return Network(name or type(module).__name__, module, lambda images: (module(images), None))


def of_classifier(
    model: nn.Module, name: str | None = None, run: Callable[[Tensor], Any] | None = None
) -> Network:
    """A classifier; its features are what its last linear layer is given.

    Args:
        model: a `NoiseAwareClassifier`, which is asked at t = 0, or any classifier whose config says `num_labels` and
            `id2label`.
        run: images in [-1, 1] -> its logits. None: it is given the images, and t = 0 if it is noise-aware.

    Raises:
        ValueError: if it is no classifier of single labels, or has no linear layer at its end.
    """
    config = dict(model.config) if isinstance(model.config, dict) else model.config.to_dict()
    names = {int(i): str(one) for i, one in (config.get("id2label") or {}).items()}
    classes = config.get("num_labels") or len(names)
    kind = config.get("problem_type") or "single_label_classification"
    if kind != "single_label_classification" or classes < 2:
        raise ValueError(
            f"judge: {name} has problem_type={kind!r}, num_labels={classes}; a classifier of single "
            "labels, two or more, is allowed"
        )
    linear = [one for one in model.modules() if isinstance(one, nn.Linear)]
    if not linear or linear[-1].out_features != classes:
        raise ValueError(
            f"features: the last layer of {name} isn't a linear one of its {classes} classes"
        )
    if run is None:
        noise_aware = isinstance(model, NoiseAwareClassifier)
        prepared = Preprocess(None, config.get("in_channels") or config.get("num_channels"))
        rest = (0,) if noise_aware else ()

        def run(images: Tensor) -> Any:
            return model(prepared(images), *rest)

    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        handle = linear[-1].register_forward_pre_hook(
            lambda _, given: seen.append(given[0].flatten(1))
        )
        try:
            logits = logits_of(run(images))
        finally:
            handle.remove()
        return seen[0], logits

    return Network(name or type(model).__name__, model, look, names, classes)


def inception(weights: str | Path | None = None) -> Network:
    """The Inception network of the published FID, in torch-fidelity's conversion, and its 1008 logits.

    Args:
        weights: its file; by default it is downloaded to the folder of `torch.hub`.

    Raises:
        ImportError: where torch-fidelity is missing, saying what to install.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as published
    except ImportError as error:
        raise ImportError(
            "features 'inception' need torch-fidelity: pip install 'guided-diffusers[inception]'"
        ) from error
    if weights is None:
        weights = (
            Path(torch.hub.get_dir())
            / "checkpoints"
            / published.URL_INCEPTION_V3.rpartition("/")[2]
        )
        if not weights.exists():
            weights.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(published.URL_INCEPTION_V3, str(weights))
    torch.load(weights, weights_only=True)  # refuses code; torch-fidelity itself would run it
    model = published.FeatureExtractorInceptionV3(
        INCEPTION, ["2048", "logits_unbiased"], str(weights)
    )

    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        features, logits = model(pixels.expand(-1, 3, -1, -1))
        return features, logits

    return Network(INCEPTION, model, look, classes=1008)


def default_features(manifest: dict[str, Any] | None) -> str:
    """The bundled judge for the images of a bundled model.

    Raises:
        ValueError: for images of another model.
    """
    model = str((manifest or {}).get("model"))
    try:
        bundled.folder(model)
    except ValueError as error:
        raise ValueError(
            "features: the images are of no bundled model, so a network must be named: inception, a "
            "bundled model, or the folder or Hub id of a vision model"
        ) from error
    return model

"""Feature networks and judges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import bundled
from ..classifier import NoiseAwareClassifier
from ..images import to_network_units
from ..likelihood import logits_of
from ..preprocess import Preprocess
from ..sampling import add_weights
from ..utils import model_folder
from ..weights import check_weights

INCEPTION = "inception"
DINOV2 = "dinov2-"  # beginning of the names of torch-fidelity's feature extractors


@dataclass(frozen=True)
class Network:
    """A network that gives features and, if it is a classifier, logits of images.

    Called with images (B, 1 or 3, H, W) in [-1, 1], it returns float32 features (B, D) and logits
    (B, K) or None, as `forward_fn` does.
    """

    name: str  #: what the report calls it
    module: nn.Module
    forward_fn: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    names: dict[int, str] = field(default_factory=dict)  #: of the classes by id, or {}
    classes: int | None = None  #: K; None if it is no classifier

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and logits; raises ValueError for features of another shape than (B, D), and
        FloatingPointError for NaN or infinity."""
        device = next(self.module.parameters(), images).device
        features, logits = self.forward_fn(images.to(device))
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"features: {self.name} returns {tuple(features.shape)} for {len(images)} images; "
                "(B, D) is allowed"
            )
        logits = None if logits is None else logits.float()
        if not features.isfinite().all() or not (logits is None or logits.isfinite().all()):
            raise FloatingPointError(f"{self.name} returns features or logits that aren't finite")
        return features.float(), logits

    @property
    def is_inception(self) -> bool:
        return self.name == INCEPTION

    def digest(self) -> str:
        """Hash of the name and the weights, 16 hexadecimal digits."""
        sha256 = hashlib.sha256(self.name.encode())
        add_weights(sha256, self.module)
        return sha256.hexdigest()[:16]


def load_network(name: str | Path, device: str | torch.device = "cpu") -> Network:
    """A network as named on the command line.

    Args:
        name: `inception` or `dinov2-vit-b-14` (torch-fidelity's), a bundled model (its judge), or
            the folder or Hub id of a `NoiseAwareClassifier` (evaluated at t = 0), of a
            `transformers` image classifier or of another vision model.

    Raises:
        ValueError: for another name.
        ImportError: without torch-fidelity, with the package to install.
        OSError: for files that are missing or broken.
    """
    name, config = str(name), {}
    if name == INCEPTION:
        network = load_inception()
    elif name.startswith(DINOV2) and not Path(name).exists():
        network = load_dinov2(name)
    elif "/" not in name and not Path(name).exists():
        judge = NoiseAwareClassifier.from_pretrained(bundled.folder(name) / "judge")
        network = wrap_classifier(judge, f"{name}/judge")
    else:
        model_folder(name)  # refuses paths that don't exist
        if (Path(name) / "model_index.json").is_file():
            raise ValueError(f"{name} is a pipeline; a network is needed, such as its classifier")
        with suppress(OSError, ValueError):  # of another kind of network
            config = NoiseAwareClassifier.load_config(name)
        kind = config.get("_class_name", NoiseAwareClassifier.__name__)
        if kind != NoiseAwareClassifier.__name__:
            raise ValueError(
                f"{name} is a {kind} of Diffusers; a NoiseAwareClassifier, or a vision model of "
                "transformers, is needed"
            )
        if "_class_name" in config:
            network = wrap_classifier(NoiseAwareClassifier.from_pretrained(name), name)
        else:
            network = _load_transformers_network(name)
    network.module.to(device).eval()
    return network


def _load_transformers_network(name: str) -> Network:
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    processor = transformers.AutoImageProcessor.from_pretrained(name, use_fast=False)
    preprocess = Preprocess(processor, getattr(config, "num_channels", None))
    if any(cls.endswith("ForImageClassification") for cls in config.architectures or ()):
        model, _ = _load_complete(transformers.AutoModelForImageClassification, name)
        return wrap_classifier(model, name, lambda images: model(preprocess(images)))
    model, has_pooler = _load_complete(transformers.AutoModel, name)

    def forward(images: Tensor) -> tuple[Tensor, None]:
        apply = model.get_image_features if hasattr(config, "vision_config") else model
        output = apply(preprocess(images))
        if isinstance(output, Tensor):
            return output, None
        pooled = output.get("pooler_output") if has_pooler else None
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1), None

    return Network(name, model, forward)


def _load_complete(auto_class: Any, name: str) -> tuple[nn.Module, bool]:
    """A model of `transformers`, and whether its pooling layer, if it has one, was in the file.

    Raises:
        ValueError: for a file that lacks other weights, or has others than the classifier's.
    """
    import transformers

    try:
        model, info = auto_class.from_pretrained(name, output_loading_info=True)
    except RuntimeError as error:  # of a weight's shape
        raise ValueError(f"{name}: {error}") from error
    unpooled = {key for key in info["missing_keys"] if key.startswith("pooler.")}
    groups = {"lacks": set(info["missing_keys"]) - unpooled}
    if auto_class is transformers.AutoModelForImageClassification:  # else another's head is ignored
        groups["has unknown"] = set(info["unexpected_keys"])
        if Path(name).is_dir():
            check_weights(model, Path(name))
    for problem, keys in groups.items():
        if keys:
            raise ValueError(
                f"{name}: its file {problem} weights of a {type(model).__name__}, such as "
                f"{min(keys)} ({len(keys)} in all); use the file that was saved with this config"
            )
    return model, not unpooled


def wrap_module(module: nn.Module, name: str | None = None) -> Network:
    """A feature network from a module: images (B, C, H, W) in [-1, 1] -> features (B, D)."""
    return Network(name or type(module).__name__, module, lambda images: (module(images), None))


def wrap_classifier(
    model: nn.Module, name: str | None = None, logits_fn: Callable[[Tensor], Any] | None = None
) -> Network:
    """A classifier whose features are the input of its last linear layer.

    Args:
        model: a `NoiseAwareClassifier`, which is evaluated at t = 0, or any classifier whose config
            has `num_labels` and `id2label`.
        logits_fn: images in [-1, 1] -> logits. None: the model itself is called.

    Raises:
        ValueError: for a model that isn't a single-label classifier, or doesn't end in a linear
            layer.
    """
    config = dict(model.config) if isinstance(model.config, Mapping) else model.config.to_dict()
    names = {int(i): str(label) for i, label in (config.get("id2label") or {}).items()}
    classes = config.get("num_labels") or len(names)
    problem = config.get("problem_type") or "single_label_classification"
    if problem != "single_label_classification" or classes < 2:
        raise ValueError(
            f"judge: {name} has problem_type={problem!r}, num_labels={classes}; a single-label "
            "classifier with two or more labels is needed"
        )
    if isinstance(model, NoiseAwareClassifier):  # whose last outputs may be those of powers
        linear = [model.last_layer]
    else:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not linear or linear[-1].out_features != classes:
            raise ValueError(
                f"features: the last layer of {name} must be a linear one with {classes} outputs"
            )
    if logits_fn is None:
        if config.get("data_std") is not None:
            preprocess = partial(to_network_units, mean=config["data_mean"], std=config["data_std"])
        else:
            preprocess = Preprocess(None, config.get("in_channels") or config.get("num_channels"))
        timestep = (0,) if isinstance(model, NoiseAwareClassifier) else ()

        def logits_fn(images: Tensor) -> Any:
            return model(preprocess(images), *timestep)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        inputs: list[Tensor] = []
        hook = linear[-1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with hook:  # removes itself
            logits = logits_of(logits_fn(images))
        return inputs[0].flatten(1), logits

    return Network(name or type(model).__name__, model, forward, names, classes)


def load_inception(weights: str | Path | None = None) -> Network:
    """The Inception network of the published FID, as converted by torch-fidelity, with 1008 logits.

    Args:
        weights: its file; by default downloaded to the folder of `torch.hub`.

    Raises:
        ImportError: without torch-fidelity, with the package to install.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as published
    except ImportError as error:
        raise ImportError(
            "features 'inception' need torch-fidelity: pip install torch-fidelity"
        ) from error
    if weights is None:
        url = published.URL_INCEPTION_V3
        weights = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not weights.exists():
            weights.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(weights))
    torch.load(weights, weights_only=True)  # refuses code; torch-fidelity itself would run it
    layers = ["2048", "logits_unbiased"]
    model = published.FeatureExtractorInceptionV3(INCEPTION, layers, str(weights))

    return Network(INCEPTION, model, lambda images: tuple(model(_as_rgb(images))), classes=1008)


def load_dinov2(name: str = "dinov2-vit-b-14") -> Network:
    """A DINOv2 network (Oquab et al., DINOv2: learning robust visual features without supervision,
    2023), as torch-fidelity runs it: a feature space of no labels, for a second opinion beside
    Inception's (Stein et al., Exposing flaws of generative model evaluation metrics, 2023).

    On first use `torch.hub` downloads its code and weights from GitHub's facebookresearch/dinov2, and
    runs that code.

    Args:
        name: `dinov2-vit-s-14`, `-b-14`, `-l-14` or `-g-14`, with 384 to 1536 features.

    Raises:
        ImportError: without torch-fidelity 0.4, with the package to install.
        ValueError: for another name.
        OSError: if it can't be downloaded.
    """
    try:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as extractors
    except ImportError as error:
        raise ImportError(
            f"features {name!r} need torch-fidelity 0.4: pip install 'torch-fidelity>=0.4' ({error})"
        ) from error
    known = sorted(key for key in extractors if key.startswith(DINOV2))
    if not known:
        raise ImportError(
            f"features {name!r} need torch-fidelity 0.4; an older one is installed: "
            "pip install 'torch-fidelity>=0.4'"
        )
    if name not in known:
        raise ValueError(f"features: {name!r} is unknown; {', '.join(known)} are allowed")
    kind = extractors[name]
    model = kind(name, [kind.get_default_feature_layer_for_metric("fid")])

    def forward(images: Tensor) -> tuple[Tensor, None]:
        return model(_as_rgb(images))[0].flatten(1), None

    return Network(name, model, forward)


def _as_rgb(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) in [-1, 1] as colours of 8 bits, (B, 3, H, W)."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1)


def default_features(manifest: Mapping[str, Any] | None) -> str:
    """The feature network of a bundled model's images: its judge, named like the model.

    Raises:
        ValueError: for images of another model.
    """
    model = str((manifest or {}).get("model"))
    try:
        bundled.folder(model)
    except ValueError as error:
        raise ValueError(
            "features: the images weren't made by a bundled model, so a network must be named: "
            "inception, dinov2-vit-b-14, a bundled model, or the folder or Hub id of a vision model. For "
            "one of your labels train a judge: train_classifier.py --max_timestep 0"
        ) from error
    return model

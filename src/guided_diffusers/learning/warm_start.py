"""Initial weights of a classifier from another model (--init_from)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, ModelMixin, UNet2DModel

from ..classifier import NoiseAwareClassifier
from ..weights import load_checked
from .prepare import SCHEDULE

# Config entries that `UNet2DModel` and `NoiseAwareClassifier` share.
ARCHITECTURE = (
    "block_out_channels layers_per_block down_block_types downsample_type norm_num_groups "
    "resnet_time_scale_shift attention_head_dim norm_eps dropout"
).split()
MODELS = {"NoiseAwareClassifier": NoiseAwareClassifier, "UNet2DModel": UNet2DModel}
NOT_ARCHITECTURE = (
    *SCHEDULE,
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
    "power_range",
    "data_mean",
    "data_std",
)


def load_initial_model(path: str | None) -> NoiseAwareClassifier | UNet2DModel | None:
    """The model of --init_from in float32: a folder or Hub id of the model or of its pipeline."""
    if path is None:
        return None
    for subfolder in (None, "classifier", "unet"):
        try:
            name = UNet2DModel.load_config(path, subfolder=subfolder).get("_class_name")
        except OSError as error:
            reason = error
            continue
        if model_class := MODELS.get(name):
            try:
                dtype = torch.float32
                load = model_class.from_pretrained
                return load_checked(load, path, subfolder=subfolder, torch_dtype=dtype)
            except (OSError, ValueError) as error:
                raise ValueError(f"--init_from {path}: {error}") from error
        reason = f"it holds a {name}"
    raise ValueError(
        f"--init_from {path}: {reason}; NoiseAwareClassifier and UNet2DModel are allowed"
    )


def initial_schedule(model: ModelMixin | None) -> DDPMScheduler | None:
    """The noise schedule of a classifier; None for other models."""
    if not isinstance(model, NoiseAwareClassifier):
        return None
    return DDPMScheduler(**{name: model.config[name] for name in SCHEDULE})


def classifier_config(model: ModelMixin) -> dict[str, Any]:
    """Config entries of a classifier with this model's architecture."""
    if isinstance(model, NoiseAwareClassifier):
        return {name: x for name, x in model.config.items() if name not in NOT_ARCHITECTURE}
    return {name: model.config[name] for name in ARCHITECTURE}


def copy_weights(model: NoiseAwareClassifier, initial: ModelMixin, path: str) -> str:
    """Copy the parameters of the same name and shape into a classifier; returns what was copied.

    Of a UNet these are the encoder and the middle block; of a classifier all, except the last layer
    if its labels differ. Where only one of them knows powers, the last layer's common outputs are
    copied. `path` is named in messages.
    """
    target, source = model.state_dict(), initial.state_dict()
    if isinstance(initial, NoiseAwareClassifier):
        for name in [name for name in last_layer_names(model) if name in source]:
            rows = source[name][: model.config.num_labels]
            if (
                rows.shape[0] == model.config.num_labels
                and rows.shape[1:] == target[name].shape[1:]
            ):
                source[name] = torch.cat([rows, target[name][len(rows) :]])
    names = [name for name in target if name in source and source[name].shape == target[name].shape]
    if isinstance(initial, NoiseAwareClassifier) and initial.size != model.size:
        # 8 x 12 and 12 x 8 have as many places, but others
        names = [name for name in names if not name.endswith("positional_embedding")]
    if any(initial.config.get(name) != model.config[name] for name in ("problem_type", "id2label")):
        names = [name for name in names if name not in last_layer_names(model)]
    if not names:
        raise ValueError(
            f"--init_from {path}: no parameter of the {type(initial).__name__} has the name and "
            "shape of one of the classifier's, as they have without --model_config_name_or_path"
        )
    model.load_state_dict({name: source[name] for name in names}, strict=False)
    count = sum(target[name].numel() for name in names)
    share = count / sum(value.numel() for value in target.values())
    return (
        f"starts from {path}: {len(names)} of {len(target)} parameters ({share:.0%} of the numbers)"
    )


def last_layer_names(model: NoiseAwareClassifier) -> list[str]:
    """Names of the weight and the bias of a classifier's last layer."""
    return [name for name in model.state_dict() if name.startswith("head.")][-2:]

"""guided-diffusion's networks as Diffusers models, and back: the same weights under other names."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel

from ..classifier import DOWN_BLOCK_TYPES, NoiseAwareClassifier
from .arguments import (
    Arguments,
    State,
    Weights,
    attention_levels,
    channel_mult,
    check,
    complete_arguments,
    has_attention,
    num_heads,
    widths,
)
from .tensors import load_original, resamples_without_convolution, to_original
from .unet import ADMUNet2DModel, HeadDim, head_dims

UP_BLOCK_TYPES = {"conv": ("UpBlock2D", "AttnUpBlock2D")}
UP_BLOCK_TYPES |= {"resnet": ("ResnetUpsampleBlock2D", "AttnUpBlock2D")}
NORM = {"norm_num_groups": 32, "norm_eps": 1e-5}
# Options of UNet2DModel that are fixed in guided-diffusion
UNET_CONSTANTS = NORM | {"attn_norm_num_groups": 32, "act_fn": "silu", "class_embed_type": None}
UNET_CONSTANTS |= {"center_input_sample": False, "downsample_padding": 1, "add_attention": True}
UNET_CONSTANTS |= {"mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1}
UNET_CONSTANTS |= {"time_embedding_type": "positional", "freq_shift": 0, "flip_sin_to_cos": True}
HEAD_OPTIONS = {"attention_head_dim", "up_attention_head_dim", "time_proj_dim"}
# Row order of the attention weights in the file that export writes. It doesn't change our model.
# Diffusers keeps private entries of a config through saving and loading.
ATTENTION_ORDER = "_use_new_attention_order"


def convert_unet(state_dict: Weights, config: Mapping[str, Any]) -> UNet2DModel:
    """guided-diffusion's UNet as a Diffusers model with equal outputs.

    That is a `UNet2DModel`, or an `ADMUNet2DModel` where the former's config can't express the
    attention heads or the timestep's sinusoid.

    Args:
        state_dict: Tensors under the original's names. They are copied.
        config: The original's arguments, as the flags of its scripts (`num_channels`,
            `channel_mult="1,2"`, `attention_resolutions="16,8"`, ...) or as arguments of the
            constructor (`model_channels`, ...). Those that the tensors determine may be left out.

    Raises:
        ValueError: For unknown arguments, arguments that contradict the tensors, and missing or
            unexpected tensors.
    """
    return _load(state_dict, complete_arguments(state_dict, config))


def convert_super_resolution(state_dict: Weights, config: Mapping[str, Any]) -> UNet2DModel:
    """As [`convert_unet`], for an up-sampler.

    The model's input is [`join_low_resolution`]`(sample, low_res)`.
    """
    args = complete_arguments(state_dict, config, "upsampler")
    return _load(state_dict, args | {"in_channels": 2 * args["in_channels"]})


def convert_classifier(state_dict: Weights, config: Mapping[str, Any]) -> NoiseAwareClassifier:
    """guided-diffusion's classifier as a [`NoiseAwareClassifier`] with equal logits and gradients.

    Arguments and errors as for [`convert_unet`]; the flags are those that begin with `classifier_`.
    `noise_schedule` ("linear" or "cosine") and `diffusion_steps` in `config` become part of the
    classifier's config.
    """
    args = complete_arguments(state_dict, config, "classifier")
    return _load(state_dict, args, noise_schedule(config))


def export_unet(model: UNet2DModel) -> tuple[State, Arguments]:
    """A UNet's tensors and constructor arguments as in the original.

    The UNet was converted, or trained in Diffusers.

    Raises:
        ValueError: If guided-diffusion has no such architecture; the message names the setting.
    """
    args = _original_arguments(model)
    return to_original(model, args), args


def export_super_resolution(model: UNet2DModel) -> tuple[State, Arguments]:
    """As [`export_unet`], for an up-sampler."""
    state, args = export_unet(model)
    channels, allowed = args["in_channels"], "an even number, half of it the low resolution's"
    check(channels % 2 == 0, f"in_channels is {channels}; allowed: {allowed}.")
    return state, args | {"in_channels": channels // 2}


def export_classifier(model: NoiseAwareClassifier) -> tuple[State, Arguments]:
    """As [`export_unet`], for a classifier."""
    args = _original_arguments(model)
    return to_original(model, args), args


def noise_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flags `diffusion_steps` T and `noise_schedule` as arguments of `DDPMScheduler`."""
    steps, name = config.get("diffusion_steps", 1000), config.get("noise_schedule", "linear")
    known = name in ("linear", "cosine")
    check(known, f"noise_schedule is {name!r}; allowed: 'linear' or 'cosine'.")
    if name == "cosine":
        return {"num_train_timesteps": steps, "beta_schedule": "squaredcos_cap_v2"}
    # The original's linear schedule goes from 0.1 / T to 20 / T.
    betas = {"beta_start": 0.0001 * 1000 / steps, "beta_end": 0.02 * 1000 / steps}
    return {"num_train_timesteps": steps, "beta_schedule": "linear", **betas}


# 1. The original's arguments -> our models


def _load(state_dict: Weights, args: Arguments, schedule: Arguments | None = None) -> Any:
    """A model with these arguments and tensors; `schedule`: a classifier's noise schedule."""
    config = _model_config(args) | (schedule or {})
    model_class = UNet2DModel
    if "pool" in args:
        model_class = NoiseAwareClassifier
    elif "time_proj_dim" in config:
        model_class = ADMUNet2DModel
    with torch.device("meta"):
        model = model_class(**config)
    load_original(model, state_dict, args)
    model.register_to_config(**{ATTENTION_ORDER: args["use_new_attention_order"]})
    return model.eval()


def _model_config(args: Arguments) -> dict[str, Any]:
    """Config of a classifier, a `UNet2DModel`, or with `time_proj_dim` an `ADMUNet2DModel`."""
    model_channels, head_dim = args["model_channels"], _head_dim(args)
    attended = has_attention(args)
    kind = "resnet" if args["resblock_updown"] else "conv"
    down_types = [DOWN_BLOCK_TYPES[kind][attends] for attends in attended]
    config = (NORM if "pool" in args else UNET_CONSTANTS) | {
        "sample_size": args["image_size"],
        "in_channels": args["in_channels"],
        "block_out_channels": tuple(widths(args)),
        "down_block_types": tuple(down_types),
        "layers_per_block": args["num_res_blocks"],
        "downsample_type": kind,
        "resnet_time_scale_shift": "scale_shift" if args["use_scale_shift_norm"] else "default",
        "dropout": args["dropout"],
        "attention_head_dim": head_dim,
    }
    if "pool" in args:
        config |= {"num_labels": args["out_channels"], "pool": args["pool"]}
        return config | {"time_proj_dim": model_channels}
    up_types = [UP_BLOCK_TYPES[kind][attends] for attends in reversed(attended)]
    config |= {
        "out_channels": args["out_channels"],
        "num_class_embeds": args["num_classes"],
        "up_block_types": tuple(up_types),
        "upsample_type": kind,
        "time_embedding_dim": 4 * model_channels,
    }
    up_head_dim = _head_dim(args, up=True)
    same_heads = isinstance(head_dim, int) and up_head_dim == head_dim
    if not same_heads or model_channels != config["block_out_channels"][0]:
        config["time_proj_dim"] = model_channels
        config["up_attention_head_dim"] = None if up_head_dim == head_dim else up_head_dim
    return config


def _head_dim(args: Arguments, up: bool = False) -> HeadDim:
    """`attention_head_dim`: one integer, or one for each level where they differ."""
    dims, levels = widths(args), attention_levels(args)
    by_width = args["num_head_channels"] != -1
    name = "num_head_channels" if by_width else "num_heads"
    for level in levels:
        width = dims[level]
        value = args[name] if by_width else num_heads(args, width, up)
        allowed = f"a divisor of the {width} channels of level {level}"
        check(value >= 1 and width % value == 0, f"{name} is {value}; allowed: {allowed}.")
        dims[level] = value if by_width else width // value
    used = {dims[level] for level in levels}
    return used.pop() if len(used) == 1 else tuple(dims)


# 2. Our models -> the original's arguments


def _original_arguments(model: UNet2DModel | NoiseAwareClassifier) -> Arguments:
    """The constructor's arguments; raises a ValueError for a model that it can't make."""
    config = model.config
    size, widths = config.sample_size, config.block_out_channels
    check(isinstance(size, int), f"sample_size is {size!r}; guided-diffusion allows an integer.")
    dims = config.get("dims", 2)
    check(dims == 2, f"dims is {dims}; only networks of images, dims=2, can be converted.")
    model_channels = config.get("time_proj_dim") or widths[0]
    attended = ["Attn" in name for name in config.down_block_types]
    residual = config.downsample_type == "resnet"
    args = {
        "image_size": size,
        "in_channels": config.in_channels,
        "model_channels": model_channels,
        "num_res_blocks": config.layers_per_block,
        "attention_resolutions": [2**level for level, attends in enumerate(attended) if attends],
        "dropout": config.dropout,
        "channel_mult": channel_mult(widths, model_channels),
        "conv_resample": residual or not resamples_without_convolution(model),
        "use_scale_shift_norm": config.resnet_time_scale_shift == "scale_shift",
        "resblock_updown": residual,
        "use_new_attention_order": config.get(ATTENTION_ORDER, False),
    }
    if "num_labels" in config:
        args |= {"out_channels": config.num_labels, "pool": config.pool}
    else:
        args |= {"out_channels": config.out_channels, "num_classes": config.num_class_embeds}
    down = head_dims(config.attention_head_dim, widths)
    up = head_dims(config.get("up_attention_head_dim") or config.attention_head_dim, widths)
    args |= _head_arguments(down, up, args)
    _check_config(config, _model_config(args))
    return args


def _check_config(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise a ValueError if a config differs from `expected`, that of its arguments."""
    implied = {"time_embedding_dim": 4 * config["block_out_channels"][0]}  # if the value is None
    if config["resnet_time_scale_shift"] == "default":
        implied["attn_norm_num_groups"] = config["norm_num_groups"]
    for name, allowed in expected.items():
        if name in HEAD_OPTIONS:  # the expected ones were derived from the config's
            continue
        value = implied.get(name) if config[name] is None else config[name]
        if isinstance(value, list):  # a tuple that was saved as JSON
            value = tuple(value)
        check(value == allowed, f"{name} is {config[name]!r}; guided-diffusion allows {allowed!r}.")


def _head_arguments(down: list[int], up: list[int], args: Arguments) -> dict[str, int]:
    """The original's arguments for these channels per head at each level, of both halves."""
    levels, level_widths = attention_levels(args), widths(args)
    dims = {half[level] for half in (down, up) for level in levels}
    if len(dims) == 1:
        return {"num_heads": 1, "num_head_channels": dims.pop(), "num_heads_upsample": -1}
    heads = {level_widths[level] // down[level] for level in levels}
    up_heads = {level_widths[level] // up[level] for level in levels}
    fits = len(heads) == len(up_heads) == 1 and args.get("pool") != "attention"
    allowed = "one width, or one number of heads in each half"
    check(fits, f"attention_head_dim is {(down, up)!r}; guided-diffusion allows {allowed}.")
    numbers = {"num_heads": heads.pop(), "num_heads_upsample": up_heads.pop()}
    return numbers | {"num_head_channels": -1}

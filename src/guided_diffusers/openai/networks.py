"""guided-diffusion's networks as Diffusers models, and back: the same numbers under other names."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..classifier import DOWN_BLOCK_TYPES, NoiseAwareClassifier
from .arguments import channel_mult, complete_arguments
from .tensors import State, extract, fill, only_resamples
from .unet import ADMUNet2DModel, head_dims

Arguments = dict[str, Any]
Network = UNet2DModel | NoiseAwareClassifier

UP_BLOCK_TYPES = {
    "conv": ("UpBlock2D", "AttnUpBlock2D"),
    "resnet": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
}
NORM = {"norm_num_groups": 32, "norm_eps": 1e-5}
UNET_FIXED = {  # what UNet2DModel can vary and guided-diffusion can't
    **NORM,
    "attn_norm_num_groups": 32,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
}
# The order of the attention's rows is no setting of ours, only of the file that export writes. Diffusers keeps private
# entries of a config through saving and loading.
ORDER = "_use_new_attention_order"


def convert_unet(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> UNet2DModel:
    """guided-diffusion's UNet in Diffusers, with equal outputs: `UNet2DModel`, or `ADMUNet2DModel` where its config
    can't express the heads or the sinusoid.

    Args:
        state_dict: Tensors by the original's names. They are copied.
        config: The original's arguments, as the flags of its scripts (`num_channels`, `channel_mult="1,2"`,
            `attention_resolutions="16,8"`, ...) or as those of the constructor (`model_channels`, ...). What the
            tensors show may be left out.

    Raises:
        ValueError: For unknown arguments, arguments that contradict the tensors, and missing or superfluous tensors.
    """
    return _convert_unet(state_dict, complete_arguments(state_dict, config))


def convert_super_resolution(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> UNet2DModel:
    """As [`convert_unet`], for the up-samplers: the model's input is [`join_low_resolution`]`(sample, low_res)`."""
    args = complete_arguments(state_dict, config, super_resolution=True)
    return _convert_unet(state_dict, args, input_factor=2)


def convert_classifier(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> NoiseAwareClassifier:
    """guided-diffusion's noisy classifier as [`NoiseAwareClassifier`], with equal logits and gradients.

    `state_dict`, `config` and errors as for [`convert_unet`]; the flags are those that begin with `classifier_`. A
    `noise_schedule` ("linear" or "cosine") and `diffusion_steps` in `config` go to the classifier's config.
    """
    args = complete_arguments(state_dict, config)
    if "pool" not in args:
        raise ValueError("These are the tensors of a UNet ('output_blocks'); use convert_unet.")
    with torch.device("meta"):
        model = NoiseAwareClassifier(
            num_labels=args["out_channels"],
            pool=args["pool"],
            time_proj_dim=args["model_channels"],
            attention_head_dim=_compact(_head_dims(args, args["num_heads"]), args),
            **_shared_config(args),
            **noise_schedule(config),
        )
    return _filled(model, state_dict, args)


def export_unet(model: UNet2DModel) -> tuple[State, Arguments]:
    """The original's tensors and constructor arguments of a UNet, converted or trained in Diffusers: the way back.

    Raises:
        ValueError: If guided-diffusion has no such architecture; the message names the setting.
    """
    args = _unet_arguments(model)
    return extract(model, args), args


def export_super_resolution(model: UNet2DModel) -> tuple[State, Arguments]:
    """As [`export_unet`], for the up-samplers."""
    args = _unet_arguments(model)
    if args["in_channels"] % 2:
        raise ValueError(
            f"in_channels is {args['in_channels']}; allowed: an even number, half of it the low resolution's."
        )
    return extract(model, args), args | {"in_channels": args["in_channels"] // 2}


def export_classifier(model: NoiseAwareClassifier) -> tuple[State, Arguments]:
    """As [`export_unet`], for a classifier."""
    config = model.config
    args = _shared_arguments(model, config.time_proj_dim or config.block_out_channels[0])
    dims = head_dims(config.attention_head_dim, config.block_out_channels)
    args |= {"out_channels": config.num_labels, "pool": config.pool}
    args |= _heads(dims, dims, args)
    return extract(model, args), args


# Arguments of the original -> our models


def _convert_unet(
    state_dict: Mapping[str, Tensor], args: Arguments, input_factor: int = 1
) -> UNet2DModel:
    if "pool" in args:
        raise ValueError(
            "These are the tensors of a classifier (no 'output_blocks'); use convert_classifier."
        )
    shared = _shared_config(args)
    kind = shared["downsample_type"]
    down = _head_dims(args, args["num_heads"])
    up = _head_dims(
        args, args["num_heads"] if args["num_heads_upsample"] == -1 else args["num_heads_upsample"]
    )
    up_types = tuple(
        UP_BLOCK_TYPES[kind]["Attn" in name] for name in reversed(shared["down_block_types"])
    )
    own = {
        "in_channels": input_factor * args["in_channels"],
        "out_channels": args["out_channels"],
        "num_class_embeds": args["num_classes"],
        "up_block_types": up_types,
        "upsample_type": kind,
        "time_embedding_dim": 4 * args["model_channels"],
    }
    settings = UNET_FIXED | shared | own
    head_dim, up_head_dim = _compact(down, args), _compact(up, args)
    plain = isinstance(head_dim, int) and head_dim == up_head_dim
    with torch.device("meta"):
        if plain and args["model_channels"] == shared["block_out_channels"][0]:
            model = UNet2DModel(attention_head_dim=head_dim, **settings)
        else:
            heads = {
                "attention_head_dim": head_dim,
                "up_attention_head_dim": None if up == down else up_head_dim,
            }
            model = ADMUNet2DModel(time_proj_dim=args["model_channels"], **heads, **settings)
    return _filled(model, state_dict, args)


def _filled(model: Network, state_dict: Mapping[str, Tensor], args: Arguments) -> Network:
    fill(model, state_dict, args)
    model.register_to_config(**{ORDER: args["use_new_attention_order"]})
    return model.eval()


def _shared_config(args: Arguments) -> dict[str, Any]:
    downsample_type = "resnet" if args["resblock_updown"] else "conv"
    types = DOWN_BLOCK_TYPES[downsample_type]
    return {
        **NORM,
        "sample_size": args["image_size"],
        "in_channels": args["in_channels"],
        "block_out_channels": _widths(args),
        "down_block_types": tuple(types[attended] for attended in _attended(args)),
        "layers_per_block": args["num_res_blocks"],
        "downsample_type": downsample_type,
        "resnet_time_scale_shift": "scale_shift" if args["use_scale_shift_norm"] else "default",
        "dropout": args["dropout"],
    }


def noise_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """`diffusion_steps` T and `noise_schedule` in DDPMScheduler's words: linear is 0.1 / T to 20 / T."""
    steps, name = config.get("diffusion_steps", 1000), config.get("noise_schedule", "linear")
    if name not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule is {name!r}; allowed: 'linear' or 'cosine'.")
    if name == "cosine":
        return {"num_train_timesteps": steps, "beta_schedule": "squaredcos_cap_v2"}
    return {
        "num_train_timesteps": steps,
        "beta_schedule": "linear",
        "beta_start": 0.0001 * 1000 / steps,
        "beta_end": 0.02 * 1000 / steps,
    }


def _widths(args: Arguments) -> tuple[int, ...]:
    return tuple(int(mult * args["model_channels"]) for mult in args["channel_mult"])


def _attended(args: Arguments) -> list[bool]:
    return [2**level in args["attention_resolutions"] for level in range(len(args["channel_mult"]))]


def _head_dims(args: Arguments, num_heads: int) -> list[int]:
    """Channels of a head at each level, 0 where there is no attention (the middle block has the last level's)."""
    per_head, widths = args["num_head_channels"], _widths(args)
    dims = [0] * len(widths)
    for level, (width, attended) in enumerate(zip(widths, _attended(args), strict=True)):
        if attended or level == len(widths) - 1:
            name, value = (
                ("num_heads", num_heads) if per_head == -1 else ("num_head_channels", per_head)
            )
            if value < 1 or width % value:
                raise ValueError(
                    f"{name} is {value}; allowed: a divisor of the {width} channels of level {level}."
                )
            dims[level] = width // num_heads if per_head == -1 else per_head
    return dims


def _compact(dims: list[int], args: Arguments) -> int | tuple[int, ...]:
    used = {dim for dim in dims if dim}
    return (
        used.pop()
        if len(used) == 1
        else tuple(dim or width for dim, width in zip(dims, _widths(args), strict=True))
    )


# Our models -> arguments of the original


def _shared_arguments(model: Network, model_channels: int) -> Arguments:
    config, types = model.config, tuple(model.config.down_block_types)
    for name, fixed in NORM.items():
        _require(config[name] == fixed, name, config[name], fixed)
    _require(isinstance(config.sample_size, int), "sample_size", config.sample_size, "an integer")
    kind, mode = config.downsample_type, config.resnet_time_scale_shift
    _require(kind in DOWN_BLOCK_TYPES, "downsample_type", kind, tuple(DOWN_BLOCK_TYPES))
    _require(
        set(types) <= set(DOWN_BLOCK_TYPES[kind]), "down_block_types", types, DOWN_BLOCK_TYPES[kind]
    )
    _require(
        mode in ("default", "scale_shift"),
        "resnet_time_scale_shift",
        mode,
        ("default", "scale_shift"),
    )
    return {
        "image_size": config.sample_size,
        "in_channels": config.in_channels,
        "model_channels": model_channels,
        "num_res_blocks": config.layers_per_block,
        "attention_resolutions": [2**level for level, name in enumerate(types) if "Attn" in name],
        "dropout": config.dropout,
        "channel_mult": channel_mult(config.block_out_channels, model_channels),
        "conv_resample": kind == "resnet" or not only_resamples(model),
        "use_scale_shift_norm": mode == "scale_shift",
        "resblock_updown": kind == "resnet",
        "use_new_attention_order": config.get(ORDER, False),
    }


def _unet_arguments(model: UNet2DModel) -> Arguments:
    config, widths = model.config, model.config.block_out_channels
    for name, fixed in UNET_FIXED.items():
        # UNet2DModel's plain middle block takes norm_num_groups where there is no attn_norm_num_groups.
        implied = (
            name == "attn_norm_num_groups"
            and config[name] is None
            and config.resnet_time_scale_shift == "default"
        )
        _require(implied or config[name] == fixed, name, config[name], fixed)
    time_proj_dim = config.get("time_proj_dim") or widths[0]
    embedding = config.time_embedding_dim or 4 * widths[0]
    _require(embedding == 4 * time_proj_dim, "time_embedding_dim", embedding, 4 * time_proj_dim)
    args = _shared_arguments(model, time_proj_dim)
    kind = config.downsample_type
    _require(config.upsample_type == kind, "upsample_type", config.upsample_type, kind)
    types = tuple(
        UP_BLOCK_TYPES[kind]["Attn" in name] for name in reversed(config.down_block_types)
    )
    _require(tuple(config.up_block_types) == types, "up_block_types", config.up_block_types, types)
    down = head_dims(config.attention_head_dim, widths)
    up = head_dims(config.get("up_attention_head_dim") or config.attention_head_dim, widths)
    args |= {"out_channels": config.out_channels, "num_classes": config.num_class_embeds}
    return args | _heads(down, up, args)


def _heads(down: list[int], up: list[int], args: Arguments) -> dict[str, int]:
    widths, used = (
        _widths(args),
        [*(i for i, attended in enumerate(_attended(args)) if attended), len(down) - 1],
    )
    dims = {dims[level] for dims in (down, up) for level in used}
    if len(dims) == 1:
        return {"num_heads": 1, "num_head_channels": dims.pop(), "num_heads_upsample": -1}
    counts = [{widths[level] // dims[level] for level in used} for dims in (down, up)]
    fits = len(counts[0]) == len(counts[1]) == 1 and args.get("pool") != "attention"
    _require(
        fits, "attention_head_dim", (down, up), "one width, or one number of heads in each half"
    )
    return {
        "num_heads": counts[0].pop(),
        "num_head_channels": -1,
        "num_heads_upsample": counts[1].pop(),
    }


def _require(ok: bool, name: str, value: Any, allowed: Any) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; guided-diffusion allows {allowed!r}.")

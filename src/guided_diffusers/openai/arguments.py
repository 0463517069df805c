"""Arguments of guided-diffusion's networks, from its scripts' flags and from a file's tensors.

`args` are the complete arguments of a constructor: UNetModel's, SuperResModel's, or
EncoderUNetModel's (the classifier; only it has `pool`). Their `attention_resolutions` are
down-sampling factors.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

from torch import Tensor

Arguments = dict[str, Any]
State = Mapping[str, Tensor]

# channel_mult of the scripts' models where the flag is "", by image size
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
SUPER_RESOLUTION_CHANNEL_MULT = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}
ARGUMENTS = tuple(
    "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions "
    "dropout channel_mult conv_resample dims num_classes num_heads num_head_channels "
    "num_heads_upsample use_scale_shift_norm resblock_updown use_new_attention_order pool".split()
)
ARGUMENT_OF_FLAG = {
    "num_channels": "model_channels",
    "large_size": "image_size",
    "classifier_width": "model_channels",
    "classifier_depth": "num_res_blocks",
    "classifier_attention_resolutions": "attention_resolutions",
    "classifier_use_scale_shift_norm": "use_scale_shift_norm",
    "classifier_resblock_updown": "resblock_updown",
    "classifier_pool": "pool",
}
# Flags of precision, memory and diffusion process, which don't change the network.
IGNORED_FLAGS = set(
    "use_checkpoint use_fp16 classifier_use_fp16 small_size diffusion_steps noise_schedule "
    "timestep_respacing use_kl predict_xstart rescale_timesteps rescale_learned_sigmas "
    "sigma_small".split()
)
DEFAULTS = {
    "dropout": 0.0,
    "conv_resample": True,
    "resblock_updown": False,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
}


def complete_arguments(
    state_dict: State, config: Mapping[str, Any], super_resolution: bool = False
) -> Arguments:
    """The constructor's arguments: those that the tensors determine, the rest from `config`.

    Raises:
        ValueError: For unknown names, if `config` contradicts the tensors, and for settings that
            neither of them has.
    """
    configured = _constructor_arguments(config, super_resolution)
    class_cond = configured.pop("class_cond", None)
    read = _read_arguments(state_dict, configured.get("num_res_blocks"))
    if super_resolution:
        if read["in_channels"] % 2:
            raise ValueError(
                f"in_channels is {read['in_channels']} in the tensors; an up-sampler's is even."
            )
        read["in_channels"] //= 2
    _check_agreement(configured, read, class_cond)
    args = DEFAULTS | configured | read
    _check_complete(args)
    return {"num_heads": 1, **args}


def widths(args: Arguments) -> list[int]:
    """Channels of each level."""
    return [int(mult * args["model_channels"]) for mult in args["channel_mult"]]


def channel_mult(widths: Iterable[int], model_channels: int) -> list[float]:
    """The multipliers of `model_channels` that give the widths, integers where possible."""
    multipliers = [width / model_channels for width in widths]
    return [int(mult) if mult.is_integer() else mult for mult in multipliers]


def has_attention(args: Arguments) -> list[bool]:
    """Whether each level has attention."""
    factors = args["attention_resolutions"]
    return [2**level in factors for level in range(len(args["channel_mult"]))]


def attention_levels(args: Arguments) -> list[int]:
    """The levels with attention, and the last, whose width the middle block's attention has."""
    *attended, _ = has_attention(args)
    return [level for level, attends in enumerate(attended) if attends] + [len(attended)]


def num_heads_upsample(args: Arguments) -> int:
    """Number of heads of the up-sampling half, where `num_head_channels` is -1."""
    upsample: int = args["num_heads_upsample"]
    return args["num_heads"] if upsample == -1 else upsample


# 1. Flags


def _constructor_arguments(config: Mapping[str, Any], super_resolution: bool) -> Arguments:
    """`config` under the constructor's names, and `class_cond`."""
    args = _rename_flags(config)
    unknown = args.keys() - {*ARGUMENTS, "class_cond"}
    if unknown:
        raise ValueError(
            f"{sorted(unknown)} are no arguments of guided-diffusion's networks; allowed: "
            f"{ARGUMENTS}."
        )
    if args.pop("dims", 2) != 2:
        raise ValueError(f"dims is {config['dims']!r}; allowed: 2.")
    if "classifier_width" in config:
        args.setdefault("num_head_channels", 64)  # fixed in the script
    if "num_channels" in config or "classifier_width" in config:
        args.setdefault("in_channels", 3)
        args.setdefault("channel_mult", "")
    if isinstance(args.get("attention_resolutions"), str):
        args["attention_resolutions"] = _downsampling_factors(args)
    mult = args.pop("channel_mult", None)
    if mult == "":
        mult = _default_channel_mult(args.get("image_size"), super_resolution)
    elif isinstance(mult, str):
        mult = [float(part) for part in mult.split(",")]
    if mult is not None:
        args["channel_mult"] = list(mult)
    return args


def _rename_flags(config: Mapping[str, Any]) -> Arguments:
    args: Arguments = {}
    for flag, setting in config.items():
        if flag in IGNORED_FLAGS:
            continue
        name, value = ARGUMENT_OF_FLAG.get(flag, flag), setting
        if flag == "learn_sigma":
            name, value = "out_channels", 6 if setting else 3
        if args.setdefault(name, value) != value:
            raise ValueError(
                f"{flag} is {setting!r}, but another flag sets {name} to {args[name]!r}."
            )
    return args


def _downsampling_factors(args: Arguments) -> list[int]:
    """The factors of `attention_resolutions` as in the scripts: image sizes, such as "16,8"."""
    resolutions = args["attention_resolutions"]
    if "image_size" not in args:
        raise ValueError(f"attention_resolutions is {resolutions!r}, which needs image_size.")
    return [args["image_size"] // int(resolution) for resolution in resolutions.split(",")]


def _default_channel_mult(image_size: int | None, super_resolution: bool) -> tuple[float, ...]:
    table: Mapping[Any, tuple[float, ...]] = CHANNEL_MULT
    if super_resolution:
        table = SUPER_RESOLUTION_CHANNEL_MULT
    if image_size not in table:
        raise ValueError(
            f"channel_mult is empty, which needs an image_size in {tuple(table)}; "
            f"it is {image_size!r}."
        )
    return table[image_size]


# 2. Tensors


def _read_arguments(state_dict: State, num_res_blocks: int | None) -> Arguments:
    """The arguments that names and shapes of the tensors determine.

    `num_res_blocks`: the config's, which a classifier may need; None: not configured.
    """
    model_channels = _shape(state_dict, "time_embed.0.weight")[1]
    in_channels = _shape(state_dict, "input_blocks.0.0.weight")[1]
    count = max(_indices(state_dict, "input_blocks")) + 1
    read, downsampler = _read_downsamplers(state_dict, count)
    depth = _read_depth(state_dict, downsampler, num_res_blocks)
    if depth < 1 or count % (depth + 1):
        raise ValueError(
            f"num_res_blocks is {depth}, but the tensors have {count} input blocks, "
            "no multiple of it plus 1."
        )
    level_blocks = [f"input_blocks.{i}" for i in range(1, count, depth + 1)]  # first of each level
    if len(level_blocks) > 1:
        read.setdefault("resblock_updown", True)
    level_widths = [
        _shape(state_dict, f"{block}.0.in_layers.2.weight")[0] for block in level_blocks
    ]
    time_features = _shape(state_dict, f"{level_blocks[0]}.0.emb_layers.1.weight")[0]
    read |= {
        "in_channels": in_channels,
        "model_channels": model_channels,
        "num_res_blocks": depth,
        "attention_resolutions": [
            2**i for i, block in enumerate(level_blocks) if f"{block}.1.qkv.weight" in state_dict
        ],
        "channel_mult": channel_mult(level_widths, model_channels),
        "use_scale_shift_norm": time_features == 2 * level_widths[0],
    }
    if _indices(state_dict, "output_blocks"):
        labels = state_dict.get("label_emb.weight")
        read["num_classes"] = None if labels is None else labels.shape[0]
        return read | {"out_channels": _shape(state_dict, "out.2.weight")[0]}
    return read | _read_classifier_head(state_dict, 2 ** (len(level_blocks) - 1))


def _read_downsamplers(state_dict: State, count: int) -> tuple[Arguments, int | None]:
    """What down-samples between the levels, and the index of the first such of `count` blocks.

    Convolutions have their own names and average pooling has no tensors at all. Residual
    down-samplers look like any residual block: then nothing is known, ({}, None).
    """
    indices = _indices(state_dict, "input_blocks")
    convolutions = [i for i in range(count) if f"input_blocks.{i}.0.op.weight" in state_dict]
    poolings = [i for i in range(count) if i not in indices]
    if poolings:
        first = poolings[0]
        if count % first or poolings != list(range(first, count, first)):
            raise ValueError(f"The tensors lack {[f'input_blocks.{i}' for i in poolings]}.")
    if not convolutions and not poolings:
        return {}, None
    read = {"resblock_updown": False, "conv_resample": bool(convolutions)}
    return read, (convolutions or poolings)[0]


def _read_depth(state_dict: State, downsampler: int | None, num_res_blocks: int | None) -> int:
    """`num_res_blocks`: from the first down-sampler, a UNet's first up-sampler, or the config."""
    if downsampler is not None:
        return downsampler - 1
    outputs = _indices(state_dict, "output_blocks")
    for i in outputs:
        for part in (1, 2):  # after a residual block, and after attention
            if f"output_blocks.{i}.{part}.in_layers.2.weight" in state_dict:
                return i
    if outputs:
        return len(outputs) - 1
    if num_res_blocks is None:
        raise ValueError(
            "num_res_blocks can't be read off a classifier's tensors; give it in the config."
        )
    return num_res_blocks


def _read_classifier_head(state_dict: State, reduction: int) -> Arguments:
    """`reduction`: image size over the size of the last feature map."""
    if "out.2.positional_embedding" in state_dict:
        tokens = _shape(state_dict, "out.2.positional_embedding")[1] - 1
        labels = _shape(state_dict, "out.2.c_proj.weight")[0]
        image_size = isqrt(tokens) * reduction
        return {"pool": "attention", "out_channels": labels, "image_size": image_size}
    if "out.3.weight" in state_dict:
        shape = _shape(state_dict, "out.3.weight")
        return {"pool": "adaptive" if len(shape) == 4 else "spatial_v2", "out_channels": shape[0]}
    return {"pool": "spatial", "out_channels": _shape(state_dict, "out.2.weight")[0]}


def _indices(state_dict: State, part: str) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in state_dict if name.startswith(f"{part}.")})


def _shape(state_dict: State, name: str) -> tuple[int, ...]:
    if name not in state_dict:
        raise ValueError(
            f"The tensors lack {name!r}: the file is no guided-diffusion checkpoint of this kind, "
            "or incomplete."
        )
    return tuple(state_dict[name].shape)


# 3. Checks


def _check_agreement(configured: Arguments, read: Arguments, class_cond: bool | None) -> None:
    """Raise a ValueError where the config contradicts the tensors."""
    # image_size last: a classifier's is computed from its number of levels
    for name in sorted(configured, key=lambda name: name == "image_size"):
        value = configured[name]
        if name in ("pool", "num_classes"):
            agrees = value == read.get(name)
        else:
            agrees = name not in read or _equivalent(name, value, read)
        if not agrees:
            raise ValueError(
                f"{name} is {value!r} in the config but {read.get(name)!r} in the tensors."
            )
    num_classes = read.get("num_classes")
    if class_cond is not None and class_cond != (num_classes is not None):
        raise ValueError(
            f"class_cond is {class_cond} in the config but num_classes is {num_classes} in the "
            "tensors."
        )


def _equivalent(name: str, value: Any, read: Arguments) -> bool:
    """Whether an argument means the same as that which was read from the tensors."""
    if name == "channel_mult":
        return widths(read | {name: value}) == widths(read)
    if name == "attention_resolutions":  # factors beyond the last level have no effect
        return has_attention(read | {name: value}) == has_attention(read)
    return value == read[name]


def _check_complete(args: Arguments) -> None:
    if "image_size" not in args:
        raise ValueError("image_size can't be read off these tensors; give it in the config.")
    reduction = 2 ** (len(args["channel_mult"]) - 1)
    if not args["conv_resample"] and args["image_size"] % reduction:
        # The original's average pooling drops a last odd row, which our convolution keeps.
        raise ValueError(
            f"image_size is {args['image_size']}; allowed with average pooling: "
            f"multiples of {reduction}."
        )
    if args["num_head_channels"] == -1 and "num_heads" not in args:
        raise ValueError(
            "Attention heads can't be read off the tensors; give num_heads or num_head_channels."
        )
    if args["num_head_channels"] == -1 and args.get("pool") == "attention":
        raise ValueError(
            "num_head_channels is -1 or missing; pool='attention' needs the number of channels "
            "of a head."
        )

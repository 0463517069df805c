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
State = dict[str, Tensor]
Weights = Mapping[str, Tensor]

# channel_mult of the scripts' models where the flag is "", by image size
CHANNEL_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4)}
CHANNEL_MULT |= {128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
UPSAMPLER_CHANNEL_MULT = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}
ARGUMENTS = tuple(
    "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions "
    "dropout channel_mult conv_resample dims num_classes num_heads num_head_channels "
    "num_heads_upsample use_scale_shift_norm resblock_updown use_new_attention_order pool".split()
)
SHARED_FLAGS = ("attention_resolutions", "use_scale_shift_norm", "resblock_updown", "pool")
ARGUMENT_OF_FLAG = {f"classifier_{name}": name for name in SHARED_FLAGS}
ARGUMENT_OF_FLAG |= {"classifier_width": "model_channels", "classifier_depth": "num_res_blocks"}
ARGUMENT_OF_FLAG |= {"num_channels": "model_channels", "large_size": "image_size"}
# Flags of precision, memory and diffusion process, which don't change the network.
IGNORED_FLAGS = set(
    "use_checkpoint use_fp16 classifier_use_fp16 small_size diffusion_steps noise_schedule "
    "timestep_respacing use_kl predict_xstart rescale_timesteps rescale_learned_sigmas "
    "sigma_small".split()
)
DEFAULTS = {"dropout": 0.0, "conv_resample": True, "resblock_updown": False}
DEFAULTS |= {"num_head_channels": -1, "num_heads_upsample": -1, "use_new_attention_order": False}


def check(ok: bool, message: str) -> None:
    """Raise a ValueError with this message unless `ok`."""
    if not ok:
        raise ValueError(message)


def complete_arguments(
    state_dict: Weights, config: Mapping[str, Any], kind: str = "unet"
) -> Arguments:
    """The arguments of a `kind` ("unet", "upsampler", "classifier") from its tensors and `config`.

    Raises a ValueError for unknown names, contradictions, and settings that neither of them has.
    """
    configured = _constructor_arguments(config)
    _parse_lists(configured, UPSAMPLER_CHANNEL_MULT if kind == "upsampler" else CHANNEL_MULT)
    class_cond = configured.pop("class_cond", None)
    read = _read_arguments(state_dict, configured.get("num_res_blocks"))
    other = "classifier (no 'output_blocks'); use convert_classifier"
    if kind == "classifier":
        other = "UNet ('output_blocks'); use convert_unet"
    check((kind == "classifier") == ("pool" in read), f"These are the tensors of a {other}.")
    if kind == "upsampler":
        channels, odd = read["in_channels"], read["in_channels"] % 2
        check(not odd, f"in_channels is {channels} in the tensors; an up-sampler's is even.")
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


def num_heads(args: Arguments, width: int, up: bool = False) -> int:
    """Number of heads of an attention of `width` channels; `up`: in the up-sampling half."""
    if args["num_head_channels"] != -1:
        return width // args["num_head_channels"]
    return args["num_heads_upsample" if up and args["num_heads_upsample"] != -1 else "num_heads"]


# 1. Flags


def _constructor_arguments(config: Mapping[str, Any]) -> Arguments:
    """`config` under the constructor's names, and `class_cond`."""
    args: Arguments = {}
    for flag, setting in config.items():
        if flag in IGNORED_FLAGS:
            continue
        name, value = ARGUMENT_OF_FLAG.get(flag, flag), setting
        if flag == "learn_sigma":
            name, value = "out_channels", 6 if setting else 3
        other = args.setdefault(name, value)
        check(other == value, f"{flag} is {setting!r}, but another flag sets {name} to {other!r}.")
    unknown = sorted(args.keys() - {*ARGUMENTS, "class_cond"})
    check(not unknown, f"{unknown} are no arguments of the networks; allowed: {ARGUMENTS}.")
    dims = args.pop("dims", 2)
    check(dims == 2, f"dims is {dims!r}; allowed: 2.")
    if "classifier_width" in config:
        args.setdefault("num_head_channels", 64)  # fixed in the script
    if "num_channels" in config or "classifier_width" in config:
        args.setdefault("in_channels", 3)
        args.setdefault("channel_mult", "")
    return args


def _parse_lists(args: Arguments, default_mult: Mapping[int, tuple[float, ...]]) -> None:
    """Replace the scripts' strings, in which resolutions are image sizes, by lists."""
    size, resolutions = args.get("image_size"), args.get("attention_resolutions")
    if isinstance(resolutions, str):
        known, needed = "image_size" in args, "which needs image_size"
        check(known, f"attention_resolutions is {resolutions!r}, {needed}.")
        args["attention_resolutions"] = [size // int(part) for part in resolutions.split(",")]
    mult = args.pop("channel_mult", None)
    if mult == "":
        needed = f"which needs an image_size in {tuple(default_mult)}; it is {size!r}."
        check(size in default_mult, f"channel_mult is empty, {needed}")
        mult = default_mult[size]
    elif isinstance(mult, str):
        mult = [float(part) for part in mult.split(",")]
    if mult is not None:
        args["channel_mult"] = list(mult)


# 2. Tensors


def _read_arguments(state_dict: Weights, num_res_blocks: int | None) -> Arguments:
    """The arguments that the tensors determine; a classifier may need the config's depth."""
    model_channels = _shape(state_dict, "time_embed.0.weight")[1]
    in_channels = _shape(state_dict, "input_blocks.0.0.weight")[1]
    count = max(_indices(state_dict, "input_blocks")) + 1
    read, downsampler = _read_downsamplers(state_dict, count)
    depth = _read_depth(state_dict, downsampler, num_res_blocks)
    fits = depth >= 1 and count % (depth + 1) == 0
    multiple = f"{count} input blocks, no multiple of it plus 1"
    check(fits, f"num_res_blocks is {depth}, but the tensors have {multiple}.")
    blocks = [f"input_blocks.{i}" for i in range(1, count, depth + 1)]  # first of each level
    if len(blocks) > 1:
        read.setdefault("resblock_updown", True)
    level_widths = [_shape(state_dict, f"{block}.0.in_layers.2.weight")[0] for block in blocks]
    time_features = _shape(state_dict, f"{blocks[0]}.0.emb_layers.1.weight")[0]
    attended = [f"{block}.1.qkv.weight" in state_dict for block in blocks]
    read |= {
        "in_channels": in_channels,
        "model_channels": model_channels,
        "num_res_blocks": depth,
        "attention_resolutions": [2**level for level, attends in enumerate(attended) if attends],
        "channel_mult": channel_mult(level_widths, model_channels),
        "use_scale_shift_norm": time_features == 2 * level_widths[0],
    }
    if _indices(state_dict, "output_blocks"):
        labels = state_dict.get("label_emb.weight")
        read["num_classes"] = None if labels is None else labels.shape[0]
        return read | {"out_channels": _shape(state_dict, "out.2.weight")[0]}
    return read | _read_classifier_head(state_dict, 2 ** (len(blocks) - 1))


def _read_downsamplers(state_dict: Weights, count: int) -> tuple[Arguments, int | None]:
    """What down-samples, and its first block's index; ({}, None): residual blocks, or nothing."""
    indices = _indices(state_dict, "input_blocks")
    convolutions = [i for i in range(count) if f"input_blocks.{i}.0.op.weight" in state_dict]
    poolings = [i for i in range(count) if i not in indices]  # have no tensors
    if poolings:
        periodic = list(range(poolings[0], count, poolings[0]))
        missing = [f"input_blocks.{i}" for i in poolings]
        check(poolings == periodic and count % poolings[0] == 0, f"The tensors lack {missing}.")
    if not convolutions and not poolings:
        return {}, None
    read = {"resblock_updown": False, "conv_resample": bool(convolutions)}
    return read, (convolutions or poolings)[0]


def _read_depth(state_dict: Weights, downsampler: int | None, num_res_blocks: int | None) -> int:
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
    needed = "num_res_blocks can't be read off a classifier's tensors; give it in the config."
    check(num_res_blocks is not None, needed)
    return num_res_blocks


def _read_classifier_head(state_dict: Weights, reduction: int) -> Arguments:
    """`pool` and sizes; `reduction`: image size over the size of the last feature map."""
    if "out.2.positional_embedding" in state_dict:
        tokens = _shape(state_dict, "out.2.positional_embedding")[1] - 1
        labels = _shape(state_dict, "out.2.c_proj.weight")[0]
        image_size = isqrt(tokens) * reduction
        return {"pool": "attention", "out_channels": labels, "image_size": image_size}
    if "out.3.weight" in state_dict:
        shape = _shape(state_dict, "out.3.weight")
        return {"pool": "adaptive" if len(shape) == 4 else "spatial_v2", "out_channels": shape[0]}
    return {"pool": "spatial", "out_channels": _shape(state_dict, "out.2.weight")[0]}


def _indices(state_dict: Weights, part: str) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in state_dict if name.startswith(f"{part}.")})


def _shape(state_dict: Weights, name: str) -> tuple[int, ...]:
    check(name in state_dict, f"The tensors lack {name!r}: another kind of file, or incomplete.")
    return tuple(state_dict[name].shape)


# 3. Checks


def _check_agreement(configured: Arguments, read: Arguments, class_cond: bool | None) -> None:
    """Raise a ValueError where the config contradicts the tensors."""
    # image_size last: a classifier's is computed from its number of levels
    for name in sorted(configured, key=lambda name: name == "image_size"):
        value = configured[name]
        if name == "channel_mult":
            agrees = widths(read | {name: value}) == widths(read)
        elif name == "attention_resolutions":  # factors beyond the last level have no effect
            agrees = has_attention(read | {name: value}) == has_attention(read)
        elif name in ("pool", "num_classes"):
            agrees = value == read.get(name)
        else:
            agrees = value == read.get(name, value)
        check(agrees, f"{name} is {value!r} in the config but {read.get(name)!r} in the tensors.")
    classes = read.get("num_classes")
    agrees = class_cond is None or class_cond == (classes is not None)
    contradiction = f"in the config but num_classes is {classes} in the tensors"
    check(agrees, f"class_cond is {class_cond} {contradiction}.")


def _check_complete(args: Arguments) -> None:
    """Raise a ValueError for settings that are missing, or that don't fit each other."""
    check("image_size" in args, "image_size can't be read off these tensors; give it in config.")
    size, reduction = args["image_size"], 2 ** (len(args["channel_mult"]) - 1)
    # The original's average pooling drops a last odd row, which our convolution keeps.
    fits = args["conv_resample"] or size % reduction == 0
    allowed = f"allowed with average pooling: multiples of {reduction}"
    check(fits, f"image_size is {size}; {allowed}.")
    if args["num_head_channels"] == -1:
        allowed = "give num_heads or num_head_channels"
        check("num_heads" in args, f"Attention heads can't be read off the tensors; {allowed}.")
        needed = "pool='attention' needs the channels of a head"
        attends = args.get("pool") == "attention"
        check(not attends, f"num_head_channels is -1 or missing; {needed}.")

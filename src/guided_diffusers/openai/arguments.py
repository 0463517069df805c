"""guided-diffusion's arguments: two spellings of them, and what the tensors say.

`args` are always the constructor's arguments of UNetModel, SuperResModel or EncoderUNetModel (which alone has `pool`),
complete; their `attention_resolutions` are down-sampling factors.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

from torch import Tensor

CHANNEL_MULT = {  # what the factories take for channel_mult = "", by image size
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
SUPER_RESOLUTION_CHANNEL_MULT = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}

ARGUMENTS = tuple(
    "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions dropout channel_mult "
    "conv_resample dims num_classes num_heads num_head_channels num_heads_upsample use_scale_shift_norm "
    "resblock_updown use_new_attention_order pool".split()
)
RENAMED = {
    "num_channels": "model_channels",
    "large_size": "image_size",
    "classifier_width": "model_channels",
    "classifier_depth": "num_res_blocks",
    "classifier_attention_resolutions": "attention_resolutions",
    "classifier_use_scale_shift_norm": "use_scale_shift_norm",
    "classifier_resblock_updown": "resblock_updown",
    "classifier_pool": "pool",
}
# Flags of precision, memory and diffusion process: nothing in the network depends on them.
NOT_OF_THE_NETWORK = frozenset(
    "use_checkpoint use_fp16 classifier_use_fp16 small_size diffusion_steps noise_schedule timestep_respacing use_kl "
    "predict_xstart rescale_timesteps rescale_learned_sigmas sigma_small".split()
)


def complete_arguments(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], super_resolution: bool = False
) -> dict[str, Any]:
    """The constructor's arguments: those that the tensors show are read off them and compared, the rest is `config`'s.

    Raises:
        ValueError: For unknown names, for `config` and tensors in contradiction, and for settings that neither has.
    """
    given = _constructor_arguments(config, super_resolution)
    class_cond = given.pop("class_cond", None)
    read = _read_arguments(state_dict, given.get("num_res_blocks"))
    if super_resolution:
        if read["in_channels"] % 2:
            raise ValueError(
                f"in_channels is {read['in_channels']} in the tensors; an up-sampler's is even."
            )
        read["in_channels"] //= 2
    for name in sorted(
        given, key="image_size".__eq__
    ):  # last, because a head's image_size follows from the levels
        value = given[name]
        absent = name in ("pool", "num_classes") and value is not None and name not in read
        if absent or name in read and not _agree(name, value, read):
            raise ValueError(
                f"{name} is {value!r} in the config but {read.get(name)!r} in the tensors."
            )
    classes = read.get("num_classes")
    if class_cond is not None and class_cond != (classes is not None):
        raise ValueError(
            f"class_cond is {class_cond} in the config but num_classes is {classes} in the tensors."
        )
    args = {
        "dropout": 0.0,
        "conv_resample": True,
        "resblock_updown": False,
        "num_head_channels": -1,
        "num_heads_upsample": -1,
        "use_new_attention_order": False,
        **given,
        **read,
    }
    if "image_size" not in args:
        raise ValueError("image_size can't be read off these tensors; give it in the config.")
    levels = len(args["channel_mult"])
    if not args["conv_resample"] and args["image_size"] % 2 ** (levels - 1):
        # The original's average pooling drops a last row that our convolution keeps.
        raise ValueError(
            f"image_size is {args['image_size']}; allowed with {levels} levels: multiples of {2 ** (levels - 1)}."
        )
    if args["num_head_channels"] == -1 and "num_heads" not in args:
        raise ValueError(
            "Attention heads can't be read off the tensors; give num_heads or num_head_channels."
        )
    if args["num_head_channels"] == -1 and args.get("pool") == "attention":
        raise ValueError(
            "num_head_channels is -1 or missing; pool='attention' needs the number of channels of a head."
        )
    return {"num_heads": 1, **args}


def channel_mult(widths: Iterable[int], model_channels: int) -> list[float]:
    """The multipliers of `model_channels` that give the widths."""
    return [
        width / model_channels if width % model_channels else width // model_channels
        for width in widths
    ]


def _constructor_arguments(config: Mapping[str, Any], super_resolution: bool) -> dict[str, Any]:
    """`config` in the constructor's names, and `class_cond`; only what it fixes."""
    given: dict[str, Any] = {}
    for flag, setting in config.items():
        name, value = RENAMED.get(flag, flag), setting
        if flag == "learn_sigma":
            name, value = "out_channels", 6 if setting else 3
        if flag not in NOT_OF_THE_NETWORK and given.setdefault(name, value) != value:
            raise ValueError(
                f"{flag} is {setting!r}, but another argument says that {name} is {given[name]!r}."
            )
    unknown = given.keys() - {*ARGUMENTS, "class_cond"}
    if unknown:
        raise ValueError(
            f"{sorted(unknown)} are no arguments of guided-diffusion's networks; known: {ARGUMENTS}."
        )
    if given.pop("dims", 2) != 2:
        raise ValueError(f"dims is {config['dims']!r}; allowed: 2.")
    if "classifier_width" in config:
        given.setdefault("num_head_channels", 64)  # its factory has no flag for it
    if isinstance(given.get("attention_resolutions"), str):
        if "image_size" not in given:
            raise ValueError(
                f"attention_resolutions is {given['attention_resolutions']!r}, which needs image_size."
            )
        resolutions = given["attention_resolutions"].split(",")
        given["attention_resolutions"] = [
            given["image_size"] // int(resolution) for resolution in resolutions
        ]
    from_factory = "num_channels" in config or "classifier_width" in config
    if from_factory:
        given.setdefault("in_channels", 3)
    mult = given.pop("channel_mult", "" if from_factory else None)
    if mult == "":
        table, size = (
            SUPER_RESOLUTION_CHANNEL_MULT if super_resolution else CHANNEL_MULT,
            given.get("image_size"),
        )
        if size not in table:
            raise ValueError(
                f"channel_mult is empty, which needs an image_size in {tuple(table)}; it is {size!r}."
            )
        mult = table[size]
    if mult is not None:
        given["channel_mult"] = (
            [float(part) for part in mult.split(",")] if isinstance(mult, str) else list(mult)
        )
    return given


def _read_arguments(state_dict: Mapping[str, Tensor], num_res_blocks: int | None) -> dict[str, Any]:
    """What names and shapes of the tensors show, `num_res_blocks` being what the config says of it."""
    model_channels = _shape(state_dict, "time_embed.0.weight")[1]
    in_channels = _shape(state_dict, "input_blocks.0.0.weight")[1]
    outputs = _indices(state_dict, "output_blocks")
    count = max(_indices(state_dict, "input_blocks")) + 1
    num_res_blocks, read = _read_depth(state_dict, count, outputs, num_res_blocks)
    firsts = [
        f"input_blocks.{i}" for i in range(1, count, num_res_blocks + 1)
    ]  # the first block of each level
    if len(firsts) > 1:
        read.setdefault("resblock_updown", True)
    widths = [_shape(state_dict, f"{block}.0.in_layers.2.weight")[0] for block in firsts]
    read |= {
        "in_channels": in_channels,
        "model_channels": model_channels,
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": [
            2**i for i, block in enumerate(firsts) if f"{block}.1.qkv.weight" in state_dict
        ],
        "channel_mult": channel_mult(widths, model_channels),
        "use_scale_shift_norm": _shape(state_dict, f"{firsts[0]}.0.emb_layers.1.weight")[0]
        == 2 * widths[0],
    }
    if outputs:
        labels = "label_emb.weight"
        read["num_classes"] = _shape(state_dict, labels)[0] if labels in state_dict else None
        read["out_channels"] = _shape(state_dict, "out.2.weight")[0]
        return read
    return read | _read_head(state_dict, 2 ** (len(firsts) - 1))


def _read_depth(
    state_dict: Mapping[str, Tensor], count: int, outputs: list[int], given: int | None
) -> tuple[int, dict[str, bool]]:
    """`num_res_blocks`, and what the down-samplers between the levels show: convolutions have their own names, poolings
    no tensors at all, residual ones look like any residual block. A UNet shows its depth in the up-samplers, too.
    """
    convolutions = [i for i in range(count) if f"input_blocks.{i}.0.op.weight" in state_dict]
    poolings = sorted({*range(count)} - {*_indices(state_dict, "input_blocks")})
    if poolings and (
        count % poolings[0] or poolings != list(range(poolings[0], count, poolings[0]))
    ):
        raise ValueError(f"The tensors lack {[f'input_blocks.{i}' for i in poolings]}.")
    upsamplers = [
        i
        for i in outputs
        for k in (1, 2)
        if f"output_blocks.{i}.{k}.in_layers.2.weight" in state_dict
    ]
    read = (
        {"resblock_updown": False, "conv_resample": bool(convolutions)}
        if convolutions or poolings
        else {}
    )
    if read:
        depth = (convolutions or poolings)[0] - 1
    elif outputs:
        depth = upsamplers[0] if upsamplers else len(outputs) - 1
    elif given is not None:
        depth = given
    else:
        raise ValueError(
            "num_res_blocks can't be read off a classifier's tensors; give it in the config."
        )
    if depth < 1 or count % (depth + 1):
        raise ValueError(
            f"num_res_blocks is {depth}, but the tensors have {count} input blocks, no multiple of it plus 1."
        )
    return depth, read


def _indices(state_dict: Mapping[str, Tensor], part: str) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in state_dict if name.startswith(f"{part}.")})


def _read_head(state_dict: Mapping[str, Tensor], reduction: int) -> dict[str, Any]:
    if "out.2.positional_embedding" in state_dict:
        tokens = _shape(state_dict, "out.2.positional_embedding")[1] - 1
        rows = _shape(state_dict, "out.2.c_proj.weight")[0]
        return {"pool": "attention", "out_channels": rows, "image_size": isqrt(tokens) * reduction}
    if "out.3.weight" in state_dict:
        shape = _shape(state_dict, "out.3.weight")
        return {"pool": "adaptive" if len(shape) == 4 else "spatial_v2", "out_channels": shape[0]}
    return {"pool": "spatial", "out_channels": _shape(state_dict, "out.2.weight")[0]}


def _shape(state_dict: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state_dict:
        raise ValueError(
            f"The tensors lack {name!r}: no guided-diffusion checkpoint of this kind, or not all of it."
        )
    return tuple(state_dict[name].shape)


def _agree(name: str, given: Any, read: Mapping[str, Any]) -> bool:
    if name == "channel_mult":
        return _widths(given, read) == _widths(read[name], read)
    if (
        name == "attention_resolutions"
    ):  # factors beyond the last level are allowed, and mean nothing
        factors: Iterable[int] = [2**level for level in range(len(read["channel_mult"]))]
        return {factor for factor in factors if factor in given} == set(read[name])
    return given == read[name]


def _widths(channel_mult: Iterable[float], read: Mapping[str, Any]) -> list[int]:
    return [int(mult * read["model_channels"]) for mult in channel_mult]

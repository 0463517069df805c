"""guided-diffusion's tensors under Diffusers' names: a table of pairs, used in both directions."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .arguments import Arguments, State, Weights, check, has_attention, num_heads, widths


class Pair(NamedTuple):
    """A tensor of the original and its counterpart, or a layer with weight and bias."""

    original: str
    ours: str
    # or "transposed"; "conv1d" or "conv2d": a convolution of size 1 there, a linear layer here;
    # "qkv": one tensor there, three here (`ours` has {} in the place of q, k, v)
    kind: str = "same"
    heads: int = 1  # for "qkv"


RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",  # only where the width changes
}
# [q, k, v][head][channel] in every published file, whatever use_new_attention_order is.
POOL_QKV = Pair("out.2.qkv_proj", "head.2.qkv", "conv1d")
HEADS = {  # a classifier's last layers
    "attention": (Pair("out.0", "head.0"), POOL_QKV, Pair("out.2.c_proj", "head.2.out", "conv1d")),
    "adaptive": (Pair("out.0", "head.0"), Pair("out.3", "head.4", "conv2d")),
    "spatial": (Pair("out.0", "head.0"), Pair("out.2", "head.2")),
    "spatial_v2": (Pair("out.0", "head.0"), Pair("out.1", "head.1"), Pair("out.3", "head.3")),
}


def load_original(model: nn.Module, state_dict: Weights, args: Arguments) -> None:
    """Load copies of the original's tensors into a model on the meta device.

    Raises a ValueError if names or shapes are not exactly those of the arguments.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in to_original(model, args).items()}
    missing = sorted(expected.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - expected.keys())
    check(
        not missing and not unexpected,
        f"The tensors don't fit the arguments {args}: {len(missing)} missing {missing[:4]}, "
        f"{len(unexpected)} superfluous {unexpected[:4]}.",
    )
    for name, shape in expected.items():
        got = tuple(state_dict[name].shape)
        check(got == shape, f"{name} has shape {got}; the arguments {args} need {shape}.")
    ours: State = {}
    for pair in _pairs(model, args):
        ours |= _to_ours(pair, state_dict[pair.original], args["use_new_attention_order"])
    if not args["conv_resample"]:
        like = ours["conv_in.weight"]
        for name, convolution, kernel in _resampling_kernels(model):
            ours[f"{name}.weight"] = kernel.to(like)
            ours[f"{name}.bias"] = like.new_zeros(convolution.out_channels)
    model.load_state_dict(ours, assign=True)


def to_original(model: nn.Module, args: Arguments) -> State:
    """Copies of the model's tensors under the original's names."""
    state, new_order = model.state_dict(), args["use_new_attention_order"]
    return {pair.original: _to_original(pair, state, new_order) for pair in _pairs(model, args)}


def resamples_without_convolution(model: nn.Module) -> bool:
    """Whether the resampling convolutions only average or repeat pixels (`conv_resample=False`)."""
    resamples = False
    for _, convolution, kernel in _resampling_kernels(model):
        same = torch.equal(convolution.weight, kernel.to(convolution.weight))
        if not same or convolution.bias.any():
            return False
        resamples = True
    return resamples


def _resampling_kernels(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d, Tensor]]:
    """Resampling convolutions, and kernels that average 2x2 pixels (stride 2) or copy their input.

    Diffusers' blocks always convolve; with these they compute exactly `conv_resample=False`.
    """
    for name, module in model.named_modules():
        if name.endswith(("downsamplers.0.conv", "upsamplers.0.conv")):
            taps = torch.tensor([0.0, 0.5, 0.5] if "downsamplers" in name else [0.0, 1.0, 0.0])
            identity = torch.eye(module.out_channels)[:, :, None, None]
            yield name, module, identity * torch.outer(taps, taps)


# 1. One tensor


def _to_ours(pair: Pair, tensor: Tensor, new_order: bool) -> State:
    if pair.kind == "transposed":
        tensor = tensor.mT
    elif pair.kind != "same" and tensor.ndim > 1:
        tensor = tensor.flatten(1)
    if pair.kind != "qkv":
        return {pair.ours: tensor.clone(memory_format=torch.contiguous_format)}
    if not new_order:  # rows are [head][q, k, v][channel], ours are [q, k, v][head][channel]
        tensor = tensor.unflatten(0, (pair.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    parts = zip("qkv", tensor.chunk(3), strict=True)
    return {pair.ours.format(part): rows.clone() for part, rows in parts}


def _to_original(pair: Pair, state: Weights, new_order: bool) -> Tensor:
    if pair.kind == "qkv":
        tensor = torch.cat([state[pair.ours.format(part)] for part in "qkv"])
        if not new_order:
            tensor = tensor.unflatten(0, (3, pair.heads, -1)).transpose(0, 1).flatten(0, 2)
    else:
        tensor = state[pair.ours]
    if pair.kind == "transposed":
        tensor = tensor.mT
    elif pair.kind != "same" and tensor.ndim > 1:
        tensor = tensor[..., None, None] if pair.kind == "conv2d" else tensor[..., None]
    return tensor.clone(memory_format=torch.contiguous_format)


# 2. The table


def _pairs(model: nn.Module, args: Arguments) -> Iterator[Pair]:
    """The model's tensors: weight and bias of each layer, where it has them, and two more."""
    names = model.state_dict().keys()
    for layer in _layers(args):
        for part in ("weight", "bias"):
            if f"{layer.ours.format('q')}.{part}" in names:
                original, ours = f"{layer.original}.{part}", f"{layer.ours}.{part}"
                yield layer._replace(original=original, ours=ours)
    if args.get("num_classes") is not None:
        yield Pair("label_emb.weight", "class_embedding.weight")
    if args.get("pool") == "attention":
        yield Pair("out.2.positional_embedding", "head.2.positional_embedding", "transposed")


def _layers(args: Arguments) -> Iterator[Pair]:
    """Layers with weight and bias, in the order of the original's construction."""
    levels, level_widths = range(len(args["channel_mult"])), widths(args)
    yield Pair("time_embed.0", "time_embedding.linear_1")
    yield Pair("time_embed.2", "time_embedding.linear_2")
    yield Pair("input_blocks.0.0", "conv_in")
    for level in levels:
        yield from _level_layers(args, level, up=False)
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    heads = num_heads(args, level_widths[-1])
    yield from _attention("middle_block.1", "mid_block.attentions.0", heads)
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    if "pool" in args:
        yield from HEADS[args["pool"]]
        return
    for level in reversed(levels):
        yield from _level_layers(args, level, up=True)
    yield from (Pair("out.0", "conv_norm_out"), Pair("out.2", "conv_out"))


def _level_layers(args: Arguments, level: int, up: bool) -> Iterator[Pair]:
    """Residual blocks, attention and resampler of a level, in one half of the UNet."""
    depth, last, attended = (
        args["num_res_blocks"],
        len(args["channel_mult"]) - 1,
        has_attention(args),
    )
    position = last - level if up else level
    half, ours = ("output", f"up_blocks.{position}") if up else ("input", f"down_blocks.{position}")
    first = position * (depth + 1) + (0 if up else 1)
    for i in range(depth + up):
        original = f"{half}_blocks.{first + i}"
        yield from _resnet(f"{original}.0", f"{ours}.resnets.{i}")
        if attended[level]:
            heads = num_heads(args, widths(args)[level], up)
            yield from _attention(f"{original}.1", f"{ours}.attentions.{i}", heads)
    if position == last:
        return
    if up:  # the last module of the last block
        original, ours, conv = f"{original}.{1 + attended[level]}", f"{ours}.upsamplers.0", "conv"
    else:
        original, ours, conv = f"input_blocks.{first + depth}.0", f"{ours}.downsamplers.0", "op"
    if args["resblock_updown"]:
        yield from _resnet(original, ours)
    elif args["conv_resample"]:
        yield Pair(f"{original}.{conv}", f"{ours}.conv")


def _resnet(original: str, ours: str) -> Iterator[Pair]:
    for layer, our_layer in RESNET.items():
        yield Pair(f"{original}.{layer}", f"{ours}.{our_layer}")


def _attention(original: str, ours: str, heads: int) -> Iterator[Pair]:
    yield Pair(f"{original}.norm", f"{ours}.group_norm")
    yield Pair(f"{original}.qkv", f"{ours}.to_{{}}", "qkv", heads)
    yield Pair(f"{original}.proj_out", f"{ours}.to_out.0", "conv1d")

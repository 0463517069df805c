"""guided-diffusion's tensors under Diffusers' names: a table of pairs, used in both directions."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .arguments import Arguments, has_attention, num_heads_upsample, widths

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",  # only where the width changes
}
HEADS = {  # a classifier's last layers: index in the original's `out` -> in our `head`
    "attention": {"0": "0"},
    "adaptive": {"0": "0"},
    "spatial": {"0": "0", "2": "2"},
    "spatial_v2": {"0": "0", "1": "1", "3": "3"},
}


class Pair(NamedTuple):
    """A tensor of the original and its counterpart in Diffusers, or a layer with weight and bias.

    Attributes:
        original, ours: The names.
        kind: "same"; "transposed"; "conv1d" or "conv2d", where the original has a convolution of
            size 1 and we a linear layer; "qkv", where the original has one tensor and we three
            (`ours` has {} in the place of q, k, v).
        heads: Number of attention heads, for "qkv".
    """

    original: str
    ours: str
    kind: str = "same"
    heads: int = 1


def load_original(model: nn.Module, state_dict: Mapping[str, Tensor], args: Arguments) -> None:
    """Load copies of the original's tensors into a model on the meta device.

    Raises:
        ValueError: If names or shapes are not exactly those of the arguments.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in to_original(model, args).items()}
    missing = sorted(expected.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"The tensors don't fit the arguments {args}: {len(missing)} missing {missing[:4]}, "
            f"{len(unexpected)} superfluous {unexpected[:4]}."
        )
    for name, shape in expected.items():
        received = tuple(state_dict[name].shape)
        if received != shape:
            raise ValueError(f"{name} has shape {received}; the arguments {args} need {shape}.")
    ours: dict[str, Tensor] = {}
    for pair in _pairs(model, args):
        ours |= _to_ours(pair, state_dict[pair.original], args["use_new_attention_order"])
    if not args["conv_resample"]:
        like = ours["conv_in.weight"]
        for name, convolution in _resampling_convolutions(model):
            ours[f"{name}.weight"] = _resampling_weight(name, convolution).to(like)
            ours[f"{name}.bias"] = like.new_zeros(convolution.out_channels)
    model.load_state_dict(ours, assign=True)


def to_original(model: nn.Module, args: Arguments) -> dict[str, Tensor]:
    """Copies of the model's tensors under the original's names."""
    state, new_order = model.state_dict(), args["use_new_attention_order"]
    return {pair.original: _to_original(pair, state, new_order) for pair in _pairs(model, args)}


def resamples_without_convolution(model: nn.Module) -> bool:
    """Whether the resampling convolutions only average or repeat pixels (`conv_resample=False`)."""
    convolutions = list(_resampling_convolutions(model))
    for name, convolution in convolutions:
        expected = _resampling_weight(name, convolution).to(convolution.weight)
        if not torch.equal(convolution.weight, expected) or convolution.bias.any():
            return False
    return bool(convolutions)


# 1. One tensor


def _to_ours(pair: Pair, tensor: Tensor, new_order: bool) -> dict[str, Tensor]:
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


def _to_original(pair: Pair, state: Mapping[str, Tensor], new_order: bool) -> Tensor:
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
    names = model.state_dict().keys()
    for layer in _layers(args):
        for part in ("weight", "bias"):
            if f"{layer.ours.format('q')}.{part}" in names:
                original, ours = f"{layer.original}.{part}", f"{layer.ours}.{part}"
                yield Pair(original, ours, layer.kind, layer.heads)
    if args.get("num_classes") is not None:
        yield Pair("label_emb.weight", "class_embedding.weight")
    if args.get("pool") == "attention":
        yield Pair("out.2.positional_embedding", "head.2.positional_embedding", "transposed")


def _layers(args: Arguments) -> Iterator[Pair]:
    """Layers with weight and bias, in the order of the original's construction."""
    yield Pair("time_embed.0", "time_embedding.linear_1")
    yield Pair("time_embed.2", "time_embedding.linear_2")
    yield Pair("input_blocks.0.0", "conv_in")
    yield from _down_layers(args)
    heads = _num_heads(args, widths(args)[-1], args["num_heads"])
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0", heads)
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    if "pool" in args:
        yield from _classifier_head(args["pool"])
        return
    yield from _up_layers(args)
    yield Pair("out.0", "conv_norm_out")
    yield Pair("out.2", "conv_out")


def _down_layers(args: Arguments) -> Iterator[Pair]:
    index, attended = 1, has_attention(args)
    for level, width in enumerate(widths(args)):
        block = f"down_blocks.{level}"
        heads = _num_heads(args, width, args["num_heads"])
        for i in range(args["num_res_blocks"]):
            yield from _resnet(f"input_blocks.{index}.0", f"{block}.resnets.{i}")
            if attended[level]:
                yield from _attention(f"input_blocks.{index}.1", f"{block}.attentions.{i}", heads)
            index += 1
        if level < len(attended) - 1:
            yield from _resampler(f"input_blocks.{index}.0", f"{block}.downsamplers.0", "op", args)
            index += 1


def _up_layers(args: Arguments) -> Iterator[Pair]:
    index, attended = 0, has_attention(args)
    for up, level in enumerate(reversed(range(len(attended)))):
        block = f"up_blocks.{up}"
        heads = _num_heads(args, widths(args)[level], num_heads_upsample(args))
        for i in range(args["num_res_blocks"] + 1):
            original = f"output_blocks.{index}"
            yield from _resnet(f"{original}.0", f"{block}.resnets.{i}")
            if attended[level]:
                yield from _attention(f"{original}.1", f"{block}.attentions.{i}", heads)
            index += 1
        if level > 0:
            last = f"{original}.{2 if attended[level] else 1}"
            yield from _resampler(last, f"{block}.upsamplers.0", "conv", args)


def _num_heads(args: Arguments, width: int, num_heads: int) -> int:
    per_head: int = args["num_head_channels"]
    return num_heads if per_head == -1 else width // per_head


def _resnet(original: str, ours: str) -> Iterator[Pair]:
    for layer, our_layer in RESNET.items():
        yield Pair(f"{original}.{layer}", f"{ours}.{our_layer}")


def _attention(original: str, ours: str, heads: int) -> Iterator[Pair]:
    yield Pair(f"{original}.norm", f"{ours}.group_norm")
    yield Pair(f"{original}.qkv", f"{ours}.to_{{}}", "qkv", heads)
    yield Pair(f"{original}.proj_out", f"{ours}.to_out.0", "conv1d")


def _resampler(original: str, ours: str, name: str, args: Arguments) -> Iterator[Pair]:
    if args["resblock_updown"]:
        yield from _resnet(original, ours)
    elif args["conv_resample"]:
        yield Pair(f"{original}.{name}", f"{ours}.conv")


def _classifier_head(pool: str) -> Iterator[Pair]:
    for original, ours in HEADS[pool].items():
        yield Pair(f"out.{original}", f"head.{ours}")
    if pool == "attention":
        # [q, k, v][head][channel] in every published file, whatever use_new_attention_order is.
        yield Pair("out.2.qkv_proj", "head.2.qkv", "conv1d")
        yield Pair("out.2.c_proj", "head.2.out", "conv1d")
    if pool == "adaptive":
        yield Pair("out.3", "head.4", "conv2d")


# 3. Resampling without a convolution


def _resampling_convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, module in model.named_modules():
        if name.endswith(("downsamplers.0.conv", "upsamplers.0.conv")):
            yield name, module


def _resampling_weight(name: str, convolution: nn.Conv2d) -> Tensor:
    """A 3x3 kernel that averages 2x2 pixels (stride 2, padding 1), or copies its input.

    Diffusers' blocks always convolve after resampling; with this kernel they compute exactly what
    the original computes with `conv_resample=False`.
    """
    taps = torch.tensor([0.0, 0.5, 0.5] if "downsamplers" in name else [0.0, 1.0, 0.0])
    return torch.eye(convolution.out_channels)[:, :, None, None] * torch.outer(taps, taps)

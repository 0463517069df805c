"""The tensors of guided-diffusion's networks under Diffusers' names: one list of pairs, read in both directions."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",  # only where the width changes
}
HEADS = {  # the classifier's last layers: index in the original's `out` -> in our `head`
    "attention": {"0": "0"},
    "adaptive": {"0": "0"},
    "spatial": {"0": "0", "2": "2"},
    "spatial_v2": {"0": "0", "1": "1", "3": "3"},
}


class Pair(NamedTuple):
    """A tensor of the original and its counterpart among ours, or a layer (without ".weight" and ".bias").

    `kind`: "same"; "transposed"; "conv1d" or "conv2d" (the original has a convolution of size 1 where we have a linear
    layer); "qkv" (the original has one tensor where we have three, `ours` with {} for q, k, v; `heads` of attention).
    """

    original: str
    ours: str
    kind: str = "same"
    heads: int = 1


def fill(model: nn.Module, state_dict: Mapping[str, Tensor], args: Mapping[str, Any]) -> None:
    """Give a model on the meta device copies of the original's tensors.

    Raises:
        ValueError: If names or shapes are not exactly those that the arguments ask for.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in extract(model, args).items()}
    missing, unknown = expected.keys() - state_dict.keys(), state_dict.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(
            f"The tensors don't fit the arguments {args}: {len(missing)} missing {sorted(missing)[:4]}, "
            f"{len(unknown)} superfluous {sorted(unknown)[:4]}."
        )
    for name, shape in expected.items():
        if tuple(state_dict[name].shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(state_dict[name].shape)}; the arguments {args} need {shape}."
            )
    ours: State = {}
    for pair in _pairs(model, args):
        ours |= _to_ours(pair, state_dict[pair.original], args["use_new_attention_order"])
    if not args["conv_resample"]:
        like = ours["conv_in.weight"]
        for name, convolution in _resampling_convolutions(model):
            ours[f"{name}.weight"] = _resampling_weight(name, convolution).to(like)
            ours[f"{name}.bias"] = like.new_zeros(convolution.out_channels)
    model.load_state_dict(ours, assign=True)


def extract(model: nn.Module, args: Mapping[str, Any]) -> State:
    """The original's tensors, copied from one of our models."""
    state, new_order = model.state_dict(), args["use_new_attention_order"]
    return {pair.original: _to_original(pair, state, new_order) for pair in _pairs(model, args)}


def only_resamples(model: nn.Module) -> bool:
    """Whether the convolutions that change the size do nothing else: `conv_resample=False` of the original."""
    convolutions = list(_resampling_convolutions(model))
    return bool(convolutions) and all(
        torch.equal(
            convolution.weight, _resampling_weight(name, convolution).to(convolution.weight)
        )
        and not convolution.bias.any()
        for name, convolution in convolutions
    )


def _to_ours(pair: Pair, tensor: Tensor, new_order: bool) -> State:
    if pair.kind in ("qkv", "conv1d", "conv2d") and tensor.ndim > 1:
        tensor = tensor.flatten(1)
    if pair.kind == "qkv":
        if not new_order:  # rows are [head][q, k, v][channel], ours are [q, k, v][head][channel]
            tensor = tensor.unflatten(0, (pair.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return {
            pair.ours.format(part): rows.clone()
            for part, rows in zip("qkv", tensor.chunk(3), strict=True)
        }
    tensor = tensor.mT if pair.kind == "transposed" else tensor
    return {pair.ours: tensor.clone(memory_format=torch.contiguous_format)}


def _to_original(pair: Pair, state: State, new_order: bool) -> Tensor:
    if pair.kind == "qkv":
        tensor = torch.cat([state[pair.ours.format(part)] for part in "qkv"])
        if not new_order:
            tensor = tensor.unflatten(0, (3, pair.heads, -1)).transpose(0, 1).flatten(0, 2)
    else:
        tensor = state[pair.ours]
    if tensor.ndim > 1 and pair.kind in ("qkv", "conv1d"):
        tensor = tensor[..., None]
    elif tensor.ndim > 1 and pair.kind == "conv2d":
        tensor = tensor[..., None, None]
    elif pair.kind == "transposed":
        tensor = tensor.mT
    return tensor.clone(memory_format=torch.contiguous_format)


def _pairs(model: nn.Module, args: Mapping[str, Any]) -> Iterator[Pair]:
    names = model.state_dict().keys()
    for original, ours, kind, heads in _layers(args):
        for part in ("weight", "bias"):
            if ours.format("q") + "." + part in names:
                yield Pair(f"{original}.{part}", f"{ours}.{part}", kind, heads)
    if args.get("num_classes") is not None:
        yield Pair("label_emb.weight", "class_embedding.weight")
    if args.get("pool") == "attention":
        yield Pair("out.2.positional_embedding", "head.2.positional_embedding", "transposed")


def _layers(args: Mapping[str, Any]) -> Iterator[Pair]:
    """Layers with weight and bias, in the order of the original's construction."""
    levels, depth = len(args["channel_mult"]), args["num_res_blocks"]
    yield Pair("time_embed.0", "time_embedding.linear_1")
    yield Pair("time_embed.2", "time_embedding.linear_2")
    yield Pair("input_blocks.0.0", "conv_in")
    index = 1
    for level in range(levels):
        block = f"down_blocks.{level}"
        for i in range(depth):
            yield from _resnet(f"input_blocks.{index}.0", f"{block}.resnets.{i}")
            yield from _attention(
                f"input_blocks.{index}.1", f"{block}.attentions.{i}", level, args, args["num_heads"]
            )
            index += 1
        if level < levels - 1:
            yield from _resampler(f"input_blocks.{index}.0", f"{block}.downsamplers.0", "op", args)
            index += 1
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0", None, args, args["num_heads"])
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    if "pool" in args:
        yield from _head(args["pool"])
        return
    up_heads = args["num_heads"] if args["num_heads_upsample"] == -1 else args["num_heads_upsample"]
    for index in range(levels * (depth + 1)):
        up, i = divmod(index, depth + 1)
        level, block, original = levels - 1 - up, f"up_blocks.{up}", f"output_blocks.{index}"
        yield from _resnet(f"{original}.0", f"{block}.resnets.{i}")
        attention = list(
            _attention(f"{original}.1", f"{block}.attentions.{i}", level, args, up_heads)
        )
        yield from attention
        if i == depth and level > 0:
            yield from _resampler(
                f"{original}.{2 if attention else 1}", f"{block}.upsamplers.0", "conv", args
            )
    yield Pair("out.0", "conv_norm_out")
    yield Pair("out.2", "conv_out")


def _resnet(original: str, ours: str) -> Iterator[Pair]:
    for layer, our_layer in RESNET.items():
        yield Pair(f"{original}.{layer}", f"{ours}.{our_layer}")


def _attention(
    original: str, ours: str, level: int | None, args: Mapping[str, Any], num_heads: int
) -> Iterator[Pair]:
    """`level` is None for the middle block, which always has attention."""
    if level is not None and 2**level not in args["attention_resolutions"]:
        return
    width = int(args["channel_mult"][-1 if level is None else level] * args["model_channels"])
    heads = num_heads if args["num_head_channels"] == -1 else width // args["num_head_channels"]
    yield Pair(f"{original}.norm", f"{ours}.group_norm")
    yield Pair(f"{original}.qkv", f"{ours}.to_{{}}", "qkv", heads)
    yield Pair(f"{original}.proj_out", f"{ours}.to_out.0", "conv1d")


def _resampler(original: str, ours: str, name: str, args: Mapping[str, Any]) -> Iterator[Pair]:
    if args["resblock_updown"]:
        yield from _resnet(original, ours)
    elif args["conv_resample"]:
        yield Pair(f"{original}.{name}", f"{ours}.conv")


def _head(pool: str) -> Iterator[Pair]:
    for original, ours in HEADS[pool].items():
        yield Pair(f"out.{original}", f"head.{ours}")
    if pool == "attention":
        # Its rows are [q, k, v][head][channel] in every published file, whatever use_new_attention_order says.
        yield Pair("out.2.qkv_proj", "head.2.qkv", "conv1d")
        yield Pair("out.2.c_proj", "head.2.out", "conv1d")
    if pool == "adaptive":
        yield Pair("out.3", "head.4", "conv2d")


def _resampling_convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, module in model.named_modules():
        if name.endswith(("downsamplers.0.conv", "upsamplers.0.conv")):
            yield name, module


def _resampling_weight(name: str, convolution: nn.Conv2d) -> Tensor:
    """The 3x3 weights with which a convolution averages 2x2 pixels (stride 2, padding 1) or changes nothing.

    Diffusers' blocks always convolve where they resample; these weights say exactly what `conv_resample=False` does.
    """
    taps = torch.tensor([0.0, 0.5, 0.5] if "downsamplers" in name else [0.0, 1.0, 0.0])
    return torch.eye(convolution.out_channels)[:, :, None, None] * torch.outer(taps, taps)

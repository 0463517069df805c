"""Blocks of a UNet's encoder for samples of one, two or three dimensions (`dims`).

Their parameters have the names, and their arithmetic is that of Diffusers' `DownBlock2D`,
`AttnDownBlock2D`, `ResnetDownsampleBlock2D` and `UNetMidBlock2D`, which take images only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_class(kind: str, dims: int) -> Callable[..., nn.Module]:
    """The class of torch.nn of this kind ("Conv", "AvgPool", "AdaptiveAvgPool") and dimension."""
    return getattr(nn, f"{kind}{dims}d")


class ResidualBlock(nn.Module):
    """Sum of a sample, (B, C, ...), and of two convolutions of it, between which the timestep acts.

    Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis", equation 5:

        scale_shift:  (1 + s) GroupNorm(h) + b,  (s, b) linear in the time embedding
        default:      GroupNorm(h + b),          b linear in the time embedding

    Args:
        down: halve each size by average pooling, before the convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dims: int,
        temb_channels: int,
        groups: int,
        eps: float,
        dropout: float,
        time_scale_shift: str,
        down: bool = False,
    ):
        super().__init__()
        conv = layer_class("Conv", dims)
        self.is_scale_shift = time_scale_shift == "scale_shift"
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = conv(in_channels, out_channels, kernel_size=3, padding=1)
        width = 2 * out_channels if self.is_scale_shift else out_channels
        self.time_emb_proj = nn.Linear(temb_channels, width)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, kernel_size=3, padding=1)
        self.downsample = layer_class("AvgPool", dims)(2) if down else None
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = conv(in_channels, out_channels, kernel_size=1)

    def forward(self, sample: Tensor, temb: Tensor) -> Tensor:
        hidden = F.silu(self.norm1(sample))
        if self.downsample is not None:
            sample, hidden = self.downsample(sample), self.downsample(hidden)
        hidden = self.conv1(hidden)
        temb = self.time_emb_proj(F.silu(temb))
        temb = temb.reshape(*temb.shape, *[1] * (hidden.ndim - 2))
        if self.is_scale_shift:
            scale, shift = temb.chunk(2, dim=1)
            hidden = self.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm2(hidden + temb)
        hidden = self.conv2(self.dropout(F.silu(hidden)))
        if self.conv_shortcut is not None:
            # distributed training warns of gradients whose strides aren't the weights'
            sample = self.conv_shortcut(sample.contiguous() if self.training else sample)
        return sample + hidden


class SelfAttention(nn.Module):
    """Sum of a sample, (B, C, ...), and of the attention of its places to one another."""

    _from_deprecated_attn_block = True  # Diffusers then loads weights of older names, "query", ...

    def __init__(self, channels: int, head_dim: int, groups: int, eps: float):
        super().__init__()
        self.heads = channels // head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, sample: Tensor) -> Tensor:
        tokens = self.group_norm(sample.flatten(2)).transpose(1, 2)
        q, k, v = (
            project(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out[0](attended).transpose(1, 2).reshape(sample.shape) + sample


class StridedConv(nn.Module):
    """Halves each size, rounded up, by a convolution of stride 2."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.conv = layer_class("Conv", dims)(
            channels, channels, kernel_size=3, stride=2, padding=1
        )

    def forward(self, sample: Tensor, temb: Tensor) -> Tensor:
        return self.conv(sample)


class DownBlock(nn.Module):
    """A level of the encoder: residual blocks, each with attention if `head_dim` isn't None, then a
    down-sampler.

    Args:
        downsample_type: "resnet", "conv", or None, without one.
        options: of the `ResidualBlock`s.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_layers: int,
        head_dim: int | None,
        downsample_type: str | None,
        options: Mapping[str, Any],
    ):
        super().__init__()
        resnets, attentions = [], []
        for index in range(num_layers):
            width = out_channels if index else in_channels
            resnets.append(ResidualBlock(width, out_channels, **options))
            if head_dim is not None:
                norm = options["groups"], options["eps"]
                attentions.append(SelfAttention(out_channels, head_dim, *norm))
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = None
        if downsample_type == "resnet":
            down = ResidualBlock(out_channels, out_channels, **options, down=True)
            self.downsamplers = nn.ModuleList([down])
        elif downsample_type == "conv":
            self.downsamplers = nn.ModuleList([StridedConv(out_channels, options["dims"])])
        self.has_attention = head_dim is not None
        self.gradient_checkpointing = False

    def forward(self, hidden: Tensor, temb: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(output, outputs of all layers)."""
        outputs: tuple[Tensor, ...] = ()
        for index, resnet in enumerate(self.resnets):
            hidden = run_block(self, resnet, hidden, temb)
            if self.has_attention:
                hidden = self.attentions[index](hidden)
            outputs += (hidden,)
        if self.downsamplers is not None:
            hidden = self.downsamplers[0](hidden, temb)
            outputs += (hidden,)
        return hidden, outputs


class MidBlock(nn.Module):
    """The innermost level: a residual block, attention, a residual block."""

    def __init__(self, channels: int, head_dim: int, options: Mapping[str, Any]):
        super().__init__()
        first = ResidualBlock(channels, channels, **options)
        attention = SelfAttention(channels, head_dim, options["groups"], options["eps"])
        self.attentions = nn.ModuleList([attention])
        self.resnets = nn.ModuleList([first, ResidualBlock(channels, channels, **options)])
        self.gradient_checkpointing = False

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        hidden = self.attentions[0](self.resnets[0](hidden, temb))
        return run_block(self, self.resnets[1], hidden, temb)


def run_block(level: nn.Module, block: nn.Module, hidden: Tensor, temb: Tensor) -> Tensor:
    """`block(hidden, temb)`, computed again in the backward pass with gradient checkpointing."""
    if torch.is_grad_enabled() and level.gradient_checkpointing:
        return level._gradient_checkpointing_func(block, hidden, temb)
    return block(hidden, temb)

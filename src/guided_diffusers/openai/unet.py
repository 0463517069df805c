"""`UNet2DModel` with the freedoms of guided-diffusion's UNet that its config lacks.

Self-contained on purpose (torch and diffusers only): this file travels to the Hub beside the weights.
"""

import inspect

from diffusers import (
    ModelMixin,  # noqa: F401 - a pipeline's from_pretrained looks for it in the module that the class is from
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn


class ADMUNet2DModel(UNet2DModel):
    """`UNet2DModel` whose attention heads may differ by level, and whose sinusoid is as wide as one likes.

    For a fixed number of heads over several widths (the published 128x128 model and the 64 -> 256 up-sampler) and for a
    first channel multiplier other than 1 (512x512). The defaults are in ADM's manner (Dhariwal & Nichol, Diffusion
    Models Beat GANs on Image Synthesis, 2021); all arguments but these three are `UNet2DModel`'s.

    Args:
        attention_head_dim: Channels of a head, for all levels or one a level of `block_out_channels`; `None` is one
            head. The middle block has the last level's.
        up_attention_head_dim: The same for the up-sampling half, also in the order of `block_out_channels`; `None` is
            `attention_head_dim`.
        time_proj_dim: Width of the timestep's sinusoid; `None` is `block_out_channels[0]`. The time embedding is
            four times as wide unless `time_embedding_dim` is given.

    Raises:
        ValueError: If a head width doesn't divide its level's width, or `time_proj_dim` has no sinusoid to widen.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) + ("AttnDownBlock2D",) * 3,
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        block_out_channels: tuple[int, ...] = (64, 128, 192, 256),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "resnet",
        upsample_type: str = "resnet",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | tuple[int, ...] | None = 64,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        up_attention_head_dim: int | tuple[int, ...] | None = None,
        time_proj_dim: int | None = None,
    ):
        # One head everywhere at first: the number of heads changes no weight's shape.
        names = [
            name for name in inspect.signature(UNet2DModel.__init__).parameters if name != "self"
        ]
        time_embedding_dim = time_embedding_dim or 4 * (time_proj_dim or block_out_channels[0])
        changed = {"attention_head_dim": None, "time_embedding_dim": time_embedding_dim}
        super().__init__(**{name: self.config[name] for name in names} | changed)
        self.register_to_config(attention_head_dim=attention_head_dim)

        if time_proj_dim is not None:
            if time_embedding_type != "positional" or class_embed_type == "timestep":
                given = (time_embedding_type, class_embed_type)
                raise ValueError(
                    f"time_proj_dim is {time_proj_dim}, but (time_embedding_type, class_embed_type) is {given}; "
                    "allowed: ('positional', None or 'identity')."
                )
            self.time_proj = Timesteps(time_proj_dim, flip_sin_to_cos, freq_shift)
            self.time_embedding = TimestepEmbedding(time_proj_dim, time_embedding_dim)

        up_attention_head_dim = (
            attention_head_dim if up_attention_head_dim is None else up_attention_head_dim
        )
        down = head_dims(attention_head_dim, block_out_channels)
        up = head_dims(up_attention_head_dim, block_out_channels)[::-1]
        mid = [] if self.mid_block is None else [(self.mid_block, down[-1])]
        for block, head_dim in [
            *zip(self.down_blocks, down, strict=True),
            *mid,
            *zip(self.up_blocks, up, strict=True),
        ]:
            _set_head_dim(block, head_dim)


def head_dims(head_dim: int | tuple[int, ...] | None, widths: tuple[int, ...]) -> list[int]:
    """`attention_head_dim` for each level."""
    dims = (
        list(widths)
        if head_dim is None
        else [head_dim] * len(widths)
        if isinstance(head_dim, int)
        else list(head_dim)
    )
    if len(dims) != len(widths):
        raise ValueError(
            f"attention_head_dim is {head_dim!r}; allowed: None, one integer, or {len(widths)} of them."
        )
    return dims


def _set_head_dim(block: nn.Module, head_dim: int) -> None:
    for attention in block.modules():
        if isinstance(attention, Attention):
            width = attention.inner_dim
            if head_dim < 1 or width % head_dim:
                raise ValueError(
                    f"attention_head_dim has {head_dim}; allowed: a divisor of its level's {width} channels."
                )
            attention.heads = attention.sliceable_head_dim = width // head_dim
            attention.scale = head_dim**-0.5

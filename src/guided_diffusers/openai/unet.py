"""`UNet2DModel` with the options of guided-diffusion's UNet that its config lacks.

It imports little, because this file and `weights` are saved on the Hub beside the weights, as one.
"""

import inspect
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import (
    ModelMixin,  # noqa: F401 - from_pretrained of a pipeline looks for it in this module
)

from ..weights import load_checked

HeadDim = int | tuple[int, ...] | None


class ADMUNet2DModel(UNet2DModel):
    """`UNet2DModel` with attention heads that differ by level and a timestep sinusoid of any width.

    Needed for a fixed number of heads at several widths (the published 128x128 model and the
    64 -> 256 up-sampler) and for a first channel multiplier other than 1 (512x512). The defaults
    follow ADM (Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021). All
    arguments but these three are `UNet2DModel`'s.

    Args:
        attention_head_dim: Channels per head: one integer, or one for each level of
            `block_out_channels`; `None`: a single head. The middle block uses the last level's.
        up_attention_head_dim: The same for the up-sampling half, also in the order of
            `block_out_channels`; `None`: `attention_head_dim`.
        time_proj_dim: Width of the timestep's sinusoid; `None`: `block_out_channels[0]`. The time
            embedding is four times as wide unless `time_embedding_dim` is set.

    Raises:
        ValueError: If a head's channels don't divide its level's, or if `time_proj_dim` is set for
            a time embedding without a sinusoid.
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
        attention_head_dim: HeadDim = 64,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        up_attention_head_dim: HeadDim = None,
        time_proj_dim: int | None = None,
    ):
        names = inspect.signature(UNet2DModel.__init__).parameters.keys() - {"self"}
        settings = {name: self.config[name] for name in names}
        width = time_proj_dim or block_out_channels[0]
        settings["time_embedding_dim"] = time_embedding_dim or 4 * width
        settings["attention_head_dim"] = None  # the number of heads changes no weight's shape
        super().__init__(**settings)
        self.register_to_config(attention_head_dim=attention_head_dim)
        if time_proj_dim is not None:
            kinds = (time_embedding_type, class_embed_type)
            if kinds[0] != "positional" or kinds[1] == "timestep":
                raise ValueError(
                    f"time_proj_dim is {time_proj_dim}, but (time_embedding_type, "
                    f"class_embed_type) is {kinds}; allowed: ('positional', None or 'identity')."
                )
            self.time_proj = Timesteps(time_proj_dim, flip_sin_to_cos, freq_shift)
            self.time_embedding = TimestepEmbedding(time_proj_dim, settings["time_embedding_dim"])
        self._set_heads()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load as in Diffusers; ValueError for weights that aren't the model's."""
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    def _set_heads(self) -> None:
        """Give each attention the number of heads for its level's channels per head."""
        config, widths = self.config, self.config.block_out_channels
        down = up = head_dims(config.attention_head_dim, widths)
        if config.up_attention_head_dim is not None:
            up = head_dims(config.up_attention_head_dim, widths)
        blocks = [*self.down_blocks, *self.up_blocks, self.mid_block]
        for block, head_dim in zip(blocks, [*down, *up[::-1], down[-1]], strict=True):
            modules = [] if block is None else block.modules()
            for attention in (module for module in modules if isinstance(module, Attention)):
                channels = attention.inner_dim
                if head_dim < 1 or channels % head_dim:
                    allowed = f"a divisor of its level's {channels} channels"
                    raise ValueError(f"attention_head_dim has {head_dim}; allowed: {allowed}.")
                attention.heads = attention.sliceable_head_dim = channels // head_dim
                attention.scale = head_dim**-0.5


def head_dims(head_dim: HeadDim, widths: tuple[int, ...]) -> list[int]:
    """`attention_head_dim` of each level; `widths`: the levels' channels."""
    if head_dim is None:
        return list(widths)
    if isinstance(head_dim, int):
        return [head_dim] * len(widths)
    if len(head_dim) != len(widths):
        allowed = f"None, one integer, or {len(widths)} of them"
        raise ValueError(f"attention_head_dim is {head_dim!r}; allowed: {allowed}.")
    return list(head_dim)

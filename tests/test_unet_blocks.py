"""Blocks of the classifier: with dims=2 those of Diffusers, bit for bit; any other `dims` has the
same architecture."""

from collections.abc import Iterator

import pytest
import torch
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import Tensor, nn

from guided_diffusers.bundled import folder
from guided_diffusers.classifier import NoiseAwareClassifier
from guided_diffusers.unet_blocks import DownBlock, MidBlock

SHARED = {"temb_channels": 24, "dropout": 0.0}
THEIRS = {
    **SHARED,
    "resnet_eps": 1e-5,
    "resnet_act_fn": "silu",
    "resnet_groups": 8,
}
OURS = {**SHARED, "groups": 8, "eps": 1e-5, "dims": 2}


def pairs(time: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, Diffusers' block, ours) of every kind."""
    theirs = {**THEIRS, "resnet_time_scale_shift": time}
    ours = {**OURS, "time_scale_shift": time}
    kinds = {"DownBlock2D": "conv", "ResnetDownsampleBlock2D": "resnet"}
    kinds |= {"AttnDownBlock2D conv": "conv", "AttnDownBlock2D resnet": "resnet"}
    for name, kind in kinds.items():
        for down in (True, False):
            torch.manual_seed(0)
            original = get_down_block(
                name.split()[0],
                num_layers=2,
                in_channels=16,
                out_channels=32,
                add_downsample=down,
                downsample_padding=1,
                downsample_type=kind,
                attention_head_dim=8,
                **theirs,
            )
            torch.manual_seed(0)
            block = DownBlock(
                16,
                32,
                num_layers=2,
                head_dim=8 if "Attn" in name else None,
                downsample_type=kind if down else None,
                options=ours,
            )
            yield f"{name} {down}", original, block
    torch.manual_seed(0)
    original = UNetMidBlock2D(16, attention_head_dim=8, attn_groups=8, **theirs)
    torch.manual_seed(0)
    yield "mid", original, MidBlock(16, 8, ours)


def evaluated(block: nn.Module) -> list[Tensor]:
    """Outputs, and gradients in the input, the time embedding and the parameters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 10, 6, generator=generator, requires_grad=True)
    temb = torch.randn(2, 24, generator=generator, requires_grad=True)
    output = block(x, temb)
    hidden, layers = output if isinstance(output, tuple) else (output, ())
    (hidden.square().sum() + sum(out.sin().sum() for out in layers)).backward()
    return [hidden, *layers, x.grad, temb.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("time", ["scale_shift", "default"])
@pytest.mark.parametrize("training", [True, False])
def test_blocks_of_images_are_those_of_diffusers_bit_for_bit(time: str, training: bool) -> None:
    for name, original, block in pairs(time):
        original.train(training), block.train(training)
        theirs, ours = original.state_dict(), block.state_dict()
        assert list(theirs) == list(ours), name
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs), name  # the same seed
        for parameter in original.parameters():
            nn.init.normal_(parameter, std=0.2)
        block.load_state_dict(original.state_dict())
        for a, b in zip(evaluated(original), evaluated(block), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("part", ["classifier", "judge"])
def test_bundled_weights_give_the_logits_that_they_give_in_the_blocks_of_diffusers(
    part: str,
) -> None:
    model = NoiseAwareClassifier.from_pretrained(folder("fashion-mnist"), subfolder=part).eval()
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    t = min(250.5, model.config.num_train_timesteps - 1)
    logits, config = model(x, t).logits, model.config
    widths = config.block_out_channels
    options = {
        "temb_channels": 4 * widths[0],
        "dropout": config.dropout,
        "resnet_eps": config.norm_eps,
        "resnet_act_fn": "silu",
        "resnet_groups": config.norm_num_groups,
        "resnet_time_scale_shift": config.resnet_time_scale_shift,
    }
    head_dim = config.attention_head_dim
    blocks = []
    for level, kind in enumerate(config.down_block_types):
        block = get_down_block(
            kind,
            num_layers=config.layers_per_block,
            in_channels=widths[max(level - 1, 0)],
            out_channels=widths[level],
            add_downsample=level < len(widths) - 1,
            downsample_padding=1,
            downsample_type=config.downsample_type,
            attention_head_dim=head_dim,
            **options,
        )
        blocks.append(block)
    weights = model.state_dict()
    model.down_blocks = nn.ModuleList(blocks)
    groups = config.norm_num_groups
    model.mid_block = UNetMidBlock2D(
        widths[-1], attention_head_dim=head_dim, attn_groups=groups, **options
    )
    model.eval().load_state_dict(weights)
    assert logits.std() > 0.1 and torch.equal(model(x, t).logits, logits)

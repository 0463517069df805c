"""OpenAI's guided-diffusion networks: numbers of the original, exact round trips, the published architectures."""

import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor

from guided_diffusers.classifier import NoiseAwareClassifier
from guided_diffusers.openai import (
    ADMUNet2DModel,
    convert_classifier,
    convert_super_resolution,
    convert_unet,
    export_classifier,
    export_super_resolution,
    export_unet,
    join_low_resolution,
)

REFERENCE = Path(__file__).parent / "data" / "guided-diffusion"
NETWORKS = ("unet_a", "unet_b", "unet_c", "unet_d", "sr")
CLASSIFIERS = ("clf_attention", "clf_adaptive", "clf_spatial", "clf_spatial_v2")
TIMESTEPS = {"t0": [0, 999], "t1": [1, 500], "t2": [731, 250], "float_t": [12.5, 333.25]}
LABELS = torch.tensor([3, 7])

State = dict[str, Tensor]


def pair(kind: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if kind.startswith("clf"):
        return convert_classifier, export_classifier
    return (
        (convert_super_resolution, export_super_resolution)
        if kind == "sr"
        else (convert_unet, export_unet)
    )


def original(name: str) -> tuple[State, dict[str, Any]]:
    """Weights and arguments of a reference network."""
    state: State = {}
    for file in (REFERENCE / "models").glob(f"{name}-?.npz"):
        state |= {key: torch.from_numpy(array) for key, array in np.load(file).items()}
    return state, json.loads((REFERENCE / "models" / f"{name}.json").read_text())


def assert_identical(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype, name


# 1. The numbers of the original


def outputs(
    name: str, model: Any, x: Tensor, t: Tensor, arrays: Mapping[str, Any]
) -> dict[str, Tensor]:
    if name in CLASSIFIERS:
        x = x.requires_grad_()
        logits = model(x, t).logits
        log_p = logits.log_softmax(1)[torch.arange(2), LABELS].sum()
        return {"logits": logits.detach(), "grad": torch.autograd.grad(log_p, x)[0]}
    if name == "sr":
        x = join_low_resolution(x, torch.from_numpy(arrays["low_res"]).to(x))
    with torch.no_grad():
        return {"out": model(x, t, LABELS if model.config.num_class_embeds else None).sample}


@pytest.mark.parametrize("name", NETWORKS + CLASSIFIERS)
def test_outputs_and_input_gradients_are_the_originals(name: str, tmp_path: Path) -> None:
    state, args = original(name)
    pair(name)[0](state, args).save_pretrained(
        tmp_path
    )  # what is saved and loaded must still have it all
    saved = json.loads((tmp_path / "config.json").read_text())["_class_name"]
    model_class = {c.__name__: c for c in (UNet2DModel, ADMUNet2DModel, NoiseAwareClassifier)}[
        saved
    ]
    model = model_class.from_pretrained(tmp_path)
    x_T = torch.from_numpy(np.load(REFERENCE / "inputs.npz")["x_T"])
    arrays, worst = np.load(REFERENCE / "forward" / f"{name}.npz"), {}
    for dtype, suffix, tolerance in ((torch.float32, "", 1e-4), (torch.float64, "_f64", 1e-6)):
        model = model.to(dtype)
        for key in TIMESTEPS.keys() & {array.split("|")[0] for array in arrays}:
            got = outputs(name, model, x_T.to(dtype), torch.tensor(TIMESTEPS[key]), arrays)
            for what in {f"{key}|{what}{suffix}": what for what in got}.items():
                if what[0] in arrays:
                    expected = torch.from_numpy(arrays[what[0]])
                    error = ((got[what[1]] - expected).abs().max() / expected.abs().max()).item()
                    worst[what[1], suffix] = max(worst.get((what[1], suffix), 0.0), error)
                    assert error < tolerance, what
    assert {suffix for _, suffix in worst} == {"", "_f64"}
    print(
        f"\n{name:15} {type(model).__name__:20}",
        {"".join(key): f"{error:.1e}" for key, error in worst.items()},
    )


# 2. Round trips


@pytest.mark.parametrize("name", NETWORKS + CLASSIFIERS)
def test_reference_round_trip(name: str) -> None:
    state, args = original(name)
    convert, export = pair(name)
    there, config = export(convert(state, args))
    assert_identical(there, state)
    again, config_again = export(convert(there, config))
    assert_identical(again, state)
    assert config_again == config


def layers(args: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weights of the original by its module layout, written down independently of the converter."""
    c, mult, depth = args["model_channels"], args["channel_mult"], args["num_res_blocks"]
    resamples = args["resblock_updown"] or args.get("conv_resample", True)

    def residual(name: str, before: int, after: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.in_layers.0", (before,)
        yield f"{name}.in_layers.2", (after, before, 3, 3)
        yield f"{name}.emb_layers.1", (after * (1 + args["use_scale_shift_norm"]), 4 * c)
        yield f"{name}.out_layers.0", (after,)
        yield f"{name}.out_layers.3", (after, after, 3, 3)
        if before != after:
            yield f"{name}.skip_connection", (after, before, 1, 1)

    def attention(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{name}.norm", (width,)), (f"{name}.qkv", (3 * width, width, 1)))
        yield f"{name}.proj_out", (width, width, 1)

    def resampler(name: str, conv: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from (
            residual(name, width, width)
            if args["resblock_updown"]
            else [(f"{name}.{conv}", (width, width, 3, 3))]
        )

    yield from (("time_embed.0", (4 * c, c)), ("time_embed.2", (4 * c, 4 * c)))
    width = int(mult[0] * c)
    in_channels = args["in_channels"] * (2 if args.get("super_resolution") else 1)
    yield "input_blocks.0.0", (width, in_channels, 3, 3)
    skips, factor, index = [width], 1, 1
    for level, m in enumerate(mult):
        for _ in range(depth):
            yield from residual(f"input_blocks.{index}.0", width, int(m * c))
            width = int(m * c)
            if factor in args["attention_resolutions"]:
                yield from attention(f"input_blocks.{index}.1", width)
            skips, index = [*skips, width], index + 1
        if level < len(mult) - 1:
            yield from resampler(f"input_blocks.{index}.0", "op", width) if resamples else ()
            skips, index, factor = [*skips, width], index + 1, 2 * factor
    yield from residual("middle_block.0", width, width)
    yield from attention("middle_block.1", width)
    yield from residual("middle_block.2", width, width)
    out, features = args["out_channels"], sum(skips) + width
    if "pool" in args:
        tokens = (args["image_size"] // factor) ** 2 + 1
        yield from {
            "attention": [("out.0", (width,)), ("out.2.positional_embedding", (width, tokens)),
                          ("out.2.qkv_proj", (3 * width, width, 1)), ("out.2.c_proj", (out, width, 1))],
            "adaptive": [("out.0", (width,)), ("out.3", (out, width, 1, 1))],
            "spatial": [("out.0", (2048, features)), ("out.2", (out, 2048))],
            "spatial_v2": [("out.0", (2048, features)), ("out.1", (2048,)), ("out.3", (out, 2048))],
        }[args["pool"]]  # fmt: skip
        return
    if args.get("num_classes"):
        yield "label_emb", (args["num_classes"], 4 * c)
    index = 0
    for level, m in reversed(list(enumerate(mult))):
        for i in range(depth + 1):
            yield from residual(f"output_blocks.{index}.0", width + skips.pop(), int(m * c))
            width, last = int(m * c), 1
            if factor in args["attention_resolutions"]:
                yield from attention(f"output_blocks.{index}.1", width)
                last = 2
            if level and i == depth:
                yield from (
                    resampler(f"output_blocks.{index}.{last}", "conv", width) if resamples else ()
                )
                factor //= 2
            index += 1
    yield from (("out.0", (width,)), ("out.2", (out, width, 3, 3)))


def original_shapes(args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, shape in layers(args):
        if "positional" in name:
            shapes[name] = shape
            continue
        shapes[f"{name}.weight"] = shape
        if name != "label_emb":
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def random_state(args: Mapping[str, Any]) -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.1 * torch.randn(shape, generator=generator)
        for name, shape in original_shapes(args).items()
    }


@pytest.mark.parametrize("name", ["unet_d", "sr", *CLASSIFIERS])
def test_the_layout_used_below_is_that_of_the_reference(name: str) -> None:
    state, args = original(name)
    assert original_shapes(args | {"super_resolution": name == "sr"}) == {
        k: tuple(v.shape) for k, v in state.items()
    }


UNET = {
    "image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1,
    "attention_resolutions": [1, 2], "dropout": 0.1, "channel_mult": [1, 2, 3], "conv_resample": True,
    "num_classes": None, "num_heads": 1, "num_head_channels": 16, "num_heads_upsample": -1,
    "use_scale_shift_norm": True, "resblock_updown": True, "use_new_attention_order": False,
}  # fmt: skip
CLASSIFIER = {name: value for name, value in UNET.items() if name != "num_classes"} | {
    "pool": "attention"
}
BY_NUMBER = {"num_heads": 4, "num_head_channels": -1}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"resblock_updown": False},
    {"resblock_updown": False, "conv_resample": False},
    {"use_scale_shift_norm": False},
    {"use_new_attention_order": True},
    {"num_classes": 7},
    {"out_channels": 3},
    {"in_channels": 1, "out_channels": 1},
    {"num_res_blocks": 2},
    {"channel_mult": [0.5, 1], "model_channels": 64},
    {"channel_mult": [2]},
    {"attention_resolutions": []},
    {"attention_resolutions": [4, 8]},
    BY_NUMBER,
    BY_NUMBER | {"use_new_attention_order": True},
    BY_NUMBER | {"num_heads_upsample": 2},
]
CLASSIFIER_VARIANTS = [
    {"pool": pool} | change
    for change in VARIANTS[:5]
    for pool in ("attention", "adaptive", "spatial", "spatial_v2")
]
CLASSIFIER_VARIANTS += [
    {"pool": "adaptive"} | BY_NUMBER,
    {"image_size": 32},
    {"channel_mult": [0.5, 1], "model_channels": 64},
]
CASES = [
    *(("unet", UNET | change) for change in VARIANTS),
    *(("sr", UNET | change) for change in VARIANTS[:2]),
    *(("clf", CLASSIFIER | change) for change in CLASSIFIER_VARIANTS),
]


@pytest.mark.parametrize(("kind", "args"), CASES, ids=str)
def test_round_trip_of_every_variant_through_a_saved_model(
    kind: str, args: dict[str, Any], tmp_path: Path
) -> None:
    state = random_state(args | {"super_resolution": kind == "sr"})
    convert, export = pair(kind)
    model = convert(state, args)
    model.save_pretrained(tmp_path)
    there, config = export(type(model).from_pretrained(tmp_path))
    assert_identical(there, state)
    # One setting may have two spellings (heads, unused levels of attention), so compare what they make.
    assert_identical(export(convert(there, config))[0], state)
    spelled = {
        "num_heads",
        "num_head_channels",
        "num_heads_upsample",
        "attention_resolutions",
        "resblock_updown",
    }
    assert {name: config[name] for name in config.keys() - spelled} == {
        name: args[name] for name in config.keys() - spelled
    }


def test_the_files_tensors_are_copied() -> None:
    state = random_state(UNET)
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert (
        convert_unet({name: tensor.half() for name, tensor in state.items()}, UNET).dtype
        == torch.float16
    )
    model = convert_unet(state, UNET)
    assert model.dtype == torch.float32 and not model.training
    exported, _ = export_unet(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_identical(state, before)
    assert_identical(exported, before)


# 3. What UNet2DModel's config lacks


@pytest.mark.parametrize("new_order", [False, True])
def test_a_fixed_number_of_heads_over_several_widths(new_order: bool) -> None:
    """softmax(q k^T / sqrt(d)) v with the rows of qkv as the original lays them out."""
    args = UNET | BY_NUMBER | {"num_heads_upsample": 2, "use_new_attention_order": new_order}
    state = random_state(args)
    model = convert_unet(state, args)
    assert isinstance(model, ADMUNet2DModel)
    places = {"input_blocks.1.1": (model.down_blocks[0], 4), "input_blocks.3.1": (model.down_blocks[1], 4),
              "middle_block.1": (model.mid_block, 4), "output_blocks.2.1": (model.up_blocks[1], 2)}  # fmt: skip
    for name, (block, heads) in places.items():
        attention = block.attentions[0]
        width = state[f"{name}.norm.weight"].numel()
        x = torch.randn(2, width, 3, 3, generator=torch.Generator().manual_seed(1))
        normed = F.group_norm(
            x, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"], 1e-5
        ).flatten(2)
        qkv = state[f"{name}.qkv.weight"][..., 0] @ normed + state[f"{name}.qkv.bias"][:, None]
        if new_order:
            q, k, v = (part.unflatten(1, (heads, -1)) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.unflatten(1, (heads, 3, -1)).unbind(2)
        weights = (q.mT @ k / (width / heads) ** 0.5).softmax(-1)
        out = state[f"{name}.proj_out.weight"][..., 0] @ (v @ weights.mT).flatten(1, 2)
        out = out + state[f"{name}.proj_out.bias"][:, None]
        torch.testing.assert_close(attention(x), x + out.view_as(x), rtol=1e-4, atol=1e-5)


def test_resampling_without_a_convolution_is_exact() -> None:
    args = UNET | {"resblock_updown": False, "conv_resample": False}
    model = convert_unet(random_state(args), args).double()
    x = torch.randn(2, 32, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(model.down_blocks[0].downsamplers[0](x), F.avg_pool2d(x, 2))
    x = torch.randn(2, 64, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(
        model.up_blocks[1].upsamplers[0](x), F.interpolate(x, scale_factor=2.0)
    )


def test_adm_unet_equals_unet2d_where_both_can_say_it() -> None:
    plain = convert_unet(random_state(UNET), UNET).eval()
    assert type(plain) is UNet2DModel
    settings = {name: value for name, value in plain.config.items() if not name.startswith("_")}
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    for change in (
        {},
        {"attention_head_dim": (16, 16, 16), "up_attention_head_dim": 16, "time_proj_dim": 32},
    ):
        model = ADMUNet2DModel(**settings | change).eval()
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model(x, t).sample, plain(x, t).sample)
    for change in ({"attention_head_dim": (32, 64, 96)}, {"up_attention_head_dim": (32, 32, 16)}):
        model = ADMUNet2DModel(**settings | change).eval()
        model.load_state_dict(plain.state_dict())
        assert not torch.allclose(model(x, t).sample, plain(x, t).sample, rtol=1e-3)
    for change, message in (
        (
            {"attention_head_dim": 24},
            "attention_head_dim has 24; allowed: a divisor of its level's 32",
        ),
        ({"attention_head_dim": (16,)}, r"attention_head_dim is \(16,\); allowed: .* 3 of them"),
        (
            {"time_proj_dim": 32, "time_embedding_type": "fourier"},
            r"time_proj_dim is 32, but .*'fourier'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ADMUNet2DModel(**settings | change)


# 4. The published architectures, from their flags

FLAGS = {"learn_sigma": True, "num_res_blocks": 2, "resblock_updown": True, "use_scale_shift_norm": True,
         "attention_resolutions": "32,16,8", "num_head_channels": 64, "class_cond": True}  # fmt: skip
CLASSIFIER_FLAGS = {"classifier_attention_resolutions": "32,16,8", "classifier_depth": 2, "classifier_width": 128,
                    "classifier_pool": "attention", "classifier_resblock_updown": True,
                    "classifier_use_scale_shift_norm": True}  # fmt: skip
HEADS_128 = {"num_heads": 4, "num_head_channels": -1}
MULT = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {  # kind, flags, millions of parameters as in the paper
    "64x64_diffusion": ("unet", FLAGS | {"image_size": 64, "num_channels": 192, "num_res_blocks": 3,
                                         "use_new_attention_order": True, "noise_schedule": "cosine"}, 296),
    "128x128_diffusion": ("unet", FLAGS | HEADS_128 | {"image_size": 128, "num_channels": 256}, 422),
    "256x256_diffusion": ("unet", FLAGS | {"image_size": 256, "num_channels": 256}, 554),
    "256x256_diffusion_uncond": ("unet", FLAGS | {"image_size": 256, "num_channels": 256, "class_cond": False}, 553),
    "lsun_bedroom": ("unet", FLAGS | {"image_size": 256, "num_channels": 256, "class_cond": False,
                                      "dropout": 0.1}, 553),
    "512x512_diffusion": ("unet", FLAGS | {"image_size": 512, "num_channels": 256}, 559),
    "64_256_upsampler": ("sr", FLAGS | HEADS_128 | {"large_size": 256, "small_size": 64, "num_channels": 192}, 312),
    "128_512_upsampler": ("sr", FLAGS | {"large_size": 512, "small_size": 128, "num_channels": 192,
                                         "attention_resolutions": "32,16"}, 309),
    "64x64_classifier": ("clf", CLASSIFIER_FLAGS | {"image_size": 64, "classifier_depth": 4}, 65),
    "128x128_classifier": ("clf", CLASSIFIER_FLAGS | {"image_size": 128}, 43),
    "256x256_classifier": ("clf", CLASSIFIER_FLAGS | {"image_size": 256}, 54),
    "512x512_classifier": ("clf", CLASSIFIER_FLAGS | {"image_size": 512}, 54),
}  # fmt: skip


def published_arguments(kind: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments that the flags stand for."""
    prefix = "classifier_" if kind == "clf" else ""
    size = flags.get("image_size") or flags["large_size"]
    args = {
        "image_size": size,
        "in_channels": 3,
        "model_channels": flags[{"clf": "classifier_width"}.get(kind, "num_channels")],
        "num_res_blocks": flags[{"clf": "classifier_depth"}.get(kind, "num_res_blocks")],
        "attention_resolutions": [
            size // int(r) for r in flags[f"{prefix}attention_resolutions"].split(",")
        ],
        "channel_mult": MULT[256 if kind == "sr" else size],
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "super_resolution": kind == "sr",
    }
    if kind == "clf":
        return args | {"out_channels": 1000, "pool": "attention"}
    return args | {"out_channels": 6, "num_classes": 1000 if flags["class_cond"] else None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_fit_one_to_one(name: str) -> None:
    kind, flags, millions = PUBLISHED[name]
    shapes = original_shapes(published_arguments(kind, flags))
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    convert, export = pair(kind)
    model = convert(state, flags)
    assert round(sum(prod(shape) for shape in shapes.values()) / 1e6) == millions
    assert sum(p.numel() for p in model.parameters()) == sum(
        prod(shape) for shape in shapes.values()
    )
    there, config = export(model)
    assert {key: tuple(tensor.shape) for key, tensor in there.items()} == shapes
    # Out of the same tensors, the constructor's arguments and the flags make one model.
    assert dict(convert(state, config).config) == dict(model.config)
    expected = {
        "128x128_diffusion": ADMUNet2DModel,
        "512x512_diffusion": ADMUNet2DModel,
        "64_256_upsampler": ADMUNet2DModel,
    }
    assert type(model) is expected.get(name, NoiseAwareClassifier if kind == "clf" else UNet2DModel)


def test_a_classifier_carries_its_noise_schedule() -> None:
    state = random_state(CLASSIFIER)
    config = convert_classifier(state, CLASSIFIER).config
    assert (config.beta_schedule, config.num_train_timesteps) == ("linear", 1000)
    assert (config.beta_start, config.beta_end) == (0.0001, 0.02)
    config = convert_classifier(
        state, CLASSIFIER | {"noise_schedule": "cosine", "diffusion_steps": 4000}
    ).config
    assert (config.beta_schedule, config.num_train_timesteps) == ("squaredcos_cap_v2", 4000)
    with pytest.raises(ValueError, match="noise_schedule is 'sqrt'; allowed: 'linear' or 'cosine'"):
        convert_classifier(state, CLASSIFIER | {"noise_schedule": "sqrt"})


# 5. Arguments and tensors that don't fit


def test_what_the_tensors_show_need_not_be_said() -> None:
    needed = {name: UNET[name] for name in ("image_size", "num_head_channels", "dropout")}
    assert dict(convert_unet(random_state(UNET), needed).config) == dict(
        convert_unet(random_state(UNET), UNET).config
    )
    needed = {name: CLASSIFIER[name] for name in ("num_head_channels", "dropout", "num_res_blocks")}
    state = random_state(CLASSIFIER)
    assert dict(convert_classifier(state, needed).config) == dict(
        convert_classifier(state, CLASSIFIER).config
    )


CONTRADICTIONS = [
    ({"model_channels": 64}, "model_channels is 64 in the config but 32 in the tensors"),
    ({"in_channels": 1}, "in_channels is 1 in the config but 3 in the tensors"),
    ({"out_channels": 3}, "out_channels is 3 in the config but 6 in the tensors"),
    ({"learn_sigma": False}, "learn_sigma is False, but another flag sets out_channels to 6"),
    ({"num_res_blocks": 2}, "num_res_blocks is 2 in the config but 1 in the tensors"),
    ({"attention_resolutions": [2]}, r"attention_resolutions is \[2\] in the config but \[1, 2\] in the tensors"),
    ({"attention_resolutions": "8,4"}, r"attention_resolutions is \[2, 4\] in the config but \[1, 2\]"),
    ({"channel_mult": [1, 2]}, r"channel_mult is \[1, 2\] in the config but \[1, 2, 3\] in the tensors"),
    ({"channel_mult": "1,2,4"}, r"channel_mult is \[1.0, 2.0, 4.0\] in the config but \[1, 2, 3\]"),
    ({"channel_mult": ""}, r"channel_mult is empty, which needs an image_size in \(512, 256, 128, 64\); it is 16"),
    ({"channel_mult": "", "image_size": 64}, r"channel_mult is \[1, 2, 3, 4\] in the config but \[1, 2, 3\]"),
    ({"use_scale_shift_norm": False}, "use_scale_shift_norm is False in the config but True in the tensors"),
    ({"resblock_updown": False}, "resblock_updown is False in the config but True in the tensors"),
    ({"num_classes": 5}, "num_classes is 5 in the config but None in the tensors"),
    ({"class_cond": True}, "class_cond is True in the config but num_classes is None in the tensors"),
    ({"pool": "attention"}, "pool is 'attention' in the config but None in the tensors"),
    ({"num_head_channels": 24}, "num_head_channels is 24; allowed: a divisor of the 32 channels of level 0"),
    ({"num_head_channels": -1, "num_heads": 5}, "num_heads is 5; allowed: a divisor of the 32 channels of level 0"),
    ({"num_channels": 64}, "num_channels is 64, but another flag sets model_channels to 32"),
    ({"dims": 3}, "dims is 3; allowed: 2"),
    ({"chanel_mult": "1,2"}, r"\['chanel_mult'\] are no arguments"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"), CONTRADICTIONS, ids=[str(change) for change, _ in CONTRADICTIONS]
)
def test_contradictions_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_unet(random_state(UNET), UNET | change)


def test_classifier_contradictions_are_named() -> None:
    state = random_state(CLASSIFIER)
    without = {
        name: value
        for name, value in CLASSIFIER.items()
        if name not in ("num_res_blocks", "image_size")
    }
    for config, message in (
        (CLASSIFIER | {"image_size": 32}, "image_size is 32 in the config but 16 in the tensors"),
        (
            CLASSIFIER | {"pool": "adaptive"},
            "pool is 'adaptive' in the config but 'attention' in the tensors",
        ),
        (CLASSIFIER | {"out_channels": 5}, "out_channels is 5 in the config but 6 in the tensors"),
        (
            CLASSIFIER | {"num_res_blocks": 3},
            "num_res_blocks is 3, but the tensors have 6 input blocks",
        ),
        (
            CLASSIFIER | {"num_res_blocks": 2},
            r"attention_resolutions is \[1, 2\] in the config but \[1\]",
        ),
        (
            CLASSIFIER | {"class_cond": True},
            "class_cond is True in the config but num_classes is None",
        ),
        (
            CLASSIFIER | {"num_head_channels": -1},
            "num_head_channels is -1 or missing; pool='attention' needs",
        ),
        (without, "num_res_blocks can't be read off a classifier's tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_classifier(state, config)


def test_settings_that_nobody_knows_are_asked_for() -> None:
    state = random_state(UNET)
    with pytest.raises(ValueError, match="image_size can't be read off these tensors; give it"):
        convert_unet(state, {"num_heads": 1})
    with pytest.raises(ValueError, match="give num_heads or num_head_channels"):
        convert_unet(state, {"image_size": 16})
    with pytest.raises(ValueError, match="attention_resolutions is '8', which needs image_size"):
        convert_unet(state, {"num_heads": 1, "attention_resolutions": "8"})


def test_the_wrong_kind_or_half_a_file_is_refused() -> None:
    unet, classifier = random_state(UNET), random_state(CLASSIFIER)
    with pytest.raises(ValueError, match="tensors of a UNet .*use convert_unet"):
        convert_classifier(unet, UNET)
    with pytest.raises(ValueError, match="tensors of a classifier .*use convert_classifier"):
        convert_unet(classifier, CLASSIFIER)
    with pytest.raises(
        ValueError, match="in_channels is 3 in the tensors; an up-sampler's is even"
    ):
        convert_super_resolution(unet, UNET)
    with pytest.raises(ValueError, match="in_channels is 3 in the config but 6 in the tensors"):
        convert_unet(random_state(UNET | {"super_resolution": True}), UNET)
    with pytest.raises(ValueError, match="The tensors lack 'time_embed.0.weight'"):
        convert_unet({name: t for name, t in unet.items() if "time_embed" not in name}, UNET)
    with pytest.raises(
        ValueError, match=r"1 missing \['middle_block.1.norm.bias'\], 1 superfluous \['extra'\]"
    ):
        convert_unet({name: t for name, t in (unet | {"extra": unet["out.2.bias"]}).items() if "1.norm.bias" not in name
                      or "middle" not in name}, UNET)  # fmt: skip
    with pytest.raises(
        ValueError, match=r"out.0.bias has shape \(7,\); the arguments .* need \(32,\)"
    ):
        convert_unet(unet | {"out.0.bias": torch.zeros(7)}, UNET)
    with pytest.raises(ValueError, match=r"The tensors lack \['input_blocks.4'\]"):
        convert_unet({name: t for name, t in unet.items() if "input_blocks.4" not in name}, UNET)
    with pytest.raises(ValueError, match="The tensors lack 'time_embed.0.weight'"):
        convert_unet({}, UNET)


def test_what_the_original_has_no_word_for_is_refused() -> None:
    settings = {
        name: value
        for name, value in convert_unet(random_state(UNET), UNET).config.items()
        if name[0] != "_"
    }
    for change, message in (
        ({"act_fn": "mish"}, "act_fn is 'mish'; guided-diffusion allows 'silu'"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06; guided-diffusion allows 1e-05"),
        ({"freq_shift": 1}, "freq_shift is 1; guided-diffusion allows 0"),
        ({"upsample_type": "conv"}, "upsample_type is 'conv'; guided-diffusion allows 'resnet'"),
        (
            {"sample_size": (16, 8)},
            r"sample_size is \(16, 8\); guided-diffusion allows an integer",
        ),
        ({"time_embedding_dim": 64}, "time_embedding_dim is 64; guided-diffusion allows 128"),
    ):
        with pytest.raises(ValueError, match=message):
            export_unet(UNet2DModel(**settings | change))
    model = ADMUNet2DModel(**settings | {"attention_head_dim": (16, 32, 16)})
    with pytest.raises(
        ValueError, match="attention_head_dim is .*one width, or one number of heads"
    ):
        export_unet(model)
    with pytest.raises(ValueError, match="in_channels is 3; allowed: an even number"):
        export_super_resolution(UNet2DModel(**settings))


def test_a_unet_made_in_diffusers_can_be_exported() -> None:
    model = UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, attention_head_dim=16,
    ).eval()  # fmt: skip
    state, config = export_unet(model)
    again = convert_unet(state, config)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(x, 3).sample, model(x, 3).sample)

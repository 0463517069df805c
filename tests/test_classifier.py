"""NoiseAwareClassifier: its interface, its config and what it refuses. Its numbers: test_openai_networks.py."""

import ast
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guided_diffusers import ClassifierGuidance, StepContext
from guided_diffusers.classifier import NoiseAwareClassifier
from guided_diffusers.noise import NoiseLevel, TrainedSchedule, schedule_config, x0_coefficients
from guided_diffusers.standalone import self_contained

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
SMALL = {
    "sample_size": 16,
    "num_labels": 3,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 32,
}
PLAIN = {"downsample_type": "conv", "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
LABELS = {0: "cat", 1: "dog", 2: "owl"}


def small(**changes: Any) -> NoiseAwareClassifier:
    """A small classifier whose every weight is random, so that every layer matters."""
    model = NoiseAwareClassifier(**SMALL | changes).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 16, 16)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_a_fresh_classifier_is_uniform_and_only_its_last_layer_is_zero(
    pool: str, size: tuple[int, int]
) -> None:
    model = NoiseAwareClassifier(**SMALL | {"pool": pool, "sample_size": size})
    output = model(images(2, 3, *size), 5)
    assert output.logits.shape == (2, 3) and not output.logits.any()
    zero = [name for name, p in model.named_parameters() if name.endswith("weight") and not p.any()]
    assert len(zero) == 1 and zero[0].startswith("head")


def test_defaults_are_a_classifier_of_64x64_rgb_images() -> None:
    model = NoiseAwareClassifier()
    assert 8e6 < sum(p.numel() for p in model.parameters()) < 15e6
    assert model(images(1, 3, 64, 64), 0).logits.shape == (1, 1000)


@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_heads_without_position_take_any_size(pool: str) -> None:
    assert small(pool=pool)(images(1, 3, 20, 13), 3).logits.shape == (1, 3)


@pytest.mark.parametrize(
    "timestep", [-1, 1000, 1000.0, float("nan"), [0, 1000], [-0.5, 3.0], [float("nan"), 0.0]]
)
def test_timesteps_beyond_the_schedule_are_refused(timestep: Any) -> None:
    model = small()
    sample = torch.zeros(2, 3, 16, 16)
    for value in (timestep, torch.tensor(timestep)):
        if torch.is_tensor(value) or not isinstance(value, list):
            with pytest.raises(ValueError, match="^timestep is .*; allowed: .*0 to 999"):
                model(sample, value)
    for value in (0, 999, 998.5, torch.tensor([0, 999]), torch.tensor(0.5)):
        assert model(sample, value).logits.isfinite().all()


def test_an_empty_batch_and_another_dtype_than_the_weights_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"sample.shape is \(0, 3, 16, 16\); .*B of at least 1"):
        model(torch.zeros(0, 3, 16, 16), 5)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        sample = torch.zeros(2, 3, 16, 16, dtype=dtype)
        with pytest.raises(ValueError, match=f"sample.dtype is {dtype}; .*float32, that of the we"):
            model(sample, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(2, 3, 16, 16, dtype=torch.bfloat16), 5).logits.isfinite().all()


def test_timesteps_broadcast_and_may_be_fractional() -> None:
    model, x = small(), images()
    logits = model(x, 12).logits
    for same in (
        12.0,
        torch.tensor(12),
        torch.tensor([12.0]),
        torch.tensor([12, 12]),
        torch.tensor(12, dtype=torch.float64),
    ):
        assert torch.equal(model(x, same).logits, logits)
    assert torch.equal(model(x, 12, return_dict=False)[0], logits)
    # Smooth in t: the middle of a small step is close to the mean of its ends, and closer than they are to one another.
    low, mid, high = (model(x, t).logits for t in (600.0, 600.5, 601.0))
    assert (mid - (low + high) / 2).abs().max() < 0.2 * (high - low).abs().max()
    both = model(x, torch.tensor([12.5, 700.25])).logits
    torch.testing.assert_close(both[:1], model(x[:1], 12.5).logits)
    torch.testing.assert_close(both[1:], model(x[1:], 700.25).logits)


@pytest.mark.parametrize("pool", POOLS)
def test_the_input_gradient_is_the_slope(pool: str) -> None:
    model, x = small(pool=pool).double(), images().double().requires_grad_()
    direction = images(2, 3, 16, 16).double().flip(3)

    def log_p(x: Tensor) -> Tensor:
        return model(x, torch.tensor([3.5, 800.0])).logits.log_softmax(1)[:, 1].sum()

    (gradient,) = torch.autograd.grad(log_p(x), x)
    with torch.no_grad():
        slope = (log_p(x + 1e-5 * direction) - log_p(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("plain", [{}, PLAIN], ids=["resnet", "conv"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_guidance_of_any_dimension_is_the_slope(dims: int, plain: dict, pool: str) -> None:
    """scale * grad log p(y | x_t) of `ClassifierGuidance` against finite differences."""
    size = SIZES[dims]
    model = small(dims=dims, sample_size=size, pool=pool, **plain).double()
    x, direction = (
        images(2, 3, *size).double(),
        images(2, 3, *size[::-1]).double().reshape(2, 3, *size),
    )
    level = NoiseLevel(0.6, 0.8, *x0_coefficients("epsilon", 0.6, 0.8))
    step = StepContext(x, x, lambda x: x, level, 0, 1, 0.0)
    score = ClassifierGuidance(model, [1, 2], scale=2.0).score(step)
    t = TrainedSchedule(schedule_config(model), pure_noise=False).timestep(level)

    def log_p(x: Tensor) -> Tensor:
        return model(x, t).logits.log_softmax(1)[[0, 1], [1, 2]].sum()

    with torch.no_grad():
        slope = (log_p(x + 1e-5 * direction) - log_p(x - 1e-5 * direction)) / 2e-5
    assert score.shape == x.shape
    torch.testing.assert_close((score * direction).sum(), 2 * slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes_are_classified_saved_and_loaded(dims: int, tmp_path: Path) -> None:
    size = SIZES[dims]
    model, x = small(dims=dims, sample_size=size), images(2, 3, *size)
    logits = model(x, 40).logits
    assert logits.shape == (2, 3)
    model.save_pretrained(tmp_path)
    loaded = NoiseAwareClassifier.from_pretrained(tmp_path)
    assert loaded.config.dims == dims and torch.equal(loaded(x, 40).logits, logits)
    free = small(dims=dims, sample_size=8, pool="adaptive")
    assert free.size == (8,) * dims and free(x, 40).logits.shape == (2, 3)


def test_a_constant_axis_changes_nothing_of_an_average() -> None:
    """A 3-D classifier whose kernels act in the first plane only is the 2-D one on its planes."""
    plane, volume = (
        small(dims=dims, pool="adaptive", sample_size=8, dropout=0.0).double() for dims in (2, 3)
    )
    weights = plane.state_dict()
    for name, weight in volume.state_dict().items():
        if weight.ndim == 5:
            weight.zero_()
            weight[..., weight.shape[-1] // 2] = weights[name]
        else:
            weight.copy_(weights[name])
    x = images(2, 3, 8, 8).double()
    repeated = x[..., None].expand(-1, -1, -1, -1, 4)
    torch.testing.assert_close(volume(repeated, 40).logits, plane(x, 40).logits)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(pool: str, dtype: torch.dtype) -> None:
    model = small(pool=pool)
    expected = model(images(), 250.5).logits
    got = model.to(dtype)(images().to(dtype), 250.5).logits
    assert got.dtype == dtype
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < {torch.float64: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]


@pytest.mark.parametrize("pool", POOLS)
def test_saved_and_loaded_is_the_same_bit_for_bit(pool: str, tmp_path: Path) -> None:
    model = small(
        pool=pool,
        id2label=LABELS,
        attention_head_dim=(16, 32),
        num_train_timesteps=2,
        trained_betas=[0.1, 0.2],
    )
    model.save_pretrained(tmp_path)
    loaded = NoiseAwareClassifier.from_pretrained(tmp_path)
    assert torch.equal(loaded(images(), 1.5).logits, model(images(), 1.5).logits)
    assert loaded.config.id2label == LABELS and loaded.config.label2id == {
        "cat": 0,
        "dog": 1,
        "owl": 2,
    }
    public = {name for name in model.config if not name.startswith("_")}
    plain = [
        json.loads(json.dumps({name: m.config[name] for name in public})) for m in (model, loaded)
    ]
    assert plain[0] == plain[1]
    assert NoiseAwareClassifier.from_config(loaded.config).config.id2label == LABELS


@pytest.mark.parametrize("changes", [{}, PLAIN, {"dims": 1}])
def test_gradient_checkpointing_changes_no_gradient(changes: dict[str, Any]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small(**changes).train()
        x = images(2, 3, *[16] * model.config.dims).requires_grad_()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(x, 40).logits.log_softmax(1)[:, 0].sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for without, with_it in zip(*gradients, strict=True):
        torch.testing.assert_close(with_it, without)


EFFECTS: list[dict[str, Any]] = [
    {"in_channels": 1},
    {"num_labels": 5},
    {"block_out_channels": (32, 96)},
    {"down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D")},
    {"layers_per_block": 2},
    PLAIN,
    {"resnet_time_scale_shift": "default"},
    {"attention_head_dim": 16},
    {"attention_head_dim": (32, 16)},
    {"attention_head_dim": None},
    {"norm_num_groups": 16},
    {"norm_eps": 1e-3},
    {"time_proj_dim": 64},
    {"patch_size": 2},
    *({"pool": pool} for pool in POOLS[1:]),
]
SIZES = {1: (24,), 2: (16, 12), 3: (8, 4, 6)}  # sample sizes by `dims`


@pytest.mark.parametrize("changes", EFFECTS, ids=str)
def test_every_argument_has_an_effect(changes: dict[str, Any]) -> None:
    expected, model = small()(images(), 40).logits, small(**changes)
    got = model(images(2, model.config.in_channels, 16, 16), 40).logits
    assert got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize("size", [16, 15])
def test_patches_divide_the_size_rounded_up(size: int) -> None:
    """At patch size 1 the kernel is the published one, 3 x 3 at stride 1."""
    for patch, places in ((1, size), (2, 8), (4, 4)):
        model = small(patch_size=patch, pool="adaptive", sample_size=size)
        assert model.conv_in(images(1, 3, size, size)).shape[2:] == (places, places)
        assert model.conv_in.kernel_size == (2 * patch + 1,) * 2
        assert model(images(1, 3, size, size), 40).logits.shape == (1, 3)


def test_downsample_type_rules_the_blocks_with_attention() -> None:
    names = {}
    for kind in ("conv", "resnet"):
        model = NoiseAwareClassifier(
            **SMALL | {"down_block_types": ("AttnDownBlock2D",) * 2, "downsample_type": kind}
        )
        names[kind] = {name for name in model.state_dict() if "downsamplers" in name}
    assert "down_blocks.0.downsamplers.0.conv.weight" in names["conv"]
    assert "down_blocks.0.downsamplers.0.norm1.weight" in names["resnet"]


def test_dropout_acts_in_training_only() -> None:
    model = small(dropout=0.5)
    assert torch.equal(model(images(), 40).logits, small()(images(), 40).logits)
    assert not torch.equal(model.train()(images(), 40).logits, small()(images(), 40).logits)


SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")


def test_the_noise_schedule_is_ddpm_schedulers() -> None:
    from diffusers import DDPMScheduler

    ours, theirs = NoiseAwareClassifier(**SMALL).config, DDPMScheduler().config
    assert {name: ours[name] for name in SCHEDULE} == {name: theirs[name] for name in SCHEDULE}
    changed = {
        "num_train_timesteps": 10,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.01,
        "beta_end": 0.3,
    }
    assert changed.items() <= dict(NoiseAwareClassifier(**SMALL, **changed).config).items()


def test_labels_are_derived_and_normalised() -> None:
    for labels in (
        {"id2label": {"2": "owl", "0": "cat", "1": "dog"}},
        {"label2id": {"owl": 2, "cat": 0, "dog": 1}},
    ):
        config = NoiseAwareClassifier(**SMALL, **labels).config
        assert list(config.id2label.items()) == list(LABELS.items())
        assert config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    config = NoiseAwareClassifier(**SMALL).config
    assert config.id2label is None and config.label2id is None
    # ImageNet has such: the name says neither of the two.
    config = NoiseAwareClassifier(**SMALL, id2label={0: "crane", 1: "dog", 2: "crane"}).config
    assert config.label2id == {"dog": 1}
    both = {"id2label": {0: "crane", 1: "dog", 2: "crane"}, "label2id": {"dog": 1, "crane": 2}}
    assert NoiseAwareClassifier(**SMALL, **both).config.label2id == {"dog": 1, "crane": 2}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sample_size": 15}, r"sample_size is 15; allowed: .*multiples of 2"),
    ({"sample_size": (16, 16, 16)}, r"sample_size is \(16, 16, 16\).*one or two integers.*dims=2"),
    (
        {"sample_size": (16, 16), "dims": 1},
        r"sample_size is \(16, 16\); allowed: an integer .*dims=1",
    ),
    ({"dims": 4}, "dims is 4; allowed: 1, 2 or 3"),
    ({"dims": 2.0}, "dims is 2.0; allowed: 1, 2 or 3"),
    ({"sample_size": 0, "pool": "adaptive"}, "sample_size is 0"),
    ({"patch_size": 0}, "patch_size is 0; allowed: a positive integer"),
    ({"patch_size": 3}, "sample_size is 16; allowed: positive multiples of 6"),
    ({"patch_size": 16, "pool": "adaptive"}, "sample_size is 16; allowed: .* at least 17"),
    ({"in_channels": 0}, "in_channels is 0; allowed: a positive integer"),
    ({"num_labels": 0}, "num_labels is 0; allowed: a positive integer"),
    ({"layers_per_block": 0}, "layers_per_block is 0; allowed: a positive integer"),
    ({"block_out_channels": ()}, r"block_out_channels is \(\)"),
    ({"block_out_channels": (32, 64, 64)}, "down_block_types is .*; allowed: 3 of"),
    (
        {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")},
        "down_block_types is .*ResnetDownsampleBlock2D.*resnet",
    ),
    (
        PLAIN | {"down_block_types": SMALL["down_block_types"]},
        "down_block_types is .*allowed: .*'DownBlock2D'.*conv",
    ),
    (
        {"down_block_types": ("KDownBlock2D", "AttnDownBlock2D")},
        "down_block_types is .*KDownBlock2D",
    ),
    (
        {"downsample_type": "pool"},
        r"downsample_type is 'pool'; allowed: one of \('conv', 'resnet'\)",
    ),
    (
        {"resnet_time_scale_shift": "spatial"},
        "resnet_time_scale_shift is 'spatial'; allowed: .*scale_shift",
    ),
    ({"attention_head_dim": 24}, r"attention_head_dim is 24; allowed: a divisor of .*\[64\]"),
    ({"attention_head_dim": (32,)}, r"attention_head_dim is \(32,\)"),
    ({"norm_num_groups": 48}, r"norm_num_groups is 48; allowed: .*\(32, 64\)"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0; allowed: a positive number"),
    ({"dropout": 1.0}, "dropout is 1.0; allowed: 0"),
    ({"time_proj_dim": 33}, "time_proj_dim is 33; allowed: None or a positive even number"),
    ({"pool": "mean"}, "pool is 'mean'; allowed: one of .*spatial_v2"),
    (
        {"id2label": {0: "cat", 1: "dog"}},
        r"ids of id2label or label2id is \[0, 1\]; allowed: .* 0 to 2",
    ),
    ({"label2id": {"cat": 0, "dog": 0, "owl": 2}}, "label2id is .*; allowed: one name an id"),
    (
        {"id2label": LABELS, "label2id": {"cat": 1, "dog": 0, "owl": 2}},
        "label2id is .*; allowed: the inverse",
    ),
    (
        {"id2label": LABELS, "label2id": {"cat": 0, "dog": 1}},
        "label2id is .*; allowed: the inverse",
    ),
    ({"num_train_timesteps": 0}, "num_train_timesteps is 0; allowed: a positive integer"),
    ({"beta_schedule": "cosine"}, "beta_schedule is 'cosine'; allowed: .*squaredcos_cap_v2"),
    ({"beta_start": 0.5}, r"\(beta_start, beta_end\) is \(0.5, 0.02\)"),
    (
        {"trained_betas": [0.1]},
        r"trained_betas is \[0.1\]; allowed: None or num_train_timesteps = 1000 values",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED]
)
def test_wrong_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseAwareClassifier(**SMALL | changes)


def test_wrong_inputs_are_refused_by_name() -> None:
    model = small()
    for x in (images(2, 1, 16, 16), images(3, 16, 16)):
        with pytest.raises(ValueError, match=r"sample.shape is .*; allowed: \(B, 3, H, W\)"):
            model(x, 3)
    with pytest.raises(
        ValueError, match=r"sample.shape is .*; allowed: \(B, C, 16, 16\) with pool='attention'"
    ):
        model(images(2, 3, 32, 32), 3)
    for t in (torch.zeros(3), torch.zeros(2, 1)):
        with pytest.raises(
            ValueError, match=r"timestep.shape is .*; allowed: \(\) or \(B,\) = \(2,\)"
        ):
            model(images(), t)


def test_forward_reads_no_value_back_from_the_device() -> None:
    model = small().to("meta")  # reading a value there is an error
    assert (
        model(images().to("meta"), torch.tensor([3.5, 7.0], device="meta")).logits.device.type
        == "meta"
    )
    assert model(images().to("meta"), 3.5).logits.device.type == "meta"


def test_forward_compiles_to_one_graph() -> None:
    model, t = small(), torch.tensor([3.5, 7.0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(), t).logits, model(images(), t).logits)


def test_the_file_works_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "noise_aware_classifier.py"
    path.write_text(self_contained(NoiseAwareClassifier))
    imported = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    allowed = {"torch", "diffusers", "huggingface_hub", "safetensors"}  # of which Diffusers needs
    assert imported - set(sys.stdlib_module_names) == allowed

    spec = importlib.util.spec_from_file_location("noise_aware_classifier", path)
    assert spec and spec.loader
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, alone)
    spec.loader.exec_module(alone)
    copy = alone.NoiseAwareClassifier(**SMALL).eval()
    copy.load_state_dict(small().state_dict())
    assert torch.equal(copy(images(), 3).logits, small()(images(), 3).logits)
    assert math.prod(copy.head[2].positional_embedding.shape) == 65 * 64

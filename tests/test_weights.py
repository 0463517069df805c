"""Weights that aren't the model's, components that can't be saved, and what a save leaves behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors.torch import load_file, save_file
from test_clip import make_clip
from test_hub import BLOCKS, WEIGHTS, contents, make_classifier, make_pipeline
from torch import Tensor, nn

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP
from guided_diffusers.diagnosis import diagnose
from guided_diffusers.evaluation.networks import load_network
from guided_diffusers.hub import prepare
from guided_diffusers.hub.card_metrics import stale_metrics
from guided_diffusers.hub.verification import check, check_published_weights
from guided_diffusers.learning.latents import load_vae
from guided_diffusers.learning.warm_start import load_initial_model
from guided_diffusers.openai import ADMUNet2DModel
from guided_diffusers.sampling import weights_hash
from guided_diffusers.standalone import self_contained
from guided_diffusers.utils import weights_digest
from guided_diffusers.weights import check_weights, weight_files

Weights = dict[str, Tensor]


def first(weights: Weights) -> str:
    return next(iter(weights))


#: {name: (edit of the weights, words of the message)}
EDITS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "lacks one": (
        lambda w: {k: w[k] for k in w if k != "conv_in.bias"},
        r"1 missing \(conv_in.bias\)",
    ),
    "has another": (lambda w: w | {"zz.weight": torch.zeros(3)}, r"1 unknown \(zz.weight\)"),
    "another shape": (
        lambda w: w | {"conv_in.bias": torch.zeros(9)},
        r"conv_in.bias \(9,\) instead of \(8,\)",
    ),
    "integers": (lambda w: {k: v.long() for k, v in w.items()}, r"\d\d no floating-point numbers"),
    "bools": (lambda w: w | {"conv_in.bias": w["conv_in.bias"] > 0}, r"1 no .*\(conv_in.bias\)"),
    "nothing": (lambda w: {}, r"\d\d missing"),
    "a wrapper's names": (
        lambda w: {f"module.{k}": v for k, v in w.items()},
        r"\d\d missing .*\d\d unknown \(module",
    ),
}


def edit(path: Path, change: Callable[[Weights], Weights]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    make_pipeline().save_pretrained(root / "plain")
    make_pipeline(adm=True).save_pretrained(root / "adm")
    return root


@pytest.fixture
def plain(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "plain", tmp_path / "plain"))


@pytest.fixture
def adm(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "adm", tmp_path / "adm"))


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("part", ["classifier", "unet"])
def test_other_weights_are_refused_by_file_and_name(plain: Path, part: str, kind: str) -> None:
    change, words = EDITS[kind]
    edit(plain / part / WEIGHTS, change)
    with pytest.raises(ValueError, match=f"{part}/{WEIGHTS}: not the weights of .*{words}"):
        ClassifierGuidedPipeline.from_pretrained(plain)
    with pytest.raises(
        ValueError, match="conv_in|zz.weight|weights"
    ):  # without our from_pretrained
        DiffusionPipeline.from_pretrained(plain)
    with pytest.raises(ValueError, match=words):
        load_initial_model(str(plain / part))
    if part == "classifier":
        with pytest.raises(ValueError, match=f"{WEIGHTS}: .*{words}"):
            NoiseAwareClassifier.from_pretrained(plain / part)
        with pytest.raises(ValueError, match=f"{WEIGHTS}: .*{words}"):
            NoiseAwareClassifier.from_pretrained(plain, subfolder=part, low_cpu_mem_usage=False)


@pytest.mark.parametrize("kind", EDITS)
def test_the_code_beside_the_weights_refuses_them_too(
    plain: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = EDITS[kind]
    edit(plain / "classifier" / WEIGHTS, change)
    file = plain / "classifier" / "guided_diffusers_classifier.py"
    assert file.read_text() == self_contained(NoiseAwareClassifier)
    spec = importlib.util.spec_from_file_location("classifier_alone", file)
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, alone)
    spec.loader.exec_module(alone)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: .*{words}"):
        alone.NoiseAwareClassifier.from_pretrained(plain / "classifier")


def test_other_weights_of_a_clip_and_of_an_adm_network(adm: Path, tmp_path: Path) -> None:
    make_clip().save_pretrained(tmp_path / "clip")
    edit(tmp_path / "clip" / WEIGHTS, lambda w: {k: w[k] for k in w if k != "logit_scale"})
    with pytest.raises(ValueError, match=rf"clip/{WEIGHTS}: .*1 missing \(logit_scale\)"):
        NoiseAwareCLIP.from_pretrained(tmp_path / "clip")
    edit(adm / "unet" / WEIGHTS, EDITS["lacks one"][0])
    with pytest.raises(ValueError, match=r"1 missing \(conv_in.bias\)"):
        ADMUNet2DModel.from_pretrained(adm / "unet")


def test_an_index_that_promises_more_than_the_shards_hold(tmp_path: Path) -> None:
    """Diffusers believes the index, and would take what the memory held."""
    make_classifier().save_pretrained(tmp_path, max_shard_size=20_000)
    shard = sorted(tmp_path.glob("*-of-*.safetensors"))[0]
    lost = first(load_file(shard))
    edit(shard, lambda w: {k: w[k] for k in w if k != lost})
    with pytest.raises(ValueError, match=rf"00001-of-.* more: .*1 missing \({lost}\)"):
        NoiseAwareClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000]
)
def test_a_broken_index_is_named(plain: Path, text: str) -> None:
    index = plain / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(text)
    with pytest.raises(OSError, match=f"{index.name} is no index of weights, or is broken"):
        ClassifierGuidedPipeline.from_pretrained(plain)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 7, b"version https://git-lfs.github.com/spec/v1"]
)
@pytest.mark.parametrize("part", ["classifier", "unet"])
def test_a_broken_file_of_weights_is_named(plain: Path, part: str, content: bytes) -> None:
    (plain / part / WEIGHTS).write_bytes(content)
    message = f"{part}/{WEIGHTS} is missing, or no safetensors file"
    with pytest.raises(OSError, match=message):
        ClassifierGuidedPipeline.from_pretrained(plain)
    if part == "classifier":
        with pytest.raises(OSError, match=message):
            NoiseAwareClassifier.from_pretrained(plain / part)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (WEIGHTS.replace(".safe", ".fp16.safe"), "it has those of the variant fp16"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin is a pickle"),
        ("notes.txt", f"{WEIGHTS} is needed$"),
    ],
)
def test_weights_under_another_name_are_told(plain: Path, name: str, words: str) -> None:
    (plain / "unet" / WEIGHTS).rename(plain / "unet" / name)
    with pytest.raises(OSError, match=f"unet has no weights: {WEIGHTS} is needed.*{words}|{words}"):
        ClassifierGuidedPipeline.from_pretrained(plain)


@pytest.mark.parametrize(
    ("file", "entry", "value"),
    [
        ("unet/config.json", "down_block_types", ["NoBlock"]),
        ("unet/config.json", "norm_num_groups", 3),
        ("unet/config.json", "act_fn", "nope"),
        ("unet/config.json", "block_out_channels", [-8]),
        ("classifier/config.json", "dropout", "much"),
        ("classifier/config.json", "id2label", ["a"]),
        ("scheduler/scheduler_config.json", "trained_betas", ["a"]),
        ("scheduler/scheduler_config.json", "beta_schedule", "nope"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
    ],
)
def test_a_config_that_its_class_refuses_is_named(
    plain: Path, file: str, entry: str, value: Any
) -> None:
    config = json.loads((plain / file).read_text())
    (plain / file).write_text(json.dumps(config | {entry: value}))
    with pytest.raises(ValueError, match=f"{plain / file}( is no config of a|: {entry})"):
        ClassifierGuidedPipeline.from_pretrained(plain)


def test_a_component_that_is_needed_is_null(plain: Path) -> None:
    index = json.loads((plain / "model_index.json").read_text())
    (plain / "model_index.json").write_text(json.dumps(index | {"unet": [None, None]}))
    with pytest.raises(ValueError, match="model_index.json: unet is null or missing"):
        ClassifierGuidedPipeline.from_pretrained(plain)


def test_a_network_without_values_is_refused(plain: Path) -> None:
    """If it was loaded; a network made without values, such as to count its weights, isn't."""
    edit(plain / "unet" / WEIGHTS, EDITS["nothing"][0])
    unet = UNet2DModel.from_pretrained(plain / "unet")
    with pytest.raises(ValueError, match="unet: .* UNet2DModel from .*/unet have no values"):
        ClassifierGuidedPipeline(unet, DDIMScheduler())
    with torch.device("meta"):
        unet = UNet2DModel(8, 1, 1, **BLOCKS)
    ClassifierGuidedPipeline(unet, DDIMScheduler())


@pytest.mark.parametrize("removed", [None, nn.Identity()], ids=["None", "Identity"])
def test_a_network_may_have_lost_a_layer_since_it_was_loaded(plain: Path, removed: Any) -> None:
    """But not if the file has weights that the config's network hasn't."""
    unet = UNet2DModel.from_pretrained(plain / "unet")
    unet.mid_block = removed
    pipeline = ClassifierGuidedPipeline(unet, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    if removed is None:
        image = pipeline(0, num_inference_steps=2, output_type="latent").images
        assert image.isfinite().all()
    with pytest.raises(ValueError, match=r"unet can't be saved: .*missing \(mid_block"):
        pipeline.save_pretrained(plain / "saved")
    edit(plain / "unet" / WEIGHTS, EDITS["has another"][0])
    unet = UNet2DModel.from_pretrained(plain / "unet")
    unet.mid_block = removed
    with pytest.raises(ValueError, match=r"1 unknown \(zz.weight\)"):
        ClassifierGuidedPipeline(unet, DDIMScheduler())


@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("DDIMScheduler", "beta_schedule", "nope"),
        ("DPMSolverSinglestepScheduler", "solver_order", 0),
        ("DEISMultistepScheduler", "algorithm_type", "foo"),
    ],
)
def test_an_entry_that_a_scheduler_refuses_is_named(
    plain: Path, name: str, entry: str, value: Any
) -> None:
    config = plain / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": name, entry: value}))
    index = json.loads((plain / "model_index.json").read_text()) | {
        "scheduler": ["diffusers", name]
    }
    (plain / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{config} is no config of a {name}: {entry}={value!r}"):
        ClassifierGuidedPipeline.from_pretrained(plain)


class Registered(UNet2DModel):
    """A network with entries in its config that don't size it, and one that does."""

    @register_to_config
    def __init__(
        self,
        seed: int = 20261130,
        mlp_layers: tuple[int, ...] = (2048, 2048),
        num_layers: int = 1,
        dataset_size: int = 10,
    ):
        super().__init__(8, 1, 1, **BLOCKS)


def test_numbers_that_size_no_network_are_as_large_as_they_like(tmp_path: Path) -> None:
    """And what couldn't be loaded isn't saved."""
    pipeline = make_pipeline()
    pipeline.unet = Registered(seed=10**12)
    pipeline.save_pretrained(tmp_path / "right")
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path / "right").unet
    assert loaded.config.seed == 10**12 and list(loaded.config.mlp_layers) == [2048, 2048]
    for entry, value in (("num_layers", 2048), ("dataset_size", 5 * 10**7)):
        pipeline.unet = Registered(**{entry: value})
        with pytest.raises(ValueError, match=f"unet: {entry} is {value}; up to 10+ is allowed"):
            pipeline.save_pretrained(tmp_path / entry)
        assert not (tmp_path / entry).exists()


class Ticking(ModelMixin, ConfigMixin):
    """Has a tied weight, a buffer that isn't saved, an integer buffer, and ignores a key."""

    _keys_to_ignore_on_load_unexpected = ["^old_"]

    @register_to_config
    def __init__(self, width: int = 3):
        super().__init__()
        self.layer, self.tied = nn.Linear(width, width), nn.Linear(width, width)
        self.tied.weight = self.layer.weight
        self.register_buffer("grid", torch.arange(width), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @classmethod
    def from_pretrained(cls, path: Path, **options: Any) -> Ticking:
        model = super().from_pretrained(path, **options)
        model.tied.weight = model.layer.weight
        return model


def test_what_is_no_fault(tmp_path: Path) -> None:
    """Ignored keys, tied weights, buffers that aren't saved, integer buffers."""
    model = Ticking()
    state = {k: v for k, v in model.state_dict().items() if k != "tied.weight"}
    save_file(state | {"old_key": torch.zeros(1)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model.save_config(tmp_path)
    loaded = Ticking.from_pretrained(tmp_path)
    check_weights(loaded, tmp_path)
    assert torch.equal(loaded.tied.weight, model.layer.weight)
    loaded.tied.weight = nn.Parameter(loaded.layer.weight.clone())
    with pytest.raises(ValueError, match=r"1 missing \(tied.weight\)"):
        check_weights(loaded, tmp_path)


def test_variants_shards_half_precision_and_old_names_load(tmp_path: Path) -> None:
    classifier = make_classifier()
    for name, options in {
        "variant": {"variant": "fp16"},
        "shards": {"max_shard_size": 20_000},
        "both": {"variant": "fp16", "max_shard_size": 20_000},
    }.items():
        folder, variant = tmp_path / name, options.get("variant")
        classifier.save_pretrained(folder, **options)
        loaded = NoiseAwareClassifier.from_pretrained(folder, variant=variant)
        assert weights_digest(loaded) == weights_digest(classifier)
        assert weights_digest(weight_files(folder, variant)) == weights_digest(classifier)
    make_classifier().half().save_pretrained(tmp_path / "half")
    loaded = NoiseAwareClassifier.from_pretrained(tmp_path / "half", torch_dtype=torch.float32)
    assert weights_digest(loaded) == weights_digest(make_classifier())
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def rename(weights: Weights) -> Weights:
        for new, name in old.items():
            weights = {k.replace(new, name): v for k, v in weights.items()}
        return weights

    classifier.save_pretrained(tmp_path / "old")
    edit(tmp_path / "old" / WEIGHTS, rename)
    assert any("proj_attn" in key for key in load_file(tmp_path / "old" / WEIGHTS))
    loaded = NoiseAwareClassifier.from_pretrained(tmp_path / "old")
    assert weights_digest(loaded) == weights_digest(classifier)


def test_a_user_may_ask_for_other_shapes(tmp_path: Path) -> None:
    make_classifier().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_labels": 5, "id2label": None, "label2id": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}
    assert NoiseAwareClassifier.from_pretrained(tmp_path, **options).config.num_labels == 5
    with pytest.raises(ValueError, match=r"\(3,\) instead of \(5,\)"):
        NoiseAwareClassifier.from_pretrained(tmp_path)


def test_an_autoencoder_and_a_judge_with_other_weights(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    blocks = (("DownEncoderBlock2D",), ("UpDecoderBlock2D",), (4,))
    vae = AutoencoderKL(1, 1, *blocks, norm_num_groups=2, latent_channels=1)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    assert load_vae(str(tmp_path / "pipeline")) is not None
    edit(tmp_path / "pipeline" / "vae" / WEIGHTS, lambda w: dict(list(w.items())[1:]))
    with pytest.raises(ValueError, match=rf"--vae .*vae/{WEIGHTS}: .*1 missing"):
        load_vae(str(tmp_path / "pipeline"))

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=8, image_size=8, patch_size=4, num_labels=3)
    judge = tmp_path / "judge"
    ViTForImageClassification(config).save_pretrained(judge)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(judge)
    assert load_network(judge).classes == 3
    edit(judge / "model.safetensors", lambda w: {k: w[k] for k in w if k != "classifier.bias"})
    with pytest.raises(ValueError, match="judge.*classifier.bias"):
        load_network(judge)


# ---------------------------------------------------------------- saving over a save


def test_a_save_replaces_another_kind_of_save(tmp_path: Path) -> None:
    """Whole and in shards, of two variants: what was saved last is loaded, the other stays."""
    small = {"max_shard_size": 20_000}
    models = {seed: make_classifier(seed) for seed in (1, 2, 3, 4)}
    digests = {seed: weights_digest(model) for seed, model in models.items()}
    models[1].save_pretrained(tmp_path, variant="fp16", **small)
    for seed, options in ((2, {}), (3, small), (4, {"max_shard_size": 40_000}), (2, {})):
        models[seed].save_pretrained(tmp_path, **options)
        loaded = NoiseAwareClassifier.from_pretrained(tmp_path)
        assert weights_digest(loaded) == digests[seed]
        other = NoiseAwareClassifier.from_pretrained(tmp_path, variant="fp16")
        assert weights_digest(other) == digests[1]
    models[3].save_pretrained(tmp_path, variant="fp16")
    assert {path.name for path in tmp_path.glob("*safetensors*")} == {
        WEIGHTS,
        WEIGHTS.replace(".safe", ".fp16.safe"),
    }


def test_a_pipeline_saved_over_another(tmp_path: Path) -> None:
    for adm, options in ((False, {}), (True, {"max_shard_size": 20_000}), (False, {})):
        pipeline = make_pipeline(adm)
        pipeline.save_pretrained(tmp_path, **options)
        loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
        assert type(loaded.unet) is type(pipeline.unet)
        assert weights_digest(loaded.unet) == weights_digest(pipeline.unet)
        check_published_weights(tmp_path, loaded)


def test_a_file_is_no_folder_to_save_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for model in (make_classifier(), make_pipeline()):
        with pytest.raises(NotADirectoryError, match="file is a file; a folder"):
            model.save_pretrained(tmp_path / "file")


class Failing(DDIMScheduler):
    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_the_folder_as_it_was(plain: Path) -> None:
    before = contents(plain)
    pipeline = make_pipeline(adm=True)
    pipeline.scheduler = Failing()
    with pytest.raises(OSError, match="No space left"):
        pipeline.save_pretrained(plain, max_shard_size=20_000)
    assert contents(plain) == before and not list(plain.glob(".*"))


# ---------------------------------------------------------------- components that can't be saved


class Plain(nn.Module):
    """Wraps a network, as a PEFT model or a parallel one does."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.base_model = model
        self.config = model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class SavesOnly(Plain):
    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir()


class Adapter(nn.Module):
    """A low-rank update of a layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.lora = nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora(x)


def adapted(model: nn.Module) -> nn.Module:
    model.time_embedding.linear_1 = Adapter(model.time_embedding.linear_1)
    return model


def wider(model: nn.Module) -> nn.Module:
    model.conv_in = nn.Conv2d(2, 8, 3, padding=1)
    return model


def local(model: nn.Module) -> nn.Module:
    class Local(type(model)):
        pass

    model.__class__ = Local
    return model


def normed(model: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.conv_in)
    return model


def counted(model: nn.Module) -> nn.Module:
    model.register_buffer("steps", torch.zeros(1))
    return model


#: {name: (change of the network, words of the message)}
UNSAVEABLE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a plain module": (Plain, "is a Plain, which can't be saved; merge an adapter"),
    "parallel": (nn.DataParallel, "is a DataParallel, which can't be saved; .*.module"),
    "no from_pretrained": (SavesOnly, "is a SavesOnly, which can't be saved"),
    "compiled plain": (lambda model: torch.compile(Plain(model)), "is a Plain, which can't"),
    "adapter": (adapted, "missing .*unknown .*lora.*; merge or remove adapters"),
    "other layer": (wider, r"of another shape \(conv_in.weight \(8, 2, 3, 3\) instead of"),
    "parametrized": (normed, "missing .*conv_in.weight.*unknown .*parametrizations"),
    "more": (counted, r"1 unknown \(steps\)"),
    "meta": (lambda model: model.to("meta"), "weights have no values"),
    "local class": (local, "local.<locals>.Local, which isn't found when it is loaded"),
}


@pytest.mark.parametrize("kind", UNSAVEABLE)
@pytest.mark.parametrize("part", ["unet", "classifier"])
def test_what_can_not_be_saved_is_refused_before_anything_is_written(
    plain: Path, tmp_path: Path, part: str, kind: str
) -> None:
    before, (change, words) = contents(plain), UNSAVEABLE[kind]
    pipeline = make_pipeline()
    setattr(pipeline, part, change(getattr(pipeline, part)))
    index = dict(pipeline.config)
    with pytest.raises(ValueError, match=f"^{part}.*{words}"):
        pipeline.save_pretrained(plain)
    with pytest.raises(ValueError, match=f"^{part}.*{words}"):
        pipeline.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match=f"^{part}.*{words}"):
        pipeline.push_to_hub("someone/model")
    assert contents(plain) == before and not (tmp_path / "new").exists()
    assert dict(pipeline.config) == index


def test_a_network_alone_with_an_adapter(tmp_path: Path) -> None:
    for model in (make_classifier(), make_clip()):
        adapted(getattr(model, "image_encoder", model))
        with pytest.raises(ValueError, match="lora.*merge or remove adapters"):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_quantized_and_tied_weights_and_odd_variants(tmp_path: Path) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(make_classifier(), {nn.Linear})
    with pytest.raises(ValueError, match="can't be saved: its weights aren't those of"):
        quantized.save_pretrained(tmp_path / "model")
    tied = make_classifier()
    resnets = tied.mid_block.resnets
    resnets[1].conv1.weight = resnets[0].conv1.weight
    with pytest.raises(ValueError, match="resnets.0.conv1.weight and .*1.weight share memory"):
        tied.save_pretrained(tmp_path / "model")
    for variant in ("a/b", "fp16.x", ""):
        for model in (make_classifier(), make_clip(), make_pipeline()):
            with pytest.raises(ValueError, match="variant='.*': letters, digits, _ and - are"):
                model.save_pretrained(tmp_path / "model", variant=variant)
    assert not (tmp_path / "model").exists()


def test_none_is_no_network(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.scheduler = None
    with pytest.raises(ValueError, match="scheduler is None, which can't be saved"):
        pipeline.save_pretrained(tmp_path / "new")


class Own(UNet2DModel):
    """A user's class, which is found by its module's name."""


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    pipeline = make_pipeline()
    pipeline.unet = Own.from_config(json.loads(pipeline.unet.to_json_string()))
    expected = weights_digest(pipeline.unet), weights_digest(pipeline.classifier)
    torch.set_rng_state(state)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.classifier = torch.compile(pipeline.classifier, backend="eager")
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)  # a training goes on as without a save
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is Own
    assert (weights_digest(loaded.unet), weights_digest(loaded.classifier)) == expected


# ---------------------------------------------------------------- the gate


def test_the_gate_refuses_weights_that_nobody_loads_here(adm: Path) -> None:
    """A judge beside the components, another variant, a file under shards."""
    model = ClassifierGuidedPipeline.from_pretrained(adm)
    check_published_weights(adm, model)
    make_classifier(2).save_pretrained(adm / "judge")
    check_published_weights(adm, model)
    edit(adm / "judge" / WEIGHTS, EDITS["lacks one"][0])
    with pytest.raises(ValueError, match=rf"judge/{WEIGHTS}: .*1 missing"):
        check_published_weights(adm, model)
    shutil.rmtree(adm / "judge")
    half = adm / "unet" / WEIGHTS.replace(".safe", ".fp16.safe")
    shutil.copy(adm / "unet" / WEIGHTS, half)
    check_published_weights(adm, model)
    edit(half, EDITS["bools"][0])
    with pytest.raises(ValueError, match=f"{half.name}: .*no floating-point"):
        check(adm, model)
    half.unlink()
    whole = (adm / "unet" / WEIGHTS).read_bytes()
    model.unet.save_pretrained(adm / "unet", max_shard_size=20_000)
    (adm / "unet" / WEIGHTS).write_bytes(whole)
    with pytest.raises(ValueError, match=f"unet/{WEIGHTS} isn't loaded"):
        check_published_weights(adm, model)


# ---------------------------------------------------------------- metrics of other weights


def test_metrics_of_other_weights_are_left_out(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a network, of the pipeline, and without a record; the folder itself isn't changed."""
    pipeline = ClassifierGuidedPipeline.from_pretrained(plain)
    unet, classifier = weights_digest(pipeline.unet), weights_digest(pipeline.classifier.half())
    rows = [{"timestep": t, "accuracy": 0.5} for t in (1, 2)]
    other = weights_digest(make_classifier(5))
    files = {
        "metrics": {"weights": unet, "held_out": [{"timestep": 3, "loss": 0.25}]},
        "diagnosis": {"weights": other, "levels": rows},
        "evaluation": {"weights": weights_hash(make_pipeline()), "nearest": [{"distance": 0.125}]},
        "sweep": {"weights": "sha256:0", "points": [{"agreement": 0.625}]},
        "figures": {
            "classifier": {"weights": classifier, "held_out": rows},
            "judge": {"weights": other, "held_out": rows},
            "old": {"held_out": rows},
        },
    }
    for name, content in files.items():
        (plain / f"{name}.json").write_text(json.dumps(content))
    (plain / "diagnosis.png").write_bytes(b"picture")
    before = contents(plain)
    prepare(plain, tmp_path / "stage", "user/model", picture=False)
    assert contents(plain) == before
    for name in ("diagnosis", "judge", "sweep"):
        assert f"the metrics {name!r} are of other weights" in caplog.text
    for name in ("metrics", "evaluation", "'classifier'", "old"):
        assert f"the metrics {name!r}" not in caplog.text
    published = json.loads((tmp_path / "stage" / "figures.json").read_text())
    assert (
        published.keys() == {"unet", "classifier", "old"} and published["unet"]["weights"] == unet
    )
    names = {path.name for path in (tmp_path / "stage").iterdir()}
    assert "evaluation.json" in names
    assert not names & {"diagnosis.json", "diagnosis.png", "sweep.json", "metrics.json"}
    text = (tmp_path / "stage" / "README.md").read_text()
    for title in ("### unet", "### classifier", "### old", "### evaluation"):
        assert title in text
    assert "### judge" not in text and "### diagnosis" not in text and unet not in text
    assert text.count("doesn't say which weights") == 1  # the old ones
    make_classifier(5).save_pretrained(plain / "judge")  # then they are known
    loaded = ClassifierGuidedPipeline.from_pretrained(plain)
    assert stale_metrics(plain, loaded) == {"sweep"}


def test_the_hash_is_of_the_values(tmp_path: Path) -> None:
    model = make_classifier()
    digest = weights_digest(model)
    assert weights_digest(make_classifier()) == digest == weights_digest(make_classifier().half())
    assert weights_digest(make_classifier(2)) != digest
    with torch.no_grad():
        model.conv_in.bias[0] += 0.01
    assert weights_digest(model) != digest


def test_a_diagnosis_has_the_hash(tmp_path: Path) -> None:
    data = [{"pixel_values": torch.randn(1, 8, 8).clamp(-1, 1), "label": i % 3} for i in range(9)]
    options = {"levels": 2, "gradient_images": 2, "finite_differences": False, "progress": False}
    diagnosis = diagnose(make_classifier(), data, **options)
    diagnosis.save(tmp_path, picture=False)
    content = json.loads((tmp_path / "diagnosis.json").read_text())
    assert content["weights"] == weights_digest(make_classifier())

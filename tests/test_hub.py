"""Publishing without a server: self-contained code, what folders may hold, the release gate, the card, the canary."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import diffusers
import pytest
import torch
import yaml
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    ModularPipeline,
    UNet2DModel,
)
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo
from test_clip import make_clip

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP, hub
from guided_diffusers.cli import main
from guided_diffusers.hub import charts, publish, verification
from guided_diffusers.hub.card_metrics import guided_rows, level_rows
from guided_diffusers.hub.files import check_files, count_parameters, safetensors_header
from guided_diffusers.hub.model_card import is_generated, write_card
from guided_diffusers.hub.staging import collect
from guided_diffusers.learning.distributed import exit_on_value_error
from guided_diffusers.openai import ADMDDIMScheduler, ADMDDPMScheduler, ADMUNet2DModel
from guided_diffusers.standalone import self_contained
from guided_diffusers.text import printable

ROOT = Path(__file__).parents[1]
BLOCKS = {
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
NAMES = {0: "boot", 1: "coat", 2: "hat"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_classifier(seed: int = 1) -> NoiseAwareClassifier:
    torch.manual_seed(seed)
    classifier = NoiseAwareClassifier(
        8,
        1,
        3,
        (8,),
        ("ResnetDownsampleBlock2D",),
        1,
        attention_head_dim=8,
        norm_num_groups=4,
        id2label=NAMES,
    )
    torch.nn.init.normal_(classifier.head[-1].out.weight)
    return classifier


def make_pipeline(adm: bool = False) -> ClassifierGuidedPipeline:
    torch.manual_seed(0)
    if adm:
        unet = ADMUNet2DModel(
            8, 1, 1, **BLOCKS, attention_head_dim=4, attn_norm_num_groups=4, num_class_embeds=4
        )
    else:
        unet = UNet2DModel(8, 1, 1, **BLOCKS, num_class_embeds=4)
    scheduler = (ADMDDIMScheduler if adm else DDIMScheduler)(clip_sample=False)
    pipeline = ClassifierGuidedPipeline(
        unet, scheduler, make_classifier(), defaults={"guidance_scale": 2.0}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adm"
    make_pipeline(adm=True).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def images(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        ["boot", 1],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def test_a_saved_folder_holds_the_code_that_the_source_makes(saved: Path) -> None:
    """None is written by hand: each file is what `self_contained` makes now."""
    made = {
        "unet/guided_diffusers_openai_unet.py": ADMUNet2DModel,
        "classifier/guided_diffusers_classifier.py": NoiseAwareClassifier,
        "scheduler/guided_diffusers_openai_schedules.py": ADMDDIMScheduler,
    }
    assert {path.relative_to(saved).as_posix() for path in saved.rglob("*.py")} == {
        "pipeline.py",
        *made,
    }
    assert (saved / "pipeline.py").read_text() == self_contained(ClassifierGuidedPipeline)
    for file, cls in made.items():
        assert (saved / file).read_text() == self_contained(cls)
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "ClassifierGuidedPipeline"]
    assert index["classifier"] == ["guided_diffusers_classifier", "NoiseAwareClassifier"]
    assert index["unet"] == ["guided_diffusers_openai_unet", "ADMUNet2DModel"]


def test_a_modular_pipeline_of_the_folder_is_refused_in_a_line(saved: Path) -> None:
    message = (
        "this is a ClassifierGuidedPipeline, which has no modular blocks; load it by Diffusion"
    )
    with pytest.raises(ValueError, match=message):
        ModularPipeline.from_pretrained(saved)


def test_saved_again_it_is_the_same(saved: Path, tmp_path: Path) -> None:
    for number, loader in enumerate((ClassifierGuidedPipeline, DiffusionPipeline)):
        pipeline = loader.from_pretrained(saved)
        assert type(pipeline) is ClassifierGuidedPipeline and type(pipeline.unet) is ADMUNet2DModel
        pipeline.save_pretrained(tmp_path / str(number))
        assert contents(tmp_path / str(number)) == contents(saved)
    pipeline.classifier.save_pretrained(tmp_path / "alone")
    assert contents(tmp_path / "alone") == contents(saved / "classifier")
    assert torch.equal(images(pipeline), images(make_pipeline(adm=True)))


def test_folders_saved_before_and_by_others(folder: Path, tmp_path: Path) -> None:
    """The class's own module in model_index.json; a network alone, with a classifier's folder; subfolder, variant."""
    expected = images(make_pipeline(adm=True))
    edit(
        folder / "model_index.json",
        classifier=["guided_diffusers.classifier", "NoiseAwareClassifier"],
    )
    for path in folder.rglob("*.py"):
        path.unlink()
    edit(
        folder / "model_index.json",
        unet=["guided_diffusers.openai.unet", "ADMUNet2DModel"],
        scheduler=["guided_diffusers.openai.schedules", "ADMDDIMScheduler"],
    )
    assert torch.equal(images(ClassifierGuidedPipeline.from_pretrained(folder)), expected)
    assert torch.equal(
        images(ClassifierGuidedPipeline.from_pretrained(tmp_path, subfolder="model")), expected
    )

    own = make_pipeline()
    DDPMPipeline(own.unet, own.scheduler).save_pretrained(tmp_path / "ddpm")
    own.classifier.save_pretrained(tmp_path / "classifier", variant="fp16", max_shard_size=5000)
    assert len(list((tmp_path / "classifier").glob("*.fp16-0000*.safetensors"))) > 1
    classifier = NoiseAwareClassifier.from_pretrained(tmp_path / "classifier", variant="fp16")
    joined = ClassifierGuidedPipeline.from_pretrained(tmp_path / "ddpm", classifier=classifier)
    assert joined.classifier is classifier
    joined.save_pretrained(tmp_path / "joined", variant="fp16", max_shard_size=20000)
    weights = [path for path in (tmp_path / "joined").rglob("*.safetensors")]
    assert len(weights) > 3 and all(".fp16" in path.name for path in weights)
    again = ClassifierGuidedPipeline.from_pretrained(tmp_path / "joined", variant="fp16")
    assert torch.equal(images(again), images(joined))


def test_a_component_that_is_passed_makes_no_noise(
    folder: Path, capfd: pytest.CaptureFixture
) -> None:
    other = make_classifier(seed=2)
    assert ClassifierGuidedPipeline.from_pretrained(folder, classifier=other).classifier is other
    assert "non-standard" not in capfd.readouterr().err
    assert ClassifierGuidedPipeline.from_pretrained(folder, classifier=None).classifier is None
    with pytest.raises(ValueError, match="classifier is 'x'; a torch.nn.Module or None is allowed"):
        ClassifierGuidedPipeline.from_pretrained(folder, classifier="x")


def evil(folder: Path) -> None:
    """A module that would say so if it ran."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"classifier": ["evil", "Evil"]},
            "classifier is .'evil', 'Evil'., code of the repository",
        ),
        (
            {"_class_name": ["evil", "Evil"]},
            "_class_name is .'evil', 'Evil'., code of the repository",
        ),
        (
            {"_class_name": ["ClassifierGuidedPipeline"]},
            "_class_name is .'Class.*code of the repos",
        ),
        (
            {"_class_name": ["evil", "ClassifierGuidedPipeline", "Evil"]},
            "a name, or .module, 'ClassifierGuidedPipeline'., is allowed",
        ),
        ({"_class_name": None}, "_class_name is None, code of the repository"),
        ({"_class_name": [1, "ClassifierGuidedPipeline"]}, "code of the repository"),
        ({"_class_name": ["../evil", "ClassifierGuidedPipeline"]}, "code of the repository"),
        ({"classifier": ["../evil", "Evil"]}, "no .module, class."),
        (
            {"unet": ["subprocess", "Popen"]},
            "unet is .'subprocess', 'Popen'., which is no class of a model",
        ),
        ({"unet": ["diffusers", "DDPMPipeline"]}, "which is no class of a model"),
        ({"scheduler": ["diffusers", "nothing"]}, "which is no class of a model"),
        (
            {"vae": ["nothing_like_it", "Vae"]},
            "which is no class of a model here; a model or scheduler of diffusers",
        ),
    ],
)
def test_loading_refuses_a_foreign_index(folder: Path, changes: dict, message: str) -> None:
    evil(folder / "classifier")
    evil(folder)
    edit(folder / "model_index.json", **changes)
    with pytest.raises(ValueError, match=message):
        ClassifierGuidedPipeline.from_pretrained(folder)
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("name", ["ClassifierGuidedPipeline", ["evil", "ClassifierGuidedPipeline"]])
def test_an_index_that_names_our_class_runs_no_code_of_the_folder(
    folder: Path, name: str | list
) -> None:
    """Neither by our class nor by Diffusers', with or without trust; a folder of an earlier version has a string."""
    evil(folder)
    (folder / "pipeline.py").write_text((folder / "evil.py").read_text())
    edit(folder / "model_index.json", _class_name=name)
    expected = images(make_pipeline(adm=True))
    for loader in (ClassifierGuidedPipeline, DiffusionPipeline):
        for options in ({}, {"trust_remote_code": True}):
            pipeline = loader.from_pretrained(folder, **options)
            assert type(pipeline) is ClassifierGuidedPipeline
            assert torch.equal(images(pipeline), expected)
    plain = DDPMPipeline.from_pretrained(folder)
    assert type(plain) is DDPMPipeline and type(plain.unet) is ADMUNet2DModel
    assert not list(folder.rglob("ran"))


def test_diffusers_loads_a_folder_without_the_pipelines_code_by_the_package(folder: Path) -> None:
    """As one that was downloaded without .py files; another class is still Diffusers' to judge."""
    (folder / "pipeline.py").unlink(missing_ok=True)
    edit(folder / "model_index.json", _class_name=["pipeline", "ClassifierGuidedPipeline"])
    assert type(DiffusionPipeline.from_pretrained(folder)) is ClassifierGuidedPipeline
    edit(folder / "model_index.json", _class_name=["pipeline", ["x"]])
    with pytest.raises((TypeError, ValueError)):
        DiffusionPipeline.from_pretrained(folder)


def test_loading_refuses_foreign_weights_and_configs(folder: Path) -> None:
    with pytest.raises(ValueError, match="use_safetensors=False: only True"):
        ClassifierGuidedPipeline.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(ValueError, match="use_safetensors is False"):
        NoiseAwareClassifier.from_pretrained(folder / "classifier", use_safetensors=False)
    with pytest.raises(
        ValueError, match="_class_name of the config is 'ADMUNet2DModel'; allowed: NoiseAware"
    ):
        NoiseAwareClassifier.from_pretrained(folder / "unet")
    for model in (make_pipeline(), make_classifier()):
        with pytest.raises(ValueError, match="safe_serialization"):
            model.save_pretrained(folder, safe_serialization=False)
    weights = folder / "classifier" / WEIGHTS
    torch.save(torch.load, weights.with_suffix(".bin"))  # would be a call of it, unpickled
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    for load in (
        lambda: ClassifierGuidedPipeline.from_pretrained(folder),
        lambda: safetensors_header(weights),
    ):
        with pytest.raises(OSError, match=f"classifier/{WEIGHTS}"):
            load()
    weights.unlink()
    with pytest.raises(OSError, match=f"{WEIGHTS} is needed"):
        ClassifierGuidedPipeline.from_pretrained(folder)
    index = {"metadata": {}, "weight_map": {"conv_in.weight": f"../unet/{WEIGHTS}"}}
    weights.with_name(WEIGHTS + ".index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="path separator"):
        NoiseAwareClassifier.from_pretrained(folder / "classifier")
    with pytest.raises(OSError, match="has no model_index.json"):
        ClassifierGuidedPipeline.from_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="'a/b/c' is no folder"):
        ClassifierGuidedPipeline.from_pretrained("a/b/c")


SECRET = "hf_" + "aBcDeFgHiJ" * 4


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("notes.md", f"my key is {SECRET}", "notes.md contains a Hugging Face token"),
        ("figures.json", '{"key": "AKIAABCDEFGHIJKLMNOP"}', "figures.json contains an AWS key"),
        ("note.txt", "see https://user:secret@example.org/x", "contains a password in an address"),
        ("id.txt", "-----BEGIN OPENSSH PRIVATE KEY-----", "contains a private key"),
        ("unet/weights.bin", "x", "unet/weights.bin is a pickle"),
        ("picture.png", pickle.dumps({"a": 1}), "picture.png is a pickle"),
        ("classifier/helper.py", "x = 1", "classifier/helper.py is code"),
        ("run", "#!/bin/sh\n", "run is code"),
        (
            "figures.json",
            '{"from": "/home/me/data/x"}',
            "figures.json contains an absolute path: /home/me/data/x",
        ),
        ("figures.json", '{"from": "C:\\\\Users\\\\me"}', "figures.json contains an absolute path"),
        ("pipeline.py", "import os", "pipeline.py differs from the code that this version"),
    ],
)
def test_what_may_not_be_published(
    folder: Path, name: str, content: str | bytes, message: str
) -> None:
    code = ClassifierGuidedPipeline.from_pretrained(folder).code()
    check_files(folder, code)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        check_files(folder, code)
    assert SECRET not in str(error.value)


def test_more_that_may_not_be_published(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links out, secrets in a header of weights, the user's own token; fractions, addresses and tags are no paths."""
    (folder / "README.md").write_text(
        "1/2, </details>, https://huggingface.co/data/x, out/unet, `a/b/c.png`, N/A"
    )
    check_files(folder, make_pipeline(adm=True).code())
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, folder / "unet" / "more.safetensors", {"note": SECRET})
    with pytest.raises(ValueError, match="unet/more.safetensors contains a Hugging Face token"):
        check_files(folder, make_pipeline(adm=True).code())
    (folder / "unet" / "more.safetensors").unlink()
    monkeypatch.setenv("HF_TOKEN", "an-odd-token-1234")
    (folder / "note.txt").write_text("an-odd-token-1234")
    with pytest.raises(ValueError, match="note.txt contains your Hugging Face token"):
        check_files(folder, make_pipeline(adm=True).code())
    (folder / "note.txt").unlink()
    (tmp_path / "outside.txt").write_text("x")
    (folder / "note.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(ValueError, match="note.txt is a link out of the folder"):
        check_files(folder, {})
    with pytest.raises(ValueError, match="note.txt is a link out of the folder"):
        hub.push(folder, "user/model")


def put(folder: Path, name: str, content: str | bytes = "x") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


OWN = ["notes.md", "LICENSE", "Example.PNG", "diagnosis.json", "unet/more.json", "unet/a.txt"]
TEXTS = [
    "diffusion of clothes.",
    "low noise. Results",
    "Images of a coat\nand of a hat.",
    "}",
    ".",
    "",
]
FOREIGN = [
    "data/train.parquet",
    "data/labels.txt",
    "users.sqlite",
    "train.log",
    "wandb/config.json",
    "wandb/run-1/files/x.json",
    "runs/events.out.tfevents.1",
    "unet/deep/x.json",
    ".env",
    ".secrets/token.json",
    "unet/.hidden.json",
    "analysis.ipynb",
    "train.py",
    "unet/helper.py",
    "A.PT",
    "unet/pytorch_model.BIN",
    "old.PKL",
    "table.csv",
    "config.yaml",
    "movie.gif",
    "judge2/config.json",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_only_a_models_own_files_are_published(folder: Path, tmp_path: Path, name: str) -> None:
    put(folder, name, "{}")
    with pytest.raises(ValueError, match="no part of a model") as error:
        hub.push(folder, "user/model")
    assert name in str(error.value) and "--include PATTERN" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_published_of_a_folder(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model's own files, and none that training or tools left; of these training's are named."""
    model = set(contents(folder)) - {path for path in contents(folder) if path.endswith(".py")}
    for name in OWN:
        put(folder, name, "{}")
    for number, text in enumerate(TEXTS):  # which a parser of pickles may begin to read
        put(folder, f"text{number}.txt", text)
    make_classifier().save_pretrained(folder / "judge")
    for name in ("checkpoint-500/unet/x.bin", "logs/x.log", "samples-1.png", "curves.png"):
        put(folder, name)
    for name in (".cache/huggingface/x.json", ".git/config", "unet/__pycache__/x.pyc", ".DS_Store"):
        put(folder, name)
    logger = diffusers.utils.logging.get_logger("guided_diffusers.hub.staging")
    logger.addHandler(caplog.handler)
    collect(folder, tmp_path / "stage")
    logger.removeHandler(caplog.handler)
    texts = {f"text{number}.txt" for number in range(len(TEXTS))}
    judge = {"judge/config.json", f"judge/{WEIGHTS}"}
    assert set(contents(tmp_path / "stage")) == {*model, *OWN, *judge, *texts}
    assert "not published: checkpoint-500, curves.png, logs, samples-1.png in" in caplog.text


def test_include_publishes_more_but_no_pickles_and_no_secrets(folder: Path, tmp_path: Path) -> None:
    for name in ("data/train.parquet", "data/a/b.csv", "train.py", "logs/x.log"):
        put(folder, name)
    collect(folder, tmp_path / "one", ["data", "*.py", "logs/*"])
    names = {"data/train.parquet", "data/a/b.csv", "train.py", "logs/x.log"}
    assert names <= set(contents(tmp_path / "one"))
    with pytest.raises(ValueError, match=r"--include \*\.nothing: no file"):
        collect(folder, tmp_path / "x", ["*", "*.nothing"])
    with pytest.raises(ValueError, match="no part of a model: train.py"):
        collect(folder, tmp_path / "x", ["data", "logs"])
    cases = {
        "data/A.PT": "x",
        "data/x.pkl.gz": "x",
        "data/x.parquet": pickle.dumps({"a": 1}),
        "data/x.txt": pickle.dumps(torch.load, 0),
        "data/x.csv": f"a,{SECRET}",
        "data/x.tsv": SECRET.encode("utf-16"),
        "data/y.log": "read /home/me/x",
        "data/z.html": "see file:///home/me/x",
        f"data/{SECRET}.csv": "x",
        f"data/my_{SECRET}/x.csv": "x",
        "data/kaggle.json": "{}",
        "data/k.json": '{"api_key": "0123456789abcdef0123"}',
        "data/x.zip": b"PK\x03\x04",
        "data/two\nlines.csv": "x",
    }
    for number, (name, content) in enumerate(cases.items()):
        path = put(folder, name, content)
        with pytest.raises(ValueError, match="can't be published") as error:
            collect(folder, tmp_path / f"case{number}", ["data", "*.py", "logs"])
        assert SECRET not in str(error.value) and "\n" not in str(error.value)
        assert path.suffix in str(error.value)
        path.unlink()


def test_links_and_special_files_are_not_published(folder: Path, tmp_path: Path) -> None:
    put(tmp_path, "outside/x.json", "{}")
    for name, target in (("notes.md", "outside/x.json"), ("more", "outside")):
        (folder / name).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=f"{name} is a link out of the folder"):
            collect(folder, tmp_path / "x")
        (folder / name).unlink()
    (folder / "notes.md").symlink_to(folder / "missing.md")
    with pytest.raises(ValueError, match="no part of a model: notes.md"):
        collect(folder, tmp_path / "x")
    (folder / "notes.md").unlink()
    os.mkfifo(folder / "notes.md")  # reading it would wait for ever
    for include in ([], ["notes.md"]):
        with pytest.raises(ValueError, match="no part of a model: notes.md"):
            collect(folder, tmp_path / "x", include)


def test_pictures_are_searched_for_texts_and_places(folder: Path, tmp_path: Path) -> None:
    texts, picture = PngInfo(), PILImage.new("RGB", (4, 4))
    texts.add_text("key", "hf_" + "x" * 34, zip=True)
    picture.save(folder / "a.png", pnginfo=texts)
    exif = PILImage.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    picture.save(folder / "b.jpg", exif=exif)
    with pytest.raises(ValueError, match="a.png contains a Hugging Face token; b.jpg contains the"):
        hub.prepare(folder, tmp_path / "stage", None)


def test_files_of_a_card_that_can_not_be_read(folder: Path, tmp_path: Path) -> None:
    rows = [{"timestep": "a", "loss": 1.0}, {"timestep": 1, "loss": 1.0}]
    (folder / "metrics.json").write_text(json.dumps({"held_out": rows}))
    hub.prepare(folder, tmp_path / "stage", None, picture=False)
    (folder / "README.md").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="README.md is no UTF-8 text"):
        hub.prepare(folder, tmp_path / "again", None, picture=False)


def test_the_environments_secrets_are_not_published(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    put(folder, "notes.md", "0123456789abcdef" * 2)
    with pytest.raises(ValueError, match="notes.md contains the value of WANDB_API_KEY"):
        collect(folder, tmp_path / "x")


NAUGHTY = "a|b`c`[d](http://e)<script>$x$\n---\n# f\x1b\u202e"


def test_a_card_shows_names_as_they_are(tmp_path: Path) -> None:
    """No name of a label, file, option or dataset adds markup, a line or metadata to the card."""
    pipeline = make_pipeline()
    pipeline.register_to_config(id2label={0: NAUGHTY, 1: "コート", 2: "\U0001f469\u200d\U0001f4bb"})
    pipeline.save_pretrained(tmp_path / "m")
    row = {"guidance": NAUGHTY, "agreement": 0.5, NAUGHTY: NAUGHTY}
    entry = {
        "held_out": HELD_OUT,
        "options": {"dataset_name": NAUGHTY, "seed": NAUGHTY},
        "command": NAUGHTY,
        "verdict": {"summary": NAUGHTY},
        NAUGHTY: NAUGHTY,
    }
    figures = {NAUGHTY: entry, "../../../up": {"rows": [row, row]}, "</summary>": entry}
    put(tmp_path / "m", "figures.json", json.dumps(figures))
    before = {path for path in tmp_path.iterdir()}
    write_card(
        tmp_path / "m", pipeline, NAUGHTY, license=NAUGHTY, datasets=[NAUGHTY], picture=False
    )
    assert {path for path in tmp_path.iterdir()} == before  # nothing beside the folder
    text = (tmp_path / "m" / "README.md").read_text()
    assert "\x1b" not in text and "\u202e" not in text
    assert "コート, \U0001f469\u200d\U0001f4bb" in text
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.license == card.data.datasets[0] == printable(NAUGHTY)
    body = re.sub(r"```.*?```", "", card.text, flags=re.S)  # code, which has quoted names
    assert not re.search(r"(?m)^(# f|---$)", body)
    assert body.count("</summary>") == body.count("<summary>")
    plain = re.sub(r"``.*?``|<summary>.*?</summary>", "", body)  # no Markdown within these
    assert not re.search(r"(?<!\\)(\[d\]|<script)", plain)
    for line in body.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) >= 2
    tables = re.findall(r"(?m)(?:^\|.*\|\n)+", body)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


class Silent(ThreadingHTTPServer):
    """A server that accepts connections and never answers, or answers each request with a status."""

    def __init__(self, status: int | None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.ended = status, Event()
        Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def handle_any(self) -> None:
        if self.server.status is None:
            self.server.ended.wait()
        else:
            self.send_response(self.server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("fault", ["refused", "no such host", "silent", 401, 403, 404, 429, 500])
def test_a_hub_that_gives_nothing_is_one_line_soon(
    fault: str | int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """push, pull, and loading by id; a token is in no message."""
    urls = {"refused": "http://127.0.0.1:9", "no such host": "http://no-such-host.invalid"}
    server = None if fault in urls else Silent(None if fault == "silent" else fault)
    url = urls[fault] if server is None else f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("constants", "file_download"):
        name = f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(name, template, raising=False)
    monkeypatch.setattr("guided_diffusers.utils.HUB_GIVE_UP_S", 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NO_PROXY", "*")
    for arguments in (
        ["pull", "user/model", str(tmp_path / "out")],
        ["push", str(folder), "user/model", "--no-picture"],
        ["sample", "--model", "user/model", "--label", "0", "--quiet"],
        ["inspect", "user/model", "--dataset", "user/data", "--no-picture", "--quiet"],
    ):
        start = time.monotonic()
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert time.monotonic() - start < 40
        text = str(error.value)
        assert text.startswith(f"guided-diffusers {arguments[0]}: ") and "\n" not in text
        assert SECRET not in text
        if isinstance(fault, int):
            is_own = arguments[0] == "inspect"  # Diffusers doesn't pass all statuses on
            assert is_own or str(fault) in text or "Invalid user token" in text
    assert not (tmp_path / "out").exists()
    start = time.monotonic()
    with pytest.raises(SystemExit, match="error: ") as error, exit_on_value_error():  # training
        NoiseAwareClassifier.from_pretrained("user/model", cache_dir=tmp_path / "cache")
    assert time.monotonic() - start < 40 and "\n" not in str(error.value)
    if server is not None:
        server.ended.set()
        server.shutdown()
        server.server_close()


def test_nothing_is_published_without_a_token(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no token to publish with: use `hf auth login`"):
        hub.push(folder, "user/model")


def test_the_gate_sees_other_images(folder: Path) -> None:
    (folder / "pipeline.py").write_text(self_contained(ClassifierGuidedPipeline))
    other = ClassifierGuidedPipeline.from_pretrained(folder)
    with torch.no_grad():
        other.classifier.head[-1].out.weight.mul_(1.001)
    with pytest.raises(
        ValueError,
        match="the output differs when loaded without guided-diffusers; the largest difference is",
    ):
        hub.check(folder, other)


def test_the_gate_does_not_wait_for_ever(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asleep.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(verification.verify_standalone, "__file__", str(tmp_path / "asleep.py"))
    monkeypatch.setattr(verification, "TIMEOUT_S", 0.5)
    (folder / "pipeline.py").write_text(self_contained(ClassifierGuidedPipeline))
    with pytest.raises(
        ValueError,
        match=f"{re.escape(str(folder))}: no output within 0.5 seconds when loaded without",
    ):
        hub.check(folder)


@pytest.mark.parametrize(
    "label", ["baker's hat", 'a 5" nail', "both ' and \"", "back\\slash", "Mütze"]
)
def test_the_snippets_of_a_card_name_any_label(label: str, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.register_to_config(id2label={0: label, 1: "coat", 2: "coat"})
    pipeline.save_pretrained(tmp_path)
    write_card(tmp_path, pipeline, "user/model", picture=False)
    snippets = (tmp_path / "README.md").read_text().split("```python")[1:]
    assert len(snippets) == 2
    for text in snippets:
        called = [
            call.args
            for call in ast.walk(ast.parse(text.partition("```")[0]))
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == "pipeline"
        ]
        assert [ast.literal_eval(arguments[0]) for arguments in called] == [label]


class Foreign(NoiseAwareClassifier):
    """A classifier whose code wouldn't travel."""


def test_only_what_can_travel_is_published(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.register_modules(
        classifier=Foreign(
            **{
                name: value
                for name, value in pipeline.classifier.config.items()
                if not name.startswith("_")
            }
        )
    )
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"classifier is test_hub.Foreign, whose code can't be published"
    ):
        hub.push(tmp_path / "model", "user/model", picture=False)
    pipeline.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(
        ValueError, match="contains a UNet2DModel; a ClassifierGuidedPipeline, a NoiseAware"
    ):
        hub.push(tmp_path / "unet", "user/model")
    with pytest.raises(ValueError, match="contains neither a pipeline"):
        hub.push(tmp_path, "user/model")


HELD_OUT = [
    {"timestep": 49, "accuracy": 0.875, "cross_entropy": 0.3, "ece": 0.021},
    {"timestep": 949, "accuracy": 0.25, "cross_entropy": 2.0, "ece": 0.034},
]
GUIDED = [
    {"guidance_scale": scale, "agreement": agreement, "frechet_distance": distance, "images": 100}
    for scale, agreement, distance in ((0.0, 0.115, 2.25), (3.0, 0.915, 1.125))
]
GUIDED[1]["sliced_wasserstein"] = 2.5


def test_the_card(folder: Path, capsys: pytest.CaptureFixture) -> None:
    options = {
        "dataset_name": "someone/clothes",
        "max_train_steps": 5250,
        "learning_rate": 6e-4,
        "output_dir": "/x/y",
    }
    figures = {
        "classifier": {"step": 5, "held_out": HELD_OUT, "options": options},
        "judge_agreement": {
            "rows": GUIDED,
            "command": "python examples/benchmarks/judge_agreement.py --scales 0 3",
        },
    }
    (folder / "figures.json").write_text(json.dumps(figures))
    evaluation = {
        "frechet_distance": {"value": 0.25, "interval": [0.125, 0.5], "better": "less"},
        "sliced_wasserstein": {"value": 0.75, "interval": None, "name": "MIND", "better": "less"},
    }
    (folder / "evaluation.json").write_text(json.dumps({"figures": evaluation, "confusion": None}))
    main(["card", str(folder), "--repo", "user/model", "--license", "mit"])
    assert "README.md is written" in capsys.readouterr().out
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license, card.data.datasets) == (
        "diffusers",
        "mit",
        ["someone/clothes"],
    )
    assert (
        card.data.pipeline_tag == "unconditional-image-generation"
        and card.data.model_name == "model"
    )
    assert {
        (one.metric_type, one.metric_name.partition(", ")[2], one.metric_value)
        for one in card.data.eval_results
    } == {
        ("accuracy", "timestep 49", 0.875),
        ("accuracy", "timestep 949", 0.25),
        ("ece", "timestep 49", 0.021),
        ("ece", "timestep 949", 0.034),
        ("agreement", "unguided", 0.115),
        ("agreement", "scale 3", 0.915),
        ("frechet_distance", "unguided", 2.25),
        ("frechet_distance", "scale 3", 1.125),
        ("sliced_wasserstein", "scale 3", 2.5),
    }
    for text in (
        "boot, coat, hat",
        "![Generated images, one row per label](example.png)",
        "![Metrics at each noise level](figure-levels.png)",
        "![Metrics of guided images](figure-judge_agreement.png)",
        "| 49 | 0.875 | 0.3 | 0.021 |",
        "| scale 3 | 3 | 0.915 | 1.125 | 100 |",
        "| frechet distance | 0.25 | 0.125 to 0.5 |\n| MIND | 0.75 |  |",
        "`python examples/benchmarks/judge_agreement.py --scales 0 3`",
        "| learning rate | 0.0006 |",
        "87.5% at timestep 49, 25.0% at 949",
        "license of the weights is mit",
        'from_pretrained("user/model")',
        '"user/model", trust_remote_code=True',
    ):
        assert text in card.text, text
    assert set(re.findall(r"\]\(([\w-]+\.png)\)", card.text)) == {
        path.name for path in folder.glob("*.png")
    }
    assert [path.name for path in folder.glob(".*")] == [".eval_results"]


def test_metrics_on_a_dataset_of_the_hub_are_evaluation_results(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "figures.json").write_text(json.dumps({"classifier": {"held_out": HELD_OUT}}))
    results = folder / ".eval_results"
    hub.card(folder, "user/model", picture=False)
    assert not results.exists()  # on data that the Hub doesn't know
    hub.card(folder, "user/model", picture=False, datasets=["someone/clothes"])
    assert {path.name for path in results.iterdir()} == {"accuracy.yaml", "ece.yaml"}
    entries = parse_eval_result_entries(yaml.safe_load((results / "accuracy.yaml").read_text()))
    assert [(e.dataset_id, e.task_id, e.value, e.notes) for e in entries] == [
        ("someone/clothes", "accuracy", 0.875, "accuracy of classifier, timestep 49"),
        ("someone/clothes", "accuracy", 0.25, "accuracy of classifier, timestep 949"),
    ]
    windows = (results / "accuracy.yaml").read_bytes().replace(b"\n", b"\r\n")
    (results / "accuracy.yaml").write_bytes(windows)  # of git on Windows
    mine = "- dataset: {id: someone/clothes, task_id: Genauigkeit für mich}\n".encode("latin-1")
    (results / "ece.yaml").write_bytes(mine)
    (folder / "figures.json").write_text("{}")
    hub.staging.prepare(folder, tmp_path / "stage", "user/model", picture=False)
    staged = {path.name: path.read_bytes() for path in (tmp_path / "stage/.eval_results").iterdir()}
    assert staged == {"ece.yaml": mine}  # what a user wrote stays, what has no metrics goes
    (results / "more.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no part of a model: \.eval_results/more\.txt"):
        hub.staging.prepare(folder, tmp_path / "other", "user/model", picture=False)


def test_the_charts_show_what_the_figures_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of the rows is the place of a point or the length of a bar; what isn't there isn't drawn."""
    drawn = []
    monkeypatch.setattr(charts, "save_figure", lambda figure, path: drawn.append(figure))
    levels = [
        {
            "timestep": t,
            "sigma_over_alpha": 1.0,
            "ece": t / 100,
            "ece_floor": 0.01,
            "gradient_norm": 2.0 * t,
        }
        for t in (9, 5)
    ]
    figures = {
        "classifier": {"held_out": HELD_OUT},
        "diagnosis": {"levels": levels},
        "judge": {"held_out": HELD_OUT[:1]},
        "table": {
            name: {"agreement": row["agreement"], "frechet_distance": row["frechet_distance"]}
            for name, row in zip("ab", GUIDED, strict=True)
        },
    }
    assert charts.draw_levels(level_rows(figures), tmp_path / "x.png")
    panels = {
        panel.get_title(): [line.get_xydata().tolist() for line in panel.lines]
        for panel in drawn[0].axes
    }
    assert panels == {
        "accuracy": [[[49, 0.875], [949, 0.25]]],
        "cross entropy (nats)": [[[49, 0.3], [949, 2.0]]],
        "expected calibration error": [
            [[49, 0.021], [949, 0.034]],
            [[5, 0.05], [9, 0.09]],
            [[5, 0.01], [9, 0.01]],
        ],
        "sigma |gradient|": [[[5, 10], [9, 18]]],
    }
    assert charts.draw_guided(guided_rows(figures)["table"], tmp_path / "x.png")
    bars = {
        panel.get_title(): [bar.get_width() for bar in panel.patches] for panel in drawn[1].axes
    }
    assert bars == {
        "judge accuracy": [0.115, 0.915],
        "Frechet distance (lower is better)": [2.25, 1.125],
    }
    assert [label.get_text() for label in drawn[1].axes[0].get_yticklabels()] == ["a", "b"]
    assert not charts.draw_levels({}, tmp_path / "x.png") and not charts.draw_guided(
        [], tmp_path / "x.png"
    )


def test_a_card_that_a_person_wrote_or_edited_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was made is made anew, with the licence and datasets that it names."""
    folder, card = tmp_path / "model", tmp_path / "model" / "README.md"
    make_classifier().save_pretrained(folder)
    hub.card(folder, "user/one", license="mit", datasets=["someone/clothes"])
    model = hub.prepare(folder, tmp_path / "stage", "user/two")
    made = ModelCard.load(tmp_path / "stage" / "README.md")
    assert 'from_pretrained("user/two")' in made.text and "user/one" not in made.text
    assert (made.data.license, made.data.datasets) == ("mit", ["someone/clothes"])

    # cards of earlier versions, which had other words in their last line
    generated = card.read_text()
    old = "made anew with the model as long as nobody edits this file"
    card.write_text(
        generated.replace("written again with the model unless this file is edited", old)
    )
    assert old in card.read_text() and is_generated(card)

    for text in (generated.replace("A noise-aware", "My noise-aware"), "# Mine\n", ""):
        card.write_text(text)
        shutil.rmtree(tmp_path / "stage")
        hub.prepare(folder, tmp_path / "stage", "user/two")
        assert (tmp_path / "stage" / "README.md").read_text() == text
        with pytest.raises(FileExistsError, match="README.md was written or edited by a user"):
            hub.card(folder)
        with pytest.raises(
            ValueError, match="license: .*README.md was written or edited by a user"
        ):
            hub.prepare(folder, tmp_path / "other", "user/two", license="mit")
        shutil.rmtree(tmp_path / "other")
        assert card.read_text() == text

    sent = {}
    monkeypatch.setattr(publish, "push", lambda folder, repo, **_: sent.update(contents(folder)))
    NoiseAwareClassifier.from_pretrained(folder).push_to_hub("user/two")
    assert sent["README.md"] == b"" and sent[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    sent.clear()
    model.save_pretrained(
        tmp_path / "saved", push_to_hub=True, repo_id="user/two"
    )  # not by Diffusers' own upload
    assert WEIGHTS in sent


def test_a_clip_is_published_as_a_classifier_is(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    clip = make_clip()
    clip.save_pretrained(folder)
    assert (folder / "guided_diffusers_clip.py").read_text() == self_contained(NoiseAwareCLIP)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoModel": "guided_diffusers_clip.NoiseAwareCLIP"
    }
    NoiseAwareCLIP.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    rows = [
        {"timestep": t, "retrieval": 0.5, "cross_entropy": 2.0, "zero_shot": 0.625}
        for t in (49, 949)
    ]
    (folder / "metrics.json").write_text(json.dumps({"step": 5, "images": 7, "held_out": rows}))
    model = hub.prepare(folder, tmp_path / "stage", "user/clip")
    hub.check(tmp_path / "stage", model)
    card = ModelCard.load(tmp_path / "stage" / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    for text in (
        "A noise-aware CLIP",
        "After 5 steps of training, on 7 held-out images",
        "NoiseAwareCLIPGuidance",
        "| 49 | 0.5 | 2 | 0.625 |",
        "62.5% at timestep 49",
    ):
        assert text in card.text, text
    with torch.no_grad():
        model.text_encoder.text_projection.weight.mul_(1.1).add_(0.01)
    with pytest.raises(ValueError, match="the output differs when loaded without guided-diffusers"):
        hub.check(tmp_path / "stage", model)

    for wrong in ({"safe_serialization": False}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is False"):
            clip.save_pretrained(
                folder, **wrong
            ) if "safe_serialization" in wrong else NoiseAwareCLIP.from_pretrained(folder, **wrong)
    edit(folder / "config.json", _class_name="Foreign")
    with pytest.raises(
        ValueError, match="_class_name of the config is 'Foreign'; allowed: NoiseAwareCLIP"
    ):
        NoiseAwareCLIP.from_pretrained(folder)
    with pytest.raises(
        ValueError,
        match="contains a Foreign; a ClassifierGuidedPipeline, a NoiseAwareClassifier or a",
    ):
        hub.push(folder, "user/clip")


def test_the_card_of_a_classifier_without_figures(tmp_path: Path) -> None:
    make_classifier().save_pretrained(tmp_path)
    card = ModelCard.load(hub.card(tmp_path, "user/classifier"))
    assert (card.data.pipeline_tag, card.data.license) == ("image-classification", "unknown")
    assert (
        "3 labels: boot, coat, hat" in card.text
        and "not stated" in card.text
        and "## Metrics" not in card.text
    )
    assert count_parameters(tmp_path) == sum(p.numel() for p in make_classifier().parameters())


LEANS_ON = [  # module, attribute, parameters that we or the generated code give, or words of its source
    (
        "diffusers.pipelines.pipeline_loading_utils",
        "_get_custom_components_and_folders",
        ["hasattr(pipelines"],
    ),
    (
        "diffusers.pipelines.pipeline_loading_utils",
        "get_class_obj_and_candidates",
        [
            "is_pipeline_module",
            "getattr(pipelines, library_name)",
            'library_name + ".py"',
            "trust_remote_code",
        ],
    ),
    (
        "diffusers.pipelines.pipeline_loading_utils",
        "_get_pipeline_class",
        ["getattr(diffusers_module, class_name)"],
    ),
    (
        "diffusers.pipelines.pipeline_utils",
        "DiffusionPipeline.from_pretrained",
        ["= _get_pipeline_class(\n            cls,", "class_name=custom_class_name"],
    ),
    (
        "diffusers.pipelines.pipeline_loading_utils",
        "_resolve_custom_pipeline_and_cls",
        ["isinstance(config"],
    ),
    (
        "diffusers.pipelines.pipeline_loading_utils",
        "maybe_raise_or_warn",
        ["You have passed a non-standard module"],
    ),
    (
        "diffusers.pipelines.pipeline_loading_utils",
        "_fetch_class_library_tuple",
        ["LOADABLE_CLASSES"],
    ),
    (
        "diffusers.utils.dynamic_modules_utils",
        "get_cached_module_file",
        ['submodule = "local"', "trust_remote_code"],
    ),
    (
        "diffusers.utils.dynamic_modules_utils",
        "find_pipeline_class",
        ["issubclass(cls, DiffusionPipeline)"],
    ),
    (
        "diffusers.utils.hub_utils",
        "_get_checkpoint_shard_files",
        ["os.path.basename(shard_filename)"],
    ),
    (
        "diffusers.models.model_loading_utils",
        "load_state_dict",
        ["Unable to load weights from checkpoint file"],
    ),
    (
        "diffusers.models.auto_model",
        "AutoModel.from_pretrained",
        ['config["auto_map"][cls.__name__]'],
    ),
    (
        "diffusers.models.modeling_utils",
        "ModelMixin.from_pretrained",
        ["cls.from_config(", "use_safetensors"],
    ),
    (
        "diffusers.models.modeling_utils",
        "ModelMixin.save_pretrained",
        ["save_config(save_directory)"],
    ),
    ("diffusers.configuration_utils", "ConfigMixin.save_config", ["to_json_file"]),
    ("diffusers.configuration_utils", "ConfigMixin.to_json_file", ["to_json_string"]),
    (
        "diffusers.pipelines.pipeline_utils",
        "DiffusionPipeline.download",
        ["CUSTOM_PIPELINE_FILE_NAME", "custom_components", "passed_components"],
    ),
    (
        "diffusers.pipelines.pipeline_utils",
        "DiffusionPipeline.save_pretrained",
        [
            '"safe_serialization" in save_method_signature',
            '"variant" in save_method_signature',
            '"max_shard_size" in save_method_signature',
        ],
    ),
    (
        "diffusers.pipelines.pipeline_utils",
        "DiffusionPipeline._get_signature_keys",
        ["_optional_components"],
    ),
    (
        "diffusers.utils.hub_utils",
        "PushToHubMixin.push_to_hub",
        ["save_pretrained(tmpdir", "_upload_folder"],
    ),
]


@pytest.mark.parametrize("module, name, words", LEANS_ON, ids=[name for _, name, _ in LEANS_ON])
def test_canary_of_what_publishing_leans_on(module: str, name: str, words: list[str]) -> None:
    """Diffusers promises none of this. If it fails after an upgrade, look what the named function does now, and whether
    `test_hub_server.py` still passes; then change `repository` or the words here."""
    found = sys.modules.get(module) or __import__(module, fromlist=["x"])
    for part in name.split("."):
        found = getattr(found, part, None)
        assert found is not None, (
            f"Diffusers {diffusers.__version__} has no {module}.{name} any more"
        )
    source = inspect.getsource(inspect.unwrap(getattr(found, "__func__", found)))
    for word in words:
        assert word in source, (
            f"{module}.{name} of Diffusers {diffusers.__version__} has no {word!r} any more"
        )


def test_our_names_are_free_in_diffusers() -> None:
    """What `register` adds hides nothing of Diffusers' own."""
    code = (
        "import diffusers; print(hasattr(diffusers, 'ClassifierGuidedPipeline'), "
        "[name for name in dir(diffusers.pipelines) if 'guided_diffusers' in name])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "[]"]
    assert (
        diffusers.pipelines.guided_diffusers_classifier.NoiseAwareClassifier is NoiseAwareClassifier
    )
    assert (
        diffusers.pipelines.guided_diffusers_openai_schedules.ADMDDPMScheduler is ADMDDPMScheduler
    )


def test_training_options_of_publishing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    from guided_diffusers.learning.options import Options

    with pytest.raises(
        ValueError, match="--hub_model_id a/b, --hub_private False need --push_to_hub"
    ):
        Options(train_data_dir="x", hub_model_id="a/b")
    with pytest.raises(ValueError, match="--push_to_hub needs a token"):
        Options(train_data_dir="x", push_to_hub=True)

"""Publishing and loading against a server that speaks the Hub's protocol, with the real client in clean processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from test_hub import HELD_OUT, WEIGHTS, contents, make_classifier, make_pipeline

COMMON = """
import contextlib, io, os, sys, urllib.request
from pathlib import Path
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from safetensors.torch import load_file, save_file
disable_progress_bar()

def images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(["boot", 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                    output_type="pt").images

def error(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"

def fault(name):
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/fault/" + name, b"", method="POST"))

import time
time.sleep = lambda seconds: None  # between the client's attempts
said = {}
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes work, with folders to publish."""
    place = tmp_path_factory.mktemp("place")
    pipeline = make_pipeline(adm=True)
    pipeline.save_pretrained(place / "model")
    figures = {"classifier": {"step": 5, "held_out": HELD_OUT}}
    (place / "model" / "figures.json").write_text(json.dumps(figures))
    plain = make_pipeline()
    plain.unet.save_pretrained(place / "ddpm" / "unet")
    plain.scheduler.save_pretrained(place / "ddpm" / "scheduler")
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.42.0", "unet": ["diffusers", "UNet2DModel"],
             "scheduler": ["diffusers", "DDIMScheduler"]}
    (place / "ddpm" / "model_index.json").write_text(json.dumps(index))
    make_classifier(seed=2).save_pretrained(place / "classifier")
    return place


def client(hub: Hub, place: Path, script: str, token: str | None = TOKEN) -> dict:
    """What a script in a clean process says; its cache outlives it."""
    script = COMMON + textwrap.dedent(script) + "\nimport json\nprint('SAID' + json.dumps(said))\n"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=place, capture_output=True, text=True,
                         env={**os.environ, **hub.environment(place / "home", token)})
    assert run.returncode == 0, run.stderr[-4000:]
    assert TOKEN not in run.stdout + run.stderr
    return json.loads(run.stdout.partition("SAID")[2])


@pytest.fixture(scope="module")
def published(hub: Hub, place: Path) -> dict:
    """Push, and push again; broken uploads."""
    return client(hub, place, """
        from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier, hub
        from guided_diffusers.cli import main

        pipeline = ClassifierGuidedPipeline.from_pretrained("model")
        save_file({"images": images(pipeline)}, "images.safetensors")
        said["first"] = pipeline.push_to_hub("user/model", license="mit").oid
        NoiseAwareClassifier.from_pretrained("classifier").push_to_hub("user/classifier")

        hub.check = lambda *_: None  # the gate, which has shown itself twice here and has its own tests
        main(["push", "model", "user/hidden", "--private", "--no-picture"])
        hub.push("ddpm", "user/several", subfolder="inner", revision="side", picture=False)
        hub.push("ddpm", "user/ddpm", picture=False)
        # again, now sharded; then in one file, which leaves no shard behind
        options = {"max_shard_size": 20000, "picture": False}
        said["sharded"] = pipeline.push_to_hub("user/model", commit_message="again", **options).oid
        pipeline.push_to_hub("user/model", variant="fp16", picture=False)
        with torch.no_grad():
            pipeline.unet.conv_out.bias.add_(0.1)
        said["second"] = pipeline.push_to_hub("user/model", picture=False).oid
        save_file({"images": images(pipeline)}, "changed.safetensors")

        with torch.no_grad():
            pipeline.unet.conv_out.bias.add_(0.1)
        for name in ("upload", "commit"):
            fault(name)
            said[name] = error(pipeline.push_to_hub, "user/model", picture=False)
        fault("none")
        said["no token"] = error(pipeline.push_to_hub, "user/new", picture=False, token=False)
    """)


def test_a_push_is_one_commit_with_all_that_belongs_to_it(hub: Hub, published: dict) -> None:
    first = hub.files[published["first"]]
    assert first.keys() == {
        "README.md", "accuracy.png", "example.png", "figures.json", "model_index.json", "pipeline.py",
        f"unet/{WEIGHTS}", "unet/config.json", "unet/guided_diffusers_openai_unet.py",
        "scheduler/scheduler_config.json", "scheduler/guided_diffusers_openai_schedules.py", f"classifier/{WEIGHTS}",
        "classifier/config.json", "classifier/guided_diffusers_classifier.py"}
    assert not any(TOKEN.encode() in content for files in hub.files.values() for content in files.values())
    assert hub.head("user/classifier").keys() == {"README.md", WEIGHTS, "config.json", "guided_diffusers_classifier.py"}
    assert hub.private == {"user/hidden"}


def test_pushed_again_nothing_stale_is_left(hub: Hub, published: dict) -> None:
    sharded, second = (hub.files[published[name]].keys() for name in ("sharded", "second"))
    assert f"unet/{WEIGHTS}" not in sharded and f"unet/{WEIGHTS}.index.json" in sharded
    assert {name for name in second if name.startswith("unet/") and "safetensors" in name} == {
        f"unet/{WEIGHTS}", "unet/diffusion_pytorch_model.fp16.safetensors"}  # a variant stands beside the weights


def test_a_broken_upload_leaves_the_revision_as_it_was(hub: Hub, published: dict) -> None:
    assert hub.heads["user/model"] == {"main": published["second"]}
    assert "Error" in published["upload"] and "BadRequest" in published["commit"]
    assert "user/new" not in hub.heads and "401" in published["no token"]


@pytest.fixture(scope="module")
def with_package(hub: Hub, place: Path, published: dict) -> dict:
    return client(hub, place, f"first = {published['first']!r}" + textwrap.dedent("""
        import guided_diffusers
        from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
        from guided_diffusers.cli import main
        expected, changed = (load_file(f"{name}.safetensors")["images"] for name in ("images", "changed"))
        load = ClassifierGuidedPipeline.from_pretrained

        fault("download")
        said["Hub"] = torch.equal(images(load("user/model")), changed)
        said["cut off once"] = "and resumed"
        said["Hub, base class"] = torch.equal(images(DiffusionPipeline.from_pretrained("user/model")), changed)
        pipeline = load("user/model", revision=first)
        said["revision"] = torch.equal(images(pipeline), expected)
        pipeline.save_pretrained("saved")
        said["variant"] = torch.equal(images(load("user/model", variant="fp16")), expected)
        fault("always")
        said["offline"] = torch.equal(images(load("user/model", local_files_only=True)), changed)
        said["cut off always"] = error(load, "user/ddpm")
        fault("none")
        classifier = NoiseAwareClassifier.from_pretrained("user/classifier")
        joined = load("user/ddpm", classifier=classifier)
        said["network and classifier"] = joined.classifier is classifier and joined.unet is not None
        inner = load("user/several", subfolder="inner", revision="side", classifier=classifier)
        said["subfolder"] = torch.equal(images(inner), images(joined))
        said["private"] = error(load, "user/hidden", token=False)
        said["private, token"] = torch.equal(images(load("user/hidden")), expected)

        main(["pull", "user/model", "pulled", "--revision", first])
        said["pulled"] = torch.equal(images(load("pulled")), expected)
        main(["sample", "--model", "user/model", "--label", "boot", "--num-images", "2", "--num-inference-steps", "2",
              "--quiet", "--output", "picture.png"])
        snippets = Path("pulled/README.md").read_text().split("```python")[1:]
        exec(snippets[0].partition("```")[0])
        said["snippet"] = Path("image.png").exists() and Path("picture.png").exists()
        Path("image.png").unlink()

        broken = "pulled/unet/diffusion_pytorch_model.safetensors"
        whole = Path(broken).read_bytes()
        Path(broken).write_bytes(whole[:-100])
        said["broken"] = error(load, "pulled")
        said["broken, push"] = error(guided_diffusers.hub.push, "pulled", "user/model")
        Path(broken).write_bytes(whole)
    """))


def test_with_the_package(with_package: dict) -> None:
    for case in ("Hub", "Hub, base class", "revision", "variant", "offline", "network and classifier", "subfolder",
                 "private, token", "pulled", "snippet"):
        assert with_package[case] is True, case


def test_broken_downloads_and_refusals(with_package: dict) -> None:
    assert with_package["cut off always"] != "nothing was raised"
    assert re.match("RepositoryNotFoundError: 401.*make sure you are authenticated", with_package["private"], re.S)
    for case in ("broken", "broken, push"):
        assert f"unet/{WEIGHTS}" in with_package[case]


def test_loaded_and_saved_again_it_is_the_same(hub: Hub, place: Path, published: dict, with_package: dict) -> None:
    first = hub.files[published["first"]]
    saved = contents(place / "saved")
    assert saved == {path: first[path] for path in first if path not in (
        "README.md", "accuracy.png", "example.png", "figures.json")}


@pytest.fixture(scope="module")
def without_package(hub: Hub, place: Path, with_package: dict, published: dict) -> dict:
    return client(hub, place, f"first = {published['first']!r}" + textwrap.dedent("""
        sys.modules["guided_diffusers"] = None  # an import of it fails
        expected, changed = (load_file(f"{name}.safetensors")["images"] for name in ("images", "changed"))
        load = DiffusionPipeline.from_pretrained
        for name in ("user/model", str(Path("pulled").resolve())):
            said[f"refused {name}"] = error(load, name, custom_pipeline=name)
            said[f"no custom pipeline {name}"] = error(load, name)
        said["Hub"] = torch.equal(images(load("user/model", custom_pipeline="user/model", trust_remote_code=True)),
                                  changed)
        old = load("user/model", revision=first, custom_pipeline="user/model", custom_revision=first,
                   trust_remote_code=True)
        said["revision"] = torch.equal(images(old), expected)
        local = load("pulled", custom_pipeline="pulled", trust_remote_code=True)
        said["folder"] = torch.equal(images(local), expected)
        for name, pipeline in (("alone", old), ("alone2", local)):
            pipeline.save_pretrained(name)
        said["refused classifier"] = error(AutoModel.from_pretrained, "user/classifier")
        classifier = AutoModel.from_pretrained("user/classifier", trust_remote_code=True)
        classifier.save_pretrained("classifier2")
        with torch.no_grad():
            said["logits"] = classifier(torch.ones(1, 1, 8, 8), 3.5).logits.tolist()
        snippets = Path("pulled/README.md").read_text().split("```python")[1:]
        exec(snippets[1].partition("```")[0])
        said["snippet"] = Path("image.png").exists()
        from huggingface_hub import hf_hub_download
        for snippet in Path(hf_hub_download("user/classifier", "README.md")).read_text().split("```python")[2:]:
            exec(snippet.partition("```")[0])
            said["snippet of the classifier"] = list(logits.shape)
    """))


def test_without_the_package(place: Path, published: dict, hub: Hub, without_package: dict) -> None:
    for case in ("Hub", "revision", "folder", "snippet"):
        assert without_package[case] is True, case
    assert without_package["snippet of the classifier"] == [1, 3]
    import torch
    with torch.no_grad():
        logits = make_classifier(seed=2).eval()(torch.ones(1, 1, 8, 8), 3.5).logits.tolist()
    assert without_package["logits"] == logits
    for name in ("alone", "alone2"):
        assert contents(place / name) == contents(place / "saved")
    assert contents(place / "classifier2") == contents(place / "classifier")


def test_training_publishes_what_it_made(hub: Hub, place: Path, published: dict) -> None:
    from PIL import Image

    for i in range(24):
        folder = place / "photos" / ("train" if i < 16 else "test") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * i).save(folder / f"{i}.png")
    config = {name: value for name, value in make_classifier().config.items() if not name.startswith("_")}
    (place / "config.json").write_text(json.dumps({**config, "id2label": None, "label2id": None}))
    command = [sys.executable, Path(__file__).parents[1] / "training" / "train_classifier.py", "--train_data_dir",
               place / "photos", "--resolution", "8", "--train_batch_size", "4", "--max_train_steps", "2", "--cpu",
               "--model_config_name_or_path", place / "config.json", "--output_dir", place / "trained", "--no_progress"]
    environment = {**os.environ, **hub.environment(place / "home")}
    run = subprocess.run([*command, "--push_to_hub", "--hub_model_id", "user/trained"], env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"published: {hub.url}/user/trained/commit/" in run.stdout and TOKEN not in run.stdout + run.stderr
    files = hub.head("user/trained")
    assert "## Training\n\nTrained on photos" in files["README.md"].decode()
    figures = json.loads(files["figures.json"])["classifier"]
    assert len(figures["held_out"]) == 10 and figures["options"]["train_data_dir"] == "photos"
    assert not {"metrics.json", "options.json"} & files.keys() and "output_dir" not in figures["options"]


def test_without_trust_no_code_of_a_repository_runs(without_package: dict) -> None:
    refused = [text for case, text in without_package.items() if case.startswith("refused")]
    assert len(refused) == 3 and all(re.match("ValueError.*trust_remote_code=True", text, re.S) for text in refused)
    missing = [text for case, text in without_package.items() if case.startswith("no custom")]
    assert len(missing) == 2 and all("no attribute ClassifierGuidedPipeline" in text for text in missing)

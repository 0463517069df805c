"""Publishing and loading against a server that speaks the Hub's protocol, with the real client in clean processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from test_clip import CAPTIONS, IMAGE, TEXT, make_clip
from test_hub import HELD_OUT, WEIGHTS, contents, make_classifier, make_pipeline

LARGE = 24_000_000  # bytes: the client keeps what it has in pieces of ten million
TRAINING = Path(__file__).parents[1] / "training"

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
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/fault/" + name, b"", method="PUT"))

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
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.42.0",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (place / "ddpm" / "model_index.json").write_text(json.dumps(index))
    make_classifier(seed=2).save_pretrained(place / "classifier")
    (place / "classifier" / "README.md").write_text("# Mine\n\nWritten by a person.\n")
    make_clip().save_pretrained(place / "clip")
    return place


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a second virtual environment, which has all that this one has, but for this package."""
    place = tmp_path_factory.mktemp("stranger")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=120)
    packages = Path(
        sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)})
    )
    for path in {
        path
        for entry in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
        for path in Path(entry).iterdir()
    }:
        if path.suffix != ".pth" and "guided_diffusers" not in path.name:
            (packages / path.name).symlink_to(path)
    return place / "bin" / "python"


def client(hub: Hub, place: Path, script: str, python: Path | str = sys.executable) -> dict:
    """What a script in a clean process says; its cache outlives it."""
    script = COMMON + textwrap.dedent(script) + "\nimport json\nprint('SAID' + json.dumps(said))\n"
    environment = {**os.environ, **hub.environment(place / "home")}
    if python != sys.executable:  # the stranger's, which must not find this package
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [path for path in paths if not (Path(path) / "guided_diffusers").exists()]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    run = subprocess.run(
        [python, "-W", "ignore", "-c", script],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert TOKEN not in run.stdout + run.stderr
    return json.loads(run.stdout.partition("SAID")[2])


@pytest.fixture(scope="module")
def published(hub: Hub, place: Path) -> dict:
    """Push, and push again; broken uploads."""
    return client(
        hub,
        place,
        """
        from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP, hub
        from guided_diffusers.cli import main

        pipeline = ClassifierGuidedPipeline.from_pretrained("model")
        save_file({"images": images(pipeline)}, "images.safetensors")
        said["first"] = pipeline.push_to_hub("user/model", license="mit").oid
        NoiseAwareClassifier.from_pretrained("classifier").push_to_hub("user/classifier")
        NoiseAwareCLIP.from_pretrained("clip").save_pretrained("clip", push_to_hub=True, repo_id="user/clip")

        hub.publish.check = lambda *_: None  # the gate, which has shown itself here and has its own tests
        main(["push", "model", "user/hidden", "--private", "--no-picture"])
        hub.push("ddpm", "user/several", subfolder="inner", revision="side", picture=False)
        hub.push("ddpm", "user/ddpm", picture=False)
        # again, now sharded; then in one file, which leaves no shard behind
        options = {"max_shard_size": 20000, "picture": False}
        said["sharded"] = pipeline.push_to_hub("user/model", commit_message="again", **options).oid
        pipeline.push_to_hub("user/model", variant="fp16", picture=False)
        pipeline.save_pretrained("half", variant="fp16")
        hub.push("half", "user/several", subfolder="inner/half", variant="fp16", revision="side", picture=False)
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
    """,
    )


def test_a_push_is_one_commit_with_all_that_belongs_to_it(hub: Hub, published: dict) -> None:
    first = hub.files[published["first"]]
    assert first.keys() == {
        "README.md",
        "figure-levels.png",
        "example.png",
        "figures.json",
        "model_index.json",
        "pipeline.py",
        f"unet/{WEIGHTS}",
        "unet/config.json",
        "unet/guided_diffusers_openai_unet.py",
        "scheduler/scheduler_config.json",
        "scheduler/guided_diffusers_openai_schedules.py",
        f"classifier/{WEIGHTS}",
        "classifier/config.json",
        "classifier/guided_diffusers_classifier.py",
    }
    assert not any(
        TOKEN.encode() in content for files in hub.files.values() for content in files.values()
    )
    classifier = hub.head("user/classifier")
    assert classifier.keys() == {
        "README.md",
        WEIGHTS,
        "config.json",
        "guided_diffusers_classifier.py",
    }
    assert classifier["README.md"].decode() == "# Mine\n\nWritten by a person.\n"
    assert hub.head("user/clip").keys() == {
        "README.md",
        WEIGHTS,
        "config.json",
        "guided_diffusers_clip.py",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    assert hub.private == {"user/hidden"}


def test_pushed_again_nothing_stale_is_left(hub: Hub, published: dict) -> None:
    sharded, second = (hub.files[published[name]].keys() for name in ("sharded", "second"))
    assert f"unet/{WEIGHTS}" not in sharded and f"unet/{WEIGHTS}.index.json" in sharded
    assert {name for name in second if name.startswith("unet/") and "safetensors" in name} == {
        f"unet/{WEIGHTS}",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }  # a variant stands beside the weights


def test_a_broken_upload_leaves_the_revision_as_it_was(hub: Hub, published: dict) -> None:
    assert hub.heads["user/model"] == {"main": published["second"]}
    assert "Error" in published["upload"] and "BadRequest" in published["commit"]
    assert "user/new" not in hub.heads and "401" in published["no token"]


@pytest.fixture(scope="module")
def with_package(hub: Hub, place: Path, published: dict) -> dict:
    index = json.loads(hub.head("user/model")["model_index.json"])
    files = {
        **hub.files[published["first"]],
        "classifier/evil.py": b"open('ran', 'w')\nclass Evil: pass\n",
        "model_index.json": json.dumps({**index, "classifier": ["evil", "Evil"]}).encode(),
    }
    hub.commit("user/evil", "main", files)
    header = json.dumps(
        {"x": {"dtype": "U8", "shape": [LARGE], "data_offsets": [0, LARGE]}}
    ).encode()
    hub.commit(
        "user/large",
        "main",
        {"x.safetensors": len(header).to_bytes(8, "little") + header + bytes(LARGE)},
    )
    hub.commit("user/outside", "main", {"../outside.json": b"{}", "config.json": b"{}"})
    return client(
        hub,
        place,
        f"first = {published['first']!r}"
        + textwrap.dedent("""
        import guided_diffusers
        from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP
        from guided_diffusers.cli import main
        expected, changed = (load_file(f"{name}.safetensors")["images"] for name in ("images", "changed"))
        load = ClassifierGuidedPipeline.from_pretrained

        fault("download")
        said["Hub"] = torch.equal(images(load("user/model")), changed)
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
        half = {"subfolder": "inner/half", "revision": "side", "variant": "fp16"}
        said["subfolder, variant"] = torch.equal(images(load("user/several", **half)), expected)
        said["and offline"] = torch.equal(images(load("user/several", **half, local_files_only=True)), expected)
        clip = NoiseAwareCLIP.from_pretrained("user/clip")
        save_file({"texts": clip.encode_prompts(["a dark image"])}, "texts.safetensors")
        said["folder"] = torch.equal(images(load("model")), expected)
        said["code of the repository"] = error(load, "user/evil")
        said["code of the repository, pull"] = error(guided_diffusers.hub.pull, "user/evil", "evil")
        fault("download")
        guided_diffusers.hub.pull("user/large", "large")
        said["path out"] = error(guided_diffusers.hub.pull, "user/outside", "out/side")
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
    """),
    )


def test_with_the_package(hub: Hub, place: Path, with_package: dict) -> None:
    for case in (
        "Hub",
        "Hub, base class",
        "revision",
        "variant",
        "offline",
        "network and classifier",
        "subfolder",
        "private, token",
        "pulled",
        "snippet",
        "folder",
        "subfolder, variant",
        "and offline",
    ):
        assert with_package[case] is True, case
    assert any(
        re.match(r"bytes=[1-9]\d*-", asked) for asked in hub.ranges
    )  # what was cut off once went on
    assert (place / "large" / "x.safetensors").read_bytes() == hub.head("user/large")[
        "x.safetensors"
    ]


def test_broken_downloads_and_refusals(place: Path, with_package: dict) -> None:
    for case in ("code of the repository", "code of the repository, pull"):
        assert re.match(
            r"ValueError.*classifier is \['evil', 'Evil'\], code of the repos",
            with_package[case],
            re.S,
        )
    assert "'../outside.json', whose path leaves the folder" in with_package["path out"]
    assert (
        not list(place.rglob("ran"))
        and not list(place.rglob("outside.json"))
        and not (place / "out").exists()
    )
    assert with_package["cut off always"] != "nothing was raised"
    assert re.match(
        "RepositoryNotFoundError: 401.*make sure you are authenticated",
        with_package["private"],
        re.S,
    )
    for case in ("broken", "broken, push"):
        assert f"unet/{WEIGHTS}" in with_package[case]


def test_loaded_and_saved_again_it_is_the_same(
    hub: Hub, place: Path, published: dict, with_package: dict
) -> None:
    first = hub.files[published["first"]]
    saved = contents(place / "saved")
    assert saved == {
        path: first[path]
        for path in first
        if path not in ("README.md", "figure-levels.png", "example.png", "figures.json")
    }


@pytest.fixture(scope="module")
def without_package(
    hub: Hub, place: Path, stranger: Path, with_package: dict, published: dict
) -> dict:
    return client(
        hub,
        place,
        f"first = {published['first']!r}"
        + textwrap.dedent("""
        said["guided_diffusers"] = error(__import__, "guided_diffusers")
        expected, changed = (load_file(f"{name}.safetensors")["images"] for name in ("images", "changed"))
        load = DiffusionPipeline.from_pretrained
        for name in ("user/model", str(Path("pulled").resolve())):
            said[f"refused {name}"] = error(load, name, custom_pipeline=name)
            said[f"refused, no custom pipeline {name}"] = error(load, name)
            plain = load(name, trust_remote_code=True)
            said[f"no custom pipeline {name}"] = torch.equal(images(plain), changed if "user" in name else expected)
        said["Hub"] = torch.equal(images(load("user/model", custom_pipeline="user/model", trust_remote_code=True)),
                                  changed)
        options = {"custom_pipeline": "user/model", "trust_remote_code": True}
        said["variant"] = torch.equal(images(load("user/model", variant="fp16", **options)), expected)
        said["offline"] = torch.equal(images(load("user/model", local_files_only=True, **options)), changed)
        old = load("user/model", revision=first, custom_pipeline="user/model", custom_revision=first,
                   trust_remote_code=True)
        said["revision"] = torch.equal(images(old), expected)
        local = load("pulled", custom_pipeline="pulled", trust_remote_code=True)
        said["folder"] = torch.equal(images(local), expected)
        old.save_pretrained("saved from the Hub")
        local.save_pretrained("saved from a folder")
        again = load("saved from the Hub", custom_pipeline="saved from the Hub", trust_remote_code=True)
        said["saved"] = torch.equal(images(again), expected)
        old.push_to_hub("user/pushed")  # by Diffusers' own method
        again = load("user/pushed", custom_pipeline="user/pushed", trust_remote_code=True)
        said["pushed"] = torch.equal(images(again), expected)
        said["refused classifier"] = error(AutoModel.from_pretrained, "user/classifier")
        classifier = AutoModel.from_pretrained("user/classifier", trust_remote_code=True)
        classifier.save_pretrained("classifier2")
        with torch.no_grad():
            said["logits"] = classifier(torch.ones(1, 1, 8, 8), 3.5).logits.tolist()
        snippets = Path("pulled/README.md").read_text().split("```python")[1:]
        exec(snippets[1].partition("```")[0])
        said["snippet"] = Path("image.png").exists()
        said["refused CLIP"] = error(AutoModel.from_pretrained, "user/clip")
        clip = AutoModel.from_pretrained("user/clip", trust_remote_code=True)
        clip.save_pretrained("clip2")
        said["texts"] = torch.equal(clip.encode_prompts(["a dark image"]), load_file("texts.safetensors")["texts"])
        from huggingface_hub import hf_hub_download
        exec(Path(hf_hub_download("user/clip", "README.md")).read_text().split("```python")[2].partition("```")[0])
        said["snippet of the CLIP"] = list(cosines.shape)
    """),
        stranger,
    )


def test_without_the_package(place: Path, published: dict, hub: Hub, without_package: dict) -> None:
    for case in (
        "Hub",
        "revision",
        "variant",
        "offline",
        "folder",
        "snippet",
        "texts",
        "saved",
        "pushed",
    ):
        assert without_package[case] is True, case
    assert without_package["guided_diffusers"].startswith("ModuleNotFoundError")
    assert without_package["snippet of the CLIP"] == [1, 2]
    import torch

    with torch.no_grad():
        logits = make_classifier(seed=2).eval()(torch.ones(1, 1, 8, 8), 3.5).logits.tolist()
    assert without_package["logits"] == logits
    saved = contents(place / "saved")  # with the package
    assert contents(place / "saved from the Hub") == saved
    assert contents(place / "saved from a folder") == saved
    pushed = hub.head("user/pushed")
    assert {path: pushed[path] for path in saved} == saved
    assert contents(place / "classifier2").items() == contents(place / "classifier").items() - {
        ("README.md", b"# Mine\n\nWritten by a person.\n")
    }
    assert contents(place / "clip2") == contents(place / "clip")


def test_without_trust_no_code_of_a_repository_runs(without_package: dict) -> None:
    refused = [text for case, text in without_package.items() if case.startswith("refused")]
    assert len(refused) == 6 and all(
        re.match("ValueError.*trust_remote_code=True", text, re.S) for text in refused
    )


def test_the_four_cases_in_one_table(
    with_package: dict, without_package: dict, place: Path
) -> None:
    """`pytest -s tests/test_hub_server.py -k four_cases` prints it."""

    def refused(said: dict, *cases: str) -> list[str]:
        return [
            "refused: "
            + re.sub(r"\s+", " ", next(said[case] for case in said if case.startswith(one)))[:110]
            for one in cases
        ]

    folder = str((place / "pulled").resolve())
    rows = [
        ["", "folder", "Hub"],
        ["with the package", with_package["folder"], with_package["Hub"]],
        ["without, trust_remote_code", without_package["folder"], without_package["Hub"]],
        ["without, no trust", *refused(without_package, f"refused {folder}", "refused user/model")],
        [
            "without, no custom_pipeline",
            without_package[f"no custom pipeline {folder}"],
            without_package["no custom pipeline user/model"],
        ],
        ["broken weights; other code", *refused(with_package, "broken", "code of the repository")],
        ["private, no token", "", *refused(with_package, "private")],
    ]
    for name, *cells in rows:
        print(
            f"{name:28}",
            *(f"{'images equal' if cell is True else str(cell):112}" for cell in cells),
        )
    for row in (*rows[1:3], rows[4]):
        assert row[1:] == [True, True], row
    for row in (rows[3], *rows[5:]):
        assert all("nothing was raised" not in cell for cell in row[1:]), row


def test_pulled_again_nothing_stale_is_loaded(hub: Hub, place: Path) -> None:
    """Of shards, then one file, then shards; files of no pull stay, and one that would hide the weights is refused."""
    said = client(
        hub,
        place,
        """
        from guided_diffusers import NoiseAwareClassifier, hub
        hub.publish.check = lambda *_: None
        model = NoiseAwareClassifier.from_pretrained("classifier")
        def put(shards):
            with torch.no_grad():
                model.head[-1].out.weight.add_(1)
            model.push_to_hub("user/again", max_shard_size=shards)
        def got():
            hub.pull("user/again", "again")
            theirs = NoiseAwareClassifier.from_pretrained("again").head[-1].out.weight
            return [torch.equal(theirs, model.head[-1].out.weight),
                    sorted(path.name for path in Path("again").glob("*.safetensors*"))]

        put(6000)
        said["shards"] = got()
        mine = ["again/mine.safetensors", "again/inner/diffusion_pytorch_model.safetensors",
                "again/inner/diffusion_pytorch_model.safetensors.index.json"]
        Path("again/inner").mkdir()
        for name in mine:
            save_file({"x": torch.zeros(1)}, name)
        put("1GB")
        said["one"] = got()
        put(6000)
        said["shards again"] = got()
        put("1GB")
        said["one again"] = got()
        said["mine"] = all(Path(name).exists() for name in mine)

        model.save_pretrained("own", max_shard_size=6000)
        before = {path: path.read_bytes() for path in Path("own").rglob("*") if path.is_file()}
        said["own"] = error(hub.pull, "user/again", "own")
        said["as it was"] = before == {path: path.read_bytes() for path in Path("own").rglob("*") if path.is_file()}
    """,
    )
    assert (
        said["shards"][0]
        and f"{WEIGHTS}.index.json" in said["shards"][1]
        and len(said["shards"][1]) > 2
    )
    assert said["one"] == said["one again"] == [True, [WEIGHTS, "mine.safetensors"]]
    assert said["shards again"] == [True, [*said["shards"][1], "mine.safetensors"]]
    assert said["mine"] and said["as it was"]
    assert re.match(
        rf"ValueError: own/{WEIGHTS}.index.json was not written by pull and hides {WEIGHTS} of user/again",
        said["own"],
    )


def test_pull_overwrites_only_what_it_wrote(hub: Hub, place: Path) -> None:
    files = {"config.json": b"{}", "README.md": b"one", "unet/config.json": b"1"}
    header = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    files["x.safetensors"] = len(header).to_bytes(8, "little") + header + b"1"
    later = {
        **files,
        "README.md": b"two",
        "more.md": b"more",
        "x.safetensors": files["x.safetensors"][:-1] + b"2",
    }
    hub.commit("user/files", "main", files)
    hub.commit("user/other", "main", {**later, "README.md": b"other"})
    hub.commit("user/pickles", "main", {"model.BIN": b"x", "config.json": b"{}"})
    hub.commit("user/empty", "main", {"data.csv": b"x"})
    hub.commit(
        "user/hidden-files",
        "main",
        {
            **files,
            ".cache/guided_diffusers/pull.json": b"{}",
            "a/.b.json": b"{}",
            ".eval_results/accuracy.yaml": b"[]",
            ".eval_results/x.py": b"",
        },
    )
    script = """
        from guided_diffusers import hub
        def snapshot():
            paths = [path for path in Path(name).rglob("*") if path.is_file() and ".cache" not in path.parts]
            return {path.as_posix(): path.read_bytes().decode("latin-1") for path in sorted(paths)}
        def attempt(case, repo="user/files"):
            before = snapshot()
            said[case] = [error(hub.pull, repo, name), snapshot() == before]
        name = "mine"
        Path(name).mkdir()
        Path(name, "README.md").write_text("mine")
        attempt("mine")
        Path(name, "README.md").write_text("one")  # the same content isn't overwritten
        attempt("equal")
        name = "linked"
        Path(name).mkdir()
        Path("elsewhere").mkdir()
        Path(name, "unet").symlink_to(Path("elsewhere").resolve())
        attempt("link")
        Path(name, "unet").unlink()
        Path(name, "unet").write_text("a file")
        attempt("file in the way")
        said["elsewhere"] = [path.name for path in Path("elsewhere").iterdir()]
        name = "pull2"
        for repo in ("pickles", "empty", "hidden-files"):
            name = f"pulled-{repo}"
            attempt(repo, f"user/{repo}")
            said[f"{repo} files"] = sorted(snapshot())
        name = "good"
        attempt("first")
    """
    said = client(hub, place, script)
    refused = (
        "ValueError: {} has files that are not from an earlier pull of user/files, or were changed"
    )
    assert (
        said["mine"][0].startswith(refused.format("mine"))
        and "since: README.md; nothing" in said["mine"][0]
    )
    assert said["mine"][1] and said["equal"] == ["nothing was raised", False]
    for case in ("link", "file in the way"):
        assert "unet/config.json; nothing was written" in said[case][0] and said[case][1]
    assert said["elsewhere"] == []
    assert (
        said["pickles"][0].startswith("ValueError: user/pickles has only pickled weights")
        and said["pickles"][1]
    )
    assert "model.BIN" in said["pickles"][0] and not (place / "pulled-pickles").exists()
    assert said["empty"][0].startswith("ValueError: user/empty has no file of a model")
    pulled = sorted([*files, ".eval_results/accuracy.yaml"])
    assert said["hidden-files files"] == [f"pulled-hidden-files/{name}" for name in pulled]
    assert said["first"] == ["nothing was raised", False]

    hub.commit("user/files", "main", later)
    said = client(
        hub,
        place,
        script.partition('        name = "mine"')[0]
        + """
        name = "good"
        attempt("another repository", "user/other")
        Path(name, "mine.txt").write_text("mine")
        Path(name, "README.md").write_text("edited")
        attempt("edited")
        Path(name, "README.md").write_text("one")
        attempt("updated")
        said["files"] = snapshot()
        attempt("again")
        Path(name, ".cache/guided_diffusers/pull.json").write_text('{"repo": "user/files", "files": {}}')
        attempt("after an interruption")
    """,
    )
    assert "pull of user/other" in said["another repository"][0] and said["another repository"][1]
    assert "since: README.md; nothing was written" in said["edited"][0] and said["edited"][1]
    assert said["updated"] == ["nothing was raised", False]
    expected = {f"good/{name}": content.decode("latin-1") for name, content in later.items()}
    assert said["files"] == expected | {"good/mine.txt": "mine"}
    assert said["again"] == said["after an interruption"] == ["nothing was raised", True]


def test_a_card_on_the_hub_is_heeded(hub: Hub, place: Path) -> None:
    """Of one that was made the licence and datasets go on; one that a person edited stays, unless another comes."""
    said = client(
        hub,
        place,
        """
        from huggingface_hub import HfApi, ModelCard, hf_hub_download
        from guided_diffusers import NoiseAwareClassifier, hub
        hub.publish.check = lambda *_: None
        def told(name="README.md", revision=None):
            return Path(hf_hub_download("user/card", name, revision=revision)).read_text()
        def names():
            data = ModelCard(told()).data
            return [data.license, data.datasets]

        NoiseAwareClassifier.from_pretrained("classifier").save_pretrained("plain")
        hub.push("plain", "user/card", license="mit", datasets=["someone/clothes"])
        loaded = NoiseAwareClassifier.from_pretrained("user/card")
        loaded.push_to_hub("user/card")
        said["kept"] = names()
        loaded.push_to_hub("user/card", license="apache-2.0")
        said["given"] = names()
        hub.card("plain", license="cc-by-4.0")
        hub.push("plain", "user/card")
        said["of the folder"] = names()
        Path("plain/README.md").unlink()

        edited = told().replace("A noise-aware", "My noise-aware")
        side = {"subfolder": "inner/", "revision": "side"}
        hub.push("plain", "user/card", **side)
        put = HfApi().upload_file
        put(repo_id="user/card", path_in_repo="README.md", path_or_fileobj=edited.encode())
        put(repo_id="user/card", path_in_repo="inner/README.md", path_or_fileobj=b"# Inner", revision="side")
        with torch.no_grad():
            loaded.head[-1].out.weight.add_(1)
        loaded.push_to_hub("user/card")
        hub.push("plain", "user/card", **side)
        said["edited"] = told() == edited and "My noise-aware" in edited
        again = NoiseAwareClassifier.from_pretrained("user/card")
        said["weights"] = torch.equal(again.head[-1].out.weight, loaded.head[-1].out.weight)
        said["inner"] = told("inner/README.md", "side")
        said["refused"] = error(loaded.push_to_hub, "user/card", license="mit")
        hub.push("classifier", "user/card")
        said["of a person"] = told()
    """,
    )
    assert said["kept"] == ["mit", ["someone/clothes"]] and said["given"] == [
        "apache-2.0",
        ["someone/clothes"],
    ]
    assert said["of the folder"] == ["cc-by-4.0", ["someone/clothes"]]
    assert said["edited"] and said["weights"] and said["inner"] == "# Inner"
    assert said["refused"].startswith(
        "ValueError: license: README.md of user/card was written or edited by a user"
    )
    assert said["of a person"] == "# Mine\n\nWritten by a person.\n"


def train(hub: Hub, place: Path, script: str, name: str, *more: object) -> tuple[dict, dict]:
    """Two steps on a few images, published: the repository's files, and the figures in them."""
    from PIL import Image

    for i in range(24):
        folder = place / "photos" / ("train" if i < 16 else "test") / ("dark", "light")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * i).save(folder / f"{i}.png")
    run = subprocess.run(
        [
            sys.executable,
            TRAINING / script,
            "--train_data_dir",
            place / "photos",
            "--resolution",
            "8",
            "--cpu",
            "--train_batch_size",
            "4",
            "--max_train_steps",
            "2",
            "--output_dir",
            place / name,
            "--no_progress",
            *more,
            "--push_to_hub",
            "--hub_model_id",
            f"user/{name}",
        ],
        env={**os.environ, **hub.environment(place / "home")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert (
        f"published: {hub.url}/user/{name}/commit/" in run.stdout
        and TOKEN not in run.stdout + run.stderr
    )
    files = hub.head(f"user/{name}")
    assert "## Training\n\nTrained on photos" in files["README.md"].decode()
    assert not {"metrics.json", "options.json"} & files.keys()
    return files, json.loads(files["figures.json"])


def test_training_publishes_what_it_made(hub: Hub, place: Path, published: dict) -> None:
    config = {
        name: value for name, value in make_classifier().config.items() if not name.startswith("_")
    }
    (place / "config.json").write_text(json.dumps({**config, "id2label": None, "label2id": None}))
    _, figures = train(
        hub,
        place,
        "train_classifier.py",
        "trained",
        "--model_config_name_or_path",
        place / "config.json",
    )
    figures = figures["classifier"]
    assert len(figures["held_out"]) == 10 and figures["options"]["train_data_dir"] == "photos"
    assert "output_dir" not in figures["options"]


def test_training_a_clip_publishes_it(hub: Hub, place: Path, published: dict) -> None:
    for name, content in (("image", IMAGE), ("text", TEXT), ("captions", CAPTIONS)):
        (place / f"{name}.json").write_text(json.dumps(content))
    files, figures = train(
        hub,
        place,
        "train_clip.py",
        "trained-clip",
        "--captions",
        place / "captions.json",
        "--text_config",
        place / "text.json",
        "--model_config_name_or_path",
        place / "image.json",
    )
    assert {"guided_diffusers_clip.py", "tokenizer/tokenizer.json", WEIGHTS} <= files.keys()
    assert figures["clip"]["held_out"][0].keys() >= {"retrieval", "zero_shot"}
    assert "Zero-shot accuracy of clip" in files["README.md"].decode()


def test_no_token_is_written(place: Path, with_package: dict, without_package: dict) -> None:
    assert not [
        path for path in place.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]

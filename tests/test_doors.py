"""Every line by which Diffusers loads or runs what we publish: with this package and without, from a folder, the Hub,
and the cache without a network. `examples/doors.md` has the results; `WRITE_DOORS=1 pytest tests/test_doors.py` writes
them.
"""

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
from test_hub import contents, make_classifier, make_pipeline
from test_hub_server import stranger  # noqa: F401

TABLE = Path(__file__).parents[1] / "examples" / "doors.md"
WORKS = "works"

PRELUDE = """
import json, os, socket, sys, time
from pathlib import Path
from types import SimpleNamespace as Namespace
import numpy as np
import torch
from diffusers import AutoModel, DDIMScheduler, DiffusionPipeline, ModularPipelineBlocks
from diffusers.commands import diffusers_cli
from diffusers.modular_pipelines import BlockState
from huggingface_hub import close_session, try_to_load_from_cache
from PIL import Image
from safetensors.torch import load_file, save_file
time.sleep = lambda seconds: None  # between the client's attempts
CALL = {"label": "boot", "num_inference_steps": 2}

def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(**CALL, generator=torch.Generator().manual_seed(0)).images[0]
    return torch.from_numpy(np.array(image))

def logits(classifier):
    with torch.no_grad():
        return classifier(torch.ones(1, 1, 8, 8), 3.5).logits

def prediction(block):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(2)
    parts = Namespace(scheduler=scheduler, classifier=CLASSIFIER)
    state = BlockState(latents=torch.ones(1, 1, 8, 8), noise_pred=torch.zeros(1, 1, 8, 8), label=1, guidance_scale=2.0)
    return block(parts, state, 0, scheduler.timesteps[0])[1].noise_pred

def command(model):
    sys.argv = ["diffusers-cli", "run", "--model", model, "--trust-remote-code", "--seed", "0",
                "--pipeline-kwargs", json.dumps(CALL), "--output", f"cli{os.getpid()}.png"]
    Path(sys.argv[-1]).unlink(missing_ok=True)
    diffusers_cli.main()
    return torch.from_numpy(np.array(Image.open(sys.argv[-1])))

def outcome(door, name, result):
    try:
        return "works" if torch.equal(door(name), EXPECTED[result]) else "another result"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
"""

DOORS = """
EXPECTED = load_file("expected.safetensors")
CLASSIFIER = AutoModel.from_pretrained("classifier", trust_remote_code=True)
base, trust = DiffusionPipeline.from_pretrained, {"trust_remote_code": True}
doors = {
    "`DiffusionPipeline.from_pretrained(X)`": (lambda x: picture(base(x)), "model"),
    "`DiffusionPipeline.from_pretrained(X, trust_remote_code=True)`": (lambda x: picture(base(x, **trust)), "model"),
    "the same with `custom_pipeline=X`": (lambda x: picture(base(x, custom_pipeline=x, **trust)), "model"),
    "`AutoModel.from_pretrained(X)`, a classifier": (lambda x: logits(AutoModel.from_pretrained(x)), "classifier"),
    "`AutoModel.from_pretrained(X, trust_remote_code=True)`":
        (lambda x: logits(AutoModel.from_pretrained(x, **trust)), "classifier"),
    "`ModularPipelineBlocks.from_pretrained(X, trust_remote_code=True)`":
        (lambda x: prediction(ModularPipelineBlocks.from_pretrained(x, **trust)), "block"),
}
if PACKAGE:
    from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
    doors["`ClassifierGuidedPipeline.from_pretrained(X)`"] = (
        lambda x: picture(ClassifierGuidedPipeline.from_pretrained(x)), "model")
    doors["`NoiseAwareClassifier.from_pretrained(X)`"] = (
        lambda x: logits(NoiseAwareClassifier.from_pretrained(x)), "classifier")
else:  # the command doesn't import the package, installed or not
    doors["`diffusers-cli run --model X --trust-remote-code`"] = (command, "model")

def try_all(column, place):
    for line, (door, kind) in doors.items():
        said.setdefault(line, {})[column] = outcome(door, place(kind), kind)

def snapshot(kind):
    name = {"model": "model_index.json", "classifier": "config.json", "block": "modular_config.json"}[kind]
    return str(Path(try_to_load_from_cache(f"user/{kind}", name)).parent)

hub = "user/{}".format
if os.environ["HF_HUB_OFFLINE"] == "1":
    try_all("`HF_HUB_OFFLINE=1`", hub)
    try_all("snapshot's folder, offline", snapshot)
else:
    try_all("folder", str)
    try_all("Hub", hub)
    def gone(*_):
        raise OSError(101, "Network is unreachable")
    close_session()
    socket.socket.connect = gone
    try_all("network gone", hub)
"""


def client(hub: Hub, place: Path, script: str, python: Path | str, offline: bool = False) -> dict:
    """What a script says in a process with this package, or the stranger's, which has none."""
    package = python == sys.executable
    start = f"PACKAGE, said = {package}, {{}}\n" + "import guided_diffusers\n" * package
    script = start + PRELUDE + textwrap.dedent(script) + "\nprint('SAID' + json.dumps(said))\n"
    environment = {**os.environ, **hub.environment(place / ("home" if package else "home2"))}
    environment["HF_HUB_OFFLINE"] = str(int(offline))
    if not package:
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [path for path in paths if not (Path(path) / "guided_diffusers").exists()]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    options = {"cwd": place, "capture_output": True, "text": True, "timeout": 600}
    run = subprocess.run([python, "-W", "ignore", "-c", script], env=environment, **options)
    assert run.returncode == 0, run.stderr[-4000:]
    assert TOKEN not in run.stdout + run.stderr
    return json.loads(run.stdout.partition("SAID")[2])


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def results(hub: Hub, stranger: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:  # noqa: F811
    """{whether with the package: {line: {place: outcome}}}."""
    place = tmp_path_factory.mktemp("doors")
    make_pipeline().save_pretrained(place / "model")
    make_classifier().save_pretrained(place / "classifier")
    publish = """
        import guided_diffusers
        from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
        from guided_diffusers.modular import ClassifierGuidanceBlock
        guided_diffusers.hub.publish.check = lambda *_: None  # the gate, which has its own tests
        CLASSIFIER = NoiseAwareClassifier.from_pretrained("classifier")
        ClassifierGuidanceBlock().save_pretrained("block")
        expected = {"model": picture(ClassifierGuidedPipeline.from_pretrained("model")), "classifier":
                    logits(CLASSIFIER), "block": prediction(ClassifierGuidanceBlock())}
        assert expected["block"].any() and expected["model"].any()
        save_file(expected, "expected.safetensors")
        guided_diffusers.hub.push("model", "user/model", picture=False)
        CLASSIFIER.push_to_hub("user/classifier")
        ClassifierGuidanceBlock().push_to_hub("user/block")
        guided_diffusers.hub.push("block", "user/folder-of-block")
    """
    client(hub, place, publish, sys.executable)
    assert {"README.md", *contents(place / "block")} == hub.head("user/block").keys()
    assert contents(place / "block").keys() == hub.head("user/folder-of-block").keys()
    results = {}
    for package, python in ((True, sys.executable), (False, stranger)):
        results[package] = client(hub, place, DOORS, python)
        for line, outcomes in client(hub, place, DOORS, python, offline=True).items():
            results[package][line] |= outcomes
    for lines in results.values():
        for outcomes in lines.values():
            for column, text in outcomes.items():
                outcomes[column] = anywhere(text, place, hub)
    return results


def anywhere(text: str, place: Path, hub: Hub) -> str:
    """An outcome's text without what differs from run to run."""
    text = re.sub(r"\s+", " ", text).replace(hub.url, "the Hub").replace("|", "/")
    changing = rf"{re.escape(str(place))}[\w./-]*|[0-9a-f]{{40}}|\(Request ID[^)]*\)"
    return re.sub(changing, "...", text)


def in_short(text: str) -> str:
    """A cell of the table."""
    words = text.split(" ")
    short = " ".join(words[:10])
    return text if text == WORKS else f"refused: {short}{' ...' * (len(words) > 10)}"


def as_table(lines: dict[str, dict[str, str]]) -> str:
    columns = list(next(iter(lines.values())))
    rows = [["X is", *columns], ["---"] * (len(columns) + 1)]
    rows += [[line, *(in_short(lines[line][column]) for column in columns)] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_table_of_doors(results: dict) -> None:
    if os.environ.get("WRITE_DOORS"):
        head = TABLE.read_text().partition("\n## With the package")[0]
        parts = [
            f"## {name} the package\n\n{as_table(results[key])}\n"
            for key, name in ((True, "With"), (False, "Without"))
        ]
        TABLE.write_text(head + "\n" + "\n".join(parts))
    for lines in results.values():
        assert as_table(lines) in TABLE.read_text()


def test_what_must_work_works(results: dict) -> None:
    """With the package all but Diffusers' own offline faults; without it, all that the user trusts."""
    for package, lines in results.items():
        for line, outcomes in lines.items():
            trusted = "trust" in line or "custom_pipeline" in line
            for place in ("folder", "Hub", "snapshot's folder, offline"):
                if trusted or package and "AutoModel" not in line:
                    assert outcomes[place] == WORKS, (package, line, place, outcomes[place])
                else:
                    assert "trust_remote_code=True" in outcomes[place], (line, outcomes[place])
    for place in ("`HF_HUB_OFFLINE=1`", "network gone"):
        for line in ("ClassifierGuidedPipeline", "DiffusionPipeline", "NoiseAwareClassifier"):
            assert results[True][f"`{line}.from_pretrained(X)`"][place] == WORKS, (line, place)

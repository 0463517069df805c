"""Every example at a small size: it runs, and writes the picture that it says."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from accelerate.commands.launch import launch_command_parser
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch.distributed.run import get_args_parser

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.cli import main
from guided_diffusers.noise import TrainedSchedule, noise_levels

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
STAND_INS = {  # of downloads, by tiny models in folders
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "microsoft/resnet-50": "vit",
    "user/model": "out/photos",
}


def run(name: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script as a user starts it, from another folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("scale_sweep", ["--scales", "0", "4", "--images", "2"], 2),
        ("scale_sweep", ["--scales", "0", "4", "8", "--images", "2", "--classifier-free"], 3),
        (
            "two_classifiers",
            [
                "--brightness",
                "-0.8",
                "-0.2",
                "--images",
                "2",
                "--training-images",
                "10",
                "--training-steps",
                "3",
            ],
            2,
        ),
        ("energy", ["--images", "2"], 4),
        ("text_to_fashion", ["--prompts", "a photo of a sneaker", "a coat", "--images", "2"], 2),
    ],
)
def test_an_example_writes_its_picture(
    name: str, arguments: list[str], rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(
        name,
        [*arguments, "--num-inference-steps", "3", "--output", "picture.png"],
        tmp_path,
        monkeypatch,
    )
    with Image.open(tmp_path / "picture.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    height = pixels.shape[0] // rows
    assert pixels.shape[0] == rows * height and height == 84
    different = [pixels[row * height : (row + 1) * height, -168:].tobytes() for row in range(rows)]
    assert len(set(different)) == rows  # each row's guidance has an effect


def tiny_data(folder: Path) -> str:
    for split, label, copy in product(("train", "test"), range(10), range(2)):
        path = folder / split / f"class {label}" / f"{copy}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), 25 * label + copy).save(path)
    return str(folder)


def test_an_off_the_shelf_classifier_is_trained_and_its_gradients_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_data(tmp_path / "data")
    run(
        "train_off_the_shelf",
        [
            "--data",
            data,
            "--output",
            "resnet",
            "--size",
            "32",
            "--epochs",
            "1",
            "--batch-size",
            "8",
            "--images",
            "16",
        ],
        tmp_path,
        monkeypatch,
    )
    assert 0 <= json.loads((tmp_path / "resnet/figures.json").read_text())["test_accuracy"] <= 1
    run(
        "benchmarks/x0_gradient",
        [
            "--classifier",
            "resnet",
            "--images",
            "10",
            "--scales",
            "5",
            "--num-inference-steps",
            "2",
            "--output",
            "figures.json",
        ],
        tmp_path,
        monkeypatch,
    )
    off, cheap, exact = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [off["scale"], cheap["scale"], exact["scale"]] == [0, 5, 5]
    assert len({row["mean_log_p"] for row in (off, cheap, exact)}) == 3


def test_settings_of_few_steps_are_found_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting found is no worse than the first guesses on the tuning seeds, and it is what is measured."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    data = ["--data", tiny_data(tmp_path / "data"), "--output", "few"]
    search = ["--search", "2", "--evaluations", "4", "--search-images", "20"]
    run("benchmarks/few_steps", [*data, *search], tmp_path, monkeypatch)
    found = json.loads((tmp_path / "few/found.json").read_text())["2"]
    assert found["tuning"]["value"] <= min(guess["value"] for guess in found["first_guesses"])
    assert 999 >= found["timesteps"][0] > found["timesteps"][1] >= 0
    run(
        "benchmarks/few_steps", [*data, "--steps", "2", "--num-images", "20"], tmp_path, monkeypatch
    )
    rows = json.loads((tmp_path / "few/few_steps.json").read_text())
    assert rows["found-2"].items() >= {k: found[k] for k in ("timesteps", "scales")}.items()
    assert rows["even-2"]["timesteps"] == [999, 499]
    for row in rows.values():
        assert (row["images"], row["network_evaluations"], row["guide_evaluations"]) == (20, 2, 2)
        low, high = row["frechet_distance_interval"]
        assert low <= row["frechet_distance"] <= high


def test_each_timestep_has_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    few_steps = importlib.import_module("few_steps")
    scheduler = DPMSolverMultistepScheduler()
    timesteps = [900, 500, 20]
    scheduler.set_timesteps(timesteps=timesteps)
    schedule = TrainedSchedule({"num_train_timesteps": 1000})
    scale = few_steps.ScaleByTimestep(schedule, timesteps, [1.0, 2.0, 3.0])
    assert [scale(level) for level in noise_levels(scheduler)] == [1.0, 2.0, 3.0]
    setting = {"solver_order": 1, "timesteps": [900, 500], "scales": [1.0, 2.0]}
    other = few_steps.changed(setting, [-1.0, 1.0, 0.5, -0.5], 999)
    assert other == {"solver_order": 1, "timesteps": [860, 540], "scales": [1.5, 1.5]}
    assert few_steps.changed(setting, [-10.0, 0.0, 0.0, 0.0], 999) is None  # they must fall
    assert few_steps.changed(setting, [0.0, 0.0, -2.0, 0.0], 999) is None  # scales of 0 and above


def test_light_classifiers_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    bundled = EXAMPLES.parent / "src/guided_diffusers/bundled/fashion-mnist/classifier"
    arguments = ["--reference", tiny_data(tmp_path / "data"), "--output", "students", "--quiet"]
    arguments += ["--classifiers", f"bundled={bundled}", "--settings", "label-15"]
    arguments += ["--num-images", "20", "--batch-size", "20", "--repeats", "1"]
    run("benchmarks/students", arguments, tmp_path, monkeypatch)
    results = json.loads((tmp_path / "students/students.json").read_text())
    assert results["classifiers"]["bundled"]["parameters"] == 886_196
    assert 0.02 < results["classifiers"]["bundled"]["relative_cost"] < 2
    (row,) = results["rows"]
    assert 1 <= row["classifier_evaluations"] < 9 and abs(row["surcharge"]) < 1
    assert "| label-15 | bundled |" in (tmp_path / "students/students.md").read_text()


def test_the_table_of_guidances_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = [
        "--data",
        tiny_data(tmp_path / "data"),
        "--output",
        "table",
        "--images-per-label",
        "1",
        "--num-inference-steps",
        "2",
        "--captions",
        str(EXAMPLES.parent / "training/configs/fashion_mnist_captions.json"),
        "--rows",
    ]
    run("benchmarks/guidance_table", [*arguments, "unguided"], tmp_path, monkeypatch)
    first = (tmp_path / "table/unguided.json").stat().st_mtime_ns
    run(
        "benchmarks/guidance_table",
        [*arguments, "unguided", "classifier-free", "--report", "report"],
        tmp_path,
        monkeypatch,
    )
    assert (tmp_path / "table/unguided.json").stat().st_mtime_ns == first
    rows = json.loads((tmp_path / "report/guidance_table.json").read_text())
    assert [
        (name, row["images"], row["network_evaluations"], row["guide_evaluations"])
        for name, row in rows.items()
    ] == [("unguided", 10, 2, 0), ("classifier-free", 10, 4, 0)]
    for row in rows.values():
        assert row["agreement"] == pytest.approx(sum(row["agreement_per_label"].values()) / 10)
        assert (
            row["frechet_distance"] > 0 and 0 <= row["recall"] <= 1 and 0 <= row["precision"] <= 1
        )
    assert rows["unguided"]["frechet_distance"] != rows["classifier-free"]["frechet_distance"]
    assert "| classifier-free, scale 1 | " in capsys.readouterr().out
    with Image.open(tmp_path / "report/guidance_table.png") as picture:
        upper, lower = np.split(np.asarray(picture.convert("L")), 2)
    assert not np.array_equal(upper[:, -280:], lower[:, -280:])


def test_edits_are_measured_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--data", tiny_data(tmp_path / "data"), "--output", "edits", "--images", "4"]
    arguments += [
        "--per-pair",
        "1",
        "--steps",
        "2",
        "--strengths",
        "0.5",
        "--round-trip-steps",
        "3",
    ]
    run("benchmarks/editing", [*arguments, "--parts", "round-trip"], tmp_path, monkeypatch)
    lines = json.loads((tmp_path / "edits/editing.json").read_text())
    assert [line["images"] for line in lines.values()] == [4, 4]
    capsys.readouterr()
    arguments += ["--parts", "round-trip", "anomaly", "--report", "report"]
    run("benchmarks/editing", arguments, tmp_path, monkeypatch)
    again = json.loads((tmp_path / "report/editing.json").read_text())
    assert again.items() > lines.items() and len(again) == 5
    assert all(0 <= again[f"maps {name} 0.5"]["auroc"] <= 1 for name in ("anomaly", "round trip"))
    with Image.open(tmp_path / "report/anomaly_maps.png") as picture:
        assert picture.width > 400


def test_what_each_term_costs_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(
        "benchmarks/terms",
        [
            "--terms",
            "energy",
            "classifier-free",
            "--steps",
            "5",
            "--cpu-time",
            "--output",
            "figures.json",
        ],
        tmp_path,
        monkeypatch,
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["energy", "classifier-free"]
    for row in figures.values():
        assert row["floor_ms"] > 0 and row["ratio"] == pytest.approx(
            row["guided_ms"] / row["floor_ms"]
        )
    assert figures["classifier-free"]["floor_ms"] > figures["energy"]["floor_ms"]  # twice the batch


def tiny_model(folder: Path, name: str = "label {}") -> str:
    """A pipeline of ten labels that takes no time."""
    unet = diffusers.UNet2DModel(
        8,
        1,
        1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=10,
    )
    ClassifierGuidedPipeline(
        unet,
        diffusers.DDIMScheduler(),
        id2label={i: name.format(i) for i in range(10)},
        defaults={"guidance_scale": 0.0},
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("format", ["imagefolder", "npz"])
def test_what_writing_images_costs_is_measured(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(
        "benchmarks/sampling",
        [
            "--model",
            tiny_model(tmp_path / "model"),
            "--num-images",
            "12",
            "--batch-size",
            "5",
            "--num-inference-steps",
            "2",
            "--repeats",
            "2",
            "--format",
            format,
            "--output",
            "figures.json",
        ],
        tmp_path,
        monkeypatch,
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    loop, folder = figures["seconds"]["loop"], figures["seconds"]["folder"]
    assert len(loop) == len(folder) == 2 and figures["format"] == format
    for clock in ("wall", "cpu"):
        ratios = [one[clock] / other[clock] for one, other in zip(loop, folder, strict=True)]
        assert (
            figures[f"throughput_ratio_{clock}"] == pytest.approx(sum(ratios) / 2)
            and min(ratios) > 0
        )


def test_a_killed_and_a_shared_run_make_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(
            "benchmarks/interrupt_sampling",
            [
                "--model",
                tiny_model(tmp_path / "model"),
                "--num-images",
                "240",
                "--batch-size",
                "2",
                "--shard-size",
                "2",
                "--other-batch-size",
                "1",
                "--kills",
                "1",
                "--format",
                "parquet",
                "--num-inference-steps",
                "2",
                "--output",
                "figures.json",
            ],
            tmp_path,
            monkeypatch,
        )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert ended.value.code == 0 and figures["files"] == 120 * 2 + 1 and figures["kills"] == 1
    assert figures["files_that_differ_two"] == figures["files_that_differ_killed"] == 0
    assert figures["largest_difference"] <= 1 and figures["batch_sizes"] == [2, 1]


def tiny_stable_diffusion(folder: Path) -> None:
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    vocabulary = {
        token: i
        for i, token in enumerate(
            [*"abcdefghijklmnopqrstuvwxyz", "<|startoftext|>", "<|endoftext|>"]
        )
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            **shape,
            vocab_size=28,
            max_position_embeddings=12,
            bos_token_id=26,
            eos_token_id=27,
            pad_token_id=27,
        )
    )
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=transformers.CLIPTokenizer(vocabulary, merges=[], model_max_length=12),
        unet=unet,
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def tiny_image_classifier(folder: Path) -> None:
    transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=8,
            patch_size=4,
            id2label={0: "golden retriever", 1: "dog"},
        )
    ).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)


def tiny_classifier(folder: Path) -> None:
    NoiseAwareClassifier(
        8,
        1,
        num_labels=10,
        block_out_channels=(8,),
        down_block_types=("ResnetDownsampleBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        pool="adaptive",
        id2label={i: f"class {i}" for i in range(10)},
    ).save_pretrained(folder)


READMES = ("README.md", "examples/README.md", "examples/benchmarks/README.md", "training/README.md")


def python_blocks(path: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.M | re.S)


@pytest.mark.parametrize("path", [path for path in READMES if python_blocks(path)])
def test_python_code_of_a_readme_runs_in_its_order(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On the bundled model, and on tiny models in place of those that training or a download gives."""
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "out/unet", "class {}")
    tiny_classifier(tmp_path / "out/classifier")
    tiny_stable_diffusion(tmp_path / "sd")
    tiny_image_classifier(tmp_path / "vit")
    tiny_data(tmp_path / "photos")
    for line in commands((ROOT / path).read_text()):
        if line.startswith("guided-diffusers assemble "):
            main(shlex.split(line, comments=True)[1:])
    blocks = python_blocks(path)
    assert blocks and 2 * len(blocks) == (ROOT / path).read_text().count("```")
    names: dict[str, Any] = {}
    for block in blocks:
        for name, folder in STAND_INS.items():
            block = block.replace(f'"{name}"', f'"{folder}"')
        exec(compile(block, path, "exec"), names)  # noqa: S102
    images = names["images"] if "images" in names else names["pipeline"](0).images
    assert all(image.getextrema()[1] > 0 for image in images)
    assert "overshoots" not in caplog.text
    if path == "examples/README.md":  # the energy does what it says, and the image stays a dress
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        call = {"label": ["dress", "dress"], "generator": seeds, "output_type": "latent"}
        call |= {"guidance_algorithm": "lie_trotter"}
        symmetric, plain = names["symmetric"], names["pipeline"](**call).images.clamp(-1, 1)
        for seed in seeds:
            seed.manual_seed(seeds.index(seed))
        made = names["pipeline"](**call, guidance=symmetric).images.clamp(-1, 1)
        before, after = (symmetric.energy(one) for one in (plain, made))
        assert (after < 0.1 * before).all()
        assert ((made - plain).square().mean((1, 2, 3)) < 0.25 * plain.var((1, 2, 3))).all()


def test_code_of_the_chinese_readme_is_the_readmes() -> None:
    """Each block of code, and each command within a line."""
    chinese, english = (
        (ROOT / path).read_text() for path in ("examples/README.zh.md", "README.md")
    )
    indented = re.findall(
        r"(?:^ {4}.*\n)+", re.sub(r"^```.*?^```", "", chinese, flags=re.M | re.S), re.M
    )
    blocks = python_blocks("examples/README.zh.md") + indented
    assert len(blocks) == 6 and all(block in english for block in blocks)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", chinese, flags=re.M | re.S))
    spans = [span for span in spans if " " in span]
    assert len(spans) >= 3 and all(f"`{span}`" in " ".join(english.split()) for span in spans)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", chinese)
    assert len(links) > 10 and all((EXAMPLES / link).exists() for link in links)
    assert "](examples/README.zh.md)" in english.split("\n\n")[1]


def test_every_picture_of_the_gallery_has_its_command_in_one_script() -> None:
    made = runpy.run_path(str(EXAMPLES / "gallery.py"))["COMMANDS"]
    text = (EXAMPLES / "README.md").read_text()
    files = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    names = {"emoji" if file.startswith("emoji/") else Path(file).stem for file in files}
    assert names | {"fashion-mnist"} == made.keys()  # the README's first picture
    text = re.sub(r"\s*\\\n\s*|\s+", " ", text)  # also of continued lines
    for name in names:
        assert made[name] in text, name
    for file in files:
        assert (EXAMPLES / file).exists() and file.endswith(".png")


def test_the_gallery_makes_a_picture_and_skips_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    module = runpy.run_path(str(EXAMPLES / "gallery.py"))
    module["COMMANDS"]["energy"] += " --images 1 --num-inference-steps 2"
    module["NEEDS"]["edits"] = ["data/nowhere"]
    module["COMMANDS"]["mnist1d"], module["NEEDS"]["mnist1d"] = "exit 3", []
    monkeypatch.chdir(tmp_path)
    names = ["energy", "edits", "mnist1d"]
    monkeypatch.setattr(sys, "argv", ["gallery", "--only", *names, "--output", "a folder"])
    with pytest.raises(SystemExit, match="^these commands failed: mnist1d$"):
        module["main"]()
    with Image.open(tmp_path / "a folder/energy.png") as picture:
        assert picture.height == 4 * 84
    assert "edits: skipped; missing: data/nowhere (" in capfd.readouterr().out


PROGRAMS = ("guided-diffusers ", "python ", "accelerate launch ", "torchrun ", "sh ")
#: what "..." stands for where no earlier command of the file has it
CONTEXT = {"evaluate": "out/images --dataset photos", "train": "--train_data_dir photos"}


def commands(text: str) -> list[str]:
    """The commands in the indented blocks and in the code spans of a Markdown text."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"\\+\n\s*", "", text)  # continued lines
    lines = re.findall(r"^ {4,}(\S.*)", text, re.M)
    lines = [re.sub(r"^([A-Z_]+=\S+ )+", "", line.split(" && ")[-1]) for line in lines]
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]
    found = [line for line in lines if line.startswith((*PROGRAMS, "--"))]
    return found + [span for span in spans if span.startswith(PROGRAMS) and " --" in span]


class Parsed(BaseException):  # programs make one line of an Exception
    """A program has accepted its arguments."""


def accepted(line: str, earlier: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the program takes the command's arguments, and that its files exist."""
    words = shlex.split(line, comments=True)
    if words[0].startswith("--"):
        words = ["python", "training/train_classifier.py", "...", *words]
    for word in words:
        if re.match(r"(training|examples|tests)/[\w/.]+\.\w+$", word) and "--output" not in line:
            assert (ROOT / word).exists(), f"{word} of {line}"
    if words[0] == "accelerate":
        launch = launch_command_parser().parse_args([*words[2:], "..."])
        if launch.training_script == "...":
            return
        words = ["python", launch.training_script, *launch.training_script_args]
    elif words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        program = "guided-diffusers" if launch.module else launch.training_script
        words = ["python", program, *launch.training_script_args]
    if words[0] == "sh":
        return
    if words[0] == "python":
        words = words[1:]
    program, arguments = words[0], words[1:]
    name = arguments[0] if program == "guided-diffusers" and arguments else Path(program).stem
    context = CONTEXT["train"] if name.startswith("train_") else CONTEXT.get(name, "")
    before = earlier.get(name, context.split())
    given = [*arguments[:1], *before] if program == "guided-diffusers" else before
    if "..." in arguments:
        rest = arguments[1:] if program == "guided-diffusers" else arguments
        arguments = [*given, *(word for word in rest if word != "...")]
    elif program != "guided-diffusers":
        earlier[name] = arguments

    def parse(parser: ArgumentParser, words: list[str] | None = None, *rest: Any) -> None:
        plain_parse(parser, words, *rest)
        raise Parsed

    plain_parse = ArgumentParser.parse_args
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [program, *arguments])
        if program == "guided-diffusers":
            main()
        else:
            script = next(ROOT.glob(program if "/" in program else f"training/{program}"))
            patch.syspath_prepend(script.parent)
            runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("path", READMES)
def test_commands_of_a_readme_are_accepted(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, earlier = commands((ROOT / path).read_text()), {}
    assert len(lines) >= 5
    for line in lines:
        accepted(line, earlier, monkeypatch)


SCRIPTS = sorted([*ROOT.glob("training/*.py"), *ROOT.glob("examples/**/*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_commands_of_a_docstring_are_accepted(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ast.get_docstring(ast.parse(script.read_text()))
    # the indentation of a docstring is lost where all its lines have it
    lines = commands(re.sub(rf"^(?={'|'.join(PROGRAMS)})", "    ", text, flags=re.M))
    assert lines
    earlier: dict[str, list[str]] = {}
    for line in lines:
        accepted(line, earlier, monkeypatch)


@pytest.mark.parametrize(
    "path",
    ["README.md", "examples/README.md", "examples/benchmarks/README.md", "training/README.md"],
)
def test_links_and_commands_of_a_readme_name_files_that_exist(path: str) -> None:
    text = (ROOT / path).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    scripts = re.findall(
        r"(?:python|sh|launch|nproc_per_node \d) ((?:examples|training)/[\w/.]+\w)", text
    )
    assert links and (scripts or path == "examples/benchmarks/README.md")
    missing = [link for link in links if not (ROOT / path).parent.joinpath(link).exists()]
    assert not missing + [script for script in scripts if not (ROOT / script).exists()]


def test_stable_diffusion_by_a_classifier_writes_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_stable_diffusion(tmp_path / "sd")
    tiny_image_classifier(tmp_path / "vit")
    run(
        "stable_diffusion_classifier",
        [
            "--model",
            "sd",
            "--classifier",
            "vit",
            "--label",
            "dog",
            "--scale",
            "300",
            "--prompt",
            "a dog",
            "--start",
            "0",
            "--num-inference-steps",
            "3",
            "--output",
            "picture.png",
        ],
        tmp_path,
        monkeypatch,
    )
    with Image.open(tmp_path / "picture.png") as picture:
        pixels = np.asarray(picture)
    upper, lower = np.split(pixels[:, -160:], 2)
    assert not np.array_equal(upper, lower)


def test_an_imagenet_classifier_of_pypi_becomes_surer_of_its_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(
        "off_the_shelf_imagenet",
        [
            "--labels",
            "770",
            "--images",
            "2",
            "--num-inference-steps",
            "5",
            "--scale",
            "10",
            "--no-through-network",
            "--output",
            "picture.png",
        ],
        tmp_path,
        monkeypatch,
    )
    rows = json.loads((tmp_path / "picture.json").read_text())["rows"]
    assert [row["when"] for row in rows] == ["half-way", "final"] and all(
        row["rise"] > 0 for row in rows
    )
    assert rows[-1]["rose"] == 2 and (tmp_path / "picture.png").exists()


def test_the_evidence_of_populations_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    arguments = ["--part", "closed-form", "--populations", "50", "--steps", "10", "--output", "a"]
    run("benchmarks/populations", arguments, tmp_path, monkeypatch)
    rows = json.loads((tmp_path / "a" / "closed-form.json").read_text())
    assert len(rows) == 4 * 2 * 2 and {row["particles"] for row in rows} == {4, 64}
    assert all(abs(row["evidence"] - 0.25) < 5 * row["error"] < 0.2 for row in rows)


def test_mnist1d_trains_samples_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On curves made here, with the trainings in this process."""
    from datasets import ClassLabel, Dataset, Features, List, Value
    from helpers import load_script, reset_accelerate

    module = runpy.run_path(str(EXAMPLES / "mnist1d_signals.py"))
    names = ClassLabel(names=[str(digit) for digit in range(10)])
    features = Features({"signal": List(Value("float32")), "label": names})
    curves = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    for split, rows in (("train", slice(0, 30)), ("test", slice(30, 40))):
        part = {"signal": list(curves[rows]), "label": [i % 10 for i in range(40)][rows]}
        (tmp_path / "out" / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(part, features=features).to_parquet(
            tmp_path / "out" / "data" / f"{split}.parquet"
        )

    def run_here(command: list[str], **_: Any) -> None:
        monkeypatch.setattr(sys, "argv", [*command[1:], "--no_progress"])
        reset_accelerate()
        load_script(Path(command[1]).stem).main()
        reset_accelerate()

    monkeypatch.setattr("subprocess.run", run_here)
    arguments = "--steps 1 --per-class 1 --scales 0 2 --num-inference-steps 2 --output out"
    arguments += " --picture picture.png"
    run("mnist1d_signals", arguments.split(), tmp_path, monkeypatch)
    with np.load(tmp_path / "out" / "scale-2.npz") as file:
        assert file["arr_0"].shape == (10, 1, 40) and file["arr_1"].tolist() == list(range(10))
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size[0] == 14 * 80
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(SystemExit, match="pip install mnist1d"):
        module["write_data"](tmp_path, 10)

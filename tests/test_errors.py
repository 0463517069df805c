"""Whatever a user can type or put in a file gets one line that names it, and no traceback."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import folder, pipeline  # noqa: F401 - fixtures

from guided_diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    EnergyGuidance,
    NoiseAwareClassifier,
    noise_levels,
)
from guided_diffusers.checks import check_bool, check_number, nearest, read_json
from guided_diffusers.cli import main
from guided_diffusers.cli_options import one_line_errors
from guided_diffusers.evaluation import open_generated
from guided_diffusers.evaluation.networks import load_network
from guided_diffusers.learning.data import load_splits
from guided_diffusers.likelihood import parse_labels
from guided_diffusers.openai import convert_checkpoint
from guided_diffusers.sampling import sample_to_folder
from guided_diffusers.sweep import Result, SweepSetting
from guided_diffusers.utils import hub_time_limit

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
WRONG = [
    "3",
    True,
    math.nan,
    math.inf,
    lambda x: x,
    {},
    object(),
    b"1",
    [None],
    np.array([1, 2, 3]),
]


def line_of(*arguments: str) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    assert "this is a bug" not in end.value.code and len(end.value.code) < 700
    return end.value.code


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "cuda", "--device 'cuda': cpu can be used here"),
        ("--device", "meta", "--device 'meta': cpu can be used here"),
        ("--seed", "-1", "--seed -1: an integer from 0 to 9223372036854775807 is allowed"),
        ("--seed", "1.5", "--seed 1.5: an integer from 0"),
        ("--seed", "9" * 30, "--seed 9{30}: an integer from 0"),
        ("--guidance-scale", "nan", "--guidance-scale nan: a finite number is allowed"),
        ("--guidance-scale", "x", "--guidance-scale x: a finite number is allowed"),
        ("--guidance-start", "2", "--guidance-start 2: a finite number from 0 to 1 is allowed"),
        ("--guidance-tolerance", "0", "--guidance-tolerance 0: a finite number above 0"),
        ("--num-inference-steps", "1001", "num_inference_steps=1001: an integer from 1 to 1000"),
        ("--num-inference-steps", "inf", "--num-inference-steps inf: an integer"),
        ("--scheduler", "", "scheduler '' is unknown"),
        ("--scheduler", "unipcc", "scheduler 'unipcc' is unknown; .*UniPC"),
        ("--label", "²", "label '²' is unknown"),
        ("--label", "x" * 5000, "label 'x{99}.* is unknown"),
        ("--output", "x.gif", r"--output x.gif: a picture \(.png, .* or a folder is allowed"),
        ("--output", "x.NPZ", "--output x.NPZ: a picture"),
        ("--model", "./nope", "model './nope': no such folder"),
        ("--model", "~/nope", "model '~/nope': no such folder"),
        ("--format", "gif", "--format: invalid choice: 'gif'"),
        ("--nothing", "1", "unrecognized arguments: --nothing 1"),
    ],
)
def test_options_of_sample(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"--model": folder, "--label": "boot", "--num-images": "1", "--output": "x.png"}
    options |= {"--num-inference-steps": "2", option: value}
    words = [word for pair in options.items() for word in pair]
    assert re.search(message, line_of("sample", "--quiet", *words))
    assert not list(tmp_path.iterdir())


def test_sample_knows_the_schedulers_of_sweep_and_negative_scales(
    folder: str,
    tmp_path: Path,
) -> None:
    options = ["--label", "boot", "--num-images", "1", "--num-inference-steps", "2", "--quiet"]
    pictures = set()
    for name, scale in (("dpmsolver++", "50"), ("sde-dpmsolver++", "50"), ("dpmsolver++", "-50")):
        path = tmp_path / f"{name}{scale}.png"
        words = ["--scheduler", name, "--guidance-scale", scale, "--output", str(path)]
        main(["sample", "--model", folder, *options, *words])
        pictures.add(Image.open(path).tobytes())
    assert len(pictures) == 3


def test_an_unknown_label_shows_the_nearest_names() -> None:
    names = {i: f"class {i:05d}" for i in range(1000)} | {1000: "sneaker", 1001: "sneakers"}
    with pytest.raises(
        ValueError, match="1002 names, of which the nearest are .*'sneaker'"
    ) as error:
        parse_labels("Sneakr", names, 1002)
    assert len(str(error.value)) < 300
    assert nearest("Sneakr", names.values())[0] == "sneaker"
    assert nearest("x", ["b", "a"]) == ["a", "b"]


@pytest.mark.parametrize(
    "content", ["", "[]", "7", "null", '"a"', '{"a": 1', DEEP, b"\xff\xfe", None]
)
@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "classifier/config.json",
    ],
)
def test_broken_json_names_its_file(
    folder: str,
    tmp_path: Path,
    file: str,
    content: str | bytes | None,
) -> None:
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    path = copy / file
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in line_of("sample", "--model", str(copy), "--label", "boot") or (
        content is None and file == "model_index.json"
    )


@pytest.mark.parametrize(
    ("file", "entry", "value", "message"),
    [
        ("unet/config.json", "layers_per_block", 10**5, "layers_per_block is 100000; up to 1000"),
        (
            "unet/config.json",
            "block_out_channels",
            "x",
            "unet.config.json is no config of a UNet2DModel",
        ),
        ("unet/config.json", "sample_size", "8", "sample_size of its config is '8'"),
        ("classifier/config.json", "layers_per_block", 999, "allowed: an integer up to 100"),
        ("classifier/config.json", "num_labels", "3", "num_labels is '3'; allowed: an integer"),
        ("classifier/config.json", "num_labels", 10**6, "ids of id2label"),
        ("classifier/config.json", "id2label", [1], r"id2label is \[1\]; allowed: a mapping"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12, "up to 10000000"),
        ("model_index.json", "defaults", "x", "defaults='x': a mapping"),
        ("model_index.json", "defaults", {"guidance_scale": "3"}, "defaults: guidance_scale='3'"),
        ("model_index.json", "defaults", {"num_inference_steps": 10**12}, "defaults: num_inf"),
        ("model_index.json", "id2label", "x", None),
        ("model_index.json", "unet", 5, r"unet is 5; \[module, class\] is allowed"),
    ],
)
def test_wrong_values_in_configs(
    folder: str,
    tmp_path: Path,
    file: str,
    entry: str,
    value: Any,
    message: str | None,
) -> None:
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    line = line_of("sample", "--model", str(copy), "--label", "boot", "--quiet")
    assert re.search(message or "id2label='x': a mapping", line)


def test_convert_does_not_pass_on_the_advice_to_load_a_pickle(tmp_path: Path) -> None:
    torch.save({"x": Path("a")}, tmp_path / "code.pt")
    preset = ["--preset", "256x256_diffusion_uncond", "--output", str(tmp_path / "o")]
    line = line_of("convert", "--unet", str(tmp_path / "code.pt"), *preset)
    assert "code.pt is refused" in line and "weights_only" not in line and "safetensors" in line
    for text in ("[]", "5", '{"unet": 5}', DEEP, ""):
        (tmp_path / "flags.json").write_text(text)
        torch.save({"x": torch.zeros(1)}, tmp_path / "ok.pt")
        words = ["--unet", str(tmp_path / "ok.pt"), "--config", str(tmp_path / "flags.json")]
        line = line_of("convert", *words, "--output", str(tmp_path / "o"))
        assert "flags.json" in line or "unet is 5" in line


# ---------------------------------------------------------------- how programs end


def test_an_unexpected_error_is_one_line_and_says_how_to_see_more(
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit, match="p: unexpected KeyError: 'x'; .* --traceback"):
        with one_line_errors("p"):
            raise KeyError("x")
    with pytest.raises(KeyError), one_line_errors("p", traceback=True):
        raise KeyError("x")
    with pytest.raises(SystemExit, match="^p: two lines$"), one_line_errors("p"):
        raise ValueError("two\nlines")
    with pytest.raises(SystemExit) as end, one_line_errors("p"):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "p: stopped; run the same command to go on\n"


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_a_script_with_130_and_one_line(tmp_path: Path, processes: int) -> None:
    (tmp_path / "script.py").write_text(
        "import time\n"
        "from guided_diffusers.cli_options import run_program\n"
        "def main():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "run_program(main)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "WORLD_SIZE": str(processes)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGINT)
    error = run.communicate(timeout=30)[1]
    assert run.returncode == 130
    assert error == "script.py: stopped; run the same command to go on\n"


def test_ctrl_c_while_sampling_and_the_same_command_goes_on(
    folder: str,
    tmp_path: Path,
) -> None:
    output = tmp_path / "images"
    command = [sys.executable, "-W", "ignore", "-m", "guided_diffusers", "sample", "--quiet"]
    command += ["--model", folder, "--label", "boot", "--num-inference-steps", "3"]
    command += ["--batch-size", "1", "--shard-size", "1", "--output", str(output)]
    run = subprocess.Popen([*command, "--num-images", "100000"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(output.rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert error == "guided-diffusers sample: stopped; run the same command to go on\n"
    assert read_json(output / "manifest.json")["complete"] is False


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m guided_diffusers sample --help"
    run = subprocess.run(
        ["bash", "-c", f"{command} | head -c 1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
    )
    assert len(run.stdout) == 1 and not run.stderr and run.returncode in (0, 141)


def test_a_full_disk_names_the_folder(
    pipeline: ClassifierGuidedPipeline,
    tmp_path: Path,
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails, as on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        for model in (pipeline, pipeline.classifier):
            with pytest.raises(OSError, match=f"{tmp_path / 'm'} can't be written"):
                model.save_pretrained(tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


# ---------------------------------------------------------------- Python


CALL_ARGUMENTS = (
    "num_images_per_label guidance_scale guidance_start guidance_stop num_inference_steps timesteps "
    "sigmas eta conditional generator latents output_type return_dict callback_on_step_end_tensor_inputs "
    "guidance_algorithm clip_x0 guidance image classifier_free_scale guidance_every guidance_tolerance label"
).split()


@pytest.mark.parametrize("argument", CALL_ARGUMENTS)
def test_arguments_of_the_call(pipeline: ClassifierGuidedPipeline, argument: str) -> None:
    for value in WRONG:
        if argument in ("conditional", "return_dict", "clip_x0") and value is True:
            continue
        call = {"label": "boot", "num_inference_steps": 2, "output_type": "latent"}
        with pytest.raises(ValueError, match=argument.removesuffix("s")):
            pipeline(**(call | {argument: value}))


def test_a_tuple_of_generators_is_a_list(pipeline: ClassifierGuidedPipeline) -> None:
    images = []
    for kind in (list, tuple):
        generators = kind(torch.Generator().manual_seed(i) for i in range(2))
        call = {"num_inference_steps": 2, "output_type": "latent", "generator": generators}
        images.append(pipeline(["boot", "coat"], **call).images)
    assert torch.equal(*images)


def test_latents_of_other_kinds(pipeline: ClassifierGuidedPipeline) -> None:
    for latents in (
        np.zeros((1, 1, 8, 8), np.float32),
        torch.zeros(1, 1, 8, 8, dtype=torch.int64),
        torch.full((1, 1, 8, 8), math.nan),
        torch.zeros(1, 8, 8),
    ):
        with pytest.raises(ValueError, match="latents"):
            pipeline("boot", num_inference_steps=2, latents=latents)


def test_a_null_label_that_the_network_does_not_have(pipeline: ClassifierGuidedPipeline) -> None:
    with pytest.raises(ValueError, match="class label 8; 0 to 3 are allowed"):
        pipeline("boot", num_inference_steps=2, guidance=ClassifierFreeGuidance(8))


def test_arguments_of_terms(pipeline: ClassifierGuidedPipeline) -> None:
    classifier, unet = pipeline.classifier, pipeline.unet
    for value in ("3", True, math.nan, [], {}, b"1", None, 10**400):
        for make, names in (
            (lambda **k: ClassifierGuidance(classifier, "boot", **k), ("scale", "std", "softplus")),
            (
                lambda **k: ClassifierGuidance(classifier, "boot", **k),
                ("joint_temperature", "start"),
            ),
            (lambda **k: ClassifierFreeGuidance(3, **k), ("scale", "rescale", "threshold", "stop")),
            (lambda **k: AutoGuidance(unet, **k), ("scale", "sigma_interval")),
            (lambda **k: EnergyGuidance(torch.sum, **k), ("scale", "normalize", "of")),
        ):
            for name in names:
                optional = name in ("softplus", "threshold", "sigma_interval") and value is None
                if not optional and not (name == "normalize" and value is True):
                    with pytest.raises(ValueError, match=name):
                        make(**{name: value})
        for make in (
            lambda v: ClassifierGuidance(v, "boot"),
            AutoGuidance,
            EnergyGuidance,
            noise_levels,
        ):
            with pytest.raises(ValueError, match="classifier|network|energy|scheduler"):
                make(value)


def test_an_energy_that_is_no_tensor(pipeline: ClassifierGuidedPipeline) -> None:
    with pytest.raises(ValueError, match="energy gave 1.0"):
        pipeline("boot", num_inference_steps=2, guidance=EnergyGuidance(lambda images: 1.0))


CLASSIFIER: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "num_labels": 3,
    "block_out_channels": (8,),
    "down_block_types": ("ResnetDownsampleBlock2D",),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
OTHERS = (
    "pool dropout norm_eps num_train_timesteps beta_start beta_end beta_schedule trained_betas "
    "problem_type downsample_type resnet_time_scale_shift id2label label2id time_proj_dim"
).split()


@pytest.mark.parametrize("argument", [*CLASSIFIER, *OTHERS])
def test_arguments_of_the_classifier(argument: str) -> None:
    for value in ["3", True, math.nan, math.inf, lambda x: x, object(), b"1", [None], 10**30]:
        if argument == "norm_eps" and value == 10**30:
            continue
        with pytest.raises(
            ValueError, match=f"{argument.removesuffix('_start').removesuffix('_end')}"
        ):
            NoiseAwareClassifier(**(CLASSIFIER | {argument: value}))


def test_a_classifier_too_small_for_its_levels() -> None:
    """Each of three down-samplings halves 4 pixels: the last level would have none."""
    four = {"block_out_channels": (8,) * 4, "down_block_types": ("ResnetDownsampleBlock2D",) * 4}
    settings = CLASSIFIER | four | {"pool": "adaptive"}
    with pytest.raises(ValueError, match="sample_size is 4; .* at least 8"):
        NoiseAwareClassifier(**(settings | {"sample_size": 4}))
    classifier = NoiseAwareClassifier(**settings)
    with pytest.raises(ValueError, match="sample.shape is .1, 1, 4, 4.; .* at least 8"):
        classifier(torch.zeros(1, 1, 4, 4), 0)
    for timestep in (-1, 1000, math.nan, "3", None, True):
        with pytest.raises(ValueError, match="timestep"):
            classifier(torch.zeros(1, 1, 8, 8), timestep)
    assert classifier(torch.zeros(1, 1, 8, 8), 999).logits.shape == (1, 3)


def test_arguments_of_sample_to_folder(pipeline: ClassifierGuidedPipeline, tmp_path: Path) -> None:
    call = {"labels": ["boot"], "folder": tmp_path / "x", "num_images": 1, "num_inference_steps": 2}
    for name in ("num_images", "seed", "batch_size", "shard_size", "labels", "format"):
        for value in ("3", True, None, math.nan, 1.5, -1, {}, b"1"):
            with pytest.raises(ValueError, match=name):
                sample_to_folder(pipeline, **(call | {name: value}), progress=False)
    assert not list(tmp_path.iterdir())


def test_models_and_folders_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for cls in (ClassifierGuidedPipeline, NoiseAwareClassifier):
        for name in (5, None, "", "./nope", "../nope", "~/x", "a/b/c", tmp_path / "file"):
            with pytest.raises(ValueError, match="folder"):
                cls.from_pretrained(name)


def test_parts_of_a_pipeline(pipeline: ClassifierGuidedPipeline) -> None:
    parts = {"unet": pipeline.unet, "scheduler": pipeline.scheduler}
    for name in ("unet", "scheduler", "classifier", "vae", "defaults", "id2label"):
        for value in ("x", 5, True, [1], object()):
            with pytest.raises(ValueError, match=name):
                ClassifierGuidedPipeline(**(parts | {name: value}))


def test_numbers() -> None:
    for value in (3, 3.0, np.float32(3), np.int64(3), np.array(3), torch.tensor(3)):
        assert check_number("x", value, 1, 3) == 3
    for value in (3, np.int64(3), torch.tensor(3)):
        assert check_number("x", value, integer=True) == 3
    for value in (
        True,
        np.True_,
        "3",
        None,
        3.5,
        math.nan,
        math.inf,
        10**400,
        1j,
        [3],
        np.array([3]),
    ):
        with pytest.raises(ValueError, match="^x="):
            check_number("x", value, integer=True, high=10)
    assert check_bool("x", np.True_) is True and check_bool("x", torch.tensor(False)) is False
    with pytest.raises(ValueError, match="x=1: True and False are allowed"):
        check_bool("x", 1)


def test_a_metric_that_was_not_measured_has_no_text() -> None:
    """Of 12 images of 10 labels, class diversity is NaN, which JSON makes null."""
    content = {
        "figures": {
            "frechet_distance": {"value": 1.0, "interval": [0.5, 2.0]},
            "class_diversity": {"value": None, "interval": [None, None]},
            "recall": {"value": 0.5, "interval": [None, None]},
        },
        "cost": {"network_evaluations": 1, "classifier_evaluations": 1, "seconds": 1.0},
        "pictures": None,
        "per_class": [],
    }
    result = Result.from_json(SweepSetting("ddim", 2, 1.0), content)
    assert "class_diversity" not in result.metrics
    assert result.interval_text("recall") == "" and result.text("recall")
    assert result.interval_text("frechet_distance")


def test_an_answer_of_the_hub_that_is_no_json() -> None:
    with pytest.raises(OSError, match="the Hub, .*, answers with no JSON"), hub_time_limit():
        json.loads("<html>")


@pytest.mark.parametrize(
    "options",
    [
        ("--output", ""),
        ("--output", ".png"),
        ("--output", "a.png", "--num-images", "99999999999999"),
        ("--output", "folder", "--num-images", "99999999999999"),
        ("--output", "a.png", "--resolution", "15x9"),
        ("--output", "a.png", "--label", "0" * 5000),
    ],
)
def test_what_sample_refuses_before_the_work(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = line_of("sample", "--label", "0", "--num-inference-steps", "2", "--quiet", *options)
    assert any(word in line for word in (options[0], "num_images", "height=15", "label"))
    assert not list(tmp_path.iterdir())


def test_data_and_networks_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "data" / "a" / "0.png")
    (tmp_path / "data" / "a" / "metadata.jsonl").write_text("{")
    with pytest.raises(ValueError, match="dataset: .*data can't be read"):
        load_splits(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="nope': no such folder"):
        load_network(tmp_path / "nope")
    torch.save({"time_embed.0.weight": torch.zeros(())}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt doesn't fit .*(shape|tensors)"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "out", preset="imagenet-64")


@pytest.mark.parametrize("entry", [{"failed": 3}, {"num_images": "1"}])
def test_a_manifest_of_other_kinds(entry: dict, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a" / "0.png")
    manifest = {"complete": True, "num_images": 1, **entry}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json has num_images .* and failed .* allowed"):
        open_generated(tmp_path)

"""What goes wrong in a training, and how it goes on: checkpoints, images, labels, losses, disks, processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, DynamoBackend
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from conftest import files_of_at_most
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import DDPMScheduler
from helpers import (
    TINY,
    TRAINING,
    apart,
    environment_of,
    free_port,
    load_script,
    ranks,
    reset_accelerate,
    shadow,
    weights,
)
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch.distributed.fsdp import StateDictType

from guided_diffusers.learning import checkpointing
from guided_diffusers.learning.batches import Batch, StepRandom
from guided_diffusers.learning.checkpointing import list_checkpoints
from guided_diffusers.learning.data import LabelledImages
from guided_diffusers.learning.distributed import prepare_sharding
from guided_diffusers.learning.loop import Trainer
from guided_diffusers.learning.options import Options

train_unet, train_classifier = load_script("train_unet"), load_script("train_classifier")
kill_and_resume = load_script("kill_and_resume")

SIX = "--max_train_steps 6 --checkpointing_steps 2 --checkpoints_total_limit 0 "
LATEST = SIX + "--resume_from_checkpoint latest"


@pytest.fixture
def broken(place: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """The image folder with one image of the training cut short, and which row that is."""
    folder = shutil.copytree(place.folder, tmp_path / "broken")
    row = 20
    path = Path(
        datasets.load_dataset(str(folder))["train"].cast_column("image", Image(decode=False))[row][
            "image"
        ]["path"]
    )
    path.write_bytes(path.read_bytes()[:40])
    return SimpleNamespace(folder=folder, row=row, path=path, option=f"--train_data_dir {folder}")


# Checkpoints


def cut(checkpoint: Path) -> str:
    file = checkpoint / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:1000])
    return "optimizer.bin has 1000 bytes of"


def flip_a_bit(checkpoint: Path) -> str:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    return "model.safetensors isn't as it was written"


def lose_a_file(checkpoint: Path) -> str:
    (checkpoint / "custom_checkpoint_2.pkl").unlink()
    return "custom_checkpoint_2.pkl is missing"


def cut_the_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_text('{"step": 6, "fi')
    return "can't be read"


def another_seed(checkpoint: Path) -> str:
    file = checkpoint / "manifest.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 7'))
    return "of another run: seed 7, here 0"


def with_code(checkpoint: Path) -> str:
    """A pickle that would write a file when it's loaded, with a manifest that fits it."""

    class Code:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return os.mkdir, (str(checkpoint / "run"),)

    torch.save({"step": Code()}, checkpoint / "custom_checkpoint_0.pkl")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["custom_checkpoint_0.pkl"] = checkpointing.checksum(
        checkpoint / "custom_checkpoint_0.pkl"
    )
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return "it holds posix.mkdir, which isn't loaded"


def of_something_else(checkpoint: Path) -> str:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "weights.bin").write_bytes(b"of something else")
    return "manifest.json is missing"


def test_a_broken_or_foreign_checkpoint_is_refused_and_the_one_before_is_used(
    train: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    whole = train("classifier", SIX, "whole")
    for damage in (
        cut,
        flip_a_bit,
        lose_a_file,
        cut_the_manifest,
        another_seed,
        with_code,
        of_something_else,
    ):
        parts = shutil.copytree(whole, whole.with_name(damage.__name__))
        (parts / "diffusion_pytorch_model.safetensors").unlink()
        reason = damage(parts / "checkpoint-6")
        capsys.readouterr()
        train("classifier", LATEST, parts.name)
        said = capsys.readouterr().out
        assert re.search(
            rf"checkpoint-6 is refused: .*{re.escape(reason)}.*\n(.*\n)*goes on .*checkpoint-4\n",
            said,
        )
        assert apart(weights(whole), weights(parts)) == 0
        assert (
            apart(shadow(whole / "checkpoint-6"), shadow(parts / "checkpoint-6")) == 0
        )  # written anew
        assert (
            len([*parts.glob("checkpoint-6.refused-*")]) == 1
        )  # and the refused one is still there
        assert not [*parts.rglob("run")]


def test_without_a_usable_checkpoint_all_are_named(train: Callable[..., Path]) -> None:
    folder = train("classifier", SIX)
    before = sorted(path.name for path in folder.glob("checkpoint-*"))
    with pytest.raises(
        SystemExit,
        match="--resume_from_checkpoint latest: .*checkpoint-6: of another run: seed 0, "
        "here 1; .*checkpoint-4: .*checkpoint-2: ",
    ):
        train("classifier", LATEST + " --seed 1")
    with pytest.raises(
        SystemExit,
        match="--resume_from_checkpoint .*checkpoint-6: of another run: optimizer 'adamw', "
        "here 'adamw_fused'$",
    ):
        train(
            "classifier",
            SIX + f"--resume_from_checkpoint {folder / 'checkpoint-6'} --optimizer adamw_fused",
        )
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == before


@pytest.mark.parametrize(
    ("script", "line", "changes"),
    [
        (
            "classifier",
            "--lr_scheduler cosine",
            {
                "--max_train_steps 7": "max_train_steps 6, here 7",
                "--learning_rate 2e-3": "learning_rate 0.001, here",
                "--train_batch_size 2": "images a forward pass 4, here 2",
                "--label_smoothing 0.1": "label_smoothing 0.0",
                "--gradient_accumulation_steps 2": "gradient_accumulation_steps 1, here 2",
                "--random_flip": "random_flip",
                "--mixed_precision bf16": "mixed_precision 'no', here 'bf1",
                "--max_timestep 99": "max_timestep None",
                "--class_weights balanced": "class_weights None, here 'balanced'",
                "--optimizer adamw_fused": "optimizer",
                "--model_config_name_or_path {other}": "network's dropout 0.0, here 0.2",
                "--adam_beta2 0.9": "adam_beta2",
            },
        ),
        (
            "unet",
            "--prediction_type v_prediction",
            {
                "--prediction_type sample": "prediction_type 'v_prediction', here 'sample'",
                "--resolution 6": "resolution 8",
                "--objective hybrid": "objective 'simple', here 'hybrid', network's out_channels 1, here 2",
                "--ddpm_num_steps 500": "ddpm_num_steps 1000, here 500",
                "--ema_power 0.5": "ema_power 0.75, here 0.5",
            },
        ),
    ],
)
def test_what_would_be_another_training_is_named(
    train: Callable[..., Path],
    place: SimpleNamespace,
    script: str,
    line: str,
    changes: dict[str, str],
) -> None:
    """And from the other side: that of the changed options isn't one for the plain ones."""
    other = place.root / "dropout-more.json"
    other.write_text(json.dumps({**json.loads(vars(place)[script].read_text()), "dropout": 0.2}))
    folder = train(
        script, f"{line} {SIX} --max_train_steps 2" if "cosine" not in line else f"{line} {SIX}"
    )
    for more, reason in changes.items():
        with pytest.raises(SystemExit, match=f"of another run: {re.escape(reason)}"):
            train(script, f"{line} {LATEST} {more.format(other=other)}")
    changed = train(
        script, f"{line} {SIX} --max_train_steps 2 {[*changes][1].format(other=other)}", "changed"
    )
    with pytest.raises(SystemExit, match="of another run: "):
        train(
            script,
            f"{line} --resume_from_checkpoint {changed / 'checkpoint-2'} --max_train_steps 2",
            "plain",
        )
    assert (
        len([*folder.glob("checkpoint-*")]) == len(list_checkpoints(folder)) > 0
    )  # nothing was put aside


def test_what_may_change_changes_nothing(
    train: Callable[..., Path],
    place: SimpleNamespace,
    tmp_path: Path,
) -> None:
    """A run goes on elsewhere, with more steps, other records and other ways to read the same images."""
    whole = train("classifier", SIX, "whole")
    train("classifier", SIX + "--max_train_steps 4", "first")
    moved = shutil.copytree(place.folder, tmp_path / "moved")
    config = shutil.copy(place.classifier, tmp_path / "moved.json")
    resumed = train(
        "classifier",
        f"--max_train_steps 6 --checkpointing_steps 5 --resume_from_checkpoint "
        f"{tmp_path / 'first' / 'checkpoint-4'} --validation_steps 1 --validation_samples 3 "
        f"--dataloader_num_workers 1 --cache_images --skip_corrupt_images --logging_dir else "
        f"--num_train_epochs 7 --validation_split test --model_config_name_or_path {config}",
        "second",
        data=f"--train_data_dir {moved}",
    )
    assert apart(weights(whole), weights(resumed)) == 0
    assert apart(shadow(whole / "checkpoint-6"), shadow(tmp_path / "first" / "checkpoint-4")) > 0


def test_a_full_disk_ends_the_run_and_loses_nothing(
    train: Callable[..., Path],
    capsys: pytest.CaptureFixture,
) -> None:
    whole, folder = (
        train("classifier", SIX, "whole"),
        train("classifier", SIX + "--max_train_steps 2", "parts"),
    )
    largest = (folder / "checkpoint-2" / "model.safetensors").stat().st_size
    for size in (
        largest // 2,
        largest + 1000,
    ):  # the weights don't fit; they do, but the optimizer's states don't
        with (
            files_of_at_most(size),
            pytest.raises(OSError, match="checkpoint-4 can't be written: "),
        ):
            train("classifier", LATEST, "parts")
        assert re.search(
            "stopped after step 4; .* goes on from .*checkpoint-2\n", capsys.readouterr().err
        )
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    train("classifier", LATEST, "parts")
    assert apart(weights(whole), weights(folder)) == 0


def test_killed_at_random_moments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The script, with two kills; it says what differs where something does."""
    kept = kill_and_resume.KillOptions(kills=2, steps=60, checkpointing_steps=5)
    assert kill_and_resume.compare_runs(kept, tmp_path) == 0
    assert re.search(
        r"kill 2: .*\n\d{3} tensors and numbers compared after 2 kills: 0 differ",
        capsys.readouterr().out,
    )
    one = kill_and_resume.final_state(tmp_path / "whole", 60)
    assert any(name.startswith("checkpoint-60/optimizer.bin/state/0/exp_avg") for name in one)
    assert not all(
        kill_and_resume.equal(value, kill_and_resume.final_state(tmp_path / "whole", 60)[name] + 1)
        for name, value in one.items()
        if isinstance(value, torch.Tensor)
    )


# Images, labels, losses


def test_a_corrupt_image_is_named(train: Callable[..., Path], broken: SimpleNamespace) -> None:
    for line in ("", "--dataloader_num_workers 1"):
        message = rf"split 'train': the image of row {broken.row} \({broken.path}\) can't be read: "
        with pytest.raises(SystemExit, match=message):  # before the first step
            train("classifier", "--max_train_steps 1 " + line, data=broken.option)
        with pytest.raises(ValueError, match=message.removeprefix("split 'train': ")):
            more = "--max_train_steps 12 --check_images 0 " + line
            train("classifier", more, "unchecked", data=broken.option)


def test_corrupt_images_are_skipped_and_counted(
    train: Callable[..., Path],
    broken: SimpleNamespace,
    capfd: pytest.CaptureFixture,
) -> None:
    """24 steps of 4 are two epochs of 48; with workers, with a cache or resumed it is the same training."""
    line = "--max_train_steps 24 --checkpointing_steps 8 --skip_corrupt_images "
    whole = train("classifier", line + "--checkpoints_total_limit 0", "whole", data=broken.option)
    said = capfd.readouterr()
    assert (
        said.err.count(f"the image of row {broken.row} can't be read: another takes its place") == 1
    )
    assert (
        f"2 times another image took the place of one that can't be read, in rows [{broken.row}]"
        in said.out
    )
    for output, more in (("workers", "--dataloader_num_workers 2"), ("cache", "--cache_images")):
        assert (
            apart(
                weights(whole),
                weights(train("classifier", line + more, output, data=broken.option)),
            )
            == 0
        )
    parts = shutil.copytree(whole, whole.with_name("parts"))
    for step in (16, 24):
        shutil.rmtree(parts / f"checkpoint-{step}")
    train("classifier", line + "--resume_from_checkpoint latest", "parts", data=broken.option)
    assert apart(weights(whole), weights(parts)) == 0


def test_another_image_with_its_own_label_takes_the_place(broken: SimpleNamespace) -> None:
    split = datasets.load_dataset(str(broken.folder))["train"]
    data = LabelledImages(split, resolution=8, skip_corrupt_images=True)
    plain = LabelledImages(split, resolution=8)
    rows = set()
    for seed in range(20):
        item = data[broken.row, seed]
        assert item["corrupt"] == broken.row != item["row"]
        assert item["label"] == plain[item["row"]]["label"]
        assert torch.equal(item["pixel_values"], plain[item["row"]]["pixel_values"])
        assert data[broken.row, seed]["row"] == item["row"]
        rows.add(item["row"])
    assert len(rows) > 10
    assert data[3, 1]["corrupt"] == -1 and data[3, 1]["row"] == 3 and "row" not in plain[3]
    nothing = Dataset.from_dict({"image": [b"no image"] * 3}).cast_column("image", Image())
    with pytest.raises(
        ValueError, match="the image of row 1 can't be read, nor those of 99 rows drawn instead"
    ):
        LabelledImages(nothing, resolution=8, skip_corrupt_images=True)[1]


def test_held_out_images_that_are_skipped_are_counted(
    train: Callable[..., Path],
    place: SimpleNamespace,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(place.folder, tmp_path / "held_out")
    next(folder.glob("test/*/*.png")).write_bytes(b"no image")
    line = "--max_train_steps 1 --validation_samples 100"
    figures = json.loads(
        (
            train("classifier", line + " --skip_corrupt_images", data=f"--train_data_dir {folder}")
            / "metrics.json"
        ).read_text()
    )
    assert (figures["images"], figures["skipped_images"]) == (12, 1)
    with pytest.raises(SystemExit, match="split 'test': the image of row .*png.* can't be read"):
        train("classifier", line, "other", data=f"--train_data_dir {folder}")


def test_a_wrong_label_is_named(train: Callable[..., Path], tmp_path: Path) -> None:
    image = PILImage.fromarray(np.zeros((8, 8), np.uint8))
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    (tmp_path / "wrong").mkdir()
    Dataset.from_dict({"image": [image] * 4, "label": [0, 1, -1, 1]}, features=features).to_parquet(
        tmp_path / "wrong" / "train.parquet"
    )
    message = r"split 'train': label_column='label': label -1 of row 2 is none of the 2 labels"
    with pytest.raises(SystemExit, match=message):
        train(
            "classifier",
            "--max_train_steps 1 --skip_corrupt_images",
            data=f"--train_data_dir {tmp_path / 'wrong'}",
        )


class Plain:
    """A run of its own: a linear layer, and images of which one may kill the process that reads it."""

    def __init__(self, folder: Path, split: Dataset, deadly: int = 0, **settings: object):
        class Deadly(LabelledImages):
            def __getitem__(self, item: tuple[int, int]) -> dict[str, torch.Tensor | int]:
                if deadly and item[0] == 40:
                    os.kill(os.getpid(), deadly)
                return super().__getitem__(item)

        reset_accelerate()
        self.options = Options(
            train_data_dir="x",
            resolution=8,
            train_batch_size=4,
            output_dir=str(folder),
            checkpointing_steps=1,
            progress=False,
            cpu=True,
            **settings,
        )
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        self.run = Trainer(self.options, Accelerator(cpu=True), model, Deadly(split, resolution=8))

    def train(self, broken_at: int = -1) -> None:
        def loss(model: torch.nn.Module, batch: Batch, draws: StepRandom) -> torch.Tensor:
            value = model(batch["pixel_values"]).square().mean()
            if self.run.progress.step == broken_at:  # finite, but its gradient isn't
                value = value + (model[1].weight.sum() * 0).sqrt()
            return value

        try:
            self.run.train(loss, lambda model, step: {})
        finally:
            reset_accelerate()


def test_weights_that_are_not_finite_are_not_saved(place: SimpleNamespace, tmp_path: Path) -> None:
    split = datasets.load_dataset(str(place.folder))["train"]
    with pytest.raises(FloatingPointError, match="weights at step 4 are NaN or infinite"):
        Plain(tmp_path, split, max_train_steps=9, max_grad_norm=0.0).train(broken_at=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_a_dead_worker_ends_the_run(place: SimpleNamespace, tmp_path: Path) -> None:
    split, begun = datasets.load_dataset(str(place.folder))["train"], time.monotonic()
    with pytest.raises(
        RuntimeError, match="DataLoader worker .* (killed by signal|exited unexpectedly)"
    ):
        Plain(
            tmp_path, split, deadly=signal.SIGKILL, max_train_steps=24, dataloader_num_workers=1
        ).train()
    assert time.monotonic() - begun < 60
    Plain(tmp_path, split, max_train_steps=24, resume_from_checkpoint="latest").train()  # goes on


def test_a_stopped_worker_ends_the_run(place: SimpleNamespace, tmp_path: Path) -> None:
    split = datasets.load_dataset(str(place.folder))["train"]
    limit = {"max_train_steps": 24, "dataloader_num_workers": 2, "timeout_minutes": 0.1}
    begun = time.monotonic()
    reason = (
        r"no batch within 0.1 minutes from the .* (\d+ \(.*\), )?\d+ \(stopped\).*; --timeout_m"
    )
    with pytest.raises(RuntimeError, match=reason):
        Plain(tmp_path, split, deadly=signal.SIGSTOP, **limit).train()
    assert time.monotonic() - begun < 60
    assert not multiprocessing.active_children()  # or this process could not end
    Plain(tmp_path, split, **limit | {"resume_from_checkpoint": "latest"}).train()  # goes on


# Several processes


STOPS_IN_TRAINING = """
import os, runpy, signal, sys
from guided_diffusers.learning.loop import Trainer

make_pass = Trainer._pass
def stop(self, loss, batch, number):
    if number == 2 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return make_pass(self, loss, batch, number)

Trainer._pass, sys.argv = stop, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_stopped_process_ends_the_training(place: SimpleNamespace, tmp_path: Path) -> None:
    script = TRAINING / "train_classifier.py"
    line = f"{script} {TINY} --train_data_dir {place.folder} --cpu --max_train_steps 9 "
    line += f"--model_config_name_or_path {place.classifier} --diagnosis_images 0 "
    line += f"--output_dir {tmp_path / 'out'} --timeout_minutes 0.4"
    first, second = processes = ranks(STOPS_IN_TRAINING, line.split(), 2, tmp_path)
    try:
        said = first.communicate(timeout=200)[1]
        assert psutil.Process(second.pid).status() == psutil.STATUS_STOPPED
    finally:
        for process in processes:
            process.kill()
            process.wait()
    message = (
        r"train_classifier.py: process 0 waited 0.4 minutes in _pass \(loop.py:\d+\) for "
        "process 1, which is stopped, lost or slower than that; --timeout_minutes sets the limit"
    )
    assert first.returncode == 1 and re.search(message, said), said
    assert "stopped after step 2; --resume_from_checkpoint latest" in said
    assert "Traceback" not in said


NO_THREADS = """
import atexit, os, runpy, sys

def names():
    tasks = "/proc/self/task"
    found = [open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)]
    print("at the end:", *[name for name in found if "gloo" in name or "store" in name], file=sys.stderr)

atexit.register(names)  # called last
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_no_thread_of_the_process_group_outlives_the_training(
    place: SimpleNamespace, tmp_path: Path
) -> None:
    """The end of the interpreter would end it within C++, and so abort the process at times."""
    script = TRAINING / "train_classifier.py"
    line = f"{script} {TINY} --train_data_dir {place.folder} --cpu --max_train_steps 2 "
    line += f"--model_config_name_or_path {place.classifier} --diagnosis_images 0 "
    line += f"--output_dir {tmp_path / 'out'}"
    processes = ranks(NO_THREADS, line.split(), 2, tmp_path)
    try:
        said = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], said
    assert all("at the end:\n" in text for text in said), said


STOPS_AT_A_BARRIER = """
import os, signal, sys
from guided_diffusers.cli_options import launched_processes, timeout_message
state = launched_processes("cpu", 0.25)
if state.process_index == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    state.wait_for_everyone()
except RuntimeError as error:
    sys.exit(timeout_message(error, "--timeout-minutes"))
"""


def test_the_processes_that_wait_find_out_which_one_is_stopped(tmp_path: Path) -> None:
    processes = ranks(STOPS_AT_A_BARRIER, [], 3, tmp_path)
    try:
        said = [processes[rank].communicate(timeout=150)[1] for rank in (0, 2)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, text in zip((0, 2), said, strict=True):
        assert re.search(
            rf"process {rank} waited 0.25 minutes in <module> .* for process 1, w", text
        )
    assert [processes[rank].returncode for rank in (0, 2)] == [1, 1]


@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --standalone --nproc_per_node 2",
        "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        "--mixed_precision no --dynamo_backend no --main_process_port 0",
    ],
)
def test_a_process_that_fails_ends_all_with_its_message(
    launcher: str,
    place: SimpleNamespace,
    broken: SimpleNamespace,
    tmp_path: Path,
) -> None:
    """One process meets a corrupt image; the other waits for its gradients."""
    command = [
        sys.executable,
        "-m",
        *launcher.split(),
        str(TRAINING / "train_classifier.py"),
        *TINY.split(),
        *broken.option.split(),
        "--cpu",
        "--model_config_name_or_path",
        str(place.classifier),
        "--max_train_steps",
        "1000",
        "--check_images",  # else it'd be found before the first step
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    guard = threading.Timer(240, os.killpg, (process.pid, signal.SIGKILL))  # ends the reading below
    try:
        guard.start()
        said, failed = [], None
        for line in process.stderr:
            said.append(line)
            if failed is None and "stopped after step" in line:
                failed = time.monotonic()
        process.wait(timeout=60)
        seconds = time.monotonic() - failed
    finally:
        guard.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode not in (0, -signal.SIGKILL)
    message = f"train_classifier.py: the image of row {broken.row} ({broken.path}) can't be read"
    assert message in "".join(said)
    assert seconds < 60
    with pytest.raises(ProcessLookupError):  # nothing of the group is left
        os.killpg(process.pid, 0)


# Scale


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("cpu", "NO", 1),
        ("single_gpu", "NO", 1),
        ("multi_gpu", "MULTI_GPU", 8),
        ("multi_node", "MULTI_GPU", 16),
        ("fsdp", "FSDP", 8),
        ("deepspeed", "DEEPSPEED", 8),
    ],
)
def test_accelerate_configs_are_read(name: str, kind: str, processes: int) -> None:
    """By Accelerate's loader, and by its launcher as far as without the machines."""
    path = TRAINING / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type.value, config.num_processes, config.use_cpu) == (
        kind,
        processes,
        name == "cpu",
    )
    line = ["--config_file", str(path), "train.py", "--train_data_dir", "photos"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert args.num_processes == processes and args.training_script_args == [
        "--train_data_dir",
        "photos",
    ]
    assert (args.use_fsdp, args.use_deepspeed) == (kind == "FSDP", kind == "DEEPSPEED")
    assert (args.multi_gpu, args.num_machines) == (
        kind == "MULTI_GPU",
        2 if name == "multi_node" else 1,
    )


def test_all_accelerate_configs_are_tested() -> None:
    names = {path.stem for path in (TRAINING / "accelerate").glob("*.yaml")}
    marks = test_accelerate_configs_are_read.pytestmark[0].args[1]
    assert names == {name for name, _, _ in marks}


@pytest.mark.parametrize("script", ["classifier", "unet"])
def test_gradient_checkpointing_changes_no_weight(
    train: Callable[..., Path],
    place: SimpleNamespace,
    script: str,
) -> None:
    config = place.root / f"{script}-dropout.json"
    config.write_text(json.dumps({**json.loads(vars(place)[script].read_text()), "dropout": 0.2}))
    line = f"--max_train_steps 3 --model_config_name_or_path {config} "
    plain, checkpointed = (
        weights(train(script, line + more, more[2:] or "plain"))
        for more in ("", "--gradient_checkpointing")
    )
    assert apart(plain, checkpointed) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": "adamw_8bit"},
            "--optimizer adamw_8bit: with distributed_type FSDP one of ('adamw', 'adamw_fused') "
            "is allowed",
        ),
        (
            {"mixed_precision": "fp16"},
            "--mixed_precision fp16: with distributed_type FSDP one of ('no', 'bf16') is allowed",
        ),
        (
            {"backend": DynamoBackend.INDUCTOR},
            "dynamo_backend inductor: with distributed_type FSDP one of ('no',) is",
        ),
        ({"fsdp_version": 1}, "fsdp_version 1: with distributed_type FSDP one of (2,) is allowed"),
        (
            {"state_dict_type": StateDictType.SHARDED_STATE_DICT},
            "fsdp_state_dict_type SHARDED_STATE_DICT: with distributed_type FSDP one of "
            "('FULL_STATE_DICT',) is allowed",
        ),
        (
            {"kind": DistributedType.DEEPSPEED, "zero_stage": 3},
            "zero_stage 3: with distributed_type DEEPSPEED one of (0, 1, 2) is allowed",
        ),
    ],
)
def test_what_a_network_in_parts_is_not_trained_with(
    settings: dict[str, Any], message: str
) -> None:
    given = {
        "kind": DistributedType.FSDP,
        "optimizer": "adamw",
        "mixed_precision": "no",
        "fsdp_version": 2,
        "backend": DynamoBackend.NO,
        "state_dict_type": StateDictType.FULL_STATE_DICT,
        "zero_stage": 2,
        **settings,
    }
    given = SimpleNamespace(**given)
    state = SimpleNamespace(fsdp_plugin=given, deepspeed_plugin=given, dynamo_plugin=given)
    accelerator = SimpleNamespace(
        distributed_type=given.kind, state=state, mixed_precision=given.mixed_precision
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_sharding(accelerator, torch.nn.Linear(1, 1), given)


def test_a_network_in_parts_is_not_differentiated_twice() -> None:
    given = train_classifier.ClassifierOptions(train_data_dir="x", dlsm_weight=1.0, score_model="x")
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        mixed_precision="no",
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)),
    )
    with pytest.raises(
        ValueError,
        match="--dlsm_weight 1.0 differentiates twice, which distributed_type FSDP isn't",
    ):
        train_classifier.make_loss(
            given, accelerator, DDPMScheduler(), 999, SimpleNamespace(id2label={0: "a", 1: "b"})
        )


def test_fsdp_on_cpus_is_refused(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        **environment_of("fsdp"),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(
            SystemExit,
            match="--cpu with distributed_type FSDP.*training/accelerate/cpu.yaml, is all",
        ):
            train("classifier", "--max_train_steps 1")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("script", ["classifier", "unet"])
def test_a_compiled_network_trains_and_is_saved_as_it_is(
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    """By what --dynamo_backend of `accelerate launch` sets; compiled goes on plain, and plain compiled."""
    line = SIX + "--adam_epsilon 1e-4 --validation_steps 3 --validation_samples 2"
    args = launch_command_parser().parse_args(
        ["--dynamo_backend", "eager", "--num_processes", "1", "x.py"]
    )
    args, _, _ = _validate_launch_command(args)
    compiled = prepare_simple_launcher_cmd_env(args)[1]["ACCELERATE_DYNAMO_BACKEND"]
    assert compiled == "EAGER"
    folders = {}
    for name, backend in (("plain", "no"), ("compiled", compiled)):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        folders[name] = train(script, line, name)
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    assert frames > 0
    for name, backend in (("plain", compiled), ("compiled", "no")):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        resumed = train(
            script,
            f"{line} --resume_from_checkpoint {folders[name] / 'checkpoint-4'}",
            f"{name}-resumed",
        )
        assert apart(weights(folders["plain"]), weights(resumed)) < 1e-6
    plain, other = (folder / "checkpoint-6" for folder in folders.values())
    assert {path.name for path in plain.iterdir()} == {path.name for path in other.iterdir()}
    assert apart(*(load_file(folder / "model.safetensors") for folder in (plain, other))) < 1e-6
    assert apart(shadow(plain), shadow(other)) < 1e-6
    torch._dynamo.reset()


def test_optimizers(train: Callable[..., Path]) -> None:
    line = f"{SIX} --adam_epsilon 1e-4 --optimizer "
    runs = {name: train("classifier", line + name, name) for name in ("adamw", "adamw_fused")}
    plain, fused = (weights(run) for run in runs.values())
    assert apart(plain, fused) < 1e-6  # 0 on some processors
    for name, run in runs.items():
        state = torch.load(run / "checkpoint-4" / "optimizer.bin", weights_only=True)
        assert bool(state["param_groups"][0]["fused"]) is (name == "adamw_fused")
    if not find_spec("bitsandbytes"):
        with pytest.raises(
            SystemExit, match="--optimizer adamw_8bit needs bitsandbytes .pip install bitsandbytes"
        ):
            train("classifier", "--max_train_steps 1 --optimizer adamw_8bit", "8bit")
        return
    whole = train("classifier", line + "adamw_8bit", "8bit")
    assert 0 < apart(plain, weights(whole)) < 0.02
    resumed = train(
        "classifier",
        f"{line} adamw_8bit --resume_from_checkpoint {whole / 'checkpoint-4'}",
        "resumed",
    )
    assert apart(weights(whole), weights(resumed)) == 0


def test_cached_images_are_the_same_images(
    train: Callable[..., Path], place: SimpleNamespace
) -> None:
    split = datasets.load_dataset(str(place.folder))["train"]
    settings = {"resolution": 6, "random_flip": True, "random_shift": 1}
    plain, cached = (
        LabelledImages(split, **settings),
        LabelledImages(split, **settings, cache_images=True),
    )
    for seed in range(3):
        for i in range(5):
            one, other = plain[i, seed], cached[i, seed]
            assert (
                torch.equal(one["pixel_values"], other["pixel_values"])
                and one["label"] == other["label"]
            )
    begun = time.process_time()
    for seed in range(20):
        _ = cached[0, seed]
    seconds, begun = time.process_time() - begun, time.process_time()
    for seed in range(20):
        _ = plain[0, seed]
    assert seconds < time.process_time() - begun
    assert (
        apart(
            *(
                weights(train("classifier", "--max_train_steps 14 " + more, more[2:] or "plain"))
                for more in ("", "--cache_images")
            )
        )
        == 0
    )

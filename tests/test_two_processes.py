"""Two processes on one folder: one waits, or is refused with the other's number; a dead one is in nobody's way."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import folder, pipeline  # noqa: F401  (fixtures)

from guided_diffusers import ClassifierGuidedPipeline, files
from guided_diffusers.evaluation import (
    DatasetImages,
    Settings,
    Summary,
    open_generated,
    summarise,
    wrap_module,
)
from guided_diffusers.files import (
    file_lock,
    folder_lock,
    is_abandoned,
    new_folder,
    write_json,
)
from guided_diffusers.sampling import sample_to_folder
from guided_diffusers.sampling.manifest import open_or_resume

FORK = multiprocessing.get_context("fork")  # a process that needs no imports


def hold(path: Path, ready: Any, seconds: float, then: Callable[[], object] | None) -> None:
    with file_lock(path) as owner:
        assert owner is None
        ready.set()
        time.sleep(seconds)
        if then is not None:
            then()


@contextmanager
def held(
    path: Path, seconds: float = 600, then: Callable[[], object] | None = None
) -> Iterator[multiprocessing.Process]:
    """Another process has the lock; it ends after `seconds`, when it calls `then`."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(path, ready, seconds, then))
    process.start()
    try:
        assert ready.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def kill(process: multiprocessing.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


# The lock


def test_the_second_is_refused_with_the_firsts_number_and_a_killed_one_is_not_in_the_way(
    tmp_path: Path,
) -> None:
    with held(tmp_path / files.LOCK) as first:
        message = f"{tmp_path} is in use by process {first.pid}; wait until it is finished, or use"
        for _ in range(2):
            with pytest.raises(ValueError, match=message), folder_lock(tmp_path):
                pytest.fail("entered")
        kill(first)
        assert (tmp_path / files.LOCK).exists()  # it could not remove it
        with folder_lock(tmp_path):
            assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
            with pytest.raises(ValueError, match=f"process {os.getpid()};"), folder_lock(tmp_path):
                pytest.fail("entered twice")
    assert not list(tmp_path.iterdir())
    with folder_lock(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())  # a folder in which nothing was written


def test_the_second_waits_and_says_for_whom(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = tmp_path / "done"
    with held(tmp_path / files.LOCK, 1.5, done.touch) as first:
        with caplog.at_level(logging.WARNING), folder_lock(tmp_path, wait=True):
            assert done.exists()
    assert caplog.messages == [
        f"{tmp_path} is in use by process {first.pid}; waiting until it is finished"
    ]


def count(folder: Path, times: int) -> None:
    number = folder / "number"
    for _ in range(times):
        with folder_lock(folder, wait=True):
            value = int(number.read_text())
            time.sleep(0.02)
            number.write_text(str(value + 1))


def test_one_at_a_time_also_where_locks_are_removed(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    processes = [FORK.Process(target=count, args=(tmp_path, 4)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert (tmp_path / "number").read_text() == "16"


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As some network file systems answer; processes of this machine are known by their numbers."""
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with held(tmp_path / files.LOCK) as first:
        with pytest.raises(ValueError, match=f"process {first.pid};"), folder_lock(tmp_path):
            pytest.fail("entered")
        kill(first)
        with folder_lock(tmp_path):
            pass
    assert "is on a file system without locks" in caplog.text


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/a can't be written: Not a directory"):
        with folder_lock(tmp_path / "file" / "a"):
            pytest.fail("entered")


# Files


def write_once(path: Path, number: int, results: Any) -> None:
    try:
        write_json({"seed": number}, path, exclusive=True)
        results.put(number)
    except FileExistsError:
        results.put(None)


def test_one_of_eight_writes_a_file_that_must_be_new(tmp_path: Path) -> None:
    path, results = tmp_path / "manifest.json", FORK.SimpleQueue()
    processes = [FORK.Process(target=write_once, args=(path, i, results)) for i in range(8)]
    for process in processes:
        process.start()
    (winner,) = [number for number in (results.get() for _ in range(8)) if number is not None]
    for process in processes:
        process.join()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert json.loads(path.read_text()) == {"seed": winner}


def test_two_seeds_on_one_new_folder_never_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a lock: the other's manifest appears just before this one is written."""
    write = files.write_bytes

    def after_the_other(content: bytes, path: Path, exclusive: bool = False) -> None:
        write(b'{"seed": 1, "complete": false}', path)
        write(content, path, exclusive)

    monkeypatch.setattr(files, "write_bytes", after_the_other)
    with pytest.raises(ValueError, match="seed is 1, here 0"):
        open_or_resume(tmp_path, {"seed": 0})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"seed": 1, "complete": False}


def test_only_partial_files_of_dead_processes_are_removed(
    pipeline: ClassifierGuidedPipeline,
    tmp_path: Path,
) -> None:
    alive, dead = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    dead.kill()
    dead.wait()
    names = {pid: f".000000.png.{pid}.partial" for pid in (alive.pid, dead.pid, os.getpid())}
    try:
        for name in names.values():
            (tmp_path / name).touch()
        assert not is_abandoned(tmp_path / names[alive.pid])
        assert is_abandoned(tmp_path / names[dead.pid]) and not is_abandoned(tmp_path / "a.png")
        sample_to_folder(pipeline, [0], tmp_path, 1, num_inference_steps=2, progress=False)
        assert [path.name for path in tmp_path.glob(".*.partial")] == [names[alive.pid]]
    finally:
        alive.kill()
        alive.wait()


# Commands


def command(model: str, seed: int, output: Path, label: str = "boot") -> list[str]:
    program = [sys.executable, "-m", "guided_diffusers", "sample", "--model", model, "--quiet"]
    work = "--device cpu --num-images 40 --batch-size 1 --shard-size 1 --num-inference-steps 3"
    return [*program, *work.split(), "--label", label, "--seed", str(seed), "--output", str(output)]


def test_of_two_seeds_on_one_new_folder_one_is_refused(
    folder: str,
    tmp_path: Path,
) -> None:
    output, runs = tmp_path / "out", []
    for seed in (0, 1):
        line = command(folder, seed, output)
        runs.append(subprocess.Popen(line, stderr=subprocess.PIPE, text=True))
    errors = [run.communicate(timeout=600)[1] for run in runs]
    refused = [i for i, run in enumerate(runs) if run.returncode]
    assert len(refused) == 1, errors
    loser, winner = refused[0], 1 - refused[0]
    in_use = f"{output} is in use by process {runs[winner].pid}"
    assert in_use in errors[loser] or f"seed is {winner}, here {loser}" in errors[loser]
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["seed"], manifest["complete"]) == (winner, True)
    assert len(open_generated(output)) == 40
    assert not list(output.glob(".lock*"))


def test_a_sampling_is_refused_while_another_runs(
    pipeline: ClassifierGuidedPipeline,
    tmp_path: Path,
) -> None:
    settings = {"num_inference_steps": 2, "progress": False}
    with held(tmp_path / "out" / files.LOCK) as first:
        with pytest.raises(ValueError, match=f"out is in use by process {first.pid};"):
            sample_to_folder(pipeline, [0], tmp_path / "out", 1, **settings)
        kill(first)
    assert sample_to_folder(pipeline, [0], tmp_path / "out", 1, **settings).images == 1


def test_convert_is_refused_while_another_runs_and_takes_nothing_of_a_killed_one(
    tmp_path: Path,
) -> None:
    output, dead = tmp_path / "adm", FORK.Process(target=int)
    dead.start()
    dead.join()
    leftovers = [f".adm.{dead.pid}.partial", f".adm.{os.getpid()}.partial", ".adm.partial"]
    for name in leftovers:
        (tmp_path / name / "classifier").mkdir(parents=True)
        (tmp_path / name / "classifier" / "old.safetensors").touch()
    with held(tmp_path / ".adm.lock") as first:
        with pytest.raises(ValueError, match=f"adm is being written by process {first.pid};"):
            with new_folder(output):
                pytest.fail("entered")
        assert all((tmp_path / name).exists() for name in leftovers)
        kill(first)
    with new_folder(output) as partial:
        assert not partial.exists()
        partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["adm"] and not list(output.iterdir())


def test_a_cache_is_waited_for_not_made_twice(tmp_path: Path) -> None:
    """The second reads what the first has made."""
    seen = []

    class Flat(torch.nn.Flatten):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return super().forward(x)

    items = [{"pixel_values": torch.full((1, 2, 2), i / 16), "label": 0} for i in range(16)]
    images, network = DatasetImages(items, {}, False), wrap_module(Flat(), "flat")
    images.description["fingerprint"] = "x"

    def summary() -> Summary:
        seen.clear()
        return summarise(images, network, None, Settings(), progress=False, cache=tmp_path)

    first = summary()
    (path,) = tmp_path.iterdir()
    assert sum(seen) == 16 + 1
    aside = path.rename(tmp_path / "aside")
    with held(path.with_name(f".{path.stem}.lock"), 1.0, lambda: aside.rename(path)):
        second = summary()
    assert sum(seen) == 1  # for the width of the features
    for one, other in zip(first.accumulators(), second.accumulators(), strict=True):
        for name, value in one.state().items():
            torch.testing.assert_close(other.state()[name], value, rtol=0, atol=0)


def test_a_training_whose_checkpoints_do_not_fit_is_refused_before_the_first_step(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = "--output_dir: a checkpoint in .*out can't be written: 0 MiB are needed, 0 MiB are"
    with pytest.raises(SystemExit, match=message):
        train("unet", "--max_train_steps 1")


@pytest.mark.parametrize("line", ["--hub_model_id a/b/c", "--hub_model_id a--b", ""])
def test_a_repository_that_can_not_be_is_found_before_a_training(
    line: str,
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without --hub_model_id it has the folder's name."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    expected = (
        f"{line or '--hub_model_id None'}, --output_dir .*my..model: (Repo id must|Cannot have) "
    )
    with pytest.raises(SystemExit, match=expected):
        train("unet", f"--push_to_hub {line}", "my..model", data="--train_data_dir nowhere")


def test_a_training_is_refused_while_another_runs(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with held(output / files.LOCK) as first:
        message = f"--output_dir: {output} is in use by process {first.pid};"
        with pytest.raises(SystemExit, match=message):
            train("unet", "--max_train_steps 1")
        kill(first)
    assert sorted(path.name for path in output.iterdir()) == [".lock", ".lock.json"]
    for path in (tmp_path / "in" / "the", tmp_path / "full"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(SystemExit, match="--output_dir .*in/the/way can't be written: Not a dir"):
        train("unet", "--max_train_steps 1", "in/the/way", data="--train_data_dir nowhere")
    with pytest.raises(SystemExit, match="--latents_cache .*full can't be written: it is a file"):
        train("unet", f"--vae nothing --center_crop --latents_cache {tmp_path / 'full'}", "new")
    assert not (tmp_path / "new").exists()
    train("unet", "--max_train_steps 1")
    assert (output / "model_index.json").exists() and not list(output.glob(".lock*"))

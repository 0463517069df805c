"""Helpers of several test files: the training scripts, tiny networks, and how to compare what they save."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

TRAINING = Path(__file__).parents[1] / "training"
NAMES = list("abcdefghij")
SHARED = {
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "block_out_channels": [8, 16],
}
UNET = {**SHARED, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
CLASSIFIER = {**SHARED, "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}
TINY = (
    "--resolution 8 --train_batch_size 4 --lr_warmup_steps 2 --learning_rate 1e-3 "
    "--validation_samples 6 --no_progress"
)


def load_script(name: str, folder: Path = TRAINING) -> ModuleType:
    """The module of `training/NAME.py`, or of another folder, loaded from its path once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def reset_accelerate() -> None:
    """Forget Accelerate's shared state, so that the next `Accelerator` starts from scratch."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a training saved."""
    files = [*folder.glob("unet/*.safetensors"), *folder.glob("*.safetensors")]
    return load_file(files[0])


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def shadow(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The exponential moving average in a checkpoint."""
    state = torch.load(sorted(checkpoint.glob("custom_checkpoint_*.pkl"))[-1], weights_only=True)
    return {str(i): tensor for i, tensor in enumerate(state["shadow_params"])}


def free_port() -> int:
    """A port that nothing listened at a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment_of(config: str) -> dict[str, str]:
    """The environment variables that `accelerate launch` sets for a config of training/accelerate."""
    line = ["--config_file", str(TRAINING / "accelerate" / f"{config}.yaml"), "train.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    if args.use_deepspeed:
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(("ACCELERATE_", "FSDP_"))
    }


DRIVER = """
import os, runpy, sys
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
plain, prepare = AcceleratorState.__init__, PartialState._prepare_backend

def split(self, *args, fsdp_plugin=None, **settings):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **settings)
    if fsdp_plugin is not None:  # what Accelerate does with accelerators, but leaves out on CPUs
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type

def backend(self, *args):
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        return "gloo", DistributedType.MULTI_CPU
    return prepare(self, *args)

AcceleratorState.__init__, PartialState._prepare_backend = split, backend
before = dict(os.environ)
for port, settings, sys.argv in {commands!r}:
    os.environ.clear()
    os.environ.update(before, MASTER_PORT=str(port), **settings)
    runpy.run_path(sys.argv[0], run_name="__main__")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
"""


def launched(
    folder: Path, place: SimpleNamespace, commands: list[tuple[dict[str, str], list[str]]]
) -> str:
    """What the commands print, one after the other in one `accelerate launch` of two processes.

    One launch, since an import of torch costs more than a training; each command meets at a port
    of its own, with further environment variables.
    """
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(commands=[(free_port(), *command) for command in commands]))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(place.root / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    line = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
        "--main_process_port 0"
    )
    launch = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *line.split(), str(driver)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = launch.communicate(timeout=600)
    finally:
        with suppress(ProcessLookupError):  # all of them, also where the launcher has left one
            os.killpg(launch.pid, signal.SIGKILL)
    assert launch.returncode == 0, errors
    return printed


def ranks(script: str, arguments: list[str], world: int, folder: Path) -> list[subprocess.Popen]:
    """Processes of a group, without a launcher that would end them."""
    path, processes = folder / "rank.py", []
    path.write_text(script)
    environment = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_PORT": str(free_port()), "HF_HUB_OFFLINE": "1"}
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(path), *arguments]
        keywords = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(
            subprocess.Popen(command, env={**os.environ, **environment, **own}, **keywords)
        )
    return processes

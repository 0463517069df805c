"""Processes of a training: the `Accelerator`, how errors end all of them, and sharded models."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    convert_outputs_to_fp32,
)
from PIL import Image
from torch.distributed.tensor import DTensor

from ..cli_options import timeout_message
from ..files import check_writable, folder_lock
from ..text import one_line
from ..utils import hub_time_limit
from .options import Options, named_errors

# Units that FSDP gathers at a time, if its config names none.
FSDP_BLOCKS = {"ResnetBlock2D", "BasicTransformerBlock"}
# The lock of --output_dir: of the process, since a training ends at any place of a script.
OUTPUT_LOCK = ExitStack()
atexit.register(OUTPUT_LOCK.close)
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@contextmanager
def exit_on_value_error() -> Iterator[None]:
    """End the program with the message of a `ValueError` or `OSError` and no traceback.

    An option has a wrong value, a file can't be read, or the Hub doesn't answer in time.
    """
    try:
        with hub_time_limit():
            yield
    except (ValueError, OSError) as error:
        release_output()
        message = f"{Path(sys.argv[0]).name}: error: {one_line(error)}"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            abort_process(message)
        raise SystemExit(message) from None


def abort_process(message: str) -> NoReturn:
    """End this process of several with a message, so that its launcher ends the others."""
    # An ordinary exit destroys the process group first, and may wait for the others forever.
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def abort_after_error(kind: type[BaseException], error: BaseException, trace: Any) -> NoReturn:
    """End this process of several with an error's traceback, or what it waited for in vain."""
    if (message := timeout_message(error, "--timeout_minutes")) is not None:
        abort_process(f"{Path(sys.argv[0]).name}: error: {message}")
    abort_process("".join(traceback.format_exception(kind, error, trace)))


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """Log a picture to TensorBoard, wandb or trackio, whichever the training reports to."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(image)[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [image]}, step)
        elif tracker.name == "trackio":
            trackio = import_module("trackio")
            tracker.log({name: trackio.Image(image)}, step)


def make_accelerator(options: Options) -> Accelerator:
    """The `Accelerator` of a training; with several processes, an exception in one ends them all."""
    trackers = list(map(str, get_available_trackers()))
    if options.report_to not in (None, "all", *trackers):
        installed = ", ".join(trackers) or "none"
        raise ValueError(
            f"--report_to {options.report_to}: it is not installed here, or no tracker; installed: "
            f"{installed}. Install it (pip install NAME), or leave the option out"
        )
    logging_dir = Path(options.output_dir) / options.logging_dir
    timeout = timedelta(minutes=options.timeout_minutes)
    try:
        accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            cpu=options.cpu,
            log_with=options.report_to,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
            project_config=ProjectConfiguration(options.output_dir, str(logging_dir)),
        )
    except ValueError as error:
        raise ValueError(f"--mixed_precision {options.mixed_precision}: {error}") from error
    except ImportError as error:
        raise ValueError(f"distributed_type DEEPSPEED: {error}") from error
    except torch.distributed.DistError as error:
        reason = str(error).splitlines()[0]
        limit = f"--timeout_minutes {options.timeout_minutes:g}"
        raise ValueError(f"{limit}: the processes didn't connect: {reason}") from error
    # A launcher's setting would override the option.
    accelerator.gradient_accumulation_steps = options.gradient_accumulation_steps
    kind = accelerator.distributed_type.value
    if kind == "MEGATRON_LM":
        raise ValueError(
            "distributed_type MEGATRON_LM is for language models: MULTI_GPU and its like, FSDP, "
            "DEEPSPEED and NO are allowed, e.g. with a file of training/accelerate"
        )
    if kind == "MULTI_CPU" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            "--cpu with distributed_type FSDP, which Accelerate leaves out on CPUs: a config "
            "without it, e.g. training/accelerate/cpu.yaml, is allowed"
        )
    lock_output(options, accelerator)
    if accelerator.num_processes > 1:
        sys.excepthook = abort_after_error
    return accelerator


def lock_output(options: Options, accelerator: Accelerator) -> None:
    """Check that --output_dir can be written, and lock it until `release_output` or the exit.

    Raises:
        ValueError: if it can't be written, or another training uses it.
    """
    release_output()
    if not accelerator.is_main_process:  # the main process has the lock for all
        return
    folder, cache = Path(options.output_dir), options.latents_cache
    try:
        check_writable(folder, "--output_dir", folder=True)
        check_writable(folder / options.logging_dir, "--logging_dir", folder=True)
        if cache is not None and not Path(cache).is_dir():  # one that can be read has a use
            check_writable(Path(cache), "--latents_cache", folder=True)
    except OSError as error:
        raise ValueError(str(error)) from error
    with named_errors("--output_dir"):
        OUTPUT_LOCK.enter_context(folder_lock(folder))


def release_output() -> None:
    """Release the lock of `lock_output`."""
    OUTPUT_LOCK.close()


def end_training(accelerator: Accelerator) -> None:
    """Wait for all processes and close the trackers."""
    # A thread of gloo may need the GIL to release the last reduction's tensors. A process that exits
    # at once would destroy its process group while it holds the GIL, and wait for that thread
    # forever (seen with torch 2.13).
    accelerator.wait_for_everyone()
    accelerator.end_training()
    # The model, in a cycle of references, keeps the process group. If the interpreter ended first, it
    # would end gloo's threads within C++, which calls std::terminate (seen with Python 3.11).
    atexit.register(gc.collect)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The complete tensor, if this process holds a shard of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def prepare_sharding(accelerator: Accelerator, model: torch.nn.Module, options: Options) -> None:
    """Set up FSDP or DeepSpeed (ZeRO 1 or 2) so that the result equals that of unsharded processes,
    up to rounding. Without them it does nothing.

    With bf16 both would convert the weights and the timesteps, which loses digits; instead the
    weights stay float32, and the forward pass runs under autocast, as without them.
    """
    if accelerator.distributed_type not in SHARDED:
        return
    _check_sharding(accelerator, options.optimizer)
    state = accelerator.state
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = state.fsdp_plugin
        plugin.mixed_precision_policy = None
        if plugin.transformer_cls_names_to_wrap is None:
            classes = {type(module).__name__ for module in model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(FSDP_BLOCKS & classes)
    else:
        config = state.deepspeed_plugin.deepspeed_config
        config.pop("train_batch_size", None)
        config |= {
            "train_micro_batch_size_per_gpu": options.train_batch_size,
            "bf16": {"enabled": False},
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "gradient_clipping": options.max_grad_norm,
        }
    if accelerator.mixed_precision == "bf16":
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))


def _check_sharding(accelerator: Accelerator, optimizer: str) -> None:
    """Raise a `ValueError` for settings that sharded training doesn't support."""
    state = accelerator.state
    checks = [
        ("--mixed_precision", accelerator.mixed_precision, ("no", "bf16")),
        ("--optimizer", optimizer, ("adamw", "adamw_fused")),
        ("dynamo_backend", state.dynamo_plugin.backend.value.lower(), ("no",)),
    ]
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = state.fsdp_plugin
        state_dict_type = plugin.state_dict_type.name
        checks.append(("fsdp_version", plugin.fsdp_version, (2,)))
        checks.append(("fsdp_state_dict_type", state_dict_type, ("FULL_STATE_DICT",)))
    else:
        checks.append(("zero_stage", state.deepspeed_plugin.zero_stage, (0, 1, 2)))
    kind = f"with distributed_type {accelerator.distributed_type.value}"
    for name, value, allowed in checks:
        if value not in allowed:
            raise ValueError(f"{name} {value}: {kind} one of {allowed} is allowed")

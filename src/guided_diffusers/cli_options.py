"""Options and start-up that several commands share: options, device, processes."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

SHARED: dict[str, dict[str, Any]] = {
    "--model": {
        "default": "fashion-mnist",
        "help": "a bundled model, a pipeline folder or a Hub id (default: %(default)s)",
    },
    "--revision": {"help": "of a model on the Hub: a branch, a tag or a commit (default: main)"},
    "--split": {"help": "split of the dataset (default: validation or test)"},
    "--image-column": {"help": "image column of the dataset (default: the first with images)"},
    "--label-column": {"help": "label column of the dataset (default: the first with class ids)"},
    "--judge": {
        "metavar": "NETWORK",
        "help": "a classifier of clean images with the same labels that was never used for "
        "guidance: as --features; `none`: no judge",
    },
    "--features": {
        "metavar": "NETWORK",
        "help": "feature network of the distances: inception (needs torch-fidelity; only then is "
        "it an FID), a bundled model (its judge), or the folder or Hub id of a "
        "NoiseAwareClassifier or a transformers vision model (default: the bundled judge)",
    },
    "--seed": {"type": int, "default": 0, "help": "random seed (default: %(default)s)"},
    "--batch-size": {"type": int, "default": 64, "help": "images a batch (default: %(default)s)"},
    "--device": {"help": "cpu, cuda, mps, ... (default: the fastest available)"},
    "--picture": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "draw the plots, which needs matplotlib (default: yes)",
    },
    "--conditional": {
        "action": argparse.BooleanOptionalAction,
        "help": "give the label to a class-conditional denoiser, too; otherwise only guidance "
        "steers (default: yes, if the denoiser accepts labels)",
    },
    "--quiet": {"action": "store_true", "help": "no progress bars"},
}


def add_shared_option(command: argparse.ArgumentParser, flag: str, **changes: Any) -> None:
    """Add an option of `SHARED` to a command; `changes` replace parts of its definition."""
    command.add_argument(flag, **{**SHARED[flag], **changes})


def add_shared_options(command: argparse.ArgumentParser, *flags: str) -> None:
    """Add options of `SHARED` to a command as they are."""
    for flag in flags:
        add_shared_option(command, flag)


def add_part_options(command: Any, required: bool = False) -> None:
    """Add --unet, --classifier and --vae, the parts of a pipeline as `hub.assembled` takes them."""
    option = command.add_argument
    help = "output of train_unet.py, or a pipeline's folder or Hub id"
    option("--unet", required=required, metavar="NETWORK", help=help)
    help = "output of train_classifier.py, a folder or Hub id (default: the network alone)"
    option("--classifier", metavar="CLASSIFIER", help=help)
    help = "autoencoder of a latent network, a folder or Hub id (default: that saved with it)"
    option("--vae", metavar="AUTOENCODER", help=help)


def select_device(name: str | None, processes: PartialState | None = None) -> torch.device:
    """The device called `name`, or, with several processes, the device of this process.

    Args:
        name: None: the fastest available device.
        processes: as from `launched_processes`.
    """
    import torch

    if processes is not None:
        return processes.device
    if name is not None:
        return torch.device(name)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def launched_world_size() -> int:
    """Number of processes started by a launcher (torch's or MPI's); 1 without a launcher."""
    from accelerate.utils import get_int_from_env

    return get_int_from_env(
        ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1
    )


def launched_processes(device: str | None) -> PartialState | None:
    """The processes started by a launcher, connected with each other; None for a single one.

    Args:
        device: value of --device.

    Raises:
        ValueError: for a device with an index, which all processes would use; if the processes
            can't connect, or run on another device.
    """
    started = launched_world_size()
    if started == 1:
        return None
    import torch
    from accelerate import PartialState

    kind, _, index = (device or "").partition(":")
    if index:
        raise ValueError(
            f"--device {device}: each of several processes has its own device; use --device {kind}"
        )
    # processes wait for the slowest one; if one dies, the launcher ends the others
    state = PartialState(
        cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=timedelta(days=30)
    )
    if state.num_processes != started:
        raise ValueError(
            f"the environment says that {started} processes were started, but "
            f"{state.num_processes} connected; use torchrun, accelerate launch or mpirun"
        )
    if device is not None and state.device.type != device:
        raise ValueError(f"--device {device}: the processes run on {state.device.type}")
    return state

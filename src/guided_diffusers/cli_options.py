"""Options and start-up that several commands share: options, device, processes."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, NoReturn

from .checks import MAX_SEED, check_number
from .defaults import ALGORITHMS
from .text import one_line

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

MAX_PIXELS = 2**14  # of a side of an image
DEFAULT_MODEL = "fashion-mnist"
#: environment variable that asks for tracebacks of errors
TRACEBACK = "GUIDED_DIFFUSERS_TRACEBACK"
#: errors whose message is written for users; any other is a bug
EXPECTED = (ValueError, OSError, RuntimeError, ImportError, FloatingPointError, MemoryError)


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong with an option in one line."""

    def error(self, message: str) -> NoReturn:
        message = one_line(message.removeprefix("argument "))
        # "--seed: -1: an integer ..." of the types below as "--seed -1: an integer ..."
        message = re.sub("^(--[a-z-]+): (?=[^ ]+: )", r"\1 ", message)
        sys.exit(f"{self.prog}: {message}")


def number(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, integer: bool = False
) -> Callable[[str], Any]:
    """A `type` of argparse: a finite number in the range of `check_number`."""

    def parse(text: str) -> Any:
        try:
            value: Any = int(text) if integer else float(text)
        except ValueError:
            value = text
        try:
            return check_number("", value, low, high, above=above, integer=integer)
        except ValueError as error:
            allowed = str(error).rpartition(": ")[2]
            raise argparse.ArgumentTypeError(f"{text}: {allowed}") from None

    return parse


def path(text: str) -> Path:
    """A `type` of argparse: a path, in which "~" is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("'': a path is needed")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def size(text: str) -> tuple[int, int]:
    """A `type` of argparse: (height, width) of "48x32", or of "32" for a square."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (0 < height <= MAX_PIXELS and 0 < width <= MAX_PIXELS):
        raise argparse.ArgumentTypeError(
            f"{text}: height x width such as 48x32, or one number, from 1 to {MAX_PIXELS} is allowed"
        )
    return height, width


#: of guidance: any finite number; a negative one steers away from the label
scale = number()
fraction = number(0, 1)
count = number(1, integer=True)
count_or_none = number(0, integer=True)
seed = number(0, MAX_SEED, integer=True)


@contextmanager
def one_line_errors(
    program: str,
    *,
    traceback: bool = False,
    abort: bool = False,
    timeout_option: str = "--timeout-minutes",
) -> Iterator[None]:
    """End the program with one line, and no traceback, for an error or Ctrl-C within.

    Args:
        program: what the line starts with.
        traceback: raise errors as they are; also with `GUIDED_DIFFUSERS_TRACEBACK=1`.
        abort: end this process of several at once, so that its launcher ends the others. (An
            ordinary exit destroys the process group first, and may wait for the others forever.)
        timeout_option: name of the option that limits the wait for other processes.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # a closed pipe is noticed here, not when the interpreter exits
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # or the interpreter would flush it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end("", 141, abort)
    except KeyboardInterrupt:
        _end(f"{program}: stopped; run the same command to go on", 130, abort)
    except Exception as error:
        if traceback or os.environ.get(TRACEBACK):
            raise
        message = one_line(timeout_message(error, timeout_option) or error)
        message = message or type(error).__name__
        if not isinstance(error, EXPECTED):
            message = (
                f"unexpected {type(error).__name__}: {message}; this is a bug, run with "
                f"--traceback (or {TRACEBACK}=1) for details"
            )
        _end(f"{program}: {message}", 1, abort)


def _end(message: str, code: int, abort: bool) -> NoReturn:
    if abort:
        print(message, file=sys.stderr, flush=True)
        os._exit(code)
    if code == 1:
        raise SystemExit(message) from None
    if message:
        print(message, file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def run_program(main: Callable[[], None]) -> None:
    """Run a script's `main`; errors and Ctrl-C end it, and its other processes, with one line."""
    traceback = "--traceback" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--traceback"]
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    name, limit = Path(sys.argv[0]).name, "--timeout_minutes"
    with one_line_errors(name, traceback=traceback, abort=several, timeout_option=limit):
        main()


#: how long a process waits for another one: long enough for reading a dataset, evaluating, saving
TIMEOUT_MINUTES = 120.0
MAX_TIMEOUT_MINUTES = 30 * 24 * 60.0
#: what gloo and torch's store say
TIMED_OUT = re.compile(r"Timed out waiting (\d+)ms|wait timeout after (\d+)ms")
ANSWER_SECONDS = 5.0  # in which the processes that wait tell each other

SHARED: dict[str, dict[str, Any]] = {
    "--model": {
        "default": DEFAULT_MODEL,
        "help": "a bundled model, a pipeline folder or a Hub id (default: %(default)s)",
    },
    "--revision": {"help": "of a model on the Hub: a branch, a tag or a commit (default: main)"},
    "--split": {"help": "split of the dataset (default: validation or test)"},
    "--image-column": {"help": "image column of the dataset (default: the first with images)"},
    "--label-column": {"help": "label column of the dataset (default: the first with class ids)"},
    "--judge": {
        "metavar": "NETWORK",
        "help": "a classifier of clean images with the same labels that was never used for "
        "guidance, which says whether an image has its label: as --features; `none`: no judge. "
        "Train one by train_classifier.py --max_timestep 0",
    },
    "--features": {
        "metavar": "NETWORK",
        "help": "feature network of the distances: inception (needs torch-fidelity; only then are "
        "they FID and MIND), dinov2-vit-b-14 (needs torch-fidelity 0.4), a bundled model (its judge), or "
        "the folder or Hub id of a NoiseAwareClassifier or a transformers vision model (default: the bundled judge)",
    },
    "--seed": {"type": seed, "default": 0, "help": "random seed (default: %(default)s)"},
    "--batch-size": {"type": count, "default": 64, "help": "images a batch (default: %(default)s)"},
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
    "--timeout-minutes": {
        "type": float,
        "default": TIMEOUT_MINUTES,
        "metavar": "M",
        "help": "of several processes: how long one waits for another that is stopped or slower "
        "(default: %(default)g)",
    },
}


def schedule(text: str) -> dict[str, list[float]]:
    """The knots of SIGMA:SCALE,SIGMA:SCALE,..."""
    try:
        knots = [tuple(map(float, knot.split(":"))) for knot in text.split(",")]
        sigmas, scales = zip(*knots, strict=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not SIGMA:SCALE,SIGMA:SCALE,..., numbers such as 0.5:0,2:1,20:3"
        ) from error
    return {"sigmas": list(sigmas), "scales": list(scales)}


def add_shared_option(command: argparse.ArgumentParser, flag: str, **changes: Any) -> None:
    """Add an option of `SHARED` to a command; `changes` replace parts of its definition."""
    command.add_argument(flag, **{**SHARED[flag], **changes})


def add_shared_options(command: argparse.ArgumentParser, *flags: str) -> None:
    """Add options of `SHARED` to a command as they are."""
    for flag in flags:
        add_shared_option(command, flag)


def add_pixel_options(command: argparse.ArgumentParser) -> None:
    """Add --image-range and --alpha-background, as the training scripts have them; `pixel_options`
    of `learning.pixels` reads them."""
    text = "the pixels that are black and white in the dataset, such as 0,4095"
    option = command.add_argument
    option(
        "--image-range", "--image_range", metavar="LOW,HIGH", help=f"{text} (default: by the file)"
    )
    text = "the colour under transparent images of the dataset, such as white"
    option("--alpha-background", "--alpha_background", metavar="COLOUR", help=text)


def add_call_options(command: argparse.ArgumentParser) -> Any:
    """Add the arguments of the pipeline's call; those left out are missing in the parsed options.

    Returns:
        Their group.
    """
    description = "Options left out have the model's defaults."
    group = command.add_argument_group("sampling", description, argument_default=argparse.SUPPRESS)
    for name, kind, metavar, help in (
        (
            "scale",
            scale,
            "SCALE",
            "classifier; 0: off; 1: the exact conditional model for an exact classifier with "
            "--no-conditional; larger: sharper, less varied",
        ),
        (
            "power",
            number(1),
            "W",
            "sample p(x) p(y|x)^W, with a classifier trained with --max_power; with --no-conditional, if "
            "the model knows labels",
        ),
        (
            "schedule",
            schedule,
            "SIGMA:SCALE,...",
            "multiply the scale at noise level sigma / alpha, linear in its logarithm between these",
        ),
        ("start", fraction, "FRACTION", "fraction of the run at which guidance starts, in [0, 1]"),
        ("stop", fraction, "FRACTION", "fraction of the run at which guidance stops, in [0, 1]"),
        ("every", count, "K", "evaluate the classifier every K steps"),
        (
            "tolerance",
            number(0, above=True),
            "T",
            "or when the estimated error exceeds T, in units of [-1, 1]",
        ),
    ):
        group.add_argument(f"--guidance-{name}", type=kind, metavar=metavar, help=help)
    help = "of classifier-free guidance, for a network with a null label; 0: off"
    group.add_argument("--classifier-free-scale", type=scale, metavar="SCALE", help=help)
    help = "guide the network's output, the mean of a DDPM step, or by operator splitting"
    group.add_argument("--guidance-algorithm", choices=ALGORITHMS, help=help)
    group.add_argument("--num-inference-steps", type=count, help="scheduler steps")
    return group


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
        return _checked_device(name)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def _checked_device(name: str) -> torch.device:
    """The device called `name`, on which a tensor could be made and read."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        devices = ["cpu"]
        if torch.accelerator.is_available():
            devices.append(str(torch.accelerator.current_accelerator()))
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device {name!r}: {', '.join(devices)} can be used here ({reason})"
        ) from None
    return device


def launched_world_size() -> int:
    """Number of processes started by a launcher (torch's or MPI's); 1 without a launcher."""
    from accelerate.utils import get_int_from_env

    return get_int_from_env(
        ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1
    )


def launched_processes(
    device: str | None, timeout_minutes: float = TIMEOUT_MINUTES
) -> PartialState | None:
    """The processes started by a launcher, connected with each other; None for a single one.

    Args:
        device: value of --device.
        timeout_minutes: value of --timeout-minutes.

    Raises:
        ValueError: for a time limit that is not positive; for a device with an index, which all
            processes would use; if the processes can't connect, or run on another device.
    """
    if not 0 < timeout_minutes <= MAX_TIMEOUT_MINUTES:
        raise ValueError(
            f"--timeout-minutes {timeout_minutes:g}: above 0, up to {MAX_TIMEOUT_MINUTES:g}, is "
            "allowed"
        )
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
    cpu = device == "cpu" or not torch.accelerator.is_available()
    try:
        state = PartialState(cpu=cpu, timeout=timedelta(minutes=timeout_minutes))
    except torch.distributed.DistError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the {started} processes didn't connect within --timeout-minutes {timeout_minutes:g}: "
            f"{reason}"
        ) from error
    if state.num_processes != started:
        raise ValueError(
            f"the environment says that {started} processes were started, but "
            f"{state.num_processes} connected; use torchrun, accelerate launch or mpirun"
        )
    if device is not None and state.device.type != device:
        raise ValueError(f"--device {device}: the processes run on {state.device.type}")
    return state


def timeout_message(error: BaseException, option: str) -> str | None:
    """What was waited for, if a process waited too long for others; None for other errors.

    Args:
        option: name of the option of the time limit.
    """
    found = TIMED_OUT.search(str(error))
    if found is None:
        return None
    import torch

    rank, minutes = torch.distributed.get_rank(), int(found[1] or found[2]) / 60_000
    missing = ", ".join(map(str, silent_ranks()))
    operation = "a collective operation"
    for frame in extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if Path(__file__).parent in path.parents or path.name == Path(sys.argv[0]).name:
            operation = f"{frame.name} ({path.name}:{frame.lineno})"
    return (
        f"process {rank} waited {minutes:g} minutes in {operation} for process {missing}, which is "
        f"stopped, lost or slower than that; {option} sets the limit"
    )


def silent_ranks() -> list[int]:
    """Ranks that are not among those that wait in vain now; called by each of the latter."""
    import torch

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    others = [other for other in range(world) if other != rank]
    if len(others) == 1:
        return others
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        store.set(f"timed out/{rank}", "")
        time.sleep(ANSWER_SECONDS)
        return [r for r in others if not store.check([f"timed out/{r}"])] or others
    except RuntimeError:  # the process that holds the store is the one that is waited for
        return others

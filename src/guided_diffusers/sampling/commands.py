"""`guided-diffusers sample`."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipeline import ALGORITHMS

if TYPE_CHECKING:
    from accelerate import PartialState

    from ..pipeline import ClassifierGuidedPipeline

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OF_THE_CALL = (
    "guidance_scale",
    "guidance_start",
    "guidance_stop",
    "classifier_free_scale",
    "num_inference_steps",
    "guidance_algorithm",
    "guidance_every",
    "guidance_tolerance",
)


def add_sample_command(commands: Any) -> None:
    command = commands.add_parser(
        "sample",
        help="images of labels",
        description="Generate images of one or more labels: one picture with a row a label, or a folder of any number "
        "of images. A folder's run goes on where it was when it is started again, and is shared among the "
        "processes of `accelerate launch -m guided_diffusers sample ...`.",
    )
    command.set_defaults(run=run_sample)
    option = command.add_argument
    option(
        "--model",
        default="fashion-mnist",
        help="a bundled model, a pipeline folder or a Hub id (default: %(default)s)",
    )
    option(
        "--revision",
        help="of a model of the Hub: a branch, a tag or a commit (default: the newest)",
    )
    option(
        "--label",
        nargs="+",
        required=True,
        metavar="LABEL",
        help="names or ids; `all`: every label of the model",
    )
    option(
        "--guidance-scale",
        type=float,
        default=argparse.SUPPRESS,
        help="how strongly the classifier steers; 0: off, 1: exact, more: sharper and less varied (default: the "
        "model's own)",
    )
    for name, what in (("start", "from"), ("stop", "until")):
        option(
            f"--guidance-{name}",
            type=float,
            metavar="FRACTION",
            default=argparse.SUPPRESS,
            help=f"{what} which fraction of the run the classifier steers, in [0, 1] (default: the model's own)",
        )
    option(
        "--classifier-free-scale",
        type=float,
        default=argparse.SUPPRESS,
        help="how strongly a network that knows the labels and a null label steers by itself; 0: off (default: the "
        "model's own)",
    )
    option(
        "--guidance-algorithm",
        choices=ALGORITHMS,
        default=argparse.SUPPRESS,
        help="how guidance enters a step: in the network's output, in the mean of a DDPM step, or as a part beside "
        "the scheduler's (default: the model's own)",
    )
    option(
        "--guidance-every",
        type=int,
        metavar="K",
        default=argparse.SUPPRESS,
        help="ask the classifier at every k-th step (default: the model's own)",
    )
    option(
        "--guidance-tolerance",
        type=float,
        metavar="T",
        default=argparse.SUPPRESS,
        help="instead, ask it again where its gradient turned so far that the image would be off by more, in units "
        "of [-1, 1] (default: the model's own)",
    )
    option(
        "--num-images",
        type=int,
        help="images in all, shared by the labels in turn (default: 10 a label)",
    )
    option(
        "--num-inference-steps",
        type=int,
        default=argparse.SUPPRESS,
        help="scheduler steps (default: the model's own)",
    )
    option(
        "--scheduler",
        help="a Diffusers scheduler: ddim, ddpm, euler, unipc, DPMSolverMultistepScheduler, ... "
        "(default: the model's own)",
    )
    option(
        "--conditional",
        action=argparse.BooleanOptionalAction,
        help="whether a class-conditional network gets the label, too (default: yes, where it can)",
    )
    option(
        "--seed",
        type=int,
        default=0,
        help="image i depends on the seed and i alone (default: %(default)s)",
    )
    option("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    option("--device", help="cpu, cuda, mps, ... (default: the fastest there is)")
    option(
        "--output",
        type=Path,
        default=Path("samples.png"),
        help=f"a picture ({', '.join(PICTURES)}) of all images, or a folder (default: %(default)s)",
    )
    option(
        "--format",
        choices=("imagefolder", "parquet", "npz"),
        help="of a folder: LABEL/NUMBER.png, Parquet files of `datasets`, or one samples.npz (arr_0, RGB, and the "
        "labels as arr_1) as evaluators read it (default: imagefolder)",
    )
    option(
        "--shard-size",
        type=int,
        help="of a folder: images that are written together; what is lost at most where a process is killed "
        "(default: 256, or --batch-size if that is more)",
    )
    option(
        "--diagnostics",
        type=Path,
        metavar="FILE",
        help="what guidance did at each step, as figures (.json) or curves (.png); the images stay the same",
    )
    option("--quiet", action="store_true", help="no progress bar")


def run_sample(options: argparse.Namespace) -> None:
    from diffusers.utils.logging import disable_progress_bar

    from ..utils import exchanged, load_pipeline

    check(options)
    processes = team(options.device)
    main = processes is None or processes.is_main_process
    options.quiet = options.quiet or not main
    if options.quiet:
        disable_progress_bar()
    pipeline = load_pipeline(options.model, options.revision).to(
        device_of(options.device, processes)
    )
    if options.scheduler:
        pipeline.scheduler = exchanged(pipeline.scheduler, options.scheduler)
    labels = labels_of(options.label, pipeline)
    count = options.num_images or 10 * len(labels)
    call = {name: value for name, value in vars(options).items() if name in OF_THE_CALL}
    call["conditional"] = options.conditional
    record = None
    if options.diagnostics:
        from ..diagnosis.steps import GuidanceDiagnostics

        record = call["callback_on_step_end"] = GuidanceDiagnostics(labels)

    if options.output.suffix.lower() in PICTURES:
        said = make_picture(pipeline, labels, count, call, options)
    else:
        said = make_folder(pipeline, labels, count, call, options, processes)
    if record is not None:
        record.save(options.diagnostics)
    if processes is not None:
        processes.destroy_process_group()
    if main:
        names = pipeline.config.id2label or {}
        shown = ", ".join(str(names.get(label, label)) for label in labels)
        scale = f"guidance scale {call['guidance_scale']:g}, " if "guidance_scale" in call else ""
        print(
            f"{count} images of {shown} ({scale}{type(pipeline.scheduler).__name__}, seed {options.seed}) {said}: "
            f"{options.output}"
        )


def check(options: argparse.Namespace) -> None:
    """Refuse options before the work.

    Raises:
        ValueError: for a number below 1, or what doesn't go with a picture, a folder or several processes.
        ImportError: for curves without matplotlib.
    """
    for name in ("batch_size", "num_images", "shard_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1 is allowed")
    several, picture = world_size() > 1, options.output.suffix.lower() in PICTURES
    for name in ("format", "shard_size"):
        if picture and getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: --output {options.output} is a "
                "picture; it is for a folder"
            )
    if picture and several:
        raise ValueError(
            f"--output {options.output}: a picture is made by one process; several make a folder"
        )
    if options.diagnostics:
        from ..diagnosis.steps import check_output

        check_output(options.diagnostics)
        if several:
            raise ValueError(
                f"--diagnostics {options.diagnostics}: {world_size()} processes were started, each of "
                "which sees a share of the images; one process is allowed"
            )


def world_size() -> int:
    """How many processes a launcher says it started, torch's or one of MPI; 1 without."""
    from accelerate.utils import get_int_from_env

    return get_int_from_env(
        ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1
    )


def team(device: str | None) -> PartialState | None:
    """The processes that a launcher started, where there are several.

    Raises:
        ValueError: for a device with a number, which they would all use; for processes that don't find each other, or
            have another device.
    """
    if (started := world_size()) == 1:
        return None
    import torch
    from accelerate import PartialState

    if ":" in (device or ""):
        raise ValueError(
            f"--device {device}: with several processes each has its own; {device.partition(':')[0]} is "
            "allowed"
        )
    # they wait for the slowest; where one died, the launcher ends the others
    state = PartialState(
        cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=timedelta(days=30)
    )
    if state.num_processes != started:
        raise ValueError(
            f"the environment says that {started} processes were started, and {state.num_processes} found "
            "each other; start them with torchrun, accelerate launch or mpirun"
        )
    if device is not None and state.device.type != device:
        raise ValueError(f"--device {device}: the processes were given {state.device.type}")
    return state


def device_of(device: str | None, processes: PartialState | None) -> Any:
    import torch

    if processes is not None:
        return processes.device
    fastest = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return torch.device(device or fastest)


def labels_of(given: list[str], pipeline: ClassifierGuidedPipeline) -> list[int]:
    """The ids of the labels of the command line.

    Raises:
        ValueError: for an unknown one, or `all` where it isn't known how many there are.
    """
    from .scale import label_ids

    if given == ["all"]:
        if not pipeline.num_labels:
            raise ValueError(
                "--label all: the model doesn't say how many labels it has; give their ids"
            )
        return list(range(pipeline.num_labels))
    names = (pipeline.config.id2label or {}).values()
    return label_ids(
        pipeline, [int(one) if one.isdigit() and one not in names else one for one in given]
    )


def make_picture(
    pipeline: ClassifierGuidedPipeline,
    labels: list[int],
    count: int,
    call: dict[str, Any],
    options: argparse.Namespace,
) -> str:
    """One picture with a row a label."""
    from tqdm.auto import tqdm

    from .batches import sample
    from .pictures import grid, save_image

    images, began = {}, time.perf_counter()
    one_batch = count <= options.batch_size  # then the steps are worth a bar, else the images
    pipeline.set_progress_bar_config(disable=options.quiet or not one_batch, unit="step")
    with tqdm(total=count, unit="image", disable=options.quiet or one_batch) as bar:
        for indices, batch in sample(
            pipeline, labels, options.seed, options.batch_size, range(count), **call
        ):
            images.update(zip(indices, batch, strict=True))
            bar.update(len(batch))
    seconds = time.perf_counter() - began
    in_rows = [images[i] for row in range(len(labels)) for i in range(row, count, len(labels))]
    id2label = pipeline.config.id2label or {}
    names = [id2label.get(label, str(label)) for label in labels]
    save_image(grid(in_rows, names if count % len(labels) == 0 else None), options.output)
    return f"in {seconds:.1f} s"


def make_folder(
    pipeline: ClassifierGuidedPipeline,
    labels: list[int],
    count: int,
    call: dict[str, Any],
    options: argparse.Namespace,
    processes: PartialState | None,
) -> str:
    """Any number of images, or those of them that aren't there yet."""
    from .manifest import commit
    from .scale import sample_to_folder

    if options.diagnostics and options.output.exists() and any(options.output.iterdir()):
        raise ValueError(
            f"--diagnostics: {options.output} isn't empty, and images that are there already would not be "
            "counted; a new folder is allowed"
        )
    made = sample_to_folder(
        pipeline,
        labels,
        options.output,
        count,
        seed=options.seed,
        batch_size=options.batch_size,
        shard_size=options.shard_size or max(256, options.batch_size),
        format=options.format or "imagefolder",
        model=options.model,
        revision=commit(options.model, options.revision),
        processes=processes,
        progress=not options.quiet,
        **call,
    )
    if made.before:
        print(f"{made.before} of {count} images were there", file=sys.stderr)
    rate = f", {(count - made.before) / made.seconds:.1f} images/s" if count > made.before else ""
    shared = f" by {processes.num_processes} processes" if processes is not None else ""
    return f"in {made.seconds:.1f} s{rate}{shared}"

"""`guided-diffusers sample`."""

from __future__ import annotations

import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli_options import (
    DEFAULT_MODEL,
    add_call_options,
    add_part_options,
    add_shared_option,
    add_shared_options,
    count,
    launched_processes,
    launched_world_size,
    path,
    select_device,
    size,
)
from ..defaults import DEFAULTS

if TYPE_CHECKING:
    from accelerate import PartialState

    from ..pipeline import ClassifierGuidedPipeline

PICTURE_FORMATS = (".png", ".jpg", ".jpeg", ".webp")
MAX_LINES = 20  # of labels with their evidence
MAX_DIGITS = 18  # of a label's id
#: suffixes of files that aren't written, so that no folder gets such a name by mistake
OTHER_FILES = set(
    ".gif .bmp .tif .tiff .svg .pdf .npz .npy .parquet .arrow .zip .tar .gz .json .csv .txt .html "
    ".md .pt .pth .safetensors .mp4 .avif .jxl".split()
)


def add_sample_command(commands: Any) -> None:
    command = commands.add_parser(
        "sample",
        help="images of labels",
        description="Generate images of one or more labels: one picture with a row per label, or a "
        "folder of any number of images. An interrupted run into a folder is resumed when it is "
        "started again, and `accelerate launch -m guided_diffusers sample ...` divides it among "
        "processes.",
    )
    command.set_defaults(run=run_sample)
    add_shared_options(command, "--model", "--revision")
    add_part_options(
        command.add_argument_group("parts", "What was just trained, instead of a --model.")
    )
    option = command.add_argument
    help = "names or ids; `all`: every label of the model. Only a network without labels needs none"
    option("--label", nargs="+", metavar="LABEL", help=help)
    option(
        "--num-images", type=count, help="total, with the labels in turn (default: 10 per label)"
    )
    option("--scheduler", help="ddim, ddpm, euler, unipc, dpmsolver++, ... (default: the model's)")
    flags = "--conditional", "--batch-size", "--device", "--timeout-minutes", "--quiet"
    add_shared_options(command, *flags)
    help = "random seed; image i depends only on the seed and i (default: %(default)s)"
    add_shared_option(command, "--seed", help=help)
    group = add_call_options(command)
    help = (
        "each K images of a label are a population, weighted and resampled (--scheduler ddpm, or "
        "another one with noise in each step)"
    )
    group.add_argument("--particles", type=count, metavar="K", help=help, default=SUPPRESS)
    help = "size of the images, such as 48x32 (height x width), if the networks allow others"
    group.add_argument("--resolution", type=size, metavar="HxW", help=help, default=SUPPRESS)
    _add_output_options(command)


def _add_output_options(command: ArgumentParser) -> None:
    option = command.add_argument_group("output").add_argument
    help = f"a picture ({', '.join(PICTURE_FORMATS)}) or a folder (default: %(default)s)"
    option("--output", type=path, default=Path("samples.png"), help=help)
    help = (
        "of a folder: LABEL/NUMBER.png, Parquet files of `datasets`, or one samples.npz as "
        "evaluators read it (arr_0: RGB images, arr_1: labels) (default: imagefolder)"
    )
    option("--format", choices=("imagefolder", "parquet", "npz"), help=help)
    help = "images written together, lost by a kill (default: 256, or --batch-size if more)"
    option("--shard-size", type=count, help=help)
    help = (
        "leave out images that are not finite, and list them; otherwise such an image ends the run"
    )
    option("--skip-failed", action="store_true", help=help)
    help = "metrics (.json) or curves (.png) of guidance at each step; images stay the same"
    option("--diagnostics", type=path, metavar="FILE", help=help)


def run_sample(options: Namespace) -> None:
    from diffusers.utils.logging import disable_progress_bar

    from ..assembly import assembled
    from ..text import printable
    from ..utils import load_pipeline, scheduler_for
    from .batches import list_images

    check_options(options)
    processes = launched_processes(options.device, options.timeout_minutes)
    is_main = processes is None or processes.is_main_process
    options.quiet = options.quiet or not is_main
    if options.quiet:
        disable_progress_bar()
    if is_main:
        check_outputs(options)
    if options.unet is not None:
        pipeline = assembled(options.unet, options.classifier, options.vae, options.scheduler)
        options.model, options.revision = options.unet, None
    else:
        pipeline = load_pipeline(options.model, options.revision)
    pipeline.to(select_device(options.device, processes))
    if options.scheduler is not None:
        pipeline.scheduler = scheduler_for(pipeline.scheduler, options.scheduler)
    labels = parse_label_options(options.label, pipeline)
    if labels == [None] and not is_picture(options.output):
        raise ValueError(
            f"--output {options.output}: of a network without labels, a picture "
            f"({', '.join(PICTURE_FORMATS)}) is allowed"
        )
    if pipeline.has_arrays and is_picture(options.output):
        raise ValueError(
            f"--output {options.output}: the model's samples are arrays, not pictures; a folder, with "
            "--format npz or parquet, is allowed"
        )
    particles = getattr(options, "particles", None)
    options.num_images = options.num_images or (particles or 10) * len(labels)
    check_number_of_images(options.num_images, particles)
    call = {name: value for name, value in vars(options).items() if name in DEFAULTS}
    call["conditional"] = options.conditional
    if particles is not None:
        call["particles"] = particles
    if "resolution" in options:
        call["height"], call["width"] = options.resolution
    diagnostics = None
    if options.diagnostics:
        from ..diagnosis import GuidanceDiagnostics

        diagnostics = call["callback_on_step_end"] = GuidanceDiagnostics(
            [] if labels == [None] else labels
        )

    if is_picture(options.output):
        timing, failed, populations = make_picture(pipeline, labels, call, options)
    else:
        timing, failed, populations = make_folder(pipeline, labels, call, options, processes)

    if diagnostics is not None:
        diagnostics.save(options.diagnostics)
    if processes is not None:
        processes.destroy_process_group()
    if is_main:
        id2label = pipeline.config.id2label or {}
        names = ", ".join(
            printable(id2label.get(label, label)) for label in labels[: options.num_images]
        )
        of_labels = f" of {names}" if options.label else ""
        settings = describe_settings(pipeline, call, options.seed)
        count = options.num_images - len(failed)
        noun = "image" if count == 1 else "images"
        print(f"{count} {noun}{of_labels} ({settings}) {timing}: {printable(options.output)}")
        for line in describe_populations(pipeline, labels, populations, particles):
            print(line)
        if failed:
            print(f"{len(failed)} not finite, left out: {list_images(failed)}", file=sys.stderr)


def describe_settings(pipeline: ClassifierGuidedPipeline, call: dict[str, Any], seed: int) -> str:
    """Settings of the run, also those that are the model's defaults, as text."""
    from .manifest import resolve_defaults

    values = resolve_defaults(pipeline, call)
    parts = [
        f"guidance scale {values['guidance_scale']:g}",
        f"{type(pipeline.scheduler).__name__}",
        f"seed {seed}",
        f"{values['num_inference_steps']} steps",
    ]
    if values["guidance_power"] is not None:
        parts.insert(1, f"power {values['guidance_power']:g}")
    if values["guidance_schedule"] is not None:
        schedule = values["guidance_schedule"]
        knots = zip(schedule["sigmas"], schedule["scales"], strict=True)
        parts.insert(1, "times " + ", ".join("{1:g} at {0:g}".format(*knot) for knot in knots))
    interval = values["guidance_start"], values["guidance_stop"]
    if interval != (0, 1):
        parts.append("guided from {:g} to {:g}".format(*interval))
    for name in ("classifier_free_scale", "guidance_algorithm", "guidance_every"):
        if values[name] != DEFAULTS[name]:
            parts.append(f"{name.replace('_', ' ')} {values[name]}")
    if values["guidance_tolerance"] is not None:
        parts.append(f"tolerance {values['guidance_tolerance']:g}")
    return ", ".join(parts)


def describe_populations(
    pipeline: ClassifierGuidedPipeline,
    labels: Sequence[int | None],
    populations: Sequence[dict[str, Any]],
    particles: int | None,
) -> Iterator[str]:
    """A line for each label: the means over its populations."""
    from statistics import fmean

    from ..text import printable

    names = pipeline.config.id2label or {}
    for row, label in enumerate(labels[:MAX_LINES]):
        own = [record for record in populations if record["population"] % len(labels) == row]
        if own:
            evidence, size, ancestors = (
                fmean(record[name] for record in own)
                for name in ("log_evidence", "effective_sample_size", "ancestors")
            )
            name = "samples" if label is None else printable(names.get(label, str(label)))
            noun = "population" if len(own) == 1 else "populations"
            yield (
                f"{name}: log evidence {evidence:.2f}, effective sample size {size:.1f} of {particles}, "
                f"{ancestors:.1f} ancestors ({len(own)} {noun})"
            )


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_FORMATS


def check_options(options: Namespace) -> None:
    """Check the options before any computation."""
    for name in ("classifier", "vae"):
        if options.unet is None and getattr(options, name) is not None:
            raise ValueError(f"--{name} {getattr(options, name)}: --unet is needed, too")
    if options.unet is not None and (options.model, options.revision) != (DEFAULT_MODEL, None):
        raise ValueError(f"--unet {options.unet}: --model and --revision can't be given, too")
    world_size, output = launched_world_size(), options.output
    suffixes = {output.suffix.lower(), output.name.lower()}  # ".png" is a name without a suffix
    named_file = output.name.lower() in PICTURE_FORMATS or suffixes & OTHER_FILES
    if named_file and not output.is_dir():
        raise ValueError(
            f"--output {output}: a picture ({', '.join(PICTURE_FORMATS)}) or a folder is allowed; "
            "--format chooses the files in a folder"
        )
    for name in ("format", "shard_size"):
        value = getattr(options, name)
        if value is not None and is_picture(output):
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: --output {output} is a picture; use a folder"
            )
    if world_size > 1 and is_picture(output):
        raise ValueError(
            f"--output {output}: {world_size} processes can't make a picture; use a folder, or one "
            "process"
        )
    if not options.diagnostics:
        return
    if "particles" in options:
        raise ValueError(
            f"--diagnostics {options.diagnostics}: with --particles images are exchanged within the "
            "run; only one of the two is allowed"
        )
    if options.skip_failed:
        raise ValueError(
            f"--diagnostics {options.diagnostics}: with --skip-failed images are generated twice; "
            "only one of the two is allowed"
        )
    if options.diagnostics == output:
        raise ValueError(f"--diagnostics {output}: --output has the same name; use another one")
    from ..diagnosis import check_output

    check_output(options.diagnostics)
    if world_size > 1:
        raise ValueError(
            f"--diagnostics {options.diagnostics}: {world_size} processes were started, each with "
            "a part of the images; one process is allowed"
        )
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"--diagnostics: {output} isn't empty, and its images would not be counted; use a new "
            "folder"
        )


def check_number_of_images(num_images: int, particles: int | None) -> None:
    """Raise a ValueError unless the images are whole populations."""
    if particles is not None and num_images % particles:
        raise ValueError(
            f"--num-images {num_images}: with --particles {particles}, whole populations, a multiple "
            "of it, are allowed"
        )


def check_outputs(options: Namespace) -> None:
    """Check, before the work, that the output can be written."""
    from ..files import check_writable

    check_writable(options.output, "--output", folder=not is_picture(options.output))
    if options.diagnostics:
        check_writable(options.diagnostics, "--diagnostics")


def parse_label_options(
    values: list[str] | None, pipeline: ClassifierGuidedPipeline
) -> list[int | None]:
    """Ids of the values of --label; [None] for a network that takes none."""
    from .folder import label_ids

    takes_labels = pipeline.classifier is not None or pipeline.num_class_embeds is not None
    if not values:
        if takes_labels:
            names = list((pipeline.config.id2label or {}).values())
            known = f": {', '.join(map(str, names[:10]))}" if names else ""
            raise ValueError(
                f"--label is needed: names, ids, or `all` of the model's labels{known}"
            )
        return [None]
    if values == ["all"]:
        if not pipeline.num_labels:
            raise ValueError("--label all: the model's number of labels is unknown; use their ids")
        return list(range(pipeline.num_labels))
    names = (pipeline.config.id2label or {}).values()
    ids = {
        value: int(value)
        for value in values
        if value.isascii() and value.isdecimal() and len(value) <= MAX_DIGITS and value not in names
    }
    return label_ids(pipeline, [ids.get(value, value) for value in values])


def make_picture(
    pipeline: ClassifierGuidedPipeline, labels: list[int], call: dict[str, Any], options: Namespace
) -> tuple[str, list[int], Sequence[dict[str, Any]]]:
    """Save one picture with a row per label; the duration as text, what `--skip-failed` left out,
    which is white, and the populations."""
    from PIL import Image

    from .batches import per_image, progress_bars, sample
    from .pictures import check_size, grid, save_image

    start, count = time.perf_counter(), options.num_images
    names = None
    if count % (len(labels) * (call.get("particles") or 1)) == 0 and labels != [None]:
        id2label = pipeline.config.id2label or {}
        names = [id2label.get(label, str(label)) for label in labels]
    failed: list[int] | None = [] if options.skip_failed else None
    images: dict[int, Image.Image] = {}
    populations: list[dict[str, Any]] = []
    lists = range(count), failed, populations
    batches = sample(pipeline, labels, options.seed, options.batch_size, *lists, **call)
    with progress_bars(pipeline, count, options.batch_size, show=not options.quiet) as bar:
        for indices, batch in batches:
            if not images:
                check_size(batch[0], count, names, options.output)
            images.update(zip(indices, batch, strict=True))
            bar.update(len(batch))
    if not images:
        raise FloatingPointError(f"none of the {count} images is finite")
    missing = Image.new("RGB", next(iter(images.values())).size, "white")
    seconds = time.perf_counter() - start
    of_images = per_image(range(len(labels)), call.get("particles"))
    order = sorted(range(count), key=lambda i: of_images[i % len(of_images)])
    save_image(grid([images.get(i, missing) for i in order], names), options.output)
    return f"in {seconds:.1f} s", failed or [], populations


def make_folder(
    pipeline: ClassifierGuidedPipeline,
    labels: list[int],
    call: dict[str, Any],
    options: Namespace,
    processes: PartialState | None,
) -> tuple[str, Sequence[int], Sequence[dict[str, Any]]]:
    """Generate the missing images of a folder; the duration and speed as text, what
    `--skip-failed` left out, and the populations."""
    from .folder import sample_to_folder
    from .manifest import hub_commit

    result = sample_to_folder(
        pipeline,
        labels,
        **{name: getattr(options, name) for name in ("num_images", "seed", "batch_size", "model")},
        folder=options.output,
        shard_size=options.shard_size or _shard_size(options.batch_size, call),
        format=options.format or "imagefolder",
        skip_failed=options.skip_failed,
        # of assembled parts, the hash of all weights
        revision=None if options.unet else hub_commit(options.model, options.revision),
        processes=processes,
        progress=not options.quiet,
        timeout_minutes=options.timeout_minutes,
        **call,
    )
    if result.before:
        print(f"{result.before} of {result.images} images existed", file=sys.stderr)
    timing = f"in {result.seconds:.1f} s"
    generated = result.images - result.before
    if generated:
        timing += f", {generated / result.seconds:.1f} images/s"
    if processes is not None:
        timing += f" by {processes.num_processes} processes"
    return timing, result.failed, result.populations


def _shard_size(batch_size: int, call: dict[str, Any]) -> int:
    """Images written together by default: of whole populations."""
    particles = call.get("particles") or 1
    size = max(256, batch_size, particles)
    return size - size % particles

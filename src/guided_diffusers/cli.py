"""The program `guided-diffusers`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .diagnosis.commands import add_inspect_command
from .hub.commands import add_hub_commands
from .openai import add_convert_command

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from .pipeline import ClassifierGuidedPipeline

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; what is wrong with its arguments is said in a line, without a traceback."""
    parser = argparse.ArgumentParser("guided-diffusers", description="Guidance of diffusion sampling.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_sample_command(commands)
    add_convert_command(commands)
    add_inspect_command(commands)
    add_hub_commands(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        sys.exit(f"guided-diffusers {options.command}: {error}")


def add_sample_command(commands: Any) -> None:
    command = commands.add_parser(
        "sample", help="images of labels",
        description="Generate images of one or more labels: one picture with a row a label, or a folder of images.")
    command.set_defaults(run=run_sample)
    option = command.add_argument
    option("--model", default="fashion-mnist",
           help="a bundled model, a pipeline folder or a Hub id (default: %(default)s)")
    option("--label", nargs="+", required=True, metavar="LABEL",
           help="names or ids; `all`: every label of the model")
    option("--guidance-scale", type=float, default=argparse.SUPPRESS,
           help="how strongly the classifier steers; 0: off, 1: exact, more: sharper and less varied (default: the "
                "model's own)")
    option("--classifier-free-scale", type=float, default=argparse.SUPPRESS,
           help="how strongly a network that knows the labels and a null label steers by itself; 0: off (default: the "
                "model's own)")
    option("--num-images", type=int, help="images in all, shared by the labels in turn (default: 10 a label)")
    option("--num-inference-steps", type=int, default=argparse.SUPPRESS,
           help="scheduler steps (default: the model's own)")
    option("--scheduler", help="a Diffusers scheduler: ddim, ddpm, euler, unipc, DPMSolverMultistepScheduler, ... "
                               "(default: the model's own)")
    option("--conditional", action=argparse.BooleanOptionalAction,
           help="whether a class-conditional network gets the label, too (default: yes, where it can)")
    option("--seed", type=int, default=0, help="image i depends on the seed and i alone (default: %(default)s)")
    option("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    option("--device", help="cpu, cuda, mps, ... (default: the fastest there is)")
    option("--output", type=Path, default=Path("samples.png"),
           help=f"a picture ({', '.join(PICTURES)}) of all images, or a folder that gets LABEL/NUMBER.png "
                "(default: %(default)s)")
    option("--quiet", action="store_true", help="no progress bar")


def run_sample(options: argparse.Namespace) -> None:
    import torch
    from diffusers.utils.logging import disable_progress_bar
    from tqdm.auto import tqdm

    from .sampling import grid, sample, save_image

    for name in ("batch_size", "num_images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1 is allowed")
    if options.quiet:
        disable_progress_bar()
    fastest = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(options.device or fastest)
    pipeline = load_pipeline(options.model).to(device)
    if options.scheduler:
        pipeline.scheduler = exchanged(pipeline.scheduler, options.scheduler)
    id2label = pipeline.config.id2label or {}
    labels: list[Any] = [int(label) if label.isdigit() and label not in id2label.values() else label
                         for label in options.label]
    if options.label == ["all"]:
        labels = list(range(pipeline.num_labels or 0))
        if not labels:
            raise ValueError("--label all: the model doesn't say how many labels it has; give their ids")
    count = options.num_images or 10 * len(labels)

    given = ("guidance_scale", "classifier_free_scale", "num_inference_steps")
    call = {name: value for name, value in vars(options).items() if name in given}
    images, began = {}, time.perf_counter()
    one_batch = count <= options.batch_size  # then the steps are worth a bar, else the images
    pipeline.set_progress_bar_config(disable=options.quiet or not one_batch, unit="step")
    with tqdm(total=count, unit="image", disable=options.quiet or one_batch) as bar:
        for indices, batch in sample(pipeline, labels, options.seed, options.batch_size, range(count),
                                     conditional=options.conditional, **call):
            images.update(zip(indices, batch, strict=True))
            bar.update(len(batch))
    seconds = time.perf_counter() - began

    names = [id2label.get(label, str(label)) if isinstance(label, int) else label for label in labels]
    if options.output.suffix.lower() in PICTURES:
        in_rows = [images[i] for row in range(len(labels)) for i in range(row, count, len(labels))]
        save_image(grid(in_rows, names if count % len(labels) == 0 else None), options.output)
    else:
        for i, image in images.items():
            save_image(image, options.output / names[i % len(labels)].replace("/", "-") / f"{i:06d}.png")
    scale = f"guidance scale {call['guidance_scale']:g}, " if "guidance_scale" in call else ""
    print(f"{count} images of {', '.join(names)} ({scale}{type(pipeline.scheduler).__name__}, seed {options.seed}) in "
          f"{seconds:.1f} s: {options.output}")


def load_pipeline(model: str) -> ClassifierGuidedPipeline:
    """A bundled pipeline by its name, else a folder or a Hub id."""
    from .pipeline import ClassifierGuidedPipeline

    if "/" not in model and not Path(model).exists():
        return ClassifierGuidedPipeline.from_bundled(model)
    return ClassifierGuidedPipeline.from_pretrained(model)


def exchanged(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler called `name`, for the network that `scheduler` is for.

    Raises:
        ValueError: if there is none, or it is for networks of another kind.
    """
    found = find_scheduler(name)
    fitting = {cls.__name__ for cls in (type(scheduler), *scheduler.compatibles)}
    if found.__name__ not in fitting:
        raise ValueError(f"--scheduler {name}: {found.__name__} doesn't fit the model, whose "
                         f"{type(scheduler).__name__} can be exchanged for {', '.join(sorted(fitting))}")
    return found.from_config(scheduler.config)


def find_scheduler(name: str) -> type[SchedulerMixin]:
    """A scheduler class of Diffusers by its name, or the part of it before `Scheduler`, `Discrete` or `Multistep`.

    Raises:
        ValueError: if there is none; the message lists them.
    """
    import diffusers

    from .noise import OUT_OF_REACH

    known = {}
    for cls in sorted(dir(diffusers.schedulers), key=len, reverse=True):
        if cls.endswith("Scheduler") and not cls.startswith("Flax") and cls not in OUT_OF_REACH:
            short = cls.removesuffix("Scheduler")
            for alias in (cls, short, short.removesuffix("Discrete"), short.removesuffix("Multistep")):
                known[alias.lower()] = cls
    if name.lower() not in known:
        raise ValueError(f"scheduler {name!r} is unknown; allowed: {', '.join(sorted(set(known.values())))}")
    return getattr(diffusers, known[name.lower()])

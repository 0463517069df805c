"""`guided-diffusers sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..pipeline import ALGORITHMS


def add_sweep_command(commands: Any) -> None:
    command = commands.add_parser(
        "sweep",
        help="whether guidance helps, at which scale, at which cost",
        description="Measure guidance at every combination of scales, schedulers, steps and intervals, at the same "
        "seeds, and write a report: report.html, which needs no network, report.md for a model card, "
        "curves, images. Each point is measured once: started again, the sweep goes on where it was. "
        "Several processes on one folder, or those of `accelerate launch -m guided_diffusers sweep ...`, "
        "share the points.",
    )
    command.set_defaults(run=run_sweep)
    option = command.add_argument
    option(
        "--model",
        default="fashion-mnist",
        help="a bundled model, a pipeline folder or a Hub id, with a classifier (default: %(default)s)",
    )
    option(
        "--revision",
        help="of a model of the Hub: a branch, a tag or a commit (default: the newest)",
    )
    option(
        "--reference",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="labelled real images: a Hub name, an image folder or a folder of Parquet files",
    )
    option("--split", help="of the real images (default: validation, test or train)")
    option("--image-column", help="of the real images (default: the first with images)")
    option("--label-column", help="of the real images (default: the first with class ids)")
    option(
        "--features",
        metavar="NETWORK",
        help="whose features are compared: inception (needs torch-fidelity; only then is it an FID), a bundled "
        "model (its judge), or the folder or Hub id of a NoiseAwareClassifier or a vision model of "
        "transformers (default: the judge of the bundled model)",
    )
    option(
        "--judge",
        metavar="NETWORK",
        help="a classifier of the same labels that never guided: as --features; `none`: no judge (default: the "
        "network of --features, where that is a classifier)",
    )
    option(
        "--scales",
        type=float,
        nargs="+",
        default=[0, 1, 2, 3, 5, 8, 10],
        metavar="SCALE",
        help="guidance scales; 0, no guidance, is always among them (default: 0 1 2 3 5 8 10)",
    )
    option(
        "--schedulers",
        nargs="+",
        metavar="NAME",
        help="ddim, dpmsolver++, dpmsolver++3m, sde-dpmsolver++, ddpm, euler, ... (default: the model's own)",
    )
    option(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help="scheduler steps (default: the model's own)",
    )
    option(
        "--intervals",
        nargs="+",
        type=interval,
        metavar="START:STOP",
        help="the parts of the run that are guided, in [0, 1]; 0:1 is all of it (default: the model's own)",
    )
    option(
        "--algorithms",
        nargs="+",
        choices=ALGORITHMS,
        metavar="NAME",
        help=f"how guidance enters the step: {', '.join(ALGORITHMS)} (default: the model's own)",
    )
    option(
        "--every",
        type=int,
        nargs="+",
        default=[],
        metavar="K",
        help="ask the classifier at every k-th step (default: the model's own)",
    )
    option(
        "--tolerances",
        type=float,
        nargs="+",
        default=[],
        metavar="T",
        help="also: ask it again where its gradient turned so far that an image would be off by more, in units of "
        "x0; not combined with --every",
    )
    option(
        "--num-images",
        type=int,
        default=1000,
        metavar="N",
        help="of each point, of all labels in turn (default: %(default)s)",
    )
    option(
        "--conditional",
        action=argparse.BooleanOptionalAction,
        help="whether a class-conditional network gets the label, too; no: guidance alone steers (default: yes, "
        "where it can)",
    )
    option(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what the network computes in (autocast); sampler and classifier stay as they are (default: "
        "%(default)s)",
    )
    option(
        "--bootstrap",
        type=int,
        default=100,
        metavar="N",
        help="resamples that intervals are made of (default: %(default)s)",
    )
    option(
        "--max-features",
        type=int,
        default=2000,
        metavar="N",
        help="images, a sample, whose features are kept for the figures that need them one by one (default: "
        "%(default)s)",
    )
    option(
        "--seed",
        type=int,
        default=0,
        help="image i depends on the seed and i alone (default: %(default)s)",
    )
    option("--batch-size", type=int, default=50, help="images at once (default: %(default)s)")
    option("--device", help="cpu, cuda, mps, ... (default: the fastest there is)")
    option(
        "--output",
        type=Path,
        default=Path("sweep"),
        metavar="FOLDER",
        help="new, or of points with the same settings, which then are in the report, too (default: %(default)s)",
    )
    option("--quiet", action="store_true", help="no progress bar")


def interval(text: str) -> tuple[float, float]:
    """START:STOP."""
    start, _, stop = text.partition(":")
    try:
        return float(start), float(stop)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} isn't START:STOP, two numbers as 0.1:0.8"
        ) from error


def run_sweep(options: argparse.Namespace) -> None:
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_theirs

    from ..cli_options import launched_processes, select_device
    from ..evaluation import default_features, load_network
    from ..utils import load_pipeline, require_matplotlib
    from . import sweep

    require_matplotlib()  # before the work, not after it
    processes = launched_processes(options.device)
    main = processes is None or processes.is_main_process
    if options.quiet or not main:
        disable_progress_bar()
        disable_theirs()
    device = select_device(options.device, processes)
    pipeline = load_pipeline(options.model, options.revision).to(device)
    features = load_network(options.features or default_features({"model": options.model}), device)
    judge = None
    if options.judge not in (None, "none", options.features):
        judge = load_network(options.judge, device)
    elif options.judge != "none" and features.classes is not None and not features.inception:
        judge = features
    names = (
        "scales",
        "schedulers",
        "steps",
        "intervals",
        "algorithms",
        "every",
        "tolerances",
        "num_images",
        "seed",
        "batch_size",
        "conditional",
        "dtype",
        "bootstrap",
        "max_features",
        "split",
        "image_column",
        "label_column",
        "model",
    )
    found = sweep(
        pipeline,
        options.reference,
        options.output,
        features,
        judge,
        progress=not options.quiet and main,
        **{name: getattr(options, name) for name in names},
    )
    if main:
        print(f"{found}\n{options.output / 'report.html'}")
    if processes is not None:
        processes.destroy_process_group()

"""`guided-diffusers evaluate`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import Evaluation, Images, Network


def add_evaluate_command(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="how good generated images are",
        description="Compare generated images with real ones in the features of a network, and ask a classifier that "
        "never guided whether they are what was asked for. Writes evaluation.json, with intervals and all "
        "settings, confusion.png and nearest.png. The processes of `accelerate launch -m guided_diffusers "
        "evaluate ...` share the work.",
    )
    command.set_defaults(run=run_evaluate)
    option = command.add_argument
    option(
        "images",
        nargs="?",
        metavar="IMAGES",
        help="a folder of `guided-diffusers sample`, an .npz file, an image folder, or a labelled data set; may be "
        "left out with --bits-per-dim",
    )
    option(
        "--dataset",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="real images: a Hub name, an image folder or a folder of Parquet files",
    )
    option("--split", help="of the real images (default: validation, test or train)")
    option(
        "--training-split",
        metavar="SPLIT",
        help="of the images that the model was trained on, among which generated images' nearest are looked for; "
        "`none`: don't look (default: train, where that isn't --split)",
    )
    option(
        "--features",
        metavar="NETWORK",
        help="whose features are compared: inception (needs torch-fidelity; only then is it an FID), a bundled "
        "model (its judge), or the folder or Hub id of a NoiseAwareClassifier or a vision model of "
        "transformers (default: the judge of the bundled model that made the images)",
    )
    option(
        "--judge",
        metavar="NETWORK",
        help="a classifier of the same labels that never guided: as --features; `none`: no judge (default: the "
        "network of --features, where that is a classifier)",
    )
    option(
        "--output",
        type=Path,
        default=Path("evaluation"),
        metavar="FOLDER",
        help="where the files go (default: %(default)s)",
    )
    option(
        "--max-features",
        type=int,
        default=10_000,
        metavar="N",
        help="images, a sample, whose features are kept for the figures that need them one by one (default: "
        "%(default)s)",
    )
    option(
        "--nearest",
        type=int,
        default=1000,
        metavar="N",
        help="images whose nearest training images are looked for (default: %(default)s)",
    )
    option(
        "--bootstrap",
        type=int,
        default=100,
        metavar="N",
        help="resamples that intervals are made of; 0: no intervals (default: %(default)s)",
    )
    option("--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    option(
        "--per-class",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the Frechet distance of each class (default: yes)",
    )
    option(
        "--bits-per-dim",
        type=int,
        default=0,
        metavar="N",
        help="also the bits per dimension of --model on so many real images: its variational bound and the terms by "
        "timestep (default: 0, off)",
    )
    option("--model", help="for --bits-per-dim: a bundled model, a pipeline folder or a Hub id")
    option("--images-split", metavar="SPLIT", help="of IMAGES, where that is a data set")
    option("--image-column", help="of the data sets (default: the first with images)")
    option("--label-column", help="of the data sets (default: the first with class ids)")
    option(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="where what was found of the real images is kept for next time",
    )
    option(
        "--seed", type=int, default=0, help="of samples, resamples and noise (default: %(default)s)"
    )
    option("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    option("--device", help="cpu, cuda, mps, ... (default: the fastest there is)")
    option(
        "--picture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw the pictures, which needs matplotlib (default: yes)",
    )
    option("--quiet", action="store_true", help="no progress bar")


def run_evaluate(options: argparse.Namespace) -> None:
    from datasets import disable_progress_bars
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_theirs

    from ..cli_options import launched_processes, select_device
    from ..utils import require_matplotlib

    if bool(options.bits_per_dim) != (options.model is not None):
        raise ValueError(
            f"--bits-per-dim {options.bits_per_dim}, --model {options.model}: both or neither are needed"
        )
    if options.images is None and not options.bits_per_dim:
        raise ValueError("IMAGES are needed, or --bits-per-dim and --model")
    if options.picture:
        require_matplotlib()  # before the work, not after it
    processes = launched_processes(options.device)
    if options.quiet or processes is not None and not processes.is_main_process:
        options.quiet = True
        disable_progress_bar()
        disable_theirs()
        disable_progress_bars()
    device = select_device(options.device, processes)
    found = evaluation_of(options, device)
    if processes is None or processes.is_main_process:
        print(found, flush=True)  # first, so that a full disk doesn't lose it
        found.save(options.output, options.picture)
        print(options.output)
    if processes is not None:
        processes.destroy_process_group()


def evaluation_of(options: argparse.Namespace, device: Any) -> Evaluation:
    from . import Evaluation, evaluate

    found = Evaluation()
    if options.images is not None:
        generated, real, training, features, judge = sources(options, device)
        names = (
            "max_features",
            "nearest",
            "bootstrap",
            "confidence",
            "seed",
            "batch_size",
            "per_class",
            "cache",
        )
        found = evaluate(
            generated,
            real,
            features,
            judge,
            training,
            progress=not options.quiet,
            **{name: getattr(options, name) for name in names},
        )
    return with_bits(found, options, device) if options.bits_per_dim else found


def sources(
    options: argparse.Namespace, device: Any
) -> tuple[Images, Images, Images | None, Network, Network | None]:
    """Generated, real and training images, the network of the features, and the judge."""
    from accelerate import PartialState

    from . import default_features, load_network, open_generated, open_real

    columns = (options.image_column, options.label_column)
    with (
        PartialState().main_process_first()
    ):  # one prepares the data sets' files, the others find them
        generated = open_generated(options.images, options.images_split, *columns)
        real = open_real(options.dataset, generated.shape, options.split, *columns)
        split, training = options.training_split, None
        if split != "none" and (split or real.description["split"] != "train"):
            try:
                training = open_real(options.dataset, generated.shape, split or "train", *columns)
            except ValueError:
                if split:
                    raise
    if split == real.description["split"]:
        raise ValueError(
            f"--training-split {split}: it is that of the real images, which must be held out"
        )
    features = load_network(
        options.features or default_features(generated.description.get("manifest")), device
    )
    if options.judge == "none":
        judge = None
    elif options.judge is not None and options.judge != options.features:
        judge = load_network(options.judge, device)
    else:
        classifier = features.classes is not None and not features.inception and generated.labelled
        judge = features if options.judge or classifier else None
    return generated, real, training, features, judge


def with_bits(found: Evaluation, options: argparse.Namespace, device: Any) -> Evaluation:
    """Also the bits per dimension of --model, on the same split of real images."""
    from accelerate import PartialState

    from ..utils import load_pipeline
    from . import Bootstrap, open_real
    from .bits import measure, shape_of

    pipeline = load_pipeline(options.model).to(device)
    with PartialState().main_process_first():
        real = open_real(
            options.dataset,
            shape_of(pipeline),
            options.split,
            options.image_column,
            options.label_column,
        )
    bits = measure(
        pipeline,
        real,
        options.bits_per_dim,
        Bootstrap(options.bootstrap, options.confidence, options.seed),
        options.batch_size,
        progress=not options.quiet,
    )
    settings = found.settings or {
        "seed": options.seed,
        "bootstrap": options.bootstrap,
        "confidence": options.confidence,
    }
    return replace(
        found,
        bits=bits,
        settings={
            **settings,
            "bits_per_dimension": {"model": options.model, "images": real.description},
        },
    )

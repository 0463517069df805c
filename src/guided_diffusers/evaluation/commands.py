"""`guided-diffusers evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli_options import (
    add_pixel_options,
    add_shared_option,
    add_shared_options,
    count,
    count_or_none,
    launched_processes,
    number,
    path,
    select_device,
)

if TYPE_CHECKING:
    from .evaluation import Evaluation
    from .images import Images

EVALUATE_OPTIONS = (  # arguments of `evaluate` with the names of the options
    "max_features nearest bootstrap confidence seed batch_size per_class cache"
).split()


def add_evaluate_command(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="measure the quality of generated images",
        description="Compare generated images with real ones in the features of a network, and "
        "measure how often a classifier that was never used for guidance recognises their labels. "
        "Writes evaluation.json, with intervals and all settings, confusion.png and nearest.png. "
        "The processes of `accelerate launch -m guided_diffusers evaluate ...` share the images.",
    )
    command.set_defaults(run=run_evaluate)
    option, split, folder = command.add_argument, "SPLIT", {"type": path, "metavar": "FOLDER"}
    text = "a folder of `guided-diffusers sample`, an .npz file, an image folder, or a labelled "
    text += "dataset; optional with --bits-per-dim"
    option("images", nargs="?", metavar="IMAGES", help=text)
    option("--images-split", metavar=split, help="split of IMAGES, if they are a dataset")
    text = "real images: a Hub name, an image folder or a folder of Parquet files"
    option("--dataset", required=True, metavar="NAME_OR_FOLDER", help=text)
    text = "split of the real images (default: validation, test or train)"
    add_shared_option(command, "--split", help=text)
    text = "split that the model was trained on, to find the nearest training images; `none`: "
    text += "skip them (default: train, unless that is --split)"
    option("--training-split", metavar=split, help=text)
    add_shared_options(command, "--image-column", "--label-column")
    add_pixel_options(command)
    add_shared_options(command, "--features", "--seed")
    text = "a classifier of the same labels that was never used for guidance: as --features; "
    text += "`none`: no judge (default: the network of --features, if it is a classifier)"
    add_shared_option(command, "--judge", help=text)
    numbers = {
        "--max-features": (
            count,
            10_000,
            "sampled images, for metrics that need features image by image",
        ),
        "--nearest": (count, 1000, "images whose nearest training image is searched"),
        "--bootstrap": (count_or_none, 100, "resamples for the intervals; 0: no intervals"),
        "--bits-per-dim": (
            count_or_none,
            0,
            "real images for the bits per dimension of --model; 0: off",
        ),
    }
    for flag, (kind, default, text) in numbers.items():
        text = f"number of {text} (default: %(default)s)"
        option(flag, type=kind, default=default, metavar="N", help=text)
    text = "level of the intervals (default: %(default)s)"
    option("--confidence", type=number(0, 1, above=True), default=0.95, help=text)
    text = "for --bits-per-dim: a bundled model, a pipeline folder or a Hub id"
    add_shared_option(command, "--model", default=None, help=text)
    yes_no = argparse.BooleanOptionalAction
    text = "Frechet distance of each class (default: yes)"
    option("--per-class", action=yes_no, default=True, help=text)
    text = "output folder (default: %(default)s)"
    option("--output", **folder, default=Path("evaluation"), help=text)
    text = "keep the summary of the real images there for later evaluations"
    option("--cache", **folder, help=text)
    flags = "--batch-size", "--device", "--timeout-minutes", "--picture", "--quiet"
    add_shared_options(command, *flags)


def run_evaluate(options: argparse.Namespace) -> None:
    from ..files import folder_lock
    from ..text import printable
    from ..utils import require_matplotlib
    from .evaluation import Evaluation

    if bool(options.bits_per_dim) != (options.model is not None):
        raise ValueError(
            f"--bits-per-dim {options.bits_per_dim}, --model {options.model}: use both or neither"
        )
    if options.images is None and not options.bits_per_dim:
        raise ValueError("IMAGES are needed, or --bits-per-dim and --model")
    if options.picture:
        require_matplotlib()  # before the work, not after it
    processes = launched_processes(options.device, options.timeout_minutes)
    is_main = processes is None or processes.is_main_process
    if options.quiet or not is_main:
        options.quiet = True
        _disable_progress_bars()
    if is_main:
        _check_outputs(options)
    device = select_device(options.device, processes)
    evaluation = Evaluation() if options.images is None else _evaluate(options, device)
    if options.bits_per_dim:
        _add_bits(evaluation, options, device)
    if is_main:
        print(evaluation, flush=True)  # before saving: a full disk doesn't lose it
        with folder_lock(options.output, wait=True):
            evaluation.save(options.output, options.picture)
        print(printable(options.output))
    if processes is not None:
        processes.destroy_process_group()


def _disable_progress_bars() -> None:
    import datasets
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

    disable_progress_bar()
    disable_transformers_bar()
    datasets.disable_progress_bars()


def _check_outputs(options: argparse.Namespace) -> None:
    """Check, before the work, that the output and the cache can be written."""
    from ..files import check_writable
    from .evaluation import FILES

    for name in FILES:
        check_writable(options.output / name, "--output")
    if options.cache is not None and not options.cache.is_dir():  # one that can be read has a use
        check_writable(options.cache, "--cache", folder=True)


def _evaluate(options: argparse.Namespace, device: Any) -> Evaluation:
    from accelerate import PartialState

    from ..learning.pixels import pixel_options
    from .evaluation import evaluate
    from .images import open_generated, open_real
    from .networks import default_features, load_network

    columns, pixels = (options.image_column, options.label_column), pixel_options(options)
    with PartialState().main_process_first():  # it prepares the datasets' files for the others
        generated = open_generated(options.images, options.images_split, *columns)
        real = open_real(options.dataset, generated.shape, options.split, *columns, **pixels)
        training = _open_training(options, generated, real)
    name = options.features or default_features(generated.description.get("manifest"))
    features, judge = load_network(name, device), None
    if options.judge in (None, options.features):
        is_judge = features.classes is not None and not features.is_inception and generated.labelled
        judge = features if options.judge or is_judge else None
    elif options.judge != "none":
        judge = load_network(options.judge, device)
    settings = {name: getattr(options, name) for name in EVALUATE_OPTIONS}
    settings["progress"] = not options.quiet
    return evaluate(generated, real, features, judge, training, **settings)


def _open_training(options: argparse.Namespace, generated: Images, real: Images) -> Images | None:
    from ..learning.pixels import pixel_options
    from .images import open_real

    split, real_split = options.training_split, real.description["split"]
    if split == real_split:
        raise ValueError(
            f"--training-split {split}: the real images are of that split, and must be held out"
        )
    if split == "none" or (split is None and real_split == "train"):
        return None
    columns, pixels = (options.image_column, options.label_column), pixel_options(options)
    try:
        return open_real(options.dataset, generated.shape, split or "train", *columns, **pixels)
    except ValueError:
        if split:
            raise
        return None  # no split `train`


def _add_bits(evaluation: Evaluation, options: argparse.Namespace, device: Any) -> None:
    """Add the bits per dimension of --model on the real images."""
    from accelerate import PartialState

    from ..images import as_pair
    from ..learning.pixels import pixel_options
    from ..noise import module_config
    from ..utils import load_pipeline
    from .bits import measure_bits_per_dim
    from .images import open_real
    from .results import Bootstrap

    pipeline = load_pipeline(options.model).to(device)
    config, columns = module_config(pipeline.unet), (options.image_column, options.label_column)
    shape = (config["in_channels"], *as_pair(config["sample_size"]))
    with PartialState().main_process_first():
        real = open_real(options.dataset, shape, options.split, *columns, **pixel_options(options))
    bootstrap = Bootstrap(options.bootstrap, options.confidence, options.seed)
    evaluation.bits = measure_bits_per_dim(
        pipeline, real, options.bits_per_dim, bootstrap, options.batch_size, not options.quiet
    )
    for name in ("seed", "bootstrap", "confidence"):
        evaluation.settings.setdefault(name, getattr(options, name))
    source = {"model": options.model, "images": real.description}
    evaluation.settings["bits_per_dimension"] = source

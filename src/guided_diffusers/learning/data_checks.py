"""What is read before the first step, and reported, of the data."""

from __future__ import annotations

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..text import printable
from .arrays import LabelledArrays
from .data import LabelledImages, evenly_spread
from .options import Options, named_errors
from .streaming import StreamedImages


def describe_data(
    options: Options,
    accelerator: Accelerator,
    train: LabelledImages | StreamedImages,
    held_out: LabelledImages | None,
    split: str | None,
) -> None:
    """Print what was found: images, channels, labels, and which images are held out.

    `split` is the held-out split, None if there is no such split.
    """
    count = "a stream of" if options.streaming else len(train)
    channels = "grey" if train.channels == 1 else "RGB"
    if options.channels is None and options.vae is None:
        other = "3 for RGB" if train.channels == 1 else "1 for grey"
        channels += f" as sampled images are (--channels {other})"
    if isinstance(train, LabelledArrays):
        channels = train.text
    items = "examples" if isinstance(train, LabelledArrays) else "images"
    labels = "no labels"
    if names := list(train.id2label.values()):
        labels = f"{len(names)} labels ({', '.join(names[:10])}{', ...' if names[10:] else ''})"
    if not options.streaming and len(train) < 2 * len(names):
        labels += ": less than two images per label"
    accelerator.print(printable(f"data: {count} training {items}, {channels}, {labels}"))
    if held_out is None:
        source = "no image is held out, so nothing is evaluated; see --validation_fraction"
    elif split is None:
        source = f"{len(held_out)} {items} of {options.train_split!r} are held out"
        source += f" (--validation_fraction {options.held_out_fraction:g})"
    else:
        source = f"{len(held_out)} {items} of {split!r} are held out"
        if split == options.train_split:
            source += ", which are trained on, too: metrics don't hold for other images"
    accelerator.print(printable(f"data: {source}"))


def check_data(
    options: Options,
    accelerator: Accelerator,
    train: LabelledImages | StreamedImages,
    held_out: LabelledImages | None,
    split: str,
) -> None:
    """Read before the first step what a later step would fail at: labels, and files of images.

    Checks all labels and --check_images of the files of each split, and decodes the held-out images
    that are evaluated; each process its share. `split` is that of the held-out images.

    Raises:
        ValueError: naming split, row and file, for a label or an image that can't be used.
    """
    if options.streaming:
        accelerator.print("data: --streaming checks training images and labels as it reads them")
    parts: list[tuple[str, LabelledImages, int]] = []
    if not options.streaming:
        parts.append((options.train_split, train, 0))
    if held_out is not None:
        parts.append((split, held_out, options.validation_samples))
    for name, images, decoded in parts:
        with named_errors(f"split {name!r}"):
            present = set(images.labels_of_rows())
            if options.skip_corrupt_images:
                images[0]  # raises an error if no image can be read
            if options.check_images and not (options.skip_corrupt_images or options.vae):
                check_files(options, accelerator, images, decoded)
        unused = [label for i, label in images.id2label.items() if i not in present]
        if images is train and unused:
            accelerator.print(
                f"data: no training image has {len(unused)} of the {len(images.id2label)} labels, "
                f"such as {unused[:5]}; --renumber_labels leaves them out"
            )
    accelerator.wait_for_everyone()


def check_files(
    options: Options, accelerator: Accelerator, images: LabelledImages, decoded: int
) -> None:
    """Check this process's share of --check_images files, of which evenly spread ones are decoded."""
    indices = evenly_spread(len(images), options.check_images)
    if len(indices) < len(images):
        accelerator.print(
            f"data: {len(indices)} of {len(images)} files are checked (--check_images)"
        )
    to_decode = set(evenly_spread(len(images), decoded))
    indices = sorted({*indices, *to_decode})[accelerator.process_index :: accelerator.num_processes]
    hidden = not (options.progress and accelerator.is_main_process)
    rows = tqdm(images.rows(indices), "check", len(indices), delay=2, unit="image", disable=hidden)
    for index, row in zip(indices, rows, strict=True):
        images.check_image(row, decode=index in to_decode)

"""`guided-diffusers edit`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli_options import (
    add_call_options,
    add_shared_option,
    add_shared_options,
    fraction,
    path,
    select_device,
)
from ..defaults import DEFAULTS

if TYPE_CHECKING:
    from ..pipeline import ClassifierGuidedPipeline

STRENGTH = 0.6


def add_edit_command(commands: Any) -> None:
    command = commands.add_parser(
        "edit",
        help="change pictures to another label",
        description="Change pictures that exist: each is inverted to noise, by its own label or none, "
        "and decoded again with guidance to the new label, so that only what the label needs "
        "changes. Beside each edited picture, a comparison shows it before and after and their "
        "difference, with the classifier's probabilities. What changes on the way to a label such "
        "as `healthy` is what is unusual for it: the difference is then an anomaly map. An "
        "interrupted run on a folder is resumed when it is started again.",
    )
    command.set_defaults(run=run_edit)
    option = command.add_argument
    option("source", metavar="IN", type=path, help="a picture, or a folder of pictures")
    help = (
        "the edited picture, beside which NAME-comparison.png is written; or a folder, with the "
        "same names, comparisons/ and results.json"
    )
    option("output", metavar="OUT", type=path, help=help)
    option("--label", required=True, help="the new label, a name or an id")
    help = "label that the network gets while it inverts (default: none, where it knows that)"
    option("--source-label", metavar="LABEL", help=help)
    help = (
        "how much of the run is inverted and made again, in [0, 1]: more changes more "
        "(default: %(default)s)"
    )
    option("--strength", type=fraction, default=STRENGTH, help=help)
    help = (
        "a picture, or for a folder a folder of the same names: only where it is white may pictures "
        "change; elsewhere they stay bit for bit"
    )
    option("--mask", type=path, help=help)
    add_shared_options(command, "--model", "--revision", "--conditional", "--device", "--quiet")
    help = "pictures edited together, lost by a kill (default: %(default)s)"
    add_shared_option(command, "--batch-size", default=16, help=help)
    add_call_options(command)


def run_edit(options: Namespace) -> None:
    from diffusers.utils.logging import disable_progress_bar

    from ..sampling import hub_commit
    from ..text import printable
    from ..utils import load_pipeline

    check_options(options)
    if options.quiet:
        disable_progress_bar()
    pipeline = load_pipeline(options.model, options.revision)
    pipeline.to(select_device(options.device))
    pipeline.set_progress_bar_config(disable=True)
    edit = {name: value for name, value in vars(options).items() if name in DEFAULTS}
    edit |= {"strength": options.strength, "conditional": options.conditional}
    label = parse_label(options.label, pipeline)
    if options.source_label is not None:
        edit["source_label"] = parse_label(options.source_label, pipeline)
    if options.source.is_dir():
        from .folder import edit_folder

        result = edit_folder(
            pipeline,
            options.source,
            options.output,
            label,
            mask=options.mask,
            batch_size=options.batch_size,
            model=options.model,
            revision=hub_commit(options.model, options.revision),
            progress=not options.quiet,
            **edit,
        )
        existed = f", {result.before} of them existed" if result.before else ""
        text = f"{result.pictures} pictures{existed}, in {result.seconds:.1f} s"
    else:
        text = edit_file(pipeline, options, label, edit)
    print(f"{text}: {printable(options.output)}")


def edit_file(
    pipeline: ClassifierGuidedPipeline, options: Namespace, label: int | str, edit: dict[str, Any]
) -> str:
    """Edit one picture and write it and its comparison; the result as text."""
    from ..sampling import save_image
    from .folder import check_pictures, describe, find_masks, read_picture, titles
    from .pictures import comparison

    check_pictures(pipeline, [options.source])
    masks = find_masks(options.mask, {"": options.source}, Path())
    mask = read_picture(masks[""]) if masks else None
    picture = read_picture(options.source)
    result = pipeline.edit(picture, label, mask=mask, **edit)
    (record,) = describe(pipeline, label, result)
    both = comparison(picture, result.images[0], result.difference[0], titles(record))
    save_image(both, comparison_path(options.output))
    save_image(result.images[0], options.output)
    guesses = [
        f"{record[when]['label']} {record[when]['probability']:.0%}"
        for when in ("before", "after")
        if when in record
    ]
    return (
        f"{' -> '.join(guesses)} by the classifier, mean change {record['change']:.3f}"
        if guesses
        else "edited"
    )


def comparison_path(output: Path) -> Path:
    """Where the comparison of one edited picture is written."""
    return output.with_name(f"{output.stem}-comparison.png")


def check_options(options: Namespace) -> None:
    """Check the options before any computation."""
    from ..files import check_writable

    source, output, formats = options.source, options.output, (".png", ".jpg", ".jpeg", ".webp")
    if not source.exists():
        raise ValueError(f"IN {source} doesn't exist; a picture or a folder of pictures is needed")
    if source.is_dir():
        if output.suffix.lower() in formats and not output.is_dir():
            raise ValueError(f"OUT {output}: IN is a folder, so a folder is allowed")
        inside = output.resolve().is_relative_to(source.resolve())
        if inside or source.resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"OUT {output}: it and IN {source} are one within the other; use another"
            )
    elif output.suffix.lower() not in formats:
        raise ValueError(f"OUT {output}: a picture ({', '.join(formats)}) is allowed, as IN is one")
    elif options.mask is not None and options.mask.is_dir():
        raise ValueError(f"--mask {options.mask}: a picture is allowed, as IN is one")
    check_writable(output, "OUT", folder=source.is_dir())


def parse_label(text: str, pipeline: ClassifierGuidedPipeline) -> int | str:
    """The label of an option, checked: a name of the model's, else an id."""
    from ..likelihood import parse_labels

    names = pipeline.config.id2label
    is_id = text.isascii() and text.isdecimal() and text not in (names or {}).values()
    label = int(text) if is_id else text
    parse_labels(label, names, pipeline.num_labels)
    return label

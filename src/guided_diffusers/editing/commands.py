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
        help="change pictures, or arrays, to another label",
        description="Change pictures that exist: each is inverted to noise, by its own label or none, "
        "and decoded again with guidance to the new label, so that only what the label needs "
        "changes. Beside each edited picture, a comparison shows it before and after and their "
        "difference, with the classifier's probabilities. What changes on the way to a label such "
        "as `healthy` is what is unusual for it: the difference is then an anomaly map. Arrays "
        "(.npy) are edited in their units, with the difference beside them. An interrupted run on "
        "a folder is resumed when it is started again.",
    )
    command.set_defaults(run=run_edit)
    option = command.add_argument
    option(
        "source", metavar="IN", type=path, help="a picture or an array (.npy), or a folder of them"
    )
    help = (
        "the edited picture, beside which NAME-comparison.png is written (of an array "
        "NAME-difference.npy); or a folder, with the same names, comparisons/ (differences/) and "
        "results.json"
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
        "change; elsewhere they stay bit for bit. For arrays an array of 1, which may change, and 0"
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
        text = f"{result.pictures} {result.kind}s{existed}, in {result.seconds:.1f} s"
    else:
        text = edit_file(pipeline, options, label, edit)
    print(f"{text}: {printable(options.output)}")


def edit_file(
    pipeline: ClassifierGuidedPipeline, options: Namespace, label: int | str, edit: dict[str, Any]
) -> str:
    """Edit one picture or array and write it and what is beside it; the result as text."""
    from .files import files_of
    from .folder import describe, find_masks, titles

    form = files_of(pipeline)
    if (options.source.suffix.lower() == ".npy") != (form.kind == "array"):
        raise ValueError(
            f"IN {options.source}: the model's samples are {form.kind}s; "
            f"{', '.join(form.suffixes)} are allowed"
        )
    form.check([options.source])
    masks = find_masks(form, options.mask, {"": options.source}, Path())
    region = form.read_masks([masks[""]]) if masks else None
    result = pipeline.edit(form.read([options.source]), label, mask=region, **edit)
    (record,) = describe(pipeline, label, result)
    beside = options.output.with_name(f"{options.output.stem}-{form.beside}{form.suffix}")
    form.save(options.source, options.output, beside, result, 0, titles(record))
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


def check_options(options: Namespace) -> None:
    """Check the options before any computation."""
    from ..files import check_writable

    source, output, kind = options.source, options.output, "a picture"
    formats: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp")
    if source.suffix.lower() == ".npy":
        formats, kind = (".npy",), "an array"
    if not source.exists():
        raise ValueError(
            f"IN {source} doesn't exist; a picture or an array (.npy), or a folder of them, is needed"
        )
    if source.is_dir():
        if output.suffix.lower() in (*formats, ".npy") and not output.is_dir():
            raise ValueError(f"OUT {output}: IN is a folder, so a folder is allowed")
        inside = output.resolve().is_relative_to(source.resolve())
        if inside or source.resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"OUT {output}: it and IN {source} are one within the other; use another"
            )
    elif output.suffix.lower() not in formats:
        raise ValueError(f"OUT {output}: {kind} ({', '.join(formats)}) is allowed, as IN is one")
    elif options.mask is not None and options.mask.is_dir():
        raise ValueError(f"--mask {options.mask}: {kind} is allowed, as IN is one")
    check_writable(output, "OUT", folder=source.is_dir())


def parse_label(text: str, pipeline: ClassifierGuidedPipeline) -> int | str:
    """The label of an option, checked: a name of the model's, else an id."""
    from ..likelihood import parse_labels

    names = pipeline.config.id2label
    is_id = text.isascii() and text.isdecimal() and text not in (names or {}).values()
    label = int(text) if is_id else text
    parse_labels(label, names, pipeline.num_labels)
    return label

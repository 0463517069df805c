"""What `guide(pipeline, term)` can do with each pipeline of Diffusers: a table.

    git clone https://github.com/huggingface/diffusers ~/diffusers
    python examples/benchmarks/pipelines.py --diffusers ~/diffusers --markdown examples/pipelines.md
    python examples/benchmarks/pipelines.py --diffusers ~/diffusers --only wan flux

Diffusers' own tests build each pipeline from its classes at tiny size, with random weights; text
encoders, which they take from the Hub, get stand-ins (standins.py), so nothing is downloaded. Each
pipeline runs a few steps, and these are measured without this package's formulas:

    off       at scale 0 each step gives what the unguided one gives, bit for bit
    x0        an energy of the final sample is lower when guided by it
    image     what terms see of the final sample is the pipeline's output, and an energy of it falls
    through   the gradient through the network is the slope of the energy between runs whose sample
              was moved
    condition a term with a condition works
    restored  the pipeline is as before, also after an exception

Results are added to the JSON file as they come, so that a run can be continued.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import diffusers
import numpy as np
import torch
from diffusers.utils import logging
from standins import without_hub

from guided_diffusers import ClassifierFreeGuidance, EnergyGuidance, Guidance, StepContext
from guided_diffusers.attach import guide
from guided_diffusers.files import write_json

COLUMNS = ("off", "x0", "image", "through", "condition", "restored")
TIMEOUT_S = 300


class Viewer(Guidance):
    """Adds nothing; keeps how the pipeline's x0 is decoded, and where its first step was."""

    supports_pure_noise = True
    decode: Callable[[torch.Tensor], torch.Tensor]

    def score(self, step: StepContext) -> torch.Tensor:
        self.decode = step.decode
        if step.index + 1 == step.count or step.index == 0:
            self.images = step.decode(self.final)
        return torch.zeros_like(step.sample)


class SetUp:
    """A tiny pipeline and the arguments of its call.

    Attributes:
        sample: after the last step of the last run.
        steps: all samples of that run.
    """

    def __init__(self, test: Any):
        self.test = test
        self.pipeline = test.pipeline_class(**test.get_dummy_components())
        self.pipeline.set_progress_bar_config(disable=True)
        for module in self.modules():
            module.eval()

    def modules(self) -> list[torch.nn.Module]:
        return [m for m in self.pipeline.components.values() if isinstance(m, torch.nn.Module)]

    def run(self, *terms: Guidance, nudge: tuple[int, torch.Tensor] | None = None, **options: Any):
        """The pipeline's output; `nudge`: added to the result of the step of this number."""
        scheduler, self.steps = self.pipeline.scheduler, []
        step = type(scheduler).step

        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = step(scheduler, *args, **kwargs)
            if nudge is not None and len(self.steps) == nudge[0]:
                result[0].add_(nudge[1])
            self.steps.append(result[0].detach().clone())
            return result

        recorded.__signature__ = inspect.signature(scheduler.step)
        scheduler.step = recorded
        get = self.test.get_dummy_inputs
        inputs = get("cpu") if "device" in inspect.signature(get).parameters else get()
        torch.manual_seed(0)
        np.random.seed(0)
        try:
            with guide(self.pipeline, *terms, **options) if terms else nullcontext():
                return self.pipeline(**inputs)
        finally:
            vars(scheduler).pop("step", None)


def tensor_of(output: Any) -> torch.Tensor:
    """The images of a pipeline's output as a tensor in [-1, 1], (B, C, H, W) or (B, C, F, H, W)."""
    value = output[0]
    if isinstance(value, list) and isinstance(value[0], (list, torch.Tensor, np.ndarray)):
        value = np.stack([np.stack([np.asarray(x) for x in one]) for one in value])
    elif isinstance(value, list):
        value = np.stack([np.asarray(one, dtype=np.float32) / 255 for one in value])
    images = torch.as_tensor(np.asarray(value), dtype=torch.float32)
    if images.ndim in (4, 5) and images.shape[-1] in (1, 3) and images.shape[-3] not in (1, 3):
        images = images.movedim(-1, -3)
    if images.ndim == 5:
        images = images.transpose(1, 2)
    return 2 * images - 1


def energy(x: torch.Tensor) -> torch.Tensor:
    return (x.double() - 0.3).square().flatten(1).sum(1)


def falls(values: list[float]) -> bool:
    return all(later < earlier for earlier, later in zip(values, values[1:], strict=False))


class Check:
    """The columns of one pipeline; each returns "yes", or why not."""

    def __init__(self, set_up: SetUp):
        self.set_up = set_up
        self.calls: list[dict[str, Any]] = []
        self.output = set_up.run()
        self.plain = set_up.steps
        if not self.plain:
            raise ValueError("its own scheduler makes no step")

    def off(self) -> str:
        terms = [EnergyGuidance(energy, 0.0, of=of) for of in ("x0", "image")]
        self.set_up.run(*terms)
        same = [torch.equal(a, b) for a, b in zip(self.plain, self.set_up.steps, strict=True)]
        return "yes" if all(same) else f"differs at step {same.index(False)}"

    def _energies(self, of: str, start: float, value: Callable[[], float]) -> str:
        for scale in (10.0**power for power in range(-6, 4)):  # the smallest with an effect
            self.set_up.run(EnergyGuidance(energy, scale, start, of=of))
            after = value()
            if after == after and abs(after - self.before) > 2e-7 * self.before:
                text = f"rises at scale {scale:g}: {self.before:.8g} to {after:.8g}"
                return "yes" if after < self.before else text
        return "no effect"

    def x0(self) -> str:
        self.before = energy(self.plain[-1]).sum().item()
        return self._energies("x0", 0.0, lambda: energy(self.set_up.steps[-1]).sum().item())

    def image(self) -> str:
        viewer = Viewer()
        viewer.final = self.plain[-1]
        self.set_up.run(viewer)
        with torch.no_grad():
            seen = viewer.images
        output = tensor_of(self.output)
        different = ""
        if seen.ndim == 3:
            different = "; audio, not compared"
        elif seen.shape == output.shape:
            error = (seen.float().clamp(-1, 1) - output).abs().max().item()
            different = "" if error < 0.02 else f"; seen and output differ by {error:.3f}"
        else:
            different = f"; seen {tuple(seen.shape)}, output {tuple(output.shape)}"
        self.before = energy(seen).sum().item()

        def value() -> float:
            with torch.no_grad():
                return energy(viewer.decode(self.set_up.steps[-1])).sum().item()

        # at the last step only, since networks with random weights answer in any way
        start = max(0.0, 1 - 1.05 / len(self.plain))
        return self._energies("image", start, value) + different

    def through(self) -> str:
        set_up, count = self.set_up, len(self.plain)
        kept: dict[str, torch.Tensor] = {}

        class Slope(EnergyGuidance):
            def score(self, step: StepContext) -> torch.Tensor:
                kept["gradient"] = super().score(step)
                return 0 * kept["gradient"]

        class Value(Guidance):
            supports_pure_noise = True

            def score(self, step: StepContext) -> torch.Tensor:
                kept["sample"] = step.sample.double()
                kept["value"] = step.x0.float().sin().flatten(1).sum(1)
                return torch.zeros_like(step.sample)

        at = min(1, count - 1)
        begin, end = (at - 0.1) / count if at else 0, (at + 0.5) / count
        wave = lambda x0: x0.float().sin().flatten(1).sum(1)  # noqa: E731
        set_up.run(Slope(wave, 1.0, max(0, begin), end, of="x0", through_network=True))
        if "gradient" not in kept:
            return "the step was pure noise"
        if not at:
            return "yes (one step only, not compared)"
        noise = torch.randn(self.plain[0].shape, generator=torch.Generator().manual_seed(8))
        gradient, std = kept["gradient"].double(), self.plain[0].float().std().item()
        spread, text = max(gradient.norm().item(), 1e-12), ""
        for size in (3e-3 * std, 3e-4 * std):  # as far as it is linear and not lost in rounding
            values, samples = [], []
            for sign in (1, -1):
                moved = (sign * size * noise).to(self.plain[0])
                set_up.run(Value(1.0, max(0, begin), end), nudge=(at - 1, moved))
                values.append(kept["value"].double().sum().item())
                samples.append(kept["sample"])
            direction = (samples[0] - samples[1]) / (2 * size)
            expected = (values[0] - values[1]) / (2 * size)
            along = -(gradient * direction).sum().item()
            if abs(along - expected) < 0.05 * spread:
                return "yes"
            text += f"slope {along:.4g}, finite difference {expected:.4g}; "
        return text

    def condition(self) -> str:
        from guided_diffusers.attach import DENOISERS

        names = [
            name for name in DENOISERS if getattr(self.set_up.pipeline, name, None) is not None
        ]
        network, found = getattr(self.set_up.pipeline, names[0]), {}

        def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            first, *others = inputs
            if isinstance(inputs[first], torch.Tensor):
                for name in others:
                    value = inputs[name]
                    if isinstance(value, torch.Tensor) and value.ndim >= 2:
                        if value.is_floating_point() and len(value) == len(inputs[first]):
                            found.setdefault(name, value)

        handle = network.register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.set_up.run()
        finally:
            handle.remove()
        if not found:
            return "its network gets no tensor of the batch's size"
        name, value = next(iter(found.items()))
        self.set_up.run(ClassifierFreeGuidance({name: torch.zeros_like(value[:1])}, 0.1))
        return "yes"

    def restored(self) -> str:
        class Fails(Guidance):
            supports_pure_noise = True

            def score(self, step: StepContext) -> torch.Tensor:
                raise KeyError("inside")

        set_up, modules = self.set_up, self.set_up.modules()
        flags = [[p.requires_grad for p in module.parameters()] for module in modules]
        try:
            set_up.run(Fails())
        except KeyError:
            pass
        if flags != [[p.requires_grad for p in module.parameters()] for module in modules]:
            return "parameters differ"
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            return "hooks are left"
        if torch.is_grad_enabled() is not True or "step" in vars(set_up.pipeline.scheduler):
            return "gradients or the step are left"
        set_up.run()
        same = all(torch.equal(a, b) for a, b in zip(self.plain, set_up.steps, strict=True))
        return "yes" if same else "another result"


def load(name: str) -> Any:
    """A test's module; modules that only tests need, and that aren't installed, are left out."""
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name.startswith(("tests", "diffusers")):
                raise
            sys.modules[error.name] = MagicMock()


def find_tests(folder: Path, only: list[str]) -> Iterator[tuple[str, type]]:
    """(name, test class) of each pipeline."""
    for path in sorted((folder / "tests" / "pipelines").glob("*/test_*.py")):
        if only and not any(word in str(path) for word in only):
            continue
        module, seen = ".".join(path.relative_to(folder).with_suffix("").parts), set()
        try:
            members = list(vars(load(module)).values())
        except Exception as error:  # noqa: BLE001
            print(f"{module}: {error}")
            continue
        for cls in members:
            pipeline = getattr(cls, "__dict__", {}) and inspect.getattr_static(
                cls, "pipeline_class", None
            )
            if not inspect.isclass(pipeline) or not hasattr(cls, "get_dummy_components"):
                continue
            if getattr(cls, "__module__", "") == module and pipeline not in seen:
                seen.add(pipeline)
                yield f"{pipeline.__name__} ({path.stem})", cls


def measure(test: type, columns: list[str]) -> dict[str, str]:
    """The columns of a pipeline, or {"setup": why it could not be built}."""
    try:
        with without_hub():
            set_up = SetUp(test())
            check = Check(set_up)
            results = {"steps": len(check.plain), "latents": list(check.plain[-1].shape)}
            for column in columns:
                try:
                    results[column] = getattr(check, column)()
                except TimeoutError:
                    raise
                except Exception as error:  # noqa: BLE001
                    results[column] = f"{type(error).__name__}: {error}"
        return results
    except Exception as error:  # noqa: BLE001
        return {"setup": f"{type(error).__name__}: {error}"[:200]}


HEADINGS = {
    "off": "scale 0 bit for bit",
    "x0": "energy of x0",
    "image": "term of images",
    "through": "through the network",
    "condition": "conditions",
    "restored": "restored",
}


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The results as a page."""
    built = {name: row for name, row in results.items() if "setup" not in row}
    classes = {name.partition(" ")[0] for name in built}
    lines = [
        "# Which pipelines of Diffusers `guide` can guide",
        "",
        f"Made by `examples/benchmarks/pipelines.py` with Diffusers {diffusers.__version__}: "
        f"{len(built)} set-ups of {len(classes)} classes at tiny size with random weights, a few "
        "steps each. The script's docstring says what is measured. *yes*: works; else why not.",
        "",
        f"| pipeline | latents | {' | '.join(HEADINGS.values())} |",
        f"|---|---|{'---|' * len(HEADINGS)}",
    ]
    for name, row in sorted(built.items()):
        cells = [str(row.get(column, "")).replace("|", "/")[:90] for column in HEADINGS]
        shape = "x".join(map(str, row["latents"][1:]))
        lines.append(f"| {name} | {shape} | {' | '.join(cells)} |")
    counts = [
        sum(str(row.get(c, "")).startswith("yes") for row in built.values()) for c in HEADINGS
    ]
    lines.append(f"| **works in** | | {' | '.join(f'{n} of {len(built)}' for n in counts)} |")
    if missing := sorted(set(results) - set(built)):
        lines += [
            "",
            f"Not built here (something of their tests isn't installed): {', '.join(missing)}.",
        ]
    return "\n".join([*lines, ""])


def expire(*_: Any) -> None:
    raise TimeoutError(f"more than {TIMEOUT_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout with its tests")
    parser.add_argument("--only", nargs="*", default=[], help="words of the tests' paths")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--json", type=Path, default=Path("pipelines.json"), help="the results")
    parser.add_argument(
        "--markdown", type=Path, help="page of all results so far, written at the end"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.get_logger("guided_diffusers.guider").setLevel("ERROR")
    sys.path.insert(0, str(options.diffusers))
    signal.signal(signal.SIGALRM, expire)
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name, test in find_tests(options.diffusers, options.only):
        if name in results:
            continue
        signal.alarm(TIMEOUT_S)
        results[name] = measure(test, options.columns)
        signal.alarm(0)
        print(name, {k: str(v)[:110] for k, v in results[name].items()}, flush=True)
        write_json(results, options.json)
    if options.markdown:
        options.markdown.write_text(markdown(results))


if __name__ == "__main__":
    main()

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

A set-up that steps once gets four steps of inference, a mask lets something be painted, a
scheduler of DDIM's kind ends at x0, one with flow sigmas has a network that predicts the flow, and
Allegro's tiles are of the size of its latents: else a last step has hardly any noise, samples are
huge, or nothing is decoded. Results are added to the JSON file as they come, so that a
run can be continued; a set-up gets `--timeout` seconds of
processor time.
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
from functools import wraps
from pathlib import Path
from time import process_time
from typing import Any
from unittest.mock import MagicMock

import diffusers
import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from standins import without_hub
from torch.utils._pytree import tree_map

from guided_diffusers import ClassifierFreeGuidance, EnergyGuidance, Guidance, StepContext
from guided_diffusers.attach import DENOISERS, guide
from guided_diffusers.files import write_json

COLUMNS = ("off", "x0", "image", "through", "condition", "restored")
NO_EFFECT = "no effect"


class Viewer(Guidance):
    """Adds nothing; keeps how the pipeline's x0 is decoded, and where its first step was."""

    supports_pure_noise = True
    decode: Callable[[torch.Tensor], torch.Tensor]

    def score(self, step: StepContext) -> torch.Tensor:
        self.decode = step.decode
        if step.index + 1 == step.count or step.index == 0:
            self.rows = len(step.sample)  # DiT's sample holds each image twice
            self.images = step.decode(self.final[: self.rows])
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
        config = getattr(getattr(self.pipeline, "scheduler", None), "config", {})
        if config.get("use_flow_sigmas") and config.get("prediction_type") == "epsilon":
            self.pipeline.scheduler.register_to_config(prediction_type="flow_prediction")
        if hasattr(
            getattr(self.pipeline, "scheduler", None), "final_alpha_cumprod"
        ):  # the last step gives x0
            self.pipeline.scheduler.final_alpha_cumprod = torch.tensor(1.0)
        if hasattr(getattr(self.pipeline, "vae", None), "kernel"):  # Allegro's tiles: one latent
            self.pipeline.vae.kernel = self.pipeline.vae.stride = (8, 16, 16)
        for module in self.modules():
            module.eval()
        self.changes: dict[str, Any] = {}
        self._shrink()
        if "prior_token_ids" in inspect.signature(self.pipeline.__call__).parameters:
            self.changes["prior_token_ids"] = torch.arange(4)[None]  # GLM-Image: not generated
        self.run()
        if len(self.steps) == 1:  # img2img, at hardly any noise
            self.changes["num_inference_steps"] = 4

    def _shrink(self) -> None:
        """Keep pipelines from enlarging the images of their tests to a megapixel."""
        pipeline = self.pipeline
        if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
            self.changes["use_resolution_binning"] = False
        if hasattr(pipeline, "resolutions"):
            pipeline.resolutions = [(64, 64)]
        if hasattr(pipeline, "default_sample_size"):
            pipeline.default_sample_size = min(pipeline.default_sample_size, 32)
        module = sys.modules[inspect.getmodule(type(pipeline).__call__).__name__]
        if hasattr(module, "calculate_dimensions"):
            width, height, *rest = module.calculate_dimensions(64 * 64, 1.0)
            module.calculate_dimensions = lambda area, ratio: (width, height, *rest)

    def modules(self) -> list[torch.nn.Module]:
        return [m for m in self.pipeline.components.values() if isinstance(m, torch.nn.Module)]

    def networks(self) -> list[torch.nn.Module]:
        """Those that the pipeline steps with."""
        names = [f"{name}{number}" for name in DENOISERS for number in ("", "_2")]
        found = [getattr(self.pipeline, name, None) for name in names]
        return [module for module in found if isinstance(module, torch.nn.Module)]

    def run(self, *terms: Guidance, nudge: tuple[int, torch.Tensor] | None = None, **options: Any):
        """The pipeline's output; `nudge`: added to the result of the step of this number."""
        scheduler, self.steps = self.pipeline.scheduler, []
        cls = type(scheduler)

        original = cls.step

        @wraps(original)
        def step(self_: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self_, *args, **kwargs)
            if self_ is scheduler:  # and no copy of it, for the sound of a video
                if nudge is not None and len(self.steps) == nudge[0]:
                    result[0].add_(nudge[1])
                self.steps.append(result[0].detach().clone())
            return result

        get = self.test.get_dummy_inputs
        inputs = get("cpu") if "device" in inspect.signature(get).parameters else get()
        inputs |= self.changes
        mask = inputs.get("mask_image")
        if isinstance(mask, Image.Image) and max(mask.convert("L").getdata()) < 128:
            inputs["mask_image"] = Image.new("L", mask.size, 255)  # else nothing is painted
        torch.manual_seed(0)
        np.random.seed(0)
        cls.step = step  # not in a class of its own: some pipelines compare the scheduler's type
        try:
            with guide(self.pipeline, *terms, **options) if terms else nullcontext():
                return self.pipeline(**inputs)
        finally:
            cls.step = original


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


def zeros_of(value: Any) -> Any:
    """A condition of zeros in the place of a network's argument; None: it is no embedding."""
    if isinstance(value, dict):
        found = {key: zeros_of(one) for key, one in value.items()}
        return next(({key: one} for key, one in found.items() if one is not None), None)
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [torch.zeros_like(value[0])]
    if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.is_floating_point():
        return torch.zeros_like(value[:1])
    return None


class Check:
    """The columns of one pipeline; each returns "yes", or why not."""

    def __init__(self, set_up: SetUp):
        self.set_up, self.arguments = set_up, {}
        handles = [
            module.register_forward_pre_hook(self._look, with_kwargs=True)
            for module in set_up.networks()
        ]
        self.output = set_up.run()
        self.plain = set_up.steps
        for handle in handles:
            handle.remove()
        if not self.plain:
            raise ValueError("its own scheduler makes no step")

    def off(self) -> str:
        terms = [EnergyGuidance(energy, 0.0, of=of) for of in ("x0", "image")]
        self.set_up.run(*terms)
        same = [torch.equal(a, b) for a, b in zip(self.plain, self.set_up.steps, strict=True)]
        return "yes" if all(same) else f"differs at step {same.index(False)}"

    def _energies(self, of: str, start: float, value: Callable[[], float]) -> str:
        """Whether the energy falls at the smallest scale with an effect, where that is the slope's."""
        scale, text = 1e-3, NO_EFFECT
        while 1e-12 < scale < 1e5:
            self.set_up.run(EnergyGuidance(energy, scale, start, of=of))
            after = value()
            change = abs(after - self.before) / self.before
            if change != change or change > 1e-3:
                scale *= 1e-2
                continue
            if change > 2e-7:
                text = f"rises at scale {scale:g}: {self.before:.8g} to {after:.8g}"
                return "yes" if after < self.before else text
            scale *= 10
        return text

    def x0(self) -> str:
        self.before = energy(self.plain[-1]).sum().item()
        value = lambda: energy(self.set_up.steps[-1]).sum().item()  # noqa: E731
        result = self._energies("x0", 0.0, value)
        if result == "yes" or self._energies("x0", self.last_step, value) != "yes":
            return result
        return "yes; in the last step (random weights answer in any way to earlier ones)"

    @property
    def last_step(self) -> float:
        """`start` of a term for the last step only."""
        return max(0.0, 1 - 1.05 / len(self.plain))

    def image(self) -> str:
        viewer = Viewer()
        viewer.final = self.plain[-1]
        self.set_up.run(viewer)
        with torch.no_grad():
            seen = viewer.images
        output = tensor_of(self.output)
        different = ""
        if seen.ndim == 4 and output.ndim == 5 and output.shape[2] == 1:
            output = output[:, :, 0]
        self.before = energy(seen).sum().item()
        if seen.ndim == 5 == output.ndim:  # a pipeline may cut off the frames that it was given
            seen = seen[:, :, -output.shape[2] :]
        if seen.ndim == 3 or output.ndim < 4:
            different = "; audio, not compared"
        elif seen.shape == output.shape:
            raw = (output + 1) / 2  # some pipelines output their decoder's values themselves
            pairs = (seen.clamp(-1, 1), output), (seen, raw), (seen.clamp(-1, 1), raw)
            error = min((a.float() - b).abs().max().item() for a, b in pairs)
            different = "" if error < 0.02 else f"; seen and output differ by {error:.3f}"
        else:
            different = f"; seen {tuple(seen.shape)}, output {tuple(output.shape)}"

        def value() -> float:
            with torch.no_grad():
                return energy(viewer.decode(self.set_up.steps[-1][: viewer.rows])).sum().item()

        # at the last step, since networks with random weights answer in any way to earlier ones;
        # where that is at hardly any noise, in all steps
        result = self._energies("image", self.last_step, value)
        if result == NO_EFFECT:
            result = self._energies("image", 0.0, value)
        return result + different

    def through(self) -> str:
        set_up = self.set_up  # which may run its schedule several times, for parts of a video
        count = min(len(self.plain), len(set_up.pipeline.scheduler.timesteps))
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

    def _look(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the network's arguments at its first call."""
        inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        self.arguments = self.arguments or dict(inputs)

    def condition(self) -> str:
        _, *others = self.arguments
        for name in sorted(others, key=lambda name: "hidden_states" not in name):
            value = self.arguments[name]
            is_label = name == "class_labels" and value is not None
            null = torch.zeros_like(value[:1]) if is_label else zeros_of(value)
            if null is not None:
                self.set_up.run(ClassifierFreeGuidance({name: null}, 0.1))
                steps = self.set_up.steps
                same = all(torch.equal(a, b) for a, b in zip(self.plain, steps, strict=True))
                if same and not self._has_effect(name, null):
                    return f"yes; with these weights {name} has no effect"
                return f"{name} has no effect" if same else "yes"
        return "its network gets no tensor besides its input"

    def _has_effect(self, name: str, value: Any) -> bool:
        """Whether the unguided pipeline is another one with zeros in the place of an argument."""
        if isinstance(value, dict):
            return True

        def change(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            if bound.arguments.get(name) is not None:
                bound.arguments[name] = tree_map(torch.zeros_like, bound.arguments[name])
            return bound.args, bound.kwargs

        networks = self.set_up.networks()
        handles = [net.register_forward_pre_hook(change, with_kwargs=True) for net in networks]
        self.set_up.run()
        for handle in handles:
            handle.remove()
        steps = self.set_up.steps
        return not all(torch.equal(a, b) for a, b in zip(self.plain, steps, strict=True))

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
                own = next(c for c in pipeline.__mro__ if c.__module__.startswith("diffusers."))
                yield f"{own.__name__} ({path.stem})", cls


def measure(test: type, columns: list[str], timeout: float) -> dict[str, Any]:
    """The columns of a pipeline, or {"setup": why it could not be built}."""
    begin = process_time()
    torch.set_grad_enabled(True)
    try:
        with without_hub():
            check = Check(SetUp(test()))
            results = {"steps": len(check.plain), "latents": list(check.plain[-1].shape)}
            for column in columns:
                try:
                    results[column] = getattr(check, column)()
                except TimeoutError:
                    results[column] = f"not measured: more than {timeout:g} s"
                    break
                except Exception as error:  # noqa: BLE001
                    results[column] = f"{type(error).__name__}: {error}"
            results["seconds"] = round(process_time() - begin, 1)
        return results
    except Exception as error:  # noqa: BLE001
        return {"setup": f"{type(error).__name__}: {error}"[:200]}


OUT_OF_REACH = (
    "- Cosmos 1: it steps its scheduler twice with each prediction, with other batches.",
    "- Helios: the stages of its scheduler change the size of the sample between steps.",
    "- SkyReels V2 diffusion forcing: it steps a copy of its scheduler for each frame, at noise levels "
    "of their own. Its other pipelines work.",
    "- Pipelines of discrete tokens (LLaDA 2, Diffusion Gemma, aMUSEd): tokens have no score.",
    "- Latent up-samplers, and decoders of one step: they have no loop of denoising.",
    "- Terms of images where the pipeline makes none of its samples (priors of Kandinsky and of Stable "
    "Cascade, Shap-E), or not yet: AnyFlow FAR evaluates its network on a finished part of a video "
    'before it goes on to the next one. Terms with `of="x0"` work.',
)

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
    counts = []
    for column in HEADINGS:
        cells = [str(row[column]) for row in built.values() if column in row]
        measured = [cell for cell in cells if not cell.startswith("not measured")]
        counts.append(f"{sum(c.startswith('yes') for c in measured)} of {len(measured)}")
    lines.append(f"| **works in** | | {' | '.join(counts)} |")
    compared = [row["image"] for row in built.values() if _is_compared(str(row.get("image", "")))]
    equal = compared.count("yes")
    lines += ["", f"What terms see is the output in {equal} of {len(compared)} that were compared."]
    lines += ["", "## Out of reach", "", *OUT_OF_REACH]
    if missing := sorted(set(results) - set(built)):
        lines += ["", "## Not built here", ""]
        lines += [f"- {name}: {results[name]['setup'].split(chr(10))[0][:150]}" for name in missing]
    return "\n".join([*lines, ""])


def _is_compared(image: str) -> bool:
    """Whether the images of a row were compared with the pipeline's output."""
    return image == "yes" or "differ by" in image


def expire(*_: Any) -> None:
    raise TimeoutError("more than --timeout")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout with its tests")
    parser.add_argument("--only", nargs="*", default=[], help="words of the tests' paths")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--json", type=Path, default=Path("pipelines.json"), help="the results")
    parser.add_argument(
        "--timeout", type=float, default=25, help="seconds of processor time for a set-up"
    )
    parser.add_argument(
        "--markdown", type=Path, help="page of all results so far, written at the end"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.get_logger("guided_diffusers.guider").setLevel("ERROR")
    sys.path.insert(0, str(options.diffusers))
    signal.signal(signal.SIGPROF, expire)
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name, test in find_tests(options.diffusers, options.only):
        if name in results:
            continue
        signal.setitimer(signal.ITIMER_PROF, options.timeout)
        results[name] = measure(test, options.columns, options.timeout)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(name, {k: str(v)[:110] for k, v in results[name].items()}, flush=True)
        write_json(results, options.json)
    if options.markdown:
        options.markdown.write_text(markdown(results))


if __name__ == "__main__":
    main()

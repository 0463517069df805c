"""guided-diffusion's checkpoint files -> a folder for `ClassifierGuidedPipeline.from_pretrained`."""

import argparse
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from ..pipeline import ClassifierGuidedPipeline
from .networks import convert_classifier, convert_super_resolution, convert_unet, noise_schedule
from .presets import PRESETS, find_preset

Model = TypeVar("Model", bound=torch.nn.Module)
PROCESS = {
    "diffusion_steps",
    "noise_schedule",
    "sigma_small",
    "predict_xstart",
    "rescale_timesteps",
    "timestep_respacing",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert_scheduler(config: Mapping[str, Any]) -> DDPMScheduler:
    """The scheduler of the original's flags `diffusion_steps`, `noise_schedule`, `learn_sigma`, `sigma_small`,
    `predict_xstart` and `timestep_respacing` (of which only "ddim" counts: it decides the spacing).

    `DDPMScheduler` follows the original to 5e-5 (its tables are in float32). For its numbers to the last digit, and for
    its DDIM, make the others of it:

        ADMDDPMScheduler.from_config(scheduler.config)
        ADMDDIMScheduler.from_config(scheduler.config, clip_sample=False)    # and pipeline(..., clip_x0=True)

    Raises:
        ValueError: for `rescale_timesteps` with other than 1000 steps: networks are told the timestep itself.
    """
    if config.get("rescale_timesteps") and config.get("diffusion_steps", 1000) != 1000:
        raise ValueError(
            f"rescale_timesteps is True with {config['diffusion_steps']} diffusion_steps; only 1000, "
            "where it changes nothing, are supported"
        )
    fixed = "fixed_small" if config.get("sigma_small") else "fixed_large"
    return DDPMScheduler(
        **noise_schedule(config),
        variance_type="learned_range" if config.get("learn_sigma") else fixed,
        prediction_type="sample" if config.get("predict_xstart") else "epsilon",
        timestep_spacing="leading"
        if str(config.get("timestep_respacing", "")).startswith("ddim")
        else "linspace",
        clip_sample=True,
    )


def load_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` or `.safetensors` file; a `.pt` stays on disk until a tensor is used. Runs no code of it.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything but tensors by name.
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state_dict = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: no checkpoint, or holds code, which is never run. {error}"
        ) from error
    except (RuntimeError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged or truncated: {error}") from error
    if not isinstance(state_dict, dict) or not all(
        isinstance(tensor, Tensor) for tensor in state_dict.values()
    ):
        raise ValueError(
            f"{file} holds no tensors by name but {type(state_dict).__name__}; the original's are flat "
            "state dicts"
        )
    return state_dict


def convert_checkpoint(
    unet: str | Path,
    output: str | Path,
    classifier: str | Path | None = None,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> None:
    """Write a pipeline folder from the original's files.

    It takes at most twice the networks' memory. The folder appears when it is complete.

    Args:
        unet, classifier: files of `load_state_dict`.
        output: a folder that doesn't exist yet.
        preset: of `find_preset`; without `config` by default the file name of `unet`.
        config: instead of a preset the original's flags, of network, classifier and diffusion process in one, or
            {"unet": ..., "classifier": ...} with either's in one of the forms of `convert_unet`; `classifier_scale` and
            `timestep_respacing` become the pipeline's defaults.
        dtype: of the weights; by default the file's.

    Raises:
        ValueError: for files that can't be read, don't fit the preset or config, or don't fit each other.
    """
    unet, output = Path(unet), Path(output)
    if output.exists():
        raise ValueError(f"output {output} exists already; give another folder, or remove it")
    if preset is not None and config is not None:
        raise ValueError("preset and config: only one is allowed")
    source = "the config"
    if config is None:
        chosen, source = find_preset(preset or unet.name), f"preset {preset or unet.stem!r}"
        config = {
            "classifier_scale": chosen.guidance_scale,
            "timestep_respacing": str(chosen.num_inference_steps),
            **chosen.config,
        }
    flags, classifier_flags = _flags(config)
    defaults = {
        "guidance_algorithm": "mean",
        "guidance_scale": 0.0,
        **_default_steps(flags.get("timestep_respacing")),
    }

    with tqdm(total=3, unit="step", disable=not progress) as bar:
        bar.set_description(f"convert {unet.name}")
        network, guide = _converted(_convert_network, unet, flags, source, dtype), None
        learn_sigma = network.config.out_channels == 2 * flags.get("in_channels", 3)
        scheduler = convert_scheduler({**flags, "learn_sigma": learn_sigma})
        bar.update()
        if classifier is not None:
            classifier = Path(classifier)
            bar.set_description(f"convert {classifier.name}")
            guide = _converted(convert_classifier, classifier, classifier_flags, source, dtype)
            _check_pair(network, guide, unet, classifier)
            defaults["guidance_scale"] = float(config.get("classifier_scale", 1.0))
        bar.update()
        bar.set_description(f"save {output}")
        partial = output.with_name(f".{output.name}.partial")
        try:
            ClassifierGuidedPipeline(network, scheduler, guide, defaults=defaults).save_pretrained(
                partial
            )
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        bar.update()


def _flags(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags of the network and of the classifier, each with those of the diffusion process."""
    flat = {
        name: value
        for name, value in config.items()
        if name not in ("classifier_scale", "unet", "classifier")
    }
    process = {name: value for name, value in flat.items() if name in PROCESS}
    network = config.get(
        "unet", {name: value for name, value in flat.items() if not name.startswith("classifier_")}
    )
    classifier = config.get(
        "classifier",
        {
            name: value
            for name, value in flat.items()
            if name.startswith("classifier_") or name in ("image_size", "large_size")
        },
    )
    process |= {name: value for name, value in network.items() if name in PROCESS}
    return {**network, **process}, {**classifier, **process}


def _convert_network(state_dict: Mapping[str, Tensor], flags: Mapping[str, Any]) -> UNet2DModel:
    first = state_dict.get("input_blocks.0.0.weight")
    doubled = first is not None and first.shape[1] == 2 * flags.get("in_channels", first.shape[1])
    return (convert_super_resolution if "large_size" in flags or doubled else convert_unet)(
        state_dict, flags
    )


def _default_steps(respacing: str | None) -> dict[str, int]:
    """{"num_inference_steps": N} of "N" and "ddimN"."""
    if not respacing:
        return {}
    count = str(respacing).removeprefix("ddim")
    if not count.isdigit():
        raise ValueError(
            f"timestep_respacing is {respacing!r}; one number can be a pipeline's default: leave it out, "
            "and pass timesteps=respaced_timesteps(...) in the call"
        )
    return {"num_inference_steps": int(count)}


def _converted(
    convert: Callable[..., Model],
    file: Path,
    config: Mapping[str, Any],
    source: str,
    dtype: torch.dtype | None,
) -> Model:
    """The model of a file, whose tensors are let go when this returns."""
    state_dict = load_state_dict(file)
    if dtype is not None:
        state_dict = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
    try:
        return convert(state_dict, config)
    except ValueError as error:
        raise ValueError(f"{file} doesn't fit {source}: {error}") from error


def _check_pair(
    unet: torch.nn.Module, classifier: torch.nn.Module, unet_file: Path, classifier_file: Path
) -> None:
    size, other = unet.config.sample_size, classifier.config.sample_size
    if size != other:
        raise ValueError(
            f"{classifier_file} is for images of {other} x {other}, {unet_file} for {size} x {size}"
        )
    count, classes = classifier.config.num_labels, unet.config.num_class_embeds
    if classes not in (None, count):
        raise ValueError(f"{classifier_file} has {count} classes, {unet_file} has {classes}")


def add_convert_command(commands: Any) -> None:
    """Add `convert` to the subparsers of the program `guided-diffusers`."""
    command = commands.add_parser(
        "convert",
        help="OpenAI's guided-diffusion checkpoints to a pipeline folder",
        description="Convert OpenAI's guided-diffusion checkpoints to a folder that "
        "ClassifierGuidedPipeline.from_pretrained reads. No code in the files is run.",
    )
    command.set_defaults(run=run_convert)
    option = command.add_argument
    option(
        "--unet", type=Path, required=True, metavar="FILE", help="the network, .pt or .safetensors"
    )
    option(
        "--classifier",
        type=Path,
        metavar="FILE",
        help="the classifier, .pt or .safetensors (default: none)",
    )
    option(
        "--preset",
        metavar="NAME",
        help=f"{', '.join(PRESETS)} (default: by the name of the network's file)",
    )
    option("--config", type=Path, metavar="JSON", help="the original's flags, instead of a preset")
    option(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a folder that doesn't exist yet",
    )
    option("--dtype", choices=DTYPES, help="of the weights (default: the file's)")
    option("--quiet", action="store_true", help="no progress bar")


def run_convert(options: argparse.Namespace) -> None:
    config = None
    if options.config is not None:
        try:
            config = json.loads(options.config.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"--config {options.config} is no JSON: {error}") from error
    convert_checkpoint(
        options.unet,
        options.output,
        options.classifier,
        options.preset,
        config,
        DTYPES.get(options.dtype),
        not options.quiet,
    )
    print(
        f"{options.output} is ready: ClassifierGuidedPipeline.from_pretrained({str(options.output)!r})"
    )

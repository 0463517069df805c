"""guided-diffusion's checkpoint files to a folder for `ClassifierGuidedPipeline`."""

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import shorten, shown
from ..classifier import NoiseAwareClassifier
from ..files import check_writable, new_folder
from ..pipeline import ClassifierGuidedPipeline
from .arguments import check
from .networks import convert_classifier, convert_super_resolution, convert_unet, noise_schedule
from .presets import find_preset

# Flags of the diffusion process, which UNet and classifier share
PROCESS_FLAGS = {"diffusion_steps", "noise_schedule", "sigma_small", "predict_xstart"}
PROCESS_FLAGS |= {"rescale_timesteps", "timestep_respacing"}


def convert_scheduler(config: Mapping[str, Any]) -> DDPMScheduler:
    """The scheduler for the original's flags.

    These are `diffusion_steps`, `noise_schedule`, `learn_sigma`, `sigma_small`, `predict_xstart`
    and `timestep_respacing`, of which only the prefix "ddim" counts: it decides the spacing.
    `DDPMScheduler` agrees with the original to 5e-5 (its tables are in float32). Schedulers with
    float64 tables, and with the original's DDIM, can be created from it:

        ADMDDPMScheduler.from_config(scheduler.config)
        ADMDDIMScheduler.from_config(scheduler.config, clip_sample=False)  # with clip_x0=True

    Raises:
        ValueError: For `rescale_timesteps` with other than 1000 steps, because our pipelines pass
            timesteps to networks unscaled.
    """
    steps = config.get("diffusion_steps", 1000)
    unscaled = steps == 1000 or not config.get("rescale_timesteps")
    check(unscaled, f"rescale_timesteps is True with {steps} diffusion_steps; allowed: 1000")
    variance_type = "fixed_small" if config.get("sigma_small") else "fixed_large"
    if config.get("learn_sigma"):
        variance_type = "learned_range"
    ddim = str(config.get("timestep_respacing", "")).startswith("ddim")
    return DDPMScheduler(
        **noise_schedule(config),
        variance_type=variance_type,
        prediction_type="sample" if config.get("predict_xstart") else "epsilon",
        timestep_spacing="leading" if ddim else "linspace",
        clip_sample=True,
    )


def load_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` or `.safetensors` file, loaded without running code from it.

    The tensors of a `.pt` are mapped: they stay on disk until they are used.

    Raises:
        ValueError: If the file is missing, damaged, or holds anything but named tensors.
    """
    check(file.is_file(), f"{file} does not exist")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state_dict = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        reason = "no checkpoint, or holds code, which is never run"
        # not torch's message, which says how to load it unsafely
        raise ValueError(
            f"{file} is refused: {reason}. A state dict of tensors, .pt or .safetensors, is allowed"
        ) from None
    except (RuntimeError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged or truncated: {shorten(error) or 'empty'}") from None
    flat = isinstance(state_dict, dict) and all(isinstance(t, Tensor) for t in state_dict.values())
    kind = type(state_dict).__name__
    check(flat, f"{file} holds no tensors by name but {kind}; the original's are flat state dicts")
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

    Uses at most twice the networks' memory. The folder appears when it is complete.

    Args:
        unet, classifier: Checkpoint files, .pt or .safetensors.
        output: Folder to write; it must not exist.
        preset: Name for `find_preset`. By default, without `config`, the file name of `unet`.
        config: The original's flags, instead of a preset: those of UNet, classifier and diffusion
            process in one mapping, or {"unet": ..., "classifier": ...}, each in a form of
            `convert_unet`. `classifier_scale` and `timestep_respacing` become defaults of the
            pipeline.
        dtype: Of the weights; by default the file's.

    Raises:
        ValueError: For files that can't be read, that don't fit the preset or config, or that
            don't fit each other; for an output that exists, or that another process writes.
        OSError: If the output can't be written.
    """
    unet, output = Path(unet), Path(output)
    files = [unet, *([] if classifier is None else [Path(classifier)])]
    _check_output(output)
    size = sum(file.stat().st_size for file in files if file.is_file())
    check_writable(
        output, "output", folder=True, size=size // 4
    )  # at least, from float64 to bfloat16
    check(preset is None or config is None, "preset and config: only one is allowed")
    source = "the config"
    if config is None:
        published = find_preset(preset or unet.name)
        source = f"preset {preset or unet.stem!r}"
        config = {
            "classifier_scale": published.guidance_scale,
            "timestep_respacing": str(published.num_inference_steps),
            **published.config,
        }
    for name in ("unet", "classifier"):
        flags = config.get(name, {})
        check(
            isinstance(flags, Mapping),
            f"config: {name} is {shown(flags)}; {{flag: value}} is allowed",
        )
    unet_flags, classifier_flags = _split_flags(config)
    defaults = {"guidance_algorithm": "mean", "guidance_scale": 0.0}
    defaults |= _default_steps(unet_flags.get("timestep_respacing"))

    with (
        new_folder(output) as partial,
        tqdm(total=3, unit="step", disable=not progress) as bar,
    ):
        bar.set_description(f"convert {unet.name}")
        denoiser = _convert_file(_convert_denoiser, unet, unet_flags, source, dtype)
        learn_sigma = denoiser.config.out_channels == 2 * unet_flags.get("in_channels", 3)
        scheduler = convert_scheduler({**unet_flags, "learn_sigma": learn_sigma})
        bar.update()
        guide = None
        if classifier is not None:
            classifier = Path(classifier)
            bar.set_description(f"convert {classifier.name}")
            guide = _convert_file(convert_classifier, classifier, classifier_flags, source, dtype)
            _check_compatible(denoiser, guide, unet, classifier)
            defaults["guidance_scale"] = float(config.get("classifier_scale", 1.0))
        bar.update()
        bar.set_description(f"save {output}")
        pipeline = ClassifierGuidedPipeline(denoiser, scheduler, guide, defaults=defaults)
        pipeline.save_pretrained(partial)
        bar.update()


def _check_output(output: Path) -> None:
    check(not output.exists(), f"output {output} exists already; give another folder, or remove it")


def _split_flags(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags of UNet and classifier, each with those of the diffusion process."""
    unet: dict[str, Any] = {}
    classifier: dict[str, Any] = {}
    for name, value in config.items():
        if name.startswith("classifier_"):
            classifier[name] = value
        elif name not in ("unet", "classifier"):
            unet[name] = value
        if name in ("image_size", "large_size"):
            classifier[name] = value
    classifier.pop("classifier_scale", None)
    unet, classifier = config.get("unet", unet), config.get("classifier", classifier)
    process = {n: value for n, value in {**config, **unet}.items() if n in PROCESS_FLAGS}
    return {**unet, **process}, {**classifier, **process}


def _default_steps(respacing: str | None) -> dict[str, int]:
    """The pipeline's default `num_inference_steps` for the respacing "N" or "ddimN"."""
    if not respacing:
        return {}
    count = str(respacing).removeprefix("ddim")
    allowed = (
        "one number can be a pipeline's default: leave it out, and pass "
        "timesteps=respaced_timesteps(...) in the call"
    )
    check(count.isdigit(), f"timestep_respacing is {respacing!r}; {allowed}")
    return {"num_inference_steps": int(count)}


def _convert_file(
    convert: Callable, file: Path, flags: Mapping[str, Any], source: str, dtype: torch.dtype | None
) -> Any:
    """The model of a file, whose tensors are released on return."""
    state_dict = load_state_dict(file)
    if dtype is not None:
        state_dict = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
    try:
        return convert(state_dict, flags)
    except ValueError as error:
        raise ValueError(f"{file} doesn't fit {source}: {error}") from error
    except (IndexError, TypeError, RuntimeError) as error:  # of tensors of other shapes
        raise ValueError(
            f"{file} doesn't fit {source}: its tensors have other shapes ({shorten(error)})"
        ) from error


def _convert_denoiser(state_dict: Mapping[str, Tensor], flags: Mapping[str, Any]) -> UNet2DModel:
    """A UNet or an up-sampler, which has a flag of its own and twice the input channels."""
    upsampler = "large_size" in flags
    weight = state_dict.get("input_blocks.0.0.weight")
    if weight is not None and "in_channels" in flags:
        upsampler |= weight.shape[1] == 2 * flags["in_channels"]
    return (convert_super_resolution if upsampler else convert_unet)(state_dict, flags)


def _check_compatible(
    unet: UNet2DModel, classifier: NoiseAwareClassifier, unet_file: Path, classifier_file: Path
) -> None:
    size, guide_size = unet.config.sample_size, classifier.config.sample_size
    sizes = f"images of {guide_size} x {guide_size}, {unet_file} for {size} x {size}"
    check(size == guide_size, f"{classifier_file} is for {sizes}")
    labels, classes = classifier.config.num_labels, unet.config.num_class_embeds
    fits = classes in (None, labels)
    check(fits, f"{classifier_file} has {labels} classes, {unet_file} has {classes}")

"""Checks of a run's timesteps and noise levels: what gives no images is refused, or warned of."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from math import hypot
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin

from .checks import check_number
from .families import check_origin
from .noise import (
    SMALLEST_ALPHA,
    NoiseLevel,
    is_flow,
    is_instance_by_name,
    sampling_timesteps,
    set_begin_index,
    starting_sigma,
    step_fn,
)

#: schedulers whose step goes from timestep t to t - num_train_timesteps // num_inference_steps,
#: whatever the next of their timesteps is
FIXED_STRIDE = {
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "PNDMScheduler",
}


#: schedulers that divide by the distance of two steps' noise levels
MULTISTEP = {
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "LMSDiscreteScheduler",
}


#: |b| of the last step, the factor of the output's error in the image, above which it is no image
MAX_OUTPUT_GAIN = 1e3


#: {standard deviation of data: those of samples over it, outside of which there is a warning}
DEVIATIONS = {0.5: (0.5, 1.5), 0.3: (0.5, 1.22)}


#: {entry of a scheduler's config: its values}, of which some classes of Diffusers ignore others
ENTRIES = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "variance_type": (
        *(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        *("learned", "learned_range"),
    ),
}


#: noise of a sample over that of its level, or the inverse, above which there is a warning
MAX_NOISE_ERROR = 1.05


def clipping_warning(scheduler: SchedulerMixin) -> str | None:
    """Warning about a scheduler that clips or thresholds the predicted x0 but keeps the noise of
    the unclipped one.

    Guidance moves x0 out of [-1, 1] at high noise. x0 and eps then become inconsistent, which
    degrades guided samples. None for all other schedulers.
    """
    name = type(scheduler).__name__
    if name in ("DDIMScheduler", "DDIMParallelScheduler") and (
        scheduler.config.clip_sample or scheduler.config.thresholding
    ):
        return (
            f"{name} clips x0 but not the noise that goes with it, which degrades guided samples: "
            "use clip_sample=False in its config"
        )
    return None


def check_custom_steps(scheduler: SchedulerMixin, name: str, steps: Any) -> list[float]:
    """Custom timesteps or sigmas as a list of numbers, ints where they were.

    Args:
        name: "timesteps" or "sigmas".
        steps: a list, array or tensor.

    Raises:
        ValueError: if the scheduler takes none; unless they are finite numbers that fall, at least
            one, and within the schedule of the network's training.
    """
    kind = type(scheduler).__name__
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{name}: {kind} takes no custom ones")
    try:
        array = steps.detach().cpu() if isinstance(steps, torch.Tensor) else np.array(steps)
        values = torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={steps!r:.80}: a list of numbers is allowed") from None
    if values.ndim != 1 or not len(values) or values.dtype in (torch.bool, torch.complex128):
        raise ValueError(f"{name}={steps!r:.80}: a list of at least one number is allowed")
    numbers, exact = values.tolist(), values.double()
    falls = bool((exact.diff() < 0).all()) or getattr(scheduler, "allows_inversion", False)
    if not (exact.isfinite().all() and falls):
        raise ValueError(f"{name}={numbers}: finite numbers that fall are allowed")
    largest = _largest_step(scheduler, name)
    if exact.min() < 0 or exact.max() > largest:
        raise ValueError(f"{name}={numbers}: {kind} allows numbers from 0 to {largest:.6g}")
    return numbers


def _largest_step(scheduler: SchedulerMixin, name: str) -> float:
    """Of custom timesteps or sigmas; the rest is found when the noise levels are read."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if is_instance_by_name(scheduler, {"DDPMWuerstchenScheduler"}):
        return 1.0
    is_continuous = scheduler.config.get("timestep_type") == "continuous"
    if table is None or is_continuous or is_flow(scheduler):
        return float("inf")
    if name == "timesteps":
        return len(table) - 1
    return 1.01 * float((1 / table[-1].double() - 1).sqrt())  # users round it


def check_schedule(scheduler: SchedulerMixin, levels: Sequence[NoiseLevel]) -> None:
    """Check that a run of these levels can end in an image.

    Raises:
        ValueError: for a run without steps or without noise; levels that rise, or are repeated by a
            scheduler that divides by their distance; as `_check_x0`.
    """
    name = type(scheduler).__name__
    check_scheduler_config(scheduler)
    if not levels:
        raise ValueError(f"timesteps, sigmas: {name} has no steps with these; at least 1 is needed")
    if getattr(scheduler, "allows_inversion", False):
        return
    if not levels[0].sigma > 0:
        raise ValueError(f"scheduler {name}: its first step has no noise; look at its config")
    if not any(level.b for level in levels):
        raise ValueError(
            f"scheduler {name}: the network's output has no effect on x0; its config has "
            f"sigma_data={scheduler.config.get('sigma_data')}"
        )
    timesteps, order = sampling_timesteps(scheduler).tolist(), getattr(scheduler, "order", 1)
    main = range(0, len(levels), order)  # between them are mid-points
    for i, j in pairwise(main):
        noise, following = (min(levels[k].sigma / levels[k].alpha, 4096) for k in (i, j))
        if following > noise * (1 + 1e-6):
            raise ValueError(
                f"timesteps, sigmas: from step {i} (timestep {timesteps[i]:g}) to step {j} "
                f"({timesteps[j]:g}) the noise of {name} rises; it must fall"
            )
        if levels[i] == levels[j] and is_instance_by_name(scheduler, MULTISTEP):
            raise ValueError(
                f"num_inference_steps: {len(main)} steps of {name} repeat the noise level of timestep "
                f"{timesteps[i]:g}, and it divides by their distance; use fewer steps"
            )
    _check_x0(scheduler, levels, timesteps)


def check_scheduler_config(scheduler: SchedulerMixin) -> None:
    """Refuse entries of a config with which images are constant, or steps fail.

    Raises:
        ValueError: naming the entry.
    """
    config, name = scheduler.config, type(scheduler).__name__
    check_origin(scheduler)
    for entry, allowed in ENTRIES.items():
        if type(scheduler).__module__.startswith("diffusers.") and entry in config:
            if config[entry] not in allowed:
                raise ValueError(
                    f"scheduler {name}: {entry}={config[entry]!r:.80} in its config; one of {allowed} is "
                    "allowed"
                )
    if config.get("solver_order") is not None:
        check_number(f"scheduler {name}: solver_order", config["solver_order"], 1, integer=True)
    if config.get("clip_sample") and config.get("clip_sample_range") is not None:
        entry = f"scheduler {name}: clip_sample_range"
        check_number(entry, config["clip_sample_range"], 0, above=True)
    if config.get("thresholding"):
        for entry, low, high in (
            ("dynamic_thresholding_ratio", 0, 1),
            ("sample_max_value", 1, float("inf")),
        ):
            check_number(f"scheduler {name}: {entry}", config.get(entry), low, high)


def _check_x0(
    scheduler: SchedulerMixin, levels: Sequence[NoiseLevel], timesteps: Sequence[float]
) -> None:
    """Refuse a prediction of noise where the sample is noise only: it says nothing of x0 there.

    With alpha = 0 (zero terminal SNR) x0 is 0 / 0. A scheduler that clips it goes on with values of
    -1 and 1, which the next levels' alpha makes small, unless this is the last step.

    Raises:
        ValueError: naming the timestep.
    """
    name = type(scheduler).__name__
    clips = any(scheduler.config.get(n) for n in ("clip_sample", "thresholding", "clip_denoised"))
    for i, level in enumerate(levels):
        last = i + 1 == len(levels)
        if (level.a >= 1 / SMALLEST_ALPHA and not clips) or (last and -level.b > MAX_OUTPUT_GAIN):
            raise ValueError(
                f"prediction_type='epsilon': at timestep {timesteps[i]:g} of {name} the sample is noise "
                "only, so the predicted noise says nothing of the image; use a network with "
                "'v_prediction' or 'sample', timestep_spacing='leading', or "
                "rescale_betas_zero_snr=False"
            )


def starting_warning(scheduler: SchedulerMixin, level: NoiseLevel) -> str | None:
    """Warning about a run from pure noise whose first level is one of images with noise."""
    if hypot(level.alpha, level.sigma) <= MAX_NOISE_ERROR * level.sigma:
        return None
    return (
        f"{type(scheduler).__name__} starts at sigma/alpha={level.sigma / level.alpha:.3g}, where "
        "samples are not noise only: use more steps, timestep_spacing='trailing' in its config, or "
        "timesteps or sigmas that start higher"
    )


def check_start(scheduler: SchedulerMixin, level: NoiseLevel) -> None:
    """Refuse a run from pure noise whose first level has more image than noise.

    Raises:
        ValueError: for one.
    """
    if level.sigma < level.alpha:
        warning = starting_warning(scheduler, level)
        raise ValueError(f"num_inference_steps, timesteps, sigmas: {warning}")


def timestep_warning(
    scheduler: SchedulerMixin, levels: Sequence[NoiseLevel], timesteps: Sequence[float]
) -> str | None:
    """Warning about timesteps whose noise, in the schedule of the training, is not the sample's.

    Schedulers round timesteps, and clamp them to the schedule.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    is_other = is_flow(scheduler) or scheduler.config.get("timestep_type") == "continuous"
    if table is None or not hasattr(scheduler, "sigmas") or is_other:
        return None
    s = ((1 - table.double()) / table.double()).sqrt().clamp(max=4096).tolist()
    for level, t in zip(levels, timesteps, strict=True):
        noise = min(max(level.sigma / level.alpha, s[0]), s[-1])
        low, high = s[max(int(t) - 1, 0)], s[min(int(t) + 2, len(s) - 1)]
        if not low / MAX_NOISE_ERROR <= noise <= high * MAX_NOISE_ERROR:
            return (
                f"{type(scheduler).__name__}: at timestep {t:g} the sample has sigma/alpha={noise:.3g}"
                f", the network was trained with {s[round(t)]:.3g} there; look at the entries of its "
                "config that space sigmas"
            )
    return None


def accuracy_warning(scheduler: SchedulerMixin, levels: Sequence[NoiseLevel]) -> str | None:
    """Warning about a run whose steps are too long for a scheduler of second order, so that noise
    stays in the images, or too long where there is little noise, so that the images are smoothed
    (`use_beta_sigmas`).

    The run is made with the exact prediction for normal data of standard deviation d,
    x0 = alpha d^2 / (sigma^2 + alpha^2 d^2) x.
    """
    is_checked = getattr(scheduler, "order", 1) == 2 or scheduler.config.get("use_beta_sigmas")
    is_checked = is_checked or is_instance_by_name(scheduler, {"SASolverScheduler"})
    if not is_checked or not all(level.b for level in levels):
        return None
    probe, generator = deepcopy(scheduler), torch.Generator().manual_seed(0)
    for name, value in vars(probe).items():
        if isinstance(value, torch.Tensor):
            setattr(probe, name, value.cpu())
    set_begin_index(probe, 0)
    step = step_fn(probe, generator, 0.0, 1)
    data = torch.tensor(list(DEVIATIONS)).reshape(1, -1, 1, 1)  # a channel each
    x = torch.randn(1, len(data[0]), 64, 64, generator=generator) * starting_sigma(probe)
    for index, level in enumerate(levels):
        x0 = level.alpha * data**2 / (level.sigma**2 + level.alpha**2 * data**2) * x
        x = step(level.output(x, x0), index, x)
    for std, (expected, (low, high)) in zip(
        x[0].flatten(1).std(1), DEVIATIONS.items(), strict=True
    ):
        if low * expected <= std <= high * expected:
            continue
        effect = "noise stays in the images" if std > expected else "the images are smoothed"
        return (
            f"{type(scheduler).__name__}: its {len(levels)} evaluations are too far apart, {effect}: data "
            f"of standard deviation {expected} would get {float(std):.3g}; take more steps, other "
            "spacing of its sigmas, or a scheduler of first order"
        )
    return None


def ending_warning(scheduler: SchedulerMixin) -> str | None:
    """Warning about a run whose last step ends above the schedule's lowest noise level."""
    table, sigmas = (getattr(scheduler, name, None) for name in ("alphas_cumprod", "sigmas"))
    if table is None or sigmas is None or is_flow(scheduler):
        return None
    last, lowest = float(sigmas[-1]), float((1 / table[0].double() - 1).sqrt())
    if last <= 1.01 * lowest:
        return None
    return (
        f"sigmas: {type(scheduler).__name__} takes the last one, {last:.4g}, for the end of the run, "
        "so that much noise stays in the images: add 0 at the end"
    )


def stride_warning(scheduler: SchedulerMixin, first: int = 0) -> str | None:
    """Warning about a scheduler of `FIXED_STRIDE` whose timesteps have another stride.

    The noise of a sample then differs from that of the timestep at which the network is evaluated,
    by a factor that is followed here for data that is 0: x_s = sigma_s / sigma_t x_t.

    Raises:
        ValueError: for more steps than timesteps.
    """
    owner = next(cls.__name__ for cls in type(scheduler).__mro__ if "step" in vars(cls))
    if owner not in FIXED_STRIDE:
        return None
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    if not stride:
        raise ValueError(
            f"num_inference_steps={scheduler.num_inference_steps}: {owner} allows at most "
            f"num_train_timesteps={scheduler.config.num_train_timesteps}; with more, its steps stand "
            "still"
        )
    timesteps = list(dict.fromkeys(scheduler.timesteps[first:].tolist()))
    if owner == "PNDMScheduler" and not scheduler.config.skip_prk_steps:
        timesteps = [t for t in timesteps if t not in scheduler.prk_timesteps]  # half steps
    sigma = (1 - scheduler.alphas_cumprod.double()).sqrt().tolist()
    factor, worst, at = 1.0, 1.0, 0
    for t, following in pairwise(timesteps):
        factor *= (sigma[t - stride] if t >= stride else 0.0) / max(sigma[following], 1e-6)
        if abs(factor - 1) > abs(worst - 1):
            worst, at = factor, following
    if 1 / MAX_NOISE_ERROR <= worst <= MAX_NOISE_ERROR:
        return None
    spacing = scheduler.config.timestep_spacing
    return (
        f"{owner} steps by {stride} timesteps, its timesteps (timestep_spacing={spacing!r}, "
        f"{scheduler.num_inference_steps} steps) have another distance: at timestep {at} the sample "
        f"has {worst:.3g} times the noise of the level that the network gets. Use "
        "timestep_spacing='trailing' and a number of steps that divides "
        f"{scheduler.config.num_train_timesteps}, or another scheduler"
    )

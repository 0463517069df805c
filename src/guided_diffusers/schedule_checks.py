"""Checks of a run's timesteps and noise levels: what gives no images is refused, or warned of."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from math import hypot
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin

from .noise import SMALLEST_ALPHA, NoiseLevel, is_flow, is_instance_by_name, sampling_timesteps

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
    if table is None or is_flow(scheduler):
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
        f"has {worst:.3g} times the noise that the network is told. Use timestep_spacing='trailing' "
        f"and a number of steps that divides {scheduler.config.num_train_timesteps}, or another "
        "scheduler"
    )

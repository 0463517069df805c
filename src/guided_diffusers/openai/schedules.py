"""guided-diffusion's noise schedules as Diffusers schedulers: its respacing, its DDIM, tables in float64.

Self-contained on purpose (torch and diffusers only): this file travels to the Hub beside the weights.
"""

from collections.abc import Sequence
from functools import wraps
from math import cos, pi
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    SchedulerMixin,  # noqa: F401 - a pipeline's from_pretrained looks for it in the module that the class is from
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

MAX_BETA = 0.999


def respaced_timesteps(num_train_timesteps: int, respacing: int | str | Sequence[int]) -> list[int]:
    """The timesteps that a shorter run keeps, falling, as the original's `timestep_respacing` says it.

    Args:
        num_train_timesteps: T; timesteps are 0 to T - 1.
        respacing: "ddimN": every k-th timestep from 0, for the smallest k that keeps exactly N. Otherwise counts, "250"
            or "10,15,20" or integers: T is cut into as many equal parts, and of each so many are kept, evenly spread
            from its first to its last. "" keeps all.

    Raises:
        ValueError: if a part is shorter than its count, or no k keeps N.
    """
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        count = int(respacing.removeprefix("ddim"))
        for stride in range(1, num_train_timesteps + 1):
            if len(range(0, num_train_timesteps, stride)) == count:
                return list(range(0, num_train_timesteps, stride))[::-1]
        raise ValueError(
            f"respacing {respacing!r}: no stride keeps exactly {count} of {num_train_timesteps} timesteps"
        )
    if isinstance(respacing, str):
        respacing = (
            [int(count) for count in respacing.split(",")] if respacing else num_train_timesteps
        )
    counts = [respacing] if isinstance(respacing, int) else list(respacing)
    shorter, longer = divmod(num_train_timesteps, len(counts))
    kept, start = [], 0
    for part, count in enumerate(counts):
        size = shorter + (part < longer)
        if not 1 <= count <= size:
            raise ValueError(
                f"respacing {respacing!r}: {count} of a part of {size} timesteps; 1 to {size} are allowed"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(
            count
        ):  # adds up, as the original does: i * stride may round to another integer
            kept.append(start + round(position))
            position += stride
        start += size
    return kept[::-1]


class _OriginalTables:
    """What the two schedulers share: betas and their products in float64, and the original's timesteps."""

    def _widen(self, **fixed: Any) -> None:
        for name, value in fixed.items():
            if self.config[name] != value:
                raise ValueError(
                    f"{name} is {self.config[name]!r}; {type(self).__name__} allows only {value!r}"
                )
        if self.config.timestep_spacing not in ("linspace", "leading"):
            raise ValueError(
                f"timestep_spacing is {self.config.timestep_spacing!r}; 'linspace' (respacing \"N\") and "
                "'leading' (\"ddimN\") are allowed"
            )
        self.betas = torch.from_numpy(_betas(self.config))
        self.alphas = 1 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, 0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Take N timesteps as `respaced_timesteps` gives them, "N" or with `timestep_spacing="leading"` "ddimN", or
        these `timesteps`.

        Raises:
            ValueError: unless one of the two is given and fits.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("one of num_inference_steps and timesteps is needed")
        total = self.config.num_train_timesteps
        if timesteps is None:
            linspace = self.config.timestep_spacing == "linspace"
            timesteps = respaced_timesteps(
                total, num_inference_steps if linspace else f"ddim{num_inference_steps}"
            )
        timesteps = [int(t) for t in timesteps]
        if (
            not timesteps
            or not 0 <= min(timesteps) <= max(timesteps) < total
            or not self._ordered(timesteps)
        ):
            raise ValueError(
                f"timesteps is {timesteps}; different ones from 0 to {total - 1} in order are allowed"
            )
        self.num_inference_steps, self.custom_timesteps = len(timesteps), True
        self.timesteps = torch.tensor(timesteps, device=device)

    def _ordered(self, timesteps: list[int]) -> bool:
        return all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))


class ADMDDPMScheduler(_OriginalTables, DDPMScheduler):
    """`DDPMScheduler` with the original's numbers: float64 tables, and its rounding of the timesteps.

    Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis (2021). `DDPMScheduler`'s float32 tables are up to
    5e-4 off in 1 - alpha_bar; its "linspace" rounds other timesteps for 278 of the N below 1000 (none of 10, 25, 50,
    100, 250, 1000). Arguments are `DDPMScheduler`'s; `timestep_spacing` "linspace" or "leading". The original:
    `variance_type="learned_range"`, `timestep_spacing="linspace"`.

    Raises:
        ValueError: for settings that the original lacks.
    """

    @wraps(DDPMScheduler.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._widen(steps_offset=0, rescale_betas_zero_snr=False)


class ADMDDIMScheduler(_OriginalTables, DDIMScheduler):
    """DDIM as the original has it, for any timesteps, and backwards.

    From t to the next of the timesteps, s (Song et al., Denoising Diffusion Implicit Models, 2021, eq. 12 and 16):

        x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - std^2) eps + std noise
        eps = (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t)
        std = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)

    with abar_s = 1 after the last. What `DDIMScheduler` does otherwise: its s is t - T // N, which is no timestep of
    "linspace"; its eps is not that of the clipped x0; its tables are in float32. With guidance, let the pipeline clip,
    so that x0 is clipped before it and not after: `clip_sample=False` here and `pipeline(..., clip_x0=True)`.

    **Inversion**: with rising timesteps each step goes to the noisier, the last to abar_s = 0, pure noise. An image as
    the `latents` becomes the noise that falling timesteps turn back into it, about.

    Arguments are `DDIMScheduler`'s: `timestep_spacing` "linspace" or "leading", `prediction_type` "epsilon" or
    "sample".

    Raises:
        ValueError: for settings that the original lacks.
    """

    @wraps(DDIMScheduler.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.config.prediction_type not in ("epsilon", "sample"):
            raise ValueError(
                f"prediction_type is {self.config.prediction_type!r}; 'epsilon' and 'sample' are allowed"
            )
        self._widen(
            steps_offset=0, rescale_betas_zero_snr=False, set_alpha_to_one=True, thresholding=False
        )

    def _ordered(self, timesteps: list[int]) -> bool:
        return super()._ordered(timesteps) or super()._ordered(timesteps[::-1])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """The next sample and the x0 it comes from; arguments as for `DDIMScheduler.step`.

        Raises:
            ValueError: for noise (`eta` not 0) in an inversion.
        """
        timesteps = self.timesteps.tolist()
        index = timesteps.index(int(timestep))
        rising = len(timesteps) > 1 and timesteps[0] < timesteps[1]
        if rising and eta:
            raise ValueError(
                f"eta={eta}: an inversion (rising timesteps) has no noise; only 0 is allowed"
            )
        abar_t = float(self.alphas_cumprod[timesteps[index]])
        abar_s = float(not rising)
        if index + 1 < len(timesteps):
            abar_s = float(self.alphas_cumprod[timesteps[index + 1]])

        x0 = model_output
        if self.config.prediction_type == "epsilon":
            x0 = (sample - (1 - abar_t) ** 0.5 * model_output) / abar_t**0.5
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        eps = (sample - abar_t**0.5 * x0) / (1 - abar_t) ** 0.5
        std = 0.0 if rising else eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)) ** 0.5
        moved = abar_s**0.5 * x0 + (1 - abar_s - std**2) ** 0.5 * eps
        if std:
            if variance_noise is None:
                variance_noise = randn_tensor(moved.shape, generator, moved.device, moved.dtype)
            moved = moved + std * variance_noise
        return DDIMSchedulerOutput(moved, x0) if return_dict else (moved, x0)


def _betas(config: Any) -> np.ndarray:
    """beta_t in float64 of a config in `DDPMScheduler`'s words."""
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.asarray(config.trained_betas, np.float64)
    match config.beta_schedule:
        case "linear":
            return np.linspace(config.beta_start, config.beta_end, steps, dtype=np.float64)
        case (
            "squaredcos_cap_v2"
        ):  # abar(t) = cos^2((t / T + 0.008) / 1.008 pi / 2), Nichol & Dhariwal 2021, eq. 17
            abar = [cos((t / steps + 0.008) / 1.008 * pi / 2) ** 2 for t in range(steps + 1)]
            return np.array([min(1 - abar[t + 1] / abar[t], MAX_BETA) for t in range(steps)])
    raise ValueError(
        f"beta_schedule is {config.beta_schedule!r}; 'linear' and 'squaredcos_cap_v2' are allowed"
    )

"""guided-diffusion's samplers as Diffusers schedulers: its timesteps, its DDIM, tables in float64.

Imports only torch, numpy and diffusers, because this file is saved on the Hub beside the weights.
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
    SchedulerMixin,  # noqa: F401 - from_pretrained of a pipeline looks for it in this module
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


def respaced_timesteps(num_train_timesteps: int, respacing: int | str | Sequence[int]) -> list[int]:
    """Timesteps of a run with fewer steps, descending, for the original's `timestep_respacing`.

    Args:
        num_train_timesteps: T; timesteps are 0 to T - 1.
        respacing: "ddimN": every k-th timestep from 0, with the smallest k that gives exactly N.
            Otherwise numbers of steps, as "250", "10,15,20" or integers: T is divided into as many
            equal sections, and each gets its number of steps, evenly spaced from its first to its
            last timestep. "": all timesteps.

    Raises:
        ValueError: If a section has fewer timesteps than steps, or if no k gives N.
    """
    total, timesteps = num_train_timesteps, []
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        count = int(respacing.removeprefix("ddim"))
        for stride in range(1, total + 1):
            if len(range(0, total, stride)) == count:
                return list(range(0, total, stride))[::-1]
        message = f"no stride keeps exactly {count} of {total} timesteps"
        raise ValueError(f"respacing {respacing!r}: {message}")
    if isinstance(respacing, str):
        counts = [int(count) for count in (respacing or str(total)).split(",")]
    else:
        counts = [respacing] if isinstance(respacing, int) else list(respacing)

    start, (base_size, longer_sections) = 0, divmod(total, len(counts))
    for section, count in enumerate(counts):
        size = base_size + (section < longer_sections)
        if not 1 <= count <= size:
            part = f"{count} of a part of {size} timesteps"
            raise ValueError(f"respacing {respacing!r}: {part}; 1 to {size} are allowed")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # a sum as in the original: i * stride may round differently
            timesteps.append(start + round(position))
            position += stride
        start += size
    return timesteps[::-1]


class _Float64Tables:
    """Betas and their products in float64, and the original's timesteps, for both schedulers."""

    _allowed: dict[str, tuple] = {"steps_offset": (0,), "rescale_betas_zero_snr": (False,)}
    _allowed |= {"timestep_spacing": ("linspace", "leading")}  # respacing "N" and "ddimN"
    allows_inversion = False  # with ascending timesteps

    def _set_tables(self) -> None:
        for name, allowed in self._allowed.items():
            value = self.config[name]
            if value not in allowed:
                kind = type(self).__name__
                raise ValueError(f"{name} is {value!r}; {kind} allows only {allowed}")
        self.betas = torch.from_numpy(_betas(self.config))
        self.alphas = 1 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, 0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Set `timesteps`, or those of `respaced_timesteps` for N = `num_inference_steps`.

        The respacing is "N", or "ddimN" with `timestep_spacing="leading"`.

        Raises:
            ValueError: If none or both are passed, or for unsorted or impossible timesteps.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("one of num_inference_steps and timesteps is needed")
        total = self.config.num_train_timesteps
        if timesteps is None:
            leading = self.config.timestep_spacing == "leading"
            respacing = f"ddim{num_inference_steps}" if leading else num_inference_steps
            timesteps = respaced_timesteps(total, respacing)
        timesteps = [int(t) for t in timesteps]
        ascending = sorted(set(timesteps))
        ordered = timesteps == ascending[::-1] or (self.allows_inversion and timesteps == ascending)
        if not timesteps or not ordered or ascending[0] < 0 or ascending[-1] >= total:
            order = f"different ones from 0 to {total - 1} in order"
            raise ValueError(f"timesteps is {timesteps}; {order} are allowed")
        self.num_inference_steps, self.custom_timesteps = len(timesteps), True
        self.timesteps = torch.tensor(timesteps, device=device)


class ADMDDPMScheduler(_Float64Tables, DDPMScheduler):
    """`DDPMScheduler` with the original's numbers: float64 tables, and its rounding of timesteps.

    Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis (2021). `DDPMScheduler`'s
    float32 tables have errors of up to 5e-4 in 1 - alpha_bar; its "linspace" rounds other timesteps
    for 278 of the N below 1000 (none of 10, 25, 50, 100, 250, 1000). Arguments are
    `DDPMScheduler`'s; `timestep_spacing` is "linspace" or "leading". The original uses
    `variance_type="learned_range"` and `timestep_spacing="linspace"`.

    Raises:
        ValueError: For settings that the original doesn't have.
    """

    @wraps(DDPMScheduler.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_tables()


class ADMDDIMScheduler(_Float64Tables, DDIMScheduler):
    """The original's DDIM, for any timesteps and in both directions.

    From t to the next timestep s (Song et al., Denoising Diffusion Implicit Models, 2021, eq. 12
    and 16):

        x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - std^2) eps + std noise
        eps = (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t)
        std = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)

    with abar_s = 1 after the last timestep. `DDIMScheduler` differs: its s is t - T // N, which is
    no timestep of "linspace"; its eps is not recomputed from the clipped x0; its tables are in
    float32. With guidance, let the pipeline clip x0 before guidance instead of the scheduler after
    it: `clip_sample=False` here and `pipeline(..., clip_x0=True)`.

    **Inversion**: with ascending timesteps each step adds noise, and the last goes to abar_s = 0,
    pure noise. Passing an image as `latents` gives noise that descending timesteps turn back into
    approximately that image.

    Arguments are `DDIMScheduler`'s: `timestep_spacing` is "linspace" or "leading",
    `prediction_type` "epsilon" or "sample".

    Raises:
        ValueError: For settings that the original doesn't have.
    """

    _allowed = _Float64Tables._allowed | {"prediction_type": ("epsilon", "sample")}
    _allowed |= {"set_alpha_to_one": (True,), "thresholding": (False,)}
    allows_inversion = True

    @wraps(DDIMScheduler.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_tables()

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
        """The next sample and its predicted x0; arguments as for `DDIMScheduler.step`.

        Raises:
            ValueError: For noise (`eta` not 0) in an inversion.
        """
        timesteps = self.timesteps.tolist()
        inversion = len(timesteps) > 1 and timesteps[0] < timesteps[1]
        if inversion and eta:
            message = "an inversion (rising timesteps) has no noise; only 0 is allowed"
            raise ValueError(f"eta={eta}: {message}")
        following = timesteps.index(int(timestep)) + 1
        abar_t, abar_s = float(self.alphas_cumprod[int(timestep)]), 0.0 if inversion else 1.0
        if following < len(timesteps):
            abar_s = float(self.alphas_cumprod[timesteps[following]])

        x0 = model_output
        if self.config.prediction_type == "epsilon":
            x0 = (sample - (1 - abar_t) ** 0.5 * model_output) / abar_t**0.5
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        eps = (sample - abar_t**0.5 * x0) / (1 - abar_t) ** 0.5
        std = 0.0
        if eta:
            std = eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)) ** 0.5
        x_s = abar_s**0.5 * x0 + (1 - abar_s - std**2) ** 0.5 * eps
        if std:
            if variance_noise is None:
                variance_noise = randn_tensor(x_s.shape, generator, x_s.device, x_s.dtype)
            x_s = x_s + std * variance_noise
        return DDIMSchedulerOutput(x_s, x0) if return_dict else (x_s, x0)


def _betas(config: Any) -> np.ndarray:
    """beta_t in float64 for a config of `DDPMScheduler`."""
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.asarray(config.trained_betas, np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, steps, dtype=np.float64)
    if config.beta_schedule == "squaredcos_cap_v2":
        # abar(t) = cos^2((t / T + 0.008) / 1.008 pi / 2), Nichol & Dhariwal 2021, eq. 17
        abar = [cos((t / steps + 0.008) / 1.008 * pi / 2) ** 2 for t in range(steps + 1)]
        return np.array([min(1 - abar[t + 1] / abar[t], 0.999) for t in range(steps)])
    allowed = "'linear' and 'squaredcos_cap_v2' are allowed"
    raise ValueError(f"beta_schedule is {config.beta_schedule!r}; {allowed}")

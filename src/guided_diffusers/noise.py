"""How noisy a scheduler's sample is, and what the network's output means at that noise level.

    sample  = alpha * x0 + sigma * eps        in the scheduler's own space: variance preserving, alpha = 1, flow, ...
    x0_pred = a * sample + b * output         whatever the network predicts

Everything else in this package uses these two lines, and nothing else knows which scheduler runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin

#: their config says what the network predicts, and a step takes the sample that `add_noise` makes at its timestep
ORDINARY = {
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
}
FLOW = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
}
EDM = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"}
FIXED = {
    "IPNDMScheduler": "v_prediction",
    "SCMScheduler": "trigflow",
    "CMStochasticIterativeScheduler": "consistency",
    "DDPMWuerstchenScheduler": "epsilon",
}
MID_SIGMA = {"KDPM2DiscreteScheduler": 0, "KDPM2AncestralDiscreteScheduler": 1}
TERMINAL_TIMESTEP = {"DDPMWuerstchenScheduler", "SCMScheduler"}
_DISCRETE = "it is for discrete tokens, which have no score"
_OWN_LOOP = "it needs a loop of its own, with corrector steps"
OUT_OF_REACH = {
    "DDIMInverseScheduler": "its sample is one step behind its timestep",
    "DPMSolverMultistepInverseScheduler": "it adds noise, so there is no x0 to guide",
    "ConsistencyDecoderScheduler": "it is part of a decoder, not a sampler of images",
    "HeliosScheduler": "its stages change the sample's size between steps",
    "HeliosDMDScheduler": "its stages change the sample's size between steps",
    "PiflowScheduler": "its network gives a policy for several steps, not a prediction",
    "ScoreSdeVeScheduler": _OWN_LOOP,
    "KarrasVeScheduler": _OWN_LOOP,
    "RePaintScheduler": "it needs a mask and an image in every step",
    "RFD4ProteinaScheduler": "its samples are protein structures",
    "MiniMaxH3Scheduler": "it runs two modalities with a schedule each",
    "VQDiffusionScheduler": _DISCRETE,
    "AmusedScheduler": _DISCRETE,
    "DiscreteDDIMScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "EntropyBoundScheduler": _DISCRETE,
}


def is_instance_by_name(scheduler: SchedulerMixin, names: Any) -> str | None:
    """The name of the scheduler's class, or of the class it extends, that is in `names`."""
    return next((cls.__name__ for cls in type(scheduler).__mro__ if cls.__name__ in names), None)


def is_ordinary(scheduler: SchedulerMixin) -> bool:
    """Whether nothing here is needed for the scheduler."""
    return bool(is_instance_by_name(scheduler, ORDINARY)) and not scheduler.config.get(
        "use_flow_sigmas"
    )


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether its samples are alpha = 1 - sigma."""
    return bool(is_instance_by_name(scheduler, FLOW) or scheduler.config.get("use_flow_sigmas"))


def has_custom_step(scheduler: SchedulerMixin) -> bool:
    """Whether its step takes something else than (output, timestep, sample, eta, generator)."""
    takes = inspect.signature(scheduler.step).parameters.keys()
    return bool(
        is_instance_by_name(scheduler, {"DPMSolverSDEScheduler", "DDPMWuerstchenScheduler"})
        or takes & {"old_pred_original_sample", "prev_timestep"}
    )


def check_supported(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that guidance can't work with.

    Raises:
        ValueError: for one; the message says why.
    """
    if name := is_instance_by_name(scheduler, OUT_OF_REACH):
        raise ValueError(f"scheduler {name} can't be guided: {OUT_OF_REACH[name]}")
    tells = is_flow(scheduler) or is_instance_by_name(scheduler, {"IPNDMScheduler", "SCMScheduler"})
    if not tells and not callable(getattr(scheduler, "add_noise", None)):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} has no add_noise, so its noise level can't be read"
        )


def rare_affine(
    prediction: str,
    alpha: float,
    sigma: float,
    sigma_data: float,
    sigma_min: float,
) -> tuple[float, float]:
    """(a, b) of `x0_pred = a * sample + b * output` of networks that ordinary schedulers don't know.

    Args:
        prediction: score | edm_epsilon, edm_v_prediction (Karras et al. 2022, Table 1) | consistency (Song et al. 2023,
            eq. 5, as Diffusers has it) | trigflow (Lu & Song 2024, eq. 3).
        sigma_data, sigma_min: the constants of the last four.
    """
    edm = sqrt(sigma**2 + sigma_data**2)
    match prediction:
        case "score":
            return 1 / alpha, sigma**2 / alpha
        case "edm_epsilon":
            return sigma_data**2 / edm**2, sigma * sigma_data / edm
        case "edm_v_prediction":
            return sigma_data**2 / edm**2, -sigma * sigma_data / edm
        case "consistency":
            return sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2), (
                sigma - sigma_min
            ) * sigma_data / edm
        case "trigflow":
            return alpha, -sigma / sigma_data
    raise ValueError(
        f"prediction {prediction!r} is not one of epsilon, sample, v_prediction, flow, data_flow, score, "
        "edm_epsilon, edm_v_prediction, consistency, trigflow"
    )


def custom_step_fn(
    scheduler: SchedulerMixin,
    schedule: torch.Tensor,
    options: Mapping[str, Any],
    generator: torch.Generator | list[torch.Generator] | None,
    batch_size: int,
) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
    """(output, index, sample) -> the next sample."""
    takes = inspect.signature(scheduler.step).parameters
    if is_instance_by_name(scheduler, {"DPMSolverSDEScheduler"}):  # draws for itself, from a seed
        each = (
            generator
            if isinstance(generator, list)
            else [generator]
            if generator is not None
            else []
        )
        seeds = [torch.randint(2**62, (), generator=one, device=one.device).item() for one in each]
        own = scheduler.config.noise_sampler_seed
        scheduler.noise_sampler_seed = (
            seeds if isinstance(generator, list) else seeds[0] if seeds else own
        )
    wants_batched_timestep = is_instance_by_name(scheduler, {"DDPMWuerstchenScheduler"})
    previous_x0 = None

    def step(output: torch.Tensor, index: int, sample: torch.Tensor) -> torch.Tensor:
        nonlocal previous_x0
        t, next_t = schedule[index], schedule[index + 1] if index + 1 < len(schedule) else None
        if (
            "old_pred_original_sample" in takes
        ):  # CogVideoX's DPM solver leaves its memory to the caller
            back = schedule[index - 1] if index else None
            sample, previous_x0 = scheduler.step(
                output, previous_x0, t, back, sample, **options, return_dict=False
            )
            return sample
        more = {"prev_timestep": next_t} if "prev_timestep" in takes else {}
        t = t.expand(batch_size) if wants_batched_timestep else t
        return scheduler.step(output, t, sample, **options, **more, return_dict=False)[0]

    return step


#: alpha = 0 (zero terminal SNR, the first step of flow matching) is read as Diffusers' sigma-based schedulers read it.
SMALLEST_ALPHA = 2.0**-24


@dataclass(frozen=True)
class NoiseLevel:
    """A step's `sample = alpha * x0 + sigma * eps` and `x0_pred = a * sample + b * output`, as plain floats."""

    alpha: float
    sigma: float
    a: float
    b: float

    def x0(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The predicted x0 of a network's output, in the sample's dtype: in much noise it is a small difference."""
        return self.a * sample + self.b * output.to(sample.dtype)

    def output(self, sample: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """The network's output that predicts `x0`."""
        return (x0 - self.a * sample) / self.b

    def clipped(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The network's output that predicts the x0 of `output` clipped to [-1, 1]."""
        wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
        return (
            self.output(wide, self.x0(wide, output).clamp(-1, 1)).to(output.dtype)
            if self.b
            else output
        )

    def score(self, sample: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """The score grad log p(sample) that predicts `x0`: (alpha x0 - sample) / sigma^2 (Tweedie)."""
        return (self.alpha * x0 - sample) / self.sigma**2

    def score_shift(self, x0_shift: torch.Tensor) -> torch.Tensor:
        """What the score moves by where the predicted x0 does by `x0_shift`: alpha / sigma^2 x0_shift."""
        return self.alpha / self.sigma**2 * x0_shift

    def corrected(self, output: torch.Tensor, score_shift: torch.Tensor) -> torch.Tensor:
        """The output whose score is `score_shift` larger: `output + (sigma^2 / alpha) / b * score_shift`.

        By Tweedie's formula a score shift g moves the predicted x0 by sigma^2 / alpha * g. For a network that predicts
        epsilon this is `output - sigma * g`, Algorithm 2 of Dhariwal & Nichol 2021.
        """
        if (
            self.sigma == 0 or self.b == 0
        ):  # no noise, or a consistency model's boundary: the output has no say
            return output
        return output + (self.sigma**2 / self.alpha / self.b * score_shift).to(output.dtype)


def x0_coefficients(
    prediction: str,
    alpha: float,
    sigma: float,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
) -> tuple[float, float]:
    """(a, b) of `x0_pred = a * sample + b * output`: the one table of what networks predict.

    Args:
        prediction: epsilon | sample | v_prediction (of the variance-preserving input, Salimans & Ho 2022) |
            flow (noise - data) | data_flow (data - noise) | one of `rare_affine`.
        sigma_data, sigma_min: constants of the latter.
    """
    match prediction:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "sample":
            return 0.0, 1.0
        case "v_prediction":
            return alpha / (alpha**2 + sigma**2), -sigma / hypot(alpha, sigma)
        case "flow":
            return 1.0, -sigma
        case "data_flow":
            return 1.0, sigma
    return rare_affine(prediction, alpha, sigma, sigma_data, sigma_min)


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What the scheduler takes the network's output for, in the words of `x0_coefficients`.

    Raises:
        ValueError: for a scheduler that guidance can't work with; the message says why.
    """
    check_supported(scheduler)
    prediction = scheduler.config.get("prediction_type")
    if name := is_instance_by_name(scheduler, FIXED):
        prediction = FIXED[name]
    if is_instance_by_name(scheduler, EDM):
        prediction = f"edm_{prediction}"
    if is_instance_by_name(scheduler, FLOW):
        prediction = "data_flow" if scheduler.config.get("invert_sigmas") else "flow"
    if is_flow(scheduler) and prediction == "v_prediction":
        raise ValueError(
            "scheduler: prediction_type='v_prediction' has no meaning with use_flow_sigmas=True; use "
            "'flow_prediction', 'epsilon' or 'sample'"
        )
    if is_flow(scheduler) and prediction == "flow_prediction":
        prediction = "flow"
    try:
        x0_coefficients(str(prediction), 1.0, 1.0)
    except ValueError as error:
        raise ValueError(f"scheduler {type(scheduler).__name__}: {error}") from None
    return prediction


def sampling_timesteps(scheduler: SchedulerMixin) -> torch.Tensor:
    """The timesteps of which each is one call of the network, after `scheduler.set_timesteps`."""
    if is_instance_by_name(scheduler, TERMINAL_TIMESTEP):
        return scheduler.timesteps[:-1]
    return scheduler.timesteps


def noise_levels(scheduler: SchedulerMixin) -> list[NoiseLevel]:
    """The noise level of each of `sampling_timesteps`, read once after `set_timesteps`, so that no step waits for it.

    Leaves the scheduler at its first step (`set_begin_index(0)`, without which a duplicated first timestep makes
    Diffusers' schedulers start at the second).

    Raises:
        ValueError: for a scheduler that guidance can't work with, or timesteps of one's own that are no noise levels.
    """
    prediction = prediction_type(scheduler)
    constants = {
        name: scheduler.config[name]
        for name in ("sigma_data", "sigma_min")
        if name in scheduler.config
    }
    levels = []
    for index, t in enumerate(sampling_timesteps(scheduler).cpu()):
        alpha, sigma = _alpha_sigma(scheduler, index, t)
        if not (
            alpha > -1e-4 and sigma >= 0
        ):  # a sigma above 1 of a flow, NaN; SCM starts at -4e-6
            raise ValueError(
                f"timesteps, sigmas: at timestep {t:g} {type(scheduler).__name__} has no noise level "
                f"(alpha={alpha:.4g}, sigma={sigma:.4g})"
            )
        alpha = max(alpha, SMALLEST_ALPHA)
        levels.append(
            NoiseLevel(alpha, sigma, *x0_coefficients(prediction, alpha, sigma, **constants))
        )
    _begin(scheduler, 0)
    return levels


def _begin(scheduler: SchedulerMixin, index: int) -> None:
    if callable(getattr(scheduler, "set_begin_index", None)):
        scheduler.set_begin_index(index)


def _alpha_sigma(scheduler: SchedulerMixin, index: int, t: torch.Tensor) -> tuple[float, float]:
    """(alpha, sigma) of the sample that the scheduler's step number `index` gets.

    What `add_noise` does to (x0, eps) = (1, 0) and (0, 1), but where that is not what `step` assumes.
    """
    if (
        kind := is_instance_by_name(scheduler, MID_SIGMA)
    ) and index % 2:  # a step from the mid-point of DPM-Solver-2
        return 1.0, float(scheduler.sigmas_interpol[index - MID_SIGMA[kind]])
    if (
        is_instance_by_name(scheduler, {"DPMSolverSDEScheduler"}) and index % 2
    ):  # likewise, half-way in log sigma
        return 1.0, float((scheduler.sigmas[index - 1] * scheduler.sigmas[index]).sqrt())
    if is_instance_by_name(scheduler, {"IPNDMScheduler"}):
        return float(scheduler.alphas[index]), float(scheduler.betas[index])
    if is_instance_by_name(scheduler, {"SCMScheduler"}):
        return float(t.cos()), float(t.sin()) * scheduler.config.sigma_data
    if is_flow(scheduler):
        sigma = float(scheduler.sigmas[index])  # with invert_sigmas the share of data, not of noise
        return (sigma, 1 - sigma) if scheduler.config.get("invert_sigmas") else (1 - sigma, sigma)
    if is_instance_by_name(scheduler, {"SASolverScheduler"}):
        scale = sqrt(1 + float(scheduler.sigmas[index]) ** 2)
        return 1 / scale, float(scheduler.sigmas[index]) / scale
    _begin(scheduler, index)
    one, zero, t = (
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        t.reshape(1),
    )
    return scheduler.add_noise(one, zero, t).item(), scheduler.add_noise(zero, one, t).item()


def reads_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's step takes a network's learned variance along with its prediction."""
    takers = {"DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler"}
    return bool(is_instance_by_name(scheduler, takers)) and scheduler.config.variance_type in (
        "learned",
        "learned_range",
    )


def split_variance(output: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A network's output (B, C or 2C, H, W) as (prediction, learned variance or None), C = `channels` of the sample.

    Raises:
        ValueError: for any other number of channels.
    """
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance
    raise ValueError(
        f"the network gave {output.shape[1]} channels for a sample of {channels}; {channels} or, with a "
        f"learned variance, {2 * channels} are allowed"
    )


def has_posterior_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's step is an ancestral one, N(mean, Sigma), whose mean guidance can shift."""
    return bool(is_instance_by_name(scheduler, {"DDPMScheduler", "DDPMParallelScheduler"}))


def step_variances(alpha_bar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(beta_t, small_t) of the steps t -> s of a DDPM process, from abar of its timesteps, rising, in float64:

        beta_t = 1 - abar_t / abar_s,    small_t = beta_t (1 - abar_s) / (1 - abar_t),    the posterior's variance

    The step to the data, abar_s = 1, draws no noise: its small_t would be 0 and gets the value of the step before, so
    that it has a logarithm, as in the code of Dhariwal & Nichol 2021 (`DDPMScheduler` has 1e-20).
    """
    alpha_bar = alpha_bar.double()
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    small = beta * (1 - before) / (1 - alpha_bar)
    small[0] = small[1] if len(small) > 1 else 1e-20
    return beta, small


def log_variance(
    variance_type: str,
    beta: torch.Tensor,
    small: torch.Tensor,
    to_data: torch.Tensor | bool,
    learned: torch.Tensor | None,
) -> torch.Tensor:
    """log Sigma of DDPM steps with these `step_variances`:

        fixed_small  log small_t;    fixed_large  log beta_t, but log small_t in the step `to_data`;
        learned_range  w log beta_t + (1 - w) log small_t, w = (v + 1) / 2    (Nichol & Dhariwal 2021, eq. 15)

    Raises:
        ValueError: for another `variance_type`.
    """
    match variance_type:
        case "fixed_small" | "fixed_small_log":
            return small.log()
        case "fixed_large" | "fixed_large_log":
            return torch.where(torch.as_tensor(to_data, device=beta.device), small, beta).log()
        case "learned_range":
            weight = (learned.to(torch.promote_types(learned.dtype, torch.float32)) + 1) / 2
            return weight * beta.log() + (1 - weight) * small.log()
    raise ValueError(
        f"variance_type {variance_type!r}: fixed_small, fixed_large and learned_range are allowed"
    )


def posterior_variance(
    scheduler: SchedulerMixin, timesteps: Sequence[int], index: int, learned: torch.Tensor | None
) -> float | torch.Tensor:
    """Sigma of DDPM's step number `index`, which guidance_algorithm="mean" multiplies the score shift by."""
    to_data, variance_type = index + 1 == len(timesteps), scheduler.config.variance_type
    if variance_type == "learned":
        return learned
    if to_data and variance_type in ("fixed_small", "fixed_small_log"):
        return 0.0
    beta, small = step_variances(scheduler.alphas_cumprod[list(timesteps[::-1])].cpu())
    step = len(timesteps) - 1 - index
    return log_variance(variance_type, beta[step], small[step], to_data, learned).exp()


def starting_sigma(scheduler: SchedulerMixin) -> Any:
    """What unit noise is multiplied by to start from, after `set_timesteps`."""
    if is_instance_by_name(scheduler, {"SCMScheduler"}):
        return scheduler.config.sigma_data
    return getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching has none, and starts at 1


def clipping_warning(scheduler: SchedulerMixin) -> str | None:
    """What to say of a scheduler whose step clips the predicted x0, or thresholds it, and goes on with the noise of the
    unclipped one; None for all others.

    Guidance moves x0 beyond that range at high noise; the two then disagree, and sneakers become shirts.
    """
    name = type(scheduler).__name__
    if name in ("DDIMScheduler", "DDIMParallelScheduler") and (
        scheduler.config.clip_sample or scheduler.config.thresholding
    ):
        return (
            f"{name} clips x0 but not the noise that goes with it, which spoils guided samples: use "
            "clip_sample=False in its config"
        )
    return None


def stepper(
    scheduler: SchedulerMixin,
    generator: torch.Generator | list[torch.Generator] | None,
    eta: float,
    batch_size: int,
) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
    """(output, index, sample) -> the next sample: `scheduler.step` with the arguments that this one takes.

    Raises:
        ValueError: for an `eta` that it doesn't take.
    """
    schedule, takes = sampling_timesteps(scheduler), inspect.signature(scheduler.step).parameters
    if not 0 <= eta <= ("eta" in takes):
        raise ValueError(
            f"eta={eta}: {type(scheduler).__name__} allows {'0 to 1' if 'eta' in takes else 'only 0'}"
        )
    options = {
        name: value for name, value in (("eta", eta), ("generator", generator)) if name in takes
    }
    if has_custom_step(scheduler):
        return custom_step_fn(scheduler, schedule, options, generator, batch_size)

    def step(output: torch.Tensor, index: int, sample: torch.Tensor) -> torch.Tensor:
        return scheduler.step(output, schedule[index], sample, **options, return_dict=False)[0]

    return step


def module_config(module: torch.nn.Module | None) -> Mapping[str, Any]:
    """A module's `config` as a mapping, be it a mapping or an object; empty where there is none."""
    config = getattr(module, "config", None)
    return (
        config
        if isinstance(config, Mapping)
        else vars(config)
        if hasattr(config, "__dict__")
        else {}
    )


def schedule_config(module: torch.nn.Module) -> Mapping[str, Any]:
    """The noise schedule in a classifier's config, in `DDPMScheduler`'s words.

    Raises:
        ValueError: if the module has no config or the config no `num_train_timesteps`.
    """
    config = module_config(module)
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
    found = {name: config[name] for name in names if config.get(name) is not None}
    if "num_train_timesteps" not in found or not {"beta_schedule", "trained_betas"} & found.keys():
        raise ValueError(
            f"classifier {type(module).__name__}: its config must hold the noise schedule that it was "
            f"trained with (num_train_timesteps, beta_schedule, ...); it has {sorted(config)}"
        )
    return found


class TrainedSchedule:
    """The variance-preserving schedule that a classifier was trained with: z_t = alpha_t x0 + sigma_t eps.

    Args:
        config: `num_train_timesteps`, `beta_schedule`, `beta_start`, `beta_end`, `trained_betas` of `DDPMScheduler`.
    """

    def __init__(self, config: Mapping[str, Any]):
        betas = DDPMScheduler(
            **config
        ).betas.double()  # the products in float64: float32 loses digits of 1 - alpha_bar
        alpha_bar = torch.cumprod(1 - betas, 0).clamp(min=SMALLEST_ALPHA**2).numpy()
        self.log_ratio = 0.5 * (
            np.log1p(-alpha_bar) - np.log(alpha_bar)
        )  # log(sigma_t / alpha_t), rising

    def timestep(self, level: NoiseLevel) -> float:
        """The fractional t with `sigma_t / alpha_t` of `level`, clamped to the noise levels trained on."""
        if level.sigma == 0:
            return 0.0
        t = float(
            np.interp(
                np.log(level.sigma / level.alpha), self.log_ratio, np.arange(len(self.log_ratio))
            )
        )
        return (
            float(round(t)) if abs(t - round(t)) < 2e-3 else t
        )  # schedulers' float32 tables are no better

    def extrapolation_scale(self, level: NoiseLevel) -> float:
        """By how much a score is scaled: 1, or less where `level` is noisier than anything trained on.

        There the classifier is asked at its noisiest level (alpha_T, sigma_T), and what it moves the predicted x0 by,
        sigma^2 / alpha * score, is kept: an exact classifier's converges as the noise grows.
        """
        if level.sigma == 0:
            return 1.0
        # sigma^2 / (alpha |(alpha, sigma)|) is sigma^2 / alpha of the variance-preserving sample, up to the chain rule
        log_excess = np.log(level.sigma / level.alpha) - self.log_ratio[-1]
        if log_excess <= 1e-4:  # its own noisiest level, up to the rounding of float32 tables
            return 1.0
        here, last = level.sigma / level.alpha, np.exp(self.log_ratio[-1])
        return float(last * last / sqrt(1 + last * last) / (here * here / sqrt(1 + here * here)))

"""Losses of diffusion training and flow matching, bits per dimension, and sampling of timesteps.

Ho et al., Denoising Diffusion Probabilistic Models (2020); Nichol & Dhariwal, Improved Denoising
Diffusion Probabilistic Models (2021). Everything is per image, (B,), and equals OpenAI's
guided-diffusion.

    process = Process(scheduler)                                       # variance_type="learned_range"
    k = torch.randint(len(process), (len(x0),))
    output = unet(process.noised(x0, eps, k), process.timesteps[k]).sample
    loss = diffusion_loss(process, output, x0, eps, k, "hybrid_rescaled")["loss"].mean()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, pi, sqrt
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..noise import log_variance, split_variance, step_variances, x0_coefficients
from .batches import StepRandom

if TYPE_CHECKING:
    from accelerate import Accelerator

Objective = Literal["simple", "hybrid", "hybrid_rescaled", "bound"]
HALF_BIN = 1 / 255  # of a pixel value in [-1, 1]


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) as (B, 1, ..., 1), to be broadcast over `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Process:
    """A scheduler's noise process q and the model's reverse process p, from step k to k - 1.

        q(x_t | x0) = N(alpha x0, sigma^2)                                        (Ho et al., eq. 4)
        q(x_s | x_t, x0) = N(c_0 x0 + c_t x_t, small)                             (eq. 7)

    Args:
        scheduler: its betas, `prediction_type` and `variance_type`: "learned_range", or a fixed one.
        timesteps: those of a shorter process; None: all. Step k, 0 <= k < T, has the k-th smallest.

    Raises:
        ValueError: for prediction type epsilon with zero terminal SNR (alpha = 0), where eps doesn't
            determine x0.
    """

    def __init__(self, scheduler: DDPMScheduler, timesteps: Sequence[int] | None = None):
        self.prediction_type = scheduler.config.prediction_type
        self.variance_type = scheduler.config.variance_type
        count = scheduler.config.num_train_timesteps
        self.timesteps = torch.tensor(sorted(range(count) if timesteps is None else timesteps))
        alpha_bar = torch.cumprod(1 - scheduler.betas.double().cpu(), 0)[self.timesteps]
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta, small = step_variances(alpha_bar)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.prediction_type == "epsilon" and not alpha.all():
            raise ValueError(
                "prediction_type 'epsilon': the schedule has zero terminal SNR "
                "(rescale_betas_zero_snr), where eps doesn't determine x0; v_prediction and sample "
                "are allowed"
            )
        levels = zip(alpha.tolist(), sigma.tolist(), strict=True)
        coefficients = [x0_coefficients(self.prediction_type, *level) for level in levels]
        a, b = torch.tensor(coefficients, dtype=torch.float64).T
        c_0 = before.sqrt() * beta / (1 - alpha_bar)
        c_t = (alpha_bar / before).sqrt() * (1 - before) / (1 - alpha_bar)
        self._tables = {"alpha": alpha, "sigma": sigma, "snr": alpha_bar / (1 - alpha_bar)}
        self._tables |= {"a": a, "b": b, "beta": beta, "small": small, "c_0": c_0, "c_t": c_t}
        # A copy per dtype and device, so that no training step waits for it.
        self._placed: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, k: Tensor, like: Tensor, *names: str) -> list[Tensor]:
        """Coefficients of the steps k (B,), in the dtype of `like` and broadcast over its shape."""
        k, values = k.to(like.device), []
        for name in names:
            if (key := (name, like.dtype, like.device)) not in self._placed:
                self._placed[key] = self._tables[name].to(like.dtype).to(like.device)
            values.append(per_image(self._placed[key][k], like))
        return values

    def noised(self, x0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps."""
        alpha, sigma = self.at(k, x0, "alpha", "sigma")
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        """The model's target: eps, x0, or v = alpha eps - sigma x0."""
        if self.prediction_type == "v_prediction":
            alpha, sigma = self.at(k, x0, "alpha", "sigma")
            return alpha * eps - sigma * x0
        return {"epsilon": eps, "sample": x0}[self.prediction_type]

    def denoised(self, prediction: Tensor, x_t: Tensor, k: Tensor, clip: bool = False) -> Tensor:
        """The predicted x0; with `clip` clipped to [-1, 1]."""
        a, b = self.at(k, x_t, "a", "b")
        x0 = a * x_t + b * prediction
        return x0.clamp(-1, 1) if clip else x0

    def mean(self, x0: Tensor, x_t: Tensor, k: Tensor) -> Tensor:
        """The mean of q(x_s | x_t, x0), and with the predicted x0 that of p(x_s | x_t)."""
        c_0, c_t = self.at(k, x_t, "c_0", "c_t")
        return c_0 * x0 + c_t * x_t

    def log_variance(self, learned: Tensor | None, like: Tensor, k: Tensor) -> Tensor:
        """Log variance of p(x_s | x_t); `learned` is the second half of the model's output."""
        beta, small = self.at(k, like, "beta", "small")
        first = per_image((k == 0).to(like.device), like)
        return log_variance(self.variance_type, beta, small, first, learned)


class FlowProcess:
    """Straight paths from data (s = 0) to noise (s = 1), and their velocity:

        x_s = (1 - s) x0 + s eps,    target = eps - x0

    Lipman et al., Flow Matching for Generative Modeling (2023), eq. 22 and 23 with sigma_min = 0 and
    time reversed; Liu et al., Flow Straight and Fast (2023), eq. 1. A timestep is T s, as in
    `FlowMatchEulerDiscreteScheduler`.

    Args:
        scheduler: its T = `num_train_timesteps` and its `shift`.
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler):
        self.steps, self.shift = scheduler.config.num_train_timesteps, scheduler.config.shift

    def timesteps(self, u: Tensor) -> Tensor:
        """T s of u in [0, 1]: s = shift u / (1 + (shift - 1) u), as in sampling.

        A shift above 1 is for large images, whose content needs more noise to vanish (Esser et al.,
        Scaling Rectified Flow Transformers, 2024, eq. 23).
        """
        return self.steps * self.shift * u / (1 + (self.shift - 1) * u)

    def noised(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """x_s."""
        s = per_image(timesteps.to(x0) / self.steps, x0)
        return (1 - s) * x0 + s * eps

    def target(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """eps - x0."""
        return eps - x0


def min_snr_weights(process: Process, k: Tensor, like: Tensor, gamma: float = 5.0) -> Tensor:
    """Weights (B,) of the mean squared errors at steps k, with SNR = alpha^2 / sigma^2:

        x0    min(SNR, gamma);    eps    min(SNR, gamma) / SNR;    v    min(SNR, gamma) / (SNR + 1)

    All three give the same loss of the predicted x0. Hang et al., Efficient Diffusion Training via
    Min-SNR Weighting Strategy (2023). `like` (B, C, H, W) decides the dtype and device.
    """
    snr = process.at(k, like, "snr")[0].flatten()
    divisors = {"sample": 1, "epsilon": snr, "v_prediction": snr + 1}
    return snr.clamp(max=gamma) / divisors[process.prediction_type]


def diffusion_loss(
    process: Process | FlowProcess,
    output: Tensor,
    x0: Tensor,
    eps: Tensor,
    k: Tensor,
    objective: Objective = "simple",
    snr_gamma: float | None = None,
) -> dict[str, Tensor]:
    """The loss of a model's output at `process.noised(x0, eps, k)`, and its parts, each (B,).

    Args:
        output: (B, C, H, W), or with a learned variance (B, 2C, H, W).
        x0, eps: images in [-1, 1] and standard normal noise, (B, C, H, W).
        k: steps of the process, (B,); of a `FlowProcess` timesteps, and objective is "simple".
        objective: "simple": `mse` of the target (Ho et al., eq. 14). "hybrid": mse + vb, where `vb`
            is `variational_bound` and trains the variance only (Nichol & Dhariwal, eq. 16);
            "hybrid_rescaled": vb times T / 1000, as the published models. "bound": T * vb alone.
        snr_gamma: gamma of `min_snr_weights`, which weight the `mse` in `loss`; None: off.

    Raises:
        ValueError: if the output's channels or the process don't fit the objective, or it is unknown.
    """
    prediction, learned = split_variance(output, x0.shape[1])
    hybrid, kind = objective in ("hybrid", "hybrid_rescaled"), "no" if learned is None else "a"
    refusal = None
    if isinstance(process, FlowProcess) and (objective != "simple" or snr_gamma is not None):
        refusal = f", snr_gamma {snr_gamma}: flow matching allows 'simple' and None"
    elif objective not in get_args(Objective):
        refusal = ": simple, hybrid, hybrid_rescaled and bound are allowed"
    elif objective == "bound" and snr_gamma is not None:
        refusal = f" has no mse to weight; snr_gamma {snr_gamma}: None is allowed"
    elif objective != "bound" and hybrid != (learned is not None):
        refusal = f": the model has {kind} learned variance, which hybrid needs and simple excludes"
    if refusal:
        raise ValueError(f"objective {objective!r}{refusal}")
    if objective == "bound":
        vb = variational_bound(process, output, x0, process.noised(x0, eps, k), k)
        return {"loss": len(process) * vb, "vb": vb}
    mse = (process.target(x0, eps, k) - prediction).square().flatten(1).mean(1)
    weighted = mse if snr_gamma is None else min_snr_weights(process, k, x0, snr_gamma) * mse
    if not hybrid:
        return {"loss": weighted, "mse": mse}
    fixed_mean = torch.cat([prediction.detach(), learned], dim=1)
    vb = variational_bound(process, fixed_mean, x0, process.noised(x0, eps, k), k)
    vb = vb * len(process) / 1000 if objective == "hybrid_rescaled" else vb
    return {"loss": weighted + vb, "mse": mse, "vb": vb}


def variational_bound(
    process: Process, output: Tensor, x0: Tensor, x_t: Tensor, k: Tensor, clip: bool = False
) -> Tensor:
    """A step's term of the bound on -log p(x0), (B,), in bits per dimension (Ho et al., eq. 5):

        KL(q(x_s | x_t, x0) || p(x_s | x_t)),    for k = 0 -log p(x0 | x_1) of 256 pixel values.

    With `clip`, the predicted x0 is clipped first.
    """
    prediction, learned = split_variance(output, x0.shape[1])
    predicted = process.mean(process.denoised(prediction, x_t, k, clip), x_t, k)
    log_sigma2 = process.log_variance(learned, x_t, k).expand_as(x_t)
    (small,) = process.at(k, x_t, "small")
    kl = normal_kl(process.mean(x0, x_t, k), small.log(), predicted, log_sigma2)
    decoder = -discretized_log_likelihood(x0, predicted, 0.5 * log_sigma2)
    first = per_image((k == 0).to(x0.device), x0)
    return torch.where(first, decoder, kl).flatten(1).mean(1) / log(2)


def normal_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)) of every element, in nats."""
    ratio = log_variance - other_log_variance
    return 0.5 * (
        -1 - ratio + ratio.exp() + (mean - other_mean).square() * (-other_log_variance).exp()
    )


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """Log of a Gaussian's mass in the bin of x, of 256 values in [-1, 1], the outer two open, in nats.

    Ho et al., eq. 13. The distribution function is approximated by tanh, as in GELU's paper and the
    published code.
    """

    def normal_cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))

    upper = normal_cdf((x - mean + HALF_BIN) * (-log_sigma).exp())
    lower = normal_cdf((x - mean - HALF_BIN) * (-log_sigma).exp())
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


@torch.no_grad()
def bits_per_dim(
    network: torch.nn.Module,
    process: Process,
    x0: Tensor,
    class_labels: Tensor | None = None,
    clip: bool = True,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> dict[str, Tensor]:
    """The variational bound on -log2 p(x0) per dimension, by T evaluations of the model.

    That of a dataset is the mean of `total` over its images.

    Args:
        network: (x_t, timestep[, class_labels]) -> `.sample`.
        x0: images in [-1, 1] on the grid of 256 values, (B, C, H, W).
        class_labels: ids (B,), integers of any type.
        clip: whether the predicted x0 is clipped to [-1, 1].
        generator: of the noise; one, or one per image.

    Returns:
        `total` (B,) = sum of `bound` + `prior`; `prior` (B,) = KL(q(x_T | x0) || N(0, I)); and for
        every step k, (B, T): `bound`, `x0_mse` (of the predicted x0) and `eps_mse`.

    Raises:
        ValueError: for labels that aren't integers.
    """
    if class_labels is not None and (class_labels.is_floating_point() or class_labels.is_complex()):
        raise ValueError(f"class_labels are {class_labels.dtype}; ids, integers, are allowed")
    # In float64, since differences of the distribution function lose three digits in float32.
    wide = x0 if x0.device.type == "mps" else x0.double()
    dtype = next((p.dtype for p in network.parameters()), x0.dtype)
    labels = {} if class_labels is None else {"class_labels": class_labels.long()}
    columns: dict[str, list[Tensor]] = {"bound": [], "x0_mse": [], "eps_mse": []}
    for step in reversed(range(len(process))):
        k = torch.full((len(x0),), step)
        eps = randn_tensor(x0.shape, generator, x0.device, x0.dtype).to(wide)
        x_t = process.noised(wide, eps, k)
        t = process.timesteps[k].to(x0.device)
        output = network(x_t.to(dtype), t, **labels).sample.to(wide)
        predicted = process.denoised(split_variance(output, x0.shape[1])[0], x_t, k, clip)
        alpha, sigma = process.at(k, x_t, "alpha", "sigma")
        eps_error = (x_t - alpha * predicted) / sigma - eps
        columns["bound"].append(variational_bound(process, output, wide, x_t, k, clip))
        columns["x0_mse"].append((predicted - wide).square().flatten(1).mean(1))
        columns["eps_mse"].append(eps_error.square().flatten(1).mean(1))
    result = {name: torch.stack(terms[::-1], dim=1) for name, terms in columns.items()}
    alpha, sigma = process.at(torch.full((len(x0),), len(process) - 1), wide, "alpha", "sigma")
    zero = torch.zeros_like(wide)
    prior = normal_kl(alpha * wide, 2 * sigma.log(), zero, zero).flatten(1).mean(1)
    result["prior"] = prior / log(2)
    return result | {"total": result["bound"].sum(dim=1) + result["prior"]}


class LossSecondMomentSampler:
    """Samples steps k with p_k proportional to sqrt(E[loss_k^2]), once every step has a full history.

    Nichol & Dhariwal 2021, eq. 18. The importance weights 1 / (T p_k) keep the expected loss equal to
    that of uniform sampling.

    Args:
        steps: T.
        history: number of latest losses of each step that are kept.
        uniform: share of uniform samples, so that no step is never sampled.
    """

    def __init__(self, steps: int, history: int = 10, uniform: float = 0.001):
        self.uniform = uniform
        self._losses = torch.zeros(steps, history, dtype=torch.float64)
        self._counts = torch.zeros(steps, dtype=torch.long)

    def probabilities(self) -> Tensor:
        """p_k, (T,), float64."""
        steps, history = self._losses.shape
        if (self._counts < history).any():
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        moment = self._losses.square().mean(dim=1).sqrt()
        return moment / moment.sum() * (1 - self.uniform) + self.uniform / steps

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Steps (count,) and their importance weights."""
        p = self.probabilities()
        k = torch.multinomial(p, count, replacement=True, generator=generator)
        return k, (1 / (len(p) * p[k])).float()

    def update(self, k: Tensor, losses: Tensor) -> None:
        """Add losses of steps, both (B,), of all processes and in the same order on each."""
        for step, loss in zip(k.tolist(), losses.tolist(), strict=True):
            if self._counts[step] == self._losses.shape[1]:
                self._losses[step] = self._losses[step].roll(-1)
            else:
                self._counts[step] += 1
            self._losses[step, self._counts[step] - 1] = loss

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self._losses, "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()


def draw_steps(
    draws: StepRandom, steps: int, sampler: LossSecondMomentSampler | None
) -> tuple[Tensor, Tensor | None]:
    """Steps k (B,) of this process's images, and importance weights; without a sampler uniform, None."""
    if sampler is None:
        return draws.randint(steps), None
    k, weight = sampler.sample(draws.total, draws.generator)
    return draws.local(k), draws.local(weight)


def weighted_mean(
    losses: Tensor,
    k: Tensor,
    weight: Tensor | None,
    sampler: LossSecondMomentSampler | None,
    accelerator: Accelerator,
) -> Tensor:
    """Mean of losses (B,) with the weights of `draw_steps`; adds them to the sampler's history."""
    if sampler is None:
        return losses.mean()
    sampler.update(*accelerator.gather((k, losses.detach())))
    return (weight * losses).mean()

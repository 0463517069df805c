"""Which distribution does guidance sample? Mixtures whose p(x) p(y|x)^w is known, in one and two dimensions.

    python examples/benchmarks/powers.py                      # about ten minutes on two cores
    python examples/benchmarks/powers.py --samples 2000 --training-steps 1000 --output out/powers.json

Rows: the gradient of the exact classifier times w (linear); that of E[p(y|x0)^w | x_t], as a small network learns it
with `power_losses`; populations of particles at power 1 (the exact classifier) and at the other
powers (the learned one). The diffusion network is exact throughout. Numbers are Wasserstein-1 distances between
samples and exact draws of p(x) p(y|x)^w, sliced in two dimensions (the mean over 64 directions), in units of the
data, whose standard deviation is about 2.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor, nn
from tqdm.auto import tqdm

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.files import write_json
from guided_diffusers.learning.classifier_losses import power_losses

POWERS, MAX_POWER, STEPS, PARTICLES = (1.0, 3.0, 8.0), 8.0, 25, (4, 16, 64)
BETAS = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
#: {name: (label, share, mean, standard deviation) of each Gaussian}; the label to steer to is 0
MIXTURES = {
    "1-D": [(0, 0.35, [0.0], 0.8), (0, 0.15, [-4.0], 0.5), (1, 0.5, [1.5], 0.8)],
    "2-D": [
        (0, 0.35, [0.0, 0.0], 0.8),
        (0, 0.10, [-4.0, 1.8], 0.5),
        (1, 0.30, [1.6, 0.4], 0.8),
        (2, 0.25, [0.6, -1.8], 0.8),
    ],
}
SOLVERS: dict[str, SchedulerMixin] = {
    "DDIM": DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"),
    "SDE-DPM-Solver++": DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", solver_order=2, use_lu_lambdas=True
    ),
}


class Mixture:
    """Gaussians of labels: p(x) = sum_k share_k N(mean_k, std_k^2), float64."""

    def __init__(self, parts: list[tuple[int, float, list[float], float]]):
        labels, shares, means, stds = zip(*parts, strict=True)
        self.labels, self.means = torch.tensor(labels), torch.tensor(means, dtype=torch.float64)
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64)
        self.classes, self.dims = len(set(labels)), self.means.shape[1]

    def log_parts(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log share_k N(x; alpha mean_k, alpha^2 std_k^2 + sigma^2), (B, parts)."""
        variance = (alpha * self.stds) ** 2 + sigma**2
        squares = ((x[:, None] - alpha[..., None] * self.means) ** 2).sum(dim=-1)
        constant = self.shares.log() - self.dims / 2 * (2 * math.pi * variance).log()
        return constant - squares / (2 * variance)

    def log_labels(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(y | x_t), (B, classes)."""
        parts = self.log_parts(x, alpha, sigma)
        rows = [parts[:, self.labels == y].logsumexp(dim=1) for y in range(self.classes)]
        return torch.stack(rows, dim=1).log_softmax(dim=1)

    def eps(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[eps | x_t] = -sigma score."""
        weights = self.log_parts(x, alpha, sigma).softmax(dim=1)
        variance = (alpha * self.stds) ** 2 + sigma**2
        scaled = (x[:, None] - alpha[..., None] * self.means) / variance[..., None]
        return sigma * (weights[..., None] * scaled).sum(dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """x0, (count, dims)."""
        k = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dims, generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * noise

    def draw_powered(self, power: float, count: int, generator: torch.Generator) -> Tensor:
        """x0 of p(x) p(0 | x)^power, by weighting a million draws."""
        x = self.draw(10**6, generator)
        log_p = self.log_labels(x, torch.ones(1, 1).double(), torch.zeros(1, 1).double())[:, 0]
        chosen = torch.multinomial(
            (power * log_p).exp(), count, replacement=True, generator=generator
        )
        return x[chosen]


class ExactNetwork(nn.Module):
    """E[eps | x_t] at a DDPM timestep, called as `UNet2DModel`; samples are (B, dims, 1, 1)."""

    def __init__(self, mixture: Mixture):
        super().__init__()
        self.mixture = mixture
        self.config = {"in_channels": mixture.dims, "sample_size": 1}
        self.alpha_bar = DDIMScheduler(**BETAS).alphas_cumprod.double()

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        alpha, sigma = coefficients(self.alpha_bar, torch.as_tensor(timestep).reshape(1))
        x = sample.double().flatten(1)
        return (self.mixture.eps(x, alpha, sigma).to(sample.dtype).reshape(sample.shape),)


def coefficients(alpha_bar: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, (B, 1), at fractional timesteps (B,): log sigma/alpha is linear between."""
    log_ratio = ((1 - alpha_bar) / alpha_bar).log() / 2
    low = t.double().floor().long().clamp(0, len(alpha_bar) - 2)
    share = t.double() - low
    ratio = torch.lerp(log_ratio[low], log_ratio[low + 1], share).exp()[:, None]
    alpha = (1 + ratio**2) ** -0.5
    return alpha, ratio * alpha


class ExactClassifier(nn.Module):
    """log p(y | x_t)."""

    def __init__(self, mixture: Mixture):
        super().__init__()
        self.mixture = mixture
        self.config = {
            **BETAS,
            "num_labels": mixture.classes,
            "problem_type": "single_label_classification",
        }
        self.alpha_bar = DDIMScheduler(**BETAS).alphas_cumprod.double()

    def forward(self, sample: Tensor, timestep: Any) -> SimpleNamespace:
        x = sample.double().flatten(1)
        t = torch.as_tensor(timestep).reshape(-1).expand(len(x))
        return SimpleNamespace(logits=self.mixture.log_labels(x, *coefficients(self.alpha_bar, t)))


class SmallClassifier(nn.Module):
    """A perceptron of (x_t, t, w) -> log odds of E[p(y|x0)^w | x_t], (B, classes)."""

    def __init__(self, mixture: Mixture, width: int = 128):
        super().__init__()
        self.config = {**ExactClassifier(mixture).config, "power_range": (1.0, MAX_POWER)}
        self.alpha_bar = DDIMScheduler(**BETAS).alphas_cumprod.double()
        layers: list[nn.Module] = [nn.Linear(mixture.dims + 3, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, mixture.classes))

    def forward(self, sample: Tensor, timestep: Any, power: Any = 1.0) -> SimpleNamespace:
        x = sample.float().flatten(1)
        t = torch.as_tensor(timestep).reshape(-1).expand(len(x))
        alpha, sigma = coefficients(self.alpha_bar, t)
        w = torch.as_tensor(power, dtype=torch.float32).reshape(-1, 1).expand(len(x), 1)
        level = torch.cat([(sigma / alpha).log() / 4, alpha, w.log()], dim=1).float()
        return SimpleNamespace(logits=self.layers(torch.cat([x, level], dim=1)))


def train(mixture: Mixture, steps: int, seed: int = 0) -> tuple[SmallClassifier, float]:
    """The small classifier after Adam, with the exact p(y | x0) as the teacher; and the seconds."""
    torch.manual_seed(seed)
    model, generator = SmallClassifier(mixture), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    one, zero, start = torch.ones(1, 1).double(), torch.zeros(1, 1).double(), time.perf_counter()
    for _ in tqdm(range(steps), desc="training", leave=False):
        x0 = mixture.draw(1024, generator)
        t = torch.randint(1000, (len(x0),), generator=generator)
        power = (torch.rand(len(x0), generator=generator) * math.log(MAX_POWER)).exp()
        alpha, sigma = coefficients(model.alpha_bar, t)
        x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        log_p = mixture.log_labels(x0, one, zero)
        loss = power_losses(model(x_t, t, power).logits, power[:, None] * log_p).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return model.eval().requires_grad_(False), time.perf_counter() - start


def wasserstein(x: Tensor, y: Tensor) -> float:
    """Wasserstein-1 distance of samples (N, dims), sliced if dims > 1."""
    angles = torch.arange(64, dtype=torch.float64) * math.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()]) if x.shape[1] > 1 else torch.ones(1, 1)
    distances = (x @ directions.to(x)).sort(dim=0)[0] - (y @ directions.to(y)).sort(dim=0)[0]
    return float(distances.abs().mean())


def rows(
    mixture: Mixture, learned: nn.Module, scheduler: SchedulerMixin, samples: int, seed: int
) -> dict[str, list[float | None]]:
    """Distances at each power, by method."""
    network, exact = ExactNetwork(mixture), ExactClassifier(mixture)

    def distance(classifier: nn.Module, power: float, **call: Any) -> float:
        pipeline = ClassifierGuidedPipeline(network, scheduler, classifier)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        output = pipeline(
            0, samples, num_inference_steps=STEPS, generator=generator, output_type="latent", **call
        )
        target = mixture.draw_powered(power, samples, torch.Generator().manual_seed(seed + 1))
        return round(wasserstein(output.images.double().flatten(1), target), 3)

    table: dict[str, list[float | None]] = {}
    table["linear scale"] = [distance(exact, w, guidance_scale=w) for w in POWERS]
    table["power, learned"] = [distance(learned, w, guidance_power=w) for w in POWERS]
    if isinstance(scheduler, DDIMScheduler):  # deterministic: no populations
        return table
    for count in PARTICLES:
        table[f"{count} particles, power 1"] = [distance(exact, 1.0, particles=count), None, None]
    for count in PARTICLES:
        table[f"{count} particles, power, learned"] = [
            distance(learned, w, guidance_power=w, particles=count) for w in POWERS
        ]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=9984, help="of a row (default: %(default)s)")
    parser.add_argument("--training-steps", type=int, default=12_000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/powers.json"), help="JSON file")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name, parts in MIXTURES.items():
        mixture = Mixture(parts)
        learned, seconds = train(mixture, options.training_steps, options.seed)
        print(f"\n{name}: trained in {seconds:.0f} s")
        floor = [
            mixture.draw_powered(w, options.samples, torch.Generator().manual_seed(k))
            for w in POWERS
            for k in (11, 12)
        ]
        floors = [round(wasserstein(floor[k], floor[k + 1]), 3) for k in (0, 2, 4)]
        results[name] = {"training seconds": round(seconds), "two exact sets": floors}
        header = f"{'':32}" + "".join(f"{f'w = {w:g}':>9}" for w in POWERS)
        print(f"{header}\n{'two sets of exact draws':32}" + "".join(f"{d:9.3f}" for d in floors))
        for solver, scheduler in SOLVERS.items():
            table = rows(mixture, learned, scheduler, options.samples, options.seed)
            results[name][solver] = table
            print(f"{solver}, {STEPS} steps")
            for method, values in table.items():
                texts = "".join(f"{'-' if v is None else f'{v:.3f}':>9}" for v in values)
                print(f"  {method:30}{texts}")
    write_json(results, options.output)


if __name__ == "__main__":
    main()

"""A mixture of two Gaussians with exact denoiser, classifier and gradients; tiny trainings on digits."""

from __future__ import annotations

import json
import os
import resource
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# the tests' tensors are small: more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# MKL's results then don't depend on where in memory a tensor starts, which bit-for-bit tests need on some processors
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from diffusers import DDPMScheduler
from helpers import CLASSIFIER, NAMES, TINY, UNET, load_script, reset_accelerate
from PIL import Image as PILImage

from guided_diffusers.noise import x0_coefficients

SHAPE = (1, 4, 4)


class Mixture:
    """Two classes, x0 | k ~ N(mean_k, std^2 I); at (alpha, sigma), x | k ~ N(alpha mean_k, (alpha std)^2 + sigma^2)."""

    def __init__(
        self,
        seed: int = 0,
        std: float = 0.3,
        prior: tuple[float, float] = (0.4, 0.6),
        shape: tuple[int, ...] = SHAPE,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.means = 0.6 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        self.std, self.prior = std, torch.tensor(prior, dtype=torch.float64)

    def log_joint(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """log p(k) p(x | k) up to a constant, (B, 2)."""
        variance = (alpha * self.std) ** 2 + sigma**2
        distance = (x.double()[:, None] - alpha * self.means).flatten(2).square().sum(-1)
        return self.prior.log() - distance / (2 * variance)

    def denoised(
        self, x: torch.Tensor, alpha: float, sigma: float, label: int | None
    ) -> torch.Tensor:
        """E[x0 | x, label], or without a label E[x0 | x]."""
        x = x.double()
        gain = alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2)
        each = self.means + gain * (x[:, None] - alpha * self.means)
        if label is not None:
            return each[:, label]
        weights = self.log_joint(x, alpha, sigma).softmax(-1)
        return (weights.reshape(*weights.shape, *[1] * (x.ndim - 1)) * each).sum(1)


class Clock:
    """(alpha, sigma) of x_t from the timestep that a network is told, written out for each kind of model."""

    def __init__(self, kind: str = "ddpm", abar: torch.Tensor | None = None, **betas: Any):
        self.kind = kind
        if kind == "ddpm":
            betas = {"beta_start": 1e-4, "beta_end": 0.02, **betas}
            abar = (
                torch.cumprod(1 - DDPMScheduler(**betas).betas.double(), 0)
                if abar is None
                else abar.double()
            )
            abar = abar.clamp(min=2.0**-48).numpy()
            self.log_ratio = 0.5 * np.log((1 - abar) / abar)

    def __call__(self, t: torch.Tensor | float) -> tuple[float, float]:
        t = float(torch.as_tensor(t).double().flatten()[0])
        match self.kind:
            case "ddpm":
                ratio = np.exp(np.interp(t, np.arange(len(self.log_ratio)), self.log_ratio))
                return 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)
            case "flow":
                return max(1 - t / 1000, 2.0**-24), t / 1000
            case "data flow":
                return max(t / 1000, 2.0**-24), 1 - t / 1000
            case "edm":  # c_noise = log(sigma) / 4
                return 1.0, np.exp(4 * t)
            case "consistency":
                return 1.0, np.exp(4 * t / 1000)
            case "cosine":  # sigma = tan(t pi / 2)
                return 1.0, np.tan(t * np.pi / 2)
            case "trigonometric":
                return np.cos(t), np.sin(t) * 0.5
            case "ipndm":
                return max(np.cos(t * np.pi / 2), 2.0**-24), np.sin(t * np.pi / 2)
            case "wuerstchen":
                abar = (
                    np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
                ) ** 2
                abar = np.clip(abar, 1e-4, 0.9999)
                return np.sqrt(abar), np.sqrt(1 - abar)
            case "ve":  # the network is told sigma itself
                return 1.0, t
        raise AssertionError(self.kind)


class OracleUNet(torch.nn.Module):
    """The exact network: (scaled sample, t) -> what it should predict, knowing nothing but its input and t.

    `sigma_data`: its input is x_t / sqrt(sigma^2 + sigma_data^2), as EDM's.
    """

    def __init__(
        self,
        mixture: Mixture,
        prediction: str,
        clock: Clock,
        label: int | None = None,
        sigma_data: float | None = None,
    ):
        super().__init__()
        self.mixture, self.prediction, self.clock, self.label = mixture, prediction, clock, label
        self.sigma_data = sigma_data
        self.anchor = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.config = SimpleNamespace(
            sample_size=tuple(mixture.means.shape[2:]),
            in_channels=mixture.means.shape[1],
            out_channels=mixture.means.shape[1],
        )
        self.calls = 0

    def forward(self, sample: torch.Tensor, t: Any, return_dict: bool = True) -> Any:
        self.calls += 1
        alpha, sigma = self.clock(t)
        x = sample.double()
        if self.sigma_data is not None:
            x = x * np.hypot(sigma, self.sigma_data)
        x0 = self.mixture.denoised(x, alpha, sigma, self.label)
        a, b = x0_coefficients(
            self.prediction,
            alpha,
            sigma,
            **({"sigma_data": self.sigma_data} if self.sigma_data else {}),
        )
        output = ((x0 - a * x) / b).to(sample.dtype)
        return SimpleNamespace(sample=output) if return_dict else (output,)


class OracleClassifier(torch.nn.Module):
    """The exact classifier: log p(k) p(z | k) at the (fractional) timestep of its own schedule."""

    def __init__(
        self,
        mixture: Mixture,
        num_labels: int = 2,
        names: dict[int, str] | None = None,
        **betas: Any,
    ):
        super().__init__()
        self.mixture, self.clock, self.calls = mixture, Clock("ddpm", **betas), 0
        self.config = {
            "num_train_timesteps": 1000,
            "beta_schedule": "linear",
            **betas,
            "num_labels": num_labels,
            "id2label": names,
        }
        self.seen: list[float] = []

    def forward(self, sample: torch.Tensor, timestep: float) -> Any:
        self.calls += 1
        self.seen.append(float(timestep))
        return SimpleNamespace(logits=self.mixture.log_joint(sample, *self.clock(timestep)))


@pytest.fixture
def mixture() -> Mixture:
    return Mixture()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full: no file of this process may become larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Digits as an image folder and as Parquet, and the configs of tiny networks."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("training")
    digits = load_digits()
    images = [
        PILImage.fromarray(image) for image in (digits.images[:60] * 255 / 16).astype(np.uint8)
    ]
    labels = digits.target[:60].tolist()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / "folder" / ("train" if i < 48 else "test") / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    features = Features(
        {
            "other": Image(),
            "digit": Image(),
            "class": ClassLabel(names=NAMES),
            "number": Value("int64"),
            "name": Value("string"),
        }
    )
    rows = {
        "other": images[::-1],
        "digit": images,
        "class": labels,
        "number": labels,
        "name": [NAMES[label] for label in labels],
    }
    data = Dataset.from_dict(rows, features=features)
    (root / "parquet").mkdir()
    for name, part in (("train", range(48)), ("dev", range(48, 60))):
        data.select(part).to_parquet(root / "parquet" / f"{name}.parquet")
    (root / "unlabelled").mkdir()
    for i in range(8):
        images[i].convert("RGB").save(root / "unlabelled" / f"{i}.png")
    for name, config in (("unet", UNET), ("classifier", CLASSIFIER)):
        (root / f"{name}.json").write_text(json.dumps({**config, "_class_name": "whatever"}))
    return SimpleNamespace(
        root=root,
        folder=root / "folder",
        parquet=root / "parquet",
        unlabelled=root / "unlabelled",
        unet=root / "unet.json",
        classifier=root / "classifier.json",
    )


@pytest.fixture
def train(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Run a script's `main` on the image folder in this process: (script, options, output folder's name) -> folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place.root / "cache"))

    def run(
        script: str,
        line: str = "",
        output: str = "out",
        data: str | None = "--train_data_dir {folder}",
    ) -> Path:
        folder = tmp_path / output
        command = f"{TINY} --cpu --model_config_name_or_path {{{script}}} {data or ''} {line} --output_dir {folder}"
        if script == "unet" and "--sample_images" not in line:
            command += " --sample_images 0"
        if script == "classifier" and "--diagnosis_images" not in line:
            command += " --diagnosis_images 0"
        monkeypatch.setattr(
            sys, "argv", [f"train_{script}.py", *shlex.split(command.format(**vars(place)))]
        )
        reset_accelerate()
        try:
            load_script(f"train_{script}").main()
        finally:
            reset_accelerate()
        return folder

    return run

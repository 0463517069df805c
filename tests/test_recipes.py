"""What a classifier learns by each loss, against the exact classifier of the closed-form mixture and its gradient."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SHAPE, Clock, Mixture, OracleUNet
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from diffusers import DDPMScheduler, UNet2DModel
from helpers import CLASSIFIER, NAMES, UNET, apart, load_script, weights
from PIL import Image as PILImage
from torch import nn
from torch.nn import functional as F

from guided_diffusers import ClassifierGuidance, ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.learning import warm_start
from guided_diffusers.learning.annotations import TargetedImages
from guided_diffusers.learning.batches import StepRandom, collate
from guided_diffusers.learning.classifier_losses import (
    METRICS,
    MULTI,
    REGRESSION,
    SINGLE,
    balanced_weights,
    gradient_matching_losses,
    held_out_scores,
    label_losses,
    log_likelihood,
    mixup,
    score_matching_losses,
    soft_labels,
    worst_case,
)
from guided_diffusers.learning.data import LabelledImages
from guided_diffusers.learning.losses import LossSecondMomentSampler

train_classifier = load_script("train_classifier")
ClassifierOptions, make_loss = train_classifier.ClassifierOptions, train_classifier.make_loss

ALPHA, SIGMA = 0.6, 0.8
DLSM = {"dlsm_weight": 1.0, "score_model": "x"}
VARIANCE = (ALPHA * 0.3) ** 2 + SIGMA**2  # of x_t given the class


class Net(nn.Module):
    """A perceptron of x_t, and of sigma, in float64."""

    def __init__(self, outputs: int = 2, width: int = 48):
        super().__init__()
        layers = [nn.Linear(17, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(width, outputs)).double()

    def forward(self, x: torch.Tensor, sigma: torch.Tensor | float = SIGMA) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x), 1)
        return self.body(torch.cat([x.flatten(1), sigma], dim=1))


def drawn(
    mixture: Mixture, count: int, generator: torch.Generator, alpha: Any = ALPHA, sigma: Any = SIGMA
) -> SimpleNamespace:
    """Labels, images, noise, and the noisy images."""
    y = torch.multinomial(mixture.prior, count, True, generator=generator)
    options = {"generator": generator, "dtype": torch.float64}
    x0 = mixture.means[y] + mixture.std * torch.randn(count, *SHAPE, **options)
    eps = torch.randn(count, *SHAPE, **options)
    return SimpleNamespace(y=y, x0=x0, eps=eps, x_t=alpha * x0 + sigma * eps)


def posterior(mixture: Mixture, x: torch.Tensor) -> torch.Tensor:
    return mixture.log_joint(x, ALPHA, SIGMA).softmax(dim=1)


def learned(
    mixture: Mixture,
    loss: Callable[[nn.Module, SimpleNamespace, torch.Generator], torch.Tensor],
    outputs: int = 2,
    steps: int = 400,
    count: int = 256,
) -> Net:
    """A net after some hundred steps on fresh images, at a rate that falls to 0."""
    torch.manual_seed(0)
    net, generator = Net(outputs), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, drawn(mixture, count, generator), generator).mean().backward()
        optimizer.step()
        schedule.step()
    return net


def held_out(mixture: Mixture, count: int = 2000) -> SimpleNamespace:
    return drawn(mixture, count, torch.Generator().manual_seed(9))


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root of the mean square."""
    return (found - exact).square().mean().sqrt().item()


# Heads, weights, soft labels: the best outputs are what the docstring says


def test_label_smoothing_learns_the_smoothed_posterior(mixture: Mixture) -> None:
    net = learned(
        mixture, lambda net, data, _: label_losses(net(data.x_t), data.y, SINGLE, None, 0.3)
    )
    x = held_out(mixture).x_t
    with torch.no_grad():
        found, exact = net(x).softmax(dim=1), posterior(mixture, x)
    assert distance(found, 0.7 * exact + 0.3 / 2) < 0.03 < 0.08 < distance(found, exact)


def test_class_weights_learn_the_posterior_of_a_weighted_prior(mixture: Mixture) -> None:
    weight = torch.tensor([5.0, 0.5], dtype=torch.float64)
    net = learned(mixture, lambda net, data, _: label_losses(net(data.x_t), data.y, SINGLE, weight))
    x = held_out(mixture).x_t
    with torch.no_grad():
        found, exact = net(x).softmax(dim=1), posterior(mixture, x)
    weighted = F.normalize(exact * weight, p=1, dim=1)
    assert distance(found, weighted) < 0.04 < 0.1 < distance(found, exact)


def test_mixup_learns_the_expected_share(mixture: Mixture) -> None:
    """E[share of label 1 | x_t] of two images mixed uniformly, by quadrature over the share."""

    def loss(net: nn.Module, data: SimpleNamespace, generator: torch.Generator) -> torch.Tensor:
        share = torch.rand(len(data.y), generator=generator)
        x0, y = mixup(data.x0, soft_labels(data.y, 2), share)
        return label_losses(net(ALPHA * x0 + SIGMA * data.eps), y)

    net, x = learned(mixture, loss), held_out(mixture, 500).x_t
    log_p, one = [], []
    for share in torch.linspace(0.005, 0.995, 100, dtype=torch.float64):
        variance = (ALPHA * mixture.std) ** 2 * (share**2 + (1 - share) ** 2) + SIGMA**2
        for i in range(2):
            for j in range(2):
                mean = ALPHA * (share * mixture.means[i] + (1 - share) * mixture.means[j])
                prior = (mixture.prior[i] * mixture.prior[j]).log()
                squares = (x - mean).flatten(1).square().sum(1)
                log_p.append(prior - 8 * variance.log() - squares / (2 * variance))
                one.append(share * i + (1 - share) * j)
    exact = (torch.stack(log_p).softmax(dim=0) * torch.stack(one)[:, None]).sum(dim=0)
    with torch.no_grad():
        found = net(x).softmax(dim=1)[:, 1]
    assert distance(found, exact) < 0.04 < 0.09 < distance(found, posterior(mixture, x)[:, 1])


def test_several_labels_learn_each_ones_probability(mixture: Mixture) -> None:
    """The second label is there in 0.9 of one class and 0.2 of the other."""

    def loss(net: nn.Module, data: SimpleNamespace, generator: torch.Generator) -> torch.Tensor:
        share = torch.where(data.y == 1, 0.9, 0.2)
        second = torch.rand(len(data.y), generator=generator) < share
        return label_losses(net(data.x_t), torch.stack([data.y, second], dim=1), MULTI)

    net, x = learned(mixture, loss), held_out(mixture).x_t
    one = posterior(mixture, x)[:, 1]
    with torch.no_grad():
        assert distance(net(x).sigmoid(), torch.stack([one, 0.2 + 0.7 * one], dim=1)) < 0.04


def test_regression_learns_the_posterior_mean(mixture: Mixture) -> None:
    """Of a pixel of x0, and of the class, in other units."""
    scale = torch.tensor([1.0, 30.0], dtype=torch.float64)

    def target(data: SimpleNamespace) -> torch.Tensor:
        return torch.stack([data.x0[:, 0, 0, 0], data.y.double()], dim=1) * scale

    variance = target(held_out(mixture)).var(dim=0)

    def loss(net: nn.Module, data: SimpleNamespace, _: torch.Generator) -> torch.Tensor:
        return label_losses(net(data.x_t) * scale, target(data), REGRESSION, variance=variance)

    net, x = learned(mixture, loss), held_out(mixture).x_t
    pixel = mixture.denoised(x, ALPHA, SIGMA, None)[:, 0, 0, 0]
    exact = torch.stack([pixel, posterior(mixture, x)[:, 1]], dim=1)
    with torch.no_grad():
        assert distance(net(x), exact) < 0.08 < 0.3 < distance(exact.mean(0), exact)


def test_balanced_weights_are_those_of_a_uniform_prior() -> None:
    counts = torch.tensor([10, 30, 60])
    weight = balanced_weights(counts, 100)
    # each class has a third of the loss
    torch.testing.assert_close(weight * counts, torch.full((3,), 100 / 3))
    torch.testing.assert_close(balanced_weights(counts, 100, MULTI) * counts, 100.0 - counts)
    message = r"counts=\[0, 3\] of 3 images: at least one image of every label"
    with pytest.raises(ValueError, match=message):
        balanced_weights(torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="and one without"):
        balanced_weights(torch.tensor([1, 3]), 3, MULTI)


def test_losses_by_hand() -> None:
    f, y = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[1.0, 0.0, 1.0]])
    p = f.sigmoid()
    by_hand = -(torch.log(p[0, 0]) + torch.log(1 - p[0, 1]) + torch.log(p[0, 2]))
    torch.testing.assert_close(label_losses(f, y, MULTI), by_hand[None] / 3)
    torch.testing.assert_close(log_likelihood(f, y, MULTI), -by_hand[None])
    smooth = label_losses(f, y, MULTI, label_smoothing=1.0)
    torch.testing.assert_close(smooth, F.softplus(f).mean(1) - f.mean(1) / 2)
    torch.testing.assert_close(log_likelihood(f, torch.tensor([2])), f.log_softmax(1)[:, 2])
    squares = label_losses(f, y, REGRESSION, variance=torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close(squares, torch.tensor([(0 + 4 / 2 + 0.25 / 4) / 3]))
    for kind, more in (
        (REGRESSION, {"label_smoothing": 0.1}),
        (REGRESSION, {"class_weights": y[0]}),
        (MULTI, {"variance": y[0]}),
        ("ranking", {}),
    ):
        with pytest.raises(ValueError, match="no effect|are allowed"):
            label_losses(f, y, kind, **more)
    with pytest.raises(ValueError, match="have a likelihood"):
        log_likelihood(f, y, REGRESSION)
    with pytest.raises(ValueError, match="even number"):
        mixup(torch.zeros(3, 1), torch.zeros(3, 2), torch.zeros(3))


def test_figures_are_scikit_learns() -> None:
    from sklearn.metrics import label_ranking_average_precision_score, r2_score

    generator = torch.Generator().manual_seed(0)
    f = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    y = (torch.rand(40, 5, generator=generator) < 0.4).double()
    found = {name: values.mean().item() for name, values in held_out_scores(f, y, MULTI).items()}
    assert tuple(found) == METRICS[MULTI]
    assert found["average_precision"] == pytest.approx(label_ranking_average_precision_score(y, f))
    assert found["accuracy"] == pytest.approx(((f > 0) == y.bool()).double().mean().item())
    z = f[:, :2] + 0.3 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
    found = held_out_scores(f[:, :2], z, REGRESSION, z.var(dim=0, unbiased=False))
    assert tuple(found) == METRICS[REGRESSION]
    assert found["r2"].mean().item() == pytest.approx(r2_score(z, f[:, :2]))


# Denoising likelihood score matching


def gradient_error(mixture: Mixture, net: Net, levels: torch.Tensor) -> float:
    """E|g - exact g|^2 / E|exact g|^2 of sigma grad log p(y | x_t), over all levels."""
    wrong = whole = 0.0
    for alpha, sigma in levels.tolist():
        data = drawn(mixture, 500, torch.Generator().manual_seed(9), alpha, sigma)
        x = data.x_t.requires_grad_()
        rows = torch.arange(len(x))
        exact, found = (
            torch.autograd.grad(logits.log_softmax(dim=1)[rows, data.y].sum(), x)[0]
            for logits in (mixture.log_joint(x, alpha, sigma), net(x, sigma))
        )
        wrong += sigma**2 * (found - exact).square().sum().item()
        whole += sigma**2 * exact.square().sum().item()
    return wrong / whole


def test_score_matching_makes_the_gradient_right(mixture: Mixture) -> None:
    """At equal steps, on the same images: over all levels, and above all in much noise, where cross entropy overfits.

    The unconditional score is that of the exact network, as a user has it. In little noise, where the exact gradient of
    most images is nearly 0, cross entropy alone is no worse.
    """
    times, clock = (100, 300, 500, 700), Clock("ddpm")
    unet = OracleUNet(mixture, "epsilon", clock)
    levels = torch.tensor([clock(t) for t in times], dtype=torch.float64)
    errors = []
    for weight in (0.0, 16.0):
        torch.manual_seed(0)
        net, generator = Net(), torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        for step in range(400):
            t = times[step % 4]
            alpha, sigma = clock(t)
            data = drawn(mixture, 128, generator, alpha, sigma)
            x = data.x_t.requires_grad_()
            logits = net(x, sigma)
            losses = label_losses(logits, data.y)
            if weight:
                score = -unet(x.detach(), t).sample / sigma
                sigmas = torch.full((128,), sigma, dtype=torch.float64)
                log_p = log_likelihood(logits, data.y)
                losses = losses + weight * score_matching_losses(log_p, x, data.eps, sigmas, score)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            schedule.step()
        parts = (levels, levels[2:3], levels[3:])
        errors.append([gradient_error(mixture, net, part) for part in parts])
    plain, matched = errors
    assert matched[0] < 0.75 * plain[0] and all(matched[k] < 0.5 * plain[k] for k in (1, 2)), errors


def test_the_exact_gradient_is_the_best_for_score_matching(mixture: Mixture) -> None:
    """Its loss is the smallest along a line of gradients, and what is left is the noise that no gradient explains."""
    data = held_out(mixture, 4000)
    x, sigma = data.x_t.requires_grad_(), torch.full((4000,), SIGMA, dtype=torch.float64)
    log_joint = mixture.log_joint(x, ALPHA, SIGMA)
    (score,) = torch.autograd.grad(log_joint.logsumexp(dim=1).sum(), x, retain_graph=True)
    # log_joint lacks the -|x|^2 / 2v that its classes share
    losses = []
    for scale in (0.8, 1.0, 1.2):
        log_p = scale * log_likelihood(log_joint, data.y)
        losses.append(score_matching_losses(log_p, x, data.eps, sigma, score).mean().item())
    assert losses[1] < min(losses[0], losses[2])
    denoised = mixture.denoised(x, ALPHA, SIGMA, 0), mixture.denoised(x, ALPHA, SIGMA, 1)
    mean = torch.stack(denoised)[data.y, torch.arange(4000)]
    left = (data.eps - (x - ALPHA * mean) / SIGMA).square().mean().item()
    assert losses[1] == pytest.approx(left, rel=1e-9)


# A teacher's gradient


def test_gradient_matching_is_the_formula() -> None:
    """log p = w x^2 / 2 has the gradient w x: relative above norm 1, absolute below, 0 where equal."""
    w = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.1, 0.2], [3.0, -4.0]], dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    losses = gradient_matching_losses((w * x.square() / 2).sum(dim=1), x, sigma, 2 * x.detach())
    norm = x.detach().square().sum(dim=1) * sigma.square()  # |sigma x|^2
    torch.testing.assert_close(losses, norm * (w - 2) ** 2 / (1 + 4 * norm))
    (slope,) = torch.autograd.grad(losses.sum(), w)
    torch.testing.assert_close(slope, (norm * 2 * (w - 2) / (1 + 4 * norm)).sum())
    same = gradient_matching_losses((w * x.square() / 2).sum(dim=1), x, sigma, (w * x).detach())
    assert not same.any()


def test_gradient_matching_makes_the_gradient_right(mixture: Mixture) -> None:
    """Soft targets of the exact classifier against the same with its gradient, at equal steps."""
    levels, errors = torch.tensor([[ALPHA, SIGMA]], dtype=torch.float64), []
    for weight in (0.0, 1.0):

        def loss(net: nn.Module, data: SimpleNamespace, _: Any, weight: float = weight) -> Any:
            x, rows = data.x_t.requires_grad_(), torch.arange(len(data.y))
            log_q = mixture.log_joint(x, ALPHA, SIGMA).log_softmax(dim=1)
            (exact,) = torch.autograd.grad(log_q[rows, data.y].sum(), x)
            logits, sigma = net(x), torch.full((len(x),), SIGMA, dtype=torch.float64)
            log_p = log_likelihood(logits, data.y)
            matching = gradient_matching_losses(log_p, x, sigma, exact)
            return label_losses(logits, log_q.detach().exp()) + weight * matching

        net = learned(mixture, loss, steps=400, count=32)
        errors.append(gradient_error(mixture, net, levels))
    assert errors[1] < 0.65 * errors[0], errors


# Robust training


def test_the_worst_case_of_a_linear_classifier() -> None:
    """It is radius * -w / |w|: exact after any number of steps, and no weight gets a gradient."""
    first, second = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    w = torch.randn(1, 16, dtype=torch.float64, generator=first).requires_grad_()
    x = torch.randn(5, *SHAPE, dtype=torch.float64, generator=second)
    for steps in (1, 4):
        found = worst_case(lambda x: F.softplus(-(x.flatten(1) @ w[0])), x, 0.7, steps)
        torch.testing.assert_close(found, x - 0.7 * (w / w.norm()).detach().reshape(1, *SHAPE))
    assert w.grad is None and not found.requires_grad
    assert torch.equal(worst_case(lambda x: x.sum((1, 2, 3)), x, 0.0), x)
    assert torch.equal(worst_case(lambda x: (0 * x).sum((1, 2, 3)), x, 1.0), x)  # nowhere to go


def test_robust_training_makes_it_less_sensitive(mixture: Mixture) -> None:
    """A smaller gradient, and more images right at the worst place within the radius, for a little accuracy."""
    radius, data = 1.0, held_out(mixture, 1000)

    def loss(net: nn.Module, data: SimpleNamespace, radius: float) -> torch.Tensor:
        attacked = worst_case(lambda x: label_losses(net(x), data.y), data.x_t, radius, 3)
        return label_losses(net(attacked), data.y)

    norms, worst, plain = [], [], []
    for trained_on in (0.0, radius):
        robust = partial(loss, radius=trained_on)
        net = learned(mixture, lambda net, data, _, f=robust: f(net, data), steps=200, count=128)
        x = data.x_t.requires_grad_()
        (grad,) = torch.autograd.grad(label_losses(net(x), data.y).sum(), x)
        norms.append(grad.flatten(1).norm(dim=1).mean().item())
        attacked = worst_case(lambda x, net=net: label_losses(net(x), data.y), data.x_t, radius, 10)
        worst.append((net(attacked).argmax(1) == data.y).double().mean().item())
        plain.append((net(data.x_t).argmax(1) == data.y).double().mean().item())
    assert norms[1] < 0.8 * norms[0], norms
    assert worst[1] > worst[0] + 0.02, worst
    assert plain[1] > plain[0] - 0.03, plain


# Which noise levels


def test_importance_sampling_is_unbiased() -> None:
    """sum_k p_k w_k loss_k is the mean over all k, and each draw of it varies less than a uniform one."""
    losses = torch.linspace(0.01, 3, 20, dtype=torch.float64) ** 2
    sampler = LossSecondMomentSampler(20)
    sampler.update(torch.arange(20).repeat(10), losses.repeat(10))
    p = sampler.probabilities()
    k, w = sampler.sample(20_000, torch.Generator().manual_seed(0))
    weight = torch.zeros(20, dtype=torch.float64).index_put((k,), w.double())
    assert (weight > 0).sum() > 12
    torch.testing.assert_close((p * losses / (20 * p)).sum(), losses.mean())
    torch.testing.assert_close(weight[weight > 0], (1 / (20 * p))[weight > 0], rtol=1e-6, atol=0)
    draws = w * losses[k]
    assert draws.mean().item() == pytest.approx(losses.mean().item(), rel=0.01)
    assert draws.std() < 0.2 * losses.std()


# Columns of other labels


def digits(count: int = 24) -> Dataset:
    """Digits with their divisors among 2, 3 and 5 as ids, names and vectors, and with numbers."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = (loaded.images[:count] * 255 / 16).astype(np.uint8)
    labels = loaded.target[:count].tolist()
    ids = [[i for i, divisor in enumerate((2, 3, 5)) if label % divisor == 0] for label in labels]
    columns = {
        "image": (Image(), [PILImage.fromarray(image) for image in images]),
        "class": (ClassLabel(names=NAMES), labels),
        "ids": (List(ClassLabel(names=["a", "b", "c"])), ids),
        "integers": (List(Value("int64")), ids),
        "names": (List(Value("string")), [[f"by {i}" for i in row] for row in ids]),
        "vector": (List(Value("int64")), [[int(i in row) for i in range(3)] for row in ids]),
        "number": (Value("float32"), [label / 4 for label in labels]),
        "pair": (List(Value("float32")), [[label / 4, 1 - label] for label in labels]),
    }
    features = Features({name: feature for name, (feature, _) in columns.items()})
    rows = {name: values for name, (_, values) in columns.items()}
    return Dataset.from_dict(rows, features=features)


def test_label_columns() -> None:
    data = digits()
    images = LabelledImages(data, label_column="class", resolution=8)
    vectors, names = torch.tensor(data["vector"][:], dtype=torch.float32), {}
    for column in ("ids", "integers", "names", "vector"):
        found = TargetedImages(images, column, MULTI)
        assert torch.equal(found.targets(), vectors) and torch.equal(found[5]["label"], vectors[5])
        assert torch.equal(found[(5, 1)]["pixel_values"], images[(5, 1)]["pixel_values"])
        names[column] = list(found.id2label.values())
    numbers, by = ["0", "1", "2"], ["by 0", "by 1", "by 2"]
    expected = {"ids": ["a", "b", "c"], "integers": numbers, "names": by, "vector": numbers}
    assert names == expected
    for column, width in (("number", 1), ("pair", 2)):
        found = TargetedImages(images, column, REGRESSION)
        assert (found.num_labels, found.id2label) == (width, {})
        assert found[3]["label"].shape == (width,)
        assert torch.equal(found.targets(), torch.tensor(data[column][:]).reshape(-1, width))
    few = LabelledImages(data.select([1]), label_column="class", resolution=8)  # 1 has no divisor
    found = TargetedImages(few, "names", MULTI, dict(enumerate(by)))
    assert found.targets().tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        (
            "foto",
            MULTI,
            "label_column='foto': multi_label_classification needs one of the dataset's columns",
        ),
        (None, REGRESSION, "label_column=None: regression needs one of"),
        ("number", MULTI, "label_column='number' holds .*float32.*lists of class ids"),
        ("pair", MULTI, "label_column='pair' holds .*lists of class ids"),
        ("names", REGRESSION, "label .*by 0.* of row 0 .*finite numbers are allowed"),
        ("class", SINGLE, "problem_type='single_label_classification'"),
    ],
)
def test_wrong_label_columns_are_named(column: str | None, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TargetedImages(LabelledImages(digits(), resolution=8), column, kind)


def test_labels_of_another_split_are_refused() -> None:
    images = LabelledImages(digits(), resolution=8)
    with pytest.raises(ValueError, match="the other split"):
        TargetedImages(images, "names", MULTI, {0: "by 0", 1: "by 1"})


# The script's loss is the formula


def draws_for(batch_size: int, rank: int = 0, world: int = 1) -> StepRandom:
    generator = torch.Generator().manual_seed(3)
    return StepRandom(generator, batch_size, rank, world, torch.device("cpu"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """A recipe of these options on eight digits, a classifier with random weights, and a batch."""

    def make(data: LabelledImages | TargetedImages | None = None, **more: Any) -> SimpleNamespace:
        more = {"resolution": 8, "train_batch_size": 8, "cpu": True, **more}
        options = ClassifierOptions(train_data_dir="digits", **more)
        data = data or LabelledImages(digits(), label_column="class", resolution=8)
        torch.manual_seed(0)
        settings = {**CLASSIFIER, "sample_size": 8, "in_channels": 1}
        settings |= {"num_labels": len(data.id2label) or data.num_labels}
        model = NoiseAwareClassifier(**settings, problem_type=options.problem_type).eval()
        nn.init.normal_(model.head[-1].out.weight, std=0.5)
        scheduler = DDPMScheduler(1000)
        recipe = make_loss(options, Accelerator(cpu=True), scheduler, 999, data)
        batch = collate([data[i] for i in range(8)])
        x0, first = batch["pixel_values"], options.min_timestep
        again, draws = draws_for(8), draws_for(8)
        t, eps = first + again.randint(1000 - first), again.randn(1, 8, 8)
        return SimpleNamespace(
            **{"loss": recipe(model, batch, draws), "model": model, "recipe": recipe},
            **{"x0": x0, "y": batch["label"], "t": t, "eps": eps},
            **{"scheduler": scheduler, "x_t": scheduler.add_noise(x0, eps, t)},
        )

    return make


def test_the_loss_is_the_formula(made: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    plain = made()
    logits = plain.model(plain.x_t, plain.t).logits
    torch.testing.assert_close(plain.loss, F.cross_entropy(logits, plain.y))
    smooth = F.cross_entropy(logits, plain.y, label_smoothing=0.2)
    torch.testing.assert_close(made(label_smoothing=0.2).loss, smooth)
    counts = torch.bincount(torch.tensor(digits()["class"][:]), minlength=10)
    (tmp_path / "weights.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    for given, weight in (
        ("balanced", 24 / (10 * counts)),
        (",".join(map(str, range(10))), torch.arange(10.0)),
        (str(tmp_path / "weights.json"), torch.arange(10.0)),
    ):
        expected = F.cross_entropy(logits, plain.y, weight, reduction="none").mean()
        torch.testing.assert_close(made(class_weights=given).loss, expected)
    late = made(min_timestep=900)
    assert late.t.min() >= 900
    expected = F.cross_entropy(late.model(late.x_t, late.t).logits, late.y)
    torch.testing.assert_close(late.loss, expected)

    def losses(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(plain.model(x, plain.t).logits, plain.y, reduction="none")

    loss = made(robust_epsilon=0.5, robust_steps=2)
    torch.testing.assert_close(loss.loss, losses(worst_case(losses, plain.x_t, 0.5, 2)).mean())
    assert loss.loss > plain.loss and made(robust_epsilon=0.5).loss != loss.loss
    assert all(parameter.grad is None for parameter in loss.model.parameters())


def test_mixed_images_are_those_of_their_neighbours(made: Callable[..., SimpleNamespace]) -> None:
    """As the formula says; two processes mix what one does."""
    mixed = made(mixup=0.4)
    halves = [mixed.recipe.mixup_shares(draws_for(4, rank, 2)) for rank in range(2)]
    whole = mixed.recipe.mixup_shares(draws_for(8))
    assert torch.equal(torch.cat(halves), whole) and whole.min() >= 0 and whole.max() <= 1
    fresh = draws_for(8)
    fresh.randint(1000), fresh.randn(1, 8, 8)
    share = mixed.recipe.mixup_shares(fresh)
    swapped, shares = [1, 0, 3, 2, 5, 4, 7, 6], share[:, None, None, None]
    x0 = shares * mixed.x0 + (1 - shares) * mixed.x0[swapped]
    x_t = mixed.scheduler.add_noise(x0, mixed.eps, mixed.t)
    log_p = mixed.model(x_t, mixed.t).logits.log_softmax(1)
    rows = torch.arange(8)
    expected = -(share * log_p[rows, mixed.y] + (1 - share) * log_p[rows, mixed.y[swapped]]).mean()
    torch.testing.assert_close(mixed.loss, expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_score_matching_asks_the_diffusion_model(
    made: Callable[..., SimpleNamespace], tmp_path: Path, prediction: str
) -> None:
    """With its null label, at its own timestep of that noise; the gradient's weights get one, too."""
    torch.manual_seed(1)
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 11}
    unet = UNet2DModel(**UNET, **shape).eval()
    for module in unet.modules():  # the last layers are not zero
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1)

    def save(name: str, steps: int) -> DDPMScheduler:
        own, labels = DDPMScheduler(steps, prediction_type=prediction), dict(enumerate(NAMES))
        pipeline = ClassifierGuidedPipeline(unet=unet, scheduler=own, id2label=labels)
        pipeline.save_pretrained(tmp_path / name)
        return own

    own = save("score", 1000)
    plain, found = made(), made(dlsm_weight=2.0, score_model=str(tmp_path / "score"))
    alpha_bar = own.alphas_cumprod[plain.t][:, None, None, None]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    with torch.no_grad():
        output = unet(plain.x_t, plain.t, class_labels=torch.full((8,), 10)).sample
    eps = output if prediction == "epsilon" else sigma * plain.x_t + alpha * output
    x = plain.x_t.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        log_p = plain.model(x, plain.t).logits.log_softmax(1)[torch.arange(8), plain.y]
    (grad,) = torch.autograd.grad(log_p.sum(), x)
    expected = plain.loss + 2.0 * (sigma * grad - eps + plain.eps).square().mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-5)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in found.model.parameters())
    save("short", 500)
    with pytest.raises(ValueError, match="--score_model .*knows no noise as of timestep 999"):
        made(dlsm_weight=2.0, score_model=str(tmp_path / "short"))


def test_other_heads_losses(made: Callable[..., SimpleNamespace]) -> None:
    images = LabelledImages(digits(), label_column="class", resolution=8)
    several = TargetedImages(images, "ids", MULTI)
    found = made(several, problem_type=MULTI)
    logits = found.model(found.x_t, found.t).logits
    torch.testing.assert_close(found.loss, F.binary_cross_entropy_with_logits(logits, found.y))
    count = several.targets().sum(0)
    weight = (24 - count) / count
    expected = F.binary_cross_entropy_with_logits(logits, found.y, pos_weight=weight)
    balanced = made(several, problem_type=MULTI, class_weights="balanced")
    torch.testing.assert_close(balanced.loss, expected)
    numbers = TargetedImages(images, "pair", REGRESSION)
    found = made(numbers, problem_type=REGRESSION)
    variance = numbers.targets().var(dim=0, unbiased=False)
    expected = ((found.model(found.x_t, found.t).logits - found.y) ** 2 / variance).mean()
    torch.testing.assert_close(found.loss, expected)


# Where it starts


def test_the_encoder_of_a_unet(tmp_path: Path) -> None:
    """It does in the classifier what it does in the UNet: the middle block's output is the same."""
    shape = {"sample_size": 8, "in_channels": 1}
    resnet = {
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "attn_norm_num_groups": 4,
    }
    for number, more in enumerate(({}, resnet)):
        torch.manual_seed(0)
        unet = UNet2DModel(**{**UNET, **shape, **more}, out_channels=1, num_class_embeds=3)
        folder = tmp_path / str(number)
        unet.save_pretrained(folder / "unet")
        start = warm_start.load_initial_model(str(folder))
        model = NoiseAwareClassifier(**warm_start.classifier_config(start), **shape, num_labels=3)
        said = warm_start.copy_weights(model, start, str(folder))
        body = [name for name in model.state_dict() if not name.startswith("head.")]
        count = f"{len(body)} of {len(model.state_dict())} parameters"
        assert said.startswith(f"starts from {folder}: {count}")
        unet.class_embedding.weight.data.zero_()
        hidden, labels = [], torch.zeros(2, dtype=torch.long)
        for network, extra in ((unet.eval(), {"class_labels": labels}), (model.eval(), {})):
            network.mid_block.register_forward_hook(
                lambda module, args, output, to=hidden: to.append(output)
            )
            network(torch.ones(2, 1, 8, 8), torch.tensor([3.0, 700.0]), **extra)
        torch.testing.assert_close(*hidden)


def test_a_classifier_with_other_labels(tmp_path: Path) -> None:
    """All but the last layer, and its architecture and noise schedule; with the same labels, all."""
    schedule = {"num_train_timesteps": 40, "beta_schedule": "scaled_linear"}
    shape = {"sample_size": 8, "in_channels": 1, "num_labels": 3}
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}}
    first = NoiseAwareClassifier(**CLASSIFIER, **schedule, **shape, **labels)
    nn.init.normal_(first.head[-1].out.weight)
    first.save_pretrained(tmp_path)
    start = warm_start.load_initial_model(str(tmp_path))
    taken = warm_start.initial_schedule(start)
    assert (taken.config.num_train_timesteps, taken.config.beta_schedule) == (40, "scaled_linear")
    assert warm_start.initial_schedule(None) is None
    last = ["head.2.out.weight", "head.2.out.bias"]
    for names, other in (("abc", []), ("abd", last), ("abcd", last)):
        config = {**warm_start.classifier_config(start), "num_labels": len(names)}
        model = NoiseAwareClassifier(**config, id2label=dict(enumerate(names)))
        said, state = warm_start.copy_weights(model, start, str(tmp_path)), first.state_dict()
        assert f": {len(state) - len(other)} of {len(state)} parameters" in said
        for name, value in model.state_dict().items():
            expected = torch.zeros_like(value) if name in other else state[name]
            assert torch.equal(value, expected)


# The script


@pytest.fixture
def tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The digits as a folder of Parquet files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, part in (("train", range(18)), ("test", range(18, 24))):
        (tmp_path / "tagged").mkdir(exist_ok=True)
        digits().select(part).to_parquet(tmp_path / "tagged" / f"{name}.parquet")
    return tmp_path / "tagged"


@pytest.mark.parametrize(
    ("kind", "column", "guided"),
    [(MULTI, "names", {"label": "by 1"}), (REGRESSION, "pair", {"target": [1.0, -3.0]})],
)
def test_other_heads_become_models_that_guide(
    train: Callable[..., Path], tagged: Path, kind: str, column: str, guided: dict[str, Any]
) -> None:
    line = f"--max_train_steps 2 --problem_type {kind} --label_column {column}"
    folder = train("classifier", line, data=f"--train_data_dir {tagged}")
    model = NoiseAwareClassifier.from_pretrained(folder)
    assert model.config.problem_type == kind
    names = None if kind == REGRESSION else {0: "by 0", 1: "by 1", 2: "by 2"}
    assert model.config.id2label == names
    rows = json.loads((folder / "metrics.json").read_text())["held_out"]
    assert {*METRICS[kind]} <= rows[0].keys()
    assert all(math.isfinite(row[name]) for row in rows for name in METRICS[kind])
    log_p = ClassifierGuidance(model, **guided).log_likelihood(torch.zeros(2, 1, 8, 8), 500.0)
    assert log_p.shape == (2,) and (log_p < 0).all()
    if kind == REGRESSION:  # it starts at the mean
        mean = torch.tensor(datasets.load_dataset(str(tagged))["train"]["pair"][:]).mean(0)
        assert (model.head[-1].out.bias - mean).abs().max() < 0.01


def test_importance_sampling_goes_on_as_it_was(train: Callable[..., Path]) -> None:
    """The history of losses is in the checkpoints."""
    line = (
        "--ddpm_num_steps 2 --timestep_sampler second_moment --no_use_ema --validation_samples 1 "
        "--max_train_steps 12 --checkpointing_steps 9 "
    )
    whole = train("classifier", line, "whole")
    parts = train("classifier", line.replace("max_train_steps 12", "max_train_steps 9"), "parts")
    train("classifier", line + "--resume_from_checkpoint latest", "parts")
    assert apart(weights(whole), weights(parts)) == 0
    uniform = train("classifier", line.replace("second_moment", "uniform"), "uniform")
    assert apart(weights(whole), weights(uniform)) > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"label_smoothing": 1.0}, "--label_smoothing 1.0: 0 up to, not including, 1 is allowed"),
        ({"mixup": -1.0}, "--mixup -1.0: 0 or more is allowed"),
        ({"mixup": float("nan")}, "--mixup nan: 0 or more"),
        ({"mixup": 1.0, "train_batch_size": 3}, "--train_batch_size 3: an even number"),
        ({"robust_steps": 3}, "--robust_steps 3: 1 or more is allowed, with --robust_epsilon"),
        ({"dlsm_weight": 1.0}, "--dlsm_weight 1.0 and --score_model None need each other"),
        ({"score_model": "x"}, "--dlsm_weight 0.0 and --score_model x need each other"),
        ({**DLSM, "mixup": 1.0}, "--dlsm_weight 1.0: with --mixup 1.0"),
        ({**DLSM, "problem_type": REGRESSION}, "--dlsm_weight 1.0: .*regression"),
        ({**DLSM, "gradient_checkpointing": True}, "--dlsm_weight 1.0 differentiates twice"),
        ({"teacher_gradient_weight": 1.0}, "--teacher_gradient_weight 1 needs --teacher"),
        (
            {"teacher": "x", "teacher_gradient_weight": 1.0, "gradient_checkpointing": True},
            "--teacher_gradient_weight 1.0 differentiates twice",
        ),
        ({"teacher": "x", "teacher_gradient_weight": -1.0}, "--teacher_gradient_weight -1.0: 0 or"),
        (
            {"label_smoothing": 0.1, "problem_type": REGRESSION},
            "--label_smoothing 0.1: none and 0 are allowed",
        ),
        ({"output_dir": ""}, "--output_dir '': a text that isn't empty"),
    ],
)
def test_wrong_options_are_named(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierOptions(train_data_dir="digits", **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"class_weights": "1,2"}, "--class_weights 1,2: 10 numbers"),
        ({"class_weights": ",".join(["1e40"] * 10)}, "--class_weights 1e40.*: 10 numbers"),
        ({"class_weights": "rare"}, "--class_weights rare: .*`balanced`"),
        ({"min_timestep": 1000}, "--min_timestep 1000: 0 to 999"),
        ({"dlsm_weight": 1.0, "score_model": "nowhere"}, "--score_model nowhere: "),
    ],
)
def test_what_does_not_fit_is_named(
    made: Callable[..., SimpleNamespace], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(**more)


def test_a_start_that_is_none_is_named(tmp_path: Path) -> None:
    DDPMScheduler().save_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    message = "--init_from .*AutoencoderKL; NoiseAwareClassifier and UNet2DModel are"
    with pytest.raises(ValueError, match=message):
        warm_start.load_initial_model(str(tmp_path))
    with pytest.raises(ValueError, match="--init_from nowhere: "):
        warm_start.load_initial_model("nowhere")


def labelled_by(values: list, feature: object) -> LabelledImages:
    """Images with a column `y`."""
    image = PILImage.fromarray(np.zeros((8, 8), np.uint8))
    rows = {"image": [image] * len(values), "y": values}
    features = Features({"image": Image(), "y": feature})
    return LabelledImages(Dataset.from_dict(rows, features=features), resolution=8)


@pytest.mark.parametrize(
    ("kind", "values", "feature", "message"),
    [
        (REGRESSION, [1.0, 2.0, float("nan")], Value("float32"), "label nan of row 2 of label_col"),
        (REGRESSION, [1.0, None], Value("float32"), "label None of row 1"),
        (REGRESSION, [1.0, 1e39], Value("float64"), "label 1e.39 of row 1 .*: 1 finite"),
        (REGRESSION, [[1.0], [1.0, 2.0]], List(Value("float32")), "of row 1 .*: 1 finite numbers"),
        (MULTI, [["a"], ["b"], None], List(Value("string")), "None of row 2 .*2 labels"),
        (MULTI, [["a"], ["b", None]], List(Value("string")), "of row 1 .* isn't a list of the 2"),
        (MULTI, [["a"], ["b", ""]], List(Value("string")), "of row 1 .* isn't a list of the 2"),
        (MULTI, [[1, 0, 0], [1, 0]], List(Value("int64")), "of row 1 .*: 3 zeros and ones"),
        (
            MULTI,
            [[7], [1, 10**9]],
            List(Value("int64")),
            "3 different ids, from 1 to 1000000000; 0",
        ),
    ],
)
def test_wrong_labels_are_found_at_once(
    kind: str, values: list, feature: object, message: str
) -> None:
    """All rows are read when the labels are, and the first wrong one is named."""
    with pytest.raises(ValueError, match=message):
        TargetedImages(labelled_by(values, feature), "y", kind)


def test_ids_of_lists_can_be_renumbered() -> None:
    images = labelled_by([[100, 7], [20000]], List(Value("int64")))
    found = TargetedImages(images, "y", MULTI, renumber_labels=True)
    assert found.id2label == {0: "7", 1: "100", 2: "20000"}
    assert found.targets().tolist() == [[1, 1, 0], [0, 0, 1]]
    images = labelled_by([[20000], []], List(Value("int64")))
    other = TargetedImages(images, "y", MULTI, found.id2label, renumber_labels=True)
    assert other.targets().tolist() == [[0, 0, 1], [0, 0, 0]]
    named = labelled_by([[2], [0, 2]], List(ClassLabel(names=["a", "b", "c"])))
    found = TargetedImages(named, "y", MULTI, renumber_labels=True)
    assert (found.id2label, found.targets().tolist()) == ({0: "a", 1: "c"}, [[0, 1], [1, 1]])


def test_labels_of_a_held_out_part_are_those_of_all_rows() -> None:
    images = labelled_by([[str(i)] for i in range(20)], List(Value("string")))
    train, held_out = images.hold_out(0.2)
    data = TargetedImages(train, "y", MULTI)
    other = TargetedImages(held_out, "y", MULTI, data.id2label)
    assert len(data.id2label) == data.num_labels == other.num_labels == 20
    for i in range(len(held_out)):
        names = [data.id2label[k] for k in other.label(i).nonzero().flatten().tolist()]
        assert names == [str(held_out.number(i))]

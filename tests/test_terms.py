"""Every term of guidance at one noise level, in float64, against the closed form that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from math import hypot
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SHAPE, Clock, Mixture, OracleClassifier, OracleUNet
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from test_guidance import SPACES, level_at, normal, step_at

from guided_diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    EnergyGuidance,
    NoiseLevel,
    StepContext,
    gradient,
)
from guided_diffusers.networks import relu_as_softplus

CLOCK = Clock()
#: the classifiers are asked at a timestep of their own where these are met exactly, at little, middle and much noise
RATIOS = [CLOCK(t)[1] / CLOCK(t)[0] for t in (10, 200, 700)]
LEVELS = [
    pytest.param(level_at(ratio, space), id=f"{space} {ratio:.2g}")
    for space in SPACES
    for ratio in RATIOS
]
every_level = pytest.mark.parametrize("level", LEVELS)


def assert_equal(found: torch.Tensor, expected: torch.Tensor, rounding: float = 1e-8) -> None:
    """Up to rounding in float64, of the largest number there is."""
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding * float(expected.abs().max()))


def mixture_of(
    means: torch.Tensor, std: float | torch.Tensor, prior: list[float] | None = None
) -> Mixture:
    """Any number of Gaussians; a standard deviation a pixel, SHAPE, only where there is one of them."""
    mixture = Mixture()
    mixture.means, mixture.std = means.double(), std
    mixture.prior = torch.tensor(prior or [1 / len(means)] * len(means), dtype=torch.float64)
    return mixture


def attributes() -> Mixture:
    """Four classes 2 i + j: attribute i decides the upper half's mean and j, on its own, the lower half's."""
    halves = 0.6 * normal(2, 2, 2, 4, seed=5)
    means = torch.stack(
        [torch.cat([halves[0, i], halves[1, j]])[None] for i in (0, 1) for j in (0, 1)]
    )
    return mixture_of(means, 0.3, [0.3 * 0.6, 0.3 * 0.4, 0.7 * 0.6, 0.7 * 0.4])


class AttributeClassifier(OracleClassifier):
    """The exact classifier of attribute 0 or 1 alone; "both": a head of two log odds, one an attribute."""

    def __init__(self, mixture: Mixture, which: int | str):
        super().__init__(mixture, beta_schedule="squaredcos_cap_v2")
        self.which = which
        if which == "both":
            self.config["problem_type"] = "multi_label_classification"

    def forward(self, sample: torch.Tensor, timestep: float) -> Any:
        joint = super().forward(sample, timestep).logits.reshape(-1, 2, 2)
        if self.which == "both":
            logits = torch.stack([joint.logsumexp(3 - i).diff(dim=1)[:, 0] for i in (1, 2)], dim=1)
        else:
            logits = joint.logsumexp(2 - self.which)
        return SimpleNamespace(logits=logits)


def samples(mixture: Mixture, level: NoiseLevel, count: int = 6) -> torch.Tensor:
    """x_t around all the classes, in much of the space between them."""
    means = mixture.means[torch.arange(count) % len(mixture.means)]
    return level.alpha * means + (level.sigma + 0.4 * level.alpha) * normal(count, *SHAPE)


def score(
    mixture: Mixture, x: torch.Tensor, level: NoiseLevel, classes: list[int] | None = None
) -> torch.Tensor:
    """grad log p_t(x | one of the classes), by differentiating the density itself."""
    chosen = slice(None) if classes is None else classes
    return gradient(
        lambda x: mixture.log_joint(x, level.alpha, level.sigma)[:, chosen].logsumexp(-1), x
    )


def step_of(
    mixture: Mixture, x: torch.Tensor, level: NoiseLevel, label: int | None = None, **more: Any
) -> StepContext:
    """A step of the exact network told `label`; asked for another network, of its mixture."""

    def predict(x: torch.Tensor, network: OracleUNet | None = None) -> torch.Tensor:
        return (network.mixture if network else mixture).denoised(
            x, level.alpha, level.sigma, label
        )

    return StepContext(x, predict(x), predict, level, 0, 10, 0.0, **more)


def slope(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    direction: torch.Tensor,
    size: float,
) -> torch.Tensor:
    """The central difference of `function`, (B,), along `direction`, extrapolated to the fourth order."""

    def central(h: float) -> torch.Tensor:
        return (function(x + h * direction) - function(x - h * direction)) / (2 * h)

    h = 1e-3 * size
    return (4 * central(h / 2) - central(h)) / 3


def along(score: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return (score * direction).sum((1, 2, 3))


@every_level
def test_the_steps_score_is_the_gradient_of_the_log_density(
    mixture: Mixture, level: NoiseLevel
) -> None:
    x = samples(mixture, level)
    assert_equal(step_of(mixture, x, level).score, score(mixture, x, level))
    assert_equal(step_of(mixture, x, level, 1).score, score(mixture, x, level, [1]))


# classifier-free guidance


def free_step(mixture: Mixture, level: NoiseLevel) -> StepContext:
    x = samples(mixture, level)
    return step_of(
        mixture, x, level, 1, condition_x0=(mixture.denoised(x, level.alpha, level.sigma, None),)
    )


@every_level
@pytest.mark.parametrize("w", [-0.5, 1.0, [3.0, 0.0, 1.0, 2.0, -1.0, 0.5]])
def test_classifier_free_guidance_tilts_the_exact_score(
    mixture: Mixture, level: NoiseLevel, w: Any
) -> None:
    """(1 + w) score(x | c) - w score(x), each image at its own scale."""
    step = free_step(mixture, level)
    scale = torch.tensor(w, dtype=torch.float64).reshape(-1, 1, 1, 1)
    conditional, free = score(mixture, step.sample, level, [1]), score(mixture, step.sample, level)
    for null in (2, {"class_labels": torch.tensor([2])}):
        term = ClassifierFreeGuidance(null, w)
        assert [
            {name: value.tolist() for name, value in one.items()} for one in term.conditions
        ] == [{"class_labels": [2]}]
        assert_equal(step.score + term.score(step), (1 + scale) * conditional - scale * free)


@every_level
@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_is_that_of_diffusers(mixture: Mixture, level: NoiseLevel, rescale: float) -> None:
    """`rescale_noise_cfg` of the network's output, for that of any kind of network."""
    step, w = free_step(mixture, level), 2.5
    conditional, null = (level.output(step.sample, x0) for x0 in (step.x0, step.condition_x0[0]))
    expected = rescale_noise_cfg(conditional + w * (conditional - null), conditional, rescale)
    found = level.corrected(conditional, ClassifierFreeGuidance(2, w, rescale=rescale).score(step))
    assert_equal(found, expected)
    plain = level.corrected(conditional, ClassifierFreeGuidance(2, w).score(step))
    assert (found - plain).abs().max() > 1e-4 * plain.abs().max()


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_rescale_where_the_network_has_no_say(mixture: Mixture, rescale: float) -> None:
    """A consistency model's output counts nothing at its smallest sigma: there is none to rescale."""
    level = NoiseLevel(1.0, 0.002, 1.0, 0.0)
    term = ClassifierFreeGuidance(2, 2.0, rescale=rescale)
    assert_equal(
        term.score(free_step(mixture, level)),
        ClassifierFreeGuidance(2, 2.0).score(free_step(mixture, level)),
    )


@every_level
@pytest.mark.parametrize("quantile", [0.8, 0.995, 1.0])
def test_threshold_is_imagens(mixture: Mixture, level: NoiseLevel, quantile: float) -> None:
    """Figure A.10 of Saharia et al. 2022, an image at a time; with an image that stays inside, which is left alone."""
    step = free_step(mixture, level)
    w = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 0.0])
    found = step.x0 + level.sigma**2 / level.alpha * ClassifierFreeGuidance(
        2, w, threshold=quantile
    ).score(step)
    for i, image in enumerate(
        step.x0 + w.double().reshape(-1, 1, 1, 1) * (step.x0 - step.condition_x0[0])
    ):
        ordered = image.abs().flatten().sort().values
        place = quantile * (len(ordered) - 1)
        low = min(int(place), len(ordered) - 2)
        s = max(1.0, float(ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])))
        assert_equal(
            found[i], image.clamp(-s, s) / s if w[i] else step.x0[i]
        )  # 0 is off, for one image, too
        assert quantile < 1 or not w[i] or float(found[i].abs().max()) <= 1 + 1e-9


def test_scale_0_is_off_for_one_image_also_with_a_threshold_and_rescale() -> None:
    level, x0 = level_at(0.7), 3 * normal(2, *SHAPE)  # far outside [-1, 1]
    step = StepContext(normal(2, *SHAPE, seed=1), x0, lambda x: x, level, 0, 10, 0.0, (0.5 * x0,))
    found = ClassifierFreeGuidance(2, [0.0, 3.0], threshold=0.9, rescale=0.5).score(step)
    assert not found[0].any() and found[1].abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rescale": -0.1}, "rescale=-0.1: a finite number from 0 to 1 is allowed"),
        ({"rescale": 1.1}, "rescale=1.1"),
        ({"threshold": 0.0}, "threshold=0.0: a finite number above 0, up to 1, is allowed"),
        ({"threshold": 2}, "threshold=2"),
        (
            {"null": -1},
            "null=-1: a class label, 0 or above, or a mapping of the network's arguments is "
            "allowed",
        ),
        ({"null": None}, "null=None"),
        ({"null": 2.0}, "null=2.0"),
        ({"null": True}, "null=True"),
    ],
)
def test_wrong_classifier_free_guidance_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierFreeGuidance(**{"null": 2, **arguments})


# the classifier


@every_level
def test_two_classifiers_are_the_product_of_their_probabilities(level: NoiseLevel) -> None:
    mixture = attributes()
    x = samples(mixture, level)
    step, free = step_of(mixture, x, level), score(mixture, x, level)
    first, second = (
        ClassifierGuidance(AttributeClassifier(mixture, which), label)
        for which, label in ((0, 1), (1, 0))
    )
    tolerance = 3e-5  # the cosine schedule isn't met at one of its own timesteps
    assert_equal(first.score(step), score(mixture, x, level, [2, 3]) - free, tolerance)
    assert_equal(second.score(step), score(mixture, x, level, [0, 2]) - free, tolerance)
    assert_equal((first + second).score(step), score(mixture, x, level, [2]) - free, tolerance)

    head = AttributeClassifier(
        mixture, "both"
    )  # log sigmoid of each label that counts, and no other
    both = ClassifierGuidance(head, {0: 1.0, 1: 1.0}).score(step)
    assert_equal(both, score(mixture, x, level, [3]) - free, tolerance)
    away = ClassifierGuidance(head, {1: -2.0}).score(step)
    assert_equal(away, -2 * (score(mixture, x, level, [1, 3]) - free), tolerance)


@every_level
@pytest.mark.parametrize(
    ("joint", "marginal"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5), (0.5, 0.25), (3.0, 0.0)]
)
def test_temperatures_are_those_of_the_two_parts(
    mixture: Mixture, level: NoiseLevel, joint: float, marginal: float
) -> None:
    """joint grad f_y - marginal sum_i softmax(marginal f)_i grad f_i; with marginal 0 the logit's gradient alone."""
    x, norm = samples(mixture, level), hypot(level.alpha, level.sigma)
    alpha, sigma = level.alpha / norm, level.sigma / norm
    f = mixture.log_joint(x / norm, alpha, sigma)
    slopes = (
        -(x[:, None] / norm - alpha * mixture.means)
        / ((alpha * mixture.std) ** 2 + sigma**2)
        / norm
    )
    weights = (marginal * f).softmax(-1)[:, :, None, None, None]
    expected = joint * slopes[:, 1] - marginal * (weights * slopes).sum(1)
    term = ClassifierGuidance(
        OracleClassifier(mixture), 1, joint_temperature=joint, marginal_temperature=marginal
    )
    found = term.score(step_of(mixture, x, level))
    assert_equal(found, expected)
    if marginal == 0:
        assert_equal(found, 3 * slopes[:, 1])


class Regressor(torch.nn.Module):
    """E[w . x0 | x_t] of Gaussian data N(mean, s^2 I) for each row of w, at its own schedule's timestep."""

    def __init__(self, mixture: Mixture, w: torch.Tensor, clock: Clock = CLOCK):
        super().__init__()
        self.mixture, self.w, self.clock = mixture, w, clock
        self.config = {
            "num_train_timesteps": 1000,
            "beta_schedule": "linear",
            "problem_type": "regression",
        }

    def forward(self, sample: torch.Tensor, timestep: float) -> tuple[torch.Tensor]:
        return (self.mixture.denoised(sample, *self.clock(timestep), 0).flatten(1) @ self.w.T,)


@every_level
@pytest.mark.parametrize("target", [0.7, [0.7, -1.5], "an image"])
def test_an_exact_regressor_gives_the_exact_conditional(level: NoiseLevel, target: Any) -> None:
    """y = w . x0 + noise of std r: p(x_t | y) is Gaussian, with what y says of x0 put through the forward process.

    The standard deviation of y, given x_t, is that of w . x0 at this level together with the noise's.
    """
    s, r, count = 0.5, 0.2, 6
    data = mixture_of(0.5 * normal(1, *SHAPE, seed=2), s)
    w = torch.linalg.qr(normal(16, 2, seed=3)).Q.T  # orthonormal: the two outputs are independent
    w = w[:1] if isinstance(target, float) else w
    y = (
        normal(count, 2, seed=4)
        if target == "an image"
        else torch.tensor(target, dtype=torch.float64).reshape(-1)
    )
    x, mean, identity = (
        samples(data, level, count),
        data.means[0].flatten(),
        torch.eye(16, dtype=torch.float64),
    )
    std = (s**2 * level.sigma**2 / ((level.alpha * s) ** 2 + level.sigma**2) + r**2) ** 0.5
    gain = s**2 / (s**2 + r**2)
    posterior_mean, posterior = mean + gain * (y - w @ mean) @ w, s**2 * (identity - gain * w.T @ w)
    covariance = level.alpha**2 * posterior + level.sigma**2 * identity
    conditional = -torch.linalg.solve(covariance, (x.flatten(1) - level.alpha * posterior_mean).T).T
    free = -(x - level.alpha * data.means) / ((level.alpha * s) ** 2 + level.sigma**2)
    term = ClassifierGuidance(
        Regressor(data, w), target=y if target == "an image" else target, std=std
    )
    assert_equal(free + term.score(step_of(data, x, level, 0)), conditional.reshape(x.shape))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            "regression",
            {"label": 0},
            "label=0, target=None: regression needs a target and no label",
        ),
        ("regression", {"label": 0, "target": 1.0}, "regression needs a target and no label"),
        ("regression", {}, "regression needs a target and no label"),
        ("regression", {"target": float("nan")}, "target=nan: finite numbers are allowed"),
        ("regression", {"target": 1.0, "std": 0.0}, "std=0.0: a finite number above 0 is allowed"),
        ("regression", {"target": 1.0, "std": float("inf")}, "std=inf"),
        (
            "regression",
            {"target": 1.0, "joint_temperature": 2.0},
            "joint_temperature=2.0, .* no effect on regression",
        ),
        (
            "single_label_classification",
            {},
            "single_label_classification needs a label and no target",
        ),
        (
            "single_label_classification",
            {"target": 1.0},
            "single_label_classification needs a label and no target",
        ),
        (
            "single_label_classification",
            {"label": 0, "std": 2.0},
            "std=2.0 has no effect on single_label_classification",
        ),
        (None, {"label": 0, "target": 1.0}, "regression needs a target and no label"),
        (
            None,
            {"label": 0, "joint_temperature": 0.0},
            "joint_temperature=0.0: a finite number above 0 is allowed",
        ),
        (
            None,
            {"label": 0, "marginal_temperature": -1.0},
            "marginal_temperature=-1.0: a finite number, 0 or more, is allowed",
        ),
        (
            "multi_label_classification",
            {"label": 0, "marginal_temperature": 0.5},
            "marginal_temperature=0.5 have no eff",
        ),
        (
            "multi_label_classification",
            {"target": 1.0},
            "multi_label_classification needs a label and no target",
        ),
        (
            "segmentation",
            {"label": 0},
            "classifier: problem_type='segmentation'; single_label_classification, multi_",
        ),
        (
            None,
            {"label": 0, "softplus": 3.0},
            r"softplus=3.0: OracleClassifier has no torch.nn.ReLU to make smooth",
        ),
        (
            None,
            {"label": 0, "softplus": 0.0},
            "softplus=0.0: a finite number above 0 is allowed",
        ),
    ],
)
def test_labels_targets_and_temperatures_that_have_no_effect_are_refused(
    mixture: Mixture, kind: str | None, arguments: dict, message: str
) -> None:
    classifier = OracleClassifier(mixture)
    classifier.config["problem_type"] = kind
    with pytest.raises(ValueError, match=message):
        ClassifierGuidance(classifier, **arguments)


def test_a_target_of_another_shape_is_refused_and_none_known_means_regression(
    mixture: Mixture,
) -> None:
    level, regressor = level_at(RATIOS[1]), Regressor(mixture, normal(2, 16))
    step = step_of(mixture, samples(mixture, level), level, 0)
    with pytest.raises(
        ValueError,
        match=r"target has shape \(3,\); one that broadcasts to the regressor's \(6, 2\)",
    ):
        ClassifierGuidance(regressor, target=[1.0, 2.0, 3.0]).score(step)
    found = ClassifierGuidance(regressor, target=1.0).score(step)
    del regressor.config["problem_type"]
    assert torch.equal(ClassifierGuidance(regressor, target=1.0).score(step), found)


# normalize


@every_level
def test_normalize_counts_in_scores(mixture: Mixture, level: NoiseLevel) -> None:
    """The norm of the term is scale times that of the score, an image; its direction stays."""
    step = step_of(mixture, samples(mixture, level), level)
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0, -1.0, 0.25])
    classifier = OracleClassifier(mixture)
    for make in (
        lambda **more: ClassifierGuidance(classifier, 1, **more),
        lambda **more: EnergyGuidance(lambda x0: (x0 - 1).square().sum((1, 2, 3)), **more),
    ):
        plain, found = make(scale=1.0).score(step), make(scale=scale, normalize=True).score(step)
        unit = plain / plain.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        size = scale.double() * score(mixture, step.sample, level).flatten(1).norm(dim=1)
        assert_equal(found, size.reshape(-1, 1, 1, 1) * unit)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-37, 1e-30, 1.0, 1e30])
def test_normalize_of_gradients_of_any_size(size: float) -> None:
    """A classifier that is sure gives gradients whose squares float32 can't hold, or exact zeros."""
    level = level_at(1.0)
    x, direction = normal(2, 3, 8, 8).float(), normal(2, 3, 8, 8, seed=1).float()
    step = StepContext(x, torch.zeros_like(x), lambda x: x, level, 0, 1, 0.0)
    found = EnergyGuidance(
        lambda x, level: -size * (x * direction).sum((1, 2, 3)), of="sample", normalize=True
    )
    found = found.score(step)
    if size == 0:
        assert torch.equal(found, torch.zeros_like(x))
        return
    lengths = found.flatten(1).norm(dim=1)
    assert (
        lengths.isfinite().all() and (lengths <= 1.0001 * step.score.flatten(1).norm(dim=1)).all()
    )
    if size > 1e-38:  # below is what float32 keeps of it, little
        torch.testing.assert_close(lengths, step.score.flatten(1).norm(dim=1))
        assert (
            torch.nn.functional.cosine_similarity(found.flatten(), direction.flatten(), dim=0)
            > 0.999
        )


# softplus


class ReLUClassifier(torch.nn.Module):
    """ReLU as a child with two names, and as one shared with an inner module."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        act = torch.nn.ReLU()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16, 32), act, torch.nn.Linear(32, 32), act, torch.nn.Linear(32, 3)
        )
        self.first = torch.nn.ReLU(inplace=True)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        self.config = {"num_train_timesteps": 1000, "beta_schedule": "linear"}

    def forward(self, sample: torch.Tensor, timestep: float) -> tuple[torch.Tensor]:
        return (self.layers(self.first(sample.flatten(1) + 1.0)),)


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_softplus_is_the_gradient_of_the_smooth_network(beta: float) -> None:
    """log(1 + exp(beta x)) / beta, written out in a copy; the network itself keeps its ReLU."""
    classifier, level = ReLUClassifier().double(), level_at(1.0)
    x = normal(5, 1, 4, 4)

    def smooth(x: torch.Tensor) -> torch.Tensor:
        return (beta * x).exp().log1p() / beta

    def log_p(x: torch.Tensor) -> torch.Tensor:
        h = smooth((x / hypot(level.alpha, level.sigma)).flatten(1) + 1.0)
        for i in (0, 2):
            h = smooth(classifier.layers[i](h))
        return classifier.layers[4](h).log_softmax(-1)[:, 1]

    before = [(name, id(child)) for name, child in classifier.named_modules(remove_duplicate=False)]
    plain = ClassifierGuidance(classifier, 1).score(step_at(level, x))
    found = ClassifierGuidance(classifier, 1, softplus=beta).score(step_at(level, x))
    assert_equal(found, gradient(log_p, x), 1e-7)
    assert (found - plain).abs().max() > 0.01 * plain.abs().max()
    assert [
        (name, id(child)) for name, child in classifier.named_modules(remove_duplicate=False)
    ] == before
    copied = relu_as_softplus(classifier, beta)
    assert not any(isinstance(child, torch.nn.ReLU) for child in copied.modules())
    assert torch.equal(ClassifierGuidance(classifier, 1).score(step_at(level, x)), plain)


# another network, energies


@every_level
@pytest.mark.parametrize("w", [1.0, [2.0, 0.0, -1.0, 0.5, 3.0, 1.0]])
def test_model_guidance_tilts_away_from_the_worse_score(
    mixture: Mixture, level: NoiseLevel, w: Any
) -> None:
    worse, x = Mixture(seed=0, std=0.5), samples(mixture, level)
    scale = torch.tensor(w, dtype=torch.float64).reshape(-1, 1, 1, 1)
    step = step_of(mixture, x, level)
    found = step.score + AutoGuidance(OracleUNet(worse, "epsilon", Clock()), w).score(step)
    assert_equal(found, (1 + scale) * score(mixture, x, level) - scale * score(worse, x, level))


@every_level
def test_an_energy_of_the_sample_is_a_factor_of_the_density(level: NoiseLevel) -> None:
    """Data N(0, s^2 I) seen with noise of std r: p(y | x_t) is a Gaussian of the level, and the posterior is one."""
    s, r, y = 0.5, 0.4, normal(*SHAPE, seed=6)
    data = mixture_of(torch.zeros(1, *SHAPE), s)

    def energy(x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        total = (level.alpha * s) ** 2 + level.sigma**2
        predicted, variance = level.alpha * s**2 / total * x, s**2 * level.sigma**2 / total
        return (y - predicted).square().sum((1, 2, 3)) / (2 * (variance + r**2))

    gain = s**2 / (s**2 + r**2)
    posterior = mixture_of(gain * y[None], s * (1 - gain) ** 0.5)
    x = samples(data, level)
    term = EnergyGuidance(energy, of="sample")
    found = score(data, x, level) + term.score(step_of(data, x, level))
    assert_equal(found, score(posterior, x, level))
    assert_equal(
        EnergyGuidance(energy, 2.5, of="sample").score(step_of(data, x, level)),
        2.5 * term.score(step_of(data, x, level)),
    )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("of", ["x0", "image"])
def test_an_energy_of_x0_is_the_finite_difference(mixture: Mixture, ratio: float, of: str) -> None:
    """Through the network's own graph (`OracleUNet`, epsilon), or with x0 moved by alpha / (alpha^2 + sigma^2).

    An image here is 2 tanh of x0, in place of a decoder.
    """
    unet, level, t = (
        OracleUNet(mixture, "epsilon", CLOCK),
        level_at(ratio),
        (10, 200, 700)[RATIOS.index(ratio)],
    )
    x, direction = samples(mixture, level), normal(6, *SHAPE, seed=7)

    def predict(x: torch.Tensor) -> torch.Tensor:
        return level.x0(x, unet(x, t).sample)

    def decode(x0: torch.Tensor) -> torch.Tensor:
        return 2 * x0.tanh()

    def energy(image: torch.Tensor) -> torch.Tensor:
        return (image - 0.3).pow(4).sum((1, 2, 3))

    def of_x0(x0: torch.Tensor) -> torch.Tensor:
        return energy(decode(x0) if of == "image" else x0)

    with torch.no_grad():
        step = StepContext(x, predict(x), predict, level, 0, 10, 0.0, decode=decode)
        through = slope(
            lambda x: of_x0(mixture.denoised(x, level.alpha, level.sigma, None)),
            x,
            direction,
            hypot(level.alpha * mixture.std, level.sigma),
        )
        jacobian = level.alpha / (level.alpha**2 + level.sigma**2)
        beside = jacobian * slope(of_x0, step.x0, direction, 0.1)
        term = EnergyGuidance(energy, 3.0, of=of, through_network=True)
        assert_equal(along(term.score(step), direction), -3 * through, 1e-6)
        calls = unet.calls
        assert_equal(
            along(EnergyGuidance(energy, 3.0, of=of).score(step), direction), -3 * beside, 1e-6
        )
    assert unet.calls == calls  # it costs no call


@every_level
def test_beside_the_network_is_exact_for_data_of_unit_variance(level: NoiseLevel) -> None:
    data = mixture_of(0.5 * normal(1, *SHAPE), 1.0)
    step = step_of(data, samples(data, level), level)
    through, beside = (
        EnergyGuidance(lambda x0: x0.pow(4).sum((1, 2, 3)), through_network=through).score(step)
        for through in (True, False)
    )
    assert_equal(beside, through)
    narrow, s = (
        mixture_of(0.5 * normal(1, *SHAPE), 0.3),
        0.3,
    )  # whose Jacobian is alpha s^2 / (alpha^2 s^2 + sigma^2)
    step = step_of(narrow, samples(narrow, level), level)
    through, beside = (
        EnergyGuidance(lambda x0: x0.pow(4).sum((1, 2, 3)), through_network=through).score(step)
        for through in (True, False)
    )
    ratio = s**2 * (level.alpha**2 + level.sigma**2) / ((level.alpha * s) ** 2 + level.sigma**2)
    assert_equal(through, ratio * beside)


def test_wrong_energies_are_refused(mixture: Mixture) -> None:
    level = level_at(1.0)
    step = step_of(mixture, samples(mixture, level), level)
    for energy, shape in (
        (lambda x0: x0.square().sum(), r"\(\)"),
        (lambda x0: x0.square().sum((2, 3)), r"\(6, 1\)"),
    ):
        with pytest.raises(
            ValueError, match=rf"energy gave {shape}; one number per image, \(6,\), is allowed"
        ):
            EnergyGuidance(energy).score(step)
    with pytest.raises(ValueError, match="of='latent': 'image', 'x0' and 'sample' are allowed"):
        EnergyGuidance(lambda x0: x0, of="latent")
    with pytest.raises(ValueError, match="through_network=True has no effect with of='sample'"):
        EnergyGuidance(lambda x, level: x, of="sample", through_network=True)

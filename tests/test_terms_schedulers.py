"""Every term of guidance through the pipeline: along whole trajectories of each family of schedulers, in which steps.

The reference is a plain Diffusers loop with what the term stands for written out: outputs of exact networks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import SHAPE, Clock, Mixture, OracleClassifier, OracleUNet
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from test_guidance import (
    Pull,
    counted,
    normal,
    quiet,
    sample,
    small_classifier,
    small_unet,
    step_at,
)
from test_schedulers import CASES, Case
from test_terms import RATIOS, AttributeClassifier, Regressor, attributes, level_at, mixture_of

from guided_diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    EnergyGuidance,
    Guidance,
    NoiseLevel,
    StepContext,
    noise_levels,
)

NULL, STEPS, IMAGES = 2, 10, 4
ROUNDING = 1e-10  # of float64; and of scales, times and tables in float32:
ROUNDED = 1e-5
FAMILIES = [
    "DDPM epsilon",
    "DDPM sample variance_type=fixed_large timestep_spacing=trailing",
    "DDIM epsilon",
    "DDIM v_prediction",
    "DDIM sample",
    "DDIM epsilon timestep_spacing=trailing eta=1.0",
    "DDIM v_prediction timestep_spacing=trailing rescale_betas_zero_snr=True",
    "PNDM epsilon skip_prk_steps=True",
    "DPMSolverMultistep epsilon",
    "DPMSolverMultistep v_prediction algorithm_type=sde-dpmsolver++",
    "DPMSolverSinglestep sample",
    "UniPCMultistep v_prediction",
    "DEISMultistep epsilon",
    "LCM epsilon num_inference_steps=10",
    "TCD v_prediction num_inference_steps=10 eta=0.3",
    "EulerDiscrete epsilon",
    "EulerDiscrete v_prediction use_karras_sigmas=True timestep_spacing=trailing",
    "EulerAncestralDiscrete epsilon",
    "HeunDiscrete v_prediction",
    "LMSDiscrete sample",
    "EDMEuler edm_epsilon",
    "EDMEuler edm_v_prediction",
    "EDMDPMSolverMultistep edm_epsilon",
    "FlowMatchEulerDiscrete flow shift=3.0",
    "FlowMatchHeunDiscrete flow",
    "FlowMatchLCM flow num_inference_steps=8",
    "UniPCMultistep flow use_flow_sigmas=True",
    "IPNDM v_prediction",
    "CMStochasticIterative consistency num_train_timesteps=40",
]
FEW = [
    "DDIM v_prediction",
    "DDPM epsilon",
    "EulerDiscrete epsilon",
    "HeunDiscrete v_prediction",
    "DPMSolverMultistep epsilon",
    "EDMEuler edm_v_prediction",
    "FlowMatchEulerDiscrete flow shift=3.0",
]
BY_NAME = {case.name: case for case in CASES}
every_family, a_few_families = (
    pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=names)
    for names in (FAMILIES, FEW)
)


class ConditionalOracle(OracleUNet):
    """The exact network of a mixture that is told a class label an image, NULL for none."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.config.num_class_embeds = NULL + 1
        self.told: list[list[int]] = []  # of each call

    def forward(
        self, sample: torch.Tensor, t: Any, class_labels: torch.Tensor, return_dict: bool = False
    ) -> Any:
        self.told.append(class_labels.tolist())
        output = torch.empty_like(sample)
        for label in class_labels.unique().tolist():
            self.label = None if label == NULL else label
            output[class_labels == label] = super().forward(
                sample[class_labels == label], t, False
            )[0]
        return (output,)


class Spy(Guidance):
    """Another term, whose steps and scores are kept."""

    def __init__(self, term: Guidance):
        super().__init__()
        self.term, self.steps, self.scores = term, [], []
        self.conditions = term.conditions

    def active(self, index: int, count: int, level: NoiseLevel) -> bool:
        return self.term.active(index, count, level)

    def score(self, step: StepContext) -> torch.Tensor:
        self.steps.append(step)
        self.scores.append(self.term.score(step))
        return self.scores[-1]

    @property
    def ratios(self) -> list[float]:
        return [step.level.sigma / step.level.alpha for step in self.steps]


def oracle(case: Case, mixture: Mixture, label: int | None = None, kind: type = OracleUNet) -> Any:
    scheduler = scheduler_of(case)
    clock = (
        Clock(case.clock, scheduler.alphas_cumprod) if case.clock == "ddpm" else Clock(case.clock)
    )
    return kind(mixture, case.prediction, clock, label, case.sigma_data)


def scheduler_of(case: Case) -> Any:
    return getattr(diffusers, case.scheduler)(**case.config)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(IMAGES)]


def guided(
    case: Case, network: torch.nn.Module, label: Any = None, **call: Any
) -> list[torch.Tensor]:
    """The pipeline's sample after each step."""
    states: list[torch.Tensor] = []

    def record(
        pipeline: Any, index: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict:
        states.append(tensors["latents"])
        return {}

    pipeline = quiet(network, scheduler_of(case), id2label={0: "left", 1: "right"})
    pipeline(
        label,
        IMAGES,
        generator=generators(),
        output_type="latent",
        callback_on_step_end=record,
        **{"num_inference_steps": STEPS, "guidance_scale": 0, **case.call, **call},
    )
    return states


def written_out(
    case: Case, output: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
) -> list[torch.Tensor]:
    """The sample after each step of a loop of one's own, with the network's output of (input, t, index)."""
    scheduler, states = scheduler_of(case), []
    call = {"num_inference_steps": STEPS, **case.call}
    scheduler.set_timesteps(call["num_inference_steps"])
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    takes, draws = inspect.signature(scheduler.step).parameters, generators()
    options = {
        name: value
        for name, value in (("eta", call.get("eta", 0.0)), ("generator", draws))
        if name in takes
    }
    x = torch.cat([torch.randn(1, *SHAPE, generator=one, dtype=torch.float64) for one in draws])
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            scaled = (
                scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            )
            x = scheduler.step(output(scaled, t, index), t, x, **options, return_dict=False)[0]
            states.append(x)
    return states


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of the paths, in units of the sample's own standard deviation."""
    return max(
        float((a.double() - b.double()).abs().max()) / max(1.0, float(b.double().std()))
        for a, b in zip(found, expected, strict=True)
    )


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    apart = worst(found, expected)
    assert apart <= tolerance, apart


# trajectories


@every_family
def test_classifier_free_guidance_is_two_calls_written_out(case: Case, mixture: Mixture) -> None:
    """In one, and at two scales of two images each."""
    network, null, label = (
        oracle(case, mixture, one, kind)
        for one, kind in ((None, ConditionalOracle), (None, OracleUNet), (1, OracleUNet))
    )
    w = torch.tensor([1.5, 0.5, 3.0, -0.5])

    def output(x: torch.Tensor, t: torch.Tensor, index: int) -> torch.Tensor:
        told, free = label(x, t).sample, null(x, t).sample
        return told + w.reshape(-1, 1, 1, 1).to(told) * (told - free)

    found, expected = (
        guided(case, network, 1, guidance=ClassifierFreeGuidance(NULL, w)),
        written_out(case, output),
    )
    assert network.told == [[1] * IMAGES + [NULL] * IMAGES] * len(found)
    assert_same(found, expected, ROUNDING)
    assert worst(found, written_out(case, lambda x, t, index: label(x, t).sample)) > 0.05


@a_few_families
def test_two_exact_classifiers_are_the_model_of_both_labels(case: Case) -> None:
    """Of attributes that are independent, and the network knows neither; as two terms, and as a multi-label head."""
    mixture = attributes()
    both = oracle(case, mixture, 2)
    expected = written_out(case, lambda x, t, index: both(x, t).sample)
    terms = ClassifierGuidance(AttributeClassifier(mixture, 0), 1) + ClassifierGuidance(
        AttributeClassifier(mixture, 1), 0
    )
    assert_same(guided(case, oracle(case, mixture), guidance=terms), expected, ROUNDED)
    both.label = 3
    expected = written_out(case, lambda x, t, index: both(x, t).sample)
    term = ClassifierGuidance(AttributeClassifier(mixture, "both"), {0: 1.0, 1: 1.0})
    assert_same(guided(case, oracle(case, mixture), guidance=term), expected, ROUNDED)


@a_few_families
def test_model_guidance_is_two_networks_written_out(case: Case, mixture: Mixture) -> None:
    worse_mixture, w = Mixture(std=0.5), 0.75
    good, worse = (oracle(case, one, 1) for one in (mixture, worse_mixture))

    def output(x: torch.Tensor, t: torch.Tensor, index: int) -> torch.Tensor:
        return (1 + w) * good(x, t).sample - w * worse(x, t).sample

    network, other = (
        oracle(case, one, None, ConditionalOracle) for one in (mixture, worse_mixture)
    )
    found = guided(case, network, 1, guidance=AutoGuidance(other, w))
    assert network.told == other.told == [[1] * IMAGES] * len(found)  # the worse is told the same
    assert other.anchor.requires_grad
    assert_same(found, written_out(case, output), ROUNDING)


@a_few_families
def test_an_energy_of_the_sample_is_the_posteriors_model(case: Case) -> None:
    """Data N(m, s^2 I) seen with noise of std r: p(y | x_t) at every level, and the posterior is a Gaussian, too."""
    s, r, y, m = 0.5, 0.4, normal(*SHAPE, seed=6), 0.5 * normal(1, *SHAPE, seed=8)
    data, gain = mixture_of(m, s), s**2 / (s**2 + r**2)
    posterior = oracle(case, mixture_of(m + gain * (y - m), s * sqrt(1 - gain)), 0)

    def energy(x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        total = (level.alpha * s) ** 2 + level.sigma**2
        x0, variance = (
            m + level.alpha * s**2 / total * (x - level.alpha * m),
            (s * level.sigma) ** 2 / total,
        )
        return (y - x0).square().sum((1, 2, 3)) / (2 * (variance + r**2))

    term = EnergyGuidance(energy, of="sample")
    term.supports_pure_noise = True  # an exact energy stays finite there
    found = guided(case, oracle(case, data, 0), guidance=term)
    assert_same(found, written_out(case, lambda x, t, index: posterior(x, t).sample), ROUNDED)


@a_few_families
@pytest.mark.parametrize("s", [0.5, 1.0])
def test_posterior_sampling_of_a_measurement_is_exact_for_gaussian_data(
    case: Case, s: float
) -> None:
    """The upper half, seen with noise of std r (Chung et al. 2023): with 1 / (2 (v + r^2)) as the scale, v the variance
    of x0 given x_t, the model of the posterior; without the network's Jacobian where the data have unit variance."""
    r, m, y = 0.3, 0.5 * normal(1, *SHAPE, seed=8), normal(1, 2, 4, seed=6)
    upper = torch.zeros(SHAPE, dtype=torch.float64)
    upper[:, :2] = 1
    gain = s**2 / (s**2 + r**2) * upper
    whole = torch.cat([y, torch.zeros_like(y)], dim=1)
    posterior = oracle(case, mixture_of(m + gain * (whole - m), s * (1 - gain).sqrt()), 0)

    def scale(level: NoiseLevel) -> float:
        return 0.5 / ((s * level.sigma) ** 2 / ((level.alpha * s) ** 2 + level.sigma**2) + r**2)

    term = EnergyGuidance(
        lambda x0: (upper * (x0 - whole)).square().sum((1, 2, 3)),
        scale,
        of="x0",
        through_network=s != 1,
    )
    term.supports_pure_noise = True  # an exact network's Jacobian falls as alpha
    found = guided(case, oracle(case, mixture_of(m, s), 0), guidance=term)
    assert_same(found, written_out(case, lambda x, t, index: posterior(x, t).sample), 10 * ROUNDED)


class Seen:
    """In place of a `Mixture`: Gaussian data N(m, s^2 I), and x0 given x_t and y = w . x0 + noise of std r."""

    def __init__(self, data: Mixture, w: torch.Tensor, y: torch.Tensor, r: float):
        self.data, self.w, self.y, self.r = data, w, y, r
        self.means = data.means

    def denoised(
        self, x: torch.Tensor, alpha: float, sigma: float, label: int | None
    ) -> torch.Tensor:
        x0, variance = (
            self.data.denoised(x, alpha, sigma, 0).flatten(1),
            variance_of_x0(self.data.std, alpha, sigma),
        )
        covariance = variance * self.w @ self.w.T + self.r**2 * torch.eye(
            len(self.w), dtype=torch.float64
        )
        gain = variance * self.w.T @ covariance.inverse()
        return (x0 + (self.y - x0 @ self.w.T) @ gain.T).reshape(x.shape)


def variance_of_x0(s: float, alpha: float, sigma: float) -> float:
    """Given x_t, of data of standard deviation s."""
    return (s * sigma) ** 2 / ((alpha * s) ** 2 + sigma**2)


@a_few_families
def test_an_exact_regressor_is_the_model_of_its_target(case: Case) -> None:
    """Of what is linear in x0, seen with noise: the std of its targets, given x_t, is another at each level."""
    s, r, std, y = 0.5, 0.2, 0.7, normal(IMAGES, 2, seed=4)
    data, w = (
        mixture_of(0.5 * normal(1, *SHAPE, seed=2), s),
        torch.linalg.qr(normal(16, 2, seed=3)).Q.T,
    )

    def scale(level: NoiseLevel) -> float:
        return std**2 / (variance_of_x0(s, level.alpha, level.sigma) + r**2)

    posterior = oracle(case, Seen(data, w, y, r), 0)
    expected = written_out(case, lambda x, t, index: posterior(x, t).sample)
    found = guided(
        case,
        oracle(case, data, 0),
        guidance=ClassifierGuidance(Regressor(data, w), target=y, std=std, scale=scale),
    )
    assert_same(
        found, expected, 10 * ROUNDED
    )  # a flow begins beyond the regressor's noisiest level
    free = oracle(case, data, 0)
    assert worst(found, written_out(case, lambda x, t, index: free(x, t).sample)) > 0.05


class Tempered:
    """In place of a `Mixture`: what Tweedie's formula makes of its score, tilted by the two temperatures where told."""

    def __init__(self, mixture: Mixture, joint: float, marginal: float, high: float):
        self.mixture, self.joint, self.marginal, self.high = mixture, joint, marginal, high
        self.means = mixture.means

    def denoised(
        self, x: torch.Tensor, alpha: float, sigma: float, label: int | None
    ) -> torch.Tensor:
        """score + joint grad f_label - marginal sum_k softmax(marginal f)_k grad f_k, f = log p(k) p(x_t | k)."""
        x0 = self.mixture.denoised(x, alpha, sigma, None)
        if sigma / alpha > self.high:
            return x0
        slopes = (alpha * self.mixture.means - x[:, None]) / (
            (alpha * self.mixture.std) ** 2 + sigma**2
        )
        weights = (self.marginal * self.mixture.log_joint(x, alpha, sigma)).softmax(-1)[
            :, :, None, None, None
        ]
        tilt = self.joint * slopes[:, label] - self.marginal * (weights * slopes).sum(1)
        return x0 + sigma**2 / alpha * tilt


@a_few_families
@pytest.mark.parametrize(("joint", "marginal"), [(1.0, 0.5), (1.3, 1.0), (0.8, 0.0)])
def test_temperatures_tilt_the_exact_score(
    case: Case, mixture: Mixture, joint: float, marginal: float
) -> None:
    """Up to the ratio 50: where there is hardly a signal, unequal temperatures have no limit."""
    tempered = oracle(case, Tempered(mixture, joint, marginal, 50.0), 1)
    expected = written_out(case, lambda x, t, index: tempered(x, t).sample)
    term = ClassifierGuidance(
        OracleClassifier(mixture),
        1,
        sigma_interval=(0, 50),
        joint_temperature=joint,
        marginal_temperature=marginal,
    )
    found = guided(case, oracle(case, mixture), guidance=term)
    assert_same(found, expected, ROUNDED)
    exact = oracle(case, Tempered(mixture, 1.0, 1.0, 50.0), 1)
    assert worst(found, written_out(case, lambda x, t, index: exact(x, t).sample)) > 0.01


# in which steps


def test_a_sigma_interval_is_of_noise_to_signal_ratios_for_every_scheduler(
    mixture: Mixture,
) -> None:
    """The same ratios as variance preserving, k-diffusion's and flow schedulers have them: the same steps."""
    times = [900, 700, 500, 300, 200, 100, 20]
    ratios = [sigma / alpha for alpha, sigma in map(Clock(), times)]
    for scheduler, own, prediction, clock in (
        (DDPMScheduler(clip_sample=False), {"timesteps": times}, "v_prediction", Clock()),
        (EulerDiscreteScheduler(), {"sigmas": [*ratios, 0.0]}, "v_prediction", Clock()),
        (
            FlowMatchEulerDiscreteScheduler(),
            {"sigmas": [r / (1 + r) for r in ratios]},
            "flow",
            Clock("flow"),
        ),
    ):
        if prediction != "flow":
            scheduler.register_to_config(prediction_type=prediction)
        for low, high, acting in (
            (0.3, 5.0, ratios[2:6]),
            (5.0, float("inf"), ratios[:2]),
            (0.0, 0.2, ratios[6:]),
            (20.0, 30.0, []),
            (1.5, 1.5, []),
        ):
            spy = Spy(Pull(0.01, sigma_interval=(low, high)))
            sample(quiet(OracleUNet(mixture, prediction, clock), scheduler), guidance=spy, **own)
            assert spy.ratios == pytest.approx(acting, rel=1e-3)


@a_few_families
def test_a_sigma_interval_is_open_below_and_closed_above(case: Case, mixture: Mixture) -> None:
    """Low < sigma / alpha <= high, in every family; the rest of the steps are the network's own."""
    scheduler = scheduler_of(case)
    scheduler.set_timesteps(STEPS)
    ratios = sorted({level.sigma / level.alpha for level in noise_levels(scheduler)})
    low, high = ratios[1], ratios[-3]
    label, null = (oracle(case, mixture, one) for one in (1, None))
    acts = [low < level.sigma / level.alpha <= high for level in noise_levels(scheduler)]
    network = oracle(case, mixture, None, ConditionalOracle)
    found = guided(
        case, network, 1, guidance=ClassifierFreeGuidance(NULL, 2.0, sigma_interval=(low, high))
    )
    assert [len(told) == 2 * IMAGES for told in network.told] == acts and 0 < sum(acts) < len(
        acts
    ) - 2

    def output(x: torch.Tensor, t: torch.Tensor, index: int) -> torch.Tensor:
        return label(x, t).sample + 2 * acts[index] * (label(x, t).sample - null(x, t).sample)

    assert_same(found, written_out(case, output), ROUNDING)


@a_few_families
def test_a_scale_that_is_a_function_is_asked_at_every_level(case: Case, mixture: Mixture) -> None:
    """One per image of each level, against a loop with these numbers; where all are 0 the term isn't asked."""
    scheduler = scheduler_of(case)
    scheduler.set_timesteps(STEPS)
    numbers = [
        [0.0] * IMAGES
        if 0.5 < level.sigma / level.alpha < 3
        else [i * level.sigma / (level.alpha + level.sigma) for i in range(IMAGES)]
        for level in noise_levels(scheduler)
    ]
    numbers = torch.tensor(numbers)

    def scale(level: NoiseLevel) -> torch.Tensor:
        ratio = level.sigma / level.alpha
        return (
            (not 0.5 < ratio < 3) * torch.arange(IMAGES) * level.sigma / (level.alpha + level.sigma)
        )

    label, null = (oracle(case, mixture, one) for one in (1, None))
    network, classifier = oracle(case, mixture, None, ConditionalOracle), OracleClassifier(mixture)

    def output(x: torch.Tensor, t: torch.Tensor, index: int) -> torch.Tensor:
        w = numbers[index].reshape(-1, 1, 1, 1).to(x)
        return (1 + w) * label(x, t).sample - w * null(x, t).sample

    found = guided(case, network, 1, guidance=ClassifierFreeGuidance(NULL, scale))
    assert_same(found, written_out(case, output), ROUNDED)
    asked = numbers.any(dim=1)
    assert [len(told) == 2 * IMAGES for told in network.told] == asked.tolist() and 0 < int(
        asked.sum()
    ) < len(found)
    guided(case, null, guidance=ClassifierGuidance(classifier, 1, scale))
    assert classifier.calls == int(asked.sum())


def test_terms_of_a_sum_keep_their_scales_and_intervals(mixture: Mixture) -> None:
    """Two of classifier-free guidance, in the order of the run, and by ratio: each with its own prediction."""
    case = BY_NAME["DDIM v_prediction"]
    scheduler = scheduler_of(case)
    scheduler.set_timesteps(STEPS)
    ratios = [level.sigma / level.alpha for level in noise_levels(scheduler)]
    terms = (
        ClassifierFreeGuidance(NULL, 1.0, 0.0, 0.5)
        + Pull(0.0)
        + ClassifierFreeGuidance(
            {"class_labels": torch.tensor([0])}, 2.0, sigma_interval=(0.2, 20.0)
        )
    )
    network, (label, null, other) = (
        oracle(case, mixture, None, ConditionalOracle),
        (oracle(case, mixture, one) for one in (1, None, 0)),
    )

    def output(x: torch.Tensor, t: torch.Tensor, index: int) -> torch.Tensor:
        one, w, v = label(x, t).sample, 1.0 * (index < 5), 2.0 * (0.2 < ratios[index] <= 20.0)
        return one + w * (one - null(x, t).sample) + v * (one - other(x, t).sample)

    assert_same(guided(case, network, 1, guidance=terms), written_out(case, output), ROUNDING)
    assert {len(told) // IMAGES for told in network.told} == {1, 2, 3}  # none, one and both act


# scales and intervals


def terms_of(mixture: Mixture, **arguments: Any) -> list[Guidance]:
    """One of each kind."""
    classifier = OracleClassifier(mixture)
    return [
        Pull(**arguments),
        ClassifierFreeGuidance(2, **arguments),
        ClassifierGuidance(classifier, 1, **arguments),
        AutoGuidance(classifier, **arguments),
        EnergyGuidance(lambda x0: x0, **arguments),
    ]


def test_every_kind_of_term_acts_in_its_interval(mixture: Mixture) -> None:
    levels = [level_at(ratio) for ratio in (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)]
    for arguments, acting in (
        ({"start": 0.25, "stop": 0.625}, [2, 3, 4]),
        ({"scale": 0.0}, []),
        ({}, [*range(8)]),
        ({"scale": [0.0, 2.0]}, [*range(8)]),
        ({"scale": lambda level: 0.0}, []),
        ({"sigma_interval": (0.3, 1.5)}, [3, 4]),
    ):
        for term in terms_of(mixture, **arguments):
            assert [i for i, level in enumerate(levels) if term.active(i, 8, level)] == acting, (
                type(term)
            )
            assert not term.active(3, 8, NoiseLevel(1.0, 0.0, 1.0, 1.0))  # no noise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sigma_interval": (0.1, 2.0), "start": 0.2},
            r"sigma_interval=\(0.1, 2.0\) with start=0.2, stop=1.0: only one",
        ),
        (
            {"sigma_interval": (0.1, 2.0), "stop": 0.2},
            "with start=0.0, stop=0.2: only one of the two kinds is allowed",
        ),
        (
            {"sigma_interval": (2.0, 1.0)},
            r"sigma_interval=\(2.0, 1.0\): \(low, high\) with 0 <= low <= high is allowed",
        ),
        ({"sigma_interval": (-1.0, 1.0)}, r"sigma_interval=\(-1.0, 1.0\)"),
        ({"sigma_interval": (1.0,)}, "sigma_interval"),
        ({"sigma_interval": (float("nan"), 1.0)}, "sigma_interval"),
    ],
)
def test_wrong_sigma_intervals_are_refused(mixture: Mixture, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        terms_of(mixture, **arguments)
    for term in (ClassifierFreeGuidance, AutoGuidance, EnergyGuidance):
        with pytest.raises(ValueError, match=message):
            term(2, **arguments)


def test_a_scale_that_is_a_function_gives_its_numbers(mixture: Mixture) -> None:
    """One for all, or one per image, of the level's alpha and sigma; 0 is off, and what is no number is refused."""
    classifier = small_classifier().double()
    for ratio in RATIOS:
        level = level_at(ratio, "flow")
        step = step_at(level, normal(3, 1, 8, 8))
        each = [ratio, 0.0, -1.0]
        for function, numbers in (
            (lambda level: level.sigma / level.alpha, ratio),
            (lambda level: each, each),  # noqa: B023
            (lambda level: torch.tensor(each), each),  # noqa: B023
        ):
            found = ClassifierGuidance(classifier, 1, function).score(step)
            assert torch.equal(found, ClassifierGuidance(classifier, 1, numbers).score(step))
    assert Pull(lambda level: [0.0, 1.0]).active(0, 10, level) and not Pull(
        lambda level: [0, 0]
    ).active(0, 10, level)
    for wrong in (float("nan"), [1.0, float("inf")], [[1.0]]):
        with pytest.raises(
            ValueError, match="scale=.*: a finite number or one per image is allowed"
        ):
            Pull(lambda level, wrong=wrong: wrong).active(0, 10, level)
    with pytest.raises(ValueError, match="scale holds 2 numbers for 3 images"):
        Pull(lambda level: [1.0, 2.0]).score(step)


# classifier_free_scale of the pipeline

TOLD = {"num_class_embeds": 4}  # three labels and the null label, 3


def test_classifier_free_scale_is_the_term(tmp_path: Path) -> None:
    """One number, one per label or one per image; the pipeline's own in `defaults`, which are saved with it."""
    unet, classifier = small_unet(**TOLD), small_classifier()
    pipeline, calls = quiet(unet, DDIMScheduler(clip_sample=False), classifier), counted(unet)
    call: dict[str, Any] = {
        "label": ["cat", "owl"],
        "num_images_per_label": 2,
        "num_inference_steps": 4,
    }
    off = sample(pipeline, **call)
    assert calls == [4] * 4 and torch.equal(sample(pipeline, **call, classifier_free_scale=0), off)
    for given, each in (
        (2.0, 2.0),
        ([2.0, 0.5], [2.0, 2.0, 0.5, 0.5]),
        ([1.0, 2.0, 0.0, 4.0], [1.0, 2.0, 0.0, 4.0]),
    ):
        del calls[:]
        found = sample(pipeline, **call, classifier_free_scale=given)
        assert calls == [8] * 4 and (found - off).abs().max() > 1e-3
        assert torch.equal(
            found, sample(pipeline, **call, guidance=ClassifierFreeGuidance(3, each))
        )
    torch.testing.assert_close(found[2], off[2])  # the image whose scale is 0

    own = ClassifierGuidedPipeline(
        unet, pipeline.scheduler, classifier, defaults={"classifier_free_scale": 2.0}
    )
    own.save_pretrained(tmp_path)
    for pipeline_of_2 in (own, ClassifierGuidedPipeline.from_pretrained(tmp_path)):
        pipeline_of_2.set_progress_bar_config(disable=True)
        assert torch.equal(
            sample(pipeline_of_2, **call), sample(pipeline, **call, classifier_free_scale=2.0)
        )
        assert torch.equal(sample(pipeline_of_2, **call, classifier_free_scale=0), off)
        mixture_of_labels = {
            "label": {"cat": 1.0, "dog": 1.0},
            "num_inference_steps": 2,
        }  # hidden from the network
        assert torch.equal(
            sample(pipeline_of_2, **mixture_of_labels), sample(pipeline, **mixture_of_labels)
        )
    assert sample(own, num_inference_steps=2).shape == (
        1,
        1,
        8,
        8,
    )  # without a label there is nothing to steer to


@pytest.mark.parametrize(
    ("config", "label", "more", "message"),
    [
        (
            {},
            "cat",
            {},
            r"classifier_free_scale=2.0 needs a class-conditional network with a null label, one class embedd",
        ),
        ({"num_class_embeds": 3}, "cat", {}, "needs a class-conditional network with a null label"),
        (
            TOLD,
            {"cat": 0.5, "owl": 0.5},
            {},
            "needs a network that gets a label; mixtures and conditional=False hide",
        ),
        (
            TOLD,
            "cat",
            {"conditional": False},
            "classifier_free_scale=2.0 needs a network that gets a label",
        ),
        (TOLD, None, {}, "guidance_scale=None, classifier_free_scale=2.0 need a label to steer to"),
        (
            TOLD,
            "cat",
            {"classifier_free_scale": [1.0, 2.0]},
            r"classifier_free_scale has shape \(2,\); a number, or one per label or image \(1 or 1\), is allowed",
        ),
        (
            TOLD,
            "cat",
            {"classifier_free_scale": float("nan")},
            "classifier_free_scale=nan: a finite number or one per image is all",
        ),
        (
            TOLD,
            "cat",
            {
                "classifier_free_scale": 0,
                "guidance": ClassifierFreeGuidance({"text": torch.zeros(1)}),
            },
            r"guidance: a term has conditions \['text'\]; the network takes \['class_labels'\]",
        ),
    ],
)
def test_classifier_free_scale_without_effect_is_refused(
    config: dict, label: Any, more: dict, message: str
) -> None:
    pipeline = quiet(small_unet(**config), DDIMScheduler(), small_classifier())
    with pytest.raises(ValueError, match=message):
        sample(pipeline, label, num_inference_steps=2, **{"classifier_free_scale": 2.0, **more})

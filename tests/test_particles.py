"""Populations: unbiased evidence, exact weights, whole populations reproducible, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Clock
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
)
from test_guidance import quiet, small_classifier, small_unet
from torch.utils._python_dispatch import TorchDispatchMode

import guided_diffusers.particles as particles_module
from guided_diffusers import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    EnergyGuidance,
    Guidance,
    StepContext,
)
from guided_diffusers.defaults import DEFAULTS
from guided_diffusers.diagnosis import GuidanceDiagnostics
from guided_diffusers.particles import Population, systematic
from guided_diffusers.speed import optimize

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDPM": (DDPMScheduler(**BETAS, clip_sample=False), {}),
    "DDIM": (DDIMScheduler(**BETAS, clip_sample=False), {"eta": 1.0}),
    "EulerAncestral": (EulerAncestralDiscreteScheduler(**BETAS), {}),
    "DPM++ SDE": (DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++"), {}),
}


class Corners:
    """Four Gaussians at (+-1, +-1), of which the first has label 0: p(label 0) = 1/4 by symmetry,
    also of the samples of any scheduler."""

    def __init__(self, std: float = 0.5):
        corners = [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]
        self.means, self.std = torch.tensor(corners, dtype=torch.float64), std

    def log_joint(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """log p(x, k) up to a constant, (B, 4)."""
        distance = (x.double().reshape(-1, 1, 2) - alpha * self.means).square().sum(-1)
        return -distance / (2 * ((alpha * self.std) ** 2 + sigma**2))

    def denoised(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        gain = alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2)
        each = self.means + gain * (x.double().reshape(-1, 1, 2) - alpha * self.means)
        weights = self.log_joint(x, alpha, sigma).softmax(-1)
        return (weights[..., None] * each).sum(1).reshape(x.shape)


class Network(torch.nn.Module):
    """The exact prediction of eps; samples are (B, 1, 1, 2)."""

    def __init__(self, data: Corners):
        super().__init__()
        self.data, self.clock, self.calls = data, Clock(), 0
        self.anchor = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.config = SimpleNamespace(sample_size=(1, 2), in_channels=1)

    def forward(self, x: torch.Tensor, t: Any, return_dict: bool = True) -> Any:
        self.calls += 1
        alpha, sigma = self.clock(t)
        return ((x - alpha * self.data.denoised(x, alpha, sigma)) / sigma,)


class Classifier(torch.nn.Module):
    """The exact p(label | z) of label 0, the first corner, and label 1, the others."""

    def __init__(self, data: Corners):
        super().__init__()
        self.data, self.clock, self.calls = data, Clock(), 0
        self.config = {"num_train_timesteps": 1000, "beta_schedule": "linear", "num_labels": 2}

    def forward(self, z: torch.Tensor, t: float) -> Any:
        self.calls += 1
        joint = self.data.log_joint(z, *self.clock(t))
        return SimpleNamespace(logits=torch.stack([joint[:, 0], joint[:, 1:].logsumexp(1)], 1))


def make(name: str = "DDPM", std: float = 0.5) -> tuple[ClassifierGuidedPipeline, dict[str, Any]]:
    data, (scheduler, call) = Corners(std), SCHEDULERS[name]
    scheduler = type(scheduler).from_config(scheduler.config)
    pipeline = ClassifierGuidedPipeline(Network(data), scheduler, Classifier(data))
    pipeline.set_progress_bar_config(disable=True)
    call = {"output_type": "latent", "num_inference_steps": 25, **call}
    return pipeline, call


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(indices: range) -> list[torch.Generator]:
    return [seeded(100 + i) for i in indices]


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("particles", "resample"), [(4, True), (4, False), (64, True)])
def test_the_evidence_is_unbiased(name: str, particles: int, resample: bool) -> None:
    """p(label 0) = 1/4, by symmetry, of the samples of any scheduler in any number of steps."""
    pipeline, call = make(name)
    populations = 300 if particles == 4 else 60
    call |= {"particles": particles, "resample": resample, "generator": seeded(3)}
    result = pipeline(0, populations * particles, **call)
    evidence = result.log_evidence.exp()
    error = evidence.std() / populations**0.5
    assert error < 0.015 and abs(evidence.mean() - 0.25) < 3 * error, (evidence.mean(), error)
    weights = result.log_weights.exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(populations, dtype=torch.float64))
    if resample:
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / particles))


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_any_scale_samples_the_same_density(scale: float) -> None:
    """The mean of x p(label 0 | x) over unguided samples is that of the population's, times 1/4."""
    pipeline, call = make()
    free = pipeline(0, 20_000, guidance_scale=0.0, generator=seeded(1), **call).images
    p = pipeline.classifier(free, 0.0).logits.softmax(-1)[:, 0]
    expected = (p[:, None] * free.flatten(1)).mean(0) / p.mean()
    call |= {"particles": 32, "guidance_scale": scale, "generator": seeded(2)}
    weighted = pipeline(0, 100 * 32, resample=False, **call)
    weights = weighted.log_weights.exp()
    found = (weights[..., None] * weighted.images.reshape(100, 32, 2)).sum(1)
    error = found.std(0) / 100**0.5
    # a population's mean has a bias of order 1 / K, which 0.01 allows for
    assert ((found.mean(0) - expected).abs() < 3 * error + 0.01).all(), (found.mean(0), expected)
    evidence = weighted.log_evidence.exp()
    assert abs(evidence.mean() - 0.25) < 3 * evidence.std() / 10


def test_log_p_minus_log_q_is_that_of_the_ddpm_posteriors() -> None:
    """All steps of a run, written out by eqs. 6 and 7 of Ho et al. 2020; resampled at its end."""
    pipeline, call = make()
    steps: list[dict[str, torch.Tensor]] = []

    def keep(pipeline: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict:
        steps.append({**tensors, "t": t})
        return {}

    names = ["latents", "score_shift", "sample", "x0"]
    call |= {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": names}
    result = pipeline(0, particles=1, generator=seeded(), **call)

    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    log_weight = 0.0
    for step, following in zip(steps[:-1], steps[1:], strict=True):
        a_t, a_s = abar[step["t"]], abar[following["t"]]
        beta = 1 - a_t / a_s
        variance = beta * (1 - a_s) / (1 - a_t)
        x0, x_t, x_s = (step[name].double() for name in ("x0", "sample", "latents"))
        mean = a_s.sqrt() * beta * x0 + (a_t / a_s).sqrt() * (1 - a_s) * x_t
        p = torch.distributions.Normal(mean / (1 - a_t), variance.sqrt())
        q = torch.distributions.Normal(p.mean + variance * step["score_shift"], variance.sqrt())
        log_weight += (p.log_prob(x_s) - q.log_prob(x_s)).sum()
    assert steps[-1]["score_shift"] is None  # the last step draws no noise
    log_weight += pipeline.classifier(result.images, 0.0).logits.log_softmax(-1)[0, 0]
    torch.testing.assert_close(result.log_evidence[0], log_weight, rtol=1e-4, atol=1e-4)


def test_an_energy_that_is_log_linear_has_constant_weights() -> None:
    """x0 ~ N(0, 1) has x_t ~ N(0, 1); exp(c x0) tilts it to N(c, 1), with evidence exp(c^2 / 2), and
    its exact twist is exp(c alpha x_t + c^2 sigma^2 / 2). With many steps weights hardly vary."""
    data, c = Corners(), 0.7
    data.means, data.std = torch.zeros(1, 2, dtype=torch.float64), 1.0

    def energy(x: torch.Tensor, level: Any) -> torch.Tensor:
        noise = level.sigma**2 / (level.alpha**2 + level.sigma**2)
        return -(c * level.alpha * x.flatten(1).sum(1) + c**2 * noise)

    pipeline, call = make()
    pipeline.unet.data = data
    term = EnergyGuidance(energy, of="sample")
    call |= {"guidance": term, "num_inference_steps": 250, "generator": seeded()}
    result = pipeline(None, 200, particles=100, resample=False, **call)
    assert result.effective_sample_size.min() > 95
    assert (result.log_evidence - c**2).abs().max() < 0.05
    assert (result.images.mean((0, 1, 2)) - c).abs().max() < 3 / 200**0.5


def test_systematic_resampling_counts() -> None:
    weights = torch.rand(200, 16, generator=seeded(), dtype=torch.float64).softmax(1)
    uniform = torch.linspace(0, 1, 201, dtype=torch.float64)[:-1]
    for row in (0, 7):
        repeated = weights[row].repeat(200, 1)
        counts = torch.nn.functional.one_hot(systematic(repeated, uniform), 16).sum(1)
        assert (counts >= (16 * weights[row]).floor()).all()
        assert (counts <= (16 * weights[row]).ceil()).all()
        torch.testing.assert_close(counts.double().mean(0), 16 * weights[row], atol=0.02, rtol=0)


# ---------------------------------------------------------------- what a run is


def test_one_particle_is_guidance_by_the_mean_with_a_weight() -> None:
    pipeline, call = make()
    with_weight = pipeline(0, 6, particles=1, generator=seeded(), **call)
    plain = pipeline(0, 6, guidance_algorithm="mean", generator=seeded(), **call)
    torch.testing.assert_close(with_weight.images, plain.images)
    assert with_weight.log_weights.shape == (6, 1) and not with_weight.log_weights.any()
    assert with_weight.settings["mode"] == "particles" and plain.log_weights is None


@pytest.mark.parametrize("name", ["DDPM", "DPM++ SDE"])
def test_a_population_is_the_same_in_any_batch(name: str) -> None:
    pipeline, call = make(name)
    call |= {"particles": 8}
    together = pipeline([0, 1, 0], generator=generators(range(24)), **call)
    assert len(together.images) == 24  # as many as particles, where not given
    assert together.settings["guidance_algorithm"] == "mean"
    for p, label in enumerate([0, 1, 0]):
        own = range(8 * p, 8 * p + 8)
        alone = pipeline(label, generator=generators(own), **call)
        torch.testing.assert_close(together.images[own], alone.images)
        torch.testing.assert_close(together.log_evidence[p : p + 1], alone.log_evidence)
        assert torch.equal(together.ancestors[p : p + 1], alone.ancestors)


def test_resampling_takes_the_images_by_their_weights() -> None:
    """With and without the resampling at the end, all before it is the same."""
    pipeline, call = make()
    call |= {"particles": 16, "num_images_per_label": 32}
    weighted = pipeline(0, resample=False, generator=seeded(), **call)
    equal = pipeline(0, generator=seeded(), **call)
    assert torch.equal(weighted.log_evidence, equal.log_evidence)
    assert torch.equal(weighted.effective_sample_size, equal.effective_sample_size)
    weights = weighted.log_weights.exp()
    size = 1 / weights.square().sum(1)
    torch.testing.assert_close(weighted.effective_sample_size, size)
    for p, own in enumerate((slice(0, 16), slice(16, 32))):
        same = (equal.images[own, None] == weighted.images[None, own]).flatten(2).all(2)
        assert (same.sum(1) == 1).all()
        counts, expected = same.sum(0), 16 * weights[p]
        assert ((counts - expected).abs() < 1).all() and (counts != 1).any()
        picked = same.long().argmax(1)
        assert torch.equal(weighted.ancestors[p][picked], equal.ancestors[p])


def test_history_is_resampled_with_the_samples() -> None:
    """A multistep scheduler's earlier outputs: in a population whose weights are one, all particles
    are copies of one sample with one history, and differ by the noise of one step only."""
    pipeline, call = make("DPM++ SDE")
    kept: list[torch.Tensor] = []

    class One(EnergyGuidance):
        """All weight for the first image, once."""

        def log_factor(self, step: StepContext) -> torch.Tensor:
            value = torch.zeros(len(step.sample))
            if step.index == 10:
                value[1:] = -1e4
            return value

        def score(self, step: StepContext) -> torch.Tensor:
            return torch.zeros_like(step.sample)

    def keep(pipeline: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict:
        kept.append(tensors["sample"])
        history = pipeline.scheduler.model_outputs[0]
        if index == 10:
            assert len(history.unique(dim=0)) == 1 and len(tensors["sample"].unique(dim=0)) == 1
            assert len(tensors["x0"].unique(dim=0)) == 1
        elif index not in (0, 11):  # without history; with that of one sample
            assert len(history.unique(dim=0)) == 8
        return {}

    call |= {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["sample", "x0"]}
    term = One(lambda x0: x0)
    result = pipeline(None, particles=8, guidance=term, generator=seeded(), **call)
    assert len(kept) == 25 and not result.ancestors.any()


def test_no_evaluation_but_one_value_at_the_end_and_the_scheduler_as_before() -> None:
    pipeline, call = make()
    config, unet, classifier = dict(pipeline.scheduler.config), pipeline.unet, pipeline.classifier
    result = pipeline(0, particles=4, generator=seeded(), **call)
    # the last of 25 steps draws no noise, and so has no guidance
    assert unet.calls == 25 and classifier.calls == 24 + 1 and result.guidance_evaluations == 24
    assert dict(pipeline.scheduler.config) == config
    names = set(vars(pipeline.scheduler))
    plain, _ = make()
    plain(0, generator=seeded(), **call)
    assert names == set(vars(plain.scheduler))


def test_terms_with_intervals_and_scores_of_their_own_are_weighted() -> None:
    """A term that is active in part of the run, one that overrides `score`, and one twice."""

    class Own(ClassifierGuidance):
        def score(self, step: StepContext) -> torch.Tensor:
            return 0.5 * self.scale_at(step) * step.score

    pipeline, call = make()
    both = {0: 0.5}
    sums = [
        ClassifierGuidance(pipeline.classifier, 0, start=0.3, stop=0.8),
        Own(pipeline.classifier, 0, scale=1e-3),
        ClassifierGuidance(pipeline.classifier, both)
        + ClassifierGuidance(pipeline.classifier, both),
    ]
    for term in sums:
        call |= {"particles": 64, "guidance": term, "generator": seeded(5)}
        evidence = pipeline(None, 64 * 50, **call).log_evidence.exp()
        assert abs(evidence.mean() - 0.25) < 3 * evidence.std() / 50**0.5


def test_without_a_generator_torch_seeds_it() -> None:
    pipeline, call = make()
    torch.manual_seed(7)
    first, second = (pipeline(0, particles=4, **call).images for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(pipeline(0, particles=4, **call).images, first)
    assert not torch.equal(first, second)


def small(scheduler: Any) -> ClassifierGuidedPipeline:
    return quiet(small_unet(), scheduler, small_classifier())


@pytest.mark.parametrize("how", ["chunks", "bfloat16", "offloading", "from_pipe"])
def test_populations_of_a_pipeline_that_is_made_faster_smaller_or_shared(how: str) -> None:
    """The images, weights and ancestors are those of the pipeline as it is."""
    scheduler = DDPMScheduler(clip_sample=False)
    call = {"particles": 4, "num_inference_steps": 4, "output_type": "latent"}
    plain, other = small(scheduler), small(scheduler)
    expected = plain(["cat", "owl"], generator=seeded(), **call)
    if how == "offloading":
        other.enable_model_cpu_offload(device="cpu")
        assert all(
            type(m._hf_hook).__name__ == "CpuOffload" for m in (other.unet, other.classifier)
        )
    if how == "from_pipe":
        ddim = small(DDIMScheduler(clip_sample=False))
        other = ClassifierGuidedPipeline.from_pipe(ddim, scheduler=scheduler)
        other.set_progress_bar_config(disable=True)
    faster: dict[str, dict[str, Any]] = {
        "chunks": {"dtype": torch.float32, "chunk_size": 3},
        "bfloat16": {"dtype": torch.bfloat16},
    }
    with optimize(other, **faster[how]) if how in faster else nullcontext(other):
        result = other(["cat", "owl"], generator=seeded(), **call)
    error = (result.log_evidence - expected.log_evidence).abs().max()
    assert error < (0.05 if how == "bfloat16" else 1e-4)
    if how == "bfloat16":  # other noise gives images that differ by 86, at a deviation of 19
        assert 0 < (result.images - expected.images).abs().max() < 0.5
    else:
        torch.testing.assert_close(result.images, expected.images, atol=1e-4, rtol=1e-4)
        assert torch.equal(result.ancestors, expected.ancestors)


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the device meta, as MPS does; what comes to the CPU from there is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else None
        to_cpu = str(kwargs.get("device")) == "cpu" and isinstance(source, torch.Tensor)
        if to_cpu and source.device.type == "meta":
            self.copies += 1
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        result = function(*args, **kwargs)
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                assert tensor.dtype != torch.float64, function
        return result


def test_no_float64_on_a_device_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a population computes; weights in float64 are on the CPU."""
    monkeypatch.setattr(particles_module, "WITHOUT_FLOAT64", ("meta",))
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(5)
    term = EnergyGuidance(lambda x0: x0.flatten(1).sum(1))
    x = torch.zeros(8, 1, 1, 2, device="meta")
    with NoFloat64() as mode:
        population = Population(scheduler, [term], x, seeded(), 4)
        for index in range(5):
            if population.start_step(index):
                assert population.weigh([0], [torch.zeros(8, device="meta")]) is None
                assert population.mean_shift(torch.ones_like(x)).shape == x.shape
        order = population.finish([torch.zeros(8, device="meta")])
    assert order.device.type == "meta" and mode.copies == 9
    assert population.log_weights.device.type == "cpu"
    assert population.log_weights.dtype == torch.float64
    # and the weights themselves are those of float64, up to the rounding of a sum in float32
    results = []
    for kinds in ((), ("cpu",)):
        monkeypatch.setattr(particles_module, "WITHOUT_FLOAT64", kinds)
        pipeline, call = make()
        call |= {"particles": 16, "num_images_per_label": 32, "resample": False}
        pipeline.unet.float()
        results.append(pipeline(0, generator=seeded(), **call))
    torch.testing.assert_close(results[0].log_weights, results[1].log_weights, atol=1e-4, rtol=0)
    torch.testing.assert_close(results[0].log_evidence, results[1].log_evidence, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "name", ["guidance_every", "guidance_tolerance", "guidance_algorithm", "classifier_free_scale"]
)
def test_a_preset_of_populations_has_what_acts_on_them(name: str) -> None:
    value = "mean" if name == "guidance_algorithm" else 2
    networks = small_unet(), DDPMScheduler(), small_classifier()
    with pytest.raises(
        ValueError, match=f"modes: particles: {name}=.* has no effect on populations"
    ):
        ClassifierGuidedPipeline(*networks, defaults={"modes": {"particles": {name: value}}})
    preset = {"guidance_scale": 0.5, "num_inference_steps": 3, "guidance_stop": 0.9}
    for neutral in (None, DEFAULTS[name]):
        modes = {"particles": {**preset, name: neutral}}
        pipeline = ClassifierGuidedPipeline(*networks, defaults={"modes": modes})
    pipeline.set_progress_bar_config(disable=True)
    settings = pipeline("cat", particles=2, output_type="latent").settings
    assert preset.items() <= settings.items()


def test_a_record_of_the_steps_of_images_is_refused() -> None:
    pipeline, call = make()
    call |= {"particles": 4, "generator": seeded()}
    record = GuidanceDiagnostics(0)
    with pytest.raises(ValueError, match="particles=4: GuidanceDiagnostics follows each image"):
        pipeline(0, callback_on_step_end=record, **call)
    term = ClassifierGuidance(pipeline.classifier, 0)
    with pytest.raises(ValueError, match="particles=4: GuidanceDiagnostics follows each image"):
        pipeline(None, guidance=list(record.watch(term)), **call)
    call.pop("particles")
    pipeline(0, callback_on_step_end=record, **call)  # pipeline.particles is of this call
    assert pipeline.particles is None and len(record.steps()) == 25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"particles": 0}, "particles=0: an integer of at least 1|particles=0: "),
        ({"particles": 3, "num_images_per_label": 4}, "num_images_per_label=4, particles=3: whole"),
        ({"resample": False}, "resample=False has no effect without particles"),
        ({"particles": 4, "guidance_every": 2}, "guidance_every=2: with particles"),
        ({"particles": 4, "guidance_tolerance": 0.1}, "guidance_tolerance=0.1: with particles"),
        (
            {"particles": 4, "guidance_algorithm": "strang"},
            "guidance_algorithm='strang': with part",
        ),
        ({"particles": 4, "guidance_scale": 0.0}, "particles=4 are weighted by the terms"),
        (
            {"particles": 4, "guidance": ClassifierFreeGuidance({"class_labels": torch.ones(1)})},
            "guidance: a term has conditions",
        ),
    ],
)
def test_calls_without_meaning_are_refused(call: dict[str, Any], message: str) -> None:
    pipeline, options = make()
    with pytest.raises(ValueError, match=message):
        pipeline(0, generator=seeded(), **{**options, **call})
    assert not pipeline.unet.calls


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(**BETAS), "DDIMScheduler adds no noise in step 0 of 25.*eta=1"),
        (DPMSolverMultistepScheduler(**BETAS), "DPMSolverMultistepScheduler adds no noise"),
        (SASolverScheduler(**BETAS), "SASolverScheduler"),
        (DDPMScheduler(**BETAS, variance_type="learned_range"), "'fixed_small'"),
    ],
)
def test_schedulers_without_a_gaussian_step_are_refused(scheduler: Any, message: str) -> None:
    pipeline, call = make()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=f"particles=4: .*{message}"):
        pipeline(0, particles=4, generator=seeded(), **call)
    assert not pipeline.unet.calls


def test_any_scheduler_with_a_gaussian_step_is_read() -> None:
    pipeline, call = make()
    pipeline.scheduler = LCMScheduler(**BETAS, clip_sample=False, original_inference_steps=100)
    result = pipeline(0, particles=4, generator=seeded(), **call)
    assert result.log_evidence.isfinite().all()


def test_terms_and_latents_that_have_no_weights_are_refused() -> None:
    class Push(Guidance):
        def score(self, step: StepContext) -> torch.Tensor:
            return torch.ones_like(step.sample)

    pipeline, call = make()
    call |= {"particles": 4, "generator": seeded()}
    with pytest.raises(ValueError, match="particles=4: Push multiplies the density by no factor"):
        pipeline(0, guidance=Push(), **call)
    other = ClassifierGuidance(pipeline.classifier, [0, 0, 1, 1])
    with pytest.raises(
        ValueError, match="different labels or targets for the 4 particles of a population"
    ):
        pipeline(0, guidance=other, **call)
    per_population = ClassifierGuidance(pipeline.classifier, [0] * 4 + [1] * 4)
    assert pipeline(0, 8, guidance=per_population, **call).log_evidence.shape == (2,)
    with pytest.raises(ValueError, match="returned other latents, whose weights are unknown"):
        pipeline(0, callback_on_step_end=lambda *a: {"latents": a[3]["latents"].clone()}, **call)
    with pytest.raises(ValueError, match="changed the latents in place, whose weights are unknown"):
        pipeline(0, callback_on_step_end=lambda *a: {"latents": a[3]["latents"].mul_(1.5)}, **call)
    for change in (lambda x: x.mul_(1.5), lambda x: x.data.mul_(1.5), lambda x: x.numpy().fill(1)):
        for returned in (lambda tensors: None, lambda tensors: tensors):

            def callback(*arguments: Any, change: Any = change, returned: Any = returned) -> Any:
                change(arguments[3]["latents"])
                return returned(arguments[3])

            with pytest.raises(ValueError, match="changed the latents in place"):
                pipeline(0, callback_on_step_end=callback, **call)
    half = torch.zeros(4, 1, 1, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs samples in float32"):
        Population(pipeline.scheduler, [other], half, seeded(), 2)
    with pytest.raises(FloatingPointError, match="of population 0, .* or all 4 are 0") as caught:
        impossible = EnergyGuidance(lambda x0: x0.flatten(1).sum(1) * 0 + float("inf"), start=0.99)
        pipeline(0, guidance=impossible, **call)
    assert caught.value.images == [0, 1, 2, 3]


def test_an_interrupted_run_has_the_weights_of_its_last_step() -> None:
    def stop(pipeline: Any, index: int, *_: Any) -> dict:
        pipeline._interrupt = index == 5
        return {}

    pipeline, call = make()
    result = pipeline(0, particles=4, generator=seeded(), callback_on_step_end=stop, **call)
    assert result.log_evidence.isfinite().all() and result.log_evidence.abs().min() > 0
    torch.testing.assert_close(result.log_weights.logsumexp(1), torch.zeros(1).double())


def test_a_callback_that_draws_from_the_generator_changes_no_weights() -> None:
    """What the scheduler draws is known at each step, whatever was drawn before."""
    pipeline, call = make()
    generator = seeded()

    def draw(*_: Any) -> dict:
        torch.rand(1, generator=generator)
        return {}

    options = {"particles": 64, "num_images_per_label": 64 * 50, **call}
    result = pipeline(0, generator=generator, callback_on_step_end=draw, **options)
    evidence = result.log_evidence.exp()
    error = float(evidence.std() / len(evidence) ** 0.5)
    usual = pipeline(0, generator=seeded(), **options).log_evidence.exp()
    assert abs(float(evidence.mean() - usual.mean())) < 4 * (error + float(usual.std()) / 50**0.5)


@pytest.mark.parametrize("kind", ["energy", "function", "target"])
def test_a_population_is_of_one_density(kind: str) -> None:
    pipeline, call = make()
    if kind == "target":
        regressor = Classifier(Corners())
        regressor.config = {**regressor.config, "problem_type": "regression"}
        term = ClassifierGuidance(regressor, target=[[-1.0], [1.0], [0.0], [3.0]])
    else:
        scale = [0.0, 5.0, 1.0, -5.0] if kind == "energy" else lambda level: level.sigma
        term = EnergyGuidance(lambda x: x.flatten(1).square().sum(1), scale, of="x0")
    with pytest.raises(ValueError, match="different (scales|labels|targets).* of a population"):
        pipeline(None, particles=4, guidance=term, generator=seeded(), **call)

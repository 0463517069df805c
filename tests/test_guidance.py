"""Guidance: gradients, sums, scales, intervals, labels, terms of one's own, convergence, and what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import hypot, sqrt
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import Clock, Mixture, OracleClassifier, OracleUNet
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DModel

from guided_diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    EnergyGuidance,
    Guidance,
    NoiseAwareClassifier,
    NoiseLevel,
    StepContext,
    gradient,
    noise_levels,
)
from guided_diffusers.guidance import GuidanceSum, ScaleSchedule
from guided_diffusers.likelihood import parse_labels
from guided_diffusers.networks import no_parameter_grad
from guided_diffusers.noise import x0_coefficients
from guided_diffusers.run_checks import FiniteCheck

SPACES = {
    "epsilon": lambda s: (1 / hypot(1, s), s / hypot(1, s)),
    "edm_epsilon": lambda s: (1.0, s),
    "flow": lambda s: (1 / (1 + s), s / (1 + s)),
}
NAMES = {0: "cat", 1: "dog", 2: "owl"}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level_at(ratio: float, prediction: str = "epsilon") -> NoiseLevel:
    """The level of this noise-to-signal ratio in the space that goes with the prediction."""
    alpha, sigma = SPACES[prediction](ratio)
    return NoiseLevel(alpha, sigma, *x0_coefficients(prediction, alpha, sigma))


def step_at(level: NoiseLevel, x: torch.Tensor, index: int = 0, count: int = 10) -> StepContext:
    """A step for terms that look at nothing but the sample."""
    return StepContext(x, x, lambda sample: sample, level, index, count, 0.0)


def small_classifier(**changes: Any) -> NoiseAwareClassifier:
    """Three labels of 8x8 grey images, every weight random, so that every layer matters."""
    model = NoiseAwareClassifier(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "num_labels": 3,
            "block_out_channels": (8, 16),
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "id2label": NAMES,
            **changes,
        }
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def small_unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "layers_per_block": 1,
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            **changes,
        }
    ).eval()


def quiet(*args: Any, **kwargs: Any) -> ClassifierGuidedPipeline:
    pipeline = ClassifierGuidedPipeline(*args, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: ClassifierGuidedPipeline, *args: Any, **kwargs: Any) -> torch.Tensor:
    return pipeline(
        *args, output_type="latent", generator=torch.Generator().manual_seed(3), **kwargs
    ).images


# the classifier's gradient


@pytest.mark.parametrize("prediction", SPACES)
@pytest.mark.parametrize("ratio", [0.02, 0.3, 2.0, 20.0])
def test_the_exact_classifiers_score_is_the_difference_of_the_exact_scores(
    mixture: Mixture, prediction: str, ratio: float
) -> None:
    level, x = level_at(ratio, prediction), 2 * normal(4, 1, 4, 4)
    x = level.alpha * mixture.means[[0, 1, 0, 1]] + (level.sigma + 0.2 * level.alpha) * x
    term = ClassifierGuidance(OracleClassifier(mixture), [1, 1, 0, 0], scale=1.0)
    with torch.no_grad():
        score = term.score(step_at(level, x))
    conditional, unconditional = (
        torch.stack(
            [
                mixture.denoised(x[i : i + 1], level.alpha, level.sigma, label)[0]
                for i, label in enumerate(labels)
            ]
        )
        for labels in ([1, 1, 0, 0], [None] * 4)
    )
    expected = level.score(x, conditional) - level.score(x, unconditional)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-6 / level.sigma)


@pytest.mark.parametrize("prediction", SPACES)
@pytest.mark.parametrize("ratio", [0.05, 1.0, 30.0])
def test_the_gradient_is_the_finite_difference(prediction: str, ratio: float) -> None:
    """Of scale * sum_y w_y log p(y | x_t), in the scheduler's space, through a real network in float64."""
    level, classifier = level_at(ratio, prediction), small_classifier().double()
    x, direction = hypot(level.alpha, level.sigma) * normal(3, 1, 8, 8), normal(3, 1, 8, 8, seed=1)
    labels, scale = [{0: 1.0}, {1: 0.5, 2: 2.0}, {2: 1.0, 0: -1.0}], [1.0, 3.0, 0.5]
    term = ClassifierGuidance(classifier, labels, scale)

    def log_p(x: torch.Tensor) -> torch.Tensor:
        z, t = x / hypot(level.alpha, level.sigma), term.schedule.timestep(level)
        log_softmax = classifier(z, t).logits.log_softmax(-1)
        return torch.stack(
            [
                s * sum(w * log_softmax[i, y] for y, w in label.items())
                for i, (label, s) in enumerate(zip(labels, scale, strict=True))
            ]
        )

    h = 1e-4 * hypot(level.alpha, level.sigma)
    with torch.no_grad():
        expected = (log_p(x + h * direction) - log_p(x - h * direction)) / (2 * h)
        found = (term.score(step_at(level, x)) * direction).sum((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7 / level.sigma)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_classifier_gives_a_float32_gradient(dtype: torch.dtype) -> None:
    level, x = level_at(0.5), normal(4, 1, 8, 8).float()
    full = ClassifierGuidance(small_classifier(), "dog").score(step_at(level, x))
    half = ClassifierGuidance(small_classifier().to(dtype), "dog").score(step_at(level, x))
    assert (
        half.dtype == torch.float32 and len(half.unique()) > 200
    )  # float32's grid, not that of the weights
    assert torch.nn.functional.cosine_similarity(full.flatten(), half.flatten(), dim=0) > 0.99
    torch.testing.assert_close(half, full, rtol=0, atol=0.1 * float(full.abs().max()))


def test_the_gradient_works_under_no_grad_and_inference_mode() -> None:
    x = normal(2, 3)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert torch.equal(gradient(lambda x: (x**3).sum(1), x), 3 * x**2)
            inside = x * 1.0  # an inference tensor in inference mode
            assert torch.equal(gradient(lambda x: (x**3).sum(1), inside), 3 * x**2)
    assert not x.requires_grad and x.grad is None


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_guided_run_in_inference_mode_is_the_same(scheduler: type) -> None:
    """Also with a term that needs the tensors of the step for its backward pass."""

    class Correlate(Guidance):
        def score(self, step: StepContext) -> torch.Tensor:
            return self.scale_at(step) * gradient(
                lambda x: (step.predict(x) * step.x0).mean((1, 2, 3)), step.sample
            )

    pipeline = quiet(small_unet(), scheduler(), small_classifier())
    plain = sample(pipeline, "cat", num_inference_steps=4, guidance=Correlate())
    with torch.inference_mode():
        assert torch.equal(
            sample(pipeline, "cat", num_inference_steps=4, guidance=Correlate()), plain
        )


# sums, scales, intervals


class Brighter(Guidance):
    """Through the network: raises the mean of the x0 that it predicts."""

    def score(self, step: StepContext) -> torch.Tensor:
        return self.scale_at(step) * gradient(
            lambda x: step.predict(x).mean(dim=(1, 2, 3)), step.sample
        )


class Pull(Guidance):
    """Towards zero."""

    def score(self, step: StepContext) -> torch.Tensor:
        return -self.scale_at(step) * step.sample


def test_a_sum_of_terms_is_the_sum_of_their_scores() -> None:
    level, x, classifier = level_at(0.5), normal(2, 1, 8, 8).float(), small_classifier()
    a, b, c = (
        ClassifierGuidance(classifier, "cat", 2.0),
        ClassifierGuidance(classifier, ["dog", "owl"]),
        Pull(0.5),
    )
    step = step_at(level, x)
    expected = a.score(step) + b.score(step) + c.score(step)
    for total in (a + b + c, a + (b + c), GuidanceSum([a, GuidanceSum([b, c])])):
        assert len(total.terms()) == 3
        torch.testing.assert_close(total.score(step), expected)
    assert not GuidanceSum().active(0, 1, level_at(1.0)) and torch.equal(
        GuidanceSum().score(step), torch.zeros_like(x)
    )


def test_labels_and_scales_are_each_images_own() -> None:
    level, x, classifier = level_at(0.5), normal(3, 1, 8, 8).float(), small_classifier()
    term = ClassifierGuidance(classifier, ["cat", "dog", 2], torch.tensor([1.0, 0.0, -3.0]))
    together = term.score(step_at(level, x))
    for i, (label, scale) in enumerate([(0, 1.0), (1, 0.0), (2, -3.0)]):
        alone = ClassifierGuidance(classifier, label, scale).score(step_at(level, x[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone)
    assert not together[1].any() and together[0].any() and together[2].any()


def test_a_mixture_is_the_weighted_sum_and_negative_weights_steer_away(mixture: Mixture) -> None:
    level, x, classifier = level_at(0.5), normal(2, 1, 8, 8).float(), small_classifier()
    cat, owl = (
        ClassifierGuidance(classifier, name).score(step_at(level, x)) for name in ("cat", "owl")
    )
    both = ClassifierGuidance(classifier, {"cat": 0.7, "owl": -1.5}).score(step_at(level, x))
    torch.testing.assert_close(both, 0.7 * cat - 1.5 * owl, rtol=1e-4, atol=1e-6)

    scheduler = DDIMScheduler(clip_sample=False)
    pipeline = quiet(OracleUNet(mixture, "epsilon", Clock()), scheduler, OracleClassifier(mixture))
    counts = {}
    for weight in (-3.0, 0.0, 3.0):
        label = {0: weight} if weight else {0: 1.0, 1: 1e-9}
        images = sample(
            pipeline, label, 32, num_inference_steps=20, guidance_scale=1.0 if weight else 0.0
        )
        counts[weight] = int((mixture.log_joint(images, 1.0, 0.01).argmax(-1) == 0).sum())
    assert counts[-3.0] < 3 < counts[0.0] < 25 < 29 < counts[3.0], counts


@pytest.mark.parametrize(
    ("start", "stop", "steps"),
    [
        (0.0, 1.0, range(10)),
        (0.2, 0.6, range(2, 6)),
        (0.5, 0.5, ()),
        (0.0, 0.05, (0,)),
        (0.95, 1.0, ()),
    ],
)
def test_a_term_acts_between_start_and_stop(
    mixture: Mixture, start: float, stop: float, steps: Sequence[int]
) -> None:
    shifted, classifier = [], OracleClassifier(mixture)

    def look(pipeline: Any, index: int, t: Any, tensors: dict) -> dict:
        shifted.extend([index] if tensors["score_shift"] is not None else [])
        return {}

    pipeline = quiet(OracleUNet(mixture, "epsilon", Clock()), DDIMScheduler(), classifier)
    sample(
        pipeline,
        1,
        guidance_start=start,
        guidance_stop=stop,
        num_inference_steps=10,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["score_shift"],
    )
    assert shifted == list(steps) and classifier.calls == len(steps)


def test_terms_in_a_sum_keep_their_own_intervals() -> None:
    level, x = level_at(0.5), normal(2, 1, 8, 8).float()
    total = Pull(1.0, 0.0, 0.5) + Pull(10.0, 0.3, 1.0)
    scores = []
    for index in range(10):
        active = GuidanceSum([term for term in total.terms() if term.active(index, 10, level)])
        scores.append(float((active.score(step_at(level, x, index)) / x).mean()))
    assert scores == pytest.approx([-1] * 3 + [-11] * 2 + [-10] * 5)


def test_a_schedule_is_linear_in_the_logarithm_of_the_noise_level() -> None:
    schedule = ScaleSchedule({"sigmas": [0.1, 10.0], "scales": [1.0, 5.0]}, [1.0, 3.0])
    for ratio, factor in ((0.01, 1), (0.1, 1), (1, 3), (10**0.5, 4), (10, 5), (500, 5)):
        assert schedule(level_at(ratio)).tolist() == pytest.approx([factor, 3 * factor])
    noise, clean = (NoiseLevel(alpha, sigma, 1.0, 1.0) for alpha, sigma in ((0, 1), (1, 0)))
    assert (schedule.factor(noise), schedule.factor(clean)) == (5.0, 1.0)


def test_a_schedule_multiplies_the_scale_of_each_image(mixture: Mixture) -> None:
    """As the term whose scale is that function; the same for 1, refused where it has no effect."""
    schedule = {"sigmas": [0.1, 10.0], "scales": [0.5, 4.0]}
    classifier = OracleClassifier(mixture)
    pipeline = quiet(OracleUNet(mixture, "epsilon", Clock()), DDIMScheduler(), classifier)
    call = {"num_inference_steps": 4, "guidance_scale": [1.0, 3.0]}
    found = sample(pipeline, [0, 1], guidance_schedule=schedule, **call)
    term = ClassifierGuidance(classifier, [0, 1], ScaleSchedule(schedule, [1.0, 3.0]))
    off = {**call, "guidance_scale": 0.0}
    assert torch.equal(found, sample(pipeline, [0, 1], guidance=term, **off))
    plain = sample(pipeline, [0, 1], **call)
    same = {"sigmas": [1.0], "scales": [1.0]}
    assert torch.equal(plain, sample(pipeline, [0, 1], guidance_schedule=same, **call))
    assert not torch.allclose(plain, found, atol=1e-3)
    with pytest.raises(
        ValueError, match="^guidance_schedule=.* has no effect with guidance_scale=0"
    ):
        sample(pipeline, [0, 1], guidance_schedule=schedule, **off)
    with pytest.raises(ValueError, match="^guidance_schedule=.* needs a label to steer to"):
        pipeline(guidance_schedule=schedule)

    def double(pipeline: Any, index: int, t: Any, tensors: dict) -> dict:
        pipeline._guidance_scale = torch.tensor([2.0, 6.0])
        return {}

    steps = {"callback_on_step_end": double, "guidance_start": 0.25, "guidance_schedule": schedule}
    changed = sample(pipeline, [0, 1], **steps, **call)
    doubled = {**steps, "callback_on_step_end": None, "guidance_scale": [2.0, 6.0]}
    assert torch.equal(changed, sample(pipeline, [0, 1], **{**call, **doubled}))


@pytest.mark.parametrize(
    "schedule",
    [
        {"sigmas": [1.0, 1.0], "scales": [1.0, 2.0]},
        {"sigmas": [0.0, 1.0], "scales": [1.0, 2.0]},
        {"sigmas": [1.0, float("inf")], "scales": [1.0, 2.0]},
        {"sigmas": [1.0], "scales": [1.0, 2.0]},
        {"sigmas": [1.0, 2.0], "scales": [0.0, 0.0]},
        {"sigmas": [1.0], "scales": [float("nan")]},
        {"sigmas": [], "scales": []},
        {"sigmas": [1.0], "scales": ["a"]},
        {"sigmas": [1.0]},
        {"sigmas": [1.0], "scales": [1.0], "x": [1.0]},
        [1.0, 2.0],
    ],
)
def test_wrong_schedules_are_refused(schedule: Any, mixture: Mixture) -> None:
    parts = OracleUNet(mixture, "epsilon", Clock()), DDIMScheduler(), OracleClassifier(mixture)
    with pytest.raises(ValueError, match=r"^guidance_schedule=.*: \{\"sigmas\": .* is allowed"):
        sample(quiet(*parts), 1, guidance_schedule=schedule)
    with pytest.raises(ValueError, match="^defaults: guidance_schedule="):
        quiet(*parts, defaults={"guidance_schedule": schedule})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": float("nan")}, "scale=nan: a finite number or one per image is allowed"),
        ({"scale": [[1.0]]}, "scale=.*: a finite number or one per image is allowed"),
        ({"start": -0.1}, "start=-0.1: a finite number from 0 to 1 is allowed"),
        ({"start": 0.6, "stop": 0.5}, "start=0.6, stop=0.5"),
        ({"stop": 1.5}, "stop=1.5: a finite number from 0 to 1 is allowed"),
    ],
)
def test_wrong_scales_and_intervals_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pull(**arguments)


def test_what_does_not_fit_the_batch_is_refused() -> None:
    level, x, classifier = level_at(0.5), normal(2, 1, 8, 8).float(), small_classifier()
    with pytest.raises(
        ValueError, match="scale holds 3 numbers for 2 images; one, or one per image, is allowed"
    ):
        Pull([1.0, 2.0, 3.0]).score(step_at(level, x))
    with pytest.raises(
        ValueError, match="label holds 3 labels up to id 2; one, or one for each of the 2 images"
    ):
        ClassifierGuidance(classifier, [0, 1, 2]).score(step_at(level, x))
    module = WithoutCount(classifier)
    with pytest.raises(
        ValueError, match="label holds 1 labels up to id 7; .* below the classifier's 3 logits"
    ):
        ClassifierGuidance(module, 7).score(step_at(level, x))


class WithoutCount(torch.nn.Module):
    """A classifier of one's own, whose config is a plain object that tells the schedule and nothing more."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner, self.config = (
            inner,
            SimpleNamespace(num_train_timesteps=1000, beta_schedule="linear"),
        )

    def forward(self, sample: torch.Tensor, timestep: float) -> tuple[torch.Tensor]:
        return (self.inner(sample, timestep).logits,)


def test_any_module_can_be_the_classifier() -> None:
    level, x, classifier = level_at(0.5), normal(2, 1, 8, 8).float(), small_classifier()
    found = ClassifierGuidance(WithoutCount(classifier), 1).score(step_at(level, x))
    torch.testing.assert_close(
        found, ClassifierGuidance(classifier, "dog").score(step_at(level, x))
    )


# labels


@pytest.mark.parametrize(
    ("label", "parsed"),
    [
        (1, [{1: 1}]),
        ("owl", [{2: 1}]),
        (torch.tensor(2), [{2: 1}]),
        (np.int64(1), [{1: 1}]),
        ([0, "dog"], [{0: 1}, {1: 1}]),
        (("owl",), [{2: 1}]),
        (torch.tensor([2, 0]), [{2: 1}, {0: 1}]),
        ([torch.tensor(1)], [{1: 1}]),
        ({"cat": 0.5, 1: -2}, [{0: 0.5, 1: -2.0}]),
        ([{"cat": 1, "dog": 1}, 2], [{0: 1, 1: 1}, {2: 1}]),
    ],
)
def test_labels_in_all_forms(label: Any, parsed: list[dict[int, float]]) -> None:
    assert parse_labels(label, NAMES, 3) == parsed
    assert (
        parse_labels(label, {str(i): name for i, name in NAMES.items()}, None) == parsed
    )  # ids as JSON has them


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            "cow",
            r"label 'cow' is unknown; allowed: ids 0 to 2 and the names \['cat', 'dog', 'owl'\]",
        ),
        (3, "label 3 is unknown; allowed: ids 0 to 2"),
        (-1, "label -1 is unknown"),
        (1.0, "label 1.0 is unknown"),
        (True, "label True is unknown"),
        (["cat", None], "label None is unknown"),
        ([[0]], r"label \[0\] is unknown"),
        ([torch.tensor(1.5)], "label 1.5 is unknown"),
        ([torch.tensor([0, 1])], r"label tensor\(\[0, 1\]\) is unknown"),
        ([], "label is an empty list"),
        ({}, "label is an empty mapping"),
        ({"cow": 1.0}, "label 'cow' is unknown"),
        (
            {"cat": float("inf")},
            "'cat' has the weight inf or comes twice; a finite number for each label is allowed",
        ),
        ({"cat": "much"}, "'cat' has the weight 'much'"),
        ({"cat": 1.0, 0: 2.0}, "0 has the weight 2.0 or comes twice"),
        (
            torch.tensor([0.0]),
            r"label is a tensor \(1,\) of torch.float32; integer ids, one or \(B,\), are allowed",
        ),
        (torch.tensor([[0]]), r"label is a tensor \(1, 1\) of torch.int64"),
        (torch.tensor([True]), "of torch.bool"),
        (torch.tensor([0, 5]), "label 5 is unknown"),
    ],
)
def test_what_is_no_label_is_refused(label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_labels(label, NAMES, 3)


def test_a_name_of_two_ids_is_refused_and_names_need_names() -> None:
    names = {0: "crane", 1: "maillot", 2: "crane"}  # as in ImageNet: a bird and a machine
    with pytest.raises(
        ValueError, match=r"label 'crane' is the name of several ids; use one of \[0, 2\]"
    ):
        parse_labels("crane", names, 3)
    assert parse_labels(["maillot", 2], names, 3) == [{1: 1.0}, {2: 1.0}]
    with pytest.raises(
        ValueError,
        match=r"label 'cat' is unknown; allowed: ids from 0 \(the classifier has no names",
    ):
        parse_labels("cat", None, None)


# parameters stay as they are


def test_frozen_restores_what_it_found() -> None:
    model = small_classifier()
    names = [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names.index(name) % 3 > 0)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), no_parameter_grad([model, model]):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_frozen_restores_parameters_that_were_exchanged_meanwhile() -> None:
    """As accelerate's sequential offloading does, with each forward: `requires_grad` as found."""
    layer = torch.nn.Linear(2, 2)
    with no_parameter_grad([layer]):
        layer.weight = torch.nn.Parameter(
            layer.weight.detach(), requires_grad=layer.weight.requires_grad
        )
    assert layer.weight.requires_grad and layer.bias.requires_grad


# terms of one's own


def counted(unet: torch.nn.Module) -> list[int]:
    """The batch sizes of the network's calls, as they come."""
    calls: list[int] = []
    unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_term_with_conditions_costs_one_batched_call(scheduler: type) -> None:
    """Classifier-free guidance beside the classifier's, against a loop written out."""
    unet, classifier, w = small_unet(num_class_embeds=4), small_classifier(), 1.5
    pipeline, calls = quiet(unet, scheduler(), classifier), counted(unet)
    term = ClassifierFreeGuidance(3, w, 0.0, 0.75)
    found = sample(pipeline, ["dog", "cat"], num_inference_steps=4, guidance_scale=0, guidance=term)
    assert calls == [4, 4, 4, 2]

    schedule, labels = scheduler(), torch.tensor([1, 0])
    schedule.set_timesteps(4)
    x = (
        torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        * schedule.init_noise_sigma
    )
    with torch.no_grad():
        for index, t in enumerate(schedule.timesteps):
            model_input = schedule.scale_model_input(x, t)
            eps, null = (
                unet(model_input, t, class_labels=one).sample
                for one in (labels, torch.tensor([3, 3]))
            )
            x = schedule.step(eps + w * (eps - null) if index < 3 else eps, t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)

    del calls[:]
    both = sample(
        pipeline, ["dog", "cat"], num_inference_steps=4, guidance_scale=2.0, guidance=term + term
    )
    assert calls == [6, 6, 6, 2] and not torch.allclose(both, found)


def test_a_term_with_conditions_needs_a_class_conditional_network() -> None:
    with pytest.raises(
        ValueError,
        match="guidance: a term has conditions, class labels, and the network has no class",
    ):
        sample(
            quiet(small_unet(), DDIMScheduler()),
            guidance=ClassifierFreeGuidance(3),
            num_inference_steps=2,
        )


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [(DDIMScheduler(clip_sample=False), "epsilon"), (EulerDiscreteScheduler(), "v_prediction")],
)
def test_a_term_can_differentiate_through_the_network(
    mixture: Mixture, scheduler: Any, prediction: str
) -> None:
    """Brighter's score is the finite difference of the mean of E[x0 | x_t], and brightens the images."""
    scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction)
    unet, seen = OracleUNet(mixture, prediction, Clock()), []
    direction = normal(4, 1, 4, 4, seed=1)

    class Spy(Brighter):
        def score(self, step: StepContext) -> torch.Tensor:
            score = super().score(step)
            h = 1e-4 * hypot(step.level.alpha, step.level.sigma)
            up, down = (
                mixture.denoised(
                    step.sample + s * h * direction, step.level.alpha, step.level.sigma, None
                )
                for s in (1, -1)
            )
            seen.append(
                (((up - down).mean((1, 2, 3)) / (2 * h)), (score * direction).sum((1, 2, 3)))
            )
            return 30 * score

    pipeline = quiet(unet, scheduler)
    brighter = sample(pipeline, num_images_per_label=4, num_inference_steps=10, guidance=Spy())
    assert len(seen) == 10 and unet.calls == 20
    for expected, found in seen:
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-5)
    assert (
        brighter.mean() - sample(pipeline, num_images_per_label=4, num_inference_steps=10).mean()
    ) > 0.05


# convergence under guidance

SCALE, STEPS = 2.0, (12, 24, 48, 96)


def exact_path(
    mixture: Mixture,
    x: torch.Tensor,
    times: torch.Tensor,
    space: Callable[[float], tuple[float, float]],
    slope: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
) -> torch.Tensor:
    """Runge-Kutta of 4th order on dx/dt = slope(x, x0, t) of the guided closed form, x0 = D + SCALE (D_label - D)."""

    def rate(x: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma = space(t)
        free, label = (mixture.denoised(x, alpha, sigma, one) for one in (None, 1))
        return slope(x, free + SCALE * (label - free), t)

    times = times.double().tolist()
    for t, s in zip(times, times[1:], strict=False):
        h = s - t
        k1 = rate(x, t)
        k2 = rate(x + h / 2 * k1, t + h / 2)
        k3 = rate(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(x + h * k3, s))
    return x


def fine(start: float, stop: float, count: int = 400) -> torch.Tensor:
    return torch.linspace(np.log(start), np.log(stop), count + 1, dtype=torch.float64).exp()


KARRAS = {"use_karras_sigmas": True}
EDM = {"sigma_max": 80.0, "final_sigmas_type": "zero"}
SOLVERS = [  # name, order, config, prediction, clock
    ("DDIM", 1, {"clip_sample": False, "timestep_spacing": "trailing"}, "epsilon", "ddpm"),
    ("EulerDiscrete", 1, KARRAS, "epsilon", "ddpm"),
    ("EDMEuler", 1, {"sigma_max": 80.0}, "edm_epsilon", "edm"),
    ("FlowMatchEulerDiscrete", 1, {}, "flow", "flow"),
    ("HeunDiscrete", 2, KARRAS, "epsilon", "ddpm"),
    ("FlowMatchHeunDiscrete", 2, {}, "flow", "flow"),
    ("EDMDPMSolverMultistep", 2, EDM, "edm_epsilon", "edm"),
    ("EDMDPMSolverMultistep", 3, {**EDM, "solver_order": 3}, "edm_epsilon", "edm"),
]


@pytest.mark.parametrize(("name", "order", "config", "prediction", "clock"), SOLVERS)
def test_ode_solvers_keep_their_order_under_guidance(
    mixture: Mixture, name: str, order: int, config: dict, prediction: str, clock: str
) -> None:
    """At twice the exact classifier's gradient, against the guided probability flow, where the last steps begin."""
    errors, x_T = [], normal(6, 1, 4, 4)
    for steps in (10, 20, 50, 100) if name == "DDIM" else STEPS:
        scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
        scheduler.set_timesteps(steps)
        levels, times = noise_levels(scheduler), scheduler.timesteps.tolist()
        # the state at t = 99, which all step counts of DDIM share; else the last but the one to sigma = 0
        last = times.index(99) if name == "DDIM" else len(times) - 1
        end = levels[last]
        unet = OracleUNet(
            mixture,
            prediction,
            Clock(clock, getattr(scheduler, "alphas_cumprod", None)),
            sigma_data=0.5 if clock == "edm" else None,
        )
        pipeline = quiet(
            unet, scheduler, OracleClassifier(mixture, beta_schedule="squaredcos_cap_v2")
        )
        states: list[torch.Tensor] = []

        def keep(pipeline: Any, index: int, t: Any, tensors: dict, states: list = states) -> dict:
            states.append(tensors["latents"])
            return {}

        sample(
            pipeline,
            1,
            6,
            guidance_scale=SCALE,
            num_inference_steps=steps,
            latents=x_T,
            callback_on_step_end=keep,
        )
        found, begin = states[last - 1].double(), levels[0]
        if clock == "flow":
            exact = exact_path(
                mixture,
                x_T,
                torch.linspace(begin.sigma, end.sigma, 401),
                lambda s: (1 - s, s),
                lambda x, x0, s: (x - x0) / s,
            )
        else:  # in k-diffusion's space, to which x / alpha is the way
            start = x_T * float(getattr(scheduler, "init_noise_sigma", 1.0)) / begin.alpha
            ratios = fine(begin.sigma / begin.alpha, end.sigma / end.alpha)
            exact = end.alpha * exact_path(
                mixture, start, ratios, lambda s: (1.0, s), lambda x, x0, s: (x - x0) / s
            )
        errors.append(float((found - exact).square().mean().sqrt()))
    counts = (10, 20, 50, 100) if name == "DDIM" else STEPS
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.35 < slope < order + 0.7 and errors[-1] < 0.03, (slope, errors)


# what is not finite


class Overflowing(torch.nn.Module):
    """The exact classifier with its logits enlarged `factor` times, in any dtype, from the step `since` on."""

    def __init__(
        self, mixture: Mixture, factor: float, since: int, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.inner, self.factor, self.since = OracleClassifier(mixture), factor, since
        self.config, self.weight = (
            self.inner.config,
            torch.nn.Parameter(torch.ones((), dtype=dtype)),
        )

    def forward(self, sample: torch.Tensor, timestep: float) -> tuple[torch.Tensor]:
        logits = self.inner(sample, timestep).logits.to(self.weight.dtype)
        return ((logits * self.weight * self.factor if self.inner.calls > self.since else logits),)


@pytest.mark.parametrize(
    ("dtype", "factor", "cause"),
    [
        (
            torch.float32,
            1e39,
            "the classifier is not finite: its value or its gradient is NaN for a sample",
        ),
        (
            torch.float16,
            1e5,
            "the classifier computes in torch.float16, whose range is small: load it in float32",
        ),
    ],
)
@pytest.mark.parametrize("algorithm", ["output", "mean"])
def test_a_gradient_that_is_not_finite_never_reaches_the_images(
    mixture: Mixture, dtype: torch.dtype, factor: float, cause: str, algorithm: str
) -> None:
    classifier = Overflowing(mixture, factor, since=3, dtype=dtype)
    pipeline = quiet(
        OracleUNet(mixture, "epsilon", Clock()).float(), diffusers.DDPMScheduler(), classifier
    )
    seen: list[bool] = []

    def look(pipeline: Any, index: int, t: Any, tensors: dict) -> dict:
        seen.append(bool(tensors["latents"].isfinite().all()))
        return {}

    where = r"not finite at step 3 of 10 \(timestep 600, sigma 0.98.*\)"
    with pytest.raises(FloatingPointError, match=f"{where}; .*{cause}"):
        sample(
            pipeline,
            1,
            num_inference_steps=10,
            callback_on_step_end=look,
            guidance_algorithm=algorithm,
        )
    assert seen == [True] * 3 and all(
        parameter.requires_grad for parameter in classifier.parameters()
    )


class NanRows(torch.nn.Module):
    """The exact classifier, whose logits are NaN in these rows from the step `since` on."""

    def __init__(self, mixture: Mixture, rows: list[int], since: int):
        super().__init__()
        self.inner, self.rows, self.since = OracleClassifier(mixture), rows, since
        self.config = self.inner.config

    def forward(self, sample: torch.Tensor, timestep: float) -> tuple[torch.Tensor]:
        logits = self.inner(sample, timestep).logits
        factor = torch.ones_like(logits)
        if self.inner.calls > self.since:
            factor[self.rows] = float("nan")
        return (logits * factor,)


@pytest.mark.parametrize("algorithm", ["output", "mean", "strang"])
def test_the_images_that_are_not_finite_are_named_and_the_classifier_not_the_scale(
    mixture: Mixture, algorithm: str
) -> None:
    unet = OracleUNet(mixture, "epsilon", Clock()).float()
    scheduler = diffusers.DDPMScheduler()
    if algorithm == "strang":
        scheduler = DDIMScheduler(clip_sample=False)
    pipeline = quiet(unet, scheduler, NanRows(mixture, [1, 3], since=2))
    cause = "likely cause: the classifier is not finite: .* another scale doesn't help"
    with pytest.raises(FloatingPointError, match=cause) as raised:
        sample(pipeline, [0] * 5, num_inference_steps=6, guidance_algorithm=algorithm)
    assert raised.value.images == [1, 3]


def test_a_scale_that_is_too_large_is_not_blamed_on_the_classifier(mixture: Mixture) -> None:
    """The second of two images has the scale, and leaves the range; or the product overflows."""
    unet = OracleUNet(mixture, "epsilon", Clock()).float()
    pipeline = quiet(unet, DDIMScheduler(clip_sample=False), OracleClassifier(mixture))
    cause = "the sample left the range that the classifier knows, with values up to .*e.*: lower"
    with pytest.raises(FloatingPointError, match=cause) as raised:
        sample(pipeline, [0, 1], guidance_scale=[1.0, 1e30], num_inference_steps=10)
    assert raised.value.images == [1]
    score = torch.tensor([1.0, float("inf")]).reshape(2, 1, 1, 1)
    step = step_at(level_at(1.0), torch.ones(2, 1, 1, 1))
    with pytest.raises(FloatingPointError, match="times the scale is infinite: lower") as raised:
        FiniteCheck([ClassifierGuidance(small_classifier(), 0)])(step, score, score)
    assert raised.value.images == [1]


def test_a_deferred_check_names_all_images_and_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an accelerator, where the check waits for the end of the run."""
    check = FiniteCheck([])
    with monkeypatch.context() as patch:
        patch.setattr(check, "finish", lambda: None)  # not at once
        for index, rows in enumerate([(), (2,), (2, 0)]):
            x, score = torch.ones(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
            score[list(rows), 0, 0, 0] = float("nan")
            check(step_at(level_at(1.0), x, index), score, torch.cat([score, score]))
    with pytest.raises(FloatingPointError, match="not finite at step 1 of 10") as raised:
        check.finish()
    assert raised.value.images == [0, 2]
    check.finish()  # a run's steps are checked once


def test_a_correction_beyond_the_range_of_the_network_is_refused() -> None:
    """The gradient is finite in float32; the network's float16 can't hold what it does to the output."""
    pipeline = quiet(small_unet().half(), DDIMScheduler(), small_classifier())
    with pytest.raises(
        FloatingPointError, match="step 0 of 4 .*the guided output left the range of torch.float16"
    ):
        sample(pipeline, 0, guidance_scale=1e10, num_inference_steps=4)


def test_a_sample_that_the_network_broke_is_not_blamed_on_guidance(mixture: Mixture) -> None:
    network = OracleUNet(mixture, "epsilon", Clock())
    pipeline = quiet(network, DDIMScheduler(), OracleClassifier(mixture))
    network.register_forward_hook(lambda module, inputs, output: (output[0] * float("nan"),))
    with pytest.raises(
        FloatingPointError, match="step 1 of 4 .*sample was not finite before: look at the network"
    ):
        sample(pipeline, 0, guidance_start=0.25, num_inference_steps=4)


def test_noise_scale_of_the_classifier_is_its_own(mixture: Mixture) -> None:
    """A step at sigma / alpha of the classifier's timestep t asks it there, whatever the scheduler calls it."""
    classifier = OracleClassifier(mixture)
    abar = diffusers.DDPMScheduler().alphas_cumprod.double()
    for t in (10, 500, 990):
        ratio = sqrt((1 - abar[t]) / abar[t])
        for prediction in SPACES:
            ClassifierGuidance(classifier, 1).score(
                step_at(level_at(ratio, prediction), normal(1, 1, 4, 4))
            )
    assert classifier.seen == [10.0] * 3 + [500.0] * 3 + [990.0] * 3


# what a reviewer broke


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        DDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    ],
    ids=["flow", "zero SNR"],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: EnergyGuidance(lambda x0: x0.square().sum((1, 2, 3)), 0.01, through_network=True),
        lambda: EnergyGuidance(lambda x0: x0.square().sum((1, 2, 3)), 0.01, normalize=True),
        lambda: EnergyGuidance(lambda x, level: x.square().sum((1, 2, 3)), 0.01, of="sample"),
        lambda: ClassifierGuidance(small_classifier(), 1, 0.01, normalize=True),
        lambda: Pull(0.01),
        lambda: ClassifierGuidance(small_classifier(), 1, 0.01),
    ],
)
def test_where_a_sample_is_noise_alone_no_term_destroys_it(
    scheduler: Any, make: Callable[[], Guidance]
) -> None:
    """alpha = 0: a score shift moves the predicted x0 by sigma^2 / alpha of it, with a network that is no oracle."""
    pipeline = quiet(small_unet(), scheduler)
    unguided, found = (
        sample(pipeline, num_inference_steps=12, num_images_per_label=2, guidance=term)
        for term in (None, make())
    )
    assert not torch.equal(found, unguided) and found.abs().max() < 3 * unguided.abs().max()


def test_a_gradient_through_the_network_costs_no_further_call_of_it() -> None:
    """The step's own call keeps its graph, also for two terms and with conditions; the gradient is that of predict."""
    pipeline = quiet(
        small_unet(num_class_embeds=4), DDIMScheduler(clip_sample=False), small_classifier()
    )
    calls = counted(pipeline.unet)

    class ByPredict(EnergyGuidance):
        def score(self, step: StepContext) -> torch.Tensor:
            return super().score(replace(step, graph=None))

    def energy(x0: torch.Tensor) -> torch.Tensor:
        return (x0 - 1).square().sum((1, 2, 3))

    images = {}
    for kind in (EnergyGuidance, ByPredict):
        term = kind(energy, 0.1, through_network=True) + kind(energy, 0.2, through_network=True)
        for more in ({}, {"classifier_free_scale": 1.0}):
            for clip_x0 in (False, True):
                del calls[:]
                found = sample(
                    pipeline,
                    ["dog", "cat"],
                    num_inference_steps=4,
                    guidance_scale=0,
                    guidance=term,
                    clip_x0=clip_x0,
                    **more,
                )
                rows = 4 if more else 2
                assert calls == ([rows] * 4 if kind is EnergyGuidance else [rows, 2, 2] * 4)
                assert not found.requires_grad
                torch.testing.assert_close(
                    found, images.setdefault((bool(more), clip_x0), found), rtol=1e-4, atol=1e-4
                )


def test_a_network_against_itself_adds_nothing_also_where_x0_is_clipped() -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False))
    term = AutoGuidance(pipeline.unet, 2.0)
    for clip_x0 in (True, False):
        off, found = (
            sample(pipeline, num_inference_steps=4, clip_x0=clip_x0, guidance=one)
            for one in (None, term)
        )
        torch.testing.assert_close(found, off)


def test_guidance_is_a_term_a_sum_or_a_list() -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False))
    call: dict[str, Any] = {"num_inference_steps": 2, "num_images_per_label": 2}
    both = sample(pipeline, guidance=Pull(0.1) + Pull(0.2), **call)
    assert torch.equal(sample(pipeline, guidance=[Pull(0.1), Pull(0.2)], **call), both)
    assert torch.equal(sample(pipeline, guidance=[], **call), sample(pipeline, **call))
    with pytest.raises(
        ValueError, match=r"guidance=\[3\]: a term of guidance, a sum or a list of them is"
    ):
        sample(pipeline, guidance=[3], **call)


@pytest.mark.parametrize(
    ("null", "message"),
    [
        (9, "a condition has the class label 9; 0 to 3 are allowed"),
        (
            {"class_labels": torch.tensor([3, 3, 3])},
            r"class_labels has shape \(3,\); one row, or one for each of 2 images",
        ),
        (
            {"text": torch.zeros(1, 2)},
            r"conditions \['text'\]; the network takes \['class_labels'\]",
        ),
    ],
)
def test_conditions_that_the_network_cannot_be_told_are_refused(null: Any, message: str) -> None:
    pipeline = quiet(
        small_unet(num_class_embeds=4), DDIMScheduler(clip_sample=False), small_classifier()
    )
    with pytest.raises(ValueError, match=message):
        sample(
            pipeline,
            ["dog", "cat"],
            num_inference_steps=2,
            guidance_scale=0,
            guidance=ClassifierFreeGuidance(null),
        )

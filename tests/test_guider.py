"""The guided step's object: what it evaluates, in a run that begins midway, and with a learned variance."""

from __future__ import annotations

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, DDPMScheduler
from test_guidance import Pull, normal, small_classifier

from guided_diffusers import ClassifierGuidance, ClassifierGuidedPipeline, StepContext
from guided_diffusers.guider import Guider, Prediction
from guided_diffusers.splitting import step_weights


def evaluated(guider: Guider, sample: torch.Tensor) -> list[int]:
    """The steps at which terms are evaluated, of a run from the guider's first step on."""
    steps = []
    for index in range(guider.first, len(guider.levels)):
        if guider.start_step(index, len(sample)):
            steps.append(index)
        guider.correct(sample, Prediction(torch.zeros_like(sample)))
        guider.finish_step(sample)
    return steps


def test_a_run_that_begins_midway_counts_from_there() -> None:
    scheduler, x = DDIMScheduler(clip_sample=False), normal(2, 1, 8, 8).float()
    scheduler.set_timesteps(10)
    assert evaluated(Guider(scheduler, [Pull(1.0, 0.5)]), x) == [5, 6, 7, 8, 9]
    assert evaluated(Guider(scheduler, [Pull(1.0, 0.5)], first=4), x) == [7, 8, 9]
    assert evaluated(Guider(scheduler, [Pull()], first=4, every=2), x) == [4, 6, 8]


class Shift(Pull):
    """Moves the predicted x0 of the second image by `size`, at one step."""

    def __init__(self, size: float, index: int):
        super().__init__()
        self.size, self.index = size, index

    def score(self, step: StepContext) -> torch.Tensor:
        shift = torch.zeros_like(step.sample)
        if step.index == self.index:
            shift[1] = self.size
        return step.level.score_shift(shift)


@pytest.mark.parametrize("index", [0, 2, 4])
@pytest.mark.parametrize("first", [0, 1])
def test_a_term_that_overshoots_is_warned_of_once_a_run(
    index: int, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a step moves x0 beyond the range of data, 2, and the noise that remains after it.

    A step to s' makes (s - s') / s of the shift of the predicted x0.
    """
    scheduler, x = DDIMScheduler(clip_sample=False), normal(2, 1, 8, 8).float()
    scheduler.set_timesteps(5 + first)
    abar = scheduler.alphas_cumprod[scheduler.timesteps].double()
    s = [*((1 - abar) / abar).sqrt().tolist(), 0.0]
    start, end = s[index + first], s[index + first + 1]
    limit = (2**2 + end**2) ** 0.5
    for share, count in ((0.99, 0), (1.01, 1)):
        moved = share * limit
        size = moved * start / (start - end)
        for options in ({}, {"every": 1, "algorithm": "lie_trotter"}):
            caplog.clear()
            terms = [Pull(1e-6), Shift(size, index), Shift(size, index)]
            evaluated(Guider(scheduler, terms, first=first, **options), x)
            assert caplog.text.count("overshoots") == count
            if count:
                t = int(scheduler.timesteps[index + first])
                place = f"Shift overshoots at step {index} of 5 (timestep {t}, sigma "
                assert (
                    place in caplog.text and f"x0 of an image by {moved:.3g}, more" in caplog.text
                )
                advice = "lower its scale or take more steps"
                assert advice in caplog.text and ("'strang'" in caplog.text) == (not options)


def test_a_term_that_overshoots_where_it_is_evaluated_is_named_with_reuse(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheduler, x = DDIMScheduler(clip_sample=False), normal(2, 1, 8, 8).float()
    scheduler.set_timesteps(5)
    evaluated(Guider(scheduler, [Shift(1e3, 2)], every=2), x)
    assert "Shift overshoots at step 2 of 5" in caplog.text
    caplog.clear()
    evaluated(Guider(scheduler, [Shift(1e3, 1)], every=2), x)  # not evaluated there
    assert not caplog.text


def test_reuse_extrapolates_over_the_levels_of_a_run_that_begins_midway() -> None:
    """A term that is linear in log(sigma / alpha) when stored as sigma * score is reproduced exactly."""
    scheduler, x = DDIMScheduler(clip_sample=False), normal(2, 1, 8, 8).float()
    scheduler.set_timesteps(10)

    class Linear(Pull):
        def score(self, step: StepContext) -> torch.Tensor:
            ratio = torch.tensor(step.level.sigma / step.level.alpha)
            return torch.ones_like(step.sample) * (2 + 3 * ratio.log()) / step.level.sigma

    exact, reused = (
        Guider(scheduler, [Linear()], first=3, every=every, algorithm="output") for every in (1, 2)
    )
    for index in range(3, 10):
        shifts = []
        for guider in (exact, reused):
            guider.start_step(index, len(x))
            guider.correct(x, Prediction(torch.zeros_like(x)))
            shifts.append(guider.score_shift)
        if index != 4:  # after one evaluation it is constant
            torch.testing.assert_close(*shifts)


@pytest.mark.parametrize("variance_type", ["learned_range", "learned"])
def test_splitting_measures_schedulers_that_read_a_learned_variance(variance_type: str) -> None:
    """Its weights are those of a step that draws no noise but the posterior's."""
    fixed, learned = (
        DDPMScheduler(variance_type=kind, clip_sample=False)
        for kind in ("fixed_small", variance_type)
    )
    weights = []
    for scheduler in (fixed, learned):
        scheduler.set_timesteps(8)
        weights.append(step_weights(scheduler, Guider(scheduler, ()).levels))
    assert weights[0] == pytest.approx(weights[1], rel=1e-6)


def test_splitting_refuses_a_scheduler_that_clips_its_x0() -> None:
    scheduler = CMStochasticIterativeScheduler()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="has clip_denoised=True"):
        Guider(scheduler, [Pull()], algorithm="strang")


def test_a_likelihood_that_was_first_used_in_inference_mode_has_gradients() -> None:
    term, x = ClassifierGuidance(small_classifier(), 1), normal(2, 1, 8, 8).float()
    with torch.inference_mode():
        term.log_probability(x, 10.0)
    x.requires_grad_()
    term.log_probability(x, 10.0).sum().backward()
    assert x.grad.isfinite().all()


def test_a_negative_label_of_a_condition_is_refused() -> None:
    from guided_diffusers import ClassifierFreeGuidance

    pipeline = ClassifierGuidedPipeline.from_bundled()
    term = ClassifierFreeGuidance({"class_labels": torch.tensor([-1])})
    with pytest.raises(ValueError, match="has the class label -1; 0 to 10 are allowed"):
        pipeline("sneaker", guidance=term, num_inference_steps=2)


def test_the_outputs_of_a_regressor_are_no_labels() -> None:
    pipeline = ClassifierGuidedPipeline.from_bundled()
    regressor = small_classifier(num_labels=1, id2label=None, problem_type="regression")
    names = pipeline.config.id2label
    guided = ClassifierGuidedPipeline(pipeline.unet, pipeline.scheduler, regressor, id2label=names)
    assert guided.num_labels == 10 and guided.null_label == 10

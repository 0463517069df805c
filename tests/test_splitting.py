"""Guidance as a part of its own: its order on a closed form, every scheduler; and fewer questions to the classifier."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import SHAPE, Clock, Mixture, OracleClassifier, OracleUNet
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
)
from scipy.integrate import solve_ivp
from test_schedulers import BETAS, CASES, Case, path

from guided_diffusers import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    EnergyGuidance,
    Guidance,
    NoiseLevel,
    StepContext,
    noise_levels,
)
from guided_diffusers.defaults import DEFAULTS
from guided_diffusers.splitting import GuidanceReuse, step_weights

SCALE, IMAGES = 3.0, 4
ORDERS = {
    "Euler": ("EulerDiscreteScheduler", {}, 1),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}, 2),
    "DPM-Solver++ 3M": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "lower_order_final": False},
        3,
    ),
    "UniPC": ("UniPCMultistepScheduler", {"lower_order_final": False}, 3),
    "Heun": ("HeunDiscreteScheduler", {}, 2),
    "KDPM2": ("KDPM2DiscreteScheduler", {}, 2),
}


class Told(OracleUNet):
    """The exact network at the levels of the run, one after another, whatever timestep Diffusers rounds them to."""

    def __init__(self, mixture: Mixture, levels: list[NoiseLevel]):
        super().__init__(mixture, "epsilon", self.told)
        self.s = [level.sigma / level.alpha for level in levels]

    def told(self, _: Any) -> tuple[float, float]:
        """(alpha, sigma) of its input, which is variance preserving."""
        s = self.s[self.calls - 1]
        return 1 / np.hypot(1, s), s / np.hypot(1, s)


def noise() -> torch.Tensor:
    return torch.randn(
        IMAGES, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def solved(
    solver: str, steps: int, algorithm: str, scale: float = SCALE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(z where the last step begins, the exact one there) of the guided path."""
    name, config, _ = ORDERS[solver]
    mixture, scheduler = (
        Mixture(),
        getattr(diffusers, name)(**BETAS, use_exponential_sigmas=True, **config),
    )
    scheduler.set_timesteps(steps)
    levels = noise_levels(scheduler)
    pipeline = ClassifierGuidedPipeline(Told(mixture, levels), scheduler, OracleClassifier(mixture))
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    # UniPC of full order in the last step, to sigma 0, gives NaN; the steps before it count
    with suppress(FloatingPointError):
        pipeline(
            [0] * IMAGES,
            guidance_scale=scale,
            latents=noise(),
            num_inference_steps=steps,
            output_type="latent",
            guidance_algorithm=algorithm,
            callback_on_step_end_tensor_inputs=["sample"],
            callback_on_step_end=lambda p, i, t, values: seen.append(values["sample"]) or {},
        )
    first, last = levels[0], levels[-1]
    start = float(scheduler.init_noise_sigma) / first.alpha
    return seen[-1] / last.alpha, exact(
        start, first.sigma / first.alpha, last.sigma / last.alpha, scale
    )


@cache
def exact(start: float, first: float, last: float, scale: float) -> torch.Tensor:
    """dz/ds = (z - x0(z, s)) / s - scale s grad log p(y | z), solved by another library over -log s."""
    mixture = Mixture()

    def field(minus_log_s: float, z: np.ndarray) -> np.ndarray:
        s, z = (
            float(np.exp(-minus_log_s)),
            torch.from_numpy(z).reshape(IMAGES, *SHAPE).requires_grad_(True),
        )
        g = torch.autograd.grad(mixture.log_joint(z, 1.0, s).log_softmax(-1)[:, 0].sum(), z)[0]
        return (
            (-s * ((z - mixture.denoised(z, 1.0, s, None)) / s - scale * s * g))
            .detach()
            .numpy()
            .ravel()
        )

    span = (-np.log(first), -np.log(last))
    found = solve_ivp(
        field, span, (noise() * start).numpy().ravel(), method="DOP853", rtol=1e-9, atol=1e-11
    )
    return torch.from_numpy(found.y[:, -1]).reshape(IMAGES, *SHAPE)


@pytest.mark.parametrize("solver", ORDERS)
def test_orders_of_convergence(solver: str, capsys: pytest.CaptureFixture) -> None:
    """Lie-Trotter has order 1, Strang 2, with every solver; where the solver's own is less, that."""
    # in 320 steps the errors of DPM-Solver++ are those of its float32 tables, on some processors
    counts = (80, 160) if solver.startswith("DPM-Solver++") else (80, 320)
    for algorithm, most in (("lie_trotter", 1), ("strang", 2)):
        errors = [
            float((z - true).abs().max())
            for z, true in (solved(solver, n, algorithm) for n in counts)
        ]
        order, wanted = (
            np.log(errors[0] / errors[1]) / np.log(counts[1] / counts[0]),
            min(most, ORDERS[solver][2]),
        )
        with capsys.disabled():
            print(
                f"\n{solver:>16} {algorithm:>12}: order {order:.2f}, in theory {wanted}; error "
                f"{errors[1]:.1e}",
                end="",
            )
        assert abs(order - wanted) < 0.2


def test_a_third_order_solver_in_few_steps_bears_scale_10_only_beside_its_step() -> None:
    """In 8 steps its history of guided predictions leads far away; that of unguided ones doesn't."""

    def off(algorithm: str) -> float:
        z, true = solved("DPM-Solver++ 3M", 8, algorithm, scale=10.0)
        return float((z - true).square().mean().sqrt())

    plain, beside = off("output"), max(off("lie_trotter"), off("strang"))
    assert plain > 5 and beside < 1.5


@pytest.mark.parametrize("solver", ["Heun", "KDPM2"])
def test_a_solver_that_asks_twice_in_a_step_bears_scale_10_in_few_steps_beside_it(
    solver: str,
) -> None:
    """Its second question would take what guidance has just added for noise; beside it, it doesn't see that yet."""

    def off(steps: int, scale: float) -> dict[str, float]:
        found = {
            name: solved(solver, steps, name, scale) for name in ("output", "lie_trotter", "strang")
        }
        return {name: float((z - true).square().mean().sqrt()) for name, (z, true) in found.items()}

    few, more = off(5, 10.0), off(11, 3.0)
    assert few["output"] > 10 and max(few["lie_trotter"], few["strang"]) < 3.5
    assert (
        max(more["lie_trotter"], more["strang"]) < 0.07
    )  # where s falls less, it sees it at once: 0.10 if it didn't


def test_plms_asks_twice_in_its_first_step_alone() -> None:
    """Where s falls far in it; against 300 steps of the plain correction."""
    case = next(
        one for one in CASES if one.scheduler == "PNDMScheduler" and one.config["skip_prk_steps"]
    )
    true = path(*oracle(case), guidance_scale=3.0, num_inference_steps=300)[-1]
    off = {
        name: (
            path(*oracle(case), guidance_scale=3.0, num_inference_steps=6, guidance_algorithm=name)[
                -1
            ]
            - true
        )
        .square()
        .mean()
        .sqrt()
        for name in ("output", "lie_trotter")
    }
    assert off["output"] > 0.8 and off["lie_trotter"] < 0.15


@pytest.mark.parametrize("algorithm", ["lie_trotter", "strang"])
def test_heun_asks_where_the_answer_has_an_effect(algorithm: str) -> None:
    """At a step's begin; at its end for a half of strang, but where s falls so far that there is none."""
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(20)
    s = [level.sigma / level.alpha for level in noise_levels(scheduler)][::2]
    halves = sum(one < 2 * following for one, following in pairwise(s))
    assert len(s) == 20 and halves == 18
    found = sample(exact_pipeline(scheduler), guidance_algorithm=algorithm)
    assert found.guidance_evaluations == 20 + (halves if algorithm == "strang" else 0)
    assert sample(exact_pipeline(scheduler)).guidance_evaluations == 39


def oracle(case: Case, label: int | None = None) -> tuple[OracleUNet, Any, OracleClassifier]:
    mixture, scheduler = Mixture(), getattr(diffusers, case.scheduler)(**case.config)
    clock = (
        Clock(case.clock, scheduler.alphas_cumprod) if case.clock == "ddpm" else Clock(case.clock)
    )
    return (
        OracleUNet(mixture, case.prediction, clock, label, case.sigma_data),
        scheduler,
        OracleClassifier(mixture, beta_schedule="squaredcos_cap_v2"),
    )


def test_every_scheduler_splits() -> None:
    """The images at scale 1 are near the conditional ones, which those without guidance are not."""
    for case in CASES:
        network, scheduler, _ = oracle(case, 1)
        conditional = path(network, scheduler, None, **case.call)[-1]
        far = (
            (path(*oracle(case), guidance_scale=0.0, **case.call)[-1] - conditional)
            .square()
            .mean()
            .sqrt()
        )
        for algorithm in ("lie_trotter", "strang"):
            found = path(*oracle(case), guidance_algorithm=algorithm, **case.call)[-1]
            off = (found - conditional).square().mean().sqrt()
            assert off < 0.3 * far, (case.name, algorithm, off, far)


def exact_pipeline(scheduler: Any, classifier: bool = True) -> ClassifierGuidedPipeline:
    mixture = Mixture()
    clock = Clock("ddpm", scheduler.alphas_cumprod)
    pipeline = ClassifierGuidedPipeline(
        OracleUNet(mixture, "epsilon", clock),
        scheduler,
        OracleClassifier(mixture, names={0: "cat", 1: "dog"}) if classifier else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: ClassifierGuidedPipeline, label: Any = "dog", **call: Any) -> Any:
    generators = [
        torch.Generator().manual_seed(i)
        for i in range(len(label) if isinstance(label, list) else 1)
    ]
    return pipeline(
        label,
        output_type="latent",
        generator=generators,
        **{"num_inference_steps": 20, "guidance_scale": 2.0, **call},
    )


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False),
        DDPMScheduler(clip_sample=False),
        EulerAncestralDiscreteScheduler(),
        LCMScheduler(clip_sample=False),
    ],
    ids=lambda one: type(one).__name__,
)
def test_of_first_order_lie_trotter_is_the_plain_correction(scheduler: Any) -> None:
    """Of those that have no memory; of the others it is not."""
    plain, split = (
        sample(exact_pipeline(scheduler), guidance_algorithm=name)
        for name in ("output", "lie_trotter")
    )
    assert torch.allclose(plain.images, split.images, atol=1e-5)
    halves = sample(exact_pipeline(scheduler), guidance_algorithm="strang")
    assert not torch.allclose(plain.images, halves.images, atol=1e-6)


def test_weights_are_what_a_step_does_with_a_shift_of_x0() -> None:
    """z' moves by w e where x0 does by s e: without noise s - s', with all of it (s^2 - s'^2) / s, between between."""

    def found(scheduler: Any, eta: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scheduler.set_timesteps(10)
        levels = noise_levels(scheduler)
        s = np.array([*(level.sigma / level.alpha for level in levels), 0.0])
        return np.array(step_weights(scheduler, levels, eta)), s[:-1], s[1:]

    w, s, after = found(DPMSolverMultistepScheduler(final_sigmas_type="zero"))
    np.testing.assert_allclose(w, s - after, rtol=1e-4)
    for scheduler, eta in (
        (DDPMScheduler(clip_sample=False), 0.0),
        (DDIMScheduler(clip_sample=False), 1.0),
    ):
        w, s, after = found(scheduler, eta)
        np.testing.assert_allclose(w, (s**2 - after**2) / s, rtol=1e-4)
    w, s, after = found(
        LCMScheduler(clip_sample=False)
    )  # x0 and new noise: nothing of z stays but at the boundary
    np.testing.assert_allclose(w, s, rtol=1e-4)
    scheduler = DDIMScheduler(clip_sample=False)
    half, none, all_ = (found(scheduler, eta)[0] for eta in (0.5, 0.0, 1.0))
    assert (none[:-1] < half[:-1]).all() and (half[:-1] < all_[:-1]).all()


def test_the_scheduler_that_is_read_is_left_as_it_was() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(10)
    levels = noise_levels(scheduler)
    before = {name: str(value) for name, value in vars(scheduler).items()}
    step_weights(scheduler, levels)
    assert before == {name: str(value) for name, value in vars(scheduler).items()}


@pytest.mark.parametrize(
    "term", [EnergyGuidance(lambda x: x.square().sum((1, 2, 3)), scale=0.1), "classifier"]
)
def test_any_term_splits_and_is_spared(term: Any) -> None:
    """Also one that looks at what the network predicts: images near those of the plain correction, fewer questions."""
    pipeline = exact_pipeline(DPMSolverMultistepScheduler(), classifier=False)
    if term == "classifier":
        term = ClassifierGuidance(OracleClassifier(Mixture()), [0, 1, 0], scale=2.0)

    def images(**call: Any) -> Any:
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return pipeline(
            None,
            3,
            guidance=term,
            guidance_scale=0.0,
            output_type="latent",
            generator=generators,
            num_inference_steps=40,
            **call,
        )

    plain, none = (
        images(),
        pipeline(
            None,
            3,
            output_type="latent",
            guidance_scale=0.0,
            num_inference_steps=40,
            generator=[torch.Generator().manual_seed(i) for i in range(3)],
        ),
    )
    far = (none.images - plain.images).square().mean().sqrt()
    for call in (
        {"guidance_algorithm": "strang"},
        {"guidance_every": 3},
        {"guidance_algorithm": "strang", "guidance_every": 3},
    ):
        found = images(**call)
        assert (found.images - plain.images).square().mean().sqrt() < 0.2 * far, call
        assert found.guidance_evaluations == (14 if "guidance_every" in call else 40)
    assert none.guidance_evaluations == 0


def test_every_kth_question_converges_to_every_one() -> None:
    """What stands for an answer is straight over log s: the error falls at least fourfold where steps double."""
    found = []
    for steps in (40, 80, 160):
        scheduler = DPMSolverMultistepScheduler(**BETAS, use_exponential_sigmas=True)
        calls = {
            k: sample(exact_pipeline(scheduler), num_inference_steps=steps, guidance_every=k)
            for k in (1, 2)
        }
        found.append(float((calls[1].images - calls[2].images).abs().max()))
        assert calls[2].guidance_evaluations == steps / 2
    assert found[0] / found[1] > 3.5 and found[1] / found[2] > 3.5


def test_the_error_is_about_the_tolerance_and_a_larger_one_asks_less() -> None:
    scheduler = DPMSolverMultistepScheduler(**BETAS, use_exponential_sigmas=True)
    labels = ["dog", "cat", "dog", "cat"]
    plain, asked = sample(exact_pipeline(scheduler), labels, num_inference_steps=50), []
    for tolerance in (0.003, 0.01, 0.03, 0.1):
        found = sample(
            exact_pipeline(scheduler), labels, num_inference_steps=50, guidance_tolerance=tolerance
        )
        off = (found.images - plain.images).flatten(1).square().mean(1).sqrt()
        assert off.mean() < 1.5 * tolerance
        asked.append(found.guidance_evaluations)
    assert (
        asked == sorted(asked, reverse=True)
        and asked[0] < 40
        and asked[-1] < 12
        and asked[-1] != asked[0]
    )


def test_a_run_that_begins_within_a_second_order_step_goes_on_asking() -> None:
    """Its first two questions are at one level, from which nothing is learned of how guidance turns."""
    pipeline = exact_pipeline(diffusers.HeunDiscreteScheduler(**BETAS))
    call = {"num_inference_steps": 25, "guidance_start": 0.3}
    exactly, found = sample(pipeline, **call), sample(pipeline, **call, guidance_tolerance=0.01)
    far = (
        (sample(pipeline, guidance_scale=0.0, num_inference_steps=25).images - exactly.images)
        .abs()
        .max()
    )
    assert 4 < found.guidance_evaluations < exactly.guidance_evaluations
    assert (found.images - exactly.images).abs().max() < 0.1 * far


def test_an_image_asks_by_itself() -> None:
    """With a tolerance an image is the same alone as beside others, and the classifier sees only who asks."""
    scheduler = DPMSolverMultistepScheduler(**BETAS)
    labels, scales = [{0: 1.0}, {1: 1.0}, {0: 0.5, 1: 0.5}], [1.0, 3.0, 2.0]
    call = {"num_inference_steps": 15, "guidance_tolerance": 0.03, "output_type": "latent"}
    pipeline = exact_pipeline(scheduler)
    rows = []
    pipeline.classifier.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    together = pipeline(
        labels,
        guidance_scale=scales,
        generator=[torch.Generator().manual_seed(i) for i in range(3)],
        **call,
    )
    assert sum(rows) / 3 == together.guidance_evaluations and {1, 2} & set(rows)
    for i in range(3):
        alone = pipeline(
            [labels[i]],
            guidance_scale=scales[i],
            generator=[torch.Generator().manual_seed(i)],
            **call,
        )
        assert torch.allclose(alone.images[0], together.images[i], atol=1e-6)


class Off(Guidance):
    """A term whose answer is one number, in a part of the run."""

    def __init__(self, value: float, **when: float):
        super().__init__(1.0, **when)
        self.value, self.asked = value, []

    def score(self, step: StepContext) -> torch.Tensor:
        self.asked.append(step.index)
        return torch.full_like(step.sample, self.value / step.level.sigma)


def test_terms_that_begin_or_end_are_asked_there() -> None:
    pipeline = exact_pipeline(DDIMScheduler(clip_sample=False), classifier=False)
    early, late = Off(0.1, stop=0.5), Off(-0.2, start=0.3)
    shifts = []
    call = {
        "guidance": [early, late],
        "guidance_scale": 0.0,
        "num_inference_steps": 10,
        "output_type": "latent",
        "callback_on_step_end_tensor_inputs": ["score_shift", "sample"],
    }
    pipeline(
        None,
        guidance_every=4,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda p, i, t, values: shifts.append(values["score_shift"]) or {},
        **call,
    )
    assert early.asked == [0, 3] and late.asked == [3, 5, 9]
    levels = noise_levels(pipeline.scheduler)
    wanted = [0.1] * 3 + [-0.1] * 2 + [-0.2] * 5
    for level, shift, value in zip(levels, shifts, wanted, strict=True):
        assert torch.allclose(shift * level.sigma, torch.full_like(shift, value), atol=1e-6)


def test_fewer_questions_spare_the_network_s_second_prediction() -> None:
    """Terms with conditions join the network's call; where nobody asks, it is told the image's own alone."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        8,
        1,
        1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        num_class_embeds=3,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    pipeline = ClassifierGuidedPipeline(
        network.eval(), DDIMScheduler(clip_sample=False), id2label={0: "a", 1: "b"}
    )
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    term = ClassifierFreeGuidance({"class_labels": torch.tensor([2])}, 1.0)
    pipeline(
        "a",
        guidance=term,
        guidance_scale=0.0,
        num_inference_steps=9,
        guidance_every=3,
        output_type="latent",
    )
    assert rows == [2, 1, 1] * 3


def test_the_pipeline_s_own_are_used_and_saved(tmp_path: Any) -> None:
    pipeline = ClassifierGuidedPipeline(
        exact_pipeline(DDIMScheduler()).unet,
        DDIMScheduler(clip_sample=False),
        OracleClassifier(Mixture()),
        defaults={"guidance_tolerance": 0.05, "guidance_algorithm": "strang"},
    )
    pipeline.set_progress_bar_config(disable=True)
    own = sample(pipeline, 1)
    assert own.guidance_evaluations < 20
    assert torch.equal(
        own.images, sample(pipeline, 1, guidance_tolerance=0.05, guidance_algorithm="strang").images
    )
    assert (
        sample(pipeline, 1, guidance_every=1).guidance_evaluations == 20
    )  # which turns the tolerance off

    part = ClassifierGuidedPipeline(
        pipeline.unet,
        pipeline.scheduler,
        pipeline.classifier,
        defaults={"guidance_start": 0.3, "guidance_stop": 0.8},
    )
    part.set_progress_bar_config(disable=True)
    own = sample(part, 1)
    assert own.guidance_evaluations == 10
    assert torch.equal(
        own.images,
        sample(
            pipeline,
            1,
            guidance_start=0.3,
            guidance_stop=0.8,
            guidance_every=1,
            guidance_algorithm="output",
        ).images,
    )
    assert sample(part, 1, guidance_start=0.0, guidance_stop=1.0).guidance_evaluations == 20
    unsaid = ClassifierGuidedPipeline(
        pipeline.unet, pipeline.scheduler, defaults=dict.fromkeys(DEFAULTS)
    )
    assert unsaid.config.defaults == DEFAULTS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidance_every": 0}, "guidance_every=0: an integer, 1 or more, is allowed"),
        ({"guidance_every": 1.5}, "guidance_every=1.5: an integer"),
        ({"guidance_tolerance": 0.0}, "guidance_tolerance=0.0: a finite number above 0"),
        ({"guidance_tolerance": float("inf")}, "guidance_tolerance=inf"),
        (
            {"guidance_every": 2, "guidance_tolerance": 0.1},
            "guidance_every=2, guidance_tolerance=0.1: only one",
        ),
        (
            {"guidance_algorithm": "euler"},
            "guidance_algorithm='euler': one of output, mean, lie_trotter, strang",
        ),
    ],
)
def test_refuses(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(exact_pipeline(DDIMScheduler(clip_sample=False)), **call)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"clip_sample": True}, "clip_sample"),
        ({"clip_sample": False, "thresholding": True}, "thresholding"),
    ],
)
def test_a_scheduler_that_clips_is_refused(config: dict[str, Any], name: str) -> None:
    pipeline = exact_pipeline(DDPMScheduler(**config))
    with pytest.raises(
        ValueError, match=f"guidance_algorithm='strang': DDPMScheduler has {name}=True"
    ):
        sample(pipeline, guidance_algorithm="strang")


def test_a_term_that_can_t_be_asked_image_by_image_is_asked_at_each_step() -> None:
    pipeline = exact_pipeline(DPMSolverMultistepScheduler())
    call = {
        "guidance": EnergyGuidance(lambda x: x.square().sum((1, 2, 3)), scale=0.1),
        "guidance_tolerance": 0.5,
    }
    plain, found = sample(pipeline, guidance=call["guidance"]), sample(pipeline, **call)
    assert found.guidance_evaluations == 20 and torch.allclose(
        found.images, plain.images, atol=1e-5
    )
    call["guidance"].stop = 0.0  # it never acts: the classifier is spared
    assert sample(pipeline, **call).guidance_evaluations < 20


def test_what_turns_late_is_not_missed() -> None:
    """An estimate from a stretch where nothing turned is believed for twice that stretch, and no longer."""
    levels = [NoiseLevel(1.0, 2.0**-i, 1.0, -(2.0**-i)) for i in range(12)]
    x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    silent = ClassifierGuidance(OracleClassifier(Mixture()), 0)
    silent.score = lambda step: torch.zeros_like(step.sample)
    silent.select = lambda rows, count: silent
    sparing, asked = GuidanceReuse(levels, tolerance=0.1), []
    for index, level in enumerate(levels):
        rows = sparing.images_to_evaluate(index, 2, [silent])
        asked += [index] * bool(len(rows))
        sparing.score([silent], StepContext(x, x, lambda x: x, level, index, 12, 0.0), rows)
    assert asked == [0, 1, 3, 7]


def test_sparing_extrapolates_straight_over_log_s() -> None:
    """e = a + b log s is met exactly after two answers, at any later level."""
    levels = [NoiseLevel(1.0, s, 1.0, -s) for s in (8.0, 5.0, 3.0, 2.0, 0.5)]
    sparing, x = GuidanceReuse(levels, every=2), torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    term, a, b = Off(0.0), torch.randn_like(x), torch.randn_like(x)
    term.score = lambda step: (a + b * np.log(step.level.sigma)) / step.level.sigma
    for index, level in enumerate(levels):
        rows = sparing.images_to_evaluate(index, 2, [term])
        assert rows.tolist() == ([0, 1] if index in (0, 2, 4) else [])
        step = StepContext(x, x, lambda x: x, level, index, 5, 0.0)
        found = sparing.score([term] if len(rows) else [], step, rows) * level.sigma
        if index != 1:  # where the first answer is held
            assert torch.allclose(found, a + b * np.log(level.sigma), atol=1e-12)
        else:
            assert torch.allclose(found, a + b * np.log(8.0), atol=1e-12)

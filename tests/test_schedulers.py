"""Guided unconditional = conditional, for every scheduler and prediction type, on a closed form.

With the exact networks of a mixture of two Gaussians, "unconditional + scale 1 * exact gradient" must follow the path
of "conditional" from the same noise. The networks know nothing but their scaled input and the timestep they are told.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from conftest import SHAPE, Clock, Mixture, OracleClassifier, OracleUNet

from guided_diffusers import ClassifierGuidance, ClassifierGuidedPipeline, NoiseLevel, StepContext
from guided_diffusers.noise import x0_coefficients

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
EXACT, ROUNDED = 1e-3, 2e-2


@dataclass
class Case:
    scheduler: str
    prediction: str
    config: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    clock: str = "ddpm"
    sigma_data: float | None = None
    tolerance: float = EXACT

    @property
    def name(self) -> str:
        said = {*BETAS, "prediction_type", "clip_sample", "clip_denoised"}
        extra = [f"{k}={v}" for k, v in {**self.config, **self.call}.items() if k not in said]
        return " ".join([self.scheduler.removesuffix("Scheduler"), self.prediction, *extra])


def ddpm_like(
    scheduler: str,
    *predictions: str,
    tolerance: float = EXACT,
    call: dict | None = None,
    **config: Any,
) -> list[Case]:
    return [
        Case(
            scheduler, p, {**BETAS, "prediction_type": p, **config}, call or {}, tolerance=tolerance
        )
        for p in predictions
    ]


ALL = ("epsilon", "v_prediction", "sample")
EPS_V = ALL[:2]
CASES = [
    *ddpm_like("DDPMScheduler", *ALL, clip_sample=False),
    *ddpm_like(
        "DDPMScheduler",
        *ALL,
        clip_sample=False,
        variance_type="fixed_large",
        timestep_spacing="trailing",
    ),
    *ddpm_like(
        "DDPMScheduler",
        "epsilon",
        clip_sample=False,
        call={"timesteps": [999, 800, 500, 300, 200, 100, 20]},
    ),
    *ddpm_like("DDPMParallelScheduler", *ALL, clip_sample=False),
    *ddpm_like("DDIMScheduler", *ALL, clip_sample=False),
    *ddpm_like(
        "DDIMScheduler", *ALL, clip_sample=False, timestep_spacing="trailing", call={"eta": 1.0}
    ),
    *ddpm_like("DDIMScheduler", "epsilon", clip_sample=False, timestep_spacing="linspace"),
    *ddpm_like(
        "DDIMScheduler",
        "v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    ),
    *ddpm_like("DDIMParallelScheduler", *ALL, clip_sample=False),
    *ddpm_like("CogVideoXDDIMScheduler", *ALL, clip_sample=False),
    *ddpm_like("CogVideoXDPMScheduler", *EPS_V, clip_sample=False),
    *ddpm_like("PNDMScheduler", *EPS_V, skip_prk_steps=True),
    *ddpm_like("PNDMScheduler", *EPS_V, skip_prk_steps=False),
    *ddpm_like("DPMSolverMultistepScheduler", *ALL),
    *ddpm_like("DPMSolverMultistepScheduler", *ALL, solver_order=3, timestep_spacing="trailing"),
    *ddpm_like("DPMSolverMultistepScheduler", *ALL, algorithm_type="sde-dpmsolver++"),
    *ddpm_like(
        "DPMSolverMultistepScheduler",
        *EPS_V,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
    ),
    *ddpm_like("DPMSolverMultistepScheduler", *ALL, use_karras_sigmas=True, tolerance=ROUNDED),
    *ddpm_like("DPMSolverMultistepScheduler", "epsilon", use_lu_lambdas=True, tolerance=ROUNDED),
    *ddpm_like("DPMSolverSinglestepScheduler", *ALL),
    *ddpm_like("UniPCMultistepScheduler", *ALL),
    *ddpm_like("UniPCMultistepScheduler", *ALL, use_karras_sigmas=True, tolerance=ROUNDED),
    *ddpm_like("DEISMultistepScheduler", *ALL),
    *ddpm_like("SASolverScheduler", *ALL),
    *ddpm_like("SASolverScheduler", "epsilon", use_karras_sigmas=True, tolerance=ROUNDED),
    *ddpm_like("LCMScheduler", *ALL, clip_sample=False, call={"num_inference_steps": 10}),
    *ddpm_like(
        "TCDScheduler", *ALL, clip_sample=False, call={"num_inference_steps": 10, "eta": 0.3}
    ),
    *[
        Case("UnCLIPScheduler", p, {"prediction_type": p, "clip_sample": False})
        for p in ("epsilon", "sample")
    ],
    *ddpm_like("EulerDiscreteScheduler", *ALL),
    *ddpm_like(
        "EulerDiscreteScheduler", *EPS_V, use_karras_sigmas=True, timestep_spacing="trailing"
    ),
    *ddpm_like(
        "EulerDiscreteScheduler",
        "v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    *ddpm_like("EulerAncestralDiscreteScheduler", *EPS_V),
    *ddpm_like("HeunDiscreteScheduler", *ALL),
    *ddpm_like("HeunDiscreteScheduler", *EPS_V, use_karras_sigmas=True),
    *ddpm_like("KDPM2DiscreteScheduler", *EPS_V),
    *ddpm_like("KDPM2AncestralDiscreteScheduler", *EPS_V),
    *ddpm_like("LMSDiscreteScheduler", *ALL),
    *ddpm_like("DPMSolverSDEScheduler", *EPS_V),
    *[
        Case("EDMEulerScheduler", f"edm_{p}", {"prediction_type": p}, clock="edm", sigma_data=0.5)
        for p in EPS_V
    ],
    *[
        Case(
            "EDMDPMSolverMultistepScheduler",
            f"edm_{p}",
            {"prediction_type": p},
            clock="edm",
            sigma_data=0.5,
        )
        for p in EPS_V
    ],
    *[
        Case(
            "CosineDPMSolverMultistepScheduler",
            f"edm_{p}",
            {"prediction_type": p},
            clock="cosine",
            sigma_data=1.0,
        )
        for p in EPS_V
    ],
    Case("FlowMatchEulerDiscreteScheduler", "flow", clock="flow"),
    Case("FlowMatchEulerDiscreteScheduler", "flow", {"shift": 3.0}, clock="flow"),
    Case("FlowMatchEulerDiscreteScheduler", "flow", {"use_karras_sigmas": True}, clock="flow"),
    Case("FlowMatchEulerDiscreteScheduler", "flow", {"stochastic_sampling": True}, clock="flow"),
    Case(
        "FlowMatchEulerDiscreteScheduler", "data_flow", {"invert_sigmas": True}, clock="data flow"
    ),
    Case("FlowMatchHeunDiscreteScheduler", "flow", clock="flow"),
    Case("FlowMatchLCMScheduler", "flow", call={"num_inference_steps": 8}, clock="flow"),
    Case("FlowMapEulerDiscreteScheduler", "flow", clock="flow"),
    Case("LTXEulerAncestralRFScheduler", "flow", clock="flow"),
    *[
        Case(
            f"{name}Scheduler",
            "flow",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
            clock="flow",
            tolerance=ROUNDED,
        )
        for name in (
            "DPMSolverMultistep",
            "DPMSolverSinglestep",
            "UniPCMultistep",
            "DEISMultistep",
            "SASolver",
        )
    ],
    Case(
        "DPMSolverMultistepScheduler",
        "flow",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0},
        {"num_inference_steps": 40},
        clock="flow",
        tolerance=ROUNDED,
    ),
    Case("DDPMWuerstchenScheduler", "epsilon", clock="wuerstchen"),
    Case("IPNDMScheduler", "v_prediction", clock="ipndm"),
    Case(
        "CMStochasticIterativeScheduler",
        "consistency",
        {"clip_denoised": False, "num_train_timesteps": 40},
        clock="consistency",
        sigma_data=0.5,
    ),
    Case("SCMScheduler", "trigflow", call={"num_inference_steps": 2}, clock="trigonometric"),
]


def path(
    unet: OracleUNet, scheduler: Any, classifier: OracleClassifier | None, **call: Any
) -> list[torch.Tensor]:
    """The sample after each step, in units of its own standard deviation."""
    pipeline, states = ClassifierGuidedPipeline(unet, scheduler, classifier), []
    pipeline.set_progress_bar_config(disable=True)

    def record(
        pipeline: Any, index: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict:
        states.append(
            tensors["latents"].double() / max(1.0, float(tensors["latents"].double().std()))
        )
        return {}

    generator = [torch.Generator().manual_seed(i) for i in range(8)]
    pipeline(
        None if classifier is None else 1,
        8,
        generator=generator,
        callback_on_step_end=record,
        output_type="latent",
        **{"num_inference_steps": 20, **call},
    )
    return states


def difference(case: Case, shape: tuple[int, ...] = SHAPE) -> tuple[float, float, int]:
    """(largest difference of the paths, distance of the conditional's mean image from the class mean, gradients)"""
    mixture, scheduler = Mixture(shape=shape), getattr(diffusers, case.scheduler)(**case.config)
    clock = (
        Clock(case.clock, scheduler.alphas_cumprod) if case.clock == "ddpm" else Clock(case.clock)
    )
    # the classifier's schedule reaches the noise of flow matching and of zero terminal SNR
    classifier = OracleClassifier(mixture, beta_schedule="squaredcos_cap_v2")
    networks = (
        OracleUNet(mixture, case.prediction, clock, label, case.sigma_data) for label in (None, 1)
    )
    guided = path(next(networks), scheduler, classifier, **case.call)
    conditional = path(next(networks), scheduler, None, **case.call)
    assert len(guided) == len(conditional) > 0
    apart = max(float((a - b).abs().max()) for a, b in zip(guided, conditional, strict=True))
    return apart, float((conditional[-1].mean(0) - mixture.means[1]).abs().mean()), classifier.calls


def test_guided_unconditional_is_conditional(capsys: pytest.CaptureFixture) -> None:
    """Every configuration, in one table; and the paths end at the class, so the networks' levels are right, too."""
    lines, wrong, count = [], [], 0
    for case in CASES:
        if (
            case.scheduler == "DPMSolverSDEScheduler"
            and importlib.util.find_spec("torchsde") is None
        ):
            pytest.fail("torchsde is missing: install the package's extra `test`")
        apart, off, calls = difference(case)
        count += 1
        lines.append(f"{apart:9.1e}  {case.tolerance:7.0e}  {off:9.2f}  {case.name}")
        if not (apart <= case.tolerance and off < 0.35 and calls > 0):
            wrong.append(lines[-1])
    with capsys.disabled():
        print(
            "\nguided - conditional path: largest difference, allowed; final mean - class mean; "
            "configuration"
        )
        print("\n".join(lines))
        print(f"{count} configurations")
    assert not wrong, "\n".join(wrong)
    assert count >= 60


#: of each family of schedulers one or two
OF_ANY_RANK = [
    "DDPM epsilon",
    "DDIM v_prediction",
    "DDIM sample",
    "PNDM epsilon skip_prk_steps=True",
    "DPMSolverMultistep epsilon",
    "DPMSolverMultistep v_prediction algorithm_type=sde-dpmsolver++",
    "UniPCMultistep v_prediction",
    "SASolver epsilon",
    "LCM epsilon num_inference_steps=10",
    "EulerDiscrete epsilon",
    "EulerAncestralDiscrete epsilon",
    "HeunDiscrete v_prediction",
    "KDPM2Discrete epsilon",
    "EDMDPMSolverMultistep edm_epsilon",
    "FlowMatchEulerDiscrete flow shift=3.0",
    "FlowMatchHeunDiscrete flow",
    "IPNDM v_prediction",
    "SCM trigflow num_inference_steps=2",
]


@pytest.mark.parametrize("shape", [(16,), (2, 8), (1, 2, 4, 2)], ids=["rank 2", "rank 3", "rank 5"])
def test_guided_unconditional_is_conditional_at_any_rank(
    shape: tuple[int, ...], capsys: pytest.CaptureFixture
) -> None:
    """Signals, volumes and vectors to the tolerance of images, in a table."""
    by_name, lines, wrong = {case.name: case for case in CASES}, [], []
    for name in OF_ANY_RANK:
        apart, off, calls = difference(by_name[name], shape)
        lines.append(f"{apart:9.1e}  {by_name[name].tolerance:7.0e}  {off:9.2f}  {name}")
        if not (apart <= by_name[name].tolerance and off < 0.35 and calls > 0):
            wrong.append(lines[-1])
    with capsys.disabled():
        print(
            f"\nsamples of shape {shape}: guided - conditional path; allowed; mean; configuration"
        )
        print("\n".join(lines))
    assert not wrong, "\n".join(wrong)


def test_score_network_in_a_loop_of_ones_own() -> None:
    """Predictor-corrector steps (ScoreSdeVe) aren't the pipeline's; its maths serves them all the same."""
    mixture, paths = Mixture(), []
    scheduler = diffusers.ScoreSdeVeScheduler(
        num_train_timesteps=1000, sigma_min=0.01, sigma_max=20.0
    )
    term = ClassifierGuidance(OracleClassifier(mixture, beta_schedule="squaredcos_cap_v2"), 1)
    for label in (None, 1):
        network, generator = (
            OracleUNet(mixture, "score", Clock("ve"), label),
            torch.Generator().manual_seed(0),
        )
        scheduler.set_timesteps(60)
        scheduler.set_sigmas(60)
        x, path = torch.randn(8, 1, 4, 4, generator=generator) * scheduler.init_noise_sigma, []

        def output(
            x: torch.Tensor,
            sigma: torch.Tensor,
            index: int,
            network: OracleUNet = network,
            label: int | None = label,
        ) -> torch.Tensor:
            level = NoiseLevel(1.0, float(sigma), *x0_coefficients("score", 1.0, float(sigma)))
            score = network(x, sigma).sample
            step = StepContext(x, level.x0(x, score), level.x0, level, index, 60, float(sigma))
            return level.corrected(score, term.score(step)) if label is None else score

        for index, (t, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas, strict=True)):
            x = scheduler.step_correct(output(x, sigma, index), x, generator=generator).prev_sample
            x = scheduler.step_pred(output(x, sigma, index), t, x, generator=generator).prev_sample
            path.append(x / max(1.0, float(x.std())))
        paths.append(torch.stack(path))
    assert (paths[0] - paths[1]).abs().max() < EXACT
    assert (paths[1][-1].mean(0) - mixture.means[1]).abs().mean() < 0.35

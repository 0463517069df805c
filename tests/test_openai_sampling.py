"""OpenAI's guided-diffusion sampling: every reference trajectory, single steps and schedules, recorded noise fed in."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from test_openai_networks import REFERENCE, original, pair
from torch import Tensor

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.noise import posterior_variance
from guided_diffusers.openai import (
    ADMDDIMScheduler,
    ADMDDPMScheduler,
    convert_scheduler,
    respaced_timesteps,
)

RUNS = [f"p{i:02}" for i in range(1, 14)] + [f"d{i:02}" for i in range(1, 8)] + ["sr01"]
INVERSIONS = ["r01", "r02", "r03"]


class Recorded:
    """Noise that a test hands to the schedulers in the place of random numbers."""

    noise: Tensor

    def __call__(
        self, shape: tuple[int, ...], generator: Any = None, device: Any = None, dtype: Any = None
    ) -> Tensor:
        return self.noise[: shape[0]].to(dtype)


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    for module in (
        "diffusers.schedulers.scheduling_ddpm",
        "diffusers.schedulers.scheduling_ddim",
        "guided_diffusers.openai.schedules",
    ):
        monkeypatch.setattr(f"{module}.randn_tensor", recorded)
    return recorded


def load(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in np.load(REFERENCE / name).items()}


def described(file: str) -> dict[str, dict[str, Any]]:
    """What index.json says of the arrays of a file, by key."""
    entries = json.loads((REFERENCE / "index.json").read_text())
    return {entry["key"]: entry for entry in entries if entry["file"] == file}


@cache
def network(name: str, dtype: torch.dtype, **config: Any) -> Any:
    state, args = original(name)
    return pair(name)[0](state, args | config).to(dtype)


def scheduler_for(
    diffusion: dict[str, Any], clip: bool, ddim: bool = False
) -> DDPMScheduler | DDIMScheduler:
    """The scheduler with the original's numbers for a reference run's settings."""
    scheduler = ADMDDIMScheduler if ddim else ADMDDPMScheduler
    return scheduler.from_config(convert_scheduler(diffusion).config, clip_sample=clip)


def make(args: dict[str, Any], dtype: torch.dtype, scheduler: Any) -> ClassifierGuidedPipeline:
    schedule = args["diffusion"].get("noise_schedule", "linear")
    classifier = args.get("classifier") and network(
        args["classifier"], dtype, noise_schedule=schedule
    )
    pipeline = ClassifierGuidedPipeline(
        network(args["model"], dtype), scheduler, classifier or None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def kept(diffusion: dict[str, Any]) -> list[int]:
    return respaced_timesteps(diffusion.get("steps", 1000), diffusion.get("timestep_respacing", ""))


class Enough(Exception):
    pass


def states(
    pipeline: ClassifierGuidedPipeline,
    recorded: Recorded,
    noise: Tensor,
    steps: int | None = None,
    **call: Any,
) -> list[dict[str, Tensor]]:
    """What a run has after each step, or after each of its first `steps`; step k draws noise[k]."""
    seen: list[dict[str, Tensor]] = []

    def note(_: Any, index: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append({name: value for name, value in values.items() if value is not None})
        if index + 1 == steps:
            raise Enough
        recorded.noise = noise[min(index + 1, len(noise) - 1)]
        return {}

    recorded.noise = noise[0]
    try:
        pipeline(
            output_type="latent",
            callback_on_step_end=note,
            callback_on_step_end_tensor_inputs=["latents", "model_output", "score_shift"],
            **call,
        )
    except Enough:
        pass
    return seen


def largest(got: Tensor, expected: Tensor) -> float:
    return (got - expected).abs().max().item()


# 1. Trajectories


def run(
    name: str, dtype: torch.dtype, recorded: Recorded, plain: bool = False
) -> tuple[list[Tensor], dict[str, Any]]:
    """The states of a reference run and what the index says of it."""
    inputs, entry = load("inputs.npz"), described(f"sampling/{name}.npz")["samples"]
    args = entry["args"]
    ddim, guided = args["sampler"] == "DDIM", args["classifier"] is not None
    scheduler = scheduler_for(args["diffusion"], clip=args["clip_denoised"] and not ddim, ddim=ddim)
    call: dict[str, Any] = {"timesteps": kept(args["diffusion"])}
    if plain:
        scheduler = (DDIMScheduler if ddim else DDPMScheduler).from_config(scheduler.config)
        call = {"num_inference_steps": len(call["timesteps"])}
    call |= (
        {"eta": args["eta"], "clip_x0": args["clip_denoised"]}
        if ddim
        else {"guidance_algorithm": "mean"}
    )
    pipeline = make(args, dtype, scheduler)
    if args["low_res"]:
        call["image"] = load("forward/sr.npz")["low_res"]
    if guided or pipeline.unet.config.num_class_embeds:
        call |= {"label": inputs["y"], "guidance_scale": args["classifier_scale"] or 0.0}
    seen = states(pipeline, recorded, inputs["noise"], latents=inputs["x_T"].to(dtype), **call)
    if guided and dtype == torch.float32 and not plain:
        expected = load(f"sampling/{name}.npz").get("grad")
        for step, grad in zip(
            seen, [] if expected is None else expected, strict=expected is not None
        ):
            assert largest(step["score_shift"] / args["classifier_scale"], grad) < 1e-4, name
    return [step["latents"] for step in seen], entry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_trajectory(dtype: torch.dtype, recorded: Recorded) -> None:
    """float32 against every state, float64 against the final one (the reference has no others in float64)."""
    print(f"\n{dtype}: largest differences from the original's states")
    for name in RUNS:
        got, entry = run(name, dtype, recorded)
        reference = load(f"sampling/{name}.npz")
        assert len(got) == len(reference["samples"])
        steps = [largest(*both) for both in zip(got, reference["samples"], strict=True)]
        final = largest(got[-1], reference["final_f64"])
        print(
            f"{name}: all steps, float32 {max(steps):.1e}; final, float32 {steps[-1]:.1e}, "
            f"float64 {final:.1e}"
        )
        # With a cosine schedule and clipping the original's own first steps are up to 2e-3 from its float64 run.
        own = entry["max_abs_diff_f32_f64_per_step"]
        assert all(
            error < max(1e-3, 2 * rounding) for error, rounding in zip(steps, own, strict=True)
        ), name
        assert steps[-1] < 1e-3 and final < (1e-3 if dtype == torch.float32 else 1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inversions_and_the_way_back(dtype: torch.dtype, recorded: Recorded) -> None:
    print(f"\n{dtype}: largest differences from the original's inversions")
    inputs = load("inputs.npz")
    for name in INVERSIONS:
        args, reference = (
            described(f"sampling/{name}.npz")["reverse"]["args"],
            load(f"sampling/{name}.npz"),
        )
        pipeline = make(
            args, dtype, scheduler_for(args["diffusion"], clip=args["clip_denoised"], ddim=True)
        )
        label = inputs["y"] if pipeline.unet.config.num_class_embeds else None
        rising, count = kept(args["diffusion"])[::-1], len(args["respaced_t"])
        there = states(
            pipeline,
            recorded,
            inputs["noise"],
            count,
            label=label,
            guidance_scale=0.0,
            latents=inputs["x0"][:2].to(dtype),
            timesteps=rising,
        )
        steps = [
            largest(step["latents"], x) for step, x in zip(there, reference["reverse"], strict=True)
        ]
        back = states(
            pipeline,
            recorded,
            inputs["noise"],
            count,
            label=label,
            guidance_scale=0.0,
            latents=there[-1]["latents"],
            timesteps=rising[: count + 1][::-1],
        )
        final = largest(there[-1]["latents"], reference["reverse_final_f64"])
        returned = largest(back[-1]["latents"], reference["back_final"])
        print(
            f"{name}: all steps, float32 {max(steps):.1e}; last, float64 {final:.1e}; back, "
            f"float32 {returned:.1e}"
        )
        assert max(*steps, returned) < 1e-3 and final < (
            1e-3 if dtype == torch.float32 else 1e-6
        ), name


def test_diffusers_own_schedulers_differ_by_this_much(recorded: Recorded) -> None:
    """DDPMScheduler's float32 tables hardly matter; DDIMScheduler has no "linspace" steps to go to."""
    for name, low, high in (
        ("p01", 0, 1e-4),
        ("p08", 0, 1e-4),
        ("d01", 0, 1e-4),
        ("d07", 1.0, 10.0),
    ):
        got, _ = run(name, torch.float32, recorded, plain=True)
        error = largest(got[-1], load(f"sampling/{name}.npz")["samples"][-1])
        print(f"{name} with Diffusers' own scheduler: final {error:.1e}")
        assert low <= error < high, name


def test_clipping_where_the_original_does_matters(recorded: Recorded) -> None:
    """Clipped x0 without its eps, or clipped after guidance: the classical mistakes are seen by these numbers."""
    inputs, args = load("inputs.npz"), described("sampling/d04.npz")["samples"]["args"]
    final, timesteps = load("sampling/d04.npz")["samples"][-1], kept(args["diffusion"])
    for clip_x0, clip_sample in ((False, False), (False, True), (True, True)):
        pipeline = make(
            args, torch.float32, scheduler_for(args["diffusion"], clip=clip_sample, ddim=True)
        )
        got = pipeline(
            label=inputs["y"],
            guidance_scale=args["classifier_scale"],
            latents=inputs["x_T"],
            timesteps=timesteps,
            clip_x0=clip_x0,
            output_type="latent",
        ).images
        assert largest(got, final) > 0.1


# 2. Single steps


@pytest.mark.parametrize(
    "name", ["p_learned", "p_large", "p_small", "p_learned_cond_cos", "ddim_eta0", "ddim_eta1"]
)
def test_guided_step_also_at_t_0(name: str, recorded: Recorded) -> None:
    inputs, reference = load("inputs.npz"), load("forward/guided_step.npz")
    entry = described("forward/guided_step.npz")[f"{name}|sample"]
    args = entry["args"]
    ddim, rising = args["sampler"] == "DDIM", kept(args["diffusion"])[::-1]
    scheduler = scheduler_for(args["diffusion"], clip=args["clip_denoised"] and not ddim, ddim=ddim)
    call = (
        {"eta": args["eta"], "clip_x0": args["clip_denoised"]}
        if ddim
        else {"guidance_algorithm": "mean"}
    )
    call |= {"label": torch.tensor(args["y"]), "guidance_scale": args["classifier_scale"]}
    pipeline = make(args, torch.float32, scheduler)
    for i, k in enumerate(args["t"]):
        timesteps = rising[: k + 1][::-1]
        alpha_bar = scheduler.alphas_cumprod[timesteps[0]].item()
        x_t = alpha_bar**0.5 * inputs["x0"][:2] + (1 - alpha_bar) ** 0.5 * inputs["noise"][3]
        if (
            k == 0
        ):  # a run of one step would not know the step before, whose variance that at t = 0 is

            def put(
                pipeline: Any, index: int, t: int, values: Any, x_t: Tensor = x_t
            ) -> dict[str, Tensor]:
                return {"latents": x_t} if index == 0 else {}

            recorded.noise = inputs["noise"][4]
            got = pipeline(
                latents=x_t,
                timesteps=rising[1::-1],
                output_type="latent",
                callback_on_step_end=put,
                **call,
            ).images
            assert largest(got[i], reference[f"{name}|sample"][i]) < 1e-4
            continue
        (step,) = states(
            pipeline, recorded, inputs["noise"][4:5], 1, latents=x_t, timesteps=timesteps, **call
        )
        assert largest(step["latents"][i], reference[f"{name}|sample"][i]) < 1e-4
        if ddim:
            x0 = (x_t - (1 - alpha_bar) ** 0.5 * step["model_output"]) / alpha_bar**0.5
            assert largest(x0[i], reference[f"{name}|pred_xstart"][i]) < 1e-4
        if f"{name}|grad" in reference:
            grad = step["score_shift"] / args["classifier_scale"]
            assert largest(grad[i], reference[f"{name}|grad"][i]) < 1e-5


MOMENTS = [
    "a_lin_clip",
    "a_lin_noclip",
    "a_cos25_clip",
    "c_large",
    "c_small",
    "c_large_ddim10",
    "c_small_10",
    "c_xstart",
    "a_rescale_t_200",
    "a_rescale_t_4000",
]


@pytest.mark.parametrize("name", MOMENTS)
def test_mean_and_variance_of_a_step(name: str, recorded: Recorded) -> None:
    inputs, reference = load("inputs.npz"), load("forward/p_mean_variance.npz")
    entries = described("forward/p_mean_variance.npz")
    args = entries[f"{name}|mean"]["args"]
    diffusion, rising = args["diffusion"], kept(args["diffusion"])[::-1]
    flags = (
        {"diffusion_steps": diffusion.get("steps", 1000)} | diffusion | {"rescale_timesteps": False}
    )
    scheduler = scheduler_for(flags, args["clip_denoised"])
    scheduler.set_timesteps(timesteps=rising[::-1])
    unet = network(args["model"], torch.float32)
    recorded.noise = torch.zeros_like(inputs["x_T"])
    for i, k in enumerate(args["t"]):
        assert rising[k] == args["mapped_t"][i]
        alpha_bar = scheduler.alphas_cumprod[rising[k]].item()
        x_t = alpha_bar**0.5 * inputs["x0"][:2] + (1 - alpha_bar) ** 0.5 * inputs["noise"][3]
        t = (
            rising[k] * 1000 / diffusion["steps"]
            if diffusion.get("rescale_timesteps")
            else rising[k]
        )
        with torch.no_grad():
            output = unet(x_t, t).sample
        step = scheduler.step(output, rising[k], x_t)
        learned = output[:, 3:] if output.shape[1] == 6 else None
        variance = torch.as_tensor(
            posterior_variance(scheduler, rising[::-1], len(rising) - 1 - k, learned)
        )
        got = {"mean": step.prev_sample[i], "pred_xstart": step.pred_original_sample[i]}
        if learned is None:
            got["variance"] = variance
        else:
            got["log_variance"] = variance.log()[i]
        for what, value in got.items():
            rounding = entries[f"{name}|{what}"].get("max_abs_diff_f32_f64", 1e-7)
            assert largest(value, reference[f"{name}|{what}"][i]) < max(1e-5, 4 * rounding), what


# 3. Schedules


def test_tables_and_kept_timesteps() -> None:
    for key, expected in np.load(REFERENCE / "schedules.npz").items():
        parts = key.split("|")
        if parts[0] == "respacing":
            assert respaced_timesteps(int(parts[1]), parts[2])[::-1] == expected.tolist(), key
            continue
        steps, respacing, what = int(parts[1]), parts[2].removeprefix("all"), parts[3]
        scheduler = ADMDDPMScheduler.from_config(
            convert_scheduler({"noise_schedule": parts[0], "diffusion_steps": steps}).config
        )
        rising = respaced_timesteps(steps, respacing)[::-1]
        alpha_bar = scheduler.alphas_cumprod[rising].numpy()
        if what == "timestep_map":
            assert rising == expected.tolist(), key
        elif what == "alphas_cumprod":
            np.testing.assert_allclose(alpha_bar, expected, rtol=1e-9, err_msg=key)
        elif what == "betas":
            np.testing.assert_allclose(
                1 - alpha_bar / np.append(1, alpha_bar[:-1]), expected, rtol=1e-9, err_msg=key
            )
        elif what == "posterior_log_variance_clipped":
            falling = rising[::-1]
            small = ADMDDPMScheduler.from_config(scheduler.config, variance_type="fixed_small")
            got = [posterior_variance(small, falling, i, None) for i in range(len(falling) - 1)][
                ::-1
            ]
            np.testing.assert_allclose(np.log(got), expected[1:], rtol=1e-9, err_msg=key)


def test_respacing_that_is_not_possible() -> None:
    for respacing, message in (
        ("ddim700", "no stride keeps exactly 700 of 1000"),
        ("1001", "1 to 1000 are allowed"),
        ("10,600", "600 of a part of 500"),
        ("0", "0 of a part"),
    ):
        with pytest.raises(ValueError, match=message):
            respaced_timesteps(1000, respacing)


def test_the_schedulers_survive_saving_and_refuse_what_the_original_lacks(tmp_path: Any) -> None:
    for cls in (ADMDDPMScheduler, ADMDDIMScheduler):
        cls(beta_schedule="squaredcos_cap_v2", timestep_spacing="leading").save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        loaded.set_timesteps(30)
        assert loaded.alphas_cumprod.dtype == torch.float64 and loaded.timesteps.tolist() == list(
            range(986, -1, -34)
        )
        for change in (
            {"timestep_spacing": "trailing"},
            {"steps_offset": 1},
            {"rescale_betas_zero_snr": True},
        ):
            with pytest.raises(ValueError, match=next(iter(change))):
                cls.from_config(loaded.config, **change)
        for timesteps in ([5, 5], [3, 8, 1], [1000], []):
            with pytest.raises(ValueError, match="in order are allowed"):
                loaded.set_timesteps(timesteps=timesteps)
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction'"):
        ADMDDIMScheduler(prediction_type="v_prediction")
    loaded.set_timesteps(timesteps=[0, 500])
    with pytest.raises(ValueError, match="eta=0.5: an inversion"):
        loaded.step(torch.zeros(1, 3, 2, 2), 0, torch.zeros(1, 3, 2, 2), eta=0.5)


# 4. Up-sampling


def test_low_resolution_images_in_any_form(recorded: Recorded) -> None:
    """Pictures of the values in [-1, 1], and one for all; a network that takes none refuses them."""
    inputs, args = load("inputs.npz"), described("sampling/sr01.npz")["samples"]["args"]
    pipeline = make(args, torch.float32, scheduler_for(args["diffusion"], clip=True))
    bytes_ = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    pictures = [Image.fromarray(one.numpy()) for one in bytes_]
    call = {
        "label": inputs["y"],
        "guidance_scale": 0.0,
        "latents": inputs["x_T"],
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    recorded.noise = inputs["noise"][0]
    tensor = bytes_.permute(0, 3, 1, 2) / 127.5 - 1
    both = pipeline(image=tensor, **call).images
    assert torch.equal(pipeline(image=pictures, **call).images, both)
    one = pipeline(image=pictures[1], **call).images
    torch.testing.assert_close(one[1], both[1])
    assert not torch.allclose(one[0], both[0], atol=1e-2)
    del call["latents"]
    assert pipeline(image=pictures, **call).images.shape == (2, 3, 32, 32)
    for image, message in (
        (tensor[:, :1], r"image has shape \(2, 1, 16, 16\)"),
        (tensor[[0, 1, 0]], "3 images; one, or"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(image=image, **call)
    with pytest.raises(
        ValueError, match="6 channels are no pictures; an up-sampling network needs image"
    ):
        pipeline(label=inputs["y"], guidance_scale=0.0, num_inference_steps=2)
    args = described("sampling/p04.npz")["samples"]["args"]
    plain = make(args, torch.float32, scheduler_for(args["diffusion"], clip=True))
    with pytest.raises(ValueError, match="half of the network's 3 input channels"):
        plain(image=tensor, latents=inputs["x_T"], num_inference_steps=2)

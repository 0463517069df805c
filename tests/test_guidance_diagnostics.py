"""What guidance did at each step, against closed forms; and that looking on changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Clock, Mixture, OracleClassifier, OracleUNet
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image
from test_cli import folder, pipeline, run  # noqa: F401  (folder and pipeline are fixtures)

from guided_diffusers import (
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    EnergyGuidance,
    Guidance,
    StepContext,
    guide,
)
from guided_diffusers.diagnosis import GuidanceDiagnostics
from guided_diffusers.noise import noise_levels
from guided_diffusers.sampling import sample

SCHEDULERS = [
    DDIMScheduler(clip_sample=False),
    DDPMScheduler(clip_sample=False),
    EulerDiscreteScheduler(),
    DPMSolverMultistepScheduler(),
]
LABELS, SCALE, STEPS = [0, 1, {0: 0.5, 1: 0.5}], 2.5, 7


def exact(mixture: Mixture, scheduler: Any) -> ClassifierGuidedPipeline:
    found = ClassifierGuidedPipeline(
        OracleUNet(mixture, "epsilon", Clock()), scheduler, OracleClassifier(mixture)
    )
    found.set_progress_bar_config(disable=True)
    return found


def call(pipeline: ClassifierGuidedPipeline, **more: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(LABELS))]
    return pipeline(
        LABELS,
        **{
            "guidance_scale": SCALE,
            "num_inference_steps": STEPS,
            "generator": generators,
            "output_type": "latent",
            **more,
        },
    ).images


class Kept(GuidanceDiagnostics):
    """Keeps the samples, too."""

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, tensors: dict) -> dict:
        vars(self).setdefault("samples", []).append(tensors["sample"].double().clone())
        return super().callback_fn(pipeline, step_index, timestep, tensors)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_figures_are_the_closed_forms(scheduler: Any, mixture: Mixture) -> None:
    """log p(k | x_t), its gradient, the score and x0 of a mixture of Gaussians, written out at every sample."""
    record, kind = Kept(LABELS), exact(mixture, scheduler)
    call(kind, callback_on_step_end=record)
    kind.scheduler.set_timesteps(STEPS)
    steps, levels = record.steps(), noise_levels(kind.scheduler)
    weights = torch.tensor([[1, 0], [0, 1], [0.5, 0.5]], dtype=torch.float64)
    assert [step["index"] for step in steps] == list(range(STEPS)) and record.images == 3
    before = None
    for step, level, x in zip(steps, levels, record.samples, strict=True):
        x.requires_grad_(True)
        log_p = (weights * mixture.log_joint(x, level.alpha, level.sigma).log_softmax(-1)).sum(-1)
        shift = SCALE * torch.autograd.grad(log_p.sum(), x)[0]
        score = torch.autograd.grad(
            mixture.log_joint(x, level.alpha, level.sigma).logsumexp(-1).sum(), x
        )[0]
        x0 = mixture.denoised(x.detach(), level.alpha, level.sigma, None)
        guided = x0 + level.sigma**2 / level.alpha * shift
        expected = {
            "log_probability": log_p.detach(),
            "guidance_to_score": shift.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1),
            "outside_unguided": (x0.abs() > 1).flatten(1).double().mean(1),
            "outside": (guided.abs() > 1).flatten(1).double().mean(1),
        }
        if before is None:
            assert step["cosine"].isnan().all()
        else:  # float32 has no digits left of what is smaller
            cosine = torch.cosine_similarity(shift.flatten(1), before.flatten(1), eps=1e-300)
            expected["cosine"] = torch.where(
                shift.flatten(1).norm(dim=1) > 1e-30, cosine, step["cosine"].double()
            )
        for name, value in expected.items():
            torch.testing.assert_close(step[name].double(), value, atol=2e-4, rtol=2e-3)
        assert step["sigma_over_alpha"] == pytest.approx(level.sigma / level.alpha)
        before = shift
    assert steps[0]["outside"].max() > 0 and len({step["timestep"] for step in steps}) == STEPS


def test_looking_on_changes_nothing(mixture: Mixture) -> None:
    for scheduler in SCHEDULERS:
        for more in ({}, {"guidance_scale": 0.0}, {"guidance_algorithm": "mean"}):
            if more.get("guidance_algorithm") and not isinstance(scheduler, DDPMScheduler):
                continue
            pipeline = exact(mixture, scheduler)
            plain = call(pipeline, **more)
            assert torch.equal(
                plain, call(pipeline, callback_on_step_end=GuidanceDiagnostics(LABELS), **more)
            )


def test_without_guidance_the_classifier_is_asked_all_the_same(mixture: Mixture) -> None:
    record, other = (
        GuidanceDiagnostics(LABELS),
        GuidanceDiagnostics(LABELS, OracleClassifier(Mixture(seed=1))),
    )
    pipeline = exact(mixture, SCHEDULERS[0])
    for one in (record, other):
        call(pipeline, guidance_scale=0.0, callback_on_step_end=one)
    for step, another in zip(record.steps(), other.steps(), strict=True):
        assert (step["guidance_to_score"] == 0).all() and step["cosine"].isnan().all()
        assert torch.equal(step["outside"], step["outside_unguided"])
        assert step["log_probability"].isfinite().all()
        assert not torch.equal(step["log_probability"], another["log_probability"])
    none = GuidanceDiagnostics()
    call(pipeline, callback_on_step_end=none)
    assert all(step["log_probability"].isnan().all() for step in none.steps())


def test_only_at_the_steps_where_guidance_acts(mixture: Mixture) -> None:
    record = GuidanceDiagnostics(LABELS)
    call(
        exact(mixture, SCHEDULERS[0]),
        num_inference_steps=10,
        guidance_start=0.2,
        guidance_stop=0.5,
        callback_on_step_end=record,
    )
    steps = record.steps()
    assert [step["index"] for step in steps if (step["guidance_to_score"] > 0).all()] == [2, 3, 4]
    assert [step["index"] for step in steps if step["cosine"].isfinite().all()] == [3, 4]


def test_the_mean_algorithm_and_the_output_algorithm_guide_alike(mixture: Mixture) -> None:
    """At the first step, from the same noise, both add the same to the same score."""
    first = []
    for algorithm in ("output", "mean"):
        record = GuidanceDiagnostics(LABELS)
        call(
            exact(mixture, SCHEDULERS[1]), guidance_algorithm=algorithm, callback_on_step_end=record
        )
        first.append(record.steps()[0])
    for name in ("log_probability", "guidance_to_score", "outside", "outside_unguided"):
        torch.testing.assert_close(first[0][name], first[1][name])


class Turning(Guidance):
    """Adds a vector of length index + 1 that turns by 40 degrees a step; to the second image, nothing."""

    def score(self, step: StepContext) -> torch.Tensor:
        angle = torch.tensor(40.0 * step.index).deg2rad()
        shift = torch.zeros_like(step.sample)
        shift[0, 0, 0, :2] = (step.index + 1) * torch.stack([angle.cos(), angle.sin()])
        return shift


def test_guidance_that_turns(mixture: Mixture) -> None:
    record, pipeline = GuidanceDiagnostics(), exact(mixture, SCHEDULERS[0])
    pipeline(
        num_images_per_label=2,
        guidance=Turning(),
        num_inference_steps=4,
        output_type="latent",
        callback_on_step_end=record,
    )
    for step in record.steps()[1:]:
        assert step["cosine"][0].item() == pytest.approx(
            torch.tensor(40.0).deg2rad().cos().item(), rel=1e-5
        )
        assert (
            step["cosine"][1].isnan()
            and step["guidance_to_score"][1] == 0 < step["guidance_to_score"][0]
        )


def test_through_guide(pipeline: ClassifierGuidedPipeline) -> None:
    """A pipeline of Diffusers, guided through `guide`, tells the same as ours; with two terms, their sum."""
    ours, theirs, both = GuidanceDiagnostics(0), GuidanceDiagnostics(), GuidanceDiagnostics()
    torch.manual_seed(0)
    plain = DDPMPipeline(
        UNet2DModel(
            8,
            1,
            1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        DDPMScheduler(clip_sample=False),
    )
    plain.set_progress_bar_config(disable=True)
    pipeline = ClassifierGuidedPipeline(plain.unet, plain.scheduler, pipeline.classifier)
    pipeline.set_progress_bar_config(disable=True)

    def term() -> ClassifierGuidance:
        return ClassifierGuidance(pipeline.classifier, 0, SCALE, start=0.3)

    def made(*terms: Any) -> torch.Tensor:
        with guide(plain, *terms):
            return torch.as_tensor(
                plain(
                    2,
                    num_inference_steps=STEPS,
                    output_type="np",
                    generator=torch.Generator().manual_seed(0),
                ).images
            )

    energy = EnergyGuidance(lambda x0: x0.square().flatten(1).sum(1), scale=0.5)
    assert torch.equal(made(term()), made(*theirs.watch(term())))
    assert torch.equal(made(term(), energy), made(*both.watch(term(), energy)))
    pipeline(
        [0, 0],
        guidance_scale=SCALE,
        guidance_start=0.3,
        num_inference_steps=STEPS,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=ours,
    )
    seen = {step["index"]: step for step in ours.steps() if (step["guidance_to_score"] > 0).all()}
    assert (
        seen.keys() == {step["index"] for step in theirs.steps()} == {3, 4, 5, 6}
        and theirs.images == 2
    )
    for step in theirs.steps():
        for name in ("log_probability", "guidance_to_score", "outside", "outside_unguided"):
            torch.testing.assert_close(step[name], seen[step["index"]][name])
        assert step["timestep"] == seen[step["index"]]["timestep"]
    assert [step["index"] for step in both.steps()] == list(range(STEPS)) and both.images == 2
    for _ in range(2):
        made(*theirs.watch(term()))
    assert theirs.images == 6 and {len(step["cosine"]) for step in theirs.steps()} == {6}


def test_batches_go_on_with_the_labels(mixture: Mixture) -> None:
    whole, batches = GuidanceDiagnostics([0, 1]), GuidanceDiagnostics([0, 1])
    pipeline = exact(mixture, SCHEDULERS[0])
    for record, size in ((whole, 5), (batches, 2), (batches, 1)):
        if size > 1:
            list(
                sample(
                    pipeline,
                    [0, 1],
                    0,
                    size,
                    range(5),
                    num_inference_steps=3,
                    output_type="latent",
                    callback_on_step_end=record,
                )
            )
    assert whole.images == batches.images == 5
    for one, other in zip(whole.steps(), batches.steps(), strict=True):
        torch.testing.assert_close(
            one["log_probability"], other["log_probability"], atol=1e-4, rtol=1e-3
        )


def test_files(mixture: Mixture, tmp_path: Path) -> None:
    record = GuidanceDiagnostics(LABELS)
    call(exact(mixture, SCHEDULERS[0]), callback_on_step_end=record)
    record.save(tmp_path / "a" / "steps.json")
    content = json.loads((tmp_path / "a" / "steps.json").read_text())
    assert content["images"] == 3 and len(content["steps"]) == STEPS
    for row, step in zip(content["steps"], record.steps(), strict=True):
        assert row["log_probabilities"] == step["log_probability"].tolist()
        assert row["log_probability"] == pytest.approx(sum(row["log_probabilities"]) / 3)
        assert row["cosine"] is None if row["index"] == 0 else -1.001 <= row["cosine"] <= 1.001
    record.save(tmp_path / "steps.png")
    with Image.open(tmp_path / "steps.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").tobytes())) > 20
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["steps.json", "steps.png"]
    with pytest.raises(ValueError, match="no step was seen"):
        GuidanceDiagnostics().save(tmp_path / "b.json")
    with pytest.raises(
        ValueError, match="a name that ends with .json, .png, .pdf, .svg is allowed"
    ):
        record.save(tmp_path / "b.txt")
    with pytest.raises(ValueError, match="label 7 is unknown"):
        call(exact(mixture, SCHEDULERS[0]), callback_on_step_end=GuidanceDiagnostics(7))


def test_the_program_writes_them_and_the_same_images(folder: str, tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("seen", ("--diagnostics", str(tmp_path / "steps.json")))):
        run(
            folder,
            "--label",
            "boot",
            "coat",
            "--num-images",
            "5",
            "--batch-size",
            "2",
            "--device",
            "cpu",
            "--output",
            str(tmp_path / name),
            *more,
        )
    for path in (tmp_path / "plain").rglob("*.png"):
        assert (
            path.read_bytes()
            == (tmp_path / "seen" / path.relative_to(tmp_path / "plain")).read_bytes()
        )
    content = json.loads((tmp_path / "steps.json").read_text())
    assert (
        content["images"] == 5
        and [len(step["log_probabilities"]) for step in content["steps"]] == [5] * 3
    )
    with pytest.raises(
        SystemExit, match="isn't empty, and its images would not be counted"
    ):
        run(
            folder,
            "--label",
            "boot",
            "--output",
            str(tmp_path / "seen"),
            "--diagnostics",
            str(tmp_path / "b.json"),
        )
    run(
        folder,
        "--label",
        "boot",
        "--num-images",
        "2",
        "--output",
        str(tmp_path / "p.png"),
        "--diagnostics",
        str(tmp_path / "c.png"),
    )
    assert (tmp_path / "c.png").exists()

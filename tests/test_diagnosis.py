"""Diagnosis on a closed form, where it is known what a good classifier is, and `guided-diffusers inspect`."""

from __future__ import annotations

import json
import sys
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import SHAPE, Clock, Mixture, OracleClassifier
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from PIL import Image
from torchmetrics.functional.classification import multiclass_calibration_error

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.cli import main
from guided_diffusers.diagnosis import (
    Diagnosis,
    EvalLevel,
    LabelEvidence,
    calibration_error,
    calibration_gaps,
    diagnose,
    inspect,
    plot,
)
from guided_diffusers.diagnosis.levels import SamplingRun
from guided_diffusers.diagnosis.metrics import calibration_floor, logit_scale
from guided_diffusers.diagnosis.verdict import edges, rounded, status, useful_levels
from guided_diffusers.files import write_json
from guided_diffusers.guidance import gradient

NAMES = {0: "boot", 1: "coat", 2: "7"}


class Drawn(torch.utils.data.Dataset):
    """Images of the mixture; `shuffled`: with labels that mean nothing."""

    def __init__(self, mixture: Mixture, count: int = 400, shuffled: bool = False):
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.multinomial(mixture.prior, count, True, generator=generator)
        noise = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
        self.images = (mixture.means[self.labels] + mixture.std * noise).float()
        if shuffled:
            self.labels = self.labels[torch.randperm(count, generator=generator)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.images[i], "label": int(self.labels[i])}


class Loud(OracleClassifier):
    """The exact classifier with its logits times `factor`."""

    def __init__(self, mixture: Mixture, factor: float):
        super().__init__(mixture)
        self.factor = factor

    def forward(self, sample: torch.Tensor, timestep: float) -> Any:
        return SimpleNamespace(logits=self.factor * super().forward(sample, timestep).logits)


class Deaf(OracleClassifier):
    """Exact for clean images, and takes all others for clean ones."""

    def forward(self, sample: torch.Tensor, timestep: float) -> Any:
        return super().forward(sample, 0.0)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture(std=1.2)  # whose classes overlap, so that no gradient vanishes


@pytest.fixture(scope="module")
def data(mixture: Mixture) -> Drawn:
    return Drawn(mixture)


def exact_gradient(mixture: Mixture) -> Any:
    def reference(x: torch.Tensor, label: torch.Tensor, place: EvalLevel) -> torch.Tensor:
        def log_p(x: torch.Tensor) -> torch.Tensor:
            posterior = mixture.log_joint(x, place.level.alpha, place.level.sigma).log_softmax(-1)
            return posterior.gather(1, label[:, None])

        return gradient(log_p, x.double())

    return reference


def test_an_exact_classifier_is_fit(mixture: Mixture, data: Drawn) -> None:
    found = diagnose(
        OracleClassifier(mixture), data, reference=exact_gradient(mixture), progress=False
    )
    assert found.verdict.summary == "fit" and found.verdict.confidence == "calibrated"
    assert ["beyond [-1, 1]" in one for one in found.mismatches] == [True]  # a Gaussian's
    prior = [float((data.labels == k).double().mean()) for k in (0, 1)]
    for row in found.levels:
        assert abs(row["overconfidence"]) < 4 * row["overconfidence_error"] + 1e-3
        assert row["ece"] < 2.5 * row["ece_floor"] + 0.01  # nothing but few images
        assert row["cosine"] > 1 - 1e-5 and row["reference_scale"] == pytest.approx(1, abs=1e-4)
        assert row["finite_difference_error"] < 1e-4
        assert row["status"] != "harmful"
        assert row["prior_entropy"] == pytest.approx(
            -sum(p * log(p) for p in prior), abs=1e-9
        )  # all images are read
        assert row["chance"] == pytest.approx(max(prior))
    blind = diagnose(
        OracleClassifier(mixture), data, gradient_images=8, progress=False
    )  # nothing to compare with
    assert blind.levels[0]["status"] == "harmless" and blind.levels[-1]["status"] == "informative"
    assert (
        all(row["status"] == "informative" for row in found.levels)
        and found.verdict.guidance_start == 0
    )
    assert (
        found.levels[0]["accuracy"] < 0.7 < 0.9 < found.levels[-1]["accuracy"]
    )  # chance, and yet as it should be
    verdict = blind.verdict
    assert verdict.summary == "fit" and 0 < verdict.guidance_start < verdict.guidance_stop == 1
    assert verdict.sigma_interval[0] == 0
    assert verdict.guidance_scale[0] == pytest.approx(verdict.logit_scale, abs=0.01)


def test_the_cross_entropy_is_the_mixtures(mixture: Mixture, data: Drawn) -> None:
    """Against an integral over the axis between the two means, at the middle of the run."""
    row = diagnose(OracleClassifier(mixture), data, progress=False).levels[5]
    sigma = row["sigma_over_alpha"]
    std = np.hypot(mixture.std, sigma)
    apart = float((mixture.means[0] - mixture.means[1]).norm())
    u = np.linspace(-12 * std, apart + 12 * std, 20001)
    joint = np.stack(
        [
            p * np.exp(-((u - m) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi))
            for p, m in zip(mixture.prior.tolist(), (0, apart), strict=True)
        ]
    )
    expected = -np.trapezoid((joint * np.log(joint / joint.sum(0) + 1e-300)).sum(0), u)
    assert (
        abs(row["cross_entropy"] - expected) < 4 * row["cross_entropy_error"]
        and row["cross_entropy_error"] < 0.05
    )


@pytest.mark.parametrize("factor, word", [(3.0, "over-confident"), (0.3, "under-confident")])
def test_confidence_and_the_scale_that_mends_it(
    mixture: Mixture, data: Drawn, factor: float, word: str
) -> None:
    found = diagnose(Loud(mixture, factor), data, reference=exact_gradient(mixture), progress=False)
    verdict = found.verdict
    assert verdict.confidence == word and word in verdict.words[-3] + verdict.words[-2]
    assert verdict.logit_scale == pytest.approx(
        1 / factor, abs=max(0.03, 4 * verdict.logit_scale_error)
    )
    assert verdict.guidance_scale[0] == pytest.approx(1 / factor, rel=0.35)
    unsure = max(
        found.levels, key=lambda row: row["cross_entropy"] if row["status"] == "informative" else 0
    )
    if factor < 1:
        assert unsure["reference_scale"] == pytest.approx(1 / factor, rel=0.4)
        assert all(row["status"] != "harmful" for row in found.levels)
    assert (
        min(row["cosine"] for row in found.levels) > 0.95
    )  # of two classes the direction is the same


def test_of_clean_images_only() -> None:
    """Whether its config says so, or claims 1000 steps."""
    mixture = Mixture(std=0.1)
    mixture.means *= 0.4
    data = Drawn(mixture)
    for classifier in (
        OracleClassifier(mixture, num_train_timesteps=1, trained_betas=[1e-4]),
        Deaf(mixture),
    ):
        found = diagnose(classifier, data, gradient_images=16, progress=False)
        assert found.verdict.summary.startswith("unfit above a low noise level (sigma/alpha 0."), (
            found
        )
        assert found.verdict.guidance_stop == 1 and found.verdict.sigma_interval[1] < 1
        assert (
            found.levels[-1]["status"] == "informative" and found.levels[0]["status"] == "harmful"
        )
        assert any("worse than the uninformed baseline" in one for one in found.verdict.words)
        says = any("trained up to sigma/alpha 0.01" in one for one in found.mismatches)
        assert says == (classifier.config["num_train_timesteps"] == 1) == found.levels[0]["beyond"]


def test_of_shuffled_labels(mixture: Mixture) -> None:
    """One that learned them by heart is harmful, one that learned their frequencies harmless; both are unfit."""
    shuffled = Drawn(mixture, shuffled=True)
    for factor, expected in ((1.0, "harmful"), (0.0, "harmless")):
        found = diagnose(Loud(mixture, factor), shuffled, gradient_images=16, progress=False)
        assert found.verdict.summary == "unfit" and found.levels[-1]["status"] == expected
        assert found.verdict.guidance_scale is None and found.verdict.sigma_interval is None
    assert all(row["cosine"] == 0 for row in found.levels)  # of no gradient at all


class TwoHeaded(torch.nn.Module):
    """The exact class-conditional network, whose label 2 is none."""

    def __init__(self, mixture: Mixture, clock: Clock):
        super().__init__()
        self.mixture, self.clock = mixture, clock
        self.anchor = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.config = SimpleNamespace(sample_size=4, in_channels=1, num_class_embeds=3)

    def forward(
        self, sample: torch.Tensor, t: Any, class_labels: torch.Tensor, return_dict: bool
    ) -> Any:
        alpha, sigma = self.clock(t)
        each = [
            self.mixture.denoised(x[None], alpha, sigma, None if label == 2 else int(label))
            for x, label in zip(sample, class_labels, strict=True)
        ]
        x0 = torch.cat(each)
        return (
            (sample - alpha * x0) / sigma if self.clock.kind == "ddpm" else (sample - x0) / sigma,
        )


@pytest.mark.parametrize(
    "scheduler, kind",
    [
        (DDIMScheduler(clip_sample=False), "ddpm"),
        (EulerDiscreteScheduler(), "ddpm"),
        (FlowMatchEulerDiscreteScheduler(), "flow"),
    ],
)
def test_the_networks_gradient(mixture: Mixture, scheduler: Any, kind: str) -> None:
    """score(x | y) - score(x) is grad log p(y | x), in every space; the scheduler stays as it was."""
    found = diagnose(
        OracleClassifier(mixture),
        Drawn(mixture, 24),
        scheduler,
        unet=TwoHeaded(mixture, Clock(kind)),
        levels=4,
        progress=False,
    )
    assert len(scheduler.timesteps) == 1000 and getattr(scheduler, "_begin_index", None) is None
    for row in found.levels[1:-1]:
        assert row["cosine"] > 0.95 and row["reference_scale"] == pytest.approx(1, abs=0.02), row
    assert found.settings["cosine_to"] == "the network's own"


def test_without_a_reference_the_cosine_is_of_smoothness(mixture: Mixture, data: Drawn) -> None:
    """A tenth of other noise hardly turns the exact gradient; it turns a network's of white noise by a lot."""

    class Rough(OracleClassifier):
        def forward(self, sample: torch.Tensor, timestep: float) -> Any:
            noise = (2e3 * sample.double()).sin().flatten(1)
            return SimpleNamespace(logits=torch.stack([noise.sum(1), -noise.sum(1)], 1) * 1e-3)

    smooth, rough = (
        diagnose(cls(mixture), data, images=64, progress=False) for cls in (OracleClassifier, Rough)
    )
    assert min(row["cosine"] for row in smooth.levels) > 0.99
    assert max(abs(row["cosine"]) for row in rough.levels[:-1]) < 0.2
    assert (
        "reference" not in smooth.settings["cosine_to"]
        and "reference_scale" not in smooth.levels[0]
    )


def test_seed_and_batches(mixture: Mixture, data: Drawn) -> None:
    """The same figures for any batch size; another seed is another noise; modules are left as they were."""
    classifier = OracleClassifier(mixture).train()
    one, two, other = (
        diagnose(classifier, data, images=40, gradient_images=12, levels=3, progress=False, **how)
        for how in ({"batch_size": 40}, {"batch_size": 16}, {"seed": 1})
    )
    for a, b in zip(one.levels, two.levels, strict=True):
        for name in ("accuracy", "cross_entropy", "ece", "gradient_norm", "cosine"):
            assert a[name] == pytest.approx(b[name], rel=1e-6), name
    assert (
        other.levels[0]["cross_entropy"] != one.levels[0]["cross_entropy"] and classifier.training
    )


def test_expected_calibration_error() -> None:
    """As Guo et al. define it, computed bin by bin, and as torchmetrics does."""
    generator = torch.Generator().manual_seed(0)
    logits, label = (
        2 * torch.randn(500, 7, generator=generator),
        torch.randint(7, (500,), generator=generator),
    )
    probabilities = np.exp(logits.double().numpy())
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == label.numpy()
    expected = 0.0
    for m in range(1, 16):
        inside = [i for i in range(500) if (m - 1) / 15 < confidence[i] <= m / 15]
        if inside:
            expected += (
                len(inside) / 500 * abs(np.mean(right[inside]) - np.mean(confidence[inside]))
            )
    assert calibration_error(calibration_gaps(logits.double(), label)) == pytest.approx(
        expected, abs=1e-12
    )
    halves = [calibration_gaps(logits[i::2].double(), label[i::2]) for i in (0, 1)]
    assert calibration_error(torch.cat(halves)) == pytest.approx(expected, abs=1e-12)
    sure = torch.tensor([[0.0, 1e3]])  # confidence 1 is in the last bin
    assert calibration_error(calibration_gaps(sure, torch.tensor([0]))) == 1
    theirs = multiclass_calibration_error(
        torch.as_tensor(probabilities), label, 7, n_bins=15, norm="l1"
    )
    assert float(theirs) == pytest.approx(expected, abs=1e-6)


def test_calibration_floor_and_logit_scale() -> None:
    """With labels drawn from the classifier's own probabilities the floor is the error, the scale 1."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 5, generator=generator, dtype=torch.float64)
    errors, scales = [], []
    for _ in range(20):
        label = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        errors.append(calibration_error(calibration_gaps(logits, label)))
        scales.append(logit_scale(4 * logits, label))
    assert np.mean(errors) == pytest.approx(calibration_floor(logits, generator), rel=0.15)
    values, reported = np.array(scales).T
    assert values.mean() == pytest.approx(0.25, abs=4 * values.std() / 20**0.5)
    assert reported.mean() == pytest.approx(values.std(ddof=1), rel=0.5)
    assert (
        logit_scale(logits, logits.argmin(1))[0] == 0
        and logit_scale(logits, logits.argmax(1))[0] > 99
    )


def test_status() -> None:
    """Three standard errors, half a per cent of H(y), and a reference that speaks where cross entropy can't."""
    for information, error, cos, compared, expected in (
        (0.1, 0.03, 0.0, False, "informative"),
        (0.1, 0.04, 0.0, False, "harmless"),
        (-0.1, 0.03, 0.9, True, "harmful"),
        (-0.009, 0.001, 0.0, False, "harmless"),
        (0.0, 0.01, 0.9, True, "informative"),
        (0.0, 0.01, 0.9, False, "harmless"),
        (0.0, 0.01, 0.7, True, "harmless"),
    ):
        row = {
            "information": information,
            "information_error": error,
            "prior_entropy": 2.0,
            "cosine": cos,
            "cosine_error": 0.01,
        }
        assert status(row, compared) == expected


def test_levels_and_edges() -> None:
    i, h, x = "informative", "harmless", "harmful"
    for statuses, expected in (
        ((h, i, h, i, h), range(1, 4)),
        ((x, x, h, i), range(3, 4)),
        ((i, x, i, i), range(2, 4)),
        ((h, x), range(0)),
        ((i,), range(1)),
    ):
        assert useful_levels(statuses, [1.0] * len(statuses)) == expected
    assert edges([0.25, 0.75, 1.0]) == [0, 0.5, 0.875, 1]
    assert (
        rounded(0.12345, True),
        rounded(157.41, False),
        rounded(0, False),
        rounded(2, True),
    ) == (0.123, 158, 0, 2)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver", "DDIM", "Euler"]
)
@pytest.mark.parametrize(
    ("trained", "offset"), [(40, 0), (1000, 0), (1000, 1), (1500, 0), (1500, 1)]
)
def test_the_levels_are_those_of_a_usual_run(name: str, trained: int, offset: int) -> None:
    """With leading timesteps, a run of all steps repeats timestep 0, or begins half-way."""
    config = {"timestep_spacing": "leading", "steps_offset": offset}
    saved = DDPMScheduler(num_train_timesteps=trained, **config)
    cls = getattr(diffusers, f"{name}Scheduler", None) or getattr(
        diffusers, f"{name}DiscreteScheduler"
    )
    scheduler = cls.from_config(saved.config)
    run = SamplingRun(scheduler)
    ratios = [level.ratio for level in run.eval_levels(10)]
    assert ratios == sorted(set(ratios), reverse=True)  # no level twice
    alpha_bar = saved.alphas_cumprod.double()
    schedule = ((1 - alpha_bar) / alpha_bar).sqrt()
    for level in run.eval_levels(10):
        assert level.ratio == pytest.approx(float(schedule[int(level.timestep)]), rel=1e-3)
    assert ratios[-1] < 1.1 * schedule[5] and int(run.at(0.0).timestep) >= 0.99 * (trained - 1) - 1
    scheduler.set_timesteps(20)
    assert run.at(0.0).timestep >= float(scheduler.timesteps[0])


def test_a_scheduler_without_a_run_to_measure() -> None:
    with pytest.raises(ValueError, match='scheduler LCM.*no run to measure.*"trailing"'):
        SamplingRun(LCMScheduler(original_inference_steps=2))
    assert len(SamplingRun(LCMScheduler()).noise_levels) == 50  # the longest that it has


def test_wrong_arguments(mixture: Mixture, data: Drawn) -> None:
    classifier = OracleClassifier(mixture)
    for how, message in (
        ({"images": 0}, "images=0: at least 1"),
        ({"gradient_images": 0}, "gradient_images=0"),
        ({"levels": 0}, "levels=0: 1 to 999"),
        ({"levels": 1000}, "levels=1000"),
        ({"unet": classifier}, "its scheduler is needed"),
        ({"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnose(classifier, data, progress=False, **how)
    with pytest.raises(ValueError, match="there are no images"):
        diagnose(classifier, [], progress=False)
    with pytest.raises(ValueError, match=r"labels \[2\] are unknown to the classifier; ids 0 to 1"):
        diagnose(classifier, [{"pixel_values": torch.zeros(SHAPE), "label": 2}], progress=False)
    classifier.config["problem_type"] = "regression"
    with pytest.raises(ValueError, match="single-label"):
        diagnose(classifier, data, progress=False)
    classifier.config = {**OracleClassifier(mixture).config, "num_labels": None}
    with pytest.raises(ValueError, match="num_labels=None"):
        diagnose(classifier, data, progress=False)
    with pytest.raises(FloatingPointError, match="not finite"):
        diagnose(Loud(mixture, float("nan")), data, images=20, progress=False)


def test_mismatches(mixture: Mixture) -> None:
    data = Drawn(mixture, 20)
    for change, words in (
        (lambda x: x.clamp(-1, 1) / 2 + 0.5, r"look like \[0, 1\]"),
        (lambda x: 127 * x, r"beyond \[-1, 1\]"),
        (lambda x: x.clamp(-0.4, 0.4), "don't cover"),
    ):
        images = [
            {"pixel_values": change(one["pixel_values"]), "label": one["label"]}
            for one in map(data.__getitem__, range(20))
        ]
        assert any(
            words.replace("\\", "") in one
            for one in diagnose(
                OracleClassifier(mixture), images, levels=2, progress=False
            ).mismatches
        ), words
    unet = TwoHeaded(mixture, Clock())
    unet.config = SimpleNamespace(sample_size=8, in_channels=3, num_class_embeds=7)
    classifier = OracleClassifier(mixture)
    classifier.config |= {"sample_size": 4, "in_channels": 1}
    words = diagnose(
        classifier, data, DDIMScheduler(), unet=unet, levels=2, progress=False
    ).mismatches
    assert [one for one in words if "size is 4, the network's 8" in one]
    assert [one for one in words if "channels is 1, the network's 3" in one]
    assert [one for one in words if "2 labels, the network 7 class embeddings" in one]


# the program and saved models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline and its classifier, and images of its three labels."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("inspected")
    unet = UNet2DModel(
        8,
        1,
        1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=4,
    )
    classifier = NoiseAwareClassifier(
        8,
        1,
        3,
        (8,),
        ("ResnetDownsampleBlock2D",),
        1,
        attention_head_dim=8,
        norm_num_groups=4,
        id2label=NAMES,
    )
    torch.nn.init.normal_(classifier.head[-1].out.weight)
    ClassifierGuidedPipeline(unet, DDIMScheduler(), classifier).save_pretrained(root / "pipeline")
    ClassifierGuidedPipeline(unet, DDIMScheduler()).save_pretrained(root / "alone")
    classifier.save_pretrained(root / "classifier")
    without_null = UNet2DModel.from_config({**unet.config, "num_class_embeds": 3})
    full = ClassifierGuidedPipeline(without_null, DDIMScheduler(), classifier)
    full.save_pretrained(root / "full")
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(12):
            path = root / "images" / split / NAMES[i % 3]
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (8, 8), np.uint8)).save(path / f"{i}.png")
    return root


def run(*arguments: Any) -> None:
    main(["inspect", *map(str, arguments), "--quiet", "--levels", "3", "--device", "cpu"])


def test_the_program(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(
        folder / "pipeline",
        "--dataset",
        folder / "images",
        "--output",
        tmp_path / "a",
        "--images",
        10,
    )
    said = capsys.readouterr()
    assert "Verdict: " in said.out and "sigma/alpha" in said.out and "it/s" not in said.err
    assert "matched by name" in said.out  # folders are in the order of the alphabet
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "diagnosis.json",
        "diagnosis.png",
    ]
    assert Image.open(tmp_path / "a" / "diagnosis.png").size[0] > 1000
    content = json.loads((tmp_path / "a" / "diagnosis.json").read_text())
    assert len(content["levels"]) == 4 and content["settings"]["split"] == "test"
    assert (
        content["settings"]["images"] == 10
        and content["settings"]["cosine_to"] == "the network's own"
    )
    assert content["verdict"]["summary"] in said.out and "reference_scale" in content["levels"][0]
    run(
        folder / "classifier",
        "--dataset",
        folder / "images",
        "--output",
        tmp_path / "b",
        "--no-picture",
        "--split",
        "train",
        "--seed",
        3,
    )
    content = json.loads((tmp_path / "b" / "diagnosis.json").read_text())
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["diagnosis.json"]
    assert content["settings"]["images"] == 12 and any(
        "split is 'train'" in one for one in content["mismatches"]
    )
    assert "reference_scale" not in content["levels"][0] and content["settings"]["seed"] == 3


def test_the_unet_of_another_pipeline(folder: Path) -> None:
    """`unet` is compared with, and its schedule is the run's; the same in Python."""
    how = {"dataset": str(folder / "images"), "levels": 2, "progress": False}
    alone, compared = (
        inspect(folder / "classifier", unet=unet, **how) for unet in (None, folder / "alone")
    )
    assert isinstance(alone, Diagnosis) and "reference_scale" not in alone.levels[0]
    assert (
        compared.settings["cosine_to"] == "the network's own"
        and "reference_scale" in compared.levels[0]
    )


def test_the_evidences_of_all_labels_add_up_to_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Softmax values do, whatever the classifier; where weights are all on one particle, the
    estimate is far off, and is said to be."""
    arguments = folder / "pipeline", "--dataset", folder / "images", "--no-picture", "--images", 6
    run(*arguments, "--output", tmp_path, "--evidence", 8)
    found = json.loads((tmp_path / "diagnosis.json").read_text())["evidence"]
    total, error = sum(found["evidence"]), np.hypot.reduce(found["error"])
    assert len(found["evidence"]) == 3 and abs(total - 1) < max(0.1, 3 * error)
    line = f"add up to {total:.2f} +- {error:.2f}, where 1 is exact"
    assert line in capsys.readouterr().out
    rest = {"particles": 8, "error": (0.01,) * 3, "effective_sample_size": (0.5,) * 3}
    assert LabelEvidence(evidence=(0.3, 0.3, 0.35), **rest).is_consistent
    bad = LabelEvidence(evidence=(0.3, 0.3, 0.1), **rest)
    assert not bad.is_consistent and "0.70 +- 0.02" in str(bad) and "vary too much" in str(bad)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["classifier", "--evidence", "4"], "evidence=4 needs the network to be guided"),
        (
            ["full", "--evidence", "4"],
            "evidence: the network needs a label, as it has 3 class embeddings for 3 labels",
        ),
        (["nothing-like-it"], "model 'nothing-like-it' is not bundled; allowed"),
        (["alone"], "is a pipeline without a classifier"),
        (["./nowhere/at-all"], "nowhere/at-all"),
        (["classifier", "--unet", "nothing-like-it"], "model 'nothing-like-it' is not bundled"),
        (["classifier", "--images", "0"], "--images 0: an integer, 1 or more"),
        (["classifier", "--levels", "0"], "--levels 0: an integer, 1 or more"),
        (["classifier", "--split", "dev"], r"split 'dev': the dataset has \['test', 'train'\]"),
        (["classifier", "--dataset", "./nowhere"], "no folder './nowhere'"),
        (["classifier", "--label-column", "kind"], "label_column='kind'"),
        (["classifier", "--device", "abacus"], "abacus"),
    ],
)
def test_wrong_options(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    model, *rest = arguments
    model = str(folder / model) if (folder / model).exists() else model
    with pytest.raises(SystemExit, match=message):
        main(
            [
                "inspect",
                model,
                "--dataset",
                str(folder / "images"),
                "--quiet",
                "--no-picture",
                "--output",
                str(tmp_path / "x"),
                *rest,
            ]
        )
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "diagnosis.json"
    write_json({"a": float("inf"), "b": (1, 2.5)}, path)
    assert json.loads(path.read_text()) == {"a": None, "b": [1, 2.5]}
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    assert json.loads(path.read_text())["b"] == [1, 2.5]
    picture = tmp_path / "a" / "x.png"
    picture.write_bytes(b"old")
    with pytest.raises((TypeError, ValueError)):
        plot([{"timestep": 0, "accuracy": "none"}], picture)
    assert picture.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 2


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install, before anything is loaded."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install matplotlib"):
        main(["inspect", "nothing-like-it", "--dataset", "x", "--output", str(tmp_path / "x")])
    with pytest.raises(ImportError, match="plots"):
        plot([{"timestep": 0, "accuracy": 1.0}], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())

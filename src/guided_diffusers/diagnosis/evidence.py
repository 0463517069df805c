"""Do the evidences of all labels, estimated by populations of particles, add up to 1?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..pipeline import ClassifierGuidedPipeline
from ..utils import scheduler_for

#: populations of each label, whose spread gives the standard error
POPULATIONS = 4
STEPS = 25
#: largest difference of the sum from 1 that counts as none, beside two standard errors
TOLERANCE = 0.1


@dataclass(frozen=True)
class LabelEvidence:
    """Evidence p(y) of each label among the denoiser's samples.

    Attributes:
        particles: of each population.
        evidence, error: mean of exp(log_evidence) of the label's populations, and its standard error.
        effective_sample_size: mean of the label's, as a fraction of the particles.
    """

    particles: int
    evidence: tuple[float, ...]
    error: tuple[float, ...]
    effective_sample_size: tuple[float, ...]

    @property
    def total(self) -> float:
        """Sum over the labels, whose expectation is 1, as sum_y p(y | x) = 1."""
        return sum(self.evidence)

    @property
    def total_error(self) -> float:
        """Standard error of `total`."""
        return sum(error**2 for error in self.error) ** 0.5

    @property
    def is_consistent(self) -> bool:
        """Whether the sum is 1 within two standard errors and `TOLERANCE`."""
        return abs(self.total - 1) < 2 * self.total_error + TOLERANCE

    def __str__(self) -> str:
        verdict = "consistent"
        if not self.is_consistent:
            verdict = (
                "its weights vary too much for so few particles: its gradients fit its values badly"
            )
        return (
            f"By {POPULATIONS} populations of {self.particles} particles a label, the evidences of all "
            f"labels add up to {self.total:.2f} +- {self.total_error:.2f}, where 1 is exact, with an "
            f"effective sample size of {min(self.effective_sample_size):.0%} or more ({verdict})."
        )


def evidence_pipeline(
    pipeline: ClassifierGuidedPipeline, classifier: torch.nn.Module
) -> ClassifierGuidedPipeline:
    """The pipeline that estimates: the network without the label, by DDPM, guided by a classifier.

    Raises:
        ValueError: for a network that needs a label, or has no DDPM schedule.
    """
    scheduler = scheduler_for(pipeline.scheduler, "ddpm")
    guided = ClassifierGuidedPipeline(pipeline.unet, scheduler, classifier, pipeline.vae)
    if guided.num_class_embeds is not None and guided.null_label is None:
        raise ValueError(
            f"evidence: the network needs a label, as it has {guided.num_class_embeds} class embeddings "
            f"for {guided.num_labels} labels and so no null label; a network without labels, or trained "
            "with dropped labels, is allowed"
        )
    guided.set_progress_bar_config(disable=True)
    return guided


def label_evidence(
    pipeline: ClassifierGuidedPipeline,
    classifier: torch.nn.Module,
    particles: int = 16,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> LabelEvidence:
    """Estimate p(y) of each label by populations without the label for the network, by DDPM.

    Args:
        pipeline: its network and schedule, which generate.
        classifier: it guides, and its values weight.
        particles: of each of a label's `POPULATIONS`.
        batch_size: images at once; one population at least.

    Raises:
        ValueError: as `evidence_pipeline`.
    """
    guided = evidence_pipeline(pipeline, classifier)
    generator = torch.Generator().manual_seed(seed)
    conditional = None if guided.num_class_embeds is None else False
    labels = [y for y in range(guided.num_labels) for _ in range(POPULATIONS)]
    per_call, log_evidence, sizes = max(1, batch_size // particles), [], []
    call = {"particles": particles, "num_inference_steps": STEPS, "conditional": conditional}
    call |= {"generator": generator, "output_type": "latent"}
    with tqdm(total=len(labels), unit="population", disable=not progress) as bar:
        for start in range(0, len(labels), per_call):
            result = guided(labels[start : start + per_call], **call)
            log_evidence.append(result.log_evidence)
            sizes.append(result.effective_sample_size / particles)
            bar.update(len(result.log_evidence))
    evidence = torch.cat(log_evidence).exp().reshape(-1, POPULATIONS)
    return LabelEvidence(
        particles,
        tuple(evidence.mean(1).tolist()),
        tuple((evidence.std(1) / POPULATIONS**0.5).tolist()),
        tuple(torch.cat(sizes).reshape(-1, POPULATIONS).mean(1).tolist()),
    )

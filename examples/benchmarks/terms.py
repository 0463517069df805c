"""Time of a step with each guidance term: the pipeline against its floor, the least that any implementation computes.

    python examples/benchmarks/terms.py                               # a few minutes on a CPU
    python examples/benchmarks/terms.py --terms clip energy --steps 20
    OMP_NUM_THREADS=1 python examples/benchmarks/terms.py --cpu-time --output examples/figures/benchmark_terms.json

The floor of a term is the network's forward pass (with twice the batch for classifier-free guidance), the forward pass
of the guiding network and the gradient with respect to its input, without gradients of parameters, scheduler or checks.
It is timed after every step of the pipeline, in the same run, so that other load on the machine affects both.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetForImageClassification

from guided_diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    CLIPGuidance,
    EnergyGuidance,
    Guidance,
    ImageClassifierGuidance,
    NoiseAwareClassifier,
    NoiseAwareCLIP,
    NoiseAwareCLIPGuidance,
)
from guided_diffusers.files import write_json

BATCH, SIZE, STEPS_PER_CALL = 8, 32, 6
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 64,
}
CLASSIFIER = {
    "sample_size": SIZE,
    "in_channels": 3,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "attention_head_dim": 32,
    "norm_num_groups": 16,
}

#: a term, and the work of its floor for (x, x0) beside the network's forward pass
TermAndWork = tuple[Guidance, Callable[[torch.Tensor, torch.Tensor], Any]]


def make_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        attention_head_dim=32,
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    ).eval()


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(function(x).sum(), x)[0]


def make_clip() -> CLIPModel:
    vision = {
        "image_size": SIZE,
        "patch_size": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "projection_dim": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    config = CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=64)
    return CLIPModel(config).eval()


def make_terms(network: UNet2DModel) -> dict[str, TermAndWork]:
    """Each term by name, with small networks of random weights."""
    classifier = NoiseAwareClassifier(num_labels=10, **CLASSIFIER).eval()
    resnet = ResNetForImageClassification(
        ResNetConfig(
            hidden_sizes=[64, 128, 256], depths=[1, 1, 1], num_labels=10, embedding_size=32
        )
    ).eval()
    clip = make_clip()
    noise_aware = NoiseAwareCLIP(CLASSIFIER, TEXT).eval()
    picture = torch.rand(3, SIZE, SIZE) * 2 - 1
    text = torch.nn.functional.normalize(torch.randn(1, 64), dim=-1)
    noise_aware.encode_prompts = lambda prompts: text.expand(len(prompts), -1)  # no tokenizer here
    worse = make_network()

    def label_of(model: torch.nn.Module, *args: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: model(x, *args).logits.log_softmax(-1)[:, 3]

    def energy(x0: torch.Tensor) -> torch.Tensor:
        return (x0 - x0.flip(-1)).square().sum((1, 2, 3))

    def similarity(x: torch.Tensor) -> torch.Tensor:
        return (
            torch.nn.functional.normalize(clip.get_image_features(x).pooler_output, dim=-1) @ text.T
        )

    return {
        "classifier": (
            ClassifierGuidance(classifier, 3),
            lambda x, x0: gradient(label_of(classifier, 500), x),
        ),
        "classifier-free": (ClassifierFreeGuidance(10), lambda x, x0: None),
        "autoguidance": (
            AutoGuidance(worse),
            lambda x, x0: worse(x, 500, torch.full((len(x),), 3)).sample,
        ),
        "image-classifier": (
            ImageClassifierGuidance(resnet, 3),
            lambda x, x0: gradient(label_of(resnet), x0),
        ),
        "clip": (CLIPGuidance(clip, image_prompt=picture), lambda x, x0: gradient(similarity, x0)),
        "noise-aware-clip": (
            NoiseAwareCLIPGuidance(noise_aware, "a coat"),
            lambda x, x0: gradient(lambda x: noise_aware.encode_image(x, 500) @ text.T, x),
        ),
        "energy": (EnergyGuidance(energy), lambda x, x0: gradient(energy, x0)),
        "energy-through-network": (
            EnergyGuidance(energy, through_network=True),
            lambda x, x0: gradient(
                lambda x: energy(network(x, 500, torch.full((len(x),), 3)).sample), x
            ),
        ),
        "image-classifier-through-network": (
            ImageClassifierGuidance(resnet, 3, through_network=True),
            lambda x, x0: gradient(
                lambda x: label_of(resnet)(network(x, 500, torch.full((len(x),), 3)).sample), x
            ),
        ),
    }


def time_steps(
    network: UNet2DModel, name: str, parts: TermAndWork, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each guided step, and of the floor that follows it."""
    now = time.process_time if options.cpu_time else time.perf_counter
    term, work = parts
    pipeline = ClassifierGuidedPipeline(
        network, DDIMScheduler(clip_sample=False), id2label={i: str(i) for i in range(10)}
    )
    pipeline.set_progress_bar_config(disable=True)
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    rows = 2 * BATCH if name == "classifier-free" else BATCH
    doubled, labels = x.repeat(rows // BATCH, 1, 1, 1), torch.full((rows,), 3)
    seconds: dict[str, list[float]] = {"guided": [], "floor": []}
    begin = 0.0

    @torch.no_grad()
    def floor() -> None:
        x0 = None if term.through_network else network(doubled, 500, labels).sample[:BATCH]
        work(x, x0)  # through the network, its forward pass is part of `work`

    def after_step(
        pipeline: ClassifierGuidedPipeline, index: int, t: torch.Tensor, tensors: dict
    ) -> dict:
        nonlocal begin
        if index:  # the first step includes the preparations of the call
            seconds["guided"].append(now() - begin)
        begin = now()
        floor()
        seconds["floor"].append(now() - begin)
        begin = now()
        return {}

    for call in range(1 + max(1, options.steps // (STEPS_PER_CALL - 1))):
        if call == 1:  # call 0 warmed up
            seconds["guided"].clear(), seconds["floor"].clear()
        pipeline(
            [3] * BATCH,
            guidance_scale=0,
            num_inference_steps=STEPS_PER_CALL,
            output_type="latent",
            guidance=term,
            callback_on_step_end=after_step,
        )
    return seconds


def main() -> None:
    torch.manual_seed(0)
    network = make_network()
    terms = make_terms(network)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--terms", nargs="+", choices=terms, default=list(terms))
    parser.add_argument(
        "--steps", type=int, default=60, help="timed steps per term (default: %(default)s)"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of the process instead of wall-clock time"
    )
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    for module in (network, *(module for term, _ in terms.values() for module in term.modules())):
        module.requires_grad_(False)

    results = {}
    print(
        f"{'term':>24} {'floor ms':>9} {'guided ms':>10} {'ratio':>6}   ({BATCH} images of "
        f"{SIZE}x{SIZE}x3, medians)"
    )
    for name in options.terms:
        seconds = time_steps(network, name, terms[name], options)
        floor, guided = (1e3 * statistics.median(seconds[kind]) for kind in ("floor", "guided"))
        results[name] = {"floor_ms": floor, "guided_ms": guided, "ratio": guided / floor}
        print(f"{name:>24} {floor:9.1f} {guided:10.1f} {guided / floor:6.3f}")
    if options.output:
        write_json(results, options.output)


if __name__ == "__main__":
    main()

"""Diffusers' own tests of pipelines and models, run on `ClassifierGuidedPipeline` and `NoiseAwareClassifier`.

    git clone --depth 1 https://github.com/huggingface/diffusers
    pip install pytest parameterized requests_mock
    python examples/benchmarks/diffusers_mixins.py --diffusers diffusers          # two minutes on a CPU
    python examples/benchmarks/diffusers_mixins.py --diffusers diffusers -k callback

Diffusers tests its pipelines and models by the mixins in its folder `tests`, which the package doesn't have: they come
from a checkout, and the installed Diffusers is tested. Tests that need an accelerator are skipped on a CPU.

This package saves no pickles. Tests that ask for them (`safe_serialization=False`, or a message that names a .bin file)
fail and are counted apart; those of the first kind run once more with safetensors. The exit status is 1 if any other
test fails.
"""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import TestCase

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier

CHECKOUT = "DIFFUSERS_CHECKOUT"  # the environment variable that pytest's import of this file reads
#: what a failed test that asks for pickles says
PICKLES = ("safe_serialization=False: only True", "no file named diffusion_pytorch_model.bin")


def components() -> dict[str, Any]:
    """A small latent pipeline's, the same at each call."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=5,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    classifier = NoiseAwareClassifier(**classifier_config(in_channels=4))
    torch.nn.init.normal_(classifier.last_layer.weight)  # else it doesn't guide
    scheduler = DDIMScheduler(clip_sample=False)
    parts = {"unet": unet, "classifier": classifier, "vae": vae}
    return {name: part.eval() for name, part in parts.items()} | {"scheduler": scheduler}


def classifier_config(in_channels: int = 3) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "in_channels": in_channels,
        "num_labels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }


def call(output_type: str) -> dict[str, Any]:
    """Arguments of a short guided call."""
    generator = torch.Generator("cpu").manual_seed(0)
    return {
        "label": 1,
        "generator": generator,
        "num_inference_steps": 2,
        "output_type": output_type,
    }


class Pipeline:
    """What the pipeline's mixins ask for."""

    pipeline_class = ClassifierGuidedPipeline
    required_input_params_in_call_signature = batch_input_params = frozenset({"label"})
    image_params = image_latents_params = callback_cfg_params = frozenset()
    optional_input_params = frozenset(
        {"num_inference_steps", "num_images_per_label", "generator", "latents", "output_type"}
    )
    output_shape = (3, 16, 16)

    def get_dummy_components(self) -> dict[str, Any]:
        return components()


class SavesSafetensors(ClassifierGuidedPipeline):
    """Saves in safetensors, also with `safe_serialization=False`."""

    def save_pretrained(self, folder: Any, safe_serialization: bool = True, **options: Any) -> None:
        super().save_pretrained(folder, **options)


if CHECKOUT in os.environ:  # pytest imports this file
    sys.path.insert(0, os.environ[CHECKOUT])
    from tests.models import testing_utils as models
    from tests.pipelines import test_pipelines_common as older
    from tests.pipelines import testing_utils as pipelines
    from tests.testing_utils import torch_device

    class LatentPipeline(Pipeline, pipelines.BasePipelineTesterConfig):
        def get_dummy_inputs(self) -> dict[str, Any]:
            return call("pt")

    class TestPipeline(LatentPipeline, pipelines.PipelineTesterMixin):
        pass

    class TestPipelineSafetensors(LatentPipeline, pipelines.PipelineTesterMixin):
        pipeline_class = SavesSafetensors

    class TestPipelineMemory(LatentPipeline, pipelines.MemoryTesterMixin):
        pass

    class TestPipelineTypes(
        Pipeline,
        older.PipelineLatentTesterMixin,
        older.PipelineKarrasSchedulerTesterMixin,
        TestCase,
    ):
        """Types of images, autoencoders and schedulers, of which the newer mixins have no tests."""

        def get_dummy_inputs(self, device: Any, seed: int = 0) -> dict[str, Any]:
            return call("np")

    class Classifier(models.BaseModelTesterConfig):
        model_class = NoiseAwareClassifier
        main_input_name = "sample"
        output_shape = (4,)

        def get_init_dict(self) -> dict[str, Any]:
            return classifier_config()

        def get_dummy_inputs(self) -> dict[str, Any]:
            sample = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            timestep = torch.tensor([10], device=torch_device)
            return {"sample": sample.to(torch_device), "timestep": timestep}

    class TestClassifier(Classifier, models.ModelTesterMixin):
        pass

    class TestClassifierMemory(Classifier, models.MemoryTesterMixin):
        pass

    class TestClassifierTraining(Classifier, models.TrainingTesterMixin):
        pass

    class TestClassifierAttention(Classifier, models.AttentionTesterMixin):
        pass


class Outcomes:
    """A plugin of pytest that collects {outcome: names of the tests}."""

    def __init__(self) -> None:
        self.tests: dict[str, list[str]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.when == "setup" and not report.passed):
            return
        outcome = report.outcome
        if report.failed and any(words in str(report.longrepr) for words in PICKLES):
            outcome = "asks for pickles"
        self.tests[outcome].append(report.nodeid.partition("::")[2])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of Diffusers")
    parser.add_argument("-k", default="", metavar="WORDS", help="tests with these words only")
    options = parser.parse_args()
    if not (options.diffusers / "tests" / "pipelines").is_dir():
        parser.error(f"--diffusers {options.diffusers}: no checkout, it has no tests/pipelines")
    os.environ[CHECKOUT] = str(options.diffusers.resolve())
    outcomes = Outcomes()
    arguments = [__file__, "-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider"]
    arguments += ["--rootdir", str(options.diffusers), "-c", os.devnull, "-k", options.k]
    pytest.main(arguments, plugins=[outcomes])
    print()
    for outcome, tests in sorted(outcomes.tests.items()):
        print(f"{len(tests):4} {outcome}")
    for test in outcomes.tests["asks for pickles"]:
        print(f"asks for pickles: {test}")
    return bool(outcomes.tests["failed"] or not outcomes.tests["passed"])


if __name__ == "__main__":
    sys.exit(main())

"""Load a folder by its own code where guided-diffusers can't be imported, and write what the model in it says.

    python alone.py FOLDER VARIANT THREADS OUTPUT

A program of its own on purpose (torch, diffusers and safetensors only): the release gate runs it in a clean process.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def answer(model: Any) -> torch.Tensor:
    """The images of a pipeline in two steps, guided in both, a classifier's logits, or a CLIP's, always the same on one
    machine.
    """
    generator = torch.Generator().manual_seed(0)
    if not hasattr(model, "unet"):
        encoder = getattr(model, "image_encoder", model)
        images = torch.randn((2, encoder.config.in_channels, *encoder.size), generator=generator)
        with torch.no_grad():
            if encoder is model:
                return model(images, 0.5).logits
            tokens = tokens_of(model)
            return torch.cat(
                [model(images, 0.5, tokens).logits_per_image.flatten(), tokens.flatten()]
            )
    call: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_start": 0.0,
        "guidance_stop": 1.0,
        "generator": generator,
        "output_type": "latent",
    }
    channels = model.unet.config.in_channels
    if channels in (2, 6):  # an up-sampling network's: it wants the small image beside the sample
        call["image"] = torch.zeros(1, channels // 2, 8, 8)
    model.set_progress_bar_config(disable=True)
    return model(0 if model.num_labels else None, **call).images


def tokens_of(clip: Any) -> torch.Tensor:
    """Ids of one caption, which also show that the tokenizer came along."""
    config = clip.text_encoder.config
    if clip.tokenizer is None:
        return torch.tensor([[config.bos_token_id, config.eos_token_id]])
    words = sorted(clip.tokenizer.get_vocab())[-4:]
    return torch.tensor(
        [
            clip.tokenizer(" ".join(words)).input_ids[: config.max_position_embeddings - 1]
            + [config.eos_token_id]
        ]
    )


def main(folder: str, variant: str, threads: str, output: str) -> None:
    sys.modules["guided_diffusers"] = None  # type: ignore[assignment]  # an import of it fails
    torch.set_num_threads(int(threads))
    from pathlib import Path

    from diffusers import AutoModel, DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar
    from safetensors.torch import save_file

    disable_progress_bar()
    options = {"variant": variant or None, "trust_remote_code": True, "use_safetensors": True}
    if (Path(folder) / "model_index.json").exists():
        model = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, **options)
    else:
        model = AutoModel.from_pretrained(folder, **options)
    save_file({"answer": answer(model).contiguous()}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Load a folder without the package guided-diffusers, and save the model's reference output.

    python verify_standalone.py FOLDER VARIANT THREADS OUTPUT

A separate program that imports torch, diffusers and safetensors only: `hub.check` runs it in a
clean process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch


def reference_output(model: Any) -> torch.Tensor:
    """Images of a pipeline in two guided steps, else logits of a classifier or CLIP.

    The result is deterministic on one machine. A CLIP's has the tokens of its caption, too.
    """
    generator = torch.Generator().manual_seed(0)
    if not hasattr(model, "unet"):
        encoder = getattr(model, "image_encoder", model)
        images = torch.randn((2, encoder.config.in_channels, *encoder.size), generator=generator)
        with torch.no_grad():
            if encoder is model:
                return model(images, 0.5).logits
            tokens = caption_tokens(model)
            logits = model(images, 0.5, tokens).logits_per_image
        return torch.cat([logits.flatten(), tokens.flatten()])
    options: dict[str, Any] = {}
    channels = model.unet.config.in_channels
    if channels in (2, 6):  # an up-sampling network: its input has the low-resolution image, too
        options["image"] = torch.zeros(1, channels // 2, 8, 8)
    model.set_progress_bar_config(disable=True)
    return model(
        0 if model.num_labels else None,
        num_inference_steps=2,
        guidance_start=0.0,
        guidance_stop=1.0,
        generator=generator,
        output_type="latent",
        **options,
    ).images


def caption_tokens(clip: Any) -> torch.Tensor:
    """(1, length) token ids of a caption, by the model's tokenizer where it has one."""
    config = clip.text_encoder.config
    if clip.tokenizer is None:
        return torch.tensor([[config.bos_token_id, config.eos_token_id]])
    caption = " ".join(sorted(clip.tokenizer.get_vocab())[-4:])
    tokens = clip.tokenizer(caption).input_ids[: config.max_position_embeddings - 1]
    return torch.tensor([[*tokens, config.eos_token_id]])


def main(folder: str, variant: str, threads: str, output: str) -> None:
    sys.modules["guided_diffusers"] = None  # type: ignore[assignment]  # an import of it fails
    torch.set_num_threads(int(threads))
    from diffusers import AutoModel, DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar
    from safetensors.torch import save_file

    disable_progress_bar()
    options = {"variant": variant or None, "trust_remote_code": True, "use_safetensors": True}
    if (Path(folder) / "model_index.json").exists():
        model = DiffusionPipeline.from_pretrained(folder, **options)
    else:
        model = AutoModel.from_pretrained(folder, **options)
    save_file({"output": reference_output(model).contiguous()}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])

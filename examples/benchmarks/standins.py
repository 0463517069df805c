"""Tiny text encoders, tokenizers and processors in place of those that tests load from the Hub.

    with without_hub():
        components = config.get_dummy_components()

Weights are random; a tokenizer's ids are a fixed function of the words. Nothing is downloaded. Used by

    python examples/benchmarks/pipelines.py --diffusers ~/diffusers
"""

from __future__ import annotations

import builtins
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import transformers
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

WIDTH = 32
#: config entries of a tiny model, used where its config class has them
SMALL = {
    "vocab_size": 1000,
    "hidden_size": WIDTH,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 37,
    "intermediate_size": 37,
    "ffn_hidden_size": 37,
    "kv_channels": 8,
    "padded_vocab_size": 1000,
    "num_layers": 2,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "projection_dim": WIDTH,
    "max_position_embeddings": 512,
    "image_size": 32,
    "patch_size": 2,
}
#: width of models that tests take from the Hub, by a part of their names
WIDTHS = {"Qwen2VL": 16, "Qwen3VL": 16, "tiny-random-LlamaForCausalLM": 16}
INTERPOLATION = {"InterpolationMode": SimpleNamespace(NEAREST="nearest")}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class StandInTokenizer:
    """Callable as a tokenizer or a processor: each word has an id, the rest is padding."""

    model_max_length, padding_side, pad_token, eos_token, bos_token = (
        77,
        "right",
        "<0>",
        "<2>",
        "<1>",
    )
    unk_token, additional_special_tokens, vocab_size = "<3>", [], 1000
    pad_token_id, bos_token_id, eos_token_id, unk_token_id = 0, 1, 2, 3
    image_token, image_token_id, cls_token_id, sep_token_id = "<|image_pad|>", 5, 1, 2

    def __init__(self) -> None:
        self.image_processor = SimpleNamespace()
        self.tokenizer, self.init_kwargs, self.added_tokens_encoder = self, {}, {}

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) or text is None else list(text)
        rows = [self.encode(one, **options) for one in texts]
        longest = max(map(len, rows))
        if options.get("padding") == "max_length":
            longest = options.get("max_length") or self.model_max_length
        masks = [[1] * len(row[:longest]) + [0] * (longest - len(row)) for row in rows]
        ids = [(row + [0] * longest)[:longest] for row in rows]
        if options.get("return_tensors") is None:
            single = isinstance(text, str)
            ids, masks = (ids[0], masks[0]) if single else (ids, masks)
        else:
            ids, masks = torch.tensor(ids), torch.tensor(masks)
        data = {"input_ids": ids, "attention_mask": masks}
        if options.get("return_length"):
            data["length"] = torch.tensor([longest] * len(rows))
        if options.get("images") is not None:  # the stand-ins of text encoders get the text only
            data |= {"pixel_values": None, "image_grid_thw": None}
        return transformers.BatchEncoding(data)

    def encode(self, text: Any, **options: Any) -> list[int]:
        words = str(text).split()[:20]
        ids = [1, *(10 + zlib.crc32(word.encode()) % 900 for word in words), 2]
        return [7] * 130 * ("<|" in str(text)) + ids  # the instructions before a prompt are dropped

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        if not options.get("tokenize", True):
            return "a chat"
        is_batch = isinstance(messages[0], list)
        encoded = self(["a chat"] * len(messages) if is_batch else ["a chat"], **options)
        if not is_batch and options.get("return_tensors") is None:
            encoded = transformers.BatchEncoding({key: rows[0] for key, rows in encoded.items()})
        return encoded if options.get("return_dict") else encoded["input_ids"]

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        return ["a text"] * len(ids)

    def decode(self, ids: Any, **options: Any) -> str:
        return "a text"

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return 5 if isinstance(tokens, str) else [5] * len(tokens)

    def convert_ids_to_tokens(self, ids: Any, **options: Any) -> Any:
        return [f"<{i}>" for i in ids]

    def pad(self, encoded: Any, **options: Any) -> Any:
        return transformers.BatchEncoding(
            {key: torch.as_tensor(value) for key, value in encoded.items()}
        )

    def tokenize(self, text: str, **options: Any) -> list[str]:
        return text.split()


def small_config(cls: type, width: int = WIDTH) -> Any:
    """A tiny config of a model's config class, of its text and of its vision model."""
    config, names = cls(), {}
    for name, kind in {**SMALL, **IDS}.items():
        if hasattr(config, name):
            names[name] = width if kind == WIDTH else kind
    for name, kind in getattr(cls, "sub_configs", {}).items():
        kind = kind if hasattr(kind, "sub_configs") else type(getattr(config, name))
        names[name] = small_config(kind, width).to_dict()
    if hasattr(config, "depth"):  # of a vision model of Qwen
        names |= {"depth": 2, "num_heads": 2, "embed_dim": width, "out_hidden_size": width}
        names["deepstack_visual_indexes"] = [0]
    elif "vl_text" in config.model_type:
        names |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        sections = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
        names["rope_parameters"] = names["rope_scaling"] = sections
    elif config.model_type == "chatglm":
        names["original_rope"] = True
    if names.get("num_hidden_layers") and getattr(config, "layer_types", None):
        names["layer_types"] = config.layer_types[:2]
    return cls(**names)


def small_model(cls: type, name: Any = "", *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    width = next((width for key, width in WIDTHS.items() if key in str(name)), WIDTH)
    config = options.get("config") or small_config(cls.config_class, width)
    return cls(config).eval()


def small_config_of_name(name: str, *args: Any, **options: Any) -> Any:
    kinds = {
        "t5": "T5Config",
        "bert": "BertConfig",
        "Llama": "LlamaConfig",
        "gemma": "Gemma2Config",
    }
    kind = next((kind for key, kind in kinds.items() if key in str(name)), "T5Config")
    return small_config(getattr(transformers, kind))


def resize(images: torch.Tensor, size: list[int], **options: Any) -> torch.Tensor:
    """As torchvision's, to the nearest pixel."""
    return torch.nn.functional.interpolate(images, size)


def small_unet(*args: Any, subfolder: str = "", **options: Any) -> diffusers.UNet2DModel:
    """Of consistency models' tests, with class labels in their second set-up."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=10 if "class" in subfolder else None,
    ).eval()


@contextmanager
def without_hub() -> Iterator[None]:
    """Context in which `from_pretrained` of transformers gives stand-ins."""
    tokenizer = classmethod(lambda cls, *args, **options: StandInTokenizer())
    replacements = [
        (transformers.PreTrainedTokenizerBase, tokenizer),
        (transformers.AutoTokenizer, tokenizer),
        (transformers.AutoProcessor, tokenizer),
        (transformers.ProcessorMixin, tokenizer),
        (transformers.AutoConfig, staticmethod(small_config_of_name)),
        (transformers.PreTrainedModel, classmethod(small_model)),
        (transformers.FeatureExtractionMixin, classmethod(lambda cls, *args, **options: cls())),
        (transformers.ImageProcessingMixin, classmethod(lambda cls, *args, **options: cls())),
        (ChatGLMTokenizer, tokenizer),
        (diffusers.UNet2DModel, staticmethod(small_unet)),
    ]
    vision = SimpleNamespace(functional=SimpleNamespace(resize=resize), **INTERPOLATION)
    ftfy = SimpleNamespace(fix_text=str)  # which pipelines of Wan use without an import, if absent
    with ExitStack() as stack:
        stack.enter_context(patch.object(builtins, "ftfy", ftfy, create=True))
        stack.enter_context(patch.object(builtins, "transforms", vision, create=True))
        bucket = "diffusers.pipelines.joyimage.image_processor.find_best_bucket"
        stack.enter_context(patch(bucket, return_value=(32, 32)))
        for cls, replacement in replacements:
            stack.enter_context(patch.object(cls, "from_pretrained", replacement))
        yield

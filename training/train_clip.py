# /// script
# requires-python = ">=3.10"
# dependencies = ["guided-diffusers"]
# [tool.uv.sources]
# guided-diffusers = { path = ".." }
# ///
# From a checkout: uv run --with . python training/train_clip.py ...
"""Train a noise-aware CLIP with Accelerate: an encoder of (x_t, t) and a text encoder, contrastively.

    accelerate launch train_clip.py --train_data_dir photos --caption_column text \\
        --output_dir out/clip
    accelerate launch train_clip.py --train_data_dir data/fashion-mnist --resolution 28 \\
        --captions training/configs/fashion_mnist_captions.json        # captions by label
    accelerate launch train_clip.py ... --text_encoder openai/clip-vit-base-patch32 \\
        --freeze_text_encoder
    accelerate launch train_clip.py ... --image_encoder out/classifier # warm start
    accelerate launch train_clip.py ... --resume_from_checkpoint latest
    accelerate launch train_clip.py ... --push_to_hub --hub_model_id user/clip
    accelerate launch --multi_gpu --num_processes 2 train_clip.py ...
    torchrun --standalone --nproc_per_node 2 train_clip.py --cpu ...   # two CPU processes

--output_dir becomes a folder for `NoiseAwareCLIP.from_pretrained`, with the tokenizer, and the noise
schedule in its config. Beside the model: `metrics.json` (held-out split, ten noise levels):
`retrieval` (share of images that are closer to their caption than to 99 others) and its
`cross_entropy`; if --captions has held-out captions, also `zero_shot`, the accuracy of the label
whose held-out captions' mean embedding is nearest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from guided_diffusers import NoiseAwareClassifier
from guided_diffusers.cli_options import run_program
from guided_diffusers.clip import MODEL_ARGUMENTS, NoiseAwareCLIP, image_config, last_layer
from guided_diffusers.images import size_text
from guided_diffusers.learning.annotations import CaptionedImages, is_captions
from guided_diffusers.learning.batches import Batch, StepRandom, collate
from guided_diffusers.learning.data import LabelledImages
from guided_diffusers.learning.distributed import exit_on_value_error, make_accelerator
from guided_diffusers.learning.held_out import Score, held_out_metrics
from guided_diffusers.learning.loop import Trainer, save_and_publish
from guided_diffusers.learning.options import Options, named_errors, option, parse
from guided_diffusers.learning.prepare import (
    DEFAULT_CLASSIFIER,
    load_data,
    load_scheduler,
    make_model,
    trained_schedule,
)

DEFAULT_TEXT = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 256,
}
SPECIAL_TOKENS = dict(pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]")
OTHER_CAPTIONS = 99  # that an image is compared with
TEXT_INPUTS = ("input_ids", "attention_mask")


@dataclass
class ClipOptions(Options):
    adam_weight_decay: float = option(0.05, "AdamW's weight decay", 0)
    max_timestep: int | None = option(
        None, "noisiest timestep to train on, with which the saved schedule ends", 0
    )
    caption_column: str | None = option(
        None, "captions: a column of strings, or of lists of which one is drawn at each use"
    )
    captions: str | None = option(
        None,
        'captions by label, instead of a column: a JSON file {"train": {label: [caption, ...], '
        '...}, "held_out": {...}}; "held_out" is optional',
    )
    text_encoder: str | None = option(
        None,
        "pretrained CLIP text model with its tokenizer, a folder or Hub id; by default a small "
        "model and a tokenizer of the captions' words are trained",
    )
    freeze_text_encoder: bool = option(False, "keep the weights of --text_encoder fixed")
    text_config: str | None = option(
        None,
        "size of a new text encoder: a JSON file of `CLIPTextConfig`'s arguments, such as "
        "projection_dim (of all embeddings) and max_position_embeddings, to which captions are cut",
    )
    image_encoder: str | None = option(
        None, "NoiseAwareClassifier (folder, Hub id) to start from, except for its last layer"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for names in (("caption_column", "captions"), ("text_encoder", "text_config")):
            if all(getattr(self, name) is not None for name in names):
                both = " and ".join(f"--{name} {getattr(self, name)}" for name in names)
                raise ValueError(f"{both}: only one of the two is allowed")
        if (self.caption_column, self.captions) == (None, None):
            raise ValueError("--caption_column None and --captions None: one of the two is needed")
        if self.streaming and self.caption_column is not None:
            raise ValueError(
                f"--caption_column {self.caption_column}: with --streaming --captions, captions "
                "by label, are allowed, since a tokenizer is made of all captions before the "
                "first step"
            )
        if self.freeze_text_encoder and self.text_encoder is None:
            raise ValueError("--freeze_text_encoder needs --text_encoder, a pretrained one")


def read_json_object(name: str, path: str) -> dict[str, Any]:
    """The object in the JSON file of the option `name`."""
    with named_errors(f"--{name} {path}"):
        content = json.loads(Path(path).read_text())
    if not isinstance(content, dict):
        raise ValueError(f"--{name} {path} holds a {type(content).__name__}; an object is allowed")
    return content


def load_captions(
    path: str | None, id2label: dict[int, str]
) -> tuple[dict[int, list[str]] | None, dict[int, list[str]] | None]:
    """Training and held-out captions of --captions by label id; None if there are none."""
    if path is None:
        return None, None
    content = read_json_object("captions", path)
    if "train" not in content or content.keys() - {"train", "held_out"}:
        raise ValueError(
            f'--captions {path} has {sorted(content)}; "train" and optionally "held_out" are allowed'
        )
    captions = {}
    for part, by_name in content.items():
        if not isinstance(by_name, dict) or by_name.keys() != set(id2label.values()):
            labels = f"the labels {sorted(by_name)}, the dataset {sorted(id2label.values())}"
            raise ValueError(f"--captions {path}: {part!r} has {labels}")
        for name, texts in by_name.items():
            if not is_captions(texts):
                value = f"{texts!r} for {name!r}; a list of strings that aren't empty is allowed"
                raise ValueError(f"--captions {path}: {part!r} has {value}")
        captions[part] = {i: by_name[name] for i, name in id2label.items()}
    return captions["train"], captions.get("held_out")


def word_tokenizer(captions: list[str], length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the captions' words and punctuation, lowercase: [BOS] word ... [EOS] [PAD] ...

    [EOS] isn't token 2, for which transformers' CLIP would use the largest id instead, as old
    checkpoints need it.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = list(SPECIAL_TOKENS.values())
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    ends = [(token, special.index(token)) for token in ("[BOS]", "[EOS]")]
    template = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    tokenizer.post_processor = template
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, padding_side="right", **SPECIAL_TOKENS
    )


def make_text_encoder(
    options: ClipOptions, captions: CaptionedImages
) -> tuple[dict[str, Any], PreTrainedTokenizerBase, CLIPTextModelWithProjection | None]:
    """Config and tokenizer of the text encoder, and its model if it is pretrained."""
    path = options.text_encoder
    if path is None:
        config = DEFAULT_TEXT
        if options.text_config is not None:
            config = read_json_object("text_config", options.text_config)
            known = {*CLIPTextConfig().to_dict(), "architectures", "dtype", "torch_dtype"}
            if unknown := {name for name in config if name[:1] != "_"} - known:
                raise ValueError(
                    f"--text_config {options.text_config} has {sorted(unknown)}; arguments of "
                    "CLIPTextConfig are allowed"
                )
        length = config.get("max_position_embeddings", 77)
        tokenizer = word_tokenizer(sorted(set(captions.captions())), length)
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        ids = {name: getattr(tokenizer, name) for name in names}
        return {**config, "vocab_size": len(tokenizer), **ids}, tokenizer, None
    with named_errors(f"--text_encoder {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, info = CLIPTextModelWithProjection.from_pretrained(path, output_loading_info=True)
    missing = set(info["missing_keys"])
    if options.freeze_text_encoder and missing:
        raise ValueError(
            f"--text_encoder {path} has no {sorted(missing)}; with "
            "--freeze_text_encoder a complete CLIPTextModelWithProjection is allowed"
        )
    if other := sorted(missing - {"text_projection.weight"}):
        raise ValueError(
            f"--text_encoder {path} lacks {len(other)} weights of a CLIPTextModelWithProjection "
            f"({', '.join(other[:3])}, ...); a CLIP's text encoder is allowed"
        )
    config = model.config.to_diff_dict()
    for name in ("architectures", "dtype", "model_type", "transformers_version"):
        config.pop(name, None)
    return config, tokenizer, model.float()


def make_clip(
    options: ClipOptions, data: LabelledImages, captions: CaptionedImages, schedule: dict[str, Any]
) -> NoiseAwareCLIP:
    """The model to train, with pretrained weights where options name them."""
    text_config, tokenizer, text_encoder = make_text_encoder(options, captions)
    initial, default = None, DEFAULT_CLASSIFIER
    if options.image_encoder is not None:
        with named_errors(f"--image_encoder {options.image_encoder}"):
            initial = NoiseAwareClassifier.from_pretrained(options.image_encoder)
        default = image_config(initial.config)
    encoder = make_model(
        NoiseAwareClassifier,
        options,
        default,
        sample_size=options.resolution,
        in_channels=data.channels,
        id2label=None,
        label2id=None,
        **{name: schedule[name] for name in MODEL_ARGUMENTS if name in schedule},
    )
    schedule = {**schedule, "tokenizer": tokenizer}
    with named_errors(f"--text_config {options.text_config}"):
        clip = NoiseAwareCLIP(image_config(encoder.config), text_config, **schedule)
    if initial is not None:  # all weights but those of the last layer
        layer, source = last_layer(initial), f"--image_encoder {options.image_encoder}"
        source += f", --resolution {size_text(options.resolution)}"
        if initial.config.pool == "attention" and initial.size != clip.image_encoder.size:
            size = size_text(initial.size)
            raise ValueError(f"{source}: size mismatch: its positional embedding is for {size}")
        layer.weight, layer.bias = last_layer(clip.image_encoder).parameters()
        try:
            clip.image_encoder.load_state_dict(initial.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n\t")[:2])
            raise ValueError(f"{source}: {reason}") from error
    if text_encoder is not None:
        clip.text_encoder.load_state_dict(text_encoder.state_dict())
        clip.text_encoder.requires_grad_(not options.freeze_text_encoder)
    return clip


def check_captions(
    captions: CaptionedImages, tokenizer: PreTrainedTokenizerBase, length: int
) -> str | None:
    """A warning of captions that are cut to `length` tokens, if there are any.

    Raises:
        ValueError: if all captions have the same tokens, from which nothing can be learned.
    """
    texts = sorted(set(captions.captions()))
    ids = tokenizer(texts, verbose=False)["input_ids"]
    if len({tuple(tokens[: length - 1]) for tokens in ids}) < 2:
        raise ValueError(f"captions: all have the same first {length} tokens, as {texts[0][:50]!r}")
    cut = [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) > length]
    if not cut:
        return None
    return (
        f"data: {len(cut)} of {len(texts)} different captions are cut to {length} tokens, such as "
        f"{cut[0][:50]!r}"
    )


class TokenizedImages(torch.utils.data.Dataset):
    """`CaptionedImages` with TEXT_INPUTS (L,), cut or padded to L, instead of the caption."""

    def __init__(self, data: CaptionedImages, tokenizer: PreTrainedTokenizerBase, length: int):
        self.data, self.tokenizer, self.length = data, tokenizer, length

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        values = self.data[item]
        return self.tokenize(values.pop("caption")) | values

    def tokenize(self, caption: str) -> dict[str, torch.Tensor]:
        padding = {"padding": "max_length", "padding_side": "right", "max_length": self.length}
        tokens = self.tokenizer(caption, truncation=True, return_tensors="pt", **padding)
        return {name: tokens[name][0] for name in TEXT_INPUTS}


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Mean of the cross entropies of choosing each image's text and each text's image.

    Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021),
    figure 3.

    Args:
        images, texts: embeddings (B, D) of norm 1; row i belongs to row i.
        scale: of the cosines, exp of the learned temperature.
    """
    logits, target = scale * images @ texts.mT, torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


class Gather(torch.autograd.Function):
    """The rows (B, D) of all processes, (N * B, D), for a loss that every process computes.

    The gradient is N times that of this process's rows, since DDP averages over the processes.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        start = accelerator.process_index * len(rows)
        ctx.processes, ctx.rows = accelerator.num_processes, slice(start, start + len(rows))
        return accelerator.gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.processes * gradient[ctx.rows], None


def make_score(
    model: NoiseAwareCLIP,
    scheduler: DDPMScheduler,
    data: TokenizedImages,
    held_out_captions: dict[int, list[str]] | None,
) -> tuple[tuple[str, ...], Score]:
    """Names and score of the metrics; this file's docstring defines them."""

    @torch.no_grad()
    def embed(items: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and embeddings of captions."""
        tokens = collate(items)
        ids, mask = (tokens[name].to(model.device) for name in TEXT_INPUTS)
        return ids, model.encode_text(ids, mask)

    count = min(OTHER_CAPTIONS + 1, len(data))
    other_ids, others = embed([data[i * len(data) // count] for i in range(count)])
    names, label_embeddings = ("retrieval", "cross_entropy"), None
    if held_out_captions is not None:
        names, means = (*names, "zero_shot"), []
        for label in sorted(held_out_captions):
            tokens = [data.tokenize(caption) for caption in held_out_captions[label]]
            means.append(embed(tokens)[1].mean(dim=0))
        label_embeddings = F.normalize(torch.stack(means), dim=1)

    def score(batch: Batch, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x_t = scheduler.add_noise(batch["pixel_values"], eps, t)
        ids, mask = (batch[name] for name in TEXT_INPUTS)
        _, image, text = model(x_t, t, ids, mask, return_dict=False)
        same = (ids[:, None] == other_ids).all(dim=2)
        other = (model.scale * image @ others.mT).masked_fill(same, -torch.inf)
        correct = model.scale * (image * text).sum(dim=1, keepdim=True)
        retrieved = (correct[:, 0] > other.amax(dim=1)).float()
        cross_entropy = torch.cat([correct, other], dim=1).logsumexp(dim=1) - correct[:, 0]
        metrics = [retrieved, cross_entropy]
        if label_embeddings is not None:
            nearest = (image @ label_embeddings.mT).argmax(dim=1)
            metrics.append((nearest == batch["label"]).float())
        return torch.stack(metrics)

    return names, score


def main() -> None:
    options = parse(ClipOptions, __doc__)
    with exit_on_value_error():
        # 1. Data, noise schedule, model
        accelerator = make_accelerator(options)
        if options.train_batch_size * accelerator.num_processes == 1:
            raise ValueError(
                "--train_batch_size 1: an image's caption is distinguished from those of the others "
                "in the batch, of all processes: 2 or more are allowed"
            )
        by_label = options.captions is not None
        images, held_out = load_data(options, accelerator, labelled=by_label)
        captions, held_out_captions = load_captions(options.captions, images.id2label)
        with named_errors(f"split {options.train_split!r}"):
            data = CaptionedImages(images, options.caption_column, captions)
        scheduler = load_scheduler(options)
        schedule = trained_schedule(scheduler, options.max_timestep)
        num_timesteps = schedule["num_train_timesteps"]
        set_seed(options.seed)
        clip = make_clip(options, images, data, schedule)
        tokenizer, length = clip.tokenizer, clip.text_encoder.config.max_position_embeddings
        with named_errors(f"split {options.train_split!r}"):
            warning = check_captions(data, tokenizer, length)
        if warning is not None:
            accelerator.print(warning)
        if held_out is not None:
            of_label = held_out_captions or captions
            with named_errors("held-out images"):
                held_out = CaptionedImages(held_out, options.caption_column, of_label)
            held_out = TokenizedImages(held_out, tokenizer, length)
        stream = images if options.streaming else None
        data = TokenizedImages(data, tokenizer, length)
        trainer = Trainer(options, accelerator, clip, data, stream)

    # 2. Train, save, publish
    def loss(model: torch.nn.Module, batch: Batch, draws: StepRandom) -> torch.Tensor:
        t = draws.randint(num_timesteps)
        eps = draws.randn(*batch["pixel_values"].shape[1:])
        x_t = scheduler.add_noise(batch["pixel_values"], eps, t)
        output = model(x_t, t, *(batch[name] for name in TEXT_INPUTS))
        image_embeds = Gather.apply(output.image_embeds, accelerator)
        text_embeds = Gather.apply(output.text_embeds, accelerator)
        return contrastive_loss(image_embeds, text_embeds, trainer.unwrapped.scale)

    def evaluate(model: NoiseAwareCLIP, step: int) -> dict[str, Any]:
        if held_out is None:
            return {}
        names, score = make_score(model, scheduler, held_out, held_out_captions)
        return held_out_metrics(accelerator, options, held_out, num_timesteps, names, score)

    model = trainer.train(loss, evaluate)
    usage = (
        f'NoiseAwareCLIP.from_pretrained("{options.output_dir}")  # in Python: guides by captions'
    )
    save_and_publish(options, accelerator, model, [usage])


if __name__ == "__main__":
    run_program(main)

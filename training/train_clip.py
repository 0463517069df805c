"""Train a noise-aware CLIP with Accelerate: an image encoder of (x_t, t) and a text encoder, by contrastive loss.

    accelerate launch training/train_clip.py --train_data_dir photos --caption_column text --output_dir out/clip
    accelerate launch training/train_clip.py --train_data_dir data/fashion-mnist --resolution 28 \\
        --captions training/configs/fashion_mnist_captions.json     # captions by label, for any labelled data
    accelerate launch training/train_clip.py ... --text_encoder openai/clip-vit-base-patch32 --freeze_text_encoder
    accelerate launch training/train_clip.py ... --image_encoder out/classifier         # warm start
    accelerate launch training/train_clip.py ... --resume_from_checkpoint latest        # a run that was stopped goes on
    accelerate launch training/train_clip.py ... --push_to_hub --hub_model_id user/clip
    accelerate launch --multi_gpu --num_processes 2 training/train_clip.py ...          # several GPUs
    torchrun --standalone --nproc_per_node 2 training/train_clip.py --cpu ...           # several processes on CPUs

--output_dir becomes a folder that `NoiseAwareCLIP.from_pretrained` reads, with the tokenizer, and the noise schedule in
its config. Next to it: `metrics.json`, figures at ten noise levels of the held-out split: `retrieval` (share of images
that fit their own caption better than the captions of 99 others) and its `cross_entropy`; with --captions that holds
some out, also `zero_shot`, the accuracy of the label whose held-out captions' mean embedding is the nearest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from loop import Batch, Draws, Run, finish, held_out_figures, ten_levels
from options import (
    explained,
    load_data,
    load_scheduler,
    make_accelerator,
    make_model,
    option,
    parse,
)
from publishing import publish
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from train_classifier import DEFAULT, NoisyOptions, trained_schedule
from transformers import (
    AutoTokenizer,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from guided_diffusers import NoiseAwareClassifier
from guided_diffusers.clip import MODEL_ARGUMENTS, NoiseAwareCLIP, image_config, last_layer
from guided_diffusers.learning.data import CaptionedImages, LabelledImages

DEFAULT_TEXT = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 256,
}
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
}  # ids 0 to 3
CANDIDATES = 99  # captions of others that an image is compared with


@dataclass
class ClipOptions(NoisyOptions):
    caption_column: str | None = option(
        None, "column of the captions: strings, or lists of strings of which one is drawn each time"
    )
    captions: str | None = option(
        None,
        'captions by label, instead of a column: a JSON file {"train": {label: [caption, ...], ...}, '
        '"held_out": {...}}; "held_out" may be missing',
    )
    text_encoder: str | None = option(
        None,
        "a pretrained CLIP text model with its tokenizer, a folder or Hub name; if left out, a small one and a "
        "tokenizer of the captions' words are trained",
    )
    freeze_text_encoder: bool = option(False, "leave --text_encoder as it is")
    text_config: str | None = option(
        None,
        "the new text encoder's size: a JSON file of `CLIPTextConfig`'s arguments, of which projection_dim is "
        "the embeddings' width; longer captions than its max_position_embeddings are cut",
    )
    image_encoder: str | None = option(
        None,
        "a NoiseAwareClassifier, a folder or Hub name, from whose config and weights, but for the last layer, "
        "the image encoder starts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for one, other in (("caption_column", "captions"), ("text_encoder", "text_config")):
            values = getattr(self, one), getattr(self, other)
            if None not in values:
                raise ValueError(
                    f"--{one} {values[0]} and --{other} {values[1]}: only one of the two is allowed"
                )
        if (self.caption_column, self.captions) == (None, None):
            raise ValueError("--caption_column None and --captions None: one of the two is needed")
        if self.streaming and self.caption_column is not None:
            raise ValueError(
                f"--caption_column {self.caption_column}: with --streaming --captions, captions by label, "
                "are allowed, since a tokenizer is made of all captions before the first step"
            )
        if self.freeze_text_encoder and self.text_encoder is None:
            raise ValueError("--freeze_text_encoder needs --text_encoder, a pretrained one")


def read_json(name: str, path: str) -> dict[str, Any]:
    """The object in the JSON file of an option.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    try:
        with open(path) as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{name} {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--{name} {path} holds a {type(content).__name__}; an object is allowed")
    return content


def load_captions(
    options: ClipOptions, id2label: dict[int, str]
) -> tuple[dict[int, list[str]] | None, dict[int, list[str]] | None]:
    """The captions of --captions by label id, those to train with and those held out; None where there are none.

    Raises:
        ValueError: if the file's form is another, or its labels are others.
    """
    if options.captions is None:
        return None, None
    where, content = f"--captions {options.captions}", read_json("captions", options.captions)
    if "train" not in content or content.keys() - {"train", "held_out"}:
        raise ValueError(
            f'{where} has {sorted(content)}; "train" and, if any, "held_out" are allowed'
        )
    for part, by_name in content.items():
        if not isinstance(by_name, dict) or by_name.keys() != set(id2label.values()):
            raise ValueError(
                f"{where}: {part!r} has the labels {sorted(by_name)}, the dataset "
                f"{sorted(id2label.values())}"
            )
        for name, captions in by_name.items():
            if (
                not isinstance(captions, list)
                or not captions
                or not all(isinstance(one, str) for one in captions)
            ):
                raise ValueError(
                    f"{where}: {part!r} has {captions!r} for {name!r}; a list of strings is allowed"
                )
    train, held_out = (
        content.get(part) and {i: content[part][name] for i, name in id2label.items()}
        for part in ("train", "held_out")
    )
    return train, held_out


def word_tokenizer(captions: list[str], length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the captions' words and punctuation, in lower case: [BOS] word ... [EOS] [PAD] ...

    [EOS] isn't token 2, at which transformers' CLIP would look for the largest id instead, as old checkpoints need it.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = list(SPECIAL.values())
    tokenizer.train_from_iterator(
        captions, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]",
        special_tokens=[(token, special.index(token)) for token in ("[BOS]", "[EOS]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, padding_side="right", **SPECIAL
    )


def make_text(
    options: ClipOptions, captions: CaptionedImages
) -> tuple[dict[str, Any], PreTrainedTokenizerBase, CLIPTextModelWithProjection | None]:
    """The text encoder's config, its tokenizer, and its model where there is a pretrained one.

    Raises:
        ValueError: if there is none in --text_encoder, or it is to be frozen and has no projection.
    """
    if options.text_encoder is None:
        config = (
            DEFAULT_TEXT
            if options.text_config is None
            else read_json("text_config", options.text_config)
        )
        tokenizer = word_tokenizer(
            sorted(set(captions.captions())), config.get("max_position_embeddings", 77)
        )
        ids = {
            name + "_id": getattr(tokenizer, name + "_id")
            for name in ("pad_token", "bos_token", "eos_token")
        }
        return {**config, "vocab_size": len(tokenizer), **ids}, tokenizer, None
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.text_encoder)
        model, info = CLIPTextModelWithProjection.from_pretrained(
            options.text_encoder, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"--text_encoder {options.text_encoder}: {error}") from error
    if options.freeze_text_encoder and info["missing_keys"]:
        raise ValueError(
            f"--text_encoder {options.text_encoder} has no {sorted(info['missing_keys'])}; with "
            "--freeze_text_encoder a whole CLIPTextModelWithProjection is allowed"
        )
    config = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name not in ("architectures", "dtype", "model_type", "transformers_version")
    }
    return config, tokenizer, model.float()


def make_clip(
    options: ClipOptions, data: LabelledImages, captions: CaptionedImages, schedule: dict[str, Any]
) -> NoiseAwareCLIP:
    """The model to train, warm where a start is given.

    Raises:
        ValueError: if an encoder's config or weights don't fit, or there are none where an option says so.
    """
    text_config, tokenizer, text_encoder = make_text(options, captions)
    start, default = None, DEFAULT
    if options.image_encoder is not None:
        try:
            start = NoiseAwareClassifier.from_pretrained(options.image_encoder)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"--image_encoder {options.image_encoder}: {error}") from error
        default = image_config(start.config)
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
    try:
        clip = NoiseAwareCLIP(
            image_config(encoder.config), text_config, **schedule, tokenizer=tokenizer
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"--text_config {options.text_config}: {error}") from error
    if start is not None:
        last_layer(start).weight, last_layer(start).bias = last_layer(
            clip.image_encoder
        ).parameters()
        try:
            clip.image_encoder.load_state_dict(start.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n\t")[:2])
            raise ValueError(
                f"--image_encoder {options.image_encoder}, --resolution {options.resolution}: {reason}"
            ) from error
    if text_encoder is not None:
        clip.text_encoder.load_state_dict(text_encoder.state_dict())
        clip.text_encoder.requires_grad_(not options.freeze_text_encoder)
    return clip


class Tokenized(torch.utils.data.Dataset):
    """`CaptionedImages` with `input_ids` and `attention_mask` (L,) in place of the caption, cut or padded to L."""

    def __init__(self, data: CaptionedImages, tokenizer: PreTrainedTokenizerBase, length: int):
        self.data, self.tokenizer, self.length = data, tokenizer, length

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        found = self.data[item]
        return self.tokens(found.pop("caption")) | found

    def tokens(self, caption: str) -> dict[str, torch.Tensor]:
        read = self.tokenizer(
            caption,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return {name: read[name][0] for name in ("input_ids", "attention_mask")}


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Mean of the cross entropies of choosing each image's text and each text's image, row i with row i.

    Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), figure 3.

    Args:
        images, texts: embeddings (B, D) of norm 1.
    """
    logits, own = scale * images @ texts.mT, torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2


class Gather(torch.autograd.Function):
    """The rows (B, D) of all processes, (N * B, D), for a loss that all of them work out alike.

    Backwards the processes' gradients add up, N times this one's, since DDP takes their mean afterwards.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        start = accelerator.process_index * len(rows)
        ctx.processes, ctx.mine = accelerator.num_processes, slice(start, start + len(rows))
        return accelerator.gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.processes * gradient[ctx.mine], None


def make_score(
    model: NoiseAwareCLIP,
    scheduler: DDPMScheduler,
    data: Tokenized,
    held_out: dict[int, list[str]] | None,
) -> tuple[tuple[str, ...], Callable[[Batch, torch.Tensor, torch.Tensor], torch.Tensor]]:
    """What `held_out_figures` averages, names and score; the top of this file says what they mean."""
    device = model.device

    def embedded(tokens: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = (
            torch.stack([each[name] for each in tokens]).to(device)
            for name in ("input_ids", "attention_mask")
        )
        with torch.no_grad():
            return ids, model.encode_text(ids, mask)

    count = min(CANDIDATES + 1, len(data))
    other_ids, others = embedded([data[i * len(data) // count] for i in range(count)])
    classes = None
    if held_out is not None:
        classes = F.normalize(
            torch.stack(
                [
                    embedded([data.tokens(caption) for caption in held_out[i]])[1].mean(0)
                    for i in sorted(held_out)
                ]
            ),
            dim=1,
        )

    def score(batch: Batch, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x_t = scheduler.add_noise(batch["pixel_values"], eps, t)
        _, image, text = model(
            x_t, t, batch["input_ids"], batch["attention_mask"], return_dict=False
        )
        same = (batch["input_ids"][:, None] == other_ids).all(dim=2)
        rest = (model.scale * image @ others.mT).masked_fill(same, -torch.inf)
        own = model.scale * (image * text).sum(dim=1, keepdim=True)
        figures = [
            (own[:, 0] > rest.amax(dim=1)).float(),
            torch.cat([own, rest], dim=1).logsumexp(1) - own[:, 0],
        ]
        if classes is not None:
            figures.append(((image @ classes.mT).argmax(dim=1) == batch["label"]).float())
        return torch.stack(figures)

    return ("retrieval", "cross_entropy", "zero_shot")[: 2 if classes is None else 3], score


def main() -> None:
    options = parse(ClipOptions, __doc__)
    with explained():
        accelerator = make_accelerator(options)
        images, held_out_images = load_data(options, accelerator)
        by_label, by_label_held_out = load_captions(options, images.id2label)
        data = CaptionedImages(images, options.caption_column, by_label)
        scheduler = load_scheduler(options)
        schedule = trained_schedule(options, scheduler)
        set_seed(options.seed)
        clip = make_clip(options, images, data, schedule)
        shape = clip.tokenizer, clip.text_encoder.config.max_position_embeddings
        held_out = None
        if held_out_images is not None:
            captions = CaptionedImages(
                held_out_images, options.caption_column, by_label_held_out or by_label
            )
            held_out = Tokenized(captions, *shape)
        run = Run(
            options,
            accelerator,
            clip,
            Tokenized(data, *shape),
            images if options.streaming else None,
        )

    def loss(model: torch.nn.Module, batch: Batch, draws: Draws) -> torch.Tensor:
        t = draws.randint(schedule["num_train_timesteps"])
        eps = draws.randn(*batch["pixel_values"].shape[1:])
        x_t = scheduler.add_noise(batch["pixel_values"], eps, t)
        output = model(x_t, t, batch["input_ids"], batch["attention_mask"])
        images, texts = (
            Gather.apply(rows, accelerator) for rows in (output.image_embeds, output.text_embeds)
        )
        return contrastive_loss(images, texts, run.bare.scale)

    def evaluate(model: NoiseAwareCLIP, step: int) -> dict[str, Any]:
        if held_out is None:
            return {}
        names, score = make_score(model, scheduler, held_out, by_label_held_out)
        return held_out_figures(
            options,
            accelerator,
            held_out,
            ten_levels(schedule["num_train_timesteps"]),
            names,
            score,
        )

    model = run.train(loss, evaluate)
    if accelerator.is_main_process:
        model.save_pretrained(options.output_dir)
    finish(accelerator)
    if accelerator.is_main_process:
        publish(options, model)


if __name__ == "__main__":
    main()

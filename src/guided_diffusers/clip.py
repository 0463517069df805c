"""A CLIP whose image encoder reads noisy images: a critic of how well a caption fits what is under the noise.

Nichol et al., GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models (2021),
section 2.3.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .classifier import PUSH_ARGUMENTS, NoiseAwareClassifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SCALE = 100.0  # Radford et al., Learning Transferable Visual Models From Natural Language Supervision, section 2.5
DECIDED = (
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
)  # arguments of the image encoder that its config leaves to the whole model
CODE_FILE = "guided_diffusers_clip"  # of a repository, for use without this package
WHERE_FROM = (
    "is_local",
    "local_files_only",
    "name_or_path",
)  # in a tokenizer's config, where it was loaded from
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


@dataclass
class NoiseAwareCLIPOutput(BaseOutput):
    """Output of [`NoiseAwareCLIP`], for B images and N captions.

    `logits_per_image` (B, N) is scale * image_embeds @ text_embeds.T; `image_embeds` (B, D) and `text_embeds` (N, D)
    have norm 1. All are float32.
    """

    logits_per_image: Tensor
    image_embeds: Tensor = None  # always there; Accelerate rebuilds an output from one dictionary
    text_embeds: Tensor = None


class NoiseAwareCLIP(ModelMixin, ConfigMixin):
    """Image and text encoder, trained to tell by the inner product which caption belongs to which noisy image.

        f(x_t, t, c) = scale * <image(x_t, t), text(c)>,    |image| = |text| = 1

    At the optimum of the contrastive loss, f = log p(x_t, c) / (p(x_t) p(c)) + const (van den Oord et al.,
    Representation Learning with Contrastive Predictive Coding, 2018, section 2.3), so that
    grad_{x_t} f = grad_{x_t} log p(c | x_t): the score shift of guidance by a caption, with no predicted x0 in between.

    Args:
        image_config: Arguments of [`NoiseAwareClassifier`], whose logits are the image's embedding. Not among them:
            `num_labels`, which is the projection's width, what they mean, and the noise schedule, given below.
        text_config: Arguments of `transformers.CLIPTextConfig`. Its `projection_dim` is D, and its `eos_token_id` must
            be the tokenizer's: the text's embedding is read there.
        num_train_timesteps, beta_schedule, beta_start, beta_end, trained_betas: The noise schedule that it was trained
            with, in `DDPMScheduler`'s words: it says which noise level a `timestep` is. Guidance reads it.
        tokenizer: What [`~NoiseAwareCLIP.encode_prompts`] reads captions with; it adds bos and eos. It is saved and
            loaded with the model, in the folder `tokenizer`.

    Raises:
        ValueError: For arguments in `image_config` that don't belong there, and for whatever the encoders refuse.
    """

    ignore_for_config = ["tokenizer"]

    @register_to_config
    def __init__(
        self,
        image_config: dict[str, Any],
        text_config: dict[str, Any],
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: list[float] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        if wrong := sorted(set(DECIDED) & image_config.keys()):
            raise ValueError(
                f"image_config has {wrong}; allowed: NoiseAwareClassifier's arguments but {DECIDED}"
            )
        text = CLIPTextConfig(**text_config)
        self.image_encoder = NoiseAwareClassifier(
            **image_config,
            num_labels=text.projection_dim,
            num_train_timesteps=num_train_timesteps,
            beta_schedule=beta_schedule,
            beta_start=beta_start,
            beta_end=beta_end,
            trained_betas=trained_betas,
        )
        last_layer(self.image_encoder).reset_parameters()  # a classifier's zeros have no direction
        self.text_encoder = CLIPTextModelWithProjection(text)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.tokenizer = tokenizer

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), at most 100."""
        return self.logit_scale.float().clamp(max=math.log(MAX_SCALE)).exp()

    def encode_image(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """Embeddings (B, D) of noisy images, float32, of norm 1.

        Args:
            sample: x_t, (B, C, H, W), as the training's forward process left it:
                sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps with x0 in [-1, 1].
            timestep: t in [0, num_train_timesteps - 1] of the schedule in the config, fractional allowed: a number, or
                a tensor () or (B,).

        Raises:
            ValueError: If the shape of `sample` or `timestep` doesn't fit.
        """
        return F.normalize(self.image_encoder(sample, timestep).logits.float(), dim=1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings (N, D) of captions, float32, of norm 1, from token ids (N, L) padded on the right."""
        return F.normalize(self.text_encoder(input_ids, attention_mask).text_embeds.float(), dim=1)

    def encode_prompts(self, prompts: str | list[str]) -> Tensor:
        """Embeddings (N, D) of N prompts, float32, of norm 1.

        Raises:
            ValueError: If the model has no tokenizer, there is no prompt, one is longer than the text encoder reads, or
                has words that the tokenizer doesn't know, of which nothing could come.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.tokenizer is None:
            raise ValueError(
                "encode_prompts needs a tokenizer, and this model has none; give NoiseAwareCLIP one, or "
                "use encode_text"
            )
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts is {prompts!r}; allowed: a string or a list of one or more")
        tokens = self.tokenizer(
            prompts, padding=True, padding_side="right", return_tensors="pt"
        ).to(self.device)
        length, most = tokens.input_ids.shape[1], self.text_encoder.config.max_position_embeddings
        if length > most:
            longest = prompts[int(tokens.attention_mask.sum(1).argmax())]
            raise ValueError(
                f"prompts has {longest!r} of {length} tokens; up to {most} are allowed"
            )
        unknown = self.tokenizer.unk_token_id
        if (
            unknown != self.text_encoder.config.eos_token_id
        ):  # which is both in CLIP's own, that knows every word
            for prompt, ids in zip(prompts, tokens.input_ids.tolist(), strict=True):
                if unknown in ids:
                    spans = self.tokenizer(
                        prompt, padding=True, return_offsets_mapping=True
                    ).offset_mapping
                    words = [
                        prompt[a:b] for (a, b), i in zip(spans, ids, strict=False) if i == unknown
                    ]
                    known = sorted(
                        self.tokenizer.get_vocab().keys() - set(self.tokenizer.all_special_tokens)
                    )
                    raise ValueError(
                        f"prompts has {prompt!r}, and the model never read the words {words}; allowed: "
                        f"{known}"
                    )
        return self.encode_text(tokens.input_ids, tokens.attention_mask)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> NoiseAwareCLIPOutput | tuple[Tensor, Tensor, Tensor]:
        """The critic f(x_t, t, c) of every image with every caption; arguments as in `encode_image`, `encode_text`."""
        images, texts = (
            self.encode_image(sample, timestep),
            self.encode_text(input_ids, attention_mask),
        )
        with torch.autocast(
            sample.device.type, enabled=False
        ):  # 8 bits of the cosine are too few to multiply by 100
            logits = self.scale * images @ texts.mT
        return (
            NoiseAwareCLIPOutput(logits, images, texts) if return_dict else (logits, images, texts)
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As any Diffusers model, in safetensors, with the tokenizer in the folder `tokenizer`, and the code that loads
        it where guided-diffusers is missing:

            AutoModel.from_pretrained(folder, trust_remote_code=True)

        Raises:
            ValueError: For `safe_serialization=False`.
        """
        folder = Path(save_directory)
        if not safe_serialization:
            raise ValueError(
                "safe_serialization is False; allowed: True, weights are saved as safetensors"
            )
        sent = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if push_to_hub and name in kwargs}
        super().save_pretrained(folder, is_main_process, variant=variant, **kwargs)
        if is_main_process:
            if self.tokenizer is not None:
                tokenizer = copy.deepcopy(self.tokenizer)
                if (
                    tokenizer.is_fast
                ):  # it would save how it last padded and cut, which each call says anew
                    tokenizer.backend_tokenizer.no_padding()
                    tokenizer.backend_tokenizer.no_truncation()
                tokenizer.save_pretrained(str(folder / "tokenizer"))
                path = folder / "tokenizer" / "tokenizer_config.json"
                config = {
                    key: value
                    for key, value in json.loads(path.read_text()).items()
                    if key not in WHERE_FROM
                }
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            self.save_code(folder)
        if push_to_hub and is_main_process:
            self.push_to_hub(sent.pop("repo_id", folder.name), variant=variant, **sent)

    def save_code(self, folder: Path) -> None:
        """Write the config and the files of `code`."""
        self.save_config(folder)
        for file, text in self.code().items():
            (folder / file).write_text(text)

    def code(self) -> dict[str, str]:
        """The files, {name: text}, that load the model where guided-diffusers isn't installed."""
        if type(self).__module__ != __name__:
            return {}
        if __name__ == "guided_diffusers.clip":  # else this is such a file
            from guided_diffusers.standalone import self_contained

            return {f"{CODE_FILE}.py": self_contained(type(self))}
        return {f"{CODE_FILE}.py": Path(__file__).read_text()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> NoiseAwareCLIP:
        """As any Diffusers model, from a folder or the Hub, safetensors only, with the tokenizer where there is one.

        Raises:
            ValueError: For `use_safetensors=False`, or the folder of a model of another class.
            OSError: For a file that is missing or broken; the message names it.
        """
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError(
                "use_safetensors is False; allowed: True, weights in pickles aren't read"
            )
        name = str(pretrained_model_name_or_path)
        model = super().from_pretrained(name, use_safetensors=True, **kwargs)
        source = {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
        source["subfolder"] = (Path(kwargs.get("subfolder") or "") / "tokenizer").as_posix()
        if cached_file(
            name, "tokenizer_config.json", **source, _raise_exceptions_for_missing_entries=False
        ):
            model.tokenizer = AutoTokenizer.from_pretrained(name, **source, trust_remote_code=False)
        return model

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> NoiseAwareCLIP:
        """As any Diffusers model.

        Raises:
            ValueError: For the config of a model of another class.
        """
        name, names = (
            config.get("_class_name", cls.__name__),
            [base.__name__ for base in cls.__mro__],
        )
        if name not in names:
            raise ValueError(f"_class_name of the config is {name!r}; allowed: {cls.__name__}")
        return super().from_config(
            {key: value for key, value in config.items() if key != "auto_map"}, **kwargs
        )

    def to_json_string(self) -> str:
        """The config, with the class for `AutoModel`, and without the path that the weights are from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        if type(self).__module__ == __name__:
            config["auto_map"] = {"AutoModel": f"{CODE_FILE}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def last_layer(encoder: NoiseAwareClassifier) -> nn.Linear:
    return encoder.head[-1].out if encoder.config.pool == "attention" else encoder.head[-1]


def image_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a [`NoiseAwareClassifier`]'s config that is `NoiseAwareCLIP`'s `image_config`."""
    return {
        name: value
        for name, value in config.items()
        if name not in DECIDED and not name.startswith("_")
    }

"""CLIP for noisy images: similarity of a caption and the image under the noise.

Nichol et al., GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion
Models (2021), section 2.3.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .classifier import PUSH_ARGUMENTS, NoiseAwareClassifier, check_model_folder
from .weights import check_saveable, check_variant, load_checked, saved_aside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SCALE = 100.0  # Radford et al. 2021 (CLIP), section 2.5
CLIP_SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
#: arguments of the image encoder that NoiseAwareCLIP determines
MODEL_ARGUMENTS = ("num_labels", "id2label", "label2id", "problem_type", *CLIP_SCHEDULE)
CODE_FILE = "guided_diffusers_clip"  # module in a repository, for use without this package
#: entries of a tokenizer's config that say where it was loaded from
LOCAL_ENTRIES = ("is_local", "local_files_only", "name_or_path")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


@dataclass
class NoiseAwareCLIPOutput(BaseOutput):
    """Output of [`NoiseAwareCLIP`] for B images and N captions, float32.

    `logits_per_image` (B, N) is scale * image_embeds @ text_embeds.T; `image_embeds` (B, D) and
    `text_embeds` (N, D) have norm 1.
    """

    logits_per_image: Tensor
    image_embeds: Tensor = None  # a default, since Accelerate rebuilds outputs from a dictionary
    text_embeds: Tensor = None


class NoiseAwareCLIP(ModelMixin, ConfigMixin):
    """Image and text encoder, trained to match noisy images with their captions.

        f(x_t, t, c) = scale * <image(x_t, t), text(c)>,    |image| = |text| = 1

    At the optimum of the contrastive loss, f = log p(x_t, c) / (p(x_t) p(c)) + const (van den Oord
    et al., Representation Learning with Contrastive Predictive Coding, 2018, section 2.3). Then
    grad_{x_t} f = grad_{x_t} log p(c | x_t), the score of guidance by a caption.

    Args:
        image_config: Arguments of [`NoiseAwareClassifier`], whose logits are the image embedding,
            without those that follow from the others here (`MODEL_ARGUMENTS`).
        text_config: Arguments of `transformers.CLIPTextConfig`. Its `projection_dim` is D. Its
            `eos_token_id` must be the tokenizer's: the text embedding is read at that token.
        num_train_timesteps, beta_schedule, beta_start, beta_end, trained_betas: The noise schedule
            of the training, as in `DDPMScheduler`; it defines the noise level of a `timestep`.
        tokenizer: Tokenizer of [`~NoiseAwareCLIP.encode_prompts`], which adds bos and eos. It is
            saved with the model in the folder `tokenizer`.

    Raises:
        ValueError: For an invalid `image_config`, and as the two encoders.
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

        if invalid := sorted(set(MODEL_ARGUMENTS) & image_config.keys()):
            raise ValueError(
                f"image_config has {invalid}; allowed: NoiseAwareClassifier's arguments but "
                f"{MODEL_ARGUMENTS}"
            )
        text = CLIPTextConfig(**text_config)
        self.image_encoder = NoiseAwareClassifier(
            **image_config,
            num_labels=text.projection_dim,
            **{name: self.config[name] for name in CLIP_SCHEDULE},
        )
        last_layer(self.image_encoder).reset_parameters()  # zeros have no direction
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
            sample: x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, (B, C, H, W), with x0 in
                [-1, 1].
            timestep: t in [0, num_train_timesteps - 1] of the config's schedule, possibly
                fractional: a number, or a tensor () or (B,).

        Raises:
            ValueError: For a `sample` or `timestep` of another shape.
        """
        return F.normalize(self.image_encoder(sample, timestep).logits.float(), dim=1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings (N, D), float32, of norm 1, of token ids (N, L) padded on the right."""
        return F.normalize(self.text_encoder(input_ids, attention_mask).text_embeds.float(), dim=1)

    def encode_prompts(self, prompts: str | list[str]) -> Tensor:
        """Embeddings (N, D) of N prompts, float32, of norm 1.

        Raises:
            ValueError: If the model has no tokenizer; for no prompt, one that is too long, or one
                with words unknown to the tokenizer.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.tokenizer is None:
            raise ValueError(
                "encode_prompts needs a tokenizer, and this model has none; pass one to "
                "NoiseAwareCLIP, or use encode_text"
            )
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts is {prompts!r}; allowed: a string or a list of one or more")
        padding = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **padding).to(self.device)
        length, limit = tokens.input_ids.shape[1], self.text_encoder.config.max_position_embeddings
        if length > limit:
            longest = prompts[int(tokens.attention_mask.sum(1).argmax())]
            raise ValueError(
                f"prompts has {longest!r} of {length} tokens; up to {limit} are allowed"
            )
        unknown = self.tokenizer.unk_token_id
        if unknown != self.text_encoder.config.eos_token_id:  # the same in CLIP's own tokenizer
            for prompt, ids in zip(prompts, tokens.input_ids.tolist(), strict=True):
                if unknown in ids:
                    self._refuse_unknown_words(prompt)
        return self.encode_text(tokens.input_ids, tokens.attention_mask)

    def _refuse_unknown_words(self, prompt: str) -> None:
        tokens = self.tokenizer(prompt, return_offsets_mapping=True)
        offsets = zip(tokens.offset_mapping, tokens.input_ids, strict=True)
        words = [prompt[a:b] for (a, b), i in offsets if i == self.tokenizer.unk_token_id]
        known = self.tokenizer.get_vocab().keys() - set(self.tokenizer.all_special_tokens)
        raise ValueError(
            f"prompts has {prompt!r}, and the model was not trained on the words {words}; allowed: "
            f"{sorted(known)}"
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> NoiseAwareCLIPOutput | tuple[Tensor, Tensor, Tensor]:
        """f(x_t, t, c) of every image and caption; see `encode_image` and `encode_text`."""
        images = self.encode_image(sample, timestep)
        texts = self.encode_text(input_ids, attention_mask)
        # in bfloat16 the cosine would be too coarse to multiply by 100
        with torch.autocast(sample.device.type, enabled=False):
            logits = self.scale * images @ texts.mT
        if not return_dict:
            return logits, images, texts
        return NoiseAwareCLIPOutput(logits, images, texts)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model, its tokenizer, and the code that loads it without this package.

        `AutoModel.from_pretrained(folder, trust_remote_code=True)` runs that code.

        Weights in the folder that the new ones replace are removed when those are complete.

        Raises:
            ValueError: For `safe_serialization=False`, or weights that aren't those of a model of
                this config, such as with an adapter in it.
            OSError: If the folder can't be written.
        """
        folder = Path(save_directory)
        if not safe_serialization:
            raise ValueError(
                "safe_serialization is False; allowed: True, weights are saved as safetensors"
            )
        push = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if push_to_hub and name in kwargs}
        check_variant(variant)
        check_saveable(type(self).__name__, self)
        with saved_aside(folder) as partial:
            super().save_pretrained(partial, is_main_process, variant=variant, **kwargs)
            if is_main_process:
                if self.tokenizer is not None:
                    self._save_tokenizer(partial / "tokenizer")
                self.save_code(partial)
        if push_to_hub and is_main_process:
            self.push_to_hub(push.pop("repo_id", folder.name), variant=variant, **push)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Publish with the arguments and checks of `guided_diffusers.hub.push_to_hub`.

        Where guided-diffusers isn't installed, this is Diffusers' method.
        """
        if __name__.partition(".")[0] != "guided_diffusers":
            return super().push_to_hub(*args, **kwargs)
        return import_module("guided_diffusers.hub").push_to_hub(self, *args, **kwargs)

    def _save_tokenizer(self, folder: Path) -> None:
        tokenizer = copy.deepcopy(self.tokenizer)
        if tokenizer.is_fast:  # the padding and truncation of the last call would be saved
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
        tokenizer.save_pretrained(str(folder))
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        for name in LOCAL_ENTRIES:
            config.pop(name, None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    save_code = NoiseAwareClassifier.save_code  # writes the config and the files of `code`

    def code(self) -> dict[str, str]:
        """Files {name: text} that load the model without this package."""
        if type(self).__module__ != __name__:
            return {}
        if __name__ != "guided_diffusers.clip":  # already such a file
            return {f"{CODE_FILE}.py": Path(__file__).read_text()}
        standalone = import_module("guided_diffusers.standalone")
        return {f"{CODE_FILE}.py": standalone.self_contained(type(self))}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> NoiseAwareCLIP:
        """Load a model, and its tokenizer if it has one, from a folder or the Hub.

        Raises:
            ValueError: For `use_safetensors=False`, a model of another class, or weights that
                aren't the model's.
            OSError: For a missing or broken file; the message names it.
        """
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError(
                "use_safetensors is False; allowed: True, weights in pickles aren't read"
            )
        check_model_folder(pretrained_model_name_or_path, kwargs.get("subfolder"))
        name = str(pretrained_model_name_or_path)
        model = load_checked(super().from_pretrained, name, use_safetensors=True, **kwargs)
        hub = {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
        hub["subfolder"] = (Path(kwargs.get("subfolder") or "") / "tokenizer").as_posix()
        optional = {**hub, "_raise_exceptions_for_missing_entries": False}
        if cached_file(name, "tokenizer_config.json", **optional):
            model.tokenizer = AutoTokenizer.from_pretrained(name, **hub, trust_remote_code=False)
        return model

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> NoiseAwareCLIP:
        """A model with random weights; ValueError for the config of a model of another class."""
        name = config.get("_class_name", cls.__name__)
        if name not in [base.__name__ for base in cls.__mro__]:
            raise ValueError(f"_class_name of the config is {name!r}; allowed: {cls.__name__}")
        arguments = {key: value for key, value in config.items() if key != "auto_map"}
        return super().from_config(arguments, **kwargs)

    def to_json_string(self) -> str:
        """The config, with the class for `AutoModel` and without the path of the weights."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        if type(self).__module__ == __name__:
            config["auto_map"] = {"AutoModel": f"{CODE_FILE}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def last_layer(encoder: NoiseAwareClassifier) -> nn.Linear:
    """The layer that computes the logits."""
    return encoder.head[-1].out if encoder.config.pool == "attention" else encoder.head[-1]


def image_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`image_config` of [`NoiseAwareCLIP`] from the config of a [`NoiseAwareClassifier`]."""
    names = [name for name in config if name not in MODEL_ARGUMENTS and not name.startswith("_")]
    return {name: config[name] for name in names}

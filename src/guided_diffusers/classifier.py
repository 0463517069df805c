"""A classifier of noisy images: p(y | x_t), the encoder half of a diffusion UNet with a pooling
head.

It imports little on purpose: this file, `unet_blocks` and `weights` travel to the Hub beside the
weights, as one.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .unet_blocks import DownBlock, MidBlock, layer_class
from .weights import check_saveable, check_variant, load_checked, saved_aside

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
DOWN_BLOCK_TYPES = {
    "conv": ("DownBlock2D", "AttnDownBlock2D"),
    "resnet": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
}
SHAPES = {1: "(B, C, L)", 2: "(B, C, H, W)", 3: "(B, C, D, H, W)"}  # of samples, by `dims`
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
SPATIAL_WIDTH = 2048  # hidden width of the spatial heads, fixed in the published architecture
FILE = "guided_diffusers_classifier"  # what this file is called beside the weights
MAX_SHOWN = 200  # characters of a value in a message
#: larger ones are of no real network, and would take for ever to build
MAX_WIDTH, MAX_LEVELS = 2**16, 16
MAX_POWER = 1000
LARGEST = {
    "in_channels": MAX_WIDTH,
    "num_labels": 10**6,
    "layers_per_block": 100,
    "patch_size": MAX_WIDTH,
    "norm_num_groups": MAX_WIDTH,
    "num_train_timesteps": 10**6,
}
PUSH_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "private",
    "create_pr",
    "token",
)  # of save_pretrained(push_to_hub=True)


@dataclass
class NoiseAwareClassifierOutput(BaseOutput):
    """Output of [`NoiseAwareClassifier`]: `logits` (B, num_labels), unnormalised log p(y | x_t); with
    a `power`, log odds."""

    logits: Tensor


class AttentionPool(nn.Module):
    """The attention output of the mean token over the mean token and the tokens of all places of a
    (B, C, ...) feature map.

    Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021),
    section 2.4.
    """

    def __init__(self, size: tuple[int, ...], channels: int, head_dim: int, out_features: int):
        super().__init__()
        self.heads = channels // head_dim
        self.positional_embedding = nn.Parameter(
            torch.randn(math.prod(size) + 1, channels) / channels**0.5
        )
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, out_features)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(2).mT
        tokens = (
            torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positional_embedding
        )
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(tokens).chunk(3, dim=2)
        )
        return self.out(F.scaled_dot_product_attention(q[:, :, :1], k, v).flatten(1))


class NoiseAwareClassifier(ModelMixin, ConfigMixin):
    """Classifier p(y | x_t, t) of noisy images: a UNet's encoder and middle block, then a pooling
    head.

    Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis", section 4. Arguments
    with names of `UNet2DModel` mean the same as there. The last layer of the head starts at zero,
    so an untrained classifier is uniform and its guidance is zero.

    Args:
        sample_size: Height and width of the images, or the sizes of samples of other `dims`, an
            integer if they are equal. Fixed with `pool="attention"`, whose positional embedding
            needs a multiple of patch_size * 2 ** (levels - 1); the other heads take any size.
        num_labels: Number of classes.
        down_block_types: One per level. "AttnDownBlock2D" has attention and down-samples by
            `downsample_type`; "DownBlock2D" ("conv") and "ResnetDownsampleBlock2D" ("resnet") have
            none, and must agree with it. The names are the same for all `dims`.
        downsample_type: "resnet" (residual blocks with average pooling, as ADM) or "conv" (strided
            convolutions).
        resnet_time_scale_shift: "scale_shift" (the timestep scales and shifts the normalised
            features, as ADM) or "default" (it is added).
        attention_head_dim: Channels of an attention head, for all levels or one per level; `None` is
            one head.
        time_proj_dim: Width of the timestep's sinusoid, a quarter of the time embedding's; `None`
            is `block_out_channels[0]`.
        pool: "attention" (attention pooling as in CLIP), "adaptive" (average of the last features),
            "spatial" and "spatial_v2" (averages of every block's features, then a perceptron of
            width 2048).
        problem_type: What the logits are, as in `transformers`: "single_label_classification" (of a
            softmax), "multi_label_classification" (each of a sigmoid) or "regression" (the values
            themselves).
        id2label, label2id: Class names, either or both. A name that several ids share is in no
            derived `label2id`.
        num_train_timesteps, beta_schedule, beta_start, beta_end, trained_betas: The noise schedule
            of the training, as in `DDPMScheduler`: it maps a `timestep` to its noise level.
            Guidance reads it.
        power_range: (1, MAX): the powers w for which the classifier also gives
            E[p(y | x_0)^w | x_t], whose gradient is the exact guidance to p(x) p(y | x)^w
            (Lu et al. 2023, "Contrastive energy prediction for exact energy-guided diffusion
            sampling", section 3). For single labels. `None`: w = 1 only, the usual classifier.
        data_mean, data_std: The data that it was trained on are (data - data_mean) / data_std; each
            a number, or one a channel. A judge of arrays reads them. `None`: images in [-1, 1].
        dims: Dimensions of the samples: 1 (signals, (B, C, L)), 2 (images, (B, C, H, W)) or 3
            (volumes, (B, C, D, H, W)). The architecture is the same.
        patch_size: Stride of the first convolution, whose kernel has 2 patch_size + 1 places: with
            2, the first level has half the size, which costs about a quarter. 1 is the published
            architecture.

    Raises:
        ValueError: For unknown or contradictory values; the message names argument, value and what
            is allowed.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm", "head"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, ...] = 64,
        in_channels: int = 3,
        num_labels: int = 1000,
        block_out_channels: tuple[int, ...] = (64, 128, 192, 256),
        down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) + ("AttnDownBlock2D",) * 3,
        layers_per_block: int = 2,
        downsample_type: str = "resnet",
        resnet_time_scale_shift: str = "scale_shift",
        attention_head_dim: int | tuple[int, ...] | None = 64,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        time_proj_dim: int | None = None,
        pool: str = "attention",
        id2label: dict[int, str] | None = None,
        label2id: dict[str, int] | None = None,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: list[float] | None = None,
        problem_type: str = "single_label_classification",
        power_range: tuple[float, float] | None = None,
        dims: int = 2,
        data_mean: float | list[float] | None = None,
        data_std: float | list[float] | None = None,
        patch_size: int = 1,
    ):
        super().__init__()
        config = self.config
        _check_kinds(config)
        size = (sample_size,) * dims if isinstance(sample_size, int) else tuple(sample_size)
        head_dims = _head_dims(attention_head_dim, block_out_channels)
        _check_architecture(config, size, head_dims)
        _check_schedule(config)
        _check_power_range(config)
        id2label, label2id = _matched_labels(num_labels, id2label, label2id)
        self.register_to_config(id2label=id2label, label2id=label2id)

        self.size = size
        time_proj_dim = time_proj_dim or block_out_channels[0]
        self.time_proj = Timesteps(time_proj_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_proj_dim, 4 * time_proj_dim)
        self.conv_in = layer_class("Conv", dims)(
            in_channels,
            block_out_channels[0],
            kernel_size=2 * patch_size + 1,
            stride=patch_size,
            padding=patch_size,
        )
        options = _block_options(config, 4 * time_proj_dim)
        self.down_blocks = _down_blocks(config, head_dims, options)
        self.mid_block = MidBlock(block_out_channels[-1], head_dims[-1], options)
        self.head = _head(self.config, size, head_dims[-1])
        last_layers = [self.last_layer]
        if power_range is not None:
            self.power_embedding = TimestepEmbedding(1, 4 * time_proj_dim)
            last_layers.append(self.power_embedding.linear_2)
        for layer in last_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that gives the logits."""
        return self.head[-1].out if self.config.pool == "attention" else self.head[-1]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        return_dict: bool = True,
        power: Tensor | float | None = None,
    ) -> NoiseAwareClassifierOutput | tuple[Tensor]:
        """Logits of p(y | x_t), or the log odds of E[p(y | x_0)^w | x_t]:

            sigmoid(f_y) = E[p(y | x_0)^w | x_t],    f_y = log p_y / (1 - p_y) + d_y log w

        with p the softmax of the head's first `num_labels` outputs and d the others. At w = 1 this
        is p(y | x_t) for all weights.

        Args:
            sample: x_t, (B, C, H, W) for `dims=2`, as the training's forward process left it:
                sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps with x0 in [-1, 1].
            timestep: t in [0, num_train_timesteps - 1] of the schedule in the config, fractional
                allowed: a number, or a tensor () or (B,).
            power: w in `config.power_range`, a number, or a tensor () or (B,). None: the logits of
                p(y | x_t), w = 1.

        Raises:
            ValueError: If the shape or dtype of `sample` or `timestep` doesn't fit, or for a timestep
                or power out of range (a tensor on an accelerator isn't checked, which would wait
                for it).
        """
        is_tensor = torch.is_tensor(sample) and sample.is_floating_point()
        _require(is_tensor, "sample", getattr(sample, "dtype", sample), "a floating-point tensor")
        shape = tuple(sample.shape)
        self._check_shape(shape)
        device = sample.device.type
        is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not is_cast:
            allowed = f"{self.dtype}, that of the weights"
            _require(sample.dtype == self.dtype, "sample.dtype", sample.dtype, allowed)
        last = self.config.num_train_timesteps - 1
        if torch.is_tensor(timestep):
            is_number = not timestep.is_complex() and timestep.dtype != torch.bool
            _require(is_number, "timestep.dtype", timestep.dtype, "integers or floats")
            allowed = f"() or (B,) = ({shape[0]},)"
            _require(
                timestep.shape in ((), (1,), shape[:1]),
                "timestep.shape",
                tuple(timestep.shape),
                allowed,
            )
            if timestep.device.type == "cpu" and not torch.compiler.is_compiling():
                low, high = timestep.min().item(), timestep.max().item()
                _require(low >= 0 and high < last + 1, "timestep", (low, high), f"0 to {last}")
            timesteps = timestep.to(sample.device).expand(shape[0])
        else:
            fits = isinstance(timestep, Real) and not isinstance(timestep, bool)
            fits = fits and 0 <= timestep < last + 1
            _require(fits, "timestep", timestep, f"a number from 0 to {last}, or a tensor")
            timesteps = torch.full(shape[:1], timestep, dtype=torch.float32, device=sample.device)

        # The sinusoid is float32 whatever the weights are, as in the original.
        temb = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        if power is not None:
            log_w = self._log_power(power, sample)
            temb = temb + log_w * self.power_embedding(log_w)
        hidden = self.conv_in(sample)
        features = (hidden,)
        for block in self.down_blocks:
            hidden, outputs = block(hidden, temb)
            features += outputs
        hidden = self.mid_block(hidden, temb)
        if self.config.pool in ("spatial", "spatial_v2"):
            places = tuple(range(2, hidden.ndim))
            hidden = torch.cat([feature.mean(places) for feature in (*features, hidden)], dim=1)
        logits = self.head(hidden)
        if self.config.power_range is not None:
            logits, d = logits.chunk(2, dim=1)
        if power is not None:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = log_odds(wide) + log_w * d
        return NoiseAwareClassifierOutput(logits=logits) if return_dict else (logits,)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Check the shape of a sample."""
        dims, channels = self.config.dims, self.config.in_channels
        allowed = SHAPES[dims].replace("C", str(channels)) + f" for dims={dims}"
        fits = len(shape) == dims + 2 and shape[0] > 0 and shape[1] == channels
        _require(fits, "sample.shape", shape, f"{allowed}, B of at least 1")
        smallest = _smallest_size(self.config)
        allowed = f"{SHAPES[dims]} with sizes of at least {smallest} for these levels"
        _require(min(shape[2:]) >= smallest, "sample.shape", shape, allowed)
        if self.config.pool == "attention":
            sizes = ", ".join(map(str, self.size))
            allowed = f"(B, C, {sizes}) with pool='attention'"
            _require(shape[2:] == self.size, "sample.shape", shape, allowed)

    def _log_power(self, power: Tensor | float, sample: Tensor) -> Tensor:
        """log w, (B, 1), in the weights' dtype."""
        powers = self.config.power_range
        allowed = "None, the classifier was trained without powers (--max_power)"
        _require(powers is not None, "power", power, allowed)
        allowed = f"a number from {powers[0]:g} to {powers[1]:g}, or a tensor () or (B,) of such"
        if not torch.is_tensor(power):
            _require(_is_number(power), "power", power, allowed)
            in_range = powers[0] <= power <= powers[1]
            _require(in_range, "power", power, allowed)
            w = torch.full((), power, device=sample.device, dtype=torch.float32)
            return w.log().expand(len(sample))[:, None].to(self.dtype)
        is_number = power.dtype != torch.bool and not power.is_complex()
        fits = is_number and power.shape in ((), (1,), sample.shape[:1])
        if fits and power.device.type == "cpu":
            fits = bool(((power >= powers[0]) & (power <= powers[1])).all())
        _require(fits, "power", power, allowed)
        w = power.to(sample.device, torch.promote_types(self.dtype, torch.float32))
        return w.log().expand(len(sample))[:, None].to(self.dtype)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as in Diffusers, in safetensors, with the code that loads it without
        guided-diffusers:

            AutoModel.from_pretrained(folder, trust_remote_code=True)

        Weights in the folder that the new ones replace are removed when those are complete.

        Raises:
            ValueError: For `safe_serialization=False`, or weights that aren't those of a model of
                this config, such as with an adapter in it.
            OSError: If the folder can't be written.
        """
        _require(
            safe_serialization,
            "safe_serialization",
            safe_serialization,
            "True, weights are saved as safetensors",
        )
        check_variant(variant)
        check_saveable(type(self).__name__, self)
        push = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if push_to_hub and name in kwargs}
        options = {
            "variant": variant,
            "max_shard_size": max_shard_size,
            **kwargs,
        }
        with saved_aside(Path(save_directory)) as partial:
            if is_main_process:
                self.save_code(partial)
            super().save_pretrained(partial, is_main_process, **options)
        if push_to_hub and is_main_process:
            self.push_to_hub(
                push.pop("repo_id", Path(save_directory).name), variant=variant, **push
            )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Publish with the arguments and checks of `guided_diffusers.hub.push_to_hub`.

        Where guided-diffusers isn't installed, this is Diffusers' method.
        """
        if __name__.partition(".")[0] != "guided_diffusers":
            return super().push_to_hub(*args, **kwargs)
        return import_module("guided_diffusers.hub").push_to_hub(self, *args, **kwargs)

    def save_code(self, folder: Path) -> None:
        """Write the config and the files of `code`."""
        self.save_config(folder)
        for file, text in self.code().items():
            (folder / file).write_text(text)

    def code(self) -> dict[str, str]:
        """The files, {name: text}, that load the classifier where guided-diffusers isn't
        installed."""
        if type(self).__module__ != __name__:
            return {}
        if __name__ != "guided_diffusers.classifier":  # already such a file
            return {f"{FILE}.py": Path(__file__).read_text()}
        standalone = import_module("guided_diffusers.standalone")
        return {f"{FILE}.py": standalone.self_contained(type(self))}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load as in Diffusers, from a folder or the Hub, safetensors only.

        Raises:
            ValueError: For `use_safetensors=False`, the folder of a model of another class, or
                weights that aren't the model's.
            OSError: For a file that is missing or broken; the message names it.
        """
        wanted = kwargs.pop("use_safetensors", True)
        _require(
            wanted is not False, "use_safetensors", wanted, "True, weights in pickles aren't read"
        )
        check_model_folder(pretrained_model_name_or_path, kwargs.get("subfolder"))
        load = super().from_pretrained
        return load_checked(load, pretrained_model_name_or_path, use_safetensors=True, **kwargs)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> Any:
        """As any Diffusers model.

        Raises:
            ValueError: For the config of a model of another class.
        """
        name, names = (
            config.get("_class_name", cls.__name__),
            [base.__name__ for base in cls.__mro__],
        )
        _require(name in names, "_class_name of the config", name, cls.__name__)
        return super().from_config(
            {key: value for key, value in config.items() if key != "auto_map"}, **kwargs
        )

    def to_json_string(self) -> str:
        """The config, with the class for `AutoModel`, and without the path that the weights are
        from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        if type(self).__module__ == __name__:
            config["auto_map"] = {"AutoModel": f"{FILE}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def log_odds(logits: Tensor) -> Tensor:
    """log p_k / (1 - p_k) of a softmax p of logits (B, K), accurate for p near 0 and 1, (B, K)."""
    log_p = logits.log_softmax(dim=1)
    is_top = F.one_hot(logits.argmax(dim=1), logits.shape[1]).bool()
    log_rest = torch.log(-torch.expm1(log_p.masked_fill(is_top, -1.0)))
    rest_of_top = log_p.masked_fill(is_top, -math.inf).logsumexp(dim=1, keepdim=True)
    return log_p - torch.where(is_top, rest_of_top, log_rest)


def check_model_folder(name: Any, subfolder: str | None = None) -> None:
    """Refuse what is neither a folder nor a Hub id, and a config that is no JSON object.

    Raises:
        ValueError: Naming the folder or file.
    """
    is_name = isinstance(name, (str, Path)) and str(name) != ""
    _require(is_name, "the model", name, "a folder or a Hub id, user/model")
    if not Path(name).exists() and not re.fullmatch(
        r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", str(name)
    ):
        raise ValueError(f"{str(name)!r}: no such folder, and a Hub id is user/model")
    if Path(name).is_file():
        raise ValueError(f"{str(name)!r} is a file; a folder or a Hub id, user/model, is allowed")
    path = Path(name) / (subfolder or "") / "config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}") from None
    _require(isinstance(config, dict), f"the content of {path}", config, "a JSON object {...}")


def _head_dims(attention_head_dim: Any, block_out_channels: tuple[int, ...]) -> list[int]:
    """Channels of an attention head at each level."""
    if attention_head_dim is None:
        return list(block_out_channels)
    if isinstance(attention_head_dim, int):
        return [attention_head_dim] * len(block_out_channels)
    return list(attention_head_dim)


def _block_options(config: Any, temb_channels: int) -> dict[str, Any]:
    """What all residual blocks share."""
    return {
        "dims": config.dims,
        "temb_channels": temb_channels,
        "groups": config.norm_num_groups,
        "eps": config.norm_eps,
        "dropout": config.dropout,
        "time_scale_shift": config.resnet_time_scale_shift,
    }


def _down_blocks(config: Any, head_dims: list[int], options: dict[str, Any]) -> nn.ModuleList:
    """One block a level; all but the last down-sample."""
    widths = config.block_out_channels
    blocks = nn.ModuleList()
    for level, kind in enumerate(config.down_block_types):
        block = DownBlock(
            widths[max(level - 1, 0)],
            widths[level],
            num_layers=config.layers_per_block,
            head_dim=head_dims[level] if "Attn" in kind else None,
            downsample_type=config.downsample_type if level < len(widths) - 1 else None,
            options=options,
        )
        blocks.append(block)
    return blocks


def _head(config: Any, size: tuple[int, ...], head_dim: int) -> nn.Sequential:
    widths, depth, pool = list(config.block_out_channels), config.layers_per_block, config.pool
    channels, groups, eps = widths[-1], config.norm_num_groups, config.norm_eps
    outputs = config.num_labels * (1 if config.power_range is None else 2)
    if pool in ("spatial", "spatial_v2"):
        # It sees conv_in, every residual block and down-sampler, and the middle block.
        seen = widths[0] + depth * sum(widths) + sum(widths[:-1]) + channels
        v2 = pool == "spatial_v2"
        activation = (
            (nn.GroupNorm(groups, SPATIAL_WIDTH, eps=eps), nn.SiLU()) if v2 else (nn.ReLU(),)
        )
        return nn.Sequential(
            nn.Linear(seen, SPATIAL_WIDTH), *activation, nn.Linear(SPATIAL_WIDTH, outputs)
        )
    normed = (nn.GroupNorm(groups, channels, eps=eps), nn.SiLU())
    if pool == "adaptive":
        average = layer_class("AdaptiveAvgPool", config.dims)(1)
        return nn.Sequential(*normed, average, nn.Flatten(), nn.Linear(channels, outputs))
    grid = tuple(n // (config.patch_size << (len(widths) - 1)) for n in size)
    return nn.Sequential(*normed, AttentionPool(grid, channels, head_dim, outputs))


def _require(ok: bool, argument: str, value: Any, allowed: str) -> None:
    if not ok:
        text = repr(value)
        text = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
        raise ValueError(f"{argument} is {text}; allowed: {allowed}.")


def _is_integer(value: Any, most: int, least: int = 0) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf


def _check_kinds(config: Any) -> None:
    """Refuse values of another kind than their argument's, and sizes of no real network."""
    for name, most in LARGEST.items():
        allowed = f"an integer up to {most}"
        _require(_is_integer(config[name], most), name, config[name], allowed)
    for name in ("dropout", "norm_eps", "beta_start", "beta_end"):
        _require(_is_number(config[name]), name, config[name], "a number")
    size, width = config.sample_size, config.time_proj_dim
    dims, names = (
        config.dims,
        {1: "an integer", 2: "one or two integers", 3: "one or three integers"},
    )
    _require(_is_integer(dims, 3, 1), "dims", dims, "1, 2 or 3")
    sizes = size if isinstance(size, (list, tuple)) else (size,) * dims
    fits = len(sizes) == dims and all(_is_integer(n, MAX_WIDTH) for n in sizes)
    _require(fits, "sample_size", size, f"{names[dims]} up to {MAX_WIDTH} for dims={dims}")
    _require(width is None or _is_integer(width, MAX_WIDTH), "time_proj_dim", width, "an integer")
    for name, kind in (("block_out_channels", Integral), ("down_block_types", str)):
        values = config[name]
        fits = isinstance(values, (list, tuple)) and 0 < len(values) <= MAX_LEVELS
        fits = fits and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
        _require(fits, name, values, f"a list of 1 to {MAX_LEVELS} {kind.__name__.lower()} values")
    widest = max(config.block_out_channels)
    _require(widest <= MAX_WIDTH, "block_out_channels", widest, f"widths up to {MAX_WIDTH}")
    dims = config.attention_head_dim
    dims = [*dims, 0] if isinstance(dims, (list, tuple)) else [dims]
    fits = dims == [None] or all(_is_integer(dim, MAX_WIDTH) for dim in dims)
    allowed = "an integer, or one per level, or None"
    _require(fits, "attention_head_dim", config.attention_head_dim, allowed)
    names = ("pool", "problem_type", "beta_schedule", "downsample_type", "resnet_time_scale_shift")
    for name in names:
        _require(isinstance(config[name], str), name, config[name], "a string")
    betas = config.trained_betas
    fits = isinstance(betas, (list, tuple)) and all(map(_is_number, betas))
    _require(betas is None or fits, "trained_betas", betas, "None or a list of numbers")
    for name in ("data_mean", "data_std"):
        values = config[name] if isinstance(config[name], (list, tuple)) else [config[name]]
        fits = (
            values == [None]
            or (len(values) in (1, config.in_channels))
            and all(_is_number(value) and (name == "data_mean" or value > 0) for value in values)
        )
        fits = fits and (config.data_mean is None) == (config.data_std is None)
        _require(fits, name, config[name], "None, or numbers, one or one a channel, with the other")
    for name in ("id2label", "label2id"):
        fits = isinstance(config[name], (Mapping, type(None)))
        _require(fits, name, config[name], "a mapping, or None")


def _check_architecture(config: Any, size: tuple[int, ...], head_dims: list[int]) -> None:
    """Refuse values that the blocks would misread, or reject later with an unrelated message."""
    channels, types, pool = (
        tuple(config.block_out_channels),
        tuple(config.down_block_types),
        config.pool,
    )
    levels = len(channels)
    for name in ("in_channels", "num_labels", "layers_per_block", "patch_size"):
        _require(config[name] >= 1, name, config[name], "a positive integer")
    _require(
        levels >= 1 and min(channels) >= 1,
        "block_out_channels",
        channels,
        "positive widths, one per level",
    )
    for name, choices in (
        ("downsample_type", tuple(DOWN_BLOCK_TYPES)),
        ("resnet_time_scale_shift", ("default", "scale_shift")),
        ("pool", POOLS),
        ("problem_type", PROBLEM_TYPES),
    ):
        _require(config[name] in choices, name, config[name], f"one of {choices}")
    known = DOWN_BLOCK_TYPES[config.downsample_type]
    allowed = (
        f"{levels} of {known} (levels in block_out_channels) with "
        f"downsample_type={config.downsample_type!r}"
    )
    _require(len(types) == levels and set(types) <= set(known), "down_block_types", types, allowed)
    _require(0 <= config.dropout < 1, "dropout", config.dropout, "0 (off) up to, not including, 1")
    _require(config.norm_eps > 0, "norm_eps", config.norm_eps, "a positive number")
    normed, groups = (
        (*channels, SPATIAL_WIDTH) if pool == "spatial_v2" else channels,
        config.norm_num_groups,
    )
    allowed = f"a positive divisor of each of the widths {normed}"
    _require(
        groups >= 1 and not any(c % groups for c in normed), "norm_num_groups", groups, allowed
    )
    attended = [level for level in range(levels) if "Attn" in types[level] or level == levels - 1]
    fits = len(head_dims) == levels and all(
        head_dims[level] >= 1 and channels[level] % head_dims[level] == 0 for level in attended
    )
    widths = [channels[level] for level in attended]
    allowed = f"a divisor of the widths {widths} with attention, or one per level, or None"
    _require(fits, "attention_head_dim", config.attention_head_dim, allowed)
    width = config.time_proj_dim
    allowed = "None or a positive even number"
    _require(width is None or (width >= 2 and width % 2 == 0), "time_proj_dim", width, allowed)
    step = config.patch_size * 2 ** (levels - 1) if pool == "attention" else 1
    smallest = _smallest_size(config)
    allowed = f"positive multiples of {step} for {levels} levels and pool={pool!r}"
    allowed += f", at least {smallest}" if smallest > step else ""
    _require(
        all(n >= smallest and n % step == 0 for n in size),
        "sample_size",
        config.sample_size,
        allowed,
    )


def _smallest_size(config: Any) -> int:
    """Smallest size of which the last level has a place left."""
    halves = len(config.block_out_channels) - 1
    last = 2**halves if config.downsample_type == "resnet" else 1  # a convolution rounds up
    return config.patch_size * (last - 1) + 1


def _check_schedule(config: Any) -> None:
    steps, betas, name = config.num_train_timesteps, config.trained_betas, config.beta_schedule
    _require(steps >= 1, "num_train_timesteps", steps, "a positive integer")
    _require(name in BETA_SCHEDULES, "beta_schedule", name, f"one of {BETA_SCHEDULES}")
    start, end = config.beta_start, config.beta_end
    _require(
        0 < start <= end < 1,
        "(beta_start, beta_end)",
        (start, end),
        "0 < beta_start <= beta_end < 1",
    )
    if betas is not None:
        allowed = f"None or num_train_timesteps = {steps} values above 0 and up to 1"
        _require(
            len(betas) == steps and all(0 < beta <= 1 for beta in betas),
            "trained_betas",
            betas,
            allowed,
        )


def _check_power_range(config: Any) -> None:
    powers = config.power_range
    if powers is None:
        return
    fits = isinstance(powers, (list, tuple)) and len(powers) == 2 and all(map(_is_number, powers))
    fits = fits and powers[0] == 1 and 1 < powers[1] <= MAX_POWER
    allowed = f"None or (1, a number above 1 and up to {MAX_POWER})"
    _require(fits, "power_range", powers, allowed)
    kind = config.problem_type
    _require(kind == PROBLEM_TYPES[0], "problem_type", kind, f"{PROBLEM_TYPES[0]} with power_range")


def _label_id(value: Any) -> int:
    """An id of a label, which JSON makes a string."""
    is_id = isinstance(value, (int, str)) and str(value).isdecimal()
    _require(is_id, "an id of id2label or label2id", value, "an integer from 0")
    return int(value)


def _matched_labels(
    num_labels: int, id2label: Mapping[int | str, str] | None, label2id: Mapping[str, int] | None
) -> tuple[dict[int, str] | None, dict[str, int] | None]:
    """Both directions of the class names, ids as integers in rising order (JSON makes them
    strings)."""
    if id2label is None and label2id is None:
        return None, None
    if id2label is None:
        id2label = {_label_id(i): name for name, i in label2id.items()}
        _require(len(id2label) == len(label2id), "label2id", label2id, "one name an id")
    else:
        id2label = {_label_id(i): name for i, name in id2label.items()}
    allowed = f"the ids 0 to {num_labels - 1} of num_labels = {num_labels}"
    _require(
        len(id2label) == num_labels and sorted(id2label) == list(range(num_labels)),
        "ids of id2label or label2id",
        sorted(id2label),
        allowed,
    )
    id2label = dict(sorted(id2label.items()))
    count = Counter(id2label.values())
    unique = {name: i for i, name in id2label.items() if count[name] == 1}
    if label2id is None:
        return id2label, unique
    label2id = {name: _label_id(i) for name, i in label2id.items()}
    fits = (
        all(id2label.get(i) == name for name, i in label2id.items())
        and unique.keys() <= label2id.keys()
    )
    _require(fits, "label2id", label2id, f"the inverse of id2label = {id2label}")
    return id2label, dict(sorted(label2id.items(), key=lambda item: item[1]))

"""`ClassifierGuidedPipeline`: images of a label from any network, scheduler and noise-aware classifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.utils.logging import get_logger
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from . import bundled, repository
from .classifier import NoiseAwareClassifier
from .conditions import Conditioned, further_terms
from .guidance import FiniteCheck, Guidance, Label, StepContext, no_parameter_grad, total_score
from .images import check_precision, convert, decode, join_low_resolution, low_resolution
from .noise import (
    NoiseLevel,
    clipping_warning,
    has_posterior_variance,
    module_config,
    noise_levels,
    posterior_variance,
    prediction_type,
    reads_variance,
    sampling_timesteps,
    split_variance,
    starting_sigma,
    stepper,
)
from .splitting import GuidanceReuse, OperatorSplitting

logger = get_logger(__name__)
DEFAULTS = {
    "guidance_scale": 1.0,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "classifier_free_scale": 0.0,
    "num_inference_steps": 50,
    "guidance_algorithm": "output",
    "guidance_every": 1,
    "guidance_tolerance": None,
}
ALGORITHMS = ("output", "mean", "lie_trotter", "strang")


@dataclass
class GuidedImageOutput(ImagePipelineOutput):
    """`images`, and how many times an image's terms were asked what to add to the score, in the mean."""

    guidance_evaluations: float = 0.0


class ClassifierGuidedPipeline(Conditioned, DiffusionPipeline):
    """Generate images of a label by guiding a diffusion network with a noise-aware classifier.

    Args:
        unet: the network, `UNet2DModel` or anything called like it: (sample, timestep[, class_labels]) -> `.sample`. It
            predicts what the scheduler's `prediction_type` says.
        scheduler: any Diffusers scheduler of continuous samples.
        classifier: `NoiseAwareClassifier`, or any module (sample, timestep) -> `.logits` whose `config` has its noise
            schedule; None: the network alone.
        vae: the autoencoder of a latent model, `AutoencoderKL` or alike, with its scaling in its config: network and
            classifier then work on its latents. None: they work on pixels.
        id2label: names of the labels, where there is no classifier that has them.
        defaults: what arguments of a call are without them; they are saved with the pipeline. By default
            guidance_scale=1.0, guidance_start=0.0, guidance_stop=1.0, classifier_free_scale=0.0,
            num_inference_steps=50, guidance_algorithm="output", guidance_every=1 and guidance_tolerance=None; None
            instead of a value is that default.

    Raises:
        ValueError: for other names in `defaults`.
    """

    model_cpu_offload_seq = (
        "unet->vae"  # the classifier stays beside the unet: they take turns at every step
    )
    _optional_components = ["classifier", "vae"]
    _callback_tensor_inputs = ["latents", "model_output", "score_shift", "sample", "x0"]

    # `from_pipe` hands over only models of the classes named here
    def __init__(
        self,
        unet: UNet2DModel | torch.nn.Module,
        scheduler: SchedulerMixin,
        classifier: NoiseAwareClassifier | torch.nn.Module | None = None,
        vae: AutoencoderKL | torch.nn.Module | None = None,
        id2label: dict | None = None,
        defaults: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier, vae=vae)
        names = module_config(classifier).get("id2label") or id2label or {}
        if unknown := (defaults or {}).keys() - DEFAULTS.keys():
            raise ValueError(
                f"defaults: {sorted(unknown)} are unknown; allowed: {sorted(DEFAULTS)}"
            )
        own = {name: value for name, value in (defaults or {}).items() if value is not None}
        self.register_to_config(
            id2label={int(i): name for i, name in names.items()} or None, defaults=DEFAULTS | own
        )

    @classmethod
    def from_bundled(cls, name: str = "fashion-mnist", **kwargs: Any) -> ClassifierGuidedPipeline:
        """A small trained pipeline that is part of this package; `kwargs` go to `from_pretrained`.

        Raises:
            ValueError: for a name that is not bundled.
        """
        return cls.from_pretrained(bundled.folder(name), **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> ClassifierGuidedPipeline:
        """As any Diffusers pipeline, from a folder or the Hub, with this package's code and safetensors only.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id; also one of a network alone, as google/ddpm-cat-256.
            subfolder: where in it the pipeline is. None: at its root.
            kwargs: `revision`, `variant`, `dtype`, `token`, `local_files_only`, ..., and components to use instead of
                the saved ones, as `classifier=...`. Code in the repository runs only with `trust_remote_code=True`.

        Raises:
            ValueError: for weights that aren't safetensors, or a model_index.json with classes that are no models, or
                with code of its own.
            OSError: for a file that is missing or broken; the message names it.
        """
        return repository.load(
            cls, super().from_pretrained, pretrained_model_name_or_path, subfolder, **kwargs
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As any Diffusers pipeline, in safetensors, with the code that loads it where guided-diffusers is missing.

        Raises:
            ValueError: for `safe_serialization=False`.
        """
        repository.save(
            self,
            super().save_pretrained,
            Path(save_directory),
            safe_serialization,
            push_to_hub,
            variant,
            max_shard_size,
            **kwargs,
        )

    def save_code(self, folder: Path) -> None:
        """Write `code` into the folder of the pipeline, whose configs then name it and no path of this machine."""
        repository.save_code(self, folder)

    def code(self) -> dict[str, str]:
        """The files, {path: text}, that load the pipeline where guided-diffusers isn't installed."""
        return repository.code(self)

    @property
    def device(self) -> torch.device:
        """Where the network is; it and the classifier may be plain modules, without Diffusers' own attribute."""
        return next((p.device for p in self.unet.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in, and so the samples'."""
        return get_parameter_dtype(self.unet) or torch.float32

    @torch.inference_mode(False)  # within it, a term couldn't differentiate through the network
    @torch.no_grad()
    def __call__(
        self,
        label: Label | Sequence[Label] | torch.Tensor | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float | Sequence[float] | torch.Tensor | None = None,
        guidance_start: float | None = None,
        guidance_stop: float | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        conditional: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_algorithm: Literal["output", "mean", "lie_trotter", "strang"] | None = None,
        clip_x0: bool = False,
        guidance: Guidance | Sequence[Guidance] | None = None,
        image: Image.Image | Sequence[Image.Image] | torch.Tensor | None = None,
        classifier_free_scale: float | Sequence[float] | torch.Tensor | None = None,
        guidance_every: int | None = None,
        guidance_tolerance: float | None = None,
    ) -> GuidedImageOutput | tuple[Any]:
        """Generate images.

        Args:
            label: an id, a name, a mapping {id or name: weight}, a list of such, or a tensor of ids. None: no label.
            num_images_per_label: consecutive images of each label.
            guidance_scale: how strongly the classifier steers; a number, or one a label or an image. 0: off; 1: exact
                if the classifier is; more: sharper and less varied. None: the pipeline's own (`config.defaults`).
            guidance_start, guidance_stop: between which fractions of the run, in [0, 1]. None: the pipeline's own.
            num_inference_steps: scheduler steps. None: the pipeline's own, 50 unless it was made with another.
            timesteps, sigmas: the scheduler's own, instead of `num_inference_steps`, where it takes them.
            eta: the noise of DDIM-like schedulers, 0 (none) to 1 (as DDPM).
            conditional: whether a class-conditional network gets the label, too. None: if it has class embeddings and
                the label is a single one; mixtures are left to the classifier. False: it gets its null label (id
                `num_labels`), as it did for dropped labels in training.
            generator: one, or one an image; with the latter an image is the same in any batch.
            latents: the starting noise (B, C, H, W) of unit variance; drawn from `generator` by default.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent": the sample as it is.
            return_dict: `GuidedImageOutput` with `.images` and `.guidance_evaluations`, else a tuple (images,).
            callback_on_step_end: called as (pipeline, index, timestep, tensors) after each step; returns a dictionary,
                in which "latents" are those to go on with.
            callback_on_step_end_tensor_inputs: which of "latents", "model_output" (what the scheduler got),
                "score_shift" (what guidance adds to the score), "sample" (before the step) and "x0" (predicted there).
            guidance_algorithm: "output" corrects the network's output (Algorithm 2 of Dhariwal & Nichol 2021, for every
                scheduler); "mean" shifts the mean of a DDPM step by variance * gradient (Algorithm 1); with
                "lie_trotter" and "strang" it is a part beside the scheduler's step, which knows nothing of it
                (`OperatorSplitting`). None: the pipeline's own; "mean" only where the scheduler has a DDPM step, else "output".
            clip_x0: clip the x0 that the network predicts to [-1, 1] before guidance moves it, whatever the scheduler
                (Dhariwal & Nichol in DDIM). A scheduler with `clip_sample=True` clips what guidance made of it.
            guidance: a further term that is added to the classifier's, or several.
            image: for an up-sampling network (its input has twice the sample's channels) the low-resolution images,
                one or one an image: PIL, or (B, C, h, w) in [-1, 1].
            classifier_free_scale: how strongly a class-conditional network with a null label steers to the label by
                itself (`ClassifierFreeGuidance`, which has more options); a number, or one a label or an image. 0: off;
                Diffusers' `guidance_scale` is 1 + this. None: the pipeline's own, where the network is told a label.
            guidance_every: ask the terms at every k-th step that they act at, and extrapolate between (`GuidanceReuse`). 1:
                at each. None: the pipeline's own.
            guidance_tolerance: instead, ask an image's classifier again where its gradient has turned so far that the
                image would be off by more, in the units of x0 (0.05 is 2.5% of [-1, 1]); at each step while a term
                acts that asks another network. None: the pipeline's own, unless `guidance_every` is given.

        Raises:
            ValueError: for any other argument, or a scheduler that can't be guided.
            FloatingPointError: if the guidance becomes infinite or NaN.
        """
        # 1. What is asked for
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if guidance_algorithm is None:
            own = self.config.defaults["guidance_algorithm"]
            guidance_algorithm = (
                own if own != "mean" or has_posterior_variance(self.scheduler) else "output"
            )
        guidance_start, guidance_stop = (
            self.config.defaults[name] if value is None else value
            for name, value in (
                ("guidance_start", guidance_start),
                ("guidance_stop", guidance_stop),
            )
        )
        self._check(
            num_images_per_label,
            output_type,
            guidance_algorithm,
            guidance_start,
            guidance_stop,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        labels = self._labels(label, num_images_per_label)
        low_res = None
        if image is not None:
            low_res = low_resolution(image, self.unet.config.in_channels).to(device, self.dtype)
        given = next((tensor for tensor in (latents, low_res) if tensor is not None), None)
        alone = given is None or num_images_per_label > 1
        batch_size = len(labels) or (num_images_per_label if alone else len(given))
        class_labels = self._class_labels(labels, batch_size, conditional, device)
        terms = self._terms(
            labels,
            num_images_per_label,
            guidance_scale,
            classifier_free_scale,
            guidance_start,
            guidance_stop,
            class_labels,
        )
        if guidance is not None:
            terms += further_terms(guidance, class_labels, self._class_embeddings)

        if terms and (warning := clipping_warning(self.scheduler)):
            logger.warning(warning)

        # 2. Noise levels, known before the first step
        self._set_timesteps(num_inference_steps, timesteps, sigmas, device)
        schedule, levels = sampling_timesteps(self.scheduler), noise_levels(self.scheduler)
        numbers, count = schedule.tolist(), len(levels)
        if low_res is not None and len(low_res) not in (1, batch_size):
            raise ValueError(
                f"image holds {len(low_res)} images; one, or one for each of the {batch_size}, is allowed"
            )
        latents = self._starting_noise(batch_size, generator, latents, low_res, device)
        if output_type == "pil" and self.vae is None and latents.shape[1] not in (1, 3, 4):
            raise ValueError(
                f"output_type='pil': samples of {latents.shape[1]} channels are no pictures; an "
                "up-sampling network needs image, others allow 'np', 'pt' and 'latent'"
            )
        scheduler_step = stepper(self.scheduler, generator, eta, batch_size)
        splitting, sparing, asked = None, None, 0
        if terms and guidance_algorithm not in ("output", "mean"):
            splitting = OperatorSplitting(guidance_algorithm, self.scheduler, levels, eta)
        every, tolerance = 1 if guidance_every is None else guidance_every, guidance_tolerance
        if guidance_every is None and guidance_tolerance is None:
            every, tolerance = (
                self.config.defaults[name] for name in ("guidance_every", "guidance_tolerance")
            )
        if every != 1 or tolerance is not None:
            sparing = GuidanceReuse(levels, every, tolerance)
        networks = [module for term in terms for module in term.modules()]
        check = FiniteCheck(
            next((p.dtype for module in networks for p in module.parameters()), latents.dtype)
        )
        components = [module for module in (self.unet, self.vae, *networks) if module is not None]

        with no_parameter_grad(components), self.progress_bar(total=count) as bar:
            for index, (t, level) in enumerate(zip(schedule, levels, strict=True)):
                # 3. What the network says: for the label and for what else the terms need to know, in one call
                active = [term for term in terms if term.active(index, count, level)]
                if splitting is not None and not splitting.asks(index):
                    active = []
                acting, rows = active, None
                if sparing is not None and active:
                    rows = sparing.rows(index, batch_size, active)
                    acting = active if rows is None or len(rows) else []
                told = [
                    class_labels,
                    *(
                        condition.get("class_labels", class_labels)
                        for term in acting
                        for condition in term.conditions
                    ),
                ]
                wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
                through = any(term.through_network for term in acting)
                x = (
                    wide.detach().requires_grad_() if through else latents
                )  # then the call's graph is kept
                with torch.set_grad_enabled(through):
                    output, variance, *others = self._predict(x.to(self.dtype), t, told, low_res)
                    if clip_x0:
                        output, *others = (
                            level.clipped(x, prediction) for prediction in (output, *others)
                        )
                    graph = (x, level.x0(x, output)) if through else None
                output, *others = (prediction.detach() for prediction in (output, *others))
                variance = None if variance is None else variance.detach()
                score_shift, mean_shift, unguided = None, None, output

                # 4. What guidance adds to the score
                if active:
                    predict = partial(self._predict_x0, t, level, class_labels, low_res, clip_x0)
                    step = StepContext(
                        wide,
                        level.x0(wide, output),
                        predict,
                        level,
                        index,
                        count,
                        numbers[index],
                        tuple(level.x0(wide, other) for other in others),
                        self._decode,
                        graph,
                    )
                    asked += batch_size if rows is None else len(rows)
                    score_shift = (
                        total_score(acting, step)
                        if rows is None
                        else sparing.score(acting, step, rows)
                    )
                    if guidance_algorithm == "output":
                        output = level.corrected(output, score_shift)
                    elif guidance_algorithm == "mean":
                        mean_shift = score_shift * posterior_variance(
                            self.scheduler, numbers, index, variance
                        )
                    check(step, score_shift, output if mean_shift is None else mean_shift)
                    del step, graph  # the network's activations

                # 5. The scheduler's step, which doesn't know
                output, own = (
                    (output, latents)
                    if splitting is None
                    else splitting.unguided(index, output, wide, score_shift)
                )
                if variance is not None and reads_variance(self.scheduler):
                    output = torch.cat([output, variance], dim=1)
                latents = scheduler_step(output, index, own.to(latents.dtype))
                latents = latents if splitting is None else splitting.guided(index, latents)
                if mean_shift is not None:
                    latents = latents + mean_shift.to(latents.dtype)

                if callback_on_step_end is not None:
                    values = {
                        "latents": latents,
                        "model_output": output,
                        "score_shift": score_shift,
                        "sample": wide,
                    }
                    if "x0" in callback_on_step_end_tensor_inputs:
                        values["x0"] = level.x0(wide, unguided)
                    wanted = {name: values[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, index, t, wanted) or {}).get(
                        "latents", latents
                    )
                bar.update()
        check.finish()

        # 6. Images
        images = latents
        if output_type != "latent":
            images = convert(self._decode(latents), output_type)
        self.maybe_free_model_hooks()
        return GuidedImageOutput(images, asked / batch_size) if return_dict else (images,)

    def _check(
        self,
        num_images_per_label: int,
        output_type: str,
        guidance_algorithm: str,
        start: float,
        stop: float,
        tensor_inputs: Sequence[str],
    ) -> None:
        """Refuse what needs no computation to be seen wrong."""
        prediction_type(self.scheduler)
        if (
            self.vae is not None and output_type != "latent"
        ):  # not in the end, when the latents are made
            check_precision(self.vae)
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label={num_images_per_label}: at least 1 is allowed")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(
                f"output_type={output_type!r}: 'pil', 'np', 'pt' and 'latent' are allowed"
            )
        if guidance_algorithm not in ALGORITHMS:
            raise ValueError(
                f"guidance_algorithm={guidance_algorithm!r}: one of {', '.join(ALGORITHMS)} is allowed"
            )
        if guidance_algorithm == "mean" and not has_posterior_variance(self.scheduler):
            raise ValueError(
                "guidance_algorithm='mean' shifts the mean of a DDPM step; with "
                f"{type(self.scheduler).__name__} the others are allowed"
            )
        if not 0 <= start <= stop <= 1:
            raise ValueError(
                f"guidance_start={start!r}, guidance_stop={stop!r}: 0 <= start <= stop <= 1 is allowed"
            )
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: {sorted(unknown)} not among "
                f"{self._callback_tensor_inputs}"
            )

    def _set_timesteps(
        self, steps: int | None, timesteps: Any, sigmas: Any, device: torch.device
    ) -> None:
        if timesteps is not None and sigmas is not None:
            raise ValueError("timesteps and sigmas: only one is allowed")
        steps = self.config.defaults["num_inference_steps"] if steps is None else steps
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps}: at least 1 is allowed")
        choices = {"timesteps": timesteps, "sigmas": sigmas, "num_inference_steps": steps}
        name, value = next((name, value) for name, value in choices.items() if value is not None)
        if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(f"{name}: {type(self.scheduler).__name__} takes none of one's own")
        try:
            self.scheduler.set_timesteps(**{name: np.asarray(value).tolist()}, device=device)
        except (
            TypeError,
            AttributeError,
        ) as error:  # it wants something beside them, or something else
            raise ValueError(
                f"{name}={value}: {type(self.scheduler).__name__} can't take it: {error}"
            ) from error

    def _starting_noise(
        self,
        batch_size: int,
        generator: Any,
        latents: torch.Tensor | None,
        low_res: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Noise of the scheduler's largest standard deviation, (B, C, H, W), in the network's dtype."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)}; one, or one for each of the {batch_size} "
                "images, is allowed"
            )
        if latents is None:
            config = module_config(self.unet)
            if not config.get("sample_size") or not config.get("in_channels"):
                raise ValueError(
                    "latents is needed: the network's config has no sample_size and in_channels"
                )
            size, channels = config["sample_size"], config["in_channels"]
            height, width = (size, size) if isinstance(size, int) else size
            channels -= 0 if low_res is None else low_res.shape[1]
            shape = (batch_size, channels, height, width)
            latents = randn_tensor(shape, generator, device, self.dtype)
        elif latents.ndim != 4 or latents.shape[0] != batch_size:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; ({batch_size}, C, H, W) is allowed"
            )
        return latents.to(device, self.dtype) * starting_sigma(self.scheduler)

    def _predict(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        told: Sequence[torch.Tensor | None],
        low_res: torch.Tensor | None,
        network: torch.nn.Module | None = None,
    ) -> list[torch.Tensor | None]:
        """[output, learned variance or None, outputs for the further class labels ...] of one call of the network."""
        batch_size, channels = latents.shape[:2]
        scaled = latents
        if hasattr(
            self.scheduler, "scale_model_input"
        ):  # Euler and Heun for flow matching have none
            scaled = self.scheduler.scale_model_input(latents, t)
        if low_res is not None:
            scaled = join_low_resolution(scaled, low_res)
        if len(told) > 1:
            scaled = torch.cat([scaled] * len(told))
        kwargs = {}
        if told[0] is not None:
            kwargs["class_labels"] = torch.cat(
                [labels.to(latents.device).expand(batch_size) for labels in told]
            )
        t = t.expand(len(scaled)) if self._is_dit else t  # it takes no timestep without a dimension
        output = (network or self.unet)(scaled, t, **kwargs, return_dict=False)[0]
        prediction, variance = split_variance(output, channels)
        if variance is None and reads_variance(self.scheduler):
            raise ValueError(
                f"scheduler: variance_type={self.scheduler.config.variance_type!r} needs a network with a "
                f"learned variance, {2 * channels} channels; this one has {channels}. Use 'fixed_small'"
            )
        first, *others = prediction.split(batch_size)
        return [first, None if variance is None else variance[:batch_size], *others]

    def _predict_x0(
        self,
        t: torch.Tensor,
        level: NoiseLevel,
        class_labels: torch.Tensor | None,
        low_res: torch.Tensor | None,
        clip_x0: bool,
        sample: torch.Tensor,
        network: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """For terms that differentiate through the network."""
        output = self._predict(sample.to(self.dtype), t, [class_labels], low_res, network)[0]
        return level.x0(sample, level.clipped(sample, output) if clip_x0 else output)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1]."""
        return latents if self.vae is None else decode(self.vae, latents)

"""`ClassifierGuidedPipeline`: images of a label from any network, scheduler and noise-aware classifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor

from .guidance import ClassifierGuidance, FiniteCheck, Guidance, Label, Step, Sum, frozen, parse_labels
from .noise import (
    NoiseLevel,
    has_posterior_variance,
    noise_levels,
    posterior_variance,
    prediction_type,
    reads_variance,
    sampling_timesteps,
    split_variance,
    starting_sigma,
    wants_batched_timestep,
)


class ClassifierGuidedPipeline(DiffusionPipeline):
    """Generate images of a label by guiding a diffusion network with a noise-aware classifier.

    Args:
        unet: the network, `UNet2DModel` or anything called like it: (sample, timestep[, class_labels]) -> `.sample`. It
            predicts what the scheduler's `prediction_type` says.
        scheduler: any Diffusers scheduler of continuous samples.
        classifier: `NoiseAwareClassifier`, or any module (sample, timestep) -> `.logits` whose `config` has its noise
            schedule; None: the network alone.
        id2label: names of the labels, where there is no classifier that has them.
    """

    model_cpu_offload_seq = "unet->classifier"
    _optional_components = ["classifier"]
    _callback_tensor_inputs = ["latents", "model_output", "score_shift"]

    def __init__(self, unet: torch.nn.Module, scheduler: SchedulerMixin, classifier: torch.nn.Module | None = None,
                 id2label: dict[int, str] | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)
        names = id2label or getattr(getattr(classifier, "config", None), "id2label", None)
        self.register_to_config(id2label={int(i): name for i, name in names.items()} if names else None)

    @classmethod
    def from_bundled(cls, name: str = "fashion-mnist", **kwargs: Any) -> ClassifierGuidedPipeline:
        """A small trained pipeline that is part of this package; `kwargs` go to `from_pretrained`.

        Raises:
            ValueError: for a name that is not bundled.
        """
        folder = resources.files(__package__) / "bundled"
        known = sorted(entry.name for entry in folder.iterdir() if (entry / "model_index.json").is_file())
        if name not in known:
            raise ValueError(f"name {name!r} is not bundled; allowed: {known}")
        with resources.as_file(folder / name) as path:
            return cls.from_pretrained(path, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where the network is; it and the classifier may be plain modules, without Diffusers' own attribute."""
        return next((p.device for p in self.unet.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The network's, and so the samples'."""
        return next((p.dtype for p in self.unet.parameters()), torch.float32)

    @property
    def num_labels(self) -> int | None:
        """How many labels there are, as far as the classifier or the names tell."""
        count = getattr(getattr(self.classifier, "config", None), "num_labels", None)
        return count or (len(self.config.id2label) if self.config.id2label else None)

    @torch.no_grad()
    def __call__(
        self,
        label: Label | Sequence[Label] | torch.Tensor | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float | Sequence[float] | torch.Tensor = 1.0,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        num_inference_steps: int = 50,
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
        guidance_algorithm: Literal["output", "mean"] = "output",
        guidance: Guidance | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            label: an id, a name, a mapping {id or name: weight}, a list of such, or a tensor of ids. None: no label.
            num_images_per_label: consecutive images of each label.
            guidance_scale: how strongly the classifier steers; a number, or one a label or an image. 0: off, the
                classifier doesn't run; 1: exact, as far as the classifier is; more: sharper and less varied.
            guidance_start, guidance_stop: the fractions of the run between which the classifier steers, in [0, 1].
            num_inference_steps: scheduler steps.
            timesteps, sigmas: the scheduler's own, instead of `num_inference_steps`, where it takes them.
            eta: the noise of DDIM-like schedulers, 0 (none) to 1 (as DDPM).
            conditional: whether a class-conditional network gets the label, too. None: if it has class embeddings.
                False: it gets its null label (id `num_labels`), as it did for dropped labels in training.
            generator: one, or one an image; with the latter an image is the same in any batch.
            latents: the starting noise (B, C, H, W) of unit variance; drawn from `generator` by default.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent": the sample as it is.
            return_dict: `ImagePipelineOutput` with `.images`, else a tuple.
            callback_on_step_end: called as (pipeline, index, timestep, tensors) after each step; returns tensors to
                change.
            callback_on_step_end_tensor_inputs: which of "latents", "model_output" (guided), "score_shift" it gets.
            guidance_algorithm: "output" corrects the network's output (Algorithm 2 of Dhariwal & Nichol 2021, for every
                scheduler); "mean" shifts the mean of a DDPM step by variance * gradient (Algorithm 1).
            guidance: further terms that are added to the classifier's.

        Raises:
            ValueError: for any other argument, or a scheduler that can't be guided.
            FloatingPointError: if the guidance becomes infinite or NaN.
        """
        # 1. What is asked for
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check(num_images_per_label, output_type, guidance_algorithm, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        labels = self._labels(label, num_images_per_label)
        batch_size = len(labels) if labels else latents.shape[0] if latents is not None else num_images_per_label
        class_labels = self._class_labels(labels, batch_size, conditional, device)
        terms = self._terms(labels, num_images_per_label, guidance_scale, guidance_start, guidance_stop, guidance)

        # 2. Noise levels, known before the first step
        self._set_timesteps(num_inference_steps, timesteps, sigmas, device)
        schedule, levels = sampling_timesteps(self.scheduler), noise_levels(self.scheduler)
        numbers, count = schedule.tolist(), len(levels)
        latents = self._starting_noise(batch_size, generator, latents, device)
        scheduler_step = self._scheduler_step(schedule, generator, eta, batch_size)
        check = FiniteCheck(next((p.dtype for module in terms.modules() for p in module.parameters()), latents.dtype))

        with frozen([self.unet, *terms.modules()]), self.progress_bar(total=count) as bar:
            for index, (t, level) in enumerate(zip(schedule, levels, strict=True)):
                # 3. What the network says: for the label and for what else the terms need to know, in one call
                conditions = [class_labels, *terms.active_conditions(index, count)]
                output, variance, *others = self._predict(latents, t, conditions)
                score_shift = mean_shift = None

                # 4. What guidance adds to the score
                if terms.active(index, count):
                    wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
                    step = Step(wide, level.x0(wide, output), self._predict_x0(t, level, class_labels), level, index,
                                count, numbers[index], tuple(level.x0(wide, other) for other in others))
                    score_shift = terms.score(step)
                    check(score_shift, step)
                    if guidance_algorithm == "output":
                        output = level.corrected(output, score_shift)
                    else:
                        mean_shift = score_shift * posterior_variance(self.scheduler, numbers, index, variance)

                # 5. The scheduler's step, which doesn't know
                if variance is not None and reads_variance(self.scheduler):
                    output = torch.cat([output, variance], dim=1)
                latents = scheduler_step(output, index, latents)
                if mean_shift is not None:
                    latents = latents + mean_shift.to(latents.dtype)

                if callback_on_step_end is not None:
                    values = {"latents": latents, "model_output": output, "score_shift": score_shift}
                    wanted = {name: values[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, index, t, wanted) or {}).get("latents", latents)
                bar.update()
        check.finish()

        # 6. Images
        images = _images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, num_images_per_label: int, output_type: str, guidance_algorithm: str,
               tensor_inputs: Sequence[str]) -> None:
        """Refuse what needs no computation to be seen wrong."""
        prediction_type(self.scheduler)
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label={num_images_per_label}: at least 1 is allowed")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: 'pil', 'np', 'pt' and 'latent' are allowed")
        if guidance_algorithm not in ("output", "mean"):
            raise ValueError(f"guidance_algorithm={guidance_algorithm!r}: 'output' and 'mean' are allowed")
        if guidance_algorithm == "mean" and not has_posterior_variance(self.scheduler):
            raise ValueError("guidance_algorithm='mean' shifts the mean of a DDPM step; with "
                             f"{type(self.scheduler).__name__} only 'output' is allowed")
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs: {sorted(unknown)} not among "
                             f"{self._callback_tensor_inputs}")

    def _terms(self, labels: list[dict[int, float]], per_label: int, scale: Any, start: float, stop: float,
               more: Guidance | None) -> Sum:
        """All that guides: nothing at scale 0."""
        images = len(labels)
        scale = torch.as_tensor(scale, dtype=torch.float32)
        if scale.ndim == 1 and images and len(scale) * per_label == images:
            scale = scale.repeat_interleave(per_label)
        if scale.ndim > 1 or (scale.ndim == 1 and len(scale) != images):
            raise ValueError(f"guidance_scale has shape {tuple(scale.shape)}; a number, or one a label or an image "
                             f"({images // per_label} or {images}), is allowed")
        terms: tuple[Guidance, ...] = more.terms() if more is not None else ()
        if labels and scale.any():
            if self.classifier is None:
                raise ValueError(f"guidance_scale={scale.tolist()} needs a classifier, and the pipeline has none: pass "
                                 "classifier=... when loading it, or guidance_scale=0 to use the network alone")
            terms = (ClassifierGuidance(self.classifier, labels, scale, start, stop), *terms)
        return Sum(terms)

    def _labels(self, label: Any, per_label: int) -> list[dict[int, float]]:
        """One {id: weight} an image; empty without a label."""
        if label is None:
            return []
        labels = parse_labels(label, self.config.id2label, self.num_labels)
        return [one for one in labels for _ in range(per_label)]

    def _class_labels(self, labels: list[dict[int, float]], batch_size: int, conditional: bool | None,
                      device: torch.device) -> torch.Tensor | None:
        """What a class-conditional network is told, (B,); None for an unconditional one."""
        config = getattr(self.unet, "config", None)
        embeddings = getattr(config, "num_class_embeds", None)
        if embeddings is None:
            if conditional:
                raise ValueError("conditional=True needs a network with class embeddings; this one is unconditional")
            if labels and self.classifier is None:
                raise ValueError("label has no effect: the network is unconditional and there is no classifier")
            return None
        null = embeddings - 1 if self.num_labels == embeddings - 1 else None
        ids = []
        for one in labels or [{}] * batch_size:
            if conditional is not False and len(one) == 1 and list(one.values()) == [1.0]:
                ids.extend(one)
            elif conditional and one:
                raise ValueError(f"conditional=True: the network can't be told the mixture {one}; use None or False")
            elif null is None:
                raise ValueError(f"conditional={conditional}, label={one or None}: the network has no null label "
                                 f"({embeddings} class embeddings, {self.num_labels} known labels), so it needs one "
                                 "label an image")
            else:
                ids.append(null)
        return torch.tensor(ids, device=device)

    def _set_timesteps(self, steps: int, timesteps: Any, sigmas: Any, device: torch.device) -> None:
        if timesteps is not None and sigmas is not None:
            raise ValueError("timesteps and sigmas: only one is allowed")
        for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
            if values is None:
                continue
            if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{name}: {type(self.scheduler).__name__} takes none of one's own")
            return self.scheduler.set_timesteps(device=device, **{name: values})
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps}: at least 1 is allowed")
        self.scheduler.set_timesteps(steps, device=device)

    def _starting_noise(self, batch_size: int, generator: Any, latents: torch.Tensor | None,
                        device: torch.device) -> torch.Tensor:
        """Noise of the scheduler's largest standard deviation, (B, C, H, W), in the network's dtype."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator is a list of {len(generator)}; one, or one for each of the {batch_size} "
                             "images, is allowed")
        if latents is None:
            size = self.unet.config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
            latents = randn_tensor((batch_size, self.unet.config.in_channels, height, width), generator, device, self.dtype)
        elif latents.ndim != 4 or latents.shape[0] != batch_size:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; ({batch_size}, C, H, W) is allowed")
        return latents.to(device, self.dtype) * starting_sigma(self.scheduler)

    def _predict(self, latents: torch.Tensor, t: torch.Tensor, conditions: Sequence[torch.Tensor | None]) \
            -> list[torch.Tensor | None]:
        """[output, learned variance or None, outputs for the further conditions ...] of one call of the network."""
        batch_size, channels = latents.shape[:2]
        scaled = latents
        if hasattr(self.scheduler, "scale_model_input"):  # Euler and Heun for flow matching have none
            scaled = self.scheduler.scale_model_input(latents, t)
        if len(conditions) > 1:
            scaled = torch.cat([scaled] * len(conditions))
        kwargs = {}
        if conditions[0] is not None:
            kwargs["class_labels"] = torch.cat([labels.to(latents.device).expand(batch_size) for labels in conditions])
        output = self.unet(scaled, t, **kwargs, return_dict=False)[0]
        prediction, variance = split_variance(output, channels)
        if variance is None and reads_variance(self.scheduler):
            raise ValueError(f"scheduler: variance_type={self.scheduler.config.variance_type!r} needs a network with a "
                             f"learned variance, {2 * channels} channels; this one has {channels}. Use 'fixed_small'")
        first, *others = prediction.split(batch_size)
        return [first, None if variance is None else variance[:batch_size], *others]

    def _predict_x0(self, t: torch.Tensor, level: NoiseLevel, class_labels: torch.Tensor | None) \
            -> Callable[[torch.Tensor], torch.Tensor]:
        """The predicted x0 as a function of the sample, for terms that differentiate through the network."""
        return lambda sample: level.x0(sample, self._predict(sample.to(self.dtype), t, [class_labels])[0])

    def _scheduler_step(self, schedule: torch.Tensor, generator: Any, eta: float, batch_size: int) \
            -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
        """(output, index, sample) -> the next sample, with the arguments that this scheduler's `step` takes."""
        scheduler, takes = self.scheduler, inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in takes:
            raise ValueError(f"eta={eta}: {type(scheduler).__name__} has no such noise; only 0 is allowed")
        options = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in takes}
        if hasattr(scheduler, "noise_sampler_seed") and generator is not None:  # DPMSolverSDE draws for itself
            seeds = [g.initial_seed() for g in (generator if isinstance(generator, list) else [generator])]
            scheduler.noise_sampler, scheduler.noise_sampler_seed = None, seeds if len(seeds) > 1 else seeds[0]
        previous_x0 = None

        def step(output: torch.Tensor, index: int, sample: torch.Tensor) -> torch.Tensor:
            nonlocal previous_x0
            t, next_t = schedule[index], schedule[index + 1] if index + 1 < len(schedule) else None
            if "old_pred_original_sample" in takes:  # CogVideoX's DPM solver leaves its memory to the caller
                back = schedule[index - 1] if index else None
                sample, previous_x0 = scheduler.step(output, previous_x0, t, back, sample, **options, return_dict=False)
                return sample
            more = {"prev_timestep": next_t} if "prev_timestep" in takes else {}
            t = t.expand(batch_size) if wants_batched_timestep(scheduler) else t
            return scheduler.step(output, t, sample, **options, **more, return_dict=False)[0]

        return step


def _images(latents: torch.Tensor, output_type: str) -> Any:
    """Samples in [-1, 1] in the form asked for."""
    if output_type == "latent":
        return latents
    images = (latents.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    return array if output_type == "np" else DiffusionPipeline.numpy_to_pil(array)

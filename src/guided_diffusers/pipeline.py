"""`ClassifierGuidedPipeline`: images of a label from any network, scheduler and noise-aware
classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .arguments import (
    CallArguments,
    Condition,
    check_callback,
    check_generator,
    check_names,
    read_start,
    resolve_arguments,
)
from .checks import check_bool, check_number, noting, shown
from .classifier import NoiseAwareClassifier
from .edits import AnomalyOutput, EditOutput, anomalies, edited, inverted
from .families import check_training_schedule, training_schedule, training_warning
from .guidance import Guidance
from .guider import Guider, Prediction, exclusive_use
from .images import (
    check_data_scale,
    convert,
    decode,
    encode,
    in_data_units,
    join_low_resolution,
    to_network_units,
)
from .inversion import ProbabilityFlow
from .likelihood import REGRESSION, Labels
from .networks import (
    check_module,
    evaluating,
    naming_dtypes,
    network_output,
    no_parameter_grad,
)
from .noise import (
    NoiseLevel,
    begin_midway,
    check_scheduler,
    first_step,
    module_config,
    noise_levels,
    reads_variance,
    sampling_timesteps,
    scale_model_input,
    set_begin_index,
    split_variance,
    starting_sigma,
    step_fn,
)
from .presets import check_defaults, check_steps
from .repository import load_pipeline, pipeline_code, save_pipeline, save_pipeline_code
from .run_checks import (
    check_images,
    check_unchanged,
    check_unit_variance,
    logger,
    replaced_latents,
)
from .schedule_checks import (
    accuracy_warning,
    check_custom_steps,
    check_scheduler_config,
    check_start,
)
from .sizes import check_output, check_shapes, network_size
from .weights import check_values


@dataclass
class GuidedImageOutput(ImagePipelineOutput):
    """Result of a call.

    Attributes:
        images: as `output_type` says.
        guidance_evaluations: mean number of times that an image's guidance terms were evaluated.
        settings: the call's `mode` (see `resolve_settings`), and the values used of all arguments
            that have a default in `pipeline.config.defaults`.
        log_weights: of the K particles of each of P populations, (P, K), normalized: the logarithms
            of each row's weights, which add up to 1; all -log(K) with `resample`.
        log_evidence: (P,): an estimate of log p(y), for a classifier that gives p(y | x) and a
            network that doesn't get the label (conditional=False), of log E[p(y | x)^w] with a
            power, or of
            log E[exp(-scale E(x))] for an energy E, over the images x without guidance. Its
            exponential has no bias.
        effective_sample_size: 1 / (sum of the squared weights), (P,), from 1 to K, before
            `resample`.
        ancestors: (P, K): from 0 to K - 1, of which starting noise in its population each image is.

        Without `particles`, the last four are None.
    """

    guidance_evaluations: float = 0.0
    settings: dict[str, Any] | None = None
    log_weights: torch.Tensor | None = None
    log_evidence: torch.Tensor | None = None
    effective_sample_size: torch.Tensor | None = None
    ancestors: torch.Tensor | None = None


def _one_at_a_time(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of the pipeline that is refused while another one uses its scheduler, and in which the
    networks are in evaluation mode."""

    @wraps(call)
    def exclusive_call(self: ClassifierGuidedPipeline, *args: Any, **kwargs: Any) -> Any:
        used = naming_dtypes(unet=self.unet, vae=self.vae, classifier=self.classifier)
        with exclusive_use(self.scheduler), evaluating(self.unet, self.vae), used:
            return call(self, *args, **kwargs)

    return exclusive_call


class ClassifierGuidedPipeline(DiffusionPipeline):
    """Generate images of a label by guiding a diffusion network with a noise-aware classifier.

    Args:
        unet: the network, `UNet2DModel`, `UNet1DModel` or anything called like them: (sample,
            timestep[, class_labels]) -> `.sample`, a tuple or a tensor. The timestep is a tensor (),
            and (B,) for samples of another rank than images. It predicts what the scheduler's
            `prediction_type` says.
        scheduler: a Diffusers scheduler of continuous samples, except `noise.OUT_OF_REACH`.
        classifier: `NoiseAwareClassifier`, or any module (sample, timestep) -> `.logits` with the
            noise schedule of its training in its `config`; None: the network alone.
        vae: the autoencoder of a latent model, `AutoencoderKL` or similar, with its scaling in its
            config; network and classifier then work on its latents. None: they work on pixels.
        id2label: names of the labels, if there is no classifier that has them.
        defaults: values of the call's arguments that are left at `None`, saved with the pipeline.
            By default guidance_scale=1.0, guidance_power=None, guidance_schedule=None,
            guidance_start=0.0, guidance_stop=1.0, classifier_free_scale=0.0,
            num_inference_steps=50, guidance_algorithm="output", guidance_every=1 and
            guidance_tolerance=None; a value of None is that default. They are for the usual call: a
            network that can gets the label. For other calls, guidance_power, guidance_schedule,
            guidance_start, guidance_stop, guidance_every and guidance_tolerance are ignored, and
            defaults["modes"], {mode: {argument: value}}, is used: "classifier" where it alone
            steers (conditional=False, mixtures), "classifier_free" with classifier-free guidance,
            "upsampler" with image.
        training_schedule: of the network's training, `training_schedule(scheduler)` of its
            scheduler; calls with a scheduler that differs in it log a warning. None: `scheduler`'s.
        data_mean, data_std: the network was trained on (data - data_mean) / data_std; each a number,
            or one a channel. The output is then in the data's units. None: images, whose [-1, 1]
            becomes [0, 1], or samples of another rank, as they are.

    Raises:
        ValueError: for other names in `defaults`, a `data_mean` without `data_std` or beside a
            `vae`, or a network that has weights without values.
    """

    model_cpu_offload_seq = (
        "unet->vae"  # the classifier stays beside the unet: both run at every step
    )
    _optional_components = ["classifier", "vae"]
    _interrupt = False
    _guidance_scale = _num_timesteps = _particles = None  # before the first call
    _callback_tensor_inputs = ["latents", "model_output", "score_shift", "sample", "x0"]

    # `from_pipe` passes on only models of the classes in these annotations
    def __init__(
        self,
        unet: UNet2DModel | torch.nn.Module,
        scheduler: SchedulerMixin,
        classifier: NoiseAwareClassifier | torch.nn.Module | None = None,
        vae: AutoencoderKL | torch.nn.Module | None = None,
        id2label: dict | None = None,
        defaults: dict[str, Any] | None = None,
        training_schedule: dict[str, Any] | None = None,
        data_mean: float | list[float] | None = None,
        data_std: float | list[float] | None = None,
    ):
        super().__init__()
        for name, module in (("unet", unet), ("classifier", classifier), ("vae", vae)):
            if module is not None:
                check_module(name, module)
                check_values(name, module)
        if scheduler is not None:
            check_scheduler(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier, vae=vae)
        names = check_names(id2label)
        names = check_names(module_config(classifier).get("id2label")) or names
        self.register_to_config(id2label=names, defaults=check_defaults(defaults))
        trained = check_training_schedule(training_schedule, scheduler)
        self.register_to_config(training_schedule=trained)
        data_mean, data_std = check_data_scale(data_mean, data_std)
        if data_mean is not None and vae is not None:
            raise ValueError(
                f"data_mean={shown(data_mean)}: None is allowed with a vae, which has the scaling of "
                "its latents in its own config"
            )
        self.register_to_config(data_mean=data_mean, data_std=data_std)

    # ------------------------------------------------------------ loading and saving

    @classmethod
    def from_bundled(cls, name: str = "fashion-mnist", **kwargs: Any) -> ClassifierGuidedPipeline:
        """A small trained pipeline that is part of this package; `kwargs` go to `from_pretrained`.

        Raises:
            ValueError: for a name that is not bundled.
        """
        folder = import_module("guided_diffusers.bundled").folder(name)
        return cls.from_pretrained(folder, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> ClassifierGuidedPipeline:
        """Load a pipeline from a folder or the Hub, as in Diffusers, with this package's code and
        safetensors only.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id; also of a network alone, such as
                google/ddpm-cat-256.
            subfolder: the pipeline's folder within it. None: its root.
            kwargs: `revision`, `variant`, `dtype`, `token`, `local_files_only`, ..., and components
                that replace the saved ones, such as `classifier=...`. Code in the repository runs
                only with `trust_remote_code=True`.

        Raises:
            ValueError: for weights that aren't safetensors or not the component's, or a
                model_index.json with classes that are no models, or with code of its own.
            OSError: for a file that is missing or broken; the message names it.
        """
        load = super().from_pretrained
        return load_pipeline(cls, load, pretrained_model_name_or_path, subfolder, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> ClassifierGuidedPipeline:
        """A pipeline that shares another one's components, as in Diffusers; `kwargs` replace them.

        The network's `training_schedule` is that of `pipeline`, also if another scheduler replaces
        its own.
        """
        if "scheduler" in kwargs and "training_schedule" not in pipeline.config:
            kwargs.setdefault("training_schedule", training_schedule(pipeline.scheduler))
        return super().from_pipe(pipeline, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as in Diffusers, in safetensors, with the code that loads the pipeline without
        guided-diffusers.

        Weights in the folder that the new ones replace are removed when those are complete.

        Raises:
            ValueError: for `safe_serialization=False`, or, before anything is written, for a
                component that can't be saved, or wouldn't be loaded as it is.
            OSError: if the folder can't be written.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False: only True is allowed, weights are saved as safetensors"
            )
        options = {"variant": variant, "max_shard_size": max_shard_size}
        save_pipeline(self, super().save_pretrained, Path(save_directory), **options)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, variant=variant, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Publish with the arguments and checks of `guided_diffusers.hub.push_to_hub`.

        Where guided-diffusers isn't installed, this is Diffusers' method.
        """
        if __name__.partition(".")[0] != "guided_diffusers":
            return super().push_to_hub(*args, **kwargs)
        return import_module("guided_diffusers.hub").push_to_hub(self, *args, **kwargs)

    def save_code(self, folder: Path) -> None:
        """Write `code` into the pipeline's folder, whose configs then name it and no path of this
        machine."""
        save_pipeline_code(self, folder)

    def code(self) -> dict[str, str]:
        """The files, {path: text}, that load the pipeline where guided-diffusers isn't
        installed."""
        return pipeline_code(self)

    # ------------------------------------------------------------ properties

    @property
    def device(self) -> torch.device:
        """Device of the network, which may be a plain module, without Diffusers' own attribute."""
        return next((p.device for p in self.unet.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network, and so of the samples."""
        if next(self.unet.parameters(), None) is None:  # which Diffusers' function can't answer
            return torch.float32
        return get_parameter_dtype(self.unet)

    @property
    def num_labels(self) -> int | None:
        """Number of labels, by the classifier or the names; None if neither says."""
        config = module_config(self.classifier)
        if config.get("num_labels") and config.get("problem_type") != REGRESSION:
            return config["num_labels"]
        return len(self.config.id2label) if self.config.id2label else None

    @property
    def _is_dit(self) -> bool:
        return module_config(self.unet).get("norm_type") == "ada_norm_zero"

    @property
    def num_class_embeds(self) -> int | None:
        """Number of class embeddings of the network; None without. A DiT's config leaves out that
        of its null label."""
        config = module_config(self.unet)
        return config["num_embeds_ada_norm"] + 1 if self._is_dit else config.get("num_class_embeds")

    @property
    def null_label(self) -> int | None:
        """The network's null label, after the last label; None if it wasn't trained with one."""
        embeddings = self.num_class_embeds
        return embeddings - 1 if embeddings and self.num_labels == embeddings - 1 else None

    @property
    def guidance_scale(self) -> Any:
        """The classifier's scale in the current or last call: a number, or one per image."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int | None:
        """Number of the current or last call's steps."""
        return self._num_timesteps

    @property
    def particles(self) -> int | None:
        """Particles of each population in the current or last call; None: images without weights."""
        return self._particles

    @property
    def interrupt(self) -> bool:
        """Whether the current call ends after this step."""
        return self._interrupt

    # ------------------------------------------------------------ sampling

    @torch.inference_mode(False)  # inside it, a term couldn't differentiate through the network
    @torch.no_grad()
    @_one_at_a_time
    def __call__(
        self,
        label: Labels | None = None,
        num_images_per_label: int | None = None,
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
        height: int | None = None,
        width: int | None = None,
        guidance_power: float | None = None,
        guidance_schedule: Mapping[str, Sequence[float]] | None = None,
        particles: int | None = None,
        resample: bool = True,
        strength: float | None = None,
        sample_shape: Sequence[int] | None = None,
    ) -> GuidedImageOutput | tuple[Any]:
        """Generate images. Arguments left at `None` use `pipeline.config.defaults` where it has
        them.

        Args:
            label: an id, a name, a mapping {id or name: weight}, a list of such, or a tensor of
                ids. None: no label.
            num_images_per_label: consecutive images of each label; by default `particles`, or 1.
            guidance_scale: scale of the classifier's gradient; a number, or one per label or image.
                (In Diffusers this name is the scale of classifier-free guidance.) 0: off. 1: exact if
                the classifier is, and the network doesn't get the label. Larger: sharper images of
                lower diversity, but not of p(x) p(y | x)^scale (`guidance_power`). A
                class-conditional network that gets the label is sharpened by any scale above 0. The
                default is 0 without a classifier.
            guidance_start, guidance_stop: the fractions of the run, in [0, 1], between which the
                classifier guides.
            num_inference_steps: number of scheduler steps.
            timesteps, sigmas: custom ones instead of `num_inference_steps`, if the scheduler
                accepts them.
            eta: noise of DDIM-like schedulers, 0 (none) to 1 (as DDPM).
            conditional: whether a class-conditional network gets the label, too. None: if it has
                class embeddings and the label is a single one; mixtures are left to the classifier.
                False: it gets its null label (id `num_labels`), as for dropped labels in training.
            generator: one, or one per image; with the latter an image is the same in any batch.
            latents: the starting noise (B, C, H, W) of unit variance, or (B, C, ...) of any rank;
                drawn from `generator` by default. With `strength`: samples of that noise level, in
                the scheduler's own space, with which the run goes on.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent": the
                final sample. Of samples of another rank than images, or with a `data_std` in the
                pipeline's config: "np" or "pt", (B, C, ...) in the data's units, or "latent".
            return_dict: `GuidedImageOutput` with `.images`, `.guidance_evaluations` and
                `.settings`, else a tuple (images,).
            callback_on_step_end: called as (pipeline, index, timestep, tensors) after each step;
                returns a dictionary whose "latents", if any, replace the sample. As in Diffusers,
                it can read `pipeline.guidance_scale` and `pipeline.num_timesteps`, end the run by
                `pipeline._interrupt = True`, and set `pipeline._guidance_scale` for the next steps.
            callback_on_step_end_tensor_inputs: which of "latents", "model_output" (given to the
                scheduler), "score_shift" (what guidance adds to the score; None without
                guidance), "sample" (before the step) and "x0" (predicted for it, without guidance).
            guidance_algorithm: "output" corrects the network's output (Algorithm 2 of Dhariwal &
                Nichol 2021, for every scheduler); "mean" shifts the mean of a DDPM step by variance
                * gradient (Algorithm 1); "lie_trotter" and "strang" apply guidance beside the
                scheduler's step (`OperatorSplitting`). A default of "mean" is "output" with
                schedulers without a DDPM step.
            clip_x0: clip the x0 that the network predicts to [-1, 1] before guidance moves it, with
                any scheduler (Dhariwal & Nichol in DDIM). A scheduler with `clip_sample=True` clips
                the guided x0.
            guidance: one or more terms that are added to the classifier's.
            image: one, or one per image: PIL, or (B, C, H, W) in [-1, 1]. With `strength`: images to
                start from, also as an array (B, H, W, C) in [0, 1]; where the output is no pictures
                but arrays, (B, C, ...) in the data's units. Without: low-resolution images for an
                up-sampling network (its input has twice the sample's channels).
            classifier_free_scale: scale of `ClassifierFreeGuidance`, of a class-conditional network
                with a null label; a number, or one per label or image. 0: off. It is Diffusers'
                `guidance_scale` less 1: for 7.5 pass 6.5. The default applies only where the network
                gets a label.
            guidance_every: evaluate the terms at every k-th step at which they are active, and
                extrapolate between (`GuidanceReuse`). 1: at every step.
            guidance_tolerance: instead, evaluate an image's classifier only when the estimated
                extrapolation error exceeds this, in the units of x0 (0.05 is 2.5% of [-1, 1]); at
                every step while another kind of term is active. The default applies unless
                `guidance_every` is given.
            height, width: size of the images in pixels, if the networks allow others than their own
                (a UNet does; a classifier with `pool="attention"` doesn't).
            guidance_power: w, for images of p(x) p(y | x)^w at guidance_scale 1, within the
                `power_range` of the classifier's config (`ClassifierGuidance`); for labels, not
                mixtures. p(x) is the network's, so conditional=False if it knows labels. Of the
                defaults, num_inference_steps applies only. None: the gradient of log p(y | x_t),
                which is w = 1.
            guidance_schedule: {"sigmas": [...], "scales": [...]}: by what `guidance_scale` is
                multiplied at each noise level, linear in log sigma / alpha between these rising
                knots and constant outside them (`ScaleSchedule`); `guided-diffusers sweep --learn`
                fits one. Where an evaluation is reused (guidance_every, guidance_tolerance), it is
                reused with its scale, or extrapolated with it. None: by 1.
            particles: each so many consecutive images are a population: samples with weights, and
                resampled by them, of p(x) p(y | x), or p(x) exp(-scale E(x)) with an energy, where p
                is the scheduler's density without guidance (`Population`). That is exact for any
                `guidance_scale` as their number grows. It takes a scheduler with noise in each step,
                such as DDPM or DDIM with eta=1, and terms with a `log_factor`; guidance shifts the
                mean of that step (guidance_algorithm="mean"), and of the defaults,
                num_inference_steps applies only. None: off.
            resample: whether the images of a population are resampled to equal weights at the end;
                else they have `.log_weights`.
            strength: the fraction of the run that is made, its end, in [0, 1]: `image` gets noise of
                the level where that begins, as in Diffusers' img2img. 0 returns the image in float32,
                1 starts from the run's first level. Guidance intervals count from there.
            sample_shape: the shape of a sample, (C, ...) of any rank, where the network's config has
                no `in_channels` and `sample_size`, or takes others.

        Raises:
            ValueError: for any other argument, or a scheduler that can't be guided.
            RuntimeError: while another call, in another thread or around this one, uses the
                scheduler.
            FloatingPointError: if the guidance or an image becomes infinite or NaN; the attribute
                `images` has the indices of the images.
        """
        # 1. Arguments
        return_dict = check_bool("return_dict", return_dict)
        generator = check_generator(generator, particles)
        tensor_inputs = check_callback(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        call = {
            "guidance_scale": guidance_scale,
            "guidance_power": guidance_power,
            "guidance_schedule": guidance_schedule,
            "guidance_start": guidance_start,
            "guidance_stop": guidance_stop,
            "classifier_free_scale": classifier_free_scale,
            "num_inference_steps": num_inference_steps,
            "guidance_algorithm": guidance_algorithm,
            "guidance_every": guidance_every,
            "guidance_tolerance": guidance_tolerance,
            "guidance": guidance,
            "timesteps": timesteps,
            "sigmas": sigmas,
            "strength": strength,
        }
        call |= {"image": image, "particles": particles, "resample": resample}
        arguments = resolve_arguments(
            self,
            label,
            num_images_per_label,
            call,
            conditional=conditional,
            size=(height, width),
            sample_shape=sample_shape,
            latents=latents,
            clip_x0=clip_x0,
            output_type=output_type,
            tensor_inputs=tensor_inputs,
        )
        batch_size, condition, terms = arguments.batch_size, arguments.condition, arguments.terms

        # 2. The schedule, and the sample that it starts with
        settings = arguments.settings
        self._set_timesteps(settings, timesteps, sigmas, self._execution_device)
        self._interrupt, self._num_timesteps, self._particles = False, 0, arguments.particles
        self._guidance_scale = scale = settings["guidance_scale"]
        if arguments.strength == 0:
            images = self._without_steps(arguments, latents, output_type)
            return self._output(images, output_type, return_dict, settings=settings)
        first = self._begin(arguments.strength)
        from_noise = latents is None and strength is None
        latents = self._starting_sample(arguments, generator, latents, first)
        check_shapes(self, latents, arguments, output_type)
        scheduler_step = step_fn(self.scheduler, generator, eta, batch_size)
        population = arguments.population(self.scheduler, latents, generator, eta)
        options = {"eta": eta, "first": first, "from_noise": from_noise, "population": population}
        guider = Guider(self.scheduler, terms, **options, **arguments.guider_options)
        levels = guider.levels[first:]
        self._check_start(levels, None if from_noise else latents)
        schedule = [*enumerate(zip(sampling_timesteps(self.scheduler), guider.levels, strict=True))]
        guides = [m for term in terms for m in term.modules() if m is not self.unet]
        schedule_of_call = self.scheduler, self.scheduler.timesteps
        self._num_timesteps = len(levels)

        with evaluating(*guides), self.progress_bar(total=len(levels)) as bar:
            for index, (t, level) in schedule[first:]:
                # 3. The network's prediction, also under the conditions of the terms, in one call
                evaluated = guider.start_step(index, batch_size)
                with no_parameter_grad(self._networks_with_graph(evaluated)):
                    prediction = self._predict(latents, t, level, evaluated, condition)

                    # 4. Guidance, and the scheduler's step
                    output, x = guider.correct(latents, prediction)
                if prediction.variance is not None and reads_variance(self.scheduler):
                    output = torch.cat([output, prediction.variance], dim=1)
                latents = guider.finish_step(scheduler_step(output, index, x))

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "model_output": output}
                    tensors = _callback_tensors(tensor_inputs, guider, prediction, tensors)
                    before = None if population is None else latents.clone()
                    number = guider.timesteps[index]  # t would be read from the device
                    with noting(f"in callback_on_step_end at step {index} (timestep {number:g})"):
                        changed = callback_on_step_end(self, index - first, t, tensors)
                    check_unchanged(self.scheduler, *schedule_of_call)
                    latents = replaced_latents(changed, tensors, latents, before)
                    if self._guidance_scale is not scale:
                        scale = self._guidance_scale
                        guider.terms = arguments.terms_with_scale(scale)
                bar.update()
                if self._interrupt:
                    latents = guider.stop(latents)
                    break

        # 5. Images
        images = latents if output_type == "latent" else self._in_units(latents)
        results = {} if population is None else population.results()
        results |= {"guidance_evaluations": guider.evaluations / batch_size, "settings": settings}
        return self._output(images, output_type, return_dict, **results)

    def _output(
        self, images: torch.Tensor, output_type: str, return_dict: bool, **results: Any
    ) -> GuidedImageOutput | tuple[Any]:
        """What the call returns, of `_in_units` or latents, and its other results."""
        check_images(images, "in the output")
        output = images if output_type == "latent" else self._convert(images, output_type)
        self.maybe_free_model_hooks()
        return GuidedImageOutput(output, **results) if return_dict else (output,)

    # ------------------------------------------------------------ editing

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        strength: float = 1.0,
        label: Labels | None = None,
        num_inference_steps: int | None = None,
    ) -> torch.Tensor:
        """The noise that deterministic sampling maps to an image (see `inversion`).

        `pipeline(latents=noise, strength=strength, num_inference_steps=...)` decodes it, as exactly
        as the scheduler follows the probability flow; `edit` decodes between the same levels.

        Args:
            image: as in the call with `strength`.
            strength: up to which level: that at which this fraction of the scheduler's run is left,
                in (0, 1].
            label: what the network gets, one or one per image. None: its null label.
            num_inference_steps: of the run, each two evaluations of the network. None: the default
                in `pipeline.config.defaults`.

        Returns:
            The samples of that level, (B, C, ...), in the scheduler's own space.

        Raises:
            ValueError: for any other argument, or a network that can't be inverted.
        """
        strength = check_number("strength", strength, 0, 1, above=True)
        start = read_start(self, image)
        decoder, samples = inverted(self, start, strength, label, num_inference_steps)
        flow = decoder.scheduler
        return samples[0] * (flow.alpha / flow.levels[0].alpha)

    @torch.no_grad()
    def edit(
        self,
        image: Any,
        label: Labels | None = None,
        strength: float = 0.6,
        source_label: Labels | None = None,
        mask: Any = None,
        num_inference_steps: int | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] | None = None,
        **call: Any,
    ) -> EditOutput:
        """Change images to a label: invert them, and decode them guided.

        Args:
            image: as in the call with `strength`.
            label: the new label, in any form of the call's, one or one per image. None: no label.
            strength: the fraction of the run that is inverted and made again, in [0, 1]. 0: the
                images as they are, in float32. More changes more.
            source_label: the label that the network gets while it inverts, one or one per image.
                None: its null label.
            mask: where the images may change: PIL, in which white may, or numbers from 0 to 1, (H,
                W) or (B, H, W), of arrays (...) or (B, ...). Outside, the images, in float32, stay
                bit for bit. None: everywhere.
            num_inference_steps: as in `invert`, for both directions.
            output_type: as in the call. None: "pil", or for arrays of data "np".
            call: further arguments of the call, such as `guidance_scale`, `guidance`,
                `classifier_free_scale` and `guidance_tolerance`. The run is deterministic and has no
                `eta`, `generator`, `timesteps` or `sigmas`.

        Raises:
            ValueError, FloatingPointError: as the call and `invert`.
        """
        arguments = (label, strength, source_label, mask, num_inference_steps, output_type, call)
        return edited(self, image, *arguments)

    def anomaly(self, image: Any, label: Labels, **arguments: Any) -> AnomalyOutput:
        """Maps of what is unusual for a label, such as "healthy": where `edit` to it changes images.

        Args:
            image, label, arguments: as of `edit`, which returns them as `output_type="pt"`.

        Raises:
            ValueError, FloatingPointError: as `edit`.
        """
        return anomalies(self, image, label, **arguments)

    # ------------------------------------------------------------ schedule and noise

    def _set_timesteps(
        self, settings: dict[str, Any], timesteps: Any, sigmas: Any, device: torch.device
    ) -> None:
        """Set the scheduler's."""
        check_scheduler_config(self.scheduler)
        if timesteps is not None:
            name, value = "timesteps", check_custom_steps(self.scheduler, "timesteps", timesteps)
        elif sigmas is not None:
            name, value = "sigmas", check_custom_steps(self.scheduler, "sigmas", sigmas)
        else:
            name = "num_inference_steps"
            value = check_steps(self.scheduler, settings[name])
        scheduler = type(self.scheduler).__name__
        try:
            self.scheduler.set_timesteps(**{name: value}, device=device)
        except Exception as error:  # it needs something else, or more, or other config entries
            raise ValueError(
                f"{name}={shown(value)}: {scheduler} can't take it with its config: {error}"
            ) from error
        is_whole = not self.scheduler.timesteps.is_floating_point()
        if name == "timesteps" and is_whole and any(t != int(t) for t in value):
            raise ValueError(f"timesteps={value}: {scheduler} allows whole numbers")
        set_begin_index(
            self.scheduler, 0
        )  # else two equal first timesteps make some start at the second

    def _begin(self, strength: float | None) -> int:
        """Let the scheduler start with the step at which the fraction `strength` of the run is
        left; the step's index."""
        if strength is None:
            return 0
        count = len(sampling_timesteps(self.scheduler))
        return begin_midway(self.scheduler, first_step(self.scheduler, count, strength))

    def _starting_sample(
        self,
        arguments: CallArguments,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        first: int,
    ) -> torch.Tensor:
        """The sample that step `first` takes, (B, C, ...), in the network's dtype."""
        batch_size, low_res = arguments.batch_size, arguments.condition.low_res
        device = self._execution_device
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)}; one, or one for each of the "
                f"{batch_size} images, is allowed"
            )
        if arguments.start is not None:
            x0 = self._encode(arguments.start).expand(
                batch_size, *[-1] * (arguments.start.ndim - 1)
            )
            noise = randn_tensor(x0.shape, generator, device, self.dtype)
            level = noise_levels(copy(self.scheduler))[first]
            return (level.alpha * x0 + level.sigma * noise).to(self.dtype)
        if latents is None:
            channels = arguments.channels or module_config(self.unet).get("in_channels")
            if not channels:
                raise ValueError(
                    "sample_shape, or latents, is needed: the network's config has no in_channels"
                )
            if not arguments.channels:
                channels -= 0 if low_res is None else low_res.shape[1]
            shape = (batch_size, channels, *arguments.sample_size)
            latents = randn_tensor(shape, generator, device, self.dtype)
        elif latents.shape[0] != batch_size:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; ({batch_size}, C, H, W) is allowed"
            )
        elif not latents.isfinite().all():
            raise ValueError("latents has infinite or NaN values; finite ones are allowed")
        latents = latents.to(device, self.dtype)
        return (
            latents if arguments.strength is not None else latents * starting_sigma(self.scheduler)
        )

    def _without_steps(
        self, arguments: CallArguments, latents: torch.Tensor | None, output_type: str
    ) -> torch.Tensor:
        """The output of a run of strength 0: the start image, or the images of `latents`."""
        batch_size, start = arguments.batch_size, arguments.start
        check_output(self, latents if start is None else start, output_type)
        if start is None:
            latents = latents.to(self._execution_device, self.dtype)
            return latents if output_type == "latent" else self._in_units(latents)
        images = self._encode(start) if output_type == "latent" else start
        return images.expand(batch_size, *[-1] * (images.ndim - 1))

    def _check_start(self, levels: Sequence[NoiseLevel], given: torch.Tensor | None) -> None:
        """Check the noise levels of a run from drawn noise, or from `given` samples, and that the
        network was trained for them."""
        scheduler = self.scheduler
        if isinstance(scheduler, ProbabilityFlow):
            scheduler = scheduler.scheduler
        if warning := training_warning(scheduler, self.config.training_schedule):
            logger.warning(warning)
        if given is not None:
            check_unit_variance(given, levels[0])
            return
        check_start(self.scheduler, levels[0])
        if warning := accuracy_warning(self.scheduler, levels):
            logger.warning(warning)

    # ------------------------------------------------------------ the network

    def _networks_with_graph(self, terms: Sequence[Guidance]) -> list[torch.nn.Module]:
        """The networks, if a term goes through the network; else none."""
        keep_graph = any(term.through_network for term in terms)
        return [module for module in (self.unet, self.vae) if keep_graph and module is not None]

    def _predict(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        level: NoiseLevel,
        terms: Sequence[Guidance],
        condition: Condition,
    ) -> Prediction:
        """The network's prediction at a step, with its autograd graph if a term goes through the
        network."""
        class_labels = [condition.class_labels]
        for term in terms:
            for extra in term.conditions:
                class_labels.append(extra.get("class_labels", condition.class_labels))
        keep_graph = bool(self._networks_with_graph(terms))
        x = latents
        if keep_graph:
            x = latents.to(torch.promote_types(latents.dtype, torch.float32)).detach()
            x.requires_grad_()
        with torch.set_grad_enabled(keep_graph):
            outputs, variance = self._evaluate(x, t, level, class_labels, condition)
        output, *others = outputs
        single = [condition.class_labels]

        def predict(x: torch.Tensor, network: torch.nn.Module | None = None) -> torch.Tensor:
            return self._evaluate(x, t, level, single, condition, network)[0][0]

        return Prediction(
            output=output,
            condition_outputs=[other.detach() for other in others],
            predict=predict,
            decode=self._decode,
            modules=[module for module in (self.unet, self.vae) if module is not None],
            variance=None if variance is None else variance.detach(),
            graph_input=x if keep_graph else None,
        )

    def _evaluate(
        self,
        sample: torch.Tensor,
        t: torch.Tensor,
        level: NoiseLevel,
        class_labels: Sequence[torch.Tensor | None],
        condition: Condition,
        network: torch.nn.Module | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """One call of the network: its outputs for each of the class labels, and its learned
        variance for the first."""
        batch_size, channels = sample.shape[:2]
        x = scale_model_input(self.scheduler, sample.to(self.dtype), t)
        if condition.low_res is not None:
            x = join_low_resolution(x, condition.low_res)
        if len(class_labels) > 1:
            x = torch.cat([x] * len(class_labels))
        kwargs = {}
        if class_labels[0] is not None:
            rows = [labels.to(x.device, non_blocking=True) for labels in class_labels]
            rows = [labels.expand(batch_size) for labels in rows]
            kwargs["class_labels"] = torch.cat(rows)
        if self._is_dit or x.ndim != 4:  # a DiT takes no timestep without a dimension
            t = t.expand(len(x))
        output = network_output(network or self.unet, x, t, **kwargs)
        prediction, variance = split_variance(output, channels)
        if variance is None and network is None and reads_variance(self.scheduler):
            raise ValueError(
                f"scheduler: variance_type={self.scheduler.config.variance_type!r} needs a "
                f"network with a learned variance, {2 * channels} channels; this one has "
                f"{channels}. Use 'fixed_small'"
            )
        outputs = list(prediction.split(batch_size))
        if condition.clip_x0:
            outputs = [level.clipped(sample, output) for output in outputs]
        return outputs, None if variance is None else variance[:batch_size]

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1]."""
        return latents if self.vae is None else decode(self.vae, latents)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """The network's samples of images in [-1, 1], of which an autoencoder gives the mean of its
        latents, or of arrays in the data's units."""
        images = images.to(self._execution_device)
        if self.config.get("data_std") is not None:
            return to_network_units(images, self.config.data_mean, self.config.data_std)
        return images if self.vae is None else encode(self.vae, images)[0]

    def _in_units(self, samples: torch.Tensor) -> torch.Tensor:
        """What `_encode` takes, of final samples: images in [-1, 1], or arrays in the data's units."""
        if self.config.get("data_std") is not None:
            return in_data_units(samples, self.config.data_mean, self.config.data_std)
        return self._decode(samples)

    @property
    def has_arrays(self) -> bool:
        """Whether the samples are arrays of data, by the configs, rather than images."""
        is_image = self.vae is not None or len(network_size(self.unet)) == 2
        return self.config.get("data_std") is not None or not is_image

    def are_arrays(self, samples: Any) -> bool:
        """Whether samples, or what is given as such, are arrays of data, by the configs and their
        rank, rather than images in [-1, 1] or latents of such."""
        has_scale = self.config.get("data_std") is not None
        return has_scale or (self.vae is None and getattr(samples, "ndim", 4) != 4)

    def _convert(self, images: torch.Tensor, output_type: str) -> Any:
        """What the call returns, of `_in_units`."""
        if not self.are_arrays(images):
            return convert(images, output_type)
        return images.float() if output_type == "pt" else images.float().cpu().numpy()


def _callback_tensors(
    names: Sequence[str], guider: Guider, prediction: Prediction, tensors: dict[str, Any]
) -> dict[str, Any]:
    """What a callback gets: of `tensors` and of the step the tensors of these names; x0 is
    the network's, without guidance."""
    sample = guider.sample.to(torch.promote_types(guider.sample.dtype, torch.float32))
    tensors = {**tensors, "score_shift": guider.score_shift, "sample": sample}
    if "x0" in names:
        tensors["x0"] = guider.levels[guider.index].x0(sample, prediction.output)
    return {name: tensors[name] for name in names}

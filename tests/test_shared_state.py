"""Networks and schedulers that several calls share: threads, nested calls, and training mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from test_guidance import Pull, normal, quiet, sample, small_classifier, small_unet, step_at
from test_image_guidance import tiny_clip
from test_modular import call as modular_call
from test_modular import modular
from tiny_pipelines import SD, plain_unet, sd_call, stable_diffusion, vae

from guided_diffusers import (
    AutoGuidance,
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    CLIPGuidance,
    EnergyGuidance,
    ImageClassifierGuidance,
)
from guided_diffusers.attach import guide
from guided_diffusers.guider import exclusive_use
from guided_diffusers.networks import evaluating, relu_as_softplus

BUSY = "scheduler: this .*Scheduler counts the steps of another call in progress in "


@contextmanager
def in_progress(run: Callable[..., Any]) -> Iterator[None]:
    """Context in which a call, `run(callback)` of another thread, is at its second step."""
    reached, resume, results = Event(), Event(), []

    def pause(pipeline: Any, index: int, *_: Any) -> dict:
        if index == 1:
            reached.set()
            assert resume.wait(60)
        return {}

    thread = Thread(target=lambda: results.append(run(pause)), name="first")
    thread.start()
    assert reached.wait(60)
    try:
        yield
    finally:
        resume.set()
        thread.join()
    assert len(results) == 1


def seeded() -> dict[str, Any]:
    return sd_call(generator=torch.Generator().manual_seed(0))


# One call at a time


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_a_second_call_of_a_pipeline_is_refused_and_the_first_is_right(scheduler: type) -> None:
    pipeline, found = quiet(small_unet(), scheduler(), small_classifier()), []
    alone = sample(pipeline, "cat", num_inference_steps=5)

    def first(pause: Any) -> None:
        found.append(sample(pipeline, "cat", num_inference_steps=5, callback_on_step_end=pause))

    other = ClassifierGuidedPipeline.from_pipe(pipeline)
    assert other.scheduler is pipeline.scheduler
    with in_progress(first):
        for shared in (pipeline, other):
            with pytest.raises(
                RuntimeError, match=BUSY + "the thread 'first'. Wait for its end, o"
            ):
                shared("dog", num_inference_steps=3)
    assert torch.equal(found[0], alone)
    assert torch.equal(sample(pipeline, "cat", num_inference_steps=5), alone)


def test_a_call_within_a_callback_needs_a_scheduler_of_its_own() -> None:
    pipeline = quiet(small_unet(), DPMSolverMultistepScheduler(), small_classifier())
    inner = ClassifierGuidedPipeline.from_pipe(
        pipeline, scheduler=copy.deepcopy(pipeline.scheduler)
    )
    inner.set_progress_bar_config(disable=True)
    alone = sample(pipeline, "cat", num_inference_steps=5)
    expected, found = sample(inner, "dog", num_inference_steps=3), []

    def preview(*_: Any) -> dict:
        found.append(sample(inner, "dog", num_inference_steps=3))
        return {}

    def again(*_: Any) -> dict:
        return {"latents": sample(pipeline, "dog", num_inference_steps=3)}

    outer = sample(pipeline, "cat", num_inference_steps=5, callback_on_step_end=preview)
    assert torch.equal(outer, alone) and all(torch.equal(image, expected) for image in found)
    with pytest.raises(RuntimeError, match=BUSY + "this thread, in a callback"):
        sample(pipeline, "cat", num_inference_steps=5, callback_on_step_end=again)
    assert torch.equal(sample(pipeline, "cat", num_inference_steps=5), alone)  # usable again


def test_threads_that_share_the_networks_get_the_images_of_single_calls() -> None:
    """Networks in training mode with dropout, whose flags the first call must not restore before the
    last one ends; terms that freeze the network at each step; one classifier made smooth."""
    unet, classifier = small_unet(dropout=0.3), small_classifier(dropout=0.3, pool="spatial")
    unet.train()
    classifier.train()
    classifier.conv_in.train(False)
    classifier.conv_in.weight.requires_grad_(False)
    networks = (unet, classifier)
    before = [[m.training for m in n.modules()] for n in networks]
    needed = [[p.requires_grad for p in n.parameters()] for n in networks]
    energy = EnergyGuidance(lambda x: x.square().sum((1, 2, 3)), 0.1, through_network=True)
    runs = []
    for k, scheduler in enumerate(
        (DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler) * 2
    ):
        pipeline = quiet(unet, scheduler(clip_sample=False) if k < 2 else scheduler(), classifier)
        terms = [[], energy, ClassifierGuidance(classifier, 1, softplus=3.0)][k % 3]
        runs.append((pipeline, {"num_inference_steps": 3 + k, "guidance": terms}))

    def run(number: int) -> torch.Tensor:
        pipeline, settings = runs[number]
        return sample(pipeline, "cat", **settings)

    alone = [run(number) for number in range(len(runs))]
    for _ in range(2):
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(run, range(len(runs))))
        assert all(map(torch.equal, together, alone))
    assert [[m.training for m in n.modules()] for n in networks] == before
    assert [[p.requires_grad for p in n.parameters()] for n in networks] == needed


def test_contexts_that_overlap_restore_the_flags_with_the_last_one() -> None:
    layer = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2), torch.nn.ReLU().eval())
    first, second = evaluating(layer), evaluating(layer[1], None, layer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(part.training for part in layer.modules())
    assert not any(p.requires_grad for p in layer.parameters())
    second.__exit__(None, None, None)
    assert [part.training for part in layer.modules()] == [True, True, True, False]
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_second_call_within_guide_is_refused_and_the_first_is_right(scheduler: type) -> None:
    pipeline, found = stable_diffusion(scheduler=scheduler(**SD)), []
    twin = type(pipeline)(**pipeline.components, requires_safety_checker=False)
    twin.scheduler = copy.deepcopy(pipeline.scheduler)
    term = ClassifierGuidance(small_classifier(in_channels=4), "cat", 2.0)
    cls, unguided = type(pipeline), twin(**seeded()).images

    def first(pause: Any) -> None:
        found.append(pipeline(**seeded(), callback_on_step_end=pause).images)

    with guide(pipeline, term):
        alone = pipeline(**seeded()).images
        with in_progress(first):
            with pytest.raises(RuntimeError, match=BUSY + "the thread 'first'"):
                pipeline(**seeded())
            # the same network with another scheduler, unguided
            assert torch.equal(twin(**seeded()).images, unguided)
        assert torch.equal(found[0], alone)
        assert torch.equal(pipeline(**seeded()).images, alone)
    assert type(pipeline) is cls and not torch.equal(alone, unguided)
    assert torch.equal(pipeline(**seeded()).images, unguided)


def test_guide_in_two_threads_on_one_network() -> None:
    classifier, pipelines = small_classifier(in_channels=4), []
    for scheduler in (DDIMScheduler(**SD), HeunDiscreteScheduler(**SD)):
        pipeline = stable_diffusion(scheduler=scheduler)
        pipelines.append(pipeline)
        pipeline.unet = pipelines[0].unet

    def run(number: int) -> torch.Tensor:
        with guide(pipelines[number], ClassifierGuidance(classifier, number, 2.0)):
            return pipelines[number](**seeded()).images

    alone = [run(0), run(1)]
    for _ in range(3):
        with ThreadPoolExecutor(2) as threads:
            assert all(map(torch.equal, threads.map(run, (0, 1)), alone))


def test_a_scheduler_set_again_during_a_guided_call_is_refused() -> None:
    """By a callback, as by a plain pipeline of another thread, which nothing can refuse."""
    term = ClassifierGuidance(small_classifier(in_channels=4), "cat", 2.0)
    plain, block = stable_diffusion(scheduler=DDIMScheduler(**SD, clip_sample=False)), modular()

    def disturb(pipeline: Any, *_: Any) -> dict:
        pipeline.scheduler.set_timesteps(7)
        return {}

    with guide(plain, term), pytest.raises(RuntimeError, match="set again during a guided call"):
        plain(**seeded(), callback_on_step_end=disturb)
    with pytest.raises(RuntimeError, match="set again before step 1 of 3, by another call"):
        hook = block.classifier.register_forward_hook(lambda *_: block.scheduler.set_timesteps(7))
        modular_call(block, label="cat")
    hook.remove()
    assert modular_call(block, label="cat").isfinite().all()


def test_a_pipeline_made_within_guide_makes_calls_of_its_own() -> None:
    pipeline = stable_diffusion(scheduler=DDIMScheduler(**SD))
    with guide(pipeline, Pull(0.1)):
        scheduler = copy.deepcopy(pipeline.scheduler)
        other = pipeline.from_pipe(pipeline, scheduler=scheduler)
        other.set_progress_bar_config(disable=True)
        with exclusive_use(pipeline.scheduler):
            images = other(**seeded()).images
            with pytest.raises(RuntimeError, match="counts the steps of another call"):
                pipeline(**sd_call())
    unguided = stable_diffusion(scheduler=DDIMScheduler(**SD))
    assert torch.equal(images, unguided(**seeded()).images)


def test_guide_of_our_pipeline_counts_as_one_call() -> None:
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False), small_classifier())
    alone = sample(pipeline, "cat", num_inference_steps=3)
    with guide(pipeline, Pull(0.1)):
        assert not torch.equal(sample(pipeline, "cat", num_inference_steps=3), alone)
    assert torch.equal(sample(pipeline, "cat", num_inference_steps=3), alone)


# Training mode


class Network(torch.nn.Module):
    """A classifier of 8x8 grey images with a layer that training mode makes random or changes."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.layer, self.head = torch.nn.Conv2d(1, 4, 3), layer, torch.nn.Linear(144, 3)
        self.config = {"num_train_timesteps": 1000, "beta_schedule": "linear", "num_labels": 3}

    def forward(self, sample: torch.Tensor, timestep: Any = 0) -> tuple[torch.Tensor]:
        x = self.layer(self.conv(sample))
        return (self.head(x.flatten(1)),)


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).mT
        return self.attention(x, x, x)[0]


class Functional(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, self.training)


class Scaled(torch.nn.Module):
    """Dropout inside `scaled_dot_product_attention`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).mT[:, None]
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 * self.training)


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x.flatten(2).mT)[0]


class Stochastic(torch.nn.Module):
    """Stochastic depth, with the flag read by a plain `if`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (torch.rand(()) > 0.5) if self.training else 0.5 * x


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "attention": Attention,
    "LSTM": Recurrent,
    "RReLU": torch.nn.RReLU,
    "F.dropout": Functional,
    "InstanceNorm": lambda: torch.nn.InstanceNorm2d(4, track_running_stats=True),
    "BatchNorm": lambda: torch.nn.BatchNorm2d(4),
    "Dropout2d": lambda: torch.nn.Dropout2d(0.5),
    "AlphaDropout": lambda: torch.nn.FeatureAlphaDropout(0.5),
    "SDPA": Scaled,
    "stochastic depth": Stochastic,
}


def state(*networks: torch.nn.Module) -> list[Any]:
    """Flags, and the buffers' values."""
    flags = [part.training for network in networks for part in network.modules()]
    flags += [p.requires_grad for network in networks for p in network.parameters()]
    return flags + [b.tolist() for network in networks for b in network.buffers()]


def fail(*_: Any) -> dict:
    raise KeyError("stop")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("use", ["pipeline", "term", "guide", "block", "image", "worse", "unet"])
def test_training_mode_changes_nothing_and_is_left_as_it_was(layer: str, use: str) -> None:
    torch.manual_seed(1)
    network = Network(LAYERS[layer]())
    network.conv.weight.requires_grad_(False)
    run = RUNS[use](network)
    network.eval()
    expected = run()
    network.train()
    network.head.eval()
    before = state(network)
    for seed in range(2):
        torch.manual_seed(seed)
        assert torch.equal(run(), expected)
    assert state(network) == before
    handle = network.head.register_forward_hook(fail)
    with pytest.raises(KeyError):
        run()
    handle.remove()
    assert state(network) == before
    torch.manual_seed(2)
    assert torch.equal(run(), expected)


def as_denoiser(network: Network) -> torch.nn.Module:
    """A network for the same samples, whose output depends on the logits."""
    unet = small_unet()

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet, self.network, self.config = unet, network, unet.config

        def forward(self, x: torch.Tensor, t: Any, return_dict: bool = True) -> tuple:
            shift = self.network(x)[0].mean(1)[:, None, None, None]
            return (self.unet(x, t, return_dict=False)[0] + 0.1 * shift,)

    return Denoiser()


def of_pipeline(unet: Any, classifier: Any = None, **call: Any) -> Callable[[], torch.Tensor]:
    pipeline = quiet(unet, DDIMScheduler(clip_sample=False), classifier)
    return lambda: sample(pipeline, num_inference_steps=3, num_images_per_label=2, **call)


def of_guide(network: Network) -> Callable[[], torch.Tensor]:
    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False))

    def run() -> torch.Tensor:
        with guide(pipeline, ClassifierGuidance(network, 1)):
            return sample(pipeline, num_inference_steps=3, num_images_per_label=2)

    return run


def of_block(network: Network) -> Callable[[], torch.Tensor]:
    network.conv = torch.nn.Conv2d(4, 4, 3)
    network.conv.weight.requires_grad_(False)
    pipeline = modular()
    pipeline.update_components(classifier=network)
    return lambda: modular_call(pipeline, label=1)


RUNS: dict[str, Callable[[Network], Callable[[], torch.Tensor]]] = {
    "pipeline": lambda network: of_pipeline(small_unet(), network, label=1, guidance_scale=2.0),
    "term": lambda network: of_pipeline(small_unet(), guidance=ClassifierGuidance(network, 1)),
    "guide": of_guide,
    "block": of_block,
    "image": lambda network: of_pipeline(
        small_unet(), guidance=ImageClassifierGuidance(network, 1)
    ),
    "worse": lambda network: of_pipeline(small_unet(), guidance=AutoGuidance(as_denoiser(network))),
    "unet": lambda network: of_pipeline(as_denoiser(network)),
}


def test_the_prompts_of_a_clip_in_training_mode() -> None:
    def direction(model: Any) -> torch.Tensor:
        return CLIPGuidance(model, image_prompt=normal(3, 8, 8).float().clamp(-1, 1)).direction

    model = tiny_clip()
    model.config.vision_config.attention_dropout = 0.5
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    expected = direction(model.eval())
    before = state(model.train())
    assert torch.equal(direction(model), expected) and state(model) == before


def test_an_autoencoder_and_the_denoiser_of_a_guided_pipeline_in_training_mode() -> None:
    pipeline = stable_diffusion(scheduler=DDIMScheduler(**SD, clip_sample=False))
    for block in (*pipeline.unet.modules(), *pipeline.vae.modules()):
        if isinstance(block, torch.nn.Dropout):
            block.p = 0.5
    term = EnergyGuidance(lambda x: x.square().sum((1, 2, 3)), 0.1, through_network=True)

    def run() -> torch.Tensor:
        with guide(pipeline, term):
            return pipeline(**seeded()).images

    expected = run()
    pipeline.unet.train()
    pipeline.vae.train()
    before = state(pipeline.unet, pipeline.vae)
    assert torch.equal(run(), expected)
    assert state(pipeline.unet, pipeline.vae) == before
    latent = quiet(plain_unet(4), DDIMScheduler(), vae=vae().train())
    assert latent(num_inference_steps=2, output_type="pt").images.isfinite().all()
    assert latent.vae.training


# Softplus


class Layers(torch.nn.Module):
    """ReLU that is reached by attribute, by a plain list, by a bound method, and shared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act, linear = torch.nn.ReLU(), torch.nn.Linear
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(linear(16, 16), self.act, linear(16, 16)) for _ in range(2)
        )
        self.order = [block for block in self.blocks]
        self.last, self.plain = self.activate, linear(16, 3)
        self.config = {"num_train_timesteps": 1000, "beta_schedule": "linear", "num_labels": 3}

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)

    def forward(self, sample: torch.Tensor, timestep: Any = 0) -> tuple[torch.Tensor]:
        x = sample.flatten(1)
        for block in self.order:
            x = x + block(x)
        return (self.plain(self.last(x)),)

    def by_hand(self, sample: torch.Tensor, beta: float) -> torch.Tensor:
        x = sample.flatten(1)
        for block in self.blocks:
            x = x + block[2](F.softplus(block[0](x), beta))
        return self.plain(F.softplus(x, beta))


def test_the_smooth_network_is_a_copy_of_the_same_weights() -> None:
    network, x = Layers(), normal(5, 1, 4, 4).float()
    before, plain = [*network.named_modules()], network(x)[0]
    smooth = relu_as_softplus(network, 3.0)
    torch.testing.assert_close(smooth(x)[0], network.by_hand(x, 3.0))
    assert [id(p) for p in smooth.parameters()] == [id(p) for p in network.parameters()]
    assert [*network.named_modules()] == before and torch.equal(network(x)[0], plain)
    with torch.no_grad():
        network.plain.weight.mul_(2)
    torch.testing.assert_close(smooth(x)[0], network.by_hand(x, 3.0))
    assert relu_as_softplus(network, None) is network


def test_the_smooth_network_with_hooks_of_accelerate_and_compiled() -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module

    network, x = Layers(), normal(5, 1, 4, 4).float()
    expected = network.by_hand(x, 3.0)
    hooked, offloaded = add_hook_to_module(copy.deepcopy(network), ModelHook()), Layers()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    compiled = torch.compile(copy.deepcopy(network), backend="eager")
    in_place = copy.deepcopy(network)
    in_place.compile(backend="eager")
    for other in (hooked, offloaded, compiled, in_place):
        plain = other(x)[0]
        torch.testing.assert_close(relu_as_softplus(other, 3.0)(x)[0], expected)
        assert torch.equal(other(x)[0], plain) and not torch.allclose(plain, expected)
    network.forward = lambda sample, timestep=0: Layers.forward(network, sample)
    with pytest.raises(ValueError, match="softplus=3.0: the forward of Layers was replaced by a f"):
        ClassifierGuidance(network, 0, softplus=3.0)


def test_softplus_is_seen_by_no_other_thread_and_left_by_no_error() -> None:
    network, x = Layers(), normal(2, 1, 4, 4).float()
    term, level_step = ClassifierGuidance(network, 0, softplus=3.0), a_step(x)
    plain, smooth = network(x)[0], term.score(level_step)
    inside, resume = Event(), Event()

    def pause(*_: Any) -> None:
        inside.set()
        assert resume.wait(60)

    handle = network.plain.register_forward_hook(pause)
    thread = Thread(target=term.score, args=(level_step,))
    thread.start()
    assert inside.wait(60)
    handle.remove()
    assert torch.equal(network(x)[0], plain)  # while the gradient is taken
    resume.set()
    thread.join()
    handle = network.plain.register_forward_hook(fail)
    with pytest.raises(KeyError):
        term.score(level_step)
    handle.remove()
    assert torch.equal(network(x)[0], plain) and torch.equal(term.score(level_step), smooth)


def a_step(x: torch.Tensor) -> Any:
    from test_guidance import level_at

    return step_at(level_at(1.0), x)

"""Images of a predicted x0 as a Diffusers pipeline makes them of its final sample.

Latents may be packed, normalized by statistics, folded into patches, or frames of a video; how is
written in each pipeline, after its loop. `PipelineEnding` runs those statements on an x0: what the
decoder gets there is what it would get if the x0 were the result of the last step. The decoder is
then run here, a part at a time, with a gradient.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import is_compiled_module
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from .checks import shown
from .images import decode, one_by_one
from .noise import is_instance_by_name

PACKAGE = str(Path(__file__).parent)
DECODERS = ("vae", "vqvae", "movq", "vqgan")
#: decoders of images in [0, 1]
UNIT_RANGE = {"PaellaVQModel"}
#: decoders of videos (B, F, C, H, W)
FRAMES_FIRST = {"AutoencoderKLAllegro"}
#: variables of pipelines with the number of frames that are decoded at once
CHUNKS = ("decode_chunk_size",)
CALLBACKS = ("callback", "callback_on_step_end")
#: methods of lists and dictionaries that change them
CHANGES = {"append", "extend", "insert", "update", "pop", "remove", "clear", "setdefault"}
Frames = str | Sequence[int]


def check_frames(frames: Any) -> Frames:
    """`frames` of `guide`.

    Raises:
        ValueError: unless it is "all", "middle" or a list of frame numbers.
    """
    if isinstance(frames, str) and frames in ("all", "middle"):
        return frames
    is_list = isinstance(frames, (list, tuple)) and len(frames) > 0
    if not is_list or not all(type(frame) is int for frame in frames):
        raise ValueError(
            f"frames={shown(frames)}: 'all', 'middle' or a list of frame numbers is allowed"
        )
    return list(frames)


def decode_x0(
    pipeline: Any, ending: PipelineEnding | None, x0: torch.Tensor, frames: Frames = "all"
) -> torch.Tensor:
    """Images in [-1, 1] of a pipeline's predicted x0: (B, C, H, W), of a video (B, C, F, H, W).

    Args:
        ending: of the pipeline's method that steps the scheduler. None, or one that ends without
            the pipeline's decoder: a loop of the user's, whose latents are decoded by the
            autoencoder's config.
        frames: of a video: "all", "middle" for that one, (B, C, H, W), or their numbers.

    Raises:
        ValueError: if these are no images, or the pipeline doesn't decode them by a decoder.
    """
    if ending is None:
        return _without_ending(pipeline, x0)
    reached = ending.decoder_input(x0)
    if reached is None:
        return _without_ending(pipeline, x0)
    if x0.ndim == 6 and len(reached.z) > len(x0):  # images before an edit, and the edited one
        reached.z = reached.z.unflatten(0, (len(x0), -1))[:, -1]
    if frames != "all" and reached.decodes_in_turn:
        return reached.chosen_frames(frames)
    images = reached.images(len(x0))
    if images.ndim == 5:
        numbers = frame_numbers(frames, images.shape[2])
        is_one = frames == "middle" or images.shape[2] == 1  # an image, of a decoder of videos
        return images[:, :, numbers[0] if is_one else numbers]
    if frames != "all":
        raise ValueError(
            f"frames={frames!r}: pipeline {type(pipeline).__name__} makes {tuple(images.shape)}, no "
            "frames; 'all' is allowed"
        )
    return images


def _without_ending(pipeline: Any, x0: torch.Tensor) -> torch.Tensor:
    decoder = next(filter(None, (getattr(pipeline, name, None) for name in DECODERS)), None)
    if decoder is None:
        return _check_pixels(pipeline, x0)
    channels = decoder.config.get("latent_channels") or x0.shape[1]
    if x0.ndim != 4 or x0.shape[1] != channels:
        raise ValueError(
            f"pipeline {type(pipeline).__name__}: latents {tuple(x0.shape)} of a loop that is not "
            f"the pipeline's own can't be decoded; (B, {channels}, H, W) are allowed, or of='x0'"
        )
    if getattr(pipeline, "movq", None) is decoder:  # Kandinsky: no scaling, no quantization
        x0 = x0.to(decoder.dtype)
        return one_by_one(lambda z: decoder.decode(z, force_not_quantize=True).sample, x0)
    return decode(decoder, x0)


def _check_pixels(pipeline: Any, x0: torch.Tensor) -> torch.Tensor:
    """The x0 of a pipeline without a decoder, if it is an image."""
    if x0.ndim != 4 or x0.shape[1] not in (1, 3):
        raise ValueError(
            f"pipeline {type(pipeline).__name__}: its predicted x0 {tuple(x0.shape)} is no image, "
            "and it has no decoder that makes one of it: use a term with of='x0'"
        )
    return x0


def frame_numbers(frames: Frames, count: int) -> list[int]:
    """The numbers of the chosen ones of `count` frames.

    Raises:
        ValueError: for a number that the video doesn't have.
    """
    if frames == "all":
        return list(range(count))
    if frames == "middle":
        return [count // 2]
    if max(frames) >= count or min(frames) < -count:
        raise ValueError(f"frames={frames}: the video has {count} frames, numbered from 0")
    return [frame % count for frame in frames]


class DecoderInput(Exception):
    """Arguments of a decoder's `decode`; raised in its place."""

    def __init__(self, decoder: torch.nn.Module, z: torch.Tensor, args: tuple, kwargs: dict):
        super().__init__("decode")
        self.decoder, self.z, self.args_, self.kwargs = decoder, z, args, kwargs

    def images(self, count: int) -> torch.Tensor:
        """Decoded images of `count` samples; a row of z at a time where a gradient is needed."""
        z = self.z.to(self.decoder.dtype)
        if not (torch.is_grad_enabled() and z.requires_grad):
            images = self._decode(z, slice(None))
        else:
            size = self._rows_at_once(count)
            parts = [slice(i, i + size) for i in range(0, len(z), size)]
            images = torch.cat(
                [checkpoint(self._decode, z[part], part, use_reentrant=False) for part in parts]
            )
        if is_instance_by_name(self.decoder, UNIT_RANGE):
            images = 2 * images - 1
        if is_instance_by_name(self.decoder, FRAMES_FIRST):
            images = images.transpose(1, 2)
        if images.ndim == 4 and len(images) > count and len(images) % count == 0:
            images = images.unflatten(0, (count, -1)).transpose(1, 2)  # frames were in the batch
        return images

    @property
    def decodes_in_turn(self) -> bool:
        """Whether the decoder makes the frames of one latent frame after the other, of it and those
        before, as Wan's does."""
        has_cache = self.z.ndim == 5 and hasattr(self.decoder, "clear_cache")
        return has_cache and not getattr(self.decoder, "use_tiling", False)

    def chosen_frames(self, frames: Frames) -> torch.Tensor:
        """Some frames of a video, (B, C, F, H, W), or its middle, (B, C, H, W).

        A frame's gradient is that in its own latent frame; those before are only the context in
        which it is decoded. Memory then holds the activations of one latent frame.
        """
        ratio = 2 ** sum(self.decoder.config.temperal_downsample)
        numbers = frame_numbers(frames, 1 + ratio * (self.z.shape[2] - 1))
        rows = range(len(self.z))
        is_single = len(rows) * len(numbers) == 1  # then nothing is decoded twice
        chosen = []
        for number in numbers:
            images = [self._frame(slice(i, i + 1), number, ratio, is_single) for i in rows]
            chosen.append(torch.cat(images))
        return chosen[0] if frames == "middle" else torch.stack(chosen, dim=2)

    def _frame(self, row: slice, number: int, ratio: int, is_single: bool) -> torch.Tensor:
        last = -(-number // ratio)  # the first latent frame makes one frame, each other `ratio`
        z = self.z[row, :, : last + 1].to(self.decoder.dtype)

        def decode_last(z: torch.Tensor) -> torch.Tensor:
            with _for_one_frame(self.decoder.decoder, number, ratio):
                return self._decode(z, row)[:, :, number - ratio * last - 1]

        if is_single or not (torch.is_grad_enabled() and z.requires_grad):
            return decode_last(z)
        return checkpoint(decode_last, z, use_reentrant=False)

    def _rows_at_once(self, count: int) -> int:
        is_temporal = "num_frames" in self.kwargs
        return len(self.z) // count if is_temporal else 1

    def _decode(self, z: torch.Tensor, part: slice) -> torch.Tensor:
        def cut(value: Any) -> Any:
            has_rows = isinstance(value, torch.Tensor) and value.ndim
            return value[part] if has_rows and len(value) == len(self.z) else value

        kwargs = {name: cut(value) for name, value in self.kwargs.items()}
        return self.decoder.decode(z, *map(cut, self.args_), **kwargs)[0]


class _NotNeeded(Exception):
    """Ends a decoder's call where what it makes further on isn't needed."""


@contextmanager
def _for_one_frame(decoder: torch.nn.Module, number: int, ratio: int) -> Iterator[None]:
    """Context in which a causal decoder, called for one latent frame after the other, makes only
    what the frame `number` needs of the latent frames before its own, without an autograd graph.

    The k-th last of its convolutions over three frames needs of its input the frames from
    `number - 2 k` on. Those before the last temporal upsampling are evaluated at all frames.
    """
    convolutions = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] > 1
    ]
    is_compiled = any(is_compiled_module(m) or m._compiled_call_impl for m in decoder.modules())
    forward, own = decoder.forward, {k: v for k, v in vars(decoder).items() if k == "forward"}
    last, current = -(-number // ratio), -1

    def decode(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal current
        current += 1
        if current >= last:
            return forward(x, *args, **kwargs)
        try:
            return forward(x.detach(), *args, **kwargs)
        except _NotNeeded:
            return x.new_empty(0)  # which torch.cat leaves out

    def end_before(first: int, *_: Any) -> None:
        if ratio * current < first:
            raise _NotNeeded

    with ExitStack() as stack:
        for k, (name, module) in enumerate(reversed(convolutions), 1):
            if is_compiled or name.endswith("time_conv"):
                break
            hook = module.register_forward_pre_hook(partial(end_before, number - 2 * k))
            stack.callback(hook.remove)
        stack.callback(vars(decoder).update, own)
        stack.callback(vars(decoder).pop, "forward")
        decoder.forward = decode
        yield


class _Decoder:
    """A decoder that doesn't decode: it raises what it gets."""

    def __init__(self, module: torch.nn.Module):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def decode(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise DecoderInput(self._module, z, args, kwargs)


class _Network:
    """A network that is not evaluated: pipelines that go on with it after the last step, to make
    further frames, have nothing to decode yet."""

    def __init__(self, module: torch.nn.Module, name: str):
        self._module, self._name = module, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"it evaluates its {self._name} after that")


class _LastStep(tuple):
    """Result of a step, by position and by name, as pipelines take it."""

    prev_sample = pred_original_sample = denoised = property(lambda self: self[0])


class _Scheduler:
    """A scheduler whose step gives an x0."""

    def __init__(self, scheduler: Any, x0: torch.Tensor):
        self._scheduler, self._x0 = scheduler, x0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def step(self, *args: Any, **kwargs: Any) -> _LastStep:
        return _LastStep((self._x0, self._x0))


class _OtherScheduler(_Scheduler):
    """One of something else, such as the sound of a video: its steps change nothing."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> _LastStep:
        return _LastStep((sample, sample))


class PipelineEnding:
    """The statements of a pipeline from its scheduler's step to its decoder.

    They run on copies of the pipeline and of the method's variables, as if the step were the last
    one, without callbacks, without drawing from the generators, and without calls that have only
    effects.

    Args:
        frame: of the method, at the call of `scheduler.step`; its variables are read at once.

    Raises:
        LookupError: if the method doesn't call it itself, or has no source.
    """

    def __init__(self, frame: FrameType):
        self.pipeline = frame.f_locals["self"]
        names = tuple(name for name in frame.f_locals if name.isidentifier())
        self.variables = {name: frame.f_locals[name] for name in names}
        for name, value in self.variables.items():
            if type(value) in (list, dict):  # which the pipeline goes on changing
                self.variables[name] = value.copy()
        self.function = FunctionType(
            _ending_code(frame.f_code, frame.f_lineno, names), frame.f_globals
        )

    def decoder_input(self, x0: torch.Tensor) -> DecoderInput | None:
        """What the pipeline would decode if x0 were the result of its last step; None if it ends
        without a decoder."""
        scheduler, replacements = self.pipeline.scheduler, {}
        replacements[id(scheduler)] = _Scheduler(scheduler, x0)
        pipeline = copy(self.pipeline)
        for name, value in vars(self.pipeline).items():
            if isinstance(value, torch.nn.Module) and hasattr(value, "decode"):
                replacements[id(value)] = _Decoder(value)
            elif isinstance(value, torch.nn.Module):
                replacements[id(value)] = _Network(value, name)
            if id(value) in replacements:
                vars(pipeline)[name] = replacements[id(value)]
        replacements[id(self.pipeline)] = pipeline
        for value in self.variables.values():
            if isinstance(value, SchedulerMixin) and value is not scheduler:
                replacements[id(value)] = _OtherScheduler(value, x0)
        variables = {
            name: replacements.get(id(value), copy_variable(name, value))
            for name, value in self.variables.items()
        }
        if isinstance(count := variables.get("timesteps"), (torch.Tensor, list)):
            if "i" in variables:
                variables["i"] = len(count) - 1
        # pipelines may write into what autograd keeps of their own arithmetic
        keep_copies = torch.autograd.graph.saved_tensors_hooks(_copy, lambda kept: kept)
        try:
            with keep_copies:
                self.function(**variables)
        except DecoderInput as reached:
            return reached.with_traceback(None)
        except Exception as error:
            if not any(isinstance(value, _Decoder) for value in replacements.values()):
                return None  # such as a conversion of pixels to NumPy
            raise ValueError(
                f"pipeline {type(self.pipeline).__name__}: its predicted x0 can't be decoded within a "
                f"run ({error}): use a term with of='x0'"
            ) from error
        return None


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def copy_variable(name: str, value: Any) -> Any:
    """A variable of a pipeline's method for statements that are run again."""
    if name in CALLBACKS:
        return None
    if name in CHUNKS and value is not None:
        return 10**6
    if name == "output_type":
        return "pt" if value == "latent" else value
    if name == "generator" and value is None:
        return torch.Generator()
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if isinstance(value, list) and value and isinstance(value[0], torch.Generator):
        return [copy_variable("", one) for one in value]
    if isinstance(value, torch.Tensor):
        return value.detach().clone()  # pipelines write into their latents
    if type(value) in (list, dict):
        return value.copy()  # and append to what they decode in the end
    return tqdm(disable=True) if isinstance(value, tqdm) else value


@lru_cache(maxsize=64)
def _ending_code(method: CodeType, line: int, names: tuple[str, ...]) -> CodeType:
    """Code of a function of the method's variables: the method from this line on."""
    tree = function_tree(method)
    body = [EffectDropper().visit(node) for node in _statements_from(tree.body, line)]
    return compile_statements(tree, body, method, names)


def function_tree(method: CodeType) -> ast.FunctionDef:
    """The syntax of a method, with the line numbers of its file.

    Raises:
        LookupError: if it has no source.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except OSError as error:
        raise LookupError(f"{method.co_name} has no source") from error
    ast.increment_lineno(tree, method.co_firstlineno - 1)
    return tree.body[0]


def compile_statements(
    function: ast.FunctionDef, body: list[ast.stmt], method: CodeType, names: Sequence[str]
) -> CodeType:
    """Code of a function of these names with this body, in the place of a method's."""
    function.body = body
    function.args = ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
    function.decorator_list, function.returns = [], None
    module = ast.fix_missing_locations(ast.Module([function], []))
    code = compile(module, method.co_filename, "exec")
    return next(constant for constant in code.co_consts if isinstance(constant, CodeType))


class EffectDropper(ast.NodeTransformer):
    """Leaves out calls whose value isn't used (progress bars, caches that are cleared, hooks),
    except for what changes a variable that is a list or a dictionary, or a tensor."""

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:  # noqa: N802, as ast wants it
        function = getattr(node.value, "func", None)
        name = getattr(function, "attr", "")
        kept: ast.stmt = node if name.endswith("_") else ast.Pass()
        if name in CHANGES and isinstance(function.value, ast.Name):
            test = ast.parse(f"isinstance({function.value.id}, (list, dict))", mode="eval").body
            kept = ast.If(test, [node], [])
        return ast.fix_missing_locations(ast.copy_location(kept, node))


def _statements_from(body: list[ast.stmt], line: int) -> Iterator[ast.stmt]:
    """The statement at a line and those after it: in its block, and after the blocks around it."""
    index = next(i for i, node in enumerate(body) if node.lineno <= line <= node.end_lineno)
    statement = body[index]
    blocks = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
    inner = next((block for block in blocks if block and _contains(block, line)), None)
    if inner is None:
        calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
        steps = [call for call in calls if getattr(call.func, "attr", "") == "step"]
        if not steps:
            raise LookupError(f"line {line} has no call of step")
        if len(steps) == 1:  # whose arguments may be the network's call
            steps[0].args, steps[0].keywords = [], []
        yield statement
    elif isinstance(statement, (ast.For, ast.While)):
        once = ast.Name("_once", ast.Store())
        rest = list(_statements_from(inner, line))  # a loop, for its `continue` and `break`
        yield ast.For(once, ast.Tuple([ast.Constant(0)], ast.Load()), rest, [])
    else:
        yield from _statements_from(inner, line)
    yield from body[index + 1 :]


def _contains(block: list[ast.stmt], line: int) -> bool:
    return block[0].lineno <= line <= block[-1].end_lineno


def pipeline_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of pipelines' methods around a frame, the innermost first."""
    while frame is not None:
        is_method = isinstance(frame.f_locals.get("self"), DiffusionPipeline)
        if is_method and not frame.f_code.co_filename.startswith(PACKAGE):
            yield frame
        frame = frame.f_back


def stepping_frame(frame: FrameType | None) -> FrameType | None:
    """The frame of the innermost pipeline's method around a frame; None: there is none."""
    return next(pipeline_frames(frame), None)

"""Pipelines and schedulers by what they are called on the command line."""

from __future__ import annotations

from pathlib import Path

import diffusers
from diffusers import SchedulerMixin

from ..pipeline import ClassifierGuidedPipeline
from ..schedulers import OUT_OF_REACH


def load_pipeline(model: str, revision: str | None = None) -> ClassifierGuidedPipeline:
    """A bundled pipeline by its name, else a folder or a Hub id, of which `revision` is a branch, tag or commit.

    Raises:
        ValueError: for a revision of what is not on the Hub, or what `from_pretrained` refuses.
    """
    local = Path(model).exists()
    if revision is not None and ("/" not in model or local):
        raise ValueError(
            f"--revision {revision}: only a model of the Hub has revisions, and {model} is none"
        )
    if "/" not in model and not local:
        return ClassifierGuidedPipeline.from_bundled(model)
    return ClassifierGuidedPipeline.from_pretrained(
        model, **({"revision": revision} if revision else {})
    )


def exchanged(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler called `name`, for the network that `scheduler` is for.

    Raises:
        ValueError: if there is none, or it is for networks of another kind.
    """
    found = find_scheduler(name)
    fitting = {cls.__name__ for cls in (type(scheduler), *scheduler.compatibles)}
    if found.__name__ not in fitting:
        raise ValueError(
            f"--scheduler {name}: {found.__name__} doesn't fit the model, whose "
            f"{type(scheduler).__name__} can be exchanged for {', '.join(sorted(fitting))}"
        )
    return found.from_config(scheduler.config)


def find_scheduler(name: str) -> type[SchedulerMixin]:
    """A scheduler class of Diffusers by its name, or the part of it before `Scheduler`, `Discrete` or `Multistep`.

    Raises:
        ValueError: if there is none; the message lists them.
    """
    known = {}
    for cls in sorted(dir(diffusers.schedulers), key=len, reverse=True):
        if cls.endswith("Scheduler") and not cls.startswith("Flax") and cls not in OUT_OF_REACH:
            short = cls.removesuffix("Scheduler")
            for alias in (
                cls,
                short,
                short.removesuffix("Discrete"),
                short.removesuffix("Multistep"),
            ):
                known[alias.lower()] = cls
    if name.lower() not in known:
        raise ValueError(
            f"scheduler {name!r} is unknown; allowed: {', '.join(sorted(set(known.values())))}"
        )
    return getattr(diffusers, known[name.lower()])

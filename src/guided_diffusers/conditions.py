"""What a label means to a pipeline: what its network is told, and which terms guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .guidance import Guidance, GuidanceSum, LabelGuidance, NullGuidance, parse_labels
from .noise import module_config


class Conditioned:
    """Of a pipeline with `unet`, `classifier` and the config `id2label` and `defaults`."""

    @property
    def num_labels(self) -> int | None:
        """How many labels there are, as far as the classifier or the names tell."""
        count = module_config(self.classifier).get("num_labels")
        return count or (len(self.config.id2label) if self.config.id2label else None)

    @property
    def _null(self) -> int | None:
        """The label that tells the network none, one more than there are labels; None where it wasn't trained so."""
        embeddings = self._class_embeddings
        return embeddings - 1 if embeddings and self.num_labels == embeddings - 1 else None

    @property
    def _class_embeddings(self) -> int | None:
        """How many class embeddings the network has, None without; a DiT's config leaves out its null label's."""
        config = module_config(self.unet)
        return config["num_embeds_ada_norm"] + 1 if self._is_dit else config.get("num_class_embeds")

    @property
    def _is_dit(self) -> bool:
        return module_config(self.unet).get("norm_type") == "ada_norm_zero"

    def _labels(self, label: Any, per_label: int) -> list[dict[int, float]]:
        """One {id: weight} an image; empty without a label."""
        if label is None:
            return []
        labels = parse_labels(
            label,
            module_config(self.classifier).get("id2label") or self.config.id2label,
            self.num_labels,
        )
        return [one for one in labels for _ in range(per_label)]

    def _class_labels(
        self,
        labels: list[dict[int, float]],
        batch_size: int,
        conditional: bool | None,
        device: torch.device,
    ) -> torch.Tensor | None:
        """What a class-conditional network is told, (B,); None for an unconditional one."""
        embeddings = self._class_embeddings
        if embeddings is None:
            if conditional:
                raise ValueError(
                    "conditional=True needs a network with class embeddings; this one is unconditional"
                )
            if labels and self.classifier is None:
                raise ValueError(
                    "label has no effect: the network is unconditional and there is no classifier"
                )
            return None
        null, ids = self._null, []
        for one in labels or [{}] * batch_size:
            if conditional is not False and len(one) == 1 and list(one.values()) == [1.0]:
                ids.extend(one)
            elif conditional:
                raise ValueError(
                    f"conditional=True: the network can't be told {one or 'no label'}; use None or False"
                )
            elif null is None:
                raise ValueError(
                    f"conditional={conditional}, label={one or None}: the network has no null label "
                    f"({embeddings} class embeddings, {self.num_labels} known labels), so it needs one "
                    "label an image"
                )
            else:
                ids.append(null)
        if max(ids) >= embeddings:
            raise ValueError(
                f"label {max(ids)} is unknown to the network; ids 0 to {embeddings - 1} are allowed"
            )
        return torch.tensor(ids, device=device)

    def _terms(
        self,
        labels: list[dict[int, float]],
        per_label: int,
        scale: Any,
        free_scale: Any,
        start: float,
        stop: float,
        class_labels: torch.Tensor | None,
    ) -> list[Guidance]:
        """The pipeline's own guidance: nothing at scale 0."""
        wanted = scale is not None and bool(torch.as_tensor(scale).any())
        if not labels and (
            wanted or (free_scale is not None and torch.as_tensor(free_scale).any())
        ):
            raise ValueError(
                f"guidance_scale={scale}, classifier_free_scale={free_scale} need a label to steer to"
            )
        scale = self._scale("guidance_scale", scale, len(labels), per_label)
        if free_scale is None and self._null is not None and (class_labels == self._null).any():
            free_scale = 0.0  # the pipeline's own is for labels that the network is told
        free_scale = self._scale("classifier_free_scale", free_scale, len(labels), per_label)
        terms: list[Guidance] = []
        if labels and scale.any():
            if self.classifier is None:
                raise ValueError(
                    f"guidance_scale={scale.tolist()} needs a classifier, and the pipeline has none: pass "
                    "classifier=... when loading it, or guidance_scale=0 to use the network alone"
                )
            terms.append(LabelGuidance(self.classifier, labels, scale, start, stop))
        if labels and free_scale.any():
            if class_labels is None or self._null is None:
                raise ValueError(
                    f"classifier_free_scale={free_scale.tolist()} needs a class-conditional network with "
                    "a null label, one class embedding more than labels"
                )
            if (class_labels == self._null).any():
                raise ValueError(
                    f"classifier_free_scale={free_scale.tolist()} needs a network that is told a label; "
                    "mixtures and conditional=False hide it"
                )
            terms.append(NullGuidance(self._null, free_scale))
        return terms

    def _scale(self, name: str, scale: Any, images: int, per_label: int) -> torch.Tensor:
        """() or one an image."""
        scale = torch.as_tensor(
            self.config.defaults[name] if scale is None else scale, dtype=torch.float32
        )
        if scale.ndim == 1 and images and len(scale) * per_label == images:
            scale = scale.repeat_interleave(per_label)
        if scale.ndim > 1 or (scale.ndim == 1 and len(scale) != images):
            raise ValueError(
                f"{name} has shape {tuple(scale.shape)}; a number, or one a label or an image "
                f"({images // per_label} or {images}), is allowed"
            )
        return scale


def further_terms(
    guidance: Guidance | Sequence[Guidance],
    class_labels: torch.Tensor | None,
    class_embeddings: int | None,
) -> list[Guidance]:
    """What a pipeline is given beside its own terms, for a network that is told nothing but class labels.

    Args:
        class_labels: what it is told, (B,).
        class_embeddings: how many it knows.

    Raises:
        ValueError: for anything but terms, or conditions that the network can't be told.
    """
    given = (guidance,) if isinstance(guidance, Guidance) else tuple(guidance)
    if not all(isinstance(term, Guidance) for term in given):
        raise ValueError(
            f"guidance: {[type(term).__name__ for term in given]}; a term of guidance, a sum or a list "
            "of them is allowed"
        )
    terms = GuidanceSum(given)
    if terms.conditions and class_labels is None:
        raise ValueError(
            "guidance: a term has conditions, class labels, and the network has no class embeddings"
        )
    for condition in terms.conditions:
        if unknown := condition.keys() - {"class_labels"}:
            raise ValueError(
                f"guidance: a term has conditions {sorted(unknown)}; the network is told "
                "['class_labels']"
            )
        labels = condition.get("class_labels", class_labels)
        if labels.ndim != 1 or len(labels) not in (1, len(class_labels)):
            raise ValueError(
                f"guidance: a condition class_labels has shape {tuple(labels.shape)}; one row, or one for "
                f"each of {len(class_labels)} images, of shape () is allowed"
            )
        if not 0 <= int(labels.max()) < class_embeddings:
            raise ValueError(
                f"guidance: a condition has the class label {int(labels.max())}; 0 to "
                f"{class_embeddings - 1} are allowed"
            )
    return list(terms.terms())

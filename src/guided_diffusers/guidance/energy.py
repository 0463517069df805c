"""`EnergyGuidance`: towards a low value of any differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from .contract import Guidance, Scale, Step, gradient, normalized, x0_gradient


class EnergyGuidance(Guidance):
    """Towards images of low energy: adds `-scale * grad_x E`, as of p(x) exp(-scale E(x)).

    With an energy of the predicted x0 this is universal guidance (Bansal et al. 2023, eq. 6) and, for a measurement,
    E = |y - A(x0)|^2, diffusion posterior sampling (Chung et al. 2023, eq. 16). Images whose left half is given:

        EnergyGuidance(lambda images: ((images - known)[..., :14] ** 2).sum((1, 2, 3)), scale=10)

    Args:
        energy: gives one number an image, (B,), of what `of` says.
        scale: 0 is off.
        of: "image": the predicted x0 as images in [-1, 1], decoded where the model is latent; "x0": the predicted x0 in
            the model's own space; "sample": energy(x_t, level), the noisy sample, which needs no prediction.
        through_network: whether the gradient goes through the network, too: exact, for its forward and backward pass
            (`x0_gradient`); for "image" and "x0".
        normalize: scale the gradient of each image to the norm of its score, so that `scale` counts scores.
        start, stop, sigma_interval: when it acts, as in `Guidance`.

    Raises:
        ValueError: for other values, or, when run, an energy that is not one number an image.
    """

    def __init__(
        self,
        energy: Callable[..., torch.Tensor],
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
        of: Literal["image", "x0", "sample"] = "image",
        through_network: bool = False,
        normalize: bool = False,
    ):
        super().__init__(scale, start, stop, sigma_interval)
        if of not in ("image", "x0", "sample"):
            raise ValueError(f"of={of!r}: 'image', 'x0' and 'sample' are allowed")
        if of == "sample" and through_network:
            raise ValueError("through_network=True has no effect with of='sample'")
        self.energy, self.of, self.through_network, self.normalize = (
            energy,
            of,
            through_network,
            normalize,
        )
        self.acts_on_noise = not (through_network or normalize or of == "sample")

    def score(self, step: Step) -> torch.Tensor:
        def checked(*inputs: object) -> torch.Tensor:
            value = self.energy(*inputs)
            if value.shape != step.sample.shape[:1]:
                raise ValueError(
                    f"energy gave {tuple(value.shape)}; one number an image, ({len(step.sample)},), is "
                    "allowed"
                )
            return value

        if self.of == "sample":
            grad = gradient(lambda x: checked(x, step.level), step.sample)
        else:
            view = step.decode if self.of == "image" else lambda x0: x0
            grad = x0_gradient(lambda x0: checked(view(x0)), step, self.through_network)
        return -self.scale_at(step) * (normalized(grad, step) if self.normalize else grad)

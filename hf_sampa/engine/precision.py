"""fp16: the loss scale of `torch.amp.GradScaler`, for gradients that are unscaled before anyone else sees them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer


class SharedGradScaler(GradScaler):
    """A GradScaler that is told of overflows, so that all processes skip the same steps and keep one scale.

    g_t is carried from step to step, while the scale changes: gradients are multiplied by `inverse_scale` as soon as
    backward is done with them. Whether one overflowed is known to all processes by its norm. State is GradScaler's own.

    Args:
        scaler: whose settings are taken over.
        device: type of the device that the gradients are on.

    Attributes:
        overflow: whether the gradient of the step in progress is to be thrown away; to be set before `step`.
    """

    def __init__(self, scaler: GradScaler, device: str):
        super().__init__(
            device,
            init_scale=scaler.get_scale(),
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            growth_interval=scaler.get_growth_interval(),
            enabled=scaler.is_enabled(),
        )
        self.overflow = False
        self._one = torch.ones((), device=device)

    def inverse_scale(self) -> Tensor:
        """What undoes `scale`: a scalar tensor ``()``, so that nobody waits for the device."""
        return self.scale(self._one).double().reciprocal().float()

    def unscale_(self, optimizer: Optimizer) -> None:
        """Nothing: it has been done."""

    def step(self, optimizer: Optimizer, *args, **kwargs):
        """Step, unless the gradient overflowed."""
        return None if self.overflow else optimizer.step(*args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Lower the scale after an overflow, raise it after enough steps without one."""
        if new_scale is not None:
            super().update(new_scale)
            return
        self.scale(self._one)  # a process that has scaled no loss yet has no scale yet
        found = torch.full_like(self._scale, float(self.overflow))
        torch._amp_update_scale_(
            self._scale,
            self._growth_tracker,
            found,
            self.get_growth_factor(),
            self.get_backoff_factor(),
            self.get_growth_interval(),
        )

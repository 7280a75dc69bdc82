"""A step of any optimizer that is taken back: where it went is kept, and nothing else is left of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ..distributed import here
from ..state import Remembered


Grads = dict[Tensor, Tensor]  # parameter: g_t
Places = dict[Tensor, Tensor]  # parameter: where y_{t+1} goes
GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
INSTEAD = "Use another optimizer, as optim='adamw_torch', or method='sam', whose steps are all real ones."


@torch.no_grad()
def step_and_undo(optimizer: Optimizer, grads: Grads, places: Places, scale: float) -> None:
    """Step for real, write the weights down, and put everything back; costs a copy of weights and state.

    Args:
        optimizer: takes the step, with the state that it has.
        grads: the gradients; its other parameters have none.
        places: receive the weights after the step, of the parameters that it may move; may be `grads`.
        scale: what gradients are multiplied by.
    """
    held = [param for group in optimizer.param_groups for param in group["params"]]
    # Frozen parameters, and those that another process updates, may be many, and hooks may hold a model.
    hooks = chain(*(each.values() for each in _step_hooks(optimizer)))
    left = {id(param) for param in held if param not in places} | {id(hook) for hook in hooks}
    remembered = Remembered(optimizer, *GLOBAL_HOOKS, *_global_generators(held), leave=lambda value: id(value) in left)
    try:
        for param in held:
            param.grad = grads[param] * scale if param in grads else None
        _mute(remembered.found(Optimizer))
        optimizer.step(None)  # as accelerate calls it: not every optimizer makes the closure optional
        torch._foreach_copy_(list(places.values()), [here(param) for param in places])
    finally:
        remembered.put_back()
        for param in held:
            param.grad = None


def _step_hooks(optimizer: Optimizer) -> list[dict[int, Any]]:
    """Who is told of its steps; wrappers of optimizers that leave out ``super().__init__()`` have none of their own."""
    own = (getattr(optimizer, f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post"))
    return [*GLOBAL_HOOKS, *own]


def _mute(optimizers: list[Optimizer]) -> None:
    """Let nobody but optimizers be told of their steps: averages and counters should not see what is undone."""
    own = {id(each) for each in optimizers}
    for hooks in chain(*map(_step_hooks, optimizers)):
        for key, hook in list(hooks.items()):
            if id(getattr(hook, "__self__", None)) not in own:
                del hooks[key]


def _global_generators(params: Sequence[Tensor]) -> list[Any]:
    """Where random numbers come from that name no generator."""
    devices = {param.device for param in params if param.device.type == "cuda"}
    on_devices = [torch.cuda.default_generators[device.index] for device in devices]
    return [torch.default_generator, *on_devices, np.random.mtrand._rand, random._inst]


def try_out(optimizer: Optimizer, grads: Grads, places: Places, scale: float) -> bool:
    """`step_and_undo` twice, into `places`; whether a weight moved. Raises ValueError as `look_ahead` does."""
    first = {param: torch.empty_like(moved) for param, moved in places.items()}
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        with _Alone(optimizer):  # a step of its own: compiled code is not used within, and rounds in other ways
            step_and_undo(optimizer, grads, first, scale)
    for each in (first, places):
        step_and_undo(optimizer, grads, each, scale)
    if any(not torch.allclose(moved, places[param], rtol=0, atol=0, equal_nan=True) for param, moved in first.items()):
        raise ValueError(
            "optim: expected an optimizer whose step can be undone, which is how method='sampa' looks ahead, but two steps of "
            f"{_name(optimizer)} from the same weights, gradients and state went to different places. It keeps something that "
            "is neither in the optimizer nor in what it holds (in a closure, a module's globals or compiled code), or is "
            f"random in a way of its own. {INSTEAD}"
        )
    return any(not torch.equal(here(param), moved) for param, moved in first.items())


class _Alone(TorchDispatchMode):
    """Within the block `optimizer` may not speak to other processes: they may not look ahead at this moment, and it would wait for ever."""

    supports_higher_order_operators = True

    def __init__(self, optimizer: Optimizer):
        super().__init__()
        self.optimizer = optimizer

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # an optimizer whose step is compiled may have nothing else to run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            raise ValueError(
                "optim: expected an optimizer that steps on its own, since with method='sampa' one process of a pair looks "
                f"ahead while the other does not, but {_name(self.optimizer)} speaks to other processes in its step "
                f"({func}). {INSTEAD}"
            )
        return func(*args, **(kwargs or {}))


def _name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"

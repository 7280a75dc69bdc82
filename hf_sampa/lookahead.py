"""Where the base optimizer would go with the gradients it is given, its state left as it was: y_{t+1} = U_{m_t}(x_t, g_t).

Closed forms for `torch.optim.SGD`, `Adam` and `AdamW` (fused or not) read the moments and write only the weights; every
other optimizer takes a real step, after which its state and options are put back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer


@torch.no_grad()
def look_ahead_(base_optimizer: Optimizer) -> None:
    """Move the weights of `base_optimizer` to the look-ahead weights y_{t+1} (Algorithm 2, look-ahead).

    Reads g_t from each parameter's ``.grad`` (clip it first where the real step would be clipped) and uses each group's
    own learning rate, weight decay and moments, with bias correction at step count t + 1. Parameters without a gradient
    stay where they are, as in a real step. Optimizer state and the options of its groups are left as they were.
    """
    closed_form = CLOSED_FORMS.get(type(base_optimizer))
    if closed_form is None or not all(_is_plain(group) for group in base_optimizer.param_groups):
        with _state_restored(base_optimizer):
            base_optimizer.step()
        return
    for group in base_optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                closed_form(param, param.grad, base_optimizer.state.get(param, {}), group)


def _is_plain(group: dict) -> bool:
    """Whether the closed forms cover this group; learning rates held in tensors are left to the optimizer itself."""
    return not (group.get("maximize") or group.get("differentiable") or isinstance(group["lr"], Tensor))


def _sgd_(param: Tensor, grad: Tensor, state: dict, group: dict) -> None:
    """y = x - eta u, with u the momentum (or Nesterov) direction of `torch.optim.SGD`."""
    momentum, buffer = group["momentum"], state.get("momentum_buffer")
    if group["weight_decay"]:
        grad = grad.add(param, alpha=group["weight_decay"])
    if momentum:
        velocity = grad if buffer is None else (buffer * momentum).add_(grad, alpha=1 - group["dampening"])
        grad = grad.add(velocity, alpha=momentum) if group["nesterov"] else velocity
    param.add_(grad, alpha=-group["lr"])


def _adam_(param: Tensor, grad: Tensor, state: dict, group: dict) -> None:
    """y = x - eta (m' / (1 - beta1^(t+1))) / (sqrt(v' / (1 - beta2^(t+1))) + eps), weight decay as the group says."""
    lr, weight_decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    count = _count(state["step"]) + 1 if state else 1
    if weight_decay and group.get("decoupled_weight_decay"):
        param.mul_(1 - lr * weight_decay)
    elif weight_decay:
        grad = grad.add(param, alpha=weight_decay)
    # m' = beta1 m + (1 - beta1) g and v' = beta2 v + (1 - beta2) g^2 live for this one parameter only.
    m = torch.lerp(state["exp_avg"], grad, 1 - beta1) if state else grad * (1 - beta1)
    v = (state["exp_avg_sq"] * beta2 if state else torch.zeros_like(grad)).addcmul_(grad, grad, value=1 - beta2)
    if group["amsgrad"] and state:
        v = torch.maximum(v, state["max_exp_avg_sq"])
    denominator = v.sqrt_().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
    param.addcdiv_(m.div_(1 - beta1**count), denominator, value=-lr)


def _count(step: Tensor) -> int | Tensor:
    """Step count for the bias correction; a count on a device stays there, since reading it would stall the queue."""
    return int(step) if step.device.type == "cpu" else step.double()


# Exact types: a subclass may have overridden `step`.
CLOSED_FORMS: dict[type[Optimizer], Callable[[Tensor, Tensor, dict, dict], None]] = {
    SGD: _sgd_,
    Adam: _adam_,
    AdamW: _adam_,
}


@contextmanager
def _state_restored(optimizer: Optimizer):
    """Undo what a step does to optimizer state, group options and the global random state; costs a copy of the state."""
    state = {param: _copied(values) for param, values in optimizer.state.items()}
    options = [{key: _copied(value) for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    devices = {p.device for g in optimizer.param_groups for p in g["params"] if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, saved in zip(optimizer.param_groups, options, strict=True):
                group.update(saved)


def _copied(value):
    """Deep copy that keeps tensors on their device and out of the graph."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return copy.deepcopy(value)

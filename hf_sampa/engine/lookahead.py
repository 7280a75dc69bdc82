"""Where the base optimizer would go with a gradient, its state left as it was: y_{t+1} = U_{m_t}(x_t, g_t).

`torch.optim.SGD`, `Adam` and `AdamW` (fused or not) step on copies, a small piece of weights and moments at a time, by
torch's own functions; every other optimizer takes a real step, after which it and the weights are made what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from .undone_step import Grads, Places, step_and_undo, try_out


# Numbers per piece: on a CPU its copies stay in the caches, while a GPU wants few launches.
CPU_PIECE, DEVICE_PIECE = 2**18, 2**23
# Look-aheads that are taken twice, of optimizers whose step has to be undone.
LOOK_AHEAD_TRIALS = 3


@torch.no_grad()
def look_ahead(
    base_optimizer: Optimizer,
    params: Sequence[Tensor],
    ascent_grads: Sequence[Tensor | None],
    *,
    out: Sequence[Tensor],
    scale: float = 1.0,
    on_trial: bool = False,
) -> bool:
    """Write the look-ahead weights y_{t+1} (Algorithm 2, look-ahead) into `out`.

    Each group's own learning rate, weight decay and moments are used, with bias correction at step count t + 1.
    Parameters, the optimizer with all that it holds, and global generators are left as they were.

    Args:
        base_optimizer: U, with its state m_t.
        params: x_t, all of the optimizer's parameters or some; what it does not hold stays where it is.
        ascent_grads: g_t, same shapes; None for a parameter without a gradient.
        out: receives y_{t+1}, same shapes; may be `ascent_grads`.
        scale: what clipping multiplies g_t by, in (0, 1].
        on_trial: whether a step that has to be undone is taken twice, to see that nothing is left of the first.

    Returns:
        Whether there was such a trial and it moved a weight: one at a learning rate of 0 shows nothing.

    Raises:
        ValueError: in a trial the second step went elsewhere, or the optimizer spoke to other processes.
    """
    held = {param for group in base_optimizer.param_groups for param in group["params"]}
    grads: Grads = {}
    places: Places = {}
    for param, grad, moved in zip(params, ascent_grads, out, strict=True):
        if param in held:
            places[param] = moved
        if grad is not None and param in held:
            grads[param] = grad
        else:
            moved.copy_(param)
    if not grads:
        return False
    in_pieces = _is_known(base_optimizer) and all(map(_is_plain, base_optimizer.param_groups))
    if in_pieces and all(_is_flat(base_optimizer, param, grad, places[param]) for param, grad in grads.items()):
        _step_in_pieces(base_optimizer, grads, places, scale)
        return False
    if not on_trial:
        step_and_undo(base_optimizer, grads, places, scale)
        return False
    return try_out(base_optimizer, grads, places, scale)


def _is_known(optimizer: Optimizer) -> bool:
    """Whether the piecewise steps are the step of this optimizer, which may have been given one of its own."""
    step = optimizer.step
    if hasattr(step, "_wrapped_by_lr_sched"):  # schedulers count steps
        step = step.__wrapped__
    return type(optimizer) in PIECEWISE and getattr(step, "__func__", step) is type(optimizer).step


def _is_plain(group: dict) -> bool:
    """Whether the piecewise steps cover this group; options held in tensors are left to the optimizer itself."""
    options = (group["lr"], *group.get("betas", ()))
    return not (group.get("differentiable") or any(isinstance(option, Tensor) for option in options))


def _is_flat(optimizer: Optimizer, param: Tensor, *others: Tensor) -> bool:
    """Whether a parameter and all that belongs to it are dense and of one layout and precision.

    torch's fused functions walk through memory and look at no strides.
    """
    tensors = (param, *others, *_state_of(optimizer, param).values())
    layouts = {(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors}
    dense = torch.empty_like(param, device="meta").stride() == param.stride()
    return len(layouts) == 1 and dense and not param.is_complex()


def _step_in_pieces(optimizer: Optimizer, grads: Grads, places: Places, scale: float) -> None:
    for group in optimizer.param_groups:
        for piece in _pieces([param for param in group["params"] if param in grads]):
            # g_t may be where y_{t+1} goes: it is out of the way before x_t is put there.
            scaled = _copies([_flat(grads[param])[part] for param, part in piece], scale)
            moved = [_flat(places[param])[part] for param, part in piece]
            torch._foreach_copy_(moved, [_flat(param)[part] for param, part in piece])
            states = [_state_of(optimizer, param, part) for param, part in piece]
            PIECEWISE[type(optimizer)](moved, scaled, states, group)


def _pieces(params: list[Tensor]) -> Iterator[list[tuple[Tensor, slice]]]:
    """Cut parameters and gather small ones, so that a piece holds at most as many numbers as it should."""
    piece, filled, kind = [], 0, None
    for param in params:
        start = 0
        while start < param.numel():
            if piece and (filled == _longest(param) or kind != (param.device, param.dtype)):
                yield piece
                piece, filled = [], 0
            size = min(param.numel() - start, _longest(param) - filled)
            piece.append((param, slice(start, start + size)))
            start, filled, kind = start + size, filled + size, (param.device, param.dtype)
    if piece:
        yield piece


def _longest(param: Tensor) -> int:
    return CPU_PIECE if param.device.type == "cpu" else DEVICE_PIECE


def _flat(tensor: Tensor) -> Tensor:
    """All numbers of a dense tensor, ``(n,)``, in the order of their addresses."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _copies(tensors: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """Scaled clones; on a GPU by one launch for all."""
    return torch._foreach_mul(tensors, scale)


def _state_of(optimizer: Optimizer, param: Tensor, part: slice | None = None) -> dict[str, Tensor]:
    """What the optimizer keeps of a parameter, or of a part of it; empty before its first step. No copies.

    Without a `part` only what is kept per number, that is without the step count.
    """
    state = {name: value for name, value in optimizer.state.get(param, {}).items() if value is not None}
    if part is None:
        return {name: value for name, value in state.items() if name != "step"}
    return {name: value if name == "step" else _flat(value)[part] for name, value in state.items()}


def _sgd(weights: list[Tensor], grads: list[Tensor], states: list[dict], group: dict) -> None:
    """U of `torch.optim.SGD`, with momentum, Nesterov, dampening and weight decay as the group says."""
    velocities = [state["momentum_buffer"].clone() if "momentum_buffer" in state else None for state in states]
    names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    sgd(weights, grads, velocities, **{name: group[name] for name in names})


def _adam(weights: list[Tensor], grads: list[Tensor], states: list[dict], group: dict) -> None:
    """U of `torch.optim.Adam` and `AdamW`; always the fused form, which is one pass over memory."""

    def moments(name: str) -> list[Tensor]:
        found = zip(weights, states, strict=True)
        return _copies([state[name] if state else torch.zeros_like(weight) for weight, state in found])

    names = ("amsgrad", "lr", "weight_decay", "eps", "maximize")
    adam(
        weights,
        grads,
        moments("exp_avg"),
        moments("exp_avg_sq"),
        moments("max_exp_avg_sq") if group["amsgrad"] else [],
        [_count(state, weight.device) for weight, state in zip(weights, states, strict=True)],
        fused=True,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        **{name: group[name] for name in names},
    )


def _count(state: dict[str, Tensor], device: torch.device) -> Tensor:
    """A copy of the step count t on `device`, to which torch adds the one; a count that is there already is not read, which would
    stall the queue."""
    if not state:
        return torch.zeros((), device=device)
    on_device = state["step"].device == device
    return state["step"].clone() if on_device else torch.full((), state["step"].item(), device=device)


# Exact types: a subclass may have overridden `step`.
PIECEWISE: dict[type[Optimizer], Callable[..., None]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
}

"""Where the base optimizer would go with a gradient, its state left as it was: y_{t+1} = U_{m_t}(x_t, g_t).

`torch.optim.SGD`, `Adam` and `AdamW` (fused or not) step on copies, a small piece of weights and moments at a time, by
torch's own functions; every other optimizer takes a real step, after which weights, state and options are put back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd


# Numbers per piece: on a CPU its copies stay in the caches, while a GPU wants few launches.
CPU_PIECE, DEVICE_PIECE = 2**18, 2**23
Piece = list[tuple[Tensor, Tensor, slice]]  # parameter, where g_t is and y_{t+1} goes, rows


@torch.no_grad()
def look_ahead(
    base_optimizer: Optimizer,
    params: Sequence[Tensor],
    ascent_grads: Sequence[Tensor | None],
    *,
    out: Sequence[Tensor],
    scale: float = 1.0,
) -> None:
    """Write the look-ahead weights y_{t+1} (Algorithm 2, look-ahead) into `out`.

    Each group's own learning rate, weight decay and moments are used, with bias correction at step count t + 1.
    Parameters, optimizer state and the options of its groups are left as they were.

    Args:
        base_optimizer: U, with its state m_t.
        params: x_t, all of the optimizer's parameters or some; what it does not hold stays where it is.
        ascent_grads: g_t, same shapes; None for a parameter without a gradient, which stays where it is, too.
        out: receives y_{t+1}, same shapes; may be `ascent_grads`.
        scale: what clipping multiplies g_t by, in (0, 1].
    """
    held = {param for group in base_optimizer.param_groups for param in group["params"]}
    reached = {}
    for param, grad, moved in zip(params, ascent_grads, out, strict=True):
        if grad is None or param not in held:
            moved.copy_(param)
            continue
        if scale != 1.0 or moved is not grad:
            torch.mul(grad, scale, out=moved)
        reached[param] = moved
    if not reached:
        return
    in_pieces = type(base_optimizer) in PIECEWISE and all(map(_is_plain, base_optimizer.param_groups))
    (_step_in_pieces if in_pieces else _step_and_undo)(base_optimizer, reached)


def _is_plain(group: dict) -> bool:
    """Whether the piecewise steps cover this group; options held in tensors are left to the optimizer itself."""
    options = (group["lr"], *group.get("betas", ()))
    return not (
        group.get("differentiable")
        or any(isinstance(option, Tensor) for option in options)
        or any(param.is_complex() for param in group["params"])
    )


def _step_in_pieces(optimizer: Optimizer, reached: dict[Tensor, Tensor]) -> None:
    step = PIECEWISE[type(optimizer)]
    for group in optimizer.param_groups:
        for piece in _pieces([(param, reached[param]) for param in group["params"] if param in reached]):
            step(piece, optimizer.state, group)


def _pieces(members: list[tuple[Tensor, Tensor]]) -> Iterator[Piece]:
    """Cut parameters into rows and gather small ones, so that a piece holds about as many numbers as it should."""
    piece, filled = [], 0
    for param, moved in members:
        limit = CPU_PIECE if param.device.type == "cpu" else DEVICE_PIECE
        length = param.shape[0] if param.dim() else 1
        rows = max(1, limit * length // max(1, param.numel()))
        for start in range(0, length, rows):
            size = param.numel() * min(rows, length - start) // length
            if piece and filled + size > limit:
                yield piece
                piece, filled = [], 0
            piece.append((param, moved, slice(start, start + rows)))
            filled += size
    if piece:
        yield piece


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[rows] if tensor.dim() else tensor


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Clones; on a GPU by one launch for all."""
    return torch._foreach_mul(tensors, 1.0)


def _sgd(piece: Piece, state: dict, group: dict) -> None:
    """U of `torch.optim.SGD`, with momentum, Nesterov, dampening and weight decay as the group says."""
    weights = _copies([_rows(param, rows) for param, _, rows in piece])
    moved = [_rows(moved, rows) for _, moved, rows in piece]
    buffers = [state.get(param, {}).get("momentum_buffer") for param, _, _ in piece]
    velocities = [b if b is None else _rows(b, rows).clone() for b, (_, _, rows) in zip(buffers, piece, strict=True)]
    names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    sgd(weights, moved, velocities, **{name: group[name] for name in names})
    torch._foreach_copy_(moved, weights)


def _adam(piece: Piece, state: dict, group: dict) -> None:
    """U of `torch.optim.Adam` and `AdamW`; always the fused form, which is one pass over memory."""

    def moments(name: str) -> list[Tensor]:
        # An optimizer that has not stepped yet has no state.
        found = [
            _rows(state[param][name], rows) if state.get(param) else torch.zeros_like(_rows(param, rows))
            for param, _, rows in piece
        ]
        return _copies(found)

    weights = _copies([_rows(param, rows) for param, _, rows in piece])
    moved = [_rows(moved, rows) for _, moved, rows in piece]
    counts = [_count(state.get(param), param.device) for param, _, _ in piece]
    names = ("amsgrad", "lr", "weight_decay", "eps", "maximize")
    adam(
        weights,
        moved,
        moments("exp_avg"),
        moments("exp_avg_sq"),
        moments("max_exp_avg_sq") if group["amsgrad"] else [],
        counts,
        fused=True,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        **{name: group[name] for name in names},
    )
    torch._foreach_copy_(moved, weights)


def _count(state: dict | None, device: torch.device) -> Tensor:
    """A copy of the step count on `device`; a count that is there already stays, since reading it stalls the queue."""
    if not state:
        return torch.zeros((), device=device)
    on_device = state["step"].device == device
    return state["step"].clone() if on_device else torch.full((), state["step"].item(), device=device)


# Exact types: a subclass may have overridden `step`.
PIECEWISE: dict[type[Optimizer], Callable[[Piece, dict, dict], None]] = {SGD: _sgd, Adam: _adam, AdamW: _adam}


def _step_and_undo(optimizer: Optimizer, reached: dict[Tensor, Tensor]) -> None:
    """Step for real and put everything back; costs a copy of weights and state."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = reached.get(param)
    before = _copies(list(reached))
    try:
        with _state_restored(optimizer):
            optimizer.step()
        torch._foreach_copy_(list(reached.values()), list(reached))
    finally:
        torch._foreach_copy_(list(reached), before)
        for param in reached:
            param.grad = None


@contextmanager
def _state_restored(optimizer: Optimizer):
    """Undo what a step does to optimizer state, group options and the global random state."""
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

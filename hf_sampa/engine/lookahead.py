"""Where the base optimizer would go with a gradient, its state left as it was: y_{t+1} = U_{m_t}(x_t, g_t).

`torch.optim.SGD`, `Adam` and `AdamW` (fused or not) step on copies, a small piece of weights and moments at a time, by
torch's own functions; every other optimizer takes a real step, after which it and the weights are made what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.sgd import sgd

from ..compat import adam_step
from ..distributed import here, is_spread, spread_as
from .buckets import in_memory_order, is_dense
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
    apart: Sequence[int] | None = None,
) -> bool:
    """Write the look-ahead weights y_{t+1} (Algorithm 2, look-ahead) into `out`.

    Each group's own learning rate, weight decay and moments are used, with bias correction at step count t + 1.
    Parameters, the optimizer with all that it holds, and global generators are left as they were.

    Args:
        base_optimizer: U, with its state m_t.
        params: x_t, all of the optimizer's parameters or some; what it does not hold stays where it is. Of those that FSDP2 has
            sharded the rest are the shards that are here.
        ascent_grads: g_t, same shapes; None for a parameter without a gradient.
        out: receives y_{t+1}, same shapes; may be `ascent_grads`.
        scale: what clipping multiplies g_t by, in (0, 1].
        on_trial: whether a step that has to be undone is taken twice, to see that nothing is left of the first.
        apart: a number for each parameter, as that of its bucket. Those of different numbers are not stepped as one on a CPU, whose
            roundings depend on a number's place in memory: who takes some of the buckets has the bits of who takes all.

    Returns:
        Whether there was such a trial and it moved a weight: one at a learning rate of 0 shows nothing.

    Raises:
        ValueError: in a trial the second step went elsewhere, or the optimizer spoke to other processes.
    """
    held = {id(param) for group in base_optimizer.param_groups for param in group["params"]}
    moves: dict[int, _Move] = {}
    for i, (param, grad, place) in enumerate(zip(params, ascent_grads, out, strict=True)):
        if grad is not None and id(param) in held:
            moves[id(param)] = _Move(param, grad, place, _kept_of(base_optimizer, param), apart[i] if apart else 0)
        else:
            place.copy_(here(param))
    if any(map(is_spread, params)):
        moves = {key: _here(move) for key, move in moves.items()}
    if not moves:
        return False
    in_pieces = _is_known(base_optimizer) and all(map(_is_plain, base_optimizer.param_groups))
    if in_pieces and all(map(_is_flat, moves.values())):
        _step_in_pieces(base_optimizer, moves, scale)
        return False
    grads: Grads = {param: spread_as(param, moves[id(param)].grad) for param in params if id(param) in moves}
    places: Places = {param: place for param, place in zip(params, out, strict=True) if id(param) in held}
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


class _Move(NamedTuple):
    """A parameter, its gradient, where it goes, what the optimizer keeps of it (nothing before its first step), its bucket."""

    param: Tensor
    grad: Tensor
    place: Tensor
    kept: dict[str, Tensor]
    bucket: int


def _kept_of(optimizer: Optimizer, param: Tensor) -> dict[str, Tensor]:
    return {name: value for name, value in optimizer.state.get(param, {}).items() if value is not None}


def _here(move: _Move) -> _Move:
    return move._replace(param=here(move.param), kept={name: here(value) for name, value in move.kept.items()})


def _is_flat(move: _Move) -> bool:
    """Whether a parameter and all that belongs to it are dense and of one layout and precision.

    torch's fused functions walk through memory and look at no strides.
    """
    param = move.param
    shape, stride, dtype = param.shape, param.stride(), param.dtype
    for name, each in (("grad", move.grad), ("place", move.place), *move.kept.items()):
        if name != "step" and (each.stride() != stride or each.shape != shape or each.dtype != dtype):
            return False
    return is_dense(param) and not param.is_complex()


class _Run:
    """Parameters that are stepped as if they were one, or a part of a parameter that is cut.

    Args:
        moves: of these parameters.
        part: of the only one, in the order of its memory; None: all.
    """

    def __init__(self, moves: list[_Move], part: slice | None = None):
        self.moves, self.part = moves, part
        self.alone = len(moves) == 1

    @property
    def kept(self) -> dict[str, Tensor]:
        """What the optimizer keeps of the first, whose step count is that of all."""
        return self.moves[0].kept

    def joined(self, tensors: Callable[[_Move], Tensor]) -> Tensor:
        """What belongs to them, one after the other, ``(n,)``; of one parameter alone without a copy."""
        found = [tensors(move) for move in self.moves]
        if not self.alone:
            return _flatten_dense_tensors(found)
        flat = in_memory_order(found[0])
        return flat if self.part is None else flat[self.part]


def _step_in_pieces(optimizer: Optimizer, moves: dict[int, _Move], scale: float) -> None:
    for group in optimizer.param_groups:
        own = [moves[id(param)] for param in group["params"] if id(param) in moves]
        for piece in _pieces(sorted(own, key=attrgetter("bucket"))):
            _step(optimizer, group, piece, scale)


def _step(optimizer: Optimizer, group: dict, runs: list[_Run], scale: float) -> None:
    # g_t may be where y_{t+1} goes: it is out of the way before x_t is put there.
    scaled = _copies(runs, attrgetter("grad"), scale)
    weights = [run.joined(attrgetter("place" if run.alone else "param")) for run in runs]
    if alone := [each for each, run in zip(weights, runs, strict=True) if run.alone]:
        torch._foreach_copy_(alone, [run.joined(attrgetter("param")) for run in runs if run.alone])
    PIECEWISE[type(optimizer)](weights, scaled, _states(runs), group)
    for run, moved in zip(runs, weights, strict=True):
        if not run.alone:
            places = [move.place for move in run.moves]
            torch._foreach_copy_(places, list(_unflatten_dense_tensors(moved, places)))


def _pieces(moves: list[_Move]) -> Iterator[list[_Run]]:
    """Cut parameters and join small ones, so that a piece holds at most as many numbers as it should."""
    piece, filled, kind, age = [], 0, None, None
    for move, own_age in zip(moves, _ages(moves), strict=True):
        param = move.param
        size, longest = param.numel(), CPU_PIECE if param.is_cpu else DEVICE_PIECE
        own_kind = (param.dtype, move.bucket if param.is_cpu else param.device)
        if piece and (filled + size > longest or kind != own_kind):
            yield [_Run(run) for run in piece]
            piece, filled, age = [], 0, None
        for start in range(0, size, longest) if size > longest else ():
            yield [_Run([move], slice(start, start + longest))]
        if 0 < size <= longest:
            if own_age != age:
                piece.append([])
            piece[-1].append(move)
            filled, kind, age = filled + size, own_kind, own_age
    if piece:
        yield [_Run(run) for run in piece]


def _ages(moves: list[_Move]) -> list[Any]:
    """Equal for parameters whose step is the same computation: after as many steps, with as much that is kept."""
    steps = [move.kept.get("step") for move in moves]
    on_cpu = [step for step in steps if step is not None and step.is_cpu]
    read = iter(torch.stack(on_cpu).tolist() if on_cpu else [])
    # Of counts on a device nobody knows whether they are equal: reading them would stall the queue.
    counts = [next(read) if step is not None and step.is_cpu else id(step) for step in steps]
    return [(count, *move.kept) for count, move in zip(counts, moves, strict=True)]


def _copies(runs: list[_Run], tensors: Callable[[_Move], Tensor], scale: float = 1.0) -> list[Tensor]:
    """Scaled copies of what belongs to each of the runs, ``(n,)``; of single parameters, on a GPU, by one launch for all."""
    found = [run.joined(tensors) for run in runs]
    alone = [i for i, run in enumerate(runs) if run.alone]
    for i, copied in zip(alone, torch._foreach_mul([found[i] for i in alone], scale) if alone else [], strict=True):
        found[i] = copied
    if len(alone) < len(runs):
        torch._foreach_mul_([flat for run, flat in zip(runs, found, strict=True) if not run.alone], scale)
    return found


def _states(runs: list[_Run]) -> list[dict[str, Tensor]]:
    """Copies of what the optimizer keeps, but for the step count."""
    states: list[dict[str, Tensor]] = [{"step": run.kept["step"]} if "step" in run.kept else {} for run in runs]
    for name in {name: None for run in runs for name in run.kept if name != "step"}:
        holders = [i for i, run in enumerate(runs) if name in run.kept]
        copies = _copies([runs[i] for i in holders], lambda move, name=name: move.kept[name])
        for i, copied in zip(holders, copies, strict=True):
            states[i][name] = copied
    return states


def _sgd(weights: list[Tensor], grads: list[Tensor], states: list[dict], group: dict) -> None:
    """U of `torch.optim.SGD`, with momentum, Nesterov, dampening and weight decay as the group says."""
    velocities = [state.get("momentum_buffer") for state in states]
    names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    sgd(weights, grads, velocities, **{name: group[name] for name in names})


def _adam(
    weights: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, *, decoupled: bool = False
) -> None:
    """U of `torch.optim.Adam` and `AdamW`; always the fused form, which is one pass over memory."""

    def moments(name: str) -> list[Tensor]:
        found = zip(weights, states, strict=True)
        return [state[name] if state else torch.zeros_like(weight) for weight, state in found]

    names = ("amsgrad", "lr", "weight_decay", "eps", "maximize")
    adam_step(
        weights,
        grads,
        moments("exp_avg"),
        moments("exp_avg_sq"),
        moments("max_exp_avg_sq") if group["amsgrad"] else [],
        [_count(state, weight.device) for weight, state in zip(weights, states, strict=True)],
        fused=True,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        decoupled_weight_decay=group.get("decoupled_weight_decay", decoupled),
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
    AdamW: partial(_adam, decoupled=True),
}

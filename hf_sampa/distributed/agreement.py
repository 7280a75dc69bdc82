"""Processes that must compute the same: what differs between them is found, and named, before or within one step."""

from __future__ import annotations

import math
from typing import Any

from .exchange import Exchange
from .roles import Role


# Relative. A CPU repeats itself, but for code that compiles itself; elsewhere, and between processes, sums may be in other orders.
REPEATED, SAME = 1e-6, 1e-3


def check_ranks_agree(
    exchange: Exchange, weights: list[int], settings: list[int], own_settings: dict[str, Any], shards: int = 1
) -> None:
    """Raise RuntimeError, on all ranks, where weights or settings differ between them.

    Args:
        exchange: connects the processes.
        weights: fingerprint of each rank's weights, or of its shard of them.
        settings: fingerprint of each rank's settings.
        own_settings: of this rank, by name.
        shards: into how many the weights are cut.
    """
    if len(set(settings)) > 1:
        differing = differences(exchange.share_objects(own_settings))
        raise RuntimeError(
            f"Expected all processes to compute this step with the same settings, but they differ: {'; '.join(differing)}. A "
            "callback that changes a setting has to do so on every process, by the same amount."
        )
    like = [exchange.mesh.first_with(rank, shards) for rank in range(len(weights))]
    others = [rank for rank, found in enumerate(weights) if found != weights[like[rank]]]
    if others:
        raise RuntimeError(
            f"Expected all processes to hold the same weights, but rank(s) {', '.join(map(str, others))} hold others than rank "
            f"{like[others[0]]}. Something changed them on some processes only, or differently: a callback, a forward pass that writes to trained "
            "weights (as one that initialises them from the first batch; do that before training), gradients that training_step "
            "begins to change after some steps (set overlap_exchange=False), an optimizer that draws "
            "random numbers or keeps state where SAMPa does not see it, or hardware. The weights of this step are not to be trusted; "
            "resume from the last checkpoint."
        )


def check_same_start(exchange: Exchange, own: dict[str, Any]) -> None:
    """Raise ValueError, on all ranks, where processes are about to train different things. A collective.

    Args:
        exchange: connects the processes.
        own: of this process, by name: plain values that must be equal on all.
    """
    if differing := differences(exchange.share_objects(own)):
        more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
        raise ValueError(
            f"Expected all processes to train the same model on the same data with the same settings, but they differ: "
            f"{'; '.join(differing[:5])}{more}. Make them equal on every process."
        )


def check_rest_alike(exchange: Exchange, own: dict[str, int]) -> None:
    """Raise RuntimeError, on all ranks, where what no step moves differs between them. A collective.

    Args:
        exchange: connects the processes.
        own: of this process, fingerprints by name.
    """
    if differing := differences(exchange.share_objects(own)):
        names = [each.partition(": ")[0] for each in differing]
        more = f" (and {len(names) - 5} more)" if len(names) > 5 else ""
        raise RuntimeError(
            f"Expected all processes to hold the same modules, frozen weights and buffers, but these differ: "
            f"{', '.join(names[:5])}{more}. A callback that changes them has to do so on every process. What was trained since "
            "is not to be trusted; resume from the last checkpoint."
        )


def check_repeatable(exchange: Exchange, found: list[tuple[float, float]], batch: int, exact: bool) -> None:
    """Raise RuntimeError, on all ranks, where a pass is not the same thing twice, or not on both processes of a pair. A collective.

    Args:
        exchange: connects the processes.
        found: by this process, of one batch at the same weights, twice: loss and norm of the gradient; nothing where it could not.
        batch: its fingerprint.
        exact: whether this device repeats itself.
    """
    of_all = exchange.share_objects((found or [(math.nan, math.nan)] * 2, batch))
    for rank, ((first, again), _) in enumerate(of_all):
        if not _close(first, again, REPEATED if exact else SAME):
            raise RuntimeError(
                "Expected a pass to leave nothing behind that changes the next one, but of one batch at the same weights the loss "
                f"was {first[0]:.9g} and then {again[0]:.9g}, the norm of the gradient {first[1]:.9g} and then {again[1]:.9g} (rank "
                f"{rank}). A step makes several passes. Make teachers and queues buffers or modules, keep counters and lists as "
                "attributes of the trainer from its __init__ on, draw from global generators or from attributes of the trainer or of a "
                "module, and read data through the training loader."
            )
    mesh = exchange.mesh
    for rank, other in zip(mesh.ranks_of(Role.PERTURBED), mesh.ranks_of(Role.LOOKAHEAD), strict=True):
        ((one, _), read), ((two, _), also_read) = of_all[rank], of_all[other]
        if read == also_read and not _close(one, two, SAME):
            raise RuntimeError(
                f"Expected both processes of a pair to compute the same loss of the same batch at the same weights, but rank {rank} "
                f"found {one[0]:.9g} and rank {other} {two[0]:.9g} (norms of the gradient: {one[1]:.9g} and {two[1]:.9g}). Something "
                "else differs between them: code that asks for the rank, attributes of the trainer or of a module (a dropout rate, a "
                "weight of the loss), or files that they read. Make it equal on every process."
            )


def _close(one: tuple[float, float], other: tuple[float, float], tolerance: float) -> bool:
    """Whether losses and norms are equal to rounding; what is not finite says nothing."""
    pairs = zip(one, other, strict=True)
    return all(
        math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-3 * tolerance) or not (math.isfinite(a) and math.isfinite(b))
        for a, b in pairs
    )


def differences(of_ranks: list[dict[str, Any]]) -> list[str]:
    """What differs from rank 0, each as ``name: X on rank 0, Y on rank r``."""
    found = []
    for name in {name: None for of_rank in of_ranks for name in of_rank}:
        first = of_ranks[0].get(name)
        other = next((rank for rank, each in enumerate(of_ranks) if not _same(each.get(name), first)), None)
        if other is not None:
            found.append(f"{name}: {first!r} on rank 0, {of_ranks[other].get(name)!r} on rank {other}")
    return found


def _same(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)

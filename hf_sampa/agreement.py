"""Processes that must compute the same: what differs between them is found, and named, before or within one step."""

from __future__ import annotations

from typing import Any

from .exchange import Exchange


def check_ranks_agree(
    exchange: Exchange, weights: list[int], settings: list[int], own_settings: dict[str, Any]
) -> None:
    """Raise RuntimeError, on all ranks, where weights or settings differ between them.

    Args:
        exchange: connects the processes.
        weights: fingerprint of each rank's weights.
        settings: fingerprint of each rank's settings.
        own_settings: of this rank, by name.
    """
    if len(set(settings)) > 1:
        differing = differences(exchange.share_objects(own_settings))
        raise RuntimeError(
            f"Expected all processes to compute this step with the same settings, but they differ: {'; '.join(differing)}. A "
            "callback that changes a setting has to do so on every process, by the same amount."
        )
    if len(set(weights)) > 1:
        others = [rank for rank, found in enumerate(weights) if found != weights[0]]
        raise RuntimeError(
            f"Expected all processes to hold the same weights, but rank(s) {', '.join(map(str, others))} hold others than rank "
            "0. Something changed them on some processes only, or differently: a callback, an optimizer that draws random "
            "numbers or keeps state where SAMPa does not see it, or hardware. The weights of this step are not to be trusted; "
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

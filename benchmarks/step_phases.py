"""Where the milliseconds of a step go, from the labels in a profile."""

from __future__ import annotations

from collections.abc import Iterable


# What hf_sampa (and bench_trainer's plain Trainer) and torch call the phases of a step, and what the tables call them.
LABELS = {
    "SAMPa.data": "data",
    "SAMPa.displace": "displace",
    "SAMPa.gradient": "forward and backward",
    "SAMPa.exchange": "exposed exchange",
    "SAMPa.combine": "combine",
    "SAMPa.check": "check",
    "Optimizer.step#AdamW.step": "base step",
}
REST = "rest"
PHASES = (*LABELS.values(), REST)


def milliseconds_by_phase(
    intervals: Iterable[tuple[str, float, float]], *, total: float, steps: int
) -> dict[str, float]:
    """Milliseconds per step of each of `PHASES`; together they are `total` milliseconds.

    A label inside another one is taken from it: waiting for the other process during backward is exchange. One thread
    at a time is at work, so that it does not matter in which of them a label is.

    Args:
        intervals: label, start and end in microseconds; labels that are not among `LABELS` are left out.
        total: milliseconds per step, by the clock.
        steps: in all `intervals`.
    """
    spent = dict.fromkeys(LABELS.values(), 0.0)
    around: list[tuple[str, float]] = []  # phase and end of the intervals that the current one lies in
    known = [(LABELS[label], start, end) for label, start, end in intervals if label in LABELS]
    for phase, start, end in sorted(known, key=lambda interval: (interval[1], -interval[2])):
        while around and around[-1][1] <= start:
            around.pop()
        spent[phase] += end - start
        if around:
            spent[around[-1][0]] -= end - start
        around.append((phase, end))
    spent = {phase: microseconds / 1000 / steps for phase, microseconds in spent.items()}
    return {**spent, REST: total - sum(spent.values())}

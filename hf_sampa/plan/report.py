"""A plan in words, and as an object for programs."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from ..distributed import Mesh, Role
from .activations import SINGLE
from .layouts import Layout
from .memory import GB, LEFT_FREE, Memory, Run, largest_batch
from .start import arguments, as_code, command


WIDTH = 100
UNITS = {"GB": GB, "MB": 10**6, "KB": 10**3}


@dataclass(frozen=True)
class Plan:
    """A run and how it is spread.

    Attributes:
        run: what is planned.
        layout: where.
        held: by each device.
        capacity: of a device, in bytes.
        fits: whether what is held, as far as it is known, leaves enough free.
        would_fit: what to change if it does not.
        unused: options on which no figure depends.
    """

    run: Run
    layout: Layout
    held: Memory
    capacity: float
    fits: bool
    would_fit: list[str]
    unused: list[str]

    @property
    def largest_batch(self) -> int | None:
        return largest_batch(self.run, self.layout, usable(self.capacity))


def usable(capacity: float) -> float:
    """Of a device's bytes, what tensors can have."""
    return (1 - LEFT_FREE) * capacity


def as_object(plan: Plan) -> dict[str, Any]:
    """For ``--json``: bytes as they are; None for what is not known."""
    run, layout, held = plan.run, plan.layout, plan.held
    return {
        "model": run.size.name,
        "architecture": run.size.kind,
        "weights": run.size.weights,
        "trained": run.trained,
        "method": layout.method,
        "processes": layout.devices,
        "nodes": layout.nodes,
        "roles": _roles(layout),
        "mesh": {"roles": 1 + layout.paired, "replicas": layout.replicas, "shards": layout.shards},
        "samples_per_update": run.batch * layout.per_role,
        "largest_batch": plan.largest_batch,
        "tokens_per_sample": run.tokens,
        "bytes_per_device": {
            "trained": held.trained,
            "frozen": held.frozen,
            "gathered": held.gathered,
            "activations": held.activations,
            "total": held.total,
        },
        "usable_bytes_per_device": round(usable(plan.capacity)),
        "fits": plan.fits,
        "uncertain": _uncertain(plan) if plan.fits else [],
        "would_fit": plan.would_fit,
        "not_used": plan.unused,
        "sent_across_the_pair": _sent(plan),
        "command": command(layout),
        "arguments": arguments(run, layout),
    }


def as_text(plan: Plan) -> str:
    """For people."""
    run, layout = plan.run, plan.layout
    kind = f"{run.size.kind}, " if run.size.kind else ""
    part = "all of them trained" if run.trained == run.size.weights else f"{_count(run.trained)} of them trained"
    lines = [f"{run.size.name}: {kind}{_count(run.size.weights)} weights, {part}", ""]
    lines += _row("processes", _processes(layout))
    lines += _row("mesh", _mesh(layout))
    lines += _row("batch", _batch(plan))
    if layout.paired:
        lines += _row("pairs", _pairs(plan))
    if layout.nodes > 1:
        lines += _row("chosen", "by memory alone; another mesh, as of FSDP2, may be faster: docs/scaling.md has times")
    if plan.unused:
        lines += [f"not used: {', '.join(plan.unused)}, on which no figure here depends"]
    lines += [
        "",
        "Per device, what tensors of weights, gradients and optimizer hold at most, and an estimate of the rest:",
    ]
    lines += _table(plan)
    if not plan.fits:
        return "\n".join(lines)
    lines += ["", *textwrap.wrap(_verdict(plan), WIDTH), ""]
    where = " on every node" if layout.nodes > 1 else ""
    lines += [f"Start it{where}:", f"  {command(layout)}", "with", *_indented(as_code(arguments(run, layout), layout))]
    return "\n".join(lines)


def what_is_missing(plan: Plan) -> str:
    """One sentence for a run that does not fit."""
    lacking = plan.held.total - usable(plan.capacity)
    change = (
        f"It would with {', or with '.join(plan.would_fit)}."
        if plan.would_fit
        else "Nothing that this command knows of would do."
    )
    return f"It does not fit: {_size(lacking)} per device are missing. {change}"


def _processes(layout: Layout) -> str:
    where = f" on {layout.nodes} nodes, {layout.per_node} each" if layout.nodes > 1 else ""
    if layout.method == "sampa" and not layout.paired:
        return "1, in both roles in turn: the numbers of a pair without its speed"
    if not layout.paired:
        return f"{layout.devices}{where}, all in one role"
    if layout.pairs_on_one_node:
        return f"{layout.devices}{where}: PERTURBED even ranks, LOOKAHEAD odd ranks"
    return f"{layout.devices}{where}: " + ", ".join(f"{name} {_ranks(each)}" for name, each in _roles(layout).items())


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _roles(layout: Layout) -> dict[str, list[int]]:
    mesh = Mesh(layout.devices, 0, layout.paired, neighbours=layout.pairs_on_one_node)
    return {role.name: mesh.ranks_of(role) for role in Role} if layout.paired else {}


def _mesh(layout: Layout) -> str:
    role = " in each role" if layout.paired else ""
    if layout.shards == 1:
        shared = "; one optimizer for both" if layout.sharing == 2 else "; one optimizer for all"
        return f"{_plural(layout.replicas, 'replica')}{role}, with whole weights{shared if layout.shared else ''}"
    shared = "; one optimizer for both" if layout.shared else ""
    return f"{_plural(layout.replicas, 'replica')} of {layout.shards} shards{role} (FSDP2){shared}"


def _batch(plan: Plan) -> str:
    run, largest = plan.run, plan.largest_batch
    most = "" if largest is None else f" (at most {largest} fit{'s' if largest == 1 else ''} this mesh)"
    tokens = f", of {run.tokens} tokens each" if run.tokens else ""
    return f"{run.batch} per device{most}, {_plural(run.batch * plan.layout.per_role, 'sample')} per update{tokens}"


def _pairs(plan: Plan) -> str:
    layout = plan.layout
    ranks = "2r and 2r + 1" if layout.pairs_on_one_node else f"r and r + {layout.per_role}"
    place = "on one node" if layout.nodes == 1 or layout.pairs_on_one_node else "on different nodes"
    # Without room for a replica of each role on a node, an odd number of nodes leaves whole weights only.
    middle = " (the middle one has both roles)" if place == "on different nodes" and layout.nodes % 2 else ""
    return f"ranks {ranks}, {place}{middle}; each sends the other {_size(_sent(plan))} per step, and receives as much"


def _sent(plan: Plan) -> int:
    """Bytes that one half of a pair sends to the other in a step, on average: of a gradient what its pair adds up, or half of that and as
    many displaced weights; of shards all of a gradient, or of halves of it and of the weights what is lacking."""
    layout, trained = plan.layout, plan.run.trained
    of_shards = (1.5 if layout.shared else 1) * trained / layout.shards
    return round(SINGLE * (of_shards if layout.shards > 1 else trained / layout.per_role)) if layout.paired else 0


def _table(plan: Plan) -> list[str]:
    run, layout, held = plan.run, plan.layout, plan.held
    again = "layers computed again; " if run.checkpointing else ""
    lines = [_line(held.trained, "what is trained", _units(plan))]
    if run.frozen:
        lines.append(
            _line(held.frozen, "frozen weights", f"{run.frozen_bytes} bytes each, and copies that autocast makes")
        )
    if layout.shards > 1:
        lines.append(_line(held.gathered, "gathered at once", "the largest parts; read in FSDP2's code, not measured"))
    lines.append(_line(held.activations, "activations", f"{again}an estimate, by arXiv 2205.05198"))
    known = held.activations is not None and held.gathered is not None
    lines.append(_line(held.total, "together", "" if known else "without what is not known"))
    left = f"{plan.capacity / GB:g} GB, {LEFT_FREE:.0%} of them left free"
    return [*lines, _line(usable(plan.capacity), "there is", left)]


def _verdict(plan: Plan) -> str:
    uncertain = _uncertain(plan)
    return f"It fits, as far as is known: {'; '.join(uncertain)}." if uncertain else "It fits."


def _uncertain(plan: Plan) -> list[str]:
    """Why a run may not fit that is said to fit."""
    held = plan.held
    sizes = {"activations": held.activations, "what is gathered at once": held.gathered}
    unknown = [name for name, size in sizes.items() if size is None]
    found = [f"not counted: {' and '.join(unknown)}"] if unknown else []
    if plan.layout.shards > 1:
        return [*found, "no process under FSDP2 was measured"]
    # As docs/cost.md has of processes, and docs/launching.md of estimates.
    more, left = SINGLE * plan.run.trained + (held.activations or 0) / 3, plan.capacity - held.total
    if left < more:
        third = " and a third of the activations" if held.activations else ""
        found.append(f"runs took up to 1 d{third} more, here {_size(more)}, and {_size(left)} are left")
    return found


def _units(plan: Plan) -> str:
    """Where the figure of what is trained comes from."""
    units = f"{plan.held.units * plan.layout.shards:.2f}".rstrip("0").rstrip(".")
    if plan.layout.shards > 1:
        return f"{units} d of 4 bytes over {plan.layout.shards} shards, by arithmetic"
    return f"{units} d of 4 bytes, counted; measured 0.1 to 1 d more (docs/cost.md)"


def _line(size: float | None, name: str, why: str) -> str:
    if size is None:
        return f"  {'not known':>10}  {name}"
    return f"  {_size(size):>10}  {name:18}{why}".rstrip()


def _row(name: str, said: str) -> list[str]:
    return textwrap.wrap(f"{name:11}{said}", WIDTH, subsequent_indent=" " * 11)


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _plural(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _size(count: float) -> str:
    """Three digits: 1.25 GB, 12.5 GB, 125 MB."""
    unit = next((unit for unit, size in UNITS.items() if count >= size), "KB")
    size = count / UNITS[unit]
    return f"{size:.0f} {unit}" if size >= 100 else f"{size:.1f} {unit}" if size >= 10 else f"{size:.2f} {unit}"


def _count(number: int) -> str:
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return str(number)

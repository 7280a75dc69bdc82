"""What a device holds at most, counted as `docs/cost.md` and `benchmarks/memory.py` count it: d trained weights, four bytes each.

A process has x_t, the displaced weights, one gradient (g_t and what is displaced share memory), and what the optimizer keeps of
each weight. Where no other role's gradient comes, the gradient takes what displaced weights give back, a parameter at a time. With a
shared optimizer a process of a pair has x_t and state of its own part. Plain Trainer has no displaced weights; under DDP, on several
devices, it has gradients twice, its own and DDP's buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .activations import HALF, SINGLE, activation_bytes
from .layouts import Layout
from .model_size import ModelSize


# Numbers that an optimizer keeps for each weight.
STATE = {"adamw": 2, "sgd": 0, "sgd_momentum": 1}
GB = 10**9
# Of a device: what its driver, NCCL and gaps between tensors take. On one H100 a run with 67 M weights took 5 to 10 % more than tensors hold.
LEFT_FREE = 0.1


@dataclass(frozen=True)
class Run:
    """What is to be planned.

    Attributes:
        size: of the model.
        trained: d, how many of the weights are trained.
        optimizer: one of `STATE`.
        batch: samples per device and pass.
        tokens: per sample; None where activations are not known.
        bf16: whether passes compute in 16 bits.
        checkpointing: whether layers are computed again in backward.
        frozen_bytes: of a weight that is not trained.
    """

    size: ModelSize
    trained: int
    optimizer: str
    batch: int
    tokens: int | None
    bf16: bool
    checkpointing: bool
    frozen_bytes: int

    @property
    def frozen(self) -> int:
        return self.size.weights - self.trained


@dataclass(frozen=True)
class Memory:
    """Bytes on a device; None for what is not known.

    Attributes:
        units: how many numbers per trained weight.
        trained: weights that are trained, and all that belongs to them.
        frozen: weights that are not.
        gathered: what FSDP2 holds whole for a moment.
        activations: what a forward pass keeps.
    """

    units: float
    trained: int
    frozen: int
    gathered: int | None
    activations: int | None

    @property
    def total(self) -> int:
        """Of what is known."""
        return sum(each or 0 for each in (self.trained, self.frozen, self.gathered, self.activations))


def memory(run: Run, layout: Layout) -> Memory:
    """What each device of `layout` holds."""
    units = _units_of_d(run, layout) / layout.shards
    activations = (
        activation_bytes(run.size.shape, run.batch, run.tokens, bf16=run.bf16, checkpointing=run.checkpointing)
        if run.size.shape
        else None
    )
    return Memory(
        units, round(SINGLE * run.trained * units), _frozen(run, layout), _gathered(run, layout), activations
    )


def largest_batch(run: Run, layout: Layout, usable: float) -> int | None:
    """Samples per device and pass with which a device of `layout` holds at most `usable` bytes; None where activations are not known."""
    held = memory(replace(run, batch=1), layout)
    if held.activations is None:
        return None
    return max(0, int((usable - held.total + held.activations) // held.activations))


def without_effect(run: Run, layout: Layout) -> list[str]:
    """Options that were given, and on which nothing depends that is held."""
    defaults = {
        "--frozen-bytes": {"frozen_bytes": SINGLE},
        "--bf16": {"bf16": False},
        "--gradient-checkpointing": {"checkpointing": False},
    }
    others = {option: replace(run, **default) for option, default in defaults.items()}
    held = memory(run, layout)
    return [option for option, other in others.items() if other != run and memory(other, layout) == held]


def _units_of_d(run: Run, layout: Layout) -> float:
    """Numbers per trained weight, before they are spread over shards."""
    state, largest = STATE[run.optimizer], min(1.0, (run.size.largest or run.trained) / run.trained)
    if layout.method == "adamw":
        return 2 + state + (layout.devices > 1 and layout.shards == 1)
    part = 1 / layout.sharing
    if layout.shards > 1:
        return 3 + state * part
    if layout.paired:
        # Parts are made of whole parameters.
        return 2 + (1 + state) * max(part, largest if layout.shared and run.size.largest else 0)
    # In both roles it keeps the one gradient while it takes the other.
    return 2 + state * part + largest + (layout.method == "sampa")


def _frozen(run: Run, layout: Layout) -> int:
    """Under autocast, whole weights of 32 bits have a copy in 16 until backward."""
    copied = run.bf16 and run.frozen_bytes == SINGLE and layout.shards == 1 and not run.checkpointing
    return round(run.frozen * (run.frozen_bytes + copied * HALF) / layout.shards)


def _gathered(run: Run, layout: Layout) -> int | None:
    """Read in FSDP2's code, not measured: the weights of two units, of which one is fetched ahead, and of what is in none, which stays whole;
    the largest unit's gradient, and once more on its way to those who add it up."""
    if layout.shards == 1:
        return 0
    if run.size.units is None:
        return None
    largest, second, *_ = [*sorted(run.size.units, reverse=True), 0, 0]
    root, of_gradients = run.size.root, run.trained / run.size.weights
    within = root + largest + second + 2 * largest * of_gradients
    at_the_end = root + 2 * root * of_gradients
    return round((HALF if run.bf16 else SINGLE) * max(within, at_the_end))

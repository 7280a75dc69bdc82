"""``python -m hf_sampa plan MODEL``: its options, and what they mean for the model."""

from __future__ import annotations

import argparse
import json
import sys

from .activations import HALF, SINGLE
from .advice import what_would_fit
from .layouts import first_that_fits, layouts
from .memory import GB, STATE, Run, memory, without_effect
from .model_size import ModelSize, as_number, model_size
from .report import Plan, as_object, as_text, usable, what_is_missing


PER_NODE = 8
TOKENS = 512
MOST_DEVICES = 2**20  # every number of shards is tried


def plan(argv: list[str]) -> None:
    """Print the plan that `argv` asks for.

    Raises:
        SystemExit: an option does not make sense (2), or nothing fits (1).
    """
    options = parser().parse_args(argv)
    try:
        made = plan_of(options, model_size(options.model))
    except ValueError as error:
        parser().error(str(error))
    print(json.dumps(as_object(made), indent=2) if options.json else as_text(made))
    if not made.fits:
        sys.exit(what_is_missing(made))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m hf_sampa plan",
        description="Which processes, roles, mesh, batch and memory to expect of a run, and how to start it. It loads no weights.",
        epilog="Memory of weights, gradients and optimizer is counted, activations are estimated. A plan has the fewest shards that fit; "
        "the other processes are replicas. It ends with 1 where nothing fits.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("model", help="a folder, a name on the Hub, or a number of weights, as 7e9, 7B or 350M")
    add("--devices", type=_whole, required=True, help="how many GPUs there are; one process each")
    add("--memory", type=_positive, required=True, help="of each, in GB")
    add("--devices-per-node", type=_whole, help=f"GPUs of one machine (default: up to {PER_NODE})")
    add("--method", choices=("sampa", "sam", "adamw"), default="sampa", help="adamw: plain Trainer (default: sampa)")
    add("--batch", type=_whole, default=8, help="samples per device and pass (default: 8)")
    add("--seq", type=_whole, help=f"tokens per sample (default: what the model takes, up to {TOKENS})")
    add("--bf16", action="store_true", help="passes in 16 bits; weights stay in 32")
    add("--gradient-checkpointing", action="store_true", help="layers are computed again in backward")
    add("--optimizer", choices=list(STATE), default="adamw", help="(default: adamw)")
    add("--trainable", default="100%", help="how many weights are trained, or which part: 20M, 1%% (default: all)")
    add("--frozen-bytes", type=int, choices=(HALF, SINGLE), default=SINGLE, help="of a frozen weight (default: 4)")
    add("--json", action="store_true", help="for programs")
    return made


def plan_of(options: argparse.Namespace, size: ModelSize) -> Plan:
    """Raises ValueError for options that do not go together, or not with the model."""
    per_node = options.devices_per_node or min(PER_NODE, options.devices)
    _check_devices(options, per_node)
    run = Run(
        size=size,
        trained=_trained(options.trainable, size.weights),
        optimizer=options.optimizer,
        batch=options.batch,
        tokens=_tokens(options.seq, size),
        bf16=options.bf16,
        checkpointing=options.gradient_checkpointing,
        frozen_bytes=options.frozen_bytes,
    )
    capacity = options.memory * GB

    def best(run: Run, devices: int):
        # More devices than there are come as more nodes.
        on_a_node = per_node if devices % per_node == 0 else devices
        found = layouts(options.method, devices, on_a_node, state=STATE[run.optimizer] > 0)
        return first_that_fits(found, lambda layout: memory(run, layout).total, usable(capacity))

    layout, fits = best(run, options.devices)
    advice = [] if fits else what_would_fit(run, options.devices, lambda *changed: best(*changed)[1])
    unused = [*(["--seq"] if options.seq and run.tokens is None else []), *without_effect(run, layout)]
    return Plan(run, layout, memory(run, layout), capacity, fits, advice, unused)


def _check_devices(options: argparse.Namespace, per_node: int) -> None:
    devices = options.devices
    if devices > MOST_DEVICES:
        raise ValueError(f"--devices: expected at most {MOST_DEVICES}, got {devices}. Plan with fewer")
    if options.method == "sampa" and devices > 1 and devices % 2:
        raise ValueError(
            f"--devices: expected an even number, or 1, because SAMPa pairs processes, got {devices}. Plan with {devices - 1}, or with "
            "--method sam"
        )
    if devices % per_node:
        divisor = next(each for each in range(per_node, 0, -1) if devices % each == 0)
        raise ValueError(
            f"--devices: expected a multiple of the {per_node} devices of a node, got {devices}. Set --devices-per-node to a number "
            f"that divides {devices}, as {divisor}"
        )


def _tokens(given: int | None, size: ModelSize) -> int | None:
    """Per sample. None where nothing is estimated of them."""
    shape = size.shape
    if shape is None:
        return None
    if given and shape.tokens:
        raise ValueError(
            f"--seq: expected none for {size.kind}, which makes {shape.tokens} tokens of a picture, got {given}"
        )
    if given and shape.longest and given > shape.longest:
        raise ValueError(f"--seq: expected at most {shape.longest}, which {size.kind} takes, got {given}")
    return given or shape.tokens or min(shape.longest or TOKENS, TOKENS)


def _trained(given: str, weights: int) -> int:
    """Of ``20M`` or ``1%``."""
    try:
        found = float(given[:-1]) / 100 * weights if given.endswith("%") else as_number(given) or 0
    except ValueError:
        found = 0
    if not 0 < found <= weights:
        raise ValueError(
            f"--trainable: expected a number of the model's {weights} weights or a part of them, as 20M or 1%, got {given}"
        )
    return max(1, round(found))


def _whole(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {given!r}")
    return int(given)


def _positive(given: str) -> float:
    try:
        found = float(given)
    except ValueError:
        found = 0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of GB above 0, got {given!r}")
    return found

"""One process of rank_scaling.py: times one collective over gloo each time it is told to.

Reads lines like `reduce 4194304`, kind and bytes, or `stop` from its input, and answers each with one line of JSON on its output: the
seconds of each repetition.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist


WARM_UPS = 2


def transfer(kind: str, size: int) -> Callable[[], object]:
    """What moves `size` bytes of fp32: to the other half of the pair and back, or once through all processes."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    mine, theirs = torch.ones(size // 4), torch.ones(size // 4)
    part = theirs.chunk(processes)[rank]
    peer = (rank + processes // 2) % processes

    def swap() -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]):
            work.wait()

    return {
        "swap": swap,
        "reduce": lambda: dist.reduce(mine, dst=0),
        "broadcast": lambda: dist.broadcast(mine, src=0),
        "all_gather": lambda: dist.all_gather_into_tensor(mine, part),
        "all_reduce": lambda: dist.all_reduce(mine),
    }[kind]


def timed(move: Callable[[], object], repetitions: int) -> list[float]:
    """Seconds of each repetition, which all processes begin together."""
    found = []
    for _ in range(WARM_UPS + repetitions):
        dist.barrier()
        started = time.perf_counter()
        move()
        found.append(time.perf_counter() - started)
    return found[WARM_UPS:]


def main(method: str, repetitions: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for line in sys.stdin:
        kind, _, size = line.strip().partition(" ")
        if kind == "stop":
            break
        print(json.dumps({"seconds": timed(transfer(kind, int(size)), repetitions)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

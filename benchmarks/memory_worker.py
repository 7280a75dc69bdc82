"""One training process of memory.py: trains a few steps and answers with the highest memory it took, in bytes.

Either what tensors held (`counted`), from the allocator's own reports, or what the process took of the machine
(`measured`). One run cannot tell both on the CPU, since the reports take memory themselves. On a GPU, it is the
allocator's two figures: what tensors asked for, and what they were given.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from bench_trainer import make_trainer
from torch.distributed import distributed_c10d
from torch.nn.modules.module import register_module_full_backward_pre_hook
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback


def resident(field: str) -> int:
    """Bytes of the machine's memory that this process has, now (`VmRSS`) or at most (`VmHWM`); Linux only."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def released_here(collective: Callable[..., Any]) -> Callable[..., Any]:
    """`collective`, which returns, or of what goes on by itself the end comes, only once no other thread holds the tensors that it was given."""

    @wraps(collective)
    def call(*args, **kwargs):
        given = [each for arg in args for each in (arg if isinstance(arg, list) else [arg])]
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        before = [tensor._use_count() for tensor in tensors]
        result = collective(*args, **kwargs)
        if kwargs.get("async_op"):
            return Going([result], tensors, before)
        wait_for_release(tensors, before)
        return result

    return call


class Going:
    """What a collective that goes on by itself returns."""

    def __init__(self, works: list[dist.Work], tensors: list[torch.Tensor], before: list[int]):
        self.works, self.tensors, self.before = works, tensors, before

    def wait(self) -> None:
        self.works.pop().wait()
        wait_for_release(self.tensors, self.before)
        self.tensors.clear()


def wait_for_release(tensors: list[torch.Tensor], before: list[int]) -> None:
    """Until each of `tensors` has as few owners as `before`, in C++."""
    while any(tensor._use_count() > own for tensor, own in zip(tensors, before, strict=True)):
        time.sleep(1e-4)


class CountedOnCPU:
    """Peak of what tensors hold on the CPU: the sum of all allocations and releases, each as it happens.

    Only this thread's are reported. One of gloo's may be the last to let go of what was sent to all, if the machine is
    busy; that release would be missing from there on.
    """

    def __enter__(self) -> CountedOnCPU:
        self.patches = [
            patch.object(module, name, released_here(getattr(module, name)))
            for name in ("broadcast", "all_gather")
            for module in (dist, distributed_c10d)  # where the package, and where torch itself, look them up
        ]
        for each in self.patches:
            each.start()
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()
        return self

    def __exit__(self, *error) -> None:
        self.profiler.stop()
        for each in self.patches:
            each.stop()

    def peak(self) -> int:
        events = self.profiler.profiler.kineto_results.events()
        held = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak


class MeasuredOnCPU:
    """Growth of the process."""

    def __enter__(self) -> MeasuredOnCPU:
        gc.collect()
        self.before = resident("VmRSS")
        return self

    def __exit__(self, *error) -> None:
        self.after = resident("VmHWM")

    def peak(self) -> int:
        return self.after - self.before


class OnGPU:
    """Peak of the CUDA allocator: `requested_bytes` of tensors, or `allocated_bytes`, rounded up to whole blocks."""

    def __init__(self, figure: str):
        self.figure = figure

    def __enter__(self) -> OnGPU:
        return self  # a fresh process has taken nothing yet

    def __exit__(self, *error) -> None: ...

    def peak(self) -> int:
        return torch.cuda.memory_stats()[f"{self.figure}.all.peak"]


METERS = {
    ("cpu", "counted"): CountedOnCPU,
    ("cpu", "measured"): MeasuredOnCPU,
    ("cuda", "counted"): lambda: OnGPU("requested_bytes"),
    ("cuda", "measured"): lambda: OnGPU("allocated_bytes"),
}


class OutOfStep:
    """Within the block the backward pass of every module waits for up to `seconds`, at random and on each process for itself."""

    def __init__(self, seconds: float):
        self.seconds, self.generator = seconds, random.Random(os.getpid())

    def __enter__(self) -> None:
        self.handle = register_module_full_backward_pre_hook(self.wait) if self.seconds else None

    def __exit__(self, *error) -> None:
        if self.handle:
            self.handle.remove()

    def wait(self, *_) -> None:
        time.sleep(self.seconds * self.generator.random() ** 4)


def main(device: str, figure: str, method: str, steps: int, out_of_step: float = 0.0, **settings) -> None:
    torch.set_num_threads(1)
    with METERS[device, figure]() as meter, OutOfStep(out_of_step):
        # So few tokens that activations hardly count beside the weights.
        use_cpu = device == "cpu"
        trainer = make_trainer(method, TrainerCallback(), batch=1, seq=8, max_steps=steps, use_cpu=use_cpu, **settings)
        trainer.train()
    parameters = sum(param.numel() for param in trainer.model.parameters() if param.requires_grad)
    print(json.dumps({"peak_bytes": meter.peak(), "parameters": parameters}), flush=True)


if __name__ == "__main__":
    sys.stdin.readline()  # the word to begin
    main(**json.loads(sys.argv[1]))

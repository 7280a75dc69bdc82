"""What a look-ahead costs beside the optimizer's own step: for optimizers without a closed form it is a real step that is undone.

    python benchmarks/lookahead_cost.py     # ten matrices of 262 thousand numbers together, one thread

Muon, SOAP, Shampoo and schedule-free are those of torch and of pytorch_optimizer. AdamW, whose look-ahead has a closed form, is beside them.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median

import pytorch_optimizer
import torch
from tables import as_table
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from hf_sampa.engine.lookahead import LOOK_AHEAD_TRIALS, look_ahead


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, fused=True),
    "Muon": lambda params: torch.optim.Muon(params),
    "SOAP": lambda params: pytorch_optimizer.SOAP(params),
    "Shampoo": lambda params: pytorch_optimizer.ScalableShampoo(params),
    "schedule-free AdamW": lambda params: pytorch_optimizer.ScheduleFreeAdamW(params),
}
SHAPES = [(128, 128)] * 8 + [(512, 128)] * 2


def measure(make: Callable[[list[nn.Parameter]], Optimizer], steps: int) -> tuple[float, float]:
    """Seconds of a step and of a look-ahead, medians over `steps` of each in turn, after some that warm up."""
    torch.manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(shape)) for shape in SHAPES]
    optimizer, out = make(params), [torch.empty_like(param) for param in params]
    if hasattr(optimizer, "train"):
        optimizer.train()
    seconds: dict[str, list[float]] = {"look-ahead": [], "step": []}

    def ahead(grads: list[Tensor], trial: bool) -> None:
        look_ahead(optimizer, params, grads, out=out, scale=1.0, on_trial=trial, apart=[0] * len(params))

    for number in range(LOOK_AHEAD_TRIALS + steps):
        grads = [torch.randn_like(param) for param in params]
        began = time.perf_counter()
        ahead(grads, trial=number < LOOK_AHEAD_TRIALS)
        between = time.perf_counter()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        seconds["look-ahead"].append(between - began)
        seconds["step"].append(time.perf_counter() - between)
    own, looked = (median(seconds[name][LOOK_AHEAD_TRIALS:]) for name in ("step", "look-ahead"))
    return own, looked


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9, help="that are counted")
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="optimizers")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in tqdm(options.only, unit="optimizer"):
            own, looked = measure(OPTIMIZERS[name], options.steps)
            rows.append([name, f"{1000 * own:.1f} ms", f"{1000 * looked:.1f} ms", f"{looked / own:.2f}"])
    print(as_table(["optimizer", "its step", "look-ahead", "of the step"], rows))


if __name__ == "__main__":
    main()

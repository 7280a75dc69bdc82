"""Bytes per weight that AdamW, SAM and SAMPa take at their peak, in fp32 and under bf16 autocast.

    python benchmarks/memory.py                          # BERT of 6 layers x 768 units, on the CPU: a few minutes
    python benchmarks/memory.py --device cuda            # on GPUs; the rows of two processes need two of them
    python benchmarks/memory.py --accumulation 3         # with gradient accumulation
    python benchmarks/memory.py --hidden 256 --json memory.json

Each figure comes from a fresh process, or pair of processes, that makes a few steps of the real Trainer or SAMPaTrainer
with AdamW beneath, on so few tokens that activations hardly count. Counted: the peak of what tensors hold, from the
allocator's own reports. Measured: how much the process grew at most (resident memory), or torch.cuda's
max_memory_allocated. Both as bytes per trainable weight, and in units of d, four bytes for each of d weights.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bench_processes import METHODS, PAIRED, ROLES, Group
from step_time import SIZES, add_size, check_sizes
from tqdm import tqdm


WORKER = Path(__file__).with_name("memory_worker.py")
PRECISIONS = {"fp32": False, "bf16": True}
FIGURES = ("counted", "measured")
DEFAULTS = {"layers": 6, "hidden": 768, "steps": 4, "accumulation": 1}


def list_rows(device: str) -> list[tuple[str, int]]:
    """Methods and numbers of processes that this machine can measure."""
    rows = [("adamw", 1), ("sam", 1), ("sampa", 1)]
    if device == "cpu" or torch.cuda.device_count() >= 2:
        rows += [("sampa", 2), ("sampa_sharded", 2)]
    return rows


def measure(settings: dict[str, Any], rows: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """By row and role: the method, the role, and bytes per weight by precision and figure, as ``{"fp32": {"counted": 16.0}}``.

    Args:
        settings: layers, hidden, steps, accumulation and device, as on the command line.
        rows: from `list_rows`.
    """
    results = []
    with tqdm(total=len(rows) * len(PRECISIONS) * len(FIGURES), unit="run") as bar:
        for method, processes in rows:
            roles = ROLES if processes == 2 else ("both",) if method in PAIRED else ("",)
            of_row = [{"method": method, "processes": processes, "role": role} for role in roles]
            for precision, bf16 in PRECISIONS.items():
                for result in of_row:
                    result[precision] = {}
                for figure in FIGURES:
                    bar.set_postfix_str(f"{METHODS[method]} on {processes}, {precision}, {figure}")
                    answers = run({**settings, "method": method, "bf16": bf16, "figure": figure}, processes)
                    for result, answer in zip(of_row, answers, strict=True):
                        result[precision][figure] = answer["peak_bytes"] / answer["parameters"]
                        result["parameters"] = answer["parameters"]
                    bar.update()
            results += of_row
    return results


def run(settings: dict[str, Any], processes: int) -> list[dict[str, int]]:
    """What one configuration's fresh processes answer, by rank."""
    together = processes > 1
    # One process that sees several GPUs would use them all (DataParallel).
    one_gpu = {} if together else {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    with ExitStack() as stack:
        return Group(WORKER, settings, stack, processes=processes, together=together, variables=one_gpu).ask("go")


def format_table(settings: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """One line per process: bytes per weight and, in brackets, units of d."""
    lines = [
        f"peak bytes per weight, in brackets units of d (4 bytes for each of {results[0]['parameters'] / 1e6:.1f} M weights); "
        f"BERT, {settings['layers']} layers x {settings['hidden']} units, {settings['accumulation']} x 8 tokens, on {settings['device']}",
        "",
        f"{'':<40}{'fp32':^32}{'bf16 autocast':^32}".rstrip(),
        f"{'method':<15}{'processes':<12}{'role':<13}" + f"{'counted':>16}{'measured':>16}" * len(PRECISIONS),
    ]
    for result in results:
        cells = [result[precision][figure] for precision in PRECISIONS for figure in FIGURES]
        lines.append(
            f"{METHODS[result['method']]:<15}{result['processes']:<12}{result['role']:<13}"
            + "".join(f"{f'{cell:.2f} ({cell / 4:.2f} d)':>16}" for cell in cells)
        )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("layers", "hidden"):
        add_size(parser, name, DEFAULTS[name])
    parser.add_argument("--steps", type=int, default=DEFAULTS["steps"], help="steps; the peak is in one of the first")
    parser.add_argument(
        "--accumulation", type=int, default=DEFAULTS["accumulation"], help="micro-batches per step (default 1)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default cpu)")
    parser.add_argument("--json", type=Path, help="also write the settings and figures to this file")
    return parser


def main() -> None:
    parser = make_parser()
    settings = vars(parser.parse_args())
    json_path = settings.pop("json")
    check_sizes(parser, SIZES | {name: settings[name] for name in DEFAULTS})
    if settings["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda expects a GPU that torch can use, and there is none; use --device cpu")
    if settings["device"] == "cpu" and not Path("/proc/self/status").exists():
        parser.error("--device cpu expects Linux, whose /proc tells the peak of a process; use --device cuda")
    results = measure(settings, list_rows(settings["device"]))
    print(format_table(settings, results))
    if json_path is not None:
        json_path.write_text(json.dumps({"settings": settings, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

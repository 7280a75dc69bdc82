"""On CUDA devices (make test-gpu): both roles in one process and, where there are two devices, a pair over NCCL."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from hf_sampa import SAMPaTrainer
from hf_sampa.state import stood_in
from tests import sharded, tiny
from tests.distributed.test_variants import CASES, settings
from tests.ranks import free_port, run_ranks


pytestmark = pytest.mark.gpu

ON_GPU = {"use_cpu": False, "dataloader_pin_memory": True}
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
METHODS = ("sampa", "sam")


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def alone() -> None:
    """One device per process, and kernels that give the same bits twice."""
    if "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def weights(outcome: dict) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in outcome["weights"].items()}


def on_both(folder) -> dict:
    alone()
    torch.backends.cuda.matmul.allow_tf32 = False
    changes = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 6}
    return {
        (method, device): weights(
            tiny.run(folder, tiny.bert, tiny.sentences(18), method=method, **changes, use_cpu=device == "cpu")
        )
        for method in METHODS
        for device in ("cpu", "cuda")
    }


def test_a_gpu_goes_where_the_cpu_goes(tmp_path):
    (found,) = run_ranks(on_both, 1, tmp_path, folder=tmp_path)
    for method in METHODS:
        cpu, gpu = found[method, "cpu"], found[method, "cuda"]
        assert max((cpu[name] - gpu[name]).abs().max().item() for name in cpu) < 1e-5


def stopped_and_not(folder) -> dict:
    alone()
    found = {}
    for method in METHODS:
        for precision, changes in PRECISIONS.items():
            place = f"{folder}/{method}-{precision}"
            run = partial(
                tiny.run,
                place,
                partial(tiny.bert, 0.1),
                tiny.sentences(18),
                **{**ON_GPU, **changes},
                method=method,
                optim="adamw_torch_fused",
                gradient_accumulation_steps=2,
                max_steps=6,
                save_strategy="steps",
                save_steps=3,
            )
            whole, again = run(), run(resume=f"{place}/checkpoint-3")
            found[method, precision] = tiny.differing(*map(tiny.comparable, (whole, again))), whole["steps"]
    return found


def test_resumed_is_never_stopped(tmp_path):
    """P5, in all precisions."""
    (found,) = run_ranks(stopped_and_not, 1, tmp_path / "out", folder=tmp_path)
    assert found == dict.fromkeys(found, ([], 6)) and len(found) == 6


def every_variant(folder) -> dict:
    alone()
    return {
        case: tiny.run(
            folder / "-".join(case),
            partial(tiny.bert, 0.1),
            tiny.sentences(19),
            **{**settings(*case), **ON_GPU, "save_strategy": "no", "bf16": True},
        )["logs"][-2]
        for case in CASES
    }


def test_every_variant_trains(tmp_path):
    (found,) = run_ranks(every_variant, 1, tmp_path / "out", folder=tmp_path)
    assert [case for case, line in found.items() if not (0.1 < line["loss"] < 2 and line["grad_norm"] > 0)] == []


def waits(folder) -> dict[str, list[list[str]]]:
    """Where in this package the host waits for the device, by step."""
    alone()
    found: dict[str, list[list[str]]] = {}

    class Noted(SAMPaTrainer):
        def _run_epoch(self, *args, **kwargs):
            with stood_in(self._run.steps, "step", partial(self.noted, self._run.steps.step)):
                super()._run_epoch(*args, **kwargs)

        def noted(self, step, *args, **kwargs):
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loss = step(*args, **kwargs)
            torch.cuda.set_sync_debug_mode("default")
            files = [Path(each.filename) for each in caught if "synchroniz" in str(each.message)]
            found[self.args.method].append([file.name for file in files if "hf_sampa" in file.parts])
            return loss

    for method in METHODS:
        found[method] = []
        args = tiny.arguments(folder, **ON_GPU, method=method, optim="adamw_torch_fused", max_steps=6)
        Noted(model=tiny.bert(0.1), args=args, train_dataset=tiny.sentences(24)).train()
    return found


def test_the_host_waits_once_a_step(tmp_path):
    """For the numbers of `Gradients._share`, beside accelerate's copies of the inputs; the first step rehearses, and takes g_0."""
    (found,) = run_ranks(waits, 1, tmp_path / "out", folder=tmp_path)
    assert {method: steps[2:] for method, steps in found.items()} == dict.fromkeys(METHODS, [["gradients.py"]] * 4)


def trained(folder, changes) -> dict:
    alone()
    found = tiny.run(
        folder,
        partial(tiny.bert, 0.1),
        tiny.sentences(18),
        **ON_GPU,
        **changes,
        gradient_accumulation_steps=2,
        max_steps=6,
    )
    return {"weights": weights(found), "logs": found["logs"]}


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{}, {"shard_optimizer": True}, {"variant": "asam", "bf16": True}], ids=str)
def test_two_devices_are_one(tmp_path, changes):
    """P2, over NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    (one,) = run_ranks(trained, 1, tmp_path / "one", changes, folder=tmp_path / "first")
    for found in run_ranks(trained, 2, tmp_path / "two", changes, folder=tmp_path / "second"):
        assert tiny.differing(found, one) == []


def one_shard(folder, changes) -> dict:
    """On one device that FSDP2 has for itself: all hooks, streams and copies of shards, nobody to share with."""
    alone()
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in {**launched, "MASTER_PORT": free_port()}.items()})
    found = {}
    for method in METHODS:
        chosen = {**ON_GPU, **changes, "method": method, "optim": "adamw_torch_fused", "max_steps": 6}
        chosen |= {"save_strategy": "steps", "save_steps": 3}
        for resume in (None, f"{folder}/{method}/checkpoint-3"):
            trainer = sharded.trainer(f"{folder}/{method}", partial(tiny.bert, 0.1), tiny.sentences(19), chosen)
            outcome = sharded.outcome(trainer, resume)
            assert trainer.sampa.weights.sharded == ("fsdp" in changes)
            weights = {name: each.cpu() for name, each in outcome["weights"].items()}
            found[method, bool(resume)] = {"weights": weights, "logs": outcome["logs"]}
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_shard_is_unsharded_and_resumed_is_never_stopped(tmp_path, precision):
    """In fp32 bit for bit; in bf16 FSDP2 rounds where autocast does not."""
    changes = PRECISIONS[precision]
    shards = {**changes, **sharded.FSDP}
    (whole,) = run_ranks(one_shard, 1, tmp_path / "whole", changes, folder=tmp_path / "first")
    (found,) = run_ranks(one_shard, 1, tmp_path / "shards", shards, folder=tmp_path / "second")
    for method in METHODS:
        assert tiny.differing(found[method, True], found[method, False]) == []
        if precision == "fp32":
            assert tiny.differing(found[method, False], whole[method, False]) == []
        else:
            assert 0 < sharded.deviation(found[method, False]["weights"], whole[method, False]["weights"]) < 2e-2


def by_gloo(folder, changes) -> dict:
    alone()
    if "RANK" in os.environ:
        os.environ["LOCAL_RANK"] = "0"
    run = partial(tiny.run, folder, partial(tiny.bert, 0.1), tiny.sentences(18), **ON_GPU, **changes, max_steps=6)
    found = run(ddp_backend="gloo") if "RANK" in os.environ else run()
    return {"weights": weights(found), "logs": found["logs"]}


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{}, {"shard_optimizer": True}, {"bf16": True}], ids=str)
def test_a_pair_on_one_device_by_gloo_is_one_process(tmp_path, changes):
    """P2, where NCCL has no two processes on one device."""
    (one,) = run_ranks(by_gloo, 1, tmp_path / "one", changes, folder=tmp_path / "first")
    for found in run_ranks(by_gloo, 2, tmp_path / "two", changes, folder=tmp_path / "second"):
        assert tiny.differing(found, one) == []

"""Inside a pass a process's world is its role: what others gather, reduce and count there, and that it is taken back."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch import nn
from torch.distributed.nn.functional import all_gather

from hf_sampa import SAMPaTrainer
from hf_sampa.distributed.role_world import RoleWorld, whole_world
from hf_sampa.distributed.roles import Mesh
from tests import tiny
from tests.ranks import RankFailed, run_ranks


pytestmark = pytest.mark.distributed


class Pairs(nn.Module):
    """Two views of each sample."""

    def __init__(self, norm: type[nn.Module] = nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 6), norm(6) if norm is not nn.Identity else norm())

    def forward(self, a, b):
        return {"loss": self.loss(self.body(a), self.body(b)), "logits": a}

    def loss(self, a, b):
        return nn.functional.cross_entropy(a @ b.T, torch.arange(len(a)))


class GatheredNegatives(Pairs):
    """Every process's other views are negatives, and learn from it."""

    def loss(self, a, b):
        if not (self.training and dist.is_initialized()):
            return super().loss(a, b)
        others = torch.cat(all_gather(b))
        return nn.functional.cross_entropy(a @ others.T, torch.arange(len(a)) + dist.get_rank() * len(a))


class Reduced(Pairs):
    """A loss that is divided by a mean over the processes, as detection models do, and one that counts them."""

    def loss(self, a, b):
        loss = super().loss(a, b)
        if self.training:
            scale = reduce(loss.detach() + 1, reduction="mean") * PartialState().num_processes
            loss = loss / scale * gather(torch.ones(1)).sum()
        return loss


MODELS = {
    "gathered negatives": GatheredNegatives,
    "reduced": Reduced,
    "synchronized BatchNorm": lambda: Pairs(nn.SyncBatchNorm),
}


def pairs(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(8, generator=generator) for name in "ab"} for _ in range(count)]


def trained(folder, batch_size=4, names=tuple(MODELS), **changes):
    return {
        name: tiny.run(
            folder / name, MODELS[name](), pairs(22), per_device_train_batch_size=batch_size, ddp_timeout=60, **changes
        )
        for name in names
    }


def test_two_processes_are_one_whatever_the_loss_gathers(tmp_path):
    (alone,) = run_ranks(trained, 1, tmp_path / "one", folder=tmp_path)
    for outcome in run_ranks(trained, 2, tmp_path / "two", folder=tmp_path):
        assert tiny.differing(outcome, alone) == []


def test_replicas_are_one_large_batch_for_a_loss_that_gathers(tmp_path):
    names, settings = ("gathered negatives",), {"optim": "sgd", "learning_rate": 0.1, "dataloader_drop_last": True}
    large = trained(tmp_path / "large", 8, names, **settings)["gathered negatives"]
    for outcome in run_ranks(four, 4, tmp_path / "four", names, settings, folder=tmp_path):
        torch.testing.assert_close(outcome["weights"], large["weights"], rtol=1e-4, atol=1e-6)


def four(folder, names, settings):
    return trained(folder, 4, names, **settings)["gathered negatives"]


class Asking(SAMPaTrainer):
    """Keeps what the world looks like in the passes, and where a loader is built and read."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.answers = tiny.Passes()

    def ask(self, where):
        self.answers(
            {
                "where": where,
                "initialized": dist.is_initialized(),
                "group": (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else None,
                "accelerate": (self.accelerator.num_processes, self.accelerator.process_index),
                "first": self.accelerator.is_main_process,
                "arguments": (self.args.world_size, self.args.process_index, self.args.num_replicas),
                "variables": (os.environ.get("WORLD_SIZE"), os.environ.get("RANK"), os.environ.get("LOCAL_RANK")),
            }
        )

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.ask("forward")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        loss.register_hook(lambda grad: self.ask("backward"))
        return loss

    def get_train_dataloader(self):
        self.ask("loader")
        return super().get_train_dataloader()

    def get_batch_samples(self, *args, **kwargs):
        self.ask("batch")
        return super().get_batch_samples(*args, **kwargs)


def ask(folder):
    trainer = Asking(model=tiny.bert(), args=tiny.arguments(folder, max_steps=2), train_dataset=tiny.sentences(16))
    trainer.train()
    seen = trainer.answers.seen
    trainer.ask("afterwards")
    return seen[:-1], seen[-1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_is_read_of_the_world(tmp_path, world_size):
    replicas = world_size // 2
    for rank, (inside, after) in enumerate(run_ranks(ask, world_size, tmp_path, folder=tmp_path)):
        replica = rank % replicas
        assert {each["where"] for each in inside} == {"forward", "backward", "loader", "batch"}
        for each in inside:
            assert each["initialized"] == (replicas > 1)
            assert each["group"] == ((replicas, replica) if replicas > 1 else None)
            assert each["accelerate"] == (replicas, replica) and each["first"] == (replica == 0)
            assert each["arguments"] == (replicas, replica, replicas)
            assert each["variables"] == (str(replicas), str(replica), str(rank))
        assert after["group"] == after["accelerate"] == (world_size, rank)
        assert after["arguments"] == (world_size, rank, replicas)
        assert after["variables"] == (str(world_size), str(rank), str(rank))


def lend_and_fail(folder):
    tiny.arguments(folder)  # reaches the other process
    world, states = RoleWorld(Mesh(2, dist.get_rank(), paired=True)), []
    try:
        with world.lent():
            states.append(dist.is_initialized())
            with whole_world():
                states.append((dist.get_world_size(), PartialState().num_processes, os.environ["WORLD_SIZE"]))
            states.append((dist.is_initialized(), PartialState().num_processes, os.environ["WORLD_SIZE"]))
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        states.append((dist.get_world_size(), PartialState().num_processes, os.environ["WORLD_SIZE"]))
    return states


def test_the_world_is_taken_back_whatever_happens(tmp_path):
    for states in run_ranks(lend_and_fail, 2, tmp_path, folder=tmp_path):
        assert states == [False, (2, 2, "2"), (False, 1, "1"), (2, 2, "2")]


class Unguarded(Pairs):
    def loss(self, a, b):
        return super().loss(a, b) * dist.get_world_size()


class OwnGroup(Pairs):
    def __init__(self):
        super().__init__()
        self.group = dist.new_group()


def fail(folder, model):
    tiny.arguments(folder)  # reaches the other process
    tiny.run(folder, model, pairs(16), max_steps=2, ddp_timeout=60)


@pytest.mark.parametrize(
    "model, message",
    [
        (Unguarded, "this process is the only one of its role, as if it had been started without a launcher. Ask"),
        (OwnGroup, "'model.group' holds a group of 2 process.es.. Build it without"),
    ],
)
def test_what_cannot_be_lent_is_said(tmp_path, model, message):
    with pytest.raises(RankFailed, match=message):
        run_ranks(fail, 2, tmp_path, model, folder=tmp_path)

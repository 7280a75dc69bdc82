"""What a trainer's own code keeps on the trainer during a pass: counted once per update batch, of the reported pass."""

from __future__ import annotations

from collections import defaultdict, deque

import pytest
import torch

from hf_sampa import SAMPaTrainer
from hf_sampa.distributed.exchange import Exchange
from hf_sampa.distributed.roles import Mesh
from hf_sampa.state.collected import Collected
from tests import tiny
from tests.ranks import run_ranks


class Meter:
    """A running mean as many projects have one."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def update(self, value):
        self.total, self.count = self.total + value, self.count + 1


class Collecting(SAMPaTrainer):
    """Keeps numbers in all the ways that people do, and logs some."""

    everywhere: list[int] = []  # of the class

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.tokens, self.losses = 0, torch.zeros(()), []
        self.metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.last, self.meter = deque(maxlen=3), Meter()

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        value = loss if isinstance(loss, torch.Tensor) else loss[0]
        mode = "train" if model.training else "eval"
        self.calls += 1
        self.tokens += inputs["input_ids"].numel()
        self.losses.append(value.item())
        self.metrics[mode]["loss"].append(value.item())
        self.last.append(value.item())
        self.meter.update(value.item())
        self.everywhere.append(len(inputs["input_ids"]))
        self.newest = value.item()
        if model.training:
            self.log({"loss": value.item(), "tokens": self.tokens.item()})
        return loss


def kept(trainer):
    names = ("calls", "losses", "metrics", "newest")
    return {
        **{name: getattr(trainer, name) for name in names},
        "tokens": trainer.tokens,
        "last": list(trainer.last),
        "meter": vars(trainer.meter),
        "everywhere": list(trainer.everywhere),
    }


def collect(folder, method="sampa", resume=None, **changes):
    Collecting.everywhere = []
    settings = {"max_steps": 5, "logging_steps": 2, "method": method, **changes}
    trainer = Collecting(tiny.bert(), tiny.arguments(folder, **settings), train_dataset=tiny.sentences(18))
    outcome = tiny.outcome(trainer, resume)
    return {**outcome, **kept(trainer)}


@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_once_per_update_batch_those_of_the_reported_pass(tmp_path, method):
    outcome = collect(tmp_path, method)
    assert outcome["calls"] == len(outcome["losses"]) == outcome["meter"]["count"] == 5
    assert outcome["losses"][-1] == outcome["newest"] and outcome["last"] == outcome["losses"][-3:]
    assert outcome["everywhere"] == ([4, 4, 4, 2, 4] if method == "sampa" else [4, 4, 4, 4, 2])
    assert outcome["tokens"].item() == 8 * sum(outcome["everywhere"])
    # What Trainer logs is of the same passes, whose losses these are; a log line of one's own takes no means away.
    own = [line["loss"] for line in outcome["logs"] if "tokens" in line]
    assert own == outcome["losses"]
    of_loop = [line for line in outcome["logs"] if "grad_norm" in line]
    assert [line["loss"] for line in of_loop] == pytest.approx([sum(own[:2]) / 2, sum(own[2:4]) / 2])
    assert all("perturbed_loss" in line for line in of_loop)


@pytest.mark.distributed
def test_the_same_on_two_processes(tmp_path):
    (alone,) = run_ranks(collect, 1, tmp_path / "one", folder=tmp_path)
    for outcome in run_ranks(collect, 2, tmp_path / "two", folder=tmp_path):
        assert tiny.differing(outcome, alone) == []


class Owner:
    pass


def test_what_is_followed_and_what_is_left():
    owner = Owner()
    owner.number, owner.words, owner.model = 1, {"a": [1, 2]}, torch.nn.Linear(2, 2)
    owner.data = list(range(20_000))  # too large to be a metric
    owner.nested = {"meter": Meter()}
    collected = Collected(owner, ("transformers.",), Exchange(Mesh(1, 0, paired=False)))
    words, weight = owner.words, owner.model.weight
    with collected.aside():
        owner.number, owner.extra = 2, "new"
        owner.words["a"].append(3)
        owner.words["b"] = 1
        owner.nested["meter"].update(5.0)
        owner.data.append(0)
        owner.words = {}
        weight.data.add_(1)
    assert (owner.number, owner.words, hasattr(owner, "extra")) == (1, {"a": [1, 2]}, False)
    assert owner.words is words and vars(owner.nested["meter"]) == {"total": 0.0, "count": 0}
    assert len(owner.data) == 20_001 and owner.model.weight is weight
    assert collected.changed == set()
    with collected.counted():
        owner.number += 1
        owner.words["a"].append(3)
    assert collected.changed == {"number", "words"}


def test_state_is_put_into_what_is_there():
    """Of the same kinds, in place: whoever else holds a list goes on holding it."""

    def owner():
        made = Owner()
        made.metrics = {"train": defaultdict(list), "eval": defaultdict(lambda: deque(maxlen=2))}
        made.meter, made.total, made.pair = Meter(), torch.zeros(2), (1, "x")
        return made, Collected(made, ("transformers.",), Exchange(Mesh(1, 0, paired=False)))

    (one, collected), (other, receiving) = owner(), owner()
    with collected.counted():
        one.metrics["train"]["loss"] += [0.5, 1.5]
        one.metrics["eval"]["seen"].extend([1, 2, 3])
        one.meter.update(2.0)
        one.total += 3
        one.pair = (2, "y")
    assert collected.digest() != receiving.digest()
    metrics, total = other.metrics, other.total
    receiving.load_state_dict(collected.state_dict())
    assert collected.digest() == receiving.digest()
    assert other.metrics is metrics and other.total is total and other.pair == (2, "y")
    assert other.metrics["eval"]["seen"] == deque([2, 3]) and other.metrics["eval"]["seen"].maxlen == 2
    assert vars(other.meter) == {"total": 2.0, "count": 1}

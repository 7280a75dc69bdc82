"""A pair that shares its optimizer: the same bits as unsharded, half of the state, checkpoints that anyone can read."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer
from hf_sampa.engine.placement import owners
from hf_sampa.variants import Mixing, Recipe
from tests import tiny
from tests.distributed.test_resume import SCENARIOS as RESUMED
from tests.ranks import RankFailed, run_ranks


pytestmark = pytest.mark.distributed

SCENARIOS = {
    "dropout, accumulation, group cut short": RESUMED["dropout, accumulation, group cut short"],
    "fused adamw, clipping that binds": {
        "model": tiny.bert,
        "dataset": tiny.sentences(18),
        "optim": "adamw_torch_fused",
        "max_grad_norm": 0.01,
    },
    "sgd, no clipping, lambda 0": {
        "model": tiny.bert,
        "dataset": tiny.sentences(18),
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "max_grad_norm": 0.0,
        "lmbda": 0.0,
    },
    "an optimizer that takes a real step to look ahead": {
        "model": tiny.bert,
        "dataset": tiny.sentences(18),
        "optim": "rmsprop",
    },
    "frozen layer": {"model": tiny.frozen_bert, "dataset": tiny.sentences(18)},
    "batch norm": {"model": tiny.BatchNormNet, "dataset": tiny.images(18)},
}
SHARDED = {"shard_optimizer": True}


def all_scenarios(folder, changes) -> dict:
    return {
        name: tiny.run(folder / name, **scenario, **changes, save_strategy="steps", save_steps=3)
        for name, scenario in SCENARIOS.items()
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By "one", "two" (processes) and "sharded"; and where each left its checkpoints."""
    folder = tmp_path_factory.mktemp("sharding")
    worlds = {"one": (1, {}), "two": (2, {}), "sharded": (2, SHARDED)}
    found = {
        kind: run_ranks(all_scenarios, n, folder / kind, changes, folder=folder / f"{kind}-ranks")
        for kind, (n, changes) in worlds.items()
    }
    return found, folder


def without_optimizer(outcome: dict) -> dict:
    rest = {key: value for key, value in outcome.items() if key != "optimizer"}
    return {**rest, "logs": tiny.without_cosine(outcome["logs"])}


@pytest.mark.parametrize("name", SCENARIOS)
def test_sharded_is_unsharded(outcomes, name):
    found, _ = outcomes
    whole = found["one"][0][name]
    assert whole["steps"] > 4
    for rank in range(2):
        shared = found["sharded"][rank][name]
        assert tiny.differing(without_optimizer(whole), without_optimizer(shared)) == []
        cosines = [[line["ascent_cosine"] for line in each["logs"][:-1]] for each in (whole, shared)]
        assert cosines[1] == pytest.approx(cosines[0], abs=1e-6) and all(cosines[0])
        assert tiny.differing(whole, found["two"][rank][name]) == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_process_holds_its_own_part_of_the_state(outcomes, name):
    found, _ = outcomes
    whole = found["one"][0][name]["optimizer"]["state"]
    parts = [found["sharded"][rank][name]["optimizer"]["state"] for rank in range(2)]
    assert parts[0].keys().isdisjoint(parts[1])
    assert tiny.differing({**parts[0], **parts[1]}, whole) == []
    sizes = [sum(value.numel() for state in part.values() for value in state.values()) for part in parts]
    if name != "batch norm":  # where one parameter is nearly all of the model
        assert min(sizes) > 0.4 * sum(sizes)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_sharded_checkpoint_is_the_same_checkpoint(outcomes, name):
    """Also for plain Trainer: one optimizer.pt with the state of all parameters."""
    _, folder = outcomes
    for file in ("optimizer.pt", "sampa.safetensors"):
        one, sharded = (folder / kind / name / "checkpoint-3" / file for kind in ("one", "sharded"))
        if file == "optimizer.pt":
            one, sharded = (torch.load(each, weights_only=True) for each in (one, sharded))
            assert tiny.differing(one, sharded) == []
        else:
            assert one.read_bytes() == sharded.read_bytes()


def resumed(folder, written, changes) -> dict:
    return {
        name: tiny.run(folder / name, **scenario, **changes, resume=str(written / name / "checkpoint-3"))
        for name, scenario in SCENARIOS.items()
    }


@pytest.mark.parametrize(
    ("wrote", "n", "changes"),
    [
        ("sharded", 2, SHARDED),
        ("sharded", 1, {}),
        ("one", 2, SHARDED),
        # Two processes write, and read, what one does.
        pytest.param("sharded", 2, {}, marks=pytest.mark.whole),
        pytest.param("two", 2, SHARDED, marks=pytest.mark.whole),
    ],
)
def test_resumed_is_never_stopped(outcomes, tmp_path, wrote, n, changes):
    found, folder = outcomes
    ranks = run_ranks(resumed, n, tmp_path / "out", folder / wrote, changes, folder=tmp_path)
    for rank in ranks:
        for name, again in rank.items():
            whole = found["one"][0][name]
            whole, again = (without_optimizer(tiny.comparable(outcome)) for outcome in (whole, again))
            assert tiny.differing(whole, again) == []


class ReadsAll(Mixing):
    """Does not say that it mixes by entries, as one that reads all of them at once must not."""

    def __call__(self, g_tilde, g, norms, now): ...


def counted(folder, recipe) -> tuple[int, int]:
    args = tiny.arguments(folder, max_steps=4, **SHARDED)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16), recipe=recipe)
    sent = []
    trainer.add_callback(tiny.Each(lambda: sent.append(trainer.sampa.exchange.bytes_sent)))
    trainer.train()
    return sent[-1] - sent[-2], sum(flat.nbytes for flat in trainer.sampa.ascent_grads.flats)


@pytest.mark.parametrize(("recipe", "gradients"), [(None, 3), (Recipe(mixing=ReadsAll()), 3.5)])
def test_at_most_two_gradients_are_sent(tmp_path, recipe, gradients):
    """Half of y_{t+1}, x~_t, the new gradients and, since a callback may read them, the updated weights; or whole gradients, and then no x~_t."""
    (first, size), (second, _) = run_ranks(counted, 2, tmp_path, recipe, folder=tmp_path)
    assert first + second == pytest.approx(gradients * size, rel=1e-2)  # halves of whole parameters
    assert max(first, second) <= 2 * size


def test_owners_update_about_as_much():
    sizes = [5, 9, 1, 3, 4, 2]
    for count, each in ((2, [12, 12]), (3, [9, 8, 7])):
        found = owners(sizes, count)
        assert [sum(size for size, own in zip(sizes, found, strict=True) if own == i) for i in range(count)] == each
    assert owners([7], 2) == [0]


def with_a_foreign_optimizer(folder):
    class Coupled(torch.optim.SGD):
        """Might do anything."""

    model = tiny.bert()
    SAMPaTrainer(
        model=model,
        args=tiny.arguments(folder, **SHARDED),
        train_dataset=tiny.sentences(16),
        optimizers=(Coupled(model.parameters(), lr=0.1), None),
    ).train()


def test_an_optimizer_that_may_couple_parameters_is_refused(tmp_path):
    with pytest.raises(
        RankFailed, match="shard_optimizer: expected an optimizer that treats every parameter.*Coupled"
    ):
        run_ranks(with_a_foreign_optimizer, 2, tmp_path, folder=tmp_path)


def unsharded_after_sharded(folder):
    trainer = SAMPaTrainer(
        model=tiny.bert(), args=tiny.arguments(folder, max_steps=2, **SHARDED), train_dataset=tiny.sentences(16)
    )
    trainer.train()
    trainer.train()  # the same halves once more
    trainer.args.shard_optimizer = False
    trainer.train()


def test_state_that_is_in_the_other_process_is_missed(tmp_path):
    """Trainer keeps its optimizer from one train() to the next."""
    with pytest.raises(RankFailed) as failure:
        run_ranks(unsharded_after_sharded, 2, tmp_path, folder=tmp_path)
    assert str(failure.value).count("where a run with shard_optimizer=True left it. Resume from a checkpoint") == 2


def test_one_process_has_nothing_to_share(tmp_path):
    plain, alone = (
        tiny.run(tmp_path, tiny.bert, tiny.sentences(16), **changes, max_steps=3) for changes in ({}, SHARDED)
    )
    assert tiny.differing(plain, alone) == []


def clipping_by_hand(folder, method):
    class Clips(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    args = tiny.arguments(folder, max_steps=3, method=method, max_grad_norm=0.0, **SHARDED)
    SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16), callbacks=[Clips()]).train()


@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_a_callback_that_clips_its_part_is_refused(tmp_path, method):
    with pytest.raises(
        RankFailed, match="expected gradients that are left alone.*Set max_grad_norm, by which the whole"
    ):
        run_ranks(clipping_by_hand, 2, tmp_path, method, folder=tmp_path)


def averaging(folder, changes) -> dict:
    """Keeps a mean of the weights, by a hook of its own that was there before the run."""

    class Averages(SAMPaTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            self.optimizer.register_step_post_hook(self.average)
            return optimizer

        def average(self, *_):
            now = [param.detach().clone() for param in self.model.parameters()]
            self.mean = [0.5 * (a + b) for a, b in zip(self.mean, now, strict=True)] if hasattr(self, "mean") else now

    args = tiny.arguments(folder, max_steps=4, **changes)
    trainer = Averages(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))
    trainer.train()
    return trainer.mean


@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_hooks_of_ones_own_see_the_whole_update(tmp_path, method):
    plain = run_ranks(averaging, 2, tmp_path, {"method": method}, folder=tmp_path / "plain")
    for found in run_ranks(averaging, 2, tmp_path, {"method": method, **SHARDED}, folder=tmp_path / "shared"):
        assert tiny.differing(found, plain[0]) == []


def saved_after_a_refusal(folder):
    trainer = SAMPaTrainer(
        model=tiny.bert(), args=tiny.arguments(folder, max_steps=2, **SHARDED), train_dataset=tiny.sentences(16)
    )
    trainer.train()
    trainer.args.shard_optimizer = False
    with pytest.raises(ValueError, match="where a run with shard_optimizer=True left it"):
        trainer.train()
    with pytest.raises(RuntimeError, match="the last call of train\\(\\) was refused"):
        trainer._save_checkpoint(trainer.model, None)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    return trainer.state.global_step


def test_a_run_that_was_refused_is_not_saved(tmp_path):
    assert run_ranks(saved_after_a_refusal, 2, tmp_path / "out", folder=tmp_path) == [2, 2]
    assert list((tmp_path / "out").glob("checkpoint-*")) == []


def test_the_whole_optimizer_is_on_rank_0_alone(tmp_path):
    with pytest.raises(ValueError, match="shard_optimizer: expected save_on_each_node=False"):
        tiny.arguments(tmp_path, save_on_each_node=True, **SHARDED)

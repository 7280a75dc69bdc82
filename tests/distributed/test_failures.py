"""P10, and what happens to one process when the other is wrong, fails or dies."""

from __future__ import annotations

import os
import signal
import time

import pytest
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer
from hf_sampa.engine.buckets import ALIGNED
from tests import tiny
from tests.ranks import RankFailed, run_ranks, start_ranks


pytestmark = pytest.mark.distributed


def rank() -> int:
    return int(os.environ["RANK"])


class Steps(TrainerCallback):
    """Counts finished steps in a file."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        (self.folder / f"steps{rank()}").write_text(str(state.global_step))


def different_data(folder):
    """Rank 1 sees one sentence of the fourth batch of four the other way round."""
    dataset = tiny.sentences(16)
    if rank() == 1:
        dataset[13]["input_ids"] = dataset[13]["input_ids"].flip(0)
    trainer_kwargs = {"callbacks": [Steps(folder)]}
    tiny.run(folder, tiny.bert, dataset, train_sampling_strategy="sequential", trainer_kwargs=trainer_kwargs)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_on_different_data_stop_within_a_step(tmp_path, world_size):
    with pytest.raises(RankFailed) as failure:
        run_ranks(different_data, world_size, tmp_path, folder=tmp_path)
    message = "Expected g_t and g~_t to come from the same batch B_t"
    assert str(failure.value).count(message) == world_size
    # B_t is that batch in step 4 with one replica, in step 2 with two
    assert (tmp_path / "steps0").read_text() == ("3" if world_size == 2 else "1")


def bad_on_one_rank(folder):
    passes, own_rank = tiny.Passes(), rank()  # within a pass it is another one's

    class Bad(SAMPaTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("inf") if passes() == 4 and own_rank == 1 else loss

    trainer = Bad(model=tiny.bert(), args=tiny.arguments(folder, max_steps=6), train_dataset=tiny.sentences(16))
    trainer.train()
    return trainer.sampa.skipped_steps, trainer.model.state_dict()


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_skip_together(tmp_path, world_size):
    outcomes = run_ranks(bad_on_one_rank, world_size, tmp_path, folder=tmp_path)
    assert [skipped for skipped, _ in outcomes] == [1] * world_size
    for _, weights in outcomes:
        assert tiny.differing(weights, outcomes[0][1]) == []
        assert all(value.isfinite().all() for value in weights.values())


def heads_from_different_seeds(folder):
    outcome = tiny.run(folder, tiny.bert(seed=rank()), tiny.sentences(16), max_steps=3)
    return outcome["weights"]


def test_rank_0_decides_the_initial_weights(tmp_path):
    first, second = run_ranks(heads_from_different_seeds, 2, tmp_path, folder=tmp_path)
    assert tiny.differing(first, second) == []


def endless(folder, ddp_timeout):
    tiny.run(
        folder,
        tiny.bert,
        tiny.sentences(16),
        num_train_epochs=100000,
        ddp_timeout=ddp_timeout,
        logging_strategy="no",
        trainer_kwargs={"callbacks": [Steps(folder)]},
    )


def when_running(folder):
    """Wait until both ranks are inside their training."""
    deadline = time.time() + 120
    while not all((folder / f"steps{r}").exists() and (folder / f"steps{r}").read_text() > "1" for r in (0, 1)):
        assert time.time() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_other_ends_with_a_message(tmp_path, death):
    """A killed peer closes its connections; one that merely hangs is given ddp_timeout seconds."""
    processes, results, _store = start_ranks(endless, 2, tmp_path, 5, folder=tmp_path)
    try:
        when_running(tmp_path)
        os.kill(processes[1].pid, death)
        processes[0].join(60)
        assert not processes[0].is_alive()
    finally:
        for process in processes:
            process.kill()
    message = results[0].with_suffix(".err").read_text()
    assert "Rank 0 expected an answer from the other 1 process(es) of this run and got none" in message
    # Other causes than a dead process are named, too.
    for cause in (
        "outside of a pass",
        "an evaluation, a save or a stop that only one of them begins",
        "--ddp_timeout",
    ):
        assert cause in message
    assert "Start the run again with resume_from_checkpoint=True" in message


def odd_world(folder):
    tiny.run(folder, tiny.bert, tiny.sentences(16))


def test_an_odd_world_is_refused_on_every_rank(tmp_path):
    with pytest.raises(RankFailed) as failure:
        run_ranks(odd_world, 3, tmp_path, folder=tmp_path)
    assert str(failure.value).count("needs an even number of them (or one), but the world has 3") == 3


def counted(folder):
    trainer = SAMPaTrainer(
        model=tiny.bert(), args=tiny.arguments(folder, max_steps=4), train_dataset=tiny.sentences(16)
    )
    trainer.train()
    params = [*trainer.model.parameters()]
    size = sum(flat.nbytes for flat in trainer.sampa.ascent_grads.flats)
    assert 0 <= size - sum(param.nbytes for param in params) < ALIGNED * len(params)
    return trainer.sampa.exchange.bytes_sent / size


def test_a_step_sends_every_gradient_once(tmp_path):
    assert run_ranks(counted, 2, tmp_path, folder=tmp_path) == [4, 5]  # four steps; and g_0

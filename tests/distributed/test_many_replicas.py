"""Several pairs, and parts of the weights: what is sent, when, and that it changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer, readers
from tests import tiny
from tests.ranks import RankFailed, run_ranks
from tests.sharded import deviation


pytestmark = pytest.mark.distributed

SHARED = {"shard_optimizer": True}
# Many parameters of like sizes: parts of a model are made of whole ones.
DEEP = {"num_hidden_layers": 6, "hidden_size": 32, "intermediate_size": 64}
SAMPLED_ALIKE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MANY = [1, 2, pytest.param(4, marks=pytest.mark.whole), pytest.param(8, marks=pytest.mark.whole)]


def trainer_of(folder, kind=SAMPaTrainer, callbacks=(), **changes) -> SAMPaTrainer:
    args = tiny.arguments(folder, **{"max_steps": 5, "per_device_train_batch_size": 1, **changes})
    data = tiny.sentences(64)
    return kind(
        model=tiny.bert_of({**DEEP, **SAMPLED_ALIKE}),
        args=args,
        train_dataset=data,
        eval_dataset=tiny.sentences(8),
        callbacks=list(callbacks),
    )


def whole(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def trained(folder, changes) -> dict:
    """Weights, logs, and what was sent in the last step but one, from pass to pass, in numbers per weight."""
    sent = []

    class Notes(SAMPaTrainer):
        def compute_loss(self, *given, **named):
            sent.append(self.sampa.exchange.bytes_sent)
            return super().compute_loss(*given, **named)

    trainer = trainer_of(folder, Notes, **changes)
    trainer.train()
    size = sum(param.nbytes for param in trainer.model.parameters())
    return {
        "weights": whole(trainer.model),
        "norms": [line.get("grad_norm") for line in trainer.state.log_history],
        "sent": (sent[-1] - sent[-2]) / size,
        "in parts": trainer.sampa.placement.in_parts,
    }


@pytest.mark.parametrize("k", MANY)
def test_what_is_sent_and_what_comes_of_it(tmp_path, k):
    """In a step on average 3 d - 2 d / k, or, shared by all 2 k processes, 2 d - d / k."""
    alone = None
    for changes, expected in (({}, 3 - 2 / k), (SHARED, 2 - 1 / k)):
        of_ranks = run_ranks(trained, 2 * k, tmp_path / "out", changes, folder=tmp_path / "ranks")
        assert [each["in parts"] for each in of_ranks] == [bool(changes)] * (2 * k)
        sent = [each["sent"] for each in of_ranks]
        assert sum(sent) / len(sent) == pytest.approx(expected, rel=1e-3)  # parameters begin at multiples of 64 bytes
        assert max(sent) < 1.05 * expected  # parts are made of whole parameters
        alone = alone or of_ranks[0]
        for each in of_ranks:
            assert tiny.differing([alone["weights"], alone["norms"]], [each["weights"], each["norms"]]) == []


def in_one_process(folder, changes) -> dict:
    trainer = trainer_of(folder, **changes)
    trainer.train()
    return whole(trainer.model)


@pytest.mark.parametrize("changes", [{}, SHARED], ids=["whole", "shared"])
def test_two_pairs_are_one_process_with_their_samples(tmp_path, changes):
    (serial,) = run_ranks(in_one_process, 1, tmp_path, {"per_device_train_batch_size": 2}, folder=tmp_path / "one")
    for found in run_ranks(in_one_process, 4, tmp_path, changes, folder=tmp_path / "four"):
        assert 0 < deviation(found, serial) < 1e-6


@pytest.mark.parametrize("changes", [{}, SHARED], ids=["whole", "shared"])
def test_pairs_of_neighbours_compute_the_same(tmp_path, changes):
    apart, *_ = run_ranks(trained, 4, tmp_path / "apart", changes, folder=tmp_path / "ranks")
    for found in run_ranks(trained, 4, tmp_path, {**changes, "pairs_on_one_node": True}, folder=tmp_path / "ranks"):
        assert tiny.differing([apart["weights"], apart["norms"]], [found["weights"], found["norms"]]) == []
        assert found["sent"] > 0


def order_of_events(folder, changes) -> list[str]:
    found = []
    trainer = trainer_of(folder, per_device_train_batch_size=2, **changes)

    class Listens(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:  # the first steps are on trial
                exchange = trainer.sampa.exchange
                for name in ("add_up", "transfer", "hand_out"):
                    setattr(exchange, name, self.noting(name, getattr(exchange, name)))

        def noting(self, name, call):
            return lambda *given: [found.append(name), call(*given)][1]

    trainer.add_callback(Listens())
    trainer.model.bert.embeddings.register_full_backward_pre_hook(lambda *_: found.append("embeddings"))
    trainer.train()
    return found


@pytest.mark.parametrize(
    ("changes", "during"), [({}, {"add_up", "transfer", "hand_out"}), (SHARED, {"add_up", "transfer"})]
)
def test_all_legs_begin_while_backward_goes_on(tmp_path, changes, during):
    """Backward comes to the embeddings last."""
    for found in run_ranks(order_of_events, 4, tmp_path, changes, folder=tmp_path / "ranks"):
        before, after = found.index("add_up"), len(found) - 1 - found[::-1].index("embeddings")
        assert set(found[before:after]) >= during


# ---- Who reads the model between two steps ----

EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")


class Reads(TrainerCallback):
    def __init__(self):
        self.found = []
        for event in EVENTS:
            setattr(self, event, self.read)

    def read(self, args, state, control, model=None, **kwargs):
        self.found.append(whole(model))


def read(folder, changes) -> list:
    callback = Reads()
    trainer = trainer_of(folder, callbacks=[callback], **changes)
    trainer.train()
    assert not trainer.sampa.placement.in_parts
    return callback.found


def test_a_callback_reads_the_whole_model(tmp_path):
    (plain,) = run_ranks(read, 1, tmp_path, {}, folder=tmp_path / "one")
    for found in run_ranks(read, 2, tmp_path, SHARED, folder=tmp_path / "two"):
        assert len(found) == 5 * len(EVENTS) and tiny.differing(plain, found) == []


OFTEN = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


def looked_at(folder, changes) -> list:
    trainer = trainer_of(folder, max_steps=4, diagnostics_steps=2, **OFTEN, **changes)
    trainer.train()
    assert trainer.sampa.placement.in_parts == bool(changes)
    figures = ("eval_loss", "lookahead_cosine", "held_out_sharpness", "hessian_eigenvalue")
    lines = [{name: line[name] for name in figures if name in line} for line in trainer.state.log_history]
    return [whole(trainer.model), lines]


def test_evaluation_saving_and_diagnostics_see_the_whole_model(tmp_path):
    plain, *_ = run_ranks(looked_at, 2, tmp_path / "plain", {}, folder=tmp_path / "ranks")
    for found in run_ranks(looked_at, 2, tmp_path / "shared", SHARED, folder=tmp_path / "ranks"):
        assert any("hessian_eigenvalue" in line for line in found[1])
        assert tiny.differing(plain, found) == []
    for file in ("checkpoint-2/model.safetensors", "checkpoint-2/sampa.safetensors", "checkpoint-4/model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "shared" / file).read_bytes()


class Ends(SAMPaTrainer):
    """Is interrupted in a pass of step 3, on all processes."""

    def compute_loss(self, *given, **named):
        if self.state.global_step == 2 and self.model.training:
            raise KeyboardInterrupt
        return super().compute_loss(*given, **named)


def interrupted(folder) -> tuple:
    trainer = trainer_of(folder, Ends, **SHARED)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    lost = [name for name, value in whole(trainer.model).items() if value.isnan().any()]
    held = [name for name, value in whole(trainer.model).items() if value.isfinite().all()]
    trainer.evaluate()
    after_two = whole(trainer.model)
    trainer.save_model()
    trainer._save_checkpoint(trainer.model, None)
    return lost, held, after_two


def two_steps(folder, changes) -> dict:
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = trainer_of(folder, callbacks=[Stops()], **changes)
    trainer.train()
    return whole(trainer.model)


def test_after_an_exception_what_is_elsewhere_is_nan_until_it_is_asked_for(tmp_path):
    (expected,) = run_ranks(two_steps, 1, tmp_path / "one", {}, folder=tmp_path / "ranks")
    found = run_ranks(interrupted, 2, tmp_path / "two", folder=tmp_path / "ranks")
    for lost, held, after_two in found:
        assert lost and held and tiny.differing(expected, after_two) == []
    assert set(found[0][0]) & set(found[1][0]) == set()
    assert (tmp_path / "two" / "checkpoint-2" / "model.safetensors").is_file()


class AddsAReader(SAMPaTrainer):
    def compute_loss(self, *given, **named):
        if self.state.global_step == 2:
            self.add_callback(Reads())
        return super().compute_loss(*given, **named)


def test_a_reader_that_comes_later_is_refused(tmp_path):
    def message(error):
        return str(error.value)

    with pytest.raises(RankFailed) as error:
        run_ranks(late, 2, tmp_path, folder=tmp_path / "ranks")
    assert (
        "but the callback Reads came later: each process holds a part of the weights by now. Add it before train()"
        in message(error)
    )


def late(folder: Path) -> None:
    trainer_of(folder, AddsAReader, **SHARED).train()


class LooksUnseen(SAMPaTrainer):
    """At its weights in a function of the schedule, of which nobody can know."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.seen = []

        def look(step):
            self.seen.append([bool(param.isnan().all()) for param in self.model.parameters()])
            return 1.0

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, look)
        return self.lr_scheduler


def unseen(folder) -> tuple[list, list, dict]:
    trainer = trainer_of(folder, LooksUnseen, **SHARED)
    trainer.train()
    own = [i in trainer.sampa.placement.updated for i, _ in enumerate(trainer.model.parameters())]
    return own, trainer.seen[-1], whole(trainer.model)


def test_who_reads_unseen_reads_nan_and_no_other_weights(tmp_path):
    for own, are_nan, trained_weights in run_ranks(unseen, 2, tmp_path, folder=tmp_path / "ranks"):
        assert True in own and False in own
        assert are_nan == [not each for each in own]
        assert all(each.isfinite().all() for each in trained_weights.values())


def put_in(folder) -> list[str | None]:
    """What is found of methods that are put into objects, each by itself."""
    found = []
    trainer = trainer_of(folder, **SHARED)
    trainer.create_optimizer_and_scheduler(4)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    callback = trainer.callback_handler.callbacks[0]
    for one, name in ((trainer, "log"), (trainer.callback_handler, "call_event"), (callback, "on_step_end")):
        found.append(readers.reader_of(trainer))
        setattr(one, name, lambda *args, **kwargs: None)
        found.append(readers.reader_of(trainer))
        delattr(one, name)
    return found


def test_methods_that_are_put_into_objects_are_found(tmp_path):
    assert put_in(tmp_path) == [
        *(None, "SAMPaTrainer.log"),
        *(None, "CallbackHandler.call_event"),
        *(None, "DefaultFlowCallback.on_step_end"),
    ]


class EndsInAnUpdate(SAMPaTrainer):
    """By Ctrl-C, which finds one process before its update and the other after it."""

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        if self.state.global_step == 2 and self.args.process_index == 0:
            raise KeyboardInterrupt
        return norm


class EndsAfterAnUpdate(TrainerCallback):
    reads_model = False

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def ended_in_an_update(folder) -> str:
    readers.ELSEWHERE |= {"_clip_grad_norm"}
    trainer = trainer_of(folder, EndsInAnUpdate, [EndsAfterAnUpdate()], **SHARED)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(RuntimeError) as error:
        trainer.save_model()
    return str(error.value)


def test_weights_of_two_updates_are_never_put_together(tmp_path):
    for said in run_ranks(ended_in_an_update, 2, tmp_path, folder=tmp_path / "ranks"):
        assert "after the same update, got those after 2 on rank 0, 3 on rank 1" in said
        assert "resume_from_checkpoint=True" in said


class EvaluatesBeforeTheUpdate(TrainerCallback):
    reads_model = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.trainer.evaluate()


def evaluated_before_the_update(folder, changes) -> dict:
    trainer = trainer_of(folder, SAMPaTrainer, [callback := EvaluatesBeforeTheUpdate()], **changes)
    callback.trainer = trainer
    return tiny.outcome(trainer)["weights"]


def test_an_evaluation_between_gradient_and_update_changes_nothing(tmp_path):
    one = run_ranks(evaluated_before_the_update, 2, tmp_path, {}, folder=tmp_path / "whole")
    other = run_ranks(evaluated_before_the_update, 2, tmp_path, SHARED, folder=tmp_path / "shared")
    assert tiny.differing(one, other) == []


def begun_anew(folder) -> str:
    trainer = trainer_of(folder, Ends, **SHARED)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = SAMPaTrainer(model=trainer.model, args=tiny.arguments(folder / "again"), train_dataset=tiny.sentences(16))
    with pytest.raises(ValueError) as error:
        again.train()
    return str(error.value)


def test_a_model_whose_weights_are_elsewhere_is_not_trained(tmp_path):
    for said in run_ranks(begun_anew, 2, tmp_path, folder=tmp_path / "ranks"):
        assert "model: expected finite weights, got some in" in said and "go on from a checkpoint" in said

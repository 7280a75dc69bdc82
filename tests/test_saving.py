"""A checkpoint asked for at any moment is exact when it is resumed, or says that it is not; and none harms an older one."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from hf_sampa import SAMPaMixin, SAMPaTrainer
from hf_sampa.checkpoints import checkpoint, replaced
from hf_sampa.checkpoints.manifest import Weights
from hf_sampa.checkpoints.saved_weights import holds, load_every_tensor, record
from hf_sampa.checkpoints.whole import unreadable
from tests import tiny
from tests.former import as_before


# Epochs of five micro-batches, so three steps, the last of them cut short.
SETTINGS = {
    "gradient_accumulation_steps": 2,
    "logging_steps": 2,
    "include_num_input_tokens_seen": "all",
    "eval_strategy": "steps",
    "eval_steps": 2,
}
STEPS = 6


class Does(TrainerCallback):
    """Calls a function at one event, once, as soon as so many steps are through."""

    def __init__(self, event: str, step: int, function, first: bool = False):
        self.step, self.function, self.done = step, function, False
        setattr(self, event, self.called)

    def called(self, args, state, control, **kwargs):
        if state.global_step >= self.step and not self.done:
            self.done = True
            self.function()


def trainer_of(folder, trainer_class=SAMPaTrainer, model=None, callbacks=(), dataset=None, **changes):
    return trainer_class(
        model=model or tiny.bert(0.1),
        args=tiny.arguments(folder, **{**SETTINGS, **changes}),
        train_dataset=dataset or tiny.sentences(18),
        eval_dataset=tiny.sentences(6, seed=2),
        callbacks=list(callbacks),
    )


def save(trainer):
    trainer._save_checkpoint(trainer.model, trial=None)


def steps_saved(folder) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in Path(folder).glob("checkpoint-*"))


def bytes_of(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def outcome(trainer, resume=None) -> dict:
    found = tiny.comparable(tiny.outcome(trainer, resume))
    return {**found, "flos": trainer.state.total_flos}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that never saved."""
    return outcome(trainer_of(tmp_path_factory.mktemp("whole")))


# ---- In every callback ----

AT_ONCE = {
    "on_train_begin": 0,
    "on_epoch_begin": 3,
    "on_step_begin": 4,
    "on_substep_end": 4,
    "on_save": 4,
    "on_train_end": 6,
}
PUT_OFF = {"on_pre_optimizer_step": 3, "on_optimizer_step": 3, "on_step_end": 4, "on_log": 4, "on_evaluate": 4}


@pytest.mark.parametrize("event", [*AT_ONCE, *PUT_OFF, "on_epoch_end"])
def test_saved_in_a_callback_and_resumed_is_never_stopped(tmp_path, caplog, whole, event):
    step = {**AT_ONCE, **PUT_OFF, "on_epoch_end": 3}[event]
    saves = {"save_strategy": "steps", "save_steps": 4} if event == "on_save" else {}
    saving = trainer_of(tmp_path, **saves)
    saving.add_callback(Does(event, step, lambda: save(saving)))
    with tiny.transformers_log(caplog):
        assert tiny.differing(whole, outcome(saving)) == []
    saved_at = 4 if event in PUT_OFF else step
    assert steps_saved(tmp_path) == ([4, 6] if event == "on_save" else [saved_at])
    assert ("it is saved at the end of the step" in caplog.text) == (event not in AT_ONCE)
    assert not list(tmp_path.glob("_*"))
    found = outcome(trainer_of(tmp_path), str(tmp_path / f"checkpoint-{saved_at}"))
    if event == "on_train_end":  # the summary of the run is in its log already
        del found["logs"][-2]
    assert tiny.differing(whole, found) == []


@pytest.mark.parametrize("event", ["on_train_begin", "on_epoch_begin", "on_step_begin"])
def test_saved_again_where_a_resumed_run_begins(tmp_path, whole, event):
    trainer_of(tmp_path / "first", save_strategy="steps", save_steps=1).train()
    again = trainer_of(tmp_path / "second")
    again.add_callback(Does(event, 0, lambda: save(again)))
    expected = outcome(again, str(tmp_path / "first" / "checkpoint-3"))
    assert steps_saved(tmp_path / "second") == [3]
    assert tiny.differing(whole, expected) == []
    assert (
        tiny.differing(whole, outcome(trainer_of(tmp_path / "third"), str(tmp_path / "second" / "checkpoint-3"))) == []
    )


def test_a_step_that_an_ended_training_leaves_undone(tmp_path, whole):
    """The batch was read, and some of its micro-batches were counted."""
    stopping = trainer_of(tmp_path, save_strategy="epoch")

    def stop():
        stopping.control.should_training_stop = True

    stopping.add_callback(Does("on_substep_end", 4, stop))
    stopping.train()
    assert steps_saved(tmp_path) == [3, 4]
    assert tiny.differing(whole, outcome(trainer_of(tmp_path), True)) == []


def test_an_epoch_that_a_callback_ends_early(tmp_path):
    """Saved at the next epoch's beginning: the rest of the one before, and its g_t, are not trained on."""

    def leaving(folder, saves):
        trainer = trainer_of(folder, eval_strategy="no")

        def leave():
            trainer.control.should_epoch_stop = True

        trainer.add_callback(Does("on_step_end", 1, leave))
        if saves:
            trainer.add_callback(Does("on_epoch_begin", 1, lambda: save(trainer)))
        return trainer

    expected = outcome(leaving(tmp_path, saves=True))
    assert steps_saved(tmp_path) == [1]
    assert tiny.differing(expected, outcome(trainer_of(tmp_path, eval_strategy="no"), True)) == []


def test_a_save_within_a_pass_waits_and_save_model_is_refused(tmp_path, caplog, whole):
    class Saves(SAMPaTrainer):
        refused = ""

        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 2 and self._in_pass and not Saves.refused:
                save(self)
                try:
                    self.save_model(str(tmp_path / "displaced"))
                except RuntimeError as error:
                    Saves.refused = str(error)
            return super().compute_loss(*args, **kwargs)

    assert tiny.differing(whole, outcome(trainer_of(tmp_path, Saves))) == []
    assert Saves.refused.startswith("save_model: expected to be called between two steps, but within a step")
    assert steps_saved(tmp_path) == [3] and not (tmp_path / "displaced").exists()
    assert tiny.differing(whole, outcome(trainer_of(tmp_path), True)) == []


# ---- After an interrupt ----


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("event", "step"), [("on_epoch_begin", 3), ("on_step_begin", 2), ("on_substep_end", 4)])
def test_saved_after_an_interrupt_between_steps(tmp_path, whole, event, step):
    stopped = trainer_of(tmp_path, callbacks=[Does(event, step, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    save(stopped)
    assert steps_saved(tmp_path) == [step]
    assert tiny.differing(whole, outcome(trainer_of(tmp_path), True)) == []


def test_saved_after_an_interrupt_at_the_end_of_a_step(tmp_path, whole):
    """The step's log line was not written: it comes with the next one."""
    stopped = trainer_of(tmp_path, callbacks=[Does("on_step_end", 3, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    save(stopped)
    assert tiny.differing(whole, outcome(trainer_of(tmp_path), True)) == []


class InterruptedPass(SAMPaTrainer):
    """Is interrupted in a pass of the fourth step."""

    perturbed = True

    def compute_loss(self, *args, **kwargs):
        if (
            self._in_pass
            and self.state.global_step == 3
            and self.perturbed == (self._run.steps.micro_batches.in_pass[1].value == 0)
        ):
            raise KeyboardInterrupt
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("perturbed", [True, False])
def test_a_carried_gradient_that_an_interrupt_lost(tmp_path, caplog, perturbed):
    stopped = trainer_of(tmp_path, InterruptedPass, save_strategy="steps", save_steps=3)
    stopped.perturbed = perturbed
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    before = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    with tiny.transformers_log(caplog):
        save(stopped)
    assert "The run was interrupted within a step" in caplog.text and "is computed anew" in caplog.text
    assert tiny.differing(before, load_file(tmp_path / "checkpoint-3" / "model.safetensors")) == []
    assert checkpoint.read_tensors(tmp_path / "checkpoint-3") == {}
    resumed = trainer_of(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS


def test_an_interrupted_pass_of_sam(tmp_path, caplog):
    """It carries no gradient that could be lost."""
    stopped = trainer_of(tmp_path, InterruptedPass, method="sam")
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    with tiny.transformers_log(caplog):
        save(stopped)
    assert "The run was interrupted within a step" in caplog.text and "g_t" not in caplog.text
    found = outcome(trainer_of(tmp_path, method="sam"), True)
    assert tiny.differing(outcome(trainer_of(tmp_path / "whole", method="sam")), found) == []


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_an_interrupt_within_the_update_is_refused(tmp_path, whole, event):
    stopped = trainer_of(tmp_path, callbacks=[Does(event, 3, interrupt)], save_strategy="steps", save_steps=3)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    before = bytes_of(tmp_path)
    with pytest.raises(RuntimeError, match="interrupted within the optimizer's step.*Resume from the last checkpoint"):
        save(stopped)
    assert bytes_of(tmp_path) == before
    assert tiny.differing(whole, outcome(trainer_of(tmp_path), True)) == []


# ---- Before and after a run ----


def test_nothing_to_save_before_a_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"nothing was trained yet, .*Call train\(\) first"):
        save(trainer_of(tmp_path))


@pytest.mark.parametrize("twice", [False, True], ids=["trained", "resumed when it was finished"])
def test_saved_after_the_end_and_continued(tmp_path, twice):
    """A finished run trains no further step, also where it ended within an epoch."""
    settings = {"lr_scheduler_type": "constant", "eval_strategy": "no", "logging_steps": 4}
    expected = outcome(trainer_of(tmp_path, max_steps=STEPS, **settings))
    ended = trainer_of(tmp_path / "ended", max_steps=4, **settings)
    ended.train()
    save(ended)
    if twice:
        weights = {name: value.clone() for name, value in ended.model.state_dict().items()}
        ended = trainer_of(tmp_path / "ended", max_steps=4, **settings)
        ended.train(resume_from_checkpoint=True)
        assert ended.state.global_step == 4
        assert tiny.differing(weights, dict(ended.model.state_dict())) == []
        save(ended)
    found = outcome(trainer_of(tmp_path / "ended", max_steps=STEPS, **settings), True)
    for name in ("weights", "optimizer"):
        assert tiny.differing(expected[name], found[name]) == []


BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "rating",
    "save_strategy": "steps",
    "save_steps": 2,
    "greater_is_better": True,
}


class Rates(TrainerCallback):
    """Rates the evaluations of a run."""

    def __init__(self, *ratings):
        self.ratings = iter(ratings)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_rating"] = next(self.ratings)


@pytest.mark.parametrize("last_is_best", [False, True])
def test_after_the_best_weights_were_loaded(tmp_path, last_is_best):
    trainer = trainer_of(tmp_path, callbacks=[Rates(0.5, 0.1, 0.9 if last_is_best else 0.2)], **BEST)
    trainer.train()
    before = bytes_of(tmp_path)
    if last_is_best:
        save(trainer)
        return
    with pytest.raises(
        RuntimeError, match=r"load_best_model_at_end has loaded those of step 2. save_model\(\) saves them"
    ):
        save(trainer)
    assert bytes_of(tmp_path) == before


# ---- transformers' own save on SIGTERM ----


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_step_end", "on_epoch_end"])
def test_saved_on_sigterm(tmp_path, whole, event):
    trainer = trainer_of(tmp_path, enable_jit_checkpoint=True)
    manager = next(each.jit_manager for each in trainer.callback_handler.callbacks if hasattr(each, "jit_manager"))
    manager.kill_wait = 0

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)
        while not manager.is_checkpoint_requested:
            time.sleep(0.01)

    own = Does(event, 3 if event == "on_epoch_end" else 2, terminate)
    trainer.callback_handler.callbacks.insert(0, own)  # before transformers looks whether there was a signal
    trainer.train()
    assert steps_saved(tmp_path) == [{"on_epoch_end": 3, "on_substep_end": 4}.get(event, 2)]
    assert trainer.state.global_step < STEPS
    assert not list(tmp_path.rglob("checkpoint-is-incomplete.txt"))
    assert tiny.differing(whole, outcome(trainer_of(tmp_path), True)) == []


# ---- No save harms an older one ----


class Failing(SAMPaTrainer):
    """Cannot write its optimizer."""

    def _save_optimizer_and_scheduler(self, output_dir):
        Path(output_dir, "optimizer.pt").write_bytes(b"half of it")
        raise AttributeError("it has no optimizer of its own")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer_of(folder, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """An output folder with checkpoints at steps 2, 4 and 6."""
    for step in (2, 4, 6):
        for name, content in bytes_of(saved / f"checkpoint-{step}").items():
            file = tmp_path / "out" / f"checkpoint-{step}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return tmp_path / "out"


def test_an_old_checkpoint_outlives_one_that_cannot_be_written(folder, whole):
    before = bytes_of(folder)
    with pytest.raises(AttributeError, match="no optimizer of its own"):
        trainer_of(folder, Failing, save_strategy="steps", save_steps=4).train(str(folder / "checkpoint-2"))
    assert bytes_of(folder) == before
    assert tiny.differing(whole, outcome(trainer_of(folder), str(folder / "checkpoint-4"))) == []


@pytest.mark.parametrize("name", [True, "checkpoint-6"])
def test_an_old_checkpoint_is_found_after_a_kill(folder, whole, name):
    """As it lies there when the process is killed while it writes checkpoint-6 anew."""
    last = folder / "checkpoint-6"
    before = bytes_of(last)
    last.rename(folder / "_checkpoint-6.replaced")
    last.mkdir()
    (last / "model.safetensors").write_bytes(b"half of it")
    trainer_of(folder).train(resume_from_checkpoint=name if name is True else str(folder / name))
    assert bytes_of(last) == before
    assert steps_saved(folder) == [2, 4, 6] and not list(folder.glob("_*"))


def test_what_others_put_into_a_checkpoint_stays(folder):
    """But not state that would be taken for the new one's."""
    last = folder / "checkpoint-4"
    (last / "notes.txt").write_text("mine")
    (last / "README.md").write_text("# Mine\n")
    (last / "rng_state_1.pth").write_bytes(b"of another world")
    (last / "old").mkdir()
    (last / "old" / "adapter_model.safetensors").write_bytes(b"of another model")
    trainer_of(folder, save_strategy="steps", save_steps=4).train(str(folder / "checkpoint-2"))
    assert (last / "notes.txt").read_text() == "mine" and (last / "README.md").read_text() == "# Mine\n"
    assert not (last / "rng_state_1.pth").exists() and not (last / "old").exists()


def test_both_whole_and_neither(tmp_path, saved):
    new, old = tmp_path / "checkpoint-2", tmp_path / "_checkpoint-2.replaced"
    for path in (new, old):
        path.mkdir()
        for name, content in bytes_of(saved / "checkpoint-2").items():
            (path / name).write_bytes(content)
    (old / "trainer_state.json").unlink()
    (new / "trainer_state.json").rename(new / "away")
    replaced.restore(new)
    assert new.exists() and old.exists()
    (new / "away").rename(new / "trainer_state.json")
    replaced.restore(new)
    assert new.exists() and not old.exists()


def test_files_are_synced_as_windows_allows(tmp_path, monkeypatch):
    """There a file that was opened for reading cannot be synced."""
    opened = []
    monkeypatch.setattr(os, "fsync", lambda number: opened.append(os.write(number, b"")))
    trainer_of(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert len(opened) >= 2


# ---- What makes a checkpoint whole ----


def test_the_manifest_lists_every_file_but_the_card(folder):
    last = folder / "checkpoint-2"
    files = json.loads((last / "sampa.json").read_text())["files"]
    assert files.keys() == {file.name for file in last.iterdir()} - {"sampa.json", "README.md"}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "config.json"} < files.keys()


def test_files_that_are_not_needed_may_be_missing(folder, whole):
    last = folder / "checkpoint-4"
    for name in ("training_args.bin", "config.json"):
        (last / name).unlink()
    (last / "README.md").write_text("another card")
    (last / "notes.txt").write_text("put there later")
    assert tiny.differing(whole, outcome(trainer_of(folder), str(last))) == []


def test_sizes_of_an_earlier_version(folder, whole):
    last = folder / "checkpoint-4"
    as_before(last)
    (last / "config.json").write_text((last / "config.json").read_text() + "\n")  # listed, but not needed
    assert tiny.differing(whole, outcome(trainer_of(folder), str(last))) == []
    size = (last / "optimizer.pt").stat().st_size
    with open(last / "optimizer.pt", "r+b") as file:
        file.seek(size // 2)
        file.write(b"damage")
    with pytest.raises(ValueError, match="checkpoint-4 is torn or damaged: optimizer.pt is damaged, in its record"):
        trainer_of(folder).train(resume_from_checkpoint=str(last))


def in_parts(last):
    BertForSequenceClassification.from_pretrained(last).save_pretrained(last, max_shard_size="10KB")
    (last / "model.safetensors").unlink(missing_ok=True)
    assert len(list(last.glob("model-*-of-*.safetensors"))) > 1


def other_metadata(last):
    weights = load_file(last / "model.safetensors")
    save_file(weights, last / "model.safetensors", metadata={"format": "pt", "note": "saved again"})


def in_another_format(last):
    torch.save(load_file(last / "model.safetensors"), last / "pytorch_model.bin")
    (last / "model.safetensors").unlink()


def edited_configuration(last):
    config = last / "config.json"
    config.write_text(config.read_text().replace('"vocab_size"', '"note": 1, "vocab_size"'))


CHANGES = {in_parts: "model.safetensors", other_metadata: "model.safetensors", in_another_format: "model.safetensors"}
CHANGES |= {edited_configuration: "config.json"}


@pytest.mark.parametrize(("change", "name"), CHANGES.items())
def test_files_that_were_changed_on_purpose(folder, whole, caplog, change, name):
    last = folder / "checkpoint-4"
    change(last)
    refused = rf"checkpoint-4 is not as it was written: {name} .*ignore_changed_files=True goes on from it\. Resume from another"
    with pytest.raises(ValueError, match=refused):
        trainer_of(folder).train(resume_from_checkpoint=str(last))
    trainer = trainer_of(folder, ignore_changed_files=True)
    with tiny.transformers_log(caplog):
        assert tiny.differing(whole, outcome(trainer, str(last))) == []
    assert f"ignore_changed_files: {last} is not as it was written, and is taken as it is: {name} " in caplog.text
    assert trainer.continued[0].startswith(f"continued after step 4 from files that were changed: {name}")


def test_a_part_that_is_missing_or_cut(folder):
    last = folder / "checkpoint-4"
    in_parts(last)
    part = sorted(last.glob("model-*-of-*.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match="checkpoint-4 cannot be taken as it is.* is missing or damaged: model.safetensors is missing; model-00001-of",
        ):
            trainer_of(folder, ignore_changed_files=True).train(resume_from_checkpoint=str(last))
        part.unlink(missing_ok=True)


def test_weights_beside_those_that_were_written(folder, whole):
    """As save_pretrained leaves them, where it writes in parts."""
    last = folder / "checkpoint-4"
    (last / "pytorch_model.bin").write_bytes((last / "optimizer.pt").read_bytes())
    with pytest.raises(ValueError, match="is not as it was written: pytorch_model.bin was put there later"):
        trainer_of(folder).train(resume_from_checkpoint=str(last))


def test_a_header_of_more_bytes_than_any_file_has(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + b"{}")
    assert unreadable(file) == "is damaged: SafetensorError while it was read"


def test_other_weights_under_the_same_names(folder):
    last = folder / "checkpoint-4"
    weights = load_file(last / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, last / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not as it was written: model.safetensors has another content"):
        trainer_of(folder).train(resume_from_checkpoint=str(last))
    trainer = trainer_of(folder, ignore_changed_files=True, max_steps=4)
    trainer.train(resume_from_checkpoint=str(last))
    assert tiny.differing(weights, trainer.model.state_dict()) == []
    as_before(last)  # which knows the weights by their fingerprint
    with pytest.raises(
        ValueError, match="Expected the model to hold the weights that were saved in .* but after loading it"
    ):
        trainer_of(folder).train(resume_from_checkpoint=str(last))


def test_a_model_of_nothing_but_trained_weights_is_told_from_others():
    model = nn.Linear(2, 2)
    recorded = Weights(**record(model, ["weight", "bias"]))
    assert holds(model, recorded)
    with torch.no_grad():
        model.bias += 1
    assert not holds(model, recorded)


def test_refusals_begin_as_plain_trainers_do(tmp_path):
    (tmp_path / "empty").mkdir()
    nowhere, empty = str(tmp_path / "nowhere"), str(tmp_path / "empty")
    for path in (nowhere, empty):
        with pytest.raises(ValueError, match=f"^Can't find a valid checkpoint at {re.escape(path)}[:,]"):
            trainer_of(tmp_path).train(resume_from_checkpoint=path)
    words = re.escape(f"No valid checkpoint found in output directory ({empty})")
    with pytest.raises(ValueError, match=f"^{words}: .*found none. Start without it."):
        trainer_of(empty).train(resume_from_checkpoint=True)


def test_another_batch_size_with_ignore_data_skip(folder, caplog):
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "seed": 3}
    with pytest.raises(
        ValueError, match="data stream.* but it changed: .*set ignore_data_skip=True to start the epoch anew"
    ):
        trainer_of(folder, **changes).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    resumed = trainer_of(folder, ignore_data_skip=True, max_steps=6, **changes)
    with tiny.transformers_log(caplog):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert "Resuming with another data stream, per_device_train_batch_size: 4 in the checkpoint, 2 now." in caplog.text
    assert "ignore_data_skip: the stream starts its epoch anew, and g_t is computed there." in caplog.text
    assert resumed.state.global_step == 6


# ---- Weights alone ----


def test_weights_alone_are_told_from_plain_trainers(tmp_path, caplog):
    trainer_of(tmp_path, save_only_model=True, save_strategy="steps", save_steps=4).train()
    kept = {file.name for file in (tmp_path / "checkpoint-4").iterdir()}
    assert "sampa.json" in kept and not kept & {"optimizer.pt", "sampa_trainer.pt"}
    assert checkpoint.read_tensors(tmp_path / "checkpoint-4") == {}
    resumed = trainer_of(tmp_path, variant="vasso")
    with tiny.transformers_log(caplog):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "holds the weights alone" in caplog.text and "the optimizer, its schedule and g_t start anew" in caplog.text
    assert resumed.state.global_step == STEPS
    assert resumed.continued[-1].startswith("steps 1 to 4 were SAMPa's, of which only the weights were kept")
    assert not any("plain Trainer" in sentence for sentence in resumed.continued)


def test_weights_alone_are_torn_until_their_state_is_written(tmp_path):
    trainer_of(tmp_path, save_only_model=True, save_strategy="steps", save_steps=4).train()
    last = tmp_path / "checkpoint-4"
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ValueError, match="model.safetensors has"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(last))


# ---- Tensors that are not in the weights ----


class LeftOut(BertForSequenceClassification):
    """Has a buffer that it does not save, as positions that can be computed, and takes no notice where it is missing."""

    _keys_to_ignore_on_save = ["positions"]
    _keys_to_ignore_on_load_missing = ["positions", "scale"]

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("positions", torch.arange(100.0))
        self.register_buffer("scale", torch.full((3,), 2.0))


def left_out_bert():
    torch.manual_seed(0)
    return LeftOut(tiny.bert().config)


def test_what_a_checkpoint_leaves_out_stays_as_it_is(tmp_path):
    trainer_of(tmp_path, model=left_out_bert(), save_strategy="steps", save_steps=4).train()
    assert "positions" not in load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    resumed = trainer_of(tmp_path, model=left_out_bert(), max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(resumed.model.positions, torch.arange(100.0))
    other = left_out_bert()
    other.positions += 1
    load_every_tensor(other, str(tmp_path / "checkpoint-4"))
    assert torch.equal(other.positions, torch.arange(100.0) + 1)


def test_every_other_tensor_is_accounted_for(tmp_path):
    """Even where from_pretrained is told to say nothing of it."""
    trainer_of(tmp_path, model=left_out_bert(), save_strategy="steps", save_steps=4).train()
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    weights = load_file(file)
    del weights["scale"]
    save_file(weights, file, metadata={"format": "pt"})
    trainer = trainer_of(tmp_path, model=left_out_bert(), ignore_changed_files=True)
    with pytest.raises(ValueError, match="Expected every tensor of the model in .*'missing_keys': .'scale'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_other_buffers_under_the_same_names(tmp_path):
    trainer_of(tmp_path, model=left_out_bert(), save_strategy="steps", save_steps=4).train()
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    weights = load_file(file)
    weights["scale"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    as_before(file.parent)
    with pytest.raises(ValueError, match="Expected the model to hold the weights that were saved in"):
        trainer_of(tmp_path, model=left_out_bert()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_tensors_of_a_model_of_ones_own_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match="but got .*the model is no PreTrainedModel, and its keys differ"):
        load_every_tensor(nn.Linear(2, 2), str(tmp_path))


class Swallows(Trainer):
    """Does as if nothing had happened where the best model cannot be loaded."""

    fails = True

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.fails:
            raise OSError("cannot be read")
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        try:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        except OSError:
            return


def test_a_best_model_that_was_not_loaded_is_not_passed_over_in_silence(tmp_path):
    class Mine(SAMPaMixin, Swallows):
        pass

    trainer = trainer_of(tmp_path, Mine, callbacks=[Rates(0.5, 0.1, 0.2)], **BEST)
    with pytest.raises(OSError, match="cannot be read"):
        trainer.train()


# peft asks transformers by an old name.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def lora(more: bool = False):
    torch.manual_seed(3)
    model = get_peft_model(tiny.bert(0.1), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    model.base_model.model.bert.embeddings.LayerNorm.requires_grad_(more)
    return model


@PEFT_WARNS
def test_adapters_go_on(tmp_path):
    whole = outcome(trainer_of(tmp_path, model=lora(), save_strategy="steps", save_steps=3))
    last = tmp_path / "checkpoint-3"
    assert "adapter_model.safetensors" in json.loads((last / "sampa.json").read_text())["files"]
    assert tiny.differing(whole, outcome(trainer_of(tmp_path, model=lora()), str(last))) == []


@PEFT_WARNS
def test_weights_that_adapters_are_saved_without(tmp_path):
    trainer_of(tmp_path, model=lora(more=True), save_strategy="steps", save_steps=3).train()
    with pytest.raises(ValueError, match="have not every tensor that is trained, as weights beside peft's adapters"):
        trainer_of(tmp_path, model=lora(more=True)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# ---- What moves, and what is trained, besides the model's weights ----


class Remembers(nn.Module):
    """A classifier with a queue of what it has seen, which is not saved, and a frozen teacher that follows it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(64, 8)
        self.teacher = nn.Linear(64, 8).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4, 8), persistent=False)

    def forward(self, pixel_values, labels=None):
        features = self.body(pixel_values.flatten(1))
        if self.training:
            with torch.no_grad():
                self.queue = torch.cat([features[:1].detach(), self.queue[:-1]])
                self.teacher.weight.mul_(0.9).add_(self.body.weight, alpha=0.1)
        loss = (features - self.teacher(pixel_values.flatten(1))).square().mean()
        return {"loss": loss + 0.1 * (features @ self.queue.T).square().mean(), "logits": features}


class WithLoss(SAMPaTrainer):
    """A loss with weights of its own, and counts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.manual_seed(1)
        self.loss = nn.Linear(8, 3)
        self.seen, self.lines = 0, []

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            params = [param for param in self.model.parameters() if param.requires_grad]
            self.optimizer = torch.optim.AdamW([*params, *self.loss.parameters()], lr=0.01)
        return super().create_optimizer(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        classes = nn.functional.cross_entropy(self.loss(outputs["logits"]), inputs["labels"])
        if model.training:
            self.seen += len(inputs["labels"])
            self.lines.append((self.seen, float(classes.detach())))
        loss = outputs["loss"] + classes
        return (loss, outputs) if return_outputs else loss


def remembering(folder, **changes):
    return WithLoss(
        model=Remembers(),
        args=tiny.arguments(folder, **{**SETTINGS, **changes}),
        train_dataset=tiny.images(18),
        eval_dataset=tiny.images(6),
        callbacks=[Rates(0.5, 0.1, 0.2)] if "load_best_model_at_end" in changes else [],
    )


def remembered(trainer) -> dict:
    own = {"queue": trainer.model.queue, "loss": dict(trainer.loss.named_parameters())}
    return {**own, "teacher": trainer.model.teacher.weight, "seen": trainer.seen, "lines": trainer.lines}


@pytest.mark.parametrize("step", [2, 3])
def test_all_that_moves_goes_on(tmp_path, step):
    first = remembering(tmp_path, save_strategy="steps", save_steps=1)
    expected = outcome(first)
    resumed = remembering(tmp_path / "again")
    found = outcome(resumed, str(tmp_path / f"checkpoint-{step}"))
    assert first.model.queue.abs().sum() > 0 and first.seen == 36 and len(first.lines) == 10
    assert tiny.differing(remembered(first), remembered(resumed)) == []
    assert tiny.differing(expected, found) == []


def test_weights_of_a_loss_are_those_of_the_best_step(tmp_path):
    trainer = remembering(tmp_path, **BEST)
    weights = []
    trainer.add_callback(tiny.Each(lambda: weights.append([p.detach().clone() for p in trainer.loss.parameters()])))
    trainer.train()
    assert tiny.differing([p.detach() for p in trainer.loss.parameters()], weights[1]) == []
    assert tiny.differing(weights[1], weights[-1]) != []


def test_a_loss_that_has_changed(tmp_path):
    remembering(tmp_path, save_strategy="steps", save_steps=4).train()
    other = remembering(tmp_path)
    other.loss = nn.Linear(8, 5)
    with pytest.raises(
        ValueError, match="Expected the weights besides the model's that .*loss.bias, loss.weight is not in both"
    ):
        other.train(resume_from_checkpoint=True)


def test_checkpoints_of_before(tmp_path, caplog):
    """They do not say what forward moves: all saved buffers may."""
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
    run = partial(tiny.run, model=tiny.BatchNormNet, dataset=tiny.images(18))
    expected = run(tmp_path, **settings)
    last = tmp_path / "checkpoint-4"
    save_file(checkpoint.read_tensors(last), last / "sampa.safetensors")
    as_before(last, without=("moving", "weights"))
    trainer = SAMPaTrainer(
        model=tiny.BatchNormNet(), args=tiny.arguments(tmp_path, save_strategy="no"), train_dataset=tiny.images(18)
    )
    found = tiny.outcome(trainer, str(last))
    assert "body.1.running_mean" in trainer.sampa.forward_state.moving
    assert tiny.differing(tiny.comparable(expected), tiny.comparable(found)) == []

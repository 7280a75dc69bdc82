"""What is refused, and what the message says: expected, got, what to do."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments, training_args
from hf_sampa.checkpoints import checkpoint
from hf_sampa.checks import check_trainer
from hf_sampa.distributed.roles import Mesh, Role
from hf_sampa.finetuning import BaselineTrainer
from tests import tiny
from tests.former import as_before


def trainer(folder, model=None, dataset=None, **changes):
    dataset = tiny.sentences(16) if dataset is None else dataset
    return SAMPaTrainer(model=model or tiny.bert(), args=tiny.arguments(folder, **changes), train_dataset=dataset)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rho": -0.1}, r"rho: expected a finite number of at least 0, got -0\.1\. The paper uses 0\.05"),
        ({"rho": float("nan")}, "rho: expected a finite number of at least 0, got nan"),
        ({"rho": float("inf")}, "rho: expected a finite number of at least 0, got inf"),
        ({"lmbda": 1.5}, r"lmbda: expected a number from 0 to 1, got 1\.5"),
        ({"lmbda": float("nan")}, "lmbda: expected a number from 0 to 1, got nan"),
        ({"method": "asam"}, "method: expected one of sampa, sam, got 'asam'"),
        (
            {"deepspeed": "zero2.json"},
            "this run uses DeepSpeed, whose engine holds them in a way of its own. Launch it without.*go with FSDP2, as fsdp=True",
        ),
        ({"optim": "adalomo"}, "expected an optimizer whose step comes after backward, got 'adalomo'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "expected 'random', 'sequential' or 'group_by_length'"),
    ],
)
def test_settings(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        tiny.arguments(tmp_path, **setting)


def test_a_launcher_with_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="this run uses DeepSpeed"):
        tiny.arguments(tmp_path)


def test_help_shows_our_fields_and_ranges():
    text = " ".join(HfArgumentParser(SAMPaTrainingArguments).format_help().split())
    for part in ("--rho", "(rho, at least 0)", "--lmbda", "(lambda, 0 to 1)", "--method", "sequential SAM"):
        assert part in text
    documented = SAMPaTrainingArguments.__mro__[1].__doc__
    assert all(f"{name} (`" in documented for name in ("method", "rho", "lmbda"))


def test_odd_worlds():
    with pytest.raises(
        ValueError, match="an even number of them .or one., but the world has 3. Start it with .*num_processes 4"
    ):
        Mesh.for_method("sampa", 3, 0)
    assert Mesh.for_method("sam", 3, 2).num_replicas == 3
    assert Mesh.for_method("sampa", 1, 0).roles == (Role.PERTURBED, Role.LOOKAHEAD)
    assert [(m.roles[0].name, m.replica, m.peer) for m in (Mesh.for_method("sampa", 4, r) for r in range(4))] == [
        ("PERTURBED", 0, 2),
        ("PERTURBED", 1, 3),
        ("LOOKAHEAD", 0, 0),
        ("LOOKAHEAD", 1, 1),
    ]


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_a_world_that_the_trainer_does_not_see(tmp_path, monkeypatch, variable):
    args = tiny.arguments(tmp_path)
    monkeypatch.setenv(variable, "2")
    with pytest.raises(
        ValueError,
        match=f"variable {variable} says that a launcher started 2 processes, but this trainer sees a world of 1.*--use_cpu"
        f".*unset {variable}",
    ):
        SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))


def test_data_parallel(tmp_path):
    args = tiny.arguments(tmp_path)
    args._n_gpu = 3
    with pytest.raises(
        ValueError, match="DataParallel over 3 GPUs. Start it with `accelerate launch --num_processes 2`"
    ):
        SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16))


def test_arguments_without_the_mixin(tmp_path):
    with pytest.raises(ValueError, match="args: expected SAMPaTrainingArguments.*got TrainingArguments"):
        SAMPaTrainer(model=tiny.bert(), args=TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(tmp_path, dtype):
    with pytest.raises(
        ValueError, match=r"Expected trainable weights in float32.*is torch\.b?float16.*dtype=torch\.float32"
    ):
        trainer(tmp_path, tiny.bert().to(dtype)).train()


def test_frozen_half_precision_weights_are_fine(tmp_path):
    model = tiny.bert()
    model.frozen = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)
    trainer(tmp_path, model, max_steps=1).train()


@pytest.mark.parametrize("part", [slice(None), slice(1, None)])
def test_weights_in_the_same_memory(tmp_path, part):
    model = tiny.bert()
    model.register_buffer("seen", model.classifier.weight.detach()[part])
    with pytest.raises(ValueError, match="but 'classifier.weight' and 'seen' share theirs.*Tie them as one Parameter"):
        trainer(tmp_path, model).train()


@pytest.mark.parametrize(
    ("keep", "name"),
    [
        (lambda model, weight: setattr(model, "transposed", weight.data.t()), "transposed"),
        (lambda model, weight: setattr(model.bert, "kept", [weight.data]), "bert.kept"),
        (lambda model, weight: setattr(model.bert, "kept", {"a": weight.detach()[:1]}), "bert.kept"),
    ],
    ids=["an attribute", "in a list", "in a dict"],
)
def test_views_of_weights_that_are_no_parameters(tmp_path, keep, name):
    """They would stay when the weight is moved: with two processes at x_0, for the whole run."""
    model = tiny.bert()
    keep(model, model.classifier.weight)
    with pytest.raises(ValueError, match=f"but '{name}' is a view of 'classifier.weight'.*Take it in forward instead"):
        trainer(tmp_path, model)


def test_a_parameter_in_a_list_is_that_parameter(tmp_path):
    model = tiny.bert()
    model.kept = [model.classifier.weight, torch.zeros(3)]
    trainer(tmp_path, model).train()


def test_spectral_norm_makes_its_view_anew(tmp_path):
    model = tiny.bert()
    torch.nn.utils.spectral_norm(model.classifier)
    trainer(tmp_path, model, max_steps=1).train()


def test_weights_that_interleave_are_fine(tmp_path):
    model = tiny.bert()
    columns = torch.randn(4, 4)
    model.left, model.right = torch.nn.Parameter(columns[:, :2]), torch.nn.Parameter(columns[:, 2:])
    trainer(tmp_path, model, max_steps=1).train()


def test_fp16_on_a_cpu_is_said_to_be_fp32(tmp_path, caplog):
    trainer(tmp_path, tiny.bert(), fp16=True)
    assert "fp16: Trainer has it on GPUs only, so that this run computes in fp32. On a CPU use bf16." in caplog.text


@pytest.mark.parametrize("layer", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_sparse_gradients(tmp_path, layer):
    model = tiny.bert()
    model.extra = layer(4, 2, sparse=True)
    with pytest.raises(ValueError, match=f"dense gradients, but 'extra', a {layer.__name__}.*sparse=False, or freeze"):
        trainer(tmp_path, model).train()
    model.extra.requires_grad_(False)
    trainer(tmp_path, model, max_steps=1).train()


def test_nothing_to_train(tmp_path):
    with pytest.raises(ValueError, match="at least one trainable parameter, but requires_grad is False for all"):
        trainer(tmp_path, tiny.bert().requires_grad_(False)).train()


def test_an_empty_dataset(tmp_path):
    with pytest.raises(ValueError, match="Expected a training dataset of at least one sample, but got an empty one"):
        trainer(tmp_path, dataset=[]).train()


def test_less_than_one_batch(tmp_path):
    message = r"got 3 sample\(s\) for batches of 4 on 1 replica\(s\) with dataloader_drop_last=True: use a smaller"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, dataset=tiny.sentences(3), dataloader_drop_last=True).train()


class Unfreezing(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.requires_grad_(True)


def test_unfreezing_during_training(tmp_path):
    args = tiny.arguments(tmp_path)
    run = SAMPaTrainer(model=tiny.frozen_bert(), args=args, train_dataset=tiny.sentences(16), callbacks=[Unfreezing()])
    with pytest.raises(
        ValueError,
        match=r"0 of them are frozen, the model has 25 trainable ones, the optimizer holds 20. Do that before train\(\) .on_train_begin is too late",
    ):
        run.train()


def test_apple_devices(tmp_path, monkeypatch):
    args = tiny.arguments(tmp_path)
    monkeypatch.setattr(type(args), "device", torch.device("mps"))
    fake = SimpleNamespace(args=args)
    with pytest.raises(ValueError, match="double precision, which this device .mps. does not have. Pass --use_cpu"):
        check_trainer(fake)


def test_finding_the_batch_size_on_several_processes(tmp_path, monkeypatch):
    args = tiny.arguments(tmp_path, auto_find_batch_size=True)
    monkeypatch.setattr(type(args), "world_size", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="auto_find_batch_size .* needs a world of one, but got 2 processes"):
        check_trainer(SimpleNamespace(args=args))


def test_an_iterable_dataset_without_items(tmp_path):
    with pytest.raises(ValueError, match="at least one batch in the first epoch of the training data, but got none"):
        trainer(tmp_path, dataset=tiny.Stream(0), max_steps=2).train()


# ---- Checkpoints ----


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    trainer(folder, max_steps=3, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of an output folder with checkpoints at steps 1, 2 and 3."""
    return shutil.copytree(written, tmp_path / "copy")


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


TEARS = {
    "model cut": lambda last: cut(last / "model.safetensors"),
    "optimizer cut": lambda last: cut(last / "optimizer.pt"),
    "carried gradient missing": lambda last: (last / checkpoint.TENSORS).unlink(),
    "manifest missing": lambda last: (last / checkpoint.MANIFEST).unlink(),
    "state missing": lambda last: (last / "trainer_state.json").unlink(),
    "state cut": lambda last: cut(last / "trainer_state.json"),
    "killed before our files": lambda last: [(last / n).unlink() for n in (checkpoint.MANIFEST, "trainer_state.json")],
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_refused_or_passed_over(folder, caplog, tear):
    TEARS[tear](folder / "checkpoint-3")
    refused = "checkpoint-3 is (torn|not as it was written).*resume_from_checkpoint=True finds the last whole one"
    with pytest.raises(ValueError, match=refused):
        trainer(folder, max_steps=3).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    resumed = trainer(folder, max_steps=3)
    with tiny.transformers_log(caplog):
        resumed.train(resume_from_checkpoint=True)
    assert "Passing over a checkpoint. The checkpoint" in caplog.text
    assert "Delete the folder" not in caplog.text
    assert resumed.state.log_history[1]["step"] == 2  # restored, and not trained again
    assert resumed.state.global_step == 3


def test_no_whole_checkpoint(folder, tmp_path):
    for step in (1, 2, 3):
        cut(folder / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"^No valid checkpoint found in output directory \(.*found only unusable ones: .*checkpoint-3 is not as it was written: model.safetensors",
    ):
        trainer(folder).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="found none. Start without it"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    with pytest.raises(
        ValueError, match="^Can't find a valid checkpoint at .*nowhere: expected a folder there, but there is none"
    ):
        trainer(folder).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_folder_without_a_step_is_no_checkpoint(folder):
    for name in ("checkpoint-best", "checkpoint-"):
        (folder / name).mkdir()
    assert checkpoint.steps_in(folder) == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]


def edit(manifest, **changes):
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


def test_a_newer_format(folder):
    edit(folder / "checkpoint-3" / checkpoint.MANIFEST, format=99)
    with pytest.raises(ValueError, match="has format 99, but this hf_sampa reads up to 2. Upgrade hf_sampa"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-3"))


@pytest.mark.parametrize("content", ["{}", "[1]", "not json", '{"format": "1"}'])
def test_a_foreign_manifest(folder, content):
    (folder / "checkpoint-3" / checkpoint.MANIFEST).write_text(content)
    with pytest.raises(ValueError, match="is foreign: expected a file written by hf_sampa, with a format number"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_changed_data_under_sam(tmp_path):
    settings = {"method": "sam", "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match="Expected the next update batch to be the one.*the training data"):
        trainer(tmp_path, dataset=tiny.sentences(16, seed=9), **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


@pytest.mark.parametrize(
    ("other", "expected", "held"),
    [
        (
            lambda: tiny.bert(num_labels=5),
            "BertForSequenceClassification of 5 classes",
            "BertForSequenceClassification of 2 classes",
        ),
        (tiny.vit, "ViTForImageClassification", "BertForSequenceClassification"),
        (tiny.token_bert, "BertForTokenClassification", "BertForSequenceClassification"),
    ],
)
@pytest.mark.parametrize("kind", [SAMPaTrainer, BaselineTrainer])
def test_weights_of_another_model_are_one_sentence(kind, other, expected, held, folder):
    named = str(folder / "checkpoint-3")
    with pytest.raises(ValueError) as caught:
        kind(other(), tiny.arguments(folder, max_steps=4), train_dataset=tiny.sentences(16)).train(
            resume_from_checkpoint=named
        )
    assert str(caught.value) == (
        f"The weights in {named} are of another model: expected {expected}, but it holds a {held}. Resume with the model that wrote "
        "it, or start a new run, which takes its weights as far as they fit, from this folder as its model."
    )


def test_weights_of_a_model_of_other_layers(folder):
    with pytest.raises(ValueError, match="weights.* of another model"):
        trainer(folder, tiny.bert_of_three_layers(), max_steps=4).train(
            resume_from_checkpoint=str(folder / "checkpoint-3")
        )


def test_a_carried_gradient_of_another_model(folder):
    last = folder / "checkpoint-3"
    tensors = checkpoint.read_tensors(last)
    tensors["classifier.weight"] = torch.zeros(3, 3)
    save_file(tensors, last / checkpoint.TENSORS)
    as_before(last)
    with pytest.raises(
        ValueError, match=r"another model: 1 parameter.*'classifier.weight': expected shape \(2, 16\), got \(3, 3\)"
    ):
        trainer(folder, max_steps=4).train(resume_from_checkpoint=str(last))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size: 4 in the checkpoint, 8 now"),
        ({"seed": 1}, "seed: 42 in the checkpoint, 1 now"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 in the checkpoint, 2 now"),
    ],
)
def test_a_changed_data_stream(folder, change, message):
    with pytest.raises(ValueError, match=f"Expected the data stream that .* but it changed: {message}"):
        trainer(folder, max_steps=4, **change).train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_changed_data_and_the_way_out(folder, caplog):
    other = tiny.sentences(16, seed=9)
    with pytest.raises(
        ValueError, match="the training data, its order or its processing changed.*ignore_data_skip=True"
    ):
        trainer(folder, dataset=other, max_steps=4).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    resumed = trainer(folder, dataset=other, max_steps=4, ignore_data_skip=True)
    with tiny.transformers_log(caplog):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert "ignore_data_skip: the stream starts its epoch anew" in caplog.text
    assert resumed.state.global_step == 4


def test_changed_rho_and_lambda_are_warnings(folder, caplog):
    with tiny.transformers_log(caplog):
        trainer(folder, max_steps=4, rho=0.1, lmbda=0.0).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert "Resuming with a changed setting, rho: 0.05 in the checkpoint, 0.1 now." in caplog.text
    assert "lmbda: 0.2 in the checkpoint, 0.0 now." in caplog.text


# ---- Gradients that are not finite ----


class BadSteps(SAMPaTrainer):
    """Multiplies the loss by NaN in the given passes."""

    bad = frozenset()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passes = tiny.Passes()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if not self.sampa.rehearsing and self.passes() in self.bad else loss


# pass 1 starts; then the perturbed pass of step t is 2 t and its look-ahead pass 2 t + 1
@pytest.mark.parametrize("bad", [6, 7], ids=["perturbed", "look-ahead"])
def test_a_step_with_a_bad_gradient_is_skipped(tmp_path, caplog, bad):
    recorder, states = tiny.Recorder(), []

    class Moments(tiny.Recorder):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            states.append([value.clone() for s in optimizer.state_dict()["state"].values() for value in s.values()])

    run = BadSteps(
        model=tiny.bert(),
        args=tiny.arguments(tmp_path, max_steps=6),
        train_dataset=tiny.sentences(16),
        callbacks=[recorder, Moments()],
    )
    run.bad = {bad}
    with tiny.transformers_log(caplog):
        run.train()
    assert tiny.differing(recorder.weights[1], recorder.weights[2]) == []
    assert tiny.differing(states[1], states[2]) == []
    assert tiny.differing(recorder.weights[2], recorder.weights[3]) != []
    assert all(param.isfinite().all() for param in run.model.parameters())
    assert run.sampa.skipped_steps == 1
    lines = [line for line in run.state.log_history if "loss" in line]
    assert [line.get("skipped_steps") for line in lines] == [None, None, 1, 1, 1, 1]
    assert "Step 3 had a gradient that is not finite and is skipped; 1 step(s) so far." in caplog.text


def test_twenty_bad_steps_in_a_row_end_the_run(tmp_path):
    run = BadSteps(
        model=tiny.bert(), args=tiny.arguments(tmp_path, num_train_epochs=20), train_dataset=tiny.sentences(16)
    )
    run.bad = range(6, 1000)
    with pytest.raises(RuntimeError, match="in all of the last 20. Lower the learning rate or rho"):
        run.train()
    assert run.state.global_step == 21
    assert all(param.isfinite().all() for param in run.model.parameters())


def test_the_best_checkpoint_is_one_that_is_noted(tmp_path, monkeypatch):
    """transformers 5.3 notes none with save_strategy="best"."""
    monkeypatch.setattr(training_args, "keeps_best_step", lambda: False)
    best = {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"}
    tiny.arguments(tmp_path, **best)
    with pytest.raises(ValueError) as error:
        tiny.arguments(tmp_path, **best, load_best_model_at_end=True)
    assert str(error.value) == (
        "save_strategy: expected 'steps' or 'epoch' together with load_best_model_at_end, got 'best', with which this transformers "
        "loads no model at the end. Take one of those, or transformers 5.4 or newer."
    )

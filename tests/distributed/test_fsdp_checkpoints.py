"""Checkpoints in parts, ``state_dict_type="SHARDED_STATE_DICT"``: by whom they are continued, and what they are when a save fails."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_sampa.checkpoints import checkpoint
from tests import sharded, tiny
from tests.distributed.test_fsdp import adapted, some, words
from tests.distributed.test_variants import Small, settings
from tests.faults.test_disk import limit
from tests.ranks import RankFailed, run_ranks, start_ranks


pytestmark = [pytest.mark.distributed, sharded.needs_versions]


def parts(**changes) -> dict:
    """Settings of a run whose checkpoints are in parts."""
    config = {**sharded.FSDP["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT", **changes}
    return {"fsdp": True, "fsdp_config": config}


PARTS, SHARED = parts(), {"shard_optimizer": True}
SAVED = {
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 4,
    "variant": "vasso",  # which remembers as many numbers as there are weights
}
REPLICAS = {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}
# What wrote a checkpoint: processes, kind of trainer, settings.
WRITERS = {
    "parts": (4, "sampa", PARTS),
    "shared parts": (4, "sampa", {**PARTS, **SHARED}),
    "full": (4, "sampa", sharded.FSDP),
    "whole": (4, "sampa", {}),
    "sam": (4, "sampa", {**PARTS, "method": "sam"}),
    "sam of replicas": (4, "sampa", {**PARTS, **REPLICAS, "method": "sam"}),
    "one shard each": (2, "sampa", PARTS),
    "one process": (1, "sampa", {}),
    "without state": (4, "sampa", {**PARTS, "optim": "sgd", "variant": "sam"}),
    # accelerate's wrappers draw dropout anew when they compute a layer again.
    "no dropout": (4, "sampa", {**PARTS, "dropout": 0.0}),
    "in wrappers": (4, "sampa", {**parts(activation_checkpointing=True), "dropout": 0.0}),
}
# Whose checkpoint goes on as what, and whether with the same bits.
RESUMED = {
    "parts from parts": ("parts", "parts", True),
    "shared from shared": ("shared parts", "shared parts", True),
    "parts from shared": ("shared parts", "parts", True),
    "shared from parts": ("parts", "shared parts", True),
    "full from parts": ("parts", "full", True),
    "parts from full": ("full", "parts", True),
    "whole from parts": ("parts", "whole", False),
    "parts from whole": ("whole", "parts", False),
    "one process from a pair": ("one shard each", "one process", True),
    "a pair from one process": ("one process", "one shard each", True),
    "sam from sam": ("sam", "sam", True),
    "replicas from replicas": ("sam of replicas", "sam of replicas", True),
    "replicas of shards from shards": ("sam", "sam of replicas", False),
    "shards from replicas of shards": ("sam of replicas", "sam", False),
    "an optimizer without state": ("without state", "without state", True),
    "wrapped layers from layers": ("no dropout", "in wrappers", False),
    "layers from wrapped layers": ("in wrappers", "no dropout", False),
}


def trained(folder, changes, kind="sampa", resume=None, num_labels=2) -> dict:
    own = {**SAVED, "dropout": 0.1, **changes}
    model = partial(tiny.bert, dropout=own.pop("dropout"), num_labels=num_labels)
    made = sharded.trainer(folder, model, tiny.sentences(30), own, kind=kind)
    found = sharded.outcome(made, resume) if kind == "sampa" else {"losses": made.train(resume)}
    return {**found, "shards": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What a run came to, and the folder of its checkpoints, by its name; trained when it is asked for."""
    folder = tmp_path_factory.mktemp("saved")

    @cache
    def ranks(name: str) -> tuple[list[dict], Path]:
        processes, kind, changes = WRITERS[name]
        out = folder / name.replace(" ", "-")
        return run_ranks(trained, processes, out, changes, kind, folder=folder / f"ranks-{name}"), out

    yield ranks
    shutil.rmtree(folder)


def losses(of_rank: dict) -> list[float]:
    return [line["loss"] for line in of_rank["logs"] if "loss" in line]


def go_on(name, folder, out) -> list[dict]:
    """The run `name`, from step 4 of the one in `folder`."""
    processes, kind, changes = WRITERS[name]
    shutil.copytree(folder / "checkpoint-4", out / "checkpoint-4")
    return run_ranks(trained, processes, out, changes, kind, str(out / "checkpoint-4"), folder=out / "ranks")


@pytest.mark.parametrize("name", some(RESUMED, "parts from shared"))
def test_resumed_is_never_stopped(saved, tmp_path, name):
    """Bit for bit on the same mesh, to rounding on another."""
    wrote, goes_on, exact = RESUMED[name]
    found, folder = saved(wrote)
    again = go_on(goes_on, folder, tmp_path)
    expected = found if exact else saved(goes_on)[0]
    for rank in again:
        assert losses(rank) == pytest.approx(losses(found[0]), rel=1e-5)
        assert sharded.deviation(rank["weights"], expected[0]["weights"]) < 1e-6
        if exact:
            assert tiny.differing(rank, found[0]) == []


def test_what_is_in_a_checkpoint_in_parts(saved, tmp_path):
    """No file has a whole model, or the optimizer; each process wrote about as much; accelerate makes one file of the weights."""
    found, folder = saved("shared parts")
    files = {file.relative_to(folder / "checkpoint-4").as_posix(): file for file in folder.rglob("checkpoint-4/**/*")}
    for name in ("pytorch_model_fsdp_0", "optimizer_0", "sampa_shards"):
        sizes = [files[f"{name}/__{rank}_0.distcp"].stat().st_size for rank in range(4)]
        assert min(sizes) > 0 and max(sizes) < 0.6 * sum(sizes)
    recorded = json.loads(files["sampa.json"].read_text())["files"]
    assert recorded.keys() == {name for name, file in files.items() if file.is_file()} - {"README.md", "sampa.json"}
    assert not {"model.safetensors", "optimizer.pt"} & files.keys() and "config.json" in files
    merge_fsdp_weights(str(folder / "checkpoint-6" / "pytorch_model_fsdp_0"), str(tmp_path))
    shutil.copy(folder / "checkpoint-6" / "config.json", tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert tiny.differing(dict(model.named_parameters()), found[0]["weights"]) == []


@pytest.mark.whole
def test_plain_trainer_and_sampa_go_on_from_one_another(saved, tmp_path):
    """Of two processes, as those of a role."""
    _, folder = saved("parts")
    shutil.copytree(folder / "checkpoint-4", tmp_path / "plain" / "checkpoint-4")
    plain = {**PARTS, "per_device_train_batch_size": 2}
    resume = str(tmp_path / "plain" / "checkpoint-4")
    run_ranks(trained, 2, tmp_path / "plain", plain, "adamw", resume, folder=tmp_path / "plain-ranks")
    assert (tmp_path / "plain" / "checkpoint-6" / "pytorch_model_fsdp_0" / ".metadata").exists()
    for name in ("parts", "whole"):
        shutil.copytree(tmp_path / "plain" / "checkpoint-6", tmp_path / name / "checkpoint-6")
        resume = str(tmp_path / name / "checkpoint-6")
        changes = {**WRITERS[name][2], "max_steps": 8}
        found = run_ranks(trained, 4, tmp_path / name, changes, "sampa", resume, folder=tmp_path / f"{name}-ranks")
        assert len(losses(found[0])) == 8
        if name == "parts":
            expected = found[0]["weights"]
    assert sharded.deviation(found[0]["weights"], expected) < 1e-6


# ---- Variants and models ----


def of_variants(folder, cases, resume=False) -> dict:
    found = {}
    for case in cases:
        own = folder / "-".join(case).replace(" ", "-")
        config = {**PARTS["fsdp_config"], "transformer_layer_cls_to_wrap": ["Linear", "LayerNorm"]}
        chosen = {**settings(*case), **PARTS, "fsdp_config": config, "max_steps": 6, "save_steps": 3}
        made = sharded.trainer(own, lambda: Small(dropout=0.1), tiny.images(16), chosen)
        found[case] = sharded.outcome(made, str(own / "checkpoint-3") if resume else None)
    return found


# Those that remember tensors like the weights; of gradients of the shards of a batch a process holds its own.
REMEMBER = [("fsam", "sampa"), ("bisam own", "sampa"), ("optsam", "sam"), ("looksam", "sam"), ("mesa", "sam")]


@pytest.mark.whole
@pytest.mark.parametrize(("processes", "cases"), [(4, REMEMBER), (2, [("msam", "sampa")])])
def test_variants_that_remember_go_on(tmp_path, processes, cases):
    found = run_ranks(of_variants, processes, tmp_path / "out", cases, folder=tmp_path / "ranks")
    for rank in run_ranks(of_variants, processes, tmp_path / "out", cases, True, folder=tmp_path / "again"):
        assert tiny.differing(rank, found[0]) == []


def llama():
    """Random Llama whose output embeddings are its input embeddings."""
    torch.manual_seed(0)
    shape = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True))


MODELS = {
    "adapters": (adapted, tiny.sentences(30), parts(transformer_layer_cls_to_wrap=["BertLayer"])),
    "ViT": (tiny.vit, tiny.images(30), parts(transformer_layer_cls_to_wrap=["ViTLayer"])),
    "tied weights": (llama, words(30), parts(transformer_layer_cls_to_wrap=["LlamaDecoderLayer"])),
    "no PreTrainedModel, batch norm": (
        tiny.BatchNormNet,
        tiny.images(30),
        parts(transformer_layer_cls_to_wrap=["Linear"]),
    ),
}


def with_the_best(folder, name, resume=None) -> dict:
    """A run that ends with its best weights, and saves them; and a second one, from its second checkpoint."""
    model, dataset, shards = MODELS[name]
    best = {"load_best_model_at_end": True, "metric_for_best_model": "to_come", "greater_is_better": True}
    changes = {**SAVED, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "variant": "sam", **best, **shards}

    def to_come(_) -> dict:
        return {"to_come": -made.state.global_step}

    made = sharded.trainer(folder, model, dataset, changes, eval_dataset=dataset[:9], compute_metrics=to_come)
    found = sharded.outcome(made, resume)
    made.save_model()
    return {**found, "best": made.state.best_model_checkpoint, "shards": None}


@pytest.mark.whole
@pytest.mark.parametrize("name", MODELS)
def test_models_and_their_best_weights(tmp_path, name):
    """``save_model`` writes what ``from_pretrained`` loads."""
    found = run_ranks(with_the_best, 4, tmp_path / "out", name, folder=tmp_path / "ranks")
    assert found[0]["best"].endswith("checkpoint-2")
    own = "adapter_model.safetensors" if name == "adapters" else "model.safetensors"
    assert not (tmp_path / "out" / "checkpoint-2" / own).exists()
    written = load_file(tmp_path / "out" / own)
    if name == "ViT":
        model = type(tiny.vit()).from_pretrained(tmp_path / "out")
        assert tiny.differing(dict(model.named_parameters()), found[0]["weights"]) == []
    else:
        weights = {key.replace(".default", ""): value for key, value in found[0]["weights"].items()}
        assert written and all(torch.equal(weights[key], written[key]) for key in written.keys() & weights.keys())
    again = run_ranks(
        with_the_best, 4, tmp_path / "out", name, str(tmp_path / "out" / "checkpoint-4"), folder=tmp_path / "again"
    )
    for rank in again:
        assert tiny.differing({**rank, "best": None}, {**found[0], "best": None}) == []


# ---- What is refused, and what fails ----


def inspected(folder) -> str:
    with pytest.raises(ValueError) as refusal:
        checkpoint.inspect(folder)
    return str(refusal.value)


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def with_harm_in_metadata(folder: Path) -> None:
    (folder / "optimizer_0" / ".metadata").write_bytes(pickle.dumps({"a": Harmful()}))


def with_harm_in_a_value(folder: Path) -> None:
    torch.distributed.checkpoint.save({"a": Harmful()}, checkpoint_id=folder / "optimizer_0", no_dist=True)


DAMAGE = {
    "a file is missing": (
        lambda folder: (folder / "optimizer_0" / "__1_0.distcp").unlink(),
        "__1_0.distcp is missing",
    ),
    "a file is cut": (lambda folder: os.truncate(folder / "sampa_shards" / "__2_0.distcp", 100), "has 100 bytes"),
    "no list of files": (
        lambda folder: (folder / "pytorch_model_fsdp_0" / ".metadata").unlink(),
        "metadata is missing",
    ),
    "harm in the list": (with_harm_in_metadata, "names builtins.print, which has no place"),
    "harm in a value": (with_harm_in_a_value, "which torch.load takes for unsafe"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(saved, tmp_path, capsys, name):
    """With a checkpoint's checksums, and without, as plain Trainer writes it."""
    _, folder = saved("shared parts")
    act, words = DAMAGE[name]
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    checkpoint.inspect(tmp_path / "checkpoint-4")
    act(tmp_path / "checkpoint-4")
    if not name.startswith("harm"):
        assert words in inspected(tmp_path / "checkpoint-4")
    for file in (tmp_path / "checkpoint-4").glob("sampa*"):
        shutil.rmtree(file) if file.is_dir() and name != "a file is cut" else None
        file.unlink() if file.is_file() else None
    if name != "no list of files":
        inspected_as = {"a file is missing": "names __1_0.distcp, which is missing", "a file is cut": "bytes of __2_0"}
        assert inspected_as.get(name, words) in inspected(tmp_path / "checkpoint-4")
    assert "harm" not in capsys.readouterr().out


class Dies(sharded.OnCPU):
    """When weights and optimizer of the second checkpoint are there."""

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.state.global_step == 4 and int(os.environ["RANK"]) == 0:
            os._exit(9)


def killed(folder):
    changes = {**SAVED, **PARTS, **SHARED, "save_steps": 2, "ddp_timeout": 10}
    Dies(model=tiny.bert(), args=tiny.arguments(folder, **changes), train_dataset=tiny.sentences(30)).train()


def test_a_killed_save_leaves_nothing_that_looks_whole(tmp_path):
    processes, *_ = start_ranks(killed, 4, tmp_path / "out", folder=tmp_path / "ranks")
    for process in processes:
        process.join(100)
    assert processes[0].exitcode == 9
    assert (tmp_path / "out" / "checkpoint-4" / "optimizer_0" / ".metadata").exists()
    assert not checkpoint.is_whole(tmp_path / "out" / "checkpoint-4")
    names = checkpoint.steps_in(tmp_path / "out")
    assert checkpoint.last_whole(tmp_path / "out", names, checkpoint.inspect)[0].name == "checkpoint-2"


class Full(sharded.OnCPU):
    """Whose disk takes no large file on one rank while the second checkpoint is written."""

    def _save_checkpoint(self, model, trial):
        full = self.state.global_step == 4 and int(os.environ["RANK"]) == 2
        limit(self.room if full else -1)
        super()._save_checkpoint(model, trial)
        limit(-1)


def on_a_full_disk(folder, room) -> dict:
    changes = {**SAVED, **PARTS, "save_steps": 2}
    made = Full(model=tiny.bert(), args=tiny.arguments(folder, **changes), train_dataset=tiny.sentences(30))
    made.room = room
    return sharded.outcome(made)


@pytest.mark.parametrize("room", some((100, 6_000), 6_000))
def test_a_checkpoint_that_one_process_cannot_write_is_given_up_by_all(tmp_path, room):
    """And the run goes on, to the same bits."""
    found = run_ranks(on_a_full_disk, 4, tmp_path / "out", room, folder=tmp_path / "ranks")
    assert checkpoint.steps_in(tmp_path / "out") == ["checkpoint-6", "checkpoint-2"]
    assert all(checkpoint.is_whole(each) for each in (tmp_path / "out").glob("checkpoint-*"))
    assert all(tiny.differing(rank, found[0]) == [] for rank in found)


def of_another_model(folder, resume) -> dict:
    return trained(folder, PARTS, "sampa", resume, num_labels=5)


@pytest.mark.whole
def test_a_checkpoint_of_another_model_is_refused(saved, tmp_path):
    _, folder = saved("shared parts")
    words = "of another model: expected BertForSequenceClassification of 5 classes, but it holds"
    with pytest.raises(RankFailed, match=words):
        run_ranks(of_another_model, 4, tmp_path, str(folder / "checkpoint-4"), folder=tmp_path / "ranks")

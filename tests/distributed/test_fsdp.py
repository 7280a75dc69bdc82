"""FSDP2: each role shards a model of its own, and the steps are those of whole weights, for whatever FSDP2 is used for."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from functools import cache, partial

import pytest
import torch
from accelerate import ParallelismConfig
from memory_worker import MeasuredOnCPU
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    Trainer,
)

from hf_sampa import SAMPaTrainer, compat
from tests import reference, sharded, tiny
from tests.distributed.test_variants import ADAPTED, CASES, Small, settings, small
from tests.ranks import RankFailed, run_ranks
from tests.test_reference import batches_in_order


pytestmark = [pytest.mark.distributed, sharded.needs_versions]

STEPS = 20
PLAIN = {"per_device_train_batch_size": 2, "max_steps": STEPS, "train_sampling_strategy": "sequential"}
RUNS = {
    "adamw": {"max_grad_norm": 0.1, "warmup_steps": 3},
    "sgd momentum, lambda 0": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05, "lmbda": 0.0},
    "a real step to look ahead": {"optim": "rmsprop", "lmbda": 1.0},
    "sam": {"method": "sam", "per_device_train_batch_size": 1},
}
# Whose own arithmetic is that of one of the runs above.
SAME_AS = {
    "one optimizer for a pair": ("adamw", {"shard_optimizer": True}),
    "accumulation": ("adamw", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "accumulation, each micro-batch reduced": (
        "adamw",
        {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        },
    ),
}


def train(folder, changes) -> dict:
    made = sharded.trainer(folder, tiny.bert, tiny.sentences(40), {**PLAIN, **sharded.FSDP, **changes})
    return sharded.outcome(made)


@pytest.fixture(scope="module")
def on_shards(tmp_path_factory):
    """What a run on four ranks came to, by its name; trained when it is asked for."""
    runs = {**RUNS, **{name: {**RUNS[of], **changes} for name, (of, changes) in SAME_AS.items()}}

    @cache
    def ranks(name: str) -> list[dict]:
        folder = tmp_path_factory.mktemp("shards")
        return run_ranks(train, 4, folder, runs[name], folder=folder / "ranks")

    return ranks


def serial(folder, changes) -> tuple[dict, list[float]]:
    """Weights and losses of the reference, on batches as large as those of four processes."""
    args, model = tiny.arguments(folder, **{**PLAIN, **changes}), tiny.bert()
    plain = Trainer(model=model, args=args, train_dataset=tiny.sentences(40))
    plain.create_optimizer_and_scheduler(STEPS)
    sampa = args.method == "sampa"
    batches = batches_in_order(tiny.sentences(40), 4, STEPS + sampa)
    kwargs = {"rho": args.rho, "max_norm": args.max_grad_norm, **({"lmbda": args.lmbda} if sampa else {})}
    losses = getattr(reference, args.method)(
        model, plain.optimizer, plain.lr_scheduler, lambda model, batch: model(**batch).loss, batches, **kwargs
    )
    return {name: param.detach() for name, param in model.named_parameters()}, losses


def some(names, *default) -> list:
    """All of `names`, for make test-all; those of `default` in every run."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.whole) for name in names]


@pytest.mark.parametrize("name", some(RUNS, "adamw"))
def test_it_is_the_serial_reference(on_shards, tmp_path, name):
    """And all ranks end with the same bits (P3)."""
    weights, losses = serial(tmp_path, RUNS[name])
    for rank in on_shards(name):
        assert rank["shards"] == (4 if name == "sam" else 2)
        assert sharded.deviation(rank["weights"], weights) < 1e-6
        logged = [line["loss"] for line in rank["logs"] if "loss" in line]
        assert logged == pytest.approx(losses, rel=1e-5)
        assert tiny.differing(rank, on_shards(name)[0]) == []
    moved = sharded.deviation(weights, dict(tiny.bert().named_parameters()))
    assert moved > 1e-3


@pytest.mark.parametrize("name", some(SAME_AS, "one optimizer for a pair"))
def test_how_it_is_stored_and_added_up_changes_nothing_but_roundings(on_shards, name):
    of, _ = SAME_AS[name]
    for rank in on_shards(name):
        assert sharded.deviation(rank["weights"], on_shards(of)[0]["weights"]) < 1e-6
        assert tiny.differing(rank, on_shards(name)[0]) == []
        if name == "one optimizer for a pair":
            assert tiny.differing(rank, on_shards(of)[0]) == []


def of_a_pair(folder, changes):
    made = sharded.trainer(folder, lambda: tiny.bert(dropout=0.1), tiny.sentences(18), {"max_steps": 8, **changes})
    return {**sharded.outcome(made), "shards": None}


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"shard_optimizer": True}, marks=pytest.mark.whole)], ids=["whole", "shared"]
)
def test_two_roles_of_one_shard_are_the_unsharded_pair(tmp_path, changes):
    """Bit for bit, with dropout and a ragged last batch."""
    whole = run_ranks(of_a_pair, 2, tmp_path, changes, folder=tmp_path / "whole")
    for found in run_ranks(of_a_pair, 2, tmp_path, {**changes, **sharded.FSDP}, folder=tmp_path / "one shard"):
        pair = [{**each, "logs": tiny.without_cosine(each["logs"])} for each in (found, whole[0])]
        assert tiny.differing(*pair) == []


# ---- Variants ----

# What looks at all entries at once, wants gradients that are not averaged over processes or not of the whole model, or adds to layers.
NOT_ON_SHARDS = {"randsam", "ssam_d", "ssam_f", "msam", "zsharp", "functional_sam", *ADAPTED}


def every_variant(folder, cases, changes) -> dict:
    found = {}
    for case in cases:
        chosen = {**settings(*case), "save_strategy": "no", "max_steps": 6, **changes}
        made = sharded.trainer(folder, partial(small, case[0], dropout=0.0), tiny.images(16), chosen)
        try:
            found[case] = sharded.outcome(made)
        except ValueError as refusal:
            found[case] = str(refusal)
    return found


@pytest.mark.whole
@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_every_variant_goes_on_shards_or_says_that_it_does_not(tmp_path, method):
    whole = {"per_device_train_batch_size": 2}
    cases = [case for case in CASES if case[1] == method]
    shards = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Linear", "LayerNorm"]}}
    plain = run_ranks(every_variant, 4, tmp_path, cases, whole, folder=tmp_path / "plain")[0]
    for rank in run_ranks(every_variant, 4, tmp_path, cases, {**whole, **shards}, folder=tmp_path / "shards"):
        for case, expected in plain.items():
            if case[0] in NOT_ON_SHARDS:
                assert "fsdp: expected a variant, or a recipe, that can be given shards" in rank[case], case
            else:
                assert sharded.deviation(rank[case]["weights"], expected["weights"]) < 1e-6, case


@pytest.mark.whole
def test_one_shard_is_enough_for_every_variant_but_two(tmp_path):
    """Bit for bit as without FSDP. Of FSDP2 there are no gradients of single samples, nor of a part of a model."""
    cases = [case for case in CASES if case[0] in NOT_ON_SHARDS and case[1] == "sampa"]
    shards = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Linear", "LayerNorm"]}}
    whole = run_ranks(every_variant, 2, tmp_path, cases, {}, folder=tmp_path / "plain")[0]
    for rank in run_ranks(every_variant, 2, tmp_path, cases, shards, folder=tmp_path / "shards"):
        for case, expected in whole.items():
            if case[0] in ("ssam_f", "functional_sam"):
                assert "looks at all entries at once, or wants gradients that are not averaged" in rank[case]
            else:
                assert tiny.differing(rank[case]["weights"], expected["weights"]) == [], case


# ---- Going on ----

SAVED = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "lr_scheduler_type": "linear",
}
SHARED = {"shard_optimizer": True}


def with_checkpoints(folder, changes, resume=None) -> dict:
    """With dropout and ragged last batches, of the epoch and of the evaluation."""
    own = {**SAVED, "dropout": 0.1, **changes}
    model = partial(tiny.bert, dropout=own.pop("dropout"))
    made = sharded.trainer(folder, model, tiny.sentences(38), own, eval_dataset=tiny.sentences(11, seed=5))
    found = sharded.outcome(made, resume)
    made.save_model()
    return {**found, "shards": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By how it was placed: what a run came to, and its checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    kinds = {
        "whole": {},
        "shards": sharded.FSDP,
        "shared shards": {**sharded.FSDP, **SHARED},
        "no dropout": {**sharded.FSDP, "dropout": 0.0},
    }
    found = {
        name: run_ranks(with_checkpoints, 4, folder / name, changes, folder=folder / f"{name}-ranks")[0]
        for name, changes in kinds.items()
    }
    yield found, folder
    shutil.rmtree(folder)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["shards", "shared shards"])
def test_a_checkpoint_of_shards_is_any_other(saved, name):
    """P9: the files of one without FSDP, which plain transformers and plain Trainer load, and the model's are those of the best step."""
    found, folder = saved
    files = {kind: {each.name for each in (folder / kind / "checkpoint-6").iterdir()} for kind in found}
    assert files[name] == files["whole"]
    one, other = (torch.load(folder / kind / "checkpoint-6" / "optimizer.pt") for kind in ("whole", name))
    assert one["state"].keys() == other["state"].keys()
    for state, expected in ((other["state"][i], one["state"][i]) for i in one["state"]):
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-7)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / name)
    assert tiny.differing(dict(loaded.named_parameters()), found[name]["weights"]) == []
    assert sharded.deviation(found[name]["weights"], found["whole"]["weights"]) < 1e-6
    plain = tiny.bert()
    trainer = Trainer(model=plain, args=tiny.arguments(folder / "plain"), train_dataset=tiny.sentences(38))
    trainer.create_optimizer_and_scheduler(4)
    trainer.optimizer.load_state_dict(other)


def losses(of_rank: dict) -> dict[tuple[str, int], float]:
    """Of training and of evaluation, by step."""
    return {
        (name, line["step"]): line[name] for line in of_rank["logs"] for name in ("loss", "eval_loss") if name in line
    }


# accelerate's wrappers draw dropout anew when they compute a layer again.
CHECKPOINTING = {"fsdp": True, "fsdp_config": {**sharded.FSDP["fsdp_config"], "activation_checkpointing": True}}
RESUMED = {
    "layers in checkpoint wrappers": ("no dropout", {**CHECKPOINTING, "dropout": 0.0}, False),
    "shards from shards": ("shards", sharded.FSDP, True),
    "shared from shared": ("shared shards", {**sharded.FSDP, **SHARED}, True),
    "shards from shared": ("shared shards", sharded.FSDP, True),
    "whole from shards": ("shards", {}, False),
    "shards from whole": ("whole", sharded.FSDP, False),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_is_never_stopped(saved, tmp_path, name):
    """Bit for bit on the same mesh, to rounding on another: in what is logged, as the weights are in the end those of a step before."""
    wrote, changes, exact = RESUMED[name]
    found, folder = saved
    expected = losses(found[wrote])
    assert {("loss", 9), ("eval_loss", 9)} <= expected.keys()
    shutil.copytree(folder / wrote, tmp_path / "out")
    again = run_ranks(
        with_checkpoints,
        4,
        tmp_path / "out",
        changes,
        str(tmp_path / "out" / "checkpoint-6"),
        folder=tmp_path / "ranks",
    )
    for rank in again:
        if exact:
            assert tiny.differing(rank, found[wrote]) == []
        assert losses(rank) == pytest.approx(expected, rel=1e-5)


# ---- Models ----


class Tied(nn.Module):
    """Two layers with one weight, a frozen one, a normalization with buffers, and a part that needs labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        # A bias before a normalization has no gradient but a rounding, of which Adam makes steps.
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight
        self.norm, self.frozen, self.head = nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.frozen.requires_grad_(False)

    def forward(self, pixel_values, labels=None):
        hidden = self.norm(self.second(self.first(pixel_values.flatten(1)).tanh()))
        logits = self.head(self.frozen(hidden))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def some_labels(count: int) -> list[dict]:
    """Images of which every other two have no label, so that there are micro-batches without one."""
    return [{**each, "labels": -100 if i % 4 < 2 else each["labels"]} for i, each in enumerate(tiny.images(count))]


MODELS = {
    "tied weights, frozen layer, batch norm": (
        Tied,
        tiny.images(16),
        {},
        {"fsdp_config": {"auto_wrap_policy": "NO_WRAP"}},
    ),
    "micro-batches without a label": (Small, some_labels(16), {"gradient_accumulation_steps": 2}, {}),
    "gradient checkpointing": (
        tiny.bert_of_three_layers,
        tiny.sentences(16),
        {"gradient_checkpointing": True},
        sharded.FSDP,
    ),
}


def train_model(folder, name, changes) -> dict:
    model, dataset, own, _ = MODELS[name]
    chosen = {"per_device_train_batch_size": 2, "max_steps": 6, **own, **changes}
    made = sharded.trainer(folder, lambda: _seeded(model), dataset, chosen)
    found = sharded.outcome(made)
    return {**found, "buffers": {name: each.clone() for name, each in made.model.named_buffers()}}


def _seeded(model):
    torch.manual_seed(0)
    return model()


@pytest.mark.parametrize("name", some(MODELS, "micro-batches without a label"))
def test_models_that_are_not_plain(tmp_path, name):
    shards = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Linear"]}, **MODELS[name][3]}
    whole = run_ranks(train_model, 4, tmp_path, name, {}, folder=tmp_path / "whole")[0]
    for rank in run_ranks(train_model, 4, tmp_path, name, shards, folder=tmp_path / "shards"):
        assert rank["shards"] == 2
        assert sharded.deviation(rank["weights"], whole["weights"]) < 1e-6
        torch.testing.assert_close(rank["buffers"], whole["buffers"])
        assert losses(rank) == pytest.approx(losses(whole), rel=1e-5)


def adapted(dtype=torch.float32):
    """BERT of three layers with LoRA, the base frozen."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS", lora_dropout=0.0
    )
    return peft.get_peft_model(tiny.bert_of_three_layers().to(dtype), config)


def with_adapters(folder, changes) -> dict:
    made = sharded.trainer(
        folder,
        adapted,
        tiny.sentences(16),
        {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, **changes},
    )
    found = sharded.outcome(made)
    assert made.sampa.weights.sharded == bool(changes)
    return found


@pytest.mark.whole
def test_adapters_on_a_sharded_frozen_base(tmp_path):
    whole = run_ranks(with_adapters, 4, tmp_path / "whole", {}, folder=tmp_path / "ranks")[0]
    for rank in run_ranks(with_adapters, 4, tmp_path / "shards", sharded.FSDP, folder=tmp_path / "shard-ranks"):
        assert sharded.deviation(rank["weights"], whole["weights"]) < 1e-6
    names = [{each.name for each in (tmp_path / kind / "checkpoint-3").iterdir()} for kind in ("whole", "shards")]
    assert names[0] == names[1] and "adapter_model.safetensors" in names[0]


def in_half_precision(folder, changes) -> dict:
    changes = {"bf16": True, "per_device_train_batch_size": 2, "max_steps": 6, **changes}
    return sharded.outcome(sharded.trainer(folder, tiny.bert, tiny.sentences(16), changes))


@pytest.mark.whole
def test_in_bf16_weights_and_their_exchange_stay_in_single_precision(tmp_path):
    """FSDP2's policy computes in bf16, which is another rounding than autocast's."""
    whole = run_ranks(in_half_precision, 4, tmp_path, {}, folder=tmp_path / "whole")[0]
    ranks = run_ranks(in_half_precision, 4, tmp_path, sharded.FSDP, folder=tmp_path / "shards")
    for rank in ranks:
        assert all(each.dtype == torch.float32 for each in rank["weights"].values())
        assert tiny.differing(rank["weights"], ranks[0]["weights"]) == []
        assert 0 < sharded.deviation(rank["weights"], whole["weights"]) < 2e-2


def best_of(folder) -> tuple:
    """ViT, of which upstream loads the best weights but in part, without a word on its layers."""
    changes = {"fsdp": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    changes |= {"eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-2}
    trainer = sharded.trainer(folder, tiny.vit, tiny.images(16), changes, eval_dataset=tiny.images(8))
    trainer.train()
    return trainer.state.best_model_checkpoint, sharded.whole_weights(trainer.model)


@pytest.mark.whole
def test_the_best_weights_are_loaded_to_the_last_tensor(tmp_path):
    for best, weights in run_ranks(best_of, 4, tmp_path / "out", folder=tmp_path / "ranks"):
        loaded = AutoModelForImageClassification.from_pretrained(best)
        assert tiny.differing(dict(loaded.named_parameters()), weights) == []


def loaded_by_one(folder) -> dict:
    """The others have random weights, as `cpu_ram_efficient_loading` leaves them."""
    changes = {**PLAIN, **RUNS["adamw"], "fsdp": True}
    changes["fsdp_config"] = {**sharded.FSDP["fsdp_config"], "cpu_ram_efficient_loading": True}
    rank = int(os.environ["RANK"])
    return sharded.outcome(sharded.trainer(folder, lambda: tiny.bert(seed=rank), tiny.sentences(40), changes))


@pytest.mark.whole
def test_weights_that_one_process_has_loaded_are_everybody_s(on_shards, tmp_path):
    """Of both roles, each of which takes them from its own first process."""
    for rank in run_ranks(loaded_by_one, 4, tmp_path, folder=tmp_path / "ranks"):
        assert tiny.differing(rank, on_shards("adamw")[0]) == []


# ---- Ways to shard ----


def sharded_by_hand(folder, head, dataset) -> dict:
    args = tiny.arguments(folder, **{**PLAIN, **RUNS["adamw"]})
    with args.world_of_role():
        model = tiny.bert(head=head)
        model = sharded.shard(model, *model.bert.encoder.layer)
    return sharded.outcome(SAMPaTrainer(model=model, args=args, train_dataset=dataset))


@pytest.mark.whole
def test_a_model_that_was_sharded_by_hand(on_shards, tmp_path):
    """Units other than accelerate's."""
    made = BertForSequenceClassification, tiny.sentences(40)
    for rank in run_ranks(sharded_by_hand, 4, tmp_path, *made, folder=tmp_path / "ranks"):
        assert rank["shards"] == 2
        assert sharded.deviation(rank["weights"], on_shards("adamw")[0]["weights"]) < 1e-6


def of_masked_words(folder, changes) -> dict:
    model = partial(tiny.bert, head=BertForMaskedLM)
    return sharded.outcome(sharded.trainer(folder, model, words(40), {**PLAIN, **RUNS["adamw"], **changes}))


def words(count: int) -> list[dict]:
    return [{"input_ids": each["input_ids"], "labels": each["input_ids"]} for each in tiny.sentences(count)]


@pytest.mark.whole
@pytest.mark.skipif(compat.before("accelerate", "1.15"), reason="which does not shard output embeddings by themselves")
def test_what_is_said_of_a_bias_that_two_modules_share_helps(tmp_path):
    with pytest.raises(
        RankFailed, match="'cls.predictions.decoder.bias'.* Leave fsdp out, and shard the model before"
    ):
        run_ranks(of_masked_words, 4, tmp_path, sharded.FSDP, folder=tmp_path / "refused")
    whole = run_ranks(of_masked_words, 4, tmp_path, {}, folder=tmp_path / "whole")[0]
    for rank in run_ranks(sharded_by_hand, 4, tmp_path, BertForMaskedLM, words(40), folder=tmp_path / "ranks"):
        assert rank["shards"] == 2
        assert sharded.deviation(rank["weights"], whole["weights"]) < 1e-6


def sharded_over_all(folder):
    args = tiny.arguments(folder, **PLAIN)
    trainer = SAMPaTrainer(model=sharded.shard(tiny.bert()), args=args, train_dataset=tiny.sentences(40))
    trainer.train()


def test_a_model_that_is_sharded_over_both_roles_is_refused(tmp_path):
    with pytest.raises(
        RankFailed, match="sharded over the processes of its role, ranks .2, 3., .* but its mesh is .0, 1, 2, 3."
    ):
        run_ranks(sharded_over_all, 4, tmp_path, folder=tmp_path / "ranks")


def of_replicas(folder, changes, resume=None):
    if changes.get("fsdp"):
        changes = {**changes, "parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}
    made = sharded.trainer(
        folder, tiny.bert, tiny.sentences(38), {**SAVED, **changes}, eval_dataset=tiny.sentences(11, seed=5)
    )
    return sharded.outcome(made, resume)


@pytest.mark.whole
@pytest.mark.parametrize(("method", "processes"), [("sam", 4), ("sampa", 8)])
def test_replicas_of_shards(tmp_path, method, processes):
    """HSDP: a role's mesh has two dimensions. Evaluations are of all data once; a resumed run has the same bits."""
    changes = {"method": method, "per_device_train_batch_size": 1}
    whole = run_ranks(of_replicas, processes, tmp_path / "whole", changes, folder=tmp_path / "ranks")[0]
    shards = {**changes, **sharded.FSDP}
    found = run_ranks(of_replicas, processes, tmp_path / "out", shards, folder=tmp_path / "of-shards")
    for rank in found:
        assert rank["shards"] == 2
        assert sharded.deviation(rank["weights"], whole["weights"]) < 1e-6
        scores, expected = (
            [line["eval_loss"] for line in each["logs"] if "eval_loss" in line] for each in (rank, whole)
        )
        assert scores == pytest.approx(expected, rel=1e-6)
    checkpoint = str(tmp_path / "out" / "checkpoint-6")
    again = run_ranks(of_replicas, processes, tmp_path / "out", shards, checkpoint, folder=tmp_path / "again")
    assert tiny.differing(again[0], found[0]) == []


def sized_by_the_launcher(folder, shards) -> dict:
    """As ``accelerate launch --use_parallelism_config`` leaves its sizes to a process."""
    os.environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(shards)}
    return train(folder, RUNS["adamw"])


@pytest.mark.whole
def test_sizes_that_the_launcher_knows_are_those_of_a_role(on_shards, tmp_path):
    for rank in run_ranks(sized_by_the_launcher, 4, tmp_path, 2, folder=tmp_path / "ranks"):
        assert tiny.differing(rank, on_shards("adamw")[0]) == []
    with pytest.raises(RankFailed, match="expected sizes for the 2 process.* of one role, got 4"):
        run_ranks(sized_by_the_launcher, 4, tmp_path, 4, folder=tmp_path / "refused")


# ---- What is refused, and what fails ----


@pytest.mark.parametrize("sizes", [None, ParallelismConfig(dp_replicate_size=1, dp_shard_size=1)], ids=["", "sizes"])
def test_shards_on_a_cpu_are_refused(tmp_path, sizes):
    changes = {"fsdp": True, "fsdp_config": sharded.DEFAULTS, "parallelism_config": sizes}
    words = "fsdp: expected processes with a GPU each, got 2 process.* on cpu.* as --config cpu_2_processes"
    with pytest.raises(RankFailed, match=words):
        run_ranks(trained_plainly, 2, tmp_path, changes, folder=tmp_path / "ranks")


def trained_plainly(folder, changes):
    SAMPaTrainer(model=tiny.bert(), args=tiny.arguments(folder, **changes), train_dataset=tiny.sentences(16)).train()


REFUSED = {
    "version 1": ({"fsdp_config": {"version": 1}}, "fsdp_config: expected version 2, got version 1"),
    "offload": (
        {"fsdp_config": {"cpu_offload": True}},
        "fsdp_config: expected weights that stay on their device, got cpu_offload",
    ),
    "a mesh of all": (
        {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)},
        "parallelism_config: expected sizes for the 1 process.* of one role, got 4",
    ),
    "one role, one optimizer": (
        {**sharded.FSDP, "shard_optimizer": True, "method": "sam"},
        "shard_optimizer: expected method='sampa' beside FSDP",
    ),
}


def refused(folder, changes):
    sharded.trainer(folder, tiny.bert, tiny.sentences(16), {"fsdp": True, **changes}).train()


@pytest.mark.parametrize("name", some(REFUSED, "version 1"))
def test_what_does_not_go_together_is_refused(tmp_path, name):
    changes, words = REFUSED[name]
    with pytest.raises(RankFailed, match=words):
        run_ranks(refused, 2, tmp_path, changes, folder=tmp_path / "ranks")


class Fails(sharded.OnCPU):
    """In its ninth loss."""

    count = 0

    def compute_loss(self, *args, **kwargs):
        Fails.count += 1
        if Fails.count == 9:
            raise ZeroDivisionError("on purpose")
        return super().compute_loss(*args, **kwargs)


def failing(folder) -> list:
    args = tiny.arguments(folder, **{**PLAIN, **sharded.FSDP})
    seen = []
    trainer = Fails(model=tiny.bert(), args=args, train_dataset=tiny.sentences(40))
    trainer.add_callback(tiny.Each(lambda: seen.append(sharded.whole_weights(trainer.model))))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    return [len(seen), tiny.differing(sharded.whole_weights(trainer.model), seen[-1])]


def test_after_an_exception_the_model_holds_its_weights(tmp_path):
    """P7, and P8 for the callback."""
    for steps, differing in run_ranks(failing, 4, tmp_path, folder=tmp_path / "ranks"):
        assert steps > 1 and differing == []


def sharded_at_load(folder, model) -> dict:
    """By transformers, which then trains it without accelerate's FSDP. It refuses to save what a run would go on from."""
    distributed = pytest.importorskip("transformers.distributed")
    args = tiny.arguments(folder, **{**PLAIN, **RUNS["adamw"]})
    with args.world_of_role():
        loaded = AutoModelForSequenceClassification.from_pretrained(
            model, distributed_config=distributed.DistributedConfig(fsdp_size=2)
        )
    trainer = SAMPaTrainer(model=loaded, args=args, train_dataset=tiny.sentences(40))
    found = sharded.outcome(trainer)
    trainer.save_model()
    return found


@pytest.mark.whole
def test_a_model_that_is_sharded_when_it_is_loaded(on_shards, tmp_path):
    tiny.bert().save_pretrained(tmp_path / "model")
    for rank in run_ranks(sharded_at_load, 4, tmp_path / "out", tmp_path / "model", folder=tmp_path / "ranks"):
        assert rank["shards"] == 2
        assert sharded.deviation(rank["weights"], on_shards("adamw")[0]["weights"]) < 1e-6
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert tiny.differing(dict(saved.named_parameters()), rank["weights"]) == []


def measured(folder, changes) -> list:
    changes = {**PLAIN, "max_steps": 4, "diagnostics_steps": 1, **changes}
    made = sharded.trainer(folder, tiny.bert, tiny.sentences(16), changes, eval_dataset=tiny.sentences(8, seed=2))
    made.train()
    names = ("lookahead_cosine", "lookahead_distance")
    lines = [[line[name] for name in names] for line in made.state.log_history if names[0] in line]
    return [
        lines,
        [name for line in made.state.log_history for name in line if name.startswith(("held_out", "hessian"))],
    ]


@pytest.mark.whole
def test_of_shards_the_look_ahead_is_measured(tmp_path):
    (whole, more), *_ = run_ranks(measured, 4, tmp_path, {}, folder=tmp_path / "whole")
    for lines, others in run_ranks(measured, 4, tmp_path, sharded.FSDP, folder=tmp_path / "shards"):
        assert len(lines) == 3 and more and not others
        assert [each for line in lines for each in line] == pytest.approx(
            [e for line in whole for e in line], rel=1e-4
        )


def grown(folder, kind, changes) -> float:
    """By how much a process grew while it trained, in numbers per weight, of a model whose layers are small parts of it."""
    # What is let go of goes back to the system.
    ctypes.CDLL(None).mallopt(-3, 2**16)
    torch.set_num_threads(1)
    shape = {"hidden_size": 256, "num_hidden_layers": 24, "num_attention_heads": 4, "intermediate_size": 1024}
    chosen = {
        **sharded.FSDP,
        "per_device_train_batch_size": 1,
        "max_steps": 3,
        "optim": "adamw_torch_fused",
        **changes,
    }
    with MeasuredOnCPU() as meter:
        made = sharded.trainer(folder, lambda: tiny.bert_of(shape), tiny.sentences(32), chosen, kind=kind)
        made.train()
    return meter.peak() / 4 / sum(param.numel() for param in made.model.parameters())


@pytest.mark.whole
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_process(tmp_path):
    """SAMPa holds x_t besides what AdamW does, d / S numbers, and none besides where a pair shares the optimizer."""
    runs = {"adamw": (2, "adamw", {}), "sampa": (4, "sampa", {}), "shared": (4, "sampa", SHARED)}
    held = {
        name: max(run_ranks(grown, processes, tmp_path, kind, changes, folder=tmp_path / name))
        for name, (processes, kind, changes) in runs.items()
    }
    shards = 2
    assert (held["sampa"] - held["adamw"]) * shards < 1.25, held
    assert (held["shared"] - held["adamw"]) * shards < 0.25, held

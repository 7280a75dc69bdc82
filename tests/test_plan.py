"""What a run needs: counted like the memory benchmark, from configurations alone, and started by commands that are taken."""

from __future__ import annotations

import json
import shlex

import bench_processes
import memory as memory_benchmark
import pytest
import torch
import transformers
from accelerate import ParallelismConfig
from bench_trainer import build_model
from cost_model import Layout as OnPaper
from cost_model import Step, sent_per_node
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import BertConfig, GPT2Config, LlamaConfig, SwinConfig, T5Config, ViTConfig

from hf_sampa import SAMPaTrainingArguments, compat, launch
from hf_sampa.__main__ import main
from hf_sampa.plan import model_size as model_sizes
from hf_sampa.plan.activations import activation_bytes
from hf_sampa.plan.layouts import Layout, layouts
from hf_sampa.plan.memory import Run, memory
from hf_sampa.plan.model_size import Shape, model_size, size_of
from hf_sampa.plan.start import arguments, as_code
from tests import sharded, tiny
from tests.ranks import Forked, run_ranks


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 100}
MODELS = {
    "BertForMaskedLM": BertConfig(**SMALL, intermediate_size=128),  # whose head is tied to the embeddings
    "BertForSequenceClassification": BertConfig(**SMALL, intermediate_size=128),
    "LlamaForCausalLM": LlamaConfig(**SMALL, intermediate_size=86),
    "GPT2LMHeadModel": GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0),
    "ViTForImageClassification": ViTConfig(**SMALL, intermediate_size=128, image_size=32, patch_size=8),
    "T5ForConditionalGeneration": T5Config(d_model=32, num_layers=2, d_ff=64, num_heads=4, d_kv=8, vocab_size=100),
    "SwinForImageClassification": SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[1, 2]),
}
B = 10**9


def made(name: str, **changes):
    config = MODELS[name]
    return getattr(transformers, name)(type(config).from_dict({**config.to_dict(), **changes}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A folder for each model, with nothing but its configuration."""
    found = {}
    for name, config in MODELS.items():
        found[name] = str(tmp_path_factory.mktemp(name))
        config.architectures = [name]
        config.save_pretrained(found[name])
    return found


def planned(capsys, *words: str) -> dict:
    main(["plan", *words, "--json"])
    return json.loads(capsys.readouterr().out)


def said(capsys, *words: str) -> str:
    main(["plan", *words])
    return capsys.readouterr().out


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split("error: ")[1].split())


# ---- The model ----


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_real_model(folders, name):
    found, model = model_size(folders[name]), made(name)
    assert found.kind == name
    assert found.weights == sum(param.numel() for param in model.parameters())


def test_units_are_what_fsdp_gathers_by_itself(folders):
    llama, found = made("LlamaForCausalLM"), model_size(folders["LlamaForCausalLM"])
    layer = sum(param.numel() for param in llama.model.layers[0].parameters())
    assert found.units == (layer, layer)
    assert (
        found.root
        == llama.model.embed_tokens.weight.numel() + llama.model.norm.weight.numel() + llama.lm_head.weight.numel()
    )
    bert = made("BertForSequenceClassification").bert
    parts = [bert.embeddings, *bert.encoder.layer]
    assert sorted(model_size(folders["BertForSequenceClassification"]).units) == sorted(
        sum(param.numel() for param in part.parameters()) for part in parts
    )


@pytest.mark.parametrize(
    ("text", "number"), [("7e9", 7 * B), ("7B", 7 * B), ("350m", 350 * 10**6), ("1.5b", 3 * B // 2), ("1234", 1234)]
)
def test_a_number_of_weights(text, number):
    found = model_size(text)
    assert (found.weights, found.kind, found.units, found.shape) == (number, None, None, None)


def test_a_folder_may_be_called_like_a_number(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7B").symlink_to(folders["LlamaForCausalLM"])
    assert model_size("7B").kind == "LlamaForCausalLM"


# ---- Memory ----


def planned_units(model, layout: Layout) -> float:
    """All bytes of a run of the memory benchmark, in units of d."""
    size = size_of(model, "")
    run = Run(size, size.weights, "adamw", batch=1, tokens=8, bf16=False, checkpointing=False, frozen_bytes=4)
    return memory(run, layout).total / 4 / size.weights


@pytest.mark.distributed
@pytest.mark.skipif(
    compat.before("torch", "2.9"), reason="torch gives gradients of embeddings away with a second owner"
)
@pytest.mark.parametrize(
    ("benchmark", "layout"),
    [
        pytest.param("adamw", Layout("adamw", 1, 1), marks=pytest.mark.whole),
        pytest.param("adamw_ddp", Layout("adamw", 2, 2), marks=pytest.mark.whole),
        ("sam", Layout("sam", 1, 1)),
        pytest.param("sampa", Layout("sampa", 1, 1), marks=pytest.mark.whole),
        pytest.param("sampa", Layout("sampa", 2, 2), marks=pytest.mark.whole),
        pytest.param("sampa_sharded", Layout("sampa", 2, 2, shared=True), marks=pytest.mark.whole),
    ],
    ids=lambda each: each if isinstance(each, str) else f"on {each.devices}",
)
def test_what_is_planned_is_what_is_counted(benchmark, layout, monkeypatch):
    """Within 0.05 d, as the benchmark's own test has it."""
    monkeypatch.setattr(bench_processes.subprocess, "Popen", Forked)
    settings = {"layers": 6, "hidden": 384, "steps": 2, "device": "cpu", "bf16": False, "figure": "counted"}
    expected = planned_units(build_model(6, 384), layout)
    for answer in memory_benchmark.run({**settings, "method": benchmark}, processes=layout.devices):
        assert answer["peak_bytes"] / 4 / answer["parameters"] == pytest.approx(expected, abs=0.05)


def trained_and_frozen(
    layout: Layout, *, optimizer="adamw", bf16=False, trained=B, frozen_bytes=4, checkpointing=False
):
    run = Run(
        model_size("1B"),
        trained,
        optimizer,
        batch=8,
        tokens=None,
        bf16=bf16,
        checkpointing=checkpointing,
        frozen_bytes=frozen_bytes,
    )
    found = memory(run, layout)
    return found.trained / 4 / B, found.frozen / B


@pytest.mark.parametrize(
    ("layout", "adamw", "momentum", "sgd"),
    [
        (Layout("adamw", 1, 1), 4, 3, 2),
        (Layout("adamw", 8, 8), 5, 4, 3),  # with DDP's buckets
        (Layout("adamw", 8, 8, shards=8), 4 / 8, 3 / 8, 2 / 8),
        (Layout("sam", 8, 8), 5, 4, 3),
        (Layout("sam", 8, 8, shared=True), 3 + 2 / 8, 3 + 1 / 8, 3),
        (Layout("sampa", 1, 1), 6, 5, 4),
        (Layout("sampa", 8, 8), 5, 4, 3),
        (Layout("sampa", 8, 8, shared=True), 2 + 3 / 8, 2 + 2 / 8, 2 + 1 / 8),
        (Layout("sampa", 8, 8, shards=4), 5 / 4, 1, 3 / 4),
        (Layout("sampa", 8, 8, shards=4, shared=True), 1, 3.5 / 4, 3 / 4),
    ],
)
def test_units_of_d(layout, adamw, momentum, sgd):
    found = [trained_and_frozen(layout, optimizer=name) for name in ("adamw", "sgd_momentum", "sgd")]
    assert found == [(adamw, 0), (momentum, 0), (sgd, 0)]


def test_gradients_take_what_displaced_weights_give_back(folders):
    """But for the largest parameter."""
    size = model_size(folders["LlamaForCausalLM"])
    run = Run(size, size.weights, "adamw", batch=1, tokens=8, bf16=False, checkpointing=False, frozen_bytes=4)
    share = size.largest / size.weights
    for method, units in (("sam", 4 + share), ("sampa", 5 + share)):
        assert memory(run, Layout(method, 1, 1)).units == pytest.approx(units)


def test_frozen_weights_count_once_in_their_precision():
    pair, shards = Layout("sampa", 8, 8), Layout("sampa", 8, 8, shards=4)
    lora = {"trained": B // 100}
    assert trained_and_frozen(pair, **lora) == pytest.approx((0.05, 4 * 0.99))
    assert trained_and_frozen(shards, **lora) == pytest.approx((0.0125, 0.99))
    # Autocast holds a copy of what is not in 16 bits.
    assert trained_and_frozen(pair, **lora, bf16=True) == pytest.approx((0.05, 6 * 0.99))
    assert trained_and_frozen(pair, **lora, bf16=True, frozen_bytes=2) == pytest.approx((0.05, 2 * 0.99))
    assert trained_and_frozen(pair, **lora, bf16=True, checkpointing=True) == pytest.approx((0.05, 4 * 0.99))


def test_what_is_gathered_is_known_of_a_model(folders):
    size = model_size(folders["LlamaForCausalLM"])
    run = Run(size, size.weights, "adamw", batch=1, tokens=8, bf16=True, checkpointing=False, frozen_bytes=4)
    assert memory(run, Layout("sampa", 4, 4)).gathered == 0
    layer = size.units[0]
    assert memory(run, Layout("sampa", 4, 4, shards=2)).gathered == 2 * max(size.root + 4 * layer, 3 * size.root)
    number = Run(
        model_size("7B"), 7 * B, "adamw", batch=1, tokens=None, bf16=True, checkpointing=False, frozen_bytes=4
    )
    assert memory(number, Layout("sampa", 4, 4, shards=2)).gathered is None


# ---- Activations ----


def kept(model, inputs) -> int:
    """Bytes of what autograd keeps of a forward pass, beside weights."""
    of_model = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no other one comes to its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(**inputs)
    return sum(size for place, (size, _) in storages.items() if place not in of_model)


@pytest.mark.parametrize(
    ("name", "changes", "low"),
    [
        ("ViTForImageClassification", {}, 0.9),
        ("BertForSequenceClassification", {"attn_implementation": "eager"}, 0.8),
        ("LlamaForCausalLM", {}, 0.8),
    ],
)
def test_activations_are_about_what_autograd_keeps(name, changes, low):
    """An estimate, which is low: some functions keep what they could compute again."""
    model = made(name, num_hidden_layers=12, hidden_size=64, **changes)
    shape = size_of(model, "").shape
    batch, tokens = 2, shape.tokens or 64
    inputs = (
        {"pixel_values": torch.randn(batch, 3, 32, 32)}
        if shape.tokens
        else {"input_ids": torch.randint(0, 100, (batch, tokens))}
    )
    labels = torch.zeros((batch, tokens) if shape.vocabulary else batch, dtype=torch.long)
    counted = kept(model, {**inputs, "labels": labels})
    estimated = activation_bytes(shape, batch, tokens, bf16=False, checkpointing=False)
    assert low < estimated / counted < 1.1


def test_it_is_equation_1_with_norms_in_single_precision():
    h, a, s, b, layers = 64, 4, 10, 3, 7
    bert = Shape(layers, h, a, 4 * h, gated=False, dropout=True, matrix=True, vocabulary=0, tokens=None, longest=None)
    found = activation_bytes(bert, b, s, bf16=True, checkpointing=False)
    assert found == layers * s * b * h * (34 + 4 + 5 * a * s / h)
    again = activation_bytes(bert, b, s, bf16=True, checkpointing=True)
    assert again == layers * 4 * s * b * h + found / layers


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "SwinForImageClassification"])
def test_activations_of_other_models_are_not_known(folders, capsys, name):
    found = planned(capsys, folders[name], "--devices", "2", "--memory", "80")
    assert found["bytes_per_device"]["activations"] is None and found["fits"]
    text = said(capsys, folders[name], "--devices", "2", "--memory", "80")
    assert "not known  activations\n" in text and "together          without what is not known" in text
    assert "It fits, as far as is known: not counted: activations.\n" in text


def test_tokens(folders, capsys):
    on_two = ("--devices", "2", "--memory", "80")
    assert planned(capsys, folders["ViTForImageClassification"], *on_two)["tokens_per_sample"] == 17
    assert planned(capsys, folders["LlamaForCausalLM"], *on_two)["tokens_per_sample"] == 512
    assert planned(capsys, folders["LlamaForCausalLM"], *on_two, "--seq", "2048")["tokens_per_sample"] == 2048


# ---- The mesh ----


@pytest.mark.parametrize(
    ("words", "processes", "shards", "replicas", "shared"),
    [
        ("1B --devices 1 --memory 80", 1, 1, 1, False),
        ("1B --devices 2 --memory 24", 2, 1, 1, False),
        ("1B --devices 2 --memory 20", 2, 1, 1, True),
        ("7B --devices 8 --memory 80", 8, 1, 4, True),
        ("7B --devices 8 --memory 40", 8, 4, 1, False),
        ("7B --devices 8 --memory 80 --method adamw", 8, 2, 4, False),
        ("7B --devices 8 --memory 80 --method sam", 8, 2, 4, False),
        ("1B --devices 8 --memory 16 --method sam", 8, 1, 8, True),
        ("7B --devices 16 --memory 24 --devices-per-node 4", 16, 8, 1, False),
        # Three shards on nodes of two would leave a node shared.
        ("7B --devices 12 --memory 52 --devices-per-node 2", 12, 6, 1, False),
        ("7B --devices 12 --memory 60 --devices-per-node 6", 12, 3, 2, False),
        ("70B --devices 64 --memory 80", 64, 16, 2, True),
    ],
)
def test_the_fewest_shards_that_fit(capsys, words, processes, shards, replicas, shared):
    found = planned(capsys, *words.split())
    assert found["processes"] == processes
    assert (found["mesh"]["shards"], found["mesh"]["replicas"]) == (shards, replicas)
    assert found["arguments"].get("shard_optimizer", False) is shared
    assert found["fits"] and found["bytes_per_device"]["total"] <= found["usable_bytes_per_device"]


def test_roles_and_batch(capsys):
    found = planned(capsys, "7B", "--devices", "8", "--memory", "80", "--batch", "4")
    assert found["roles"] == {"PERTURBED": [0, 1, 2, 3], "LOOKAHEAD": [4, 5, 6, 7]}
    assert found["samples_per_update"] == 16
    assert found["sent_across_the_pair"] == 4 * 7 * B // 4
    text = said(capsys, "7B", "--devices", "16", "--memory", "80")
    assert "16 on 2 nodes, 8 each: PERTURBED ranks 0 to 7, LOOKAHEAD ranks 8 to 15\n" in text
    assert "ranks r and r + 8, on different nodes; each sends the other 3.50 GB per step" in text
    assert "pairs" not in said(capsys, "1B", "--devices", "1", "--memory", "80")


def across(layout: OnPaper, sharded_bytes: int) -> float | None:
    """Bytes that leave a node in a step, by the cost model."""
    return sent_per_node(Step(weights=1, pass_seconds=1, sharded_bytes=sharded_bytes), layout)[1]


@pytest.mark.parametrize("sharded_bytes", [2, 4])
@pytest.mark.parametrize("per_node", [1, 2, 3, 4, 6, 8, 16])
def test_pairs_are_on_one_node_where_the_cost_model_sends_less_so(per_node, sharded_bytes):
    """Of whole weights the order stays as launchers give it."""
    compared = 0
    for nodes in (2, 4, 6, 16):
        for planned in layouts("sampa", nodes * per_node, per_node, state=False):
            fields = ("sampa", planned.devices, per_node, planned.shards)
            apart = across(OnPaper(*fields), sharded_bytes)
            try:
                within = across(OnPaper(*fields, pairs_within=True), sharded_bytes)
            except ValueError:  # there is no such order
                assert not planned.pairs_on_one_node
                continue
            compared += 1
            if planned.shards == 1:
                assert not planned.pairs_on_one_node
            elif planned.pairs_on_one_node:
                assert within <= apart  # as many in single precision, for two replicas
            else:
                assert apart <= within
    assert compared or per_node % 2


def test_pairs_on_one_node(capsys):
    words = ("7B", "--devices", "16", "--memory", "60", "--bf16")
    found = planned(capsys, *words)
    assert found["mesh"] == {"roles": 2, "replicas": 2, "shards": 4} and found["arguments"]["pairs_on_one_node"]
    assert found["roles"] == {"PERTURBED": [*range(0, 16, 2)], "LOOKAHEAD": [*range(1, 16, 2)]}
    text = said(capsys, *words)
    for line in (
        "16 on 2 nodes, 8 each: PERTURBED even ranks, LOOKAHEAD odd ranks\n",
        "ranks 2r and 2r + 1, on one node; each sends the other 7.00 GB per step",
        "      pairs_on_one_node=True,\n",
    ):
        assert line in text
    for words in ("7B --devices 8 --memory 60", "1B --devices 16 --memory 80", "7B --devices 16 --memory 24"):
        assert "pairs_on_one_node" not in planned(capsys, *words.split())["arguments"]


def test_the_middle_one_of_several_nodes_has_both_roles(capsys):
    place = "ranks r and r + 12, on different nodes (the middle one has both roles); each sends"
    assert place in said(capsys, "1B", "--devices", "24", "--memory", "80")
    assert "middle" not in said(capsys, "1B", "--devices", "32", "--memory", "80")
    for nodes in (3, 5, 7):
        for per_node in (2, 4, 6, 8, 12):
            for planned in layouts("sampa", nodes * per_node, per_node, state=True):
                assert planned.shards == 1 or planned.pairs_on_one_node


def test_several_nodes_are_chosen_by_memory_alone(capsys):
    line = "chosen     by memory alone; another mesh, as of FSDP2, may be faster: docs/scaling.md has times\n"
    assert line in said(capsys, "1B", "--devices", "16", "--memory", "80")
    assert "chosen" not in said(capsys, "1B", "--devices", "8", "--memory", "80")


def test_for_people(folders, capsys):
    text = said(capsys, folders["LlamaForCausalLM"], "--devices", "2", "--memory", "80", "--bf16")
    for line in (
        "processes  2: PERTURBED rank 0, LOOKAHEAD rank 1",
        "mesh       1 replica in each role, with whole weights",
        "batch      8 per device (at most 36468 fit this mesh), 8 samples per update, of 512 tokens each\n",
        "Per device, what tensors of weights, gradients and optimizer hold at most, and an estimate of the rest:\n",
        "  625 KB  what is trained   5 d of 4 bytes, counted; measured 0.1 to 1 d more (docs/cost.md)",
        "an estimate, by arXiv 2205.05198",
        "80 GB, 10% of them left free",
        "  python -m hf_sampa launch --config gpu_2 script.py",
        "      bf16=True,",
    ):
        assert line in text


# ---- How it is started ----


@pytest.mark.parametrize(
    "words",
    [
        "1B --devices 1 --memory 80",
        "1B --devices 2 --memory 80 --bf16 --optimizer sgd_momentum",
        "1B --devices 6 --memory 80 --method sam",
        "7B --devices 8 --memory 80 --gradient-checkpointing",
        "7B --devices 8 --memory 38",
        "7B --devices 32 --memory 80",
        "1B --devices 4 --memory 80 --method adamw",
    ],
)
def test_the_command_and_the_arguments_are_taken(capsys, words, tmp_path):
    found = planned(capsys, *words.split())
    program, *rest = shlex.split(found["command"])
    if program == "python":
        assert rest[:3] == ["-m", "hf_sampa", "launch"]
        assert launch.parser().parse_args(rest[3:]).training_script == "script.py"
    else:
        started = torchrun_parser().parse_args(rest)
        nodes = 1 if started.standalone else int(started.nnodes)
        assert nodes * int(started.nproc_per_node) == found["processes"]
    changes = dict(found["arguments"])
    if mesh := changes.pop("parallelism_config", None):
        assert ParallelismConfig(**mesh).total_size * 2 == found["processes"]
    if found["method"] == "adamw":
        return
    args = SAMPaTrainingArguments(str(tmp_path), **changes)
    assert args.method == found["method"] and args.bf16 == ("--bf16" in words)
    assert bool(args.fsdp) == (found["mesh"]["shards"] > 1)


def test_the_arguments_as_code():
    run = Run(model_size("7B"), 7 * B, "adamw", 8, tokens=None, bf16=True, checkpointing=False, frozen_bytes=4)
    layout = Layout("sampa", 8, 8, shards=2)
    names = {"SAMPaTrainingArguments": lambda folder, **given: given}
    exec("\n".join(as_code(arguments(run, layout), layout)), names)
    assert names["args"]["fsdp_config"] == {"version": 2} and names["args"]["bf16"] is True
    assert names["args"]["parallelism_config"] == ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    plain = Layout("adamw", 1, 1)
    assert as_code(arguments(run, plain), plain)[0] == "args = TrainingArguments("


def trained_as_planned(folder, changes) -> tuple[list[float], int]:
    """Losses of plain Trainer, and how many times FSDP2 gathered."""
    collectives, gathers = torch.distributed.fsdp._fully_shard._fsdp_param_group, []

    def gather(*args, own=collectives.foreach_all_gather, **kwargs):
        gathers.append(own(*args, **kwargs))
        return gathers[-1]

    collectives.foreach_all_gather = gather
    changes = {**changes, "max_steps": 3, "per_device_train_batch_size": 2}
    trainer = sharded.trainer(folder, lambda: tiny.bert(dropout=0.1), tiny.sentences(16), changes, kind="adamw")
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], len(gathers)


@pytest.mark.distributed
@sharded.needs_versions
def test_plain_trainer_takes_what_is_printed_for_shards_of_bert(folders, tmp_path):
    """With layers that are computed again, too: the same losses, with dropout, and no more is gathered."""
    layout, found = Layout("adamw", 2, 2, shards=2), []
    size = model_size(folders["BertForSequenceClassification"])
    for checkpointing in (False, True):
        run = Run(size, size.weights, "adamw", 2, tokens=8, bf16=False, checkpointing=checkpointing, frozen_bytes=4)
        changes = arguments(run, layout)
        assert changes["fsdp_config"]["transformer_layer_cls_to_wrap"] == ["BertLayer"]
        assert changes.get(compat.checkpointing_argument(), False) is checkpointing
        assert "activation_checkpointing" not in changes["fsdp_config"]
        folder = tmp_path / str(checkpointing)
        found.append(run_ranks(trained_as_planned, 2, folder, changes, folder=folder / "ranks")[0])
    (losses, gathers), again = found
    assert len(losses) == 3 and gathers > 0 and again == (losses, gathers)


def trained_on_mesh(folder, changes) -> dict:
    mesh = ParallelismConfig(**changes["parallelism_config"])
    changes = {**changes, "parallelism_config": mesh, "max_steps": 4}
    changes["fsdp_config"] = {**changes["fsdp_config"], "transformer_layer_cls_to_wrap": ["BertLayer"]}
    return sharded.outcome(sharded.trainer(folder, tiny.bert, tiny.sentences(38), changes))


@pytest.mark.whole
@pytest.mark.distributed
@sharded.needs_versions
@pytest.mark.parametrize("shared", [False, True], ids=["", "one optimizer for a pair"])
def test_pairs_on_one_node_train_the_same_replicas_of_shards(tmp_path, shared):
    """In the order that is printed, and in the order of launchers."""
    run = Run(model_size("1M"), 10**6, "adamw", 1, tokens=None, bf16=False, checkpointing=False, frozen_bytes=4)
    printed = arguments(run, Layout("sampa", 8, 4, shards=2, shared=shared))
    assert printed.get("shard_optimizer", False) is shared
    found = {}
    for within in (True, False):
        folder = tmp_path / str(within)
        changes = {**printed, "pairs_on_one_node": within}
        found[within] = run_ranks(trained_on_mesh, 8, folder, changes, folder=folder / "ranks")
    assert printed["pairs_on_one_node"]
    for rank in found[True]:
        assert rank["shards"] == 2
        assert tiny.differing(rank["weights"], found[False][0]["weights"]) == []
    assert sharded.deviation(found[True][0]["weights"], dict(tiny.bert().named_parameters())) > 1e-4


def test_layers_are_named_where_plain_trainer_would_stop(folders):
    named = {name: model_size(folder).layers for name, folder in folders.items()}
    expected = {
        "BertForMaskedLM": ["BertLayer"],
        "BertForSequenceClassification": ["BertLayer"],
        "ViTForImageClassification": ["ViTLayer"],
    }
    assert named == {**dict.fromkeys(MODELS), **expected}
    with torch.device("meta"):
        roberta = transformers.RobertaModel(transformers.RobertaConfig(**SMALL, intermediate_size=128))
        clip = transformers.CLIPModel(transformers.CLIPConfig())  # has no input embeddings to ask for
    assert size_of(roberta, "").layers == ["RobertaLayer"] and size_of(clip, "").layers is None
    size = model_size(folders["BertForSequenceClassification"])
    run = Run(size, size.weights, "adamw", 8, tokens=8, bf16=False, checkpointing=False, frozen_bytes=4)
    assert arguments(run, Layout("sampa", 4, 4, shards=2))["fsdp_config"] == {"version": 2}


# ---- What is said of the figures ----


def test_what_fits(folders, capsys):
    words = (folders["LlamaForCausalLM"], "--devices", "2", "--memory", "80")
    assert "\n\nIt fits.\n\nStart it:\n" in said(capsys, *words)
    assert planned(capsys, *words)["uncertain"] == []


def test_what_fits_as_far_as_is_known(folders, capsys):
    more = "runs took up to 1 d more, here 28.0 GB, and 13.5 GB are left"
    found = planned(capsys, "7B", "--devices", "8", "--memory", "80")
    assert found["uncertain"] == ["not counted: activations", more]
    text = " ".join(said(capsys, "7B", "--devices", "8", "--memory", "80").split())
    assert f"It fits, as far as is known: not counted: activations; {more}. Start it: " in text
    shards = planned(capsys, "7B", "--devices", "8", "--memory", "40")
    unknown = "not counted: activations and what is gathered at once"
    assert shards["uncertain"] == [unknown, "no process under FSDP2 was measured"]


def test_an_estimate_of_activations_may_be_a_third_low(folders, capsys):
    words = (folders["LlamaForCausalLM"], "--devices", "2", "--batch", "64")
    total = planned(capsys, *words, "--memory", "80")["bytes_per_device"]
    needed = total["total"] + total["trained"] / 5 + total["activations"] / 3
    assert planned(capsys, *words, "--memory", str(1.001 * needed / 10**9))["uncertain"] == []
    (why,) = planned(capsys, *words, "--memory", str(0.999 * needed / 10**9))["uncertain"]
    assert why.startswith("runs took up to 1 d and a third of the activations more, here ")


def test_the_largest_batch(folders, capsys):
    def on(batch: int) -> dict:
        words = ("--devices", "8", "--memory", "0.05", "--batch", str(batch))
        return planned(capsys, folders["LlamaForCausalLM"], *words)

    most = on(1)["largest_batch"]
    full = on(most)
    assert most > 1 and full["fits"] and full["mesh"] == on(1)["mesh"] and full["largest_batch"] == most
    assert full["bytes_per_device"]["total"] + full["bytes_per_device"]["activations"] / most > 0.045 * 10**9
    text = said(capsys, folders["LlamaForCausalLM"], "--devices", "8", "--memory", "0.05", "--batch", "1")
    assert (
        f"batch      1 per device (at most {most} fit this mesh), 4 samples per update, of 512 tokens each\n" in text
    )
    with pytest.raises(SystemExit):
        main(["plan", folders["LlamaForCausalLM"], "--devices", "1", "--memory", "0.0001"])
    assert "8 per device (at most 0 fit this mesh), 8 samples" in capsys.readouterr().out
    assert planned(capsys, "1B", "--devices", "8", "--memory", "80")["largest_batch"] is None
    assert "at most" not in said(capsys, "1B", "--devices", "2", "--memory", "80").split("pairs")[0]


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        (
            "--frozen-bytes 2 --seq 8 --bf16 --gradient-checkpointing",
            "--seq --frozen-bytes --bf16 --gradient-checkpointing",
        ),
        ("--bf16 --trainable 1%", ""),  # autocast has copies of what is frozen
        ("--bf16 --gradient-checkpointing --trainable 1%", "--bf16"),
        ("--bf16 --frozen-bytes 2 --trainable 1%", "--bf16"),
        ("", ""),
    ],
)
def test_options_on_which_no_figure_depends(capsys, words, unused):
    words = ("1B", "--devices", "2", "--memory", "80", *words.split())
    assert planned(capsys, *words)["not_used"] == unused.split()
    line = f"not used: {', '.join(unused.split())}, on which no figure here depends\n"
    text = said(capsys, *words)
    assert line in text if unused else "not used" not in text


def test_options_of_a_model_are_used(folders, capsys):
    words = ("--seq", "8", "--bf16", "--gradient-checkpointing", "--devices", "2", "--memory", "80")
    assert planned(capsys, folders["LlamaForCausalLM"], *words)["not_used"] == []


@pytest.mark.parametrize(
    ("words", "figures"),
    [
        (
            "1000 --devices 2 --memory 1",
            ("20.0 KB  what is trained", "900 MB  there is          1 GB,", "sends the other 4.00 KB per"),
        ),
        (
            "1M --devices 2 --memory 24",
            ("20.0 MB  what is trained", "21.6 GB  there is", "sends the other 4.00 MB per"),
        ),
        ("70B --devices 64 --memory 80", ("70.0 GB  what is trained", "sends the other 26.2 GB per")),
    ],
)
def test_three_digits_of_every_figure(capsys, words, figures):
    text = said(capsys, *words.split())
    for figure in figures:
        assert figure in text
    assert " 0.0" not in text


# ---- What does not fit, and what is refused ----


@pytest.mark.parametrize(
    ("words", "missing", "would_fit"),
    [
        ("7B --devices 2 --memory 80", "26.0", ["--trainable 1% (LoRA)", "--devices 4"]),
        ("70B --devices 8 --memory 40", "244", ["--devices 64"]),
        ("1B --devices 1 --memory 4", "20.4", ["--devices 16"]),
    ],
)
def test_what_does_not_fit_ends_with_1_and_says_what_would(capsys, words, missing, would_fit):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words.split()])
    assert stop.value.code == (
        f"It does not fit: {missing} GB per device are missing. It would with {', or with '.join(would_fit)}."
    )
    assert "Start it" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", *words.split(), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["would_fit"] == would_fit


def test_options_that_would_do_together_are_named_together(folders, capsys):
    words = [folders["LlamaForCausalLM"], "--devices", "2", "--memory", "0.003", "--batch", "64"]
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert str(stop.value).endswith("It would with --bf16 --gradient-checkpointing --batch 1.")
    capsys.readouterr()
    each = (["--bf16"], ["--gradient-checkpointing"], ["--batch", "1"])
    assert planned(capsys, *words, *(word for option in each for word in option))["fits"]
    for option in each:
        with pytest.raises(SystemExit):
            main(["plan", *words, *option])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "7B --devices 3 --memory 80",
            "--devices: expected an even number, or 1, because SAMPa pairs processes, got 3. Plan with 2, or with --method sam",
        ),
        (
            "7B --devices 12 --memory 80",
            "--devices: expected a multiple of the 8 devices of a node, got 12. Set --devices-per-node to a number that divides 12, as 6",
        ),
        (
            "7B --devices 8 --memory 80 --devices-per-node 16",
            "--devices: expected a multiple of the 16 devices of a node, got 8. Set --devices-per-node to a number that divides 8, as 8",
        ),
        ("7B --devices 2000000 --memory 80", "--devices: expected at most 1048576, got 2000000. Plan with fewer"),
        ("7B --devices 0 --memory 80", "argument --devices: expected a whole number of at least 1, got '0'"),
        ("7B --devices 2 --memory nan", "argument --memory: expected a number of GB above 0, got 'nan'"),
        (
            "7B --devices 2 --memory 80 --trainable 8B",
            "--trainable: expected a number of the model's 7000000000 weights or a part of them, as 20M or 1%, got 8B",
        ),
        (
            "no-such-model --devices 2 --memory 80",
            "expected a folder with the config.json of a model that transformers knows, such a model's name on the Hub, or a number "
            "of weights, as 7e9, 7B or 350M; got 'no-such-model' (",
        ),
    ],
)
def test_what_is_refused(capsys, monkeypatch, words, message):
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True)
    assert message in refused(capsys, *words.split())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("7x", "no number above 0 of weights, and no folder"),
        ("0", "no number above 0 of weights, and no folder"),
        ("7B5", "no number above 0 of weights, and no folder"),
        ("./nothere", "there is no such folder"),
        ("/no/where", "there is no such folder"),
        ("out/not/here", "there is no such folder"),
        ("out/nothere/", "there is no such folder"),
    ],
)
def test_the_hub_is_not_asked_for_what_it_cannot_have(capsys, monkeypatch, name, why):
    asked = []
    monkeypatch.setattr(model_sizes.AutoConfig, "from_pretrained", asked.append)
    assert f"or 350M; got {name!r} ({why})" in refused(capsys, name, "--devices", "2", "--memory", "80")
    assert asked == []


def test_tokens_that_a_model_does_not_take_are_refused(folders, capsys):
    on_two = ("--devices", "2", "--memory", "80", "--seq", "4096")
    assert "--seq: expected at most 2048, which LlamaForCausalLM takes, got 4096" in refused(
        capsys, folders["LlamaForCausalLM"], *on_two
    )
    assert "which makes 17 tokens of a picture, got 4096" in refused(
        capsys, folders["ViTForImageClassification"], *on_two
    )


def test_help_answers(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert not stop.value.code
    assert "It loads no weights" in " ".join(capsys.readouterr().out.split())

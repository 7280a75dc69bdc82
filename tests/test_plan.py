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
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import BertConfig, GPT2Config, LlamaConfig, SwinConfig, T5Config, ViTConfig

from hf_sampa import SAMPaTrainingArguments, compat, launch
from hf_sampa.__main__ import main
from hf_sampa.plan.activations import activation_bytes
from hf_sampa.plan.layouts import Layout
from hf_sampa.plan.memory import Run, memory
from hf_sampa.plan.model_size import Shape, model_size, size_of
from hf_sampa.plan.start import arguments, as_code
from tests.ranks import Forked


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


def test_for_people(folders, capsys):
    text = said(capsys, folders["LlamaForCausalLM"], "--devices", "2", "--memory", "80", "--bf16")
    for line in (
        "processes  2: PERTURBED rank 0, LOOKAHEAD rank 1",
        "mesh       1 replica in each role, with whole weights",
        "batch      8 per device, 8 samples per update, of 512 tokens each",
        "5 d of 4 bytes, counted; measured 0.1 to 1 d more (docs/cost.md)",
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
            "--devices: expected a multiple of the 8 devices of a node, got 12. Set --devices-per-node",
        ),
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

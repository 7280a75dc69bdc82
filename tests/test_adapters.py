"""Variants that perturb the merged weights of a model with adapters, against serial transcriptions and peft's own second adapter."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.variants import Moment, Recipe
from hf_sampa.variants.adapters import Adversary, RandomMergedWeights
from tests import tiny
from tests.adapted import QUANTIZED, Rows, bert, gpt2, llama, lora, quantized_llama


# Of peft, and of transformers from 5.23 on.
pytestmark = pytest.mark.filterwarnings("default:.*gradient_checkpointing.* is deprecated:FutureWarning")
STEPS = 6
NAMES = ["flat_lora", "bi_lora"]


class Texts(Rows):
    """Nothing is said of first tokens, which Trainer's mean over labels may count, and a model's own does not."""

    def collate(self, rows):
        batch = super().collate(rows)
        batch["labels"][:, 0] = -100
        return batch


def arguments(folder, variant, **settings):
    return SAMPaTrainingArguments(
        str(folder),
        **{
            "method": "sam",
            "variant": variant,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "adam_epsilon": 1e-4,  # what is of the size of rounding moves nothing
            "train_sampling_strategy": "sequential",
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        },
    )


def trained(folder, variant, model, rows=None, resume=None, callbacks=(), **settings):
    rows = rows or (Rows() if hasattr(model.base_model.model, "classifier") else Texts(causal=True))
    trainer = SAMPaTrainer(
        model,
        arguments(folder, variant, **settings),
        train_dataset=rows,
        data_collator=rows.collate,
        callbacks=[*callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Halt(TrainerCallback):
    """Ends a run after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def adapters(model):
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def without_dropout(make, **settings):
    model = make(**settings)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "lora_A"):
            module.get_base_layer().weight.data *= (
                10  # as it is made, nothing that these layers say has a weight in the loss
            )
    return model


def layers_of(model):
    return {name: each for name, each in model.named_modules() if hasattr(each, "lora_A")}


def merged(layer):
    """``(out, in)``"""
    weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
    return weight.T if layer.fan_in_fan_out else weight


def loss(model, rows, t):
    return model(**rows.collate([rows[4 * t + i] for i in range(4)])).loss


def flat_lora(model, rows, args):
    """Eq. 6 and 7, with the noise added to the frozen weights themselves."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.learning_rate,
        eps=args.adam_epsilon,
        weight_decay=0,
    )
    for t in range(args.max_steps):
        before = {}
        for name, layer in layers_of(model).items():
            weight = merged(layer).detach()
            sigma = args.rho * (1 - math.cos(math.pi * t / args.max_steps)) / 2
            dice = Moment(step=t, seed=args.seed).generator(f"merged weights of {name}")
            noise = (
                torch.randn(weight.shape, generator=dice)
                * (sigma / weight.shape[1] ** 0.5 * weight.norm(dim=1))[:, None]
            )
            base = layer.get_base_layer().weight
            before[base] = base.detach().clone()
            base.data += noise.T if layer.fan_in_fan_out else noise
        loss(model, rows, t).backward()
        for base, value in before.items():
            base.data.copy_(value)
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_flat_lora_is_its_serial_transcription(tmp_path, make):
    trainer = trained(tmp_path, "flat_lora", without_dropout(make), rho=2.0)
    expected = without_dropout(make)
    flat_lora(expected, trainer.train_dataset, trainer.args)
    torch.testing.assert_close(adapters(trainer.model), adapters(expected), rtol=1e-4, atol=1e-6)
    assert_moved_by_the_variant(tmp_path, "flat_lora", make, expected)


def assert_moved_by_the_variant(folder, variant, make, expected):
    """That is, this test would notice plain LoRA in the variant's place."""
    plain = trained(folder, variant, without_dropout(make), rho=0.0)
    pairs = zip(adapters(plain.model).values(), adapters(expected).values(), strict=True)
    assert max((a - b).abs().max() for a, b in pairs) > 1e-4


def bi_lora(model, auxiliary, rows, args):
    """Eq. 9 and 10, with a second adapter of peft's own, named "second", of scaling 1."""
    for name, layer in layers_of(model).items():
        pair = auxiliary["|" + name.replace(".", "|")]
        layer.lora_A["second"].weight.data.copy_(pair.A)
        layer.lora_B["second"].weight.data.copy_(pair.B)
        layer.set_adapter(["default", "second"])
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    second = [param for name, param in trained.items() if ".second." in name]
    first = [param for name, param in trained.items() if ".second." not in name]
    optimizer = torch.optim.AdamW([*first, *second], lr=args.learning_rate, eps=args.adam_epsilon, weight_decay=0)
    clipped = []
    for t in range(args.max_steps):
        loss(model, rows, t).backward()
        for param in second:
            param.grad.neg_()
        nn.utils.clip_grad_norm_(first, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        pairs = [(each.lora_A["second"].weight, each.lora_B["second"].weight) for each in layers_of(model).values()]
        norm = sum((b @ a).square().sum() for a, b in pairs).sqrt()
        for weight in (each for pair in pairs for each in pair if norm > args.rho):
            weight.data *= (args.rho / norm) ** 0.5
        clipped.append(bool(norm > args.rho))
    return clipped


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_bi_lora_is_its_serial_transcription(tmp_path, make):
    model = without_dropout(make)
    trainer = trained(tmp_path, "bi_lora", model, rho=0.1, variant_args={"rank": 3})
    expected = without_dropout(make)
    config = copy.deepcopy(expected.peft_config["default"])
    config.r = config.lora_alpha = 3
    config.use_rslora, config.lora_dropout, config.modules_to_save = False, 0.0, None
    expected.add_adapter("second", config)
    auxiliary = Adversary(3).own(without_dropout(make), trainer.args.seed)
    clipped = bi_lora(expected, auxiliary, trainer.train_dataset, trainer.args)
    assert any(clipped)
    first = {name: value for name, value in expected.named_parameters() if name in adapters(model)}
    torch.testing.assert_close(adapters(model), first, rtol=1e-4, atol=1e-6)
    assert_moved_by_the_variant(tmp_path, "bi_lora", make, model)


@pytest.mark.parametrize("variant", NAMES)
def test_radius_zero_is_lora_alone(tmp_path, variant):
    found = adapters(trained(tmp_path, variant, bert(), rho=0.0).model)
    plain = SAMPaTrainer(bert(), arguments(tmp_path, "rst", variant_args={"p": 0.0}), train_dataset=(rows := Rows()))
    plain.data_collator = rows.collate
    plain.train()
    assert all(torch.equal(value, found[name]) for name, value in adapters(plain.model).items())


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("settings", [{}, {"sampa_start": 2}, {"gradient_accumulation_steps": 2}], ids=str)
def test_resumed_is_never_stopped(tmp_path, variant, settings):
    settings = {"save_strategy": "steps", "save_steps": 3, "rho": 0.5, **settings}
    whole = trained(tmp_path / "whole", variant, bert(), **settings)
    halted = trained(tmp_path / "halted", variant, bert(), **settings, callbacks=[Halt(3)])
    assert halted.state.global_step == 3
    resumed = trained(tmp_path / "halted", variant, bert(), **settings, resume=True)
    expected = adapters(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in adapters(resumed.model).items())


@pytest.mark.parametrize("variant", NAMES)
def test_nothing_of_it_is_left_on_the_model_or_saved(tmp_path, variant):
    model, rows = bert(), Rows()
    before = [*model.state_dict()]
    trainer = trained(tmp_path, variant, model, save_strategy="steps", save_steps=STEPS)
    assert [*model.state_dict()] == before and not any(each._forward_hooks for each in model.modules())
    saved = load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert saved.keys() == get_peft_model_state_dict(model).keys()
    assert sorted(path.name for path in (tmp_path / f"checkpoint-{STEPS}").glob("*/")) == []
    # What is scored is the first adapter alone.
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(tiny.bert_of_three_layers(), tmp_path / f"checkpoint-{STEPS}").eval()
    batch = rows.collate([rows[i] for i in range(8)])
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**batch).loss, again(**batch).loss)


@pytest.mark.parametrize("variant", NAMES)
def test_micro_batches_of_a_step_share_the_perturbation(tmp_path, variant):
    whole = trained(tmp_path, variant, without_dropout(bert), rho=1.0)
    parts = trained(
        tmp_path, variant, without_dropout(bert), rho=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    torch.testing.assert_close(adapters(parts.model), adapters(whole.model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_activations_draws_the_same(tmp_path, variant, reentrant):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    whole = adapters(trained(tmp_path, variant, bert(), rho=1.0).model)
    found = adapters(trained(tmp_path, variant, bert(), rho=1.0, **settings).model)
    assert all(torch.equal(value, found[name]) for name, value in whole.items())


def test_a_second_run_begins_with_new_auxiliary_adapters(tmp_path):
    rows = Rows()
    trainer = trained(tmp_path, "bi_lora", bert(), rows)
    first, count = trainer.auxiliary_adapters, len(trainer.optimizer.param_groups[0]["params"])
    trainer.train()
    assert trainer.auxiliary_adapters is not first
    assert len(trainer.optimizer.param_groups[0]["params"]) == count
    assert not any(param in trainer.optimizer.state for param in first.parameters())
    trainer.args.variant, trainer.args.variant_args = "flat_lora", {}
    trainer.train()
    assert not hasattr(trainer, "auxiliary_adapters")
    assert len(trainer.optimizer.param_groups[0]["params"]) < count


def test_an_optimizer_of_the_user_is_given_them(tmp_path):
    model, rows = bert(), Rows()
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    trainer = SAMPaTrainer(model, arguments(tmp_path, "bi_lora"), train_dataset=rows, optimizers=(optimizer, None))
    trainer.data_collator = rows.collate
    trainer.train()
    moved = [pair.B.abs().max() > 0 for pair in trainer.auxiliary_adapters.values()]
    assert len(moved) == 6 and all(moved)


def merged_bert():
    model = bert()
    model.merge_adapter()
    return model


def conv():
    model = ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2)
    )
    return get_peft_model(model, LoraConfig(r=2, target_modules=["convolution"]))


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (tiny.bert_of_three_layers, {}, "a model with LoRA adapters, which this variant is about, got none"),
        (merged_bert, {}, "LoRA adapters on linear layers, got .*, whose adapters are merged"),
        (
            lambda: bert(AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=9)),
            {},
            "whose adapter is a peft",
        ),
        (conv, {}, "LoRA adapters on linear layers, got .*, a Conv2d"),
        (bert, {"torch_compile": True}, "torch_compile: expected a model that is not compiled"),
        (bert, {"method": "sampa"}, "method: .* because it takes one gradient in a step"),
    ],
    ids=["no adapters", "merged", "AdaLoRA", "convolution", "compiled", "sampa"],
)
def test_what_it_cannot_be_is_refused(tmp_path, variant, make, settings, words):
    rows = Rows()
    with pytest.raises(ValueError, match=words):
        SAMPaTrainer(make(), arguments(tmp_path, variant, **settings), train_dataset=rows).train()


def test_adapters_that_scale_the_weights_are_refused_by_flat_lora(tmp_path):
    with pytest.raises(ValueError, match="but .* has DoRA, which scales them, too. Set use_dora=False"):
        trained(tmp_path, "flat_lora", bert(lora(use_dora=True)))
    trained(tmp_path, "bi_lora", bert(lora(use_dora=True)))


def test_a_recipe_of_one_s_own_with_both_gradients(tmp_path):
    """SAM's two passes have the same noise."""
    rows, seen = Rows(), []

    class Counted(RandomMergedWeights):
        def __call__(self, name, x, dtype, rho, now):
            added = super().__call__(name, x, dtype, rho, now)
            if name.endswith("layer.0.attention.self.query"):
                seen.append((now.step, added.detach().clone(), x.detach().clone()))
            return added

    args = arguments(tmp_path, "sam", rho=0.5, max_steps=3)
    trainer = SAMPaTrainer(without_dropout(bert), args, train_dataset=rows, recipe=Recipe(adapters=Counted()))
    trainer.data_collator = rows.collate
    trainer.train()
    of_last = [(added, x) for step, added, x in seen if step == 2]
    assert len(of_last) == 2 and torch.equal(of_last[0][1], of_last[1][1])
    torch.testing.assert_close(of_last[0][0], of_last[1][0])
    args.method = "sampa"
    with pytest.raises(ValueError, match="whose adapters add to what layers compute"):
        SAMPaTrainer(bert(), args, train_dataset=rows, recipe=Recipe(adapters=Counted())).train()


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("quantized", QUANTIZED)
def test_frozen_weights_may_be_quantized(tmp_path, quantized, variant):
    """The adapters move as on the weights that the quantized ones stand for; but bitsandbytes rounds activations to 8 bits, too."""
    make = quantized_llama(tmp_path / "base", quantized())
    start, rows, settings = adapters(make()), Texts(causal=True), {"rho": 0.5, "adam_epsilon": 1e-3}
    found = adapters(trained(tmp_path, variant, make(), rows, **settings).model)
    model = quantized_llama(tmp_path / "base", None)()
    for layer, rounded in zip(plain_linears(model), plain_linears(make()), strict=True):
        layer.weight.data = dequantize_module_weight(rounded).float()
    expected = adapters(trained(tmp_path, variant, model, rows, **settings).model)
    moved, apart = (
        sum((one[name] - other[name]).square().sum() for name in one).sqrt()
        for one, other in ((expected, start), (expected, found))
    )
    assert apart < (0.2 if quantized.__name__ == "eight_bits" else 1e-3) * moved


def plain_linears(model):
    return [each for each in model.modules() if isinstance(each, nn.Linear)]


class WithReference(SAMPaTrainer):
    """Its loss has a term of the model without adapters, and one of other adapters, as TRL's DPOTrainer may."""

    said: ClassVar[list] = []

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        with torch.no_grad():
            with model.disable_adapter():
                without = model(**inputs).loss
            for layer in layers_of(model).values():
                layer.set_adapter("reference")
            other = model(**inputs).loss
            for layer in layers_of(model).values():
                layer.set_adapter("default")
        loss = model(**inputs).loss
        self.said.append([each.item() for each in (without, other, loss)])
        return loss


@pytest.mark.parametrize("variant", NAMES)
def test_a_reference_is_not_perturbed(tmp_path, variant):
    found = {}
    for rho in (0.0, 2.0):
        model, rows = without_dropout(bert), Rows()
        model.add_adapter("reference", lora(modules_to_save=None, lora_dropout=0.0))
        for name, param in model.named_parameters():
            param.requires_grad_(".default." in name)
        WithReference.said = found[rho] = []
        args = arguments(tmp_path, variant, rho=rho)
        WithReference(model, args, train_dataset=rows, data_collator=rows.collate).train()
    differ = [[a != b for a, b in zip(*pair, strict=True)] for pair in zip(found[0.0], found[2.0], strict=True)]
    # What is trained moves the classifier, too: the first step with a perturbation is the last one at which all is equal but that.
    first = next(i for i, each in enumerate(differ) if any(each))
    assert differ[first] == [False, False, True]


class ByKeyword(nn.Module):
    """Calls its layer by keyword; a second layer has an adapter that is not active."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.values, self.other = nn.Linear(64, 8), nn.Linear(64, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        x = pixel_values.flatten(1)
        logits = self.head(self.values(x=x) + self.other(x=x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def by_keyword():
    model = get_peft_model(ByKeyword(), LoraConfig(r=2, target_modules=["values"]))
    model.add_adapter("unused", LoraConfig(r=2, target_modules=["other"]))
    return model


@pytest.mark.parametrize("variant", NAMES)
def test_layers_called_by_keyword_and_inactive_adapters(tmp_path, variant):
    args = arguments(tmp_path, variant, rho=1.0)
    trainer = SAMPaTrainer(by_keyword(), args, train_dataset=tiny.images(16))
    trainer.train()
    assert [name.rpartition(".")[2] for name in trainer.sampa.recipe.adapters.layers] == ["values"]


def test_a_radius_that_grows_from_zero_does_not_stop_the_adversary(tmp_path):
    def warm_up():
        trainer.args.rho = 0.0 if trainer.state.global_step < 2 else 0.5

    trainer = SAMPaTrainer(
        bert(),
        arguments(tmp_path, "bi_lora", rho=0.0, optim="sgd", learning_rate=1.0),
        train_dataset=(rows := Rows()),
        data_collator=rows.collate,
        callbacks=[tiny.Each(warm_up)],
    )
    trainer.train()
    assert all(pair.A.abs().max() > 0 and pair.B.abs().max() > 0 for pair in trainer.auxiliary_adapters.values())


def test_the_auxiliary_adapters_are_in_the_group_of_the_adapters(tmp_path):
    model, rows = bert(), Rows()
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    groups = [
        {"params": [param for name, param in trained.items() if "lora_" not in name], "lr": 0.0},
        {"params": [param for name, param in trained.items() if "lora_" in name], "lr": 0.1},
    ]
    args = arguments(tmp_path, "bi_lora")
    trainer = SAMPaTrainer(model, args, train_dataset=rows, optimizers=(torch.optim.SGD(groups), None))
    trainer.data_collator = rows.collate
    trainer.train()
    assert len(trainer.optimizer.param_groups[0]["params"]) == 2
    assert all(pair.B.abs().max() > 0 for pair in trainer.auxiliary_adapters.values())

"""The variants against serial transcriptions of their papers, and the limits in which they are SAM."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import PreTrainedConfig, Trainer, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_sampa import SAMPaMixin, SAMPaTrainer
from hf_sampa.functional import global_norm
from hf_sampa.variants import VARIANTS, Recipe, When
from hf_sampa.variants.masks import ImportantTensors
from hf_sampa.variants.parts import Moment
from tests import tiny
from tests import variants_reference as serial
from tests.ranks import run_ranks


STEPS = 9

RULES = {
    "sam": serial.SAM,
    "optsam": serial.OptSAM,
    "gnp": serial.GNP,
    "asam": serial.ASAM,
    "vasso": serial.VaSSO,
    "fsam": serial.FSAM,
    "sam_on": serial.SAMON,
    "looksam": serial.LookSAM,
    "aesam": serial.AESAM,
    "stable_sam": serial.StableSAM,
    "gsam": serial.GSAM,
    "lesam": serial.LESAM,
    "zsharp": serial.ZSharp,
    "momentum_sam": serial.MomentumSAM,
}


class Net(nn.Module):
    """As little as has what variants ask for, so that whole copies of it cost little: matrices and a normalization."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.LayerNorm, self.second = nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.second(nn.functional.gelu(self.LayerNorm(self.first(pixel_values.flatten(1)))))
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels), logits)


def loss(model, batch):
    return model(**batch).loss


def batches_in_order(dataset, size, count):
    epoch = [dataset[i : i + size] for i in range(0, len(dataset), size)]
    return [default_collate(epoch[t % len(epoch)]) for t in range(count)]


def trained(folder, variant, method, model=Net, dataset=None, **changes):
    settings = {
        "learning_rate": 0.1,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    args = tiny.arguments(folder, variant=variant, method=method, **{**settings, **changes})
    trainer = SAMPaTrainer(model=model(), args=args, train_dataset=dataset or tiny.images(18))
    trainer.train()
    return trainer


def in_series(trainer, rule_class, prepare=lambda rule, model, optimizer: None):
    """What the serial transcription makes of the same model, data and settings; and which steps ascended.

    prepare: called with the rule, the model and its optimizer before the first step.
    """
    args, model = trainer.args, Net()
    plain = Trainer(model=model, args=args, train_dataset=trainer.train_dataset)
    plain.create_optimizer_and_scheduler(STEPS)
    rule = rule_class(args.rho, model, STEPS)
    prepare(rule, model, plain.optimizer)
    run = (model, plain.optimizer, plain.lr_scheduler, loss)
    if args.method == "sam":
        return model, serial.sequential(rule, *run, batches_in_order(trainer.train_dataset, 4, STEPS))
    serial.parallel(rule, *run, batches_in_order(trainer.train_dataset, 4, STEPS + 1), args.lmbda)
    return model, None


def assert_equal(model, expected, rtol=2e-4, atol=2e-6, start=Net):
    moved = max((a - b).abs().max().item() for a, b in zip(expected.parameters(), start().parameters(), strict=True))
    assert moved > 1e-2
    torch.testing.assert_close(dict(model.named_parameters()), dict(expected.named_parameters()), rtol=rtol, atol=atol)


CASES = [(name, method) for name in RULES for method in VARIANTS[name].timings]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_variant_is_its_serial_transcription(tmp_path, name, method):
    trainer = trained(tmp_path, name, method)
    expected, ascended = in_series(trainer, RULES[name])
    assert_equal(trainer.model, expected)
    if name != "sam":
        plain = trained(tmp_path, "sam", method, rho=trainer.args.rho)
        differs = max(
            (a - b).abs().max().item() for a, b in zip(plain.model.parameters(), expected.parameters(), strict=True)
        )
        assert differs > 1e-4  # that is, this test would notice SAM in the variant's place
    if name in ("looksam", "aesam"):
        assert 0 < sum(ascended) < STEPS


LIMITS = {
    "theta = 1 makes VaSSO SAM": ("vasso", {"theta": 1.0}, "sam"),
    "sigma = 0 makes F-SAM SAM": ("fsam", {"sigma": 0.0}, "sam"),
    "k = 1 makes LookSAM SAM": ("looksam", {"k": 1}, "sam"),
    "p = 1 makes RST SAM": ("rst", {"p": 1.0}, "sam"),
    "gamma = 0 makes G-RST the base optimizer": ("rst", {"p": 1.0, "gamma": 0.0}, "base"),
    "p = 0 makes RST the base optimizer": ("rst", {"p": 0.0}, "base"),
    "sparsity = 0 makes Sparse SAM SAM": ("ssam_d", {"sparsity": 0.0}, "sam"),
    "a full quota makes vSAM SAM": ("vsam", {"window": 5, "start": 5, "most": 1.0}, "sam"),
    "warm-up for the whole run makes vSAM SAM": ("vsam", {"warmup": 1.0}, "sam"),
    "alpha = 1 makes the penalty SAM": ("gnp", {"alpha": 1.0}, "sam"),
    "alpha = 0 makes the penalty the base optimizer": ("gnp", {"alpha": 0.0}, "base"),
    "alpha = 0 makes GSAM SAM": ("gsam", {"alpha": 0.0}, "sam"),
    "s = 1 makes SL-SAM SAM": ("slsam", {"s": 1.0}, "sam"),
    "percentile = 0 makes ZSharp SAM": ("zsharp", {"percentile": 0.0}, "sam"),
    "c = very low makes AE-SAM SAM": ("aesam", {"lam1": -1e9, "lam2": -1e9}, "sam"),
    "one shard makes mSAM SAM": ("msam", {"count": 1}, "sam"),
    "every step sampled makes ARSAM SAM": ("arsam", {"sampler": "periodic", "k": 1}, "sam"),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("method", ["sam", "sampa"])
def test_limits(tmp_path, limit, method):
    name, arguments, expected = LIMITS[limit]
    if method not in VARIANTS[name].timings or (expected == "base" and method == "sampa"):
        pytest.skip("not a timing of this variant")
    ours = trained(tmp_path, name, method, rho=0.05, variant_args=arguments)
    if expected == "sam":
        assert_equal(ours.model, trained(tmp_path, "sam", method, rho=0.05).model, rtol=1e-5, atol=1e-7)
    else:
        plain = Trainer(model=Net(), args=ours.args, train_dataset=ours.train_dataset)
        plain.train()
        assert_equal(ours.model, plain.model, rtol=1e-5, atol=1e-7)


# Name, arguments, and the serial step for loss and rho. The epochs of these runs have 5 batches, the last of 2 samples.
BY_STEP = {
    "SAM-db": ("sam_db", {}, lambda rho: serial.sam_db(loss, rho)),
    "K-SAM": ("ksam", {"k": 3}, lambda rho: serial.ksam(loss, rho, 3)),
    "ESAM, samples": ("esam", {"beta": 1.0, "gamma": 0.5}, lambda rho: serial.esam_selection(loss, rho, 0.5)),
    "mSAM": ("msam", {"size": 3}, lambda rho: serial.msam(loss, rho, 3)),
    "BiSAM": ("bisam", {}, lambda rho: serial.bisam(loss, rho)),
    "Functional SAM": ("functional_sam", {}, lambda rho: serial.functional_sam(loss, rho)),
    "MESA": (
        "mesa",
        {"lam": 2.0, "tau": 2.0, "start": 0.0, "decay": 0.9},
        lambda rho: serial.mesa(loss, 2.0, 2.0, 0.9),
    ),
    "SAF": ("saf", {"lam": 2.0, "tau": 2.0, "start": 0.0, "epochs": 1}, lambda rho: serial.saf(loss, 2.0, 2.0, 1, 5)),
}


@pytest.mark.parametrize("case", BY_STEP)
def test_a_variant_of_samples_or_losses_is_its_serial_transcription(tmp_path, case):
    name, arguments, make = BY_STEP[case]
    trainer = trained(tmp_path, name, "sam", variant_args=arguments)
    model = Net()
    plain = Trainer(model=model, args=trainer.args, train_dataset=trainer.train_dataset)
    plain.create_optimizer_and_scheduler(STEPS)
    batches = batches_in_order(trainer.train_dataset, 4, STEPS + 1)
    serial.step_by_step(make(trainer.args.rho), model, plain.optimizer, plain.lr_scheduler, batches)
    assert_equal(trainer.model, model)
    limit = "rst" if name in ("mesa", "saf") else "sam"  # what it is without its samples or loss
    other = trained(tmp_path, limit, "sam", variant_args={"p": 0.0} if limit == "rst" else {}, rho=trainer.args.rho)
    assert max((a - b).abs().max() for a, b in zip(other.model.parameters(), model.parameters(), strict=True)) > 1e-4


PARALLEL = {
    "Functional SAM": ("functional_sam", {}, serial.functional_sam_parallel, ()),
    "BiSAM": ("bisam", {}, serial.bisam_parallel, ()),
    "BiSAM, own loss in the mix": ("bisam", {"mix": "own"}, serial.bisam_parallel_own, ()),
    "mSAM": ("msam", {"size": 3}, serial.msam_parallel, (3,)),
}


# Of whose step a draw, a schedule or a case of SAMPa is what is new; its part has tests of its own, or lambda has.
BY_THEIR_PARTS = {
    *("sampa_0", "optgd", "adasam", "randsam", "rst", "vsam", "arsam", "ausam"),
    *("ssam_d", "ssam_f", "esam_swp", "slsam"),
    "precond_sam",  # of Adam's state: below
    *("flat_lora", "bi_lora"),  # of models with adapters: test_adapters.py
}


def test_no_variant_goes_without():
    """A new one needs its formula in one of these, or a reason."""
    in_series = {name for name, *_ in BY_STEP.values()}
    assert RULES.keys() | in_series | BY_THEIR_PARTS == VARIANTS.keys()
    assert not BY_THEIR_PARTS & (RULES.keys() | in_series)


@pytest.mark.parametrize("case", PARALLEL)
def test_a_variant_of_samples_or_losses_in_parallel(tmp_path, case):
    name, arguments, reference, more = PARALLEL[case]
    trainer = trained(tmp_path, name, "sampa", variant_args=arguments)
    model, args = Net(), trainer.args
    plain = Trainer(model=model, args=args, train_dataset=trainer.train_dataset)
    plain.create_optimizer_and_scheduler(STEPS)
    batches = batches_in_order(trainer.train_dataset, 4, STEPS + 1)
    reference(loss, args.rho, args.lmbda, *more, model, plain.optimizer, plain.lr_scheduler, batches)
    assert_equal(trainer.model, model)


@pytest.mark.parametrize("name", [name for name, each in VARIANTS.items() if "sampa" in each.timings])
def test_a_look_at_the_look_ahead_s_error_leaves_nothing(tmp_path, name):
    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            looks.append(trainer.lookahead_error())

    found, looks = [], []
    for callbacks in ([], [Look()]):
        args = tiny.arguments(tmp_path, variant=name, method="sampa", max_steps=5, learning_rate=1e-2)
        trainer = SAMPaTrainer(model=Net(), args=args, train_dataset=tiny.images(18), callbacks=callbacks)
        trainer.train()
        found.append(trainer.model.state_dict())
    assert len(looks) == 5
    assert tiny.differing(*found) == []


@pytest.mark.parametrize("method", ["sam", "sampa"])
def test_adasam_is_sam_around_torch_amsgrad(tmp_path, method):
    settings = {"optim": "adamw_torch", "optim_args": None, "learning_rate": 1e-2, "adam_beta2": 0.5}
    trainer = trained(tmp_path, "adasam", method, **settings)

    def with_amsgrad(rule, model, optimizer):
        for group in optimizer.param_groups:
            group["amsgrad"] = True

    model, _ = in_series(trainer, serial.SAM, with_amsgrad)
    assert_equal(trainer.model, model, rtol=2e-3, atol=2e-5)
    other = trained(tmp_path, "sam", method, **settings)
    assert max((a - b).abs().max() for a, b in zip(other.model.parameters(), model.parameters(), strict=True)) > 1e-4
    assert all("max_exp_avg_sq" in state for state in trainer.optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("method", ["sam", "sampa"])
def test_precond_sam_goes_by_the_optimizer_s_second_moments(tmp_path, method):
    settings = {"optim": "adamw_torch", "optim_args": None, "learning_rate": 1e-2, "adam_beta2": 0.9}
    trainer = trained(tmp_path, "precond_sam", method, rho=0.5, **settings)

    def with_state(rule, model, optimizer):
        rule.optimizer, rule.params = optimizer, list(model.parameters())

    model, _ = in_series(trainer, serial.PrecondSAM, with_state)
    assert_equal(trainer.model, model, rtol=2e-3, atol=2e-5)
    other = trained(tmp_path, "sam", method, rho=0.5, **settings)
    assert max((a - b).abs().max() for a, b in zip(other.model.parameters(), model.parameters(), strict=True)) > 1e-3


def test_precond_sam_needs_adam_s_state(tmp_path):
    with pytest.raises(
        ValueError, match="option betas, eps for variant 'precond_sam', got SGD. Set optim='adamw_torch'"
    ):
        trained(tmp_path, "precond_sam", "sam")
    adam = {"optim": "adamw_torch", "optim_args": None}
    with pytest.raises(
        ValueError, match="shard_optimizer: expected a variant that does not read the optimizer's state"
    ):
        trained(tmp_path, "precond_sam", "sampa", shard_optimizer=True, **adam)


def test_precond_sam_tells_an_optimizer_whose_second_moments_it_does_not_know(tmp_path):
    class Other(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for state in self.state.values():
                state["second"] = state.pop("exp_avg_sq")

    args = tiny.arguments(tmp_path, variant="precond_sam", max_steps=3)
    model = Net()
    optimizers = (Other(model.parameters()), None)
    trainer = SAMPaTrainer(model=model, args=args, train_dataset=tiny.images(18), optimizers=optimizers)
    with pytest.raises(ValueError, match="Adam's second moments, under torch's name exp_avg_sq, got Other"):
        trainer.train()


def test_functional_sam_needs_a_loss_that_is_made_of_the_logits(tmp_path):
    class Apart(Net):
        def forward(self, pixel_values, labels=None):
            found = super().forward(pixel_values, labels)
            return SequenceClassifierOutput(found.loss, found.logits.detach())

    with pytest.raises(ValueError, match="expected a loss that is made of the logits that the model returns"):
        trained(tmp_path, "functional_sam", "sam", model=Apart)


@pytest.mark.parametrize(("bf16", "largest"), [(False, 1e-5), (True, 2e-2)])
def test_functional_sam_goes_with_logits_of_every_token(tmp_path, bf16, largest):
    """And at radius 0 it is the base optimizer, to the rounding of the precision; the difference is by how far the weights went."""
    settings = {"max_steps": 4, "bf16": bf16, "optim": "sgd", "learning_rate": 0.1, "method": "sam"}
    found, start = {}, torch.nn.utils.parameters_to_vector(tiny.token_bert().parameters())
    for name, own in {"functional_sam": {"rho": 0.0}, "rst": {"variant_args": {"p": 0.0}}}.items():
        args = tiny.arguments(tmp_path, variant=name, **settings, **own)
        trainer = SAMPaTrainer(model=tiny.token_bert(), args=args, train_dataset=tiny.tagged_sentences(16))
        trainer.train()
        found[name] = torch.nn.utils.parameters_to_vector(trainer.model.parameters())
    difference = (found["functional_sam"] - found["rst"]).norm() / (found["rst"] - start).norm()
    assert difference < largest


class Tuples(Net):
    """Gives the loss, if it was given labels, the logits and what comes before them, as a dict or a tuple."""

    def __init__(self, as_dict: bool, penalty: float = 0.0):
        super().__init__()
        self.as_dict, self.penalty, self.config = as_dict, penalty, PreTrainedConfig()

    def forward(self, pixel_values, labels=None):
        hidden = nn.functional.gelu(self.LayerNorm(self.first(pixel_values.flatten(1))))
        found = {"logits": self.second(hidden), "hidden": hidden}
        if labels is not None:
            own = nn.functional.cross_entropy(found["logits"], labels) + self.penalty * hidden.square().mean()
            found = {"loss": own, **found}
        return found if self.as_dict else tuple(found.values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["functional_sam", "bisam"])
def test_logits_of_a_tuple_are_those_of_a_dict(tmp_path, name, smoothing):
    """Without labels, which label smoothing takes away, it does not begin with the loss."""
    models = [
        trained(tmp_path, name, "sam", model=lambda d=as_dict: Tuples(d), label_smoothing_factor=smoothing).model
        for as_dict in (True, False)
    ]
    assert tiny.differing(*(model.state_dict() for model in models)) == []


def test_functional_sam_keeps_what_of_a_loss_is_not_made_of_the_logits(tmp_path):
    """At radius 0 it is the base optimizer."""
    runs = [
        trained(tmp_path, name, "sam", model=lambda: Tuples(True, penalty=3.0), **own)
        for name, own in {"functional_sam": {"rho": 0.0}, "rst": {"variant_args": {"p": 0.0}}}.items()
    ]
    assert_equal(runs[0].model, runs[1].model, rtol=1e-5, atol=1e-7)


class WithATerm(SAMPaTrainer):
    """Above the mixin."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return loss + outputs["logits"].square().mean()


class Twice(SAMPaTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, **kwargs) + super().compute_loss(model, inputs, **kwargs)


class OfOutputs(SAMPaTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return nn.functional.cross_entropy(outputs["logits"], inputs["labels"])


def test_a_term_that_a_trainer_adds_has_its_own_gradient(tmp_path):
    """At a tiny radius functional_sam is SAM."""
    found = []
    for variant in ("functional_sam", "sam"):
        args = tiny.arguments(
            tmp_path, variant=variant, method="sam", rho=1e-6, max_steps=4, optim="sgd", learning_rate=0.1
        )
        trainer = WithATerm(model=Net(), args=args, train_dataset=tiny.images(18))
        trainer.train()
        found.append(trainer.model)
    assert_equal(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "model", "words"),
    [
        (Twice, Net, r"expected one call of super\(\)\.compute_loss\(\) in a pass"),
        (OfOutputs, Net, "got one that is made of the outputs alone"),
        (SAMPaTrainer, lambda: TwoLogits(), "or several tensors that might be logits"),
    ],
)
def test_functional_sam_refuses_what_it_cannot_follow(tmp_path, kind, model, words):
    args = tiny.arguments(tmp_path, variant="functional_sam", max_steps=2)
    with pytest.raises(ValueError, match=words):
        kind(model=model(), args=args, train_dataset=tiny.images(18)).train()


class TwoLogits(Net):
    """As for the start and the end of an answer, in a tuple."""

    def forward(self, pixel_values, labels=None):
        found = super().forward(pixel_values, labels)
        other = found.logits * 2
        return found.loss + nn.functional.cross_entropy(other, labels), found.logits, other


def run_with_some_labels(folder):
    """Of some micro-batches no label counts."""
    data = tiny.tagged_sentences(24)
    for i in (4, 5, 6, 7, 12, 13, 14, 15):
        data[i] = {**data[i], "labels": torch.full((8,), -100)}
    settings = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", "max_steps": 4}
    saves = {"save_strategy": "steps", "save_steps": 1}
    return tiny.run(folder, tiny.token_bert(), data, variant="functional_sam", **settings, **saves)


def test_functional_sam_without_a_label_in_a_micro_batch(tmp_path):
    one = tiny.comparable(run_with_some_labels(tmp_path / "one"))
    for found in run_ranks(run_with_some_labels, 2, tmp_path / "two", folder=tmp_path):
        assert tiny.differing(tiny.comparable(found), one) == []


class Below(Trainer):
    """Takes what it does not name, as most users' trainers do."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        assert "kwargs" not in kwargs
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)


class NamesNothing(Trainer):
    def compute_loss(self, *args, **kwargs):
        assert "args" not in kwargs and "kwargs" not in kwargs
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("below", [Below, NamesNothing])
@pytest.mark.parametrize("name", ["functional_sam", "bisam"])
def test_a_compute_loss_below_takes_what_it_likes(tmp_path, name, below):
    class Mine(SAMPaMixin, below): ...

    args = tiny.arguments(tmp_path, variant=name, max_steps=3)
    found = []
    for kind in (Mine, SAMPaTrainer):
        trainer = kind(model=Net(), args=args, train_dataset=tiny.images(18))
        trainer.train()
        found.append(trainer.model.state_dict())
    assert tiny.differing(*found) == []


def test_adasam_needs_an_optimizer_with_amsgrad(tmp_path):
    with pytest.raises(ValueError, match="option amsgrad for variant 'adasam', got SGD. Set optim='adamw_torch'"):
        trained(tmp_path, "adasam", "sam")


def passes(folder, name, arguments, method="sam"):
    """Samples of each forward pass of a run, with a backward and without, and the steps that ascended."""
    args = tiny.arguments(folder, variant=name, variant_args=arguments, method=method, max_steps=STEPS)
    trainer = SAMPaTrainer(model=Net(), args=args, train_dataset=tiny.images(16))
    seen: dict[bool, list[int]] = {True: [], False: []}
    trainer.model.register_forward_pre_hook(
        lambda model, _, kwargs: seen[torch.is_grad_enabled()].append(len(kwargs["labels"])), with_kwargs=True
    )
    trainer.train()
    del seen[True][: tiny.REHEARSED]
    ascended = sum("perturbed_loss" in line for line in trainer.state.log_history)
    return seen[True], seen[False], ascended


PASSES = {  # with backward: how many, of how many samples; without
    "sam": ({}, [4, 4] * STEPS, []),
    "optsam": ({}, [4] * STEPS, []),
    "momentum_sam": ({}, [4] * STEPS, []),
    "functional_sam": ({}, [4, 4] * STEPS, []),
    "randsam": ({}, [4] * STEPS, []),
    "looksam": ({"k": 3}, [4] * (STEPS + 3), []),
    "rst": ({"p": 0.0}, [4] * STEPS, []),
    "ksam": ({"k": 3}, [3, 3] * STEPS, [4] * STEPS),
    "esam": ({"beta": 0.5, "gamma": 0.5}, [4, 2] * STEPS, [4] * STEPS),
    "msam": ({"size": 2}, [2] * 4 * STEPS, []),
    "saf": ({}, [4] * STEPS, []),
    "mesa": ({}, [4] * STEPS, [4] * STEPS),
    "ssam_f": ({"every": 5, "fisher_samples": 2}, [1, 1] * 2 + [4, 4] * STEPS, []),
}


@pytest.mark.parametrize("name", PASSES)
def test_passes_are_as_many_as_the_catalogue_says(tmp_path, name):
    arguments, forward_and_backward, forward = PASSES[name]
    with_backward, without, _ = passes(tmp_path, name, arguments)
    assert sorted(with_backward) == sorted(forward_and_backward)
    assert without == forward


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("aesam", {}),
        ("rst", {"p": 0.5}),
        ("vsam", {"window": 5, "start": 2.0, "warmup": 0.0}),
        ("arsam", {"sampler": "bernoulli"}),
    ],
)
def test_a_step_that_does_not_ascend_has_one_pass(tmp_path, name, arguments):
    with_backward, without, ascended = passes(tmp_path, name, arguments)
    assert 0 < ascended < STEPS
    assert with_backward == [4] * (STEPS + ascended)
    assert without == []


def test_bisam_has_a_third_pass_for_its_own_loss_in_the_mix(tmp_path):
    one, _, _ = passes(tmp_path, "bisam", {}, "sampa")
    two, _, _ = passes(tmp_path, "bisam", {"mix": "own"}, "sampa")
    assert (len(one), len(two)) == (2 * STEPS + 1, 3 * STEPS + 2)


class WholeBackward(SAMPaTrainer):
    """As with a compiled model."""

    def _prepare_for_training(self, *args):
        prepared = super()._prepare_for_training(*args)
        self.sampa.partial_backward = False
        return prepared


@pytest.mark.parametrize("name", ["esam_swp", "slsam", "sam_on"])
def test_a_backward_that_leaves_nothing_out_has_the_same_bits(tmp_path, name):
    outcomes = [
        tiny.run(
            tmp_path,
            Net,
            tiny.images(18),
            trainer_class=trainer_class,
            variant=name,
            method="sam",
            gradient_accumulation_steps=2,
        )
        for trainer_class in (SAMPaTrainer, WholeBackward)
    ]
    assert tiny.differing(*outcomes) == []


class Alternating(When):
    """Ascends in every other step, and keeps what it is asked and shown."""

    def __init__(self):
        self.asked, self.seen = [], []

    def __call__(self, now, norm):
        self.asked.append(now)
        return now.step % 2 == 0

    def observe(self, g, g_tilde, now):
        self.seen.append((now.step, global_norm(g_tilde).item()))


def test_a_schedule_knows_where_the_run_is_and_sees_the_gradients_of_steps_that_ascended(tmp_path):
    args = tiny.arguments(tmp_path, method="sam", max_steps=4, max_grad_norm=0.0, seed=7, learning_rate=0.02)
    trainer = SAMPaTrainer(model=Net(), args=args, train_dataset=tiny.images(8), recipe=Recipe(when=Alternating()))
    trainer.train()
    when = trainer.sampa.recipe.when
    assert when.asked == [Moment(t, t // 2, 4, 8, (4 - t) / 4, seed=7) for t in range(4)]
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert when.seen == [(t, pytest.approx(norms[t], rel=1e-5)) for t in (0, 2)]


def test_sl_sam_leaves_the_same_tensors_out_of_all_of_a_step(tmp_path):
    """Momentum and weight decay of a tensor rest with it; how its probabilities follow the norms is a test of the part."""
    arguments = {"s": 0.7, "a": 3.0}
    trainer = trained(
        tmp_path, "slsam", "sam", tiny.bert, tiny.sentences(18), rho=0.05, variant_args=arguments, weight_decay=0.1
    )
    model = tiny.bert()  # of so many tensors that no two steps draw the same ones
    plain = Trainer(model=model, args=trainer.args, train_dataset=trainer.train_dataset)
    plain.create_optimizer_and_scheduler(STEPS)
    params, mask, sets = list(model.parameters()), ImportantTensors(**arguments), []
    mask.bind(model, [], params)

    def choose(t, g):
        now = Moment(step=t, seed=trainer.args.seed)
        sets.append(mask.keeps(now))
        parts = serial.cut(g, params)
        mask.observe([g * kept for g, kept in zip(parts, sets[-1], strict=True)], now)
        return sets[-1]

    batches = batches_in_order(trainer.train_dataset, 4, STEPS)
    serial.some_tensors(0.05, model, plain.optimizer, plain.lr_scheduler, loss, batches, choose)
    assert_equal(trainer.model, model, start=tiny.bert)
    probabilities = trainer.sampa.recipe.mask.p
    torch.testing.assert_close(probabilities, mask.p, rtol=1e-3, atol=1e-6)
    assert probabilities.min() < 0.6 and probabilities.max() > 0.8 and len(set(map(tuple, sets))) == STEPS

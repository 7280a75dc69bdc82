"""Every optimizer that is at hand under SAMPa: as plain Trainer has it at rho = lmbda = 0, and the same on one process as on two.

Or refused, in words, before the first step is through. What plain Trainer cannot use, SAMPa cannot either, and says the same.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
import pytorch_optimizer
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.training_args import OptimizerNames

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from tests.division import divided
from tests.ranks import RankFailed, run_ranks


STEPS = 6


class Model(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x, labels):
        logits = self.second(torch.tanh(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def dataset():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator), "labels": i % 2} for i in range(4 * (STEPS + 1))]


def falling(step):
    return 1 - step / (2 * STEPS)


# ---- What there is ----


def matrices(model):
    """The weights that some optimizers are for; the others are frozen."""
    for param in model.parameters():
        param.requires_grad_(param.ndim == 2)
    return [param for param in model.parameters() if param.ndim == 2]


def of_torch(name, options):
    """A torch optimizer; a learning rate that is a tensor has to be made anew for each."""

    def make(model):
        own = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        params = matrices(model) if name == "Muon" else model.parameters()
        return getattr(torch.optim, name)(params, **{"lr": 0.01, **own})

    return make


VARIANTS = {
    "": {},
    "foreach": {"foreach": True},
    "not foreach": {"foreach": False},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "differentiable": {"differentiable": True},
    "maximize": {"maximize": True},
    "amsgrad": {"amsgrad": True},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "weight decay": {"weight_decay": 0.1},
    "tensor lr": {"lr": torch.tensor(0.01), "foreach": False},
}


def torch_optimizers():
    """All of torch.optim, with every option that changes how a step goes."""
    found = {}
    for name, kind in vars(torch.optim).items():
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)) or kind is Optimizer:
            continue
        known = inspect.signature(kind).parameters
        for variant, options in VARIANTS.items():
            if options.keys() <= known.keys():
                found[f"torch {name} {variant}".strip()] = of_torch(name, options)
    return found


def of_library(name, **options):
    """An optimizer of pytorch_optimizer, by its own factory."""

    def make(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytorch_optimizer.create_optimizer(model, name, lr=0.01, weight_decay=0.01, **options)

    return make


def wrapped(wrapper, inner, inner_options=None, **options):
    return lambda model: wrapper(inner(model.parameters(), lr=0.01, **(inner_options or {})), **options)


def only_matrices(name):
    return lambda model: pytorch_optimizer.load_optimizer(name)(matrices(model), lr=0.01)


LIBRARY = {
    name: of_library(name, **{"ranger21": {"num_iterations": STEPS}, "bsam": {"num_data": 28}}.get(name, {}))
    for name in pytorch_optimizer.get_supported_optimizers()
}
# Those that need parameters of some shape, or in one group.
LIBRARY["spectralsphere"] = only_matrices("spectralsphere")
LIBRARY["lorarite"] = only_matrices("lorarite")
LIBRARY["lbfgs"] = only_matrices("lbfgs")
WRAPPERS = {
    "Lookahead": of_library("adabelief", use_lookahead=True, k=2),
    "Lookahead with pullback": wrapped(
        pytorch_optimizer.Lookahead, SGD, {"momentum": 0.9}, k=2, pullback_momentum="pullback"
    ),
    "OrthoGrad": of_library("adabelief", use_orthograd=True),
    "ScheduleFreeWrapper": wrapped(pytorch_optimizer.ScheduleFreeWrapper, torch.optim.RMSprop),
    "TRAC": wrapped(pytorch_optimizer.TRAC, torch.optim.AdamW),
}
OPTIMIZERS = {**torch_optimizers(), **LIBRARY, **WRAPPERS}

# What plain Trainer does not train with, and what it says then.
REFUSED_BY_TRAINER = {
    **{name: "capturable=True" for name in OPTIMIZERS if name.endswith(" capturable")},
    **{name: "a leaf Variable that requires grad" for name in OPTIMIZERS if name.endswith(" differentiable")},
    **{name: "does not support dense gradients" for name in OPTIMIZERS if name.startswith("torch SparseAdam")},
    **dict.fromkeys(["torch LBFGS", "lbfgs"], "object is not callable"),  # the closure
    "bsam": "requires closure",
    **dict.fromkeys(["a2grad", "alig"], "'lr'"),  # which schedulers expect in a group
    **dict.fromkeys(["adahessian", "sophiah"], "does not have a grad_fn"),  # they need a gradient with a graph
    "demo": "einops",
    "distributedmuon": "use_muon",
}
IN_BACKWARD = ("lomo", "adalomo")  # is where they step
TRAINABLE = [name for name in OPTIMIZERS if name not in REFUSED_BY_TRAINER and name not in IN_BACKWARD]
# Those of the library that are of a kind of their own: they read the weights, set them back or average them, count by
# themselves, draw numbers, want another order of things, or replace the gradient. All others wait for ``make test-all``.
KINDS = {
    *("adamp", "adammini", "bcos", "dadaptadam", "emonavi", "fromage", "galore", "kron", "lion", "lorarite", "muon"),
    *("prodigy", "ranger21", "scalableshampoo", "schedulefreeadamw", "sgdsai", "soap", "spam", "swats", "vsgd"),
}
# Of torch's options those of three stand for all.
OPTIONS = {name for name in OPTIMIZERS if name.startswith("torch ") and len(name.split()) > 2}
SWEEP = set(LIBRARY) - KINDS | {name for name in OPTIONS if name.split()[1] not in ("Adam", "SGD", "RMSprop")}
every_trainable = pytest.mark.parametrize("name", divided(TRAINABLE, SWEEP & set(TRAINABLE)))


# ---- Running them ----


def train(folder, make=None, trainer_class=SAMPaTrainer, **settings):
    """Weights after a run with what `make` makes of the model, or with `optim` among the settings."""
    args = (TrainingArguments if trainer_class is Trainer else SAMPaTrainingArguments)(
        str(folder),
        max_steps=STEPS,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        per_device_train_batch_size=4,
        learning_rate=0.01,
        **settings,
    )
    set_seed(0)
    model = Model()
    optimizer = make(model) if make else None
    schedule = LambdaLR(optimizer, falling) if make else None
    trainer = trainer_class(model, args, train_dataset=dataset(), optimizers=(optimizer, schedule))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [param.detach().clone() for param in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- At rho = lmbda = 0 it is plain Trainer ----


@every_trainable
def test_without_perturbation_it_goes_where_plain_trainer_goes(name, tmp_path):
    plain = train(tmp_path, OPTIMIZERS[name], Trainer)
    assert same(train(tmp_path, OPTIMIZERS[name], rho=0.0, lmbda=0.0), plain)
    assert not same(plain, Model().parameters())


@pytest.mark.parametrize("name", REFUSED_BY_TRAINER)
def test_what_plain_trainer_refuses_is_refused_in_the_same_words(name, tmp_path):
    with pytest.raises(Exception, match=REFUSED_BY_TRAINER[name]) as plain:
        train(tmp_path, OPTIMIZERS[name], Trainer)
    with pytest.raises(plain.type) as own:
        train(tmp_path, OPTIMIZERS[name], rho=0.0, lmbda=0.0)
    assert str(own.value) == str(plain.value)


def by_name(name):
    """Settings by which Trainer makes an optimizer itself."""
    return {"optim": name, "optim_target_modules": ["first", "second"], "optim_args": "rank=2,update_proj_gap=2"}


def test_every_optim_that_is_installed_goes_where_it_goes_under_plain_trainer(tmp_path):
    tried, differing = [], []
    for name in (each.value for each in OptimizerNames):
        if "lomo" in name or name.endswith("_layerwise"):
            continue  # refused by the arguments
        try:
            plain = train(tmp_path, trainer_class=Trainer, **by_name(name))
        except (ImportError, ValueError) as error:
            assert "install" in str(error) or "import" in str(error)
            continue
        tried.append(name)
        if not same(train(tmp_path, rho=0.0, lmbda=0.0, **by_name(name)), plain):
            differing.append(name)
    assert differing == []
    assert {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "grokadamw"} <= set(tried)


class Remembering(SGD):
    """Steps along the last gradient but one, which it keeps as it was given it."""

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                before = state.get("kept", torch.zeros_like(param))
                state["kept"] = param.grad
                param.grad = before
        return super().step(closure)


class Deep(Model):
    """Of so many small weights that several of them share a bucket of gradients."""

    def __init__(self):
        super().__init__()
        self.norms = nn.Sequential(*(nn.LayerNorm(6) for _ in range(20)))

    def forward(self, x, labels):
        return super().forward(self.norms(x), labels)


@pytest.mark.parametrize("variant", ["sam", "msam"])
@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_a_gradient_that_the_optimizer_keeps_stays_what_it_was(method, variant, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Model", Deep)

    def make(model):
        return Remembering(model.parameters(), lr=0.1)

    settings = {"method": method, "variant": variant, "rho": 0.0, "lmbda": 0.0}
    assert same(train(tmp_path, make, **settings), train(tmp_path, make, Trainer))


# ---- One process is two processes ----


BY_NAME = ("adafactor", "grokadamw")


def train_with_each(folder, names):
    """Weights of a run of SAMPa with every optimizer, on however many processes this is."""
    runs = {name: by_name(name[3:]) if name.startswith("by ") else {"make": OPTIMIZERS[name]} for name in names}
    return {name: train(folder, rho=0.05, lmbda=0.5, **settings) for name, settings in runs.items()}


@pytest.fixture(scope="module")
def with_each(chosen, tmp_path_factory):
    """Outcomes of `train_with_each` on one process and on the two of a pair."""
    folder, names = tmp_path_factory.mktemp("each"), chosen("on_two")
    one, two = (run_ranks(train_with_each, n, folder, names, folder=folder / str(n)) for n in (1, 2))
    return [*one, *two]


ON_TWO = [name for name in TRAINABLE if name not in OPTIONS]  # which lead through the same code here
ON_TWO += [f"by {name}" for name in BY_NAME]


@pytest.mark.distributed
@pytest.mark.parametrize("on_two", divided(ON_TWO, SWEEP.intersection(ON_TWO)))
def test_one_process_is_two_processes_with_each_of_them(with_each, on_two):
    one, perturbed, lookahead = (of_rank[on_two] for of_rank in with_each)
    assert same(perturbed, lookahead) and same(one, lookahead)


# ---- What looking ahead cannot undo, or cannot do alone ----


@pytest.mark.parametrize("method", ["sampa", "sam"])
@pytest.mark.parametrize("name", IN_BACKWARD)
def test_an_optimizer_that_steps_in_backward_is_refused_before_the_first_one(name, method, tmp_path):
    with pytest.raises(
        ValueError, match="whose step comes after backward, got pytorch_optimizer.*LOMO, which updates"
    ):
        train(tmp_path, OPTIMIZERS[name], method=method)


class OfTheModule(SGD):
    """Keeps its momentum where nobody finds it."""

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    before = _momenta.get(param, torch.zeros_like(param))
                    _momenta[param] = param.grad = 0.9 * before + param.grad
        return super().step(closure)


_momenta = {}


class Averaging(SGD):
    """Averages gradients over processes in its step."""

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if dist.is_initialized():
                    dist.all_reduce(param.grad)
                    param.grad /= dist.get_world_size()
        return super().step(closure)


def test_an_optimizer_with_state_out_of_sight_is_refused_in_the_first_step(tmp_path):
    def make(model):
        return OfTheModule(model.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="whose step can be undone.*test_optimizers.OfTheModule.*method='sam'"):
        train(tmp_path, make)
    train(tmp_path, make, method="sam")


def train_averaging(folder, method="sampa"):
    return train(folder, lambda model: Averaging(model.parameters(), lr=0.1), method=method)


@pytest.mark.distributed
def test_an_optimizer_that_speaks_to_other_processes_is_refused_in_the_first_step(tmp_path):
    with pytest.raises(RankFailed, match=r"steps on its own.*test_optimizers.Averaging.*c10d.*method='sam'"):
        run_ranks(train_averaging, 2, tmp_path, folder=tmp_path / "sampa", timeout=60)
    weights = run_ranks(train_averaging, 2, tmp_path, "sam", folder=tmp_path / "sam")
    assert same(*weights)

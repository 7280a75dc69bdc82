"""The look-ahead against torch's own optimizers on a copy."""

from __future__ import annotations

import copy
import random
from types import MethodType

import lookahead_cost
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_sampa.engine import lookahead
from hf_sampa.engine.lookahead import PIECEWISE, look_ahead
from tests import tiny


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "sgd maximize": (torch.optim.SGD, {"lr": 0.1, "maximize": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "adamw fused": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "adamw tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(0.01)}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
}
STEPPED = {"adamw tensor lr", "radam", "adafactor"}  # by themselves, and put back; the others go in pieces


def setup(name):
    """Weights in two groups with options of their own; the last parameter never gets a gradient."""
    optimizer_class, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": options["lr"] * 3, "weight_decay": 0.0}]
    return params, optimizer_class(groups, **options)


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params[:2]:
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("piece", [4, 2**18])
@pytest.mark.parametrize("steps_before", [0, 1, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_goes_where_the_optimizer_would_and_leaves_it_alone(name, steps_before, piece, in_place, monkeypatch):
    monkeypatch.setattr(lookahead, "CPU_PIECE", piece)
    if name not in STEPPED:
        monkeypatch.setattr(lookahead, "step_and_undo", None)
    params, optimizer = setup(name)
    for step in range(steps_before):
        set_grads(params, step)
        optimizer.step()
    set_grads(params, 100)
    expected_params, expected_optimizer = copy.deepcopy((params, optimizer))
    for param, copied in zip(params, expected_params, strict=True):
        copied.grad = None if param.grad is None else param.grad.clone()
    before = copy.deepcopy(optimizer.state_dict())
    start = [p.detach().clone() for p in params]

    grads = [None if p.grad is None else p.grad.clone() for p in params]
    out = [torch.empty_like(p) if g is None or not in_place else g for p, g in zip(params, grads, strict=True)]
    look_ahead(optimizer, params, grads, out=out)
    expected_optimizer.step()

    for found, expected in zip(out, expected_params, strict=True):
        torch.testing.assert_close(found, expected.detach())
    assert not torch.equal(out[0], start[0])
    assert tiny.differing([p.detach() for p in params], start) == []
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)

    # and the real step is the one it would have been
    set_grads(params, 100)
    optimizer.step()
    for param, expected in zip(params, expected_params, strict=True):
        assert torch.equal(param, expected)


LAYOUTS = {
    "transposed": lambda: torch.randn(3, 7).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "not dense": lambda: torch.randn(6, 5)[:, :3],
    "one number": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "adamw fused"])
@pytest.mark.parametrize("loaded", [False, True])
def test_walks_through_any_layout_of_weights_and_moments(name, layout, loaded, monkeypatch):
    """In pieces smaller than the parameter; moments from a checkpoint may have lost the parameter's layout."""
    monkeypatch.setattr(lookahead, "CPU_PIECE", 4)
    torch.manual_seed(0)
    optimizer_class, options = OPTIMIZERS[name]
    param = nn.Parameter(LAYOUTS[layout]())
    optimizer = optimizer_class([param], **options)
    param.grad = torch.empty_like(param).copy_(torch.randn(param.shape))
    optimizer.step()
    if loaded:
        for key, value in optimizer.state[param].items():
            optimizer.state[param][key] = value.contiguous()

    grad = torch.empty_like(param).copy_(torch.randn(param.shape))
    out = torch.empty_like(param)
    look_ahead(optimizer, [param], [grad], out=[out])
    param.grad = grad
    optimizer.step()
    torch.testing.assert_close(out, param.detach())


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "radam"])
def test_clips_its_own_copy_and_takes_some_of_the_parameters(name):
    params, optimizer = setup(name)
    set_grads(params, 0)
    optimizer.step()
    expected_params, expected_optimizer = copy.deepcopy((params, optimizer))
    set_grads(params, 100)
    given = params[1].grad.clone()
    grads = [given.clone()]
    out = [torch.empty(5)]
    look_ahead(optimizer, params[1:2], grads, out=out, scale=0.25)
    assert torch.equal(grads[0], given)
    set_grads(expected_params, 100)
    expected_params[1].grad *= 0.25
    expected_optimizer.step()
    torch.testing.assert_close(out[0], expected_params[1].detach())


@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_small_parameters_are_stepped_together_and_alike_whoever_else_is_there(name):
    """As if by themselves but for roundings, and to the bit as where other buckets are another process's."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(1 + i % 7)) for i in range(300)]
    optimizer_class, options = OPTIMIZERS[name]
    optimizer = optimizer_class([{"params": params[::2]}, {"params": params[1::2], "lr": 0.2}], **options)
    for step in range(2):
        for i, param in enumerate(params):
            param.grad = torch.randn_like(param) if step or i % 5 else None  # counts differ
        optimizer.step()
    grads, buckets = [torch.randn_like(param) for param in params], [i // 10 % 3 for i in range(len(params))]

    def gone(chosen, **kwargs):
        out = [torch.empty_like(params[i]) for i in chosen]
        look_ahead(optimizer, [params[i] for i in chosen], [grads[i] for i in chosen], out=out, **kwargs)
        return out

    together = gone(range(len(params)), apart=buckets)
    torch.testing.assert_close(together, [gone([i])[0] for i in range(len(params))])
    for bucket in range(3):
        own = [i for i, each in enumerate(buckets) if each == bucket]
        found = gone(own, apart=[bucket] * len(own))
        assert tiny.differing(found, [together[i] for i in own]) == []


def test_a_parameter_that_the_optimizer_does_not_hold_stays():
    held, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    out = [torch.zeros(1), torch.zeros(1)]
    look_ahead(torch.optim.SGD([held], lr=0.1), [held, other], [torch.ones(1), torch.ones(1)], out=out)
    assert [value.item() for value in out] == pytest.approx([0.9, 1.0])


def test_pieces_take_no_step_and_subclasses_do(monkeypatch):
    class Doubled(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            super().step()

    assert Doubled not in PIECEWISE
    for optimizer_class, expected in ((torch.optim.SGD, 1.0 - 0.1), (Doubled, 1.0 - 0.2)):
        param = nn.Parameter(torch.ones(1))
        out = [torch.ones(1)]
        look_ahead(optimizer_class([param], lr=0.1), [param], out, out=out)
        assert out[0].item() == pytest.approx(expected)
        assert param.item() == 1.0


class Untidy(torch.optim.SGD):
    """Leaves something behind in every place there is."""

    fails = False

    def __init__(self, params, lr):
        super().__init__(params, lr=lr, momentum=0.9)
        self.count, self.history, self.inner = 0, [], torch.optim.RMSprop(self.param_groups[0]["params"], lr=lr)
        self.shared = torch.zeros(2)
        self.sums = {"one": self.shared, "other": [self.shared]}
        self.generator = torch.Generator().manual_seed(0)

    def step(self, closure=None):
        self.count += 1
        self.added = True
        self.shared += 1
        self.sums["other"].append(torch.ones(2))
        self.inner.step()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                self.history.append(param.grad)
                if param.grad is not None:
                    param.data = param.data + torch.rand(param.shape, generator=self.generator)
        torch.rand(1), np.random.rand(), random.random()
        super().step(closure)
        if self.fails:
            raise KeyError("at the end")


def all_of(optimizer, params):
    """Copies of everything that an `Untidy` holds, with where it is."""
    return {
        "attributes": sorted(vars(optimizer)),
        "count": (optimizer.count, list(optimizer.history)),
        "sums": [(id(each), each.clone()) for each in (optimizer.sums["one"], *optimizer.sums["other"])],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "inner": copy.deepcopy(optimizer.inner.state_dict()),
        "state": [
            {key: (id(value), value.clone()) for key, value in optimizer.state.get(param, {}).items()}
            for param in params
        ],
        "weights": [(param.data_ptr(), param.detach().clone(), param.grad) for param in params],
        "random": [optimizer.generator.get_state(), torch.get_rng_state(), list(random.getstate()[1])],
        "numpy": np.random.get_state()[1].tolist(),
    }


def untidy(steps):
    """One that has taken some steps, and its parameters."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    optimizer = Untidy(params, lr=0.1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    optimizer.zero_grad()
    return params, optimizer


@pytest.mark.parametrize("steps_before", [0, 2])
def test_nothing_is_left_behind_wherever_it_is(steps_before):
    params, optimizer = untidy(steps_before)
    before, out = all_of(optimizer, params), [torch.empty(3), torch.empty(2)]
    look_ahead(optimizer, params, [torch.ones(3), torch.ones(2)], out=out)
    assert tiny.differing(all_of(optimizer, params), before) == []
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert tiny.differing([param.detach() for param in params], out) == []


def test_nothing_is_left_behind_by_a_step_that_fails():
    params, optimizer = untidy(1)
    optimizer.fails = True
    before = all_of(optimizer, params)
    with pytest.raises(KeyError):
        look_ahead(optimizer, params, [torch.ones(3), torch.ones(2)], out=[torch.empty(3), torch.empty(2)])
    assert tiny.differing(all_of(optimizer, params), before) == []


def test_random_state_and_global_generators_survive_a_stochastic_optimizer():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            torch.randn(3)
            super().step()

    param = nn.Parameter(torch.ones(1))
    before = torch.get_rng_state()
    look_ahead(Noisy([param], lr=0.1), [param], [torch.ones(1)], out=[torch.empty(1)])
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_are_not_told_of_a_step_that_is_undone():
    param, seen = nn.Parameter(torch.ones(1)), []
    optimizer = torch.optim.RMSprop([param], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    look_ahead(optimizer, [param], [torch.ones(1)], out=[torch.empty(1)])
    assert seen == []
    param.grad = torch.ones(1)
    optimizer.step()
    assert seen == ["before", "after"]


def test_hooks_of_inner_optimizers_and_of_all_optimizers_are_not_told_either():
    class Wrapper(torch.optim.Optimizer):
        """As some wrap an optimizer: by leaving out the constructor of the class they are of."""

        def __init__(self, inner):
            self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

        def step(self, closure=None):
            return self.inner.step(closure)

    param, seen = nn.Parameter(torch.ones(1)), []
    inner = torch.optim.RMSprop([param], lr=0.1)
    inner.register_step_post_hook(lambda *_: seen.append("inner"))
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("all"))
    try:
        look_ahead(Wrapper(inner), [param], [torch.ones(1)], out=[torch.empty(1)])
        assert seen == []
        param.grad = torch.ones(1)
        inner.step()
    finally:
        handle.remove()
    assert seen == ["all", "inner"]


def test_what_an_optimizer_hooks_on_itself_is_part_of_its_step():
    class Halving(torch.optim.RMSprop):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.register_step_post_hook(self.halve)

        def halve(self, *_):
            for group in self.param_groups:
                torch._foreach_mul_([param.data for param in group["params"]], 0.5)

    param, out = nn.Parameter(torch.ones(1)), [torch.empty(1)]
    look_ahead(Halving([param]), [param], [torch.zeros(1)], out=out)
    assert out[0].item() == 0.5 and param.item() == 1.0


def test_what_a_wrapper_hooks_on_the_optimizer_within_is_part_of_its_step():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}
            inner.register_step_post_hook(self.halve)

        def halve(self, *_):
            for group in self.param_groups:
                torch._foreach_mul_([param.data for param in group["params"]], 0.5)

        def step(self, closure=None):
            return self.inner.step(closure)

    param, out = nn.Parameter(torch.ones(1)), [torch.empty(1)]
    look_ahead(Wrapper(torch.optim.RMSprop([param])), [param], [torch.zeros(1)], out=out)
    assert out[0].item() == 0.5 and param.item() == 1.0


def test_a_parameter_without_gradient_goes_where_the_optimizer_takes_it():
    """As weight decay of some does."""

    class Decaying(torch.optim.RMSprop):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                torch._foreach_mul_([param.data for param in group["params"]], 0.5)

    params, out = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))], [torch.empty(1), torch.empty(1)]
    look_ahead(Decaying(params, lr=0.1), params, [torch.zeros(1), None], out=out)
    assert [each.item() for each in out] == [0.5, 0.5] and [p.item() for p in params] == [1.0, 1.0]


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_step_that_was_replaced_is_taken_as_it_is(scheduled):
    param = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([param], lr=0.1)

    def far(self, closure=None):
        return [param.data.sub_(param.grad) for group in self.param_groups for param in group["params"]]

    optimizer.step = MethodType(far, optimizer)
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # wraps the step once more
    out = [torch.empty(1)]
    look_ahead(optimizer, [param], [torch.ones(1)], out=out)
    assert out[0].item() == 0.0 and param.item() == 1.0


def test_a_scheduled_optimizer_still_goes_in_pieces(monkeypatch):
    monkeypatch.setattr(lookahead, "step_and_undo", None)
    param, out = nn.Parameter(torch.ones(1)), [torch.empty(1)]
    optimizer = torch.optim.SGD([param], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    look_ahead(optimizer, [param], [torch.ones(1)], out=out)
    assert out[0].item() == pytest.approx(0.9)


def test_complex_weights():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    optimizer = torch.optim.Adagrad([param], lr=0.1)
    grad, out = torch.randn(3, dtype=torch.complex64), [torch.empty(3, dtype=torch.complex64)]
    look_ahead(optimizer, [param], [grad], out=out)
    param.grad = grad
    optimizer.step()
    assert torch.equal(out[0], param.detach())


# ---- Trials ----


def take_three(optimizer, param):
    """What three look-aheads on trial returned."""
    return [look_ahead(optimizer, [param], [torch.ones(2)], out=[torch.empty(2)], on_trial=True) for _ in range(3)]


def test_a_trial_that_moved_something_counts():
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.RMSprop([param], lr=0.0)
    assert take_three(optimizer, param) == [False] * 3
    optimizer.param_groups[0]["lr"] = 0.1
    assert take_three(optimizer, param) == [True] * 3
    assert param.tolist() == [1.0, 1.0] and not optimizer.state.get(param)
    assert take_three(torch.optim.AdamW([param], lr=0.1), param) == [False] * 3  # in pieces: nothing to try


def counting_in_a_closure(params):
    calls = []

    class Hidden(torch.optim.RMSprop):
        def step(self, closure=None):
            calls.append(1)
            self.param_groups[0]["lr"] = 0.1 * len(calls)
            return super().step(closure)

    return Hidden(params)


def drawing_from_elsewhere(params):
    generator = torch.Generator()

    class Noisy(torch.optim.RMSprop):
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad += torch.rand(param.shape, generator=generator)
            return super().step(closure)

    return Noisy(params)


@pytest.mark.parametrize("make", [counting_in_a_closure, drawing_from_elsewhere])
def test_a_trial_refuses_what_cannot_be_undone(make):
    param = nn.Parameter(torch.ones(2))
    optimizer = make([param])
    with pytest.raises(ValueError) as error:
        take_three(optimizer, param)
    name = f"tests.test_lookahead.{type(optimizer).__qualname__}"
    assert str(error.value) == (
        "optim: expected an optimizer whose step can be undone, which is how method='sampa' looks ahead, but two steps of "
        f"{name} from the same weights, gradients and state went to different places. It keeps something that is neither in "
        "the optimizer nor in what it holds (in a closure, a module's globals or compiled code), or is random in a way of its "
        "own. Use another optimizer, as optim='adamw_torch', or method='sam', whose steps are all real ones."
    )
    assert param.tolist() == [1.0, 1.0] and param.grad is None


def test_not_a_number_is_the_same_twice():
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.RMSprop([param])
    optimizer.param_groups[0]["lr"] = float("nan")
    assert take_three(optimizer, param) == [True] * 3


def test_the_benchmark_has_a_row_for_each_optimizer(capsys):
    lookahead_cost.main(["--steps", "1", "--only", "AdamW", "SOAP"])
    header, _, adamw, soap = capsys.readouterr().out.splitlines()
    assert header == "| optimizer | its step | look-ahead | of the step |"
    assert adamw.startswith("| AdamW | ") and soap.startswith("| SOAP | ") and float(soap.split("|")[4]) > 0

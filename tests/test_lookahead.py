"""The look-ahead against torch's own optimizers on a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_sampa import lookahead
from hf_sampa.lookahead import PIECEWISE, look_ahead
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

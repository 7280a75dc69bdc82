"""The look-ahead against torch's own optimizers on a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_sampa.lookahead import CLOSED_FORMS, look_ahead_


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


@pytest.mark.parametrize("steps_before", [0, 1, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_goes_where_the_optimizer_would_and_leaves_it_alone(name, steps_before):
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

    look_ahead_(optimizer)
    expected_optimizer.step()

    for param, expected in zip(params, expected_params, strict=True):
        torch.testing.assert_close(param, expected)
    assert not torch.equal(params[0], start[0])
    assert torch.equal(params[2], start[2])
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)

    # and the real step, from the same weights, is the one it would have been
    with torch.no_grad():
        for param, value in zip(params, start, strict=True):
            param.copy_(value)
    optimizer.step()
    for param, expected in zip(params, expected_params, strict=True):
        assert torch.equal(param, expected)


def test_closed_forms_take_no_step_and_subclasses_do(monkeypatch):
    class Doubled(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            super().step()

    assert Doubled not in CLOSED_FORMS
    for optimizer_class, expected in ((torch.optim.SGD, 1.0 - 0.1), (Doubled, 1.0 - 0.2)):
        param = nn.Parameter(torch.ones(1))
        param.grad = torch.ones(1)
        look_ahead_(optimizer_class([param], lr=0.1))
        assert param.item() == pytest.approx(expected)


def test_random_state_and_global_generators_survive_a_stochastic_optimizer():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            torch.randn(3)
            super().step()

    param = nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    before = torch.get_rng_state()
    look_ahead_(Noisy([param], lr=0.1))
    assert torch.equal(torch.get_rng_state(), before)

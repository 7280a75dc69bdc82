"""What is left of a displacement where mixed precision rounds the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_sampa.monitoring.rounding import Rounded, left_of_displacement


class Net(nn.Module):
    """Weights that are multiplied, and others that are not, or that do not train."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(4, 3), nn.LayerNorm(3)
        self.layer, self.frozen, self.position = nn.Linear(3, 2), nn.Linear(2, 2), nn.Parameter(torch.ones(2, 3))

    def forward(self, tokens):
        return self.frozen(self.layer(self.norm(self.embedding(tokens) + self.position)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_those_are_rounded_that_autocast_multiplies(dtype):
    model, tokens = Net(), torch.tensor([[0, 1], [2, 3]])
    names = [name for name, _ in model.named_parameters() if "frozen" not in name]
    params = [model.get_parameter(name) for name in names]
    with torch.no_grad():
        with torch.autocast("cpu", dtype), Rounded(params) as rounded:
            model(tokens)
        with Rounded(params) as none:
            model(tokens)
    assert {names[i]: to for i, to in rounded.to.items()} == {"layer.weight": dtype, "layer.bias": dtype}
    assert none.to == {}


class Wrapper(torch.Tensor):
    """A weight without memory of its own, as quantized ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(each.inner if isinstance(each, cls) else each for each in args), **(kwargs or {}))


def test_weights_without_memory_are_let_through():
    weight = torch.ones(3)
    with torch.no_grad(), Rounded([weight]) as rounded:
        assert Wrapper(torch.ones(3)).to(torch.bfloat16).dtype == weight.to(torch.bfloat16).dtype
    assert rounded.to == {0: torch.bfloat16}


def test_of_numbers_that_can_be_looked_at():
    """Bfloat16 has 7 bits after the first: above 1 its numbers are 1/128 apart."""
    apart = 2.0**-7
    x = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0])]
    to = [torch.bfloat16, torch.bfloat16]

    def left(first, second):
        return left_of_displacement(x, [x[0] + torch.tensor(first), x[1] + torch.tensor(second)], to)

    assert left([apart, 0.0, 0.0], [-apart]) == (1.0, pytest.approx(1.0))
    assert left([apart / 4, 0.0, 0.0], [0.0]) == (0.0, 0.0)
    assert left([0.0, 0.0, 0.0], [0.0]) == (0.0, 0.0)
    # Three quarters of the way are the whole, and a quarter is nothing.
    length, cosine = left([0.75 * apart, 0.25 * apart, 0.0], [0.0])
    whole = math.hypot(0.75, 0.25)
    assert (length, cosine) == pytest.approx((1 / whole, 0.75 / whole))


@pytest.mark.parametrize("part", [0.3, 0.03])
def test_far_below_the_distance_of_numbers_the_length_grows_and_along_the_displacement_stays(part):
    """A weight crosses the middle between two numbers with probability `part`, and then by a whole distance."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.5 * torch.rand(200_000, generator=generator)
    eps = torch.full_like(x, part * 2.0**-7)
    length, cosine = left_of_displacement([x], [x + eps], [torch.bfloat16])
    assert length * cosine == pytest.approx(1, abs=0.03)
    assert length == pytest.approx(part**-0.5, rel=0.02)

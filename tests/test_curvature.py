"""Hessian products and eigenvalues against the dense Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_sampa.monitoring.curvature import hessian_product, largest_eigenvalue


def symmetric(values: list[float]) -> torch.Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize(
    "values",
    [[5.0, 1.0, 0.5, 0.0], [3.0, -1.0, 0.5], [2.0, -7.0, 1.0, 0.1], [-1.0, -2.0, -4.0], [3.0, -3.0, 1.0], [0.0, 0.0]],
)
def test_the_largest_eigenvalue_also_where_a_negative_one_is_larger(values):
    matrix = symmetric(values)
    start = [torch.randn(1, dtype=torch.float64), torch.randn(len(values) - 1, dtype=torch.float64)]

    def product(vector):
        return list((matrix @ torch.cat(vector)).split([1, len(values) - 1]))

    assert largest_eigenvalue(product, start, 500, 1e-12) == pytest.approx(max(values), abs=1e-5)


def test_few_iterations_stop_early_and_are_near():
    matrix, products = symmetric([5.0, 1.0, 0.5, 0.0]), []

    def product(vector):
        products.append(vector)
        return [matrix @ vector[0]]

    assert largest_eigenvalue(product, [torch.ones(4, dtype=torch.float64)], 20, 0.01) == pytest.approx(5.0, rel=0.02)
    assert 2 <= len(products) < 20


@pytest.mark.parametrize("values", [[2.0, -2.0], [1.0, -1.05]])
def test_eigenvalues_of_opposite_sign_do_not_look_like_none(values):
    """As of a loss: a few large eigenvalues and many near zero, from a start that has little of the large ones."""
    matrix = torch.diag(torch.tensor([*values, *[0.01] * 1000], dtype=torch.float64))
    torch.manual_seed(0)
    start = torch.randn(len(matrix), dtype=torch.float64)
    found = largest_eigenvalue(lambda vector: [matrix @ vector[0]], [start])
    assert found == pytest.approx(max(values), rel=0.05)


def test_products_are_those_of_the_dense_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    inputs, labels = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    params = [*model.parameters(), unused]
    sizes = [param.numel() for param in params]

    def loss_of(flat, rows):
        parts = [part.view(param.shape) for part, param in zip(flat.split(sizes), params, strict=True)]
        named = dict(zip([name for name, _ in model.named_parameters()], parts[:-1], strict=True))
        logits = torch.func.functional_call(model, named, (inputs[rows],))
        return nn.functional.cross_entropy(logits, labels[rows]) / 2

    flat = torch.cat([param.detach().flatten() for param in params])
    halves = [slice(0, 4), slice(4, 8)]
    dense = sum(torch.autograd.functional.hessian(lambda f, r=rows: loss_of(f, r), flat) for rows in halves)
    losses = [nn.functional.cross_entropy(model(inputs[rows]), labels[rows]) / 2 for rows in halves]
    product = hessian_product(losses, params)
    vector = [torch.randn_like(param) for param in params]
    for _ in range(2):  # the graph is kept
        found = torch.cat([part.flatten() for part in product(vector)])
        expected = dense @ torch.cat([part.flatten() for part in vector])
        torch.testing.assert_close(found, expected)
    eigenvalue = largest_eigenvalue(product, [torch.randn_like(param) for param in params], 500, 1e-10)
    assert eigenvalue == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-4)

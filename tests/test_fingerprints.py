"""Fingerprints of batches and of weights: equal for equal content, different for one bit."""

from __future__ import annotations

import pytest
import torch

from hf_sampa.state.fingerprints import fingerprint, fingerprint_of_bits


def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((7, 5), (3,), (), (64, 32))]


def test_every_bit_of_the_weights_counts():
    expected = fingerprint_of_bits(weights())
    assert fingerprint_of_bits(weights()) == expected
    for i, tensor in enumerate(weights()):
        for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
            changed = weights()
            changed[i].view(-1).view(torch.int32)[place] ^= 1
            assert fingerprint_of_bits(changed) != expected


def test_order_and_place_count():
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert fingerprint_of_bits([one, other]) != fingerprint_of_bits([other, one])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.int64])
def test_tensors_of_any_type_and_layout(dtype):
    tensor = (torch.arange(35).view(5, 7) % 3).to(dtype)
    for laid_out in (tensor, tensor.T, tensor[:, 1:4], tensor[1:, :], tensor[0:0]):
        own = laid_out.clone()
        assert fingerprint_of_bits([laid_out]) == fingerprint_of_bits([laid_out])
        if own.numel() and own.is_contiguous():
            own.view(-1)[-1] = not own.view(-1)[-1] if dtype is torch.bool else own.view(-1)[-1] + 1
            assert fingerprint_of_bits([own]) != fingerprint_of_bits([laid_out])


class Holder:
    def __init__(self, value):
        self.value, self.itself = value, self


def test_batches_that_are_objects():
    one, same, other = (fingerprint([Holder(torch.tensor(value))]) for value in (1.0, 1.0, 2.0))
    assert one == same != other

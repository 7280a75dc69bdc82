"""Two parameters whose gradients autograd hands out in one piece of memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import Trainer

from hf_sampa import SAMPaTrainer
from tests import reference, tiny


class SumOfWeights(nn.Module):
    """Backward gives `left` and `right` views of one tensor, see `test_autograd_shares`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (nn.Parameter(torch.randn(64, 3) / 8) for _ in range(2))

    def forward(self, pixel_values, labels=None):
        weight = (self.left.view(-1) + self.right.view(-1)).view(64, 3)
        logits = pixel_values.flatten(1) @ weight
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_autograd_shares():
    model = SumOfWeights()
    model(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))["loss"].backward()
    assert model.left.grad.data_ptr() == model.right.grad.data_ptr()


@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_gradients_in_one_piece_of_memory(tmp_path, method):
    dataset, steps = tiny.images(16), 5
    args = tiny.arguments(
        tmp_path,
        method=method,
        max_grad_norm=0.1,
        max_steps=steps,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
    )
    trainer = SAMPaTrainer(model=SumOfWeights(), args=args, train_dataset=dataset)
    trainer.train()
    expected = SumOfWeights()
    plain = Trainer(model=expected, args=args, train_dataset=dataset)
    plain.create_optimizer_and_scheduler(steps)
    batches = [default_collate(dataset[2 * t : 2 * t + 2]) for t in range(steps + (method == "sampa"))]
    options = {"lmbda": args.lmbda} if method == "sampa" else {}
    getattr(reference, method)(
        expected,
        plain.optimizer,
        plain.lr_scheduler,
        lambda model, batch: model(**batch)["loss"],
        batches,
        rho=args.rho,
        max_norm=0.1,
        **options,
    )
    torch.testing.assert_close(dict(trainer.model.named_parameters()), dict(expected.named_parameters()))

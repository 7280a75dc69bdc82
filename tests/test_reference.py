"""P1 and P4: the trainer against plain Trainer and against the serial reference; the paper's toy problem."""

from __future__ import annotations

import pytest
import torch
from pytorch_optimizer import SAM as PeerSAM
from torch import nn
from torch.utils.data import default_collate
from transformers import Trainer

from hf_sampa import SAMPaTrainer
from hf_sampa.distributed.exchange import Exchange
from hf_sampa.distributed.roles import Mesh
from hf_sampa.engine.sam import SAM
from hf_sampa.engine.sampa import SAMPa
from tests import reference, tiny


def batches_in_order(dataset, size, count):
    """The first `count` batches of a sequential stream, epoch after epoch."""
    epoch = [dataset[i : i + size] for i in range(0, len(dataset), size)]
    return [default_collate(epoch[t % len(epoch)]) for t in range(count)]


OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch"},
    "sgd momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
    "exotic": {"optim": "rmsprop"},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("lmbda", [0.0, 0.2, 1.0])
def test_trainer_is_the_serial_reference(tmp_path, optimizer, lmbda):
    """With weight decay, groups, clipping that binds, warm-up and decay, over an epoch's end with a ragged batch."""
    dataset, steps = tiny.sentences(18), 8
    args = tiny.arguments(
        tmp_path,
        **OPTIMIZERS[optimizer],
        lmbda=lmbda,
        max_grad_norm=0.1,
        max_steps=steps,
        warmup_steps=3,
        train_sampling_strategy="sequential",
    )
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=dataset)
    trainer.train()

    expected = tiny.bert()
    plain = Trainer(model=expected, args=args, train_dataset=dataset)
    plain.create_optimizer_and_scheduler(steps)
    losses = reference.sampa(
        expected,
        plain.optimizer,
        plain.lr_scheduler,
        lambda model, batch: model(**batch).loss,
        batches_in_order(dataset, 4, steps + 1),
        rho=args.rho,
        lmbda=lmbda,
        max_norm=args.max_grad_norm,
    )
    torch.testing.assert_close(dict(trainer.model.named_parameters()), dict(expected.named_parameters()))
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert logged == pytest.approx(losses, rel=1e-5)
    moved = max(
        (a - b).abs().max().item() for a, b in zip(expected.parameters(), tiny.bert().parameters(), strict=True)
    )
    assert moved > 1e-3


def test_sam_is_the_serial_reference(tmp_path):
    dataset = tiny.sentences(18)
    args = tiny.arguments(tmp_path, method="sam", max_steps=8, train_sampling_strategy="sequential", max_grad_norm=0.1)
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=dataset)
    trainer.train()
    expected = tiny.bert()
    plain = Trainer(model=expected, args=args, train_dataset=dataset)
    plain.create_optimizer_and_scheduler(8)
    losses = reference.sam(
        expected,
        plain.optimizer,
        plain.lr_scheduler,
        lambda model, batch: model(**batch).loss,
        batches_in_order(dataset, 4, 8),
        rho=args.rho,
        max_norm=0.1,
    )
    torch.testing.assert_close(dict(trainer.model.named_parameters()), dict(expected.named_parameters()))
    assert [line["loss"] for line in trainer.state.log_history if "loss" in line] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("model", [tiny.bert, tiny.vit], ids=["bert", "vit"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_rho_zero_and_lambda_zero_are_plain_trainer(tmp_path, model, optim):
    """P1, bit for bit."""
    dataset = tiny.sentences(18) if model is tiny.bert else tiny.images(18)
    args = tiny.arguments(tmp_path, rho=0.0, lmbda=0.0, optim=optim, warmup_steps=2)
    ours, plain = (cls(model=model(), args=args, train_dataset=dataset) for cls in (SAMPaTrainer, Trainer))
    ours.train()
    plain.train()
    assert tiny.differing(ours.model.state_dict(), plain.model.state_dict()) == []
    assert tiny.differing(ours.optimizer.state_dict(), plain.optimizer.state_dict()) == []
    assert not torch.equal(plain.model.classifier.weight, model().classifier.weight)


class Once:
    """A batch of one micro-batch."""

    fingerprint = 1
    update = epoch = 0

    def __iter__(self):
        return iter([None])


def toy_run(method, x, steps=400, lr=0.1, **kwargs):
    """f(x) = ||x||^2 by the engine itself, without Trainer."""
    optimizer = torch.optim.SGD([x], lr=lr)
    model = nn.ParameterList([x])
    engine = method(model, optimizer, Exchange(Mesh(1, 0, paired=False)), rho=0.1, **kwargs)

    def gradient(_, role):
        loss = (x**2).sum()
        loss.backward()
        return loss.detach()

    norms = []
    for _ in range(steps):
        engine.step(Once(), Once(), gradient)
        optimizer.step()
        norms.append(x.norm().item())
    engine.close()
    return norms


@pytest.mark.parametrize(
    ("method", "kwargs", "smaller", "larger"),
    [(SAM, {}, 0.0111, 0.0111), (SAMPa, {"lmbda": 0.0}, 0.0024, 0.0220), (SAMPa, {"lmbda": 0.2}, 0.0020, 0.0175)],
    ids=["SAM", "SAMPa-0", "SAMPa-0.2"],
)
def test_figure_1(method, kwargs, smaller, larger):
    """400 steps at step size and rho 0.1 end in a cycle of two steps; its larger norm is the one usually quoted."""
    norms = toy_run(method, nn.Parameter(torch.tensor([1.0, -2.0])), **kwargs)
    assert len(norms) == 400
    assert sorted(norms[-2:]) == pytest.approx([smaller, larger], abs=6e-5)


@pytest.mark.parametrize(("method", "kwargs"), [(SAM, {}), (SAMPa, {"lmbda": 0.2})])
def test_a_closed_engine_leaves_no_hooks_behind(method, kwargs):
    x = nn.Parameter(torch.tensor([1.0, -2.0]))
    toy_run(method, x, steps=2, **kwargs)
    assert not x._post_accumulate_grad_hooks


def test_sam_agrees_with_an_independent_package():
    x, peer_x = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    toy_run(SAM, x, steps=20)
    peer = PeerSAM([peer_x], torch.optim.SGD, rho=0.1, lr=0.1)
    for _ in range(20):
        (peer_x**2).sum().backward()
        peer.first_step(zero_grad=True)
        (peer_x**2).sum().backward()
        peer.second_step(zero_grad=True)
    torch.testing.assert_close(x, peer_x)

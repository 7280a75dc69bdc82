"""What the engine promises of every step, whatever the model: overlap that is safe or says so, one host sync, one copy of x."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_sampa import SAMPaTrainer, functional
from hf_sampa.data import MicroBatch, UpdateBatch
from hf_sampa.distributed.exchange import Exchange
from hf_sampa.distributed.roles import Mesh
from hf_sampa.engine import SampleView
from hf_sampa.engine.buckets import Buckets, GradientRecorder
from hf_sampa.state import stood_in
from tests import tiny
from tests.ranks import RankFailed, run_ranks


class ReadsDetachedWeights(nn.Module):
    """Its backward reads the weight of `middle` after that weight's gradient is complete."""

    early_weight = staticmethod(torch.Tensor.detach)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle = nn.Linear(64, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        early = nn.functional.linear(self.first(pixel_values.flatten(1)), self.early_weight(self.middle.weight))
        logits = self.head(self.middle(early.tanh()))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_weight_that_backward_reads_too_late_is_noticed(tmp_path):
    """Its memory holds something else by then; autograd sees the version of the weight."""
    with pytest.raises(
        RuntimeError, match="Backward read a weight whose gradient was complete.*overlap_exchange=False"
    ):
        tiny.run(tmp_path, ReadsDetachedWeights, tiny.images(12))


class ReadsRawWeights(ReadsDetachedWeights):
    """Autograd does not know that these are the weight's numbers."""

    early_weight = staticmethod(lambda weight: weight.data)


class ReadsInCheckpointedLayers(ReadsDetachedWeights):
    """Computed once more in backward, so that autograd sees nothing saved."""

    def forward(self, pixel_values, labels=None):
        early = checkpoint(self.early, pixel_values, use_reentrant=False)
        logits = self.head(self.middle(early))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def early(self, pixel_values):
        return nn.functional.linear(self.first(pixel_values.flatten(1)), self.middle.weight.detach()).tanh()


class ReadsNowAndThen(ReadsRawWeights):
    """From its second update batch on."""

    passes = 0

    def forward(self, pixel_values, labels=None):
        self.passes += 1
        self.early_weight = (lambda weight: weight.clone()) if self.passes == 1 else type(self).early_weight
        return super().forward(pixel_values, labels)


def trained(folder, model, method="sampa", overlap=True):
    return tiny.run(folder, model, tiny.images(12), max_steps=30, method=method, overlap_exchange=overlap)


@pytest.mark.parametrize("method", ["sampa", "sam"])
@pytest.mark.parametrize("model", [ReadsRawWeights, ReadsInCheckpointedLayers])
def test_a_late_reader_that_autograd_does_not_see_has_no_finite_gradient(tmp_path, model, method):
    with pytest.raises(
        RuntimeError, match="Expected a finite gradient.*if the run is well with overlap_exchange=False"
    ):
        trained(tmp_path / "overlap", model, method)
    run = trained(tmp_path / "none", model, method, overlap=False)
    assert run["steps"] == 30 and not any("skipped_steps" in line for line in run["logs"])


def test_the_first_skipped_step_tells_of_late_readers(tmp_path, caplog):
    with pytest.raises(RuntimeError):
        trained(tmp_path, ReadsNowAndThen)
    first = next(line for line in caplog.messages if "is skipped" in line)
    assert "if the run is well with overlap_exchange=False, the model's backward reads a weight" in first


@pytest.mark.distributed
def test_two_processes_notice_a_late_reader_too(tmp_path):
    with pytest.raises(RankFailed, match="run is well with overlap_exchange=False"):
        run_ranks(trained, 2, tmp_path / "overlap", ReadsRawWeights, folder=tmp_path / "failed")
    one = trained(tmp_path / "one", ReadsRawWeights, overlap=False)
    for two in run_ranks(trained, 2, tmp_path / "two", ReadsRawWeights, "sampa", False, folder=tmp_path / "well"):
        assert tiny.differing(one, two) == []


def test_without_overlap_it_trains_and_overlap_changes_no_bit(tmp_path):
    assert tiny.run(tmp_path, ReadsDetachedWeights, tiny.images(12), overlap_exchange=False)["steps"] == 6
    one, other = (
        tiny.run(tmp_path, tiny.bert, tiny.sentences(12), overlap_exchange=overlap) for overlap in (True, False)
    )
    assert tiny.differing(one, other) == []


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: reading an element of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sampa", "sam"])
def test_the_step_reads_no_element_of_a_tensor(tmp_path, method, monkeypatch):
    """What the host has to know comes by the one copy in `_share`. Norms are taken as on a device: on a CPU nobody waits."""
    monkeypatch.setattr(functional, "_norms_on_cpu", functional._norms_on_device)
    counts, copies = [], []

    class Counted(SAMPaTrainer):
        def _run_epoch(self, *args, **kwargs):
            step = self._run.steps.step
            with stood_in(self._run.steps, "step", partial(self.counted, step)):
                super()._run_epoch(*args, **kwargs)

        def counted(self, step, *args, **kwargs):
            gather = self.sampa.exchange.gather
            self.sampa.exchange.gather = lambda row: copies.append(1) or gather(row)
            with HostReads() as reads:
                loss = step(*args, **kwargs)
            self.sampa.exchange.gather = gather
            counts.append(reads.count)
            return loss

    args = tiny.arguments(tmp_path, method=method, optim="adamw_torch_fused", max_steps=4)
    Counted(model=tiny.bert(0.1), args=args, train_dataset=tiny.sentences(16)).train()
    # Counting the labels that matter reads the batch, which is on the CPU; the first step takes g_0 on top.
    assert counts[1:] == [counts[1]] * 3 and counts[1] <= 1
    assert len(copies) == (5 if method == "sampa" else 4)


def test_displaced_weights_are_other_memory(tmp_path):
    """x_t itself is not written to during a step, and a process holds two buffers beside it (one process: three)."""
    seen = []

    class Watched(SAMPaTrainer):
        def compute_loss(self, model, *args, **kwargs):
            if not self.sampa.rehearsing:
                seen.append(model.classifier.weight.data_ptr())
            return super().compute_loss(model, *args, **kwargs)

    trainer = Watched(model=tiny.bert(), args=tiny.arguments(tmp_path, max_steps=3), train_dataset=tiny.sentences(16))
    own = trainer.model.classifier.weight.data_ptr()
    trainer.train()
    assert trainer.model.classifier.weight.data_ptr() == own == seen[0]  # g_0 is taken at x_0
    assert own not in seen[1:] and len(seen) == 7


def test_a_process_that_has_none_of_the_chosen_samples_keeps_one_batch_of_none():
    weighed = []
    view = SampleView(Exchange(Mesh(1, 0, paired=False)), None, weighed.append, None)
    batch = UpdateBatch([MicroBatch({"x": torch.zeros(2, 1)}, 0, i) for i in range(2)], 0, 0)
    for chosen, sizes in (([False] * 4, [0]), ([False, False, True, False], [1]), ([True, False, True, True], [1, 2])):
        part = view.narrowed(batch, torch.tensor(chosen))
        assert [each.size for each in part] == sizes and weighed[-1] is part


# ---- The recorder of gradients, by itself ----


@pytest.fixture
def recording():
    """Two parameters, their recorder and a place for their gradients."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    recorder = GradientRecorder(params)
    into = Buckets(params, bucket_bytes=1)
    recorder.start(into)
    yield params, recorder, into
    recorder.close()


def test_a_parameter_without_a_gradient_has_none_of_the_step_before(recording):
    (a, b), recorder, into = recording
    for loss, used in (((2 * a + 3 * b).sum(), [True, True]), ((5 * a).sum(), [True, False])):
        recorder.start(into)
        with recorder.record(into, on_full=lambda bucket: None):
            loss.backward()
        assert recorder.used == used
    assert into.views[0].tolist() == [5.0] * 3 and into.views[1].tolist() == [0.0] * 3


def test_a_bucket_is_reported_while_backward_runs(recording):
    (a, b), recorder, into = recording
    full, before = [], []
    b.register_post_accumulate_grad_hook(lambda _: before.append(list(full)))
    with recorder.record(into, on_full=full.append):
        (a.exp() * b.exp()).sum().backward()
        assert full == [0, 1]
    assert full == [0, 1] and before == [[0]]


def test_few_weights_are_in_several_buckets():
    """So that two processes can share them evenly."""
    params = [nn.Parameter(torch.ones(8)) for _ in range(32)]
    assert [len(members) for members in Buckets(params).members] == [2] * 16


def test_outside_of_its_block_it_leaves_gradients_alone(recording):
    (a, _), recorder, into = recording
    with recorder.record(into, on_full=lambda bucket: None):
        a.sum().backward()
    a.grad = None
    (7 * a).sum().backward()
    assert a.grad.tolist() == [7.0] * 3 and into.views[0].tolist() == [1.0] * 3


@pytest.mark.parametrize("change", ["none", "second backward", "after backward"])
def test_it_hears_of_gradients_that_come_in_pieces_or_change(recording, change):
    (a, b), recorder, into = recording
    recorder.overlap, recorder.listening = False, True
    with recorder.record(into, on_full=lambda bucket: None):
        (a + b).sum().backward()
        if change == "second backward":
            a.sum().backward()
        if change == "after backward":
            b.grad.mul_(2)
    assert recorder.pieces == (change != "none")
    assert into.views[0].tolist() == [2.0 if change == "second backward" else 1.0] * 3
    assert into.views[1].tolist() == [2.0 if change == "after backward" else 1.0] * 3


@pytest.fixture
def grouping():
    """A large parameter and two small ones of its bucket, which are taken in groups, one before it and one after."""
    params = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(200)), nn.Parameter(torch.ones(1))]
    recorder, into = GradientRecorder(params), Buckets(params, bucket_bytes=10_000)
    recorder.group(into)
    recorder.start(into)
    yield params, recorder, into
    recorder.close()


def test_small_gradients_are_taken_with_the_next_other_or_after_backward(grouping):
    (first, large, last), recorder, into = grouping
    full, seen = [], []
    large.register_post_accumulate_grad_hook(
        lambda _: seen.append([grad is not None for grad in (last.grad, first.grad)])
    )
    with recorder.record(into):
        (first * (large * last.exp()).sum()).sum().backward()
    with recorder.record(into, on_full=full.append):
        (2 * first).sum().backward()
        last.sum().backward()
        assert full == []
    assert full == [0] and len(seen) == 1
    assert recorder.used == [True, True, True] and not recorder.pieces
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(into.views, [200 * e[None] + 2, e.expand(200), 200 * e[None] + 1])
    assert all(param.grad is view for param, view in zip(grouping[0], into.views, strict=True))


def test_small_gradients_that_are_taken_away_or_come_again(grouping):
    (first, large, last), recorder, into = grouping
    with recorder.record(into, on_full=lambda bucket: None):
        (first + last).sum().backward()
        first.grad = None
    assert recorder.used == [False, False, True] and into.views[0].item() == 0.0
    recorder.start(into)
    with recorder.record(into, on_full=lambda bucket: None):
        (first + last).sum().backward()
        last.sum().backward()
    assert recorder.pieces and into.views[2].item() == 2.0
    recorder.start(into)
    with pytest.raises(RuntimeError, match=r"shape \(1,\) received its gradient in more than one piece"):
        with recorder.record(into, on_full=lambda bucket: None):
            (first + last).sum().backward()
            large.sum().backward()
            last.sum().backward()
    first.sum().backward()  # of nobody's
    assert recorder._arrived[-1] is first
    first.grad = None
    recorder.start(into)
    with recorder.record(into, on_full=lambda bucket: None):
        large.sum().backward()
    assert recorder.used == [False, True, False]

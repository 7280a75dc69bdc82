"""The pure functions, on numbers that one can check by hand."""

from __future__ import annotations

import pytest
import torch

from hf_sampa.engine.buckets import Buckets, GradientRecorder
from hf_sampa.functional import displacement_dot_, interpolate_, perturb


@pytest.mark.parametrize("norm", [5.0, torch.tensor(5.0, dtype=torch.float64)], ids=["number", "tensor"])
def test_perturbation_has_length_rho_and_the_gradients_direction(norm):
    params, grads = [torch.zeros(1), torch.ones(2)], [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    moved = [torch.empty(1), torch.empty(2)]
    perturb(params, grads, 0.5, norm, out=moved)
    torch.testing.assert_close(moved, [torch.tensor([0.3]), torch.tensor([1.0, 1.4])])
    assert torch.equal(grads[0], torch.tensor([3.0])) and torch.equal(params[0], torch.zeros(1))
    perturb(params, grads, 0.5, norm, out=grads)  # in the place of g_t
    torch.testing.assert_close(grads, moved, rtol=0, atol=0)


def test_a_zero_gradient_perturbs_nothing():
    params, moved = [torch.ones(2)], [torch.empty(2)]
    perturb(params, [torch.zeros(2)], 0.5, 0.0, out=moved)
    assert torch.equal(moved[0], torch.ones(2))


def test_displacement_dot_is_that_of_the_displacement():
    flat = torch.tensor([1.5, 2.0, 1.0])
    moved, params = [flat[:1], flat[1:]], [torch.tensor([1.0]), torch.tensor([2.0, 3.0])]
    assert displacement_dot_(moved, params, torch.tensor([4.0, 5.0, 6.0]), flat).item() == 0.5 * 4.0 - 2.0 * 6.0


@pytest.mark.parametrize(("lmbda", "expected"), [(0.0, 1.0), (0.25, 2.0), (1.0, 5.0)])
def test_interpolation(lmbda, expected):
    perturbed, lookahead = [torch.tensor([1.0])], [torch.tensor([5.0])]
    interpolate_(perturbed, lookahead, lmbda)
    assert (perturbed[0].item(), lookahead[0].item()) == (expected, 5.0)


def test_lambda_zero_ignores_even_an_infinite_look_ahead_gradient():
    perturbed = [torch.tensor([1.0])]
    interpolate_(perturbed, [torch.tensor([float("inf")])], 0.0)
    assert perturbed[0].item() == 1.0


def test_buckets_hold_every_parameter_once_from_last_to_first():
    params = [torch.zeros(4, 2), torch.zeros(3), torch.zeros(5, dtype=torch.float64), torch.zeros(1)]
    buckets = Buckets(params, bucket_bytes=16)
    assert [flat.numel() for flat in buckets.flats] == [1, 5, 3, 8]
    assert buckets.bucket_of == [3, 2, 1, 0]
    for i, view in enumerate(buckets.views):
        view.fill_(i)
    assert [flat.unique().item() for flat in buckets.flats] == [3, 2, 1, 0]
    assert [view.shape for view in buckets.views] == [param.shape for param in params]


def test_buckets_keep_the_memory_layout_of_their_parameters():
    params = [torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(3, 2).t()]
    for view, param in zip(Buckets(params).views, params, strict=True):
        assert view.stride() == param.stride()


def test_buckets_swap_and_give_memory_back():
    params = [torch.zeros(2), torch.zeros(3)]
    left, right = Buckets(params, bucket_bytes=8), Buckets(params, bucket_bytes=8)
    right.flats[1].fill_(7.0)
    left.swap(right, [1])
    assert left.views[0].tolist() == [7.0, 7.0] and right.views[0].tolist() == [0.0, 0.0]
    kept = left.views[1]
    left.release(0)
    assert left.flats[0].numel() == 0
    assert kept.tolist() == [0.0, 0.0, 0.0]  # a callback may hold it as a gradient
    left.ensure(0)
    left.ensure(1)  # had not been released
    left.views[1].fill_(2.0)
    assert left.flats[0].tolist() == [2.0, 2.0, 2.0] and left.views[0].tolist() == [7.0, 7.0]


def test_recorder_sums_micro_batches_zeroes_the_unused_and_keeps_one_order():
    first, unused, last = (torch.nn.Parameter(torch.full((2,), value)) for value in (1.0, 2.0, 3.0))
    params = [first, unused, last]
    buckets, recorder, full = Buckets(params, bucket_bytes=8), GradientRecorder(params), []
    buckets.views[1].fill_(7.0)
    recorder.start(buckets)
    with recorder.record(buckets):
        (first * 2 + last).sum().backward()
    with recorder.record(buckets, full.append):
        (first * 3 + last * 10).sum().backward()
        assert full == [0]  # what follows waits for the parameter that gets no gradient
    assert full == [0, 1, 2]
    assert [view.tolist() for view in buckets.views] == [[5.0, 5.0], [0.0, 0.0], [11.0, 11.0]]
    assert recorder.used == [True, False, True]
    assert unused.grad is None
    recorder.close()
    first.grad = None
    (first * 4).sum().backward()
    assert first.grad.tolist() == [4.0, 4.0]
    assert buckets.views[0].tolist() == [5.0, 5.0]


@pytest.mark.parametrize("known", [True, False])
def test_a_large_gradient_is_taken_over_where_torch_tells_that_nobody_else_holds_it(known, monkeypatch):
    if not known:
        monkeypatch.delattr(torch._C, "_storage_Use_Count")
    param = torch.zeros(3)
    buckets, grad = Buckets([param], bucket_bytes=4), torch.ones(3)
    buckets.take(0, grad)
    assert (buckets.flats[0].data_ptr() == grad.data_ptr()) == known
    assert buckets.views[0].tolist() == buckets.flats[0].tolist() == [1.0, 1.0, 1.0]
    other, held = torch.ones(3), []
    held.append(other.view(3))
    buckets.take(0, other)
    assert buckets.flats[0].data_ptr() != other.data_ptr()


def test_recorder_without_overlap_reports_after_backward():
    param = torch.nn.Parameter(torch.ones(1))
    buckets, recorder, full = Buckets([param]), GradientRecorder([param], overlap=False), []
    recorder.start(buckets)
    with recorder.record(buckets, full.append):
        param.sum().backward()
        param.sum().backward()  # a second piece, as reentrant checkpointing makes
        assert full == []
    assert full == [0] and buckets.views[0].tolist() == [2.0]


def test_a_gradient_that_comes_after_its_bucket_was_sent_is_refused():
    param = torch.nn.Parameter(torch.ones(1))
    buckets, recorder = Buckets([param]), GradientRecorder([param])
    recorder.start(buckets)
    with (
        pytest.raises(
            RuntimeError, match="more than one piece.*backward twice.*overlap_exchange=False.*use_reentrant"
        ),
        recorder.record(buckets, lambda _: None),
    ):
        param.sum().backward()
        param.sum().backward()

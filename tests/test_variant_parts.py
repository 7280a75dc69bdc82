"""Single parts against their formulas, draws against their probabilities, and independent packages."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_optimizer import GSAM as PeerGSAM
from pytorch_optimizer import FriendlySAM as PeerFriendlySAM
from torch import nn

from hf_sampa.distributed.exchange import Exchange
from hf_sampa.distributed.roles import Mesh
from hf_sampa.engine.sam import SAM
from hf_sampa.variants import VARIANTS, masks, psf, samples, schedules
from hf_sampa.variants.parts import Moment


def moments(count, **facts):
    return [Moment(step=step, max_steps=count, seed=3, **facts) for step in range(count)]


# ---- Draws ----


@pytest.mark.parametrize(("schedule", "mean"), [("constant", 0.3), ("linear", 0.15), ("cosine", 0.15)])
def test_rst_ascends_as_often_as_its_probability_says(schedule, mean):
    when = schedules.Bernoulli(0.3, schedule)
    ascended = [when(now, None) for now in moments(4000)]
    assert sum(ascended) / 4000 == pytest.approx(mean, abs=0.03)
    assert [when(now, None) for now in moments(4000)] == ascended


def test_the_cosine_schedule_of_rst_rises():
    assert [schedules.PROBABILITIES["cosine"](0.8, part) for part in (0.0, 0.5, 1.0)] == pytest.approx([0.0, 0.4, 0.8])


def bound(part, count=40):
    params = [nn.Parameter(torch.ones(2, 3)) for _ in range(count)]
    part.bind(nn.ParameterList(params), [str(i) for i in range(count)], params)
    return part


def test_esam_keeps_tensors_with_probability_beta():
    mask = bound(masks.RandomTensors(0.25))
    kept = torch.tensor([mask.keeps(now) for now in moments(500)]).double()
    assert kept.mean().item() == pytest.approx(0.25, abs=0.02)
    assert kept.any(dim=1).all()
    assert mask.scale == 4


def test_sl_sam_follows_the_norms():
    """Against its formulas, entry by entry, for three steps; probabilities keep their sum."""
    mask = bound(masks.ImportantTensors(0.5, a=0.05), count=6)
    p = [0.5] * 6
    for now in moments(3):
        kept = mask.keeps(now)
        g = [torch.full((2, 3), float(i + 1)) if keep else torch.zeros(2, 3) for i, keep in enumerate(kept)]
        mask.observe(g, now)
        u = [each.norm().item() for each in g]
        active = [i for i in range(6) if kept[i]]
        largest = max((u[i] / p[i]) ** 2 for i in active)
        weights = list(p)
        for i in active:
            weights[i] = p[i] * math.exp(-0.05 * (largest - (u[i] / p[i]) ** 2) / p[i])
        full: set[int] = set()
        while True:  # scale to the sum, capping at 1
            scale = (3 - len(full)) / sum(w for i, w in enumerate(weights) if i not in full)
            over = {i for i, w in enumerate(weights) if i not in full and w * scale > 1}
            if not over:
                break
            full |= over
        p = [1.0 if i in full else max(1e-8, w * scale) for i, w in enumerate(weights)]
        assert mask.p.tolist() == pytest.approx(p, rel=1e-6)
    assert sum(p) == pytest.approx(3, rel=1e-6)


def test_ssam_d_drops_the_smallest_and_grows_as_many():
    mask = masks.Dynamic(sparsity=0.5, every=1, drop=0.5)
    g = [torch.arange(1.0, 11.0), torch.arange(11.0, 21.0)]
    first, second = moments(2)
    assert mask.thin([each.clone() for each in g], first)
    live = torch.cat(mask.mask).clone()
    assert live.sum() == 10
    direction = [each.clone() for each in g]
    mask.thin(direction, second)
    after = torch.cat(mask.mask)
    count = int(0.25 * (1 + math.cos(math.pi / 2)) * 10)
    smallest = torch.cat(g)[live].sort().values[count - 1]
    kept = live & (torch.cat(g) > smallest)
    assert after.sum() == 10
    assert (after & kept).sum() == kept.sum() == 10 - count
    assert torch.equal(torch.cat(direction), torch.cat(g) * after)


def test_ssam_f_keeps_the_largest_fisher_information():
    mask = masks.Important(sparsity=0.75, every=10, fisher_samples=4)
    assert [mask.wants_fisher(now) for now in moments(12)][0]
    mask.learn([torch.tensor([3.0, 1.0]), torch.tensor([[2.0, 9.0], [5.0, 0.0], [0.0, 0.0]])], Moment())
    direction = [torch.ones(2), torch.ones(3, 2)]
    assert mask.thin(direction, Moment())
    assert direction[0].tolist() == [0, 0]
    assert direction[1].tolist() == [[0, 1], [1, 0], [0, 0]]
    assert [step for step, now in enumerate(moments(25)) if mask.wants_fisher(now)] == [0, 10, 20]


def test_randsam_is_as_long_as_rho_and_new_in_every_step():
    direction = VARIANTS["randsam"].recipe({}).direction
    g = [torch.zeros(50, 40), torch.zeros(1000)]
    norm = direction(g, g, None, Moment(step=1, seed=3))
    flat = torch.cat([each.reshape(-1) for each in g])
    assert norm.item() == pytest.approx(flat.norm().item(), rel=1e-6)
    assert flat.mean().abs() < 0.06
    assert flat.std().item() == pytest.approx(1, abs=0.05)
    other = [torch.zeros(50, 40), torch.zeros(1000)]
    direction(other, other, None, Moment(step=2, seed=3))
    assert not torch.equal(g[0], other[0])


def test_ausam_draws_by_scores():
    """Of two samples of a batch of four: how often each is drawn, without replacement, against the exact probabilities."""
    part = samples.LargestDifference(alpha=0.5, low=0.1, high=0.5, growth=0.0)
    start = Moment(num_samples=4, seed=3)
    assert part.choose(None, torch.arange(4), start) is None
    part.observe(torch.arange(4), torch.zeros(4), torch.tensor([0.0, 1.0, -2.0, 4.0]), start)
    weights = [0.1 + 0.4 * score / 4 for score in (0, 1, 2, 4)]
    expected = [0.0] * 4
    for i in range(4):
        for j in range(4):
            if i != j:
                both = weights[i] / sum(weights) * weights[j] / (sum(weights) - weights[i])
                expected[i] += both
                expected[j] += both
    drawn = torch.zeros(4)
    for step in range(4000):
        chosen = part.choose(None, torch.arange(4), Moment(step, 1, 4000, 4, 1.0, 3))
        assert chosen.sum() == 2
        drawn += chosen
    assert (drawn / 4000).tolist() == pytest.approx(expected, abs=0.03)


def test_ausam_with_equal_scores_draws_evenly():
    part = samples.LargestDifference(alpha=0.5, low=0.1, high=0.5, growth=0.0)
    part.choose(None, torch.arange(4), Moment(num_samples=4))
    assert part.choose(None, torch.arange(4), Moment(1, 1, 10, 4, 1.0, 3)).sum() == 2


# ---- vSAM ----


def quota(**changes):
    settings = {"window": 10, "start": 4, "most": 0.8, "a1": 0.5, "a2": 0.25, "tensors": 1, "warmup": 0.0}
    return psf.Quota(**{**settings, **changes})


def test_vsam_keeps_its_quota_in_every_window():
    when = quota(a1=0.0, a2=0.0)
    ascended = [when(now, None) for now in moments(200)]
    assert [sum(ascended[i : i + 10]) for i in range(0, 200, 10)] == [4] * 20
    assert len({tuple(ascended[i : i + 10]) for i in range(0, 200, 10)}) > 10


def test_vsam_follows_the_changes_of_the_psf():
    """S <- S (1 + a1 a + a2 b), against the formulas."""
    when, norms = quota(), []
    for now in moments(10):
        if when(now, None):
            norms.append(1.0 + len(norms))
            when.observe([torch.tensor([2.0])], [torch.tensor([2.0 + norms[-1]])], now)
    assert norms == [1, 2, 3, 4]
    a = min(1.0, (2 / 1 - 1 + 3 / 2 - 1 + 4 / 3 - 1) / 3)
    # Blocks of the sorted norms hold at most one value each, so that no variance is above 0, and b is 0.
    when(Moment(step=10, max_steps=20, seed=3), None)
    assert when.quota == pytest.approx(4 * (1 + 0.5 * a))


def test_the_variance_of_vsam_is_that_within_blocks():
    when = quota(window=20)
    for value in range(10):
        when.observe([torch.tensor([1.0])], [torch.tensor([1.0 + value])], Moment(step=value))
    assert when.variances[-1] == pytest.approx(0.25)  # of five pairs of neighbours


def test_psf_is_used_up_to_its_age():
    part = psf.ReusedPSF(beta=0.5, max_age=2)
    part([torch.tensor([3.0])], [torch.tensor([1.0])], None, Moment())
    found = []
    for _ in range(4):
        g = [torch.tensor([10.0])]
        part.reuse(g, Moment())
        found.append(g[0].item())
    assert found == [11.0, 10.5, 10.0, 10.0]


# ---- Independent packages ----


def engine_run(recipe, steps=15):
    """f(x, y) = x^4 + x y^2 + y^2 by the engine itself."""
    params = fresh_params()
    optimizer = torch.optim.SGD(params, lr=0.02)
    engine = SAM(params, optimizer, Exchange(Mesh(1, 0, paired=False)), rho=0.1, recipe=recipe)

    class Once:
        fingerprint, epoch = 1, 0

        def __init__(self, update):
            self.update = update

        def __iter__(self):
            return iter([None])

    def gradient(_, role):
        loss = objective(params)
        loss.backward()
        return loss.detach()

    for step in range(steps):
        engine.step(Once(step), Once(step + 1), gradient)
        optimizer.step()
    engine.close()
    return list(params)


def objective(params):
    a, b = params
    return (a**4).sum() + (a * b**2).sum() + (b**2).sum()


def fresh_params():
    return nn.ParameterList([nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([0.5]))])


def backward(params):
    for param in params:
        param.grad = None
    objective(params).backward()


class Constant:
    """The schedule of the radius that the peer asks for."""

    def step(self):
        return 0.1


def test_gsam_agrees_with_an_independent_package():
    params = fresh_params()
    base = torch.optim.SGD(params, lr=0.02)
    peer = PeerGSAM(params, base_optimizer=base, model=params, rho_scheduler=Constant(), alpha=0.4)
    for _ in range(15):
        backward(params)
        peer.perturb_weights(0.1)
        backward(params)
        peer.gradient_decompose(0.4)
        peer.un_perturb()
        base.step()
    for ours, theirs in zip(engine_run(VARIANTS["gsam"].recipe({"alpha": 0.4})), params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_fsam_agrees_with_an_independent_package():
    params = fresh_params()
    peer = PeerFriendlySAM(params, torch.optim.SGD, rho=0.1, sigma=0.7, lmbda=0.6, lr=0.02)
    for _ in range(15):
        backward(params)
        peer.first_step(zero_grad=True)
        backward(params)
        peer.second_step(zero_grad=True)
    for ours, theirs in zip(engine_run(VARIANTS["fsam"].recipe({"sigma": 0.7, "lam": 0.6})), params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

"""fp16 with a loss scale: P2, P3, P5, overflow agreed on by both roles. bf16 is in test_around_models.py.

CPUs have no fp16 in accelerate; the trainer here is given what it would be given on a GPU: autocast and a GradScaler.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.amp import GradScaler
from transformers import Trainer

from hf_sampa import SAMPaMixin
from hf_sampa.engine.precision import SharedGradScaler
from tests import tiny
from tests.division import divided_tuples
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed


class HalfOnCpu(Trainer):
    """fp16 on a CPU; its scale starts high enough to overflow and grows after two good steps."""

    init_scale = 2.0**20

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = GradScaler("cpu", init_scale=self.init_scale, growth_interval=2)


class Half(SAMPaMixin, HalfOnCpu):
    pass


class HalfFromLow(Half):
    init_scale = 2.0**10


SCENARIOS = {
    "overflows at first": {},
    "accumulation, dropout": {"model": partial(tiny.bert, 0.1), "gradient_accumulation_steps": 2},
    "fused adamw, no clipping": {"optim": "adamw_torch_fused", "max_grad_norm": 0.0},
    "sharded": {"shard_optimizer": True},
    "grows until it overflows": {"trainer_class": HalfFromLow, "max_steps": 24},
}


def run(folder, name, **changes) -> dict:
    """`tiny.run`, with the scale after every step and the number of skipped steps."""
    scenario = {"model": tiny.bert, "trainer_class": Half, "max_steps": 9, **SCENARIOS[name], **changes}
    trainers, scales = [], []

    def make(*args, **kwargs):
        trainers.append(scenario["trainer_class"](*args, **kwargs))
        return trainers[0]

    after_step = tiny.Each(lambda: scales.append(trainers[0].accelerator.scaler.get_scale()))
    found = tiny.run(
        folder,
        dataset=tiny.sentences(19),
        fp16=True,
        trainer_kwargs={"callbacks": [after_step]},
        **{**scenario, "trainer_class": make},
    )
    return {**found, "scales": scales, "skipped": trainers[0].sampa.skipped_steps}


def all_scenarios(folder) -> dict:
    return {name: run(folder / name, name, save_strategy="steps", save_steps=1) for name in SCENARIOS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    return {n: run_ranks(all_scenarios, n, folder / str(n), folder=folder / f"ranks{n}") for n in (1, 2)}, folder


def comparable(outcome: dict) -> dict:
    return {**without_cosine(tiny.comparable(outcome)), "optimizer": None, "scales": None}


def without_cosine(outcome: dict) -> dict:
    return {**outcome, "logs": tiny.without_cosine(outcome["logs"])}


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_are_one(outcomes, name):
    one, (first, second) = outcomes[0][1][0][name], (rank[name] for rank in outcomes[0][2])
    pair = (one, first) if name != "sharded" else map(without_cosine, (one, first))
    assert tiny.differing(*({**each, "optimizer": None} for each in pair)) == []
    assert tiny.differing({**first, "optimizer": None}, {**second, "optimizer": None}) == []
    if name != "sharded":
        assert tiny.differing(one["optimizer"], second["optimizer"]) == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_overflows_are_skipped_and_lower_the_scale(outcomes, name):
    """Every skipped step halves the scale and takes no optimizer step; some steps go through."""
    one = outcomes[0][1][0][name]
    scales = [SCENARIOS[name].get("trainer_class", Half).init_scale, *one["scales"]]
    halved = sum(after < before for before, after in zip(scales[:-1], scales[1:], strict=True))
    steps = {int(state["step"]) for state in one["optimizer"]["state"].values()}
    assert halved == one["skipped"] > 0
    assert steps == {one["steps"] - one["skipped"]}
    assert one["steps"] - one["skipped"] >= 2
    assert all(value.isfinite().all() for value in one["weights"].values())


def test_norms_are_those_without_a_scale(outcomes, tmp_path):
    """And rounded as half precision rounds: near those of fp32, but not the same."""
    half = outcomes[0][1][0]["grows until it overflows"]["logs"]
    single = tiny.run(tmp_path, tiny.bert, tiny.sentences(19), max_steps=3)["logs"]
    for name in ("loss", "ascent_grad_norm", "grad_norm", "perturbed_loss"):
        for half_line, line in zip(half[:3], single, strict=False):
            assert half_line[name] == pytest.approx(line[name], rel=2e-2)
            assert half_line[name] != line[name]


def resumed(folder, written, cases) -> dict:
    return {
        (name, step): run(folder / "out", name, resume=str(written / name / f"checkpoint-{step}"))
        for name, step in cases
    }


@pytest.fixture(scope="module")
def continued(outcomes, chosen, tmp_path_factory):
    """Runs resumed on `n` processes from what `wrote` processes wrote, by (wrote, n)."""
    folder, cases = tmp_path_factory.mktemp("continued"), chosen("name", "step")
    return {
        (wrote, n): run_ranks(resumed, n, folder, outcomes[1] / str(wrote), cases, folder=folder / f"{wrote}to{n}")
        for wrote, n in chosen("wrote", "n")
    }


CASES = [(name, step) for name in SCENARIOS for step in (1, 5, 7)]
# Among overflows, and after them, each with some of the scenarios.
AT_ONCE = {
    ("overflows at first", 1),
    ("accumulation, dropout", 5),
    ("fused adamw, no clipping", 1),
    ("sharded", 5),
    ("grows until it overflows", 7),
}


@pytest.mark.parametrize(("name", "step"), divided_tuples(CASES, {*CASES} - AT_ONCE))
@pytest.mark.parametrize(("wrote", "n"), [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_resumed_is_never_stopped(outcomes, continued, wrote, n, name, step):
    whole, again = outcomes[0][wrote][0][name], continued[wrote, n][0][name, step]
    assert tiny.differing(comparable(whole), comparable(again)) == []
    assert whole["scales"][step:] == again["scales"]


def test_the_scaler_is_a_grad_scaler():
    """Settings and state are those of the scaler that it stands for."""
    plain = GradScaler("cpu", init_scale=8.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    shared = SharedGradScaler(plain, "cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    assert shared.inverse_scale().item() == 1 / 8
    for overflow, steps, scale in [(True, 0, 2.0), (False, 1, 2.0), (False, 2, 2.0), (False, 3, 8.0)]:
        weight.grad = torch.ones(1)
        shared.overflow = overflow
        shared.unscale_(optimizer)
        shared.step(optimizer)
        shared.update()
        assert (weight.item(), shared.get_scale()) == (1.0 - steps, scale)
    plain.load_state_dict(shared.state_dict())
    assert plain.get_scale() == 8.0
    shared.overflow = True  # of the step in progress, which says nothing of a scale that is given
    shared.update(5.0)
    assert shared.get_scale() == 5.0

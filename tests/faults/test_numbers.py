"""Gradients at both ends of single precision, parameters of odd shapes and layouts, settings that no weight could follow."""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.functional import global_norm, inner, norms, perturb, ratio
from tests import tiny
from tests.division import divided
from tests.ranks import run_ranks


class Odd(nn.Module):
    """A linear classifier, with a parameter that some layer might have."""

    scale = 1.0

    def __init__(self, extra: nn.Parameter | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 3)
        self.extra = extra

    def forward(self, pixel_values, labels=None):
        logits = self.linear(pixel_values.flatten(1))
        loss = nn.functional.cross_entropy(logits, labels)
        if self.extra is not None:
            loss = loss + self.extra.abs().square().sum().to(loss.dtype)
        return {"loss": loss * self.scale, "logits": logits}


class Scaled(Odd):
    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale


class Convolution(nn.Module):
    """In channels_last, and a loss with a weight of its own, tied in another memory order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
        self.body[0].to(memory_format=torch.channels_last)

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def randn(*shape: int, **kwargs) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), **kwargs)


ODD = {
    "of size 0": lambda: nn.Parameter(torch.zeros(3, 0, 2)),
    "without dimensions": lambda: nn.Parameter(torch.tensor(1.0)),
    "transposed": lambda: nn.Parameter(randn(6, 4).t()),
    "strided": lambda: nn.Parameter(randn(8, 6)[::2]),
    "complex": lambda: nn.Parameter(randn(5, dtype=torch.complex64)),
    "complex, transposed": lambda: nn.Parameter(randn(5, 3, dtype=torch.complex64).t()),
    "in double precision": lambda: nn.Parameter(randn(4, dtype=torch.float64)),
}
MODELS = {
    **{name: lambda make=make: Odd(make()) for name, make in ODD.items()},
    "channels_last": Convolution,
    "gradients of norm 1e20": partial(Scaled, 1e20),
}
SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
WORLDS = {"one": (1, {}), "two": (2, {}), "shared": (2, {"shard_optimizer": True})}


def odd_runs(folder, names, changes):
    found = {}
    for name in names:
        run = partial(tiny.run, folder / name, MODELS[name], tiny.images(14), **SETTINGS, **changes)
        found[name] = run(), run(resume=str(folder / name / "checkpoint-2"))
    return found


@pytest.fixture(scope="module")
def runs(chosen, tmp_path_factory):
    """By world and model: what a run ended with, and what it ended with after a resume."""
    folder = tmp_path_factory.mktemp("odd")
    return {
        world: run_ranks(odd_runs, n, folder / world, chosen("name"), changes, folder=folder / f"{world}-ranks")[0]
        for world, (n, changes) in WORLDS.items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", divided(MODELS, {"without dimensions", "transposed", "complex", "in double precision", "channels_last"})
)
def test_an_odd_parameter_trains_alike_on_one_process_and_on_two(runs, name, figure):
    one, wrong = runs["one"][name][0], []
    assert one["steps"] == 4 and not any("skipped_steps" in line for line in one["logs"])
    for world in WORLDS:
        own, resumed = runs[world][name]
        # A process that shares the optimizer holds a part of its state.
        own, expected = ({**each, "optimizer": None} if world == "shared" else each for each in (own, one))
        if world == "shared":
            own, expected = ({**each, "logs": tiny.without_cosine(each["logs"])} for each in (own, expected))
        wrong += tiny.differing(own, expected, world)
        wrong += tiny.differing(resumed["weights"], one["weights"], f"{world}, resumed")
    figure("odd parameters, one process = two = shared = resumed", 1, int(not wrong))
    assert wrong == []


def test_a_complex_parameter_is_the_pair_of_its_parts(tmp_path):
    """For every number that is logged, and where it ends."""
    parts = randn(5, dtype=torch.complex64)

    class Pair(Odd):
        def __init__(self):
            super().__init__(nn.Parameter(torch.view_as_real(parts).clone()))

    for changes in ({}, {"variant": "gsam"}, {"variant": "asam"}, {"variant": "ssam_d"}, {"variant": "vasso"}):
        one = tiny.run(tmp_path, Odd(nn.Parameter(parts.clone())), tiny.images(14), max_steps=4, **changes)
        other = tiny.run(tmp_path, Pair, tiny.images(14), max_steps=4, **changes)
        torch.testing.assert_close(torch.view_as_real(one["weights"]["extra"]), other["weights"]["extra"])
        for line, expected in zip(one["logs"][:-1], other["logs"][:-1], strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert changes or all(line["ascent_cosine"] > 0.99 for line in one["logs"][:-1])


# ---- Norms ----


SCALES = [1e-42, 1e-38, 1e-30, 1e-25, 1e-20, 1e-13, 1.0, 1e15, 1e18, 1e19, 1e20, 1e25, 1e30, 1e37]


def test_gradients_of_any_size_take_the_steps_of_gradients_of_size_one(tmp_path, figure):
    """AdamW's do not depend on it, where clipping makes all of them 1 long, or eps is nothing beside them."""
    settings = {"max_steps": 4, "optim_args": "eps=0", "max_grad_norm": 1e-3}
    ends = {}
    for scale in [scale for scale in SCALES if scale >= 1]:
        ends[scale] = tiny.run(tmp_path, partial(Scaled, scale), tiny.images(14), **settings)
    logs = [
        [{k: v for k, v in line.items() if k == "ascent_cosine"} for line in each["logs"][:-1]]
        for each in ends.values()
    ]
    right = 0
    for scale, end in ends.items():
        torch.testing.assert_close(end["weights"], ends[1.0]["weights"], rtol=1e-4, atol=1e-6)
        grad_norms = [line["grad_norm"] for line in end["logs"][:-1]]
        assert grad_norms == pytest.approx([scale * line["grad_norm"] for line in ends[1.0]["logs"][:-1]], rel=1e-3)
        right += 1
    assert all(each[0]["ascent_cosine"] == pytest.approx(logs[0][0]["ascent_cosine"], abs=1e-4) for each in logs)
    figure("gradients of norm 1e15 to 1e37", len(ends), right)


def test_a_small_gradient_is_a_direction_like_any_other(tmp_path, figure):
    small = [scale for scale in SCALES if 1e-38 <= scale <= 1]
    lines = [
        tiny.run(tmp_path, partial(Scaled, scale), tiny.images(14), max_steps=1, learning_rate=0.0)["logs"][0]
        for scale in small
    ]
    rise = [(line["sharpness"] / scale, line["ascent_cosine"]) for line, scale in zip(lines, small, strict=True)]
    right = sum(each == pytest.approx(rise[-1], rel=1e-3) for each in rise)
    figure("gradients of norm 1e-38 to 1", len(small), right)
    assert right == len(small)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("settings", [{}, {"method": "sam"}, {"variant": "gsam"}, {"variant": "stable_sam"}], ids=str)
def test_a_norm_beyond_single_precision_is_no_reason_to_skip(tmp_path, settings, max_grad_norm):
    """Plain Trainer clips such a gradient to 0, or, where it does not clip, makes NaN of it."""
    start = Odd().linear.weight.detach()
    run = partial(
        tiny.run, tmp_path, partial(Scaled, 1e25), tiny.images(14), max_steps=3, optim="sgd", learning_rate=1e-2
    )
    end = (
        run(max_grad_norm=max_grad_norm, **settings)
        if max_grad_norm
        else run(max_grad_norm=0.0, **{**settings, "learning_rate": 1e-27})
    )
    assert end["weights"]["linear.weight"].isfinite().all()
    assert 0.9e-2 < (end["weights"]["linear.weight"] - start).norm() < 3.1e-2 or not max_grad_norm
    assert all(1e24 < line["grad_norm"] < 1e27 and "skipped_steps" not in line for line in end["logs"][:-1])


class Opposed(SAMPaTrainer):
    """Gradients of the two passes of a step are finite, and their difference is not."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        steps = self._run.steps.micro_batches
        sign = 1 if steps.in_pass and steps.in_pass[1].name == "PERTURBED" else -1
        return loss * (sign * 3e38) if self.state.global_step == 2 and not self.sampa.rehearsing else loss


def test_what_overflows_in_the_mix_is_skipped(tmp_path):
    """g~_t and g_{t+1} are at the two ends of the range, and lambda's sum goes by way of their difference."""

    class Straight(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, pixel_values, labels=None):
            return {"loss": self.weight.sum() * (pixel_values.mean() * 0 + 1.0)}

    end = tiny.run(tmp_path, Straight, tiny.images(14), Opposed, max_steps=5, lmbda=0.5)
    assert end["logs"][4]["skipped_steps"] >= 1
    assert end["weights"]["weight"].isfinite().all()


def test_norms_and_inner_products_in_any_range():
    entries = randn(1000)
    for scale in SCALES:
        scaled = entries * scale
        expected = scaled.double().norm().item()
        assert global_norm([scaled[:300], scaled[300:]]).item() == pytest.approx(expected, rel=1e-6)
        assert inner([scaled], [-scaled], (expected, expected)).item() == pytest.approx(-(expected**2), rel=1e-5)
    found = norms([torch.zeros(2), torch.zeros(0), torch.full((2,), 1e200, dtype=torch.float64), torch.tensor(3 - 4j)])
    assert found.tolist() == pytest.approx([0.0, 0.0, 2**0.5 * 1e200, 5.0])
    assert norms([torch.tensor([1.0, float("nan")])]).isnan() and norms([torch.tensor([1.0, float("-inf")])]).isinf()


@pytest.mark.parametrize("norm", [float, torch.tensor], ids=["number", "tensor"])
def test_perturbations_of_length_rho_and_of_none(norm):
    for scale in (1e-37, 1e-20, 1.0, 1e20, 1e37):
        g, moved = torch.tensor([3.0, -4.0]) * scale, torch.empty(2)
        perturb([torch.zeros(2)], [g], 0.5, norm(5.0 * scale), out=[moved])
        torch.testing.assert_close(moved, torch.tensor([0.3, -0.4]))
    perturb([torch.ones(2)], [torch.zeros(2)], 0.5, norm(0.0), out=[moved])
    assert moved.tolist() == [1.0, 1.0]
    assert ratio(norm(2.0), norm(0.0)) == 0.0 and ratio(norm(2.0), norm(4.0)) == 0.5


# ---- What is refused ----


@pytest.mark.parametrize("make", [lambda: randn(1, 6).expand(4, 6), lambda: randn(6).as_strided((3, 2), (1, 1))])
def test_entries_that_share_memory_are_refused(tmp_path, make):
    with pytest.raises(
        ValueError,
        match=r"memory of its own, but 'extra' of shape .* has strides .*expand it in forward, or call .contiguous",
    ):
        SAMPaTrainer(model=Odd(nn.Parameter(make())), args=tiny.arguments(tmp_path), train_dataset=tiny.images(14))


def test_a_tied_weight_that_trainer_would_not_save_is_refused_before_the_first_step(tmp_path):
    model = Odd()
    model.other = nn.Linear(64, 3)
    model.other.weight = model.linear.weight
    with pytest.raises(
        ValueError,
        match=r"save_strategy: expected 'no', because 'linear.weight' and 'other.weight' are one tensor, and Odd is no Pre",
    ):
        tiny.run(tmp_path, model, tiny.images(14), **SETTINGS)
    assert tiny.run(tmp_path, model, tiny.images(14), max_steps=1)["steps"] == 1

    class Own(SAMPaTrainer):
        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir, {"first": self.model.linear.weight.detach()})

    assert tiny.run(tmp_path, model, tiny.images(14), Own, **SETTINGS)["steps"] == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rho": 1e300}, r"rho: expected at most 3.4e\+38, the largest number of float32, got 1e\+300"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number of at least 0, got inf"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number of at least 0, got nan"),
        ({"lmbda": float("nan")}, "lmbda: expected a number from 0 to 1, got nan"),
        ({"lmbda": float("inf")}, "lmbda: expected a number from 0 to 1, got inf"),
    ],
)
def test_numbers_that_no_weight_could_follow(tmp_path, setting, message, figure):
    with pytest.raises(ValueError, match=message):
        SAMPaTrainingArguments(str(tmp_path), use_cpu=True, **setting)
    figure("settings that are no use", 1, 1)


def test_a_radius_below_single_precision_is_none(tmp_path):
    ends = [tiny.run(tmp_path, tiny.bert, tiny.sentences(14), max_steps=3, rho=rho) for rho in (0.0, 1e-300)]
    assert tiny.differing(*(each["weights"] for each in ends)) == []


# ---- Thousands of parameters ----


class Thousands(nn.Module):
    def __init__(self, count: int):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 3)
        self.many = nn.ParameterList([nn.Parameter(torch.randn(1 + i % 3) * 0.01) for i in range(count)])

    def forward(self, pixel_values, labels=None):
        logits = self.linear(pixel_values.flatten(1))
        squares = torch.stack([param.square().sum() for param in self.many]).sum()
        return {"loss": nn.functional.cross_entropy(logits, labels) + 0.1 * squares, "logits": logits}


class Calls(TrainerCallback):
    """Counts what Python calls of this package, and of torch from within it, in step `at`."""

    def __init__(self, at: int):
        self.at, self.found = at, Counter()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            sys.setprofile(self.count)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        sys.setprofile(None)

    def count(self, frame, event, arg):
        if event in ("call", "c_call") and "hf_sampa" in frame.f_code.co_filename:
            self.found[arg.__name__ if event == "c_call" else frame.f_code.co_qualname] += 1


def calls(folder, count: int) -> Counter:
    counter = Calls(at=5)  # the first steps are on trial, and listen to every gradient
    tiny.run(folder, Thousands(count), tiny.images(14), max_steps=6, trainer_kwargs={"callbacks": [counter]})
    return counter.found


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not say of which class a method is")
def test_a_step_calls_little_per_parameter(tmp_path):
    """What one more parameter costs, wherever else the time goes: a count does not depend on the machine."""
    few, many = (calls(tmp_path, count) for count in (2000, 2400))
    per_parameter = {name: (many[name] - few[name]) / 400 for name in many}
    tensors = sum(per_parameter.get(name, 0.0) for name in TENSORS)
    assert tensors < 1.5  # G_t in ``.grad``
    assert per_parameter["GradientRecorder._record"] < 0.1  # the hook
    assert sum(per_parameter.values()) < 70


TENSORS = ("as_strided", "clone", "copy_", "detach", "empty_like", "mul", "reshape", "view", "zeros_like")


class Clock(TrainerCallback):
    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.thread_time())


def seconds_per_step(folder, trainer_class, count: int) -> float:
    """As the thread itself counts them; the first steps, which are on trial, left out."""
    clock = Clock()
    kwargs = {"callbacks": [clock]}
    tiny.run(folder, Thousands(count), tiny.images(14), trainer_class, max_steps=9, trainer_kwargs=kwargs)
    return statistics.median(end - start for start, end in zip(clock.ends[3:], clock.ends[4:], strict=False))


def seconds_of_the_arithmetic(folder, count: int) -> float:
    """Two passes and one update, by hand."""
    model, data, seconds = Thousands(count), tiny.images(4), []
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    batch = {"pixel_values": torch.stack([each["pixel_values"] for each in data]), "labels": torch.arange(4) % 3}
    for _ in range(6):
        start = time.thread_time()
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
        optimizer.step()
        seconds.append(time.thread_time() - start)
    return statistics.median(seconds[1:])


@pytest.mark.whole
@pytest.mark.distributed
def test_5000_tiny_parameters_cost_little_more_than_the_arithmetic(tmp_path, figure):
    def one(function, *args) -> float:
        return run_ranks(function, 1, tmp_path / "runs", *args, folder=tmp_path / "ranks")[0]

    rounds = [
        (
            one(seconds_of_the_arithmetic, 5000),
            one(seconds_per_step, SAMPaTrainer, 5000),
            one(seconds_per_step, Trainer, 5000),
        )
        for _ in range(3)
    ]
    arithmetic, sampa, plain = (statistics.median(each) for each in zip(*rounds, strict=True))
    print(
        f"5000 tiny parameters: {sampa / arithmetic:.2f} times the arithmetic of SAM, {sampa / plain:.2f} times plain Trainer"
    )
    figure("percent of SAM's arithmetic, 5000 parameters", 100, round(100 * sampa / arithmetic))
    # The goal is 1.3; what was seen on a busy machine 1.24.
    assert sampa < 1.4 * arithmetic

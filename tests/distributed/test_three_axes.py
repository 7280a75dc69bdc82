"""Timing x placement x variant: where the numbers live changes no bit, and one, two and four processes are one optimizer."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch

from hf_sampa.variants import VARIANTS, Direction, Mixing, Recipe
from hf_sampa.variants.directions import Smoothed
from hf_sampa.variants.mixing import Orthogonal, Penalty
from tests import tiny
from tests.distributed import test_variants
from tests.distributed.test_variants import Small, differences, settings, small
from tests.ranks import run_ranks


pytestmark = pytest.mark.distributed

SHARED = {"shard_optimizer": True}
# With which the state that this one's perturbation is made of would be in parts.
CASES, PAIRED = (
    [case for case in cases if case[0] != "precond_sam"] for cases in (test_variants.CASES, test_variants.PAIRED)
)
# What differs with placements: norms per tensor, a gradient per shard, another loss's, a mixing that reads dot products. Four
# processes on all variants are for make test-all.
KINDS = {"asam", "msam", "bisam own", "gsam"}
SOME = [case for case in CASES if case[0] in KINDS]
FEW_OR_ALL = [pytest.param(SOME, id="some"), pytest.param(CASES, id="all", marks=pytest.mark.whole)]


def train(folder, cases, changes, resume=None) -> dict:
    """With dropout, accumulation and a ragged last batch; `changes` to what `settings` says."""
    found = {}
    for case in cases:
        again = resume and str(resume / "-".join(case) / "checkpoint-5")
        chosen = {**settings(*case), "save_steps": 5, **changes}
        outcome = tiny.run(folder / "-".join(case), partial(small, case[0]), tiny.images(19), resume=again, **chosen)
        if changes:
            outcome["state"] = outcome.pop("optimizer")["state"]
        found[case] = outcome
    return found


def assert_parts_of(parts: list[dict], whole: list[dict]) -> None:
    """Each process has the whole run's weights and logs, and between them they hold its optimizer's state."""
    for case, expected in whole[0].items():
        ranks = [part[case] for part in parts]
        states = [rank.pop("state") for rank in ranks]
        state = expected.pop("optimizer")["state"]
        assert tiny.differing({i: own for part in states for i, own in part.items()}, state) == [], case
        assert max(map(len, states)) < len(state), case
        for found in ranks:
            pair = [{**each, "logs": tiny.without_cosine(each["logs"])} for each in (found, expected)]
            assert tiny.differing(*map(tiny.comparable, pair)) == [], case


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Every case that a pair can take, on one process, and the folder of the checkpoints."""
    folder = tmp_path_factory.mktemp("one")
    yield run_ranks(train, 1, folder, PAIRED, {}, folder=folder / "ranks"), folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The same on a pair that shares its optimizer."""
    folder = tmp_path_factory.mktemp("shared")
    yield run_ranks(train, 2, folder, PAIRED, SHARED, folder=folder / "ranks"), folder
    shutil.rmtree(folder)


def copied(found: list[dict]) -> list[dict]:
    return [{case: dict(outcome) for case, outcome in rank.items()} for rank in found]


def test_a_pair_with_one_optimizer_is_one_process(one, shared):
    assert_parts_of(copied(shared[0]), copied(one[0]))


@pytest.mark.parametrize(("processes", "changes"), [(2, SHARED), pytest.param(1, {}, marks=pytest.mark.whole)])
def test_resumed_is_never_stopped(one, shared, tmp_path, processes, changes):
    """Written by a pair that shares its optimizer, continued by one and by one process."""
    (expected, _), (_, written) = one, shared
    for found in run_ranks(train, processes, tmp_path / "out", PAIRED, changes, written, folder=tmp_path / "again"):
        for outcome in found.values():
            outcome.pop("state", None)
        without = {case: {**outcome} for case, outcome in expected[0].items()}
        for outcome in [*without.values(), *found.values()]:
            outcome.pop("optimizer", None)
            outcome["logs"] = tiny.without_cosine(outcome["logs"])
        assert differences(found, without) == []


@pytest.mark.parametrize("cases", FEW_OR_ALL)
def test_four_processes_that_share_an_optimizer_are_four_that_do_not(tmp_path, cases):
    """Two pairs in SAMPa's timing, four replicas in SAM's."""
    whole = run_ranks(train, 4, tmp_path / "whole", cases, {}, folder=tmp_path / "first")
    for rank in whole[1:]:
        assert differences(rank, whole[0]) == []
    assert_parts_of(run_ranks(train, 4, tmp_path / "shared", cases, SHARED, folder=tmp_path / "second"), whole)


def train_evenly(folder, replicas_of, cases) -> dict:
    """Without what a replica draws, or pads, for its own part; the update batch has 16 samples, whoever reads them."""
    found = {}
    for case in cases:
        if case[0] == "adasam":  # which has no SGD, and SAM's recipe
            continue
        size = 8 // replicas_of[case[1]]
        changes = {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": size, "save_strategy": "no"}
        chosen = {**settings(*case), **changes, "max_steps": 5}
        found[case] = tiny.run(folder / "-".join(case), partial(small, case[0], 0.0), tiny.images(32), **chosen)
    return found


@pytest.mark.parametrize("cases", FEW_OR_ALL)
@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.whole), 4])
def test_replicas_are_one_process_to_rounding(tmp_path, processes, cases):
    one = run_ranks(train_evenly, 1, tmp_path, {"sampa": 1, "sam": 1}, cases, folder=tmp_path / "one")[0]
    replicas = {"sampa": processes // 2, "sam": processes}
    for found in run_ranks(train_evenly, processes, tmp_path, replicas, cases, folder=tmp_path / "several"):
        differing = {
            case: max(
                (value - one[case]["weights"][name]).abs().max().item()
                for name, value in outcome["weights"].items()
                if value.is_floating_point()
            )
            for case, outcome in found.items()
        }
        assert {case: by for case, by in differing.items() if by > 1e-5} == {}


# ---- Recipes of one's own, of which the engine cannot know what they need whole ----


class Centred(Mixing):
    """Reads all entries of all tensors."""

    def __call__(self, g_tilde, g, norms, now):
        mean = torch.stack([each.sum() for each in g_tilde]).sum() / sum(each.numel() for each in g_tilde)
        for each in g_tilde:
            each.sub_(mean)


class Clipped(Penalty):
    """Says nothing of its own call, which reads all entries; the class above it is by entries."""

    def __call__(self, g_tilde, g, norms, now):
        largest = torch.stack([each.abs().max() for each in g]).max()
        for each in g_tilde:
            each.clamp_(-largest, largest)


class Following(Direction):
    """Sees g~_t of all parameters."""

    state = ("last",)

    def __init__(self):
        self.last = None

    def __call__(self, g, x, norm, now):
        for each, last in zip(g, self.last or [], strict=self.last is not None):
            each.add_(last)
        return sum(each.square().sum() for each in g).sqrt()

    def observe(self, g_tilde):
        self.last = [each.clone() for each in g_tilde]


RECIPES = {
    "a mixing that reads all entries": lambda: Recipe(mixing=Centred()),
    "a mixing that does not say so": lambda: Recipe(mixing=Clipped(0.5)),
    "a mixing that remembers": lambda: Recipe(mixing=Orthogonal(0.5)),
    "a direction that remembers": lambda: Recipe(direction=Smoothed(0.4)),
    "a direction that observes": lambda: Recipe(direction=Following()),
}
HALVES = {"a direction that remembers"}


def train_recipes(folder, changes, resume=None) -> dict:
    found = {}
    for name, recipe in RECIPES.items():
        again = resume and str(resume / name / "checkpoint-5")
        chosen = {**settings("sam", "sampa"), "save_steps": 5, **changes}
        outcome = tiny.run(
            folder / name,
            Small,
            tiny.images(19),
            trainer_kwargs={"recipe": recipe()},
            resume=again,
            **chosen,
        )
        found[name] = {key: value for key, value in outcome.items() if key != "optimizer"}
    return found


def test_recipes_of_ones_own(tmp_path):
    """Also after a resume, from where a pair that shares its optimizer was."""
    assert {name for name, recipe in RECIPES.items() if recipe().by_entries} == HALVES
    one = train_recipes(tmp_path / "one", {})
    for found in run_ranks(train_recipes, 2, tmp_path / "two", SHARED, folder=tmp_path / "first"):
        assert differences(found, one) == []
    for found in run_ranks(train_recipes, 2, tmp_path / "again", SHARED, tmp_path / "two", folder=tmp_path / "second"):
        assert differences(found, one) == []


def test_all_variants_mix_by_entries_in_a_pair():
    """So that a pair holds half of their gradients."""
    recipes = {case: VARIANTS[case[0].partition(" ")[0]].recipe(settings(*case)["variant_args"]) for case in PAIRED}
    assert [case for case, recipe in recipes.items() if not recipe.by_entries] == []

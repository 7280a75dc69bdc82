"""What is to hold of every trainer under the mixin. A module of tests has `CASES` and takes these tests in by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.ecosystem.runs import LOGGED_AT, STEPS, Case


def alike(left: dict, right: dict, *names: str) -> list[str]:
    """Where two outcomes differ in what `names` say."""
    return tiny.differing({name: left[name] for name in names}, {name: right[name] for name in names})


def evaluation_losses(outcome: dict) -> list[float]:
    """In their order, of every evaluation data set."""
    return [line[name] for line in outcome["evaluation"] for name in sorted(line) if name.endswith("_loss")]


def test_two_processes_are_one(case: Case, one, two):
    """Weights, optimizer and every number that is logged of training, with those that the trainer collects itself."""
    expected = one["whole"]
    assert expected["steps"] == STEPS and len(expected["training"]) == STEPS // LOGGED_AT + 1
    for rank in two:
        assert alike(expected, rank["whole"], "weights", "optimizer", "steps", "training") == []
    if case.evaluates_alike:
        losses = [evaluation_losses(found) for found in (expected, two[0]["whole"])]
        assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_resumed_is_never_stopped(two):
    for rank in two:
        expected, found = rank["whole"], rank["resumed"]
        names = ("weights", "optimizer", "steps", "training", "evaluation", "held")
        assert alike(expected, found, *names) == []


def test_one_process_resumes_what_two_wrote(one, two):
    assert alike(two[0]["whole"], one["crossed"], "weights", "optimizer", "steps", "training") == []


def test_the_best_weights_are_held_at_the_end(two):
    """Those of another checkpoint than the last, as the library alone loads them."""
    found = two[0]
    assert Path(found["best"]).name != f"checkpoint-{STEPS}"
    for rank in two:
        held = rank["whole"]["held"]
        assert tiny.differing(held, found["loaded"]["best"]) == []
        assert any(not torch.equal(value, rank["whole"]["weights"][name]) for name, value in held.items())


def test_the_library_alone_loads_what_was_saved(two):
    found = two[0]
    assert tiny.differing(found["whole"]["held"], found["loaded"]["saved"]) == []
    trained, saved = found["outputs"]
    assert trained.isfinite().all() and trained.std() > 0
    # Only nearly, as it depends on where in memory the weights lie in which order a product is added up.
    torch.testing.assert_close(trained, saved, rtol=1e-4, atol=1e-5)


def test_without_perturbation_and_look_ahead_it_is_the_library_s_trainer(one):
    """rho = lambda = 0 and no dropout, which the library draws from other generators: its own weights, bit for bit."""
    assert alike(one["plain"], one["flat"], "weights", "optimizer", "steps") == []


# The columns of the table of what was tried, see `table`.
PROPERTIES = {
    "one process = two": test_two_processes_are_one,
    "resumed = never stopped": test_resumed_is_never_stopped,
    "one process resumes what two wrote": test_one_process_resumes_what_two_wrote,
    "best model at the end": test_the_best_weights_are_held_at_the_end,
    "loads with the library alone": test_the_library_alone_loads_what_was_saved,
    "rho = lambda = 0 is the library's": test_without_perturbation_and_look_ahead_it_is_the_library_s_trainer,
}
__all__ = [test.__name__ for test in PROPERTIES.values()]

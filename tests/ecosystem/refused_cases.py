"""Trainers that are refused, and why."""

from __future__ import annotations


GENERATES = "generates its samples within the step, so that its two gradients would not be of one batch"
REFUSED = dict.fromkeys(["GRPOTrainer", "RLOOTrainer", "DistillationTrainer"], GENERATES)

"""What SAMPa's part of a checkpoint says of a run: where it is, what it is computed with, what it carries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger

from ..cards import bound, computation, masked, plain
from ..data import Place
from ..distributed import Role, whole
from ..engine import SAMPa
from ..state import stood_in
from . import checkpoint, saved_weights
from .in_parts import G_T, Spread, split


if TYPE_CHECKING:
    from ..run import Run

logger = get_logger(__name__)


def to_save(run: Run, folder: Path, in_parts: bool) -> tuple[dict[str, Any] | None, Spread]:
    """What `checkpoint.write_states` and `write_manifest` are to write, None on processes that do not; and what all write together.

    That is what is spread, where the checkpoint is `in_parts`. A collective.
    Raises RuntimeError where there is no one step whose state could be saved.
    """
    _check_savable(run, folder)
    trainer, engine = run.trainer, run.engine
    engine.check_alike()
    place = run.next_place()
    prints = fingerprints(run, place)
    grads, ascent, spread = {}, None, {}
    with stood_in(engine.weights, "gathers", not in_parts):
        if prints is not None and isinstance(engine, SAMPa):  # otherwise there is no batch that g_t is of
            grads, ascent = engine.state_dict()
        recipe = engine.recipe_state()
    weights = saved_weights.record(trainer.model, engine.names[: engine.of_model])
    others = dict(list(zip(engine.names, engine.params, strict=True))[engine.of_model :])
    others = {name: whole(param.detach()) for name, param in others.items()}
    if in_parts:
        recipe, lists = split(recipe)
        lists = {place: dict(zip(engine.names, each, strict=True)) for place, each in lists.items()}
        spread = {what: each for what, each in {G_T: grads, **lists}.items() if each}
        grads = {}
    of_all = run.exchange.share_objects(run.steps.collected.state_dict(saved=True))
    collected = [of_all[rank] for rank in run.mesh.ranks_of(Role.PERTURBED)]
    if not trainer.args.should_save:
        return None, spread
    position = {"epoch": place.epoch, "start": place.start, "fingerprints": prints}
    content = (
        _computed_with(run) | _progress(run) | {"position": position, "ascent": ascent or None, "weights": weights}
    )
    tensors = {
        "": grads,
        checkpoint.FORWARD_STATE: engine.forward_state.state_dict(),
        checkpoint.OTHERS: others,
    }
    states = {checkpoint.RECIPE: recipe}
    states[checkpoint.COLLECTED] = {"of_replicas": collected} if any(collected) else {}
    if trainer.args.save_only_model:
        content |= {"kept": "weights", "ascent": None}
        tensors[""], states = {}, {}
    return {"tensors": tensors, "content": content, "states": states}, spread


def _check_savable(run: Run, folder: Path) -> None:
    """Raise RuntimeError where there is no one step whose state could be saved; forget a g_t that was lost. A collective."""
    step, best = run.trainer.state.global_step, run.trainer.weights_step
    if best != step:
        raise RuntimeError(
            f"Expected the weights of step {step}, whose optimizer state there is, but load_best_model_at_end has loaded those "
            f"of step {best}. save_model() saves them; to go on, resume from the last checkpoint."
        )
    has_ascent = isinstance(run.engine, SAMPa) and run.engine.ascent is not None
    of_all = run.exchange.share_objects((step, run.broken, has_ascent))
    steps, broken, ascents = (set(each) for each in zip(*of_all, strict=True))
    if len(steps) > 1 or "in update" in broken:
        where = (
            "within the optimizer's step"
            if len(steps) == 1
            else f"after different steps, {sorted(steps)}, on its processes"
        )
        raise RuntimeError(
            f"Expected a run that stopped after a step, but it was interrupted {where}, so that weights and optimizer state may "
            "be of two steps. Resume from the last checkpoint."
        )
    if "in passes" in broken or len(ascents) > 1:
        lost = ""
        if isinstance(run.engine, SAMPa):
            run.engine.forget()
            lost = " g_t is lost, and is computed anew when the run goes on."
        logger.warning(
            f"The run was interrupted within a step: {folder} has the weights and the optimizer state before it.{lost} What "
            "goes on from there is close to a run that was never stopped, but not equal to it."
        )


def fingerprints(run: Run, place: Place) -> list[int] | None:
    """Of the next update batch, by replica, 0 where the data are over; None where it is not known. A collective."""
    own = torch.tensor([-1 if place.fingerprint is None else place.fingerprint], device=run.trainer.args.device)
    found = run.exchange.gather(own)[run.mesh.ranks_of(Role.PERTURBED), 0].tolist()
    return None if -1 in found else found


def _progress(run: Run) -> dict[str, Any]:
    trainer, engine = run.trainer, run.engine
    unlogged = run.resume.unlogged or {
        "loss": trainer._tr_loss.item(),
        "since_step": trainer._globalstep_last_logged,
        "means": run.means.state_dict(),
    }
    return {
        "continued": trainer.continued,
        "evaluations": plain(bound(trainer, trainer._card.evaluations), trainer.state.log_history),
        "plain_steps": run.plain_steps,
        "skipped": {"steps": engine.skipped_steps, "in_a_row": engine.skipped_in_a_row},
        "unlogged": unlogged,
        "moving": sorted(engine.forward_state.moving),
    }


# ---- What is compared when a run goes on ----


def _computed_with(run: Run) -> dict[str, Any]:
    return {
        "settings": settings(run),
        "recipe": recipe_settings(run),
        "optimizer": optimizer_name(run),
        "computation": computation(run.trainer),
        "stream": stream_settings(run),
    }


def settings(run: Run) -> dict[str, Any]:
    """What may change, with a warning."""
    args = run.trainer.args
    return {"method": args.method, "rho": args.rho, "lmbda": args.lmbda}


def recipe_settings(run: Run) -> dict[str, Any]:
    """What the step is made of."""
    args, own = run.trainer.args, run.trainer._recipe
    if own is None:
        return {"variant": args.variant, "variant_args": args.variant_args}
    return {kind: masked(part) for kind, part in own.settings.items()}


def optimizer_name(run: Run) -> str:
    """Class of the base optimizer."""
    return type(run.trainer.optimizer.optimizer).__name__


def stream_settings(run: Run) -> dict[str, Any]:
    """What decides which samples are in B_t."""
    args = run.trainer.args
    return {
        "per_device_train_batch_size": run.trainer._train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "replicas": args.num_replicas,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "train_sampling_strategy": args.train_sampling_strategy,
        "dataloader_drop_last": args.dataloader_drop_last,
    }

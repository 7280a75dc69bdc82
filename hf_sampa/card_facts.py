"""What a model card says of a run: what it was told, hyperparameters, cost, and how to run it again."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from transformers import Trainer


PACKAGES = ("hf_sampa", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft")
# Listed always, and first.
MAIN = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "data_seed")
# Where things are, who is told and what is shown: not part of what was computed.
NOT_OF_THE_COMPUTATION = (
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "log_level", "log_level_replica", "resume_from_checkpoint"),
    *("do_train", "do_eval", "do_predict", "eval_on_start", "deepspeed", "fsdp", "fsdp_config", "accelerator_config"),
    *("overwrite_output_dir", "num_train_epochs", "max_steps", "data_dir", "average_tokens_across_devices", "trackio_space_id", "lmbda", "diagnostics_steps"),
    *("dataloader_pin_memory", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
)  # fmt: skip
PREFIXES_NOT_OF_THE_COMPUTATION = (
    "hub_",
    "push_to_hub",
    "logging_",
    "save_",
    "eval_",
    "per_device_",
    "ddp_",
    "local_rank",
)
SECRET = re.compile(r"(^|[-_])(token|key|secret|password|credentials?)$", re.IGNORECASE)


@dataclass(slots=True)
class CardFacts:
    """What a run cannot know of itself, and its model card is to say; whatever is None, is looked for.

    Args:
        dataset: name of the data set, for people.
        dataset_tags: its identifier on the Hub.
        dataset_args: its configuration.
        dataset_split: the split that is evaluated on.
        tasks: the Hub's name of the task, ``"text-classification"`` for instance.
        language: of the data, as an ISO code.
        license: of the model, by the Hub's name of it; by default that of the base model.
        tags: more of them.
        finetuned_from: the base model, on the Hub or in a folder; by default where the model was loaded from.
        model_name: by default the name of the output folder.
    """

    dataset: str | list[str] | None = None
    dataset_tags: str | list[str] | None = None
    dataset_args: str | list[str] | None = None
    dataset_split: str | None = None
    tasks: str | list[str] | None = None
    language: str | list[str] | None = None
    license: str | None = None
    tags: str | list[str] | None = None
    finetuned_from: str | None = None
    model_name: str | None = None

    def for_trainer(self) -> dict[str, Any]:
        """Arguments of `Trainer.create_model_card`, which changes lists that it is given: copies."""
        return {name: fact for name, fact in dataclasses.asdict(self).items() if name != "dataset_split"}


def at_the_end(trainer: Trainer, seconds_per_step: float | None) -> list[str]:
    """Which weights these are, how sharp the loss is around them, and time per step."""
    state, step = trainer.state, trainer.weights_step
    lines = [f"steps: {state.global_step}, epochs: {state.epoch or 0:.4g}"]
    if step != state.global_step:
        lines.append(f"weights: those of step {step}, the best by {trainer.args.metric_for_best_model}")
    training, measured = (_last_up_to(step, state.log_history, name) for name in ("sharpness", "held_out_sharpness"))
    if training is None and step == state.global_step:
        training = {"step": step, **trainer.unlogged_means()}
    if training and "sharpness" in training:
        lines.append(
            "sharpness, which is the loss at the perturbed weights less the clean one, mean over the last steps up to "
            f"{training['step']}: {training['sharpness']:.4g}"
        )
    if measured:
        lines.append(
            f"on held-out batches, at the weights of step {_weights_step(measured)}: sharpness "
            f"{measured['held_out_sharpness']:.4g}, largest Hessian eigenvalue {measured['hessian_eigenvalue']:.4g}"
        )
    if seconds_per_step is not None:
        lines.append(f"seconds per step: {seconds_per_step:.4g}")
    return lines


def _last_up_to(step: int, history: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((line for line in reversed(history) if name in line and _weights_step(line) <= step), None)


def _weights_step(line: dict[str, Any]) -> int:
    """The step whose weights a log line is of."""
    return line.get("weights_step", line["step"])


def hyperparameters(trainer: Trainer, total_batch_size: int) -> dict[str, Any]:
    """Settings of the run: the main ones, what is SAMPa's, and whatever else is not as transformers has it."""
    args, mesh = trainer.args, trainer.args.mesh
    roles = (
        f"{mesh.world_size}: {mesh.num_replicas} at perturbed and {mesh.num_replicas} at look-ahead weights"
        if mesh.paired
        else "1, in both roles in turn"
        if args.method == "sampa"
        else f"{mesh.world_size}, data parallel"
    )
    found = {name: getattr(args, name) for name in MAIN if getattr(args, name) is not None}
    found |= {
        "method": args.method,
        "timing": "parallel, as in SAMPa" if args.method == "sampa" else "sequential, as in SAM",
        **_recipe(trainer),
        "rho": args.rho,
        **({"lmbda": args.lmbda} if args.method == "sampa" else {}),
        "processes": roles,
        "total_train_batch_size": total_batch_size,
        "train_batch_size_per_process": trainer._train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "eval_batch_size_per_process": args.per_device_eval_batch_size,
        **({"training_steps": args.max_steps} if args.max_steps > 0 else {"num_epochs": args.num_train_epochs}),
        "optimizer": _optimizer(args),
    }
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        hidden = name in NOT_OF_THE_COMPUTATION or name.startswith(PREFIXES_NOT_OF_THE_COMPUTATION) or "token" in name
        if name in found or hidden or name.startswith("adam_"):
            continue
        default = _default(field)
        if value != default and (value or default):  # nothing is nothing, whether False, None or an empty list
            found[name] = value
    return {name: getattr(value, "value", value) for name, value in found.items()}


def _recipe(trainer: Trainer) -> dict[str, str]:
    if trainer._recipe is not None:
        parts = {kind: trainer._recipe.settings[kind] for kind in trainer._recipe.changed_parts()}
        return {"recipe": ", ".join(f"{kind} {part}" for kind, part in parts.items()) or "SAM's own"}
    arguments = ", ".join(f"{name} = {value}" for name, value in trainer.args.variant_args.items())
    return {"variant": trainer.args.variant, "variant_args": arguments or "none"}


def _optimizer(args: Any) -> str:
    name = getattr(args.optim, "value", args.optim)
    if "adam" not in name:
        return f"{name} {args.optim_args or ''}".strip()
    return f"{name}, betas ({args.adam_beta1}, {args.adam_beta2}), epsilon {args.adam_epsilon} {args.optim_args or ''}".strip()


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def command(world_size: int) -> str:
    """How this process, and its peers, were started; without secrets.

    A run that was continued computed what one computes that was never stopped, so that is what the command starts.
    """
    script = _script()
    if script is None:
        return "Not from a script: the hyperparameters above are arguments of `SAMPaTrainingArguments`."
    start = ["python"]
    if world_size > 1:
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        nodes = ["--nnodes", str(world_size // on_this_node)] if world_size > on_this_node else []
        start = ["torchrun", *nodes, "--nproc_per_node", str(on_this_node)]
    threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
    return f"```bash\n{threads}{shlex.join([*start, *script, *_words(sys.argv[1:])])}\n```"


def _script() -> list[str] | None:
    """The script or ``-m`` and the module that Python runs; None for a notebook or an interpreter."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return None if "ipykernel" in spec.name else ["-m", spec.name.removesuffix(".__main__")]
    return [sys.argv[0]] if sys.argv[0].endswith(".py") and "ipykernel" not in sys.argv[0] else None


def _words(given: list[str]) -> list[str]:
    words, before = [], ""  # the option that has no value yet
    for word in given:
        name, equals, value = word.partition("=")
        option = word.startswith("-") and not SECRET.search(before)
        if (name if option else before).replace("-", "_") == "__resume_from_checkpoint":
            pass
        elif word.startswith("hf_") or (SECRET.search(before) and not option):
            words.append("HIDDEN")
        else:
            words.append(f"{name}=HIDDEN" if equals and (SECRET.search(name) or value.startswith("hf_")) else word)
        before = word if option and not equals else ""
    return words


def versions() -> dict[str, str]:
    """Of Python and the libraries that a run rests on, those that are installed."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

"""What a model card says of a run: what it was told, hyperparameters, sharpness and cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..distributed import shards_of
from ..monitoring import DiagnosticsCallback
from .harmless import HIDDEN, is_plain, masked, shown, types_of


# Listed always, and first.
MAIN = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "data_seed")
# Where things are, who is told and what is shown: not part of what was computed.
NOT_OF_THE_COMPUTATION = (
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "log_level", "log_level_replica", "resume_from_checkpoint"),
    *("do_train", "do_eval", "do_predict", "eval_on_start", "deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config"),
    *("overwrite_output_dir", "num_train_epochs", "max_steps", "data_dir", "average_tokens_across_devices", "trackio_space_id", "lmbda", "diagnostics_steps", "diagnostics_radius", "diagnostics_iterations", "ignore_changed_files"),
    *("optim", "optim_args", "bf16", "fp16", "batch_size"),
    *("dataloader_pin_memory", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
)  # fmt: skip
NOT_OF_THE_BASELINE = (
    "variant",
    "variant_args",
    "rho",
    "sampa_start",
    "shard_optimizer",
    "pairs_on_one_node",
    "overlap_exchange",
)
# How a step is computed; learning rate and weight decay have lines of their own.
NOT_OF_THE_OPTIMIZATION = {
    "lr",
    "decoupled_weight_decay",
    "weight_decay",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
}
NOT_OF_THE_ADAPTER = (
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
)
PREFIXES_NOT_OF_THE_COMPUTATION = (
    "hub_",
    "push_to_hub",
    "logging_",
    "save_",
    "eval_",
    "per_device_",
    "ddp_",
    "local_rank",
    "adam_",
)


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
        remarks: sentences on the training that nothing else says, what was done to the data for instance.

    Raises:
        TypeError: a fact is neither text nor, where there can be several, a list of texts.
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
    remarks: str | list[str] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        several = "list" in type(self).__annotations__.get(name, "")
        values = value if isinstance(value, list) and several else [value]
        if value is not None and not all(isinstance(each, str) for each in values):
            raise TypeError(
                f"{name}: expected text{' or a list of texts' if several else ''} for the model card, got {value!r}."
            )
        object.__setattr__(self, name, value)

    def for_trainer(self) -> dict[str, Any]:
        """Arguments of `Trainer.create_model_card`, which changes lists that it is given: copies."""
        return {
            name: fact for name, fact in dataclasses.asdict(self).items() if name not in ("dataset_split", "remarks")
        }


def at_the_end(trainer: Trainer, seconds_per_step: float | None) -> list[str]:
    """Which weights these are, how sharp the loss is around them, and time per step."""
    state, step = trainer.state, trainer.weights_step
    lines = [f"steps: {state.global_step}, epochs: {state.epoch or 0:.4g}", *trainer.continued]
    if plain := _plain_steps(trainer):
        lines.append(
            f"sharpness-aware from step {plain + 1} on; the steps before it are those of the base optimizer alone"
        )
    if step != state.global_step:
        best_by = shown("metric_for_best_model", trainer.args.metric_for_best_model)
        lines.append(f"weights: those of step {step}, the best by {best_by}")
    if (decay := getattr(trainer.args, "ema_decay", None)) is not None:
        lines.append(
            f"the weights are an exponential moving average of those after every update, with decay {decay:g}; a checkpoint has this "
            "in a file beside the trained ones"
        )
    training, measured = (_last_up_to(step, state.log_history, name) for name in ("sharpness", "held_out_sharpness"))
    if training is None and step == state.global_step:
        training = {"step": step, **trainer.unlogged_means()}
    if training and "sharpness" in training:
        lines.append(
            "sharpness, which is the loss at the perturbed weights less the clean one, mean over the last steps up to "
            f"{training['step']}: {training['sharpness']:.4g}"
        )
    if measured:
        eigenvalue = measured.get("hessian_eigenvalue")
        lines.append(
            f"on held-out batches, at the weights of step {_weights_step(measured)}: sharpness{_radius(trainer)} "
            f"{measured['held_out_sharpness']:.4g}"
            + ("" if eigenvalue is None else f", largest Hessian eigenvalue {eigenvalue:.4g}")
        )
    if seconds_per_step is not None:
        lines.append(f"seconds per step: {seconds_per_step:.4g}")
    return lines


def _plain_steps(trainer: Trainer) -> int:
    """How many steps come before the first sharpness-aware one; 0 of the baseline, which has none."""
    if trainer.args.method == "adamw" or trainer.state.max_steps <= 0:
        return 0
    return trainer.first_sharp_step()


def _radius(trainer: Trainer) -> str:
    """At which radius the sharpness was measured, and on how much, where that is known."""
    found = [each for each in trainer.callback_handler.callbacks if isinstance(each, DiagnosticsCallback)]
    if not found:
        return ""
    radius = trainer.args.rho if found[0].radius is None else found[0].radius
    return f" (radius {radius:g}, {found[0].batches} batch{'es' if found[0].batches > 1 else ''})"


def _last_up_to(step: int, history: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((line for line in reversed(history) if name in line and _weights_step(line) <= step), None)


def _weights_step(line: dict[str, Any]) -> int:
    """The step whose weights a log line is of."""
    return line.get("weights_step", line["step"])


def hyperparameters(trainer: Trainer, total_batch_size: int) -> dict[str, Any]:
    """Settings of the run: the main ones, what is SAMPa's, and whatever else is not as transformers has it, as far as it is harmless."""
    args = trainer.args
    found = {name: getattr(args, name) for name in MAIN if getattr(args, name) is not None}
    found |= optimization(trainer)
    if found["lr_scheduler_type"] != args.lr_scheduler_type:
        found.pop("warmup_steps", None)
    found |= {
        "method": args.method,
        **_step(trainer),
        "processes": _processes(trainer),
        # Sums on the CPU come out in another order with another number of them.
        **({"threads_per_process": torch.get_num_threads()} if args.device.type == "cpu" else {}),
        "total_train_batch_size": total_batch_size,
        "train_batch_size_per_process": trainer._train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "eval_batch_size_per_process": args.per_device_eval_batch_size,
        **({"training_steps": args.max_steps} if args.max_steps > 0 else {"num_epochs": args.num_train_epochs}),
        "mixed_precision": trainer.accelerator.mixed_precision,
        **_adapters(trainer.model),
    }
    declared, upstreams = types_of(type(args)), {field.name: field for field in dataclasses.fields(TrainingArguments)}
    apart = (*found, *NOT_OF_THE_COMPUTATION, *(NOT_OF_THE_BASELINE if args.method == "adamw" else ()))
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        if name in apart or name.startswith(PREFIXES_NOT_OF_THE_COMPUTATION):
            continue
        # A class of somebody's may have another one, which those who read the card do not know.
        default = _default(upstreams.get(name, field))
        if value != default and (value or default):  # nothing is nothing, whether False, None or an empty list
            found[name] = shown(name, value, declared[name])
    return {name: " ".join(str(getattr(value, "value", value)).split()) for name, value in found.items()}


def _processes(trainer: Trainer) -> str:
    """How many there are, and what each of them has."""
    mesh = trainer.args.mesh
    if mesh.world_size > 1 and (spread := shards_of([*trainer.model.parameters()], mesh)):
        role = "two roles of " if mesh.paired else "one role of " if trainer.args.method == "sam" else ""
        replicas, shards = mesh.num_replicas // spread.count, f"{spread.count} shard{'s' if spread.count > 1 else ''}"
        return f"{mesh.world_size}, {role}{f'{replicas} replicas x ' if replicas > 1 else ''}{shards} (FSDP2)"
    if mesh.paired:
        return f"{mesh.world_size}: {mesh.num_replicas} at perturbed and {mesh.num_replicas} at look-ahead weights"
    return "1, in both roles in turn" if trainer.args.method == "sampa" else f"{mesh.world_size}, data parallel"


def _step(trainer: Trainer) -> dict[str, Any]:
    """What a step is, unless it is the baseline's."""
    args = trainer.args
    if args.method == "adamw":
        return {}
    return {
        "timing": "parallel, as in SAMPa" if args.method == "sampa" else "sequential, as in SAM",
        **_recipe(trainer),
        "rho": args.rho,
        **({"lmbda": args.lmbda} if args.method == "sampa" else {}),
    }


def _recipe(trainer: Trainer) -> dict[str, str]:
    if trainer._recipe is not None:
        parts = [f"{kind} {trainer._recipe.settings[kind]}" for kind in trainer._recipe.changed_parts()]
        return {"recipe": masked(", ".join(parts)) or "SAM's own"}
    arguments = ", ".join(f"{name} = {value}" for name, value in trainer.args.variant_args.items())
    return {"variant": trainer.args.variant, "variant_args": arguments or "none"}


def computation(trainer: Trainer) -> dict[str, str]:
    """The hyperparameters that decide what is computed; not on how many processes."""
    found = hyperparameters(trainer, trainer.get_total_train_batch_size(trainer.args))
    apart = ("processes", "threads_per_process", "timing", "eval_batch_size_per_process")
    # The optimizer of a checkpoint keeps its own learning rate.
    given = {"learning rate given": str(trainer.args.learning_rate)}
    return {name: value for name, value in found.items() if name not in apart} | given


def changes(trainer: Trainer, before: dict[str, str]) -> list[str]:
    """What is computed otherwise now than `before`, which is what `computation` found then, in this version or an earlier one."""
    now, declared = computation(trainer), types_of(type(trainer.args))
    # An earlier version told more: whether that is another value now, is hidden.
    names = [
        n for n in {**now, **before} if before.get(n) != now.get(n) and not (n in before and now.get(n) == HIDDEN)
    ]

    def then(name: str) -> str:
        value = before.get(name, "none")
        return value if name not in declared or name in now else shown(name, value, declared[name])

    return [f"{name} {then(name)}, then {now.get(name, 'none')}" for name in names]


def optimization(trainer: Trainer) -> dict[str, Any]:
    """Optimizer, learning rate, weight decay and schedule, as they are and not as the arguments would have them."""
    if trainer.optimizer is None:
        return {}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    groups, names = optimizer.param_groups, optimizer.defaults.keys() - NOT_OF_THE_OPTIMIZATION

    def values(name: str) -> str:
        return " or ".join(dict.fromkeys(str(shown(name, group[name])) for group in groups if name in group))

    options = [
        f"{name} {value}" for name in sorted(names) if (value := values(name)) not in ("", "None", "False", "0")
    ]
    found = {"learning_rate": values("initial_lr") or values("lr"), "weight_decay": values("weight_decay")}
    schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    if schedule is not None and not getattr(trainer, "_created_lr_scheduler", False):
        found["lr_scheduler_type"] = type(schedule).__name__
    return {**found, "optimizer": ", ".join([type(optimizer).__name__, *options])}


def _adapters(model: Any) -> dict[str, str]:
    """Settings of peft's adapters, as far as they are not peft's own."""
    found = {}
    for name, config in getattr(model, "peft_config", {}).items():
        declared = types_of(type(config))
        fields = {field.name: (getattr(config, field.name), _default(field)) for field in dataclasses.fields(config)}
        changed = {k: v for k, (v, default) in fields.items() if v != default and k not in NOT_OF_THE_ADAPTER}
        kept = {k: shown(k, sorted(v) if isinstance(v, set) else v, declared[k]) for k, v in changed.items()}
        parts = [f"{k} {v}" for k, v in kept.items()]
        found[f"adapter {name if is_plain(name) else HIDDEN}"] = ", ".join([config.peft_type.value, *parts])
    return found


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default

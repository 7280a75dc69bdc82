"""SAMPa's settings, as a mixin for any `TrainingArguments`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from .compat import check_shards, keeps_best_step, without_cpu_index
from .distributed import SIZE_VARIABLES, Mesh, peers_expected, role_world, whole_size_and_rank
from .state import stood_in
from .variants import Recipe, Variant, find, parse_arguments


LARGEST_RHO = torch.finfo(torch.float32).max


def named_world_size() -> str | None:
    """The environment variable by which a launcher said how many processes there are; None without a launcher."""
    return next((name for name in SIZE_VARIABLES if name in os.environ), None)


def launched_world_size() -> int:
    """Number of processes that the launcher started, 1 without a launcher."""
    name = named_world_size()
    return int(os.environ[name]) if name else 1


@dataclass
class SAMPaArgumentsMixin:
    """Fields that SAMPa adds to a `TrainingArguments` class: put it first, ``class Mine(SAMPaArgumentsMixin, Base)``.

    Two inherited settings are decided here. `use_cpu` becomes True on a machine without an accelerator, since processes
    that a launcher started would each train alone otherwise. `average_tokens_across_devices` becomes False, since it
    averages over both roles; SAMPa weighs every micro-batch by its items over the replicas itself.

    Args:
        method (`str`, defaults to `"sampa"`):
            `"sampa"`: both gradients at once, on two processes or in turn on one. `"sam"`: sequential SAM.
        variant (`str`, defaults to `"sam"`):
            What the step does, a name from the catalogue that ``python -m hf_sampa.variants`` prints; `method` is when its
            gradients are computed.
        variant_args (`dict` or list of ``"name=value"``, *optional*):
            Arguments of the variant; those that are missing have the catalogue's defaults.
        rho (`float`, *optional*):
            Radius of the perturbation, at least 0. Denoted as rho in the paper. By default the variant's own: 0.05 for SAM.
        lmbda (`float`, *optional*):
            Weight of the look-ahead gradient, 0 to 1. Denoted as lambda in the paper. 0.2 by default. SAM does not use it.
        sampa_start (`float`, defaults to 0):
            Where sharpness-aware steps begin: below 1 a fraction of all steps, from 1 on after so many steps. Those before it are the base
            optimizer's alone, data parallel over all processes, on the same update batches. For every method and variant.
        shard_optimizer (`bool`, defaults to `False`):
            Whether all processes share one optimizer (under FSDP the two of each pair): each updates, and holds the state of, its part
            of the parameters. Only for optimizers that treat every parameter on its own.
        pairs_on_one_node (`bool`, defaults to `False`):
            Whether the two processes of a pair have ranks 2r and 2r + 1, so that a node has both of them, instead of r and r + k, so that
            a node has replicas of one role. Of several nodes the latter sends less between them, but for many replicas under FSDP.
        overlap_exchange (`bool`, defaults to `True`):
            Whether gradients travel while backward is still running.
        ignore_changed_files (`bool`, defaults to `False`):
            Whether to go on from a checkpoint some of whose files are not as they were written. By default that is refused, or
            passed over by ``resume_from_checkpoint=True``.
        diagnostics_steps (`int`, defaults to 0):
            Every so many steps, measure and log what is not free: see `hf_sampa.monitoring.diagnostics.DiagnosticsCallback`. 0: never.
        diagnostics_radius (`float`, *optional*):
            Radius at which that measures the sharpness on held-out batches, at least 0. By default the run's rho.
        diagnostics_iterations (`int`, defaults to 20):
            Products with the Hessian, at most, for its largest eigenvalue; they are most of what measuring costs. 0: it is left out.

    Raises:
        ValueError: a setting is out of range, or not to be had together with SAMPa.
    """

    METHODS: ClassVar[tuple[str, ...]] = ("sampa", "sam")
    _from_variant: ClassVar[list[str]] = []  # what was not given; in files from before there was such a list, nothing
    _defaults: ClassVar[dict[str, Any]] = {}

    method: str = field(
        default="sampa",
        metadata={
            "help": "sampa: look-ahead and perturbed gradient at once, by two processes (or in turn by one). "
            "sam: sequential SAM, two gradients on the same batch, all processes data parallel."
        },
    )
    variant: str = field(
        default="sam",
        metadata={
            "help": "What the step does: a name from the catalogue of sharpness-aware methods, which "
            "`python -m hf_sampa.variants` prints. method is when its gradients are computed."
        },
    )
    variant_args: list[str] | None = field(
        default=None,
        metadata={"help": "Arguments of the variant, as in `--variant vasso --variant_args theta=0.9`."},
    )
    rho: float | None = field(
        default=None,
        metadata={
            "help": "Radius of the perturbation (rho, at least 0). None stands for the variant's own: for sam 0.05, which the "
            "paper uses on CIFAR-10 and most of GLUE."
        },
    )
    lmbda: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the look-ahead gradient in the SAMPa gradient (lambda, 0 to 1). The paper: 0.2 in vision, which None "
            "stands for, 0.1 on GLUE; 0 is SAMPa-0, 1 is optimistic gradient descent. Unused by sam."
        },
    )
    sampa_start: float = field(
        default=0.0,
        metadata={
            "help": "Where sharpness-aware steps begin: below 1 a fraction of all steps, from 1 on after so many steps. Those before it are "
            "the base optimizer's alone, shared out among all processes."
        },
    )
    shard_optimizer: bool = field(
        default=False,
        metadata={
            "help": "Let all processes share one optimizer, each updating its part of the parameters and holding that part of the "
            "state: less memory, the same numbers. One process alone has nothing to share."
        },
    )
    pairs_on_one_node: bool = field(
        default=False,
        metadata={
            "help": "Give the two processes of a pair neighbouring ranks, so that both are on one node, and not each role to nodes of "
            "its own, which sends less between nodes. The numbers are the same."
        },
    )
    overlap_exchange: bool = field(
        default=True,
        metadata={
            "help": "Send gradients to the other process while backward is still running. Turn it off for models whose "
            "backward reads a weight after that weight's gradient is complete, as weight.data perhaps. Autograd reports most "
            "such models, and the first steps try the others out, unless they do it in later batches only or hide a NaN."
        },
    )
    concurrent: bool = field(
        default=False,
        metadata={
            "help": "On one process, take both gradients of a step in one pass, in which frozen layers are computed for both at once: for "
            "adapters, with few tokens per batch. The numbers are those of two passes, which the first step checks."
        },
    )
    ignore_changed_files: bool = field(
        default=False,
        metadata={
            "help": "Go on from a checkpoint some of whose files were changed on purpose after they were written, as an edited "
            "config.json or weights that were saved again. Otherwise it is refused, with the names of these files."
        },
    )
    diagnostics_steps: int = field(
        default=0,
        metadata={
            "help": "Every so many steps, measure how good the look-ahead is, the sharpness on held-out batches and the largest "
            "Hessian eigenvalue, and log them; the training stays the same. 0: never. In small trials one measurement took as "
            "long as 2 to 12 steps."
        },
    )
    diagnostics_radius: float | None = field(
        default=None,
        metadata={
            "help": "With diagnostics_steps: radius of the sharpness on held-out batches, in the units of the weights, at least 0. None "
            "stands for rho. Give runs that are compared the same one."
        },
    )
    diagnostics_iterations: int = field(
        default=20,
        metadata={
            "help": "With diagnostics_steps: products with the Hessian, at most, for its largest eigenvalue; they are most of what measuring "
            "costs. 0: the eigenvalue is left out."
        },
    )

    def __post_init__(self):
        self._refuse_deepspeed()
        self.variant_args = parse_arguments(self.variant_args)
        self._from_variant = [name for name in ("variant_args", "rho", "lmbda") if getattr(self, name) in (None, {})]
        self._take_defaults()
        if not torch.accelerator.is_available():
            self.use_cpu = True
        drop_last = self.dataloader_drop_last
        super().__post_init__()
        if self.num_replicas == 1:
            # sentence-transformers sets it in a world of two, for the sake of DDP; here that world reads one stream.
            self.dataloader_drop_last = drop_last
        self.average_tokens_across_devices = False
        self.check_settings()

    @cached_property
    def _setup_devices(self):
        """Upstream's lets the processes of a CPU wait for one another for half an hour, whatever `ddp_timeout` is."""
        begin = partial(torch.distributed.init_process_group, timeout=self.ddp_timeout_delta)
        with stood_in(torch.distributed, "init_process_group", begin), peers_expected():
            return without_cpu_index(super()._setup_devices)

    @property
    def mesh(self) -> Mesh:
        """This process's place among the others. Raises ValueError for a world that `method` cannot use."""
        place = whole_size_and_rank(self.world_size, self.process_index)
        return Mesh.for_method(self.method, *place, neighbours=self.pairs_on_one_node)

    @property
    def num_replicas(self) -> int:
        """Processes that share one update batch; half of them for SAMPa, all of them otherwise."""
        return self.mesh.num_replicas

    @contextmanager
    def world_of_role(self) -> Iterator[None]:
        """Within the block the world is that of this process's role: to shard a model, or to load one that shards itself, before the trainer is made. A collective.

        As in ``with args.world_of_role(): model = AutoModel.from_pretrained(name, distributed_config=DistributedConfig(fsdp_size=4))``.
        """
        check_shards()
        with role_world(self.mesh, self.ddp_timeout_delta).lent_to_shard():
            yield

    def recipe(self) -> Recipe:
        """What a step is made of. Raises ValueError for unknown or impossible arguments of the variant."""
        return find(self.variant).recipe(self.variant_args)

    def first_sharp_step(self, max_steps: int) -> int:
        """t of the first sharpness-aware step of `max_steps`. Raises ValueError where there would be none."""
        if self.sampa_start < 1:
            return max(0, min(round(self.sampa_start * max_steps), max_steps - 1))
        if self.sampa_start >= max_steps:
            raise ValueError(
                f"sampa_start: expected a fraction below 1, or a step below the {max_steps} of the run, got {self.sampa_start:g}: no step "
                "would be sharpness-aware. Lower it, or train with Trainer."
            )
        return int(self.sampa_start)

    def _take_defaults(self) -> None:
        """Set what was not given to the variant's own; anew, where another one was set since, as a search over them does."""
        chosen = find(self.variant)
        self.variant = chosen.name
        defaults = {
            "variant_args": chosen.complete({}),
            "rho": chosen.rho,
            "lmbda": 0.2 if chosen.lmbda is None else chosen.lmbda,
        }
        for name in self._from_variant:
            if getattr(self, name) in (None, {}, self._defaults.get(name)):
                setattr(self, name, defaults[name])
        self._defaults = defaults

    def _refuse_deepspeed(self) -> None:
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
            raise ValueError(
                "SAMPa displaces weights between two passes, but this run uses DeepSpeed, whose engine holds them in a way of its own. "
                "Launch it without: python -m hf_sampa launch script.py. Models that are too large for that go with FSDP2, as fsdp=True."
            )

    def check_settings(self) -> None:
        """Raise ValueError where a setting is out of range; a hyperparameter search sets them after construction."""
        if self.method not in self.METHODS:
            raise ValueError(f"method: expected one of {', '.join(self.METHODS)}, got {self.method!r}.")
        self._take_defaults()
        if not (
            isinstance(self.rho, int | float)
            and not isinstance(self.rho, bool)
            and math.isfinite(self.rho)
            and self.rho >= 0
        ):
            raise ValueError(f"rho: expected a finite number of at least 0, got {self.rho!r}. The paper uses 0.05.")
        if self.rho > LARGEST_RHO:
            raise ValueError(
                f"rho: expected at most {LARGEST_RHO:.3g}, the largest number of float32, got {self.rho!r}. The paper uses 0.05."
            )
        if not (isinstance(self.lmbda, int | float) and not isinstance(self.lmbda, bool) and 0 <= self.lmbda <= 1):
            raise ValueError(f"lmbda: expected a number from 0 to 1, got {self.lmbda!r}. The paper uses 0.2 and 0.1.")
        if isinstance(self.learning_rate, int | float) and not 0 <= self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate: expected a finite number of at least 0, got {self.learning_rate!r}: the first step would make "
                "every weight infinite or NaN."
            )
        self._check_start()
        steps = self.diagnostics_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"diagnostics_steps: expected a whole number of steps, or 0 for never, got {steps!r}.")
        radius = self.diagnostics_radius
        is_number = isinstance(radius, int | float) and not isinstance(radius, bool)
        if radius is not None and not (is_number and 0 <= radius <= LARGEST_RHO):
            raise ValueError(
                f"diagnostics_radius: expected a number from 0 to {LARGEST_RHO:.3g}, or None for rho, got {radius!r}."
            )
        iterations = self.diagnostics_iterations
        if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
            raise ValueError(
                f"diagnostics_iterations: expected a whole number of products, or 0 for no eigenvalue, got {iterations!r}."
            )
        self._check_variant(find(self.variant))
        self._check_concurrent()
        if self.shard_optimizer and self.save_on_each_node:
            raise ValueError(
                "shard_optimizer: expected save_on_each_node=False, because the whole optimizer is brought together on rank 0 alone. "
                "Leave one of them out."
            )
        if "lomo" in self.optim or self.optim.endswith("_layerwise"):
            raise ValueError(
                f"optim: expected an optimizer whose step comes after backward, got {str(self.optim.value)!r}, which updates "
                "during backward, while the weights are displaced."
            )
        if self.save_strategy == "best" and self.load_best_model_at_end and not keeps_best_step():
            raise ValueError(
                "save_strategy: expected 'steps' or 'epoch' together with load_best_model_at_end, got 'best', with which this "
                "transformers loads no model at the end. Take one of those, or transformers 5.4 or newer."
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy: expected 'random', 'sequential' or 'group_by_length', got 'batch_rebalance', "
                "which gives every process batches of its own, while both roles of SAMPa must read the same ones."
            )

    def _check_start(self) -> None:
        start = self.sampa_start
        is_number = isinstance(start, int | float) and not isinstance(start, bool) and math.isfinite(start)
        if not (is_number and start >= 0 and (start < 1 or start == int(start))):
            raise ValueError(
                f"sampa_start: expected a fraction of the steps, from 0 to below 1, or a whole number of steps, got {start!r}."
            )

    def _check_concurrent(self) -> None:
        if not self.concurrent:
            return
        expected = {
            f"method='sampa', got {self.method!r}, whose second gradient needs the first": self.method != "sampa",
            f"one process, got {self.world_size}, of which each takes one of the gradients": self.world_size > 1,
            "torch_compile=False: a compiled model cannot meet another pass of itself within": self.torch_compile,
        }
        for what, wrong in expected.items():
            if wrong:
                raise ValueError(f"concurrent: expected {what}. Leave concurrent out, or change that.")

    def _check_variant(self, chosen: Variant) -> None:
        self.variant_args = chosen.complete(self.variant_args)
        chosen.recipe(self.variant_args)  # refuses arguments that do not go together
        if self.method not in (*chosen.timings, "adamw"):
            raise ValueError(
                f"method: expected {chosen.timings[0]!r} for variant {chosen.name!r}, because {chosen.why}; got "
                f"{self.method!r}. Set method={chosen.timings[0]!r}, or take another variant."
            )
        if chosen.lmbda not in (None, self.lmbda):
            raise ValueError(
                f"lmbda: expected {chosen.lmbda:g}, which is what variant {chosen.name!r} is, got {self.lmbda:g}. Leave it "
                "out, or leave the variant out."
            )


@dataclass
class SAMPaTrainingArguments(SAMPaArgumentsMixin, TrainingArguments):
    """`transformers.TrainingArguments` with SAMPa's settings; see `SAMPaArgumentsMixin`."""

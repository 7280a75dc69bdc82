"""The model card: what upstream knows of a run, and all that it leaves out or gets wrong, in a text of our own."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer
from transformers.modelcard import TASK_MAPPING

from ..distributed import class_of
from ..files import in_place_of
from ..variants import find
from . import card_facts, evaluations, started
from .card_facts import CardFacts
from .citations import arxiv_tags, cite, linked
from .harmless import HIDDEN
from .loading import loading_of
from .origin import base_model_of, dataset_of, first, listed, origin, trained_on
from .signature import is_ours, signed, text_of, unsigned


TEMPLATE = Path(__file__).with_suffix(".md")
# Never a bare "sam", which means Segment Anything on the Hub.
TAGS = {
    "sampa": ("sampa", "sharpness-aware-minimization", "arxiv:2410.10683"),
    "sam": ("sharpness-aware-minimization", "arxiv:2010.01412"),
    "adamw": (),
}
PROJECT = "https://github.com/hf-sampa/hf_sampa"
HOW = {
    "sampa": "[SAMPa](https://arxiv.org/abs/2410.10683) (Xie, Pethick, Cevher, NeurIPS 2024)",
    "sam": "[SAM](https://arxiv.org/abs/2010.01412) (Foret et al., ICLR 2021)",
    "adamw": "the plain Trainer of transformers, as a baseline to compare sharpness-aware minimization with",
}
FLAT = (
    "Sharpness-aware minimization looks for weights whose whole neighbourhood has a low loss, because such flat minima tend to "
    "generalize better"
)
SHARPNESS_AWARE = f"{FLAT}: each update takes the gradient at weights perturbed uphill by a distance rho."
SYMBOLS = {
    "sampa": "(x_t: the weights; g_t: the gradient at the look-ahead weights y_t; eps_t: the perturbation; g~_t: the gradient at "
    "the perturbed weights; G_t: what the optimizer gets.)",
    "sam": "(x_t: the weights; g_t: the gradient there; eps_t: the perturbation; g~_t: the gradient at the perturbed weights; "
    "G_t: what the optimizer gets.)",
}
PARALLEL = (
    f"{SHARPNESS_AWARE} To know where uphill is takes another gradient, which SAM computes first and SAMPa one step early, at "
    "look-ahead weights, so that two processes compute both at the same time."
)
EXPLANATIONS = {
    "sampa": f"{PARALLEL} A part lambda of the look-ahead gradient goes into the update, too.",
    "sam": f"{SHARPNESS_AWARE} To know where uphill is takes another gradient, computed first, on the same batch.",
    "adamw": "Each update takes one gradient, at the weights themselves.",
}


@cache
def _template() -> jinja2.Template:
    return jinja2.Template(TEMPLATE.read_text(encoding="utf-8"))


def is_of_a_run(file: Path) -> bool:
    """Whether `file` is a whole card of ours that tells of training steps."""
    return file.exists() and is_ours(text := text_of(file)) and re.search(r"^- steps: [1-9]", text, re.M) is not None


def lead_to(file: Path, repository: str | None) -> None:
    """Let the code in a card of ours load the model from `repository`, unless that is None."""
    if repository is not None:
        text = re.sub(r'^name = ".*$', f'name = "{repository}"', unsigned(text_of(file)), count=1, flags=re.MULTILINE)
        put(file, text)


def put(file: Path, text: str) -> None:
    """Write the card `text`, with its checksums, in the place of `file`, which is whole at any moment."""
    with in_place_of(file) as partial:
        partial.write_text(signed(text), encoding="utf-8")


def write(
    file: Path,
    trainer: Trainer,
    data: ModelCardData,
    facts: CardFacts,
    repository: str | None,
    seconds_per_step: float | None,
) -> None:
    """Write the card of `trainer`'s run, as far as it is, to `file`.

    Args:
        file: replaced.
        trainer: one with SAMPa's arguments.
        data: what upstream found out: license, language, base model, tags, data sets; changed in place.
        facts: what the run cannot know.
        repository: where others load the model from; None for the folder of the card.
        seconds_per_step: mean over the run; None where there were no steps.
    """
    args, dataset = trainer.args, dataset_of(trainer, facts, data)
    found = evaluations.evaluations(trainer, trainer._card.evaluations)
    task = first(facts.tasks) or data.pipeline_tag or _task_of(trainer.model) or "unknown"
    results = evaluations.results(found, trainer.weights_step, task, dataset)
    folder = base_model_of(trainer, data, facts.finetuned_from)
    _complete(data, trainer, facts, [each.entry for each in results if each.step == trainer.weights_step])
    content = _template().render(
        model_name=data.model_name,
        repository=repository,
        origin=origin(data.base_model, folder, trained_on(trainer, facts, data, dataset)),
        how=_how(args),
        project=PROJECT,
        explanation=_explanation(args),
        loading=loading_of(trainer),
        results=[each.cells() for each in results],
        at_the_end=[
            *map(evaluations.cell, filter(None, listed(facts.remarks))),
            *card_facts.at_the_end(trainer, seconds_per_step),
        ],
        curve=evaluations.curve(trainer.state.log_history, found),
        hyperparameters=card_facts.hyperparameters(trainer, trainer.get_total_train_batch_size(args)),
        hidden=HIDDEN,
        command=started.command(type(args), args.world_size, bool(trainer.continued)),
        versions=started.versions(),
        citations=cite(args.method, _source(args), _model_type(trainer), data.base_model),
        card_data=data.to_yaml(),  # last: what the run was trained on is added to it
    )
    text = re.sub(r"\n{3,}", "\n\n", f"{ModelCard(content)}".rstrip()) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    put(file, text)


def _complete(data: ModelCardData, trainer: Trainer, facts: CardFacts, results: list[EvalResult]) -> None:
    """Add tags, name and results to the metadata."""
    args = trainer.args
    tags = [*(data.tags or []), *TAGS[args.method], *arxiv_tags(_source(args) or "")]
    # peft tags adapters with their base model, even with the path of a folder.
    elsewhere = {"sam", *(tag for tag in tags if tag.startswith("base_model:") and not data.base_model)}
    data.tags = [tag for tag in dict.fromkeys(tags) if tag not in elsewhere]
    data.model_name = facts.model_name or data.model_name or Path(args.output_dir).resolve().name
    if hasattr(trainer.model, "peft_config"):
        data.library_name = "peft"
    data.eval_results = results
    metrics = [each.metric_type for each in results if each.metric_type != "loss"]
    data.metrics = list(dict.fromkeys(metrics)) or None


def _source(args: Any) -> str | None:
    """Where the variant comes from, unless it is the method itself."""
    return None if _is_plain(args) else find(args.variant).source


def _is_plain(args: Any) -> bool:
    """Whether there is nothing to say of a variant: of the method itself, and of the baseline, which uses none."""
    return args.variant == "sam" or args.method == "adamw"


def _model_type(trainer: Trainer) -> str | None:
    return getattr(getattr(trainer.model, "config", None), "model_type", None)


def _task_of(model: Any) -> str | None:
    """The Hub's name of what a model does, as upstream finds it."""
    name = class_of(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    return next((task for task, classes in TASK_MAPPING.items() if name in classes.values()), None)


def _how(args: Any) -> str:
    if _is_plain(args) or args.variant == "sampa_0":
        return HOW[args.method]
    chosen = find(args.variant)
    what = chosen.summary.partition(":")[0]
    if not chosen.rho:
        return f"{what} ({linked(chosen.source)}), which seeks flat minima without a perturbation"
    return f"{HOW[args.method]}, in the variant {what} ({linked(chosen.source)})"


def _explanation(args: Any) -> str:
    if _is_plain(args):
        return EXPLANATIONS[args.method]
    chosen = find(args.variant)
    what = f"{chosen.summary.rstrip('.')}."
    # Sequential variants, and one whose lambda is 1, may not do what is said of the method.
    of_sampa = {None: EXPLANATIONS["sampa"], 0.0: PARALLEL}
    general = of_sampa.get(chosen.lmbda, f"{FLAT}.") if args.method == "sampa" else f"{FLAT}."
    return f"{general} {what} {SYMBOLS[args.method]}" if "_t" in what else f"{general} {what}"

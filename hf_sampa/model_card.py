"""What the automatic model card leaves out or gets wrong: method, rho, lambda, roles, and the true batch size."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from huggingface_hub import ModelCard

from .training_args import SAMPaArgumentsMixin
from .variants import find


# Never a bare "sam", which means Segment Anything on the Hub.
TAGS = {
    "sampa": ("sampa", "sharpness-aware-minimization", "arxiv:2410.10683"),
    "sam": ("sharpness-aware-minimization", "arxiv:2010.01412"),
}

SECTIONS = {
    "sampa": """
## SAMPa

Trained with [SAMPa](https://arxiv.org/abs/2410.10683) (Xie, Pethick, Cevher, NeurIPS 2024), sharpness-aware minimization
whose two gradients are computed at the same time: one at weights perturbed towards higher loss, the other at look-ahead
weights. rho = {rho}, lambda = {lmbda}, {processes}.

```bibtex
@inproceedings{{xie2024sampa,
  title     = {{{{SAMPa}}: Sharpness-aware Minimization Parallelized}},
  author    = {{Xie, Wanyun and Pethick, Thomas and Cevher, Volkan}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year      = {{2024}}
}}
```
""",
    "sam": """
## Sharpness-aware minimization

Trained with sequential [SAM](https://arxiv.org/abs/2010.01412) (Foret et al., ICLR 2021): the gradient is taken at weights
perturbed towards higher loss on the same batch. rho = {rho}, {processes}.
""",
}


def complete(file: Path, args: SAMPaArgumentsMixin, total_batch_size: int) -> None:
    """Correct and extend the card that `Trainer.create_model_card` wrote to `file`.

    Args:
        file: the card, changed in place.
        args: settings of the run.
        total_batch_size: samples in one update batch, over all its micro-batches and replicas.
    """
    card = ModelCard.load(file)
    tags = card.data.tags or []
    card.data.tags = tags + [tag for tag in TAGS[args.method] if tag not in tags]
    ours = {"method": args.method, "rho": args.rho}
    if args.method == "sampa":
        ours["lmbda"] = args.lmbda
    if args.variant != "sam":
        ours["variant"] = args.variant
        ours["variant_args"] = args.variant_args
    ours["total_train_batch_size"] = total_batch_size
    # Upstream multiplies by the number of processes, although the two of a pair read one batch.
    text = re.sub(r"^- total_train_batch_size: .*\n", "", card.text, flags=re.MULTILINE)
    lines = "".join(f"- {name}: {value}\n" for name, value in ours.items())
    text = re.sub(r"^(- lr_scheduler_type: )", lambda match: lines + match[1], text, count=1, flags=re.MULTILINE)
    card.text = text.rstrip() + "\n" + _section(args)
    card.save(file)


def _section(args: SAMPaArgumentsMixin) -> str:
    if args.mesh.paired:
        processes = f"on {args.world_size} processes ({args.num_replicas} per role)"
    else:
        processes = f"on {args.world_size} process(es)"
    section = SECTIONS[args.method].format(rho=args.rho, lmbda=args.lmbda, processes=processes)
    if args.variant == "sam":
        return section
    chosen = find(args.variant)
    settings = ", ".join(f"{name} = {value}" for name, value in args.variant_args.items())
    what = " ".join(inspect.getdoc(chosen.make).split())
    return (
        f"{section}\nVariant `{chosen.name}`{f' ({settings})' if settings else ''}. {what} Source: {chosen.source}.\n"
    )

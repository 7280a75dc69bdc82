"""What a model card cites: the method, the variant, and the models that are fine-tuned most; entries in citations.bib."""

from __future__ import annotations

import re
from pathlib import Path


# By the arXiv number of each.
ENTRIES = {
    re.search(r"eprint = {(\d{4}\.\d{5})}", entry)[1]: entry
    for entry in Path(__file__).with_suffix(".bib").read_text(encoding="utf-8").strip().split("\n\n")
}
METHODS = {"sampa": "2410.10683", "sam": "2010.01412", "adamw": "1711.05101"}
# By the `model_type` of a configuration.
MODELS = {"bert": "1810.04805", "distilbert": "1910.01108", "roberta": "1907.11692", "vit": "2010.11929"}

_ARXIV = re.compile(r"\d{4}\.\d{5}")


def arxiv_tags(source: str) -> list[str]:
    """Tags of the arXiv papers that `source` names."""
    return [f"arxiv:{number}" for number in _ARXIV.findall(source)]


def cite(method: str, variant_source: str | None, model_type: str | None, base_model: str | None) -> str:
    """Markdown that cites the method, the variant's source and the model that was fine-tuned."""
    papers = [METHODS[method], *_ARXIV.findall(variant_source or ""), MODELS.get(model_type)]
    entries = [ENTRIES[paper] for paper in dict.fromkeys(papers) if paper]
    text = "\n".join(["```bibtex", "\n\n".join(entries), "```"])
    if base_model and model_type not in MODELS:
        text += f"\n\nThe fine-tuned model is described at [{base_model}](https://huggingface.co/{base_model})."
    return text


def linked(source: str) -> str:
    """`source` with links to the arXiv papers that it names."""
    return _ARXIV.sub(lambda match: f"[{match[0]}](https://arxiv.org/abs/{match[0]})", source)

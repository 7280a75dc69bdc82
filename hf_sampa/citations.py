"""What a model card cites: methods, and the models that are fine-tuned most."""

from __future__ import annotations

import re


SAMPA = """@inproceedings{xie2024sampa,
  title     = {{SAMPa}: Sharpness-aware Minimization Parallelized},
  author    = {Xie, Wanyun and Pethick, Thomas and Cevher, Volkan},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}"""

SAM = """@inproceedings{foret2021sharpnessaware,
  title     = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author    = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}"""

# By the `model_type` of a configuration.
MODELS = {
    "bert": """@inproceedings{devlin2019bert,
  title     = {{BERT}: Pre-training of Deep Bidirectional Transformers for Language Understanding},
  author    = {Devlin, Jacob and Chang, Ming-Wei and Lee, Kenton and Toutanova, Kristina},
  booktitle = {Proceedings of NAACL-HLT},
  year      = {2019}
}""",
    "distilbert": """@article{sanh2019distilbert,
  title   = {{DistilBERT}, a distilled version of {BERT}: smaller, faster, cheaper and lighter},
  author  = {Sanh, Victor and Debut, Lysandre and Chaumond, Julien and Wolf, Thomas},
  journal = {arXiv preprint arXiv:1910.01108},
  year    = {2019}
}""",
    "roberta": """@article{liu2019roberta,
  title   = {{RoBERTa}: A Robustly Optimized {BERT} Pretraining Approach},
  author  = {Liu, Yinhan and Ott, Myle and Goyal, Naman and Du, Jingfei and Joshi, Mandar and Chen, Danqi and Levy, Omer
             and Lewis, Mike and Zettlemoyer, Luke and Stoyanov, Veselin},
  journal = {arXiv preprint arXiv:1907.11692},
  year    = {2019}
}""",
    "vit": """@inproceedings{dosovitskiy2021image,
  title     = {An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
  author    = {Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and Weissenborn, Dirk and Zhai, Xiaohua and
               Unterthiner, Thomas and Dehghani, Mostafa and Minderer, Matthias and Heigold, Georg and Gelly, Sylvain and
               Uszkoreit, Jakob and Houlsby, Neil},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}""",
}

_ARXIV = re.compile(r"\d{4}\.\d{5}")


def arxiv_tags(source: str) -> list[str]:
    """Tags of the arXiv papers that `source` names."""
    return [f"arxiv:{number}" for number in _ARXIV.findall(source)]


def cite(method: str, variant_source: str | None, model_type: str | None, base_model: str | None) -> str:
    """Markdown that cites the method, the variant's source and the model that was fine-tuned."""
    entries = [SAMPA if method == "sampa" else SAM]
    entries += [MODELS[model_type]] if model_type in MODELS else []
    lines = ["```bibtex", "\n\n".join(entries), "```"]
    if variant_source:
        lines += ["", f"The variant: {linked(variant_source)}."]
    if base_model and model_type not in MODELS:
        lines += ["", f"The fine-tuned model is described at [{base_model}](https://huggingface.co/{base_model})."]
    return "\n".join(lines)


def linked(source: str) -> str:
    """`source` with links to the arXiv papers that it names."""
    return _ARXIV.sub(lambda match: f"[{match[0]}](https://arxiv.org/abs/{match[0]})", source)

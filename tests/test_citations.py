"""What cards cite."""

from __future__ import annotations

import re

import pytest

from hf_sampa.cards.citations import ENTRIES, MODELS, cite
from hf_sampa.variants.catalogue import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_every_paper_of_a_variant_is_cited_once(name):
    source = VARIANTS[name].source
    text = cite("sampa", source, "bert", "google-bert/bert-base-uncased")
    cited = re.findall(r"eprint = {(.*)}", text)
    assert len(cited) == len(set(cited)) and text.count("```") == 2 and "described at" not in text
    assert set(cited) == {"2410.10683", MODELS["bert"], *re.findall(r"\d{4}\.\d{5}", source)}
    year = re.search(r"(20\d\d)[ab]?,", source)[1]  # of the preprint, or of the publication
    number = re.search(r"\d{4}\.\d{5}", source)[0]
    assert year in (re.search(r"year = {(\d{4})}", ENTRIES[number])[1], f"20{number[:2]}")


def test_entries_are_whole_and_have_keys_of_their_own():
    keys = [re.match(r"@(?:inproceedings|article|misc){(\w+),\n", entry)[1] for entry in ENTRIES.values()]
    assert len(keys) == len(set(keys)) > 20
    for entry in ENTRIES.values():
        assert entry.count("{") == entry.count("}") and {"title", "author", "year"} <= set(
            re.findall(r"^  (\w+) =", entry, re.M)
        )


def test_a_base_model_that_is_not_known_is_linked():
    text = cite("sam", None, "nomic_bert", "nomic-ai/nomic-bert-2048")
    assert text.endswith("described at [nomic-ai/nomic-bert-2048](https://huggingface.co/nomic-ai/nomic-bert-2048).")
    assert "foret2021sharpness" in text and "xie2024sampa" not in text

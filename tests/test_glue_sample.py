"""`glue/make_sample.py`: the shipped sample and the small BERT to train on it."""

from pathlib import Path

import make_sample
from glue_tsv import read_glue_folder
from tasks import TASKS
from transformers import AutoConfig, AutoTokenizer


SAMPLE = Path(make_sample.__file__).with_name("sample")


def test_the_script_reproduces_the_shipped_files(tmp_path):
    make_sample.write_sample(tmp_path)
    assert sorted(path.name for path in SAMPLE.iterdir()) == ["dev.tsv", "train.tsv"]
    for name in ("train.tsv", "dev.tsv"):
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes()


def test_the_sample_is_balanced_and_no_sentence_comes_twice():
    data = read_glue_folder(SAMPLE, TASKS["sst2"])
    assert data.num_rows == {"train": 800, "validation": 200}
    sentences = [*data["train"]["sentence"], *data["validation"]["sentence"]]
    assert len(set(sentences)) == 1000
    for split in data.values():
        assert 0.4 < sum(split["label"]) / len(split) < 0.6


def test_the_small_bert_reads_every_word_of_the_sample(tmp_path):
    make_sample.make_tiny_bert(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sentences = read_glue_folder(SAMPLE, TASKS["sst2"])["train"]["sentence"]
    tokens = [tokenizer.tokenize(sentence) for sentence in sentences]
    assert [" ".join(words) for words in tokens] == list(sentences)
    assert tokenizer("unseen", "pair")["token_type_ids"][-1] == 1
    assert tokenizer.tokenize("unseen")[:2] == ["u", "##n"]
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == len(tokenizer)

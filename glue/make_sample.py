"""Make the GLUE-format sample that ships with the project, and a small BERT to train on it from scratch.

python glue/make_sample.py                                # rewrites glue/sample/train.tsv and dev.tsv, byte for byte
python glue/make_sample.py --tiny_bert out/tiny-bert      # a model folder for --model_name_or_path of run_glue.py

The sentences are film remarks in the format of SST-2, put together from templates and words below by a seeded random
generator; none is taken from a corpus. Negation turns a word's sentiment round ("the plot is not dull"), and where two
remarks contrast, the main one decides ("although the cast is brilliant , the plot is tedious" is negative), so that
counting words is not enough.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from transformers import BertConfig, BertTokenizer


SEED = 2410
TRAIN_SIZE, DEV_SIZE = 800, 200

POSITIVE = (
    "brilliant charming clever delightful elegant engaging exciting funny gripping heartfelt imaginative lively lovely "
    "memorable moving refreshing stunning vivid witty wonderful"
).split()
NEGATIVE = (
    "awkward bland boring clumsy confused contrived dreary dull empty flat forgettable incoherent lazy messy painful "
    "pointless predictable shallow tedious ugly"
).split()
ADJECTIVES = {1: POSITIVE, 0: NEGATIVE}
NOUNS = (
    "acting, camera work, cast, comedy, dialogue, direction, drama, editing, ending, film, first half, humor, lead, movie, "
    "music, opening, pacing, performance, plot, premise, romance, scenery, score, screenplay, script, second half, sequel, "
    "setting, soundtrack, story, thriller, twist, villain"
).split(", ")
ADVERBS = "truly really quite rather simply very thoroughly utterly deeply often mostly consistently".split()
NEGATIONS = ("is not", "is never", "is hardly", "is far from", "is anything but", "fails to be")

REMARK = "the {noun} {verb} {adverb}{adjective}"
# Where two remarks meet, A is the one that decides.
CONTRASTS = (
    "{b} , but {a}",
    "although {b} , {a}",
    "{a} , even though {b}",
    "despite the fact that {b} , {a}",
    "{b} ; still , {a}",
)
OPENINGS = ("", "", "", "i found that ", "it turns out that ", "in the end , ", "for once , ")
ENDINGS = ("", " .", " .", " !")


def _remark(rng: random.Random, label: int) -> str:
    """One clause with the given sentiment, every fifth time by way of a negation."""
    negated = rng.random() < 0.2
    return REMARK.format(
        noun=rng.choice(NOUNS),
        verb=rng.choice(NEGATIONS) if negated else "is",
        adverb=rng.choice(ADVERBS) + " " if rng.random() < 0.4 else "",
        adjective=rng.choice(ADJECTIVES[1 - label if negated else label]),
    )


def _sentence(rng: random.Random, label: int) -> str:
    sentence = _remark(rng, label)
    if rng.random() < 0.2:
        sentence = rng.choice(CONTRASTS).format(a=sentence, b=_remark(rng, 1 - label))
    return rng.choice(OPENINGS) + sentence + rng.choice(ENDINGS)


def sample_rows(seed: int = SEED) -> Iterator[tuple[str, int]]:
    """Yield different (sentence, label) pairs without end, labels balanced in expectation: 1 is positive."""
    rng = random.Random(seed)
    seen = set()
    while True:
        label = rng.randrange(2)
        sentence = _sentence(rng, label)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence, label


def write_sample(folder: str | Path) -> None:
    """Write `train.tsv` and `dev.tsv` in the official format of SST-2. No sentence is in both."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = sample_rows()
    for name, size in (("train.tsv", TRAIN_SIZE), ("dev.tsv", DEV_SIZE)):
        lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in islice(rows, size))]
        # Bytes, so that line ends are the same on every system.
        (folder / name).write_bytes(("\n".join(lines) + "\n").encode())


def make_tiny_bert(
    folder: str | Path, *, hidden_size: int = 64, num_layers: int = 2, num_heads: int = 2, dropout: float = 0.1
) -> None:
    """Write configuration and tokenizer of a small BERT for the sample, without weights.

    The WordPiece vocabulary holds every word of the templates, and the letters, so that other text can be read too.

    Args:
        folder: where `config.json` and the tokenizer's files go; give it to `run_glue.py --model_name_or_path`.
        hidden_size: width of the model; the feed-forward layers are four times as wide.
        num_layers: number of layers.
        num_heads: attention heads per layer, a divisor of `hidden_size`.
        dropout: dropout probability everywhere.
    """
    folder = Path(folder)
    vocab = {token: index for index, token in enumerate(_vocabulary())}
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=128)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=128,
        # With BERT's 0.02 so narrow a model starts on a plateau that a perturbation of radius 0.05 does not leave.
        initializer_range=0.05,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


def _vocabulary() -> list[str]:
    text = " ".join((REMARK, *NOUNS, *POSITIVE, *NEGATIVE, *ADVERBS, *NEGATIONS, *CONTRASTS, *OPENINGS, *ENDINGS))
    words = {word for word in text.split() if "{" not in word}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = sorted(words | set(letters)) + [f"##{letter}" for letter in letters]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=Path(__file__).parent / "sample", help="folder of the two .tsv files")
    parser.add_argument("--tiny_bert", metavar="FOLDER", help="write a small untrained BERT there, and no .tsv files")
    args = parser.parse_args()
    if args.tiny_bert:
        make_tiny_bert(args.tiny_bert)
        print(f"Wrote configuration and tokenizer of a small BERT to {args.tiny_bert}.")
    else:
        write_sample(args.output_dir)
        print(f"Wrote train.tsv and dev.tsv to {args.output_dir}.")


if __name__ == "__main__":
    main()

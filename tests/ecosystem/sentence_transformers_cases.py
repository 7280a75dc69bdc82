"""Cases of sentence-transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss as CrossRankingLoss
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    GISTEmbedLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
    SoftmaxLoss,
)
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

from hf_sampa import SAMPaArgumentsMixin, SAMPaMixin
from tests.ecosystem import models
from tests.ecosystem.runs import Case


@dataclass
class SentenceArguments(SAMPaArgumentsMixin, SentenceTransformerTrainingArguments): ...


class SAMPaSentenceTransformerTrainer(SAMPaMixin, SentenceTransformerTrainer): ...


@dataclass
class CrossArguments(SAMPaArgumentsMixin, CrossEncoderTrainingArguments): ...


class SAMPaCrossEncoderTrainer(SAMPaMixin, CrossEncoderTrainer): ...


@dataclass
class SparseArguments(SAMPaArgumentsMixin, SparseEncoderTrainingArguments): ...


class SAMPaSparseEncoderTrainer(SAMPaMixin, SparseEncoderTrainer): ...


def pairs(samples: int, shift: int = 0) -> Dataset:
    """Texts and others that belong to them."""
    return Dataset.from_dict(
        {"anchor": models.texts(samples, 8, shift), "positive": models.texts(samples, 6, shift + 20)}
    )


def given(dataset: Dataset, loss, **others: Any) -> dict[str, Any]:
    """What every trainer of the library is given: data of which the first eight evaluate, and a loss."""
    return {"train_dataset": dataset, "eval_dataset": dataset.select(range(8)), "loss": loss, **others}


def ranking(model, start: Path, samples: int, cls=MultipleNegativesRankingLoss, **options: Any) -> dict[str, Any]:
    """Pairs of which the others of a batch are wrong."""
    return given(pairs(samples), cls(model, **options))


def evaluated(model, start: Path, samples: int) -> dict[str, Any]:
    """As `ranking`, and an evaluator, whose work the first process gives to all of them."""
    evaluator = EmbeddingSimilarityEvaluator(models.texts(6), models.texts(6, 6, 4), [i / 5 for i in range(6)])
    return {**ranking(model, start, samples), "evaluator": evaluator}


def matryoshka(model, start: Path, samples: int) -> dict[str, Any]:
    """A loss at several lengths of an embedding, of which two are drawn for each batch."""
    loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [16, 8, 4], n_dims_per_step=2)
    return given(pairs(samples), loss)


def guided(model, start: Path, samples: int) -> dict[str, Any]:
    """A loss that holds another model, which is not to change."""
    guide = SentenceTransformer(models.path(start, "bert-guide", dropout=False), device="cpu")
    return given(pairs(samples), GISTEmbedLoss(model, guide))


def classes(model, start: Path, samples: int) -> dict[str, Any]:
    """Pairs of three kinds, and a loss with weights of its own."""
    torch.manual_seed(3)
    dataset = pairs(samples).add_column("label", [i % 3 for i in range(samples)])
    return given(dataset, SoftmaxLoss(model, model.get_embedding_dimension(), 3))


def scored(samples: int) -> Dataset:
    """Pairs with a score."""
    return pairs(samples, 5).add_column("score", [i % 5 / 4 for i in range(samples)])


def two_datasets(model, start: Path, samples: int) -> dict[str, Any]:
    """Data of two kinds, each with a loss of its own."""
    data = DatasetDict(ranked=pairs(samples), scored=scored(samples // 2))
    evaluated = DatasetDict(ranked=pairs(8), scored=scored(8))
    losses = {"ranked": MultipleNegativesRankingLoss(model), "scored": CoSENTLoss(model)}
    return {"train_dataset": data, "eval_dataset": evaluated, "loss": losses}


def repeated(model, start: Path, samples: int) -> dict[str, Any]:
    """Pairs that occur twice, which are not to meet in a batch."""
    columns = {"anchor": models.texts(samples // 2) * 2, "positive": models.texts(samples // 2, 6, 20) * 2}
    return given(Dataset.from_dict(columns), MultipleNegativesRankingLoss(model))


def marked(model, start: Path, samples: int) -> dict[str, Any]:
    """Pairs that belong together or not."""
    dataset = pairs(samples).add_column("label", [float(i % 2) for i in range(samples)])
    return given(dataset, BinaryCrossEntropyLoss(model))


def splade(model, start: Path, samples: int) -> dict[str, Any]:
    """A loss of several parts, logged each, whose weights a callback raises."""
    loss = SpladeLoss(
        model,
        SparseMultipleNegativesRankingLoss(model),
        query_regularizer_weight=5e-2,
        document_regularizer_weight=3e-2,
    )
    return given(pairs(samples), loss)


def load(cls, folder: str):
    return cls(folder, device="cpu")


def embeddings(model) -> torch.Tensor:
    return model.encode(models.texts(3, 7, 2), convert_to_tensor=True)


def dense_embeddings(model) -> torch.Tensor:
    return model.encode(models.texts(3, 7, 2), convert_to_tensor=True, convert_to_sparse_tensor=False)


def scores(model) -> torch.Tensor:
    return model.predict(list(zip(models.texts(3, 7, 2), models.texts(3, 6, 9), strict=True)), convert_to_tensor=True)


SENTENCE = Case(
    "MultipleNegativesRankingLoss",
    SAMPaSentenceTransformerTrainer,
    SentenceArguments,
    (SentenceTransformerTrainer, SentenceTransformerTrainingArguments),
    "distilbert",
    partial(load, SentenceTransformer),
    ranking,
    embeddings,
)
CROSS = Case(
    "BinaryCrossEntropyLoss",
    SAMPaCrossEncoderTrainer,
    CrossArguments,
    (CrossEncoderTrainer, CrossEncoderTrainingArguments),
    "bert-scores",
    partial(load, CrossEncoder),
    marked,
    scores,
)
CASES = [
    replace(SENTENCE, title="MultipleNegativesRankingLoss, an evaluator", inputs=evaluated),
    replace(
        SENTENCE,
        title="MultipleNegativesRankingLoss, gather_across_devices",
        inputs=partial(ranking, gather_across_devices=True),
        evaluates_alike=False,
        whole=True,
    ),
    replace(
        SENTENCE,
        title="CachedMultipleNegativesRankingLoss",
        inputs=partial(ranking, cls=CachedMultipleNegativesRankingLoss, mini_batch_size=2),
    ),
    replace(SENTENCE, title="SoftmaxLoss", inputs=classes),
    replace(SENTENCE, title="GISTEmbedLoss", inputs=guided, whole=True),
    replace(
        SENTENCE,
        title="MatryoshkaLoss, n_dims_per_step",
        inputs=matryoshka,
        evaluates_alike=False,  # lengths are drawn then, too, as many as there are batches on a process
        limits={"rho = lambda = 0 is the library's": "the lengths are drawn from the batch's own generators"},
    ),
    replace(
        SENTENCE,
        title="two datasets, two losses",
        inputs=two_datasets,
    ),
    replace(SENTENCE, title="no_duplicates", inputs=repeated, settings={"batch_sampler": "no_duplicates"}, whole=True),
    replace(
        SENTENCE,
        title="MultipleNegativesRankingLoss, sampa_start",
        settings={**SENTENCE.settings, "sampa_start": 4},
        limits={
            "rho = lambda = 0 is the library's": "before it the negatives are those of half a batch, as under DDP"
        },
    ),
    CROSS,
    replace(CROSS, title="MultipleNegativesRankingLoss", inputs=partial(ranking, cls=CrossRankingLoss), whole=True),
    Case(
        "SpladeLoss",
        SAMPaSparseEncoderTrainer,
        SparseArguments,
        (SparseEncoderTrainer, SparseEncoderTrainingArguments),
        "bert-words",
        partial(load, SparseEncoder),
        splade,
        dense_embeddings,
    ),
]

"""The model that a script starts from: whose head is kept, and which of its outputs is which class of the data."""

from __future__ import annotations

import logging
import re
from contextlib import nullcontext

import pytest
import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    EncodecConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
)

from hf_sampa.finetuning import ClassNames, ModelArguments, class_names, is_without_weights, load_config, load_model
from tests import tiny


@pytest.fixture(autouse=True)
def state():
    """As a script's training arguments make it, before the model is loaded."""
    return PartialState()


DATA = ("negative", "neutral", "positive")


def config(*names, **settings):
    labels = {"id2label": dict(enumerate(names))} if names else {}
    return BertConfig(**tiny.BERT, **labels, **settings)


def test_the_flags_are_those_of_the_examples_and_go_to_the_hub():
    args = ModelArguments("x", model_revision="v1", token="t", cache_dir="c", trust_remote_code=True)
    expected = {"revision": "v1", "token": "t", "cache_dir": "c", "trust_remote_code": True}
    assert args.hub_arguments() == expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (DATA, ClassNames(DATA, (0, 1, 2), False)),
        (("positive", "negative", "neutral"), ClassNames(("positive", "negative", "neutral"), (1, 2, 0), False)),
        (("POSITIVE", "Negative", "neutral"), ClassNames(("POSITIVE", "Negative", "neutral"), (1, 2, 0), False)),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ClassNames(DATA, (0, 1, 2), False)),
        ((), ClassNames(DATA, (0, 1, 2), True)),
    ],
)
def test_classes_are_found_by_name(own, expected):
    assert class_names(config(*own), DATA) == expected


def test_the_map_is_from_the_datas_labels_to_the_models():
    found = class_names(config("positive", "negative", "neutral"), DATA)
    assert [found.names[found.ids[label]] for label in range(3)] == list(DATA)
    assert found.config_entries() == {
        "id2label": {0: "positive", 1: "negative", 2: "neutral"},
        "label2id": {"positive": 0, "negative": 1, "neutral": 2},
    }


def test_names_that_only_their_case_tells_apart_are_not_mixed_up():
    found = class_names(config("a", "A"), ("A", "a"))
    assert found == ClassNames(("a", "A"), (1, 0), False)
    with pytest.raises(ValueError, match="classes of the data, B, b"):
        class_names(config("a", "A"), ("B", "b"))
    with pytest.raises(ValueError, match="3 classes of the data, a, A, b, .* got one for 2: a, b"):
        class_names(config("a", "b"), ("a", "A", "b"))


def test_a_regression_keeps_the_models_one_output():
    assert class_names(config("similarity"), ["score"]) == ClassNames(("similarity",), (0,), False)


@pytest.mark.parametrize(
    "own", [("a", "b"), ("a", "b", "c"), ("negative", "positive"), ("negative", "neutral", "good")]
)
def test_other_classes_are_refused_with_the_flag_that_allows_them(own):
    with pytest.raises(ValueError) as caught:
        class_names(config(*own), DATA)
    assert str(caught.value) == (
        "--model_name_or_path: expected a model for the 3 classes of the data, negative, neutral, positive, or one without a head, "
        f"got one for {len(own)}: {', '.join(own)}. Add --ignore_mismatched_sizes to train a new head in the place of its own, or "
        "give a model of these classes."
    )
    assert class_names(config(*own), DATA, ignore_mismatched_sizes=True) == ClassNames(DATA, (0, 1, 2), True)
    assert class_names(config(*own), DATA, new_head=True).new_head


def test_many_names_are_not_all_listed():
    with pytest.raises(ValueError, match=r"for 1000: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. \(990 more\)\."):
        class_names(config(*map(str, range(1000))), DATA)


def test_a_class_that_is_named_twice_is_refused():
    with pytest.raises(
        ValueError, match="expected a name for each, got cat, cat. Rename one of two that are the same"
    ):
        class_names(config(), ("cat", "cat"))


# Weights


def saved(folder, kind=BertForSequenceClassification, *names, **settings):
    torch.manual_seed(1)
    kind(config(*names, **settings)).save_pretrained(folder)
    return folder


def load(folder, names=DATA, **flags):
    torch.manual_seed(2)
    return load_model(AutoModelForSequenceClassification, ModelArguments(str(folder), **flags), names)


def logits(model):
    return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits


def test_a_head_of_the_same_classes_keeps_its_meaning(tmp_path):
    """The same model with permuted labels is the same model."""
    own = ("positive", "negative", "neutral")
    folder = saved(tmp_path, BertForSequenceClassification, *own)
    model, labels = load(folder)
    assert labels == ClassNames(own, (1, 2, 0), False)
    assert model.config.id2label == dict(enumerate(own)) and model.config.label2id["positive"] == 0
    assert torch.equal(logits(model), logits(BertForSequenceClassification.from_pretrained(folder)))


@pytest.mark.parametrize("own", [("a", "b"), ("a", "b", "c")])
def test_a_head_of_other_classes_is_new_if_that_is_allowed(own, tmp_path, caplog):
    folder = saved(tmp_path, BertForSequenceClassification, *own)
    with pytest.raises(ValueError, match="Add --ignore_mismatched_sizes"):
        load(folder)
    caplog.clear()
    model, labels = load(folder, ignore_mismatched_sizes=True)
    assert labels == ClassNames(DATA, (0, 1, 2), True)
    before = BertForSequenceClassification.from_pretrained(folder)
    assert torch.equal(model.bert.pooler.dense.weight, before.bert.pooler.dense.weight)
    assert not torch.equal(model.classifier.weight[:2], before.classifier.weight[:2])
    assert model.classifier.weight.std() > 0 and not model.classifier.bias.any()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_sampa")]
    assert [line.removeprefix("[RANK 0] ") for line in said] == [
        f"--ignore_mismatched_sizes: {folder} gets a new head for negative, neutral, positive; its own, for "
        f"{', '.join(own)}, is left out."
    ]


def test_a_head_without_names_is_taken_in_the_datas_order_with_a_word(tmp_path, caplog):
    folder = saved(tmp_path, num_labels=3)
    model, labels = load(folder)
    assert labels == ClassNames(DATA, (0, 1, 2), False)
    assert torch.equal(logits(model), logits(BertForSequenceClassification.from_pretrained(folder)))
    assert (
        f"The classes of {folder} have no names: they are taken to be those of the data, in this order: negative, neutral, positive."
    ) in caplog.text
    with pytest.raises(ValueError) as caught:
        load(folder, ("no", "yes"))
    assert str(caught.value) == (
        "--model_name_or_path: expected a model for the 2 classes of the data, no, yes, or one without a head, got one for 3. Add "
        "--ignore_mismatched_sizes to train a new head in the place of its own."
    )
    assert load(folder, ("no", "yes"), ignore_mismatched_sizes=True)[1] == ClassNames(("no", "yes"), (0, 1), True)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
@pytest.mark.parametrize("names", [("no", "yes"), DATA])
def test_a_model_without_a_head_gets_one(kind, names, tmp_path, caplog):
    folder = saved(tmp_path, kind)
    model, labels = load(folder, names)
    assert labels == ClassNames(names, tuple(range(len(names))), True)
    assert model.config.num_labels == len(names)
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight, kind.from_pretrained(folder).get_input_embeddings().weight
    )
    assert "hf_sampa" not in caplog.text


def test_a_configuration_alone_is_trained_from_scratch(tmp_path, caplog):
    config("a", "b").save_pretrained(tmp_path)
    model, labels = load(tmp_path)
    assert labels == ClassNames(DATA, (0, 1, 2), True) and model.config.num_labels == 3
    assert f"{tmp_path} holds no weights: the model is trained from scratch." in caplog.text
    assert is_without_weights(str(tmp_path)) and not is_without_weights("bert-base-uncased")
    model.save_pretrained(tmp_path)
    assert not is_without_weights(str(tmp_path))


def test_weights_are_in_full_precision_and_the_kind_of_problem_is_the_datas(tmp_path):
    torch.manual_seed(1)
    model = BertForSequenceClassification(config("score", problem_type="regression")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    model, _ = load(tmp_path, ignore_mismatched_sizes=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.problem_type is None and model.config.num_labels == 3
    args = ModelArguments(str(tmp_path), ignore_mismatched_sizes=True)
    given = {"problem_type": "multi_label_classification"}
    assert (
        load_model(AutoModelForSequenceClassification, args, DATA, **given)[0].config.problem_type
        == given["problem_type"]
    )


def test_another_configuration_can_be_given(tmp_path):
    saved(tmp_path / "model", BertModel)
    config(hidden_dropout_prob=0.4).save_pretrained(tmp_path / "config")
    model, _ = load(tmp_path / "model", config_name=str(tmp_path / "config"))
    assert model.config.hidden_dropout_prob == 0.4
    assert (
        load_config(AutoModelForSequenceClassification, ModelArguments(str(tmp_path / "model"))).hidden_dropout_prob
        == 0.1
    )


@pytest.mark.parametrize("taken", [False, True])
def test_upstreams_table_of_a_new_head_is_shown_where_the_run_goes_on(taken, tmp_path, caplog, monkeypatch):
    BertForSequenceClassification(config(num_labels=3)).save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "propagate", True)
    logging.getLogger("transformers").addHandler(caplog.handler)
    args = ModelArguments(str(tmp_path), ignore_mismatched_sizes=taken)
    try:
        with nullcontext() if taken else pytest.raises(ValueError, match="without a head, got one for 3"):
            load_model(AutoModelForSequenceClassification, args, ("no", "yes"))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert ("MISMATCH" in caplog.text) == taken


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\n")
    name = str(tmp_path / "dev.csv")
    with pytest.raises(ValueError) as caught:
        load_config(AutoModelForSequenceClassification, ModelArguments(name))
    assert str(caught.value) == (
        f"--model_name_or_path: expected a folder or a model of the Hub, got {name!r}, which is a file. Name the folder that holds the "
        "model."
    )


@pytest.mark.parametrize("name", ["here/rr", "./rr", "~/rr", "/no/rr", "a/b/c", "a\\b"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "cwd" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args, **kwargs: "asked")
    for option in ("model_name_or_path", "config_name"):
        with pytest.raises(ValueError) as caught:
            load_config(
                AutoModelForSequenceClassification, ModelArguments(**{"model_name_or_path": "x", option: name})
            )
        assert str(caught.value) == (
            f"--{option}: expected a folder or a model of the Hub, got {name!r}, which is no folder in {tmp_path / 'cwd'}. Correct "
            "it, or for a model of the Hub give its OWNER/NAME, and start where no folder is called like its owner."
        )
    for given in ("..", "here", "bert-base-uncased", "there/rr"):
        ModelArguments(given).check_folders()


@pytest.mark.parametrize(
    ("auto_class", "wanted", "kind", "got"),
    [
        (AutoModelForSequenceClassification, "texts", ViTConfig, "one for images, of type vit"),
        (AutoModelForImageClassification, "images", BertConfig, "one for texts, of type bert"),
        (AutoModelForImageClassification, "images", EncodecConfig, "of type encodec"),
    ],
)
def test_a_model_for_something_else_is_named_as_that(auto_class, wanted, kind, got, tmp_path):
    kind().save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        load_config(auto_class, ModelArguments(str(tmp_path)))
    assert str(caught.value) == (
        f"--model_name_or_path: expected a model for {wanted}, got {tmp_path}, {got}. Name another one."
    )


def test_a_model_whose_repository_has_its_own_code_is_left_to_it(tmp_path):
    ViTConfig(auto_map={"AutoModelForSequenceClassification": "code.Model"}).save_pretrained(tmp_path)
    assert load_config(AutoModelForSequenceClassification, ModelArguments(str(tmp_path))).model_type == "vit"


def test_weights_of_another_architecture_are_refused(tmp_path):
    """Whose body would start at random without a word that anybody reads."""
    saved(tmp_path / "model")
    RobertaForSequenceClassification(RobertaConfig(**tiny.BERT)).save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "model", config_name=str(tmp_path / "config"))
    among = r"every weight but the head's, but \d+ would start at random, among them roberta\.embed"
    assert re.search(among, str(caught.value))
    assert str(caught.value).endswith("or a folder with its config alone to train it from scratch.")

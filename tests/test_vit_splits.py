"""Which images a run of run_vit.py takes: splits, held-out images, limits, tables of classes, the Hub; and what is odd about them."""

from __future__ import annotations

import logging
import pickle
import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from image_data import ImageDataset, LabelledImages, hold_out, names_of, sorted_names
from image_transforms import ImageTransform
from PIL import Image
from vit_arguments import DataArguments

from tests.image_tasks import load_task
from tests.pictures import ViTProcessor


@pytest.fixture(autouse=True)
def all_messages(caplog):
    caplog.set_level(logging.INFO)


def save_images(folder, *names, value=0):
    """Small images, each of a grey of its own."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), color=value + number).save(folder / name)


def save_split(folder, split, cats=3, dogs=3, value=0):
    save_images(folder / split, *(f"cat/{i}.png" for i in range(cats)), value=value)
    save_images(folder / split, *(f"dog/{i}.png" for i in range(dogs)), value=value + 100)


@pytest.fixture
def folder(tmp_path):
    """Training images of two classes."""
    save_split(tmp_path / "pictures", "train")
    return tmp_path / "pictures"


def greys(data):
    return [data.images[index].getpixel((0, 0))[0] for index in range(len(data.images))]


# Which split is for what


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev"])
def test_validation_images_are_scored_and_test_images_are_not(folder, name, caplog):
    save_split(folder, name, value=10)
    save_split(folder, "test", value=20)
    task = load_task(data_dir=folder, predict=True)
    assert (task.scored, greys(task.train)[0], greys(task.evaluation)[0], greys(task.test)[0]) == (name, 0, 10, 20)
    assert caplog.messages == [f"Of the local folder pictures, {name} is scored, and not test."]
    assert task.remarks == []


def test_test_images_are_scored_where_there_are_no_others_and_this_is_said(folder, caplog):
    save_split(folder, "test", value=20)
    task = load_task(data_dir=folder)
    assert task.scored == "test" and greys(task.evaluation)[0] == 20
    (message,) = caplog.messages
    assert message.startswith("the local folder pictures has no validation images: its test images are scored.")
    assert "--train_val_split 0.1 keeps the test images for the end" in message
    assert task.remarks == ["there were no validation images: the test images were scored while it was trained"]
    caplog.clear()
    assert load_task(data_dir=folder, train=False).remarks == [] and not caplog.messages, "nothing is chosen by them"


def test_a_share_of_every_class_is_held_out_and_test_images_are_kept(folder, caplog):
    save_split(folder, "train", cats=20, dogs=10)
    save_split(folder, "test", value=20)
    task = load_task(data_dir=folder, train_val_split=0.2)
    assert task.scored == "train, 20% held out" and np.bincount(task.evaluation.labels).tolist() == [4, 2]
    held, rest = (set(names_of(data.images)) for data in (task.evaluation, task.train))
    assert not held & rest and len(held | rest) == 30
    assert [name.split("/")[0] for name in names_of(task.train.images)] == ["cat"] * 16 + ["dog"] * 8
    assert held == set(names_of(load_task(data_dir=folder, train_val_split=0.2, train=False).evaluation.images))
    assert caplog.messages == ["Of the local folder pictures, train, 20% held out is scored, and not test."] * 2


def test_too_few_images_to_hold_some_out(folder):
    for share, held_out, other in ((0.1, 1, "larger"), (0.9, 5, "smaller")):
        with pytest.raises(ValueError) as caught:
            load_task(data_dir=folder, train_val_split=share)
        assert str(caught.value) == (
            f"--train_val_split {share}: expected at least 2 of the 6 images on both sides, one of every class, got {held_out} to hold "
            f"out. Give a {other} share or more images, or name a --validation_dir."
        )
    save_split(folder, "train", cats=10, dogs=1)
    shutil.rmtree(folder / "train" / "dog")
    save_split(folder, "train", cats=10, dogs=1)
    with pytest.raises(ValueError) as caught:
        load_task(data_dir=folder, train_val_split=0.2)
    assert str(caught.value) == (
        "--train_val_split 0.2: expected at least two images of every class, one for each side, got one of 'dog'. Add images of it or "
        "take it out, or name a --validation_dir."
    )


@pytest.mark.parametrize("option", ["train_dir", "validation_dir", "test_dir"])
def test_a_folder_of_splits_is_not_taken_for_one_of_classes(option, folder):
    save_split(folder, "val")
    with pytest.raises(ValueError) as caught:
        load_task(**{option: folder, "train_val_split": 0.2})
    assert str(caught.value) == (
        f"--{option}: expected a folder with images, in one folder per class or with a metadata.csv, got {folder} with train, val. Name "
        "it with --data_dir, or one of its folders here."
    )
    table = "".join(f"{split}/cat/{n}.png,{split}\n" for split in ("train", "val") for n in range(3))
    shutil.rmtree(folder / "train" / "dog")
    shutil.rmtree(folder / "val" / "dog")
    (folder / "metadata.csv").write_text(f"file_name,label\n{table}")
    if option == "train_dir":
        assert load_task(train_dir=folder, evaluate=False).label_names == ["train", "val"], "which a table may say"


def test_nothing_is_held_out_where_there_are_validation_images(folder):
    save_split(folder, "val")
    with pytest.raises(
        ValueError, match="expected the local folder pictures to have none of its own, but it has 'val'"
    ):
        load_task(data_dir=folder, train_val_split=0.2)
    with pytest.raises(
        ValueError, match="expected some in the local folder val, got val alone. Name them with --train_dir"
    ):
        load_task(test_dir=str(folder / "val"), train=False, train_val_split=0.2)


def test_a_run_reads_what_it_needs_and_nothing_else(folder):
    """What it does not need may be missing, or damaged."""
    task = load_task(data_dir=folder, evaluate=False)
    assert task.scored is None and task.evaluation is None and len(task.train.images) == 6
    save_split(folder, "test", value=20)
    (folder / "train" / "cat" / "0.png").write_bytes(b"")
    task = load_task(data_dir=folder, train=False)
    assert task.train is None and task.scored == "test" and task.label_names == ["cat", "dog"]
    shutil.rmtree(folder / "train")
    task = load_task(data_dir=folder, train=False, evaluate=False, predict=True)
    assert task.evaluation is None and len(task.test.images) == 6


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "Expected images to score in the local folder pictures, got train alone. Hold some .* --do_eval false"),
        (
            {"evaluate": False, "predict": True},
            "--do_predict needs test images: .* got train alone.* --test_dir .* or leave",
        ),
    ],
)
def test_images_that_are_wanted_and_not_there(folder, wanted, message):
    with pytest.raises(ValueError, match=message):
        load_task(data_dir=folder, **wanted)


def test_training_needs_training_images(folder):
    with pytest.raises(ValueError, match="--do_train needs training images: .* --train_dir .* --do_train false"):
        load_task(test_dir=str(folder / "train"))


def test_two_folders_of_validation_images(folder):
    save_split(folder, "val")
    save_split(folder, "validation")
    with pytest.raises(
        ValueError, match="expected one folder of validation images, got validation and val.* --validation_dir"
    ):
        load_task(data_dir=folder)
    assert load_task(data_dir=folder, validation_dir=str(folder / "val")).scored == "val"


def test_folders_named_one_by_one(tmp_path):
    save_split(tmp_path, "a")
    save_split(tmp_path, "b", value=10)
    task = load_task(train_dir=str(tmp_path / "a"), validation_dir=str(tmp_path / "b"))
    assert (task.scored, greys(task.train)[0], greys(task.evaluation)[0]) == ("b", 0, 10)
    with pytest.raises(FileNotFoundError, match="--validation_dir: expected a folder, but .*c is none"):
        load_task(train_dir=str(tmp_path / "a"), validation_dir=str(tmp_path / "c"))


def test_links_are_followed_and_links_to_nothing_are_named(folder, tmp_path, caplog):
    save_split(tmp_path, "elsewhere", value=10)
    (folder / "val").symlink_to(tmp_path / "elsewhere")
    (folder / "train" / "cat" / "9.png").symlink_to(tmp_path / "elsewhere" / "cat" / "0.png")
    task = load_task(data_dir=folder)
    assert greys(task.evaluation)[0] == 10 and greys(task.train)[3] == 10
    (message,) = caplog.messages
    assert (
        message.startswith("1 of 6 images that are scored are training images, too, ")
        and "learned by heart" in message
    )
    (folder / "train" / "eel").symlink_to("nowhere")
    with pytest.raises(
        ValueError, match="eel': expected folders only in .*train, .* got a link to nothing. Move or remove"
    ):
        load_task(data_dir=folder)
    (folder / "train" / "eel").unlink()
    (folder / "val").unlink()
    (folder / "val").symlink_to("nowhere")
    with pytest.raises(
        FileNotFoundError, match="val: expected a folder, got a link to nothing or to a file. Mend the link"
    ):
        load_task(data_dir=folder)


def test_images_to_predict_may_have_no_classes(folder):
    save_images(folder / "test", "b.png", "a.png")
    task = load_task(data_dir=folder, evaluate=False, predict=True)
    assert task.test.labels is None and names_of(task.test.images) == ["a.png", "b.png"]
    with pytest.raises(
        ValueError, match="Expected images of known classes in test of .*, to score them, got images alone"
    ):
        load_task(data_dir=folder)
    shutil.rmtree(folder / "test")
    (folder / "test").mkdir()
    with pytest.raises(
        ValueError, match="Expected images of the classes in test of the local folder pictures, got none"
    ):
        load_task(data_dir=folder, evaluate=False, predict=True)


# How many


def test_limits_draw_from_all_classes_and_are_said(folder):
    for split in ("train", "val", "test"):
        save_split(folder, split, cats=20, dogs=20)
    limits = {"max_train_samples": 10, "max_eval_samples": 8, "max_predict_samples": 40}
    task = load_task(data_dir=folder, predict=True, **limits)
    assert [len(data.images) for data in (task.train, task.evaluation, task.test)] == [10, 8, 40]
    assert 0 < task.train.labels.sum() < 10 and (np.diff(task.train.labels) >= 0).all()
    assert [name.split("/")[0] == "dog" for name in names_of(task.train.images)] == task.train.labels.astype(
        bool
    ).tolist()
    assert task.remarks == [
        "of 40 images of train, 10 were drawn at random to train on",
        "of 40 images of val, 8 were drawn at random to score",
    ]


# Classes


def test_names_that_are_numbers_are_in_the_order_of_numbers():
    assert sorted_names(["10", "2", "1", "2"]) == ["1", "2", "10"]
    assert sorted_names(["10", "2", "b"]) == ["10", "2", "b"]
    assert sorted_names(["1", "01", "001", "0"]) == ["0", "001", "01", "1"]


def test_two_spellings_of_a_class(folder, caplog):
    save_images(folder / "train", "Cat/1.png")
    load_task(data_dir=folder, evaluate=False)
    assert caplog.messages == [
        "The classes 'Cat' and 'cat' differ in capitals, spaces or the coding of letters alone, and are taken for two. Rename "
        "one of them if they are one."
    ]


def test_a_class_that_only_one_side_has(folder, caplog):
    save_split(folder, "val", dogs=0)
    load_task(data_dir=folder)
    assert caplog.messages == ["1 of 2 classes have no val image, 'dog' for instance: the score says nothing of them."]
    save_images(folder / "val", "Dog/1.png")
    with pytest.raises(
        ValueError, match="classes of train in val, got a class 'Dog', of which nothing is learned. Is it 'dog'?"
    ):
        load_task(data_dir=folder)
    save_images(folder / "test", "unknown/1.png")
    with pytest.raises(
        ValueError, match="in test, got a class 'unknown', .* Rename or remove it, or name it with --test_dir if"
    ):
        load_task(data_dir=folder, evaluate=False, predict=True)


# Tables


def write_table(folder, text, **settings):
    (folder / "train" / "metadata.csv").write_text(text, **({"encoding": "utf-8"} | settings))


@pytest.fixture
def flat(tmp_path):
    save_images(tmp_path / "train", "a.png", "b.png", "sub/c.png")
    return tmp_path


def test_a_table_tells_the_classes(flat, caplog):
    write_table(flat, '\ufeffsize,file_name,label\r\n1,sub/c.png,"dog, big"\r\n\r\n1,./a.png,cat\r\n')
    task = load_task(data_dir=flat, evaluate=False)
    assert task.label_names == ["cat", "dog, big"] and task.train.labels.tolist() == [1, 0]
    assert greys(task.train) == [2, 0] and names_of(task.train.images) == ["sub/c.png", "a.png"]
    assert [re.sub(r".*/train", "train", message) for message in caplog.messages] == [
        "train/metadata.csv: has no row for 1 files in its folder, 'b.png' for instance: they are not used."
    ]
    write_table(flat, "file_name,kind\na.png,3\nb.png,20\n")
    assert load_task(data_dir=flat, evaluate=False, label_column_name="kind").label_names == ["3", "20"]


def test_a_table_without_classes_is_predicted(flat):
    write_table(flat, "file_name\nb.png\na.png\n")
    task = load_task(test_dir=str(flat / "train"), train=False, evaluate=False, predict=True)
    assert task.test.labels is None and greys(task.test) == [1, 0]


ROWS = "file_name,label\na.png,cat\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROWS + "x.png,dog\n", "line 3: expected the path of an image in .*train, got 'x.png', where no file is"),
        (
            ROWS + "./a.png,cat\n",
            r"line 3: expected every image once, got './a.png' a second time, after line 2\. Remove",
        ),
        (
            ROWS + "b.png,\n",
            "line 3: expected the name of a class in the column 'label', got ''. Fill it in, or remove",
        ),
        (ROWS + "b.png,NaN\n", "line 3: expected the name of a class in the column 'label', got 'NaN'"),
        (ROWS + " ,dog\n", "line 3: expected a path in the column 'file_name', got ' '"),
        (
            ROWS + "b.png\n",
            r"line 3: expected 2 fields \(file_name, label\), got 1\. Repair the line, with double quotes",
        ),
        (ROWS + 'b.png,"dog\n', "line 3: expected a row of fields between commas, but unexpected end of data"),
        (ROWS, "Expected at least two folders of images in .*train, .* or two classes in its metadata.csv, got 1"),
        ("", "line 1: expected the columns 'file_name' and 'label', between commas and each once, got none"),
        ("file_name,label\n", "metadata.csv: expected a row for every image, got none"),
        (
            "file_name;label\na.png;cat\n",
            "line 1: expected the columns .*, got 'file_name;label'. Name the columns so",
        ),
        ("file_name,label,label\n", "each once, got 'file_name', 'label', 'label'"),
        (
            "file_name,label\na\0.png,cat\n",
            "line 2: expected a path in the column 'file_name', got 'a.x00.png'|line contains NUL",
        ),
    ],
)
def test_tables_that_are_refused(flat, text, message):
    write_table(flat, text)
    with pytest.raises(ValueError, match=message):
        load_task(data_dir=flat, evaluate=False)


def test_a_column_of_a_table_that_is_not_there(folder):
    with pytest.raises(
        ValueError, match="--label_column_name kind: expected a metadata.csv with this column in .*train, got none"
    ):
        load_task(data_dir=folder, evaluate=False, label_column_name="kind")


def test_a_table_in_another_coding(flat):
    write_table(flat, ROWS + "b.png,Bär\n", encoding="latin1")
    with pytest.raises(ValueError, match="metadata.csv: expected UTF-8, got other bytes .* Save it as UTF-8"):
        load_task(data_dir=flat, evaluate=False)


# Tables of the Hub


def save_hub(folder, splits, label, image="picture"):
    """Parquet files of a data set, which `datasets` reads as it reads the Hub's."""
    features = datasets.Features({image: datasets.Image(), "kind": label, "size": datasets.Value("int64")})
    for split, labels in splits.items():
        pictures = [Image.new("L", (4, 4), color=10 * i) for i in range(len(labels))]
        rows = {image: pictures, "kind": labels, "size": [1] * len(labels)}
        data = datasets.Dataset.from_dict(rows, features=features)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "hub"


KINDS = datasets.ClassLabel(names=["dog", "cat", "eel"])


def test_any_data_set_of_the_hub(hub, caplog):
    name = save_hub(hub, {"train": [0, 1, 1], "validation": [1], "test": [-1, -1]}, KINDS)
    task = load_task(dataset_name=name, predict=True)
    assert task.label_names == ["dog", "cat", "eel"] and task.train.labels.tolist() == [0, 1, 1]
    assert task.scored == "validation" and task.test.labels is None and greys(task.test) == [0, 10]
    assert names_of(task.test.images) == ["0", "1"]
    assert caplog.messages[1:] == [
        "1 of 3 classes have no train image, 'eel' for instance: nothing is learned of them.",
        "2 of 3 classes have no validation image, 'dog' for instance: the score says nothing of them.",
    ]


@pytest.mark.parametrize(
    ("labels", "kind", "names", "expected"),
    [
        (["dog", "cat", "dog"], "string", ["cat", "dog"], [1, 0, 1]),
        ([10, 2, 10], "int64", ["2", "10"], [1, 0, 1]),
        ([True, False, True], "bool", ["False", "True"], [1, 0, 1]),
    ],
)
def test_columns_that_are_named(hub, labels, kind, names, expected):
    name = save_hub(hub, {"training": labels, "dev": labels[:1]}, datasets.Value(kind))
    given = {"dataset_name": name, "train_split_name": "training", "label_column_name": "kind"}
    task = load_task(**given)
    assert task.label_names == names and task.train.labels.tolist() == expected
    assert task.scored == "dev" and task.evaluation.labels.tolist() == expected[:1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {},
            "--label_column_name: expected one of the columns of .*hub, picture, kind, size, got none that it may be",
        ),
        (
            {"label_column_name": "sort"},
            "--label_column_name: expected one of the columns .*, picture, kind, size, got sort",
        ),
        (
            {"image_column_name": "img"},
            "--image_column_name: expected one of the columns .* got img. Name the column of the images",
        ),
        (
            {"image_column_name": "size", "label_column_name": "kind"},
            "--image_column_name: expected a column of images, got 'size' of Value.'int64'.. Name another one of picture, kind",
        ),
        ({"dataset_config_name": "big"}, "--dataset_name .*hub was not loaded: BuilderConfig 'big' not found"),
        ({"test_split_name": "final"}, "--test_split_name: expected one of train, the splits of .*hub, got final"),
        (
            {"label_column_name": "kind"},
            "for the class of every image, got 0.5 for image 0 of train, in the column 'kind'",
        ),
    ],
)
def test_columns_and_splits_that_are_not_there(hub, given, message):
    name = save_hub(hub, {"train": [0.5, float("nan")]}, datasets.Value("float64"))
    with pytest.raises(ValueError, match=message):
        load_task(dataset_name=name, evaluate=False, **given)


def test_missing_labels_in_a_table(hub):
    name = save_hub(hub, {"train": ["dog", None], "test": [" ", "dog"]}, datasets.Value("string"))
    given = {"dataset_name": name, "label_column_name": "kind"}
    with pytest.raises(ValueError, match="got None for image 1 of train"):
        load_task(evaluate=False, **given)
    with pytest.raises(ValueError, match="got ' ' for image 0 of test"):
        load_task(train=False, **given)


def test_a_folder_of_images_is_not_read_as_a_data_set_of_the_hub(folder, hub):
    with pytest.raises(ValueError, match="--dataset_name: expected a data set on the Hub .* Name it with --data_dir"):
        load_task(dataset_name=str(folder), evaluate=False)


def test_a_data_set_without_a_usual_split(hub):
    name = save_hub(hub, {"unlabeled": [0, 1]}, KINDS)
    with pytest.raises(
        ValueError,
        match="expected a split called train, validation or test, got unlabeled. Name them with --train_split",
    ):
        load_task(dataset_name=name)


def test_images_can_be_read_in_another_process(folder, hub):
    """As by the workers of a loader that are not forked."""
    name = save_hub(hub, {"train": [0, 1, 1]}, KINDS)
    for data in (
        load_task(data_dir=folder, evaluate=False),
        load_task(dataset_name=name, evaluate=False, max_train_samples=2),
    ):
        dataset = ImageDataset(
            data.train, ImageTransform(ViTProcessor(size={"height": 4, "width": 4}), crop="resized")
        )
        torch.manual_seed(0)
        expected = dataset[1]
        torch.manual_seed(0)
        read = pickle.loads(pickle.dumps(dataset))[1]
        assert torch.equal(read["pixel_values"], expected["pixel_values"]) and read["labels"] == expected["labels"]


# Arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dataset_name": "x", "dataset": "cifar10"},
            "--dataset cifar10 would have no effect with --dataset_name. Leave out",
        ),
        ({"dataset_name": "x", "train_dir": "y"}, "--train_dir y would have no effect with --dataset_name"),
        ({"dataset": "cifar10", "test_dir": "y"}, "--test_dir y would have no effect with --dataset cifar10"),
        ({"dataset_revision": "y"}, "--dataset_revision y would have no effect with --dataset cifar10"),
        (
            {"train_dir": "x", "image_column_name": "y"},
            "--image_column_name y would have no effect with --dataset imagefolder",
        ),
        ({"crop": "padded", "augment": False}, "--crop padded would have no effect with --no_augment"),
        ({"train_val_split": 10.0}, r"--train_val_split: expected a share between 0 and 1, got 10\.0"),
        ({"max_eval_samples": 0}, "--max_eval_samples: expected a positive number, got 0"),
    ],
)
def test_options_that_contradict_one_another(given, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**given)


def test_what_a_folder_holds_is_seen(folder):
    (folder / "cifar-100-python").mkdir()
    assert DataArguments(data_dir=str(folder)).dataset == "imagefolder"
    (folder / "cifar-100-python" / "test").touch()
    assert DataArguments(data_dir=str(folder)).dataset == "cifar100"
    assert DataArguments(data_dir=str(folder), dataset="imagefolder").dataset == "imagefolder"
    assert DataArguments(data_dir=str(folder / "train" / "cat")).crop_in_force == "resized"
    assert (DataArguments().crop_in_force, DataArguments(augment=False).crop_in_force) == ("padded", None)
    assert DataArguments(dataset_name="x").dataset is None


def test_images_that_are_held_out_do_not_depend_on_the_seed():
    data = LabelledImages(np.arange(20), np.arange(20) % 2)
    np.random.seed(1)
    first = hold_out(data, 0.3, ["cat", "dog"])[1].labels
    np.random.seed(2)
    assert np.array_equal(hold_out(data, 0.3, ["cat", "dog"])[1].labels, first) and first.sum() == 3

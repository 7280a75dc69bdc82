"""Images for the ViT task: official CIFAR files, image folders, the Hub; label noise; augmentation."""

import os
import pickle
import re
import struct

import datasets
import make_digits
import numpy as np
import pytest
import torch
from cifar_files import read_cifar_folder
from image_data import ImageDataset, LabelledImages
from image_transforms import ImageTransform, padded_crop, random_flip, random_window
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from hf_sampa import compat
from tests.image_tasks import load_task
from tests.pictures import ViTProcessor


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2, by which the official files were made, wrote: every string is a string of bytes."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_bytes


def dump(path, contents, python=3):
    with path.open("wb") as file:
        (Python2Pickler if python == 2 else pickle.Pickler)(file, protocol=2).dump(contents)
    if python == 2:  # and a numpy of its time
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def pixels_of(images):
    """Rows as in the files: 1024 red values, 1024 green, 1024 blue."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)


def random_images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, labels in enumerate(([0, 1, 2], [3, 9]), start=1):
        batch = {
            b"data": pixels_of(random_images(len(labels), seed=number)),
            b"labels": labels,
            b"filenames": [b"a.png"],
        }
        dump(folder / f"data_batch_{number}", batch)
    dump(folder / "test_batch", {b"data": pixels_of(random_images(2, seed=3)), b"labels": [5, 6]})
    dump(folder / "batches.meta", {b"label_names": [b"class%d" % i for i in range(10)], b"num_vis": 3072})
    return folder


@pytest.mark.parametrize("python", [2, 3])
@pytest.mark.parametrize("parent", [True, False])
def test_cifar10_folder_is_read_exactly(cifar10, python, parent):
    for number, labels in enumerate(([0, 1, 2], [3, 9]), start=1):
        batch = {b"data": pixels_of(random_images(len(labels), seed=number)), b"labels": labels}
        dump(cifar10 / f"data_batch_{number}", batch, python)
    task = load_task("cifar10", str(cifar10.parent if parent else cifar10))
    assert np.array_equal(task.train.images, np.concatenate([random_images(3, seed=1), random_images(2, seed=2)]))
    assert task.train.labels.tolist() == [0, 1, 2, 3, 9]
    assert np.array_equal(task.evaluation.images, random_images(2, seed=3)) and task.evaluation.labels.tolist() == [
        5,
        6,
    ]
    assert task.label_names == [f"class{i}" for i in range(10)]


@pytest.mark.parametrize("python", [2, 3])
def test_cifar100_folder_is_read_with_its_fine_labels(tmp_path, python):
    for name, labels, seed in (("train", [99, 0, 50], 1), ("test", [7], 2)):
        batch = {b"data": pixels_of(random_images(len(labels), seed)), b"fine_labels": labels, b"coarse_labels": [1]}
        dump(tmp_path / name, batch, python)
    names = [b"fine%d" % i for i in range(100)]
    dump(tmp_path / "meta", {b"fine_label_names": names, b"coarse_label_names": [b"x"]}, python)
    task = load_task("cifar100", str(tmp_path))
    assert np.array_equal(task.train.images, random_images(3, 1)) and task.train.labels.tolist() == [99, 0, 50]
    assert np.array_equal(task.evaluation.images, random_images(1, 2)) and task.evaluation.labels.tolist() == [7]
    assert task.label_names[99] == "fine99"


def test_an_array_in_column_order_is_read_the_same(cifar10):
    images = random_images(4)
    dump(cifar10 / "test_batch", {b"data": np.asfortranarray(pixels_of(images)), b"labels": [0, 1, 2, 3]})
    assert np.array_equal(load_task("cifar10", str(cifar10)).evaluation.images, images)


class Call:
    """Pickles as a call of `function`, whatever it is."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize(
    ("function", "named"), [(os.mkdir, f"{os.mkdir.__module__}.mkdir"), (exec, "exec"), (np.load, "numpy.*load")]
)
def test_a_pickle_that_names_a_function_is_refused_and_nothing_is_run(cifar10, name, function, named):
    target = cifar10 / "made"
    argument = str(target) if function is not exec else f"import os; os.mkdir({str(target)!r})"
    dump(cifar10 / name, {b"data": Call(function, argument), b"labels": [], b"label_names": []})
    with pytest.raises(ValueError, match=rf"{name} was not read: .* found .*{named}, which no CIFAR file needs"):
        load_task("cifar10", str(cifar10))
    assert not target.exists()


def test_arrays_of_objects_and_other_codecs_are_refused(cifar10):
    dump(cifar10 / "test_batch", {b"data": np.array([{}], dtype=object), b"labels": [0]})
    with pytest.raises(ValueError, match="an array of type 'O8' instead of 'u1'"):
        load_task("cifar10", str(cifar10))
    dump(cifar10 / "test_batch", {b"data": pixels_of(random_images(1)), b"labels": [0]})
    raw = (cifar10 / "test_batch").read_bytes()
    (cifar10 / "test_batch").write_bytes(raw.replace(b"\x06\x00\x00\x00latin1", b"\x06\x00\x00\x00base64"))
    with pytest.raises(ValueError, match="text encoded as 'base64' instead of 'latin1'"):
        load_task("cifar10", str(cifar10))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({b"data": pixels_of(random_images(2)), b"labels": [0, 10]}, "labels from 0 to 9, got 10 for image 1"),
        ({b"data": pixels_of(random_images(2)), b"labels": [0, -1]}, "labels from 0 to 9, got -1 for image 1"),
        ({b"data": pixels_of(random_images(2)), b"labels": [0]}, r"expected 1 rows of 3072 .* got \(2, 3072\)"),
        ({b"data": [0, 1], b"labels": [0]}, "expected 1 rows of 3072 .* got list"),
        (
            {b"data": pixels_of(random_images(1)), b"fine_labels": [0]},
            r"keys \[b'data', b'labels'\], got \[b'data', b",
        ),
        ([1, 2], "expected a dictionary .* got list"),
    ],
)
def test_a_file_of_something_else_is_refused(cifar10, contents, message):
    dump(cifar10 / "data_batch_1", contents)
    with pytest.raises(ValueError, match=f"data_batch_1: .*{message}"):
        load_task("cifar10", str(cifar10))


@pytest.mark.parametrize("length", [0, 1000])
def test_a_file_cut_off_is_refused(cifar10, length):
    path = cifar10 / "data_batch_1"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="data_batch_1 was not read.*Fetch it again from https"):
        load_task("cifar10", str(cifar10))


@pytest.mark.parametrize("name", ["data_batch_[1-5]", "test_batch", "batches.meta"])
def test_missing_files_are_named(cifar10, name):
    for path in cifar10.glob(name):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"cifar-10-batches-py lacks {re.escape(name)}\. Unpack"):
        read_cifar_folder("cifar10", cifar10)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_dir: expected a folder, but .*nowhere is none"):
        load_task("cifar10", str(tmp_path / "nowhere"))


# Image folders and the Hub


def save_image_folder(folder, classes, value=0):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        Image.new("L", (6, 4), color=10 * number + value).save(folder / name / "one.png")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("test_split", ["test", "validation"])
def test_image_folder(tmp_path, test_split):
    # Classes named like splits must not move images from one split to the other.
    save_image_folder(tmp_path / "images [1]" / "train", ["bus", "train", "test"])
    save_image_folder(tmp_path / "images [1]" / test_split, ["bus", "train", "test"], value=5)
    task = load_task("imagefolder", str(tmp_path / "images [1]"))
    assert task.label_names == ["bus", "test", "train"]
    grey = {label: image.getpixel((0, 0)) for image, label in zip(*task.train, strict=True)}
    assert grey == {0: (0, 0, 0), 2: (10, 10, 10), 1: (20, 20, 20)} and len(task.train.labels) == 3
    grey = {label: image.getpixel((0, 0)) for image, label in zip(*task.evaluation, strict=True)}
    assert grey == {0: (5, 5, 5), 2: (15, 15, 15), 1: (25, 25, 25)} and len(task.evaluation.labels) == 3


def test_image_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="--dataset imagefolder reads a folder: name it with --data_dir"):
        load_task("imagefolder")
    save_image_folder(tmp_path, ["cat"])
    message = r"holds train/ and validation/ or test/, .* holds \['cat'\]\. Name the folders one by one: --train_dir"
    with pytest.raises(FileNotFoundError, match=message):
        load_task("imagefolder", str(tmp_path))
    save_image_folder(tmp_path / "train", ["cat"])
    save_image_folder(tmp_path / "test", ["cat"])
    with pytest.raises(ValueError, match="Expected at least two folders of images in .*train, one per class"):
        load_task("imagefolder", str(tmp_path))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("name", "label_column"), [("cifar10", "label"), ("cifar100", "fine_label")])
def test_columns_of_the_hub_repositories(tmp_path, monkeypatch, name, label_column):
    # A folder of that name in the working directory is read instead of the Hub, in the same way.
    columns = {"img": datasets.Image(), label_column: datasets.ClassLabel(names=["x", "y"])}
    for split, labels in (("train", [1, 0, 1]), ("test", [0])):
        images = [Image.fromarray(image) for image in random_images(len(labels))]
        data = datasets.Dataset.from_dict({"img": images, label_column: labels}, features=datasets.Features(columns))
        path = tmp_path / "uoft-cs" / name / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.to_parquet(path)
    monkeypatch.chdir(tmp_path)
    task = load_task(name)
    assert task.label_names == ["x", "y"]
    assert task.train.labels.tolist() == [1, 0, 1] and task.evaluation.labels.tolist() == [0]
    assert np.array_equal(np.stack([np.array(image) for image in task.train.images]), random_images(3))


# Augmentation


def tagged_image(width=32, height=32):
    """Every pixel says where it is: (row + 1, column + 1, 7)."""
    rows, columns = np.mgrid[1 : height + 1, 1 : width + 1].astype(np.uint8)
    return Image.fromarray(np.stack([rows, columns, np.full_like(rows, 7)], axis=-1))


def test_a_crop_is_a_window_of_the_image_padded_by_4():
    torch.manual_seed(0)
    padded = np.pad(np.array(tagged_image(20, 12)), ((4, 4), (4, 4), (0, 0)))
    seen = set()
    for _ in range(400):
        crop = np.array(padded_crop(tagged_image(20, 12)))
        assert crop.shape == (12, 20, 3)
        top, left = int(crop[6, 10, 0]) - 3, int(crop[6, 10, 1]) - 7  # from a pixel that is never padding
        assert np.array_equal(crop, padded[top : top + 12, left : left + 20])
        seen.add((top, left))
    assert {top for top, _ in seen} == {left for _, left in seen} == set(range(9))


def test_a_window_has_a_share_of_the_area_and_lies_anywhere():
    torch.manual_seed(0)
    image, boxes = tagged_image(40, 40), []
    for _ in range(2000):
        window = np.array(random_window(image))
        height, width = window.shape[:2]
        top, left = window[0, 0, :2].astype(int) - 1
        assert np.array_equal(window, np.array(image)[top : top + height, left : left + width])
        boxes.append((top, left, height, width))
    tops, lefts, heights, widths = np.array(boxes).T
    shares, ratios = heights * widths / 1600, np.log(widths / heights)
    # Sides are rounded to whole pixels, and those that the image is too small for are as long as the image's.
    inside = (heights < 40) & (widths < 40)
    assert shares.min() > 0.07 and shares.max() == 1 and inside.mean() > 0.6
    assert np.abs(ratios[inside]).max() < np.log(4 / 3) + 0.1 and abs(ratios[inside].mean()) < 0.02
    assert shares[inside].mean() == pytest.approx(0.45, abs=0.05)
    assert tops.min() == lefts.min() == 0 and (tops + heights).max() == 40 and (lefts + widths).max() == 40
    assert random_window(Image.new("L", (1, 50))).width == 1


def test_half_of_the_images_are_mirrored():
    torch.manual_seed(0)
    image = tagged_image()
    flipped = [np.array(random_flip(image)) for _ in range(400)]
    mirrored = sum(np.array_equal(each, np.array(image)[:, ::-1]) for each in flipped)
    assert mirrored + sum(np.array_equal(each, np.array(image)) for each in flipped) == 400
    assert 150 < mirrored < 250


def make_dataset(augment, size=16, images=None):
    images = random_images(3) if images is None else images
    transform = ImageTransform(ViTProcessor(size={"height": size, "width": size}), crop="padded" if augment else None)
    return ImageDataset(LabelledImages(images, np.arange(len(images))), transform)


def test_items_are_normalised_and_have_the_size_of_the_model():
    dataset = make_dataset(augment=False, size=32)
    state = torch.get_rng_state()
    assert len(dataset) == 3
    assert dataset[2]["labels"] == 2
    expected = torch.from_numpy(random_images(3)[2]).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(dataset[2]["pixel_values"], expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert make_dataset(augment=False, size=24)[0]["pixel_values"].shape == (3, 24, 24)


def test_augmentation_depends_on_the_generator_alone_and_comes_before_resizing():
    dataset = make_dataset(augment=True, size=64)
    torch.manual_seed(5)
    first = [dataset[0]["pixel_values"] for _ in range(4)]
    torch.manual_seed(5)
    assert all(torch.equal(dataset[0]["pixel_values"], item) for item in first)
    assert not torch.equal(first[0], first[1])

    torch.manual_seed(5)
    left, top = torch.randint(9, (2,)).tolist()
    image = ImageOps.expand(Image.fromarray(random_images(3)[0]), 4).crop((left, top, left + 32, top + 32))
    image = ImageOps.mirror(image) if torch.rand(()) < 0.5 else image
    expected = np.array(image.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(first[0].numpy(), expected, atol=1e-6)


def test_grey_images_get_three_channels():
    item = make_dataset(augment=True, images=[Image.new("L", (10, 8), color=51)])[0]
    assert item["pixel_values"].shape == (3, 16, 16)
    assert torch.equal(item["pixel_values"][0], item["pixel_values"][2])


@pytest.mark.skipif(compat.before("transformers", "5.4"), reason="ViT's own takes no shortest_edge")
def test_an_image_processor_that_keeps_shapes_is_refused():
    image_processor = ViTProcessor(size={"shortest_edge": 16})
    with pytest.raises(
        ValueError,
        match=rf"{ViTProcessor.__name__}: expected one that makes all images one size, got \(3, 16, 32\) for a",
    ):
        ImageTransform(image_processor, crop=None)


def test_one_label_per_image():
    with pytest.raises(ValueError, match="Expected one label per image, got 3 images and 2 labels"):
        ImageDataset(LabelledImages(random_images(3), np.arange(2)), transform=lambda image: image)


def test_digits_are_written_as_images(tmp_path):
    make_digits.main(["--output_dir", str(tmp_path)])
    counts = {part: len(list((tmp_path / part).glob("*/*.png"))) for part in ("train", "validation")}
    assert counts == {"train": 1000, "validation": 797}
    first = next((tmp_path / "train" / "0").iterdir())
    digits = load_digits()
    i = int(first.stem)
    assert digits.target[i] == 0
    assert (np.asarray(Image.open(first)) == (digits.images[i] * 255 / 16).round()).all()

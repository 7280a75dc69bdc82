"""Images of every kind, damaged ones and hostile ones: read as what they are, or one ValueError that names the file."""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import zlib

import datasets
import numpy as np
import pytest
import run_vit
import torch
from image_data import ImageDataset, LabelledImages
from image_files import StoredImages, to_rgb
from image_transforms import ImageTransform
from PIL import Image, PngImagePlugin

from hf_sampa import compat
from tests.image_tasks import load_task
from tests.pictures import ViTProcessor


WHITE = (255, 255, 255)


def encoded(image, file_format="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **settings)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, before=b""):
    """A PNG as the standard has it; colour 0 is grey, 2 red-green-blue."""
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def grey_tiff(width, bits, pixels, white_is_zero=False):
    """A TIFF of one row."""
    tags = [
        (256, 3, width),
        (257, 3, 1),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8),
    ]
    tags += [(277, 3, 1), (278, 3, 1), (279, 4, len(pixels))]
    entries = b"".join(struct.pack("<HHII", number, kind, 1, value) for number, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def noise(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


RGB = Image.fromarray(noise(6, 5, 3))
ALPHA = noise(6, 5, seed=1)
ALPHA[:2] = 0
ALPHA[2:4] = 255
RGBA = Image.fromarray(np.dstack([RGB, ALPHA]))
PALETTE = RGB.quantize(8)


def on_white(colours, alpha):
    """What is seen of transparent pixels on a white page."""
    share = np.asarray(alpha, float)[..., None] / 255
    return share * np.asarray(colours, float) + (1 - share) * 255


def of_grey(values):
    return np.repeat(np.asarray(values, float)[..., None], 3, axis=-1)


def turned(file_format, **settings):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(RGB, file_format, exif=exif, **settings)


SIXTEEN = noise(6, 5, dtype=np.uint16)
SIXTEEN[0, :3] = 0, 65535, 257
LAB = np.array([[[53, 80, 67], [100, 0, 0], [0, 0, 0], [50, 0, 0]]], np.int16).astype(np.uint8)
LAB[..., 0] = np.array([53, 100, 0, 50]) * 255 / 100

# Content of the file, the pixels that are to come, and how far from them rounding may lead.
READ = {
    "1": (encoded(RGB.convert("1")), of_grey(np.asarray(RGB.convert("1")) * 255), 0),
    "L": (encoded(RGB.convert("L")), of_grey(RGB.convert("L")), 0),
    "L, 2 bits": (png(4, 1, 2, 0, [bytes([0b00011011])]), of_grey([[0, 85, 170, 255]]), 0),
    "LA": (encoded(RGBA.convert("LA")), on_white(of_grey(RGBA.convert("LA").getchannel(0)), ALPHA), 1),
    "P": (encoded(PALETTE), PALETTE.convert("RGB"), 0),
    "P, one entry transparent": (
        encoded(PALETTE, transparency=3),
        np.where(np.asarray(PALETTE)[..., None] == 3, 255, PALETTE.convert("RGB")),
        0,
    ),
    "P, alpha of every entry": (
        encoded(PALETTE, transparency=bytes(range(0, 240, 30))),
        on_white(PALETTE.convert("RGB"), np.asarray(PALETTE) * 30),
        1,
    ),
    "GIF": (encoded(PALETTE, "GIF"), PALETTE.convert("RGB"), 0),
    "RGB": (encoded(RGB), RGB, 0),
    "RGB, one colour transparent": (
        encoded(Image.fromarray(np.array([[(1, 2, 3), (3, 2, 1)]], np.uint8)), transparency=(1, 2, 3)),
        np.array([[WHITE, (3, 2, 1)]]),
        0,
    ),
    "RGB, 16 bits": (png(2, 1, 16, 2, [struct.pack(">6H", *range(0, 65535, 11000))]), None, 1),
    "RGBA": (encoded(RGBA), on_white(RGB, ALPHA), 1),
    "RGBA, opaque": (encoded(RGB.convert("RGBA")), RGB, 0),
    "RGBA, WebP": (encoded(RGBA, "WEBP", lossless=True, exact=True), on_white(RGB, ALPHA), 1),
    "CMYK": (encoded(Image.new("CMYK", (4, 3), (255, 0, 0, 0)), "TIFF"), np.full((3, 4, 3), (0, 255, 255)), 0),
    "CMYK, JPEG": (encoded(Image.new("CMYK", (8, 8), (0, 0, 255, 0)), "JPEG"), np.full((8, 8, 3), (255, 255, 0)), 2),
    "YCbCr": (encoded(RGB.convert("YCbCr"), "TIFF"), RGB, 3),
    "LAB": (encoded(Image.frombytes("LAB", (4, 1), LAB.tobytes()), "TIFF"), [[(255, 0, 0), WHITE, (0, 0, 0), (119, 119, 119)]], 12),
    "I;16": (encoded(Image.fromarray(SIXTEEN)), of_grey(np.round(SIXTEEN / 257)), 0),
    "I;16B": (encoded(Image.fromarray(SIXTEEN.astype(">u2")), "TIFF"), of_grey(np.round(SIXTEEN / 257)), 0),
    "I;16, JPEG 2000": (encoded(Image.fromarray(SIXTEEN), "JPEG2000"), of_grey(np.round(SIXTEEN / 257)), 0),
    "I;16, all black": (encoded(Image.new("I;16", (4, 3))), of_grey(np.zeros((3, 4))), 0),
    "I;16, all alike": (encoded(Image.fromarray(np.full((3, 4), 51400, np.uint16))), of_grey(np.full((3, 4), 200)), 0),
    "I;16, one grey transparent": (
        png(3, 1, 16, 0, [struct.pack(">3H", 0x1234, 0x1235, 0x3434)], chunk(b"tRNS", struct.pack(">H", 0x1234))),
        of_grey([[255, 0x12, 0x34]]),
        0,
    ),
    "I;16, white is zero": (grey_tiff(3, 16, struct.pack("<3H", 0, 65535, 257), True), of_grey([[255, 0, 254]]), 0),
    "12 bits": (grey_tiff(2, 12, bytes([0xFF, 0xF8, 0x00])), of_grey([[255, 127]]), 1),
    "a graymap of 16 bits": (b"P5 2 1 65535\n" + struct.pack(">2H", 65535, 12850), of_grey([[255, 50]]), 0),
    "a graymap of 10 bits": (b"P5 3 1 1023\n" + struct.pack(">3H", 1023, 0, 511), of_grey([[255, 0, 127]]), 1),
    "a graymap as text": (b"P2 3 1 1023\n1023 0 511\n", of_grey([[255, 0, 127]]), 1),
    "upright by EXIF, PNG": (turned("PNG"), np.rot90(RGB, -1), 0),
    "upright by EXIF, TIFF": (turned("TIFF"), np.rot90(RGB, -1), 0),
    "upright by EXIF, WebP": (turned("WEBP", lossless=True), np.rot90(RGB, -1), 0),
    "animated GIF": (encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]), PALETTE.convert("RGB"), 0),
    "animated PNG": (encoded(RGB, save_all=True, append_images=[RGB.rotate(180)]), RGB, 0),
    "animated WebP": (encoded(RGB, "WEBP", save_all=True, lossless=True, append_images=[RGB.rotate(180)]), RGB, 0),
    "pages": (encoded(RGB, "TIFF", save_all=True, append_images=[RGB.rotate(180)]), RGB, 0),
    "one pixel": (encoded(RGB.crop((0, 0, 1, 1))), np.asarray(RGB)[:1, :1], 0),
    "a line": (encoded(Image.new("RGB", (1, 5000))), np.zeros((5000, 1, 3)), 0),
}  # fmt: skip
READ["RGB, 16 bits"] = (READ["RGB, 16 bits"][0], (np.arange(0, 65535, 11000) / 257).reshape(1, 2, 3), 1)
if compat.before("pillow", "13"):
    del READ["YCbCr"]  # it cannot read the TIFF that it has written

# Modes that no file gives, but a data set may.
IMAGES = {
    "PA": (RGBA.quantize(8).convert("PA"), RGBA.quantize(8).convert("RGBA")),
    "HSV": (Image.new("HSV", (2, 2), (85, 255, 255)), Image.new("RGBA", (2, 2), (0, 255, 0, 255))),
    "RGBX": (RGB.convert("RGBX"), RGB.convert("RGBA")),
    "RGBa": (RGBA.convert("RGBa"), RGBA),
    "La": (RGBA.convert("LA").convert("La"), RGBA.convert("LA").convert("RGBA")),
    "upright already": (RGB, RGB.convert("RGBA")),
}

HALF = len(encoded(RGB)) // 2
TOO_LONG = PngImagePlugin.PngInfo()
TOO_LONG.add_text("x", "a" * 5_000_000, zip=True)


def bomb(size):
    """A grey PNG whose file is a thousandth of what it holds."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(size + 1)) for _ in range(size)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


UNREADABLE = "expected a whole image, got one that cannot be read"
NO_IMAGE = r"expected an image \(AVIF, .* WEBP\), got something else"
TOO_LARGE = r"expected at most 89478485 pixels \(--max_image_pixels\), got "
REFUSED = {
    "empty": (b"", NO_IMAGE),
    "text": (b"not an image", NO_IMAGE),
    "a page": (b"<html>", NO_IMAGE),
    "svg": (b"<svg/>", NO_IMAGE),
    "psd": (b"8BPS", NO_IMAGE),
    "a program for a printer": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(touch) run\n", NO_IMAGE),
    "an icon": (encoded(RGB.resize((16, 16)), "ICO"), NO_IMAGE),
    "no size": (png(0, 0, 8, 0, []), NO_IMAGE),
    "half a PNG": (encoded(RGB)[:HALF], UNREADABLE),
    "half a JPEG": (encoded(RGB.resize((32, 32)), "JPEG")[:700], UNREADABLE),
    "half a GIF": (encoded(PALETTE, "GIF")[:-20], UNREADABLE),
    "half a BMP": (encoded(RGB, "BMP")[:-20], UNREADABLE),
    "half a TIFF": (encoded(RGB, "TIFF")[:-20], f"{UNREADABLE}|{NO_IMAGE}"),
    "half a WebP": (encoded(RGB, "WEBP", lossless=True)[:-20], f"{UNREADABLE}|{NO_IMAGE}"),
    "half a graymap": (b"P5 4 4 255\nabc", UNREADABLE),
    "no pixels": (png(12, 12, 8, 2, []), UNREADABLE),
    "a wrong checksum": (encoded(RGB)[:-20] + b"\0" + encoded(RGB)[-19:], UNREADABLE),
    "text of 5 MB within": (encoded(RGB, pnginfo=TOO_LONG), UNREADABLE),
    "32-bit integers": (encoded(Image.fromarray(noise(3, 3, dtype=np.int32)), "TIFF"), "got 32-bit integers.*Save the images with 8 or 16"),
    "32 bits without a sign": (grey_tiff(1, 32, b"\xff\xff\xff\xff"), "got 32-bit integers"),
    "floats": (encoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"), "got floating-point numbers"),
    "no numbers": (encoded(Image.fromarray(np.full((3, 3), np.nan, np.float32)), "TIFF"), "got floating-point numbers"),
    "infinite": (encoded(Image.fromarray(np.full((3, 3), np.inf, np.float32)), "TIFF"), "got floating-point numbers"),
    "a float map": (b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5), "got floating-point numbers"),
    "16-bit colours, one transparent": (
        png(1, 1, 16, 2, [b"\x12\x34" * 3], chunk(b"tRNS", b"\x12\x34" * 3)),
        "expected 8 bits for each colour where one of them stands for transparency, got 16",
    ),
    "144 megapixels without any": (png(12000, 12000, 8, 2, []), TOO_LARGE + "12000 x 12000 = 144000000"),
    "169 megapixels in 164 kB": (bomb(13000), TOO_LARGE + "13000 x 13000 = 169000000"),
    "4 gigapixels": (png(65535, 65535, 8, 2, []), TOO_LARGE + r"more than twice as many.*\(4294836225 pixels\)"),
    "as many as the format can": (png(2**31 - 1, 2**31 - 1, 8, 2, []), TOO_LARGE + r"more than twice.*4611686014132420609"),
    "a large GIF": (b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b"!\xf9\x04\x08\0\0\0\0,"
                    + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\x02\x02\x44\x01\0;", TOO_LARGE + "more than twice"),
    "a large graymap": (b"P5 20000 20000 255\n", TOO_LARGE + "more than twice"),
    "a large TIFF": (encoded(Image.new("1", (10000, 9000)), "TIFF", compression="group4"), TOO_LARGE + "10000 x 9000 = 90000000"),
}  # fmt: skip


# Said by Pillow on the way to our error.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture
def folder(tmp_path):
    """An image folder of two classes, with one good image in each."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(encoded(RGB))
    return tmp_path


def difference(image, expected):
    expected = np.asarray(expected, float)
    return np.abs(np.asarray(image, float) - expected).max() if np.shape(image) == expected.shape else np.inf


def test_images_are_read_as_what_they_are(folder, figure):
    path = folder / "train" / "a" / "1"
    wrong = {}
    for name, (content, expected, rounding) in READ.items():
        path.write_bytes(content)
        image = load_task("imagefolder", str(folder)).train.images[1]
        if image.mode != "RGB" or difference(image, expected) > rounding:
            wrong[name] = np.asarray(image).tolist()
    figure("images of every mode", len(READ), len(READ) - len(wrong))
    assert wrong == {}


def test_modes_that_no_file_has(figure):
    right = 0
    for image, rgba in IMAGES.values():
        expected = on_white(np.asarray(rgba)[..., :3], np.asarray(rgba)[..., 3])
        # Premultiplied colours have lost their last bits; where nothing is seen, they have lost all.
        right += difference(to_rgb(image), expected) <= 2
        assert np.array_equal(to_rgb(to_rgb(image)), to_rgb(image))
    figure("images of every mode", len(IMAGES), right)
    assert right == len(IMAGES)
    assert {*Image.MODES} <= {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F"} | IMAGES.keys() | {
        f"I;16{order}" for order in ("", "B", "L", "N")
    }, "Pillow has modes of which no test knows"


def test_an_image_is_left_as_it_is():
    image = Image.open(io.BytesIO(turned("PNG")))
    to_rgb(image)
    assert image.size == RGB.size and image.getexif()[0x0112] == 6


def test_damaged_and_hostile_images_are_named_before_training(folder, figure):
    path = folder / "train" / "a" / "1"
    wrong = {}
    for name, (content, message) in REFUSED.items():
        path.write_bytes(content)
        try:
            images = load_task("imagefolder", str(folder)).train.images
            # What the header and the checksums do not show.
            images[1]
            wrong[name] = "read"
        except ValueError as error:
            if (
                not re.match(rf"{re.escape(repr(str(path)))}: .*({message})", str(error), re.S)
                or len(str(error)) > 800
            ):
                wrong[name] = str(error)
    figure("images that are refused", len(REFUSED), len(REFUSED) - len(wrong))
    assert wrong == {}


def test_what_is_too_large_is_not_decoded(folder, monkeypatch):
    path = folder / "train" / "a" / "1.png"
    path.write_bytes(bomb(9500))
    decoded = []
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: decoded.append(image))
    for read in (lambda: load_task("imagefolder", str(folder)), lambda: StoredImages([str(path)], "train")[0]):
        with pytest.raises(ValueError, match="9500 x 9500 = 90250000"):
            read()
    assert decoded == []


def test_the_limit_is_a_setting(folder):
    limit = Image.MAX_IMAGE_PIXELS
    (folder / "test" / "b" / "0.png").write_bytes(encoded(Image.new("L", (20, 21))))
    assert load_task("imagefolder", folder, max_image_pixels=420).evaluation.images[1].size == (20, 21)
    with pytest.raises(ValueError, match=r"test/b/0.png'.*at most 419 pixels .* got 20 x 21 = 420\. Make it smaller"):
        load_task("imagefolder", folder, max_image_pixels=419)
    assert Image.MAX_IMAGE_PIXELS == limit
    # Beyond Pillow's own, too: an image of 200 million pixels, of which only the header is there.
    path = folder / "test" / "b" / "0.png"
    path.write_bytes(png(20000, 10000, 8, 0, []))
    StoredImages([str(path)], "test", 200_000_000).check()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [("29", "at most 29 pixels .* got 5 x 6 = 30"), ("0", "--max_image_pixels: expected a positive")],
)
def test_the_script_takes_the_limit(folder, pixels, message):
    arguments = ["--dataset", "imagefolder", "--data_dir", str(folder), "--max_image_pixels", pixels, "--from_scratch"]
    with pytest.raises(ValueError, match=message):
        run_vit.main([*arguments, "--use_cpu", "--output_dir", str(folder / "out")])


INSTEAD_OF_AN_IMAGE = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "endless zeros": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a loop of folders": lambda path: path.symlink_to(path.parent.parent),
}


@pytest.mark.timeout(30)
def test_what_is_no_file_is_named_and_not_opened(folder, figure):
    path = folder / "train" / "b" / "1.png"
    right = 0
    for make in INSTEAD_OF_AN_IMAGE.values():
        make(path)
        with pytest.raises(
            ValueError, match=rf"{re.escape(repr(str(path)))}: expected a file of an image, got a folder"
        ):
            load_task("imagefolder", str(folder))
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        right += 1
    figure("images: no files", len(INSTEAD_OF_AN_IMAGE), right)


def add(*names):
    """Makes ``train/<name>`` with an image in it."""

    def make(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(encoded(RGB))

    return make


# What is done to the folder, and the names of the classes or words of the message.
FOLDERS = {
    "hostile names": (
        add("train/$(touch x)/1.png", "train/a\nb/1", "train/[x]*/1", "train/-rf/1", "train/\u202eevil/1", "train/c::d/1", "train/%20#?/1"),
        ["$(touch x)", "%20#?", "-rf", "[x]*", "a", "a\nb", "b", "c::d", "\u202eevil"],
    ),
    "a class that begins with __": (add("train/__c/1.png"), ["__c", "a", "b"]),
    "a class that is a link": (lambda folder: (folder / "train" / "c").symlink_to(folder / "test" / "a"), ["a", "b", "c"]),
    "hidden folders and files": (add("train/.ipynb_checkpoints/1.png", "train/a/.DS_Store", "train/.x"), ["a", "b"]),
    "a name that is no UTF-8": (add("train/a/" + os.fsdecode(b"\xff") + ".png"), ["a", "b"]),
    "a class that is no UTF-8": (add("train/" + os.fsdecode(b"\xff") + "/1.png"), r"train/\\udcff': expected the name of a class in UTF-8"),
    "an image beside the classes": (add("train/1.png"), r"train/1.png': expected folders only in .*train, one of images for each"),
    "an image one level deeper": (add("train/a/x/1.png"), "train/a/x': expected a file of an image, got a folder"),
    "a table within": (lambda folder: (folder / "train/a/metadata.csv").write_text("file_name,label\n"), f"train/a/metadata.csv': {NO_IMAGE}"),
    "an archive within": (lambda folder: (folder / "train/a/x.zip").write_bytes(b"PK\x05\x06" + bytes(18)), f"train/a/x.zip': {NO_IMAGE}"),
    "a class without images": (lambda folder: (folder / "train/c").mkdir(), "none of them empty, .* got 3, of which 'c' is empty"),
    "a class that is only tested": (add("test/c/1.png"), "Expected images of the classes of .*train in .*test, got a class 'c'"),
    "a class that is not tested": (add("train/c/1.png"), ["a", "b", "c"]),
    "no test images": (lambda folder: [path.unlink() for path in folder.glob("test/*/*")], "Expected images of the classes .* got none"),
    "one class": (lambda folder: shutil.rmtree(folder / "train/b"), "Expected at least two folders of images in .*train, .* got 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(folder, name, figure):
    make, wanted = FOLDERS[name]
    make(folder)
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            load_task("imagefolder", str(folder))
    else:
        task = load_task("imagefolder", str(folder))
        assert task.label_names == wanted
        # Every image is there once, with the label of its folder.
        folders = [task.label_names[label] for label in task.train.labels]
        assert [os.path.basename(os.path.dirname(path)) for path in task.train.images.entries] == folders
    figure("image folders", 1, 1)


def dataset(images):
    transform = ImageTransform(ViTProcessor(size={"height": 16, "width": 16}), crop="padded")
    return ImageDataset(LabelledImages(images, np.zeros(len(images), np.int64)), transform)


# A header in order, and pixels that are not: damage that only a worker of a loader meets.
def test_an_image_that_turns_out_damaged_in_a_worker_is_named_there(folder):
    path = folder / "train" / "a" / "1.jpg"
    path.write_bytes(encoded(RGB.resize((64, 64)), "JPEG")[:900])
    images = load_task("imagefolder", str(folder)).train.images
    loader = torch.utils.data.DataLoader(dataset(images), batch_size=1, num_workers=1)
    with pytest.raises(
        ValueError, match=rf"{re.escape(repr(str(path)))}: {UNREADABLE} \(OSError: .*Replace or remove it"
    ):
        list(loader)


def test_an_image_that_has_gone_is_named(folder):
    images = load_task("imagefolder", str(folder)).train.images
    (folder / "train" / "b" / "0.png").unlink()
    with pytest.raises(ValueError, match="train/b/0.png': expected a file of an image"):
        dataset(images)[1]


def rows(images):
    """As the Hub's data sets hold images: their bytes, in a table."""
    features = datasets.Features({"img": datasets.Image(decode=False)})
    data = datasets.Dataset.from_dict({"img": [{"bytes": each, "path": None} for each in images]}, features=features)
    return StoredImages(data["img"], "train")


def test_images_in_a_table(figure):
    wrong = {}
    for name, (content, expected, rounding) in READ.items():
        if difference(rows([encoded(RGB), content])[1], expected) > rounding:
            wrong[name] = "otherwise"
    for name, (content, message) in REFUSED.items():
        try:
            dataset(rows([encoded(RGB), content]))[1]
            # Without its checksums read, a PNG gives what zlib finds right.
            if name != "a wrong checksum":
                wrong[name] = "read"
        except ValueError as error:
            if not re.match(rf"image 1 of train: .*({message})", str(error), re.S):
                wrong[name] = str(error)
    figure("images in a table", len(READ) + len(REFUSED), len(READ) + len(REFUSED) - len(wrong))
    assert wrong == {}
    with pytest.raises(ValueError, match="image 1 of train: expected the bytes of an image, got none"):
        StoredImages([{"bytes": encoded(RGB), "path": None}, {"bytes": None, "path": None}], "train")[1]


# Array, and the pixels or words of the message.
ARRAYS = {
    "uint8": (np.asarray(RGB), RGB),
    "grey": (noise(6, 5), of_grey(noise(6, 5))),
    "with alpha": (np.asarray(RGBA), on_white(RGB, ALPHA)),
    "uint16": (SIXTEEN, of_grey(np.round(SIXTEEN / 257))),
    "uint16, other bytes first": (SIXTEEN.astype(">u2"), of_grey(np.round(SIXTEEN / 257))),
    "bool": (noise(6, 5) > 99, of_grey((noise(6, 5) > 99) * 255)),
    "int16": (noise(6, 5, dtype=np.int16), "got 32-bit integers"),
    "int32": (noise(6, 5, dtype=np.int32), "got 32-bit integers"),
    "uint32": (noise(6, 5, dtype=np.uint32), "got 32-bit integers"),
    "int64": (noise(6, 5, dtype=np.int64), UNREADABLE),
    "float32": (np.ones((6, 5), np.float32), "got floating-point numbers"),
    "float64": (np.full((6, 5), np.nan), "got floating-point numbers"),
    "float16": (np.ones((6, 5), np.float16), UNREADABLE),
    "floats in three channels": (np.ones((6, 5, 3), np.float32), UNREADABLE),
    "uint16 in three channels": (noise(6, 5, 3, dtype=np.uint16), UNREADABLE),
    "channels first": (noise(3, 6, 5), UNREADABLE),
    "text": (np.array([["a"]]), UNREADABLE),
    "objects": (np.array([[None]]), UNREADABLE),
}


def test_arrays(figure):
    wrong = {}
    for name, (array, wanted) in ARRAYS.items():
        try:
            data = ImageDataset(LabelledImages([array], np.zeros(1, np.int64)), transform=np.asarray)
            image = data[0]["pixel_values"]
            if isinstance(wanted, str) or difference(image, wanted) > 1:
                wrong[name] = "read"
        except ValueError as error:
            if not isinstance(wanted, str) or not re.match(rf"image 0: .*{wanted}", str(error)):
                wrong[name] = str(error)
    figure("images as arrays", len(ARRAYS), len(ARRAYS) - len(wrong))
    assert wrong == {}


@pytest.mark.parametrize("label", [None, -1, 2])
def test_labels_of_a_table_that_are_none(tmp_path, monkeypatch, label):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    columns = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        data = datasets.Dataset.from_dict({"img": [RGB, RGB], "label": [0, label]}, features=columns)
        data.info.features["label"] = datasets.ClassLabel(names=["x", "y"])
        (tmp_path / "uoft-cs" / "cifar10").mkdir(parents=True, exist_ok=True)
        data.to_parquet(tmp_path / "uoft-cs" / "cifar10" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"Expected labels from 0 to 1, got {label} for image 1 of train"):
        load_task("cifar10")


@pytest.mark.parametrize("tries", [20, pytest.param(1000, marks=pytest.mark.whole)])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "AVIF", "PPM"])
def test_flipped_bits_end_in_an_image_or_in_its_name(folder, file_format, tries, figure):
    """Only PNG has checksums, which `check` reads: there, what is read is what was written."""
    content = encoded(Image.fromarray(np.kron(noise(4, 4, 3), np.ones((8, 8, 1), np.uint8))), file_format)
    generator = np.random.default_rng(0)
    path = folder / "1"
    whole = np.asarray(to_rgb(Image.open(io.BytesIO(content))))
    right = 0
    for _ in range(tries):
        damaged = bytearray(content)
        damaged[generator.integers(len(content))] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        images = StoredImages([str(path)], "train")
        try:
            images.check()
            right += file_format != "PNG" or np.array_equal(images[0], whole)
        except ValueError as error:
            right += str(error).startswith(repr(str(path)))
    figure("images: flipped bits", tries, right)
    assert right == tries

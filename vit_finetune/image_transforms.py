"""From an RGB image to pixel values: how training images are varied, and what the model's image processor makes of them."""

import math

import torch
from PIL import Image, ImageOps
from transformers import BaseImageProcessor


def padded_crop(image: Image.Image, padding: int = 4) -> Image.Image:
    """Pad with `padding` black pixels on every side, then cut the image's own size out at a random place."""
    left, top = torch.randint(2 * padding + 1, (2,)).tolist()
    padded = ImageOps.expand(image, border=padding)
    return padded.crop((left, top, left + image.width, top + image.height))


def random_window(image: Image.Image, least: float = 0.08, ratio: float = 4 / 3) -> Image.Image:
    """Cut a window out at a random place.

    It has a share of the image's area between `least` and 1, and is up to `ratio` times as wide as high, or as high as wide; where
    the image is too narrow or too low for that, it is as wide or as high as the image. Share and logarithm of the ratio are
    uniform, as in Szegedy et al., "Going deeper with convolutions" (arXiv 1409.4842), section 6.
    """
    share, place, left, top = torch.rand(4).tolist()
    area = image.width * image.height * (least + share * (1 - least))
    width_by_height = math.exp((2 * place - 1) * math.log(ratio))
    width = max(1, min(image.width, round(math.sqrt(area * width_by_height))))
    height = max(1, min(image.height, round(math.sqrt(area / width_by_height))))
    left, top = round(left * (image.width - width)), round(top * (image.height - height))
    return image.crop((left, top, left + width, top + height))


def random_flip(image: Image.Image) -> Image.Image:
    """Mirror left and right with probability 1/2."""
    return ImageOps.mirror(image) if torch.rand(()) < 0.5 else image


# By the values of --crop.
CROPS = {"padded": padded_crop, "resized": random_window}


class ImageTransform:
    """RGB image to pixel values ``(3, height, width)`` float32, as the model's image processor resizes and normalises them.

    With a `crop`, a name in `CROPS`, the image is cropped and flipped first, at the resolution it has: 4 pixels of 32 are an
    eighth of a CIFAR image, 4 of 224 would be next to nothing. The draws come from torch's global generator.

    Raises:
        ValueError: The image processor gives images of different shapes different sizes, which no batch can hold.
    """

    def __init__(self, image_processor: BaseImageProcessor, *, crop: str | None):
        self.image_processor = image_processor
        self.crop = crop
        wide, high = (self._pixels(Image.new("RGB", size)).shape for size in ((40, 20), (20, 40)))
        if wide != high:
            raise ValueError(
                f"The image processor {type(image_processor).__name__}: expected one that makes all images one size, got "
                f"{tuple(wide)} for a wide and {tuple(high)} for a high one. Set do_center_crop and crop_size, or a size of "
                "height and width, in its preprocessor_config.json, or name another one with --image_processor_name."
            )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if self.crop is not None:
            image = random_flip(CROPS[self.crop](image))
        return self._pixels(image)

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

"""What the pages of the documentation read: a folder of pictures, and a model by the name of one on the Hub."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import ViTConfig, ViTModel

from hf_sampa.compat import pillow_vit_processor


ViTProcessor = pillow_vit_processor(transformers)


def make_pictures(folder: Path) -> None:
    """Ten dark and ten light pictures, and a small model in a folder, which is read in place of the Hub's ViT."""
    for number, name in enumerate(("cat", "dog")):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 16), (150 * number + 5 * i,) * 3).save(folder / "pictures" / name / f"{i}.jpg")
    torch.manual_seed(0)
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    path = folder / "google" / "vit-base-patch16-224-in21k"
    ViTModel(ViTConfig(**shape, num_attention_heads=2)).save_pretrained(path)
    ViTProcessor(size={"height": 8, "width": 8}).save_pretrained(path)

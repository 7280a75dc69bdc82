"""Images for tests, as the command line of run_vit.py would have them."""

from __future__ import annotations

from image_sources import open_source
from image_task import ImageTask, load_image_task
from vit_arguments import DataArguments


def load_task(
    dataset: str | None = None, data_dir: object = None, *, train=True, evaluate=True, predict=False, **given: object
) -> ImageTask:
    """The images that options of these names give."""
    args = DataArguments(dataset=dataset, data_dir=None if data_dir is None else str(data_dir), **given)
    return load_image_task(open_source(args), args, train=train, evaluate=evaluate, predict=predict)

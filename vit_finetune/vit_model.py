"""The model of the ViT task and its image processor: pretrained, or from random weights."""

import logging
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessorPil,
)
from transformers.utils import IMAGE_PROCESSOR_NAME
from vit_arguments import ModelArguments


logger = logging.getLogger(__name__)


def load_model(args: ModelArguments, label_names: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Model with one output per name, weights in fp32, and the image processor that goes with it.

    Random weights come from torch's global generator.

    Raises:
        ValueError: A checkpoint leaves other weights than those of the classifier undetermined.
    """
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }
    if args.from_scratch:
        config = ViTConfig(
            image_size=args.image_size,
            patch_size=args.patch_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=max(1, args.hidden_size // 64),
            intermediate_size=4 * args.hidden_size,
            **labels,
        )
        return AutoModelForImageClassification.from_config(config), _new_image_processor(config)

    path = Path(args.model_name_or_path)
    if (path / "config.json").is_file() and not [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]:
        logger.warning("%s holds a config and no weights: training starts from random weights.", path)
        config = AutoConfig.from_pretrained(path, **labels)
        model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        saved_processor = (path / IMAGE_PROCESSOR_NAME).is_file()
        return model, _load_image_processor(args) if saved_processor else _new_image_processor(config)
    return _load_pretrained(args.model_name_or_path, labels), _load_image_processor(args)


def _load_pretrained(name_or_path: str, labels: dict[str, dict]) -> PreTrainedModel:
    # fp32: by default the weights keep the precision they were saved in, and a perturbation of norm rho is rounded away
    # in bf16. Sizes may differ where the checkpoint was trained for another number of classes.
    model, report = AutoModelForImageClassification.from_pretrained(
        name_or_path, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **labels
    )
    undetermined = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
    lost = sorted(name for name in undetermined if "classifier" not in name)
    if lost:
        raise ValueError(
            f"{name_or_path}: expected every weight but the classifier's, but {len(lost)} would start at random, among "
            f"them {lost[0]}. Name a checkpoint of this very architecture, or a folder with its config alone to train "
            "it from scratch."
        )
    return model


def _load_image_processor(args: ModelArguments) -> BaseImageProcessor:
    # Pillow whether or not torchvision is there: the two interpolate differently, and a run should not depend on it.
    return AutoImageProcessor.from_pretrained(args.model_name_or_path, backend="pil")


def _new_image_processor(config: PretrainedConfig) -> BaseImageProcessor:
    return ViTImageProcessorPil(size={"height": config.image_size, "width": config.image_size})

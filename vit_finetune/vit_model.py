"""The model of the task and its image processor: pretrained, or from random weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import transformers
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

# By its module: under its short name some versions (5.12) ask for torchvision, which it does not need here.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME
from vit_arguments import ViTModelArguments

from hf_sampa.compat import on_pillow, pillow_vit_processor
from hf_sampa.finetuning import ClassNames, check_trained, class_names, load_config, load_model, same_names


def load_classifier(
    args: ViTModelArguments, names: Sequence[str], training: bool = True
) -> tuple[PreTrainedModel, ClassNames, BaseImageProcessor]:
    """Model with weights in fp32, which of its outputs is which class of the data, and the image processor that goes with it.

    Random weights come from torch's global generator.

    Args:
        args: Which model.
        names: Of the data's classes, in the order of their labels.
        training: Without, the data may lack classes that the model has.

    Raises:
        ValueError: The model is for other classes, or has a new head that is not to be trained; a checkpoint leaves other
            weights than those of the head undetermined; or nothing says which size its images have.
    """
    if args.from_scratch:
        config = _new_config(args)
        labels = class_names(config, names, new_head=True)
        config.update(labels.config_entries())
        model = AutoModelForImageClassification.from_config(config)
    elif training:
        model, labels = load_model(AutoModelForImageClassification, args, names)
    else:
        own = _names_of(load_config(AutoModelForImageClassification, args))
        found = same_names(own, names)
        model, labels = load_model(AutoModelForImageClassification, args, names if found is None else own)
        if found is not None:
            labels = replace(labels, ids=tuple(own.index(found[name]) for name in names))
    if not training:
        check_trained(labels, names, "a model --from_scratch" if args.from_scratch else args.model_name_or_path)
    return model, labels, _image_processor(args, model.config)


def _new_config(args: ViTModelArguments) -> ViTConfig:
    return ViTConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=max(1, args.hidden_size // 64),
        intermediate_size=4 * args.hidden_size,
    )


def _names_of(config: PretrainedConfig) -> tuple[str, ...]:
    return tuple(config.id2label[index] for index in sorted(config.id2label))


def _image_processor(args: ViTModelArguments, config: PretrainedConfig) -> BaseImageProcessor:
    own = Path(args.model_name_or_path) / IMAGE_PROCESSOR_NAME
    nothing_saved = args.random_weights and args.image_processor_name is None and not own.is_file()
    if args.from_scratch or nothing_saved:
        return _new_image_processor(config)
    # Pillow whether or not torchvision is there: the two interpolate differently, and a run should not depend on it.
    return AutoImageProcessor.from_pretrained(
        args.image_processor_name or args.model_name_or_path, **on_pillow(), **args.hub_arguments()
    )


def _new_image_processor(config: PretrainedConfig) -> BaseImageProcessor:
    size = config.to_dict().get("image_size")
    if not isinstance(size, int):
        raise ValueError(
            f"--model_name_or_path: expected a {IMAGE_PROCESSOR_NAME} beside the model, or a config.json with an image_size, "
            f"got neither for this {config.model_type}. Name an image processor with --image_processor_name."
        )
    return pillow_vit_processor(transformers)(size={"height": size, "width": size})

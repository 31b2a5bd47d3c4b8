"""What trainers do about images: the processor, the records' images, and models that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpref.data import images
from fastpref.data.images import is_processor
from fastpref.data.vision import Vision
from fastpref.models.vision import axis_positions, takes_images
from fastpref.trainers.config import PreferenceConfig, unsupported
from fastpref.trainers.loading import is_zero3

TEXT_ONLY = ("responses_as_written", "assistant_only_loss", "torch_compile", "activation_offloading")


def vision_of(model: Any, processing_class: Any) -> Vision | None:
    """What makes images ready for the model, or None if model or processor know of none."""
    if not is_processor(processing_class) or not takes_images(model):
        return None
    return Vision(processing_class, axis_positions(model))


def ready_vision(model: Any, processing_class: Any, args: PreferenceConfig) -> Vision | None:
    """`vision_of`. A batch may have no images, so DDP is told, as in TRL, to look for parameters that are not used."""
    found = vision_of(model, processing_class)
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if found is not None and args.ddp_find_unused_parameters is None and not checkpointing.get("use_reentrant"):
        args.ddp_find_unused_parameters = True
    return found


def refuse_mixed(vision: Vision | None, trainer: Any) -> None:
    """Refuses records without images beside others with some, now and in later data, where ranks share the model.

    Raises:
        ValueError: the trainer's data are such.
    """
    if vision is None or trainer.args.world_size == 1:
        return
    vision.sharded = trainer.is_fsdp_enabled or is_zero3(trainer.accelerator)
    vision.check_mixed()


def unopened(dataset: Any, reads_images: bool) -> Any:
    """The data set with images as bytes or paths, for a trainer that reads them; else without them.

    Raises:
        ValueError: a record has images, and the trainer reads none.
    """
    if not reads_images and images.has_images(dataset):
        return images.without(dataset)
    return images.undecoded(dataset)


def pictured(
    dataset: Any, vision: Vision | None, sides: Sequence[str], args: PreferenceConfig, name: str, whole: bool = False,
    late: bool = False,
) -> Any:  # fmt: skip
    """The data set with images and token ids if it has a column of images (see `fastpref.data.images.encoded`).

    Raises:
        ValueError: an option does not go with images, or a record is wrong. Or the images come `late`: the batches'
            layout was chosen for data without any.
    """
    if not images.has_images(dataset):
        return dataset
    if vision is None:
        return images.without(dataset)
    if late and not vision.seen:
        raise ValueError(f"{name}: got images, want some in the constructor's data too: its batches are for texts only")
    vision.seen = True
    for option in TEXT_ONLY:
        if getattr(args, option, False):
            raise unsupported(option, True, "the data have images")
    found = images.encoded(dataset, vision.processor, sides, whole=whole, num_proc=args.dataset_num_proc, name=name)
    vision.check_mixed(images.mixed(found))
    return found

"""Records with images: where an image is, how it is opened, and prompts with images as token ids, by TRL 1.16's rules.

A record's images are in the column `images` (a list) or `image` (one): paths, bytes, PIL images, or what `datasets`
makes of these. They belong to its prompt, in order: one for each image part of its messages. Where messages have texts
only, all images stand at the beginning of the first user's message. In a text prompt, the processor's own image token
stands for each.

A prompt goes through the processor, which puts as many image tokens as an image has features. Responses are texts. What
differs from TRL: a prompt that leaves no room for a response is left out, with a count; here as in our text trainers.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpref import __version__
from fastpref.data import template
from fastpref.data.encode import template_texts
from fastpref.data.formats import column_names
from fastpref.data.reference_cache import Fingerprint

Record = dict[str, Any]
COLUMNS = ("images", "image")
PREPARED = ("images", "prompt_text", "pixels")  # of a record whose prompt has gone through the processor


def is_processor(processing_class: Any) -> bool:
    """Whether it is a processor of texts and images, with a tokenizer inside."""
    from transformers import ProcessorMixin

    return isinstance(processing_class, ProcessorMixin) and hasattr(processing_class, "tokenizer")


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer in a processor, with the processor's chat template if it has none; or the tokenizer itself."""
    if not is_processor(processing_class):
        return processing_class
    tokenizer = processing_class.tokenizer
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processing_class.chat_template
    return tokenizer


def checked_processor(example: Mapping[str, Any], processing_class: Any) -> bool:
    """Whether a record has images.

    Raises:
        ValueError: it has, and there is only a tokenizer for them.
    """
    found = listed(example)
    if found and not is_processor(processing_class):
        raise ValueError(f"images: got {len(found)}, want none: the model reads texts only")
    return bool(found)


def has_images(dataset: Any) -> bool:
    """Whether the data set has a column of images. Its records may still have none."""
    return bool(set(COLUMNS) & set(column_names(dataset)))


def undecoded(dataset: Any) -> Any:
    """The data set with images as bytes or paths, so that a bad one can be named when it is opened."""
    features = getattr(dataset, "features", None) or {}
    for name in COLUMNS:
        if name in features:
            dataset = dataset.cast_column(name, _undecoded(features[name]))
    return dataset


def _undecoded(feature: Any) -> Any:
    from datasets import Image

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, list):
        return [_undecoded(feature[0])]
    return type(feature)(_undecoded(feature.feature)) if hasattr(feature, "feature") else feature


def listed(example: Mapping[str, Any]) -> list[Any]:
    """A record's images as `{"bytes", "path"}`, none of them opened; those that are PIL images stay so.

    Raises:
        ValueError: one is neither a path nor an image.
    """
    value = example.get("images")
    if value is None:
        value = example.get("image")
    if value is None:
        return []
    return [_source(one) for one in (value if isinstance(value, list | tuple) else [value])]


def _source(value: Any) -> Any:
    if isinstance(value, str | os.PathLike):
        return {"bytes": None, "path": os.fspath(value)}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if _is_picture(value):
        return value
    raise ValueError(f"images: got {type(value).__name__}, want paths, bytes or PIL images")


def _is_picture(value: Any) -> bool:
    return hasattr(value, "save") and hasattr(value, "mode")  # PIL's


def _stored(source: Any) -> dict[str, Any]:
    """An image as bytes, without loss, or as its path."""
    if not _is_picture(source):
        return source
    data = io.BytesIO()
    source.save(data, format="PNG" if source.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF")
    return {"bytes": data.getvalue(), "path": None}


def opened(source: Any) -> Any:
    """A PIL image, turned upright as its EXIF data say.

    Raises:
        ValueError: its file is missing, or is no image that can be read to its end.
    """
    from PIL import Image, ImageOps

    if _is_picture(source):
        return ImageOps.exif_transpose(source)
    data, path = source["bytes"], source["path"]
    try:
        image = Image.open(path if data is None else io.BytesIO(data))
        image.load()
    except FileNotFoundError:
        raise ValueError(f"images: got {path!r}, want a file that exists") from None
    except Exception as error:  # PIL raises what it likes of a broken file
        name = f"{len(data)} bytes" if data is not None else repr(path)
        raise ValueError(f"images: got {name}, want an image that can be read ({error})") from error
    return ImageOps.exif_transpose(image)


def encoded(
    dataset: Any, processor: Any, sides: Sequence[str], *, whole: bool = False, num_proc: int | None = None,
    name: str = "train",
) -> Any:  # fmt: skip
    """The records with their prompts and responses as token ids, images among them.

    Args:
        dataset: records with `prompt`, the `sides` and images.
        processor: the model's.
        sides: the names of the responses.
        whole: give `{side}_ids` with the prompt before the response, and no `prompt_ids`.
        num_proc, name: as in `fastpref.data.tokenize`.

    Returns:
        The data set with `prompt_ids`, `{side}_ids`, and beside them `images`, `prompt_text` (with one token an image)
            and `pixels`, a hash of what the processor makes of the images.

    Raises:
        ValueError: an image cannot be read, or there are more or fewer of them than image parts. The message names the
            record.
    """
    from datasets import Features, List, Value

    there = column_names(dataset)
    given: Record = {"processor": processor, "sides": list(sides), "whole": whole, "version": __version__}
    sized = hasattr(dataset, "__len__")
    if sized:
        given["files"] = _files(dataset)  # a changed file is another data set
    ids = [f"{side}_ids" for side in sides] + ([] if whole else ["prompt_ids"])
    features = dict(dataset.features or {}) if hasattr(dataset, "features") else {}
    dropped = {"prompt", *sides, *COLUMNS, "tools", "chat_template_kwargs"} & set(there)
    kept = {name: features[name] for name in there if name in features and name not in dropped}
    kept |= {name: List(Value("int32")) for name in ids}
    kept |= _prepared()
    return dataset.map(
        _encoded, with_indices=True, remove_columns=sorted(dropped), fn_kwargs=given,
        features=Features(kept) if set(there) - dropped <= set(kept) else None,
        **({"num_proc": num_proc, "desc": f"Reading images of {name} data"} if sized else {}),
    )  # fmt: skip


def mixed(dataset: Any) -> bool | None:
    """Whether some of the `encoded` records have images and some none. None: not known of a stream."""
    import pyarrow.compute as pc

    if not hasattr(dataset, "__len__"):
        return None
    if not len(dataset):
        return False
    found = pc.min_max(pc.list_value_length(dataset.data.column("images"))).as_py()
    return found["min"] == 0 < found["max"]


def without(dataset: Any) -> Any:
    """The records without their column of images, for a model that reads texts only.

    Raises:
        ValueError: a record has images. The message names it.
    """
    there = [name for name in COLUMNS if name in column_names(dataset)]
    if hasattr(dataset, "__len__"):
        for index, example in enumerate(dataset.select_columns(there)):
            _refused(example, index)
        return dataset.remove_columns(there)
    return dataset.map(_refused, with_indices=True, remove_columns=there)


def _refused(example: Record, index: int) -> Record:
    if listed(example):
        raise ValueError(
            f"dataset, record {index + 1}: images: got {len(listed(example))}, want none: the model reads texts only, "
            "or the trainer does, or processing_class is no processor of a vision-language model"
        )
    return {}


def _prepared() -> Record:
    """The features of `PREPARED`."""
    from datasets import List, Value

    source = {"bytes": Value("binary"), "path": Value("string")}
    return {"images": List(source), "prompt_text": Value("string"), "pixels": List(Value("int64"))}


def prepared_columns(dataset: Any) -> Record:
    """The columns that `encoded` puts beside token ids, with their features, if the data set has them."""
    return _prepared() if set(PREPARED) <= set(column_names(dataset)) else {}


def _files(dataset: Any) -> list[tuple[str, int, int]]:
    """Path, time and size of the files that the data set names."""
    names = [name for name in COLUMNS if name in dataset.column_names]
    found = set()
    for example in dataset.select_columns(names):
        stored = (source for source in listed(example) if not _is_picture(source))
        found |= {source["path"] for source in stored if source["bytes"] is None and source["path"]}
    stats = [(path, os.stat(path)) for path in sorted(found) if os.path.exists(path)]
    return [(path, stat.st_mtime_ns, stat.st_size) for path, stat in stats]


def _encoded(
    example: Record, index: int, processor: Any, sides: Sequence[str], whole: bool, version: str, files: Any = None
) -> Record:
    try:
        found = encode(dict(example), processor, sides, whole)
        return found | {"images": [_stored(source) for source in found["images"]]}
    except ValueError as error:
        raise ValueError(f"dataset, record {index + 1}: {error}") from error


def encode(example: Record, processor: Any, sides: Sequence[str], whole: bool = False) -> Record:
    """One record of `encoded`."""
    sources = listed(example)
    prompt, *texts = texts_of(example, processor, sides, len(sources))
    inputs = process(processor, [[opened(source) for source in sources]], [prompt])
    asked = inputs.pop("input_ids")[0].tolist()
    tokenizer = processor.tokenizer
    responses = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    _refuse_image_tokens(processor, sides, responses)
    found: Record = {} if whole else {"prompt_ids": asked}
    for side, ids in zip(sides, responses, strict=True):
        found[f"{side}_ids"] = asked + ids if whole else ids
    return found | {"images": sources, "prompt_text": prompt, "pixels": _hash(inputs)}


def texts_of(example: Mapping[str, Any], processor: Any, sides: Sequence[str], images: int) -> tuple[str, ...]:
    """(prompt, responses) as texts, with a token of the processor's in the place of each image.

    Raises:
        ValueError: there are more or fewer images than places for them.
    """
    if isinstance(example["prompt"], str):
        prompt, *texts = (example[name] for name in ("prompt", *sides))
        token = getattr(processor, "image_token", None)
        if isinstance(token, str) and prompt.count(token) != images:
            raise ValueError(_uneven(images, f"{prompt.count(token)} times {token!r} in the prompt"))
        return prompt, *texts
    messages = dict(example) | {"prompt": with_parts(example["prompt"], images)}
    for side in sides:
        messages[side] = with_parts(example[side], 0, side)
    return template_texts(messages, processor, sides)


def with_parts(messages: Sequence[Mapping[str, Any]], images: int, name: str = "prompt") -> list[Record]:
    """Messages whose contents are lists of parts, as in TRL's `prepare_multimodal_messages`.

    Raises:
        ValueError: their image parts are not as many as the images.
    """
    found, first = [], True
    for message in template.checked([dict(m) for m in messages]):
        content = message.get("content")
        if isinstance(content, str):
            own = [{"type": "image"}] * images if first and message["role"] == "user" else []
            content = [*own, {"type": "text", "text": content}]
            first = first and message["role"] != "user"
        found.append(dict(message) if content is None else {**message, "content": content})
    places = sum(part.get("type") == "image" for m in found for part in m.get("content") or () if m["role"] != "tool")
    if places != images:
        raise ValueError(_uneven(images, f"{places} image part{'s' * (places != 1)} in the messages of {name}"))
    return found


def _uneven(images: int, places: str) -> str:
    return f"images: got {images} for {places}, want one for each"


def process(processor: Any, images: Sequence[Sequence[Any]], texts: Sequence[str], side: str = "right") -> Any:
    """What the processor makes of prompts and their images, padded on one side.

    Prompts without images go along if no prompt has one.

    Raises:
        ValueError: the processor refuses them.
    """
    if not any(images):
        return processor(text=list(texts), padding=True, padding_side=side, return_tensors="pt",
                         add_special_tokens=False)  # fmt: skip
    try:
        return processor(
            images=[list(some) for some in images], text=list(texts), padding=True, padding_side=side,
            return_tensors="pt", add_special_tokens=False,
        )  # fmt: skip
    except Exception as error:  # a processor raises what it likes
        raise ValueError(f"images: got {sum(map(len, images))}, which the processor refuses: {error}") from error


def gradient(size: tuple[int, int], number: int) -> Any:
    """A picture of `size` (width, height) in which no two parts are alike."""
    from PIL import Image

    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    colours = [x, y, (x * y + 0.5 * number) % 1]
    return Image.fromarray((255 * np.stack(colours, -1)).astype(np.uint8))


def question(processor: Any) -> str:
    """A short prompt with a place for one image, by the chat template or by the processor's own token."""
    if getattr(processor, "chat_template", None) is None:
        return f"{processor.image_token} a"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    return template.template_text(processor, messages, add_generation_prompt=True)


def image_token_ids(processor: Any) -> set[int]:
    """The ids of the tokens that stand for an image's features."""
    found = {getattr(processor, "image_token_id", None), getattr(processor.tokenizer, "image_token_id", None)}
    return {int(token) for token in found if token is not None}


def _refuse_image_tokens(processor: Any, sides: Sequence[str], responses: Sequence[Sequence[int]]) -> None:
    tokens = image_token_ids(processor)
    for side, ids in zip(sides, responses, strict=True):
        if tokens & set(ids):
            raise ValueError(f"{side}: got an image's token in a response, want images in the prompt only")


def _hash(inputs: Mapping[str, Any]) -> list[int]:
    """128 bits of the tensors that reach the model beside the token ids, as two numbers."""
    names = sorted(set(inputs) - {"attention_mask"})
    tensors = ((name, inputs[name]) for name in names if isinstance(inputs[name], torch.Tensor))
    digest = bytes.fromhex(Fingerprint().weights(tensors).hexdigest())
    return np.frombuffer(digest, dtype=np.int64).tolist()


def located(record: Mapping[str, Any], folder: Path) -> Record:
    """A record of a file in `folder`, to which the paths of its images are relative, with absolute paths."""
    return {**record, **{name: _absolute(record[name], folder) for name in COLUMNS if name in record}}


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(one, folder) for one in value]
    if isinstance(value, Mapping) and value.get("path") and value.get("bytes") is None:
        return {**value, "path": str(folder / value["path"])}
    return str(folder / value) if isinstance(value, str) else value

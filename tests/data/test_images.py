"""Images of records: what counts as one, how they are opened, and where messages have them. The drawn sample."""

from __future__ import annotations

import io
import json

import pytest
import torch
from datasets import Dataset, Image, IterableDataset
from PIL import Image as Pictures

from fastpref.data import images
from fastpref.data.collators import PairCollator, UnpairedCollator
from fastpref.data.files import load_records
from fastpref.data.shapes import COLOURS, SHAPES, main, picture
from fastpref.data.vision import Vision
from fastpref.models import tiny_vision


def png(image: Pictures.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def test_every_way_to_give_an_image_gives_the_same_prompt(tmp_path):
    _, processor = tiny_vision()
    image = picture("circle", "red")
    image.save(tmp_path / "one.png")
    ways = [image, png(image), str(tmp_path / "one.png"), tmp_path / "one.png", {"bytes": png(image), "path": None}]
    found = []
    for way in ways:
        for columns in ({"image": way}, {"images": [way]}):
            record = {**columns, "prompt": "<image>?", "chosen": "a", "rejected": "b"}
            one = images.encode(record, processor, ("chosen", "rejected"))
            found.append((one["prompt_ids"], one["pixels"]))
    assert all(one == found[0] for one in found)
    assert found[0][0].count(processor.image_token_id) == 16


def test_columns_of_datasets_and_streams_are_read(tmp_path):
    _, processor = tiny_vision()
    rows = [{"image": picture("square", c), "prompt": "<image>?", "chosen": c, "rejected": "b"} for c in COLOURS]
    dataset = Dataset.from_list(rows)
    assert isinstance(dataset.features["image"], Image)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    found = [
        list(images.encoded(images.undecoded(some), processor, ("chosen", "rejected"))) for some in (dataset, stream)
    ]
    assert [row["pixels"] for row in found[0]] == [row["pixels"] for row in found[1]]
    assert len({tuple(row["pixels"]) for row in found[0]}) == len(COLOURS)


def test_a_picture_is_turned_upright(tmp_path):
    image = Pictures.new("RGB", (6, 3), "red")
    exif = Pictures.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert images.opened({"bytes": None, "path": str(tmp_path / "turned.jpg")}).size == (3, 6)


def test_images_of_plain_messages_stand_first():
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    found = images.with_parts(messages, 2)
    assert [part["type"] for part in found[1]["content"]] == ["image", "image", "text"]
    assert [part["type"] for message in (found[0], *found[2:]) for part in message["content"]] == ["text"] * 3
    with pytest.raises(ValueError, match="got 1 for 0 image parts in the messages of prompt"):
        images.with_parts([{"role": "user", "content": [{"type": "text", "text": "What?"}]}], 1)


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="images: got int, want paths, bytes or PIL images"):
        images.listed({"images": [3]})
    _, processor = tiny_vision()
    record = {"images": [picture("circle", "red")], "prompt": "<image>?", "chosen": "<image>", "rejected": "b"}
    with pytest.raises(ValueError, match="chosen: got an image's token in a response"):
        images.encode(record, processor, ("chosen", "rejected"))


def test_images_are_made_ready_once_for_completions_and_mismatched_ones(monkeypatch):
    _, processor = tiny_vision()
    images_of = []
    original = images.process
    monkeypatch.setattr(images, "process", lambda p, some, *a: images_of.append(len(some)) or original(p, some, *a))
    examples = []
    for colour in COLOURS:
        record = {"image": picture("circle", colour), "prompt": "<image>?", "completion": colour}
        own = images.encode(record, processor, ("completion",))
        examples.append(own | {"label": True, "kl_completion_ids": own["completion_ids"]})
    images_of.clear()
    vision = Vision(processor)
    collator = UnpairedCollator(layout="shared", ours=True, vision=vision)
    for some in (examples[:2], examples[2:]):
        batch = collator(some)
        (fresh,) = UnpairedCollator(layout="shared", ours=True, vision=Vision(processor))(some)["parts"]
        for part in (*batch["parts"], *batch["kl_parts"]):
            assert part["vision"].keys() == fresh["vision"].keys()
            assert all(torch.equal(value, fresh["vision"][name]) for name, value in part["vision"].items())
    assert images_of == [2] * 4  # of each batch once, and once by the fresh collator


@pytest.mark.parametrize("stream", [False, True])
def test_a_sharded_models_batch_without_images_is_refused_beside_others(stream):
    _, processor = tiny_vision()
    prompts = {True: "<image>?", False: "?"}
    record = {"chosen": "a", "rejected": "b"}
    found = {}
    for name, there in (("mixed", (True, False)), ("images", (True, True)), ("texts", (False, False))):
        rows = [record | {"images": [picture("circle", "red")] * some, "prompt": prompts[some]} for some in there]
        data = IterableDataset.from_generator(lambda r=rows: iter(r)) if stream else Dataset.from_list(rows)
        found[name] = images.encoded(images.undecoded(data), processor, ("chosen", "rejected"))
    assert [images.mixed(data) for data in found.values()] == ([None] * 3 if stream else [True, False, False])
    vision = Vision(processor, sharded=True)
    if not stream:
        vision.check_mixed(images.mixed(found["texts"]))
        PairCollator(layout="padded", vision=vision)(list(found["texts"]))
    with pytest.raises(ValueError, match="images: got records without any beside others with some"):
        vision.check_mixed(images.mixed(found["mixed"]))
        PairCollator(layout="padded", vision=vision)(list(found["mixed"])[1:])


def test_the_sample_is_drawn(tmp_path, capsys):
    assert main([str(tmp_path / "shapes")]) == 0
    path = tmp_path / "shapes" / "pairs.jsonl"
    assert capsys.readouterr().out.strip() == str(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = {row["chosen"][0]["content"] for row in rows}
    assert texts == {f"A {colour} {shape}." for colour in COLOURS for shape in SHAPES}
    assert all(row["chosen"] != row["rejected"] for row in rows)
    for row in load_records(path):
        colour = COLOURS[row["chosen"][0]["content"].split()[1]]
        assert colour in [found for _, found in images.opened(images.listed(row)[0]).getcolors()]
